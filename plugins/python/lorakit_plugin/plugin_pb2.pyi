from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WriteMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WRITE_MODE_UNSPECIFIED: _ClassVar[WriteMode]
    WRITE_MODE_NONE: _ClassVar[WriteMode]
    WRITE_MODE_LAYOUT: _ClassVar[WriteMode]
    WRITE_MODE_STREAM: _ClassVar[WriteMode]
WRITE_MODE_UNSPECIFIED: WriteMode
WRITE_MODE_NONE: WriteMode
WRITE_MODE_LAYOUT: WriteMode
WRITE_MODE_STREAM: WriteMode

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("name", "version", "protocol", "capabilities", "formats", "schemes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    SCHEMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    protocol: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    formats: _containers.RepeatedCompositeFieldContainer[FormatInfo]
    schemes: _containers.RepeatedCompositeFieldContainer[SchemeInfo]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., protocol: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., formats: _Optional[_Iterable[_Union[FormatInfo, _Mapping]]] = ..., schemes: _Optional[_Iterable[_Union[SchemeInfo, _Mapping]]] = ...) -> None: ...

class FormatInfo(_message.Message):
    __slots__ = ("name", "extensions", "magic", "file_names", "write", "dtypes", "written")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXTENSIONS_FIELD_NUMBER: _ClassVar[int]
    MAGIC_FIELD_NUMBER: _ClassVar[int]
    FILE_NAMES_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    extensions: _containers.RepeatedScalarFieldContainer[str]
    magic: _containers.RepeatedCompositeFieldContainer[Magic]
    file_names: _containers.RepeatedScalarFieldContainer[str]
    write: WriteMode
    dtypes: _containers.RepeatedScalarFieldContainer[str]
    written: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., extensions: _Optional[_Iterable[str]] = ..., magic: _Optional[_Iterable[_Union[Magic, _Mapping]]] = ..., file_names: _Optional[_Iterable[str]] = ..., write: _Optional[_Union[WriteMode, str]] = ..., dtypes: _Optional[_Iterable[str]] = ..., written: _Optional[_Iterable[str]] = ...) -> None: ...

class Magic(_message.Message):
    __slots__ = ("offset", "bytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    offset: int
    bytes: bytes
    def __init__(self, offset: _Optional[int] = ..., bytes: _Optional[bytes] = ...) -> None: ...

class SchemeInfo(_message.Message):
    __slots__ = ("name", "types", "parameters", "suffixes", "notices")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SUFFIXES_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    name: str
    types: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    suffixes: _containers.RepeatedScalarFieldContainer[str]
    notices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., types: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Iterable[str]] = ..., suffixes: _Optional[_Iterable[str]] = ..., notices: _Optional[_Iterable[str]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class SniffRequest(_message.Message):
    __slots__ = ("format", "path")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    format: str
    path: str
    def __init__(self, format: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class SniffResponse(_message.Message):
    __slots__ = ("yes",)
    YES_FIELD_NUMBER: _ClassVar[int]
    yes: bool
    def __init__(self, yes: _Optional[bool] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("format", "path")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    format: str
    path: str
    def __init__(self, format: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("handle", "metadata", "files")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    metadata: _containers.RepeatedCompositeFieldContainer[Pair]
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, handle: _Optional[int] = ..., metadata: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ..., files: _Optional[_Iterable[str]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[StoredTensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[StoredTensor, _Mapping]]] = ...) -> None: ...

class StoredTensor(_message.Message):
    __slots__ = ("tensor", "file", "extent", "opaque")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    OPAQUE_FIELD_NUMBER: _ClassVar[int]
    tensor: Tensor
    file: str
    extent: Extent
    opaque: Opaque
    def __init__(self, tensor: _Optional[_Union[Tensor, _Mapping]] = ..., file: _Optional[str] = ..., extent: _Optional[_Union[Extent, _Mapping]] = ..., opaque: _Optional[_Union[Opaque, _Mapping]] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class Opaque(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("handle", "id", "offset", "length")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    handle: int
    id: int
    offset: int
    length: int
    def __init__(self, handle: _Optional[int] = ..., id: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LayoutRequest(_message.Message):
    __slots__ = ("options", "tensors")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    options: LayoutOptions
    tensors: _containers.RepeatedCompositeFieldContainer[LayoutTensor]
    def __init__(self, options: _Optional[_Union[LayoutOptions, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[LayoutTensor, _Mapping]]] = ...) -> None: ...

class LayoutOptions(_message.Message):
    __slots__ = ("format", "max_shard_size", "single_file", "stem", "parameters", "metadata")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARD_SIZE_FIELD_NUMBER: _ClassVar[int]
    SINGLE_FILE_FIELD_NUMBER: _ClassVar[int]
    STEM_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    format: str
    max_shard_size: int
    single_file: str
    stem: str
    parameters: int
    metadata: _containers.RepeatedCompositeFieldContainer[Pair]
    def __init__(self, format: _Optional[str] = ..., max_shard_size: _Optional[int] = ..., single_file: _Optional[str] = ..., stem: _Optional[str] = ..., parameters: _Optional[int] = ..., metadata: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ...) -> None: ...

class LayoutTensor(_message.Message):
    __slots__ = ("tensor", "group")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    tensor: Tensor
    group: int
    def __init__(self, tensor: _Optional[_Union[Tensor, _Mapping]] = ..., group: _Optional[int] = ...) -> None: ...

class LayoutResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[LayoutItem]
    def __init__(self, items: _Optional[_Iterable[_Union[LayoutItem, _Mapping]]] = ...) -> None: ...

class LayoutItem(_message.Message):
    __slots__ = ("shard", "place", "piece", "checksum", "extra", "notice")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    shard: LayoutShard
    place: LayoutPlace
    piece: LayoutPiece
    checksum: LayoutChecksum
    extra: LayoutExtra
    notice: str
    def __init__(self, shard: _Optional[_Union[LayoutShard, _Mapping]] = ..., place: _Optional[_Union[LayoutPlace, _Mapping]] = ..., piece: _Optional[_Union[LayoutPiece, _Mapping]] = ..., checksum: _Optional[_Union[LayoutChecksum, _Mapping]] = ..., extra: _Optional[_Union[LayoutExtra, _Mapping]] = ..., notice: _Optional[str] = ...) -> None: ...

class LayoutShard(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class LayoutPlace(_message.Message):
    __slots__ = ("tensor", "offset")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class LayoutPiece(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LayoutChecksum(_message.Message):
    __slots__ = ("offset", "length", "at")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    at: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ..., at: _Optional[_Iterable[int]] = ...) -> None: ...

class LayoutExtra(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class CreateRequest(_message.Message):
    __slots__ = ("format", "path", "metadata", "tensors")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    format: str
    path: str
    metadata: _containers.RepeatedCompositeFieldContainer[Pair]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, format: _Optional[str] = ..., path: _Optional[str] = ..., metadata: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class CreateResponse(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("handle", "tensor", "offset", "data")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    handle: int
    tensor: int
    offset: int
    data: bytes
    def __init__(self, handle: _Optional[int] = ..., tensor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class FormatServiceFinishRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class FormatServiceFinishResponse(_message.Message):
    __slots__ = ("size",)
    SIZE_FIELD_NUMBER: _ClassVar[int]
    size: int
    def __init__(self, size: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class CloseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Spec(_message.Message):
    __slots__ = ("type", "block_size", "double_quant", "allow_non_finite")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_QUANT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_NON_FINITE_FIELD_NUMBER: _ClassVar[int]
    type: str
    block_size: int
    double_quant: bool
    allow_non_finite: bool
    def __init__(self, type: _Optional[str] = ..., block_size: _Optional[int] = ..., double_quant: _Optional[bool] = ..., allow_non_finite: _Optional[bool] = ...) -> None: ...

class Rule(_message.Message):
    __slots__ = ("first", "stride", "wrap")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    WRAP_FIELD_NUMBER: _ClassVar[int]
    first: int
    stride: int
    wrap: int
    def __init__(self, first: _Optional[int] = ..., stride: _Optional[int] = ..., wrap: _Optional[int] = ...) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("start", "tensors", "done", "content")
    START_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    start: FindStart
    tensors: FindTensors
    done: FindDone
    content: FindContent
    def __init__(self, start: _Optional[_Union[FindStart, _Mapping]] = ..., tensors: _Optional[_Union[FindTensors, _Mapping]] = ..., done: _Optional[_Union[FindDone, _Mapping]] = ..., content: _Optional[_Union[FindContent, _Mapping]] = ...) -> None: ...

class FindStart(_message.Message):
    __slots__ = ("scheme", "dtype", "config")
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    scheme: str
    dtype: str
    config: bytes
    def __init__(self, scheme: _Optional[str] = ..., dtype: _Optional[str] = ..., config: _Optional[bytes] = ...) -> None: ...

class FindTensors(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class FindDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FindContent(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FindResponse(_message.Message):
    __slots__ = ("want", "weights")
    WANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    want: FindWant
    weights: _containers.RepeatedCompositeFieldContainer[FoundWeight]
    def __init__(self, want: _Optional[_Union[FindWant, _Mapping]] = ..., weights: _Optional[_Iterable[_Union[FoundWeight, _Mapping]]] = ...) -> None: ...

class FindWant(_message.Message):
    __slots__ = ("tensor", "offset", "length")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    offset: int
    length: int
    def __init__(self, tensor: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class FoundWeight(_message.Message):
    __slots__ = ("decoder", "tensor", "spec", "parts", "unit", "values")
    DECODER_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    decoder: int
    tensor: Tensor
    spec: Spec
    parts: _containers.RepeatedCompositeFieldContainer[FoundPart]
    unit: int
    values: str
    def __init__(self, decoder: _Optional[int] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., spec: _Optional[_Union[Spec, _Mapping]] = ..., parts: _Optional[_Iterable[_Union[FoundPart, _Mapping]]] = ..., unit: _Optional[int] = ..., values: _Optional[str] = ...) -> None: ...

class FoundPart(_message.Message):
    __slots__ = ("name", "rule")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    name: str
    rule: Rule
    def __init__(self, name: _Optional[str] = ..., rule: _Optional[_Union[Rule, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("id", "decoder", "lo", "hi", "parts")
    ID_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    LO_FIELD_NUMBER: _ClassVar[int]
    HI_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    id: int
    decoder: int
    lo: int
    hi: int
    parts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, id: _Optional[int] = ..., decoder: _Optional[int] = ..., lo: _Optional[int] = ..., hi: _Optional[int] = ..., parts: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("id", "values")
    ID_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    id: int
    values: bytes
    def __init__(self, id: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class EncoderRequest(_message.Message):
    __slots__ = ("scheme", "spec", "tensor")
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    scheme: str
    spec: Spec
    tensor: Tensor
    def __init__(self, scheme: _Optional[str] = ..., spec: _Optional[_Union[Spec, _Mapping]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class EncoderResponse(_message.Message):
    __slots__ = ("encoder", "outputs", "unit", "carry")
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    CARRY_FIELD_NUMBER: _ClassVar[int]
    encoder: int
    outputs: _containers.RepeatedCompositeFieldContainer[EncodedPart]
    unit: int
    carry: int
    def __init__(self, encoder: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[EncodedPart, _Mapping]]] = ..., unit: _Optional[int] = ..., carry: _Optional[int] = ...) -> None: ...

class EncodedPart(_message.Message):
    __slots__ = ("tensor", "rule")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    tensor: Tensor
    rule: Rule
    def __init__(self, tensor: _Optional[_Union[Tensor, _Mapping]] = ..., rule: _Optional[_Union[Rule, _Mapping]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("id", "encoder", "lo", "hi", "values")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    LO_FIELD_NUMBER: _ClassVar[int]
    HI_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    id: int
    encoder: int
    lo: int
    hi: int
    values: bytes
    def __init__(self, id: _Optional[int] = ..., encoder: _Optional[int] = ..., lo: _Optional[int] = ..., hi: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("id", "outputs", "carry", "non_finite")
    ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    CARRY_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_FIELD_NUMBER: _ClassVar[int]
    id: int
    outputs: _containers.RepeatedScalarFieldContainer[bytes]
    carry: bytes
    non_finite: NonFinite
    def __init__(self, id: _Optional[int] = ..., outputs: _Optional[_Iterable[bytes]] = ..., carry: _Optional[bytes] = ..., non_finite: _Optional[_Union[NonFinite, _Mapping]] = ...) -> None: ...

class NonFinite(_message.Message):
    __slots__ = ("index", "what")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    index: int
    what: str
    def __init__(self, index: _Optional[int] = ..., what: _Optional[str] = ...) -> None: ...

class SchemeServiceFinishRequest(_message.Message):
    __slots__ = ("encoder", "carry")
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    CARRY_FIELD_NUMBER: _ClassVar[int]
    encoder: int
    carry: bytes
    def __init__(self, encoder: _Optional[int] = ..., carry: _Optional[bytes] = ...) -> None: ...

class SchemeServiceFinishResponse(_message.Message):
    __slots__ = ("want", "piece")
    WANT_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    want: CarryWant
    piece: FinishedPiece
    def __init__(self, want: _Optional[_Union[CarryWant, _Mapping]] = ..., piece: _Optional[_Union[FinishedPiece, _Mapping]] = ...) -> None: ...

class CarryWant(_message.Message):
    __slots__ = ("index", "count")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class FinishedPiece(_message.Message):
    __slots__ = ("part", "offset", "data")
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    part: int
    offset: int
    data: bytes
    def __init__(self, part: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ConfigRequest(_message.Message):
    __slots__ = ("scheme", "spec", "loader_chooses", "skip")
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LOADER_CHOOSES_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    scheme: str
    spec: Spec
    loader_chooses: bool
    skip: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, scheme: _Optional[str] = ..., spec: _Optional[_Union[Spec, _Mapping]] = ..., loader_chooses: _Optional[bool] = ..., skip: _Optional[_Iterable[str]] = ...) -> None: ...

class ConfigResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...
