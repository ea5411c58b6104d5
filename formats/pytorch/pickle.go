package pytorch

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/big"
	"slices"

	"github.com/lorakit/lorakit/tensor"
)

// The opcodes of pickle that a state dict needs, by CPython's Lib/pickletools.py.
const (
	opMark            = '('
	opStop            = '.'
	opBinFloat        = 'G'
	opBinInt          = 'J'
	opBinInt1         = 'K'
	opBinInt2         = 'M'
	opNone            = 'N'
	opBinPersID       = 'Q'
	opReduce          = 'R'
	opBinString       = 'T'
	opShortBinString  = 'U'
	opBinUnicode      = 'X'
	opBinBytes        = 'B'
	opShortBinBytes   = 'C'
	opEmptyList       = ']'
	opAppend          = 'a'
	opBuild           = 'b'
	opGlobal          = 'c'
	opEmptyDict       = '}'
	opAppends         = 'e'
	opBinGet          = 'h'
	opLongBinGet      = 'j'
	opBinPut          = 'q'
	opLongBinPut      = 'r'
	opSetItem         = 's'
	opTuple           = 't'
	opEmptyTuple      = ')'
	opSetItems        = 'u'
	opProto           = 0x80
	opNewObj          = 0x81
	opTuple1          = 0x85
	opTuple2          = 0x86
	opTuple3          = 0x87
	opNewTrue         = 0x88
	opNewFalse        = 0x89
	opLong1           = 0x8a
	opLong4           = 0x8b
	opShortBinUnicode = 0x8c
	opBinUnicode8     = 0x8d
	opBinBytes8       = 0x8e
	opEmptySet        = 0x8f
	opAddItems        = 0x90
	opFrozenSet       = 0x91
	opStackGlobal     = 0x93
	opMemoize         = 0x94
	opFrame           = 0x95
	opByteArray8      = 0x96
)

// refused are opcodes that find or call something in another way than GLOBAL and REDUCE; no state dict has them.
var refused = map[byte]string{
	'P': "PERSID", 'i': "INST", 'o': "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x92: "NEWOBJ_EX",
	0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}

// What a pickle builds is made of nil, bool, int64, *big.Int, float64, string and these. All but the first ones are
// pointers, so that what is memoised is one thing.
type (
	// byteString is bytes or a bytearray.
	byteString string
	// tuple does not change once it is made.
	tuple struct{ items []any }
	// array is a list, or a set.
	array struct {
		items []any
		set   bool
	}
	// dict keeps its items in the order in which they were set. A key that is set twice is there twice.
	dict struct {
		keys, values []any
		state        any // attributes of an OrderedDict
	}
	// opaque is a value of which nothing but the kind is of interest.
	opaque struct{ kind string }
)

// What values take in memory, about: what is pushed, and the struct behind it.
const (
	valueBytes  = 32
	structBytes = 64
	numberBytes = 16
	mostLong    = 1 << 10 // bytes of an int
	mostName    = 1 << 10 // bytes of a global's module or name
)

// machine runs one pickle. It calls nothing: what a state dict is made of is built by package code (globals.go), all
// else is an error.
//
// Each opcode takes a byte at least and is charged what it allocates, so the time is bounded by Limits.PickleBytes and
// the memory by Limits.Memory. Nothing is followed here from value to value: a list may hold itself.
type machine struct {
	in     *source
	limits Limits
	left   int64 // of Limits.Memory
	stack  []any
	marks  []int // where the stack stood at each open mark
	memo   map[uint32]any
	// storages has each storage that the pickle mentions, by its key.
	storages map[string]*storageRef
}

func newMachine(in *source, limits Limits) *machine {
	return &machine{in: in, limits: limits, left: limits.Memory, memo: map[uint32]any{},
		storages: map[string]*storageRef{}}
}

// source reads a file from the start of a pickle on, and no further than it may.
type source struct {
	r    *bufio.Reader
	at   int64 // in the file
	left int64
}

// newSource reads size bytes of f from offset on.
func newSource(f io.ReaderAt, offset, size int64) *source {
	return &source{r: bufio.NewReaderSize(io.NewSectionReader(f, offset, size), 64<<10), at: offset, left: size}
}

// take makes sure that n more bytes are there.
func (s *source) take(n uint64) error {
	if n > uint64(s.left) {
		return malformedf("found the end of the pickle, expected %d bytes more", n-uint64(s.left))
	}
	s.left -= int64(n)
	s.at += int64(n)
	return nil
}

func (s *source) byte() (byte, error) {
	if err := s.take(1); err != nil {
		return 0, err
	}
	b, err := s.r.ReadByte()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

// bytes reads n bytes, of which the caller has made sure that they are few.
func (s *source) bytes(n uint64) ([]byte, error) {
	if err := s.take(n); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(s.r, b); err != nil {
		return nil, io.ErrUnexpectedEOF
	}
	return b, nil
}

// number reads an unsigned little-endian number of 1, 2, 4 or 8 bytes.
func (s *source) number(bytes int) (uint64, error) {
	var b [8]byte
	for i := range bytes {
		var err error
		if b[i], err = s.byte(); err != nil {
			return 0, err
		}
	}
	return binary.LittleEndian.Uint64(b[:]), nil
}

// line reads up to a line feed, which it drops.
func (s *source) line() (string, error) {
	var b []byte
	for {
		c, err := s.byte()
		switch {
		case err != nil:
			return "", err
		case c == '\n':
			return string(b), nil
		case len(b) == mostName:
			return "", limitf("found the name of a global longer than %d bytes", mostName)
		}
		b = append(b, c)
	}
}

// load runs the pickle to its end and returns what it has built.
func (m *machine) load() (any, error) {
	at := m.in.at
	v, err := m.run(&at)
	if err != nil {
		return nil, fmt.Errorf("pickle: byte %d: %w", at, err)
	}
	return v, nil
}

// run keeps in at where in the file the current opcode is.
func (m *machine) run(at *int64) (any, error) {
	for first := true; ; first = false {
		*at = m.in.at
		op, err := m.in.byte()
		if err != nil {
			return nil, err
		}
		if first != (op == opProto) {
			return nil, unsupportedf("found the opcode %#02x, expected a pickle of protocol 2 or newer with its number in front",
				op)
		}
		if op == opStop {
			v, err := m.pop()
			if err == nil && len(m.stack)+len(m.marks) != 0 {
				err = malformedf("found %d values left at the end, expected none", len(m.stack))
			}
			return v, err
		}
		if err := m.step(op); err != nil {
			return nil, err
		}
	}
}

func (m *machine) step(op byte) error {
	switch op {
	case opProto:
		version, err := m.in.byte()
		if err == nil && (version < 2 || version > 5) {
			err = unsupportedf("found protocol %d, expected 2 to 5", version)
		}
		return err
	case opFrame: // only says how much to read at once
		_, err := m.in.number(8)
		return err

	case opNone:
		return m.push(nil, 0)
	case opNewTrue:
		return m.push(true, 0)
	case opNewFalse:
		return m.push(false, 0)
	case opBinInt1:
		return m.pushUint(1)
	case opBinInt2:
		return m.pushUint(2)
	case opBinInt:
		n, err := m.in.number(4)
		if err != nil {
			return err
		}
		return m.push(int64(int32(n)), numberBytes)
	case opLong1:
		return m.pushLong(1)
	case opLong4:
		return m.pushLong(4)
	case opBinFloat:
		b, err := m.in.bytes(8)
		if err != nil {
			return err
		}
		return m.push(math.Float64frombits(binary.BigEndian.Uint64(b)), numberBytes)
	case opShortBinString, opShortBinUnicode:
		return m.pushText(1, false)
	case opBinString, opBinUnicode:
		return m.pushText(4, false)
	case opBinUnicode8:
		return m.pushText(8, false)
	case opShortBinBytes:
		return m.pushText(1, true)
	case opBinBytes:
		return m.pushText(4, true)
	case opBinBytes8, opByteArray8:
		return m.pushText(8, true)

	case opMark:
		if len(m.marks) == m.limits.Nesting {
			return limitf("found values nested deeper than %d", m.limits.Nesting)
		}
		m.marks = append(m.marks, len(m.stack))
		return nil
	case opEmptyTuple:
		return m.push(&tuple{}, structBytes)
	case opTuple:
		items, err := m.popMark()
		if err != nil {
			return err
		}
		return m.pushTuple(items)
	case opTuple1, opTuple2, opTuple3:
		n := int(op-opTuple1) + 1
		if err := m.need(n); err != nil {
			return err
		}
		items := m.stack[len(m.stack)-n:]
		m.stack = m.stack[:len(m.stack)-n]
		return m.pushTuple(items)
	case opEmptyList:
		return m.push(&array{}, structBytes)
	case opEmptySet:
		return m.push(&array{set: true}, structBytes)
	case opFrozenSet:
		items, err := m.popMark()
		if err != nil {
			return err
		}
		if err := m.charge(valueBytes * len(items)); err != nil {
			return err
		}
		return m.push(&array{items: slices.Clone(items), set: true}, structBytes)
	case opEmptyDict:
		return m.push(&dict{}, structBytes)
	case opAppend:
		v, err := m.pop()
		if err != nil {
			return err
		}
		return m.extend([]any{v}, false)
	case opAppends, opAddItems:
		items, err := m.popMark()
		if err != nil {
			return err
		}
		return m.extend(items, op == opAddItems)
	case opSetItem:
		if err := m.need(2); err != nil {
			return err
		}
		items := m.stack[len(m.stack)-2:]
		m.stack = m.stack[:len(m.stack)-2]
		return m.setItems(items)
	case opSetItems:
		items, err := m.popMark()
		if err != nil {
			return err
		}
		return m.setItems(items)

	case opBinGet:
		return m.get(1)
	case opLongBinGet:
		return m.get(4)
	case opBinPut:
		n, err := m.in.number(1)
		if err != nil {
			return err
		}
		return m.put(uint32(n))
	case opLongBinPut:
		n, err := m.in.number(4)
		if err != nil {
			return err
		}
		return m.put(uint32(n))
	case opMemoize:
		return m.put(uint32(len(m.memo)))

	case opGlobal:
		module, err := m.in.line()
		if err != nil {
			return err
		}
		name, err := m.in.line()
		if err != nil {
			return err
		}
		return m.pushGlobal(module, name)
	case opStackGlobal:
		name, err := m.pop()
		if err != nil {
			return err
		}
		module, err := m.pop()
		if err != nil {
			return err
		}
		a, okA := module.(string)
		b, okB := name.(string)
		if !okA || !okB {
			return malformedf("found %s and %s as a global, expected two strings", kind(module), kind(name))
		}
		return m.pushGlobal(a, b)
	case opReduce, opNewObj:
		args, err := m.pop()
		if err != nil {
			return err
		}
		f, err := m.pop()
		if err != nil {
			return err
		}
		return m.call(f, args)
	case opBuild:
		state, err := m.pop()
		if err != nil {
			return err
		}
		return m.build(state)
	case opBinPersID:
		id, err := m.pop()
		if err != nil {
			return err
		}
		return m.pushStorage(id)
	}
	if name, ok := refused[op]; ok {
		return fmt.Errorf("opcode %s is %w, expected only tensors in dicts", name, ErrUnsafe)
	}
	return malformedf("found the opcode %#02x, expected one that a state dict has", op)
}

// charge takes bytes from what the pickle may use.
func (m *machine) charge(bytes int) error {
	if int64(bytes) > m.left {
		return limitf("found values that take more than %d bytes of memory", m.limits.Memory)
	}
	m.left -= int64(bytes)
	return nil
}

// push puts a value on the stack that has been made of so many bytes.
func (m *machine) push(v any, bytes int) error {
	if err := m.charge(valueBytes + bytes); err != nil {
		return err
	}
	m.stack = append(m.stack, v)
	return nil
}

// need makes sure that n values stand above the last mark.
func (m *machine) need(n int) error {
	floor := 0
	if len(m.marks) > 0 {
		floor = m.marks[len(m.marks)-1]
	}
	if len(m.stack)-floor < n {
		return malformedf("found %d values on the stack, expected %d", len(m.stack)-floor, n)
	}
	return nil
}

func (m *machine) pop() (any, error) {
	if err := m.need(1); err != nil {
		return nil, err
	}
	v := m.stack[len(m.stack)-1]
	m.stack = m.stack[:len(m.stack)-1]
	return v, nil
}

// top is the value that APPEND, SETITEM and BUILD change.
func (m *machine) top() (any, error) {
	if err := m.need(1); err != nil {
		return nil, err
	}
	return m.stack[len(m.stack)-1], nil
}

// popMark returns what stands above the last mark. It is valid until the next push.
func (m *machine) popMark() ([]any, error) {
	if len(m.marks) == 0 {
		return nil, malformedf("found no mark, expected one")
	}
	at := m.marks[len(m.marks)-1]
	m.marks = m.marks[:len(m.marks)-1]
	items := m.stack[at:]
	m.stack = m.stack[:at]
	return items, nil
}

func (m *machine) pushUint(bytes int) error {
	n, err := m.in.number(bytes)
	if err != nil {
		return err
	}
	return m.push(int64(n), numberBytes)
}

// pushLong reads a signed number of any length, two's complement, little-endian.
func (m *machine) pushLong(bytes int) error {
	n, err := m.in.number(bytes)
	if err != nil {
		return err
	}
	if n > mostLong {
		return limitf("found a number of %d bytes, expected at most %d", n, mostLong)
	}
	b, err := m.in.bytes(n)
	if err != nil {
		return err
	}
	negative := n > 0 && b[n-1]&0x80 != 0
	if n <= 8 {
		var word [8]byte
		if negative {
			word = [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		}
		copy(word[:], b)
		return m.push(int64(binary.LittleEndian.Uint64(word[:])), numberBytes)
	}
	slices.Reverse(b)
	x := new(big.Int).SetBytes(b)
	if negative {
		x.Sub(x, new(big.Int).Lsh(big.NewInt(1), uint(8*n)))
	}
	return m.push(x, structBytes+2*int(n))
}

// pushText reads a string or bytes after their length.
func (m *machine) pushText(lengthBytes int, raw bool) error {
	n, err := m.in.number(lengthBytes)
	if err != nil {
		return err
	}
	if n > uint64(m.limits.StringBytes) {
		return limitf("found a string of %d bytes, expected at most %d", n, m.limits.StringBytes)
	}
	if err := m.charge(2 * int(n)); err != nil { // the bytes, then the string
		return err
	}
	b, err := m.in.bytes(n)
	if err != nil {
		return err
	}
	if raw {
		return m.push(byteString(b), numberBytes)
	}
	return m.push(string(b), numberBytes)
}

func (m *machine) pushTuple(items []any) error {
	if err := m.charge(valueBytes * len(items)); err != nil {
		return err
	}
	return m.push(&tuple{slices.Clone(items)}, structBytes)
}

// extend adds to the list or set on top.
func (m *machine) extend(items []any, set bool) error {
	v, err := m.top()
	if err != nil {
		return err
	}
	a, ok := v.(*array)
	if !ok || a.set != set {
		return malformedf("found items for %s, expected a list or a set", kind(v))
	}
	if err := m.charge(valueBytes * len(items)); err != nil {
		return err
	}
	a.items = append(a.items, items...)
	return nil
}

// setItems adds keys and values, one after the other, to the dict on top.
func (m *machine) setItems(items []any) error {
	v, err := m.top()
	if err != nil {
		return err
	}
	d, ok := v.(*dict)
	if !ok {
		return malformedf("found items for %s, expected a dict", kind(v))
	}
	if len(items)%2 != 0 {
		return malformedf("found a key without a value, expected one")
	}
	if err := m.charge(valueBytes * len(items)); err != nil {
		return err
	}
	for i := 0; i < len(items); i += 2 {
		d.keys = append(d.keys, items[i])
		d.values = append(d.values, items[i+1])
	}
	return nil
}

func (m *machine) get(bytes int) error {
	n, err := m.in.number(bytes)
	if err != nil {
		return err
	}
	v, ok := m.memo[uint32(n)]
	if !ok {
		return malformedf("found nothing memoised as %d, expected a value", n)
	}
	return m.push(v, 0)
}

func (m *machine) put(n uint32) error {
	v, err := m.top()
	if err != nil {
		return err
	}
	if err := m.charge(structBytes); err != nil {
		return err
	}
	m.memo[n] = v
	return nil
}

// kind names the type of a value as Python does.
func kind(v any) string {
	switch v := v.(type) {
	case nil:
		return "None"
	case bool:
		return "a bool"
	case int64, *big.Int:
		return "an int"
	case float64:
		return "a float"
	case string:
		return "a str"
	case byteString:
		return "bytes"
	case *tuple:
		return "a tuple"
	case *array:
		if v.set {
			return "a set"
		}
		return "a list"
	case *dict:
		return "a dict"
	case *opaque:
		return v.kind
	case *global:
		return "the global " + tensor.Quote(v.name)
	case *storageRef:
		return "a storage"
	case *tensorRef:
		return "a tensor"
	}
	return "a value"
}
