package lora

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/models"
)

// hadamardOf is the delta of a module by its small factors, element by element.
func hadamardOf(t fataler, list []Tiled, rows, cols int) []float32 {
	out := make([]float32, rows*cols)
	for i := range out {
		out[i] = 1
	}
	for _, x := range list {
		v, err := x.Load(Matrix.Read)
		require.NoError(t, err)
		at := func(m kernels.Mat, identity bool, i, j int64) float64 {
			switch {
			case !identity:
				return float64(m.Data[i*int64(m.RowStride)+j*int64(m.ColStride)])
			case i == j:
				return 1
			}
			return 0
		}
		for i := range rows {
			for j := range cols {
				sum, p, q := 0.0, x.Row.At(int64(i), x.Left.Rows), x.Col.At(int64(j), x.Right.Cols)
				for k := range x.Left.Cols {
					sum += at(v.left, x.Left.T == nil, p, k) * at(v.right, x.Right.T == nil, k, q)
				}
				out[i*cols+j] *= float32(sum)
			}
		}
	}
	return out
}

func nearly(t fataler, want, got []float32) {
	t.Helper()
	require.Len(t, got, len(want))
	for i := range want {
		require.InDelta(t, want[i], got[i], 1e-5*(1+float64(max(want[i], -want[i]))), "element %d", i)
	}
}

// writeValues writes an adapter whose float32 values are random.
func writeValues(t fataler, dir, config string, shapes map[string][]int64) {
	t.Helper()
	writeFolder(t, dir, config, shapes)
	file := filepath.Join(dir, adapterFiles[0])
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 8 + int(b[0]) + int(b[1])<<8; i+4 <= len(b); i += 4 {
		b[i], b[i+1], b[i+2], b[i+3] = byte(r.Uint32()), byte(r.Uint32()), 0x80|byte(r.Uint32()), 0x3e|byte(r.Uint32())&0x80
	}
	require.NoError(t, os.WriteFile(file, b, 0o644))
}

// TestHadamard holds the rows that are made on the way, in windows and turned round, and B·A, against each other for
// LoHa and LoKr of all shapes.
func TestHadamard(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		require.NoError(t, os.Mkdir(dir, 0o755))
		size := rapid.Int64Range(1, 5)
		draw := func(what string) int64 { return size.Draw(t, what) }
		r := rapid.Int64Range(1, 3).Draw(t, "r")
		shapes := map[string][]int64{}
		kind := loHa
		if rapid.Bool().Draw(t, "kronecker") {
			kind = loKr
			o1, i1, o2, i2 := draw("o1"), draw("i1"), draw("o2"), draw("i2")
			if rapid.Bool().Draw(t, "w1 whole") {
				shapes["q.lokr_w1"] = []int64{o1, i1}
			} else {
				shapes["q.lokr_w1_a"], shapes["q.lokr_w1_b"] = []int64{o1, r}, []int64{r, i1}
			}
			switch rapid.SampledFrom([]string{"whole", "line", "kernels", "factors", "tucker"}).Draw(t, "w2") {
			case "whole":
				shapes["q.lokr_w2"] = []int64{o2, i2}
			case "line":
				shapes["q.lokr_w2"] = []int64{o2, i2, draw("k")}
			case "kernels":
				shapes["q.lokr_w2"] = []int64{o2, i2, 2, 3}
			case "factors":
				shapes["q.lokr_w2_a"], shapes["q.lokr_w2_b"] = []int64{o2, r}, []int64{r, i2}
			case "tucker":
				shapes["q.lokr_w2_a"], shapes["q.lokr_w2_b"], shapes["q.lokr_t2"] = []int64{r, o2}, []int64{r, i2},
					[]int64{r, r, 2, draw("k")}
			}
		} else {
			out, in := draw("out"), draw("in")
			tucker := rapid.Bool().Draw(t, "tucker")
			for _, w := range []string{"1", "2"} {
				shapes["q.hada_w"+w+"_a"], shapes["q.hada_w"+w+"_b"] = []int64{out, r}, []int64{r, in}
				if tucker {
					shapes["q.hada_w"+w+"_a"], shapes["q.hada_t"+w] = []int64{r, out}, []int64{r, r, 3, 2}
				}
			}
		}
		writeValues(t, dir, fmt.Sprintf(`{"peft_type": %q, "r": %d, "alpha": 3}`, kind, r), shapes)
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		checkOpened(t, a)
		m := a.Modules[0]
		require.InDelta(t, 3/float64(r), m.Scaling, 1e-12)
		rows, cols := int(m.B.Rows), int(m.A.Cols)
		want := hadamardOf(t, m.Hadamard, rows, cols)

		fa, err := m.A.Read()
		require.NoError(t, err)
		fb, err := m.B.Read()
		require.NoError(t, err)
		product := kernels.NewMat(rows, cols)
		kernels.MulAdd(product, fb, fa)
		nearly(t, want, product.Data)
		require.LessOrEqual(t, m.Rank, min(rows, cols))

		r0, c0 := rapid.IntRange(0, rows-1).Draw(t, "r0"), rapid.IntRange(0, cols-1).Draw(t, "c0")
		r1, c1 := rapid.IntRange(r0+1, rows).Draw(t, "r1"), rapid.IntRange(c0+1, cols).Draw(t, "c1")
		w, turned := rapid.IntRange(0, r0).Draw(t, "window"), rapid.Bool().Draw(t, "turned")
		list := window(m.Hadamard, int64(w), 0)
		lo, hi, from, to := r0-w, r1-w, c0, c1
		if turned {
			list = Transposed(list)
			lo, hi, from, to = from, to, lo, hi
		}
		got, part, row := make([]float32, (hi-lo)*(to-from)), make([]float32, (hi-lo)*(to-from)), make([]float32, 1000)
		for i := range got {
			got[i] = 1
		}
		for _, x := range list {
			v, err := x.Load(Matrix.Read)
			require.NoError(t, err)
			v.Fill(part, row, int64(lo), int64(hi), int64(from), int64(to))
			for i := range got {
				got[i] *= part[i]
			}
		}
		for i := r0; i < r1; i++ {
			for j := c0; j < c1; j++ {
				at := (i-r0)*(c1-c0) + j - c0
				if turned {
					at = (j-c0)*(r1-r0) + i - r0
				}
				require.InDelta(t, want[i*cols+j], got[at], 1e-5, "%d, %d", i, j)
			}
		}
	})
}

// TestMethodsRefused opens what contradicts itself or is not known, and says so before anything is read.
func TestMethodsRefused(t *testing.T) {
	const ada, ha, kr, ve, scale = `{"peft_type": "ADALORA", "init_r": 3}`, `{"peft_type": "LOHA", "r": 2}`,
		`{"peft_type": "LOKR", "r": 2}`, `{"peft_type": "VERA", "r": 2}`, `{"peft_type": "IA3"}`
	const of, bf, vb, rl = `{"peft_type": "OFT", "oft_block_size": 4}`, `{"peft_type": "BOFT"}`,
		`{"peft_type": "VBLORA", "r": 2, "num_vectors": 5, "vector_length": 4}`, `{"peft_type": "RANDLORA", "r": 2}`
	with := func(config, more string) string { return strings.TrimSuffix(config, "}") + ", " + more + "}" }
	adaPair := map[string][]int64{"q.lora_A": {3, 4}, "q.lora_B": {5, 3}, "q.lora_E": {3, 1}}
	quad := func(out, in, r int64) map[string][]int64 {
		return map[string][]int64{"q.hada_w1_a": {out, r}, "q.hada_w1_b": {r, in}, "q.hada_w2_a": {out, r},
			"q.hada_w2_b": {r, in}}
	}
	vera := map[string][]int64{"base_model.vera_A": {2, 4}, "base_model.vera_B": {5, 2}, "q.vera_lambda_b": {3},
		"q.vera_lambda_d": {2}}
	and := func(shapes map[string][]int64, name string, shape ...int64) map[string][]int64 {
		all := map[string][]int64{}
		for k, v := range shapes {
			all[k] = v
		}
		if all[name] = shape; shape == nil {
			delete(all, name)
		}
		return all
	}
	for name, x := range map[string]struct {
		config string
		shapes map[string][]int64
		kind   error
		says   string
	}{
		"an unknown method": {`{"peft_type": "OTHER"}`, adaPair, ErrUnsupported,
			`peft_type is "OTHER"; known are LORA, ADALORA, BOFT`},
		"a method without a delta": {`{"peft_type": "PROMPT_TUNING"}`, adaPair, ErrUnsupported,
			`PROMPT_TUNING: it adds virtual tokens`},
		"DoRA in AdaLoRA": {with(ada, `"use_dora": true`), adaPair, ErrUnsupported, "use_dora"},
		"rsLoRA in LoHa":  {with(ha, `"use_rslora": true`), quad(3, 4, 2), ErrUnsupported, "use_rslora"},
		"parameters":      {with(ada, `"target_parameters": ["x"]`), adaPair, ErrUnsupported, "target_parameters"},
		"a field":         {with(ha, `"arrow_config": {"a": 1}`), quad(3, 4, 2), ErrUnsupported, "arrow_config"},
		"no E":            {ada, and(adaPair, "q.lora_E"), ErrMalformed, "lora_E (rank, 1)"},
		"another rank": {`{"peft_type": "ADALORA", "init_r": 4}`, adaPair, ErrMalformed,
			"has rank 3 in its tensors and 4 by"},
		"a long rank_pattern": {with(ada, `"rank_pattern": {"q.lora_E": [true, true, true, false]}`), adaPair,
			ErrMalformed, "lists 4 directions"},
		"a rank_pattern that drops": {with(ada, `"rank_pattern": {"q.lora_E": [true, true, false]}`), adaPair, ErrMalformed,
			"3 in its tensors and 2"},
		"a rank_pattern for nothing": {with(ada, `"rank_pattern": {"k.lora_E": [true, true, true]}`), adaPair, ErrMalformed,
			`names module "k"`},
		"a rank_pattern of LoRA": {with(ada, `"rank_pattern": {"q": 3}`), adaPair, ErrMalformed, "true and false"},
		"only rank 0": {with(ada, `"rank_pattern": {"q.lora_E": [false, false, false]}`),
			map[string][]int64{"q.lora_A": {0, 4}, "q.lora_B": {5, 0}, "q.lora_E": {0, 1}}, ErrMalformed, "no tensors"},
		"lora_A in LoHa": {ha, and(quad(3, 4, 2), "k.lora_A.weight", 2, 4), ErrUnsupported, "LOHA"},
		"hada in IA3": {scale, and(map[string][]int64{"q.ia3_l": {3, 1}}, "k.hada_w1_a", 2, 4), ErrUnsupported,
			"IA3"},
		"twice": {scale, map[string][]int64{"q.ia3_l": {3, 1}, "q.ia3_l.default": {3, 1}}, ErrMalformed,
			"says the same"},
		"no module": {scale, map[string][]int64{".ia3_l": {3, 1}}, ErrMalformed, "no module is named"},
		"LoHa of 3": {ha, and(quad(3, 4, 2), "q.hada_w2_b"), ErrMalformed, "expected hada_w1_a"},
		"LoHa of two sizes": {ha, and(quad(3, 4, 2), "q.hada_w2_b", 2, 5), ErrMalformed,
			"3 x 4 and a second one of 3 x 5"},
		"LoHa of another rank": {ha, quad(3, 4, 1), ErrMalformed, "rank 2"},
		"LoHa of nothing":      {ha, quad(0, 4, 2), ErrMalformed, "rank 2"},
		"one core":             {ha, and(quad(3, 4, 2), "q.hada_t1", 2, 2, 3, 3), ErrMalformed, "both or none"},
		"a core for others": {ha, and(and(quad(2, 4, 2), "q.hada_t1", 2, 3, 3, 3), "q.hada_t2", 2, 3, 3, 3),
			ErrMalformed, "a tensor of rank 2"},
		"a rank of 0":           {`{"peft_type": "LOHA", "r": 0}`, quad(3, 4, 2), ErrMalformed, "r is 0"},
		"half a rank":           {with(ha, `"rank_pattern": {"q": 1.5}`), quad(3, 4, 2), ErrMalformed, "1.5"},
		"an alpha that is none": {with(ha, `"alpha": "2"`), quad(3, 4, 2), ErrMalformed, "alpha"},
		"w1 and its factors": {kr, map[string][]int64{"q.lokr_w1": {2, 2}, "q.lokr_w1_a": {2, 2},
			"q.lokr_w1_b": {2, 2}, "q.lokr_w2": {2, 2}}, ErrMalformed, "expected lokr_w1, or"},
		"w1 alone": {kr, map[string][]int64{"q.lokr_w1": {2, 2}}, ErrMalformed, "expected lokr_w2, or"},
		"w2 and a core": {kr, map[string][]int64{"q.lokr_w1": {2, 2}, "q.lokr_w2": {2, 2},
			"q.lokr_t2": {2, 2, 1, 1}}, ErrMalformed, "expected lokr_w2, or"},
		"w2 of five dimensions": {kr, map[string][]int64{"q.lokr_w1": {2, 2}, "q.lokr_w2": {2, 2, 1, 1, 1}},
			ErrMalformed, "kernel"},
		"a large weight": {kr, map[string][]int64{"q.lokr_w1": {1 << 17, 1}, "q.lokr_w2": {1, 1 << 17}}, nil, ""},
		"projections from a seed": {with(ve, `"save_projection": false`),
			map[string][]int64{"q.vera_lambda_b": {3}, "q.vera_lambda_d": {2}}, ErrUnsupported, "save_projection is false"},
		"OFT of before 0.14": {`{"peft_type": "OFT", "r": 4}`, map[string][]int64{"q.oft_R.weight": {2, 1}},
			ErrUnsupported, "PEFT before 0.14"},
		"OFT of before 0.16": {of, map[string][]int64{"q.oft_r": {2, 4, 4}}, ErrUnsupported, "PEFT before 0.16"},
		"a size and a number": {`{"peft_type": "OFT", "r": 2, "oft_block_size": 2}`,
			map[string][]int64{"q.oft_R.weight": {2, 1}}, ErrMalformed, "one of both to be 0"},
		"neither size nor number": {`{"peft_type": "OFT", "r": 0, "oft_block_size": 0}`,
			map[string][]int64{"q.oft_R.weight": {2, 1}}, ErrMalformed, "one of both to be 0"},
		"no triangle": {of, map[string][]int64{"q.oft_R.weight": {2, 5}}, ErrMalformed,
			"size * (size - 1) / 2"},
		"a cube":    {of, map[string][]int64{"q.oft_R.weight": {2, 4, 4}}, ErrMalformed, "expected oft_R"},
		"no blocks": {of, map[string][]int64{"q.oft_R.weight": {0, 6}}, ErrMalformed, "expected oft_R"},
		"a huge block": {of, map[string][]int64{"q.oft_R.weight": {0, 1 << 50}}, ErrMalformed,
			"expected oft_R"},
		"blocks that are shared": {with(of, `"block_share": true`), map[string][]int64{"q.oft_R.weight": {2, 6}},
			ErrMalformed, "with block_share there is one"},
		"a rotation of two": {of, map[string][]int64{"q.oft_R.weight": {2, 6}, "q.oft_embedding_R.weight": {2, 6}},
			ErrMalformed, "expected oft_R"},
		"a long series": {with(of, `"num_cayley_neumann_terms": 100000`),
			map[string][]int64{"q.oft_R.weight": {2, 6}}, ErrUnsupported, "expected at most 1000"},
		"a negative eps": {with(of, `"coft": true, "eps": -1`), map[string][]int64{"q.oft_R.weight": {2, 6}},
			ErrMalformed, "eps is -1"},
		"a flag that is none": {with(of, `"coft": "yes"`), map[string][]int64{"q.oft_R.weight": {2, 6}}, ErrMalformed,
			"coft"},
		"a block of half a number": {`{"peft_type": "OFT", "oft_block_size": 4.5}`,
			map[string][]int64{"q.oft_R.weight": {2, 6}}, ErrMalformed, "whole number"},
		"BOFT without scales": {bf, map[string][]int64{"q.boft_R": {1, 2, 4, 4}}, ErrMalformed, "boft_s"},
		"BOFT of other blocks": {bf, map[string][]int64{"q.boft_R": {1, 2, 6, 6}, "q.boft_s": {3, 1}}, ErrMalformed,
			"blocks of 6"},
		"BOFT of oblong blocks": {bf, map[string][]int64{"q.boft_R": {1, 2, 4, 5}, "q.boft_s": {3, 1}}, ErrMalformed,
			"boft_R"},
		"BOFT of many factors": {bf, map[string][]int64{"q.boft_R": {3, 4, 4, 4}, "q.boft_s": {3, 1}}, ErrMalformed,
			"3 butterfly factors, and boft_n"},
		"a butterfly of odd blocks": {with(bf, `"boft_n_butterfly_factor": 2`),
			map[string][]int64{"q.boft_R": {2, 3, 4, 4}, "q.boft_s": {3, 1}}, ErrMalformed, "divides"},
		"a butterfly of a thousand": {with(bf, `"boft_n_butterfly_factor": 1000`),
			map[string][]int64{"q.boft_R": {1000, 1, 4, 4}, "q.boft_s": {3, 1}}, ErrMalformed, "divides"},
		"HRA of another rank": {`{"peft_type": "HRA", "r": 3}`, map[string][]int64{"q.hra_u": {4, 2}}, ErrMalformed,
			"expected hra_u (inputs, 3)"},
		"HRA of too many vectors": {`{"peft_type": "HRA", "r": 3, "apply_GS": true}`,
			map[string][]int64{"q.hra_u": {2, 3}}, ErrMalformed, "more than the inputs"},
		"MiSS of another rank": {`{"peft_type": "MISS", "r": 3}`, map[string][]int64{"q.miss_block": {2, 4}},
			ErrMalformed, "expected miss_block (3, outputs)"},
		"MiSS of another mini_r": {`{"peft_type": "MISS", "r": 3, "mini_r": 2, "init_weights": "mini"}`,
			map[string][]int64{"q.miss_block": {3, 4}}, ErrMalformed, "(3, 2)"},
		"a variant of MiSS": {`{"peft_type": "MISS", "r": 3, "init_weights": "cat"}`,
			map[string][]int64{"q.miss_block": {3, 4}}, ErrUnsupported, "init_weights"},
		"a variant of MiSS for Bone": {`{"peft_type": "BONE", "r": 3, "init_weights": "mini"}`,
			map[string][]int64{"q.bone_block": {3, 4}}, ErrUnsupported, "init_weights"},
		"bat of oblong blocks": {`{"peft_type": "MISS", "r": 3, "init_weights": "bat"}`,
			map[string][]int64{"q.miss_block": {2, 3, 4}}, ErrMalformed, "(outputs / 3, 3, 3)"},
		"no bank": {vb, map[string][]int64{"q.vblora_logits_A": {2, 2, 5}, "q.vblora_logits_B": {2, 2, 5}},
			ErrMalformed, "vblora_vector_bank (5, 4)"},
		"another bank": {vb, map[string][]int64{"base_model.vblora_vector_bank": {5, 3},
			"q.vblora_logits_A": {2, 2, 5}, "q.vblora_logits_B": {2, 2, 5}}, ErrMalformed, "vblora_vector_bank (5, 4)"},
		"other logits": {vb, map[string][]int64{"base_model.vblora_vector_bank": {5, 4},
			"q.vblora_logits_A": {2, 2, 4}, "q.vblora_logits_B": {2, 2, 5}}, ErrMalformed, "expected for A"},
		"half of the logits": {vb, map[string][]int64{"base_model.vblora_vector_bank": {5, 4},
			"q.vblora_logits_A": {2, 2, 5}}, ErrMalformed, "expected for A"},
		"more than the bank": {with(vb, `"topk": 6`), map[string][]int64{"base_model.vblora_vector_bank": {5, 4}},
			ErrMalformed, "topk is 6"},
		"numbers that are floats": {with(vb, `"save_only_topk_weights": true`),
			map[string][]int64{"base_model.vblora_vector_bank": {5, 4}, "q.vblora_logits_A_topk_indices": {2, 2, 2},
				"q.vblora_logits_A_topk_weights": {2, 2, 1}, "q.vblora_logits_B_topk_indices": {2, 2, 2},
				"q.vblora_logits_B_topk_weights": {2, 2, 1}}, ErrMalformed, "expected for A"},
		"other frequencies": {`{"peft_type": "FOURIERFT", "n_frequency": 5}`,
			map[string][]int64{"q.fourierft_spectrum": {4}}, ErrMalformed, "fourierft_spectrum (5)"},
		"frequencies by a pattern": {`{"peft_type": "FOURIERFT", "n_frequency": 4, "n_frequency_pattern": {"q": 7}}`,
			map[string][]int64{"q.fourierft_spectrum": {4}}, ErrMalformed, "fourierft_spectrum (7)"},
		"a huge n_frequency": {`{"peft_type": "FOURIERFT", "n_frequency": 1e18}`,
			map[string][]int64{"q.fourierft_spectrum": {4}}, ErrMalformed, "n_frequency is 1e+18"},
		"a seed that is none": {`{"peft_type": "FOURIERFT", "n_frequency": 4, "random_loc_seed": null}`,
			map[string][]int64{"q.fourierft_spectrum": {4}}, ErrMalformed, "random_loc_seed"},
		"RandLoRA from a seed": {rl, map[string][]int64{"q.randlora_lambda": {2, 2}, "q.randlora_gamma": {2, 4}},
			ErrUnsupported, "save_projection is false"},
		"RandLoRA of other bases": {rl, map[string][]int64{"base_model.randlora_A": {2, 1, 4},
			"base_model.randlora_B": {5, 2, 2}, "q.randlora_lambda": {2, 3}, "q.randlora_gamma": {3, 4}}, ErrMalformed,
			"as many bases"},
		"RandLoRA that is too wide": {rl, map[string][]int64{"base_model.randlora_A": {2, 1, 3},
			"base_model.randlora_B": {5, 2, 2}, "q.randlora_lambda": {2, 2}, "q.randlora_gamma": {2, 4}}, ErrMalformed,
			"as many bases"},
		"half of RandLoRA's": {rl, map[string][]int64{"base_model.randlora_A": {2, 1, 4}, "q.randlora_lambda": {2, 2},
			"q.randlora_gamma": {2, 4}}, ErrMalformed, "randlora_B"},
		"LN tuning of no module": {`{"peft_type": "LN_TUNING"}`,
			map[string][]int64{"base_model.model.ln_tuning_layers.weight": {3}}, ErrUnsupported, "none that PEFT gives"},
		"LN tuning of no parameter": {`{"peft_type": "LN_TUNING"}`, map[string][]int64{"q.ln_tuning_layers.": {3}},
			ErrMalformed, "no parameter"},
		"tokens without a list": {`{"peft_type": "TRAINABLE_TOKENS"}`,
			map[string][]int64{"e.trainable_tokens_delta": {3, 2}}, ErrMalformed, "token_indices"},
		"tokens of another number": {`{"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}`,
			map[string][]int64{"e.trainable_tokens_delta": {3, 2}}, ErrMalformed, "has 2 indices"},
		"rows within rows": {`{"peft_type": "TRAINABLE_TOKENS", "token_indices": [1]}`,
			map[string][]int64{"h.trainable_tokens_delta": {1, 2}, "h.base_layer.trainable_tokens_delta": {1, 2}},
			ErrUnsupported, "rows within rows"},
		"a token twice": {`{"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 1]}`,
			map[string][]int64{"e.trainable_tokens_delta": {2, 2}}, ErrMalformed, "1 twice"},
		"half of the projections": {ve, and(vera, "base_model.vera_B"), ErrMalformed, "vera_B (out, 2)"},
		"outputs past the widest": {ve, and(vera, "q.vera_lambda_b", 6), ErrMalformed, "6 elements"},
		"lambdas of another rank": {ve, and(vera, "q.vera_lambda_d", 3), ErrMalformed, "vera_lambda_d (2)"},
		"projections that differ": {ve, and(vera, "q.vera_A", 2, 3), ErrMalformed, "differs from"},
		"a matrix for IA3":        {scale, map[string][]int64{"q.ia3_l": {3, 2}}, ErrMalformed, "expected a vector"},
		"the other side":          {scale, map[string][]int64{"q.ia3_l": {1, 3}}, ErrMalformed, "feedforward_modules"},
		"feedforward that is none": {with(scale, `"feedforward_modules": 3`), map[string][]int64{"q.ia3_l": {1, 3}},
			ErrMalformed, "expected names"},
		"a pattern that runs away": {with(scale, `"feedforward_modules": "(a+)+b"`),
			map[string][]int64{strings.Repeat("a", 60) + ".ia3_l": {1, 3}}, ErrMalformed, "too long"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeFolder(t, dir, x.config, x.shapes)
			a, err := Open(dir, OpenOptions{})
			if x.kind == nil {
				require.NoError(t, err)
				a.Close()
				return
			}
			require.ErrorIs(t, err, x.kind)
			checkError(t, err, dir)
			require.ErrorContains(t, err, x.says)
		})
	}
}

// TestHugeKronecker makes nothing of a delta that no memory holds: neither on opening it nor where a base or another
// dialect is asked for.
func TestHugeKronecker(t *testing.T) {
	dir := t.TempDir()
	writeFolder(t, dir, `{"peft_type": "LOKR", "r": 2}`,
		map[string][]int64{"q.lokr_w1": {1 << 12, 4}, "q.lokr_w2": {1 << 12, 1 << 10}})
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	m := a.Modules[0]
	require.Equal(t, []int64{1 << 24, 1 << 12}, []int64{m.B.Rows, m.A.Cols})
	_, err = m.B.Read()
	require.ErrorIs(t, err, ErrUnsupported)
	require.ErrorContains(t, err, "expected at most")
}

// TestPrunedModule keeps the notice of a module without a direction.
func TestPrunedModule(t *testing.T) {
	dir := t.TempDir()
	config, err := json.Marshal(map[string]any{"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 6,
		"rank_pattern": map[string][]bool{"q.lora_E": {false, false}, "k.lora_E.default": {true, false}}})
	require.NoError(t, err)
	writeFolder(t, dir, strings.ReplaceAll(string(config), ".default", ""),
		map[string][]int64{"q.lora_A": {0, 4}, "q.lora_B": {5, 0}, "q.lora_E": {0, 1}, "k.lora_A.default": {1, 4},
			"k.lora_B.default": {5, 1}, "k.lora_E.default": {1, 1}})
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	require.Len(t, a.Modules, 1)
	require.InDelta(t, 6/2.00001, a.Modules[0].Scaling, 1e-12)
	require.Equal(t, []string{"q: its rank_pattern leaves it a rank of 0, so it adds nothing"}, a.Notices)
}

// FuzzMethods reads tensors of any sizes for the parts of a method, and where they open makes what they say.
func FuzzMethods(f *testing.F) {
	kinds := slices.Sorted(slices.Values(methods()))
	for k := range kinds {
		f.Add(byte(k), "", []byte{0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22})
		f.Add(byte(k), `"save_only_topk_weights": true, "init_weights": "bat"`,
			[]byte{0xa2, 0xa2, 0xa2, 0xa2, 0xa2, 0xa2, 0x22})
		f.Add(byte(k), `"apply_GS": true, "coft": true, "block_share": true`,
			[]byte{0x21, 0x88, 0x12, 0xff, 0xff, 0xff, 0xff})
		f.Add(byte(k), `"alpha": 2, "init_r": 3, "rank_pattern": {"q": 2}`, []byte{0x32, 0x23, 0x31, 0x22, 0xff, 0xff, 0xff})
		f.Add(byte(k), `"rank_pattern": {"q.lora_E": [true, false]}`, []byte{0x03, 0x30, 0x01, 0x22, 0x82, 0x82, 0x82})
	}
	f.Fuzz(func(t *testing.T, kind byte, more string, dims []byte) {
		name := kinds[int(kind)%len(kinds)]
		shapes := map[string][]int64{}
		for i, part := range methodParts[name] {
			if i >= len(dims) || dims[i] == 0xff {
				continue
			}
			shape := []int64{int64(dims[i] >> 4 & 7), int64(dims[i] & 7)}
			switch {
			case dims[i]&0x88 == 0x88:
				shape = shape[:1]
			case dims[i]&0x80 != 0:
				shape = append(shape, 2, 3)
			case shape[1] == 0:
				shape[0] <<= 59
			case shape[0] == 0:
				shape[1] <<= 59
			}
			if n := part; slices.Contains([]string{"vera_A", "vera_B", "randlora_A", "randlora_B", "vblora_vector_bank"}, n) {
				shapes["base_model."+n] = shape
			} else {
				shapes["q."+n] = shape
			}
		}
		const small = `"r": 2, "init_r": 2, "oft_block_size": 0, "boft_block_size": 2, "topk": 2, "num_vectors": 2, "vector_length": 2,
			"n_frequency": 2, "token_indices": [0, 1], "n_frequency_pattern": {}`
		dir := t.TempDir()
		config := fmt.Sprintf(`{"peft_type": %q, %s, %s}`, name, small, more)
		if strings.TrimSpace(more) == "" || !json.Valid([]byte(config)) {
			config = fmt.Sprintf(`{"peft_type": %q, %s}`, name, small)
		}
		writeFolder(t, dir, config, shapes)
		a, err := Open(dir, OpenOptions{})
		if err != nil {
			checkError(t, err, dir)
			return
		}
		defer a.Close()
		checkOpened(t, a)
		for _, m := range a.Modules {
			if m.Transform != nil {
				for _, in := range []int64{1, 2, 4, 6} {
					if m.Transform.Fit(4, in) != nil {
						continue
					}
					by, err := m.Transform.Load(in) // of zeros
					if err == nil {
						by.Apply(kernels.NewMat(4, int(in)), 0, make([]float32, 4*in))
					}
				}
				continue
			}
			if m.A.T == nil {
				continue
			}
			if m.fit != nil && m.fit(m, 4, 6) == nil && m.Waves != nil {
				w, err := m.Waves.Load()
				require.NoError(t, err)
				var room []float64
				w.Fill(make([]float32, 24), &room, 0, 4, 0, 6)
			}
			if m.fit != nil && name != veRA {
				continue
			}
			for _, x := range []Matrix{m.A, m.B} {
				_, err := x.Read()
				require.NoError(t, err) // of zeros
			}
			if m.fit != nil && name == veRA {
				require.NoError(t, m.fit(m, m.B.Rows, 1))
				require.Equal(t, int64(1), m.A.Cols)
			}
			hadamardOf(t, m.Hadamard, int(m.B.Rows), int(m.A.Cols))
		}
	})
}

// TestScaledGroups binds IA3 to the inputs of a convolution in two groups, each of which has its own, to a part of its
// bias' outputs, and to none of those.
func TestScaledGroups(t *testing.T) {
	targets := []Target{{Name: "c.weight", Shape: []int64{6, 3, 2, 2}}, {Name: "c.bias", Shape: []int64{6}}}
	model := &models.Model{}
	for i := range targets {
		targets[i].Role = model.Tensor(targets[i].Name, targets[i].Shape)
	}
	bind := func(config string, n int64) (*Binding, error) {
		dir := t.TempDir()
		writeValues(t, dir, config, map[string][]int64{"c.ia3_l": {1, n, 1, 1}})
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		t.Cleanup(func() { a.Close() })
		return Bind([]Weighted{{a, 1}}, targets, model)
	}
	b, err := bind(`{"peft_type": "IA3", "feedforward_modules": ["c"]}`, 6)
	require.NoError(t, err)
	require.Nil(t, b.Changes[1])
	require.Equal(t, int64(12), b.Changes[0].Width)
	require.Len(t, b.Changes[0].Updates, 2)
	for g, x := range b.Changes[0].Updates {
		require.Equal(t, []int64{3 * int64(g), 3, 0, 12, 12 * int64(g)}, []int64{x.Row, x.Rows, x.Col, x.Cols, x.FirstOutput})
		require.False(t, x.OutputRows)
		v, err := Floats(x.Factor)
		require.NoError(t, err)
		l, err := Floats(x.Module.Value)
		require.NoError(t, err)
		require.Len(t, v, 24)
		for i := range v {
			require.Equal(t, l[i/4], v[i])
		}
	}
	b, err = bind(`{"peft_type": "IA3", "feedforward_modules": []}`, 6)
	require.NoError(t, err)
	require.True(t, b.Changes[0].Updates[0].OutputRows)
	require.Equal(t, []int64{0, 1, 0, 6}, []int64{b.Changes[1].Updates[0].Row, b.Changes[1].Updates[0].Rows,
		b.Changes[1].Updates[0].Col, b.Changes[1].Updates[0].Cols})
	for config, n := range map[string]int64{`{"peft_type": "IA3", "feedforward_modules": ["c"]}`: 12,
		`{"peft_type": "IA3", "feedforward_modules": "c"}`: 4, `{"peft_type": "IA3"}`: 3} {
		_, err = bind(config, n)
		require.ErrorIs(t, err, ErrBase)
		require.ErrorContains(t, err, "does not fit")
	}
}

// The singular values of a Kronecker product are those of the matrix that it is.
func TestKroneckerValues(t *testing.T) {
	dirs, err := filepath.Glob(fixtures + "/others/*-lokr*")
	require.NoError(t, err)
	found := 0
	for _, dir := range dirs {
		if strings.HasSuffix(dir, ".safetensors") {
			continue
		}
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		for _, m := range a.Modules {
			if !m.kronecker() {
				continue
			}
			found++
			var g Spectrograph
			s, err := g.Spectrum(a, m)
			require.NoError(t, err)
			want, err := g.values(m.A, m.B, m.Scaling)
			require.NoError(t, err)
			for i := range max(len(want), len(s.Values)) {
				x, y := 0.0, 0.0
				if i < len(want) {
					x = want[i]
				}
				if i < len(s.Values) {
					y = s.Values[i]
				}
				require.InDelta(t, x, y, 1e-5*want[0], "%s %s %d", dir, m.Name, i)
			}
			require.InEpsilon(t, math.Sqrt(energy(want)), s.Norm, 1e-5)
		}
	}
	require.Greater(t, found, 10)
}
