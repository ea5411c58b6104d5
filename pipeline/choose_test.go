package pipeline_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

func TestNotFinite(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "a.safetensors")
	r := rand.New(rand.NewPCG(5, 6))
	spoilt := func(at int64, bits uint16) fill {
		return func(n int64) []byte {
			b := bf16(r)(n)
			binary.LittleEndian.PutUint16(b[2*at:], bits)
			return b
		}
	}
	for _, typ := range []string{"nf4", "fp4", "int8"} {
		for _, bits := range []uint16{0x7fc0, 0xff81, 0x7f80, 0xff80} {
			writeFile(t, src, stored{"a.weight", tensor.BF16, tensor.Shape{600, 700}, spoilt(555*700+13, bits)})
			dst := filepath.Join(dir, "b.safetensors")
			o := pipeline.Options{Quantize: typ, Params: block64double, Include: []string{"*"}}
			_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
			var bad *quant.NonFiniteError
			require.ErrorAs(t, err, &bad, "%s %x", typ, bits)
			assert.EqualValues(t, 555*700+13, bad.Index)
			assert.Contains(t, err.Error(), `tensor "a.weight"`)
			assert.Contains(t, err.Error(), "[555, 13]")
			assert.NoFileExists(t, dst)
			o.AllowNonFinite = true
			_, err = convert(context.Background(), src, dst, o, pipeline.RunOptions{})
			require.NoError(t, err)
			require.NoError(t, os.Remove(dst))
		}
	}
	writeFile(t, src, stored{"a.weight", tensor.BF16, tensor.Shape{8, 8}, spoilt(9, 0x4780)}) // 65536: no float16
	_, err := convert(context.Background(), src, filepath.Join(dir, "b.safetensors"),
		pipeline.Options{Quantize: "int8", Include: []string{"*"}}, pipeline.RunOptions{})
	require.ErrorContains(t, err, "65504")
}

func TestWhatCannotBeQuantised(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors")
	r := rand.New(rand.NewPCG(7, 8))
	bytesOf := func(width int64) fill { return func(n int64) []byte { return make([]byte, n*width) } }
	all := pipeline.Options{Quantize: "nf4", Params: block64double, Include: []string{"*"}}

	t.Run("integers and nothing stay", func(t *testing.T) {
		writeFile(t, src,
			stored{"w", tensor.F32, tensor.Shape{3, 5, 7}, f32(r)},
			stored{"scalar", tensor.F32, tensor.Shape{}, f32(r)},
			stored{"ids", tensor.I64, tensor.Shape{4}, bytesOf(8)},
			stored{"none", tensor.BF16, tensor.Shape{0, 5}, bytesOf(2)})
		_, err := convert(context.Background(), src, dst, all, pipeline.RunOptions{})
		require.NoError(t, err)
		c, err := checkpoint.Open(context.Background(), dst)
		require.NoError(t, err)
		defer c.Close()
		how := map[string]string{}
		for _, w := range c.Weights {
			how[w.Name] = fmt.Sprint(w.DType, w.Shape, w.Decoder != nil)
		}
		assert.Equal(t, map[string]string{"w": "F32 [3, 5, 7] true", "scalar": "F32 [] true", "ids": "I64 [4] false",
			"none": "BF16 [0, 5] false"}, how)
	})
	t.Run("other floats are refused", func(t *testing.T) {
		writeFile(t, src, stored{"w", tensor.F8E4M3, tensor.Shape{8, 8}, bytesOf(1)})
		_, err := convert(context.Background(), src, dst, all, pipeline.RunOptions{Force: true})
		require.ErrorIs(t, err, quant.ErrUnsupported)
		assert.Contains(t, err.Error(), "F8_E4M3")
	})
	t.Run("a glob that matches nothing", func(t *testing.T) {
		o := all
		o.Include = []string{"w", "x.*"}
		_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{Force: true})
		require.ErrorContains(t, err, `"x.*" matches none`)
	})
}

func TestGlobCrossesDots(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "a.safetensors")
	r := rand.New(rand.NewPCG(9, 9))
	names := []string{"model.layers.0.up.weight", "model.layers.10.up.weight", "model.layers.1.down.weight", "up"}
	var all []stored
	for _, n := range names {
		all = append(all, stored{n, tensor.F32, tensor.Shape{4, 4}, f32(r)})
	}
	writeFile(t, src, all...)
	for glob, want := range map[string][]string{
		"*":                      names,
		"*.up.weight":            names[:2],
		"model.layers.?.*":       {names[0], names[2]},
		"*up*":                   {names[0], names[1], names[3]},
		"model.layers.0.up.weig": nil,
		"*1*.weight":             names[1:3],
	} {
		c, err := checkpoint.Open(context.Background(), src)
		require.NoError(t, err)
		p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), "x.safetensors",
			pipeline.Options{Quantize: "nf4", Params: block64, Include: []string{glob}})
		c.Close()
		if want == nil {
			require.Error(t, err)
			continue
		}
		require.NoError(t, err)
		var got []string
		for _, j := range p.Shards[0].Jobs {
			if j.Encode != nil {
				got = append(got, j.Weight)
			}
		}
		assert.ElementsMatch(t, want, got, glob)
	}
}

func TestConfigThatIsNoFile(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	config := filepath.Join(src, "config.json")
	require.NoError(t, os.Remove(config))
	require.NoError(t, os.Mkdir(config, 0o777))
	_, err := checkpoint.Open(context.Background(), src)
	require.ErrorIs(t, err, storage.ErrNotRegular)
}

// TestForeignScheme leaves weights alone that are stored as something that is not read here.
func TestForeignScheme(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
	writeModel(t, src)
	for config, says := range map[string]string{
		`{"quantization_config": {"quant_method": "gptq"}}`: `stored as "gptq", expected`,
		// As mlx-lm writes it, and its older versions, of a kind that it did not have.
		`{"quantization": {"group_size": 64, "bits": 4, "mode": "fp3"}, "quantization_config": {"group_size": 64, "bits": 4,
			"mode": "fp3"}}`: `stored as MLX's "fp3" quantisation of 4 bits, expected`,
		`{"quantization": {"group_size": 32, "bits": 8, "mode": "fp3", "lm_head": false}}`: `stored as MLX's "fp3" ` +
			"quantisation of 8 bits, expected",
		`{"quantization_config": {}}`: "stored as a scheme that its quantization_config does " +
			"not name, expected",
		`{"quantization_config": {"group_size": 1, "bits": "4"}}`: "stored as a scheme that its quantization_config does " +
			"not name, expected",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(src, "config.json"), []byte(config), 0o666))
		for _, o := range []pipeline.Options{{Quantize: "nf4", Params: block64}, {Quantize: "none"},
			{Quantize: "keep", DType: tensor.BF16}} {
			_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
			require.ErrorIs(t, err, pipeline.ErrRefused, config)
			assert.ErrorContains(t, err, says)
			assert.ErrorContains(t, err, "bitsandbytes")
		}
	}
	_, err := convert(context.Background(), src, dst, pipeline.Options{Quantize: "keep"}, pipeline.RunOptions{})
	require.NoError(t, err)
}

// TestSkipListIsNeverNullByChance quantises everything there is: a null list would leave the loader to its own choice.
func TestSkipListIsNeverNullByChance(t *testing.T) {
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "dst")
	writeModel(t, src)
	o := nf4
	o.Include = []string{"*.weight"}
	_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
	require.NoError(t, err)
	b, err := os.ReadFile(filepath.Join(dst, "config.json"))
	require.NoError(t, err)
	assert.Contains(t, string(b), `"llm_int8_skip_modules": []`)
}
