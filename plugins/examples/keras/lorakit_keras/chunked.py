"""Reads datasets that lie in chunks, compressed or not. The filters of HDF5 are not used: what a chunk becomes is held
to the size of a chunk."""

import itertools
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy
from lorakit_plugin import Limit, Malformed
from lorakit_plugin.tensors import BITS

from .source import Source

DEFLATE, SHUFFLE = 1, 2

CHUNK = 1 << 30
# What is decoded at once, where chunks are small.
BAND = 4 << 20
# What is kept of decoded chunks, for all tensors: reads often come in pieces that are smaller than a chunk.
KEPT = 128 << 20


class Values:
    """How the elements of a dataset lie in the file."""

    def __init__(self, dtype: str, swapped: bool):
        self.width = BITS[dtype] // 8
        self._swapped = swapped

    def little(self, data) -> bytes:
        """Returns bytes of whole elements as little-endian."""
        if not self._swapped:
            return data
        return numpy.frombuffer(data, f"u{self.width}").byteswap().tobytes()


class Chunked:
    """A dataset in chunks, which make up a grid over the shape."""

    def __init__(self, path: str, source: Source, kind: Values, shape, chunk, filters):
        self._path, self._source, self._kind, self._filters = path, source, kind, filters
        self._shape, self._chunk = tuple(shape), tuple(chunk)
        self._grid = tuple(-(-size // step) for size, step in zip(shape, chunk))
        self._bytes = math.prod(chunk) * kind.width
        if self._bytes > CHUNK:
            raise Limit(f"tensor {path}: found chunks of {self._bytes:,} bytes, expected at most {CHUNK:,}")
        self._serial = next(_serials)
        self._chunks: dict[int, tuple[int, int, int]] = {}
        self.first = 0

    def add(self, number: int, offset: int, size: int, mask: int) -> None:
        """Takes where a chunk lies, by its number in the grid, and which filters it has not gone through."""
        # Deflate makes data that it cannot compress longer by a few bytes in a thousand.
        if offset + size > self._source.size or size > self._bytes + self._bytes // 64 + 1024:
            raise Malformed(f"tensor {self._path}: found a chunk of {size:,} bytes at {offset:,}")
        if not self._filters and size != self._bytes:
            raise Malformed(f"tensor {self._path}: found a chunk of {size:,} bytes, expected {self._bytes:,}")
        self._chunks[number] = (offset, size, mask)

    def check(self) -> None:
        """Holds that all chunks are there."""
        if len(self._chunks) != math.prod(self._grid):
            found = f"found {len(self._chunks):,} chunks, expected {math.prod(self._grid):,}"
            raise Malformed(f"tensor {self._path}: {found}")
        self.first = self._chunks[0][0]

    def _number(self, place) -> int:
        number = 0
        for one, many in zip(place, self._grid):
            number = number * many + one
        return number

    def read(self, offset: int, length: int) -> Iterator[memoryview]:
        """Yields the bytes [offset, offset + length)."""
        width = self._kind.width
        lo, hi = offset // width, -(-(offset + length) // width)
        for first, values in self._regions(lo, hi):
            data = memoryview(values.reshape(-1).view("u1"))
            begin = first * width
            yield data[max(0, offset - begin) : offset + length - begin]

    def _regions(self, lo: int, hi: int) -> Iterator[tuple[int, numpy.ndarray]]:
        """Yields arrays that follow one another and have the elements [lo, hi) among them, each with the number of its
        first element. Each is a slab along one axis, at one place of all axes before it, and whole along those after
        it."""
        axis = 0
        inner = math.prod(self._shape[1:])
        while axis < len(self._shape) - 1 and inner * self._chunk[axis] * self._kind.width > BAND:
            axis += 1
            inner //= self._shape[axis]
        size, step = self._shape[axis], self._chunk[axis]
        row, end = lo // inner, -(-hi // inner)
        while row < end:
            outer, begin = divmod(row, size)
            stop = min(size, begin + end - row, (begin // step + 1) * step)
            place = numpy.unravel_index(outer, self._shape[:axis]) if axis else ()
            yield row * inner, self._slab([int(one) for one in place], begin, stop)
            row += stop - begin

    def _slab(self, place: list[int], begin: int, stop: int) -> numpy.ndarray:
        axis = len(place)
        slab = numpy.empty((stop - begin, *self._shape[axis + 1 :]), f"V{self._kind.width}")
        fixed = [*place, begin]
        head = [one // step for one, step in zip(fixed, self._chunk)]
        inside = tuple(one % step for one, step in zip(place, self._chunk))
        low = begin % self._chunk[axis]
        for tail in itertools.product(*(range(many) for many in self._grid[axis + 1 :])):
            chunk = self._decoded(self._number([*head, *tail]))
            to, of = [slice(None)], [slice(low, low + stop - begin)]
            for one, step, size in zip(tail, self._chunk[axis + 1 :], self._shape[axis + 1 :]):
                many = min(step, size - one * step)
                to.append(slice(one * step, one * step + many))
                of.append(slice(0, many))
            slab[tuple(to)] = chunk[inside + tuple(of)]
        return slab

    def _decoded(self, number: int) -> numpy.ndarray:
        key = (self._serial, number)
        data = _kept.get(key)
        if data is None:
            data = self._kind.little(self._decode(number))
            _kept.put(key, data)
        return numpy.frombuffer(data, f"V{self._kind.width}").reshape(self._chunk)

    def _decode(self, number: int) -> bytes:
        offset, size, mask = self._chunks[number]
        data = self._source.read(offset, size)
        for index in reversed(range(len(self._filters))):
            code, width = self._filters[index]
            if mask >> index & 1:
                continue
            data = self._inflated(data) if code == DEFLATE else _unshuffled(data, width)
        if len(data) != self._bytes:
            raise Malformed(f"tensor {self._path}: found a chunk of {len(data):,} bytes, expected {self._bytes:,}")
        return data

    def _inflated(self, data: bytes) -> bytes:
        inflate = zlib.decompressobj()
        try:
            out = inflate.decompress(data, self._bytes)
            if len(out) == self._bytes and not inflate.eof:
                out += inflate.decompress(inflate.unconsumed_tail, 1)  # the checksum at the end, and no more
        except zlib.error as error:
            raise Malformed(f"tensor {self._path}: {error}") from error
        if not inflate.eof:
            raise Malformed(f"tensor {self._path}: found a chunk without its end after {len(out):,} bytes")
        return out


def _unshuffled(data: bytes, width: int) -> bytes:
    """Undoes shuffle, which puts first the first bytes of all elements, then the second ones. What is left over at the
    end stays there."""
    whole = len(data) // width * width
    return numpy.frombuffer(data, "u1", whole).reshape(width, -1).T.tobytes() + data[whole:]


class _Kept:
    """The chunks that were decoded last."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> bytes | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: tuple[int, int], data: bytes) -> None:
        with self._lock:
            if key in self._chunks:
                return
            self._chunks[key] = data
            self._size += len(data)
            while self._size > KEPT and len(self._chunks) > 1:
                self._size -= len(self._chunks.popitem(last=False)[1])


_kept = _Kept()
_serials = itertools.count()
