package lorakit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/models/tokenizer"
	"github.com/lorakit/lorakit/storage"
)

// baseOf is what a GGUF adapter needs to know of a checkpoint.
func baseOf(ctx context.Context, c *checkpoint.Checkpoint) *lora.Base {
	b := &lora.Base{Path: c.Path, Config: c.Config}
	for _, w := range c.Weights {
		b.Tensors = append(b.Tensors, w.Info)
	}
	if c.Folder && c.Origin() == nil {
		b.Vocabulary = func(architecture string) (int64, error) { return vocabulary(ctx, c.Dir, architecture) }
	}
	return b
}

// forBase are adapters that are used with a base.
func forBase(adapters []Adapter, b *lora.Base) []Adapter {
	list := slices.Clone(adapters)
	for i := range list {
		list[i].Base = b
	}
	return list
}

// openBase reads what a GGUF adapter needs to know of the checkpoint at a path, which may be a config.json alone.
func openBase(ctx context.Context, path string, followLinks bool) (*lora.Base, error) {
	c, err := openCheckpoint(ctx, path, followLinks)
	if err == nil {
		defer c.Close()
		return baseOf(ctx, c), nil
	}
	if !errors.Is(err, formats.ErrUnknown) {
		return nil, err
	}
	dir, name, e := storage.Resolve(path, storage.Options{FollowLinks: followLinks})
	if e != nil || name != "" {
		return nil, err
	}
	text, e := checkpoint.ReadSmall(ctx, dir, checkpoint.ConfigName, models.MaxConfigSize)
	if errors.Is(e, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: found neither weights nor a %s, expected the folder of a model", path, ErrRefused,
			checkpoint.ConfigName)
	}
	if e != nil {
		return nil, e
	}
	config, e := models.ParseConfig(text)
	if e != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(path, checkpoint.ConfigName), e)
	}
	return &lora.Base{Path: path, Config: config,
		Vocabulary: func(architecture string) (int64, error) { return vocabulary(ctx, dir, architecture) }}, nil
}

// ownBase is the base that the config of an adapter names, where that is a folder.
func ownBase(ctx context.Context, a *lora.Adapter, followLinks bool) (*lora.Base, error) {
	path := a.Config.Base
	if info, err := os.Stat(path); path == "" || err != nil || !info.IsDir() {
		what := "names no base"
		if path != "" {
			what = fmt.Sprintf("names the base %q, which is no folder here", path)
		}
		return nil, hint.With(fmt.Errorf("%s: %w: a gguf adapter has the names of its base's GGUF file, and its config %s",
			a.Path, ErrUnsupported, what), hint.Hint{Option: "Base", Value: "DIR",
			Effect: "gives the folder with the base's config.json"})
	}
	return openBase(ctx, path, followLinks)
}

// vocabulary is how many rows of a model's embedding have tokens, by the tokenizer in its folder.
func vocabulary(ctx context.Context, dir storage.Folder, architecture string) (int64, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return 0, err
	}
	files := tokenizer.Files{}
	for _, e := range entries {
		if tokenizer.Reads(e.Name) {
			if files[e.Name], err = checkpoint.ReadSmall(ctx, dir, e.Name, tokenizer.MaxFileBytes); err != nil {
				return 0, err
			}
		}
	}
	n, err := tokenizer.Rows(files, tokenizer.Options{Architecture: architecture})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", dir.Path(""), err)
	}
	return int64(n), nil
}
