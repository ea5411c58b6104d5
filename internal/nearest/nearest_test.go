package nearest

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"pgregory.net/rapid"
)

func TestTo(t *testing.T) {
	types := []string{"nf4", "fp4", "int8", "keep", "none"}
	flags := []string{"quantize", "double-quant", "follow-links", "force", "dtype", "dry-run", "max-shard-size", "memory",
		"merge"}
	modules := []string{"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
	for _, c := range []struct {
		word  string
		known []string
		want  string
	}{
		{"quantise", flags, "quantize"}, {"quantiez", flags, "quantize"}, {"QUANTIZE", flags, "quantize"},
		{"folow-link", flags, "follow-links"},
		{"max-shard", flags, "max-shard-size"}, {"dtypes", flags, "dtype"}, {"dryrun", flags, "dry-run"}, {"m", flags, ""},
		{"me", flags, ""}, {"frobnicate", flags, ""},
		{"nf5", types, "nf4"}, {"nf", types, "nf4"}, {"int4", types, "int8"}, {"q9", types, ""}, {"4", types, ""},
		{"", types, ""}, {"none", types, "none"},
		{"q_prj", modules, "q_proj"}, {"qproj", modules, "q_proj"}, {"donw_proj", modules, "down_proj"},
		{"gate", modules, "gate_proj"}, {"lm_head", modules, ""},
		{"model.safetensor", []string{"config.json", "model.safetensors"}, "model.safetensors"},
		{"modèle", []string{"modele"}, "modele"},
		{strings.Repeat("x", 10_000), []string{strings.Repeat("x", 10_001)}, ""},
		{"a", nil, ""}, {"ab", []string{"xy"}, ""}, {"ab", []string{"ba"}, "ba"},
	} {
		got, ok := To(c.word, c.known)
		assert.Equal(t, c.want, got, c.word)
		assert.Equal(t, c.want != "", ok, c.word)
	}
	assert.Equal(t, "; did you mean q_proj?", Suggestion("q_prj", modules))
	assert.Equal(t, `; did you mean "a\nbc"?`, Suggestion("abc", []string{"a\nbc"}))
	assert.Empty(t, Suggestion("lm_head", modules))
	assert.Empty(t, Suggestion("q_proj", modules))
}

// The distance is symmetric, zero of equal words alone, at most the longer length, and one for each single change.
func TestDistance(t *testing.T) {
	const most = 1000
	rapid.Check(t, func(t *rapid.T) {
		word := rapid.StringMatching(`[a-dé]{0,12}`)
		a, b := word.Draw(t, "a"), word.Draw(t, "b")
		d := distance(a, b, most)
		assert.Equal(t, d, distance(b, a, most))
		assert.Equal(t, a == b, d == 0)
		assert.LessOrEqual(t, d, max(len([]rune(a)), len([]rune(b))))
		limit := rapid.IntRange(1, 5).Draw(t, "limit")
		assert.Equal(t, min(d, limit), distance(a, b, limit))
		x := []rune(a)
		i := rapid.IntRange(0, len(x)).Draw(t, "i")
		longer := string(x[:i]) + "z" + string(x[i:])
		assert.Equal(t, 1, distance(a, longer, most))
		if i+1 < len(x) && x[i] != x[i+1] {
			x[i], x[i+1] = x[i+1], x[i]
			assert.Equal(t, 1, distance(a, string(x), most))
		}
	})
}

func TestClosest(t *testing.T) {
	known := []string{"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", strings.Repeat("q", 300)}
	assert.Equal(t, known[1], Closest("model.layers.0.attn.kproj", known))
	assert.Equal(t, known[0], Closest("model.layers.0.self_attn.x_proj", known))
	assert.Empty(t, Closest("abc", known))
	assert.Empty(t, Closest(strings.Repeat("q", 299), known))
}
