package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

const (
	// tileElements is how many elements a tile has that goes to another process: enough that the way there does not count.
	tileElements = 1 << 18
	// tileBytes bounds what a message has of a tile, but for what every tile is given, and a single unit.
	tileBytes = 2 << 20
)

// atOnce is how many elements go in one call: whole units, of so many elements, and so many stored bytes each.
func atOnce(unit, bytes int64, values tensor.DType) int64 {
	n := min(tileElements/unit, tileBytes/max(bytes, 1), tileBytes/(unit*values.Bits()/8))
	return max(n, 1) * unit
}

// exchange is a stream of tiles: one is sent, and its answer awaited. It is used again for the next.
type exchange struct {
	process *process
	stream  grpc.ClientStream
	call    *call
	id      int64
	sent    wire.Message
	got     wire.Message
	spans   []wire.Span
	views   []views  // of the parts, for Decode
	joined  []byte   // what a part has in several places
	out     [][]byte // of the outputs, for Encode: what is still to be filled
	now     [][]byte // and what is filled by this call
	answer  answer   // of Encode
}

// tiles keeps the streams that are not in use.
type tiles struct {
	mu             sync.Mutex
	decode, encode []*exchange
}

// take finds a stream of a process, or opens one.
func (t *tiles) take(ctx context.Context, p *process, idle *[]*exchange,
	open func(ctx context.Context) (grpc.ClientStream, error)) (*exchange, error) {
	t.mu.Lock()
	for n := len(*idle); n > 0; n = len(*idle) {
		x := (*idle)[n-1]
		*idle = (*idle)[:n-1]
		// One of an operation that is over, or of another that may be cancelled, is of no use.
		if x.process == p && x.call.parent.Done() == ctx.Done() && x.call.ctx.Err() == nil {
			t.mu.Unlock()
			return x, nil
		}
		_ = x.call.end(nil)
	}
	t.mu.Unlock()
	x := &exchange{process: p, call: p.begin(ctx)}
	x.call.timer.Stop()
	stream, err := open(x.call.ctx)
	if err != nil {
		return nil, x.call.end(err)
	}
	x.stream = stream
	return x, nil
}

// give gives a stream back that can be used again.
func (t *tiles) give(idle *[]*exchange, x *exchange) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*idle = append(*idle, x)
}

// ask sends what is in sent and awaits the answer. An error ends the stream.
func (x *exchange) ask() error {
	x.id++
	x.sent.Numbers[0] = x.id
	x.call.progress()
	err := x.stream.SendMsg(&x.sent)
	if err == nil || errors.Is(err, io.EOF) { // at EOF the answer says why
		err = x.stream.RecvMsg(&x.got)
	}
	x.call.timer.Stop()
	if errors.Is(err, io.EOF) {
		err = x.process.fault("ended the call, expected an answer")
	}
	if err == nil && x.got.Numbers[0] != x.id {
		err = x.process.fault("answers tile %d, expected %d", x.got.Numbers[0], x.id)
	}
	return err
}

// part is a tensor of a weight, by the rule of a plugin.
type part struct {
	wire.Rule
	size int64
}

// decoder reads a weight by a plugin.
type decoder struct {
	scheme  *scheme
	process *process
	ctx     context.Context
	id      int64
	info    tensor.Info
	spec    quant.Spec
	unit    int64
	atOnce  int64 // elements in one call
	values  tensor.DType
	names   []string
	parts   []part
}

func (d *decoder) Info() tensor.Info    { return d.info }
func (d *decoder) Spec() quant.Spec     { return d.spec }
func (d *decoder) Parts() []string      { return d.names }
func (d *decoder) Unit() int64          { return d.unit }
func (d *decoder) Values() tensor.DType { return d.values }

// TileElements is how large a tile is best.
func (d *decoder) TileElements() int64 { return d.atOnce }

// units are those of the elements [lo, hi).
func units(lo, hi, unit int64) (int64, int64) {
	last := hi / unit
	if hi%unit != 0 {
		last++
	}
	return lo / unit, last
}

func (d *decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	first, last := units(lo, hi, d.unit)
	var few [4]wire.Span
	for i, p := range d.parts {
		for _, s := range p.Append(few[:0], first, last, p.size) {
			r = append(r, quant.Range{Part: i, Offset: s.Offset, Length: s.Length})
		}
	}
	return r
}

// Decode decodes a range in as many calls as it takes.
func (d *decoder) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	x, err := d.scheme.tiles.take(d.ctx, d.process, &d.scheme.tiles.decode,
		func(ctx context.Context) (grpc.ClientStream, error) { return d.process.scheme.Decode(ctx) })
	if err != nil {
		return err
	}
	first, last := units(lo, hi, d.unit)
	x.views = x.views[:0]
	for _, p := range d.parts {
		x.spans = p.Append(x.spans[:0], first, last, p.size)
		x.views = append(x.views, views{list: in[:len(x.spans)]})
		in = in[len(x.spans):]
	}
	width := d.values.Bits() / 8
	for at := lo; at < hi; at += d.atOnce {
		end := min(at+d.atOnce, hi)
		if err := d.decode(x, dst[(at-lo)*width:(end-lo)*width], at, end); err != nil {
			return x.call.end(err)
		}
	}
	d.scheme.tiles.give(&d.scheme.tiles.decode, x)
	return nil
}

// decode decodes what goes in one call.
func (d *decoder) decode(x *exchange, dst []byte, lo, hi int64) error {
	first, last := units(lo, hi, d.unit)
	x.sent.Numbers = [5]int64{0, d.id, lo, hi}
	x.sent.Data, x.sent.Fields, x.joined = x.sent.Data[:0], x.sent.Fields[:0], x.joined[:0]
	for i, p := range d.parts {
		part := []byte(nil)
		if p.Stride == 0 {
			part = x.views[i].list[0]
		} else {
			part = x.next(&x.views[i], p.bytes(x, first, last))
		}
		x.sent.Data, x.sent.Fields = append(x.sent.Data, part), append(x.sent.Fields, 5)
	}
	got := 0
	var bad error
	x.got.Into = func(field protowire.Number, n int) ([]byte, error) {
		if field != 2 || n > len(dst)-got {
			bad = fmt.Errorf("sent %d of %d bytes of tensor %s", got+n, len(dst), tensor.Quote(d.info.Name))
			return nil, bad
		}
		got += n
		return dst[got-n : got], nil
	}
	err := x.ask()
	switch {
	case bad != nil:
		return d.process.fault("%v", bad)
	case err == nil && got < len(dst):
		return d.process.fault("sent %d of %d bytes of tensor %s", got, len(dst), tensor.Quote(d.info.Name))
	}
	return err
}

// bytes is how many of a part the units [first, last) have.
func (p part) bytes(x *exchange, first, last int64) int64 {
	n := int64(0)
	x.spans = p.Append(x.spans[:0], first, last, p.size)
	for _, s := range x.spans {
		n += s.Length
	}
	return n
}

// views are the pieces of a part, and how far they have been handed on.
type views struct {
	list [][]byte
	off  int // in the first
}

// next is the next n bytes of views, joined where they are of several.
func (x *exchange) next(v *views, n int64) []byte {
	from := len(x.joined)
	for n > 0 {
		piece := v.list[0][v.off:]
		if int64(len(piece)) >= n {
			v.off += int(n)
			if from == len(x.joined) {
				return piece[:n]
			}
			x.joined = append(x.joined, piece[:n]...)
			break
		}
		x.joined = append(x.joined, piece...)
		n -= int64(len(piece))
		v.list, v.off = v.list[1:], 0
	}
	return x.joined[from:len(x.joined):len(x.joined)]
}

// encoder writes a weight by a plugin.
type encoder struct {
	scheme  *scheme
	process *process
	ctx     context.Context
	id      int64
	info    tensor.Info
	unit    int64
	atOnce  int64 // elements in one call
	carry   int64
	outputs []tensor.Info
	parts   []part
}

func (e *encoder) Outputs() []tensor.Info { return e.outputs }
func (e *encoder) Unit() int64            { return e.unit }

// TileElements is how large a tile is best.
func (e *encoder) TileElements() int64 { return e.atOnce }

func (e *encoder) Deferred(lo, hi int64) int64 {
	first, last := units(lo, hi, e.unit)
	return (last - first) * e.carry
}

func (e *encoder) Tiles(r []quant.Range, lo, hi int64) []quant.Range {
	first, last := units(lo, hi, e.unit)
	var few [4]wire.Span
	for i, p := range e.parts {
		if p.Stride == 0 {
			continue
		}
		for _, s := range p.Append(few[:0], first, last, p.size) {
			r = append(r, quant.Range{Part: i, Offset: s.Offset, Length: s.Length})
		}
	}
	return r
}

// Encode encodes a range in as many calls as it takes.
func (e *encoder) Encode(out [][]byte, deferred []float32, lo, hi int64, src []byte) error {
	x, err := e.scheme.tiles.take(e.ctx, e.process, &e.scheme.tiles.encode,
		func(ctx context.Context) (grpc.ClientStream, error) { return e.process.scheme.Encode(ctx) })
	if err != nil {
		return err
	}
	x.out = append(x.out[:0], out...)
	width := e.info.DType.Bits() / 8
	for at := lo; at < hi; at += e.atOnce {
		end := min(at+e.atOnce, hi)
		carry := deferred[:e.Deferred(at, end)]
		deferred = deferred[len(carry):]
		err := e.encode(x, carry, at, end, src[(at-lo)*width:(end-lo)*width])
		if _, refused := errors.AsType[*quant.NonFiniteError](err); refused {
			e.scheme.tiles.give(&e.scheme.tiles.encode, x)
			return err
		}
		if err != nil {
			return x.call.end(err)
		}
	}
	e.scheme.tiles.give(&e.scheme.tiles.encode, x)
	return nil
}

// encode encodes what goes in one call.
func (e *encoder) encode(x *exchange, carry []float32, lo, hi int64, src []byte) error {
	first, last := units(lo, hi, e.unit)
	x.now = x.now[:0]
	for _, p := range e.parts {
		if k := len(x.now); p.Stride > 0 { // an output has one place in a tile
			n := p.bytes(x, first, last)
			x.now = append(x.now, x.out[k][:n])
			x.out[k] = x.out[k][n:]
		}
	}
	x.sent.Numbers = [5]int64{0, e.id, lo, hi}
	x.sent.Data, x.sent.Fields = append(x.sent.Data[:0], src), append(x.sent.Fields[:0], 5)
	a := &x.answer
	if x.got.Into == nil { // once, since it is an allocation
		x.got.Into = a.into
	}
	*a = answer{encoder: e, out: x.now, carry: carry, memory: a.memory[:0]}
	err := x.ask()
	if err == nil || a.bad != nil {
		err = a.end(err)
	}
	return err
}

// answer takes in what a tile has become. Its memory is used again for the next tile.
type answer struct {
	*encoder
	out       [][]byte // where the outputs go that have a part in each tile: one place each
	carry     []float32
	output    int // of the next one
	carried   []byte
	nonFinite []byte
	memory    []byte // of the latter two
	bad       error
}

// into says where the next byte string of the answer goes.
func (a *answer) into(field protowire.Number, n int) ([]byte, error) {
	switch {
	case field == 2 && a.output < len(a.parts):
		var place []byte
		if a.parts[a.output].Stride > 0 && len(a.out) > 0 {
			place, a.out = a.out[0], a.out[1:]
		}
		if n == len(place) {
			a.output++
			return place, nil
		}
		a.bad = fmt.Errorf("sent %d of %d bytes of output %d of tensor %s", n, len(place), a.output,
			tensor.Quote(a.info.Name))
		return nil, a.bad
	case field == 3 && n == 4*len(a.carry) && a.carried == nil:
		a.carried = a.room(n)
		return a.carried, nil
	case field == 4 && n < 1<<16 && a.nonFinite == nil:
		a.nonFinite = a.room(n)
		return a.nonFinite, nil
	}
	a.bad = fmt.Errorf("sent %d bytes in field %d of a tile of tensor %s, expected %d outputs and %d bytes to carry", n,
		field, tensor.Quote(a.info.Name), len(a.parts), 4*len(a.carry))
	return nil, a.bad
}

// room is memory until the next tile.
func (a *answer) room(n int) []byte {
	from := len(a.memory)
	a.memory = slices.Grow(a.memory, n)[:from+n]
	return a.memory[from : from+n : from+n]
}

// end puts what has come in its places.
func (a *answer) end(err error) error {
	if a.bad != nil {
		return a.process.fault("%v", a.bad)
	}
	if a.nonFinite != nil {
		var m pb.NonFinite
		if err := proto.Unmarshal(a.nonFinite, &m); err != nil {
			return a.process.fault("sent a value that is not finite in an unknown form: %v", err)
		}
		if m.GetIndex() < 0 || m.GetIndex() >= a.info.Count() {
			return a.process.fault("found a value that is not finite at element %d of %d", m.GetIndex(), a.info.Count())
		}
		return &quant.NonFiniteError{Index: m.GetIndex(), What: wire.OneLine(m.GetWhat(), 100)}
	}
	if a.output != len(a.parts) || len(a.carried) != 4*len(a.carry) {
		return a.process.fault("sent %d of %d outputs and %d of %d bytes to carry of tensor %s", a.output, len(a.parts),
			len(a.carried), 4*len(a.carry), tensor.Quote(a.info.Name))
	}
	if err == nil && len(a.carry) > 0 {
		err = tensor.ToFloats(a.carry, a.carried, tensor.F32)
	}
	return err
}

// Finish has the plugin write what no tile has.
func (e *encoder) Finish(c quant.Deferred, write func(part int, off int64, p []byte) error) error {
	call := e.process.begin(e.ctx)
	return call.end(e.finish(call, c, write))
}

func (e *encoder) finish(call *call, c quant.Deferred, write func(part int, off int64, p []byte) error) error {
	stream, err := e.process.scheme.Finish(call.ctx)
	if err != nil {
		return err
	}
	send := func(r *pb.SchemeServiceFinishRequest) error {
		call.progress()
		if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // at EOF the answer says why
			return err
		}
		return nil
	}
	begin := &pb.SchemeServiceFinishRequest_Encoder{Encoder: e.id}
	if err := send(&pb.SchemeServiceFinishRequest{Message: begin}); err != nil {
		return err
	}
	carried := e.Deferred(0, e.info.Count())
	missing := make([]int64, len(e.parts)) // bytes of each output that no tile has written
	for i, p := range e.parts {
		missing[i] = p.size
	}
	for _, r := range e.Tiles(nil, 0, e.info.Count()) {
		missing[r.Part] -= r.Length
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return e.complete(missing)
		}
		if err != nil {
			return err
		}
		switch m := r.GetMessage().(type) {
		case *pb.SchemeServiceFinishResponse_Want:
			i, n := m.Want.GetIndex(), m.Want.GetCount()
			if i < 0 || n <= 0 || n > wire.MaxCarryWant || i > carried || n > carried-i {
				return e.process.fault("asks for %d numbers at %d of %d that were carried over", n, i, carried)
			}
			list := make([]float32, n)
			if err := c.ReadFloats(list, i); err != nil {
				return err
			}
			b := &pb.SchemeServiceFinishRequest_Carry{Carry: wire.AppendFloats(nil, list)}
			if err := send(&pb.SchemeServiceFinishRequest{Message: b}); err != nil {
				return err
			}
		case *pb.SchemeServiceFinishResponse_Piece:
			i, off, data := m.Piece.GetPart(), m.Piece.GetOffset(), m.Piece.GetData()
			if i < 0 || i >= int64(len(e.parts)) || off < 0 || off > e.parts[i].size ||
				int64(len(data)) > min(missing[i], e.parts[i].size-off) || len(data) == 0 {
				return e.process.fault("writes %d bytes at %d of output %d of tensor %s, expected some within it that no "+
					"tile has", len(data), off, i, tensor.Quote(e.info.Name))
			}
			missing[i] -= int64(len(data))
			call.progress()
			if err := write(int(i), off, data); err != nil {
				return err
			}
		default:
			return e.process.fault("sent a %T, expected a want or a piece", m)
		}
	}
}

// complete makes sure that no output has a hole.
func (e *encoder) complete(missing []int64) error {
	for i, n := range missing {
		if n > 0 {
			return e.process.fault("has left %d of %d bytes of output %d of tensor %s unwritten", n, e.parts[i].size, i,
				tensor.Quote(e.info.Name))
		}
	}
	return nil
}
