package lora

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// An adapter of an image or video model is one file without a config (diffusers' save_lora_weights, ai-toolkit,
// ComfyUI). Its tensors are those of PEFT or of kohya, under the module's name in its pipeline. A scalar alpha beside
// the factors of a module, or the LoraConfig of a component in the file's metadata, tells the scaling; where there is
// neither it is 1 (get_peft_kwargs in diffusers/utils/peft_utils.py).

// metadataName is where diffusers keeps the configs of an adapter: an object of their fields, each behind the name of
// its component.
const metadataName = "lora_adapter_metadata"

// factors are the tensors of one module of an adapter in one file.
type factors struct{ a, b, bias, magnitude, alpha *formats.Tensor }

// endings are what names end in, by what their tensors are of a module: the names of PEFT, of kohya's sd-scripts, of
// diffusers since its version 0.14 and before that, and of diffusers' text encoders.
var endings = []struct {
	end  string
	slot func(*factors) **formats.Tensor
}{
	{".lora_A.weight", slotA}, {".lora_B.weight", slotB}, {".lora_A", slotA}, {".lora_B", slotB}, {".lora_B.bias",
		slotBias},
	{".lora_magnitude_vector", slotMagnitude}, {".lora_magnitude_vector.weight", slotMagnitude},
	{".lora_down.weight", slotA}, {".lora_up.weight", slotB}, {".dora_scale", slotMagnitude}, {".alpha", slotAlpha},
	{".lora.down.weight", slotA}, {".lora.up.weight", slotB}, {oldDown, slotA}, {oldUp, slotB},
	{".lora_linear_layer.down.weight", slotA}, {".lora_linear_layer.up.weight", slotB},
}

// oldDown and oldUp are the ends of the names that diffusers' attention processors had:
// "attn1.processor.to_q_lora.down.weight".
const oldDown, oldUp = "_lora.down.weight", "_lora.up.weight"

func slotA(f *factors) **formats.Tensor         { return &f.a }
func slotB(f *factors) **formats.Tensor         { return &f.b }
func slotBias(f *factors) **formats.Tensor      { return &f.bias }
func slotMagnitude(f *factors) **formats.Tensor { return &f.magnitude }
func slotAlpha(f *factors) **formats.Tensor     { return &f.alpha }

// factorOf takes the name of a tensor apart: the module, and what the tensor is of it; slot is nil for a name that no
// adapter in one file has.
func factorOf(name string) (module string, slot func(*factors) **formats.Tensor) {
	name = withoutAdapter(name)
	for _, e := range endings {
		if module, ok := strings.CutSuffix(name, e.end); ok {
			return processed(module, e.end == oldDown || e.end == oldUp), e.slot
		}
	}
	return "", nil
}

// withoutAdapter takes the adapter's name out of a tensor's, where PEFT has left it: ".lora_A.default.weight".
func withoutAdapter(name string) string {
	before, last := cutLast(name)
	if last != "weight" && last != "bias" {
		return name
	}
	at, adapter := cutLast(before)
	for _, end := range []string{".lora_A", ".lora_B", ".lora_magnitude_vector"} {
		if strings.HasSuffix(at, end) && adapter != "" {
			return at + "." + last
		}
	}
	return name
}

// processed is the name of the module that an attention processor of diffusers stands for: "attn1.to_q" for
// "attn1.processor.to_q". Old ones adapt what is called otherwise in the model.
func processed(module string, old bool) string {
	module = strings.ReplaceAll(module, ".processor.", ".")
	if !old {
		return module
	}
	at, last := cutLast(module)
	if component, _ := cutComponent(module); strings.HasPrefix(component, "text_encoder") {
		if name, ok := map[string]string{"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj",
			"to_out": "out_proj"}[last]; ok {
			return at + "." + name
		}
	}
	if last == "to_out" {
		return module + ".0"
	}
	return module
}

// controlNorms are the weights that a control adapter of Flux replaces whole (_control_lora_supported_norm_keys of
// diffusers' FluxLoraLoaderMixin).
var controlNorms = []string{".norm_q.weight", ".norm_k.weight", ".norm_added_q.weight", ".norm_added_k.weight"}

// readOneFile makes modules of the tensors of an adapter in one file, of kohya or of diffusers.
func (a *Adapter) readOneFile(tensors []formats.Tensor, metadata formats.Metadata) error {
	byName := map[string]*factors{}
	for i := range tensors {
		t := &tensors[i]
		module, slot := factorOf(t.Name)
		if slot == nil && a.Dialect == Diffusers && slices.ContainsFunc(controlNorms, func(end string) bool {
			return strings.HasSuffix(t.Name, end)
		}) {
			name, param := cutLast(t.Name)
			m := &Module{Name: name, Param: param, Form: Replace, Value: t}
			m.Component, _ = cutComponent(name)
			a.Modules = append(a.Modules, m)
			continue
		}
		if slot == nil {
			return a.failed(t, fmt.Errorf("%w: %s", ErrUnsupported, a.strangeName(t.Name)))
		}
		if module == "" {
			return a.failed(t, fmt.Errorf("%w: no module is named", ErrMalformed))
		}
		p := byName[module]
		if p == nil {
			p = &factors{}
			byName[module] = p
		}
		if o := *slot(p); o != nil {
			return a.failed(t, fmt.Errorf("%w: %s says the same", ErrMalformed, tensor.Quote(o.Name)))
		}
		*slot(p) = t
	}
	for name, p := range byName { // old files have the magnitudes of an output's list under the list's name
		list := byName[strings.TrimSuffix(name, ".0")]
		if strings.HasSuffix(name, ".to_out.0") && list != nil && list.a == nil && list.b == nil && p.magnitude == nil {
			p.magnitude, list.magnitude = list.magnitude, nil
			if *list == (factors{}) {
				delete(byName, strings.TrimSuffix(name, ".0"))
			}
		}
	}
	configs, err := a.componentConfigs(metadata, byName)
	if err != nil {
		return err
	}
	var unscaled []*Module // modules that nothing says the scaling of, and whose names diffusers does not know
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		m, err := a.addFactors(name, byName[name], configs)
		if err != nil {
			return err
		}
		known := strings.HasPrefix(m.Component, "text_encoder") || isOriginal(m.within())
		if _, ok := models.DiffusersComponent(m.within()); byName[name].alpha == nil && configs == nil && !known && !ok {
			unscaled = append(unscaled, m)
		}
	}
	if unscaled != nil && a.Dialect == Diffusers {
		a.Notices = append(a.Notices, fmt.Sprintf("%s: nothing says the scaling of %d modules, such as %s: it is 1, as "+
			"diffusers "+
			"takes it", a.Path, len(unscaled), unscaled[0].Name))
	}
	return nil
}

// strangeName says what is wrong with the name of a tensor.
func (a *Adapter) strangeName(name string) string {
	switch {
	case slices.ContainsFunc(otherMethods, func(end string) bool { return strings.HasSuffix(name, end) }):
		return "it belongs to another method of LyCORIS than LoRA"
	case strings.Contains(name, "blocks.") && strings.Contains(name, ".processor."):
		return "its name is that of an attention processor of XLabs, expected the names of diffusers or of the model's " +
			"authors"
	case a.Dialect == Kohya:
		return "its name is none that a kohya file gives to a part of a LoRA, expected lora_down.weight, " +
			"lora_up.weight, alpha"
	}
	return "its name is none that a diffusers file gives to a part of a LoRA, expected lora_A.weight and " +
		"lora_B.weight, or " +
		"lora.down.weight and lora.up.weight"
}

// addFactors makes a module of its tensors.
func (a *Adapter) addFactors(name string, p *factors, configs map[string]*Config) (*Module, error) {
	m, err := a.pair(name, p.a, p.b)
	if err != nil {
		return nil, err
	}
	m.Flat = a.Dialect == Kohya && (strings.HasPrefix(name, "lora_") || !strings.Contains(name, "."))
	if m.Flat {
		m.Component, _ = component(name)
	} else {
		var within string
		m.Component, within = cutComponent(name)
		m.Name = join(m.Component, strings.TrimPrefix(within, peftPrefix))
	}
	m.Alpha = float64(m.Rank)
	if p.alpha != nil {
		if p.alpha.Count() != 1 {
			return nil, a.failed(p.alpha, fmt.Errorf("%w: its shape is %v, expected one number", ErrMalformed, p.alpha.Shape))
		}
		if m.Alpha, err = onlyNumber(p.alpha); err != nil {
			return nil, a.named(err)
		}
	}
	m.Scaling = m.Alpha / float64(m.Rank)
	if p.magnitude != nil {
		if err := a.magnitude(m, p.magnitude); err != nil {
			return nil, err
		}
	}
	if c := configs[m.Component]; c != nil {
		if err := a.byConfig(m, c, p); err != nil {
			return nil, a.named(err)
		}
	}
	a.Config.DoRA = a.Config.DoRA || m.Magnitude != nil
	a.Modules = append(a.Modules, m)
	if p.bias != nil {
		bias := &Module{Name: m.Name, Component: m.Component, Param: "bias", Form: Bias, Value: p.bias, Rank: m.Rank,
			Alpha:   m.Alpha,
			Scaling: m.Scaling}
		if n := p.bias.Count(); n != m.B.Rows {
			return nil, a.failed(p.bias, fmt.Errorf("%w: it has %d elements, and the module %d outputs", ErrMalformed, n,
				m.B.Rows))
		}
		a.Modules = append(a.Modules, bias)
	}
	return m, nil
}

// magnitude takes the magnitudes of DoRA, one for each output. LyCORIS may have one for each input, which is another
// method.
func (a *Adapter) magnitude(m *Module, t *formats.Tensor) error {
	var sides tensor.Shape
	for _, d := range t.Shape {
		if d != 1 {
			sides = append(sides, d)
		}
	}
	outputs := t.Count() == m.B.Rows && len(sides) <= 1
	if n := len(t.Shape); n > 1 && outputs && m.B.Rows > 1 { // kohya has them first, PEFT second where there are kernels
		outputs = t.Shape[0] == m.B.Rows || n > 2 && t.Shape[1] == m.B.Rows && strings.Contains(t.Name,
			"lora_magnitude_vector")
	}
	if !outputs {
		return a.failed(t, fmt.Errorf("%w: magnitudes of the shape %v, expected one for each of %d outputs", ErrUnsupported,
			t.Shape, m.B.Rows))
	}
	v := *t // in PEFT's shape
	v.Shape = tensor.Shape{m.B.Rows}
	if m.Form == Conv {
		v.Shape = tensor.Shape{1, m.B.Rows}
		for range m.Kernel {
			v.Shape = append(v.Shape, 1)
		}
	}
	m.Magnitude = &v
	return nil
}

// byConfig gives a module the rank and the scaling that the config of its component has for it.
func (a *Adapter) byConfig(m *Module, c *Config, p *factors) error {
	said := m.Scaling
	if err := c.scale(m, m.within(), m.A.Rows); err != nil {
		return fmt.Errorf("%s: %w", metadataName, err)
	}
	wrong := func(what string) error {
		return fmt.Errorf("module %s: %w: %s", tensor.Quote(m.Name), ErrMalformed, what)
	}
	switch {
	case p.alpha != nil && said != m.Scaling:
		return wrong(fmt.Sprintf("its alpha scales it by %g, and %s by %g", said, metadataName, m.Scaling))
	case c.DoRA != (p.magnitude != nil):
		return wrong(fmt.Sprintf("use_dora of %s is %v, and it has magnitudes: %v", metadataName, c.DoRA, p.magnitude != nil))
	case c.LoraBias != (p.bias != nil):
		return wrong(fmt.Sprintf("lora_bias of %s is %v, and it has a bias: %v", metadataName, c.LoraBias, p.bias != nil))
	}
	return nil
}

// componentConfigs reads the configs of a file's metadata, by component; nil where it has none.
func (a *Adapter) componentConfigs(metadata formats.Metadata, byName map[string]*factors) (map[string]*Config, error) {
	text, ok := metadata.Get(metadataName).(string)
	if !ok {
		return nil, nil
	}
	where := a.Path + ": " + metadataName
	if len(text) > maxConfigBytes {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", where, formats.ErrLimit, maxConfigBytes)
	}
	var all map[string]jsontext.Value
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", where, ErrMalformed, notObject([]byte(text), err))
	}
	groups := map[string]map[string]jsontext.Value{}
	for key, v := range all {
		component, field := "", key
		if at := componentName().FindString(key); at != "" {
			component, field = at[:len(at)-1], key[len(at):]
		}
		if groups[component] == nil {
			groups[component] = map[string]jsontext.Value{}
		}
		groups[component][field] = v
	}
	has := map[string]bool{}
	for name := range byName {
		component, _ := cutComponent(name)
		has[component] = true
	}
	configs := map[string]*Config{}
	for _, component := range slices.Sorted(maps.Keys(groups)) {
		fields := groups[component]
		if fields["peft_type"] == nil {
			fields["peft_type"] = jsontext.Value(`"LORA"`)
		}
		b, err := json.Marshal(fields)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", where, ErrMalformed, err)
		}
		c, err := parseConfig(b)
		if err == nil && c.otherMethod() {
			err = fmt.Errorf("%w: peft_type is %s, expected LORA", ErrUnsupported, tensor.Quote(c.PeftType))
		}
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w", where, tensor.Quote(component), err)
		}
		if len(c.unknownFields) > 0 {
			a.Notices = append(a.Notices, fmt.Sprintf("%s has fields that are not known here, and are not looked at: %s", where,
				names(c.unknownFields)))
		}
		if !has[component] {
			a.Notices = append(a.Notices, fmt.Sprintf("%s has a config for %s, of which there are no tensors", where,
				tensor.Quote(component)))
			continue
		}
		if c.Residual() != "" {
			a.Config.Init = c.Init
		}
		a.Config.PeftVersion, a.Config.Base = c.PeftVersion, c.Base
		a.Config.RSLoRA = a.Config.RSLoRA || c.RSLoRA
		c.place = metadataName
		configs[component] = &c
	}
	for component := range has {
		if configs[component] == nil {
			return nil, fmt.Errorf("%s: %w: it has no config for %s, of which there are tensors", where, ErrMalformed,
				tensor.Quote(component))
		}
	}
	return configs, nil
}

// saysItsScaling reports whether an adapter in one file, whose factors have PEFT's names, can be read without a
// config: the file has alphas or configs, or its modules are those of a pipeline, where no alpha stands for a scaling
// of 1. PEFT's own files begin all names in one way, and their alpha is elsewhere.
func saysItsScaling(tensors []formats.Tensor, metadata formats.Metadata) bool {
	if metadata.Get(metadataName) != nil {
		return true
	}
	if slices.ContainsFunc(tensors, func(t formats.Tensor) bool { return strings.HasSuffix(t.Name, ".alpha") }) {
		return true
	}
	pipeline := false
	for i := range tensors {
		module, slot := factorOf(tensors[i].Name)
		if slot == nil {
			continue
		}
		component, within := cutComponent(module)
		_, known := models.DiffusersComponent(within)
		if strings.HasPrefix(within, peftPrefix) || component == "" && !known && !isOriginal(within) {
			return false
		}
		pipeline = true
	}
	return pipeline
}

// encodeDiffusers writes one file for diffusers' load_lora_weights. The scaling goes into B: not all that read such
// files look for an alpha or for a config.
func (a *Adapter) encodeDiffusers(experts string) (*Encoded, error) {
	e := &Encoded{Format: "safetensors", Metadata: formats.Texts(map[string]string{"format": "pt"})}
	modules, err := a.singles(Diffusers, experts)
	if err != nil {
		return nil, err
	}
	if modules, err = dotted(modules); err != nil {
		return nil, err
	}
	if modules, err = a.inDiffusers(modules, e); err != nil {
		return nil, err
	}
	written := map[string]bool{}
	for _, m := range modules {
		name := join(m.Component, m.within())
		var out []Output
		switch {
		case m.Form == Bias:
			out = []Output{output(name+".lora_B.bias", matrixOf(m.Value), m.Value.Shape...).scaled(m.Scaling)}
		case m.Form == Replace && slices.ContainsFunc(controlNorms, func(end string) bool {
			return strings.HasSuffix(name+"."+m.Param, end)
		}):
			out = []Output{asItIs(name+"."+m.Param, m.Value)}
		case m.Form == Linear || m.Form == Conv:
			down, up := m.factorShapes()
			out = []Output{output(name+".lora_A.weight", m.A, down...), output(name+".lora_B.weight", m.B,
				up...).scaled(m.Scaling)}
			if m.Magnitude != nil {
				out = append(out, asItIs(name+".lora_magnitude_vector", m.Magnitude))
			}
		default:
			return nil, noPlace(m, m.what(), Diffusers)
		}
		for _, o := range out {
			if written[o.Name] {
				return nil, fmt.Errorf("module %s: %w: another module is called so in diffusers", tensor.Quote(m.Name),
					ErrUnsupported)
			}
			written[o.Name] = true
		}
		e.Tensors = append(e.Tensors, out...)
	}
	return e, nil
}
