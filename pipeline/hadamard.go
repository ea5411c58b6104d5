package pipeline

import (
	"slices"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
)

// product makes the rows [r0, r1) and columns [c0, c1) of an update's rectangle of its delta, before it is scaled.
// delta holds them by rows.
func (t *update) product(b *mergeBuffers, delta []float32, r0, r1, c0, c1 int64) {
	if t.waves != nil {
		t.waves.Fill(delta, &b.lines, r0, r1, c0, c1)
		return
	}
	if t.tiles == nil {
		clear(delta)
		kernels.MulAdd(kernels.MatOf(delta, int(r1-r0), int(c1-c0)),
			t.left.Slice(int(r0), int(r1), 0, int(t.Rank)), t.right.Slice(0, int(t.Rank), int(c0), int(c1)))
		return
	}
	for i, x := range t.tiles {
		row := floats(&b.row, int(x.Right.Cols))
		if i == 0 {
			x.Fill(delta, row, r0, r1, c0, c1)
			continue
		}
		other := floats(&b.other, len(delta))
		x.Fill(other, row, r0, r1, c0, c1)
		for k, f := range other {
			delta[k] *= f
		}
	}
}

// additive reports whether what an update does is to add a delta, whatever was there.
func (t *update) additive() bool {
	return t.magnitude == nil && t.Module.Form != lora.Rows && t.Module.Form != lora.Scale && t.Transform == nil
}

// wholeRows reports whether a change needs whole rows of what it is made to.
func (w *Weight) wholeRows() bool {
	return w.Change != nil && slices.ContainsFunc(w.Change.Updates, func(t lora.Update) bool { return t.Transform != nil })
}

// around are the elements [lo, hi), or the rows that have them where a change needs whole ones: a tile ends where a
// block of a quantised weight does.
func (w *Weight) around(lo, hi int64) (first, last int64) {
	if w.wholeRows() {
		lo -= lo % w.Change.Width
		hi += (w.Change.Width - hi%w.Change.Width) % w.Change.Width
	}
	return lo, hi
}

// multiply multiplies a part of row k of a weight, from column c0 on, with the factors of an update's outputs.
func (t *update) multiply(dst, factors []float32, k, c0 int64) {
	if t.OutputRows {
		f := factors[t.FirstOutput+k-t.Row]
		for i := range dst {
			dst[i] *= f
		}
		return
	}
	f := factors[t.FirstOutput+c0-t.Col:]
	for i := range dst {
		dst[i] *= f[i]
	}
}
