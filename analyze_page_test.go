package lorakit_test

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestAnalyzePage: the page is well formed, asks nobody else for anything, and names cannot break it.
func TestAnalyzePage(t *testing.T) {
	dir := t.TempDir()
	evil := `x"><script>alert(1)</script>`
	src := filepath.Join(dir, "a.safetensors")
	writeTensors(t, src, map[string]entry{
		"model.layers.0." + evil + ".weight":         ones(8, 8),
		"model.layers.1." + evil + ".weight":         ones(8, 8),
		"model.layers.11.self_attn.q_proj.weight":    ones(8, 8),
		"model.layers.11.layers.2.mlp.gate.1.weight": ones(8, 8),
	})
	page := filepath.Join(dir, "a.html")
	r, err := lorakit.Analyze(t.Context(), src, "", lorakit.AnalyzeOptions{HTML: page})
	require.NoError(t, err)
	assert.NotEmpty(t, r.Modules)
	b, err := os.ReadFile(page)
	require.NoError(t, err)
	text := string(b)
	assert.NotContains(t, text, "<script")
	assert.NotContains(t, text, "http")
	assert.NotContains(t, text, "ZgotmplZ")
	assert.NotContains(t, text, "NaN")
	d := xml.NewDecoder(strings.NewReader(text))
	d.Strict, d.AutoClose, d.Entity = false, xml.HTMLAutoClose, xml.HTMLEntity
	counts := map[string]int{}
	for {
		x, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		if s, ok := x.(xml.StartElement); ok {
			counts[s.Name.Local]++
		}
	}
	assert.Equal(t, len(r.Kinds), counts["figure"])
	quantized := 0
	for _, m := range r.Modules {
		if m.NF4 != nil {
			quantized++
		}
	}
	assert.Equal(t, 2*len(r.Modules)+quantized, counts["rect"]) // norm, effective rank, error of NF4
	assert.NoFileExists(t, page+".partial")
}

// TestAnalyzePageOrder: kinds stand in the order of the model, and not in that of the file.
func TestAnalyzePageOrder(t *testing.T) {
	attention := []string{"q_proj", "k_proj", "v_proj", "o_proj"}
	mlp := []string{"gate_proj", "up_proj", "down_proj"}
	for path, want := range map[string][]string{
		"fixtures/tiny-llama": slices.Concat(attention, mlp, []string{"lm_head"}),
		"fixtures/tiny-mixtral": slices.Concat(attention, []string{"gate"}, mlp,
			[]string{"lm_head"}),
		"fixtures/tiny-gpt2":                             {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"},
		filepath.Join(adapterFixtures, "llama/patterns"): slices.Concat(attention, mlp),
	} {
		page := filepath.Join(t.TempDir(), "page.html")
		_, err := lorakit.Analyze(t.Context(), path, "", lorakit.AnalyzeOptions{HTML: page})
		require.NoError(t, err)
		b, err := os.ReadFile(page)
		require.NoError(t, err)
		var got []string
		for _, part := range strings.Split(string(b), "<figcaption>")[1:] {
			kind, _, _ := strings.Cut(part, "<")
			got = append(got, kind)
		}
		assert.Equal(t, want, got, path)
	}
}
