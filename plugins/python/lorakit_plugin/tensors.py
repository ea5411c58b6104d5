"""Tensors: a name, an element type and a shape, and where the data is."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

# The most bytes of a message's data.
CHUNK = 1 << 20

# What holds bytes: a numpy array can be given as memoryview(array).cast("B").
Data = bytes | bytearray | memoryview

# The width of an element in bits, by lorakit's name of its type.
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "C64": 64,
}


@dataclass(frozen=True)
class Tensor:
    """The name, type and shape of an array. dtype is a name of lorakit's: F64 F32 F16 BF16 I64 U64
    I32 U32 I16 U16 I8 U8 BOOL F8_E4M3 F8_E5M2 ... C64, see BITS."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.elements * BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class Stored(Tensor):
    """A tensor of a file. Either offset says where its data lies in the file as it is, little-endian and row-major:
    lorakit then reads it by itself. Or read(offset, length) gives the bytes [offset, offset + length) of the data, as
    one bytes-like object or as several in order; it is called from several threads at once. file says which of
    Container.files has the data, where it is not the first of them."""

    offset: int | None = None
    read: Callable[[int, int], Data | Iterable[Data]] | None = field(default=None, repr=False)
    file: str = ""
