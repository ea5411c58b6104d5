package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lorakit/lorakit/internal/nearest"
)

// Options say how local folders are read.
type Options struct {
	// FollowLinks takes links that lead out of a folder. Whoever made them decides what is read.
	FollowLinks bool
}

// Local is a folder of this machine.
func Local(dir string, o Options) Folder { return &local{dir: dir, o: o} }

// Resolve finds what a path of this machine leads to: a folder, with an empty name, or a file, as the folder that it
// is in and its name there. That file may be a link to anywhere, since whoever gave the path has chosen it.
func Resolve(path string, o Options) (Folder, string, error) {
	info, err := Stat(path)
	if err != nil {
		return nil, "", err
	}
	if info.IsDir() {
		return Local(path, o), "", nil
	}
	dir, name := filepath.Split(path)
	return &local{dir: dir, o: o, given: name}, name, nil
}

// Stat is os.Stat. For a path that is not there the error names the nearest that is, or says that it is a link to
// nothing.
func Stat(path string) (fs.FileInfo, error) {
	info, err := os.Stat(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return info, err
	}
	if to, failed := os.Readlink(path); failed == nil {
		return nil, dangling(path, to)
	}
	parent, name := filepath.Split(filepath.Clean(path))
	for {
		if info, failed := os.Stat(cmp.Or(parent, ".")); failed == nil {
			if near, ok := nearestIn(cmp.Or(parent, "."), name); ok && info.IsDir() {
				err = fmt.Errorf("%w%s", err, nearest.Hint(parent+near))
			}
			return nil, err
		}
		above, last := filepath.Split(strings.TrimRight(parent, string(filepath.Separator)))
		if above == parent || last == "" {
			return nil, err
		}
		parent, name = above, last
	}
}

// mostNames is how many names of a folder are looked through for one that may be meant.
const mostNames = 10_000

func nearestIn(dir, name string) (string, bool) {
	d, err := os.Open(dir)
	if err != nil {
		return "", false
	}
	defer d.Close()
	names, _ := d.Readdirnames(mostNames)
	slices.Sort(names)
	return nearest.To(name, names)
}

// LocalPath is where on this machine a file of a folder is, all links resolved, and with an empty name the folder
// itself. It is empty for a folder that is elsewhere, and for a file that is not there.
func LocalPath(dir Folder, name string) string {
	l, ok := dir.(*local)
	if !ok {
		return ""
	}
	path, err := l.resolve(name)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return ""
	}
	return path
}

// OSFile returns the file of the operating system that a File reads, or any other reader that is one. The kernel can
// copy from it.
func OSFile(r any) (*os.File, bool) {
	switch f := r.(type) {
	case *os.File:
		return f, true
	case *localFile:
		return f.File, true
	}
	return nil, false
}

type local struct {
	dir   string
	o     Options
	given string // a name that is taken wherever it leads
}

func (l *local) Path(name string) string {
	if name == "" {
		return l.dir
	}
	return filepath.Join(l.dir, filepath.FromSlash(name))
}

func (l *local) Open(ctx context.Context, name string) (File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	path := l.Path(name)
	if name != l.given || name == "" {
		var err error
		if path, err = within(l.dir, name, l.o); err != nil {
			return nil, err
		}
	}
	f, info, err := open(path)
	if err != nil {
		return nil, err
	}
	return &localFile{f, info}, nil
}

// resolve finds the path of a file or folder in the folder, or with no name its own.
func (l *local) resolve(name string) (string, error) {
	switch name {
	case "":
		return cmp.Or(l.dir, "."), nil // the folder of a file that was given without one
	case l.given:
		return l.Path(name), nil
	}
	return within(l.dir, name, l.o)
}

func (l *local) List(ctx context.Context, name string) ([]Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := l.resolve(name)
	if err != nil {
		return nil, err
	}
	found, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(found))
	var above []string
	for i, e := range found {
		entries[i] = Entry{Name: e.Name(), Folder: e.IsDir(), Link: e.Type()&fs.ModeSymlink != 0}
		if !entries[i].Link || !l.o.FollowLinks {
			continue
		}
		if above == nil {
			if above, err = l.above(name); err != nil {
				return nil, err
			}
		}
		entries[i].Folder = leadsToFolder(filepath.Join(dir, e.Name()), above)
	}
	return entries, nil
}

// above lists the folders that lead to one in the folder, itself included, all links resolved.
func (l *local) above(name string) ([]string, error) {
	root, err := filepath.Abs(l.dir)
	if err != nil {
		return nil, err
	}
	var list []string
	for {
		path, err := filepath.EvalSymlinks(filepath.Join(root, filepath.FromSlash(name)))
		if err != nil {
			return nil, err
		}
		list = append(list, path)
		if name == "" {
			return list, nil
		}
		name = name[:max(0, strings.LastIndexByte(name, '/'))]
	}
}

// leadsToFolder reports whether a link leads to a folder in which none of the folders above it lies: else it would be
// listed in itself without end.
func leadsToFolder(link string, above []string) bool {
	path, err := filepath.Abs(link)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return false
	}
	info, err := os.Stat(path)
	return err == nil && info.IsDir() && !slices.ContainsFunc(above,
		func(dir string) bool { return path == dir || inside(path, dir) })
}

// localFile is an *os.File, so that reading it takes no way round.
type localFile struct {
	*os.File
	info fs.FileInfo
}

func (f *localFile) Size() int64     { return f.info.Size() }
func (f *localFile) Version() string { return version(f.info.ModTime()) }

// version writes a time as seconds since 1970, to the nanosecond. A file may have one that no calendar has.
func version(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }
