"""Reads tensors as lorakit does."""

import hashlib
import os

from lorakit_keras import Keras
from lorakit_plugin.tensors import Tensor


def opened(path):
    container = Keras().open(path)
    try:
        return {tensor.name: (tensor.dtype, list(tensor.shape), data(path, tensor)) for tensor in container.tensors}
    finally:
        if container.close:
            container.close()


def data(path, tensor, offset=0, length=None):
    length = tensor.nbytes if length is None else length
    if tensor.offset is None:
        read = tensor.read(offset, length)
        return bytes(read) if isinstance(read, (bytes, memoryview)) else b"".join(read)
    file = os.path.join(os.path.dirname(path), tensor.file) if tensor.file else path
    with open(file, "rb") as stream:
        stream.seek(tensor.offset + offset)
        return stream.read(length)


def digests(tensors):
    return {
        name: {"name": name, "dtype": dtype, "shape": shape, "sha256": hashlib.sha256(data).hexdigest()}
        for name, (dtype, shape, data) in tensors.items()
    }


def write(path, tensors, metadata=None, piece=None):
    """Writes tensors, a dict of dtype, shape and bytes by name."""
    infos = [Tensor(name, dtype, tuple(shape)) for name, (dtype, shape, _) in tensors.items()]
    writer = Keras().create(path, infos, metadata or {})
    for index, (_, _, values) in enumerate(tensors.values()):
        for at in range(0, len(values), piece or max(1, len(values))):
            writer.write(index, at, memoryview(values)[at : at + (piece or len(values))])
    writer.finish()
