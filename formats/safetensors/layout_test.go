package safetensors_test

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/tensor"
)

func layout(t testing.TB, tensors []tensor.Info, o formats.Options) formats.Layout {
	l, err := safetensors.Format{}.Layout(context.Background(), tensors, o)
	require.NoError(t, err)
	return l
}

// golden is a tensor as the fixtures spell it: [name, dtype, shape].
type golden [3]any

func infos(t testing.TB, all []golden) []tensor.Info {
	out := make([]tensor.Info, len(all))
	for i, g := range all {
		d, err := tensor.ParseDType(g[1].(string))
		require.NoError(t, err)
		out[i] = tensor.Info{Name: g[0].(string), DType: d, Shape: tensor.Shape{}}
		for _, n := range g[2].([]any) {
			out[i].Shape = append(out[i].Shape, int64(n.(float64)))
		}
	}
	return out
}

func TestHeaderIsTheReferences(t *testing.T) {
	for i, c := range lines[struct {
		Metadata map[string]string `json:"metadata"`
		Tensors  []golden          `json:"tensors"`
		Header   []byte            `json:"header"`
	}](t, "testdata/layout.jsonl") {
		l := layout(t, infos(t, c.Tensors), formats.Options{Metadata: formats.Texts(c.Metadata)})
		require.Len(t, l.Shards, 1)
		assert.Equal(t, "model.safetensors", l.Shards[0].Name)
		assert.Equal(t, string(c.Header), string(l.Shards[0].Header), "line %d", i+1)
		assert.Empty(t, l.Extra)
	}
}

// The reference's writer in Python knows no F6, so their place among the types comes from its source: below the bytes,
// above F4.
func TestSixBitsStandBelowBytes(t *testing.T) {
	var all []tensor.Info
	for _, d := range []tensor.DType{tensor.Bool, tensor.F4, tensor.F6E2M3, tensor.F6E3M2, tensor.U8} {
		all = append(all, tensor.Info{Name: d.String(), DType: d, Shape: tensor.Shape{4}})
	}
	assert.Equal(t, []int{4, 3, 2, 1, 0}, layout(t, all, formats.Options{}).Shards[0].Tensors)
}

func TestShardsAreTheReferences(t *testing.T) {
	sharded := 0
	for i, c := range lines[struct {
		Tensors    []golden          `json:"tensors"`
		Max        int64             `json:"max"`
		Shards     map[string][]byte `json:"shards"`
		Index      *string           `json:"index"`
		Parameters int64             `json:"parameters"`
	}](t, "testdata/index.jsonl") {
		tensors := infos(t, c.Tensors)
		l := layout(t, tensors, formats.Options{MaxShardSize: c.Max,
			Metadata: formats.Texts(map[string]string{"format": "pt"}), Parameters: c.Parameters})
		got := map[string][]byte{}
		for _, s := range l.Shards {
			got[s.Name] = s.Header
		}
		require.Equal(t, c.Shards, got, "line %d", i+1)
		if c.Index == nil {
			assert.Empty(t, l.Extra)
			continue
		}
		sharded++
		require.Len(t, l.Extra, 1)
		assert.Equal(t, "model.safetensors.index.json", l.Extra[0].Name)
		assert.Equal(t, *c.Index, string(l.Extra[0].Data), "line %d", i+1)
	}
	assert.Greater(t, sharded, 10)
}

// genInfos draws tensors with distinct names.
func genInfos(t *rapid.T) []tensor.Info {
	names := rapid.SliceOfNDistinct(rapid.OneOf(rapid.StringN(0, 12, -1), rapid.StringMatching(`[a-c](\.[0-9])?`)), 0, 20,
		rapid.ID[string]).Draw(t, "names")
	all := make([]tensor.Info, 0, len(names))
	for _, n := range names {
		x := tensor.Info{
			Name:  strings.ToValidUTF8(n, "?"),
			DType: tensor.DType(rapid.IntRange(int(tensor.F64), int(tensor.C64)).Draw(t, "dtype")),
			Shape: rapid.SliceOfN(rapid.Int64Range(0, 9), 0, 4).Draw(t, "shape"),
		}
		if x.DType.Bits()%8 != 0 {
			x.Shape = append(x.Shape, 4)
		}
		if x.Name != "__metadata__" && !slices.ContainsFunc(all, func(y tensor.Info) bool { return y.Name == x.Name }) {
			all = append(all, x)
		}
	}
	return all
}

// TestListThatIsNoText is left out, and told of.
func TestListThatIsNoText(t *testing.T) {
	l := layout(t, nil, formats.Options{Metadata: formats.Metadata{{Name: "b", Value: []string{"x", "ö"}},
		{Name: "c", Value: []string{"", "\xc3"}}}})
	assert.Equal(t, []string{`metadata is left out, since it is a list with a string that is no UTF-8: "c"`}, l.Notices)
	assert.Contains(t, string(l.Shards[0].Header), `{"__metadata__":{"b":"[\"x\", \"ö\"]"}}`)
}

// TestRoundTrip writes what Layout says and opens it: the same tensors come back, each with its own bytes, and the
// rules of the split hold.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tensors := genInfos(rt)
		o := formats.Options{
			MaxShardSize: rapid.Int64Range(0, 500).Draw(rt, "max"),
			MaxTensors:   rapid.IntRange(0, 5).Draw(rt, "max tensors"),
		}
		metadata := map[string]string{}
		for k, v := range rapid.MapOfN(rapid.String(), rapid.String(), 0, 3).Draw(rt, "metadata") {
			metadata[strings.ToValidUTF8(k, "?")] = strings.ToValidUTF8(v, "?")
		}
		o.Metadata = formats.Texts(metadata)
		slices.Reverse(o.Metadata) // it is written in the order of names
		if rapid.Bool().Draw(rt, "grouped") {
			o.Groups = rapid.SliceOfN(rapid.IntRange(-2, 5), len(tensors), len(tensors)).Draw(rt, "groups")
		}
		dir, err := os.MkdirTemp(t.TempDir(), "")
		require.NoError(rt, err)
		l := layout(t, tensors, o)
		shardOf := map[int]int{} // from a group to its shard
		placed := map[string][2]any{}
		for i, s := range l.Shards {
			data := slices.Clone(s.Header)
			require.Zero(rt, len(data)%8)
			sum := int64(0)
			units := map[int]bool{}
			for j, k := range s.Tensors {
				size, err := tensors[k].Size()
				require.NoError(rt, err)
				require.Equal(rt, int64(len(data)), s.Offsets[j])
				data = append(data, slices.Repeat([]byte{byte(k)}, int(size))...)
				sum += size
				unit := -10 - k
				if o.Groups != nil {
					unit = o.Groups[k]
				}
				units[unit] = true
				if other, ok := shardOf[unit]; ok {
					require.Equal(rt, other, i, "group %d is torn apart", unit)
				}
				shardOf[unit] = i
				placed[tensors[k].Name] = [2]any{s.Name, byte(k)}
			}
			require.Equal(rt, s.Size, int64(len(data)))
			if o.MaxShardSize > 0 && sum > o.MaxShardSize {
				require.Len(rt, units, 1, "a shard of %d bytes has more than one unit", sum)
			}
			if o.MaxTensors > 0 && len(s.Tensors) > o.MaxTensors {
				require.Len(rt, units, 1, "a shard of %d tensors has more than one unit", len(s.Tensors))
			}
			require.NoError(rt, os.WriteFile(filepath.Join(dir, s.Name), data, 0o644))
		}
		require.Len(rt, placed, len(tensors))
		for _, f := range l.Extra {
			require.NoError(rt, os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o644))
		}

		c, err := formatstest.Open(safetensors.Format{}, dir)
		require.NoError(rt, err)
		defer c.Close()
		require.Len(rt, c.Tensors(), len(tensors))
		for _, got := range c.Tensors() {
			want := placed[got.Name]
			k := int(want[1].(byte))
			require.Equal(rt, tensors[k].DType, got.DType)
			require.True(rt, slices.Equal(tensors[k].Shape, got.Shape))
			require.Equal(rt, want[0], got.File)
			b := make([]byte, got.Bytes)
			_, err := got.ReadAt(b, 0)
			require.NoError(rt, err)
			require.Equal(rt, slices.Repeat([]byte{byte(k)}, len(b)), b)
		}
		if len(o.Metadata) > 0 {
			require.Equal(rt, formats.Texts(metadata), c.Metadata())
		}
		require.Len(rt, c.Files(), len(l.Shards)+len(l.Extra))
	})
}

func bytesOf(name string, n int64) tensor.Info {
	return tensor.Info{Name: name, DType: tensor.U8, Shape: tensor.Shape{n}}
}

func TestGroupsStayTogether(t *testing.T) {
	tensors := []tensor.Info{bytesOf("a", 4), bytesOf("b", 3), bytesOf("a.absmax", 2), bytesOf("c", 1),
		bytesOf("b.absmax", 9)}
	l := layout(t, tensors, formats.Options{MaxShardSize: 8, Groups: []int{7, 0, 7, 1, 0}})
	var got [][]int
	for _, s := range l.Shards {
		got = append(got, s.Tensors)
	}
	// b with its companion is larger than a shard, and so stands alone.
	assert.Equal(t, [][]int{{1, 4}, {0, 2, 3}}, got)
}

func TestSingleFile(t *testing.T) {
	l := layout(t, []tensor.Info{bytesOf("a", 4), bytesOf("b", 4)},
		formats.Options{MaxShardSize: 4, SingleFile: "adapter_model.safetensors"})
	require.Len(t, l.Shards, 1)
	assert.Equal(t, "adapter_model.safetensors", l.Shards[0].Name)
	assert.Empty(t, l.Extra)
}

func TestIndexCountsParameters(t *testing.T) {
	l := layout(t, []tensor.Info{bytesOf("a", 4), {Name: "b", DType: tensor.F32, Shape: tensor.Shape{2, 3}}},
		formats.Options{MaxShardSize: 4})
	assert.Contains(t, string(l.Extra[0].Data), "\"total_parameters\": 10,\n    \"total_size\": 28\n")
}

func TestLayoutOfHugeTensors(t *testing.T) {
	tensors := []tensor.Info{
		{Name: "a", DType: tensor.F4, Shape: tensor.Shape{1 << 31, 1 << 20}},
		{Name: "b", DType: tensor.F64, Shape: tensor.Shape{1 << 40}},
	}
	l := layout(t, tensors, formats.Options{})
	n := int64(len(l.Shards[0].Header))
	assert.Equal(t, []int64{n, n + 8<<40}, l.Shards[0].Offsets)
	assert.Equal(t, n+8<<40+1<<50, l.Shards[0].Size)
}

func TestLayoutRefuses(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	var many []tensor.Info
	for i := range 96 {
		many = append(many, bytesOf(fmt.Sprint(long, i), 0))
	}
	for what, c := range map[string]struct {
		tensors []tensor.Info
		options formats.Options
		kind    error
	}{
		"twice":          {tensors: []tensor.Info{bytesOf("a", 1), bytesOf("a", 1)}},
		"__metadata__":   {tensors: []tensor.Info{bytesOf("__metadata__", 1)}},
		"no UTF-8":       {tensors: []tensor.Info{bytesOf("a\xff", 1)}},
		"metadata":       {options: formats.Options{Metadata: formats.Metadata{{Name: "a", Value: "\xff"}}}},
		"metadata name":  {options: formats.Options{Metadata: formats.Metadata{{Name: "\xff", Value: "a"}}}},
		"half a byte":    {tensors: []tensor.Info{{Name: "a", DType: tensor.F4, Shape: tensor.Shape{3}}}},
		"no dtype":       {tensors: []tensor.Info{{Name: "a", Shape: tensor.Shape{3}}}},
		"negative":       {tensors: []tensor.Info{bytesOf("a", -1)}},
		"overflow":       {tensors: []tensor.Info{bytesOf("a", math.MaxInt64)}, kind: tensor.ErrOverflow},
		"sum overflows":  {tensors: []tensor.Info{bytesOf("a", 1<<62), bytesOf("b", 1<<62)}, kind: tensor.ErrOverflow},
		"groups":         {tensors: []tensor.Info{bytesOf("a", 1)}, options: formats.Options{Groups: []int{}}},
		"negative limit": {options: formats.Options{MaxShardSize: -1}},
		"long header":    {tensors: many, kind: formats.ErrLimit},
	} {
		_, err := safetensors.Format{}.Layout(context.Background(), c.tensors, c.options)
		if assert.Error(t, err, what) {
			assert.Less(t, len(err.Error()), 1000, what)
			if c.kind != nil {
				assert.ErrorIs(t, err, c.kind, what)
			}
		}
	}
}

// The reference writes something else here, which is no JSON.
func TestEmptyMetadataWithoutTensors(t *testing.T) {
	l := layout(t, nil, formats.Options{Metadata: formats.Metadata{}})
	assert.Equal(t, "\x18\x00\x00\x00\x00\x00\x00\x00{\"__metadata__\":{}}     ", string(l.Shards[0].Header))
}
