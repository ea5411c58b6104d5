package pipeline_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// shared is a scheme of one byte an element and one scale a group of weights: the largest absolute value of all of them
// over 127.
type shared struct{}

func init() { quant.Register(shared{}) }

func (shared) Name() string        { return "shared" }
func (shared) Types() []quant.Type { return []quant.Type{{Name: "shared8"}} }
func (shared) Spec(typ string, _ quant.Params) (quant.Spec, error) {
	return quant.Spec{Type: typ}, nil
}

func (shared) Groups(_ quant.Spec, names []string) [][]string {
	byParent := map[string][]string{}
	for _, n := range names {
		for _, end := range []string{"q_proj.weight", "k_proj.weight", "v_proj.weight"} {
			if parent, ok := strings.CutSuffix(n, end); ok {
				byParent[parent] = append(byParent[parent], n)
			}
		}
	}
	var list [][]string
	for _, g := range byParent {
		list = append(list, g)
	}
	return list
}

func (shared) Find(_ context.Context, s quant.Stored) ([]quant.Decoder, error) {
	var list []quant.Decoder
	for _, t := range s.Tensors() {
		if _, ok := s.Lookup(t.Name + ".scale"); !ok || t.DType != tensor.I8 {
			continue
		}
		var scale [4]byte
		if err := s.Read(t.Name+".scale", scale[:], 0); err != nil {
			return nil, err
		}
		list = append(list, &sharedWeight{info: tensor.Info{Name: t.Name, DType: tensor.F32, Shape: t.Shape},
			scale: math.Float32frombits(binary.LittleEndian.Uint32(scale[:]))})
	}
	return list, nil
}

func (shared) Encoder(_ context.Context, _ quant.Spec, t tensor.Info) (quant.Encoder, error) {
	return &sharedWeight{info: t}, nil
}
func (shared) Config([]quant.Assigned, []string) (string, []byte, error) {
	return "quantization_config", []byte(`{"quant_method": "shared"}`), nil
}
func (shared) Declaration(b []byte) (quant.Declaration, bool) {
	return quant.Declaration{}, strings.Contains(string(b), `"shared"`)
}

// sharedWeight is both ways of a weight.
type sharedWeight struct {
	info  tensor.Info
	scale float32
}

func (w *sharedWeight) Info() tensor.Info           { return w.info }
func (w *sharedWeight) Spec() quant.Spec            { return quant.Spec{Type: "shared8"} }
func (w *sharedWeight) Parts() []string             { return []string{w.info.Name, w.info.Name + ".scale"} }
func (w *sharedWeight) Unit() int64                 { return 1 }
func (w *sharedWeight) Values() tensor.DType        { return tensor.F32 }
func (w *sharedWeight) Deferred(int64, int64) int64 { return 0 }
func (w *sharedWeight) Statistics() int             { return 1 }
func (w *sharedWeight) Join(a, b []float32)         { a[0] = max(a[0], b[0]) }
func (w *sharedWeight) Begin(n []float32) error     { w.scale = n[0] / 127; return nil }
func (w *sharedWeight) TileElements() int64         { return 40_000 }
func (w *sharedWeight) floats(b []byte) []float32   { return floatsOf(b, w.info.DType) }

func floatsOf(b []byte, d tensor.DType) []float32 {
	x := make([]float32, int64(len(b))*8/d.Bits())
	if err := tensor.ToFloats(x, b, d); err != nil {
		panic(err)
	}
	return x
}

func (w *sharedWeight) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	return append(r, quant.Range{Part: 0, Offset: lo, Length: hi - lo})
}

func (w *sharedWeight) Tiles(r []quant.Range, lo, hi int64) []quant.Range { return w.Inputs(r, lo, hi) }

func (w *sharedWeight) Decode(dst []byte, _, _ int64, in [][]byte) error {
	for i, q := range in[0] {
		binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(float32(int8(q))*w.scale))
	}
	return nil
}

func (w *sharedWeight) Outputs() []tensor.Info {
	return []tensor.Info{{Name: w.info.Name, DType: tensor.I8, Shape: w.info.Shape},
		{Name: w.info.Name + ".scale", DType: tensor.F32, Shape: tensor.Shape{1}}}
}

func (w *sharedWeight) Measure(n []float32, _, _ int64, src []byte) error {
	for _, v := range w.floats(src) {
		n[0] = max(n[0], v, -v)
	}
	return nil
}

func (w *sharedWeight) Encode(out [][]byte, _ []float32, _, _ int64, src []byte) error {
	if w.scale == 0 {
		return fmt.Errorf("encoded before anything was measured")
	}
	for i, v := range w.floats(src) {
		out[0][i] = byte(int8(math.RoundToEven(float64(v / w.scale))))
	}
	return nil
}

func (w *sharedWeight) Finish(_ quant.Deferred, write func(int, int64, []byte) error) error {
	return write(1, 0, binary.LittleEndian.AppendUint32(nil, math.Float32bits(w.scale)))
}

// open opens a fixture, with an adapter merged where one is named.
func open(t *testing.T, base, adapter string) *pipeline.Merged {
	c, err := checkpoint.Open(context.Background(), base)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	if adapter == "" {
		return pipeline.Plain(c)
	}
	a, err := lora.Open(adapter, lora.OpenOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { a.Close() })
	m, err := pipeline.Merge(context.Background(), c, []lora.Weighted{{Adapter: a, Weight: 1}})
	require.NoError(t, err)
	return m
}

// make carries out a plan and opens the result.
func result(t *testing.T, m *pipeline.Merged, o pipeline.Options, ro pipeline.RunOptions) (*checkpoint.Checkpoint,
	pipeline.Result, string) {
	dst := filepath.Join(t.TempDir(), "dst")
	p, err := pipeline.NewPlan(context.Background(), m, dst, o)
	require.NoError(t, err)
	r, err := pipeline.Run(context.Background(), p, m, dst, ro)
	require.NoError(t, err)
	c, err := checkpoint.Open(context.Background(), dst)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c, r, dst
}

func values(t *testing.T, c *checkpoint.Checkpoint, name string) []float32 {
	i := slices.IndexFunc(c.Weights, func(w *checkpoint.Weight) bool { return w.Name == name })
	require.GreaterOrEqual(t, i, 0, name)
	w := c.Weights[i]
	b, err := new(checkpoint.Reader).Read(w, 0, w.Count(), false)
	require.NoError(t, err)
	return floatsOf(b, w.Values)
}

const llama = "../fixtures/adapters/bases/llama"

// TestMeasuredGroup: q, k and v share one scale, that of the largest value of all three after the merge; they stand in
// one shard, and neither threads nor memory nor how the run was begun change a byte.
func TestMeasuredGroup(t *testing.T) {
	for _, adapter := range []string{"", "../fixtures/adapters/llama/rslora", "../fixtures/adapters/llama/dora"} {
		o := pipeline.Options{Quantize: "shared8", MaxShardSize: 3 << 10}
		c, _, dst := result(t, open(t, llama, adapter), o, pipeline.RunOptions{})
		want := digest(t, dst)
		for _, ro := range []pipeline.RunOptions{{Threads: 1}, {Threads: 7}, {Threads: 2, Memory: 64 << 20}} {
			_, _, again := result(t, open(t, llama, adapter), o, ro)
			require.Equal(t, want, digest(t, again))
		}
		merged, _, _ := result(t, open(t, llama, adapter), pipeline.Options{Quantize: "keep"}, pipeline.RunOptions{})
		for layer := range 2 {
			most, files := float32(0), map[string]bool{}
			for _, p := range []string{"q", "k", "v"} {
				name := fmt.Sprintf("model.layers.%d.self_attn.%s_proj.weight", layer, p)
				for _, v := range values(t, merged, name) {
					most = max(most, v, -v)
				}
				i := slices.IndexFunc(c.Weights, func(w *checkpoint.Weight) bool { return w.Name == name })
				files[c.Weights[i].Parts[0].File] = true
			}
			assert.Len(t, files, 1)
			for _, p := range []string{"q", "k", "v"} {
				name := fmt.Sprintf("model.layers.%d.self_attn.%s_proj.weight", layer, p)
				for i, v := range values(t, merged, name) {
					got := values(t, c, name)[i]
					require.Equal(t, float32(math.RoundToEven(float64(v/(most/127))))*(most/127), got)
				}
			}
		}
	}
}
