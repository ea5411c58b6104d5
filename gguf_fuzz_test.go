package lorakit_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage/storagetest"
)

// FuzzGGUFModel opens any bytes as a model in a GGUF file: its front, and the beginning of its data, before zeros. What
// is refused is so in one line; of what is not every weight can be read, and it can be made a GGUF file again.
func FuzzGGUFModel(f *testing.F) {
	kinds, err := os.ReadDir(filepath.Join("fixtures", "gguf-models"))
	require.NoError(f, err)
	for _, k := range kinds {
		if !k.IsDir() {
			continue
		}
		m := newGGUF(f, k.Name())
		b := m.bytes(f)
		front := len(b)
		for _, data := range m.data {
			front -= (len(data) + 31) / 32 * 32
		}
		f.Add(b[:front], b[front:min(front+1024, len(b))])
	}
	const most, zeros = 1 << 17, 1 << 17
	f.Fuzz(func(t *testing.T, front, data []byte) {
		if len(front)+len(data) > most {
			return
		}
		ctx := context.Background()
		dir := storagetest.Memory{"m.gguf": bytes.Join([][]byte{front, data, make([]byte, zeros)}, nil)}
		c, err := checkpoint.OpenIn(ctx, dir, "m.gguf", checkpoint.OpenOptions{})
		if err != nil {
			refusedInOneLine(t, err)
			return
		}
		defer c.Close()
		readAll(t, c)
		for _, o := range []pipeline.Options{{Quantize: "keep"}, {Quantize: "q4_0"}} {
			_, err := pipeline.Plain(c).ToGGUF(ctx, o)
			refusedInOneLine(t, err)
		}
		if !c.NamedByGGUF() {
			return
		}
		n, err := c.Restored(ctx, checkpoint.RestoreOptions{Tokenizer: true})
		if err != nil {
			refusedInOneLine(t, err)
			return
		}
		require.NotNil(t, n.Config)
		require.Contains(t, n.ConfigJSON, byte('{'))
		readAll(t, n)
		_, err = pipeline.Plain(n).ToGGUF(ctx, pipeline.Options{Quantize: "keep"})
		refusedInOneLine(t, err)
	})
}

func refusedInOneLine(t *testing.T, err error) {
	if err != nil {
		require.NotContains(t, err.Error(), "\n")
		require.NotContains(t, err.Error(), "\x00")
		require.Less(t, len(err.Error()), 3000)
		require.True(t, strings.Contains(err.Error(), "m.gguf"), err)
	}
}

// readAll reads each weight a piece at a time.
func readAll(t *testing.T, c *checkpoint.Checkpoint) {
	r := checkpoint.NewReader(nil)
	for _, w := range c.Weights {
		const piece = 1 << 12
		for lo := int64(0); lo < w.Count(); lo += piece {
			if _, err := r.Read(w, lo, min(lo+piece, w.Count()), false); err != nil {
				refusedInOneLine(t, err)
				break
			}
		}
	}
}
