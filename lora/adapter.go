// Package lora reads, writes and computes with LoRA adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language
// Models", 2021), in the forms in which people have them.
//
// Open reads an adapter of any dialect into one form. Bind finds, for every tensor of a base's file, what an adapter
// does to it. Nothing of an adapter is ever passed over: a tensor that nothing takes is an error.
package lora

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is.
var (
	// ErrMalformed says that an adapter contradicts itself.
	ErrMalformed = errors.New("malformed adapter")
	// ErrUnsupported says that an adapter has a part that is not known here, and so could be lost.
	ErrUnsupported = errors.New("not supported")
	// ErrBase says that an adapter does not fit the base it is to be used with.
	ErrBase = errors.New("another base")
)

// Form says what a module of an adapter does to its parameter.
type Form uint8

// The forms.
const (
	Linear      Form = iota // adds scaling * B·A, also to one expert or a stack of them
	Embedding               // A (r x rows), B (width x r): adds scaling * (B·A) transposed
	Conv                    // Linear on the kernels as matrices
	Bias                    // Value (n): adds scaling * Value
	Replace                 // Value is the parameter's new value
	Rows                    // Value (n, width) are the new values of the rows Indices
	Scale                   // multiplies the outputs by Value, or where Inputs is set the inputs
	Transformed             // makes each row another one, by Transform
)

// String returns the form's name.
func (f Form) String() string {
	return [...]string{"linear", "embedding", "conv", "bias", "replace", "rows", "scale", "transform"}[f]
}

// Module is one part of an adapter: what it does to one parameter of the base.
type Module struct {
	// Name is the run-time name of the adapted module, as the adapter has it: "model.layers.0.self_attn.q_proj". Where
	// Flat is set it has underscores for the dots as well, as in kohya's files, and only a base, or what is known of
	// models, tells them apart.
	Name string
	Flat bool
	// Component is the part of a pipeline that the module is of, where its file tells: "unet",
	// "text_encoder_2", or in kohya's files "lora_te2". Name begins with it as it is read.
	Component string
	// Param is the parameter of that module: "weight", "bias". Empty for the expert parameters, where a PEFT file does
	// not tell which it is; WrapDepth is how many others of the same module lie outside of this one.
	Param     string
	WrapDepth int

	Form Form
	// A (rank x in) and B (out x rank) are those of the function, however they lie in the file; in counts the elements of
	// a kernel too. Those of a stack of experts are A (experts*rank x in) and B (out x experts*rank), taken apart by
	// expert.
	A, B      Matrix
	Kernel    tensor.Shape    // of Conv, which tells how in is made up
	Value     *formats.Tensor // of Bias, Replace, Rows and Scale, and the main one of Transform
	Magnitude *formats.Tensor // of DoRA, else nil
	Indices   []int64         // of Rows
	Rank      int
	Alpha     float64
	Scaling   float64 // alpha / rank, or alpha / sqrt(rank) with rsLoRA
	// Hadamard, where not nil, are matrices whose element-wise product B·A is, and far smaller than those.
	Hadamard []Tiled
	before   *formats.Tensor   // for Replace: what a module whose copy was trained had before, where the file says so
	made     []*formats.Tensor // the tensors of the file that A and B are computed of, where they are
	// Reshaped is whether a convolution's kernels may be taken for the rows of the delta as they lie.
	Reshaped bool
	Inputs   bool // of Scale
	// Waves, where not nil, are what B·A is instead.
	Waves *Waves
	// Transform is that of Transformed.
	Transform Transform
	inverted  bool // Transform undoes what the adapter does
	// fit, where not nil, makes A and B, Hadamard or Waves for a number of outputs and inputs that only the base tells.
	fit func(m *Module, outputs, inputs int64) error
	// selectedAs, where not empty, is the module that target_modules has to mean for this value.
	selectedAs string
	// Base is whether the new value of a Replace stands for the base's own (an embedding that PEFT stores beside its
	// adapter), so that deltas are added to it.
	Base   bool
	at     *spot // where it is in the base, if its name does not tell
	beside bool  // whether a Replace was found in another file than the adapter's own
	// Parameter says that PEFT adapts the parameter and no module: that of a router, which is of no class
	// that it knows.
	Parameter bool
	// turned, of a single expert, says that PEFT takes the stack it is a part of for matrices the other way round.
	turned bool
	// Experts is how many experts a stack has; 0 for what is none, and where only the base tells.
	Experts int64
	Order   ExpertOrder
}

// ExpertOrder says how the columns of a stack's B lie.
type ExpertOrder uint8

// The orders.
const (
	RankMajor ExpertOrder = iota // the expert is the fastest: columns e, e+E, e+2E… are those of expert e
	Grouped                      // the expert is the slowest
	Apart                        // each expert has a matrix of its own
)

// channels is how many inputs a module has: of a convolution for one element of its kernel.
func (m *Module) channels() int64 {
	in := m.A.Cols
	for _, d := range m.Kernel {
		in /= max(d, 1)
	}
	return in
}

// factorShapes are the shapes in which PEFT and kohya store A and B: those of a convolution are kernels.
func (m *Module) factorShapes() (a, b tensor.Shape) {
	a, b = append(tensor.Shape{m.A.Rows, m.channels()}, m.Kernel...), tensor.Shape{m.B.Rows, m.B.Cols}
	for range m.Kernel {
		b = append(b, 1)
	}
	return a, b
}

// expert views A and B of one expert of n.
func (m *Module) expert(e, n int64) (a, b Matrix) {
	r := m.A.Rows / n
	a, b = m.A.rows(e*r, (e+1)*r), m.B
	b.Cols = r
	switch m.Order {
	case RankMajor:
		b.Offset += e * b.ColStride
		b.ColStride *= n
	case Grouped:
		b.Offset += e * r * b.ColStride
	case Apart:
		b.Offset += e * r * b.Rows
	}
	return a, b
}

// String names the module with its parameter.
func (m *Module) String() string {
	if m.Param == "" || m.Param == "weight" {
		return m.Name
	}
	return m.Name + "." + m.Param
}

// Adapter is an adapter in the one form that all dialects are read into. Its tensors are read when they are needed;
// Close closes their files.
type Adapter struct {
	Path    string
	Dialect string // one of Dialects
	Config  Config
	Modules []*Module      // in the order of their names
	Dir     storage.Folder // of Files
	Files   []string       // what it was read from
	Notices []string       // what was assumed
	Options OpenOptions

	containers []formats.Container
	tensors    []formats.Tensor                    // of the first of containers
	repeated   map[*formats.Tensor]*formats.Tensor // see Repeated
	beside     []besideFile                        // further files of weights that lie in its folder
	component  string                              // that its modules are of, where they do not name it
	settings   *Settings                           // of one that was made by New
	base       *models.Model                       // see model
	looked     bool                                // base has been looked for
	foreign    bool                                // its modules have the names of GGUF, see readGGUF
}

// Close closes the adapter's files.
func (a *Adapter) Close() error {
	var errs []error
	for _, c := range a.containers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Paths are the files on this machine that a is read from, wherever links have led.
func (a *Adapter) Paths() []string {
	var list []string
	for _, name := range a.Files {
		if path := storage.LocalPath(a.Dir, name); path != "" {
			list = append(list, path)
		}
	}
	return list
}

// Multiplies reports whether what an adapter does to a weight depends on what the weight is, so that the order of
// several adapters counts.
func (a *Adapter) Multiplies() bool {
	return slices.ContainsFunc(a.Modules, func(m *Module) bool {
		return m.Form == Transformed || m.Form == Scale || m.Magnitude != nil
	})
}

// Stored lists the tensors of the adapter's own file, in its order. Those of Modules that are not computed, and do not
// come from a file beside it, are these very ones.
func (a *Adapter) Stored() []formats.Tensor { return a.tensors }

// Repeated returns the tensor of a Module whose values a tensor of a PEFT file says once more, under a second name, and
// nil for one that repeats none.
func (a *Adapter) Repeated(t *formats.Tensor) *formats.Tensor { return a.repeated[t] }

// Names lists the modules that have factors, each once, in order.
func (a *Adapter) Names() []string { return adapted(a.Modules) }

// Stacked reports whether an adapter is for stacks of experts as PEFT has them.
func (a *Adapter) Stacked() bool { return a.Dialect == PEFT && !empty(a.Config.Parameters) }

// Subtractable makes a ready to be taken out of a merged checkpoint: copies of the base's own matrices, which it only
// brings along, are not part of it. A part that leaves no trace of the base is an error.
func (a *Adapter) Subtractable() error {
	for _, m := range a.Modules {
		switch {
		case m.Magnitude != nil:
			return fmt.Errorf("%s: module %s: %w: DoRA cannot be subtracted, since the norms of the base are not in a merged "+
				"checkpoint", a.Path, tensor.Quote(m.String()), ErrUnsupported)
		case m.Form == Transformed:
			inverse, err := m.Transform.Inverse()
			if err != nil {
				return fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(m.String()), err)
			}
			m.Transform, m.inverted = inverse, !m.inverted
		case m.Form == Scale:
			return fmt.Errorf("%s: module %s: %w: IA3 scales weights, which cannot be subtracted", a.Path,
				tensor.Quote(m.String()), ErrUnsupported)
		case m.Form == Replace && !m.Base, m.Form == Rows:
			return fmt.Errorf("%s: module %s: %w: it has replaced weights of the base, which are not in a merged checkpoint",
				a.Path, tensor.Quote(m.String()), ErrUnsupported)
		}
	}
	a.Modules = slices.DeleteFunc(a.Modules, func(m *Module) bool { return m.Base })
	a.Config.Init = nil // what is left is the base that PiSSA and its like start from
	return nil
}

func (a *Adapter) failed(t *formats.Tensor, err error) error {
	return fmt.Errorf("%s: tensor %s: %w", t.File, tensor.Quote(t.Name), err)
}

// named says which adapter an error is of, unless it does so itself.
func (a *Adapter) named(err error) error {
	for _, path := range []string{a.Path, filepath.Clean(a.Path)} { // as names of its files begin
		rest, ok := strings.CutPrefix(err.Error(), path)
		if ok && rest != "" && (rest[0] == ':' || os.IsPathSeparator(rest[0])) {
			return err
		}
	}
	return fmt.Errorf("%s: %w", a.Path, err)
}
