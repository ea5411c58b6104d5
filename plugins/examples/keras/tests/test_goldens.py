"""What Keras has saved is read as Keras and h5py read it."""

import json
import os
import random
import tempfile
import unittest

import h5py
import numpy
from lorakit_keras import Keras

from tests import FIXTURES
from tests.reading import data, digests, opened


class Goldens(unittest.TestCase):
    def test_files(self):
        with open(os.path.join(FIXTURES, "expected.json")) as file:
            expected = json.load(file)
        self.assertEqual(12, len(expected))
        for name, tensors in expected.items():
            with self.subTest(name):
                found = digests(opened(os.path.join(FIXTURES, name)))
                self.assertEqual({tensor["name"]: tensor for tensor in tensors}, found)

    def test_what_is_stored_as_it_is_has_extents(self):
        for name, extents in [
            ("keras3.weights.h5", True),
            ("keras3.keras", True),
            ("keras3.h5", True),
            ("keras2.keras", True),
            ("keras2_weights.h5", True),
            ("sharded.weights.json", True),
            ("packed.keras", False),
            ("big_endian.weights.h5", False),
        ]:
            container = Keras().open(os.path.join(FIXTURES, name))
            self.assertEqual({extents}, {tensor.offset is not None for tensor in container.tensors}, name)
            offsets = [(tensor.file, tensor.offset) for tensor in container.tensors if extents]
            self.assertEqual(sorted(offsets), offsets, name)
            container.close()

    def test_metadata(self):
        def metadata(name):
            container = Keras().open(os.path.join(FIXTURES, name))
            container.close()
            return container.metadata

        self.assertEqual("3.15.1", json.loads(metadata("keras3.keras")["metadata.json"])["keras_version"])
        self.assertEqual("Functional", json.loads(metadata("keras3.keras")["config.json"])["class_name"])
        self.assertEqual("Functional", json.loads(metadata("keras2.h5")["model_config"])["class_name"])
        names = json.loads(metadata("keras3.weights.h5")["keras.names"])
        self.assertEqual("edges", names["layers/conv2d/vars"])
        self.assertEqual("inner", names["layers/sequential/vars"])

    def test_shards_say_their_files(self):
        container = Keras().open(os.path.join(FIXTURES, "sharded.weights.json"))
        container.close()
        files = ["sharded.weights.json"] + [f"sharded_0000{one}.weights.h5" for one in range(3)]
        self.assertEqual(files, container.files)
        self.assertEqual(set(files[1:]), {tensor.file for tensor in container.tensors})


class Chunks(unittest.TestCase):
    """Datasets in chunks, of shapes that Keras does not have."""

    def test_parts(self):
        generator = random.Random(1)
        shapes = [
            ((100,), (7,)),
            ((5, 9), (2, 4)),
            ((3, 4, 5, 6), (2, 3, 2, 4)),
            ((1, 1, 3), (1, 1, 1)),
            ((64, 64), (64, 64)),
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.h5")
            arrays = {}
            with h5py.File(path, "w") as file:
                for number, (shape, chunks) in enumerate(shapes):
                    for kind in ("<f4", ">f4", "<i8", "|i1", ">u2"):
                        for how in ({}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}):
                            values = numpy.random.default_rng(number).standard_normal(shape) * 100
                            values = values.clip(0).astype(kind)
                            name = f"{number}/{kind}/{len(how)}"
                            file.create_dataset(name, data=values, chunks=chunks, **how)
                            arrays[name] = values.astype(values.dtype.newbyteorder("<")).tobytes()
            container = Keras().open(path)
            self.assertEqual(set(arrays), {tensor.name for tensor in container.tensors})
            for tensor in container.tensors:
                whole = arrays[tensor.name]
                self.assertEqual(whole, data(path, tensor), tensor)
                for _ in range(20):
                    lo, hi = sorted(generator.randint(0, len(whole)) for _ in range(2))
                    self.assertEqual(whole[lo:hi], data(path, tensor, lo, hi - lo), (tensor, lo, hi))
            container.close()

    def test_slabs(self):
        """The bands are so long that they are cut along a later axis."""
        values = numpy.arange(2 * 3 * 1_000_000, dtype="<u4").reshape(2, 3, 1_000_000)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.h5")
            with h5py.File(path, "w") as file:
                file.create_dataset("a", data=values, chunks=(2, 2, 300_000), compression="gzip", compression_opts=1)
            container = Keras().open(path)
            whole = values.tobytes()
            self.assertEqual(whole, data(path, container.tensors[0]))
            self.assertEqual(whole[3_999_999:9_000_001], data(path, container.tensors[0], 3_999_999, 5_000_002))
            container.close()

    def test_compact(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.h5")
            values = {">f4": b"", "<f8": b"", "|b1": b""}
            with h5py.File(path, "w") as file:
                for kind in values:
                    array = numpy.array([[1, 0], [3, 4]], kind)
                    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                    plan.set_layout(h5py.h5d.COMPACT)
                    space, stored = h5py.h5s.create_simple((2, 2)), h5py.h5t.py_create(array.dtype, logical=True)
                    dataset = h5py.h5d.create(file.id, kind.encode(), stored, space, plan)
                    h5py.Dataset(dataset)[...] = array
                    values[kind] = array.astype(array.dtype.newbyteorder("<")).tobytes()
            container = Keras().open(path)
            for tensor in container.tensors:
                self.assertEqual(values[tensor.name], data(path, tensor))
                self.assertEqual(values[tensor.name][3:6], data(path, tensor, 3, 3))
            container.close()
