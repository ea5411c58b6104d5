package gguf

import (
	"encoding/binary"
	"io"

	"github.com/lorakit/lorakit/formats"
)

const (
	// lengthBytes is the size of the length in front of a string.
	lengthBytes = 8
	// windowBytes is how much of a file is read at once.
	windowBytes = 256 << 10
	// maxString and maxArray are llama.cpp's own limits.
	maxString = 1 << 30
	maxArray  = 1 << 30
)

// source reads the front of a file, from its beginning on. It holds no more of it than a window; what it returns grows
// as bytes arrive, whatever lengths were announced.
type source struct {
	in       io.ReaderAt
	size     int64 // of the file
	most     int64 // how far it is read
	order    binary.ByteOrder
	big      bool
	window   []byte
	pos, end int   // of what is left in the window
	at       int64 // where the window ends in the file
}

func newSource(in io.ReaderAt, size, most int64) *source {
	window := make([]byte, min(size, windowBytes))
	return &source{in: in, size: size, most: most, order: binary.LittleEndian, window: window}
}

// swap has all numbers from here on read as those of a big-endian machine.
func (s *source) swap() { s.order, s.big = binary.BigEndian, true }

// offset is how many bytes have been read.
func (s *source) offset() int64 { return s.at - int64(s.end-s.pos) }

// left is how many bytes the file still has.
func (s *source) left() int64 { return s.size - s.offset() }

// fill has the window hold the next n bytes.
func (s *source) fill(n int) error {
	switch {
	case int64(n) > s.left():
		return malformedf("found %d bytes up to the end of the file, expected at least %d", s.left(), n)
	case s.offset()+int64(n) > s.most:
		return limitf("found more than %d bytes of keys and tensors' names, expected fewer", s.most)
	}
	copy(s.window, s.window[s.pos:s.end])
	s.pos, s.end = 0, s.end-s.pos
	more := s.window[s.end:min(int64(len(s.window)), int64(s.end)+min(s.size, s.most)-s.at)]
	if err := formats.ReadFull(s.in, more, s.at); err != nil {
		return err
	}
	s.end += len(more)
	s.at += int64(len(more))
	return nil
}

// next returns the next n bytes, which are no more than a window. They are valid until more is read.
func (s *source) next(n int) ([]byte, error) {
	if s.end-s.pos < n {
		if err := s.fill(n); err != nil {
			return nil, err
		}
	}
	b := s.window[s.pos : s.pos+n]
	s.pos += n
	return b, nil
}

func (s *source) uint32() (uint32, error) {
	b, err := s.next(4)
	if err != nil {
		return 0, err
	}
	return s.order.Uint32(b), nil
}

func (s *source) uint64() (uint64, error) {
	b, err := s.next(8)
	if err != nil {
		return 0, err
	}
	return s.order.Uint64(b), nil
}

// length reads the length of a string.
func (s *source) length() (int64, error) {
	n, err := s.uint64()
	switch {
	case err != nil:
		return 0, err
	case n > uint64(s.left()):
		return 0, malformedf("found a string of %d bytes, expected at most the %d up to the end of the file", n, s.left())
	case n > maxString:
		return 0, malformedf("found a string of %d bytes, expected at most %d", n, maxString)
	}
	return int64(n), nil
}

// bytes appends the next n bytes of the file.
func (s *source) bytes(to []byte, n int64) ([]byte, error) {
	for n > 0 {
		if s.pos == s.end {
			if err := s.fill(1); err != nil {
				return nil, err
			}
		}
		k := min(n, int64(s.end-s.pos))
		to = append(to, s.window[s.pos:s.pos+int(k)]...)
		s.pos += int(k)
		n -= k
	}
	return to, nil
}

func (s *source) string() (string, error) {
	n, err := s.length()
	if err != nil {
		return "", err
	}
	if n <= int64(len(s.window)) {
		b, err := s.next(int(n))
		return string(b), err
	}
	b, err := s.bytes(nil, n)
	return string(b), err
}

// strings reads n strings. Those that lie in one window stand in one piece of memory: a vocabulary has hundreds of
// thousands.
func (s *source) strings(n int64) ([]string, error) {
	list := []string{}
	for int64(len(list)) < n {
		end, whole := s.pos, 0 // of the strings that the window has whole
		for ; int64(len(list)+whole) < n; whole++ {
			k, ok := s.stringAt(end)
			if !ok {
				break
			}
			end += lengthBytes + k
		}
		if whole == 0 { // then one with what comes behind the window
			x, err := s.string()
			if err != nil {
				return nil, err
			}
			list = append(grown(list, 1, n), x)
			continue
		}
		list = grown(list, whole, n)
		text, at := string(s.window[s.pos:end]), 0
		for range whole {
			k, _ := s.stringAt(s.pos + at)
			at += lengthBytes
			list = append(list, text[at:at+k])
			at += k
		}
		s.pos = end
	}
	return list, nil
}

// stringAt is the length of the string that begins at a place of the window, if the window has all of it.
func (s *source) stringAt(at int) (int, bool) {
	b := s.window[at:s.end]
	if len(b) < lengthBytes {
		return 0, false
	}
	n := binary.LittleEndian.Uint64(b)
	if s.big {
		n = binary.BigEndian.Uint64(b)
	}
	return int(n), n <= uint64(len(b)-lengthBytes)
}

// grown makes room for more values of a list that is to have n: twice as much as there is, so that memory follows what
// has been read.
func grown[T any](list []T, more int, n int64) []T {
	if len(list)+more <= cap(list) {
		return list
	}
	room := min(int64(2*(len(list)+more)), n)
	return append(make([]T, 0, room), list...)
}

// numbers reads n numbers of so many bytes.
func numbers[T any](s *source, n, bytes int64) ([]T, error) {
	list := []T{}
	for left := n; left > 0; {
		k := int(min(left, windowBytes/2/bytes))
		b, err := s.next(k * int(bytes))
		if err != nil {
			return nil, err
		}
		list = grown(list, k, n)[:len(list)+k]
		if _, err := binary.Decode(b, s.order, list[len(list)-k:]); err != nil {
			return nil, err
		}
		left -= int64(k)
	}
	return list, nil
}

func (s *source) bools(n int64) ([]bool, error) {
	raw, err := numbers[uint8](s, n, 1)
	if err != nil {
		return nil, err
	}
	list := make([]bool, len(raw))
	for i, b := range raw {
		if b > 1 {
			return nil, malformedf("found the boolean %d, expected 0 or 1", b)
		}
		list[i] = b == 1
	}
	return list, nil
}
