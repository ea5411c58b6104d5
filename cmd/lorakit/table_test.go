package main

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
)

// layers is a table as analyze prints it.
func layers(n int) *table {
	t := newTable(nil, "PICTURE", "MODULE", "SHAPE", "NORM")
	t.names, t.spare = []string{"MODULE"}, []string{"SHAPE", "NO SUCH COLUMN", "PICTURE"}
	for i := range n {
		for _, name := range []string{"self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"} {
			t.row("████████████", fmt.Sprintf("model.layers.%d.%s", i, name), "[2048, 5632]", "10.94")
		}
	}
	return t
}

func widest(lines []string) int {
	n := 0
	for _, l := range lines {
		n = max(n, utf8.RuneCountInString(l))
	}
	return n
}

// TestTableFits leaves away what is needed least, and keeps the rows apart as long as there is room.
func TestTableFits(t *testing.T) {
	whole := layers(12).lines(math.MaxInt)
	assert.Equal(t, 14+34+14+5, widest(whole))
	for columns := 8 + 2 + 5; columns <= 100; columns++ {
		lines := layers(12).lines(columns)
		assert.LessOrEqual(t, widest(lines[:len(whole)]), columns, "%d columns", columns) // and what was left away below
		if columns >= 14+34+14+5 {
			assert.Equal(t, whole, lines)
			continue
		}
		assert.Equal(t, columns < 24+14+14+2+5, strings.HasPrefix(lines[len(lines)-1], "no room for SHAPE"), "%d columns",
			columns)
		assert.Equal(t, columns < 24+14+2+5, strings.HasSuffix(lines[len(lines)-1], ", PICTURE"), "%d columns", columns)
		assert.NotContains(t, strings.Join(lines, "\n"), "NO SUCH COLUMN")
		if columns >= 20+2+5 { // 12 layers and self_attn.q_proj need 20
			different := map[string]bool{}
			for _, l := range lines {
				different[l] = true
			}
			assert.Len(t, different, len(lines), "%d columns: rows are alike", columns)
		}
	}
}

// TestTableWithTwoColumnsOfNames takes room from the first one first.
func TestTableWithTwoColumnsOfNames(t *testing.T) {
	make := func() *table {
		t := newTable(nil, "FILE", "TENSOR", "FROM")
		t.names = []string{"FILE", "TENSOR"}
		t.row("model.safetensors", "model.layers.0.post_attention_layernorm.weight", "copied")
		return t
	}
	assert.Equal(t, "model.safetensors  model.layers.0.post_attention_layernorm.weight  copied", make().lines(80)[1])
	assert.Equal(t, "…safetensors  model.layers.0.post_attention_layernorm.weight  copied", make().lines(68)[1])
	assert.Equal(t, 50, utf8.RuneCountInString(make().lines(50)[1]))
	assert.LessOrEqual(t, widest(make().lines(30)), 30)
	assert.LessOrEqual(t, widest(make().lines(1)), 8+2+8+2+6, "no less than can be read")
}

func TestShares(t *testing.T) {
	for _, c := range []struct {
		x       float64
		share   string
		percent string
	}{
		{1, "1.0000", "100.0%"},
		{math.Nextafter(1, 0), "1.0000", "100.0%"},
		{oneInFloat32, "1.0000", "100.0%"},
		{math.Nextafter(oneInFloat32, 0), "0.99999997", "99.9%"},
		{1 - 2e-7, "0.9999998", "99.9%"},
		{0.999951, "0.99995", "99.9%"},
		{0.999996, "0.999996", "99.9%"},
		{0.9996, "0.9996", "99.9%"},
		{0.99994, "0.9999", "99.9%"},
		{1.00001, "1.0000", "100.0%"},
		{1.0002, "1.0002", "100.0%"},
		{0.5, "0.5000", "50.0%"},
		{0, "0.0000", "0.0%"},
		{math.Copysign(0, -1), "0.0000", "0.0%"},
		{-1e-9, "0.0000", "0.0%"},
		{-0.0002, "-0.0002", "0.0%"},
		{-0.25, "-0.2500", "-25.0%"},
		{math.NaN(), "NaN", "NaN%"},
	} {
		assert.Equal(t, c.share, share(c.x), c.x)
		assert.Equal(t, c.percent, percent(c.x), c.x)
	}
}
