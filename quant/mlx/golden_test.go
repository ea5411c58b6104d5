package mlx_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/mlx"
	"github.com/lorakit/lorakit/tensor"
)

// file are the tensors of a safetensors file of MLX.
func file(t testing.TB, path string) map[string]stored {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	size := binary.LittleEndian.Uint64(b)
	var header map[string]struct {
		DType   string
		Shape   tensor.Shape
		Offsets [2]int64 `json:"data_offsets"`
	}
	require.NoError(t, json.Unmarshal(b[8:8+size], &header))
	delete(header, "__metadata__")
	all := map[string]stored{}
	for name, h := range header {
		d, err := tensor.ParseDType(h.DType)
		require.NoError(t, err)
		all[name] = stored{tensor.Info{Name: name, DType: d, Shape: h.Shape}, b[8+size:][h.Offsets[0]:h.Offsets[1]]}
	}
	return all
}

// golden is a case of the fixture: what MLX has made of a weight, or has read.
type golden struct {
	mode                                   string
	bits, group                            int
	plain, weight, scales, biases, decoded stored
}

func goldens(t testing.TB) map[string]*golden {
	cases := map[string]*golden{}
	for name, x := range file(t, "../../fixtures/mlx/vectors.safetensors") {
		at := strings.LastIndexByte(name, '.')
		c := cases[name[:at]]
		if c == nil {
			c = &golden{}
			_, err := fmt.Sscanf(strings.ReplaceAll(name[:at], "-", " "), "%s %d %d", &c.mode, &c.bits, &c.group)
			require.NoError(t, err)
			cases[name[:at]] = c
		}
		x.Name = "m" + name[at:]
		*map[string]*stored{"plain": &c.plain, "weight": &c.weight, "scales": &c.scales, "biases": &c.biases,
			"decoded": &c.decoded}[name[at+1:]] = x
	}
	require.Len(t, cases, 3*(6*3+3)+3*(7+3))
	return cases
}

// spec is how the scheme names what a case is in.
func (c *golden) spec(t testing.TB) quant.Spec {
	typ := "mlx-" + c.mode
	if c.mode == "affine" {
		typ = fmt.Sprintf("mlx%d", c.bits)
	}
	s, err := mlx.Scheme{}.Spec(typ, quant.Params{{Name: "block_size", Value: int64(c.group)}})
	require.NoError(t, err)
	return s
}

// checkpoint is the case as a checkpoint.
func (c *golden) checkpoint(dtype tensor.DType) *memory {
	m := newMemory(dtype, fmt.Sprintf(`{"quantization": {"group_size": %d, "bits": %d, "mode": %q}}`, c.group,
		c.bits, c.mode))
	for _, x := range []stored{c.weight, c.scales, c.biases} {
		if x.Name != "" {
			m.put(x.Name, x.DType, x.Shape, x.data)
		}
	}
	return m
}

// TestWritesAsMLX: the same bytes, whatever the tiles.
func TestWritesAsMLX(t *testing.T) {
	n := 0
	for name, c := range goldens(t) {
		if c.plain.Name == "" {
			continue
		}
		n++
		info := c.plain.Info
		info.Name = "m.weight"
		for _, units := range []int64{1 << 30, 1, 3, 80} {
			got, err := encode(c.spec(t), info, c.plain.data, units)
			require.NoError(t, err, name)
			for i, want := range []stored{c.weight, c.scales, c.biases} {
				if want.Name == "" {
					require.Len(t, got.Infos, i, name)
					continue
				}
				assert.Equal(t, want.Info, got.Infos[i], name)
				require.Equal(t, want.data, got.Data[got.Infos[i].Name], "%s: %s", name, want.Name)
			}
		}
	}
	assert.Equal(t, 63, n)
}

// TestReadsAsMLX: the same numbers, whatever the tiles; words and scales of any bits among them.
func TestReadsAsMLX(t *testing.T) {
	for name, c := range goldens(t) {
		m := c.checkpoint(c.decoded.DType)
		d := m.only(t)
		assert.Equal(t, tensor.Info{Name: "m.weight", DType: c.decoded.DType, Shape: c.decoded.Shape}, d.Info(), name)
		assert.Equal(t, c.spec(t), d.Spec(), name)
		for _, units := range []int64{1 << 30, 1, 3, 80} {
			got := decode(t, m, d, units)
			equalNumbers(t, c.decoded, got, name)
		}
	}
}

// equalNumbers takes a NaN for any other: those of zero times infinity have other bits in MLX.
func equalNumbers(t *testing.T, want stored, got []byte, name string) {
	t.Helper()
	if bytes.Equal(want.data, got) {
		return
	}
	x, y := make([]float32, want.Count()), make([]float32, want.Count())
	require.NoError(t, tensor.ToFloats(x, want.data, want.DType))
	require.NoError(t, tensor.ToFloats(y, got, want.DType))
	for i := range x {
		if math.Float32bits(x[i]) != math.Float32bits(y[i]) && (x[i] == x[i] || y[i] == y[i]) {
			require.Failf(t, "another number", "%s: element %d is %v, expected %v", name, i, y[i], x[i])
		}
	}
}

// TestTinyModel reads what mlx-lm has saved: stacks of experts, modules that differ in bits, groups and modes.
func TestTinyModel(t *testing.T) {
	config, err := os.ReadFile("../../fixtures/mlx/tiny-qwen3-moe/config.json")
	require.NoError(t, err)
	m := newMemory(tensor.BF16, string(config))
	for name, x := range file(t, "../../fixtures/mlx/tiny-qwen3-moe/model.safetensors") {
		m.put(name, x.DType, x.Shape, x.data)
	}
	want := file(t, "../../fixtures/mlx/decoded.safetensors")
	found, err := mlx.Scheme{}.Find(t.Context(), m)
	require.NoError(t, err)
	plain := len(want) - len(found)
	assert.Equal(t, 10, plain) // nine norms and a projection
	specs := map[string]int{}
	for _, d := range found {
		specs[d.Spec().String()]++
		w := want[d.Info().Name]
		assert.Equal(t, w.Info, d.Info())
		require.Equal(t, w.data, decode(t, m, d, 1<<30), d.Info().Name)
	}
	assert.Equal(t, map[string]int{"mlx4, block 64": 10, "mlx3, block 64": 1, "mlx6, block 32": 1, "mlx8, block 64": 1,
		"mlx-mxfp4": 1, "mlx-mxfp8": 1, "mlx-nvfp4": 1}, specs)
}

// TestTiny: a group whose scale would be below the least power of two has that one, where MLX's byte runs over.
func TestTiny(t *testing.T) {
	info := tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{1, 32}}
	for _, typ := range []string{"mlx-mxfp4", "mlx-mxfp8"} {
		src := make([]byte, 4*32)
		binary.LittleEndian.PutUint32(src, math.Float32bits(0x1p-127))
		binary.LittleEndian.PutUint32(src[4:], math.Float32bits(-0x1p-128))
		m, err := encode(quant.Spec{Type: typ}, info, src, 1)
		require.NoError(t, err)
		assert.Equal(t, []byte{0}, m.Data[m.Infos[1].Name])
		m.Model = tensor.F32
		assert.Equal(t, src[:8], decode(t, m, m.only(t), 1)[:8])
	}
}
