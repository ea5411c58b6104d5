package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lorakit/lorakit/formats"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/tensor"
)

// formatServer serves formats.
type formatServer struct {
	pb.UnimplementedFormatServiceServer
	formats map[string]Format
	open    handles[*openFile]
	created handles[*createdFile]
}

func newFormatServer(list []Format) *formatServer {
	s := &formatServer{formats: map[string]Format{}}
	s.created.next = 1 << 32 // Close takes handles of both kinds
	for _, f := range list {
		s.formats[f.Info().Name] = f
	}
	return s
}

// handles are what is open, by numbers.
type handles[T any] struct {
	mu   sync.Mutex
	next int64
	open map[int64]T
}

func (h *handles[T]) add(x T) int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open == nil {
		h.open = map[int64]T{}
	}
	h.next++
	h.open[h.next] = x
	return h.next
}

func (h *handles[T]) get(n int64) (T, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	x, ok := h.open[n]
	if !ok {
		return x, fmt.Errorf("found the handle %d, expected one that is open", n)
	}
	return x, nil
}

func (h *handles[T]) remove(n int64) (x T, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	x, ok = h.open[n]
	delete(h.open, n)
	return x, ok
}

// openFile is a container that is read.
type openFile struct {
	Container
	files []string
}

// format finds a format that can do something.
func format[T Format](s *formatServer, name string) (T, error) {
	var none T
	f, ok := s.formats[name]
	if !ok {
		return none, wire.Status(fmt.Errorf("no format %q: %w", name, formats.ErrUnsupported))
	}
	x, ok := f.(T)
	if !ok {
		return none, wire.Status(fmt.Errorf("format %s: %w: it has no such call", name, formats.ErrUnsupported))
	}
	return x, nil
}

// Sniff asks a format about a file.
func (s *formatServer) Sniff(ctx context.Context, r *pb.SniffRequest) (*pb.SniffResponse, error) {
	f, err := format[Sniffer](s, r.GetFormat())
	if err != nil {
		return nil, err
	}
	yes, err := f.Sniff(ctx, r.GetPath())
	return &pb.SniffResponse{Yes: yes}, wire.Status(err)
}

// Open opens a file.
func (s *formatServer) Open(ctx context.Context, r *pb.OpenRequest) (*pb.OpenResponse, error) {
	f, err := format[Format](s, r.GetFormat())
	if err != nil {
		return nil, err
	}
	c, err := f.Open(ctx, r.GetPath())
	if err != nil {
		return nil, wire.Status(err)
	}
	files := c.Files
	if files == nil {
		files = []string{filepath.Base(r.GetPath())}
	}
	if err := checkText(&c, files); err != nil {
		if c.Close != nil {
			err = errors.Join(err, c.Close())
		}
		return nil, wire.Status(err)
	}
	return &pb.OpenResponse{
		Handle: s.open.add(&openFile{c, files}), Metadata: wire.FromMetadata(c.Metadata), Files: files,
	}, nil
}

// checkText refuses names and metadata of a file that are no UTF-8: a message cannot have them.
func checkText(c *Container, files []string) error {
	bad := func(what, text string) error {
		return fmt.Errorf("%s %s: found bytes that are no UTF-8: %w", what, tensor.Quote(text), formats.ErrMalformed)
	}
	for _, p := range c.Metadata {
		if !utf8.ValidString(p.Name) || !utf8.ValidString(p.Text()) {
			return bad("metadata", p.Name)
		}
	}
	for _, f := range files {
		if !utf8.ValidString(f) {
			return bad("file", f)
		}
	}
	for _, t := range c.Tensors {
		if !utf8.ValidString(t.Name) || !utf8.ValidString(t.File) {
			return bad("tensor", t.Name)
		}
	}
	return nil
}

// List sends the tensors, in batches.
func (s *formatServer) List(r *pb.ListRequest, stream grpc.ServerStreamingServer[pb.ListResponse]) error {
	f, err := s.open.get(r.GetHandle())
	if err != nil {
		return err
	}
	b := wire.Batch(func(list []*pb.StoredTensor) error { return stream.Send(&pb.ListResponse{Tensors: list}) })
	for i, t := range f.Tensors {
		x := &pb.StoredTensor{Tensor: wire.FromInfo(t.Info), File: t.File}
		if x.File == "" && len(f.files) > 0 {
			x.File = f.files[0]
		}
		if t.Data == nil {
			x.Place = &pb.StoredTensor_Extent{Extent: &pb.Extent{Offset: t.Offset}}
		} else {
			x.Place = &pb.StoredTensor_Opaque{Opaque: &pb.Opaque{Id: int64(i)}}
		}
		if err := b.Add(x); err != nil {
			return err
		}
	}
	return wire.Status(b.End())
}

// chunks are buffers that are used again when what is in them has been sent.
var chunks = mem.DefaultBufferPool()

// Read sends data, chunk by chunk.
func (s *formatServer) Read(r *pb.ReadRequest, stream grpc.ServerStreamingServer[pb.ReadResponse]) error {
	f, err := s.open.get(r.GetHandle())
	if err != nil {
		return err
	}
	if r.GetId() < 0 || r.GetId() >= int64(len(f.Tensors)) || f.Tensors[r.GetId()].Data == nil {
		return wire.Status(fmt.Errorf("found the id %d, expected one of an opaque tensor", r.GetId()))
	}
	t := f.Tensors[r.GetId()]
	size, err := t.Size()
	if err != nil {
		return wire.Status(err)
	}
	off, length := r.GetOffset(), r.GetLength()
	if off < 0 || length < 0 || off > size || length > size-off {
		return wire.Status(fmt.Errorf("tensor %s: found the range %d+%d, expected one within its %d bytes",
			tensor.Quote(t.Name), off, length, size))
	}
	for end := off + length; off < end; {
		if err := stream.Context().Err(); err != nil {
			return wire.Status(err)
		}
		p := chunks.Get(int(min(end-off, wire.Chunk)))
		if err := formats.ReadFull(t.Data, *p, off); err != nil {
			chunks.Put(p)
			return wire.Status(fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err))
		}
		m := wire.Message{Numbers: [5]int64{off}, Data: [][]byte{*p}, Fields: []protowire.Number{2}}
		off += int64(len(*p))
		m.Owned = mem.NewBuffer(p, chunks)
		if err := stream.SendMsg(&m); err != nil {
			return err
		}
	}
	return nil
}

// Layout places tensors.
func (s *formatServer) Layout(stream grpc.BidiStreamingServer[pb.LayoutRequest, pb.LayoutResponse]) error {
	var f Layouter
	var o formats.Options
	var infos []tensor.Info
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if x := r.GetOptions(); x != nil {
			if f, err = format[Layouter](s, x.GetFormat()); err != nil {
				return err
			}
			m, err := wire.ToMetadata(x.GetMetadata())
			if err != nil {
				return wire.Status(err)
			}
			o = formats.Options{MaxShardSize: x.GetMaxShardSize(), SingleFile: x.GetSingleFile(), Stem: x.GetStem(),
				Parameters: x.GetParameters(), Metadata: m}
		}
		for _, t := range r.GetTensors() {
			info, err := wire.ToInfo(t.GetTensor())
			if err != nil {
				return wire.Status(err)
			}
			infos = append(infos, info)
			o.Groups = append(o.Groups, int(t.GetGroup()))
		}
	}
	if f == nil {
		return wire.Status(errors.New("found no options, expected them in the first message"))
	}
	l, err := f.Layout(stream.Context(), infos, o)
	if err != nil {
		return wire.Status(err)
	}
	return sendLayout(l, func(list []*pb.LayoutItem) error { return stream.Send(&pb.LayoutResponse{Items: list}) })
}

// sendLayout sends a layout in batches.
func sendLayout(l formats.Layout, send func([]*pb.LayoutItem) error) error {
	b := wire.Batch(send)
	add := func(item *pb.LayoutItem) {
		_ = b.Add(item) // it is told again at the end
	}
	for _, s := range l.Shards {
		add(&pb.LayoutItem{Item: &pb.LayoutItem_Shard{Shard: &pb.LayoutShard{Name: s.Name, Size: s.Size}}})
		for i, t := range s.Tensors {
			add(&pb.LayoutItem{Item: &pb.LayoutItem_Place{Place: &pb.LayoutPlace{Tensor: int64(t), Offset: s.Offsets[i]}}})
		}
		for _, p := range append([]formats.Piece{{Bytes: s.Header}}, s.Pieces...) {
			for off := 0; off < len(p.Bytes); off += wire.Chunk {
				add(&pb.LayoutItem{Item: &pb.LayoutItem_Piece{Piece: &pb.LayoutPiece{
					Offset: p.Offset + int64(off), Data: p.Bytes[off:min(off+wire.Chunk, len(p.Bytes))]}}})
			}
		}
		for _, c := range s.Checksums {
			add(&pb.LayoutItem{Item: &pb.LayoutItem_Checksum{Checksum: &pb.LayoutChecksum{
				Offset: c.Offset, Length: c.Bytes, At: c.At}}})
		}
	}
	for _, x := range l.Extra {
		for off := 0; off == 0 || off < len(x.Data); off += wire.Chunk {
			add(&pb.LayoutItem{Item: &pb.LayoutItem_Extra{Extra: &pb.LayoutExtra{
				Name: x.Name, Data: x.Data[off:min(off+wire.Chunk, len(x.Data))]}}})
		}
	}
	for _, n := range l.Notices {
		add(&pb.LayoutItem{Item: &pb.LayoutItem_Notice{Notice: n}})
	}
	return wire.Status(b.End())
}

// createdFile is a file that is written.
type createdFile struct {
	writer formats.Writer
	sizes  []int64
	end    context.CancelFunc

	mu   sync.Mutex
	done bool // all data has been taken
	size int64
	err  error
	made bool // finished, with size and err
}

// Create begins a file.
func (s *formatServer) Create(stream grpc.ClientStreamingServer[pb.CreateRequest, pb.CreateResponse]) error {
	var f Streamer
	var path string
	var metadata formats.Metadata
	var infos []tensor.Info
	file := &createdFile{}
	for first := true; ; first = false {
		r, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if first {
			if f, err = format[Streamer](s, r.GetFormat()); err != nil {
				return err
			}
			path = r.GetPath()
			if metadata, err = wire.ToMetadata(r.GetMetadata()); err != nil {
				return wire.Status(err)
			}
		}
		for _, t := range r.GetTensors() {
			info, err := wire.ToInfo(t)
			if err != nil {
				return wire.Status(err)
			}
			size, _ := info.Size() // ToInfo has looked
			infos, file.sizes = append(infos, info), append(file.sizes, size)
		}
	}
	if f == nil {
		return wire.Status(errors.New("found no message, expected a format and a path"))
	}
	var ctx context.Context
	ctx, file.end = context.WithCancel(context.Background()) // it lives longer than this call
	w, err := f.Create(ctx, path, infos, metadata)
	if err != nil {
		file.end()
		return wire.Status(err)
	}
	file.writer = w
	return stream.SendAndClose(&pb.CreateResponse{Handle: s.created.add(file)})
}

// Write takes the data of all tensors.
func (s *formatServer) Write(stream grpc.ClientStreamingServer[pb.WriteRequest, pb.WriteResponse]) error {
	buffer := make([]byte, wire.Chunk)
	m := wire.Message{Into: func(_ protowire.Number, n int) ([]byte, error) {
		if n > len(buffer) {
			return nil, fmt.Errorf("found a chunk of %d bytes, expected at most %d", n, len(buffer))
		}
		return buffer[:n], nil
	}}
	var f *createdFile
	at, off, total := int64(0), int64(0), int64(0)
	for {
		err := stream.RecvMsg(&m)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if f == nil {
			if f, err = s.created.get(m.Numbers[0]); err != nil {
				return err
			}
		}
		for at < int64(len(f.sizes)) && off == f.sizes[at] {
			at, off = at+1, 0
		}
		var data []byte
		if len(m.Data) > 0 {
			data = m.Data[0]
		}
		if at == int64(len(f.sizes)) || m.Numbers[1] != at || m.Numbers[2] != off || int64(len(data)) > f.sizes[at]-off {
			return wire.Status(fmt.Errorf("found %d bytes at %d of tensor %d, expected those at %d of tensor %d", len(data),
				m.Numbers[2], m.Numbers[1], off, at))
		}
		if err := f.writer.Write(int(at), off, data); err != nil {
			return wire.Status(err)
		}
		off += int64(len(data))
		total += int64(len(data))
	}
	if f != nil {
		for at < int64(len(f.sizes)) && off == f.sizes[at] {
			at, off = at+1, 0
		}
		f.mu.Lock()
		f.done = at == int64(len(f.sizes))
		f.mu.Unlock()
	}
	return stream.SendAndClose(&pb.WriteResponse{Bytes: total})
}

// Finish completes a file.
func (s *formatServer) Finish(ctx context.Context, r *pb.FormatServiceFinishRequest) (
	*pb.FormatServiceFinishResponse, error) {
	f, err := s.created.get(r.GetHandle())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.made {
		whole := int64(0)
		for _, n := range f.sizes {
			whole += n
		}
		if whole > 0 && !f.done {
			return nil, wire.Status(errors.New("found data missing, expected all tensors to be written"))
		}
		f.size, f.err = f.writer.Finish(ctx)
		f.made = true
	}
	return &pb.FormatServiceFinishResponse{Size: f.size}, wire.Status(f.err)
}

// Abort removes a file.
func (s *formatServer) Abort(_ context.Context, r *pb.AbortRequest) (*pb.AbortResponse, error) {
	f, ok := s.created.remove(r.GetHandle())
	if !ok {
		return &pb.AbortResponse{}, nil
	}
	f.end()
	return &pb.AbortResponse{}, wire.Status(f.writer.Abort())
}

// Close gives up a handle.
func (s *formatServer) Close(_ context.Context, r *pb.CloseRequest) (*pb.CloseResponse, error) {
	if f, ok := s.open.remove(r.GetHandle()); ok && f.Container.Close != nil {
		return &pb.CloseResponse{}, wire.Status(f.Container.Close())
	}
	if f, ok := s.created.remove(r.GetHandle()); ok {
		f.end()
	}
	return &pb.CloseResponse{}, nil
}
