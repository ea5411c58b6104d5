// Command raw is a plugin of lorakit for a format of its own: a file .raw has RAW1, the length of a header in eight
// bytes, the header as JSON, and the tensors' data.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

func main() {
	sdk.Serve(sdk.Plugin{Name: "raw", Version: "1.0.0", Deterministic: true, Formats: []sdk.Format{format{}}})
}

const (
	magic     = "RAW1"
	mostBytes = 256 << 20 // of a header
)

// header is what stands before the data.
type header struct {
	Metadata map[string]string `json:"metadata,omitempty"`
	Tensors  []tensor.Info     `json:"tensors"` // in the order of their data
}

type format struct{}

func (format) Info() sdk.FormatInfo {
	return sdk.FormatInfo{Name: "raw", Extensions: []string{".raw"}, Magic: []sdk.Magic{{Bytes: []byte(magic)}}}
}

// Open reads the header. lorakit reads the data by itself, from where this says that it is.
func (format) Open(_ context.Context, path string) (sdk.Container, error) {
	f, err := os.Open(path)
	if err != nil {
		return sdk.Container{}, err
	}
	defer f.Close()
	var start [12]byte
	if _, err := io.ReadFull(f, start[:]); err != nil || string(start[:4]) != magic {
		return sdk.Container{}, fmt.Errorf("found no %s and a length, expected them: %w", magic, formats.ErrMalformed)
	}
	n := binary.LittleEndian.Uint64(start[4:])
	if n > mostBytes {
		return sdk.Container{}, fmt.Errorf("found a header of %d bytes, expected at most %d: %w", n, mostBytes,
			formats.ErrLimit)
	}
	var h header
	if err := json.UnmarshalRead(io.LimitReader(f, int64(n)), &h); err != nil {
		return sdk.Container{}, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	c := sdk.Container{Metadata: formats.Texts(h.Metadata)}
	at := int64(len(start)) + int64(n)
	for _, t := range h.Tensors {
		size, err := t.Size()
		if err != nil {
			return c, fmt.Errorf("tensor %s: %w: %w", tensor.Quote(t.Name), formats.ErrMalformed, err)
		}
		c.Tensors = append(c.Tensors, sdk.Tensor{Info: t, Offset: at})
		at += size // past the end of the file is refused by lorakit
	}
	return c, nil
}

// Layout says where each byte goes. lorakit writes them.
func (format) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	naming := formats.Naming{Stem: "model", Extension: ".raw"}
	return formats.LayOut(tensors, o, naming, func(name string, members []int, sizes []int64) (formats.Shard, error) {
		s := formats.Shard{Name: name, Tensors: members}
		h := header{Metadata: map[string]string{}}
		for _, p := range o.Metadata {
			h.Metadata[p.Name] = p.Text()
		}
		for _, i := range members {
			h.Tensors = append(h.Tensors, tensors[i])
		}
		b, err := json.Marshal(h, json.Deterministic(true))
		if err != nil {
			return s, err
		}
		s.Header = append(binary.LittleEndian.AppendUint64([]byte(magic), uint64(len(b))), b...)
		s.Size = int64(len(s.Header))
		for _, i := range members {
			s.Offsets = append(s.Offsets, s.Size)
			s.Size += sizes[i]
		}
		return s, nil
	})
}
