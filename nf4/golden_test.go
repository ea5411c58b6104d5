package nf4_test

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"testing"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/tensor"
	"github.com/stretchr/testify/require"
)

type vector struct {
	Name      string
	Type      string `json:"quant_type"`
	BlockSize int    `json:"block_size"`
	DType     string
}

// golden reads the vectors of bitsandbytes: a safetensors file whose metadata lists the cases.
func golden(t testing.TB) (cases []vector, tensors map[string][]byte) {
	file, err := os.ReadFile("../fixtures/nf4/vectors.safetensors")
	require.NoError(t, err)
	size := binary.LittleEndian.Uint64(file)
	var header map[string]json.RawMessage
	require.NoError(t, json.Unmarshal(file[8:8+size], &header))
	tensors = map[string][]byte{}
	for name, raw := range header {
		var entry struct {
			Offsets [2]int `json:"data_offsets"`
			Cases   string
		}
		require.NoError(t, json.Unmarshal(raw, &entry))
		if name == "__metadata__" {
			require.NoError(t, json.Unmarshal([]byte(entry.Cases), &cases))
			continue
		}
		tensors[name] = file[8+size:][entry.Offsets[0]:entry.Offsets[1]]
	}
	require.Len(t, cases, 66)
	return cases, tensors
}

func floats(b []byte) []float32 {
	f := make([]float32, len(b)/4)
	_, err := binary.Decode(b, binary.LittleEndian, f)
	if err != nil {
		panic(err)
	}
	return f
}

func bytes(f []float32) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, f)
	if err != nil {
		panic(err)
	}
	return b
}

// unsigned turns every -0 into +0: bitsandbytes decodes index 8 of FP4 to either, we to +0.
func unsigned(b []byte, size int) []byte {
	b = append([]byte(nil), b...)
	for e := b; len(e) > 0; e = e[size:] {
		zero := e[size-1]&0x7f == 0
		for _, x := range e[:size-1] {
			zero = zero && x == 0
		}
		if zero {
			e[size-1] = 0
		}
	}
	return b
}

func TestGolden(t *testing.T) {
	cases, tensors := golden(t)
	require.Equal(t, floats(tensors["nested_quant_map"]), nf4.DynamicMap()[:])
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			typ, err := nf4.ParseType(c.Type)
			require.NoError(t, err)
			dtype, err := tensor.ParseDType(c.DType)
			require.NoError(t, err)
			require.NoError(t, nf4.CheckBlockSize(c.BlockSize))
			want := func(s string) []byte {
				b, ok := tensors[c.Name+"."+s]
				require.True(t, ok, s)
				return b
			}
			input := want("input")
			elem := int(dtype.Bits() / 8)
			n := len(input) / elem

			packed := make([]byte, (n+1)/2)
			absmax := make([]float32, (n+c.BlockSize-1)/c.BlockSize)
			require.Equal(t, -1, typ.Quantize(packed, absmax, input, dtype, c.BlockSize))
			require.Equal(t, want("packed"), packed)
			require.Equal(t, want("absmax"), bytes(absmax))

			output := make([]byte, len(input))
			nf4.Dequantize(output, dtype, packed, absmax, typ.Code(), c.BlockSize)
			require.Equal(t, unsigned(want("dequantized"), elem), unsigned(output, elem))

			var mean nf4.Mean
			mean.Add(absmax)
			offset := mean.Float32()
			require.Equal(t, floats(want("nested_offset"))[0], offset)
			q := make([]byte, len(absmax))
			nested := make([]float32, (len(q)+nf4.NestedBlockSize-1)/nf4.NestedBlockSize)
			nf4.QuantizeAbsmax(q, nested, absmax, offset)
			require.Equal(t, want("absmax_q8"), q)
			require.Equal(t, want("nested_absmax"), bytes(nested))

			nf4.DequantizeAbsmax(absmax, q, nf4.DynamicMap(), nested, offset)
			nf4.Dequantize(output, dtype, packed, absmax, typ.Code(), c.BlockSize)
			require.Equal(t, unsigned(want("dequantized_nested"), elem), unsigned(output, elem))
		})
	}
}
