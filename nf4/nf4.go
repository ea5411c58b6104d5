// Package nf4 quantises to the 4-bit types NF4 and FP4 and back, bit for bit as bitsandbytes does, and quantises the
// scales of the blocks once more (double quantisation). Slices in, slices out: it knows nothing of files.
//
// The method is that of Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3. A tensor
// is a row of n elements, cut into blocks that run across its rows. Each block is divided by its largest magnitude,
// absmax, and every quotient is replaced by the index of the nearest of 16 values.
//
// A tensor may be worked through in pieces, so long as each piece but the last is made of whole blocks; the bytes are
// the same. All data is little-endian and may lie at any address.
//
// The functions panic if the lengths of their slices do not fit together or if a type or block size is none of those
// that are supported: that is a mistake of the program, not of its input. CheckBlockSize and tensor.DType.Float say
// what is supported.
package nf4

import (
	"fmt"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// Type is a 4-bit type.
type Type uint8

// NF4 has the quantiles of a normal distribution as its values; FP4 is a float of one sign, two exponent and one
// mantissa bits.
const (
	NF4 Type = iota
	FP4
)

// codebooks are those of bitsandbytes 0.50: float32, in index order. Its CPU kernels take index 8 of FP4 for -0 or +0;
// the quant_map it saves holds +0.
var codebooks = [...]*kernels.Codebook{
	NF4: kernels.NewCodebook([16]float32{
		-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
		-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0,
		0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
		0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
	}),
	FP4: kernels.NewCodebook([16]float32{
		0, 0.0052083334885537624, 0.6666666865348816, 1,
		0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
		0, -0.0052083334885537624, -0.6666666865348816, -1,
		-0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
	}),
}

// ParseType finds a type by what String returns.
func ParseType(s string) (Type, error) {
	for t := NF4; t <= FP4; t++ {
		if s == t.String() {
			return t, nil
		}
	}
	return 0, fmt.Errorf("unknown 4-bit type %q; known are %v and %v", s, NF4, FP4)
}

// String returns the name of the type in a quant_state: "nf4" or "fp4".
func (t Type) String() string {
	switch t {
	case NF4:
		return "nf4"
	case FP4:
		return "fp4"
	}
	return fmt.Sprintf("Type(%d)", uint8(t))
}

// Code returns a copy of the type's codebook: the values in index order, which is what a checkpoint stores as
// quant_map.
func (t Type) Code() *[16]float32 {
	code := codebooks[t].Code
	return &code
}

// CheckBlockSize returns an error unless n is a block size of bitsandbytes: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
func CheckBlockSize(n int) error {
	if n < 32 || n > 4096 || n&(n-1) != 0 {
		return fmt.Errorf("block size %d: want a power of two from 32 to 4096", n)
	}
	return nil
}

// Quantize quantises src: n elements of type dtype, which is F32, F16 or BF16. It sets packed, (n+1)/2 bytes with the
// first of two codes in the high nibble, and absmax, one for each block of blockSize elements. The last block may be
// short; only that of the tensor itself may be, as it follows a rule of its own.
//
// It returns the index of the first element that is NaN or infinite, -1 if there is none. The outputs are set in
// either case: the absmax of such a block is NaN or +Inf.
func (t Type) Quantize(packed []byte, absmax []float32, src []byte, dtype tensor.DType, blockSize int) (bad int) {
	return kernels.Quantize4(codebooks[t], packed, absmax, src, float(dtype), blockSize)
}

// Dequantize sets dst, n elements of type dtype (F32, F16 or BF16), to code[index] * absmax, computed in float32 and
// rounded to nearest even. The lengths of packed and absmax follow from n, which is len(dst) over the size of an
// element, as in Quantize.
func Dequantize(dst []byte, dtype tensor.DType, packed []byte, absmax []float32, code *[16]float32, blockSize int) {
	kernels.Dequantize4(dst, float(dtype), packed, absmax, code, blockSize)
}

func float(d tensor.DType) kernels.Float {
	switch d {
	case tensor.F32:
		return kernels.F32
	case tensor.F16:
		return kernels.F16
	case tensor.BF16:
		return kernels.BF16
	}
	panic(fmt.Sprintf("nf4: elements of type %v: want F32, F16 or BF16", d))
}
