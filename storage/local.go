package storage

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Options say how local folders are read.
type Options struct {
	// FollowLinks takes links that lead out of a folder. Whoever made them decides what is read.
	FollowLinks bool
}

// Local is a folder of this machine.
func Local(dir string, o Options) Folder { return &local{dir: dir, o: o} }

// Resolve finds what a path of this machine leads to: a folder, with an empty name, or a file, as
// the folder that it is in and its name there. That file may be a link to anywhere, since whoever gave the
// path has chosen it.
func Resolve(path string, o Options) (Folder, string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, "", err
	}
	if info.IsDir() {
		return Local(path, o), "", nil
	}
	dir, name := filepath.Split(path)
	return &local{dir: dir, o: o, given: name}, name, nil
}

// LocalPath is where on this machine a file of a folder is, and with an empty name the folder itself.
// It reports false for folders of other places.
func LocalPath(dir Folder, name string) (string, bool) {
	if l, ok := dir.(*local); ok {
		return l.Path(name), true
	}
	return "", false
}

// OSFile returns the file of the operating system that a File reads, or any other reader that
// is one. The kernel can copy from it.
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
		if path, err = l.within(name); err != nil {
			return nil, err
		}
	}
	f, info, err := open(path)
	if err != nil {
		return nil, err
	}
	return &localFile{f, info}, nil
}

func (l *local) within(name string) (string, error) { return Within(l.dir, name) }

func (l *local) List(ctx context.Context, name string) ([]Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir := l.dir
	if name != "" {
		var err error
		if dir, err = l.within(name); err != nil {
			return nil, err
		}
	}
	if dir == "" { // that of a file without one
		dir = "."
	}
	found, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(found))
	for i, e := range found {
		entries[i] = Entry{Name: e.Name(), Folder: e.IsDir(), Link: e.Type()&fs.ModeSymlink != 0}
	}
	return entries, nil
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
