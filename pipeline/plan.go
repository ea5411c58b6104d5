package pipeline

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// ErrRefused says that what was asked for cannot be done with this checkpoint.
var ErrRefused = checkpoint.ErrRefused

// Options say what a checkpoint is to become. The result depends on them and on the source alone.
type Options struct {
	// To is the name of the format to write; empty keeps the source's, or takes that of the destination's extension.
	To string
	// DType is what plain weights are cast to; 0 keeps each as it is.
	DType tensor.DType
	// Quantize is "keep", "none", or a type of a registered scheme, such as "nf4".
	Quantize string
	// Params are the parameters of that type, such as its block size; those that it does not have are not looked at.
	Params quant.Params
	// Rules give weights types of their own, the first that matches; the others get that of Quantize.
	Rules []Rule
	// Budget is how many bits a quantised weight may have, companions included; 0 is any number. Rules with one glob are
	// the types from which it chooses by the error that each makes, which Measuring says how to measure.
	Budget    float64
	Measuring RunOptions
	// PerExpert quantises the experts' matrices too, which transformers does not.
	PerExpert bool
	// Include, where not empty, names by globs exactly what is quantised; Exclude what is not.
	Include, Exclude []string
	// RoundTrip adds the deltas of adapters to what is left of each plain weight after it has gone through this
	// quantisation and back, as QLoRA has seen it in training; nil adds them to the weight as it is.
	RoundTrip *quant.Spec
	// MaxShardSize is the most bytes a shard may have; 0 is no limit.
	MaxShardSize int64
	// MaxTensors is the most tensors a shard may have; 0 is no limit.
	MaxTensors int
	// PreTokenizer is llama.cpp's name for how a tokenizer cuts text, where its files do not tell or are not to.
	PreTokenizer string
	// AllowNonFinite quantises NaN and infinity as the scheme does, instead of refusing them.
	AllowNonFinite bool
}

// Plan says, for every byte of the result, where it comes from and where it goes. It is a value: it can be saved as
// JSON and read back, and equal plans make equal bytes.
type Plan struct {
	// Version is that of the rules by which the plan is carried out: another may make other bytes.
	Version  int            `json:"version"`
	Source   string         `json:"source"`
	Inputs   []InputFile    `json:"inputs"`             // what the plan was made from
	Adapters []AdapterInput `json:"adapters,omitempty"` // what is merged, in this order
	Format   string         `json:"format"`
	// SingleFile says that the destination is one file and no folder.
	SingleFile bool `json:"single_file,omitempty"`
	// Versions are those of the formats and schemes that have one, and that read or make bytes of the result.
	Versions map[string]string `json:"versions,omitempty"`
	// Metadata are what a format gets that writes its files itself; else they are in the files' headers.
	Metadata  []Metadatum    `json:"metadata,omitempty"`
	Shards    []Shard        `json:"shards"`
	Files     []formats.File `json:"files,omitempty"`     // small, written whole
	Copied    []InputFile    `json:"carried,omitempty"`   // copied as they are
	Quantized int            `json:"quantized,omitempty"` // weights that are in the scheme asked for
	// Bits is what the quantised weights have on average, companions included, where there is a budget.
	Bits    float64  `json:"bits_per_weight,omitempty"`
	Notices []string `json:"notices,omitempty"` // what the user should know of the choices made
}

// planVersion is the Version of the plans made here.
const planVersion = 1

// InputFile is a file of the source, with what tells that it has changed.
type InputFile struct {
	Name    string `json:"name"` // relative to the source's folder, with slashes
	Size    int64  `json:"size"`
	Version string `json:"version"` // as storage.File has it
}

func inputFile(name string, f storage.File) InputFile {
	return InputFile{Name: name, Size: f.Size(), Version: f.Version()}
}

// inputFileIn looks at a file of a folder.
func inputFileIn(ctx context.Context, dir storage.Folder, name string) (InputFile, error) {
	f, err := dir.Open(ctx, name)
	if err != nil {
		return InputFile{}, err
	}
	return inputFile(name, f), f.Close()
}

// Shard is one output file, and the unit of work and of resumption.
type Shard struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // formats.UnknownSize where the format writes the file itself
	formats.Frame
	Jobs []Job `json:"jobs"`
}

// Job is the way of one logical weight: decode, add what adapters add, transpose, cast, quantise, in this order. With
// Copy its stored bytes are taken as they are.
type Job struct {
	Weight    string       `json:"weight"`
	Copy      bool         `json:"copy,omitempty"`
	DType     tensor.DType `json:"dtype,omitzero"`    // of the values that are written; 0 of copied blocks
	Finite    bool         `json:"finite,omitempty"`  // a value that is not finite is an error
	RoundTrip *quant.Spec  `json:"through,omitempty"` // quantised so, and dequantised, before anything is added
	Encode    *quant.Spec  `json:"encode,omitempty"`  // nil writes plain values
	// Group names the weights that share what their scheme measures before it encodes them. They stand in one shard.
	Group   string   `json:"group,omitempty"`
	Outputs []Output `json:"outputs"`
}

// Output is one tensor of the result and where its bytes begin in the shard.
type Output struct {
	tensor.Info
	Offset int64 `json:"offset"` // in the scratch file, where the format writes the shard itself
}

// Digest identifies the plan: a stage is gone on with only by the plan that began it. How the paths of the source and
// of adapters were spelled is no part of it.
func (p *Plan) Digest() string {
	anywhere := *p
	anywhere.Source = ""
	anywhere.Adapters = slices.Clone(p.Adapters)
	for i := range anywhere.Adapters {
		anywhere.Adapters[i].Path, anywhere.Adapters[i].Dir = "", ""
	}
	h := sha256.New()
	if err := json.MarshalWrite(h, &anywhere, json.Deterministic(true), jsontext.AllowInvalidUTF8(true)); err != nil {
		panic(err) // a Plan holds nothing that JSON cannot
	}
	return hex.EncodeToString(h.Sum(nil))
}

// OutputBytes is the size of all shards. Of one whose size is unknown it is that of its tensors.
func (p *Plan) OutputBytes() int64 {
	var n int64
	for i := range p.Shards {
		if s := &p.Shards[i]; s.streamed() {
			n += s.scratchBytes()
		} else {
			n += s.Size
		}
	}
	return n
}

// ScratchBytes is the most space that shards take while their formats write them, besides their files.
func (p *Plan) ScratchBytes() int64 {
	var most int64
	for i := range p.Shards {
		if s := &p.Shards[i]; s.streamed() {
			most = max(most, s.scratchBytes())
		}
	}
	return most
}

// StreamedShards is the number of shards whose sizes are unknown, since their format writes them itself.
func (p *Plan) StreamedShards() int {
	n := 0
	for i := range p.Shards {
		if p.Shards[i].streamed() {
			n++
		}
	}
	return n
}

// NewPlan decides what becomes of every weight of m at the destination dst, which is only looked at for its extension.
func NewPlan(ctx context.Context, m *Merged, dst string, o Options) (*Plan, error) {
	b := planner{Checkpoint: m.Base, Options: o, from: m}
	b.p = &Plan{Version: planVersion, Source: b.Path, Adapters: m.Adapters,
		Notices: slices.Concat(m.Base.Notices, m.Notices)}
	var err error
	if b.format, err = b.outputFormat(dst); err != nil {
		return nil, err
	}
	if b.format.Name() == gguf.Format {
		b.nameBlocks()
	}
	if err := b.check(); err != nil {
		return nil, err
	}
	if b.Budget > 0 {
		if err := b.spend(ctx); err != nil {
			return nil, err
		}
	}
	jobs, err := b.jobs(ctx)
	if err != nil {
		return nil, err
	}
	small, err := b.smallFiles(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.layOut(ctx, dst, jobs, small.claimed); err != nil {
		return nil, err
	}
	if err := b.p.putVersions(m); err != nil {
		return nil, err
	}
	if err := b.putBeside(small); err != nil {
		return nil, err
	}
	return b.p, nil
}
