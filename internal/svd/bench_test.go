package svd

import (
	"fmt"
	"testing"

	"github.com/lorakit/lorakit/internal/kernels"
)

// The shapes of a Llama of 1.1 B parameters; q and o, gate and up, down, k and v.
var llama = [][2]int{{2048, 2048}, {5632, 2048}, {2048, 5632}, {256, 2048}}

// difference is noise and eight strong directions that hold 99 % of the energy.
func difference(rows, cols int) []float32 {
	m := kernels.MatOf(gaussian(1, rows*cols, 1e-4), rows, cols)
	kernels.MulAdd(m, kernels.MatOf(gaussian(2, rows*8, 1e-3), rows, 8), kernels.MatOf(gaussian(3, 8*cols, 1), 8, cols))
	return m.Data
}

func BenchmarkTruncated(b *testing.B) {
	for _, shape := range llama {
		for name, data := range map[string][]float32{
			"difference": difference(shape[0], shape[1]),
			"noise":      gaussian(1, shape[0]*shape[1], 0.02),
		} {
			for _, rank := range []int{16, 64} {
				b.Run(fmt.Sprintf("%s/%dx%d/rank=%d", name, shape[0], shape[1], rank), func(b *testing.B) {
					m := Dense(data, shape[0], shape[1])
					b.SetBytes(int64(4 * shape[0] * shape[1]))
					for b.Loop() {
						if _, err := Truncated(background, m, Options{Rank: rank}); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}

// The parts of a decomposition.
func BenchmarkParts(b *testing.B) {
	const rows, cols, width = 5632, 2048, 16
	src, _ := open(Dense(difference(rows, cols), rows, cols))
	x, _, _ := orthonormal(kernels.MatOf(gaussian(4, cols*width, 1), cols, width), nil, false)
	for name, known := range map[string]bool{"first pass": false, "pass": true} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				k := newKrylov(src, 0)
				k.known = known
				if _, _, err := k.pass(background, x, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	for _, n := range []int{16, 64} {
		z := kernels.MatOf(gaussian(5, rows*n, 1), rows, n)
		b.Run(fmt.Sprintf("orthonormal %d", n), func(b *testing.B) {
			for b.Loop() {
				if _, _, err := orthonormal(clone(z), nil, false); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("householder %d", n), func(b *testing.B) {
			for b.Loop() {
				householder(wide(z))
			}
		})
	}
}

func BenchmarkProduct(b *testing.B) {
	left, right := kernels.MatOf(gaussian(1, 5632*16, 1), 5632, 16), kernels.MatOf(gaussian(2, 16*2048, 1), 16, 2048)
	for b.Loop() {
		if _, err := Product(left, right); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkValues(b *testing.B) {
	for _, shape := range [][2]int{{256, 2048}, {1024, 1024}} {
		b.Run(fmt.Sprint(shape), func(b *testing.B) {
			m := Dense(difference(shape[0], shape[1]), shape[0], shape[1])
			for b.Loop() {
				if _, err := Values(background, m, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkQR(b *testing.B) {
	m := Dense(gaussian(1, 2048*2048, 0.02), 2048, 2048)
	for b.Loop() {
		if _, _, err := QR(background, m, 16); err != nil {
			b.Fatal(err)
		}
	}
}
