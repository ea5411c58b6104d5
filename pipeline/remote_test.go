package pipeline_test

import (
	"context"
	"encoding/gob"
	"io"
	"net"
	"net/rpc"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

// A format may live in another process. Here it is at the other end of two pipes, over which nothing goes but values:
// the host asks for its methods, and it asks the host for the files. All tensors go over at once, a context by its
// end, an error by its kinds.

func init() {
	gob.Register([]string{})
	gob.Register([]float32{})
}

// connect serves a service at one end of a pipe and returns the other end.
func connect(t testing.TB, name string, service any) *rpc.Client {
	s := rpc.NewServer()
	require.NoError(t, s.RegisterName(name, service))
	near, far := net.Pipe()
	go s.ServeConn(far)
	c := rpc.NewClient(near)
	t.Cleanup(func() { c.Close() })
	return c
}

// The messages.
type (
	CallArgs struct {
		Call    int // by which it is cancelled
		Folder  int
		Name    string
		Names   []string
		Infos   []tensor.Info
		Options formats.Options
	}
	CallReply struct {
		Failure  *formats.Failure
		OK       bool
		Names    []string
		Layout   formats.Layout
		Tensors  []RemoteTensor
		Metadata formats.Metadata
		Files    []formats.File
	}
	RemoteTensor struct {
		Info          tensor.Info
		File          string
		Offset, Bytes int64
	}
	FileArgs struct {
		Folder, File int
		Name         string
		Offset       int64
		Length       int
	}
	FileReply struct {
		Failure *formats.Failure
		File    int
		Size    int64
		Version string
		Bytes   []byte
		Entries []storage.Entry
	}
)

// plugin is the far side of a format.
type plugin struct {
	format formats.Format
	host   *rpc.Client
	mu     sync.Mutex
	ends   map[int]context.CancelFunc
}

// call carries out a method under a context that Cancel ends.
func (p *plugin) call(a CallArgs, r *CallReply, f func(ctx context.Context, dir storage.Folder) error) error {
	ctx, end := context.WithCancel(context.Background())
	defer end()
	p.mu.Lock()
	p.ends[a.Call] = end
	p.mu.Unlock()
	r.Failure = formats.NewFailure(f(ctx, farFolder{p.host, a.Folder}))
	return nil
}

func (p *plugin) Cancel(a CallArgs, _ *CallReply) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if end, ok := p.ends[a.Call]; ok {
		end()
	}
	return nil
}

func (p *plugin) Detect(a CallArgs, r *CallReply) error {
	return p.call(a, r, func(ctx context.Context, dir storage.Folder) (err error) {
		r.OK, err = p.format.Detect(ctx, dir, a.Name)
		return err
	})
}

func (p *plugin) Open(a CallArgs, r *CallReply) error {
	return p.call(a, r, func(ctx context.Context, dir storage.Folder) error {
		c, err := p.format.Open(ctx, dir, a.Name)
		if err != nil {
			return err
		}
		defer c.Close()
		for _, t := range c.Tensors() {
			r.Tensors = append(r.Tensors, RemoteTensor{t.Info, t.File, t.Offset, t.Bytes})
		}
		r.Names, r.Metadata = c.Files(), c.Metadata()
		if b, ok := c.(formats.Bearer); ok {
			r.Files = b.SmallFiles()
		}
		return nil
	})
}

func (p *plugin) Claim(a CallArgs, r *CallReply) error {
	return p.call(a, r, func(ctx context.Context, _ storage.Folder) (err error) {
		r.Names, err = p.format.(formats.Claimer).Claim(ctx, a.Names)
		return err
	})
}

func (p *plugin) Holds(a CallArgs, r *CallReply) error {
	return p.call(a, r, func(context.Context, storage.Folder) error { return p.format.Holds(a.Infos[0]) })
}

func (p *plugin) Layout(a CallArgs, r *CallReply) error {
	return p.call(a, r, func(ctx context.Context, _ storage.Folder) (err error) {
		r.Layout, err = p.format.Layout(ctx, a.Infos, a.Options)
		return err
	})
}

// farFolder is a folder of the host, as the far side has it.
type farFolder struct {
	host   *rpc.Client
	folder int
}

func (f farFolder) ask(method string, a FileArgs) (FileReply, error) {
	var r FileReply
	a.Folder = f.folder
	if err := f.host.Call("Host."+method, a, &r); err != nil {
		return r, err
	}
	if r.Failure != nil {
		return r, r.Failure
	}
	return r, nil
}

func (f farFolder) Path(name string) string { return name }

func (f farFolder) List(_ context.Context, name string) ([]storage.Entry, error) {
	r, err := f.ask("List", FileArgs{Name: name})
	return r.Entries, err
}

func (f farFolder) Open(_ context.Context, name string) (storage.File, error) {
	r, err := f.ask("Open", FileArgs{Name: name})
	if err != nil {
		return nil, err
	}
	return farFile{f, r}, nil
}

type farFile struct {
	farFolder
	file FileReply
}

func (f farFile) Size() int64     { return f.file.Size }
func (f farFile) Version() string { return f.file.Version }

func (f farFile) Close() error {
	_, err := f.ask("Close", FileArgs{File: f.file.File})
	return err
}

func (f farFile) ReadAt(p []byte, off int64) (int, error) {
	r, err := f.ask("Read", FileArgs{File: f.file.File, Offset: off, Length: len(p)})
	n := copy(p, r.Bytes)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// host is the near side of the files.
type host struct {
	mu      sync.Mutex
	folders []storage.Folder
	files   []storage.File
}

func (h *host) List(a FileArgs, r *FileReply) (err error) {
	r.Entries, err = h.folders[a.Folder].List(context.Background(), a.Name)
	r.Failure = formats.NewFailure(err)
	return nil
}

func (h *host) Open(a FileArgs, r *FileReply) error {
	f, err := h.folders[a.Folder].Open(context.Background(), a.Name)
	if r.Failure = formats.NewFailure(err); err != nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r.File, r.Size, r.Version = len(h.files), f.Size(), f.Version()
	h.files = append(h.files, f)
	return nil
}

func (h *host) Close(a FileArgs, r *FileReply) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Failure = formats.NewFailure(h.files[a.File].Close())
	return nil
}

func (h *host) Read(a FileArgs, r *FileReply) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := make([]byte, a.Length)
	n, err := h.files[a.File].ReadAt(b, a.Offset)
	if err != io.EOF {
		r.Failure = formats.NewFailure(err)
	}
	r.Bytes = b[:n]
	return nil
}

// remoteFormat is the near side of a format.
type remoteFormat struct {
	toyFormat // for Name, Extensions and ReadOnly, which are known from the first message on
	plugin    *rpc.Client
	host      *host
	calls     *int
}

func newRemote(t testing.TB, f formats.Format) remoteFormat {
	h := &host{}
	p := &plugin{format: f, host: connect(t, "Host", h), ends: map[int]context.CancelFunc{}}
	return remoteFormat{plugin: connect(t, "Plugin", p), host: h, calls: new(int)}
}

func (f remoteFormat) ask(ctx context.Context, method string, a CallArgs) (CallReply, error) {
	var r CallReply
	f.host.mu.Lock()
	*f.calls++
	a.Call = *f.calls
	f.host.mu.Unlock()
	call := f.plugin.Go("Plugin."+method, a, &r, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
	case <-ctx.Done():
		if err := f.plugin.Call("Plugin.Cancel", a, &CallReply{}); err != nil {
			return r, err
		}
		<-call.Done
	}
	switch {
	case call.Error != nil:
		return r, call.Error
	case r.Failure != nil:
		return r, r.Failure
	}
	return r, nil
}

// in gives the far side a folder to ask for.
func (f remoteFormat) in(dir storage.Folder, name string) CallArgs {
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	f.host.folders = append(f.host.folders, dir)
	return CallArgs{Folder: len(f.host.folders) - 1, Name: name}
}

func (f remoteFormat) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	r, err := f.ask(ctx, "Detect", f.in(dir, name))
	return r.OK, err
}

func (f remoteFormat) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	r, err := f.ask(ctx, "Open", f.in(dir, name))
	if err != nil {
		return nil, err
	}
	c := &remoteContainer{reply: r}
	files := map[string]storage.File{}
	for _, t := range r.Tensors {
		file, ok := files[t.File]
		if !ok {
			if file, err = dir.Open(ctx, t.File); err != nil {
				return nil, err
			}
			files[t.File] = file
			c.open = append(c.open, file)
		}
		c.tensors = append(c.tensors, formats.Tensor{Info: t.Info, File: t.File, Data: file, Offset: t.Offset,
			Bytes: t.Bytes})
	}
	return c, nil
}

func (f remoteFormat) Claim(ctx context.Context, names []string) ([]string, error) {
	r, err := f.ask(ctx, "Claim", CallArgs{Names: names})
	return r.Names, err
}

func (f remoteFormat) Holds(t tensor.Info) error {
	_, err := f.ask(context.Background(), "Holds", CallArgs{Infos: []tensor.Info{t}})
	return err
}

func (f remoteFormat) Layout(ctx context.Context, infos []tensor.Info, o formats.Options) (formats.Layout, error) {
	r, err := f.ask(ctx, "Layout", CallArgs{Infos: infos, Options: o})
	return r.Layout, err
}

type remoteContainer struct {
	reply   CallReply
	tensors []formats.Tensor
	open    []storage.File
}

func (c *remoteContainer) Tensors() []formats.Tensor  { return c.tensors }
func (c *remoteContainer) Metadata() formats.Metadata { return c.reply.Metadata }
func (c *remoteContainer) Files() []string            { return c.reply.Names }
func (c *remoteContainer) SmallFiles() []formats.File { return c.reply.Files }
func (c *remoteContainer) Close() error {
	for _, f := range c.open {
		f.Close()
	}
	return nil
}

// TestFormatOfAnotherProcess makes by a format at the other end of a pipe what is made by it here.
func TestFormatOfAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	writeToyModel(t, src)
	o := t4
	o.To = "toy"
	var made [2]string
	for i, toy := range []formats.Format{toyFormat{}, newRemote(t, toyFormat{})} {
		oo := withToy(t, toy)
		out := filepath.Join(dir, "toy", string(rune('0'+i)))
		convertWith(t, oo, src, out, o)
		back := filepath.Join(dir, "back", string(rune('0'+i)))
		convertWith(t, oo, out, back, pipeline.Options{Quantize: "none", To: "safetensors"})
		made[i] = digest(t, out) + digest(t, back)
	}
	assert.Equal(t, made[0], made[1])
}

// waiting is a format that lays out until it is told to stop.
type waiting struct{ toyFormat }

func (waiting) Layout(ctx context.Context, _ []tensor.Info, _ formats.Options) (formats.Layout, error) {
	<-ctx.Done()
	return formats.Layout{}, ctx.Err()
}

// TestFailuresOfAnotherProcess: errors say there and here what they are, and a context that ends ends the work there.
func TestFailuresOfAnotherProcess(t *testing.T) {
	for _, toy := range []formats.Format{toyFormat{}, newRemote(t, toyFormat{})} {
		_, err := toy.Open(t.Context(), storagetest.Memory{"x.toy": []byte("short")}, "x.toy")
		assert.ErrorIs(t, err, formats.ErrMalformed)
		assert.ErrorContains(t, err, "x.toy: found 5 bytes: malformed")
		_, err = toy.Open(t.Context(), storagetest.Memory{"model.toy.index.json": []byte(`{"weight_map": {"a": "../x"}}`)},
			"model.toy.index.json")
		assert.ErrorIs(t, err, formats.ErrOutside)
		assert.NotErrorIs(t, err, formats.ErrMalformed)
		_, err = toy.Layout(t.Context(), []tensor.Info{{Name: "w", Shape: tensor.Shape{4},
			Encoding: tensor.Encoding{Name: "q", Elements: 4, Bytes: 1}}}, formats.Options{})
		assert.ErrorIs(t, err, formats.ErrUnsupported)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := newRemote(t, waiting{}).Layout(ctx, nil, formats.Options{})
	assert.ErrorIs(t, err, context.Canceled) // as it is told there
}
