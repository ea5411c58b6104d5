package pyregex

import (
	"fmt"
	"strings"
)

// token is a character of an expression, or a backslash and the character behind it. The zero token is the end.
type token struct {
	char    rune
	escaped bool
	some    bool
}

// is reports whether a token is a character without a backslash.
func (t token) is(char rune) bool { return t.some && !t.escaped && t.char == char }

// in reports whether a token is one of some characters without a backslash.
func (t token) in(chars string) bool {
	return t.some && !t.escaped && strings.ContainsRune(chars, t.char)
}

// length is how many characters of the expression a token is.
func (t token) length() int {
	switch {
	case !t.some:
		return 0
	case t.escaped:
		return 2
	}
	return 1
}

func (t token) String() string {
	switch {
	case !t.some:
		return ""
	case t.escaped:
		return `\` + string(t.char)
	}
	return string(t.char)
}

// source hands out the tokens of an expression, as the Tokenizer of Python's re._parser does. Positions count
// characters.
type source struct {
	text  []rune
	index int   // behind next
	next  token // what get returns
}

func newSource(expr string) *source {
	s := &source{text: []rune(expr)}
	s.advance()
	return s
}

func (s *source) advance() {
	if s.index >= len(s.text) {
		s.next = token{}
		return
	}
	s.next = token{char: s.text[s.index], some: true}
	if s.next.char == '\\' {
		if s.index++; s.index == len(s.text) {
			panic(s.at("bad escape (end of pattern)", len(s.text)-1))
		}
		s.next = token{char: s.text[s.index], escaped: true, some: true}
	}
	s.index++
}

func (s *source) get() token {
	t := s.next
	s.advance()
	return t
}

// match takes the next token if it is a character.
func (s *source) match(char rune) bool {
	if !s.next.is(char) {
		return false
	}
	s.advance()
	return true
}

// while takes up to n tokens that are among some characters.
func (s *source) while(n int, chars string) string {
	var b strings.Builder
	for ; n > 0 && s.next.in(chars); n-- {
		b.WriteRune(s.get().char)
	}
	return b.String()
}

// until takes everything before a terminator, and the terminator; name is what it is called.
func (s *source) until(terminator rune, name string) string {
	var b strings.Builder
	for {
		t := s.get()
		switch {
		case !t.some && b.Len() == 0:
			panic(s.error("missing "+name, 0))
		case !t.some:
			panic(s.error(fmt.Sprintf("missing %c, unterminated name", terminator), count(b.String())))
		case t.is(terminator) && b.Len() == 0:
			panic(s.error("missing "+name, 1))
		case t.is(terminator):
			return b.String()
		}
		b.WriteString(t.String())
	}
}

// position is where the next token begins.
func (s *source) position() int { return s.index - s.next.length() }

func (s *source) seek(position int) {
	s.index = position
	s.advance()
}

// error is one that began some characters before the next token.
func (s *source) error(message string, before int) *syntaxError {
	return s.at(message, s.position()-before)
}

// at is an error at a position, in the words of Python's re.error.
func (s *source) at(message string, position int) *syntaxError {
	line, column := 1, position+1
	several := false
	for i, c := range s.text {
		if c != '\n' {
			continue
		}
		several = true
		if i < position {
			line, column = line+1, position-i
		}
	}
	where := fmt.Sprintf("%s at position %d", message, position)
	if several {
		where = fmt.Sprintf("%s (line %d, column %d)", where, line, column)
	}
	return &syntaxError{ErrMalformed, where}
}

func count(s string) int { return len([]rune(s)) }
