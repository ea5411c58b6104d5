//go:build unix

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// header is what a file says of its tensors.
type header struct {
	Metadata map[string]string `json:"metadata,omitempty"`
	Tensors  []tensor.Info     `json:"tensors"` // in the order of their data
}

func encode(tensors []tensor.Info, m formats.Metadata) ([]byte, error) {
	h := header{Metadata: map[string]string{}, Tensors: tensors}
	for _, p := range m {
		h.Metadata[p.Name] = p.Text()
	}
	return json.Marshal(h, json.Deterministic(true))
}

// contents are those of a file whose tensors begin at an offset. They are read through the plugin.
func contents(f *os.File, b []byte, at int64) (sdk.Container, error) {
	var h header
	if err := json.Unmarshal(b, &h); err != nil {
		return sdk.Container{}, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	c := sdk.Container{Metadata: formats.Texts(h.Metadata), Close: f.Close}
	for _, t := range h.Tensors {
		size, err := t.Size()
		if err != nil {
			return c, fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
		}
		c.Tensors = append(c.Tensors, sdk.Tensor{Info: t, Data: io.NewSectionReader(f, at, size)})
		at += size
	}
	return c, nil
}

// placed is a format whose bytes have their places: FX01, the length of the header, the header, the data.
type placed struct{}

func (placed) Info() sdk.FormatInfo {
	return sdk.FormatInfo{Name: "fx", Extensions: []string{".fx"}, Magic: []sdk.Magic{{Bytes: []byte("FX01")}}}
}

func (placed) Open(_ context.Context, path string) (sdk.Container, error) {
	if err := at("Open"); err != nil {
		return sdk.Container{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return sdk.Container{}, err
	}
	start := make([]byte, 12)
	if _, err := io.ReadFull(f, start); err != nil {
		return sdk.Container{}, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	n := binary.LittleEndian.Uint64(start[4:])
	if n > 1<<20 {
		return sdk.Container{}, fmt.Errorf("a header of %d bytes: %w", n, formats.ErrLimit)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(f, b); err != nil {
		return sdk.Container{}, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	return contents(f, b, int64(12+n))
}

func (placed) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	if err := at("Layout"); err != nil {
		return formats.Layout{}, err
	}
	naming := formats.Naming{Stem: "model", Extension: ".fx"}
	return formats.LayOut(tensors, o, naming, func(name string, members []int, sizes []int64) (formats.Shard, error) {
		s := formats.Shard{Name: name, Tensors: members}
		var list []tensor.Info
		for _, i := range members {
			list = append(list, tensors[i])
		}
		b, err := encode(list, o.Metadata)
		if err != nil {
			return s, err
		}
		s.Header = append(binary.LittleEndian.AppendUint64([]byte("FX01"), uint64(len(b))), b...)
		s.Size = int64(len(s.Header))
		for _, i := range members {
			s.Offsets = append(s.Offsets, s.Size)
			s.Size += sizes[i]
		}
		return s, nil
	})
}

// streamed is a format that the plugin writes: FS01, the data, the header, its length.
type streamed struct{}

func (streamed) Info() sdk.FormatInfo {
	return sdk.FormatInfo{Name: "fs", Extensions: []string{".fs"}, Magic: []sdk.Magic{{Bytes: []byte("FS01")}}}
}

func (streamed) Open(_ context.Context, path string) (sdk.Container, error) {
	f, err := os.Open(path)
	if err != nil {
		return sdk.Container{}, err
	}
	all, err := io.ReadAll(f)
	if err != nil || len(all) < 12 {
		return sdk.Container{}, fmt.Errorf("no end: %w", formats.ErrMalformed)
	}
	n := binary.LittleEndian.Uint64(all[len(all)-8:])
	if n > uint64(len(all)-12) {
		return sdk.Container{}, fmt.Errorf("a header of %d bytes: %w", n, formats.ErrMalformed)
	}
	return contents(f, all[uint64(len(all)-8)-n:len(all)-8], 4)
}

func (streamed) Create(_ context.Context, path string, tensors []tensor.Info, m formats.Metadata) (
	formats.Writer, error) {
	if err := at("Create"); err != nil {
		return nil, err
	}
	b, err := encode(tensors, m)
	if err != nil {
		return nil, err
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString("FS01")
	return &writer{f, b}, err
}

type writer struct {
	*os.File
	header []byte
}

func (w *writer) Write(_ int, _ int64, p []byte) error {
	if err := at("Write"); err != nil {
		return err
	}
	_, err := w.File.Write(p)
	return err
}

func (w *writer) Finish(context.Context) (int64, error) {
	if err := at("Finish"); err != nil {
		return 0, err
	}
	if _, err := w.File.Write(binary.LittleEndian.AppendUint64(w.header, uint64(len(w.header)))); err != nil {
		return 0, err
	}
	size, err := w.Seek(0, io.SeekCurrent)
	check(w.Sync())
	check(w.Close())
	spoilFile(w.Name())
	return spoilSize(size), err
}

func (w *writer) Abort() error {
	if err := at("Abort"); err != nil {
		return err
	}
	w.Close()
	return os.RemoveAll(w.Name())
}

// scheme is 8 bits: codes of a byte, a scale of 64 of them, and the largest of all.
type scheme struct{}

const unit = 64

func (scheme) Info() sdk.SchemeInfo {
	return sdk.SchemeInfo{Name: "fq", Types: []string{"fq8"}, Suffixes: []string{".fq_scale"}}
}

func (scheme) Find(_ context.Context, s quant.Stored) ([]sdk.Decoder, error) {
	if err := at("Find"); err != nil {
		return nil, err
	}
	var list []sdk.Decoder
	for _, t := range s.Tensors() {
		name, ok := strings.CutSuffix(t.Name, ".fq_scale")
		if !ok {
			continue
		}
		codes, ok := s.Lookup(name)
		if !ok {
			continue
		}
		if err := s.Read(name+".fq_max", make([]byte, 4), 0); err != nil {
			return nil, err
		}
		list = append(list, sdk.Decoder{
			Info: tensor.Info{Name: name, DType: tensor.F32, Shape: codes.Shape}, Spec: quant.Spec{Type: "fq8"}, Unit: unit,
			Parts: []sdk.Part{{Name: name, Rule: sdk.Rule{Stride: unit}}, {Name: t.Name, Rule: sdk.Rule{Stride: 4}},
				{Name: name + ".fq_max"}},
			Decode: func(dst []byte, lo, hi int64, in [][]byte) error {
				if err := at("Decode"); err != nil {
					return err
				}
				for i := range hi - lo {
					scale := math.Float32frombits(binary.LittleEndian.Uint32(in[1][i/unit*4:]))
					binary.LittleEndian.PutUint32(dst[i*4:], math.Float32bits(float32(int8(in[0][i]))*scale))
				}
				return nil
			},
		})
	}
	return list, nil
}

func (scheme) Encoder(_ context.Context, _ quant.Spec, t tensor.Info) (*sdk.Encoder, error) {
	if err := at("Encoder"); err != nil {
		return nil, err
	}
	units := (t.Count() + unit - 1) / unit
	return &sdk.Encoder{
		Unit: unit, Carry: 1,
		Outputs: []sdk.Output{
			{Info: tensor.Info{Name: t.Name, DType: tensor.U8, Shape: t.Shape}, Rule: sdk.Rule{Stride: unit}},
			{Info: tensor.Info{Name: t.Name + ".fq_scale", DType: tensor.F32, Shape: []int64{units}}, Rule: sdk.Rule{Stride: 4}},
			{Info: tensor.Info{Name: t.Name + ".fq_max", DType: tensor.F32, Shape: []int64{1}}},
		},
		Encode: func(out [][]byte, carry []float32, lo, hi int64, values []byte) error {
			if err := at("Encode"); err != nil {
				return err
			}
			list := make([]float32, hi-lo)
			if err := tensor.ToFloats(list, values, t.DType); err != nil {
				return err
			}
			for u := int64(0); u*unit < int64(len(list)); u++ {
				part := list[u*unit : min(u*unit+unit, int64(len(list)))]
				most := float32(0)
				for _, x := range part {
					most = max(most, float32(math.Abs(float64(x))))
				}
				carry[u] = most
				scale := most / 127
				binary.LittleEndian.PutUint32(out[1][u*4:], math.Float32bits(scale))
				for i, x := range part {
					code := int8(0)
					if scale > 0 {
						code = int8(math.RoundToEven(float64(x / scale)))
					}
					out[0][u*unit+int64(i)] = byte(code)
				}
			}
			return nil
		},
		Finish: func(c quant.Deferred, write func(output int, off int64, p []byte) error) error {
			list := make([]float32, units)
			if err := c.ReadFloats(list, 0); err != nil {
				return err
			}
			most := float32(0)
			for _, x := range list {
				most = max(most, x)
			}
			return write(2, 0, binary.LittleEndian.AppendUint32(nil, math.Float32bits(most)))
		},
	}, nil
}

func (scheme) Config(context.Context, quant.Spec, []string) ([]byte, error) {
	if err := at("Config"); err != nil {
		return nil, err
	}
	return []byte(`{"quant_method": "fq"}`), nil
}
