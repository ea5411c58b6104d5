package models

import (
	"embed"
	"fmt"
	"io/fs"
	"iter"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

//go:embed data/*.json
var files embed.FS

//go:embed types.json
var types []byte

// All returns the architectures that have data, sorted.
func All() []string {
	entries, err := files.ReadDir("data")
	if err != nil {
		panic(err) // the folder is part of the program
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = strings.TrimSuffix(e.Name(), ".json")
	}
	return names
}

// architecture is one file of data, with its patterns ready for look-up.
type architecture struct {
	Class     string `json:"class"`
	ModelType string `json:"model_type"`
	Base      string `json:"base"`      // base_model_prefix: a file may have it or not
	Head      string `json:"head"`      // the output head's module
	Embedding string `json:"embedding"` // the input embedding's module
	Ties      []tie  `json:"ties"`

	// A last parameter that is a linear's weight stays as it is, for no better reason than being the last. Its numbers
	// come from counts in the config.
	Last struct {
		Module string    `json:"module"`
		Counts []*string `json:"counts"`
	} `json:"last"`
	LastElse []struct {
		Config string         `json:"config"`
		Is     jsontext.Value `json:"is"`
		Module string         `json:"module"` // the last one where the member has that value
	} `json:"last_else"`

	Parameters map[string][]string `json:"parameters"` // kind and flags -> run-time names
	Order      []order             `json:"order"`
	Renamed    map[string]string   `json:"renamed"` // prefix in the file -> prefix at run time, the longest first
	Older      map[string]string   `json:"older"`   // the same, as older releases have it
	Slices     []piece             `json:"slices"`

	parameters table[parameter]  // Parameters
	orders     table[Registered] // Order
	renamed    table[string]     // Renamed
	older      table[string]     // Older
	places     table[[]piece]    // Slices
}

// tie is a set of parameters that share their values with others where the config says so: the first of the members in
// Config that is there (or any of them that is true), else Default.
type tie struct {
	Config  []string          `json:"config"`
	Either  bool              `json:"either"`
	Default bool              `json:"default"`
	Pairs   map[string]string `json:"pairs"`
}

// piece says how one tensor of the file is a part of a run-time parameter, or the reverse. Its fields are Slice's.
type piece struct {
	File       string  `json:"file"`
	Param      string  `json:"param"`
	Expert     *int    `json:"expert"` // which number of the file's name is the expert's
	Transposed bool    `json:"transposed"`
	Part       *[3]int `json:"part"` // part, parts, dim
	Of         *[3]int `json:"of"`   // file part, file parts, file dim
	Via        string  `json:"via"`
}

// parameter is what a run-time parameter is.
type parameter struct {
	kind                        Kind
	stays, raw, float32, strict bool
}

// known reports whether there is data for a class.
func known(class string) bool {
	_, err := fs.Stat(files, "data/"+class+".json")
	return err == nil && class != ""
}

// read parses the data of one architecture.
func read(class string) (*architecture, error) {
	if class == "" || strings.ContainsAny(class, `/\.`) {
		return nil, fmt.Errorf("architecture %q is not known", class)
	}
	b, err := files.ReadFile("data/" + class + ".json")
	if err != nil {
		return nil, fmt.Errorf("architecture %q is not known", class)
	}
	a := &architecture{}
	if err := json.Unmarshal(b, a); err != nil {
		return nil, fmt.Errorf("architecture %q: %w", class, err)
	}
	return a, a.index()
}

// index fills the tables.
func (a *architecture) index() error {
	a.parameters, a.places = table[parameter]{}, table[[]piece]{}
	a.renamed, a.older, a.orders = table[string]{}, table[string]{}, table[Registered]{}
	for words, patterns := range a.Parameters {
		p, err := parseParameter(words)
		if err != nil {
			return fmt.Errorf("architecture %q: %w", a.Class, err)
		}
		for _, line := range patterns {
			for pattern := range expand(line) {
				rank := anyRank
				if at := strings.IndexByte(pattern, '['); at >= 0 {
					if rank, err = strconv.Atoi(strings.TrimSuffix(pattern[at+1:], "]")); err != nil {
						return fmt.Errorf("architecture %q: pattern %q: %w", a.Class, pattern, err)
					}
					pattern = pattern[:at]
				}
				a.parameters.add(pattern, rank, p)
			}
		}
	}
	for _, o := range a.Order {
		for _, line := range o.Modules {
			for pattern := range expand(line) {
				a.orders.add(pattern, anyRank, o.Registered)
			}
		}
	}
	for from, to := range a.Renamed {
		a.renamed.add(from, anyRank, to)
	}
	for from, to := range a.Older {
		a.older.add(from, anyRank, to)
	}
	byFile := map[string][]piece{}
	for _, p := range a.Slices {
		byFile[p.File] = append(byFile[p.File], p)
	}
	for file, pieces := range byFile {
		a.places.add(file, anyRank, pieces)
	}
	return nil
}

// parseParameter reads a key such as "linear, stays, float32".
func parseParameter(words string) (parameter, error) {
	var p parameter
	for i, w := range strings.Split(words, ", ") {
		switch {
		case i == 0:
			known := false
			for k, name := range kindNames {
				if name == w {
					p.kind, known = Kind(k), true
				}
			}
			if !known {
				return p, fmt.Errorf("unknown kind %q", w)
			}
		case w == "stays":
			p.stays = true
		case w == "raw":
			p.raw = true
		case w == "float32":
			p.float32 = true
		case w == "float32 strict":
			p.float32, p.strict = true, true
		default:
			return p, fmt.Errorf("unknown word %q", w)
		}
	}
	return p, nil
}

// last returns the last linear's module for c's counts of layers, or "".
func (a *architecture) last(c *Config) string {
	for _, e := range a.LastElse {
		if v, ok := c.value(e.Config); ok && string(v) == string(e.Is) {
			return e.Module
		}
	}
	parts := strings.Split(a.Last.Module, ".")
	i := 0
	for j, p := range parts {
		if !isNumber(p) {
			continue
		}
		if i < len(a.Last.Counts) && a.Last.Counts[i] != nil {
			if n, ok := c.count(*a.Last.Counts[i]); ok {
				parts[j] = strconv.Itoa(n - 1)
			}
		}
		i++
	}
	return strings.Join(parts, ".")
}

// variants yields the spellings of a file's name that the model may have it under: as it is, with the names of older
// releases replaced, with and without the base model's prefix.
func (a *architecture) variants(file string) iter.Seq[string] {
	return func(yield func(string) bool) {
		spelled := []string{file}
		if s := modern(file); s != file {
			spelled = append(spelled, s)
		}
		for _, s := range spelled {
			if !yield(s) {
				return
			}
			if a.Base == "" {
				continue
			}
			if short, ok := strings.CutPrefix(s, a.Base+"."); ok && !yield(short) {
				return
			}
			if !yield(a.Base + "." + s) {
				return
			}
		}
	}
}

// modern replaces the parameter names of older releases, which transformers still reads.
func modern(name string) string {
	for _, r := range [...][2]string{
		{"LayerNorm.gamma", "LayerNorm.weight"},
		{"LayerNorm.beta", "LayerNorm.bias"},
		{".weight_g", ".parametrizations.weight.original0"},
		{".weight_v", ".parametrizations.weight.original1"},
	} {
		if s, ok := strings.CutSuffix(name, r[0]); ok {
			return s + r[1]
		}
	}
	return name
}

func (a *architecture) parameter(n name, rank int) (parameter, bool) {
	return a.parameters.find(n, len(n.ends), rank)
}

// rename applies the rule with the longest prefix of the file's name.
func rename(n name, rules table[string]) string {
	if len(rules) == 0 {
		return n.full
	}
	for parts := len(n.ends); parts >= 0; parts-- {
		to, ok := rules.find(n, parts, anyRank)
		if !ok {
			continue
		}
		used, rest := n.numbers, ""
		if parts < len(n.ends) {
			rest = n.full
			if parts > 0 {
				rest = n.full[n.ends[parts-1].full+1:]
			}
			used = used[:n.before(parts)]
		}
		to = fill(to, used, -1)
		if to == "" || rest == "" {
			return to + rest
		}
		return to + "." + rest
	}
	return n.full
}

// slices returns the places of the file's tensor in run-time parameters.
func (a *architecture) slices(n name) ([]Slice, bool) {
	pieces, ok := a.places.find(n, len(n.ends), anyRank)
	if !ok {
		return nil, false
	}
	out := make([]Slice, len(pieces))
	for i, p := range pieces {
		s := whole("")
		s.Transposed, s.Via = p.Transposed, p.Via
		skip := -1
		if p.Expert != nil {
			skip = *p.Expert
			e, err := strconv.Atoi(n.numbers[skip])
			if err != nil {
				return nil, false
			}
			s.Expert = e
		}
		if p.Part != nil {
			s.Part, s.Parts, s.Dim = p.Part[0], p.Part[1], p.Part[2]
		}
		if p.Of != nil {
			s.FilePart, s.FileParts, s.FileDim = p.Of[0], p.Of[1], p.Of[2]
		}
		s.Param = fill(p.Param, n.numbers, skip)
		out[i] = s
	}
	return out, true
}
