package pipeline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/storage"
)

// CheckDestination refuses, before any work is done, a destination that a run from src, empty where that is not on
// this machine, could not or must not write to. One that exists is refused unless it may be replaced, or taken for the
// result of an earlier run.
func CheckDestination(src, dst string, o RunOptions) error {
	abs, err := absolute(dst)
	if err != nil {
		return err
	}
	if err := apart(src, dst); err != nil {
		return err
	}
	if err := apart(src, abs+stageSuffix); err != nil {
		return err
	}
	info, err := os.Lstat(abs)
	if at, failed := os.Stat(abs); failed == nil {
		info = at // of a link what it leads to, as /dev/stdout
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket|fs.ModeIrregular) != 0:
		return fmt.Errorf("%s: %w: it is a device, a pipe or a socket, which is never replaced", dst, ErrRefused)
	case !o.Force && !o.Resume:
		return existsError(dst)
	case o.Force && storage.IsMountPoint(dst):
		return fmt.Errorf("%s: %w: it is a mount point, which cannot be replaced; give a folder inside of it", dst,
			ErrRefused)
	}
	return nil
}

// absolute makes a destination's path absolute. An empty one, as an unset variable of a shell leaves it, would be the
// current folder.
func absolute(dst string) (string, error) {
	if dst == "" {
		return "", fmt.Errorf("%w: the destination is empty, expected a path", ErrRefused)
	}
	return filepath.Abs(dst)
}

// CheckSpared refuses a destination that would take the place of something else that a run reads, or of a folder
// around it: an adapter that is merged, the other side of a comparison.
func CheckSpared(dst string, sources ...string) error {
	if _, err := absolute(dst); err != nil {
		return err
	}
	b, err := resolve(dst)
	if err != nil {
		return err
	}
	di, missing := os.Stat(b)
	for _, src := range sources {
		a, err := resolve(src)
		if err != nil {
			return err
		}
		si, err := storage.Stat(a)
		if err != nil {
			return err
		}
		for _, at := range []string{b, b + stageSuffix} {
			if insideOrSame(at, a) {
				return fmt.Errorf("%s: %w: %s is read, and would be replaced", dst, ErrRefused, src)
			}
		}
		if missing == nil && os.SameFile(si, di) {
			return fmt.Errorf("%s: %w: %s is read, and would be replaced", dst, ErrRefused, src)
		}
	}
	return nil
}

// paths are the files on this machine that a plan of c reads, wherever links have led.
func (p *Plan) paths(c *checkpoint.Checkpoint) []string {
	var list []string
	add := func(dir storage.Folder, files []InputFile) {
		for _, f := range files {
			if path := storage.LocalPath(dir, f.Name); path != "" {
				list = append(list, path)
			}
		}
	}
	add(c.Dir, p.Inputs)
	add(c.Dir, p.Copied)
	for _, a := range p.Adapters {
		add(a.folder(), a.Files)
	}
	return list
}

// apart refuses a destination that is the source, or inside of it, or around it.
func apart(src, dst string) error {
	if src == "" {
		return nil
	}
	a, err := resolve(src)
	if err != nil {
		return err
	}
	b, err := resolve(dst)
	if err != nil {
		return err
	}
	si, err := storage.Stat(a)
	if err != nil {
		return err
	}
	if di, err := os.Stat(b); a == b || err == nil && os.SameFile(si, di) {
		return fmt.Errorf("%s: %w: source and destination are the same", dst, ErrRefused)
	}
	if insideOrSame(a, b) {
		return fmt.Errorf("%s: %w: the destination is inside of the source %s", dst, ErrRefused, src)
	}
	if insideOrSame(b, a) {
		return fmt.Errorf("%s: %w: the source %s is inside of the destination", dst, ErrRefused, src)
	}
	return nil
}

// resolve makes a path that need not exist absolute and free of links.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p, nil
	}
	dir := filepath.Dir(path)
	if dir == path {
		return path, nil
	}
	parent, err := resolve(dir)
	return filepath.Join(parent, filepath.Base(path)), err
}

func insideOrSame(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}
