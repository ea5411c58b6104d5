package bnb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// memory is a checkpoint in memory.
type memory map[string]struct {
	tensor.Info
	data []byte
}

func (m memory) Lookup(name string) (tensor.Info, bool) {
	t, ok := m[name]
	return t.Info, ok
}

func (m memory) Read(name string, p []byte, off int64) error {
	if t := m[name]; off < 0 || off+int64(len(p)) > int64(len(t.data)) {
		return io.ErrUnexpectedEOF
	}
	copy(p, m[name].data[off:])
	return nil
}

func (m memory) put(info tensor.Info, data []byte) {
	m[info.Name] = struct {
		tensor.Info
		data []byte
	}{info, data}
}

func (m memory) Tensors() []tensor.Info {
	var list []tensor.Info
	for _, t := range m {
		list = append(list, t.Info)
	}
	return list
}

func (memory) DType() tensor.DType { return 0 }

func (memory) Config() []byte { return nil }

// typed is a checkpoint that says what type it has.
type typed struct {
	memory
	dtype tensor.DType
}

func (t typed) DType() tensor.DType { return t.dtype }

type deferred []float32

func (c deferred) ReadFloats(dst []float32, i int64) error {
	copy(dst, c[i:])
	return nil
}

// encode quantises src in tiles of the given number of units.
func encode(t testing.TB, s quant.Spec, info tensor.Info, src []byte, units int64) memory {
	t.Helper()
	e, err := Scheme{}.Encoder(context.Background(), s, info)
	require.NoError(t, err)
	outputs := e.Outputs()
	data := make([][]byte, len(outputs))
	for i, o := range outputs {
		n, err := o.Size()
		require.NoError(t, err)
		data[i] = make([]byte, n)
	}
	n, width := info.Count(), info.DType.Bits()/8
	kept := make(deferred, e.Deferred(0, n))
	for lo := int64(0); lo < n; lo += units * e.Unit() {
		hi := min(lo+units*e.Unit(), n)
		var views [][]byte
		for _, r := range e.Tiles(nil, lo, hi) {
			views = append(views, data[r.Part][r.Offset:r.Offset+r.Length])
		}
		var tile []float32
		if k := e.Deferred(lo, hi); k > 0 {
			tile = kept[lo/e.Unit():][:k]
		}
		require.NoError(t, e.Encode(views, tile, lo, hi, src[lo*width:hi*width]))
	}
	require.NoError(t, e.Finish(kept, func(part int, off int64, p []byte) error {
		copy(data[part][off:off+int64(len(p))], p)
		return nil
	}))
	m := memory{}
	for i, o := range outputs {
		m.put(o, data[i])
	}
	return m
}

// decode reads a weight in tiles of the given number of units.
func decode(t testing.TB, m memory, d quant.Decoder, units int64) []byte {
	t.Helper()
	n, width := d.Info().Count(), d.Values().Bits()/8
	out := make([]byte, n*width)
	parts := d.Parts()
	for lo := int64(0); lo < n; lo += units * d.Unit() {
		hi := min(lo+units*d.Unit(), n)
		var in [][]byte
		for _, r := range d.Inputs(nil, lo, hi) {
			b := make([]byte, r.Length)
			require.NoError(t, m.Read(parts[r.Part], b, r.Offset))
			in = append(in, b)
		}
		require.NoError(t, d.Decode(out[lo*width:hi*width], lo, hi, in))
	}
	return out
}

// TestTiles says that the size of a tile changes neither what is encoded nor what is decoded.
func TestTiles(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, private := range []spec{
		{Type: "nf4", BlockSize: 64, DoubleQuant: true}, {Type: "nf4", BlockSize: 32},
		{Type: "fp4", BlockSize: 128, DoubleQuant: true},
		{Type: "nf4", BlockSize: 4096, DoubleQuant: true}, {Type: "int8"},
	} {
		s := private.public()
		for _, shape := range []tensor.Shape{{277, 401}, {1, 1}, {3, 4096}, {64, 64}} {
			info := tensor.Info{Name: "m.weight", DType: tensor.BF16, Shape: shape}
			src := make([]byte, 2*info.Count())
			for i := range src {
				src[i] = byte(r.Uint32())
				if i%2 == 1 {
					src[i] = src[i]&0x81 | 0x3c
				}
			}
			want := encode(t, s, info, src, 1<<30)
			for _, units := range []int64{1, 3, 700} {
				require.Equal(t, want, encode(t, s, info, src, units), "%v %v", s, shape)
			}
			found, err := Scheme{}.Find(context.Background(), typed{want, tensor.BF16})
			require.NoError(t, err)
			require.Len(t, found, 1)
			assert.Equal(t, info, found[0].Info())
			assert.Equal(t, s, found[0].Spec())
			plain := decode(t, want, found[0], 1<<30)
			for _, units := range []int64{1, 3, 700} {
				require.Equal(t, plain, decode(t, want, found[0], units), "%v %v", s, shape)
			}
		}
	}
}

func TestStateIsWhatPythonWrites(t *testing.T) {
	s := spec{Type: "nf4", BlockSize: 64, DoubleQuant: true}
	info := tensor.Info{Name: "w", DType: tensor.BF16, Shape: tensor.Shape{128, 352}}
	assert.Equal(t,
		`{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 352], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05177203193306923}`,
		string(appendState(nil, s, info, 0.05177203193306923)))
	s.DoubleQuant = false
	assert.Equal(t, `{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 352]}`,
		string(appendState(nil, s, info, 0)))
}

func TestPythonFloat(t *testing.T) {
	for want, x := range map[string]float64{
		"0.0": 0, "1.0": 1, "0.5": 0.5, "-2.25": -2.25, "0.0001": 0.0001, "9.999999747378752e-05": float64(float32(0.0001)),
		"1e-05": 1e-5, "1e+16": 1e16, "1234567890123456.0": 1234567890123456, "3.4028234663852886e+38": math.MaxFloat32,
		"1.401298464324817e-45": math.SmallestNonzeroFloat32, "Infinity": math.Inf(1), "-Infinity": math.Inf(-1),
		"NaN": math.NaN(),
	} {
		assert.Equal(t, want, pythonFloat(x).String())
	}
	r := rand.New(rand.NewPCG(2, 2))
	for range 100_000 {
		x := float64(math.Float32frombits(r.Uint32()))
		assert.LessOrEqual(t, len(pythonFloat(x).String()), longestFloat)
	}
}

func TestStateThatIsNotFinite(t *testing.T) {
	for _, x := range []float32{float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1)), 1.5} {
		m := valid(t)
		key := "w.quant_state.bitsandbytes__nf4"
		info := m[key].Info
		b := appendState(nil, spec{Type: "nf4", BlockSize: 64, DoubleQuant: true},
			tensor.Info{DType: tensor.F32, Shape: tensor.Shape{10, 64}}, x)
		info.Shape = tensor.Shape{int64(len(b))}
		m.put(info, b)
		d, err := Scheme{}.Find(context.Background(), m)
		require.NoError(t, err)
		assert.Equal(t, math.Float32bits(x), math.Float32bits(d[0].(*fourBit).offset))
	}
}

// valid is a small weight in NF4.
func valid(t testing.TB) memory {
	info := tensor.Info{Name: "w", DType: tensor.F32, Shape: tensor.Shape{10, 64}}
	src := make([]byte, 4*640)
	putFloats(src, []float32{1, -2, 3})
	return encode(t, spec{Type: "nf4", BlockSize: 64, DoubleQuant: true}.public(), info, src, 1)
}

// TestContradictions damages a weight in every way that its parts can disagree.
func TestContradictions(t *testing.T) {
	for name, damage := range map[string]func(memory){
		"no absmax":        func(m memory) { delete(m, "w.absmax") },
		"no map":           func(m memory) { delete(m, "w.quant_map") },
		"no nested map":    func(m memory) { delete(m, "w.nested_quant_map") },
		"no nested absmax": func(m memory) { delete(m, "w.nested_absmax") },
		"short absmax": func(m memory) {
			m.put(tensor.Info{Name: "w.absmax", DType: tensor.U8, Shape: tensor.Shape{9}}, make([]byte, 9))
		},
		"float absmax": func(m memory) {
			m.put(tensor.Info{Name: "w.absmax", DType: tensor.F32, Shape: tensor.Shape{10}}, make([]byte, 40))
		},
		"codes": func(m memory) {
			m.put(tensor.Info{Name: "w", DType: tensor.U8, Shape: tensor.Shape{321, 1}}, make([]byte, 321))
		},
		"type": func(m memory) {
			m.state(`{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [10, 64]}`)
		},
		"block size": func(m memory) {
			m.state(`{"quant_type": "nf4", "blocksize": 65, "dtype": "float32", "shape": [10, 64]}`)
		},
		"zero block size": func(m memory) {
			m.state(`{"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [10, 64]}`)
		},
		"dtype": func(m memory) { m.state(`{"quant_type": "nf4", "blocksize": 64, "dtype": "int8", "shape": [10, 64]}`) },
		"overflow": func(m memory) {
			m.state(
				`{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4611686018427387904, 4611686018427387904]}`)
		},
		"negative": func(m memory) {
			m.state(`{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [-10, -64]}`)
		},
		"shape": func(m memory) {
			m.state(`{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [10, 65]}`)
		},
		"duplicate": func(m memory) {
			m.state(`{"quant_type": "nf4", "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [10, 64]}`)
		},
		"no JSON": func(m memory) { m.state("{") },
		"nothing": func(m memory) { m.state("") },
		"nested block": func(m memory) {
			m.state(
				`{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [10, 64], "nested_blocksize": 64, "nested_dtype": "float32", "nested_offset": 1.0}`)
		},
	} {
		m := valid(t)
		damage(m)
		_, err := Scheme{}.Find(context.Background(), m)
		require.ErrorIs(t, err, quant.ErrMalformed, name)
		assert.Contains(t, err.Error(), `"w"`, name)
		assert.NotContains(t, err.Error(), "\n", name)
	}
}

func (m memory) state(s string) {
	m.put(tensor.Info{Name: "w.quant_state.bitsandbytes__nf4", DType: tensor.U8, Shape: tensor.Shape{int64(len(s))}},
		[]byte(s))
}

// TestCompanionsAlone says that names that look like companions are tensors of their own where there is no quantised
// weight.
func TestCompanionsAlone(t *testing.T) {
	m := memory{}
	for _, n := range []string{"logit_scale", "a.SCB", "a.absmax", "a.weight", "b.weight_format"} {
		m.put(tensor.Info{Name: n, DType: tensor.F32, Shape: tensor.Shape{1}}, make([]byte, 4))
	}
	found, err := Scheme{}.Find(context.Background(), m)
	require.NoError(t, err)
	assert.Empty(t, found)
}

// TestOtherWriters reads what is written otherwise than here: key order, spaces, another quant_storage, no
// weight_format.
func TestOtherWriters(t *testing.T) {
	m := valid(t)
	d, err := Scheme{}.Find(context.Background(), m)
	require.NoError(t, err)
	want := decode(t, m, d[0], 1)

	offset := d[0].(*fourBit).offset
	b, err := json.Marshal(map[string]any{"shape": []int{10, 64}, "nested_offset": offset, "nested_blocksize": 256,
		"nested_dtype": "float32", "dtype": "float32", "blocksize": 64, "quant_type": "nf4", "more": nil})
	require.NoError(t, err)
	m.state("\n  " + string(b) + "\t\n")
	codes := m["w"].data
	for _, dtype := range []tensor.DType{tensor.BF16, tensor.F16, tensor.F32, tensor.I8} {
		m.put(tensor.Info{Name: "w", DType: dtype, Shape: tensor.Shape{320 * 8 / dtype.Bits(), 1}}, codes)
		d, err := Scheme{}.Find(context.Background(), m)
		require.NoError(t, err)
		assert.Equal(t, want, decode(t, m, d[0], 1))
	}

	q := encode(t, spec{Type: "int8"}.public(),
		tensor.Info{Name: "m.weight", DType: tensor.F32, Shape: tensor.Shape{2, 3}}, make([]byte, 24), 1)
	delete(q, "m.weight_format")
	found, err := Scheme{}.Find(context.Background(), q)
	require.NoError(t, err)
	assert.Equal(t, tensor.F16, found[0].Info().DType)
	q.put(tensor.Info{Name: "m.weight_format", DType: tensor.U8, Shape: tensor.Shape{}}, []byte{2})
	_, err = Scheme{}.Find(context.Background(), q)
	require.ErrorIs(t, err, quant.ErrMalformed)
}

// FuzzState reads whatever a quant_state may hold: no panic, and what is accepted can be decoded within its parts.
func FuzzState(f *testing.F) {
	for _, s := range []string{
		string(valid(f)["w.quant_state.bitsandbytes__nf4"].data),
		`{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [640]}`,
		`{"quant_type": "nf4", "blocksize": 4096, "dtype": "bfloat16", "shape": [1, 0]}`,
		`{"shape": null}`, `[]`, strings.Repeat("[", 5000), `{"nested_offset": NaN}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m := valid(t)
		m.state(s)
		found, err := Scheme{}.Find(context.Background(), m)
		if err != nil {
			if !errors.Is(err, quant.ErrMalformed) || strings.Contains(err.Error(), "\n") {
				t.Fatal(err)
			}
			return
		}
		if n := found[0].Info().Count(); n > 640 {
			t.Fatalf("%d elements in 320 bytes", n)
		}
		decode(t, m, found[0], 1)
	})
}

func ExampleScheme_Config() {
	s, err := Scheme{}.Spec("nf4", quant.Params{{Name: "double_quant", Value: true}})
	if err != nil {
		panic(err)
	}
	key, object, err := Scheme{}.Config([]quant.Assigned{{Name: "model.layers.0.mlp.up_proj.weight", Spec: s}},
		[]string{"lm_head"})
	fmt.Println(key, string(object[:60]), err)
	// Output: quantization_config {"_load_in_4bit": true, "_load_in_8bit": false, "bnb_4bit_co <nil>
}
