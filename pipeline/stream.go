package pipeline

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sync/errgroup"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// streamChunk is how much of a tensor a Writer gets at a time.
const streamChunk = 1 << 20

// streamed reports whether the format writes the shard's file itself.
func (s *Shard) streamed() bool { return s.Size == formats.UnknownSize }

// streamedTensor is a tensor of a streamed shard.
type streamedTensor struct {
	tensor.Info
	job          *Job
	offset, size int64 // in the scratch file
}

// inOrder lists the tensors of a streamed shard in the order of their data, in which they have to stand one after the
// other with nothing between, and the size of all.
func (s *Shard) inOrder() ([]streamedTensor, int64, error) {
	if len(s.Header)+len(s.Pieces)+len(s.Checksums) > 0 {
		return nil, 0, fmt.Errorf("%s: found a header or pieces of a file of unknown size, expected none: %w",
			tensor.Quote(s.Name), formats.ErrMalformed)
	}
	if filepath.Base(s.Name) != s.Name {
		return nil, 0, fmt.Errorf("%s: found a file of unknown size in a folder, expected one beside all others: %w",
			tensor.Quote(s.Name), formats.ErrMalformed)
	}
	var list []streamedTensor
	for k := range s.Jobs {
		for _, o := range s.Jobs[k].Outputs {
			size, err := o.Size()
			if err != nil {
				return nil, 0, fmt.Errorf("tensor %s: %w", tensor.Quote(o.Name), err)
			}
			list = append(list, streamedTensor{o.Info, &s.Jobs[k], o.Offset, size})
		}
	}
	// An empty tensor begins where the next one does.
	slices.SortStableFunc(list, func(a, b streamedTensor) int {
		return cmp.Or(cmp.Compare(a.offset, b.offset), cmp.Compare(min(a.size, 1), min(b.size, 1)))
	})
	end := int64(0)
	for _, t := range list {
		if t.offset != end {
			return nil, 0, fmt.Errorf("%s: tensor %s: found it at byte %d, expected it at %d, after the one before: %w",
				tensor.Quote(s.Name), tensor.Quote(t.Name), t.offset, end, formats.ErrMalformed)
		}
		if end += t.size; end < t.offset {
			return nil, 0, fmt.Errorf("%s: tensor %s: %w", tensor.Quote(s.Name), tensor.Quote(t.Name), tensor.ErrOverflow)
		}
	}
	return list, end, nil
}

// scratchBytes is the size of the file in which the tensors of a streamed shard gather.
func (s *Shard) scratchBytes() int64 {
	var end int64
	for k := range s.Jobs {
		for _, o := range s.Jobs[k].Outputs {
			if size, err := o.Size(); err == nil { // as it is: inOrder has looked
				end = max(end, o.Offset+size)
			}
		}
	}
	return end
}

// checkStreamed holds a layout against what a format promises of shards that it writes itself, and keeps what it needs
// for them.
func (p *Plan) checkStreamed(f formats.Format, m formats.Metadata) error {
	for i := range p.Shards {
		s := &p.Shards[i]
		if s.Size < 0 && !s.streamed() {
			return fmt.Errorf("format %s: %s: found a size of %d, expected one of 0 or more, or %d for one that is unknown: %w",
				f.Name(), tensor.Quote(s.Name), s.Size, formats.UnknownSize, formats.ErrMalformed)
		}
		if !s.streamed() {
			continue
		}
		if _, ok := f.(formats.Streamer); !ok {
			return fmt.Errorf("format %s: %s: found no size of it, expected one of a format that writes no files: %w", f.Name(),
				tensor.Quote(s.Name), formats.ErrMalformed)
		}
		if _, _, err := s.inOrder(); err != nil {
			return fmt.Errorf("format %s: %w", f.Name(), err)
		}
		p.Metadata = metadata(m)
	}
	return nil
}

// streamer is the format that writes shards of the plan itself, nil where there are none.
func (p *Plan) streamer(known *formats.Registry) (formats.Streamer, error) {
	if p.StreamedShards() == 0 {
		return nil, nil
	}
	f, err := cmp.Or(known, formats.Default).Lookup(p.Format)
	if err != nil {
		return nil, err
	}
	s, ok := f.(formats.Streamer)
	if !ok {
		return nil, fmt.Errorf("%w: format %s writes no files of unknown size", ErrOtherPlan, p.Format)
	}
	return s, nil
}

// stream is a shard whose file its format writes: a File in which the tensors gather in any order, a scratch file, and
// a goroutine that sends them on in theirs, each as soon as it and all before it are complete.
type stream struct {
	*stageFile // the scratch file
	remove     func()
	run        *run
	shard      *shardRun
	tensors    []streamedTensor
	folder     string          // which holds the file that is written, and nothing else
	ctx        context.Context // of what the writer does
	cancel     context.CancelFunc
	writer     formats.Writer
	complete   chan *Job     // has room for all
	sent       chan struct{} // closed when all is sent, or cannot be
	err        error         // why it cannot, once sent is closed
	adopted    bool
}

// beginStream begins shard i, when those before it that are streamed are finished: one at a time has a scratch file.
func (r *run) beginStream(ctx context.Context, g *errgroup.Group, i int) error {
	for k := i - 1; k >= 0; k-- {
		if before := r.work[k]; before.streamed() { // it has waited for others
			select {
			case <-before.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			break
		}
	}
	sh := r.work[i]
	tensors, size, err := sh.inOrder()
	if err != nil {
		return err
	}
	values, err := r.plan.metadata()
	if err != nil {
		return err
	}
	s := &stream{run: r, shard: sh, tensors: tensors, complete: make(chan *Job, len(sh.Jobs)),
		sent: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(ctx)
	sh.file, sh.stream = s, s // which is closed at the end, however far this comes
	file, remove, err := createScratch(r.scratch)
	if err != nil {
		return err
	}
	s.remove = remove
	if err := file.Truncate(size); err != nil {
		return err
	}
	s.stageFile = newStageFile(file, size)
	s.stageFile.scratch = true
	if s.folder, err = r.sink.Folder(sh.Name); err != nil {
		return err
	}
	infos := make([]tensor.Info, len(tensors))
	for k, t := range tensors {
		infos[k] = t.Info
	}
	writer, err := r.streamer.Create(s.ctx, s.path(), infos, values)
	if err != nil {
		return s.failed(err)
	}
	s.writer = writer
	g.Go(func() error {
		defer close(s.sent)
		s.err = s.send(r.chunk)
		return s.err
	})
	return nil
}

// path is where the format writes its file.
func (s *stream) path() string { return filepath.Join(s.folder, s.shard.Name+partSuffix) }

func (s *stream) failed(err error) error {
	return fmt.Errorf("%s: format %s: %w", tensor.Quote(s.shard.Name), s.run.streamer.Name(), err)
}

// send hands the tensors to the format, in pieces that chunk has room for.
func (s *stream) send(chunk []byte) error {
	ready := make(map[*Job]bool, cap(s.complete))
	for i, t := range s.tensors {
		for !ready[t.job] {
			select {
			case j := <-s.complete:
				ready[j] = true
			case <-s.ctx.Done():
				return context.Cause(s.ctx)
			}
		}
		for off := int64(0); off < t.size; off += int64(len(chunk)) {
			if s.ctx.Err() != nil {
				return context.Cause(s.ctx)
			}
			p := chunk[:min(t.size-off, int64(len(chunk)))]
			if err := formats.ReadFull(s.File, p, t.offset+off); err != nil {
				return err
			}
			if err := s.writer.Write(i, off, p); err != nil {
				return s.failed(fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err))
			}
		}
	}
	return nil
}

// Commit has the format complete its file, and gives it to the sink. All tensors are complete.
func (s *stream) Commit() error {
	<-s.sent
	if s.err != nil {
		return s.err
	}
	size, err := s.writer.Finish(s.ctx)
	if err != nil {
		return s.failed(err)
	}
	f, err := s.inspect(size)
	if err != nil {
		return err
	}
	f.Kept = s.shard.kept()
	if err := s.run.sink.Adopt(s.ctx, s.path(), f); err != nil {
		return err
	}
	s.adopted = true
	s.run.written.Add(size)
	return s.Close()
}

// inspect makes sure that the format has written what it says it has, one file of that size, that it is durable, and
// returns what it is known by.
func (s *stream) inspect(size int64) (Streamed, error) {
	found := func(format string, args ...any) error {
		err := fmt.Errorf("found %s: %w", fmt.Sprintf(format, args...), formats.ErrMalformed)
		if b, ok := s.writer.(formats.Blamer); ok {
			err = b.Blame(err)
		}
		return s.failed(err)
	}
	entries, err := os.ReadDir(s.folder)
	if err != nil {
		return Streamed{}, err
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(s.path()) {
			return Streamed{}, found("%s beside the file that it was to write, expected no other", tensor.Quote(e.Name()))
		}
	}
	named, err := os.Lstat(s.path())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Streamed{}, found("no file where it was to write one")
	case err != nil:
		return Streamed{}, err
	case named.Mode()&fs.ModeSymlink != 0:
		return Streamed{}, found("a link where it was to write a file")
	case !named.Mode().IsRegular():
		return Streamed{}, found("something else (%v) where it was to write a file", named.Mode().Type())
	case storage.Links(named) > 1:
		return Streamed{}, found("a file that has another name too, expected one of its own")
	case named.Size() != size:
		return Streamed{}, found("a file of %d bytes, expected %d as it says", named.Size(), size)
	}
	f, err := os.OpenFile(s.path(), os.O_RDWR, 0) // a file that is only read cannot be synced everywhere
	if err != nil {
		return Streamed{}, err
	}
	defer f.Close()
	if opened, err := f.Stat(); err != nil {
		return Streamed{}, err
	} else if !os.SameFile(named, opened) {
		return Streamed{}, found("another file than just before")
	}
	if err := f.Sync(); err != nil {
		return Streamed{}, err
	}
	sum, n, err := digestOf(s.ctx, f)
	if err == nil && n != size {
		err = found("a file of %d bytes that was one of %d when it was finished", n, size)
	}
	return Streamed{Name: s.shard.Name, Size: size, SHA256: sum}, err
}

// digestOf reads all of f.
func digestOf(ctx context.Context, f io.Reader) (sum string, n int64, err error) {
	h, b := sha256.New(), buffers.Get().(*[pieceBytes]byte)
	defer buffers.Put(b)
	for {
		if ctx.Err() != nil {
			return "", 0, context.Cause(ctx)
		}
		k, err := f.Read(b[:])
		h.Write(b[:k])
		n += int64(k)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), n, nil
		}
		if err != nil {
			return "", 0, err
		}
	}
}

// Close gives up what is not finished, and all that was needed for it.
func (s *stream) Close() error {
	var err error
	if s.writer != nil && !s.adopted {
		err = s.writer.Abort()
	}
	s.writer = nil
	s.cancel()
	if s.stageFile != nil && !s.closed.Swap(true) { // which ends taking space for it
		<-s.allocated
	}
	if s.remove != nil {
		s.remove()
		s.remove = nil
	}
	if s.folder != "" {
		err = errors.Join(err, os.RemoveAll(s.folder))
		s.folder = ""
	}
	return err
}

// kept writes down the shares that adapters keep of the shard's changed weights, for each of these in the order of the
// plan.
func (sh *shardRun) kept() [][]string {
	made := make(map[*Job]*jobRun, len(sh.jobs))
	for _, j := range sh.jobs {
		made[j.Job] = j
	}
	var all [][]string
	for k := range sh.Jobs {
		j := made[&sh.Jobs[k]]
		if j == nil || j.weight.Change == nil {
			continue
		}
		list := []string{}
		for _, s := range j.shares {
			for _, x := range s.rows[0] { // all rows summed up
				list = append(list, strconv.FormatFloat(x, 'g', -1, 64))
			}
		}
		all = append(all, list)
	}
	return all
}

// recall takes up the kept shares of a shard that an earlier run has finished. Where they are not those of this plan it
// reports false.
func (r *run) recall(ctx context.Context, sh *shardRun, f Streamed) (bool, error) {
	var jobs []*jobRun
	for k := range sh.Jobs {
		if r.weights[sh.Jobs[k].Weight].Change == nil {
			continue
		}
		if len(jobs) == len(f.Kept) {
			return false, nil
		}
		j, err := r.newJob(ctx, &sh.Jobs[k], sh)
		if err != nil {
			return false, err
		}
		list, contributors := f.Kept[len(jobs)], j.weight.contributors()
		if len(list) != 2*len(contributors) {
			return false, nil
		}
		for i, c := range contributors {
			var x [2]float64
			for n := range x {
				if x[n], err = strconv.ParseFloat(list[2*i+n], 64); err != nil {
					return false, nil
				}
			}
			j.shares = append(j.shares, share{c.Row, [][2]float64{x}})
		}
		jobs = append(jobs, j)
	}
	if len(jobs) != len(f.Kept) {
		return false, nil
	}
	r.merges = append(r.merges, jobs...)
	return true, nil
}
