package safetensors

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"slices"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// metadataName is the one name in a header that is not a tensor's.
const metadataName = "__metadata__"

// maxDepth is how deep the reference's JSON reader follows nested values.
const maxDepth = 127

// entry is one tensor of a header. Its offsets count from the end of the header.
type entry struct {
	name       string
	dtype      tensor.DType
	shape      tensor.Shape
	begin, end uint64
	place      int // in the header
}

// header is the content of one file's header, the tensors in the order of their data.
type header struct {
	tensors  []entry
	metadata formats.Metadata
}

// readHeader reads a header, which is all that r has. Memory grows with what has been read, whatever length was
// announced.
func readHeader(r io.Reader, limits Limits) (header, error) {
	p := newParser(r, limits)
	h, err := p.header()
	if err != nil {
		return header{}, err
	}
	// Empty tensors share offsets; their order in the header decides among them.
	slices.SortFunc(h.tensors, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.begin, b.begin), cmp.Compare(a.end, b.end), cmp.Compare(a.place, b.place))
	})
	return h, nil
}

// check holds offsets, shapes and the size of the data against each other.
func (h header) check(dataBytes uint64) error {
	at := uint64(0)
	for _, t := range h.tensors {
		switch {
		case t.end < t.begin:
			return t.errorf("found data_offsets [%d, %d], expected an end that is not before the begin", t.begin, t.end)
		case t.begin < at:
			return t.errorf("found data_offsets [%d, %d], expected a begin at %d: it overlaps the tensor before it", t.begin,
				t.end, at)
		case t.begin > at:
			return t.errorf("found data_offsets [%d, %d], expected a begin at %d: there is a hole before it", t.begin, t.end, at)
		}
		size, err := t.size()
		if err != nil {
			return err
		}
		if t.end-t.begin != size {
			return t.errorf("found %d bytes of data, expected %d for %v of shape %v", t.end-t.begin, size, t.dtype, t.shape)
		}
		if t.end > dataBytes {
			return t.errorf("found data_offsets [%d, %d], expected an end within the file's %d bytes of data", t.begin, t.end,
				dataBytes)
		}
		at = t.end
	}
	if at != dataBytes {
		return malformedf("found %d bytes of data, expected %d by the header", dataBytes, at)
	}
	return nil
}

// size returns the number of bytes that dtype and shape make. The product is taken from left to right in 64 bits, as
// the reference does.
func (t entry) size() (uint64, error) {
	n := uint64(1)
	for _, d := range t.shape {
		hi, lo := bits.Mul64(n, uint64(d))
		if hi != 0 {
			return 0, t.errorf("found shape %v, expected a product below 2^64", t.shape)
		}
		n = lo
	}
	hi, lo := bits.Mul64(n, uint64(t.dtype.Bits()))
	if hi != 0 {
		return 0, t.errorf("found shape %v of %v, expected fewer than 2^64 bits", t.shape, t.dtype)
	}
	if lo%8 != 0 {
		return 0, t.errorf("found shape %v of %v, %d bits, expected whole bytes", t.shape, t.dtype, lo)
	}
	return lo / 8, nil
}

func (t entry) errorf(format string, args ...any) error {
	return tensorError(t.name, malformedf(format, args...))
}

// parser walks through the JSON of a header, or of an index.
type parser struct {
	dec    *jsontext.Decoder
	limits Limits
	text   []byte  // the last string, unquoted
	dims   []int64 // the block that shapes are cut from
	total  int     // dimensions read
}

func newParser(r io.Reader, limits Limits) *parser {
	w := &window{r: bufio.NewReaderSize(r, 64<<10), most: int64(limits.StringBytes)}
	// Duplicate names are looked for here: the reference forgives them everywhere but in its own fields.
	w.dec = jsontext.NewDecoder(w, jsontext.AllowDuplicateNames(true))
	return &parser{dec: w.dec, limits: limits, dims: make([]int64, 0, 256)}
}

// window keeps a decoder from gathering a token without end: it stops where more than most bytes lie between the last
// token and what is read.
type window struct {
	r    io.Reader
	dec  *jsontext.Decoder
	read int64
	most int64
}

func (w *window) Read(p []byte) (int, error) {
	if w.read-w.dec.InputOffset() > w.most {
		return 0, limitf("found more than %d bytes of JSON as one string or as white space", w.most)
	}
	n, err := w.r.Read(p)
	w.read += int64(n)
	return n, err
}

func (p *parser) header() (h header, err error) {
	if err := p.expect('{', "a JSON object of tensors"); err != nil {
		return h, err
	}
	seenMetadata := false
	for p.dec.PeekKind() != '}' {
		name, err := p.string("a tensor name")
		if err != nil {
			return h, err
		}
		if string(name) == metadataName {
			if seenMetadata {
				return h, malformedf("found %s twice, expected it once", metadataName)
			}
			seenMetadata = true
			if h.metadata, err = p.metadata(); err != nil {
				return h, err
			}
			continue
		}
		if len(name) > p.limits.NameBytes {
			return h, limitf("found a tensor name of %d bytes, expected at most %d", len(name), p.limits.NameBytes)
		}
		if len(h.tensors) == p.limits.Tensors {
			return h, limitf("found more than %d tensors", p.limits.Tensors)
		}
		t := entry{name: string(name), place: len(h.tensors)}
		if err := p.tensor(&t); err != nil {
			return h, tensorError(t.name, err)
		}
		h.tensors = append(h.tensors, t)
	}
	if err := p.close(); err != nil {
		return h, err
	}
	return h, p.end()
}

func (p *parser) metadata() (formats.Metadata, error) {
	if p.dec.PeekKind() == 'n' {
		_, err := p.dec.ReadToken()
		return nil, syntax(err)
	}
	if err := p.expect('{', metadataName+" as an object of strings"); err != nil {
		return nil, err
	}
	m, seen := formats.Metadata{}, map[string]struct{}{}
	for p.dec.PeekKind() != '}' {
		b, err := p.string("a name in " + metadataName)
		if err != nil {
			return nil, err
		}
		name := string(b)
		if _, ok := seen[name]; ok {
			return nil, malformedf("found %s twice in %s, expected it once", quote(name), metadataName)
		}
		seen[name] = struct{}{}
		value, err := p.string("a string in " + metadataName)
		if err != nil {
			return nil, err
		}
		if len(m) == p.limits.Metadata {
			return nil, limitf("found more than %d strings in %s", p.limits.Metadata, metadataName)
		}
		m = append(m, formats.Pair{Name: name, Value: string(value)})
	}
	return m, p.close()
}

// The fields of a tensor, in the order in which they stand where an array takes the place of the object.
const (
	fieldDType = iota
	fieldShape
	fieldOffsets
	fieldCount
)

var fieldNames = [fieldCount]string{"dtype", "shape", "data_offsets"}

func (p *parser) tensor(t *entry) error {
	if p.dec.PeekKind() == '[' {
		if err := p.expect('[', ""); err != nil {
			return err
		}
		for i := range fieldCount {
			if p.dec.PeekKind() == ']' {
				return malformedf("found no %s, expected it", fieldNames[i])
			}
			if err := p.field(t, i); err != nil {
				return err
			}
		}
		if k := p.dec.PeekKind(); k > 0 && k != ']' {
			return malformedf("found more than %d values, expected dtype, shape and data_offsets", fieldCount)
		}
		return p.close()
	}
	if err := p.expect('{', "an object with dtype, shape and data_offsets"); err != nil {
		return err
	}
	var seen [fieldCount]bool
	for p.dec.PeekKind() != '}' {
		name, err := p.string("the name of a field")
		if err != nil {
			return err
		}
		i := slices.Index(fieldNames[:], string(name))
		if i < 0 {
			if err := p.skip(); err != nil {
				return err
			}
			continue
		}
		if seen[i] {
			return malformedf("found %s twice, expected it once", fieldNames[i])
		}
		seen[i] = true
		if err := p.field(t, i); err != nil {
			return err
		}
	}
	if i := slices.Index(seen[:], false); i >= 0 && p.dec.PeekKind() == '}' {
		return malformedf("found no %s, expected it", fieldNames[i])
	}
	return p.close()
}

func (p *parser) field(t *entry, i int) (err error) {
	switch i {
	case fieldDType:
		t.dtype, err = p.dtype()
	case fieldShape:
		t.shape, err = p.shape()
	case fieldOffsets:
		t.begin, t.end, err = p.offsets()
	}
	return err
}

var dtypes = func() map[string]tensor.DType {
	m := map[string]tensor.DType{}
	for d := tensor.DType(1); d.Valid(); d++ {
		m[d.String()] = d
	}
	return m
}()

// dtype reads "F32", or {"F32": null}, the other way in which the reference writes a variant.
func (p *parser) dtype() (tensor.DType, error) {
	variant := p.dec.PeekKind() == '{'
	if variant {
		if err := p.expect('{', ""); err != nil {
			return 0, err
		}
		if p.dec.PeekKind() == '}' {
			return 0, malformedf("found an empty object, expected a dtype")
		}
	}
	name, err := p.string("a dtype")
	if err != nil {
		return 0, err
	}
	d, ok := dtypes[string(name)]
	if !ok {
		return 0, malformedf("found dtype %s, expected one of the format's", quote(string(name)))
	}
	if !variant {
		return d, nil
	}
	if err := p.expect('n', "null after a dtype"); err != nil {
		return 0, err
	}
	if k := p.dec.PeekKind(); k > 0 && k != '}' {
		return 0, malformedf("found more than one dtype, expected one")
	}
	return d, p.close()
}

func (p *parser) shape() (tensor.Shape, error) {
	if err := p.expect('[', "shape as an array"); err != nil {
		return nil, err
	}
	// The shape is built at the end of the block. Where the block is full the shape moves to a new one; shapes already
	// handed out stay where they are.
	start := len(p.dims)
	for p.dec.PeekKind() != ']' {
		d, err := p.uint("a dimension")
		if err != nil {
			return nil, err
		}
		if d > math.MaxInt64 {
			return nil, limitf("found a dimension of %d, expected less than 2^63", d)
		}
		if len(p.dims)-start == p.limits.Rank {
			return nil, limitf("found more than %d dimensions", p.limits.Rank)
		}
		if p.total++; p.total > p.limits.Dimensions {
			return nil, limitf("found more than %d dimensions in all shapes", p.limits.Dimensions)
		}
		if len(p.dims) == cap(p.dims) {
			block := make([]int64, 0, max(1024, 2*(len(p.dims)-start)))
			p.dims, start = append(block, p.dims[start:]...), 0
		}
		p.dims = append(p.dims, int64(d))
	}
	return tensor.Shape(p.dims[start:len(p.dims):len(p.dims)]), p.close()
}

func (p *parser) offsets() (begin, end uint64, err error) {
	if err := p.expect('[', "data_offsets as an array of two numbers"); err != nil {
		return 0, 0, err
	}
	if begin, err = p.uint("the begin of the data"); err != nil {
		return 0, 0, err
	}
	if end, err = p.uint("the end of the data"); err != nil {
		return 0, 0, err
	}
	if k := p.dec.PeekKind(); k > 0 && k != ']' {
		return 0, 0, malformedf("found more than two data_offsets, expected two")
	}
	return begin, end, p.close()
}

// skip passes over the value of an unknown field. The reference turns it into numbers and strings all the same, so it
// must be able to.
func (p *parser) skip() error {
	outer := p.dec.StackDepth()
	for {
		if p.dec.PeekKind() == '0' {
			v, err := p.dec.ReadValue()
			if err != nil {
				return syntax(err)
			}
			if !inRange(v) {
				return malformedf("found the number %s, expected one that fits 64 bits", clip(string(v)))
			}
		} else if _, err := p.dec.ReadToken(); err != nil {
			return syntax(err)
		}
		switch depth := p.dec.StackDepth(); {
		case depth > maxDepth:
			return malformedf("found values nested deeper than %d", maxDepth)
		case depth == outer:
			return nil
		}
	}
}

// close reads the end of the object or array that the parser is in.
func (p *parser) close() error {
	_, err := p.dec.ReadToken()
	return syntax(err)
}

// end makes sure that nothing but white space is left.
func (p *parser) end() error {
	switch _, err := p.dec.ReadToken(); {
	case err == io.EOF:
		return nil
	case err != nil:
		return syntax(err)
	}
	return malformedf("found more JSON after the object, expected white space alone")
}

// expect reads one token of the kind.
func (p *parser) expect(k jsontext.Kind, what string) error {
	if err := p.want(k, what); err != nil {
		return err
	}
	_, err := p.dec.ReadToken()
	return syntax(err)
}

// want looks at the next token without reading it.
func (p *parser) want(k jsontext.Kind, what string) error {
	found := p.dec.PeekKind()
	if found == k {
		return nil
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return syntax(err)
	}
	return malformedf("found %s, expected %s", kindName(found), what)
}

// string reads a string. The result is valid until the next call.
func (p *parser) string(what string) ([]byte, error) {
	if err := p.want('"', what); err != nil {
		return nil, err
	}
	v, err := p.dec.ReadValue()
	if err != nil {
		return nil, syntax(err)
	}
	p.text, err = jsontext.AppendUnquote(p.text[:0], v)
	return p.text, syntax(err)
}

// uint reads an integer from 0 to 2^64-1, written without fraction, exponent or sign.
func (p *parser) uint(what string) (uint64, error) {
	if err := p.want('0', what); err != nil {
		return 0, err
	}
	v, err := p.dec.ReadValue()
	if err != nil {
		return 0, syntax(err)
	}
	n := uint64(0)
	for _, c := range v {
		hi, lo := bits.Mul64(n, 10)
		sum, carry := bits.Add64(lo, uint64(c-'0'), 0)
		if c < '0' || c > '9' || hi != 0 || carry != 0 {
			return 0, malformedf("found %s as %s, expected an integer from 0 to %d", clip(string(v)), what,
				uint64(math.MaxUint64))
		}
		n = sum
	}
	return n, nil
}

func kindName(k jsontext.Kind) string {
	switch k {
	case 'n':
		return "null"
	case 't', 'f':
		return "a boolean"
	case '"':
		return "a string"
	case '0':
		return "a number"
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '}', ']':
		return "the end of it"
	}
	return "no JSON"
}

// syntax makes one short line of a JSON error, whose own text repeats the names around it.
func syntax(err error) error {
	if err == nil {
		return nil
	}
	var s *jsontext.SyntacticError
	switch {
	case errors.As(err, &s) && errors.Is(err, io.ErrUnexpectedEOF), err == io.EOF:
		return malformedf("found the end of the JSON, expected more")
	case errors.As(err, &s):
		return malformedf("byte %d of the JSON: %v", s.ByteOffset, s.Err)
	}
	if cause := errors.Unwrap(err); cause != nil { // of a failed read
		return cause
	}
	return err
}

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrMalformed)...)
}

func limitf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrLimit)...)
}

func tensorError(name string, err error) error {
	return fmt.Errorf("tensor %s: %w", quote(name), err)
}

// quote writes a name so that it stays short and on its line.
func quote(name string) string { return tensor.Quote(name) }

func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
