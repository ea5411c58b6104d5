package lorakit_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
	"github.com/lorakit/lorakit/pipeline"
)

// TestGGUFSameBytes: a merge into GGUF files has the same bytes whatever the threads and the memory, in one run or in
// several. It runs alone: the memory that is allowed is that of the process.
func TestGGUFSameBytes(t *testing.T) {
	for _, base := range []string{"mixtral", "gptoss", "gpt2", "deepseek3"} {
		adapters := madeAdapters(t, base)
		for _, a := range adapters {
			if a.kind != "dora" && a.kind != "experts" {
				continue
			}
			t.Run(base+"/"+a.kind, func(t *testing.T) {
				src, adapter := filepath.Join(ggufModels, base), []lorakit.Adapter{{Path: a.make(t, base)}}
				o := lorakit.ConvertOptions{To: "gguf", Quantize: "q4_0", MaxShardSize: 20_000, MinKept: -1}
				first := filepath.Join(t.TempDir(), "first")
				want, err := lorakit.Merge(t.Context(), src, adapter, first, o)
				require.NoError(t, err)
				require.Greater(t, want.Shards, 2)
				for _, threads := range []int{1, 2, 7} {
					for _, memory := range []int64{64 << 20, 256 << 20} {
						o.Threads, o.Memory = threads, memory
						out := filepath.Join(t.TempDir(), "out")
						got, err := lorakit.Merge(t.Context(), src, adapter, out, o)
						require.NoError(t, err)
						sameFolder(t, first, out)
						require.Equal(t, want.Adapters, got.Adapters)
					}
				}

				// As soon as a shard is finished it is interrupted, and gone on with.
				out := filepath.Join(t.TempDir(), "out")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				o.Progress = func(p lorakit.Progress) {
					if p.Shards > 0 {
						cancel()
					}
				}
				if _, err := lorakit.Merge(ctx, src, adapter, out, o); err != nil {
					require.ErrorIs(t, err, pipeline.ErrInterrupted)
					o.Resume, o.Progress = true, nil
					got, err := lorakit.Merge(t.Context(), src, adapter, out, o)
					require.NoError(t, err)
					sameShares(t, want.Adapters, got.Adapters)
				}
				sameFolder(t, first, out)

				// In one file it has the same tensors.
				one := filepath.Join(t.TempDir(), "one.gguf")
				o = lorakit.ConvertOptions{Quantize: "q4_0", MinKept: -1}
				whole, err := lorakit.Merge(t.Context(), src, adapter, one, o)
				require.NoError(t, err)
				sameShares(t, want.Adapters, whole.Adapters)
				sameTensors(t, load(t, one), load(t, first))
			})
		}
	}
}
