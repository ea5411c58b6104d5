package pyregex

import (
	"fmt"
	"math/big"
	"strings"
	"unicode"
)

// isIdentifier is Python's str.isidentifier: XID_Start or an underscore, then XID_Continue.
func isIdentifier(s string) bool {
	for i, c := range s {
		switch {
		case unicode.Is(notXID, c):
			return false
		case c == '_' || unicode.IsLetter(c) || unicode.In(c, unicode.Nl, unicode.Other_ID_Start):
			if i == 0 && unicode.Is(notXIDStart, c) {
				return false
			}
		case i > 0 && unicode.In(c, unicode.Mn, unicode.Mc, unicode.Nd, unicode.Pc, unicode.Other_ID_Continue):
		default:
			return false
		}
	}
	return s != ""
}

// What normalising (NFKC) turns into something that identifiers cannot have, or cannot begin with: the properties
// with an X are those without it but for these.
var (
	notXID = &unicode.RangeTable{R16: []unicode.Range16{
		{Lo: 0x37a, Hi: 0x37a, Stride: 1}, {Lo: 0x2e2f, Hi: 0x2e2f, Stride: 1}, {Lo: 0x309b, Hi: 0x309c, Stride: 1},
		{Lo: 0xfc5e, Hi: 0xfc63, Stride: 1}, {Lo: 0xfdfa, Hi: 0xfdfb, Stride: 1}, {Lo: 0xfe70, Hi: 0xfe7e, Stride: 2},
	}}
	notXIDStart = &unicode.RangeTable{R16: []unicode.Range16{
		{Lo: 0xe33, Hi: 0xe33, Stride: 1}, {Lo: 0xeb3, Hi: 0xeb3, Stride: 1}, {Lo: 0xff9e, Hi: 0xff9f, Stride: 1},
	}}
)

// parseInt is Python's int of a string: digits of any script, single underscores between them, a sign, and space
// around.
func parseInt(s string) (*big.Int, bool) {
	const most = 4300 // digits, by sys.set_int_max_str_digits
	s = strings.TrimFunc(s, func(c rune) bool { return contains(spaces, c) })
	var b strings.Builder
	after := '_' // an underscore stands between digits
	digits := 0
	for i, c := range s {
		switch {
		case i == 0 && (c == '-' || c == '+'):
			b.WriteRune(c)
			continue
		case c == '_' && after != '_':
		case unicode.Is(unicode.Nd, c):
			b.WriteRune('0' + digitValue(c))
			digits++
		default:
			return nil, false
		}
		after = c
	}
	if after == '_' || digits > most {
		return nil, false
	}
	return new(big.Int).SetString(b.String(), 10)
}

// digitValue is the value of a decimal digit of any script: they stand in a row, from zero to nine.
func digitValue(c rune) rune {
	for _, r := range unicode.Nd.R16 {
		if c <= rune(r.Hi) && c >= rune(r.Lo) {
			return (c - rune(r.Lo)) % 10
		}
	}
	for _, r := range unicode.Nd.R32 {
		if c <= rune(r.Hi) && c >= rune(r.Lo) {
			return (c - rune(r.Lo)) % 10
		}
	}
	return 0
}

// repr is Python's repr of a string.
func repr(s string) string {
	quote := `'`
	if strings.Contains(s, `'`) && !strings.Contains(s, `"`) {
		quote = `"`
	}
	var b strings.Builder
	b.WriteString(quote)
	for _, c := range s {
		if c == '\\' || string(c) == quote {
			b.WriteByte('\\')
			b.WriteRune(c)
		} else {
			b.WriteString(printable(c))
		}
	}
	return b.String() + quote
}

// printable is a character, or an escape of it in Python where it cannot be printed.
func printable(c rune) string {
	switch {
	case unicode.IsPrint(c):
		return string(c)
	case c == '\n':
		return `\n`
	case c == '\r':
		return `\r`
	case c == '\t':
		return `\t`
	case c <= 0xff:
		return fmt.Sprintf(`\x%02x`, c)
	case c <= 0xffff:
		return fmt.Sprintf(`\u%04x`, c)
	}
	return fmt.Sprintf(`\U%08x`, c)
}
