package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../../fixtures/hqq"

// memory is a checkpoint in memory.
type memory map[string]part

func (m memory) Lookup(name string) (tensor.Info, bool) {
	t, ok := m[name]
	return t.Info, ok
}

func (m memory) Read(name string, p []byte, off int64) error {
	t := m[name]
	if off < 0 || off+int64(len(p)) > int64(len(t.data)) {
		return io.ErrUnexpectedEOF
	}
	copy(p, t.data[off:])
	return nil
}

func (m memory) Tensors() []tensor.Info {
	var list []tensor.Info
	for _, name := range slices.Sorted(maps.Keys(m)) {
		list = append(list, m[name].Info)
	}
	return list
}

func (memory) DType() tensor.DType { return 0 }
func (memory) Config() []byte      { return nil }

func (m memory) put(s part) { m[s.Name] = s }

// load reads a file of the fixtures.
func load(t testing.TB, name string) memory { return tensorsOf(t, fixtures+"/"+name) }

// tensorsOf reads the stored tensors of a checkpoint.
func tensorsOf(t testing.TB, path string) memory {
	t.Helper()
	dir, name, err := storage.Resolve(path, storage.Options{})
	require.NoError(t, err)
	c, err := safetensors.Format{}.Open(context.Background(), dir, name)
	require.NoError(t, err)
	defer c.Close()
	m := memory{}
	for _, x := range c.Tensors() {
		b := make([]byte, x.Bytes)
		require.NoError(t, formats.ReadFull(x.Data, b, x.Offset))
		m.put(part{x.Info, b})
	}
	return m
}

type deferred []float32

func (c deferred) ReadFloats(dst []float32, i int64) error {
	copy(dst, c[i:])
	return nil
}

// gather concatenates what a rule says of the units [lo, hi) of data.
func gather(r sdk.Rule, data []byte, lo, hi int64) []byte {
	var out []byte
	for _, x := range r.Append([]wire.Span(nil), lo, hi, int64(len(data))) {
		out = append(out, data[x.Offset:x.Offset+x.Length]...)
	}
	return out
}

// encode quantises src in tiles of the given number of units, as lorakit does.
func encode(t testing.TB, s quant.Spec, src part, units int64) memory {
	t.Helper()
	e, err := scheme{}.Encoder(context.Background(), s, src.Info)
	require.NoError(t, err)
	data := make([][]byte, len(e.Outputs))
	written := make([]int, len(data))
	n, width := src.Count(), src.DType.Bits()/8
	for i, o := range e.Outputs {
		size, err := o.Size()
		require.NoError(t, err)
		require.True(t, o.Fits(n/e.Unit, size, true))
		data[i] = make([]byte, size)
	}
	kept := make(deferred, n/e.Unit*e.Carry)
	for lo := int64(0); lo < n; lo += units * e.Unit {
		hi := min(lo+units*e.Unit, n)
		first, end := lo/e.Unit, hi/e.Unit
		var out [][]byte
		for i, o := range e.Outputs {
			if out = append(out, nil); o.Stride > 0 {
				out[i] = gather(o.Rule, data[i], first, end)
			}
		}
		require.NoError(t, e.Encode(out, kept[first*e.Carry:end*e.Carry], lo, hi, src.data[lo*width:hi*width]))
		for i, b := range out {
			for _, x := range e.Outputs[i].Append(nil, first, end, int64(len(data[i]))) {
				if len(b) > 0 {
					written[i] += copy(data[i][x.Offset:x.Offset+x.Length], b)
					b = b[x.Length:]
				}
			}
		}
	}
	require.NoError(t, e.Finish(kept, func(output int, off int64, p []byte) error {
		written[output] += copy(data[output][off:off+int64(len(p))], p)
		return nil
	}))
	m := memory{}
	for i, o := range e.Outputs {
		require.Len(t, data[i], written[i], o.Name)
		m.put(part{o.Info, data[i]})
	}
	return m
}

// decode reads a weight in tiles of the given number of units, as lorakit does.
func decode(t testing.TB, m memory, d sdk.Decoder, units int64) []byte {
	t.Helper()
	n, width := d.Count(), d.DType.Bits()/8
	out := make([]byte, n*width)
	for lo := int64(0); lo < n; lo += units * d.Unit {
		hi := min(lo+units*d.Unit, n)
		var parts [][]byte
		for _, p := range d.Parts {
			require.True(t, p.Fits(n/d.Unit, int64(len(m[p.Name].data)), false))
			parts = append(parts, gather(p.Rule, m[p.Name].data, lo/d.Unit, hi/d.Unit))
		}
		require.NoError(t, d.Decode(out[lo*width:hi*width], lo, hi, parts))
	}
	return out
}

func find(t testing.TB, m memory) []sdk.Decoder {
	t.Helper()
	found, err := scheme{}.Find(context.Background(), m)
	require.NoError(t, err)
	return found
}

// TestDecodesAsHQQ holds what is decoded against hqq's dequantisation, in the dtype that it computes in, bit for
// bit.
func TestDecodesAsHQQ(t *testing.T) {
	saved, decoded := load(t, "saved.safetensors"), load(t, "decoded.safetensors")
	found := find(t, saved)
	require.Len(t, found, 21)
	claimed := map[string]bool{}
	for _, d := range found {
		want := decoded[d.Info.Name]
		assert.Equal(t, want.Info, d.Info)
		assert.Zero(t, d.Values)
		for _, units := range []int64{1, 2, 3, 1 << 20} {
			require.Equal(t, want.data, decode(t, saved, d, units), "%s by %d", want.Name, units)
		}
		for _, p := range d.Parts {
			assert.False(t, claimed[p.Name], p.Name)
			claimed[p.Name] = true
		}
	}
	for name := range saved { // what is nobody's part is a bias
		assert.NotEqual(t, claimed[name], strings.HasSuffix(name, ".bias"), name)
	}
}

// TestEncodesAsHQQ holds all tensors of weights that are quantised against those of hqq without optimisation, bit for
// bit.
func TestEncodesAsHQQ(t *testing.T) {
	plain, nearest := load(t, "plain.safetensors"), load(t, "nearest.safetensors")
	require.Len(t, plain, 15)
	got := memory{}
	for name, w := range plain {
		group := map[string]int64{"64": 64, "8": 8, "whole": 96, "across": 64, "long": 1024}[name[:strings.Index(name, ".")]]
		s := spec(group)
		m := encode(t, s, w, 1<<20)
		for _, units := range []int64{1, 2, 3} {
			require.Equal(t, m, encode(t, s, w, units), "%s by %d", name, units)
		}
		maps.Copy(got, m)
		d := find(t, m)
		require.Len(t, d, 1)
		assert.Equal(t, w.Info, d[0].Info)
		assert.Equal(t, s, d[0].Spec)
		assert.Len(t, d[0].Parts, len(m))
	}
	assert.ElementsMatch(t, slices.Collect(maps.Keys(nearest)), slices.Collect(maps.Keys(got)))
	for name, want := range nearest {
		assert.Equal(t, want, got[name], name)
	}
}

// TestModelOfTransformers reads what transformers saves, and its config.
func TestModelOfTransformers(t *testing.T) {
	saved, decoded := load(t, "tiny-llama/model.safetensors"), load(t, "tiny-llama.decoded.safetensors")
	found := find(t, saved)
	require.Len(t, found, 14)
	for _, d := range found {
		want := decoded[d.Info.Name]
		require.Equal(t, want.Info, d.Info)
		require.Equal(t, want.data, decode(t, saved, d, 7))
	}
	b, err := os.ReadFile(fixtures + "/tiny-llama/config.json")
	require.NoError(t, err)
	_, after, _ := bytes.Cut(b, []byte(`"quantization_config": `))
	quantization, _, _ := bytes.Cut(after, []byte(`,
  "rms_norm_eps"`))
	object, err := scheme{}.Config(context.Background(), spec(64), nil)
	require.NoError(t, err)
	// transformers was asked for hqq's optimisation, which is not done here.
	assert.JSONEq(t, strings.Replace(string(quantization), `"optimize": true`, `"optimize": false`, 1), string(object))
}

func TestConfig(t *testing.T) {
	object, err := scheme{}.Config(context.Background(), spec(32), []string{"a\"b", "c"})
	require.NoError(t, err)
	assert.Contains(t, string(object), `"group_size": 32`)
	assert.Contains(t, string(object), `"skip_modules": ["a\"b", "c"]`)
	object, err = scheme{}.Config(context.Background(), quant.Spec{Type: "hqq"}, []string{})
	require.NoError(t, err)
	assert.Contains(t, string(object), `"group_size": 64`)
	assert.Contains(t, string(object), `"skip_modules": []`)
	_, err = scheme{}.Config(context.Background(), spec(7), nil)
	require.ErrorIs(t, err, quant.ErrParameter)
}

// floats is a weight of float32.
func floats(name string, shape tensor.Shape, x ...float32) part {
	s := part{Info: tensor.Info{Name: name, DType: tensor.F32, Shape: shape}}
	s.data = make([]byte, 4*s.Count())
	for i, v := range x {
		binary.LittleEndian.PutUint32(s.data[4*i:], math.Float32bits(v))
	}
	return s
}

// TestNotFinite says that values are refused that have no scale, and what is made of them where they are wanted: what
// hqq makes, as it was seen to.
func TestNotFinite(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	for _, c := range []struct {
		x           []float32
		index       int64
		scale, zero float32
	}{
		{[]float32{1, 1, 1, nan, 1, 1, 1, 1}, 3, nan, nan},
		{[]float32{nan, 1, 1, 1, 1, 1, 1, 1}, 0, nan, nan},
		{[]float32{1, inf, 1, 1, 1, 1, 1, 1}, 1, inf, float32(math.Copysign(0, -1))},
		{[]float32{1, 1, 1, 1, 1, 1, 1, -inf}, 7, inf, nan},
		{[]float32{3e38, 1, 1, 1, -3e38, 1, 1, 1}, 0, inf, 0},
	} {
		s := spec(8)
		src := floats("m.weight", tensor.Shape{4, 8})
		copy(src.data[4*8:], floats("", tensor.Shape{8}, c.x...).data)
		e, err := scheme{}.Encoder(context.Background(), s, src.Info)
		require.NoError(t, err)
		var bad *quant.NonFiniteError
		err = e.Encode([][]byte{nil, make([]byte, 12), make([]byte, 12)}, make([]float32, 3), 8, 32, src.data[4*8:])
		require.ErrorAs(t, err, &bad)
		assert.Equal(t, 8+c.index, bad.Index)

		s.AllowNonFinite = true
		m := encode(t, s, src, 2)
		bits := func(name string) uint32 { return binary.LittleEndian.Uint32(m["m."+name].data[4:]) }
		assert.Equal(t, math.Float32bits(c.scale), bits("scale"), "%v", c.x)
		assert.Equal(t, math.Float32bits(c.zero), bits("zero"), "%v", c.x)
		assert.Equal(t, make([]byte, 16), m["m.W_q"].data)
	}
}

// TestFinishInPieces has more codes than are joined at once, and needs the same bytes of them.
func TestFinishInPieces(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	src := floats("m.weight", tensor.Shape{1026, 1024}) // 525,312 codes a half
	for i := range src.Count() {
		binary.LittleEndian.PutUint32(src.data[4*i:], math.Float32bits(float32(r.NormFloat64())))
	}
	m := encode(t, spec(64), src, 1000)
	d := find(t, m)[0]
	assert.Equal(t, decode(t, m, d, 1<<20), decode(t, m, d, 999))
	got := decode(t, m, d, 4096)
	for g := range src.Count() / 64 {
		scale := math.Float32frombits(binary.LittleEndian.Uint32(m["m.scale"].data[4*g:]))
		for i := 64 * g; i < 64*g+64; i++ {
			x := math.Float32frombits(binary.LittleEndian.Uint32(src.data[4*i:]))
			y := math.Float32frombits(binary.LittleEndian.Uint32(got[4*i:]))
			// A rounded zero moves all by half a step, and so the least or the largest is cut by as much.
			if math.Abs(float64(x-y)) > 1.001*float64(scale) {
				t.Fatalf("element %d is %v, expected %v within %v", i, y, x, scale)
			}
		}
	}
}

func TestEncoderRefuses(t *testing.T) {
	for want, info := range map[string]tensor.Info{
		"its dtype is I8":          {Name: "m.weight", DType: tensor.I8, Shape: tensor.Shape{2, 64}},
		"its shape is [128]":       {Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{128}},
		"its shape is [2, 65]":     {Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{2, 65}},
		"its shape is [3, 64]":     {Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{3, 64}},
		"its shape is [0, 64]":     {Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{0, 64}},
		"its name does not end in": {Name: "m.kernel", DType: tensor.F32, Shape: tensor.Shape{2, 64}},
	} {
		_, err := scheme{}.Encoder(context.Background(), spec(64), info)
		require.ErrorIs(t, err, quant.ErrUnsupported, want)
		assert.ErrorContains(t, err, want)
	}
	for _, group := range []int64{-8, 4, 12, 1 << 17} {
		_, err := scheme{}.Encoder(context.Background(), spec(group),
			tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{2, 64}})
		require.ErrorIs(t, err, quant.ErrParameter, "%v", group)
	}
}

// valid is a small weight.
func valid(t testing.TB) memory {
	return encode(t, spec(64), floats("m.weight", tensor.Shape{4, 64}, 1, -2, 3), 1)
}

// TestContradictions damages a weight in every way that its parts can disagree, and in every way that hqq has and that
// is not read.
func TestContradictions(t *testing.T) {
	missing := []string{"scale", "zero", "group_size", "shape", "axis", "packing", "quant_scale", "quant_zero"}
	for _, name := range missing {
		m := valid(t)
		delete(m, "m."+name)
		refused(t, m, fmt.Sprintf("%q is missing", "m."+name))
	}
	raw := func(name string, d tensor.DType, shape ...int64) part {
		s := part{Info: tensor.Info{Name: name, DType: d, Shape: shape}}
		n, err := s.Size()
		require.NoError(t, err)
		s.data = make([]byte, n)
		return s
	}
	for _, c := range []struct {
		damage part
		says   string
	}{
		{number("nbits", 8), `"m.nbits" is 8, expected 4`},
		{raw("nbits", tensor.F32), `"m.nbits" is F32 [], expected I32 []`},
		{raw("nbits", tensor.I32, 1), `"m.nbits" is I32 [1], expected I32 []`},
		{number("axis", 0), `"m.axis" is 0, expected 1`},
		{number("group_size", 63), `"m.group_size" is 63, expected a multiple of 8 up to 65536`},
		{number("group_size", 0), `"m.group_size" is 0, expected`},
		{number("group_size", -64), `"m.group_size" is -64, expected`},
		{number("group_size", 1<<20), `"m.group_size" is 1048576, expected`},
		{number("group_size", 32), `"m.W_q" is U8 [2, 64], expected U8 [4, 32]`},
		{number("group_size", 256), `"m.shape" is [4, 64], expected a number of elements that is an even number`},
		{dimensions("shape", tensor.Shape{3, 64}), `"m.shape" is [3, 64], expected`},
		{dimensions("shape", tensor.Shape{0, 64}), `"m.shape" is [0, 64], expected`},
		{dimensions("shape", tensor.Shape{-4, -64}), `"m.shape": `},
		{dimensions("shape", tensor.Shape{1 << 62, 1 << 62}), `"m.shape": `},
		{dimensions("shape", tensor.Shape{1 << 31, 1 << 31}), `"m.shape": `},
		{dimensions("shape", tensor.Shape{256}), `"m.shape" is I64 [1], expected I64 [2]`},
		{dimensions("shape", tensor.Shape{6, 64}), `"m.W_q" is U8 [2, 64], expected U8 [3, 64]`},
		{text("packing", "8bit_u8"), `"m.packing" is "8bit_u8", expected "4bit_u8"`},
		{text("packing", "3bit_32\n"), `"m.packing" is "3bit_32\n", expected "4bit_u8"`},
		{text("packing", ""), `"m.packing" is "", expected`},
		{text("packing", strings.Repeat("4", 33)), `"m.packing" is U8 [33], expected`},
		{raw("packing", tensor.I32, 7), `"m.packing" is I32 [7], expected`},
		{raw("packing", tensor.U8), `"m.packing" is U8 [], expected`},
		{text("unpack_view_dtype", "torch.int32"), `"m.unpack_view_dtype" is "torch.int32", expected "torch.uint8"`},
		{flag("quant_scale", 1), `"m.quant_scale" is 1, expected 0`},
		{flag("quant_zero", 1), `"m.quant_zero" is 1, expected 0`},
		{flag("offload_meta", 1), `"m.offload_meta" is 1, expected 0`},
		{flag("channel_wise", 0), `"m.channel_wise" is 0, expected 1`},
		{flag("round_zero", 2), `"m.round_zero" is 2, expected 0 or 1`},
		{raw("optimize", tensor.Bool), `"m.optimize" is BOOL [], expected U8 []`},
		{text("compute_dtype", "torch.float16"), `"m.compute_dtype" is "torch.float16", expected "torch.float32"`},
		{text("compute_dtype", "__import__('os').abort()"), `"m.compute_dtype" is "__import__('os').abort()", expected`},
		{flag("view_as_float", 1), `"m.W_q" is U8 [2, 64], expected F32 [2, 16]`},
		{raw("W_q", tensor.F32, 2, 16), `"m.W_q" is F32 [2, 16], expected U8 [2, 64]`},
		{raw("W_q", tensor.U8, 1, 128), `"m.W_q" is U8 [1, 128], expected U8 [2, 64]`},
		{raw("scale", tensor.F32, 4), `"m.scale" is F32 [4], expected F32 [4, 1]`},
		{raw("scale", tensor.F32, 3, 1), `"m.scale" is F32 [3, 1], expected F32 [4, 1]`},
		{raw("scale", tensor.U8, 4, 1), `"m.scale" is U8, expected F32, F16 or BF16`},
		{raw("zero", tensor.F16, 4, 1), `"m.zero" is F16 [4, 1], expected F32 [4, 1]`},
		{raw("zero", tensor.F32), `"m.zero" is F32 [], expected F32 [4, 1]`},
		{raw("weight", tensor.F32, 4, 64), `"m.weight" is there too`},
	} {
		m := valid(t)
		c.damage.Name = "m." + c.damage.Name
		m.put(c.damage)
		refused(t, m, c.says)
	}
	m := valid(t)
	s := m["m.shape"]
	s.data = s.data[:4]
	m.put(s)
	_, err := scheme{}.Find(context.Background(), m)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

func refused(t *testing.T, m memory, says string) {
	t.Helper()
	_, err := scheme{}.Find(context.Background(), m)
	require.True(t, errors.Is(err, quant.ErrMalformed) || errors.Is(err, formats.ErrUnsupported), "%s: %v", says, err)
	assert.ErrorContains(t, err, says)
	assert.ErrorContains(t, err, `tensor "m.W_q": `)
	assert.NotContains(t, err.Error(), "\n")
}

// TestOthersLeft says that what has some of the names and is no weight of HQQ is left alone, and that settings that
// hqq does without may be missing.
func TestOthersLeft(t *testing.T) {
	m := valid(t)
	codes := m["m.W_q"]
	delete(m, "m.W_q")
	assert.Empty(t, find(t, m))
	m = memory{}
	for _, name := range []string{"attention.W_q", "W_q", "a.scale", "attention.zero", "xW_q", "x.nbits"} {
		m.put(part{tensor.Info{Name: name, DType: tensor.F32, Shape: tensor.Shape{1}}, make([]byte, 4)})
	}
	assert.Empty(t, find(t, m))

	bare := memory{}
	for _, s := range valid(t) {
		s.Name = strings.TrimPrefix(s.Name, "m.")
		if !slices.Contains([]string{"unpack_view_dtype", "view_as_float", "compute_dtype", "offload_meta",
			"encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"}, s.Name) {
			bare.put(s)
		}
	}
	found := find(t, bare)
	require.Len(t, found, 1)
	assert.Equal(t, "weight", found[0].Info.Name)
	assert.Equal(t, codes.data, bare["W_q"].data)
	assert.Equal(t, decode(t, valid(t), find(t, valid(t))[0], 1), decode(t, bare, found[0], 1))
}

// FuzzSettings reads whatever the settings may hold: no panic, and what is accepted can be decoded within its parts.
func FuzzSettings(f *testing.F) {
	m := valid(f)
	f.Add(m["m.nbits"].data, m["m.group_size"].data, m["m.shape"].data, []byte(packing4), []byte("torch.float32"), byte(0))
	f.Add(m["m.nbits"].data, []byte{32, 0, 0, 0}, m["m.shape"].data, []byte(packing4), []byte{}, byte(1))
	f.Add(m["m.nbits"].data, m["m.group_size"].data, dimensions("", tensor.Shape{1 << 60, 16}).data, []byte(packing4),
		[]byte("torch.bfloat16"), byte(3))
	f.Fuzz(func(t *testing.T, nbits, group, shape, packing, compute []byte, flags byte) {
		m := valid(t)
		set := func(name string, data []byte) {
			s := m["m."+name]
			s.data = data
			if len(s.Shape) == 1 {
				s.Shape = tensor.Shape{int64(len(data)) * 8 / s.DType.Bits()}
			}
			m.put(s)
		}
		set("nbits", nbits)
		set("group_size", group)
		set("shape", shape)
		set("packing", packing)
		set("compute_dtype", compute)
		set("view_as_float", []byte{flags & 1})
		set("channel_wise", []byte{flags >> 1})
		found, err := scheme{}.Find(context.Background(), m)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Fatal(err)
			}
			return
		}
		if n := found[0].Info.Count(); n != 256 {
			t.Fatalf("%d elements in 128 bytes", n)
		}
		decode(t, m, found[0], 1)
	})
}
