"""What a quantisation scheme of a plugin implements."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .tensors import CHUNK, Data, Tensor


@dataclass(frozen=True)
class Spec:
    """How a weight is quantised. A parameter that the scheme does not have is 0 or False. allow_non_finite: NaN and
    infinity are encoded as the scheme does, in place of being refused by NonFinite."""

    type: str
    block_size: int = 0
    double_quant: bool = False
    allow_non_finite: bool = False


@dataclass(frozen=True)
class Rule:
    """Which bytes of a stored tensor belong to a tile. A tile begins at a multiple of unit elements; its bytes are
    those at first + (u modulo wrap) * stride, stride bytes each, for each unit u of it. wrap 0: u is not wrapped.
    stride 0: of a part, all its bytes from first on are given to each tile; of an output, no tile fills it."""

    first: int = 0
    stride: int = 0
    wrap: int = 0


@dataclass(frozen=True)
class Part:
    """A tensor of a weight by its name, and what of it a tile needs."""

    name: str
    rule: Rule


class Checkpoint:
    """The tensors in which weights are looked for. dtype is the type of the checkpoint as a whole, as its config.json
    has it, empty where nothing says it: then a scheme that stores no type of its own takes the one that loaders take,
    such as BF16. config is the text of config.json, empty where there is none."""

    def __init__(self, dtype: str, config: bytes, tensors: list[Tensor], want: Callable[[str, int, int], bytes]):
        self.dtype = dtype
        self.config = config
        self.tensors = tensors
        self._want = want

    def content(self, name: str, offset: int, length: int) -> bytes:
        """Returns bytes of a tensor."""
        pieces = [
            self._want(name, at, min(CHUNK, offset + length - at)) for at in range(offset, offset + length, CHUNK)
        ]
        return b"".join(pieces)


class Decoder:
    """A weight that is stored in the scheme. parts begin with the tensor that has the bulk of the data; tensor.dtype is
    what the weight had before it was quantised; values is the dtype that decode writes."""

    tensor: Tensor
    spec: Spec
    parts: Sequence[Part]
    unit: int
    values: str

    def decode(self, lo: int, hi: int, parts: Sequence[bytes]) -> Data:
        """Returns the values of the elements [lo, hi). Several threads call it at once."""
        raise NotImplementedError


class Carried:
    """Reads the numbers that encode has carried over, in the order of the units."""

    def __init__(self, want: Callable[[int, int], bytes]):
        self._want = want

    def floats(self, index: int, count: int) -> bytes:
        """Returns count numbers from index on, as float32, little-endian."""
        most = CHUNK // 4
        pieces = [self._want(at, min(most, index + count - at)) for at in range(index, index + count, most)]
        return b"".join(pieces)


class Encoder:
    """A weight that is about to be stored. outputs are the tensors that it becomes, the one with the bulk of the data
    first, each with what of it a tile fills. carry is how many float32 numbers encode hands to finish from each
    unit."""

    outputs: Sequence[tuple[Tensor, Rule]]
    unit: int
    carry: int = 0

    def encode(self, lo: int, hi: int, values: bytes) -> tuple[Sequence[Data], Data] | Sequence[Data]:
        """Returns a list with what each output's rule says of the tile [lo, hi), and the numbers to carry over as
        float32; where carry is 0, the list alone will do. Several threads call it at once. Where a value is not finite,
        and Spec.allow_non_finite does not say that it may be so, it raises NonFinite."""
        raise NotImplementedError

    def finish(self, carried: Carried) -> Iterable[tuple[int, int, Data]]:
        """Yields what no tile has filled: the number of an output, an offset in it, and bytes."""
        return ()


class Scheme:
    """A way to store one weight as several tensors, in fewer bits. It implements find to be read, and encoder and
    config to be written.

    name        the quant_method of a config.json
    types       what --quantize takes
    parameters  what of "block_size" and "double_quant" the types have
    suffixes    endings of the names of tensors by which its weights are known: a checkpoint that has none of them, and
                whose config.json does not name the scheme, is not asked about; without them each one is
    notices     what a user should know of weights that are written, in a sentence each, such as how they are rounded"""

    name: str = ""
    types: Sequence[str] = ()
    parameters: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    notices: Sequence[str] = ()

    def find(self, checkpoint: Checkpoint) -> Iterable[Decoder]:
        """Finds the weights of the scheme, in the order of the checkpoint's tensors."""
        raise NotImplementedError

    def encoder(self, spec: Spec, tensor: Tensor) -> Encoder:
        """Prepares to store a weight, whose dtype is that of the values that are encoded: F32, F16 or BF16."""
        raise NotImplementedError

    def config(self, spec: Spec, loader_chooses: bool, skip: Sequence[str]) -> dict:
        """Returns the quantization_config of a config.json. skip lists the modules that are not quantised; it is empty
        where loader_chooses says that they are those that a loader would choose."""
        raise NotImplementedError
