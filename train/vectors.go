package train

import "github.com/lorakit/lorakit/internal/kernels"

// row is a row of a matrix whose rows are contiguous.
func row(m kernels.Mat, i int) []float32 { return m.Data[i*m.RowStride:][:m.Cols] }

func clearRows(m kernels.Mat, lo, hi int) {
	for i := lo; i < hi; i++ {
		clear(row(m, i))
	}
}

func copyMat(dst, src kernels.Mat) {
	for i := range dst.Rows {
		if dst.ColStride == 1 && src.ColStride == 1 {
			copy(row(dst, i), row(src, i))
			continue
		}
		for j := range dst.Cols {
			dst.Data[i*dst.RowStride+j*dst.ColStride] = src.Data[i*src.RowStride+j*src.ColStride]
		}
	}
}

func scale(x []float32, by float32) {
	for i := range x {
		x[i] *= by
	}
}

// add adds y, times by, to x.
func add(x, y []float32, by float32) {
	for i, v := range y {
		x[i] += float32(by * v)
	}
}
