"""FormatService: the methods of formats behind the protocol."""

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import SupportsIndex

from . import plugin_pb2 as pb
from .errors import Limit
from .formats import Container, Format, Layout, LayoutOptions, Writer
from .handles import Handles
from .plugin_pb2_grpc import FormatServiceServicer
from .statuses import MESSAGE, Misuse, batches, check_kind, check_text, pieces, streaming, unary
from .tensors import BITS, Data, Stored, Tensor


class Opened:
    """A container that was opened, and the numbers of its opaque tensors: their indices in it."""

    def __init__(self, format: Format, path: str, container: Container):
        self.files = list(container.files) or [os.path.basename(path)]
        self.tensors = list(container.tensors)
        self.metadata = container.metadata
        for name in self.files:
            check_text(name, "a file name")
        check_metadata(self.metadata)
        for tensor in self.tensors:
            check_kind(tensor, Stored, "a tensor")
            check_text(tensor.name, "a tensor's name")
            check_text(tensor.file, f"the file of tensor {tensor.name!r}")
            if tensor.dtype not in BITS:
                raise Misuse(f"found dtype {tensor.dtype!r} of tensor {tensor.name!r}, expected one of lorakit's")
            check_kind(tensor.shape, Sequence, f"the shape of tensor {tensor.name!r}")
            for size in (*tensor.shape, tensor.offset or 0):
                if not isinstance(size, SupportsIndex) or not 0 <= size < 1 << 63:
                    raise Misuse(f"found {size!r} in the shape or offset of tensor {tensor.name!r}, expected int >= 0")
            if (tensor.offset is None) == (tensor.read is None):
                raise Misuse(f"found tensor {tensor.name!r} with offset and read, or neither, expected one of them")
            if tensor.offset is not None and not format.extents:
                raise Misuse(f"found tensor {tensor.name!r} with an offset in a format that does not say extents")

    def stored(self, index: int) -> pb.StoredTensor:
        tensor = self.tensors[index]
        message = pb.StoredTensor(tensor=to_message(tensor), file=tensor.file or self.files[0])
        if tensor.offset is None:
            message.opaque.id = index
        else:
            message.extent.offset = tensor.offset
        return message

    def read(self, id: int, offset: int, length: int) -> Iterator[pb.ReadResponse]:
        if not 0 <= id < len(self.tensors) or self.tensors[id].read is None:
            raise Misuse(f"found id {id}, which is of no opaque tensor")
        tensor = self.tensors[id]
        if offset < 0 or length < 0 or offset + length > tensor.nbytes:
            raise Misuse(f"found a read of {length} bytes at {offset} of {tensor.nbytes} of tensor {tensor.name!r}")
        at = offset
        for data in _several(tensor.read(offset, length)):
            for _, chunk in pieces(data):
                if at + len(chunk) > offset + length:
                    raise Misuse(f"sent more than {length} bytes of tensor {tensor.name!r}")
                yield pb.ReadResponse(offset=at, data=bytes(chunk))
                at += len(chunk)
        if at < offset + length:
            raise Misuse(f"sent {at - offset} of {length} bytes of tensor {tensor.name!r}")


def _several(data) -> Iterable[Data]:
    try:
        return [memoryview(data)]
    except TypeError:
        return data


class Writing:
    """A file that is being written, and how far it is."""

    def __init__(self, path: str, tensors: Sequence[Tensor], writer: Writer):
        self.path = path
        self.tensors = tensors
        self.writer = writer
        self.lock = threading.Lock()
        self.index = 0
        self.offset = 0
        self.size: int | None = None
        self.aborted = False
        self._skip()

    def _skip(self) -> None:
        """Goes on to the next tensor that lacks data."""
        while self.index < len(self.tensors) and self.offset == self.tensors[self.index].nbytes:
            self.index, self.offset = self.index + 1, 0

    def write(self, request: pb.WriteRequest) -> int:
        with self.lock:
            self._open()
            if not 0 <= request.tensor < len(self.tensors):
                raise Misuse(f"found tensor {request.tensor}, expected one of {len(self.tensors)}")
            if not request.data:
                return 0
            if (request.tensor, request.offset) != (self.index, self.offset):
                raise Misuse(
                    f"found tensor {request.tensor} at {request.offset}, "
                    f"expected tensor {self.index} at {self.offset}"
                )
            tensor = self.tensors[self.index]
            if self.offset + len(request.data) > tensor.nbytes:
                raise Misuse(f"found more than the {tensor.nbytes} bytes of tensor {tensor.name!r}")
            self.writer.write(self.index, self.offset, memoryview(request.data))
            self.offset += len(request.data)
            self._skip()
            return len(request.data)

    def finish(self) -> int:
        with self.lock:
            if self.size is not None:
                return self.size
            self._open()
            if self.index < len(self.tensors):
                tensor = self.tensors[self.index]
                raise Misuse(f"found {self.offset} bytes of tensor {tensor.name!r}, expected {tensor.nbytes}")
            self.writer.finish()
            with open(self.path, "r+b") as file:
                os.fsync(file.fileno())
                self.size = os.fstat(file.fileno()).st_size
            return self.size

    def _open(self) -> None:
        if self.aborted or self.size is not None:
            raise Misuse("found a file that was finished or given up, expected one that is written")

    def abort(self) -> None:
        with self.lock:
            if self.aborted:
                return
            self.aborted = True
            if self.size is None:
                self.writer.abort()
            remove(self.path)

    def close(self) -> None:
        if self.size is None:
            self.abort()


def remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


class FormatService(FormatServiceServicer):
    """The formats of a plugin by their names."""

    def __init__(self, formats: Sequence[Format]):
        self._formats = {format.name: format for format in formats}
        numbers = itertools.count(1)
        self._opened = Handles(numbers)
        self._written = Handles(numbers)

    def _format(self, name: str) -> Format:
        if name not in self._formats:
            raise Misuse(f"found format {name!r}, which this plugin does not have")
        return self._formats[name]

    @unary
    def Sniff(self, request, context):
        return pb.SniffResponse(yes=bool(self._format(request.format).sniff(request.path)))

    @unary
    def Open(self, request, context):
        format = self._format(request.format)
        container = format.open(request.path)
        check_kind(container, Container, f"what open of format {format.name} returns")
        try:
            opened = Opened(format, request.path, container)
            answer = pb.OpenResponse(files=opened.files, metadata=from_metadata(opened.metadata))
            _check_size(answer)
        except BaseException:
            if container.close is not None:
                container.close()
            raise
        answer.handle = self._opened.add(opened, container.close)
        return answer

    @streaming
    def List(self, request, context):
        with self._opened.use(request.handle) as opened:
            for batch in batches(opened.stored(index) for index in range(len(opened.tensors))):
                yield pb.ListResponse(tensors=batch)

    @streaming
    def Read(self, request, context):
        with self._opened.use(request.handle) as opened:
            yield from opened.read(request.id, request.offset, request.length)

    @streaming
    def Layout(self, request, context):
        options, tensors, groups = None, [], []
        for message in request:
            if message.HasField("options"):
                options = message.options
            elif options is None:
                raise Misuse("found tensors, expected options")
            tensors += [from_message(one.tensor) for one in message.tensors]
            groups += [one.group for one in message.tensors]
        if options is None:
            raise Misuse("found nothing, expected options")
        steer = LayoutOptions(
            options.max_shard_size,
            options.single_file,
            options.stem,
            options.parameters,
            to_metadata(options.metadata),
            groups,
        )
        layout = self._format(options.format).layout(tensors, steer)
        check_kind(layout, Layout, f"what layout of format {options.format} returns")
        for batch in batches(_items(layout)):
            yield pb.LayoutResponse(items=batch)

    @unary
    def Create(self, request, context):
        first, tensors = None, []
        for message in request:
            first = first or message
            tensors += [from_message(tensor) for tensor in message.tensors]
        if first is None:
            raise Misuse("found nothing, expected a format and a path")
        try:
            writer = self._format(first.format).create(first.path, tensors, to_metadata(first.metadata))
            check_kind(writer, Writer, f"what create of format {first.format} returns")
        except BaseException:
            remove(first.path)
            raise
        writing = Writing(first.path, tensors, writer)
        return pb.CreateResponse(handle=self._written.add(writing, writing.close))

    @unary
    def Write(self, request, context):
        taken = 0
        for message in request:
            with self._written.use(message.handle) as writing:
                taken += writing.write(message)
        return pb.WriteResponse(bytes=taken)

    @unary
    def Finish(self, request, context):
        with self._written.use(request.handle) as writing:
            return pb.FormatServiceFinishResponse(size=writing.finish())

    @unary
    def Abort(self, request, context):
        with self._written.use(request.handle) as writing:
            writing.abort()
        return pb.AbortResponse()

    @unary
    def Close(self, request, context):
        if not self._opened.remove(request.handle):
            self._written.remove(request.handle)
        return pb.CloseResponse()


def _check_size(answer: pb.OpenResponse) -> None:
    """Metadata go in one message, and are all that can make it too large but names of very many files."""
    size = answer.ByteSize()
    if size <= MESSAGE:
        return
    metadata = sum(pair.ByteSize() for pair in answer.metadata)
    largest = max(answer.metadata, key=pb.Pair.ByteSize, default=pb.Pair())
    raise Limit(
        f"metadata: found {metadata:,} bytes, {largest.ByteSize():,} of them in {largest.name[:100]!r}, "
        f"expected at most {MESSAGE:,} with the names of all files"
    )


def check_metadata(metadata) -> None:
    check_kind(metadata, Mapping, "metadata")
    for name, value in metadata.items():
        check_text(name, "a name in metadata")
        check_text(value, f"metadata {name[:100]!r}")


def to_message(tensor: Tensor) -> pb.Tensor:
    return pb.Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)


def from_message(message: pb.Tensor) -> Tensor:
    if message.dtype not in BITS:
        raise Misuse(f"found dtype {message.dtype!r} of tensor {message.name!r}, which is not known here")
    if any(size < 0 for size in message.shape):
        raise Misuse(f"found a negative size in the shape of tensor {message.name!r}")
    return Tensor(message.name, message.dtype, tuple(message.shape))


def from_metadata(metadata: dict[str, str]) -> list[pb.Pair]:
    return [pb.Pair(name=name, value=value) for name, value in metadata.items()]


def to_metadata(pairs: Iterable[pb.Pair]) -> dict[str, str]:
    return {pair.name: pair.value for pair in pairs}


def _items(layout: Layout) -> Iterator[pb.LayoutItem]:
    for shard in layout.shards:
        check_text(shard.name, "a shard's name")
        yield pb.LayoutItem(shard=pb.LayoutShard(name=shard.name, size=shard.size))
        for tensor, offset in shard.tensors.items():
            yield pb.LayoutItem(place=pb.LayoutPlace(tensor=tensor, offset=offset))
        for offset, data in shard.pieces.items():
            for at, chunk in pieces(data):
                yield pb.LayoutItem(piece=pb.LayoutPiece(offset=offset + at, data=bytes(chunk)))
        for checksum in shard.checksums:
            yield pb.LayoutItem(
                checksum=pb.LayoutChecksum(offset=checksum.offset, length=checksum.length, at=checksum.at)
            )
    for extra in layout.extras:
        check_text(extra.name, "an extra's name")
        for _, chunk in pieces(extra.data):
            yield pb.LayoutItem(extra=pb.LayoutExtra(name=extra.name, data=bytes(chunk)))
    for notice in layout.notices:
        check_text(notice, "a notice")
        yield pb.LayoutItem(notice=notice)
