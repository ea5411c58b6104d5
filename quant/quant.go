// Package quant defines what a quantisation scheme is: the rule by which several stored tensors (W, W.absmax,
// W.quant_map, …) are one weight, and the two ways between them and plain numbers. One sub-package implements one
// scheme and registers itself; import it for its effect:
//
//	import _ "github.com/lorakit/lorakit/quant/bnb"
//
// A scheme works on byte ranges that others read and write for it. It knows no files, and never holds a whole weight.
package quant

import (
	"context"
	"errors"
	"fmt"

	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is.
var (
	// ErrUnknown says that no registered scheme has the type asked for.
	ErrUnknown = errors.New("unknown quantisation")
	// ErrMalformed says that the stored tensors of a weight contradict each other or the scheme.
	ErrMalformed = errors.New("malformed quantised weight")
	// ErrUnsupported says that the scheme cannot hold such a tensor.
	ErrUnsupported = errors.New("cannot be quantised")
	// ErrLeftPlain is an ErrUnsupported of a tensor that the programs of the scheme leave plain among others that they
	// quantise.
	ErrLeftPlain = fmt.Errorf("%w", ErrUnsupported)
	// ErrParameter says that a parameter of a type has a value that it cannot have.
	ErrParameter = errors.New("wrong parameter")
	// ErrRegistered says that a scheme has a name or a type that is taken, or none.
	ErrRegistered = errors.New("cannot be registered")
)

// NonFiniteError says that a weight to be quantised holds a NaN or an infinity, or a value that becomes one on the
// way.
type NonFiniteError struct {
	Index int64  // of the first such element, row-major
	What  string // such as "NaN or infinity"
}

func (e *NonFiniteError) Error() string { return fmt.Sprintf("%s at element %d", e.What, e.Index) }

// Stored gives a scheme access to the stored tensors of a checkpoint, and to what it says of itself.
type Stored interface {
	// Tensors lists all of them, in the order of their data. The caller does not change it.
	Tensors() []tensor.Info
	// Lookup finds a tensor by its name.
	Lookup(name string) (tensor.Info, bool)
	// Read fills p from the bytes of the named tensor, beginning at off.
	Read(name string, p []byte, off int64) error
	// DType is the type that the checkpoint has as a whole, for weights whose stored form does not say what they were;
	// 0 is unknown.
	DType() tensor.DType
	// Config is its config.json, nil where there is none. It is JSON: for Python's NaN and infinities it has numbers.
	Config() []byte
}

// Range is a piece of a stored tensor: bytes [Offset, Offset+Length) of the tensor number Part in the weight's list.
// With a Count above 1 it is so many pieces, each Stride bytes behind the one before, that are handed over as one,
// with nothing between them: a few columns of a matrix that lies by rows. Outputs of an Encoder have no such.
type Range struct {
	Part           int
	Offset, Length int64
	Stride, Count  int64
}

// Bytes is how much is handed over.
func (r Range) Bytes() int64 { return r.Length * max(r.Count, 1) }

// Scattered reports whether the range is several pieces.
func (r Range) Scattered() bool { return r.Count > 1 }

// Decoder reads one quantised weight. It is safe for concurrent use.
type Decoder interface {
	// Info is the logical weight: its name, its shape, and the dtype that it had before it was quantised.
	Info() tensor.Info
	// Spec is how the weight is quantised.
	Spec() Spec
	// Parts names the stored tensors that make up the weight, the one with the bulk of the data first.
	Parts() []string
	// Unit is the number of elements at whose multiples a tile may begin.
	Unit() int64
	// Inputs appends to r the ranges that the elements [lo, hi) are decoded from. lo is a multiple of Unit, hi as well or
	// the end. Fewer elements have as many ranges, each within that of more, and in as many pieces: where ranges are
	// scattered, more are read at once than are decoded. A stack of matrices has such ranges for each of them.
	Inputs(r []Range, lo, hi int64) []Range
	// Values is the type that Decode writes: that of Info where rounding to it is part of the scheme, else the one that
	// the scheme computes in.
	Values() tensor.DType
	// Decode writes the elements [lo, hi) to dst. in has the bytes of Inputs, in the same order.
	Decode(dst []byte, lo, hi int64, in [][]byte) error
}

// Exact is a Decoder that rounds what it computes to the type that the weight had, but need not.
type Exact interface {
	Decoder
	// Exact returns a Decoder of the same weight whose Values are F32, as they are computed.
	Exact() Decoder
}

// Deferred holds the float32 numbers that an Encoder keeps from its tiles for Finish.
type Deferred interface {
	// ReadFloats fills dst with the numbers that begin at index i.
	ReadFloats(dst []float32, i int64) error
}

// Encoder writes one quantised weight. It is safe for concurrent use.
type Encoder interface {
	// Outputs lists the tensors that the weight becomes, that with the bulk
	// of the data first. All sizes are known before any data is.
	Outputs() []tensor.Info
	// Unit is the number of elements at whose multiples a tile may begin.
	Unit() int64
	// Deferred is how many float32 numbers Finish needs of the elements [lo, hi), the same number of each unit; they stand
	// at index Deferred(0, lo) and on, with the bits that they were given. Zero where it needs none.
	Deferred(lo, hi int64) int64
	// Tiles appends to r the ranges of the outputs that the elements [lo, hi) fill. What no tile fills is written by
	// Finish.
	Tiles(r []Range, lo, hi int64) []Range
	// Encode quantises the elements [lo, hi), which src has as the dtype that the Encoder was made for, into out, the
	// bytes of Tiles in the same order, and deferred. A value that is not finite is a *NonFiniteError.
	Encode(out [][]byte, deferred []float32, lo, hi int64, src []byte) error
	// Finish writes the rest, when all tiles are done.
	Finish(c Deferred, write func(part int, off int64, p []byte) error) error
}

// TileSizer is a Decoder or an Encoder that works best on tiles of at least so many elements: one that hands them to
// another process. Others get tiles that fit a cache.
type TileSizer interface {
	TileElements() int64
}

// Measured is an Encoder that has to see all values of its weight, and of all others in its group (Grouper), before the
// first is encoded.
type Measured interface {
	Encoder
	// Statistics is how many float32 numbers are kept of a group. All begin at zero.
	Statistics() int
	// Measure takes in the elements [lo, hi) of one weight, which src has as Encode will get them. The order of calls is
	// open, and numbers of several workers are joined by Join.
	Measure(numbers []float32, lo, hi int64, src []byte) error
	// Join takes others in. It is commutative and associative to the bit, as a maximum is.
	Join(numbers, others []float32)
	// Begin is called once, before the first Encode, with what was measured of the whole group.
	Begin(numbers []float32) error
}

// Grouper is a Scheme in which several weights share what is measured.
type Grouper interface {
	// Groups lists the names of weights that share what is measured, of those that get the same spec. A weight in no
	// group is a group by itself.
	Groups(s Spec, names []string) [][]string
}

// Type is a type of a scheme: what quantised weights are asked for by.
type Type struct {
	Name string
	// ReadOnly says that no weights are written in it.
	ReadOnly bool
	// Loader names the program that checkpoints in this type are for, where that is not transformers.
	Loader string
	// ExpertLoaders names the programs, beside transformers, that load a checkpoint whose experts have a tensor each in
	// this type, such as "vLLM and unsloth"; empty where none is known.
	ExpertLoaders string
	// Experts is what transformers makes of experts with a tensor each, where the other weights are in this type.
	Experts ExpertSupport
}

// ExpertSupport says which experts transformers loads, and as what it takes them.
type ExpertSupport int

const (
	// PlainExperts says that it loads plain experts alone.
	PlainExperts ExpertSupport = iota
	// AnyExperts says that it loads plain experts, and those in the type.
	AnyExperts
	// ListedExperts says that it loads both, but takes plain ones for quantised where no list says that they are not.
	ListedExperts
	// QuantizedExperts says that it loads experts in the type alone.
	QuantizedExperts
	// NoExperts says that it loads neither.
	NoExperts
	// NotTransformers says that it does not read the type at all.
	NotTransformers
)

// Declaration is what a checkpoint's config says of how its weights are stored.
type Declaration struct {
	// Skips reports whether the module stays plain; nil leaves it to the loader, by the model's class.
	Skips func(module string) bool
	// Experts says that a loader takes experts for quantised as well, where Skips does not report them.
	Experts bool
	// Unsaid says that any module may be quantised, or not: its tensors alone tell.
	Unsaid bool
	// Unread says of weights that the scheme has a name for and does not read how they are stored; empty for those that it
	// reads. They are seen as the raw tensors that they consist of.
	Unread Layout
}

// Layout is a way to store quantised weights that is known by name alone.
type Layout struct {
	Name   string // in a few words, such as "AWQ's layout for gemv"
	Advice string // what can be done about it
}

// Assigned is a weight of a checkpoint that is written, and how it is quantised.
type Assigned struct {
	Name string
	Spec Spec
}

// Scheme is one way to store quantised weights.
type Scheme interface {
	// Name is the quant_method of a config.json, such as "bitsandbytes".
	Name() string
	// Types lists what Spec takes.
	Types() []Type
	// Spec makes the Spec of a type from the parameters asked for. Those that the type does not have are left out, those
	// that are missing get their defaults; a value that cannot be is an error that wraps ErrParameter.
	Spec(typ string, asked Params) (Spec, error)
	// Find returns a Decoder for each weight among the stored tensors that is in this scheme, in their order. A weight
	// that is in the scheme but contradicts itself is an error.
	Find(ctx context.Context, s Stored) ([]Decoder, error)
	// Encoder prepares to quantise the weight t. A weight that the scheme cannot hold is an error that wraps
	// ErrUnsupported.
	Encoder(ctx context.Context, s Spec, t tensor.Info) (Encoder, error)
	// Config returns a member of config.json, its key and a JSON object, that tells a loader of the quantised weights.
	// Where the key is not quantization_config, that gets a copy of it, for those who look there.
	// skip lists the modules that it must not expect to be quantised; nil means the loader's own choice.
	Config(weights []Assigned, skip []string) (key string, object []byte, err error)
	// Declaration reads the quantization_config of a config.json. It reports false for another scheme's.
	Declaration(config []byte) (Declaration, bool)
}
