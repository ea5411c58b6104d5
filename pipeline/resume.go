package pipeline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/hint"
)

// complete reports whether dst, which exists, is the result of this plan already. Where it is something else and may
// not be replaced, that is an error.
func (r *run) complete(ctx context.Context, dst string) (bool, error) {
	earlier := stage{dst: dst, begun: r.begunAt(dst)}
	if earlier.begun.Plan == r.plan.Digest() && earlier.published() {
		return true, nil
	}
	err := r.matches(ctx, dst)
	switch {
	case err == nil:
		return true, nil
	case ctx.Err() != nil:
		return false, ErrInterrupted
	case r.opts.Force && errors.Is(err, ErrExists):
		return false, nil
	}
	return false, err
}

// begunAt is what the stage of dst says of itself, if there is one.
func (r *run) begunAt(dst string) begun {
	b, err := os.ReadFile(filepath.Join(dst+stageSuffix, beginName))
	if err != nil {
		return begun{}
	}
	x, _ := parseBegun(b)
	return x
}

// tidy removes the stage of this plan that a run has left which was killed just after it had put its result in place.
// It returns what could not be removed.
func (r *run) tidy(dst string) string {
	if r.begunAt(dst).Plan != r.plan.Digest() {
		if info, err := os.Lstat(dst + stageSuffix); err == nil && info.IsDir() {
			os.Remove(dst + stageSuffix) // where it is empty, as a kill in the midst of tidying leaves it
		}
		return ""
	}
	s, err := openStage(dst, r.plan.Digest(), r.plan.SingleFile, true, false)
	if err == nil {
		err = s.remove()
	}
	if err != nil {
		return leftover(dst+stageSuffix, err)
	}
	return ""
}

// matches makes the result again and compares it with what is at dst, byte for byte. What differs is an error of kind
// ErrExists.
func (r *run) matches(ctx context.Context, dst string) error {
	again := &run{plan: r.plan, from: r.from, opts: r.opts, compute: r.compute}
	again.scratch = filepath.Dir(dst)
	again.sink = comparing{dst: dst, single: r.plan.SingleFile, scratch: again.scratch}
	again.opts.Progress = nil // it counts the work that is left, and this is none
	err := again.prepare(ctx)
	if err == nil {
		err = again.shards(ctx)
	}
	if err == nil {
		err = again.files(ctx)
	}
	var d *different
	if errors.As(err, &d) {
		return hint.With(fmt.Errorf("%s: %w, and is not what this source and these options make: %w", dst, ErrExists, d),
			force)
	}
	return err
}

// takeUp looks at what an earlier run has left, and keeps it where that is asked for and possible.
func (s *stage) takeUp(digest string, resume bool) error {
	b, err := io.ReadAll(io.LimitReader(s.lock, beginBytes+1))
	if err != nil {
		return err
	}
	if err := s.restore(); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		scratch, _ := filepath.Match(scratchPattern, e.Name())
		if scratch || e.Name() == streamName || e.Name() == shardsName+partSuffix {
			if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	earlier, known := parseBegun(b)
	if resume && known {
		if earlier.Plan != digest {
			return fmt.Errorf("%s: %w; the same source and options are needed to go on with it, or a run that starts over",
				s.dir, ErrOtherPlan)
		}
		// Where the result is complete, but neither here nor at DST, somebody has moved it away after it was published: out
		// holds the DST that it replaced.
		s.begun = earlier
		if earlier.Result == "" || s.published() || modified(s.result()) == earlier.Result {
			if s.adopted, err = s.readShards(); err != nil {
				return err
			}
			return os.MkdirAll(s.out(), 0o777)
		}
		s.begun.Result = ""
	}
	for _, dir := range []string{s.out(), s.old(), filepath.Join(s.dir, shardsName)} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if err := s.write(); err != nil {
		return err
	}
	return os.Mkdir(s.out(), 0o777)
}
