package train

import (
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// numbers makes values that are the same in each run.
type numbers struct{ *rand.Rand }

func numbersOf(name string) numbers {
	seed := uint64(14695981039346656037)
	for _, b := range []byte(name) {
		seed = (seed ^ uint64(b)) * 1099511628211
	}
	return numbers{rand.New(rand.NewPCG(seed, 1))}
}

func (r numbers) fill(x []float32, by float64) {
	for i := range x {
		x[i] = float32(by * r.NormFloat64())
	}
}

func (r numbers) trainable(a *adapter, name string, by float64, shape ...int) *trainable {
	x := &trainable{name: name}
	n := 1
	for _, d := range shape {
		n, x.shape = n*d, append(x.shape, int64(d))
	}
	x.value, x.gradient, x.first, x.second = make([]float32, n), make([]float32, n), make([]float32, n), make([]float32, n)
	r.fill(x.value, by)
	a.trainables = append(a.trainables, x)
	return x
}

// factors are a pair for a matrix (out, in).
func (r numbers) factors(a *adapter, name string, out, in int) *lowRank {
	const rank = 3
	l := &lowRank{rank: rank, scale: 0.7}
	l.a = factor{of: r.trainable(a, name+" A", 0.3, rank, in), rowStride: in, colStride: 1, rows: rank, cols: in}
	l.b = factor{of: r.trainable(a, name+" B", 0.3, out, rank), rowStride: rank, colStride: 1, rows: out, cols: rank}
	return l
}

// adaptation makes one of a mode for a parameter: "lora" has factors, and biases that are added, "dora" magnitudes
// besides, "saved" new values and "rows" some rows of the embedding and of the head.
func (r numbers) adaptation(a *adapter, n *network, mode string, p param) *adaptation {
	out, in := int(p.shape[len(p.shape)-1]), 0
	if len(p.shape) > 1 {
		out, in = int(p.shape[len(p.shape)-2]), int(p.shape[len(p.shape)-1])
	}
	inFirst := p.kind == models.Conv1D || p.kind == models.Embedding
	if inFirst {
		out, in = in, out
	}
	switch {
	case mode == "rows":
		if p.name != n.spec.embedding+".weight" && p.name != n.spec.head.module+".weight" {
			return nil
		}
		ad := &adaptation{indices: []int{9, 2, 40}}
		ad.rows = r.trainable(a, p.name+" rows", 0.3, 3, n.hidden)
		return ad
	case mode == "saved" || len(p.shape) == 1 && (mode == "dora" || !strings.HasSuffix(p.name, ".bias")):
		t := r.trainable(a, p.name, 0, func() (list []int) {
			for _, d := range p.shape {
				list = append(list, int(d))
			}
			return list
		}()...)
		m := n.params[p.name]
		if m == nil {
			m = n.params[n.spec.embedding+".weight"]
		}
		at := 0
		for e := range max(1, m.Experts) {
			rows, cols := m.Matrix(e).Dims()
			if err := m.Matrix(e).ReadRows(t.value[at:at+rows*cols], 0, rows); err != nil {
				panic(err)
			}
			at += rows * cols
		}
		return &adaptation{value: t}
	case len(p.shape) == 1:
		return &adaptation{bias: r.trainable(a, p.name+" added", 0.3, out), biasScale: 0.7}
	case len(p.shape) == 3:
		ad := &adaptation{experts: make([]*lowRank, p.shape[0])}
		for e := range ad.experts {
			if e != 1 {
				ad.experts[e] = r.factors(a, fmt.Sprint(p.name, " ", e), out, in)
			}
		}
		return ad
	}
	ad := &adaptation{plain: r.factors(a, p.name, out, in)}
	if mode == "dora" && p.kind != models.Router {
		m := r.trainable(a, p.name+" magnitude", 0.2, out)
		for i := range m.value {
			m.value[i]++
		}
		ad.plain.magnitude = &factor{of: m, rowStride: 1, colStride: 1, rows: out, cols: 1}
	}
	return ad
}

// stepOf makes a step of a base with an adapter of a mode for all parameters.
func stepOf(t testing.TB, base, mode string, rows, length, threads int) *step {
	c, err := checkpoint.Open(t.Context(), baseOf(base))
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	sp, err := readSpec(c.Config)
	require.NoError(t, err)
	n, err := bind(c, sp)
	require.NoError(t, err)
	r := numbersOf(base + " " + mode)
	b := &Batch{Rows: rows, Length: length}
	for i := range rows * length {
		b.ids = append(b.ids, r.IntN(sp.vocab))
		label := r.IntN(sp.vocab)
		if i%length == length-1 || i%5 == 1 {
			label = ignored
		} else {
			b.count++
		}
		b.labels = append(b.labels, label)
	}
	b.ids[0], b.ids[1], b.ids[2], b.ids[3] = max(sp.padToken, 0), 9, 40, 9 // rows that are trained, one of them twice
	n.adapter = &adapter{params: map[string]*adaptation{}}
	list := sp.parameters()
	if sp.tied {
		shape := tensor.Shape{int64(sp.vocab), int64(sp.hidden)}
		list = append(list, param{sp.head.module + ".weight", shape, models.Linear})
	}
	for _, p := range list {
		if ad := r.adaptation(n.adapter, n, mode, p); ad != nil {
			n.adapter.params[p.name] = ad
		}
	}
	s := &step{crew: newCrew(t.Context(), threads), network: n, batch: b}
	require.NoError(t, s.build(length))
	require.NoError(t, reserve(0, true, s))
	return s
}

// differences holds gradients to central differences of a function of float32 values.
type differences struct {
	numbers
	f     func() float64
	noise float64 // of f, by rounding
	// branch says where f is smooth: between two calls that leave the same it has no kink of ReLU and no other choice of
	// experts.
	branch []bool
}

// check compares the derivatives of f along random directions.
func (d *differences) check(t *testing.T, what string, x, gradient []float32) {
	t.Helper()
	r, was := rms(x), slices.Clone(x)
	if r == 0 {
		r = 0.1
	}
	for range 2 {
		var want, sizes float64
		along := make([]float64, len(x))
		for i := range x {
			along[i] = r * d.NormFloat64()
			want += along[i] * float64(gradient[i])
			sizes += r * r * float64(gradient[i]) * float64(gradient[i])
		}
		at := func(h float64) (float64, []bool) {
			for i := range x {
				x[i] = float32(float64(was[i]) + h*along[i])
			}
			return d.f(), slices.Clone(d.branch)
		}
		h := 2e-3
		above, one := at(h)
		below, other := at(-h)
		for !slices.Equal(one, other) {
			require.Greater(t, h, 1e-5, what)
			h /= 4
			above, one = at(h)
			below, other = at(-h)
		}
		copy(x, was)
		require.InDelta(t, want, (above-below)/(2*h), 1e-3*math.Sqrt(sizes)+d.noise/h, "%s, whose gradient is %g", what,
			math.Sqrt(sizes))
	}
}

// dot is the product of two matrices, and the size of what rounding does to it.
func dot(x, y kernels.Mat) (sum, noise float64) {
	for i := range x.Rows {
		for j, v := range row(x, i) {
			p := float64(v) * float64(row(y, i)[j])
			sum, noise = sum+p, noise+p*p
		}
	}
	return sum, 4e-7 * math.Sqrt(noise)
}

// ofModule lists what is trained of a module.
func (s *step) ofModule(module string) (list []*trainable) {
	for _, x := range s.adapter.trainables {
		if strings.HasPrefix(x.name, module+".") {
			list = append(list, x)
		}
	}
	return list
}

// TestGradientsAreDifferences holds the gradients of each block of every architecture, of the embeddings and of the
// head to finite differences: of the input, and of all parameters, by LoRA, DoRA and new values. The norms of DoRA are
// what they were, for they are constants.
func TestGradientsAreDifferences(t *testing.T) {
	bases, err := filepath.Glob(baseOf("*"))
	require.NoError(t, err)
	require.Greater(t, len(bases), 30)
	for _, path := range bases {
		base := filepath.Base(path)
		for _, quantised := range []string{"nf4", "fp4", "int8"} {
			if strings.Contains(base, "-"+quantised) {
				base = ""
			}
		}
		if base == "" {
			continue
		}
		for _, mode := range []string{"lora", "dora", "saved", "rows"} {
			t.Run(base+"/"+mode, func(t *testing.T) {
				t.Parallel()
				s := stepOf(t, base, mode, 2, 9, 1)
				require.NoError(t, s.embed())
				if mode != "rows" {
					for i := range s.blocks {
						s.checkBlock(t, i)
					}
				}
				s.checkHead(t)
				s.checkEmbedding(t)
			})
		}
	}
}

// branches are the signs of what ReLU takes, and which experts the tokens take.
func (r *blockRun) branches() (list []bool) {
	if r.mlp != nil && r.mlp.act == relu {
		for i := range r.mlp.gate.Rows {
			for _, v := range row(r.mlp.gate, i) {
				list = append(list, v > 0)
			}
		}
	}
	if r.experts != nil {
		for _, w := range r.experts.weights.Data {
			list = append(list, w != 0)
		}
	}
	return list
}

func (s *step) checkBlock(t *testing.T, i int) {
	tokens := s.batch.tokens()
	x, y := kernels.NewMat(s.hidden, tokens), kernels.NewMat(s.hidden, tokens)
	by, g := kernels.NewMat(s.hidden, tokens), kernels.NewMat(s.hidden, tokens)
	d := &differences{numbers: numbersOf(s.layers[i].name)}
	d.fill(x.Data, 1)
	d.fill(by.Data, 1)
	d.f = func() (sum float64) {
		run := s.begin(i, false)
		require.NoError(t, s.forwardBlock(run, y, x, true))
		d.branch = run.branches()
		sum, d.noise = dot(by, y)
		return sum
	}
	d.f()
	for _, p := range s.adapter.trainables {
		clear(p.gradient)
	}
	run := s.begin(i, true)
	require.NoError(t, s.forwardBlock(run, kernels.Mat{}, x, false))
	copyMat(g, by)
	require.NoError(t, s.backwardBlock(run, g))
	d.check(t, s.layers[i].name+": its input", x.Data, g.Data)
	list := s.ofModule(s.layers[i].name)
	require.NotEmpty(t, list)
	for _, p := range list {
		d.check(t, p.name, p.value, p.gradient)
	}
}

// checkHead goes by chunks of tokens, the last of which is smaller.
func (s *step) checkHead(t *testing.T) {
	tokens := s.batch.tokens()
	s.room.chunk = 7
	x, g := kernels.NewMat(s.hidden, tokens), kernels.NewMat(s.hidden, tokens)
	d := &differences{numbers: numbersOf("head")}
	d.fill(x.Data, 1)
	d.f = func() float64 {
		sum, err := s.forwardLoss(x, kernels.Mat{}, s.batch.labels, s.batch.count)
		require.NoError(t, err)
		return sum / float64(s.batch.count)
	}
	d.noise = 4e-7 * d.f()
	for _, p := range s.adapter.trainables {
		clear(p.gradient)
	}
	_, err := s.forwardLoss(x, g, s.batch.labels, s.batch.count)
	require.NoError(t, err)
	d.check(t, "the head's input", x.Data, g.Data)
	for _, p := range s.ofModule(s.network.head.module) {
		d.check(t, p.name, p.value, p.gradient)
	}
}

func (s *step) checkEmbedding(t *testing.T) {
	x, by := s.state(0), kernels.NewMat(s.hidden, s.batch.tokens())
	d := &differences{numbers: numbersOf("embedding")}
	d.fill(by.Data, 1)
	padding := s.network.padToken
	d.f = func() (sum float64) {
		clearRows(x, 0, x.Rows)
		require.NoError(t, s.forwardLookup(s.network.embedding, x, s.batch.ids))
		if s.network.positions != nil {
			require.NoError(t, s.forwardLookup(s.network.positions, x, s.batch.positions()))
		}
		sum, d.noise = dot(by, x)
		return sum
	}
	d.f()
	for _, p := range s.adapter.trainables {
		clear(p.gradient)
	}
	copyMat(s.g, by)
	require.NoError(t, s.backwardEmbedding())
	list := s.ofModule(s.network.spec.embedding)
	require.NotEmpty(t, list)
	if s.network.positions != nil {
		list = append(list, s.ofModule(s.network.spec.positions)...)
	}
	for _, p := range list {
		x, g := p.value, p.gradient
		switch {
		case padding < 0:
		case p.name == s.network.spec.embedding+".weight": // its row has no gradient
			own := g[padding*s.hidden:][:s.hidden]
			require.Zero(t, rms(own))
			x, g = x[(padding+1)*s.hidden:], g[(padding+1)*s.hidden:]
		case p.name == s.network.spec.embedding+".weight A": // nor has its column
			s.checkColumns(t, d, p, padding)
			continue
		}
		d.check(t, p.name, x, g)
	}
}

// checkColumns checks a factor A of an embedding, row by row from the column after the one of padding.
func (s *step) checkColumns(t *testing.T, d *differences, p *trainable, padding int) {
	for i := range int(p.shape[0]) {
		x, g := p.value[i*s.vocab:][:s.vocab], p.gradient[i*s.vocab:][:s.vocab]
		require.Zero(t, g[padding])
		d.check(t, p.name, x[padding+1:], g[padding+1:])
	}
}
