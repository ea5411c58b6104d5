package kit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// shapes are those of weights that are stored, the first one large enough to measure errors by.
var shapes = []tensor.Shape{{96, 256}, {64, 1024}, {7, 100}, {3, 5}, {8, 4, 3, 3}, {1000}, {1, 1}, {1}}

var floats = []tensor.DType{tensor.F32, tensor.F16, tensor.BF16}

// allowed is how far numbers may be from what they were, relative to their size, in so many bits. The bounds are three
// times what rounding to evenly spaced numbers does to normally distributed ones in blocks of 64, so that they part a
// coarse scheme from one that gives other numbers: numbers that have nothing to do with those that were given are 1.4
// away, and zeros 1.
func allowed(bits float64) float64 {
	if bits >= 7.5 { // 8-bit floats are no finer for most numbers than integers of 5 bits
		return 0.08
	}
	return min(0.9, 4.8*math.Exp2(-bits)) // ternary numbers by the largest of 256 are 0.81 away
}

func schemeRoundtrip(ctx context.Context, s *scheme) (string, error) {
	specs, err := s.specs()
	if err == nil {
		err = s.works(ctx, specs)
	}
	if err != nil {
		return "", err
	}
	worst, done, refused := 0.0, 0, 0
	why := error(nil)
	for _, spec := range specs {
		bits := 0.0
		for _, shape := range shapes {
			for _, d := range floats {
				far, each, err := s.there(ctx, spec, d, shape, bits)
				if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
					refused, why = refused+1, err
					continue
				}
				if err != nil {
					return "", fmt.Errorf("%s, %v %v: %w", spec, d, shape, err)
				}
				if bits == 0 {
					bits = each
				}
				done, worst = done+1, max(worst, far)
			}
		}
	}
	if done == 0 {
		return "", skip("it refuses all weights: %v", why)
	}
	return fmt.Sprintf("%d weights are at most %.2g from what they were, %d are refused", done, worst, refused), nil
}

// there stores a weight and reads it back. It returns how far it is from what it was, and the bits of an element.
func (s *scheme) there(ctx context.Context, spec quant.Spec, d tensor.DType, shape tensor.Shape, bits float64) (
	far, each float64, err error) {
	w, err := newWeight(d, shape, normal(7))
	if err != nil {
		return 0, 0, err
	}
	once, each, err := s.through(ctx, spec, w)
	if err != nil {
		return 0, 0, err
	}
	if bits == 0 {
		bits = each
	}
	far = distance(once, w.values)
	if far > allowed(bits) || far != far {
		return 0, 0, fmt.Errorf("found values %.2g away from what they were, relative to their size; expected at most %.2g "+
			"of %.2g bits", far, allowed(bits), bits)
	}
	again, err := newWeight(d, shape, func(i int) float32 { return once[i] })
	if err != nil {
		return 0, 0, err
	}
	twice, _, err := s.through(ctx, spec, again)
	if err != nil {
		return 0, 0, fmt.Errorf("stored once more: %w", err)
	}
	if more := distance(twice, again.values); more > allowed(bits)/2+1e-3 || more != more {
		return 0, 0, fmt.Errorf("stored once more, values move by %.2g, expected that they stay where they are", more)
	}
	zero, err := newWeight(d, shape, func(int) float32 { return 0 })
	if err != nil {
		return 0, 0, err
	}
	zeros, _, err := s.through(ctx, spec, zero)
	if err != nil {
		return 0, 0, fmt.Errorf("zeros: %w", err)
	}
	for i, x := range zeros {
		if !(math.Abs(float64(x)) < 1e-3) {
			return 0, 0, fmt.Errorf("zeros: found %v at element %d", x, i)
		}
	}
	return far, each, nil
}

// through stores a weight and reads it back. bits are those of an element in the first of its parts.
func (s *scheme) through(ctx context.Context, spec quant.Spec, w *weight) (values []float32, bits float64, err error) {
	e, err := s.encoder(ctx, spec, w)
	if err != nil {
		return nil, 0, err
	}
	parts, err := encode(e, w, split(w.Count(), e.Unit(), never))
	if err != nil {
		return nil, 0, err
	}
	c, err := s.newStored(spec, w, parts)
	if err != nil {
		return nil, 0, err
	}
	d, err := s.find(ctx, c, w, spec)
	if err != nil {
		return nil, 0, err
	}
	values, err = numbers(d, c)
	return values, float64(8*len(parts[0].data)) / float64(w.Count()), err
}

// held is the first weight that a scheme takes, of many units if it can be.
func (s *scheme) held(ctx context.Context, spec quant.Spec) (*weight, []sample, error) {
	why := error(nil)
	for _, shape := range shapes {
		for _, d := range floats {
			w, err := newWeight(d, shape, normal(11))
			if err != nil {
				return nil, nil, err
			}
			e, err := s.encoder(ctx, spec, w)
			if x := (*ending)(nil); errors.As(err, &x) {
				why = err
				continue
			}
			if err != nil {
				return nil, nil, err
			}
			parts, err := encode(e, w, split(w.Count(), e.Unit(), never))
			return w, parts, err
		}
	}
	return nil, nil, why
}

// cuts are the ways in which weights are split: at each unit, and at some.
func cuts(random *rand.Rand) []func() bool {
	half := func() bool { return random.IntN(2) == 0 }
	return []func() bool{func() bool { return true }, half, half, func() bool { return random.IntN(9) == 0 }}
}

// shuffled are tiles in any order.
func shuffled(random *rand.Rand, list []span) []span {
	random.Shuffle(len(list), func(i, k int) { list[i], list[k] = list[k], list[i] })
	return list
}

func schemeTiles(ctx context.Context, s *scheme) (string, error) {
	cases, err := s.cases(ctx)
	if err != nil {
		return "", err
	}
	splits, tiles := 0, 0
	for _, c := range cases {
		random := source(3)
		for _, cut := range cuts(random) {
			n, err := c.split(ctx, s, random, cut)
			if err != nil {
				return "", fmt.Errorf("%s, in %d tiles: %w", c.how, n, err)
			}
			splits, tiles = splits+1, max(tiles, n)
		}
	}
	return fmt.Sprintf("%d splits, into up to %d tiles, in any order", splits, tiles), nil
}

// stowed is a weight that is stored.
type stowed struct {
	how string
	*stored
	parts  []string // the names of those of its parts that no other weight has
	spec   quant.Spec
	weight *weight  // what it was; nil where that is not known
	want   []sample // what the encoder has made of it
}

// cases are a weight of each type that is written, or the weights of the samples where none is.
func (s *scheme) cases(ctx context.Context) ([]stowed, error) {
	specs, err := s.specs()
	if err != nil {
		list, failed := s.samples(ctx)
		if len(list) == 0 && failed == nil {
			failed = err
		}
		return list, failed
	}
	if err := s.works(ctx, specs); err != nil {
		return nil, err
	}
	var list []stowed
	for _, spec := range specs {
		w, parts, failed := s.held(ctx, spec)
		if e := (*ending)(nil); errors.As(failed, &e) {
			err = failed
			continue
		}
		if failed != nil {
			return nil, failed
		}
		c, err := s.newStored(spec, w, parts)
		if err != nil {
			return nil, err
		}
		x := stowed{how: spec.String(), stored: c, spec: spec, weight: w, want: parts}
		for _, p := range parts {
			x.parts = append(x.parts, p.Name)
		}
		list = append(list, x)
	}
	if len(list) == 0 {
		return nil, err
	}
	return list, nil
}

// decoders finds the weights.
func (c *stowed) decoders(ctx context.Context, s *scheme) ([]quant.Decoder, error) {
	if c.weight == nil {
		return s.Find(ctx, c.stored)
	}
	d, err := s.find(ctx, c.stored, c.weight, c.spec)
	return []quant.Decoder{d}, err
}

// split stores and reads a weight by tiles, and returns how many.
func (c *stowed) split(ctx context.Context, s *scheme, random *rand.Rand, cut func() bool) (n int, err error) {
	if w := c.weight; w != nil {
		e, err := s.encoder(ctx, c.spec, w)
		if err != nil {
			return 0, err
		}
		list := shuffled(random, split(w.Count(), e.Unit(), cut))
		got, err := encode(e, w, list)
		if err != nil {
			return len(list), err
		}
		for k := range got {
			if !bytes.Equal(got[k].data, c.want[k].data) {
				return len(list), fmt.Errorf("stored, found other bytes of %s than in one tile", quoted(got[k].Info))
			}
		}
	}
	found, err := c.decoders(ctx, s)
	if err != nil {
		return 0, err
	}
	for _, d := range found {
		count := d.Info().Count()
		values, err := decode(d, c.stored, []span{{0, count}})
		if err != nil {
			return 1, err
		}
		list := shuffled(random, split(count, d.Unit(), cut))
		read, err := decode(d, c.stored, list)
		if err != nil {
			return len(list), err
		}
		if !bytes.Equal(read, values) {
			return len(list), fmt.Errorf("read, found other values of %s than in one tile", quoted(d.Info()))
		}
		n = max(n, len(list))
	}
	return n, nil
}

func schemeBad(ctx context.Context, s *scheme) (string, error) {
	cases, err := s.cases(ctx)
	if err != nil {
		return "", err
	}
	tried := 0
	for _, c := range cases {
		n, err := c.bad(ctx, s)
		if err != nil {
			return "", fmt.Errorf("%s: %w", c.how, err)
		}
		tried += n
		if c.weight == nil {
			continue
		}
		if err := s.nonFinite(ctx, c.spec, c.weight); err != nil {
			return "", fmt.Errorf("%s: %w", c.how, err)
		}
	}
	return fmt.Sprintf("%d broken weights are refused, not found, or read as they were", tried), nil
}

// mostParts is how many parts of a sample are broken.
const mostParts = 12

// bad breaks each part of a weight in turn.
func (c *stowed) bad(ctx context.Context, s *scheme) (tried int, err error) {
	found, err := c.decoders(ctx, s)
	if err != nil {
		return 0, err
	}
	want := map[string][]float32{}
	for _, d := range found {
		if want[d.Info().Name], err = numbers(d, c.stored); err != nil {
			return 0, err
		}
	}
	for i, name := range c.parts[:min(mostParts, len(c.parts))] {
		for _, broken := range breaks(*c.part(name), i == 0 || c.weight == nil) {
			b := &stored{nil, c.dtype, c.config}
			for _, p := range c.list {
				switch {
				case p.Name != name:
					b.list = append(b.list, p)
				case broken.list != nil:
					b.list = append(b.list, *broken.list)
				}
			}
			if err := s.survives(ctx, b, want, broken.silent); err != nil {
				return 0, fmt.Errorf("part %s %s: %w", tensor.Quote(name), broken.how, err)
			}
			tried++
		}
	}
	return tried, nil
}

// samples are the weights of files in the plugin's package, of a format that is known here.
func (s *scheme) samples(ctx context.Context) ([]stowed, error) {
	entries, err := os.ReadDir(s.run.Samples)
	if s.run.Samples == "" || err != nil {
		return nil, skip("it is only read, and the package has no folder testdata or samples with a checkpoint of it")
	}
	dir := storage.Local(s.run.Samples, storage.Options{})
	config, err := os.ReadFile(filepath.Join(s.run.Samples, "config.json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var said struct {
		DType string `json:"torch_dtype"`
		Newer string `json:"dtype"`
	}
	if err := json.Unmarshal(config, &said); config != nil && err != nil {
		return nil, fmt.Errorf("sample config.json: %w", err)
	}
	dtype, _ := tensor.ParseDType(cmp.Or(said.DType, said.Newer)) // else it is not known
	var list []stowed
	for _, e := range entries {
		c, err := formats.Default.Open(ctx, dir, e.Name())
		if err != nil {
			continue // something else
		}
		x := stowed{how: e.Name(), stored: &stored{dtype: dtype, config: config}}
		x.list, err = contents(c)
		if err = errors.Join(err, c.Close()); err != nil {
			return nil, fmt.Errorf("sample %s: %w", e.Name(), err)
		}
		found, err := s.Find(ctx, x.stored)
		if err != nil {
			return nil, fmt.Errorf("sample %s: %w", e.Name(), err)
		}
		for _, d := range found {
			x.parts = append(x.parts, d.Parts()...)
		}
		if len(found) > 0 {
			list = append(list, x)
		}
	}
	if len(list) == 0 {
		return nil, skip("it is only read, and %s has no checkpoint of it", filepath.Base(s.run.Samples))
	}
	return list, nil
}

// broken is a part that is not as it should be.
type broken struct {
	how    string
	list   *sample // nil where it is missing
	silent bool    // it may be another weight's, and right
}

// breaks are the ways to break a part. The first one's shape may be what says which shape the weight has.
func breaks(p sample, first bool) []broken {
	list := []broken{{how: "missing"}}
	add := func(how string, shape tensor.Shape, d tensor.DType, silent bool) {
		x := sample{tensor.Info{Name: p.Name, DType: d, Shape: shape}, slices.Clone(p.data)}
		size, err := x.Size()
		if err != nil {
			return
		}
		x.data = append(x.data, make([]byte, max(0, size-int64(len(x.data))))...)[:size]
		list = append(list, broken{how, &x, silent})
	}
	if n := len(p.Shape); n > 0 && p.Shape[0] > 0 {
		less, more := slices.Clone(p.Shape), slices.Clone(p.Shape)
		less[0]--
		more[0]++
		add("with one row less", less, p.DType, false)
		add("with one row more", more, p.DType, false)
		none := slices.Clone(p.Shape)
		none[n-1] = 0
		add("empty", none, p.DType, first)
	}
	for _, d := range []tensor.DType{tensor.F64, tensor.I64, tensor.I32, tensor.I16, tensor.Bool, tensor.C64} {
		if d != p.DType {
			add("as "+d.String(), p.Shape, d, false)
		}
	}
	noise := sample{p.Info, make([]byte, len(p.data))}
	fill(noise.data, 9)
	ones := sample{p.Info, bytes.Repeat([]byte{0xff}, len(p.data))}
	return append(list, broken{"with noise in it", &noise, true}, broken{"with ones in it", &ones, true})
}

// survives makes sure that a broken weight is refused, not found, or read as it was; or where no scheme can tell, that
// it is read at all.
func (s *scheme) survives(ctx context.Context, c *stored, want map[string][]float32, silent bool) error {
	list, err := s.Find(ctx, c)
	if err != nil {
		return refusal(err)
	}
	for _, d := range list {
		got, err := numbers(d, c)
		if err != nil {
			if err := refusal(err); err != nil {
				return err
			}
			continue
		}
		if !silent && !slices.Equal(got, want[d.Info().Name]) {
			return fmt.Errorf("found a weight of %v with other values, expected an error, no weight, or the same",
				d.Info().Shape)
		}
	}
	return nil
}

// nonFinite makes sure that what is not finite is not stored in silence.
func (s *scheme) nonFinite(ctx context.Context, spec quant.Spec, w *weight) error {
	at := len(w.values) - 1
	bad, err := newWeight(w.DType, w.Shape, func(i int) float32 {
		if i == at {
			return float32(math.NaN())
		}
		return w.values[i]
	})
	if err != nil {
		return err
	}
	e, err := s.encoder(ctx, spec, w)
	if err != nil {
		return err
	}
	for _, cut := range []func() bool{never, func() bool { return true }} {
		_, err = encode(e, bad, split(w.Count(), e.Unit(), cut))
		x := (*quant.NonFiniteError)(nil)
		if !errors.As(err, &x) {
			advice := "Encode answers a value that is not finite by " + nonFinite +
				", with the index of its element in the weight"
			if errors.Is(err, host.ErrFailed) {
				return fmt.Errorf("a NaN: %w", err)
			}
			if err != nil {
				return fail(advice, "a NaN is answered by another error: %v", err)
			}
			return fail(advice, "a NaN is stored without that error")
		}
		if x.Index != int64(at) {
			return fail("the index of a value that is not finite is that in the weight, not in the tile",
				"a NaN at element %d is said to be at %d", at, x.Index)
		}
	}
	return nil
}
