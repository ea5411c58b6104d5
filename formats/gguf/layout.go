package gguf

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Layout places the tensors in files as gguf-py does: behind the keys, in the order given, each padded with zeros to
// the alignment. That is general.alignment where the metadata have it, else 32. The metadata are written in their
// order with their types.
//
// One file is named model.gguf; of several the first is model-00001-of-00003.gguf. It has the metadata; the others have
// only the keys that say which file each is. A new file begins when the next tensor would exceed o.MaxShardSize or
// o.MaxTensors.
//
// A general.architecture is in every file of llama.cpp; where the metadata have none it is "none", with a notice. A
// general.alignment that is no uint32, as one that has been through a format of strings alone, is left out, with one
// too.
//
// A name that is empty, has a NUL byte or more than 63 bytes, and what Holds refuses, are formats.ErrUnsupported.
// What Open would refuse to read is formats.ErrLimit.
func (f Format) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	for _, t := range tensors {
		if err := f.Holds(t); err != nil {
			return formats.Layout{}, tensorError(t.Name, err)
		}
		if n := len(t.Name); n == 0 || n > maxNameBytes || strings.IndexByte(t.Name, 0) >= 0 {
			return formats.Layout{}, tensorError(t.Name, unsupportedf("found a name of %d bytes, expected 1 to %d without NUL",
				n, maxNameBytes))
		}
	}
	keys, alignment, notices, err := keysOf(o.Metadata)
	if err != nil {
		return formats.Layout{}, err
	}
	var sizes []int64
	naming := formats.Naming{Stem: "model", Extension: extension, InOrder: true}
	l, err := formats.LayOut(tensors, o, naming, func(name string, members []int, all []int64) (formats.Shard, error) {
		sizes = all
		return formats.Shard{Name: name, Tensors: slices.Clone(members)}, nil
	})
	if err != nil {
		return l, err
	}
	count := len(l.Shards)
	if count > math.MaxUint16 || len(tensors) > math.MaxInt32 {
		return l, limitf("found %d tensors in %d files, expected at most %d files", len(tensors), count, math.MaxUint16)
	}
	for i := range l.Shards {
		s := &l.Shards[i]
		own := keys
		if count > 1 {
			if i > 0 {
				own = nil
				if alignment != defaultAlignment {
					own = formats.Metadata{{Name: alignmentKey, Value: uint32(alignment)}}
				}
			}
			own = slices.Concat(own, splitPairs(i, count, len(tensors)))
		}
		if err := f.place(s, tensors, sizes, own, alignment); err != nil {
			return l, fmt.Errorf("%s: %w", s.Name, err)
		}
	}
	l.Notices = append(l.Notices, notices...)
	return l, nil
}

// keysOf are the metadata as they are written, and the alignment that they ask for.
func keysOf(m formats.Metadata) (keys formats.Metadata, alignment int64, notices []string, err error) {
	alignment = defaultAlignment
	if m.Get(architectureKey) == nil {
		keys = append(keys, formats.Pair{Name: architectureKey, Value: "none"})
		notices = append(notices, architectureKey+" is \"none\": llama.cpp does not load the result as a model")
	}
	for _, p := range m {
		switch {
		case p.Name == "":
			return nil, 0, nil, unsupportedf("metadata %s: found an empty name, expected one", tensor.Quote(p.Name))
		case isSplitKey(p.Name): // made anew
			continue
		case p.Name == alignmentKey:
			if _, ok := p.Value.(uint32); !ok {
				notices = append(notices, fmt.Sprintf("metadata is left out, since it is a %T and no uint32: %s", p.Value, p.Name))
				continue
			}
			if alignment, err = alignmentOf(p.Value); err != nil {
				return nil, 0, nil, keyError(p.Name, err)
			}
		}
		keys = append(keys, p)
	}
	return keys, alignment, notices, nil
}

// place writes the front of a file, and says where its tensors begin and what is between them.
func (f Format) place(s *formats.Shard, tensors []tensor.Info, sizes []int64, keys formats.Metadata,
	alignment int64) error {
	limits := f.Limits.withDefaults()
	switch {
	case len(keys) > limits.Keys:
		return limitf("found %d keys, expected at most %d", len(keys), limits.Keys)
	case len(tensors) > limits.Tensors:
		return limitf("found %d tensors, expected at most %d", len(tensors), limits.Tensors)
	}
	b := append(make([]byte, 0, 4<<10), magic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(s.Tensors)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(keys)))
	for _, p := range keys {
		var err error
		if b, err = appendPair(b, p); err != nil {
			return keyError(p.Name, err)
		}
	}
	at := int64(0)
	for _, i := range s.Tensors {
		t := tensors[i]
		number, err := numberOf(t)
		if err != nil {
			return tensorError(t.Name, err)
		}
		b = appendString(b, t.Name)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(t.Shape)))
		for _, d := range slices.Backward(t.Shape) {
			b = binary.LittleEndian.AppendUint64(b, uint64(d))
		}
		b = binary.LittleEndian.AppendUint32(b, number)
		b = binary.LittleEndian.AppendUint64(b, uint64(at))
		s.Offsets = append(s.Offsets, at)
		at = padded(at+sizes[i], alignment)
	}
	if n, most := int64(len(b)), limits.HeaderBytes; n > most {
		return limitf("found %d bytes of keys and tensors' names, expected at most %d", n, most)
	}
	start := padded(int64(len(b)), alignment)
	s.Header = append(b, make([]byte, start-int64(len(b)))...)
	s.Size = start + at
	for k, i := range s.Tensors {
		s.Offsets[k] += start
		end := s.Offsets[k] + sizes[i]
		if pad := padded(end, alignment) - end; pad > 0 {
			s.Pieces = append(s.Pieces, formats.Piece{Offset: end, Bytes: make([]byte, pad)})
		}
	}
	return nil
}

func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(len(s)))
	return append(b, s...)
}

func appendPair(b []byte, p formats.Pair) ([]byte, error) {
	number, array, err := valueTypeOf(p.Value)
	if err != nil {
		return nil, err
	}
	b = appendString(b, p.Name)
	if array {
		b = binary.LittleEndian.AppendUint32(b, typeArray)
	}
	b = binary.LittleEndian.AppendUint32(b, number)
	switch v := p.Value.(type) {
	case string:
		return appendString(b, v), nil
	case []string:
		b = binary.LittleEndian.AppendUint64(b, uint64(len(v)))
		for _, s := range v {
			b = appendString(b, s)
		}
		return b, nil
	}
	if array {
		n := binary.Size(p.Value) / int(valueTypes[number].least)
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	return binary.Append(b, binary.LittleEndian, p.Value)
}
