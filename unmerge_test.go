package lorakit_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestUnmergeRounding merges adapters of embeddings and a linear layer into a bfloat16 model and takes them away
// again. What is lost is the rounding of the merged weight, so it grows with the delta: where that is sixteen times the
// weight it is some 2.6 % of it. Rounding tells it before anybody compares.
func TestUnmergeRounding(t *testing.T) {
	t.Parallel()
	base := baseOf("tiny-gpt2")
	was, shape := numbers(t, base), shapes(t, base)
	norm := func(v []float32) float64 {
		s := 0.0
		for _, x := range v {
			s += float64(x) * float64(x)
		}
		return math.Sqrt(s)
	}
	for _, size := range []float64{0.1, 1, 16} { // of the delta, for a weight of 1
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, uint64(1000*size)))
			random := func(scale float64, shape ...int64) entry {
				v := make([]float32, shape[0]*shape[1])
				for i := range v {
					v[i] = float32(scale * r.NormFloat64())
				}
				return floats(v, shape...)
			}
			parts := map[string]entry{}
			modules := []string{"transformer.wte", "transformer.wpe", "transformer.h.0.attn.c_attn"}
			for _, m := range modules {
				s := shape[m+".weight"]
				scale := size * norm(was[m+".weight"]) / math.Sqrt(float64(4*s[0]*s[1])) // of a product of rank 4
				key := "base_model.model." + m
				if m == modules[2] { // which lies (in, out)
					parts[key+".lora_A.weight"], parts[key+".lora_B.weight"] = random(1, 4, s[0]), random(scale, s[1], 4)
				} else {
					parts[key+".lora_embedding_A"], parts[key+".lora_embedding_B"] = random(1, 4, s[0]), random(scale, s[1], 4)
				}
			}
			adapter := lorakit.Adapter{Path: madeFolder(t, `{"peft_type": "LORA", "r": 4, "lora_alpha": 4}`,
				"adapter_model.safetensors", parts)}
			merged, out := filepath.Join(t.TempDir(), "merged"), filepath.Join(t.TempDir(), "out")
			_, err := lorakit.Merge(t.Context(), base, []lorakit.Adapter{adapter}, merged, lorakit.ConvertOptions{})
			require.NoError(t, err)
			result, err := lorakit.Unmerge(t.Context(), merged, []lorakit.Adapter{adapter}, out, lorakit.ConvertOptions{})
			require.NoError(t, err)
			now, told := numbers(t, out), map[string]float64{}
			for _, x := range result.Rounding {
				told[x.Tensor] = x.Relative
			}
			for _, m := range modules {
				name := m + ".weight"
				apart := make([]float32, len(was[name]))
				for i := range apart {
					apart[i] = now[name][i] - was[name][i]
				}
				lost := norm(apart) / norm(was[name])
				// A rounding to 8 bits takes 1.66e-3 of what is rounded; two at the most.
				assert.Less(t, lost, 2*1.7e-3*(1+size), name)
				assert.Less(t, lost, 1.2*told[name], name)
				if size > 1 {
					assert.Greater(t, lost, 1.5e-3*size, name)
					assert.Greater(t, lost, 0.8*told[name], name)
				}
			}
		})
	}
}
