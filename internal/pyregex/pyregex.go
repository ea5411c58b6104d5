// Package pyregex matches regular expressions as Python's re does (CPython 3.11, on str), by the engine of regexp2,
// which is that of .NET. An expression is read by the rules of Python and written anew by those of regexp2, so that
// what the two understand otherwise, as named groups, \w, \Z, the case of letters and look-behinds, means what it
// means in Python, and what is wrong there is wrong here, in the same words.
//
// Expressions may come from a file of a stranger: how long they are, how deep they nest and how long a match takes is
// bounded.
package pyregex

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/dlclark/regexp2/v2"
)

// The kinds of errors.
var (
	// ErrMalformed is what Python's re refuses. Behind it stands what Python says.
	ErrMalformed = errors.New("refused by Python")
	// ErrUnsupported is what Python takes, and this package does not. Behind it stands the construct.
	ErrUnsupported = errors.New("not supported")
	// ErrTimeout is a match that takes most of a second, or more memory than an honest expression needs.
	ErrTimeout = errors.New("takes too long")
)

const (
	patience    = 250 * time.Millisecond // how long one match may take, by the clock
	tries       = 3                      // the clock goes on while other programs have the processor
	longest     = 16 << 10               // bytes of an expression
	mostWritten = 256 << 10              // bytes of what it becomes
	mostStack   = 1 << 20                // integers that the engine keeps to go back to
)

// syntaxError is why an expression is not compiled.
type syntaxError struct {
	kind    error
	message string
}

func (e *syntaxError) Error() string {
	const most = 200
	var b strings.Builder
	for _, c := range e.message { // parts of the expression may stand in it
		if b.WriteString(printable(c)); b.Len() > most {
			b.WriteString("…")
			break
		}
	}
	return e.kind.Error() + ": " + b.String()
}

func (e *syntaxError) Unwrap() error { return e.kind }

// caught turns a panic with a syntaxError into an error.
func caught(err *error) {
	switch r := recover().(type) {
	case nil:
	case *syntaxError:
		*err = r
	default:
		panic(r)
	}
}

// Regexp is a compiled expression. Several goroutines may use it at once.
type Regexp struct {
	names map[string]int
	folds bool // it compares with what a group has matched, and ignores case
	// whole and start are the programs of FullMatch and Match, made when they are first asked for.
	whole, start func() (*regexp2.Regexp, error)
}

// Compile compiles an expression as re.compile does. It returns ErrMalformed with the words of Python, or
// ErrUnsupported with the name of the construct.
func Compile(expr string) (re *Regexp, err error) {
	switch {
	case len(expr) > longest:
		return nil, &syntaxError{ErrUnsupported,
			fmt.Sprintf("an expression of %d bytes, expected at most %d", len(expr), longest)}
	case !utf8.ValidString(expr):
		return nil, &syntaxError{ErrMalformed, "the expression is not valid UTF-8"}
	}
	p, s, err := parse(expr)
	if err != nil {
		return nil, err
	}
	w := &writer{groups: p.widths}
	if err := w.write(s, p.flags); err != nil {
		return nil, err
	}
	start := `\A(?:` + w.String() + `)`
	return &Regexp{p.names, w.folds, program(start + `\z`), program(start)}, nil
}

// program compiles what a writer has written when it is first asked for.
func program(expr string) func() (*regexp2.Regexp, error) {
	return sync.OnceValues(func() (*regexp2.Regexp, error) {
		re, err := regexp2.Compile(expr, regexp2.OptionMaxBacktrackingStackSize(mostStack))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		re.MatchTimeout = patience
		return re, nil
	})
}

// FullMatch is re.fullmatch: the whole string matches. It returns nil where it does not.
func (re *Regexp) FullMatch(s string) (*Match, error) { return re.run(re.whole, s) }

// Match is re.match: some beginning of the string matches. It returns nil where none does.
func (re *Regexp) Match(s string) (*Match, error) { return re.run(re.start, s) }

func (re *Regexp) run(program func() (*regexp2.Regexp, error), s string) (*Match, error) {
	if re.folds && strings.ContainsFunc(s, func(c rune) bool { return c >= utf8.RuneSelf }) {
		return nil, fmt.Errorf("%w: a back-reference that ignores case, on what is not ASCII", ErrUnsupported)
	}
	engine, err := program()
	if err != nil {
		return nil, err
	}
	for range tries {
		m, err := engine.FindStringMatch(s)
		switch {
		case errors.Is(err, regexp2.ErrBacktrackingStackLimit):
			return nil, ErrTimeout
		case err != nil: // the time is over
			continue
		case m == nil:
			return nil, nil
		}
		return &Match{re, m}, nil
	}
	return nil, ErrTimeout
}

// Match is what an expression has matched.
type Match struct {
	re *Regexp
	m  *regexp2.Match
}

// Group is what a named group has matched last, if it has.
func (m *Match) Group(name string) (text string, ok bool) {
	number, ok := m.re.names[name]
	if !ok {
		return "", false
	}
	g := m.m.GroupByNumber(number)
	return g.String(), len(g.Captures) > 0
}
