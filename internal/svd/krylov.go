package svd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/lorakit/lorakit/internal/kernels"
	"gonum.org/v1/gonum/mat"
)

// krylov is an orthonormal basis X of cols x width, Y = M·X and T = Yᵀ·Y, whose eigenvalues are the squares of the
// singular values that the basis has found.
//
// A step reads the matrix once for one block: Y = M·X, and Z = Mᵀ·Y, which made orthonormal to all there is
// becomes the next block. A basis that is full is replaced by its leading Ritz vectors, from which, with the next
// block, the process goes on nearly as if nothing had been dropped (Wu and Simon, "Thick-restart Lanczos method for
// large symmetric eigenvalue problems", 2000). So memory does not depend on how long it takes.
type krylov struct {
	src     *source
	random  *rand.Rand
	x, y    kernels.Mat // of which the leading width columns are in use
	t       *mat.Dense  // symmetric
	width   int
	next    kernels.Mat // orthonormal, and to the basis
	passes  int
	history []found
	energy  float64 // of the matrix as it is, unscaled; known after the first pass
	known   bool
}

// found is the eigenvalues of T after so many passes.
type found struct {
	passes int
	values []float64
}

func newKrylov(src *source, seed uint64) *krylov {
	return &krylov{src: src, random: rand.New(rand.NewPCG(seed, 0x6c6f72616b6974)), t: new(mat.Dense)}
}

// basis returns the columns in use.
func (k *krylov) basis() (x, y kernels.Mat) {
	return k.x.Slice(0, k.x.Rows, 0, k.width), k.y.Slice(0, k.y.Rows, 0, k.width)
}

// room makes the basis hold so many columns.
func (k *krylov) room(width int) {
	if k.x.Cols >= width {
		return
	}
	width = max(width, min(2*k.x.Cols, k.src.cols))
	x, y, t := kernels.NewMat(k.src.cols, width), kernels.NewMat(k.src.rows, width), mat.NewDense(width, width, nil)
	if k.width > 0 {
		a, b := k.basis()
		paste(x, a, 0)
		paste(y, b, 0)
		t.Copy(k.t)
	}
	k.x, k.y, k.t = x, y, t
}

// start makes the next block of random columns, if there is none as wide.
func (k *krylov) start(block int) error {
	if block = min(block, k.src.cols-k.width); k.next.Cols >= block {
		return nil
	}
	z := kernels.NewMat(k.src.cols, block)
	if k.next.Cols > 0 {
		paste(z, k.next, 0)
	}
	for i := range z.Rows {
		for j := k.next.Cols; j < block; j++ {
			z.Data[i*block+j] = float32(k.random.NormFloat64())
		}
	}
	return k.follow(z, nil)
}

// follow makes z the next block. of is what the basis has of it, if that is known.
func (k *krylov) follow(z kernels.Mat, of *mat.Dense) (err error) {
	var bases []kernels.Mat
	if k.width > 0 {
		x, _ := k.basis()
		room := k.src.cols - k.width
		if room == 0 {
			k.next = kernels.Mat{}
			return nil
		}
		if z.Cols > room { // no more columns can be orthogonal
			z = columns(z, 0, room)
			if of != nil {
				of = of.Slice(0, k.width, 0, room).(*mat.Dense)
			}
		}
		bases = append(bases, x)
		if of != nil {
			of.Scale(-1, of)
			kernels.MulAdd(z, x, small(of))
		}
	}
	if k.next, _, err = orthonormal(z, bases, of != nil); err != nil {
		err = fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, err)
	}
	return err
}

// converge multiplies blocks until the leading o.Rank values have settled.
func (k *krylov) converge(ctx context.Context, o Options) error {
	if !k.known && k.src.rows*k.src.cols <= heldElements {
		var err error
		if k.energy, err = k.src.hold(ctx); err != nil || k.energy == 0 {
			return err
		}
		k.known = true
	}
	keep, limit := o.widths()
	limit = min(limit, k.src.cols)
	o.Block = max(o.Block, (o.Rank+o.Iterations-1)/o.Iterations) // never too few columns for the rank
	if err := k.start(o.Block); err != nil {
		return err
	}
	last := false
	for range o.Iterations {
		if k.next.Cols == 0 { // MᵀM leads nowhere from what there is
			if k.width >= limit || k.complete() {
				return nil
			}
			if err := k.start(o.Block); err != nil || k.next.Cols == 0 {
				return err
			}
		}
		y, z, err := k.pass(ctx, k.next, !last)
		if err != nil || k.energy == 0 {
			return err
		}
		of := k.add(k.next)
		k.next = kernels.Mat{}
		var done bool
		if done, last, err = k.settled(o); err != nil || done && o.Product == 0 {
			return err
		}
		if z.Cols == 0 {
			if z, err = k.back(ctx, y); err != nil {
				return err
			}
		}
		if done {
			if done, err = k.agrees(z, of, o); err != nil || done {
				return err
			}
			last = false
		}
		if err := k.follow(z, of); err != nil {
			return err
		}
		if k.width+k.next.Cols > limit {
			if err := k.restart(keep); err != nil {
				return err
			}
		}
	}
	return nil
}

// complete tells whether the basis holds all of the matrix.
func (k *krylov) complete() bool {
	sum := 0.0
	for i := range k.width {
		sum += k.t.At(i, i)
	}
	return sum >= (1-0x1p-20)*math.Ldexp(k.energy, 2*k.src.exponent)
}

// add takes a block, whose products pass has put there already, into the basis. It returns its columns of T.
func (k *krylov) add(x kernels.Mat) *mat.Dense {
	at := k.width
	paste(k.x, x, at)
	k.width += x.Cols
	_, all := k.basis()
	of := gram(all, all.Slice(0, all.Rows, at, k.width))
	for i := range k.width {
		for j := range x.Cols {
			k.t.Set(i, at+j, of.At(i, j))
			k.t.Set(at+j, i, of.At(i, j))
		}
	}
	k.passes++
	return of
}

var errEigenvalues = errors.New("the eigenvalues of the projected matrix did not converge")

// eigen returns the eigenvalues of T, and T reduced.
func (k *krylov) eigen() (*tridiagonal, []float64, error) {
	t := tridiagonalize(k.t, k.width)
	values, ok := t.values()
	if !ok {
		return nil, nil, fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, errEigenvalues)
	}
	return t, values, nil
}

// settled estimates what energy the leading values will still gain, each from its last two gains as if they went on as
// a geometric series, and tells whether that is little: a share of their own, and of what no matrix of the rank can
// hold. last says that it will be after the next pass.
func (k *krylov) settled(o Options) (done, last bool, err error) {
	stride := 1
	if k.passes > 6 {
		stride = 2
		if k.passes%2 != 0 && o.Rank > 32 {
			return false, false, nil // a pass costs no more than the eigenvalues do
		}
	}
	_, values, err := k.eigen()
	if err != nil {
		return false, false, err
	}
	k.history = append(k.history, found{k.passes, values})
	at := func(passes int) []float64 {
		for i := len(k.history) - 1; i >= 0; i-- {
			if k.history[i].passes == passes {
				return k.history[i].values
			}
		}
		return nil
	}
	before, first := at(k.passes-stride), at(k.passes-2*stride)
	if first == nil || k.width < o.Rank {
		return false, false, nil
	}
	of := func(values []float64, i int) float64 {
		if i < len(values) {
			return max(0, values[i])
		}
		return 0
	}
	var held, missing, after float64
	for i := range o.Rank {
		v := values[i]
		held += v
		gain, previous := v-of(before, i), of(before, i)-of(first, i)
		if gain <= 0x1p-22*values[0] {
			continue // rounding
		}
		ratio := 0.85
		if previous > 0 {
			ratio = max(0.05, min(ratio, gain/previous))
		}
		next := ratio
		if stride == 2 {
			next = math.Sqrt(ratio)
		}
		missing += gain * ratio / (1 - ratio)
		after += float64(gain * ratio / (1 - ratio) * next)
	}
	energy := math.Ldexp(k.energy, 2*k.src.exponent)
	// The estimate has been seen to be half of what it is.
	most := max(min(o.Missing*held, 1e-3*(energy-held))/2, 0x1p-22*energy)
	return missing <= most, after <= 4*most, nil
}

// agrees tells whether the product that the basis holds agrees with the exact one. A Ritz vector of the value v with
// the residual r of MᵀM lies askew to those left out, whose values are at most w, by an angle whose sine is at most
// r/(v-w) (Davis and Kahan).
func (k *krylov) agrees(z kernels.Mat, of *mat.Dense, o Options) (bool, error) {
	t, values, err := k.eigen()
	if err != nil || len(values) <= o.Rank {
		return false, err
	}
	vectors := t.vectors(values[:o.Rank])
	x, _ := k.basis()
	rest := kernels.NewMat(z.Rows, z.Cols)
	paste(rest, z, 0)
	for _, c := range []*mat.Dense{of, nil} {
		if c == nil {
			c = gram(x, rest)
		}
		var minus mat.Dense
		minus.Scale(-1, c)
		kernels.MulAdd(rest, x, small(&minus))
	}
	g := gram(rest, rest)
	sum := 0.0
	for i, v := range values[:o.Rank] {
		s := vectors.RawRowView(i)[k.width-z.Cols:]
		r := 0.0
		for j, f := range s {
			r += float64(f * dot(g.RawRowView(j), s))
		}
		gap := v - values[o.Rank]
		if r > 0 && v > 0 {
			sum += float64(2 * v * min(1, r/float64(gap*gap)))
		}
	}
	return sum <= o.Product*o.Product*math.Ldexp(k.energy, 2*k.src.exponent), nil
}

// restart replaces the basis by its leading Ritz vectors.
func (k *krylov) restart(keep int) error {
	t, values, err := k.eigen()
	if err != nil {
		return err
	}
	keep = min(keep, len(values))
	s := t.vectors(values[:keep]).T()
	x, y := k.basis()
	paste(k.x, times(x, s), 0)
	paste(k.y, times(y, s), 0)
	k.width = keep
	k.t.Zero()
	for i, v := range values[:keep] {
		k.t.Set(i, i, v)
	}
	return nil
}

// pass reads the matrix once and returns M·x, in its place behind the basis, and, if asked, Mᵀ·M·x. The first
// pass adds up the energy, and starts again with a scale if the numbers are so large or small that their squares leave
// float32.
func (k *krylov) pass(ctx context.Context, x kernels.Mat, gram bool) (y, z kernels.Mat, err error) {
	k.room(k.width + x.Cols)
	y = k.y.Slice(0, k.y.Rows, k.width, k.width+x.Cols)
	for {
		for i := range y.Rows {
			clear(y.Data[i*y.RowStride:][:y.Cols])
		}
		if gram {
			z = kernels.NewMat(k.src.cols, x.Cols)
		}
		sum := 0.0
		err = k.src.tiles(ctx, func(tile kernels.Mat, lo int) error {
			if !k.known {
				e, err := energy(tile, lo)
				if err != nil {
					return err
				}
				sum += e
			}
			part := y.Slice(lo, lo+tile.Rows, 0, y.Cols)
			kernels.MulAdd(part, tile, x)
			if gram {
				kernels.MulAdd(z, tile.T(), part)
			}
			return nil
		})
		if err != nil || k.known {
			return y, z, err
		}
		k.energy, k.known = sum, true
		if sum == 0 {
			return y, z, nil
		}
		if k.src.exponent = scaling(sum); k.src.exponent != 0 {
			continue
		}
		return y, z, nil
	}
}

// back returns Mᵀ·y, for a pass that seemed to be the last and was not.
func (k *krylov) back(ctx context.Context, y kernels.Mat) (kernels.Mat, error) {
	z := kernels.NewMat(k.src.cols, y.Cols)
	err := k.src.tiles(ctx, func(tile kernels.Mat, lo int) error {
		kernels.MulAdd(z, tile.T(), y.Slice(lo, lo+tile.Rows, 0, y.Cols))
		return nil
	})
	return z, err
}

// ritz returns the best approximation of the matrix within the basis, keep values of it.
func (k *krylov) ritz(keep int) (*Decomposition, error) {
	if k.energy == 0 {
		return &Decomposition{U: kernels.NewMat(k.src.rows, 0), V: kernels.NewMat(k.src.cols, 0)}, nil
	}
	x, y := k.basis()
	t, values, err := k.eigen()
	if err != nil {
		return nil, err
	}
	// T squares the condition, so what is small beside its first value is noise. Then the vectors come from the SVD of
	// all of Y, else from that of their share of it.
	keep = min(keep, len(values))
	if values[keep-1] > 0x1p-10*values[0] {
		s := t.vectors(values[:keep]).T()
		v, r, err := orthonormal(times(x, s), nil, false)
		if err != nil {
			return nil, fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, err)
		}
		if v.Cols == keep { // it is rounding that this takes back
			x, y = v, times(times(y, s), inverseUpper(r))
		}
	}
	q, r, err := orthonormal(clone(y), nil, false)
	if err != nil { // columns that are multiples of each other: slower, and always right
		var q64 *mat.Dense
		q64, r = householder(wide(y))
		q = small(q64)
	} else if q.Cols == 0 {
		return nil, fmt.Errorf("svd: matrix of %d x %d: its products with the basis are all zero", k.src.rows, k.src.cols)
	}
	left, s, right, err := decompose(r)
	if err != nil {
		return nil, fmt.Errorf("svd: matrix of %d x %d: %w", k.src.rows, k.src.cols, err)
	}
	n := nonzero(s[:min(keep, len(s))], 0x1p-23)
	d := &Decomposition{
		U: times(q, left.Slice(0, left.RawMatrix().Rows, 0, n)),
		V: times(x, right.Slice(0, right.RawMatrix().Rows, 0, n)),
		S: s[:n], Energy: k.energy,
	}
	if k.src.side {
		d.U, d.V = d.V, d.U
	}
	fixSigns(d.U, d.V)
	d.S = make([]float64, n)
	for i := range d.S {
		d.S[i] = math.Ldexp(s[i], -k.src.exponent)
	}
	return d, nil
}

// decompose is the full SVD of a small matrix, in float64.
func decompose(a mat.Matrix) (u *mat.Dense, s []float64, v *mat.Dense, err error) {
	var f mat.SVD
	if !f.Factorize(a, mat.SVDThin) {
		rows, cols := a.Dims()
		return nil, nil, nil, fmt.Errorf("the SVD of a core of %d x %d did not converge", rows, cols)
	}
	u, v = new(mat.Dense), new(mat.Dense)
	f.UTo(u)
	f.VTo(v)
	return u, f.Values(nil), v, nil
}

// nonzero counts the leading values above epsilon times the first.
func nonzero(s []float64, epsilon float64) int {
	n := 0
	for n < len(s) && s[n] > epsilon*s[0] {
		n++
	}
	return n
}
