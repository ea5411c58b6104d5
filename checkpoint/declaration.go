package checkpoint

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// declaration is what the quantization_config says of how the weights are stored, by the scheme whose it is.
func (c *Checkpoint) declaration() (quant.Declaration, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return quant.Declaration{}, false
	}
	for _, s := range c.Schemes.All() {
		if p, ok := s.Declaration(c.Config.Quantization); ok {
			return p, true
		}
	}
	return quant.Declaration{}, false
}

// ForeignScheme says how config.json has the weights stored, in a few words, where no scheme here reads it, so that
// they are seen as the raw tensors they consist of.
func (c *Checkpoint) ForeignScheme() (string, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return "", false
	}
	if _, ok := c.declaration(); ok {
		return "", false
	}
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(c.Config.Quantization, &named) == nil && named.Method != "" {
		return tensor.Quote(named.Method), true
	}
	var mlx struct { // as mlx-lm writes it
		GroupSize int    `json:"group_size"`
		Bits      int    `json:"bits"`
		Mode      string `json:"mode"`
	}
	if json.Unmarshal(c.Config.Quantization, &mlx) != nil || mlx.GroupSize <= 0 || mlx.Bits <= 0 {
		return "a scheme that its quantization_config does not name", true
	}
	kind := "affine"
	if mlx.Mode != "" && mlx.Mode != kind {
		kind = tensor.Quote(mlx.Mode)
	}
	return fmt.Sprintf("MLX's %s quantisation of %d bits", kind, mlx.Bits), true
}

// CheckReadable refuses a checkpoint whose weights are not the model's as they stand in its file: in a scheme that is
// not read here, or with an adapter beside them that was never merged.
func (c *Checkpoint) CheckReadable() error {
	if method, ok := c.ForeignScheme(); ok {
		return fmt.Errorf("%s: %w: its weights are stored as %s, expected plain ones or a scheme that can be read: %s",
			filepath.Join(c.Path, ConfigName), ErrRefused, method, strings.Join(c.Schemes.Names(), ", "))
	}
	base, factor := "", ""
	for _, w := range c.Weights {
		if strings.Contains(w.Name, ".base_layer.") {
			base = w.Name
		}
		if strings.Contains(w.Name, ".lora_A.") || strings.Contains(w.Name, ".lora_embedding_A") {
			factor = w.Name
		}
		if base != "" && factor != "" {
			return fmt.Errorf(
				"%s: %w: it was saved with an adapter that was never merged: %s stands beside %s; merge it before "+
					"the model is saved (PEFT's merge_and_unload), or save the adapter apart", c.Path, ErrRefused,
				tensor.Quote(factor), tensor.Quote(base))
		}
	}
	return nil
}
