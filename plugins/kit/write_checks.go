package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"time"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/lock"
)

// begun is a file that the format is to write itself.
func begun(ctx context.Context, f *format) (*written, *formats.Shard, error) {
	if f.ReadOnly() {
		return nil, nil, skip("it is only read")
	}
	if !f.streams() {
		return nil, nil, skip("lorakit writes its files, by the layout that it gives")
	}
	d, err := f.any(ctx)
	if err != nil {
		return nil, nil, err
	}
	dir, err := f.run.folder()
	if err != nil {
		return nil, nil, err
	}
	list := []sample{newSample("block.0.weight", d, 700, 512), newSample("block.1.weight", d, 700, 512)}
	l, err := f.layout(ctx, list, formats.Options{})
	if err != nil {
		return nil, nil, err
	}
	return &written{dir: dir, name: l.Shards[0].Name, list: list}, &l.Shards[0], nil
}

func writeAbort(ctx context.Context, f *format) (string, error) {
	w, shard, err := begun(ctx, f)
	if err != nil {
		return "", err
	}
	most := len(w.list[0].data)
	for _, n := range []int{0, 1000, most, most + 5000, -1} { // -1 is all
		if err := abort(ctx, f, w, shard, n); err != nil {
			return "", err
		}
	}
	// A run that is cancelled aborts what it has begun.
	within, cancel := context.WithCancel(ctx)
	defer cancel()
	writer, err := f.create(within, w.path(), shard, w.list)
	if err != nil {
		return "", err
	}
	_ = pour(writer, shard, w.list, most) // it may see the end already
	cancel()
	if err := gone(writer, w); err != nil {
		return "", fmt.Errorf("cancelled: %w", err)
	}
	// The path is free.
	if err := f.stream(ctx, w.path(), shard, w.list); err != nil {
		return "", fmt.Errorf("after it was aborted: %w", err)
	}
	c, err := f.open(ctx, w)
	if err != nil {
		return "", err
	}
	return "aborted at 5 places and cancelled: no file is left, and the path is free",
		errors.Join(reads(c, w.list), c.Close())
}

// abort begins a file, writes so much of it, and gives it up.
func abort(ctx context.Context, f *format, w *written, shard *formats.Shard, n int) error {
	writer, err := f.create(ctx, w.path(), shard, w.list)
	if err != nil {
		return err
	}
	if n != 0 {
		if err := pour(writer, shard, w.list, n); err != nil {
			return errors.Join(err, writer.Abort())
		}
	}
	if err := gone(writer, w); err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	return nil
}

// gone aborts a file, twice, and makes sure that it is not there.
func gone(writer formats.Writer, w *written) error {
	for range 2 {
		if err := writer.Abort(); err != nil {
			return fmt.Errorf("it does not abort: %w", err)
		}
	}
	// Who is cancelled does not wait for the plugin.
	var left []os.DirEntry
	for wait := time.Now(); time.Since(wait) < soon; time.Sleep(10 * time.Millisecond) {
		var err error
		if left, err = os.ReadDir(w.dir); err != nil || len(left) == 0 {
			return err
		}
	}
	return fmt.Errorf("found %s after Abort, expected nothing", left[0].Name())
}

func writeTwice(ctx context.Context, f *format) (string, error) {
	list, err := f.mixed(ctx)
	if err != nil {
		return "", err
	}
	if p := f.run.Plugin; p != nil && f.streams() && !p.Described().Can(lock.Deterministic) {
		return "", skip("the plugin does not promise it (capability deterministic)")
	}
	first, err := f.write(ctx, list)
	if err != nil {
		return "", err
	}
	if f.streams() {
		time.Sleep(1100 * time.Millisecond) // times in files are often of whole seconds
	}
	if f.run.Plugin != nil {
		f.run.Plugin.Stop() // another process has another seed of its hash maps
	}
	second, err := f.write(ctx, list)
	if err != nil {
		return "", err
	}
	if first.name != second.name {
		return "", fmt.Errorf("found the file names %s and %s, expected one", first.name, second.name)
	}
	a, err := os.ReadFile(first.path())
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(second.path())
	if err != nil {
		return "", err
	}
	if !bytes.Equal(a, b) {
		at := 0
		for at < min(len(a), len(b)) && a[at] == b[at] {
			at++
		}
		return "", fmt.Errorf("found files of %d and %d bytes that differ from byte %d on, expected the same", len(a),
			len(b), at)
	}
	for range 3 {
		x, err := f.Layout(ctx, infos(list), formats.Options{MaxShardSize: 5000})
		if err != nil {
			return "", err
		}
		y, err := f.Layout(ctx, infos(list), formats.Options{MaxShardSize: 5000})
		if err != nil {
			return "", err
		}
		if !reflect.DeepEqual(x, y) {
			return "", errors.New("found two layouts of the same tensors, expected one")
		}
	}
	return fmt.Sprintf("%d bytes, twice", len(a)), nil
}

// mixed are tensors of all types that the format holds.
func (f *format) mixed(ctx context.Context) ([]sample, error) {
	types, err := f.types(ctx)
	if err != nil {
		return nil, err
	}
	var list []sample
	for i, d := range types {
		for k := range 5 {
			list = append(list, newSample(fmt.Sprintf("block.%d.part.%d.weight", i, k), d, int64(20+i), int64(11+k)))
		}
	}
	return list, nil
}

func writeOnlyItsPath(ctx context.Context, f *format) (string, error) {
	list, err := f.mixed(ctx)
	if err != nil {
		return "", err
	}
	w, err := f.write(ctx, list)
	if err != nil {
		return "", err
	}
	if c, err := f.open(ctx, w); err != nil {
		return "", err
	} else if err := errors.Join(reads(c, list), c.Close()); err != nil {
		return "", err
	}
	found, err := os.ReadDir(w.dir)
	if err != nil {
		return "", err
	}
	for _, e := range found {
		if e.Name() != w.name {
			return "", fmt.Errorf("found %s beside %s, expected that file alone", e.Name(), w.name)
		}
	}
	above, err := os.ReadDir(f.run.dir)
	if err != nil {
		return "", err
	}
	for _, e := range above {
		if n, err := strconv.Atoi(e.Name()); err != nil || n < 1 || n > f.run.folders {
			return "", fmt.Errorf("found %s in the folder above %s, expected that file alone", e.Name(), w.name)
		}
	}
	if info, err := os.Lstat(w.path()); err != nil {
		return "", err
	} else if !info.Mode().IsRegular() {
		return "", fmt.Errorf("found a file of mode %v at %s, expected a regular one", info.Mode(), w.name)
	}
	if p := f.run.Plugin; p != nil {
		if err := p.Verify(); err != nil {
			return "", fmt.Errorf("it changes its own folder: %w", err)
		}
	}
	return "one file, nothing beside it, and nothing in the plugin's folder", nil
}
