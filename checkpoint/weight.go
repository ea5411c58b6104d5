package checkpoint

import (
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Weight is one logical tensor of a checkpoint, however it is stored.
type Weight struct {
	// Info has the model's own orientation, and the dtype of the values: for a quantised weight what it was before.
	tensor.Info
	// Role is what the architecture says of it.
	Role models.Tensor
	// Parts are the stored tensors it consists of, that with the bulk of the data first.
	Parts []formats.Tensor
	// Decoder reads a quantised weight; nil for a plain one.
	Decoder quant.Decoder
	// Values is the type in which the weight is read: DType, but where a scheme computes in another and does not round.
	Values tensor.DType
	// Calibration says that it is no part of the model, but a number by which a program is to quantise activations or a
	// cache, and belongs to the scheme that other weights are in.
	Calibration bool
	// Transposed says that the weight is stored the other way round, as bitsandbytes does with Conv1D.
	Transposed bool
}

// Failed says of an error which weight it is about, and in which file.
func (w *Weight) Failed(err error) error {
	return fmt.Errorf("%s: tensor %s: %w", w.Parts[0].File, tensor.Quote(w.Name), err)
}

// StoredBytes is the size of the weight in its file, companions included; of one that is put together that of what it
// is made of.
func (w *Weight) StoredBytes() int64 {
	if c, ok := w.Parts[0].Data.(*composed); ok {
		return c.stored
	}
	var n int64
	for _, p := range w.Parts {
		n += p.Bytes
	}
	return n
}

// Stored is the shape in which the values lie in the file.
func (w *Weight) Stored() tensor.Shape {
	if w.Transposed {
		return w.Shape.Transposed()
	}
	return w.Shape
}

// Exact returns the weight with the float32 values that its scheme computes, not rounded to the type that it had.
func (w *Weight) Exact() *Weight {
	e, ok := w.Decoder.(quant.Exact)
	if !ok {
		return w
	}
	exact := *w
	exact.Decoder = e.Exact()
	exact.Values = exact.Decoder.Values()
	return &exact
}

// Modules names the run-time modules that the weight belongs to: one, but where the file joins what are several in the
// model.
func (w *Weight) Modules() []string {
	var names []string
	for _, s := range w.Role.Runtime {
		names = append(names, strings.TrimSuffix(s.Param, ".weight"))
	}
	return names
}

// decodedBy makes w the weight that d reads from stored tensors.
func (w *Weight) decodedBy(d quant.Decoder, s *stored) {
	w.Decoder, w.Info, w.Values = d, d.Info(), d.Values()
	w.Parts = make([]formats.Tensor, 0, len(d.Parts()))
	for _, name := range d.Parts() {
		w.Parts = append(w.Parts, s.tensors[s.byName[name]])
	}
}

// stored are the tensors of a container, by name: what a scheme looks into.
type stored struct {
	tensors []formats.Tensor
	infos   []tensor.Info
	byName  map[string]int
	dtype   tensor.DType
	config  []byte
}

func newStored(tensors []formats.Tensor, dtype tensor.DType, config []byte) *stored {
	s := &stored{tensors, make([]tensor.Info, len(tensors)), make(map[string]int, len(tensors)), dtype, config}
	for i := range tensors {
		s.infos[i] = tensors[i].Info
		s.byName[tensors[i].Name] = i
	}
	return s
}

// Tensors lists all of them.
func (s *stored) Tensors() []tensor.Info { return s.infos }

// DType is that of the checkpoint.
func (s *stored) DType() tensor.DType { return s.dtype }

// Config is the checkpoint's config.json.
func (s *stored) Config() []byte { return s.config }

// Lookup finds a stored tensor by its name.
func (s *stored) Lookup(name string) (tensor.Info, bool) {
	i, ok := s.byName[name]
	if !ok {
		return tensor.Info{}, false
	}
	return s.tensors[i].Info, true
}

// Read fills p from the bytes of the named tensor.
func (s *stored) Read(name string, p []byte, off int64) error {
	i, ok := s.byName[name]
	if !ok {
		return fmt.Errorf("no tensor %q", name)
	}
	return ReadPart(&s.tensors[i], p, off)
}
