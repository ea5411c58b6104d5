package models

import (
	"iter"
	"strconv"
	"strings"
)

// name is a dotted name taken apart: its numbers are set aside, so that all layers and experts share one pattern and a
// look-up is one map access.
type name struct {
	full    string
	pattern string // every part that is a number replaced by #
	numbers []string
	ends    []end // where each part ends
}

type end struct{ full, pattern, numbers int }

func split(full string) name {
	n := name{full: full, ends: make([]end, 0, 8)}
	var b strings.Builder
	for at := 0; ; {
		next := strings.IndexByte(full[at:], '.')
		stop := len(full)
		if next >= 0 {
			stop = at + next
		}
		part := full[at:stop]
		if isNumber(part) {
			n.numbers = append(n.numbers, part)
			part = "#"
		}
		b.WriteString(part)
		n.ends = append(n.ends, end{stop, b.Len(), len(n.numbers)})
		if next < 0 {
			break
		}
		b.WriteByte('.')
		at = stop + 1
	}
	n.pattern = b.String()
	return n
}

// before returns how many numbers the first parts have.
func (n name) before(parts int) int {
	if parts == 0 {
		return 0
	}
	return n.ends[parts-1].numbers
}

func isNumber(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// fill puts numbers in the places of a pattern, in order: # is the next one, #+1 the next one and 1. The number at
// skip is passed over.
func fill(pattern string, numbers []string, skip int) string {
	if !strings.Contains(pattern, "#") {
		return pattern
	}
	parts := strings.Split(pattern, ".")
	next := 0
	for i, p := range parts {
		if !strings.HasPrefix(p, "#") {
			continue
		}
		if next == skip {
			next++
		}
		if next >= len(numbers) {
			break
		}
		parts[i] = numbers[next]
		if p != "#" {
			n, err1 := strconv.Atoi(numbers[next])
			d, err2 := strconv.Atoi(p[1:])
			if err1 == nil && err2 == nil {
				parts[i] = strconv.Itoa(n + d)
			}
		}
		next++
	}
	return strings.Join(parts, ".")
}

// table finds values by patterns in which some numbers may be given.
type table[V any] map[string][]entry[V]

// anyRank stands for a tensor's rank where it is not known or does not matter.
const anyRank = -1

type entry[V any] struct {
	given map[int]string // place among the numbers -> what it must be
	rank  int
	value V
}

// add files v under a pattern whose parts are names, numbers or #.
func (t table[V]) add(pattern string, rank int, v V) {
	parts := strings.Split(pattern, ".")
	given, place := map[int]string{}, 0
	for i, p := range parts {
		switch {
		case p == "#":
			place++
		case isNumber(p):
			given[place] = p
			parts[i] = "#"
			place++
		}
	}
	key := strings.Join(parts, ".")
	t[key] = append(t[key], entry[V]{given, rank, v})
}

// find returns the value for the first parts of a name. Where several patterns fit, the one with the most numbers
// given decides.
func (t table[V]) find(n name, parts, rank int) (V, bool) {
	key := ""
	if parts > 0 {
		key = n.pattern[:n.ends[parts-1].pattern]
	}
	var best *entry[V]
	entries := t[key]
	for i := range entries {
		e := &entries[i]
		if e.rank != rank && e.rank != anyRank && rank != anyRank || best != nil && len(best.given) >= len(e.given) {
			continue
		}
		fits := true
		for place, want := range e.given {
			fits = fits && n.numbers[place] == want
		}
		if fits {
			best = e
		}
	}
	if best == nil {
		var zero V
		return zero, false
	}
	return best.value, true
}

// expand yields what a line with braces stands for: a.{b,c.{d,e}}.f is a.b.f, a.c.d.f and a.c.e.f.
func expand(line string) iter.Seq[string] {
	return func(yield func(string) bool) { expandTo("", line, yield) }
}

func expandTo(done, line string, yield func(string) bool) bool {
	open := strings.IndexByte(line, '{')
	if open < 0 {
		return yield(done + line)
	}
	depth, start := 0, open+1
	var choices []string
	for i := open; i < len(line); i++ {
		switch line[i] {
		case '{':
			depth++
		case ',':
			if depth == 1 {
				choices = append(choices, line[start:i])
				start = i + 1
			}
		case '}':
			if depth--; depth == 0 {
				choices = append(choices, line[start:i])
				for _, c := range choices {
					if !expandTo(done+line[:open], c+line[i+1:], yield) {
						return false
					}
				}
				return true
			}
		}
	}
	return yield(done + line) // an unclosed brace is a plain character
}
