package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// format is a format that is checked.
type format struct {
	formats.Format
	run   *run
	facts *lock.Format // what the plugin says of it; nil for one that is built in
	held  []tensor.DType
	asked bool   // for held
	wrong string // the check that says why nothing can be written or read

	samples []stock
	looked  bool // for samples
}

func newFormat(r *run, f formats.Format) *format {
	x := &format{Format: f, run: r}
	if r.Plugin == nil {
		return x
	}
	list := r.Plugin.Described().Formats
	for i := range list {
		if list[i].Name == f.Name() {
			x.facts = &list[i]
		}
	}
	return x
}

// streams reports whether the format writes its files itself.
func (f *format) streams() bool {
	_, ok := f.Format.(formats.Streamer)
	return ok
}

// sniffed reports whether the plugin has to be asked of each file.
func (f *format) sniffed() bool { return f.facts != nil && f.facts.Sniffed() }

// written is a file of the format, and what is in it. It is alone in its folder, with the files that it names.
type written struct {
	dir, name string
	list      []sample
	sample    bool // it is a copy of one of the package
}

// in says of which file an error is, where it is not the kit's.
func (w *written) in(err error) error {
	if err == nil || !w.sample || errors.As(err, new(*ending)) {
		return err
	}
	return fmt.Errorf("sample %s: %w", w.name, err)
}

// path is where it is.
func (w *written) path() string { return filepath.Join(w.dir, w.name) }

// write writes tensors in a folder of their own, in one file, as a conversion does. What the format refuses ends the
// check as skipped.
func (f *format) write(ctx context.Context, list []sample) (*written, error) {
	dir, err := f.run.folder()
	if err != nil {
		return nil, err
	}
	l, err := f.layout(ctx, list, formats.Options{})
	if err != nil {
		return nil, err
	}
	if len(l.Shards) != 1 {
		return nil, fail("lay out one file where there is no MaxShardSize", "found %d files, expected one", len(l.Shards))
	}
	w := &written{dir: dir, name: l.Shards[0].Name, list: list}
	return w, f.fill(ctx, dir, l, list)
}

// layout has the format place tensors.
func (f *format) layout(ctx context.Context, list []sample, o formats.Options) (formats.Layout, error) {
	if f.ReadOnly() {
		return formats.Layout{}, skip("it is only read")
	}
	for _, s := range list {
		if err := f.Holds(s.Info); err != nil {
			return formats.Layout{}, f.refused(err)
		}
	}
	l, err := f.Layout(ctx, infos(list), o)
	if err != nil {
		return l, f.refused(err)
	}
	return l, nil
}

// refused makes of a refusal the end of a check that is skipped.
func (f *format) refused(err error) error {
	if errors.Is(err, formats.ErrUnsupported) {
		return skip("it refuses this: %v", err)
	}
	return fmt.Errorf("it does not write this, and does not refuse it as not supported: %w", err)
}

// fill writes the files of a layout.
func (f *format) fill(ctx context.Context, dir string, l formats.Layout, list []sample) error {
	for _, s := range l.Shards {
		if filepath.Base(s.Name) != s.Name {
			return fail("name files without a folder", "found the file name %q", s.Name)
		}
		path := filepath.Join(dir, s.Name)
		var err error
		if s.Size == formats.UnknownSize {
			err = f.stream(ctx, path, &s, list)
		} else {
			err = place(path, &s, list)
		}
		if err != nil {
			return err
		}
	}
	for _, x := range l.Extra {
		if err := os.WriteFile(filepath.Join(dir, x.Name), x.Data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// place writes a file whose bytes have known places.
func place(path string, s *formats.Shard, list []sample) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(s.Size); err != nil {
		return err
	}
	for i, t := range s.Tensors {
		if off, n := s.Offsets[i], int64(len(list[t].data)); off < 0 || n > s.Size-off {
			return fail("place tensors within their file", "tensor %s: found %d bytes at %d of %d",
				tensor.Quote(list[t].Name), n, off, s.Size)
		}
		if _, err := file.WriteAt(list[t].data, s.Offsets[i]); err != nil {
			return err
		}
	}
	pieces, err := s.Sealed(file)
	if err != nil {
		return err
	}
	for _, p := range pieces {
		if p.Offset < 0 || int64(len(p.Bytes)) > s.Size-p.Offset {
			return fail("place headers within their file", "found %d bytes at %d of %d", len(p.Bytes), p.Offset, s.Size)
		}
		if _, err := file.WriteAt(p.Bytes, p.Offset); err != nil {
			return err
		}
	}
	return file.Close()
}

// chunk is how much is written at once: not a number that divides what a plugin is likely to work in.
const chunk = 700_001

// stream has the format write a file.
func (f *format) stream(ctx context.Context, path string, s *formats.Shard, list []sample) error {
	w, err := f.create(ctx, path, s, list)
	if err != nil {
		return err
	}
	size, err := int64(0), pour(w, s, list, -1)
	if err == nil {
		size, err = w.Finish(ctx)
	}
	if err != nil {
		return errors.Join(f.refused(err), w.Abort())
	}
	info, err := os.Lstat(path)
	if err != nil {
		return fail("Create, Write and Finish make the file at the path that is given",
			"found no file where it was to be: %v", err)
	}
	switch {
	case !info.Mode().IsRegular():
		return fail("make a regular file at the path that Create gives", "found a file of mode %v, expected a regular one",
			info.Mode())
	case info.Size() != size:
		return fail("Finish returns the size of the file", "Finish says %d bytes, the file has %d", size, info.Size())
	}
	return nil
}

func (f *format) create(ctx context.Context, path string, s *formats.Shard, list []sample) (formats.Writer, error) {
	streamer, ok := f.Format.(formats.Streamer)
	if !ok {
		return nil, fail("state sizes, or implement Streamer", "it lays out a file of unknown size, and does not write it")
	}
	members := make([]tensor.Info, len(s.Tensors))
	for i, t := range s.Tensors {
		members[i] = list[t].Info
	}
	w, err := streamer.Create(ctx, path, members, nil)
	if err != nil {
		return nil, f.refused(err)
	}
	return w, nil
}

// pour writes the data of a shard, or so many bytes of it.
func pour(w formats.Writer, s *formats.Shard, list []sample, most int) error {
	for i, t := range s.Tensors {
		data := list[t].data
		for off := 0; off < len(data) && most != 0; {
			n := min(len(data)-off, chunk)
			if most > 0 {
				n = min(n, most)
				most -= n
			}
			if err := w.Write(i, int64(off), data[off:off+n]); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

// open opens a file.
func (f *format) open(ctx context.Context, w *written) (formats.Container, error) {
	c, err := f.Open(ctx, storage.Local(w.dir, storage.Options{}), w.name)
	switch {
	case err != nil && w.sample:
		return nil, fmt.Errorf("it does not read the sample %s of its package any more: %w", w.name, err)
	case err != nil:
		return nil, fmt.Errorf("it does not read what it has written: %w", err)
	}
	return c, nil
}

// mostReads is how many tensors of a container are read through the plugin, of many.
const mostReads = 1000

// reads makes sure that a container has some tensors, and no others, as they are.
func reads(c formats.Container, list []sample) error {
	step := len(list)/mostReads + 1
	want := make(map[string]*sample, len(list))
	for i := range list {
		want[list[i].Name] = &list[i]
	}
	for i, t := range c.Tensors() {
		s, ok := want[t.Name]
		if !ok {
			return fmt.Errorf("found the tensor %s, which was not written, or is there twice", tensor.Quote(t.Name))
		}
		delete(want, t.Name)
		if t.DType != s.DType || !slices.Equal(t.Shape, s.Shape) || t.Encoding != s.Encoding {
			return fmt.Errorf("tensor %s: found %v %v, expected %v %v", tensor.Quote(t.Name), t.Type(), t.Shape, s.Type(),
				s.Shape)
		}
		if t.Bytes != int64(len(s.data)) {
			return fmt.Errorf("tensor %s: found %d bytes, expected %d", tensor.Quote(t.Name), t.Bytes, len(s.data))
		}
		if i%step != 0 && !inFile(t) {
			continue
		}
		if err := rangeIs(t, 0, s.data); err != nil {
			return err
		}
	}
	for _, s := range list {
		if want[s.Name] != nil {
			return fmt.Errorf("found no tensor %s, expected it as it was written", tensor.Quote(s.Name))
		}
	}
	return nil
}

// rangeIs makes sure that a tensor has some bytes at an offset.
func rangeIs(t formats.Tensor, off int64, want []byte) error {
	got := make([]byte, len(want))
	if n, err := t.ReadAt(got, off); n < len(got) && err != nil {
		return fmt.Errorf("tensor %s: %d bytes at %d: %w", tensor.Quote(t.Name), len(want), off, err)
	} else if n < len(got) {
		return fmt.Errorf("tensor %s: found %d bytes at %d, expected %d", tensor.Quote(t.Name), n, off, len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("tensor %s: found the byte %#02x at %d (in a range of %d from %d), expected %#02x",
				tensor.Quote(t.Name), got[i], off+int64(i), len(want), off, want[i])
		}
	}
	return nil
}

// back writes tensors and reads them.
func (f *format) back(ctx context.Context, list ...sample) error {
	w, err := f.write(ctx, list)
	if err != nil {
		return err
	}
	defer os.RemoveAll(w.dir)
	c, err := f.open(ctx, w)
	if err != nil {
		return err
	}
	return errors.Join(reads(c, list), c.Close())
}

// common are the types that most formats have one of.
var common = []tensor.DType{
	tensor.F32, tensor.U8, tensor.F16, tensor.BF16, tensor.I32, tensor.I64, tensor.I8, tensor.F64,
}

// types are those of common that the format holds. Where it holds some and none of them can be written and read, the
// first check that asks says why, and those after it are skipped.
func (f *format) types(ctx context.Context) ([]tensor.DType, error) {
	if f.ReadOnly() {
		return nil, skip("it is only read")
	}
	if err := f.nothing(); err != nil {
		return nil, err
	}
	if !f.asked {
		failed := error(nil)
		for _, d := range common {
			err := f.tries(ctx, d)
			if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
				continue
			}
			if ctx.Err() != nil || unanswered(err) && len(f.held) == 0 {
				f.wrong = f.run.current
				return nil, err
			}
			if err != nil {
				if failed == nil {
					failed = err
				}
				f.run.restart()
				continue
			}
			f.held = append(f.held, d)
		}
		if failed != nil && len(f.held) == 0 {
			f.wrong = f.run.current
			return nil, failed
		}
		f.asked = true
	}
	if len(f.held) == 0 {
		return nil, skip("it holds none of the types %v", common)
	}
	return f.held, nil
}

// nothing skips a check where another one has found that nothing can be written and read.
func (f *format) nothing() error {
	if f.wrong != "" && f.wrong != f.run.current {
		if f.ReadOnly() {
			return skip("see %s: nothing can be read", f.wrong)
		}
		return skip("see %s: nothing can be written and read", f.wrong)
	}
	return nil
}

// tries writes and reads a tensor, whatever it is that is read.
func (f *format) tries(ctx context.Context, d tensor.DType) error {
	w, err := f.write(ctx, []sample{newSample("block.0.weight", d, 2, 3)})
	if err != nil {
		return err
	}
	defer os.RemoveAll(w.dir)
	c, err := f.open(ctx, w)
	if err != nil {
		return err
	}
	_, err = contents(c)
	return errors.Join(err, c.Close())
}

// restart ends a plugin that may have failed, so that it is started again.
func (r *run) restart() {
	if r.Plugin != nil {
		r.Plugin.Stop()
	}
}

// small is a file of a few small tensors, or a sample.
func (f *format) small(ctx context.Context) (*written, error) {
	if f.ReadOnly() {
		return f.first(ctx)
	}
	types, err := f.types(ctx)
	if err != nil {
		return nil, err
	}
	var list []sample
	for i, d := range types[:min(4, len(types))] { // it is read many times
		list = append(list, newSample(fmt.Sprintf("block.%d.weight", i), d, 5, 7),
			newSample(fmt.Sprintf("block.%d.bias", i), d, 5))
	}
	return f.write(ctx, list)
}

// large is a file with a tensor of some MiB among others, or a sample.
func (f *format) large(ctx context.Context) (*written, error) {
	if f.ReadOnly() {
		return f.first(ctx)
	}
	types, err := f.types(ctx)
	if err != nil {
		return nil, err
	}
	d := types[0]
	if slices.Contains(types, tensor.U8) {
		d = tensor.U8 // so that a tensor may have any number of bytes
	}
	n := (int64(3)<<20 + 13) / (d.Bits() / 8)
	return f.write(ctx, []sample{newSample("block.0.bias", types[0], 17), newSample("block.0.weight", d, n),
		newSample("block.1.weight", types[len(types)-1], 129, 31), newSample("block.2.weight", d, n/3)})
}

// readable are a file that is written, where the format is, and the samples of the package.
func (f *format) readable(ctx context.Context, write func(context.Context) (*written, error)) ([]*written, error) {
	if err := f.nothing(); err != nil {
		return nil, err
	}
	var list []*written
	why := error(skip("it is only read, and the package has no folder testdata or samples with a file of it"))
	if !f.ReadOnly() {
		w, err := write(ctx)
		if e := (*ending)(nil); err != nil && (!errors.As(err, &e) || e.failed) {
			return nil, err
		}
		if why = err; err == nil {
			list = append(list, w)
		}
	} else if f.run.Samples != "" {
		why = skip("it is only read, and %s has no file of it", filepath.Base(f.run.Samples))
	}
	stocked, err := f.stocked(ctx)
	if err != nil {
		return nil, err
	}
	for i := range stocked {
		w, err := f.copied(&stocked[i])
		if err != nil {
			return nil, err
		}
		list = append(list, w)
	}
	if len(list) == 0 {
		return nil, why
	}
	return list, nil
}

// first is a sample.
func (f *format) first(ctx context.Context) (*written, error) {
	list, err := f.readable(ctx, nil)
	if err != nil {
		return nil, err
	}
	return list[0], nil
}

const (
	// mostSample bounds the data of a sample.
	mostSample = 64 << 20
	// mostSamples is how many samples of a format are used.
	mostSamples = 4
)

// stock is a file of the format that the plugin's package has, with what was read of it at first.
type stock struct {
	files []string // the file and those that it names
	list  []sample
}

// stocked are the samples of the format. Where one cannot be read, the first check that asks says why, and those after
// it do without.
func (f *format) stocked(ctx context.Context) ([]stock, error) {
	if f.looked || f.run.Samples == "" {
		return f.samples, nil
	}
	entries, err := os.ReadDir(f.run.Samples)
	if err != nil {
		return nil, err
	}
	f.looked = true
	from := storage.Local(f.run.Samples, storage.Options{})
	failed := error(nil)
	for _, e := range entries {
		if len(f.samples) == mostSamples {
			break
		}
		if !e.Type().IsRegular() {
			continue
		}
		if ok, err := f.Detect(ctx, from, e.Name()); !ok || err != nil {
			continue // something else
		}
		s, err := f.stock(ctx, from, e.Name())
		switch {
		case err == nil:
			f.samples = append(f.samples, s)
		case failed == nil:
			failed = err
			f.run.restart()
		}
		if unanswered(err) {
			break
		}
	}
	if failed != nil && len(f.samples) == 0 && f.ReadOnly() {
		f.wrong = f.run.current
	}
	return f.samples, failed
}

// stock reads a sample.
func (f *format) stock(ctx context.Context, from storage.Folder, name string) (stock, error) {
	s := stock{files: []string{name}}
	c, err := f.Open(ctx, from, name)
	if err != nil {
		err = fmt.Errorf("it does not read the sample %s of its package: %w", name, err)
		if errors.Is(err, host.ErrFailed) || knownAdvice(err) != "" {
			return s, err
		}
		return s, fail("read each sample of the package; files that are to be refused belong into another folder, such as "+
			"testdata/broken", "%v", err)
	}
	defer c.Close()
	if s.list, err = contents(c); err != nil {
		return s, fmt.Errorf("sample %s: %w", name, err)
	}
	for _, t := range c.Tensors() {
		if !slices.Contains(s.files, t.File) {
			s.files = append(s.files, t.File)
		}
	}
	return s, nil
}

// copied is a copy of a sample.
func (f *format) copied(s *stock) (*written, error) {
	dir, err := f.run.folder()
	if err != nil {
		return nil, err
	}
	for _, name := range s.files {
		if name = filepath.FromSlash(name); !filepath.IsLocal(name) {
			return nil, fmt.Errorf("sample %s: found the file name %q, expected one below its folder", s.files[0], name)
		}
		b, err := os.ReadFile(filepath.Join(f.run.Samples, name))
		if err != nil {
			return nil, err
		}
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return nil, err
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			return nil, err
		}
	}
	return &written{dir: dir, name: s.files[0], list: s.list, sample: true}, nil
}

// contents reads all of a sample.
func contents(c formats.Container) ([]sample, error) {
	var list []sample
	total := int64(0)
	for _, t := range c.Tensors() {
		if total += t.Bytes; t.Bytes > mostSample || total > mostSample {
			return nil, skip("found a sample of more than %d bytes, expected a smaller one", mostSample)
		}
		s := sample{t.Info, make([]byte, t.Bytes)}
		if err := formats.ReadFull(t, s.data, 0); err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

// inFile reports whether the data of a tensor lies in a file as it is, and lorakit reads it by itself.
func inFile(t formats.Tensor) bool {
	_, ok := storage.OSFile(t.Data)
	return ok
}

// ways counts tensors by how their data is read.
type ways struct{ extents, opaque int }

func (w *ways) add(c formats.Container) {
	for _, t := range c.Tensors() {
		if inFile(t) {
			w.extents++
		} else {
			w.opaque++
		}
	}
}

// told says how many tensors there were of each kind, and that there was none of one that the plugin claims to have.
func (f *format) told(w ways) string {
	if f.run.Plugin == nil { // it is read by lorakit in any case
		return count(w.extents+w.opaque, "tensor")
	}
	s := count(w.extents, "extent") + " and " + count(w.opaque, "opaque tensor")
	if w.extents == 0 && f.run.Plugin.Described().Can(lock.Extents) {
		s += "; the plugin has the capability extents (in Go always), and shows none here"
	}
	return s
}

// count is a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// largest is the tensor of most bytes among those of a kind, with what it should have. It reports false where there is
// none.
func largest(c formats.Container, list []sample, kind func(formats.Tensor) bool) (
	best formats.Tensor, data []byte, ok bool, err error) {
	for _, t := range c.Tensors() {
		if kind(t) && (!ok || t.Bytes >= best.Bytes) {
			best, ok = t, true
		}
	}
	if !ok {
		return best, nil, false, nil
	}
	for _, s := range list {
		if s.Name == best.Name && int64(len(s.data)) == best.Bytes {
			return best, s.data, true, nil
		}
	}
	return best, nil, true, fmt.Errorf("found the tensor %s of %d bytes, expected one that was written",
		tensor.Quote(best.Name), best.Bytes)
}

// opaque reports whether the data of a tensor is asked for.
func opaque(t formats.Tensor) bool { return !inFile(t) }

// whole reads all of a range, by the way that copies take.
func whole(t formats.Tensor) ([]byte, error) {
	r, ok := t.Data.(formats.RangeReader)
	if !ok {
		b := make([]byte, t.Bytes)
		return b, formats.ReadFull(t, b, 0)
	}
	var b bytes.Buffer
	err := r.ReadRange(t.Offset, t.Bytes, func(p []byte, at int64) error {
		if at != int64(b.Len()) {
			return fmt.Errorf("found a piece at %d, expected one at %d", at, b.Len())
		}
		_, err := b.Write(p)
		return err
	})
	return b.Bytes(), err
}
