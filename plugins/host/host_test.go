//go:build unix

package host_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if built != "" {
			os.RemoveAll(built)
		}
		os.Exit(code)
	}))
}

// built is where the plugin is, once it is built.
var built string

// faulty builds and installs the plugin that fails as LORAKIT_PLUGIN_FAULT says.
var faulty = sync.OnceValues(func() (string, error) {
	root, err := os.MkdirTemp("", "faulty")
	if err != nil {
		return "", err
	}
	built = root
	program := filepath.Join(root, "faulty")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "./internal/faulty")
	if out, err := build.CombinedOutput(); err != nil {
		return "", errors.New(string(out))
	}
	return program, nil
})

// newHost is a host of that plugin, and the end of its use.
func newHost(t *testing.T) (*host.Host, func() []host.Use) {
	t.Helper()
	program, err := faulty()
	require.NoError(t, err)
	folder, err := lock.Open(filepath.Join(t.TempDir(), "plugins"), lock.BuiltIn())
	require.NoError(t, err)
	_, err = folder.Install(t.Context(), program, host.Describe, lock.InstallOptions{NoMTLS: true})
	require.NoError(t, err)
	h, problems := host.New(folder)
	require.Empty(t, problems)
	end := h.Begin(1 << 30)
	t.Cleanup(func() { end() })
	return h, end
}

// toFail has the plugins that are started from now on fail.
func toFail(t *testing.T, fault string, call time.Duration) {
	t.Helper()
	t.Setenv("LORAKIT_PLUGIN_FAULT", fault)
	t.Setenv("LORAKIT_PLUGIN_CALL_TIMEOUT", call.String())
}

// open opens a file of one tensor of a MiB, and returns its bytes too.
func open(ctx context.Context, t *testing.T, h *host.Host) (formats.Container, []byte, error) {
	t.Helper()
	dir := t.TempDir()
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i * 7 / 3)
	}
	header := `{"tensors": [{"name": "a", "dtype": "F32", "shape": [4, 65536]}]}`
	b := append(binary.LittleEndian.AppendUint64([]byte("FX01"), uint64(len(header))), header...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "x.fx"), append(b, data...), 0o666))
	c, err := h.Formats()[0].Open(ctx, storage.Local(dir, storage.Options{}), "x.fx")
	return c, data, err
}

// A plugin is started once and read from by several at once, in ranges of any size.
func TestRead(t *testing.T) {
	h, end := newHost(t)
	c, data, err := open(t.Context(), t, h)
	require.NoError(t, err)
	x := c.Tensors()[0]
	var group errgroup.Group
	for i := range 16 {
		group.Go(func() error {
			off, n := i*60_001, 1+i*6_000
			p := make([]byte, n)
			if err := formats.ReadFull(x.Data, p, int64(off)); err != nil {
				return err
			}
			if !bytes.Equal(p, data[off:off+n]) {
				return fmt.Errorf("range %d differs", i)
			}
			return nil
		})
	}
	require.NoError(t, group.Wait())
	p := make([]byte, 100)
	n, err := x.Data.ReadAt(p, 1<<20-10)
	assert.Equal(t, 10, n)
	assert.Equal(t, io.EOF, err)
	require.NoError(t, c.Close())
	uses := end()
	require.Len(t, uses, 1)
	assert.Equal(t, "faulty", uses[0].Name)
	assert.Greater(t, uses[0].PeakMemory, int64(1<<20))
}

// A plugin that fails is ended at once, says the same to all who use it, and is started again for who begins anew.
func TestFailsForAll(t *testing.T) {
	h, end := newHost(t)
	for fault, want := range map[string]string{
		"Read:later-exit": "plugin faulty exited (exit status 3)", "Read:short": "sent 5000 of 10000 bytes",
		"Read:later-hang": "plugin faulty gave no answer in 300ms",
		"Read:later-kill": "plugin faulty exited (signal: killed)", "Read:big": "sent a message of more than 4 MiB",
		"Read:garbage": "plugin faulty sent",
	} {
		call := time.Minute
		if strings.HasSuffix(fault, "hang") {
			call = 300 * time.Millisecond
		}
		toFail(t, fault, call)
		c, _, err := open(t.Context(), t, h)
		require.NoError(t, err)
		errs := make([]error, 16)
		var wait sync.WaitGroup
		for i := range errs {
			wait.Go(func() { errs[i] = formats.ReadFull(c.Tensors()[0].Data, make([]byte, 10_000), 0) })
		}
		wait.Wait()
		begin := time.Now()
		var failed []string
		for _, err := range errs {
			if err != nil {
				assert.ErrorIs(t, err, host.ErrFailed)
				assert.ErrorIs(t, err, formats.ErrFailed)
				failed = append(failed, err.Error())
			}
		}
		require.NotEmpty(t, failed)
		assert.Len(t, slices.Compact(failed), 1, "%v", failed)
		assert.Contains(t, failed[0], want)
		_, _, err = open(t.Context(), t, h)
		assert.ErrorContains(t, err, failed[0][strings.Index(failed[0], "plugin faulty"):])
		assert.NoError(t, c.Close())
		end()
		assert.Less(t, time.Since(begin), 2*time.Second)

		toFail(t, "", time.Minute)
		end = h.Begin(0)
		c, _, err = open(t.Context(), t, h)
		require.NoError(t, err)
		require.NoError(t, c.Close())
		end()
		end = h.Begin(0)
	}
	end()
}

// A call, and a start, end with their context, and a plugin that hangs then is ended soon.
func TestCancelled(t *testing.T) {
	h, end := newHost(t)
	end()
	for _, fault := range []string{"start:hang", "start:part", "Describe:hang", "Open:hang", "Open:stop", "List:hang"} {
		toFail(t, fault, time.Minute)
		end := h.Begin(0)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		begin := time.Now()
		_, _, err := open(ctx, t, h)
		assert.ErrorIs(t, err, context.DeadlineExceeded, fault)
		assert.NotErrorIs(t, err, host.ErrFailed)
		assert.Less(t, time.Since(begin), 3*time.Second, fault)
		end()
		assert.Less(t, time.Since(begin), 4*time.Second, fault)
		cancel()
	}
	toFail(t, "", time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	defer h.Begin(0)()
	_, _, err := open(ctx, t, h)
	assert.ErrorIs(t, err, context.Canceled)
}

// stored are tensors in memory.
type stored map[string][]byte

func (s stored) Tensors() (list []tensor.Info) {
	for name := range s {
		t, _ := s.Lookup(name)
		list = append(list, t)
	}
	return list
}

func (s stored) Lookup(name string) (tensor.Info, bool) {
	b, ok := s[name]
	t := tensor.Info{Name: name, DType: tensor.F32, Shape: tensor.Shape{int64(len(b) / 4)}}
	if name == "w" {
		t.DType, t.Shape = tensor.U8, tensor.Shape{int64(len(b))}
	}
	return t, ok
}

func (s stored) Read(name string, p []byte, off int64) error {
	copy(p, s[name][off:])
	return nil
}

func (s stored) DType() tensor.DType { return tensor.F32 }
func (s stored) Config() []byte      { return nil }

// A tile of more than goes in a message goes in several, and is the same.
func TestLargeTile(t *testing.T) {
	h, _ := newHost(t)
	s := h.Schemes()[0]
	spec, err := s.Spec("fq8", nil)
	require.NoError(t, err)
	const n = 3_000_001
	e, err := s.Encoder(t.Context(), spec, tensor.Info{Name: "w", DType: tensor.F32, Shape: tensor.Shape{n}})
	require.NoError(t, err)
	var out [][]byte
	outputs := stored{}
	for _, o := range e.Outputs() {
		size, err := o.Size()
		require.NoError(t, err)
		outputs[o.Name] = make([]byte, size)
	}
	for _, r := range e.Tiles(nil, 0, n) {
		out = append(out, outputs[e.Outputs()[r.Part].Name][r.Offset:r.Offset+r.Length])
	}
	values, carry := make([]byte, 4*n), make([]float32, e.Deferred(0, n))
	for i := range n {
		binary.LittleEndian.PutUint32(values[4*i:], math.Float32bits(float32(i%255-127)))
	}
	require.NoError(t, e.Encode(out, carry, 0, n, values))
	assert.NotContains(t, carry, float32(0))

	found, err := s.Find(t.Context(), outputs)
	require.NoError(t, err)
	require.Len(t, found, 1)
	d := found[0]
	for _, x := range [][2]int64{{0, n}, {64 * 1000, n}, {64, 128}} {
		var in [][]byte
		for _, r := range d.Inputs(nil, x[0], x[1]) {
			in = append(in, outputs[d.Parts()[r.Part]][r.Offset:r.Offset+r.Length])
		}
		dst := make([]byte, 4*(x[1]-x[0]))
		require.NoError(t, d.Decode(dst, x[0], x[1], in))
		for i := x[0]; i < x[1]; i++ {
			got := math.Float32frombits(binary.LittleEndian.Uint32(dst[4*(i-x[0]):]))
			if want := float64(i%255 - 127); math.Abs(float64(got)-want) > 0.51 {
				t.Fatalf("element %d: found %v, expected %v", i, got, want)
			}
		}
	}
}

// Two who use a scheme at the same time do not end each other's streams.
func TestStreamsOfTwo(t *testing.T) {
	h, end := newHost(t)
	defer end()
	s := h.Schemes()[0]
	encode := func(ctx context.Context) error {
		info := tensor.Info{Name: "w", DType: tensor.F32, Shape: tensor.Shape{2, 64}}
		spec, err := s.Spec("fq8", nil)
		if err != nil {
			return err
		}
		e, err := s.Encoder(ctx, spec, info)
		if err != nil {
			return err
		}
		var out [][]byte
		for _, r := range e.Tiles(nil, 0, 128) {
			out = append(out, make([]byte, r.Length))
		}
		carry := make([]float32, e.Deferred(0, 128))
		values := make([]byte, 512)
		for i := range 128 {
			binary.LittleEndian.PutUint32(values[4*i:], math.Float32bits(float32(i)))
		}
		for range 3 {
			if err := e.Encode(out, carry, 0, 128, values); err != nil {
				return err
			}
		}
		if carry[0] != 63 || carry[1] != 127 || out[0][127] != 127 || len(out) != 2 {
			return fmt.Errorf("found %v and %v", carry, out)
		}
		return nil
	}
	first, cancel := context.WithCancel(t.Context())
	require.NoError(t, encode(first))
	second, cancelSecond := context.WithCancel(t.Context())
	defer cancelSecond()
	require.NoError(t, encode(second))
	cancel()
	require.NoError(t, encode(second))
	assert.ErrorIs(t, encode(first), context.Canceled)
}
