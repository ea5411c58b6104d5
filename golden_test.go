package lorakit_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/tensor"
)

// facts is what fixtures/results.json says of a checkpoint.
type facts struct {
	Exclude  string              `json:"exclude"`
	Variants map[string]struct{} `json:"variants"`
}

// variants are the folders in fixtures/expected, and how lorakit is asked for the same.
var variants = map[string]lorakit.ConvertOptions{
	"nf4":         {Quantize: "nf4"},
	"nf4-dq":      {Quantize: "nf4", DoubleQuant: true},
	"nf4-dq-skip": {Quantize: "nf4", DoubleQuant: true},
	"fp4-dq":      {Quantize: "fp4", DoubleQuant: true},
	"int8":        {Quantize: "int8"},
}

// expectedFolders lists the folders of fixtures/expected as checkpoint and variant.
func expectedFolders(t *testing.T) [][2]string {
	t.Helper()
	paths, err := filepath.Glob("fixtures/expected/*/*/model.safetensors")
	require.NoError(t, err)
	var all [][2]string
	for _, p := range paths {
		dir := filepath.Dir(p)
		all = append(all, [2]string{filepath.Base(filepath.Dir(dir)), filepath.Base(dir)})
	}
	require.Greater(t, len(all), 25)
	return all
}

// TestGolden holds what lorakit makes of the fixtures against what transformers and bitsandbytes make of them.
func TestGolden(t *testing.T) {
	t.Parallel()
	results := readResults(t)
	for _, e := range expectedFolders(t) {
		checkpoint, variant := e[0], e[1]
		o, ok := variants[variant]
		if !ok {
			continue // another quant_storage: TestWayBack reads it
		}
		t.Run(checkpoint+"/"+variant, func(t *testing.T) {
			t.Parallel()
			if variant == "nf4-dq-skip" {
				o.Exclude = []string{results[checkpoint].Exclude + "*"}
			}
			want := filepath.Join("fixtures/expected", checkpoint, variant)
			got := filepath.Join(t.TempDir(), "out")
			_, err := lorakit.Convert(context.Background(), filepath.Join("fixtures", checkpoint), got, o)
			require.NoError(t, err)

			gotTensors, wantTensors := load(t, got), load(t, want)
			statistics := map[string]entry{}
			if path := filepath.Join("fixtures/expected", checkpoint, "nf4-dq.statistics.safetensors"); variant == "nf4-dq" {
				statistics = load(t, path)
				require.NotEmpty(t, statistics)
			}
			assert.Equal(t, names(wantTensors), names(gotTensors))
			for name, w := range wantTensors {
				g := gotTensors[name]
				require.Equal(t, w.DType, g.DType, name)
				switch {
				case strings.Contains(name, ".quant_state."):
					sameState(t, name, w.data, g.data)
				case isCoarse(name, w):
					// Where the generic backend's numbers are at hand, they are equal bit for bit.
					if s, ok := statistics[name]; ok {
						assert.True(t, bytes.Equal(s.data, g.data), "%s differs from bitsandbytes' generic backend", name)
						continue
					}
					nearly(t, name, w, g)
				default:
					assert.Equal(t, w.Shape, g.Shape, name)
					assert.True(t, bytes.Equal(w.data, g.data), "%s differs", name)
				}
			}
			sameConfig(t, filepath.Join("fixtures", checkpoint), want, got)
		})
	}
}

// TestWayBack dequantises what bitsandbytes saved, and what lorakit makes itself.
func TestWayBack(t *testing.T) {
	t.Parallel()
	n := 0
	for _, e := range expectedFolders(t) {
		checkpoint, variant := e[0], e[1]
		base := variant
		if strings.HasPrefix(variant, "nf4-dq-storage") {
			base = "nf4-dq"
		}
		path := filepath.Join("fixtures/expected", checkpoint, base+".dequantized.safetensors")
		if _, err := os.Stat(path); err != nil {
			continue
		}
		n++
		t.Run(checkpoint+"/"+variant, func(t *testing.T) {
			t.Parallel()
			o := lorakit.ConvertOptions{Quantize: "none"}
			if variant == "int8" {
				o.DType = "f32"
			}
			out := filepath.Join(t.TempDir(), "out")
			_, err := lorakit.Convert(context.Background(), filepath.Join("fixtures/expected", checkpoint, variant), out, o)
			require.NoError(t, err)
			got, want := load(t, out), load(t, path)
			require.NotEmpty(t, want)
			for name, w := range want {
				g, ok := got[name]
				require.True(t, ok, name)
				require.Equal(t, w.DType, g.DType, name)
				require.Equal(t, w.Shape, g.Shape, name)
				assert.True(t, bytes.Equal(plusZero(w), plusZero(g)), "%s differs", name)
			}
			config, err := os.ReadFile(filepath.Join(out, "config.json"))
			require.NoError(t, err)
			assert.NotContains(t, string(config), "quantization_config")
			source := load(t, filepath.Join("fixtures", checkpoint))
			assert.Equal(t, names(source), names(got), "the plain checkpoint has the tensors of the source")
		})
	}
	require.Greater(t, n, 8)
}

// isCoarse reports whether a tensor is a statistic that bitsandbytes' CPU kernel looks up coarsely, or sums in an
// order of its own.
func isCoarse(name string, e entry) bool {
	return strings.HasSuffix(name, ".absmax") && e.DType == tensor.U8 || strings.HasSuffix(name, ".nested_absmax")
}

func nearly(t *testing.T, name string, w, g entry) {
	t.Helper()
	require.Equal(t, len(w.data), len(g.data), name)
	if strings.HasSuffix(name, ".nested_absmax") {
		for i := 0; i < len(w.data); i += 4 {
			a, b := math.Float32frombits(binary.LittleEndian.Uint32(w.data[i:])),
				math.Float32frombits(binary.LittleEndian.Uint32(g.data[i:]))
			assert.InEpsilon(t, a, b, 1e-5, name)
		}
		return
	}
	far := 0
	for i := range w.data {
		if d := int(w.data[i]) - int(g.data[i]); d > 4 || d < -4 {
			far++
		}
	}
	assert.LessOrEqual(t, far, len(w.data)/50, name)
}

// sameState compares two quant_states as JSON; the offset is a mean whose order of summation differs.
func sameState(t *testing.T, name string, want, got []byte) {
	t.Helper()
	var w, g map[string]any
	require.NoError(t, json.Unmarshal(want, &w), name)
	require.NoError(t, json.Unmarshal(got, &g), name)
	if offset, ok := w["nested_offset"].(float64); ok {
		assert.InDelta(t, offset, g["nested_offset"], 1e-6, name)
		delete(w, "nested_offset")
		delete(g, "nested_offset")
	}
	assert.Equal(t, w, g, name)
}

// sameConfig compares the quantization_config with what transformers writes, and all else with the source.
func sameConfig(t *testing.T, source, want, got string) {
	t.Helper()
	read := func(dir string) (config, quantization map[string]any) {
		b, err := os.ReadFile(filepath.Join(dir, "config.json"))
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(b, &config))
		quantization, _ = config["quantization_config"].(map[string]any)
		delete(config, "quantization_config")
		delete(quantization, "bnb_4bit_compute_dtype") // how it was asked for, not what was made
		if skip, ok := quantization["llm_int8_skip_modules"].([]any); ok {
			slices.SortFunc(skip, func(a, b any) int { return strings.Compare(a.(string), b.(string)) })
		}
		return config, quantization
	}
	_, wantQuantization := read(want)
	gotConfig, gotQuantization := read(got)
	sourceConfig, _ := read(source)
	require.NotEmpty(t, wantQuantization)
	assert.Equal(t, wantQuantization, gotQuantization)
	assert.Equal(t, sourceConfig, gotConfig)
}

// plusZero makes +0 of -0, which FP4's index 8 decodes to in some of bitsandbytes' paths.
func plusZero(e entry) []byte {
	b := bytes.Clone(e.data)
	width := int(e.DType.Bits() / 8)
	for i := 0; i+width <= len(b); i += width {
		if b[i+width-1] == 0x80 && len(bytes.Trim(b[i:i+width-1], "\x00")) == 0 {
			b[i+width-1] = 0
		}
	}
	return b
}

// entry is a tensor with its bytes.
type entry struct {
	tensor.Info
	data []byte
}

func load(t *testing.T, path string) map[string]entry {
	t.Helper()
	c := opened(t, path)
	all := map[string]entry{}
	for _, x := range c.Tensors() {
		b := make([]byte, x.Bytes)
		if len(b) > 0 {
			_, err := x.Data.ReadAt(b, x.Offset)
			require.NoError(t, err)
		}
		all[x.Name] = entry{x.Info, b}
	}
	return all
}

func names(m map[string]entry) []string {
	var all []string
	for n := range m {
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}

func readResults(t *testing.T) map[string]facts {
	t.Helper()
	b, err := os.ReadFile("fixtures/results.json")
	require.NoError(t, err)
	var r struct {
		Checkpoints map[string]facts `json:"checkpoints"`
	}
	require.NoError(t, json.Unmarshal(b, &r))
	require.NotEmpty(t, r.Checkpoints)
	return r.Checkpoints
}
