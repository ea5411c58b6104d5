package msgpack

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

func named(names ...string) []tensor.Info {
	var all []tensor.Info
	for _, n := range names {
		all = append(all, tensor.Info{Name: n, DType: tensor.U8, Shape: tensor.Shape{1}})
	}
	return all
}

// Maps have the order in which their keys come first, whatever comes between them.
func TestLayOutOrder(t *testing.T) {
	l, err := LayOut(named("b/x", "a", "b/c/d", "c/y", "b/c/a"))
	require.NoError(t, err)
	assert.Equal(t, []int{0, 2, 4, 1, 3}, l.Order)
	assert.IsIncreasing(t, l.Offsets)
}

func TestLayOutNothing(t *testing.T) {
	l, err := LayOut(nil)
	require.NoError(t, err)
	assert.Equal(t, Layout{Pieces: []formats.Piece{{Offset: 0, Bytes: []byte{0x80}}}, Size: 1}, l)
}

func TestLayOutRefuses(t *testing.T) {
	one := tensor.Shape{1}
	for _, c := range []struct {
		tensors []tensor.Info
		want    string
	}{
		{named("a/b", "a"), `tensor "a": found "a" too, expected no tensor and no folder of tensors of the same name`},
		{named("a/b", "a/b/c"), `tensor "a/b/c": found "a/b" too, expected no tensor and no folder of tensors of the same name`},
		{named("a", "a"), `tensor "a": found "a" too, expected no tensor and no folder of tensors of the same name`},
		{named("a/__msgpack_chunked_array__"), `tensor "a/__msgpack_chunked_array__": found the key ` +
			`__msgpack_chunked_array__ in the name, which flax takes for an array in pieces`},
		{named("\xff"), `tensor "\xff": found a name that is not UTF-8, expected text`},
		{named(strings.Repeat("/", maxDepth)), `tensor "` + strings.Repeat("/", 200) + `"…: found 257 keys in the name, ` +
			`expected at most 256`},
		{named(strings.Repeat("k", maxItem+1)), `tensor "` + strings.Repeat("k", 200) + `"…: found a name of 1048577 bytes, ` +
			`expected at most 1048576`},
		{[]tensor.Info{{Name: "x", DType: tensor.F4, Shape: tensor.Shape{2}}},
			`tensor "x": found F4, expected a type of whole bytes that numpy has`},
		{[]tensor.Info{{Name: "x", Encoding: tensor.Encoding{Name: "q4_K", Elements: 1, Bytes: 1}, Shape: one}},
			`tensor "x": found the encoding "q4_K", expected a dtype`},
		{[]tensor.Info{{Name: "x", DType: tensor.U8, Shape: make(tensor.Shape, 65)}},
			`tensor "x": found 65 dimensions, expected at most the 64 that numpy has`},
	} {
		_, err := LayOut(c.tensors)
		assert.EqualError(t, err, c.want+": not supported")
		assert.ErrorIs(t, err, formats.ErrUnsupported)
	}
}

// There is one name for each list of keys, and one list for each name.
func TestNamesAreReversible(t *testing.T) {
	key := rapid.StringOf(rapid.SampledFrom([]rune(`a\/ä.`)))
	rapid.Check(t, func(t *rapid.T) {
		path := rapid.SliceOfN(key, 1, 4).Draw(t, "path")
		require.Equal(t, path, Split(Join(path)))
		name := key.Draw(t, "name")
		require.Equal(t, name, Join(Split(name)))
	})
	assert.Equal(t, "a/b.c/d", Join([]string{"a", "b.c", "d"}))
	assert.Equal(t, `C:\x`, Join([]string{`C:\x`}))
}
