package lorakit_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// putColumns puts the tensors of a module of random integers of 4 bits, with groups of 16, among others.
func putColumns(tensors map[string]entry, r *rand.Rand, method, module string, out, in int64) {
	add := func(part string, d tensor.DType, shape ...int64) []byte {
		info := tensor.Info{Name: module + "." + part, DType: d, Shape: shape}
		data := make([]byte, info.Count()*d.Bits()/8)
		for i := range data {
			data[i] = byte(r.Uint32())
			if d == tensor.F16 && i%2 == 1 {
				data[i] = data[i]&0x83 | 0x24 // about 1/64
			}
		}
		tensors[info.Name] = entry{info, data}
		return data
	}
	groups := (in + 15) / 16
	add("scales", tensor.F16, groups, out)
	add("qzeros", tensor.I32, groups, (out+7)/8)
	if method == "awq" {
		add("qweight", tensor.I32, in, out/8)
		return
	}
	add("qweight", tensor.I32, (in+7)/8, out)
	index := add("g_idx", tensor.I32, in)
	for i := range int(in) {
		copy(index[4*i:], []byte{byte(r.IntN(int(groups))), 0, 0, 0})
	}
}

// writeColumns writes the tiny Llama with random integers of GPTQ, act-order, or of AWQ in its layers, where they fit.
func writeColumns(t *testing.T, dir, method string) (modules int) {
	t.Helper()
	src := baseOf("llama")
	r := rand.New(rand.NewPCG(7, 7))
	tensors := load(t, filepath.Join(src, "model.safetensors"))
	for name, x := range maps.Clone(tensors) {
		module, linear := strings.CutSuffix(name, "_proj.weight")
		if !linear || method == "awq" && x.Shape[0]%8 != 0 {
			continue
		}
		modules++
		delete(tensors, name)
		putColumns(tensors, r, method, module+"_proj", x.Shape[0], x.Shape[1])
	}
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeTensors(t, filepath.Join(dir, "model.safetensors"), tensors)
	config, err := os.ReadFile(filepath.Join(src, "config.json"))
	require.NoError(t, err)
	declared := strings.Replace(string(config), "{", fmt.Sprintf(`{
  "quantization_config": {"quant_method": "%s", "bits": 4, "group_size": 16, "desc_act": true},`, method), 1)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(declared), 0o666))
	return modules
}

// TestReadOnlyBase: a base in a type that is read only is merged as what it decodes to, all of it, and says so;
// without a change it stays what it is.
func TestReadOnlyBase(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"gptq", "awq"} {
		dir := t.TempDir()
		base, plain, want, got, same := filepath.Join(dir, "base"), filepath.Join(dir, "plain"), filepath.Join(dir, "want"),
			filepath.Join(dir, "got"), filepath.Join(dir, "same")
		modules := writeColumns(t, base, method)
		none := lorakit.ConvertOptions{Quantize: "none", DType: "f32"}
		r, err := lorakit.Convert(t.Context(), base, plain, none)
		require.NoError(t, err)
		require.Equal(t, []string{fmt.Sprintf("dequantised: %d weights", modules)}, r.Notices)
		config, err := os.ReadFile(filepath.Join(plain, "config.json"))
		require.NoError(t, err)
		require.NotContains(t, string(config), "quantization_config")

		adapters := []lorakit.Adapter{{Path: filepath.Join(adapterFixtures, "llama", "attention")}}
		_, err = lorakit.Merge(t.Context(), plain, adapters, want, none)
		require.NoError(t, err)
		for _, quantize := range []string{"none", "keep"} {
			got := got + quantize
			r, err := lorakit.Merge(t.Context(), base, adapters, got, lorakit.ConvertOptions{Quantize: quantize, DType: "f32"})
			require.NoError(t, err)
			sameFolder(t, want, got)
			said := strings.Join(r.Notices, "\n")
			assert.Contains(t, said, fmt.Sprintf("dequantised: %d weights", modules))
			assert.Equal(t, quantize == "keep", strings.Contains(said, method+" is read only"), said)
		}
		// In the type that it had, with what no one has asked to be changed.
		_, err = lorakit.Merge(t.Context(), base, adapters, got, lorakit.ConvertOptions{})
		require.NoError(t, err)
		for name, x := range load(t, got) {
			assert.Equal(t, tensor.BF16, x.DType, name)
		}

		_, err = lorakit.Convert(t.Context(), base, same, lorakit.ConvertOptions{})
		require.NoError(t, err)
		require.Equal(t, load(t, base), load(t, same))
		require.Equal(t, folder(t, base)["/config.json"], folder(t, same)["/config.json"])
		v, err := lorakit.Verify(t.Context(), base, lorakit.ReadOptions{})
		require.NoError(t, err)
		assert.Empty(t, v.Problems)
		_, err = lorakit.Convert(t.Context(), plain, filepath.Join(dir, "no"), lorakit.ConvertOptions{Quantize: method})
		require.ErrorIs(t, err, quant.ErrUnsupported)
		assert.NoDirExists(t, filepath.Join(dir, "no"))
		// On to another scheme, in one step or two.
		once, twice := filepath.Join(dir, "once"), filepath.Join(dir, "twice")
		_, err = lorakit.Convert(t.Context(), base, once, lorakit.ConvertOptions{Quantize: "nf4", DType: "f32"})
		require.NoError(t, err)
		_, err = lorakit.Convert(t.Context(), plain, twice, lorakit.ConvertOptions{Quantize: "nf4", DType: "f32"})
		require.NoError(t, err)
		require.Equal(t, load(t, twice), load(t, once))
	}
}

// TestColumnsUnnamed: integers of GPTQ beside a quantization_config without a quant_method are not taken for MLX's.
func TestColumnsUnnamed(t *testing.T) {
	t.Parallel()
	base := filepath.Join(t.TempDir(), "base")
	writeColumns(t, base, "gptq")
	path := filepath.Join(base, "config.json")
	config, err := os.ReadFile(path)
	require.NoError(t, err)
	unnamed := strings.Replace(string(config), `"quant_method": "gptq", `, "", 1)
	require.NotEqual(t, string(config), unnamed)
	require.NoError(t, os.WriteFile(path, []byte(unnamed), 0o666))
	_, err = lorakit.Convert(t.Context(), base, base+"+", lorakit.ConvertOptions{Quantize: "none"})
	require.ErrorContains(t, err, "stored as integers of GPTQ or AWQ, such as")
	require.ErrorContains(t, err, "quant_method")
}

// TestColumnsBeside: what AutoGPTQ and AutoAWQ have said in a file of its own is read where config.json says nothing.
// It goes along with the weights, and not with plain ones.
func TestColumnsBeside(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ method, file, says string }{
		{"gptq", "quantize_config.json", `{"bits": 4, "group_size": 16, "desc_act": true, "damp_percent": 0.01, "sym": false}`},
		{"gptq", "quantize_config.json", `{"bits": 4, "group_size": 16, "quant_method": "gptq", "checkpoint_format": "gptq"}`},
		{"awq", "quant_config.json", `{"zero_point": true, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}`},
		{"awq", "quantize_config.json", `{"bits": 4, "group_size": 16, "quant_method": "awq"}`},
	} {
		dir := t.TempDir()
		base, declared := filepath.Join(dir, "base"), filepath.Join(dir, "declared")
		writeColumns(t, base, c.method)
		require.NoError(t, os.CopyFS(declared, os.DirFS(base)))
		config, err := os.ReadFile(filepath.Join(baseOf("llama"), "config.json"))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(base, "config.json"), config, 0o666))
		require.NoError(t, os.WriteFile(filepath.Join(base, c.file), []byte(c.says), 0o666))
		for _, quantize := range []string{"none", "nf4"} {
			want, got := filepath.Join(dir, "want"+quantize), filepath.Join(dir, "got"+quantize)
			o := lorakit.ConvertOptions{Quantize: quantize}
			_, err = lorakit.Convert(t.Context(), declared, want, o)
			require.NoError(t, err)
			r, err := lorakit.Convert(t.Context(), base, got, o)
			require.NoError(t, err)
			require.True(t, reflect.DeepEqual(load(t, want), load(t, got)))
			assert.NoFileExists(t, filepath.Join(got, c.file))
			said := strings.Join(r.Notices, "\n")
			assert.Contains(t, said, "dequantised")
			assert.Contains(t, said, fmt.Sprintf("read as %s has it, as those of %q", c.file, c.method))
		}
		plain, err := os.ReadFile(filepath.Join(dir, "gotnone", "config.json"))
		require.NoError(t, err)
		assert.Equal(t, string(config), string(plain))
		same := filepath.Join(dir, "same")
		_, err = lorakit.Convert(t.Context(), base, same, lorakit.ConvertOptions{})
		require.NoError(t, err)
		require.Equal(t, load(t, base), load(t, same))
		for _, name := range []string{"/config.json", "/" + c.file} {
			assert.Equal(t, folder(t, base)[name], folder(t, same)[name], name)
		}
		// What contradicts the tensors, or is none, is refused by name.
		for says, wrong := range map[string]string{
			strings.Replace(c.says, "16", "32", 1):           "malformed quantised weight",
			`{"bits": 4, "bits": 4, "group_size": 16}`:       c.file,
			`{"bits": 4, "group_size": 16`:                   c.file,
			`{"w_bit": 4, "bits": 8, "q_group_size": 16}`:    `its w_bit is "4" and its bits "8", expected one number`,
			`{"bits": 4, "quant_method": 4}`:                 c.file + ": malformed: its quant_method is no string",
			`{"group_size": 16}`:                             "without a quantization_config",
			`{"bits": 4, "quant_method": "gptq_marlin_24"}`:  "sparse marlin",
			strings.Replace(c.says, `: 4`, `: 4.5`, 1):       "bits",
			strings.Replace(c.says, `{`, `{"bits": "x",`, 1): "",
		} {
			require.NoError(t, os.WriteFile(filepath.Join(base, c.file), []byte(says), 0o666))
			_, err = lorakit.Convert(t.Context(), base, filepath.Join(dir, "no"), lorakit.ConvertOptions{Quantize: "none"})
			require.ErrorContains(t, err, wrong, says)
			assert.NotContains(t, err.Error(), "\n")
			assert.NoDirExists(t, filepath.Join(dir, "no"))
		}
	}
}

// TestColumnsSameBytes: a weight that is read in several bands has the same bytes whatever the threads and the memory,
// plain and quantised again.
func TestColumnsSameBytes(t *testing.T) {
	const out, in = 6512, 2048
	for _, method := range []string{"gptq", "awq"} {
		tensors := map[string]entry{}
		putColumns(tensors, rand.New(rand.NewPCG(5, 6)), method, "m", out, in)
		dir := t.TempDir()
		base := filepath.Join(dir, "base")
		writeColumnsOf(t, base, method, `"model_type": "x"`, tensors)
		for _, quantize := range []string{"none", "nf4"} {
			first := filepath.Join(dir, quantize)
			for i, o := range []lorakit.ConvertOptions{{Threads: 2}, {Threads: 1, Memory: 90 << 20}} {
				o.Quantize, o.DType = quantize, "f32"
				if quantize == "nf4" {
					o.Include = []string{"*"}
				}
				to := first + strings.Repeat("+", i)
				_, err := lorakit.Convert(t.Context(), base, to, o)
				require.NoError(t, err)
				sameFolder(t, first, to)
			}
		}
	}
}

// TestColumnsConv1D: what a model has the other way round than a linear layer is turned round.
func TestColumnsConv1D(t *testing.T) {
	t.Parallel()
	const name, out, in = "transformer.h.0.mlp.c_fc", 1528, 400
	for _, method := range []string{"gptq", "awq"} {
		tensors := map[string]entry{}
		putColumns(tensors, rand.New(rand.NewPCG(5, 6)), method, name, out, in)
		dir := t.TempDir()
		plain := map[string]entry{}
		for path, model := range map[string]string{"linear": `"model_type": "x"`,
			"conv1d": `"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]`} {
			base, to := filepath.Join(dir, path), filepath.Join(dir, path+"-plain")
			writeColumnsOf(t, base, method, model, tensors)
			_, err := lorakit.Convert(t.Context(), base, to, lorakit.ConvertOptions{Quantize: "none", DType: "f32"})
			require.NoError(t, err)
			plain[path] = load(t, to)[name+".weight"]
		}
		require.Equal(t, tensor.Shape{out, in}, plain["linear"].Shape)
		require.Equal(t, tensor.Shape{in, out}, plain["conv1d"].Shape)
		turned := make([]byte, len(plain["linear"].data))
		tensor.Transpose(turned, plain["linear"].data, out, in, 4)
		require.True(t, string(turned) == string(plain["conv1d"].data))
	}
}

// writeColumnsOf writes a checkpoint of a model's tensors.
func writeColumnsOf(t *testing.T, dir, method, model string, tensors map[string]entry) {
	t.Helper()
	require.NoError(t, os.Mkdir(dir, 0o777))
	writeTensors(t, filepath.Join(dir, "model.safetensors"), tensors)
	config := fmt.Appendf(nil, `{"quantization_config": {"quant_method": "%s", "bits": 4, "group_size": 16}, %s}`, method,
		model)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o666))
}
