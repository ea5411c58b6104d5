package ggml_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	blocks "github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/ggml"
	"github.com/lorakit/lorakit/tensor"
)

// stored are tensors of a container.
type stored struct {
	tensors []tensor.Info
	dtype   tensor.DType
}

func (s stored) Tensors() []tensor.Info { return s.tensors }

func (s stored) Lookup(name string) (tensor.Info, bool) {
	for _, t := range s.tensors {
		if t.Name == name {
			return t, true
		}
	}
	return tensor.Info{}, false
}

func (s stored) Read(name string, _ []byte, _ int64) error { return fmt.Errorf("read %s", name) }
func (s stored) DType() tensor.DType                       { return s.dtype }
func (s stored) Config() []byte                            { return nil }

// weights are rows of numbers of a type.
func weights(t *testing.T, n int, d tensor.DType) (b []byte, x []float32) {
	r := rand.New(rand.NewPCG(1, 2))
	x = make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	b = make([]byte, n*int(d.Bits()/8))
	require.NoError(t, tensor.FromFloats(b, d, append([]float32(nil), x...)))
	require.NoError(t, tensor.ToFloats(x, b, d))
	return b, x
}

// encode runs an encoder in tiles of so many units.
func encode(t *testing.T, e quant.Encoder, src []byte, d tensor.DType, units int64) ([]byte, error) {
	infos := e.Outputs()
	require.Len(t, infos, 1)
	size, err := infos[0].Size()
	require.NoError(t, err)
	out := make([]byte, size)
	n, width := infos[0].Count(), d.Bits()/8
	for lo := int64(0); lo < n; lo += units * e.Unit() {
		hi := min(n, lo+units*e.Unit())
		r := e.Tiles(nil, lo, hi)
		require.Len(t, r, 1)
		tile := out[r[0].Offset:][:r[0].Length]
		if err := e.Encode([][]byte{tile}, nil, lo, hi, src[lo*width:hi*width]); err != nil {
			return nil, err
		}
	}
	assert.Zero(t, e.Deferred(0, n))
	return out, e.Finish(nil, nil)
}

// TestThereAndBack holds the scheme against the package of blocks: any type, dtype and split into tiles.
func TestThereAndBack(t *testing.T) {
	shape := tensor.Shape{3, 7, 256}
	const n = 3 * 7 * 256
	for _, typ := range (ggml.Scheme{}).Types() {
		if typ.ReadOnly {
			continue
		}
		b, err := blocks.Parse(typ.Name)
		require.NoError(t, err)
		for _, d := range []tensor.DType{tensor.F32, tensor.F16, tensor.BF16} {
			src, x := weights(t, n, d)
			want := make([]byte, n/b.Elements()*b.Bytes())
			require.Equal(t, -1, b.Quantize(want, x))
			values := make([]float32, n)
			require.Equal(t, -1, b.Dequantize(values, want))
			for _, units := range []int64{1, 3, 20, 1 << 20} {
				s, err := ggml.Scheme{}.Spec(typ.Name, nil)
				require.NoError(t, err)
				e, err := ggml.Scheme{}.Encoder(t.Context(), s, tensor.Info{Name: "w", DType: d, Shape: shape})
				require.NoError(t, err)
				got, err := encode(t, e, src, d, units)
				require.NoError(t, err)
				require.Equal(t, want, got, "%s of %v, %d units", typ.Name, d, units)

				found, err := ggml.Scheme{}.Find(t.Context(), stored{e.Outputs(), d})
				require.NoError(t, err)
				require.Len(t, found, 1)
				assert.Equal(t, tensor.Info{Name: "w", DType: d, Shape: shape}, found[0].Info())
				assert.Equal(t, typ.Name, found[0].Spec().Type)
				back := make([]byte, 4*n)
				for lo := int64(0); lo < n; lo += units * found[0].Unit() {
					hi := min(n, lo+units*found[0].Unit())
					r := found[0].Inputs(nil, lo, hi)
					in := want[r[0].Offset:][:r[0].Length]
					require.NoError(t, found[0].Decode(back[4*lo:4*hi], lo, hi, [][]byte{in}))
				}
				y := make([]float32, n)
				require.NoError(t, tensor.ToFloats(y, back, tensor.F32))
				require.Equal(t, values, y)
			}
		}
	}
}

func TestNonFinite(t *testing.T) {
	info := tensor.Info{Name: "w", DType: tensor.F32, Shape: tensor.Shape{40, 256}}
	for _, c := range []struct {
		value float32
		typ   string
		what  string
	}{
		{float32(math.NaN()), "q8_0", "NaN or infinity at element 9000"},
		{float32(math.Inf(-1)), "q4_k", "NaN or infinity at element 9000"},
		{float32(math.Inf(1)), "nvfp4", "NaN or infinity at element 9000"},
		{1e9, "q8_0", "cannot hold, as its values are too large or too small, at element 8992"},
		{1e9, "q6_k", "at element 8960"},
		{-1e30, "q4_k", "at element 8960"},
	} {
		src, _ := weights(t, 40*256, tensor.F32)
		binary.LittleEndian.PutUint32(src[4*9000:], math.Float32bits(c.value))
		s, err := ggml.Scheme{}.Spec(c.typ, quant.Params{{Name: ggml.Validated, Value: true}})
		require.NoError(t, err)
		e, err := ggml.Scheme{}.Encoder(t.Context(), s, info)
		require.NoError(t, err)
		_, err = encode(t, e, src, tensor.F32, 16)
		refused := (*quant.NonFiniteError)(nil)
		require.ErrorAs(t, err, &refused, "%v to %s", c.value, c.typ)
		assert.ErrorContains(t, err, c.what)

		s.AllowNonFinite = true
		e, err = ggml.Scheme{}.Encoder(t.Context(), s, info)
		require.NoError(t, err)
		one, err := encode(t, e, src, tensor.F32, 16)
		require.NoError(t, err)
		two, err := encode(t, e, src, tensor.F32, 1<<20)
		require.NoError(t, err)
		assert.Equal(t, one, two)

		found, err := ggml.Scheme{}.Find(t.Context(), stored{e.Outputs(), tensor.F32})
		require.NoError(t, err)
		err = found[0].Decode(make([]byte, 4*40*256), 0, 40*256, [][]byte{one})
		if c.typ == "nvfp4" {
			assert.NoError(t, err)
			continue
		}
		assert.ErrorIs(t, err, quant.ErrMalformed)
		assert.ErrorContains(t, err, fmt.Sprintf("in block %d", 9000/e.Unit()))
	}
}

// TestInfiniteScales stores them where nobody wants them refused, and says so.
func TestInfiniteScales(t *testing.T) {
	info := tensor.Info{Name: "w", DType: tensor.F32, Shape: tensor.Shape{40, 256}}
	src, _ := weights(t, 40*256, tensor.F32)
	binary.LittleEndian.PutUint32(src[4*9000:], math.Float32bits(1e9))
	e, err := ggml.Scheme{}.Encoder(t.Context(), quant.Spec{Type: "q4_0"}, info)
	require.NoError(t, err)
	_, err = encode(t, e, src, tensor.F32, 16)
	require.NoError(t, err)
	notices := e.(interface{ Notices() []string }).Notices()
	require.Len(t, notices, 1)
	assert.Contains(t, notices[0], "block 281")

	binary.LittleEndian.PutUint32(src[4*9010:], math.Float32bits(float32(math.NaN())))
	_, err = encode(t, e, src, tensor.F32, 16)
	refused := (*quant.NonFiniteError)(nil)
	require.ErrorAs(t, err, &refused)
	assert.EqualValues(t, 9010, refused.Index)
}

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		typ, want string
		info      tensor.Info
	}{
		{"q4_k", "expected rows of a multiple of 256 for q4_K", tensor.Info{DType: tensor.F32, Shape: tensor.Shape{256, 32}}},
		{"q8_0", "expected rows of a multiple of 32", tensor.Info{DType: tensor.F32}},
		{"q8_0", "its dtype is I8", tensor.Info{DType: tensor.I8, Shape: tensor.Shape{32}}},
		{"q8_0", "it is empty", tensor.Info{DType: tensor.F32, Shape: tensor.Shape{0, 32}}},
		{"q8_0", "rows of a multiple", tensor.Info{DType: tensor.F32, Shape: tensor.Shape{32, 0}}},
		{"iq2_xs", "the type is read only", tensor.Info{DType: tensor.F32, Shape: tensor.Shape{256}}},
	} {
		_, err := ggml.Scheme{}.Encoder(t.Context(), quant.Spec{Type: c.typ}, c.info)
		assert.ErrorIs(t, err, quant.ErrUnsupported)
		assert.ErrorContains(t, err, c.want)
	}
	_, err := ggml.Scheme{}.Spec("q9_9", nil)
	assert.ErrorIs(t, err, quant.ErrUnknown)

	q8 := blocks.Q8_0.Encoding()
	odd := q8
	odd.Bytes = 33
	for want, info := range map[string]tensor.Info{
		"rows of a multiple of 32":                   {Name: "w", Shape: tensor.Shape{32, 1}, Encoding: q8},
		"found blocks of 32 elements in 33 bytes of": {Name: "w", Shape: tensor.Shape{32}, Encoding: odd},
	} {
		_, err := ggml.Scheme{}.Find(t.Context(), stored{tensors: []tensor.Info{info}})
		assert.ErrorIs(t, err, quant.ErrMalformed)
		assert.ErrorContains(t, err, want)
	}
	found, err := ggml.Scheme{}.Find(t.Context(), stored{tensors: []tensor.Info{
		{Name: "a", DType: tensor.F32, Shape: tensor.Shape{32}},
		{Name: "b", Shape: tensor.Shape{4}, Encoding: tensor.Encoding{Name: "t4", Elements: 4, Bytes: 8}},
	}})
	require.NoError(t, err)
	assert.Empty(t, found)
}

func TestNames(t *testing.T) {
	registered, err := quant.ForType("q4_k")
	require.NoError(t, err)
	assert.Equal(t, ggml.Scheme{}, registered)
	for _, typ := range registered.Types() {
		assert.Equal(t, strings.ToLower(typ.Name), typ.Name)
	}
	key, object, err := registered.Config(nil, nil)
	require.NoError(t, err)
	assert.Equal(t, "quantization_config", key)
	assert.JSONEq(t, `{"quant_method": "gguf"}`, string(object))
}
