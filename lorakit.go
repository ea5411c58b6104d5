// Package lorakit turns model checkpoints into what their users need next: another type, four bits (NF4 with double
// quantisation) or eight, and back; LoRA adapters merged, extracted, combined, resized, begun or converted from one
// tool's files to another's.
//
// It needs no Python and no GPU, and its memory is bounded by an option and not by the model. Each function is one
// command of the lorakit binary:
//
//	result, err := lorakit.Convert(ctx, "llama", "llama-nf4", lorakit.ConvertOptions{
//		Quantize: "nf4", BlockSize: 64, DoubleQuant: true,
//	})
//
// The same source and options give the same bytes, whatever the number of threads, the memory and the machine; a
// destination appears whole or not at all.
//
// A checkpoint is a folder as transformers saves it, or a single file. Importing this package makes all formats and
// quantisation schemes known that lorakit comes with.
package lorakit

import (
	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/train"

	_ "github.com/lorakit/lorakit/formats/gguf"            // registers the container
	_ "github.com/lorakit/lorakit/formats/pytorch"         // registers the container
	_ "github.com/lorakit/lorakit/formats/safetensors"     // registers the container
	_ "github.com/lorakit/lorakit/quant/awq"               // registers the scheme
	_ "github.com/lorakit/lorakit/quant/bnb"               // registers the scheme
	_ "github.com/lorakit/lorakit/quant/compressedtensors" // registers the scheme
	_ "github.com/lorakit/lorakit/quant/fp8"               // registers the scheme
	_ "github.com/lorakit/lorakit/quant/ggml"              // registers the scheme
	_ "github.com/lorakit/lorakit/quant/gptq"              // registers the scheme
	_ "github.com/lorakit/lorakit/quant/mlx"               // registers the scheme
	_ "github.com/lorakit/lorakit/quant/modelopt"          // registers the scheme
	_ "github.com/lorakit/lorakit/quant/mxfp4"             // registers the scheme
)

// Version is the release, by semantic versioning.
const Version = "0.1.0"

// Kernels names the set of inner loops in use: avx512, avx2 or purego. The error says what is wrong with the
// environment variable LORAKIT_KERNELS, which forces one.
func Kernels() (string, error) { return kernels.Active(), kernels.Err() }

// Kinds of errors. Test for them with errors.Is; those of formats and quant may be met too.
var (
	ErrExists      = pipeline.ErrExists      // the destination is there already
	ErrBusy        = pipeline.ErrBusy        // another run is writing to it
	ErrOtherPlan   = pipeline.ErrOtherPlan   // a stage was made with other options
	ErrRefused     = pipeline.ErrRefused     // what was asked for contradicts itself or the checkpoint
	ErrLost        = pipeline.ErrLost        // a merge would lose an adapter
	ErrMemory      = pipeline.ErrMemory      // Memory is less than this checkpoint needs
	ErrInterrupted = pipeline.ErrInterrupted // the context was cancelled
	ErrOption      = lora.ErrOption          // an option has a value that is unknown
	ErrLink        = storage.ErrLink         // a link leads out of the folder that is read; FollowLinks takes it
	ErrForeign     = formats.ErrForeign      // what was to be a checkpoint is recognised as something else
	// ErrUnsupported says that an adapter has a part that is not known, or lacks what would tell what it is.
	ErrUnsupported = lora.ErrUnsupported
	// ErrData says that the batch of Validate is malformed or does not fit the model.
	ErrData = train.ErrData
	// ErrArchitecture says that no training step is known for a model's architecture.
	ErrArchitecture = train.ErrArchitecture
	// ErrNotFinite says that Validate has met a weight, an activation, a loss or a gradient that is NaN or infinite.
	ErrNotFinite = train.ErrNotFinite
)

// Hint is one thing that can be done about an error: an option to set, or a function to call.
type Hint = hint.Hint

// Hints lists what can be done about an error, which its text does not say.
func Hints(err error) []Hint { return hint.Of(err) }

// What the functions return and report is made by packages pipeline and checkpoint.
type (
	// Progress says how far a run is.
	Progress = pipeline.Progress
	// Plan says where every byte of a result comes from and where it goes.
	Plan = pipeline.Plan
	// Comparison is what Diff finds.
	Comparison = checkpoint.Comparison
	// KeptAdapter says what is kept of an adapter in a merge.
	KeptAdapter = pipeline.KeptAdapter
	// KeptModule says what is kept of an adapter in one module.
	KeptModule = pipeline.KeptModule
	// KeptExpert says it of one expert of a stack.
	KeptExpert = pipeline.KeptExpert
	// Rounding says what roundings may have taken of a weight.
	Rounding = pipeline.Rounding
	// MergeVerification is what VerifyMerge finds.
	MergeVerification = pipeline.MergeVerification
	// Verification is what Verify finds.
	Verification = checkpoint.Verification
)
