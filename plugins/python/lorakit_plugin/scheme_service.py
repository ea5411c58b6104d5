"""SchemeService: the methods of schemes behind the protocol."""

import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from . import plugin_pb2 as pb
from .errors import Limit, NonFinite
from .format_service import from_message, to_message
from .handles import Handles
from .plugin_pb2_grpc import SchemeServiceServicer
from .schemes import Carried, Checkpoint, Decoder, Encoder, Rule, Scheme, Spec
from .statuses import Misuse, batches, check_kind, pieces, streaming, unary
from .tensors import BITS, CHUNK, Data


class SchemeService(SchemeServiceServicer):
    """The schemes of a plugin by their names."""

    def __init__(self, schemes: Sequence[Scheme]):
        self._schemes = {scheme.name: scheme for scheme in schemes}
        numbers = itertools.count(1)
        self._decoders = Handles(numbers)
        self._encoders = Handles(numbers)

    def _scheme(self, name: str) -> Scheme:
        if name not in self._schemes:
            raise Misuse(f"found scheme {name!r}, which this plugin does not have")
        return self._schemes[name]

    @streaming
    def Find(self, request, context):
        start, config, tensors = None, [], []
        for message in request:
            kind = message.WhichOneof("message")
            if kind == "start":
                start = start or message.start
                config.append(message.start.config)
            elif kind == "tensors" and start is not None:
                tensors += [from_message(tensor) for tensor in message.tensors.tensors]
            elif kind == "done" and start is not None:
                break
            else:
                raise Misuse(f"found {kind}, expected start, tensors and done")
        else:
            raise Misuse("found the end of the tensors without done")
        scheme = self._scheme(start.scheme)

        def work(ask: Callable) -> Iterator:
            def want(name: str, offset: int, length: int) -> bytes:
                wanted = pb.FindWant(tensor=name, offset=offset, length=length)
                answer = ask(pb.FindResponse(want=wanted))
                if answer.WhichOneof("message") != "content":
                    raise Misuse(f"found {answer.WhichOneof('message')}, expected content")
                if len(answer.content.data) != length:
                    raise Misuse(f"found {len(answer.content.data)} bytes of {name!r}, expected {length}")
                return answer.content.data

            checkpoint = Checkpoint(start.dtype, b"".join(config), tensors, want)
            for batch in batches(self._found(decoder) for decoder in scheme.find(checkpoint)):
                yield pb.FindResponse(weights=batch)

        yield from _conversation(work, request, context)

    def _found(self, decoder: Decoder) -> pb.FoundWeight:
        check_kind(decoder, Decoder, "what find yields")
        return pb.FoundWeight(
            decoder=self._decoders.add(decoder),
            tensor=to_message(decoder.tensor),
            spec=_to_spec(decoder.spec),
            parts=[pb.FoundPart(name=part.name, rule=_to_rule(part.rule)) for part in decoder.parts],
            unit=decoder.unit,
            values=decoder.values,
        )

    @streaming
    def Decode(self, request, context):
        for tile in request:
            with self._decoders.use(tile.decoder) as decoder:
                _check_tile(decoder, tile, decoder.tensor.elements)
                values = memoryview(decoder.decode(tile.lo, tile.hi, list(tile.parts))).tobytes()
            expected = (tile.hi - tile.lo) * BITS[decoder.values] // 8
            if len(values) != expected:
                raise Misuse(f"found {len(values)} bytes of values of {decoder.tensor.name!r}, expected {expected}")
            yield pb.DecodeResponse(id=tile.id, values=values)

    @unary
    def Encoder(self, request, context):
        tensor = from_message(request.tensor)
        encoder = self._scheme(request.scheme).encoder(_from_spec(request.spec), tensor)
        check_kind(encoder, Encoder, f"what encoder of scheme {request.scheme} returns")
        return pb.EncoderResponse(
            encoder=self._encoders.add((encoder, tensor)),
            outputs=[pb.EncodedPart(tensor=to_message(one), rule=_to_rule(rule)) for one, rule in encoder.outputs],
            unit=encoder.unit,
            carry=encoder.carry,
        )

    @streaming
    def Encode(self, request, context):
        for tile in request:
            with self._encoders.use(tile.encoder) as (encoder, tensor):
                yield _encoded(encoder, tensor, tile)

    @streaming
    def Finish(self, request, context):
        first = next(request, None)
        if first is None or first.WhichOneof("message") != "encoder":
            raise Misuse("found no encoder, expected one")

        def work(ask: Callable) -> Iterator:
            def want(index: int, count: int) -> bytes:
                answer = ask(pb.SchemeServiceFinishResponse(want=pb.CarryWant(index=index, count=count)))
                if answer.WhichOneof("message") != "carry" or len(answer.carry) != 4 * count:
                    raise Misuse(f"found no {count} numbers that were carried over, expected them")
                return answer.carry

            with self._encoders.use(first.encoder) as (encoder, _):
                for part, offset, data in encoder.finish(Carried(want)):
                    for at, chunk in pieces(data):
                        piece = pb.FinishedPiece(part=part, offset=offset + at, data=bytes(chunk))
                        yield pb.SchemeServiceFinishResponse(piece=piece)

        yield from _conversation(work, request, context)

    @unary
    def Config(self, request, context):
        first, skip = None, []
        for message in request:
            first = first or message
            skip += message.skip
        if first is None:
            raise Misuse("found nothing, expected a scheme and a spec")
        config = self._scheme(first.scheme).config(_from_spec(first.spec), first.loader_chooses, skip)
        text = json.dumps(config, ensure_ascii=False).encode()
        if len(text) > CHUNK:
            raise Limit(f"found a quantization_config of {len(text):,} bytes, expected at most {CHUNK:,}")
        return pb.ConfigResponse(json=text)


def _encoded(encoder: Encoder, tensor, tile: pb.EncodeRequest) -> pb.EncodeResponse:
    _check_tile(encoder, tile, tensor.elements)
    expected = (tile.hi - tile.lo) * BITS[tensor.dtype] // 8
    if len(tile.values) != expected:
        raise Misuse(f"found {len(tile.values)} bytes of values of {tensor.name!r}, expected {expected}")
    try:
        outputs, carry = _parted(encoder.encode(tile.lo, tile.hi, tile.values), encoder)
    except NonFinite as found:
        return pb.EncodeResponse(id=tile.id, non_finite=pb.NonFinite(index=found.index, what=found.what))
    if len(outputs) != len(encoder.outputs):
        raise Misuse(f"found {len(outputs)} outputs of {tensor.name!r}, expected {len(encoder.outputs)}")
    carried = memoryview(carry).tobytes()
    expected = 4 * encoder.carry * -(-(tile.hi - tile.lo) // encoder.unit)
    if len(carried) != expected:
        raise Misuse(f"found {len(carried)} bytes carried over of {tensor.name!r}, expected {expected}")
    return pb.EncodeResponse(id=tile.id, outputs=[memoryview(output).tobytes() for output in outputs], carry=carried)


def _parted(encoded, encoder: Encoder) -> tuple[Sequence[Data], Data]:
    """Returns outputs and carry: encode may leave out the latter where there is none."""
    if encoder.carry == 0 and not (len(encoded) == 2 and isinstance(encoded[0], (list, tuple))):
        return encoded, b""
    return encoded


def _check_tile(weight: Decoder | Encoder, tile, elements: int) -> None:
    if not 0 <= tile.lo <= tile.hi <= elements or tile.lo % weight.unit:
        raise Misuse(f"found the elements {tile.lo} to {tile.hi} of {elements}, expected multiples of {weight.unit}")


def _conversation(work: Callable[[Callable], Iterator], requests: Iterator, context) -> Iterator:
    """Yields what work yields, and what it asks: ask(message) sends a message and returns the host's next one. Work
    runs in a thread of its own, since what it calls cannot yield for it."""
    answers: queue.Queue = queue.Queue(4)

    def put(answer) -> None:
        while context.is_active():
            try:
                return answers.put(answer, timeout=0.5)
            except queue.Full:
                pass
        raise Misuse("found a call that was given up")

    def ask(message):
        put((message, None))
        answer = next(requests, None)
        if answer is None:
            raise Misuse("found the end of the requests, expected an answer")
        return answer

    def run() -> None:
        try:
            try:
                for message in work(ask):
                    put((message, None))
                put((None, None))
            except BaseException as error:
                put((None, error))
        except Misuse:
            pass  # nobody is there to hear of it

    threading.Thread(target=run, daemon=True).start()
    while context.is_active():
        try:
            message, error = answers.get(timeout=0.5)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        if message is None:
            return
        yield message


def _to_spec(spec: Spec) -> pb.Spec:
    return pb.Spec(
        type=spec.type,
        block_size=spec.block_size,
        double_quant=spec.double_quant,
        allow_non_finite=spec.allow_non_finite,
    )


def _from_spec(message: pb.Spec) -> Spec:
    return Spec(message.type, message.block_size, message.double_quant, message.allow_non_finite)


def _to_rule(rule: Rule) -> pb.Rule:
    return pb.Rule(first=rule.first, stride=rule.stride, wrap=rule.wrap)
