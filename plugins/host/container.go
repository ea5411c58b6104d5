package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/lock"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Bounds of what a plugin says of a file.
const (
	mostTensors    = 1 << 20
	mostNameBytes  = 1 << 20
	mostNames      = 1 << 28 // bytes of all
	mostRank       = 1 << 16
	mostDimensions = 1 << 23
	mostFiles      = 10_000
	mostMetadata   = 1 << 20
)

// reader reads the files of one container. It is a formats.FileReader.
type reader struct {
	format  *format
	process *process
	ctx     context.Context
	dir     storage.Folder

	handles   []int64
	files     []string          // that are not of the index, nor those that were opened
	elsewhere map[string]string // the file of a tensor that is in one of these
	open      []storage.File
	names     int
	dims      int
}

// opened is a container of a plugin.
type opened struct {
	formats.Container
	reader *reader
}

func (r *reader) container(c formats.Container) formats.Container {
	tensors := c.Tensors()
	for i := range tensors { // OpenFiles says the file that was opened of all
		if file, ok := r.elsewhere[tensors[i].Name]; ok {
			tensors[i].File = file
		}
	}
	return &opened{c, r}
}

// Files are those of the container, and others that the plugin has named.
func (c *opened) Files() []string {
	files := slices.Clone(c.Container.Files())
	for _, f := range c.reader.files {
		if !slices.Contains(files, f) {
			files = append(files, f)
		}
	}
	return files
}

// Close closes the files here and there.
func (c *opened) Close() error {
	c.reader.close()
	return c.Container.Close()
}

// close gives up what the plugin has open, where it is still there, and the files.
func (r *reader) close() {
	for _, h := range r.handles {
		_ = r.process.tidy(func(ctx context.Context) error { // it is told again by what follows, or nothing does
			_, err := r.process.format.Close(ctx, &pb.CloseRequest{Handle: h})
			return err
		})
	}
	for _, f := range r.open {
		f.Close()
	}
	r.handles, r.open = nil, nil
}

// ReadFile has the plugin open a file, and checks what it says of it.
func (r *reader) ReadFile(f storage.File, c *formats.Contents) error {
	local, ok := storage.OSFile(f)
	if !ok {
		return fmt.Errorf("%w: plugins read files of this machine alone", formats.ErrUnsupported)
	}
	file, err := filepath.Abs(local.Name())
	if err != nil {
		return err
	}
	p := r.process
	call := p.begin(r.ctx)
	x, err := p.format.Open(call.ctx, &pb.OpenRequest{Format: r.Name(), Path: file})
	if err = call.end(err); err != nil {
		return err
	}
	r.handles = append(r.handles, x.GetHandle())
	if len(x.GetMetadata()) > mostMetadata {
		return r.malformed("found %d metadata, expected at most %d", len(x.GetMetadata()), mostMetadata)
	}
	metadata, err := wire.ToMetadata(x.GetMetadata())
	if err != nil {
		return r.malformed("%v", err)
	}
	in, err := r.openAll(x.GetFiles(), filepath.Base(file), f, c.Data)
	if err != nil {
		return err
	}
	tensors, err := r.list(x.GetHandle(), in, c)
	if err != nil {
		return err
	}
	c.Add(tensors, metadata)
	return nil
}

// place is a file that tensors of a container are in.
type place struct {
	data  io.ReaderAt
	size  int64
	other string // its name, where it is not the file that was opened
}

// openAll finds the files that the plugin has named: the one that was opened, and others beside it or below.
func (r *reader) openAll(names []string, self string, f storage.File, data io.ReaderAt) (map[string]place, error) {
	if len(names) > mostFiles {
		return nil, r.malformed("found %d files, expected at most %d", len(names), mostFiles)
	}
	in := map[string]place{}
	for _, name := range names {
		if _, ok := in[name]; ok {
			return nil, r.malformed("found the file %s twice, expected it once", tensor.Quote(name))
		}
		if name == self {
			in[name] = place{data: data, size: f.Size()}
			continue
		}
		other, err := r.dir.Open(r.ctx, name) // which refuses what is not in the folder
		if err != nil {
			return nil, r.malformed("found the file %s, expected one of the folder: %w", tensor.Quote(name), err)
		}
		r.open, r.files = append(r.open, other), append(r.files, name)
		in[name] = place{other, other.Size(), name}
	}
	return in, nil
}

// malformed is an error of what the plugin says of a file.
func (r *reader) malformed(format string, args ...any) error {
	return r.process.blamed(fmt.Errorf("%w: %w", formats.ErrMalformed, fmt.Errorf(format, args...)))
}

// list reads the list of tensors.
func (r *reader) list(handle int64, in map[string]place, c *formats.Contents) ([]formats.Tensor, error) {
	p := r.process
	call := p.begin(r.ctx)
	stream, err := p.format.List(call.ctx, &pb.ListRequest{Handle: handle})
	if err != nil {
		return nil, call.end(err)
	}
	var tensors []formats.Tensor
	for {
		batch, err := stream.Recv()
		if err == io.EOF {
			return tensors, call.end(nil)
		}
		if err != nil {
			return nil, call.end(err)
		}
		if len(batch.GetTensors()) > 0 {
			call.progress()
		}
		for _, x := range batch.GetTensors() {
			t, err := r.tensor(handle, x, in)
			if err == nil {
				if err = c.Claim(t.Name); err != nil {
					err = r.malformed("%w", err)
				}
			}
			if err == nil && c.Count()+len(tensors) >= mostTensors {
				err = r.malformed("found more than %d tensors, expected fewer: %w", mostTensors, formats.ErrLimit)
			}
			if err != nil {
				_ = call.end(context.Canceled)
				return nil, err
			}
			tensors = append(tensors, t)
		}
	}
}

// tensor checks one tensor of the list.
func (r *reader) tensor(handle int64, x *pb.StoredTensor, in map[string]place) (formats.Tensor, error) {
	name, shape := x.GetTensor().GetName(), x.GetTensor().GetShape()
	r.names, r.dims = r.names+len(name), r.dims+len(shape)
	if len(name) > mostNameBytes || r.names > mostNames || len(shape) > mostRank || r.dims > mostDimensions {
		return formats.Tensor{}, r.malformed("found a name of %d bytes and a shape of %d numbers: %w", len(name), len(shape),
			formats.ErrLimit)
	}
	fail := func(format string, args ...any) (formats.Tensor, error) {
		return formats.Tensor{}, r.malformed("tensor %s: %w", tensor.Quote(name), fmt.Errorf(format, args...))
	}
	info, err := wire.ToInfo(x.GetTensor())
	if err != nil {
		return fail("%w", err)
	}
	size, _ := info.Size() // ToInfo has looked
	file, ok := in[x.GetFile()]
	if !ok {
		return fail("found it in the file %s, which is none of the container's", tensor.Quote(x.GetFile()))
	}
	t := formats.Tensor{Info: info, Data: file.data, Bytes: size}
	switch at := x.GetPlace().(type) {
	case *pb.StoredTensor_Extent:
		if !r.format.program.Can(lock.Extents) {
			return fail("found an extent of a plugin without the capability %s", lock.Extents)
		}
		t.Offset = at.Extent.GetOffset()
		if t.Offset < 0 || t.Offset > file.size || size > file.size-t.Offset {
			return fail("found %d bytes at %d of %s, which has %d bytes", size, t.Offset, tensor.Quote(x.GetFile()), file.size)
		}
	case *pb.StoredTensor_Opaque:
		t.Data = &opaque{r, handle, at.Opaque.GetId(), name, size}
	default:
		return fail("found no place, expected an extent or an opaque id")
	}
	if file.other != "" {
		if r.elsewhere == nil {
			r.elsewhere = map[string]string{}
		}
		r.elsewhere[name] = file.other
	}
	return t, nil
}

// opaque is the data of a tensor that a plugin reads.
type opaque struct {
	*reader
	handle, id int64
	name       string
	size       int64
}

// ReadAt reads a range into p, without a copy.
func (o *opaque) ReadAt(p []byte, off int64) (int, error) {
	end := error(nil)
	if left := max(o.size-off, 0); int64(len(p)) > left {
		p, end = p[:left], io.EOF
	}
	at := 0
	err := o.read(off, int64(len(p)), func(n int) ([]byte, error) { at += n; return p[at-n : at], nil }, nil)
	if err != nil {
		return 0, err
	}
	return len(p), end
}

// ReadRange hands on a range chunk by chunk.
func (o *opaque) ReadRange(off, n int64, use func(p []byte, at int64) error) error {
	var buffer []byte
	at := int64(0)
	return o.read(off, n, func(n int) ([]byte, error) {
		if cap(buffer) < n {
			buffer = make([]byte, n)
		}
		return buffer[:n], nil
	}, func(p []byte) error {
		err := use(p, at)
		at += int64(len(p))
		return err
	})
}

// read reads a range: room gives the memory for each chunk, and use, where it is not nil, takes it.
func (o *opaque) read(off, length int64, room func(n int) ([]byte, error), use func(p []byte) error) error {
	if off < 0 || length < 0 || off > o.size || length > o.size-off {
		return fmt.Errorf("bytes %d+%d asked for, it has %d", off, length, o.size)
	}
	if length == 0 {
		return nil
	}
	done, err := o.format.program.reading(o.ctx)
	if err != nil {
		return err
	}
	defer done()
	p := o.process
	call := p.begin(o.ctx)
	stream, err := p.format.Read(call.ctx, &pb.ReadRequest{Handle: o.handle, Id: o.id, Offset: off, Length: length})
	if err != nil {
		return call.end(err)
	}
	got, come := int64(0), false
	var bad error
	m := wire.Message{Into: func(field protowire.Number, n int) ([]byte, error) {
		if field != 2 || come || int64(n) > length-got {
			bad = fmt.Errorf("sent %d of %d bytes of tensor %s", got+int64(n), length, tensor.Quote(o.name))
			return nil, bad
		}
		come = true
		return room(n)
	}}
	for {
		come = false
		err := stream.RecvMsg(&m)
		at := m.Numbers[0]
		switch {
		case bad != nil:
			return call.end(p.fault("%v", bad))
		case errors.Is(err, io.EOF) && got < length:
			return call.end(p.fault("sent %d of %d bytes of tensor %s", got, length, tensor.Quote(o.name)))
		case errors.Is(err, io.EOF):
			return call.end(nil)
		case err != nil:
			return call.end(err)
		case !come || len(m.Data[0]) == 0:
			return call.end(p.fault("sent %d of %d bytes of tensor %s, and then a message of none", got, length,
				tensor.Quote(o.name)))
		case at != off+got:
			return call.end(p.fault("sent %d of %d bytes of tensor %s, and then some that begin at %d, expected those at %d",
				got, length, tensor.Quote(o.name), at, off+got))
		}
		call.progress()
		got += int64(len(m.Data[0]))
		if use != nil {
			if err := use(m.Data[0]); err != nil {
				return call.end(err)
			}
		}
	}
}

// threads is how many calls read at once.
func threads() int { return runtime.GOMAXPROCS(0) }
