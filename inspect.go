package lorakit

import (
	"cmp"
	"context"
	"fmt"
	"reflect"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// Inspection describes a checkpoint by its headers.
type Inspection struct {
	Path         string `json:"path"`
	Format       string `json:"format"`
	ModelType    string `json:"model_type,omitempty"`
	Architecture string `json:"architecture,omitempty"`
	// Known says whether lorakit knows the architecture's tensors; else it chooses by names and shapes.
	Known      bool   `json:"architecture_known"`
	DType      string `json:"dtype,omitempty"` // of config.json
	Scheme     string `json:"scheme,omitempty"`
	Parameters int64  `json:"parameters"` // elements of floating-point weights, as they were before quantisation
	Bytes      int64  `json:"bytes"`      // of all tensors as they are stored
	// Files hold the tensors, an index included.
	Files []string `json:"files"`
	// Metadata are the values that are stored with the tensors, by their names, of a list the first few. Values are the
	// same in the order of the file, with their types.
	Metadata map[string]any    `json:"metadata"`
	Values   []InspectedValue  `json:"values"`
	Tensors  []InspectedTensor `json:"tensors"`
	// Adapter says that the file's tensors are those of an adapter, of which InspectAdapter says more.
	Adapter bool `json:"-"`
}

// InspectedValue is a named value that is stored with the tensors.
type InspectedValue struct {
	Name string `json:"name"`
	Type string `json:"type"` // as Go has it: "string", "uint32", "[]float32"
	// Value is a string, a bool or a number, and of a list the first few.
	Value  any `json:"value"`
	Length int `json:"length,omitzero"` // of a list
}

// shownValues is how many values of a list are shown: a vocabulary has hundreds of thousands.
const shownValues = 8

func inspectedValue(p formats.Pair) InspectedValue {
	v := InspectedValue{Name: p.Name, Type: fmt.Sprintf("%T", p.Value), Value: p.Value}
	if list := reflect.ValueOf(p.Value); list.Kind() == reflect.Slice {
		v.Length = list.Len()
		few := make([]any, min(v.Length, shownValues))
		for i := range few {
			few[i] = list.Index(i).Interface()
		}
		v.Value = few
	}
	return v
}

// String is the value in one line, of a list its length and the first few.
func (v InspectedValue) String() string {
	list, ok := v.Value.([]any)
	if !ok {
		return formats.Pair{Value: v.Value}.Text()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", v.Length)
	for i, x := range list {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte(' ')
		if s, ok := x.(string); ok {
			b.WriteString(tensor.Quote(s))
		} else {
			b.WriteString(formats.Pair{Value: x}.Text())
		}
	}
	if len(list) < v.Length {
		b.WriteString(", …")
	}
	return b.String()
}

// InspectedTensor is one logical weight.
type InspectedTensor struct {
	Name   string       `json:"name"`
	DType  tensor.DType `json:"dtype,omitzero"` // of the values, if they can be read
	Shape  tensor.Shape `json:"shape"`
	Bytes  int64        `json:"bytes"`            // as stored, companions included
	Scheme string       `json:"scheme,omitempty"` // such as "nf4, block 64, double"
	Kind   string       `json:"kind"`             // linear, conv1d, embedding, expert, router, other
	File   string       `json:"file"`
}

// Inspect opens a checkpoint and says what is in it. No tensor is read.
func Inspect(ctx context.Context, path string, o ReadOptions) (*Inspection, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	c, err := open(ctx, path, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	r := &Inspection{
		Path: path, Format: c.Format.Name(), Known: c.Known, Files: c.Files(), Metadata: map[string]any{},
		Values:  []InspectedValue{},
		Tensors: []InspectedTensor{},
	}
	var stored []formats.Tensor
	for _, w := range c.Weights {
		stored = append(stored, w.Parts...)
	}
	r.Adapter = !c.Folder && lora.AreAdapter(stored, c.Metadata())
	for _, p := range c.Metadata() {
		v := inspectedValue(p)
		r.Metadata[v.Name] = v.Value
		r.Values = append(r.Values, v)
	}
	if c.Config != nil {
		r.ModelType, r.Architecture, r.DType = c.Config.ModelType, c.Config.Architecture, c.Config.DType
	}
	for _, w := range c.Weights {
		t := InspectedTensor{
			Name: w.Name, DType: w.DType, Shape: w.Shape, Bytes: w.StoredBytes(), Kind: w.Role.Kind.String(),
			File: w.Parts[0].File,
		}
		if w.Decoder != nil {
			t.Scheme = w.Decoder.Spec().String()
		} else {
			t.Scheme = w.Encoding.Name
		}
		r.Scheme = cmp.Or(r.Scheme, t.Scheme)
		if !w.DType.Integer() && !w.Calibration {
			r.Parameters += w.Count()
		}
		r.Bytes += t.Bytes
		r.Tensors = append(r.Tensors, t)
	}
	return r, nil
}
