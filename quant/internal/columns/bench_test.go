package columns_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/awq"
	"github.com/lorakit/lorakit/quant/gptq"
	"github.com/lorakit/lorakit/quant/quanttest"
	"github.com/lorakit/lorakit/tensor"
)

// random is a module of random words with groups of 128, in order or not.
func random(bits, out, in int64, scheme string, act bool) *quanttest.Stored {
	r := rand.New(rand.NewPCG(1, 2))
	m := &quanttest.Stored{Data: map[string][]byte{}, Model: tensor.BF16}
	m.JSON = fmt.Appendf(nil, `{"quantization_config": {"quant_method": "%s", "bits": %d, "group_size": 128}}`, scheme, bits)
	add := func(name string, d tensor.DType, shape ...int64) []byte {
		info := tensor.Info{Name: "m." + name, DType: d, Shape: shape}
		data := make([]byte, info.Count()*d.Bits()/8)
		for i := range data {
			data[i] = byte(r.Uint32())
			if d == tensor.F16 && i%2 == 1 {
				data[i] = data[i]&0x83 | 0x24 // about 1/64
			}
		}
		m.Add(info, data)
		return data
	}
	if scheme == "awq" {
		add("qweight", tensor.I32, in, out/8)
	} else {
		add("qweight", tensor.I32, in*bits/32, out)
		index := add("g_idx", tensor.I32, in)
		for i := range int(in) {
			g := i / 128
			if act {
				g = r.IntN(int(in / 128))
			}
			binary.LittleEndian.PutUint32(index[4*i:], uint32(g))
		}
	}
	add("qzeros", tensor.I32, in/128, out*bits/32)
	add("scales", tensor.F16, in/128, out)
	return m
}

// BenchmarkDecode decodes a tile of 64 rows, of what is in memory.
func BenchmarkDecode(b *testing.B) {
	for _, c := range []struct {
		name, scheme string
		bits         int64
		act          bool
	}{{"gptq-2", "gptq", 2, false}, {"gptq-3", "gptq", 3, false}, {"gptq-4", "gptq", 4, false},
		{"gptq-4-act", "gptq", 4, true}, {"gptq-8", "gptq", 8, false}, {"awq", "awq", 4, false}} {
		b.Run(c.name, func(b *testing.B) {
			m := random(c.bits, 64, 4096, c.scheme, c.act)
			scheme := quant.Scheme(gptq.Scheme{})
			if c.scheme == "awq" {
				scheme = awq.Scheme{}
			}
			found, err := scheme.Find(b.Context(), m)
			require.NoError(b, err)
			d := found[0]
			var in [][]byte
			for _, name := range d.Parts() {
				in = append(in, m.Data[name])
			}
			dst := make([]byte, 2*d.Info().Count())
			b.SetBytes(int64(len(dst)))
			for b.Loop() {
				require.NoError(b, d.Decode(dst, 0, d.Info().Count(), in))
			}
		})
	}
}
