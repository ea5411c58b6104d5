"""What a user of other tools has for quantising a checkpoint without data, and for making it plain again, on a CPU.
mlx-lm converts as its command does; compressed-tensors and transformers' fp8 are functions on tensors, in a plain loop
over the files, since what calls them wants a GPU or the whole model; over every third linear alone, as they take minutes.
Usage: schemes.py write|read fp8|mlx4|w4a16|nvfp4 SRC DST"""
import glob
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


def mlx(way, source, target):
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model, quantize_model, save_config, save_model

    mx.set_default_device(mx.cpu)
    model, config = load_model(Path(source), lazy=True)
    if way == "write":  # what lorakit quantises; mlx-lm would have embeddings and heads too
        model, config = quantize_model(model, config, 64, 4, quant_predicate=lambda path, module: path.endswith("_proj"))
    else:
        model = dequantize_model(model)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    save_model(target, model, donate_model=True)
    save_config(config, Path(target) / "config.json")


def fp8(way):
    """Functions from the tensors of a module to those that take their place."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float"))
    if way == "write":
        return lambda tensors, _: Fp8Quantize(quantizer).convert({"weight": tensors["weight"]})
    read = Fp8Dequantize(quantizer)._dequantize_one
    return lambda tensors, _: {"weight": read(tensors["weight"], tensors["weight_scale_inv"], torch.bfloat16)}


def compressed(way, preset, source):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from safetensors import safe_open

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    if way == "read":
        return lambda tensors, _: {"weight": compressor.decompress(tensors, scheme)["weight"]}

    where = json.load(open(os.path.join(source, "model.safetensors.index.json")))["weight_map"]
    ends = {}  # of a weight, which others share a scale with

    def ends_of(module):
        if module not in ends:
            name = module + ".weight"
            with safe_open(os.path.join(source, where[name]), "pt") as file:
                weight = file.get_tensor(name)
            ends[module] = weight.min(), weight.max()
        return ends[module]

    def write(tensors, module):
        weight = tensors["weight"]
        groups = weight.unflatten(-1, (-1, args.group_size))
        whole = None
        if args.strategy == "tensor_group":
            parent, _, leaf = module.rpartition(".")
            fused = next((f for f in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if leaf in f), (leaf,))
            low, high = zip(*(ends_of(f"{parent}.{member}") for member in fused))
            whole = generate_gparam(min(low), max(high))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
        state = {"weight": weight, "weight_scale": scale if whole is not None else scale.to(weight.dtype), "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        return compressor.compress(state, scheme)

    return write


def loop(change, source, target):
    """Rewrites every third linear."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    modules = {}
    for path in sorted(glob.glob(source + "/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                module, _, part = name.rpartition(".")
                if module.endswith("_proj"):
                    modules.setdefault(module, {})[part] = path, name
    out = {}
    for module in sorted(modules)[::3]:
        tensors = {}
        for part, (path, name) in modules[module].items():
            with safe_open(path, "pt") as file:
                tensors[part] = file.get_tensor(name)
        out |= {f"{module}.{part}": tensor.contiguous() for part, tensor in change(tensors, module).items()}
    os.makedirs(target)
    save_file(out, os.path.join(target, "model.safetensors"), {"format": "pt"})


def main(way, kind, source, target):
    if kind == "mlx4":
        mlx(way, source, target)
    elif kind == "fp8":
        loop(fp8(way), source, target)
    else:
        loop(compressed(way, {"w4a16": "W4A16", "nvfp4": "NVFP4A16"}[kind], source), source, target)


main(*sys.argv[1:])
