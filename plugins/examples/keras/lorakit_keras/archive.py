"""Reads .keras files: zips with model.weights.h5, config.json and metadata.json. Keras stores the weights as they are,
so their extents are in the zip itself. A zip that was compressed by somebody else is unpacked into a temporary file."""

import shutil
import struct
import tempfile
import zipfile
import zlib

from lorakit_plugin import Container, Limit, Malformed, Unsupported

from . import hdf5
from .source import Source

MAGIC = b"PK\x03\x04"

WEIGHTS = "model.weights.h5"
OTHER_WEIGHTS = "model.weights.npz"
TEXTS = ("config.json", "metadata.json")

MEMBERS = 100_000
DIRECTORY = 64 << 20
# What is unpacked when a file is opened, for which there is half a minute.
UNPACKED = 2 << 30
# Deflate makes no more than this of a byte.
MOST = 1032


def read(source: Source) -> Container:
    members = _members(source)
    if WEIGHTS not in members:
        if OTHER_WEIGHTS in members:
            raise Unsupported(f"found weights in {OTHER_WEIGHTS}, expected {WEIGHTS}")
        raise Malformed(f"found a zip without {WEIGHTS}, expected one that Keras has saved")
    metadata = {}
    for name in TEXTS:
        text = _text(source, members.get(name))
        if text is not None:
            metadata[name] = text
    weights, close = _weights(source, members[WEIGHTS])
    try:
        found = hdf5.read(weights)
    except BaseException:
        close()
        raise

    def closed() -> None:
        close()
        source.close()

    return Container(found.tensors, found.metadata | metadata, close=closed)


def _members(source: Source) -> dict[str, zipfile.ZipInfo]:
    # zipfile reads the whole directory, whose length stands in the last bytes of the file, before it is looked at.
    tail = source.some(max(0, source.size - (1 << 16) - 22), 1 << 17)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise Malformed("found a zip without its directory, expected all of the file")
    if struct.unpack_from("<L", tail, end + 12)[0] > DIRECTORY:
        raise Limit(f"found a zip's directory of more than {DIRECTORY:,} bytes")
    try:
        listed = zipfile.ZipFile(source.stream()).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError) as error:
        raise Malformed(f"zip: {error}") from error
    if len(listed) > MEMBERS:
        raise Limit(f"found {len(listed):,} files in a zip, expected at most {MEMBERS:,}")
    members = {}
    for member in listed:
        if member.filename in members:
            raise Malformed(f"found {member.filename[:200]!r} twice in a zip")
        members[member.filename] = member
    return members


def _data(source: Source, member: zipfile.ZipInfo) -> Source:
    """Returns the bytes of a member as they are in the zip."""
    if member.flag_bits & 0x1:
        raise Unsupported(f"found {member.filename} encrypted")
    header = source.read(member.header_offset, 30)
    if header[:4] != MAGIC:
        raise Malformed(f"found {header[:4]!r} at {member.header_offset:,}, expected {member.filename} of the zip")
    name, extra = struct.unpack_from("<HH", header, 26)
    data = source.part(member.header_offset + 30 + name + extra, member.compress_size)
    if member.compress_type == zipfile.ZIP_STORED:
        if member.file_size != member.compress_size:
            raise Malformed(f"{member.filename}: found {member.compress_size:,} bytes, expected {member.file_size:,}")
    elif member.compress_type != zipfile.ZIP_DEFLATED:
        raise Unsupported(f"found {member.filename} by compression {member.compress_type}, expected none or deflate")
    return data


def _text(source: Source, member: zipfile.ZipInfo | None) -> str | None:
    """Returns a small file of a zip as text, where it is there and short."""
    if member is None or member.file_size > hdf5.TEXT:
        return None
    out = bytearray()
    for piece in _unpacked(_data(source, member), member):
        out += piece
    try:
        return out.decode()
    except UnicodeDecodeError as error:
        raise Malformed(f"{member.filename}: {error}") from error


def _weights(source: Source, member: zipfile.ZipInfo):
    """Returns the weights' file, and what gives it back beside source."""
    data = _data(source, member)
    if member.compress_type == zipfile.ZIP_STORED:
        return data, lambda: None
    if member.file_size > UNPACKED or member.file_size > shutil.disk_usage(tempfile.gettempdir()).free // 2:
        raise Limit(
            f"found {member.filename} compressed, of {member.file_size:,} bytes, expected at most {UNPACKED:,} and "
            "half of the free disk: Keras itself stores it as it is"
        )
    file = tempfile.TemporaryFile(buffering=0)
    try:
        for piece in _unpacked(data, member):
            file.write(piece)
    except BaseException:
        file.close()
        raise
    return Source(file, 0, member.file_size, temporary=True), file.close


def _unpacked(data: Source, member: zipfile.ZipInfo):
    """Yields the content of a member: as many bytes as the zip says, no more."""
    stored = member.compress_type == zipfile.ZIP_STORED
    if member.file_size > (data.size + 1) * MOST:
        raise Malformed(f"{member.filename}: found {member.file_size:,} bytes packed into {data.size:,}")
    inflate = None if stored else zlib.decompressobj(-15)
    left, check = member.file_size, 0
    at, waiting = 0, b""
    while left > 0:
        if not waiting:
            waiting = data.some(at, 1 << 20)
            at += len(waiting)
        if stored:
            piece, waiting = waiting, b""
        else:
            try:
                piece = inflate.decompress(waiting, min(left, 1 << 20))
            except zlib.error as error:
                raise Malformed(f"{member.filename}: {error}") from error
            waiting = inflate.unconsumed_tail
        if not piece and (at >= data.size and not waiting or inflate is not None and inflate.eof):
            raise Malformed(f"{member.filename}: found its end {left:,} bytes early")
        left -= len(piece)
        check = zlib.crc32(piece, check)
        yield piece
    if check != member.CRC:
        raise Malformed(f"{member.filename}: found the checksum {check:08x}, expected {member.CRC:08x}")
