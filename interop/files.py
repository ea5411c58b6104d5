"""The safetensors library opens every file that lorakit writes."""
import functools
import glob
import json
import os
import random
import struct

import safetensors

from command import FIXTURES, Failure

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}


def read(path):
    """name -> (dtype, shape, bytes) of one file, by the reference implementation, which checks all of it."""
    with open(path, "rb") as file:
        return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(file.read())}


def folder_or_file(path):
    """All tensors at a destination; an index has to say what is where."""
    if os.path.isfile(path):
        return read(path)
    found, where = {}, {}
    for file in sorted(glob.glob(os.path.join(path, "*.safetensors"))):
        tensors = read(file)
        if set(tensors) & set(found):
            raise Failure(f"{path}: {sorted(set(tensors) & set(found))[0]} is in two shards")
        found |= tensors
        where |= dict.fromkeys(tensors, os.path.basename(file))
    if not found:
        raise Failure(f"{path}: no tensors")
    index = os.path.join(path, "model.safetensors.index.json")
    if len(set(where.values())) > 1 or os.path.exists(index):
        said = json.load(open(index))
        if said["weight_map"] != where:
            odd = sorted(k for k in set(where) | set(said["weight_map"]) if where.get(k) != said["weight_map"].get(k))
            raise Failure(f"{index}: weight_map is wrong for {odd[:3]}")
        size = sum(len(data) for _, _, data in found.values())
        if said["metadata"]["total_size"] != size:
            raise Failure(f"{index}: total_size {said['metadata']['total_size']}, the tensors have {size} bytes")
        names = sorted(set(where.values()))
        if names != [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]:
            raise Failure(f"{path}: shards are named {names}")
    return found


def every_dtype(path, bits=BITS):
    """A file with each dtype in some shapes, empty and scalar ones among them."""
    values, header, data = random.Random(13), {"__metadata__": {"format": "pt", "ключ": "värde \"quoted\"\n"}}, b""
    for dtype, width in sorted(bits.items(), key=lambda item: -item[1]):
        for shape in ([], [0, 4], [8], [3, 4, 2]) if width >= 8 else ([0, 4], [8], [3, 4, 2]):
            count = 1
            for n in shape:
                count *= n
            size = count * width // 8
            raw = bytes(values.randrange(2) if dtype == "BOOL" else values.randrange(256) for _ in range(size))
            header[f"{dtype}.{'x'.join(map(str, shape))}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
            data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
    return read(path)


def dtypes(lorakit, suffix, *flags):
    source = os.path.join(lorakit.work, "dtypes.safetensors")
    want = every_dtype(source)
    got = folder_or_file(lorakit.convert(source, *flags, suffix=suffix))
    if got != want:
        raise Failure(f"differ from the source: {sorted(k for k in set(got) | set(want) if got.get(k) != want.get(k))[:3]}")
    return f"{len(want)} tensors of {len(BITS)} dtypes, byte for byte"


def resharded(lorakit, checkpoint, limit):
    source = os.path.join(FIXTURES, checkpoint)
    path = lorakit.convert(source, "--max-shard-size", f"{limit}KB")
    if folder_or_file(path) != folder_or_file(source):
        raise Failure("differs from the source")
    shards = glob.glob(os.path.join(path, "*.safetensors"))
    for shard in shards:
        sizes = [len(data) for _, _, data in read(shard).values()]
        if sum(sizes) > limit * 1000 and len(sizes) > 1:
            raise Failure(f"{os.path.basename(shard)} has {sum(sizes)} bytes of tensors, more than --max-shard-size {limit}KB")
    return f"{len(shards)} shards"


def all_written(lorakit):
    written = [path for path in lorakit.written if not path.endswith(".gguf")]  # those have been read by gguf-py
    files = 0
    for path in written:
        folder_or_file(path)
        files += 1 if os.path.isfile(path) else len(glob.glob(os.path.join(path, "*.safetensors")))
    if not files:
        raise Failure("nothing was written")
    return f"{files} files of {len(written)} destinations"


def checks(lorakit):
    yield "safetensors opens a file of every dtype", functools.partial(dtypes, lorakit, ".safetensors")
    yield "safetensors opens a folder of every dtype", functools.partial(dtypes, lorakit, "")
    yield "safetensors opens small shards of every dtype", functools.partial(dtypes, lorakit, "", "--max-shard-size", "200B")
    for checkpoint, limit in (("tiny-llama", 40), ("tiny-gemma3-f32", 25), ("tiny-mixtral", 1000)):
        yield f"safetensors opens {checkpoint} in shards of {limit} KB", functools.partial(resharded, lorakit, checkpoint, limit)
    yield "safetensors opens every file that was written", functools.partial(all_written, lorakit)
