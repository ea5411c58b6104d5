package quant

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSkipList leaves out the modules that transformers 5.24 does (should_convert_module), and no finding is made where
// an entry is none that Python takes.
func TestSkipList(t *testing.T) {
	modules := []string{"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "model.layers.10.mlp.gate",
		"model.visual.merger.0", "model.layers.1.self_attn.q_proj"}
	all := []int{0, 1, 2, 3, 4, 5}
	for entry, want := range map[string][]int{
		"lm_head":                        {0},
		`(?P<m>model)\.layers\.\d\.mlp`:  {1, 2},
		"model.layers.1":                 {5},
		`.*(?<!0)\.mlp\.gate`:            nil,
		`(model)\.visual|lm_head`:        {0, 4},
		"(?i:LM_HEAD)":                   {0},
		`model\.layers\.(\d)\1?\.mlp`:    {1, 2},
		`model\.(?>layers|visual)`:       {1, 2, 3, 4, 5},
		"gate":                           {1, 3},
		`model\.layers\.1\Z`:             nil,
		"(?i)lm_head":                    all,
		"(":                              all,
		`\N{LATIN SMALL LETTER L}m_head`: all,
	} {
		l := newSkipList([]string{entry})
		var got []int
		for i, m := range modules {
			if l.matches(m) {
				got = append(got, i)
			}
		}
		require.Equal(t, want, got, entry)
	}
}
