package pyregex

import (
	"fmt"
	"math"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// flags are those of Python's re that an expression can set.
type flags int

const (
	flagTemplate flags = 1 << iota
	flagIgnoreCase
	flagLocale
	flagMultiline
	flagDotAll
	flagUnicode
	flagVerbose
	flagASCII

	typeFlags = flagASCII | flagLocale | flagUnicode
)

var flagLetters = map[rune]flags{
	'i': flagIgnoreCase, 'L': flagLocale, 'm': flagMultiline, 's': flagDotAll, 'x': flagVerbose, 'a': flagASCII,
	't': flagTemplate, 'u': flagUnicode,
}

const (
	decimal     = "0123456789"
	octal       = "01234567"
	hexadecimal = "0123456789abcdefABCDEF"
	specials    = `.\[{()*+?^$|`
	repeats     = "*+?{"
	whitespace  = " \t\n\r\v\f"

	maxGroups = 1<<30 - 1 // MAXGROUPS of CPython
	// deepest is how far groups nest. One more is a RecursionError in Python, in a program that does nothing else.
	deepest = 495
)

// escapes are the characters that a letter behind a backslash means.
var escapes = map[rune]rune{'a': '\a', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t', 'v': '\v', '\\': '\\'}

// parser reads an expression into nodes, as Python's re._parser does (CPython 3.11): the functions are its functions,
// and stop at the same place with the same words.
type parser struct {
	*source
	flags  flags // of the whole expression
	names  map[string]int
	widths []*width // of the groups; nil while one is open. The first is the whole.
	behind int      // how many groups there were before the outermost look-behind, 0 outside of them
	refs   []reference
	depth  int
}

// reference is a condition on a group that need not be there yet.
type reference struct{ group, position int }

// parse reads a whole expression.
func parse(expr string) (p *parser, s sequence, err error) {
	defer caught(&err)
	p = &parser{source: newSource(expr), names: map[string]int{}, widths: []*width{nil}}
	s = p.alternatives(false, 0)
	if p.flags&flagASCII != 0 && p.flags&flagUnicode != 0 {
		panic(&syntaxError{ErrMalformed, "ASCII and UNICODE flags are incompatible"})
	}
	if p.flags&flagASCII == 0 {
		p.flags |= flagUnicode
	}
	if p.next.some {
		panic(p.error("unbalanced parenthesis", 0))
	}
	for _, r := range p.refs {
		if r.group >= len(p.widths) {
			panic(p.at(fmt.Sprintf("invalid group reference %d", r.group), r.position))
		}
	}
	return p, s, nil
}

// alternatives reads sequences with bars between them (_parse_sub).
func (p *parser) alternatives(verbose bool, nested int) sequence {
	var items []sequence
	for {
		items = append(items, p.sequence(verbose, nested+1, nested == 0 && len(items) == 0))
		if !p.match('|') {
			break
		}
		if nested == 0 {
			verbose = p.flags&flagVerbose != 0
		}
	}
	if len(items) == 1 {
		return items[0]
	}
	var out sequence
	for prefixed(items) { // what all begin with moves before them
		out = append(out, items[0][0])
		for i := range items {
			items[i] = items[i][1:]
		}
	}
	if set, ok := joined(items); ok {
		return append(out, &node{op: opIn, items: set})
	}
	return append(out, &node{op: opBranch, parts: items})
}

// prefixed reports whether all sequences begin with the same.
func prefixed(list []sequence) bool {
	for _, s := range list {
		if len(s) == 0 || !same(s[0], list[0][0]) {
			return false
		}
	}
	return true
}

// joined is the set of characters that sequences of one character each are.
func joined(list []sequence) (set []item, ok bool) {
	for _, s := range list {
		switch {
		case len(s) == 1 && s[0].op == opLiteral:
			set = append(set, item{lo: s[0].char, hi: s[0].char})
		case len(s) == 1 && s[0].op == opIn && !s[0].negate:
			set = append(set, s[0].items...)
		default:
			return nil, false
		}
	}
	return set, true
}

// sequence reads up to a bar, a closing parenthesis or the end (_parse); first says that the expression begins here.
func (p *parser) sequence(verbose bool, nested int, first bool) sequence {
	var s sequence
	for p.next.some && !p.next.in("|)") {
		this := p.get()
		switch {
		case verbose && this.in(whitespace):
		case verbose && this.is('#'):
			for p.next.some && !p.next.is('\n') {
				p.advance()
			}
			p.advance()
		case this.escaped:
			s = append(s, p.escape(this))
		case this.is('['):
			s = append(s, p.set())
		case this.in(repeats):
			s = p.repeat(s, this)
		case this.is('.'):
			s = append(s, &node{op: opAny})
		case this.is('('):
			var n *node
			if n, verbose = p.parenthesis(verbose, nested, first && len(s) == 0); n != nil {
				s = append(s, n)
			}
		case this.is('^'), this.is('$'):
			s = append(s, &node{op: opAt, where: this.char})
		default:
			s = append(s, &node{op: opLiteral, char: this.char})
		}
	}
	var out sequence
	for _, n := range s { // groups that do nothing dissolve
		if n.plain() {
			out = append(out, n.body()...)
		} else {
			out = append(out, n)
		}
	}
	return out
}

// plain reports whether a node is a group that only holds things together.
func (n *node) plain() bool { return n.op == opSubpattern && n.group == 0 && n.add == 0 && n.del == 0 }

// repeat reads the rest of a quantifier, and replaces the last node by its repetition.
func (p *parser) repeat(s sequence, this token) sequence {
	here := p.position()
	n := &node{op: opRepeat, how: '*', max: maxRepeat}
	switch this.char {
	case '?':
		n.max = 1
	case '+':
		n.min = 1
	case '{':
		if p.next.is('}') {
			return append(s, &node{op: opLiteral, char: '{'})
		}
		lo := p.while(len(p.text), decimal)
		hi := lo
		if p.match(',') {
			hi = p.while(len(p.text), decimal)
		}
		if !p.match('}') {
			p.seek(here)
			return append(s, &node{op: opLiteral, char: '{'})
		}
		if lo != "" {
			n.min = repetitions(lo)
		}
		if hi != "" {
			if n.max = repetitions(hi); n.max < n.min {
				panic(p.error("min repeat greater than max repeat", p.position()-here))
			}
		}
	}
	from := p.position() - here + 1
	if len(s) == 0 || s[len(s)-1].op == opAt {
		panic(p.error("nothing to repeat", from))
	}
	last := s[len(s)-1]
	if last.op == opRepeat {
		panic(p.error("multiple repeat", from))
	}
	n.parts = []sequence{{last}}
	if last.plain() {
		n.parts = last.parts
	}
	if p.next.in("?+") {
		n.how = p.get().char
	}
	s[len(s)-1] = n
	return s
}

// repetitions is a number of times.
func repetitions(digits string) int64 {
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n >= maxRepeat {
		panic(&syntaxError{ErrMalformed, "the repetition number is too large"})
	}
	return n
}

// set reads a set of characters behind its bracket.
func (p *parser) set() *node {
	here := p.position() - 1
	n := &node{op: opIn, negate: p.match('^')}
	unterminated := func() *syntaxError { return p.error("unterminated character set", p.position()-here) }
	add := func(it item) {
		if !slices.Contains(n.items, it) {
			n.items = append(n.items, it)
		}
	}
	member := func(t token) item {
		switch {
		case !t.some:
			panic(unterminated())
		case t.escaped:
			return p.classEscape(t)
		}
		return item{lo: t.char, hi: t.char}
	}
	for some := false; ; some = true {
		this := p.get()
		if this.is(']') && some {
			break
		}
		lo := member(this)
		if !p.match('-') {
			add(lo)
			continue
		}
		that := p.get()
		if that.is(']') {
			add(lo)
			add(item{lo: '-', hi: '-'})
			break
		}
		hi := member(that)
		if lo.class != 0 || hi.class != 0 || hi.lo < lo.lo {
			panic(p.error(fmt.Sprintf("bad character range %v-%v", this, that), this.length()+1+that.length()))
		}
		add(item{lo: lo.lo, hi: hi.lo, ranged: true})
	}
	if one := n.items[0]; len(n.items) == 1 && one.class == 0 && !one.ranged {
		if n.negate {
			return &node{op: opNotLiteral, char: one.lo}
		}
		return &node{op: opLiteral, char: one.lo}
	}
	return n
}

// parenthesis reads what an opening parenthesis begins; nil is nothing that matches. verbose is as it came, or what
// global flags make of it.
func (p *parser) parenthesis(verbose bool, nested int, first bool) (*node, bool) {
	start := p.position() - 1
	if p.depth++; p.depth > deepest {
		panic(&syntaxError{ErrUnsupported, fmt.Sprintf("groups that nest more than %d deep", deepest)})
	}
	defer func() { p.depth-- }()
	n := &node{op: opSubpattern}
	capture, name := true, ""
	if p.match('?') {
		char := p.get()
		switch {
		case !char.some:
			panic(p.error("unexpected end of pattern", 0))
		case char.is('P') && p.match('<'):
			name = p.until('>', "group name")
			p.checkName(name)
		case char.is('P') && p.match('='):
			return p.namedReference(), verbose
		case char.is('P'):
			if char = p.get(); !char.some {
				panic(p.error("unexpected end of pattern", 0))
			}
			panic(p.error(fmt.Sprintf("unknown extension ?P%v", char), char.length()+2))
		case char.is(':'):
			capture = false
		case char.is('#'):
			for {
				if !p.next.some {
					panic(p.error("missing ), unterminated comment", p.position()-start))
				}
				if p.get().is(')') {
					return nil, verbose
				}
			}
		case char.in("=!<"):
			return p.assertion(char, start, verbose, nested), verbose
		case char.is('('):
			return p.condition(start, verbose, nested), verbose
		case char.is('>'):
			capture, n.op = false, opAtomic
		case char.is('-') || !char.escaped && flagLetters[char.char] != 0:
			global := false
			if n.add, n.del, global = p.inlineFlags(char); global {
				if !first {
					panic(p.error("global flags not at the start of the expression", p.position()-start))
				}
				return nil, p.flags&flagVerbose != 0
			}
			capture = false
		default:
			panic(p.error(fmt.Sprintf("unknown extension ?%v", char), char.length()+1))
		}
	}
	if capture {
		n.group = p.open(name)
	}
	within := (verbose || n.add&flagVerbose != 0) && n.del&flagVerbose == 0
	n.parts = []sequence{p.alternatives(within, nested+1)}
	p.close(start)
	if capture {
		w := widthOf(n.body(), p.widths)
		p.widths[n.group] = &w
	}
	return n, verbose
}

// close takes the parenthesis that ends what began at start.
func (p *parser) close(start int) {
	if !p.match(')') {
		panic(p.error("missing ), unterminated subpattern", p.position()-start))
	}
}

// open gives a group its number.
func (p *parser) open(name string) int {
	group := len(p.widths)
	if had, ok := p.names[name]; ok && name != "" {
		panic(p.error(fmt.Sprintf("redefinition of group name %s as group %d; was group %d", repr(name), group, had),
			count(name)+1))
	}
	if name != "" {
		p.names[name] = group
	}
	p.widths = append(p.widths, nil)
	return group
}

// closed reports whether a group is complete.
func (p *parser) closed(group int) bool { return group < len(p.widths) && p.widths[group] != nil }

// checkName refuses a name of a group that is no identifier.
func (p *parser) checkName(name string) {
	if !isIdentifier(name) {
		panic(p.error("bad character in group name "+repr(name), count(name)+1))
	}
}

// checkBehind refuses references within a look-behind to a group that it has itself, or that is open.
func (p *parser) checkBehind(group int) {
	switch {
	case p.behind == 0:
	case !p.closed(group):
		panic(p.error("cannot refer to an open group", 0))
	case group >= p.behind:
		panic(p.error("cannot refer to group defined in the same lookbehind subpattern", 0))
	}
}

// namedReference reads a back-reference behind its (?P=.
func (p *parser) namedReference() *node {
	name := p.until(')', "group name")
	p.checkName(name)
	group, ok := p.names[name]
	if !ok {
		panic(p.error("unknown group name "+repr(name), count(name)+1))
	}
	if !p.closed(group) {
		panic(p.error("cannot refer to an open group", count(name)+1))
	}
	p.checkBehind(group)
	return &node{op: opGroupRef, group: group}
}

// assertion reads a look-ahead or look-behind behind its first character.
func (p *parser) assertion(char token, start int, verbose bool, nested int) *node {
	n := &node{op: opAssert}
	outside := p.behind
	if char.is('<') {
		switch char = p.get(); {
		case !char.some:
			panic(p.error("unexpected end of pattern", 0))
		case !char.in("=!"):
			panic(p.error(fmt.Sprintf("unknown extension ?<%v", char), char.length()+2))
		}
		n.behind = true
		if p.behind == 0 {
			p.behind = len(p.widths)
		}
	}
	n.negate = char.is('!')
	n.parts = []sequence{p.alternatives(verbose, nested+1)}
	p.behind = outside
	p.close(start)
	return n
}

// condition reads a choice by a group behind its (?(.
func (p *parser) condition(start int, verbose bool, nested int) *node {
	name := p.until(')', "group name")
	length := count(name)
	group, ok := 0, false
	if isIdentifier(name) {
		if group, ok = p.names[name]; !ok {
			panic(p.error("unknown group name "+repr(name), length+1))
		}
	} else {
		number, ok := parseInt(name)
		switch {
		case !ok || number.Sign() < 0:
			panic(p.error("bad character in group name "+repr(name), length+1))
		case number.Sign() == 0:
			panic(p.error("bad group number", length+1))
		case number.Cmp(big.NewInt(maxGroups)) >= 0:
			panic(p.error(fmt.Sprintf("invalid group reference %v", number), length+1))
		}
		group = int(number.Int64())
		if !slices.ContainsFunc(p.refs, func(r reference) bool { return r.group == group }) {
			p.refs = append(p.refs, reference{group, p.position() - length - 1})
		}
	}
	p.checkBehind(group)
	n := &node{op: opGroupRefExists, group: group}
	n.parts = []sequence{p.sequence(verbose, nested+1, false), nil}
	if p.match('|') {
		n.parts[1] = p.sequence(verbose, nested+1, false)
		if p.next.is('|') {
			panic(p.error("conditional backref with more than two branches", 0))
		}
	}
	p.close(start)
	return n
}

// inlineFlags reads flags up to the parenthesis or colon behind them (_parse_flags); global says that they are for the
// whole expression, and have been set.
func (p *parser) inlineFlags(char token) (add, del flags, global bool) {
	// letter is what a token switches, where the end and the characters of then are other than flags.
	next := func(then, missing string) token {
		t := p.get()
		switch {
		case !t.some:
			panic(p.error(missing, 0))
		case t.in(then) || !t.escaped && flagLetters[t.char] != 0:
			return t
		case !t.escaped && unicode.IsLetter(t.char):
			panic(p.error("unknown flag", t.length()))
		}
		panic(p.error(missing, t.length()))
	}
	if !char.is('-') {
		for !char.in(")-:") {
			flag := flagLetters[char.char]
			if flag == flagLocale {
				panic(p.error("bad inline flags: cannot use 'L' flag with a str pattern", 0))
			}
			add |= flag
			if flag&typeFlags != 0 && add&typeFlags != flag {
				panic(p.error("bad inline flags: flags 'a', 'u' and 'L' are incompatible", 0))
			}
			char = next(")-:", "missing -, : or )")
		}
	}
	if char.is(')') {
		p.flags |= add
		return 0, 0, true
	}
	if add&flagTemplate != 0 {
		panic(p.error("bad inline flags: cannot turn on global flag", 1))
	}
	if char.is('-') {
		for char = next("", "missing flag"); !char.is(':'); char = next(":", "missing :") {
			flag := flagLetters[char.char]
			if flag&typeFlags != 0 {
				panic(p.error("bad inline flags: cannot turn off flags 'a', 'u' and 'L'", 0))
			}
			del |= flag
		}
	}
	if del&flagTemplate != 0 {
		panic(p.error("bad inline flags: cannot turn off global flag", 1))
	}
	if add&del != 0 {
		panic(p.error("bad inline flags: flag turned on and off", 1))
	}
	return add, del, false
}

// escape reads the rest of an escape outside of sets (_escape).
func (p *parser) escape(t token) *node {
	switch t.char {
	case 'A', 'b', 'B', 'Z':
		return &node{op: opAt, where: t.char}
	case 'd', 'D', 's', 'S', 'w', 'W':
		return &node{op: opIn, items: []item{{class: t.char}}}
	case '0':
		return &node{op: opLiteral, char: octalValue("0" + p.while(2, octal))}
	}
	if strings.ContainsRune(decimal, t.char) {
		digits := string(t.char)
		if p.next.in(decimal) {
			digits += string(p.get().char)
			if strings.Trim(digits, octal) == "" && p.next.in(octal) {
				return &node{op: opLiteral, char: p.octal(digits + string(p.get().char))}
			}
		}
		group, _ := strconv.Atoi(digits)
		switch {
		case group >= len(p.widths):
			panic(p.error(fmt.Sprintf("invalid group reference %d", group), len(digits)))
		case !p.closed(group):
			panic(p.error("cannot refer to an open group", len(digits)+1))
		}
		p.checkBehind(group)
		return &node{op: opGroupRef, group: group}
	}
	return &node{op: opLiteral, char: p.characterEscape(t)}
}

// classEscape reads the rest of an escape in a set (_class_escape).
func (p *parser) classEscape(t token) item {
	var char rune
	switch {
	case strings.ContainsRune("dDsSwW", t.char):
		return item{class: t.char}
	case strings.ContainsRune(octal, t.char):
		char = p.octal(string(t.char) + p.while(2, octal))
	case strings.ContainsRune(decimal, t.char):
		panic(p.error(fmt.Sprintf("bad escape %v", t), 2))
	default:
		char = p.characterEscape(t)
	}
	return item{lo: char, hi: char}
}

// characterEscape reads the rest of an escape that means one character, wherever it stands.
func (p *parser) characterEscape(t token) rune {
	if char, ok := escapes[t.char]; ok {
		return char
	}
	switch t.char {
	case 'x':
		return p.hex(t, 2)
	case 'u':
		return p.hex(t, 4)
	case 'U':
		return p.hex(t, 8)
	case 'N':
		if !p.match('{') {
			panic(p.error("missing {", 0))
		}
		start := p.position() - 3
		name := p.until('}', "character name")
		panic(&syntaxError{ErrUnsupported, fmt.Sprintf(`a character by its name, \N{%s}, at position %d`, name, start)})
	}
	if t.char < unicode.MaxASCII && unicode.IsLetter(t.char) {
		panic(p.error(fmt.Sprintf("bad escape %v", t), 2))
	}
	return t.char
}

// hex reads the digits of an escape, all of which must be there.
func (p *parser) hex(t token, digits int) rune {
	text := p.while(digits, hexadecimal)
	if len(text) < digits {
		panic(p.error(fmt.Sprintf("incomplete escape %v%s", t, text), 2+len(text)))
	}
	value, _ := strconv.ParseUint(text, 16, 32)
	switch {
	case value > math.MaxInt32:
		panic(&syntaxError{ErrMalformed, "Python int too large to convert to C int"})
	case value > unicode.MaxRune:
		panic(p.error(fmt.Sprintf("bad escape %v%s", t, text), 2+len(text)))
	}
	return rune(value)
}

// octal is the value of an escape of one to three digits.
func (p *parser) octal(digits string) rune {
	value := octalValue(digits)
	if value > 0o377 {
		panic(p.error(fmt.Sprintf(`octal escape value \%s outside of range 0-0o377`, digits), len(digits)+1))
	}
	return value
}

func octalValue(digits string) rune {
	value, _ := strconv.ParseInt(digits, 8, 32)
	return rune(value)
}
