package gguf

import (
	"embed"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

//go:embed data/*.json
var files embed.FS

// architecture is one file of data; see the documentation of the package.
type architecture struct {
	Name      string            `json:"architecture"`
	Classes   []class           `json:"classes"`
	Cut       string            `json:"cut"`
	Prefix    string            `json:"prefix"`
	Endings   map[string]string `json:"endings"`
	Skip      []string          `json:"skip"`
	Surplus   bool              `json:"surplus_layers"`
	NoBiases  bool              `json:"zero_biases"`
	PlusOne   string            `json:"plus_one"`
	Rows      []row             `json:"tensors"`
	Need      []string          `json:"need_tensors"`
	NeedLayer []string          `json:"need_layer"`
	Made      []string          `json:"made"`
	Keys      []key             `json:"keys"`
	NeedKeys  []string          `json:"need_keys"`
	OmitZero  []string          `json:"omit_zero"`

	Words   map[string]map[string]uint32 `json:"words"`
	Fixed   map[string]any               `json:"fixed"`
	Must    map[string]string            `json:"must"`
	NotNull []string                     `json:"not_null"`
	Implied []implied                    `json:"implied"`
	Every   int                          `json:"full_every"`
	Assumed map[string][2]string         `json:"assumed"` // key: what llama.cpp takes, what transformers computes with

	RowsOf     map[string]string    `json:"rows"`
	Back       map[string][2]string `json:"back"` // type, expression
	RopeConfig map[string]any       `json:"rope_config"`
	TensorsSay map[string]string    `json:"tensors_say"`

	byModule map[string]*row  // Rows by the checkpoint's names
	byName   map[string]place // Rows by GGUF names
}

// class is a class of transformers.
type class struct {
	Name       string         `json:"name"`
	ModelType  string         `json:"model_type"`
	When       string         `json:"when"`
	Theta      float64        `json:"rope_theta"`
	Parameters map[string]any `json:"rope_parameters"`
	Defaults   map[string]any `json:"defaults"` // strings are expressions
	Config     map[string]any `json:"config"`
}

// never is the When of a class that no GGUF file becomes.
const never = "never"

// implied is a value that llama.cpp computes with, whatever the config says.
type implied struct {
	Member string  `json:"member"`
	Is     string  `json:"is"`
	When   float64 `json:"when"` // layers
	Then   string  `json:"then"`
	OrMore bool    `json:"or_more"` // a larger number is as good, and none goes back
}

// row says what becomes of the tensors of a module.
type row struct {
	module string
	names  []string // in GGUF, none where it has no place there
	ops    []operation
}

// place is one of a row's GGUF names.
type place struct {
	row  *row
	part int
}

// UnmarshalJSON reads [module, name or [names], operation...].
func (r *row) UnmarshalJSON(b []byte) error {
	var list []jsontext.Value
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	if len(list) < 2 {
		return fmt.Errorf("%s: expected a module and a name", b)
	}
	if err := json.Unmarshal(list[0], &r.module); err != nil {
		return err
	}
	r.names = []string{""}
	target := any(&r.names[0])
	if list[1].Kind() == '[' {
		target = &r.names
	}
	if err := json.Unmarshal(list[1], target); err != nil {
		return err
	}
	if slices.Equal(r.names, []string{""}) {
		r.names = nil
	}
	for _, v := range list[2:] {
		var text string
		if err := json.Unmarshal(v, &text); err != nil {
			return err
		}
		op, err := parseOperation(text)
		if err != nil {
			return fmt.Errorf("%s: %w", r.module, err)
		}
		r.ops = append(r.ops, op)
	}
	return nil
}

// key is a row of the keys.
type key struct {
	name, kind, from string
	otherwise        any
}

// UnmarshalJSON reads [key, type, expression, default].
func (k *key) UnmarshalJSON(b []byte) error {
	var list []any
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	if len(list) < 3 {
		return fmt.Errorf("%s: expected a key, a type and an expression", b)
	}
	for i, s := range []*string{&k.name, &k.kind, &k.from} {
		text, ok := list[i].(string)
		if !ok {
			return fmt.Errorf("%s: expected strings", b)
		}
		*s = text
	}
	if len(list) > 3 {
		k.otherwise = list[3]
	}
	return nil
}

// registry is all the data, by architectures and by classes.
type registry struct {
	names   map[string]*architecture
	classes map[string]*architecture
}

// data reads all files, which are a part of the program.
var data = sync.OnceValue(func() registry {
	all := registry{map[string]*architecture{}, map[string]*architecture{}}
	entries, err := files.ReadDir("data")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		b, err := files.ReadFile("data/" + e.Name())
		if err != nil {
			panic(err)
		}
		a, err := parse(b)
		if err != nil {
			panic(fmt.Errorf("%s: %w", e.Name(), err))
		}
		all.names[a.Name] = a
		for _, c := range a.Classes {
			all.classes[c.Name] = a
		}
	}
	return all
})

// parse reads one file of data.
func parse(b []byte) (*architecture, error) {
	a := &architecture{}
	if err := json.Unmarshal(b, a, json.RejectUnknownMembers(true)); err != nil {
		return nil, err
	}
	a.byModule, a.byName = map[string]*row{}, map[string]place{}
	for i := range a.Rows {
		r := &a.Rows[i]
		if a.byModule[r.module] != nil {
			return nil, fmt.Errorf("%s: found two rows", r.module)
		}
		a.byModule[r.module] = r
		for j, name := range r.names {
			_, whole := a.byName[strings.TrimSuffix(name, ending(name))]
			if _, ok := a.byName[name]; !ok && !whole {
				a.byName[name] = place{r, j}
			}
		}
	}
	return a, nil
}

// Classes lists the classes of transformers that Forward knows, sorted.
func Classes() []string {
	classes := data().classes
	names := make([]string, 0, len(classes))
	for name := range classes {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Architectures lists the architectures of GGUF files that Backward knows, sorted.
func Architectures() []string {
	all := data().names
	names := make([]string, 0, len(all))
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// forClass finds the data of a class.
func forClass(name string) (*architecture, *class, error) {
	a := data().classes[name]
	if a == nil {
		return nil, nil, unsupportedf("found the class %s, expected one of %s", tensor.Quote(name),
			strings.Join(Classes(), ", "))
	}
	i := slices.IndexFunc(a.Classes, func(c class) bool { return c.Name == name })
	return a, &a.Classes[i], nil
}

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrMalformed)...)
}

func unsupportedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, formats.ErrUnsupported)...)
}
