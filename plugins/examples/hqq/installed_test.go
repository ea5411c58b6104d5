package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/quant"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/storage"
)

// installed builds the plugin, installs it, and returns all schemes with its own among them.
func installed(t *testing.T) *quant.Registry {
	t.Helper()
	name := "hqq"
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	binary := filepath.Join(t.TempDir(), name)
	out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	folder, err := lock.Open(filepath.Join(t.TempDir(), "plugins"), lock.BuiltIn())
	require.NoError(t, err)
	_, err = folder.Install(context.Background(), binary, host.Describe, lock.InstallOptions{})
	require.NoError(t, err)
	h, problems := host.New(folder)
	require.Empty(t, problems)
	end := h.Begin(0)
	t.Cleanup(func() { end() })
	schemes := &quant.Registry{}
	for _, s := range append(quant.All(), h.Schemes()...) {
		require.NoError(t, schemes.Register(s))
	}
	return schemes
}

// convert writes what o makes of a checkpoint and returns its tensors.
func convert(t *testing.T, schemes *quant.Registry, src, dst string, o pipeline.Options) memory {
	t.Helper()
	dir, name, err := storage.Resolve(src, storage.Options{})
	require.NoError(t, err)
	c, err := checkpoint.OpenIn(context.Background(), dir, name, checkpoint.OpenOptions{Schemes: schemes})
	require.NoError(t, err)
	defer c.Close()
	m := pipeline.Plain(c)
	p, err := pipeline.NewPlan(context.Background(), m, dst, o)
	require.NoError(t, err)
	_, err = pipeline.Run(context.Background(), p, m, dst, pipeline.RunOptions{Threads: 2})
	require.NoError(t, err)
	return tensorsOf(t, dst)
}

// TestInstalled converts checkpoints by the plugin in its own process.
func TestInstalled(t *testing.T) {
	schemes, out := installed(t), t.TempDir()
	at := func(name string) string { return filepath.Join(out, name) }
	model, decoded := fixtures+"/tiny-llama", load(t, "tiny-llama.decoded.safetensors")

	plain := convert(t, schemes, model, at("plain"), pipeline.Options{Quantize: "none"})
	for name, want := range decoded {
		assert.Equal(t, want, plain[name], name)
	}
	hqq := pipeline.Options{Quantize: typeName, Params: spec(defaultGroup).Params}
	assert.Equal(t, tensorsOf(t, model), convert(t, schemes, model, at("kept"), hqq), "what hqq has optimised is kept")

	// To NF4 and back.
	convert(t, schemes, model, at("nf4"), pipeline.Options{Quantize: "nf4", Params: hqq.Params})
	values := convert(t, schemes, at("nf4"), at("values"), pipeline.Options{Quantize: "none"})
	back := convert(t, schemes, at("nf4"), at("back"), hqq)
	for name := range decoded {
		for stored, want := range encode(t, spec(defaultGroup), values[name], 1<<20) {
			assert.Equal(t, want, back[stored], stored)
		}
	}

	// As hqq does without optimisation, with groups of 8.
	got := convert(t, schemes, fixtures+"/plain.safetensors", at("nearest"),
		pipeline.Options{Quantize: typeName, Params: spec(8).Params, Include: []string{"8.*"}})
	n := 0
	for name, want := range load(t, "nearest.safetensors") {
		if strings.HasPrefix(name, "8.") {
			assert.Equal(t, want, got[name], name)
			n++
		}
	}
	assert.Equal(t, 3*19, n)
}
