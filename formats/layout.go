package formats

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/tensor"
)

// Naming is how a format calls its files: STEM.EXTENSION, of several STEM-00001-of-00003.EXTENSION beside
// STEM.EXTENSION.index.json.
type Naming struct {
	Stem      string
	Extension string // with the dot
	// InOrder keeps the tensors in the order given over all files, and writes no index: for files that have what they
	// need of one another in their own.
	InOrder bool
}

// frameRoom is more than the bytes of all files beside their tensors': with it no file size overflows.
const frameRoom = 1 << 40

// LayOut does what is the same for each format that has an index: it checks the tensors, splits them into shards, has
// each laid out by shard, and writes the index. The members of a shard are positions in tensors; sizes has the bytes
// of each tensor.
//
// The tensors are split in the order given, as huggingface_hub does: a shard is filled until the next tensor (or
// group) would make it larger than o.MaxShardSize, or have more tensors than o.MaxTensors; a tensor (or group) that
// alone is larger becomes a shard of its own, placed before the one being filled, or behind it with n.InOrder.
//
// The index is what transformers writes. It states total_size, the bytes of all tensors, and total_parameters:
// o.Parameters, or where that is zero the elements of all tensors, which is right where nothing is quantised and no
// buffer is among them.
//
// A name that is no UTF-8 or occurs twice, and a size that overflows or is no whole number of bytes, are errors.
func LayOut(tensors []tensor.Info, o Options, n Naming,
	shard func(name string, members []int, sizes []int64) (Shard, error)) (Layout, error) {
	sizes, err := check(tensors, o)
	if err != nil {
		return Layout{}, err
	}
	shards := split(sizes, o, n.InOrder)
	n.Stem = cmp.Or(o.Stem, n.Stem)
	var l Layout
	for i, members := range shards {
		name := n.Stem + n.Extension
		switch {
		case o.SingleFile != "":
			name = o.SingleFile
		case len(shards) > 1:
			name = fmt.Sprintf("%s-%05d-of-%05d%s", n.Stem, i+1, len(shards), n.Extension)
		}
		s, err := shard(name, members, sizes)
		if err != nil {
			return Layout{}, fmt.Errorf("%s: %w", name, err)
		}
		l.Shards = append(l.Shards, s)
	}
	if len(l.Shards) > 1 && !n.InOrder {
		l.Extra = []File{{Name: n.Stem + n.Extension + ".index.json", Data: writeIndex(tensors, sizes, l.Shards, o)}}
	}
	return l, nil
}

// check returns the size of each tensor.
func check(tensors []tensor.Info, o Options) ([]int64, error) {
	if o.MaxShardSize < 0 {
		return nil, fmt.Errorf("found a shard size of %d, expected 0 or more", o.MaxShardSize)
	}
	if o.MaxTensors < 0 {
		return nil, fmt.Errorf("found %d as the most tensors of a file, expected 0 or more", o.MaxTensors)
	}
	if err := o.Metadata.Check(); err != nil {
		return nil, err
	}
	if o.Groups != nil && len(o.Groups) != len(tensors) {
		return nil, fmt.Errorf("found %d groups for %d tensors, expected one for each", len(o.Groups), len(tensors))
	}
	sizes := make([]int64, len(tensors))
	seen := make(map[string]struct{}, len(tensors))
	total := int64(0)
	for i, t := range tensors {
		if !utf8.ValidString(t.Name) {
			return nil, fmt.Errorf("tensor %s: found a name that the format cannot hold, expected other text",
				tensor.Quote(t.Name))
		}
		if _, ok := seen[t.Name]; ok {
			return nil, fmt.Errorf("tensor %s: found it twice, expected it once", tensor.Quote(t.Name))
		}
		seen[t.Name] = struct{}{}
		size, err := t.Size()
		if err != nil {
			return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
		}
		if size > math.MaxInt64-total-frameRoom {
			return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), tensor.ErrOverflow)
		}
		total += size
		sizes[i] = size
	}
	return sizes, nil
}

// split assigns tensors, by their position, to shards.
func split(sizes []int64, o Options, inOrder bool) [][]int {
	most, tensors := o.MaxShardSize, o.MaxTensors
	if most == 0 || o.SingleFile != "" {
		most = math.MaxInt64
	}
	if tensors == 0 || o.SingleFile != "" {
		tensors = math.MaxInt
	}
	var shards [][]int
	var current []int
	filled := int64(0)
	for _, unit := range units(len(sizes), o.Groups) {
		size := int64(0)
		for _, i := range unit {
			size += sizes[i]
		}
		if size > most && !inOrder {
			shards = append(shards, unit)
			continue
		}
		if len(current) > 0 && (filled > most-size || len(current)+len(unit) > tensors) {
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

// units lists what is not to be torn apart: the members of each group, at the place of the first of them.
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

// writeIndex writes the index as transformers does, which is Python's json with sorted keys, two spaces of indent and
// everything but printable ASCII escaped.
func writeIndex(tensors []tensor.Info, sizes []int64, shards []Shard, o Options) []byte {
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
	b := fmt.Appendf(nil, "{\n  \"metadata\": {\n    \"total_parameters\": %d,\n    \"total_size\": %d\n  },\n  "+
		"\"weight_map\": {", parameters, bytes)
	for i, p := range places {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, "\n    "...)
		b = appendASCII(b, p.name)
		b = append(b, ": "...)
		b = appendASCII(b, p.file)
	}
	return append(b, "\n  }\n}\n"...)
}

// appendASCII writes a JSON string of printable ASCII. The text is valid UTF-8.
func appendASCII(b []byte, s string) []byte {
	quoted, _ := jsontext.AppendQuote(nil, s)
	for _, r := range string(quoted) {
		switch {
		case r <= '~':
			b = append(b, byte(r))
		case r > 0xFFFF:
			r -= 0x10000
			b = fmt.Appendf(b, `\u%04x\u%04x`, 0xD800+r>>10, 0xDC00+r&0x3FF)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return b
}
