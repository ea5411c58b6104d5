package lora

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// peftStacks is what one release of PEFT does with the parameters of modules: see fixtures/generate/stacks.py.
type peftStacks struct {
	PEFT    string    `json:"peft"`
	Arrays  [][]int64 `json:"arrays"`
	Kinds   [][]sized `json:"kinds"`
	Classes []struct {
		Class     string `json:"class"`
		ModelType string `json:"model_type"`
		Modules   []struct {
			Name  string                         `json:"name"`
			Kind  int                            `json:"kind"`
			Files []map[string][2]jsontext.Value `json:"files"`
		} `json:"modules"`
	} `json:"classes"`
}

// sized is a module whose parameters have these shapes, with the adapters that were made for it.
type sized struct {
	Order  []string                `json:"order"`
	Shapes map[string]tensor.Shape `json:"shapes"`
	Cases  []peftCase              `json:"cases"`
}

type peftCase struct {
	Config  jsontext.Value          `json:"config"`
	Tensors map[string]tensor.Shape `json:"tensors"`
	Delta   map[string]int          `json:"delta"` // parameter -> array
}

// fill are the whole numbers of the tensors of an adapter, as the script has them.
func fill(seed, n int64) []byte {
	var b []byte
	for range n {
		seed = (seed*1103515245 + 12345) % (1 << 31)
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32((seed>>16)%7-3)))
	}
	return b
}

// peftAdapter is an adapter of PEFT in memory, filled with whole numbers.
func peftAdapter(t fataler, config []byte, prefix string, shapes map[string]tensor.Shape) *Adapter {
	t.Helper()
	a := &Adapter{Path: "adapter", Dialect: PEFT}
	var err error
	a.Config, err = parseConfig(config)
	require.NoError(t, err)
	require.NoError(t, a.readPEFT(wholeNumbers(shapes, prefix)))
	a.sort()
	return a
}

// wholeNumbers are tensors of whole numbers, in the order of their names.
func wholeNumbers(shapes map[string]tensor.Shape, prefix string) (list []formats.Tensor) {
	for i, key := range slices.Sorted(maps.Keys(shapes)) {
		info := tensor.Info{Name: prefix + key, DType: tensor.F32, Shape: shapes[key]}
		x := formats.Tensor{Info: info, File: adapterFiles[0]}
		b := fill(int64(i)+1, x.Count())
		x.Data, x.Bytes = bytes.NewReader(b), int64(len(b))
		list = append(list, x)
	}
	return list
}

// added is what a change adds to a tensor of so many elements.
func added(t fataler, c *Change, count int64) []float64 {
	t.Helper()
	out := make([]float64, count)
	if c == nil {
		return out
	}
	require.Nil(t, c.Value)
	for _, x := range c.Updates {
		l, err := x.Left.Read()
		require.NoError(t, err)
		r, err := x.Right.Read()
		require.NoError(t, err)
		for i := range l.Rows {
			for j := range r.Cols {
				sum := 0.0
				for k := range l.Cols {
					sum += float64(l.Data[i*l.RowStride+k*l.ColStride]) * float64(r.Data[k*r.RowStride+j*r.ColStride])
				}
				out[(x.Row+int64(i))*c.Width+x.Col+int64(j)] += sum * float64(x.Scale)
			}
		}
	}
	return out
}

// gathered are the values of a file's tensor, which come from those places of the parameters.
func gathered(values []int64, at []int64) []float64 {
	out := make([]float64, len(at))
	for i, k := range at {
		out[i] = float64(values[k])
	}
	return out
}

// TestTargetParameters binds what PEFT has made for the parameters of modules, of every class of transformers that has
// modules with stacks of experts or with several matrices: each parameter alone, pairs and all, in both orders, in
// sizes that are all equal and in sizes of which every two change places. Each element of the delta is to be PEFT's.
func TestTargetParameters(t *testing.T) {
	t.Parallel()
	f, err := os.Open("../fixtures/stacks.json.gz")
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	var runs []peftStacks
	require.NoError(t, json.UnmarshalRead(z, &runs))
	require.Len(t, runs, 4)
	for _, run := range runs {
		t.Run(run.PEFT, func(t *testing.T) {
			t.Parallel()
			checked, apart := 0, 0
			seen := map[string]bool{} // modules with the same files: the rest of their cases are the same
			loaded := map[string]*models.Model{}
			load := func(class, modelType string, hidden int64) *models.Model {
				key := fmt.Sprint(class, hidden)
				if loaded[key] == nil {
					members := map[string]any{"architectures": []string{class}, "model_type": modelType, "hidden_size": hidden}
					config, err := json.Marshal(members)
					require.NoError(t, err)
					parsed, err := models.ParseConfig(config)
					require.NoError(t, err)
					model, known := models.Load(parsed)
					require.True(t, known, class)
					loaded[key] = model
				}
				return loaded[key]
			}
			for _, c := range run.Classes {
				for _, m := range c.Modules {
					for s, size := range run.Kinds[m.Kind] {
						var files map[string][2]jsontext.Value
						if m.Files != nil {
							if files = m.Files[s]; files == nil {
								apart++ // its file has the experts for text and for images in one tensor
								continue
							}
						}
						key := fmt.Sprint(m.Kind, s, len(files))
						hidden := int64(0) // that of a model whose stacks its file may have the other way round
						if down := size.Shapes["down_proj"]; down != nil {
							hidden = down[1]
						}
						for _, x := range size.Cases {
							if all := len(x.Delta) == len(size.Shapes); seen[key] && !all {
								continue
							}
							checked++
							checkCase(t, run, load(c.Class, c.ModelType, hidden), m.Name, size, files, x, !seen[key])
						}
						seen[key] = true
					}
				}
			}
			t.Logf("%d classes, %d adapters, %d left out", len(run.Classes), checked, apart)
			require.Greater(t, checked, 100)
			if len(run.Classes) > 100 {
				require.Greater(t, len(run.Classes), 300)
				require.Less(t, apart, 200)
			}
		})
	}
}

// checkCase binds an adapter and, where converts is set, what it is converted to.
func checkCase(t *testing.T, run peftStacks, model *models.Model, module string, size sized,
	files map[string][2]jsontext.Value, x peftCase, converts bool) {
	t.Helper()
	class := model.Architecture
	says := fmt.Sprintf("%s %s %v %s", class, module, size.Shapes, x.Config)
	registered, _ := model.Registered(module)

	// The parameters one after the other.
	var values []int64
	first := map[string]int64{}
	for _, name := range size.Order {
		n := tensor.Info{Shape: size.Shapes[name]}.Count()
		first[name] = int64(len(values))
		if array, ok := x.Delta[name]; ok {
			require.EqualValues(t, n, len(run.Arrays[array]), says)
			values = append(values, run.Arrays[array]...)
		} else {
			values = append(values, make([]int64, n)...)
		}
	}

	var targets []Target
	want := map[string][]float64{}
	add := func(name string, shape tensor.Shape, at []int64) {
		targets = append(targets, Target{Name: name, Shape: shape, Role: model.Tensor(name, shape)})
		want[name] = gathered(values, at)
	}
	if files == nil {
		for _, name := range size.Order {
			n := tensor.Info{Shape: size.Shapes[name]}.Count()
			at := make([]int64, n)
			for i := range at {
				at[i] = first[name] + int64(i)
			}
			add(module+"."+name, size.Shapes[name], at)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		var shape tensor.Shape
		var array int
		require.NoError(t, json.Unmarshal(files[name][0], &shape))
		require.NoError(t, json.Unmarshal(files[name][1], &array))
		add(name, shape, run.Arrays[array])
	}

	does := func(a *Adapter, says string) {
		t.Helper()
		b, err := Bind([]Weighted{{a, 1}}, targets, model)
		require.NoError(t, err, says)
		for i, target := range targets {
			got := added(t, b.Changes[i], tensor.Info{Shape: target.Shape}.Count())
			require.Equal(t, want[target.Name], got, "%s: %s", says, target.Name)
		}
	}
	for _, target := range targets {
		for _, r := range target.Role.Runtime {
			if _, param := cutLast(r.Param); r.Via != "" && x.Delta[param] != 0 { // its file has the rows in another order
				a := peftAdapter(t, x.Config, peftPrefix+module+".", x.Tensors)
				_, err := Bind([]Weighted{{a, 1}}, targets, model)
				require.ErrorIs(t, err, ErrBase, says)
				return
			}
		}
	}
	read := func(config []byte) *Adapter { return peftAdapter(t, config, peftPrefix+module+".", x.Tensors) }
	a := read(x.Config)
	does(a, says)
	for _, m := range a.Modules {
		require.Contains(t, x.Delta, m.Param, says)
	}
	if !converts || files == nil || registered.Parameters == nil {
		return
	}

	// What it is converted to does the same, where PEFT has noted the class of the base and where it has not.
	noted := slices.Concat([]byte(`{"auto_mapping": {"base_model_class": "`+class+`"}, `), x.Config[1:])
	experts, counts := true, map[int64]bool{}
	for p := range x.Delta {
		experts = experts && slices.Contains([]string{"gate_up_proj", "down_proj", "up_proj"}, p)
		counts[size.Shapes[p][0]] = true
	}
	// One expert is taken for a matrix, shared experts are of every token, and LongCat's have more of one stack than
	// of the other.
	never := !experts || counts[1] || registered.Parameters[0] == "gate_proj" || len(counts) > 1
	for _, to := range []string{fusedExperts, perExpert} {
		for _, config := range [][]byte{noted, x.Config} {
			e, err := read(config).Encode(EncodeOptions{Experts: to})
			if err != nil {
				turns := to == perExpert && registered.Interleaved
				require.True(t, never || turns || len(config) == len(x.Config), "%s: %s: %v", says, to, err)
			} else if to == fusedExperts || !registered.InputsFirst {
				does(written(t, e), says+" "+to)
			}
		}
	}
}

// written is an adapter as it would be read again, once it has been encoded.
func written(t fataler, e *Encoded) *Adapter {
	t.Helper()
	a := &Adapter{Path: "written", Dialect: PEFT}
	var err error
	a.Config, err = parseConfig(e.Config)
	require.NoError(t, err)
	var list []formats.Tensor
	var w Writer
	for _, o := range e.Tensors {
		v, err := w.Values(o)
		require.NoError(t, err)
		var b []byte
		for _, x := range v {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
		}
		info := tensor.Info{Name: o.Name, DType: tensor.F32, Shape: o.Shape}
		list = append(list, formats.Tensor{Info: info, File: "written", Data: bytes.NewReader(b), Bytes: int64(len(b))})
	}
	require.NoError(t, a.readPEFT(list))
	a.sort()
	return a
}
