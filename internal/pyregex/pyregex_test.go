package pyregex

import (
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"
)

// golden is what Python says, by fixtures/generate/pyregex.py.
type golden struct {
	Groups      []goldenGroup       `json:"groups"`
	Assigned    [][2]rune           `json:"assigned"`   // the characters that its Unicode knows
	Characters  [][2]jsontext.Value `json:"characters"` // an expression, and the runs of characters that it matches
	Letters     string              `json:"letters"`    // all that have a case
	Folds       []string            `json:"folds"`      // those that each of them matches under (?i)
	Identifiers [2][][2]rune        `json:"identifiers"`
}

type goldenGroup struct {
	Kind     string              `json:"kind"`
	Subjects []string            `json:"subjects"`
	Cases    [][2]jsontext.Value `json:"cases"` // an expression, and why it is refused or what it finds
}

func read(t *testing.T) (g golden) {
	t.Helper()
	file, err := os.Open("../../fixtures/pyregex/cases.json.gz")
	require.NoError(t, err)
	defer file.Close()
	r, err := gzip.NewReader(file)
	require.NoError(t, err)
	require.NoError(t, json.UnmarshalRead(r, &g))
	return g
}

// TestPython compares expressions with what Python finds by them, and with what it says of wrong ones.
func TestPython(t *testing.T) {
	for _, g := range read(t).Groups {
		t.Run(g.Kind, func(t *testing.T) {
			require.NotEmpty(t, g.Cases)
			missing := 0
			for _, c := range g.Cases {
				var expr, refused string
				var found [][2]*string // by subject what FullMatch and Match find
				require.NoError(t, json.Unmarshal(c[0], &expr))
				if json.Unmarshal(c[1], &refused) != nil {
					require.NoError(t, json.Unmarshal(c[1], &found))
				}
				re, err := Compile(expr)
				if errors.Is(err, ErrUnsupported) {
					missing++ // none that a person has written
					require.True(t, g.Kind == "random" || g.Kind == "scrambled", "%q: %v", expr, err)
					continue
				}
				if refused != "" {
					require.ErrorIs(t, err, ErrMalformed, "%q: Python says: %s", expr, refused)
					require.Equal(t, (&syntaxError{ErrMalformed, refused}).Error(), err.Error(), "%q", expr)
					continue
				}
				require.NoError(t, err, "%q", expr)
				for i, subject := range g.Subjects {
					for mode, match := range []func(string) (*Match, error){re.FullMatch, re.Match} {
						m, err := match(subject)
						if errors.Is(err, ErrUnsupported) { // a back-reference that ignores case
							require.Greater(t, len(subject), count(subject), "%q: %v", expr, err)
							continue
						}
						require.NoError(t, err, "%q on %q", expr, subject)
						want := "nothing"
						if text := found[i][mode]; text != nil {
							want = *text
						}
						if got := spans(m); !agrees(got, want) {
							t.Fatalf("%q on %q finds %s, in Python %s", expr, subject, got, want)
						}
					}
				}
			}
			require.Less(t, missing, len(g.Cases)/16+2)
		})
	}
}

// spans writes a match as the fixture does: the ends of the whole and of each group that has matched.
func spans(m *Match) string {
	if m == nil {
		return "nothing"
	}
	var list []string
	for _, g := range m.m.Groups() {
		if len(g.Captures) == 0 {
			list = append(list, "")
		} else {
			list = append(list, fmt.Sprintf("%d,%d", g.RuneIndex, g.RuneIndex+g.RuneLength))
		}
	}
	return strings.Join(list, ";")
}

// agrees compares what is found with what Python finds, which is not sure of all groups.
func agrees(got, want string) bool {
	same := func(a, b string) bool { return a == b || b == "?" }
	return slices.EqualFunc(strings.Split(got, ";"), strings.Split(want, ";"), same)
}

func spansOf(runs [][2]rune) []span {
	var spans []span
	for _, r := range runs {
		spans = append(spans, span{r[0], r[1]})
	}
	return spans
}

// characters are those of some runs.
func characters(runs [][2]rune) []rune {
	var list []rune
	for _, r := range runs {
		for c := r[0]; c <= r[1]; c++ {
			list = append(list, c)
		}
	}
	return list
}

// TestCharacters looks for every character of Unicode in classes and sets, with case and without.
func TestCharacters(t *testing.T) {
	g := read(t)
	assigned := characters(g.Assigned)
	for _, c := range g.Characters {
		var expr string
		var runs [][2]rune
		require.NoError(t, json.Unmarshal(c[0], &expr))
		require.NoError(t, json.Unmarshal(c[1], &runs))
		onlyMatches(t, expr, assigned, spansOf(runs))
	}
	require.Len(t, g.Folds, count(g.Letters))
	known := spansOf(g.Assigned)
	for i, c := range []rune(g.Letters) {
		var found []rune
		for _, s := range folded(c, flagIgnoreCase|flagUnicode) {
			for o := s.lo; o <= s.hi; o++ {
				if contains(known, o) {
					found = append(found, o)
				}
			}
		}
		require.Equal(t, g.Folds[i], string(found), "%q", c)
	}
}

// onlyMatches checks that an expression of one character matches some characters, and no others.
func onlyMatches(t *testing.T, expr string, all []rune, in []span) {
	t.Helper()
	flags, set := "", expr
	if strings.HasPrefix(expr, "(?") {
		flags, set = expr[:strings.Index(expr, ")")+1], expr[strings.Index(expr, ")")+1:]
	}
	var yes, no []rune
	for _, c := range all {
		if contains(in, c) {
			yes = append(yes, c)
		} else {
			no = append(no, c)
		}
	}
	require.NotEmpty(t, yes, expr)
	check := func(expr string, chars []rune) {
		re, err := Compile(expr)
		require.NoError(t, err)
		for part := range slices.Chunk(chars, 4096) {
			m, err := re.Match(string(part))
			require.NoError(t, err, expr)
			require.NotNil(t, m)
			if end := m.m.RuneLength; end < len(part) {
				t.Errorf("%s does not match %q", expr, part[end])
			}
		}
	}
	check(flags+set+"*+", yes)
	check(flags+"(?:(?!"+set+")(?s:.))*+", no)
}

// TestIdentifiers knows which names groups can have.
func TestIdentifiers(t *testing.T) {
	g := read(t)
	for i, before := range []string{"", "a"} {
		in := spansOf(g.Identifiers[i])
		for _, c := range characters(g.Assigned) {
			if is := contains(in, c); is != isIdentifier(before+string(c)) {
				t.Errorf("%s%q: %v in Python", before, c, is)
			}
		}
	}
}

// TestUnsupported refuses by its own name what Python takes and this package does not.
func TestUnsupported(t *testing.T) {
	const (
		within = "not supported: a condition on a group that it is in, and that is repeated or has other groups"
		spoilt = "not supported: a reference to a group that a possessive quantifier repeats"
		many   = "not supported: an expression of so many parts"
	)
	for expr, says := range map[string]string{
		`a\N{EM DASH}`:                  `not supported: a character by its name, \N{EM DASH}, at position 1`,
		`[\N{DIGIT ONE}]`:               `not supported: a character by its name, \N{DIGIT ONE}, at position 1`,
		`(?P<x>a(?(x)b|c))+`:            within,
		`((b)(?(1)b|c))`:                within,
		`(?:(a)|b)*+(?(1)c|d)`:          spoilt,
		`(a|b)++\1`:                     spoilt,
		`(?:(a)?+b)*\1`:                 spoilt,
		strings.Repeat("(", 500) + "a":  "not supported: groups that nest more than 495 deep",
		strings.Repeat("a", longest+1):  "not supported: an expression of 16385 bytes, expected at most 16384",
		strings.Repeat(`\b`, longest/2): many,
		strings.Repeat("(?:a?", 40) + strings.Repeat("){1,}", 40): many,
	} {
		_, err := Compile(expr)
		require.ErrorIs(t, err, ErrUnsupported)
		require.NotErrorIs(t, err, ErrMalformed)
		require.EqualError(t, err, says)
	}
	re, err := Compile(`(?i)(.)\1`)
	require.NoError(t, err)
	m, err := re.FullMatch("aA")
	require.NoError(t, err)
	require.NotNil(t, m)
	_, err = re.FullMatch("éÉ")
	require.EqualError(t, err, "not supported: a back-reference that ignores case, on what is not ASCII")
	_, err = Compile("a\xff")
	require.EqualError(t, err, "refused by Python: the expression is not valid UTF-8")
}

// TestGroup finds what a named group has matched last.
func TestGroup(t *testing.T) {
	re, err := Compile(`(.)(?P<layer>\d+)?(?:(?P<name>[a-z])\.?)*`)
	require.NoError(t, err)
	for text, want := range map[string][2]string{
		"h12": {"12", "-"}, "h": {"-", "-"}, "xab.c": {"-", "c"}, "é1q": {"1", "q"},
	} {
		m, err := re.FullMatch(text)
		require.NoError(t, err)
		for i, name := range []string{"layer", "name"} {
			got, ok := m.Group(name)
			if !ok {
				got = "-"
			}
			require.Equal(t, want[i], got, text)
		}
		_, ok := m.Group("other")
		require.False(t, ok)
	}
}

// TestBounded ends in good time for expressions that are made to be long, deep or slow.
func TestBounded(t *testing.T) {
	nest := func(open, close string, n int) string {
		return strings.Repeat(open, n) + "a" + strings.Repeat(close, n)
	}
	fill := func(part string) string { return strings.Repeat(part, longest/len(part)) }
	for _, expr := range []string{
		nest("(", ")", deepest), nest("(?:", ")*", deepest), nest("(", ")*", deepest), nest("(?=", ")", deepest),
		nest("(?<=", ")", deepest), nest("(?>", ")", deepest), nest("(?:", "){2}", deepest),
		nest("(?:b", "){1,1000}", deepest), nest("(?:", ")*+", deepest), nest("(|", ")+", deepest),
		nest("(?:a|", ")", deepest), nest("(", "|b)*", deepest),
		fill("a*"), fill("(a*)*"), fill("(?:a|b)*"), fill("(?:ab|cd)"), fill("abc|abd|"), fill("[^a]*b"), fill(".*?x"),
		fill(`\w*`), fill(`\B`), fill("(?<!ab)"), fill("a*+"), "(a)" + fill(`\1`)[4:],
		"(?i)" + strings.Repeat("k", longest-4), "(?i)" + strings.Repeat("[!-\ufdff]", 1000),
		"(a+)+b", `(\w+\.?)+!`, "(?:){4294967294}", "(){4294967294}", "(a?){4294967294}",
		"(?:(?:(?:a?){1000}){1000}){1000}", "(?:a{4294967294}){4294967294}", "a{4294967294}b|a*", "(?:(?:a|a)*)*c",
		"(?=(a*)*c)|b", "(?<=" + strings.Repeat("a", 1000) + ")b",
	} {
		re, err := Compile(expr)
		if err != nil {
			require.ErrorIs(t, err, ErrUnsupported, "%.40q", expr)
			continue
		}
		for _, match := range []func(string) (*Match, error){re.FullMatch, re.Match} {
			if _, err := match(strings.Repeat("a", 40) + ".layers.0.self_attn.q_proj"); err != nil {
				require.ErrorIs(t, err, ErrTimeout, "%.40q", expr)
				break
			}
		}
	}
}

// FuzzCompile compiles any expression or says why not, and what it compiles has an engine.
func FuzzCompile(f *testing.F) {
	for _, expr := range []string{
		`.*\.(?P<x>[a-z])_(?P<y>proj)(?<!lm_head)`, `(?i)[^\W_]{,2}+(?(1)a|b)(c)`, "(?x) a # b\n*",
		`(?<=(a|b){2})\1\Z`, `[]\d-]`, `(?s-i:\u0061|\x41)`, `(?:(?>a+)|()){2,3}?$`, `(?P<a>b)(?P=a)`, `\N{x}`,
		`a{1,2}{3}`, `(?aL)`, `[b-a]`, `\400`, "(a\n",
	} {
		f.Add(expr, "model.layers.0.q_proj")
	}
	f.Fuzz(func(t *testing.T, expr, subject string) {
		subject = subject[:min(len(subject), 100)]
		re, err := Compile(expr)
		if err != nil {
			require.True(t, errors.Is(err, ErrMalformed) != errors.Is(err, ErrUnsupported), "%q: %v", expr, err)
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, len(err.Error()), 300)
			return
		}
		full, err := re.FullMatch(subject)
		if errors.Is(err, ErrUnsupported) {
			require.True(t, re.folds, "%q: %v", expr, err)
		}
		m, err := re.Match(subject)
		require.True(t, full == nil || m != nil || err != nil, "%q on %q: the whole matches, and no beginning", expr, subject)
	})
}
