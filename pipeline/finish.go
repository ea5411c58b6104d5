package pipeline

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/lorakit/lorakit/storage"
)

// finishJob writes what of a weight no tile could, and the shard's end where it
// was the last.
func (r *run) finishJob(s *scratch, g *errgroup.Group, j *jobRun) error {
	sh := j.shard
	if j.encoder != nil {
		err := j.encoder.Finish(j.carry, func(part int, off int64, p []byte) error {
			return r.write(sh, p, j.Outputs[part].Offset+off)
		})
		if err != nil {
			return err
		}
	}
	j.carry.close()
	if j.weight.Change != nil {
		if err := r.finishMerge(s, j); err != nil {
			return err
		}
	}
	if sh.left.Add(-1) == 0 {
		g.Go(func() error { return r.finishShard(sh) })
	}
	return nil
}

// finishShard fills in the checksums of a shard, makes it durable and gives it its name.
func (r *run) finishShard(sh *shardRun) error {
	if r.against != "" {
		r.finished.Add(1)
		close(sh.done)
		return sh.file.Close()
	}
	if err := sh.Seal(sh.file); err != nil {
		return err
	}
	if err := sh.file.Sync(); err != nil {
		return err
	}
	if err := sh.file.Close(); err != nil {
		return err
	}
	name := filepath.Join(r.stage.out(), filepath.FromSlash(sh.Name))
	if err := os.Rename(name+partSuffix, name); err != nil {
		return err
	}
	r.finished.Add(1)
	close(sh.done)
	return nil
}

// files writes what is small: what is carried along, then index and config.
func (r *run) files(ctx context.Context) error {
	for _, in := range r.plan.Carried {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.carryAlong(ctx, in); err != nil {
			return err
		}
	}
	for _, f := range r.plan.Files {
		if err := writeFile(filepath.Join(r.stage.out(), filepath.FromSlash(f.Name)), f.Data); err != nil {
			return err
		}
		r.written.Add(int64(len(f.Data)))
	}
	return nil
}

func (r *run) carryAlong(ctx context.Context, in InputFile) error {
	path, err := storage.Within(r.from.Base.Path, in.Name)
	if err != nil {
		return err
	}
	src, err := storage.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
	out := filepath.Join(r.stage.out(), filepath.FromSlash(in.Name))
	if err := os.MkdirAll(filepath.Dir(out), 0o777); err != nil {
		return err
	}
	dst, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := storage.Preallocate(dst, in.Size); err != nil {
		return err
	}
	for off := int64(0); off < in.Size; off += copyBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(copyBytes, in.Size-off)
		if err := storage.CopyRange(dst, off, src, off, n); err != nil {
			return err
		}
		r.written.Add(n)
	}
	if err := dst.Sync(); err != nil {
		return err
	}
	return dst.Close()
}

func writeFile(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// unchanged makes sure that the source is still what the plan was made from.
func (r *run) unchanged() error {
	for _, in := range append(r.plan.Inputs[:len(r.plan.Inputs):len(r.plan.Inputs)], r.plan.Carried...) {
		path := r.from.Base.FilePath(in.Name)
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if now := inputFile(in.Name, info); now != in {
			return changedError(path, now, in)
		}
	}
	for _, a := range r.plan.Adapters {
		now, err := adapterFiles(a.Dir, a.names())
		if err != nil {
			return err
		}
		for i, in := range a.Files {
			if now[i] != in {
				return changedError(filepath.Join(a.Path, in.Name), now[i], in)
			}
		}
	}
	return nil
}

func changedError(path string, now, in InputFile) error {
	return fmt.Errorf("%s: it changed while it was read: %d bytes, modified at %s, expected %d, at %s", path, now.Size, now.Modified, in.Size, in.Modified)
}

// giveUp decides what becomes of the stage after an error, and says so in it.
func (r *run) giveUp(ctx context.Context, err error) error {
	interrupted := ctx.Err() != nil
	if interrupted {
		err = ErrInterrupted
	}
	n := r.finished.Load()
	if n > 0 && (interrupted || storage.IsDiskError(err)) {
		r.stage.close()
		return fmt.Errorf("%w; %d of %d shards are finished in %s, --resume goes on from there", err, n, len(r.work), r.stage.dir)
	}
	if left := r.stage.remove(); left != nil {
		return fmt.Errorf("%w; and %s could not be removed: %v", err, r.stage.dir, left)
	}
	r.stage.removeParents()
	return err
}
