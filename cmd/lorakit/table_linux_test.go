package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// onTerminal runs a command on a terminal of so many columns, and returns what it shows there.
func onTerminal(t *testing.T, columns uint16, args ...string) string {
	t.Helper()
	shown, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("a container without pseudo-terminals: ", err)
	}
	require.NoError(t, err)
	defer shown.Close()
	require.NoError(t, unix.IoctlSetPointerInt(int(shown.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(shown.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: columns}))

	text := make(chan string)
	go func() {
		b, _ := io.ReadAll(shown) // ends with an error when the other side is closed
		text <- string(b)
	}()
	var errs strings.Builder
	code := run(args, terminal, &errs)
	require.NoError(t, terminal.Close())
	out := strings.ReplaceAll(<-text, "\r\n", "\n")
	assert.Contains(t, []int{0, exitFound}, code, "%s", &errs)
	return out
}

// TestTablesFitTheTerminal holds for all that print tables; what is piped is whole.
func TestTablesFitTheTerminal(t *testing.T) {
	fixtures := "../../fixtures/"
	base := fixtures + "adapters/bases/llama"
	style, patterns := fixtures+"adapters/llama/attention", fixtures+"adapters/llama/patterns"
	dir := t.TempDir()
	merged, quantized := filepath.Join(dir, "merged"), filepath.Join(dir, "quantized")
	for _, args := range [][]string{
		{"merge", base, style, merged, "--progress", "none"},
		{"convert", merged, quantized, "--quantize", "nf4", "--progress", "none"},
	} {
		var out, errs strings.Builder
		require.Zero(t, run(args, &out, &errs), &errs)
	}
	for _, args := range [][]string{
		{"analyze", base, merged},
		{"analyze", base},
		{"analyze", patterns},
		{"inspect", quantized},
		{"inspect", fixtures + "tiny-mixtral"},
		{"inspect", patterns},
		{"convert", merged, filepath.Join(dir, "no"), "--quantize", "nf4", "--max-shard-size", "20KB", "--dry-run"},
		{"diff", base, quantized},
		{"verify", quantized, "--base", base, "--adapter", style},
		{"extract", base, merged, filepath.Join(dir, "extracted"), "--rank", "4", "--force"},
		{"attach", base, filepath.Join(dir, "attached"), "--init", "compensate", "--force"},
		{"formats"},
	} {
		var piped, errs strings.Builder
		code := run(args, &piped, &errs)
		require.Contains(t, []int{0, exitFound}, code, "%v: %s", args, &errs)
		assert.NotContains(t, piped.String(), "…", "what is piped is whole")
		assert.NotContains(t, piped.String(), "no room for")
		if args[0] != "inspect" {
			assert.Equal(t, piped.String(), onTerminal(t, 300, args...), args)
		}
		for _, columns := range []int{60, 80, 120} {
			// What follows of an adapter, and sentences, are text, which a terminal breaks.
			table, _, _ := strings.Cut(onTerminal(t, uint16(columns), args...), "\ndialect ")
			for line := range strings.Lines(table) {
				if line = strings.TrimRight(line, "\n"); !strings.Contains(line, ": ") && !strings.Contains(line, "; ") {
					assert.LessOrEqual(t, utf8.RuneCountInString(line), columns, "%v: %s", args, line)
				}
			}
		}
	}
}
