package main

import (
	"context"
	"fmt"

	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// scheme is the sdk.EncodingScheme of hqq.
type scheme struct{}

const (
	typeName     = "hqq"
	defaultGroup = 64
)

// Info says that there is one type, whose block size is what hqq calls group_size.
func (scheme) Info() sdk.SchemeInfo {
	return sdk.SchemeInfo{
		Name: "hqq", Types: []string{typeName}, Parameters: []string{sdk.BlockSize}, Suffixes: []string{codesName},
		Notices: []string{"hqq: each value is rounded to the nearest that its group has; hqq itself then moves the zeros " +
			"to make large errors fewer, which is not done here"},
	}
}

// spec is how a weight with such groups is quantised.
func spec(group int64) quant.Spec {
	return quant.Spec{Type: typeName, Params: quant.Params{{Name: sdk.BlockSize, Value: group}}}
}

// groupOf is the group size of a spec, 64 by default.
func groupOf(s quant.Spec) (int64, error) {
	group := int64(defaultGroup)
	if s.Params.Get(sdk.BlockSize) != nil {
		group = s.Params.Int(sdk.BlockSize)
	}
	if err := checkGroup(group); err != nil {
		return 0, fmt.Errorf("%w: %s is %w", quant.ErrParameter, sdk.BlockSize, err)
	}
	return group, nil
}

// Find returns the weights among the tensors that are stored in HQQ.
func (scheme) Find(ctx context.Context, s quant.Stored) ([]sdk.Decoder, error) {
	var found []sdk.Decoder
	for _, t := range s.Tensors() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		w, err := open(t.Name, s)
		if err != nil {
			return nil, err
		}
		if w != nil {
			found = append(found, w.decoder())
		}
	}
	return found, nil
}

func (w *weight) decoder() sdk.Decoder {
	d := sdk.Decoder{Info: w.info, Spec: spec(w.group), Unit: w.group}
	rules := w.rules()
	for i, p := range w.parts {
		part := sdk.Part{Name: p.Name}
		if i < partSettings {
			part.Rule = rules[i]
		} else {
			part.First = int64(len(p.data)) // a tile needs nothing of it
		}
		d.Parts = append(d.Parts, part)
	}
	d.Decode = func(dst []byte, lo, _ int64, parts [][]byte) error {
		return w.decode(dst, lo/w.group, parts[partCodes], parts[partScale], parts[partZero])
	}
	return d
}

// Encoder prepares to quantise a weight to nearest.
func (scheme) Encoder(_ context.Context, s quant.Spec, t tensor.Info) (*sdk.Encoder, error) {
	group, err := groupOf(s)
	if err != nil {
		return nil, err
	}
	w, err := plan(t, group)
	if err != nil {
		return nil, fmt.Errorf("%w to hqq: %w", quant.ErrUnsupported, err)
	}
	e := &sdk.Encoder{Unit: group, Carry: group / wordCodes}
	rules := w.rules()
	for i, p := range w.parts {
		out := sdk.Output{Info: p.Info}
		if i == partScale || i == partZero {
			out.Rule = rules[i]
		}
		e.Outputs = append(e.Outputs, out)
	}
	e.Encode = func(out [][]byte, carry []float32, lo, _ int64, values []byte) error {
		bad, err := w.encode(carry, out[partScale], out[partZero], values)
		if err == nil && bad >= 0 && !s.AllowNonFinite {
			err = &quant.NonFiniteError{Index: lo + bad, What: "NaN, infinity or a range past the largest float32"}
		}
		return err
	}
	e.Finish = func(carry quant.Deferred, write func(output int, off int64, p []byte) error) error {
		return w.finish(carry.ReadFloats, write)
	}
	return e, nil
}

// Config returns the quantization_config that transformers writes, keys sorted.
func (scheme) Config(_ context.Context, s quant.Spec, skip []string) ([]byte, error) {
	group, err := groupOf(s)
	if err != nil {
		return nil, err
	}
	return config(group, skip)
}
