package pipeline_test

import (
	"context"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// late is a scheme that keeps all numbers of its weights for Finish, which stores them from the last to the first.
type late struct{}

func init() { quant.Register(late{}) }

func (late) Name() string        { return "late" }
func (late) Types() []quant.Type { return []quant.Type{{Name: "late32"}} }
func (late) Spec(typ string, _ quant.Params) (quant.Spec, error) {
	return quant.Spec{Type: typ}, nil
}
func (late) Find(context.Context, quant.Stored) ([]quant.Decoder, error) { return nil, nil }
func (late) Encoder(_ context.Context, _ quant.Spec, t tensor.Info) (quant.Encoder, error) {
	return lateWeight{t}, nil
}
func (late) Config([]quant.Assigned, []string) (string, []byte, error) {
	return "quantization_config", []byte(`{"quant_method": "late"}`), nil
}
func (late) Declaration([]byte) (quant.Declaration, bool) { return quant.Declaration{}, false }

// lateWeight has units of four elements, and as many numbers of each.
type lateWeight struct{ info tensor.Info }

func (w lateWeight) Outputs() []tensor.Info                          { return []tensor.Info{w.info} }
func (w lateWeight) Unit() int64                                     { return 4 }
func (w lateWeight) Deferred(lo, hi int64) int64                     { return hi - lo }
func (w lateWeight) Tiles(r []quant.Range, _, _ int64) []quant.Range { return r }
func (w lateWeight) Encode(_ [][]byte, d []float32, _, _ int64, src []byte) error {
	return tensor.ToFloats(d, src, w.info.DType)
}

func (w lateWeight) Finish(c quant.Deferred, write func(int, int64, []byte) error) error {
	n := w.info.Count()
	x := make([]float32, 1<<10)
	for at := n; at > 0; at -= int64(len(x)) {
		x = x[:min(at, 1<<10)]
		if err := c.ReadFloats(x, at-int64(len(x))); err != nil {
			return err
		}
		b := make([]byte, 0, 4*len(x))
		for i := range x {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x[len(x)-1-i]))
		}
		if err := write(0, 4*(n-at), b); err != nil {
			return err
		}
	}
	return nil
}

// TestSeveralNumbersAUnit: what an encoder keeps is where it was kept, in memory and in a scratch file.
func TestSeveralNumbersAUnit(t *testing.T) {
	const count = 4096 * 1024
	src := filepath.Join(t.TempDir(), "w.safetensors")
	header := `{"layers.0.q_proj.weight":{"dtype":"F32","shape":[4096,1024],"data_offsets":[0,16777216]}}`
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	for i := range count {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(i)))
	}
	require.NoError(t, os.WriteFile(src, b, 0o666))
	for _, memory := range []int64{0, 40 << 20} { // all in memory, and too little for it
		o := pipeline.Options{Quantize: "late32", Include: []string{"*q_proj*"}}
		got, _, _ := result(t, open(t, src, ""), o, pipeline.RunOptions{Memory: memory, Threads: 2})
		w := got.Weights[0]
		x, err := new(checkpoint.Reader).Read(w, 0, w.Count(), false)
		require.NoError(t, err)
		for i := range count {
			if v := math.Float32frombits(binary.LittleEndian.Uint32(x[4*i:])); v != float32(count-1-i) {
				t.Fatalf("element %d is %v, expected %v", i, v, float32(count-1-i))
			}
		}
	}
}
