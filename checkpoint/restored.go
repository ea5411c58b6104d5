package checkpoint

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/gguf"
	"github.com/lorakit/lorakit/models/tokenizer"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// RestoreOptions say what the keys of a GGUF file leave open.
type RestoreOptions struct {
	// DType is what weights are taken for whose type the file does not tell, as they are in blocks or F32 by rule; 0 is
	// F32 or F16 where the file is that as a whole, else BF16.
	DType tensor.DType
	// RopeScaling are members of rope_parameters, a JSON object, that no key carries; nil has them found by the factors.
	RopeScaling jsontext.Value
	// Tokenizer has the files of the tokenizer made too; PreTokenizer is llama.cpp's name for how it cuts text, where it
	// is to be another than the file says.
	Tokenizer    bool
	PreTokenizer string
}

// NamedByGGUF reports whether the tensors have llama.cpp's names and layouts, and the metadata the keys of a model, of
// which Restored makes a checkpoint of transformers.
func (c *Checkpoint) NamedByGGUF() bool {
	return gguf.IsModel(c.Metadata())
}

// OpenModel is OpenIn of what is to be a model of transformers, whose tensors have the names that it has for them: a
// model in a GGUF file is Restored.
func OpenModel(ctx context.Context, dir storage.Folder, name string, o OpenOptions) (*Checkpoint, error) {
	c, err := OpenIn(ctx, dir, name, o)
	if err != nil || !c.NamedByGGUF() {
		return c, err
	}
	n, err := c.Restored(ctx, RestoreOptions{})
	if err != nil {
		c.Close()
		return nil, err
	}
	return n, nil
}

// Restored returns the checkpoint of a GGUF file as transformers would have it: its tensors' names, shapes and
// layouts, config.json and, where o says so, the files of its tokenizer as InnerFiles. Nothing is read but headers and
// a few small tensors. The result reads from c, which closes it.
func (c *Checkpoint) Restored(ctx context.Context, o RestoreOptions) (*Checkpoint, error) {
	n, err := c.restored(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Path, err)
	}
	return n, nil
}

func (c *Checkpoint) restored(ctx context.Context, o RestoreOptions) (*Checkpoint, error) {
	dtype := cmp.Or(o.DType, gguf.DType(c.Metadata()))
	byName := make(map[string]*Weight, len(c.Weights))
	infos := make([]tensor.Info, len(c.Weights))
	for i, w := range c.Weights {
		byName[w.Name], infos[i] = w, w.Info
	}
	r := NewReader(nil)
	read := func(name string) ([]float32, error) {
		w := byName[name]
		values, err := r.Read(w, 0, w.Count(), false)
		if err != nil {
			return nil, err
		}
		x := make([]float32, w.Count())
		return x, tensor.ToFloats(x, values, w.Values)
	}
	made, err := gguf.Backward(c.Metadata(), infos, read, gguf.BackOptions{DType: dtype, RopeScaling: o.RopeScaling})
	if err != nil {
		return nil, err
	}
	n := &Checkpoint{
		Path: c.Path, Dir: c.Dir, Folder: c.Folder, Format: c.Format, Formats: c.Formats, Schemes: c.Schemes,
		ConfigJSON: made.Config, Notices: slices.Concat(c.Notices, made.Notices),
	}
	n.byParameter = sync.OnceValue(n.pieces)
	if n.Config, err = models.ParseConfig(made.Config); err != nil {
		return nil, err
	}
	n.Model, n.Known = models.Load(n.Config)
	files := []formats.File{{Name: ConfigName, Data: made.Config}}
	if o.Tokenizer && gguf.HasTokenizer(c.Metadata()) {
		more, notes, err := tokenizer.FromGGUF(c.Metadata(), tokenizer.Options{
			Architecture: gguf.Architecture(c.Metadata()), PreTokenizer: o.PreTokenizer,
		})
		if err != nil {
			return nil, err
		}
		n.Notices = append(n.Notices, notes...)
		files = append(files, more.List()...)
	}
	n.container, n.origin, n.restoredBy = &restoredContainer{c.container, files}, c, map[string]restored{}
	for _, t := range made.Tensors {
		info := tensor.Info{Name: t.Name, Shape: t.Shape, DType: dtype}
		var excerpts []Excerpt
		for _, p := range t.Pieces {
			excerpts = append(excerpts, Excerpt{byName[p.Tensor], p.View})
		}
		if w := excerpts[0].Weight; w.Decoder == nil && !w.DType.Float() {
			info.DType = w.DType
		}
		w, err := Compose(info, excerpts, t.Shift)
		if err != nil {
			return nil, fmt.Errorf("tensor %s: %w", tensor.Quote(t.Name), err)
		}
		w.Role = n.Model.Tensor(w.Name, w.Shape)
		n.restoredBy[w.Name] = restored{excerpts, t.Shift}
		n.Weights = append(n.Weights, w)
	}
	return n, ctx.Err()
}

// Origin is the checkpoint as its file has it, of one that is Restored; nil of all others.
func (c *Checkpoint) Origin() *Checkpoint { return c.origin }

// Excerpts are what a weight of a checkpoint that is Restored is made of, and what is added to each value; none of a
// weight that it does not have.
func (c *Checkpoint) Excerpts(name string) ([]Excerpt, float32) {
	r := c.restoredBy[name]
	return r.excerpts, r.shift
}

// restored is how a weight is made of those of the file.
type restored struct {
	excerpts []Excerpt
	shift    float32
}

// restoredContainer is a GGUF file with what its keys say as small files.
type restoredContainer struct {
	formats.Container
	files []formats.File
}

// SmallFiles are config.json and those of the tokenizer.
func (c *restoredContainer) SmallFiles() []formats.File { return c.files }

// Tensors are no longer those of the file.
func (c *restoredContainer) Tensors() []formats.Tensor { return nil }

// Metadata are in the small files.
func (c *restoredContainer) Metadata() formats.Metadata { return nil }
