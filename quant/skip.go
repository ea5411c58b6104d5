package quant

import (
	"strings"
	"time"

	"github.com/lorakit/lorakit/internal/pyregex"
)

// SkipList reports which modules a list in a quantization_config leaves plain, by transformers' rule: an entry is a
// regular expression that matches from the start of a module's name up to a dot, or any suffix of it. Where an
// expression cannot be run, all are.
func SkipList(entries []string) func(module string) bool { return newSkipList(entries).matches }

// skipList is such a list.
type skipList struct {
	names    map[string]bool
	patterns []*pyregex.Regexp
	unknown  bool          // an expression cannot be compiled, or takes too long
	patience time.Duration // what is left for expressions, which are from a file
}

func newSkipList(entries []string) *skipList {
	l := &skipList{names: make(map[string]bool, len(entries)), patience: 10 * time.Second}
	for _, e := range entries {
		l.names[e] = true
		if strings.Trim(e, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.") == "" {
			continue // a name: as an expression, its dots would match a little more
		}
		start := time.Now()
		re, err := pyregex.Compile(`(?:` + e + `)(?:(?<=\.)|(?=\.|$))`)
		if l.patience -= time.Since(start); err != nil || l.patience <= 0 {
			l.unknown = true
		} else {
			l.patterns = append(l.patterns, re)
		}
	}
	return l
}

func (l *skipList) matches(module string) bool {
	for i := range len(module) {
		if l.names[module[i:]] || module[i] == '.' && l.names[module[:i]] {
			return true
		}
	}
	for _, re := range l.patterns {
		if l.unknown {
			break
		}
		start := time.Now()
		m, err := re.Match(module)
		if err == nil && m != nil {
			return true
		}
		if l.patience -= time.Since(start); err != nil || l.patience <= 0 {
			l.unknown = true
		}
	}
	return l.unknown // then there is no finding
}
