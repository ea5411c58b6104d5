package lora

import (
	"fmt"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/tensor"
)

// MiSS (Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", 2024; Bone,
// as it was called before) adds one matrix (outputs x r) to each r columns of a weight. Its mini variant repeats a
// matrix of some rows for all outputs. The bat variant multiplies: each square block Wᵢⱼ of r rows and columns
// becomes Wᵢⱼ + Wᵢⱼ·Bᵢ + Bᵢ.

func init() {
	parsers[miss] = func(c *Config) error {
		o, err := c.missOptions()
		c.Rank, c.Alpha = int(o.rank), float64(o.rank) // nothing is scaled
		return err
	}
	parsers[bone] = parsers[miss]
}

// missOptions are what a config says of MiSS.
type missOptions struct {
	rank, mini int64  // of columns and, in the mini variant, of rows
	variant    string // "bat", "mini" or ""
}

func (c *Config) missOptions() (o missOptions, err error) {
	if o.rank, err = c.fields.whole("r", 64, 1); err != nil {
		return o, err
	}
	v := c.fields["init_weights"]
	var begun bool
	switch {
	case v == nil, json.Unmarshal(v, &begun) == nil && v.Kind() != 'n':
	case json.Unmarshal(v, &o.variant) != nil || o.variant != "bat" && (o.variant != "mini" || c.PeftType == bone):
		return o, fmt.Errorf("%w: init_weights is %s, which is not known of %s", ErrUnsupported,
			tensor.Quote(string(v)),
			c.PeftType)
	}
	if o.variant == "mini" {
		o.mini, err = c.fields.whole("mini_r", 1, 1)
	}
	return o, err
}

// miss makes a module of miss_block: (r, outputs), (r, mini_r) or (outputs / r, r, r).
func (c *Config) miss(name string, p parts) (*Module, error) {
	o, err := c.missOptions()
	if err != nil {
		return nil, err
	}
	key := methodParts[c.PeftType][0]
	t, r := p[key], o.rank
	if o.variant == "bat" {
		if len(t.Shape) != 3 || t.Shape[0] < 1 || t.Shape[1] != r || t.Shape[2] != r {
			return nil, fmt.Errorf("%w: it has %v, expected %s (outputs / %d, %d, %d)", ErrMalformed, p, key, r, r, r)
		}
		return transformed(name, t, &batTransform{t: t, groups: t.Shape[0], size: r}), nil
	}
	if len(t.Shape) != 2 || t.Shape[0] != r || t.Shape[1] < 1 || o.mini > 0 && t.Shape[1] != o.mini {
		want := "outputs"
		if o.mini > 0 {
			want = fmt.Sprint(o.mini)
		}
		return nil, fmt.Errorf("%w: it has %v, expected %s (%d, %s)", ErrMalformed, p, key, r, want)
	}
	block := matrixOf(t).Transposed()
	m := &Module{Name: name, Param: "weight", Rank: int(r),
		A: Matrix{T: t, Rows: r}, B: Matrix{T: t, Rows: block.Rows, Cols: r}}
	m.setScaling(1)
	m.fit = func(m *Module, outputs, inputs int64) error {
		if r > inputs || outputs != block.Rows && (o.mini == 0 || outputs%o.mini != 0) {
			return fmt.Errorf("%w: its block is for %d outputs and for %d inputs or more", ErrBase, block.Rows, r)
		}
		m.A.Cols, m.B.Rows = inputs, outputs
		m.Hadamard = []Tiled{{Left: block, Right: Matrix{Rows: r, Cols: r}, Row: Tiling{Each: 1}, Col: Tiling{Each: 1}}}
		return nil
	}
	return m, nil
}

// batTransform is that of the bat variant.
type batTransform struct {
	t            *formats.Tensor
	groups, size int64
	inverted     bool
}

// Fit holds the blocks against the weight.
func (x *batTransform) Fit(outputs, inputs int64) error {
	if outputs%x.size != 0 || outputs/x.size != x.groups || inputs%x.size != 0 {
		return fmt.Errorf("%w: it has %d blocks of %d x %d, expected one for each %d outputs, and inputs in whole "+
			"blocks", ErrBase, x.groups, x.size, x.size, x.size)
	}
	return nil
}

// Bytes is the memory of the blocks, with that for their inverses.
func (x *batTransform) Bytes(int64) int64 {
	return 8*x.t.Count() + 8*x.size*x.size
}

// Load reads the blocks.
func (x *batTransform) Load(int64) (RowMap, error) {
	v, err := Floats(x.t)
	if err != nil {
		return nil, err
	}
	out := &batMap{size: int(x.size), add: v, multiply: v, inverted: x.inverted}
	if !x.inverted {
		return out, nil
	}
	n := int(x.size)
	out.multiply = make([]float32, len(v))
	a := make([]float64, n*n)
	for g := range int(x.groups) {
		for i, f := range v[g*n*n:][:n*n] {
			a[i] = float64(f)
		}
		for i := range n {
			a[i*n+i]++
		}
		if !inverse(a, n) || !narrowed(out.multiply[g*n*n:][:n*n], a, n, false) {
			return nil, fmt.Errorf("%s: tensor %s: %w: its block %d cannot be taken out of a weight again: I + B "+
				"has no inverse", x.t.File, tensor.Quote(x.t.Name), ErrUnsupported, g)
		}
	}
	return out, nil
}

// Inverse takes the blocks out.
func (x *batTransform) Inverse() (Transform, error) {
	inverse := *x
	inverse.inverted = !x.inverted
	return &inverse, nil
}

// batMap adds to each row, in blocks, a row of its group's block and the product with it; or inverted it takes the row
// off, and then makes the product with the inverse of I + B.
type batMap struct {
	size          int
	add, multiply []float32
	inverted      bool
}

// Apply transforms rows.
func (x *batMap) Apply(rows kernels.Mat, first int64, room []float32) {
	n := int64(x.size)
	for lo := int64(0); lo < int64(rows.Rows); {
		group := (first + lo) / n
		hi := min(int64(rows.Rows), (group+1)*n-first)
		part := rows.Slice(int(lo), int(hi), 0, rows.Cols)
		was := kernels.MatOf(room[:part.Rows*part.Cols], part.Rows, part.Cols)
		for i := range part.Rows {
			row, to := part.Data[i*part.RowStride:][:part.Cols], was.Data[i*was.RowStride:][:part.Cols]
			add := x.add[(first+lo+int64(i))*n:][:n]
			copy(to, row)
			for c := range row {
				if f := add[c%x.size]; x.inverted {
					to[c] -= f
					row[c] = 0
				} else {
					row[c] += f
				}
			}
		}
		block := kernels.MatOf(x.multiply[group*n*n:][:n*n], x.size, x.size)
		for c := 0; c < rows.Cols; c += x.size {
			kernels.MulAdd(part.Slice(0, part.Rows, c, c+x.size), was.Slice(0, part.Rows, c, c+x.size), block)
		}
		lo = hi
	}
}
