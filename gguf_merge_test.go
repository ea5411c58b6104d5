package lorakit_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// ggufBases are the bases of adapters that have a place in GGUF.
var ggufBases = []string{"llama", "phi3", "qwen2", "tiny-gemma3", "tiny-mixtral", "tiny-qwen3"}

// TestMergeToGGUFAtOnce: a merge into a GGUF file is one into a folder in float32 that is then converted, for every
// kind of adapter, byte for byte.
func TestMergeToGGUFAtOnce(t *testing.T) {
	t.Parallel()
	for name, m := range peftMerges(t) {
		base := baseOf(m.base)
		if !strings.Contains(strings.Join(ggufBases, " ")+" ", m.base+" ") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			plain := filepath.Join(dir, "plain")
			whole, err := lorakit.Merge(t.Context(), base, m.adapters, plain, lorakit.ConvertOptions{DType: "f32"})
			require.NoError(t, err)
			for _, o := range []lorakit.ConvertOptions{
				{DType: "f32"}, {DType: "f16"}, {DType: "bf16"}, {Quantize: "q8_0"}, {Quantize: "q4_0"}, {Quantize: "q4_k_m"},
			} {
				as := o.DType + o.Quantize
				once, twice := filepath.Join(dir, "once-"+as+".gguf"), filepath.Join(dir, "twice-"+as+".gguf")
				o.MinKept = -1
				r, err := lorakit.Merge(t.Context(), base, m.adapters, once, o)
				require.NoError(t, err, as)
				_, err = lorakit.Convert(t.Context(), plain, twice, o)
				require.NoError(t, err, as)
				sameTensors(t, load(t, twice), load(t, once))
				sameKeys(t, twice, once)
				if strings.HasSuffix(name, "everywhere") { // GGUF has no place for the part of it in the vision tower
					require.NotEmpty(t, r.Adapters[0].Unused)
					require.Contains(t, strings.Join(r.Notices, "\n"), "that part of them is not in the result: ")
				} else if o.DType == "f32" {
					sameShares(t, whole.Adapters, r.Adapters)
				}
			}
		})
	}
}

// sameShares holds kept shares against others, which were summed up in another order.
func sameShares(t *testing.T, want, got []lorakit.KeptAdapter) {
	t.Helper()
	require.Len(t, got, len(want))
	for i, w := range want {
		g := got[i]
		require.Equal(t, w.Path, g.Path)
		require.Equal(t, w.Unused, g.Unused)
		require.InDelta(t, w.Kept, g.Kept, 1e-6)
		require.Len(t, g.Modules, len(w.Modules))
		for k, m := range w.Modules {
			require.Equal(t, m.Name, g.Modules[k].Name)
			require.InDelta(t, m.Kept, g.Modules[k].Kept, 1e-6, m.Name)
			require.InEpsilon(t, 1+m.Delta, 1+g.Modules[k].Delta, 1e-9, m.Name)
			require.Equal(t, m.Least == nil, g.Modules[k].Least == nil, m.Name)
			if m.Least != nil {
				require.InDelta(t, m.Least.Kept, g.Modules[k].Least.Kept, 1e-6, m.Name)
			}
		}
	}
}
