package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/quant"
	_ "github.com/lorakit/lorakit/quant/bnb"
	"github.com/lorakit/lorakit/tensor"
)

func TestMain(m *testing.M) {
	if os.Getenv(asZipped) != "" {
		asZippedMain()
	}
	// The clock of regular expressions runs on until the last of them would have had its time.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/dlclark/regexp2/v2.runClock"))
}

func TestSameBytesForAnyThreadsAndMemory(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	for name, o := range map[string]pipeline.Options{
		"nf4": nf4,
		"fp4 single": {Quantize: "fp4", Params: quant.Params{{Name: "block_size", Value: int64(4096)}},
			MaxShardSize: 1 << 40},
		"int8": {Quantize: "int8", MaxShardSize: 300_000},
		"cast": {Quantize: "keep", DType: tensor.F16, MaxShardSize: 300_000},
	} {
		t.Run(name, func(t *testing.T) {
			want := ""
			for _, ro := range []pipeline.RunOptions{{}, {Threads: 1}, {Threads: 7}, {Memory: 64 << 20, Threads: 2},
				{Memory: 2 << 30}} {
				dst := filepath.Join(t.TempDir(), "dst")
				_, err := convert(context.Background(), src, dst, o, ro)
				require.NoError(t, err)
				got := digest(t, dst)
				if want == "" {
					want = got
				}
				require.Equal(t, want, got, "%+v", ro)
			}
		})
	}
}

func TestTooLittleMemorySaysTheLeast(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	dst := filepath.Join(t.TempDir(), "dst")
	_, err := convert(context.Background(), src, dst, nf4, pipeline.RunOptions{Memory: 1 << 20})
	require.ErrorIs(t, err, pipeline.ErrMemory)
	var least int64
	hints := hint.Of(err)
	require.Len(t, hints, 1)
	require.Equal(t, "Memory", hints[0].Option)
	_, scanErr := fmt.Sscanf(hints[0].Value, "%dMiB", &least)
	require.NoError(t, scanErr, err)
	assert.NoDirExists(t, dst+".partial")
	_, err = convert(context.Background(), src, dst, nf4, pipeline.RunOptions{Memory: (least + 4) << 20})
	require.NoError(t, err, "what was said to do does")
}

// TestHuge quantises a tensor of more than 2^31 elements, three-dimensional, from a sparse file, in less memory than
// its absmax take.
func TestHuge(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "b.safetensors")
	shape := tensor.Shape{3, 1 << 14, 1<<16/3*2 + 7}
	info := tensor.Info{Name: "w", DType: tensor.BF16, Shape: shape}
	n := info.Count()
	require.Greater(t, n, int64(1)<<31)
	f, err := formats.Default.Lookup("safetensors")
	require.NoError(t, err)
	l, err := f.Layout(context.Background(), []tensor.Info{info}, formats.Options{SingleFile: "a.safetensors"})
	require.NoError(t, err)
	file, err := os.Create(src)
	require.NoError(t, err)
	_, err = file.Write(l.Shards[0].Header)
	require.NoError(t, err)
	require.NoError(t, file.Truncate(l.Shards[0].Size))
	last := []byte{0x00, 0xc0, 0x80, 0x3f, 0x00, 0x40} // -2, 1, 2
	_, err = file.WriteAt(last, l.Shards[0].Size-int64(len(last)))
	require.NoError(t, err)
	require.NoError(t, file.Close())

	_, err = convert(context.Background(), src, dst,
		pipeline.Options{Quantize: "nf4", Params: block64double, Include: []string{"*"}},
		pipeline.RunOptions{Memory: 96 << 20})
	require.NoError(t, err)
	c, err := checkpoint.Open(context.Background(), dst)
	require.NoError(t, err)
	defer c.Close()
	require.Len(t, c.Weights, 1)
	w := c.Weights[0]
	assert.Equal(t, shape, w.Shape)
	codes := w.Parts[0]
	assert.Equal(t, (n+1)/2, codes.Bytes)
	tail := make([]byte, 3)
	_, err = codes.Data.ReadAt(tail, codes.Offset+codes.Bytes-3)
	require.NoError(t, err)
	// n is even: -2, 1, 2 over an absmax of 2 are -1, 0.5, 1.
	assert.Equal(t, []byte{0x77, 0x70, 0xcf}, tail)
	assert.Zero(t, n%2)
	assert.NoDirExists(t, dst+".partial")
}

// TestManyRunsAtOnce has several runs write to one destination: one wins and its result is whole, the others are told
// so.
func TestManyRunsAtOnce(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	options := []pipeline.Options{nf4, {Quantize: "int8", MaxShardSize: 300_000}, {Quantize: "keep"}}
	clean := map[string]bool{}
	for _, o := range options {
		dst := filepath.Join(t.TempDir(), "dst")
		_, err := convert(context.Background(), src, dst, o, pipeline.RunOptions{})
		require.NoError(t, err)
		clean[digest(t, dst)] = true
	}
	for range 40 {
		dir := t.TempDir()
		dst := filepath.Join(dir, "dst")
		errs := make(chan error)
		const runs = 6
		for i := range runs {
			go func() {
				_, err := convert(context.Background(), src, dst, options[i%len(options)], pipeline.RunOptions{})
				errs <- err
			}()
		}
		won := 0
		for range runs {
			err := <-errs
			switch {
			case err == nil:
				won++
			default:
				assert.True(t, errors.Is(err, pipeline.ErrBusy) || errors.Is(err, pipeline.ErrExists), "%v", err)
			}
		}
		require.Equal(t, 1, won)
		require.True(t, clean[digest(t, dst)], "the result is whole")
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, entries, 1, "nothing is left over")
	}
}

// TestVeryManyTensors is refused before it takes the memory that it may not have.
func TestVeryManyTensors(t *testing.T) {
	src := filepath.Join(t.TempDir(), "a.safetensors")
	var all []stored
	for i := range 20_000 {
		all = append(all, stored{fmt.Sprintf("l.%d.up.weight", i), tensor.U8, tensor.Shape{1},
			func(int64) []byte { return []byte{1} }})
	}
	writeFile(t, src, all...)
	c, err := checkpoint.Open(context.Background(), src)
	require.NoError(t, err)
	defer c.Close()
	o := pipeline.Options{Quantize: "keep"}
	require.ErrorIs(t, pipeline.CheckMemory(pipeline.Plain(c), o, 50<<20), pipeline.ErrMemory)
	require.NoError(t, pipeline.CheckMemory(pipeline.Plain(c), o, 0))
	dst := filepath.Join(t.TempDir(), "b.safetensors")
	_, err = convert(context.Background(), src, dst, o, pipeline.RunOptions{Memory: 96 << 20})
	require.NoError(t, err)
}
