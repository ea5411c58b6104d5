package adapt

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"

	_ "github.com/lorakit/lorakit/formats/safetensors" // registers the container
	_ "github.com/lorakit/lorakit/quant/bnb"           // registers the scheme
)

func open(t *testing.T, path ...string) *checkpoint.Checkpoint {
	t.Helper()
	c, err := checkpoint.Open(context.Background(), filepath.Join(append([]string{"..", "fixtures"}, path...)...))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

// made is a checkpoint in memory: of each tensor the values are 0, 1, 2, …
func made(t *testing.T, config string, tensors map[string]tensor.Shape, order ...string) *checkpoint.Checkpoint {
	t.Helper()
	c := &checkpoint.Checkpoint{Path: "made"}
	var err error
	c.Config, err = models.ParseConfig([]byte(config))
	require.NoError(t, err)
	c.Model, c.Known = models.Load(c.Config)
	for _, name := range order {
		info := tensor.Info{Name: name, DType: tensor.F32, Shape: tensors[name]}
		n, err := info.Shape.Count()
		require.NoError(t, err)
		var b []byte
		for i := range n {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(i)))
		}
		part := formats.Tensor{Info: info, File: "made", Data: bytes.NewReader(b), Bytes: int64(len(b))}
		c.Weights = append(c.Weights, &checkpoint.Weight{
			Info: info, Values: tensor.F32, Role: c.Model.Tensor(name, info.Shape), Parts: []formats.Tensor{part},
		})
	}
	return c
}

// values reads a matrix.
func values(t *testing.T, m checkpoint.Rows) []float32 {
	t.Helper()
	rows, cols := m.Dims()
	x := make([]float32, rows*cols)
	require.NoError(t, m.ReadRows(x, 0, rows))
	return x
}

func find(t *testing.T, list []*Target, param string) *Target {
	t.Helper()
	for _, x := range list {
		if x.Param == param {
			return x
		}
	}
	require.Fail(t, "no target "+param)
	return nil
}

func TestTargets(t *testing.T) {
	llama := Targets(open(t, "tiny-llama"))
	require.Len(t, llama, 2*7+2)
	up := find(t, llama, "model.layers.1.mlp.up_proj.weight")
	require.Equal(t, models.Linear, up.Kind)
	require.Equal(t, "model.layers.1.mlp.up_proj", up.Module())
	require.Equal(t, "model.layers.1.mlp.up_proj", up.String())
	require.NotNil(t, up.Weight)
	embedding := find(t, llama, "model.embed_tokens.weight")
	require.Equal(t, models.Embedding, embedding.Kind)
	require.Equal(t, []int64{int64(embedding.In), int64(embedding.Out)}, []int64(embedding.Weight.Shape))

	// GPT-2's layers lie the other way round, and its head is the embedding.
	gpt := Targets(open(t, "tiny-gpt2"))
	attn := find(t, gpt, "transformer.h.0.attn.c_attn.weight")
	require.Equal(t, models.Conv1D, attn.Kind)
	require.Equal(t, []int64{int64(attn.In), int64(attn.Out)}, []int64(attn.Weight.Shape))
	head, wte := gpt[len(gpt)-1], find(t, gpt, "transformer.wte.weight")
	require.Equal(t, "lm_head", head.Module())
	require.Equal(t, models.Linear, head.Kind)
	require.Equal(t, []int{wte.In, wte.Out}, []int{head.Out, head.In})
	require.Same(t, wte.Weight, head.Weight)

	// A stack of experts is one target, in however many tensors the file has it.
	mixtral := Targets(open(t, "tiny-mixtral"))
	stack := find(t, mixtral, "model.layers.0.mlp.experts.gate_up_proj")
	require.Equal(t, 4, stack.Experts)
	require.True(t, stack.ByParameter)
	require.Nil(t, stack.Weight)
	require.Equal(t, "model.layers.0.mlp.experts", stack.Module())
	require.Equal(t, "model.layers.0.mlp.experts.gate_up_proj", stack.String())
	require.Equal(t, 8, stack.tensors)
	require.Equal(t, 2, stack.perMatrix)
	require.Equal(t, stack.In, find(t, mixtral, "model.layers.0.mlp.experts.down_proj").Out)
	require.Empty(t, stack.misfit)

	// Convolutions are listed, so that naming one is no silent miss.
	for _, c := range Targets(open(t, "adapters", "bases", "resnet")) {
		require.Equal(t, len(c.shape) == 4, c.Kind == models.Other, c)
	}
}

// TestMisfit: tensors that do not fit together are found.
func TestMisfit(t *testing.T) {
	const experts = "model.layers.0.block_sparse_moe.experts."
	c := made(t, `{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}`, map[string]tensor.Shape{
		experts + "0.w1.weight": {6, 4}, experts + "1.w1.weight": {6, 5},
	}, experts+"0.w1.weight", experts+"1.w1.weight")
	list := Targets(c)
	require.Len(t, list, 1)
	require.Equal(t, experts+"1.w1.weight", list[0].misfit)
}

// TestApart: the matrices of a tensor have all its values, each once, under names that are no other's.
func TestApart(t *testing.T) {
	for _, path := range [][]string{
		{"tiny-llama"}, {"tiny-gpt2"}, {"tiny-mixtral"}, {"tiny-qwen3"}, {"tiny-gemma3"},
		{"adapters", "bases", "qwen3-moe"}, {"adapters", "bases", "phi3"}, {"adapters", "bases", "bert"},
		{"expected", "tiny-llama", "nf4-dq"},
	} {
		c := open(t, path...)
		names := map[string]bool{}
		apart := takeApart(c, Targets(c))
		require.NotEmpty(t, apart)
		for w, list := range apart {
			var n int64
			for _, m := range list {
				require.False(t, names[m.Param], m.Param)
				names[m.Param] = true
				require.Zero(t, m.Experts)
				require.Same(t, w, m.Weight)
				rows, cols := m.dims()
				n += int64(rows) * int64(cols)
			}
			require.Equal(t, w.Count(), n, w.Name)
		}
	}
}

// TestApartStack takes a stack apart that the file has in one tensor.
func TestApartStack(t *testing.T) {
	const up, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
	shapes := map[string]tensor.Shape{up: {3, 4, 5}, down: {3, 5, 2}}
	c := made(t, `{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}`, shapes, down, up)
	apart := takeApart(c, Targets(c))
	require.Len(t, apart, 2)
	downs, ups := apart[c.Weights[0]], apart[c.Weights[1]]
	require.Len(t, downs, 3)
	require.Len(t, ups, 6)
	at := float32(0)
	for i, m := range ups {
		projection := []string{"gate_proj", "up_proj"}[i%2]
		require.Equal(t, "model.layers.0.mlp.experts."+string('0'+rune(i/2))+"."+projection, m.String())
		require.Equal(t, []int{2, 5}, []int{m.Out, m.In})
		for _, v := range values(t, m.matrix(m.Weight)) {
			require.Equal(t, at, v)
			at++
		}
	}
	require.Equal(t, []float32{20, 21, 22, 23, 24, 25, 26, 27, 28, 29}, values(t, downs[2].matrix(downs[2].Weight)))

	// gpt-oss has gate and up in turns, and an adapter of single experts cannot hold those.
	c = made(t, `{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}`, shapes, down, up)
	require.Empty(t, takeApart(c, Targets(c)))
}

// TestApartTurned reads a Conv1D as the linear layer that it is.
func TestApartTurned(t *testing.T) {
	const name = "transformer.h.0.mlp.c_fc.weight"
	shapes := map[string]tensor.Shape{name: {2, 3}}
	c := made(t, `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}`, shapes, name)
	m := takeApart(c, Targets(c))[c.Weights[0]][0]
	require.Equal(t, []int{3, 2}, []int{m.Out, m.In})
	require.Equal(t, []float32{0, 3, 1, 4, 2, 5}, values(t, m.matrix(m.Weight)))
}
