package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/internal/kernels"
)

var update = flag.Bool("update", false, "write testdata/bytes.txt anew")

// asLorakit makes the test binary behave as lorakit, so that tests can kill it.
const asLorakit = "LORAKIT_TEST_AS_COMMAND"

// onSmallDisk names a folder on which lorakit finds a disk of 4 MB.
const onSmallDisk = "LORAKIT_TEST_SMALL_DISK"

func TestMain(m *testing.M) {
	if os.Getenv(asLorakit) != "" {
		if dir := os.Getenv(onSmallDisk); dir != "" {
			mountSmallDisk(dir)
		}
		main()
	}
	testscript.Main(m, map[string]func(){"lorakit": main, toyName: serveToy})
}

// TestScripts runs testdata/*.txt: what a user types, and what he sees.
func TestScripts(t *testing.T) {
	fixtures, err := filepath.Abs("../../fixtures")
	require.NoError(t, err)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("FIXTURES", fixtures)
			return setenvToy(e)
		},
	})
}

// command is lorakit, to be run in a process of its own.
func command(env []string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	none := "LORAKIT_PLUGIN_DIR=" + filepath.Join(os.TempDir(), "lorakit-no-plugins") // who runs the tests may have some
	c.Env = append(append(os.Environ(), asLorakit+"=1", none), env...)
	return c
}

func digest(t *testing.T, path string) string {
	t.Helper()
	h := sha256.New()
	require.NoError(t, filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		rel, _ := filepath.Rel(path, p)
		fmt.Fprintf(h, "%s %d\n", filepath.ToSlash(rel), len(b))
		h.Write(b)
		return err
	}))
	return hex.EncodeToString(h.Sum(nil))
}

// TestBytes holds the bytes of what lorakit makes of the fixtures, by any set of kernels, against testdata/bytes.txt.
// They change only on purpose: go test -update.
func TestBytes(t *testing.T) {
	cases := [][]string{
		{"tiny-llama", "--quantize", "nf4"},
		{"tiny-llama", "--quantize", "nf4", "--block-size", "32", "--max-shard-size", "20KB"},
		{"tiny-llama", "--quantize", "fp4", "--double-quant=false", "--block-size", "4096"},
		{"tiny-llama-f32", "--quantize", "int8"},
		{"tiny-llama-f32", "--quantize", "nf4", "--dtype", "f16"},
		{"tiny-qwen3-f16", "--quantize", "nf4"},
		{"tiny-gpt2", "--quantize", "nf4"},
		{"tiny-gpt2-f32", "--quantize", "int8", "--dtype", "bf16"},
		{"tiny-mixtral", "--quantize", "nf4", "--experts", "per-expert"},
		{"tiny-gemma3", "--quantize", "fp4"},
		{"tiny-gemma3", "--dtype", "f32", "--max-shard-size", "100KB"},
		{"expected/tiny-llama/nf4-dq", "--quantize", "none"},
		{"expected/tiny-gpt2/int8", "--quantize", "none", "--dtype", "f32"},
		{"expected/tiny-llama/fp4-dq", "--quantize", "none", "--dtype", "f16"},
	}
	var lines []string
	for _, c := range cases {
		want := ""
		for _, set := range kernels.Available() {
			dst := filepath.Join(t.TempDir(), "out")
			args := append([]string{"convert", filepath.Join("../../fixtures", c[0]), dst, "--progress", "none"}, c[1:]...)
			out, err := command([]string{"LORAKIT_KERNELS=" + set}, args...).CombinedOutput()
			require.NoError(t, err, "%s", out)
			got := digest(t, dst)
			if want == "" {
				want = got
			}
			require.Equal(t, want, got, "%v by %s", c, set)
		}
		lines = append(lines, want+"  "+strings.Join(c, " "))
	}
	got := strings.Join(lines, "\n") + "\n"
	path := filepath.Join("testdata", "bytes.golden")
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o666))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), got)
}

// TestKill kills a run at random moments and resumes it: the bytes are the same, and nothing is left behind.
func TestKill(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeBig(t, src)
	flags := []string{"--quantize", "nf4", "--max-shard-size", "3MB", "--progress", "none"}
	ref := filepath.Join(t.TempDir(), "ref")
	start := time.Now()
	out, err := command(nil, append([]string{"convert", src, ref}, flags...)...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	took := time.Since(start)
	want := digest(t, ref)

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	kills := 0
	for i := range 12 {
		dst := filepath.Join(t.TempDir(), "dst")
		args := append([]string{"convert", src, dst}, flags...)
		if i%3 == 0 { // over an old destination
			require.NoError(t, os.Mkdir(dst, 0o777))
			require.NoError(t, os.WriteFile(filepath.Join(dst, "old"), nil, 0o666))
			args = append(args, "--force")
		}
		c := command(nil, args...)
		require.NoError(t, c.Start())
		time.Sleep(time.Duration(r.Int64N(int64(took))))
		require.NoError(t, c.Process.Kill())
		if c.Wait() != nil {
			kills++
		}
		if _, err := os.Stat(dst); err == nil && !fileExists(filepath.Join(dst, "old")) {
			assert.Equal(t, want, digest(t, dst), "what is there is whole")
		}
		out, err := command(nil, append(args, "--resume")...).CombinedOutput()
		require.NoError(t, err, "%s", out)
		assert.Equal(t, want, digest(t, dst))
		entries, err := os.ReadDir(filepath.Dir(dst))
		require.NoError(t, err)
		assert.Len(t, entries, 1, "only the destination is left")
	}
	t.Logf("%d of 12 were killed in time", kills)
	assert.NotZero(t, kills)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestSignals stops a run as a user or a scheduler does.
func TestSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no signals that one process can send another")
	}
	src := filepath.Join(t.TempDir(), "src")
	writeBig(t, src)
	for _, s := range stopSignals {
		dst := filepath.Join(t.TempDir(), "dst")
		// Progress lines say when it is at work.
		c := command(nil, "convert", src, dst, "--quantize", "nf4", "--max-shard-size", "3MB", "--progress", "json",
			"--threads", "1", "--memory", "64MiB")
		var stderr bytes.Buffer
		c.Stderr = &stderr
		require.NoError(t, c.Start())
		require.Eventually(t, func() bool {
			return fileExists(filepath.Join(dst+".partial", "out")) || fileExists(dst)
		}, 10*time.Second, time.Millisecond)
		require.NoError(t, c.Process.Signal(s))
		err := c.Wait()
		if err == nil {
			assert.DirExists(t, dst, "it was done before the signal came")
			continue
		}
		var exit *exec.ExitError
		require.True(t, errors.As(err, &exit))
		assert.Equal(t, exitInterrupted, exit.ExitCode(), "%s", &stderr)
		assert.NoDirExists(t, dst)
		assert.Contains(t, stderr.String(), "interrupted")
	}
}

// writeBig writes a folder of random linears, 24 MB.
func writeBig(t *testing.T, dir string) {
	t.Helper()
	require.NoError(t, os.Mkdir(dir, 0o777))
	r := rand.NewChaCha8([32]byte{1})
	var header []string
	body := make([]byte, 0, 24<<20)
	for i := range 12 {
		b := make([]byte, 2<<20)
		_, _ = r.Read(b)
		for k := 1; k < len(b); k += 2 {
			b[k] = b[k]&0x81 | 0x3c // no NaN, no infinity
		}
		header = append(header,
			fmt.Sprintf(`"model.layers.%d.mlp.up_proj.weight":{"dtype":"BF16","shape":[1024,1024],"data_offsets":[%d,%d]}`, i,
				len(body), len(body)+len(b)))
		body = append(body, b...)
	}
	h := "{" + strings.Join(header, ",") + "}"
	file := slices.Concat([]byte{byte(len(h)), byte(len(h) >> 8), 0, 0, 0, 0, 0, 0}, []byte(h), body)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "model.safetensors"), file, 0o666))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"),
		[]byte(`{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 12}`), 0o666))
}

// TestFlagsThatAreMissingAreWrongUsage holds for those that cobra itself checks.
func TestFlagsThatAreMissingAreWrongUsage(t *testing.T) {
	for _, args := range [][]string{
		{"combine", "out", "a=1", "b=1"},
		{"resize", "a", "out"},
		{"resize", "a", "out", "--rank", "2", "--energy", "0.5"},
		{"extract", "a", "b", "out"},
	} {
		var stdout, stderr strings.Builder
		assert.Equal(t, exitUsage, run(args, &stdout, &stderr), args)
		assert.Equal(t, 1, strings.Count(stderr.String(), "\n"), &stderr)
	}
}

// TestHelpIsNotWide holds for every command.
func TestHelpIsNotWide(t *testing.T) {
	names := []string{"lorakit"}
	for _, c := range newRoot().Commands() {
		names = append(names, c.CommandPath())
		for _, sub := range c.Commands() {
			names = append(names, sub.CommandPath())
		}
	}
	require.Greater(t, len(names), 20)
	for _, name := range names {
		var out, errs strings.Builder
		require.Zero(t, run(append(strings.Fields(name)[1:], "--help"), &out, &errs), &errs)
		for line := range strings.Lines(out.String()) {
			assert.LessOrEqual(t, utf8.RuneCountInString(line)-1, helpWidth, "%s: %s", name, line)
		}
	}
}
