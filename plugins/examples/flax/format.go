package main

import (
	"context"
	"os"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/examples/flax/msgpack"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

// format is that of flax.serialization, in files named as transformers does.
type format struct{}

const extension = ".msgpack"

// Info tells a file by its name and its first byte: that of a map of up to 15, of up to 2^16-1, or of more keys.
func (format) Info() sdk.FormatInfo {
	i := sdk.FormatInfo{Name: "flax", Extensions: []string{extension}, DTypes: msgpack.DTypes()}
	for _, first := range []byte("\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\xde\xdf") {
		i.Magic = append(i.Magic, sdk.Magic{Bytes: []byte{first}})
	}
	return i
}

// Open reads the structure of a file. It stays open where there are arrays in chunks, which lorakit reads through here;
// all others it reads by itself.
func (format) Open(_ context.Context, path string) (sdk.Container, error) {
	f, err := os.Open(path)
	if err != nil {
		return sdk.Container{}, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return sdk.Container{}, err
	}
	found, err := msgpack.Read(f, info.Size())
	if err != nil {
		f.Close()
		return sdk.Container{}, err
	}
	c := sdk.Container{Metadata: found.Metadata, Tensors: make([]sdk.Tensor, len(found.Tensors))}
	for i, t := range found.Tensors {
		c.Tensors[i] = sdk.Tensor{Info: t.Info, Offset: t.Ranges[0].Offset}
		if len(t.Ranges) > 1 {
			c.Tensors[i].Data, c.Close = msgpack.NewPieces(f, t.Ranges), f.Close
		}
	}
	if c.Close == nil {
		return c, f.Close()
	}
	return c, nil
}

// Layout places tensors as flax.serialization does, in files and with an index as transformers has them.
func (format) Layout(_ context.Context, tensors []tensor.Info, o formats.Options) (formats.Layout, error) {
	l, err := formats.LayOut(tensors, o, formats.Naming{Stem: "flax_model", Extension: extension},
		func(name string, members []int, _ []int64) (formats.Shard, error) {
			infos := make([]tensor.Info, len(members))
			for i, m := range members {
				infos[i] = tensors[m]
			}
			f, err := msgpack.LayOut(infos)
			s := formats.Shard{Name: name, Size: f.Size, Frame: formats.Frame{Pieces: f.Pieces}, Offsets: f.Offsets}
			for _, i := range f.Order {
				s.Tensors = append(s.Tensors, members[i])
			}
			return s, err
		})
	if err == nil && len(o.Metadata) > 0 { // as leaves of the tree they would be taken for parameters
		names := make([]string, len(o.Metadata))
		for i, p := range o.Metadata {
			names[i] = p.Name
		}
		l.Notices = append(l.Notices, "Flax has no place for metadata: left out are "+formats.List(names))
	}
	return l, err
}
