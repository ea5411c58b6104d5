package pyregex

import (
	"math"
	"slices"
)

// op says what a node is. The names are those of Python's re._constants.
type op int

const (
	opLiteral        op = iota // a character
	opNotLiteral               // any character but one
	opAny                      // .
	opIn                       // a set of characters
	opAt                       // a position
	opBranch                   // one of several sequences
	opSubpattern               // a group, or a part with flags of its own
	opAtomic                   // a sequence that is not tried another way once it has matched
	opRepeat                   // a sequence several times
	opAssert                   // a sequence that is, or is not, ahead or behind
	opGroupRef                 // what a group matched, again
	opGroupRefExists           // one of two sequences, by whether a group has matched
)

// node is a piece of an expression. Which fields count is said by its op.
type node struct {
	op       op
	char     rune       // opLiteral, opNotLiteral
	items    []item     // opIn
	negate   bool       // opIn, opAssert
	where    rune       // opAt: ^, $, or the letter of the escape
	parts    []sequence // opBranch: all; opGroupRefExists: for yes and for no; the others: one, the body
	group    int        // opSubpattern: 0 does not capture; opGroupRef, opGroupRefExists
	add, del flags      // opSubpattern
	min, max int64      // opRepeat
	how      rune       // opRepeat: * takes as much as it can, ? as little, + as much and gives nothing back
	behind   bool       // opAssert
}

func (n *node) body() sequence { return n.parts[0] }

// item is a part of a set: a range of characters, or a class.
type item struct {
	lo, hi rune
	ranged bool // written with a hyphen; Python treats [a] otherwise than [a-a]
	class  rune // 0, or one of dDsSwW
}

type sequence []*node

// same reports whether two nodes are equal to Python, which compares those that have sequences by identity.
func same(a, b *node) bool {
	return a.op == b.op && len(a.parts) == 0 && len(b.parts) == 0 && a.char == b.char && a.negate == b.negate &&
		a.where == b.where && a.group == b.group && slices.Equal(a.items, b.items)
}

// maxRepeat is what stands for no bound, as MAXREPEAT does in CPython.
const maxRepeat = math.MaxUint32

// width is the least and the greatest number of characters that something matches.
type width struct{ lo, hi int64 }

// endless is more than any width that counts, and small enough that a sum of two does not overflow.
const endless = math.MaxInt64 / 4

func (w width) plus(v width) width {
	return width{min(w.lo+v.lo, endless), min(w.hi+v.hi, endless)}
}

func (w width) times(least, most int64) width {
	product := func(a, b int64) int64 {
		if a != 0 && b > endless/a {
			return endless
		}
		return a * b
	}
	out := width{product(w.lo, least), product(w.hi, most)}
	if most == maxRepeat && w.hi > 0 {
		out.hi = endless
	}
	return out
}

// or is the width of one of two.
func (w width) or(v width) width { return width{min(w.lo, v.lo), max(w.hi, v.hi)} }

// widthOf measures a sequence as SubPattern.getwidth does; groups has the widths of the groups that are closed.
func widthOf(s sequence, groups []*width) width {
	var w width
	for _, n := range s {
		switch n.op {
		case opLiteral, opNotLiteral, opAny, opIn:
			w = w.plus(width{1, 1})
		case opSubpattern, opAtomic:
			w = w.plus(widthOf(n.body(), groups))
		case opRepeat:
			w = w.plus(widthOf(n.body(), groups).times(n.min, n.max))
		case opBranch, opGroupRefExists:
			one := widthOf(n.parts[0], groups)
			for _, p := range n.parts[1:] {
				one = one.or(widthOf(p, groups))
			}
			w = w.plus(one)
		case opGroupRef:
			w = w.plus(*groups[n.group])
		}
	}
	return w
}
