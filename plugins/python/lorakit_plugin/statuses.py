"""Turns exceptions into statuses of gRPC, and objects of ours into messages that are small enough."""

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import grpc

from .errors import Limit, Malformed, Unsupported
from .failures import described
from .tensors import CHUNK

MESSAGE = 4 << 20

STATUSES = [
    (Malformed, grpc.StatusCode.INVALID_ARGUMENT),
    (Unsupported, grpc.StatusCode.UNIMPLEMENTED),
    (Limit, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (FileNotFoundError, grpc.StatusCode.NOT_FOUND),
]


class Misuse(Exception):
    """A call that the protocol does not allow, or an answer of the plugin's author that does not fit."""


def check_kind(value, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise Misuse(f"found {_short(repr(value))[:100]} as {what}, expected a {kind.__name__}")


def check_text(value, what: str) -> None:
    """Names and metadata are UTF-8."""
    check_kind(value, str, what)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Misuse(f"found {value[:100]!r} as {what}, expected text that can be UTF-8") from None


def _status(error: BaseException) -> tuple[grpc.StatusCode, str]:
    line = " ".join(str(error).split())
    for kind, code in STATUSES:
        if isinstance(error, kind):
            return code, _short(line or kind.__name__)
    if isinstance(error, Misuse):
        return grpc.StatusCode.FAILED_PRECONDITION, _short(line)
    traceback.print_exception(error, file=sys.stderr)
    return grpc.StatusCode.INTERNAL, _short(described(error))


def _short(line: str) -> str:
    """A status travels in a header, for which there are some KiB."""
    text = line.encode(errors="backslashreplace")
    return text.decode() if len(text) <= 2000 else text[:2000].decode(errors="ignore") + " ..."


def _checked(message):
    if message.ByteSize() > MESSAGE:
        raise Limit(f"found an answer of {message.ByteSize():,} bytes, expected at most {MESSAGE:,}")
    return message


def _answer(error: BaseException, context) -> None:
    """Ends a call by an exception of any kind: one that is no Exception, such as SystemExit, would end a thread of the
    server and leave the host without an answer."""
    if isinstance(error, Exception) and not context.is_active():
        raise error
    context.abort(*_status(error))


def unary(call: Callable) -> Callable:
    """Wraps a method that returns one answer."""

    @functools.wraps(call)
    def wrapped(self, request, context):
        try:
            return _checked(call(self, request, context))
        except BaseException as error:
            _answer(error, context)

    return wrapped


def streaming(call: Callable) -> Callable:
    """Wraps a method that yields answers."""

    @functools.wraps(call)
    def wrapped(self, request, context):
        with contextlib.closing(call(self, request, context)) as messages:
            while True:
                try:
                    message = next(messages, None)
                    if message is None:
                        return
                    _checked(message)
                except BaseException as error:
                    _answer(error, context)
                yield message

    return wrapped


def batches(messages: Iterable) -> Iterator[list]:
    """Splits messages into lists of at most a chunk. A message of its own that is longer stands alone."""
    batch: list = []
    size = 0
    for message in messages:
        one = message.ByteSize() + 6  # with its tag and length
        if batch and size + one > CHUNK:
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += one
    if batch:
        yield batch


def pieces(data) -> Iterator[tuple[int, memoryview]]:
    """Splits bytes into chunks, each with where it begins. Empty ones have none."""
    view = memoryview(data)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    for at in range(0, len(view), CHUNK):
        yield at, view[at : at + CHUNK]
