package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

// toyName is a program that is a plugin: the test binary, by its name.
const toyName = "toyplugin"

// setenvToy tells a script where the program is.
func setenvToy(e *testscript.Env) error {
	for _, dir := range filepath.SplitList(e.Getenv("PATH")) {
		path := filepath.Join(dir, toyName)
		if runtime.GOOS == "windows" {
			path += ".exe"
		}
		if _, err := os.Stat(path); err == nil {
			e.Setenv("TOY", path)
			return nil
		}
	}
	return errors.New("the plugin is not in PATH")
}

// serveToy is the program. A plugin gets those variables of the environment whose names begin with LORAKIT_PLUGIN_.
func serveToy() {
	version, extension := "1.0.0", ".toy"
	if v := os.Getenv("LORAKIT_PLUGIN_TOY_VERSION"); v != "" {
		version = v
	}
	if e := os.Getenv("LORAKIT_PLUGIN_TOY_EXTENSION"); e != "" {
		extension = e
	}
	if path := os.Getenv("LORAKIT_PLUGIN_TOY_WRITES"); path != "" {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			panic(err)
		}
	}
	sdk.Serve(sdk.Plugin{Name: "toy", Version: version, Deterministic: true, Formats: []sdk.Format{toy{extension}}})
}

// toy is a format: TOY1, the length of the list of tensors, the list as JSON, and the data.
type toy struct{ extension string }

func (f toy) Info() sdk.FormatInfo {
	return sdk.FormatInfo{Name: "toy", Extensions: []string{f.extension}, Magic: []sdk.Magic{{Bytes: []byte("TOY1")}}}
}

func (toy) Open(ctx context.Context, path string) (sdk.Container, error) {
	var c sdk.Container
	b, err := os.ReadFile(path)
	if err != nil {
		return c, err
	}
	if len(b) < 8 || uint64(binary.LittleEndian.Uint32(b[4:])) > uint64(len(b)-8) {
		if os.Getenv("LORAKIT_PLUGIN_TOY_HANGS") != "" {
			<-ctx.Done()
		}
		return c, fmt.Errorf("found %d bytes, expected a list: %w", len(b), formats.ErrMalformed)
	}
	at := 8 + int64(binary.LittleEndian.Uint32(b[4:]))
	var list []tensor.Info
	if err := json.Unmarshal(b[8:at], &list); err != nil {
		return c, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	for _, t := range list {
		size, err := t.Size()
		if err != nil {
			return c, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
		}
		c.Tensors = append(c.Tensors, sdk.Tensor{Info: t, Offset: at})
		at += size
	}
	return c, nil
}

func (toy) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	naming := formats.Naming{Stem: "model", Extension: ".toy"}
	return formats.LayOut(tensors, o, naming, func(name string, members []int, sizes []int64) (formats.Shard, error) {
		s := formats.Shard{Name: name, Tensors: members}
		var list []tensor.Info
		for _, i := range members {
			list = append(list, tensors[i])
		}
		b, err := json.Marshal(list)
		s.Header = append(binary.LittleEndian.AppendUint32([]byte("TOY1"), uint32(len(b))), b...)
		s.Size = int64(len(s.Header))
		for _, i := range members {
			s.Offsets = append(s.Offsets, s.Size)
			s.Size += sizes[i]
		}
		return s, err
	})
}

// TestPluginExitCodes: 3 for a plugin that is not as it was installed, 1 for one that is not there, 2 for wrong usage.
func TestPluginExitCodes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "plugins")
	program, err := exec.LookPath(toyName)
	require.NoError(t, err)
	expect := func(code int, args ...string) string {
		t.Helper()
		c := command([]string{"LORAKIT_PLUGIN_DIR=" + dir}, append([]string{"plugin"}, args...)...)
		out, err := c.CombinedOutput()
		if code == 0 {
			require.NoError(t, err, "%s", out)
			return string(out)
		}
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit, "%s", out)
		require.Equal(t, code, exit.ExitCode(), "%s", out)
		return string(out)
	}
	expect(exitFailed, "verify", "toy")
	expect(exitFailed, "remove", "toy")
	expect(exitFailed, "install", filepath.Join(dir, "nothing"))
	expect(exitUsage, "install")
	expect(exitUsage, "verify")
	expect(exitUsage, "frobnicate")
	expect(0, "install", program)
	expect(0, "verify", "toy")
	f, err := os.OpenFile(filepath.Join(dir, "toy", "1.0.0", filepath.Base(program)), os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = io.WriteString(f, "x")
	require.NoError(t, err)
	require.NoError(t, f.Close())
	expect(exitFound, "verify", "toy")
	expect(exitFound, "verify", "toy", "--json")
	require.Contains(t, expect(exitFound, "test", "toy"), "lorakit plugin verify --accept toy")
	expect(0, "list")
	expect(0, "verify", "--accept", "toy")
	expect(0, "verify", "toy")
	expect(0, "remove", "toy")
}
