package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

// victim is a file of the format that is broken in many ways.
type victim struct {
	*format
	*written
	good   []byte
	header []int // the positions of bytes that are not a tensor's as they are
	spent  uint64
	seen   map[string]int
}

// mostVictim bounds the size of a sample that is broken, since it is written some hundred times.
const mostVictim = 4 << 20

// victims has files broken, the kit's and the samples, and says what has come of them.
func victims(ctx context.Context, f *format, thing string, tried func(v *victim) (int, error)) (string, error) {
	files, err := f.readable(ctx, f.small)
	if err != nil {
		return "", err
	}
	n, made := 0, 0
	seen := map[string]int{}
	why := error(nil)
	for _, w := range files {
		v, err := newVictim(ctx, f, w)
		if e := (*ending)(nil); errors.As(err, &e) && !e.failed {
			why = err
			continue
		}
		k := 0
		if err == nil {
			k, err = tried(v)
		}
		if err != nil {
			return "", w.in(err)
		}
		n, made = n+k, made+1
		for how, times := range v.seen {
			seen[how] += times
		}
	}
	if made == 0 {
		return "", why
	}
	said := fmt.Sprintf("%s: %d refused, %d refused when read, %d read", count(n, thing), seen["refused"],
		seen["refused when it is read"], seen["read"])
	if made > 1 {
		said = fmt.Sprintf("%d files, ", made) + said
	}
	if why != nil {
		said += "; but " + why.Error()
	}
	return said, nil
}

func newVictim(ctx context.Context, f *format, w *written) (*victim, error) {
	if info, err := os.Stat(w.path()); err == nil && w.sample && info.Size() > mostVictim {
		return nil, skip("the sample %s has %d bytes, expected at most %d to break", w.name, info.Size(), mostVictim)
	}
	err := error(nil)
	v := &victim{format: f, written: w, seen: map[string]int{}}
	if v.good, err = os.ReadFile(w.path()); err != nil {
		return nil, err
	}
	c, err := f.open(ctx, w)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := reads(c, w.list); err != nil {
		return nil, err
	}
	data := make([]bool, len(v.good))
	for _, t := range c.Tensors() {
		if inFile(t) && t.File == w.name {
			for i := t.Offset; i < t.Offset+t.Bytes; i++ {
				data[i] = true
			}
		}
	}
	for i := range data {
		if !data[i] {
			v.header = append(v.header, i)
		}
	}
	if len(v.header) == 0 {
		return nil, skip("the file has no header")
	}
	return v, nil
}

// try opens a broken file and reads what it has. It is refused by an error of a kind, or read. intact says that what
// is read has to be what was written.
func (v *victim) try(ctx context.Context, b []byte, intact bool) error {
	if err := os.WriteFile(v.path(), b, 0o600); err != nil {
		return err
	}
	started, before := time.Now(), allocated()
	err := v.look(ctx, intact)
	v.spent = max(v.spent, allocated()-before)
	if late := time.Since(started); err == nil && late > 2*soon {
		return fmt.Errorf("it takes %v", late.Round(time.Second))
	}
	return err
}

func (v *victim) look(ctx context.Context, intact bool) error {
	c, err := v.Open(ctx, storage.Local(v.dir, storage.Options{}), v.written.name)
	if err != nil {
		v.seen["refused"]++
		return v.run.kind(err)
	}
	defer c.Close()
	for _, t := range c.Tensors()[:min(100, len(c.Tensors()))] {
		const some = 1000 // bytes at both ends: what it says to be there may be very large
		for _, off := range []int64{0, t.Bytes - some} {
			p := make([]byte, min(t.Bytes, some))
			if off < 0 {
				break
			}
			if _, err := t.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
				if errors.Is(err, io.ErrUnexpectedEOF) {
					err = fmt.Errorf("%w: %w", formats.ErrMalformed, err)
				}
				v.seen["refused when it is read"]++
				return v.run.kind(err)
			}
		}
	}
	if intact {
		if err := reads(c, v.list); err != nil {
			return fmt.Errorf("it is read, and is not what it was: %w", err)
		}
	}
	v.seen["read"]++
	return nil
}

func badTruncated(ctx context.Context, f *format) (string, error) {
	return victims(ctx, f, "length", func(v *victim) (int, error) { return v.truncate(ctx) })
}

func (v *victim) truncate(ctx context.Context) (int, error) {
	const places = 25
	var cuts []int
	for i := range places {
		cuts = append(cuts, v.header[i*len(v.header)/places], i*len(v.good)/places)
	}
	cuts = append(cuts, len(v.good)-1)
	i := 0
	return len(cuts), v.all(ctx, true, func() ([]byte, string) {
		if i == len(cuts) {
			return nil, ""
		}
		n := cuts[i]
		i++
		return v.good[:n:n], fmt.Sprintf("cut to %d of %d bytes", n, len(v.good))
	})
}

func badBitflip(ctx context.Context, f *format) (string, error) {
	return victims(ctx, f, "bit", func(v *victim) (int, error) { return v.flip(ctx) })
}

func (v *victim) flip(ctx context.Context) (int, error) {
	const flips = 200
	random := source(200)
	i := 0
	return flips, v.all(ctx, false, func() ([]byte, string) {
		if i == flips {
			return nil, ""
		}
		at := v.header[random.IntN(len(v.header))]
		if i%4 == 0 { // the first bytes have what all else depends on
			at = v.header[random.IntN(min(64, len(v.header)))]
		}
		i++
		bit := random.IntN(8)
		b := bytes.Clone(v.good)
		b[at] ^= 1 << bit
		return b, fmt.Sprintf("bit %d of byte %d of %d changed", bit, at, len(b))
	})
}

// huge are numbers that are too large for a count: of 4 and 8 bytes, in either order, and in digits.
var huge = []string{"\xff\xff\xff\xff", "\xff\xff\xff\x7f", "\x7f\xff\xff\xff", "\xff\xff\xff\xff\xff\xff\xff\xff",
	"\xff\xff\xff\xff\xff\xff\xff\x7f", "\x00\x00\x00\x00\x01\x00\x00\x00", "99999999"}

func badHugeCount(ctx context.Context, f *format) (string, error) {
	return victims(ctx, f, "number", func(v *victim) (int, error) { return v.overwrite(ctx) })
}

func (v *victim) overwrite(ctx context.Context) (int, error) {
	var places []int
	const sparse, dense = 24, 32
	header := v.header[:min(len(v.header), 64<<10)]
	for i := range min(dense, len(header)) {
		places = append(places, header[i])
	}
	for i := range sparse {
		places = append(places, header[i*len(header)/sparse])
	}
	slices.Sort(places)
	places = slices.Compact(places)
	i, tried := 0, 0
	err := v.all(ctx, false, func() ([]byte, string) {
		for ; i < len(places)*len(huge); i++ {
			at, number := places[i/len(huge)], huge[i%len(huge)]
			if at+len(number) > len(v.good) {
				continue
			}
			i++
			tried++
			b := bytes.Clone(v.good)
			copy(b[at:], number)
			return b, fmt.Sprintf("%x written at byte %d of %d", number, at, len(b))
		}
		return nil, ""
	})
	return tried, err
}

// mostGrowth bounds what a file of some KiB may make a process take: as much as lorakit takes in all where nothing else
// is said. What grows by more has made memory for a count of the file.
const mostGrowth = 256 << 20

// all tries broken files, each of which is made by next until it makes none, and bounds the memory that they take. In
// this process it is what one of them has taken.
func (v *victim) all(ctx context.Context, intact bool, next func() (b []byte, how string)) error {
	watch := v.run.watch(ctx, mostGrowth)
	err := error(nil)
	for err == nil {
		b, how := next()
		if b == nil {
			break
		}
		if err = v.try(watch.ctx, b, intact); err != nil {
			err = fmt.Errorf("%s: %w", how, err)
		}
	}
	if before, peak, grown := watch.end(); grown {
		return fmt.Errorf("its process grows from %d to %d MiB by files of %d bytes, expected at most %d MiB more",
			before>>20, peak>>20, len(v.good), mostGrowth>>20)
	}
	if err == nil && v.spent > mostGrowth && (v.run.Plugin == nil || !v.run.Plugin.Owned()) {
		err = fmt.Errorf("it takes %d MiB for a file of %d bytes, expected at most %d", v.spent>>20, len(v.good),
			mostGrowth>>20)
	}
	return err
}

// allocated is how much memory this process has taken, in all.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}
