package main

import (
	"cmp"
	"strings"
	"unicode"

	"github.com/lorakit/lorakit"
)

// withHints is the text of an error and what to type about it: the library says what is wrong, and names what would
// help as a Go program has it.
func withHints(err error) string {
	text := err.Error()
	for _, h := range lorakit.Hints(err) {
		text += "; " + typed(h)
	}
	return text
}

// otherFlags are the options whose flags are not called as they are.
var otherFlags = map[string]string{"PerExpert": "--experts per-expert"}

// commands are the functions whose commands are not called as they are.
var commands = map[string]string{
	"InstallPlugin": "plugin install", "RemovePlugin": "plugin remove", "VerifyPlugin": "plugin verify",
}

// typed says a hint as one types it: "--force replaces it", "lorakit verify tells a base that does".
func typed(h lorakit.Hint) string {
	var words []string
	if h.Function != "" {
		words = append(words, "lorakit", cmp.Or(commands[h.Function], flagName(h.Function)))
	}
	if h.Option != "" {
		flag, ok := otherFlags[h.Option]
		if !ok {
			flag = "--" + flagName(h.Option)
		}
		words = append(words, flag)
	}
	if h.Value != "" {
		words = append(words, h.Value)
	}
	return strings.Join(append(words, h.Effect), " ")
}

// flagName is the name of an option as a flag: min-kept for MinKept, dtype for DType.
func flagName(option string) string {
	var b strings.Builder
	small := false // whether the letter before is
	for _, r := range option {
		if unicode.IsUpper(r) && small {
			b.WriteByte('-')
		}
		small = unicode.IsLower(r)
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
