"""A program that reads the headers of HDF5 files: the library is not made for files of strangers, and some of them have
it run for ever, or crash. So it runs here, in a process of its own with limits, and is not asked for data. See
reader.py.

The arguments are the number of a socket, and how many seconds of a processor a file may take. On the socket a file is a
line of JSON with its beginning and its length, and comes with a descriptor. The answer is a line of JSON, see _answer.
The end of the socket is that of the program."""

import io
import json
import math
import os
import resource
import socket
import sys
from collections.abc import Iterator

# No filter of HDF5 is ever run, and none is loaded.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import elements
import h5py
import numpy
from h5py import h5a, h5d, h5f, h5g, h5l, h5o, h5p, h5s, h5t

# The names that Keras 3 gives to layers, by the groups of their variables, as JSON.
NAMES = "keras.names"

OBJECTS = 1_000_000
CHUNKS = 1_000_000
DEPTH = 100
PATH = 1 << 16
TEXT = 1 << 20

MEMORY = 8 << 30

DEFLATE, SHUFFLE = 1, 2

# What h5py raises.
FAULTS = (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError)


class Refused(Exception):
    """kind is malformed, unsupported or limit."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Window(io.RawIOBase):
    """A part of a file. HDF5 has nothing else to open."""

    def __init__(self, descriptor: int, start: int, size: int):
        self._descriptor, self._start, self._size = descriptor, start, size
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"found the offset {base + offset}")
        self._offset = base + offset
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer) -> int:
        length = max(0, min(len(buffer), self._size - self._offset))
        os.lseek(self._descriptor, self._start + self._offset, os.SEEK_SET)
        data = os.read(self._descriptor, length) if length else b""
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


def _answer(descriptor: int, start: int, size: int) -> dict:
    try:
        with h5py.File(Window(descriptor, start, size), "r") as opened:
            return _read(opened.id, size)
    except Refused as error:
        return {"refused": error.kind, "message": str(error)}
    except FAULTS as error:
        return {"refused": "malformed", "message": f"HDF5: {error}"}


def _read(root: h5f.FileID, size: int) -> dict:
    if root.get_create_plist().get_userblock() != 0:
        raise Refused("unsupported", "found a user block, expected a file that begins with HDF5")
    group = h5g.open(root, b"/")
    names: dict[str, str] = {}
    datasets = [_dataset(path, dataset, size) for path, dataset in _walk(group, names)]
    texts = _texts(group)
    if names and len(text := json.dumps(names, ensure_ascii=False)) <= TEXT:
        texts[NAMES] = text
    return {"datasets": datasets, "texts": texts}


def _walk(root: h5g.GroupID, names: dict[str, str]) -> Iterator[tuple[str, h5d.DatasetID]]:
    """Yields all datasets, and notes the names of layers. HDF5 is a graph: what is not a tree is refused."""
    seen = {h5o.get_info(root).addr}
    waiting = [("", 0, root)]
    while waiting:
        path, depth, group = waiting.pop()
        if path == "vars" or path.endswith("/vars"):
            name = _text(group, b"name")
            if name is not None:
                names[path] = name
        children = []
        for link in group:
            children.append(_joined(path, link))
            kind = group.links.get_info(link).type
            if kind != h5l.TYPE_HARD:
                word = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}
                raise Refused(
                    "unsupported", f"{children[-1]}: found {word.get(kind, 'an unknown link')}, expected data"
                )
            if len(seen) + len(children) > OBJECTS:
                raise Refused("limit", f"found more than {OBJECTS:,} objects")
        for child in reversed(children):
            object = h5o.open(group, child.rpartition("/")[2].encode())
            address = h5o.get_info(object).addr
            if address in seen:
                raise Refused("unsupported", f"{child}: found a second link to an object, expected a tree")
            seen.add(address)
            if isinstance(object, h5g.GroupID):
                if depth == DEPTH:
                    raise Refused("limit", f"{child[:200]}: found a group {DEPTH} groups deep")
                waiting.append((child, depth + 1, object))
            elif isinstance(object, h5d.DatasetID):
                yield child, object
            else:
                raise Refused("unsupported", f"{child}: found a type by itself, expected a group or data")


def _joined(path: str, link: bytes) -> str:
    try:
        name = link.decode()
    except UnicodeDecodeError:
        raise Refused("malformed", f"found the name {link[:200]!r}, expected UTF-8") from None
    joined = f"{path}/{name}" if path else name
    if len(joined.encode()) > PATH:
        raise Refused("limit", f"{joined[:200]}...: found a path of more than {PATH:,} bytes")
    return joined


def _dataset(path: str, dataset: h5d.DatasetID, size: int) -> dict:
    """Returns a dataset's name, dtype, whether it is big-endian, its shape, and where its data is: compact (the bytes
    in hexadecimal), contiguous (an offset), or in chunks (their size, the filters, and a list of them)."""
    plan = dataset.get_create_plist()
    # Before all else: to ask a virtual dataset for its shape opens other files.
    layout = plan.get_layout()
    if layout == h5d.VIRTUAL:
        raise Refused("unsupported", f"tensor {path}: found a virtual dataset, expected data")
    if layout == h5d.CONTIGUOUS and plan.get_external_count():
        raise Refused("unsupported", f"tensor {path}: found data in another file, expected it in this one")
    space = dataset.get_space()
    if space.get_simple_extent_type() == h5s.NULL:
        raise Refused("unsupported", f"tensor {path}: found no shape, expected one")
    shape = space.get_simple_extent_dims()
    kind = elements.of(dataset.get_type(), _text(dataset, b"dtype") or "")
    if kind is None:
        found = elements.named(dataset.get_type())
        raise Refused("unsupported", f"tensor {path}: found {found}, expected numbers of a type that Keras writes")
    width = dataset.get_type().get_size()
    expected = math.prod(shape) * width
    if expected >= 1 << 62:
        raise Refused("malformed", f"tensor {path}: found the shape {list(shape)}, expected one that a file can have")
    answer = {"name": path, "dtype": kind[0], "big": kind[1], "shape": shape}
    if expected == 0:
        return answer | {"compact": ""}
    if layout == h5d.COMPACT:
        return answer | {"compact": _compact(path, dataset, expected).hex()}
    if layout == h5d.CHUNKED:
        return answer | _chunks(path, dataset, plan, shape, width)
    offset, there = dataset.get_offset(), dataset.get_storage_size()
    if offset is None or there == 0:
        raise Refused("malformed", f"tensor {path}: found no data, expected {expected:,} bytes")
    if there != expected or offset + expected > size:
        found = f"found {there:,} bytes at {offset:,} of {size:,}"
        raise Refused("malformed", f"tensor {path}: {found}, expected {expected:,} within the file")
    return answer | {"contiguous": offset}


def _compact(path: str, dataset: h5d.DatasetID, size: int) -> bytes:
    """Returns data that lies in the header of a dataset, in the order of the bytes in the file."""
    if dataset.get_storage_size() != size:
        found = dataset.get_storage_size()
        raise Refused("malformed", f"tensor {path}: found {found:,} bytes, expected {size:,}")
    data = bytearray(size)
    flat = numpy.frombuffer(data, f"V{dataset.get_type().get_size()}")
    dataset.read(h5s.ALL, h5s.ALL, flat.reshape(dataset.shape), dataset.get_type())
    return bytes(data)


def _chunks(path: str, dataset: h5d.DatasetID, plan: h5p.PropDCID, shape, width: int) -> dict:
    chunk = plan.get_chunk()
    if len(chunk) != len(shape) or min(chunk) < 1:
        raise Refused("malformed", f"tensor {path}: found chunks of {list(chunk)} for the shape {list(shape)}")
    filters = _filters(path, plan, width)
    grid = [-(-many // step) for many, step in zip(shape, chunk)]
    count, found = math.prod(grid), dataset.get_num_chunks()
    if found != count:
        raise Refused("malformed", f"tensor {path}: found {found:,} chunks, expected all {count:,} to be there")
    if count > CHUNKS:
        raise Refused("limit", f"tensor {path}: found {count:,} chunks, expected at most {CHUNKS:,}")
    chunks = []

    def add(info) -> None:
        number = 0
        for at, step, many in zip(info.chunk_offset, chunk, grid):
            if at % step or at // step >= many:
                raise Refused(
                    "malformed", f"tensor {path}: found a chunk at {list(info.chunk_offset)} of {list(shape)}"
                )
            number = number * many + at // step
        chunks.append([number, info.byte_offset, info.size, info.filter_mask])

    dataset.chunk_iter(add)
    return {"chunk": chunk, "filters": filters, "chunks": chunks}


def _filters(path: str, plan: h5p.PropDCID, width: int) -> list[tuple[int, int]]:
    """Returns the filters of a dataset, each with the width of the elements that it shuffles."""
    found = []
    for index in range(plan.get_nfilters()):
        code, _, values, name = plan.get_filter(index)
        if code not in (DEFLATE, SHUFFLE) or code in [one for one, _ in found]:
            word = name.decode(errors="replace") or str(code)
            message = f"tensor {path}: found the filter {word}, expected gzip or shuffle, once each"
            raise Refused("unsupported", message)
        shuffled = values[0] if code == SHUFFLE and values else width
        if code == SHUFFLE and not 0 < shuffled <= 1 << 16:
            raise Refused("malformed", f"tensor {path}: found a shuffle of {shuffled} bytes")
        found.append((code, shuffled))
    return found


def _texts(root: h5g.GroupID) -> dict[str, str]:
    """Returns the attributes of the file that are texts, as far as they are short."""
    found: dict[str, str] = {}
    for index in range(min(h5a.get_num_attrs(root), 1000)):
        name = h5a.open(root, index=index).name
        text = _text(root, name)
        try:
            key = name.decode()
        except UnicodeDecodeError:
            continue
        if text is not None and sum(map(len, found.values())) + len(text) <= 2 * TEXT:
            found[key] = text
    return found


def _text(object, name: bytes) -> str | None:
    """Returns an attribute, or nothing where it is not there or no text."""
    if not h5a.exists(object, name):
        return None
    attribute = h5a.open(object, name)
    if attribute.get_space().get_simple_extent_type() != h5s.SCALAR or attribute.get_type().get_class() != h5t.STRING:
        return None
    if attribute.get_storage_size() > TEXT:
        return None
    holder = h5py.Group(object) if isinstance(object, h5g.GroupID) else h5py.Dataset(object)
    value = holder.attrs[name]
    try:
        text = value.decode() if isinstance(value, bytes) else value
        return text if isinstance(text, str) and len(text.encode()) <= TEXT else None
    except UnicodeError:
        return None


def _limit(of: int, most: int) -> None:
    """Sets a limit, where the system has it and a lower one is not in force."""
    _, hard = resource.getrlimit(of)
    try:
        resource.setrlimit(of, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    except (OSError, ValueError) as error:
        print(f"keras: HDF5 is read without a limit: {error}", file=sys.stderr)


def main() -> None:
    _limit(resource.RLIMIT_AS, MEMORY)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        while True:
            line, descriptors, _, _ = socket.recv_fds(connection, 1 << 10, 1)
            if not line:
                return
            # The kernel ends the process, also where nobody is there any more to do so.
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + int(sys.argv[2]))
            try:
                answer = _answer(descriptors[0], *json.loads(line))
            finally:
                os.close(descriptors[0])
            connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
