"""What is written reads back, has the same bytes each time, and loads in Keras."""

import hashlib
import os
import tempfile
import time
import unittest

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy
from lorakit_keras import Keras
from lorakit_plugin import Tensor, Unsupported

from tests import FIXTURES
from tests.reading import opened, write


class Writing(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name="a.weights.h5"):
        return os.path.join(self.folder, name)

    def fixture(self, name):
        return opened(os.path.join(FIXTURES, name))

    def metadata(self, path):
        container = Keras().open(path)
        container.close()
        return container.metadata

    def test_reads_back_with_extents(self):
        for name in ("keras3.weights.h5", "dtypes.weights.h5", "keras2.h5"):
            tensors = self.fixture(name)
            write(self.path(), tensors, {"format": "pt", "long": "x" * 200_000}, piece=100)
            self.assertEqual(tensors, opened(self.path()))
            self.assertEqual({"format": "pt", "long": "x" * 200_000}, self.metadata(self.path()))
            container = Keras().open(self.path())
            self.assertTrue(all(tensor.offset is not None for tensor in container.tensors if tensor.nbytes))
            order = [tensor.name for tensor in container.tensors if tensor.nbytes]
            self.assertEqual([name for name, (_, _, data) in tensors.items() if data], order)
            container.close()

    def test_same_bytes(self):
        digests = set()
        for number in range(2):
            if number:
                time.sleep(1.1)
            metadata = self.metadata(os.path.join(FIXTURES, "keras3.weights.h5")) | {"a": "b"}
            write(self.path(f"{number}.h5"), self.fixture("keras3.weights.h5"), metadata)
            with open(self.path(f"{number}.h5"), "rb") as file:
                digests.add(hashlib.sha256(file.read()).hexdigest())
        self.assertEqual(1, len(digests))

    def test_keras_loads_it(self):
        inputs = keras.Input((8, 8, 3))
        inner = keras.Sequential([keras.layers.Dense(6), keras.layers.BatchNormalization()])
        seen = keras.layers.Conv2D(4, 3, name="edges")(inputs)
        seen = keras.layers.Dropout(0.1)(keras.layers.GlobalAveragePooling2D()(seen))
        seen = keras.layers.LayerNormalization()(inner(seen))
        model = keras.Model(inputs, keras.layers.Dense(3, dtype="bfloat16")(seen))
        model.save_weights(self.path("keras.weights.h5"))
        with_names = self.metadata(self.path("keras.weights.h5"))
        self.assertIn("keras.names", with_names)
        before = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
        self.assertIn("bfloat16", [str(one.dtype) for one in before])
        for metadata in ({}, with_names):
            write(self.path(), opened(self.path("keras.weights.h5")), metadata)
            self.assertEqual(metadata, self.metadata(self.path()))
            for weight in model.weights:
                if str(weight.dtype) != "uint32":
                    weight.assign(numpy.full(weight.shape, 9, "float32"))
            model.load_weights(self.path())
            for old, new in zip(before, model.weights):
                self.assertTrue((old == keras.ops.convert_to_numpy(new)).all(), new.path)

    def test_names(self):
        value = ("U8", [1], b"x")
        names = ["a", "b/" + "n" * 65_000, "größe/✓", "with space", "..", "c/../d", "e:0", "\\", "f/g/h", "f/i"]
        tensors = {name: value for name in names}
        write(self.path(), tensors)
        self.assertEqual(tensors, opened(self.path()))
        for names in (["a//b"], ["/a"], ["a/"], [""], ["."], ["a/./b"], ["a\0b"], ["a", "a/b"], ["a/b/c", "a/b"]):
            with self.assertRaises(Unsupported, msg=names):
                write(self.path("b.h5"), {name: value for name in names})
            self.assertFalse(os.path.exists(self.path("b.h5")))

    def test_many_and_odd_shapes(self):
        tensors = {f"layers/dense_{number}/vars/0": ("F32", [1], b"abcd") for number in range(3000)}
        tensors |= {"scalar": ("F32", [], b"1234"), "empty": ("BF16", [0, 3], b""), "rank": ("U8", [1] * 32, b"x")}
        write(self.path(), tensors)
        self.assertEqual(tensors, opened(self.path()))

    def test_refused(self):
        for dtype, shape in [("F8_E4M3", (1,)), ("F4", (2,)), ("F32", (1,) * 33)]:
            with self.assertRaises(Unsupported):
                Keras().create(self.path(), [Tensor("a", dtype, shape)], {})
        self.assertEqual([], os.listdir(self.folder))

    def test_names_of_layers_that_are_none(self):
        tensors = {"layers/dense/vars/0": ("F32", [1], b"abcd")}
        for text in ("{", "[]", '{"a": 1}', '{"layers/dense/vars/0": "x"}', '{"../vars": ""}', '{"//vars": "x"}'):
            write(self.path(), tensors, {"keras.names": text})
            self.assertEqual(tensors, opened(self.path()))
            self.assertEqual({"keras.names": text}, self.metadata(self.path()))
