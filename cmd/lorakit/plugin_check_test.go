package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestCheckRows: rows come when their checks are made, and those of types that say the same are one.
func TestCheckRows(t *testing.T) {
	var b bytes.Buffer
	rows := checkRows{w: &b}
	report := &lorakit.PluginTest{Name: "toy"}
	add := func(id string, status lorakit.PluginCheck, want string) {
		t.Helper()
		b.Reset()
		status.ID = id
		report.Checks = append(report.Checks, status)
		rows.add(status)
		assert.Equal(t, want, b.String())
	}
	passed := lorakit.PluginCheck{Status: lorakit.CheckPassed, Detail: "fine"}
	failed := func(detail string) lorakit.PluginCheck {
		return lorakit.PluginCheck{Status: lorakit.CheckFailed, Detail: detail, Advice: "mend it"}
	}
	skipped := lorakit.PluginCheck{Status: lorakit.CheckSkipped, Detail: "it refuses this"}
	add("describe-matches", passed, "CHECK                      STATUS   DETAIL\ndescribe-matches           passed   fine\n")
	add("roundtrip-F64", failed("bad\x1b"), "")
	add("roundtrip-F32", passed, "roundtrip-F32              passed   fine\n")
	add("roundtrip-F16", failed("bad\x1b"), "")
	add("roundtrip-BF16", failed("worse"), "")
	add("roundtrip-I64", skipped, "")
	add("roundtrip-I32", failed("bad\x1b"), "")
	add("roundtrip-I16", skipped, "")
	add("shape-0d", failed("bad\x1b"), `roundtrip-F64 and 2 more   failed   bad\x1b
roundtrip-BF16             failed   worse
roundtrip-I64 and 1 more   skipped  it refuses this
shape-0d                   failed   bad\x1b
`)
	b.Reset()
	report.Passed, report.Failed, report.Skipped = 2, 5, 2
	rows.end(report, true)
	assert.Equal(t, `
roundtrip-F64 and 2 more: bad\x1b
  mend it

roundtrip-BF16: worse
  mend it

shape-0d: bad\x1b
  mend it

toy: 2 passed, 5 failed, 2 skipped when it was interrupted
`, b.String())

	// What is held back is shown where the end comes.
	rows = checkRows{w: &b}
	rows.add(lorakit.PluginCheck{ID: "roundtrip-F64", Status: lorakit.CheckFailed, Detail: strings.Repeat("x", 300)})
	b.Reset()
	rows.end(report, false)
	assert.Contains(t, b.String(), "roundtrip-F64              failed   xxx")
	assert.Contains(t, b.String(), "toy: 2 passed, 5 failed, 2 skipped\n")
}

// TestCheckInterrupted: Ctrl-C shows what was found until then.
func TestCheckInterrupted(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be interrupted by another")
	}
	program, err := exec.LookPath(toyName)
	require.NoError(t, err)
	env := []string{"LORAKIT_PLUGIN_DIR=" + filepath.Join(t.TempDir(), "plugins"), "LORAKIT_PLUGIN_TOY_HANGS=1"}
	out, err := command(env, "plugin", "install", program).CombinedOutput()
	require.NoError(t, err, "%s", out)
	c := command(env, "plugin", "test", "toy")
	rows, err := c.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.Start())
	var all strings.Builder
	for s := bufio.NewScanner(rows); s.Scan(); {
		fmt.Fprintln(&all, s.Text())
		if strings.HasPrefix(s.Text(), "sniff-own") { // the next hangs
			assert.NoError(t, c.Process.Signal(os.Interrupt))
		}
	}
	var exit *exec.ExitError
	require.ErrorAs(t, c.Wait(), &exit, "%s", &all)
	assert.Equal(t, exitInterrupted, exit.ExitCode())
	assert.Contains(t, all.String(), "toy: 2 passed, 0 failed, 0 skipped when it was interrupted\n")
}
