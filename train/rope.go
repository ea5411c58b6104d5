package train

import (
	"math"
	"slices"
	"strings"
)

// ropeTypes are the kinds of frequencies that are computed.
var ropeTypes = []string{"default", "dynamic", "linear", "llama3", "longrope", "yarn"}

// ropeDefaults are what an architecture has where its config is silent.
type ropeDefaults struct {
	positions int // max_position_embeddings
	theta     float64
	// partial is the share of a head that is rotated, where the config may say another; 0 where the architecture
	// rotates whole heads, whatever the config says.
	partial float64
	// original is original_max_position_embeddings, where the class has one of its own, else 0.
	original int
	// layerwise says that the frequencies are one set of several, each for layers of a type.
	layerwise bool
	// older are names that the kinds of frequencies have in this architecture alone.
	older map[string]string
	// only are the kinds that the architecture has, where it has not all.
	only []string
}

// rope reads the only set of frequencies of a model, from rope_parameters or, as older configs have it, from
// rope_scaling, rope_theta and partial_rotary_factor (convert_rope_params_to_dict in transformers).
func (f *fields) rope(headDim int, d ropeDefaults) *rotary {
	p := f.object("rope_scaling")
	if p == nil || len(p.members) == 0 {
		p = f.object("rope_parameters")
	}
	if p == nil {
		p = &fields{path: "rope_parameters.", err: f.err}
	}
	for _, byType := range []string{fullAttention, slidingAttention} {
		if v, full, ok := p.get(byType); ok && v.Kind() == '{' {
			f.fail("%s: this architecture has one set of frequencies for all layers", full)
		}
	}
	return p.rotary(f, headDim, d, p.flag("truncate", true), f.number("rope_theta", d.theta))
}

// rotary makes the rotary embedding that an object of rope parameters describes. The object above is that of the whole
// model; truncate is of yarn alone, and theta is the base where the object has none.
func (f *fields) rotary(above *fields, headDim int, d ropeDefaults, truncate bool, theta float64) *rotary {
	kind := f.word("rope_type", f.word("type", "default"))
	if newer, ok := d.older[kind]; ok {
		kind = newer
	}
	supported := ropeTypes
	if d.only != nil {
		supported = d.only
	}
	if !slices.Contains(supported, kind) {
		f.fail("%srope_type is %q, supported are %s", f.path, clip(kind), strings.Join(supported, ", "))
	}
	partial := f.numberOrNone("partial_rotary_factor", above.numberOrNone("partial_rotary_factor", d.partial))
	if d.partial == 0 && kind == "default" || partial == 0 {
		partial = 1 // the class does not look at it, or it is null
	}
	switch {
	case d.partial == 0 && partial != 1:
		f.fail("partial_rotary_factor is %g, expected 1: the architecture rotates whole heads", partial)
	case partial > 1:
		f.fail("partial_rotary_factor is %g, expected at most 1", partial)
	}
	t := turn{
		dim:       int(float64(headDim) * min(partial, 1)),
		base:      f.number("rope_theta", theta),
		positions: above.count("max_position_embeddings", d.positions, 1, mostPositions),
	}
	if t.dim < 2 || t.dim%2 != 0 {
		f.fail("%d of the %d features of a head are rotated, expected an even number", t.dim, headDim)
		return &rotary{}
	}
	if t.base <= 1 {
		f.fail("rope_theta is %g, expected a number above 1", t.base)
	}
	original := func() float64 { return f.original(above, d, t.positions) }
	plain := inverse(float32(t.base), t.dim)
	r := &rotary{dim: t.dim}
	switch kind {
	case "default":
		r.frequencies = always(plain, 1)
	case "linear":
		factor := f.required("factor")
		r.frequencies = always(divided(plain, factor), 1)
	case "dynamic":
		factor := f.required("factor")
		if t.dim == 2 {
			f.fail("rope_type dynamic needs more than 2 rotated features a head")
		}
		r.frequencies = t.dynamic(factor)
	case "llama3":
		factor, low, high := f.required("factor"), f.required("low_freq_factor"), f.required("high_freq_factor")
		if high <= low {
			f.fail("%shigh_freq_factor is %g, expected more than low_freq_factor, %g", f.path, high, low)
		}
		r.frequencies = always(llama3(plain, factor, low, high, original()), 1)
	case "yarn":
		r.frequencies = always(f.yarn(t, original(), truncate))
	case "longrope":
		r.frequencies = f.longrope(t, original())
	}
	return r
}

// required reads a number that the kind of frequencies cannot do without.
func (f *fields) required(name string) float64 {
	if _, full, ok := f.get(name); !ok {
		f.fail("%s is missing, which this rope_type needs", full)
	}
	return f.number(name, 1)
}

// original is the length that the model was trained with before its frequencies were scaled. A member beside the rope
// parameters takes precedence over one in them, but not over one of a layer type.
func (f *fields) original(above *fields, d ropeDefaults, positions int) float64 {
	const name = "original_max_position_embeddings"
	n := f.count(name, positions, 2, mostPositions)
	if !d.layerwise {
		if d.original != 0 {
			n = d.original
		}
		n = above.count(name, n, 2, mostPositions)
	}
	return float64(n)
}

// turn is what all kinds of frequencies begin with.
type turn struct {
	dim       int // rotated features of a head
	base      float64
	positions int // max_position_embeddings
}

// inverse is 1 / base^(2i/dim) for i < dim/2. It is computed in float32, every step rounded, as torch does it, so
// that the angles of late positions are the same.
func inverse(base float32, dim int) []float32 {
	f := power(base, dim)
	for i := range f {
		f[i] = 1 / f[i]
	}
	return f
}

// power is base^(2i/dim) for i < dim/2.
func power(base float32, dim int) []float32 {
	f := make([]float32, dim/2)
	for i := range f {
		f[i] = float32(math.Pow(float64(base), float64(float32(2*i)/float32(dim))))
	}
	return f
}

func divided(f []float32, by float64) []float32 {
	for i := range f {
		f[i] /= float32(by)
	}
	return f
}

// always are frequencies that do not depend on the length of a row.
func always(f []float32, factor float64) func(int) ([]float64, float64) {
	angles := widened(f)
	return func(int) ([]float64, float64) { return angles, factor }
}

func widened(f []float32) []float64 {
	w := make([]float64, len(f))
	for i, x := range f {
		w[i] = float64(x)
	}
	return w
}

// dynamic raises the base with rows longer than the model knows (NTK-aware scaling, bloc97 and emozilla 2023).
func (t turn) dynamic(factor float64) func(int) ([]float64, float64) {
	known := widened(inverse(float32(t.base), t.dim))
	return func(positions int) ([]float64, float64) {
		if positions <= t.positions {
			return known, 1
		}
		stretch := float32(float32(factor)*float32(positions)) / float32(t.positions)
		stretch -= float32(factor - 1)
		raised := float32(math.Pow(float64(stretch), float64(float32(float64(t.dim)/float64(t.dim-2)))))
		return widened(inverse(float32(t.base)*raised, t.dim)), 1
	}
}

// llama3 divides low frequencies by factor, leaves high ones, and goes over from one to the other between (Llama 3.1).
func llama3(f []float32, factor, low, high, original float64) []float32 {
	for i, x := range f {
		wavelength := float32(2*math.Pi) / x
		switch {
		case wavelength > float32(original/low):
			f[i] = x / float32(factor)
		case wavelength >= float32(original/high):
			smooth := (float32(original)/wavelength - float32(low)) / float32(high-low)
			f[i] = float32((1-smooth)*x)/float32(factor) + float32(smooth*x)
		}
	}
	return f
}

// yarn goes over from frequencies that stay to such that are divided by factor, over a range of dimensions that is
// given by how often each turns in the original length (Peng et al. 2023).
func (f *fields) yarn(t turn, original float64, truncate bool) ([]float32, float64) {
	if _, full, ok := f.get("factor"); !ok {
		f.fail("%s is missing, which this rope_type needs", full)
	}
	factor := f.scaling(t, original)
	attention := f.numberOrNone("attention_factor", 0)
	if attention == 0 {
		m, all := f.numberOrNone("mscale", 0), f.numberOrNone("mscale_all_dim", 0)
		if m != 0 && all != 0 {
			attention = magnitude(factor, m) / magnitude(factor, all)
		} else {
			attention = magnitude(factor, 1)
		}
	}
	fast, slow := f.numberOrNone("beta_fast", 0), f.numberOrNone("beta_slow", 0)
	if fast == 0 {
		fast = 32
	}
	if slow == 0 {
		slow = 1
	}
	dimension := func(turns float64) float64 { // the one that turns so often
		return float64(t.dim) * math.Log(original/(turns*2*math.Pi)) / (2 * math.Log(t.base))
	}
	low, high := dimension(fast), dimension(slow)
	if truncate {
		low, high = math.Floor(low), math.Ceil(high)
	}
	low, high = max(low, 0), min(high, float64(t.dim-1))
	if low == high {
		high += 0.001
	}
	freq := power(float32(t.base), t.dim)
	for i, x := range freq {
		ramp := (float32(i) - float32(low)) / float32(high-low)
		stays := 1 - min(max(ramp, 0), 1)
		divided := 1 / float32(float32(factor)*x)
		freq[i] = float32(divided*(1-stays)) + float32(1/x*stays)
	}
	return freq, attention
}

// scaling reads factor; null says that it is the ratio of the lengths.
func (f *fields) scaling(t turn, original float64) float64 {
	if factor := f.numberOrNone("factor", 0); factor != 0 {
		return factor
	}
	return float64(t.positions) / original
}

// magnitude is by how much yarn has the scores larger.
func magnitude(factor, scale float64) float64 {
	if factor <= 1 {
		return 1
	}
	return float64(0.1*scale*math.Log(factor)) + 1
}

// longrope divides each frequency by a factor of its own, one for rows of the original length, one for longer ones
// (Ding et al. 2024).
func (f *fields) longrope(t turn, original float64) func(int) ([]float64, float64) {
	factor := f.scaling(t, original)
	attention := f.numberOrNone("attention_factor", 0)
	if attention == 0 {
		attention = 1
		if factor > 1 {
			attention = math.Sqrt(1 + math.Log(factor)/math.Log(original))
		}
	}
	freq := power(float32(t.base), t.dim)
	read := func(name string) []float64 {
		factors := listOf[float64](f, name, "numbers")
		if len(factors) != len(freq) {
			f.fail("%s%s has %d numbers, expected %d, half of the rotated features", f.path, name, len(factors), len(freq))
			return nil
		}
		scaled := make([]float64, len(freq))
		for i, x := range factors {
			if !(x > 0) || float32(x) == 0 || x > math.MaxFloat32 {
				f.fail("%s%s has %g at %d, expected numbers above 0", f.path, name, x, i)
			}
			scaled[i] = float64(1 / float32(float32(x)*freq[i]))
		}
		return scaled
	}
	shorter, longer := read("short_factor"), read("long_factor")
	return func(positions int) ([]float64, float64) {
		if float64(positions) > original {
			return longer, attention
		}
		return shorter, attention
	}
}
