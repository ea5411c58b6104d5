package nf4_test

import (
	"encoding/binary"
	"fmt"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/tensor"
)

func Example() {
	const blockSize = 64
	weights := []float32{0.5, -0.25, 0.125, 0.0625}
	src, err := binary.Append(nil, binary.LittleEndian, weights)
	if err != nil {
		panic(err)
	}

	packed := make([]byte, (len(weights)+1)/2)
	absmax := make([]float32, (len(weights)+blockSize-1)/blockSize)
	if bad := nf4.NF4.Quantize(packed, absmax, src, tensor.F32, blockSize); bad >= 0 {
		panic(fmt.Sprintf("element %d is not finite", bad))
	}
	fmt.Printf("packed %x, absmax %v\n", packed, absmax)

	nf4.Dequantize(src, tensor.F32, packed, absmax, nf4.NF4.Code(), blockSize)
	if _, err := binary.Decode(src, binary.LittleEndian, weights); err != nil {
		panic(err)
	}
	fmt.Println(weights)
	// Output:
	// packed f2a9, absmax [0.5]
	// [0.5 -0.26253653 0.12305615 0.0804651]
}

// The absmax of the blocks, 4 bytes each, shrink to a little more than one.
func ExampleQuantizeAbsmax() {
	absmax := []float32{0.05, 0.0625, 0.045, 0.055}
	var mean nf4.Mean
	mean.Add(absmax)
	offset := mean.Float32()

	q := make([]byte, len(absmax))
	nested := make([]float32, (len(absmax)+nf4.NestedBlockSize-1)/nf4.NestedBlockSize)
	nf4.QuantizeAbsmax(q, nested, absmax, offset)
	nf4.DequantizeAbsmax(absmax, q, nf4.DynamicMap(), nested, offset)
	fmt.Println(q, absmax)
	// Output:
	// [47 255 9 198] [0.05001221 0.0625 0.045002446 0.05505127]
}
