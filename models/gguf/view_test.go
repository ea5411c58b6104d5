package gguf

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/tensor"
)

// drawn is a view as operations make it, and the shape of its tensor.
func drawn(t *rapid.T) ([]View, tensor.Shape) {
	size := rapid.Int64Range(1, 5)
	a, b, c := size.Draw(t, "a"), size.Draw(t, "b"), size.Draw(t, "c")
	heads := size.Draw(t, "heads")
	find := func(e string) (int64, error) {
		return map[string]int64{"heads": heads, "nope": a, "rest": b}[e], nil
	}
	type kind struct {
		shape tensor.Shape
		parts int
		ops   []string
	}
	k := rapid.SampledFrom([]kind{
		{tensor.Shape{heads * 2 * a, b}, 1, []string{"permute heads"}},
		{tensor.Shape{heads * 2 * a}, 1, []string{"permute heads"}},
		{tensor.Shape{a, b}, 1, []string{"transpose"}},
		{tensor.Shape{a, b, c}, 1, []string{"transpose"}},
		{tensor.Shape{a, b, 2 * c}, 2, []string{"transpose", "alternate rows"}},
		{tensor.Shape{a, 2 * b}, 2, []string{"alternate columns"}},
		{tensor.Shape{a, 2 * b, c}, 2, []string{"halves of rows"}},
		{tensor.Shape{heads * (a + b), c}, 2, []string{"heads heads nope rest", "transpose first"}},
		{tensor.Shape{a, b, c}, 1, nil},
	}).Draw(t, "kind")
	r := &row{names: make([]string, k.parts)}
	for _, text := range k.ops {
		op, err := parseOperation(text)
		require.NoError(t, err)
		r.ops = append(r.ops, op)
	}
	var views []View
	var shapes []tensor.Shape
	for part := range k.parts {
		v, err := r.view(part, k.shape, 0, find)
		require.NoError(t, err)
		views, shapes = append(views, v), append(shapes, r.result(v, k.shape))
	}
	source, err := r.source(shapes)
	require.NoError(t, err)
	require.Equal(t, k.shape, source, "the shape is found again by those of the parts")
	return views, k.shape
}

// TestViewInverse: what the parts of a tensor have put back gives the tensor, each element once.
func TestViewInverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		views, shape := drawn(t)
		count, err := shape.Count()
		require.NoError(t, err)
		x := make([]int, count)
		for i := range x {
			x[i] = i + 1
		}
		back := make([]int, count)
		all := int64(0)
		for _, v := range views {
			n := v.Count()
			all += n
			part := make([]int, n)
			Gather(v, 0, n, part, x, 0)
			Scatter(v, 0, n, back, part, 0)
		}
		require.Equal(t, count, all)
		require.Equal(t, x, back)
	})
}

// TestViewRanges: any range of a view is what the whole has there, and needs no more of the tensor than its extent.
func TestViewRanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		views, shape := drawn(t)
		count, err := shape.Count()
		require.NoError(t, err)
		x := make([]int, count)
		for i := range x {
			x[i] = i + 1
		}
		v := rapid.SampledFrom(views).Draw(t, "view")
		n := v.Count()
		whole := make([]int, n)
		Gather(v, 0, n, whole, x, 0)

		lo := rapid.Int64Range(0, n).Draw(t, "lo")
		hi := rapid.Int64Range(lo, n).Draw(t, "hi")
		first, end := v.Extent(lo, hi)
		require.True(t, 0 <= first && first <= end && end <= count)
		part := make([]int, hi-lo)
		Gather(v, lo, hi, part, x[first:end], first)
		require.Equal(t, whole[lo:hi], part)

		back := make([]int, end-first)
		Scatter(v, lo, hi, back, part, first)
		for i, y := range back {
			require.Equal(t, slices.Contains(part, x[first+int64(i)]), y != 0)
		}
		if v.Plain() && hi > lo {
			require.Equal(t, hi-lo, end-first)
		}
	})
}

// TestOperations: each operation by its definition, written down as loops.
func TestOperations(t *testing.T) {
	type place = func(index ...int64) int64
	find := func(e string) (int64, error) { return map[string]int64{"h": 3, "nope": 2, "v": 5}[e], nil }
	for _, c := range []struct {
		ops   []string
		shape tensor.Shape
		part  int
		names int
		want  func(at place) []int64 // elements of the result by their places in the tensor
	}{
		{[]string{"permute h"}, tensor.Shape{12, 2}, 0, 1, func(at place) (want []int64) {
			rows := make([]int64, 12) // row h*d + s*d/2 + i comes to stand at h*d + 2i + s
			for h := range int64(3) {
				for s := range int64(2) {
					for i := range int64(2) {
						rows[h*4+2*i+s] = h*4 + s*2 + i
					}
				}
			}
			for _, r := range rows {
				want = append(want, at(r, 0), at(r, 1))
			}
			return want
		}},
		{[]string{"transpose", "alternate rows"}, tensor.Shape{2, 3, 4}, 1, 2, func(at place) (want []int64) {
			for e := range int64(2) {
				for _, f := range []int64{1, 3} {
					for h := range int64(3) {
						want = append(want, at(e, h, f))
					}
				}
			}
			return want
		}},
		{[]string{"heads h nope v", "transpose first"}, tensor.Shape{21, 4}, 0, 2, func(at place) (want []int64) {
			for h := range int64(3) {
				for rank := range int64(4) {
					for n := range int64(2) {
						want = append(want, at(h*7+n, rank))
					}
				}
			}
			return want
		}},
		{[]string{"heads h nope v", "transpose first"}, tensor.Shape{21, 4}, 1, 2, func(at place) (want []int64) {
			for h := range int64(3) {
				for n := range int64(5) {
					for rank := range int64(4) {
						want = append(want, at(h*7+2+n, rank))
					}
				}
			}
			return want
		}},
	} {
		r := &row{names: make([]string, c.names)}
		for _, text := range c.ops {
			op, err := parseOperation(text)
			require.NoError(t, err)
			r.ops = append(r.ops, op)
		}
		v, err := r.view(c.part, c.shape, 0, find)
		require.NoError(t, err)
		count, err := c.shape.Count()
		require.NoError(t, err)
		x := make([]int64, count)
		for i := range x {
			x[i] = int64(i)
		}
		got := make([]int64, v.Count())
		Gather(v, 0, v.Count(), got, x, 0)
		strides := whole(c.shape).Strides
		require.Equal(t, c.want(func(index ...int64) (place int64) {
			for i, n := range index {
				place += n * strides[i]
			}
			return place
		}), got, "%v part %d", c.ops, c.part)
	}
}

// TestTranspose: a matrix of more columns than are read side by side.
func TestTranspose(t *testing.T) {
	x := make([]byte, 40*37)
	for i := range x {
		x[i] = byte(i * 37 % 251)
	}
	want, got, back := make([]byte, len(x)), make([]byte, len(x)), make([]byte, len(x))
	tensor.Transpose(want, x, 40, 37, 1)
	v := whole(tensor.Shape{40, 37}).exchanged(0, 1)
	Gather(v, 0, v.Count(), got, x, 0)
	require.Equal(t, want, got)
	Scatter(v, 0, v.Count(), back, got, 0)
	require.Equal(t, x, back)
}

// TestShift: a sum is rounded to the type of its tensor.
func TestShift(t *testing.T) {
	x := []float32{0.25, 1.0 / 4096, -1}
	y := slices.Clone(x)
	require.NoError(t, Shift(y, 1, tensor.BF16))
	require.Equal(t, []float32{1.25, 1 + 1.0/4096, 0}, y)
	require.NoError(t, Shift(y, -1, tensor.F32))
	require.Equal(t, x, y)
	require.NoError(t, Shift(y, 1, tensor.F16))
	require.Equal(t, []float32{1.25, 1, 0}, y, "half a unit in the last place of F16 is rounded to even")
}

// TestExpressions: values, and what is refused.
func TestExpressions(t *testing.T) {
	find := func(name string) (any, bool) {
		v, ok := map[string]any{"a": 7.0, "b": 2.0, "zero": 0.0, "text": "x", "r.x": 0.5}[name]
		return v, ok
	}
	for text, want := range map[string]any{
		"a": 7.0, "none|b": 2.0, "none": nil, "a//b": 3.0, "a/b": 3.5, "int(a*r.x)": 3.0, "a-b*b": 3.0, "(a-b)*b": 10.0,
		"none*a|b": 2.0, "text": "x", "true": true, "1": 1.0, "a-b-b": 3.0,
	} {
		got, ok, err := evaluate(text, find)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
		require.Equal(t, want != nil, ok, text)
	}
	for _, text := range []string{"a//zero", "a/zero", "text*a", "(a", "a)", "a+", "a b"} {
		_, _, err := evaluate(text, find)
		require.Error(t, err, text)
	}
}

// TestData: what the data says of itself fits together.
func TestData(t *testing.T) {
	for name, a := range data().names {
		for _, r := range a.Rows {
			for _, n := range r.names {
				require.Equal(t, r.entire(), ending(n) != "", "%s: %s", name, n)
			}
		}
		for _, k := range a.NeedKeys {
			require.True(t, slices.ContainsFunc(a.Keys, func(r key) bool { return r.name == k }), "%s: %s", name, k)
		}
		require.NotEmpty(t, a.layers(), name)
		require.NotEqual(t, never, a.Classes[0].When, name)
		for member, b := range a.Back {
			require.Contains(t, []string{"u32", "f32"}, b[0], "%s: %s", name, member)
		}
	}
	require.Len(t, Classes(), 21)
	require.Len(t, Architectures(), 17)
}
