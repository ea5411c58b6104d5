package formats

import (
	"path"
	"strings"
)

// weightEndings are those of files that hold a model's weights in some format.
var weightEndings = []string{
	".safetensors", ".safetensors.index.json", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".ggml",
	".h5", ".h5.index.json", ".msgpack", ".msgpack.index.json", ".ot", ".npz", ".onnx", ".onnx_data", ".onnx.data",
	".tflite", ".mlmodel",
	".pdparams", ".nemo", ".keras", ".llamafile",
}

// IsWeights reports whether a file of a checkpoint's folder, which is named from there on, holds the model's weights in
// some form, of formats that are known here or not. A .bin is one by its usual names only: training_args.bin and
// tokenizer.bin are none. In a sub-folder safetensors are another part (2_Dense of a sentence transformer, a diffusion
// pipeline's unet), and other formats an export of the whole, but for the .bin of a numbered module.
func IsWeights(name string) bool {
	folder, base := path.Split(strings.ToLower(name))
	part := folder != ""
	for _, e := range weightEndings {
		if strings.HasSuffix(base, e) {
			return !part || !strings.Contains(e, ".safetensors")
		}
	}
	if strings.HasSuffix(base, ".bin") && !(part && folder[0] >= '0' && folder[0] <= '9') {
		for _, p := range []string{"pytorch_model", "model", "adapter_model", "diffusion_pytorch_model", "openvino_model",
			"consolidated"} {
			if strings.HasPrefix(base, p) {
				return true
			}
		}
	}
	return false
}

// IsWeights reports whether IsWeights does, or a format of r has an IsWeights method of its own that does: one whose
// files have names that are not known here.
func (r *Registry) IsWeights(name string) bool {
	if IsWeights(name) {
		return true
	}
	for _, f := range r.formats {
		if x, ok := f.(interface{ IsWeights(name string) bool }); ok && x.IsWeights(name) {
			return true
		}
	}
	return false
}
