package pytorch

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// preferred are the names that transformers, and then PEFT, look for in a folder, in their order.
var preferred = []string{
	"pytorch_model.bin",
	"pytorch_model.bin.index.json",
	"adapter_model.bin",
}

// trainingState are files that a trainer leaves beside the weights.
var trainingState = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(
		`^(?:training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(?:bin|pt|pth|pkl)$`)
})

// shardName matches pytorch_model-00001-of-00003.bin, also with a variant in it.
var shardName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`-\d{5}-of-\d{5}\.`)
})

// errSeveral says that it is not known which of a folder's files is meant.
var errSeveral = errors.New("expected one of them alone, or a " + preferred[0])

// locate returns the name of the one file of a folder to begin with: the weights or their index. It is "" where there
// is none, or where the folder is one of safetensors.
func locate(ctx context.Context, dir storage.Folder) (string, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return "", err
	}
	var names, indices, files, shards []string
	for _, e := range entries {
		if name := e.Name; !strings.HasPrefix(name, ".") { // a Mac leaves ._NAME beside a copy
			names = append(names, name)
		}
	}
	for _, name := range names {
		switch {
		case isSafetensors(name):
			return "", nil
		case isIndex(name):
			indices = append(indices, name)
		case !isWeights(name) || trainingState().MatchString(name):
		case shardName().MatchString(name):
			shards = append(shards, name)
		default:
			files = append(files, name)
		}
	}
	for _, want := range preferred {
		if slices.Contains(names, want) {
			return want, nil
		}
	}
	files = slices.DeleteFunc(files, func(name string) bool {
		ok, err := begins(ctx, dir, name, true)
		return err != nil || !ok
	})
	candidates := slices.Concat(indices, files)
	if len(indices) == 0 {
		candidates = append(candidates, shards...)
	}
	shown := formats.Display(dir.Path(""))
	switch {
	case len(candidates) == 0:
		return "", nil
	case len(candidates) == 1:
		return candidates[0], nil
	case len(indices) == 0 && len(files) == 0:
		return "", fmt.Errorf("%s: found %s without an index, %w: %w", shown, formats.List(candidates), errSeveral,
			formats.ErrMalformed)
	}
	return "", fmt.Errorf("%s: found %s, %w: %w", shown, formats.List(candidates), errSeveral, formats.ErrMalformed)
}

// isSafetensors knows what makes a folder one of safetensors.
func isSafetensors(name string) bool {
	return strings.HasSuffix(name, ".safetensors") || strings.Contains(name, ".safetensors.index.") &&
		strings.HasSuffix(name, ".json")
}
