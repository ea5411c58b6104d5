"""transformers, compressed-tensors and mlx-lm load what lorakit quantises for them, and it is what they make of the same
model themselves. Models are made here, but for SmolLM2. All of it runs on a CPU: there transformers dequantises fp8 as it
loads it, and compressed-tensors all weights before the model first computes, so that logits are those of these weights;
what it quantises of activations it does there too."""
import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path

import peers  # first: it sets the libraries up
import mlx.core as mx
import mlx_lm.utils
import torch
import transformers as T
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from loguru import logger
from mlx.utils import tree_flatten
from safetensors.torch import save_file
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from checkpoints import fill
from command import Failure, same
from real import smollm_source

logger.remove()  # of compressed-tensors
mx.set_default_device(mx.cpu)

SHAPE = dict(vocab_size=256, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, mlp_only_layers=[], decoder_sparse_step=1)
MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SHAPE, head_dim=64, tie_word_embeddings=False)),
    "qwen2, which has biases": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**SHAPE, tie_word_embeddings=False)),
    "qwen3, whose head is tied": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**SHAPE, head_dim=64, tie_word_embeddings=True)),
    "qwen3-moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=64, tie_word_embeddings=False)),
}
ODD = "llama, some of whose rows are no whole groups"
EMBEDDED = ("*proj.weight", "model.embed_tokens.weight", "lm_head.weight")
IDS = [(7 + 31 * n + 5 * n * n) % 256 for n in range(48)]

COMPRESSED = {  # type: compressed-tensors' preset, or its arguments for weights where a preset wants data as well
    "fp8-channel": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "fp8-tensor": dict(num_bits=8, type="float", strategy="tensor"),
    "w8a8": "W8A8", "w3a16": "W3A16", "w4a16": "W4A16", "w8a16": "W8A16",
    "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16", "mxfp8": "MXFP8A16"}
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}  # share a scale in nvfp4
MIXED = [("w4a16", "w8a16"), ("nvfp4", "fp8-channel"), ("mlx4", "mlx8"), ("mlx3", "mlx-mxfp4")]
# What transformers makes of experts with a tensor each: in these types it takes plain ones for compressed and then finds none
REFUSED = ("w8a8", "w3a16", "w4a16", "w8a16", "nvfp4", "mxfp4")
# and in these it reads compressed ones
PACKED = ("w3a16", "w4a16", "w8a16", "mxfp4")
MLX = {f"mlx{bits}": dict(mode="affine", group_size=64, bits=bits) for bits in (2, 3, 4, 5, 6, 8)} | {
    "mlx-mxfp4": dict(mode="mxfp4", group_size=32, bits=4), "mlx-mxfp8": dict(mode="mxfp8", group_size=32, bits=8),
    "mlx-nvfp4": dict(mode="nvfp4", group_size=16, bits=4)}


@functools.cache
def model(work, name):
    """A checkpoint folder in bfloat16. Its config has the members too that the hub's have, which mlx-lm reads."""
    if name == "SmolLM2":
        return smollm_source(work)
    folder = tempfile.mkdtemp(dir=work)
    make = MODELS.get(name) or (lambda: T.LlamaForCausalLM(T.LlamaConfig(**SHAPE | {"intermediate_size": 392}, head_dim=64)))
    fill(make().float()).to(torch.bfloat16).save_pretrained(folder)
    edit(folder, rope_theta=10000.0, num_experts=EXPERTS["num_experts"])
    return folder


def edit(folder, **members):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump(config | members, file, indent=2)


def logits(folder):
    """The model as transformers loads the folder by itself, and its logits."""
    loaded, info = peers.model_class(folder).from_pretrained(folder, device_map="cpu", output_loading_info=True)
    misfits = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    with torch.no_grad():
        return loaded, loaded(input_ids=torch.tensor([IDS])).logits


def alike(got, want, what):
    if got.shape != want.shape or not torch.equal(got, want):
        raise Failure(f"{what}: {int((got != want).sum())} of {want.numel()} logits differ")


def refused(folder):
    """Whether transformers cannot load a folder for its experts."""
    try:
        logits(folder)
    except RuntimeError as error:
        return "automatic conversion of the weights" in str(error)
    return False


def scheme_of(kind, target="Linear"):
    preset = COMPRESSED[kind]
    if isinstance(preset, str):
        return preset_name_to_scheme(preset, [target])
    return QuantizationScheme(targets=[target], weights=QuantizationArgs(**preset))


def extremes(w, args):
    """The least and the greatest of each part that has a scale, as llm-compressor's observers see them."""
    if args.strategy == "tensor":
        return w.amin().reshape(1), w.amax().reshape(1)
    if args.strategy == "channel":
        return w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    if args.strategy == "block":
        rows, cols = args.block_structure
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % cols, 0, -w.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = w.unflatten(-1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def own_compressed(work, source, kind, down):
    """The folder that compressed-tensors and transformers save of a checkpoint, rounded without data. MLPs end in the
    type down."""
    loaded = peers.model_class(source).from_pretrained(source, device_map="cpu", dtype=torch.bfloat16)
    groups = {"group_0": scheme_of(kind)} | ({"group_1": scheme_of(down, "re:.*down_proj$")} if down != kind else {})
    apply_quantization_config(loaded, QuantizationConfig(config_groups=groups, ignore=["lm_head"]), show_progress=False)
    fused = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "quantization_scheme"):
            parent, _, leaf = name.rpartition(".")
            fused.setdefault((parent, FUSED.get(leaf, leaf)), []).append(module)
    with torch.no_grad():
        for modules in fused.values():
            args, whole = modules[0].quantization_scheme.weights, None
            if args.strategy == "tensor_group":
                whole = generate_gparam(min(m.weight.min() for m in modules), max(m.weight.max() for m in modules))
            for module in modules:
                scale, zero = calculate_qparams(*extremes(module.weight, args), args, global_scale=whole)
                for parameter, value in ("scale", scale), ("zero_point", zero), ("global_scale", whole):
                    if hasattr(module, "weight_" + parameter):
                        getattr(module, "weight_" + parameter).copy_(value)
    compressor = ModelCompressor.from_pretrained_model(loaded)
    compressor.compress_model(loaded)
    folder = tempfile.mkdtemp(dir=work)
    loaded.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def flags_of(kind, down):
    return ["--quantize", kind, *(["--rule", f"*.down_proj.weight={down}"] if down != kind else [])]


def check_compressed(lorakit, name, kind, down):
    source = model(lorakit.work, name)
    folder, own = lorakit.convert(source, *flags_of(kind, down)), own_compressed(lorakit.work, source, kind, down)
    stored = peers.tensors(own)
    same(peers.tensors(folder), stored, "against compressed-tensors' own")
    said = f"{len(stored)} tensors as compressed-tensors has them"
    if name == "qwen3-moe" and kind in REFUSED:
        if not refused(folder) or not refused(own):
            raise Failure(f"transformers loads plain experts beside {kind} by now, and lorakit says that it does not")
        return f"{said}; transformers loads plain experts beside them neither here nor there"
    (_, got), (theirs, want) = logits(folder), logits(own)
    alike(got, want, "against those of compressed-tensors' own folder")
    # computing has decompressed it; experts, which are plain, have other names in the model
    back = {n: t for n, t in peers.tensors(lorakit.convert(own, "--quantize", "none")).items() if ".experts." not in n}
    same(back, {n: t for n, t in theirs.state_dict().items() if n in back}, "decompressed by lorakit")
    return f"{said}, equal logits, {len(back)} tensors decompressed as it does"


def check_experts(lorakit, kind):
    """Experts with a tensor each, which transformers decompresses and stacks as it loads them."""
    source = model(lorakit.work, "qwen3-moe")
    folder = lorakit.convert(source, "--quantize", kind, "--experts", "per-expert")
    scheme, plain, stored = scheme_of(kind), peers.tensors(source), {}
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    for name, weight in list(plain.items()):
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        scale, zero = calculate_qparams(*extremes(weight, scheme.weights), scheme.weights)
        small = compressor.compress({"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}, scheme)
        stored |= {name.removesuffix("weight") + part: value for part, value in small.items()}
        plain[name] = compressor.decompress(dict(small), scheme)["weight"]
    same(peers.tensors(folder), stored, "against compressed-tensors' own")
    decompressed = tempfile.mkdtemp(dir=lorakit.work)
    T.AutoConfig.from_pretrained(source).save_pretrained(decompressed)
    save_file(plain, os.path.join(decompressed, "model.safetensors"), {"format": "pt"})
    (_, got), (_, want) = logits(folder), logits(decompressed)
    alike(got, want, "against those of the weights that compressed-tensors decompresses")
    return f"{len(stored)} tensors as compressed-tensors has them, the logits of its decompressed weights"


@contextlib.contextmanager
def fp8_on_a_cpu():
    """transformers refuses to quantise to fp8 without a GPU, though what does it runs on a CPU."""
    refuse = FineGrainedFP8HfQuantizer.validate_environment
    FineGrainedFP8HfQuantizer.validate_environment = lambda *args, **kwargs: None
    try:
        yield
    finally:
        FineGrainedFP8HfQuantizer.validate_environment = refuse


def check_fp8(lorakit, name, experts):
    source, own = model(lorakit.work, name), tempfile.mkdtemp(dir=lorakit.work)
    folder = lorakit.convert(source, "--quantize", "fp8", "--experts", "per-expert" if experts else "keep")
    skipped = ["lm_head"] if experts else ["lm_head", "mlp.experts"]
    with fp8_on_a_cpu():
        loaded = peers.model_class(source).from_pretrained(
            source, device_map="cpu", dtype=torch.bfloat16, quantization_config=T.FineGrainedFP8Config(modules_to_not_convert=skipped))
        quantised = loaded.state_dict()
        loaded.save_pretrained(own)
        # as on a GPU, where it leaves the weights as they are
        again, info = peers.model_class(folder).from_pretrained(folder, device_map="cpu", output_loading_info=True)
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise Failure(f"transformers, on a GPU: {str(info)[:200]}")
    same(again.state_dict(), quantised, "against transformers' own")
    # It does not load what it saves of such experts
    (_, got), (_, want) = logits(folder), logits(lorakit.convert(folder, "--quantize", "none") if experts else own)
    alike(got, want, "against those of the plain weights" if experts else "against those of transformers' own folder")
    return f"{len(quantised)} parameters as transformers has them, equal logits"


def by_mlx(loaded):
    """The parameters of mlx-lm's model, and its logits, in float32: on a CPU experts run in no other type."""
    parameters = dict(tree_flatten(loaded.parameters()))
    loaded.set_dtype(mx.float32)
    return parameters, loaded(mx.array([IDS]))


def check_mlx(lorakit, name, kind, down, embeddings):
    """mlx-lm quantises embeddings and heads too, which lorakit does where it is told to. MLPs end in the type down."""
    source, included = model(lorakit.work, name), []
    if embeddings:
        included = [flag for glob in EMBEDDED if glob != "lm_head.weight" or "lm_head.weight" in peers.tensors(source)
                    for flag in ("--include", glob)]
    folder = lorakit.convert(source, *flags_of(kind, down), *included)
    chosen = {name.removesuffix(".scales") for name in peers.tensors(folder) if name.endswith(".scales")}
    theirs, config = mlx_lm.utils.load_model(Path(source))
    with contextlib.redirect_stdout(None):
        theirs, _ = mlx_lm.utils.quantize_model(
            theirs, config, MLX[kind]["group_size"], MLX[kind]["bits"], mode=MLX[kind]["mode"],
            quant_predicate=lambda path, module: (embeddings or path.endswith("_proj") and ".switch_mlp." not in path)
            and MLX[down if path.endswith("down_proj") else kind])
    (got, answer), (want, wanted) = by_mlx(mlx_lm.utils.load_model(Path(folder))[0]), by_mlx(theirs)
    if set(got) != set(want):
        raise Failure(f"mlx-lm's own has other parameters: {sorted(set(got) ^ set(want))[:3]}")
    for parameter, value in want.items():
        if got[parameter].dtype != value.dtype or not mx.array_equal(got[parameter], value):
            raise Failure(f"{parameter} is not that of mlx-lm's own")
    if not mx.array_equal(answer, wanted):
        raise Failure("the logits are not those of mlx-lm's own model")
    return f"{len(chosen)} modules as mlx-lm quantises them, equal logits"


def checks(lorakit):
    for name in MODELS:
        for kind in COMPRESSED:
            yield f"{name} in {kind}", functools.partial(check_compressed, lorakit, name, kind, kind)
        yield f"{name} in fp8", functools.partial(check_fp8, lorakit, name, False)
        for kind in MLX:
            yield f"{name} in {kind}", functools.partial(check_mlx, lorakit, name, kind, kind, False)
    for kind in MLX:
        yield f"{ODD} in {kind}", functools.partial(check_mlx, lorakit, ODD, kind, kind, False)
    yield "qwen3-moe with experts in fp8", functools.partial(check_fp8, lorakit, "qwen3-moe", True)
    for kind in PACKED:
        yield f"qwen3-moe with experts in {kind}", functools.partial(check_experts, lorakit, kind)
    yield "SmolLM2 in nvfp4", functools.partial(check_compressed, lorakit, "SmolLM2", "nvfp4", "nvfp4")
    yield "SmolLM2 in mlx4", functools.partial(check_mlx, lorakit, "SmolLM2", "mlx4", "mlx4", False)
    for kind in ("mlx4", "mlx-mxfp8"):
        for name in list(MODELS)[:3]:
            yield f"{name} in {kind} with embeddings", functools.partial(check_mlx, lorakit, name, kind, kind, True)
    for name in list(MODELS)[:3]:
        for kind, down in MIXED:
            check = check_mlx if kind in MLX else check_compressed
            yield f"{name} in {kind} and {down}", functools.partial(check, lorakit, name, kind, down, *([False] if kind in MLX else []))
