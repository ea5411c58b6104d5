package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lorakit/lorakit/plugins/wire"
)

// runner starts a plugin for go-plugin, which by itself would give it this process' standard input and leave its
// children alive.
type runner struct {
	cmd    *exec.Cmd
	dir    string        // of the socket
	pipe   *os.File      // is at its end, for the plugin, when this process is gone
	out    *os.File      // the process' standard output
	stdout io.ReadCloser // what of it go-plugin gets: the handshake
	stderr *tail
	group  group

	ctx     context.Context // whose end ends the process while it starts
	started func() bool     // says that it has started
	exited  chan struct{}   // closed when the process is gone, and all that it has written to stderr was read
	state   *os.ProcessState
	killed  atomic.Bool   // by this process, which it has not forestalled
	over    sync.Once     // the process
	greeted chan struct{} // closed when the first line of stdout has been read
	odd     string        // the beginning of that line where it is no handshake
	stray   tail          // what has come after it
	quiet   chan struct{} // closed when nothing more can come
}

// newRunner prepares to start argv in a folder. environment are the variables that go-plugin has for it.
func newRunner(ctx context.Context, argv []string, dir string, environment []string, socketDir string) *runner {
	r := &runner{
		cmd: exec.Command(argv[0], argv[1:]...), dir: socketDir, stderr: &tail{}, ctx: ctx,
		started: func() bool { return true }, exited: make(chan struct{}), greeted: make(chan struct{}),
		quiet: make(chan struct{}),
	}
	r.cmd.Dir, r.cmd.Env = dir, environment
	r.cmd.Stderr = r.stderr
	r.cmd.WaitDelay = time.Second // a child that holds stderr open is not waited for
	r.group.prepare(r.cmd)
	return r
}

// Start starts the process.
func (r *runner) Start(context.Context) error {
	child, pipe, err := os.Pipe()
	if err != nil {
		return err
	}
	defer child.Close()
	stdout, w, err := os.Pipe()
	if err != nil {
		pipe.Close()
		return err
	}
	defer w.Close()
	r.pipe = pipe
	r.cmd.Stdout = w
	r.passHost(child)
	if err := r.fork(); err != nil {
		pipe.Close()
		stdout.Close()
		return err
	}
	r.group.watch(r.cmd, r.dir)
	r.out, r.stdout = stdout, r.checked(stdout)
	go func() {
		_ = r.cmd.Wait() // the state says all
		r.state = r.cmd.ProcessState
		close(r.exited)
		select {
		case <-r.greeted:
		case <-time.After(killAfter / 4):
			r.out.Close() // a child of it has it open, and what stands for the handshake does not come
		}
	}()
	r.started = context.AfterFunc(r.ctx, func() { r.finish(0) })
	return nil
}

// fork makes the process. A file that has just been written may be busy for a moment: a process that was forked
// meanwhile, and is not yet another program, has it open for writing.
func (r *runner) fork() error {
	for wait := 10 * time.Millisecond; ; wait *= 2 {
		err := r.group.start(r.cmd)
		if !errors.Is(err, syscall.ETXTBSY) || wait > time.Second {
			return err
		}
		time.Sleep(wait)
		c := r.cmd // which is of no more use
		r.cmd = &exec.Cmd{Path: c.Path, Args: c.Args, Env: c.Env, Dir: c.Dir, Stdout: c.Stdout, Stderr: c.Stderr,
			ExtraFiles: c.ExtraFiles, SysProcAttr: c.SysProcAttr, WaitDelay: c.WaitDelay}
	}
}

// passHost gives the process the end of the pipe that tells that this one is gone.
func (r *runner) passHost(child *os.File) {
	if canPass {
		r.cmd.ExtraFiles = []*os.File{child}
		r.cmd.Env = append(r.cmd.Env, wire.HostFD+"=3")
	}
}

// handshakeBytes is more than a handshake has: with a certificate it is some 800 bytes.
const handshakeBytes = 16 << 10

// oddBytes is how much is shown of what is no handshake.
const oddBytes = 200

// checked reads the first line that the process writes, and hands it on if it is a handshake. Else what is handed on
// is nothing, and odd says what it was.
func (r *runner) checked(stdout io.Reader) io.ReadCloser {
	out, in := io.Pipe()
	go func() {
		defer close(r.quiet)
		b := bufio.NewReaderSize(stdout, handshakeBytes)
		line, err := b.ReadSlice('\n')
		fields := bytes.Split(line, []byte("|"))
		if len(fields) >= 5 && (err == nil || err == io.EOF) && bytes.Equal(bytes.TrimSpace(fields[0]), []byte("1")) {
			_, _ = in.Write(line)
		} else if len(line) > 0 {
			line = bytes.TrimSuffix(line[:min(len(line), oddBytes)], []byte("\n"))
			r.odd = wire.OneLine(strconv.QuoteToGraphic(string(line)), 2*oddBytes)
		}
		close(r.greeted)
		in.Close()
		_, _ = io.Copy(&r.stray, b) // so that it can write on
	}()
	return out
}

// oddity is what was written to stdout in the place of the handshake, once the process is gone.
func (r *runner) oddity() string {
	<-r.greeted
	return r.odd
}

// Wait waits for the process.
func (r *runner) Wait(context.Context) error { <-r.exited; return nil }

// Kill ends the process and all that it has started. go-plugin calls it when the handshake has failed, which is the
// first that is seen of a process that ends: it is left the time to.
func (r *runner) Kill(context.Context) error {
	r.finish(killAfter / 4)
	return nil
}

// finish gives the process so much time to end, and kills what is left of it, and its children.
func (r *runner) finish(patience time.Duration) {
	if r.out == nil { // it has not been started
		return
	}
	select {
	case <-r.exited:
	case <-time.After(patience):
	}
	r.over.Do(func() {
		r.killed.Store(!r.ended())
		r.group.kill(r.cmd)
	})
	<-r.exited
}

// ended reports whether the process is gone.
func (r *runner) ended() bool {
	select {
	case <-r.exited:
		return true
	default:
		return false
	}
}

// Stdout is where the handshake comes from.
func (r *runner) Stdout() io.ReadCloser { return r.stdout }

// Stderr is nothing: the runner keeps it.
func (r *runner) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name is the program.
func (r *runner) Name() string { return r.cmd.Path }

// ID is the process' number, and empty where there is none, since it could not be started.
func (r *runner) ID() string {
	if r.cmd.Process == nil {
		return ""
	}
	return fmt.Sprint(r.cmd.Process.Pid)
}

// Diagnose has nothing to add.
func (r *runner) Diagnose(context.Context) string { return "" }

// PluginToHost checks where the plugin says that it listens: in the folder that it was given, or on this machine.
func (r *runner) PluginToHost(network, address string) (string, string, error) {
	return network, address, checkAddress(network, address, r.dir)
}

// HostToPlugin is not used.
func (r *runner) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}

// close gives up the pipes, once the process is gone.
func (r *runner) close() {
	if r.out != nil {
		r.group.end()
		r.pipe.Close()
		select {
		case <-r.quiet:
		case <-time.After(killAfter / 10): // a child of the process has it open
		}
		r.out.Close()
	}
}

// how says how the process has ended.
func (r *runner) how() string {
	if r.state == nil {
		return "unknown"
	}
	return r.state.String() // "exit status 3", "signal: killed"
}

const (
	tailLines = 20
	tailBytes = 4 << 10
)

// tail keeps the last lines that are written to it.
type tail struct {
	mu    sync.Mutex
	end   []byte
	total int64
}

// Write takes in more.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.total += int64(len(p))
	if t.end = append(t.end, p...); len(t.end) > 2*tailBytes {
		t.end = append([]byte{}, t.end[len(t.end)-tailBytes:]...)
	}
	return len(p), nil
}

// settle waits a moment for what is on its way: what a plugin writes before it answers a call is to be here when the
// answer is.
func (t *tail) settle() {
	for last, tries := int64(-1), 0; tries < 10; tries++ {
		t.mu.Lock()
		total := t.total
		t.mu.Unlock()
		if total == last {
			return
		}
		last = total
		time.Sleep(10 * time.Millisecond)
	}
}

// lines are the last of them, without the empty ones.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lines []string
	for line := range strings.Lines(string(t.end[max(0, len(t.end)-tailBytes):])) {
		if s := wire.OneLine(line, 500); s != "" {
			lines = append(lines, s)
		}
	}
	return lines[max(0, len(lines)-tailLines):]
}

// last is the last line, "" where there is none.
func (t *tail) last() string {
	if lines := t.lines(); len(lines) > 0 {
		return lines[len(lines)-1]
	}
	return ""
}

var errAddress = errors.New("listens where it must not")
