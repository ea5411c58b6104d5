package gguf

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

const (
	magic   = "GGUF"
	version = 3 // that is written

	alignmentKey     = "general.alignment"
	architectureKey  = "general.architecture"
	defaultAlignment = 32
	maxAlignment     = 64 << 10

	// leastKey and leastTensor are bytes that one takes at least.
	leastKey    = 13
	leastTensor = 24

	maxNameBytes = 63
	maxRank      = 4
)

// entry is one tensor of a header. Its data begins so many bytes from the start of all data.
type entry struct {
	tensor.Info
	offset uint64
	bytes  int64
}

// header is the front of a file.
type header struct {
	metadata  formats.Metadata
	tensors   []entry
	big       bool // written by a big-endian machine
	alignment int64
	start     int64 // where the data begins
}

// readHeader reads and checks the front of a file of that size.
func readHeader(f io.ReaderAt, size int64, limits Limits) (*header, error) {
	s := newSource(f, size, limits.HeaderBytes)
	h := &header{alignment: defaultAlignment}
	tensors, keys, err := h.counts(s)
	if err != nil {
		return nil, err
	}
	if tensors > int64(limits.Tensors) {
		return nil, limitf("found %d tensors, expected at most %d", tensors, limits.Tensors)
	}
	if keys > int64(limits.Keys) {
		return nil, limitf("found %d keys, expected at most %d", keys, limits.Keys)
	}
	if err := h.readKeys(s, keys); err != nil {
		return nil, err
	}
	for i := range tensors {
		t, err := readTensor(s)
		if err != nil {
			if t.Name != "" {
				return nil, tensorError(t.Name, err)
			}
			return nil, fmt.Errorf("tensor %d of %d: %w", i+1, tensors, err)
		}
		h.tensors = append(h.tensors, t)
	}
	h.start = padded(s.offset(), h.alignment)
	return h, nil
}

// counts reads what is in front of the keys.
func (h *header) counts(s *source) (tensors, keys int64, err error) {
	b, err := s.next(len(magic))
	if err != nil {
		return 0, 0, err
	}
	if string(b) != magic {
		return 0, 0, malformedf("found %q at its beginning, expected %q", b, magic)
	}
	v, err := s.next(4)
	if err != nil {
		return 0, 0, err
	}
	number := binary.LittleEndian.Uint32(v)
	if number != 0 && number&0xFFFF == 0 {
		h.big = true
		s.swap()
		number = binary.BigEndian.Uint32(v)
	}
	if number != 2 && number != 3 {
		return 0, 0, unsupportedf("found version %d, expected 2 or 3", number)
	}
	for _, c := range []struct {
		to    *int64
		what  string
		least int64
	}{{&tensors, "tensors", leastTensor}, {&keys, "keys", leastKey}} {
		n, err := s.uint64()
		if err != nil {
			return 0, 0, err
		}
		if most := s.left() / c.least; n > uint64(most) {
			return 0, 0, malformedf("found a count of %d %s, expected at most the %d that fit into the file", int64(n), c.what,
				most)
		}
		*c.to = int64(n)
	}
	return tensors, keys, nil
}

func (h *header) readKeys(s *source, n int64) error {
	seen := map[string]struct{}{}
	for i := range n {
		name, err := s.string()
		switch {
		case err != nil:
			return fmt.Errorf("the name of key %d of %d: %w", i+1, n, err)
		case name == "":
			return fmt.Errorf("key %d of %d: %w", i+1, n, malformedf("found an empty name, expected one"))
		}
		if _, ok := seen[name]; ok {
			return keyError(name, malformedf("found it twice, expected it once"))
		}
		seen[name] = struct{}{}
		value, err := readValue(s)
		if err != nil {
			return keyError(name, err)
		}
		if name == alignmentKey {
			if h.alignment, err = alignmentOf(value); err != nil {
				return keyError(name, err)
			}
		}
		h.metadata = append(h.metadata, formats.Pair{Name: name, Value: value})
	}
	return nil
}

// alignmentOf checks a general.alignment.
func alignmentOf(value any) (int64, error) {
	n, ok := value.(uint32)
	switch {
	case !ok:
		return 0, malformedf("found a %T, expected a uint32", value)
	case n == 0 || n&(n-1) != 0:
		return 0, malformedf("found %d, expected a power of two", n)
	case n > maxAlignment:
		return 0, limitf("found %d, expected at most %d", n, maxAlignment)
	}
	return int64(n), nil
}

func readValue(s *source) (any, error) {
	n, err := s.uint32()
	if err != nil {
		return nil, err
	}
	if n != typeArray {
		t, err := valueTypeFor(n)
		if err != nil {
			return nil, err
		}
		return t.one(s)
	}
	if n, err = s.uint32(); err != nil {
		return nil, err
	}
	if n == typeArray {
		return nil, unsupportedf("found an array of arrays, expected one of plain values")
	}
	t, err := valueTypeFor(n)
	if err != nil {
		return nil, err
	}
	count, err := s.uint64()
	if err != nil {
		return nil, err
	}
	if most := s.left() / t.least; count > uint64(most) {
		return nil, malformedf("found an array of %d values, expected at most the %d that fit into the file", count, most)
	}
	if count > maxArray {
		return nil, malformedf("found an array of %d values, expected at most %d", count, maxArray)
	}
	return t.many(s, int64(count))
}

func valueTypeFor(n uint32) (*valueType, error) {
	if n < uint32(len(valueTypes)) && valueTypes[n].of != nil {
		return &valueTypes[n], nil
	}
	return nil, malformedf("found the type %d, expected 0 to %d", n, len(valueTypes)-1)
}

// readTensor reads what a header says of a tensor. Where that is wrong, the entry that it returns has the name.
func readTensor(s *source) (t entry, err error) {
	n, err := s.length()
	switch {
	case err != nil:
		return t, err
	case n > maxNameBytes:
		return t, malformedf("found a name of %d bytes, expected at most %d", n, maxNameBytes)
	case n == 0:
		return t, malformedf("found an empty name, expected one")
	}
	b, err := s.next(int(n))
	if err != nil {
		return t, err
	}
	t.Name = string(b)
	if strings.IndexByte(t.Name, 0) >= 0 {
		return t, malformedf("found a name with a NUL byte, expected text")
	}
	rank, err := s.uint32()
	if err != nil {
		return t, err
	}
	if rank > maxRank {
		return t, malformedf("found %d dimensions, expected at most %d", rank, maxRank)
	}
	t.Shape = make(tensor.Shape, rank)
	for i := range t.Shape {
		d, err := s.uint64()
		if err != nil {
			return t, err
		}
		t.Shape[i] = int64(d)
	}
	for _, d := range t.Shape {
		if d <= 0 {
			return t, malformedf("found the dimensions %v, expected positive ones", t.Shape)
		}
	}
	slices.Reverse(t.Shape)
	number, err := s.uint32()
	if err != nil {
		return t, err
	}
	if number >= uint32(len(kinds)) || !kinds[number].known() {
		return t, malformedf("found the type %d, expected one that ggml has", int32(number))
	}
	t.DType, t.Encoding = kinds[number].dtype, kinds[number].encoding
	if err := checkRows(t.Info); err != nil {
		return t, err
	}
	if t.bytes, err = t.Size(); err != nil {
		return t, malformedf("%v", err)
	}
	t.offset, err = s.uint64()
	return t, err
}

// checkRows refuses rows that are no whole number of blocks.
func checkRows(t tensor.Info) error {
	row, block := int64(1), max(t.Encoding.Elements, 1)
	if n := len(t.Shape); n > 0 {
		row = t.Shape[n-1]
	}
	if row%block != 0 {
		return malformedf("found rows of %d elements, expected a multiple of the %d in a block of %s", row, block,
			t.Encoding.Name)
	}
	return nil
}

// check holds the offsets and sizes against each other and against the size of the file.
func (h *header) check(size int64) error {
	at := int64(0)
	for _, t := range h.tensors {
		switch {
		case t.offset < uint64(at):
			return tensorError(t.Name, malformedf("found its data at %d, expected it at %d: it overlaps what is before it",
				t.offset, at))
		case t.offset > uint64(at):
			return tensorError(t.Name, malformedf("found its data at %d, expected it at %d: there is a gap before it",
				t.offset, at))
		case t.bytes > math.MaxInt64-maxAlignment-at:
			return tensorError(t.Name, malformedf("found %d bytes at %d, expected fewer than 2^63 in all", t.bytes, at))
		case t.bytes > size-h.start-at:
			return tensorError(t.Name, malformedf("found %d bytes of data up to the end of the file, expected %d",
				max(size-h.start-at, 0), t.bytes))
		case h.big && (t.DType == 0 || t.DType == tensor.BF16):
			return tensorError(t.Name, unsupportedf("found %s in a file of a big-endian machine, expected F32, F16, F64 or "+
				"integers there", t.Type()))
		}
		at = padded(at+t.bytes, h.alignment)
	}
	return nil
}

// padded is the next multiple of alignment, a power of two.
func padded(n, alignment int64) int64 { return (n + alignment - 1) &^ (alignment - 1) }
