package lora

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestOlderFused takes apart stacks that transformers has made of single experts. Their version of PEFT took stacks the
// other way round, as gpt-oss has them, whose gate and up take turns: the name of the base tells them apart.
func TestOlderFused(t *testing.T) {
	for _, name := range []string{"qwen3-moe", "tiny-mixtral"} {
		for base, refused := range map[string]bool{name: false, "models/Qwen3-MoE-tuned": false, "mine": true,
			"gpt-oss-qwen3moe": true} {
			dir := t.TempDir()
			for _, file := range []string{configName, "adapter_model.safetensors"} {
				b, err := os.ReadFile(filepath.Join(fixtures, name, "per-expert-fused", file))
				require.NoError(t, err)
				if file == configName {
					b = []byte(strings.ReplaceAll(string(b), `"base_model_name_or_path": "`+name+`"`,
						`"base_model_name_or_path": "`+base+`"`))
				}
				require.NoError(t, os.WriteFile(filepath.Join(dir, file), b, 0o666))
			}
			a, err := Open(dir, OpenOptions{})
			require.NoError(t, err)
			e, err := a.Encode(EncodeOptions{To: PEFT, Experts: "per-expert"})
			if refused {
				require.ErrorIs(t, err, ErrUnsupported, base)
				require.ErrorContains(t, err, "gate and up take turns", base)
			} else {
				require.NoError(t, err, base)
				require.Contains(t, strings.Join(append(e.Notices, a.Notices...), "\n"), "gate before up", base)
			}
			require.NoError(t, a.Close())
		}
	}
}
