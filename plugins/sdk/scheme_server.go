package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/lorakit/lorakit/formats"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// schemeServer serves schemes.
type schemeServer struct {
	pb.UnimplementedSchemeServiceServer
	schemes  map[string]Scheme
	decoders handles[*Decoder]
	encoders handles[*openEncoder]
}

func newSchemeServer(list []Scheme) *schemeServer {
	s := &schemeServer{schemes: map[string]Scheme{}}
	for _, x := range list {
		s.schemes[x.Info().Name] = x
	}
	return s
}

// openEncoder is an encoder of a weight.
type openEncoder struct {
	*Encoder
	sizes []int64 // of the outputs
	count int64   // of the weight's elements
	width int64   // bytes of one
}

func (s *schemeServer) encoding(name string) (EncodingScheme, error) {
	e, ok := s.schemes[name].(EncodingScheme)
	if !ok {
		return nil, wire.Status(fmt.Errorf("no scheme %q that is written: %w", name, quant.ErrUnsupported))
	}
	return e, nil
}

// Find finds weights.
func (s *schemeServer) Find(stream grpc.BidiStreamingServer[pb.FindRequest, pb.FindResponse]) error {
	c := &stored{stream: stream, byName: map[string]int{}}
	name := ""
	for done := false; !done; {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		switch m := r.GetMessage().(type) {
		case *pb.FindRequest_Start:
			name = m.Start.GetScheme()
			c.config = append(c.config, m.Start.GetConfig()...)
			if d, err := tensor.ParseDType(m.Start.GetDtype()); err == nil {
				c.dtype = d
			}
		case *pb.FindRequest_Tensors:
			for _, t := range m.Tensors.GetTensors() {
				info, err := wire.ToInfo(t)
				if err != nil {
					return wire.Status(err)
				}
				c.byName[info.Name] = len(c.infos)
				c.infos = append(c.infos, info)
			}
		case *pb.FindRequest_Done:
			done = true
		default:
			return wire.Status(fmt.Errorf("found a %T, expected start, tensors or done", m))
		}
	}
	scheme, ok := s.schemes[name]
	if !ok {
		return wire.Status(fmt.Errorf("no scheme %q: %w", name, quant.ErrUnsupported))
	}
	found, err := scheme.Find(stream.Context(), c)
	if err != nil {
		return wire.Status(err)
	}
	b := wire.Batch(func(list []*pb.FoundWeight) error { return stream.Send(&pb.FindResponse{Weights: list}) })
	for i := range found {
		d := &found[i]
		if d.Values == 0 {
			d.Values = d.DType
		}
		x := &pb.FoundWeight{Decoder: s.decoders.add(d), Tensor: wire.FromInfo(d.Info), Spec: wire.FromSpec(d.Spec),
			Unit: d.Unit, Values: d.Values.String()}
		for _, p := range d.Parts {
			x.Parts = append(x.Parts, &pb.FoundPart{Name: p.Name, Rule: wire.FromRule(p.Rule)})
		}
		if err := b.Add(x); err != nil {
			return err
		}
	}
	return wire.Status(b.End())
}

// stored are the tensors of a checkpoint, whose contents the host is asked for. It is for one goroutine.
type stored struct {
	stream grpc.BidiStreamingServer[pb.FindRequest, pb.FindResponse]
	infos  []tensor.Info
	byName map[string]int
	dtype  tensor.DType
	config []byte
}

func (s *stored) Tensors() []tensor.Info { return s.infos }
func (s *stored) DType() tensor.DType    { return s.dtype }

func (s *stored) Config() []byte { return s.config }

func (s *stored) Lookup(name string) (tensor.Info, bool) {
	i, ok := s.byName[name]
	if !ok {
		return tensor.Info{}, false
	}
	return s.infos[i], true
}

func (s *stored) Read(name string, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(len(p), wire.Chunk)
		err := s.stream.Send(&pb.FindResponse{Want: &pb.FindWant{Tensor: name, Offset: off, Length: int64(n)}})
		if err != nil {
			return err
		}
		r, err := s.stream.Recv()
		if err != nil {
			return err
		}
		got := r.GetContent().GetData()
		if len(got) != n {
			return fmt.Errorf("tensor %s: found %d bytes, expected the %d that were asked for", tensor.Quote(name), len(got), n)
		}
		copy(p, got)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// pooled grows a buffer that is used for every tile of a stream.
func pooled(b *[]byte, n int64) []byte {
	if int64(cap(*b)) < n {
		*b = make([]byte, n)
	}
	return (*b)[:n]
}

// tile reads the messages of a stream of tiles into buffers that are used again.
type tile struct {
	wire.Message
	buffers [][]byte
}

func newTile() *tile {
	t := &tile{}
	t.Into = func(_ protowire.Number, n int) ([]byte, error) {
		i := len(t.Data)
		if i == len(t.buffers) {
			t.buffers = append(t.buffers, nil)
		}
		return pooled(&t.buffers[i], int64(n)), nil
	}
	return t
}

// Decode decodes tiles.
func (s *schemeServer) Decode(stream grpc.BidiStreamingServer[pb.DecodeRequest, pb.DecodeResponse]) error {
	t := newTile()
	var buffer []byte
	for {
		switch err := stream.RecvMsg(&t.Message); {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		id, lo, hi := t.Numbers[0], t.Numbers[2], t.Numbers[3]
		d, err := s.decoders.get(t.Numbers[1])
		if err != nil {
			return err
		}
		if lo < 0 || hi < lo || hi > d.Count() || hi-lo > wire.MaxMessage || len(t.Data) != len(d.Parts) {
			return wire.Status(fmt.Errorf("found %d parts of the elements %d to %d, expected %d of at most %d elements",
				len(t.Data), lo, hi, len(d.Parts), d.Count()))
		}
		dst := pooled(&buffer, (hi-lo)*d.Values.Bits()/8)
		if err := d.Decode(dst, lo, hi, t.Data); err != nil {
			return wire.Status(err)
		}
		// What is sent is not touched before the next request is there, which the host sends when it has this answer.
		out := wire.Message{Numbers: [5]int64{id}, Data: [][]byte{dst}, Fields: []protowire.Number{2}}
		if err := stream.SendMsg(&out); err != nil {
			return err
		}
	}
}

// Encoder prepares to store a weight.
func (s *schemeServer) Encoder(ctx context.Context, r *pb.EncoderRequest) (*pb.EncoderResponse, error) {
	scheme, err := s.encoding(r.GetScheme())
	if err != nil {
		return nil, err
	}
	info, err := wire.ToInfo(r.GetTensor())
	if err != nil {
		return nil, wire.Status(err)
	}
	e, err := scheme.Encoder(ctx, wire.ToSpec(r.GetSpec()), info)
	if err != nil {
		return nil, wire.Status(err)
	}
	if e.Unit <= 0 {
		return nil, wire.Status(fmt.Errorf("found a unit of %d elements, expected 1 or more", e.Unit))
	}
	open := &openEncoder{Encoder: e, count: info.Count(), width: info.DType.Bits() / 8}
	x := &pb.EncoderResponse{Unit: e.Unit, Carry: e.Carry}
	for _, o := range e.Outputs {
		size, err := o.Size()
		if err != nil {
			return nil, wire.Status(err)
		}
		open.sizes = append(open.sizes, size)
		x.Outputs = append(x.Outputs, &pb.EncodedPart{Tensor: wire.FromInfo(o.Info), Rule: wire.FromRule(o.Rule)})
	}
	x.Encoder = s.encoders.add(open)
	return x, nil
}

// Encode encodes tiles.
func (s *schemeServer) Encode(stream grpc.BidiStreamingServer[pb.EncodeRequest, pb.EncodeResponse]) error {
	t := newTile()
	var buffers [][]byte
	var spans []wire.Span
	var carry []float32
	var carried []byte
	for {
		switch err := stream.RecvMsg(&t.Message); {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		id, lo, hi := t.Numbers[0], t.Numbers[2], t.Numbers[3]
		e, err := s.encoders.get(t.Numbers[1])
		if err != nil {
			return err
		}
		if lo < 0 || hi < lo || hi > e.count || lo%e.Unit != 0 || len(t.Data) != 1 ||
			int64(len(t.Data[0])) != (hi-lo)*e.width {
			return wire.Status(fmt.Errorf("found %d values for the elements %d to %d of %d", len(t.Data), lo, hi, e.count))
		}
		first, last := lo/e.Unit, (hi+e.Unit-1)/e.Unit
		out := wire.Message{Numbers: [5]int64{id}}
		for i, o := range e.Outputs {
			n := int64(0)
			if o.Stride > 0 {
				spans = o.Append(spans[:0], first, last, e.sizes[i])
				for _, x := range spans {
					n += x.Length
				}
			}
			if i == len(buffers) {
				buffers = append(buffers, nil)
			}
			out.Data, out.Fields = append(out.Data, pooled(&buffers[i], n)), append(out.Fields, 2)
		}
		if n := int((last - first) * e.Carry); cap(carry) < n {
			carry = make([]float32, n)
		}
		carry = carry[:(last-first)*e.Carry]
		err = e.Encode(out.Data, carry, lo, hi, t.Data[0])
		var bad *quant.NonFiniteError
		if errors.As(err, &bad) {
			p, err := proto.Marshal(&pb.NonFinite{Index: bad.Index, What: bad.What})
			if err != nil {
				return wire.Status(err)
			}
			out.Data, out.Fields = [][]byte{p}, []protowire.Number{4}
		} else if err != nil {
			return wire.Status(err)
		} else if len(carry) > 0 {
			carried = wire.AppendFloats(carried[:0], carry)
			out.Data, out.Fields = append(out.Data, carried), append(out.Fields, 3)
		}
		if err := stream.SendMsg(&out); err != nil {
			return err
		}
	}
}

// Finish finishes a weight, and gives its encoder up.
func (s *schemeServer) Finish(
	stream grpc.BidiStreamingServer[pb.SchemeServiceFinishRequest, pb.SchemeServiceFinishResponse],
) error {
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	n := r.GetEncoder()
	e, err := s.encoders.get(n)
	if err != nil {
		return err
	}
	defer s.encoders.remove(n)
	if e.Finish == nil {
		return nil
	}
	return wire.Status(e.Finish(&carried{stream}, func(output int, off int64, p []byte) error {
		if output < 0 || output >= len(e.Outputs) || off < 0 || int64(len(p)) > e.sizes[output]-off {
			return fmt.Errorf("%d bytes at %d of output %d, expected some within it", len(p), off, output)
		}
		for len(p) > 0 {
			n := min(len(p), wire.Chunk)
			err := stream.Send(&pb.SchemeServiceFinishResponse{Message: &pb.SchemeServiceFinishResponse_Piece{
				Piece: &pb.FinishedPiece{Part: int64(output), Offset: off, Data: p[:n]}}})
			if err != nil {
				return err
			}
			p, off = p[n:], off+int64(n)
		}
		return nil
	}))
}

// carried are the numbers that the host has kept.
type carried struct {
	stream grpc.BidiStreamingServer[pb.SchemeServiceFinishRequest, pb.SchemeServiceFinishResponse]
}

func (c *carried) ReadFloats(dst []float32, i int64) error {
	for len(dst) > 0 {
		n := min(len(dst), wire.MaxCarryWant)
		err := c.stream.Send(&pb.SchemeServiceFinishResponse{Message: &pb.SchemeServiceFinishResponse_Want{
			Want: &pb.CarryWant{Index: i, Count: int64(n)}}})
		if err != nil {
			return err
		}
		r, err := c.stream.Recv()
		if err != nil {
			return err
		}
		b := r.GetCarry()
		if len(b) != 4*n {
			return fmt.Errorf("found %d bytes of carry, expected %d", len(b), 4*n)
		}
		if err := tensor.ToFloats(dst[:n], b, tensor.F32); err != nil {
			return err
		}
		dst, i = dst[n:], i+int64(n)
	}
	return nil
}

// Config makes a quantization_config.
func (s *schemeServer) Config(stream grpc.ClientStreamingServer[pb.ConfigRequest, pb.ConfigResponse]) error {
	var scheme EncodingScheme
	var spec quant.Spec
	skip, chooses := []string{}, false
	for first := true; ; first = false {
		r, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if first {
			if scheme, err = s.encoding(r.GetScheme()); err != nil {
				return err
			}
			spec, chooses = wire.ToSpec(r.GetSpec()), r.GetLoaderChooses()
		}
		skip = append(skip, r.GetSkip()...)
	}
	if scheme == nil {
		return wire.Status(fmt.Errorf("found no message, expected a scheme: %w", formats.ErrMalformed))
	}
	if chooses {
		skip = nil
	}
	b, err := scheme.Config(stream.Context(), spec, skip)
	if err != nil {
		return wire.Status(err)
	}
	return stream.SendAndClose(&pb.ConfigResponse{Json: b})
}
