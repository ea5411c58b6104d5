package gguf

import (
	"context"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"strconv"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// Keys of a file that is one of several.
const (
	splitNumberKey  = "split.no" // from 0
	splitCountKey   = "split.count"
	splitTensorsKey = "split.tensors.count" // in all files
)

func isSplitKey(name string) bool {
	return name == splitNumberKey || name == splitCountKey || name == splitTensorsKey
}

// part is what the name of a file says: that it is number of count, from 1.
type part struct {
	stem, extension string
	number, count   int
}

// partOf reads a name such as model-00001-of-00003.gguf. Any other, and that of one of one, is of a file by itself.
func partOf(name string) (part, bool) {
	stem, ok := stemOf(name)
	ext := name[len(stem):]
	if !ok || len(stem) < len("-00001-of-00003") {
		return part{}, false
	}
	at := len(stem) - len("-00001-of-00003")
	stem, tail := stem[:at], stem[at:]
	if tail[0] != '-' || tail[6:10] != "-of-" {
		return part{}, false
	}
	number, err1 := strconv.ParseUint(tail[1:6], 10, 31)
	count, err2 := strconv.ParseUint(tail[10:], 10, 31)
	if err1 != nil || err2 != nil || number < 1 || number > count || count == 1 {
		return part{}, false
	}
	return part{stem, ext, int(number), int(count)}, true
}

func (p part) name(number int) string {
	return fmt.Sprintf("%s-%05d-of-%05d%s", p.stem, number, p.count, p.extension)
}

// Parts lists the files that the file of this name is one of, none where it is one by itself.
func (r *reader) Parts(name string) ([]string, error) {
	p, ok := partOf(name)
	if !ok {
		return nil, nil
	}
	if p.count > r.limits.Files {
		return nil, limitf("found a file of %d by its name, expected at most %d", p.count, r.limits.Files)
	}
	names := make([]string, p.count)
	for i := range names {
		names[i] = p.name(i + 1)
	}
	return names, nil
}

// readSplit holds what a file says of the others against its name, and takes that out of its metadata.
func (r *reader) readSplit(name string, m formats.Metadata) (formats.Metadata, error) {
	count, counts, err := split[uint16](m, splitCountKey)
	if err != nil {
		return nil, err
	}
	number, numbered, err := split[uint16](m, splitNumberKey)
	if err != nil {
		return nil, err
	}
	tensors, totals, err := split[int32](m, splitTensorsKey)
	if err != nil {
		return nil, err
	}
	p, several := partOf(name)
	switch {
	case !several && count > 1:
		return nil, keyError(splitCountKey, malformedf("found %d in a file of this name, expected one such as "+
			"NAME-00001-of-%05d%s", count, count, extension))
	case several && (!counts || int(count) != p.count):
		return nil, keyError(splitCountKey, malformedf("found %s, expected %d as in the file's name", said(count, counts),
			p.count))
	case several && (!numbered || int(number) != p.number-1):
		return nil, keyError(splitNumberKey, malformedf("found %s, expected %d by the file's name", said(number, numbered),
			p.number-1))
	case several && !totals:
		return nil, keyError(splitTensorsKey, malformedf("found none, expected the number of tensors in all files"))
	case several && r.several && int(tensors) != r.tensors:
		return nil, keyError(splitTensorsKey, malformedf("found %d, expected %d as in the file before it", tensors,
			r.tensors))
	}
	r.several, r.tensors = several, int(tensors)
	m = slices.DeleteFunc(m, func(p formats.Pair) bool { return isSplitKey(p.Name) })
	return m, r.agree(m)
}

// agree holds the keys of a file against those of the first one of several, if they have any in common.
func (r *reader) agree(m formats.Metadata) error {
	if r.first == nil {
		r.first = make(map[string]any, len(m))
		for _, p := range m {
			r.first[p.Name] = p.Value
		}
		return nil
	}
	for _, p := range m {
		if first, ok := r.first[p.Name]; ok && !reflect.DeepEqual(first, p.Value) {
			return keyError(p.Name, malformedf("found another value, expected that of the first file"))
		}
	}
	return nil
}

// split finds the value of a key that has one type.
func split[T any](m formats.Metadata, name string) (value T, ok bool, err error) {
	found := m.Get(name)
	if found == nil {
		return value, false, nil
	}
	if value, ok = found.(T); !ok {
		return value, false, keyError(name, malformedf("found a %T, expected a %T", found, value))
	}
	return value, true, nil
}

func said(n uint16, is bool) string {
	if !is {
		return "none"
	}
	return fmt.Sprint(n)
}

// Locate returns the one model of a folder: a file, or the first of several that are one.
func (*reader) Locate(ctx context.Context, dir storage.Folder) (string, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return "", err
	}
	var found []string
	seen := map[part]bool{}
	for _, e := range entries {
		if !isWeights(e.Name) {
			continue
		}
		if p, ok := partOf(e.Name); ok {
			p.number = 0
			if seen[p] {
				continue
			}
			seen[p] = true
		}
		found = append(found, e.Name)
	}
	shown := formats.Display(dir.Path(""))
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%s: found no %s file, expected one: %w", shown, extension, fs.ErrNotExist)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%s: found %s, expected one model: name its file: %w", shown, formats.List(found),
		formats.ErrMalformed)
}

// splitPairs are the keys of a file that is one of several.
func splitPairs(number, count, tensors int) formats.Metadata {
	return formats.Metadata{
		{Name: splitNumberKey, Value: uint16(number)}, {Name: splitCountKey, Value: uint16(count)},
		{Name: splitTensorsKey, Value: int32(tensors)},
	}
}
