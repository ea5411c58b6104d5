package lora

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// A file of kohya's sd-scripts (networks/lora.py) holds, for each module, lora_down (rank, in, kernel…), lora_up
// (out, rank, 1…) and the scalar alpha. The name of a module is lora_, what part of a pipeline it is of, and its
// path with underscores for dots.

// otherMethods are the ends of names that LyCORIS gives to what is no plain LoRA.
var otherMethods = []string{".lora_mid.weight", ".reshape_weight", ".set_weight",
	".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2",
	".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".oft_blocks", ".oft_diag",
	".a1.weight", ".w_norm", ".b_norm", ".diff", ".diff_b"}

// ofLyCORIS reports whether a tensor belongs to one of otherMethods, in a file that may have none of LoRA.
func ofLyCORIS(name string) bool {
	part, _ := component(name)
	return slices.ContainsFunc(otherMethods, func(end string) bool {
		return strings.HasSuffix(name, end) &&
			(part != "" || strings.HasPrefix(end, ".hada_") || strings.HasPrefix(end, ".lokr_"))
	})
}

// onlyNumber reads the number of a tensor that has one. sd-scripts makes the tensor of what it was given:
// an integer of --network_alpha=4.
func onlyNumber(t *formats.Tensor) (float64, error) {
	if t.DType != tensor.I64 && t.DType != tensor.I32 {
		v, err := Floats(t)
		if err != nil {
			return 0, err
		}
		return float64(v[0]), nil
	}
	b := make([]byte, t.Bytes)
	if _, err := t.ReadAt(b, 0); err != nil {
		return 0, err
	}
	if t.DType == tensor.I32 {
		return float64(int32(binary.LittleEndian.Uint32(b))), nil
	}
	return float64(int64(binary.LittleEndian.Uint64(b))), nil
}

// pair makes a module of lora_A or lora_down (rank, in, kernel…) and lora_B or lora_up (out, rank, 1…).
func (a *Adapter) pair(name string, ta, tb *formats.Tensor) (*Module, error) {
	m := &Module{Name: name, Param: "weight"}
	switch {
	case ta == nil || tb == nil:
		return nil, fmt.Errorf("%s: module %s: %w: only one of its two factors is there", a.Path, tensor.Quote(name),
			ErrMalformed)
	case len(ta.Shape) < 2 || len(tb.Shape) < 2 || ta.Shape[0] == 0 || ta.Shape[0] != tb.Shape[1] || tb.Shape[0] == 0 ||
		ta.Count() == 0:
		return nil,
			fmt.Errorf("%s: module %s: %w: its factors have the shapes %v and %v, expected (rank, in) and (out, rank)", a.Path,
				tensor.Quote(name), ErrMalformed, ta.Shape, tb.Shape)
	case !points(tb.Shape[2:]):
		return nil, fmt.Errorf("%s: module %s: %w: its second factor has the shape %v, expected kernels of one element",
			a.Path, tensor.Quote(name), ErrUnsupported, tb.Shape)
	}
	m.A, m.B, m.Rank = matrixOf(ta), matrixOf(tb), int(ta.Shape[0])
	if len(ta.Shape) > 2 {
		m.Form, m.Kernel = Conv, ta.Shape[2:]
	}
	return m, nil
}

// component takes the name of a kohya module apart: "lora_te1" is the first text encoder, "lora_unet" the image model.
// SimpleTuner's image models are "lycoris".
func component(name string) (prefix, module string) {
	if rest, ok := strings.CutPrefix(name, "lycoris_"); ok {
		return "lycoris", rest
	}
	rest, ok := strings.CutPrefix(name, "lora_")
	if !ok {
		return "", name
	}
	part, module, ok := strings.Cut(rest, "_")
	if !ok {
		return "", name
	}
	return "lora_" + part, module
}

// encodeKohya writes one file for sd-scripts and what reads its files.
func (a *Adapter) encodeKohya(experts string) (*Encoded, error) {
	e := &Encoded{Format: "safetensors"}
	modules, err := a.singles(Kohya, experts)
	if err != nil {
		return nil, err
	}
	if modules, err = e.withoutCopies(modules, a.Dialect != PEFT || a.Config.BiasMode != "" &&
		a.Config.BiasMode != "none"); err != nil {
		return nil, err
	}
	modules = a.ofKohya(modules, e)
	if common := commonScales(modules); common.rank > 0 {
		e.Metadata = formats.Texts(map[string]string{
			"ss_network_module": "networks.lora", "ss_network_dim": fmt.Sprint(common.rank),
			"ss_network_alpha": fmt.Sprint(common.alpha),
		})
	}
	seen, prefix := map[string]string{}, kohyaPrefixes(modules, a.component)
	for _, m := range modules {
		if m.Form != Linear && m.Form != Conv || m.Magnitude != nil && a.Dialect != Kohya {
			return nil, noPlace(m, m.what(), Kohya)
		}
		key := m.Name
		if !m.Flat {
			p := prefix(m)
			if p == "" {
				return nil, noPlace(m, "the component "+tensor.Quote(m.Component), Kohya)
			}
			key = p + "_" + flatten(m.within())
		}
		if other, ok := seen[key]; ok {
			return nil, fmt.Errorf("module %s: %w: with underscores for dots it has the name of %s", tensor.Quote(m.Name),
				ErrUnsupported, tensor.Quote(other))
		}
		seen[key] = m.Name
		down, up := m.factorShapes()
		alpha := float32(m.Scaling * float64(m.Rank))
		if alpha-alpha != 0 {
			return nil, fmt.Errorf("module %s: %w: its alpha is %g, which float32 cannot hold", tensor.Quote(m.Name),
				ErrUnsupported, m.Scaling*float64(m.Rank))
		}
		e.Tensors = append(e.Tensors,
			output(key+".lora_down.weight", m.A, down...), output(key+".lora_up.weight", m.B, up...),
			asItIs(key+".alpha", number(m.A.T, alpha)))
		if m.Magnitude != nil { // as LyCORIS has them
			o := asItIs(key+".dora_scale", m.Magnitude)
			o.Shape = tensor.Shape{m.B.Rows, 1}
			for range m.Kernel {
				o.Shape = append(o.Shape, 1)
			}
			e.Tensors = append(e.Tensors, o)
		}
	}
	return e, nil
}

// ofKohya gives the modules of a transformer that diffusers names in its own way the names of the model's authors, as
// all have them who read kohya's files. U-Nets are known to them by either; what is in no family keeps its names, and e
// says so.
func (a *Adapter) ofKohya(modules []*Module, e *Encoded) []*Module {
	named, err := dotted(modules)
	if err != nil { // names without dots that are not known stay as they are
		return modules
	}
	var image, others, all []*Module
	for i, m := range named {
		if modules[i].Flat {
			m = modules[i]
		}
		all = append(all, m)
		component := m.Component
		if component == "" && !m.Flat {
			if component, _ = models.DiffusersComponent(m.Name); component == "" {
				component = a.component
			}
		}
		if component == "transformer" && !m.Flat {
			image = append(image, m)
		} else {
			others = append(others, m)
		}
	}
	if authored, ok := toAuthors(image); ok {
		return append(others, authored...)
	}
	if image != nil && image[0].Component != "" {
		e.Notices = append(e.Notices, fmt.Sprintf("the modules of the transformer, such as %s, keep diffusers' names: of "+
			"which "+
			"model they are, and so what its authors call them, they do not tell", image[0].within()))
	}
	return all
}

// kohyaPrefixes finds what kohya's files have before the names of modules: of each component, or of the given one
// where modules name none, or of what most of them are. It is "" for a component that has no place there.
func kohyaPrefixes(modules []*Module, otherwise string) func(*Module) string {
	texts := map[string]bool{}
	for _, m := range modules {
		texts[m.Component] = true
	}
	first, second := "lora_te", "lora_te2"
	if texts["text_encoder_2"] || texts["text_encoder_3"] || texts[t5Encoder] {
		first = "lora_te1"
	}
	part := kohyaPart(modules)
	return func(m *Module) string {
		component := m.Component
		if component == "" {
			component = otherwise
		}
		switch component {
		case "":
			return part
		case "unet", "transformer", imageModel, "model." + imageModel:
			return "lora_unet"
		case "text_encoder":
			return first
		case "text_encoder_2":
			if strings.HasPrefix(m.within(), "encoder.block.") { // T5, which sd-scripts counts as the third of any model
				return "lora_te3"
			}
			return second
		case "text_encoder_3", t5Encoder:
			return "lora_te3"
		}
		return ""
	}
}

// withoutCopies leaves out the copies of the base's own matrices that PEFT stores beside the factors of a head: they
// are no part of the delta. One that has other rows than the factors is not of their base. A bias goes with its
// matrix where none was trained.
func (e *Encoded) withoutCopies(modules []*Module, biases bool) ([]*Module, error) {
	factors, copied := map[string]*Module{}, map[string]bool{}
	for _, m := range modules {
		if m.A.T != nil && m.Form == Linear {
			factors[m.Name] = m
		}
		copied[m.Name] = copied[m.Name] || m.Base
	}
	var rest []*Module
	for _, m := range modules {
		of := factors[m.Name]
		bias := m.Param == "bias" && copied[m.Name] && !biases
		if of == nil || m.Form != Replace || !m.Base && !bias {
			rest = append(rest, m)
			continue
		}
		if bias {
			e.Notices = append(e.Notices, fmt.Sprintf("%s: the copy of its base's bias is left out, which is no part of the "+
				"delta", m.Name))
			continue
		}
		if want := (tensor.Shape{of.B.Rows, of.A.Cols}); !slices.Equal(m.Value.Shape, want) {
			return nil, fmt.Errorf("module %s: %w: the copy of its base's matrix has the shape %v, and its factors are for %v",
				tensor.Quote(m.Name), ErrMalformed, m.Value.Shape, want)
		}
		e.Notices = append(e.Notices, fmt.Sprintf("%s: the copy of its base's matrix of shape %v is left out, which is no "+
			"part of the delta: the base has to have the same", m.Name, m.Value.Shape))
	}
	return rest, nil
}

// number is a tensor of one number, in float32.
func number(like *formats.Tensor, v float32) *formats.Tensor {
	b := binary.LittleEndian.AppendUint32(nil, math.Float32bits(v))
	t := &formats.Tensor{Info: tensor.Info{Name: like.Name, DType: tensor.F32, Shape: tensor.Shape{}}, File: like.File,
		Data: strings.NewReader(string(b)), Bytes: 4}
	return t
}

// kohyaPart says which part of a pipeline modules are of: a U-Net or an image transformer if most have its
// blocks, else a text encoder.
func kohyaPart(modules []*Module) string {
	image := 0
	for _, m := range modules {
		if first, _, _ := strings.Cut(m.Name, "."); slices.Contains(imageParts, first) {
			image++
		}
	}
	if 2*image > len(modules) {
		return "lora_unet"
	}
	return "lora_te"
}
