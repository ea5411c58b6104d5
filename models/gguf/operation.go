package gguf

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// operation is what a row does to a tensor.
type operation struct {
	kind     operationKind
	numbers  []string // expressions over the config
	only     bool     // for the first part alone
	fromLast int      // the dimension that is parted, from the last
}

type operationKind uint8

const (
	permute operationKind = iota
	transpose
	cutRows
	alternate
	halves
	splitHeads
	stack
	unless
	mxfp4Blocks
	mxfp4Scales
)

// parseOperation reads an operation as the data has it.
func parseOperation(text string) (operation, error) {
	words := strings.Fields(text)
	if len(words) == 0 {
		return operation{}, fmt.Errorf("found an empty operation")
	}
	args := words[1:]
	switch words[0] {
	case "permute":
		return operation{kind: permute, numbers: args}, count(text, args, 1)
	case "transpose":
		return operation{kind: transpose, only: slices.Equal(args, []string{"first"})}, nil
	case "rows":
		return operation{kind: cutRows}, nil
	case "alternate":
		if slices.Equal(args, []string{"columns"}) {
			return operation{kind: alternate, fromLast: 1}, nil
		}
		if slices.Equal(args, []string{"blocks"}) {
			return operation{kind: alternate, fromLast: 3}, nil
		}
		return operation{kind: alternate, fromLast: 2}, nil
	case "halves":
		return operation{kind: halves, fromLast: 2}, nil
	case "heads":
		return operation{kind: splitHeads, numbers: args}, count(text, args, 3)
	case "stack":
		return operation{kind: stack, numbers: args}, count(text, args, 1)
	case "mxfp4":
		if slices.Equal(args, []string{"scales"}) {
			return operation{kind: mxfp4Scales}, nil
		}
		return operation{kind: mxfp4Blocks}, nil
	case "unless":
		return operation{kind: unless, numbers: args}, count(text, args, 1)
	}
	return operation{}, fmt.Errorf("found the operation %q, which there is not", text)
}

func count(text string, args []string, n int) error {
	if len(args) != n {
		return fmt.Errorf("found %q, expected %d expressions", text, n)
	}
	return nil
}

// numbers are those that operations are told by the config.
type numbers func(expression string) (int64, error)

// view is what a part of a row is of a checkpoint's tensor. vocabulary is the rows that an embedding keeps, 0 for all.
func (r *row) view(part int, shape tensor.Shape, vocabulary int64, find numbers) (view, error) {
	v := whole(shape)
	for _, op := range r.ops {
		var err error
		if v, err = op.apply(v, part, len(r.names), vocabulary, find); err != nil {
			return view{}, err
		}
	}
	return v, nil
}

// apply adds an operation to a view of a tensor, for one of several parts.
func (op operation) apply(v view, part, parts int, vocabulary int64, find numbers) (view, error) {
	n := make([]int64, len(op.numbers))
	if op.kind == permute || op.kind == splitHeads {
		for i, e := range op.numbers {
			var err error
			if n[i], err = find(e); err != nil {
				return v, err
			}
		}
	}
	switch op.kind {
	case permute:
		if len(v.Dims) == 0 || n[0] > v.Dims[0] || v.Dims[0]%(2*n[0]) != 0 {
			return v, malformedf("found the shape %v, expected %d heads of an even number of rows", tensor.Shape(v.Dims), n[0])
		}
		return v.cut(0, n[0], v.Dims[0]/n[0]).cut(1, 2, v.Dims[0]/n[0]/2).exchanged(1, 2), nil
	case transpose:
		if last := len(v.Dims) - 1; last > 0 && (!op.only || part == 0) {
			return v.exchanged(last-1, last), nil
		}
		return v, nil
	case cutRows:
		if vocabulary > 0 && len(v.Dims) > 0 && vocabulary < v.Dims[0] {
			return v.some(0, 0, vocabulary), nil
		}
		return v, nil
	case alternate, halves:
		d := len(v.Dims) - op.fromLast
		if d < 0 || v.Dims[d]%int64(parts) != 0 {
			return v, malformedf("found the shape %v, expected %d parts of equal size", tensor.Shape(v.Dims), parts)
		}
		if op.kind == halves {
			return v.some(d, int64(part)*(v.Dims[d]/int64(parts)), v.Dims[d]/int64(parts)), nil
		}
		return v.cut(d, v.Dims[d]/int64(parts), int64(parts)).some(d+1, int64(part), 1).without(d + 1), nil
	case splitHeads:
		heads, rows := n[0], n[1]+n[2]
		if len(v.Dims) != 2 || v.Dims[0]%heads != 0 || v.Dims[0]/heads != rows {
			return v, malformedf("found the shape %v, expected %d heads of %d rows", tensor.Shape(v.Dims), heads, rows)
		}
		return v.cut(0, heads, rows).some(1, int64(part)*n[1], n[1+part]), nil
	}
	return v, nil
}

// result is the shape in GGUF of a view of a tensor: permuted heads lie one after the other as in their source.
func (r *row) result(v view, source tensor.Shape) tensor.Shape {
	if r.has(permute) {
		return slices.Clone(source)
	}
	if last := len(v.Dims) - 1; r.has(mxfp4Blocks) && last > 0 {
		return append(slices.Clone(v.Dims[:last-1]), v.Dims[last-1]*mxfp4.Elements)
	}
	return slices.Clone(v.Dims)
}

func (r *row) has(kind operationKind) bool {
	return slices.ContainsFunc(r.ops, func(op operation) bool { return op.kind == kind })
}

// numbersOf are the expressions of an operation of that kind.
func (r *row) numbersOf(kind operationKind) []string {
	for _, op := range r.ops {
		if op.kind == kind {
			return op.numbers
		}
	}
	return nil
}
