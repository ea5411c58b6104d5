package columns_test

import (
	"encoding/binary"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// openFixture reads a file of fixtures/columns: the tensors that a peer has packed, and what it decodes of each module.
func openFixture(t testing.TB, path string) (m *quanttest.Stored, expected map[string][]byte) {
	c, err := checkpoint.Open(t.Context(), path)
	require.NoError(t, err)
	defer c.Close()
	m, expected = &quanttest.Stored{Data: map[string][]byte{}, Model: tensor.BF16}, map[string][]byte{}
	for _, p := range c.Metadata() {
		if p.Name == "config" {
			m.JSON = []byte(p.Text())
		}
	}
	for _, w := range c.Weights {
		data := make([]byte, w.Parts[0].Bytes)
		require.NoError(t, checkpoint.ReadPart(&w.Parts[0], data, 0))
		if module, ok := strings.CutSuffix(w.Name, ".expected"); ok {
			expected[module+".weight"] = data
			continue
		}
		m.Add(w.Info, data)
	}
	return m, expected
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
					got, err := quanttest.Tile(m, d, lo, hi)
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
	m := &quanttest.Stored{Data: map[string][]byte{}, Model: tensor.BF16, JSON: object}
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
		m.Add(info, bytes)
	}
	found, err := s.Find(t.Context(), m)
	if err != nil {
		require.NotContains(t, err.Error(), "\n")
		return
	}
	for _, d := range found {
		for _, r := range []int64{0, d.Info().Shape[0] / 2} {
			_, err := quanttest.Tile(m, d, r*d.Unit(), d.Info().Count())
			if err != nil {
				require.ErrorIs(t, err, quant.ErrMalformed)
			}
		}
	}
}
