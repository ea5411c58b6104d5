package pyregex

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode"
)

// span is a range of characters, with both its ends.
type span struct{ lo, hi rune }

// The classes of Python's re that are short. Those of str have the digits and the letters and numbers of Unicode
// besides: \d is \p{Nd}, and \w is \p{L}, \p{N} and the underscore.
var (
	spaces = []span{{'\t', '\r'}, {0x1c, ' '}, {0x85, 0x85}, {0xa0, 0xa0}, {0x1680, 0x1680}, {0x2000, 0x200a},
		{0x2028, 0x2029}, {0x202f, 0x202f}, {0x205f, 0x205f}, {0x3000, 0x3000}}
	asciiSpaces = []span{{'\t', '\r'}, {' ', ' '}}
	asciiDigits = []span{{'0', '9'}}
	asciiWords  = []span{{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}}
)

const (
	anything = `[\s\S]`
	nothing  = `(?!)`
)

// class writes a set as an expression that matches one character.
func class(items []item, negate bool, f flags) string {
	var chars, others []span
	var in, out []string // classes of regexp2 that are part of the set, and those whose complements are
	for _, it := range items {
		switch it.class {
		case 0:
			continue
		case 's':
			others = append(others, f.pick(asciiSpaces, spaces)...)
		case 'S':
			others = append(others, complement(f.pick(asciiSpaces, spaces))...)
		case 'd', 'w':
			if f&flagASCII != 0 {
				others = append(others, f.ascii(it.class)...)
			} else {
				in = append(in, unicodeClasses[it.class])
			}
		case 'D', 'W':
			if f&flagASCII != 0 {
				others = append(others, complement(f.ascii(unicode.ToLower(it.class)))...)
			} else {
				out = append(out, unicodeClasses[unicode.ToLower(it.class)])
			}
		}
	}
	chars = itemSpans(items, f)
	return union(merged(append(chars, others...)), in, out, negate)
}

var unicodeClasses = map[rune]string{'d': `\p{Nd}`, 'w': `\p{L}\p{N}_`}

func (f flags) pick(ascii, all []span) []span {
	if f&flagASCII != 0 {
		return ascii
	}
	return all
}

func (f flags) ascii(class rune) []span {
	if class == 'd' {
		return asciiDigits
	}
	return asciiWords
}

// union writes a set that is made of ranges, of classes and of complements of classes. Where it has such complements
// it is a choice, which is atomic: else a repetition of it would be tried in as many ways as a character is in it.
func union(spans []span, in, out []string, negate bool) string {
	var alternatives []string
	if one := brackets(spans) + strings.Join(in, ""); one != "" {
		alternatives = append(alternatives, one)
	}
	caret := map[bool]string{true: "^"}
	switch {
	case len(spans) == 1 && spans[0] == everything, covers(in, out):
		if negate {
			return nothing
		}
		return anything
	case len(out) == 0 && len(alternatives) == 0: // no character at all
		if negate {
			return anything
		}
		return nothing
	case len(out) == 0:
		return "[" + caret[negate] + alternatives[0] + "]"
	case len(out) == 1 && len(alternatives) == 0:
		return "[" + caret[!negate] + out[0] + "]"
	}
	for i, a := range alternatives {
		alternatives[i] = "[" + a + "]"
	}
	for _, c := range out {
		alternatives = append(alternatives, "[^"+c+"]")
	}
	if all := strings.Join(alternatives, "|"); negate {
		return "(?:(?!" + all + ")" + anything + ")"
	} else {
		return "(?>" + all + ")"
	}
}

// covers reports whether a class and its complement are there.
func covers(in, out []string) bool {
	return slices.ContainsFunc(out, func(c string) bool { return slices.Contains(in, c) })
}

// brackets writes ranges as they stand in a set of regexp2.
func brackets(spans []span) string {
	var b strings.Builder
	for _, s := range spans {
		b.WriteString(character(s.lo))
		if s.hi > s.lo {
			b.WriteByte('-')
			b.WriteString(character(s.hi))
		}
	}
	return b.String()
}

// character writes a character so that it means itself, in a set and outside.
func character(c rune) string {
	switch {
	case c < unicode.MaxASCII && (unicode.IsLetter(c) || unicode.IsDigit(c)):
		return string(c)
	case c <= 0xffff: // surrogates too, which no string has
		return fmt.Sprintf(`\u%04x`, c)
	}
	return string(c)
}

// itemSpans are the characters and ranges of a set, or those that are equal to one of them but for their case.
func itemSpans(items []item, f flags) []span {
	if f&flagIgnoreCase == 0 {
		var spans []span
		for _, it := range items {
			if it.class == 0 {
				spans = append(spans, span{it.lo, it.hi})
			}
		}
		return spans
	}
	// CPython lowers the characters of a set as it compiles it, then looks for the lowered character of the name in
	// it. Past U+FFFF it leaves them as they are, so that an upper case one is not found: for a range it looks for the
	// upper case as well.
	fold := f.folding()
	var lowered []span
	for _, it := range items {
		switch {
		case it.class != 0:
		case !it.ranged && fold.lower(it.lo) > 0xffff:
			lowered = append(lowered, span{it.lo, it.lo})
		default:
			if it.lo <= 0xffff {
				lowered = append(lowered, fold.lowered(span{it.lo, min(it.hi, 0xffff)})...)
			}
			if it.hi > 0xffff {
				lowered = append(lowered, span{it.lo, it.hi})
				for _, p := range upperCase().within(span{it.lo, it.hi}) {
					lowered = append(lowered, span{p.to, p.to})
				}
			}
		}
	}
	return fold.raised(merged(lowered))
}

// literal writes a character, or any that is equal to it but for its case.
func literal(c rune, negate bool, f flags) string {
	spans := folded(c, f)
	if len(spans) == 1 && spans[0] == (span{c, c}) && !negate {
		return character(c)
	}
	return union(spans, nil, nil, negate)
}

// folded are the characters that are equal to one, but for their case where the flags ignore it.
func folded(c rune, f flags) []span {
	if f&flagIgnoreCase == 0 {
		return []span{{c, c}}
	}
	fold := f.folding()
	return fold.raised(merged(fold.lowered(span{c, c})))
}

// folding is how re.IGNORECASE maps characters.
type folding struct {
	lowers mapping         // from a character to its lower case, where that is another
	raises mapping         // from a lower case character to those that become it
	more   map[rune][]rune // from a lower case character to others that have the same upper case
}

// mapping has pairs of characters, in the order of the first.
type mapping []pair

type pair struct{ from, to rune }

// mappingOf has the characters of a range that change.
func mappingOf(s span, change func(rune) rune) mapping {
	var m mapping
	for _, r := range unicode.CaseRanges {
		for c := max(rune(r.Lo), s.lo); c <= min(rune(r.Hi), s.hi); c++ {
			if to := change(c); to != c {
				m = append(m, pair{c, to})
			}
		}
	}
	return m
}

// turned is a mapping the other way round.
func (m mapping) turned() mapping {
	out := make(mapping, len(m))
	for i, p := range m {
		out[i] = pair{p.to, p.from}
	}
	slices.SortFunc(out, func(a, b pair) int { return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to)) })
	return out
}

// within are the pairs whose first is in a range.
func (m mapping) within(s span) mapping {
	at := func(c rune) int {
		i, _ := slices.BinarySearchFunc(m, c, func(p pair, c rune) int { return cmp.Compare(p.from, c) })
		return i
	}
	return m[at(s.lo):at(s.hi+1)]
}

// without adds the characters of a range that are not mapped to some ranges.
func (m mapping) without(spans []span, s span) []span {
	for _, p := range m.within(s) {
		spans = append(spans, span{s.lo, p.from - 1})
		s.lo = p.from + 1
	}
	return append(spans, s)
}

func foldingOf(s span, more map[rune][]rune) *folding {
	m := mappingOf(s, unicode.ToLower)
	return &folding{m, m.turned(), more}
}

var (
	everything     = span{0, unicode.MaxRune}
	asciiFolding   = sync.OnceValue(func() *folding { return foldingOf(span{'A', 'Z'}, nil) })
	unicodeFolding = sync.OnceValue(func() *folding { return foldingOf(everything, moreCases()) })
	// upperCase has the upper case characters and those that become them.
	upperCase = sync.OnceValue(func() mapping { return mappingOf(everything, unicode.ToUpper).turned() })
)

func (f flags) folding() *folding {
	if f&flagASCII != 0 {
		return asciiFolding()
	}
	return unicodeFolding()
}

func (f *folding) lower(c rune) rune {
	for _, p := range f.lowers.within(span{c, c}) {
		return p.to
	}
	return c
}

// lowered are the characters of a range in lower case, and those that have the same upper case.
func (f *folding) lowered(s span) []span {
	spans := f.lowers.without(nil, s)
	for _, p := range f.lowers.within(s) {
		spans = append(spans, span{p.to, p.to})
	}
	own := merged(slices.Clone(spans))
	for c, others := range f.more {
		if contains(own, c) {
			for _, o := range others {
				spans = append(spans, span{o, o})
			}
		}
	}
	return spans
}

// raised are the characters whose lower case is among some.
func (f *folding) raised(lowered []span) []span {
	var spans []span
	for _, s := range lowered {
		spans = f.lowers.without(spans, s)
		for _, p := range f.raises.within(s) {
			spans = append(spans, span{p.to, p.to})
		}
	}
	return merged(spans)
}

// moreCases is Python's re._casefix: lower case characters whose upper case is the same.
func moreCases() map[rune][]rune {
	more := map[rune][]rune{}
	for _, same := range []string{
		"iı", "sſ", "µμ", "\u0345ι\u1fbe", "\u0390\u1fd3", "\u03b0\u1fe3", "βϐ", "εϵ", "θϑ", "κϰ", "πϖ",
		"ρϱ",
		"ςσ", "φϕ", "вᲀ", "дᲁ", "оᲂ", "сᲃ", "тᲄᲅ", "ъᲆ", "ѣᲇ", "ᲈꙋ", "ṡẛ", "\ufb05\ufb06",
	} {
		for _, c := range same {
			for _, o := range same {
				if o != c {
					more[c] = append(more[c], o)
				}
			}
		}
	}
	return more
}

// contains reports whether a character is in one of some ranges, which are in order.
func contains(spans []span, c rune) bool {
	_, ok := slices.BinarySearchFunc(spans, c, func(s span, c rune) int {
		switch {
		case s.hi < c:
			return -1
		case s.lo > c:
			return 1
		}
		return 0
	})
	return ok
}

// merged puts ranges in order and joins those that touch. Empty ones fall out.
func merged(spans []span) []span {
	spans = slices.DeleteFunc(spans, func(s span) bool { return s.hi < s.lo })
	slices.SortFunc(spans, func(a, b span) int { return int(a.lo - b.lo) })
	var out []span
	for _, s := range spans {
		if last := len(out) - 1; last >= 0 && s.lo <= out[last].hi+1 {
			out[last].hi = max(out[last].hi, s.hi)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// complement are the characters that are in none of some ranges, which are in order.
func complement(spans []span) []span {
	var out []span
	lo := rune(0)
	for _, s := range spans {
		out = append(out, span{lo, s.lo - 1})
		lo = s.hi + 1
	}
	return append(out, span{lo, unicode.MaxRune})
}
