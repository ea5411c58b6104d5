package pipeline

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/storage"
)

// finishJob writes what of a weight no tile could, and the shard's end where it was the last.
func (r *run) finishJob(ctx context.Context, s *scratch, g *errgroup.Group, j *jobRun) error {
	sh := j.shard
	if j.encoder != nil {
		err := j.encoder.Finish(j.deferred, func(part int, off int64, p []byte) error {
			return r.write(sh, p, j.Outputs[part].Offset+off)
		})
		if err != nil {
			return err
		}
	}
	if n, ok := j.encoder.(interface{ Notices() []string }); ok {
		r.remark.Lock()
		for _, text := range n.Notices() {
			r.remarks[text] = append(r.remarks[text], j.weight.Name)
		}
		r.remark.Unlock()
	}
	j.deferred.close()
	if err := r.finishSources(ctx, s, j); err != nil {
		return err
	}
	if j.weight.Change != nil {
		if err := r.finishMerge(ctx, s, j); err != nil {
			return err
		}
	}
	if sh.stream != nil {
		sh.stream.complete <- j.Job
	}
	if sh.remaining.Add(-1) == 0 {
		g.Go(func() error { return r.finishShard(sh) })
	}
	return nil
}

// finishShard writes what of a shard is no data, makes it durable and gives it its name.
func (r *run) finishShard(sh *shardRun) error {
	pieces, err := sh.Sealed(sh.file)
	if err != nil {
		return err
	}
	for _, p := range pieces {
		if err := r.write(sh, p.Bytes, p.Offset); err != nil {
			return err
		}
	}
	if err := sh.file.Commit(); err != nil {
		return err
	}
	r.finished.Add(1)
	close(sh.done)
	return nil
}

// files writes what is small: what is copied along, then index and config.
func (r *run) files(ctx context.Context) error {
	for _, in := range r.plan.Copied {
		if err := r.copyAlong(ctx, in); err != nil {
			return err
		}
	}
	for _, f := range r.plan.Files {
		err := r.small(f.Name, int64(len(f.Data)), func(file File) error {
			_, err := file.WriteAt(f.Data, 0)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// copyAlong copies a file of the source as it is.
func (r *run) copyAlong(ctx context.Context, in InputFile) error {
	src, err := r.from.Base.Dir.Open(ctx, in.Name)
	if err != nil {
		return err
	}
	defer src.Close()
	if now := inputFile(in.Name, src); now != in {
		return changedError(r.from.Base.Dir.Path(in.Name), now, in)
	}
	return r.small(in.Name, in.Size, func(file File) error {
		for off := int64(0); off < in.Size; off += copyBytes {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := file.CopyAt(off, src, off, min(copyBytes, in.Size-off)); err != nil {
				return err
			}
		}
		return nil
	})
}

// small writes a file that is no shard.
func (r *run) small(name string, size int64, fill func(File) error) error {
	file, err := r.sink.Create(name, size)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := fill(file); err != nil {
		return err
	}
	r.written.Add(size)
	return file.Commit()
}

// unchanged makes sure that the source is still what the plan was made from.
func (r *run) unchanged(ctx context.Context) error {
	for _, in := range append(r.plan.Inputs[:len(r.plan.Inputs):len(r.plan.Inputs)], r.plan.Copied...) {
		now, err := inputFileIn(ctx, r.from.Base.Dir, in.Name)
		if err != nil {
			return err
		}
		if now != in {
			return changedError(r.from.Base.Dir.Path(in.Name), now, in)
		}
	}
	for _, a := range r.plan.Adapters {
		now, err := adapterFiles(ctx, a.folder(), a.names())
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
	return fmt.Errorf("%s: it changed while it was read: %d bytes of version %s, expected %d of %s",
		path, now.Size, now.Version, in.Size, in.Version)
}

// giveUp decides what becomes of the stage after an error, and says so in it.
func (r *run) giveUp(ctx context.Context, err error) error {
	interrupted := ctx.Err() != nil
	if interrupted {
		err = ErrInterrupted
	}
	n := r.finished.Load()
	keep := !r.spooled && n > 0 && (interrupted || storage.IsDiskError(err) || errors.Is(err, formats.ErrFailed))
	if failed := r.sink.Abort(keep); failed != nil {
		return fmt.Errorf("%w; and %s could not be removed: %v", err, r.sink, failed)
	}
	if keep {
		err := fmt.Errorf("%w; %d of %d shards are finished in %s", err, n, len(r.work), r.sink)
		return hint.With(err, hint.Hint{Option: "Resume", Effect: "goes on from there"})
	}
	return err
}
