package adapt

import (
	"cmp"
	"context"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/parallel"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterInspection describes an adapter.
type AdapterInspection struct {
	Path    string `json:"path"`
	Dialect string `json:"dialect"`
	Type    string `json:"type"` // LORA, or another of PEFT's methods
	// Base is the base's name as the adapter's config has it.
	Base        string `json:"base,omitempty"`
	PeftVersion string `json:"peft_version,omitempty"`
	// Rank and Alpha are those of the config, which patterns may change for some modules; where it has none, those
	// of most modules.
	Rank   int     `json:"rank,omitzero"`
	Alpha  float64 `json:"alpha,omitzero"`
	RSLoRA bool    `json:"rslora"` // a delta is scaled by alpha / sqrt(rank), else by alpha / rank
	DoRA   bool    `json:"dora"`
	Bias   string  `json:"bias,omitempty"`
	// Starts name how A and B began, where the config says it (init_lora_weights).
	Starts []string `json:"starts,omitempty"`
	// Of the config, as they are written there.
	Targets       jsontext.Value `json:"target_modules,omitempty"`
	Parameters    jsontext.Value `json:"target_parameters,omitempty"`
	ModulesToSave jsontext.Value `json:"modules_to_save,omitempty"`
	// Patterns are the modules whose rank or alpha is another.
	Patterns []PatternedModule `json:"patterns"`
	// Trained counts the elements that are the adapter's own; copies of the base's matrices are only in Bytes.
	Trained int64             `json:"parameters"`
	Bytes   int64             `json:"bytes"`
	Files   []string          `json:"files"`
	Modules []InspectedModule `json:"modules"`
	Notices []string          `json:"notices,omitempty"` // what was assumed
}

// PatternedModule is a module with a rank or an alpha of its own.
type PatternedModule struct {
	Name  string  `json:"name"`
	Rank  int     `json:"rank"`
	Alpha float64 `json:"alpha"`
}

// InspectedModule is one part of an adapter.
type InspectedModule struct {
	Name string `json:"name"`
	// Form is linear, embedding, conv, bias, replace, rows, scale or transform.
	Form string `json:"form"`
	// Base is set for a copy of the base's own matrix that is stored beside an adapter of it.
	Base bool `json:"base,omitzero"`
	// Shape is that of what is changed: (out, in) of a linear layer. A stack of Experts has none; where only the base
	// tells how many they are, it NeedsBase and has no rank and norm either.
	Shape     tensor.Shape `json:"shape,omitempty"`
	Experts   int64        `json:"experts,omitzero"`
	NeedsBase bool         `json:"needs_base,omitzero"`
	// A and B are the shapes of the factors as they are stored.
	A       tensor.Shape `json:"a,omitempty"`
	B       tensor.Shape `json:"b,omitempty"`
	DType   tensor.DType `json:"dtype"`
	Rank    int          `json:"rank,omitzero"`
	Alpha   float64      `json:"alpha,omitzero"`
	Scaling float64      `json:"scaling,omitzero"`
	DoRA    bool         `json:"dora,omitzero"`
	// Norm is the Frobenius norm of what is added, or of the new values; nil where it NeedsBase, and for integers.
	Norm *float64 `json:"norm,omitzero"`
}

// Inspect says what is in an adapter. Its values are read, for the norms.
func Inspect(ctx context.Context, a *lora.Adapter) (*AdapterInspection, error) {
	if _, err := a.Parts(); err != nil { // gives stacks of experts their ranks
		return nil, err
	}
	c := &a.Config
	r := &AdapterInspection{
		Path: a.Path, Dialect: a.Dialect, Type: cmp.Or(c.PeftType, "LORA"), Base: c.Base, PeftVersion: c.PeftVersion,
		Rank: c.Rank, Alpha: c.Alpha, RSLoRA: c.RSLoRA, DoRA: c.DoRA, Bias: c.BiasMode, Starts: c.Starts(),
		Targets: stated(c.Targets), Parameters: stated(c.Parameters), ModulesToSave: stated(c.ToSave),
		Patterns: []PatternedModule{}, Files: a.Files, Notices: a.Notices,
		Modules: make([]InspectedModule, len(a.Modules)),
	}
	r.Trained, r.Bytes = a.Size()
	err := parallel.Each(ctx, len(a.Modules), 0, func(_ context.Context, i int) error {
		m := a.Modules[i]
		var g lora.Spectrograph
		s, err := g.Spectrum(a, m)
		if err != nil {
			return err
		}
		x := m.Contents()
		if s.NeedsBase && x.A == nil { // what rank its delta has is not said by that of the tensors
			m = &lora.Module{Name: m.Name, Param: m.Param, Form: m.Form, Base: m.Base, Magnitude: m.Magnitude}
		}
		r.Modules[i] = InspectedModule{
			Name: m.String(), Form: m.Form.String(), Base: m.Base, Shape: x.Shape, Experts: x.Experts,
			NeedsBase: s.NeedsBase, A: x.A, B: x.B, DType: x.DType, Rank: m.Rank, Alpha: m.Alpha,
			Scaling: m.Scaling, DoRA: m.Magnitude != nil, Norm: finite(s.Norm),
		}
		return nil
	})
	if ctx.Err() != nil {
		return nil, ErrInterrupted
	}
	if err != nil {
		return nil, err
	}
	r.findPatterns()
	return r, nil
}

// findPatterns lists the modules whose rank or alpha is not that of the config, or without one of most modules.
func (r *AdapterInspection) findPatterns() {
	type pair struct {
		rank  int
		alpha float64
	}
	counts := map[pair]int{}
	for _, m := range r.Modules {
		r.DoRA = r.DoRA || m.DoRA
		if m.A != nil && m.Rank > 0 {
			counts[pair{m.Rank, m.Alpha}]++
		}
	}
	if r.Rank == 0 {
		most := 0
		for _, m := range r.Modules { // in their order: the first of equals
			if n := counts[pair{m.Rank, m.Alpha}]; m.A != nil && n > most {
				most, r.Rank, r.Alpha = n, m.Rank, m.Alpha
			}
		}
	}
	for _, m := range r.Modules {
		if m.A != nil && m.Rank > 0 && (m.Rank != r.Rank || m.Alpha != r.Alpha) {
			r.Patterns = append(r.Patterns, PatternedModule{m.Name, m.Rank, m.Alpha})
		}
	}
}

// stated is a field of a config, nil where it is null.
func stated(v jsontext.Value) jsontext.Value {
	if v.Kind() == 'n' {
		return nil
	}
	return v
}
