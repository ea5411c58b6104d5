"""Files that are read at offsets, by several threads at once."""

import io
import os

from lorakit_plugin import Malformed


class Source:
    """A file, or a part of one, that HDF5 sees as a whole file. Of one that is temporary nobody else reads anything."""

    def __init__(self, file, start: int, size: int, temporary: bool = False):
        self.start = start
        self.size = size
        self.temporary = temporary
        self._file = file

    @classmethod
    def open(cls, path: str) -> "Source":
        file = open(path, "rb", buffering=0)
        return cls(file, 0, os.fstat(file.fileno()).st_size)

    def part(self, start: int, size: int) -> "Source":
        """Returns the part, which shares the file."""
        if start < 0 or size < 0 or start + size > self.size:
            raise Malformed(f"found a part of {size} bytes at {start}, expected it within {self.size}")
        return Source(self._file, self.start + start, size, self.temporary)

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly so many bytes."""
        data = self.some(offset, length)
        if len(data) != length:
            raise Malformed(f"found {len(data)} bytes at {offset}, expected {length}")
        return data

    def head(self, length: int) -> bytes:
        return self.some(0, length)

    def some(self, offset: int, length: int) -> bytes:
        """Returns the bytes that there are."""
        length = max(0, min(length, self.size - offset))
        pieces = []
        while length > 0:
            piece = os.pread(self._file.fileno(), length, self.start + offset)
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def stream(self) -> io.RawIOBase:
        """Returns a file object of it, for one thread."""
        return _Stream(self)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


class _Stream(io.RawIOBase):
    def __init__(self, source: Source):
        self._source = source
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise OSError(f"found the offset {base + offset}")
        self._offset = base + offset
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer) -> int:
        data = self._source.some(self._offset, len(buffer))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)
