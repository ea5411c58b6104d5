"""--quantize none gives back what bitsandbytes itself dequantises, from its folders and from lorakit's."""
import functools
import glob
import json
import os

import peers
from command import FIXTURES, Failure, same


def expected(folder, transposed):
    """A quantised folder's tensors with the quantised ones dequantised by bitsandbytes: 4-bit in the dtype they had,
    LLM.int8 in float32."""
    tensors, found, used = peers.tensors(folder), {}, set()
    for name, tensor in tensors.items():
        state = {k: v for k, v in tensors.items() if k.startswith(name + ".")}
        scale = name.removesuffix("weight") + "SCB"
        if any(".quant_state." in k for k in state):
            used |= set(state)  # from_dict takes keys out
            weight = peers.dequantize_4bit(tensor, peers.bnb.QuantState.from_dict(state, device="cpu"))
        elif name.endswith(".weight") and scale in tensors:
            weight = peers.bnb.int8_vectorwise_dequant(tensor, tensors[scale])
            used |= {scale, name + "_format"}
        else:
            found[name] = tensor
            continue
        found[name] = weight.T.contiguous() if transposed else weight
    if not used:
        raise Failure(f"{folder}: nothing in it is quantised")
    return {name: tensor for name, tensor in found.items() if name not in used}


def back(lorakit, folder, transposed, what):
    int8 = os.path.basename(folder) == "int8" or what == "int8"
    want = expected(folder, transposed)
    if int8:
        want = {name: tensor.float() for name, tensor in want.items()}
    got = lorakit.convert(folder, "--quantize", "none", *(["--dtype", "f32"] if int8 else []))
    same(peers.tensors(got), want, "against bitsandbytes' own dequantisation")
    if "quantization_config" in json.load(open(os.path.join(got, "config.json"))):
        raise Failure("config.json of the plain folder still has quantization_config")
    return f"{len(want)} tensors, value for value"


def check_bitsandbytes(lorakit, folder):
    return back(lorakit, folder, "gpt2" in folder, "")


def check_own(lorakit, checkpoint, kind):
    folder = lorakit.convert(os.path.join(FIXTURES, checkpoint), "--quantize", kind)
    return back(lorakit, folder, "gpt2" in checkpoint, kind)


def checks(lorakit):
    for folder in sorted(glob.glob(os.path.join(FIXTURES, "expected", "*", "*", ""))):
        checkpoint, variant = folder.split(os.sep)[-3:-1]
        yield f"back from bitsandbytes' {checkpoint} {variant}", functools.partial(check_bitsandbytes, lorakit, folder.rstrip(os.sep))
    for checkpoint in ("tiny-llama", "tiny-gpt2", "tiny-gemma3"):
        for kind in ("nf4", "fp4", "int8"):
            yield f"back from lorakit's {checkpoint} {kind}", functools.partial(check_own, lorakit, checkpoint, kind)
