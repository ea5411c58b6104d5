// Package quant defines what a quantisation scheme is: the rule by which several
// stored tensors (W, W.absmax, W.quant_map, …) are one weight, and the two
// ways between them and plain numbers. One sub-package implements one scheme
// and registers itself; import it for its effect:
//
//	import _ "github.com/lorakit/lorakit/quant/bnb"
//
// A scheme works on byte ranges that others read and write for it. It knows no
// files, and never holds a whole weight.
package quant

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is.
var (
	// ErrUnknown says that no registered scheme has the type asked for.
	ErrUnknown = errors.New("unknown quantisation")
	// ErrMalformed says that the stored tensors of a weight contradict each
	// other or the scheme.
	ErrMalformed = errors.New("malformed quantised weight")
	// ErrUnsupported says that the scheme cannot hold such a tensor.
	ErrUnsupported = errors.New("cannot be quantised")
)

// NonFiniteError says that a weight to be quantised holds a NaN or an infinity,
// or a value that becomes one on the way.
type NonFiniteError struct {
	Index int64  // of the first such element, row-major
	What  string // such as "NaN or infinity"
}

func (e *NonFiniteError) Error() string { return fmt.Sprintf("%s at element %d", e.What, e.Index) }

// Spec says how a weight is quantised. It is a value: equal specs make equal
// bytes.
type Spec struct {
	Type           string `json:"type"`                       // nf4, fp4, int8, …
	BlockSize      int    `json:"block_size,omitempty"`       // elements that share one scale
	DoubleQuant    bool   `json:"double_quant,omitempty"`     // the scales are quantised as well
	AllowNonFinite bool   `json:"allow_non_finite,omitempty"` // encode NaN and infinity as the scheme does instead of refusing them
}

// String writes the spec as a person would, such as "nf4, block 64, double".
func (s Spec) String() string {
	t := s.Type
	if s.BlockSize > 0 {
		t += fmt.Sprintf(", block %d", s.BlockSize)
	}
	if s.DoubleQuant {
		t += ", double"
	}
	return t
}

// Stored gives a scheme access to the stored tensors of a checkpoint.
type Stored interface {
	// Lookup finds a tensor by its name.
	Lookup(name string) (tensor.Info, bool)
	// Read fills p from the bytes of the named tensor, beginning at off.
	Read(name string, p []byte, off int64) error
}

// Range is a piece of a stored tensor: bytes [Offset, Offset+Length) of the
// tensor number Part in the weight's list.
type Range struct {
	Part           int
	Offset, Length int64
}

// Decoder reads one quantised weight. It is safe for concurrent use.
type Decoder interface {
	// Info is the logical weight: its name, its shape, and the dtype that it
	// had before it was quantised.
	Info() tensor.Info
	// Spec is how the weight is quantised.
	Spec() Spec
	// Parts names the stored tensors that make up the weight, the one with the
	// bulk of the data first.
	Parts() []string
	// Unit is the number of elements at whose multiples a tile may begin.
	Unit() int64
	// Inputs appends to r the ranges that the elements [lo, hi) are decoded
	// from. lo is a multiple of Unit, hi as well or the end.
	Inputs(r []Range, lo, hi int64) []Range
	// Values is the type that Decode writes: that of Info where rounding to it is
	// part of the scheme, else the one that the scheme computes in.
	Values() tensor.DType
	// Decode writes the elements [lo, hi) to dst. in has the bytes of Inputs, in
	// the same order.
	Decode(dst []byte, lo, hi int64, in [][]byte) error
}

// Carry holds the float32 numbers that an Encoder keeps from its tiles for Finish.
type Carry interface {
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
	// Carry is how many float32 numbers Finish needs of the elements [lo, hi);
	// they stand at index lo/Unit and on. Zero where it needs none.
	Carry(lo, hi int64) int64
	// Tiles appends to r the ranges of the outputs that the elements [lo, hi)
	// fill. What no tile fills is written by Finish.
	Tiles(r []Range, lo, hi int64) []Range
	// Encode quantises the elements [lo, hi), which src has as the dtype that the Encoder
	// was made for, into out, the bytes of Tiles in the same order, and
	// carry. A value that is not finite is a *NonFiniteError.
	Encode(out [][]byte, carry []float32, lo, hi int64, src []byte) error
	// Finish writes the rest, when all tiles are done.
	Finish(c Carry, write func(part int, off int64, p []byte) error) error
}

// Scheme is one way to store quantised weights.
type Scheme interface {
	// Name is the quant_method of a config.json, such as "bitsandbytes".
	Name() string
	// Types lists what --quantize takes from this scheme.
	Types() []string
	// Find returns a Decoder for each weight among the stored tensors that is in
	// this scheme, in the order of names. A weight that is in the scheme but
	// contradicts itself is an error. dtype is that of the checkpoint, for
	// weights whose stored form does not say what they were; 0 is unknown.
	Find(names []string, s Stored, dtype tensor.DType) ([]Decoder, error)
	// Encoder prepares to quantise the weight t. A weight that the scheme
	// cannot hold is an error that wraps ErrUnsupported.
	Encoder(s Spec, t tensor.Info) (Encoder, error)
	// Config returns the quantization_config, a JSON object, of a checkpoint whose weights
	// are quantised by s. skip lists the modules that a loader must not
	// expect to be quantised; nil means the loader's own choice.
	Config(s Spec, skip []string) []byte
}

var registry []Scheme

// Register makes a scheme known. It is called from the init function of the
// scheme's package.
func Register(s Scheme) { registry = append(registry, s) }

// All returns the registered schemes, sorted by name.
func All() []Scheme {
	all := slices.Clone(registry)
	slices.SortFunc(all, func(a, b Scheme) int { return strings.Compare(a.Name(), b.Name()) })
	return all
}

// ForType finds the scheme that has the type, such as "nf4".
func ForType(typ string) (Scheme, error) {
	var known []string
	for _, s := range All() {
		if slices.Contains(s.Types(), typ) {
			return s, nil
		}
		known = append(known, s.Types()...)
	}
	return nil, fmt.Errorf("%w %q; known are %s", ErrUnknown, typ, strings.Join(known, ", "))
}

// Named finds a scheme by its name.
func Named(name string) (Scheme, bool) {
	for _, s := range registry {
		if s.Name() == name {
			return s, true
		}
	}
	return nil, false
}
