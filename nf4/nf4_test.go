package nf4_test

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/tensor"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// quantize is the rule, one element after the other, in the words of the paper and of bitsandbytes: the slow way.
func quantize(typ nf4.Type, x []float32, blockSize int) (packed []byte, absmax []float32) {
	code := typ.Code()
	position := make([]int, 16)
	for i := range position {
		position[i] = i
	}
	slices.SortStableFunc(position, func(a, b int) int { return cmp.Compare(code[a], code[b]) })
	index := func(s float32) byte {
		rank := 0
		for i := range 15 {
			if (code[position[i]]+code[position[i+1]])/2 < s {
				rank++
			}
		}
		return byte(position[rank])
	}
	var indices []byte
	for block := range slices.Chunk(x, blockSize) {
		largest := float32(0)
		for _, v := range block {
			largest = max(largest, v, -v)
		}
		divisor := max(largest, 1e-38)
		if len(block) < blockSize {
			largest = divisor
		}
		absmax = append(absmax, largest)
		for _, v := range block {
			s := v / divisor
			if len(block) == blockSize {
				s = v * (1 / divisor)
			}
			indices = append(indices, index(max(min(s, 1), -1)))
		}
	}
	if len(indices)%2 == 1 {
		indices = append(indices, index(0))
	}
	for pair := range slices.Chunk(indices, 2) {
		packed = append(packed, pair[0]<<4|pair[1])
	}
	return packed, absmax
}

// elements draws up to 700 finite elements of a type and returns their bytes and their values.
func elements(t *rapid.T, dtype tensor.DType) (b []byte, x []float32) {
	n, seed := rapid.IntRange(0, 700).Draw(t, "n"), rapid.Uint64().Draw(t, "seed")
	scale := math.Ldexp(1, rapid.IntRange(-150, 125).Draw(t, "scale"))
	r := rand.New(rand.NewPCG(seed, 0))
	x = make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64() * scale)
		if dtype == tensor.F16 {
			x[i] = max(min(x[i], 60000), -60000)
		}
	}
	b = make([]byte, n*int(dtype.Bits()/8))
	require.NoError(t, tensor.Convert(b, dtype, bytes(x), tensor.F32))
	wide := make([]byte, 4*n)
	require.NoError(t, tensor.Convert(wide, tensor.F32, b, dtype))
	return b, floats(wide)
}

func drawn(t *rapid.T) (typ nf4.Type, dtype tensor.DType, blockSize int) {
	typ = rapid.SampledFrom([]nf4.Type{nf4.NF4, nf4.FP4}).Draw(t, "type")
	dtype = rapid.SampledFrom([]tensor.DType{tensor.F32, tensor.F16, tensor.BF16}).Draw(t, "dtype")
	return typ, dtype, 32 << rapid.IntRange(0, 7).Draw(t, "block")
}

func TestQuantizeFollowsTheRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		typ, dtype, blockSize := drawn(t)
		src, x := elements(t, dtype)
		wantPacked, wantAbsmax := quantize(typ, x, blockSize)
		packed, absmax := make([]byte, (len(x)+1)/2), make([]float32, (len(x)+blockSize-1)/blockSize)
		require.Equal(t, -1, typ.Quantize(packed, absmax, src, dtype, blockSize))
		require.True(t, slices.Equal(wantPacked, packed))
		require.True(t, slices.Equal(wantAbsmax, absmax))

		code, out := typ.Code(), make([]byte, len(src))
		nf4.Dequantize(out, dtype, packed, absmax, code, blockSize)
		want := make([]float32, len(x))
		for i := range want {
			want[i] = code[packed[i/2]>>(4-i%2*4)&15] * absmax[i/blockSize]
		}
		wantOut := make([]byte, len(src))
		require.NoError(t, tensor.Convert(wantOut, dtype, bytes(want), tensor.F32))
		require.Equal(t, wantOut, out)
	})
}

// TestTiles quantises a tensor in pieces of whole blocks.
func TestTiles(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		typ, dtype, blockSize := drawn(t)
		src, x := elements(t, dtype)
		size, n := int(dtype.Bits()/8), len(x)
		whole, wholeAbsmax := make([]byte, (n+1)/2), make([]float32, (n+blockSize-1)/blockSize)
		typ.Quantize(whole, wholeAbsmax, src, dtype, blockSize)
		out := make([]byte, len(src))
		nf4.Dequantize(out, dtype, whole, wholeAbsmax, typ.Code(), blockSize)

		packed, absmax := make([]byte, len(whole)), make([]float32, len(wholeAbsmax))
		tiled := make([]byte, len(src))
		for from := 0; from < n; {
			to := min(from+blockSize*rapid.IntRange(1, 5).Draw(t, "blocks"), n)
			p, a := packed[from/2:(to+1)/2], absmax[from/blockSize:(to+blockSize-1)/blockSize]
			typ.Quantize(p, a, src[from*size:to*size], dtype, blockSize)
			nf4.Dequantize(tiled[from*size:to*size], dtype, p, a, typ.Code(), blockSize)
			from = to
		}
		require.Equal(t, whole, packed)
		require.Equal(t, wholeAbsmax, absmax)
		require.Equal(t, out, tiled)
	})
}

func TestQuantizeReportsNotFinite(t *testing.T) {
	x := make([]float32, 200)
	x[150], x[70] = float32(math.Inf(-1)), float32(math.NaN())
	packed, absmax := make([]byte, 100), make([]float32, 4)
	require.Equal(t, 70, nf4.NF4.Quantize(packed, absmax, bytes(x), tensor.F32, 64))
	require.Equal(t, float32(math.Inf(1)), absmax[2])
	require.True(t, absmax[1] != absmax[1])
	require.Equal(t, float32(1e-38), absmax[3]) // the short block of zeros
	require.Zero(t, absmax[0])
	require.Equal(t, byte(0x77), packed[0])
	require.Equal(t, byte(0xff), packed[32])
	require.Equal(t, byte(0xf7), packed[75])
}

// quantizeAbsmax is the rule, with 255 comparisons an element.
func quantizeAbsmax(absmax []float32, offset float32) (q []byte, nested []float32) {
	values := nf4.DynamicMap()
	for block := range slices.Chunk(absmax, nf4.NestedBlockSize) {
		largest := float32(0)
		for _, a := range block {
			largest = max(largest, a-offset, offset-a)
		}
		divisor := max(largest, 1e-38)
		if len(block) < nf4.NestedBlockSize {
			largest = divisor
		}
		nested = append(nested, largest)
		for _, a := range block {
			s := (a - offset) / divisor
			if len(block) == nf4.NestedBlockSize {
				s = (a - offset) * (1 / divisor)
			}
			s = max(min(s, 1), -1)
			index := 0
			for i := range 255 {
				if (values[i]+values[i+1])/2 < s {
					index++
				}
			}
			q = append(q, byte(index))
		}
	}
	return q, nested
}

func TestQuantizeAbsmaxFollowsTheRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 1000).Draw(t, "n")
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		scale, spread := math.Ldexp(1, rapid.IntRange(-140, 120).Draw(t, "scale")), rapid.Float64Range(0, 8).Draw(t, "spread")
		absmax := make([]float32, n)
		for i := range absmax {
			absmax[i] = float32(scale * math.Exp(spread*r.NormFloat64()))
			if absmax[i] > math.MaxFloat32/4 {
				absmax[i] = 1
			}
		}
		var mean nf4.Mean
		mean.Add(absmax)
		offset := mean.Float32()
		wantQ, wantNested := quantizeAbsmax(absmax, offset)
		q, nested := make([]byte, n), make([]float32, (n+255)/256)
		nf4.QuantizeAbsmax(q, nested, absmax, offset)
		require.True(t, slices.Equal(wantQ, q))
		require.True(t, slices.Equal(wantNested, nested))

		// In pieces.
		q2, nested2 := make([]byte, n), make([]float32, len(nested))
		for from := 0; from < n; {
			to := min(from+256*rapid.IntRange(1, 2).Draw(t, "blocks"), n)
			nf4.QuantizeAbsmax(q2[from:to], nested2[from/256:(to+255)/256], absmax[from:to], offset)
			from = to
		}
		require.Equal(t, q, q2)
		require.Equal(t, nested, nested2)

		back := make([]float32, n)
		nf4.DequantizeAbsmax(back, q, nf4.DynamicMap(), nested, offset)
		for i, v := range back {
			product := nf4.DynamicMap()[q[i]] * nested[i/256]
			require.Equal(t, float32(product)+offset, v)
		}
	})
}

// TestAbsmaxTies gives the 8-bit search every threshold and its neighbours.
func TestAbsmaxTies(t *testing.T) {
	values := nf4.DynamicMap()
	absmax := []float32{1}
	want := []byte{255}
	for i := range 255 {
		middle := (values[i] + values[i+1]) / 2
		for _, v := range []float32{math.Nextafter32(middle, -1), middle, math.Nextafter32(middle, 1)} {
			absmax = append(absmax, v)
			index := byte(i)
			if v > middle {
				index++
			}
			want = append(want, index)
		}
	}
	for len(absmax)%256 != 0 { // so that each block has a scale of 1
		absmax, want = append(absmax, 1), append(want, 255)
	}
	absmax[256], want[256] = 1, 255
	absmax[512], want[512] = -1, 0
	q, nested := make([]byte, len(absmax)), make([]float32, len(absmax)/256)
	nf4.QuantizeAbsmax(q, nested, absmax, 0)
	require.Equal(t, []float32{1, 1, 1}, nested)
	require.Equal(t, want, q)
}

func TestAbsmaxNotFinite(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	for _, n := range []int{256, 100} {
		absmax := make([]float32, n)
		q, nested := make([]byte, n), make([]float32, 1)
		absmax[3] = -nan
		nf4.QuantizeAbsmax(q, nested, absmax, 0)
		require.Equal(t, uint32(0x7fc00000), math.Float32bits(nested[0]))
		require.Equal(t, slices.Repeat([]byte{255}, n), q)

		absmax[3] = inf
		nf4.QuantizeAbsmax(q, nested, absmax, inf) // infinity from infinity
		require.Equal(t, uint32(0x7fc00000), math.Float32bits(nested[0]))
		nf4.QuantizeAbsmax(q, nested, absmax, 1)
		require.Equal(t, inf, nested[0])
		require.Equal(t, byte(255), q[3])
		require.Equal(t, byte(127), q[4])
		nf4.DequantizeAbsmax(absmax, q, nf4.DynamicMap(), nested, 1)
		require.Equal(t, uint32(0x7fc00000), math.Float32bits(absmax[4])) // 0 * infinity
	}
}

func TestMean(t *testing.T) {
	var m nf4.Mean
	require.Zero(t, m.Float32())
	m.Add([]float32{1, 2})
	m.Add(nil)
	m.Add([]float32{6})
	require.Equal(t, float32(3), m.Float32())
	m = nf4.Mean{}
	m.Add(slices.Repeat([]float32{3e38}, 10)) // past a float32, not past a float64
	require.Equal(t, float32(3e38), m.Float32())
}

func TestParse(t *testing.T) {
	for _, typ := range []nf4.Type{nf4.NF4, nf4.FP4} {
		got, err := nf4.ParseType(typ.String())
		require.NoError(t, err)
		require.Equal(t, typ, got)
	}
	_, err := nf4.ParseType("int4")
	require.EqualError(t, err, `unknown 4-bit type "int4"; known are nf4 and fp4`)
	require.Equal(t, "Type(7)", nf4.Type(7).String())
	require.False(t, math.Signbit(float64(nf4.FP4.Code()[8])))

	for n := 32; n <= 4096; n *= 2 {
		require.NoError(t, nf4.CheckBlockSize(n))
	}
	for _, n := range []int{-64, 0, 1, 16, 48, 63, 8192, math.MinInt} {
		require.ErrorContains(t, nf4.CheckBlockSize(n), "want a power of two from 32 to 4096")
	}
}

func TestCopies(t *testing.T) {
	nf4.NF4.Code()[0] = 5
	require.Equal(t, float32(-1), nf4.NF4.Code()[0])
	nf4.DynamicMap()[0] = 5
	require.Equal(t, float32(-0.99296875), nf4.DynamicMap()[0])
}

func TestPanics(t *testing.T) {
	b, f := make([]byte, 256), make([]float32, 2)
	for _, run := range []func(){
		func() { nf4.NF4.Quantize(b[:64], f, b, tensor.I16, 64) },
		func() { nf4.Type(2).Quantize(b[:64], f, b, tensor.BF16, 64) },
		func() { nf4.NF4.Quantize(b[:64], f, b, tensor.BF16, 65) },
		func() { nf4.NF4.Quantize(b[:60], f, b, tensor.BF16, 64) },
		func() { nf4.Dequantize(b, tensor.BF16, b[:64], f[:1], nf4.NF4.Code(), 64) },
		func() { nf4.QuantizeAbsmax(b, f[:1], make([]float32, 255), 0) },
		func() { nf4.QuantizeAbsmax(b, f, make([]float32, 256), 0) },
		func() { nf4.DequantizeAbsmax(make([]float32, 256), b, nf4.DynamicMap(), nil, 0) },
	} {
		require.Panics(t, run)
	}
}

// FuzzQuantize holds Quantize against the rule for any bytes.
func FuzzQuantize(f *testing.F) {
	cases, tensors := golden(f)
	for i, c := range cases {
		if i%9 == 0 {
			f.Add(tensors[c.Name+".input"][:60], uint8(i), uint8(i))
		}
	}
	f.Fuzz(func(t *testing.T, src []byte, kind, block uint8) {
		typ := nf4.Type(kind % 2)
		dtype := []tensor.DType{tensor.F32, tensor.F16, tensor.BF16}[kind/2%3]
		size, blockSize := int(dtype.Bits()/8), 32<<(block%8)
		n := len(src) / size
		src = src[:n*size]
		wide := make([]byte, 4*n)
		require.NoError(t, tensor.Convert(wide, tensor.F32, src, dtype))
		x := floats(wide)
		packed, absmax := make([]byte, (n+1)/2), make([]float32, (n+blockSize-1)/blockSize)
		bad := typ.Quantize(packed, absmax, src, dtype, blockSize)
		require.Equal(t, slices.IndexFunc(x, func(v float32) bool { return v-v != 0 }), bad)
		if bad < 0 {
			wantPacked, wantAbsmax := quantize(typ, x, blockSize)
			require.True(t, slices.Equal(wantPacked, packed))
			require.True(t, slices.Equal(wantAbsmax, absmax))
		}
	})
}

func BenchmarkAbsmax(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	absmax := make([]float32, 1<<16)
	for i := range absmax {
		absmax[i] = 0.05 + 0.01*float32(r.NormFloat64())
	}
	q, nested := make([]byte, len(absmax)), make([]float32, len(absmax)/256)
	b.Run("quantize", func(b *testing.B) {
		b.SetBytes(int64(4 * len(absmax)))
		for b.Loop() {
			nf4.QuantizeAbsmax(q, nested, absmax, 0.05)
		}
	})
	b.Run("dequantize", func(b *testing.B) {
		code := nf4.DynamicMap()
		b.SetBytes(int64(4 * len(absmax)))
		for b.Loop() {
			nf4.DequantizeAbsmax(absmax, q, code, nested, 0.05)
		}
	})
}
