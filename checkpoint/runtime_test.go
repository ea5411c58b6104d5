package checkpoint_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"os"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/tensor"

	_ "github.com/lorakit/lorakit/formats/safetensors" // registers the container
	_ "github.com/lorakit/lorakit/quant/bnb"           // registers the scheme
)

// TestRuntime: every parameter that transformers has of a folder is read with its shape and values, whatever the rows
// that are asked for at once.
func TestRuntime(t *testing.T) {
	b, err := os.ReadFile("../fixtures/runtime.json")
	require.NoError(t, err)
	var folders map[string]map[string]struct {
		Shape tensor.Shape `json:"shape"`
		Hash  string       `json:"sha256"`
	}
	require.NoError(t, json.Unmarshal(b, &folders))
	require.Greater(t, len(folders), 10)
	for folder, params := range folders {
		t.Run(folder, func(t *testing.T) {
			c, err := checkpoint.Open(context.Background(), "../fixtures/"+folder)
			require.NoError(t, err)
			defer c.Close()
			require.NotEmpty(t, params)
			for name, want := range params {
				p, err := c.Runtime(name)
				if assert.NoError(t, err, name) {
					assert.Equal(t, want.Shape, p.Shape, name)
					for _, step := range []int{1, 3, 1 << 20} {
						assert.Equal(t, want.Hash, hash(t, p, step), "%s, %d rows at a time", name, step)
					}
					turnedRound(t, p)
				}
			}
			for _, name := range c.Parameters() {
				if _, ok := params[name]; !ok {
					_, err := c.Runtime(name)
					assert.NoError(t, err, name) // a buffer
				}
			}
		})
	}
}

// hash reads a parameter whole, some rows at a time.
func hash(t *testing.T, p *checkpoint.Parameter, step int) string {
	h := sha256.New()
	for expert := range max(1, p.Experts) {
		m := p.Matrix(expert)
		rows, cols := m.Dims()
		for lo := 0; lo < rows; lo += step {
			hi := min(lo+step, rows)
			x := make([]float32, (hi-lo)*cols)
			require.NoError(t, m.ReadRows(x, lo, hi))
			for _, f := range x {
				h.Write(binary.LittleEndian.AppendUint32(nil, math.Float32bits(f)))
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// turnedRound reads a parameter by columns, in the order of the file and across it.
func turnedRound(t *testing.T, p *checkpoint.Parameter) {
	turned := p.T()
	require.NotEqual(t, p.Turned(), turned.Turned(), p.Name)
	for expert := range max(1, p.Experts) {
		m, mt := p.Matrix(expert), turned.Matrix(expert)
		rows, cols := m.Dims()
		x, y := make([]float32, rows*cols), make([]float32, rows*cols)
		require.NoError(t, m.ReadRows(x, 0, rows))
		for lo := 0; lo < cols; lo += 7 {
			require.NoError(t, mt.ReadRows(y[lo*rows:], lo, min(lo+7, cols)))
		}
		for i := range x {
			require.Equal(t, math.Float32bits(x[i]), math.Float32bits(y[i%cols*rows+i/cols]), "%s, element %d", p.Name, i)
		}
	}
}
