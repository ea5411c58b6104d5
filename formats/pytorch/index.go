package pytorch

import (
	"errors"
	"io"
	"os"
	"slices"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/tensor"
)

// index is what pytorch_model.bin.index.json says: which file has which tensor.
type index map[string]string

// shards lists the files, sorted, which is the order in which they are read.
func (x index) shards() []string {
	files := map[string]bool{}
	for _, f := range x {
		files[f] = true
	}
	all := make([]string, 0, len(files))
	for f := range files {
		all = append(all, f)
	}
	slices.Sort(all)
	return all
}

func readIndexFile(f *os.File, limits Limits) (index, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > limits.IndexBytes {
		return nil, limitf("found an index of %d bytes, expected at most %d", info.Size(), limits.IndexBytes)
	}
	x, err := readIndex(io.LimitReader(f, limits.IndexBytes), limits)
	if s, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		// Its own text repeats the names around the place.
		return nil, malformedf("byte %d of the JSON: %v", s.ByteOffset, s.Err)
	}
	return x, err
}

// readIndex reads an index: an object whose "weight_map" has the name of a file
// for the name of each tensor. All else in it is skipped. The decoder refuses a
// name that occurs twice.
func readIndex(r io.Reader, limits Limits) (index, error) {
	x := index{}
	d := jsontext.NewDecoder(r)
	if err := expect(d, '{', "an object with weight_map"); err != nil {
		return nil, err
	}
	for d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			return nil, err
		}
		if name.String() != "weight_map" {
			if err := d.SkipValue(); err != nil {
				return nil, err
			}
			continue
		}
		if err := expect(d, '{', "weight_map as an object of file names"); err != nil {
			return nil, err
		}
		for d.PeekKind() == '"' {
			t, err := d.ReadToken()
			if err != nil {
				return nil, err
			}
			name := t.String()
			if d.PeekKind() != '"' {
				if _, err := d.ReadToken(); err != nil {
					return nil, err
				}
				return nil, tensorError(name, malformedf("found no file name in weight_map, expected one"))
			}
			file, err := d.ReadToken()
			if err != nil {
				return nil, err
			}
			if len(x) == limits.Tensors {
				return nil, limitf("found more than %d tensors in weight_map", limits.Tensors)
			}
			x[name] = file.String()
		}
		if _, err := d.ReadToken(); err != nil { // }
			return nil, err
		}
	}
	if _, err := d.ReadToken(); err != nil { // }
		return nil, err
	}
	if _, err := d.ReadToken(); err != io.EOF {
		if err == nil {
			err = malformedf("found more JSON after the object, expected its end")
		}
		return nil, err
	}
	if len(x) == 0 {
		return nil, malformedf("found no file in weight_map, expected one for each tensor")
	}
	if n := len(x.shards()); n > limits.Shards {
		return nil, limitf("found %d files in weight_map, expected at most %d", n, limits.Shards)
	}
	return x, nil
}

// expect reads one token of the kind.
func expect(d *jsontext.Decoder, k jsontext.Kind, what string) error {
	found := d.PeekKind()
	if _, err := d.ReadToken(); err != nil {
		if err == io.EOF {
			return malformedf("found no JSON, expected %s", what)
		}
		return err
	}
	if found != k {
		return malformedf("found %s, expected %s", tensor.Quote(found.String()), what)
	}
	return nil
}
