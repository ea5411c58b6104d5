package nf4

import (
	"fmt"
	"math"
	"slices"
	"sync"
)

// NestedBlockSize is the number of absmax that share one scale in double quantisation.
const NestedBlockSize = 256

// DynamicMap returns a copy of the values of the 8-bit codes, in rising order: what a checkpoint stores as
// nested_quant_map.
func DynamicMap() *[256]float32 {
	m := dynamic().value
	return &m
}

// A Mean is the mean of the absmax of a whole tensor: the offset of its double quantisation. The zero Mean is ready
// for use.
type Mean struct {
	sum   float64
	count int64
}

// Add takes up the absmax of the next blocks. The order of the blocks matters for the last bits; how they are cut into
// calls does not.
func (m *Mean) Add(absmax []float32) {
	sum := m.sum
	for _, a := range absmax {
		sum += float64(a)
	}
	m.sum = sum
	m.count += int64(len(absmax))
}

// Float32 returns the mean, rounded once; 0 if there were no blocks.
func (m *Mean) Float32() float32 {
	if m.count == 0 {
		return 0
	}
	return float32(m.sum / float64(m.count))
}

// QuantizeAbsmax quantises absmax - offset to 8 bits: one byte of q an absmax, and one nested absmax for each
// NestedBlockSize of them. The last block may be short, if it is the last one of the tensor. A block that holds no
// number has NaN for its nested absmax and 255 for its codes.
func QuantizeAbsmax(q []byte, nested []float32, absmax []float32, offset float32) {
	checkNested(q, nested, absmax)
	m := dynamic()
	for b := range nested {
		from := b * NestedBlockSize
		to := min(from+NestedBlockSize, len(absmax))
		m.quantizeBlock(q[from:to], &nested[b], absmax[from:to], offset)
	}
}

// quantizeBlock follows the rule of the 4-bit blocks: a full block is multiplied by a reciprocal, a short one divided,
// and the divisor never below 1e-38.
func (m *dynamicMap) quantizeBlock(q []byte, nested *float32, absmax []float32, offset float32) {
	largest := uint32(0) // as bits, where a NaN is above all numbers
	for _, a := range absmax {
		largest = max(largest, math.Float32bits(a-offset)&^(1<<31))
	}
	scale := math.Float32frombits(min(largest, nanBits))
	divisor := scale
	if divisor < 1e-38 { // a NaN stays what it is
		divisor = 1e-38
	}
	*nested = scale
	var s [NestedBlockSize]float32
	if len(q) < NestedBlockSize {
		*nested = divisor
		for i, a := range absmax {
			s[i] = (a - offset) / divisor
		}
	} else {
		reciprocal := 1 / divisor
		for i, a := range absmax {
			s[i] = (a - offset) * reciprocal
		}
	}
	m.search(q, s[:len(q)])
}

// DequantizeAbsmax sets absmax to code[q]*nested + offset: float32, each of the two operations rounded. The first
// absmax is the first of its nested block.
func DequantizeAbsmax(absmax []float32, q []byte, code *[256]float32, nested []float32, offset float32) {
	checkNested(q, nested, absmax)
	for b, scale := range nested {
		from := b * NestedBlockSize
		to := min(from+NestedBlockSize, len(absmax))
		out, in := absmax[from:to], q[from:to]
		for i := range out {
			x := float32(code[in[i]]*scale) + offset
			if x != x { // processors differ in the sign of a NaN
				x = math.Float32frombits(nanBits)
			}
			out[i] = x
		}
	}
}

func checkNested(q []byte, nested, absmax []float32) {
	if len(q) != len(absmax) || len(nested) != (len(q)+NestedBlockSize-1)/NestedBlockSize {
		panic(fmt.Sprintf("nf4: %d 8-bit codes and %d nested absmax for %d absmax", len(q), len(nested), len(absmax)))
	}
}

const nanBits = 0x7fc00000

// A dynamicMap is the 8-bit code with what is needed to search it.
type dynamicMap struct {
	value [256]float32
	// threshold[i], as order has it, lies halfway between values i and i+1. The last is above everything.
	threshold [256]int64
	// below has the number of thresholds below each bucket: one for each value of the upper 15 bits of order. No bucket
	// holds two thresholds.
	below [1 << 15]uint8
}

// dynamic makes the map by its rule. There are seven decades, the last one reaching from 0.1 to 1. Decade i is cut at
// 2^i + 1 evenly spaced places; the means of neighbours are its values, of either sign. 0 and 1 make it 256.
var dynamic = sync.OnceValue(func() *dynamicMap {
	m := &dynamicMap{}
	values := append(m.value[:0], 0, 1)
	for i := range 7 {
		steps := 1 << i
		step := float32(0.9) / float32(steps)
		cut := func(j int) float32 {
			// As torch.linspace, from the nearer end. The sums are exact in float64, so these are fused multiply-adds of
			// float32.
			if j < (steps+1)/2 {
				return float32(float64(step)*float64(j) + float64(float32(0.1)))
			}
			return float32(1 - float64(step)*float64(steps-j))
		}
		for j := range steps {
			v := float32((cut(j)+cut(j+1))/2) * float32(math.Pow10(i-6))
			values = append(values, v, -v)
		}
	}
	slices.Sort(values)
	for i := range 255 {
		m.threshold[i] = order((m.value[i] + m.value[i+1]) / 2)
	}
	m.threshold[255] = math.MaxInt32
	below := 0
	for b := range m.below {
		for bucket(m.threshold[below]) < b && below < 255 {
			below++
		}
		m.below[b] = uint8(below)
	}
	return m
})

// order returns an integer that compares as the float does, but -0 is below 0, which no threshold is. A NaN is above
// all numbers.
func order(s float32) int64 {
	if s != s {
		return math.MaxInt32
	}
	b := int32(math.Float32bits(s))
	return int64(b ^ b>>31&math.MaxInt32)
}

func bucket(order int64) int { return int(order>>17) + 1<<14 }

// search sets each code to the number of thresholds below an element of s: the code of the nearest value. A tie stays
// low; a NaN counts as above them all. No branch depends on an element, as none could be predicted.
func (m *dynamicMap) search(q []byte, s []float32) {
	for i, x := range s {
		k := order(x)
		n := m.below[bucket(k)&(1<<15-1)]
		q[i] = n + uint8((m.threshold[n]-k)>>63&1)
	}
}
