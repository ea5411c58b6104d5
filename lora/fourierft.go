package lora

import (
	"fmt"
	"math"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// FourierFT (Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024) has a few
// coefficients of the delta's two-dimensional spectrum, at places that torch's generator draws from a seed: the delta
// is the real part of the inverse transform, scaled.

func init() {
	parsers[fourierFT] = func(c *Config) error {
		if _, err := c.fields.whole("n_frequency", 1000, 1); err != nil {
			return err
		}
		var err error
		if c.ranks, err = c.parsePatterns(c.fields["n_frequency_pattern"]); err != nil {
			return fmt.Errorf("n_frequency_pattern: %w", err)
		}
		_, _, err = c.fourierOptions()
		return err
	}
}

func (c *Config) fourierOptions() (scaling float64, seed int64, err error) {
	if scaling, err = c.fields.number("scaling", 150); err != nil {
		return 0, 0, err
	}
	seed = 777
	var large uint64
	switch v, ok := c.fields["random_loc_seed"]; {
	case !ok, v.Kind() == '0' && json.Unmarshal(v, &seed) == nil:
	case v.Kind() == '0' && json.Unmarshal(v, &large) == nil:
		seed = int64(large)
	default:
		err = fmt.Errorf("%w: random_loc_seed is %s, expected a whole number", ErrMalformed, tensor.Quote(string(v)))
	}
	return scaling, seed, err
}

// fourierFT makes a module of the coefficients.
func (c *Config) fourierFT(name string, p parts) (*Module, error) {
	scaling, seed, err := c.fourierOptions()
	if err != nil {
		return nil, err
	}
	all, err := c.fields.whole("n_frequency", 1000, 1)
	if err != nil {
		return nil, err
	}
	n, err := c.lookup("n_frequency_pattern", c.ranks, name, float64(all))
	if err != nil {
		return nil, err
	}
	t := p["fourierft_spectrum"]
	if len(t.Shape) != 1 || float64(t.Shape[0]) != n || n < 1 {
		return nil, fmt.Errorf("%w: it has %v, expected fourierft_spectrum (%g)", ErrMalformed, p, n)
	}
	m := &Module{Name: name, Param: "weight", Rank: int(n), A: Matrix{T: t, Rows: int64(n)}, B: Matrix{T: t,
		Cols: int64(n)}}
	m.Waves = &Waves{spectrum: t, seed: seed}
	m.setScaling(scaling)
	m.fit = func(m *Module, outputs, inputs int64) error {
		size, err := elements(outputs, inputs)
		if err == nil && size < int64(n) {
			err = fmt.Errorf("%w: it has %g frequencies, which are more than the elements", ErrBase, n)
		}
		m.Waves = &Waves{spectrum: t, seed: seed, outputs: outputs, inputs: inputs, rows: outputs, cols: inputs}
		m.A.Cols, m.B.Rows = inputs, outputs
		return err
	}
	return m, nil
}

// sides are the outputs and inputs of a linear layer's parameter. One of an architecture that is not known may lie the
// other way round, as fan_in_fan_out says.
func (c *Config) sides(p *parameter, rows, cols int64) (outputs, inputs int64) {
	turned, _ := c.fields.truth("fan_in_fan_out", false)
	if p.kind == models.Conv1D || turned && p.kind == models.Other {
		return cols, rows
	}
	return rows, cols
}

// Waves is a sum of waves over a matrix: a window of the delta of FourierFT, before it is scaled, or of its transpose.
type Waves struct {
	spectrum        *formats.Tensor
	seed            int64
	outputs, inputs int64
	rows, cols      int64 // the same, or turned round
	turned          bool
	row, col        int64 // the first of the window
}

// window is what lies from a row and a column on.
func (w *Waves) window(row, col int64) *Waves {
	if w == nil {
		return nil
	}
	n := *w
	n.row, n.col = w.row+row, w.col+col
	return &n
}

// Transposed is the transposed matrix.
func (w *Waves) Transposed() *Waves {
	if w == nil {
		return nil
	}
	n := *w
	n.rows, n.cols, n.row, n.col, n.turned = w.cols, w.rows, w.col, w.row, !w.turned
	return &n
}

// Bytes is the memory that Load takes, and Fill.
func (w *Waves) Bytes() int64 {
	// The coefficients in float32 and float64, their places in two forms, and what has moved in a permutation.
	return (4+8+16+64)*w.spectrum.Count() + 16*(w.rows+w.cols) + 8*roomForLines*w.cols
}

// roomForLines is how many rows of float64 there have to be room for.
const roomForLines = 6

// WaveValues is Waves in memory.
type WaveValues struct {
	*Waves
	along, across []int32 // the frequency of each coefficient along the columns, and the rows
	size          []float64
	phases        *circle // of a row
	line          *fourier
}

// Load reads the coefficients and draws their places.
func (w *Waves) Load() (*WaveValues, error) {
	v, err := Floats(w.spectrum)
	if err != nil {
		return nil, err
	}
	if w.rows > math.MaxInt32 || w.cols > math.MaxInt32 {
		return nil, fmt.Errorf("%w: waves over %d x %d elements", ErrUnsupported, w.rows, w.cols)
	}
	x := &WaveValues{Waves: w, phases: newCircle(int(w.rows)), line: newFourier(int(w.cols))}
	for i, at := range newMersenne(w.seed).permutation(w.outputs*w.inputs, int64(len(v))) {
		down, right := int32(at/w.inputs), int32(at%w.inputs)
		if w.turned {
			down, right = right, down
		}
		x.across, x.along, x.size = append(x.across, down), append(x.along, right), append(x.size, float64(v[i]))
	}
	return x, nil
}

// Fill makes the rows [r0, r1) and columns [c0, c1) of the window, by rows. It makes room as it needs it.
func (x *WaveValues) Fill(dst []float32, room *[]float64, r0, r1, c0, c1 int64) {
	n := x.line.n
	if len(*room) < roomForLines*n {
		*room = make([]float64, roomForLines*n)
	}
	at := func(i int) []float64 { return (*room)[i*n:][:n] }
	re, im, outRe, outIm := at(0), at(1), at(2), at(3)
	each := float64(x.rows) * float64(x.cols)
	for i := r0; i < r1; i++ {
		clear(re)
		clear(im)
		for k, s := range x.size { // what the waves across the rows are in this one
			at := int64(x.across[k]) * (x.row + i) % x.rows
			re[x.along[k]] += float64(s * x.phases.cos[at])
			im[x.along[k]] += float64(s * x.phases.sin[at])
		}
		x.line.part(outRe, outIm, re, im, 1, x.line.factors, at(4), at(5))
		row := dst[(i-r0)*(c1-c0):][:c1-c0]
		for j := range row {
			row[j] = float32(outRe[x.col+c0+int64(j)] / each)
		}
	}
}

// circle are the points e^(2πik/n).
type circle struct{ cos, sin []float64 }

// newCircle works the points out with rounded sums and products alone: the functions of the math package differ in
// their last digits from one kind of machine to another.
func newCircle(n int) *circle {
	c := &circle{make([]float64, n), make([]float64, n)}
	for k := range n {
		// The angle is an eighth of a turn at most from a multiple of a quarter.
		quarter := (4*k + n/2) / n
		x := float64(4*k-quarter*n) / float64(n) * (math.Pi / 2)
		cos, sin := series(x, 0), series(x, 1)
		switch quarter % 4 {
		case 0:
			c.cos[k], c.sin[k] = cos, sin
		case 1:
			c.cos[k], c.sin[k] = -sin, cos
		case 2:
			c.cos[k], c.sin[k] = -cos, -sin
		case 3:
			c.cos[k], c.sin[k] = sin, -cos
		}
	}
	return c
}

// series is Taylor's series of the cosine (first 0) or of the sine (first 1) for small x.
func series(x float64, first int) float64 {
	square, sum := x*x, 1.0
	for n := float64(first + 20); n >= 2; n -= 2 {
		sum = 1 - float64(square*sum)/(n*(n-1))
	}
	if first == 1 {
		return x * sum
	}
	return sum
}

// fourier makes sums of n waves.
type fourier struct {
	n       int
	factors []int // of n, which are prime
	*circle
}

func newFourier(n int) *fourier {
	f := &fourier{n: n, circle: newCircle(n)}
	for rest, p := n, 2; rest > 1; {
		if p*p > rest {
			p = rest
		}
		if rest%p != 0 {
			p++
			continue
		}
		f.factors, rest = append(f.factors, p), rest/p
	}
	return f
}

// part makes out[j], the sum of in[k·step]·e^(2πijk·step/n) over k, as Cooley and Tukey do: of such sums for the
// first factor, in place. tr and ti are room for as many elements as the largest factor.
func (f *fourier) part(outRe, outIm, re, im []float64, step int, factors []int, tr, ti []float64) {
	if len(factors) == 0 {
		outRe[0], outIm[0] = re[0], im[0]
		return
	}
	p := factors[0]
	m := len(outRe) / p
	for q := range p {
		f.part(outRe[q*m:][:m], outIm[q*m:][:m], re[q*step:], im[q*step:], step*p, factors[1:], tr, ti)
	}
	for k := range m {
		if p == 2 {
			cos, sin := f.cos[k*step], f.sin[k*step]
			a, b, c, d := outRe[k], outIm[k], outRe[k+m], outIm[k+m]
			x, y := float64(c*cos)-float64(d*sin), float64(c*sin)+float64(d*cos)
			outRe[k], outIm[k], outRe[k+m], outIm[k+m] = a+x, b+y, a-x, b-y
			continue
		}
		for q := range p {
			tr[q], ti[q] = outRe[k+q*m], outIm[k+q*m]
		}
		for r := range p {
			sumRe, sumIm := 0.0, 0.0
			turn, at := (k+r*m)*step, 0 // the angle, as a part of n
			for q := range p {
				sumRe += float64(tr[q]*f.cos[at]) - float64(ti[q]*f.sin[at])
				sumIm += float64(tr[q]*f.sin[at]) + float64(ti[q]*f.cos[at])
				if at += turn; at >= f.n {
					at -= f.n
				}
			}
			outRe[k+r*m], outIm[k+r*m] = sumRe, sumIm
		}
	}
}
