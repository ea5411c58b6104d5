package quant

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Spec says how a weight is quantised: a type of a scheme and the parameters that this type has. It is a value: equal
// specs make equal bytes.
type Spec struct {
	Type   string // nf4, fp4, int8, …
	Params Params
	// AllowNonFinite encodes NaN and infinity as the scheme does instead of refusing them.
	AllowNonFinite bool
}

// Params are the parameters of a type, in the order in which its scheme lists them.
type Params []Param

// Param is a parameter, such as "block_size". Its value is an int64, a bool or a string.
type Param struct {
	Name  string
	Value any
}

// Equal reports whether two specs are the same.
func (s Spec) Equal(o Spec) bool {
	return s.Type == o.Type && s.AllowNonFinite == o.AllowNonFinite && slices.Equal(s.Params, o.Params)
}

// String writes the spec as a person would, such as "nf4, block 64, double": a parameter by the first word of its name,
// with its value, or where that is true without one.
func (s Spec) String() string {
	var b strings.Builder
	b.WriteString(s.Type)
	for _, p := range s.Params {
		word, _, _ := strings.Cut(p.Name, "_")
		switch p.Value {
		case false:
		case true:
			b.WriteString(", " + word)
		default:
			fmt.Fprintf(&b, ", %s %v", word, p.Value)
		}
	}
	return b.String()
}

// Get returns the value of a parameter, nil where there is none of the name.
func (p Params) Get(name string) any {
	for _, x := range p {
		if x.Name == name {
			return x.Value
		}
	}
	return nil
}

// Int returns the value of a parameter that is a number, 0 where there is none.
func (p Params) Int(name string) int64 {
	n, _ := p.Get(name).(int64)
	return n
}

// Bool reports whether a parameter is set.
func (p Params) Bool(name string) bool {
	b, _ := p.Get(name).(bool)
	return b
}

const (
	typeMember      = "type"
	nonFiniteMember = "allow_non_finite"
)

// MarshalJSONTo writes the spec as one object, its parameters beside its type.
func (s Spec) MarshalJSONTo(enc *jsontext.Encoder) error {
	tokens := []any{typeMember, s.Type}
	for _, p := range s.Params {
		if p.Value != false { // as where it is not there
			tokens = append(tokens, p.Name, p.Value)
		}
	}
	if s.AllowNonFinite {
		tokens = append(tokens, nonFiniteMember, true)
	}
	if err := enc.WriteToken(jsontext.BeginObject); err != nil {
		return err
	}
	for _, t := range tokens {
		if err := json.MarshalEncode(enc, t); err != nil {
			return err
		}
	}
	return enc.WriteToken(jsontext.EndObject)
}

// UnmarshalJSONFrom reads what MarshalJSONTo writes. A parameter that was false is not there.
func (s *Spec) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	*s = Spec{}
	if t, err := dec.ReadToken(); err != nil || t.Kind() != '{' {
		return fmt.Errorf("%w: found no object, expected a type and its parameters", ErrMalformed)
	}
	for dec.PeekKind() != '}' {
		name, err := dec.ReadToken()
		if err != nil {
			return err
		}
		key := name.String()
		value, err := dec.ReadToken()
		if err != nil {
			return err
		}
		var v any
		switch value.Kind() {
		case '"':
			v = value.String()
		case '0':
			n, err := value.Int()
			if err != nil {
				return fmt.Errorf("%w: %s: %w", ErrMalformed, key, err)
			}
			v = n
		case 't', 'f':
			v = value.Bool()
		default:
			return fmt.Errorf("%w: %s is neither a number, nor a string, nor true or false", ErrMalformed, key)
		}
		switch {
		case key == typeMember:
			s.Type, _ = v.(string)
		case key == nonFiniteMember:
			s.AllowNonFinite, _ = v.(bool)
		default:
			s.Params = append(s.Params, Param{key, v})
		}
	}
	_, err := dec.ReadToken()
	return err
}
