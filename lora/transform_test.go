package lora

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/internal/kernels"
)

// TestPermutation holds the beginning of permutations against torch's: torch.randperm(n,
// generator=…manual_seed(seed)).
func TestPermutation(t *testing.T) {
	t.Parallel() // the last one takes seconds
	for _, x := range []struct {
		seed, n int64
		want    []int64
	}{
		{777, 1, []int64{0}},
		{777, 2, []int64{1, 0}},
		{777, 7, []int64{5, 6, 3, 0, 1, 4, 2}},
		{777, 624, []int64{263, 70, 173, 116, 619, 129, 393, 329, 343}},
		{777, 100003, []int64{66067, 25032, 98788, 12681, 47043, 46036, 44386, 50780, 65366}},
		{0, 2, []int64{0, 1}},
		{0, 1000, []int64{44, 37, 675, 775, 947, 209, 719, 500, 561}},
		{-5, 7, []int64{1, 4, 2, 6, 5, 3, 0}},
		{-5, 1000, []int64{30, 691, 129, 709, 575, 906, 997, 420, 482}},
		{12345678901, 100003, []int64{17508, 11334, 90596, 17919, 46067, 56524, 95301, 63937, 6801}},
		{math.MaxInt64, 1000, []int64{371, 805, 492, 705, 784, 265, 814, 793, 3}},
		{math.MinInt64, 7, []int64{4, 0, 5, 3, 2, 6, 1}},
		{777, 214748363, []int64{11440646, 199500216, 10121607, 3119241, 51696020, 155711086}},
		// From here on torch draws 64 bits, and shuffles the other way round.
		{777, 214748364, []int64{150358698, 199533091, 83306822, 145970095, 40813261, 111338416}},
	} {
		require.Equal(t, x.want, newMersenne(x.seed).permutation(x.n, int64(len(x.want))), "%d of %d", x.seed, x.n)
	}
	all := newMersenne(3).permutation(1000, 1000)
	slices.Sort(all)
	for i, k := range all {
		require.Equal(t, int64(i), k)
	}
}

// TestFourier holds sums of waves of all lengths against what they are.
func TestFourier(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 25, 31, 60, 64, 97, 120, 1024} {
		f := newFourier(n)
		re, im, outRe, outIm := make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n)
		for i := range n {
			re[i], im[i] = r.NormFloat64(), r.NormFloat64()
		}
		f.part(outRe, outIm, re, im, 1, f.factors, make([]float64, n), make([]float64, n))
		for j := range n {
			x, y := 0.0, 0.0
			for k := range n {
				sin, cos := math.Sincos(2 * math.Pi * float64(j*k%n) / float64(n))
				x, y = x+re[k]*cos-im[k]*sin, y+re[k]*sin+im[k]*cos
			}
			require.InDelta(t, x, outRe[j], 1e-12*float64(n), "%d of %d", j, n)
			require.InDelta(t, y, outIm[j], 1e-12*float64(n), "%d of %d", j, n)
		}
	}
}

// TestFunctions holds the functions that are the same on all machines against those of the math package.
func TestFunctions(t *testing.T) {
	for x := 0.0; x > -745; x -= 0.37 {
		require.InEpsilon(t, math.Exp(x), exponential(x), 1e-14, x)
	}
	require.Equal(t, 1.0, exponential(0))
	require.Zero(t, exponential(-1e9))
	for _, n := range []int{1, 2, 3, 4, 7, 8, 12, 1000, 4099} {
		c := newCircle(n)
		for k := range n {
			sin, cos := math.Sincos(2 * math.Pi * float64(k) / float64(n))
			require.InDelta(t, cos, c.cos[k], 3e-15)
			require.InDelta(t, sin, c.sin[k], 3e-15)
		}
	}
}

// TestInverse inverts matrices that have an inverse, and no others.
func TestInverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(t, "n")
		a := make([]float64, n*n)
		for i := range a {
			a[i] = rapid.Float64Range(-1, 1).Draw(t, "a")
		}
		for i := range n {
			a[i*n+(i+1)%n] += 4 // a permutation and some more
		}
		b := slices.Clone(a)
		require.True(t, inverse(b, n))
		for i := range n {
			for j := range n {
				sum := 0.0
				for k := range n {
					sum += a[i*n+k] * b[k*n+j]
				}
				if i == j {
					sum--
				}
				require.InDelta(t, 0, sum, 1e-6)
			}
		}
	})
	require.False(t, inverse([]float64{1, 2, 2, 4}, 2))
	require.False(t, inverse([]float64{0}, 1))
	require.False(t, inverse([]float64{1, 0, 0, math.NaN()}, 2))
	require.False(t, inverse([]float64{1, 0, 0, math.Inf(1)}, 2))
}

// drawn is an adapter of a multiplicative method with random values, and the outputs and inputs of its module.
func drawn(t *rapid.T, dir string) (a *Adapter, outputs, inputs int) {
	size := rapid.SampledFrom([]int64{1, 2, 4, 6})
	n := func(label string, from, to int64) int64 { return rapid.Int64Range(from, to).Draw(t, label) }
	out, block, blocks := n("outputs", 1, 7), size.Draw(t, "size"), n("blocks", 1, 4)
	config, shapes := "", map[string][]int64{}
	is := func(label string) bool { return rapid.Bool().Draw(t, label) }
	switch rapid.SampledFrom([]string{oft, boft, hra, miss}).Draw(t, "method") {
	case oft:
		shared := is("shared")
		config = fmt.Sprintf(`{"peft_type": "OFT", "peft_version": "0.18.0", "oft_block_size": %d, "block_share": %t,
			"use_cayley_neumann": %t, "num_cayley_neumann_terms": %d, "coft": %t, "eps": 1}`, block, shared, is("neumann"), n("terms", 1, 7), is("coft"))
		rows := blocks
		if shared {
			rows = 1
		}
		shapes["q.oft_R.weight"] = []int64{rows, block * (block - 1) / 2}
	case boft:
		factors := n("factors", 1, 3)
		if factors > 1 {
			block, blocks = block+block%2, blocks<<(factors-1)
		}
		config = fmt.Sprintf(`{"peft_type": "BOFT", "boft_block_size": %d, "boft_n_butterfly_factor": %d}`, block,
			factors)
		shapes["q.boft_R"], shapes["q.boft_s"] = []int64{factors, blocks, block, block}, []int64{out, 1}
	case hra:
		r := n("r", 1, 5)
		gs := is("GS") && r <= block*blocks
		config = fmt.Sprintf(`{"peft_type": "HRA", "r": %d, "apply_GS": %t}`, r, gs)
		shapes["q.hra_u"] = []int64{block * blocks, r}
	case miss:
		out *= block
		config = fmt.Sprintf(`{"peft_type": "MISS", "r": %d, "init_weights": "bat"}`, block)
		shapes["q.miss_block"] = []int64{out / block, block, block}
	}
	writeValues(t, dir, config, shapes)
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	return a, int(out), int(block * blocks)
}

// TestTransforms makes the rows of a weight at once and in parts, which is the same to the bit, and undoes what was
// done.
func TestTransforms(t *testing.T) {
	root, n := t.TempDir(), 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		require.NoError(t, os.Mkdir(dir, 0o755))
		a, out, in := drawn(t, dir)
		defer a.Close()
		m := a.Modules[0]
		require.NoError(t, m.Transform.Fit(int64(out), int64(in)))
		size := int64(2) // of a block: those of one input fit any number of them
		switch x := m.Transform.(type) {
		case *oftTransform:
			size = x.size
		case *batTransform:
			size = x.size
		}
		if size > 1 {
			require.ErrorIs(t, m.Transform.Fit(int64(out), int64(in+1)), ErrBase)
		}
		r := rand.New(rand.NewPCG(3, 4))
		w := make([]float32, out*in)
		for i := range w {
			w[i] = float32(r.NormFloat64())
		}
		by, err := m.Transform.Load(int64(in))
		if h, ok := m.Transform.(*hraTransform); ok && h.orthogonal && err != nil {
			require.ErrorIs(t, err, ErrMalformed) // of vectors that are not apart no orthogonal ones are made
			return
		}
		require.NoError(t, err)
		room := make([]float32, len(w))
		whole := slices.Clone(w)
		by.Apply(kernels.MatOf(whole, out, in), 0, room)
		parts := slices.Clone(w)
		for lo := 0; lo < out; {
			hi := rapid.IntRange(lo+1, out).Draw(t, "rows")
			by.Apply(kernels.MatOf(parts[lo*in:hi*in], hi-lo, in), int64(lo), room)
			lo = hi
		}
		require.Equal(t, whole, parts)

		back, err := m.Transform.Inverse()
		require.NoError(t, err)
		undo, err := back.Load(int64(in))
		if s, ok := m.Transform.(*boftTransform); ok {
			v, failed := Floats(s.s)
			require.NoError(t, failed)
			require.Equal(t, slices.Contains(v, 0), err != nil, "a scale of 0 cannot be undone")
		}
		if err != nil {
			require.ErrorIs(t, err, ErrUnsupported) // of a scale of 0, or a block that has no inverse
			return
		}
		undo.Apply(kernels.MatOf(whole, out, in), 0, room)
		largest := 0.0
		for _, f := range whole {
			largest = max(largest, math.Abs(float64(f)))
		}
		for i := range w {
			require.InDelta(t, w[i], whole[i], 1e-4*max(largest, 1))
		}
	})
}

// TestOlderSeries rotates by the series that PEFT had before 0.18, which has the last power twice.
func TestOlderSeries(t *testing.T) {
	for terms := 1; terms <= 6; terms++ {
		for _, version := range []string{"", `, "peft_version": "0.17.1"`, `, "peft_version": "0.18.0"`,
			`, "peft_version": "0.21.2"`} {
			dir := t.TempDir()
			writeValues(t, dir,
				fmt.Sprintf(`{"peft_type": "OFT", "oft_block_size": 2, "num_cayley_neumann_terms": %d%s}`, terms,
					version),
				map[string][]int64{"q.oft_R.weight": {1, 1}})
			a, err := Open(dir, OpenOptions{})
			require.NoError(t, err)
			defer a.Close()
			m := a.Modules[0]
			v, err := Floats(m.Value)
			require.NoError(t, err)
			x := float64(v[0])
			// Of Q = x·J the powers are 1, xJ, -x², -x³J, x⁴, …
			re, im, power := []float64{1, 0, -1, 0}, []float64{0, 1, 0, -1}, 1.0
			wantRe, wantIm := 1.0, 0.0
			older := version == "" || version == `, "peft_version": "0.17.1"`
			last := terms - 1
			if !older && terms > 2 {
				last = max(last, 3)
			}
			for k := 1; k <= last; k++ {
				factor := 2.0
				if power *= x; !older && k == last && terms > 2 {
					factor = 1
				}
				wantRe, wantIm = wantRe+factor*power*re[k%4], wantIm+factor*power*im[k%4]
			}
			by, err := m.Transform.Load(2)
			require.NoError(t, err)
			w := []float32{1, 0}
			by.Apply(kernels.MatOf(w, 1, 2), 0, make([]float32, 2)) // (1, 0)·Rᵀ is the first column of R
			assert.InDelta(t, wantRe, w[0], 1e-6, "%d%s", terms, version)
			assert.InDelta(t, -wantIm, w[1], 1e-6, "%d%s", terms, version)
			assert.Equal(t, older && terms > 2, len(a.Notices) == 1, "%d%s", terms, version)
		}
	}
}

// TestPeftTypes knows all types of PEFT 0.21.2, and its Bone of before 0.17: each is read, or refused with a reason.
func TestPeftTypes(t *testing.T) {
	for _, name := range []string{
		"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA", "ADALORA", "ADAMSS", "BOFT",
		"ADAPTION_PROMPT", "IA3", "BEFT", "LILY", "LOHA", "LOKR", "OFT", "POLY", "LN_TUNING", "VERA", "FROD", "PVERA",
		"FOURIERFT",
		"GLORA", "XLORA", "HRA", "VBLORA", "UNILORA", "CPT", "MISS", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "HIRA",
		"SHIRA", "C3A",
		"WAVEFT", "OSF", "DELORA", "GRALORA", "CARTRIDGE", "TINYLORA", "PSOFT", "PEANUT", "SHADOW", "SUPERTUNING",
		"DEFT", "BONE",
	} {
		read := slices.Contains(methods(), name)
		require.NotEqual(t, read, refused[name] != "", name)
		if !read {
			_, err := parseConfig([]byte(fmt.Sprintf(`{"peft_type": %q}`, name)))
			require.ErrorIs(t, err, ErrUnsupported)
			require.ErrorContains(t, err, "peft_type is "+name+": ")
		}
	}
}
