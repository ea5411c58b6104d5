package kit

import (
	"archive/zip"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// sniffOwn: a file is known for what it is, and the folder that it is in.
func sniffOwn(ctx context.Context, f *format) (string, error) {
	w, err := f.small(ctx)
	if err != nil {
		return "", err
	}
	names := []string{w.name, ""}
	if f.sniffed() { // what has to be asked of each file is not looked for in folders
		names = names[:1]
	}
	for _, name := range names {
		ok, err := f.Detect(ctx, storage.Local(w.dir, storage.Options{}), name)
		if err != nil {
			return "", err
		}
		if !ok {
			return "", fmt.Errorf("%s is not taken for a file of the format", filepath.Join("folder", name, w.name))
		}
	}
	if f.sniffed() {
		return w.name + " is known", nil
	}
	return w.name + " is known, and the folder with it", nil
}

// foreign are files of others: their beginnings, under the names that they usually have.
func foreign() map[string][]byte {
	var torch bytes.Buffer
	z := zip.NewWriter(&torch)
	for _, name := range []string{"archive/data.pkl", "archive/version"} {
		m, err := z.Create(name)
		if err == nil {
			_, err = m.Write([]byte("\x80\x02}q\x00."))
		}
		if err != nil {
			panic(err) // memory takes all
		}
	}
	if err := z.Close(); err != nil {
		panic(err)
	}
	noise := make([]byte, 5000)
	fill(noise, 5)
	return map[string][]byte{
		"model.safetensors": []byte("\x40\x00\x00\x00\x00\x00\x00\x00" +
			`{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}` +
			strings.Repeat(" ", 11) + "data"),
		"pytorch_model.bin":  torch.Bytes(),
		"model.gguf":         append([]byte("GGUF\x03\x00\x00\x00"), make([]byte, 64)...),
		"model.npy":          []byte("\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }   \n"),
		"model.onnx":         []byte("\x08\x07\x12\x07pytorch\x1a\x032.1:\x00"),
		"config.json":        []byte("{\n  \"model_type\": \"llama\"\n}\n"),
		"README.md":          []byte("# A model\n\nWith words.\n"),
		"empty":              nil,
		"noise":              noise,
		"zeros":              make([]byte, 5000),
		"picture.png":        []byte("\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
		"page.html":          []byte("<!DOCTYPE html><html><title>404</title></html>"),
		"archive.tar.gz":     []byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"),
		"pointer.gitattribs": []byte("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
	}
}

// owners are the formats that the files are of.
var owners = map[string]string{"model.safetensors": "safetensors", "pytorch_model.bin": "pytorch"}

// sniffForeign: what is of another format is not taken for one's own; under a name of one's own it is refused.
func sniffForeign(ctx context.Context, f *format) (string, error) {
	dir, err := f.run.folder()
	if err != nil {
		return "", err
	}
	folder := storage.Local(dir, storage.Options{})
	if ok, err := f.Detect(ctx, folder, ""); ok || err != nil {
		return "", cmp.Or(err, errors.New("an empty folder is taken for one of the format"))
	}
	own := "own" + strings.Join(f.Extensions()[:min(1, len(f.Extensions()))], "")
	seen := 0
	files := foreign()
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		named := func(extension string) bool { return strings.HasSuffix(name, extension) }
		if owners[name] == f.Name() || slices.ContainsFunc(f.Extensions(), named) {
			continue
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, files[name], 0o600); err != nil {
			return "", err
		}
		ok, err := f.Detect(ctx, folder, name)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		if ok {
			return "", fmt.Errorf("%s (%d bytes) is taken for a file of the format", name, len(files[name]))
		}
		if err := os.Rename(path, filepath.Join(dir, own)); err != nil {
			return "", err
		}
		if err := refuses(ctx, f, folder, own); err != nil {
			return "", fmt.Errorf("%s under the name %s: %w", name, own, err)
		}
		seen++
	}
	return fmt.Sprintf("%d files of others are not taken for its own, and refused under a name of its own", seen), nil
}

// refuses makes sure that a file is refused as one that is broken.
func refuses(ctx context.Context, f *format, dir storage.Folder, name string) error {
	c, err := f.Open(ctx, dir, name)
	if err == nil {
		n := len(c.Tensors())
		c.Close()
		return fmt.Errorf("it is opened, and has %s", count(n, "tensor"))
	}
	return f.run.kind(err)
}

// kind makes sure that an error is one of those by which a file is refused.
func (r *run) kind(err error) error {
	kinds := []error{formats.ErrMalformed, formats.ErrLimit, formats.ErrUnsupported, formats.ErrForeign,
		formats.ErrUnknown, formats.ErrOutside, tensor.ErrOverflow}
	for _, k := range append(kinds, r.Kinds...) {
		if errors.Is(err, k) && !errors.Is(err, host.ErrFailed) {
			return nil
		}
	}
	if errors.Is(err, host.ErrFailed) {
		return err
	}
	return fmt.Errorf("the error is of no kind, such as formats.ErrMalformed: %w", err)
}

// roundtrip: tensors of a type are read back as they were written.
func roundtrip(ctx context.Context, f *format, d tensor.DType) (string, error) {
	// That it holds none of the common types says nothing of this one.
	if _, err := f.types(ctx); f.ReadOnly() || f.wrong != "" {
		return "", err
	}
	err := f.back(ctx, newSample("block.0.weight", d, 4, 8), newSample("block.0.bias", d, 8),
		newSample("head", d, 2, 3, 8))
	e := (*ending)(nil)
	if errors.As(err, &e) && !e.failed && f.facts != nil && slices.Contains(f.facts.DTypes, d.String()) {
		return "", fail("leave "+d.String()+" out of the dtypes that are described, or hold it",
			"it is described as held, and %s", e.text)
	}
	return "3 tensors", err
}

// any is a type that the format holds.
func (f *format) any(ctx context.Context) (tensor.DType, error) {
	types, err := f.types(ctx)
	if err != nil {
		return 0, err
	}
	return types[0], nil
}

func shape0d(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	return "a scalar among others", f.back(ctx, newSample("block.0.weight", d, 3), newSample("scale", d),
		newSample("block.1.weight", d, 2, 2))
}

func shapeEmpty(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	return "[0], [3, 0, 2] and [0, 5]", f.back(ctx, newSample("block.0.weight", d, 3), newSample("none", d, 0),
		newSample("nothing", d, 3, 0, 2), newSample("rows", d, 0, 5), newSample("block.1.weight", d, 2))
}

func shapeLargeRank(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	held := "none"
	for _, rank := range []int{8, 20, 60} {
		shape := slices.Repeat([]int64{1}, rank)
		shape[0], shape[rank/2], shape[rank-1] = 3, 2, 5
		err := f.back(ctx, newSample("deep", d, shape...))
		if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
			return "", skip("of %d dimensions: %s; held are %s", rank, e.text, held)
		}
		if err != nil {
			return "", fmt.Errorf("%d dimensions: %w", rank, err)
		}
		held = fmt.Sprint(rank)
	}
	return held + " dimensions", nil
}

func nameLong(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	long := strings.Repeat("long.name-", 6553) + "123456"
	return "two names of 64 KiB that differ in the last letter", f.back(ctx, newSample(long[:len(long)-1]+"a", d, 3),
		newSample(long[:len(long)-1]+"b", d, 2))
}

func nameNonASCII(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	var list []sample
	for i, name := range []string{
		"größe", "gro\u0308ße", "層.0.重み", "🦙", "Ελληνικά", "שם", "a b", "quote\"'",
	} {
		list = append(list, newSample(name, d, int64(i+1)))
	}
	return fmt.Sprintf("%d names, one of them in two normal forms", len(list)), f.back(ctx, list...)
}

// nameSlash: a name is no path. A format of paths may refuse those that are none.
func nameSlash(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	if err := f.back(ctx, newSample("a/b/weight", d, 3), newSample("a/b/bias", d, 2), newSample("a.c", d, 4)); err != nil {
		return "", err
	}
	refused := 0
	odd := []string{"/a", "a//b", "../a", "a/../b", "./a", "a/", `a\b`}
	for _, name := range odd {
		err := f.back(ctx, newSample("z", d, 2), newSample(name, d, 3))
		if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
			refused++
		} else if err != nil {
			return "", fmt.Errorf("the name %q: %w", name, err)
		}
	}
	return fmt.Sprintf("a/b/weight is kept; of %d odd names %d are refused, the others kept", len(odd), refused), nil
}

func tensors10000(ctx context.Context, f *format) (string, error) {
	d, err := f.any(ctx)
	if err != nil {
		return "", err
	}
	long := strings.Repeat("x", 420) // so that a list of all is larger than a message may be
	var list []sample
	for i := range 10_000 {
		name := fmt.Sprintf("model.layers.%d.%s.experts.%d.weight", i/100, long, i%100)
		list = append(list, newSample(name, d, int64(i%3)+1))
	}
	return "10000 tensors", f.back(ctx, list...)
}

// order: the list is the same each time, and has the order of the data where that lies in a file; of several files too.
func order(ctx context.Context, f *format) (string, error) {
	files, err := f.readable(ctx, func(ctx context.Context) (*written, error) {
		types, err := f.types(ctx)
		switch {
		case err != nil:
			return nil, err
		case f.sniffed(): // it has no index
			return f.large(ctx)
		}
		return f.shards(ctx, types[0])
	})
	if err != nil {
		return "", err
	}
	var seen ways
	for _, w := range files {
		if err := w.in(listed(ctx, f, w, &seen)); err != nil {
			return "", err
		}
	}
	all := count(seen.extents+seen.opaque, "tensor")
	switch {
	case seen.opaque == 0:
		return all + ", in the order of their data, the same each time", nil
	case seen.extents == 0:
		return all + ", the same each time; all are opaque, so that the order of their data is not seen", nil
	}
	return all + ", the same each time; " + count(seen.extents, "extent") + " in the order of their data, " +
		count(seen.opaque, "tensor") + " opaque", nil
}

// listed opens a file several times.
func listed(ctx context.Context, f *format, w *written, seen *ways) error {
	var names []string
	for i := range 3 {
		c, err := f.open(ctx, w)
		if err != nil {
			return err
		}
		if i == 0 {
			seen.add(c)
		}
		again, err := ordered(c, w)
		if err = errors.Join(err, c.Close()); err != nil {
			return err
		}
		if i > 0 && !slices.Equal(names, again) {
			return errors.New("found the tensors in one order and then in another, expected the same each time")
		}
		names = again
	}
	return nil
}

// ordered lists the tensors of a file.
func ordered(c formats.Container, w *written) ([]string, error) {
	var names []string
	last := formats.Tensor{}
	for _, t := range c.Tensors() {
		names = append(names, t.Name)
		if !inFile(t) || t.Bytes == 0 {
			continue
		}
		if last.File == t.File && t.Offset < last.Offset+last.Bytes {
			return nil, fmt.Errorf("%s: found %s at %d of %s after %s at %d, expected the order of the data", w.name,
				tensor.Quote(t.Name), t.Offset, t.File, tensor.Quote(last.Name), last.Offset)
		}
		last = t
	}
	return names, reads(c, w.list)
}

// shards writes several files with an index.
func (f *format) shards(ctx context.Context, d tensor.DType) (*written, error) {
	dir, err := f.run.folder()
	if err != nil {
		return nil, err
	}
	var list []sample
	for _, name := range []string{"z", "m.weight", "a.weight", "k", "b.0", "y", "c", "x"} {
		list = append(list, newSample(name, d, 100))
	}
	l, err := f.layout(ctx, list, formats.Options{MaxShardSize: int64(3 * len(list[0].data))})
	if err != nil {
		return nil, err
	}
	// Of what is built in, files may know one another by their names.
	if len(l.Shards) != 3 || len(l.Extra) == 0 && f.facts != nil {
		return nil, fail("keep to MaxShardSize, and lay out an index beside several files (formats.LayOut does both)",
			"found %s and %d beside, expected 3 with an index, by a MaxShardSize of 3 of 8 tensors",
			count(len(l.Shards), "file"), len(l.Extra))
	}
	return &written{dir: dir, list: list}, f.fill(ctx, dir, l, list)
}
