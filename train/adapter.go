package train

import (
	"context"
	"fmt"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// adapter is the adapter of a step: its tensors, and what they do to the parameters of the model.
//
// Of a tied model the embedding and the output head are two parameters here: what is under the name of one does nothing
// to the other. An end that has no adaptation is the base's matrix, whatever the other one is. Rows of the embedding
// that are trained are under both names where PEFT ties them, with one trainable.
type adapter struct {
	trainables []*trainable           // in the order of the file
	params     map[string]*adaptation // by run-time parameter, a bias that the model does not have included
	notices    []string

	of     *lora.Adapter
	stored []stored
}

// stored is a tensor of the adapter's file: the values of a trainable, or a copy of what the base has.
type stored struct {
	*formats.Tensor
	trainable *trainable // nil for what is not trained
	copied    bool       // it stands for a value of the base
}

// openAdapter reads the headers of an adapter of PEFT and finds what each of its tensors is for. The base is the files
// that the model is read from, which may lie in the adapter's folder. Nothing of an adapter is passed over: what the
// step cannot train, or would train otherwise than PEFT, is lora.ErrUnsupported, what does not fit the model
// lora.ErrBase, and what contradicts itself lora.ErrMalformed.
func openAdapter(ctx context.Context, path string, o storage.Options, params []param, model *models.Model,
	base ...string) (*adapter, error) {
	dir, name, err := storage.Resolve(path, o)
	if err != nil {
		return nil, err
	}
	of, err := lora.OpenIn(ctx, dir, name, lora.OpenOptions{})
	if err != nil {
		return nil, err
	}
	a := &adapter{params: map[string]*adaptation{}, of: of}
	err = of.CheckBeside(base...)
	if err == nil {
		err = a.trained()
	}
	if err == nil {
		err = a.bind(params, model)
	}
	if err != nil {
		of.Close()
		return nil, err
	}
	return a, nil
}

// Close closes the adapter's files.
func (a *adapter) Close() error { return a.of.Close() }

func (a *adapter) refused(kind error, format string, args ...any) error {
	return fmt.Errorf("%s: %w: %s", a.of.Path, kind, fmt.Sprintf(format, args...))
}

// trained refuses what PEFT does not train, or the step does not.
func (a *adapter) trained() error {
	c := &a.of.Config
	switch start := c.Residual(); {
	case a.of.Dialect != lora.PEFT:
		return a.refused(lora.ErrUnsupported, "it is an adapter of %s, expected one of PEFT (adapter_config.json, "+
			"adapter_model.safetensors)", a.of.Dialect)
	case c.PeftType != "" && c.PeftType != "LORA":
		return a.refused(lora.ErrUnsupported, "its peft_type is %s, expected LORA", c.PeftType)
	case start != "":
		return a.refused(lora.ErrUnsupported, "init_lora_weights is %s, whose deltas are for the base without the part it "+
			"started from: expected the base that unmerge makes by taking that part out, and an adapter whose "+
			"init_lora_weights is true", tensor.Quote(start))
	case strings.EqualFold(string(c.Init), `"mica"`):
		return a.refused(lora.ErrUnsupported, "init_lora_weights is mica, with which PEFT trains A and leaves B as it is")
	case c.LoraBias && c.DoRA:
		return a.refused(lora.ErrUnsupported, "lora_bias and use_dora are both true, which PEFT refuses")
	case c.LoraBias && len(c.Init) > 0 && c.Init.Kind() != 't' && c.Init.Kind() != 'f':
		return a.refused(lora.ErrUnsupported, "lora_bias is true and init_lora_weights is %s, which PEFT refuses, expected "+
			"true or false", tensor.Quote(string(c.Init)))
	}
	for _, m := range a.of.Modules {
		switch {
		case m.Form == lora.Embedding && c.LoraBias:
			return a.refused(lora.ErrUnsupported, "module %s: lora_bias on an embedding, which PEFT refuses",
				tensor.Quote(m.String()))
		case m.Form == lora.Conv || m.Form == lora.Scale || m.Form == lora.Transformed:
			return a.refused(lora.ErrUnsupported, "module %s: it is a %s, expected linear layers, embeddings and parameters",
				tensor.Quote(m.String()), m.Form)
		}
	}
	return nil
}

// parameters is the number of elements that are trained, those that two trainables share counted once.
func (a *adapter) parameters() int64 {
	n := int64(0)
	for _, t := range a.trainables {
		if t.shares == nil {
			n += t.count()
		}
	}
	return n
}

// count is the number of a trainable's elements.
func (t *trainable) count() int64 { return tensor.Info{Shape: t.shape}.Count() }

// bytes is what load asks for, known from the headers: by category, in bytes.
func (a *adapter) bytes() map[string]int64 {
	n := map[string]int64{}
	a.each(func(category string, count int64) { n[category] += 4 * count })
	return n
}

// The categories of the adapter's memory.
const (
	weightBytes   = "weights"
	gradientBytes = "gradients"
	momentBytes   = "moments"
)

// each lists the slices that load asks for.
func (a *adapter) each(ask func(category string, count int64)) {
	for _, t := range a.trainables {
		if t.shares == nil {
			ask(weightBytes, t.count())
		}
		ask(gradientBytes, t.count())
		ask(momentBytes, 2*t.count())
	}
}

// load reads the values, as float32 whatever their type is in the file, into slices that alloc makes, of zeros; the
// categories are those of bytes. A NaN or an infinity is lora.ErrMalformed.
func (a *adapter) load(ctx context.Context, alloc func(category string, n int) []float32) error {
	for _, s := range a.stored {
		if err := ctx.Err(); err != nil {
			return err
		}
		t := s.trainable
		if t == nil || t.value != nil || t.shares != nil {
			continue
		}
		t.value = alloc(weightBytes, int(s.Count()))
		if err := lora.ReadFloats(t.value, s.Tensor); err != nil {
			return err
		}
	}
	for _, t := range a.trainables {
		if t.shares != nil {
			t.value = t.shares.value
		}
		n := int(t.count())
		t.gradient = alloc(gradientBytes, n)
		moments := alloc(momentBytes, 2*n)
		t.first, t.second = moments[:n:n], moments[n:]
	}
	return nil
}
