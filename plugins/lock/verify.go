package lock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/tensor"
)

// State is what has become of a plugin since it was installed.
type State string

// The states.
const (
	OK           State = "ok"
	Changed      State = "changed"
	Missing      State = "missing"      // files of it are not there
	Incompatible State = "incompatible" // this lorakit cannot use it
)

// Report says which files differ from what the lock file has. Paths are those of the lock file, and that of the
// interpreter.
type Report struct {
	Changed []string `json:"changed"`
	Missing []string `json:"missing"`
	Added   []string `json:"added"`
}

// State sums it up.
func (r Report) State() State {
	switch {
	case len(r.Missing) > 0:
		return Missing
	case len(r.Changed)+len(r.Added) > 0:
		return Changed
	}
	return OK
}

// Err is why the plugin must not be started, an error of kind ErrChanged, or nil.
func (r Report) Err(p *Plugin) error {
	h := hint.Hint{Function: "VerifyPlugin", Option: "Accept", Value: p.Name, Effect: "pins it as it is now"}
	switch r.State() {
	case OK:
		return nil
	case Missing:
		h = hint.Hint{Function: "InstallPlugin", Value: "PATH", Effect: "puts it there again"}
	}
	return hint.With(&changedError{"plugin " + p.Name + ": " + r.problem()}, h)
}

// problem is a sentence about the first file that differs.
func (r Report) problem() string {
	list, what := r.Changed, "changed"
	switch {
	case r.State() == OK:
		return ""
	case len(r.Missing) > 0:
		list, what = r.Missing, "been removed"
	case len(list) == 0:
		list, what = r.Added, "been added"
	}
	return fmt.Sprintf("%s%s has %s since it was installed", shown(list[0]), others(list), what)
}

// changedError is an ErrChanged whose text does not say so.
type changedError struct{ text string }

func (e *changedError) Error() string { return e.text }
func (e *changedError) Unwrap() error { return ErrChanged }

func shown(path string) string {
	if printable(path) {
		return path
	}
	return tensor.Quote(path)
}

func others(list []string) string {
	if n := len(list) - 1; n > 0 {
		return fmt.Sprintf(" (and %d more)", n)
	}
	return ""
}

// State says what a look at sizes and times tells, without reading or starting anything, and what is wrong in a line.
func (f *Folder) State(p *Plugin) (State, string) {
	if err := f.usable(p); err != nil {
		return Incompatible, err.Error()
	}
	r, err := f.compare(p, f.Path(p), false)
	if err != nil {
		return Changed, err.Error()
	}
	return r.State(), r.problem()
}

// usable says why this lorakit cannot use a plugin, whatever its files are.
func (f *Folder) usable(p *Plugin) error {
	if p.Protocol != Protocol {
		return spoken(p.Protocol)
	}
	return f.unique(p)
}

// unique refuses names that a built-in or another plugin has.
func (f *Folder) unique(p *Plugin) error {
	if err := p.conflict(f.taken, "lorakit itself"); err != nil {
		return err
	}
	for _, o := range f.plugins {
		var t Taken
		if o.Name == p.Name || o.Protocol != Protocol {
			continue
		}
		t.add(&o.Described)
		if err := p.conflict(t, "the plugin "+o.Name); err != nil {
			return err
		}
	}
	return nil
}

// Verify reads all files of a plugin, its interpreter too, and says which differ.
func (f *Folder) Verify(p *Plugin) (Report, error) {
	r, err := f.compare(p, f.Path(p), true)
	if err != nil {
		err = fmt.Errorf("plugin %s: %w", p.Name, err)
	}
	return r, err
}

// compare holds the files in a folder against an entry, by their content or by their sizes and times.
func (f *Folder) compare(p *Plugin, dir string, content bool) (Report, error) {
	var r Report
	seen := make(map[string]bool, len(p.Files))
	// differs reports whether what a path leads to is another file than it was. Sizes are compared first, so that no more
	// is read than was there.
	differs := func(path string, info fs.FileInfo, was File) (bool, error) {
		if !info.Mode().IsRegular() || info.Size() != was.Size {
			return true, nil
		}
		if !content {
			return was.MTime != "" && stamp(info) != was.MTime, nil
		}
		is, err := hashFile(path, was.Size)
		if errors.Is(err, formats.ErrLimit) { // it grows
			return true, nil
		}
		return is.Size != was.Size || is.SHA256 != was.SHA256, err
	}
	visit := func(path string, info fs.FileInfo) error {
		i, ok := p.index(path)
		if !ok {
			r.Added = append(r.Added, path)
			return nil
		}
		seen[path] = true
		changed, err := differs(filepath.Join(dir, filepath.FromSlash(path)), info, p.Files[i])
		if changed {
			r.Changed = append(r.Changed, path)
		}
		return err
	}
	there, err := present(dir, filepath.Dir(dir))
	if err == nil && there {
		err = walk(dir, visit)
	}
	if err != nil {
		return Report{}, err
	}
	for _, file := range p.Files {
		if !seen[file.Path] {
			r.Missing = append(r.Missing, file.Path)
		}
	}
	if i := p.Interpreter; i != nil {
		info, err := os.Stat(i.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			r.Missing = append(r.Missing, i.Path)
		case err != nil:
			return Report{}, err
		default:
			was := File{Size: i.Size, SHA256: i.SHA256, MTime: i.MTime}
			if was.Size == 0 { // the lock file need not have it
				was.Size = min(info.Size(), mostBytes)
			}
			changed, err := differs(i.Path, info, was)
			if err != nil {
				return Report{}, err
			}
			if changed {
				r.Changed = append(r.Changed, i.Path)
			}
		}
	}
	slices.Sort(r.Changed)
	slices.Sort(r.Missing)
	slices.Sort(r.Added)
	return r, nil
}

// present reports whether there are folders, which belong to the user alone.
func present(dirs ...string) (bool, error) {
	for _, dir := range dirs {
		info, err := os.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err == nil {
			err = private(dir, info)
		}
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s: %w: found a file, expected a folder", dir, formats.ErrMalformed)
		}
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// Accept pins a plugin as it is now. What it says of itself stays as it was: a plugin that says something else when it
// is started is refused then.
func (f *Folder) Accept(ctx context.Context, p *Plugin) error {
	end, err := f.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	old, err := f.Lookup(p.Name)
	if err != nil {
		return err
	}
	if old.Version != p.Version {
		return fmt.Errorf("plugin %s: %w: found version %s, expected %s", p.Name, ErrChanged, old.Version, p.Version)
	}
	now := *old
	dir := f.Path(&now)
	there, err := present(dir, filepath.Dir(dir))
	if err == nil && !there {
		err = fmt.Errorf("%s: %w", dir, fs.ErrNotExist)
	}
	if err != nil {
		return fmt.Errorf("plugin %s: %w", p.Name, err)
	}
	if now.Files, err = hashTree(ctx, dir); err != nil {
		return fmt.Errorf("plugin %s: %w", p.Name, err)
	}
	now.Digest = digest(now.Files)
	// The command stands in plugin.json and has been taken from there: it is not another by being accepted.
	if was, is := find(old.Files, manifestName), find(now.Files, manifestName); was.SHA256 != is.SHA256 {
		return hint.With(fmt.Errorf("plugin %s: %w: %s has changed, which is read when a plugin is installed", p.Name,
			ErrChanged, manifestName), hint.Hint{Function: "InstallPlugin", Value: "PATH", Effect: "reads it"})
	}
	if err := now.runnable(ctx, dir); err != nil {
		return fmt.Errorf("plugin %s: %w", p.Name, err)
	}
	now.Installed = time.Now().UTC().Truncate(time.Second)
	plugins := f.Plugins()
	plugins[slices.Index(plugins, old)] = &now
	if err := f.write(plugins); err != nil {
		return err
	}
	*p = now
	return nil
}

func find(files []File, path string) File {
	for _, f := range files {
		if f.Path == path {
			return f
		}
	}
	return File{}
}

// hashTree lists the files of a folder, sorted by path.
func hashTree(ctx context.Context, dir string) ([]File, error) {
	var files []File
	left := int64(mostBytes)
	err := walk(dir, func(path string, info fs.FileInfo) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := checkPath(path); err != nil {
			return err
		}
		full := filepath.Join(dir, filepath.FromSlash(path))
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s: %w: found %s, expected files and folders alone", full, formats.ErrMalformed, kind(info))
		}
		f, err := hashFile(full, left)
		f.Path = path
		left -= f.Size
		files = append(files, f)
		return err
	})
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return files, err
}
