package checkpoint

import (
	"cmp"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

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

// CheckReadable refuses a checkpoint whose weights are not the model's as they stand in its file: in a scheme or a type
// that is not read here, or with an adapter beside them that was never merged.
func (c *Checkpoint) CheckReadable() error {
	if layout, ok := c.ForeignScheme(); ok {
		err := fmt.Errorf("%s: %w: its weights are stored as %s, expected plain ones or a scheme that can be read: %s",
			filepath.Join(c.Path, ConfigName), ErrRefused, layout.Name, strings.Join(c.Schemes.Names(), ", "))
		if layout.Advice != "" {
			err = fmt.Errorf("%w; %s", err, layout.Advice)
		}
		return err
	}
	for _, w := range c.Weights {
		if w.DType == tensor.F8E4M3FNUZ || w.DType == tensor.F8E5M2FNUZ {
			return w.Failed(fmt.Errorf("%w: it is stored as %v, a float8 that some of AMD's GPUs have for themselves, expected "+
				"another type; take the checkpoint that it was made from, or one in float8_e4m3fn", ErrRefused, w.DType))
		}
	}
	base, part := "", ""
	for _, w := range c.Weights {
		if wrapped().MatchString(w.Name) {
			base = cmp.Or(base, w.Name)
		}
		if adapterPart().MatchString(w.Name) {
			part = cmp.Or(part, w.Name)
		}
	}
	if base != "" && part != "" {
		return fmt.Errorf(
			"%s: %w: it was saved with an adapter that was never merged: %s stands beside %s; merge it before "+
				"the model is saved (PEFT's merge_and_unload), or save the adapter apart", c.Path, ErrRefused,
			tensor.Quote(part), tensor.Quote(base))
	}
	return nil
}

// wrapped matches the names of what PEFT has put a layer around, and adapterPart those of what such layers have of
// their own, for each of PEFT's methods.
var (
	wrapped     = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`\.(?:base_layer|original_module)\.`) })
	adapterPart = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`\.(?:lora_(?:A|B|E|embedding_A|embedding_B)|hada_(?:w[12]|t[12])\w*|` +
			`lokr_(?:w[12]|t2)\w*|vera_lambda_[bd]|ia3_l|oft_R|oft_embedding_R|boft_[Rs]|` +
			`hra_u|miss_block|bone_block|vblora_logits_[AB]\w*|fourierft_spectrum|randlora_(?:lambda|gamma)|` +
			`ln_tuning_layers|trainable_tokens_delta|modules_to_save)(?:\.|$)`)
	})
)
