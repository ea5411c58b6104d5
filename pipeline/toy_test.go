package pipeline_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// The toy format has all that a container may have: blocks of its own, metadata with types in an order, and config.json
// and tokenizer.json within its files, of which it is the only place. A file is TOY! and the length of a header in 4
// bytes, the header as JSON, and the data.
type toyFormat struct{}

// toyT4 stores four elements as their largest absolute value in a float32 and a byte each.
var toyT4 = tensor.Encoding{Name: "t4", Elements: 4, Bytes: 8}

type toyHeader struct {
	Metadata []toyPair      `json:"metadata,omitempty"`
	Files    []formats.File `json:"files,omitempty"`
	Tensors  []toyTensor    `json:"tensors"`
}

type toyPair struct {
	Name, Type string
	Value      jsontext.Value
}

type toyTensor struct {
	tensor.Info
	Offset int64 `json:"offset"`
}

func (toyFormat) Name() string         { return "toy" }
func (toyFormat) Extensions() []string { return []string{".toy"} }
func (toyFormat) ReadOnly() bool       { return false }

func (toyFormat) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if name != "" {
		return strings.HasSuffix(name, ".toy") || toyReader{}.IsIndex(name), nil
	}
	name, err := toyReader{}.Locate(ctx, dir)
	return name != "" && err == nil, nil
}

func (toyFormat) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	r := toyReader{files: new([]formats.File)}
	c, err := formats.OpenFiles(ctx, dir, name, r)
	if err != nil {
		return nil, err
	}
	return toyContainer{c, *r.files}, nil
}

// toyContainer bears small files.
type toyContainer struct {
	formats.Container
	files []formats.File
}

func (c toyContainer) SmallFiles() []formats.File { return c.files }

type toyReader struct{ files *[]formats.File }

func (toyReader) Name() string             { return "toy" }
func (toyReader) IsIndex(name string) bool { return strings.HasSuffix(name, ".toy.index.json") }

func (r toyReader) Locate(ctx context.Context, dir storage.Folder) (string, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return "", err
	}
	for _, match := range []func(string) bool{r.IsIndex,
		func(name string) bool { return strings.HasSuffix(name, ".toy") }} {
		for _, e := range entries {
			if match(e.Name) {
				return e.Name, nil
			}
		}
	}
	return "", fmt.Errorf("%s: no toy: %w", dir.Path(""), fs.ErrNotExist)
}

func (toyReader) ReadIndex(f storage.File) (formats.Index, error) {
	b := make([]byte, f.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return formats.Index{}, err
	}
	var parsed struct {
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := json.Unmarshal(b, &parsed); err != nil {
		return formats.Index{}, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	x := formats.Index{Tensors: map[string]int32{}}
	for name, file := range parsed.WeightMap {
		i := slices.Index(x.Files, file)
		if i < 0 {
			i = len(x.Files)
			x.Files = append(x.Files, file)
		}
		x.Tensors[name] = int32(i)
	}
	return x, nil
}

func (r toyReader) ReadFile(f storage.File, c *formats.Contents) error {
	var length [8]byte
	if f.Size() < 8 {
		return fmt.Errorf("found %d bytes: %w", f.Size(), formats.ErrMalformed)
	}
	if _, err := f.ReadAt(length[:], 0); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(length[4:])
	if string(length[:4]) != toyMagic || int64(n) > f.Size()-8 {
		return fmt.Errorf("found %q and a header of %d bytes: %w", length[:4], n, formats.ErrMalformed)
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 8); err != nil {
		return err
	}
	var h toyHeader
	if err := json.Unmarshal(b, &h); err != nil {
		return fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	*r.files = append(*r.files, h.Files...)
	var tensors []formats.Tensor
	for _, t := range h.Tensors {
		size, err := t.Size()
		if err != nil || t.Offset+size > f.Size() {
			return fmt.Errorf("tensor %q: %v: %w", t.Name, err, formats.ErrMalformed)
		}
		if err := c.Claim(t.Name); err != nil {
			return err
		}
		tensors = append(tensors, formats.Tensor{Info: t.Info, Data: c.Data, Offset: t.Offset, Bytes: size})
	}
	var metadata formats.Metadata
	for _, p := range h.Metadata {
		value, err := p.value()
		if err != nil {
			return fmt.Errorf("metadata %q: %w: %w", p.Name, formats.ErrMalformed, err)
		}
		metadata = append(metadata, formats.Pair{Name: p.Name, Value: value})
	}
	if err := metadata.Check(); err != nil {
		return fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	c.Add(tensors, metadata)
	return nil
}

const (
	toyMagic = "TOY!"
	toyRoom  = 1 << 16 // where the data begins
)

// toyBytes is all of a file before its data.
func toyBytes(h toyHeader) ([]byte, error) {
	b, err := json.Marshal(h, json.Deterministic(true))
	if err != nil {
		return nil, err
	}
	if len(b)+8 > toyRoom {
		return nil, formats.ErrLimit
	}
	b = append(b, bytes.Repeat([]byte{' '}, toyRoom-8-len(b))...)
	return append(binary.LittleEndian.AppendUint32([]byte(toyMagic), uint32(len(b))), b...), nil
}

// value has the type that the pair says.
func (p toyPair) value() (any, error) {
	switch p.Type {
	case "string":
		return into[string](p.Value)
	case "[]string":
		return into[[]string](p.Value)
	case "bool":
		return into[bool](p.Value)
	case "uint32":
		return into[uint32](p.Value)
	case "int64":
		return into[int64](p.Value)
	case "float32":
		return into[float32](p.Value)
	case "[]float32":
		return into[[]float32](p.Value)
	}
	return nil, fmt.Errorf("type %q is unknown", p.Type)
}

func into[T any](b jsontext.Value) (any, error) {
	var v T
	err := json.Unmarshal(b, &v)
	return v, err
}

func (toyFormat) Holds(t tensor.Info) error {
	if t.Encoding != (tensor.Encoding{}) && t.Encoding != toyT4 {
		return fmt.Errorf("found the encoding %s, expected t4: %w", t.Encoding, formats.ErrUnsupported)
	}
	return nil
}

// Claim takes what has no place beside the format's files.
func (toyFormat) Claim(_ context.Context, names []string) ([]string, error) {
	return slices.DeleteFunc(slices.Clone(names),
		func(name string) bool { return name != "config.json" && name != "tokenizer.json" }), nil
}

// Layout places the tensors in the order given. The first file has the metadata and the small files; beside the files
// there is a note.
func (f toyFormat) Layout(ctx context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	if err := ctx.Err(); err != nil {
		return formats.Layout{}, err
	}
	first := toyHeader{Files: o.Files}
	for _, p := range o.Metadata {
		b, err := json.Marshal(p.Value)
		if err != nil {
			return formats.Layout{}, err
		}
		first.Metadata = append(first.Metadata, toyPair{p.Name, fmt.Sprintf("%T", p.Value), b})
	}
	l, err := formats.LayOut(tensors, o, formats.Naming{Stem: "model", Extension: ".toy"},
		func(name string, members []int, sizes []int64) (formats.Shard, error) {
			h := first
			first = toyHeader{}
			s := formats.Shard{Name: name, Tensors: slices.Clone(members)}
			at := int64(toyRoom)
			for _, i := range members {
				if err := f.Holds(tensors[i]); err != nil {
					return s, fmt.Errorf("tensor %s: %w", tensors[i].Name, err)
				}
				h.Tensors = append(h.Tensors, toyTensor{tensors[i], at})
				s.Offsets = append(s.Offsets, at)
				at += sizes[i]
			}
			var err error
			s.Header, err = toyBytes(h)
			s.Size = at
			return s, err
		})
	l.Extra = append(l.Extra, formats.File{Name: "toy.txt", Data: fmt.Appendf(nil, "%d tensors\n", len(tensors))})
	return l, err
}

// The toy scheme reads and writes t4: a weight is one stored tensor, which the scheme knows by its encoding.
type toyScheme struct{}

func (toyScheme) Name() string        { return "toy" }
func (toyScheme) Types() []quant.Type { return []quant.Type{{Name: "t4"}} }

func (toyScheme) Spec(typ string, _ quant.Params) (quant.Spec, error) {
	return quant.Spec{Type: typ}, nil
}

func (toyScheme) Find(_ context.Context, s quant.Stored) ([]quant.Decoder, error) {
	var found []quant.Decoder
	for _, t := range s.Tensors() {
		if t.Encoding == toyT4 {
			found = append(found, toyWeight{tensor.Info{Name: t.Name, DType: tensor.F32, Shape: t.Shape}})
		}
	}
	return found, nil
}

func (toyScheme) Encoder(_ context.Context, _ quant.Spec, t tensor.Info) (quant.Encoder, error) {
	if n := t.Count(); n%4 != 0 || !t.DType.Float() {
		return nil, fmt.Errorf("%w to t4: %d elements of %v", quant.ErrUnsupported, n, t.DType)
	}
	return toyWeight{t}, nil
}

func (toyScheme) Config([]quant.Assigned, []string) (string, []byte, error) {
	return "quantization_config", []byte(`{"quant_method": "toy"}`), nil
}

func (toyScheme) Declaration(config []byte) (quant.Declaration, bool) {
	return quant.Declaration{}, bytes.Contains(config, []byte(`"toy"`))
}

// toyWeight is a weight in t4, to be read or written.
type toyWeight struct{ info tensor.Info }

func (w toyWeight) Info() tensor.Info    { return w.info }
func (w toyWeight) Spec() quant.Spec     { return quant.Spec{Type: "t4"} }
func (w toyWeight) Parts() []string      { return []string{w.info.Name} }
func (w toyWeight) Unit() int64          { return 4 }
func (w toyWeight) Values() tensor.DType { return tensor.F32 }

func (w toyWeight) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	return append(r, quant.Range{Offset: lo * 2, Length: (hi - lo) * 2})
}

func (w toyWeight) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	for i := range (hi - lo) / 4 {
		block := in[0][i*8:]
		scale := math.Float32frombits(binary.LittleEndian.Uint32(block))
		for k := range int64(4) {
			x := float32(int8(block[4+k])) / 127 * scale
			binary.LittleEndian.PutUint32(dst[(i*4+k)*4:], math.Float32bits(x))
		}
	}
	return nil
}

func (w toyWeight) Outputs() []tensor.Info {
	return []tensor.Info{{Name: w.info.Name, Shape: w.info.Shape, Encoding: toyT4}}
}

func (w toyWeight) Deferred(int64, int64) int64                                 { return 0 }
func (w toyWeight) Tiles(r []quant.Range, lo, hi int64) []quant.Range           { return w.Inputs(r, lo, hi) }
func (w toyWeight) Finish(quant.Deferred, func(int, int64, []byte) error) error { return nil }

func (w toyWeight) Encode(out [][]byte, _ []float32, lo, hi int64, src []byte) error {
	values := make([]byte, (hi-lo)*4)
	if err := tensor.Convert(values, tensor.F32, src, w.info.DType); err != nil {
		return err
	}
	for i := range (hi - lo) / 4 {
		var x [4]float32
		scale := float32(0)
		for k := range x {
			x[k] = math.Float32frombits(binary.LittleEndian.Uint32(values[(int(i)*4+k)*4:]))
			scale = max(scale, x[k], -x[k])
		}
		block := out[0][i*8:]
		binary.LittleEndian.PutUint32(block, math.Float32bits(scale))
		for k := range x {
			block[4+k] = byte(int8(math.Round(float64(x[k] / max(scale, math.SmallestNonzeroFloat32) * 127))))
		}
	}
	return nil
}
