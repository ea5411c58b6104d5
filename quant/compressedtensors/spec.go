package compressedtensors

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
)

// The formats of a group, by the names that they have in a config.json.
const (
	floatQuantized = "float-quantized"
	intQuantized   = "int-quantized"
	naiveQuantized = "naive-quantized" // either of these
	packQuantized  = "pack-quantized"
	nvfp4Packed    = "nvfp4-pack-quantized"
	mxfp4Packed    = "mxfp4-pack-quantized"
	mxfp8Quantized = "mxfp8-quantized"
	mixedPrecision = "mixed-precision" // of groups of several formats
)

// strategy is which elements share a scale.
type strategy string

const (
	perTensor  strategy = "tensor"
	perChannel strategy = "channel"
	perGroup   strategy = "group"
	perBlock   strategy = "block"
	// grouped is groups whose scales share a scale of the whole tensor.
	grouped strategy = "tensor_group"
)

// spec is how a weight is stored.
type spec struct {
	format     string
	bits       int
	strategy   strategy
	group      int64    // elements of a row, for groups
	block      [2]int64 // rows and columns, for blocks
	asymmetric bool
	// padded says that fields never cross a word, as older releases pack 3, 5, 6 and 7 bits.
	padded bool

	allowNonFinite bool
}

// Names of parameters.
const (
	groupSize  = "group_size"
	scales     = "scales" // channel or tensor, where there are no groups
	block      = "block"  // such as 128x128
	asymmetric = "asymmetric"
	padded     = "padded"
)

// kind is a type, with what its name alone says.
type kind struct {
	name string
	spec
}

// kinds are all types. Where a strategy is not given by the name it is the default.
var kinds = []kind{
	{"fp8-channel", spec{format: floatQuantized, bits: 8, strategy: perChannel}},
	{"fp8-tensor", spec{format: floatQuantized, bits: 8, strategy: perTensor}},
	{"fp8-block", spec{format: floatQuantized, bits: 8, strategy: perBlock, block: [2]int64{128, 128}}},
	{"fp8-group", spec{format: floatQuantized, bits: 8, strategy: perGroup, group: 128}},
	{"w8a8", spec{format: intQuantized, bits: 8, strategy: perChannel}},
	{"w1a16", packed(1)},
	{"w2a16", packed(2)},
	{"w3a16", packed(3)},
	{"w4a16", packed(4)},
	{"w5a16", packed(5)},
	{"w6a16", packed(6)},
	{"w7a16", packed(7)},
	{"w8a16", packed(8)},
	{"nvfp4", spec{format: nvfp4Packed, bits: 4, strategy: grouped, group: 16}},
	{"mxfp4", spec{format: mxfp4Packed, bits: 4, strategy: perGroup, group: 32}},
	{"mxfp8", spec{format: mxfp8Quantized, bits: 8, strategy: perGroup, group: 32}},
}

func packed(bits int) spec {
	return spec{format: packQuantized, bits: bits, strategy: perGroup, group: 128}
}

// integer reports whether codes are integers, which alone have zero points and choices of groups.
func (s spec) integer() bool { return s.format == packQuantized || s.format == intQuantized }

// kind is the type of a spec.
func (s spec) kind() (kind, bool) {
	for _, k := range kinds {
		fixed := s.integer() || k.strategy == s.strategy
		if k.format == s.format && k.bits == s.bits && fixed {
			return k, true
		}
	}
	return kind{}, false
}

// public is the spec as others see it, of one that check has let pass.
func (s spec) public() quant.Spec {
	k, _ := s.kind()
	p := quant.Spec{Type: k.name, AllowNonFinite: s.allowNonFinite}
	add := func(name string, value any) { p.Params = append(p.Params, quant.Param{Name: name, Value: value}) }
	switch {
	case s.integer() && s.strategy != perGroup:
		add(scales, string(s.strategy))
	case s.integer() || k.name == "fp8-group":
		add(groupSize, s.group)
	case s.strategy == perBlock:
		add(block, fmt.Sprintf("%dx%d", s.block[0], s.block[1]))
	}
	if s.asymmetric {
		add(asymmetric, true)
	}
	if s.padded {
		add(padded, true)
	}
	return p
}

// Spec makes the spec of a type. Those of integers take group_size (a divisor of the rows' length), or scales,
// "channel" or "tensor", and asymmetric; fp8-block takes block, such as "128x128".
func (Scheme) Spec(typ string, asked quant.Params) (quant.Spec, error) {
	s, err := specOf(typ, asked)
	if err != nil {
		return quant.Spec{}, err
	}
	return s.public(), nil
}

// private reads a spec that Spec has made, or that was saved.
func private(p quant.Spec) (spec, error) {
	s, err := specOf(p.Type, p.Params)
	s.allowNonFinite = p.AllowNonFinite
	return s, err
}

func specOf(typ string, asked quant.Params) (spec, error) {
	for _, k := range kinds {
		if k.name != typ {
			continue
		}
		s := k.spec
		if s.integer() {
			s.asymmetric = asked.Bool(asymmetric)
			s.padded = asked.Bool(padded)
			if v, ok := asked.Get(scales).(string); ok {
				s.strategy, s.group = strategy(v), 0
			}
		}
		if v := asked.Get(groupSize); v != nil && (s.integer() || s.strategy == perGroup && s.format == floatQuantized) {
			s.strategy, s.group = perGroup, asked.Int(groupSize)
		}
		if v, ok := asked.Get(block).(string); ok && s.strategy == perBlock {
			s.block = [2]int64{}
			rows, cols, _ := strings.Cut(v, "x")
			s.block[0], _ = strconv.ParseInt(rows, 10, 64)
			s.block[1], _ = strconv.ParseInt(cols, 10, 64)
		}
		if err := s.check(); err != nil {
			return spec{}, fmt.Errorf("%w: %s: %w", quant.ErrParameter, typ, err)
		}
		return s, nil
	}
	return spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, typ)
}

// check refuses what cannot be.
func (s spec) check() error {
	if _, ok := s.kind(); !ok {
		return fmt.Errorf("found %d bits and the strategy %q of %s, which is not read", s.bits, s.strategy, s.format)
	}
	switch s.strategy {
	case perTensor:
		if s.asymmetric {
			return fmt.Errorf("found one zero point of a tensor, expected one a group or channel")
		}
	case perChannel:
	case perGroup, grouped:
		if s.group < 1 || s.group > math.MaxInt32 {
			return fmt.Errorf("found the group size %d, expected 1 or more", s.group)
		}
		want := map[string]int64{nvfp4Packed: 16, mxfp4Packed: 32, mxfp8Quantized: 32}[s.format]
		if want > 0 && s.group != want {
			return fmt.Errorf("found the group size %d, expected %d for %s", s.group, want, s.format)
		}
	case perBlock:
		if min(s.block[0], s.block[1]) < 1 || max(s.block[0], s.block[1]) > math.MaxInt32 {
			return fmt.Errorf("found blocks of %d x %d, expected 1 x 1 or more", s.block[0], s.block[1])
		}
	default:
		return fmt.Errorf("found the strategy %q, expected tensor, channel, group, block or tensor_group", s.strategy)
	}
	if s.asymmetric && !s.integer() {
		return fmt.Errorf("found zero points of floats, expected none")
	}
	if s.padded && (s.format != packQuantized || 32%s.bits == 0) {
		return fmt.Errorf("found padded words of %d bits, expected 3, 5, 6 or 7", s.bits)
	}
	return nil
}

// grid is where the blocks of a matrix are that share a scale.
func (s spec) grid(rows, cols int64) (scaled.Grid, error) {
	switch s.strategy {
	case perTensor:
		return scaled.Whole(rows, cols), nil
	case perChannel:
		return scaled.ByRow(rows, cols, max(cols, 1)), nil
	case perBlock:
		return scaled.Grid{Rows: rows, Cols: cols, BlockRows: s.block[0], BlockCols: s.block[1]}, nil
	}
	if cols%s.group != 0 {
		return scaled.Grid{}, fmt.Errorf("its rows have %d elements, expected a multiple of the group size %d", cols, s.group)
	}
	return scaled.ByRow(rows, cols, s.group), nil
}
