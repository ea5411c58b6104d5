package models

import "strings"

// Tensors of a program that joins what transformers has apart, by the names of their modules: mlx-lm has the experts of
// a block in "….switch_mlp", one stack (experts, out, in) a projection.
const (
	stacker   = "mlx-lm"
	stackedIn = ".switch_mlp."
)

// projections are those of a stack, with what single experts have them under in the files of transformers' models, and
// where a stack of transformers' has them: a half of gate_up_proj, or a parameter.
var projections = map[string]struct {
	single      []string
	param       string
	half, parts int
}{
	"gate_proj": {[]string{"gate_proj", "w1"}, "gate_up_proj", 0, 2},
	"up_proj":   {[]string{"up_proj", "w3"}, "gate_up_proj", 1, 2},
	"down_proj": {[]string{"down_proj", "w2"}, "down_proj", 0, 1},
	"fc1":       {[]string{"up_proj"}, "up_proj", 0, 1}, // of experts without a gate
	"fc2":       {[]string{"down_proj"}, "down_proj", 0, 1},
}

// stacked finds a stack of mlx-lm: where transformers has a stack too, what of it that is.
func (m *Model) stacked(file string) (Tensor, bool) {
	block, rest, ok := strings.Cut(file, stackedIn)
	proj, weight := strings.CutSuffix(rest, ".weight")
	p, known := projections[proj]
	if !ok || !weight || !known {
		return Tensor{}, false
	}
	block += ".experts."
	for _, s := range p.single {
		t, ok := m.find(block+"0."+s+".weight", anyRank)
		if ok && len(t.Runtime) == 1 && t.Runtime[0].Expert == 0 && t.Runtime[0].FileParts == 1 &&
			t.Runtime[0].Parts <= p.parts {
			place := &t.Runtime[0]
			if place.Expert = -1; place.Parts > 1 {
				place.Dim++ // behind that of the experts
			}
			t.Program = stacker
			return t, true
		}
	}
	t, ok := m.find(block+p.param, anyRank)
	if !ok {
		return Tensor{}, false
	}
	place := whole(t.Runtime[0].Param)
	r, of := m.Registered(strings.TrimSuffix(place.Param, "."+p.param))
	if !of || r.InputsFirst || r.Interleaved {
		return Tensor{}, false
	}
	if p.parts > 1 {
		place.Dim, place.Part, place.Parts = 1, p.half, p.parts
	}
	t.Runtime, t.Program = []Slice{place}, stacker
	return t, true
}
