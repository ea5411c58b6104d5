package pipeline_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/pipeline"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/tensor"
)

// fill writes the bytes of a tensor of n elements.
type fill func(n int64) []byte

func bf16(r *rand.Rand) fill {
	return func(n int64) []byte {
		b := make([]byte, 0, 2*n)
		for range n {
			b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(float32(r.NormFloat64()*0.02))>>16))
		}
		return b
	}
}

func f32(r *rand.Rand) fill {
	return func(n int64) []byte {
		b := make([]byte, 0, 4*n)
		for range n {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(r.NormFloat64()*0.02)))
		}
		return b
	}
}

// stored is a tensor for writeFile.
type stored struct {
	name  string
	dtype tensor.DType
	shape tensor.Shape
	fill  fill
}

// writeFile writes a safetensors file.
func writeFile(t testing.TB, path string, tensors ...stored) {
	t.Helper()
	infos := make([]tensor.Info, len(tensors))
	for i, x := range tensors {
		infos[i] = tensor.Info{Name: x.name, DType: x.dtype, Shape: x.shape}
	}
	f, err := formats.Default.Lookup("safetensors")
	require.NoError(t, err)
	l, err := f.Layout(context.Background(), infos, formats.Options{SingleFile: filepath.Base(path)})
	require.NoError(t, err)
	b := make([]byte, l.Shards[0].Size)
	copy(b, l.Shards[0].Header)
	for i, k := range l.Shards[0].Tensors {
		copy(b[l.Shards[0].Offsets[i]:], tensors[k].fill(infos[k].Count()))
	}
	require.NoError(t, os.WriteFile(path, b, 0o666))
}

// writeModel writes a folder of six shards with linears of awkward sizes, and one without an architecture that is
// known.
func writeModel(t testing.TB, dir string) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	require.NoError(t, os.Mkdir(dir, 0o777))
	weightMap := map[string]string{}
	for i := range 6 {
		file := fmt.Sprintf("model-%05d-of-00006.safetensors", i+1)
		layer := fmt.Sprintf("layers.%d.", i)
		tensors := []stored{
			{layer + "up.weight", tensor.BF16, tensor.Shape{700, 1009}, bf16(r)},
			{layer + "down.weight", tensor.F32, tensor.Shape{333, int64(101 + i)}, f32(r)},
			{layer + "norm.weight", tensor.BF16, tensor.Shape{1009}, bf16(r)},
		}
		writeFile(t, filepath.Join(dir, file), tensors...)
		for _, x := range tensors {
			weightMap[x.name] = file
		}
	}
	index, err := json.Marshal(map[string]any{"metadata": map[string]any{}, "weight_map": weightMap},
		json.Deterministic(true))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors.index.json"), index, 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"),
		[]byte(`{"model_type": "none_such", "torch_dtype": "bfloat16"}`), 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "LICENSE"), []byte("as you like"), 0o666))
}

// nf4 is what most tests ask for.
var nf4 = pipeline.Options{Quantize: "nf4", Params: block64double, MaxShardSize: 300_000}

func convert(ctx context.Context, src, dst string, o pipeline.Options, ro pipeline.RunOptions) (pipeline.Result,
	error) {
	c, err := checkpoint.Open(context.Background(), src)
	if err != nil {
		return pipeline.Result{}, err
	}
	defer c.Close()
	p, err := pipeline.NewPlan(ctx, pipeline.Plain(c), dst, o)
	if err != nil {
		return pipeline.Result{}, err
	}
	return pipeline.Run(ctx, p, pipeline.Plain(c), dst, ro)
}

// digest identifies a folder or file: names and bytes.
func digest(t testing.TB, path string) string {
	t.Helper()
	h := sha256.New()
	require.NoError(t, filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(path, p)
		fmt.Fprintln(h, rel)
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(h, f)
		return err
	}))
	return fmt.Sprintf("%x", h.Sum(nil))
}
