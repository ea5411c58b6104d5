package msgpack

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"unicode/utf8"

	"github.com/tinylib/msgp/msgp"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Layout is a file that is to be written.
type Layout struct {
	// Pieces are the bytes around the arrays' data, in order, without gaps.
	Pieces []formats.Piece
	// Order has the tensors, by their place among those that were laid out, in the order of their data, and Offsets where
	// in the file the data of each begins.
	Order   []int
	Offsets []int64
	Size    int64
}

// LayOut makes the file that flax.serialization.to_bytes makes of the tree of the tensors: maps have the order in which
// their keys come first. An array of more than 1 GiB is not chunked: flax reads it all the same.
//
// What the format has no place for is formats.ErrUnsupported: a tensor within another, an array of more than 4 GiB.
func LayOut(tensors []tensor.Info) (Layout, error) {
	root := node{keys: map[string]*node{}}
	for i, t := range tensors {
		if err := root.add(t, i); err != nil {
			return Layout{}, tensorError(t, err)
		}
	}
	w := writer{tensors: tensors}
	if err := w.node(&root); err != nil {
		return Layout{}, err
	}
	w.flush()
	return w.Layout, nil
}

// node is a map, or an array.
type node struct {
	order  []string
	keys   map[string]*node // nil for an array
	tensor int              // the place of an array
}

// add takes in a tensor, the maps around it too.
func (n *node) add(t tensor.Info, place int) error {
	if len(t.Name) > maxItem {
		return unsupportedf("found a name of %d bytes, expected at most %d", len(t.Name), maxItem)
	}
	path := Split(t.Name)
	if len(path) > maxDepth {
		return unsupportedf("found %d keys in the name, expected at most %d", len(path), maxDepth)
	}
	for i, key := range path {
		if err := checkKey(key); err != nil {
			return err
		}
		inner, ok := n.keys[key]
		if last := i == len(path)-1; !ok {
			inner = &node{tensor: place}
			if !last {
				inner.keys = map[string]*node{}
			}
			n.order = append(n.order, key)
			n.keys[key] = inner
		} else if last || inner.keys == nil {
			return unsupportedf("found %s too, expected no tensor and no folder of tensors of the same name",
				tensor.Quote(Join(path[:i+1])))
		}
		n = inner
	}
	return nil
}

func checkKey(key string) error {
	switch {
	case key == chunkedKey:
		return unsupportedf("found the key %s in the name, which flax takes for an array in pieces", key)
	case !utf8.ValidString(key):
		return unsupportedf("found a name that is not UTF-8, expected text")
	}
	return nil
}

// writer makes a layout.
type writer struct {
	tensors []tensor.Info
	Layout
	piece []byte // what is before the next data
}

// node writes a map, with all that is in it.
func (w *writer) node(n *node) error {
	w.piece = msgp.AppendMapHeader(w.piece, uint32(len(n.order)))
	for _, key := range n.order {
		w.piece = msgp.AppendString(w.piece, key)
		inner := n.keys[key]
		if inner.keys != nil {
			if err := w.node(inner); err != nil {
				return err
			}
			continue
		}
		if err := w.array(inner.tensor); err != nil {
			return tensorError(w.tensors[inner.tensor], err)
		}
	}
	return nil
}

// array writes what is before an array's data, and leaves room for the data.
func (w *writer) array(place int) error {
	t := w.tensors[place]
	size, err := t.Size()
	if err != nil {
		return err
	}
	head, err := header(t, size)
	if err != nil {
		return err
	}
	bytes := int64(len(head)) + size
	if bytes > math.MaxUint32 {
		return unsupportedf("found %d bytes of data, expected at most %d: msgpack has no place for a larger array, a type "+
			"of fewer bits or another format has", size, math.MaxUint32-int64(len(head)))
	}
	w.piece = appendExtension(w.piece, extensionArray, uint32(bytes))
	w.piece = append(w.piece, head...)
	w.flush()
	w.Order = append(w.Order, place)
	w.Offsets = append(w.Offsets, w.Size)
	w.Size += size
	return nil
}

// flush makes a piece of what has been written.
func (w *writer) flush() {
	if len(w.piece) == 0 {
		return
	}
	w.Pieces = append(w.Pieces, formats.Piece{Offset: w.Size, Bytes: w.piece})
	w.Size += int64(len(w.piece))
	w.piece = nil
}

// header is what the extension of an array has before the data.
func header(t tensor.Info, size int64) ([]byte, error) {
	if err := Holds(t); err != nil {
		return nil, err
	}
	name := ""
	for _, d := range dtypes {
		if d.dtype == t.DType {
			name = d.name
		}
	}
	b := msgp.AppendArrayHeader(nil, 3)
	b = msgp.AppendArrayHeader(b, uint32(len(t.Shape)))
	for _, d := range t.Shape {
		b = msgp.AppendUint64(b, uint64(d))
	}
	b = msgp.AppendString(b, name)
	return msgp.AppendBytesHeader(b, uint32(min(size, math.MaxUint32))), nil
}

// appendExtension writes the header of an extension as msgpack does in Python. What msgp does it for has all of its
// bytes, and it takes the longer form for 255 and for 65,535 of them.
func appendExtension(b []byte, code byte, bytes uint32) []byte {
	switch {
	case bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16:
		b = append(b, fixExt1+byte(bits.TrailingZeros32(bytes)))
	case bytes <= math.MaxUint8:
		b = append(b, ext8, byte(bytes))
	case bytes <= math.MaxUint16:
		b = binary.BigEndian.AppendUint16(append(b, ext16), uint16(bytes))
	default:
		b = binary.BigEndian.AppendUint32(append(b, ext32), bytes)
	}
	return append(b, code)
}

// Holds says why an array of this type and shape has no place in a file, or nothing.
func Holds(t tensor.Info) error {
	if t.Encoding != (tensor.Encoding{}) {
		return unsupportedf("found the encoding %s, expected a dtype", tensor.Quote(t.Encoding.Name))
	}
	if !slices.Contains(DTypes(), t.DType) {
		return unsupportedf("found %v, expected a type of whole bytes that numpy has", t.DType)
	}
	if len(t.Shape) > maxRank {
		return unsupportedf("found %d dimensions, expected at most the %d that numpy has", len(t.Shape), maxRank)
	}
	return nil
}

func tensorError(t tensor.Info, err error) error {
	return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
}
