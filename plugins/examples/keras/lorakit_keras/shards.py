"""Reads sharded weights: NAME.weights.json, which says in which files the variables of each layer are."""

import json
import os

from lorakit_plugin import Container, Limit, Malformed, Unsupported

from . import hdf5
from .source import Source

INDEX = 64 << 20
FILES = 10_000


def open(path: str) -> Container:
    files = _files(path)
    sources, tensors, names, metadata = [], [], {}, {}
    missing = {group for groups in files.values() for group in groups}

    def close() -> None:
        for source in sources:
            source.close()

    try:
        for name in files:
            sources.append(Source.open(_inside(path, name)))
            found = hdf5.read(sources[-1], name)
            names |= json.loads(found.metadata.pop(hdf5.NAMES, "{}"))
            metadata |= found.metadata
            missing -= {tensor.name.rpartition("/")[0] for tensor in found.tensors}
            tensors += found.tensors
        if missing:
            raise Malformed(f"found no variables of {min(missing)}, expected those that the index names")
        seen = set()
        for tensor in tensors:
            if tensor.name in seen:
                raise Malformed(f"tensor {tensor.name}: found it in two files")
            seen.add(tensor.name)
    except BaseException:
        close()
        raise
    if names:
        metadata[hdf5.NAMES] = json.dumps(names, ensure_ascii=False)
    return Container(tensors, metadata, [os.path.basename(path), *files], close)


def _files(path: str) -> dict[str, list[str]]:
    """Returns the files in the order of their names, each with the groups that the index says it has."""
    source = Source.open(path)
    try:
        if source.size > INDEX:
            raise Limit(f"found an index of {source.size:,} bytes, expected at most {INDEX:,}")
        try:
            index = json.loads(source.read(0, source.size))
        except (ValueError, RecursionError) as error:
            raise Malformed(f"JSON: {error}") from error
    finally:
        source.close()
    map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(map, dict):
        raise Unsupported("found JSON without a weight_map, expected the index of sharded weights")
    files: dict[str, list[str]] = {}
    for group, names in map.items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
                raise Malformed(f"found the file {name!r} of {group!r}, expected a name in the same folder")
            files.setdefault(name, []).append(group.strip("/"))
    if not 0 < len(files) <= FILES:
        raise Limit(f"found {len(files):,} files in the index, expected one to {FILES:,}")
    return dict(sorted(files.items()))


def _inside(path: str, name: str) -> str:
    """Returns where the file is. A link that leads elsewhere is not followed."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    target = os.path.realpath(os.path.join(folder, name))
    if os.path.dirname(target) != folder:
        raise Unsupported(f"found {name} as a link out of the folder, expected a file in it")
    if not os.path.isfile(target):
        if os.path.exists(target):
            raise Malformed(f"found {name}, which is no file")
        raise FileNotFoundError(f"found no {name}, which the index names")
    return target
