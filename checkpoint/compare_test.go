package checkpoint_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	_ "github.com/lorakit/lorakit/quant/bnb"
)

func TestCompareAtTheEnds(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		a, b   []float64
		rel    float64
		maxAbs float64
	}{
		{[]float64{1e200, -1e200}, []float64{2e200, -2e200}, 1, 1e200},
		{[]float64{1e-200, 0}, []float64{2e-200, 0}, 1, 1e-200},
		{[]float64{0, 0}, []float64{0, 0}, 0, 0},
		{[]float64{0, 0}, []float64{0, 1}, math.Inf(1), 1},
		{[]float64{math.NaN(), 3}, []float64{math.NaN(), 3}, 0, 0},
		{[]float64{math.NaN(), 3}, []float64{1, 3}, math.Inf(1), math.Inf(1)},
		{[]float64{math.Inf(1), 3}, []float64{math.Inf(1), 3}, 0, 0},
		{[]float64{3, 4}, []float64{3, 4.5}, 0.1, 0.5},
	} {
		var open []*checkpoint.Checkpoint
		for i, x := range [][]float64{c.a, c.b} {
			path := filepath.Join(dir, fmt.Sprint(i, ".safetensors"))
			header := `{"w":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}      `
			b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
			for _, v := range x {
				b = binary.LittleEndian.AppendUint64(b, math.Float64bits(v))
			}
			require.NoError(t, os.WriteFile(path, b, 0o666))
			k, err := checkpoint.Open(context.Background(), path)
			require.NoError(t, err)
			open = append(open, k)
		}
		r, err := checkpoint.Compare(context.Background(), open[0], open[1])
		require.NoError(t, err)
		for _, k := range open {
			k.Close()
		}
		for _, got := range []float64{r.RelRMS, r.Tensors[0].RelRMS} {
			if math.IsInf(c.rel, 1) {
				assert.Equal(t, c.rel, got, "%v", c)
			} else {
				assert.InDelta(t, c.rel, got, 1e-12, "%v", c)
			}
		}
		assert.Equal(t, c.maxAbs, r.MaxAbs)
	}
}
