package checkpoint_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/x448/float16"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	_ "github.com/lorakit/lorakit/quant/gptq"
	_ "github.com/lorakit/lorakit/quant/mxfp4"
	"github.com/lorakit/lorakit/tensor"
)

// TestBands reads a weight that lies the other way round than its elements, and has more than one band, in pieces of
// any size and order: each is what a formula says of the bytes.
func TestBands(t *testing.T) {
	const in, out, groups = 2304, 4100, 18
	r := rand.New(rand.NewPCG(3, 4))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := 0; i+8 <= n; i += 8 {
			binary.LittleEndian.PutUint64(b[i:], r.Uint64())
		}
		return b
	}
	codes, zeros, scales := random(in*out), random(groups*out), random(2*groups*out)
	index := make([]byte, 4*in)
	for i := range in {
		index[4*i] = byte(r.IntN(groups))
	}
	for i := 1; i < len(scales); i += 2 {
		scales[i] = scales[i]&0x83 | 0x24 // about 1/64
	}
	want := make([]byte, 2*in*out)
	for i := range in {
		g := int(index[4*i])
		for o := range out {
			q := int(codes[4*(i/4*out+o)+i%4]) - int(zeros[g*out+o])
			s := float16.Frombits(binary.LittleEndian.Uint16(scales[2*(g*out+o):])).Float32()
			binary.LittleEndian.PutUint16(want[2*(o*in+i):], float16.Fromfloat32(float32(q)*s).Bits())
		}
	}
	dir := t.TempDir()
	header := fmt.Sprintf(`{"m.qweight": {"dtype": "I32", "shape": [%d, %d], "data_offsets": [0, %d]},
		"m.qzeros": {"dtype": "I32", "shape": [%d, %d], "data_offsets": [%d, %d]},
		"m.scales": {"dtype": "F16", "shape": [%d, %d], "data_offsets": [%d, %d]},
		"m.g_idx": {"dtype": "I32", "shape": [%d], "data_offsets": [%d, %d]}}`,
		in/4, out, len(codes), groups, out/4, len(codes), len(codes)+len(zeros), groups, out, len(codes)+len(zeros),
		len(codes)+3*len(zeros), in, len(codes)+3*len(zeros), len(codes)+3*len(zeros)+len(index))
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	for _, b := range [][]byte{codes, zeros, scales, index} {
		file = append(file, b...)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors"), file, 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"quantization_config": {
		"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": true, "checkpoint_format": "gptq_v2"}}`), 0o666))

	c, err := checkpoint.Open(t.Context(), dir)
	require.NoError(t, err)
	defer c.Close()
	require.Len(t, c.Weights, 1)
	w := c.Weights[0]
	require.Equal(t, tensor.Shape{out, in}, w.Shape)
	require.Equal(t, tensor.F16, w.Values)
	assert.Positive(t, w.Band())
	assert.Less(t, w.Band(), w.Count()*2/3)
	assert.Zero(t, w.Band()%in)

	reader := checkpoint.NewReader(nil)
	read := func(lo, hi int64) {
		got, err := reader.Read(w, lo, hi, false)
		require.NoError(t, err)
		require.True(t, string(want[2*lo:2*hi]) == string(got), "elements %d to %d differ", lo, hi)
	}
	for lo := int64(0); lo < w.Count(); lo += 100_000 {
		read(lo, min(lo+100_000, w.Count()))
	}
	for range 30 {
		lo := r.Int64N(w.Count())
		read(lo, lo+r.Int64N(min(w.Count()-lo, 300_000)+1))
	}
	read(0, w.Count())
	turned := make([]byte, len(want))
	tensor.Transpose(turned, want, out, in, 2)
	for _, x := range [][2]int64{{0, 5}, {700 * out, 703*out + 10}, {w.Count() - 2*out, w.Count()}} {
		got, err := reader.Read(w, x[0], x[1], true)
		require.NoError(t, err)
		require.True(t, string(turned[2*x[0]:2*x[1]]) == string(got), "the turned elements %v differ", x)
	}
	// What is asked for has room for the band, and no more than a few tiles beside it.
	m := checkpoint.MemoryFor(w, 1<<18, false).Total()
	assert.Greater(t, m, int64(4<<20))
	assert.Less(t, m, int64(12<<20))
}

// TestBandsOfStacks reads a stack of matrices that lie so, whose bands end within a matrix and have parts of several.
func TestBandsOfStacks(t *testing.T) {
	const experts, rows, blocks = 5, 500, 300
	r := rand.New(rand.NewPCG(5, 6))
	codes, scales := make([]byte, experts*rows*blocks*16), make([]byte, experts*rows*blocks)
	for i := range codes {
		codes[i] = byte(r.Uint32())
	}
	for i := range scales {
		scales[i] = byte(120 + r.IntN(10))
	}
	values := []float32{0, .5, 1, 1.5, 2, 3, 4, 6}
	want := make([]byte, 2*experts*blocks*32*rows)
	for block, scale := range scales {
		e, row, first := block/(rows*blocks), block/blocks%rows, block%blocks*32
		for i := range 32 {
			code := codes[block*16+i/2] >> (i % 2 * 4) & 15
			x := math.Float32bits(values[code&7] * math.Float32frombits(uint32(scale)<<23))
			at := 2 * ((e*blocks*32+first+i)*rows + row)
			binary.LittleEndian.PutUint16(want[at:], uint16(x>>16)|uint16(code>>3)<<15)
		}
	}
	dir := t.TempDir()
	header := fmt.Sprintf(`{"p_blocks": {"dtype": "U8", "shape": [%d, %d, %d, 16], "data_offsets": [0, %d]},
		"p_scales": {"dtype": "U8", "shape": [%d, %d, %d], "data_offsets": [%d, %d]}}`,
		experts, rows, blocks, len(codes), experts, rows, blocks, len(codes), len(codes)+len(scales))
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	file = append(append(file, codes...), scales...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors"), file, 0o666))
	c, err := checkpoint.Open(t.Context(), dir)
	require.NoError(t, err)
	defer c.Close()
	require.Len(t, c.Weights, 1)
	w := c.Weights[0]
	require.Equal(t, tensor.Shape{experts, blocks * 32, rows}, w.Shape)
	require.Equal(t, tensor.BF16, w.Values)
	assert.Equal(t, 2*w.Count()/experts, w.Band())

	reader := checkpoint.NewReader(nil)
	read := func(lo, hi int64) {
		got, err := reader.Read(w, lo, hi, false)
		require.NoError(t, err)
		require.True(t, string(want[2*lo:2*hi]) == string(got), "elements %d to %d differ", lo, hi)
	}
	for lo := int64(0); lo < w.Count(); lo += 700_000 {
		read(lo, min(lo+700_000, w.Count()))
	}
	for range 20 {
		lo := r.Int64N(w.Count())
		read(lo, lo+r.Int64N(min(w.Count()-lo, 6_000_000)+1))
	}
	read(0, w.Count())
}

// TestForeignLayouts names what is not read, and says what can be done.
func TestForeignLayouts(t *testing.T) {
	for config, want := range map[string]string{
		`{"quant_method": "hqq"}`:    `"hqq" (HQQ), expected`,
		`{"quant_method": "exl2"}`:   "EXL2",
		`{"quant_method": "exl3"}`:   "EXL3",
		`{"quant_method": "aqlm"}`:   "AQLM",
		`{"quant_method": "vptq"}`:   "VPTQ",
		`{"quant_method": "quanto"}`: "quanto",
		`{"quant_method": "quark"}`:  "Quark",
		`{"quant_method": "torchao", "quant_type": {"default": {"_data": {"int4_packing_format": {"_data": "TILE_PACKED_TO_4D"}}}}}`: "tile-packed",
		`{"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}`:                                 "sparse 2:4",
		`{"quant_method": "compressed-tensors", "format": "marlin-24"}`:                                                              "sparse 2:4",
		`{"quant_method": "fp8", "fmt": "e4m3fnuz"}`:                                                                                 "fnuz",
		`{"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}`:                                                         "marlin",
		`{"quant_method": "gptq", "bits": 6}`:                                                                                        "planar",
		`{"quant_method": "none-such"}`:                                                                                              `"none-such", expected`,
	} {
		dir := t.TempDir()
		writeOne(t, dir, "w.weight", "F32")
		require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"quantization_config": `+config+`}`), 0o666))
		c, err := checkpoint.Open(t.Context(), dir)
		require.NoError(t, err)
		defer c.Close()
		err = c.CheckReadable()
		require.ErrorIs(t, err, checkpoint.ErrRefused, config)
		assert.ErrorContains(t, err, want)
		assert.NotContains(t, err.Error(), "\n")
	}
	// What is told by the tensors alone.
	for want, x := range map[string][2]string{
		"without a quantization_config": {"m.qweight", "I32"}, "F8_E4M3FNUZ": {"m.weight", "F8_E4M3FNUZ"},
	} {
		dir := t.TempDir()
		writeOne(t, dir, x[0], x[1])
		c, err := checkpoint.Open(t.Context(), dir)
		require.NoError(t, err)
		defer c.Close()
		err = c.CheckReadable()
		require.ErrorIs(t, err, checkpoint.ErrRefused)
		assert.ErrorContains(t, err, want)
		assert.ErrorContains(t, err, x[0])
	}
	dir := t.TempDir()
	writeOne(t, dir, "w.weight", "F32")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"),
		[]byte(`{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 2, "sparsity_config": {}}}`), 0o666))
	c, err := checkpoint.Open(t.Context(), dir)
	require.NoError(t, err)
	defer c.Close()
	assert.NoError(t, c.CheckReadable())
}

// TestUndeclared: codes beside scales are not taken for numbers where nothing says how they are read. Others are.
func TestUndeclared(t *testing.T) {
	for _, c := range []struct {
		codes, dtype, scales string
		refused              bool
	}{
		{"m.weight", "F8_E4M3", "m.weight_scale", true}, {"m.weight", "F8_E4M3", "m.weight_scale_inv", true},
		{"m.weight", "I8", "m.weight_scale", true}, {"m.weight", "U32", "m.scales", true},
		{"m.weight_packed", "I32", "m.weight_scale", true}, {"m.weight_packed", "U8", "m.weight_scale", true},
		{"m.weight", "F8_E4M3", "n.weight_scale", false}, {"m.weight", "BF16", "m.weight_scale", false},
		{"m", "U32", "m.scales", false}, {"logit_scale", "F8_E4M3", "logit_bias", false},
	} {
		dir := t.TempDir()
		writeEach(t, dir, [][2]string{{c.codes, c.dtype}, {c.scales, "BF16"}})
		o, err := checkpoint.Open(t.Context(), dir)
		require.NoError(t, err)
		defer o.Close()
		err = o.CheckReadable()
		if !c.refused {
			assert.NoError(t, err, c)
			continue
		}
		require.ErrorIs(t, err, checkpoint.ErrRefused, c)
		assert.ErrorContains(t, err, fmt.Sprintf("such as %q beside %q, without a quantization_config", c.codes, c.scales))
	}
}

// writeOne writes a checkpoint of one tensor of four elements.
func writeOne(t *testing.T, dir, name, dtype string) { writeEach(t, dir, [][2]string{{name, dtype}}) }

// writeEach writes a checkpoint of tensors of four elements, each with a name and a dtype.
func writeEach(t *testing.T, dir string, tensors [][2]string) {
	var members []string
	at := int64(0)
	for _, x := range tensors {
		d, err := tensor.ParseDType(x[1])
		require.NoError(t, err)
		n := 4 * d.Bits() / 8
		members = append(members, fmt.Sprintf(`"%s": {"dtype": "%s", "shape": [2, 2], "data_offsets": [%d, %d]}`, x[0], x[1],
			at, at+n))
		at += n
	}
	header := "{" + strings.Join(members, ", ") + "}"
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors"), append(file, make([]byte, at)...), 0o666))
}
