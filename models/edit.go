package models

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Edit is one change of a config.json.
type Edit struct {
	name   string
	value  jsontext.Value
	remove bool
	dtype  bool
	nested bool
}

// Set gives the top-level member a value, any JSON, whose order of names and spelling of numbers are kept. A member
// that is there keeps its place; a new one goes where a file with sorted names has it, else to the end.
func Set(name string, value jsontext.Value) Edit { return Edit{name: name, value: value} }

// SetAt is Set at a dotted path of sections: "text_config.vocab_size". A section that is not there is
// made.
func SetAt(path string, value jsontext.Value) Edit {
	return Edit{name: path, value: value, nested: true}
}

// Remove drops the member at a dotted path of sections, if it is there.
func Remove(path string) Edit { return Edit{name: path, remove: true, nested: true} }

// SetDType replaces the value of every dtype and torch_dtype at the top and in sections such as text_config, where it
// is a string, and a null at the top. It adds none.
func SetDType(torch string) Edit {
	v, err := jsontext.AppendQuote(nil, torch)
	if err != nil {
		v = nil // refused by EditConfig as no JSON
	}
	return Edit{value: v, dtype: true}
}

// EditConfig makes changes in a config.json and keeps all other bytes: the order of names, the spelling of numbers,
// Python's Infinity, the indentation. What is new is laid out as the rest is.
func EditConfig(b []byte, edits ...Edit) ([]byte, error) {
	b = bytes.Clone(b)
	for _, e := range edits {
		v, err := checked(b)
		if err != nil {
			return nil, err
		}
		top, err := members(v, 0)
		if err != nil {
			return nil, fmt.Errorf("config: %w", plain(err))
		}
		if !utf8.ValidString(e.name) {
			return nil, fmt.Errorf("config: the name %q is not UTF-8", e.name)
		}
		if !e.remove && !e.value.IsValid() {
			return nil, fmt.Errorf("config: the new value of %q is no JSON", e.name)
		}
		switch {
		case e.dtype:
			places := dtypes(v, top, true, nil)
			for _, p := range slices.Backward(places) {
				b = slices.Replace(b, p.from, p.to, e.value...)
			}
		case e.nested:
			if b, err = e.at(b, v, e.name); err != nil {
				return nil, err
			}
		default:
			b = set(b, v, top, e.name, e.value)
		}
	}
	if _, err := checked(b); err != nil {
		return nil, err
	}
	return b, nil
}

// at makes the change at a path from a section, b as it is in the file and v as JSON.
func (e Edit) at(b []byte, v jsontext.Value, path string) ([]byte, error) {
	top, err := members(v, 0)
	if err != nil {
		return nil, fmt.Errorf("config: %w", plain(err))
	}
	name, rest, nested := strings.Cut(path, ".")
	switch {
	case !nested && e.remove:
		return removed(b, v, top, name), nil
	case !nested:
		return set(b, v, top, name, e.value), nil
	}
	for _, m := range top {
		if section := v[m.value.from:m.value.to]; m.name == name && section.Kind() == '{' {
			inner, err := e.at(bytes.Clone(b[m.value.from:m.value.to]), section, rest)
			if err != nil {
				return nil, err
			}
			return slices.Replace(b, m.value.from, m.value.to, inner...), nil
		}
	}
	if e.remove {
		return b, nil
	}
	inner, err := e.at([]byte("{}"), jsontext.Value("{}"), rest)
	if err != nil {
		return nil, err
	}
	return set(b, v, top, name, inner), nil
}

// dtypes collects the places of the values to replace, in the file's order.
func dtypes(b jsontext.Value, list []member, top bool, places []span) []span {
	for _, m := range list {
		v := b[m.value.from:m.value.to]
		switch {
		case m.name != "dtype" && m.name != "torch_dtype":
			if m.isSection(b) {
				if inner, err := members(b, m.value.from); err == nil {
					places = dtypes(b, inner, false, places)
				}
			}
		case v.Kind() == '"' || top && v.Kind() == 'n':
			places = append(places, m.value)
		}
	}
	return places
}

// removed cuts a member out, with one of the commas beside it and the space before it.
func removed(b []byte, v jsontext.Value, top []member, name string) []byte {
	i := slices.IndexFunc(top, func(m member) bool { return m.name == name })
	switch {
	case i < 0:
		return b
	case i > 0: // from the end of the one before: its comma goes too
		return slices.Delete(b, top[i-1].value.to, top[i].value.to)
	case len(top) > 1: // up to the next name
		return slices.Delete(b, top[0].key.from, top[1].key.from)
	default:
		open, end := bytes.IndexByte(v, '{')+1, bytes.LastIndexByte(v, '}')
		return slices.Delete(b, open, end)
	}
}

func set(b []byte, v jsontext.Value, top []member, name string, value jsontext.Value) []byte {
	l := layoutOf(v, top)
	for _, m := range top {
		if m.name == name {
			return slices.Replace(b, m.value.from, m.value.to, l.format(value, 1)...)
		}
	}
	key, _ := jsontext.AppendQuote(nil, name)
	text := slices.Concat(key, []byte(l.colon), l.format(value, 1))
	if len(top) == 0 {
		open, end := bytes.IndexByte(v, '{')+1, bytes.LastIndexByte(v, '}')
		return slices.Replace(b, open, end, slices.Concat([]byte(l.line(1)), text, []byte(l.line(0)))...)
	}
	at := len(top)
	if slices.IsSortedFunc(top, func(x, y member) int { return bytes.Compare([]byte(x.name), []byte(y.name)) }) {
		at = slices.IndexFunc(top, func(m member) bool { return m.name > name })
		if at < 0 {
			at = len(top)
		}
	}
	if at < len(top) {
		return slices.Insert(b, top[at].key.from, slices.Concat(text, []byte(l.comma), []byte(l.line(1)))...)
	}
	return slices.Insert(b, top[len(top)-1].value.to, slices.Concat([]byte(l.comma), []byte(l.line(1)), text)...)
}

// layout is how a file separates things.
type layout struct {
	newline, indent string // both "" where all is on one line
	colon, comma    string
}

// layoutOf reads the layout off the first members; a file without any, or with more space than anybody lays out, is
// laid out as transformers does.
func layoutOf(v jsontext.Value, top []member) layout {
	usual := layout{newline: "\n", indent: "  ", colon: ": ", comma: ","}
	if len(top) == 0 {
		return usual
	}
	const most = 64
	if l := firstLayout(v, top); len(l.indent) <= most && len(l.colon) <= most && len(l.comma) <= most {
		return l
	}
	return usual
}

// firstLayout is the layout of the first members.
func firstLayout(v jsontext.Value, top []member) layout {
	l := layout{newline: "\n", comma: ","}
	l.colon = string(v[top[0].key.to:top[0].value.from])
	open := bytes.IndexByte(v, '{') + 1
	before := v[open:top[0].key.from]
	if at := bytes.LastIndexByte(before, '\n'); at >= 0 {
		l.indent = string(before[at+1:])
		if at > 0 && before[at-1] == '\r' {
			l.newline = "\r\n"
		}
		return l
	}
	l.newline, l.indent = "", ""
	if len(top) > 1 {
		l.comma = string(v[top[0].value.to:top[1].key.from])
		if bytes.ContainsAny([]byte(l.comma), "\r\n") {
			l.comma = ", "
		}
	}
	return l
}

// line starts a line at a depth, or is nothing where all is on one line.
func (l layout) line(depth int) string {
	if l.newline == "" {
		return ""
	}
	return l.newline + string(bytes.Repeat([]byte(l.indent), depth))
}

// format lays a value out that stands at a depth.
func (l layout) format(value jsontext.Value, depth int) []byte {
	d := jsontext.NewDecoder(bytes.NewReader(value))
	var out []byte
	for first := true; d.PeekKind() != 0; {
		at, index := d.StackIndex(d.StackDepth())
		isName := at == '{' && index%2 == 0
		switch kind := d.PeekKind(); {
		case kind == '}' || kind == ']':
			if index > 0 {
				out = append(out, l.line(depth+d.StackDepth()-1)...)
			}
		case at == '{' && !isName:
			out = append(out, l.colon...)
		case !first && d.StackDepth() > 0:
			if index > 0 {
				out = append(out, l.comma...)
			}
			out = append(out, l.line(depth+d.StackDepth())...)
		}
		first = false
		if k := d.PeekKind(); k == '{' || k == '[' || k == '}' || k == ']' {
			t, err := d.ReadToken()
			if err != nil {
				return out
			}
			out = append(out, byte(t.Kind()))
			continue
		}
		raw, err := d.ReadValue()
		if err != nil {
			return out
		}
		out = append(out, raw...)
	}
	return out
}
