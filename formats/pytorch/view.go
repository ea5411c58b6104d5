package pytorch

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"slices"
	"sync"

	"github.com/lorakit/lorakit/tensor"
)

// axis is one dimension of a view, in bytes: count steps, stride apart in the file, size apart in the row-major order
// of the tensor.
type axis struct{ count, stride, size int64 }

// layOut finds the bytes of a tensor in its storage, which is at place in the file: the first byte, and where they are
// not one range the axes to walk. It checks that the tensor stays in its storage.
func layOut(t *tensorRef, place span, limits Limits) (info tensor.Info, offset int64, axes []axis, err error) {
	if t.elements.dtype == 0 {
		return info, 0, nil, unsupportedf("found elements of %s, expected a type that other formats can hold",
			t.elements.name)
	}
	info = tensor.Info{DType: t.elements.dtype, Shape: slices.Clone(tensor.Shape(t.shape))}
	if info.DType.Bits() < 8 { // two elements in what PyTorch counts as one
		n := len(info.Shape)
		if n == 0 || info.Shape[n-1] > math.MaxInt64/2 {
			return info, 0, nil, unsupportedf("found shape %v of %s, expected a last dimension of pairs", info.Shape,
				t.elements.name)
		}
		info.Shape[n-1] *= 2
	}
	bytes, err := info.Size()
	if err != nil {
		return info, 0, nil, malformedf("%v", err)
	}
	if bytes == 0 {
		return info, place.offset, nil, nil
	}
	// The last element is at offset plus, for each dimension, (size-1)*stride.
	last := uint64(t.offset)
	for i, n := range t.shape {
		hi, lo := bits.Mul64(uint64(n-1), uint64(t.stride[i]))
		sum, carry := bits.Add64(last, lo, 0)
		if hi != 0 || carry != 0 {
			return info, 0, nil, malformedf("found shape %v with strides %v, expected one within its storage", t.shape, t.stride)
		}
		last = sum
	}
	// The storage has fewer than 2^63 bytes.
	if have := uint64(place.bytes / t.elements.bytes); last >= have {
		return info, 0, nil, malformedf("found shape %v with strides %v from element %d on, expected the last element "+
			"within the %d of storage %s",
			t.shape, t.stride, t.offset, have, tensor.Quote(t.storage.key))
	}
	if bytes > place.bytes && bytes > limits.ExpandedBytes {
		return info, 0, nil, limitf("found %d bytes expanded from a storage of %d, expected at most %d", bytes, place.bytes,
			limits.ExpandedBytes)
	}
	// From the last dimension on, one that continues the one behind it becomes one with it.
	axes = []axis{{t.elements.bytes, 1, 1}}
	for i := len(t.shape) - 1; i >= 0; i-- {
		inner := &axes[len(axes)-1]
		switch n, stride := t.shape[i], t.stride[i]*t.elements.bytes; {
		case n == 1:
		case stride == inner.count*inner.stride:
			inner.count *= n
		default:
			axes = append(axes, axis{n, stride, inner.count * inner.size})
		}
	}
	slices.Reverse(axes)
	if len(axes) == 1 {
		axes = nil
	}
	return info, place.offset + t.offset*t.elements.bytes, axes, nil
}

// view reads a tensor that is not one range of its file in row-major order.
type view struct {
	file   io.ReaderAt
	offset int64  // of the first element
	axes   []axis // the last one is a run of bytes
	bytes  int64
}

// windows are what pieces of the file are read into.
var windows = sync.Pool{New: func() any { b := make([]byte, windowBytes); return &b }}

const (
	windowBytes = 128 << 10
	// gapBytes is how much may lie between two pieces that are read as one: about what a system call costs.
	gapBytes = 2 << 10
)

// ReadAt reads bytes of the tensor. It may be called from several goroutines.
func (v *view) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	if off >= v.bytes {
		return 0, io.EOF
	}
	end := error(nil)
	if left := v.bytes - off; int64(len(p)) > left {
		p, end = p[:left], io.EOF
	}
	window := windows.Get().(*[]byte)
	defer windows.Put(window)
	if err := v.fill(p, 0, v.offset, off, *window); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, err
	}
	return len(p), end
}

// fill reads the bytes from off on of the part that begins at src in the file and has the axes from d on: what is left
// of a step of this axis, all whole steps at once, and what begins another step.
func (v *view) fill(p []byte, d int, src, off int64, window []byte) error {
	if d == len(v.axes)-1 {
		return readFull(v.file, p, src+off)
	}
	a := v.axes[d]
	i, within := off/a.size, off%a.size
	if within != 0 {
		n := min(a.size-within, int64(len(p)))
		if err := v.fill(p[:n], d+1, src+i*a.stride, within, window); err != nil {
			return err
		}
		p = p[n:]
		i++
	}
	if steps := int64(len(p)) / a.size; steps > 0 {
		n := steps * a.size
		box := slices.Clone(v.axes[d:])
		box[0].count = steps
		if err := gather(v.file, p[:n], box, src+i*a.stride, window); err != nil {
			return err
		}
		p = p[n:]
		i += steps
	}
	if len(p) > 0 {
		return v.fill(p, d+1, src+i*a.stride, 0, window)
	}
	return nil
}

// gather reads a box of whole axes. The pieces that lie close together in the file are read as one window, whichever
// axis they are steps of.
func gather(f io.ReaderAt, p []byte, box []axis, src int64, window []byte) error {
	run := box[len(box)-1].count
	steps := box[:len(box)-1]
	slices.SortStableFunc(steps, func(a, b axis) int { return cmp.Compare(a.stride, b.stride) })
	// The first axes make up the window, of the next one as many steps as fit.
	width := run
	n := 0
	for ; n < len(steps); n++ {
		a := steps[n]
		if a.stride-width > gapBytes || width > windowBytes || (a.count-1)*a.stride > windowBytes-width {
			break
		}
		width += (a.count - 1) * a.stride
	}
	inner, outer := steps[:n], steps[n:]
	if len(outer) > 0 && outer[0].stride-width <= gapBytes && width <= windowBytes {
		if fit := (windowBytes-width)/max(outer[0].stride, 1) + 1; fit > 1 {
			return gatherParts(f, p, outer, inner, fit, src, width, run, window)
		}
	}
	return gatherParts(f, p, outer, inner, 1, src, width, run, window)
}

// gatherParts goes through the outer axes, the first of them in parts of so many steps.
func gatherParts(f io.ReaderAt, p []byte, outer, inner []axis, fit, src, width, run int64, window []byte) error {
	if len(outer) == 0 {
		if len(inner) == 0 {
			return readFull(f, p[:run], src)
		}
		window = window[:width]
		if err := readFull(f, window, src); err != nil {
			return err
		}
		scatter(p, window, inner, run)
		return nil
	}
	a := outer[len(outer)-1]
	if len(outer) > 1 || fit == 1 {
		for i := range a.count {
			if err := gatherParts(f, p[i*a.size:], outer[:len(outer)-1], inner, fit, src+i*a.stride, width, run,
				window); err != nil {
				return err
			}
		}
		return nil
	}
	parts := append(slices.Clone(inner), a)
	for i := int64(0); i < a.count; i += fit {
		part := min(fit, a.count-i)
		parts[len(parts)-1].count = part
		if err := gatherParts(f, p[i*a.size:], nil, parts, 1, src+i*a.stride, width+(part-1)*a.stride, run,
			window); err != nil {
			return err
		}
	}
	return nil
}

// scatter copies the runs of a window to their places.
func scatter(p, window []byte, axes []axis, run int64) {
	if len(axes) == 0 {
		copy(p[:run], window)
		return
	}
	a := axes[len(axes)-1]
	if len(axes) > 1 {
		for i := range a.count {
			scatter(p[i*a.size:], window[i*a.stride:], axes[:len(axes)-1], run)
		}
		return
	}
	switch run {
	case 2:
		for i := range a.count {
			d, s := p[i*a.size:], window[i*a.stride:]
			d[0], d[1] = s[0], s[1]
		}
	case 4:
		for i := range a.count {
			le.PutUint32(p[i*a.size:], le.Uint32(window[i*a.stride:]))
		}
	default:
		for i := range a.count {
			copy(p[i*a.size:i*a.size+run], window[i*a.stride:])
		}
	}
}
