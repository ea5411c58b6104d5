"""Each call, over a socket, in this process."""

import json
import os
import struct
import tempfile
import threading
import unittest

import grpc

from lorakit_plugin import plugin_pb2 as pb
from lorakit_plugin import plugin_pb2_grpc as services
from lorakit_plugin import serving
from tests import examples
from tests.examples import BIG, Given, Halves, Laid, Seconds, Streamed

CHUNK = 1 << 20
TIMEOUT = 20  # of a call that must be answered at once


def line(text):
    """Returns where the first line with a text is in the examples."""
    with open(examples.__file__) as file:
        return f"examples.py:{next(number for number, one in enumerate(file, 1) if text in one)}"


class Served(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        os.environ["PLUGIN_UNIX_SOCKET_DIR"] = self.folder
        Given.closed.clear()
        Given.given_up.clear()
        parts = [Given(), Streamed(), Laid(), Halves(), Seconds()]
        description = serving.describe("all", "1.0.0", parts)
        server, _, address = serving.start(description, parts, threading.Event())
        self.addCleanup(lambda: server.stop(0).wait())
        limits = [("grpc.max_send_message_length", 16 << 20), ("grpc.max_receive_message_length", 4 << 20)]
        channel = grpc.insecure_channel("unix:" + address, options=limits)
        self.addCleanup(channel.close)
        self.plugin = services.PluginServiceStub(channel)
        self.format = services.FormatServiceStub(channel)
        self.scheme = services.SchemeServiceStub(channel)

    def path(self, name):
        return os.path.join(self.folder, name)

    def open(self, kind):
        with open(self.path("a.given"), "w") as file:
            file.write(kind)
        return self.format.Open(pb.OpenRequest(format="given", path=file.name), timeout=TIMEOUT)

    def fails(self, code, text, call):
        with self.assertRaises(grpc.RpcError) as caught:
            call()
        self.assertEqual(code, caught.exception.code(), caught.exception.details())
        self.assertIn(text, caught.exception.details())
        self.assertNotIn("\n", caught.exception.details())


class Describing(Served):
    def test_describe(self):
        answer = self.plugin.Describe(pb.DescribeRequest())
        self.assertEqual(
            ["extents", "read", "scheme-decode", "scheme-encode", "write-layout", "write-stream"],
            list(answer.capabilities),
        )
        modes = {one.name: one.write for one in answer.formats}
        expected = {
            "given": pb.WRITE_MODE_NONE,
            "streamed": pb.WRITE_MODE_STREAM,
            "laid": pb.WRITE_MODE_LAYOUT,
        }
        self.assertEqual(expected, modes)
        self.assertEqual(["F32", "U8"], list(answer.formats[2].dtypes))
        scheme, _ = answer.schemes
        self.assertEqual((["half"], [".scale"]), (list(scheme.types), list(scheme.suffixes)))
        self.assertEqual(["Odd numbers are rounded down."], list(scheme.notices))

    def test_what_cannot_be(self):
        class Both(Laid, Streamed):
            pass

        class Wrong(Given):
            extensions = ["given"]

        class Far(Given):
            magic = [(4095, b"ab")]

        for name, version, parts, text in [
            ("Upper", "1", [Given()], "name"),
            ("a", "one two", [Given()], "version"),
            ("a", "1", [], "no format"),
            ("a", "1", [Both()], "layout and create"),
            ("a", "1", [Wrong()], "extension"),
            ("a", "1", [Far()], "magic"),
            ("a", "1", [Given(), Given()], "each once"),
        ]:
            with self.subTest(text), self.assertRaisesRegex(ValueError, text):
                serving.describe(name, version, parts)
        self.assertIn("deterministic", serving.describe("a", "1", [Given()], True).capabilities)


class Reading(Served):
    def test_lists_come_in_batches(self):
        opened = self.open("many")
        self.assertEqual((["a.given"], "b"), (list(opened.files), opened.metadata[0].value))
        batches = list(self.format.List(pb.ListRequest(handle=opened.handle)))
        self.assertGreater(len(batches), 1)
        self.assertLessEqual(max(batch.ByteSize() for batch in batches), CHUNK)
        tensors = [tensor for batch in batches for tensor in batch.tensors]
        self.assertEqual(10_000, len(tensors))
        last = tensors[-1]
        self.assertEqual(("F32", [9999, 2]), (last.tensor.dtype, list(last.tensor.shape)))
        self.assertEqual(("a.given", 8 * 9999), (last.file, last.extent.offset))

    def test_reads_in_chunks(self):
        handle = self.open("opaque").handle
        data = bytes(i % 251 for i in range(BIG))
        for id in (0, 1):
            for lo, hi in ((0, BIG), (1, 1), (3, 1_500_004), (BIG - 1, BIG)):
                request = pb.ReadRequest(handle=handle, id=id, offset=lo, length=hi - lo)
                at = lo
                for answer in self.format.Read(request):
                    self.assertEqual(at, answer.offset)
                    self.assertLessEqual(len(answer.data), CHUNK)
                    self.assertEqual(data[at : at + len(answer.data)], answer.data)
                    at += len(answer.data)
                self.assertEqual(hi, at)
        self.assertEqual([], list(self.format.Read(pb.ReadRequest(handle=handle, id=4))))

    def test_lengths_are_exact(self):
        handle = self.open("opaque").handle

        def read(**fields):
            return lambda: list(self.format.Read(pb.ReadRequest(handle=handle, **fields)))

        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "sent 8 of 9 bytes of tensor 'short'", read(id=2, length=9))
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "sent more than 1500 bytes", read(id=3, length=1500))
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "a read of 10 bytes", read(id=2, length=10))
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "of no opaque tensor", read(id=7, length=10))

    def test_several_at_once(self):
        handle = self.open("opaque").handle
        streams = [self.format.Read(pb.ReadRequest(handle=handle, id=0, length=BIG)) for _ in range(20)]
        self.assertEqual([BIG] * 20, [sum(len(one.data) for one in stream) for stream in streams])

    def test_given_up(self):
        handle = self.open("opaque").handle
        stream = self.format.Read(pb.ReadRequest(handle=handle, id=3, length=1 << 40))
        next(stream)
        stream.cancel()
        self.assertTrue(Given.given_up.wait(20))

    def test_closes_after_the_last_read(self):
        handle = self.open("opaque").handle
        stream = self.format.Read(pb.ReadRequest(handle=handle, id=3, length=1 << 40))
        next(stream)
        self.format.Close(pb.CloseRequest(handle=handle))
        self.assertFalse(Given.closed.is_set())
        next(stream)
        stream.cancel()
        self.assertTrue(Given.closed.wait(20))
        self.format.Close(pb.CloseRequest(handle=handle))
        listed = lambda: list(self.format.List(pb.ListRequest(handle=handle)))  # noqa: E731
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "not open", listed)

    def test_statuses(self):
        for kind, code, text in [
            ("malformed", grpc.StatusCode.INVALID_ARGUMENT, "tensor w: found 3 bytes, expected 4"),
            ("unsupported", grpc.StatusCode.UNIMPLEMENTED, "of the future"),
            ("limit", grpc.StatusCode.RESOURCE_EXHAUSTED, "too many"),
            ("missing", grpc.StatusCode.NOT_FOUND, "no such shard"),
            ("bug", grpc.StatusCode.INTERNAL, f"IndexError: list index out of range ({line('[][1]')} in bug)"),
            ("bug_in_library", grpc.StatusCode.INTERNAL, f"({line('json.loads')} in bug_in_library)"),
            ("wrong_syntax", grpc.StatusCode.INTERNAL, "SyntaxError: '(' was never closed (examples.py:1)"),
            ("leave", grpc.StatusCode.INTERNAL, f"SystemExit: bye ({line('sys.exit')} in leave)"),
            ("interrupt", grpc.StatusCode.INTERNAL, f"KeyboardInterrupt ({line('raise Keyboard')} in interrupt)"),
            ("panic", grpc.StatusCode.INTERNAL, "Panic: called `Option::unwrap()` on a `None` value (examples.py:"),
            ("long", grpc.StatusCode.INTERNAL, f"xxx ... ({line('x' + chr(34) + ' * 500')} in long)"),
            ("metadata", grpc.StatusCode.RESOURCE_EXHAUSTED, "metadata: found 5,242,893 bytes, 5,242,893 of them in"),
            ("nothing", grpc.StatusCode.FAILED_PRECONDITION, "found None as what open of format given returns, exp"),
            ("numbers", grpc.StatusCode.FAILED_PRECONDITION, "found 3 as metadata 'epoch', expected a str"),
            ("bytes", grpc.StatusCode.FAILED_PRECONDITION, "found b'w' as a tensor's name, expected a str"),
            ("surrogate", grpc.StatusCode.FAILED_PRECONDITION, "expected text that can be UTF-8"),
            ("unstored", grpc.StatusCode.FAILED_PRECONDITION, "as a tensor, expected a Stored"),
            ("negative", grpc.StatusCode.FAILED_PRECONDITION, "found -1 in the shape or offset of tensor 'w'"),
            ("fraction", grpc.StatusCode.FAILED_PRECONDITION, "found 1.0 in the shape or offset of tensor 'w'"),
            ("dtype", grpc.StatusCode.FAILED_PRECONDITION, "found dtype 'float32' of tensor 'w'"),
        ]:
            with self.subTest(kind):
                self.fails(code, text, lambda: self.open(kind))
        missing = pb.OpenRequest(format="given", path=self.path("none"))
        self.fails(grpc.StatusCode.NOT_FOUND, "none", lambda: self.format.Open(missing))
        other = pb.OpenRequest(format="other")
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "does not have", lambda: self.format.Open(other))

    def test_leaving_is_answered_in_a_stream(self):
        handle = self.open("leave_later").handle
        for id in (0, 1):
            request = pb.ReadRequest(handle=handle, id=id, length=9)
            read = lambda: list(self.format.Read(request, timeout=TIMEOUT))  # noqa: B023, E731
            self.fails(grpc.StatusCode.INTERNAL, "SystemExit: bye (examples.py:", read)

    def test_messages_are_limited(self):
        long = pb.OpenRequest(format="given", path="x" * (5 << 20))
        self.fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", lambda: self.format.Open(long))

    def test_sniff(self):
        with open(self.path("x"), "w") as file:
            file.write("four")
        self.assertTrue(self.format.Sniff(pb.SniffRequest(format="laid", path=file.name)).yes)


class Writing(Served):
    tensors = [("a", "U8", [3]), ("none", "F32", [0, 4]), ("b", "F32", [2]), ("last", "U8", [0])]

    def create(self, tensors=None):
        tensors = [pb.Tensor(name=n, dtype=d, shape=s) for n, d, s in tensors or self.tensors]
        first = pb.CreateRequest(format="streamed", path=self.path("out"), tensors=tensors[:1])
        return self.format.Create(iter([first, pb.CreateRequest(tensors=tensors[1:])])).handle

    def write(self, handle, *pieces):
        messages = [pb.WriteRequest(handle=handle, tensor=t, offset=o, data=d) for t, o, d in pieces]
        return self.format.Write(iter(messages)).bytes

    def test_writes(self):
        handle = self.create()
        self.assertEqual(7, self.write(handle, (0, 0, b"a"), (0, 1, b"bc"), (1, 0, b""), (2, 0, b"1234")))
        early = lambda: self.format.Finish(pb.FormatServiceFinishRequest(handle=handle))  # noqa: E731
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "found 4 bytes of tensor 'b', expected 8", early)
        self.assertEqual(4, self.write(handle, (2, 4, b"5678"), (3, 0, b"")))
        for _ in range(2):
            self.assertEqual(11, self.format.Finish(pb.FormatServiceFinishRequest(handle=handle)).size)
        self.format.Close(pb.CloseRequest(handle=handle))
        with open(self.path("out"), "rb") as file:
            self.assertEqual(b"abc12345678", file.read())

    def test_order(self):
        for pieces in [[(2, 0, b"1234")], [(0, 1, b"a")], [(0, 0, b"abcd")], [(4, 0, b"a")], [(-1, 0, b"a")]]:
            handle = self.create()
            self.fails(grpc.StatusCode.FAILED_PRECONDITION, "found", lambda: self.write(handle, *pieces))
            for _ in range(2):
                self.format.Abort(pb.AbortRequest(handle=handle))
            self.assertFalse(os.path.exists(self.path("out")))
            self.fails(grpc.StatusCode.FAILED_PRECONDITION, "given up", lambda: self.write(handle, (0, 0, b"a")))

    def test_close_removes_what_was_not_finished(self):
        handle = self.create()
        self.assertTrue(os.path.exists(self.path("out")))
        self.format.Close(pb.CloseRequest(handle=handle))
        self.assertFalse(os.path.exists(self.path("out")))

    def test_refused(self):
        self.fails(grpc.StatusCode.UNIMPLEMENTED, "complex", lambda: self.create([("c", "C64", [1])]))
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "dtype 'X9'", lambda: self.create([("c", "X9", [1])]))

    def test_layout(self):
        options = pb.LayoutOptions(format="laid", max_shard_size=9, stem="s", metadata=[pb.Pair(name="k", value="v")])
        tensor = pb.LayoutTensor(tensor=pb.Tensor(name="a", dtype="F32", shape=[2, 3]), group=4)
        requests = [pb.LayoutRequest(options=options), pb.LayoutRequest(tensors=[tensor, tensor])]
        answers = list(self.format.Layout(iter(requests)))
        self.assertLessEqual(max(answer.ByteSize() for answer in answers), CHUNK + 100)
        items = [item for answer in answers for item in answer.items]
        self.assertEqual(("s.laid", BIG + 48), (items[0].shard.name, items[0].shard.size))
        places = [(i.place.tensor, i.place.offset) for i in items if i.WhichOneof("item") == "place"]
        self.assertEqual([(0, BIG), (1, BIG + 24)], places)
        pieces = [item.piece for item in items if item.WhichOneof("item") == "piece"]
        self.assertEqual([0, CHUNK, 2 * CHUNK], [piece.offset for piece in pieces])
        self.assertEqual(b"h" * BIG, b"".join(piece.data for piece in pieces))
        self.assertEqual([4, 8], list(next(i.checksum.at for i in items if i.WhichOneof("item") == "checksum")))
        extra = [item.extra for item in items if item.WhichOneof("item") == "extra"]
        self.assertEqual(("index", BIG), (extra[-1].name, sum(len(one.data) for one in extra)))
        self.assertEqual("groups [4, 4], limit 9, {'k': 'v'}", items[-1].notice)


class Schemes(Served):
    def find(self, answer):
        """Plays the host: answers wants by answer."""
        messages, wait = [], threading.Condition()

        def send(message):
            with wait:
                messages.append(message)
                wait.notify()

        def requests():
            while True:
                with wait:
                    while not messages:
                        wait.wait()
                    message = messages.pop(0)
                if message is None:
                    return
                yield message

        for name, dtype in (("w", "U8"), ("w.scale", "F32")):
            tensors = pb.FindTensors(tensors=[pb.Tensor(name=name, dtype=dtype, shape=[8] if dtype == "U8" else [])])
            messages.append(pb.FindRequest(tensors=tensors))
        messages.insert(0, pb.FindRequest(start=pb.FindStart(scheme="halves")))
        messages.append(pb.FindRequest(done=pb.FindDone()))
        found = []
        for message in self.scheme.Find(requests()):
            if message.HasField("want"):
                send(answer(message.want))
            found += message.weights
        send(None)
        return found

    def test_decode(self):
        def answer(want):
            self.assertEqual(("w.scale", 0, 4), (want.tensor, want.offset, want.length))
            return pb.FindRequest(content=pb.FindContent(data=struct.pack("<f", 3)))

        (weight,) = self.find(answer)
        self.assertEqual(("w", "F32", "F32", 4), (weight.tensor.name, weight.tensor.dtype, weight.values, weight.unit))
        self.assertEqual([("w", 4), ("w.scale", 0)], [(part.name, part.rule.stride) for part in weight.parts])
        tiles = [
            pb.DecodeRequest(id=7, decoder=weight.decoder, lo=4, hi=8, parts=[bytes([1, 2, 3, 4]), b""]),
            pb.DecodeRequest(id=8, decoder=weight.decoder, lo=0, hi=4, parts=[bytes([5, 6, 7, 8]), b""]),
        ]
        answers = [(one.id, struct.unpack("<4f", one.values)) for one in self.scheme.Decode(iter(tiles))]
        self.assertEqual([(7, (3, 6, 9, 12)), (8, (15, 18, 21, 24))], answers)
        bad = pb.DecodeRequest(decoder=weight.decoder, lo=0, hi=8, parts=[b"abc", b""])
        decode = lambda: list(self.scheme.Decode(iter([bad])))  # noqa: E731
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "found 12 bytes of values", decode)

    def test_content_that_is_short(self):
        short = pb.FindRequest(content=pb.FindContent(data=b"abc"))
        find = lambda: self.find(lambda _: short)  # noqa: E731
        self.fails(grpc.StatusCode.FAILED_PRECONDITION, "found 3 bytes of 'w.scale'", find)

    def test_encode(self):
        tensor = pb.Tensor(name="w", dtype="F32", shape=[8])
        request = pb.EncoderRequest(scheme="halves", spec=pb.Spec(type="half"), tensor=tensor)
        encoder = self.scheme.Encoder(request)
        self.assertEqual((4, 1), (encoder.unit, encoder.carry))
        self.assertEqual(["w", "w.sums"], [output.tensor.name for output in encoder.outputs])
        values = struct.pack("<8f", 2, 4, 6, 8, 10, 12, 14, 16)
        nan = struct.pack("<4f", 0, 1, float("nan"), 3)
        tiles = [
            pb.EncodeRequest(id=1, encoder=encoder.encoder, lo=0, hi=8, values=values),
            pb.EncodeRequest(id=2, encoder=encoder.encoder, lo=4, hi=8, values=nan),
        ]
        first, second = self.scheme.Encode(iter(tiles))
        self.assertEqual([bytes(range(1, 9)), b""], list(first.outputs))
        self.assertEqual((2, 6, "NaN"), (second.id, second.non_finite.index, second.non_finite.what))

        def host():
            yield pb.SchemeServiceFinishRequest(encoder=encoder.encoder)
            asked.wait(10)
            yield pb.SchemeServiceFinishRequest(carry=first.carry)

        asked = threading.Event()
        pieces = []
        for message in self.scheme.Finish(host()):
            if message.WhichOneof("message") == "want":
                self.assertEqual((0, 2), (message.want.index, message.want.count))
                asked.set()
            else:
                pieces.append((message.piece.part, message.piece.offset, message.piece.data))
        self.assertEqual([(1, 0, struct.pack("<2f", 20, 52))], pieces)
        other = pb.EncoderRequest(scheme="halves", spec=pb.Spec(type="third"), tensor=tensor)
        self.fails(grpc.StatusCode.UNIMPLEMENTED, "type third", lambda: self.scheme.Encoder(other))

    def test_nothing_carried(self):
        tensor = pb.Tensor(name="w", dtype="F16", shape=[2])
        for type, code in (("second", None), ("leave", grpc.StatusCode.INTERNAL)):
            request = pb.EncoderRequest(scheme="seconds", spec=pb.Spec(type=type), tensor=tensor)
            encoder = self.scheme.Encoder(request).encoder
            tile = pb.EncodeRequest(encoder=encoder, hi=2, values=b"abcd")
            encode = lambda: list(self.scheme.Encode(iter([tile]), timeout=TIMEOUT))  # noqa: B023, E731
            if code is None:
                (answer,) = encode()
                self.assertEqual(([b"ac", b"bd"], b""), (list(answer.outputs), answer.carry))
            else:
                self.fails(code, "SystemExit: bye (examples.py:", encode)

    def test_leaving_is_answered(self):
        messages = [pb.FindRequest(start=pb.FindStart(scheme="seconds")), pb.FindRequest(done=pb.FindDone())]
        find = lambda: list(self.scheme.Find(iter(messages), timeout=TIMEOUT))  # noqa: E731
        self.fails(grpc.StatusCode.INTERNAL, "SystemExit: bye (examples.py:", find)
        config = lambda: self.scheme.Config(iter([pb.ConfigRequest(scheme="seconds")]), timeout=TIMEOUT)  # noqa: E731
        self.fails(grpc.StatusCode.INTERNAL, "Panic: no config (examples.py:", config)

    def test_config(self):
        first = pb.ConfigRequest(scheme="halves", spec=pb.Spec(type="half"), loader_chooses=True, skip=["a"])
        config = json.loads(self.scheme.Config(iter([first, pb.ConfigRequest(skip=["b"])])).json)
        expected = {"quant_method": "halves", "type": "half", "skip": ["a", "b"], "chosen": True}
        self.assertEqual(expected, config)
