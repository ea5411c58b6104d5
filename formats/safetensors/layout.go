package safetensors

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Layout places the tensors in files as the reference's serialize does, byte for byte: by alignment of the dtype, the
// widest first, then by name, behind a header in compact JSON that is padded with spaces to 8 bytes. Metadata, which
// the reference writes in no fixed order, is sorted, and values are written as text, since the format has strings
// alone; Metadata that is empty and not nil gives an empty object, as there. A list
// of strings that are not all UTF-8, as a vocabulary may be, would come out as other text: it is left out with a
// notice.
//
// One file is named model.safetensors; of several the first is model-00001-of-00003.safetensors, and there is an
// index. See formats.LayOut.
//
// A name that is no UTF-8, that occurs twice or is "__metadata__", and a size that overflows or is no whole number of
// bytes, are errors. A header above the reference's limit of 100,000,000 bytes is formats.ErrLimit.
func (f Format) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	for _, p := range o.Metadata {
		if !utf8.ValidString(p.Name) || !utf8.ValidString(p.Text()) {
			return formats.Layout{}, fmt.Errorf("metadata %s: found invalid UTF-8, expected text", quote(p.Name))
		}
	}
	var left []string
	o.Metadata = slices.DeleteFunc(slices.Clone(o.Metadata), func(p formats.Pair) bool {
		if list, _ := p.Value.([]string); !slices.ContainsFunc(list, func(s string) bool { return !utf8.ValidString(s) }) {
			return false
		}
		left = append(left, p.Name)
		return true
	})
	slices.SortFunc(o.Metadata, func(a, b formats.Pair) int { return strings.Compare(a.Name, b.Name) })
	for _, t := range tensors {
		if err := f.Holds(t); err != nil {
			return formats.Layout{}, fmt.Errorf("tensor %s: %w", quote(t.Name), err)
		}
		if t.Name == metadataName {
			return formats.Layout{}, fmt.Errorf("tensor %s: found a name that the format cannot hold, expected other text",
				quote(t.Name))
		}
	}
	l, err := formats.LayOut(tensors, o, formats.Naming{Stem: "model", Extension: extension},
		func(name string, members []int, sizes []int64) (formats.Shard, error) {
			return layShard(name, tensors, sizes, members, o.Metadata)
		})
	if err == nil && len(left) > 0 {
		l.Notices = append(l.Notices, "metadata is left out, since it is a list with a string that is no UTF-8: "+
			formats.List(left))
	}
	return l, err
}

// Holds says of an encoding that there is no place for it.
func (Format) Holds(t tensor.Info) error {
	if t.Encoding != (tensor.Encoding{}) {
		return fmt.Errorf("found the encoding %s, expected a dtype: %w", quote(t.Encoding.Name), formats.ErrUnsupported)
	}
	return nil
}

// alignment ranks the dtypes as the reference does, the first written first: the reverse of the order in which its
// Dtype declares them.
var alignment = [...]tensor.DType{
	tensor.U64, tensor.I64, tensor.F64, tensor.C64,
	tensor.F32, tensor.U32, tensor.I32,
	tensor.BF16, tensor.F16, tensor.U16, tensor.I16,
	tensor.F8E5M2FNUZ, tensor.F8E4M3FNUZ, tensor.F8E8M0, tensor.F8E4M3, tensor.F8E5M2, tensor.I8, tensor.U8,
	tensor.F6E3M2, tensor.F6E2M3, tensor.F4, tensor.Bool,
}

var rank = func() (r [len(alignment) + 1]int) {
	for i, d := range alignment {
		r[d] = i
	}
	return r
}()

// layShard orders the members of one file and writes its header.
func layShard(name string, tensors []tensor.Info, sizes []int64, members []int,
	metadata formats.Metadata) (formats.Shard, error) {
	s := formats.Shard{Name: name, Tensors: slices.Clone(members)}
	slices.SortFunc(s.Tensors, func(a, b int) int {
		return cmp.Or(cmp.Compare(rank[tensors[a].DType], rank[tensors[b].DType]),
			cmp.Compare(tensors[a].Name, tensors[b].Name))
	})
	least := 0 // bytes of the header, without numbers and escapes
	for _, i := range members {
		least += len(`"":{"dtype":"","shape":[],"data_offsets":[]},`) + len(tensors[i].Name)
	}
	if least > maxHeader {
		return s, limitf("found a header of more than %d bytes, expected at most %d", least, maxHeader)
	}
	b := make([]byte, lengthBytes, lengthBytes+256+least+64*len(members))
	b = append(b, '{')
	comma := func() {
		if last := b[len(b)-1]; last != '{' && last != '[' {
			b = append(b, ',')
		}
	}
	if metadata != nil {
		b = append(b, `"`+metadataName+`":{`...)
		for _, p := range metadata {
			comma()
			b = appendString(b, p.Name)
			b = append(b, ':')
			b = appendString(b, p.Text())
		}
		b = append(b, '}')
	}
	at := int64(0)
	for _, i := range s.Tensors {
		t := tensors[i]
		comma()
		b = appendString(b, t.Name)
		b = append(b, `:{"dtype":"`...)
		b = append(b, t.DType.String()...)
		b = append(b, `","shape":[`...)
		for _, d := range t.Shape {
			comma()
			b = strconv.AppendInt(b, d, 10)
		}
		b = append(b, `],"data_offsets":[`...)
		b = strconv.AppendInt(b, at, 10)
		b = append(b, ',')
		s.Offsets = append(s.Offsets, at)
		at += sizes[i]
		b = strconv.AppendInt(b, at, 10)
		b = append(b, `]}`...)
	}
	b = append(b, '}')
	for len(b)%8 != 0 {
		b = append(b, ' ')
	}
	n := len(b) - lengthBytes
	if n > maxHeader {
		return s, limitf("found a header of %d bytes, expected at most %d", n, maxHeader)
	}
	binary.LittleEndian.PutUint64(b, uint64(n))
	for i := range s.Offsets {
		s.Offsets[i] += int64(len(b))
	}
	s.Header, s.Size = b, int64(len(b))+at
	return s, nil
}

// appendString writes a JSON string as the reference does: only what must be escaped is. The text is valid UTF-8.
func appendString(b []byte, s string) []byte {
	b, _ = jsontext.AppendQuote(b, s)
	return b
}
