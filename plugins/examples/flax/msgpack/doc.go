// Package msgpack reads and lays out files of flax.serialization: a tree of maps whose leaves are arrays, in msgpack.
// It never touches the arrays' data: Read says where in the file it lies, LayOut which bytes stand around it.
//
// An array is the extension 1, whose bytes are msgpack again: an array of its shape, the name of its type in numpy, and
// its elements, row-major. A numpy scalar is the same as extension 3. An array of more than 1 GiB is a map of its
// shape and of flat pieces, which flax calls chunked.
package msgpack

import (
	"fmt"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

const (
	extensionArray   = 1
	extensionComplex = 2
	extensionScalar  = 3

	// The keys of an array that is chunked.
	chunkedKey = "__msgpack_chunked_array__"
	shapeKey   = "shape"
	chunksKey  = "chunks"
)

// Limits of what is read, and of what is laid out.
const (
	// maxDepth is of maps in maps. flax itself writes and reads 331, where Python's stack ends.
	maxDepth = 256
	// maxRank is numpy's.
	maxRank = 64
	// maxItem is of a key or a string in bytes.
	maxItem = 1 << 20
	// maxValues is of maps, leaves and chunks in a file.
	maxValues = 1 << 20
	// maxText is of the names of all tensors and of all metadata, in bytes: a key of a map is in the name of everything in
	// the map, so that they can be far more than the file has.
	maxText = 1 << 26
)

// dtypes has the name in numpy, with the types of ml_dtypes that jax has. Types of less than a byte have one in numpy,
// and are not what lorakit calls by the name.
var dtypes = [...]struct {
	dtype tensor.DType
	name  string
}{
	{tensor.F64, "float64"},
	{tensor.F32, "float32"},
	{tensor.F16, "float16"},
	{tensor.BF16, "bfloat16"},
	{tensor.F8E5M2, "float8_e5m2"},
	{tensor.F8E4M3, "float8_e4m3fn"},
	{tensor.F8E5M2FNUZ, "float8_e5m2fnuz"},
	{tensor.F8E4M3FNUZ, "float8_e4m3fnuz"},
	{tensor.F8E8M0, "float8_e8m0fnu"},
	{tensor.Bool, "bool"},
	{tensor.I64, "int64"},
	{tensor.I32, "int32"},
	{tensor.I16, "int16"},
	{tensor.I8, "int8"},
	{tensor.U64, "uint64"},
	{tensor.U32, "uint32"},
	{tensor.U16, "uint16"},
	{tensor.U8, "uint8"},
	{tensor.C64, "complex64"},
}

// DTypes are the types that an array can have.
func DTypes() []tensor.DType {
	var all []tensor.DType
	for _, d := range dtypes {
		all = append(all, d.dtype)
	}
	return all
}

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrMalformed)...)
}

func limitf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrLimit)...)
}

func unsupportedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrUnsupported)...)
}
