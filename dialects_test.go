package lorakit_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// dialectFile is an adapter in the file of another tool, with the delta of one of PEFT's, or with its delta beside it.
type dialectFile struct {
	File    string
	Dialect string
	Base    string
	SameAs  string `json:"same_as"`
	Alpha   float64
	Delta   string
}

func dialectFiles(t *testing.T) map[string]dialectFile {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(adapterFixtures, "dialects", "results.json"))
	require.NoError(t, err)
	var all map[string]dialectFile
	require.NoError(t, json.Unmarshal(b, &all))
	require.Greater(t, len(all), 15)
	return all
}

func (d dialectFile) adapter() lorakit.Adapter {
	return lorakit.Adapter{Path: filepath.Join(adapterFixtures, "dialects", d.File), Alpha: d.Alpha}
}

// TestMergeDialects merges the files of other tools, and holds them against PEFT's merge of the adapter
// that they were made from.
func TestMergeDialects(t *testing.T) {
	t.Parallel()
	for name, d := range dialectFiles(t) {
		if d.SameAs == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := peftMerge{base: d.Base, adapters: []lorakit.Adapter{d.adapter()}, file: d.SameAs}
			asPEFT(t, m, "f32", t.TempDir(), lorakit.ConvertOptions{DType: "f32"})
		})
	}
}

// destination is a path that suits a dialect.
func destination(dir, dialect string) string {
	return filepath.Join(dir, "adapter"+map[string]string{"kohya": ".safetensors", "loralib": ".pt"}[dialect])
}

// loralibAlpha is the alpha that a conversion to loralib has told.
func loralibAlpha(t *testing.T, c *lorakit.AdapterConversion) float64 {
	t.Helper()
	var alpha float64
	last := c.Notices[len(c.Notices)-1]
	require.NoError(t, json.Unmarshal([]byte(last[strings.LastIndexByte(last, ' ')+1:]), &alpha), last)
	return alpha
}

// TestConvertAdapters takes every adapter of PEFT's that PEFT has merged into every other dialect, and merges what
// comes out: the delta is the same, or the dialect has no place for a part and says so.
func TestConvertAdapters(t *testing.T) {
	t.Parallel()
	var mutex sync.Mutex
	made := map[string]int{}
	count := func(what string) {
		mutex.Lock()
		defer mutex.Unlock()
		made[what]++
	}
	type way struct{ to, experts string }
	ways := []way{{"kohya", ""}, {"mlx", ""}, {"loralib", ""}, {"peft", "per-expert"}, {"peft", "fused"},
		{"kohya", "per-expert"}, {"loralib", "per-expert"}, {"mlx", "fused"}}
	for name, m := range peftMerges(t) {
		if len(m.adapters) != 1 || !slices.Contains(m.dtypes, "f32") || strings.HasSuffix(m.base, "-nf4") {
			continue
		}
		moe := strings.Contains(m.base, "mixtral") || strings.Contains(m.base, "moe")
		for _, w := range ways {
			// TestTiedEmbeddingOfMLX has that one
			if w.experts != "" && !moe || w.to == "mlx" && name == "tiny-qwen3/tied-embedding" {
				continue
			}
			t.Run(name+" to "+w.to+" "+w.experts, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				c, err := lorakit.ConvertAdapter(t.Context(), m.adapters[0], destination(dir, w.to),
					lorakit.AdapterOptions{To: w.to, Experts: w.experts})
				if err != nil {
					require.ErrorIs(t, err, lora.ErrUnsupported)
					require.NotContains(t, err.Error(), "\n")
					entries, err := os.ReadDir(dir)
					require.NoError(t, err)
					require.Empty(t, entries)
					return
				}
				count(w.to + " " + w.experts)
				converted := peftMerge{base: m.base, file: m.file, adapters: []lorakit.Adapter{{Path: c.Destination}}}
				if w.to == "loralib" {
					converted.adapters[0].Alpha = loralibAlpha(t, c)
				}
				asPEFT(t, converted, "f32", dir, lorakit.ConvertOptions{DType: "f32"})

				again := filepath.Join(dir, "again")
				_, err = lorakit.ConvertAdapter(t.Context(), converted.adapters[0], again, lorakit.AdapterOptions{To: "peft"})
				if w.to == "kohya" && err != nil { // without its base
					require.ErrorContains(t, err, "which underscores of its name are dots")
					return
				}
				require.NoError(t, err)
				count("and back " + w.to)
				converted.adapters = []lorakit.Adapter{{Path: again}}
				asPEFT(t, converted, "f32", filepath.Join(dir, "back"), lorakit.ConvertOptions{DType: "f32"})
			})
		}
	}
	t.Cleanup(func() {
		for _, w := range ways {
			require.Greater(t, made[w.to+" "+w.experts], 10, w)
			require.Greater(t, made["and back "+w.to], 10, w)
		}
	})
}

// fuse puts the tensors of single experts together as a file does that holds each stack in one.
func fuse(tensors map[string]entry) map[string]entry {
	out := map[string]entry{}
	type stack struct{ gate, up, down map[int]entry }
	stacks := map[string]*stack{}
	for name, e := range tensors {
		block, rest, ok := strings.Cut(name, ".experts.")
		if !ok {
			out[name] = e
			continue
		}
		s := stacks[block]
		if s == nil {
			s = &stack{map[int]entry{}, map[int]entry{}, map[int]entry{}}
			stacks[block] = s
		}
		number, proj, _ := strings.Cut(rest, ".")
		i, _ := strconv.Atoi(number)
		map[string]map[int]entry{"gate_proj.weight": s.gate, "up_proj.weight": s.up, "down_proj.weight": s.down}[proj][i] = e
	}
	for block, s := range stacks {
		up, down := entry{}, entry{}
		for i := range len(s.gate) {
			up.data = slices.Concat(up.data, s.gate[i].data, s.up[i].data)
			down.data = slices.Concat(down.data, s.down[i].data)
		}
		up.Info, down.Info = s.gate[0].Info, s.down[0].Info
		g, d := s.gate[0].Shape, s.down[0].Shape
		up.Shape, down.Shape = tensor.Shape{int64(len(s.gate)), 2 * g[0], g[1]}, tensor.Shape{int64(len(s.gate)), d[0], d[1]}
		out[block+".experts.gate_up_proj"], out[block+".experts.down_proj"] = up, down
	}
	return out
}

// TestMergeOntoFusedExperts merges adapters of experts, of every layout, onto a base whose file holds each
// stack of experts in one tensor.
func TestMergeOntoFusedExperts(t *testing.T) {
	t.Parallel()
	const base = "qwen3-moe"
	dir := t.TempDir()
	plain := cast(t, base, lorakit.ConvertOptions{DType: "f32"})
	fused := filepath.Join(dir, "base")
	require.NoError(t, os.Mkdir(fused, 0o777))
	writeTensors(t, filepath.Join(fused, "model.safetensors"), fuse(plain))
	config, err := os.ReadFile(filepath.Join(baseOf(base), "config.json"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(fused, "config.json"), config, 0o666))
	mlx := dialectFiles(t)["mlx-qwen3-moe"]
	for _, c := range []struct {
		adapter lorakit.Adapter
		file    string
	}{
		{lorakit.Adapter{Path: filepath.Join(adapterFixtures, "qwen3-moe/experts")}, "qwen3-moe/experts"},
		{lorakit.Adapter{Path: filepath.Join(adapterFixtures, "qwen3-moe/per-expert")}, "qwen3-moe/per-expert"},
		{mlx.adapter(), mlx.SameAs},
	} {
		out := filepath.Join(dir, filepath.Base(c.adapter.Path))
		r, err := lorakit.Merge(t.Context(), fused, []lorakit.Adapter{c.adapter}, out, lorakit.ConvertOptions{})
		require.NoError(t, err)
		require.InDelta(t, 1, r.Adapters[0].Kept, 1e-4)
		want := maps.Clone(plain)
		maps.Copy(want, load(t, filepath.Join(adapterFixtures, c.file+".merged-f32.safetensors")))
		got := load(t, out)
		for name, w := range fuse(want) {
			require.Equal(t, w.Shape, got[name].Shape, name)
			nearlyFloat32(t, name, w.data, got[name].data)
		}
	}
}

// TestMergedLinear merges loralib's MergedLinear, whose file does not tell which parts of c_attn it is for.
func TestMergedLinear(t *testing.T) {
	t.Parallel()
	d := dialectFiles(t)["loralib-merged-linear"]
	dir := t.TempDir()
	plain, out := filepath.Join(dir, "plain"), filepath.Join(dir, "out")
	_, err := lorakit.Convert(t.Context(), baseOf(d.Base), plain, lorakit.ConvertOptions{DType: "f32"})
	require.NoError(t, err)
	_, err = lorakit.Merge(t.Context(), baseOf(d.Base), []lorakit.Adapter{d.adapter()}, out,
		lorakit.ConvertOptions{DType: "f32"})
	require.NoError(t, err)
	base, got, shape := numbers(t, plain), numbers(t, out), shapes(t, plain)
	deltas := numbers(t, filepath.Join(adapterFixtures, "dialects", d.Delta))
	require.NotEmpty(t, deltas)
	for name, delta := range deltas {
		in, n := shape[name][0], shape[name][1] // Conv1D
		require.Len(t, delta, int(in*n))
		for i := range in {
			for j := range n {
				require.InDelta(t, base[name][i*n+j]+delta[j*in+i], got[name][i*n+j], 1e-6, name)
			}
		}
	}
}
