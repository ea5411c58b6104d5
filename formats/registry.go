package formats

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/storage"
)

// Registry is a set of formats. The zero value has none. Formats are registered before it is used; then it is safe
// for concurrent use.
type Registry struct{ formats []Format }

// Default has the formats that register themselves when their packages are imported.
var Default = new(Registry)

// Register makes a format known to Default. It is called from the init function of the format's package,
// and panics where the format cannot be registered.
func Register(f Format) {
	if err := Default.Register(f); err != nil {
		panic(err)
	}
}

// Register makes a format known. Its name consists of lower-case letters, digits, - and _, each of its extensions
// of a dot and such characters or dots, and no other format has them.
func (r *Registry) Register(f Format) error {
	name := f.Name()
	if !isWord(name, "-_") {
		return fmt.Errorf("format %q: expected a name of lower-case letters, digits, - and _", name)
	}
	for i, e := range f.Extensions() {
		if slices.Contains(f.Extensions()[:i], e) {
			return fmt.Errorf("format %s: found the extension %q twice, expected it once", name, e)
		}
		if rest, ok := strings.CutPrefix(e, "."); !ok || !isWord(rest, "-_.") {
			return fmt.Errorf("format %s: found the extension %q, expected a dot and lower-case letters, digits, - and _", name,
				e)
		}
	}
	for _, other := range r.formats {
		if other.Name() == name {
			return fmt.Errorf("format %s: found another of this name, expected one", name)
		}
		for _, e := range f.Extensions() {
			if slices.Contains(other.Extensions(), e) {
				return fmt.Errorf("format %s: found the extension %q, which is that of %s", name, e, other.Name())
			}
		}
	}
	r.formats = append(r.formats, f)
	return nil
}

// isWord reports whether a name has lower-case letters, digits and what is allowed besides, and begins with none of
// the latter.
func isWord(s, besides string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	return s != "" && strings.Trim(s, letters+besides) == "" && strings.Contains(letters, s[:1])
}

// All returns the formats, sorted by name.
func (r *Registry) All() []Format {
	all := slices.Clone(r.formats)
	slices.SortFunc(all, func(a, b Format) int { return strings.Compare(a.Name(), b.Name()) })
	return all
}

// Lookup finds a format that can be written by its name.
func (r *Registry) Lookup(name string) (Format, error) {
	for _, f := range r.formats {
		if f.Name() == name && !f.ReadOnly() {
			return f, nil
		}
	}
	var known []string
	for _, f := range r.formats {
		if !f.ReadOnly() {
			known = append(known, f.Name())
		}
	}
	return nil, fmt.Errorf("%w %q; known are %s%s", ErrUnknown, name, r.names(true), nearest.Suggestion(name, known))
}

// Detect finds the format of a file in a folder, or with no name of the folder. Where none knows it, the
// error says what it is instead.
func (r *Registry) Detect(ctx context.Context, dir storage.Folder, name string) (Format, error) {
	var first, others []Format // what has the extension is asked first
	for _, f := range r.formats {
		if slices.ContainsFunc(f.Extensions(), func(e string) bool { return strings.HasSuffix(name, e) }) {
			first = append(first, f)
		} else {
			others = append(others, f)
		}
	}
	for _, f := range append(first, others...) {
		ok, err := f.Detect(ctx, dir, name)
		if err != nil {
			return nil, err
		}
		if ok {
			return f, nil
		}
	}
	return nil, r.explain(ctx, dir, name)
}

// Open opens a file in a folder, or with no name the folder, in whatever format it is.
func (r *Registry) Open(ctx context.Context, dir storage.Folder, name string) (Container, error) {
	f, err := r.Detect(ctx, dir, name)
	if err != nil {
		return nil, err
	}
	return f.Open(ctx, dir, name)
}

// ForExtension finds the format of files named like path, if any. It may be one that is not written, so that such a
// destination is an error and no folder of that name.
func (r *Registry) ForExtension(path string) (Format, bool) {
	for _, f := range r.formats {
		for _, e := range f.Extensions() {
			if strings.HasSuffix(path, e) {
				return f, true
			}
		}
	}
	return nil, false
}

// names lists the formats, or those that are written.
func (r *Registry) names(written bool) string {
	var s []string
	for _, f := range r.All() {
		if !written || !f.ReadOnly() {
			s = append(s, f.Name())
		}
	}
	return strings.Join(s, ", ")
}
