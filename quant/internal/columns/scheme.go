package columns

import (
	"context"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Config is a quantization_config of a method.
type Config interface {
	// Method is its quant_method, which is the name of the one type too, and what it does that rounding does not.
	Method() (name, does string)
	// ConfigFiles are files beside the weights that say the same.
	ConfigFiles() []string
	// Unread is the layout of what is not read.
	Unread() quant.Layout
	// Layout is that of a module.
	Layout(m Module, s quant.Stored) (Layout, error)
}

// Scheme is the quant.Scheme of a method whose quantization_config is a C. It is read only: what makes such weights is
// how their integers are chosen, by what they do to activations.
type Scheme[C any, P interface {
	*C
	Config
}] struct{}

// Name returns the quant_method of a config.json.
func (Scheme[C, P]) Name() string {
	name, _ := P(new(C)).Method()
	return name
}

// ConfigFiles names the files of the method's programs.
func (Scheme[C, P]) ConfigFiles() []string { return P(new(C)).ConfigFiles() }

// Types lists the one type.
func (s Scheme[C, P]) Types() []quant.Type { return []quant.Type{{Name: s.Name(), ReadOnly: true}} }

// Spec refuses: nothing is written.
func (s Scheme[C, P]) Spec(typ string, _ quant.Params) (quant.Spec, error) {
	if typ != s.Name() {
		return quant.Spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, typ)
	}
	return quant.Spec{}, s.notWritten()
}

// Encoder refuses.
func (s Scheme[C, P]) Encoder(context.Context, quant.Spec, tensor.Info) (quant.Encoder, error) {
	return nil, s.notWritten()
}

// Config refuses.
func (s Scheme[C, P]) Config([]quant.Assigned, []string) (key string, object []byte, err error) {
	return "", nil, s.notWritten()
}

func (Scheme[C, P]) notWritten() error {
	name, does := P(new(C)).Method()
	err := fmt.Errorf("%w to %s: it is read only, since %s and rounding alone is not what the name promises",
		quant.ErrUnsupported, name, does)
	return hint.With(err, hint.Hint{Option: "Quantize", Value: "w4a16", Effect: "writes groups of 4 bits by rounding"})
}

// parse reads a quantization_config. It reports false for another scheme's. A member of another kind than it has is an
// error.
func (s Scheme[C, P]) parse(b []byte) (c P, ours bool, err error) {
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(b, &named) != nil || named.Method != s.Name() {
		return nil, false, nil
	}
	c = new(C)
	if err := json.Unmarshal(b, c); err != nil {
		return nil, true, fmt.Errorf("config.json: quantization_config: %w: %s", quant.ErrMalformed,
			strings.Join(strings.Fields(err.Error()), " "))
	}
	return c, true, nil
}

// Declaration knows a quantization_config of the method. Which modules stay plain it need not say: loaders take those
// that have a qweight.
func (s Scheme[C, P]) Declaration(b []byte) (quant.Declaration, bool) {
	c, ok, err := s.parse(b)
	d := quant.Declaration{Unsaid: true}
	if ok && err == nil { // else Find says what is wrong
		d.Unread = c.Unread()
	}
	return d, ok
}

// Find returns the weights whose integers are M.qweight, where config.json says that they are the method's.
func (s Scheme[C, P]) Find(ctx context.Context, stored quant.Stored) ([]quant.Decoder, error) {
	c, ok, err := s.parse(quant.Quantization(stored.Config()))
	if err != nil {
		return nil, err
	}
	if !ok || c.Unread() != (quant.Layout{}) {
		return nil, nil
	}
	return quant.FindEach(ctx, stored, func(t tensor.Info) (quant.Decoder, error) { return find(t, stored, c) })
}
