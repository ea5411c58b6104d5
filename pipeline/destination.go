package pipeline

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// CheckDestination refuses, before any work is done, a destination that a run from
// src could not or must not write to. One that exists is refused unless it may be
// replaced, or taken for the result of an earlier run.
func CheckDestination(src, dst string, o RunOptions) error {
	abs, err := filepath.Abs(dst)
	if err != nil {
		return err
	}
	if err := apart(src, dst); err != nil {
		return err
	}
	if err := apart(src, abs+stageSuffix); err != nil {
		return err
	}
	_, err = os.Lstat(abs)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !o.Force && !o.Resume:
		return existsError(dst)
	case o.Force && storage.IsMountPoint(dst):
		return fmt.Errorf("%s: %w: it is a mount point, which cannot be replaced; give a folder inside of it", dst, ErrRefused)
	}
	return nil
}

// apart refuses a destination that is the source, or inside of it, or around it.
func apart(src, dst string) error {
	a, err := resolve(src)
	if err != nil {
		return err
	}
	b, err := resolve(dst)
	if err != nil {
		return err
	}
	si, err := os.Stat(a)
	if err != nil {
		return err
	}
	if di, err := os.Stat(b); a == b || err == nil && os.SameFile(si, di) {
		return fmt.Errorf("%s: %w: source and destination are the same", dst, ErrRefused)
	}
	if within(a, b) {
		return fmt.Errorf("%s: %w: the destination is inside of the source %s", dst, ErrRefused, src)
	}
	if within(b, a) {
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

func within(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}

// matches reports by an error whether what is at dst is not what the plan makes: its
// small files and its headers are compared whole, and of each tensor the first
// tile, which is made again for it.
func (r *run) matches(dst string) error {
	differs := func(name, why string) error {
		return fmt.Errorf("%s: %w, and was not made by this source and these flags: %s %s; --force replaces it", dst, ErrExists, formats.Quote(name), why)
	}
	path := func(name string) string {
		if r.plan.SingleFile {
			return dst
		}
		return filepath.Join(dst, filepath.FromSlash(name))
	}
	for _, f := range r.plan.Files {
		b, err := os.ReadFile(path(f.Name))
		if err != nil || !bytes.Equal(b, f.Data) {
			return differs(f.Name, "is missing or another")
		}
	}
	for _, in := range r.plan.Carried {
		if info, err := os.Stat(path(in.Name)); err != nil || info.Size() != in.Size {
			return differs(in.Name, "is missing or another")
		}
	}
	s := &scratch{compute: r.compute}
	for _, sh := range r.work {
		f, err := storage.Open(path(sh.Name))
		if err != nil {
			return differs(sh.Name, "is missing")
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil || info.Size() != sh.Size {
			return differs(sh.Name, "is another")
		}
		compare := func(p []byte, off int64) error {
			there := make([]byte, len(p))
			if _, err := f.ReadAt(there, off); err != nil || !bytes.Equal(p, there) {
				return differs(sh.Name, "holds something else")
			}
			return nil
		}
		if err := compare(sh.Header, 0); err != nil {
			return err
		}
		for k := range sh.Jobs {
			j, err := r.newJob(&sh.Jobs[k], sh)
			if err != nil {
				return err
			}
			if err := r.firstTile(s, j, compare); err != nil {
				return err
			}
		}
	}
	return nil
}

// firstTile makes the first bytes of a job again.
func (r *run) firstTile(s *scratch, j *jobRun, write func(p []byte, off int64) error) error {
	if j.Copy {
		for i := range j.weight.Parts {
			p := &j.weight.Parts[i]
			b := sized(&s.values, min(p.Bytes, smallestTile))
			if err := readPart(p, b, 0); err != nil {
				return err
			}
			if err := write(b, j.Outputs[i].Offset); err != nil {
				return err
			}
		}
		return nil
	}
	n := min(j.tileElements(smallestTile), j.weight.Count())
	if n == 0 {
		return nil
	}
	if j.encoder != nil {
		j.carry = &carry{floats: make([]float32, j.encoder.Carry(0, n))}
	}
	return r.change(s, task{job: j, hi: n}, write)
}
