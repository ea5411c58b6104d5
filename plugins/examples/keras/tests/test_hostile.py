"""Files that want something else than to be read."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import warnings
import zipfile
import zlib

import h5py
import numpy
from h5py import h5d, h5p, h5s, h5t
from lorakit_keras import Keras, hdf5
from lorakit_keras.reader import Reader
from lorakit_plugin import Limit, Malformed, Unsupported

from tests import FIXTURES, HERE
from tests.reading import data, opened


class Hostile(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name="a.h5"):
        return os.path.join(self.folder, name)

    def refused(self, kind, text, path=None):
        with self.assertRaises(kind) as caught:
            opened(path or self.path())
        self.assertIn(text, str(caught.exception))

    def made(self, make, kind, text, **options):
        with h5py.File(self.path(), "w", **options) as file:
            file["good"] = numpy.zeros(3, "f4")
            make(file)
        with self.subTest(text):
            self.refused(kind, text)

    def test_what_leads_elsewhere(self):
        with h5py.File(self.path("other.h5"), "w") as file:
            file["secret"] = numpy.zeros(3, "f4")
        with open(self.path("raw"), "wb") as file:
            file.write(bytes(100))

        def external(file):
            file["link"] = h5py.ExternalLink(self.path("other.h5"), "/secret")

        def soft(file):
            file["group/link"] = h5py.SoftLink("/good")

        def raw(file):
            file.create_dataset("raw", (10,), "f4", external=[(self.path("raw"), 0, 40)])

        def virtual(file):
            layout = h5py.VirtualLayout((3,), "f4")
            layout[:] = h5py.VirtualSource(self.path("other.h5"), "secret", (3,))
            file.create_virtual_dataset("virtual", layout)

        def cycle(file):
            file.create_group("a/b")
            file["a/b/c"] = file["a"]

        def twice(file):
            file["again"] = file["good"]

        def root(file):
            file["a/root"] = file["/"]

        self.made(external, Unsupported, "link: found a link to another file")
        self.made(soft, Unsupported, "group/link: found a soft link")
        self.made(raw, Unsupported, "raw: found data in another file")
        self.made(virtual, Unsupported, "virtual: found a virtual dataset")
        self.made(cycle, Unsupported, "found a second link")
        self.made(twice, Unsupported, "found a second link")
        self.made(root, Unsupported, "found a second link")

    def test_no_other_file_is_opened(self):
        """A virtual dataset without limit opens its sources when it is asked for its shape. To open the pipe that takes
        the place of one is to wait for ever."""
        with h5py.File(self.path("other.h5"), "w") as file:
            file.create_dataset("secret", data=numpy.zeros(3, "f4"), maxshape=(None,))
        with h5py.File(self.path(), "w") as file:
            layout = h5py.VirtualLayout((3,), "f4", maxshape=(None,))
            source = h5py.VirtualSource(self.path("other.h5"), "secret", (3,), maxshape=(None,))
            layout[: h5s.UNLIMITED] = source[: h5s.UNLIMITED]
            file.create_virtual_dataset("virtual", layout)
        os.remove(self.path("other.h5"))
        os.mkfifo(self.path("other.h5"))

        def run(code, timeout):
            command = [sys.executable, "-c", code]
            return subprocess.run(command, cwd=os.path.dirname(HERE), capture_output=True, text=True, timeout=timeout)

        with self.assertRaises(subprocess.TimeoutExpired):
            run(f"import h5py\nprint(h5py.File({self.path()!r})['virtual'].shape)", 5)
        done = run(
            "import tests\nfrom lorakit_keras import Keras\nimport lorakit_plugin\n"
            f"try:\n    Keras().open({self.path()!r})\nexcept lorakit_plugin.Unsupported as error:\n    print(error)\n",
            60,
        )
        self.assertEqual("tensor virtual: found a virtual dataset, expected data\n", done.stdout)

    def test_what_is_no_number(self):
        def opaque(file):
            file["x"] = numpy.zeros(3, "V2")

        def compound(file):
            file["x"] = numpy.zeros(3, [("a", "f4"), ("b", "i4")])

        def custom(file):
            kind = h5t.IEEE_F32LE.copy()
            kind.set_ebias(99)
            h5d.create(file.id, b"x", kind, h5s.create_simple((3,)))

        def references(file):
            file.create_dataset("x", (1,), h5py.ref_dtype)[0] = file["good"].ref

        self.made(lambda file: file.create_dataset("x", data="text"), Unsupported, "x: found strings")
        self.made(lambda file: file.create_dataset("x", data=numpy.bytes_("abc")), Unsupported, "x: found strings")
        lists = h5py.vlen_dtype("f4")
        self.made(lambda file: file.create_dataset("x", (2,), lists), Unsupported, "x: found lists of variable length")
        self.made(opaque, Unsupported, "x: found opaque values of 2 bytes")
        self.made(compound, Unsupported, "x: found compounds")
        self.made(custom, Unsupported, "x: found floating-point numbers of 4 bytes")
        self.made(references, Unsupported, "x: found references")
        enumeration = h5py.enum_dtype({"A": 0, "B": 7}, "i1")
        self.made(lambda file: file.create_dataset("x", (2,), enumeration), Unsupported, "x: found an enumeration")
        self.made(lambda file: file.create_dataset("x", data=h5py.Empty("f4")), Unsupported, "x: found no shape")
        self.made(lambda file: file.__setitem__("x", numpy.dtype("f4")), Unsupported, "x: found a type by itself")
        self.made(lambda file: None, Malformed, "found b'\\x00", userblock_size=512)

    def test_sizes(self):
        def sparse(file):
            file.create_dataset("x", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")

        def unwritten(file):
            file.create_dataset("x", (1 << 40,), "f4")

        def big_chunk(file):
            dataset = file.create_dataset("x", (1 << 29,), "f4", chunks=(1 << 29,), compression="gzip")
            dataset.id.write_direct_chunk((0,), b"x")

        def deep(file):
            file["/".join("g" * 102)] = numpy.zeros(1)

        self.made(sparse, Malformed, "x: found 0 chunks")
        self.made(unwritten, Malformed, "x: found no data, expected 4,398,046,511,104 bytes")
        self.made(big_chunk, Limit, "x: found chunks of 2,147,483,648 bytes")
        self.made(deep, Limit, "100 groups deep")

    def test_filters(self):
        def filtered(**options):
            return lambda file: file.create_dataset("x", data=numpy.arange(100.0), chunks=(10,), **options)

        self.made(filtered(compression="lzf"), Unsupported, "x: found the filter lzf")
        self.made(filtered(fletcher32=True), Unsupported, "x: found the filter fletcher32")
        self.made(filtered(scaleoffset=3), Unsupported, "x: found the filter scaleoffset")

        def twice(file):
            plan = h5p.create(h5p.DATASET_CREATE)
            plan.set_chunk((10,))
            plan.set_deflate(1)
            plan.set_deflate(1)
            h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple((10,)), plan)

        self.made(twice, Unsupported, "x: found the filter deflate, expected gzip or shuffle, once each")

    def test_chunks_that_do_not_fit(self):
        def chunk(content):
            def make(file):
                dataset = file.create_dataset("x", (1000,), "u1", chunks=(1000,), compression="gzip")
                dataset.id.write_direct_chunk((0,), content)

            return make

        self.made(chunk(zlib.compress(bytes(1001))), Malformed, "x: found a chunk of 1,001 bytes, expected 1,000")
        self.made(chunk(zlib.compress(bytes(999))), Malformed, "x: found a chunk of 999 bytes, expected 1,000")
        self.made(chunk(zlib.compress(bytes(1000))[:-5]), Malformed, "x: found a chunk without its end")
        self.made(chunk(zlib.compress(bytes(1 << 30))), Malformed, "x: found a chunk of 1,0")
        self.made(chunk(zlib.compress(bytes(1 << 20))), Malformed, "x: found a chunk without its end")
        self.made(chunk(b"nonsense"), Malformed, "x: Error -3")

    def test_endless(self):
        """HDF5 2.0.0 looks for ever for a text in a heap whose size is wrong. What comes after it is read."""
        with open(os.path.join(FIXTURES, "dtypes.weights.h5"), "rb") as file:
            content = bytearray(file.read())
        changes = {1314: 128, 2200: 24, 4093: 128, 6041: 16, 10281: 1, 12056: 2, 15207: 2, 16963: 64}
        for at, byte in changes.items():
            content[at] = byte
        with open(self.path(), "wb") as file:
            file.write(content)
        before, hdf5.reader = hdf5.reader, Reader(seconds=5)
        try:
            self.refused(Malformed, "end of the headers")  # by its limit, or ours where the machine is busy
            opened(os.path.join(FIXTURES, "dtypes.weights.h5"))
            hdf5.reader._process.kill()
            hdf5.reader._process.wait()
            opened(os.path.join(FIXTURES, "dtypes.weights.h5"))
            hdf5.reader._process.send_signal(signal.SIGSTOP)
            hdf5.reader._connection.settimeout(0.2)
            self.refused(Malformed, "HDF5 has not come to an end", os.path.join(FIXTURES, "dtypes.weights.h5"))
        finally:
            hdf5.reader._stop()
            hdf5.reader = before

    def test_bit_flips(self):
        """Whatever a file has become, the process lives, and says no in the right way or gives bytes."""
        code = (
            "import sys, tests\nfrom tests.test_hostile import flip\n"
            "for name in sys.argv[1:]:\n    flip(name)\nprint('alive')\n"
        )
        names = ["keras3.weights.h5", "gzip.weights.h5", "keras2.h5", "keras3.keras", "packed.keras"]
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, cwd=os.path.dirname(HERE), capture_output=True, text=True, timeout=250)
        self.assertEqual((0, "alive\n"), (done.returncode, done.stdout), done.stderr[-2000:])

    def test_truncated(self):
        for name in ("keras3.weights.h5", "keras2.h5", "gzip.weights.h5", "keras3.keras", "packed.keras"):
            with open(os.path.join(FIXTURES, name), "rb") as file:
                whole = file.read()
            for size in [0, 1, 7, 8, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
                with self.subTest(name, size=size), open(self.path(name), "wb") as file:
                    file.write(whole[:size])
                    file.flush()
                    self.refused(Malformed, "", self.path(name))

    def test_zips(self):
        with open(os.path.join(FIXTURES, "keras3.weights.h5"), "rb") as file:
            weights = file.read()

        def zipped(kind, text, members, change=None, how=zipfile.ZIP_STORED):
            with zipfile.ZipFile(self.path("a.keras"), "w", how) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that are there twice
                for name, content in members:
                    file.writestr(name, content)
            if change:
                with open(self.path("a.keras"), "rb") as file:
                    content = change(bytearray(file.read()))
                with open(self.path("a.keras"), "wb") as file:
                    file.write(content)
            with self.subTest(text):
                self.refused(kind, text, self.path("a.keras"))

        def field(place, form, value):
            """Sets a field of the first entry of the directory."""

            def change(content):
                struct.pack_into(form, content, content.rfind(b"PK\x01\x02") + place, value)
                return content

            return change

        def directory(content):
            struct.pack_into("<L", content, content.rfind(b"PK\x05\x06") + 12, 1 << 30)
            return content

        name = "model.weights.h5"
        zipped(Malformed, "a zip without model.weights.h5", [("config.json", "{}")])
        zipped(Unsupported, "model.weights.npz", [("model.weights.npz", b"")])
        zipped(Malformed, "at the beginning, expected an HDF5 file", [(name, b"x" * 100)])
        zipped(Malformed, "twice in a zip", [(name, weights), (name, weights)])
        zipped(Unsupported, "by compression 12", [(name, weights)], how=zipfile.ZIP_BZIP2)
        zipped(Unsupported, "encrypted", [(name, weights)], field(8, "<H", 1))
        zipped(Malformed, "expected", [(name, weights)], field(24, "<L", len(weights) + 1))
        zipped(Malformed, "a part of", [(name, weights)], field(20, "<L", 1 << 30))
        zipped(Malformed, "", [(name, weights)], field(42, "<L", 1 << 30))
        zipped(Limit, "a zip's directory of more", [(name, weights)], directory)
        deflated = {"how": zipfile.ZIP_DEFLATED}
        zipped(Malformed, "the checksum", [(name, weights)], field(16, "<L", 1), **deflated)
        zipped(Malformed, "its end", [(name, weights)], field(24, "<L", len(weights) + 1), **deflated)
        zipped(Malformed, "bytes packed into", [(name, b"")], field(24, "<L", 1 << 20), **deflated)
        zipped(Limit, "compressed, of 3,000,000,000 bytes", [(name, b"")], field(24, "<L", 3_000_000_000), **deflated)

    def test_indices(self):
        def index(kind, text, content):
            with open(self.path("a.weights.json"), "w") as file:
                file.write(content if isinstance(content, str) else json.dumps(content))
            with self.subTest(text):
                self.refused(kind, text, self.path("a.weights.json"))

        with h5py.File(self.path("one.h5"), "w") as file:
            file["layers/a/vars/0"] = numpy.zeros(1)
        with h5py.File(self.path("two.h5"), "w") as file:
            file["layers/a/vars/0"] = numpy.zeros(1)
        os.mkdir(self.path("folder"))
        outside = tempfile.TemporaryDirectory()
        self.addCleanup(outside.cleanup)
        os.link(self.path("one.h5"), os.path.join(outside.name, "one.h5"))
        os.symlink(os.path.join(outside.name, "one.h5"), self.path("link.h5"))
        index(Malformed, "JSON", "{")
        index(Malformed, "JSON", '{"a":' + "[" * 100_000)
        index(Unsupported, "without a weight_map", {"format": 1})
        index(Malformed, "at the beginning, expected an HDF5 file", [])
        index(Limit, "found 0 files", {"weight_map": {}})
        for name in ("../one.h5", "/etc/passwd", "..", "", "a\\b", "a\0b", 7, None):
            index(Malformed, "expected a name in the same folder", {"weight_map": {"/layers/a/vars": name}})
        index(Unsupported, "as a link out of the folder", {"weight_map": {"/layers/a/vars": "link.h5"}})
        index(Malformed, "which is no file", {"weight_map": {"/layers/a/vars": "folder"}})
        index(FileNotFoundError, "found no three.h5", {"weight_map": {"/layers/a/vars": "three.h5"}})
        index(Malformed, "found no variables of layers/b/vars", {"weight_map": {"/layers/b/vars": "one.h5"}})
        index(Malformed, "in two files", {"weight_map": {"/layers/a/vars": ["one.h5", "two.h5"]}})


def flip(name):
    """Opens and reads a file with one or a few bytes changed, many times."""
    generator = random.Random(5)
    with open(os.path.join(FIXTURES, name), "rb") as file:
        whole = file.read()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        for round in range(200):
            content = bytearray(whole)
            for _ in range(generator.choice([1, 1, 4, 20])):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            with open(path, "wb") as file:
                file.write(content)
            try:
                container = Keras().open(path)
                try:
                    for tensor in container.tensors:
                        data(path, tensor)
                finally:
                    container.close()
            except (Malformed, Unsupported, Limit):
                pass
            except Exception as error:
                raise AssertionError(f"{name}, round {round}") from error
