package train

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

const stepFixtures = "../fixtures/steps"

// stepResults are what torch, transformers and PEFT found; fixtures/generate/steps.py has made them.
type stepResults struct {
	Batches map[string]stepBatch
	Cases   map[string]stepCase
	Against map[string]struct {
		Base, Other, Batch string
		Loss               float64
		OtherLoss          float64 `json:"other_loss"`
		KL, Top1           float64
		Layers             []float64
	}
}

type stepBatch struct {
	IDs    [][]int `json:"input_ids"`
	Labels [][]int
}

type stepCase struct {
	Base, Batch string
	Steps       int
	Rate        float64 `json:"lr"`
	BZero       bool    `json:"b_zero"`
	DoRA        bool
	BaseLoss    float64 `json:"base_loss"`
	Losses      []float64
	LossAfter   float64 `json:"loss_after"`
	GradNorm    float64 `json:"grad_norm"`
	Trainable   int64   `json:"trainable_parameters"`
	Total       int64   `json:"total_parameters"`
}

func readStepResults(t testing.TB) (r stepResults) {
	b, err := os.ReadFile(filepath.Join(stepFixtures, "results.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &r))
	return r
}

func baseOf(name string) string { return filepath.Join(stepFixtures, "bases", name) }

// write writes the batch to a file.
func (b stepBatch) write(t testing.TB) string {
	var lines bytes.Buffer
	for i, ids := range b.IDs {
		row := map[string][]int{"input_ids": ids}
		if b.Labels != nil {
			row["labels"] = b.Labels[i]
		}
		require.NoError(t, json.NewEncoder(&lines).Encode(row))
	}
	return writeData(t, lines.String())
}

func writeData(t testing.TB, content string) string {
	path := filepath.Join(t.TempDir(), "batch.jsonl")
	require.NoError(t, os.WriteFile(path, []byte(content), 0o666))
	return path
}

// floatsOf reads all tensors of a file.
func floatsOf(t testing.TB, path string) (map[string][]float32, map[string]tensor.Shape) {
	values, shapes := map[string][]float32{}, map[string]tensor.Shape{}
	for name, x := range contents(t, path) {
		v, err := lora.Floats(&x)
		require.NoError(t, err)
		values[name], shapes[name] = v, x.Shape
	}
	return values, shapes
}

// TestStepsAsPEFT holds whole steps to those of torch, transformers and PEFT: the loss of each step, every gradient of
// the first, the adapter after the last, the counts, and that nothing frozen has changed.
func TestStepsAsPEFT(t *testing.T) {
	results := readStepResults(t)
	require.Greater(t, len(results.Cases), 80)
	for name, want := range results.Cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want.check(t, filepath.Join(stepFixtures, name), results.Batches[want.Batch].write(t))
		})
	}
}

// TestPairsAsTransformers holds comparisons of a base with another.
func TestPairsAsTransformers(t *testing.T) {
	results := readStepResults(t)
	require.NotEmpty(t, results.Against)
	for name, want := range results.Against {
		t.Run(name, func(t *testing.T) {
			r, err := Validate(t.Context(), baseOf(want.Base), Options{
				Data: results.Batches[want.Batch].write(t), Against: baseOf(want.Other), Threads: 2,
			})
			require.NoError(t, err)
			require.InEpsilon(t, want.Loss, r.LossBefore, 1e-5)
			require.InEpsilon(t, want.Loss, r.Against.Loss, 1e-5)
			require.InEpsilon(t, want.OtherLoss, r.Against.OtherLoss, 1e-5)
			require.InEpsilon(t, want.KL, r.Against.KL, 1e-3)
			require.InDelta(t, want.Top1, r.Against.Top1, 1e-9)
			require.Len(t, r.Against.Layers, len(want.Layers))
			for i, l := range r.Against.Layers {
				require.Equal(t, i, l.Layer)
				require.InEpsilon(t, want.Layers[i], l.RelativeError, 1e-4)
			}
		})
	}
}

// check compares one case, whose adapter is in folder and whose gradients and stepped tensors are in the file of that
// name.
func (want stepCase) check(t *testing.T, folder, data string) {
	dir := t.TempDir()
	saved, gradients := filepath.Join(dir, "saved"), filepath.Join(dir, "gradients.safetensors")
	r, err := Validate(t.Context(), baseOf(want.Base), Options{
		Data: data, Adapter: folder, Steps: want.Steps, Rate: want.Rate, Save: saved, SaveGradients: gradients, Threads: 2,
	})
	require.NoError(t, err)
	require.Len(t, r.Losses, want.Steps)
	for i, loss := range want.Losses {
		require.InEpsilon(t, loss, r.Losses[i], 1e-5, "step %d", i)
	}
	require.Equal(t, r.Losses[0], r.LossBefore)
	require.InEpsilon(t, want.LossAfter, *r.LossAfter, 1e-5)
	require.InEpsilon(t, want.GradNorm, *r.GradNorm, 1e-5)
	require.Equal(t, want.Trainable, r.TrainableParameters)
	require.Equal(t, want.Total, r.TotalParameters)
	require.True(t, *r.FrozenUnchanged)

	base, err := Validate(t.Context(), baseOf(want.Base), Options{Data: data, Threads: 2})
	require.NoError(t, err)
	require.InEpsilon(t, want.BaseLoss, base.LossBefore, 1e-5)
	require.Equal(t, want.Total-want.Trainable, base.TotalParameters)
	switch {
	case want.BZero && want.DoRA:
		require.InEpsilon(t, base.LossBefore, r.LossBefore, 1e-6)
	case want.BZero:
		require.Equal(t, base.LossBefore, r.LossBefore)
	default:
		require.NotEqual(t, base.LossBefore, r.LossBefore)
	}

	expected, shapes := floatsOf(t, folder+".safetensors")
	slopes, slopeShapes := floatsOf(t, gradients)
	file, fileShapes := floatsOf(t, filepath.Join(folder, adapterTensors))
	now, nowShapes := floatsOf(t, filepath.Join(saved, adapterTensors))
	require.Equal(t, fileShapes, nowShapes)
	trained := 0
	for name, was := range file {
		slope, ok := expected["gradient."+name]
		if !ok {
			require.Contains(t, name, ".base_layer.")
			require.NotContains(t, slopes, name)
			require.Equal(t, was, now[name], name)
			continue
		}
		trained++
		require.Equal(t, shapes["gradient."+name], slopeShapes[name])
		require.LessOrEqual(t, distance(slopes[name], slope, nil), 1e-4*rms(slope)+1e-9*want.GradNorm, name)
		stepped, counts := expected["stepped."+name], countingElements(slope, shapes["gradient."+name])
		require.LessOrEqual(t, distance(now[name], stepped, counts), 1e-4*want.Rate+1.5e-7*rms(stepped), name)
		for i, x := range now[name] {
			require.InDelta(t, stepped[i], x, 2.1*want.Rate*float64(want.Steps), name)
		}
	}
	require.Len(t, slopes, trained)
	require.Len(t, expected, 2*trained)
}

// distance is the root of the mean square of the difference of two tensors, over the elements that count.
func distance(x, y []float32, counts []bool) float64 {
	sum, n := 0.0, 0.0
	for i := range x {
		if counts == nil || counts[i] {
			d := float64(x[i]) - float64(y[i])
			sum, n = sum+d*d, n+1
		}
	}
	return math.Sqrt(sum / max(n, 1))
}

// countingElements are those whose step is well defined. Adam divides by the gradient's size, so a gradient that is
// close to nothing beside those of its tensor, and not zero with all of its row or column, steps by its noise.
func countingElements(slope []float32, shape tensor.Shape) []bool {
	counts := make([]bool, len(slope))
	least := 1e-3 * rms(slope)
	cols := int(shape[len(shape)-1])
	if len(shape) == 1 {
		cols = len(slope)
	}
	zeroRow, zeroCol := slices.Repeat([]bool{true}, len(slope)/cols), slices.Repeat([]bool{true}, cols)
	for i, g := range slope {
		if g != 0 {
			zeroRow[i/cols], zeroCol[i%cols] = false, false
		}
	}
	for i, g := range slope {
		still := zeroRow[i/cols] || len(shape) == 2 && zeroCol[i%cols]
		counts[i] = math.Abs(float64(g)) > least || still
	}
	return counts
}
