package lorakit_test

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/checkpoint"
)

// TestMergeKeepsFormats merges onto formats that are written: the result is in the same format, what is untouched has
// the same bytes, and what is changed those of a plain merge that is then quantised.
func TestMergeKeepsFormats(t *testing.T) {
	m := peftMerges(t)["llama/attention"]
	for _, typ := range []string{"fp8", "fp8-channel", "nvfp4", "mxfp4", "mxfp8", "w8a8"} {
		t.Run(typ, func(t *testing.T) {
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			o := lorakit.ConvertOptions{Quantize: typ, Exclude: []string{"*.down_proj.weight"}}
			_, err := lorakit.Convert(t.Context(), baseOf(m.base), path("base"), o)
			require.NoError(t, err)
			merge := func(dst, quantize string) {
				_, err := lorakit.Merge(t.Context(), path("base"), m.adapters, path(dst),
					lorakit.ConvertOptions{Quantize: quantize, MinKept: -1})
				require.NoError(t, err)
			}
			merge("merged", "keep")
			merge("plain", "none")
			_, err = lorakit.Convert(t.Context(), path("plain"), path("again"), o)
			require.NoError(t, err)
			base, merged, again := stored(t, path("base")), stored(t, path("merged")), stored(t, path("again"))
			require.Equal(t, len(base), len(merged))
			changed := 0
			for name, b := range merged {
				if strings.Contains(name, ".self_attn.") {
					require.Equal(t, again[name], b, name)
					if base[name] != b {
						changed++
					}
					continue
				}
				require.Equal(t, base[name], b, name)
			}
			require.Positive(t, changed)
			was, err := os.ReadFile(path("base/config.json"))
			require.NoError(t, err)
			is, err := os.ReadFile(path("merged/config.json"))
			require.NoError(t, err)
			require.Equal(t, string(was), string(is))
		})
	}
}

// TestMergeSharesScales: where one of the weights changes that engines join, all of them have the new scale of scales.
func TestMergeSharesScales(t *testing.T) {
	dir := t.TempDir()
	base, merged := filepath.Join(dir, "base"), filepath.Join(dir, "merged")
	o := lorakit.ConvertOptions{Quantize: "nvfp4", Exclude: []string{"*.down_proj.weight"}}
	_, err := lorakit.Convert(t.Context(), baseOf(peftMerges(t)["llama/attention"].base), base, o)
	require.NoError(t, err)
	_, err = lorakit.Attach(t.Context(), base, filepath.Join(dir, "adapter"),
		lorakit.AttachOptions{Rank: 4, Target: "q_proj"})
	require.NoError(t, err)
	// A large delta in layer 0 alone.
	adapter := filepath.Join(dir, "adapter", "adapter_model.safetensors")
	c := openedCheckpoint(t, adapter)
	b, err := os.ReadFile(adapter)
	require.NoError(t, err)
	for _, w := range c.Weights {
		if strings.Contains(w.Name, "layers.0.self_attn.q_proj.lora_B") {
			for i := range w.Count() {
				binary.LittleEndian.PutUint32(b[w.Parts[0].Offset+4*i:], math.Float32bits(float32(i%7)))
			}
		}
	}
	require.NoError(t, os.WriteFile(adapter, b, 0o666))
	result, err := lorakit.Merge(t.Context(), base, []lorakit.Adapter{{Path: filepath.Join(dir, "adapter")}}, merged,
		lorakit.ConvertOptions{MinKept: -1})
	require.NoError(t, err)
	require.Contains(t, strings.Join(result.Notices, "\n"),
		"quantised anew, since they share a scale with weights that change: 4 weights")
	was, is := stored(t, base), stored(t, merged)
	const layer, global = "model.layers.0.", ".weight_global_scale"
	q := is[layer+"self_attn.q_proj"+global]
	require.NotEqual(t, was[layer+"self_attn.q_proj"+global], q)
	for _, k := range []string{"k", "v"} {
		require.Equal(t, q, is[layer+"self_attn."+k+"_proj"+global])
	}
	require.Equal(t, was[layer+"self_attn.o_proj"+global], is[layer+"self_attn.o_proj"+global])
	gate := layer + "mlp.gate_proj"
	require.Equal(t, was[gate+global], was[layer+"mlp.up_proj"+global])
	require.Equal(t, was[gate+".weight_packed"], is[gate+".weight_packed"])
	// What has the scale that it had has the values that it had: only -0 becomes 0.
	const other = "model.layers.1.self_attn.k_proj."
	require.Equal(t, was[other+"weight_scale"], is[other+"weight_scale"])
	codes, again := was[other+"weight_packed"], is[other+"weight_packed"]
	require.Len(t, again, len(codes))
	for i := strings.IndexByte(codes, ']') + 1; i < len(codes); i++ { // behind the type and shape
		for _, shift := range []int{0, 4} {
			code, now := codes[i]>>shift&15, again[i]>>shift&15
			require.True(t, code == now || code == 8 && now == 0, "byte %d: %#x, expected %#x", i, again[i], codes[i])
		}
	}
}

// stored has the bytes of all tensors as they lie in the files, after their types.
func stored(t *testing.T, path string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, w := range openedCheckpoint(t, path).Weights {
		for _, p := range w.Parts {
			b := make([]byte, p.Bytes)
			require.NoError(t, checkpoint.ReadPart(&p, b, 0))
			all[p.Name] = p.DType.String() + p.Shape.String() + string(b)
		}
	}
	return all
}

func openedCheckpoint(t *testing.T, path string) *checkpoint.Checkpoint {
	t.Helper()
	c, err := checkpoint.Open(t.Context(), path)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// TestOneNotice says once what a scheme has to say of many weights.
func TestOneNotice(t *testing.T) {
	r, err := lorakit.Convert(t.Context(), "fixtures/tiny-llama", filepath.Join(t.TempDir(), "out"),
		lorakit.ConvertOptions{Quantize: "fp8"})
	require.NoError(t, err)
	require.Greater(t, r.Quantized, 3)
	require.Len(t, r.Notices, 1)
	require.Contains(t, r.Notices[0], fmt.Sprintf(`tensors "model.layers.0.mlp.down_proj.weight", `+
		`"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight" and %d more: smaller blocks at the end, `+
		`as 128x128 does not divide the shape`, r.Quantized-3))
}
