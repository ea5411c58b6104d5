package columns_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// memory is a checkpoint in memory.
type memory struct {
	Infos []tensor.Info
	Data  map[string][]byte
	JSON  string // config.json
}

// put adds a tensor, or replaces it.
func (m *memory) put(info tensor.Info, data []byte) {
	m.drop(info.Name)
	m.Infos = append(m.Infos, info)
	m.Data[info.Name] = data
}

// drop removes a tensor.
func (m *memory) drop(name string) {
	m.Infos = slices.DeleteFunc(m.Infos, func(t tensor.Info) bool { return t.Name == name })
	delete(m.Data, name)
}

// Tensors lists all of them.
func (m *memory) Tensors() []tensor.Info { return m.Infos }

// DType is that of the checkpoint.
func (m *memory) DType() tensor.DType { return tensor.BF16 }

// Config is its config.json.
func (m *memory) Config() []byte { return []byte(m.JSON) }

// Lookup finds a tensor.
func (m *memory) Lookup(name string) (tensor.Info, bool) {
	i := slices.IndexFunc(m.Infos, func(t tensor.Info) bool { return t.Name == name })
	if i < 0 {
		return tensor.Info{}, false
	}
	return m.Infos[i], true
}

// Read fills p.
func (m *memory) Read(name string, p []byte, off int64) error {
	data := m.Data[name]
	if off < 0 || off > int64(len(data)) || int64(len(p)) > int64(len(data))-off {
		return fmt.Errorf("%s: %d bytes at %d of %d: %w", name, len(p), off, len(data), io.ErrUnexpectedEOF)
	}
	copy(p, data[off:])
	return nil
}

// openFixture reads a file of fixtures/columns: the tensors that a peer has packed, and what it decodes of each module.
func openFixture(t testing.TB, path string) (m *memory, expected map[string][]byte) {
	c, err := checkpoint.Open(t.Context(), path)
	require.NoError(t, err)
	defer c.Close()
	m, expected = &memory{Data: map[string][]byte{}}, map[string][]byte{}
	for _, p := range c.Metadata() {
		if p.Name == "config" {
			m.JSON = p.Text()
		}
	}
	for _, w := range c.Weights {
		data := make([]byte, w.Parts[0].Bytes)
		require.NoError(t, checkpoint.ReadPart(&w.Parts[0], data, 0))
		if module, ok := strings.CutSuffix(w.Name, ".expected"); ok {
			expected[module+".weight"] = data
			continue
		}
		m.put(w.Info, data)
	}
	return m, expected
}

// decode decodes the elements [lo, hi) of a weight.
func (m *memory) decode(d quant.Decoder, lo, hi int64) ([]byte, error) {
	var in [][]byte
	for _, x := range d.Inputs(nil, lo, hi) {
		var b []byte
		for k := range max(x.Count, 1) {
			p := make([]byte, x.Length)
			if err := m.Read(d.Parts()[x.Part], p, x.Offset+k*x.Stride); err != nil {
				return nil, err
			}
			b = append(b, p...)
		}
		in = append(in, b)
	}
	dst := make([]byte, (hi-lo)*d.Values().Bits()/8)
	return dst, d.Decode(dst, lo, hi, in)
}

// golden holds what a scheme decodes of the files of a peer against what the peer does, in tiles of several sizes.
func golden(t *testing.T, s quant.Scheme, files []string) {
	require.NotEmpty(t, files)
	for _, path := range files {
		m, expected := openFixture(t, path)
		found, err := s.Find(t.Context(), m)
		require.NoError(t, err, path)
		require.Len(t, found, len(expected))
		for _, d := range found {
			want, info := expected[d.Info().Name], d.Info()
			require.Equal(t, tensor.BF16, info.DType)
			require.Equal(t, tensor.F16, d.Values())
			require.Len(t, want, int(2*info.Count()))
			for _, rows := range []int64{1, 3, 64, 70, info.Shape[0]} {
				for lo := int64(0); lo < info.Count(); lo += rows * d.Unit() {
					hi := min(lo+rows*d.Unit(), info.Count())
					got, err := m.decode(d, lo, hi)
					require.NoError(t, err)
					require.Equal(t, want[2*lo:2*hi], got, "%s: %s: %d rows at a time, from %d", path, info.Name, rows, lo)
				}
			}
		}
	}
}

// fuzz finds and decodes modules whose parts have these shapes, of some hundred elements at most.
func fuzz(t *testing.T, s quant.Scheme, config map[string]any, shapes map[string][]uint8, data []byte) {
	object, err := json.Marshal(map[string]any{"quantization_config": config})
	require.NoError(t, err)
	m := &memory{Data: map[string][]byte{}, JSON: string(object)}
	for name, b := range shapes {
		if len(b) == 0 {
			continue
		}
		info := tensor.Info{Name: "m." + name, DType: tensor.I32}
		if b[0] > 0 {
			info.DType = tensor.DType(b[0] % 24)
		}
		for _, n := range b[1:min(len(b), 4)] {
			info.Shape = append(info.Shape, int64(n%96))
		}
		size, err := info.Size()
		if err != nil || !info.DType.Valid() {
			continue
		}
		bytes := make([]byte, size)
		for i := 0; i+4 <= len(bytes) && len(data) > 4; i += 4 {
			binary.LittleEndian.PutUint32(bytes[i:], binary.LittleEndian.Uint32(data[i%(len(data)-4):]))
		}
		m.put(info, bytes)
	}
	found, err := s.Find(t.Context(), m)
	if err != nil {
		require.NotContains(t, err.Error(), "\n")
		return
	}
	for _, d := range found {
		for _, r := range []int64{0, d.Info().Shape[0] / 2} {
			_, err := m.decode(d, r*d.Unit(), d.Info().Count())
			if err != nil {
				require.ErrorIs(t, err, quant.ErrMalformed)
			}
		}
	}
}
