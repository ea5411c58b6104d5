package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
)

// install builds the plugin and installs it where lorakit looks, once it does.
func install(t *testing.T) {
	t.Setenv(lock.Environment, filepath.Join(t.TempDir(), "plugins"))
	program := filepath.Join(t.TempDir(), "lorakit-flax.exe")
	out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	folder, err := lock.Open(os.Getenv(lock.Environment), lock.BuiltIn())
	require.NoError(t, err)
	p, err := folder.Install(ctx, program, host.Describe, lock.InstallOptions{})
	require.NoError(t, err)
	assert.Equal(t, []string{"read", "extents", "write-layout", "deterministic"}, p.Capabilities)
}

// files are the bytes of all files of a folder, or of the one.
func files(t *testing.T, path string) map[string]string {
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(path, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		all[strings.TrimPrefix(p, path)] = string(b)
		return err
	}))
	return all
}

// The plugin with lorakit itself.
func TestConvert(t *testing.T) {
	install(t) // once: a process looks once for plugins
	t.Run("to safetensors and back, and to Flax", convertGoldens)
	t.Run("to NF4 and back", convertNF4)
	t.Run("refused", convertRefused)
}

var ctx = context.Background()

// convert returns the path of the result.
func convert(t *testing.T, from, to string, o lorakit.ConvertOptions, notices int) string {
	to = filepath.Join(t.TempDir(), to)
	r, err := lorakit.Convert(ctx, from, to, o)
	require.NoError(t, err, from)
	assert.Len(t, r.Notices, notices, from)
	require.Len(t, r.Plugins, 1)
	assert.Equal(t, "flax", r.Plugins[0].Name)
	return to
}

func convertGoldens(t *testing.T) {
	for name := range goldens(t) {
		o := lorakit.ConvertOptions{To: "safetensors"}
		safe, back := "safetensors", "flax"
		if filepath.Ext(name) != "" {
			safe, back = "x.safetensors", "x.msgpack"
		}
		safe = convert(t, fixtures+name, safe, o, 0)
		o.To = "flax"
		if name == "gpt2-sharded" {
			o.MaxShardSize = 6000
		}
		left := 0
		if name == "leaves.msgpack" {
			left = 1
		}
		back = convert(t, safe, back, o, left)
		d, err := lorakit.Diff(ctx, fixtures+name, back, lorakit.ReadOptions{})
		require.NoError(t, err, name)
		assert.Zero(t, d.MaxAbs, name)
		assert.Empty(t, append(append(d.Missing, d.Extra...), d.Reshaped...), name)

		want, got := files(t, fixtures+name), files(t, convert(t, fixtures+name, filepath.Base(back), o, left))
		const index = "/flax_model.msgpack.index.json"
		if name == "gpt2-sharded" {
			var x map[string]map[string]any
			require.NoError(t, json.Unmarshal([]byte(got[index]), &x))
			assert.EqualValues(t, 7872, x["metadata"]["total_parameters"])
			delete(want, index)
			delete(got, index)
		}
		if name != "chunked.msgpack" && name != "leaves.msgpack" {
			assert.Equal(t, want, got, "%s: the same bytes", name)
		}
	}
}

func convertNF4(t *testing.T) {
	nf4 := convert(t, fixtures+"gpt2", "nf4", lorakit.ConvertOptions{To: "flax", Quantize: "nf4",
		Include: []string{"*kernel"}}, 1)
	plain := convert(t, nf4, "plain", lorakit.ConvertOptions{To: "flax", Quantize: "none"}, 1)
	assert.Equal(t, len(files(t, fixtures+"gpt2")["/flax_model.msgpack"]), len(files(t, plain)["/flax_model.msgpack"]))
	d, err := lorakit.Diff(ctx, fixtures+"gpt2", plain, lorakit.ReadOptions{})
	require.NoError(t, err)
	assert.Len(t, d.Tensors, 28)
	assert.Less(t, d.RelRMS, 0.1)
	for _, x := range d.Tensors {
		assert.Equal(t, strings.HasSuffix(x.Name, "/kernel"), x.MaxAbs > 0, x.Name)
	}
}

// What lorakit says of a file that is not as it should be: the file once, and what is wrong.
func convertRefused(t *testing.T) {
	whole, err := os.ReadFile(fixtures + "gpt2/flax_model.msgpack")
	require.NoError(t, err)
	dir := t.TempDir()
	path := filepath.Join(dir, "x.msgpack")
	require.NoError(t, os.WriteFile(path, whole[:len(whole)-3], 0o600))
	_, err = lorakit.Convert(ctx, path, filepath.Join(dir, "y.safetensors"), lorakit.ConvertOptions{})
	assert.EqualError(t, err, path+`: plugin flax: tensor "transformer/ln_f/bias": byte 32206: found an array of 77 bytes, of `+
		`which the file has 74: malformed`)
	assert.ErrorIs(t, err, formats.ErrMalformed)
}
