package pipeline

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterInput is an adapter that a plan merges, and the files it was read from.
type AdapterInput struct {
	Path   string  `json:"path"`
	Dir    string  `json:"dir"` // the folder of Files
	Weight float64 `json:"weight"`
	// What was said of it that its files do not tell.
	Alpha        float64     `json:"alpha,omitempty"`
	ExpertLayout string      `json:"expert_layout,omitempty"`
	Files        []InputFile `json:"files"`
}

func (a *AdapterInput) names() []string {
	var names []string
	for _, f := range a.Files {
		names = append(names, f.Name)
	}
	return names
}

// adapterFiles looks at the files of an adapter.
func adapterFiles(dir string, names []string) ([]InputFile, error) {
	var files []InputFile
	for _, name := range names {
		path, err := storage.Within(dir, name)
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		files = append(files, inputFile(name, info))
	}
	return files, nil
}

// merging is what adapters do to a weight.
type merging struct {
	*lora.Change
	base *Weight // as it was, nil where the weight is new
}

// Merge makes the weights of c what they are with the adapters added, in their order. Nothing
// is read but headers; a plan made of c then adds the deltas on the way.
func (c *Checkpoint) Merge(adapters []lora.Weighted) error {
	targets := make([]lora.Target, len(c.Weights))
	for i, w := range c.Weights {
		targets[i] = lora.Target{Name: w.Name, Shape: w.Shape, Role: w.Role}
	}
	b, err := lora.Bind(adapters, targets, c.Model)
	if err != nil {
		return fmt.Errorf("%s: %w", c.Path, err)
	}
	for _, a := range adapters {
		files, err := adapterFiles(a.Dir, a.Files)
		if err != nil {
			return err
		}
		c.adapters = append(c.adapters, AdapterInput{Path: a.Path, Dir: a.Dir, Weight: a.Weight, Alpha: a.Options.Alpha, ExpertLayout: a.Options.ExpertLayout, Files: files})
	}
	weights := slices.Clone(c.Weights)
	for i, change := range b.Changes {
		if change != nil {
			weights[i] = c.changed(c.Weights[i], change)
		}
	}
	if b.Head != nil {
		from := *c.Weights[b.HeadFrom]
		from.Name = b.HeadName
		from.Role = c.Model.Tensor(b.HeadName, from.Shape)
		weights = append(weights, c.changed(&from, b.Head))
		c.head, c.headFrom = b.HeadName, c.Weights[b.HeadFrom].Name
	}
	for _, p := range b.Copies {
		from := *c.Weights[p.From]
		from.Name = p.Name
		from.Role = c.Model.Tensor(p.Name, from.Shape)
		from.Parts = slices.Clone(from.Parts)
		if len(from.Parts) == 1 {
			from.Parts[0].Name = p.Name
		}
		w := &from
		if p.Change != nil || len(from.Parts) > 1 { // a quantised one is decoded
			w = c.changed(w, cmp.Or(p.Change, &lora.Change{Width: from.Shape[len(from.Shape)-1]}))
		}
		weights = append(weights, w)
	}
	if b.Untie {
		c.untied = true
		for _, w := range weights {
			w.Role.Tied = ""
		}
	}
	c.Weights, c.mergeNotices = weights, b.Notices
	c.growLogitsBias()
	return nil
}

// growLogitsBias makes the bias of the logits as long as a vocabulary that has grown, with zeros as
// transformers does it. An adapter does not bring it.
func (c *Checkpoint) growLogitsBias() {
	if c.vocabularyWas == 0 || c.vocabulary <= c.vocabularyWas {
		return
	}
	for i, w := range c.Weights {
		last := len(w.Shape) - 1
		if w.Name != c.Model.LogitsBias() || last < 0 || w.Count() != c.vocabularyWas || w.Shape[last] != c.vocabularyWas || w.merge != nil || w.Decoder != nil || !numeric(w.DType) {
			continue
		}
		n, part := *w, w.Parts[0]
		n.Shape = slices.Clone(w.Shape)
		n.Shape[last] = c.vocabulary
		part.Shape, part.Bytes = n.Shape, w.Parts[0].Bytes/c.vocabularyWas*c.vocabulary
		part.Data, part.Offset = padded{io.NewSectionReader(part.Data, part.Offset, w.Parts[0].Bytes), part.Bytes}, 0
		n.Parts = []formats.Tensor{part}
		c.Weights[i] = &n
		c.mergeNotices = append(c.mergeNotices, fmt.Sprintf("%s grows from %d to %d values with the vocabulary: those that are new are 0", w.Name, c.vocabularyWas, c.vocabulary))
	}
}

// padded are bytes with zeros behind them, n in all.
type padded struct {
	of *io.SectionReader
	n  int64
}

// ReadAt reads both.
func (p padded) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 || off >= p.n {
		return 0, io.EOF
	}
	short := int64(len(b)) > p.n-off
	b = b[:min(int64(len(b)), p.n-off)]
	own := min(max(p.of.Size()-off, 0), int64(len(b)))
	if n, err := p.of.ReadAt(b[:own], off); int64(n) < own {
		return n, err
	}
	clear(b[own:])
	if short {
		return len(b), io.EOF
	}
	return len(b), nil
}

// changed is a weight with a change.
func (c *Checkpoint) changed(w *Weight, change *lora.Change) *Weight {
	n := *w
	n.merge = &merging{change, w}
	if v := change.Value; v != nil {
		n.Parts, n.Decoder, n.Values, n.Transposed = []formats.Tensor{*v}, nil, v.DType, false
		n.Shape = v.Shape
		if len(v.Shape) == 2 && v.Shape[0] != w.Shape[0] {
			c.vocabulary, c.vocabularyWas = v.Shape[0], w.Shape[0]
		}
	}
	return &n
}

// transposed is the change of a weight of the given shape that is turned round before it
// is written.
func (m *merging) transposed(shape tensor.Shape) *merging {
	c := *m.Change
	c.Width = shape[0]
	c.Terms = slices.Clone(m.Terms)
	for i := range c.Terms {
		t := &c.Terms[i]
		t.Row, t.Rows, t.Col, t.Cols = t.Col, t.Cols, t.Row, t.Rows
		t.Left, t.Right = t.Right.Transposed(), t.Left.Transposed()
		t.Hadamard = lora.Transposed(t.Hadamard)
		t.OutputRows = !t.OutputRows
	}
	return &merging{&c, m.base}
}
