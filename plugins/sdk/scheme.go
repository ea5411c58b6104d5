package sdk

import (
	"context"

	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Scheme stores one weight as several tensors, in fewer bits. It is safe for concurrent use.
type Scheme interface {
	Info() SchemeInfo
	// Find returns a Decoder for each weight among the stored tensors that is in the scheme, in their order. A weight
	// that is in the scheme but contradicts itself is an error, quant.ErrMalformed.
	Find(ctx context.Context, s quant.Stored) ([]Decoder, error)
}

// EncodingScheme is a Scheme that can be written.
type EncodingScheme interface {
	Scheme
	// Encoder prepares to store the weight t, whose dtype is that of the values it will get: F32, F16 or BF16. One that
	// the scheme cannot hold is an error, quant.ErrUnsupported.
	Encoder(ctx context.Context, s quant.Spec, t tensor.Info) (*Encoder, error)
	// Config returns the quantization_config of a config.json, a JSON object. skip lists the modules that a loader must
	// not expect to be quantised; nil means the loader's own choice.
	Config(ctx context.Context, s quant.Spec, skip []string) ([]byte, error)
}

// SchemeInfo describes a scheme.
type SchemeInfo struct {
	Name  string   // the quant_method of a config.json
	Types []string // what --quantize takes
	// Parameters are those of BlockSize and DoubleQuant that the types have. A Spec has no others.
	Parameters []string
	// Suffixes are endings of the names of tensors by which its weights are known. A checkpoint that has none of them, and
	// whose config.json does not name the scheme, is not asked about, so that the program need not be started. Without any
	// every checkpoint is.
	Suffixes []string
	// Notices say what a user should know of weights that are written, in a sentence each, such as how they are rounded.
	Notices []string
}

// The parameters of a Spec.
const (
	BlockSize   = wire.BlockSize   // an int64
	DoubleQuant = wire.DoubleQuant // a bool
)

// Rule says which bytes of a stored tensor belong to a tile. A tile begins at a multiple of Unit elements; its bytes
// are those at First + (u mod Wrap)·Stride, Stride bytes each, for each unit u of it in order, and stand one after the
// other. The last unit ends where the tensor does. A Stride of 0 has all bytes from First on for each tile of a Part,
// and none for an Output. A Wrap of 0 takes u as it is.
type Rule = wire.Rule

// Part is a stored tensor of a weight, and what of it a tile is decoded from.
type Part struct {
	Name string
	Rule
}

// Decoder reads one quantised weight.
type Decoder struct {
	tensor.Info            // the weight, with the dtype that it had before it was quantised
	Spec        quant.Spec // how it is quantised
	Parts       []Part     // the one with the bulk of the data first
	Unit        int64      // elements at whose multiples a tile may begin
	// Values is the type that Decode writes; 0 stands for that of Info. It is another where the scheme computes in
	// another and does not round.
	Values tensor.DType
	// Decode writes the elements [lo, hi) to dst. parts has for each part what its rule says. It is safe for concurrent
	// use.
	Decode func(dst []byte, lo, hi int64, parts [][]byte) error
}

// Output is a tensor that a weight becomes, and what of it a tile fills.
type Output struct {
	tensor.Info
	Rule
}

// Encoder writes one quantised weight.
type Encoder struct {
	Outputs []Output // the one with the bulk of the data first
	Unit    int64    // elements at whose multiples a tile may begin
	// Carry is how many numbers are kept from each unit for Finish.
	Carry int64
	// Encode quantises the elements [lo, hi), which values has in the dtype that the Encoder was made for, into out, which
	// has for each output what its rule says, and carry. A value that is not finite is a *quant.NonFiniteError. It is safe
	// for concurrent use.
	Encode func(out [][]byte, carry []float32, lo, hi int64, values []byte) error
	// Finish, where it is not nil, writes what no tile has, when all are done. The numbers of unit u begin at u·Carry.
	Finish func(carry quant.Deferred, write func(output int, off int64, p []byte) error) error
}
