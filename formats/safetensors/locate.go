package safetensors

import (
	"context"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// preferred are the names that transformers looks for in a folder, in its order (modeling_utils.py,
// _get_resolved_checkpoint_files, then PEFT's name for an adapter).
var preferred = []string{
	"model" + extension,
	"model" + indexExtension,
	"adapter_model" + extension,
}

// shardName matches model-00001-of-00003.safetensors, also with a variant in it.
var shardName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`-\d{5}-of-\d{5}\.(?:.*\.)?safetensors$`)
})

// locate returns the name of the one file of a folder to begin with: the weights or their index.
func locate(ctx context.Context, dir storage.Folder) (string, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return "", err
	}
	var indices, files, shards []string
	for _, e := range entries {
		name := e.Name
		switch {
		case hidden(name), slices.Contains(preferred, name):
		case isIndex(name):
			indices = append(indices, name)
		case !isWeights(name):
		case shardName().MatchString(name):
			shards = append(shards, name)
		default:
			files = append(files, name)
		}
	}
	for _, want := range preferred {
		if slices.ContainsFunc(entries, func(e storage.Entry) bool { return e.Name == want }) {
			return want, nil
		}
	}
	shown, candidates := formats.Display(dir.Path("")), append(indices, files...)
	if len(indices) == 0 {
		candidates = append(candidates, shards...)
	}
	switch {
	case len(candidates) == 1:
		return candidates[0], nil
	case len(candidates) == 0:
		return "", fmt.Errorf("%s: found no .safetensors file, expected one: %w", shown, fs.ErrNotExist)
	case len(candidates) == len(shards):
		return "", fmt.Errorf("%s: found %s, expected an index for them, model%s: %w", shown, formats.List(candidates),
			indexExtension, fs.ErrNotExist)
	}
	return "", fmt.Errorf("%s: found %s, expected one of them or a model%s: %w", shown, formats.List(candidates),
		extension, formats.ErrMalformed)
}

// hidden matches what a Mac leaves beside a file that it copies, ._model.safetensors.
func hidden(name string) bool { return strings.HasPrefix(name, ".") }
