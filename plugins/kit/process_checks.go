package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/tensor"
)

// describeMatches: the plugin says of itself what it said when it was installed, each time.
func describeMatches(ctx context.Context, r *run) (string, error) {
	p := r.Plugin
	for range 2 {
		for range 2 {
			said, err := p.Describe(ctx)
			if err != nil {
				r.broken = "see " + r.current + ": the plugin does not start"
				if errors.Is(err, lock.ErrChanged) {
					err = fail("install it again, or pin its files as they are now by lorakit plugin verify --accept "+r.Name,
						"%v", err)
				}
				return "", err
			}
			if what := p.Described().Difference(&said); what != "" {
				return "", fmt.Errorf("it says another %s than when it was installed", what)
			}
		}
		p.Stop()
	}
	for _, f := range r.formats {
		if f.ReadOnly() {
			continue
		}
		_, err := f.types(ctx)
		if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
			return "", fail("describe a format as written only if it is: the one that says so refuses all tensors",
				"format %s is described as written, and %v", f.Name(), err)
		}
		if err != nil {
			return "", fmt.Errorf("format %s: nothing can be written and read: %w", f.Name(), err)
		}
	}
	d := p.Described()
	return fmt.Sprintf("%s %s: %s, %s; %s", d.Name, d.Version, count(len(d.Formats), "format"),
		count(len(d.Schemes), "scheme"), strings.Join(d.Capabilities, ", ")), nil
}

// stdoutQuiet: nothing comes on stdout but the handshake.
func stdoutQuiet(ctx context.Context, r *run) (string, error) {
	if err := r.Plugin.Start(ctx); err != nil {
		return "", err
	}
	for _, f := range r.formats {
		if w, err := f.small(ctx); err == nil {
			if c, err := f.open(ctx, w); err == nil {
				c.Close()
			}
		}
	}
	time.Sleep(300 * time.Millisecond)
	if s := r.Plugin.Stray(); s != "" {
		return "", fmt.Errorf("it writes to stdout after the handshake: %q", s)
	}
	return "nothing but the handshake", nil
}

// mostWait is how long a process may take to end.
const mostWait = 3 * time.Second

// exitWithHost: a process ends when the host is gone, which it sees by the end of a pipe.
func exitWithHost(ctx context.Context, r *run) (string, error) {
	r.Plugin.Stop()
	defer r.Plugin.Stop()
	if err := r.Plugin.Start(ctx); err != nil {
		return "", err
	}
	process := r.Plugin.Process()
	r.Plugin.HangUp()
	return r.ends(process, "the pipe of the host was closed")
}

// exitIn3s: a process ends when it is asked to.
func exitIn3s(ctx context.Context, r *run) (string, error) {
	r.Plugin.Stop()
	defer r.Plugin.Stop()
	if err := r.Plugin.Start(ctx); err != nil {
		return "", err
	}
	process := r.Plugin.Process()
	within, cancel := context.WithTimeout(ctx, mostWait)
	defer cancel()
	if err := r.Plugin.Shutdown(within); status.Code(err) == codes.Unimplemented {
		return "", errors.New("it does not serve Shutdown")
	}
	return r.ends(process, "Shutdown was called")
}

// ends waits for all processes of the plugin's group to end.
func (r *run) ends(process int, since string) (string, error) {
	if process == 0 {
		return "it is gone at once", nil
	}
	begin := time.Now()
	for {
		running, seen := host.Group(process)
		if !seen && r.Plugin.Process() == 0 || seen && len(running) == 0 {
			return fmt.Sprintf("gone %v after %s", time.Since(begin).Round(time.Millisecond), since), nil
		}
		if time.Since(begin) > mostWait {
			return "", fmt.Errorf("the processes %v still run %v after %s", running, mostWait, since)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

const (
	// A process is warm when it has done something a few times; then it is done so often at least, and more often as far
	// as there is time.
	warmUp, leastRounds, mostRounds = 10, 24, 1000
	roundTime                       = 2 * time.Second
	// noise is how much the memory of a process may grow for reasons of its own: a garbage collector that has not run yet.
	noise = 32 << 20
	// headerBytes is what the file has beside its data that is opened so often: kept each time, it is more than noise. It
	// is in long names, since some formats take long for each tensor.
	headerBytes = 2 << 20
	nameBytes   = 4000
	bulk        = 3 * noise
	// mostFiles is how many files more may be open than before.
	mostFiles = 5
)

// memoryFlat: neither files that were opened nor data that went through stay in memory.
func memoryFlat(ctx context.Context, r *run) (string, error) {
	if err := r.Plugin.Start(ctx); err != nil {
		return "", err
	}
	if _, _, ok := host.Memory(r.Plugin.Process()); !ok {
		return "", skip("the memory of a process cannot be seen here")
	}
	var seen []string
	skipped := error(nil)
	for _, f := range r.formats {
		one, err := memoryOf(ctx, r, f)
		if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
			skipped = err
			continue
		}
		if err != nil {
			return "", fmt.Errorf("format %s: %w", f.Name(), err)
		}
		seen = append(seen, one)
	}
	for _, s := range r.schemes {
		one, err := s.memory(ctx)
		if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
			skipped = err
			continue
		}
		if err != nil {
			return "", fmt.Errorf("scheme %s: %w", s.Name(), err)
		}
		seen = append(seen, one)
	}
	if len(seen) == 0 {
		return "", skipped
	}
	return strings.Join(seen, "; "), nil
}

func memoryOf(ctx context.Context, r *run, f *format) (string, error) {
	opened, err := openings(ctx, r, f)
	if err != nil {
		return "", err
	}
	written, err := volume(ctx, r, f)
	if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
		return opened, nil
	}
	return opened + "; " + written, err
}

// openings opens and closes files many times: a small one, and one with a large header.
func openings(ctx context.Context, r *run, f *format) (string, error) {
	small, err := f.small(ctx)
	if err != nil {
		return "", err
	}
	long := small // a sample
	if !f.ReadOnly() {
		d, err := f.any(ctx)
		if err != nil {
			return "", err
		}
		var list []sample
		for i := range headerBytes / nameBytes {
			list = append(list, newSample(fmt.Sprintf("block.%d.%s.weight", i, strings.Repeat("x", nameBytes)), d, 2))
		}
		if long, err = f.write(ctx, list); err != nil {
			return "", err
		}
	}
	var said []string
	for _, w := range []*written{small, long} {
		one, err := r.again("a file is opened and closed", func() error {
			c, err := f.open(ctx, w)
			if err == nil {
				err = c.Close()
			}
			return err
		})
		if err != nil {
			return "", err
		}
		said = append(said, one)
	}
	if !f.ReadOnly() && !f.streams() {
		one, err := r.again("tensors are laid out", func() error {
			_, err := f.layout(ctx, long.list, formats.Options{})
			return err
		})
		if err != nil {
			return "", err
		}
		said = append(said, one)
	}
	return strings.Join(said, ", "), nil
}

// memory stores and reads a weight many times.
func (s *scheme) memory(ctx context.Context) (string, error) {
	specs, err := s.specs()
	if err == nil {
		err = s.works(ctx, specs)
	}
	if err != nil {
		return "", err
	}
	w, err := newWeight(tensor.F32, tensor.Shape{64, 1024}, normal(1))
	if err != nil {
		return "", err
	}
	return s.run.again("a weight is stored and read", func() error {
		for range 8 {
			if _, _, err := s.through(ctx, specs[0], w); err != nil {
				return err
			}
		}
		return nil
	})
}

// again does something many times, of which nothing should stay in the plugin's process.
func (r *run) again(what string, do func() error) (string, error) {
	process := r.Plugin.Process()
	var memory, files [2]int64
	n := 0
	begin := time.Now()
	for n < warmUp+leastRounds || n < warmUp+mostRounds && time.Since(begin) < roundTime {
		if n == warmUp {
			memory[0], files[0] = seenOf(process)
		}
		if err := do(); err != nil {
			return "", err
		}
		n++
	}
	memory[1], files[1] = seenOf(process)
	n -= warmUp
	if files[1] > files[0]+mostFiles {
		return "", fmt.Errorf("it has %d files open before %s %d times, and %d after it", files[0], what, n, files[1])
	}
	if memory[1] > memory[0]+noise {
		return "", fmt.Errorf("its memory grows from %d to %d MiB by %d times that %s", memory[0]>>20, memory[1]>>20, n,
			what)
	}
	return fmt.Sprintf("%d to %d MiB by %d times that %s", memory[0]>>20, memory[1]>>20, n, what), nil
}

// seenOf is the memory and the number of open files of a process.
func seenOf(process int) (memory, files int64) {
	memory, _, _ = host.Memory(process)
	n, _ := host.OpenFiles(process)
	return memory, int64(n)
}

// volume has much data go through the plugin: what it writes, and what it reads for lorakit.
func volume(ctx context.Context, r *run, f *format) (string, error) {
	w, err := f.large(ctx)
	if err != nil {
		return "", err
	}
	c, err := f.open(ctx, w)
	if err != nil {
		return "", err
	}
	asked := slices.ContainsFunc(c.Tensors(), opaque)
	if err := c.Close(); err != nil {
		return "", err
	}
	if f.ReadOnly() || !f.streams() && !asked {
		return "", skip("no data goes through it")
	}
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	list := []sample{newSample("block.0.weight", d, bulk/(d.Bits()/8))}
	watch := r.watch(ctx, noise)
	err = pass(watch.ctx, f, list)
	before, peak, grown := watch.end()
	if grown {
		return "", fmt.Errorf("its memory grows from %d to %d MiB while %d MiB are written and read", before>>20, peak>>20,
			bulk>>20)
	}
	return fmt.Sprintf("%d to %d MiB by %d MiB of data", before>>20, peak>>20, bulk>>20), err
}

// watch looks at the memory of a plugin's process while something is done.
type watch struct {
	ctx          context.Context // ends when the memory has grown by too much
	cancel       context.CancelFunc
	before, peak int64
	grown        bool
	done         chan struct{}
}

// watch begins to look, where the plugin has a process.
func (r *run) watch(ctx context.Context, most int64) *watch {
	w := &watch{done: make(chan struct{})}
	w.ctx, w.cancel = context.WithCancel(ctx)
	process := 0
	if r.Plugin != nil {
		process = r.Plugin.Process()
	}
	if process == 0 {
		close(w.done)
		return w
	}
	w.before, _, _ = host.Memory(process)
	w.peak = w.before
	go func() {
		defer close(w.done)
		for {
			select {
			case <-w.ctx.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
			now, _, _ := host.Memory(process)
			if w.peak = max(w.peak, now); w.peak > w.before+most {
				w.grown = true
				w.cancel() // before it takes the memory of others
				return
			}
		}
	}()
	return w
}

// end says what was seen.
func (w *watch) end() (before, peak int64, grown bool) {
	w.cancel()
	<-w.done
	return w.before, w.peak, w.grown
}

// pass writes tensors and reads their data in ranges.
func pass(ctx context.Context, f *format, list []sample) error {
	w, err := f.write(ctx, list)
	if err != nil {
		return err
	}
	defer os.RemoveAll(w.dir)
	c, err := f.open(ctx, w)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, t := range c.Tensors() {
		if x, ok := t.Data.(formats.RangeReader); ok {
			if err := x.ReadRange(t.Offset, t.Bytes, func([]byte, int64) error { return nil }); err != nil {
				return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
			}
		}
	}
	return nil
}
