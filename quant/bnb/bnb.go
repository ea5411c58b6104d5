// Package bnb stores weights as bitsandbytes does: 4 bits (NF4, FP4) with or without double quantisation, and 8 bits
// (LLM.int8).
//
// Sources: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023) and "LLM.int8(): 8-bit Matrix
// Multiplication for Transformers at Scale" (2022); the names and forms of the stored tensors are those that
// bitsandbytes and transformers save.
package bnb

import (
	"context"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of bitsandbytes.
type Scheme struct{}

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return "bitsandbytes" }

// Types lists what is read and written. vLLM reads experts in nf4 alone, and refuses those in 8 bits; transformers
// reads none of them.
func (Scheme) Types() []quant.Type {
	return []quant.Type{{Name: "nf4", ExpertLoaders: "vLLM and unsloth"}, {Name: "fp4"}, {Name: "int8"}}
}

// Find returns the 4-bit and int8 weights among the tensors. A companion, such as W.absmax, makes a weight only if W is
// there and is quantised.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) { return find(t.Name, s) })
}

func find(name string, s quant.Stored) (quant.Decoder, error) {
	var found []quant.Decoder
	add := func(d quant.Decoder, err error) error {
		found = append(found, d)
		return err
	}
	for _, typ := range []nf4.Type{nf4.NF4, nf4.FP4} {
		if _, ok := s.Lookup(name + stateSuffix + typ.String()); ok {
			if err := add(open4bit(name, typ, s)); err != nil {
				return nil, err
			}
		}
	}
	if module, ok := strings.CutSuffix(name, ".weight"); ok {
		t, _ := s.Lookup(name)
		if _, scales := s.Lookup(module + ".SCB"); scales && t.DType == tensor.I8 {
			if err := add(openInt8(module, s, s.DType())); err != nil {
				return nil, err
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, nil
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%w: it is stored as both %s and %s", quant.ErrMalformed, found[0].Spec().Type,
		found[1].Spec().Type)
}

// Encoder prepares to store t, which has float elements, as public says.
func (Scheme) Encoder(_ context.Context, public quant.Spec, t tensor.Info) (quant.Encoder, error) {
	s, err := private(public)
	if err != nil {
		return nil, err
	}
	if !t.DType.Float() {
		return nil, fmt.Errorf("%w to %s: its dtype is %v, expected F32, F16 or BF16", quant.ErrUnsupported, s.Type, t.DType)
	}
	if t.Count() == 0 {
		return nil, fmt.Errorf("%w to %s: it is empty", quant.ErrUnsupported, s.Type)
	}
	if s.Type == "int8" {
		return newInt8Encoder(s, t)
	}
	return new4bitEncoder(s, t)
}

// Config returns the quantization_config that transformers writes, keys sorted. It has one type for all weights.
func (Scheme) Config(weights []quant.Assigned, skip []string) (key string, object []byte, err error) {
	if len(weights) == 0 {
		return "", nil, fmt.Errorf("%w: no weights, expected at least one", quant.ErrUnsupported)
	}
	s, err := private(weights[0].Spec)
	if err != nil {
		return "", nil, err
	}
	for _, w := range weights {
		if !w.Spec.Equal(weights[0].Spec) {
			return "", nil, fmt.Errorf("tensor %s: %w in %s beside others in %s: bitsandbytes has one type a checkpoint",
				tensor.Quote(w.Name), quant.ErrUnsupported, w.Spec, weights[0].Spec)
		}
	}
	return "quantization_config", config(s, skip), nil
}

func config(s spec, skip []string) []byte {
	eight := s.Type == "int8"
	computeDType, quantType := "bfloat16", s.Type
	if eight { // the settings of 4 bits at their defaults
		computeDType, quantType = "float32", "fp4"
	}
	var b []byte
	member := func(key, value string) {
		b = fmt.Appendf(b, "%q: %s, ", key, value)
	}
	member("_load_in_4bit", fmt.Sprint(!eight))
	member("_load_in_8bit", fmt.Sprint(eight))
	member("bnb_4bit_compute_dtype", quote(computeDType))
	member("bnb_4bit_quant_storage", quote("uint8"))
	member("bnb_4bit_quant_type", quote(quantType))
	member("bnb_4bit_use_double_quant", fmt.Sprint(s.DoubleQuant && !eight))
	member("llm_int8_enable_fp32_cpu_offload", "false")
	member("llm_int8_has_fp16_weight", "false")
	member("llm_int8_skip_modules", stringList(skip))
	member("llm_int8_threshold", "6.0")
	member("load_in_4bit", fmt.Sprint(!eight))
	member("load_in_8bit", fmt.Sprint(eight))
	member("quant_method", quote("bitsandbytes"))
	return append(append([]byte{'{'}, b[:len(b)-len(", ")]...), '}')
}

func stringList(list []string) string {
	if list == nil {
		return "null"
	}
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = quote(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func quote(s string) string {
	b, err := jsontext.AppendQuote(nil, s)
	if err != nil { // invalid UTF-8: quoted all the same, mangled
		b, _ = jsontext.AppendQuote(nil, strings.ToValidUTF8(s, "\uFFFD"))
	}
	return string(b)
}
