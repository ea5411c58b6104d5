package train

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lorakit/lorakit/internal/kernels"
)

func TestMain(m *testing.M) {
	// The clock of regular expressions runs on until the last of them would have had its time.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/dlclark/regexp2/v2.runClock"))
}

// trace is what two steps leave: the losses, and a hash of the gradients of both and of the values at the end.
func (s *step) trace(t testing.TB) string {
	hash := sha256.New()
	losses := ""
	for i := range 2 {
		loss, err := s.take(i+1, 1e-3, func() error {
			for _, x := range s.adapter.trainables {
				require.NoError(t, binary.Write(hash, binary.LittleEndian, x.gradient))
			}
			return nil
		})
		require.NoError(t, err)
		losses += fmt.Sprint(loss, " ")
	}
	for _, x := range s.adapter.trainables {
		require.NoError(t, binary.Write(hash, binary.LittleEndian, x.value))
	}
	return fmt.Sprintf("%s%x", losses, hash.Sum(nil))
}

// sameShape is that of a batch of no multiple of anything; a row is longer than a block of queries where a base has
// windows, and fits into GPT-2's positions.
func sameShape(base string) (rows, length int) {
	switch base {
	case "gemma2", "llama":
		return 1, 131
	case "gpt2", "gpt2-int8":
		return 3, 23
	}
	return 2, 37
}

// TestStepsAreTheSame has the same bits for any number of threads, and of tokens whose logits are computed at once:
// memory decides that.
func TestStepsAreTheSame(t *testing.T) {
	for _, base := range []string{"llama", "gemma2", "qwen3", "qwen3-moe", "mixtral-fused", "phi", "phi3-longrope", "gpt2",
		"gpt2-int8", "cohere2", "stablelm", "olmo2", "granite", "llama-32-nf4-dq"} {
		for _, mode := range []string{"lora", "dora", "saved", "rows"} {
			t.Run(base+"/"+mode, func(t *testing.T) {
				t.Parallel()
				rows, length := sameShape(base)
				want := stepOf(t, base, mode, rows, length, 1).trace(t)
				for threads, chunk := range map[int]int{2: leastChunk, 3: leastChunk + 3, 7: 1 << 20} {
					s := stepOf(t, base, mode, rows, length, threads)
					s.room.chunk = min(s.room.chunk, chunk)
					require.Equal(t, want, s.trace(t), "%d threads, chunks of %d", threads, chunk)
				}
			})
		}
	}
}

// The kernels are chosen as a program starts, so a process for each set.
func TestStepsAreTheSameForAllKernels(t *testing.T) {
	const mark = "traces: "
	var list []string
	for _, base := range []string{"gemma2", "qwen3-moe", "gpt2", "llama-32-nf4-dq"} {
		for _, mode := range []string{"lora", "dora"} {
			rows, length := sameShape(base)
			list = append(list, stepOf(t, base, mode, rows, length, 2).trace(t))
		}
	}
	got := mark + strings.Join(list, " ")
	t.Log(got)
	if os.Getenv("LORAKIT_KERNELS") != "" {
		return
	}
	for _, set := range kernels.Available() {
		cmd := exec.Command(os.Args[0], "-test.run=^TestStepsAreTheSameForAllKernels$", "-test.v")
		cmd.Env = append(os.Environ(), "LORAKIT_KERNELS="+set)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), got, set)
	}
}

// TestZeroIsTheBase has the loss of the base bit for bit where all B are zero, with or without threads and chunks.
func TestZeroIsTheBase(t *testing.T) {
	bases, err := filepath.Glob(baseOf("*"))
	require.NoError(t, err)
	for _, path := range bases {
		base := filepath.Base(path)
		t.Run(base, func(t *testing.T) {
			t.Parallel()
			s := stepOf(t, base, "lora", 2, 17, 2)
			for name, ad := range s.adapter.params { // what has no B is left out
				for _, l := range append(slices.Clone(ad.experts), ad.plain) {
					if l != nil {
						clear(l.b.of.value)
					}
				}
				if ad.bias != nil {
					clear(ad.bias.value)
				}
				if ad.value != nil {
					delete(s.adapter.params, name)
				}
			}
			require.NoError(t, s.build(17))
			got, err := s.loss()
			require.NoError(t, err)
			s.adapter = nil
			require.NoError(t, s.build(17))
			want, err := s.loss()
			require.NoError(t, err)
			require.Equal(t, want, got)
		})
	}
}

// TestFilesAreTheSame has the same steps of a base in one file and in shards, in its own type and in float32.
func TestFilesAreTheSame(t *testing.T) {
	for _, name := range []string{"gemma2", "qwen3-moe", "gpt2"} {
		t.Run(name, func(t *testing.T) {
			r := readStepResults(t)
			adapters, err := filepath.Glob(filepath.Join(stepFixtures, name, "*", adapterConfig))
			require.NoError(t, err)
			require.NotEmpty(t, adapters)
			run := func(base string) (string, []float64) {
				gradients := filepath.Join(t.TempDir(), "gradients.safetensors")
				v, err := Validate(t.Context(), base, Options{Data: r.Batches["three"].write(t), Adapter: filepath.Dir(adapters[0]),
					Steps: 2, Rate: 1e-3, SaveGradients: gradients, Threads: 2})
				require.NoError(t, err)
				b, err := os.ReadFile(gradients)
				require.NoError(t, err)
				return string(b), append(v.Losses, *v.GradNorm, *v.LossAfter)
			}
			wantBytes, want := run(baseOf(name))
			raw := readRaw(t, filepath.Join(baseOf(name), "model.safetensors"))
			wide := map[string]rawTensor{}
			for tensor, x := range raw {
				wide[tensor] = x.widened(t)
			}
			for what, files := range map[string][]map[string]rawTensor{
				"float32": {wide}, "shards": split3(raw), "float32 in shards": split3(wide),
			} {
				bytes, got := run(writeBase(t, name, files...))
				require.Equal(t, want, got, what)
				require.True(t, wantBytes == bytes, what)
			}
		})
	}
}
