package safetensors_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

// file builds a file from its header and data.
func file(header string, data ...byte) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), data...)
}

// named builds a file of one-byte tensors.
func named(names ...string) []byte {
	var h []string
	var data []byte
	for i, n := range names {
		h = append(h, fmt.Sprintf(`%q:{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}`, n, i, i+1))
		data = append(data, n[0])
	}
	return file("{"+strings.Join(h, ",")+"}", data...)
}

// folder writes files, given as names and contents in turn.
func folder(t testing.TB, files ...any) string {
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		var b []byte
		switch v := files[i+1].(type) {
		case string:
			b = []byte(v)
		case []byte:
			b = v
		}
		require.NoError(t, os.WriteFile(filepath.Join(dir, files[i].(string)), b, 0o644))
	}
	return dir
}

func open(t testing.TB, path string) formats.Container {
	c, err := formatstest.Open(safetensors.Format{}, path)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

// names lists the tensors of a checkpoint as "name in file".
func names(c formats.Container) (s []string) {
	for _, x := range c.Tensors() {
		s = append(s, x.Name+" in "+x.File)
	}
	return s
}

const (
	single = "model.safetensors"
	index  = "model.safetensors.index.json"
	shard1 = "model-00001-of-00002.safetensors"
	shard2 = "model-00002-of-00002.safetensors"
)

func TestOpenFile(t *testing.T) {
	dir := folder(t, "any.name",
		file(
			`{"__metadata__":{"format":"pt"},"b":{"dtype":"F4","shape":[2,3],"data_offsets":[2,5]},"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}`, 1, 2, 3, 4, 5))
	path := filepath.Join(dir, "any.name")
	c := open(t, path)
	assert.Equal(t, formats.Texts(map[string]string{"format": "pt"}), c.Metadata())
	assert.Equal(t, []string{"any.name"}, c.Files())
	require.Len(t, c.Tensors(), 2)
	a, b := c.Tensors()[0], c.Tensors()[1]
	assert.Equal(t, tensor.Info{Name: "a", DType: tensor.BF16, Shape: tensor.Shape{}}, a.Info)
	assert.Equal(t, tensor.Info{Name: "b", DType: tensor.F4, Shape: tensor.Shape{2, 3}}, b.Info)
	assert.Equal(t, "any.name", b.File)
	_, kernel := storage.OSFile(b.Data)
	assert.True(t, kernel, "so that the kernel can copy it")
	got := make([]byte, 3)
	_, err := b.ReadAt(got, 0)
	require.NoError(t, err)
	assert.Equal(t, []byte{3, 4, 5}, got)

	require.NoError(t, os.Truncate(path, b.Offset+1))
	_, err = b.ReadAt(got, 0)
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

func TestOpenFolder(t *testing.T) {
	map1 := `{"metadata":{"total_size":3},"weight_map":{"b":"` + shard2 + `","a":"` + shard1 + `"}}`
	for what, c := range map[string]struct {
		files []any
		want  []string
	}{
		"single": {[]any{single, named("b", "a"), "config.json", "{}"},
			[]string{"b in " + single, "a in " + single}},
		"shards": {[]any{index, map1, shard2, named("b"), shard1, named("a")},
			[]string{"a in " + shard1, "b in " + shard2}},
		"single before index": {[]any{index, map1, single, named("x"), shard2, named("b"), shard1, named("a")},
			[]string{"x in " + single}},
		"index before others": {[]any{index, map1, "consolidated.safetensors", named("x"), shard2, named("b"), shard1,
			named("a")}, []string{"a in " + shard1, "b in " + shard2}},
		"model before adapter": {[]any{"adapter_model.safetensors", named("x"), single, named("a")},
			[]string{"a in " + single}},
		"adapter": {[]any{"adapter_model.safetensors", named("x"), "other.safetensors", named("a")},
			[]string{"x in adapter_model.safetensors"}},
		"diffusers": {[]any{"diffusion_pytorch_model.safetensors", named("x")},
			[]string{"x in diffusion_pytorch_model.safetensors"}},
		"diffusers in shards": {[]any{"diffusion_pytorch_model.safetensors.index.json", map1, shard1, named("a"), shard2,
			named("b")}, []string{"a in " + shard1, "b in " + shard2}},
		"variant": {[]any{"model.fp16.safetensors", named("x")}, []string{"x in model.fp16.safetensors"}},
		"variant in shards": {[]any{"model.safetensors.index.fp16.json", map1, shard1, named("a"), shard2, named("b")},
			[]string{"a in " + shard1, "b in " + shard2}},
		"one shard, no index": {[]any{"model-00001-of-00001.safetensors", named("x")},
			[]string{"x in model-00001-of-00001.safetensors"}},
		"left by a Mac": {[]any{"._w.safetensors", "rubbish", "w.safetensors", named("x")},
			[]string{"x in w.safetensors"}},
		"unlisted tensor": {[]any{index, map1, shard2, named("b", "z"), shard1, named("a")},
			[]string{"a in " + shard1, "b in " + shard2, "z in " + shard2}},
		"index without metadata": {[]any{index, ` {"weight_map":{"a":"w"}} `, "w", named("a")}, []string{"a in w"}},
		"escapes in index": {[]any{index, `{"weight_map":{"\u0061":"\u0077"},"x":[1e999,{"y":1,"y":2}]}`, "w",
			named("a")}, []string{"a in w"}},
	} {
		dir := folder(t, c.files...)
		got, err := formatstest.Open(safetensors.Format{}, dir)
		if assert.NoError(t, err, what) {
			assert.Equal(t, c.want, names(got), what)
			assert.NoError(t, got.Close())
		}
	}
	// The index can be named itself, and its folder be the current one.
	dir := folder(t, index, map1, shard2, named("b"), shard1, named("a"))
	want := []string{"a in " + shard1, "b in " + shard2}
	c := open(t, filepath.Join(dir, index))
	assert.Equal(t, want, names(c))
	assert.Equal(t, []string{shard1, shard2, index}, c.Files())
	t.Chdir(dir)
	assert.Equal(t, want, names(open(t, index)))
	assert.Equal(t, want, names(open(t, ".")))
}

func TestOpenFolderRefuses(t *testing.T) {
	weights := func(s string) string { return `{"weight_map":{` + s + `}}` }
	for what, c := range map[string]struct {
		kind  error
		says  string
		files []any
	}{
		"nothing": {fs.ErrNotExist, "no .safetensors file", []any{"config.json", "{}"}},
		"two": {formats.ErrMalformed, `"a.safetensors", "b.safetensors"`,
			[]any{"a.safetensors", named("a"), "b.safetensors", named("b")}},
		"two variants": {formats.ErrMalformed, "model.fp16.safetensors",
			[]any{"model.fp16.safetensors", named("a"), "model.bf16.safetensors", named("b")}},
		"shards, no index": {fs.ErrNotExist, "expected an index", []any{shard1, named("a"), shard2, named("b")}},
		"missing shard": {fs.ErrNotExist, shard2,
			[]any{index, weights(`"a":"` + shard1 + `","b":"` + shard2 + `"`), shard1, named("a")}},
		"wrong shard": {formats.ErrMalformed, `tensor "b": found it in "` + shard2 + `", expected it in "` + shard1,
			[]any{index, weights(`"a":"` + shard1 + `","b":"` + shard1 + `","c":"` + shard2 + `"`), shard1, named("a"), shard2,
				named("b", "c")}},
		"in no shard": {formats.ErrMalformed, `tensor "b": found it in no shard`,
			[]any{index, weights(`"a":"` + shard1 + `","b":"` + shard1 + `"`), shard1, named("a")}},
		"in two shards": {formats.ErrMalformed, `tensor "a": found it in "` + shard1 + `" too`,
			[]any{index, weights(`"a":"` + shard1 + `","b":"` + shard2 + `"`), shard1, named("a"), shard2, named("b", "a")}},
		"broken shard": {formats.ErrMalformed, shard2,
			[]any{index, weights(`"a":"` + shard1 + `","b":"` + shard2 + `"`), shard1, named("a"), shard2, named("b")[:20]}},
		"same tensor twice": {formats.ErrMalformed, `tensor "a"`,
			[]any{index, weights(`"a":"w","\u0061":"w"`), "w", named("a")}},
		"weight_map twice": {formats.ErrMalformed, "weight_map twice",
			[]any{index, `{"weight_map":{"a":"w"},"weight_map":{"a":"w"}}`, "w", named("a")}},
		"no weight_map":       {formats.ErrMalformed, "weight_map", []any{index, `{"metadata":{}}`}},
		"empty weight_map":    {formats.ErrMalformed, "weight_map", []any{index, weights("")}},
		"no JSON":             {formats.ErrMalformed, index, []any{index, "{"}},
		"empty":               {formats.ErrMalformed, index, []any{index, ""}},
		"array":               {formats.ErrMalformed, "an array", []any{index, "[]"}},
		"weight_map an array": {formats.ErrMalformed, "an array", []any{index, `{"weight_map":["w"]}`}},
		"file a number":       {formats.ErrMalformed, `tensor "a": found a number`, []any{index, weights(`"a":1`)}},
		"more JSON":           {formats.ErrMalformed, "more JSON", []any{index, weights(`"a":"w"`) + "{}", "w", named("a")}},
		"bad UTF-8":           {formats.ErrMalformed, "UTF-8", []any{index, weights("\"a\":\"\xff\"")}},
		"lone surrogate":      {formats.ErrMalformed, "", []any{index, weights(`"a":"\ud800"`)}},
		"BOM":                 {formats.ErrMalformed, "", []any{index, "\ufeff" + weights(`"a":"w"`), "w", named("a")}},
		"deep":                {formats.ErrMalformed, "", []any{index, strings.Repeat(`{"a":`, 100000)}},
		"up":                  {formats.ErrOutside, `"../x"`, []any{index, weights(`"a":"../x"`)}},
		"far up":              {formats.ErrOutside, "", []any{index, weights(`"a":"../../../../etc/passwd"`)}},
		"absolute":            {formats.ErrOutside, "", []any{index, weights(`"a":"/etc/passwd"`)}},
		"back slash":          {formats.ErrOutside, "", []any{index, weights(`"a":"..\\x"`)}},
		"NUL":                 {formats.ErrOutside, "", []any{index, weights(`"a":"w\u0000"`), "w", named("a")}},
		"no name":             {formats.ErrOutside, "", []any{index, weights(`"a":""`)}},
		"dot":                 {formats.ErrOutside, "", []any{index, weights(`"a":"."`)}},
		"dot in front":        {formats.ErrOutside, "", []any{index, weights(`"a":"./w"`), "w", named("a")}},
		"long name":           {nil, "", []any{index, weights(`"a":"` + strings.Repeat("w\\n", 10000) + `"`)}},
		"control characters":  {fs.ErrNotExist, `"a\nb\x1b[31m"`, []any{index, weights(`"a":"a\nb\u001b[31m"`)}},
	} {
		dir := folder(t, c.files...)
		got, err := formatstest.Open(safetensors.Format{}, dir)
		if !assert.Error(t, err, what) {
			got.Close()
			continue
		}
		if c.kind != nil {
			assert.ErrorIs(t, err, c.kind, what)
		}
		assert.ErrorContains(t, err, c.says, what)
		assert.NotContains(t, err.Error(), "\n", what)
		assert.NotContains(t, err.Error(), "\x1b", what)
		assert.Less(t, len(err.Error()), 1000+len(dir), what)
	}
	_, err := formatstest.Open(safetensors.Format{}, filepath.Join(t.TempDir(), "missing"))
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

func TestSubfolderInIndex(t *testing.T) {
	dir := folder(t, index, `{"weight_map":{"a":"sub/w"}}`)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "sub", "w"), named("a"), 0o644))
	_, err := formatstest.Open(safetensors.Format{}, dir)
	assert.ErrorIs(t, err, formats.ErrMalformed)
	assert.ErrorContains(t, err, `"sub/w"`)
}

func TestLinks(t *testing.T) {
	outside := folder(t, "w", named("a"), single, named("a"))
	dir := folder(t, index, `{"weight_map":{"a":"w"}}`)
	require.NoError(t, os.Symlink(filepath.Join(outside, "w"), filepath.Join(dir, "w")))
	_, err := formatstest.Open(safetensors.Format{}, dir)
	assert.ErrorIs(t, err, formats.ErrOutside)
	assert.ErrorIs(t, err, storage.ErrOutside)

	dir = folder(t)
	require.NoError(t, os.Symlink(filepath.Join(outside, single), filepath.Join(dir, single)))
	_, err = formatstest.Open(safetensors.Format{}, dir)
	assert.ErrorIs(t, err, formats.ErrOutside)
	// What the user names himself may be a link to anywhere.
	assert.Equal(t, []string{"a in " + single}, names(open(t, filepath.Join(dir, single))))
	alias := filepath.Join(t.TempDir(), "alias")
	require.NoError(t, os.Symlink(outside, alias))
	assert.Equal(t, []string{"a in " + single}, names(open(t, alias)))

	// The hub's cache.
	repo := t.TempDir()
	blobs, snapshot := filepath.Join(repo, "blobs"), filepath.Join(repo, "snapshots", "0123")
	require.NoError(t, os.MkdirAll(blobs, 0o755))
	require.NoError(t, os.MkdirAll(snapshot, 0o755))
	for name, content := range map[string][]byte{index: []byte(`{"weight_map":{"a":"w"}}`), "w": named("a")} {
		require.NoError(t, os.WriteFile(filepath.Join(blobs, "of-"+name), content, 0o644))
		require.NoError(t, os.Symlink("../../blobs/of-"+name, filepath.Join(snapshot, name)))
	}
	assert.Equal(t, []string{"a in w"}, names(open(t, snapshot)))
	assert.Equal(t, []string{"a in w"}, names(open(t, filepath.Join(snapshot, index))))
}

func TestFoldersAreNoFiles(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, single), 0o755))
	_, err := formatstest.Open(safetensors.Format{}, dir)
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	_, err = formatstest.Open(safetensors.Format{}, filepath.Join(dir, single))
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

// TestManyShards has more of them than are kept open.
func TestManyShards(t *testing.T) {
	const n = 600
	var files []any
	var m []string
	for i := range n {
		name, x := fmt.Sprintf("%d.safetensors", 1000+i), fmt.Sprint("t", i)
		files = append(files, name, file(fmt.Sprintf(`{%q:{"dtype":"U16","shape":[1],"data_offsets":[0,2]}}`, x), byte(i),
			byte(i>>8)))
		m = append(m, fmt.Sprintf("%q:%q", x, name))
	}
	dir := folder(t, append(files, index, `{"weight_map":{`+strings.Join(m, ",")+`}}`)...)
	before := openFiles(t)
	c := open(t, dir)
	assert.Less(t, openFiles(t)-before, 520)
	for i, x := range c.Tensors() {
		b := make([]byte, 2)
		_, err := x.ReadAt(b, 0)
		require.NoError(t, err)
		require.Equal(t, i, int(binary.LittleEndian.Uint16(b)))
	}
	// The last file is read anew each time, and must be the one that was opened.
	last := c.Tensors()[n-1]
	require.NoError(t, os.Truncate(filepath.Join(dir, last.File), last.Offset+1))
	_, err := last.ReadAt(make([]byte, 2), 0)
	assert.ErrorContains(t, err, "another file")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "new"), named("a"), 0o644))
	require.NoError(t, os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, last.File)))
	_, err = last.ReadAt(make([]byte, 2), 0)
	assert.ErrorContains(t, err, "another file")
}

func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("no /proc")
	}
	return len(entries)
}

func TestFailedOpenClosesFiles(t *testing.T) {
	dir := folder(t, index, `{"weight_map":{"a":"`+shard1+`","b":"`+shard2+`"}}`, shard1, named("a"), shard2,
		named("b", "a"))
	before := openFiles(t)
	for range 20 {
		_, err := formatstest.Open(safetensors.Format{}, dir)
		require.Error(t, err)
	}
	assert.Equal(t, before, openFiles(t))
}

func TestShardMetadataIsMerged(t *testing.T) {
	dir := folder(t, index, `{"weight_map":{"a":"1","b":"2"}}`,
		"1", file(`{"__metadata__":{"format":"pt","x":"1"},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}`),
		"2", file(`{"__metadata__":{"y":"2","x":"2"},"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}`))
	assert.Equal(t, formats.Texts(map[string]string{"format": "pt", "x": "1", "y": "2"}), open(t, dir).Metadata())
}

func TestLimits(t *testing.T) {
	dir := folder(t, index, `{"weight_map":{"aa":"1","b":"2"}}`,
		"1", file(`{"aa":{"dtype":"U8","shape":[1,1,0],"data_offsets":[0,0]}}`), "2", named("b"))
	for _, l := range []safetensors.Limits{{},
		{HeaderBytes: 60, Tensors: 2, NameBytes: 2, Rank: 3, Dimensions: 3, Shards: 2, IndexBytes: 40}} {
		c, err := formatstest.Open(safetensors.Format{Limits: l}, dir)
		if assert.NoError(t, err, l) {
			c.Close()
		}
	}
	for _, l := range []safetensors.Limits{{HeaderBytes: 50}, {Tensors: 1}, {NameBytes: 1}, {Rank: 2}, {Dimensions: 2},
		{Shards: 1}, {IndexBytes: 30}} {
		_, err := formatstest.Open(safetensors.Format{Limits: l}, dir)
		assert.ErrorIs(t, err, formats.ErrLimit, "%+v", l)
		assert.NotErrorIs(t, err, formats.ErrMalformed)
	}
	// Unlisted tensors count too.
	path := filepath.Join(folder(t, "x", named("a", "b")), "x")
	_, err := formatstest.Open(safetensors.Format{Limits: safetensors.Limits{Tensors: 1}}, path)
	assert.ErrorIs(t, err, formats.ErrLimit)
}

// A string is refused before it has been gathered, wherever it stands.
func TestLongStrings(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	for _, h := range []string{
		`{"__metadata__":{"k":"` + long + `"}}`, `{"__metadata__":{"` + long + `":""}}`,
		`{"` + long + `":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}`,
		`{"a":{"dtype":"` + long + `"}}`, `{"a":{"x":"` + long + `","dtype":"U8","shape":[0],"data_offsets":[0,0]}}`,
		`{"a":{"x":1` + strings.Repeat("0", 1<<20) + `e-1048576,"dtype":"U8","shape":[0],"data_offsets":[0,0]}}`,
		"{" + strings.Repeat(" ", 1<<20) + "}", "{}" + strings.Repeat(" ", 1<<20),
	} {
		path := filepath.Join(folder(t, "x", file(h)), "x")
		_, err := formatstest.Open(safetensors.Format{Limits: safetensors.Limits{StringBytes: 1 << 18}}, path)
		assert.ErrorIs(t, err, formats.ErrLimit, h[:20])
		assert.ErrorContains(t, err, path+": ")
		c, err := formatstest.Open(safetensors.Format{}, path)
		if !strings.Contains(h, `"dtype":"x`) && assert.NoError(t, err, h[:20]) {
			c.Close()
		}
	}
	path := filepath.Join(folder(t, "x", file(`{"__metadata__":{"a":"","b":""}}`)), "x")
	open(t, path)
	_, err := formatstest.Open(safetensors.Format{Limits: safetensors.Limits{Metadata: 1}}, path)
	assert.ErrorIs(t, err, formats.ErrLimit)
}

// sparse makes a file that begins with start and has the size.
func sparse(t testing.TB, size int64, start []byte) string {
	path := filepath.Join(folder(t, "x.safetensors", start), "x.safetensors")
	require.NoError(t, os.Truncate(path, size))
	return path
}

// TestAnnouncedLengthsAllocateNothing opens files whose header, or tensors, are said to be huge, where the file is as
// huge but has holes.
func TestAnnouncedLengthsAllocateNothing(t *testing.T) {
	length := func(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
	for what, path := range map[string]string{
		"longest header": sparse(t, 1<<30, length(100_000_000)),
		"longer header":  sparse(t, 1<<30, length(100_000_001)),
		"header of 2^40": sparse(t, 1<<41, length(1<<40)),
		"header of 2^63": sparse(t, 1<<30, length(1<<63)),
		"open name":      sparse(t, 1<<30, append(length(100_000_000), `{"a`...)),
		"open shape":     sparse(t, 1<<30, append(length(100_000_000), `{"a":{"shape":[1,`...)),
		"tensor of 2^62": sparse(t, 1<<30, file(
			`{"a":{"dtype":"U8","shape":[4611686018427387904],"data_offsets":[0,4611686018427387904]}}`)),
		"shape of 2^62^2": sparse(t, 1<<30, file(
			`{"a":{"dtype":"U8","shape":[4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}`)),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := formatstest.Open(safetensors.Format{}, path)
		runtime.ReadMemStats(&after)
		if assert.Error(t, err, what) {
			assert.True(t, errors.Is(err, formats.ErrMalformed) || errors.Is(err, formats.ErrLimit), what)
		}
		assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20), what)
	}
}

// A tensor of more than 2^31 elements costs no more than a small one.
func TestHugeTensorOpens(t *testing.T) {
	h := fmt.Sprintf(`{"a":{"dtype":"F32","shape":[3,1073741824],"data_offsets":[0,%d]}}`, int64(12)<<30)
	c := open(t, sparse(t, int64(8+len(h))+12<<30, file(h)))
	assert.Equal(t, int64(12)<<30, c.Tensors()[0].Bytes)
	b := make([]byte, 8)
	_, err := c.Tensors()[0].ReadAt(b, 12<<30-8)
	assert.NoError(t, err)
}

func TestPaddedHeader(t *testing.T) {
	h := "{}" + strings.Repeat(" ", 1<<20)
	path := filepath.Join(folder(t, "x", file(h)), "x")
	assert.Empty(t, open(t, path).Tensors())
}

func TestDetect(t *testing.T) {
	dir := folder(t, "config.json", "{}", "x", named("a"), "short", "abc", "text", strings.Repeat("some text", 10))
	f := safetensors.Format{}
	assert.False(t, formatstest.Detect(f, dir))
	assert.True(t, formatstest.Detect(f, filepath.Join(dir, "x")))
	assert.False(t, formatstest.Detect(f, filepath.Join(dir, "short")))
	assert.False(t, formatstest.Detect(f, filepath.Join(dir, "text")))
	assert.False(t, formatstest.Detect(f, filepath.Join(dir, "missing")))
	assert.True(t, formatstest.Detect(f, "a/b.safetensors"))
	assert.True(t, formatstest.Detect(f, "a/"+index))
	assert.True(t, formatstest.Detect(f, "a/model.safetensors.index.fp16.json"))
	assert.False(t, formatstest.Detect(f, "a/model.safetensors.index.md"))
	assert.True(t, formatstest.Detect(f, folder(t, "w.safetensors", "")))
	assert.True(t, formatstest.Detect(f, folder(t, index, "")))
	assert.False(t, formatstest.Detect(f, folder(t, "._w.safetensors", "")))

	got, err := formats.Default.Lookup("safetensors")
	require.NoError(t, err)
	assert.Equal(t, f, got)
	got, ok := formats.Default.ForExtension("out/x.safetensors")
	assert.True(t, ok)
	assert.Equal(t, f, got)
}

// large is a checkpoint of 100,000 empty tensors with names as they are.
func large(t testing.TB) string {
	var all []tensor.Info
	for i := range 100_000 {
		all = append(all, tensor.Info{Name: fmt.Sprintf("model.layers.%d.mlp.experts.%d.down_proj.weight", i/1000, i%1000),
			DType: tensor.BF16, Shape: tensor.Shape{1, 2}})
	}
	s := layout(t, all, formats.Options{}).Shards[0]
	return sparse(t, s.Size, s.Header)
}

func TestManyTensors(t *testing.T) {
	c := open(t, large(t))
	assert.Len(t, c.Tensors(), 100_000)
}

func BenchmarkOpen100000(b *testing.B) {
	path := large(b)
	b.ReportAllocs()
	for b.Loop() {
		c, err := formatstest.Open(safetensors.Format{}, path)
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

func TestErrorsAreShort(t *testing.T) {
	name := strings.Repeat("x\n", 5000)
	_, err := formatstest.Open(safetensors.Format{}, filepath.Join(folder(t, "x", named(name, name)), "x"))
	require.ErrorIs(t, err, formats.ErrMalformed)
	assert.Less(t, len(err.Error()), 1000)
	assert.Equal(t, 1, len(bytes.Split([]byte(err.Error()), []byte("\n"))))
}

// Nothing of a checkpoint needs to have a path.
func TestOpenInMemory(t *testing.T) {
	memory := storagetest.Memory{index: []byte(`{"weight_map":{"b":"` + shard2 + `","a":"` + shard1 + `"}}`),
		shard1: named("a"), shard2: named("b")}
	for name, want := range map[string][]string{"": {"a in " + shard1, "b in " + shard2},
		index: {"a in " + shard1, "b in " + shard2}, shard2: {"b in " + shard2}} {
		f, err := formats.Default.Detect(t.Context(), memory, name)
		require.NoError(t, err)
		assert.Equal(t, safetensors.Format{}, f)
		c, err := f.Open(t.Context(), memory, name)
		require.NoError(t, err)
		assert.Equal(t, want, names(c))
		b := make([]byte, 1)
		_, err = c.Tensors()[0].ReadAt(b, 0)
		require.NoError(t, err)
		assert.Equal(t, c.Tensors()[0].Name, string(b))
		require.NoError(t, c.Close())
	}
	memory[shard2] = memory[shard2][:20]
	_, err := safetensors.Format{}.Open(t.Context(), memory, "")
	assert.ErrorIs(t, err, formats.ErrMalformed)
	assert.ErrorContains(t, err, "memory:"+shard2+": ")
	delete(memory, shard2)
	_, err = safetensors.Format{}.Open(t.Context(), memory, "")
	assert.ErrorIs(t, err, fs.ErrNotExist)
	_, err = formats.Default.Open(t.Context(), storagetest.Memory{"x": nil}, "")
	assert.ErrorIs(t, err, formats.ErrUnknown)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = formats.Default.Open(ended, memory, "")
	assert.ErrorIs(t, err, context.Canceled)
}
