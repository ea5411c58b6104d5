package pipeline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/tensor"
)

// globs matches whole tensor names. * stands for any characters, dots included, ? for one.
type globs []string

func (g globs) match(name string) bool {
	for _, pattern := range g {
		if matchGlob(pattern, name) {
			return true
		}
	}
	return false
}

// matchGlob goes back to the last star only, so it takes at most len(pattern) times len(name) steps.
func matchGlob(pattern, name string) bool {
	p, n := 0, 0
	star, mark := -1, 0
	for n < len(name) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, n
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == name[n]):
			p++
			n++
		case star >= 0:
			mark++
			p, n = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// unmatched is an error where a glob matches no weight: most likely a mistake.
func (g globs) unmatched(what string, weights []*Weight) error {
	for _, pattern := range g {
		found := false
		for _, w := range weights {
			found = matchGlob(pattern, w.Name) ||
				slices.ContainsFunc(w.made, func(name string) bool { return matchGlob(pattern, name) })
			if found {
				break
			}
		}
		if !found {
			return fmt.Errorf("%w: %s %s matches none of the %d tensors%s", ErrRefused, what, tensor.Quote(pattern),
				len(weights), meant(pattern, weights))
		}
	}
	return nil
}

// meant suggests for a glob that matches nothing another word between its dots, where no name has that one.
func meant(pattern string, weights []*Weight) string {
	var words []string
	known := map[string]bool{}
	for _, w := range weights {
		for word := range strings.SplitSeq(w.Name, ".") {
			if !known[word] {
				known[word] = true
				words = append(words, word)
			}
		}
	}
	for word := range strings.SplitSeq(pattern, ".") {
		if !known[word] && !strings.ContainsAny(word, "*?") {
			return nearest.Suggestion(word, words)
		}
	}
	return ""
}
