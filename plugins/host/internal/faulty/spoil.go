//go:build unix

package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
)

const tooLarge = 5 << 20

// spoil says what is sent in the place of answer n of a call; n is -1 where all have been sent.
func spoil(n int, m any) ([]any, error) {
	switch fault {
	case "error":
		return nil, status.Error(codes.Unknown, "a disk of the plugin's is full\nand more")
	case "unavailable":
		return nil, status.Error(codes.Unavailable, "not today")
	case "internal":
		return nil, status.Error(codes.Internal, "an accident")
	case "malformed":
		return nil, status.Error(codes.InvalidArgument, "found x,\n expected y")
	case "limit":
		return nil, status.Error(codes.ResourceExhausted, "found x, expected y")
	case "big":
		if p, ok := m.(proto.Message); ok {
			p.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 100, protowire.BytesType),
				make([]byte, tooLarge)))
		} else {
			m = &wire.Message{Data: [][]byte{make([]byte, tooLarge)}, Fields: []protowire.Number{2}}
		}
	case "garbage":
		if n >= 0 {
			m = &wire.Message{Data: [][]byte{{0xff, 0xff}}, Fields: []protowire.Number{1}}
		}
	case "nothing":
		return nil, nil
	}
	if n < 0 {
		if call == "Read" && fault == "long" {
			return []any{&wire.Message{Numbers: [5]int64{1 << 20}, Data: [][]byte{{0}}, Fields: []protowire.Number{2}}}, nil
		}
		return nil, nil
	}
	switch x := m.(type) {
	case *wire.Message:
		if n > 0 && call == "Read" { // the first chunk is enough
			return []any{m}, nil
		}
		return spoilData(x), nil
	case *pb.OpenResponse:
		spoilOpen(x)
	case *pb.ListResponse:
		return spoilList(n, x), nil
	case *pb.LayoutResponse:
		spoilLayout(x)
	case *pb.CreateResponse:
		if fault == "handle" {
			x.Handle++
		}
	case *pb.WriteResponse:
		if fault == "short" {
			x.Bytes--
		}
	case *pb.FindResponse:
		spoilFind(x)
	case *pb.EncoderResponse:
		spoilEncoder(x)
	case *pb.SchemeServiceFinishResponse:
		spoilFinish(x)
	case *pb.ConfigResponse:
		switch fault {
		case "json":
			x.Json = []byte(`{"a":`)
		case "array":
			x.Json = []byte(`[1]`)
		case "long":
			x.Json = []byte(`{"a": "` + strings.Repeat("x", 2<<20) + `"}`)
		}
	}
	return []any{m}, nil
}

// spoilData spoils the answers that have data: of Read, Decode and Encode.
func spoilData(m *wire.Message) []any {
	at, d := m.Numbers[0], m.Data[0]
	half := int64(len(d) / 2)
	chunk := func(at int64, data ...[]byte) any {
		x := &wire.Message{Numbers: [5]int64{at}, Data: data}
		for range data {
			x.Fields = append(x.Fields, 2)
		}
		return x
	}
	switch fault {
	case "short":
		m.Data[0], m.Owned = d[:half], nil
	case "longer":
		m.Data[0], m.Owned = append([]byte{0}, d...), nil
	case "overlap":
		return []any{chunk(at, d[:half]), chunk(at, d[:half]), chunk(at+half, d[half:])}
	case "gap":
		return []any{chunk(at+half, d[half:])}
	case "shifted":
		m.Numbers[0]++
	case "negative":
		m.Numbers[0] = -1
	case "two":
		return []any{chunk(at, d, d)}
	case "many":
		list := []any{chunk(at, d)}
		for range 100 {
			list = append(list, chunk(at+int64(len(d))))
		}
		return list
	case "output": // one less
		m.Data, m.Fields = m.Data[1:], m.Fields[1:]
	case "outputs": // one more
		m.Data, m.Fields = append(m.Data, []byte{1}), append(m.Fields, 2)
	case "carry":
		m.Data, m.Fields = m.Data[:3], m.Fields[:3]
	case "carries":
		m.Data, m.Fields = append(m.Data, m.Data[3]), append(m.Fields, 3)
	case "infinite":
		m.Data, m.Fields = [][]byte{{0xff, 0xff}}, []protowire.Number{4}
	case "infinite-outside":
		b, err := proto.Marshal(&pb.NonFinite{Index: math.MaxInt64})
		check(err)
		m.Data, m.Fields = [][]byte{b}, []protowire.Number{4}
	}
	return []any{m}
}

func spoilDescription(d *pb.DescribeResponse) {
	switch fault {
	case "newer":
		d.Protocol = 2
	case "version":
		d.Version = "1.0.1"
	case "format":
		d.Formats = d.Formats[:1]
	}
}

func spoilOpen(x *pb.OpenResponse) {
	names := map[string][]string{"up": {"../x"}, "absolute": {"/etc/passwd"}, "link": {"model.fx", "link.fx"},
		"missing": {"model.fx", "more.fx"}, "file-twice": {"model.fx", "model.fx"}, "folder": {"."}, "device": {"pipe.fx"}}
	if list, ok := names[fault]; ok {
		x.Files = list
	}
	switch fault {
	case "metadata-twice":
		x.Metadata = append(x.Metadata, &pb.Pair{Name: "a", Value: "1"}, &pb.Pair{Name: "a", Value: "2"})
	case "files":
		x.Files = nil
		for i := range 20_000 {
			x.Files = append(x.Files, fmt.Sprint(i))
		}
	}
}

func spoilList(n int, x *pb.ListResponse) []any {
	if n > 0 {
		return []any{x}
	}
	t := x.Tensors[0]
	at := func(off int64) { t.Place = &pb.StoredTensor_Extent{Extent: &pb.Extent{Offset: off}} }
	switch fault {
	case "outside":
		at(1 << 30)
	case "negative":
		at(-1)
	case "far":
		at(math.MaxInt64)
	case "file":
		at(0)
		t.File = "other.fx"
	case "dtype":
		t.Tensor.Dtype = "F7"
	case "shape":
		t.Tensor.Shape = []int64{-1, 2}
	case "overflow":
		t.Tensor.Shape = []int64{1 << 40, 1 << 40}
	case "large":
		at(0)
		t.Tensor.Shape = []int64{1 << 40}
	case "rank":
		t.Tensor.Shape = make([]int64, 1<<17)
	case "twice":
		x.Tensors = append(x.Tensors, t)
	case "empty":
		t.Tensor.Name = ""
	case "name":
		t.Tensor.Name = strings.Repeat("n", 2<<20)
	case "place":
		t.Place = nil
	case "tensor":
		t.Tensor = nil
	case "million":
		var list []any
		for i := range 110 {
			y := &pb.ListResponse{}
			for j := range 10_000 {
				y.Tensors = append(y.Tensors, &pb.StoredTensor{Tensor: &pb.Tensor{Name: fmt.Sprint(i, ".", j), Dtype: "U8",
					Shape: []int64{1}}, File: t.File, Place: t.Place})
			}
			list = append(list, y)
		}
		return list
	case "utf8":
		inner := append(protowire.AppendTag(nil, 1, protowire.BytesType), 3, 0xff, 0xfe, 0xfd)
		middle := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), inner)
		return []any{&wire.Message{Data: [][]byte{middle}, Fields: []protowire.Number{1}}}
	}
	return []any{x}
}

func spoilLayout(x *pb.LayoutResponse) {
	shard := x.Items[0].GetShard()
	var places []*pb.LayoutPlace
	var piece *pb.LayoutPiece
	for _, i := range x.Items {
		if p := i.GetPlace(); p != nil {
			places = append(places, p)
		}
		if p := i.GetPiece(); p != nil && piece == nil {
			piece = p
		}
	}
	if shard == nil || len(places) < 2 || piece == nil {
		panic("the layout is not as it was")
	}
	names := map[string]string{"slash": "a/b.fx", "up": "../x.fx", "absolute": "/tmp/x.fx", "dot": ".x.fx", "noname": "",
		"nul": "a\x00.fx", "backslash": `..\x.fx`}
	if name, ok := names[fault]; ok {
		shard.Name = name
	}
	add := func(item *pb.LayoutItem) { x.Items = append(x.Items, item) }
	extra := func(name string) {
		add(&pb.LayoutItem{Item: &pb.LayoutItem_Extra{Extra: &pb.LayoutExtra{Name: name, Data: []byte("x")}}})
	}
	switch fault {
	case "gap":
		shard.Size++
		places[len(places)-1].Offset++
	case "overlap":
		places[1].Offset--
	case "same":
		places[1].Offset = places[0].Offset
	case "before":
		places[0].Offset = -1
	case "far":
		places[0].Offset = math.MaxInt64
	case "small":
		shard.Size--
	case "negative":
		shard.Size = -1
	case "unknown":
		shard.Size = -1
		x.Items = append(x.Items[:1], x.Items[2:]...)
	case "lost":
		x.Items = append(x.Items[:1], x.Items[2:]...)
	case "again":
		places[1].Tensor = places[0].Tensor
	case "index":
		places[1].Tensor = 1 << 40
	case "none":
		x.Items = nil
	case "first":
		x.Items = x.Items[1:]
	case "piece":
		piece.Offset = -12
	case "checksum":
		add(&pb.LayoutItem{Item: &pb.LayoutItem_Checksum{Checksum: &pb.LayoutChecksum{Offset: 0, Length: 1 << 40}}})
	case "checksum-at":
		add(&pb.LayoutItem{Item: &pb.LayoutItem_Checksum{Checksum: &pb.LayoutChecksum{Length: 4, At: []int64{1 << 40}}}})
	case "checksum-in":
		add(&pb.LayoutItem{Item: &pb.LayoutItem_Checksum{Checksum: &pb.LayoutChecksum{Length: 4,
			At: []int64{places[0].Offset}}}})
	case "extra-up":
		extra("../x")
	case "extra-config":
		extra("config.json")
	case "extra-shard":
		extra(shard.Name)
	case "item":
		add(&pb.LayoutItem{})
	}
}

func spoilFind(x *pb.FindResponse) {
	want := func(name string, off, n int64) { x.Want = &pb.FindWant{Tensor: name, Offset: off, Length: n} }
	if x.Want != nil {
		switch fault {
		case "want-large":
			want(x.Want.Tensor, 0, 1<<30)
		case "want-negative":
			want(x.Want.Tensor, -1, 4)
		case "want-unknown":
			want("not there", 0, 4)
		case "want-far":
			want(x.Want.Tensor, math.MaxInt64, 4)
		}
		return
	}
	w := x.Weights[0]
	switch fault {
	case "rule":
		w.Parts[0].Rule.First = 1 << 40
	case "stride":
		w.Parts[0].Rule.Stride = 1 << 40
	case "rule-negative":
		w.Parts[0].Rule.Stride = -64
	case "wrap":
		w.Parts[0].Rule.Wrap = -1
	case "part":
		w.Parts[0].Name = "not there"
	case "parts":
		w.Parts = nil
	case "many-parts":
		for range 1000 {
			w.Parts = append(w.Parts, w.Parts[0])
		}
	case "unit":
		w.Unit = 0
	case "unit-large":
		w.Unit = math.MaxInt64
	case "type":
		w.Spec.Type = "nf4"
	case "values":
		w.Values = "I64"
	case "twice":
		x.Weights = append(x.Weights, w)
	case "shape":
		w.Tensor.Shape = []int64{1 << 40, 1 << 40}
	case "size":
		w.Tensor.Shape = []int64{1 << 40}
	case "weight":
		x.Weights[0] = &pb.FoundWeight{}
	}
}

func spoilEncoder(x *pb.EncoderResponse) {
	o := x.Outputs
	switch fault {
	case "none":
		x.Outputs = nil
	case "rule":
		o[0].Rule.First = 1
	case "stride":
		o[0].Rule.Stride = 1 << 40
	case "wrap":
		o[0].Rule.Wrap = 1
	case "unit":
		x.Unit = 0
	case "carry":
		x.Carry = -1
	case "carry-large":
		x.Carry = math.MaxInt64
	case "twice":
		o[1].Tensor.Name = o[0].Tensor.Name
	case "dtype":
		o[1].Tensor.Dtype = "F7"
	case "handle":
		x.Encoder = 1 << 40
	}
}

func spoilFinish(x *pb.SchemeServiceFinishResponse) {
	if w := x.GetWant(); w != nil {
		switch fault {
		case "want":
			w.Count = math.MaxInt64
		case "want-far":
			w.Index = math.MaxInt64
		case "want-negative":
			w.Index = -1
		case "empty":
			x.Message = nil
		}
		return
	}
	p := x.GetPiece()
	switch fault {
	case "part":
		p.Part = 3
	case "offset":
		p.Offset = math.MaxInt64
	case "offset-negative":
		p.Offset = -1
	case "long":
		p.Data = make([]byte, 1<<20)
	case "hole":
		p.Data, p.Offset = p.Data[1:], 1
	}
}

// spoilFile spoils a file that the plugin has written.
func spoilFile(path string) {
	if call != "File" {
		return
	}
	dir := filepath.Dir(path)
	switch fault {
	case "two":
		check(os.WriteFile(filepath.Join(dir, "another.fs"), []byte("x"), 0o666))
	case "elsewhere":
		check(os.Rename(path, filepath.Join(dir, "another.fs")))
	case "link":
		check(os.Rename(path, filepath.Join(os.TempDir(), "faulty.fs")))
		check(os.Symlink(filepath.Join(os.TempDir(), "faulty.fs"), path))
	case "removed":
		check(os.Remove(path))
	case "folder":
		check(os.Remove(path))
		check(os.Mkdir(path, 0o777))
	case "cut":
		check(os.Truncate(path, 10))
	}
}

// spoilSize spoils what the plugin says of its size.
func spoilSize(size int64) int64 {
	if call != "File" {
		return size
	}
	switch fault {
	case "size":
		return size + 1
	case "size-negative":
		return -1
	}
	return size
}
