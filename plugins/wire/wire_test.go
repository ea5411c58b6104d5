package wire

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// A Message is coded as protobuf codes the message that it stands for, in both directions.
func TestMessageIsProtobuf(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		numbers := rapid.SliceOfN(rapid.Int64(), 4, 4).Draw(t, "numbers")
		parts := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 40), 0, 4).Draw(t, "parts")
		want := &pb.DecodeRequest{Id: numbers[0], Decoder: numbers[1], Lo: numbers[2], Hi: numbers[3], Parts: parts}
		m := Message{Data: parts, Fields: make([]protowire.Number, len(parts))}
		copy(m.Numbers[:], numbers)
		for i := range parts {
			m.Fields[i] = 5
		}
		b, err := Codec{}.Marshal(&m)
		require.NoError(t, err)
		got := &pb.DecodeRequest{}
		require.NoError(t, proto.Unmarshal(b.Materialize(), got))
		require.True(t, proto.Equal(want, got), "%v", got)

		theirs, err := proto.Marshal(want)
		require.NoError(t, err)
		// As it comes: in pieces.
		cut := rapid.IntRange(0, len(theirs)).Draw(t, "cut")
		var back Message
		require.NoError(t, Codec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(theirs[:cut]), mem.SliceBuffer(theirs[cut:])},
			&back))
		require.Equal(t, numbers, back.Numbers[:4])
		require.Len(t, back.Data, len(parts))
		for i := range parts {
			require.Equal(t, string(parts[i]), string(back.Data[i]))
			require.EqualValues(t, 5, back.Fields[i])
		}
	})
}

// FuzzMessage: what protobuf refuses is refused, and what both take is the same.
func FuzzMessage(f *testing.F) {
	good, err := proto.Marshal(&pb.ReadResponse{Offset: 300, Data: []byte("data")})
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte{0x12, 0xff, 0xff, 0xff, 0xff, 0x0f, 1})
	f.Add([]byte{0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01})
	f.Add([]byte{0x0d, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := Message{Into: func(_ protowire.Number, n int) ([]byte, error) {
			if n > len(b) {
				t.Fatalf("asked for %d bytes of %d", n, len(b))
			}
			return make([]byte, n), nil
		}}
		err := Codec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, &m)
		var theirs pb.ReadResponse
		if failed := proto.Unmarshal(b, &theirs); failed != nil || err != nil {
			return
		}
		last := []byte(nil)
		for i, d := range m.Data {
			if m.Fields[i] == 2 {
				last = d
			}
		}
		if m.Numbers[0] == theirs.GetOffset() && string(last) == string(theirs.GetData()) {
			return
		}
		// A field of another wire type than the message has it with is an unknown one to protobuf.
		for rest := b; len(rest) > 0; {
			field, typ, n := protowire.ConsumeTag(rest)
			if field == 1 && typ != protowire.VarintType || field == 2 && typ != protowire.BytesType {
				return
			}
			size := protowire.ConsumeFieldValue(field, typ, rest[n:])
			rest = rest[n+size:]
		}
		t.Fatalf("found %d and %q, expected %d and %q", m.Numbers[0], last, theirs.GetOffset(), theirs.GetData())
	})
}

// What a rule says of a tile is within the tensor, and of all tiles everything once.
func TestRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := Rule{rapid.Int64Range(0, 20).Draw(t, "first"), rapid.Int64Range(0, 9).Draw(t, "stride"),
			rapid.Int64Range(0, 12).Draw(t, "wrap")}
		size, units := rapid.Int64Range(0, 200).Draw(t, "size"), rapid.Int64Range(0, 24).Draw(t, "units")
		once := rapid.Bool().Draw(t, "once")
		if !r.Fits(units, size, once) {
			return
		}
		count := make([]int, size)
		for lo := int64(0); lo < units; {
			hi := lo + rapid.Int64Range(1, units-lo).Draw(t, "tile")
			total := int64(0)
			for _, s := range r.Append(nil, lo, hi, size) {
				require.True(t, s.Offset >= 0 && s.Length >= 0 && s.Offset+s.Length <= size, "%v of %d", s, size)
				total += s.Length
				for i := range s.Length {
					count[s.Offset+i]++
				}
			}
			if r.Stride > 0 {
				require.LessOrEqual(t, total, (hi-lo)*r.Stride)
				require.Positive(t, total)
			}
			lo = hi
		}
		if once && r.Stride > 0 {
			for i, n := range count {
				require.LessOrEqual(t, n, 1, "byte %d", i)
			}
		}
	})
	assert.False(t, Rule{Stride: 1 << 62}.Fits(1<<62, 1<<62, false))
	assert.False(t, Rule{First: 5}.Fits(1, 4, false))
	assert.False(t, Rule{Stride: 2, Wrap: 3}.Fits(4, 100, true), "two units in one place")
	assert.Equal(t, []Span{{6, 2}, {4, 4}}, Rule{4, 2, 2}.Append(nil, 1, 4, 8), "round the end")
	assert.Equal(t, []Span{{3, 4}}, Rule{First: 3}.Append(nil, 1, 4, 7), "all of it for each tile")
}

// An error says there and here what it is.
func TestStatus(t *testing.T) {
	assert.NoError(t, Status(nil))
	for _, c := range []struct {
		err   error
		code  codes.Code
		kinds []error
		text  string
	}{
		{fmt.Errorf("x: found 1: %w", formats.ErrMalformed), codes.InvalidArgument,
			[]error{formats.ErrMalformed, quant.ErrMalformed}, "x: found 1: malformed"},
		{quant.ErrUnsupported, codes.Unimplemented, []error{formats.ErrUnsupported, quant.ErrUnsupported},
			"cannot be quantised"},
		{formats.ErrLimit, codes.ResourceExhausted, []error{formats.ErrLimit}, "limit exceeded"},
		{fs.ErrNotExist, codes.NotFound, []error{fs.ErrNotExist}, "file does not exist"},
		{tensor.ErrOverflow, codes.InvalidArgument, []error{formats.ErrMalformed},
			tensor.ErrOverflow.Error() + ": malformed"},
	} {
		sent := Status(c.err)
		assert.Equal(t, c.code, status.Code(sent), "%v", c.err)
		assert.Equal(t, sent, Status(sent), "once more")
		got, ok := Refusal(sent)
		require.True(t, ok)
		assert.EqualError(t, got, c.text)
		for _, k := range c.kinds {
			assert.ErrorIs(t, got, k)
		}
	}
	for _, err := range []error{errors.New("boom"), Status(errors.New("boom")), status.Error(codes.Unavailable, "gone"),
		status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)")} {
		_, ok := Refusal(err)
		assert.False(t, ok, "%v", err)
	}
	assert.True(t, TooLarge(status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)")))
}

func TestOneLine(t *testing.T) {
	assert.Equal(t, `a b \x1b[31m c`, OneLine("a\n b\t\x1b[31m  c\r\n", 100))
	assert.Equal(t, "aaaa...", OneLine(strings.Repeat("a", 50), 4))
	assert.Equal(t, `x y \x9f`, OneLine("x\u2028y\u0085\u009f", 100))
}

// A list goes in messages of at most Chunk bytes, whole and in order.
func TestBatch(t *testing.T) {
	var got []string
	b := Batch(func(list []*pb.Tensor) error {
		n := 0
		for _, x := range list {
			got = append(got, x.GetName())
			n += proto.Size(x)
		}
		assert.LessOrEqual(t, n, Chunk)
		return nil
	})
	var want []string
	for i := range 300 {
		want = append(want, fmt.Sprint(i, strings.Repeat("n", 20_000)))
		require.NoError(t, b.Add(&pb.Tensor{Name: want[i]}))
	}
	require.NoError(t, b.End())
	assert.Equal(t, want, got)
	boom := errors.New("boom")
	failing := Batch(func([]*pb.Tensor) error { return boom })
	_ = failing.Add(&pb.Tensor{})
	assert.ErrorIs(t, failing.End(), boom)
}
