package lora

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// OFT (Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023) rotates the inputs of a
// module in blocks: W·Rᵀ, where each block of R comes of a skew-symmetric Q, whose upper triangle the file has. By
// Cayley's transform R is orthogonal; Neumann's series stands for the inverse in it, and makes R nearly so. Of an
// embedding, what it looks up is rotated: W·R.

// oftOptions are what a config says of OFT.
type oftOptions struct {
	rank, block int64 // one of both is 0
	shared      bool
	coft        bool
	eps         float64
	neumann     bool
	terms       int64
	older       bool // the series is that of PEFT before 0.18
}

// mostTerms is how long a series may be. Each term takes a product of matrices.
const mostTerms = 1000

func (c *Config) oftOptions() (o oftOptions, err error) {
	if c.fields["oft_block_size"] == nil {
		return o, fmt.Errorf("%w: there is no oft_block_size: the adapter is of PEFT before 0.14, whose OFT was "+
			"another one; merge it with PEFT 0.13", ErrUnsupported)
	}
	get := func(at *int64, name string, otherwise, least int64) {
		if err == nil {
			*at, err = c.fields.whole(name, otherwise, least)
		}
	}
	is := func(at *bool, name string, otherwise bool) {
		if err == nil {
			*at, err = c.fields.truth(name, otherwise)
		}
	}
	get(&o.rank, "r", 0, 0)
	get(&o.block, "oft_block_size", 32, 0)
	get(&o.terms, "num_cayley_neumann_terms", 5, 0)
	is(&o.shared, "block_share", false)
	is(&o.coft, "coft", false)
	is(&o.neumann, "use_cayley_neumann", true)
	if err != nil {
		return o, err
	}
	o.older = o.neumann && beforeVersion(c.PeftVersion, 18)
	if o.eps, err = c.fields.number("eps", 6e-5); err != nil {
		return o, err
	}
	switch {
	case (o.rank == 0) == (o.block == 0):
		err = fmt.Errorf("%w: r is %d and oft_block_size %d, expected one of both to be 0", ErrMalformed, o.rank,
			o.block)
	case o.terms > mostTerms:
		err = fmt.Errorf("%w: num_cayley_neumann_terms is %d, expected at most %d", ErrUnsupported, o.terms, mostTerms)
	case o.coft && !(o.eps >= 0 && o.eps <= math.MaxFloat32):
		err = fmt.Errorf("%w: eps is %g, expected 0 or more", ErrMalformed, o.eps)
	}
	return o, err
}

func init() {
	parsers[oft] = func(c *Config) error {
		_, err := c.oftOptions()
		return err
	}
}

// noteSeries tells of a series that the adapter has been trained with and newer versions of PEFT do not know.
func (a *Adapter) noteSeries() {
	if o, err := a.Config.oftOptions(); err == nil && o.older && o.terms > 2 {
		a.Notices = append(a.Notices,
			a.Path+": it is of PEFT before 0.18, whose Cayley-Neumann series was another one, and which "+
				"it is merged with; newer versions of PEFT merge it with theirs, and warn of that")
	}
}

// beforeVersion reports whether an adapter was saved by a PEFT before 0.minor. One that does not say it is of before
// 0.18.
func beforeVersion(version string, minor int) bool {
	parts := strings.Split(version, ".")
	if len(parts) < 2 {
		return true
	}
	n, err := strconv.Atoi(parts[1])
	return parts[0] == "0" && err == nil && n < minor
}

// oft makes a module of oft_R (blocks, size * (size - 1) / 2).
func (c *Config) oft(name string, p parts) (*Module, error) {
	o, err := c.oftOptions()
	if err != nil {
		return nil, err
	}
	if p["oft_r"] != nil || p["oft_s"] != nil {
		return nil, fmt.Errorf("%w: it has %v: the adapter is of PEFT before 0.16, whose OFT had other tensors; "+
			"merge it with PEFT 0.15", ErrUnsupported, p)
	}
	x := &oftTransform{oftOptions: o, embedding: p["oft_embedding_R"] != nil}
	key := "oft_R"
	if x.embedding {
		key = "oft_embedding_R"
	}
	t := p[key]
	if !p.have(key) || len(t.Shape) != 2 || t.Shape[0] < 1 || t.Shape[1] < 0 {
		return nil, fmt.Errorf("%w: it has %v, expected oft_R (blocks, size * (size - 1) / 2)", ErrMalformed, p)
	}
	n := t.Shape[1]
	x.size = (1 + int64(math.Sqrt(float64(1+8*n)))) / 2
	if n > largestFactor || x.size*(x.size-1)/2 != n {
		return nil, fmt.Errorf("%w: its oft_R has %d elements for a block, expected size * (size - 1) / 2 of a whole "+
			"number", ErrMalformed, n)
	}
	if x.t, x.blocks = t, t.Shape[0]; o.shared && x.blocks != 1 {
		return nil, fmt.Errorf("%w: its oft_R has %d blocks, and with block_share there is one", ErrMalformed, x.blocks)
	}
	return transformed(name, t, x), nil
}

// oftTransform is that of OFT.
type oftTransform struct {
	oftOptions
	t            *formats.Tensor
	blocks, size int64
	embedding    bool
	inverted     bool
}

// Fit holds the blocks against the weight: PEFT makes those of a config of the number of inputs.
func (x *oftTransform) Fit(_, inputs int64) error {
	size := x.block
	if x.rank != 0 {
		size = inputs / max(oftDivisor(inputs, x.rank), 1)
	} else {
		size = oftDivisor(inputs, size)
	}
	blocks := inputs / max(x.size, 1)
	if x.shared {
		blocks = 1
	}
	if x.size != size || x.blocks != blocks || inputs%x.size != 0 {
		return fmt.Errorf("%w: it has %d blocks of %d, and by its config %d inputs are in blocks of %d", ErrBase,
			x.blocks, x.size, inputs, size)
	}
	return nil
}

// oftDivisor is the divisor of a number of inputs that PEFT takes for the one that was asked for.
func oftDivisor(inputs, wanted int64) int64 {
	if wanted >= inputs {
		return inputs
	}
	higher, lower := wanted, wanted
	for inputs%higher != 0 {
		higher++
	}
	for lower > 1 && inputs%lower != 0 {
		lower--
	}
	if wanted-lower <= higher-wanted {
		return lower
	}
	return higher
}

// Bytes is the memory of the blocks, of what they are made of, and for making one.
func (x *oftTransform) Bytes(int64) int64 {
	return 4*x.blocks*x.size*x.size + 4*x.t.Count() + 4*8*x.size*x.size
}

// Load makes the blocks.
func (x *oftTransform) Load(int64) (RowMap, error) {
	v, err := Floats(x.t)
	if err != nil {
		return nil, err
	}
	n, each := int(x.size), len(v)/int(x.blocks)
	out := &blockProduct{size: n, blocks: make([]float32, int(x.blocks)*n*n)}
	work := newSquares(n)
	for b := range int(x.blocks) {
		r, ok := x.rotation(v[b*each:(b+1)*each], work)
		turned := !x.embedding
		if x.inverted {
			if x.neumann {
				ok = ok && inverse(r, n)
			} else {
				turned = !turned // an orthogonal one
			}
		}
		if !ok || !narrowed(out.blocks[b*n*n:][:n*n], r, n, turned) {
			return nil, fmt.Errorf("%s: tensor %s: %w: the rotation of block %d has no finite values, or no inverse",
				x.t.File, tensor.Quote(x.t.Name), ErrMalformed, b)
		}
	}
	return out, nil
}

// Inverse rotates back.
func (x *oftTransform) Inverse() (Transform, error) {
	inverse := *x
	inverse.inverted = !x.inverted
	return &inverse, nil
}

// squares is room for square matrices.
type squares struct {
	n          int
	q, r, p, s []float64
}

func newSquares(n int) *squares {
	room := func() []float64 { return make([]float64, n*n) }
	return &squares{n, room(), room(), room(), room()}
}

// rotation makes R of the upper triangle of Q.
func (x *oftTransform) rotation(upper []float32, w *squares) (r []float64, ok bool) {
	n, scale := w.n, 1.0
	if x.coft { // Q stays within a distance of 0
		sum := 0.0
		for _, f := range upper {
			sum += float64(f) * float64(f) // which is exact
		}
		eps := x.eps / math.Sqrt(float64(x.blocks))
		if norm := math.Sqrt(2 * sum); norm > eps {
			scale = eps / norm
		}
	}
	k := 0
	for i := range n {
		w.q[i*n+i] = 0
		for j := i + 1; j < n; j++ {
			f := scale * float64(upper[k])
			w.q[i*n+j], w.q[j*n+i] = f, -f
			k++
		}
	}
	if !x.neumann {
		return w.q, cayley(w.q, n)
	}
	// I + 2Q + 2Q² + …, where PEFT takes the last power once, and has no fewer than three powers but for one or two
	// terms.
	clear(w.r)
	for i := range n {
		w.r[i*n+i] = 1
	}
	terms := int(x.terms)
	powers := max(terms-1, 0)
	if !x.older && terms > 2 {
		powers = max(terms-1, 3)
	}
	copy(w.p, w.q)
	for i := 1; i <= powers; i++ {
		if i > 1 {
			w.multiply()
		}
		factor := 2.0 // by which a product is exact
		if !x.older && i == powers && terms > 2 {
			factor = 1
		}
		for j, f := range w.p {
			w.r[j] += float64(factor * f)
		}
	}
	return w.r, true
}

// multiply makes the next power of q in p.
func (w *squares) multiply() {
	clear(w.s)
	for i := range w.n {
		to := w.s[i*w.n:][:w.n]
		for k, f := range w.p[i*w.n:][:w.n] {
			for j, x := range w.q[k*w.n:][:w.n] {
				to[j] += float64(f * x)
			}
		}
	}
	w.p, w.s = w.s, w.p
}
