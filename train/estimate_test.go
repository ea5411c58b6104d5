package train

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/lora"
)

// linears lists the modules of the blocks that end so, as adapters of that rank; all without an end.
func (s *spec) linears(rank int, ends ...string) []Adapted {
	var list []Adapted
	for _, l := range s.layers {
		byEnd := map[string]*linear{
			"q_proj": l.attention.q, "k_proj": l.attention.k, "v_proj": l.attention.v, "o_proj": &l.attention.out,
			"gate_proj": l.mlp.gate, "up_proj": l.mlp.up, "down_proj": &l.mlp.down,
		}
		if len(ends) == 0 {
			ends = []string{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
		}
		for _, end := range ends {
			m := byEnd[end]
			list = append(list, Adapted{Name: m.module, In: m.in, Out: m.out, Rank: rank})
		}
	}
	return list
}

// ofSize estimates a bare size.
func ofSize(t *testing.T, o EstimateOptions, ends ...string) (*Estimation, map[string]EstimatedMethod) {
	t.Helper()
	s := SubjectOfSize(o.Parameters)
	r, err := Estimate(s, s.spec.linears(max(1, o.Rank), ends...), o)
	require.NoError(t, err)
	rows := map[string]EstimatedMethod{}
	for _, m := range r.Rows {
		rows[m.Method] = m
		assert.Equal(t, m.Weights+m.Gradients+m.Moments+m.Master+m.Activations+m.Logits, m.Total, m.Method)
		assert.Equal(t, m.Total, m.Zero[0], m.Method)
	}
	require.Len(t, rows, 4)
	return r, rows
}

// TestPublishedSizes are the figures that papers print, without activations.
func TestPublishedSizes(t *testing.T) {
	t.Run("70 B, all in 16 bits; LoRA", func(t *testing.T) {
		r, rows := ofSize(t, EstimateOptions{Parameters: 70e9, Rank: 8, Recipe: "fp16x4"})
		assert.EqualValues(t, 560e9, rows["full"].Total)
		assert.Equal(t, int64(140e9)+16*r.Trainable, rows["lora"].Total)
		assert.Equal(t, "Llama 2 70B", r.AssumedShape.Name)
	})
	t.Run("70 B, mixed", func(t *testing.T) {
		_, rows := ofSize(t, EstimateOptions{Parameters: 70e9})
		assert.EqualValues(t, 1120e9, rows["full"].Total)
	})
	t.Run("65 B, QLoRA paper", func(t *testing.T) {
		r, rows := ofSize(t, EstimateOptions{Parameters: 65e9, Recipe: "qlora-paper"})
		assert.EqualValues(t, 780e9, rows["full"].Total)
		assert.Equal(t, "Llama 65B", r.AssumedShape.Name)

		saved := rows["qlora"].Weights - rows["qlora-dq"].Weights
		assert.InDelta(t, 3.03e9, saved, 0.005e9)
		assert.InDelta(t, 0.373, 8*float64(saved)/65e9, 0.0005)
		assert.InDelta(t, 33.5e9, rows["qlora-dq"].Weights-4*r.Trainable, 0.05e9)
		assert.Less(t, rows["qlora-dq"].Total, int64(48e9))
	})
	t.Run("7.5 B, ZeRO on 64", func(t *testing.T) {
		_, rows := ofSize(t, EstimateOptions{Parameters: 7.5e9, GPUs: 64})
		assert.Equal(t, [4]int64{120e9, 31_406_250_000, 16_640_625_000, 1_875_000_000}, rows["full"].Zero)
	})
	t.Run("GPT-3, q and v of rank 4", func(t *testing.T) {
		r, _ := ofSize(t, EstimateOptions{Parameters: 175e9, Rank: 4}, "q_proj", "v_proj")
		assert.EqualValues(t, 18_874_368, r.Trainable)
		assert.Equal(t, "GPT-3 175B", r.AssumedShape.Name)
	})
}

// TestKnownShapes holds their sizes against those of the models that transformers builds of them, and GPT-3's against
// the name that it has.
func TestKnownShapes(t *testing.T) {
	want := map[string]int64{
		"SmolLM2 135M": 134515008, "SmolLM2 360M": 361821120, "TinyLlama 1.1B": 1100048384, "Llama 3.2 1B": 1235814400,
		"SmolLM2 1.7B": 1711376384, "Llama 3.2 3B": 3212749824, "Llama 7B": 6738415616, "Llama 3 8B": 8030261248,
		"Llama 13B": 13015864320, "Llama 33B": 32528943616, "Llama 65B": 65285660672, "Llama 2 70B": 68976648192,
		"Llama 3.1 405B": 405853388800,
	}
	for _, s := range knownShapes {
		n := int64(s.spec().elements())
		assert.Equal(t, s.Name, assume(n).Name)
		if s.Name == "GPT-3 175B" {
			assert.InEpsilon(t, 175e9, n, 0.005)
			continue
		}
		assert.Equal(t, want[s.Name], n, s.Name)
	}
	assert.Equal(t, "SmolLM2 135M", assume(1).Name)
	assert.Equal(t, "Llama 3.1 405B", assume(maxParameters).Name)
}

// TestAdamW8bit: what bitsandbytes 0.50.2 has in the state of a tensor after a step, its shared tables aside.
func TestAdamW8bit(t *testing.T) {
	for n, want := range map[int64]int64{1000: 8000, 4095: 32760, 4096: 8320, 5000: 10160, 65537: 133130} {
		assert.Equal(t, want, adamw8bit(n), n)
	}
}

func TestOptimizers(t *testing.T) {
	adapter := []Adapted{{Name: "a", In: 2048, Out: 300, Rank: 8}} // factors of 16384 and 2400 elements
	moments := func(optimizer, recipe string) (full, lora int64) {
		o := EstimateOptions{Parameters: 1e9, Optimizer: optimizer, Recipe: recipe}
		r, err := Estimate(SubjectOfSize(1e9), adapter, o)
		require.NoError(t, err)
		return r.Rows[0].Moments, r.Rows[1].Moments
	}
	full, lora := moments("", "")
	assert.EqualValues(t, 8e9, full)
	assert.EqualValues(t, 8*(16384+2400), lora)
	full, lora = moments("adamw8bit", "fp16x4")
	assert.EqualValues(t, 2e9+8*3906250, full)
	assert.EqualValues(t, 2*16384+8*64+8*2400, lora)
	full, lora = moments("sgd", "qlora-paper")
	assert.Zero(t, full)
	assert.Zero(t, lora)
}

func TestEstimateOptions(t *testing.T) {
	for text, o := range map[string]EstimateOptions{
		`recipe "fp16" is unknown; known are mixed, fp16x4, qlora-paper`: {Recipe: "fp16"},
		`optimizer "adam" is unknown; known are adamw, adamw8bit, sgd`:   {Optimizer: "adam"},
		`dtype "int8" is unknown; known are f32, f16, bf16`:              {DType: "int8"},
		"rank is -1":                           {Rank: -1},
		"rank is 1048577, expected 1 to":       {Rank: maxRank + 1},
		"tokens is -1 and GPUs 0":              {Tokens: -1},
		"parameters is 2000000000000000, expe": {Parameters: 2e15},
	} {
		err := o.Check()
		require.ErrorIs(t, err, lora.ErrOption, text)
		assert.ErrorContains(t, err, text)
	}
}

// TestManyTokens: a batch whose products an int64 does not hold is refused, and not counted wrong.
func TestManyTokens(t *testing.T) {
	s := SubjectOfSize(405e9)
	for tokens := 1; tokens < 1<<40; tokens *= 2 {
		r, err := Estimate(s, nil, EstimateOptions{Tokens: tokens})
		if err != nil {
			assert.ErrorContains(t, err, "the shape of Llama 3.1 405B: refused: a batch of")
			assert.Greater(t, tokens, 1<<18)
			return
		}
		assert.Greater(t, r.MultiplyAdds.FullFineTuning, r.MultiplyAdds.Forward)
		assert.Positive(t, r.Rows[3].Activations)
	}
	t.Error("nothing was refused")
}

// TestZeroRoundsUp: a part that does not divide evenly is that of the largest share.
func TestZeroRoundsUp(t *testing.T) {
	m := EstimatedMethod{Weights: 10, Gradients: 5, Moments: 7, Master: 0}
	m.finish(3, 2, 4)
	assert.EqualValues(t, 27, m.Total)
	assert.Equal(t, [4]int64{27, 20 + 2, 15 + 3, 5 + 6}, m.Zero)
}
