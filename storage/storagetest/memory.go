// Package storagetest helps to test what reads from a storage.Folder.
package storagetest

import (
	"bytes"
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/storage"
)

// Memory is a folder whose files are kept in memory, by their names. It has no links, and no path of any
// machine: in messages its files are memory:NAME.
type Memory map[string][]byte

// Path is memory: with the name.
func (m Memory) Path(name string) string { return "memory:" + name }

// Open opens a file.
func (m Memory) Open(ctx context.Context, name string) (storage.File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\\x00") {
		return nil, fmt.Errorf("%s: found the file name %q, expected one inside the folder: %w", m.Path(""), name,
			storage.ErrOutside)
	}
	if b, ok := m[name]; ok {
		return file{bytes.NewReader(b)}, nil
	}
	for other := range m {
		if strings.HasPrefix(other, name+"/") {
			return nil, fmt.Errorf("%s: found a folder, expected a file: %w", m.Path(name), storage.ErrNotRegular)
		}
	}
	return nil, &fs.PathError{Op: "open", Path: m.Path(name), Err: fs.ErrNotExist}
}

// List lists what is in the folder or below it.
func (m Memory) List(ctx context.Context, name string) ([]storage.Entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var entries []storage.Entry
	for other := range m {
		rest := other
		if name != "" {
			var below bool
			if rest, below = strings.CutPrefix(other, name+"/"); !below {
				continue
			}
		}
		first, _, folder := strings.Cut(rest, "/")
		entries = append(entries, storage.Entry{Name: first, Folder: folder})
	}
	if name != "" && len(entries) == 0 {
		return nil, &fs.PathError{Op: "list", Path: m.Path(name), Err: fs.ErrNotExist}
	}
	slices.SortFunc(entries, func(a, b storage.Entry) int { return strings.Compare(a.Name, b.Name) })
	return slices.Compact(entries), nil
}

// FromFS keeps the files of fsys, below path.
func FromFS(fsys fs.FS, below string) (Memory, error) {
	m := Memory{}
	err := fs.WalkDir(fsys, below, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(fsys, name)
		m[strings.TrimPrefix(path.Clean(name), path.Clean(below)+"/")] = b
		return err
	})
	return m, err
}

// file has the checksum of its content as its version.
type file struct{ *bytes.Reader }

func (file) Close() error { return nil }

func (f file) Version() string {
	h := crc32.NewIEEE()
	_, _ = io.Copy(h, io.NewSectionReader(f.Reader, 0, f.Size())) // memory and a hash never fail
	return fmt.Sprintf("%08x", h.Sum32())
}
