"""Writes NAME.weights.h5, as Keras 3 does: datasets as they are, at the path of their name. All headers are written
first, by HDF5, which says where the data goes; then the data, without it."""

import json
import os
import sys
from collections.abc import Sequence

import h5py
from h5py import h5d, h5f, h5g, h5p, h5s
from lorakit_plugin import Tensor, Unsupported, Writer

from . import elements, hdf5

# What HDF5 has, and what is read of it, see headers.py.
RANK = 32
DEPTH = 100
PATH = 1 << 16


class Weights(Writer):
    def __init__(self, path: str, tensors: Sequence[Tensor], metadata: dict[str, str]):
        _check(tensors)
        self._offsets = _headers(path, tensors, metadata)
        self._file = open(path, "r+b", buffering=0)

    def write(self, index: int, offset: int, data: memoryview) -> None:
        self._file.seek(self._offsets[index] + offset)
        while data:
            data = data[self._file.write(data) :]

    def finish(self) -> None:
        self._file.close()

    def abort(self) -> None:
        self._file.close()


def _check(tensors: Sequence[Tensor]) -> None:
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors):
        raise Unsupported("found two tensors of one name")
    for tensor in tensors:
        name = tensor.name
        if tensor.dtype not in elements.DTYPES:
            raise Unsupported(f"tensor {name}: found dtype {tensor.dtype}, expected one of {' '.join(elements.DTYPES)}")
        if len(tensor.shape) > RANK:
            raise Unsupported(f"tensor {name}: found {len(tensor.shape)} dimensions, expected at most {RANK}")
        _check_path(name)
        parent = name.rpartition("/")[0]
        while parent:
            if parent in names:
                raise Unsupported(f"tensor {name}: found a tensor {parent}, which cannot be a group as well")
            parent = parent.rpartition("/")[0]


def _check_path(name: str) -> None:
    parts = name.split("/")
    if any(part in ("", ".") or "\0" in part for part in parts):
        raise Unsupported(f"tensor {name!r}: found a name that is no path in HDF5, expected parts between slashes")
    if len(parts) > DEPTH or len(name.encode()) > PATH:
        raise Unsupported(f"tensor {name[:200]!r}: found a path of {len(parts)} parts and {len(name.encode()):,} bytes")


def _headers(path: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> list[int]:
    """Writes all but the data, and returns where that of each tensor goes. No time is stored, the version of the format
    does not depend on that of HDF5, and space is given out from the beginning to the end, so that the data of small
    tensors keeps the order too."""
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, h5f.LIBVER_V110)
    plan = h5p.create(h5p.FILE_CREATE)
    plan.set_obj_track_times(False)
    plan.set_file_space_strategy(h5f.FSPACE_STRATEGY_NONE, False, 1)
    offsets = []
    with h5py.File(h5f.create(os.fsencode(path), h5f.ACC_TRUNC, plan, access)) as file:
        groups = _Groups(file.id)
        for tensor in tensors:
            dataset = _dataset(groups, tensor)
            if tensor.dtype == "BF16":
                h5py.Dataset(dataset).attrs["dtype"] = elements.BFLOAT16
            offsets.append(dataset.get_offset() or 0)
        names = {tensor.name for tensor in tensors}
        for name, value in metadata.items():
            if name != hdf5.NAMES or not _name_layers(groups, names, value):
                _attribute(file, name, value)
    return offsets


class _Groups:
    """The groups of a file by their paths, made when they are needed."""

    def __init__(self, root: h5f.FileID):
        self._plan = h5p.create(h5p.GROUP_CREATE)
        self._plan.set_obj_track_times(False)
        self._groups = {"": h5g.open(root, b"/")}

    def get(self, path: str) -> h5g.GroupID:
        waiting = []
        while path not in self._groups:
            waiting.append(path)
            path = path.rpartition("/")[0]
        for one in reversed(waiting):
            above, _, name = one.rpartition("/")
            self._groups[one] = h5g.create(self._groups[above], name.encode(), gcpl=self._plan)
        return self._groups[waiting[0] if waiting else path]


def _dataset(groups: _Groups, tensor: Tensor) -> h5d.DatasetID:
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_layout(h5d.CONTIGUOUS)
    plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    space = h5s.create_simple(tensor.shape) if tensor.shape else h5s.create(h5s.SCALAR)
    above, _, name = tensor.name.rpartition("/")
    return h5d.create(groups.get(above), name.encode(), elements.stored(tensor.dtype), space, plan)


def _name_layers(groups: _Groups, tensors: set[str], text: str) -> bool:
    """Gives the groups of variables the names of their layers, as Keras does. Tells whether the text has them."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        return False
    for path, name in names.items():
        parts = path.split("/")
        if parts[-1] != "vars" or any("/".join(parts[: many + 1]) in tensors for many in range(len(parts))):
            return False
        try:
            _check_path(path)
        except Unsupported:
            return False
    for path, name in names.items():
        _attribute(h5py.Group(groups.get(path)), "name", name)
    return True


def _attribute(holder, name: str, value: str) -> None:
    """Sets an attribute. One that HDF5 does not take is left out: no loader of Keras reads it."""
    try:
        if "\0" in name or "\0" in value or not name:
            raise ValueError("found a NUL or no name")
        holder.attrs[name] = value
    except (ValueError, RuntimeError, OSError) as error:
        print(f"keras: metadata {name[:200]!r} is left out: {error}", file=sys.stderr)
