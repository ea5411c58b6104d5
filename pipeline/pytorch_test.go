package pipeline_test

import (
	"archive/zip"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	_ "github.com/lorakit/lorakit/formats/pytorch"
	"github.com/lorakit/lorakit/pipeline"
)

// TestChecksums writes a format that has bytes between and behind its tensors and checksums of them: they are right
// whatever writes them, and in what is resumed and compared.
func TestChecksums(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeModel(t, src)
	o := nf4
	o.To = "pytorch"
	want := ""
	for _, ro := range []pipeline.RunOptions{{}, {Threads: 1, Memory: 64 << 20}, {Threads: 7}} {
		dst := filepath.Join(t.TempDir(), "dst")
		_, err := convert(context.Background(), src, dst, o, ro)
		require.NoError(t, err)
		if want == "" {
			want = digest(t, dst)
		}
		assert.Equal(t, want, digest(t, dst), "%+v", ro)
	}

	c, err := checkpoint.Open(context.Background(), src)
	require.NoError(t, err)
	defer c.Close()
	ref, dst := filepath.Join(t.TempDir(), "dst"), filepath.Join(t.TempDir(), "dst")
	p, err := pipeline.NewPlan(context.Background(), pipeline.Plain(c), dst, o)
	require.NoError(t, err)
	_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), ref, pipeline.RunOptions{})
	require.NoError(t, err)
	for _, s := range p.Shards {
		z, err := zip.OpenReader(filepath.Join(ref, s.Name))
		require.NoError(t, err)
		for _, f := range z.File {
			r, err := f.Open()
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, r) // checks the CRC-32
			require.NoError(t, err)
		}
		require.NoError(t, z.Close())
	}

	stage(t, dst, ref, p, 3)
	r, err := pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
	require.NoError(t, err)
	assert.Equal(t, 3, r.Resumed)
	assert.Equal(t, want, digest(t, dst))
	r, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
	require.NoError(t, err)
	assert.True(t, r.Complete)

	// The last piece has the directory of the archive, and a checksum in it.
	last := p.Shards[len(p.Shards)-1]
	f, err := os.OpenFile(filepath.Join(dst, last.Name), os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	at := last.Checksums[0].At[1]
	require.Greater(t, at, last.Pieces[len(last.Pieces)-1].Offset)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, at)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte{b[0] ^ 1}, at)
	require.NoError(t, err)
	_, err = pipeline.Run(context.Background(), p, pipeline.Plain(c), dst, pipeline.RunOptions{Resume: true})
	assert.ErrorIs(t, err, pipeline.ErrExists)
	assert.ErrorContains(t, err, last.Name)
}
