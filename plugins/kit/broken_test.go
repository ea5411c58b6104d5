package kit_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/kit"
	"github.com/lorakit/lorakit/plugins/kit/kittest"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

// faultName is the variable by which this test, started as a plugin, is told what is wrong with it.
const faultName = "KIT_TEST_FAULT"

func TestMain(m *testing.M) {
	if fault, ok := os.LookupEnv(faultName); ok {
		sdk.Serve(plugin(fault))
	}
	if dir, ok := os.LookupEnv(hostName); ok {
		standFor(dir)
	}
	os.Exit(m.Run())
}

// hostName is the variable by which this test, started as a host, is told which folder its plugin is in.
const hostName = "KIT_TEST_HOST"

// standFor is a host that has started a plugin, and says the number of its process.
func standFor(dir string) {
	folder, err := lock.Open(dir, lock.BuiltIn())
	if err == nil {
		var p *lock.Plugin
		if p, err = folder.Lookup("toy"); err == nil {
			probe := host.NewProbe(folder, p)
			if err = probe.Start(context.Background()); err == nil {
				fmt.Println(probe.Process())
				select {}
			}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// plugin has a format and a scheme, and one fault, or none.
func plugin(fault string) sdk.Plugin {
	f := toy{fault: fault, opaque: true}
	p := sdk.Plugin{Name: "toy", Version: "1.0.0", Deterministic: true, Formats: []sdk.Format{toyStream{f}},
		Schemes: []sdk.Scheme{blocks{fault}}}
	switch fault {
	case "layout", "gap", "header-time", "order", "sniff", "leak-layout", "refuse-all":
		f.opaque = false
		p.Formats = []sdk.Format{toyLayout{f}}
	}
	if strings.HasPrefix(fault, "read") {
		p.Formats = []sdk.Format{f}
		p.Schemes = []sdk.Scheme{struct{ sdk.Scheme }{blocks{fault}}}
	}
	if fault == "sniff" {
		p.Formats = []sdk.Format{toySniff{toyLayout{f}}}
	}
	if v := os.Getenv("KIT_TEST_VERSION"); v != "" {
		p.Version = v
	}
	return p
}

// control are checks that a fault of another kind must not fail.
var control = []string{"describe-matches", "sniff-own", "roundtrip-U8", "shape-0d", "name-slash", "order"}

// check makes sure that a check fails, with advice that has a word in it, and that those of control do not, unless the
// fault is theirs too.
func check(t *testing.T, r *kit.Report, id, detail, advice string, implied ...string) {
	t.Helper()
	for _, c := range r.Checks {
		switch {
		case c.ID == id:
			assert.Equal(t, kit.Failed, c.Status, "%s: %s", c.ID, c.Detail)
			assert.Contains(t, c.Detail, detail)
			assert.Contains(t, c.Advice, advice)
		case !slices.Contains(implied, c.ID):
			assert.NotEqual(t, kit.Failed, c.Status, "%s: %s", c.ID, c.Detail)
			assert.Empty(t, c.Advice)
		}
	}
	_, ok := r.Lookup(id)
	assert.True(t, ok)
	assert.NotZero(t, r.Failed)
	assert.Equal(t, len(r.Checks), r.Passed+r.Failed+r.Skipped)
}

// TestBroken: each check fails on a plugin that breaks what it promises.
func TestBroken(t *testing.T) {
	type broken struct {
		id, fault, detail, advice string
		implied                   []string
	}
	list := []broken{
		{"describe-matches", "describe", "another formats than when it was installed", "needs a new version", nil},
		{"describe-matches", "refuse-all", "is described as written, and it holds none", "only if it is", nil},
		{"describe-matches", "raise", "nothing can be written and read", "the plugin raised this: mend it", nil},
		{"describe-matches", "gap", "expected some at ", "without gap or overlap", nil},
		{"describe-matches", "metadata", "4 MiB", "keep the metadata of a file below 4 MiB", []string{"sniff-foreign"}},
		{"describe-matches", "short", "Finish says 1 bytes, the file has ", "returns the size of the file", nil},
		{"roundtrip-F16", "raise in F16", "has failed: the disk has a scratch", "LORAKIT_REATTACH_PLUGINS", nil},
		{"scheme-roundtrip", "config", "bricks", "Config is at fault", nil},
		{"scheme-roundtrip", "rule", "found a rule of first", "a rule of a part is at fault", nil},
		{"sniff-own", "magic", "is not taken for a file of the format", "magic bytes", []string{"order"}},
		{"sniff-foreign", "sniff", "is taken for a", "longer magic", nil},
		{"shape-0d", "scalar", `tensor "scale": found F32 [1], expected F32 []`, "no dimensions", nil},
		{"shape-empty", "empty", `found no tensor "no`, "without elements", nil},
		{"shape-large-rank", "rank", "60 dimensions: tensor", "dimensions", nil},
		{"name-long", "long", "found it twice", "64 KiB", nil},
		{"name-non-ascii", "ascii", "was not written", "UTF-8", nil},
		{"name-slash", "clean", `the name "a//b"`, "a name is no path", nil},
		{"tensors-10000", "many", "found no tensor", "list all tensors", nil},
		{"order", "order", "expected the order of the data", "order in which their data lies", nil},
		{"range-odd", "odd", "found the byte", "any offset and length", nil},
		{"range-whole", "tail", "or they are others", "in chunks of at most 1 MiB", nil},
		{"range-concurrent", "seek", "found the byte", "share no buffer", nil},
		{"write-abort", "abort", "after Abort, expected nothing", "removes the file", nil},
		{"write-twice-same-bytes", "time", "that differ from byte", "leave out times", nil},
		{"write-twice-same-bytes", "header-time", "that differ from byte", "leave out times", nil},
		{"write-only-its-path", "beside", "found model.toy.tmp beside model.toy", "nothing else", nil},
		{"write-only-its-path", "above", "found notes in the folder above", "nothing else", nil},
		{"bad-truncated", "zeros", "and is not what it was", "against the size of the file", nil},
		{"bad-truncated", "plain-error", "has failed: ", "lk.Malformed, INVALID_ARGUMENT",
			[]string{"bad-bitflip", "bad-huge-count"}},
		{"bad-bitflip", "plain-name", "has failed: ", "INVALID_ARGUMENT", nil},
		{"bad-huge-count", "huge", "MiB for a file of", "before memory is made", nil},
		{"scheme-roundtrip", "double", "away from what they were", "values near those", nil},
		{"scheme-roundtrip", "zero-scale", "zeros: found NaN", "values near those", nil},
		{"scheme-tiles-any-split", "tile", "found other bytes of", "its own elements alone", nil},
		{"scheme-bad", "companion", "expected an error, no weight, or the same", "check dtype, shape and content", nil},
		{"scheme-bad", "nan", "a NaN is stored without that error", "NonFinite", nil},
		{"scheme-bad", "nan-tile", "is said to be at", "not in the tile", nil},
	}
	for d := tensor.DType(1); d.Valid(); d++ {
		implied := []string{"roundtrip-U8", "shape-0d", "order", "name-slash"}
		if d != tensor.F32 { // which the checks of shapes use
			implied = nil
		}
		list = append(list, broken{"roundtrip-" + d.String(), "flip " + d.String(), `tensor "block.0.weight": found the byte`,
			"read " + d.String() + " back", implied})
	}
	for _, c := range list {
		t.Run(c.id+"/"+c.fault, func(t *testing.T) {
			r := kittest.RunPlugin(t, plugin(c.fault), append(slices.Clone(control), c.id)...)
			check(t, r, c.id, c.detail, c.advice, c.implied...)
		})
	}
}

// TestSound: what has no fault passes, and what it refuses is skipped.
func TestSound(t *testing.T) {
	t.Parallel()
	for _, fault := range []string{"", "layout"} {
		r := kittest.RunPlugin(t, plugin(fault))
		for _, c := range r.Checks {
			assert.NotEqual(t, kit.Failed, c.Status, "%s: %s", c.ID, c.Detail)
		}
		for _, id := range []string{"read-cancel", "write-abort"} {
			c, _ := r.Lookup(id)
			assert.Equal(t, fault == "", c.Status == kit.Passed, "%s: %s", id, c.Detail)
		}
		c, _ := r.Lookup("exit-in-3s")
		assert.Equal(t, kit.Skipped, c.Status)
	}
	r := kittest.RunPlugin(t, plugin("refuse"))
	assert.Zero(t, r.Failed)
	c, _ := r.Lookup("roundtrip-F16")
	assert.Equal(t, kit.Skipped, c.Status)
	assert.Contains(t, c.Detail, "it refuses this")
	r = kittest.RunPlugin(t, plugin("refuse-described"), "roundtrip-F16", "roundtrip-F32")
	check(t, r, "roundtrip-F16", "it is described as held", "leave F16 out")
}

// TestNothing: what nothing can be written by fails one check, which the others name.
func TestNothing(t *testing.T) {
	t.Parallel()
	r := kittest.RunPlugin(t, plugin("raise"))
	check(t, r, "describe-matches", "format toy: nothing can be written and read", "its traceback is on stderr")
	for _, id := range []string{"roundtrip-F8_E4M3FN", "shape-0d", "order", "write-abort", "bad-bitflip"} {
		c, ok := r.Lookup(id)
		if !ok {
			continue
		}
		assert.Equal(t, kit.Skipped, c.Status, id)
		assert.Equal(t, "see describe-matches: nothing can be written and read", c.Detail, id)
	}
}

// TestNothingOfScheme: and so of a scheme.
func TestNothingOfScheme(t *testing.T) {
	t.Parallel()
	r := kittest.RunPlugin(t, plugin("config"), "scheme-roundtrip", "scheme-tiles-any-split", "scheme-bad")
	check(t, r, "scheme-roundtrip", "no weight can be stored and read: b8, F32 [96, 256]: config: ", "is at fault")
	for _, c := range r.Checks[1:] {
		assert.Equal(t, "see scheme-roundtrip: no weight can be stored and read", c.Detail, c.ID)
	}
}

// TestHang: a plugin that gives no answer is not waited for in each check, and each is reported when it is made.
func TestHang(t *testing.T) {
	t.Setenv("LORAKIT_PLUGIN_CALL_TIMEOUT", "1s")
	begin := time.Now()
	r := kittest.RunPlugin(t, plugin("hang"))
	assert.Less(t, time.Since(begin), 20*time.Second)
	assert.Equal(t, 2, r.Failed)
	for _, c := range r.Checks[:4] {
		switch c.ID {
		case "describe-matches", "sniff-foreign":
			assert.Equal(t, kit.Failed, c.Status, c.ID)
			assert.Contains(t, c.Detail, "plugin toy gave no answer in 1s")
			assert.Contains(t, c.Advice, "answer each call")
		case "sniff-own":
			assert.Equal(t, "see describe-matches: nothing can be written and read", c.Detail)
		default:
			assert.Equal(t, "see describe-matches and sniff-foreign: the plugin gave no answer in time, or did not start",
				c.Detail)
		}
	}
}

// TestDone: checks are told of as they are made, and what was found is returned when they are interrupted.
func TestDone(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	var told []kit.Check
	r, err := kit.Run(ctx, kit.Subject{Name: "x", Formats: []formats.Format{safe}, Done: func(c kit.Check) {
		if told = append(told, c); len(told) == 3 {
			cancel()
		}
	}})
	require.ErrorIs(t, err, context.Canceled)
	require.NotNil(t, r)
	assert.Equal(t, told, r.Checks)
	assert.Len(t, told, 3)
	assert.Equal(t, 3, r.Passed+r.Failed+r.Skipped)
}

// TestSamples: the files of a package are read as well where the format is written.
func TestSamples(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	require.NoError(t, os.Mkdir("samples", 0o700))
	b, err := toy{}.header([]tensor.Info{{Name: "old", DType: tensor.I16, Shape: tensor.Shape{400}},
		{Name: "older", DType: tensor.I16, Shape: tensor.Shape{2}}})
	require.NoError(t, err)
	for i := range 804 {
		b = append(b, byte(i*7))
	}
	require.NoError(t, os.WriteFile(filepath.Join("samples", "old.toy"), b, 0o600))
	for _, c := range []struct{ id, fault, detail string }{
		{"order", "turns in I16", "sample old.toy: found the tensors in one order and then in another"},
		{"range-odd", "odd in I16", `sample old.toy: tensor "old": found the byte`},
		{"range-concurrent", "seek in I16", `sample old.toy: tensor "old`},
		{"bad-truncated", "zeros in I16", "sample old.toy: cut to "},
	} {
		t.Run(c.id, func(t *testing.T) {
			r := kittest.RunPlugin(t, plugin(c.fault), "sniff-own", "roundtrip-U8", c.id)
			check(t, r, c.id, c.detail, "")
		})
	}
	for fault, want := range map[string][2]string{
		"": {"of 2 files: 0 extents and 6 opaque tensors; the plugin has the capability extents (in Go always), and shows none here",
			"10 tensors, the same each time; all are opaque, so that the order of their data is not seen"},
		"layout": {"of 2 files: 6 extents and 0 opaque tensors", "10 tensors, in the order of their data, the same each time"},
	} {
		r := kittest.RunPlugin(t, plugin(fault), "range-odd", "range-whole", "range-concurrent", "order", "read-cancel",
			"bad-truncated", "bad-bitflip", "bad-huge-count")
		assert.Zero(t, r.Failed)
		for _, c := range r.Checks {
			switch {
			case strings.HasPrefix(c.ID, "range-"):
				assert.True(t, strings.HasSuffix(c.Detail, want[0]), "%s: %s", c.ID, c.Detail)
			case c.ID == "order":
				assert.Equal(t, want[1], c.Detail)
			case strings.HasPrefix(c.ID, "bad-"):
				assert.True(t, strings.HasPrefix(c.Detail, "2 files, "), "%s: %s", c.ID, c.Detail)
			}
		}
	}
	require.NoError(t, os.WriteFile(filepath.Join("samples", "broken.toy"), b[:100], 0o600))
	r := kittest.RunPlugin(t, plugin(""), "order", "range-odd")
	check(t, r, "order", "it does not read the sample broken.toy of its package", "testdata/broken")
}

// TestHostKilled: nothing of a plugin stays when its host is killed, which can tell it nothing.
func TestHostKilled(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the plugin is a script, and processes are looked at in /proc")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "toy")
	require.NoError(t, os.Mkdir(path, 0o700))
	// It does not look at the pipe of its host, and has a child that does not either.
	script := fmt.Sprintf("#!/bin/sh\nunset LORAKIT_PLUGIN_HOST_FD %s\nsleep 60 &\n%s= exec %s\n", hostName, faultName, self)
	require.NoError(t, os.WriteFile(filepath.Join(path, "run"), []byte(script), 0o700))
	manifest := `{"name": "toy", "command": ["./run"], "mtls": false}`
	require.NoError(t, os.WriteFile(filepath.Join(path, "plugin.json"), []byte(manifest), 0o600))
	dir := filepath.Join(t.TempDir(), "plugins")
	folder, err := lock.Open(dir, lock.BuiltIn())
	require.NoError(t, err)
	_, err = folder.Install(t.Context(), path, host.Describe, lock.InstallOptions{})
	require.NoError(t, err)

	c := exec.Command(self)
	c.Env = append(os.Environ(), hostName+"="+dir)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.Start())
	process := 0
	_, err = fmt.Fscan(out, &process)
	if err != nil {
		_ = c.Process.Kill()
	}
	require.NoError(t, err)
	running, ok := host.Group(process)
	require.True(t, ok)
	assert.GreaterOrEqual(t, len(running), 2, "the plugin and its child")
	require.NoError(t, c.Process.Kill())
	_ = c.Wait()
	assert.Eventually(t, func() bool {
		running, ok = host.Group(process)
		return ok && len(running) == 0
	}, 3*time.Second, 10*time.Millisecond, "still running: %v", running)
	for _, p := range running { // so that the test leaves nothing behind either
		if p, err := os.FindProcess(p); err == nil {
			_ = p.Kill()
		}
	}
}

// TestPanics: a format in this process that panics fails the check.
func TestPanics(t *testing.T) {
	r, err := kit.Run(t.Context(), kit.Subject{Name: "x", Formats: []formats.Format{panics{}},
		Only: []string{"sniff-foreign", "roundtrip-U8"}})
	require.NoError(t, err)
	check(t, r, "roundtrip-U8", "it panics: runtime error: index out of range", "do not panic", "sniff-foreign")
}

// TestCancelledRead: a read that goes on, or ends otherwise, when it is cancelled.
func TestCancelledRead(t *testing.T) {
	t.Parallel()
	for fault, detail := range map[string]string{"goes on": "goes on after 5s", "otherwise": "ends by another error"} {
		r, err := kit.Run(t.Context(), kit.Subject{Name: "x", Formats: []formats.Format{deaf{safe, fault}},
			Only: append(slices.Clone(control), "read-cancel")})
		require.NoError(t, err)
		check(t, r, "read-cancel", detail, "when its context is cancelled")
	}
}

// TestBrokenProcess: the checks of a process fail on one that prints, stays, or keeps what it should not.
func TestBrokenProcess(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the plugins are scripts, and processes are looked at in /proc")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	for _, c := range []struct{ id, fault, script, detail, advice string }{
		{"stdout-quiet", "", "(sleep 0.1; echo noise; echo more noise) & exec $PLUGIN", `handshake: "more noise"`,
			"print to stderr"},
		{"exit-with-host", "", "unset LORAKIT_PLUGIN_HOST_FD; exec $PLUGIN",
			"still run 3s after the pipe", "LORAKIT_PLUGIN_HOST_FD"},
		{"exit-with-host", "", "sleep 60 & exec $PLUGIN", "still run 3s after the pipe", "its children"},
		{"exit-in-3s", "", "$PLUGIN; sleep 60", "still run 3s after Shutdown", "GRPCController"},
		{"memory-flat", "leak", "exec $PLUGIN", "its memory grows from", "give up in Close"},
		{"memory-flat", "leak-scheme", "exec $PLUGIN", "times that a weight is stored", "give up in Close"},
		{"memory-flat", "leak-layout", "exec $PLUGIN", "times that tensors are laid out", "give up in Close"},
		{"bad-huge-count", "grow", "exec $PLUGIN", "its process grows from", "before memory is made"},
		{"memory-flat", "files", "exec $PLUGIN", "files open before", "give up in Close"},
		{"memory-flat", "load", "exec $PLUGIN", "96 MiB are written and read", "chunk by chunk"},
		{"describe-matches", "", "KIT_TEST_VERSION=1.0.$$ exec $PLUGIN", "says another version", "needs a new version"},
		{"bad-truncated", "crash", "exec $PLUGIN", "exited (exit status", "must not end"},
		{"write-only-its-path", "here", "exec $PLUGIN", "it changes its own folder", "nothing in the plugin's folder"},
	} {
		t.Run(c.id+"/"+cmp.Or(c.fault, c.script), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "toy")
			require.NoError(t, os.Mkdir(dir, 0o700))
			script := fmt.Sprintf("#!/bin/sh\nPLUGIN=%s\nexport %s='%s'\n%s\n", self, faultName, c.fault, c.script)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "run"), []byte(script), 0o700))
			manifest := `{"name": "toy", "command": ["./run"], "mtls": false}`
			require.NoError(t, os.WriteFile(filepath.Join(dir, "plugin.json"), []byte(manifest), 0o600))
			r := kittest.Run(t, dir, "roundtrip-U8", c.id, "shape-0d")
			implied := []string{}
			if c.id == "exit-in-3s" {
				implied = []string{"exit-with-host"}
			}
			check(t, r, c.id, c.detail, c.advice, implied...)
			if c.id == "describe-matches" {
				x, _ := r.Lookup("shape-0d")
				assert.Equal(t, kit.Skipped, x.Status)
				assert.Equal(t, "the plugin does not start", x.Detail[len(x.Detail)-len("the plugin does not start"):])
			}
		})
	}
}

// TestReadOnly: what is only read is checked with the samples of its package, where it has some.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the plugins are scripts, and processes are looked at in /proc")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	run := func(fault, samples string) *kit.Report {
		dir := filepath.Join(t.TempDir(), "toy")
		require.NoError(t, os.MkdirAll(filepath.Join(dir, samples), 0o700))
		script := fmt.Sprintf("#!/bin/sh\n%s='%s' exec %s\n", faultName, fault, self)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "run"), []byte(script), 0o700))
		manifest := `{"name": "toy", "command": ["./run"], "mtls": false}`
		require.NoError(t, os.WriteFile(filepath.Join(dir, "plugin.json"), []byte(manifest), 0o600))
		if samples != "" {
			b, err := toy{}.header([]tensor.Info{{Name: "w", DType: tensor.U8, Shape: tensor.Shape{40}}})
			require.NoError(t, err)
			b = append(b, bytes.Repeat([]byte{7}, 40)...)
			require.NoError(t, os.WriteFile(filepath.Join(dir, samples, "x.toy"), b, 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(dir, samples, "x.safetensors"), stowed(), 0o600))
			config := []byte(`{"torch_dtype": "float16", "quantization_config": {"quant_method": "blocks"}}`)
			require.NoError(t, os.WriteFile(filepath.Join(dir, samples, "config.json"), config, 0o600))
		}
		return kittest.Run(t, dir, "sniff-own", "roundtrip-U8", "range-odd", "read-cancel", "bad-truncated", "memory-flat",
			"scheme-roundtrip", "scheme-tiles-any-split", "scheme-bad", "order")
	}
	made := []string{"sniff-own", "range-odd", "read-cancel", "bad-truncated", "memory-flat", "scheme-tiles-any-split",
		"scheme-bad", "order"}
	for samples, want := range map[string]kit.Status{"samples": kit.Passed, "testdata": kit.Passed, "": kit.Skipped} {
		for _, c := range run("read", samples).Checks {
			if slices.Contains(made, c.ID) {
				assert.Equal(t, want, c.Status, "%s: %s", c.ID, c.Detail)
			} else {
				assert.Equal(t, kit.Skipped, c.Status, "%s: %s", c.ID, c.Detail)
			}
		}
	}
	r := kittest.RunPlugin(t, plugin("read-described"), "roundtrip-F16", "roundtrip-F32", "roundtrip-U8")
	assert.Equal(t, 3, r.Skipped) // the types that are described are those that are read
	for _, c := range r.Checks {
		assert.Equal(t, "it is only read", c.Detail)
	}
	r = run("read-raise", "samples")
	check(t, r, "sniff-own", "it does not read the sample x.toy of its package", "the plugin raised this")
	for _, id := range []string{"range-odd", "bad-truncated", "order"} { // which would fail in the same way
		c, _ := r.Lookup(id)
		assert.Equal(t, "see sniff-own: nothing can be read", c.Detail, id)
	}
	check(t, run("read-metadata", "samples"), "sniff-own", "4 MiB", "keep the metadata of a file below 4 MiB")
	check(t, run("read-zeros", "samples"), "bad-truncated", "and is not what it was", "against the size", "scheme-bad")
}

// stowed is a file of safetensors with a weight of 64 elements.
func stowed() []byte {
	header := `{"w":{"dtype":"I8","shape":[2,32],"data_offsets":[0,64]},` +
		`"w.scales":{"dtype":"F32","shape":[2],"data_offsets":[64,72]}}`
	b := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	for i := range 64 {
		b = append(b, byte(i))
	}
	return append(b, "\x00\x00\x80\x3f\x00\x00\x00\x40"...)
}

// TestBusyFile: a program that somebody has open for writing is started when that is over.
func TestBusyFile(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the plugin is a script")
	}
	self, err := os.Executable()
	require.NoError(t, err)
	dir := t.TempDir()
	path := filepath.Join(dir, "run")
	require.NoError(t, os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\n%s= exec %s\n", faultName, self), 0o700))
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	time.AfterFunc(100*time.Millisecond, func() { file.Close() })
	begin := time.Now()
	_, err = host.Describe(t.Context(), &lock.Plugin{Command: []string{"./run"}}, dir)
	require.NoError(t, err)
	assert.Greater(t, time.Since(begin), 100*time.Millisecond)
}
