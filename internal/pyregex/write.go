package pyregex

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// writer writes nodes as an expression of regexp2, which has the rules of .NET. Whatever the two understand otherwise
// is written out: sets and case as ranges, groups with their numbers, look-behinds as looking ahead from some way
// back.
type writer struct {
	strings.Builder
	groups []*width
	folds  bool // a back-reference ignores case

	groupsOpen []openGroup  // those around what is written
	highest    int          // of the groups that have begun
	loops      int          // how many repetitions, of more than once, are around
	possessive int          // how many of the possessive quantifiers around spoil groups
	spoilt     map[int]bool // groups within those
	referred   map[int]bool // groups of back-references and conditions
}

// write writes a whole expression.
func (w *writer) write(s sequence, f flags) (err error) {
	defer caught(&err)
	w.spoilt, w.referred = map[int]bool{}, map[int]bool{}
	w.sequence(s, f)
	for group := range w.referred {
		if w.spoilt[group] {
			panic(&syntaxError{ErrUnsupported, "a reference to a group that a possessive quantifier repeats"})
		}
	}
	return nil
}

// sequence writes a sequence (_compile of Python's re._compiler).
func (w *writer) sequence(s sequence, f flags) {
	for _, n := range s {
		w.node(n, f)
	}
}

// group writes a sequence between an opening and a closing.
func (w *writer) group(open string, s sequence, f flags, end string) {
	w.WriteString(open)
	w.sequence(s, f)
	w.WriteString(end)
}

func (w *writer) node(n *node, f flags) {
	if w.Len() > mostWritten {
		panic(&syntaxError{ErrUnsupported, "an expression of so many parts"})
	}
	switch n.op {
	case opLiteral, opNotLiteral:
		w.WriteString(literal(n.char, n.op == opNotLiteral, f))
	case opIn:
		w.WriteString(class(n.items, n.negate, f))
	case opAny:
		if f&flagDotAll != 0 {
			w.WriteString(anything)
		} else {
			w.WriteString(`[^\n]`)
		}
	case opAt:
		w.WriteString(position(n.where, f))
	case opBranch:
		for i, p := range n.parts {
			w.group([]string{"(?:", "|"}[min(i, 1)], p, f, "")
		}
		w.WriteByte(')')
	case opSubpattern:
		f = f.with(n.add, n.del)
		if n.group == 0 {
			w.group("(?:", n.body(), f, ")")
		} else {
			w.groupsOpen = append(w.groupsOpen, openGroup{n.group, w.loops})
			w.highest = max(w.highest, n.group)
			w.spoilt[n.group] = w.possessive > 0
			w.group(fmt.Sprintf("(?<%d>", n.group), n.body(), f, ")")
			w.groupsOpen = w.groupsOpen[:len(w.groupsOpen)-1]
		}
	case opAtomic:
		w.group("(?>", n.body(), f, ")")
	case opRepeat:
		w.repeat(n, f)
	case opAssert:
		w.assertion(n, f)
	case opGroupRef:
		w.referred[n.group] = true
		ref := fmt.Sprintf(`\k<%d>`, n.group)
		if f&flagIgnoreCase != 0 {
			w.folds = true
			ref = "(?i:" + ref + ")"
		}
		w.WriteString(ref)
	case opGroupRefExists:
		condition := "(?:" + nothing + "(?:"
		if !w.within(n.group) {
			condition = fmt.Sprintf("(?(%d)(?:", n.group)
			w.referred[n.group] = true
		}
		w.group(condition, n.parts[0], f, ")")
		w.group("|(?:", n.parts[1], f, "))")
	}
}

// openGroup is a group that what is written is in.
type openGroup struct{ group, loops int }

// within reports whether what is written is within a group. A condition on that group does not hold, but where CPython
// has the end of the group from before: from another iteration, or from a way that has failed and has left it behind
// where a later group has begun.
func (w *writer) within(group int) bool {
	i := slices.IndexFunc(w.groupsOpen, func(o openGroup) bool { return o.group == group })
	if i >= 0 && (w.groupsOpen[i].loops > 0 || w.highest > group) {
		panic(&syntaxError{ErrUnsupported, "a condition on a group that it is in, and that is repeated or has other groups"})
	}
	return i >= 0
}

// with are the flags within a group that adds some and takes some away.
func (f flags) with(add, del flags) flags {
	if add&typeFlags != 0 {
		f &^= typeFlags
	}
	return (f | add) &^ del
}

// position writes what matches between characters.
func position(where rune, f flags) string {
	multiline := f&flagMultiline != 0
	word := class([]item{{class: 'w'}}, false, f)
	switch where {
	case '^':
		if multiline {
			return `(?m:^)`
		}
		return `\A`
	case '$': // before a line feed at the end as well
		if multiline {
			return `(?m:$)`
		}
		return `\Z`
	case 'A':
		return `\A`
	case 'Z':
		return `\z`
	case 'b':
		return fmt.Sprintf("(?:(?<=%[1]s)(?!%[1]s)|(?<!%[1]s)(?=%[1]s))", word)
	}
	// \B does not match in an empty string.
	return fmt.Sprintf(`(?:(?!\A\z)(?:(?<=%[1]s)(?=%[1]s)|(?<!%[1]s)(?!%[1]s)))`, word)
}

// repeat writes a quantifier. One that gives nothing back does not try the iterations before the last another way
// either.
func (w *writer) repeat(n *node, f flags) {
	if f&flagTemplate != 0 {
		name := map[rune]string{'*': "MAX_REPEAT", '?': "MIN_REPEAT", '+': "POSSESSIVE_REPEAT"}[n.how]
		panic(&syntaxError{ErrMalformed, "internal: unsupported template operator " + name})
	}
	open, end, lazy := "(?:", ")", ""
	switch n.how {
	case '+':
		w.WriteString("(?>")
		open = "(?>"
	case '?':
		lazy = "?"
	}
	if n.max > 1 {
		w.loops++
		defer func() { w.loops-- }()
	}
	if n.how == '+' && w.loops > 0 { // an iteration that fails leaves behind, in CPython, where its groups began
		w.possessive++
		defer func() { w.possessive-- }()
	}
	if n.body().atomic() {
		end = apart + end
	}
	least, most := n.min, n.max
	if least > 0 && least < most && widthOf(n.body(), w.groups).lo == 0 {
		// Both stop after an iteration that matches nothing, but Python not yet after one that has to be.
		w.group(open, n.body(), f, end+quantifier(least, least))
		if least = 0; most != maxRepeat {
			most -= n.min
		}
	}
	w.group(open, n.body(), f, end+quantifier(least, most)+lazy)
	if n.how == '+' {
		w.WriteByte(')')
	}
}

// apart matches everywhere, and keeps regexp2 from taking (?>a+){2} for (?>a{2,}).
const apart = `(?=[\s\S]|\z)`

// atomic reports whether there is something atomic in a sequence.
func (s sequence) atomic() bool {
	return slices.ContainsFunc(s, func(n *node) bool {
		return n.op == opAtomic || n.op == opRepeat && n.how == '+' || slices.ContainsFunc(n.parts, sequence.atomic)
	})
}

// quantifier writes a number of times. No string is so long that more than an int32 holds would make a difference.
func quantifier(least, most int64) string {
	number := func(n int64) string { return strconv.FormatInt(min(n, math.MaxInt32-1), 10) }
	switch {
	case least == 0 && most == maxRepeat:
		return "*"
	case least == 1 && most == maxRepeat:
		return "+"
	case least == 0 && most == 1:
		return "?"
	case most == maxRepeat:
		return "{" + number(least) + ",}"
	}
	return "{" + number(least) + "," + number(most) + "}"
}

// assertion writes a look-ahead or a look-behind. In .NET a look-behind matches from right to left, and in Python from
// left to right after it has gone back by its width.
func (w *writer) assertion(n *node, f flags) {
	ahead := map[bool]string{false: "(?=", true: "(?!"}[n.negate]
	size := widthOf(n.body(), w.groups)
	switch {
	case !n.behind || size == width{}:
		w.group(ahead, n.body(), f, ")")
	case size.lo > math.MaxUint32:
		panic(&syntaxError{ErrMalformed, "looks too much behind"})
	case size.lo != size.hi:
		panic(&syntaxError{ErrMalformed, "look-behind requires fixed-width pattern"})
	default:
		w.WriteString(map[bool]string{false: "(?<=", true: "(?<!"}[n.negate])
		w.group("(?=", n.body(), f, ")")
		w.WriteString(anything + quantifier(size.lo, size.hi) + ")")
	}
}
