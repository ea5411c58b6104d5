package lorakit_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// batchFile is a batch for the models of fixtures/steps.
func batchFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "batch.jsonl")
	require.NoError(t, os.WriteFile(file, []byte(`{"input_ids": [34, 41, 34, 1, 14, 65, 10, 41, 26]}
{"input_ids": [30, 52, 17, 49, 40, 5, 14, 62, 31]}
`), 0o666))
	return file
}

// TestValidateTellsHowFarItIs: stages in their order, numbers that only grow.
func TestValidateTellsHowFarItIs(t *testing.T) {
	base := filepath.Join("fixtures", "steps", "bases", "llama")
	adapter := filepath.Join("fixtures", "steps", "llama", "all")
	other := filepath.Join("fixtures", "steps", "bases", "llama-nf4")
	for want, o := range map[string]lorakit.ValidateOptions{
		"[loss]":                         {},
		"[comparison]":                   {Against: other},
		"[hash step 1 step 2 loss hash]": {Adapter: adapter, Steps: 2, Rate: 1e-3},
		"[hash step 1 loss hash]":        {Adapter: adapter, Steps: 1, Rate: 1e-3, Threads: 3},
	} {
		var stages []string
		var last lorakit.ValidateProgress
		o.Data = batchFile(t)
		o.Progress = func(p lorakit.ValidateProgress) {
			if p.Stage != last.Stage {
				stages = append(stages, p.Stage)
			}
			assert.GreaterOrEqual(t, p.Done, last.Done)
			assert.GreaterOrEqual(t, p.Elapsed, last.Elapsed)
			assert.LessOrEqual(t, p.Done, p.Total)
			last = p
		}
		_, err := lorakit.Validate(t.Context(), base, o)
		require.NoError(t, err)
		assert.Equal(t, want, fmt.Sprint(stages))
		if o.Adapter != "" { // all but the last hash, which counts one for each of the two blocks
			assert.Equal(t, last.Total-2, last.Done)
		}
	}
}

// TestValidateSeesFrozenWeightsChange: a byte of the base changes behind its back, and nothing is saved.
func TestValidateSeesFrozenWeightsChange(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	require.NoError(t, os.CopyFS(base, os.DirFS(filepath.Join("fixtures", "steps", "bases", "llama"))))
	out := t.TempDir()
	save, gradients := filepath.Join(out, "stepped"), filepath.Join(out, "gradients.safetensors")
	o := lorakit.ValidateOptions{
		Data: batchFile(t), Adapter: filepath.Join("fixtures", "steps", "llama", "all"), Steps: 1, Rate: 1e-3,
		Save: save, SaveGradients: gradients,
	}
	o.Progress = func(p lorakit.ValidateProgress) {
		if p.Stage != "loss" {
			return
		}
		f, err := os.OpenFile(filepath.Join(base, "model.safetensors"), os.O_RDWR, 0)
		if !assert.NoError(t, err) {
			return
		}
		defer f.Close()
		info, err := f.Stat()
		assert.NoError(t, err)
		var b [1]byte
		_, err = f.ReadAt(b[:], info.Size()-4)
		assert.NoError(t, err)
		b[0] ^= 1
		_, err = f.WriteAt(b[:], info.Size()-4)
		assert.NoError(t, err)
	}
	r, err := lorakit.Validate(t.Context(), base, o)
	require.NoError(t, err)
	require.NotNil(t, r.FrozenUnchanged)
	assert.False(t, *r.FrozenUnchanged)
	left, err := os.ReadDir(out)
	require.NoError(t, err)
	assert.Empty(t, left)

	o.Progress = nil
	r, err = lorakit.Validate(t.Context(), base, o)
	require.NoError(t, err)
	assert.True(t, *r.FrozenUnchanged)
	assert.FileExists(t, gradients)
	assert.FileExists(t, filepath.Join(save, "adapter_model.safetensors"))
}

// TestValidateIsInterrupted in the middle of a step, and leaves nothing behind.
func TestValidateIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	out := t.TempDir()
	_, err := lorakit.Validate(ctx, filepath.Join("fixtures", "steps", "bases", "llama"), lorakit.ValidateOptions{
		Data: batchFile(t), Adapter: filepath.Join("fixtures", "steps", "llama", "all"), Steps: 5, Rate: 1e-3,
		Save: filepath.Join(out, "stepped"), SaveGradients: filepath.Join(out, "gradients.safetensors"),
		Progress: func(p lorakit.ValidateProgress) {
			if p.Stage == "step 3" {
				cancel()
			}
		},
	})
	require.ErrorIs(t, err, lorakit.ErrInterrupted)
	left, err := os.ReadDir(out)
	require.NoError(t, err)
	assert.Empty(t, left)
}

// TestValidateRefusesOptions that are wrong whatever the files hold, before it looks at any.
func TestValidateRefusesOptions(t *testing.T) {
	for what, o := range map[string]lorakit.ValidateOptions{
		"there is no data":      {},
		"0 steps":               {Data: "b", Adapter: "a", Rate: 1e-3},
		"learning rate is 0":    {Data: "b", Adapter: "a", Steps: 1},
		"learning rate is NaN":  {Data: "b", Adapter: "a", Steps: 1, Rate: math.NaN()},
		"learning rate is +Inf": {Data: "b", Adapter: "a", Steps: 1, Rate: math.Inf(1)},
		"there is no adapter":   {Data: "b", Save: "s"},
		"expected one of them":  {Data: "b", Adapter: "a", Against: "c", Steps: 1, Rate: 1e-3},
		"memory is -1":          {Data: "b", Memory: -1},
		"threads -2":            {Data: "b", Threads: -2},
	} {
		_, err := lorakit.Validate(t.Context(), "nothing", o)
		require.ErrorIs(t, err, lorakit.ErrOption, what)
		require.ErrorContains(t, err, what)
	}
}

// TestValidateKindsOfErrors: each is told from the others.
func TestValidateKindsOfErrors(t *testing.T) {
	llama := filepath.Join("fixtures", "steps", "bases", "llama")
	adapter := filepath.Join("fixtures", "steps", "llama", "all")
	none := filepath.Join(t.TempDir(), "none.jsonl")
	require.NoError(t, os.WriteFile(none, nil, 0o666))
	kinds := []error{lorakit.ErrData, lorakit.ErrArchitecture, lorakit.ErrMemory, lorakit.ErrNotFinite, lorakit.ErrExists,
		lorakit.ErrRefused}
	for _, c := range []struct {
		base string
		o    lorakit.ValidateOptions
		kind error
	}{
		{llama, lorakit.ValidateOptions{Data: none}, lorakit.ErrData},
		{filepath.Join("fixtures", "adapters", "bases", "bert"), lorakit.ValidateOptions{}, lorakit.ErrArchitecture},
		{llama, lorakit.ValidateOptions{Memory: 1 << 20}, lorakit.ErrMemory},
		{llama, lorakit.ValidateOptions{Adapter: adapter, Steps: 1, Rate: 1e-3, Memory: 1 << 20}, lorakit.ErrMemory},
		{llama, lorakit.ValidateOptions{Adapter: adapter, Steps: 2, Rate: 1e38}, lorakit.ErrNotFinite},
		{llama, lorakit.ValidateOptions{Adapter: adapter, Steps: 1, Rate: 1, Save: t.TempDir()}, lorakit.ErrExists},
		{adapter, lorakit.ValidateOptions{}, lorakit.ErrRefused},
		{llama, lorakit.ValidateOptions{Against: adapter}, lorakit.ErrRefused},
	} {
		if c.o.Data == "" {
			c.o.Data = batchFile(t)
		}
		_, err := lorakit.Validate(t.Context(), c.base, c.o)
		for _, kind := range kinds {
			assert.Equal(t, kind == c.kind, errors.Is(err, kind), "%v is %v", err, kind)
		}
	}
}
