package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
	"github.com/lorakit/lorakit/tensor"
)

// configName is a file of every checkpoint, in the place of which no format puts its own.
const configName = "config.json"

// mostFrame bounds the bytes of all shards beside their tensors', and of the files beside them.
const mostFrame = 256 << 20

// Layout has the plugin place the tensors, and checks that each byte of each file has one place.
func (f *format) Layout(ctx context.Context, infos []tensor.Info, o formats.Options) (formats.Layout, error) {
	if err := f.fits(infos, o); err != nil {
		return formats.Layout{}, err
	}
	p, err := f.program.running(ctx)
	if err != nil {
		return formats.Layout{}, err
	}
	call := p.begin(ctx)
	l := layout{process: p, format: f, infos: infos, single: o.SingleFile, placed: make([]bool, len(infos))}
	err = f.layOut(call, infos, o, &l)
	if err = call.end(err); err != nil {
		return formats.Layout{}, err
	}
	return l.Layout, l.check()
}

// fits refuses what a plugin's format cannot be asked for.
func (f *format) fits(infos []tensor.Info, o formats.Options) error {
	if f.ReadOnly() {
		return fmt.Errorf("format %s: %w: it is only read", f.Name(), formats.ErrUnsupported)
	}
	if w := f.facts.Written; o.SingleFile != "" && len(w) > 0 &&
		!slices.ContainsFunc(w, func(e string) bool { return strings.HasSuffix(o.SingleFile, e) }) {
		return fmt.Errorf("%s: %w: format %s writes %s, and only reads its other extensions", tensor.Quote(o.SingleFile),
			formats.ErrUnsupported, f.Name(), strings.Join(w, ", "))
	}
	if len(o.Files) > 0 {
		return fmt.Errorf("format %s: %w: files within others", f.Name(), formats.ErrUnsupported)
	}
	if o.MaxTensors > 0 {
		return fmt.Errorf("format %s: %w: a limit to the tensors of a file", f.Name(), formats.ErrUnsupported)
	}
	for _, t := range infos {
		if err := f.Holds(t); err != nil {
			return err
		}
	}
	return nil
}

func (f *format) layOut(call *call, infos []tensor.Info, o formats.Options, l *layout) error {
	stream, err := call.p.format.Layout(call.ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&pb.LayoutRequest{Options: &pb.LayoutOptions{
		Format: f.Name(), MaxShardSize: o.MaxShardSize, SingleFile: o.SingleFile, Stem: o.Stem, Parameters: o.Parameters,
		Metadata: wire.FromMetadata(o.Metadata)}})
	b := wire.Batch(func(list []*pb.LayoutTensor) error {
		call.progress()
		return stream.Send(&pb.LayoutRequest{Tensors: list})
	})
	for i, t := range infos {
		group := i
		if o.Groups != nil {
			group = o.Groups[i]
		}
		if err == nil {
			err = b.Add(&pb.LayoutTensor{Tensor: wire.FromInfo(t), Group: int64(group)})
		}
	}
	if err == nil {
		err = b.End()
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil && !errors.Is(err, io.EOF) { // at EOF the answer says why
		return err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(r.GetItems()) > 0 {
			call.progress()
		}
		for _, item := range r.GetItems() {
			if err := l.add(item); err != nil {
				return err
			}
		}
	}
}

// layout is what a plugin says of a layout.
type layout struct {
	formats.Layout
	process *process
	format  *format
	infos   []tensor.Info
	single  string
	placed  []bool
	bytes   int // of frames and extra files
}

// broken is an error of a layout.
func (l *layout) broken(format string, args ...any) error {
	return l.process.fault("answers a layout that cannot be: %s", fmt.Sprintf(format, args...))
}

// add takes in one item.
func (l *layout) add(item *pb.LayoutItem) error {
	var s *formats.Shard
	if n := len(l.Shards); n > 0 {
		s = &l.Shards[n-1]
	}
	take := func(n int) error {
		if l.bytes += n; l.bytes > mostFrame {
			return l.broken("more than %d bytes beside tensors", mostFrame)
		}
		return nil
	}
	switch x := item.GetItem().(type) {
	case *pb.LayoutItem_Shard:
		if len(l.Shards) == mostShards {
			return l.broken("more than %d files", mostShards)
		}
		l.Shards = append(l.Shards, formats.Shard{Name: x.Shard.GetName(), Size: x.Shard.GetSize()})
		return take(len(x.Shard.GetName()))
	case *pb.LayoutItem_Extra:
		if n := len(l.Extra); n > 0 && l.Extra[n-1].Name == x.Extra.GetName() {
			l.Extra[n-1].Data = append(l.Extra[n-1].Data, x.Extra.GetData()...)
		} else {
			l.Extra = append(l.Extra, formats.File{Name: x.Extra.GetName(), Data: x.Extra.GetData()})
		}
		return take(len(x.Extra.GetData()) + len(x.Extra.GetName()) + 64)
	case *pb.LayoutItem_Notice:
		l.Notices = append(l.Notices, wire.OneLine(x.Notice, 500))
		return take(len(x.Notice) + 16)
	}
	if s == nil {
		return l.broken("found a %T before the first file", item.GetItem())
	}
	switch x := item.GetItem().(type) {
	case *pb.LayoutItem_Place:
		t := x.Place.GetTensor()
		if t < 0 || t >= int64(len(l.infos)) || l.placed[t] {
			return l.broken("found tensor %d, expected each of %d once", t, len(l.infos))
		}
		l.placed[t] = true
		s.Tensors, s.Offsets = append(s.Tensors, int(t)), append(s.Offsets, x.Place.GetOffset())
		return nil
	case *pb.LayoutItem_Piece:
		data, at := x.Piece.GetData(), x.Piece.GetOffset()
		if k := len(s.Pieces) - 1; k >= 0 && s.Pieces[k].Offset+int64(len(s.Pieces[k].Bytes)) == at {
			s.Pieces[k].Bytes = append(s.Pieces[k].Bytes, data...)
		} else {
			s.Pieces = append(s.Pieces, formats.Piece{Offset: at, Bytes: data})
		}
		return take(len(data) + 32)
	case *pb.LayoutItem_Checksum:
		s.Checksums = append(s.Checksums, formats.Checksum{Offset: x.Checksum.GetOffset(), Bytes: x.Checksum.GetLength(),
			At: x.Checksum.GetAt()})
		return take(24 + 8*len(x.Checksum.GetAt()))
	}
	return l.broken("found a %T, expected what is known here", item.GetItem())
}

// check makes sure that the layout can be carried out.
func (l *layout) check() error {
	for i, placed := range l.placed {
		if !placed {
			return l.broken("tensor %s has no place", tensor.Quote(l.infos[i].Name))
		}
	}
	names := map[string]bool{}
	named := func(name string) error {
		fold := strings.ToLower(name)
		if !fs.ValidPath(name) || strings.ContainsAny(name, "/\\\x00") || strings.HasPrefix(name, ".") || names[fold] ||
			!filepath.IsLocal(name) || wire.OneLine(name, len(name)) != name {
			return l.broken("found the file name %s, expected one without a folder, once", tensor.Quote(name))
		}
		own := l.format.named(fold) || l.format.isIndex(name) || l.format.nameless() && strings.HasPrefix(fold, "model")
		if !own && name != l.single || fold == configName {
			return l.broken("found the file name %s, expected one that the format is known by", tensor.Quote(name))
		}
		names[fold] = true
		return nil
	}
	for i := range l.Shards {
		if err := named(l.Shards[i].Name); err != nil {
			return err
		}
		if err := l.checkShard(&l.Shards[i]); err != nil {
			return err
		}
	}
	if l.single != "" && (len(l.Shards) != 1 || l.Shards[0].Name != l.single || len(l.Extra) > 0) {
		return l.broken("found %d files, expected %s alone", len(l.Shards)+len(l.Extra), tensor.Quote(l.single))
	}
	if len(l.Shards) == 0 {
		return l.broken("found no file, expected one")
	}
	for _, x := range l.Extra {
		if err := named(x.Name); err != nil {
			return err
		}
	}
	return nil
}

// checkShard makes sure that tensors and pieces fill a file, and that checksums are of it.
func (l *layout) checkShard(s *formats.Shard) error {
	var spans, pieces []span
	for i, t := range s.Tensors {
		size, _ := l.infos[t].Size() // the planner has looked
		if size > 0 {
			spans = append(spans, span{s.Offsets[i], size})
		} else if s.Offsets[i] < 0 || s.Offsets[i] > s.Size {
			return l.broken("%s: tensor %s begins at %d of %d bytes", tensor.Quote(s.Name),
				tensor.Quote(l.infos[t].Name), s.Offsets[i], s.Size)
		}
	}
	for _, p := range s.Pieces {
		if len(p.Bytes) > 0 {
			pieces = append(pieces, span{p.Offset, int64(len(p.Bytes))})
		}
	}
	spans = append(spans, pieces...)
	byPlace := func(a, b span) int { return cmp.Compare(a.at, b.at) }
	slices.SortFunc(spans, byPlace)
	slices.SortFunc(pieces, byPlace)
	at := int64(0)
	for _, x := range spans {
		if x.at != at || x.length > s.Size-at {
			return l.broken("%s: found %d bytes at %d, expected some at %d of %d", tensor.Quote(s.Name), x.length, x.at, at,
				s.Size)
		}
		at += x.length
	}
	if at != s.Size {
		return l.broken("%s: found %d bytes, expected %d", tensor.Quote(s.Name), at, s.Size)
	}
	for _, c := range s.Checksums {
		if c.Offset < 0 || c.Bytes < 0 || c.Offset > s.Size || c.Bytes > s.Size-c.Offset {
			return l.broken("%s: found a checksum of %d bytes at %d, expected a range of %d", tensor.Quote(s.Name), c.Bytes,
				c.Offset, s.Size)
		}
		for _, to := range c.At {
			if to < 0 || to > s.Size-4 || !within(pieces, to, 4) {
				return l.broken("%s: found the place %d of a checksum, expected one within the bytes beside the tensors",
					tensor.Quote(s.Name), to)
			}
		}
	}
	return nil
}

// span is a range of a file.
type span struct{ at, length int64 }

// within reports whether a range lies in spans, which are in order and do not overlap.
func within(spans []span, at, length int64) bool {
	for length > 0 {
		i, found := slices.BinarySearchFunc(spans, at, func(s span, at int64) int { return cmp.Compare(s.at, at) })
		if !found {
			i--
		}
		if i < 0 || at-spans[i].at >= spans[i].length {
			return false
		}
		n := min(length, spans[i].length-(at-spans[i].at))
		at, length = at+n, length-n
	}
	return true
}
