package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// AdapterInput is an adapter that a plan merges, and the files it was read from.
type AdapterInput struct {
	Path   string `json:"path"`
	Dir    string `json:"dir"` // the folder of Files, in messages
	dir    storage.Folder
	Weight float64 `json:"weight"`
	// What was said of it that its files do not tell.
	Alpha        float64     `json:"alpha,omitempty"`
	ExpertLayout string      `json:"expert_layout,omitempty"`
	Component    string      `json:"component,omitempty"`
	Files        []InputFile `json:"files"`
}

func (a *AdapterInput) names() []string {
	var names []string
	for _, f := range a.Files {
		names = append(names, f.Name)
	}
	return names
}

// folder is where the files are, also of an adapter of a plan that was read back.
func (a *AdapterInput) folder() storage.Folder {
	if a.dir != nil {
		return a.dir
	}
	return storage.Local(a.Dir, storage.Options{})
}

// adapterFiles looks at the files of an adapter.
func adapterFiles(ctx context.Context, dir storage.Folder, names []string) ([]InputFile, error) {
	var files []InputFile
	for _, name := range names {
		in, err := inputFileIn(ctx, dir, name)
		if err != nil {
			return nil, err
		}
		files = append(files, in)
	}
	return files, nil
}

// Weight is a weight of a Merged: one of the base, or one that adapters bring.
type Weight struct {
	*checkpoint.Weight
	// Change is what adapters do to it, nil where that is nothing.
	Change *lora.Change
	base   *checkpoint.Weight // of a Change: as it was

	// pieces are what the weight is put together of where adapters change some of it; shift is added to each value.
	pieces []piece
	shift  float32
	like   *checkpoint.Weight // that it stands for, whose type it keeps, where that is another
	made   []string           // the names of the weights that it is made of, where they are others
}

// metadata are those that are written with the tensors.
func (m *Merged) metadata() formats.Metadata {
	if m.gguf != nil {
		return m.gguf.keys
	}
	return m.Base.Metadata()
}

// stored is the weight as it is in its file, or as it will be.
func (w *Weight) stored() *checkpoint.Weight {
	if w.like != nil {
		return w.like
	}
	return w.Weight
}

// changed reports whether adapters change the weight.
func (w *Weight) changed() bool { return w.Change != nil || len(w.pieces) > 0 }

// Merged is a checkpoint with adapters added, or as it is: what a plan is made of. The checkpoint itself does not
// change, and nothing is read but headers; a plan adds the deltas on the way.
type Merged struct {
	Base     *checkpoint.Checkpoint
	Adapters []AdapterInput
	// Weights are those of the base, in their order, then those that the adapters bring.
	Weights []*Weight
	// Head is an output head that becomes a tensor of its own, and HeadFrom what it was tied to; else both are empty.
	Head, HeadFrom string
	// Untied says that the output head is no longer tied to the embedding.
	Untied bool
	// Vocabulary is the number of rows that an adapter brings where it had VocabularyWas; else both are 0.
	Vocabulary, VocabularyWas int64
	// Notices say, in a sentence each, what the user should know.
	Notices []string

	gguf *inGGUF // where the weights are as llama.cpp has them, else nil
}

// Plain returns a checkpoint as it is, with nothing merged.
func Plain(c *checkpoint.Checkpoint) *Merged {
	m := &Merged{Base: c, Weights: make([]*Weight, len(c.Weights))}
	for i, w := range c.Weights {
		m.Weights[i] = &Weight{Weight: w}
	}
	return m
}

// Merge adds adapters, in their order, to a checkpoint.
func Merge(ctx context.Context, c *checkpoint.Checkpoint, adapters []lora.Weighted) (*Merged, error) {
	if err := c.CheckReadable(); err != nil {
		return nil, err
	}
	targets := make([]lora.Target, len(c.Weights))
	for i, w := range c.Weights {
		targets[i] = lora.Target{Name: w.Name, Shape: w.Shape, Role: w.Role}
	}
	for _, a := range adapters {
		if err := a.CheckBeside(c.Paths()...); err != nil {
			return nil, err
		}
	}
	b, err := lora.Bind(adapters, targets, c.Model)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Path, err)
	}
	m := Plain(c)
	m.Notices = b.Notices
	for _, a := range adapters {
		files, err := adapterFiles(ctx, a.Dir, a.Files)
		if err != nil {
			return nil, err
		}
		m.Adapters = append(m.Adapters, AdapterInput{
			Path: a.Path, Dir: a.Dir.Path(""), dir: a.Dir, Weight: a.Weight, Alpha: a.Options.Alpha,
			ExpertLayout: a.Options.ExpertLayout, Component: a.Options.Component, Files: files,
		})
	}
	for i, change := range b.Changes {
		if change == nil {
			continue
		}
		if w := c.Weights[i]; w.Decoder == nil && !w.DType.Numeric() && change.Value == nil {
			return nil, fmt.Errorf("%s: %w", c.Path,
				w.Failed(fmt.Errorf("%w: it is stored as %v, to which only the scales of a "+
					"scheme give a meaning, expected F64, F32, F16, BF16 or a scheme that is read: %s", ErrRefused, w.DType,
					strings.Join(c.Schemes.Names(), ", "))))
		}
		m.Weights[i] = m.changed(c.Weights[i], change)
	}
	if b.Head != nil {
		from := *c.Weights[b.HeadFrom]
		from.Name = b.HeadName
		from.Role = c.Model.Tensor(b.HeadName, from.Shape)
		m.Weights = append(m.Weights, m.changed(&from, b.Head))
		m.Head, m.HeadFrom = b.HeadName, c.Weights[b.HeadFrom].Name
	}
	for _, p := range b.Copies {
		from := *c.Weights[p.From]
		from.Name = p.Name
		from.Role = c.Model.Tensor(p.Name, from.Shape)
		from.Parts = slices.Clone(from.Parts)
		if len(from.Parts) == 1 {
			from.Parts[0].Name = p.Name
		}
		w := &Weight{Weight: &from}
		if p.Change != nil || len(from.Parts) > 1 { // a quantised one is decoded
			w = m.changed(&from, cmp.Or(p.Change, &lora.Change{Width: from.Shape[len(from.Shape)-1]}))
		}
		m.Weights = append(m.Weights, w)
	}
	if b.Untie {
		m.Untied = true
		for _, w := range m.Weights {
			untied := *w.Weight
			untied.Role.Tied = ""
			w.Weight = &untied
		}
	}
	m.growLogitsBias()
	return m, nil
}

// edits are what adapters change in config.json.
func (m *Merged) edits() []models.Edit {
	var edits []models.Edit
	if m.Untied {
		for _, path := range m.Base.Model.TieSwitches() {
			edits = append(edits, models.SetAt(path, []byte("false")))
		}
	}
	if m.Vocabulary > 0 {
		for _, path := range m.Base.Config.VocabularyPaths(m.VocabularyWas) {
			edits = append(edits, models.SetAt(path, strconv.AppendInt(nil, m.Vocabulary, 10)))
		}
	}
	return edits
}

// config is that of the base, with what adapters change in it.
func (m *Merged) config() (*models.Config, error) {
	edits := m.edits()
	if len(edits) == 0 {
		return m.Base.Config, nil
	}
	b, err := models.EditConfig(m.Base.ConfigJSON, edits...)
	if err != nil {
		return nil, err
	}
	return models.ParseConfig(b)
}

// changed is a weight with a change.
func (m *Merged) changed(w *checkpoint.Weight, change *lora.Change) *Weight {
	n := *w
	if v := change.Value; v != nil {
		n.Parts, n.Decoder, n.Values, n.Transposed = []formats.Tensor{*v}, nil, v.DType, false
		n.Shape = v.Shape
		if v.DType.Integer() && v.DType == w.DType && len(change.Updates) == 0 {
			n.Parts[0].Name = w.Name // as a count that a batch norm keeps: its bytes are copied
			return &Weight{Weight: &n}
		}
		if len(v.Shape) == 2 && v.Shape[0] != w.Shape[0] {
			m.Vocabulary, m.VocabularyWas = v.Shape[0], w.Shape[0]
		}
	}
	return &Weight{Weight: &n, Change: change, base: w}
}

// transposed is the change of a weight of the given shape that is turned round before it is written.
func transposed(change *lora.Change, shape tensor.Shape) *lora.Change {
	c := *change
	c.Width = shape[0]
	c.Updates = slices.Clone(change.Updates)
	for i := range c.Updates {
		t := &c.Updates[i]
		t.Row, t.Rows, t.Col, t.Cols = t.Col, t.Cols, t.Row, t.Rows
		t.Left, t.Right = t.Right.Transposed(), t.Left.Transposed()
		t.Hadamard, t.Waves = lora.Transposed(t.Hadamard), t.Waves.Transposed()
		t.OutputRows = !t.OutputRows
	}
	return &c
}

// growLogitsBias makes the bias of the logits as long as a vocabulary that has grown, with zeros as transformers does
// it. An adapter does not bring it.
func (m *Merged) growLogitsBias() {
	was, now := m.VocabularyWas, m.Vocabulary
	if was == 0 || now <= was {
		return
	}
	for i, w := range m.Weights {
		last := len(w.Shape) - 1
		if w.Name != m.Base.Model.LogitsBias() || last < 0 || w.Count() != was || w.Shape[last] != was ||
			w.Change != nil || w.Decoder != nil || !w.DType.Numeric() {
			continue
		}
		n, part := *w.Weight, w.Parts[0]
		n.Shape = slices.Clone(w.Shape)
		n.Shape[last] = now
		part.Shape, part.Bytes = n.Shape, w.Parts[0].Bytes/was*now
		part.Data, part.Offset = padded{io.NewSectionReader(part.Data, part.Offset, w.Parts[0].Bytes), part.Bytes}, 0
		n.Parts = []formats.Tensor{part}
		m.Weights[i] = &Weight{Weight: &n}
		m.Notices = append(m.Notices, fmt.Sprintf(
			"%s grows from %d to %d values with the vocabulary: those that are new are 0", w.Name, was, now))
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
