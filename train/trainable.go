package train

import (
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// trainable is a tensor of the adapter's file that the step changes, with its gradient and Adam's moments, each in the
// order of the file.
type trainable struct {
	name                    string // in the file
	shape                   tensor.Shape
	value                   []float32
	gradient, first, second []float32
	// shares, where not nil, is the factor of a tied embedding whose value this one has, which is the file's matrix the
	// other way round; gradient and moments lie as the value does. So ensure_weight_tying works in PEFT: there are two
	// parameters over one storage, with gradients and moments of their own, and each of them steps it.
	shares *trainable
}

// factor is a view of a trainable as a matrix: element (i, j) is number offset + i*rowStride + j*colStride.
type factor struct {
	of                           *trainable
	offset, rowStride, colStride int
	rows, cols                   int
}

// lowRank adds scale * B·A to a matrix (out, in).
type lowRank struct {
	a, b      factor // rank x in, out x rank
	rank      int
	scale     float32
	magnitude *factor // of DoRA, out elements (of an embedding: width) as one column; else nil
}

// adaptation is what the adapter does to one parameter. A parameter that it leaves alone has none.
type adaptation struct {
	// value stands for the base's own; it is trained, or frozen where it is the base's matrix that the adapter brings.
	value *trainable
	// copied is such a matrix, or another value that the adapter brings and PEFT does not train. It is read where it lies,
	// as the base's own is.
	copied *formats.Tensor
	// rows are new values of the rows indices, in the order of the adapter's config; the trainable is (len(indices),
	// width).
	rows    *trainable
	indices []int
	// plain is the pair of factors of a matrix; experts has one an expert, nil where an expert has none.
	plain   *lowRank
	experts []*lowRank
	// bias is added to a bias, times biasScale.
	bias      *trainable
	biasScale float32
}

// matrix is a view of the values.
func (f factor) matrix() kernels.Mat { return f.in(f.of.value) }

// at is an element of the values.
func (f factor) at(i, j int) float32 { return f.of.value[f.offset+i*f.rowStride+j*f.colStride] }

// slope is a view of the gradient.
func (f factor) slope() kernels.Mat { return f.in(f.of.gradient) }

func (f factor) in(data []float32) kernels.Mat {
	return kernels.Mat{Data: data[f.offset:], Rows: f.rows, Cols: f.cols, RowStride: f.rowStride, ColStride: f.colStride}
}
