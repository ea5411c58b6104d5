package tensor

import (
	"fmt"
	"strings"
)

// DType is the element type of a stored tensor.
type DType uint8

// The element types of the safetensors format, and of checkpoints in general. The zero DType is invalid.
const (
	F64 DType = iota + 1
	F32
	F16  // IEEE 754 binary16
	BF16 // the upper half of an F32
	F8E5M2
	F8E4M3
	F8E5M2FNUZ
	F8E4M3FNUZ
	F8E8M0 // a power of two: the scale of the MX formats
	F6E3M2 // four elements in three bytes
	F6E2M3
	F4 // E2M1, two elements in a byte
	Bool
	I64
	I32
	I16
	I8
	U64
	U32
	U16
	U8
	C64 // two F32: real, imaginary
)

// kinds has the name in a file (that of safetensors), the width in bits and the name in a config.json, where it has
// one.
var kinds = [...]struct {
	name, torch string
	bits        int64
}{
	F64:        {"F64", "float64", 64},
	F32:        {"F32", "float32", 32},
	F16:        {"F16", "float16", 16},
	BF16:       {"BF16", "bfloat16", 16},
	F8E5M2:     {"F8_E5M2", "float8_e5m2", 8},
	F8E4M3:     {"F8_E4M3", "float8_e4m3fn", 8},
	F8E5M2FNUZ: {"F8_E5M2FNUZ", "float8_e5m2fnuz", 8},
	F8E4M3FNUZ: {"F8_E4M3FNUZ", "float8_e4m3fnuz", 8},
	F8E8M0:     {"F8_E8M0", "float8_e8m0fnu", 8},
	F6E3M2:     {"F6_E3M2", "", 6},
	F6E2M3:     {"F6_E2M3", "", 6},
	F4:         {"F4", "float4_e2m1fn_x2", 4},
	Bool:       {"BOOL", "bool", 8},
	I64:        {"I64", "int64", 64},
	I32:        {"I32", "int32", 32},
	I16:        {"I16", "int16", 16},
	I8:         {"I8", "int8", 8},
	U64:        {"U64", "uint64", 64},
	U32:        {"U32", "uint32", 32},
	U16:        {"U16", "uint16", 16},
	U8:         {"U8", "uint8", 8},
	C64:        {"C64", "complex64", 64},
}

// Valid reports whether d is one of the declared types.
func (d DType) Valid() bool { return d > 0 && int(d) < len(kinds) }

// Bits returns the width of one element in bits: 4 and 6 for the packed kinds, else a multiple of 8.
func (d DType) Bits() int64 {
	if !d.Valid() {
		return 0
	}
	return kinds[d].bits
}

// String returns the type's name in a safetensors header, such as "BF16".
func (d DType) String() string {
	if !d.Valid() {
		return fmt.Sprintf("DType(%d)", uint8(d))
	}
	return kinds[d].name
}

// Torch returns the type's name in a config.json and in PyTorch, such as "bfloat16", or "" where it has none.
func (d DType) Torch() string {
	if !d.Valid() {
		return ""
	}
	return kinds[d].torch
}

// Float reports whether d is one of F32, F16 and BF16: the types that weights are computed with.
func (d DType) Float() bool { return d == F32 || d == F16 || d == BF16 }

// Numeric reports whether elements of d are numbers that lorakit computes with: F64, or a Float.
func (d DType) Numeric() bool { return d.Float() || d == F64 }

// Integer reports whether d holds whole numbers or booleans.
func (d DType) Integer() bool { return d >= Bool && d <= U8 }

// ParseDType finds a type by its name in a safetensors header, or by its name in PyTorch. An unknown name is an error
// that lists what is known.
func ParseDType(s string) (DType, error) {
	for d := F64; int(d) < len(kinds); d++ {
		if kinds[d].name == s || kinds[d].torch != "" && kinds[d].torch == s {
			return d, nil
		}
	}
	names := make([]string, 0, len(kinds))
	for d := F64; int(d) < len(kinds); d++ {
		names = append(names, kinds[d].name)
	}
	return 0, fmt.Errorf("unknown dtype %q; known are %s", s, strings.Join(names, ", "))
}

// MarshalText writes the type as String does.
func (d DType) MarshalText() ([]byte, error) {
	if !d.Valid() {
		return nil, fmt.Errorf("invalid dtype %d", uint8(d))
	}
	return []byte(kinds[d].name), nil
}

// UnmarshalText reads what MarshalText writes.
func (d *DType) UnmarshalText(b []byte) error {
	v, err := ParseDType(string(b))
	if err != nil {
		return err
	}
	*d = v
	return nil
}
