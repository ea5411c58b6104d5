// Package wire has what both ends of the connection between lorakit and a plugin share: the handshake, the limits, how
// messages are coded, and how errors and tensors go over it. The messages are those of plugins/proto.
package wire

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/protobuf/proto"

	"github.com/lorakit/lorakit/formats"
	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Protocol is the version of the protocol that is spoken here.
const Protocol = 1

// Handshake is what a plugin is started with.
var Handshake = plugin.HandshakeConfig{
	ProtocolVersion: Protocol, MagicCookieKey: "LORAKIT_PLUGIN_COOKIE", MagicCookieValue: "lorakit.plugin.v1",
}

// Names of the environment of a plugin.
const (
	// HostFD is the number of a descriptor that is at its end when the host is gone.
	HostFD = "LORAKIT_PLUGIN_HOST_FD"
	// Memory is advice, in bytes: a quarter of what the host may use.
	Memory = "LORAKIT_PLUGIN_MEMORY"
)

const (
	// MaxMessage is the most bytes of a message.
	MaxMessage = 4 << 20
	// Chunk is the most bytes of data, or of a list, in a message.
	Chunk = 1 << 20
	// StreamWindow is how much of one stream is sent before the other side has taken it.
	StreamWindow = 1 << 20
	// ConnectionWindow is how much of all streams together is, which bounds what many of them hold.
	ConnectionWindow = 4 << 20
	// MaxCarryWant is the most numbers that are asked for at once while a weight is finished.
	MaxCarryWant = Chunk / 4
)

// The capabilities.
const (
	Read          = "read"
	Extents       = "extents"
	WriteLayout   = "write-layout"
	WriteStream   = "write-stream"
	SchemeDecode  = "scheme-decode"
	SchemeEncode  = "scheme-encode"
	Deterministic = "deterministic"
)

// Capabilities lists all of them.
var Capabilities = []string{Read, Extents, WriteLayout, WriteStream, SchemeDecode, SchemeEncode, Deterministic}

// FromInfo is a tensor as it is sent.
func FromInfo(t tensor.Info) *pb.Tensor {
	return &pb.Tensor{Name: t.Name, Dtype: t.DType.String(), Shape: t.Shape}
}

// ToInfo reads a tensor. One whose dtype is not known, or whose size overflows, is an error.
func ToInfo(t *pb.Tensor) (tensor.Info, error) {
	d, err := tensor.ParseDType(t.GetDtype())
	info := tensor.Info{Name: t.GetName(), DType: d, Shape: t.GetShape()}
	if info.Shape == nil {
		info.Shape = tensor.Shape{}
	}
	if err == nil {
		_, err = info.Size()
	}
	return info, err
}

// FromMetadata are metadata as they are sent: all as text.
func FromMetadata(m formats.Metadata) []*pb.Pair {
	pairs := make([]*pb.Pair, len(m))
	for i, p := range m {
		pairs[i] = &pb.Pair{Name: p.Name, Value: p.Text()}
	}
	return pairs
}

// ToMetadata reads metadata.
func ToMetadata(pairs []*pb.Pair) (formats.Metadata, error) {
	var m formats.Metadata
	for _, p := range pairs {
		m = append(m, formats.Pair{Name: p.GetName(), Value: p.GetValue()})
	}
	return m, m.Check()
}

// The parameters of a type that a plugin's scheme may have.
const (
	BlockSize   = "block_size"
	DoubleQuant = "double_quant"
)

// FromSpec is a spec as it is sent.
func FromSpec(s quant.Spec) *pb.Spec {
	return &pb.Spec{
		Type: s.Type, BlockSize: s.Params.Int(BlockSize), DoubleQuant: s.Params.Bool(DoubleQuant),
		AllowNonFinite: s.AllowNonFinite,
	}
}

// ToSpec reads a spec.
func ToSpec(s *pb.Spec) quant.Spec {
	spec := quant.Spec{Type: s.GetType(), AllowNonFinite: s.GetAllowNonFinite()}
	if n := s.GetBlockSize(); n != 0 {
		spec.Params = append(spec.Params, quant.Param{Name: BlockSize, Value: n})
	}
	if s.GetDoubleQuant() {
		spec.Params = append(spec.Params, quant.Param{Name: DoubleQuant, Value: true})
	}
	return spec
}

// Rule says which bytes of a stored tensor belong to the elements of a tile, see the message of that name.
type Rule struct{ First, Stride, Wrap int64 }

// FromRule is a rule as it is sent.
func FromRule(r Rule) *pb.Rule { return &pb.Rule{First: r.First, Stride: r.Stride, Wrap: r.Wrap} }

// ToRule reads a rule.
func ToRule(r *pb.Rule) Rule { return Rule{r.GetFirst(), r.GetStride(), r.GetWrap()} }

// Span is bytes of a stored tensor.
type Span struct{ Offset, Length int64 }

// Fits reports whether the rule gives a tensor of size bytes to units units, and nothing outside of it: each unit some
// bytes, none twice where once is set.
func (r Rule) Fits(units, size int64, once bool) bool {
	if r.First < 0 || r.Stride < 0 || r.Wrap < 0 || r.First > size {
		return false
	}
	if r.Stride == 0 || units == 0 {
		return r.Wrap == 0 || r.Stride > 0
	}
	if r.Wrap > 0 {
		if once && r.Wrap < units {
			return false
		}
		units = min(units, r.Wrap)
	}
	// The last unit may end early, but begins within the tensor.
	return r.First < size && units-1 <= (size-r.First-1)/r.Stride
}

// Append adds to spans where the units [lo, hi) are in a tensor of size bytes.
func (r Rule) Append(spans []Span, lo, hi, size int64) []Span {
	if r.Stride == 0 {
		return append(spans, Span{r.First, size - r.First})
	}
	for lo < hi {
		at, n := lo, hi-lo
		if r.Wrap > 0 {
			at = lo % r.Wrap
			n = min(n, r.Wrap-at)
		}
		first := r.First + at*r.Stride
		spans = append(spans, Span{first, min(n*r.Stride, size-first)})
		lo += n
	}
	return spans
}

// Batcher gathers a list and sends it in messages of at most Chunk bytes.
type Batcher[T proto.Message] struct {
	send  func([]T) error
	list  []T
	bytes int
	err   error
}

// Batch makes a Batcher.
func Batch[T proto.Message](send func([]T) error) *Batcher[T] { return &Batcher[T]{send: send} }

// Add takes in one more. An error is that of a message that could not be sent, and is returned again from then on.
func (b *Batcher[T]) Add(x T) error {
	const each = 8 // for the tag and the length
	n := proto.Size(x) + each
	if n > MaxMessage {
		b.err = cmp.Or(b.err, fmt.Errorf("found an entry of a list of %d bytes, expected at most %d: %w", n, MaxMessage,
			formats.ErrLimit))
		return b.err
	}
	if len(b.list) > 0 && b.bytes+n > Chunk {
		b.flush()
	}
	b.list, b.bytes = append(b.list, x), b.bytes+n
	return b.err
}

// End sends what is left.
func (b *Batcher[T]) End() error {
	if len(b.list) > 0 {
		b.flush()
	}
	return b.err
}

func (b *Batcher[T]) flush() {
	if b.err == nil {
		b.err = b.send(b.list)
	}
	b.list, b.bytes = nil, 0
}

// AppendFloats writes numbers as they are sent.
func AppendFloats(b []byte, list []float32) []byte {
	for _, x := range list {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(x))
	}
	return b
}
