package host

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/lock"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
)

// Host runs the plugins of a folder. It is safe for concurrent use.
type Host struct {
	programs []*program

	mu     sync.Mutex
	users  int
	memory atomic.Int64 // what this process may use: advice to the plugins
}

// program is an installed plugin, and its process while there is one.
type program struct {
	*lock.Plugin
	host   *Host
	folder *lock.Folder
	// connect, where it is not nil, makes the connection to a plugin that is not started from a folder.
	connect func(ctx context.Context) (*process, error)

	mu      sync.Mutex
	process *process
	failed  error // of the start
	release func()
	reads   chan struct{} // a token a call that reads
}

// New has the plugins of a folder that can be run. problems says of the others, in a line each, why not.
func New(folder *lock.Folder) (h *Host, problems []string) {
	h = &Host{}
	for _, p := range folder.Plugins() {
		state, problem := folder.State(p)
		if state == lock.Incompatible {
			problems = append(problems, fmt.Sprintf("plugin %s is not used: %s", p.Name, problem))
			continue
		}
		h.programs = append(h.programs, &program{Plugin: p, host: h, folder: folder})
	}
	return h, problems
}

// Formats are those of all plugins, in the order in which they are asked: by the names of the plugins, but those that
// have to be started to know a file come last.
func (h *Host) Formats() []formats.Format {
	var first, last []formats.Format
	for _, x := range h.programs {
		for i := range x.Plugin.Formats {
			f := newFormat(x, &x.Plugin.Formats[i])
			if x.Plugin.Formats[i].Sniffed() {
				last = append(last, f)
			} else {
				first = append(first, f)
			}
		}
	}
	return append(first, last...)
}

// Schemes are those of all plugins, by the names of the plugins.
func (h *Host) Schemes() []quant.Scheme {
	var list []quant.Scheme
	for _, x := range h.programs {
		for i := range x.Plugin.Schemes {
			list = append(list, &scheme{program: x, facts: &x.Plugin.Schemes[i]})
		}
	}
	return list
}

// Use is what a plugin's process has used.
type Use struct {
	Name string `json:"name"`
	// PeakMemory is the most memory that it has had; 0 where that is not known.
	PeakMemory int64 `json:"peak_memory_bytes"`
}

// Begin says that plugins may be used from now on, by a host that may use so much memory. When all who have said so
// have called the function that it returns, the processes are ended; it says which there were.
func (h *Host) Begin(memory int64) (end func() []Use) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.users++
	h.memory.Store(max(h.memory.Load(), memory))
	return sync.OnceValue(func() []Use {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.users--; h.users > 0 {
			return nil
		}
		h.memory.Store(0)
		return h.end()
	})
}

// end ends all processes, at once.
func (h *Host) end() []Use {
	uses := make([]*Use, len(h.programs))
	var wait sync.WaitGroup
	for i, x := range h.programs {
		wait.Go(func() { uses[i] = x.end() })
	}
	wait.Wait()
	var list []Use
	for _, u := range uses {
		if u != nil {
			list = append(list, *u)
		}
	}
	return list
}

// end ends the process, where there is one.
func (x *program) end() *Use {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.failed = nil
	if x.process == nil {
		return nil
	}
	x.process.close()
	u := &Use{x.Name, x.process.peakMemory()}
	x.process = nil
	x.release()
	return u
}

// running is the process of a plugin, started where there is none. A start that has failed is not tried again.
func (x *program) running(ctx context.Context) (*process, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.process != nil || x.failed != nil {
		return x.process, x.failed
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	p, release, err := x.start(ctx)
	switch {
	case err == nil:
		x.process, x.release = p, release
	case ctx.Err() == nil:
		x.failed = err
	}
	return p, err
}

func (x *program) start(ctx context.Context) (*process, func(), error) {
	if x.connect != nil {
		p, err := x.connect(ctx)
		return p, func() {}, err
	}
	release, err := x.folder.Use(x.Plugin)
	if err != nil {
		return nil, nil, err
	}
	dir := x.folder.Path(x.Plugin)
	program := runnable(x.Plugin, dir)
	program.Memory = x.host.memory.Load()
	program.Check = func() error {
		report, err := x.folder.Verify(x.Plugin)
		if err != nil {
			return err
		}
		return report.Err(x.Plugin)
	}
	p, err := start(ctx, program)
	if err == nil {
		said := described(p.about)
		if what := x.Difference(&said); what != "" {
			err = p.fault("says another %s than when it was installed; lorakit plugin remove and install it again", what)
			p.close()
		}
	}
	if err != nil {
		release()
		return nil, nil, err
	}
	return p, release, nil
}

// runnable is how a plugin's files are started.
func runnable(p *lock.Plugin, dir string) Program {
	return Program{
		Name: p.Name, Argv: p.Argv(dir), Dir: dir, MTLS: p.MTLS,
		StartTimeout: time.Duration(p.StartSeconds) * time.Second,
	}
}

// Describe starts a plugin that is being installed and asks what it is.
func Describe(ctx context.Context, p *lock.Plugin, dir string) (lock.Described, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return lock.Described{}, err
	}
	x, err := start(ctx, runnable(p, dir))
	if err != nil {
		return lock.Described{}, err
	}
	defer x.close()
	return described(x.about), nil
}

// writeModes are the names of how files are written.
var writeModes = map[pb.WriteMode]string{
	pb.WriteMode_WRITE_MODE_NONE: lock.WriteByNone, pb.WriteMode_WRITE_MODE_LAYOUT: lock.WriteByLayout,
	pb.WriteMode_WRITE_MODE_STREAM: lock.WriteByStream,
}

// described is what a plugin says of itself. It is checked by package lock.
func described(r *pb.DescribeResponse) lock.Described {
	d := lock.Described{Name: r.GetName(), Version: r.GetVersion(), Protocol: int(r.GetProtocol()),
		Capabilities: r.GetCapabilities()}
	for _, f := range r.GetFormats() {
		write, ok := writeModes[f.GetWrite()]
		if !ok {
			write = fmt.Sprint(int32(f.GetWrite()))
		}
		x := lock.Format{Name: f.GetName(), Extensions: f.GetExtensions(), FileNames: f.GetFileNames(), Write: write,
			DTypes: f.GetDtypes(), Written: f.GetWritten()}
		for _, m := range f.GetMagic() {
			x.Magic = append(x.Magic, lock.Magic{Offset: m.GetOffset(), Bytes: m.GetBytes()})
		}
		d.Formats = append(d.Formats, x)
	}
	for _, s := range r.GetSchemes() {
		d.Schemes = append(d.Schemes, lock.Scheme{Name: s.GetName(), Types: s.GetTypes(), Parameters: s.GetParameters(),
			Suffixes: s.GetSuffixes(), Notices: s.GetNotices()})
	}
	return d
}

// version is what tells a plugin from others that may make other bytes: it goes into the digest of a plan.
func (x *program) version() string { return fmt.Sprintf("%s %s %s", x.Name, x.Version, x.Digest) }

// memory is what the host needs for calls of a plugin, of which so many go on at once: what has been sent and not yet
// taken, and what is being read and written.
func (x *program) memory(streams int) int64 {
	return wire.ConnectionWindow + int64(streams)*2*wire.Chunk
}

// reading takes a token for a call that reads, of which there are as many as threads.
func (x *program) reading(ctx context.Context) (done func(), err error) {
	x.mu.Lock()
	if x.reads == nil {
		x.reads = make(chan struct{}, threads())
	}
	reads := x.reads
	x.mu.Unlock()
	select {
	case reads <- struct{}{}:
		return func() { <-reads }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
