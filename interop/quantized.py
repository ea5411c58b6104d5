"""transformers loads what lorakit quantised, and it is transformers' own quantised model."""
import functools
import json
import os
import tempfile

import torch

import peers
from command import FIXTURES, Failure, same

RESULTS = json.load(open(os.path.join(FIXTURES, "results.json")))
IDS = torch.tensor(RESULTS["input_ids"])

# name: lorakit's flags, transformers' settings
KINDS = {
    "nf4": (["--quantize", "nf4"], dict(quant_type="nf4")),
    "fp4": (["--quantize", "fp4"], dict(quant_type="fp4")),
    "nf4 without double quantisation": (["--quantize", "nf4", "--double-quant=false"], dict(quant_type="nf4", double_quant=False)),
    "int8": (["--quantize", "int8"], None),
    "nf4 with one more module excluded": (["--quantize", "nf4", "--exclude"], dict(quant_type="nf4", skip=True)),
}
EXCLUDED = {  # run-time names; results.json has the names in the file
    "tiny-llama": "model.layers.0.mlp.down_proj",
    "tiny-qwen3": "model.layers.1.self_attn.o_proj",
    "tiny-gpt2": "transformer.h.0.mlp.c_fc",
    "tiny-mixtral": "model.layers.1.self_attn.q_proj",
    "tiny-gemma3": "model.language_model.layers.0.mlp.down_proj",
}
# Against the model whose 8-bit statistics follow the midpoints, as lorakit's do, only the last bit of a mean may
# differ; against that of bitsandbytes' CPU kernel, some statistics are a few steps off, and these models are tiny.
TIGHT, LOOSE = (2e-4, 1e-4), (3e-2, 2e-2)  # relative error of the logits, difference of the loss
STATISTICS = (".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def own(source, settings, checkpoint):
    """The folder that transformers + bitsandbytes save of a checkpoint."""
    if settings and "skip" in settings:
        settings = settings | {"skip": peers.default_skips(source) + [EXCLUDED[checkpoint]]}
    config = peers.eight_bit() if settings is None else peers.four_bit(**settings)
    model = peers.model_class(source).from_pretrained(source, device_map="cpu", quantization_config=config)
    folder = tempfile.mkdtemp(prefix="own-")
    model.save_pretrained(folder)
    return folder


def answer(folder):
    """Logits and loss over the ids, computed in float32."""
    model, misfits = peers.load(folder)
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    if not any(True for _ in peers.linears(model)):
        raise Failure("transformers loads it as a model with no quantised linear")
    with torch.no_grad():
        out = model(input_ids=IDS, labels=IDS)
    return out.logits.float(), out.loss.item()


def distance(got, want):
    return ((got[0] - want[0]).norm() / want[0].norm()).item(), abs(got[1] - want[1])


def check(lorakit, checkpoint, kind):
    flags, settings = KINDS[kind]
    source = os.path.join(FIXTURES, checkpoint)
    if flags[-1] == "--exclude":
        flags = [*flags, RESULTS["checkpoints"][checkpoint]["exclude"]]
    folder = lorakit.convert(source, *flags)
    got = answer(folder)
    nested = bool(settings) and settings.get("double_quant", True)

    cpu = own(source, settings, checkpoint)
    same(peers.tensors(folder), peers.tensors(cpu), "against transformers' own save",
         STATISTICS if nested else STATISTICS[2:])
    if nested:
        with peers.midpoint_statistics():
            middle = own(source, settings, checkpoint)
        pairs = [(middle, TIGHT), (cpu, LOOSE)]
    else:
        pairs = [(cpu, (0, 0))]
    said = []
    for folder, (logits, loss) in pairs:
        e, l = distance(got, answer(folder))
        if e > logits or l > loss:
            raise Failure(f"loss {got[1]:.6f}: {l:.1e} from transformers' own (at most {loss:.0e}), logits {e:.1e} (at most {logits:.0e})")
        said.append(f"{l:.0e}")
    return f"loss {got[1]:.4f}, {' and '.join(said)} from transformers' own"


def sharded(lorakit, checkpoint):
    """Small shards load as one file does."""
    source = os.path.join(FIXTURES, checkpoint)
    one = answer(lorakit.convert(source, "--quantize", "nf4"))
    many = lorakit.convert(source, "--quantize", "nf4", "--max-shard-size", "30KB")
    shards = len([f for f in os.listdir(many) if f.endswith(".safetensors")])
    if shards < 2:
        raise Failure(f"--max-shard-size 30KB wrote {shards} file")
    if distance(answer(many), one) != (0, 0):
        raise Failure("the logits of the sharded folder are not those of the single file")
    return f"{shards} shards, the same logits"


def checks(lorakit):
    for checkpoint in EXCLUDED:
        for kind in KINDS:
            yield f"{checkpoint} in {kind}", functools.partial(check, lorakit, checkpoint, kind)
        yield f"{checkpoint} in nf4, sharded", functools.partial(sharded, lorakit, checkpoint)
    for checkpoint in ("tiny-llama-f32", "tiny-gemma3-f32", "tiny-qwen3-f16"):
        yield f"{checkpoint} in nf4", functools.partial(check, lorakit, checkpoint, "nf4")
