package gguf

import (
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// Type is what a file is made in as a whole.
type Type struct {
	Name     string // as llama.cpp's converter is asked for it
	FileType uint32 // general.file_type
	DType    tensor.DType
	Encoding tensor.Encoding
}

// The types that llama.cpp's converter makes files in.
var (
	F32  = Type{Name: "f32", FileType: 0, DType: tensor.F32}
	F16  = Type{Name: "f16", FileType: 1, DType: tensor.F16}
	Q8_0 = Type{Name: "q8_0", FileType: 7, Encoding: tensor.Encoding{Name: "q8_0", Elements: 32, Bytes: 34}}
	BF16 = Type{Name: "bf16", FileType: 32, DType: tensor.BF16}
)

// precise are the tensors, beside norms, biases and all of one dimension, that are F32 in every file.
var precise = map[string]bool{
	"blk.#.ffn_gate_inp.weight":        true,
	"blk.#.ffn_gate_inp_shexp.weight":  true,
	"position_embd.weight":             true,
	"token_types.weight":               true,
	"blk.#.ssm_conv1d.weight":          true,
	"blk.#.ssm_conv1d_q.weight":        true,
	"blk.#.ssm_conv1d_k.weight":        true,
	"blk.#.ssm_conv1d_v.weight":        true,
	"blk.#.shortconv.conv.weight":      true,
	"blk.#.time_mix_first.weight":      true,
	"blk.#.time_mix_w1.weight":         true,
	"blk.#.time_mix_w2.weight":         true,
	"blk.#.time_mix_decay_w1.weight":   true,
	"blk.#.time_mix_decay_w2.weight":   true,
	"blk.#.time_mix_lerp_fused.weight": true,
	"blk.#.indexer.proj.weight":        true,
}

// Of gives a tensor, which has its name and shape, the type that it has in a file of type t.
func (t Type) Of(info tensor.Info) tensor.Info {
	info.DType, info.Encoding = t.DType, t.Encoding
	n, _ := split(info.Name)
	last := len(info.Shape) - 1
	switch {
	case last <= 0, strings.HasSuffix(info.Name, "_norm.weight"), precise[n.pattern],
		!strings.HasSuffix(info.Name, ".weight") && !strings.HasSuffix(info.Name, ".lora_a") &&
			!strings.HasSuffix(info.Name, ".lora_b"):
		info.DType, info.Encoding = tensor.F32, tensor.Encoding{}
	case t.Encoding.Elements > 0 && info.Shape[last]%t.Encoding.Elements != 0:
		info.DType, info.Encoding = tensor.F16, tensor.Encoding{}
	}
	return info
}
