"""The format of Keras checkpoints: NAME.weights.h5 and NAME.keras of Keras 3, H5 files of Keras 2, sharded weights.

A tensor has the name of its dataset, the path in the file: layers/dense/vars/0. Keras 3 tells the variables of a layer
apart by numbers alone, in the order in which the layer made them: 0 is most often the kernel and 1 the bias."""

from lorakit_plugin import Container, Format

from . import archive, hdf5, shards, writer
from .elements import DTYPES
from .source import Source


class Keras(Format):
    name = "keras"
    extensions = [".weights.h5", ".h5", ".hdf5", ".keras", ".weights.json"]
    written = [".weights.h5"]
    magic = [(0, hdf5.MAGIC), (0, archive.MAGIC), (0, b"{")]
    dtypes = DTYPES
    extents = True

    def open(self, path):
        source = Source.open(path)
        try:
            if source.head(1) == b"{":
                source.close()
                return shards.open(path)
            if source.head(len(archive.MAGIC)) == archive.MAGIC:
                return archive.read(source)
            found = hdf5.read(source)
            return Container(found.tensors, found.metadata, close=source.close)
        except BaseException:
            source.close()
            raise

    def create(self, path, tensors, metadata):
        return writer.Weights(path, tensors, metadata)
