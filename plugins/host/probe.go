package host

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/quant"
)

// Probe is one plugin that is looked at from the outside while it runs. It is started when it is first used, and again
// after Stop. Its methods are for one goroutine; the formats and schemes are for any.
type Probe struct {
	host    *Host
	program *program
	strays  []string
}

// NewProbe looks at an installed plugin.
func NewProbe(folder *lock.Folder, p *lock.Plugin) *Probe {
	h := &Host{}
	h.programs = []*program{{Plugin: p, host: h, folder: folder}}
	return &Probe{host: h, program: h.programs[0]}
}

// NewConnectedProbe looks at a plugin that is no process of its own: dial connects to it, with the options that are
// given and others.
func NewConnectedProbe(ctx context.Context, name string, dial func(o ...grpc.DialOption) (*grpc.ClientConn, error)) (
	*Probe, error) {
	h := &Host{}
	x := &program{host: h, connect: func(ctx context.Context) (*process, error) {
		limit, err := limits()
		if err != nil {
			return nil, err
		}
		conn, err := dial(dialOptions()...)
		if err != nil {
			return nil, err
		}
		p := &process{name: name, timeout: limit.call}
		p.stop = sync.OnceFunc(p.end)
		if err := p.over(ctx, conn); err != nil {
			p.stop()
			return nil, err
		}
		return p, nil
	}}
	x.Plugin = &lock.Plugin{Described: lock.Described{Name: name}}
	p, err := x.running(ctx)
	if err != nil {
		return nil, err
	}
	x.Plugin.Described = described(p.about)
	h.programs = []*program{x}
	return &Probe{host: h, program: x}, nil
}

// Formats are those of the plugin.
func (p *Probe) Formats() []formats.Format { return p.host.Formats() }

// Schemes are those of the plugin.
func (p *Probe) Schemes() []quant.Scheme { return p.host.Schemes() }

// Described is what the plugin has said of itself when it was installed.
func (p *Probe) Described() *lock.Described { return &p.program.Described }

// Start starts the plugin where it does not run.
func (p *Probe) Start(ctx context.Context) error {
	_, err := p.program.running(ctx)
	return err
}

// Describe asks the plugin what it is.
func (p *Probe) Describe(ctx context.Context) (lock.Described, error) {
	x, err := p.program.running(ctx)
	if err != nil {
		return lock.Described{}, err
	}
	r, err := x.describe(ctx)
	return described(r), err
}

// Stop ends the plugin where it runs, and forgets that it has failed.
func (p *Probe) Stop() {
	r := p.runner()
	p.program.end()
	if r == nil {
		return
	}
	select {
	case <-r.quiet:
	case <-time.After(time.Second / 4): // somebody else has stdout open
	}
	if s := r.stray.last(); s != "" {
		p.strays = append(p.strays, s)
	}
}

func (p *Probe) runner() *runner {
	p.program.mu.Lock()
	defer p.program.mu.Unlock()
	if x := p.program.process; x != nil {
		return x.runner
	}
	return nil
}

// Process is the number of its process, 0 where it has none, or does not run.
func (p *Probe) Process() int {
	if r := p.runner(); r != nil && !r.ended() {
		return r.cmd.Process.Pid
	}
	return 0
}

// Owned reports whether the plugin has a process of its own, which this one has started.
func (p *Probe) Owned() bool { return p.program.connect == nil && p.host.owned(p.program.Name) }

func (h *Host) owned(name string) bool {
	other, err := reattached(name)
	return other == nil && err == nil
}

// Stray is the last line that the plugin has written to stdout after the handshake, in all times that it ran.
func (p *Probe) Stray() string {
	if r := p.runner(); r != nil {
		if s := r.stray.last(); s != "" {
			return s
		}
	}
	if n := len(p.strays); n > 0 {
		return p.strays[n-1]
	}
	return ""
}

// Verify makes sure that the plugin's files are what they were when it was installed.
func (p *Probe) Verify() error {
	if p.program.folder == nil {
		return nil
	}
	report, err := p.program.folder.Verify(p.program.Plugin)
	if err != nil {
		return err
	}
	return report.Err(p.program.Plugin)
}

// HangUp closes the pipe by which the plugin sees that its host is gone.
func (p *Probe) HangUp() {
	if r := p.runner(); r != nil {
		r.pipe.Close()
	}
}

// Shutdown asks the plugin to end, as go-plugin does, and does not wait for it.
func (p *Probe) Shutdown(ctx context.Context) error {
	x, err := p.program.running(ctx)
	if err != nil {
		return err
	}
	return x.shutdown(ctx)
}

// Memory is how much memory of its own a process has, files that it maps left out, and the most memory that it has had.
// It reports false where that cannot be seen.
func Memory(process int) (now, peak int64, ok bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", process))
	if err != nil {
		return 0, 0, false
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[2] != "kB" {
			continue
		}
		n, err := strconv.ParseInt(fields[1], 10, 64)
		switch {
		case err != nil:
			return 0, 0, false
		case fields[0] == "RssAnon:":
			now = n << 10
		case fields[0] == "VmHWM:":
			peak = n << 10
		}
	}
	return now, peak, now > 0
}

// OpenFiles is how many files a process has open. It reports false where that cannot be seen.
func OpenFiles(process int) (n int, ok bool) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", process))
	return len(list), err == nil
}

// Group lists the processes of a plugin's group that run; one that has ended and is not reaped does not. It reports
// false where that cannot be seen.
func Group(process int) (running []int, ok bool) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || len(stats) == 0 {
		return nil, false
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		// 12 (name) S 1 12 …: the name may have spaces and parentheses.
		fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || len(fields) < 3 || slices.Contains([]string{"Z", "X"}, string(fields[0])) {
			continue
		}
		if string(fields[2]) == strconv.Itoa(process) {
			running = append(running, pid)
		}
	}
	return running, true
}
