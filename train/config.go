package train

import (
	"fmt"
	"maps"
	"math"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// What a config may ask for: far more than any model has, and so little that nothing overflows and that the list of
// all parameters is small.
const (
	mostLayers    = 1 << 11
	mostHeads     = 1 << 11
	mostHeadDim   = 1 << 14
	mostFeatures  = 1 << 21 // of the hidden state, and between the matrices of an MLP
	mostRows      = 1 << 24 // of an embedding
	mostExperts   = 1 << 13
	mostPositions = 1 << 40
	mostNorms     = 1 << 18 // of single heads
	mostElements  = 1 << 50 // of all parameters
)

// fields reads the members of an object in config.json. What is missing has the default that transformers' class has.
// The first error is kept, and what is read after it is the default, so that a reader asks once, at its end.
type fields struct {
	members map[string]jsontext.Value
	path    string            // what stands before a member's name in an error: "text_config."
	prefix  string            // the module that the model lies in
	alias   map[string]string // other names of members (attribute_map in transformers), which take precedence
	err     *error
}

func (f *fields) fail(format string, values ...any) {
	if *f.err == nil {
		*f.err = fmt.Errorf("config: "+format, values...)
	}
}

// get returns a member, its name as the file has it, and whether it is there.
func (f *fields) get(name string) (jsontext.Value, string, bool) {
	if other, ok := f.alias[name]; ok {
		if v, ok := f.members[other]; ok {
			return v, f.path + other, true
		}
	}
	v, ok := f.members[name]
	return v, f.path + name, ok
}

// count reads a whole number from least to most.
func (f *fields) count(name string, missing, least, most int) int {
	v, full, ok := f.get(name)
	if !ok {
		return missing
	}
	n, err := strconv.Atoi(string(v))
	if v.Kind() != '0' || err != nil || n < least || n > most {
		f.fail("%s is %s, expected a whole number from %d to %d", full, short(v), least, most)
		return missing
	}
	return n
}

// countOrNone reads a whole number from 1 to most, or 0 where the member is null.
func (f *fields) countOrNone(name string, missing, most int) int {
	if v, _, ok := f.get(name); ok && v.Kind() == 'n' {
		return 0
	}
	return f.count(name, missing, 1, most)
}

// number reads a finite number above zero.
func (f *fields) number(name string, missing float64) float64 {
	v, full, ok := f.get(name)
	if !ok {
		return missing
	}
	x, err := strconv.ParseFloat(string(v), 64)
	if v.Kind() != '0' || err != nil || !(x > 0) || x > math.MaxFloat32 || float32(x) == 0 {
		f.fail("%s is %s, expected a number above 0", full, short(v))
		return missing
	}
	return x
}

// numberOrNone reads a finite number above zero, or 0 where the member is null.
func (f *fields) numberOrNone(name string, missing float64) float64 {
	if v, _, ok := f.get(name); ok && v.Kind() == 'n' {
		return 0
	}
	return f.number(name, missing)
}

// flag reads true or false.
func (f *fields) flag(name string, missing bool) bool {
	v, full, ok := f.get(name)
	if !ok {
		return missing
	}
	if v.Kind() != 't' && v.Kind() != 'f' {
		f.fail("%s is %s, expected true or false", full, short(v))
		return missing
	}
	return v.Kind() == 't'
}

// word reads a string.
func (f *fields) word(name, missing string) string {
	v, full, ok := f.get(name)
	if !ok {
		return missing
	}
	var s string
	if v.Kind() != '"' || json.Unmarshal(v, &s) != nil {
		f.fail("%s is %s, expected a string", full, short(v))
		return missing
	}
	return s
}

// listOf reads an array, of what is called so in an error, or nil where it is missing or null.
func listOf[T any](f *fields, name, what string) []T {
	v, full, ok := f.get(name)
	if !ok || v.Kind() == 'n' {
		return nil
	}
	all := []T{}
	if v.Kind() != '[' || json.Unmarshal(v, &all) != nil {
		f.fail("%s is %s, expected a list of %s", full, short(v), what)
		return nil
	}
	return all
}

// object returns the members of an object, or nil where it is missing or null.
func (f *fields) object(name string) *fields {
	v, full, ok := f.get(name)
	if !ok || v.Kind() == 'n' {
		return nil
	}
	inner := map[string]jsontext.Value{}
	if v.Kind() != '{' || json.Unmarshal(v, &inner) != nil {
		f.fail("%s is %s, expected an object", full, short(v))
		return nil
	}
	return &fields{members: inner, path: full + ".", err: f.err}
}

// with is the object with the members of another in place of its own.
func (f *fields) with(other *fields) *fields {
	all := maps.Clone(f.members)
	if all == nil {
		all = map[string]jsontext.Value{}
	}
	maps.Copy(all, other.members)
	return &fields{members: all, path: f.path, err: f.err}
}

// refuse fails where a member is there and says more than null or false: what it switches on is not computed.
func (f *fields) refuse(name, why string) {
	if v, full, ok := f.get(name); ok && v.Kind() != 'n' && v.Kind() != 'f' {
		f.fail("%s is %s: %s", full, short(v), why)
	}
}

// short is a value for an error, on one line.
func short(v jsontext.Value) string {
	return clip(strings.Join(strings.Fields(strings.ToValidUTF8(string(v), "?")), " "))
}

// clip shortens what a config says, for an error.
func clip(s string) string {
	const most = 40
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
