package msgpack

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/tinylib/msgp/msgp"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// packed makes bytes of hexadecimal digits. What is in parentheses is text.
func packed(t *testing.T, text string) []byte {
	var b []byte
	for i, part := range strings.FieldsFunc(text, func(r rune) bool { return r == '(' || r == ')' }) {
		if i%2 == 1 {
			b = append(b, part...)
			continue
		}
		d, err := hex.DecodeString(strings.ReplaceAll(part, " ", ""))
		require.NoError(t, err, text)
		b = append(b, d...)
	}
	return b
}

func TestReadRefuses(t *testing.T) {
	for _, c := range []struct {
		name, file, want string
		kind             error
	}{
		{"nothing", "", `byte 0: found the end of the file, expected a map`, formats.ErrMalformed},
		{"not msgpack", "c1", `byte 0: found no msgpack, expected a map`, formats.ErrMalformed},
		{"text", "7b", `byte 0: found an integer, expected a map`, formats.ErrMalformed},
		{"a list", "90", `byte 0: found a list, expected a map`, formats.ErrMalformed},
		{"an array alone", "c7 0b 01 93 91 01 a4(int8)c4 01 01", `byte 0: found an array without a name, expected a map of arrays`,
			formats.ErrUnsupported},
		{"a map of 2^32-1 entries", "df ff ff ff ff a1(x)",
			`byte 0: found a map of 4294967295 entries, of which the 2 bytes that are left have no place`, formats.ErrMalformed},
		{"a key that is no string", "81 01 02", `byte 1: found an integer, expected a string`, formats.ErrMalformed},
		{"a key of 4 GiB", "81 db ff ff ff ff(abc)", `byte 9: found the end of the file, expected a string`,
			formats.ErrMalformed},
		{"a key that is no UTF-8", "81 a1 ff 01", `byte 1: found the key "\xff", expected UTF-8`, formats.ErrMalformed},
		{"a string that is no UTF-8", "81 a1(x) a1 ff", `tensor "x": byte 3: found the key "\xff", expected UTF-8`,
			formats.ErrMalformed},
		{"a key twice", "82 a1(x)01 a1(x)02", `byte 4: found the key "x" twice in a map, expected it once`, formats.ErrMalformed},
		{"a map and an array of one key", "82 a1(x)80 a1(x)01", `byte 4: found the key "x" twice in a map, expected it once`,
			formats.ErrMalformed},
		{"a list among arrays", "81 a1(x)91 01", `tensor "x": byte 3: found a list, expected an array, or a map as ` +
			`flax.serialization.to_state_dict makes of it`, formats.ErrUnsupported},
		{"binary data", "81 a1(x)c4 01 00", `tensor "x": byte 3: found binary data, expected an array, or a map as ` +
			`flax.serialization.to_state_dict makes of it`, formats.ErrUnsupported},
		{"another extension", "81 a1(x)d4 05 00", `tensor "x": byte 3: found the extension 5, expected an array (1, 3) or a ` +
			`complex number (2)`, formats.ErrUnsupported},
		{"an array past the end", "81 a1(x)c9 ff ff ff ff 01 93",
			`tensor "x": byte 3: found an array of 4294967295 bytes, of which the file has 1`, formats.ErrMalformed},
		{"an array of two parts", "81 a1(x)d4 01 92", `tensor "x": byte 5: found an array of 2 parts, expected shape, type and data`,
			formats.ErrMalformed},
		{"2^32-1 dimensions", "81 a1(x)c7 06 01 93 dd ff ff ff ff",
			`tensor "x": byte 6: found 4294967295 dimensions, expected at most 64`, formats.ErrLimit},
		{"a dimension below zero", "81 a1(x)d8 01 93 91 ff a4(int8)c4 01 00 00 00 00 00 00",
			`tensor "x": byte 7: found a dimension of -1, expected 0 or more`, formats.ErrMalformed},
		{"a dimension past 63 bits", "81 a1(x)d8 01 93 91 cf ff ff ff ff ff ff ff ff a4(int8)",
			`tensor "x": byte 7: found an integer past 63 bits`, formats.ErrMalformed},
		{"a dimension that is text", "81 a1(x)d8 01 93 91 a1(x)a4(int8)c4 01 00 00 00 00 00",
			`tensor "x": byte 7: found a string, expected an integer`, formats.ErrMalformed},
		{"a shape past 63 bits", "81 a1(x)c7 1b 01 93 92 cf 7f ff ff ff ff ff ff ff cf 7f ff ff ff ff ff ff ff a4(int8)c4 00",
			`tensor "x": shape [9223372036854775807, 9223372036854775807]: size overflows 63 bits`, formats.ErrMalformed},
		{"an unknown type", "81 a1(x)c7 0d 01 93 91 01 a6(object)c4 01 00",
			`tensor "x": byte 9: found the type "object", expected one of a tensor, such as float32`, formats.ErrUnsupported},
		{"a type of half bytes", "81 a1(x)c7 0b 01 93 91 01 a4(int4)c4 01 00",
			`tensor "x": byte 9: found the type "int4", expected one of a tensor, such as float32`, formats.ErrUnsupported},
		{"fewer bytes than the shape", "81 a1(x)c7 0b 01 93 91 02 a4(int8)c4 01 00",
			`tensor "x": found 1 bytes for the shape [2] of I8, expected 2`, formats.ErrMalformed},
		{"data that is longer than the array", "81 a1(x)c7 0b 01 93 91 02 a4(int8)c4 02 00 00",
			`tensor "x": byte 6: found data up to byte 18 in an array up to byte 17`, formats.ErrMalformed},
		{"data that is shorter", "81 a1(x)c7 0c 01 93 91 01 a4(int8)c4 01 00 00",
			`tensor "x": byte 6: found data up to byte 17 in an array up to byte 18`, formats.ErrMalformed},
		{"data that is text", "81 a1(x)c7 0a 01 93 91 01 a4(int8)a1(y)",
			`tensor "x": byte 14: found a string, expected binary data`, formats.ErrMalformed},
		{"a complex number of one", "81 a1(x)c7 0a 02 91 cb 00 00 00 00 00 00 00 00",
			`tensor "x": byte 6: found 1 numbers up to byte 7, expected two, of a complex number, up to byte 16`, formats.ErrMalformed},
		{"more behind the map", "80 80", `byte 1: found 1 bytes behind the map, expected the end of the file`,
			formats.ErrMalformed},
		{"chunks of a whole file", "81 b9(__msgpack_chunked_array__)c3", `byte 1: found the key __msgpack_chunked_array__, ` +
			`expected it first in the map of one tensor`, formats.ErrUnsupported},
		{"chunks behind another key", "81 a1(x)82 a1(y)01 b9(__msgpack_chunked_array__)c3", `tensor "x": byte 7: found the key ` +
			`__msgpack_chunked_array__, expected it first in the map of one tensor`, formats.ErrUnsupported},
	} {
		b := packed(t, c.file)
		_, err := Read(bytes.NewReader(b), int64(len(b)))
		assert.EqualError(t, err, c.want+": "+c.kind.Error(), c.name)
		assert.ErrorIs(t, err, c.kind, c.name)
	}
}

// chunk is a flat array, as the extension code.
func chunk(code byte, shape []byte, dtype string, data string) string {
	b := append([]byte{0x93, 0x90 + byte(len(shape))}, shape...)
	b = msgp.AppendBytes(msgp.AppendString(b, dtype), []byte(data))
	return hex.EncodeToString(append(appendExtension(nil, code, uint32(len(b))), b...))
}

func TestReadRefusesChunks(t *testing.T) {
	one, two := chunk(1, []byte{1}, "int8", "a"), chunk(1, []byte{2}, "int8", "bc")
	shape := "a5(shape)81 a1(0)03"
	for _, c := range []struct{ name, entries, want string }{
		{"no shape", "82 %s c3 a6(chunks)82 a1(0)" + one + "a1(1)" + two, "found a chunked array without shape and chunks"},
		{"no chunks", "82 %s c3 " + shape, "found a chunked array without shape and chunks"},
		{"none in chunks", "83 %s c3 " + shape + "a6(chunks)80", "found no chunks, expected one or more"},
		{"another key", "83 %s c3 " + shape + "a4(junk)80", `found the key "junk" in a chunked array`},
		{"the shape twice", "83 %s c3 " + shape + shape, `found the key "shape" in a chunked array`},
		{"another order", "83 %s c3 " + shape + "a6(chunks)82 a1(1)" + one + "a1(0)" + two, `found the key "1", expected "0"`},
		{"a chunk too few", "83 %s c3 " + shape + "a6(chunks)81 a1(0)" + two,
			"found 2 bytes for the shape [3] of I8, expected 3"},
		{"another type", "83 %s c3 " + shape + "a6(chunks)82 a1(0)" + one + "a1(1)" + chunk(1, []byte{2}, "uint8", "bc"),
			"found a chunk of U8, expected I8"},
		{"a matrix", "83 %s c3 " + shape + "a6(chunks)81 a1(0)" + chunk(1, []byte{1, 3}, "int8", "abc"),
			"found a chunk of the shape [1, 3] and the extension 1"},
		{"a scalar", "83 %s c3 " + shape + "a6(chunks)81 a1(0)" + chunk(3, []byte{3}, "int8", "abc"),
			"found a chunk of the shape [3] and the extension 3"},
		{"an integer as chunk", "83 %s c3 " + shape + "a6(chunks)81 a1(0)01", "found an integer, expected an array"},
		{"a dimension below zero", "83 %s c3 a5(shape)81 a1(0)ff a6(chunks)81 a1(0)" + one, "found a dimension of -1"},
	} {
		b := packed(t, "81 a1(x)"+fmt.Sprintf(c.entries, "b9(__msgpack_chunked_array__)"))
		_, err := Read(bytes.NewReader(b), int64(len(b)))
		assert.ErrorContains(t, err, c.want, c.name)
		assert.ErrorIs(t, err, formats.ErrMalformed, c.name)
		assert.ErrorContains(t, err, `tensor "x": `, c.name)
	}
	b := packed(t, "81 a1(x)83 b9(__msgpack_chunked_array__)c3 a6(chunks)82 a1(0)"+one+"a1(1)"+two+shape)
	c, err := Read(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	assert.Equal(t, tensor.Info{Name: "x", DType: tensor.I8, Shape: tensor.Shape{3}}, c.Tensors[0].Info)
	assert.Equal(t, "abc", string(data(b, c.Tensors[0])))
}

func TestLimits(t *testing.T) {
	array, err := hex.DecodeString(chunk(1, []byte{1}, "int8", "a"))
	require.NoError(t, err)
	deep := func(n int) []byte {
		return append(bytes.Repeat([]byte("\x81\xa1k"), n), array...)
	}
	many := func(n int) []byte {
		b := msgp.AppendMapHeader(nil, uint32(n))
		for i := range n {
			b = append(msgp.AppendString(b, fmt.Sprint(i)), 0xc0)
		}
		return b
	}
	long := func(n int) []byte {
		return append(msgp.AppendString([]byte{0x81}, strings.Repeat("k", n)), array...)
	}
	amplified := func(n int) []byte { // a long key, and n arrays in its map
		b := msgp.AppendString([]byte{0x81}, strings.Repeat("k", maxItem-10))
		b = msgp.AppendMapHeader(b, uint32(n))
		for i := range n {
			b = append(msgp.AppendString(b, fmt.Sprint(i)), array...)
		}
		return b
	}
	for _, c := range []struct {
		name      string
		good, bad []byte
		want      string
	}{
		{"depth", deep(maxDepth), deep(maxDepth + 1), "found a map in 256 maps, expected fewer"},
		{"values", many(maxValues), many(maxValues + 1), "found more than 1048576 arrays and other values"},
		{"keys", long(maxItem), long(maxItem + 1), "found a string of more than 1048576 bytes"},
		{"names", amplified(maxText / maxItem), amplified(maxText/maxItem + 1), "found names of more than 67108864 bytes"},
		{"more names", amplified(1), amplified(100_000), "found names of more than 67108864 bytes"},
	} {
		_, err := Read(bytes.NewReader(c.good), int64(len(c.good)))
		assert.NoError(t, err, c.name)
		_, err = Read(bytes.NewReader(c.bad), int64(len(c.bad)))
		assert.ErrorContains(t, err, c.want, c.name)
		assert.ErrorIs(t, err, formats.ErrLimit, c.name)
		assert.Less(t, len(err.Error()), 500, c.name)
	}
}

// Lengths of gigabytes in a small file allocate nothing of the kind.
func TestNoAllocationByLength(t *testing.T) {
	for _, text := range []string{"df 00 00 00 01 db ff ff ff f0(abc)", "81 a1(x)db 7f ff ff ff(abc)",
		"81 a1(x)c7 06 01 93 dd 00 ff ff ff", "81 a1(x)c6 ff ff ff ff", "df ff ff ff ff", "81 a1(x)c9 ff ff ff f0 01 93 90"} {
		b := packed(t, text)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Read(bytes.NewReader(b), int64(len(b)))
		runtime.ReadMemStats(&after)
		assert.Error(t, err, text)
		assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20), text)
	}
}
