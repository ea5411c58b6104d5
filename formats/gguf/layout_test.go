package gguf_test

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

// write makes the files of a layout. What no tensor and no piece of the frame fills is 0xEE.
func write(t require.TestingT, l formats.Layout, data [][]byte) storagetest.Memory {
	m := storagetest.Memory{}
	for _, s := range l.Shards {
		b := []byte(strings.Repeat("\xEE", int(s.Size)))
		for k, i := range s.Tensors {
			copy(b[s.Offsets[k]:], data[i])
		}
		pieces, err := s.Sealed(nil)
		require.NoError(t, err)
		for _, p := range pieces {
			copy(b[p.Offset:], p.Bytes)
		}
		m[s.Name] = b
	}
	for _, f := range l.Extra {
		m[f.Name] = f.Data
	}
	return m
}

// contents are the tensors of a container, and their data.
func contents(t require.TestingT, c formats.Container) (infos []tensor.Info, data [][]byte) {
	for _, x := range c.Tensors() {
		b, err := io.ReadAll(io.NewSectionReader(x, 0, x.Bytes))
		require.NoError(t, err)
		infos, data = append(infos, x.Info), append(data, b)
	}
	return infos, data
}

// TestLayoutIsGGUFPys writes what gguf-py has written, byte for byte.
func TestLayoutIsGGUFPys(t *testing.T) {
	options := map[string]formats.Options{
		"keys.gguf": {SingleFile: "keys.gguf"}, "types.gguf": {SingleFile: "types.gguf"},
		"alignment.gguf": {SingleFile: "alignment.gguf"},
		"split.gguf":     {Stem: "split", MaxTensors: 3}, "split-size.gguf": {Stem: "split-size", MaxShardSize: 200},
	}
	for name, x := range models(t) {
		o, ok := options[name]
		if !ok { // of another version, or big-endian
			continue
		}
		c, err := formatstest.Open(gguf.Format{}, filepath.Join(fixtures, x.Files[0]))
		require.NoError(t, err)
		infos, data := contents(t, c)
		o.Metadata = c.Metadata()
		l, err := gguf.Format{}.Layout(t.Context(), infos, o)
		require.NoError(t, err)
		assert.Empty(t, l.Notices)
		got := write(t, l, data)
		require.Len(t, got, len(x.Files))
		for _, file := range x.Files {
			want, err := os.ReadFile(filepath.Join(fixtures, file))
			require.NoError(t, err)
			assert.Equal(t, string(want), string(got[file]), file)
		}
		require.NoError(t, c.Close())
	}
}

// allTypes are types that GGUF has, each with a row that fits it.
var allTypes = []tensor.Info{
	{DType: tensor.F32}, {DType: tensor.F16}, {DType: tensor.BF16}, {DType: tensor.F64}, {DType: tensor.I8},
	{DType: tensor.I16}, {DType: tensor.I32}, {DType: tensor.I64},
	{Encoding: tensor.Encoding{Name: "q8_0", Elements: 32, Bytes: 34}},
	{Encoding: tensor.Encoding{Name: "q4_K", Elements: 256, Bytes: 144}},
	{Encoding: tensor.Encoding{Name: "q2_0", Elements: 64, Bytes: 18}},
}

func genTensors(t *rapid.T) []tensor.Info {
	names := rapid.SliceOfNDistinct(rapid.OneOf(rapid.StringMatching(`[a-c](\.[0-9])?`), rapid.StringMatching(`[^\x00]{1,15}`)),
		0, 12, rapid.ID[string]).Draw(t, "names")
	list := make([]tensor.Info, len(names))
	for i, name := range names {
		x := rapid.SampledFrom(allTypes).Draw(t, "type")
		x.Name, x.Shape = name, rapid.SliceOfN(rapid.Int64Range(1, 3), 0, 4).Draw(t, "shape")
		if n := x.Encoding.Elements; n > 0 {
			x.Shape = append(x.Shape[:min(len(x.Shape), 3)], n*rapid.Int64Range(1, 2).Draw(t, "blocks"))
		}
		list[i] = x
	}
	return list
}

func values[T any](g *rapid.Generator[T]) *rapid.Generator[any] {
	return rapid.OneOf(rapid.Map(g, func(v T) any { return v }),
		rapid.Map(rapid.SliceOfN(g, 0, 5), func(v []T) any { return v }))
}

var anyValue = rapid.OneOf(values(rapid.Uint8()), values(rapid.Int8()), values(rapid.Uint16()), values(rapid.Int16()),
	values(rapid.Uint32()), values(rapid.Int32()), values(rapid.Uint64()), values(rapid.Int64()), values(rapid.Float32()),
	values(rapid.Float64()), values(rapid.Bool()), values(rapid.String()),
	values(rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) })))

func genMetadata(t *rapid.T) formats.Metadata {
	m := formats.Metadata{{Name: "general.architecture", Value: "x"}}
	if rapid.Bool().Draw(t, "aligned") {
		m = append(m, formats.Pair{Name: "general.alignment", Value: uint32(1) << rapid.IntRange(0, 10).Draw(t, "alignment")})
	}
	for _, name := range rapid.SliceOfNDistinct(rapid.StringN(1, 9, -1), 0, 8, rapid.ID[string]).Draw(t, "keys") {
		m = append(m, formats.Pair{Name: name, Value: anyValue.Draw(t, "value")})
	}
	return m
}

// TestWrittenIsRead reads what is written: the same tensors in the same order, with the same data and metadata.
func TestWrittenIsRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tensors := genTensors(t)
		o := formats.Options{Metadata: genMetadata(t), MaxShardSize: rapid.Int64Range(0, 2000).Draw(t, "most"),
			MaxTensors: rapid.IntRange(0, 4).Draw(t, "most tensors")}
		if rapid.Bool().Draw(t, "grouped") {
			for i := range tensors {
				o.Groups = append(o.Groups, i/2)
			}
		}
		data := make([][]byte, len(tensors))
		for i, x := range tensors {
			size, err := x.Size()
			require.NoError(t, err)
			data[i] = make([]byte, size)
			for k := range data[i] {
				data[i][k] = byte(rand.N(256))
			}
		}
		l, err := gguf.Format{}.Layout(context.Background(), tensors, o)
		require.NoError(t, err)
		files := write(t, l, data)
		for _, s := range l.Shards {
			total := 0
			for _, i := range s.Tensors {
				total += len(data[i])
			}
			unit := 1
			if o.Groups != nil {
				unit = 2
			}
			if len(s.Tensors) > unit {
				require.True(t, o.MaxShardSize == 0 || int64(total) <= o.MaxShardSize)
				require.True(t, o.MaxTensors == 0 || len(s.Tensors) <= o.MaxTensors)
			}
		}
		c, err := gguf.Format{}.Open(context.Background(), files, "")
		require.NoError(t, err)
		defer c.Close()
		gotInfos, gotData := contents(t, c)
		require.Equal(t, len(tensors), len(gotInfos))
		for i := range tensors {
			require.Equal(t, fmt.Sprint(tensors[i]), fmt.Sprint(gotInfos[i]))
			require.Equal(t, data[i], gotData[i])
		}
		require.Equal(t, len(o.Metadata), len(c.Metadata()))
		for i, p := range o.Metadata {
			got := c.Metadata()[i]
			require.Equal(t, p.Name, got.Name)
			require.Equal(t, fmt.Sprintf("%T %#v", p.Value, p.Value), fmt.Sprintf("%T %#v", got.Value, got.Value))
		}
	})
}

// TestPadding: all between tensors and behind them is zeros, which the frame has.
func TestPadding(t *testing.T) {
	list := []tensor.Info{{Name: "a", DType: tensor.I8, Shape: tensor.Shape{3}}, {Name: "b", DType: tensor.I8,
		Shape: tensor.Shape{32}}, {Name: "c", DType: tensor.F32, Shape: tensor.Shape{2}}}
	l, err := gguf.Format{}.Layout(t.Context(), list, formats.Options{})
	require.NoError(t, err)
	b := write(t, l, [][]byte{[]byte("aaa"), []byte(strings.Repeat("b", 32)), []byte("cccccccc")})["model.gguf"]
	data := "aaa" + strings.Repeat("\x00", 29) + strings.Repeat("b", 32) + "cccccccc" + strings.Repeat("\x00", 24)
	assert.True(t, strings.HasSuffix(string(b), data))
	assert.Zero(t, len(b)%32)
	assert.NotContains(t, string(b), "\xEE")
}

// TestNotices says what is made up and what is left out.
func TestNotices(t *testing.T) {
	m := formats.Metadata{{Name: "general.alignment", Value: "64"}, {Name: "split.no", Value: uint16(3)},
		{Name: "x", Value: "y"}}
	l, err := gguf.Format{}.Layout(t.Context(), nil, formats.Options{Metadata: m})
	require.NoError(t, err)
	assert.Equal(t, []string{`general.architecture is "none": llama.cpp does not load the result as a model`,
		"metadata is left out, since it is a string and no uint32: general.alignment"}, l.Notices)
	c, err := open(l.Shards[0].Header)
	require.NoError(t, err)
	assert.Equal(t, formats.Metadata{{Name: "general.architecture", Value: "none"}, {Name: "x", Value: "y"}}, c.Metadata())
}

func TestLayoutRefuses(t *testing.T) {
	f32 := func(name string, shape ...int64) tensor.Info {
		return tensor.Info{Name: name, DType: tensor.F32, Shape: shape}
	}
	q8 := tensor.Encoding{Name: "q8_0", Elements: 32, Bytes: 34}
	for says, x := range map[string]struct {
		t tensor.Info
		o formats.Options
	}{
		`tensor "w": found the type "U8", expected one that`: {t: tensor.Info{Name: "w", DType: tensor.U8,
			Shape: tensor.Shape{1}}},
		`tensor "w": found the type "q8_9", expected one that`: {t: tensor.Info{Name: "w", Encoding: tensor.Encoding{
			Name: "q8_9", Elements: 32, Bytes: 34}, Shape: tensor.Shape{32}}},
		`tensor "w": found rows of 8 elements`:              {t: tensor.Info{Name: "w", Encoding: q8, Shape: tensor.Shape{4, 8}}},
		`tensor "w": found 5 dimensions, expected at most`:  {t: f32("w", 1, 1, 1, 1, 1)},
		`tensor "w": found the shape [3, 0]`:                {t: f32("w", 3, 0)},
		`tensor "": found a name of 0 bytes`:                {t: f32("", 3)},
		`tensor "a\x00": found a name of 2 bytes`:           {t: f32("a\x00", 3)},
		`found a name of 64 bytes, expected 1 to 63`:        {t: f32(strings.Repeat("n", 64), 3)},
		`metadata "": found an empty name`:                  {f32("w", 1), formats.Options{Metadata: formats.Metadata{{Value: "x"}}}},
		`key "general.alignment": found 3, expected a`:      {f32("w", 1), formats.Options{Metadata: formats.Metadata{{Name: "general.alignment", Value: uint32(3)}}}},
		`metadata "x": found a int, expected a string`:      {f32("w", 1), formats.Options{Metadata: formats.Metadata{{Name: "x", Value: 3}}}},
		`found -1 as the most tensors of a file, expected`:  {f32("w", 1), formats.Options{MaxTensors: -1}},
		`tensor "w": shape [4611686018427387904] of F32: s`: {t: f32("w", math.MaxInt64/2+1)},
	} {
		_, err := gguf.Format{}.Layout(t.Context(), []tensor.Info{x.t}, x.o)
		assert.ErrorContains(t, err, says)
	}
	small := gguf.Format{Limits: gguf.Limits{HeaderBytes: 100}}
	_, err := small.Layout(t.Context(), nil, formats.Options{Metadata: formats.Metadata{{Name: "x",
		Value: strings.Repeat("y", 100)}}})
	require.ErrorIs(t, err, formats.ErrLimit)
	none := gguf.Format{Limits: gguf.Limits{Keys: 1, Tensors: 1}}
	two := formats.Options{Metadata: formats.Metadata{{Name: "x", Value: "y"}, {Name: "z", Value: "y"}}}
	_, err = none.Layout(t.Context(), nil, two)
	require.ErrorIs(t, err, formats.ErrLimit)
	_, err = none.Layout(t.Context(), []tensor.Info{f32("a", 1), f32("b", 1)}, formats.Options{})
	require.ErrorIs(t, err, formats.ErrLimit)
}
