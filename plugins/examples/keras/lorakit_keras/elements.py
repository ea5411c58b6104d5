"""The types of elements that Keras stores, in the words of HDF5 and of lorakit."""

import numpy
from h5py import h5t

_LITTLE = {
    "F64": h5t.IEEE_F64LE,
    "F32": h5t.IEEE_F32LE,
    "F16": h5t.IEEE_F16LE,
    "I64": h5t.STD_I64LE,
    "I32": h5t.STD_I32LE,
    "I16": h5t.STD_I16LE,
    "I8": h5t.STD_I8LE,
    "U64": h5t.STD_U64LE,
    "U32": h5t.STD_U32LE,
    "U16": h5t.STD_U16LE,
    "U8": h5t.STD_U8LE,
    "BOOL": h5t.py_create(numpy.dtype(bool), logical=True),
    "C64": h5t.py_create(numpy.dtype("<c8"), logical=True),
}

_BIG = {
    "F64": h5t.IEEE_F64BE,
    "F32": h5t.IEEE_F32BE,
    "F16": h5t.IEEE_F16BE,
    "I64": h5t.STD_I64BE,
    "I32": h5t.STD_I32BE,
    "I16": h5t.STD_I16BE,
    "U64": h5t.STD_U64BE,
    "U32": h5t.STD_U32BE,
    "U16": h5t.STD_U16BE,
}

# bfloat16 has no type in HDF5: Keras stores it as two opaque bytes, and its name in the attribute dtype.
BFLOAT16 = "bfloat16"
_TWO_BYTES = h5t.py_create(numpy.dtype("V2"), logical=True)

DTYPES = [*_LITTLE, "BF16"]

_CLASSES = {
    h5t.INTEGER: "whole numbers",
    h5t.FLOAT: "floating-point numbers",
    h5t.STRING: "strings",
    h5t.BITFIELD: "bit fields",
    h5t.OPAQUE: "opaque values",
    h5t.COMPOUND: "compounds",
    h5t.REFERENCE: "references",
    h5t.ENUM: "an enumeration",
    h5t.VLEN: "lists of variable length",
    h5t.ARRAY: "arrays",
}


def of(kind: h5t.TypeID, attribute: str) -> tuple[str, bool] | None:
    """Returns the dtype of a dataset's elements, and whether they are big-endian, or nothing where Keras does not write
    such a type. attribute is the text of the dataset's attribute dtype."""
    for dtype, known in _LITTLE.items():
        if kind.equal(known):
            return dtype, False
    for dtype, known in _BIG.items():
        if kind.equal(known):
            return dtype, True
    if kind.get_class() == h5t.OPAQUE and kind.get_size() == 2 and attribute == BFLOAT16:
        return "BF16", False
    return None


def named(kind: h5t.TypeID) -> str:
    """Says what a type is."""
    return f"{_CLASSES.get(kind.get_class(), 'an unknown type')} of {kind.get_size()} bytes"


def stored(dtype: str) -> h5t.TypeID:
    """Returns the type in which elements are written."""
    return _TWO_BYTES if dtype == "BF16" else _LITTLE[dtype]
