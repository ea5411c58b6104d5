package train

import (
	"bytes"
	"encoding/json"
	"maps"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/dustin/go-humanize"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
)

const twoRows = `{"input_ids": [3, 14, 15, 9, 26]}` + "\n" + `{"input_ids": [5, 35, 8, 9, 7]}`

// changed is a base like one of the fixtures, with other tensors and another config.
func changed(t testing.TB, like string, tensors func(map[string]rawTensor), config map[string]any) string {
	all := readRaw(t, filepath.Join(baseOf(like), "model.safetensors"))
	if tensors != nil {
		tensors(all)
	}
	dir := writeBase(t, like, all)
	changeJSON(t, filepath.Join(dir, "config.json"), config)
	return dir
}

// changeJSON sets keys of a file.
func changeJSON(t testing.TB, path string, values map[string]any) {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	var c map[string]any
	require.NoError(t, json.Unmarshal(b, &c))
	maps.Copy(c, values)
	b, err = json.Marshal(c)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, b, 0o666))
}

// changedAdapter is a copy of one of the fixtures.
func changedAdapter(t testing.TB, name string, tensors func(map[string]rawTensor), config map[string]any) string {
	dir := t.TempDir()
	require.NoError(t, os.CopyFS(dir, os.DirFS(filepath.Join(stepFixtures, name))))
	if tensors != nil {
		path := filepath.Join(dir, adapterTensors)
		all := readRaw(t, path)
		tensors(all)
		writeRaw(t, path, all)
	}
	changeJSON(t, filepath.Join(dir, adapterConfig), config)
	return dir
}

// TestValidateRefuses what cannot be computed. The error is a line that names what is wrong, and nothing is written.
func TestValidateRefuses(t *testing.T) {
	const up = "model.layers.1.mlp.up_proj.weight"
	const copied = "base_model.model.model.embed_tokens.base_layer.weight"
	nan, infinity := float32(math.NaN()), float32(math.Inf(-1))
	with := func(v float32, names ...string) string { // an element of these tensors is v
		return changed(t, "llama", func(all map[string]rawTensor) {
			for _, name := range names {
				require.Contains(t, all, name)
				all[name] = all[name].with(t, 5, v)
			}
		}, nil)
	}
	start := func(kind string) string {
		return changedAdapter(t, "llama/all", nil, map[string]any{"init_lora_weights": kind})
	}
	llama, adapter := baseOf("llama"), filepath.Join(stepFixtures, "llama/all")
	for what, c := range map[string]struct {
		base, adapter string
		kind          error
		says          []string
	}{
		"a missing tensor": {changed(t, "llama", func(all map[string]rawTensor) { delete(all, up) }, nil), adapter,
			checkpoint.ErrRefused, []string{up}},
		"a wrong shape": {changed(t, "llama", func(all map[string]rawTensor) {
			x := all[up]
			x.Shape = []int{x.Shape[1], x.Shape[0]}
			all[up] = x
		}, nil), adapter, checkpoint.ErrRefused, []string{up, "[24, 32]", "[32, 24]"}},
		"a smaller config": {changed(t, "llama", nil, map[string]any{"vocab_size": 66}), adapter, checkpoint.ErrRefused,
			[]string{"model.embed_tokens.weight", "66"}},
		"no step": {changed(t, "llama", nil, map[string]any{"architectures": []string{"BambaForCausalLM"},
			"model_type": "bamba"}), adapter, ErrArchitecture,
			[]string{"bamba", "LlamaForCausalLM", "StableLmForCausalLM", "Qwen3MoeForCausalLM"}},
		"a weight that is NaN": {with(nan, up), adapter, ErrNotFinite, []string{up}},
		"an infinite weight":   {with(infinity, up), adapter, ErrNotFinite, []string{up}},
		"an infinite norm":     {with(infinity, "model.norm.weight"), adapter, ErrNotFinite, []string{"model.norm.weight"}},
		"NaN in a layer":       {with(nan, up), "", ErrNotFinite, []string{"model.layers.1: "}},
		"NaN in the embedding": {with(nan, "model.embed_tokens.weight"), adapter, ErrNotFinite,
			[]string{"model.embed_tokens.weight"}},
		"NaN in the head":      {with(nan, "lm_head.weight"), "", ErrNotFinite, []string{"lm_head: "}},
		"NaN in the last norm": {with(nan, "model.norm.weight"), "", ErrNotFinite, []string{"model.norm: "}},
		"an activation too large": {with(1e30, "model.layers.0.mlp.gate_proj.bias", "model.layers.0.mlp.up_proj.bias"),
			adapter, ErrNotFinite, []string{"model.layers.0: "}},
		"NaN in the copy of the base": {llama, changedAdapter(t, "llama/dora-embedding", func(all map[string]rawTensor) {
			all[copied] = all[copied].with(t, 5, nan)
		}, nil), ErrNotFinite, []string{copied}},
		"NaN in the adapter": {llama, changedAdapter(t, "llama/b-zero", func(all map[string]rawTensor) {
			for name := range all {
				all[name] = all[name].with(t, 1, nan)
			}
		}, nil), lora.ErrMalformed, []string{"lora_A"}},
		"pissa":          {llama, start("pissa"), lora.ErrUnsupported, []string{"pissa"}},
		"olora":          {llama, start("olora"), lora.ErrUnsupported, []string{"olora"}},
		"another base":   {baseOf("gpt2"), adapter, lora.ErrBase, []string{"proj"}},
		"no such folder": {llama, filepath.Join(t.TempDir(), "none"), os.ErrNotExist, nil},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			o := Options{Data: writeData(t, twoRows), Adapter: c.adapter, Threads: 2}
			if c.adapter != "" {
				o.Steps, o.Rate = 2, 1e-3
				o.Save, o.SaveGradients = filepath.Join(dir, "saved"), filepath.Join(dir, "gradients.safetensors")
			}
			_, err := Validate(t.Context(), c.base, o)
			require.ErrorIs(t, err, c.kind)
			for _, says := range c.says {
				require.ErrorContains(t, err, says)
			}
			require.NotContains(t, err.Error(), "\n")
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
}

// TestNothingIsReplaced has an error for what is there already, before the first step.
func TestNothingIsReplaced(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "gradients.safetensors")
	require.NoError(t, os.WriteFile(file, []byte("mine"), 0o666))
	o := Options{Data: writeData(t, twoRows), Adapter: filepath.Join(stepFixtures, "llama/all"), Steps: 1, Rate: 1e-3,
		SaveGradients: file, Save: filepath.Join(dir, "saved")}
	_, err := Validate(t.Context(), baseOf("llama"), o)
	require.ErrorIs(t, err, os.ErrExist)
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "mine", string(b))
	require.NoDirExists(t, o.Save)

	o.SaveGradients, o.Save = filepath.Join(dir, "other.safetensors"), dir
	_, err = Validate(t.Context(), baseOf("llama"), o)
	require.ErrorIs(t, err, os.ErrExist)
	require.NoFileExists(t, o.SaveGradients)
}

// TestTooLittleMemory names what does not fit. With what the hint says it runs, and gives what it does without a bound.
func TestTooLittleMemory(t *testing.T) {
	long := bytes.Repeat([]byte("5, 17, 40, 2, 66, "), 60)
	for _, c := range []struct{ base, adapter, data string }{
		{"llama", "llama/all", twoRows}, {"gemma2", "gemma2/all", `{"input_ids": [` + string(long) + `1]}`},
		{"qwen3-moe", "", `{"input_ids": [` + string(long) + `1]}`}, {"gpt2", "gpt2/dora", twoRows},
		{"llama", "llama/dora-embedding", `{"input_ids": [` + string(long) + string(long) + string(long) + `1]}`},
	} {
		t.Run(c.base+"/"+c.adapter, func(t *testing.T) {
			o := Options{Data: writeData(t, c.data), Threads: 3}
			if c.adapter != "" {
				o.Adapter, o.Steps, o.Rate = filepath.Join(stepFixtures, c.adapter), 1, 1e-3
			}
			want, err := Validate(t.Context(), baseOf(c.base), o)
			require.NoError(t, err)
			o.Memory = 4 << 20
			tried := 0
			for ; ; tried++ { // the adapter is counted before the layers
				require.Less(t, tried, 3)
				r, err := Validate(t.Context(), baseOf(c.base), o)
				if err == nil {
					require.Equal(t, want.LossBefore, r.LossBefore)
					require.Equal(t, want.LossAfter, r.LossAfter)
					break
				}
				require.ErrorIs(t, err, ErrMemory)
				require.NotContains(t, err.Error(), "\n")
				hints := hint.Of(err)
				require.Len(t, hints, 1)
				require.Equal(t, "Memory", hints[0].Option)
				if hints[0].Value != "" {
					require.Regexp(t, `layer \S+ does not fit: it takes [0-9.]+ .?i?B`, err.Error())
					n, err := humanize.ParseBytes(hints[0].Value)
					require.NoError(t, err)
					require.Greater(t, int64(n), o.Memory)
					o.Memory = int64(n)
				} else {
					o.Memory *= 8
				}
			}
			require.Positive(t, tried)
		})
	}
}
