package bnb

import (
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/pyregex"

	"github.com/lorakit/lorakit/quant"
)

// Declaration reads the quantization_config that Config writes, and that of older releases, which has no quant_method.
// A list of llm_int8_skip_modules replaces the loader's own choice.
func (Scheme) Declaration(config []byte) (quant.Declaration, bool) {
	var c struct {
		Method   string         `json:"quant_method"`
		FourBit  bool           `json:"load_in_4bit"`
		EightBit bool           `json:"load_in_8bit"`
		Skips    jsontext.Value `json:"llm_int8_skip_modules"`
	}
	if json.Unmarshal(config, &c) != nil {
		return quant.Declaration{}, false
	}
	if old := c.Method == "" && (c.FourBit || c.EightBit); !old && c.Method != (Scheme{}).Name() {
		return quant.Declaration{}, false
	}
	var p quant.Declaration
	var entries []string
	if json.Unmarshal(c.Skips, &entries) == nil && entries != nil {
		p.Skips = newSkipList(entries).matches
	}
	return p, true
}

// skipList is an llm_int8_skip_modules. By transformers' rule an entry is a regular expression that matches from the
// start of a module's name up to a dot, or any suffix of it.
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
