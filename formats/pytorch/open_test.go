package pytorch_test

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/formatstest"
	"github.com/lorakit/lorakit/formats/pytorch"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
	"github.com/lorakit/lorakit/tensor"
)

const fixtures = "../../fixtures/pytorch"

// refusal is what refused.json says of a file.
type refusal struct{ Kind, Text string }

func refusals(t testing.TB) map[string]refusal {
	b, err := os.ReadFile(filepath.Join(fixtures, "refused.json"))
	require.NoError(t, err)
	var all map[string]refusal
	require.NoError(t, json.Unmarshal(b, &all))
	require.Greater(t, len(all), 70)
	return all
}

var kinds = map[string]error{
	"malformed": formats.ErrMalformed, "limit": formats.ErrLimit, "unsafe": pytorch.ErrUnsafe,
	"unsupported": pytorch.ErrUnsupported,
}

func open(t testing.TB, path string) formats.Container {
	t.Helper()
	c, err := formatstest.Open(pytorch.Format{}, path)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

func contents(t testing.TB, x formats.Tensor) []byte {
	t.Helper()
	b := make([]byte, x.Bytes)
	n, err := x.ReadAt(b, 0)
	if len(b) > 0 {
		require.NoError(t, err, x.Name)
	}
	require.Len(t, b, n, x.Name)
	return b
}

func byName(c formats.Container) map[string]formats.Tensor {
	m := map[string]formats.Tensor{}
	for _, x := range c.Tensors() {
		m[x.Name] = x
	}
	return m
}

// TestTwins compares every file that PyTorch wrote with the safetensors file that has its tensors.
func TestTwins(t *testing.T) {
	twins, err := filepath.Glob(filepath.Join(fixtures, "*.safetensors"))
	require.NoError(t, err)
	require.Greater(t, len(twins), 15)
	refused := refusals(t)
	for _, twin := range twins {
		name := strings.TrimSuffix(filepath.Base(twin), ".safetensors")
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(fixtures, name)
			if _, err := os.Stat(path); err != nil {
				found, err := filepath.Glob(path + ".*")
				require.NoError(t, err)
				found = slices.DeleteFunc(found, func(p string) bool { return p == twin })
				require.Len(t, found, 1)
				path = found[0]
			}
			require.NotContains(t, refused, filepath.Base(path))
			assert.True(t, formatstest.Detect(pytorch.Format{}, path))
			c := open(t, path)
			want, err := formatstest.Open(safetensors.Format{}, twin)
			require.NoError(t, err)
			defer want.Close()
			got := byName(c)
			require.Len(t, got, len(want.Tensors()))
			require.Len(t, c.Tensors(), len(want.Tensors()))
			for _, w := range want.Tensors() {
				x, ok := got[w.Name]
				require.True(t, ok, w.Name)
				if name == "expanded" {
					assert.Equal(t, tensor.Shape{300, 700, 2}, x.Shape)
					assert.Equal(t, bytes.Repeat(contents(t, w), 10_000), contents(t, x))
					continue
				}
				assert.Equal(t, w.Info, x.Info)
				assert.Equal(t, w.Bytes, x.Bytes)
				assert.Equal(t, contents(t, w), contents(t, x), w.Name)
			}
		})
	}
}

// TestRefused opens every broken and hostile file. Each is refused with one kind of error on one short line, and no
// memory is taken for what it claims to be.
func TestRefused(t *testing.T) {
	for name, want := range refusals(t) {
		path := filepath.Join(fixtures, name)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		c, err := formatstest.Open(pytorch.Format{}, path)
		runtime.ReadMemStats(&after)
		assert.LessOrEqual(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20), "%s: bytes allocated", name)
		if !assert.Error(t, err, name) {
			c.Close()
			continue
		}
		assertKind(t, err, name)
		assert.ErrorIs(t, err, kinds[want.Kind], name)
		assert.ErrorContains(t, err, want.Text, name)
		assert.True(t, strings.HasPrefix(err.Error(), path+": "), err)
	}
	assert.NoFileExists(t, "/tmp/lorakit-was-here")
}

func TestUnsafeNamesTheGlobal(t *testing.T) {
	_, err := formatstest.Open(pytorch.Format{}, filepath.Join(fixtures, "eval.pt"))
	assert.EqualError(t, err,
		fixtures+
			`/eval.pt: pickle: byte 53: global "builtins.eval" is not allowed in a state dict, expected only tensors in dicts`)
}

// assertKind says that an error is of one kind that a bad file has, on one short line.
func assertKind(t testing.TB, err error, what string) {
	one := 0
	for _, kind := range kinds {
		if errors.Is(err, kind) {
			one++
		}
	}
	assert.Equal(t, 1, one, "%s: kinds of %v", what, err)
	for _, r := range err.Error() {
		if r < ' ' || r == 0x7f || r == '\u2028' {
			assert.Failf(t, "control character in error", "%s: %q", what, err.Error())
			break
		}
	}
	assert.Less(t, len(err.Error()), 2500, what)
}

func TestMetadata(t *testing.T) {
	said := func(path string) map[string]any {
		m := map[string]any{}
		for _, p := range open(t, filepath.Join(fixtures, path)).Metadata() {
			m[p.Name] = p.Value
		}
		return m
	}
	assert.Equal(t, map[string]any{
		"format": "pt", "epoch": "3", "global_step": "1180591620717411303424", "lr": "1e-05", "best": "4.0", "done": "True",
		"name":            "run é",
		"pytorch.ignored": "betas, hyper_parameters, tags, raw, mutable, counts, optimizer_states, callbacks, cpu_rng_state",
	}, said("lightning.ckpt"))
	assert.Equal(t, map[string]any{"format": "pt", "epoch": "4"}, said("wrapped.pt"))
	assert.Equal(t, formats.Metadata{{Name: "format", Value: "pt"}, {Name: "version", Value: "2"},
		{Name: "pytorch.ignored", Value: "extra_state, settings"}},
		open(t, filepath.Join(fixtures, "scalars.pt")).Metadata())
}

// TestContiguousIsTheFile holds what a caller may copy within the kernel.
func TestContiguousIsTheFile(t *testing.T) {
	for _, name := range []string{"views.pt", "views-legacy.pth"} {
		path := filepath.Join(fixtures, name)
		file, err := os.ReadFile(path)
		require.NoError(t, err)
		c := open(t, path)
		x := byName(c)
		for _, name := range []string{"whole", "tied", "rows", "row", "element", "scalar", "one"} {
			_, isFile := storage.OSFile(x[name].Data)
			assert.True(t, isFile, name)
			assert.Equal(t, contents(t, x[name]), file[x[name].Offset:x[name].Offset+x[name].Bytes], name)
		}
		for _, name := range []string{"transposed", "columns", "expanded", "channels"} {
			_, isFile := storage.OSFile(x[name].Data)
			assert.False(t, isFile, name)
		}
		assert.Equal(t, x["whole"].Offset, x["tied"].Offset)
		assert.Equal(t, x["whole"].Offset+2*8*4, x["rows"].Offset)
		assert.Equal(t, []string{name}, c.Files())
	}
}

// TestViewsInPieces reads every tensor again from every offset on.
func TestViewsInPieces(t *testing.T) {
	for _, x := range open(t, filepath.Join(fixtures, "views.pt")).Tensors() {
		all := contents(t, x)
		for lo := range all {
			for _, n := range []int{1, 3, 16, len(all)} {
				p := make([]byte, n)
				got, err := x.ReadAt(p, int64(lo))
				want := all[lo:min(lo+n, len(all))]
				require.Equal(t, want, p[:got], "%s from %d", x.Name, lo)
				if got < n {
					require.Equal(t, io.EOF, err)
				} else {
					require.NoError(t, err)
				}
				if v, ok := x.Data.(interface {
					ReadAt([]byte, int64) (int, error)
				}); ok && x.Offset == 0 { // the view itself is a ReaderAt like any other
					got, err := v.ReadAt(p, int64(lo))
					require.Equal(t, want, p[:got])
					require.Equal(t, got < n, err == io.EOF)
				}
			}
		}
	}
}

// TestDirectoryAgreesWithTheStandardLibrary holds the zip directory against archive/zip: where it says a storage is,
// we read it.
func TestDirectoryAgreesWithTheStandardLibrary(t *testing.T) {
	for _, name := range []string{"dtypes.pt", "module.bin", "by-hand.pt"} {
		path := filepath.Join(fixtures, name)
		z, err := zip.OpenReader(path)
		require.NoError(t, err)
		defer z.Close()
		var want []int64
		for _, f := range z.File {
			if strings.Contains(f.Name, "/data/") {
				at, err := f.DataOffset()
				require.NoError(t, err)
				want = append(want, at)
			}
		}
		var got []int64
		for _, x := range open(t, path).Tensors() {
			got = append(got, x.Offset)
		}
		slices.Sort(want)
		assert.Equal(t, want, slices.Compact(got)) // tied ones have one storage
	}
}

func folder(t testing.TB, files ...string) string {
	dir := t.TempDir()
	for _, name := range files {
		b, err := os.ReadFile(filepath.Join(fixtures, name))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, filepath.Base(name)), b, 0o644))
	}
	return dir
}

func TestFolders(t *testing.T) {
	f := pytorch.Format{}
	c := open(t, filepath.Join(fixtures, "sharded"))
	assert.Equal(t, []string{"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
		"pytorch_model.bin.index.json"}, c.Files())
	assert.True(t, formatstest.Detect(f, filepath.Join(fixtures, "sharded", "pytorch_model.bin.index.json")))
	assert.True(t, formatstest.Detect(f, filepath.Join(fixtures, "adapter")))

	both := folder(t, "adapter/adapter_model.bin", "adapter.safetensors")
	assert.False(t, formatstest.Detect(f, both), "safetensors come first")
	assert.True(t, formatstest.Detect(safetensors.Format{}, both))
	_, err := formatstest.Open(f, both)
	assert.ErrorIs(t, err, fs.ErrNotExist)

	one := folder(t, "scalars.pt")
	require.NoError(t, os.WriteFile(filepath.Join(one, "training_args.bin"), []byte("PK\x03\x04"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(one, "ggml.bin"), []byte("GGUF...."), 0o644))
	assert.True(t, formatstest.Detect(f, one))
	assert.Equal(t, []string{"scalars.pt"}, open(t, one).Files())

	several := folder(t, "scalars.pt", "module.bin")
	assert.True(t, formatstest.Detect(f, several))
	_, err = formatstest.Open(f, several)
	assert.ErrorIs(t, err, formats.ErrMalformed)
	assert.ErrorContains(t, err, `found "module.bin", "scalars.pt", expected one of them alone`)
	shards := folder(t, "sharded/pytorch_model-00001-of-00002.bin", "sharded/pytorch_model-00002-of-00002.bin")
	_, err = formatstest.Open(f, shards)
	assert.ErrorContains(t, err, "without an index")

	assert.False(t, formatstest.Detect(f, t.TempDir()))
	assert.False(t, formatstest.Detect(f, filepath.Join(fixtures, "refused.json")))
	assert.False(t, formatstest.Detect(f, filepath.Join(fixtures, "absent.bin")))
	assert.False(t, formatstest.Detect(f, filepath.Join(fixtures, "dtypes.safetensors")))

	// Other names are known by their first bytes.
	for _, name := range []string{"dtypes.pt", "views-legacy.pth"} {
		dir := folder(t, name)
		renamed := filepath.Join(dir, "weights")
		require.NoError(t, os.Rename(filepath.Join(dir, name), renamed))
		assert.True(t, formatstest.Detect(f, renamed))
		assert.NotEmpty(t, open(t, renamed).Tensors())
	}
	array := filepath.Join(t.TempDir(), "x.npz")
	w, err := os.Create(array)
	require.NoError(t, err)
	z := zip.NewWriter(w)
	_, err = z.Create("x.npy")
	require.NoError(t, err)
	require.NoError(t, errors.Join(z.Close(), w.Close()))
	assert.False(t, formatstest.Detect(f, array), "another zip archive")
}

func TestIndex(t *testing.T) {
	dir := folder(t, "sharded/pytorch_model-00001-of-00002.bin", "sharded/pytorch_model-00002-of-00002.bin")
	outside := folder(t, "scalars.pt")
	require.NoError(t, os.Symlink(filepath.Join(outside, "scalars.pt"), filepath.Join(dir, "link.bin")))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "sub", "x.bin"), nil, 0o644))
	const first = "pytorch_model-00001-of-00002.bin"
	for _, c := range []struct {
		index string
		kind  error
		text  string
	}{
		{`{"weight_map":{"a":"` + first + `","z":"` + first + `"}}`, formats.ErrMalformed,
			`tensor "z": found it in no shard`},
		{`{"weight_map":{"a":"pytorch_model-00002-of-00002.bin"}}`, formats.ErrMalformed, `tensor "a": found it in no shard`},
		{`{"weight_map":{"a":"` + first + `","b":"` + first + `","c":"pytorch_model-00002-of-00002.bin"}}`,
			formats.ErrMalformed, `tensor "b": found it in "pytorch_model-00002-of-00002.bin"`},
		{`{"weight_map":{"a":"none.bin"}}`, fs.ErrNotExist, `no shard "none.bin"`},
		{`{"weight_map":{"a":"../x.bin"}}`, formats.ErrOutside, "../x.bin"},
		{`{"weight_map":{"a":"/etc/passwd"}}`, formats.ErrOutside, "/etc/passwd"},
		{`{"weight_map":{"a":"link.bin"}}`, formats.ErrOutside, "link"},
		{`{"weight_map":{"a":"sub/x.bin"}}`, formats.ErrMalformed, "without a folder"},
		{`{"weight_map":{"a":"x","a":"y"}}`, formats.ErrMalformed, "duplicate"},
		{`{"weight_map":{"a":1}}`, formats.ErrMalformed, `tensor "a": found no file name`},
		{`{"weight_map":{}}`, formats.ErrMalformed, "no file in weight_map"},
		{`{"weight_map":[]}`, formats.ErrMalformed, "weight_map as an object"},
		{`[]`, formats.ErrMalformed, "an object with weight_map"},
		{``, formats.ErrMalformed, "it is empty"},
		{` `, formats.ErrMalformed, "no JSON"},
		{`{`, formats.ErrMalformed, "JSON"},
		{`{"weight_map":{"a":"` + first + `"}} x`, formats.ErrMalformed, "JSON"},
		{`{"weight_map":{"a":"` + first + `"}} {}`, formats.ErrMalformed, "more JSON"},
		{`{"other":{"weight_map":1},"weight_map":{"a":"` + first + `"}}`, nil, ""},
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "pytorch_model.bin.index.json"), []byte(c.index), 0o644))
		opened, err := formatstest.Open(pytorch.Format{}, dir)
		if c.kind == nil {
			require.NoError(t, err, c.index)
			assert.NoError(t, opened.Close())
			continue
		}
		if assert.ErrorIs(t, err, c.kind, c.index) {
			assert.ErrorContains(t, err, c.text, c.index)
			assert.NotContains(t, err.Error(), "\n")
		}
	}
	// The same tensor in two shards.
	require.NoError(t, os.WriteFile(filepath.Join(dir, "copy.bin"), must(os.ReadFile(filepath.Join(dir, first))), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pytorch_model.bin.index.json"),
		[]byte(`{"weight_map":{"a":"`+first+`","b":"copy.bin"}}`), 0o644))
	_, err := formatstest.Open(pytorch.Format{}, dir)
	assert.ErrorContains(t, err, `tensor "a": found it in "copy.bin" too`)
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		limits pytorch.Limits
		path   string
		text   string
	}{
		{pytorch.Limits{PickleBytes: 100}, "dtypes.pt", "a pickle of"},
		{pytorch.Limits{PickleBytes: 300}, "views-legacy.pth", "a pickle of more than 300 bytes"},
		{pytorch.Limits{Memory: 1000}, "dtypes.pt", "more than 1000 bytes of memory"},
		{pytorch.Limits{StringBytes: 3}, "dtypes.pt", "expected at most 3"},
		{pytorch.Limits{Nesting: 2}, "dtypes.pt", "nested deeper than 2"},
		{pytorch.Limits{Entries: 5}, "dtypes.pt", "zip entries, expected at most 5"},
		{pytorch.Limits{DirectoryBytes: 100}, "dtypes.pt", "zip directory of"},
		{pytorch.Limits{Tensors: 3}, "dtypes.pt", "tensors, expected at most 3"},
		{pytorch.Limits{Rank: 2}, "views.pt", "3 dimensions, expected at most 2"},
		{pytorch.Limits{ExpandedBytes: 1000}, "expanded.pt", "expected at most 1000"},
		{pytorch.Limits{Shards: 1}, "sharded", "2 files in weight_map"},
		{pytorch.Limits{IndexBytes: 10}, "sharded", "an index of"},
		{pytorch.Limits{Tensors: 1}, "sharded", "more than 1 tensors"},
	} {
		_, err := formatstest.Open(pytorch.Format{Limits: c.limits}, filepath.Join(fixtures, c.path))
		assert.ErrorIs(t, err, formats.ErrLimit, c.path)
		assert.ErrorContains(t, err, c.text)
	}
}

func TestFormat(t *testing.T) {
	f, err := formats.Default.Lookup("pytorch")
	require.NoError(t, err)
	assert.False(t, f.ReadOnly())
	assert.Equal(t, []string{".bin", ".pt", ".pth", ".ckpt"}, f.Extensions())
}

// TestShortened cuts a file at every length.
func TestShortened(t *testing.T) {
	for _, name := range []string{"parameters.pt", "old.pt"} {
		whole := must(os.ReadFile(filepath.Join(fixtures, name)))
		path := filepath.Join(t.TempDir(), name)
		for n := range whole {
			require.NoError(t, os.WriteFile(path, whole[:n], 0o644))
			_, err := formatstest.Open(pytorch.Format{}, path)
			require.Error(t, err, "%s cut to %d bytes", name, n)
			assertKind(t, err, name)
		}
	}
}

// TestGrownShorter reads a file that is cut after it was opened.
func TestGrownShorter(t *testing.T) {
	dir := folder(t, "views.pt")
	path := filepath.Join(dir, "views.pt")
	c := open(t, path)
	require.NoError(t, os.Truncate(path, 100))
	for _, x := range c.Tensors() {
		if x.Bytes > 0 {
			_, err := x.ReadAt(make([]byte, x.Bytes), 0)
			assert.ErrorIs(t, err, io.ErrUnexpectedEOF, x.Name)
		}
	}
}

// Nothing of a checkpoint needs to have a path.
func TestOpenInMemory(t *testing.T) {
	memory, err := storagetest.FromFS(os.DirFS(fixtures), "sharded")
	require.NoError(t, err)
	c, err := formats.Default.Open(t.Context(), memory, "")
	require.NoError(t, err)
	defer c.Close()
	want := byName(open(t, filepath.Join(fixtures, "sharded")))
	require.NotEmpty(t, want)
	got := byName(c)
	require.Len(t, got, len(want))
	for name, x := range want {
		assert.Equal(t, x.Info, got[name].Info)
		assert.Equal(t, contents(t, x), contents(t, got[name]))
	}
}
