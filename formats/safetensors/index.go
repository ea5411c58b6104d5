package safetensors

import (
	"io"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

func readIndexFile(f storage.File, limits Limits) (formats.Index, error) {
	if f.Size() > limits.IndexBytes {
		return formats.Index{}, limitf("found an index of %d bytes, expected at most %d", f.Size(), limits.IndexBytes)
	}
	return readIndex(io.NewSectionReader(f, 0, limits.IndexBytes), limits)
}

// readIndex reads model.safetensors.index.json: an object whose "weight_map" has the name of a file for the name of
// each tensor. All else in it is skipped. A name that occurs twice is refused.
func readIndex(r io.Reader, limits Limits) (formats.Index, error) {
	x := formats.Index{Tensors: map[string]int32{}}
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
	if len(x.Files) == 0 {
		return x, malformedf("found no file in weight_map, expected one for each tensor")
	}
	return x, nil
}

func (p *parser) weightMap(x *formats.Index) error {
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
			if len(x.Files) == p.limits.Shards {
				return limitf("found more than %d files in weight_map", p.limits.Shards)
			}
			n = int32(len(x.Files))
			x.Files = append(x.Files, string(file))
			numbers[x.Files[n]] = n
		}
		if _, ok := x.Tensors[name]; ok {
			return tensorError(name, malformedf("found it twice in weight_map, expected it once"))
		}
		if len(x.Tensors) == p.limits.Tensors {
			return limitf("found more than %d tensors in weight_map", p.limits.Tensors)
		}
		x.Tensors[name] = n
	}
	return p.close()
}
