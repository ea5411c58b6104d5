package pipeline_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// zipped is a format whose files nobody knows before they are written: ZIP! and the data of each tensor by gzip, then
// what they are as JSON, and its length in 4 bytes.
type zipped struct {
	version string
	// What it is to do wrong, or to wait for, each where it is not nil.
	onCreate func(ctx context.Context, path string) error
	onWrite  func(ctx context.Context, path string, i int, off int64) error
	onFinish func(ctx context.Context, path string, size int64) (int64, error)
	log      *zippedLog
}

// zippedLog is what has been asked of the format.
type zippedLog struct {
	mu    sync.Mutex
	calls map[string]int
	open  int // writers that are neither finished nor aborted
	most  int
}

func (l *zippedLog) add(call string, open int) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls == nil {
		l.calls = map[string]int{}
	}
	l.calls[call]++
	l.open += open
	l.most = max(l.most, l.open)
}

type zippedFooter struct {
	Metadata []toyPair      `json:"metadata"`
	Tensors  []zippedTensor `json:"tensors"`
}

type zippedTensor struct {
	tensor.Info
	Offset int64 `json:"offset"`
}

const zippedMagic = "ZIP!"

func (zipped) Name() string                { return "zipped" }
func (zipped) Extensions() []string        { return []string{".zpd"} }
func (zipped) ReadOnly() bool              { return false }
func (zipped) Holds(tensor.Info) error     { return nil }
func (zipped) IsWeights(name string) bool  { return name == "weights.elsewhere" }
func (z zipped) Version() string           { return z.version }
func (zipped) Memory(streams int) int64    { return int64(streams) << 10 }
func (zipped) isIndex(name string) bool    { return strings.HasSuffix(name, ".zpd.index.json") }
func (zippedReader) Name() string          { return "zipped" }
func (zippedReader) IsIndex(n string) bool { return zipped{}.isIndex(n) }

func (z zipped) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if name != "" {
		return strings.HasSuffix(name, ".zpd") || z.isIndex(name), nil
	}
	name, err := zippedReader{}.Locate(ctx, dir)
	return name != "" && err == nil, nil
}

func (zipped) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	return formats.OpenFiles(ctx, dir, name, zippedReader{})
}

func (z zipped) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	return formats.LayOutStreams(tensors, o, formats.Naming{Stem: "model", Extension: ".zpd"})
}

// zippedReader reads the files.
type zippedReader struct{ toyReader }

func (r zippedReader) Locate(ctx context.Context, dir storage.Folder) (string, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return "", err
	}
	for _, end := range []string{".zpd.index.json", ".zpd"} {
		for _, e := range entries {
			if strings.HasSuffix(e.Name, end) {
				return e.Name, nil
			}
		}
	}
	return "", fmt.Errorf("%s: nothing zipped: %w", dir.Path(""), fs.ErrNotExist)
}

func (r zippedReader) ReadFile(f storage.File, c *formats.Contents) error {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
	if err != nil {
		return err
	}
	end := len(b) - 4
	if end < 4 || string(b[:4]) != zippedMagic {
		return fmt.Errorf("no magic: %w", formats.ErrMalformed)
	}
	n := int(binary.LittleEndian.Uint32(b[end:]))
	var footer zippedFooter
	if n > end-4 {
		return fmt.Errorf("footer of %d bytes: %w", n, formats.ErrMalformed)
	}
	if err := json.Unmarshal(b[end-n:end], &footer); err != nil {
		return fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	var tensors []formats.Tensor
	for _, t := range footer.Tensors {
		size, err := t.Size()
		if err != nil {
			return err
		}
		if err := c.Claim(t.Name); err != nil {
			return err
		}
		tensors = append(tensors, formats.Tensor{Info: t.Info, Data: &unzipped{zip: b[t.Offset : end-n]}, Bytes: size})
	}
	var metadata formats.Metadata
	for _, p := range footer.Metadata {
		v, err := p.value()
		if err != nil {
			return err
		}
		metadata = append(metadata, formats.Pair{Name: p.Name, Value: v})
	}
	c.Add(tensors, metadata)
	return nil
}

// unzipped is the data of a tensor.
type unzipped struct {
	zip  []byte
	once sync.Once
	data []byte
	err  error
}

func (u *unzipped) ReadAt(p []byte, off int64) (int, error) {
	u.once.Do(func() {
		r, err := gzip.NewReader(bytes.NewReader(u.zip))
		if err == nil {
			r.Multistream(false)
			u.data, err = io.ReadAll(r)
		}
		u.err = err
	})
	if u.err != nil {
		return 0, u.err
	}
	return bytes.NewReader(u.data).ReadAt(p, off)
}

// Create begins a file.
func (z zipped) Create(ctx context.Context, path string, tensors []tensor.Info, metadata formats.Metadata) (
	formats.Writer, error) {
	if z.onCreate != nil {
		if err := z.onCreate(ctx, path); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, err
	}
	z.log.add("created", 1)
	w := &zippedWriter{zipped: z, ctx: ctx, path: path, file: f, tensors: tensors, next: -1}
	for _, p := range metadata {
		b, err := json.Marshal(p.Value)
		if err != nil {
			return nil, err
		}
		w.footer.Metadata = append(w.footer.Metadata, toyPair{p.Name, fmt.Sprintf("%T", p.Value), b})
	}
	_, err = f.WriteString(zippedMagic)
	if err := errors.Join(err, w.advance()); err != nil {
		return nil, errors.Join(err, w.Abort())
	}
	return w, nil
}

type zippedWriter struct {
	zipped
	ctx     context.Context
	path    string
	file    *os.File
	zip     *gzip.Writer
	tensors []tensor.Info
	next    int   // the tensor that comes
	off     int64 // what of it has come
	footer  zippedFooter
	done    bool
}

// advance begins the next tensor that has bytes.
func (w *zippedWriter) advance() error {
	for w.off = 0; w.next < len(w.tensors); {
		if w.zip != nil {
			if err := w.zip.Close(); err != nil {
				return err
			}
		}
		if w.next++; w.next == len(w.tensors) {
			return nil
		}
		at, err := w.file.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		w.footer.Tensors = append(w.footer.Tensors, zippedTensor{w.tensors[w.next], at})
		w.zip, _ = gzip.NewWriterLevel(w.file, gzip.BestSpeed)
		if size, err := w.tensors[w.next].Size(); size > 0 || err != nil {
			return err
		}
	}
	return nil
}

func (w *zippedWriter) Write(i int, off int64, p []byte) error {
	if w.onWrite != nil {
		if err := w.onWrite(w.ctx, w.path, i, off); err != nil {
			return err
		}
	}
	if i != w.next || off != w.off || len(p) == 0 || len(p) > 1<<20 {
		return fmt.Errorf("got %d bytes at %d of tensor %d, expected tensor %d at %d", len(p), off, i, w.next, w.off)
	}
	if _, err := w.zip.Write(p); err != nil {
		return err
	}
	w.off += int64(len(p))
	if size, _ := w.tensors[i].Size(); w.off == size {
		return w.advance()
	}
	return nil
}

func (w *zippedWriter) Finish(ctx context.Context) (int64, error) {
	if w.next != len(w.tensors) || w.done {
		return 0, fmt.Errorf("finished at tensor %d of %d", w.next, len(w.tensors))
	}
	b, err := json.Marshal(w.footer, json.Deterministic(true))
	if err != nil {
		return 0, err
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(b)))
	if _, err := w.file.Write(b); err != nil {
		return 0, err
	}
	size, err := w.file.Seek(0, io.SeekCurrent)
	if err := errors.Join(err, w.file.Sync(), w.file.Close()); err != nil {
		return 0, err
	}
	w.done = true
	w.log.add("finished", -1)
	if w.onFinish != nil {
		return w.onFinish(ctx, w.path, size)
	}
	return size, ctx.Err()
}

func (w *zippedWriter) Abort() error {
	if !w.done {
		w.done = true
		w.file.Close()
		w.log.add("given up", -1)
	}
	w.log.add("aborted", 0)
	if err := os.Remove(w.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// withZipped has the zipped format besides safetensors.
func withZipped(t testing.TB, z formats.Format) checkpoint.OpenOptions {
	o, err := zippedRegistries(z)
	require.NoError(t, err)
	return o
}

func zippedRegistries(z formats.Format) (checkpoint.OpenOptions, error) {
	r, schemes := new(formats.Registry), new(quant.Registry)
	err := errors.Join(schemes.Register(bnb.Scheme{}), schemes.Register(toyScheme{}), r.Register(safetensors.Format{}),
		r.Register(z))
	return checkpoint.OpenOptions{Formats: r, Schemes: schemes}, err
}
