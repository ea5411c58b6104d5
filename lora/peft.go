package lora

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

const peftPrefix = "base_model.model."

// role is what the end of a PEFT key says.
type role uint8

const (
	roleA role = iota
	roleB
	roleEmbeddingA
	roleEmbeddingB
	roleMagnitude
	roleBias
	roleTokens
	roleValue
)

// split takes a key of PEFT apart: the module's name, what the tensor is of it, and for a plain value its parameter.
// Older files have the name of the adapter in their keys, as ".default".
func split(key string) (module string, r role, param string) {
	name := inModel(key)
	first, last, behind := "", "", 0 // of the parts behind the one that is looked at, and how many they are
	end := len(name)
	for i := strings.LastIndexByte(name, '.'); i >= 0; i = strings.LastIndexByte(name[:i], '.') {
		at, part := name[:i], name[i+1:end]
		switch part {
		case "lora_A":
			if behind <= 2 && last == "weight" || behind == 0 {
				return at, roleA, "weight"
			}
		case "lora_B":
			if behind <= 2 && last == "bias" {
				return at, roleBias, "bias"
			}
			if behind <= 2 && last == "weight" || behind == 0 {
				return at, roleB, "weight"
			}
		case "lora_embedding_A":
			if behind <= 1 {
				return at, roleEmbeddingA, "weight"
			}
		case "lora_embedding_B":
			if behind <= 1 {
				return at, roleEmbeddingB, "weight"
			}
		case "lora_magnitude_vector":
			if behind <= 2 {
				return at, roleMagnitude, "weight"
			}
		case "token_adapter":
			if first == "trainable_tokens_delta" {
				return at, roleTokens, "weight"
			}
		}
		if behind == 0 {
			last = part
		}
		first, end = part, i
		behind++
	}
	module, param = cutLast(name)
	return module, roleValue, param
}

// readPEFT makes modules of the tensors of a PEFT file.
func (a *Adapter) readPEFT(tensors []formats.Tensor) error {
	if a.Config.otherMethod() {
		var err error
		if tensors, err = a.readMethod(tensors); err != nil {
			return err
		}
	}
	type parts struct{ a, b, bias, magnitude *formats.Tensor }
	values := map[string]*formats.Tensor{} // by module and parameter
	for i := range tensors {
		if name, r, param := split(tensors[i].Name); r == roleValue {
			values[name+"."+param] = &tensors[i]
		}
	}
	lora := map[string]*parts{}
	embedding := map[string]bool{}
	for i := range tensors {
		t := &tensors[i]
		name, r, param := split(t.Name)
		if withoutLayers(strings.TrimSuffix(name, ".modules_to_save")) == "" {
			return a.failed(t, fmt.Errorf("%w: no module is named", ErrMalformed))
		}
		if strings.Contains(t.Name, "lora_") && r == roleValue {
			return a.failed(t, fmt.Errorf("%w: its name is none that PEFT gives to a part of a LoRA adapter", ErrUnsupported))
		}
		p := lora[name]
		if p == nil && r != roleTokens && r != roleValue {
			p = &parts{}
			lora[name] = p
		}
		set := func(slot **formats.Tensor) error {
			if *slot != nil {
				return a.failed(t, fmt.Errorf("%w: %s says the same", ErrMalformed, tensor.Quote((*slot).Name)))
			}
			*slot = t
			return nil
		}
		if is, known := embedding[name]; r <= roleEmbeddingB && known && is != (r >= roleEmbeddingA) {
			return a.failed(t, fmt.Errorf("%w: one factor is that of an embedding, the other is not", ErrMalformed))
		}
		var err error
		switch r {
		case roleA, roleEmbeddingA:
			err = set(&p.a)
			embedding[name] = r == roleEmbeddingA
		case roleB, roleEmbeddingB:
			err = set(&p.b)
			embedding[name] = r == roleEmbeddingB
		case roleBias:
			err = set(&p.bias)
		case roleMagnitude:
			if p.magnitude != nil { // PEFT saves those of an embedding that has grown under two names
				if same, err := sameBytes(p.magnitude, t); same || err != nil {
					if err != nil {
						return a.failed(t, err)
					}
					a.repeat(t, p.magnitude)
					continue
				}
			}
			err = set(&p.magnitude)
		case roleTokens:
			err = a.addTokens(name, t)
		case roleValue:
			if again, err := a.saidBefore(values, t, name, param); again || err != nil {
				if err != nil {
					return err
				}
				continue
			}
			name = strings.TrimSuffix(name, ".modules_to_save")
			m := &Module{Name: withoutLayers(name), Param: param, Form: Replace, Value: t,
				before: values[name+".original_module."+param]}
			m.Base = m.Name != name && param == "weight"
			a.Modules = append(a.Modules, m)
		}
		if err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(lora)) {
		p := lora[name]
		if err := a.addLora(name, p.a, p.b, p.bias, p.magnitude, embedding[name]); err != nil {
			return err
		}
	}
	return a.checkHeadRank()
}

// checkHeadRank refuses an output head of another rank than the config's, unless ensure_weight_tying gave it the
// factors of the embedding. Its scaling is by the config's rank even so.
func (a *Adapter) checkHeadRank() error {
	for _, m := range a.Modules {
		if m.Rank == 0 || m.A.T == nil || !a.Config.EnsureTie || !m.isHead() || a.ensuredEnd(m) {
			continue
		}
		r, err := a.Config.lookup("rank_pattern", a.Config.ranks, m.Name, float64(a.Config.Rank))
		if err == nil && float64(m.Rank) != r {
			err = a.Config.errRank(m.Name, int64(m.Rank), r)
		}
		if err != nil {
			return a.named(err)
		}
	}
	return nil
}

// withoutLayers is the name of a module without those of the layers that PEFT has put around it.
func withoutLayers(name string) string {
	for {
		inner := strings.TrimSuffix(strings.TrimSuffix(name, ".base_layer"), ".token_adapter")
		if inner == name {
			return name
		}
		name = inner
	}
}

// saidBefore reports whether a value is one of the copies that PEFT stores of what is in a module that was trained
// whole: what it was before, or once more what it is. They are those of a module that has grown and, with the biases
// of all modules, of every one, whose name has that of the adapter in it: "classifier.modules_to_save.default.dense".
func (a *Adapter) saidBefore(values map[string]*formats.Tensor, t *formats.Tensor, name, param string) (bool, error) {
	if module, inner, ok := strings.Cut(name+".", ".original_module."); ok {
		return values[module+"."+inner+param] != nil, nil
	}
	module, inner, ok := strings.Cut(name+".", ".modules_to_save.")
	if !ok {
		return false, nil
	}
	_, behind, _ := strings.Cut(inner, ".")
	o := cmp.Or(values[module+"."+inner+param], values[module+"."+behind+param])
	if o == nil {
		return false, nil
	}
	same, err := sameBytes(t, o)
	if same {
		a.repeat(t, o)
	}
	if err == nil && !same {
		err = a.failed(t, fmt.Errorf("%w: it differs from %s", ErrMalformed, tensor.Quote(o.Name)))
	}
	return true, err
}

// repeat notes that t says once more what o says.
func (a *Adapter) repeat(t, o *formats.Tensor) {
	if a.repeated == nil {
		a.repeated = map[*formats.Tensor]*formats.Tensor{}
	}
	a.repeated[t] = o
}

// addLora adds a pair of A and B.
func (a *Adapter) addLora(key string, ta, tb, bias, magnitude *formats.Tensor, embedding bool) error {
	m := &Module{Name: key, Param: "weight", Magnitude: magnitude, Order: a.Config.order()}
	for strings.HasSuffix(m.Name, ".base_layer") {
		m.Name = strings.TrimSuffix(m.Name, ".base_layer")
		m.WrapDepth++
	}
	switch {
	case ta == nil || tb == nil:
		return fmt.Errorf("%s: %w: module %s has only one of lora_A and lora_B", a.Path, ErrMalformed, tensor.Quote(key))
	case len(ta.Shape) < 2 || len(tb.Shape) != len(ta.Shape):
		return fmt.Errorf("%s: %w: module %s has lora_A %v and lora_B %v, expected two matrices", a.Path, ErrMalformed,
			tensor.Quote(key), ta.Shape, tb.Shape)
	case len(ta.Shape) > 2 && tb.Shape[1] > 0 && ta.Shape[0] > tb.Shape[1] && ta.Shape[0]%tb.Shape[1] == 0:
		return fmt.Errorf("%s: %w: module %s has lora_A %v and lora_B %v: a convolution of %d groups, which PEFT does not "+
			"merge", a.Path, ErrUnsupported, tensor.Quote(key), ta.Shape, tb.Shape, ta.Shape[0]/tb.Shape[1])
	case ta.Shape[0] == 0 || ta.Shape[0] != tb.Shape[1]:
		return fmt.Errorf("%s: %w: module %s has lora_A %v and lora_B %v, whose ranks differ or are 0", a.Path, ErrMalformed,
			tensor.Quote(key), ta.Shape, tb.Shape)
	case a.Config.DoRA && magnitude == nil:
		return fmt.Errorf("%s: %w: module %s has no lora_magnitude_vector, and use_dora is true", a.Path, ErrMalformed,
			tensor.Quote(key))
	case !a.Config.DoRA && magnitude != nil:
		return fmt.Errorf("%s: %w: module %s has a lora_magnitude_vector, and use_dora is not set", a.Path, ErrMalformed,
			tensor.Quote(key))
	case a.Config.LoraBias && bias == nil && !embedding:
		return fmt.Errorf("%s: %w: module %s has no lora_B.bias, and lora_bias is true", a.Path, ErrMalformed,
			tensor.Quote(key))
	case !a.Config.LoraBias && bias != nil:
		return fmt.Errorf("%s: %w: module %s has a lora_B.bias, and lora_bias is not set", a.Path, ErrMalformed,
			tensor.Quote(key))
	}
	m.A, m.B = matrixOf(ta), matrixOf(tb)
	m.Parameter = a.Config.patternName(m) != m.Name
	switch {
	case embedding:
		m.Form = Embedding
	case len(ta.Shape) > 2:
		m.Form, m.Kernel = Conv, ta.Shape[2:]
		for _, d := range tb.Shape[2:] {
			if d != 1 {
				return fmt.Errorf("%s: %w: module %s has a lora_B of shape %v, expected kernels of one element", a.Path,
					ErrMalformed, tensor.Quote(key), tb.Shape)
			}
		}
	}
	// What rank a stack of experts has, only its base tells.
	plain := empty(a.Config.Parameters) || m.Form != Linear
	if !plain {
		var err error
		if plain, err = a.Config.targeted(m.Name); err != nil {
			return a.named(err)
		}
	}
	if plain {
		if err := a.Config.scale(m, m.Name, ta.Shape[0]); err != nil {
			return a.named(err)
		}
	}
	a.Modules = append(a.Modules, m)
	if bias != nil {
		a.Modules = append(a.Modules, &Module{Name: m.Name, Param: "bias", Form: Bias, Value: bias, Rank: m.Rank,
			Alpha: m.Alpha, Scaling: m.Scaling})
	}
	return nil
}

// addTokens adds the trained rows of an embedding.
func (a *Adapter) addTokens(name string, t *formats.Tensor) error {
	name = withoutLayers(name)
	field := "trainable_token_indices"
	if a.Config.PeftType == tokens {
		field = "token_indices"
	}
	m := &Module{Name: name, Param: "weight", Form: Rows, Value: t}
	var list []int64
	if err := json.Unmarshal(a.Config.Tokens, &list); err != nil {
		var byName map[string][]int64
		if err := json.Unmarshal(a.Config.Tokens, &byName); err != nil {
			return a.failed(t, fmt.Errorf("%w: trainable_token_indices lists no indices for it", ErrMalformed))
		}
		means := ""
		for _, key := range slices.Sorted(maps.Keys(byName)) {
			// a single one may be of a module that is tied to it
			if name != key && !strings.HasSuffix(name, "."+key) && len(byName) > 1 {
				continue
			}
			if list != nil && !slices.Equal(list, byName[key]) {
				return a.failed(t, fmt.Errorf("%w: %s and %s of trainable_token_indices both mean it, with other indices",
					ErrMalformed, tensor.Quote(means), tensor.Quote(key)))
			}
			list, means = byName[key], key
		}
	}
	if len(t.Shape) != 2 || int64(len(list)) != t.Shape[0] {
		return a.failed(t, fmt.Errorf("%w: its shape is %v, and %s has %d indices", ErrMalformed, t.Shape, field, len(list)))
	}
	seen := map[int64]bool{}
	for _, i := range list {
		if i < 0 || seen[i] {
			return a.failed(t, fmt.Errorf("%w: %s has %d twice or negative", ErrMalformed, field, i))
		}
		seen[i] = true
	}
	m.Indices = list
	a.Modules = append(a.Modules, m)
	return nil
}
