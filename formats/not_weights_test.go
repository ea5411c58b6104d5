package formats_test

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/pytorch"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
)

const lfs = "version https://git-lfs.github.com/spec/v1\noid " +
	"sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4900000000\n"

// foreignFiles are what people have where a checkpoint should be, and what is to be said of each.
func foreignFiles(t testing.TB) map[string][2]string {
	b, err := os.ReadFile("../fixtures/foreign.json")
	require.NoError(t, err)
	var made map[string]string
	require.NoError(t, json.Unmarshal(b, &made))
	says := map[string]string{
		"empty.zip": "it is a zip archive: unpack it", "model.zip": "it is a zip archive (\"model/model.safetensors\"): " +
			"unpack it", "model.tar": "a tar archive",
		"model.safetensors.gz": "gzip", "model.safetensors.zst": "Zstandard", "model.safetensors.xz": "an xz file",
		"model.safetensors.bz2": "a bzip2 file",
		"flax_model.msgpack":    "MessagePack, in which Flax saves",
		"model.gguf":            "unknown format: it is GGUF, the format of llama.cpp",
		"model.joblib":          "a Python pickle", "model.keras": "a model of Keras", "model.onnx": "it is ONNX",
		"model.weights.h5": "HDF5", "tf_model.h5": "HDF5",
		"scripted.pt": "a program of torch.jit.save", "tokenizer.model": "a tokenizer of SentencePiece",
		"train.arrow": "a table of data (Arrow)", "train.parquet": "a table of data (Parquet)",
		"weight.npy": "an array of NumPy", "weights.npz": "an archive of NumPy",
		"weights-compressed.npz": "an archive of NumPy",
	}
	all := map[string][2]string{
		"lfs": {lfs, "it is a Git LFS pointer (oid " +
			"sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393, 4.9 GB): run git lfs pull in its " +
			"repository"},
		"lfs with CRLF": {strings.ReplaceAll(lfs, "\n", "\r\n"), "4.9 GB): run git lfs pull"},
		"old lfs": {"version https://hawser.github.com/spec/v1\noid sha256:00\nsize 1\n",
			"a Git LFS pointer (oid sha256:00, 1 B)"},
		"strange lfs": {"version https://git-lfs.github.com/spec/v9\n", "it is a Git LFS pointer: run"},
		"annex": {"/annex/objects/SHA256E-s4900--1c1c.safetensors\n",
			`a git-annex pointer ("SHA256E-s4900--1c1c.safetensors"): run git annex get`},
		"xet": {"# xet version 0\nfilesize = 5\nhash = '0'\n", "a XetHub pointer"},
		"model.safetensors.dvc": {"outs:\n- md5: a304afb96060aad90176268345e10355\n  size: 5\n  hash: md5\n  path: " +
			"model.safetensors\n", "a pointer of DVC: run dvc pull"},
		"dvc by content": {"md5: 00\nouts:\n- path: x\n", "a pointer of DVC"},
		"page": {"<!DOCTYPE html><html><title>404\n</title></html>",
			`it is an HTML page ("404"): a server has sent it in place of the file: download it again`},
		"page with a mark": {"\ufeff\n <HTML lang=en>", "it is an HTML page: "},
		"s3": {`<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>`,
			`an XML document ("AccessDenied")`},
		"answer": {`{"error":"Repository not found"}`, `a JSON document ("Repository not found"): a server has ` +
			`sent it in place of the file: download it again`},
		"answer of GitHub": {"{\n  \"message\": \"Not Found\",\n  \"status\": \"404\"\n}",
			`a JSON document ("Not Found"): a server`},
		"other JSON":      {`{"a": {"error": "b"}}`, "a JSON document: download the weights again"},
		"settings":        {"[core]\n\tbare = false\n", `it is a text ("[core]")`},
		"lfs with a mark": {"\ufeff" + lfs, "a Git LFS pointer (oid sha256:4d7a"},
		"helper's ONNX":   {"\x08\x0a\x3a\x90\x03\x0a\x12\x0a\x01x\x12\x01y", "it is ONNX"},
		"nameless ONNX":   {"\x08\x09\x12\x00\x1a\x00\x3a\x20\x12\x04main", "it is ONNX"},
		"SavedModel":      {"\x08\x01\x12\xba\x03\x0a\x1a\x12\x05serve", "a model of TensorFlow"},
		"large msgpack":   {"\xde\x00\x20\xa5model\x81\xa1a\xc7", "MessagePack, in which Flax saves"},

		"list":                         {"[\n 1]", "a JSON document: "},
		"hub":                          {"Entry not found", `it is a text ("Entry not found")`},
		"long text":                    {strings.Repeat("ä", 2000), "it is a text"},
		"nothing":                      {"", "it is empty: download or copy it again"},
		"zeros":                        {strings.Repeat("\x00", 5000), "it is all zeros at its beginning, as a download"},
		"model.safetensors.incomplete": {"half", "a download that has not been finished"},
		"Unconfirmed 1.crdownload":     {"half", "a download that has not been finished"},
		"model.tflite":                 {"\x1c\x00\x00\x00TFL3\x14\x00\x20\x00", "TensorFlow Lite"},
		"model.pte":                    {"\x2c\x00\x00\x00ET12\x00\x00", "ExecuTorch"},
		"old":                          {"lmgg\x01\x00\x00\x00", "GGML, the old format of llama.cpp"},
		"adapter of llama.cpp":         {"algg\x01\x00\x00\x00", "GGML"},
		"model.onnx_data":              {"\x01\x02\x03", "it is ONNX"},
		"saved_model.pb":               {"\x08\x01", "a model of TensorFlow"},
		"model.llamafile":              {"MZqFpD='\n", "llamafile"},
		"program":                      {"\x7fELF\x02\x01\x01", "a program"},
		"._model":                      {"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "what macOS leaves beside a copy"},
		"nemo.nemo":                    {"x\x00", "a checkpoint of NeMo"},
		"model_state.pdparams":         {"\x80\x04", "PaddlePaddle"},
		"engine":                       {"ptrt\x00\x00", "a plan of TensorRT"},
		"many lines":                   {strings.Repeat("a\n", 4000), `it is a text ("a")`},
		"hostile":                      {"<!doctype html><title>\x1b[31m" + strings.Repeat("x", 5000), "it is an HTML page"},
		"hostile title": {"<!doctype html><title>\x1b[31m" + strings.Repeat("x", 200) + "</title>",
			`("\x1b[31mxxx`},
		"hostile zip": {"PK\x03\x04" + strings.Repeat("\x00", 22) + "\x05\x00\x00\x00\x1b\n\r\xff/",
			"a zip archive"},
	}
	for name, b := range made {
		raw, err := base64.StdEncoding.DecodeString(b)
		require.NoError(t, err)
		require.Contains(t, says, name)
		all[name] = [2]string{string(raw), says[name]}
		delete(says, name)
	}
	require.Empty(t, says)
	return all
}

// assertForeign holds an error against what is to be said.
func assertForeign(t *testing.T, err error, what, says string) {
	if assert.ErrorContains(t, err, says, what) {
		assert.NotContains(t, err.Error(), "\n", what)
		assert.NotContains(t, err.Error(), "\x1b", what)
		assert.Less(t, len(err.Error()), 500, what)
		if !strings.Contains(says, "torch.jit") {
			assert.ErrorIs(t, err, formats.ErrForeign, what)
			assert.NotEqual(t, errors.Is(err, formats.ErrMalformed), errors.Is(err, formats.ErrUnknown), what)
		}
	}
}

// TestForeign names each file by itself, under its own name and under those that weights have: alone, in a folder, as
// a shard and as an index.
func TestForeign(t *testing.T) {
	ctx := context.Background()
	byName := map[string]bool{} // what only the name tells
	for name, x := range foreignFiles(t) {
		content, says := []byte(x[0]), x[1]
		_, err := formats.Default.Open(ctx, storagetest.Memory{name: content}, name)
		assertForeign(t, err, name, says)
		if is := formats.Foreign(content, "x"); is == nil {
			byName[name] = true
			continue
		}
		index := []byte(`{"weight_map":{"a":"1.bin"}}`)
		for what, dir := range map[string]storagetest.Memory{
			"model.safetensors": {"model.safetensors": content},
			"pytorch_model.bin": {"pytorch_model.bin": content, "config.json": nil},
			"1.bin":             {"model.safetensors.index.json": index, "1.bin": content},
			"1.bin of 2":        {"pytorch_model.bin.index.json": index, "1.bin": content},
		} {
			_, err = formats.Default.Open(ctx, dir, "")
			assertForeign(t, err, name+" as "+what, says)
			file, _, _ := strings.Cut(what, " ")
			assert.ErrorContains(t, err, "memory:"+file+": ", what)
			assert.NotErrorIs(t, err, formats.ErrUnknown, what)
		}
		if strings.Contains(says, "JSON") { // it is what the name promises
			continue
		}
		_, err = formats.Default.Open(ctx, storagetest.Memory{"model.safetensors.index.json": content}, "")
		assertForeign(t, err, name+" as index", says)
	}
	assert.Equal(t, map[string]bool{
		"model.joblib": true, "model.safetensors.incomplete": true,
		"Unconfirmed 1.crdownload": true, "model.onnx_data": true,
		"saved_model.pb": true, "nemo.nemo": true, "model_state.pdparams": true, "scripted.pt": true,
	}, byName)
}

// TestForeignFolder names folders without weights that are read.
func TestForeignFolder(t *testing.T) {
	model := file(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`, 1)
	for says, dir := range map[string]storagetest.Memory{
		`it holds ".cache/huggingface/download/ab=.cd.incomplete", which is a download`: {"config.json": nil,
			".cache/huggingface/download/ab=.cd.incomplete": nil, ".cache/huggingface/.gitignore": nil},
		`it holds "model.safetensors.incomplete", which is a download`: {"config.json": nil,
			"model.safetensors.incomplete": nil},
		`it holds "model.gguf", which is GGUF, the format of llama.cpp`: {"README.md": []byte("# A model"),
			"model.gguf": []byte("GGUF\x03")},
		`it holds "consolidated.00.pth", which is a Git LFS pointer`: {"consolidated.00.pth": []byte(lfs),
			"params.json": []byte("{}")},
		`it holds "model.safetensors.dvc", which is a pointer of DVC`: {"model.safetensors.dvc": []byte(
			"outs:\n- md5: 0\n")},
		`it holds "tf_model.h5", which is HDF5`: {"tf_model.h5": []byte(
			"\x89HDF\r\n\x1a\n"), "config.json": []byte("{}")},
		`in its folders: "unet", "vae"; name one of them`: {"model_index.json": []byte("{}"),
			"unet/m.safetensors": model, "vae/m.bin": model, "scheduler/x.json": nil, ".git/x.bin": nil},
		`in its folders: "snapshots/0123"; name one of them`: {"refs/main": []byte("0123"),
			"blobs/a": model, "snapshots/0123/model.safetensors": model},
		`unknown format: no pytorch, safetensors file there`: {"config.json": []byte("{}"),
			"README.md": []byte(lfs)},
	} {
		_, err := formats.Default.Open(t.Context(), dir, "")
		if assert.ErrorContains(t, err, says) {
			assert.ErrorIs(t, err, formats.ErrUnknown)
			assert.True(t, strings.HasPrefix(err.Error(), "memory:: "), err)
		}
	}
	// A shard that is not there yet.
	_, err := formats.Default.Open(t.Context(), storagetest.Memory{
		"model.safetensors.index.json":                  []byte(`{"weight_map":{"a":"1"}}`),
		".cache/huggingface/download/ab=.cd.incomplete": nil,
	}, "")
	assert.ErrorContains(t, err, `found no shard "1" beside it`)
	assert.ErrorContains(t, err, "ab=.cd.incomplete\" is a download that has not been finished")
}

// A file of one format under the name of another says so.
func TestForeignFormat(t *testing.T) {
	saved, err := os.ReadFile("../fixtures/pytorch/parameters.pt")
	require.NoError(t, err)
	_, err = formats.Default.Open(t.Context(), storagetest.Memory{"model.safetensors": saved}, "")
	assert.ErrorContains(t, err, "it is a pytorch file by its content: give it a name that ends in .bin")
	_, err = formats.Default.Open(t.Context(), storagetest.Memory{"pytorch_model.bin": file("{}")}, "")
	assert.ErrorContains(t, err, "it is a safetensors file by its content: give it a name that ends in .safetensors")
}

// knows is a reader of a format that finds fault with all files, and may know that they are its own.
type knows struct{ formats.FileReader }

func (knows) Name() string        { return "toy" }
func (knows) IsIndex(string) bool { return false }

func (knows) ReadFile(storage.File, *formats.Contents) error {
	return fmt.Errorf("found its own fault: %w", formats.ErrMalformed)
}

type recognizes struct {
	knows
	yes bool
}

func (r recognizes) Recognizes(storage.File) bool { return r.yes }

// A reader that has recognised a file keeps its own words, whatever others take the file for.
func TestRecognized(t *testing.T) {
	folder := storagetest.Memory{"x.toy": file("{}")}
	for _, r := range []formats.FileReader{knows{}, recognizes{}} {
		_, err := formats.OpenFiles(t.Context(), folder, "x.toy", r)
		assert.ErrorContains(t, err, "it is a safetensors file by its content")
	}
	_, err := formats.OpenFiles(t.Context(), folder, "x.toy", recognizes{yes: true})
	assert.ErrorContains(t, err, "x.toy: found its own fault")
	assert.NotErrorIs(t, err, formats.ErrForeign)
}

// What is only broken, and nothing else, keeps the words of its format.
func TestNotForeign(t *testing.T) {
	good := file(`{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`, 1)
	for says, content := range map[string][]byte{
		"expected an end within the file's 0 bytes of data": good[:len(good)-1],
		"found the end of the JSON":                         append(binary.LittleEndian.AppendUint64(nil, 3), `{"a`...),
		"as a safetensors file begins":                      []byte("\xff\xff\xff\xff\xff\xff\x01\x02\x03\x04"),
		"found 3 bytes, expected at least 8":                []byte("abc"),
	} {
		_, err := formats.Default.Open(t.Context(), storagetest.Memory{"model.safetensors": content}, "")
		assert.ErrorContains(t, err, says)
		assert.NotErrorIs(t, err, formats.ErrForeign)
	}
	assert.NoError(t, formats.Foreign([]byte(`{"a": 1`), "config.json"))
	assert.ErrorContains(t, formats.Foreign([]byte(lfs), "config.json"), "Git LFS")
}

// FuzzForeign says of any bytes and name something short, or nothing.
func FuzzForeign(f *testing.F) {
	for name, x := range foreignFiles(f) {
		f.Add([]byte(x[0]), name)
	}
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		err := formats.Foreign(b, path.Base(name))
		if err == nil {
			return
		}
		require.ErrorIs(t, err, formats.ErrForeign)
		require.Less(t, len(err.Error()), 600)
		for _, r := range err.Error() {
			require.GreaterOrEqual(t, r, ' ')
			require.NotEqual(t, r, '\x7f')
		}
	})
}

// file builds a safetensors file from its header and data.
func file(header string, data ...byte) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), data...)
}
