package lorakit_test

import (
	"context"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

const adapterTensors = "adapter_model.safetensors"

func attach(t *testing.T, base string, o lorakit.AttachOptions) (string, *lorakit.Attachment) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	r, err := lorakit.Attach(t.Context(), base, out, o)
	require.NoError(t, err)
	return out, r
}

// relative is how far a matrix is from another, by the Frobenius norm.
func relative(t *testing.T, got, want []float64) float64 {
	t.Helper()
	require.Equal(t, len(want), len(got))
	var apart, all float64
	for i := range want {
		apart += (got[i] - want[i]) * (got[i] - want[i])
		all += want[i] * want[i]
	}
	return math.Sqrt(apart / all)
}

// TestAttachAsPEFT holds the starts against those that PEFT makes itself.
func TestAttachAsPEFT(t *testing.T) {
	for _, c := range []struct{ base, init string }{{"tiny-llama", "pissa"}, {"tiny-llama", "olora"},
		{"tiny-gpt2", "pissa"}} {
		t.Run(c.base+"-"+c.init, func(t *testing.T) {
			out, r := attach(t, baseOf(c.base), lorakit.AttachOptions{Rank: 4, Alpha: 12, Init: c.init})
			require.False(t, r.Unchanged)
			file := filepath.Join("fixtures/attach", c.base+"-"+c.init+".safetensors")
			got, want, shape := numbers(t, filepath.Join(out, adapterTensors)), numbers(t, file), shapes(t, file)
			require.Len(t, got, len(want))
			for k, a := range want {
				name, ok := strings.CutSuffix(k, "lora_A.weight")
				if !ok {
					continue
				}
				in := int(shape[k][1])
				b, mine := name+"lora_B.weight", got[k]
				require.LessOrEqual(t, relative(t, product(mine, got[b], in), product(a, want[b], in)), 1e-4, k)
				if c.init == "olora" { // its signs are those of a Householder QR
					for i := range a {
						require.InDelta(t, a[i], mine[i], 2e-4, k)
					}
				}
			}
			for _, m := range r.Modules {
				require.Positive(t, *m.Before)
				require.Positive(t, *m.After)
			}
		})
	}
}

// TestAttachResidual computes the errors that pissa reports again, by the steps that a user takes.
func TestAttachResidual(t *testing.T) {
	base := baseOf("tiny-llama-f32")
	out, r := attach(t, base, lorakit.AttachOptions{Rank: 8, Alpha: 16, Init: "pissa", Target: "down_proj"})
	weights, factors := numbers(t, base), numbers(t, filepath.Join(out, adapterTensors))
	rest := filepath.Join(t.TempDir(), "rest")
	// The residual is the base less the adapter, which is a plain one for this purpose.
	config, err := os.ReadFile(filepath.Join(out, "adapter_config.json"))
	require.NoError(t, err)
	require.Contains(t, string(config), `"init_lora_weights": "pissa"`)
	plain := strings.Replace(string(config), `"init_lora_weights": "pissa"`, `"init_lora_weights": true`, 1)
	require.NoError(t, os.WriteFile(filepath.Join(out, "adapter_config.json"), []byte(plain), 0o666))
	_, err = lorakit.Unmerge(t.Context(), base, []lorakit.Adapter{{Path: out}}, rest,
		lorakit.ConvertOptions{Quantize: "nf4", DoubleQuant: true, MinKept: -1})
	require.NoError(t, err)
	decoded := filepath.Join(t.TempDir(), "decoded")
	_, err = lorakit.Convert(t.Context(), rest, decoded, lorakit.ConvertOptions{Quantize: "none", DType: "f32"})
	require.NoError(t, err)
	low := numbers(t, decoded)
	for _, m := range r.Modules {
		want := wide(weights[m.Name+".weight"])
		got := scaledProduct(factors, m, 2)
		for i, v := range low[m.Name+".weight"] {
			got[i] += float64(v)
		}
		require.InDelta(t, *m.After, relative(t, got, want), 1e-5, m.Name)
	}
}

func wide(v []float32) []float64 {
	out := make([]float64, len(v))
	for i, x := range v {
		out[i] = float64(x)
	}
	return out
}

func scaledProduct(factors map[string][]float32, m lorakit.AttachedModule, scale float64) []float64 {
	p := product(factors["base_model.model."+m.Name+".lora_A.weight"],
		factors["base_model.model."+m.Name+".lora_B.weight"], m.In)
	for i := range p {
		p[i] *= scale
	}
	return p
}

// TestAttachLoftQ measures the errors on what was written, and that more steps never make them larger.
func TestAttachLoftQ(t *testing.T) {
	for _, name := range []string{"tiny-llama", "tiny-gpt2", "tiny-llama-f32"} {
		base := baseOf(name)
		weights := numbers(t, base)
		last := map[string]float64{}
		for _, n := range []int{1, 2, 5} {
			out, r := attach(t, base, lorakit.AttachOptions{Rank: 4, Alpha: 12, Init: "loftq", LoftQIterations: n})
			require.Equal(t, filepath.Join(out, "base"), r.Base)
			decoded := filepath.Join(t.TempDir(), "decoded")
			_, err := lorakit.Convert(t.Context(), r.Base, decoded, lorakit.ConvertOptions{Quantize: "none", DType: "f32"})
			require.NoError(t, err)
			low, factors := numbers(t, decoded), numbers(t, filepath.Join(out, adapterTensors))
			for _, m := range r.Modules {
				key := m.Name + ".weight"
				if weights[key] == nil {
					key = strings.TrimPrefix(key, "transformer.")
				}
				want, got := wide(weights[key]), scaledProduct(factors, m, 3)
				if name == "tiny-gpt2" { // stored as (in, out)
					got = turned(got, m.In)
				}
				for i, v := range low[key] {
					got[i] += float64(v)
				}
				require.InDelta(t, *m.After, relative(t, got, want), 1e-5, "%s after %d", m.Name, n)
				require.Less(t, *m.After, *m.Before, m.Name)
				if before, ok := last[m.Name]; ok {
					require.LessOrEqual(t, *m.After, before+1e-12, m.Name)
				}
				last[m.Name] = *m.After
			}
			entries, err := os.ReadDir(out)
			require.NoError(t, err)
			require.Len(t, entries, 3) // the two files of the adapter, and its base
		}
	}
}

func turned(v []float64, cols int) []float64 {
	out, rows := make([]float64, len(v)), len(v)/cols
	for i := range rows {
		for j := range cols {
			out[j*rows+i] = v[i*cols+j]
		}
	}
	return out
}

// TestAttachRandom holds the plain starts against their distributions: a bound of 1/sqrt(in), a deviation of 1/rank,
// and B zero.
func TestAttachRandom(t *testing.T) {
	for init, rank := range map[string]int{"kaiming": 24, "gaussian": 16} {
		out, r := attach(t, baseOf("tiny-llama"),
			lorakit.AttachOptions{Rank: rank, Init: init, Seed: 3, Target: "mlp.gate_proj,mlp.up_proj,down_proj"})
		require.True(t, r.Unchanged)
		factors := numbers(t, filepath.Join(out, adapterTensors))
		for _, m := range r.Modules {
			require.Nil(t, m.Before)
			require.Equal(t, rank, m.Rank)
			a := factors["base_model.model."+m.Name+".lora_A.weight"]
			require.Len(t, a, rank*m.In)
			var sum, square, most float64
			for _, v := range a {
				sum, square, most = sum+float64(v), square+float64(v)*float64(v), max(most, math.Abs(float64(v)))
			}
			n := float64(len(a))
			deviation := 1 / float64(rank)
			if init == "kaiming" {
				bound := 1 / math.Sqrt(float64(m.In))
				require.LessOrEqual(t, most, bound+1e-9)
				require.Greater(t, most, 0.99*bound)
				deviation = bound / math.Sqrt(3)
			}
			require.InDelta(t, 0, sum/n, 5*deviation/math.Sqrt(n))
			require.InDelta(t, deviation, math.Sqrt(square/n), 5*deviation/math.Sqrt(n))
			for _, v := range factors["base_model.model."+m.Name+".lora_B.weight"] {
				require.Zero(t, v)
			}
		}
	}
}

// TestAttachRepeats: the same seed makes the same bytes for any number of threads, and the same values for a
// module whatever else is a target; another seed makes others.
func TestAttachRepeats(t *testing.T) {
	for _, init := range []string{"kaiming", "gaussian", "pissa", "olora", "loftq", "compensate"} {
		o := lorakit.AttachOptions{Rank: 4, Init: init, Seed: 1, Threads: 1}
		first, _ := attach(t, baseOf("tiny-llama"), o)
		o.Threads = 7
		again, _ := attach(t, baseOf("tiny-llama"), o)
		a, err := os.ReadFile(filepath.Join(first, adapterTensors))
		require.NoError(t, err)
		b, err := os.ReadFile(filepath.Join(again, adapterTensors))
		require.NoError(t, err)
		require.Equal(t, a, b, init)
		o.Target = "v_proj"
		some, _ := attach(t, baseOf("tiny-llama"), o)
		all := numbers(t, filepath.Join(first, adapterTensors))
		for k, v := range numbers(t, filepath.Join(some, adapterTensors)) {
			require.Equal(t, all[k], v, k)
		}
		if o.Seed = 2; init == "kaiming" || init == "gaussian" {
			other, _ := attach(t, baseOf("tiny-llama"), o)
			for k, v := range numbers(t, filepath.Join(other, adapterTensors)) {
				require.Equal(t, strings.Contains(k, "lora_A"), !slices.Equal(all[k], v), k)
			}
		}
	}
}

// TestAttachTargets holds what a target means.
func TestAttachTargets(t *testing.T) {
	for _, c := range []struct {
		base, target string
		modules      int
		first        string
		parameters   []string
		doubled      bool
	}{
		{"tiny-llama", "all-linear", 14, "", nil, false},
		{"tiny-llama", "attention", 8, "", nil, false},
		{"tiny-llama", `.*\.1\..*_proj`, 7, "", nil, false},
		{"tiny-mixtral", "all-linear", 14, "", []string{"down_proj", "gate.weight", "gate_up_proj"}, true},
		{"tiny-mixtral", "w2", 2, "model.layers.0.mlp.experts.down_proj", []string{"down_proj"}, false},
		{"tiny-mixtral", "gate_up_proj", 2, "model.layers.0.mlp.experts.gate_up_proj", []string{"gate_up_proj"}, false},
		// the dense layer's MLP is left alone
		{"qwen3-moe", "all-linear", 11, "", []string{"down_proj", "gate.weight", "gate_up_proj"}, true},
		{"qwen3-moe", "gate_proj,up_proj", 1, "model.layers.0.mlp.experts.gate_up_proj", []string{"gate_up_proj"}, true},
		{"qwen3-moe", ".*experts.*", 2, "", []string{"down_proj", "gate_up_proj"}, true},
		{"qwen3-moe", `.*layers\.0\.self_attn\..*`, 4, "", nil, false},
		{"tiny-gemma3", "all-linear", 23, "", nil, false}, // torch's own attention among them
		{"tiny-gemma3", "out_proj", 2, "", nil, false},
		{"tiny-qwen3", "lm_head", 1, "lm_head", nil, false}, // tied
		{"tiny-gpt2", "wte", 1, "transformer.wte", nil, false},
		{"llama-score", "all-linear", 14, "", nil, false},
		{"bert", "all-linear", 13, "", nil, false},
	} {
		t.Run(c.base+" "+c.target, func(t *testing.T) {
			out, r := attach(t, baseOf(c.base), lorakit.AttachOptions{Rank: 2, Alpha: 6, Target: c.target})
			require.True(t, r.Unchanged)
			require.Len(t, r.Modules, c.modules)
			if c.first != "" {
				require.Equal(t, c.first, r.Modules[0].Name)
			}
			b, err := os.ReadFile(filepath.Join(out, "adapter_config.json"))
			require.NoError(t, err)
			var config struct {
				Parameters []string           `json:"target_parameters"`
				Ranks      map[string]int     `json:"rank_pattern"`
				Alphas     map[string]float64 `json:"alpha_pattern"`
			}
			require.NoError(t, json.Unmarshal(b, &config))
			require.Equal(t, c.parameters, config.Parameters)
			if c.doubled {
				require.Equal(t, map[string]int{"gate_up_proj": 4}, config.Ranks)
				require.Equal(t, map[string]float64{"gate_up_proj": 12}, config.Alphas)
			} else {
				require.Empty(t, config.Ranks)
			}
			// Every tensor finds its place, and nothing changes.
			merged := filepath.Join(t.TempDir(), "merged")
			_, err = lorakit.Merge(t.Context(), baseOf(c.base), []lorakit.Adapter{{Path: out}}, merged, lorakit.ConvertOptions{})
			require.NoError(t, err)
			want := numbers(t, baseOf(c.base))
			for k, v := range numbers(t, merged) {
				if k != "lm_head.weight" || want[k] != nil { // no longer tied
					require.Equal(t, want[k], v, k)
				}
			}
		})
	}
}

// TestAttachExperts holds the shapes of a stack's factors.
func TestAttachExperts(t *testing.T) {
	out, r := attach(t, baseOf("qwen3-moe"), lorakit.AttachOptions{Rank: 3, Target: "gate_proj,up_proj,down_proj"})
	require.Equal(t, 4, r.Modules[0].Experts)
	shape := shapes(t, filepath.Join(out, adapterTensors))
	const experts = "base_model.model.model.layers.0.mlp.experts."
	require.Equal(t, []int64{4 * 6, 32}, []int64(shape[experts+"base_layer.lora_A.weight"]))
	require.Equal(t, []int64{2 * 24, 4 * 6}, []int64(shape[experts+"base_layer.lora_B.weight"]))
	require.Equal(t, []int64{4 * 3, 24}, []int64(shape[experts+"lora_A.weight"]))
	require.Equal(t, []int64{32, 4 * 3}, []int64(shape[experts+"lora_B.weight"]))
	require.Len(t, shape, 4)
}

// TestAttachPlainUnderFourBits: what is not in four bits has no error to answer to, and starts as usual; what
// torch runs without an adapter leaves nothing to one.
func TestAttachPlainUnderFourBits(t *testing.T) {
	for _, init := range []string{"loftq", "compensate"} {
		out, r := attach(t, baseOf("llama"), lorakit.AttachOptions{Rank: 4, Init: init, Target: "lm_head,q_proj"})
		factors := numbers(t, filepath.Join(out, adapterTensors))
		for _, m := range r.Modules {
			require.Equal(t, m.Name == "lm_head", m.Before == nil, m.Name)
		}
		require.NotZero(t, factors["base_model.model.lm_head.lora_A.weight"][0])
		require.Zero(t, slices.Max(factors["base_model.model.lm_head.lora_B.weight"]))
	}
	_, r := attach(t, baseOf("tiny-gemma3"), lorakit.AttachOptions{Rank: 4, Init: "pissa"})
	require.Len(t, r.Modules, 22)
	require.Contains(t, strings.Join(r.Notices, "\n"), "head.attention.out_proj is left out")
}

// TestAttachTask: the head that PEFT trains whole for a task comes along, as it is.
func TestAttachTask(t *testing.T) {
	out, _ := attach(t, baseOf("bert"), lorakit.AttachOptions{Rank: 2})
	b, err := os.ReadFile(filepath.Join(out, "adapter_config.json"))
	require.NoError(t, err)
	require.Contains(t, string(b), `"task_type": "SEQ_CLS"`)
	got, want := numbers(t, filepath.Join(out, adapterTensors)), numbers(t, baseOf("bert"))
	require.Equal(t, want["classifier.weight"], got["base_model.model.classifier.weight"])
	require.Equal(t, want["classifier.bias"], got["base_model.model.classifier.bias"])
	_, err = lorakit.Attach(t.Context(), baseOf("bert"), filepath.Join(t.TempDir(), "out"),
		lorakit.AttachOptions{Rank: 2, Target: "classifier"})
	require.ErrorIs(t, err, lorakit.ErrRefused)
}

// TestAttachRefuses holds what cannot be attached, and that nothing is left of it.
func TestAttachRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		base string
		o    lorakit.AttachOptions
		kind error
		says string
	}{
		"rank": {"tiny-llama", lorakit.AttachOptions{Rank: 25}, lorakit.ErrRefused,
			"rank 25 is larger than its matrix of 24 x 48"},
		"rank of a pair": {"qwen3-moe", lorakit.AttachOptions{Rank: 17, Target: "gate_proj,up_proj"}, lorakit.ErrRefused,
			"rank 34"},
		"init":  {"tiny-llama", lorakit.AttachOptions{Init: "best"}, lorakit.ErrOption, "known are kaiming"},
		"alpha": {"tiny-llama", lorakit.AttachOptions{Alpha: math.NaN()}, lorakit.ErrOption, "alpha NaN"},
		"no match": {"tiny-llama", lorakit.AttachOptions{Target: "c_attn"}, lorakit.ErrRefused,
			"matches none of its linear layers, such as model.layers.0."},
		"empty name": {"tiny-llama", lorakit.AttachOptions{Target: "q_proj,,"}, lorakit.ErrOption, "empty name"},
		"expression": {"tiny-llama", lorakit.AttachOptions{Target: "(q_proj"}, lorakit.ErrOption, "target \"(q_proj\""},
		"runaway": {"tiny-llama", lorakit.AttachOptions{Target: `(([a-z0-9._]+)+)+\$`}, lorakit.ErrRefused,
			"takes too long"},
		"half": {"tiny-mixtral", lorakit.AttachOptions{Rank: 2, Target: "w1"}, lorakit.ErrRefused, "w1 without w3"},
		"experts": {"tiny-mixtral", lorakit.AttachOptions{Rank: 2, Init: "compensate"}, lorakit.ErrRefused,
			"leaves experts and routers out of four bits"},
		"experts' pissa": {"tiny-mixtral", lorakit.AttachOptions{Rank: 2, Init: "pissa"}, lorakit.ErrRefused,
			"PEFT has no init pissa for experts"},
		"embedding": {"tiny-gpt2", lorakit.AttachOptions{Target: "wte", Init: "olora"}, lorakit.ErrRefused,
			"no init olora for an embedding"},
		"tied": {"tiny-qwen3", lorakit.AttachOptions{Target: "lm_head", Init: "pissa"}, lorakit.ErrRefused,
			"its weight is the embedding's too"},
		"convolution": {"resnet", lorakit.AttachOptions{Target: "convolution"}, lorakit.ErrRefused, "it is a convolution"},
		"four bits": {"expected/tiny-llama/nf4-dq", lorakit.AttachOptions{Init: "compensate"}, lorakit.ErrRefused,
			"quantised already, and the init compensate needs what it was"},
		"loftq's": {"expected/tiny-llama/nf4-dq", lorakit.AttachOptions{Init: "loftq"}, lorakit.ErrRefused,
			"quantised already"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			start := time.Now()
			_, err := lorakit.Attach(t.Context(), baseOf(c.base), filepath.Join(dir, "out"), c.o)
			require.ErrorIs(t, err, c.kind)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, time.Since(start), 10*time.Second)
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
}

// TestAttachInterrupted: a run that is cancelled, whenever, leaves nothing.
func TestAttachInterrupted(t *testing.T) {
	for _, init := range []string{"kaiming", "pissa", "loftq"} {
		for wait := range 12 {
			dir := t.TempDir()
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(wait*wait)*time.Millisecond/2)
			_, err := lorakit.Attach(ctx, baseOf("tiny-llama"), filepath.Join(dir, "out"),
				lorakit.AttachOptions{Rank: 4, Init: init})
			cancel()
			entries, readErr := os.ReadDir(dir)
			require.NoError(t, readErr)
			if err == nil {
				require.Len(t, entries, 1)
				continue
			}
			require.ErrorIs(t, err, lorakit.ErrInterrupted)
			require.Empty(t, entries, err.Error())
		}
	}
}
