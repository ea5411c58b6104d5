package gguf

import (
	"fmt"
	"reflect"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// kind is a type of tensors: plain elements or blocks.
type kind struct {
	dtype    tensor.DType
	encoding tensor.Encoding
}

func plain(d tensor.DType) kind { return kind{dtype: d} }

func blocks(name string, elements, bytes int64) kind {
	return kind{encoding: tensor.Encoding{Name: name, Elements: elements, Bytes: bytes}}
}

// known reports whether the type is one that files have.
func (k kind) known() bool { return k != kind{} }

// kinds has the types by their numbers in files, as ggml.h has them in version 0.25.3. Those that are missing have been
// removed.
var kinds = [...]kind{
	0:  plain(tensor.F32),
	1:  plain(tensor.F16),
	2:  blocks("q4_0", 32, 18),
	3:  blocks("q4_1", 32, 20),
	6:  blocks("q5_0", 32, 22),
	7:  blocks("q5_1", 32, 24),
	8:  blocks("q8_0", 32, 34),
	9:  blocks("q8_1", 32, 36),
	10: blocks("q2_K", 256, 84),
	11: blocks("q3_K", 256, 110),
	12: blocks("q4_K", 256, 144),
	13: blocks("q5_K", 256, 176),
	14: blocks("q6_K", 256, 210),
	15: blocks("q8_K", 256, 292),
	16: blocks("iq2_xxs", 256, 66),
	17: blocks("iq2_xs", 256, 74),
	18: blocks("iq3_xxs", 256, 98),
	19: blocks("iq1_s", 256, 50),
	20: blocks("iq4_nl", 32, 18),
	21: blocks("iq3_s", 256, 110),
	22: blocks("iq2_s", 256, 82),
	23: blocks("iq4_xs", 256, 136),
	24: plain(tensor.I8),
	25: plain(tensor.I16),
	26: plain(tensor.I32),
	27: plain(tensor.I64),
	28: plain(tensor.F64),
	29: blocks("iq1_m", 256, 56),
	30: plain(tensor.BF16),
	34: blocks("tq1_0", 256, 54),
	35: blocks("tq2_0", 256, 66),
	39: blocks("mxfp4", 32, 17),
	40: blocks("nvfp4", 64, 36),
	41: blocks("q1_0", 128, 18),
	42: blocks("q2_0", 64, 18),
}

// numberOf finds the number of a tensor's type.
func numberOf(t tensor.Info) (uint32, error) {
	want := kind{t.DType, t.Encoding}
	for i, k := range kinds {
		if k == want && k.known() {
			return uint32(i), nil
		}
	}
	return 0, unsupportedf("found the type %s, expected one that GGUF has: F32, F16, BF16, F64, I8, I16, I32, I64 or "+
		"blocks of ggml", tensor.Quote(t.Type()))
}

// Types of values.
const (
	typeU32    = 4
	typeBool   = 7
	typeString = 8
	typeArray  = 9
)

// valueType is a type of a key's value.
type valueType struct {
	of    reflect.Type // what a formats.Pair has for it
	least int64        // bytes of the smallest value
	one   func(*source) (any, error)
	many  func(s *source, n int64) (any, error)
}

func number[T comparable](bytes int64) valueType {
	return valueType{reflect.TypeFor[T](), bytes,
		func(s *source) (any, error) {
			list, err := numbers[T](s, 1, bytes)
			if err != nil {
				return nil, err
			}
			return list[0], nil
		},
		func(s *source, n int64) (any, error) { return numbers[T](s, n, bytes) },
	}
}

// valueTypes has the types by their numbers in files; an array has no entry.
var valueTypes = [...]valueType{
	0:       number[uint8](1),
	1:       number[int8](1),
	2:       number[uint16](2),
	3:       number[int16](2),
	typeU32: number[uint32](4),
	5:       number[int32](4),
	6:       number[float32](4),
	typeBool: {reflect.TypeFor[bool](), 1,
		func(s *source) (any, error) {
			list, err := s.bools(1)
			if err != nil {
				return nil, err
			}
			return list[0], nil
		},
		func(s *source, n int64) (any, error) { return s.bools(n) },
	},
	typeString: {reflect.TypeFor[string](), lengthBytes,
		func(s *source) (any, error) { return s.string() },
		func(s *source, n int64) (any, error) { return s.strings(n) },
	},
	10: number[uint64](8),
	11: number[int64](8),
	12: number[float64](8),
}

// valueTypeOf finds the number of a value's type, of a slice that of its elements.
func valueTypeOf(value any) (number uint32, array bool, err error) {
	t := reflect.TypeOf(value)
	if t != nil && t.Kind() == reflect.Slice {
		t, array = t.Elem(), true
	}
	for i, v := range valueTypes {
		if v.of != nil && v.of == t {
			return uint32(i), array, nil
		}
	}
	return 0, false, fmt.Errorf("found a %T, expected a value that metadata have: %w", value, formats.ErrUnsupported)
}
