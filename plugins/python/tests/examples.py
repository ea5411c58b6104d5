"""Small formats and a scheme that the tests serve."""

import json
import os
import struct
import sys
import threading

from lorakit_plugin import (
    Checksum,
    Container,
    Decoder,
    Encoder,
    Extra,
    Format,
    Layout,
    Limit,
    Malformed,
    NonFinite,
    Part,
    Rule,
    Scheme,
    Shard,
    Spec,
    Stored,
    Tensor,
    Unsupported,
    Writer,
)

BIG = (1 << 20) * 2 + 5


class Panic(BaseException):
    """As PyO3's PanicException."""


class Given(Format):
    """A format whose file says what it has or does: many, opaque, or an exception."""

    name = "given"
    extensions = [".given"]
    extents = True
    closed = threading.Event()
    given_up = threading.Event()

    def open(self, path):
        with open(path, "rb") as file:
            kind = file.read(40).decode()
        return getattr(self, kind)(path)

    def many(self, path):
        return Container([Stored(f"{'n' * 200}{i}", "F32", (i, 2), offset=8 * i) for i in range(10_000)], {"a": "b"})

    def opaque(self, path):
        data = bytes(i % 251 for i in range(BIG))

        def long(offset, length):
            for at in range(offset, offset + length, 300_001):
                yield memoryview(data)[at : min(at + 300_001, offset + length)]

        def endless(offset, length):
            try:
                while True:
                    yield b"x" * 1000
            finally:
                self.given_up.set()

        tensors = [
            Stored("chunks", "U8", (BIG,), read=long),
            Stored("whole", "U8", (BIG,), read=lambda offset, length: data[offset : offset + length]),
            Stored("short", "U8", (9,), read=lambda offset, length: b"x" * (length - 1)),
            Stored("endless", "U8", (1 << 40,), read=endless),
            Stored("empty", "F32", (0, 3), read=lambda offset, length: b""),
        ]
        return Container(tensors, close=self.closed.set)

    def malformed(self, path):
        raise Malformed("tensor w: found 3 bytes,\n  expected 4")

    def unsupported(self, path):
        raise Unsupported("a format of the future")

    def limit(self, path):
        raise Limit("too many")

    def missing(self, path):
        raise FileNotFoundError("no such shard")

    def bug(self, path):
        return [][1]

    def bug_in_library(self, path):
        return json.loads("{")

    def wrong_syntax(self, path):
        return compile("values = (1,\n", __file__, "exec")

    def leave(self, path):
        sys.exit("bye")

    def interrupt(self, path):
        raise KeyboardInterrupt

    def panic(self, path):
        raise Panic("called `Option::unwrap()` on a `None` value")

    def long(self, path):
        raise ValueError("x" * 500)

    def leave_later(self, path):
        def first_part(offset, length):
            yield b"x"
            sys.exit("bye")

        tensors = [
            Stored("at once", "U8", (9,), read=lambda offset, length: sys.exit("bye")),
            Stored("later", "U8", (9,), read=first_part),
        ]
        return Container(tensors)

    def nothing(self, path):
        pass

    def numbers(self, path):
        return Container([], {"epoch": 3})

    def bytes(self, path):
        return Container([Stored(b"w", "F32", (1,), offset=0)])

    def surrogate(self, path):
        return Container([Stored("w\udc80", "F32", (1,), offset=0)])

    def unstored(self, path):
        return Container([Tensor("w", "F32", (1,))])

    def negative(self, path):
        return Container([Stored("w", "F32", (1, -1), offset=0)])

    def fraction(self, path):
        return Container([Stored("w", "F32", (1.0,), offset=0)])

    def metadata(self, path):
        return Container([], {"config": "x" * (5 << 20)})

    def dtype(self, path):
        return Container([Stored("w", "float32", (1,), offset=0)])


class Streamed(Format):
    """A format that is written by the plugin: all data one after the other."""

    name = "streamed"
    extensions = [".streamed"]

    def create(self, path, tensors, metadata):
        if any(tensor.dtype == "C64" for tensor in tensors):
            raise Unsupported("complex numbers")
        return Plain(path)


class Plain(Writer):
    def __init__(self, path):
        self.file = open(path, "xb")

    def write(self, index, offset, data):
        self.file.write(data)

    def finish(self):
        self.file.close()

    abort = finish


class Laid(Format):
    """A format that says where everything goes, with no name to be known by."""

    name = "laid"
    dtypes = ["F32", "U8"]

    def sniff(self, path):
        return os.path.getsize(path) == 4

    def layout(self, tensors, options):
        places, at = {}, BIG
        for index, tensor in enumerate(tensors):
            places[index] = at
            at += tensor.nbytes
        name = options.single_file or options.stem + ".laid"
        shard = Shard(name, at, places, {0: b"h" * BIG}, [Checksum(BIG, at - BIG, [4, 8])])
        notices = [f"groups {options.groups}, limit {options.max_shard_size}, {options.metadata}"]
        return Layout([shard], [Extra("index", b"i" * BIG)], notices)


class Halves(Scheme):
    """Stores a weight of float32 as bytes and one scale, 4 elements to a unit."""

    name = "halves"
    types = ["half"]
    suffixes = [".scale"]
    notices = ["Odd numbers are rounded down."]

    def find(self, checkpoint):
        for tensor in checkpoint.tensors:
            if tensor.dtype == "U8":
                scale = checkpoint.content(tensor.name + ".scale", 0, 4)
                yield Doubled(tensor, struct.unpack("<f", scale)[0])

    def encoder(self, spec, tensor):
        if spec.type != "half":
            raise Unsupported(f"type {spec.type}")
        return Halved(tensor)

    def config(self, spec, loader_chooses, skip):
        return {"quant_method": self.name, "type": spec.type, "skip": list(skip), "chosen": loader_chooses}


class Doubled(Decoder):
    def __init__(self, tensor, scale):
        self.tensor = Tensor(tensor.name, "F32", tensor.shape)
        self.spec = Spec("half")
        self.parts = [Part(tensor.name, Rule(stride=4)), Part(tensor.name + ".scale", Rule())]
        self.unit, self.values, self.scale = 4, "F32", scale

    def decode(self, lo, hi, parts):
        return struct.pack(f"<{len(parts[0])}f", *(value * self.scale for value in parts[0]))


class Seconds(Scheme):
    """Keeps each second byte of a weight, and the others in another tensor. It carries nothing."""

    name = "seconds"
    types = ["second", "leave"]

    def encoder(self, spec, tensor):
        return Second(spec, tensor)

    def config(self, spec, loader_chooses, skip):
        raise Panic("no config")

    def find(self, checkpoint):
        sys.exit("bye")


class Second(Encoder):
    unit = 1

    def __init__(self, spec, tensor):
        self.leaves = spec.type == "leave"
        self.outputs = [
            (Tensor(tensor.name, "U8", tensor.shape), Rule(stride=1)),
            (Tensor(tensor.name + ".rest", "U8", tensor.shape), Rule(stride=1)),
        ]

    def encode(self, lo, hi, values):
        if self.leaves:
            sys.exit("bye")
        return values[::2], values[1::2]


class Halved(Encoder):
    unit, carry = 4, 1

    def __init__(self, tensor):
        self.outputs = [
            (Tensor(tensor.name, "U8", tensor.shape), Rule(stride=4)),
            (Tensor(tensor.name + ".sums", "F32", (tensor.elements // 4,)), Rule()),
        ]

    def encode(self, lo, hi, values):
        numbers = struct.unpack(f"<{hi - lo}f", values)
        for index, number in enumerate(numbers):
            if number != number:
                raise NonFinite(lo + index, "NaN")
        sums = [sum(numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
        return [bytes(int(number) // 2 for number in numbers), b""], struct.pack(f"<{len(sums)}f", *sums)

    def finish(self, carried):
        yield 1, 0, carried.floats(0, self.outputs[1][0].elements)
