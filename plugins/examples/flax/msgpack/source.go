package msgpack

import (
	"errors"
	"io"

	"github.com/tinylib/msgp/msgp"

	"github.com/lorakit/lorakit/formats"
)

// source is a file that is read from its start to its end through a window, which is no larger than the largest item
// between the arrays.
type source struct {
	file   io.ReaderAt
	size   int64
	at     int64  // where the window begins in the file
	window []byte // bytes that have been read
	buffer []byte // what the window is in
}

// take reads one item by a function of msgp, which says ErrShortBytes where the window has only a part of it.
func take[T any](s *source, read func([]byte) (T, []byte, error), what string) (T, error) {
	for {
		item, rest, err := read(s.window)
		switch {
		case err == nil:
			s.at += int64(len(s.window) - len(rest))
			s.window = rest
			return item, nil
		case !errors.Is(err, msgp.ErrShortBytes):
			if kind := kindOf(s.window); kind != what {
				return item, malformedf("byte %d: found %s, expected %s", s.at, kind, what)
			}
			return item, malformedf("byte %d: found %s past 63 bits", s.at, what)
		}
		if err := s.more(what); err != nil {
			return item, err
		}
	}
}

// more makes the window larger.
func (s *source) more(what string) error {
	const least, most = 1 << 10, maxItem + msgp.StringPrefixSize
	switch left := s.size - s.at; {
	case int64(len(s.window)) >= left:
		return malformedf("byte %d: found the end of the file, expected %s", s.size, what)
	case len(s.window) >= most:
		return limitf("byte %d: found %s of more than %d bytes", s.at, what, maxItem)
	default:
		want := int(min(int64(max(least, min(2*len(s.window), most))), left))
		if len(s.buffer) < want {
			grown := make([]byte, want)
			copy(grown, s.window)
			s.buffer = grown
		} else {
			copy(s.buffer, s.window)
		}
		have := len(s.window)
		s.window = s.buffer[:have]
		if err := formats.ReadFull(s.file, s.buffer[have:want], s.at+int64(have)); err != nil {
			return err
		}
		s.window = s.buffer[:want]
		return nil
	}
}

// skip passes over bytes, which the file has.
func (s *source) skip(n int64) {
	s.at += n
	s.window = s.window[min(n, int64(len(s.window))):]
}

// left is how many bytes are left.
func (s *source) left() int64 { return s.size - s.at }

// kind looks at what comes next, without reading it.
func (s *source) kind(what string) (msgp.Type, error) {
	if len(s.window) == 0 {
		if err := s.more(what); err != nil {
			return msgp.InvalidType, err
		}
	}
	return msgp.NextType(s.window[:1]), nil
}

// Words for what there is in a file.
const (
	aMap      = "a map"
	aList     = "a list"
	aString   = "a string"
	anInteger = "an integer"
	aNumber   = "a number"
	someBytes = "binary data"
	aBool     = "a boolean"
	anArray   = "an array"
)

// kindOf says what the bytes begin with.
func kindOf(b []byte) string {
	if len(b) == 0 {
		return "nothing"
	}
	switch msgp.NextType(b[:1]) {
	case msgp.MapType:
		return aMap
	case msgp.ArrayType:
		return aList
	case msgp.StrType:
		return aString
	case msgp.IntType, msgp.UintType:
		return anInteger
	case msgp.Float32Type, msgp.Float64Type:
		return aNumber
	case msgp.BinType:
		return someBytes
	case msgp.BoolType:
		return aBool
	case msgp.NilType:
		return "None"
	case msgp.ExtensionType:
		return anArray
	}
	return "no msgpack"
}

// extension is the header of one.
type extension struct {
	code  int8
	bytes int64
}

// readExtension reads the header of an extension. msgp has no function for it that does not want all of its bytes.
func readExtension(b []byte) (x extension, rest []byte, err error) {
	if len(b) == 0 {
		return x, b, msgp.ErrShortBytes
	}
	length := 0 // bytes that the length has
	switch lead := b[0]; {
	case lead >= fixExt1 && lead <= fixExt16:
		x.bytes = 1 << (lead - fixExt1)
	case lead >= ext8 && lead <= ext32:
		length = 1 << (lead - ext8)
	default:
		return x, b, msgp.TypeError{Method: msgp.ExtensionType, Encoded: msgp.NextType(b[:1])}
	}
	if len(b) < 1+length+1 {
		return x, b, msgp.ErrShortBytes
	}
	for _, c := range b[1 : 1+length] {
		x.bytes = x.bytes<<8 | int64(c)
	}
	x.code = int8(b[1+length])
	return x, b[1+length+1:], nil
}

// The first bytes of extensions: of 1, 2, 4, 8 and 16 bytes, and of a length of 1, 2 and 4 bytes.
const (
	fixExt1  = 0xd4
	fixExt16 = 0xd8
	ext8     = 0xc7
	ext16    = 0xc8
	ext32    = 0xc9
)
