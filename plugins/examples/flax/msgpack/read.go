package msgpack

import (
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"

	"github.com/tinylib/msgp/msgp"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Tensor is an array of a file.
type Tensor struct {
	tensor.Info // the name is what Join makes of its keys
	// Ranges are where its data lies, one after the other: one, or those of its chunks.
	Ranges []Range
}

// Range is some bytes of a file.
type Range struct{ Offset, Bytes int64 }

// Contents is what a file has.
type Contents struct {
	Tensors []Tensor // in the order of the file
	// Metadata are the leaves that are no arrays, such as the step of a training, by their names. A map that is empty is
	// {}, None is null and a complex number is as Python writes it.
	Metadata formats.Metadata
}

// Read reads the structure of a file, and no data. All lengths have been checked against the size of the file.
func Read(file io.ReaderAt, size int64) (Contents, error) {
	p := parser{source: source{file: file, size: size}}
	if err := p.root(); err != nil {
		if len(p.path) > 0 {
			err = fmt.Errorf("tensor %s: %w", tensor.Quote(Join(p.path)), err)
		}
		return Contents{}, err
	}
	return p.Contents, nil
}

// parser reads a file.
type parser struct {
	source
	Contents
	path   []string // the keys that lead to where it is
	values int
	text   int
}

func (p *parser) root() error {
	kind, err := p.kind(aMap)
	switch {
	case err != nil:
		return err
	case kind == msgp.ExtensionType:
		return unsupportedf("byte 0: found an array without a name, expected a map of arrays")
	}
	if err := p.mapping(); err != nil {
		return err
	}
	if n := p.left(); n > 0 {
		return malformedf("byte %d: found %d bytes behind the map, expected the end of the file", p.at, n)
	}
	return nil
}

// mapping reads a map.
func (p *parser) mapping() error {
	if len(p.path) == maxDepth {
		return limitf("byte %d: found a map in %d maps, expected fewer", p.at, maxDepth)
	}
	n, err := p.entries()
	if err != nil {
		return err
	}
	if n == 0 && len(p.path) > 0 {
		return p.add("{}")
	}
	seen := map[string]struct{}{}
	for i := range n {
		at := p.at
		key, err := p.key()
		_, twice := seen[key]
		switch {
		case err != nil:
			return err
		case key == chunkedKey && i == 0 && len(p.path) > 0:
			return p.chunked(n)
		case key == chunkedKey:
			return unsupportedf("byte %d: found the key %s, expected it first in the map of one tensor", at, chunkedKey)
		case twice:
			return malformedf("byte %d: found the key %s twice in a map, expected it once", at, tensor.Quote(key))
		}
		seen[key] = struct{}{}
		p.path = append(p.path, key)
		if err := p.value(); err != nil {
			return err
		}
		p.path = p.path[:len(p.path)-1]
	}
	return nil
}

// entries reads the header of a map. Each entry has two bytes at least.
func (p *parser) entries() (uint32, error) {
	at := p.at
	n, err := take(&p.source, msgp.ReadMapHeaderBytes, aMap)
	if err == nil && int64(n) > p.left()/2 {
		err = malformedf("byte %d: found a map of %d entries, of which the %d bytes that are left have no place", at, n,
			p.left())
	}
	return n, err
}

func (p *parser) key() (string, error) {
	at := p.at
	key, err := take(&p.source, msgp.ReadStringBytes, aString)
	switch {
	case err != nil:
		return "", err
	case !utf8.ValidString(key):
		return "", malformedf("byte %d: found the key %s, expected UTF-8", at, tensor.Quote(key))
	}
	return key, nil
}

// value reads what a key is for.
func (p *parser) value() error {
	if err := p.count(); err != nil {
		return err
	}
	kind, err := p.kind("an array")
	if err != nil {
		return err
	}
	switch kind {
	case msgp.MapType:
		return p.mapping()
	case msgp.ExtensionType:
		return p.extension()
	case msgp.NilType:
		p.skip(1)
		return p.add("null")
	case msgp.BoolType:
		return leaf(p, msgp.ReadBoolBytes, aBool)
	case msgp.UintType:
		return leaf(p, msgp.ReadUint64Bytes, anInteger)
	case msgp.IntType:
		return leaf(p, msgp.ReadInt64Bytes, anInteger)
	case msgp.Float32Type, msgp.Float64Type:
		return leaf(p, msgp.ReadFloat64Bytes, aNumber)
	case msgp.StrType:
		s, err := p.key()
		if err != nil {
			return err
		}
		return p.add(s)
	case msgp.InvalidType:
		return malformedf("byte %d: found %#x, expected msgpack", p.at, p.window[0])
	}
	return unsupportedf("byte %d: found %s, expected an array, or a map as flax.serialization.to_state_dict makes of it",
		p.at, kindOf(p.window))
}

// leaf reads a number or a boolean into the metadata.
func leaf[T any](p *parser, read func([]byte) (T, []byte, error), what string) error {
	v, err := take(&p.source, read, what)
	if err != nil {
		return err
	}
	return p.add(v)
}

// extension reads an array or a complex number.
func (p *parser) extension() error {
	at := p.at
	x, end, err := p.extended()
	if err != nil {
		return err
	}
	switch x.code {
	case extensionArray, extensionScalar:
		t, data, err := p.array(end)
		if err != nil {
			return err
		}
		t.Name, err = p.name()
		p.Tensors = append(p.Tensors, Tensor{t, []Range{data}})
		return err
	case extensionComplex:
		return p.complex(end)
	}
	return unsupportedf("byte %d: found the extension %d, expected an array (%d, %d) or a complex number (%d)", at, x.code,
		extensionArray, extensionScalar, extensionComplex)
}

// extended reads the header of an extension, and says where it ends.
func (p *parser) extended() (x extension, end int64, err error) {
	at := p.at
	x, err = take(&p.source, readExtension, anArray)
	if err == nil && x.bytes > p.left() {
		err = malformedf("byte %d: found an array of %d bytes, of which the file has %d", at, x.bytes, p.left())
	}
	return x, p.at + x.bytes, err
}

// array reads the header of an array, which ends at end, and passes over its data.
func (p *parser) array(end int64) (t tensor.Info, data Range, err error) {
	at := p.at
	if n, err := take(&p.source, msgp.ReadArrayHeaderBytes, aList); err != nil {
		return t, data, err
	} else if n != 3 {
		return t, data, malformedf("byte %d: found an array of %d parts, expected shape, type and data", at, n)
	}
	rank, err := take(&p.source, msgp.ReadArrayHeaderBytes, aList)
	if err != nil {
		return t, data, err
	} else if rank > maxRank {
		return t, data, limitf("byte %d: found %d dimensions, expected at most %d", at, rank, maxRank)
	}
	t.Shape = make(tensor.Shape, rank)
	for i := range t.Shape {
		if t.Shape[i], err = p.dimension(); err != nil {
			return t, data, err
		}
	}
	if t.DType, err = p.dtype(); err != nil {
		return t, data, err
	}
	n, err := take(&p.source, msgp.ReadBytesHeader, someBytes)
	if err != nil {
		return t, data, err
	}
	data = Range{p.at, int64(n)}
	if found := data.Offset + data.Bytes; found != end {
		return t, data, malformedf("byte %d: found data up to byte %d in an array up to byte %d", at, found, end)
	}
	p.skip(data.Bytes)
	return t, data, checkSize(t, data.Bytes)
}

// dimension reads a number of a shape.
func (p *parser) dimension() (int64, error) {
	at := p.at
	d, err := take(&p.source, msgp.ReadInt64Bytes, anInteger)
	if err == nil && d < 0 {
		err = malformedf("byte %d: found a dimension of %d, expected 0 or more", at, d)
	}
	return d, err
}

func (p *parser) dtype() (tensor.DType, error) {
	at := p.at
	name, err := take(&p.source, msgp.ReadStringBytes, aString)
	if err != nil {
		return 0, err
	}
	for _, d := range dtypes {
		if d.name == name {
			return d.dtype, nil
		}
	}
	return 0, unsupportedf("byte %d: found the type %s, expected one of a tensor, such as float32", at, tensor.Quote(name))
}

// checkSize compares the bytes of an array with its shape.
func checkSize(t tensor.Info, found int64) error {
	want, err := t.Size()
	switch {
	case err != nil:
		return malformedf("%v", err)
	case found != want:
		return malformedf("found %d bytes for the shape %v of %v, expected %d", found, t.Shape, t.DType, want)
	}
	return nil
}

// complex reads a number of Python's.
func (p *parser) complex(end int64) error {
	at := p.at
	var parts [2]float64
	n, err := take(&p.source, msgp.ReadArrayHeaderBytes, aList)
	for i := 0; err == nil && n == 2 && i < 2; i++ {
		parts[i], err = take(&p.source, msgp.ReadFloat64Bytes, aNumber)
	}
	switch {
	case err != nil:
		return err
	case p.at != end || n != 2:
		return malformedf("byte %d: found %d numbers up to byte %d, expected two, of a complex number, up to byte %d", at, n,
			p.at, end)
	}
	return p.add(strconv.FormatComplex(complex(parts[0], parts[1]), 'g', -1, 128))
}

// chunked reads the rest of the map of an array that is in pieces: its shape, and flat arrays one after the other.
func (p *parser) chunked(entries uint32) error {
	at := p.at
	if _, err := take(&p.source, msgp.ReadBoolBytes, aBool); err != nil {
		return err
	}
	var t Tensor
	var shape tensor.Shape
	for i := uint32(1); i < entries; i++ {
		key, err := p.key()
		switch {
		case err != nil:
		case key == shapeKey && shape == nil:
			shape, err = p.chunkedShape()
		case key == chunksKey && t.Ranges == nil:
			err = p.chunks(&t)
		default:
			err = malformedf("byte %d: found the key %s in a chunked array, expected shape and chunks", at, tensor.Quote(key))
		}
		if err != nil {
			return err
		}
	}
	if shape == nil || t.Ranges == nil {
		return malformedf("byte %d: found a chunked array without shape and chunks, expected both", at)
	}
	t.Shape = shape
	bytes := int64(0) // no overflow: all of them are in the file
	for _, r := range t.Ranges {
		bytes += r.Bytes
	}
	if err := checkSize(t.Info, bytes); err != nil {
		return err
	}
	var err error
	t.Name, err = p.name()
	p.Tensors = append(p.Tensors, t)
	return err
}

// chunkedShape reads a map of the dimensions, by their numbers.
func (p *parser) chunkedShape() (tensor.Shape, error) {
	at := p.at
	n, err := p.entries()
	switch {
	case err != nil:
		return nil, err
	case n > maxRank:
		return nil, limitf("byte %d: found %d dimensions, expected at most %d", at, n, maxRank)
	}
	shape := make(tensor.Shape, n)
	for i := range shape {
		if err := p.number(i); err != nil {
			return nil, err
		}
		if shape[i], err = p.dimension(); err != nil {
			return nil, err
		}
	}
	return shape, nil
}

// chunks reads a map of flat arrays, by their numbers.
func (p *parser) chunks(t *Tensor) error {
	at := p.at
	n, err := p.entries()
	switch {
	case err != nil:
		return err
	case n == 0:
		return malformedf("byte %d: found no chunks, expected one or more", at)
	}
	for i := range int(n) {
		if err := p.number(i); err != nil {
			return err
		}
		if err := p.count(); err != nil {
			return err
		}
		at := p.at
		x, end, err := p.extended()
		if err != nil {
			return err
		}
		chunk, data, err := p.array(end)
		switch {
		case err != nil:
			return err
		case x.code != extensionArray || len(chunk.Shape) != 1:
			return malformedf("byte %d: found a chunk of the shape %v and the extension %d, expected a flat array", at,
				chunk.Shape, x.code)
		case i > 0 && chunk.DType != t.DType:
			return malformedf("byte %d: found a chunk of %v, expected %v as the others", at, chunk.DType, t.DType)
		}
		t.DType = chunk.DType
		t.Ranges = append(t.Ranges, data)
	}
	return nil
}

// number reads a key that is a number. flax counts from zero.
func (p *parser) number(want int) error {
	at := p.at
	key, err := p.key()
	if err == nil && key != strconv.Itoa(want) {
		err = malformedf("byte %d: found the key %s, expected %q", at, tensor.Quote(key), strconv.Itoa(want))
	}
	return err
}

// name makes the name of where the parser is, within the limit.
func (p *parser) name() (string, error) {
	name := Join(p.path)
	p.text += len(name)
	if len(name) > maxItem {
		return "", limitf("found a name of %d bytes, expected at most %d", len(name), maxItem)
	}
	if p.text > maxText {
		return "", limitf("found names of more than %d bytes", maxText)
	}
	return name, nil
}

// add takes a leaf that is no array into the metadata.
func (p *parser) add(value any) error {
	name, err := p.name()
	if s, ok := value.(string); ok {
		p.text += len(s)
	}
	p.Metadata = append(p.Metadata, formats.Pair{Name: name, Value: value})
	return err
}

// count counts a value.
func (p *parser) count() error {
	if p.values++; p.values > maxValues {
		return limitf("byte %d: found more than %d arrays and other values", p.at, maxValues)
	}
	return nil
}
