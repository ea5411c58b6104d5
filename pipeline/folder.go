package pipeline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// maxCarried bounds the files that are carried along.
const maxCarried = 10_000

// carried lists the files of the folder that go along with the tensors as they are:
// tokenizer, generation config, licence, chat template. Files in written are made
// anew; weights in other formats would contradict the result, so they stay, and are returned in skipped.
func carried(folder string, written map[string]bool) (files []InputFile, skipped []string, err error) {
	err = fs.WalkDir(os.DirFS(folder), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && (d.Name() == ".git" || d.Name() == ".cache") {
				return fs.SkipDir
			}
			return nil
		}
		if written[name] {
			return nil
		}
		if isWeights(name) {
			skipped = append(skipped, name)
			return nil
		}
		if !utf8.ValidString(name) || strings.Contains(name, `\`) { // no name on every system
			skipped = append(skipped, name)
			return nil
		}
		resolved, err := storage.Within(folder, name)
		if d.Type()&fs.ModeSymlink != 0 && err != nil && !errors.Is(err, storage.ErrOutside) { // it leads to nothing, as those of editors do
			skipped = append(skipped, name)
			return nil
		}
		if err != nil {
			return err
		}
		info, err := os.Stat(resolved)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() { // a link to a folder, a pipe, a socket
			skipped = append(skipped, name)
			return nil
		}
		if len(files) == maxCarried {
			return fmt.Errorf("%s: %w: more than %d files", folder, formats.ErrLimit, maxCarried)
		}
		files = append(files, inputFile(name, info))
		return nil
	})
	return files, skipped, err
}

// weightEndings are those of files that hold a model's weights in some format.
var weightEndings = []string{
	".safetensors", ".safetensors.index.json", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".ggml",
	".h5", ".h5.index.json", ".msgpack", ".msgpack.index.json", ".ot", ".npz", ".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel",
	".pdparams", ".nemo", ".keras", ".llamafile",
}

// isWeights reports whether a file holds the model's weights in some form. A .bin
// is one by its usual names only: training_args.bin and tokenizer.bin are none. In a
// sub-folder safetensors are another part (2_Dense of a sentence transformer, a
// diffusion pipeline's unet), and other formats an export of the whole, but for
// the .bin of a numbered module.
func isWeights(name string) bool {
	folder, base := path.Split(strings.ToLower(name))
	part := folder != ""
	for _, e := range weightEndings {
		if strings.HasSuffix(base, e) {
			return !part || !strings.Contains(e, ".safetensors")
		}
	}
	if strings.HasSuffix(base, ".bin") && !(part && folder[0] >= '0' && folder[0] <= '9') {
		for _, p := range []string{"pytorch_model", "model", "adapter_model", "diffusion_pytorch_model", "openvino_model", "consolidated"} {
			if strings.HasPrefix(base, p) {
				return true
			}
		}
	}
	return false
}
