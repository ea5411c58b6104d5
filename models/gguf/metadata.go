package gguf

import (
	"math"
	"reflect"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Format is the name of the container whose tensors have llama.cpp's names.
const Format = "gguf"

// noArchitecture is what a file has that is no model.
const noArchitecture = "none"

// IsModel reports whether metadata are the keys of a model of some architecture, known here or not. Those of a part of
// one, such as a projector of images, are too, and those of what is wrong with them: Backward says what it is.
func IsModel(m formats.Metadata) bool {
	a := m.Get(architectureKey)
	return a != nil && a != noArchitecture && m.Get(typeKey) != "adapter"
}

// Architecture is general.architecture, "" where there is none.
func Architecture(m formats.Metadata) string {
	name, _ := m.Get(architectureKey).(string)
	return name
}

// FileType is general.file_type, false where there is none.
func FileType(m formats.Metadata) (uint32, bool) {
	n, ok := m.Get(fileTypeKey).(uint32)
	return n, ok
}

// SetFileType returns metadata with another general.file_type.
func SetFileType(m formats.Metadata, n uint32) formats.Metadata {
	return with(with(m, fileTypeKey, n), quantizationKey, uint32(2))
}

// with returns metadata with a value set.
func with(m formats.Metadata, name string, value any) formats.Metadata {
	n := append(formats.Metadata{}, m...)
	for i := range n {
		if n[i].Name == name {
			n[i].Value = value
			return n
		}
	}
	return append(n, formats.Pair{Name: name, Value: value})
}

// Count is a key that is a number of something, or of a list, as for layers that differ, the first. It is false where
// there is none.
func Count(m formats.Metadata, name string) (int, bool, error) {
	v := m.Get(name)
	if r := reflect.ValueOf(v); r.Kind() == reflect.Slice && r.Len() > 0 {
		v = r.Index(0).Interface()
	}
	if v == nil {
		return 0, false, nil
	}
	x, ok := number(v)
	if !ok || x != math.Trunc(x) || x < 0 || x > maxNumber {
		return 0, false, keyError(name, malformedf("found %v, expected a whole number of at most %d", v, maxNumber))
	}
	return int(x), true, nil
}

// DType is what the weights of a model are taken for whose file does not tell: that of the file as a whole, BF16 for
// blocks.
func DType(m formats.Metadata) tensor.DType {
	n, _ := FileType(m)
	for _, t := range []Type{F32, F16} {
		if n == t.FileType && m.Get(fileTypeKey) != nil {
			return t.DType
		}
	}
	return tensor.BF16
}

// HasTokenizer reports whether metadata have the keys of a tokenizer.
func HasTokenizer(m formats.Metadata) bool {
	model := m.Get("tokenizer.ggml.model")
	return model != "none" && model != "no_vocab" && (model != nil || m.Get(tokensKey) != nil)
}
