package safetensors

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Layout places the tensors in files as the reference's serialize does, byte
// for byte: by alignment of the dtype, the widest first, then by name, behind a header in
// compact JSON that is padded with spaces to 8 bytes. Metadata, which the
// reference writes in no fixed order, is sorted; an empty map that is not nil
// gives an empty object, as there.
//
// The tensors are split into shards in the order given, as huggingface_hub
// does: a shard is filled until the next tensor (or group) would make it larger than
// o.MaxShardSize; a tensor (or group) that alone is larger becomes a shard of its own, placed before
// the one being filled. One shard is named model.safetensors; of several the
// first is model-00001-of-00003.safetensors, and there is an index as
// transformers writes it.
//
// The index states total_size, the bytes of all tensors, and total_parameters:
// o.Parameters, or where that is zero the elements of all tensors, which is
// right where nothing is quantised and no buffer is among them.
//
// A name that is no UTF-8, that occurs twice or is "__metadata__", and a size
// that overflows or is no whole number of bytes, are errors. A header above
// the reference's limit of 100,000,000 bytes is formats.ErrLimit.
func (Format) Layout(tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	sizes, err := check(tensors, o)
	if err != nil {
		return formats.Layout{}, err
	}
	shards := split(sizes, o)
	var l formats.Layout
	for i, members := range shards {
		name := "model" + extension
		switch {
		case o.SingleFile != "":
			name = o.SingleFile
		case len(shards) > 1:
			name = fmt.Sprintf("model-%05d-of-%05d%s", i+1, len(shards), extension)
		}
		s, err := layShard(name, tensors, sizes, members, o.Metadata)
		if err != nil {
			return formats.Layout{}, fmt.Errorf("%s: %w", name, err)
		}
		l.Shards = append(l.Shards, s)
	}
	if len(l.Shards) > 1 {
		l.Extra = []formats.File{{Name: "model" + indexExtension, Data: writeIndex(tensors, sizes, l.Shards, o)}}
	}
	return l, nil
}

// check returns the size of each tensor.
func check(tensors []tensor.Info, o formats.Options) ([]int64, error) {
	if o.MaxShardSize < 0 {
		return nil, fmt.Errorf("found a shard size of %d, expected 0 or more", o.MaxShardSize)
	}
	if o.Groups != nil && len(o.Groups) != len(tensors) {
		return nil, fmt.Errorf("found %d groups for %d tensors, expected one for each", len(o.Groups), len(tensors))
	}
	for k, v := range o.Metadata {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return nil, fmt.Errorf("metadata %s: found invalid UTF-8, expected text", quote(k))
		}
	}
	sizes := make([]int64, len(tensors))
	seen := make(map[string]struct{}, len(tensors))
	total := int64(0)
	for i, t := range tensors {
		if !utf8.ValidString(t.Name) || t.Name == metadataName {
			return nil, fmt.Errorf("tensor %s: found a name that the format cannot hold, expected other text", quote(t.Name))
		}
		if _, ok := seen[t.Name]; ok {
			return nil, fmt.Errorf("tensor %s: found it twice, expected it once", quote(t.Name))
		}
		seen[t.Name] = struct{}{}
		size, err := t.Size()
		if err != nil {
			return nil, fmt.Errorf("tensor %s: %w", quote(t.Name), err)
		}
		// Leave room for the largest header, so that no file size overflows.
		if size > math.MaxInt64-total-2*maxHeader {
			return nil, fmt.Errorf("tensor %s: %w", quote(t.Name), tensor.ErrOverflow)
		}
		total += size
		sizes[i] = size
	}
	return sizes, nil
}

// split assigns tensors, by their position, to shards.
func split(sizes []int64, o formats.Options) [][]int {
	most := o.MaxShardSize
	if most == 0 || o.SingleFile != "" {
		most = math.MaxInt64
	}
	var shards [][]int
	var current []int
	filled := int64(0)
	for _, unit := range units(len(sizes), o.Groups) {
		size := int64(0)
		for _, i := range unit {
			size += sizes[i]
		}
		if size > most {
			shards = append(shards, unit)
			continue
		}
		if filled > most-size {
			shards = append(shards, current)
			current, filled = nil, 0
		}
		current = append(current, unit...)
		filled += size
	}
	if len(current) > 0 || len(shards) == 0 {
		shards = append(shards, current)
	}
	return shards
}

// units lists what is not to be torn apart: the members of each group, at the
// place of the first of them.
func units(n int, groups []int) [][]int {
	place := map[int]int{} // from a group to its unit
	var all [][]int
	for i := range n {
		if groups == nil {
			all = append(all, []int{i})
			continue
		}
		at, ok := place[groups[i]]
		if !ok {
			at = len(all)
			place[groups[i]] = at
			all = append(all, nil)
		}
		all[at] = append(all[at], i)
	}
	return all
}

// alignment ranks the dtypes as the reference does, the first written first:
// the reverse of the order in which its Dtype declares them.
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
func layShard(name string, tensors []tensor.Info, sizes []int64, members []int, metadata map[string]string) (formats.Shard, error) {
	s := formats.Shard{Name: name, Tensors: slices.Clone(members)}
	slices.SortFunc(s.Tensors, func(a, b int) int {
		return cmp.Or(cmp.Compare(rank[tensors[a].DType], rank[tensors[b].DType]), cmp.Compare(tensors[a].Name, tensors[b].Name))
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
		for _, k := range slices.Sorted(maps.Keys(metadata)) {
			comma()
			b = appendString(b, k)
			b = append(b, ':')
			b = appendString(b, metadata[k])
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

// appendString writes a JSON string as the reference does: only what must be
// escaped is.
func appendString(b []byte, s string) []byte {
	return appendEscaped(b, s, func(r rune) bool { return r < ' ' })
}

// writeIndex writes the index as transformers does, which is Python's json with sorted keys,
// two spaces of indent and everything but printable ASCII escaped.
func writeIndex(tensors []tensor.Info, sizes []int64, shards []formats.Shard, o formats.Options) []byte {
	type place struct{ name, file string }
	places := make([]place, 0, len(tensors))
	for _, s := range shards {
		for _, i := range s.Tensors {
			places = append(places, place{tensors[i].Name, s.Name})
		}
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Compare(a.name, b.name) })
	parameters, bytes := o.Parameters, int64(0)
	for i, t := range tensors {
		bytes += sizes[i]
		if o.Parameters == 0 {
			parameters += t.Count()
		}
	}
	ascii := func(r rune) bool { return r < ' ' || r > '~' }
	b := fmt.Appendf(nil, "{\n  \"metadata\": {\n    \"total_parameters\": %d,\n    \"total_size\": %d\n  },\n  \"weight_map\": {", parameters, bytes)
	for i, p := range places {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, "\n    "...)
		b = appendEscaped(b, p.name, ascii)
		b = append(b, ": "...)
		b = appendEscaped(b, p.file, ascii)
	}
	return append(b, "\n  }\n}\n"...)
}

// appendEscaped writes a JSON string, with the runes that escape asks for as
// \uXXXX, or shorter where JSON has a shorter form.
func appendEscaped(b []byte, s string, escape func(rune) bool) []byte {
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\b':
			b = append(b, `\b`...)
		case r == '\f':
			b = append(b, `\f`...)
		case r == '\n':
			b = append(b, `\n`...)
		case r == '\r':
			b = append(b, `\r`...)
		case r == '\t':
			b = append(b, `\t`...)
		case !escape(r):
			b = utf8.AppendRune(b, r)
		case r > 0xFFFF:
			r -= 0x10000
			b = fmt.Appendf(b, `\u%04x\u%04x`, 0xD800+r>>10, 0xDC00+r&0x3FF)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return append(b, '"')
}
