package pytorch

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/tensor"
)

// Layout places the tensors in files as torch.save writes a dict of them, byte for byte: a zip archive, the tensors in
// the order given, each with a storage of its own whose data begins at a multiple of 64 bytes. What torch.save adds
// since 2.1, the hash .data/serialization_id, is left out; nothing needs it. The checksums in the archive are of the
// data, so each shard has to be sealed.
//
// One file is named pytorch_model.bin; of several the first is pytorch_model-00001-of-00003.bin, and there is an
// index. See formats.LayOut. As in torch.save the folder within the archive is called as the file is, without its
// extension.
//
// A dict of tensors has no place for metadata: transformers takes whatever is in it for a weight. It is left out with
// a notice, but for "format", which Open says again.
//
// F6_E3M2 and F6_E2M3, which PyTorch does not have, are ErrUnsupported, and so is an F4 whose last dimension is odd.
// More than 64 dimensions and what Open would refuse to read are formats.ErrLimit.
func (f Format) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	limits := f.Limits.withDefaults()
	stored := make([]storedTensor, len(tensors))
	for i, t := range tensors {
		var err error
		if stored[i], err = store(t, limits); err != nil {
			return formats.Layout{}, tensorError(t.Name, err)
		}
	}
	l, err := formats.LayOut(tensors, o, formats.Naming{Stem: "pytorch_model", Extension: ".bin"},
		func(name string, members []int, sizes []int64) (formats.Shard, error) {
			return layShard(name, stored, sizes, members, limits)
		})
	if err != nil {
		return l, err
	}
	var left []string
	for _, p := range o.Metadata {
		if p.Name != formatName && p.Name != ignoredName {
			left = append(left, p.Name)
		}
	}
	if slices.Sort(left); len(left) > 0 {
		l.Notices = append(l.Notices, fmt.Sprintf("metadata is left out, %s files have no place for it: %s", f.Name(),
			formats.List(left)))
	}
	return l, nil
}

// storedTensor is a tensor in PyTorch's terms: what its pickle says of it.
type storedTensor struct {
	name          string
	shape, stride []int64
	class         string // of its storage
	dtype         string // where the storage does not say it
	count         int64  // of the storage's elements
}

// storageClass has the storage class of the dtypes that have one. The others are stored as bytes, with the dtype
// beside.
var storageClass = map[tensor.DType]string{
	tensor.F64: "DoubleStorage", tensor.F32: "FloatStorage", tensor.F16: "HalfStorage", tensor.BF16: "BFloat16Storage",
	tensor.I64: "LongStorage", tensor.I32: "IntStorage", tensor.I16: "ShortStorage", tensor.I8: "CharStorage",
	tensor.U8:   "ByteStorage",
	tensor.Bool: "BoolStorage", tensor.C64: "ComplexFloatStorage",
}

// Holds says of an encoding, and of a dtype that PyTorch does not have, that there is no place for it.
func (Format) Holds(t tensor.Info) error {
	if t.DType.Torch() != "" {
		return nil
	}
	var known []string
	for d := tensor.DType(1); d.Valid(); d++ {
		if d.Torch() != "" {
			known = append(known, d.String())
		}
	}
	return unsupportedf("found dtype %s, expected one that PyTorch has: %s", t.Type(), strings.Join(known, ", "))
}

func store(t tensor.Info, limits Limits) (s storedTensor, err error) {
	if err := (Format{}).Holds(t); err != nil {
		return s, err
	}
	if len(t.Shape) > limits.Rank {
		return s, limitf("found %d dimensions, expected at most %d", len(t.Shape), limits.Rank)
	}
	if len(t.Name) > int(min(limits.StringBytes, math.MaxInt32)) {
		return s, limitf("found a name of %d bytes, expected at most %d", len(t.Name), limits.StringBytes)
	}
	size, err := t.Size()
	if err != nil {
		return s, err
	}
	s = storedTensor{name: t.Name, shape: slices.Clone(t.Shape), stride: make([]int64, len(t.Shape)),
		class: storageClass[t.DType], count: size}
	if t.DType.Bits() < 8 { // what PyTorch counts as one element are two
		last := len(s.shape) - 1
		if last < 0 || s.shape[last]%2 != 0 {
			return s, unsupportedf("found shape %v of %v, expected a last dimension of pairs", t.Shape, t.DType)
		}
		s.shape[last] /= 2
	}
	if s.class == "" {
		s.dtype = t.DType.Torch()
	} else {
		s.count /= t.DType.Bits() / 8
	}
	// An empty dimension counts as one, so the product may overflow where the size does not.
	step := int64(1)
	for i := len(s.shape) - 1; i >= 0; i-- {
		s.stride[i] = step
		n := max(1, s.shape[i])
		if step > math.MaxInt64/n {
			return s, fmt.Errorf("shape %v: %w", t.Shape, tensor.ErrOverflow)
		}
		step *= n
	}
	return s, nil
}

// layShard lays out one file: the entries that torch.save writes, in its order.
func layShard(name string, tensors []storedTensor, sizes []int64, members []int, limits Limits) (formats.Shard, error) {
	s := formats.Shard{Name: name, Tensors: slices.Clone(members)}
	dict := make([]storedTensor, len(members))
	for i, t := range members {
		dict[i] = tensors[t]
	}
	pickle := pickleDict(dict)
	if n := int64(len(pickle)); n > limits.PickleBytes {
		return s, limitf("found a pickle of %d bytes, expected at most %d: smaller shards have smaller pickles", n,
			limits.PickleBytes)
	}
	// What is written has to be read: the pickle of very many tensors takes more memory than that may.
	if _, err := newMachine(newSource(bytes.NewReader(pickle), 0, int64(len(pickle))), limits).load(); err != nil {
		return s, fmt.Errorf("%w: smaller shards have smaller pickles", err)
	}
	z := newZip(folderName(name))
	z.add(pickleName, pickle)
	z.add(".format_version", []byte("1"))
	z.add(".storage_alignment", fmt.Append(nil, dataAlignment))
	z.add("byteorder", []byte("little"))
	for i, t := range members {
		s.Offsets = append(s.Offsets, z.reserve(fmt.Sprintf("data/%d", i), sizes[t]))
	}
	z.add("version", []byte("3\n"))
	if z.entries > limits.Entries || int64(len(z.directory)) > limits.DirectoryBytes {
		return s, limitf("found %d zip entries in a directory of %d bytes, expected at most %d in %d: smaller shards have "+
			"fewer",
			z.entries, len(z.directory), limits.Entries, limits.DirectoryBytes)
	}
	s.Frame, s.Size = z.close()
	return s, nil
}

// folderName is what torch.save calls the folder that all entries of a file are in.
func folderName(file string) string {
	name := file[strings.LastIndexAny(file, `/\`)+1:]
	if dot := strings.LastIndexByte(name, '.'); dot >= 0 {
		name = name[:dot]
	}
	ascii := !strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' })
	if name == "" || len(name) > math.MaxUint8 || !ascii {
		return "archive"
	}
	return name
}
