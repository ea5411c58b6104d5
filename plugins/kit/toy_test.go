package kit_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// toy is a format with faults: TOY1, the length of a header, the header as JSON, and the data.
type toy struct {
	fault  string
	opaque bool
}

type header struct {
	Tensors []tensor.Info `json:"tensors"`
	Time    int64         `json:"time"`
}

const start = 12

// described counts how often a toy has been asked.
var described atomic.Int64

func (f toy) Info() sdk.FormatInfo {
	i := sdk.FormatInfo{Name: "toy", Extensions: []string{".toy"}, Magic: []sdk.Magic{{Bytes: []byte("TOY1")}}}
	switch f.fault {
	case "describe":
		i.Extensions = append(i.Extensions, fmt.Sprintf(".toy%d", described.Add(1)))
	case "magic":
		i.Magic[0].Bytes = []byte("TOY2")
	case "sniff":
		i.Extensions, i.Magic = nil, nil
	case "refuse-described", "read-described":
		i.DTypes = []tensor.DType{tensor.F32, tensor.F16}
	}
	return i
}

// header makes a header.
func (f toy) header(list []tensor.Info) ([]byte, error) {
	h := header{Tensors: slices.Clone(list)}
	if f.fault == "refuse-all" {
		return nil, formats.ErrUnsupported
	}
	short := func(t tensor.Info) bool { return t.DType == tensor.F16 }
	if strings.HasPrefix(f.fault, "refuse") && slices.ContainsFunc(list, short) {
		return nil, fmt.Errorf("F16: %w", formats.ErrUnsupported)
	}
	for i := range h.Tensors {
		t := &h.Tensors[i]
		switch f.fault {
		case "long":
			t.Name = t.Name[:min(len(t.Name), 1000)]
		case "ascii":
			t.Name = strings.Map(func(r rune) rune { return min(r, '~') }, t.Name)
		case "clean":
			if strings.Contains(t.Name, "//") {
				t.Name = path.Clean(t.Name)
			}
		}
	}
	if strings.HasSuffix(f.fault, "time") {
		h.Time = time.Now().UnixNano()
	}
	b, err := json.Marshal(h)
	return append(binary.LittleEndian.AppendUint64([]byte("TOY1"), uint64(len(b))), b...), err
}

// leaked is what a toy keeps.
var leaked struct {
	sync.Mutex
	list []any
}

func leak(x any) {
	leaked.Lock()
	defer leaked.Unlock()
	leaked.list = append(leaked.list, x)
}

func (f toy) Open(ctx context.Context, path string) (c sdk.Container, err error) {
	if f.fault == "hang" {
		<-ctx.Done()
		return c, ctx.Err()
	}
	if f.fault == "read-raise" {
		return c, errors.New("the disk has a scratch")
	}
	if strings.HasSuffix(f.fault, "metadata") {
		c.Metadata = append(c.Metadata, formats.Pair{Name: "notes", Value: strings.Repeat("x", 5<<20)})
	}
	file, err := os.Open(path)
	if err != nil {
		return c, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	info, err := file.Stat()
	if err != nil {
		return c, err
	}
	malformed := formats.ErrMalformed
	if f.fault == "plain-error" {
		malformed = errors.New("bad")
	}
	b := make([]byte, start)
	if _, err := file.ReadAt(b, 0); err != nil || string(b[:4]) != "TOY1" {
		if f.fault == "crash" {
			os.Exit(3)
		}
		return c, fmt.Errorf("found no TOY1: %w", malformed)
	}
	n := binary.LittleEndian.Uint64(b[4:])
	if f.fault == "huge" && n > uint64(info.Size()) {
		leak(len(make([]byte, min(n, 300<<20))))
	}
	if f.fault == "grow" && n > uint64(info.Size()) {
		for range 20 {
			leak(bytes.Repeat([]byte{1}, 100<<20))
			time.Sleep(20 * time.Millisecond)
		}
	}
	if n > uint64(info.Size())-start {
		return c, fmt.Errorf("found a header of %d bytes: %w", n, malformed)
	}
	b = make([]byte, n)
	if _, err := file.ReadAt(b, start); err != nil {
		return c, err
	}
	if f.fault == "leak" {
		leak(b)
	}
	var h header
	if err := json.Unmarshal(b, &h, json.RejectUnknownMembers(true)); err != nil {
		if f.fault == "plain-name" {
			return c, err
		}
		return c, fmt.Errorf("%w: %w", malformed, err)
	}
	at := start + int64(n)
	for i, t := range h.Tensors {
		size, err := t.Size()
		if err != nil {
			return c, fmt.Errorf("%w: %w", malformed, err)
		}
		if f.opaque && !strings.HasSuffix(f.in(t.DType).fault, "zeros") && (at > info.Size() || size > info.Size()-at) {
			return c, fmt.Errorf("found %d bytes at %d: %w", size, at, malformed)
		}
		x := sdk.Tensor{Info: t, Offset: at}
		if f.opaque {
			x.Data = f.data(file, at, size, t.DType)
		}
		at += size
		switch {
		case f.fault == "scalar" && len(t.Shape) == 0:
			x.Shape = tensor.Shape{1}
		case f.fault == "empty" && size == 0, f.fault == "many" && i == 9999:
			continue
		case f.fault == "rank" && len(t.Shape) > 32:
			x.Shape = append(t.Shape[:31:31], t.Shape[len(t.Shape)-1])
		}
		c.Tensors = append(c.Tensors, x)
	}
	if f.fault == "order" || f.in(tensor.I16).fault == "turns" && h.has(tensor.I16) && described.Add(1)%2 == 0 {
		slices.Reverse(c.Tensors)
	}
	if f.opaque && f.fault != "files" {
		c.Close = file.Close
		return c, nil
	}
	if f.fault == "files" {
		leak(file)
		return c, nil
	}
	return c, file.Close()
}

// in is the toy as it is for tensors of a type: a fault may be of those of one alone.
func (f toy) in(d tensor.DType) toy {
	if fault, of, ok := strings.Cut(f.fault, " in "); ok {
		if f.fault = fault; of != d.String() {
			f.fault = ""
		}
	}
	return f
}

func (h *header) has(d tensor.DType) bool {
	return slices.ContainsFunc(h.Tensors, func(t tensor.Info) bool { return t.DType == d })
}

// data is that of a tensor, with faults.
func (f toy) data(file *os.File, at, size int64, d tensor.DType) io.ReaderAt {
	whole := io.NewSectionReader(file, at, size)
	f = f.in(d)
	switch {
	case f.fault == "flip "+d.String():
		return readerFunc(func(p []byte, off int64) (int, error) {
			n, err := whole.ReadAt(p, off)
			for i := range p {
				p[i] ^= 1
			}
			return n, err
		})
	case f.fault == "odd":
		return readerFunc(func(p []byte, off int64) (int, error) {
			if off > 100 {
				off &^= 1
			}
			return whole.ReadAt(p, off)
		})
	case f.fault == "tail":
		return readerFunc(func(p []byte, off int64) (int, error) {
			if off >= 2<<20 {
				off--
			}
			return whole.ReadAt(p, off)
		})
	case f.fault == "seek":
		return readerFunc(func(p []byte, off int64) (int, error) {
			if _, err := file.Seek(at+off, io.SeekStart); err != nil {
				return 0, err
			}
			time.Sleep(100 * time.Microsecond)
			return io.ReadFull(file, p)
		})
	case strings.HasSuffix(f.fault, "zeros"):
		return readerFunc(func(p []byte, off int64) (int, error) {
			clear(p)
			_, err := whole.ReadAt(p, off)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return len(p), err
		})
	case f.fault == "load":
		return readerFunc(func(p []byte, off int64) (int, error) {
			b, err := io.ReadAll(io.NewSectionReader(file, at, size))
			return copy(p, b[off:]), err
		})
	}
	return whole
}

type readerFunc func(p []byte, off int64) (int, error)

func (f readerFunc) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// toyLayout says where bytes go.
type toyLayout struct{ toy }

func (f toyLayout) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	return formats.LayOut(tensors, o, formats.Naming{Stem: "model", Extension: ".toy"},
		func(name string, members []int, sizes []int64) (formats.Shard, error) {
			s := formats.Shard{Name: name, Tensors: members}
			var list []tensor.Info
			for _, i := range members {
				list = append(list, tensors[i])
			}
			var err error
			s.Header, err = f.header(list)
			if f.fault == "leak-layout" {
				leak(s.Header)
			}
			s.Size = int64(len(s.Header))
			if f.fault == "gap" {
				s.Size += 5
			}
			for _, i := range members {
				s.Offsets = append(s.Offsets, s.Size)
				s.Size += sizes[i]
			}
			return s, err
		})
}

// toySniff takes all files for its own.
type toySniff struct{ toyLayout }

func (toySniff) Sniff(context.Context, string) (bool, error) { return true, nil }

// toyStream writes its files.
type toyStream struct{ toy }

func (f toyStream) Create(_ context.Context, path string, list []tensor.Info, _ formats.Metadata) (
	formats.Writer, error) {
	b, err := f.header(list)
	if err != nil {
		return nil, err
	}
	if f.in(list[0].DType).fault == "raise" || f.fault == "raise" {
		return nil, errors.New("the disk has a scratch")
	}
	switch f.fault {
	case "short":
		return &toyWriter{f, nil}, os.WriteFile(path, b, 0o600)
	case "beside":
		err = os.WriteFile(path+".tmp", nil, 0o600)
	case "above":
		err = os.WriteFile(filepath.Join(filepath.Dir(filepath.Dir(path)), "notes"), nil, 0o600)
	case "here":
		err = os.WriteFile("notes", nil, 0o600)
	}
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = file.Write(b)
	}
	return &toyWriter{f, file}, err
}

type toyWriter struct {
	toyStream
	file *os.File
}

func (w *toyWriter) Write(_ int, _ int64, p []byte) error {
	if w.fault == "short" {
		return nil
	}
	_, err := w.file.Write(p)
	return err
}

func (w *toyWriter) Finish(context.Context) (int64, error) {
	if w.fault == "short" {
		return 1, nil
	}
	n, err := w.file.Seek(0, io.SeekEnd)
	return n, errors.Join(err, w.file.Sync(), w.file.Close())
}

func (w *toyWriter) Abort() error {
	w.file.Close()
	if w.fault == "abort" {
		return nil
	}
	if err := os.Remove(w.file.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// panics panics on all files.
type panics struct{ formats.Format }

func (panics) Name() string         { return "panics" }
func (panics) Extensions() []string { return nil }
func (panics) ReadOnly() bool       { return []bool{}[len(os.Args)] }
func (panics) Detect(context.Context, storage.Folder, string) (bool, error) {
	return true, nil
}

// safe is safetensors.
var safe = safetensors.Format{}

// deaf is a format whose reads are not cancelled.
type deaf struct {
	formats.Format
	fault string
}

func (f deaf) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	c, err := f.Format.Open(ctx, dir, name)
	if err != nil {
		return nil, err
	}
	list := slices.Clone(c.Tensors())
	for i := range list {
		list[i].Data = deafData{ctx, list[i].Data, f.fault}
	}
	return deafContainer{c, list}, nil
}

type deafContainer struct {
	formats.Container
	list []formats.Tensor
}

func (c deafContainer) Tensors() []formats.Tensor { return c.list }

type deafData struct {
	ctx context.Context
	io.ReaderAt
	fault string
}

func (d deafData) ReadRange(off, n int64, use func(p []byte, at int64) error) error {
	b := make([]byte, n)
	if err := formats.ReadFull(d.ReaderAt, b, off); err != nil {
		return err
	}
	if err := use(b, 0); err != nil || d.ctx.Err() == nil {
		return err
	}
	if d.fault == "goes on" {
		time.Sleep(6 * time.Second)
		return nil
	}
	return errors.New("broken pipe")
}

// blocks is a scheme of 8 bits in blocks of 32, with faults.
type blocks struct{ fault string }

const block = 32

func (blocks) Info() sdk.SchemeInfo {
	return sdk.SchemeInfo{Name: "blocks", Types: []string{"b8"}, Suffixes: []string{".scales"}}
}

func (s blocks) Find(_ context.Context, c quant.Stored) ([]sdk.Decoder, error) {
	var found []sdk.Decoder
	for _, t := range c.Tensors() {
		scales, ok := c.Lookup(t.Name + ".scales")
		if !ok && (s.fault != "companion" || t.DType != tensor.I8) || strings.HasSuffix(t.Name, ".scales") {
			continue
		}
		n := t.Count()
		if t.DType != tensor.I8 || n == 0 {
			return nil, fmt.Errorf("%s is %v %v: %w", t.Name, t.DType, t.Shape, quant.ErrMalformed)
		}
		stride := int64(block)
		if s.fault == "rule" {
			stride++
		}
		d := sdk.Decoder{Info: tensor.Info{Name: t.Name, DType: c.DType(), Shape: t.Shape}, Spec: quant.Spec{Type: "b8"},
			Unit: block, Values: tensor.F32, Parts: []sdk.Part{{Name: t.Name, Rule: sdk.Rule{Stride: stride}}}}
		if ok {
			if scales.DType != tensor.F32 || scales.Count() != (n+block-1)/block {
				return nil, fmt.Errorf("%s is %v %v: %w", scales.Name, scales.DType, scales.Shape, quant.ErrMalformed)
			}
			d.Parts = append(d.Parts, sdk.Part{Name: scales.Name, Rule: sdk.Rule{Stride: 4}})
		}
		d.Decode = func(dst []byte, lo, hi int64, parts [][]byte) error {
			for i := range hi - lo {
				scale := float32(1)
				if len(parts) > 1 {
					scale = math.Float32frombits(binary.LittleEndian.Uint32(parts[1][i/block*4:]))
				}
				x := float32(int8(parts[0][i])) * scale
				if s.fault == "double" {
					x *= 2
				}
				binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(x))
			}
			return nil
		}
		found = append(found, d)
	}
	return found, nil
}

func (s blocks) Encoder(_ context.Context, _ quant.Spec, t tensor.Info) (*sdk.Encoder, error) {
	if len(t.Shape) == 4 {
		return nil, fmt.Errorf("four dimensions: %w", quant.ErrUnsupported)
	}
	n := (t.Count() + block - 1) / block
	e := &sdk.Encoder{Unit: block, Outputs: []sdk.Output{
		{Info: tensor.Info{Name: t.Name, DType: tensor.I8, Shape: t.Shape}, Rule: sdk.Rule{Stride: block}},
		{Info: tensor.Info{Name: t.Name + ".scales", DType: tensor.F32, Shape: tensor.Shape{n}}, Rule: sdk.Rule{Stride: 4}},
	}}
	e.Encode = func(out [][]byte, _ []float32, lo, hi int64, values []byte) error {
		x := make([]float32, hi-lo)
		if err := tensor.ToFloats(x, values, t.DType); err != nil {
			return err
		}
		if s.fault == "leak-scheme" {
			leak(x)
		}
		all := largest(x)
		for b := 0; b < len(x); b += block {
			y := x[b:min(b+block, len(x))]
			most := largest(y)
			if s.fault == "tile" {
				most = all
			}
			for i, v := range y {
				if v != v && s.fault != "nan" {
					at := lo + int64(b+i)
					if s.fault == "nan-tile" {
						at -= lo
					}
					return &quant.NonFiniteError{Index: at, What: "NaN"}
				}
			}
			scale := most / 127
			if scale == 0 && s.fault != "zero-scale" {
				scale = 1
			}
			for i, v := range y {
				out[0][b+i] = byte(int8(math.RoundToEven(float64(v / scale))))
			}
			if scale == 0 {
				scale = float32(math.NaN())
			}
			binary.LittleEndian.PutUint32(out[1][b/block*4:], math.Float32bits(scale))
		}
		return nil
	}
	return e, nil
}

func largest(x []float32) (most float32) {
	for _, v := range x {
		if v == v {
			most = max(most, float32(math.Abs(float64(v))))
		}
	}
	return most
}

func (s blocks) Config(context.Context, quant.Spec, []string) ([]byte, error) {
	if s.fault == "config" {
		return []byte(`{"quant_method": "bricks"}`), nil
	}
	return []byte(`{"quant_method": "blocks"}`), nil
}
