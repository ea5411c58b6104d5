package train

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// rawTensor is a tensor of a safetensors file.
type rawTensor struct {
	DType string   `json:"dtype"`
	Shape []int    `json:"shape"`
	Range [2]int64 `json:"data_offsets"`
	data  []byte
}

func readRaw(t testing.TB, path string) map[string]rawTensor {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	n := binary.LittleEndian.Uint64(b)
	var header map[string]json.RawMessage
	require.NoError(t, json.Unmarshal(b[8:8+n], &header))
	delete(header, "__metadata__")
	all := map[string]rawTensor{}
	for name, v := range header {
		var x rawTensor
		require.NoError(t, json.Unmarshal(v, &x))
		x.data = b[8+n:][x.Range[0]:x.Range[1]]
		all[name] = x
	}
	return all
}

func writeRaw(t testing.TB, path string, tensors map[string]rawTensor) {
	var data []byte
	header := map[string]rawTensor{}
	for _, name := range slices.Sorted(maps.Keys(tensors)) {
		x := tensors[name]
		x.Range = [2]int64{int64(len(data)), int64(len(data) + len(x.data))}
		data, header[name] = append(data, x.data...), x
	}
	b, err := json.Marshal(header)
	require.NoError(t, err)
	file := append(binary.LittleEndian.AppendUint64(nil, uint64(len(b))), b...)
	require.NoError(t, os.WriteFile(path, append(file, data...), 0o666))
}

// widened is the same values in float32.
func (x rawTensor) widened(t testing.TB) rawTensor {
	if x.DType == "F32" {
		return x
	}
	require.Equal(t, "BF16", x.DType)
	var data []byte
	for i := 0; i < len(x.data); i += 2 {
		data = append(data, 0, 0, x.data[i], x.data[i+1])
	}
	x.DType, x.data = "F32", data
	return x
}

// with is a copy of a float32 tensor with another element.
func (x rawTensor) with(t testing.TB, i int, v float32) rawTensor {
	x = x.widened(t)
	x.data = slices.Clone(x.data)
	binary.LittleEndian.PutUint32(x.data[4*i:], math.Float32bits(v))
	return x
}

// split3 spreads tensors over three files.
func split3(tensors map[string]rawTensor) []map[string]rawTensor {
	files := []map[string]rawTensor{{}, {}, {}}
	for i, name := range slices.Sorted(maps.Keys(tensors)) {
		files[i%3][name] = tensors[name]
	}
	return files
}

// writeBase writes a base with the config of one of the fixtures.
func writeBase(t testing.TB, like string, files ...map[string]rawTensor) string {
	dir := t.TempDir()
	config, err := os.ReadFile(filepath.Join(baseOf(like), "config.json"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o666))
	if len(files) == 1 {
		writeRaw(t, filepath.Join(dir, "model.safetensors"), files[0])
		return dir
	}
	index := map[string]map[string]string{"weight_map": {}}
	for i, tensors := range files {
		name := fmt.Sprintf("model-%05d-of-%05d.safetensors", i+1, len(files))
		writeRaw(t, filepath.Join(dir, name), tensors)
		for tensor := range tensors {
			index["weight_map"][tensor] = name
		}
	}
	b, err := json.Marshal(index)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors.index.json"), b, 0o666))
	return dir
}
