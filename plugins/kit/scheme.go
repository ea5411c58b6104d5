package kit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// scheme is a scheme that is checked.
type scheme struct {
	quant.Scheme
	run   *run
	asked bool   // whether a weight can be stored and read at all
	wrong string // the check that says why none can
}

// specs are what weights are checked in: each type that is written, and once more doubly quantised where it has that.
func (s *scheme) specs() ([]quant.Spec, error) {
	var list []quant.Spec
	for _, t := range s.Types() {
		if t.ReadOnly {
			continue
		}
		for _, p := range []quant.Params{nil, {{Name: "double_quant", Value: true}}} {
			spec, err := s.Spec(t.Name, p)
			if err != nil {
				return nil, fmt.Errorf("type %s: %w", t.Name, err)
			}
			if !slices.ContainsFunc(list, spec.Equal) {
				list = append(list, spec)
			}
		}
	}
	if len(list) == 0 {
		return nil, skip("it is only read")
	}
	if p := s.run.Plugin; p != nil && !p.Described().Can(lock.SchemeDecode) {
		return nil, skip("it is only written")
	}
	return list, nil
}

// works makes sure that some weight can be stored and read, whatever its values are then. Where none can, the first
// check that asks says why, and those after it are skipped.
func (s *scheme) works(ctx context.Context, specs []quant.Spec) error {
	if s.wrong != "" && s.wrong != s.run.current {
		return skip("see %s: no weight can be stored and read", s.wrong)
	}
	if s.asked {
		return nil
	}
	failed := error(nil)
	for _, spec := range specs {
		for _, shape := range shapes {
			w, err := newWeight(floats[0], shape, normal(5))
			if err != nil {
				return err
			}
			_, _, err = s.through(ctx, spec, w)
			if err == nil {
				s.asked = true
				return nil
			}
			if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
				continue
			}
			if failed == nil {
				failed = fmt.Errorf("no weight can be stored and read: %s, %v %v: %w", spec, w.DType, shape, err)
			}
			if unanswered(err) || ctx.Err() != nil {
				s.wrong = s.run.current
				return failed
			}
			s.run.restart()
		}
	}
	if failed != nil {
		s.wrong = s.run.current
	}
	s.asked = failed == nil
	return failed
}

const weightName = "model.layers.0.mlp.up_proj.weight"

// weight is a weight before it is quantised.
type weight struct {
	tensor.Info
	values []float32 // as they are in the weight's type
	data   []byte
}

func newWeight(d tensor.DType, shape tensor.Shape, value func(i int) float32) (*weight, error) {
	w := &weight{Info: tensor.Info{Name: weightName, DType: d, Shape: shape}}
	n := w.Count()
	x := make([]float32, n)
	for i := range x {
		x[i] = value(i)
	}
	w.data = make([]byte, n*d.Bits()/8)
	if err := tensor.FromFloats(w.data, d, x); err != nil {
		return nil, err
	}
	w.values = make([]float32, n)
	return w, tensor.ToFloats(w.values, w.data, d)
}

// normal makes numbers as weights have them.
func normal(seed uint64) func(int) float32 {
	random := source(seed)
	return func(int) float32 { return float32(random.NormFloat64() * 0.02) }
}

// span are elements of a weight.
type span struct{ lo, hi int64 }

// split cuts a weight where cut says so, at multiples of the unit.
func split(count, unit int64, cut func() bool) []span {
	var list []span
	lo := int64(0)
	for at := unit; at < count; at += unit {
		if cut() {
			list = append(list, span{lo, at})
			lo = at
		}
	}
	return append(list, span{lo, count})
}

// never has a weight go as one tile.
func never() bool { return false }

// carried are the numbers that an encoder has kept.
type carried []float32

func (c carried) ReadFloats(dst []float32, i int64) error {
	if i < 0 || i+int64(len(dst)) > int64(len(c)) {
		return fmt.Errorf("found %d numbers at %d asked for, expected some of %d", len(dst), i, len(c))
	}
	copy(dst, c[i:])
	return nil
}

// encoder prepares to store a weight; a refusal is an ending that is skipped.
func (s *scheme) encoder(ctx context.Context, spec quant.Spec, w *weight) (quant.Encoder, error) {
	e, err := s.Encoder(ctx, spec, w.Info)
	if errors.Is(err, quant.ErrUnsupported) || errors.Is(err, formats.ErrUnsupported) {
		return nil, skip("%v of %v: %v", w.DType, w.Shape, err)
	}
	if err != nil {
		return nil, err
	}
	m, ok := e.(quant.Measured)
	if !ok {
		return e, nil
	}
	numbers := make([]float32, m.Statistics())
	if err := m.Measure(numbers, 0, w.Count(), w.data); err != nil {
		return nil, err
	}
	return e, m.Begin(numbers)
}

// encode stores a weight by tiles.
func encode(e quant.Encoder, w *weight, tiles []span) ([]sample, error) {
	var parts []sample
	for _, o := range e.Outputs() {
		size, err := o.Size()
		if err != nil {
			return nil, err
		}
		parts = append(parts, sample{o, make([]byte, size)})
	}
	kept := make(carried, e.Deferred(0, w.Count()))
	width := w.DType.Bits() / 8
	for _, t := range tiles {
		var out [][]byte
		for _, r := range e.Tiles(nil, t.lo, t.hi) {
			p, err := parts[r.Part].piece(r)
			if err != nil {
				return nil, err
			}
			out = append(out, p)
		}
		first := e.Deferred(0, t.lo)
		deferred := kept[first : first+e.Deferred(t.lo, t.hi)]
		if err := e.Encode(out, deferred, t.lo, t.hi, w.data[t.lo*width:t.hi*width]); err != nil {
			return nil, fmt.Errorf("elements %d to %d: %w", t.lo, t.hi, err)
		}
	}
	return parts, e.Finish(kept, func(part int, off int64, p []byte) error {
		if part < 0 || part >= len(parts) {
			return fmt.Errorf("found output %d, expected one of %d", part, len(parts))
		}
		to, err := parts[part].piece(quant.Range{Offset: off, Length: int64(len(p))})
		copy(to, p)
		return err
	})
}

// pieces are some of a part, which may be scattered.
func (s *sample) pieces(r quant.Range) ([]byte, error) {
	if !r.Scattered() {
		return s.piece(r)
	}
	var all []byte
	for k := range r.Count {
		p, err := s.piece(quant.Range{Offset: r.Offset + k*r.Stride, Length: r.Length})
		if err != nil {
			return nil, err
		}
		all = append(all, p...)
	}
	return all, nil
}

// piece is some of a part, in one.
func (s *sample) piece(r quant.Range) ([]byte, error) {
	if n := int64(len(s.data)); r.Offset < 0 || r.Length < 0 || r.Offset > n || r.Length > n-r.Offset {
		return nil, fmt.Errorf("part %s: found %d bytes at %d, expected some of %d", quoted(s.Info), r.Length, r.Offset, n)
	}
	return s.data[r.Offset : r.Offset+r.Length], nil
}

// decode reads a weight by tiles.
func decode(d quant.Decoder, s *stored, tiles []span) ([]byte, error) {
	var parts []*sample
	for _, name := range d.Parts() {
		p := s.part(name)
		if p == nil {
			return nil, fmt.Errorf("found the part %s, expected one that is stored", tensor.Quote(name))
		}
		parts = append(parts, p)
	}
	width := d.Values().Bits() / 8
	all := make([]byte, d.Info().Count()*width)
	for _, t := range tiles {
		var in [][]byte
		for _, r := range d.Inputs(nil, t.lo, t.hi) {
			p, err := parts[r.Part].pieces(r)
			if err != nil {
				return nil, err
			}
			in = append(in, p)
		}
		if err := d.Decode(all[t.lo*width:t.hi*width], t.lo, t.hi, in); err != nil {
			return nil, fmt.Errorf("elements %d to %d: %w", t.lo, t.hi, err)
		}
	}
	return all, nil
}

// numbers decodes a weight at once.
func numbers(d quant.Decoder, s *stored) ([]float32, error) {
	b, err := decode(d, s, []span{{0, d.Info().Count()}})
	if err != nil {
		return nil, err
	}
	x := make([]float32, d.Info().Count())
	return x, tensor.ToFloats(x, b, d.Values())
}

// stored is a checkpoint in memory, as a scheme sees it.
type stored struct {
	list   []sample
	dtype  tensor.DType
	config []byte
}

// plain is a tensor that is part of no weight.
var plain = newSample("model.norm.weight", tensor.F32, 64)

// newStored is a checkpoint with the parts of a weight in it and a plain tensor.
func (s *scheme) newStored(spec quant.Spec, w *weight, parts []sample) (*stored, error) {
	key, object, err := s.Config([]quant.Assigned{{Name: w.Name, Spec: spec}}, nil)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	config, err := json.Marshal(map[string]jsontext.Value{key: object})
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if _, ok := s.Declaration(object); !ok {
		return nil, fmt.Errorf("it does not know its own quantization_config %s", oneLine(string(object)))
	}
	return &stored{append([]sample{plain}, parts...), w.DType, config}, nil
}

func (s *stored) part(name string) *sample {
	for i := range s.list {
		if s.list[i].Name == name {
			return &s.list[i]
		}
	}
	return nil
}

func (s *stored) Tensors() []tensor.Info { return infos(s.list) }
func (s *stored) DType() tensor.DType    { return s.dtype }
func (s *stored) Config() []byte         { return s.config }

func (s *stored) Lookup(name string) (tensor.Info, bool) {
	if p := s.part(name); p != nil {
		return p.Info, true
	}
	return tensor.Info{}, false
}

func (s *stored) Read(name string, p []byte, off int64) error {
	x := s.part(name)
	if x == nil || off < 0 || off+int64(len(p)) > int64(len(x.data)) {
		return fmt.Errorf("tensor %s: %d bytes at %d: %w", tensor.Quote(name), len(p), off, io.ErrUnexpectedEOF)
	}
	copy(p, x.data[off:])
	return nil
}

// find finds the one weight of a checkpoint.
func (s *scheme) find(ctx context.Context, c *stored, w *weight, spec quant.Spec) (quant.Decoder, error) {
	list, err := s.Find(ctx, c)
	if err != nil {
		return nil, err
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("found %d weights, expected the one that was stored", len(list))
	}
	d := list[0]
	if i := d.Info(); i.Name != w.Name || i.DType != w.DType || !slices.Equal(i.Shape, w.Shape) {
		return nil, fmt.Errorf("found %s %v %v, expected %s %v %v", quoted(i), i.DType, i.Shape,
			quoted(w.Info), w.DType, w.Shape)
	}
	if d.Spec().Type != spec.Type {
		return nil, fmt.Errorf("found the type %s, expected %s", d.Spec().Type, spec.Type)
	}
	if slices.Contains(d.Parts(), plain.Name) {
		return nil, fmt.Errorf("found %s among the parts, which is a tensor by itself", quoted(plain.Info))
	}
	return d, nil
}

// distance is the root of the mean square of what differs, relative to the numbers themselves.
func distance(got, want []float32) float64 {
	sum, scale := 0.0, 0.0
	for i := range want {
		d, x := float64(got[i])-float64(want[i]), float64(want[i])
		sum, scale = sum+d*d, scale+x*x
	}
	if sum == 0 {
		return 0
	}
	return math.Sqrt(sum / scale)
}

// refusal makes sure that an error is one by which a weight is refused.
func refusal(err error) error {
	for _, k := range []error{quant.ErrMalformed, quant.ErrUnsupported, quant.ErrUnknown, quant.ErrParameter,
		formats.ErrMalformed, formats.ErrUnsupported, formats.ErrLimit, tensor.ErrOverflow} {
		if errors.Is(err, k) && !errors.Is(err, host.ErrFailed) {
			return nil
		}
	}
	if errors.Is(err, host.ErrFailed) {
		return err
	}
	return fmt.Errorf("the error is of no kind, such as quant.ErrMalformed: %w", err)
}

// quoted names a tensor.
func quoted(t tensor.Info) string { return tensor.Quote(t.Name) }
