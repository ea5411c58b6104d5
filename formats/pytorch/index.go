package pytorch

import (
	"errors"
	"io"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

func readIndexFile(f storage.File, limits Limits) (formats.Index, error) {
	if f.Size() > limits.IndexBytes {
		return formats.Index{}, limitf("found an index of %d bytes, expected at most %d", f.Size(), limits.IndexBytes)
	}
	x, err := readIndex(io.NewSectionReader(f, 0, limits.IndexBytes), limits)
	if s, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		// Its own text repeats the names around the place.
		return formats.Index{}, malformedf("byte %d of the JSON: %v", s.ByteOffset, s.Err)
	}
	return x, err
}

// readIndex reads pytorch_model.bin.index.json: an object whose "weight_map" has the name of a file for the name of
// each tensor. All else in it is skipped. The decoder refuses a name that occurs twice.
func readIndex(r io.Reader, limits Limits) (formats.Index, error) {
	x := formats.Index{Tensors: map[string]int32{}}
	places := map[string]int32{} // from a file's name to its place
	d := jsontext.NewDecoder(r)
	if err := expect(d, '{', "an object with weight_map"); err != nil {
		return formats.Index{}, err
	}
	for d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			return formats.Index{}, err
		}
		if name.String() != "weight_map" {
			if err := d.SkipValue(); err != nil {
				return formats.Index{}, err
			}
			continue
		}
		if err := expect(d, '{', "weight_map as an object of file names"); err != nil {
			return formats.Index{}, err
		}
		for d.PeekKind() == '"' {
			t, err := d.ReadToken()
			if err != nil {
				return formats.Index{}, err
			}
			name := t.String()
			if d.PeekKind() != '"' {
				if _, err := d.ReadToken(); err != nil {
					return formats.Index{}, err
				}
				return formats.Index{}, tensorError(name, malformedf("found no file name in weight_map, expected one"))
			}
			file, err := d.ReadToken()
			if err != nil {
				return formats.Index{}, err
			}
			if len(x.Tensors) == limits.Tensors {
				return formats.Index{}, limitf("found more than %d tensors in weight_map", limits.Tensors)
			}
			place, known := places[file.String()]
			if !known {
				place = int32(len(x.Files))
				x.Files = append(x.Files, file.String())
				places[x.Files[place]] = place
			}
			x.Tensors[name] = place
		}
		if _, err := d.ReadToken(); err != nil { // }
			return formats.Index{}, err
		}
	}
	if _, err := d.ReadToken(); err != nil { // }
		return formats.Index{}, err
	}
	if _, err := d.ReadToken(); err != io.EOF {
		if err == nil {
			err = malformedf("found more JSON after the object, expected its end")
		}
		return formats.Index{}, err
	}
	if len(x.Tensors) == 0 {
		return formats.Index{}, malformedf("found no file in weight_map, expected one for each tensor")
	}
	if n := len(x.Files); n > limits.Shards {
		return formats.Index{}, limitf("found %d files in weight_map, expected at most %d", n, limits.Shards)
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
