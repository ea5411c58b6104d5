package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/parallel"
	"github.com/lorakit/lorakit/models"
)

// Problem is one thing that is wrong with a checkpoint.
type Problem struct {
	Tensor string `json:"tensor"`
	What   string `json:"what"`
}

// Verification is what Verify finds.
type Verification struct {
	Tensors  int       `json:"tensors"`
	Problems []Problem `json:"problems"`
}

// Verify reads every weight through its scheme. A problem is a value that is not finite, a weight that cannot be read,
// or one that config.json declares in another form than it has; of a GGUF file also keys that contradict themselves or
// the tensors.
func Verify(ctx context.Context, c *Checkpoint) (*Verification, error) {
	found := make([]string, len(c.Weights))
	err := parallel.Each(ctx, len(c.Weights), 0, func(ctx context.Context, i int) (err error) {
		found[i], err = verifyWeight(ctx, c.Weights[i])
		return err
	})
	if ctx.Err() != nil {
		return nil, ErrInterrupted
	}
	if err != nil {
		return nil, err
	}
	expected := c.expectations()
	v := &Verification{Tensors: len(c.Weights), Problems: []Problem{}}
	if c.NamedByGGUF() {
		_, err := c.restored(ctx, RestoreOptions{Tokenizer: true})
		if err != nil && !errors.Is(err, formats.ErrUnsupported) { // what is not known here is no fault
			v.Problems = append(v.Problems, Problem{What: err.Error()})
		}
	}
	for i, w := range c.Weights {
		for _, what := range []string{found[i], expected.mismatch(w)} {
			if what != "" {
				v.Problems = append(v.Problems, Problem{Tensor: w.Name, What: what})
			}
		}
	}
	return v, nil
}

// verifyWeight reads a weight from end to end. A damaged weight is a finding, and only an interruption an error.
func verifyWeight(ctx context.Context, w *Weight) (string, error) {
	n := w.Count()
	if !w.DType.Numeric() {
		return readAll(ctx, w)
	}
	r := float64Reader{w: w}
	bad, first := int64(0), int64(0)
	for lo := int64(0); lo < n; lo += w.step() {
		if ctx.Err() != nil {
			return "", ErrInterrupted
		}
		x, err := r.read(lo, min(lo+w.step(), n))
		if err != nil {
			return err.Error(), nil
		}
		for i, f := range x {
			if math.IsNaN(f) || math.IsInf(f, 0) {
				if bad == 0 {
					first = lo + int64(i)
				}
				bad++
			}
		}
	}
	if bad > 0 {
		return fmt.Sprintf("%d of %d elements are NaN or infinite, the first at %d", bad, n, first), nil
	}
	return "", nil
}

// readAll makes sure that the bytes of a weight are there.
func readAll(ctx context.Context, w *Weight) (string, error) {
	b := make([]byte, 256<<10)
	for i := range w.Parts {
		p := &w.Parts[i]
		for lo := int64(0); lo < p.Bytes; lo += int64(len(b)) {
			if ctx.Err() != nil {
				return "", ErrInterrupted
			}
			if err := ReadPart(p, b[:min(int64(len(b)), p.Bytes-lo)], lo); err != nil {
				return err.Error(), nil
			}
		}
	}
	return "", nil
}

// expectations are how a loader that has read config.json expects the weights to be stored.
type expectations struct {
	c         *Checkpoint
	quantised bool
	skips     func(module string) bool // nil leaves it to the loader
	experts   bool                     // whether they are quantised as well
}

func (c *Checkpoint) expectations() *expectations {
	if c.Config == nil || !c.Known || c.NamedByGGUF() {
		return nil
	}
	if _, foreign := c.ForeignScheme(); foreign {
		return nil
	}
	p, _ := c.declaration()
	if p.Unsaid {
		return nil
	}
	return &expectations{c: c, quantised: c.Config.Quantization != nil, skips: p.Skips, experts: p.Experts}
}

// mismatch says how a weight is stored otherwise than expected, or nothing.
func (e *expectations) mismatch(w *Weight) string {
	if e == nil {
		return ""
	}
	declared := false
	module, one := strings.CutSuffix(w.Name, ".weight")
	switch {
	case !e.quantised:
	case e.experts && w.Role.Kind == models.Expert:
		declared = e.skips == nil || !e.skips(module) && !slices.ContainsFunc(w.Modules(), e.skips)
	case e.skips == nil:
		declared = w.Role.Quantized
	case w.Role.Kind == models.Linear || w.Role.Kind == models.Conv1D:
		declared = !w.Role.KeepFloat32 && !slices.ContainsFunc(w.Modules(), e.skips)
	}
	// Of experts with a tensor each, loaders differ; what config.json does not skip may be quantised.
	free := one && w.Role.Kind == models.Expert && e.quantised && e.skips != nil && !e.skips(module)
	switch stored := w.Decoder != nil; {
	case stored && !declared && !free:
		return fmt.Sprintf("it is stored as %s, expected plain by config.json", w.Decoder.Spec())
	case declared && !stored && w.Count() > 0:
		return fmt.Sprintf("it is stored as plain %v, expected quantised by the quantization_config of config.json", w.DType)
	}
	return ""
}
