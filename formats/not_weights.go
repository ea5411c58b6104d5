package formats

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"

	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// ErrForeign says that what was to be a checkpoint, or a part of one, is recognised as something else: a pointer to
// a file, an error page, an archive, weights in another format. It is ErrMalformed too where its name or
// its place promise what it is not, and else ErrUnknown.
var ErrForeign = errors.New("not a checkpoint")

// foreignError says what a file is, and what helps.
type foreignError struct {
	text  string
	kinds []error
}

func (e *foreignError) Error() string   { return e.text }
func (e *foreignError) Unwrap() []error { return e.kinds }

// Foreign looks at what a file is that could not be read as what its name, or its place, promises, by its content or
// the first kilobyte of it. It returns an ErrForeign that does not name the file, or nil where nothing is known of
// it. JSON of that name is what it promises, whatever is wrong with it, but for an error that a server has answered.
func Foreign(content []byte, name string) error { return foreignTo("", content, name) }

// foreignTo is Foreign for a file that a format should read.
func foreignTo(format string, content []byte, name string) error {
	b := content[:min(len(content), sniffed)]
	k := kindOf(b, name)
	switch {
	case k == nil, format != "" && k.format == format,
		k != &answerKind && strings.HasSuffix(name, ".json") && (startsWith(b, "{") || jsonStart().Match(b)):
		return nil
	}
	return k.error(b, "", ErrMalformed)
}

// kindOf finds the kind of a file by its first bytes, or nil.
func kindOf(b []byte, name string) *foreignKind {
	for _, k := range foreignKinds {
		if k.is(b, name) {
			return k
		}
	}
	return nil
}

// start reads what tells what a file is. It is nil where the file cannot be read.
func start(f storage.File) []byte {
	b := make([]byte, min(f.Size(), sniffed))
	if n, _ := f.ReadAt(b, 0); n < len(b) {
		return nil
	}
	return b
}

// sniffed is how many bytes tell what a file is.
const sniffed = 1024

// foreignKind is a kind of files that people have where a checkpoint should be.
type foreignKind struct {
	what string // "a Git LFS pointer"
	help string // "run git lfs pull in its repository"
	// starts are beginnings of the content, which stand at the byte at.
	starts []string
	at     int
	// looks is for what has no such beginning: it sees the first bytes.
	looks func(b []byte) bool
	// ends are endings of names, for what cannot be told by its content.
	ends []string
	// about tells more, from the first bytes, or nothing.
	about func(b []byte) string
	// weights says that it is a checkpoint in a format that is not read, but where there is one of the name format.
	weights bool
	format  string
}

func (k *foreignKind) is(b []byte, name string) bool {
	b = bytes.TrimPrefix(b, []byte("\ufeff"))
	for _, s := range k.starts {
		if len(b) > k.at && bytes.HasPrefix(b[k.at:], []byte(s)) {
			return true
		}
	}
	return k.looks != nil && k.looks(b) || k.named(name)
}

func (k *foreignKind) named(name string) bool {
	base := strings.ToLower(path.Base(name))
	return slices.ContainsFunc(k.ends, func(e string) bool { return strings.HasSuffix(base, e) })
}

// error says what a file of the kind is, and where of a folder. The kind of error is ErrMalformed or ErrUnknown.
func (k *foreignKind) error(b []byte, where string, kind error) error {
	what := k.what
	if k.about != nil {
		if more := k.about(b); more != "" {
			what += " (" + more + ")"
		}
	}
	if where == "" {
		what = "it is " + what
	} else {
		what = "it holds " + where + ", which is " + what
	}
	if k.weights {
		return foreignf(kind, "%v: %s: %s", ErrUnknown, what,
			cmp.Or(k.help, "save it as safetensors with the tool that it is for"))
	}
	return foreignf(kind, "%v: %s: %s", ErrForeign, what, k.help)
}

func foreignf(kind error, format string, args ...any) error {
	return &foreignError{fmt.Sprintf(format, args...), []error{ErrForeign, kind}}
}

const (
	getAgain = "download it again"
	unpack   = "unpack it first"
	dvcPull  = "run dvc pull in its repository"
)

// unfinishedKind is apart, since it is looked for in folders too.
var unfinishedKind = foreignKind{
	what: "a download that has not been finished", help: getAgain,
	ends: []string{".incomplete", ".crdownload", ".part", ".aria2", ".partial", ".download"},
}

// answerKind is apart, since it is the one document in JSON that is no config.
var answerKind = foreignKind{
	what: "a JSON document", help: "a server has sent it in place of the file: " + getAgain,
	looks: func(b []byte) bool { return isText(b) && answer().Match(b) && jsonError().Match(b) },
	about: func(b []byte) string { return between(b, jsonError()) },
}

// foreignKinds are looked through in this order.
var foreignKinds = []*foreignKind{
	{what: "empty", help: "download or copy it again", looks: func(b []byte) bool { return len(b) == 0 }},
	&unfinishedKind,

	// Pointers to files that are elsewhere.
	{
		what: "a Git LFS pointer", help: "run git lfs pull in its repository",
		starts: []string{"version https://git-lfs.github.com/", "version https://hawser.github.com/"}, about: lfsPointer,
	},
	{
		what: "a git-annex pointer", help: "run git annex get in its repository",
		starts: []string{"/annex/objects/"}, about: func(b []byte) string { return firstLine(b[len("/annex/objects/"):]) },
	},
	{what: "a XetHub pointer", help: "check it out with git xet", starts: []string{"# xet version"}},
	{
		what: "a pointer of DVC", help: dvcPull,
		looks: func(b []byte) bool { return isText(b) && dvcPointer().Match(b) }, ends: []string{".dvc"},
	},

	// What a server has sent in place of a file.
	{
		what: "an HTML page", help: "a server has sent it in place of the file: " + getAgain,
		looks: func(b []byte) bool { return startsWith(b, "<!doctype html", "<html", "<head", "<body", "<script") },
		about: func(b []byte) string { return between(b, htmlTitle()) },
	},
	{
		what: "an XML document", help: "a server has sent it in place of the file: " + getAgain,
		looks: func(b []byte) bool { return isText(b) && startsWith(b, "<?xml", "<error>") },
		about: func(b []byte) string { return between(b, xmlCode()) },
	},
	&answerKind,
	{
		what: "a JSON document", help: "download the weights again, or name the file or folder that has them",
		looks: func(b []byte) bool { return isText(b) && jsonStart().Match(b) },
	},

	// Archives.
	{what: "gzip", help: unpack, starts: []string{"\x1f\x8b"}},
	{what: "a Zstandard file", help: unpack, starts: []string{"\x28\xb5\x2f\xfd"}},
	{what: "an xz file", help: unpack, starts: []string{"\xfd7zXZ\x00"}},
	{what: "a bzip2 file", help: unpack, looks: func(b []byte) bool { return bzip2().Match(b) }},
	{what: "an LZ4 file", help: unpack, starts: []string{"\x04\x22\x4d\x18"}},
	{what: "a 7z archive", help: unpack, starts: []string{"7z\xbc\xaf\x27\x1c"}},
	{what: "a rar archive", help: unpack, starts: []string{"Rar!\x1a\x07"}},
	{what: "a checkpoint of NeMo, a tar archive", help: unpack, ends: []string{".nemo"}},
	{
		what: "a tar archive", help: unpack, // but for those of PyTorch 0.1
		looks: func(b []byte) bool {
			return len(b) > 512 && bytes.HasPrefix(b[257:], []byte("ustar")) && !oldTorch().Match(b)
		},
	},

	// Weights in other formats.
	{
		what: "GGUF, the format of llama.cpp", help: "give it the extension .gguf",
		starts: []string{"GGUF"}, ends: []string{".gguf"}, weights: true, format: "gguf",
	},
	{
		what: "GGML, the old format of llama.cpp", help: "take the checkpoint that it was made from",
		starts: []string{"lmgg", "fmgg", "tjgg", "algg"}, ends: []string{".ggml"}, weights: true,
	},
	{
		what: "an archive of NumPy (.npz)", weights: true, ends: []string{".npz"},
		looks: func(b []byte) bool { return strings.HasSuffix(firstEntry(b), ".npy") },
	},
	{what: "an array of NumPy (.npy)", weights: true, starts: []string{"\x93NUMPY"}},
	{
		what: "a model of Keras", weights: true, format: "keras", ends: []string{".keras"},
		looks: func(b []byte) bool {
			name := firstEntry(b)
			return name == "metadata.json" || strings.HasSuffix(name, ".weights.h5")
		},
	},
	{what: "HDF5, in which Keras saves", weights: true, format: "keras", starts: []string{"\x89HDF\r\n\x1a\n"},
		ends: []string{".h5", ".hdf5"}},
	{what: "a model of TensorFlow Lite", weights: true, at: 4, starts: []string{"TFL3"}, ends: []string{".tflite"}},
	{what: "a model of ExecuTorch", weights: true, looks: func(b []byte) bool { return executorch().Match(b) },
		ends: []string{".pte"}},
	{what: "ONNX", weights: true, looks: onnx, ends: []string{".onnx", ".onnx_data", ".onnx.data", ".ort"}},
	{what: "a plan of TensorRT", weights: true, starts: []string{"ptrt", "ftrt"}, ends: []string{".engine", ".trt"}},
	{what: "MessagePack, in which Flax saves", weights: true, format: "flax", looks: messagePack,
		ends: []string{".msgpack"}},
	{what: "a model of TensorFlow", weights: true, looks: savedModel, ends: []string{".pb", ".ckpt.index", ".ckpt.meta"}},
	{what: "a model of Core ML", weights: true, ends: []string{".mlmodel", ".mlpackage"}},
	{what: "a checkpoint of PaddlePaddle", weights: true, ends: []string{".pdparams", ".pdiparams"}},
	{what: "a checkpoint of MXNet", weights: true, ends: []string{".params"}},
	{what: "a llamafile, a program with its weights", weights: true, starts: []string{"MZqFpD"},
		ends: []string{".llamafile"}},

	// What else is found beside weights, or named by mistake.
	{
		what: "a zip archive", help: unpack,
		looks: func(b []byte) bool {
			name := firstEntry(b)
			return name != "" && !ofTorch().MatchString(name) || bytes.HasPrefix(b, []byte("PK\x05\x06"))
		},
		about: func(b []byte) string { return firstLine([]byte(firstEntry(b))) },
	},
	{
		what: "a tokenizer of SentencePiece", help: "name the file or folder that has the weights",
		looks: func(b []byte) bool { return sentencePiece().Match(b) },
		ends:  []string{"tokenizer.model", "spiece.model", ".bpe.model"},
	},
	{what: "a table of data (Parquet)", help: "name the file or folder that has the weights", starts: []string{"PAR1"}},
	{what: "a table of data (Arrow)", help: "name the file or folder that has the weights",
		starts: []string{"ARROW1\x00\x00"}},
	{what: "a Python pickle", help: "save its state dict with safetensors or torch.save",
		ends: []string{".pkl", ".pickle", ".joblib"}},
	{what: "what macOS leaves beside a copy", help: "name the file without ._", starts: []string{"\x00\x05\x16\x07"}},
	{what: "a program", help: "name the file or folder that has the weights", starts: []string{"\x7fELF", "MZ"}},
	{
		what: "all zeros at its beginning, as a download that has not been finished", help: getAgain,
		looks: func(b []byte) bool { return len(b) >= 16 && len(bytes.Trim(b, "\x00")) == 0 },
	},
	{
		what: "a text", help: "name the file or folder that has the weights, or download them again if they should be here",
		looks: func(b []byte) bool { return len(b) >= 8 && isText(b) }, about: firstLine,
	},
}

var (
	lfsSize = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`(?m)^oid ([a-z0-9]+:[0-9a-f]+)\r?\nsize ([0-9]+)\r?$`)
	})
	dvcPointer = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`(?m)\A(?:[a-z0-9_]+: .*\n)*outs:\r?\n- (?:md5|etag|path|size|hash|checksum|files): `)
	})
	htmlTitle = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`(?is)<title>(.*?)</title>`) })
	xmlCode   = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`(?is)<code>(.*?)</code>`) })
	jsonError = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(
			`"(?:error|message|detail)"\s*:\s*"([^"\\]+)"`)
	})
	answer = sync.OnceValue(func() *regexp.Regexp { // what errors begin with
		return regexp.MustCompile(`\A\s*\{\s*"(?:errors?|error_(?:code|type|message)|message|msg|detail|code|status|` +
			`statusCode|success|ok)"\s*:`)
	})
	jsonStart = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`\A\s*(?:\{\s*["}]|\[\s*(?:["\[\]{0-9-]|true|false|null))`)
	})
	ofTorch = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`data\.pkl$|/(?:byteorder|version|\.format_version|\.data/.*|data/.*)$`)
	})
	oldTorch = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`\A(?:\./)?(?:sys_info|pickle|tensors|storages)?\x00`)
	})
	bzip2         = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`\ABZh[1-9]1AY&SY`) })
	executorch    = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`(?s)\A....ET[0-9]{2}`) })
	sentencePiece = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`(?s)\A\n.\n.<(?:unk|pad|s)>`) })
)

// lfsPointer is the object of a pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
func lfsPointer(b []byte) string {
	m := lfsSize().FindSubmatch(b)
	if m == nil {
		return ""
	}
	size, err := strconv.ParseUint(string(m[2]), 10, 63)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("oid %s, %s", clipped(string(m[1]), len("sha256:")+64), humanize.Bytes(size))
}

// between is what an expression finds, as a quoted line.
func between(b []byte, re *regexp.Regexp) string {
	if m := re.FindSubmatch(b); m != nil {
		return firstLine(m[1])
	}
	return ""
}

// firstLine is the first line of a text that is not blank, in quotes.
func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(strings.ToValidUTF8(string(b), "")), "\n")
	if line = strings.TrimSpace(line); line == "" {
		return ""
	}
	return tensor.Quote(clipped(line, 80))
}

func clipped(s string, most int) string {
	for i := range s {
		if i >= most {
			return s[:i] + "…"
		}
	}
	return s
}

// isText reports whether the bytes are the beginning of a text in UTF-8.
func isText(b []byte) bool {
	if len(b) == sniffed { // the last character may be cut
		for range utf8.UTFMax - 1 {
			if r, _ := utf8.DecodeLastRune(b); r != utf8.RuneError {
				break
			}
			b = b[:len(b)-1]
		}
	}
	if len(b) == 0 || !utf8.Valid(b) {
		return false
	}
	return !bytes.ContainsFunc(b, func(r rune) bool {
		return unicode.IsControl(r) &&
			!strings.ContainsRune("\t\n\r\f", r)
	})
}

// startsWith reports whether a text starts with one of the words, in lower case, behind white space and a byte
// order mark.
func startsWith(b []byte, words ...string) bool {
	b = bytes.TrimLeft(bytes.TrimPrefix(b, []byte("\ufeff")), " \t\r\n")
	return slices.ContainsFunc(words, func(w string) bool {
		return len(b) >= len(w) &&
			strings.EqualFold(string(b[:len(w)]), w)
	})
}

// firstEntry is the name of the first entry of a zip archive.
func firstEntry(b []byte) string {
	const header = 30
	if len(b) < header || !bytes.HasPrefix(b, []byte("PK\x03\x04")) {
		return ""
	}
	name, n := b[header:], int(binary.LittleEndian.Uint16(b[26:]))
	if n > len(name) {
		return ""
	}
	return string(name[:n])
}

// onnx knows a ModelProto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) by its first fields: the version, a
// small number, then texts such as the name of what has made it, or the graph.
func onnx(b []byte) bool {
	if len(b) < 5 || b[0] != 0x08 || b[1] == 0 || b[1] > 0x20 {
		return false
	}
	for b = b[2:]; ; {
		n, size := field(b)
		if size == 0 {
			return false
		}
		switch tag := b[0]; {
		case tag == 0x3a: // a graph, which begins with a node or its own name
			return len(b) > size && (b[size] == 0x0a || b[size] == 0x12)
		case tag != 0x12 && tag != 0x1a && tag != 0x22 && tag != 0x32 || n > uint64(len(b)-size):
			return false
		case n > 0:
			return isText(b[size : size+int(n)])
		}
		b = b[size:]
	}
}

// savedModel knows a SavedModel of TensorFlow (tensorflow/core/protobuf/saved_model.proto): its version, which is 1,
// and a MetaGraphDef, which begins with its MetaInfoDef.
func savedModel(b []byte) bool {
	if !bytes.HasPrefix(b, []byte("\x08\x01\x12")) {
		return false
	}
	_, size := field(b[2:])
	return size > 0 && len(b) > 2+size && b[2+size] == 0x0a
}

// field is the length that a field of bytes has in Protocol Buffers, and how many bytes tell it, its tag with them.
func field(b []byte) (n uint64, size int) {
	if len(b) < 2 {
		return 0, 0
	}
	n, size = binary.Uvarint(b[1:])
	if size <= 0 {
		return 0, 0
	}
	return n, 1 + size
}

// messagePack knows a map whose first key is a text (https://github.com/msgpack/msgpack/blob/master/spec.md).
func messagePack(b []byte) bool {
	skip := func(n int) { b = b[min(n, len(b)):] }
	switch {
	case len(b) == 0:
		return false
	case b[0] > 0x80 && b[0] <= 0x8f:
		skip(1)
	case b[0] == 0xde:
		skip(3)
	case b[0] == 0xdf:
		skip(5)
	default:
		return false
	}
	n := 0
	switch {
	case len(b) < 2:
		return false
	case b[0] > 0xa0 && b[0] <= 0xbf:
		n = int(b[0] & 0x1f)
		skip(1)
	case b[0] == 0xd9:
		n = int(b[1])
		skip(2)
	}
	return n > 0 && n <= len(b) && isText(b[:n])
}

// mostLooked is how many files, and folders, are looked at to say what a folder holds in place of weights.
const mostLooked = 64

// explain says of a file or folder that no format of the registry knows what it is instead.
func (r *Registry) explain(ctx context.Context, dir storage.Folder, name string) error {
	err := fmt.Errorf("%w: no %s file there", ErrUnknown, r.names(false))
	if name == "" {
		if found, failed := r.explainFolder(ctx, dir); failed != nil {
			return failed
		} else if found != nil {
			err = found
		}
	} else {
		f, failed := dir.Open(ctx, name)
		if failed != nil {
			return failed
		}
		b := start(f)
		f.Close()
		if k := kindOf(b, name); k != nil && b != nil {
			err = k.error(b, "", ErrUnknown)
		}
	}
	return fmt.Errorf("%s: %w", Display(dir.Path(name)), err)
}

// explainFolder says what a folder holds, or where below it there are weights, or nothing.
func (r *Registry) explainFolder(ctx context.Context, dir storage.Folder) (found, failed error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return nil, err
	}
	if name := unfinished(ctx, dir); name != "" {
		return unfinishedKind.error(nil, name, ErrUnknown), nil
	}
	looked := 0
	for _, e := range entries {
		if e.Folder || strings.HasPrefix(e.Name, ".") || !r.promisesWeights(e.Name) || looked == mostLooked {
			continue
		}
		looked++
		f, err := dir.Open(ctx, e.Name)
		if err != nil {
			continue
		}
		b := start(f)
		f.Close()
		if k := kindOf(b, e.Name); k != nil && b != nil {
			return k.error(b, tensor.Quote(e.Name), ErrUnknown), nil
		}
	}
	if below := r.weightsBelow(ctx, dir, entries); len(below) > 0 {
		return fmt.Errorf("%w: no %s file there but in its folders: %s; name one of them", ErrUnknown, r.names(false),
			List(below)), nil
	}
	return nil, nil
}

// promisesWeights reports whether a file has a name that weights have, in any format.
func (r *Registry) promisesWeights(name string) bool {
	if _, ok := r.ForExtension(name); ok {
		return true
	}
	return slices.ContainsFunc(foreignKinds, func(k *foreignKind) bool {
		return (k.weights || k.help == dvcPull) && k.named(name)
	})
}

// weightsBelow lists the folders in a folder that have weights, and the snapshots of a repository in the
// cache of the Hugging Face hub.
func (r *Registry) weightsBelow(ctx context.Context, dir storage.Folder, entries []storage.Entry) []string {
	var found []string
	looked := 0
	var look func(below string, entries []storage.Entry)
	look = func(below string, entries []storage.Entry) {
		for _, e := range entries {
			if !e.Folder || strings.HasPrefix(e.Name, ".") || looked == mostLooked {
				continue
			}
			looked++
			name := path.Join(below, e.Name)
			inside, err := dir.List(ctx, name)
			if err != nil {
				continue
			}
			if slices.ContainsFunc(inside, func(e storage.Entry) bool {
				_, ok := r.ForExtension(e.Name)
				return ok && !e.Folder && !strings.HasPrefix(e.Name, ".")
			}) {
				found = append(found, name)
			} else if name == "snapshots" {
				look(name, inside)
			}
		}
	}
	look("", entries)
	return found
}

// unfinished names a file of a folder whose download has not been finished: one beside the others, or one that
// huggingface_hub keeps in its own folder until it is whole
// (https://huggingface.co/docs/huggingface_hub/guides/download#download-files-to-a-local-folder).
func unfinished(ctx context.Context, dir storage.Folder) string {
	for _, below := range []string{"", ".cache/huggingface/download"} {
		entries, _ := dir.List(ctx, below)
		for _, e := range entries {
			if !e.Folder && unfinishedKind.named(e.Name) {
				return tensor.Quote(path.Join(below, e.Name))
			}
		}
	}
	return ""
}
