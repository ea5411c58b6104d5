package lorakit_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// TestGGUFSameBytes: a merge into GGUF files has the same bytes whatever the threads and the memory, in one run or in
// several. It runs alone: the memory that is allowed is that of the process.
func TestGGUFSameBytes(t *testing.T) {
	for _, base := range []string{"mixtral", "gptoss", "gpt2", "deepseek3"} {
		adapters := madeAdapters(t, base)
		for _, a := range adapters {
			if a.kind != "dora" && a.kind != "experts" {
				continue
			}
			t.Run(base+"/"+a.kind, func(t *testing.T) {
				src, adapter := filepath.Join(ggufModels, base), []lorakit.Adapter{{Path: a.make(t, base)}}
				o := lorakit.ConvertOptions{To: "gguf", Quantize: "q4_0", MaxShardSize: 20_000, MinKept: -1}
				first := filepath.Join(t.TempDir(), "first")
				want, err := lorakit.Merge(t.Context(), src, adapter, first, o)
				require.NoError(t, err)
				require.Greater(t, want.Shards, 2)
				for _, threads := range []int{1, 2, 7} {
					for _, memory := range []int64{64 << 20, 256 << 20} {
						o.Threads, o.Memory = threads, memory
						out := filepath.Join(t.TempDir(), "out")
						got, err := lorakit.Merge(t.Context(), src, adapter, out, o)
						require.NoError(t, err)
						sameFolder(t, first, out)
						require.Equal(t, want.Adapters, got.Adapters)
					}
				}

				// As soon as a shard is finished it is interrupted, and gone on with.
				out := filepath.Join(t.TempDir(), "out")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				o.Progress = func(p lorakit.Progress) {
					if p.Shards > 0 {
						cancel()
					}
				}
				if _, err := lorakit.Merge(ctx, src, adapter, out, o); err != nil {
					require.ErrorIs(t, err, pipeline.ErrInterrupted)
					o.Resume, o.Progress = true, nil
					got, err := lorakit.Merge(t.Context(), src, adapter, out, o)
					require.NoError(t, err)
					sameShares(t, want.Adapters, got.Adapters)
				}
				sameFolder(t, first, out)

				// In one file it has the same tensors.
				one := filepath.Join(t.TempDir(), "one.gguf")
				o = lorakit.ConvertOptions{Quantize: "q4_0", MinKept: -1}
				whole, err := lorakit.Merge(t.Context(), src, adapter, one, o)
				require.NoError(t, err)
				sameShares(t, want.Adapters, whole.Adapters)
				sameTensors(t, load(t, one), load(t, first))
			})
		}
	}
}

// TestManyExpertsInLittleMemory: experts that are stacked share the factors of an adapter, which are read once.
func TestManyExpertsInLittleMemory(t *testing.T) {
	const experts, wide, inner = 64, 256, 32
	src := filepath.Join(t.TempDir(), "src")
	require.NoError(t, os.Mkdir(src, 0o777))
	b, err := os.ReadFile(filepath.Join(ggufModels, "qwen3moe", "config.json"))
	require.NoError(t, err)
	config := map[string]any{}
	require.NoError(t, json.Unmarshal(b, &config))
	delete(config, "num_local_experts")
	maps.Copy(config, map[string]any{
		"hidden_size": wide, "moe_intermediate_size": inner, "num_experts": experts, "num_hidden_layers": 1, "head_dim": 16,
		"num_attention_heads": 4, "num_key_value_heads": 2,
	})
	b, err = json.Marshal(config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(src, "config.json"), b, 0o666))
	const layer = "model.layers.0."
	shapes := map[string]tensor.Shape{
		"model.embed_tokens": {320, wide}, "lm_head": {320, wide}, "model.norm": {wide}, layer + "input_layernorm": {wide},
		layer + "post_attention_layernorm": {wide}, layer + "self_attn.q_proj": {64, wide},
		layer + "self_attn.k_proj": {32, wide}, layer + "self_attn.v_proj": {32, wide},
		layer + "self_attn.o_proj": {wide, 64}, layer + "self_attn.q_norm": {16}, layer + "self_attn.k_norm": {16},
		layer + "mlp.gate": {experts, wide},
	}
	for i := range experts {
		expert := fmt.Sprint(layer, "mlp.experts.", i, ".")
		shapes[expert+"gate_proj"] = tensor.Shape{inner, wide}
		shapes[expert+"up_proj"] = tensor.Shape{inner, wide}
		shapes[expert+"down_proj"] = tensor.Shape{wide, inner}
	}
	tensors := map[string]entry{}
	for name, shape := range shapes {
		tensors[name+".weight"] = random(shape, name, 0, 0.02)
	}
	writeTensors(t, filepath.Join(src, "model.safetensors"), tensors)

	a := madeAdapter{kind: "experts", target: "gate_up_proj,down_proj"}
	adapter := []lorakit.Adapter{{Path: a.makeFor(t, src)}}
	dir := t.TempDir()
	o := lorakit.ConvertOptions{Memory: 64 << 20, Threads: 2}
	once, plain, twice := filepath.Join(dir, "once.gguf"), filepath.Join(dir, "plain"), filepath.Join(dir, "twice.gguf")
	r, err := lorakit.Merge(t.Context(), src, adapter, once, o)
	require.NoError(t, err)
	whole, err := lorakit.Merge(t.Context(), src, adapter, plain, o)
	require.NoError(t, err)
	sameShares(t, whole.Adapters, r.Adapters)
	_, err = lorakit.Convert(t.Context(), plain, twice, o)
	require.NoError(t, err)
	sameTensors(t, load(t, twice), load(t, once))
}
