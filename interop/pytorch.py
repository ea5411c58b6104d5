"""torch.load and transformers read what lorakit writes as PyTorch files, and torch.save writes the same bytes."""
import functools
import glob
import json
import os
import zipfile

import peers
import torch
from safetensors.torch import load_file, save_file

import files
from command import FIXTURES, Failure, same


def convert(lorakit, source, *flags, suffix=""):
    path = lorakit.convert(source, *flags, suffix=suffix)
    lorakit.written.remove(path)  # the checks of all that was written are for safetensors
    return path


def load(path):
    """A file's tensors, by torch.load in both ways, after every checksum in it was found right."""
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise Failure(f"{path}: the checksum of {bad} is wrong")
    tensors = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    same({k: v.view(torch.uint8) if v.dim() else v for k, v in mapped.items()},
         {k: v.view(torch.uint8) if v.dim() else v for k, v in tensors.items()}, "mapped against read")
    return tensors


def as_bytes(tensors):
    return {k: (v.dtype, v.shape, v.reshape(-1).view(torch.uint8).tolist()) for k, v in tensors.items()}


def torchs(path, tensors):
    """Fails unless torch.save writes the same file, but for the hash that it puts in last."""
    saved = os.path.join(os.path.dirname(path), "torch", os.path.basename(path))
    os.makedirs(os.path.dirname(saved), exist_ok=True)
    torch.save(tensors, saved)
    got, want = open(path, "rb").read(), open(saved, "rb").read()
    behind = want.rindex(b"PK\3\4")
    with zipfile.ZipFile(saved) as archive:
        directory = want[archive.start_dir:want.rindex(b"PK\1\2")]
    want = want[:behind] + directory
    if got[:len(want)] != want or len(got) != len(want) + 56 + 20 + 22:
        at = next((i for i, (g, w) in enumerate(zip(got, want)) if g != w), len(want))
        raise Failure(f"{path}: differs from torch.save's file of {len(want)} bytes from byte {at} on")


def dtypes(lorakit, suffix):
    source = os.path.join(lorakit.work, "torch-dtypes.safetensors")
    files.every_dtype(source, {k: v for k, v in files.BITS.items() if v != 6 and k != "F4"})
    tensors = load_file(source)
    got = load(convert(lorakit, source, suffix=suffix))
    if as_bytes(got) != as_bytes(tensors):
        raise Failure("differs from the source")
    path = convert(lorakit, source, suffix=suffix)
    torchs(path, {name: tensors[name].clone() for name in got})
    back = files.read(lorakit.convert(path, suffix=".safetensors"))
    if back != files.read(source):
        raise Failure("differs on the way back")
    return f"{len(got)} tensors, byte for byte"


def many(lorakit, count):
    source = os.path.join(lorakit.work, "torch-many.safetensors")
    save_file({f"layer.{i:05}": torch.tensor([i]) for i in range(count)}, source)
    path = convert(lorakit, source, suffix=".pt")
    got = load(path)
    if [int(v) for v in got.values()] != list(range(count)):
        raise Failure("differs from the source")
    torchs(path, {k: v.clone() for k, v in got.items()})
    return f"{os.path.getsize(path)} bytes"


def folder(lorakit, checkpoint, *flags):
    path = convert(lorakit, os.path.join(FIXTURES, checkpoint), "--to", "pytorch", *flags)
    shards = sorted(glob.glob(os.path.join(path, "*.bin")))
    tensors = {}
    for shard in shards:
        tensors |= load(shard)
    if len(shards) > 1:
        where = json.load(open(os.path.join(path, "pytorch_model.bin.index.json")))["weight_map"]
        if set(where) != set(tensors) or set(where.values()) != set(map(os.path.basename, shards)):
            raise Failure("the index is wrong")
    twin = lorakit.convert(os.path.join(FIXTURES, checkpoint), *[f for f in flags if "KB" not in f and f != "--max-shard-size"])
    same(tensors, peers.tensors(twin), "against the safetensors folder")
    cls = peers.model_class(path)
    model, info = cls.from_pretrained(path, device_map="cpu", use_safetensors=False, output_loading_info=True)
    if misfits := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise Failure(f"keys that do not fit: {misfits[:3]}")
    want = cls.from_pretrained(twin, device_map="cpu")
    same(dict(model.state_dict()), dict(want.state_dict()), "as transformers loads both")
    return f"{len(tensors)} tensors in {len(shards)} files"


def checks(lorakit):
    for suffix in (".bin", ".pt", ".pth"):
        yield f"PyTorch loads a {suffix} of every dtype", functools.partial(dtypes, lorakit, suffix)
    for count in (1, 2, 999, 1000, 1001, 2000, 2001, 65_600):
        yield f"PyTorch loads {count} tensors", functools.partial(many, lorakit, count)
    for checkpoint, flags in (("tiny-llama", ()), ("tiny-llama", ("--max-shard-size", "40KB")), ("tiny-gemma3", ()), ("tiny-mixtral", ("--max-shard-size", "60KB")),
                              ("tiny-gpt2-f32", ()), ("tiny-llama", ("--quantize", "nf4")), ("tiny-qwen3", ("--quantize", "nf4", "--double-quant=false"))):
        yield f"transformers loads {' '.join((checkpoint, *flags))} as PyTorch files", functools.partial(folder, lorakit, checkpoint, *flags)
