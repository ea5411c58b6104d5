package gguf

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lorakit/lorakit/tensor"
)

// drawn is a view as operations make it, and the shape of its tensor.
func drawn(t *rapid.T) ([]view, tensor.Shape) {
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
	var views []view
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

// TestViewInverse: the parts of a tensor have each of its elements once.
func TestViewInverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		views, shape := drawn(t)
		count, err := shape.Count()
		require.NoError(t, err)
		seen := make([]bool, count)
		for _, v := range views {
			require.Equal(t, v.count(), v.placed(0).Count())
			for from := range v.placed(0).Elements() {
				require.False(t, seen[from])
				seen[from] = true
			}
		}
		require.NotContains(t, seen, false)
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
		var got []int64
		for from := range v.placed(0).Elements() {
			got = append(got, x[from])
		}
		strides := whole(c.shape).Strides
		require.Equal(t, c.want(func(index ...int64) (place int64) {
			for i, n := range index {
				place += n * strides[i]
			}
			return place
		}), got, "%v part %d", c.ops, c.part)
	}
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
