package pytorch

import (
	"math"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// wrappers are the names under which training checkpoints keep their state dict: Lightning and timm, PyTorch's
// tutorials, fairseq and nanoGPT, DeepSpeed, BasicSR.
var wrappers = []string{"state_dict", "model_state_dict", "model", "module", "params"}

const (
	mostWrapped = 4    // wrappers that may stand in each other
	mostBeside  = 1000 // items of a wrapper among which another is looked for
	mostState   = 64   // bytes of the name of a random number generator's state
)

// generatorState matches the state of a random number generator, a tensor that stands beside a wrapped state dict and
// is no weight.
var generatorState = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?:^|_)rng(?:_|$)`)
})

// The names in Metadata that are not from the file.
const (
	formatName  = "format"          // "pt": transformers refuses metadata without it
	ignoredName = "pytorch.ignored" // what is left out
)

// named is a tensor of a state dict.
type named struct {
	name string
	*tensorRef
}

// stateDict is what a file's pickle holds: the tensors in its order, and what stands beside them.
type stateDict struct {
	tensors  []named
	metadata formats.Metadata
	said     map[string]bool // the names in metadata
	ignored  []string
	left     int64 // bytes that metadata and ignored may have yet
}

// readStateDict finds the state dict in what a pickle has built.
func readStateDict(root any, limits Limits) (*stateDict, error) {
	s := &stateDict{metadata: formats.Metadata{{Name: formatName, Value: "pt"}}, said: map[string]bool{formatName: true},
		left: limits.StringBytes}
	for range mostWrapped {
		d, ok := root.(*dict)
		if !ok {
			return nil, malformedf("found %s, expected a dict of tensors", kind(root))
		}
		inner, err := s.unwrap(d)
		if err != nil {
			return nil, err
		}
		if inner == nil {
			return s, s.read(d)
		}
		root = inner
	}
	return nil, malformedf("found more than %d dicts in each other, expected a dict of tensors", mostWrapped)
}

// unwrap returns the state dict that stands in d under one of the wrappers' names, after what is beside it has been
// looked at, or nil where d is none of those.
func (s *stateDict) unwrap(d *dict) (*dict, error) {
	var wrapper *dict
	var dicts, tensors []string
	holds := map[*dict]bool{} // a dict may be there under many names: it is looked at once
	for i, k := range d.keys {
		name := text(k)
		switch v := d.values[i].(type) {
		case *dict:
			has, known := holds[v]
			if !known {
				has = hasTensor(v)
				holds[v] = has
			}
			if slices.Contains(wrappers, name) && (has || wrapsAgain(v)) {
				wrapper = v
			} else if !has {
				continue
			}
			dicts = append(dicts, name)
		case *tensorRef:
			if len(name) > mostState || !generatorState().MatchString(name) {
				tensors = append(tensors, name)
			}
		}
	}
	switch {
	case wrapper == nil:
		return nil, nil
	case len(dicts) > 1:
		return nil, malformedf("found dicts of tensors under %s, expected one: save the one that is meant by itself",
			formats.List(dicts))
	case len(tensors) > 0:
		return nil, malformedf("found tensors beside the dict of tensors under %s: %s, expected none", tensor.Quote(dicts[0]),
			formats.List(tensors))
	}
	for i, k := range d.keys {
		if inner, ok := d.values[i].(*dict); ok && inner == wrapper {
			continue
		}
		if err := s.keep(text(k), d.values[i]); err != nil {
			return nil, err
		}
	}
	return wrapper, nil
}

// wrapsAgain reports whether a wrapper's dict has a wrapper among its first items.
func wrapsAgain(d *dict) bool {
	for i, v := range d.values[:min(len(d.values), mostBeside)] {
		if _, ok := v.(*dict); ok && slices.Contains(wrappers, text(d.keys[i])) {
			return true
		}
	}
	return false
}

// hasTensor reports whether a dict holds a tensor itself.
func hasTensor(d *dict) bool {
	return slices.ContainsFunc(d.values, func(v any) bool { _, ok := v.(*tensorRef); return ok })
}

// read takes the tensors of d, in which all else must be without them.
func (s *stateDict) read(d *dict) error {
	seen := make(map[string]bool, len(d.keys))
	w := walk{}
	var dicts []string
	holders := map[*dict]bool{} // what w does not find a second time
	for i, k := range d.keys {
		v := d.values[i]
		t, isTensor := v.(*tensorRef)
		name, ok := k.(string)
		switch {
		case !ok && w.finds(v):
			return malformedf("found a tensor under %s as its name, expected a str", show(k))
		case !ok:
			if err := s.keep(show(k), &opaque{}); err != nil {
				return err
			}
			continue
		case seen[name]:
			return tensorError(name, malformedf("found it twice, expected it once"))
		case !utf8.ValidString(name):
			return tensorError(name, malformedf("found a name that is no UTF-8, expected one"))
		}
		seen[name] = true
		inner, isDict := v.(*dict)
		switch {
		case isTensor:
			if w.finds(t.state) {
				return tensorError(name, unsupportedf("found tensors among its attributes, expected none"))
			}
			s.tensors = append(s.tensors, named{name, t})
		case isDict && (holders[inner] || w.finds(inner)):
			holders[inner] = true
			dicts = append(dicts, name)
		case w.finds(v):
			return tensorError(name, malformedf("found %s with tensors, expected a tensor", kind(v)))
		default:
			if err := s.keep(name, v); err != nil {
				return err
			}
		}
	}
	switch {
	case len(dicts) > 0:
		return malformedf("found dicts of tensors under %s, expected tensors, or one dict of them under %s",
			formats.List(dicts), formats.List(wrappers))
	case w.finds(d.state):
		return unsupportedf("found tensors among the attributes of the dict, expected none")
	case len(s.tensors) == 0 && len(d.keys) > 0:
		return malformedf("found no tensor in the dict, expected a state dict")
	}
	return nil
}

// keep puts a scalar into the metadata and notes the name of another value. A string may be there many times at the
// price of one, so what is kept is bounded before it is looked at.
func (s *stateDict) keep(name string, v any) error {
	bytes := len(name)
	switch v := v.(type) {
	case nil:
		return nil
	case string:
		bytes += len(v)
	default:
		bytes += valueBytes
	case *big.Int:
		bytes += v.BitLen()
	}
	if s.left -= int64(bytes); s.left < 0 {
		return limitf("found more strings and numbers beside the tensors than fit the metadata")
	}
	name = strings.ToValidUTF8(name, "\ufffd")
	value := ""
	switch v := v.(type) {
	case bool:
		value = "False"
		if v {
			value = "True"
		}
	case int64:
		value = strconv.FormatInt(v, 10)
	case *big.Int:
		value = v.String()
	case float64:
		value = pythonFloat(v)
	case string:
		value = strings.ToValidUTF8(v, "\ufffd")
	default:
		s.ignored = append(s.ignored, name)
		return nil
	}
	s.say(name, value)
	return nil
}

// say puts a value into the metadata, unless there is one of the name.
func (s *stateDict) say(name, value string) {
	if !s.said[name] {
		s.said[name] = true
		s.metadata = append(s.metadata, formats.Pair{Name: name, Value: value})
	}
}

// pythonFloat writes a float as Python's repr does.
func pythonFloat(x float64) string {
	switch {
	case math.IsNaN(x):
		return "nan"
	case math.IsInf(x, 1):
		return "inf"
	case math.IsInf(x, -1):
		return "-inf"
	}
	if a := math.Abs(x); a != 0 && (a < 1e-4 || a >= 1e16) {
		return strconv.FormatFloat(x, 'e', -1, 64)
	}
	s := strconv.FormatFloat(x, 'f', -1, 64)
	if !strings.Contains(s, ".") {
		s += ".0"
	}
	return s
}

// walk looks for tensors in values. It looks at each value once over all calls, so one that holds itself, or the same
// value many times, takes no longer.
type walk map[any]bool

// finds reports whether a tensor is v or somewhere in it. Once it has found one, the caller ends: a value that it has
// seen is taken for one without.
func (w walk) finds(v any) bool {
	next := []any{v}
	for len(next) > 0 {
		v := next[len(next)-1]
		next = next[:len(next)-1]
		switch v := v.(type) {
		case *tensorRef, *storageRef:
			return true
		case *tuple:
			if !w[v] {
				w[v] = true
				next = append(next, v.items...)
			}
		case *array:
			if !w[v] {
				w[v] = true
				next = append(next, v.items...)
			}
		case *dict:
			if !w[v] {
				w[v] = true
				next = append(append(next, v.keys...), v.values...)
				next = append(next, v.state)
			}
		}
	}
	return false
}
