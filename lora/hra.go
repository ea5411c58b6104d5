package lora

import (
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// HRA (Yuan et al., "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
// Adaptation", 2024) reflects the inputs of a module r times: W·(I - 2u₁u₁ᵀ)·(I - 2u₂u₂ᵀ)·… of
// vectors of length 1; or with apply_GS W·(I - 2UUᵀ) of what Gram and Schmidt make of them.

func init() {
	parsers[hra] = func(c *Config) error {
		r, _, err := c.hraOptions()
		c.Rank, c.Alpha = int(r), float64(r) // nothing is scaled
		return err
	}
}

func (c *Config) hraOptions() (r int64, orthogonal bool, err error) {
	if r, err = c.fields.whole("r", 8, 1); err == nil {
		orthogonal, err = c.fields.truth("apply_GS", false)
	}
	return r, orthogonal, err
}

// hra makes a module of hra_u (inputs, r).
func (c *Config) hra(name string, p parts) (*Module, error) {
	r, orthogonal, err := c.hraOptions()
	if err != nil {
		return nil, err
	}
	u := p["hra_u"]
	if len(u.Shape) != 2 || u.Shape[0] < 1 || u.Shape[1] != r {
		return nil, fmt.Errorf("%w: it has %v, expected hra_u (inputs, %d)", ErrMalformed, p, r)
	}
	if orthogonal && r > u.Shape[0] {
		return nil, fmt.Errorf("%w: it has %v, of which apply_GS makes no orthogonal vectors: they are more than "+
			"the inputs", ErrMalformed, p)
	}
	return transformed(name, u, &hraTransform{u: u, orthogonal: orthogonal}), nil
}

// hraTransform is that of HRA.
type hraTransform struct {
	u                    *formats.Tensor
	orthogonal, inverted bool
}

// Fit holds the vectors against the inputs.
func (x *hraTransform) Fit(_, inputs int64) error {
	if x.u.Shape[0] != inputs {
		return fmt.Errorf("%w: its vectors have %d elements, one for each input", ErrBase, x.u.Shape[0])
	}
	return nil
}

// reflectionsAtOnce is how many reflections are made into one pair of factors at most, the work of which grows with
// their square.
const reflectionsAtOnce = 64

// Bytes is the memory of the vectors as the file has them, in float64, and of two factors.
func (x *hraTransform) Bytes(int64) int64 { return (4 + 8 + 8) * x.u.Count() }

// Load makes the factors.
func (x *hraTransform) Load(int64) (RowMap, error) {
	v, err := Floats(x.u)
	if err != nil {
		return nil, err
	}
	n, r := int(x.u.Shape[0]), int(x.u.Shape[1])
	u := make([][]float64, r)
	for k := range u {
		u[k] = make([]float64, n)
		for i := range n {
			u[k][i] = float64(v[i*r+k])
		}
		was := normalise(u[k])
		for j := 0; j < k && x.orthogonal; j++ {
			d := dot(u[j], u[k])
			for i, f := range u[j] {
				u[k][i] -= float64(d * f)
			}
		}
		left := 1.0
		if x.orthogonal {
			left = normalise(u[k])
		}
		if !(was > 0 && was <= math.MaxFloat64 && left > 1e-5) {
			return nil, fmt.Errorf("%s: tensor %s: %w: its vector %d is 0, or not apart from those before it", x.u.File,
				tensor.Quote(x.u.Name), ErrMalformed, k)
		}
	}
	if x.inverted { // each is its own inverse
		slices.Reverse(u)
	}
	var maps rowMaps
	for part := range slices.Chunk(u, min(reflectionsAtOnce, n)) {
		maps = append(maps, newReflections(part, x.orthogonal))
	}
	return maps, nil
}

// Inverse reflects in the other order.
func (x *hraTransform) Inverse() (Transform, error) {
	inverse := *x
	inverse.inverted = !x.inverted
	return &inverse, nil
}

// reflections adds (W·U)·V to rows: the product of some reflections is I + U·V, where V is a triangle times -Uᵀ
// (Schreiber and Van Loan, "A Storage-Efficient WY Representation for Products of Householder Transformations",
// 1989).
type reflections struct{ u, v kernels.Mat } // (inputs x some), (some x inputs)

// newReflections makes the factors of reflections at vectors of length 1, of which orthogonal ones may be taken at
// once.
func newReflections(u [][]float64, orthogonal bool) *reflections {
	k, n := len(u), len(u[0])
	x := &reflections{kernels.NewMat(n, k), kernels.NewMat(k, n)}
	triangle := make([]float64, k*k)
	for i := range k {
		triangle[i*k+i] = 2
		if orthogonal {
			continue
		}
		d := make([]float64, i) // Uᵀu
		for j := range d {
			d[j] = dot(u[j], u[i])
		}
		for j := range i {
			sum := 0.0
			for l := j; l < i; l++ {
				sum += float64(triangle[j*k+l] * d[l])
			}
			triangle[j*k+i] = -2 * sum
		}
	}
	row := make([]float64, n)
	for i := range k {
		clear(row)
		for l := i; l < k; l++ {
			for c, f := range u[l] {
				row[c] -= float64(triangle[i*k+l] * f)
			}
		}
		for c := range n {
			x.u.Data[c*k+i], x.v.Data[i*n+c] = float32(u[i][c]), float32(row[c])
		}
	}
	return x
}

// Apply reflects rows.
func (x *reflections) Apply(rows kernels.Mat, _ int64, room []float32) {
	part := kernels.MatOf(room[:rows.Rows*x.u.Cols], rows.Rows, x.u.Cols)
	clear(part.Data)
	kernels.MulAdd(part, rows, x.u)
	kernels.MulAdd(rows, part, x.v)
}

// dot is the inner product of two vectors, in their order.
func dot(x, y []float64) float64 {
	sum := 0.0
	for i, f := range x {
		sum += float64(f * y[i])
	}
	return sum
}

// normalise gives a vector the length 1, unless it is 0, and returns the length that it had.
func normalise(x []float64) float64 {
	length := math.Sqrt(dot(x, x))
	for i := range x {
		if length > 0 {
			x[i] /= length
		}
	}
	return length
}
