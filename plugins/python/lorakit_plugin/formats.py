"""What a file format of a plugin implements."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .tensors import Data, Stored, Tensor


@dataclass
class Container:
    """An open file: its headers have been read and checked, its data has not been touched. tensors are in the order of
    their data. files are all that it consists of, the one that was opened among them, where there are several: relative
    to the folder of the file that was opened, with slashes. close, where it is set, is called once, after the last
    read."""

    tensors: Sequence[Stored]
    metadata: dict[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class LayoutOptions:
    """Steers Format.layout, most easily by lay_out. max_shard_size is the most bytes of tensors in a file, 0 for no
    limit; single_file the name of the one file to write, empty where there may be several; stem what names of files
    begin with, empty for the format's own; parameters the number to state in an index, 0 where it is not known. groups
    has a number for each tensor: those of one group stand in one file."""

    max_shard_size: int
    single_file: str
    stem: str
    parameters: int
    metadata: dict[str, str]
    groups: Sequence[int]


@dataclass
class Checksum:
    """A CRC-32 of the bytes [offset, offset + length) of a shard's tensors, to be put at the places in at."""

    offset: int
    length: int
    at: Sequence[int]


@dataclass
class Shard:
    """A file of tensors. tensors maps a number of a tensor, from 0, to where its data begins. pieces maps an offset to
    the bytes beside the tensors; both together fill the file without gap or overlap."""

    name: str
    size: int
    tensors: dict[int, int]
    pieces: dict[int, Data] = field(default_factory=dict)
    checksums: Sequence[Checksum] = ()


@dataclass
class Extra:
    """A small file beside the shards, such as an index. Its name, as those of shards, is the plugin's to choose."""

    name: str
    data: Data


@dataclass
class Layout:
    """Which files a set of tensors becomes. notices say in a sentence each what the format has no place for."""

    shards: Sequence[Shard]
    extras: Sequence[Extra] = ()
    notices: Sequence[str] = ()


class Writer:
    """Writes one file. Its methods are called by one thread at a time. The file is synced, measured and, when it was
    given up, removed by the package."""

    def write(self, index: int, offset: int, data: memoryview) -> None:
        """Takes the next bytes of a tensor: in the order of Format.create's tensors, each from its first byte to its
        last. A tensor without elements is not brought."""
        raise NotImplementedError

    def finish(self) -> None:
        """Completes the file and closes it. All data has been brought."""
        raise NotImplementedError

    def abort(self) -> None:
        """Closes what is open."""
        raise NotImplementedError


class Format:
    """A file format. A file is of it if it has one of the extensions or file_names, where there are any, and one of the
    magics, where there are any. A format implements open to be read, and layout or create to be written.

    name        what --to takes: lower-case letters, digits, dashes and underlines
    extensions  with the dot
    magic       pairs of an offset and the bytes that stand there
    file_names  globs of base names
    dtypes      those that can be written; none stands for all
    written     those of the extensions that files are written with, the usual one first; none stands for all
    extents     whether some tensors that open gives have an offset"""

    name: str = ""
    extensions: Sequence[str] = ()
    magic: Sequence[tuple[int, bytes]] = ()
    file_names: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    written: Sequence[str] = ()
    extents: bool = False

    def sniff(self, path: str) -> bool:
        """Tells whether a file is of the format. Called only for one without extensions, file_names and magic."""
        raise NotImplementedError

    def open(self, path: str) -> Container:
        """Reads and checks the headers of a file, which is input of a stranger: every length is to be checked before
        it is used, and no other file than those of the container is to be read."""
        raise NotImplementedError

    def layout(self, tensors: Sequence[Tensor], options: LayoutOptions) -> Layout:
        """Says where each byte goes, so that lorakit writes the files. The answer depends on the arguments alone."""
        raise NotImplementedError

    def create(self, path: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> Writer:
        """Begins to write a file at a path, and writes nothing anywhere else."""
        raise NotImplementedError
