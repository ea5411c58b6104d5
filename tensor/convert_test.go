package tensor

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/big"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/x448/float16"
	"pgregory.net/rapid"
)

func f64(x ...float64) []byte { b, _ := binary.Append(nil, binary.LittleEndian, x); return b }
func f32(x ...float32) []byte { b, _ := binary.Append(nil, binary.LittleEndian, x); return b }
func u16(x ...uint16) []byte  { b, _ := binary.Append(nil, binary.LittleEndian, x); return b }

// rounded returns x rounded to nearest even to a format with the given precision, least exponent of a normal number,
// and largest number, by arbitrary-precision arithmetic.
func rounded(x float64, precision uint, minExponent int, largest float64) float64 {
	if x == 0 || math.IsInf(x, 0) || math.IsNaN(x) {
		return x
	}
	_, e := math.Frexp(x) // x = f * 2^e with f in [0.5, 1)
	unit := math.Ldexp(1, max(e-1, minExponent)-int(precision)+1)
	q := new(big.Rat).Quo(new(big.Rat).SetFloat64(math.Abs(x)), new(big.Rat).SetFloat64(unit))
	floor := new(big.Int).Quo(q.Num(), q.Denom())
	rest := new(big.Rat).Sub(q, new(big.Rat).SetInt(floor))
	if c := rest.Cmp(big.NewRat(1, 2)); c > 0 || c == 0 && floor.Bit(0) == 1 {
		floor.Add(floor, big.NewInt(1))
	}
	f, _ := new(big.Float).SetInt(floor).Float64()
	y := f * unit
	if y > largest {
		y = math.Inf(1)
	}
	return math.Copysign(y, x)
}

// interesting draws floats whose rounding is delicate: near ties of the short types, near their limits, and anything
// else.
func interesting() *rapid.Generator[float64] {
	return rapid.Custom(func(t *rapid.T) float64 {
		if rapid.Bool().Draw(t, "any") {
			return math.Float64frombits(rapid.Uint64().Draw(t, "bits"))
		}
		// A 16-bit number or the middle of two, and a little beside it.
		h := rapid.Uint16().Draw(t, "half")
		x := float64(float16.Frombits(h).Float32())
		y := float64(float16.Frombits(h + 1).Float32())
		if rapid.Bool().Draw(t, "bf16") {
			x = float64(math.Float32frombits(uint32(h) << 16))
			y = float64(math.Float32frombits(uint32(h+1) << 16))
		}
		if rapid.Bool().Draw(t, "middle") {
			x = x/2 + y/2
		}
		return x * (1 + float64(rapid.IntRange(-2, 2).Draw(t, "ulps"))*0x1p-52)
	})
}

func TestConvertFromF64RoundsOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := interesting().Draw(t, "x")
		out := make([]byte, 2)
		require.NoError(t, Convert(out, F16, f64(x), F64))
		got := float64(float16.Frombits(binary.LittleEndian.Uint16(out)).Float32())
		want := rounded(x, 11, -14, 65504)
		require.True(t, same(want, got), "F16 of %x: %x, want %x", x, got, want)

		require.NoError(t, Convert(out, BF16, f64(x), F64))
		got = float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(out)) << 16))
		want = rounded(x, 8, -126, 0x1.fep127)
		require.True(t, same(want, got), "BF16 of %x: %x, want %x", x, got, want)

		out = make([]byte, 4)
		require.NoError(t, Convert(out, F32, f64(x), F64))
		require.True(t, same(float64(float32(x)), float64(math.Float32frombits(binary.LittleEndian.Uint32(out)))))
	})
}

func same(a, b float64) bool {
	return a != a && b != b || math.Float64bits(a) == math.Float64bits(b)
}

func TestConvertKnown(t *testing.T) {
	for _, c := range []struct {
		to, from    DType
		dst, from64 []byte
	}{
		// Rounded by way of float32, the first would be a tie and end on 0x3c00.
		{F16, F64, u16(0x3c01), f64(1 + 0x1p-11 + 0x1p-40)},
		{F16, F64, u16(0x3c00), f64(1 + 0x1p-11)},
		{BF16, F64, u16(0x3f81), f64(1 + 0x1p-8 + 0x1p-40)},
		{BF16, F64, u16(0x3f80), f64(1 + 0x1p-8)},
		{F16, F64, u16(0x7bff, 0x7c00, 0xfc00), f64(65519.999, 65520, math.Inf(-1))},
		{BF16, F64, u16(0x7f80, 0x7f7f), f64(1e300, 0x1.fep127)},
		{F16, F64, u16(0x0001, 0x0000, 0x8000), f64(0x1.0000001p-25, 0x1p-25, math.Copysign(0, -1))},
		{F32, F64, f32(0.1), f64(0.1)},
		{F64, F16, f64(1, -65504, 0x1p-24), u16(0x3c00, 0xfbff, 0x0001)},
		{F64, BF16, f64(1, -0x1p-133), u16(0x3f80, 0x8001)},
		{F64, F32, f64(float64(float32(0.1))), f32(0.1)},
		{F64, F64, f64(0.1), f64(0.1)},
		{BF16, F16, u16(0x3f80), u16(0x3c00)},
		{F16, BF16, u16(0x3c00), u16(0x3f80)},
		{BF16, F32, u16(0x3f80, 0x3f82), f32(1+0x1p-8, 1+3*0x1p-8)},
	} {
		dst := make([]byte, len(c.dst))
		require.NoError(t, Convert(dst, c.to, c.from64, c.from))
		require.Equal(t, c.dst, dst, "%v to %v: %x", c.from, c.to, c.from64)
	}
}

func TestConvertCrossesChunks(t *testing.T) {
	var src []byte
	for i := range 2*chunk + 7 {
		src = append(src, f64(float64(i))...)
	}
	back := make([]byte, len(src))
	for _, d := range []DType{F32, F16} {
		short := make([]byte, len(src)/8*int(d.Bits()/8))
		require.NoError(t, Convert(short, d, src, F64))
		require.NoError(t, Convert(back, F64, short, d))
		if d == F32 {
			require.Equal(t, src, back)
		}
		require.Equal(t, src[:8*2048], back[:8*2048])
	}
}

func TestConvertErrors(t *testing.T) {
	require.ErrorContains(t, Convert(nil, I8, nil, F32), "cannot convert F32 to I8: only F64, F32, F16 and BF16")
	require.ErrorContains(t, Convert(nil, F32, nil, 0), "cannot convert")
	require.ErrorContains(t, Convert(make([]byte, 4), F32, make([]byte, 3), F16), "3 bytes of F16 into 4 bytes of F32")
	require.ErrorContains(t, Convert(make([]byte, 4), F32, make([]byte, 4), F16), "4 bytes of F16 into 4 bytes of F32")
	require.ErrorContains(t, Convert(make([]byte, 4), F32, make([]byte, 8), F32), "8 bytes of F32 into 4 bytes of F32")
}

func TestTranspose(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		elem := rapid.SampledFrom([]int{1, 2, 4, 8}).Draw(t, "elem")
		rows, cols := rapid.IntRange(0, 80).Draw(t, "rows"), rapid.IntRange(0, 80).Draw(t, "cols")
		src := make([]byte, rows*cols*elem)
		for i := range src {
			src[i] = byte(i*7 + i>>8)
		}
		dst := make([]byte, len(src))
		Transpose(dst, src, rows, cols, elem)
		for r := range rows {
			for c := range cols {
				from, to := (r*cols+c)*elem, (c*rows+r)*elem
				require.Equal(t, src[from:from+elem], dst[to:to+elem])
			}
		}
	})
	require.Panics(t, func() { Transpose(make([]byte, 6), make([]byte, 6), 2, 1, 3) })
	require.Panics(t, func() { Transpose(make([]byte, 6), make([]byte, 6), 2, 2, 1) })
	require.Panics(t, func() { Transpose(make([]byte, 4), make([]byte, 6), 2, 3, 1) })
	require.Panics(t, func() { Transpose(nil, nil, math.MaxInt, math.MaxInt, 1) })
	require.Panics(t, func() { Transpose(make([]byte, 2), make([]byte, 2), -1, -2, 1) })
}

func BenchmarkTranspose(b *testing.B) {
	for _, elem := range []int{1, 2, 4, 8} {
		for _, cols := range []int{768, 1024} {
			b.Run(fmt.Sprintf("%dbytes/512x%d", elem, cols), func(b *testing.B) {
				src, dst := make([]byte, 512*cols*elem), make([]byte, 512*cols*elem)
				b.SetBytes(int64(len(src)))
				best := time.Hour
				for b.Loop() {
					start := time.Now()
					Transpose(dst, src, 512, cols, elem)
					best = min(best, time.Since(start))
				}
				b.ReportMetric(float64(len(src))/best.Seconds()/1e6, "best-MB/s")
			})
		}
	}
}
