package checkpoint

import (
	"bytes"
	"fmt"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// ForeignScheme says how the weights are stored where no scheme here reads them, so that they are seen as the raw
// tensors they consist of.
func (c *Checkpoint) ForeignScheme() (quant.Layout, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return c.undeclared()
	}
	if l, ok := notDense(c.Config.Quantization); ok {
		return l, true
	}
	if d, ok := c.declaration(); ok {
		return d.Unread, d.Unread != quant.Layout{}
	}
	if l, ok := namedLayout(c.Config.Quantization); ok {
		return l, true
	}
	if l, ok := c.undeclared(); ok {
		return l, true
	}
	return unnamedLayout(c.Config.Quantization), true
}

// undeclared is the layout of weights whose names alone say that they are quantised.
func (c *Checkpoint) undeclared() (quant.Layout, bool) {
	there := sync.OnceValue(func() map[string]bool {
		names := make(map[string]bool, len(c.Weights))
		for _, w := range c.Weights {
			names[w.Name] = true
		}
		return names
	})
	const untold = ", without a quantization_config that tells how to read them"
	for _, w := range c.Weights {
		if w.Decoder != nil {
			continue
		}
		if packed(w.Parts[0]) {
			return quant.Layout{
				Name: "integers of GPTQ or AWQ, such as " + tensor.Quote(w.Name) + untold,
				Advice: "say it in config.json as quantization_config, or beside it in quantize_config.json: quant_method, bits, " +
					"group_size",
			}, true
		}
		for _, scales := range scalesOf(w.Info) {
			if there()[scales] {
				return quant.Layout{
					Name:   "codes with scales, such as " + tensor.Quote(w.Name) + " beside " + tensor.Quote(scales) + untold,
					Advice: "take the config.json that belongs to them",
				}, true
			}
		}
	}
	return quant.Layout{}, false
}

// scalesOf are the names that the scales of a weight have, by one scheme or another, where its type is one of codes.
func scalesOf(t tensor.Info) []string {
	module, weight := strings.CutSuffix(t.Name, ".weight")
	switch t.DType {
	case tensor.F8E4M3, tensor.I8:
		return []string{t.Name + "_scale", t.Name + "_scale_inv"}
	case tensor.U8, tensor.I32:
		if m, ok := strings.CutSuffix(t.Name, ".weight_packed"); ok {
			return []string{m + ".weight_scale"}
		}
	case tensor.U32:
		if weight {
			return []string{module + ".scales"}
		}
	}
	return nil
}

const (
	// plainly is what can be done about a scheme of which nothing better is known.
	plainly = "take the checkpoint that it was made from, or have the program that made it save it dequantised"
	// unpacked is what can be done about weights in the order of a kernel.
	unpacked = "take the checkpoint that it was repacked from"
)

// notDense is the layout of weights of which only those that are not zero are stored, whatever the scheme.
func notDense(config jsontext.Value) (quant.Layout, bool) {
	var c struct {
		Format   string         `json:"format"`
		Fmt      string         `json:"fmt"`
		Sparsity jsontext.Value `json:"sparsity_config"`
	}
	if json.Unmarshal(config, &c) != nil {
		return quant.Layout{}, false
	}
	var sparsity struct {
		Format string `json:"format"`
	}
	if json.Unmarshal(c.Sparsity, &sparsity) != nil || sparsity.Format == "dense" {
		sparsity.Format = ""
	}
	if sparsity.Format == "" && strings.Contains(c.Format, "marlin-24") {
		sparsity.Format = c.Format
	}
	switch {
	case sparsity.Format != "":
		return quant.Layout{Name: "sparse 2:4 weights (" + tensor.Quote(sparsity.Format) + ")",
			Advice: "take the checkpoint that it was made from, or save it without sparsity compression"}, true
	case strings.Contains(c.Fmt, "fnuz"):
		return quant.Layout{Name: "float8 of the fnuz kind (" + tensor.Quote(c.Fmt) + ")", Advice: plainly}, true
	}
	return quant.Layout{}, false
}

// foreignLayouts are the schemes that are known by name alone, by their quant_method.
var foreignLayouts = map[string]quant.Layout{
	"aqlm":           {Name: "AQLM's codebooks", Advice: plainly},
	"auto-round":     {Name: "AutoRound's own layout", Advice: "export it as auto_gptq, whose quant_method is gptq"},
	"awq_marlin":     {Name: "AWQ in a layout for marlin kernels", Advice: unpacked},
	"bitnet":         {Name: "BitNet's ternary weights", Advice: plainly},
	"eetq":           {Name: "EETQ's 8 bits", Advice: plainly},
	"exl2":           {Name: "EXL2 of ExLlamaV2", Advice: plainly},
	"exl3":           {Name: "EXL3 of ExLlamaV3", Advice: plainly},
	"gptq_marlin":    {Name: "GPTQ in a layout for marlin kernels", Advice: unpacked},
	"gptq_marlin_24": {Name: "GPTQ in a layout for sparse marlin kernels", Advice: plainly},
	"higgs":          {Name: "HIGGS", Advice: plainly},
	"hqq":            {Name: "HQQ", Advice: "install a plugin that reads it, as lorakit's example plugin hqq does"},
	"marlin":         {Name: "a layout for marlin kernels", Advice: unpacked},
	"quanto":         {Name: "optimum-quanto's tensors", Advice: plainly},
	"quark":          {Name: "AMD Quark's layout", Advice: plainly},
	"spqr":           {Name: "SpQR", Advice: plainly},
	"torchao":        {Name: "torchao's tensors", Advice: plainly},
	"vptq":           {Name: "VPTQ's codebooks", Advice: plainly},
}

// namedLayout is that of a quantization_config with a quant_method that no scheme here knows.
func namedLayout(config jsontext.Value) (quant.Layout, bool) {
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(config, &named) != nil || named.Method == "" {
		return quant.Layout{}, false
	}
	l, ok := foreignLayouts[strings.ToLower(named.Method)]
	if !ok {
		return quant.Layout{Name: tensor.Quote(named.Method)}, true
	}
	if lower := bytes.ToLower(config); named.Method == "torchao" && bytes.Contains(lower, []byte("tile_packed")) {
		l.Name = "torchao's tile-packed int4"
	}
	l.Name = fmt.Sprintf("%s (%s)", tensor.Quote(named.Method), l.Name)
	return l, true
}

// unnamedLayout is that of a quantization_config without one.
func unnamedLayout(config jsontext.Value) quant.Layout {
	var mlx struct { // as mlx-lm writes it
		GroupSize int    `json:"group_size"`
		Bits      int    `json:"bits"`
		Mode      string `json:"mode"`
	}
	if json.Unmarshal(config, &mlx) != nil || mlx.GroupSize <= 0 || mlx.Bits <= 0 {
		return quant.Layout{Name: "a scheme that its quantization_config does not name"}
	}
	kind := "affine"
	if mlx.Mode != "" && mlx.Mode != kind {
		kind = tensor.Quote(mlx.Mode)
	}
	return quant.Layout{Name: fmt.Sprintf("MLX's %s quantisation of %d bits", kind, mlx.Bits)}
}
