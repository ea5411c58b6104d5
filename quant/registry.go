package quant

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/internal/nearest"
)

// Registry is a set of schemes, each known by its name and by its types. The zero value is empty and ready.
type Registry struct {
	mu      sync.RWMutex
	schemes []Scheme
}

// Default is the registry that packages of schemes register themselves with.
var Default Registry

// Register adds a scheme. A name or type that is empty, that another has, or that holds anything but lower-case
// letters, digits and _-. is an error that wraps ErrRegistered.
func (r *Registry) Register(s Scheme) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := checkName(s.Name()); err != nil {
		return err
	}
	types := s.Types()
	for i, t := range types {
		if err := checkName(t.Name); err != nil {
			return fmt.Errorf("scheme %s: %w", s.Name(), err)
		}
		again := slices.ContainsFunc(types[:i], func(o Type) bool { return o.Name == t.Name })
		if again || slices.Contains(reserved, t.Name) {
			return fmt.Errorf("scheme %s: %w: its type %s is taken", s.Name(), ErrRegistered, t.Name)
		}
	}
	for _, o := range r.schemes {
		if o.Name() == s.Name() {
			return fmt.Errorf("scheme %s: %w: its name is taken", s.Name(), ErrRegistered)
		}
		for _, t := range types {
			if slices.ContainsFunc(o.Types(), func(x Type) bool { return x.Name == t.Name }) {
				return fmt.Errorf("scheme %s: %w: its type %s is one of scheme %s", s.Name(), ErrRegistered, t.Name, o.Name())
			}
		}
	}
	r.schemes = append(r.schemes, s)
	return nil
}

// reserved are words that stand for no type where one is chosen.
var reserved = []string{"keep", "none"}

func checkName(name string) error {
	if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_-.") != "" ||
		strings.ContainsAny(name[:1], "_-.") {
		return fmt.Errorf("%w: the name %q, expected lower-case letters, digits, dots, dashes and underlines, with a letter "+
			"or digit first", ErrRegistered, name)
	}
	return nil
}

// All returns the schemes, sorted by name.
func (r *Registry) All() []Scheme {
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := slices.Clone(r.schemes)
	slices.SortFunc(all, func(a, b Scheme) int { return strings.Compare(a.Name(), b.Name()) })
	return all
}

// ForType finds the scheme that has a type, such as "nf4".
func (r *Registry) ForType(typ string) (Scheme, error) {
	for _, s := range r.All() {
		if slices.ContainsFunc(s.Types(), func(t Type) bool { return t.Name == typ }) {
			return s, nil
		}
	}
	return nil, r.Unknown(typ)
}

// Unknown is the error of a type that no scheme has. It lists those that are written, and words that are chosen instead
// of one, and names the nearest.
func (r *Registry) Unknown(typ string, words ...string) error {
	var known []string
	for _, s := range r.All() {
		for _, t := range s.Types() {
			if !t.ReadOnly {
				known = append(known, t.Name)
			}
		}
	}
	for _, w := range words {
		if !slices.Contains(known, w) {
			known = append(known, w)
		}
	}
	return fmt.Errorf("%w %q; known are %s%s", ErrUnknown, typ, strings.Join(known, ", "), nearest.Suggestion(typ, known))
}

// Names lists the names of the schemes, sorted.
func (r *Registry) Names() []string {
	var names []string
	for _, s := range r.All() {
		names = append(names, s.Name())
	}
	return names
}

// Register adds a scheme to Default. It is called from the init function of the scheme's package, and panics where the
// scheme cannot be registered.
func Register(s Scheme) {
	if err := Default.Register(s); err != nil {
		panic(err)
	}
}

// All returns the schemes of Default, sorted by name.
func All() []Scheme { return Default.All() }

// ForType finds the scheme of Default that has a type.
func ForType(typ string) (Scheme, error) { return Default.ForType(typ) }
