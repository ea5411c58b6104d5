"""PEFT and transformers load what lorakit makes of adapters, and compute the same with it."""
import functools
import json
import os
import subprocess
import tempfile

import peers  # first: it sets the libraries up
import peft
import torch
from peft.tuners.lora import LoraLayer

from command import FIXTURES, Failure

ADAPTERS = os.path.join(FIXTURES, "adapters")
with open(os.path.join(ADAPTERS, "results.json")) as results:
    RESULTS = json.load(results)
IDS = torch.tensor(RESULTS["input_ids"])
CLOSE = 1e-5  # relative error of logits in float32: the order of sums alone
SVD = 1e-4  # relative error of a product that went through an SVD


def run(lorakit, command, *arguments):
    argv = [lorakit.binary, command, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Failure(f"lorakit {' '.join(argv[1:])}: exit {done.returncode}: {done.stderr.strip()[-300:]}")
    return done


def new(lorakit):
    return os.path.join(tempfile.mkdtemp(dir=lorakit.work), "out")


def base_folder(name):
    own = os.path.join(ADAPTERS, "bases", name)
    return own if os.path.isdir(own) else os.path.join(FIXTURES, name)


def plain(base):
    folder = base_folder(base)
    return peers.model_class(folder).from_pretrained(folder, dtype=torch.float32).eval()


def apart(got, want):
    if got.shape != want.shape:
        raise Failure(f"logits of shape {list(got.shape)}, not {list(want.shape)}")
    return ((got - want).norm() / want.norm()).item()


def checkpoint(folder):
    """Logits of a checkpoint folder, in which no key may be missing or too many."""
    model, info = peers.model_class(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    misfits = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    return peers.outputs(model.eval(), IDS)[1]


def grown(folder):
    """The rows of an embedding that an adapter folder brings along, or 0."""
    if not os.path.exists(os.path.join(folder, "adapter_model.safetensors")):
        return 0
    return max((len(t) for name, t in peers.tensors(folder).items() if "embed_tokens." in name and name.endswith("weight")), default=0)


def beside(base, folder):
    """The base's model with an adapter folder beside it, in PEFT; of a folder that lorakit wrote every key has to be
    used, and every one that PEFT wants has to be there."""
    model, rows = plain(base), grown(folder)
    if rows and rows > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    if folder.startswith(ADAPTERS):  # PEFT itself saves some keys twice
        return model
    found = peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder, device="cpu"))
    own = {name for name, _ in model.named_parameters()}  # a tied one is there once
    missing = [k for k in found.missing_keys if k in own and (".lora_" in k or ".modules_to_save." in k or "trainable_tokens" in k)]
    if missing or found.unexpected_keys:
        raise Failure(f"PEFT: missing {missing[:2]}, unexpected {found.unexpected_keys[:2]}")
    return model


def check_merge(lorakit, name):
    """The merge loads in transformers and answers as PEFT does with the adapter beside the base."""
    facts = RESULTS["adapters"][name]
    folder = new(lorakit)
    run(lorakit, "merge", base_folder(facts["base"]), os.path.join(ADAPTERS, name), folder, "--dtype", "f32")
    original = facts.get("same_as", name)  # PEFT itself cannot read every layout
    if original.endswith("/named") or original.endswith("/wrapper"):
        return check_tensors(folder, original, facts)
    error = apart(checkpoint(folder), peers.outputs(beside(facts["base"], os.path.join(ADAPTERS, original)), IDS)[1])
    if error > CLOSE:
        raise Failure(f"logits {error:.1e} from PEFT's, at most {CLOSE:.0e}")
    return f"logits {error:.0e} from PEFT's with the adapter beside the base"


def check_tensors(folder, name, facts):
    """Against the tensors that PEFT merged before they were renamed."""
    got = peers.tensors(folder)
    want = {k: t.float() for k, t in peers.tensors(base_folder(facts["base"])).items()} | peers.tensors(os.path.join(ADAPTERS, f"{name}.merged-f32.safetensors"))
    if set(got) != set(want):
        raise Failure(f"other tensors: {sorted(set(got) ^ set(want))[:3]}")
    worst = max(((got[k] - w).abs().max() / w.abs().max().clamp(min=1e-9)).item() for k, w in want.items())
    if worst > CLOSE:
        raise Failure(f"a tensor is {worst:.1e} from PEFT's merge")
    return f"tensors {worst:.0e} from PEFT's merge"


def check_several(lorakit, name):
    facts = RESULTS["several"][name]
    folder = new(lorakit)
    parts = [f"{os.path.join(ADAPTERS, a)}={w}" if w != 1 else os.path.join(ADAPTERS, a) for a, w in facts["adapters"]]
    run(lorakit, "merge", base_folder(facts["base"]), *parts, folder, "--dtype", "f32")
    return check_tensors(folder, name, facts)


def check_attach(lorakit, base, target, rank, init):
    """A new adapter loads in PEFT; with B zero the model is what it was, and A is not zero."""
    folder = new(lorakit)
    run(lorakit, "attach", base_folder(base), folder, "--rank", rank, "--alpha", 2 * rank, "--target", target, "--init", init, "--seed", 5)
    model = beside(base, folder)
    want = peers.outputs(plain(base), IDS)[1]
    got = peers.outputs(model, IDS)[1]
    a = [p for name, p in model.named_parameters() if ".lora_A." in name]
    if not a or any(p.shape[0] % rank or not p.abs().max() for p in a):
        raise Failure(f"{len(a)} A matrices, of ranks {sorted({p.shape[0] for p in a})}, some zero")
    if not torch.equal(got, want):
        raise Failure(f"logits {apart(got, want):.1e} from the base's, expected the same")
    return f"{len(a)} modules, the same logits"


def check_extract(lorakit, name, rank):
    """The adapter between a base and its merge, at the rank that the change has, is the change."""
    facts = RESULTS["adapters"][name]
    tuned, folder = new(lorakit), new(lorakit)
    run(lorakit, "merge", base_folder(facts["base"]), os.path.join(ADAPTERS, name), tuned, "--dtype", "f32")
    run(lorakit, "extract", base_folder(facts["base"]), tuned, folder, "--rank", rank)
    error = apart(peers.outputs(beside(facts["base"], folder), IDS)[1], checkpoint(tuned))
    if error > SVD:
        raise Failure(f"logits {error:.1e} from the tuned model's, at most {SVD:.0e}")
    return f"logits {error:.0e} from the tuned model's"


def products(model):
    """Module -> scaling * B A of the adapter in a PEFT model, in float64."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if "default" in module.lora_embedding_A:
                a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            else:
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = module.scaling["default"] * b.detach().flatten(1).double() @ a.detach().flatten(1).double()
    return found


def combined(name):
    """Module -> B A of a combination that PEFT made; its scaling is 1."""
    tensors = peers.tensors(os.path.join(ADAPTERS, "combined", f"{name}.safetensors"))
    found = {}
    for key, a in tensors.items():
        if ".lora_A." in key or key.endswith("lora_embedding_A"):
            b = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            found[key.split(".lora_")[0]] = b.flatten(1).double() @ a.flatten(1).double()
    return found


def compare(got, want, limit):
    if set(got) != set(want):
        raise Failure(f"other modules: {sorted(set(got) ^ set(want))[:3]}")
    worst = max(((got[k] - want[k]).norm() / want[k].norm().clamp(min=1e-12)).item() for k in want)
    if not worst <= limit:
        raise Failure(f"B A is {worst:.1e} from what it should be, at most {limit:.0e}")
    return worst


def check_combine(lorakit, name):
    """B A as PEFT's combination has it; what DARE draws is its own, so that one only has to load."""
    facts = RESULTS["combined"][name]
    folder = new(lorakit)
    parts = [f"{os.path.join(ADAPTERS, a)}={w}" for a, w in facts["adapters"]]
    flags = ["--type", facts["combination_type"] if len(parts) > 1 else "linear"]
    for key, flag in (("density", "--density"), ("majority_sign_method", "--majority-sign"), ("svd_rank", "--rank")):
        flags += [flag, facts[key]] if key in facts else []
    run(lorakit, "combine", folder, *parts, *flags)
    model = beside(facts["base"], folder)
    if facts["masks"]:
        return "loads in PEFT"
    return f"B A {compare(products(model), combined(name), SVD):.0e} from PEFT's"


def check_resize(lorakit, name, rank):
    """The best product of that rank."""
    facts = RESULTS["adapters"][name]
    folder = new(lorakit)
    run(lorakit, "resize", os.path.join(ADAPTERS, name), folder, "--rank", rank)
    model, want = beside(facts["base"], folder), {}
    for module, delta in products(beside(facts["base"], os.path.join(ADAPTERS, name))).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        want[module] = u[:, :rank] * s[:rank] @ v[:rank]
    return f"B A {compare(products(model), want, SVD):.0e} from the best of rank {rank}"


def checks(lorakit):
    for name, facts in RESULTS["adapters"].items():
        if "/init-" not in name and "/qlora" not in name:
            yield f"merge of {name}", functools.partial(check_merge, lorakit, name)
    for name in RESULTS["several"]:
        yield f"merge of several, {name}", functools.partial(check_several, lorakit, name)
    for base, target in (("llama", "all-linear"), ("llama", "attention"), ("llama", r".*\.(?!k)[a-z]+_proj"), ("tiny-gpt2", "c_attn,c_proj"),
                         ("phi3", "all-linear"), ("tiny-qwen3", "attention"), ("tiny-gemma3", "attention"), ("qwen2.5-vl", "all-linear"),
                         ("tiny-mixtral", "attention"), ("qwen3-moe", "attention")):
        for rank, init in ((4, "kaiming"), (1, "gaussian")):
            yield f"attach {target} of rank {rank} to {base}, {init}", functools.partial(check_attach, lorakit, base, target, rank, init)
    for name, rank in (("llama/attention", 4), ("llama/rslora", 8), ("tiny-gpt2/attention", 4), ("tiny-gemma3/language", 4), ("phi3/fused", 4)):
        yield f"extract {name}", functools.partial(check_extract, lorakit, name, rank)
    for name, facts in RESULTS["combined"].items():
        if "svd_clamp" not in facts:  # there is no such flag
            yield f"combine {name}", functools.partial(check_combine, lorakit, name)
    for name, rank in (("llama/attention", 2), ("llama/rslora", 3), ("llama/attention", 6), ("tiny-gpt2/attention", 2)):
        yield f"resize {name} to rank {rank}", functools.partial(check_resize, lorakit, name, rank)
