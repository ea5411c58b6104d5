"""HDF5 files: their headers, of which another process tells, and their data, which is read past the library. So nothing
outside of the file is opened, and no filter of HDF5 runs, which could make gigabytes of a byte."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from lorakit_plugin import Limit, Malformed, Stored, Unsupported

from .chunked import Chunked, Values
from .reader import Reader
from .source import Source

MAGIC = b"\x89HDF\r\n\x1a\n"

# The names that Keras 3 gives to layers, by the groups of their variables, as JSON.
NAMES = "keras.names"

# The most bytes of a text that is taken along.
TEXT = 1 << 20

_KINDS = {"malformed": Malformed, "unsupported": Unsupported, "limit": Limit}

reader = Reader()


@dataclass
class File:
    tensors: list[Stored]
    metadata: dict[str, str]


def read(source: Source, file: str = "") -> File:
    """Reads the headers. file is the base name of the file, where it is not the one that was opened."""
    if source.head(len(MAGIC)) != MAGIC:
        raise Malformed(f"found {source.head(len(MAGIC))!r} at the beginning, expected an HDF5 file")
    answer = reader.ask(source)
    if "refused" in answer:
        raise _KINDS[answer["refused"]](answer["message"])
    found = [_tensor(one, source, file) for one in answer["datasets"]]
    found.sort(key=lambda one: (one[0], one[1].name))
    return File([tensor for _, tensor in found], answer["texts"])


def _tensor(answer: dict, source: Source, file: str) -> tuple[int, Stored]:
    """Returns the tensor, and where its data begins."""
    values = Values(answer["dtype"], answer["big"])
    make = functools.partial(Stored, answer["name"], answer["dtype"], tuple(answer["shape"]), file=file)
    if "compact" in answer:
        data = values.little(bytes.fromhex(answer["compact"]))
        return 0, make(read=lambda offset, length: data[offset : offset + length])
    if "contiguous" in answer:
        begin = answer["contiguous"]
        if answer["big"] or source.temporary:
            return begin, make(read=functools.partial(_contiguous, source, begin, values))
        return begin, make(offset=source.start + begin)
    chunks = Chunked(answer["name"], source, values, answer["shape"], answer["chunk"], answer["filters"])
    for chunk in answer["chunks"]:
        chunks.add(*chunk)
    chunks.check()
    return chunks.first, make(read=chunks.read)


def _contiguous(source: Source, begin: int, values: Values, offset: int, length: int) -> Iterator[memoryview]:
    lo, hi = offset, offset + length
    while lo < hi:
        first = lo - lo % values.width
        last = min(-(-hi // values.width) * values.width, first + (1 << 20))
        data = memoryview(values.little(source.read(begin + first, last - first)))
        yield data[lo - first : hi - first]
        lo = last
