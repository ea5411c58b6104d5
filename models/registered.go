package models

import (
	_ "embed"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
)

//go:embed stacks.json
var stacks []byte

// Registered is what is known of a module that has several matrices, or stacks of them, as parameters of its own.
// PEFT names the parts of an adapter by it: of two parameters of one module, the one that was registered first is
// wrapped first, and its part lies one name deeper.
type Registered struct {
	Parameters []string `json:"parameters"` // of rank 2 and 3, in the order in which the module registers them
	// IsTransposed is the module's attribute of that name, which PEFT (0.19 and newer) tells the sides of a stack by.
	IsTransposed bool `json:"is_transposed"`
	// InputsFirst says that its stacks lie (experts, in, out); else they lie (experts, out, in).
	InputsFirst bool `json:"inputs_first"`
	// Interleaved says that the outputs of gate and up take turns in gate_up_proj; else gate lies before up.
	Interleaved bool `json:"interleaved"`
}

// order is an entry of an architecture's data.
type order struct {
	Modules []string `json:"modules"` // run-time names, as those of parameters
	Registered
}

// Registered returns what is known of the module with that run-time name. It returns false where the module has
// one matrix at most, or is not known.
func (m *Model) Registered(module string) (Registered, bool) {
	if m.data == nil {
		return Registered{}, false
	}
	for v := range m.data.variants(module) {
		n := split(v)
		if r, ok := m.data.orders.find(n, len(n.ends), anyRank); ok {
			return r, true
		}
	}
	var found Registered
	_, ok := m.eachPart(module, func(part *Model, rest string) bool {
		r, ok := part.Registered(rest)
		if ok {
			found = r
		}
		return ok
	})
	return found, ok
}

// Stack is a module with several stacks of experts as the architectures in Types have it.
type Stack struct {
	Module string `json:"module"` // the last two parts of its name, # for a number: "mlp.experts"
	Registered
	Types []string `json:"types"` // model types
}

// allStacks has those of all architectures.
var allStacks = sync.OnceValue(func() []Stack {
	var list []Stack
	if err := json.Unmarshal(stacks, &list); err != nil {
		panic(err) // the table is part of the program
	}
	return list
})

// Stacks returns what the architectures have under the name of a module, for an adapter whose base is not at hand:
// one entry for each way in which they differ.
func Stacks(module string) []Stack {
	pattern := split(module).pattern
	var list []Stack
	for _, s := range allStacks() {
		if pattern == s.Module || strings.HasSuffix(pattern, "."+s.Module) {
			s.Parameters, s.Types = slices.Clone(s.Parameters), slices.Clone(s.Types)
			list = append(list, s)
		}
	}
	return list
}

// RegisteredOrder returns the order in which modules register parameters of those names, where all architectures that
// have a module with all of them agree. It returns false where they do not, or none has.
func RegisteredOrder(parameters []string) ([]string, bool) {
	var found []string
	for _, s := range allStacks() {
		var list []string
		for _, p := range s.Parameters {
			if slices.Contains(parameters, p) {
				list = append(list, p)
			}
		}
		switch {
		case len(list) != len(parameters):
		case found == nil:
			found = list
		case !slices.Equal(found, list):
			return nil, false
		}
	}
	return found, found != nil
}
