package lorakit_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/gguf"
	"github.com/lorakit/lorakit/ggml"
	"github.com/lorakit/lorakit/ggml/ggmltest"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// TestGGUFAsLlamaQuantize makes every file type of three models as llama-quantize makes it, or refuses what that does:
// keys, tensors and bytes.
func TestGGUFAsLlamaQuantize(t *testing.T) {
	for _, m := range ggmltest.Read(t, "fixtures/ggml/quantized.json.gz") {
		dir := t.TempDir()
		in := filepath.Join(dir, m.Name+".gguf")
		require.NoError(t, os.WriteFile(in, m.Bytes(t), 0o644))
		for _, f := range ggml.FileTypes() {
			t.Run(m.Name+"/"+f.String(), func(t *testing.T) {
				out := filepath.Join(t.TempDir(), "out.gguf")
				o := lorakit.ConvertOptions{Quantize: f.String()}
				if f == ggml.FileF32 || f == ggml.FileF16 || f == ggml.FileBF16 {
					o = lorakit.ConvertOptions{DType: f.String()}
				}
				_, err := lorakit.Convert(context.Background(), in, out, o)
				if reason := m.Refused(f); reason != "" {
					assert.Error(t, err, reason)
					assert.NoFileExists(t, out)
					return
				}
				require.NoError(t, err)
				checkQuantized(t, &m, f, out)
			})
		}
	}
}

func checkQuantized(t *testing.T, m *ggmltest.Model, f ggml.FileType, path string) {
	c, err := gguf.Format{}.Open(context.Background(), storage.Local(filepath.Dir(path), storage.Options{}),
		filepath.Base(path))
	require.NoError(t, err)
	defer c.Close()
	var keys []string
	for _, p := range c.Metadata() {
		keys = append(keys, p.Name)
		switch p.Name {
		case "general.file_type":
			assert.Equal(t, uint32(f), p.Value)
		case "general.quantization_version":
			assert.Equal(t, uint32(2), p.Value)
		}
	}
	assert.ElementsMatch(t, m.Keys, keys)
	stored := map[string]formats.Tensor{}
	for _, x := range c.Tensors() {
		stored[x.Name] = x
	}
	m.Check(t, f, func(name string) (ggml.Type, []byte) {
		x, ok := stored[name]
		require.True(t, ok, name)
		data, err := io.ReadAll(io.NewSectionReader(x, 0, x.Bytes))
		require.NoError(t, err)
		plain := map[tensor.DType]ggml.Type{tensor.F32: ggml.F32, tensor.F16: ggml.F16, tensor.BF16: ggml.BF16}
		if typ, ok := plain[x.DType]; ok {
			return typ, data
		}
		typ, err := ggml.Parse(x.Encoding.Name)
		require.NoError(t, err)
		return typ, data
	})
	assert.Len(t, stored, len(m.Order))
}
