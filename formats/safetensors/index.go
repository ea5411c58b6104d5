package safetensors

import (
	"io"
	"os"
	"slices"
)

// index is what model.safetensors.index.json says: which file has which tensor.
type index struct {
	shards []string         // sorted
	shard  map[string]int32 // from a tensor's name to the position in shards
}

func readIndexFile(f *os.File, limits Limits) (index, error) {
	info, err := f.Stat()
	if err != nil {
		return index{}, err
	}
	if info.Size() > limits.IndexBytes {
		return index{}, limitf("found an index of %d bytes, expected at most %d", info.Size(), limits.IndexBytes)
	}
	return readIndex(io.LimitReader(f, limits.IndexBytes), limits)
}

// readIndex reads an index: an object whose "weight_map" has the name of a
// file for the name of each tensor. All else in it is skipped. A name that
// occurs twice is refused.
func readIndex(r io.Reader, limits Limits) (index, error) {
	x := index{shard: map[string]int32{}}
	p := newParser(r, limits)
	if err := p.expect('{', "a JSON object with weight_map"); err != nil {
		return x, err
	}
	seen := false
	for p.dec.PeekKind() != '}' {
		name, err := p.string("a name")
		if err != nil {
			return x, err
		}
		if string(name) != "weight_map" {
			if err := p.dec.SkipValue(); err != nil {
				return x, syntax(err)
			}
			continue
		}
		if seen {
			return x, malformedf("found weight_map twice, expected it once")
		}
		seen = true
		if err := p.weightMap(&x); err != nil {
			return x, err
		}
	}
	if err := p.close(); err != nil {
		return x, err
	}
	if err := p.end(); err != nil {
		return x, err
	}
	if len(x.shards) == 0 {
		return x, malformedf("found no file in weight_map, expected one for each tensor")
	}
	x.sort()
	return x, nil
}

func (p *parser) weightMap(x *index) error {
	if err := p.expect('{', "weight_map as an object of file names"); err != nil {
		return err
	}
	numbers := map[string]int32{}
	for p.dec.PeekKind() != '}' {
		b, err := p.string("a tensor name")
		if err != nil {
			return err
		}
		if len(b) > p.limits.NameBytes {
			return limitf("found a tensor name of %d bytes, expected at most %d", len(b), p.limits.NameBytes)
		}
		name := string(b)
		file, err := p.string("a file name")
		if err != nil {
			return tensorError(name, err)
		}
		n, ok := numbers[string(file)]
		if !ok {
			if len(x.shards) == p.limits.Shards {
				return limitf("found more than %d files in weight_map", p.limits.Shards)
			}
			n = int32(len(x.shards))
			x.shards = append(x.shards, string(file))
			numbers[x.shards[n]] = n
		}
		if _, ok := x.shard[name]; ok {
			return tensorError(name, malformedf("found it twice in weight_map, expected it once"))
		}
		if len(x.shard) == p.limits.Tensors {
			return limitf("found more than %d tensors in weight_map", p.limits.Tensors)
		}
		x.shard[name] = n
	}
	return p.close()
}

// sort puts the shards in the order of their names, which is the order in which
// they are read.
func (x *index) sort() {
	sorted := slices.Sorted(slices.Values(x.shards))
	place := make([]int32, len(sorted))
	for i, s := range x.shards {
		n, _ := slices.BinarySearch(sorted, s)
		place[i] = int32(n)
	}
	for name, n := range x.shard {
		x.shard[name] = place[n]
	}
	x.shards = sorted
}
