package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/plugins/lock"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// scheme is a quantisation scheme of a plugin.
type scheme struct {
	program *program
	facts   *lock.Scheme
	tiles   tiles
}

// Name is the quant_method of a config.json.
func (s *scheme) Name() string { return s.facts.Name }

// Version is that of the plugin, with the digest of its files.
func (s *scheme) Version() string { return s.program.version() }

// Memory is what this process needs for it.
func (s *scheme) Memory(streams int) int64 { return s.program.memory(streams) }

// Types lists what Spec takes.
func (s *scheme) Types() []quant.Type {
	var list []quant.Type
	for _, name := range s.facts.Types {
		list = append(list, quant.Type{Name: name, ReadOnly: !s.program.Can(lock.SchemeEncode)})
	}
	return list
}

// Notices say what a user should know of weights that are written.
func (s *scheme) Notices() []string { return s.facts.Notices }

// Spec makes the Spec of a type. Of the parameters it takes those that the plugin has said that its types have.
func (s *scheme) Spec(typ string, asked quant.Params) (quant.Spec, error) {
	if !slices.Contains(s.facts.Types, typ) {
		return quant.Spec{}, fmt.Errorf("%w %q; scheme %s has %s", quant.ErrUnknown, typ, s.Name(),
			strings.Join(s.facts.Types, ", "))
	}
	spec := quant.Spec{Type: typ}
	for _, p := range asked {
		if !slices.Contains(s.facts.Parameters, p.Name) {
			continue
		}
		switch v := p.Value.(type) {
		case int64:
			if p.Name != wire.BlockSize || v <= 0 {
				return quant.Spec{}, fmt.Errorf("%w: %s is %d, expected 1 or more", quant.ErrParameter, p.Name, v)
			}
		case bool:
			if p.Name != wire.DoubleQuant {
				return quant.Spec{}, fmt.Errorf("%w: %s is %v, expected a number", quant.ErrParameter, p.Name, v)
			}
			if !v {
				continue
			}
		default:
			return quant.Spec{}, fmt.Errorf("%w: %s is a %T", quant.ErrParameter, p.Name, p.Value)
		}
		spec.Params = append(spec.Params, p)
	}
	slices.SortFunc(spec.Params, func(a, b quant.Param) int { return strings.Compare(a.Name, b.Name) })
	return spec, nil
}

// Declaration reports whether a quantization_config is the scheme's, by its quant_method. What else it says is known to
// the plugin alone, so that any module may have stayed plain.
func (s *scheme) Declaration(config []byte) (quant.Declaration, bool) {
	var c struct {
		Method string `json:"quant_method"`
	}
	d := quant.Declaration{Skips: func(string) bool { return true }}
	return d, json.Unmarshal(config, &c) == nil && c.Method == s.Name()
}

// mayHave reports whether a checkpoint can have weights of the scheme, so that the plugin has to be asked.
func (s *scheme) mayHave(c quant.Stored) bool {
	if len(s.facts.Suffixes) == 0 {
		return true
	}
	var config struct {
		Quantization jsontext.Value `json:"quantization_config"`
	}
	if b := c.Config(); b != nil && json.Unmarshal(b, &config) == nil && config.Quantization != nil {
		if _, ok := s.Declaration(config.Quantization); ok {
			return true
		}
	}
	return slices.ContainsFunc(c.Tensors(), func(t tensor.Info) bool {
		return slices.ContainsFunc(s.facts.Suffixes, func(e string) bool { return strings.HasSuffix(t.Name, e) })
	})
}

// Find asks the plugin for the weights of a checkpoint that may have some.
func (s *scheme) Find(ctx context.Context, c quant.Stored) ([]quant.Decoder, error) {
	if !s.program.Can(lock.SchemeDecode) || !s.mayHave(c) {
		return nil, nil
	}
	p, err := s.program.running(ctx)
	if err != nil {
		return nil, err
	}
	call := p.begin(ctx)
	f := finding{scheme: s, process: p, ctx: ctx, stored: c}
	if err := call.end(f.find(call)); err != nil {
		return nil, err
	}
	return f.found, nil
}

// finding is a search for weights.
type finding struct {
	scheme  *scheme
	process *process
	ctx     context.Context
	stored  quant.Stored
	found   []quant.Decoder
	names   map[string]bool
}

func (f *finding) find(call *call) error {
	stream, err := f.process.scheme.Find(call.ctx)
	if err != nil {
		return err
	}
	send := func(r *pb.FindRequest) error {
		call.progress()
		if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // at EOF the answer says why
			return err
		}
		return nil
	}
	start := &pb.FindStart{Scheme: f.scheme.Name()}
	if d := f.stored.DType(); d.Valid() {
		start.Dtype = d.String()
	}
	config := f.stored.Config()
	for first := true; first || len(config) > 0; first = false {
		n := min(len(config), wire.Chunk)
		start.Config, config = config[:n], config[n:]
		if err := send(&pb.FindRequest{Message: &pb.FindRequest_Start{Start: start}}); err != nil {
			return err
		}
		start = &pb.FindStart{Scheme: start.Scheme, Dtype: start.Dtype}
	}
	b := wire.Batch(func(list []*pb.Tensor) error {
		return send(&pb.FindRequest{Message: &pb.FindRequest_Tensors{Tensors: &pb.FindTensors{Tensors: list}}})
	})
	for _, t := range f.stored.Tensors() {
		if t.Encoding != (tensor.Encoding{}) { // blocks of a container's own are another scheme's
			continue
		}
		if err := b.Add(wire.FromInfo(t)); err != nil {
			return err
		}
	}
	if err := b.End(); err != nil {
		return err
	}
	if err := send(&pb.FindRequest{Message: &pb.FindRequest_Done{Done: &pb.FindDone{}}}); err != nil {
		return err
	}
	f.names = map[string]bool{}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if w := r.GetWant(); w != nil {
			data, err := f.content(w)
			if err != nil {
				return err
			}
			c := &pb.FindContent{Data: data}
			if err := send(&pb.FindRequest{Message: &pb.FindRequest_Content{Content: c}}); err != nil {
				return err
			}
		}
		for _, w := range r.GetWeights() {
			d, err := f.decoder(w)
			if err != nil {
				return f.process.blamed(fmt.Errorf("%w: weight %s: %w", quant.ErrMalformed,
					tensor.Quote(w.GetTensor().GetName()), err))
			}
			call.progress()
			f.found = append(f.found, d)
		}
	}
}

// content reads what the plugin asks for.
func (f *finding) content(w *pb.FindWant) ([]byte, error) {
	t, ok := f.stored.Lookup(w.GetTensor())
	if !ok {
		return nil, f.process.fault("asks for tensor %s, which is not there", tensor.Quote(w.GetTensor()))
	}
	size, err := t.Size()
	if err != nil {
		return nil, err
	}
	off, n := w.GetOffset(), w.GetLength()
	if off < 0 || n <= 0 || n > wire.Chunk || off > size || n > size-off {
		return nil, f.process.fault("asks for %d bytes at %d of tensor %s, expected at most 1 MiB of its %d", n, off,
			tensor.Quote(t.Name), size)
	}
	data := make([]byte, n)
	return data, f.stored.Read(t.Name, data, off)
}

// mostBytes bounds the stored bytes of a unit: those of a tile are in memory at once, and those of one go in a message.
func mostBytes(unit int64) int64 { return min(64*unit, wire.Chunk) }

// mostParts bounds the tensors of a weight.
const mostParts = 64

// mostUnit bounds the elements of a unit: a tile of one goes in a message.
const mostUnit = 1 << 18

// decoder checks a weight that the plugin has found.
func (f *finding) decoder(w *pb.FoundWeight) (quant.Decoder, error) {
	info, err := wire.ToInfo(w.GetTensor())
	if err != nil {
		return nil, err
	}
	d := &decoder{scheme: f.scheme, process: f.process, ctx: f.ctx, id: w.GetDecoder(), info: info,
		spec: wire.ToSpec(w.GetSpec()), unit: w.GetUnit()}
	if d.values, err = tensor.ParseDType(w.GetValues()); err != nil {
		return nil, err
	}
	slices.SortFunc(d.spec.Params, func(a, b quant.Param) int { return strings.Compare(a.Name, b.Name) })
	switch {
	case !slices.Contains(f.scheme.facts.Types, d.spec.Type):
		return nil, fmt.Errorf("found the type %q, expected one of %s", d.spec.Type,
			strings.Join(f.scheme.facts.Types, ", "))
	case !info.DType.Float() || !d.values.Float():
		return nil, fmt.Errorf("found values of %v for a weight of %v, expected F32, F16 or BF16", d.values, info.DType)
	case d.unit <= 0 || d.unit > mostUnit:
		return nil, fmt.Errorf("found a unit of %d elements, expected 1 to %d", d.unit, mostUnit)
	case len(w.GetParts()) == 0 || len(w.GetParts()) > mostParts:
		return nil, fmt.Errorf("found %d parts, expected 1 to %d", len(w.GetParts()), mostParts)
	case len(f.found) == len(f.stored.Tensors()):
		return nil, fmt.Errorf("found more weights than tensors, of which there are %d", len(f.found))
	case f.names[info.Name]:
		return nil, errors.New("found it twice, expected it once")
	case info.Count() == 0:
		return nil, errors.New("found no elements, expected some")
	}
	f.names[info.Name] = true
	units := (info.Count()-1)/d.unit + 1
	all, each := int64(0), int64(0) // bytes of every tile, and of each unit of it
	for _, x := range w.GetParts() {
		t, ok := f.stored.Lookup(x.GetName())
		if !ok {
			return nil, fmt.Errorf("found the part %s, which is not there", tensor.Quote(x.GetName()))
		}
		size, err := t.Size()
		if err != nil {
			return nil, err
		}
		rule := wire.ToRule(x.GetRule())
		if !rule.Fits(units, size, false) || rule.Stride == 0 && size-rule.First > wire.Chunk || rule.Stride > wire.Chunk {
			return nil, unfit(rule, t.Name, size, units)
		}
		d.parts, d.names = append(d.parts, part{rule, size}), append(d.names, t.Name)
		if each += rule.Stride; rule.Stride == 0 {
			all += size - rule.First
		}
	}
	if most := mostBytes(d.unit); all > wire.Chunk || each > most {
		return nil, fmt.Errorf("found parts of %d bytes for each tile and %d for each unit of %d elements, expected at most "+
			"%d and %d", all, each, d.unit, wire.Chunk, most)
	}
	d.atOnce = atOnce(d.unit, each, d.values)
	return d, nil
}

// Encoder has the plugin prepare to store a weight.
func (s *scheme) Encoder(ctx context.Context, spec quant.Spec, t tensor.Info) (quant.Encoder, error) {
	if !s.program.Can(lock.SchemeEncode) {
		return nil, fmt.Errorf("%w to %s: the plugin %s only reads it", quant.ErrUnsupported, spec.Type, s.program.Name)
	}
	p, err := s.program.running(ctx)
	if err != nil {
		return nil, err
	}
	call := p.begin(ctx)
	r, err := p.scheme.Encoder(call.ctx, &pb.EncoderRequest{Scheme: s.Name(), Spec: wire.FromSpec(spec),
		Tensor: wire.FromInfo(t)})
	if err = call.end(err); err != nil {
		return nil, err
	}
	e := &encoder{scheme: s, process: p, ctx: ctx, id: r.GetEncoder(), info: t, unit: r.GetUnit(), carry: r.GetCarry()}
	if err := e.check(r); err != nil {
		return nil, p.fault("answers an encoder of tensor %s that cannot be: %v", tensor.Quote(t.Name), err)
	}
	return e, nil
}

// check takes in what the plugin says of an encoder.
func (e *encoder) check(r *pb.EncoderResponse) error {
	const mostCarry = 1 << 16
	if e.unit <= 0 || e.unit > mostUnit || e.carry < 0 || e.carry > mostCarry || len(r.GetOutputs()) == 0 ||
		len(r.GetOutputs()) > mostParts {
		return fmt.Errorf("found %d outputs, a unit of %d elements and %d numbers carried over of each", len(r.GetOutputs()),
			e.unit, e.carry)
	}
	units, each, names := int64(0), 4*e.carry, map[string]bool{}
	if n := e.info.Count(); n > 0 {
		units = (n-1)/e.unit + 1
	}
	for _, o := range r.GetOutputs() {
		info, err := wire.ToInfo(o.GetTensor())
		if err != nil {
			return err
		}
		if names[info.Name] || info.Name == "" {
			return fmt.Errorf("found the output %s, expected each name once", tensor.Quote(info.Name))
		}
		names[info.Name] = true
		size, _ := info.Size() // ToInfo has looked
		rule := wire.ToRule(o.GetRule())
		if !rule.Fits(units, size, true) || rule.Stride > wire.Chunk {
			return unfit(rule, info.Name, size, units)
		}
		e.outputs, e.parts = append(e.outputs, info), append(e.parts, part{rule, size})
		each += rule.Stride
	}
	if most := mostBytes(e.unit); each > most {
		return fmt.Errorf("found outputs and numbers to carry of %d bytes for each unit of %d elements, expected at most %d",
			each, e.unit, most)
	}
	e.atOnce = atOnce(e.unit, each, e.info.DType)
	return nil
}

// unfit is the error of a rule that does not lie within its tensor.
func unfit(r wire.Rule, name string, size, units int64) error {
	return fmt.Errorf("%s: found a rule of first %d, stride %d and wrap %d for %d units, expected one that %d bytes hold",
		tensor.Quote(name), r.First, r.Stride, r.Wrap, units, size)
}

// mostConfig bounds a quantization_config.
const mostConfig = 1 << 20

// Config has the plugin say how a loader is told of the weights. They have one spec.
func (s *scheme) Config(weights []quant.Assigned, skip []string) (key string, object []byte, err error) {
	if len(weights) == 0 {
		return "", nil, fmt.Errorf("%w: no weights, expected at least one", quant.ErrUnsupported)
	}
	for _, w := range weights {
		if !w.Spec.Equal(weights[0].Spec) {
			return "", nil, fmt.Errorf("tensor %s: %w in %s beside others in %s: plugins have one type a checkpoint",
				tensor.Quote(w.Name), quant.ErrUnsupported, w.Spec, weights[0].Spec)
		}
	}
	ctx := context.Background()
	p, err := s.program.running(ctx)
	if err != nil {
		return "", nil, err
	}
	call := p.begin(ctx)
	r, err := s.config(call, weights[0].Spec, skip)
	if err = call.end(err); err != nil {
		return "", nil, err
	}
	b := jsontext.Value(r.GetJson())
	if len(b) > mostConfig {
		return "", nil, p.fault("answers a quantization_config of %d bytes, expected a JSON object of at most %d", len(b),
			mostConfig)
	}
	if _, own := s.Declaration(b); !own || b.Kind() != '{' {
		return "", nil, p.fault("answers the quantization_config %s, expected a JSON object with the quant_method %q",
			wire.OneLine(string(b), 200), s.Name())
	}
	return "quantization_config", b, nil
}

func (s *scheme) config(call *call, spec quant.Spec, skip []string) (*pb.ConfigResponse, error) {
	stream, err := call.p.scheme.Config(call.ctx)
	if err != nil {
		return nil, err
	}
	r := &pb.ConfigRequest{Scheme: s.Name(), Spec: wire.FromSpec(spec), LoaderChooses: skip == nil}
	bytes := 0
	for _, name := range skip {
		if bytes += len(name) + 8; bytes > wire.Chunk && len(r.Skip) > 0 {
			if err := stream.Send(r); err != nil {
				break // the answer says why
			}
			r, bytes = &pb.ConfigRequest{}, len(name)+8
		}
		r.Skip = append(r.Skip, name)
	}
	if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return stream.CloseAndRecv()
}
