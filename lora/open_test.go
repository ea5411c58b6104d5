package lora

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
)

// fataler is what tests, fuzz tests and properties fail with.
type fataler interface {
	Helper()
	Errorf(format string, args ...any)
	FailNow()
}

const plainConfig = `{"peft_type": "LORA", "r": 2, "lora_alpha": 4}`

// writeFolder writes an adapter of float32 zeros with the given shapes.
func writeFolder(t fataler, dir, config string, shapes map[string][]int64) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(dir, configName), []byte(config), 0o644))
	header, end := map[string]any{}, int64(0)
	for _, name := range slices.Sorted(maps.Keys(shapes)) {
		n := int64(4)
		for _, d := range shapes[name] {
			n *= d
		}
		header[name] = map[string]any{"dtype": "F32", "shape": append([]int64{}, shapes[name]...),
			"data_offsets": []int64{end, end + n}}
		end += n
	}
	h, err := json.Marshal(header)
	require.NoError(t, err)
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(h))), h...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, adapterFiles[0]), append(b, make([]byte, end)...), 0o644))
}

// within reports whether all elements of a matrix lie in its tensor.
func within(m Matrix) bool {
	if m.T == nil || m.Rows == 0 || m.Cols == 0 {
		return true
	}
	return m.Offset+(m.Rows-1)*m.RowStride+(m.Cols-1)*m.ColStride < m.T.Count()
}

// checkOpened holds an adapter that could be read against what Open promises: no tensor is passed over but the copies
// that PEFT keeps, none is in two modules, and every module has the parts of its form.
func checkOpened(t fataler, a *Adapter) {
	t.Helper()
	taken := map[*formats.Tensor]bool{}
	names := map[string]bool{}
	for _, m := range a.Modules {
		require.NotEmpty(t, m.Name)
		own := []*formats.Tensor{m.A.T, m.B.T, m.Value, m.Magnitude}
		if m.made != nil {
			own = m.made
		}
		for _, x := range own {
			if x != nil {
				_, _, _, expert := splitExpert(m.Name)                                              // which in GGUF are in stacks
				require.False(t, taken[x] && !strings.Contains(x.Name, "vera_") && !expert, x.Name) // VeRA's are for all
				taken[x], names[x.Name] = true, true
			}
		}
		switch m.Form {
		case Linear, Embedding, Conv:
			require.NotNil(t, m.A.T)
			require.NotNil(t, m.B.T)
			require.True(t, within(m.A) && within(m.B))
			require.Equal(t, m.A.Rows, m.B.Cols)
			if a.Dialect == PEFT {
				require.Equal(t, a.Config.DoRA, m.Magnitude != nil)
			}
			if m.Rank != 0 { // not yet known of experts
				require.Equal(t, m.A.Rows, int64(m.Rank)*max(m.Experts, 1))
			}
		case Rows:
			require.Nil(t, m.A.T)
			require.Len(t, m.Indices, int(m.Value.Shape[0]))
		default:
			require.Nil(t, m.A.T)
			require.NotNil(t, m.Value)
		}
		for _, x := range m.Hadamard {
			require.True(t, within(x.Left) && within(x.Right))
			require.Positive(t, x.Row.Each)
			require.Positive(t, x.Col.Each)
		}
	}
	for _, x := range a.tensors {
		if (a.Dialect == Kohya || a.Dialect == Diffusers) && strings.HasSuffix(x.Name, ".alpha") {
			continue // it has been read
		}
		if pruned := a.Config.PeftType == adaLoRA && x.Count() == 0; !pruned &&
			!strings.Contains(x.Name, "lora_magnitude_vector") && !strings.Contains(x.Name, ".original_module.") &&
			!strings.Contains(x.Name, ".modules_to_save.") {
			require.True(t, names[x.Name], "%s is in no module", x.Name)
		}
	}
}

func checkError(t fataler, err error, dir string) {
	t.Helper()
	require.ErrorContains(t, err, dir)
	require.NotContains(t, err.Error(), "\n")
}

// FuzzOpen reads configs and keys that anyone may have written.
func FuzzOpen(f *testing.F) {
	for _, config := range []string{
		plainConfig, `{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": true}`,
		`{"peft_type": "LORA", "r": 2, "lora_bias": true}`,
		`{"peft_type": "LORA", "r": 2, "trainable_token_indices": [0, 1]}`,
		`{"peft_type": "LORA", "r": 2, "target_parameters": ["experts.down_proj"]}`,
		`{"peft_type": "ADALORA", "init_r": 2}`,
		`{"peft_type": "ADALORA", "init_r": 3, "rank_pattern": {"q.lora_E": [true, false, true]}}`,
		`{"peft_type": "LOHA", "r": 2, "alpha": 3}`,
		`{"peft_type": "LOKR", "r": 2, "alpha_pattern": {"q": 7}}`, `{"peft_type": "VERA", "r": 2}`,
		`{"peft_type": "IA3", "feedforward_modules": ["q"]}`, `{"peft_type": "OFT"}`,
		`{"peft_type": "LORA", "r": 1, "rank_pattern": {".*q": 2}, "alpha_pattern": {"^x$": 3}}`,
		`{"peft_type": "LORA", "r": 1e9}`, `[]`, ``,
	} {
		for _, key := range []string{
			"base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.default.weight", "q.lora_embedding_A",
			"q.lora_magnitude_vector",
			"q.base_layer.lora_A.weight", "q.token_adapter.trainable_tokens_delta", "q.modules_to_save.weight",
			"q.original_module.weight",
			"q.base_layer.weight", "q.lora_A", "q.lora_E", "q.hada_w1_a", "q.lokr_w1", "q.lokr_w2_a.default", "q.vera_lambda_b",
			"base_model.vera_A", "q.ia3_l", "lora_A.weight", ".lora_A.weight", "base_model.model.", ".base_layer.",
			".base_layer.lora_A", ".modules_to_save.weight", "q.lora_A.a.b.weight",
		} {
			f.Add([]byte(config), key, key[:len(key)/2], byte(2), byte(3))
		}
	}
	f.Fuzz(func(t *testing.T, config []byte, key, other string, rows, cols byte) {
		dir := t.TempDir()
		r, c := int64(rows%5), int64(cols%5)
		b := strings.NewReplacer("lora_A", "lora_B", "embedding_A", "embedding_B").Replace(key)
		shapes := map[string][]int64{}
		for name, shape := range map[string][]int64{key: {r, c}, other: {c}} {
			if name != "" {
				shapes[name] = shape
			}
		}
		if b != key {
			shapes[b] = []int64{c, r}
		}
		writeFolder(t, dir, string(config), shapes)
		a, err := Open(dir, OpenOptions{})
		if err != nil {
			checkError(t, err, dir)
			return
		}
		defer a.Close()
		checkOpened(t, a)
	})
}

// TestOpenTakesAll reads adapters of any mixture of parts, under any of the names that PEFT has given them, and finds
// each part.
func TestOpenTakesAll(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := filepath.Join(root, fmt.Sprint(n))
		require.NoError(t, os.Mkdir(dir, 0o755))
		prefix := rapid.SampledFrom([]string{"", peftPrefix}).Draw(t, "prefix")
		adapter := rapid.SampledFrom([]string{"", ".default", ".style-2"}).Draw(t, "adapter name")
		dora, bias := rapid.Bool().Draw(t, "dora"), rapid.Bool().Draw(t, "bias")
		r := rapid.Int64Range(1, 4).Draw(t, "rank")
		size := rapid.Int64Range(1, 5)
		shapes, modules := map[string][]int64{}, 0
		for i := range rapid.IntRange(1, 6).Draw(t, "modules") {
			at := fmt.Sprintf("%smodel.layers.%d.m", prefix, i)
			in, out := size.Draw(t, "in"), size.Draw(t, "out")
			modules++
			form := rapid.SampledFrom([]string{"linear", "conv", "embedding", "value"}).Draw(t, "form")
			switch form {
			case "linear":
				shapes[at+".lora_A"+adapter+".weight"], shapes[at+".lora_B"+adapter+".weight"] = []int64{r, in}, []int64{out, r}
				if bias {
					shapes[at+".lora_B"+adapter+".bias"] = []int64{out}
					modules++
				}
			case "conv":
				shapes[at+".lora_A"+adapter+".weight"], shapes[at+".lora_B"+adapter+".weight"] = []int64{r, in, 3, 2},
					[]int64{out, r, 1, 1}
				if bias {
					shapes[at+".lora_B"+adapter+".bias"] = []int64{out}
					modules++
				}
			case "embedding":
				shapes[at+".lora_embedding_A"+adapter], shapes[at+".lora_embedding_B"+adapter] = []int64{r, in}, []int64{out, r}
			case "value":
				shapes[at+".weight"], shapes[at+".bias"] = []int64{out, in}, []int64{out}
				modules++
			}
			if dora && form != "value" {
				shapes[at+".lora_magnitude_vector"+adapter] = []int64{out}
			}
		}
		writeFolder(t, dir, fmt.Sprintf(`{"peft_type": "LORA", "r": %d, "lora_alpha": 8, "use_dora": %v, "lora_bias": %v}`, r,
			dora, bias), shapes)
		a, err := Open(dir, OpenOptions{})
		require.NoError(t, err)
		defer a.Close()
		require.Len(t, a.Modules, modules)
		checkOpened(t, a)
		for _, m := range a.Modules {
			if m.Form != Replace {
				require.Equal(t, 8/float64(r), m.Scaling, m.String())
			}
		}

		// One tensor less, of a pair, is seen.
		for _, key := range slices.Sorted(maps.Keys(shapes)) {
			if strings.Contains(key, "lora_A") || strings.Contains(key, "lora_embedding_B") {
				delete(shapes, key)
				writeFolder(t, dir, fmt.Sprintf(`{"peft_type": "LORA", "r": %d, "lora_alpha": 8, "use_dora": %v, "lora_bias": %v}`,
					r, dora, bias), shapes)
				_, err := Open(dir, OpenOptions{})
				require.ErrorIs(t, err, ErrMalformed)
				checkError(t, err, dir)
				break
			}
		}
	})
}

// TestOpenBadFolder opens folders that hold no adapter, or one that is broken.
func TestOpenBadFolder(t *testing.T) {
	pair := map[string][]int64{"q.lora_A.weight": {2, 3}, "q.lora_B.weight": {3, 2}}
	for name, x := range map[string]struct {
		make func(t *testing.T, dir string)
		kind error
		says string
	}{
		"nothing there": {func(t *testing.T, dir string) { require.NoError(t, os.Remove(dir)) }, fs.ErrNotExist, ""},
		"a file": {func(t *testing.T, dir string) {
			require.NoError(t, os.Remove(dir))
			require.NoError(t, os.WriteFile(dir, []byte(plainConfig), 0o644))
		}, formats.ErrUnknown, "it is a JSON document"},
		"a file of nothing known": {func(t *testing.T, dir string) {
			require.NoError(t, os.Remove(dir))
			require.NoError(t, os.WriteFile(dir, []byte("\x01\x02\x03"), 0o644))
		}, ErrUnsupported, "a file that is neither safetensors nor of torch.save"},
		"a page in place of the config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, "<!doctype html>", pair)
		}, formats.ErrForeign, configName + ": malformed adapter: not a checkpoint: it is an HTML page"},
		"an answer in place of the config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, `{"error": "Access is restricted"}`, pair)
		}, formats.ErrForeign, `it is a JSON document ("Access is restricted"): a server has sent it`},
		"an array in place of the config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, `[1]`, pair)
		}, ErrMalformed, configName + ": malformed adapter: found array, expected a JSON object"},
		"bytes in place of the config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, "\xff\x00", pair)
		}, ErrMalformed, configName + ": malformed adapter: invalid character '\\xff'"},
		"a blank config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, "\n", pair)
		}, ErrMalformed, configName + ": malformed adapter: it is empty, expected a JSON object"},
		"a pointer in place of the tensors": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, pair)
			pointer := []byte("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 700\n")
			require.NoError(t, os.WriteFile(filepath.Join(dir, adapterFiles[0]), pointer, 0o644))
		}, formats.ErrForeign, adapterFiles[0] + ": not a checkpoint: it is a Git LFS pointer"},
		"an empty folder": {func(*testing.T, string) {}, ErrUnsupported, "there is no adapter_config.json"},
		"a config alone": {func(t *testing.T, dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, configName), []byte(plainConfig), 0o644))
		}, ErrMalformed, "adapter_model.safetensors"},
		"tensors alone": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, pair)
			require.NoError(t, os.Remove(filepath.Join(dir, configName)))
		}, ErrUnsupported, "there is no adapter_config.json"},
		"a huge config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, pair)
			require.NoError(t, os.Truncate(filepath.Join(dir, configName), maxConfigBytes+1))
		}, formats.ErrLimit, configName},
		"half a config": {func(t *testing.T, dir string) { writeFolder(t, dir, plainConfig[:20], pair) }, ErrMalformed,
			configName},
		"a deep config": {func(t *testing.T, dir string) {
			writeFolder(t, dir, `{"peft_type": "LORA", "r": 2, "x": `+strings.Repeat("[", 1<<20)+strings.Repeat("]", 1<<20)+`}`,
				pair)
		}, ErrMalformed, configName},
		"half a file": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, pair)
			require.NoError(t, os.Truncate(filepath.Join(dir, adapterFiles[0]), 60))
		}, formats.ErrMalformed, adapterFiles[0]},
		"a config that leads away": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, pair)
			away := filepath.Join(t.TempDir(), "away.json")
			require.NoError(t, os.Rename(filepath.Join(dir, configName), away))
			if err := os.Symlink(away, filepath.Join(dir, configName)); err != nil {
				t.Skipf("this system makes no links: %v", err)
			}
		}, nil, configName},
		"a convolution of groups": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"q.lora_A.weight": {4, 6, 3}, "q.lora_B.weight": {6, 2, 1}})
		}, ErrUnsupported, "a convolution of 2 groups"},
		"vectors for A and B": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"q.lora_A.weight": {2}, "q.lora_B.weight": {2}})
		}, ErrMalformed, "expected two matrices"},
		"a rank of 0": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"q.lora_A.weight": {0, 3}, "q.lora_B.weight": {3, 0}})
		}, ErrMalformed, "ranks differ or are 0"},
		"a wide kernel in B": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"q.lora_A.weight": {2, 3, 3, 3},
				"q.lora_B.weight": {3, 2, 3, 3}})
		}, ErrMalformed, "kernels of one element"},
		"no module": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"weight": {2}})
		}, ErrMalformed, "no module is named"},
		"a copy that differs": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"score.weight": {2}, "score.modules_to_save.weight": {3}})
		}, ErrMalformed, "differs from"},
		"negative tokens": {func(t *testing.T, dir string) {
			writeFolder(t, dir, `{"peft_type": "LORA", "r": 2, "trainable_token_indices": [-1]}`,
				map[string][]int64{"e.token_adapter.trainable_tokens_delta": {1, 2}})
		}, ErrMalformed, "-1"},
		"tokens that no one lists": {func(t *testing.T, dir string) {
			writeFolder(t, dir, plainConfig, map[string][]int64{"e.token_adapter.trainable_tokens_delta": {1, 2}})
		}, ErrMalformed, "trainable_token_indices"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "adapter")
			require.NoError(t, os.Mkdir(dir, 0o755))
			x.make(t, dir)
			_, err := Open(dir, OpenOptions{})
			require.Error(t, err)
			checkError(t, err, dir)
			require.ErrorContains(t, err, x.says)
			if x.kind != nil {
				require.ErrorIs(t, err, x.kind)
			}
		})
	}
}

// Errors name an adapter once, and always: also one whose name is the beginning of a word.
func TestNamed(t *testing.T) {
	err := errors.New("module m: lost")
	require.EqualError(t, (&Adapter{Path: "m"}).named(err), "m: module m: lost")
	for _, path := range []string{"some/adapter", "./some/adapter", "some/adapter/"} {
		a := &Adapter{Path: path}
		named := a.failed(&formats.Tensor{File: filepath.Join(path, "adapter_model.bin")}, err)
		require.Equal(t, named, a.named(named))
		require.Equal(t, a.named(err), a.named(a.named(err)))
	}
}

// A head that ensure_weight_tying ties has the embedding's rank, and the scaling of its own in the config: PEFT makes
// and loads such adapters.
func TestRankOfATiedHead(t *testing.T) {
	for config, says := range map[string]string{
		`"rank_pattern": {"embed_tokens": 2}, "ensure_weight_tying": true`: "",
		`"rank_pattern": {"embed_tokens": 2}`:                              `module "lm_head" has rank 2 in its tensors and 4`,
		`"rank_pattern": {"embed_tokens": 2, "lm_head": 8}`:                `module "lm_head" has rank 2 in its tensors and 8`,
	} {
		config = `{"peft_type": "LORA", "r": 4, "lora_alpha": 8, ` + config + `}`
		a, err := Open(folder(t, config, tieEnds("lm_head", embed, 6)), OpenOptions{})
		if says != "" {
			require.ErrorContains(t, err, says)
			continue
		}
		require.NoError(t, err)
		defer a.Close()
		for _, m := range a.Modules {
			require.Equal(t, 2, m.Rank)
			require.Equal(t, map[string]float64{"lm_head": 2, embed: 4}[m.Name], m.Scaling)
		}
		_, err = Open(folder(t, config, tieEnds("lm_head", "", 6)), OpenOptions{}) // it is tied to nothing
		require.ErrorContains(t, err, `module "lm_head" has rank 2 in its tensors and 4`)
	}
}
