package lock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// What a package may have at most.
const (
	mostFiles   = 10_000
	mostFolders = 10_000
	mostBytes   = 1 << 30
)

// walk visits what is below a folder and is no folder itself. Links are not followed.
func walk(root string, visit func(path string, info fs.FileInfo) error) error {
	files, folders := 0, 0
	var in func(below string) error
	in = func(below string) error {
		d, err := os.Open(filepath.Join(root, filepath.FromSlash(below)))
		if err != nil {
			return err
		}
		defer d.Close()
		for {
			entries, err := d.ReadDir(256) // a hostile folder may have millions
			for _, e := range entries {
				p := path.Join(below, e.Name())
				if len(p) > mostPath {
					return fmt.Errorf("%s: %w: found the path %s, expected at most %d bytes", root, formats.ErrLimit, tensor.Quote(p),
						mostPath)
				}
				if e.IsDir() {
					if folders++; folders > mostFolders {
						return fmt.Errorf("%s: %w: found more than %d folders, expected at most those", root, formats.ErrLimit,
							mostFolders)
					}
					if err := in(p); err != nil {
						return err
					}
					continue
				}
				if files++; files > mostFiles {
					return fmt.Errorf("%s: %w: found more than %d files, expected at most those", root, formats.ErrLimit, mostFiles)
				}
				info, err := e.Info()
				if err != nil {
					return err
				}
				if err := visit(p, info); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
	return in("")
}

// copyTree copies a file, or all files of a folder, to another folder. It returns them sorted by path. What must not be
// in a package is found before anything is copied.
func copyTree(ctx context.Context, from, to string) ([]File, error) {
	type item struct {
		path, source string
		info         fs.FileInfo
	}
	var items []item
	left := int64(mostBytes)
	add := func(p, source string, info fs.FileInfo) error {
		if err := checkPath(p); err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s: %w: found %s, expected files and folders alone", source, formats.ErrMalformed, kind(info))
		}
		if left -= info.Size(); left < 0 {
			return tooLarge(from)
		}
		items = append(items, item{p, source, info})
		return nil
	}
	info, err := os.Stat(from)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		err = walk(from, func(p string, info fs.FileInfo) error {
			return add(p, filepath.Join(from, filepath.FromSlash(p)), info)
		})
	} else {
		err = add(filepath.Base(from), from, info)
	}
	if err != nil {
		return nil, err
	}
	slices.SortFunc(items, func(a, b item) int { return strings.Compare(a.path, b.path) })
	files := make([]File, len(items))
	left = mostBytes
	for i, it := range items {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f, err := copyFile(it.source, filepath.Join(to, filepath.FromSlash(it.path)), it.info, left)
		if err != nil {
			return nil, err
		}
		f.Path, left = it.path, left-f.Size
		files[i] = f
	}
	return files, nil
}

func tooLarge(from string) error {
	return fmt.Errorf("%s: %w: found a package of more than %d bytes, expected at most those", from, formats.ErrLimit,
		int64(mostBytes))
}

func kind(info fs.FileInfo) string {
	switch m := info.Mode(); {
	case m&fs.ModeSymlink != 0:
		return "a link"
	case m.IsDir():
		return "a folder"
	}
	return "a special file"
}

// copyFile copies a file of at most so many bytes, with its time and whether it can be run.
func copyFile(from, to string, info fs.FileInfo, most int64) (f File, err error) {
	in, err := storage.Open(from)
	if err != nil {
		return f, err
	}
	defer in.Close()
	opened, err := in.Stat()
	if err != nil {
		return f, err
	}
	if !os.SameFile(opened, info) { // a link by now
		return f, fmt.Errorf("%s: %w: found another file when it was opened", from, formats.ErrMalformed)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return f, err
	}
	mode := fs.FileMode(0o600)
	if info.Mode()&0o111 != 0 {
		mode = 0o700
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return f, err
	}
	defer out.Close()
	h := sha256.New()
	f.Size, err = io.Copy(io.MultiWriter(out, h), io.LimitReader(in, most+1))
	if err != nil {
		return f, err
	}
	if f.Size > most { // it has grown
		return f, tooLarge(from)
	}
	if err := out.Close(); err != nil {
		return f, err
	}
	if err := os.Chtimes(to, info.ModTime(), info.ModTime()); err != nil {
		return f, err
	}
	copied, err := os.Lstat(to)
	if err != nil {
		return f, err
	}
	f.SHA256, f.MTime = sum(h), stamp(copied)
	return f, nil
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// stamp is when a file was changed, whichever time that is.
func stamp(info fs.FileInfo) string {
	t := info.ModTime()
	return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond())
}

// hashFile is the size, sha256 and time of a file of at most so many bytes.
func hashFile(path string, most int64) (f File, err error) {
	in, err := storage.Open(path)
	if err != nil {
		return f, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return f, err
	}
	h := sha256.New()
	if f.Size, err = io.Copy(h, io.LimitReader(in, most+1)); err != nil {
		return f, err
	}
	if f.Size > most {
		return f, fmt.Errorf("%s: %w: found more than %d bytes, expected at most those", path, formats.ErrLimit, most)
	}
	f.SHA256, f.MTime = sum(h), stamp(info)
	return f, nil
}
