// Package lora reads, writes and computes with LoRA adapters (Hu et al., "LoRA:
// Low-Rank Adaptation of Large Language Models", 2021), in the forms in which people
// have them.
//
// Open reads an adapter of any dialect into one form. Bind finds, for every tensor of a
// base's file, what an adapter does to it. Nothing of an adapter is ever passed over: a
// tensor that nothing takes is an error.
package lora

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is.
var (
	// ErrMalformed says that an adapter contradicts itself.
	ErrMalformed = errors.New("malformed adapter")
	// ErrUnsupported says that an adapter has a part that is not known here, and so
	// could be lost.
	ErrUnsupported = errors.New("not supported")
	// ErrBase says that an adapter does not fit the base it is to be used with.
	ErrBase = errors.New("another base")
)

// Form says what a module of an adapter does to its parameter.
type Form uint8

// The forms.
const (
	Linear    Form = iota // A (r, in), B (out, r): adds scaling * B·A, also to one expert or a stack of them
	Embedding             // A (r, rows), B (width, r): adds scaling * (B·A) transposed
	Conv                  // A (r, in, kernel…), B (out, r, 1…): Linear on the kernels as matrices
	Bias                  // B (n): adds scaling * B
	Replace               // B is the parameter's new value
	Rows                  // B (n, width) are the new values of the rows Indices
)

// String returns the form's name.
func (f Form) String() string {
	return [...]string{"linear", "embedding", "conv", "bias", "replace", "rows"}[f]
}

// Module is one part of an adapter: what it does to one parameter of the base.
type Module struct {
	// Name is the run-time name of the adapted module, as the adapter has it:
	// "model.layers.0.self_attn.q_proj".
	Name string
	// Param is the parameter of that module: "weight", "bias". Empty for the expert
	// parameters, whose names a PEFT file does not tell; Nest is how many others of the
	// same module lie outside of this one.
	Param string
	Nest  int

	Form      Form
	A, B      *formats.Tensor // A is nil for Bias, Replace and Rows
	Magnitude *formats.Tensor // of DoRA, else nil
	Indices   []int64         // of Rows
	Rank      int
	Alpha     float64
	Scaling   float64 // alpha / rank, or alpha / sqrt(rank) with rsLoRA
	// Base is whether the new value of a Replace stands for the base's own (an
	// embedding that PEFT stores beside its adapter), so that deltas are added to it.
	Base bool
}

// String names the module with its parameter.
func (m *Module) String() string {
	if m.Param == "" || m.Param == "weight" {
		return m.Name
	}
	return m.Name + "." + m.Param
}

// Adapter is an adapter in the one form that all dialects are read into. Its tensors
// are read when they are needed; Close closes their files.
type Adapter struct {
	Path    string
	Dialect string
	Config  Config
	Modules []*Module // in the order of their names
	Files   []string  // relative to the adapter's folder, what it was read from

	container formats.Container
}

// Close closes the adapter's files.
func (a *Adapter) Close() error {
	if a.container == nil {
		return nil
	}
	return a.container.Close()
}

// Subtractable makes a ready to be taken out of a merged checkpoint: copies of the base's own
// matrices, which it only brings along, are not part of it. A part that leaves no trace of
// the base is an error.
func (a *Adapter) Subtractable() error {
	for _, m := range a.Modules {
		switch {
		case m.Magnitude != nil:
			return fmt.Errorf("%s: module %s: %w: DoRA cannot be subtracted, since the norms of the base are not in a merged checkpoint", a.Path, tensor.Quote(m.String()), ErrUnsupported)
		case m.Form == Replace && !m.Base, m.Form == Rows:
			return fmt.Errorf("%s: module %s: %w: it has replaced weights of the base, which are not in a merged checkpoint", a.Path, tensor.Quote(m.String()), ErrUnsupported)
		}
	}
	a.Modules = slices.DeleteFunc(a.Modules, func(m *Module) bool { return m.Base })
	return nil
}

func (a *Adapter) failed(t *formats.Tensor, err error) error {
	return fmt.Errorf("%s: %s: tensor %s: %w", a.Path, t.File, tensor.Quote(t.Name), err)
}

// Floats reads a tensor of an adapter whole, as float32. A NaN or an infinity in
// it is an error.
func Floats(t *formats.Tensor) ([]float32, error) {
	if !t.DType.Float() && t.DType != tensor.F64 {
		return nil, fmt.Errorf("%s: tensor %s: %w: its type is %s, expected F32, F16, BF16 or F64", t.File, tensor.Quote(t.Name), ErrMalformed, t.DType)
	}
	const piece = 64 << 10
	width := t.DType.Bits() / 8
	raw, b := make([]byte, piece*width), make([]byte, 4*piece)
	out := make([]float32, t.Count())
	for lo := int64(0); lo < int64(len(out)); lo += piece {
		part := out[lo:min(lo+piece, int64(len(out)))]
		n := int64(len(part))
		if _, err := t.ReadAt(raw[:n*width], lo*width); err != nil {
			return nil, fmt.Errorf("%s: tensor %s: %w", t.File, tensor.Quote(t.Name), err)
		}
		if err := tensor.Convert(b[:4*n], tensor.F32, raw[:n*width], t.DType); err != nil {
			return nil, err
		}
		for i := range part {
			part[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
			if part[i]-part[i] != 0 {
				return nil, fmt.Errorf("%s: tensor %s: %w: element %d is %v, expected finite numbers", t.File, tensor.Quote(t.Name), ErrMalformed, lo+int64(i), part[i])
			}
		}
	}
	return out, nil
}
