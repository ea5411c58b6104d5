"""The programs in README.md, run as they stand there. The scheme needs numpy."""

import os
import re
import struct
import tempfile
import unittest
from unittest import mock

import numpy as np

import lorakit_plugin as lk
from lorakit_plugin import serving
from tests.readme import programs

DOCS = os.path.join(os.path.dirname(__file__), "../../../docs/plugins.md")


def run(program):
    """Returns what a program defines, and what it serves."""
    names = {}
    with mock.patch.object(lk, "serve") as serve:
        exec(compile(program, "README.md", "exec"), names)
    (name, version, *parts), options = serve.call_args
    serving.describe(name, version, parts, **options)
    return names, parts


class Readme(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def test_tiny(self):
        _, (tiny,) = run(programs()[0])
        with open(DOCS, encoding="utf-8") as file:
            text = file.read()
        (same,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        self.assertEqual(same.split(), programs()[0].split())
        (line,) = re.findall(r"python3 -c '(.*?)'", text, re.DOTALL)
        with mock.patch("builtins.open", lambda name, mode, real=open: real(self.path(name), mode)):
            exec(line, {})
        (tensor,) = tiny.open(self.path("a.tiny")).tensors
        self.assertEqual(("weight", "F32", (3,), 8), (tensor.name, tensor.dtype, tensor.shape, tensor.offset))
        with open(self.path("b.tiny"), "wb") as file:
            file.write(b"TINY\2\0\0\0\0\0\0\0")
        with self.assertRaisesRegex(lk.Malformed, "found 12 bytes, expected 16"):
            tiny.open(file.name)

    tensors = [
        lk.Tensor("größe", "F32", (2, 3)),
        lk.Tensor("none", "F16", (0, 4)),
        lk.Tensor("b", "U8", (70_001,)),
        lk.Tensor("scalar", "BF16", ()),
    ]
    data = [struct.pack("<6f", *range(6)), b"", bytes(i * i % 251 for i in range(70_001)), b"\x80\x3f"]

    def test_layout(self):
        plain = run(programs()[1])[1][0]
        options = lk.LayoutOptions(100, "", "", 0, {"k": "v"}, range(4))
        layout = plain.layout(self.tensors, options)
        self.assertEqual(["model.plain.index.json"], [extra.name for extra in layout.extras])
        self.assertEqual("model-00001-of-00002.plain", layout.shards[0].name)
        for options in (options, lk.LayoutOptions(0, "a.plain", "", 0, {"k": "v"}, range(4))):
            for shard in plain.layout(self.tensors, options).shards:
                with open(self.path(shard.name), "wb") as file:
                    for at, piece in shard.pieces.items():
                        file.seek(at)
                        file.write(piece)
                    for index, at in shard.tensors.items():
                        file.seek(at)
                        file.write(self.data[index])
                self.assertEqual(shard.size, os.path.getsize(file.name))
                opened = plain.open(file.name)
                self.assertEqual({"k": "v"}, opened.metadata)
                found = [(one.name, one.dtype, one.shape, one.offset) for one in opened.tensors]
                wanted = [(self.tensors[index], at) for index, at in shard.tensors.items()]
                self.assertEqual([(one.name, one.dtype, one.shape, at) for one, at in wanted], found)

    def test_stream(self):
        deflated = run(programs()[1])[1][1]
        writer = deflated.create(self.path("a.deflated"), self.tensors, {"k": "v"})
        for index, data in enumerate(self.data):
            for at in range(0, len(data), 30_000):
                writer.write(index, at, memoryview(data[at : at + 30_000]))
        writer.finish()
        opened = deflated.open(self.path("a.deflated"))
        self.assertEqual({"k": "v"}, opened.metadata)
        for tensor, stored, data in zip(self.tensors, opened.tensors, self.data):
            self.assertEqual((tensor.name, tensor.dtype, tensor.shape), (stored.name, stored.dtype, stored.shape))
            for lo, hi in ((0, len(data)), (len(data) // 3, len(data) // 2), (len(data), len(data))):
                self.assertEqual(data[lo:hi], b"".join(stored.read(lo, hi - lo)))

    def test_scheme(self):
        scheme = run(programs()[1])[1][2]
        weight = lk.Tensor("w", "F32", (11, 6))  # two blocks and two elements, which run across rows
        values = np.linspace(-3, 5, 66, dtype="<f4")
        encoder = scheme.encoder(lk.Spec("i4b"), weight)
        self.assertEqual([(11, 3), (3,)], [tensor.shape for tensor, _ in encoder.outputs])
        tiles = [encoder.encode(lo, hi, values[lo:hi].tobytes()) for lo, hi in ((0, 32), (32, 66))]
        whole = encoder.encode(0, 66, values.tobytes())
        codes, scales = (b"".join(bytes(tile[part]) for tile in tiles) for part in (0, 1))
        self.assertEqual((codes, scales), tuple(map(bytes, whole)))
        self.assertEqual((33, 12), (len(codes), len(scales)))

        checkpoint = lk.Checkpoint("", b"", [tensor for tensor, _ in encoder.outputs], None)
        (decoder,) = scheme.find(checkpoint)
        self.assertEqual(lk.Tensor("w", "BF16", (11, 6)), decoder.tensor)
        got = decoder.decode(0, 32, [codes[:16], scales[:4]]) + decoder.decode(32, 66, [codes[16:], scales[4:]])
        steps = np.repeat(np.frombuffer(scales, "<f4"), 32)[:66]
        self.assertLessEqual(float(np.max(np.abs(np.frombuffer(got, "<f4") - values) / steps)), 0.5001)

        values[40] = np.nan
        with self.assertRaises(lk.NonFinite) as caught:
            encoder.encode(32, 66, values[32:].tobytes())
        self.assertEqual(40, caught.exception.index)
        allowed = scheme.encoder(lk.Spec("i4b", allow_non_finite=True), weight)
        self.assertEqual(8, bytes(allowed.encode(32, 66, values[32:].tobytes())[0])[4] & 15)
        with self.assertRaisesRegex(lk.Unsupported, "even rows"):
            scheme.encoder(lk.Spec("i4b"), lk.Tensor("w", "F32", (6, 11)))
        with self.assertRaisesRegex(lk.Malformed, "w.scales: found F32"):
            list(scheme.find(lk.Checkpoint("", b"", [lk.Tensor("w", "U8", (9, 9)), checkpoint.tensors[1]], None)))
