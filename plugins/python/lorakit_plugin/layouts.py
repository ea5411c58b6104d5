"""What layouts of most formats have in common: tensors split into shards, the names of files, and an index."""

import json
from collections.abc import Callable, Sequence

from .formats import Extra, Layout, LayoutOptions, Shard
from .tensors import Tensor


def lay_out(
    tensors: Sequence[Tensor],
    options: LayoutOptions,
    extension: str,
    shard: Callable[[str, Sequence[int]], Shard],
    stem: str = "model",
) -> Layout:
    """Splits tensors into shards as huggingface_hub does, has each laid out by shard(name, members), where members are
    numbers of tensors, and writes the index as transformers does.

    A shard is filled until the next tensor (or group) would make it larger than options.max_shard_size; a tensor (or
    group) that alone is larger becomes a shard of its own, before the one that is being filled. One shard is called
    STEM.EXTENSION, or what options.single_file says; several are STEM-00001-of-00003.EXTENSION, beside
    STEM.EXTENSION.index.json. extension has its dot, and options.stem goes before stem."""
    _check(tensors, options)
    stem = options.stem or stem
    split = _split(tensors, options)
    shards = []
    for number, members in enumerate(split, 1):
        name = stem + extension
        if options.single_file:
            name = options.single_file
        elif len(split) > 1:
            name = f"{stem}-{number:05}-of-{len(split):05}{extension}"
        shards.append(shard(name, members))
    if len(shards) == 1:
        return Layout(shards)
    return Layout(shards, [Extra(f"{stem}{extension}.index.json", _index(tensors, split, shards, options))])


def _check(tensors: Sequence[Tensor], options: LayoutOptions) -> None:
    if options.max_shard_size < 0:
        raise ValueError(f"found a shard size of {options.max_shard_size}, expected 0 or more")
    if options.groups and len(options.groups) != len(tensors):
        raise ValueError(f"found {len(options.groups)} groups for {len(tensors)} tensors, expected one for each")
    seen = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name!r}: found it twice, expected it once")
        seen.add(tensor.name)


def _split(tensors: Sequence[Tensor], options: LayoutOptions) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index in range(len(tensors)):
        groups.setdefault(options.groups[index] if options.groups else index, []).append(index)
    limited = options.max_shard_size and not options.single_file
    shards, current, filled = [], [], 0
    for members in groups.values():
        size = sum(tensors[index].nbytes for index in members)
        if limited and size > options.max_shard_size:
            shards.append(members)
            continue
        if limited and filled + size > options.max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current = current + members
        filled += size
    if current or not shards:
        shards.append(current)
    return shards


def _index(
    tensors: Sequence[Tensor], split: Sequence[Sequence[int]], shards: Sequence[Shard], options: LayoutOptions
) -> bytes:
    places = {tensors[index].name: shard.name for members, shard in zip(split, shards) for index in members}
    metadata = {
        "total_parameters": options.parameters or sum(tensor.elements for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    index = {"metadata": metadata, "weight_map": places}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
