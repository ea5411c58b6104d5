package lora

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/pyregex"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// asIntegers makes the first n tensors of a file, in the order of names, integers.
func asIntegers(t *testing.T, path string, n int) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, bytes.Replace(b, []byte(`"F32"`), []byte(`"I32"`), n), 0o644))
}

// folder writes an adapter in a folder and returns its path.
func folder(t *testing.T, config string, shapes map[string][]int64) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, configName), []byte(config), 0o644))
	file := mlxFile
	if strings.Contains(config, "peft_type") {
		file = adapterFiles[0]
	}
	writeTensors(t, filepath.Join(dir, file), shapes)
	return dir
}

// A key of very many parts is taken apart in one pass.
func TestKeyOfManyParts(t *testing.T) {
	key := strings.Repeat("a.", 10_000) + "weight"
	require.Zero(t, testing.AllocsPerRun(3, func() { split(key) }))
}

// A pattern that is a name is matched without a regular expression, and as by one.
func TestPatternsThatAreNames(t *testing.T) {
	part := rapid.StringMatching(`[ab_]{0,2}`)
	rapid.Check(t, func(t *rapid.T) {
		write := func(dots ...string) string {
			var s strings.Builder
			for i := range rapid.IntRange(1, 4).Draw(t, "parts") {
				if i > 0 {
					s.WriteString(rapid.SampledFrom(dots).Draw(t, "dot"))
				}
				s.WriteString(part.Draw(t, "part"))
			}
			return s.String()
		}
		var keys []string
		var list patterns
		for i := range rapid.IntRange(1, 4).Draw(t, "patterns") {
			key := rapid.SampledFrom([]string{"", "^"}).Draw(t, "start") + write(".", `\.`)
			if !isName(key) {
				continue
			}
			keys = append(keys, key)
			list.add(pattern{key: key, value: float64(i)})
		}
		name, want := write("."), -1.0
		for i := len(keys) - 1; i >= 0; i-- {
			re, err := pyregex.Compile(`(.*\.)?(` + keys[i] + `)$`)
			require.NoError(t, err)
			if m, err := re.Match(name); err != nil || m != nil {
				require.NoError(t, err)
				want = list.list[i].value
			}
		}
		var c Config
		got, err := c.lookup("rank_pattern", list, name, -1)
		require.NoError(t, err)
		require.Equal(t, want, got, "%q on %q", keys, name)
	})
}

// An adapter may give each of very many modules a rank, as one that was resized by energy does.
func TestPatternOfEachModule(t *testing.T) {
	const n = 20_000
	var s strings.Builder
	name := func(i int) string { return fmt.Sprintf("model.layers.%d.q_proj", i) }
	for i := range n {
		fmt.Fprintf(&s, `%q: %d,`, exactly(name(i), nil), i+1)
	}
	c, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, "rank_pattern": {` + strings.TrimSuffix(s.String(), ",") +
		`}}`))
	require.NoError(t, err)
	for i := range n {
		r, err := c.lookup("rank_pattern", c.ranks, name(i), 0)
		require.NoError(t, err)
		require.Equal(t, float64(i+1), r)
	}
	require.Less(t, c.spent, allMatches)
}

// Regular expressions have a number of theirs, and one time for all.
func TestRegexesAreBounded(t *testing.T) {
	var s strings.Builder
	for i := range mostRegexes + 1 {
		fmt.Fprintf(&s, `"(%d)": 2,`, i)
	}
	_, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, "rank_pattern": {` + strings.TrimSuffix(s.String(), ",") +
		`}}`))
	require.ErrorContains(t, err, "more than 10000 regular expressions")

	c, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, "target_modules": "q|v"}`))
	require.NoError(t, err)
	c.spent = allMatches
	_, err = c.targeted("q")
	require.ErrorContains(t, err, `target_modules: malformed adapter: the regular expression "q|v" takes too long`)
}

func TestEmpty(t *testing.T) {
	for v, want := range map[string]bool{"": true, "null": true, "false": true, `""`: true, "[]": true, "[ ]": true,
		"{\n}": true,
		"true": false, "0": false, `"a"`: false, "[0]": false, `{"a": 1}`: false, "[[]]": false} {
		require.Equal(t, want, empty([]byte(v)), v)
	}
}

// What would be lost, or could mean two things, is refused where the adapter is opened.
func TestOpenRefusesTwoMeanings(t *testing.T) {
	pair := map[string][]int64{"base_model.model.q.lora_A.weight": {2, 3}, "base_model.model.q.lora_B.weight": {4, 2}}
	rows := map[string][]int64{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": {1, 4}}
	mlx := map[string][]int64{"q.lora_a": {3, 2}, "q.lora_b": {2, 4}}
	for _, c := range []struct {
		says, config string
		shapes       map[string][]int64
	}{
		{"target_parameters is \"true\", expected a list", `{"peft_type": "LORA", "r": 2, "target_parameters": true}`, pair},
		{"target_parameters is \"[1]\", expected a list", `{"peft_type": "LORA", "r": 2, "target_parameters": [1]}`, pair},
		{"one factor is that of an embedding", `{"peft_type": "LORA", "r": 2}`,
			map[string][]int64{"base_model.model.q.lora_A.weight": {2, 3}, "base_model.model.q.lora_embedding_B": {4, 2}}},
		{"both mean it, with other indices",
			`{"peft_type": "LORA", "r": 2, "trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}`, rows},
		{"scale in lora_parameters is \"null\"", `{"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": null}}`,
			mlx},
		{"has the alpha \"null\"", `{"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "alpha": null}}`, mlx},
		{"it has rank 2 in its tensors, and by lora_parameters it is 7",
			`{"fine_tune_type": "lora", "lora_parameters": {"rank": 7, "scale": 2}}`, mlx},
		{"at most 65536 experts", `{"fine_tune_type": "lora", "lora_parameters": {"scale": 2}}`,
			map[string][]int64{"x.switch_mlp.up_proj.lora_a": {65537, 1, 1}, "x.switch_mlp.up_proj.lora_b": {65537, 1, 1}}},
	} {
		dir := folder(t, c.config, c.shapes)
		_, err := Open(dir, OpenOptions{})
		require.ErrorContains(t, err, c.says, c.config)
		require.ErrorIs(t, err, ErrMalformed)
		checkError(t, err, dir)
	}
}

// Only linear layers can be stacks of experts: the rest has its rank at once.
func TestEmbeddingBesideExperts(t *testing.T) {
	a,
		err := Open(folder(t,
		`{"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}`,
		map[string][]int64{"base_model.model.embed.lora_embedding_A": {2, 3},
			"base_model.model.embed.lora_embedding_B": {4, 2}}), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	require.Equal(t, 4.0, a.Modules[0].Scaling)
}

func TestIntegers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.safetensors")
	shapes := map[string][]int64{"lora_te_x.alpha": {}, "lora_te_x.lora_down.weight": {2, 3},
		"lora_te_x.lora_up.weight": {4, 2}}
	writeTensors(t, path, shapes)
	asIntegers(t, path, 1)
	a, err := Open(path, OpenOptions{}) // sd-scripts stores the alpha that it was given
	require.NoError(t, err)
	require.Equal(t, float64(0x3f000000), a.Modules[0].Alpha)
	require.NoError(t, a.Close())

	asIntegers(t, path, 2)
	_, err = Open(path, OpenOptions{})
	require.ErrorIs(t, err, ErrMalformed)
	require.ErrorContains(t, err, "its type is I32, expected F32, F16, BF16 or F64")
	checkError(t, err, path)
}

// A few megabytes with one large rank do not become terabytes of zeros.
func TestPaddingIsBounded(t *testing.T) {
	factors := func(rank, in, out int64) *Module {
		shape := func(s ...int64) Matrix {
			return matrixOf(&formats.Tensor{Info: tensor.Info{DType: tensor.F32, Shape: s}})
		}
		return &Module{Name: "m", Param: "weight", A: shape(rank, in), B: shape(out, rank), Rank: int(rank), Scaling: 1}
	}
	require.NoError(t, paddable([]*Module{factors(8, 4096, 4096), factors(256, 4096, 4096)}, 256))
	require.ErrorIs(t, paddable([]*Module{factors(1, 1<<20, 1), factors(1<<20, 1, 1)}, 1<<20), ErrUnsupported)
	many := []*Module{factors(1<<12, 1, 1)}
	for range 1000 {
		many = append(many, factors(1, 1<<12, 1<<12))
	}
	require.ErrorIs(t, paddable(many, 1<<12), ErrUnsupported)
}

// An adapter whose start is named in another case is no plain one either.
func TestResidualInAnyCase(t *testing.T) {
	c, err := parseConfig([]byte(`{"peft_type": "LORA", "r": 4, "init_lora_weights": "OLoRA"}`))
	require.NoError(t, err)
	require.ErrorIs(t, c.plainBase(), ErrUnsupported)
}

// What an alpha is in float32 is written, so it has to be one.
func TestAlphaBeyondFloat32(t *testing.T) {
	a, err := Open(folder(t, `{"peft_type": "LORA", "r": 2, "lora_alpha": 1e300}`,
		map[string][]int64{"base_model.model.q.x.lora_A.weight": {2, 3}, "base_model.model.q.x.lora_B.weight": {4, 2}}),
		OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	for _, to := range []string{Kohya, LoRALib} {
		_, err = a.Encode(EncodeOptions{To: to})
		require.ErrorContains(t, err, "float32 cannot hold", to)
	}
}

// A name that another one ends in has a pattern that is for it alone, and one may have any characters.
func TestPatternsAreForOneName(t *testing.T) {
	shapes := map[string][]int64{"head.lora_a": {4, 1}, "head.lora_b": {1, 4}, "a(b.x.lora_a": {4, 3},
		"a(b.x.lora_b": {3, 4}}
	for _, name := range []string{"cls.head", "a.q", "b.q"} {
		shapes[name+".lora_a"], shapes[name+".lora_b"] = []int64{4, 2}, []int64{2, 4}
	}
	a, err := Open(folder(t, `{"fine_tune_type": "lora", "lora_parameters": {"scale": 2}}`, shapes), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	e, err := a.Encode(EncodeOptions{To: PEFT})
	require.NoError(t, err)
	c, err := parseConfig(e.Config)
	require.NoError(t, err)
	for _, m := range a.Modules {
		n := &Module{}
		require.NoError(t, c.scale(n, m.Name, int64(m.Rank)))
		require.Equal(t, m.Scaling, n.Scaling, m.Name)
	}
}

// Rows that were trained beside a copy of the base's own matrix go along with it; rows and a new value of
// two adapters do not go together.
func TestCarriedRows(t *testing.T) {
	const embed, config = "base_model.model.model.embed_tokens",
		`{"peft_type": "LORA", "r": 2, "trainable_token_indices": [1]}`
	open := func(shapes map[string][]int64) Weighted {
		a, err := Open(folder(t, config, shapes), OpenOptions{})
		require.NoError(t, err)
		t.Cleanup(func() { a.Close() })
		return Weighted{a, 1}
	}
	rows := open(map[string][]int64{embed + ".token_adapter.trainable_tokens_delta": {1, 4},
		embed + ".base_layer.weight": {10, 4}})
	list, _, err := Replacements([]Weighted{rows, rows})
	require.NoError(t, err)
	require.Len(t, list, 2)
	whole := open(map[string][]int64{embed + ".weight": {10, 4}})
	only := open(map[string][]int64{embed + ".token_adapter.trainable_tokens_delta": {1, 4}})
	_, _, err = Replacements([]Weighted{whole, only})
	require.ErrorIs(t, err, ErrBase)
}

// The end of a name of very many parts is looked for in one pass.
func TestEndOfManyParts(t *testing.T) {
	b := &binder{names: []string{"model.layers.0.q.weight"}, params: map[string]*parameter{}}
	b.params[b.names[0]] = &parameter{name: b.names[0]}
	require.Len(t, b.endingLike("wrapper.layers.0.q.weight"), 1)
	full := strings.Repeat("a.", 10_000) + "weight"
	require.Less(t, testing.AllocsPerRun(3, func() { b.endingLike(full) }), 10.0)
}

// A file of torch.save may say that a tensor is a few elements again and again: an adapter does not.
func TestExpandedTensors(t *testing.T) {
	const size = 2000
	of := func(bytes ...int64) *Adapter {
		a := &Adapter{Path: "a.pt"}
		for _, n := range bytes {
			a.tensors = append(a.tensors, formats.Tensor{Info: tensor.Info{Name: "q.lora_A"}, Bytes: n})
		}
		return a
	}
	expanded := func(a *Adapter) error { return a.expanded(size, a.tensors) }
	require.NoError(t, expanded(of(1000, 1000)))
	require.ErrorIs(t, expanded(of(8, 2<<30)), ErrMalformed)
	require.ErrorIs(t, expanded(of(1<<62, 1<<62)), ErrMalformed)
}

// Several adapters have files of one name: messages say of which it is.
func TestErrorsNameTheFolder(t *testing.T) {
	dir := folder(t, `{"peft_type": "LORA", "r": 2}`,
		map[string][]int64{"q.lora_A.weight": {2, 3}, "q.lora_B.weight": {4, 2}})
	file := filepath.Join(dir, "adapter_model.safetensors")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	copy(b[len(b)-4:], []byte{0, 0, 0xc0, 0x7f}) // NaN
	require.NoError(t, os.WriteFile(file, b, 0o644))
	a, err := Open(dir, OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	_, err = a.Modules[0].B.Read()
	require.ErrorIs(t, err, ErrMalformed)
	require.ErrorContains(t, err, file+`: tensor "q.lora_B.weight": malformed adapter: element 7 is NaN`)
}

// The ways to bind modules to the parameters of one stack are as many as a base makes them.
func TestBindingExpertsIsBounded(t *testing.T) {
	const n = 20
	c, err := models.ParseConfig([]byte(`{"architectures": ["Unknown"]}`))
	require.NoError(t, err)
	m, _ := models.Load(c)
	var targets []Target
	adapter := map[string][]int64{}
	for i := range n {
		name, shape := fmt.Sprintf("mlp.experts.w%d", i), tensor.Shape{3, 4, 5}
		targets = append(targets, Target{Name: name, Shape: shape, Role: m.Tensor(name, shape)})
		at := prefix + "mlp.experts." + strings.Repeat("base_layer.", i)
		adapter[at+"lora_A.weight"], adapter[at+"lora_B.weight"] = []int64{6, 5}, []int64{4, 6}
	}
	adapter[prefix+"mlp.experts.lora_A.weight"] = []int64{6, 7} // the last of them fits none
	a, err := Open(folder(t, `{"peft_type": "LORA", "r": 2, "target_parameters": ["w0"]}`, adapter), OpenOptions{})
	require.NoError(t, err)
	defer a.Close()
	start := time.Now()
	_, err = Bind([]Weighted{{a, 1}}, targets, m)
	require.ErrorIs(t, err, ErrBase)
	require.Less(t, time.Since(start), 10*time.Second)
}
