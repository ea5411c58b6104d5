package lora

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/tensor"
)

// values is a tensor of float32, or of int64 where Integers are set.
type values struct {
	shape    []int64
	floats   []float32
	integers []int64
}

// adapterOf writes a PEFT folder and opens it.
func adapterOf(t *testing.T, config string, tensors map[string]values) *Adapter {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, configName), []byte(config), 0o644))
	header := map[string]any{}
	var data []byte
	for _, name := range slices.Sorted(maps.Keys(tensors)) {
		v, dtype, start := tensors[name], "F32", len(data)
		for _, x := range v.floats {
			data = binary.LittleEndian.AppendUint32(data, math.Float32bits(x))
		}
		for _, x := range v.integers {
			data, dtype = binary.LittleEndian.AppendUint64(data, uint64(x)), "I64"
		}
		header["base_model.model."+name] = map[string]any{"dtype": dtype, "shape": v.shape,
			"data_offsets": []int{start, len(data)}}
	}
	h, err := json.Marshal(header)
	require.NoError(t, err)
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, adapterFiles[0]), append(b, data...), 0o644))
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { a.Close() })
	return a
}

func TestSpectrumByHand(t *testing.T) {
	// B·A has the singular values 3·2 and 1·1, and the scaling is -4 / 2.
	a := adapterOf(t, `{"peft_type": "LORA", "r": 2, "lora_alpha": -4, "lora_bias": true}`, map[string]values{
		"x.q.lora_A.weight":        {shape: []int64{2, 3}, floats: []float32{0, 2, 0, 0, 0, 1}},
		"x.q.lora_B.weight":        {shape: []int64{4, 2}, floats: []float32{0, 1, 3, 0, 0, 0, 0, 0}},
		"x.q.lora_B.bias":          {shape: []int64{4}, floats: []float32{1, 2, 2, 0}},
		"x.head.weight":            {shape: []int64{2, 2}, floats: []float32{2, 4, 5, 6}},
		"x.norm.num_batches":       {shape: []int64{}, integers: []int64{7}},
		"x.z.lora_A.weight":        {shape: []int64{2, 3}, floats: []float32{1, 2, 3, 4, 5, 6}},
		"x.z.lora_B.weight":        {shape: []int64{4, 2}, floats: make([]float32, 8)},
		"x.z.lora_B.bias":          {shape: []int64{4}, floats: make([]float32, 4)},
		"x.table.lora_embedding_A": {shape: []int64{2, 5}, floats: []float32{1, 0, 0, 0, 0, 0, 1, 0, 0, 0}},
		"x.table.lora_embedding_B": {shape: []int64{3, 2}, floats: []float32{1, 0, 0, 1, 0, 0}},
	})
	type want struct {
		norm   float64
		values []float64
		shape  tensor.Shape
	}
	found := map[string]want{}
	for _, m := range a.Modules {
		s, err := new(Spectrograph).Spectrum(a, m)
		require.NoError(t, err, m)
		assert.False(t, s.NeedsBase)
		c := m.Contents()
		for i := range s.Values {
			s.Values[i] = math.Round(s.Values[i]*1e9) / 1e9
		}
		if s.Norm != s.Norm {
			assert.Equal(t, "x.norm.num_batches", m.String())
			s.Norm = -1
		}
		found[m.String()] = want{math.Round(s.Norm*1e9) / 1e9, s.Values, c.Shape}
	}
	assert.Equal(t, map[string]want{
		"x.q":                {math.Round(2*math.Sqrt(37)*1e9) / 1e9, []float64{12, 2}, tensor.Shape{4, 3}},
		"x.q.bias":           {6, nil, tensor.Shape{4}},
		"x.head":             {9, nil, tensor.Shape{2, 2}},
		"x.norm.num_batches": {-1, nil, tensor.Shape{}},
		"x.z":                {0, []float64{}, tensor.Shape{4, 3}},
		"x.z.bias":           {0, nil, tensor.Shape{4}},
		"x.table":            {math.Round(2*math.Sqrt2*1e9) / 1e9, []float64{2, 2}, tensor.Shape{5, 3}},
	}, found)
	trained, bytes := a.Size()
	assert.Equal(t, int64(14+4+4+1+14+4+16), trained)
	assert.Equal(t, 4*trained+4, bytes) // one of eight bytes
}

func TestSpectrumRefuses(t *testing.T) {
	nan := float32(math.NaN())
	for name, c := range map[string]struct {
		config  string
		tensors map[string]values
		says    []string
	}{
		"NaN in A": {plainConfig, map[string]values{
			"x.q.lora_A.weight": {shape: []int64{2, 1}, floats: []float32{1, nan}},
			"x.q.lora_B.weight": {shape: []int64{1, 2}, floats: []float32{1, 1}},
		}, []string{"lora_A.weight", "element 1", "finite"}},
		"an infinity in what is replaced": {plainConfig, map[string]values{
			"x.head.weight": {shape: []int64{3}, floats: []float32{1, 2, float32(math.Inf(1))}},
		}, []string{"x.head.weight", "element 2", "finite"}},
		"no columns": {plainConfig, map[string]values{
			"x.q.lora_A.weight": {shape: []int64{2, 0}},
			"x.q.lora_B.weight": {shape: []int64{1, 2}, floats: []float32{1, 1}},
		}, []string{"x.q"}},
		"a scaling beyond all": {`{"peft_type": "LORA", "r": 1, "lora_alpha": 1e308}`, map[string]values{
			"x.q.lora_A.weight": {shape: []int64{1, 1}, floats: []float32{1e20}},
			"x.q.lora_B.weight": {shape: []int64{1, 1}, floats: []float32{1}},
		}, []string{"x.q", "1e+308", "finite"}},
	} {
		t.Run(name, func(t *testing.T) {
			a := adapterOf(t, c.config, c.tensors)
			_, err := new(Spectrograph).Spectrum(a, a.Modules[0])
			require.ErrorContains(t, err, a.Path)
			for _, s := range c.says {
				assert.ErrorContains(t, err, s)
			}
		})
	}
}

// TestSpectrumOfPieces: the norm of a tensor of several pieces is that of all of it.
func TestSpectrumOfPieces(t *testing.T) {
	v := values{shape: []int64{3, 50001}, floats: make([]float32, 150003)}
	var sum float64
	for i := range v.floats {
		v.floats[i] = float32(i%7) - 3
		sum += float64(v.floats[i]) * float64(v.floats[i])
	}
	a := adapterOf(t, plainConfig, map[string]values{"x.head.weight": v})
	s, err := new(Spectrograph).Spectrum(a, a.Modules[0])
	require.NoError(t, err)
	assert.InDelta(t, math.Sqrt(sum), s.Norm, 1e-9)
}
