package ggml_test

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/tensor"
)

func normal(n int, seed uint64) []float32 {
	r, x := rand.New(rand.NewPCG(seed, 1)), make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64() * 0.02)
	}
	return x
}

// TestPieces: rows that are worked through in pieces of whole blocks have the same bytes and numbers.
func TestPieces(t *testing.T) {
	const n = 21 * 256
	x := normal(n, 3)
	r := rand.New(rand.NewPCG(4, 4))
	for _, typ := range ggml.Types() {
		blocks := n / typ.Elements()
		whole, values := make([]byte, blocks*typ.Bytes()), make([]float32, n)
		if typ.ReadOnly() {
			for i := range whole {
				whole[i] = byte(r.Uint32()) & 0x3f // scales are finite
			}
		} else {
			require.Equal(t, -1, typ.Quantize(whole, x))
		}
		require.Equal(t, -1, typ.Dequantize(values, whole))
		for at := 0; at < blocks; {
			m := min(1+r.IntN(9), blocks-at)
			from, to := at*typ.Elements(), (at+m)*typ.Elements()
			want := whole[at*typ.Bytes() : (at+m)*typ.Bytes()]
			if !typ.ReadOnly() {
				got := make([]byte, len(want))
				require.Equal(t, -1, typ.Quantize(got, x[from:to]))
				require.Equal(t, want, got, typ)
			}
			y := make([]float32, to-from)
			require.Equal(t, -1, typ.Dequantize(y, want))
			same(t, values[from:to], y)
			at += m
		}
	}
}

// TestClose: what is quantised and decoded is near to what it was, the nearer the more bits it has.
func TestClose(t *testing.T) {
	x := normal(64*256, 5)
	for _, typ := range ggml.Types() {
		if typ.ReadOnly() {
			continue
		}
		b, y := make([]byte, len(x)/typ.Elements()*typ.Bytes()), make([]float32, len(x))
		require.Equal(t, -1, typ.Quantize(b, x))
		require.Equal(t, -1, typ.Dequantize(y, b))
		var far, size float64
		for i, v := range x {
			far += math.Pow(float64(v-y[i]), 2)
			size += math.Pow(float64(v), 2)
		}
		bits := 8 * float64(typ.Bytes()) / float64(typ.Elements())
		assert.Less(t, math.Sqrt(far/size), min(0.85, 3.5*math.Exp2(-bits)), typ)
	}
}

func TestNotFinite(t *testing.T) {
	for _, typ := range ggml.Types() {
		if typ.ReadOnly() {
			continue
		}
		x := normal(8*256, 6)
		clean := make([]byte, len(x)/typ.Elements()*typ.Bytes())
		require.Equal(t, -1, typ.Quantize(clean, x))
		x[700], x[1900] = float32(math.NaN()), float32(math.Inf(-1))
		b := make([]byte, len(clean))
		assert.Equal(t, 700, typ.Quantize(b, x), typ)
		for i := 0; i*typ.Bytes() < len(b); i++ {
			broken := i == 700/typ.Elements() || i == 1900/typ.Elements()
			got := b[i*typ.Bytes():][:typ.Bytes()]
			if !broken {
				assert.Equal(t, clean[i*typ.Bytes():][:typ.Bytes()], got, "%v, block %d", typ, i)
				continue
			}
			bad := typ.Dequantize(make([]float32, typ.Elements()), got)
			if typ == ggml.NVFP4 {
				assert.Equal(t, -1, bad)
			} else {
				assert.Equal(t, 0, bad, typ)
			}
		}
		if typ == ggml.MXFP4 || typ == ggml.NVFP4 {
			continue
		}
		x[700], x[1900] = 0, 3e38
		assert.Equal(t, 1900/typ.Elements()*typ.Elements(), typ.Quantize(b, x), typ)
		assert.Equal(t, 1900/typ.Elements(), typ.Dequantize(x, b), typ)
	}
}

func TestParse(t *testing.T) {
	for _, typ := range ggml.Types() {
		for _, name := range []string{typ.String(), strings.ToUpper(typ.String()), strings.ToLower(typ.String())} {
			got, err := ggml.Parse(name)
			require.NoError(t, err)
			assert.Equal(t, typ, got)
		}
	}
	assert.Equal(t, tensor.Encoding{Name: "q4_K", Elements: 256, Bytes: 144}, ggml.Q4K.Encoding())
	assert.Equal(t, "iq2_xxs", ggml.IQ2XXS.String())
	_, err := ggml.Parse("q4_1\n")
	assert.EqualError(t, err, `unknown ggml type "q4_1\n"`)
	for _, typ := range []ggml.Type{ggml.F32, ggml.F16, ggml.BF16, 4, 5, 43, ggml.Keep} {
		assert.False(t, typ.Valid(), typ)
	}
}

func TestLengths(t *testing.T) {
	assert.Panics(t, func() { ggml.Q8_0.Quantize(make([]byte, 34), make([]float32, 33)) })
	assert.Panics(t, func() { ggml.Q8_0.Quantize(make([]byte, 33), make([]float32, 32)) })
	assert.Panics(t, func() { ggml.Q8_0.Dequantize(make([]float32, 32), make([]byte, 35)) })
	assert.Panics(t, func() { ggml.IQ1S.Quantize(make([]byte, 50), make([]float32, 256)) })
	for _, typ := range ggml.Types() {
		assert.Equal(t, -1, typ.Dequantize(nil, nil))
		if !typ.ReadOnly() {
			assert.Equal(t, -1, typ.Quantize(nil, nil))
		}
	}
}

// FuzzDequantize: any bytes are decoded, or refused for a scale, and what is decoded is finite but for MXFP4.
func FuzzDequantize(f *testing.F) {
	for _, typ := range ggml.Types() {
		f.Add(uint32(typ), []byte(strings.Repeat("\x35\xa7\x21\x00\xff", 60)))
	}
	f.Fuzz(func(t *testing.T, number uint32, b []byte) {
		typ := ggml.Types()[int(number%uint32(len(ggml.Types())))]
		b = b[:len(b)/typ.Bytes()*typ.Bytes()]
		y := make([]float32, len(b)/typ.Bytes()*typ.Elements())
		if typ.Dequantize(y, b) >= 0 || typ == ggml.MXFP4 { // whose largest scale makes infinities of its largest codes
			return
		}
		for i, v := range y {
			if v-v != 0 {
				t.Fatalf("%v: element %d is %v", typ, i, v)
			}
		}
	})
}

// FuzzQuantize: any finite elements get codes that decode to finite numbers, or a scale is refused.
func FuzzQuantize(f *testing.F) {
	for _, typ := range ggml.Types() {
		f.Add(uint32(typ), []byte(strings.Repeat("\x35\xa7\x21\x3d", 256)))
	}
	f.Fuzz(func(t *testing.T, number uint32, b []byte) {
		typ := ggml.Types()[int(number%uint32(len(ggml.Types())))]
		n := len(b) / 4 / typ.Elements() * typ.Elements()
		if typ.ReadOnly() || n == 0 {
			return
		}
		x := floats(b[:4*n])
		out, y := make([]byte, n/typ.Elements()*typ.Bytes()), make([]float32, n)
		if typ.Quantize(out, x) >= 0 {
			return
		}
		if bad := typ.Dequantize(y, out); bad >= 0 {
			t.Fatalf("%v: block %d has no finite scale", typ, bad)
		}
	})
}
