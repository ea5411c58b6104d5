package lora

import (
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	_ "github.com/lorakit/lorakit/formats/safetensors" // registers the container
)

// Resize keeps the best approximation of a delta, its scaling included.
func TestResize(t *testing.T) {
	for _, name := range []string{"llama/attention", "llama/rslora", "llama/embedding-head", "llama/patterns",
		"tiny-gpt2/attention", "tiny-mixtral/attention"} {
		w := open(t, name, 1)
		whole := map[string]Trained{}
		require.NoError(t, Combine(t.Context(), []Weighted{w}, CombineOptions{Type: "linear"},
			func(m Trained) error { whole[m.Name] = m; return nil }))
		resized := func(rank int, energy float64) map[string]Trained {
			out := map[string]Trained{}
			_, err := Resize(t.Context(), w.Adapter, rank, energy, func(m Trained) error { out[m.Name] = m; return nil })
			require.NoError(t, err)
			require.Len(t, out, len(whole))
			return out
		}
		for module, m := range resized(8, 0) {
			require.Equal(t, 8, m.Rank)
			require.Equal(t, whole[module].Form, m.Form)
			near(t, product(whole[module]), product(m), 1e-6, module)
		}
		energy := func(v []float64) (sum float64) {
			for _, x := range v {
				sum += x * x
			}
			return sum
		}
		for _, share := range []float64{0.3, 0.9, 1} {
			for module, m := range resized(0, share) {
				all := energy(product(whole[module]))
				require.GreaterOrEqual(t, energy(product(m)), all*(share-1e-5), module)
				require.LessOrEqual(t, m.Rank, whole[module].Rank)
				if m.Rank > 1 {
					less := energy(product(resized(m.Rank-1, 0)[module]))
					require.Less(t, less, all*share, module)
				}
			}
		}
	}
}

func TestResizeRefuses(t *testing.T) {
	w := open(t, "llama/attention", 1)
	for says, c := range map[string]struct {
		adapter *Adapter
		rank    int
		energy  float64
	}{
		"rank -1":                     {w.Adapter, -1, 0},
		"energy 0, expected":          {w.Adapter, 0, 0},
		"energy 1.5":                  {w.Adapter, 0, 1.5},
		"energy NaN":                  {w.Adapter, 0, math.NaN()},
		"expected one of them":        {w.Adapter, 2, 0.5},
		"larger than its matrix":      {w.Adapter, 1 << 40, 0},
		"init_lora_weights is \"piss": {open(t, "llama/init-pissa", 1).Adapter, 2, 0},
	} {
		_, err := Resize(t.Context(), c.adapter, c.rank, c.energy, func(Trained) error { return nil })
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "\n")
	}
}

// TestResizeKeepsParameters resizes modules that target_parameters alone means: PEFT would not find them by
// target_modules.
func TestResizeKeepsParameters(t *testing.T) {
	dir := t.TempDir()
	writeTensors(t, filepath.Join(dir, adapterFiles[0]), map[string][]int64{
		prefix + "mlp.gate_proj.lora_A.weight": {2, 4}, prefix + "mlp.gate_proj.lora_B.weight": {6, 2},
		prefix + "q_proj.lora_A.weight": {2, 4}, prefix + "q_proj.lora_B.weight": {6, 2},
	})
	require.NoError(t, os.WriteFile(filepath.Join(dir, configName),
		[]byte(
			`{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}`), 0o644))
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	got := map[string]bool{}
	_, err = Resize(t.Context(), a, 1, 0, func(m Trained) error { got[m.Name] = m.Parameter; return nil })
	require.NoError(t, err)
	require.Equal(t, map[string]bool{"mlp.gate_proj": true, "q_proj": false}, got)
}
