package formats

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/tensor"
)

// Metadata are the named values that a container stores with its tensors, in its order. No name is there twice.
type Metadata []Pair

// Pair is a named value: a string, a bool, an integer of 8 to 64 bits with or without a sign, a float32 or float64,
// or a slice of one of these. A format that has strings alone writes the Text of others.
type Pair struct {
	Name  string
	Value any
}

// Texts are the pairs of a map, in the order of their names; those of nil are nil.
func Texts(m map[string]string) Metadata {
	if m == nil {
		return nil
	}
	pairs := make(Metadata, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		pairs = append(pairs, Pair{name, m[name]})
	}
	return pairs
}

// Get finds a value by its name, nil where there is none.
func (m Metadata) Get(name string) any {
	for _, p := range m {
		if p.Name == name {
			return p.Value
		}
	}
	return nil
}

// Check refuses a name that is there twice, and a value of another type than those of a Pair.
func (m Metadata) Check() error {
	seen := make(map[string]struct{}, len(m))
	for _, p := range m {
		if _, ok := seen[p.Name]; ok {
			return fmt.Errorf("metadata %s: found it twice, expected it once", tensor.Quote(p.Name))
		}
		seen[p.Name] = struct{}{}
		if _, ok := text(p.Value); !ok {
			return fmt.Errorf("metadata %s: found a %T, expected a string, a bool, a number or a slice of these",
				tensor.Quote(p.Name), p.Value)
		}
	}
	return nil
}

// Text is the value as a format without types writes it: a string as it is, all else as JSON does, and a number that
// JSON does not have as NaN, +Inf or -Inf.
func (p Pair) Text() string {
	s, _ := text(p.Value)
	return s
}

// text reports whether the value has a type that a Pair may have.
func text(value any) (string, bool) {
	switch v := value.(type) {
	case string:
		return v, true
	case []string:
		return texts(v, func(s string) string { b, _ := jsontext.AppendQuote(nil, s); return string(b) }), true
	case bool:
		return strconv.FormatBool(v), true
	case []bool:
		return texts(v, strconv.FormatBool), true
	case float32:
		return float(v), true
	case []float32:
		return texts(v, float[float32]), true
	case float64:
		return float(v), true
	case []float64:
		return texts(v, float[float64]), true
	case int8, int16, int32, int64, uint8, uint16, uint32, uint64:
		return fmt.Sprint(v), true
	case []int8:
		return texts(v, decimal[int8]), true
	case []int16:
		return texts(v, decimal[int16]), true
	case []int32:
		return texts(v, decimal[int32]), true
	case []int64:
		return texts(v, decimal[int64]), true
	case []uint8:
		return texts(v, decimal[uint8]), true
	case []uint16:
		return texts(v, decimal[uint16]), true
	case []uint32:
		return texts(v, decimal[uint32]), true
	case []uint64:
		return texts(v, decimal[uint64]), true
	}
	return "", false
}

func decimal[T any](v T) string { return fmt.Sprint(v) }

func float[T float32 | float64](v T) string {
	bits := 64
	if _, ok := any(v).(float32); ok {
		bits = 32
	}
	return strconv.FormatFloat(float64(v), 'g', -1, bits)
}

func texts[T any](list []T, text func(T) string) string {
	var b strings.Builder
	b.WriteByte('[')
	for i, v := range list {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(text(v))
	}
	b.WriteByte(']')
	return b.String()
}
