package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
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

// CheckSpared refuses a destination that would take the place of something else that a run reads, or
// of a folder around it: an adapter that is merged, the other side of a comparison.
func CheckSpared(dst string, sources ...string) error {
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
		si, err := os.Stat(a)
		if err != nil {
			return err
		}
		for _, at := range []string{b, b + stageSuffix} {
			if within(at, a) {
				return fmt.Errorf("%s: %w: %s is read, and would be replaced", dst, ErrRefused, src)
			}
		}
		if missing == nil && os.SameFile(si, di) {
			return fmt.Errorf("%s: %w: %s is read, and would be replaced", dst, ErrRefused, src)
		}
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

// different is what a run that compares finds.
type different struct{ name, how string }

func (d *different) Error() string { return tensor.Quote(d.name) + " " + d.how }

// matches makes the result again and compares it with what is at dst, byte for byte.
// What differs is an error of kind ErrExists.
func (r *run) matches(ctx context.Context, dst string) error {
	again := &run{plan: r.plan, from: r.from, opts: r.opts, compute: r.compute, against: dst}
	again.opts.Progress = nil // it counts the work that is left, and this is none
	err := again.prepare()
	if err == nil {
		err = again.shards(ctx)
	}
	if err == nil {
		err = again.sameFiles(ctx)
	}
	var d *different
	if errors.As(err, &d) {
		return fmt.Errorf("%s: %w, and is not what this source and these flags make: %w; --force replaces it", dst, ErrExists, d)
	}
	return err
}

// there is the path of a file of the result that is compared with.
func (r *run) there(name string) string {
	if r.plan.SingleFile {
		return r.against
	}
	return filepath.Join(r.against, filepath.FromSlash(name))
}

// open opens a shard to compare with.
func (r *run) open(sh *shardRun) error {
	f, err := r.openThere(sh.Name)
	if err != nil {
		return err
	}
	sh.file = f
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != sh.Size {
		return &different{sh.Name, "has another size"}
	}
	holds, err := sh.Holds(f)
	if err == nil && !holds {
		err = &different{sh.Name, "has other content"}
	}
	return err
}

// same compares what would be written with what is there.
func (r *run) same(sh *shardRun, p []byte, off int64) error {
	const piece = 64 << 10
	there := buffers.Get().(*[piece]byte)
	defer buffers.Put(there)
	for len(p) > 0 {
		n := min(len(p), piece)
		if _, err := sh.file.ReadAt(there[:n], off); err != nil {
			return err
		}
		if !bytes.Equal(p[:n], there[:n]) {
			return &different{sh.Name, "has other content"}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// openThere opens a file of the result that is compared with.
func (r *run) openThere(name string) (*os.File, error) {
	f, err := storage.Open(r.there(name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, storage.ErrNotRegular) {
		return nil, &different{name, "is missing"}
	}
	return f, err
}

// sameFiles compares all but the shards.
func (r *run) sameFiles(ctx context.Context) error {
	for _, f := range r.plan.Files {
		if err := r.sameFile(ctx, f.Name, bytes.NewReader(f.Data), int64(len(f.Data))); err != nil {
			return err
		}
	}
	for _, in := range r.plan.Carried {
		src, err := storage.Open(r.from.Base.FilePath(in.Name))
		if err != nil {
			return err
		}
		err = r.sameFile(ctx, in.Name, src, in.Size)
		src.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *run) sameFile(ctx context.Context, name string, want io.ReaderAt, size int64) error {
	f, err := r.openThere(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != size {
		return &different{name, "has another size"}
	}
	same, err := checkpoint.SameContent(ctx, want, 0, f, 0, size)
	if err == nil && !same {
		err = &different{name, "has other content"}
	}
	return err
}
