package wire

import (
	"fmt"
	"io"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Codec codes messages as protobuf does. A Message it codes by itself: what is sent is not copied, and what is received
// is copied once, to where it is wanted.
type Codec struct{}

// Name is that of protobuf, since the bytes are the same.
func (Codec) Name() string { return proto.Name }

// usual is the codec of all other messages.
var usual = encoding.GetCodecV2(proto.Name)

// Marshal codes a message.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*Message); ok {
		return m.marshal(), nil
	}
	return usual.Marshal(v)
}

// Unmarshal decodes a message.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*Message); ok {
		return m.unmarshal(data)
	}
	return usual.Unmarshal(data, v)
}

// Message is a message of numbers and data, such as ReadResponse: one of those of plugin.proto whose fields with lower
// numbers are integers and whose others are bytes.
type Message struct {
	// Numbers are the fields 1, 2, …
	Numbers [5]int64
	// Data are the byte strings in the order in which they stand, and Fields their field numbers.
	Data   [][]byte
	Fields []protowire.Number
	// Owned, where it is not nil, holds the one byte string of Data that is sent, and is freed when that has happened.
	Owned mem.Buffer
	// Into says where a byte string that is received goes; nil has new memory made for it. An error refuses it.
	Into func(field protowire.Number, length int) ([]byte, error)
}

func (m *Message) marshal() mem.BufferSlice {
	head := make([]byte, 0, 64)
	for i, n := range m.Numbers {
		if n != 0 {
			head = protowire.AppendTag(head, protowire.Number(i+1), protowire.VarintType)
			head = protowire.AppendVarint(head, uint64(n))
		}
	}
	var all mem.BufferSlice
	for i, d := range m.Data {
		head = protowire.AppendTag(head, m.Fields[i], protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(len(d)))
		all = append(all, mem.SliceBuffer(head))
		head = nil
		switch {
		case len(d) == 0:
		case m.Owned != nil:
			all = append(all, m.Owned)
		default:
			all = append(all, mem.SliceBuffer(d))
		}
	}
	if len(head) > 0 {
		all = append(all, mem.SliceBuffer(head))
	}
	return all
}

func (m *Message) unmarshal(data mem.BufferSlice) error {
	r := data.Reader()
	defer r.Close()
	m.Numbers = [5]int64{}
	m.Data, m.Fields = m.Data[:0], m.Fields[:0]
	for r.Remaining() > 0 {
		tag, err := varint(r)
		if err != nil {
			return err
		}
		field, typ := protowire.DecodeTag(tag)
		switch typ {
		case protowire.VarintType:
			n, err := varint(r)
			if err != nil {
				return err
			}
			if field >= 1 && int(field) <= len(m.Numbers) {
				m.Numbers[field-1] = int64(n)
			}
		case protowire.BytesType:
			n, err := varint(r)
			if err != nil {
				return err
			}
			if n > uint64(r.Remaining()) {
				return io.ErrUnexpectedEOF
			}
			var p []byte
			if m.Into != nil {
				p, err = m.Into(field, int(n))
			} else {
				p = make([]byte, n)
			}
			if err != nil {
				return err
			}
			if _, err := io.ReadFull(r, p); err != nil {
				return err
			}
			m.Data, m.Fields = append(m.Data, p), append(m.Fields, field)
		default:
			return fmt.Errorf("found the wire type %d in field %d, expected a number or bytes", typ, field)
		}
	}
	return nil
}

// varint reads a number as protobuf writes it.
func varint(r io.ByteReader) (uint64, error) {
	var x uint64
	for shift := 0; shift < 64; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, io.ErrUnexpectedEOF
		}
		x |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return x, nil
		}
	}
	return 0, fmt.Errorf("found a number of more than ten bytes, expected one of 64 bits")
}
