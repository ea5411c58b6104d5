// Package ggmltest has small models, and what llama-quantize makes of them in every file type, for tests of what writes
// GGUF.
package ggmltest

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"strconv"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Model is a model as a GGUF file has it before it is quantised.
type Model struct {
	Name    string
	Tensors []Tensor
	Known   ggml.Model
	// Order has the names of the tensors, and Keys those of the keys, in the order of the files of llama-quantize.
	Order, Keys []string

	keys    [][3]jsontext.Value
	digest  string
	files   map[string]jsontext.Value
	digests map[string]map[string]string
}

// Tensor is one of a model: F32, F16 or BF16.
type Tensor struct {
	ggml.Tensor
	Type ggml.Type
	seed uint64
}

// Read reads fixtures/ggml/quantized.json.gz, which fixtures/generate/gguf_quantized.py has made.
func Read(t testing.TB, path string) []Model {
	file, err := os.Open(path)
	require.NoError(t, err)
	defer file.Close()
	unzipped, err := gzip.NewReader(file)
	require.NoError(t, err)
	var stored []struct {
		Name    string              `json:"name"`
		Keys    [][3]jsontext.Value `json:"keys"`
		Tensors []struct {
			Name  string       `json:"name"`
			Shape tensor.Shape `json:"shape"`
			Seed  uint64       `json:"seed"`
			Type  ggml.Type    `json:"type"`
		} `json:"tensors"`
		Digest  string                       `json:"digest"`
		Order   []string                     `json:"order"`
		After   []string                     `json:"after"`
		Files   map[string]jsontext.Value    `json:"files"`
		Digests map[string]map[string]string `json:"digests"`
	}
	require.NoError(t, json.UnmarshalRead(unzipped, &stored))
	models := make([]Model, len(stored))
	for i, s := range stored {
		m := Model{Name: s.Name, Order: s.Order, Keys: s.After, keys: s.Keys, digest: s.Digest, files: s.Files,
			digests: s.Digests}
		for _, x := range s.Tensors {
			m.Tensors = append(m.Tensors, Tensor{ggml.Tensor{Name: x.Name, Shape: x.Shape}, x.Type, x.Seed})
		}
		require.NoError(t, json.Unmarshal(s.Keys[0][2], &m.Known.Architecture))
		numbers := map[string]*int{"block_count": &m.Known.Blocks, "attention.head_count": &m.Known.Heads,
			"attention.head_count_kv": &m.Known.KVHeads, "expert_count": &m.Known.Experts}
		for _, k := range s.Keys {
			for name, n := range numbers {
				if text(k[0]) == m.Known.Architecture+"."+name {
					require.NoError(t, json.Unmarshal(k[2], n))
				}
			}
		}
		models[i] = m
	}
	return models
}

// Bytes makes the file: keys, tensors and data as gguf-py writes them, byte for byte.
func (m *Model) Bytes(t testing.TB) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(le.AppendUint32([]byte("GGUF"), 3), uint64(len(m.Tensors)))
	b = le.AppendUint64(b, uint64(len(m.keys)))
	str := func(s string) { b = append(le.AppendUint64(b, uint64(len(s))), s...) }
	for _, k := range m.keys {
		str(text(k[0]))
		switch kind := text(k[1]); kind {
		case "u32":
			b = le.AppendUint32(le.AppendUint32(b, 4), uint32(number(t, k[2])))
		case "f32":
			b = le.AppendUint32(le.AppendUint32(b, 6), math.Float32bits(float32(number(t, k[2]))))
		case "str":
			b = le.AppendUint32(b, 8)
			str(text(k[2]))
		case "[str]", "[i32]":
			var all []jsontext.Value
			require.NoError(t, json.Unmarshal(k[2], &all))
			b = le.AppendUint32(b, 9)
			b = le.AppendUint32(b, map[string]uint32{"[str]": 8, "[i32]": 5}[kind])
			b = le.AppendUint64(b, uint64(len(all)))
			for _, v := range all {
				if kind == "[str]" {
					str(text(v))
				} else {
					b = le.AppendUint32(b, uint32(int32(number(t, v))))
				}
			}
		default:
			t.Fatalf("a key of type %q", kind)
		}
	}
	offset := 0
	for i := range m.Tensors {
		x := &m.Tensors[i]
		str(x.Name)
		b = le.AppendUint32(b, uint32(len(x.Shape)))
		for d := len(x.Shape) - 1; d >= 0; d-- {
			b = le.AppendUint64(b, uint64(x.Shape[d]))
		}
		b = le.AppendUint64(le.AppendUint32(b, uint32(x.Type)), uint64(offset))
		offset += (x.elements()*x.size() + 31) / 32 * 32
	}
	b = append(b, make([]byte, (32-len(b)%32)%32)...)
	for i := range m.Tensors {
		b = m.Tensors[i].append(b)
		b = append(b, make([]byte, (32-len(b)%32)%32)...)
	}
	require.Equal(t, m.digest, fmt.Sprintf("%x", sha256.Sum256(b)), "%s is not the file that was quantised", m.Name)
	return b
}

func text(v jsontext.Value) (s string) {
	if json.Unmarshal(v, &s) != nil {
		return ""
	}
	return s
}

func number(t testing.TB, v jsontext.Value) (x float64) {
	require.NoError(t, json.Unmarshal(v, &x))
	return x
}

// mixed is splitmix64.
func mixed(x uint64) uint64 {
	x *= 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (x *Tensor) elements() int {
	n := 1
	for _, d := range x.Shape {
		n *= int(d)
	}
	return n
}

// values are the elements before they are stored in the tensor's type: about normal, now and then 32 of 0.
func (x *Tensor) values() []float32 {
	values, at := make([]float32, x.elements()), x.seed<<40
	for i := range values {
		if mixed(uint64(i)>>5+1<<39+at)%100 == 0 {
			continue
		}
		b := mixed(uint64(i) + at)
		sum := int32(b&0xffff) + int32(b>>16&0xffff) + int32(b>>32&0xffff) + int32(b>>48)
		values[i] = float32(sum-131070) / (1 << 21)
	}
	return values
}

func (x *Tensor) size() int {
	if x.Type == ggml.F32 {
		return 4
	}
	return 2
}

func (x *Tensor) append(b []byte) []byte {
	for _, v := range x.values() {
		switch x.Type {
		case ggml.F16:
			b = binary.LittleEndian.AppendUint16(b, kernels.ToHalf(v))
		case ggml.BF16:
			b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(v)>>16)) // cut off
		default:
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
		}
	}
	return b
}

// Refused says what llama-quantize refuses a file type with, "" if it makes it.
func (m *Model) Refused(f ggml.FileType) string { return text(m.files[strconv.Itoa(int(f))]) }

// Check holds the tensors of a file of a file type against those of llama-quantize.
func (m *Model) Check(t testing.TB, f ggml.FileType, read func(name string) (ggml.Type, []byte)) {
	var types []ggml.Type
	require.NoError(t, json.Unmarshal(m.files[strconv.Itoa(int(f))], &types))
	require.Len(t, types, len(m.Order))
	for i, name := range m.Order {
		typ, data := read(name)
		require.Equal(t, types[i], typ, "%s to %v: the type of %s", m.Name, f, name)
		sum := sha256.Sum256(data)
		require.Equal(t, m.digests[name][strconv.Itoa(int(typ))], hex.EncodeToString(sum[:8]),
			"%s to %v: %d bytes of %s, %v", m.Name, f, len(data), name, typ)
	}
}
