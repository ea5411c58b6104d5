package kernels

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/x448/float16"
)

// twin is the set of plain Go that all others have to equal.
var twin = &Set{name: "purego"}

var types = []Float{F32, F16, BF16}

// canary is what follows every output; nothing may write there.
var canary = bytes.Repeat([]byte{0xa5}, 64)

// output returns n bytes at an odd address, followed by canaries.
func output(n int) []byte {
	b := append(make([]byte, n+1), canary...)
	return b[1 : n+1 : len(b)]
}

func intact(b []byte) bool { return bytes.Equal(b[len(b):cap(b)], canary) }

func outputFloats(n int) []float32 {
	f := make([]float32, n+1)
	f[n] = 0.5
	return f[:n]
}

func intactFloats(f []float32) bool { return f[:len(f)+1][len(f)] == 0.5 }

func float32Bits(f []float32) []uint32 {
	b := make([]uint32, len(f))
	for i, x := range f {
		b[i] = math.Float32bits(x)
	}
	return b
}

// unaligned returns a copy of b at an odd address.
func unaligned(b []byte) []byte { return append(make([]byte, 1, len(b)+1), b...)[1:] }

// equalQuantize4 holds all sets against the twin, there and back.
func equalQuantize4(t *testing.T, c *Codebook, src []byte, from Float, blockSize int) {
	t.Helper()
	src = unaligned(src)
	n := len(src) / from.Size()
	blocks := (n + blockSize - 1) / blockSize
	packed, absmax := make([]byte, (n+1)/2), make([]float32, blocks)
	bad := twin.Quantize4(c, packed, absmax, src, from, blockSize)
	for _, s := range Sets() {
		p, a := output(len(packed)), outputFloats(blocks)
		require.Equal(t, bad, s.Quantize4(c, p, a, src, from, blockSize), s.name)
		require.True(t, slices.Equal(float32Bits(absmax), float32Bits(a)), s.name)
		require.Equal(t, packed, p, s.name)
		require.True(t, intact(p) && intactFloats(a), s.name)
	}
	equalDequantize4(t, packed, absmax, &c.Code, n, blockSize)
}

func equalDequantize4(t *testing.T, packed []byte, absmax []float32, code *[16]float32, n, blockSize int) {
	t.Helper()
	for _, to := range types {
		want := make([]byte, n*to.Size())
		twin.Dequantize4(want, to, packed, absmax, code, blockSize)
		for _, s := range Sets() {
			got := output(len(want))
			s.Dequantize4(got, to, unaligned(packed), absmax, code, blockSize)
			require.Equal(t, want, got, "%s %v", s.name, to)
			require.True(t, intact(got), "%s %v", s.name, to)
		}
	}
}

func equalRows8(t *testing.T, src []byte, from Float, cols int) {
	t.Helper()
	src = unaligned(src)
	n := len(src) / from.Size()
	rows := 0
	if cols > 0 {
		rows = n / cols
	}
	q, scb := make([]byte, n), make([]float32, rows)
	bad := twin.Quantize8(q, scb, src, from, cols)
	for _, s := range Sets() {
		q2, scb2 := output(n), outputFloats(rows)
		require.Equal(t, bad, s.Quantize8(q2, scb2, src, from, cols), s.name)
		require.True(t, slices.Equal(float32Bits(scb), float32Bits(scb2)), s.name)
		require.Equal(t, q, q2, s.name)
		require.True(t, intact(q2) && intactFloats(scb2), s.name)
	}
	equalDequantize8(t, q, scb, cols)
}

func equalDequantize8(t *testing.T, q []byte, scb []float32, cols int) {
	t.Helper()
	for _, to := range types {
		want := make([]byte, len(q)*to.Size())
		twin.Dequantize8(want, to, q, scb, cols)
		for _, s := range Sets() {
			got := output(len(want))
			s.Dequantize8(got, to, unaligned(q), scb, cols)
			require.Equal(t, want, got, "%s %v", s.name, to)
			require.True(t, intact(got), "%s %v", s.name, to)
		}
	}
}

func equalConvert(t *testing.T, src []byte, from Float) {
	t.Helper()
	src = unaligned(src)
	n := len(src) / from.Size()
	for _, to := range types {
		want := make([]byte, n*to.Size())
		twin.Convert(want, to, src, from)
		for _, s := range Sets() {
			got := output(len(want))
			s.Convert(got, to, src, from)
			require.Equal(t, want, got, "%s %v to %v", s.name, from, to)
			require.True(t, intact(got), "%s %v to %v", s.name, from, to)
		}
	}
}

func encode(f Float, x ...float32) []byte {
	b := make([]byte, len(x)*f.Size())
	for i, v := range x {
		store(b, f, i, v)
	}
	return b
}

var (
	inf = float32(math.Inf(1))
	nan = float32(math.NaN())
)

// lengths are around the vectors' and blocks' ends.
var lengths = []int{0, 1, 2, 3, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 1023, 1024, 1025, 1055, 4096, 4097,
	9001}

func random(n int, seed uint64) []float32 {
	r, x := rand.New(rand.NewPCG(seed, 1)), make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	return x
}

func TestSetsEqualTwin(t *testing.T) {
	for _, n := range lengths {
		for _, f := range types {
			src := encode(f, random(n, uint64(n))...)
			for blockSize := 32; blockSize <= maxBlockSize; blockSize *= 2 {
				equalQuantize4(t, nf4, src, f, blockSize)
				equalQuantize4(t, fp4, src, f, blockSize)
			}
			equalRows8(t, src, f, n)
			equalConvert(t, src, f)
		}
	}
}

// TestEveryHalf quantises and converts every 16-bit pattern.
func TestEveryHalf(t *testing.T) {
	src := make([]byte, 2<<16)
	for i := range 1 << 16 {
		binary.LittleEndian.PutUint16(src[2*i:], uint16(i))
	}
	for _, f := range []Float{F16, BF16} {
		equalConvert(t, src, f)
		for _, blockSize := range []int{32, 64, 512} {
			equalQuantize4(t, nf4, src, f, blockSize)
			equalQuantize4(t, fp4, src, f, blockSize)
		}
		equalRows8(t, src, f, 64)
	}
}

// TestTies scales blocks such that elements fall on a threshold exactly and on the floats beside it.
func TestTies(t *testing.T) {
	for _, c := range []*Codebook{nf4, fp4} {
		for _, scale := range []float32{1, 0.5, 0x1p-100, 0x1p-120, 0x1p100, 0x1p127, 1e-38, 3e-39, 1e-44, 0.3, 7.3} {
			var x []float32
			for rank, v := range c.thresholds[:15] {
				for _, near := range []float32{v, math.Nextafter32(v, -inf), math.Nextafter32(v, inf)} {
					x = append(x, near*scale)
					if scale == 1 {
						want := rank
						if near > v {
							want++
						}
						if c == fp4 && near > v && v == 0 {
							want = 8
						}
						require.Equal(t, byte(c.position[want]), c.index(near), "%v", near)
					}
				}
			}
			x = append(x, scale, -scale, 0, float32(math.Copysign(0, -1)))
			for len(x) < 64 {
				x = append(x, scale/2)
			}
			for _, f := range types {
				for blockSize := 32; blockSize <= 128; blockSize *= 2 {
					equalQuantize4(t, c, encode(f, x...), f, blockSize)
					equalQuantize4(t, c, encode(f, x[:49]...), f, blockSize)
				}
				equalRows8(t, encode(f, x...), f, 64)
			}
		}
	}
}

// TestIndexIsNearest holds bisection against the rule: the number of thresholds below.
func TestIndexIsNearest(t *testing.T) {
	for _, c := range []*Codebook{nf4, fp4} {
		for i := range 1 << 16 {
			s := math.Float32frombits(uint32(i) << 16)
			if s != s || s > 1 || s < -1 {
				continue
			}
			rank := 0
			for _, threshold := range c.thresholds[:15] {
				if threshold < s {
					rank++
				}
			}
			require.Equal(t, byte(c.position[rank]), c.index(s))
		}
	}
	require.True(t, nf4.bucketed)
	require.False(t, fp4.bucketed)
}

// TestSpread puts magnitudes of every size into blocks.
func TestSpread(t *testing.T) {
	for _, f := range types {
		for e := -149; e <= 127; e++ {
			x := random(160, uint64(e+200))
			for i := range x {
				x[i] *= float32(math.Ldexp(1, e-2))
			}
			equalQuantize4(t, nf4, encode(f, x...), f, 64)
			equalQuantize4(t, fp4, encode(f, x...), f, 64)
			equalRows8(t, encode(f, x...), f, 80)
			equalConvert(t, encode(f, x...), f)
		}
	}
}

func TestNotFinite(t *testing.T) {
	for _, f := range types {
		for _, v := range []float32{nan, -nan, inf, -inf, math.Float32frombits(0x7f800001),
			math.Float32frombits(0xffffffff)} {
			for _, at := range []int{0, 1, 31, 63, 64, 100, 191, 192, 208} {
				x := random(209, 5)
				x[at] = v
				src := encode(f, x...)
				equalQuantize4(t, nf4, src, f, 64)
				equalQuantize4(t, fp4, src, f, 64)
				equalRows8(t, src, f, 209)
				equalConvert(t, src, f)

				packed, absmax := make([]byte, 105), make([]float32, 4)
				require.Equal(t, at, Quantize4(nf4, packed, absmax, src, f, 64))
				index := func(i int) byte { return packed[i/2] >> (4 - i%2*4) & 15 }
				for i := at &^ 63; i < min(209, at&^63+64); i++ {
					switch {
					case v != v || i == at:
						require.Equal(t, byte(15), index(i), i)
					default:
						require.Equal(t, byte(7), index(i), i)
					}
				}
				require.Equal(t, byte(7), index(209)) // the zero that was appended
				if v != v {
					require.Equal(t, uint32(f32NaN), math.Float32bits(absmax[at/64]))
				} else {
					require.Equal(t, inf, absmax[at/64])
				}
			}
		}
	}
}

// TestDequantizeNotFinite decodes with scales and codes that a file may hold.
func TestDequantizeNotFinite(t *testing.T) {
	packed := make([]byte, 128)
	for i := range packed {
		packed[i] = byte(i * 37)
	}
	for _, v := range []float32{nan, inf, -inf, math.Float32frombits(0xff800001), math.MaxFloat32, -1, 1e-45, 0} {
		equalDequantize4(t, packed, []float32{1, v, 3e38, 2}, &nf4.Code, 256, 64)
		code := nf4.Code
		code[3] = v
		equalDequantize4(t, packed, []float32{1, 0, 3e38, inf}, &code, 256, 64)
		equalDequantize8(t, packed, []float32{1, v}, 64)
	}
	out := make([]byte, 128)
	Dequantize4(out[:64], F16, packed[:16], []float32{inf}, &nf4.Code, 32)
	require.Contains(t, string(out), "\x00\x7e") // 0 * infinity, without a sign
}

func TestQuantize8Known(t *testing.T) {
	x := []float32{1, -2, 0.5, 2, 0, 0, 0, 0, 65519, -1, 0, 0}
	q, scb := make([]byte, 12), make([]float32, 3)
	require.Equal(t, -1, Quantize8(q, scb, encode(F32, x...), F32, 4))
	require.Equal(t, []float32{2, 0, 65504}, scb)
	// 63.5 and 31.75 round to 64 and 32.
	require.Equal(t, []byte{64, 0x81, 32, 127, 0, 0, 0, 0, 127, 0, 0, 0}, q)

	// 65520 is past the middle of the largest float16 and the next power of two.
	x[9] = -65520
	require.Equal(t, 9, Quantize8(q, scb, encode(F32, x...), F32, 4))
	require.Equal(t, inf, scb[2])
	x[2] = nan
	require.Equal(t, 2, Quantize8(q, scb, encode(F32, x...), F32, 4))
	require.True(t, scb[0] != scb[0])

	out := make([]byte, 4)
	Dequantize8(out, F32, []byte{0x81}, []float32{2}, 1)
	require.Equal(t, encode(F32, -254*float32(1.0/127)), out)
}

// TestCasts holds the twin against math/big's rule by way of x448/float16 and against the definition of bfloat16.
func TestCasts(t *testing.T) {
	for h := range 1 << 16 {
		x := float16.Float16(h)
		got := f32FromF16(uint16(h))
		if x.IsNaN() {
			require.True(t, got != got)
			require.NotZero(t, math.Float32bits(got)&0x400000, "quiet")
			continue
		}
		require.Equal(t, math.Float32bits(x.Float32()), math.Float32bits(got))
		require.Equal(t, uint16(h), f16FromF32(got))
		// Around the middle between it and the next.
		if h&0x7fff < 0x7bff {
			next := float16.Float16(h + 1).Float32()
			middle := (got + next) / 2
			for _, v := range []float32{middle, math.Nextafter32(middle, inf), math.Nextafter32(middle, -inf)} {
				require.Equal(t, float16.Fromfloat32(v).Bits(), f16FromF32(v), "%v", v)
			}
		}
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 200000 {
		x := math.Float32frombits(r.Uint32())
		if x == x {
			require.Equal(t, float16.Fromfloat32(x).Bits(), f16FromF32(x))
		}
	}
	for _, c := range []struct{ in, out uint32 }{
		{0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81}, {0x3f807fff, 0x3f80},
		{0x7f7fffff, 0x7f80}, {0xff7f8000, 0xff80}, {0x7f800000, 0x7f80}, {0xff800000, 0xff80},
		{0x7f800001, 0x7fc0}, {0xffffffff, 0x7fc0}, {0x00000001, 0}, {0x80008000, 0x8000}, {0x00018000, 2}, {0x00008001, 1},
	} {
		require.Equal(t, uint16(c.out), bf16FromF32(math.Float32frombits(c.in)), "%08x", c.in)
	}
}

func TestPanics(t *testing.T) {
	b := make([]byte, 256)
	f := make([]float32, 4)
	for _, run := range []func(){
		func() { Quantize4(nf4, b[:64], f[:2], b, BF16, 48) },
		func() { Quantize4(nf4, b[:64], f[:2], b, BF16, 16) },
		func() { Quantize4(nf4, b[:64], f[:2], b, BF16, 8192) },
		func() { Quantize4(nf4, b[:64], f[:2], b, BF16, -64) },
		func() { Quantize4(nf4, b[:64], f[:1], b, BF16, 64) },
		func() { Quantize4(nf4, b[:63], f[:2], b, BF16, 64) },
		func() { Quantize4(nf4, b[:63], f[:2], b[:255], BF16, 64) },
		func() { Quantize4(nf4, b[:64], f[:2], b, floats, 64) },
		func() { Dequantize4(b, BF16, b[:64], f[:3], &nf4.Code, 64) },
		func() { Dequantize4(b, BF16, b[:65], f[:2], &nf4.Code, 64) },
		func() { Quantize8(b[:128], f, b, BF16, 31) },
		func() { Quantize8(b[:127], f, b, BF16, 32) },
		func() { Quantize8(b[:128], f[:3], b, BF16, 32) },
		func() { Quantize8(b[:128], f, b, BF16, 0) },
		func() { Quantize8(b[:128], f, b, BF16, -32) },
		func() { Dequantize8(b, BF16, b[:128], f, 64) },
		func() { Convert(b, F32, b, F16) },
		func() { Convert(b[:255], F32, b, F16) },
	} {
		require.Panics(t, run)
	}
}

func TestChoose(t *testing.T) {
	require.NoError(t, Err())
	require.Contains(t, Available(), Active())
	require.Equal(t, "purego", Available()[len(Available())-1])
	for _, name := range Available() {
		s, err := choose(name)
		require.NoError(t, err)
		require.Equal(t, name, s.Name())
	}
	s, err := choose("sse9")
	require.ErrorContains(t, err, `LORAKIT_KERNELS="sse9": this build and processor have`)
	require.True(t, slices.Contains(Available(), s.Name()))
}
