package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/lock"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/tensor"
)

// streamFormat is a format whose files the plugin writes.
type streamFormat struct{ *format }

// Layout splits the tensors into files, whose names are those of transformers.
func (f *streamFormat) Layout(ctx context.Context, infos []tensor.Info, o formats.Options) (formats.Layout, error) {
	if err := f.fits(infos, o); err != nil {
		return formats.Layout{}, err
	}
	naming := formats.Naming{Stem: "model"}
	if e := slices.Concat(f.facts.Written, f.Extensions()); len(e) > 0 {
		naming.Extension = e[0]
	}
	l, err := formats.LayOutStreams(infos, o, naming)
	if err == nil && !f.program.Can(lock.Deterministic) {
		l.Notices = append(l.Notices, fmt.Sprintf("the plugin %s does not promise the same bytes each time", f.program.Name))
	}
	return l, err
}

// Create has the plugin begin a file.
func (f *streamFormat) Create(ctx context.Context, path string, infos []tensor.Info, m formats.Metadata) (
	formats.Writer, error) {
	p, err := f.program.running(ctx)
	if err != nil {
		return nil, err
	}
	call := p.begin(ctx)
	handle, err := f.create(call, path, infos, m)
	if err = call.end(err); err != nil {
		return nil, err
	}
	w := &writer{process: p, handle: handle}
	w.call = p.begin(ctx)
	w.call.timer.Stop() // it runs while something is sent
	if w.stream, err = p.format.Write(w.call.ctx); err != nil {
		return nil, errors.Join(w.call.end(err), w.Abort())
	}
	for _, t := range infos {
		size, err := t.Size()
		if err != nil {
			return nil, errors.Join(err, w.Abort())
		}
		w.total += size
	}
	return w, nil
}

func (f *streamFormat) create(call *call, path string, infos []tensor.Info, m formats.Metadata) (int64, error) {
	stream, err := call.p.format.Create(call.ctx)
	if err != nil {
		return 0, err
	}
	err = stream.Send(&pb.CreateRequest{Format: f.Name(), Path: path, Metadata: wire.FromMetadata(m)})
	b := wire.Batch(func(list []*pb.Tensor) error {
		call.progress()
		return stream.Send(&pb.CreateRequest{Tensors: list})
	})
	for _, t := range infos {
		if err == nil {
			err = b.Add(wire.FromInfo(t))
		}
	}
	if err == nil {
		err = b.End()
	}
	if err != nil && !errors.Is(err, io.EOF) { // at EOF the answer says why
		return 0, err
	}
	r, err := stream.CloseAndRecv()
	return r.GetHandle(), err
}

// writer is a file that a plugin writes.
type writer struct {
	process *process
	handle  int64
	call    *call
	stream  grpc.ClientStreamingClient[pb.WriteRequest, pb.WriteResponse]
	total   int64
	over    sync.Once // the stream
	gone    bool      // the file, or that it is whole
}

// chunks are buffers that are used again when what is in them has been sent.
var chunks = mem.DefaultBufferPool()

// Write sends data.
func (w *writer) Write(i int, off int64, p []byte) error {
	w.call.progress()
	defer w.call.timer.Stop()
	for len(p) > 0 {
		b := chunks.Get(min(len(p), wire.Chunk))
		n := copy(*b, p)
		m := wire.Message{Numbers: [5]int64{w.handle, int64(i), off}, Data: [][]byte{*b}, Fields: []protowire.Number{4},
			Owned: mem.NewBuffer(b, chunks)}
		if err := w.stream.SendMsg(&m); err != nil {
			if errors.Is(err, io.EOF) { // the plugin has ended the call, and says why
				if _, err = w.stream.CloseAndRecv(); err == nil {
					err = w.process.fault("took no more than a part of tensor %d", i)
				}
			}
			return w.end(err)
		}
		w.call.progress()
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// end ends the stream.
func (w *writer) end(err error) error {
	w.over.Do(func() { err = w.call.end(err) })
	return err
}

// Finish completes the file.
func (w *writer) Finish(ctx context.Context) (int64, error) {
	w.call.progress()
	r, err := w.stream.CloseAndRecv()
	if err == nil && r.GetBytes() != w.total {
		err = w.process.fault("took %d of %d bytes", r.GetBytes(), w.total)
	}
	if err = w.end(err); err != nil {
		return 0, err
	}
	call := w.process.begin(ctx)
	x, err := w.process.format.Finish(call.ctx, &pb.FormatServiceFinishRequest{Handle: w.handle})
	if err = call.end(err); err != nil {
		return 0, err
	}
	call = w.process.begin(ctx)
	_, err = w.process.format.Close(call.ctx, &pb.CloseRequest{Handle: w.handle})
	w.gone = err == nil
	return x.GetSize(), call.end(err)
}

// Blame says which plugin has written a file that is not what it says.
func (w *writer) Blame(err error) error { return w.process.blamed(err) }

// Abort has the plugin remove the file, where it is still there to do so.
func (w *writer) Abort() error {
	if w.stream != nil {
		_ = w.end(context.Canceled)
	}
	if w.gone {
		return nil
	}
	w.gone = true
	err := w.process.tidy(func(ctx context.Context) error {
		_, err := w.process.format.Abort(ctx, &pb.AbortRequest{Handle: w.handle})
		return err
	})
	if !w.process.alive() {
		return nil // its file is removed with the stage
	}
	return err
}
