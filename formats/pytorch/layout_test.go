package pytorch_test

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/pytorch"
	"github.com/lorakit/lorakit/tensor"
)

// write makes a shard: the data, then what is around it, with its checksums.
func write(t require.TestingT, path string, s formats.Shard, data func(i int) []byte) {
	file, err := os.Create(path)
	require.NoError(t, err)
	defer file.Close()
	f := holed{file, 1 << 32}
	if s.Size > 1<<32 {
		f.hole = 1 << 20
	}
	require.NoError(t, f.Truncate(s.Size))
	for k, i := range s.Tensors {
		_, err := f.WriteAt(data(i), s.Offsets[k])
		require.NoError(t, err)
	}
	pieces, err := s.Sealed(f)
	require.NoError(t, err)
	for _, p := range pieces {
		_, err := f.WriteAt(p.Bytes, p.Offset)
		require.NoError(t, err)
	}
}

// holed is a file that nothing was written to between hole and 4 GiB: that need not be read.
type holed struct {
	*os.File
	hole int64
}

func (f holed) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.hole && off+int64(len(p)) < 1<<32 {
		clear(p)
		return len(p), nil
	}
	return f.File.ReadAt(p, off)
}

// withoutID takes out of a file of PyTorch the last entry, the hash that is not written here, and what counts the
// entries. What is left are entries, and their directory.
func withoutID(t testing.TB, file []byte) (entries, directory []byte) {
	t.Helper()
	headers := bytes.LastIndex(file, []byte("PK\x03\x04"))
	require.Contains(t, string(file[headers:headers+200]), "/.data/serialization_id")
	first := bytes.Index(file, []byte("PK\x01\x02"))
	last := bytes.LastIndex(file, []byte("PK\x01\x02"))
	return file[:headers], file[first:last]
}

// TestFilesAreTorchs lays out what PyTorch saved again, and holds the files against each other, byte for byte.
func TestFilesAreTorchs(t *testing.T) {
	for _, name := range []string{"dtypes.pt", "float4.pt", "empty.pt", "layout.bin", "adapter/adapter_model.bin"} {
		path := filepath.Join(fixtures, name)
		c := open(t, path)
		var infos []tensor.Info
		for _, x := range c.Tensors() {
			infos = append(infos, x.Info)
		}
		l, err := pytorch.Format{}.Layout(context.Background(), infos, formats.Options{SingleFile: filepath.Base(name)})
		require.NoError(t, err, name)
		require.Len(t, l.Shards, 1)
		require.Empty(t, l.Extra)
		require.Empty(t, l.Notices)
		mine := filepath.Join(t.TempDir(), filepath.Base(name))
		write(t, mine, l.Shards[0], func(i int) []byte { return contents(t, c.Tensors()[i]) })

		got := must(os.ReadFile(mine))
		wantEntries, wantDirectory := withoutID(t, must(os.ReadFile(path)))
		require.Greater(t, len(got), len(wantEntries)+len(wantDirectory))
		assert.Equal(t, wantEntries, got[:len(wantEntries)], name)
		assert.Equal(t, wantDirectory, got[len(wantEntries):len(wantEntries)+len(wantDirectory)], name)
		assert.Equal(t, len(wantEntries)+len(wantDirectory)+56+20+22, len(got), "%s: the three records at the end", name)
		unzip(t, mine, len(infos)+5)
	}
}

// unzip reads every entry by the standard library, which checks the CRC-32.
func unzip(t require.TestingT, path string, entries int) {
	z, err := zip.OpenReader(path)
	require.NoError(t, err)
	defer z.Close()
	require.Len(t, z.File, entries)
	for _, f := range z.File {
		r, err := f.Open()
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, r)
		require.NoError(t, err, f.Name)
		at, err := f.DataOffset()
		require.NoError(t, err)
		require.Zero(t, at%64, f.Name)
	}
}

// TestZip64IsTorchs holds a file with an entry of more than 4 GiB, and some behind it, against all that is not data in
// PyTorch's.
func TestZip64IsTorchs(t *testing.T) {
	if testing.Short() {
		t.Skip("sums 4 GiB of nothing")
	}
	var torchs []formats.Piece
	require.NoError(t, json.Unmarshal(must(os.ReadFile(filepath.Join(fixtures, "zip64.json"))), &torchs))
	require.Len(t, torchs, 2)
	infos := []tensor.Info{
		{Name: "first", DType: tensor.I8, Shape: tensor.Shape{3}},
		{Name: "large", DType: tensor.I16, Shape: tensor.Shape{1<<31 + 32}},
		{Name: "next", DType: tensor.I8, Shape: tensor.Shape{2}}, {Name: "empty", DType: tensor.I8, Shape: tensor.Shape{0}},
	}
	l, err := pytorch.Format{}.Layout(context.Background(), infos, formats.Options{SingleFile: "archive.pt"})
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "archive.pt")
	write(t, path, l.Shards[0], func(i int) []byte { return []byte{1, 1, 1}[:[]int{3, 0, 2, 0}[i]] })

	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	before := make([]byte, len(torchs[0].Bytes))
	_, err = f.ReadAt(before, 0)
	require.NoError(t, err)
	assert.Equal(t, torchs[0].Bytes, before)
	behind := make([]byte, l.Shards[0].Size-torchs[1].Offset)
	_, err = f.ReadAt(behind, torchs[1].Offset)
	require.NoError(t, err)
	entries, directory := withoutID(t, torchs[1].Bytes)
	assert.Equal(t, entries, behind[:len(entries)])
	assert.Equal(t, directory, behind[len(entries):len(entries)+len(directory)])

	z, err := zip.OpenReader(path)
	require.NoError(t, err)
	require.Equal(t, uint64(1<<32+64), z.File[5].UncompressedSize64)
	require.NoError(t, z.Close())
	got := byName(open(t, path))
	require.Len(t, got, 4)
	assert.Equal(t, int64(1<<32+64), got["large"].Bytes)
	assert.Equal(t, []byte{1, 1}, contents(t, got["next"]))
}

// genInfos draws tensors with distinct names.
func genInfos(t *rapid.T) []tensor.Info {
	names := rapid.SliceOfNDistinct(rapid.OneOf(rapid.StringN(0, 12, -1), rapid.StringMatching(`[a-c](\.[0-9])?`)), 0, 40,
		rapid.ID[string]).Draw(t, "names")
	var all []tensor.Info
	for _, n := range names {
		x := tensor.Info{
			Name:  strings.ToValidUTF8(n, "?"),
			DType: tensor.DType(rapid.IntRange(int(tensor.F64), int(tensor.C64)).Draw(t, "dtype")),
			Shape: rapid.SliceOfN(rapid.Int64Range(0, 9), 0, 5).Draw(t, "shape"),
		}
		if x.DType == tensor.F4 {
			x.Shape = append(x.Shape, 4)
		}
		if x.DType.Torch() != "" && !slices.ContainsFunc(all, func(y tensor.Info) bool { return y.Name == x.Name }) {
			all = append(all, x)
		}
	}
	return all
}

// TestRoundTrip writes what Layout says and opens it: the same tensors come back in their order, each with its own
// bytes.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tensors := genInfos(rt)
		o := formats.Options{MaxShardSize: rapid.Int64Range(0, 5000).Draw(rt, "max")}
		if rapid.Bool().Draw(rt, "grouped") {
			o.Groups = rapid.SliceOfN(rapid.IntRange(-2, 5), len(tensors), len(tensors)).Draw(rt, "groups")
		}
		dir, err := os.MkdirTemp(t.TempDir(), "")
		require.NoError(rt, err)
		l, err := pytorch.Format{}.Layout(context.Background(), tensors, o)
		require.NoError(rt, err)
		// A plan is saved and read back.
		b, err := json.Marshal(l)
		require.NoError(rt, err)
		l = formats.Layout{}
		require.NoError(rt, json.Unmarshal(b, &l))
		again, err := json.Marshal(l)
		require.NoError(rt, err)
		require.Equal(rt, string(b), string(again))

		data := func(i int) []byte {
			n, err := tensors[i].Size()
			require.NoError(rt, err)
			b := make([]byte, n)
			for k := range b {
				b[k] = byte(i + k)
			}
			return b
		}
		var order []int
		for i, s := range l.Shards {
			want := "pytorch_model.bin"
			if len(l.Shards) > 1 {
				want = fmt.Sprintf("pytorch_model-%05d-of-%05d.bin", i+1, len(l.Shards))
			}
			require.Equal(rt, want, s.Name)
			for _, at := range s.Offsets {
				require.Zero(rt, at%64)
			}
			path := filepath.Join(dir, s.Name)
			write(rt, path, s, data)
			unzip(rt, path, len(s.Tensors)+5)
			order = append(order, s.Tensors...)
		}
		require.Len(rt, order, len(tensors))
		for _, f := range l.Extra {
			require.Equal(rt, "pytorch_model.bin.index.json", f.Name)
			require.NoError(rt, os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o644))
		}
		c, err := formatstest.Open(pytorch.Format{}, dir)
		require.NoError(rt, err)
		defer c.Close()
		require.Len(rt, c.Tensors(), len(tensors))
		for k, got := range c.Tensors() {
			want := tensors[order[k]]
			require.Equal(rt, want.Name, got.Name)
			require.Equal(rt, want.DType, got.DType)
			require.True(rt, slices.Equal(want.Shape, got.Shape))
			b := make([]byte, got.Bytes)
			_, err := got.ReadAt(b, 0)
			require.True(rt, err == nil || len(b) == 0)
			require.Equal(rt, data(order[k]), b)
		}
		require.Equal(rt, formats.Texts(map[string]string{"format": "pt"}), c.Metadata())
	})
}

// TestMany goes past the batches of Python's pickler and the 16 bits of a zip archive's count.
func TestMany(t *testing.T) {
	for _, n := range []int{1000, 1001, 65_600} {
		infos := make([]tensor.Info, n)
		for i := range infos {
			infos[i] = tensor.Info{Name: fmt.Sprintf("layers.%d.weight", i), DType: tensor.U8, Shape: tensor.Shape{1}}
		}
		l, err := pytorch.Format{}.Layout(context.Background(), infos, formats.Options{SingleFile: "x.pth"})
		require.NoError(t, err)
		path := filepath.Join(t.TempDir(), "x.pth")
		write(t, path, l.Shards[0], func(i int) []byte { return []byte{byte(i)} })
		c := open(t, path)
		require.Len(t, c.Tensors(), n)
		assert.Equal(t, infos[n-1], c.Tensors()[n-1].Info)
		assert.Equal(t, []byte{byte(n - 1)}, contents(t, c.Tensors()[n-1]))
	}
}

// TestFolderInArchive holds the name of the folder in a file against what PyTorch calls it.
func TestFolderInArchive(t *testing.T) {
	for file, want := range map[string]string{
		"a.bin": "a", "pytorch_model-00001-of-00002.bin": "pytorch_model-00001-of-00002", "a.b.pt": "a.b", "a": "a",
		"c d.pth": "c d",
		`x\y.pt`:  "y", "modèle.pt": "archive", ".pt": "archive", "": "pytorch_model",
	} {
		l, err := pytorch.Format{}.Layout(context.Background(), nil, formats.Options{SingleFile: file})
		require.NoError(t, err)
		h := l.Shards[0].Header
		n := binary.LittleEndian.Uint16(h[26:])
		assert.Equal(t, want+"/data.pkl", string(h[30:30+n]), file)
	}
}

func TestIndexIsTransformers(t *testing.T) {
	l, err := pytorch.Format{}.Layout(context.Background(), []tensor.Info{
		{Name: "é", DType: tensor.BF16, Shape: tensor.Shape{2, 2}}, {Name: "a", DType: tensor.F32, Shape: tensor.Shape{3}},
	}, formats.Options{MaxShardSize: 8})
	require.NoError(t, err)
	require.Len(t, l.Extra, 1)
	assert.Equal(t, `{
  "metadata": {
    "total_parameters": 7,
    "total_size": 20
  },
  "weight_map": {
    "a": "pytorch_model-00001-of-00002.bin",
    "\u00e9": "pytorch_model-00002-of-00002.bin"
  }
}
`, string(l.Extra[0].Data))
}

func TestLayoutRefuses(t *testing.T) {
	one := func(d tensor.DType, shape ...int64) []tensor.Info {
		return []tensor.Info{{Name: "x", DType: d, Shape: shape}}
	}
	var many []tensor.Info
	for i := range 20 {
		many = append(many, tensor.Info{Name: fmt.Sprint(i), DType: tensor.I8, Shape: tensor.Shape{1}})
	}
	for text, c := range map[string]struct {
		tensors []tensor.Info
		limits  pytorch.Limits
		kind    error
	}{
		`tensor "x": found dtype F6_E3M2, expected one that PyTorch has: F64, F32,`: {one(tensor.F6E3M2, 4), pytorch.Limits{},
			pytorch.ErrUnsupported},
		`tensor "x": found shape [2, 3] of F4, expected a last dimension of pairs`: {one(tensor.F4, 2, 3), pytorch.Limits{},
			pytorch.ErrUnsupported},
		`tensor "x": found dtype DType(0)`: {one(0, 4), pytorch.Limits{},
			pytorch.ErrUnsupported},
		`tensor "x": found 65 dimensions, expected at most 64`: {one(tensor.I8,
			slices.Repeat([]int64{1}, 65)...), pytorch.Limits{}, formats.ErrLimit},
		`tensor "x": shape [0, 4294967296, 4294967296]`: {one(tensor.I8, 0, 1<<32, 1<<32),
			pytorch.Limits{}, tensor.ErrOverflow},
		`tensor "x": `:                         {one(tensor.F64, math.MaxInt64/4), pytorch.Limits{}, tensor.ErrOverflow},
		`x.bin: found a pickle of`:             {many, pytorch.Limits{PickleBytes: 100}, formats.ErrLimit},
		`smaller shards have smaller pickles`:  {many, pytorch.Limits{Memory: 2000}, formats.ErrLimit},
		`x.bin: found 25 zip entries`:          {many, pytorch.Limits{Entries: 24}, formats.ErrLimit},
		`expected at most 25 in 100`:           {many, pytorch.Limits{Entries: 25, DirectoryBytes: 100}, formats.ErrLimit},
		`found a name of 1 bytes, expected at`: {one(tensor.I8, 1), pytorch.Limits{StringBytes: -1}, formats.ErrLimit},
		`found it twice`:                       {append(one(tensor.I8, 1), one(tensor.I8, 1)...), pytorch.Limits{}, nil},
		`that the format cannot hold`:          {[]tensor.Info{{Name: "\xff", DType: tensor.I8}}, pytorch.Limits{}, nil},
	} {
		_, err := pytorch.Format{Limits: c.limits}.Layout(context.Background(), c.tensors,
			formats.Options{SingleFile: "x.bin"})
		if assert.ErrorContains(t, err, text) && c.kind != nil {
			assert.ErrorIs(t, err, c.kind)
		}
	}
}

func TestMetadataIsLeftOutWithANotice(t *testing.T) {
	l, err := pytorch.Format{}.Layout(context.Background(), nil,
		formats.Options{Metadata: formats.Texts(map[string]string{"format": "pt", "pytorch.ignored": "x"})})
	require.NoError(t, err)
	assert.Empty(t, l.Notices)
	l, err = pytorch.Format{}.Layout(context.Background(), nil,
		formats.Options{Metadata: formats.Texts(map[string]string{"format": "pt", "epoch": "3", "a\n": ""})})
	require.NoError(t, err)
	assert.Equal(t, []string{`metadata is left out, pytorch files have no place for it: "a\n", "epoch"`}, l.Notices)
}
