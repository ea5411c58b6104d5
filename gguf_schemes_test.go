package lorakit_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestSchemesToGGUF: a checkpoint that another tool's scheme has quantised becomes the GGUF file of its plain weights:
// in the types that these had where no type is asked for, else rounded once, from the values that the scheme computes.
func TestSchemesToGGUF(t *testing.T) {
	t.Parallel()
	for typ, block := range map[string]int{
		"nf4": 64, "int8": 0, "mlx4": 32, "fp8": 0, "fp8-channel": 0, "w8a8": 0, "nvfp4": 0, "mxfp8": 0,
	} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			convert := func(src, dst string, o lorakit.ConvertOptions) string {
				dst = filepath.Join(dir, dst)
				_, err := lorakit.Convert(t.Context(), src, dst, o)
				require.NoError(t, err)
				return dst
			}
			llama := filepath.Join(ggufModels, "llama")
			src := convert(llama, "src/llama", lorakit.ConvertOptions{Quantize: typ, BlockSize: block})
			plain := convert(src, "plain/llama", lorakit.ConvertOptions{Quantize: "none"})
			exact := convert(src, "exact/llama", lorakit.ConvertOptions{Quantize: "none", DType: "f32"})
			for _, c := range []struct {
				from string
				o    lorakit.ConvertOptions
			}{
				{plain, lorakit.ConvertOptions{}},
				{plain, lorakit.ConvertOptions{Quantize: "none"}},
				{exact, lorakit.ConvertOptions{DType: "f16"}},
				{exact, lorakit.ConvertOptions{Quantize: "q8_0"}},
				{exact, lorakit.ConvertOptions{Quantize: "q4_0"}},
			} {
				as := c.o.DType + c.o.Quantize + ".gguf"
				once, twice := convert(src, "once-"+as, c.o), convert(c.from, "twice-"+as, c.o)
				sameTensors(t, load(t, twice), load(t, once))
				sameKeys(t, twice, once)
			}
		})
	}
}
