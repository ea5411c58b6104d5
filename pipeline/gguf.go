package pipeline

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/models/tokenizer"
	"github.com/lorakit/lorakit/tensor"
)

// inGGUF is what a Merged is beside its weights, where these have the names and layouts of llama.cpp.
type inGGUF struct {
	keys     formats.Metadata
	own      bool     // they are those of a GGUF file that is read
	targets  []target // of the weights, in their order
	consumed []InputFile
	lost     []*Weight // that adapters change, and that GGUF has no place for
}

// ToGGUF returns m as llama.cpp has it: other names and layouts of its weights, a type for each, and keys in place of
// config.json and the tokenizer. What has no model, or is a GGUF file as it is, keeps its names. Errors wrap
// ErrRefused, formats.ErrUnsupported or formats.ErrMalformed.
func (m *Merged) ToGGUF(ctx context.Context, o Options) (*Merged, error) {
	n, err := m.toGGUF(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.Base.Path, err)
	}
	return n, nil
}

func (m *Merged) toGGUF(ctx context.Context, o Options) (*Merged, error) {
	to := *m
	n := &to
	n.gguf = &inGGUF{}
	var err error
	switch origin := m.Base.Origin(); {
	case m.Base.NamedByGGUF():
		n.gguf.keys, n.gguf.own = m.Base.Metadata(), true
	case origin != nil:
		n.gguf.keys, n.gguf.own = origin.Metadata(), true
		err = putBack(n, m, origin)
	case m.Base.Config != nil && m.Base.Config.Architecture != "":
		err = forward(ctx, n, m, o)
	default:
		return m, nil // tensors that are no model
	}
	if err != nil {
		return nil, err
	}
	return n, n.chooseTypes(o)
}

// putBack makes n of m, whose checkpoint was restored from a GGUF file: weights are put back where they come from, and
// those that have not changed are the file's own.
func putBack(n, m *Merged, origin *checkpoint.Checkpoint) error {
	if m.Vocabulary > 0 {
		return fmt.Errorf("%w: the adapter brings %d tokens where there are %d, and the tokenizer in the file's keys does "+
			"not know them; merge it into a folder first, add its tokenizer, and convert that", ErrRefused, m.Vocabulary,
			m.VocabularyWas)
	}
	type place struct {
		of    *Weight
		view  tensor.View
		shift float32
	}
	places := map[*checkpoint.Weight][]place{}
	changed := map[*checkpoint.Weight]bool{}
	for _, w := range m.Weights {
		excerpts, shift := m.Base.Excerpts(w.Name)
		if len(excerpts) == 0 && w.Change != nil && w.Name != m.Head {
			return fmt.Errorf("tensor %s: %w: an adapter brings it, and the GGUF file has no such tensor", tensor.Quote(w.Name),
				ErrRefused)
		}
		for _, x := range excerpts {
			places[x.Weight] = append(places[x.Weight], place{w, x.View.Inverse(), shift})
			changed[x.Weight] = changed[x.Weight] || w.Change != nil
		}
	}
	n.Weights = make([]*Weight, len(origin.Weights))
	for i, w := range origin.Weights {
		n.Weights[i] = &Weight{Weight: w}
		if !changed[w] {
			continue
		}
		var pieces []piece
		shift := float32(0)
		for _, p := range places[w] {
			pieces = append(pieces, piece{p.of, p.view})
			shift = -p.shift
		}
		var err error
		if n.Weights[i], err = together(w.Info, pieces, shift); err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(w.Name), err)
		}
		n.Weights[i].like = w
	}
	if m.Head == "" {
		return nil
	}
	head, err := ownHead(m, origin)
	n.Weights = append(n.Weights, head)
	return err
}

// ownHead is the output head, which was the embedding, as a tensor of its own.
func ownHead(m *Merged, origin *checkpoint.Checkpoint) (*Weight, error) {
	config, err := m.config()
	if err != nil {
		return nil, err
	}
	byName := map[string]*Weight{}
	var infos []tensor.Info
	for _, w := range m.Weights {
		byName[w.Name] = w
		infos = append(infos, w.Info)
	}
	model, err := gguf.Forward(config, infos, gguf.Options{Type: gguf.F32})
	if err != nil {
		return nil, err
	}
	for _, t := range model.Tensors {
		if !slices.Contains(t.Sources, m.Head) {
			continue
		}
		head, err := madeOf(&t, byName, origin.Path)
		if err != nil {
			return nil, err
		}
		for _, w := range origin.Weights {
			if w.Name == embedding {
				head.like = w
			}
		}
		return head, nil
	}
	return nil, partedError(m.Head)
}

// partedError refuses an adapter that parts what an architecture has as one in llama.cpp.
func partedError(head string) error {
	return fmt.Errorf("tensor %s: %w: the adapter parts the output head from the embedding, and llama.cpp has them as "+
		"one in this architecture", tensor.Quote(head), ErrRefused)
}

// forward makes n of m: it makes GGUF's tensors and keys of a checkpoint of transformers.
func forward(ctx context.Context, n, m *Merged, o Options) error {
	c := m.Base
	infos := make([]tensor.Info, 0, len(m.Weights))
	byName := make(map[string]*Weight, len(m.Weights))
	add := func(w *Weight) {
		infos = append(infos, w.Info)
		byName[w.Name] = w
	}
	var calibration []string
	for _, w := range m.Weights {
		if w.Calibration {
			calibration = append(calibration, w.Name)
			continue
		}
		alien := func(p formats.Tensor) bool { return !gguf.Packs(c.Config, p.Name) }
		if w.Decoder == nil || w.Change != nil || slices.ContainsFunc(w.Parts, alien) {
			add(w)
			continue
		}
		for _, p := range w.Parts { // GGUF has the same codes
			add(&Weight{Weight: &checkpoint.Weight{Info: p.Info, Values: p.DType, Parts: []formats.Tensor{p}}})
		}
	}
	config, err := m.config()
	if err != nil {
		return err
	}
	options := gguf.Options{Type: gguf.F32}
	model, err := gguf.Forward(config, infos, options)
	if err != nil {
		return err
	}
	tokens, notes, err := tokenizerKeys(ctx, n, c, model, o, &options)
	if err != nil {
		return err
	}
	if options.Vocabulary > 0 {
		if model, err = gguf.Forward(config, infos, options); err != nil {
			return err
		}
	}
	for _, name := range model.Zeros {
		if err := checkZeros(byName[name]); err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
		}
	}
	tokens = slices.DeleteFunc(tokens, func(p formats.Pair) bool { return model.Keys.Get(p.Name) != nil })
	n.gguf.keys = slices.Concat(model.Keys, tokens)
	if n.gguf.keys.Get(nameKey) == nil {
		n.gguf.keys = append(n.gguf.keys, formats.Pair{Name: nameKey, Value: modelName(c)})
	}
	n.Notices = slices.Concat(m.Notices, model.Notices, notes)
	if len(calibration) > 0 {
		n.Notices = append(n.Notices, leftOut(calibration))
	}
	if err := n.drop(model.Dropped, byName, m.Head); err != nil {
		return err
	}
	n.Weights = nil
	for _, t := range model.Tensors {
		w, err := madeOf(&t, byName, c.Path)
		if err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
		}
		n.Weights = append(n.Weights, w)
	}
	return ctx.Err()
}

// drop notes what is not written.
func (m *Merged) drop(names []string, byName map[string]*Weight, head string) error {
	if len(names) == 0 {
		return nil
	}
	m.Notices = append(m.Notices, "not written, since GGUF has no place for it: "+list(names, 3))
	var lost []string
	for _, name := range names {
		w := byName[name]
		if w.Change == nil {
			continue
		}
		if name == head {
			return partedError(name)
		}
		m.gguf.lost = append(m.gguf.lost, w)
		lost = append(lost, name)
	}
	if len(lost) > 0 {
		m.Notices = append(m.Notices, "adapters change what is not written, and that part of them is not in the result: "+
			list(lost, 3))
	}
	return nil
}

const nameKey = "general.name"

// modelName is what a model is called: its folder.
func modelName(c *checkpoint.Checkpoint) string {
	path, err := filepath.Abs(c.Path)
	if err != nil {
		path = c.Path
	}
	name := strings.ToValidUTF8(filepath.Base(path), "_")
	return cmp.Or(strings.Trim(name, `/\.`), "model")
}

// tokenizerKeys makes the keys of the tokenizer in a checkpoint's folder, and finds how many rows of the embedding have
// tokens where an architecture wants to know.
func tokenizerKeys(ctx context.Context, n *Merged, c *checkpoint.Checkpoint, model *gguf.Model, o Options,
	options *gguf.Options) (keys formats.Metadata, notes []string, err error) {
	files := tokenizer.Files{}
	for _, f := range c.InnerFiles() {
		if tokenizer.Reads(f.Name) {
			files[f.Name] = f.Data
		}
	}
	if c.Folder {
		there, _, err := filesToCopy(ctx, c.Dir, c.Formats, nil)
		if err != nil {
			return nil, nil, err
		}
		for _, in := range there {
			if !tokenizer.Reads(in.Name) {
				continue
			}
			if files[in.Name], err = checkpoint.ReadSmall(ctx, c.Dir, in.Name, tokenizer.MaxFileBytes); err != nil {
				return nil, nil, err
			}
			n.gguf.consumed = append(n.gguf.consumed, in)
		}
	}
	files[checkpoint.ConfigName] = c.ConfigJSON
	to := tokenizer.Options{Architecture: model.Architecture, PreTokenizer: o.PreTokenizer}
	rows := int64(0)
	for _, t := range model.Tensors {
		if t.Name == embedding && len(t.Shape) > 0 {
			rows = t.Shape[0]
			to.VocabSize = int(min(rows, math.MaxInt32))
		}
	}
	keys, notes, err = tokenizer.ToGGUF(files, to)
	if errors.Is(err, tokenizer.ErrNone) {
		note := "there is no tokenizer beside the weights: llama.cpp does not load the result without one"
		return nil, []string{note}, nil
	}
	if err != nil || !model.CutsRows {
		return keys, notes, err
	}
	has, err := tokenizer.Rows(files, to)
	if err != nil {
		return nil, nil, err
	}
	if int64(has) < rows {
		options.Vocabulary = int64(has)
	}
	return keys, notes, nil
}

const embedding = "token_embd.weight"

// checkZeros refuses a weight that is left out and holds something.
func checkZeros(w *Weight) error {
	r := checkpoint.NewReader(nil)
	const piece = 64 << 10
	x := make([]float32, piece)
	for lo := int64(0); lo < w.Count(); lo += piece {
		hi := min(lo+piece, w.Count())
		values, err := r.Read(w.Weight, lo, hi, false)
		if err != nil {
			return err
		}
		if err := tensor.ToFloats(x[:hi-lo], values, w.Values); err != nil {
			return err
		}
		for i, f := range x[:hi-lo] {
			if f != 0 {
				return fmt.Errorf("%w: element %d is %v, expected 0: GGUF has no place for it", ErrRefused, lo+int64(i), f)
			}
		}
	}
	if w.Change != nil {
		return fmt.Errorf("%w: an adapter changes it, and GGUF has no place for it", ErrRefused)
	}
	return nil
}

// madeOf is a tensor of a GGUF file as a weight.
func madeOf(t *gguf.Tensor, byName map[string]*Weight, file string) (*Weight, error) {
	if len(t.Sources) == 0 {
		w, err := checkpoint.Made(t.Info, t.Values, file)
		return &Weight{Weight: w}, err
	}
	if t.Scales != "" {
		w, err := packed(t, byName[t.Sources[0]], byName[t.Scales])
		return &Weight{Weight: w}, err
	}
	var pieces []piece
	count := t.View.Count()
	for i, name := range t.Sources {
		pieces = append(pieces, piece{byName[name], t.View.Moved(0, int64(i)*count)})
	}
	return together(tensor.Info{Name: t.Name, Shape: t.Shape}, pieces, t.Shift)
}

// packed is a weight in blocks of MXFP4, whose codes and scales are tensors of their own in a checkpoint of
// transformers.
func packed(t *gguf.Tensor, codes, scales *Weight) (*checkpoint.Weight, error) {
	for _, w := range []*Weight{codes, scales} {
		if w.Change != nil || w.Decoder != nil || len(w.Parts) != 1 {
			return nil, fmt.Errorf("tensor %s: %w: it is changed, or stored otherwise than in plain bytes", tensor.Quote(w.Name),
				ErrRefused)
		}
	}
	size, err := t.Size()
	if err != nil {
		return nil, err
	}
	data := t.Packed(codes.Parts[0], scales.Parts[0])
	return &checkpoint.Weight{Info: t.Info, Parts: []formats.Tensor{{
		Info: t.Info, File: codes.Parts[0].File, Data: data, Bytes: size,
	}}}, nil
}

// generalModel answers for names that are of no class of transformers.
var generalModel = new(models.Model)
