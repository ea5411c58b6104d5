package lora

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// PEFT's trainable tokens as an adapter of their own are what trainable_token_indices of a LoRA adapter are: new
// values of some rows of an embedding, which hold for all that shares its values.

func init() {
	parsers[tokens] = func(c *Config) error {
		c.Tokens = c.fields["token_indices"]
		var list []int64
		if json.Unmarshal(c.Tokens, &list) != nil || len(list) == 0 {
			return fmt.Errorf("%w: token_indices is %s, expected a list of numbers", ErrMalformed,
				tensor.Quote(string(c.Tokens)))
		}
		return nil
	}
}

// readTokens makes modules of the rows, and returns the other tensors.
func (a *Adapter) readTokens(tensors []formats.Tensor) ([]formats.Tensor, error) {
	modules, rest, err := a.gather(tensors)
	if err != nil {
		return nil, err
	}
	var meant *Module
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		t := modules[name]["trainable_tokens_delta"]
		if strings.HasSuffix(name, ".base_layer") {
			return nil, a.failed(t, fmt.Errorf("%w: rows within rows: target_modules means both ends of a tie, and PEFT cannot "+
				"run what it makes of that", ErrUnsupported))
		}
		if err := a.addTokens(name, t); err != nil {
			return nil, err
		}
		m := a.Modules[len(a.Modules)-1]
		m.selectedAs = m.Name
		if ok, err := a.Config.selectsFirst(rewrapped(m.Name)); err != nil {
			return nil, a.named(err)
		} else if ok && meant == nil {
			meant = m
		}
	}
	for _, m := range a.Modules { // PEFT saves the rows of all that is tied to the embedding, and names that alone
		if meant == nil || m == meant {
			continue
		}
		same, err := sameBytes(m.Value, meant.Value)
		if err != nil {
			return nil, a.failed(m.Value, err)
		}
		if same {
			m.selectedAs = meant.Name
		}
	}
	return rest, nil
}

// lnSegment stands in the names of LN tuning between a module and its parameters.
const lnSegment = ".ln_tuning_layers."

// readLN makes modules of the copies of layers that LN tuning (Zhao et al., "Tuning LayerNorm in Attention", 2023) has
// trained, norms mostly, each of which takes the place of the base's own. It returns the other tensors, but for the
// base's own matrix that PEFT stores beside the copy of an embedding or a head.
func (a *Adapter) readLN(tensors []formats.Tensor) (rest []formats.Tensor, err error) {
	trained := map[string]bool{}
	for i := range tensors {
		t := &tensors[i]
		owner, path, own := strings.Cut(inModel(t.Name), lnSegment)
		if !own {
			if strange(strings.Split(t.Name, ".")) {
				return nil, a.failed(t, fmt.Errorf("%w: its name is none that PEFT gives to a part of a %s adapter",
					ErrUnsupported, lnTuning))
			}
			rest = append(rest, *t)
			continue
		}
		if owner == "" || path == "" || strange(strings.Split(owner+"."+path, ".")) {
			return nil, a.failed(t, fmt.Errorf("%w: no parameter of a module is named", ErrMalformed))
		}
		module, param := cutLast(owner + "." + path)
		trained[owner+".base_layer."+path] = true
		a.Modules = append(a.Modules, &Module{Name: module, Param: param, Form: Replace, Value: t, selectedAs: owner})
	}
	return slices.DeleteFunc(rest, func(t formats.Tensor) bool {
		return trained[inModel(t.Name)]
	}), nil
}

func init() { parsers[lnTuning] = func(*Config) error { return nil } }
