// Package quanttest helps to test schemes: stored tensors from a file or in memory, and weights that are read and
// written in tiles as the pipeline does it.
package quanttest

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Stored are the tensors of a checkpoint, in memory.
type Stored struct {
	Infos []tensor.Info
	Data  map[string][]byte
	// Model is what DType returns, and JSON what Config does.
	Model tensor.DType
	JSON  []byte
}

var _ quant.Stored = (*Stored)(nil)

// Tensors lists them.
func (s *Stored) Tensors() []tensor.Info { return s.Infos }

// Lookup finds one.
func (s *Stored) Lookup(name string) (tensor.Info, bool) {
	i := slices.IndexFunc(s.Infos, func(t tensor.Info) bool { return t.Name == name })
	if i < 0 {
		return tensor.Info{}, false
	}
	return s.Infos[i], true
}

// Read fills p.
func (s *Stored) Read(name string, p []byte, off int64) error {
	b := s.Data[name]
	if off < 0 || off > int64(len(b))-int64(len(p)) {
		return fmt.Errorf("tensor %q: %d bytes at %d are asked for, it has %d", name, len(p), off, len(b))
	}
	copy(p, b[off:])
	return nil
}

// DType is that of the model.
func (s *Stored) DType() tensor.DType { return s.Model }

// Config is the config.json.
func (s *Stored) Config() []byte { return s.JSON }

// Add puts a tensor in the place of one of its name, or behind the others.
func (s *Stored) Add(t tensor.Info, data []byte) {
	s.Remove(t.Name)
	s.Infos = append(s.Infos, t)
	s.Data[t.Name] = data
}

// Remove takes a tensor out.
func (s *Stored) Remove(name string) {
	s.Infos = slices.DeleteFunc(s.Infos, func(t tensor.Info) bool { return t.Name == name })
	delete(s.Data, name)
}

// Clone is a copy that can be changed.
func (s *Stored) Clone() *Stored {
	c := *s
	c.Infos = slices.Clone(s.Infos)
	for i := range c.Infos {
		c.Infos[i].Shape = slices.Clone(c.Infos[i].Shape)
	}
	c.Data = map[string][]byte{}
	for name, b := range s.Data {
		c.Data[name] = slices.Clone(b)
	}
	return &c
}

// Golden is a file of fixtures: a checkpoint, its weights before they were quantised, and as they are read.
type Golden struct {
	*Stored
	Before, After *Stored
}

// Open reads a safetensors file whose metadata have a "config", and whose tensors before.NAME and after.NAME are no
// part of the checkpoint.
func Open(t testing.TB, path string) *Golden {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	n := binary.LittleEndian.Uint64(b)
	var header map[string]struct {
		DType   string   `json:"dtype"`
		Shape   []int64  `json:"shape"`
		Offsets [2]int64 `json:"data_offsets"`
		Config  string   `json:"config"`
	}
	require.NoError(t, json.Unmarshal(b[8:8+n], &header), path)
	data := b[8+n:]
	empty := func() *Stored { return &Stored{Data: map[string][]byte{}} }
	g := &Golden{empty(), empty(), empty()}
	g.JSON = []byte(header["__metadata__"].Config)
	delete(header, "__metadata__")
	var names []string
	for name := range header {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		h := header[name]
		to := g.Stored
		if rest, ok := strings.CutPrefix(name, "before."); ok {
			name, to = rest, g.Before
		} else if rest, ok := strings.CutPrefix(name, "after."); ok {
			name, to = rest, g.After
		}
		d, err := tensor.ParseDType(h.DType)
		require.NoError(t, err)
		to.Add(tensor.Info{Name: name, DType: d, Shape: h.Shape}, data[h.Offsets[0]:h.Offsets[1]])
	}
	return g
}

// Decode reads a weight in tiles of so many units.
func Decode(s quant.Stored, d quant.Decoder, units int64) ([]byte, error) {
	n, width := d.Info().Count(), d.Values().Bits()/8
	out := make([]byte, n*width)
	for lo := int64(0); lo < n; lo += units * d.Unit() {
		hi := min(n, lo+units*d.Unit())
		tile, err := Tile(s, d, lo, hi)
		if err != nil {
			return nil, err
		}
		copy(out[lo*width:], tile)
	}
	return out, nil
}

// Tile reads the elements [lo, hi) of a weight, whole units.
func Tile(s quant.Stored, d quant.Decoder, lo, hi int64) ([]byte, error) {
	var in [][]byte
	for _, r := range d.Inputs(nil, lo, hi) {
		b := make([]byte, r.Bytes())
		for k := range max(r.Count, 1) {
			if err := s.Read(d.Parts()[r.Part], b[k*r.Length:][:r.Length], r.Offset+k*r.Stride); err != nil {
				return nil, err
			}
		}
		in = append(in, b)
	}
	out := make([]byte, (hi-lo)*d.Values().Bits()/8)
	return out, d.Decode(out, lo, hi, in)
}

// Weight is a weight to be written.
type Weight struct {
	Encoder quant.Encoder
	Info    tensor.Info
	Data    []byte
}

// Encode writes weights that share what their scheme measures, in tiles of so many units, and returns the tensors that
// they become.
func Encode(weights []Weight, units int64) (*Stored, error) {
	s := &Stored{Data: map[string][]byte{}}
	tiles := func(w Weight, use func(lo, hi int64, src []byte) error) error {
		n, width := w.Info.Count(), w.Info.DType.Bits()/8
		for lo := int64(0); lo < n; lo += units * w.Encoder.Unit() {
			hi := min(n, lo+units*w.Encoder.Unit())
			if err := use(lo, hi, w.Data[lo*width:hi*width]); err != nil {
				return err
			}
		}
		return nil
	}
	var numbers []float32
	for _, w := range weights {
		if m, ok := w.Encoder.(quant.Measured); ok {
			if numbers == nil {
				numbers = make([]float32, m.Statistics())
			}
			err := tiles(w, func(lo, hi int64, src []byte) error {
				own := make([]float32, m.Statistics())
				err := m.Measure(own, lo, hi, src)
				m.Join(numbers, own)
				return err
			})
			if err != nil {
				return nil, err
			}
		}
	}
	for _, w := range weights {
		if m, ok := w.Encoder.(quant.Measured); ok {
			if err := m.Begin(numbers); err != nil {
				return nil, err
			}
		}
		outputs := w.Encoder.Outputs()
		for _, o := range outputs {
			size, err := o.Size()
			if err != nil {
				return nil, err
			}
			s.Add(o, make([]byte, size))
		}
		err := tiles(w, func(lo, hi int64, src []byte) error {
			var out [][]byte
			for _, r := range w.Encoder.Tiles(nil, lo, hi) {
				out = append(out, s.Data[outputs[r.Part].Name][r.Offset:r.Offset+r.Length:r.Offset+r.Length])
			}
			if n := w.Encoder.Deferred(lo, hi); n != 0 {
				return fmt.Errorf("%d numbers are deferred, expected none", n)
			}
			return w.Encoder.Encode(out, nil, lo, hi, src)
		})
		if err != nil {
			return nil, err
		}
		err = w.Encoder.Finish(nil, func(part int, off int64, p []byte) error {
			copy(s.Data[outputs[part].Name][off:], p)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Check holds a scheme against a golden file: all weights are read as the peer reads them, and where there are weights
// from before, written to the peer's bytes, both in tiles of several sizes. written says by which spec.
func Check(t *testing.T, scheme quant.Scheme, g *Golden) {
	ctx := context.Background()
	found, err := scheme.Find(ctx, g.Stored)
	require.NoError(t, err)
	require.Len(t, found, len(g.After.Infos))
	specs := map[string]quant.Spec{}
	var names []string
	for _, d := range found {
		info := d.Info()
		specs[info.Name] = d.Spec()
		names = append(names, info.Name)
		want, ok := g.After.Lookup(info.Name)
		require.True(t, ok, info.Name)
		require.Equal(t, want.Shape, info.Shape, info.Name)
		again, err := scheme.Spec(d.Spec().Type, d.Spec().Params)
		require.NoError(t, err)
		require.Equal(t, d.Spec(), again)
		for _, units := range []int64{1, 3, 1 << 20} {
			got, err := Decode(g.Stored, d, units)
			require.NoError(t, err)
			n := info.Count()
			x, y := make([]float32, n), make([]float32, n)
			require.NoError(t, tensor.ToFloats(x, got, d.Values()))
			require.NoError(t, tensor.ToFloats(y, g.After.Data[info.Name], want.DType))
			for i := range x {
				if x[i] != y[i] && (x[i] == x[i] || y[i] == y[i]) {
					t.Fatalf("%s: element %d is %v, expected %v", info.Name, i, x[i], y[i])
				}
			}
		}
	}
	if len(g.Before.Infos) == 0 {
		return
	}
	var groups [][]string
	grouped := map[string]bool{}
	if x, ok := scheme.(quant.Grouper); ok {
		groups = x.Groups(specs[names[0]], names)
	}
	for _, group := range groups {
		for _, name := range group {
			grouped[name] = true
		}
	}
	for _, name := range names {
		if !grouped[name] {
			groups = append(groups, []string{name})
		}
	}
	for _, units := range []int64{1, 2, 1 << 20} {
		written := map[string][]byte{}
		for _, group := range groups {
			var weights []Weight
			for _, name := range group {
				info, ok := g.Before.Lookup(name)
				require.True(t, ok, name)
				e, err := scheme.Encoder(ctx, specs[name], info)
				require.NoError(t, err, name)
				weights = append(weights, Weight{e, info, g.Before.Data[name]})
			}
			s, err := Encode(weights, units)
			require.NoError(t, err)
			for _, info := range s.Infos {
				want, ok := g.Lookup(info.Name)
				require.True(t, ok, info.Name)
				require.Equal(t, want, info)
				written[info.Name] = s.Data[info.Name]
			}
		}
		for name, got := range written {
			if want := g.Data[name]; !slices.Equal(got, want) {
				i := 0
				for got[i] == want[i] {
					i++
				}
				t.Fatalf("%s: byte %d of %d is %#x, expected %#x", name, i, len(want), got[i], want[i])
			}
		}
		require.Len(t, written, len(g.Infos))
	}
	// The config that is written says how to read it.
	var weights []quant.Assigned
	for _, name := range names {
		weights = append(weights, quant.Assigned{Name: name, Spec: specs[name]})
	}
	key, object, err := scheme.Config(weights, nil)
	require.NoError(t, err)
	alone := *g.Stored
	alone.JSON = []byte(fmt.Sprintf(`{%q: %s}`, key, object))
	found, err = scheme.Find(ctx, &alone)
	require.NoError(t, err)
	require.Len(t, found, len(names))
	for _, d := range found {
		require.Equal(t, specs[d.Info().Name], d.Spec())
	}
}
