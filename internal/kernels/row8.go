package kernels

import "math"

// quantizeRow is the twin of Set.quantize8 for the elements of one row, and the only code for a row whose scale is
// zero or not finite. A product that is no number gives 0. The result is the index of the first element that is not
// finite as a float16, or -1.
func quantizeRow(q, src []byte, from Float, scb float32) (bad int) {
	bad = -1
	scale := rowScale(scb)
	for i := range q {
		w := f32FromF16(f16FromF32(widen(load(src, from, i), from)))
		if w-w != 0 && bad < 0 {
			bad = i
		}
		x := w * scale
		if x != x || scb == 0 {
			x = 0
		}
		q[i] = byte(int8(math.RoundToEven(float64(x))))
	}
	return bad
}

// dequantizeRow is the twin of Set.dequantize8 for the elements of one row.
func dequantizeRow(dst []byte, to Float, q []byte, scb float32) {
	var x [piece]float32
	for len(q) > 0 {
		n := min(len(q), piece)
		for i, v := range q[:n] {
			x[i] = product(product(float32(int8(v)), scb), 1.0/127)
		}
		storeAll(dst, to, x[:n])
		dst, q = dst[n*to.Size():], q[n:]
	}
}

// rowScale is what the elements of a row are multiplied by. PyTorch divides a number by a tensor as the tensor's
// reciprocal times the number: two roundings, which a division does not give.
func rowScale(scb float32) float32 { return product(1/scb, 127) }
