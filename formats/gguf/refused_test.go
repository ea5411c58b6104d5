package gguf_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/storage/storagetest"
)

// raw makes the bytes of a file by hand.
type raw []byte

func (r raw) u8(n byte) raw    { return append(r, n) }
func (r raw) u16(n uint16) raw { return binary.LittleEndian.AppendUint16(r, n) }
func (r raw) u32(n uint32) raw { return binary.LittleEndian.AppendUint32(r, n) }
func (r raw) u64(n uint64) raw { return binary.LittleEndian.AppendUint64(r, n) }
func (r raw) str(s string) raw { return append(r.u64(uint64(len(s))), s...) }

// head is the front of a file up to its counts.
func head(tensors, keys uint64) raw { return raw("GGUF").u32(3).u64(tensors).u64(keys) }

// key begins a key.
func (r raw) key(name string, typ uint32) raw { return r.str(name).u32(typ) }

// tensor is an entry of a tensor, its dimensions as in the file.
func (r raw) tensor(name string, typ uint32, offset uint64, dims ...uint64) raw {
	r = r.str(name).u32(uint32(len(dims)))
	for _, d := range dims {
		r = r.u64(d)
	}
	return r.u32(typ).u64(offset)
}

// data pads the front, and adds n bytes.
func (r raw) data(n int) raw {
	for len(r)%32 != 0 {
		r = r.u8(0)
	}
	return append(r, make([]byte, n)...)
}

// rest keeps what counts of a front are held against out of the way.
func (r raw) rest() raw { return append(r, make([]byte, 200)...) }

// refused are files, and what is said of them.
func refused() map[string]raw {
	one := func(dims ...uint64) raw { return head(1, 0).tensor("w", 0, 0, dims...).data(64) }
	align := func(n uint32) raw { return head(0, 1).key("general.alignment", 4).u32(n) }
	return map[string]raw{
		"it is empty":                      {},
		`found "GGUX" at its beginning`:    append(raw("GGUX"), head(0, 0)[4:]...),
		"found version 0, expected 2 or 3": append(raw("GGUF").u32(0), head(0, 0)[8:]...),
		"found version 1, expected 2 or 3": append(raw("GGUF").u32(1), head(0, 0)[8:]...),
		"found version 4, expected 2 or 3": append(raw("GGUF").u32(4), head(0, 0)[8:]...),
		"a count of -1 tensors":            head(math.MaxUint64, 0).rest(),
		"a count of -1 keys":               head(0, math.MaxUint64).rest(),
		"found a count of 16 keys, expected at most the 15 that fit into the file":             head(0, 16).rest(),
		"found a count of 9 tensors, expected at most the 8 that fit into the file":            head(9, 0).rest(),
		"found a count of 4611686018427387904 tensors":                                         head(1<<62, 0).rest(),
		"key 1 of 1: found an empty name":                                                      head(0, 1).key("", 0).rest(),
		"key 1 of 1: found a string of 18446744073709551615 bytes":                             head(0, 1).u64(math.MaxUint64).rest(),
		"key 2 of 2: found a string of 9223372036854775807 bytes":                              head(0, 2).key("a", 0).u8(1).u64(math.MaxInt64).rest(),
		`key "a": found it twice, expected it once`:                                            head(0, 2).key("a", 0).u8(1).key("a", 0).u8(1).rest(),
		`key "a": found the type 13, expected 0 to 12`:                                         head(0, 1).key("a", 13).rest(),
		`key "a": found the type 4294967295`:                                                   head(0, 1).key("a", math.MaxUint32).rest(),
		`key "b": found the type 13, expected 0 to 12`:                                         head(0, 1).key("b", 9).u32(13).u64(0).rest(),
		`key "a": found an array of arrays`:                                                    head(0, 1).key("a", 9).u32(9).u64(1).rest(),
		`key "a": found an array of 2305843009213693952 values, expected at most`:              head(0, 1).key("a", 9).u32(4).u64(1 << 61).rest(),
		`key "a": found an array of 26 values, expected at most the 25 that fit`:               head(0, 1).key("a", 9).u32(8).u64(26).rest(),
		`key "a": found a string of 1099511627776 bytes, expected at most the 200`:             head(0, 1).key("a", 8).u64(1 << 40).rest(),
		`key "s": found a string of 193 bytes, expected at most the 192`:                       head(0, 1).key("s", 9).u32(8).u64(2).str("").u64(193).rest()[:24+9+4+4+8+8+8+192],
		`key "a": found the boolean 7, expected 0 or 1`:                                        head(0, 1).key("a", 7).u8(7),
		`key "b": found the boolean 2, expected 0 or 1`:                                        head(0, 1).key("b", 9).u32(7).u64(3).u8(1).u8(0).u8(2),
		`key "a": found 3 bytes up to the end of the file, expected at least 4`:                head(0, 1).key("a", 4).u8(1).u8(2).u8(3),
		`key "general.alignment": found 0, expected a power of two`:                            align(0),
		`key "general.alignment": found 3, expected a power of two`:                            align(3),
		`key "general.alignment": found 131072, expected at most 65536`:                        align(1 << 17),
		`key "general.alignment": found 2147483648, expected at most`:                          align(1 << 31),
		`key "general.alignment": found a uint64, expected a uint32`:                           head(0, 1).key("general.alignment", 10).u64(32),
		`key "split.count": found a uint32, expected a uint16`:                                 head(0, 1).key("split.count", 4).u32(1),
		`key "split.count": found 3 in a file of this name, expected one such as`:              head(0, 1).key("split.count", 2).u16(3),
		"tensor 1 of 1: found a name of 64 bytes, expected at most 63":                         head(1, 0).tensor(strings.Repeat("n", 64), 0, 0, 1).data(32),
		"tensor 1 of 1: found an empty name":                                                   head(1, 0).tensor("", 0, 0, 1).data(32),
		`tensor "a\x00": found a name with a NUL byte`:                                         head(1, 0).tensor("a\x00", 0, 0, 1).data(32),
		`tensor "w": found it twice, expected it once`:                                         head(2, 0).tensor("w", 0, 0, 8).tensor("w", 0, 32, 8).data(64),
		`tensor "w": found 5 dimensions, expected at most 4`:                                   one(1, 1, 1, 1, 1),
		`tensor "w": found the dimensions [0], expected positive ones`:                         one(0),
		`tensor "w": found the dimensions [2, -1], expected positive ones`:                     one(2, math.MaxUint64),
		`tensor "w": shape [4294967296, 4294967296]: size overflows 63 bits`:                   one(1<<32, 1<<32),
		`tensor "w": shape [2305843009213693952] of F32: size overflows 63 bits`:               one(1 << 61),
		`tensor "w": found the type -1, expected one that ggml has`:                            head(1, 0).tensor("w", math.MaxUint32, 0, 32).data(64),
		`tensor "w": found the type 200`:                                                       head(1, 0).tensor("w", 200, 0, 32).data(64),
		`tensor "w": found the type 43, expected`:                                              head(1, 0).tensor("w", 43, 0, 32).data(64),
		`tensor "w": found rows of 33 elements, expected a multiple of the 32 in a`:            head(1, 0).tensor("w", 8, 0, 33, 32).data(2000),
		`tensor "w": found rows of 1 elements, expected a multiple of the 256`:                 head(1, 0).tensor("w", 12, 0).data(2000),
		`tensor "w": found its data at 16, expected it at 0: there is a gap`:                   head(1, 0).tensor("w", 0, 16, 4).data(64),
		`tensor "v": found its data at 0, expected it at 32: it overlaps`:                      head(2, 0).tensor("w", 0, 0, 4).tensor("v", 0, 0, 4).data(64),
		`tensor "v": found its data at 16, expected it at 32: it overlaps`:                     head(2, 0).tensor("w", 0, 0, 4).tensor("v", 0, 16, 4).data(64),
		`tensor "v": found its data at 64, expected it at 32: there is a gap`:                  head(2, 0).tensor("w", 0, 0, 4).tensor("v", 0, 64, 4).data(96),
		`tensor "v": found its data at 9223372036854775808, expected it at 32`:                 head(2, 0).tensor("w", 0, 0, 4).tensor("v", 0, 1<<63, 4).data(96),
		`tensor "w": found 63 bytes of data up to the end of the file, expected 64`:            one(16)[:len(one(16))-1],
		`tensor "w": found 0 bytes of data up to the end of the file, expected 64`:             head(1, 0).tensor("w", 0, 0, 16),
		`tensor "w": found 64 bytes of data up to the end of the file, expected 1099511627776`: head(1, 0).tensor("w", 24, 0, 1<<40).data(64),
	}
}

// open opens a file of these bytes.
func open(b []byte) (formats.Container, error) {
	return gguf.Format{}.Open(context.Background(), storagetest.Memory{"x.gguf": b}, "x.gguf")
}

// assertKind says that an error is of one kind that a bad file has, on one short line.
func assertKind(t testing.TB, err error) {
	one := 0
	for _, kind := range []error{formats.ErrMalformed, formats.ErrLimit, formats.ErrUnsupported} {
		if errors.Is(err, kind) {
			one++
		}
	}
	assert.Equal(t, 1, one, "kinds of %v", err)
	assert.NotContains(t, err.Error(), "\n")
	assert.NotContains(t, err.Error(), "\x00")
	assert.Less(t, len(err.Error()), 1500)
}

func TestRefused(t *testing.T) {
	for says, b := range refused() {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := open(b)
		runtime.ReadMemStats(&after)
		assert.LessOrEqual(t, after.TotalAlloc-before.TotalAlloc, uint64(64<<10), says)
		if assert.ErrorContains(t, err, says) {
			assertKind(t, err)
			assert.True(t, strings.HasPrefix(err.Error(), "memory:x.gguf: "), err)
		}
	}
	for _, id := range []uint32{4, 5, 31, 32, 33, 36, 37, 38} {
		_, err := open(head(1, 0).tensor("w", id, 0, 256).data(4096))
		require.ErrorContains(t, err, "expected one that ggml has")
		assertKind(t, err)
	}
}

// TestAccepted has what is at the edge of what is refused.
func TestAccepted(t *testing.T) {
	for what, b := range map[string]raw{
		"nothing":             head(0, 0),
		"version 2":           append(raw("GGUF").u32(2), head(0, 0)[8:]...),
		"a scalar":            head(1, 0).tensor("w", 0, 0).data(4),
		"a name of 63 bytes":  head(1, 0).tensor(strings.Repeat("n", 63), 0, 0, 1).data(4),
		"no padding behind":   head(1, 0).tensor("w", 0, 0, 3).data(12),
		"more behind":         head(1, 0).tensor("w", 0, 0, 3).data(1000),
		"an alignment of 1":   head(0, 1).key("general.alignment", 4).u32(1),
		"a large alignment":   head(0, 1).key("general.alignment", 4).u32(65536),
		"empty lists":         head(0, 2).key("a", 9).u32(8).u64(0).key("b", 9).u32(7).u64(0),
		"one file of one":     head(0, 2).key("split.no", 2).u16(0).key("split.count", 2).u16(1),
		"a name of odd bytes": head(1, 1).key("\xff", 0).u8(1).tensor("\xfe\n", 0, 0, 1).data(4),
	} {
		c, err := open(b)
		if assert.NoError(t, err, what) {
			assert.NoError(t, c.Close())
		}
	}
	c, err := open(head(0, 2).key("a", 9).u32(8).u64(0).key("b", 9).u32(7).u64(0))
	require.NoError(t, err)
	assert.Equal(t, formats.Metadata{{Name: "a", Value: []string{}}, {Name: "b", Value: []bool{}}}, c.Metadata())
}

// TestCut refuses a file that ends anywhere before its data does.
func TestCut(t *testing.T) {
	for name, b := range files(t, "types.gguf", "keys.gguf", "big.gguf") {
		whole, err := open(b)
		require.NoError(t, err)
		end := len(b)
		if list := whole.Tensors(); len(list) > 0 { // up to the padding of the last
			last := list[len(list)-1]
			end -= int(32-last.Bytes%32) % 32
		} else {
			end = len(bytes.TrimRight(b, "\x00")) - 100 // its padding is none of it
		}
		for n := range end {
			if _, err := open(b[:n]); assert.Error(t, err, "%s cut to %d bytes", name, n) {
				assertKind(t, err)
			}
		}
	}
}

// TestLargeStrings reads strings that are longer than what is read at once, and lists of them.
func TestLargeStrings(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 70_000)
	value := []string{"", long, "x", long[:256<<10-8], long[:256<<10-7], long[:100], ""}
	for range 50 {
		value = append(value, long[:10_007])
	}
	m := formats.Metadata{{Name: "general.architecture", Value: "none"}, {Name: "one", Value: long},
		{Name: "list", Value: value}, {Name: "end", Value: uint8(7)}}
	l, err := gguf.Format{}.Layout(t.Context(), nil, formats.Options{Metadata: m})
	require.NoError(t, err)
	c, err := open(l.Shards[0].Header)
	require.NoError(t, err)
	assert.Equal(t, m, c.Metadata())
}

// TestLimits stops at the limits, before what is past them is read.
func TestLimits(t *testing.T) {
	small := gguf.Format{Limits: gguf.Limits{HeaderBytes: 100}}
	for _, b := range []raw{
		head(0, 1).key("a", 8).str(strings.Repeat("x", 300)), head(0, 1).key("a", 9).u32(0).u64(300).data(300),
		head(0, 1).key("a", 9).u32(8).u64(1).str(strings.Repeat("x", 300)), head(3, 0).tensor("a", 0, 0, 1).tensor("b",
			0, 32, 1).tensor("c", 0, 64, 1).data(96),
	} {
		_, err := small.Open(t.Context(), storagetest.Memory{"x.gguf": b}, "x.gguf")
		require.ErrorIs(t, err, formats.ErrLimit)
		assertKind(t, err)
		_, err = open(b)
		require.NoError(t, err)
	}
	two := head(2, 0).tensor("a", 0, 0, 1).tensor("b", 0, 32, 1).data(64)
	_, err := gguf.Format{Limits: gguf.Limits{Tensors: 1}}.Open(t.Context(), storagetest.Memory{"x.gguf": two}, "x.gguf")
	require.ErrorIs(t, err, formats.ErrLimit)
	keys := head(0, 2).key("a", 0).u8(1).key("b", 0).u8(1)
	_, err = gguf.Format{Limits: gguf.Limits{Keys: 1}}.Open(t.Context(), storagetest.Memory{"x.gguf": keys}, "x.gguf")
	require.ErrorIs(t, err, formats.ErrLimit)
	assert.ErrorContains(t, err, "found 2 keys, expected at most 1")
	_, err = gguf.Format{Limits: gguf.Limits{Files: 2}}.Open(t.Context(), files(t, models(t)["split.gguf"].Files...), "")
	require.ErrorIs(t, err, formats.ErrLimit)
	assert.ErrorContains(t, err, "found a file of 3 by its name, expected at most 2")
}

// TestSplitRefused breaks one of the files that are a model.
func TestSplitRefused(t *testing.T) {
	const first, second, third = "split-00001-of-00003.gguf", "split-00002-of-00003.gguf", "split-00003-of-00003.gguf"
	part := func(no, count uint16, tensors uint32, name string) raw {
		return head(1, 3).key("split.no", 2).u16(no).key("split.count", 2).u16(count).key("split.tensors.count", 5).
			u32(tensors).tensor(name, 0, 0, 1).data(4)
	}
	for says, change := range map[string]func(m storagetest.Memory){
		`found no shard "split-00001-of-00003.gguf" beside it`: func(m storagetest.Memory) { delete(m, first) },
		`found no shard "split-00003-of-00003.gguf" beside it`: func(m storagetest.Memory) { delete(m, third) },
		second + `: key "split.no": found 2, expected 1 by`:    func(m storagetest.Memory) { m[second], m[third] = m[third], m[second] },
		third + `: tensor "blk.3.weight": found it in "` + second + `" too`: func(m storagetest.Memory) {
			m[third] = part(2, 3, 8, "blk.3.weight")
		},
		third + `: key "split.count": found 4, expected 3`: func(m storagetest.Memory) { m[third] = part(2, 4, 8, "x") },
		third + `: key "split.count": found none, expected 3`: func(m storagetest.Memory) {
			m[third] = head(1, 0).tensor("x", 0, 0, 1).data(4)
		},
		third + `: key "split.no": found none, expected 2`: func(m storagetest.Memory) {
			m[third] = head(0, 1).key("split.count", 2).u16(3)
		},
		third + `: key "split.tensors.count": found none`: func(m storagetest.Memory) {
			m[third] = head(0, 2).key("split.count", 2).u16(3).key("split.no", 2).u16(2)
		},
		third + `: key "split.tensors.count": found 9, expected 8`: func(m storagetest.Memory) {
			m[third] = part(2, 3, 9, "x")
		},
		second + `: key "general.architecture": found another value, expected that of the first file`: func(m storagetest.Memory) {
			m[second] = head(1, 4).key("split.no", 2).u16(1).key("split.count", 2).u16(3).key("split.tensors.count", 5).u32(8).
				key("general.architecture", 8).str("another").tensor("x", 0, 0, 1).data(4)
		},
		`key "split.tensors.count": found 8, expected the 7 tensors in all 3 files`: func(m storagetest.Memory) {
			m[third] = part(2, 3, 8, "x")
		},
	} {
		m := files(t, first, second, third)
		change(m)
		for _, name := range []string{first, second, third} {
			if _, there := m[name]; !there {
				continue
			}
			_, err := gguf.Format{}.Open(t.Context(), m, name)
			if assert.ErrorContains(t, err, says) && !errors.Is(err, fs.ErrNotExist) {
				assertKind(t, err)
			}
		}
	}
}

// TestUpperCase takes names as some systems write them: of a file in a folder, and of files that are one model.
func TestUpperCase(t *testing.T) {
	for _, names := range [][]string{{"version2.gguf"}, models(t)["split.gguf"].Files} {
		m := storagetest.Memory{}
		for name, b := range files(t, names...) {
			m[strings.TrimSuffix(name, "gguf")+"GGUF"] = b
		}
		found, err := gguf.Format{}.Detect(t.Context(), m, "")
		require.NoError(t, err)
		require.True(t, found)
		c, err := gguf.Format{}.Open(t.Context(), m, "")
		require.NoError(t, err)
		require.Len(t, c.Files(), len(names))
		require.NoError(t, c.Close())
	}
}

// FuzzParts opens any bytes as the second of three files.
func FuzzParts(f *testing.F) {
	names := models(f)["split.gguf"].Files
	dir := files(f, names...)
	for _, b := range dir {
		f.Add(b)
	}
	first, third := dir[names[0]], dir[names[2]]
	f.Fuzz(func(t *testing.T, data []byte) {
		m := storagetest.Memory{names[0]: first, names[1]: data, names[2]: third}
		c, err := gguf.Format{}.Open(context.Background(), m, names[1])
		if err != nil {
			assertKind(t, err)
			return
		}
		defer c.Close()
		require.Len(t, c.Tensors(), 8)
		require.Len(t, c.Files(), 3)
	})
}

// FuzzOpen opens any bytes as a file. What is accepted must hold what a container promises, and what is refused must
// say why in one line. What is accepted and written again is read as the same.
func FuzzOpen(f *testing.F) {
	for _, x := range models(f) {
		for _, b := range files(f, x.Files...) {
			f.Add(b)
		}
	}
	for _, b := range refused() {
		f.Add([]byte(b))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := open(data)
		if err != nil {
			assertKind(t, err)
			return
		}
		defer c.Close()
		require.NoError(t, c.Metadata().Check())
		names := map[string]bool{}
		for _, x := range c.Tensors() {
			require.False(t, names[x.Name])
			names[x.Name] = true
			size, err := x.Size()
			require.NoError(t, err)
			require.Equal(t, size, x.Bytes)
			p := make([]byte, x.Bytes)
			_, err = x.ReadAt(p, 0)
			require.NoError(t, err)
		}
		infos, bytes := contents(t, c)
		l, err := gguf.Format{}.Layout(context.Background(), infos, formats.Options{Metadata: c.Metadata()})
		if err != nil || len(l.Notices) > 0 { // a name that is no UTF-8, or no architecture
			return
		}
		again, err := gguf.Format{}.Open(context.Background(), write(t, l, bytes), "model.gguf")
		require.NoError(t, err)
		defer again.Close()
		gotInfos, gotBytes := contents(t, again)
		require.Equal(t, infos, gotInfos)
		require.Equal(t, bytes, gotBytes)
		require.Equal(t, fmt.Sprintf("%#v", c.Metadata()), fmt.Sprintf("%#v", again.Metadata())) // NaN is NaN
	})
}
