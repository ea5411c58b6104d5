package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
)

// lastWords is the last line of the faulty plugin on stderr.
const lastWords = "the last words of faulty"

// faulty is the faulty plugin (plugins/host/internal/faulty), installed, and files for it to fail at.
type faulty struct {
	temp    string // for temporary files
	dir     string // of plugins
	program string
	plain   string // a checkpoint
	fx      string // the same in the plugin's format
	fq      string // in its scheme
}

// marks tells the processes of the cases from each other.
var marks struct {
	sync.Mutex
	n int
}

// attempt is one run of the command, with a plugin that may fail.
type attempt struct {
	*exec.Cmd
	mark   string
	stderr bytes.Buffer
	stdout bytes.Buffer
}

// noTimeout is for what does not hang, however busy the machine is.
const noTimeout = 5 * time.Minute

// attempt prepares to run lorakit with a fault.
func (f *faulty) attempt(fault string, args ...string) *attempt {
	marks.Lock()
	marks.n++
	a := &attempt{mark: fmt.Sprintf("LORAKIT_PLUGIN_MARK=%d-%d-", os.Getpid(), marks.n)}
	marks.Unlock()
	env := []string{"LORAKIT_PLUGIN_DIR=" + f.dir, "LORAKIT_PLUGIN_FAULT=" + fault, a.mark, "TMPDIR=" + f.temp,
		fmt.Sprintf("LORAKIT_PLUGIN_START_TIMEOUT=%v", noTimeout),
		fmt.Sprintf("LORAKIT_PLUGIN_CALL_TIMEOUT=%v", noTimeout)}
	a.Cmd = command(env, args...)
	a.Stderr, a.Stdout = &a.stderr, &a.stdout
	return a
}

// line is what it has written to stderr: one line.
func (a *attempt) line(t *testing.T) string {
	t.Helper()
	text := a.stderr.String()
	assert.Equal(t, 1, strings.Count(text, "\n"), "one line on stderr: %q", text)
	return text
}

// processes lists those that have the attempt's mark in their environment, and are no zombies.
func (a *attempt) processes(t *testing.T) (list []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	require.NoError(t, err)
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err != nil || !bytes.Contains(env, []byte(a.mark)) { // that of a zombie is empty
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		state := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))[0]
		if state != "Z" && state != "X" {
			list = append(list, e.Name()+" "+state)
		}
	}
	return list
}

// alone makes sure that no process is left three seconds after the command.
func (a *attempt) alone(t *testing.T) {
	t.Helper()
	var list []string
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if list = a.processes(t); len(list) == 0 {
			return
		}
		if time.Now().After(end) {
			break
		}
	}
	for _, p := range list { // it must not stay because of this test
		if pid, err := strconv.Atoi(strings.Fields(p)[0]); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	t.Errorf("found the processes %v, expected none", list)
}

func exitCode(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	return exit.ExitCode()
}

// newFaulty builds and installs the plugin, and makes the files.
func newFaulty(t *testing.T) *faulty {
	t.Helper()
	root := t.TempDir()
	f := &faulty{temp: os.TempDir(), program: filepath.Join(root, "faulty"),
		fx: filepath.Join(root, "fx"), fq: filepath.Join(root, "fq")}
	var err error
	f.plain, err = filepath.Abs("../../fixtures/tiny-llama-f32")
	require.NoError(t, err)
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", f.program, "../../plugins/host/internal/faulty")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	f = f.another(t, f.program, lock.InstallOptions{NoMTLS: true})
	for _, args := range [][]string{
		{f.plain, f.fx, "--to", "fx"}, {f.plain, f.fq, "--quantize", "fq8"},
	} {
		a := f.attempt("", append([]string{"convert"}, args...)...)
		require.NoError(t, a.Run(), "%v: %s", args, &a.stderr)
		a.alone(t)
	}
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(f.fx, "link.fx")))
	require.NoError(t, syscall.Mkfifo(filepath.Join(f.fx, "pipe.fx"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(f.fx, "other.fx"), make([]byte, 100), 0o600))
	return f
}

// another is the plugin installed in another folder.
func (f *faulty) another(t *testing.T, program string, o lock.InstallOptions) *faulty {
	t.Helper()
	g := *f
	g.dir = filepath.Join(t.TempDir(), "plugins")
	folder, err := lock.Open(g.dir, lock.BuiltIn())
	require.NoError(t, err)
	_, err = folder.Install(context.Background(), program, host.Describe, o)
	require.NoError(t, err)
	return &g
}

// The ways of a command through the plugin. %s is the destination.
var ways = map[string]func(f *faulty, dst string) []string{
	"read":    func(f *faulty, dst string) []string { return []string{"convert", filepath.Join(f.fx, "model.fx"), dst} },
	"layout":  func(f *faulty, dst string) []string { return []string{"convert", f.plain, dst, "--to", "fx"} },
	"stream":  func(f *faulty, dst string) []string { return []string{"convert", f.plain, dst, "--to", "fs"} },
	"decode":  func(f *faulty, dst string) []string { return []string{"convert", f.fq, dst, "--quantize", "none"} },
	"encode":  func(f *faulty, dst string) []string { return []string{"convert", f.plain, dst, "--quantize", "fq8"} },
	"inspect": func(f *faulty, _ string) []string { return []string{"inspect", filepath.Join(f.fx, "model.fx")} },
}

// calls are those of the protocol, and the way on which each is made.
var calls = []struct{ call, way string }{
	{"Describe", "read"}, {"Open", "read"}, {"List", "read"}, {"Read", "read"}, {"Layout", "layout"},
	{"Create", "stream"}, {"Write", "stream"}, {"FormatService/Finish", "stream"}, {"Find", "decode"},
	{"Decode", "decode"},
	{"Encoder", "encode"}, {"Encode", "encode"}, {"SchemeService/Finish", "encode"}, {"Config", "encode"},
}

// faultCase is a fault, and what the line about it contains.
type faultCase struct {
	fault, way string
	want       []string
	start      time.Duration // the limits; 0 is none that matters
	call       time.Duration
	noWords    bool // the plugin has not come to say anything, or it is not to blame
}

func faultCases() (list []faultCase) {
	const shortly = 500 * time.Millisecond
	add := func(way, call string, faults map[string]string) {
		for fault, want := range faults {
			list = append(list, faultCase{fault: call + ":" + fault, way: way, want: []string{want}})
		}
	}
	malformed := func(way, call, file string, faults ...string) {
		for _, fault := range faults {
			list = append(list, faultCase{fault: call + ":" + fault, way: way, want: []string{"malformed", file}})
		}
	}
	// What can go wrong anywhere.
	for _, c := range calls {
		for _, via := range []string{"", "sdk:"} {
			if via != "" && slices.Contains([]string{"Describe", "List", "Read", "FormatService/Finish", "SchemeService/Finish"},
				c.call) {
				continue // no method of the SDK's
			}
			x := faultCase{fault: via + c.call, way: c.way}
			for fault, want := range map[string]string{
				"exit": "exited (exit status 3)", "kill": "exited (signal: killed)", "hang": "no answer in 500ms",
				"panic": "exited (exit status 2)",
			} {
				y := x
				y.fault, y.want = x.fault+":"+fault, []string{want}
				if fault == "hang" {
					y.call = shortly
				}
				y.noWords = fault == "panic" && via == "" // whose trace comes after them
				list = append(list, y)
			}
		}
		add(c.way, c.call, map[string]string{
			"big":   "sent a message of more than 4 MiB",
			"error": "has failed: a disk of the plugin's is full and more",
		})
	}
	list = append(list, faultCase{fault: "List:stop", way: "read", want: []string{"no answer in 500ms"}, call: shortly})
	add("read", "Open", map[string]string{"unavailable": "has failed: not today", "internal": "has failed: an accident"})
	for _, c := range calls {
		if slices.Contains([]string{"Layout", "List", "Find", "SchemeService/Finish"}, c.call) {
			add(c.way, c.call, map[string]string{"garbage": "has failed: grpc: failed to unmarshal"})
			x := faultCase{fault: c.call + ":empties", way: c.way, want: []string{"no answer in 1s"}, call: time.Second}
			if c.call == "SchemeService/Finish" {
				x.want = []string{"sent a <nil>"} // an empty message means nothing there
			}
			list = append(list, x)
		}
	}

	// The start.
	for fault, want := range map[string]string{
		"exit": "exited (exit status 3)", "kill": "exited (signal: killed)",
		"line":  `wrote to stdout before the handshake: "debug: loading`,
		"lines": `wrote to stdout before the handshake: "line 0`, "garbage": `wrote to stdout before the handshake: "\x00\xff`,
		"much": "wrote to stdout before the handshake", "short": "wrote to stdout before the handshake",
		"closed": "did not start", "newer": "speaks protocol 2, this lorakit speaks 1", "netrpc": "did not start",
		"tcp": "listens where it must not", "elsewhere": "listens where it must not", "nobody": "did not start",
		"childexit": "exited (exit status 3)", "flood": "exited (exit status 3)",
	} {
		list = append(list, faultCase{fault: "start:" + fault, way: "read", want: []string{want}})
	}
	for _, via := range []string{"", "sdk:"} {
		list = append(list, faultCase{fault: via + "start:hang", way: "read", want: []string{"did not start in 500ms"},
			start: shortly, noWords: true})
	}
	list = append(list,
		faultCase{fault: "start:part", way: "read", want: []string{"wrote to stdout before the handshake: \"no end of line"},
			start: 2 * time.Second},
		faultCase{fault: "start:control", way: "read", want: []string{`\x1b[31mred\x07`}, noWords: true})
	add("read", "Describe", map[string]string{"newer": "speaks protocol 2, this lorakit speaks 1",
		"version": "says another version than when it was installed", "format": "says another"})

	// What is said of a file.
	malformed("read", "Open", "model.fx", "up", "absolute", "link", "missing", "file-twice", "folder", "device",
		"metadata-twice", "files")
	for fault, want := range map[string]string{"limit": "found x, expected y: limit exceeded",
		"malformed": "found x, expected y: malformed"} { // which is no fault
		list = append(list, faultCase{fault: "Open:" + fault, way: "read", want: []string{"model.fx", want}, noWords: true})
	}
	malformed("read", "List", "model.fx", "outside", "negative", "far", "file", "dtype", "shape", "overflow", "large",
		"rank", "twice", "name", "place", "tensor", "million")
	add("read", "List", map[string]string{"utf8": "invalid UTF-8"})
	add("read", "List", map[string]string{"dtype": "F7", "large": "4398046511104", "negative": "-1", "file": "other.fx"})
	for fault, want := range map[string]string{
		"short": "sent ", "long": "sent ", "longer": "sent ", "overlap": "sent ", "gap": "sent ", "shifted": "sent ",
		"negative": "sent ", "two": "sent ", "many": "sent ", "nothing": "sent 0 of ",
	} {
		list = append(list, faultCase{fault: "Read:" + fault, way: "read", want: []string{want, " bytes of tensor "}})
	}

	// A command that writes nothing.
	list = append(list,
		faultCase{fault: "Open:exit", way: "inspect", want: []string{"exited (exit status 3)"}},
		faultCase{fault: "Open:hang", way: "inspect", want: []string{"no answer in 500ms"}, call: shortly},
		faultCase{fault: "List:outside", way: "inspect", want: []string{"malformed", "model.fx"}})

	// Layouts.
	for _, fault := range []string{"slash", "up", "absolute", "dot", "noname", "nul", "backslash", "gap", "overlap",
		"same", "before", "far", "small", "negative", "unknown", "lost", "again", "index", "none", "first", "piece",
		"checksum", "checksum-at", "checksum-in", "extra-up", "extra-shard", "item", "nothing"} {
		add("layout", "Layout", map[string]string{fault: "layout that cannot be"})
	}

	// Files that the plugin writes.
	for fault, want := range map[string]string{
		"two": "another.fs", "elsewhere": "model.fs", "link": "model.fs", "removed": "model.fs", "folder": "model.fs",
		"cut": "model.fs", "size": "model.fs", "size-negative": "model.fs",
	} {
		add("stream", "File", map[string]string{fault: want})
	}
	add("stream", "Write", map[string]string{"short": "took "})
	add("stream", "Create", map[string]string{"handle": "plugin faulty "})

	// Schemes.
	malformed("decode", "Find", "weight ", "rule", "stride", "rule-negative", "wrap", "part", "parts", "many-parts",
		"unit", "unit-large", "type", "values", "twice", "shape", "size", "weight")
	for _, fault := range []string{"want-large", "want-negative", "want-unknown", "want-far"} {
		add("decode", "Find", map[string]string{fault: "asks for "})
	}
	for _, fault := range []string{"short", "longer", "two"} {
		list = append(list, faultCase{fault: "Decode:" + fault, way: "decode", want: []string{"sent ", " bytes of tensor "}})
	}
	add("decode", "Decode", map[string]string{"shifted": "answers tile "})
	list = append(list, faultCase{fault: "Decode:nothing", way: "decode", want: []string{"no answer in 1s"},
		call: time.Second})
	for _, fault := range []string{"none", "stride", "wrap", "unit", "carry", "carry-large", "twice", "dtype"} {
		add("encode", "Encoder", map[string]string{fault: "encoder of tensor "})
	}
	add("encode", "Encoder", map[string]string{"handle": "has failed: found the handle"})
	for _, fault := range []string{"short", "longer", "output", "outputs", "carry", "carries", "infinite",
		"infinite-outside"} {
		add("encode", "Encode", map[string]string{fault: "plugin faulty "})
	}
	for _, fault := range []string{"want", "want-far", "want-negative", "empty", "part", "offset", "offset-negative",
		"long", "hole"} {
		add("encode", "SchemeService/Finish", map[string]string{fault: "plugin faulty "})
	}
	for _, fault := range []string{"json", "array", "long"} {
		add("encode", "Config", map[string]string{fault: "expected a JSON object"})
	}
	return list
}

// atOnce is how many cases run at once: most of them wait.
const atOnce = 8

// TestFaultyPlugin runs the command with a plugin that does what it must not.
func TestFaultyPlugin(t *testing.T) {
	f := newFaulty(t)
	for name, test := range map[string]func(*testing.T, *faulty){
		"faults": pluginFaults, "oddities": pluginOddities, "killed": killedCommand, "changed": changedPlugin,
		"interpreter": pluginsInterpreter, "certificates": pluginWithCertificates,
	} {
		temp, err := os.MkdirTemp("", "faulty") // whose path is short, since sockets are in it
		require.NoError(t, err)
		defer os.RemoveAll(temp)
		g := *f
		g.temp = temp
		t.Run(name, func(t *testing.T) { test(t, &g) })
		assert.Eventually(t, func() bool {
			left, err := filepath.Glob(filepath.Join(temp, "plugin-dir*"))
			return err == nil && len(left) == 0
		}, 3*time.Second, 20*time.Millisecond, "%s: found folders of sockets, expected none", name)
	}
}

// pluginFaults has a plugin fail in each way that is known: the command says so in one line, leaves nothing behind, and
// no process.
func pluginFaults(t *testing.T, f *faulty) {
	token := make(chan struct{}, atOnce)
	for _, c := range faultCases() {
		dir := t.TempDir()
		dst := filepath.Join(dir, "out")
		require.NoError(t, os.Mkdir(dst, 0o777))
		require.NoError(t, os.WriteFile(filepath.Join(dst, "config.json"), []byte("{}"), 0o666))
		before := digest(t, dir)
		args := ways[c.way](f, dst)
		if c.way != "inspect" {
			args = append(args, "--force", "--progress", "none")
		}
		a := f.attempt(c.fault, args...)
		for name, limit := range map[string]time.Duration{"START": c.start, "CALL": c.call} {
			if limit > 0 {
				a.Env = append(a.Env, fmt.Sprintf("LORAKIT_PLUGIN_%s_TIMEOUT=%v", name, limit))
			}
		}
		result := make(chan error, 1)
		var took time.Duration
		go func() {
			token <- struct{}{}
			begin := time.Now()
			err := a.Run()
			took = time.Since(begin)
			<-token
			result <- err
		}()
		t.Run(strings.ReplaceAll(c.fault, "/", "."), func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, 1, exitCode(t, <-result), "exit code; %s", &a.stderr)
			line := a.line(t)
			for _, want := range append(c.want, "plugin faulty") {
				assert.Contains(t, line, want)
			}
			if !c.noWords {
				assert.Contains(t, line, lastWords)
			}
			assert.Empty(t, a.stdout.String())
			assert.Equal(t, before, digest(t, dir), "the destination is as it was")
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			assert.Len(t, entries, 1, "nothing is beside it")
			a.alone(t)
			t.Logf("%.2f s: %s", took.Seconds(), line)
		})
	}
}

// pluginOddities has a plugin that is odd and does what it should: it is used, and no process of it stays.
func pluginOddities(t *testing.T, f *faulty) {
	for _, fault := range []string{"start:child", "start:term", "sdk:start:child", "sdk:start:term", "Close:hang",
		"Close:exit", "Close:error", "Shutdown:hang", "Shutdown:none"} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			a := f.attempt(fault, ways["read"](f, filepath.Join(t.TempDir(), "out"))...)
			begin := time.Now()
			require.NoError(t, a.Run(), "%s", &a.stderr)
			took := time.Since(begin)
			a.alone(t)
			assert.Less(t, took, 10*time.Second)
			t.Logf("%.2f s", took.Seconds())
		})
	}
}

// running waits until the attempt's plugin has said that the fault has been reached.
func (a *attempt) running(t *testing.T, dir string) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Join(dir, "reached"))
		return err == nil
	}, noTimeout, 5*time.Millisecond, "the fault is reached")
}

// killedCommand kills and interrupts the command while its plugin hangs, and has the plugin crash, when a
// shard is finished: the plugin is gone, and --resume makes the same bytes.
func killedCommand(t *testing.T, f *faulty) {
	whole := filepath.Join(t.TempDir(), "whole")
	args := func(dst string) []string {
		return []string{"convert", filepath.Join(f.fx, "model.fx"), dst, "--dtype", "bf16", "--max-shard-size", "60KB",
			"--threads", "1", "--memory", "64MiB", "--progress", "none"}
	}
	a := f.attempt("", args(whole)...)
	require.NoError(t, a.Run(), "%s", &a.stderr)
	for _, c := range []struct {
		name, fault string
		signal      os.Signal
		code        int
	}{
		{"kill", "Read:later-hang", syscall.SIGKILL, -1},
		{"interrupt", "Read:later-hang", os.Interrupt, 130},
		{"terminate", "Read:later-stop", syscall.SIGTERM, 130},
		{"crash", "Read:later-exit", nil, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			dst := filepath.Join(dir, "out")
			a := f.attempt(c.fault, args(dst)...)
			// Its plugin has a child, which must not outlive it either.
			a.Env = append(a.Env, "LORAKIT_PLUGIN_REACHED="+filepath.Join(dir, "reached"), "LORAKIT_PLUGIN_PARENT=1")
			require.NoError(t, a.Start())
			begin := time.Now()
			if c.signal != nil {
				a.running(t, dir)
				begin = time.Now()
				require.NoError(t, a.Process.Signal(c.signal))
			}
			code := exitCode(t, a.Wait())
			took := time.Since(begin)
			assert.Equal(t, c.code, code, "%s", &a.stderr)
			assert.Less(t, took, 10*time.Second)
			a.alone(t)
			t.Logf("%.2f s: %s", took.Seconds(), &a.stderr)
			assert.NoDirExists(t, dst)
			assert.DirExists(t, dst+".partial")
			if c.signal != syscall.SIGKILL {
				assert.Contains(t, a.line(t), "--resume")
			}
			a = f.attempt("", append(args(dst), "--resume")...)
			require.NoError(t, a.Run(), "%s", &a.stderr)
			assert.Equal(t, digest(t, whole), digest(t, dst))
			a.alone(t)
		})
	}
}

// changedPlugin changes an installed plugin: it is not started.
func changedPlugin(t *testing.T, f *faulty) {
	f = f.another(t, f.program, lock.InstallOptions{NoMTLS: true})
	root := filepath.Join(f.dir, "faulty", "1.0.0")
	file := filepath.Join(root, "faulty")
	refused := func(want string) {
		t.Helper()
		a := f.attempt("", ways["read"](f, filepath.Join(t.TempDir(), "out"))...)
		assert.Equal(t, 1, exitCode(t, a.Run()))
		assert.Contains(t, a.line(t), want)
		assert.Contains(t, a.line(t), "plugin faulty")
		t.Log(a.line(t))
	}
	const accept = " since it was installed; lorakit plugin verify --accept faulty"
	require.FileExists(t, file)
	good, err := os.ReadFile(file)
	require.NoError(t, err)

	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 1
	require.NoError(t, os.WriteFile(file, bad, 0o755))
	refused("faulty has changed" + accept)
	require.NoError(t, os.WriteFile(file, good, 0o755))

	added := filepath.Join(root, "added.so")
	require.NoError(t, os.WriteFile(added, nil, 0o644))
	refused("added.so has been added" + accept)
	require.NoError(t, os.Remove(added))

	require.NoError(t, os.Chmod(root, 0o777))
	refused("found the mode 0777")
	require.NoError(t, os.Chmod(root, 0o755))

	require.NoError(t, os.Remove(file))
	refused("faulty has been removed since it was installed")
}

// pluginsInterpreter has a plugin that an interpreter runs, which is pinned with it.
func pluginsInterpreter(t *testing.T, f *faulty) {
	root := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(text), mode))
		return path
	}
	interpreter := write("bin/interpreter", "#!/bin/sh\n[ \"$1\" = --version ] || exec \"$@\"\n", 0o755)
	t.Setenv("PATH", filepath.Dir(interpreter)+":"+os.Getenv("PATH"))
	write("package/plugin.json", `{"name": "faulty", "command": ["interpreter", "./faulty"]}`, 0o644)
	require.NoError(t, os.Link(f.program, filepath.Join(root, "package", "faulty")))
	f = f.another(t, filepath.Join(root, "package"), lock.InstallOptions{NoMTLS: true})
	run := func(fault string) (*attempt, int) {
		a := f.attempt(fault, ways["read"](f, filepath.Join(t.TempDir(), "out"))...)
		code := exitCode(t, a.Run())
		a.alone(t)
		return a, code
	}
	a, code := run("")
	require.Zero(t, code, "%s", &a.stderr)
	a, code = run("Read:exit")
	assert.Equal(t, 1, code)
	assert.Contains(t, a.line(t), "plugin faulty exited (exit status 3)")

	require.NoError(t, os.WriteFile(interpreter, []byte("#!/bin/sh\nexec \"$@\"\n"), 0o755))
	a, code = run("")
	assert.Equal(t, 1, code)
	assert.Contains(t, a.line(t), interpreter+" has changed since it was installed; lorakit plugin verify --accept faulty")
	require.NoError(t, os.Remove(interpreter))
	a, code = run("")
	assert.Equal(t, 1, code)
	assert.Contains(t, a.line(t), "plugin faulty")
	t.Log(a.line(t))
}

// pluginWithCertificates has a plugin crash and hang that shows a certificate.
func pluginWithCertificates(t *testing.T, f *faulty) {
	t.Setenv("LORAKIT_PLUGIN_FAULT", "sdk:") // which has certificates, as opposed to what is written by hand
	f = f.another(t, f.program, lock.InstallOptions{})
	for fault, want := range map[string]string{
		"sdk:Open:exit": "exited (exit status 3)", "sdk:Open:hang": "no answer in 3s", "Open:exit": "did not start",
	} {
		a := f.attempt(fault, ways["read"](f, filepath.Join(t.TempDir(), "out"))...)
		a.Env = append(a.Env, "LORAKIT_PLUGIN_CALL_TIMEOUT=3s")
		assert.Equal(t, 1, exitCode(t, a.Run()))
		line := a.line(t)
		assert.Contains(t, line, "plugin faulty")
		if strings.HasPrefix(fault, "sdk:") {
			assert.Contains(t, line, want)
			assert.Contains(t, line, lastWords)
		}
		a.alone(t)
		t.Log(line)
	}
}
