package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	goplugin "github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/lorakit/lorakit/formats"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
)

// ErrFailed says that a plugin has failed: it is gone, hangs, or does not keep to the protocol. What it refuses on
// purpose has the kinds of formats and quant instead.
var ErrFailed = formats.ErrFailed

// Program is what is started.
type Program struct {
	Name         string
	Argv         []string // the first is an absolute path
	Dir          string   // the plugin's own folder, where it runs
	MTLS         bool     // both sides show a certificate
	StartTimeout time.Duration
	// Check makes sure, just before each start, that the program is what was installed. nil does not.
	Check func() error
	// Memory is what the whole host may use, in bytes; a quarter of it is advice to the plugin. 0 gives none.
	Memory int64
}

const (
	startTimeout = 5 * time.Second
	callTimeout  = 30 * time.Second
	// killAfter is how long a process may take to end when it is asked to, and how long a broken connection may come
	// before the news that the process is gone.
	killAfter = 2 * time.Second
)

// process is a running plugin.
type process struct {
	name   string
	client *plugin.Client
	conn   *grpc.ClientConn
	runner *runner // nil for one that somebody else has started
	// elsewhere says that somebody else has.
	elsewhere bool
	peak      int64 // memory, as it was seen last; 0 is unknown
	timeout   time.Duration
	about     *pb.DescribeResponse
	stop      func() // see close

	mu      sync.Mutex
	failure error // the first, see fault

	plugin pb.PluginServiceClient
	format pb.FormatServiceClient
	scheme pb.SchemeServiceClient
}

// start starts a plugin and asks what it is.
func start(ctx context.Context, program Program) (*process, error) {
	limit, err := limits()
	if err != nil {
		return nil, err
	}
	p := &process{name: program.Name, timeout: limit.call}
	other, err := reattached(program.Name)
	if err == nil && other == nil && program.Check != nil {
		err = program.Check()
	}
	if err != nil {
		return nil, err
	}
	starting := cmp.Or(limit.start, program.StartTimeout, startTimeout)
	config := &plugin.ClientConfig{
		HandshakeConfig:  wire.Handshake,
		VersionedPlugins: map[int]plugin.PluginSet{wire.Protocol: {}},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		StartTimeout:     starting,
		AutoMTLS:         program.MTLS && other == nil,
		SkipHostEnv:      true,
		Logger:           hclog.NewNullLogger(),
		GRPCDialOptions:  dialOptions(),
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: socketsIn()},
	}
	if p.elsewhere = other != nil; p.elsewhere {
		config.Reattach = other
	} else {
		config.RunnerFunc = func(_ hclog.Logger, cmd *exec.Cmd, socketDir string) (goplugin.Runner, error) {
			p.runner = newRunner(ctx, program.Argv, program.Dir, environment(program, cmd.Env), socketDir)
			return p.runner, nil
		}
	}
	p.client = plugin.NewClient(config)
	p.stop = sync.OnceFunc(p.end)
	if err := p.connect(ctx, starting); err != nil {
		p.stop()
		return nil, err
	}
	if p.runner != nil {
		p.runner.started()
	}
	return p, nil
}

// socketsIn is where the folders of sockets are: that of temporary files, if a path in it is short enough for a socket.
func socketsIn() string {
	const longest = 103 - len("/plugin-dir1234567890/plugin1234567890")
	dir, err := filepath.Abs(os.TempDir())
	if err != nil || len(dir) > longest && runtime.GOOS != "windows" {
		return "/tmp"
	}
	return dir
}

// dialOptions are those of each connection to a plugin.
func dialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(wire.MaxMessage),
			grpc.MaxCallSendMsgSize(wire.MaxMessage), grpc.ForceCodecV2(wire.Codec{})),
		grpc.WithInitialWindowSize(wire.StreamWindow), grpc.WithInitialConnWindowSize(wire.ConnectionWindow),
		grpc.WithReadBufferSize(128 << 10), grpc.WithWriteBufferSize(128 << 10),
		grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		// A plugin that stands still at a breakpoint is waited for as its calls are.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: time.Hour}),
	}
}

// connect starts the process, or finds it, and has it describe itself.
func (p *process) connect(ctx context.Context, starting time.Duration) error {
	begin := time.Now()
	if _, err := p.client.Start(); err != nil {
		return p.notStarted(ctx, err, starting, begin)
	}
	protocol, err := p.client.Client()
	if err != nil {
		return p.notStarted(ctx, err, starting, begin)
	}
	c, ok := protocol.(*plugin.GRPCClient)
	if !ok {
		return p.fault("speaks %T, expected gRPC", protocol)
	}
	return p.over(ctx, c.Conn)
}

// over has the plugin at the other end of a connection describe itself.
func (p *process) over(ctx context.Context, conn *grpc.ClientConn) (err error) {
	p.conn = conn
	p.plugin, p.format = pb.NewPluginServiceClient(conn), pb.NewFormatServiceClient(conn)
	p.scheme = pb.NewSchemeServiceClient(conn)
	if p.about, err = p.describe(ctx); err == nil && p.about.GetProtocol() != wire.Protocol {
		err = p.fault("speaks protocol %d, this lorakit speaks %d", p.about.GetProtocol(), wire.Protocol)
	}
	return err
}

// describe asks the plugin what it is.
func (p *process) describe(ctx context.Context) (*pb.DescribeResponse, error) {
	call := p.begin(ctx)
	r, err := p.plugin.Describe(call.ctx, &pb.DescribeRequest{})
	return r, call.end(err)
}

// notStarted says why a plugin has not come up.
func (p *process) notStarted(ctx context.Context, err error, limit time.Duration, begin time.Time) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	text := err.Error()
	switch {
	case p.elsewhere:
		return p.unreachable(text)
	case p.runner == nil: // there is no folder for its socket
		return p.fault("cannot be started: %s", wire.OneLine(text, 300))
	}
	var version int
	switch _, failed := fmt.Sscanf(text, "incompatible API version with plugin. Plugin version: %d", &version); {
	case failed == nil:
		return p.fault("speaks protocol %d, this lorakit speaks %d", version, wire.Protocol)
	case errors.Is(err, errAddress):
		return p.fault("%s", wire.OneLine(text, 300))
	case p.runner.stdout == nil: // it could not be started at all
		return p.fault("cannot be started: %s", wire.OneLine(text, 300))
	}
	late := time.Since(begin) >= limit
	p.runner.finish(0)
	odd := p.runner.oddity()
	switch {
	case odd != "":
		return p.fault("wrote to stdout before the handshake: %s", odd)
	case !p.runner.killed.Load():
		return p.exited()
	case late:
		return p.fault("did not start in %v", limit)
	}
	return p.fault("did not start: %s", wire.OneLine(text, 300))
}

// unreachable is the error of a plugin of somebody else's that is not where it should be.
func (p *process) unreachable(why string) error {
	return p.fault("cannot be reached at the address of %s; start it again, and give its new address: %s", reattachName,
		wire.OneLine(why, 300))
}

// fault is the error of a plugin that has failed, with the last line that it has written to stderr. It ends the process
// at once. Of several the first stands: what comes after it follows from that.
func (p *process) fault(format string, args ...any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failure == nil {
		if p.runner != nil {
			p.runner.finish(0)
		}
		p.failure = &fault{"plugin " + p.name + " " + fmt.Sprintf(format, args...) + p.lastWords()}
	}
	return p.failure
}

// lastWords is the last line that the plugin has written to stderr, as the end of an error.
func (p *process) lastWords() string {
	if p.runner == nil {
		return ""
	}
	if last := p.runner.stderr.last(); last != "" {
		return "; its last line on stderr: " + last
	}
	return ""
}

// blamed is an error of what a plugin says, which a file may be to blame for as well: the plugin is used on.
func (p *process) blamed(err error) error {
	if p.runner != nil {
		p.runner.stderr.settle()
	}
	return fmt.Errorf("plugin %s: %w%s", p.name, err, p.lastWords())
}

// fault is an ErrFailed whose text does not say so.
type fault struct{ text string }

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return ErrFailed }

func (p *process) exited() error { return p.fault("exited (%s)", p.runner.how()) }

// alive reports whether the process is there, and has not failed.
func (p *process) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failure == nil && (p.runner == nil || !p.runner.ended())
}

// tidy carries out a call that gives something back to the plugin, which does not have long for it: one that hangs is
// ended, so that several such calls take no longer than one.
func (p *process) tidy(call func(ctx context.Context) error) error {
	if !p.alive() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), killAfter)
	defer cancel()
	err := call(ctx)
	if ctx.Err() != nil {
		return p.fault("gave no answer in %v", killAfter)
	}
	return err
}

// close asks the process to end, and kills what is left of it.
func (p *process) close() { p.stop() }

func (p *process) end() {
	if p.runner == nil { // somebody else's
		if p.conn != nil {
			p.conn.Close()
		}
		return
	}
	if p.runner.cmd.Process != nil {
		_, p.peak, _ = Memory(p.runner.cmd.Process.Pid)
	}
	patience := time.Duration(0)
	if p.conn != nil && p.alive() {
		// A server that stops may do so before it has answered. One that has no such call is not waited for.
		if status.Code(p.tidy(p.shutdown)) != codes.Unimplemented {
			patience = killAfter
		}
	}
	p.runner.finish(patience)
	p.client.Kill() // which finds it dead, and gives up what is left of the connection
	p.runner.close()
	os.RemoveAll(p.runner.dir)
}

// shutdown asks the process to end as go-plugin does, which by itself would wait for the answer for ever.
func (p *process) shutdown(ctx context.Context) error {
	return p.conn.Invoke(ctx, "/plugin.GRPCController/Shutdown", &emptypb.Empty{}, &emptypb.Empty{})
}

// PeakMemory is the most memory that the process has used, once it is gone.
func (p *process) peakMemory() int64 {
	if p.peak > 0 || p.runner == nil || p.runner.state == nil {
		return p.peak
	}
	return peakMemory(p.runner.state)
}

// passed are the variables of the environment that a plugin gets. It gets no tokens.
var passed = []string{"PATH", "HOME", "TMPDIR", "LANG", "SYSTEMROOT"}

// environment is what a plugin gets: what go-plugin has for it and a few variables of this process.
func environment(program Program, own []string) []string {
	env := slices.Clone(own)
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if slices.Contains(passed, name) || strings.HasPrefix(name, "LC_") || strings.HasPrefix(name, "LORAKIT_PLUGIN_") {
			if !slices.Contains(withheld, name) {
				env = append(env, v)
			}
		}
	}
	if program.Memory > 0 {
		env = append(env, fmt.Sprintf("%s=%d", wire.Memory, program.Memory/4))
	}
	return env
}

// withheld are variables of plugins that those which are started do not get: where all of them are is no business of
// theirs, some the host says itself, and one is for a plugin that is started by hand.
var withheld = []string{"LORAKIT_PLUGIN_DIR", "LORAKIT_PLUGIN_DEBUG", wire.HostFD, wire.Memory,
	wire.Handshake.MagicCookieKey}

// timeouts are the limits of LORAKIT_PLUGIN_START_TIMEOUT and LORAKIT_PLUGIN_CALL_TIMEOUT, for tests.
type timeouts struct{ start, call time.Duration }

func limits() (timeouts, error) {
	t := timeouts{call: callTimeout}
	for name, d := range map[string]*time.Duration{
		"LORAKIT_PLUGIN_START_TIMEOUT": &t.start, "LORAKIT_PLUGIN_CALL_TIMEOUT": &t.call,
	} {
		text := os.Getenv(name)
		if text == "" {
			continue
		}
		var err error
		if *d, err = time.ParseDuration(text); err != nil || *d <= 0 {
			return t, fmt.Errorf("%s: found %q, expected a time such as 5s", name, text)
		}
	}
	return t, nil
}
