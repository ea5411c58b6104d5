package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/lock"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// format is a format of a plugin. What it is known by stands in the lock file, so that nothing is started to find that
// a file is of another.
type format struct {
	program *program
	facts   *lock.Format
	holds   []tensor.DType // nil is all
}

func newFormat(x *program, facts *lock.Format) formats.Format {
	f := &format{program: x, facts: facts}
	for _, name := range facts.DTypes {
		if d, err := tensor.ParseDType(name); err == nil { // the lock file has been checked
			f.holds = append(f.holds, d)
		}
	}
	if facts.Write == lock.WriteByStream {
		return &streamFormat{f}
	}
	return f
}

// Name is what --to takes.
func (f *format) Name() string { return f.facts.Name }

// Extensions are those of its files.
func (f *format) Extensions() []string { return f.facts.Extensions }

// ReadOnly reports whether no files are written.
func (f *format) ReadOnly() bool { return f.facts.Write == lock.WriteByNone }

// Version is that of the plugin, with the digest of its files.
func (f *format) Version() string { return f.program.version() }

// Memory is what this process needs for it.
func (f *format) Memory(streams int) int64 { return f.program.memory(streams) }

// IsWeights reports whether a file has a name by which the format is known.
func (f *format) IsWeights(name string) bool {
	folder, base := path.Split(name)
	return folder == "" && (f.named(strings.ToLower(base)) || f.isIndex(base))
}

// Holds refuses the types that the format has no place for, and blocks of other containers.
func (f *format) Holds(t tensor.Info) error {
	if t.Encoding != (tensor.Encoding{}) {
		return fmt.Errorf("tensor %s: %s: %w by %s", tensor.Quote(t.Name), tensor.Quote(t.Encoding.Name),
			formats.ErrUnsupported, f.Name())
	}
	if f.holds != nil && !slices.Contains(f.holds, t.DType) {
		return fmt.Errorf("tensor %s: %v: %w by %s, which holds %s", tensor.Quote(t.Name), t.DType, formats.ErrUnsupported,
			f.Name(), strings.Join(f.facts.DTypes, ", "))
	}
	return nil
}

// named reports whether a base name is one that the format is known by.
func (f *format) named(name string) bool {
	if slices.ContainsFunc(f.facts.Extensions, func(e string) bool { return strings.HasSuffix(name, e) }) {
		return true
	}
	return slices.ContainsFunc(f.facts.FileNames, func(glob string) bool {
		ok, err := path.Match(glob, name)
		return ok && err == nil
	})
}

// nameless reports whether the format is known by content alone. Its files are named as those of models are.
func (f *format) nameless() bool { return len(f.facts.Extensions)+len(f.facts.FileNames) == 0 }

const indexSuffix = ".index.json"

// isIndex reports whether a base name is that of an index: STEM.EXTENSION.index.json.
func (f *format) isIndex(name string) bool {
	name, ok := strings.CutSuffix(name, indexSuffix)
	return ok && slices.ContainsFunc(f.facts.Extensions, func(e string) bool { return strings.HasSuffix(name, e) })
}

// mostMagic is how far into a file the bytes are by which it is known.
const mostMagic = 4096

// known reports whether a file is of the format, by its name and its first bytes.
func (f *format) known(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if f.facts.Sniffed() || len(f.facts.Extensions)+len(f.facts.FileNames) > 0 && !f.named(path.Base(name)) {
		return false, nil
	}
	if len(f.facts.Magic) == 0 {
		return true, nil
	}
	file, err := dir.Open(ctx, name)
	if err != nil {
		return false, err
	}
	defer file.Close()
	return f.hasMagic(file)
}

// hasMagic reports whether a file has first bytes by which the format is known.
func (f *format) hasMagic(file storage.File) (bool, error) {
	start := make([]byte, min(mostMagic, file.Size()))
	if n, err := file.ReadAt(start, 0); n < len(start) && err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return slices.ContainsFunc(f.facts.Magic, func(m lock.Magic) bool {
		return m.Offset <= int64(len(start)) && bytes.HasPrefix(start[m.Offset:], m.Bytes)
	}), nil
}

// Detect goes by what is known of the format, and starts nothing; only one of which nothing is known is asked.
func (f *format) Detect(ctx context.Context, dir storage.Folder, name string) (bool, error) {
	if name == "" {
		found, err := f.candidates(ctx, dir)
		return len(found) > 0, err
	}
	if f.isIndex(path.Base(name)) {
		return true, nil
	}
	if !f.facts.Sniffed() {
		ok, err := f.known(ctx, dir, name)
		if errors.Is(err, storage.ErrNotRegular) {
			return false, nil
		}
		return ok, err
	}
	file := storage.LocalPath(dir, name)
	if file == "" {
		return false, nil
	}
	p, err := f.program.running(ctx)
	if err != nil {
		return false, err
	}
	call := p.begin(ctx)
	r, err := p.format.Sniff(call.ctx, &pb.SniffRequest{Format: f.Name(), Path: file})
	return r.GetYes(), call.end(err)
}

// candidates are the files of a folder that may be the one to open: its indices, and where there are none its files.
func (f *format) candidates(ctx context.Context, dir storage.Folder) ([]string, error) {
	entries, err := dir.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var indices, files []string
	for _, e := range entries {
		switch {
		case e.Folder || strings.HasPrefix(e.Name, "."):
		case f.isIndex(e.Name):
			indices = append(indices, e.Name)
		default:
			ok, err := f.known(ctx, dir, e.Name)
			if err != nil {
				if errors.Is(err, storage.ErrNotRegular) || errors.Is(err, storage.ErrDangling) {
					continue
				}
				return nil, err
			}
			if ok {
				files = append(files, e.Name)
			}
		}
	}
	if len(indices) > 0 {
		return indices, nil
	}
	return files, nil
}

// Open opens a file, the files of an index, or with no name what of these a folder has.
func (f *format) Open(ctx context.Context, dir storage.Folder, name string) (formats.Container, error) {
	p, err := f.program.running(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", formats.Display(dir.Path(name)), err)
	}
	r := &reader{format: f, process: p, ctx: ctx, dir: dir}
	c, err := formats.OpenFiles(ctx, dir, name, r)
	if err != nil {
		r.close()
		return nil, err
	}
	return r.container(c), nil
}

// Name is that of the format.
func (r *reader) Name() string { return r.format.Name() }

// Recognizes reports whether a file is known by its content. What another format takes it for is no news then: several
// formats are made of one kind of file, such as HDF5 or zip.
func (r *reader) Recognizes(f storage.File) bool {
	if r.format.facts.Sniffed() {
		return true // the plugin has said so
	}
	ok, err := r.format.hasMagic(f)
	return ok && err == nil
}

// IsIndex reports whether a file is an index.
func (r *reader) IsIndex(name string) bool { return r.format.isIndex(path.Base(name)) }

// Locate finds the one file of a folder to begin with.
func (r *reader) Locate(ctx context.Context, dir storage.Folder) (string, error) {
	shown := formats.Display(dir.Path(""))
	found, err := r.format.candidates(ctx, dir)
	switch {
	case err != nil:
		return "", err
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0:
		return "", fmt.Errorf("%s: found no %s file, expected one: %w", shown, r.Name(), fs.ErrNotExist)
	}
	return "", fmt.Errorf("%s: found %s, expected one of them or an index: %w; name the file", shown, formats.List(found),
		formats.ErrMalformed)
}

const (
	mostIndexBytes = 256 << 20
	mostShards     = 10_000
)

// ReadIndex reads an index as transformers writes it.
func (r *reader) ReadIndex(f storage.File) (formats.Index, error) {
	if f.Size() > mostIndexBytes {
		return formats.Index{}, fmt.Errorf("found %d bytes, expected at most %d: %w", f.Size(), mostIndexBytes,
			formats.ErrLimit)
	}
	var parsed struct {
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := json.UnmarshalRead(io.NewSectionReader(f, 0, f.Size()), &parsed); err != nil {
		return formats.Index{}, fmt.Errorf("%w: %w", formats.ErrMalformed, err)
	}
	if parsed.WeightMap == nil {
		return formats.Index{}, fmt.Errorf("found no weight_map, expected one: %w", formats.ErrMalformed)
	}
	x := formats.Index{Tensors: make(map[string]int32, len(parsed.WeightMap))}
	places := map[string]int32{}
	for name, file := range parsed.WeightMap {
		at, ok := places[file]
		if !ok {
			if len(x.Files) == mostShards {
				return formats.Index{}, fmt.Errorf("found more than %d files, expected fewer: %w", mostShards, formats.ErrLimit)
			}
			at = int32(len(x.Files))
			places[file] = at
			x.Files = append(x.Files, file)
		}
		x.Tensors[name] = at
	}
	return x, nil
}
