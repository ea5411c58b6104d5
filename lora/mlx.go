package lora

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// An MLX adapter (mlx-lm's tuner) holds, for each linear layer, lora_a (in, rank) and lora_b (rank, out); of an
// embedding (rows, rank) and (rank, width); of a stack of experts (experts, rank, in) and (experts, out, rank), where
// older files have (experts*rank, in). DoRA adds m (out). One scale, which is the factor of the delta, stands in the
// config for all.

// mlxConfig is what mlx-lm reads of its adapter_config.json.
type mlxConfig struct {
	Kind       string `json:"fine_tune_type"`
	Model      string `json:"model"`
	Parameters struct {
		Rank  float64        `json:"rank"`
		Scale jsontext.Value `json:"scale"`
		Alpha jsontext.Value `json:"alpha"`
	} `json:"lora_parameters"`
}

// readMLX makes modules of an MLX folder.
func (a *Adapter) readMLX(config []byte) error {
	var c mlxConfig
	name := filepath.Join(a.Path, configName)
	if err := json.Unmarshal(config, &c); err != nil {
		return fmt.Errorf("%s: %w: %w", name, ErrMalformed, err)
	}
	a.Config.Base = c.Model
	if c.Kind != "" && c.Kind != "lora" && c.Kind != "dora" {
		return fmt.Errorf("%s: %w: fine_tune_type is %s, expected lora or dora", name, ErrUnsupported, tensor.Quote(c.Kind))
	}
	var scale float64
	switch {
	case c.Parameters.Scale != nil:
		if err := json.Unmarshal(c.Parameters.Scale, &scale); err != nil || c.Parameters.Scale.Kind() != '0' {
			return fmt.Errorf("%s: %w: the scale in lora_parameters is %s, expected a number", name, ErrMalformed,
				tensor.Quote(string(c.Parameters.Scale)))
		}
	case c.Parameters.Alpha != nil: // of its first releases
		if err := json.Unmarshal(c.Parameters.Alpha, &scale); err != nil || c.Parameters.Alpha.Kind() != '0' ||
			c.Parameters.Rank <= 0 {
			return fmt.Errorf("%s: %w: lora_parameters has the alpha %s and the rank %g, expected positive numbers", name,
				ErrMalformed, tensor.Quote(string(c.Parameters.Alpha)), c.Parameters.Rank)
		}
		scale /= c.Parameters.Rank
	default:
		return fmt.Errorf("%s: %w: lora_parameters has no scale", name, ErrMalformed)
	}
	type parts struct{ a, b, m *formats.Tensor }
	byName := map[string]*parts{}
	tensors := a.tensors
	for i := range tensors { // those with lora_a say what a name that ends in m is
		if n, ok := strings.CutSuffix(tensors[i].Name, ".lora_a"); ok {
			byName[n] = &parts{a: &tensors[i]}
		}
	}
	for i := range tensors {
		t := &tensors[i]
		module, end := cutLast(t.Name)
		p := byName[module]
		switch {
		case end == "lora_a":
		case end == "lora_b" && p != nil:
			p.b = t
		case end == "m" && p != nil:
			p.m = t
		case strings.HasPrefix(end, "lora_"):
			what := "no lora_a is beside it"
			if end != "lora_b" {
				what = "a quantised adapter"
			}
			return a.failed(t, fmt.Errorf("%w: %s", ErrUnsupported, what))
		case module == "":
			return a.failed(t, fmt.Errorf("%w: no module is named", ErrMalformed))
		case end == "weight" && byName[wrapped(module)] != nil: // the base's own, below its adapter
			a.Modules = append(a.Modules, &Module{Name: wrapped(module), Param: end, Form: Replace, Value: t, Base: true})
		default: // a weight that was trained whole
			a.Modules = append(a.Modules, &Module{Name: module, Param: end, Form: Replace, Value: t})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		p := byName[name]
		m, err := mlxModule(name, p.a, p.b)
		if err != nil {
			return fmt.Errorf("%s: module %s: %w", a.Path, tensor.Quote(name), err)
		}
		if m.Magnitude = p.m; (p.m != nil) != (c.Kind == "dora") {
			return fmt.Errorf("%s: module %s: %w: fine_tune_type is %s, which does not agree with whether it has a magnitude m",
				a.Path, tensor.Quote(name), ErrMalformed, tensor.Quote(c.Kind))
		}
		if m.Magnitude != nil && m.Form == Embedding {
			return fmt.Errorf("%s: module %s: %w: MLX's DoRA of an embedding, whose norms are those of tokens", a.Path,
				tensor.Quote(name), ErrUnsupported)
		}
		m.Scaling, m.Alpha = scale, scale*float64(m.Rank)
		a.Modules = append(a.Modules, m)
	}
	// Some tools write one rank for modules of several.
	hasRank := func(m *Module) bool { return float64(m.Rank) == c.Parameters.Rank }
	for _, m := range a.Modules {
		if m.A.T != nil && c.Parameters.Rank != 0 && !slices.ContainsFunc(a.Modules, hasRank) {
			return fmt.Errorf("%s: module %s: %w: it has rank %d in its tensors, and by lora_parameters it is %g", a.Path,
				tensor.Quote(m.Name), ErrMalformed, m.Rank, c.Parameters.Rank)
		}
	}
	return nil
}

// wrapped is the module that MLX has put an adapter around, of the name that the inner one has then.
func wrapped(module string) string {
	outer, last := cutLast(module)
	if last == "linear" || last == "embedding" {
		return outer
	}
	return ""
}

// mlxModule makes a module of lora_a and lora_b.
func mlxModule(name string, ta, tb *formats.Tensor) (*Module, error) {
	if tb == nil {
		return nil, fmt.Errorf("%w: no lora_b is beside its lora_a", ErrMalformed)
	}
	m := &Module{Name: name, Param: "weight"}
	bad := fmt.Errorf("%w: lora_a has the shape %v and lora_b %v, expected (in, rank) and (rank, out), or (experts, "+
		"rank, in) and (experts, out, rank)", ErrMalformed, ta.Shape, tb.Shape)
	if len(ta.Shape) < 2 || slices.Contains(ta.Shape, 0) || slices.Contains(tb.Shape, 0) {
		return nil, bad
	}
	if len(tb.Shape) == 3 {
		e, out, r := tb.Shape[0], tb.Shape[1], tb.Shape[2]
		in := ta.Shape[len(ta.Shape)-1]
		if len(ta.Shape) == 3 && (ta.Shape[0] != e || ta.Shape[1] != r) || len(ta.Shape) == 2 && ta.Shape[0] != e*r ||
			len(ta.Shape) > 3 {
			return nil, bad
		}
		if e > mostExperts {
			return nil, fmt.Errorf("%w: lora_b has the shape %v, expected at most %d experts", ErrMalformed, tb.Shape,
				mostExperts)
		}
		m.Experts, m.Order, m.Rank = e, Apart, int(r)
		m.A = Matrix{T: ta, RowStride: in, ColStride: 1, Rows: e * r, Cols: in}
		m.B = Matrix{T: tb, RowStride: r, ColStride: 1, Rows: out, Cols: e * r}
		return m, nil
	}
	if len(ta.Shape) != 2 || len(tb.Shape) != 2 || ta.Shape[1] != tb.Shape[0] {
		return nil, bad
	}
	m.A, m.B, m.Rank = matrixOf(ta).Transposed(), matrixOf(tb).Transposed(), int(ta.Shape[1])
	if _, end := cutLast(name); slices.Contains(embeddings, end) {
		m.Form = Embedding
	}
	return m, nil
}

// embeddings are the last parts of the names of embeddings: MLX stores one as it does a linear layer.
var embeddings = []string{
	"embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embedding", "embeddings", "embed_in",
	"embed_positions",
	"per_layer_embeddings", "embed_tokens_per_layer", "position_embeddings", "token_type_embeddings", "word_embedding",
	"position_embedding", "token_embedding", "tokens_embed", "positions_embed", "shared",
}

// encodeMLX writes the folder that mlx-lm loads.
func (a *Adapter) encodeMLX(experts string) (*Encoded, error) {
	e := &Encoded{Format: "safetensors", File: mlxFile}
	modules, err := a.perExpert()
	if err != nil {
		return nil, err
	}
	if modules, err = alone(modules); err != nil {
		return nil, err
	}
	var stacks []*family
	if experts != perExpert {
		if stacks, modules, err = a.families(modules); err != nil {
			return nil, err
		}
	}
	for _, f := range stacks {
		if f.ungated {
			return nil, fmt.Errorf("module %s: %w: MLX has other names for experts without a gate",
				tensor.Quote(f.name), ErrUnsupported)
		}
	}
	all := slices.Clone(modules)
	for _, f := range stacks {
		for _, proj := range slices.Sorted(maps.Keys(f.projs)) {
			all = append(all, f.projs[proj]...)
		}
	}
	common := commonScales(all)
	rank, dora, keys := 0, false, map[string]bool{}
	for _, m := range all {
		rank, dora = max(rank, m.Rank), dora || m.Magnitude != nil
	}
	if err := paddable(all, int64(rank)); err != nil {
		return nil, err
	}
	for _, m := range modules {
		out, err := m.mlxOutputs(rank, common.scaling)
		if err != nil {
			return nil, err
		}
		if m.A.T != nil {
			keys[mlxKey(m.Name)] = true
		}
		e.Tensors = append(e.Tensors, out...)
	}
	for _, f := range stacks {
		for _, proj := range slices.Sorted(maps.Keys(f.projs)) {
			list := f.projs[proj]
			name := a.switchName(f.name) + "." + proj
			keys[mlxKey(name)] = true
			e.Tensors = append(e.Tensors, mlxStack(name, list, int64(rank), common.scaling)...)
		}
	}
	kind := "lora"
	if dora {
		kind = "dora"
	}
	config := map[string]any{"fine_tune_type": kind, "num_layers": -1, "model": a.Config.Base,
		"lora_parameters": map[string]any{"rank": rank, "scale": common.scaling, "dropout": 0.0,
			"keys": slices.Sorted(maps.Keys(keys))}}
	e.Config, err = json.Marshal(config, json.Deterministic(true), jsontext.WithIndent("  "))
	e.Config = append(e.Config, '\n')
	return e, err
}

// mlxKey is a module's name as the config lists it: within its layer, for those that are in one.
func mlxKey(name string) string {
	parts := strings.Split(name, ".")
	for i := range parts {
		if i+1 < len(parts) && i > 0 && strings.Trim(parts[i], "0123456789") == "" {
			return strings.Join(parts[i+1:], ".")
		}
	}
	return name
}

// switchName is what MLX calls a block of experts.
func (a *Adapter) switchName(stack string) string {
	if a.mixtral() {
		stack = strings.Replace(stack, ".mlp.", ".block_sparse_moe.", 1)
	}
	return strings.TrimSuffix(stack, "experts") + "switch_mlp"
}

// mixtral reports whether the base of an adapter is a Mixtral, whose file names its experts in its own
// way: by the names of the adapter's modules, else by what its config calls the base. The base itself is not
// looked for, so that the same adapter gives the same names everywhere.
func (a *Adapter) mixtral() bool {
	for _, m := range a.Modules {
		_, within, ok := strings.Cut(m.Name, ".block_sparse_moe.")
		_, _, proj, single := splitExpert(m.Name)
		// Granite has such a block too
		if ok && (within == "gate" || strings.HasPrefix(within, "switch_mlp.") || single && usual[proj] != "") {
			return true
		}
	}
	return strings.Contains(strings.ToLower(a.Config.Base+string(a.Config.Mapping)), "mixtral")
}

// mlxOutputs are the tensors of a module. All have one rank, so smaller ones are filled with zeros.
func (m *Module) mlxOutputs(rank int, scale float64) ([]Output, error) {
	switch {
	case m.Form == Replace && !m.Base:
		return []Output{asItIs(m.Name+"."+m.Param, m.Value)}, nil
	case m.Form == Replace:
		_, end := cutLast(m.Name)
		inner := ".linear."
		if slices.Contains(embeddings, end) {
			inner = ".embedding."
		}
		return []Output{asItIs(m.Name+inner+m.Param, m.Value)}, nil
	case m.Form != Linear && m.Form != Embedding || m.Magnitude != nil && m.Form == Embedding:
		return nil, noPlace(m, m.what(), MLX)
	}
	A, B := padded(m.A, int64(rank)), padded(m.B.Transposed(), int64(rank))
	out := []Output{
		output(m.Name+".lora_a", A.Transposed(), m.A.Cols, int64(rank)),
		output(m.Name+".lora_b", B, int64(rank), m.B.Rows).scaled(ratio(m.Scaling, scale)),
	}
	if m.Magnitude != nil {
		out = append(out, asItIs(m.Name+".m", m.Magnitude))
	}
	return out, nil
}

// ratio is what a factor has to be multiplied with so that another scale gives the same.
func ratio(scaling, scale float64) float64 {
	if scaling == scale {
		return 1
	}
	return scaling / scale
}

// mlxStack are the tensors of all experts' matrices of one kind.
func mlxStack(name string, list []*Module, rank int64, scale float64) []Output {
	n, in, out := int64(len(list)), list[0].A.Cols, list[0].B.Rows
	gather := func(of func(*Module) Matrix, by func(*Module) float64, rows, cols int64) computed {
		return func() ([]float32, error) {
			v, read := make([]float32, n*rows*cols), reader{}
			for e, m := range list {
				x, err := read.matrix(of(m))
				if err != nil {
					return nil, err
				}
				f := float32(by(m))
				for i := range x.Rows {
					for j := range x.Cols {
						v[(int64(e)*rows+int64(i))*cols+int64(j)] = x.Data[i*x.RowStride+j*x.ColStride] * f
					}
				}
			}
			return v, nil
		}
	}
	one := func(*Module) float64 { return 1 }
	a := computedTensor(list[0].A.T, gather(func(m *Module) Matrix { return m.A }, one, rank, in), n, rank, in)
	b := computedTensor(list[0].B.T, gather(func(m *Module) Matrix { return m.B },
		func(m *Module) float64 { return ratio(m.Scaling, scale) }, out, rank), n, out, rank)
	return []Output{asItIs(name+".lora_a", a), asItIs(name+".lora_b", b)}
}
