package lock

import (
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// What a plugin may say of itself at most.
const (
	mostWord    = 64   // bytes of a name, a version, an extension or a type
	mostGlob    = 256  // bytes of a file name's glob
	mostNotice  = 500  // of a notice
	mostList    = 64   // entries of a list
	mostMagic   = 4096 // the end of a magic in its file
	mostPath    = 1024 // bytes of a path
	mostCommand = 64   // words of a command
	mostArg     = 4096 // bytes of one of them
	mostSeconds = 60   // of a start
)

const (
	lower  = "abcdefghijklmnopqrstuvwxyz"
	upper  = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digits = "0123456789"
)

// isWord reports whether s begins with one of some characters and has only those and more of others, not too many.
func isWord(s, first, besides string) bool {
	return s != "" && len(s) <= mostWord && strings.Contains(first, s[:1]) && strings.Trim(s, first+besides) == ""
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{formats.ErrMalformed}, args...)...)
}

func spoken(protocol int) error {
	return fmt.Errorf("%w: it speaks protocol %d, this lorakit speaks %d", formats.ErrUnsupported, protocol, Protocol)
}

func checkName(name string) error {
	if !isWord(name, lower, digits+"-") || !filepath.IsLocal(name) {
		return malformed("found the name %s, expected at most %d lower-case letters, digits and dashes, with a letter first",
			tensor.Quote(name), mostWord)
	}
	return nil
}

func checkVersion(version string) error {
	if !isWord(version, lower+upper+digits, ".-+") || !filepath.IsLocal(version) {
		return malformed("found the version %s, expected at most %d letters, digits, dots, dashes and plus signs, with a "+
			"letter or digit first", tensor.Quote(version), mostWord)
	}
	return nil
}

// check holds what a plugin says of itself against the rules.
func (d *Described) check() error {
	if err := checkName(d.Name); err != nil {
		return err
	}
	if err := checkVersion(d.Version); err != nil {
		return err
	}
	if d.Protocol != Protocol {
		return spoken(d.Protocol)
	}
	err := checkWords("capabilities", d.Capabilities, func(s string) bool { return slices.Contains(wire.Capabilities, s) },
		"one of "+strings.Join(wire.Capabilities, ", "))
	if err != nil {
		return err
	}
	for what, n := range map[string]int{"formats": len(d.Formats), "schemes": len(d.Schemes)} {
		if n > mostList {
			return malformed("found %d %s, expected at most %d", n, what, mostList)
		}
	}
	if len(d.Formats)+len(d.Schemes) == 0 {
		return malformed("found neither a format nor a scheme, expected one")
	}
	if d.Can(Extents) && !d.Can(Read) {
		return malformed("found the capability %s without %s, expected both", Extents, Read)
	}
	for _, c := range d.Capabilities {
		scheme := c == SchemeDecode || c == SchemeEncode
		if scheme && len(d.Schemes) == 0 || !scheme && c != Deterministic && len(d.Formats) == 0 {
			return malformed("found the capability %s and nothing that has it", c)
		}
	}
	for _, f := range d.Formats {
		if err := d.checkFormat(&f); err != nil {
			return fmt.Errorf("format %s: %w", tensor.Quote(f.Name), err)
		}
	}
	for _, s := range d.Schemes {
		if err := d.checkScheme(&s); err != nil {
			return fmt.Errorf("scheme %s: %w", tensor.Quote(s.Name), err)
		}
	}
	// No name twice within the plugin.
	var own Taken
	for i := range d.Formats {
		one := Described{Formats: d.Formats[i : i+1]}
		if err := one.conflict(own, "the plugin itself"); err != nil {
			return err
		}
		own.add(&one)
	}
	for i := range d.Schemes {
		one := Described{Schemes: d.Schemes[i : i+1]}
		if err := one.conflict(own, "the plugin itself"); err != nil {
			return err
		}
		own.add(&one)
	}
	return nil
}

// notExtensions are endings of files that stand beside weights. A format that had one would take them for its own.
var notExtensions = []string{".json", ".jsonl", ".txt", ".md", ".model", ".jinja", ".py", ".yaml", ".yml"}

func (d *Described) checkFormat(f *Format) error {
	const besides = "-_"
	if !isWord(f.Name, lower+digits, besides) {
		return malformed("expected a name of at most %d lower-case letters, digits, - and _", mostWord)
	}
	err := checkWords("extensions", f.Extensions, func(s string) bool {
		rest, ok := strings.CutPrefix(s, ".")
		return ok && isWord(rest, lower+digits, besides+".") && !slices.Contains(notExtensions, s)
	}, "a dot, lower-case letters, digits, - and _, and not one of "+strings.Join(notExtensions, " "))
	if err != nil {
		return err
	}
	err = checkWords("file_names", f.FileNames, func(s string) bool {
		_, err := path.Match(s, "")
		return err == nil && s != "" && len(s) <= mostGlob && !strings.Contains(s, "/") && printable(s)
	}, "a glob of a base name")
	if err != nil {
		return err
	}
	if len(f.Magic) > mostList {
		return malformed("found %d magics, expected at most %d", len(f.Magic), mostList)
	}
	for _, m := range f.Magic {
		if n := int64(len(m.Bytes)); n == 0 || n > mostMagic || m.Offset < 0 || m.Offset > mostMagic-n {
			return malformed("found a magic of %d bytes at offset %d, expected 1 or more that end by %d", n, m.Offset, mostMagic)
		}
	}
	err = checkWords("dtypes", f.DTypes, func(s string) bool {
		t, err := tensor.ParseDType(s)
		return err == nil && t.String() == s
	}, "a type such as F32")
	if err != nil {
		return err
	}
	err = checkWords("written", f.Written, func(s string) bool { return slices.Contains(f.Extensions, s) },
		"one of its extensions")
	if err != nil {
		return err
	}
	needs, ok := map[string]string{WriteByNone: Read, WriteByLayout: WriteLayout, WriteByStream: WriteStream}[f.Write]
	if !ok {
		return malformed("found the way to write %s, expected %s, %s or %s", tensor.Quote(f.Write), WriteByLayout,
			WriteByStream, WriteByNone)
	}
	if !d.Can(needs) {
		return malformed("found the way to write %q without the capability %s, expected both", f.Write, needs)
	}
	return nil
}

func (d *Described) checkScheme(s *Scheme) error {
	word := func(s string) bool { return isWord(s, lower+digits, "_-.") }
	if !word(s.Name) {
		return malformed("expected a name of at most %d lower-case letters, digits, dots, dashes and underlines, with a "+
			"letter or digit first", mostWord)
	}
	if len(s.Types) == 0 {
		return malformed("found no types, expected one")
	}
	err := checkWords("types", s.Types, func(s string) bool { return word(s) && s != "keep" && s != "none" },
		"lower-case letters, digits, dots, dashes and underlines, and neither keep nor none")
	if err != nil {
		return err
	}
	err = checkWords("parameters", s.Parameters, func(s string) bool { return s == "block_size" || s == "double_quant" },
		"block_size or double_quant")
	if err != nil {
		return err
	}
	err = checkWords("suffixes", s.Suffixes, func(s string) bool { return s != "" && len(s) <= mostGlob && printable(s) },
		fmt.Sprintf("1 to %d printable characters", mostGlob))
	if err != nil {
		return err
	}
	err = checkWords("notices", s.Notices, func(s string) bool { return s != "" && len(s) <= mostNotice && printable(s) },
		fmt.Sprintf("1 to %d printable characters", mostNotice))
	if err != nil {
		return err
	}
	if !d.Can(SchemeDecode) && !d.Can(SchemeEncode) {
		return malformed("found it without a capability, expected %s or %s", SchemeDecode, SchemeEncode)
	}
	return nil
}

// checkWords holds a list against its length and each of its words against a rule.
func checkWords(what string, list []string, ok func(string) bool, expected string) error {
	if len(list) > mostList {
		return malformed("found %d %s, expected at most %d", len(list), what, mostList)
	}
	for i, s := range list {
		if !ok(s) {
			return malformed("found %s among the %s, expected %s", tensor.Quote(s), what, expected)
		}
		if slices.Contains(list[:i], s) {
			return malformed("found %s twice among the %s, expected it once", tensor.Quote(s), what)
		}
	}
	return nil
}

// printable reports whether a text can stand in a line.
func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// checkPath refuses a path that is not one of a file in a folder, as every system has them.
func checkPath(p string) error {
	if !fs.ValidPath(p) || p == "." || len(p) > mostPath || strings.Contains(p, `\`) || !printable(p) ||
		!filepath.IsLocal(filepath.FromSlash(p)) {
		return malformed("found the path %s, expected that of a file inside the folder, in at most %d printable characters",
			tensor.Quote(p), mostPath)
	}
	return nil
}

// checkCommand holds a command against the files of its package.
func checkCommand(words []string, has func(path string) bool) error {
	if len(words) == 0 || len(words) > mostCommand {
		return malformed("found a command of %d words, expected 1 to %d", len(words), mostCommand)
	}
	for _, w := range words {
		if len(w) > mostArg || !utf8.ValidString(w) || strings.Contains(w, "\x00") {
			return malformed("found %s in the command, expected at most %d bytes of text", tensor.Quote(w), mostArg)
		}
	}
	first := words[0]
	if !inside(first) {
		if first == "" || !printable(first) || strings.Contains(first, `\`) {
			return malformed("found the command %s, expected a path inside the folder or the name of a program",
				tensor.Quote(first))
		}
		return nil
	}
	p := path.Clean(first)
	if err := checkPath(p); err != nil {
		return fmt.Errorf("command: %w", err)
	}
	if !has(p) {
		return malformed("found the command %s, expected one of the package's files", tensor.Quote(first))
	}
	return nil
}

// inside reports whether the first word of a command is a path of the package, and no program of the system.
func inside(word string) bool { return strings.Contains(word, "/") }

// Taken are names that others have.
type Taken struct{ Formats, Extensions, Schemes, Types []string }

// BuiltIn has the names of all registered formats and schemes. Ask before plugins are registered as well.
func BuiltIn() Taken {
	var t Taken
	for _, f := range formats.Default.All() {
		t.Formats = append(t.Formats, f.Name())
		t.Extensions = append(t.Extensions, f.Extensions()...)
	}
	for _, s := range quant.All() {
		t.Schemes = append(t.Schemes, s.Name())
		for _, x := range s.Types() {
			t.Types = append(t.Types, x.Name)
		}
	}
	return t
}

func (t *Taken) add(d *Described) {
	for _, f := range d.Formats {
		t.Formats = append(t.Formats, f.Name)
		t.Extensions = append(t.Extensions, f.Extensions...)
	}
	for _, s := range d.Schemes {
		t.Schemes = append(t.Schemes, s.Name)
		t.Types = append(t.Types, s.Types...)
	}
}

// conflict says which of the names somebody else has.
func (d *Described) conflict(t Taken, who string) error {
	is := func(what, name string) error { return fmt.Errorf("the %s %s is %w by %s", what, name, ErrTaken, who) }
	for _, f := range d.Formats {
		if slices.Contains(t.Formats, f.Name) {
			return is("format", f.Name)
		}
		for _, e := range f.Extensions {
			if slices.Contains(t.Extensions, e) {
				return is("extension", e)
			}
		}
	}
	for _, s := range d.Schemes {
		if slices.Contains(t.Schemes, s.Name) {
			return is("scheme", s.Name)
		}
		for _, x := range s.Types {
			if slices.Contains(t.Types, x) {
				return is("type", x)
			}
		}
	}
	return nil
}
