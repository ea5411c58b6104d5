// Package modelopt reads what NVIDIA's Model Optimizer writes: NVFP4, floats of 4 bits with a scale of 8 bits for 16 of
// them and a scale of these, and FP8, floats of 8 bits with one scale a tensor, a row, or a group of 32 as a power of
// two.
package modelopt

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/internal/minifloat"
	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/quant/internal/rows"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of Model Optimizer.
type Scheme struct{}

const (
	method = "modelopt"
	nvfp4  = "modelopt-nvfp4"
	fp8    = "modelopt-fp8"

	group = kernels.Group // elements of NVFP4 that share a scale: 16

	weightEnd = ".weight"
	scaleEnd  = "_scale"   // behind the name of a weight
	secondEnd = "_scale_2" // the scale of scales
)

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return method }

// Types lists what is read.
func (Scheme) Types() []quant.Type {
	return []quant.Type{{Name: nvfp4, ReadOnly: true}, {Name: fp8, ReadOnly: true}}
}

// Spec makes the spec of a type; none has parameters.
func (Scheme) Spec(asked string, _ quant.Params) (quant.Spec, error) {
	if asked != nvfp4 && asked != fp8 {
		return quant.Spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, asked)
	}
	return quant.Spec{Type: asked}, nil
}

// config is what a quantization_config says.
type config struct {
	declared bool // it is of this scheme; else there is none
	algo     string
	static   bool     // activations are quantised by scales that are stored
	cache    bool     // so is the cache
	ignore   []string // patterns of modules that stay plain
}

// readConfig reads the quantization_config of a config.json. It reports false where that is of another scheme. Older
// checkpoints have none, and a file of their own in its place.
func readConfig(file []byte) (c config, ours bool, err error) {
	object := quant.Quantization(file)
	if object == nil {
		return config{}, true, nil
	}
	return parse(object)
}

// parse reads a quantization_config. It reports false for another scheme's.
func parse(object []byte) (c config, ours bool, err error) {
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(object, &named) != nil || named.Method != method {
		return config{}, false, nil
	}
	var members struct {
		Algo   string         `json:"quant_algo"`
		Ignore []string       `json:"ignore"`
		Groups jsontext.Value `json:"config_groups"`
		Cache  jsontext.Value `json:"kv_cache_scheme"` // settings, or the name of a type
	}
	if err := json.Unmarshal(object, &members); err != nil {
		return config{}, true, fmt.Errorf("config.json: quantization_config: %w: %s", quant.ErrMalformed,
			strings.Join(strings.Fields(err.Error()), " "))
	}
	c = config{declared: true, algo: members.Algo, ignore: members.Ignore,
		cache: members.Cache != nil && members.Cache.Kind() != 'n'}
	var groups map[string]struct {
		Inputs struct {
			Dynamic *bool `json:"dynamic"`
		} `json:"input_activations"`
	}
	if json.Unmarshal(members.Groups, &groups) == nil {
		for _, g := range groups {
			c.static = c.static || g.Inputs.Dynamic != nil && !*g.Inputs.Dynamic
		}
	}
	return c, true, nil
}

// Calibration names the scales of activations and caches, and the offsets of the latter.
func (Scheme) Calibration(s quant.Stored, weights []quant.Decoder) []string {
	c, ok, err := readConfig(s.Config())
	if !ok || err != nil {
		return nil
	}
	return quant.Calibration{Modules: []string{"input_scale", "output_scale"},
		Caches:      []string{"q_scale", "k_scale", "v_scale", "kv_scale", "k_proj.k_bias", "v_proj.v_bias"},
		Activations: c.static, OfCache: c.cache}.Find(s, weights)
}

// ConfigFiles names the file that has what config.json has in newer checkpoints.
func (Scheme) ConfigFiles() []string { return []string{"hf_quant_config.json"} }

// Find returns the weights that are in the scheme.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	c, ok, err := readConfig(s.Config())
	if !ok || err != nil {
		return nil, err
	}
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) { return find(c, s, t) })
}

func find(c config, s quant.Stored, t tensor.Info) (quant.Decoder, error) {
	fail := func(format string, args ...any) (quant.Decoder, error) {
		return nil, fmt.Errorf("%w: %s", quant.ErrMalformed, fmt.Sprintf(format, args...))
	}
	for _, end := range []string{scaleEnd, secondEnd} {
		w, ok := strings.CutSuffix(t.Name, end)
		if _, there := s.Lookup(w); c.declared && ok && strings.HasSuffix(w, weightEnd) && !there {
			return fail("%s is missing", tensor.Quote(w))
		}
	}
	if !strings.HasSuffix(t.Name, weightEnd) {
		return nil, nil
	}
	scale, scales := s.Lookup(t.Name + scaleEnd)
	if t.DType != tensor.U8 && t.DType != tensor.F8E4M3 {
		if c.declared && scales {
			return fail("it is %v beside %s, expected U8 or F8_E4M3", t.DType, tensor.Quote(scale.Name))
		}
		return nil, nil
	}
	second, seconds := s.Lookup(t.Name + secondEnd)
	if !c.declared && (!scales || t.DType == tensor.U8 && !seconds || t.DType != tensor.U8 && scale.DType != tensor.F32) {
		return nil, nil
	}
	if !scales {
		return fail("%s is missing", tensor.Quote(t.Name+scaleEnd))
	}
	if _, ok := s.Lookup(strings.TrimSuffix(t.Name, weightEnd) + ".pre_quant_scale"); ok {
		return fail("it has a pre_quant_scale, as %s has it, which is not read", cmp.Or(c.algo, "AWQ"))
	}
	if _, ok := s.Lookup(strings.TrimSuffix(t.Name, weightEnd) + ".svdquant_lora_a"); ok {
		return fail("it has svdquant_lora_a, a part of the weight as %s has it, which is not read",
			cmp.Or(c.algo, "SVDQuant"))
	}
	if len(t.Shape) != 2 || slices.Min(t.Shape) < 1 || t.Shape[1] > math.MaxInt64/8 {
		return fail("its shape is %v, expected two dimensions that are not empty", t.Shape)
	}
	dtype := s.DType()
	if !dtype.Float() {
		dtype = tensor.BF16
	}
	rows, cols := t.Shape[0], t.Shape[1]
	d := &decoder{info: tensor.Info{Name: t.Name, DType: dtype, Shape: t.Shape}, scale: scale.DType, second: 1,
		parts: []string{t.Name, scale.Name}}
	if t.DType == tensor.U8 {
		return d.openNVFP4(s, rows, 2*cols, scale, second, seconds)
	}
	if seconds {
		return fail("it is %v beside %s, expected U8", t.DType, tensor.Quote(second.Name))
	}
	switch n := scale.Count(); {
	case scale.DType == tensor.U8 && cols%32 == 0 && slices.Equal(scale.Shape, tensor.Shape{rows, cols / 32}):
		d.grid = scaled.ByRow(rows, cols, 32)
	case scale.DType.Float() && n == 1:
		d.grid = scaled.Whole(rows, cols)
	case scale.DType.Float() && n == rows && len(scale.Shape) <= 2 && scale.Shape[0] == rows:
		d.grid = scaled.ByRow(rows, cols, cols)
	default:
		return fail("%s is %v %v, expected one number, or %d, or U8 [%d, %d], for a weight of shape %v",
			tensor.Quote(scale.Name), scale.DType, scale.Shape, rows, rows, cols/32, t.Shape)
	}
	return d, d.check()
}

// openNVFP4 finishes a decoder of floats of 4 bits.
func (d *decoder) openNVFP4(
	s quant.Stored, rows, cols int64, scale, second tensor.Info, seconds bool,
) (quant.Decoder, error) {
	fail := func(format string, args ...any) (quant.Decoder, error) {
		return nil, fmt.Errorf("%w: %s", quant.ErrMalformed, fmt.Sprintf(format, args...))
	}
	name := d.info.Name + secondEnd
	switch want := (tensor.Shape{rows, cols / group}); {
	case cols%group != 0:
		return fail("its rows have %d elements, expected a multiple of %d", cols, group)
	case !seconds:
		return fail("%s is missing", tensor.Quote(name))
	case scale.DType != tensor.F8E4M3 || !slices.Equal(scale.Shape, want):
		return fail("%s is %v %v, expected F8_E4M3 %v", tensor.Quote(scale.Name), scale.DType, scale.Shape, want)
	case second.DType != tensor.F32 || second.Count() != 1:
		return fail("%s is %v %v, expected F32 []", tensor.Quote(name), second.DType, second.Shape)
	}
	var b [4]byte
	if err := s.Read(name, b[:], 0); err != nil {
		return nil, err
	}
	d.second = math.Float32frombits(binary.LittleEndian.Uint32(b[:]))
	if !(d.second > 0) || math.IsInf(float64(d.second), 0) {
		return fail("%s is %v, expected a finite number above 0", tensor.Quote(name), d.second)
	}
	d.pairs, d.info.Shape, d.grid = true, tensor.Shape{rows, cols}, scaled.ByRow(rows, cols, group)
	d.parts = append(d.parts, name)
	return d, d.check()
}

// Encoder refuses: the types are read only.
func (Scheme) Encoder(_ context.Context, s quant.Spec, _ tensor.Info) (quant.Encoder, error) {
	return nil, fmt.Errorf("%w to %s: the type is read only", quant.ErrUnsupported, s.Type)
}

// Config returns what names the scheme.
func (Scheme) Config(_ []quant.Assigned, skip []string) (key string, object []byte, err error) {
	object, err = json.Marshal(map[string]any{"quant_method": method, "ignore": skip}, json.Deterministic(true))
	return "quantization_config", object, err
}

// Declaration knows its own quantization_config.
func (Scheme) Declaration(object []byte) (quant.Declaration, bool) {
	c, ours, err := parse(object)
	if !ours || err != nil || c.ignore == nil {
		return quant.Declaration{}, ours // Find says what is wrong
	}
	return quant.Declaration{Skips: func(module string) bool {
		return slices.ContainsFunc(c.ignore, func(pattern string) bool { return wildcard(pattern, module) })
	}}, true
}

// wildcard reports whether a name is as a pattern, in which a star is anything.
func wildcard(pattern, name string) bool {
	parts := strings.Split(pattern, "*")
	rest, ok := strings.CutPrefix(name, parts[0])
	if !ok || len(parts) == 1 {
		return ok && rest == ""
	}
	for _, p := range parts[1 : len(parts)-1] {
		i := strings.Index(rest, p)
		if i < 0 {
			return false
		}
		rest = rest[i+len(p):]
	}
	return strings.HasSuffix(rest, parts[len(parts)-1])
}

// decoder reads a weight.
type decoder struct {
	info   tensor.Info
	parts  []string
	grid   scaled.Grid
	pairs  bool // two codes a byte
	scale  tensor.DType
	second float32 // the scale of scales
}

// check refuses what is too large to be computed with.
func (d *decoder) check() error {
	if _, err := (tensor.Info{DType: tensor.F32, Shape: d.info.Shape}).Size(); err != nil {
		return fmt.Errorf("%w: %w", quant.ErrMalformed, err)
	}
	if d.grid.Cols > scaled.MostColumns {
		return fmt.Errorf("%w: its rows have %d elements, expected at most %d", quant.ErrMalformed, d.grid.Cols,
			scaled.MostColumns)
	}
	return nil
}

func (d *decoder) Info() tensor.Info { return d.info }

func (d *decoder) Spec() quant.Spec {
	if d.pairs {
		return quant.Spec{Type: nvfp4}
	}
	return quant.Spec{Type: fp8}
}

func (d *decoder) Parts() []string { return d.parts }

// Unit is a row.
func (d *decoder) Unit() int64 { return d.grid.Cols }

// Values is F32: no rounding is part of the scheme.
func (d *decoder) Values() tensor.DType { return tensor.F32 }

func (d *decoder) Inputs(r []quant.Range, lo, hi int64) []quant.Range {
	if lo >= hi {
		return r
	}
	each := int64(1)
	if d.pairs {
		each = 2
	}
	first, last := d.grid.Scales(lo, hi)
	size := d.scale.Bits() / 8
	return append(r, quant.Range{Part: 0, Offset: lo / each, Length: (hi - lo) / each},
		quant.Range{Part: 1, Offset: first * size, Length: (last - first) * size})
}

// scratch is what a tile needs besides its values.
type scratch struct{ row, scales []float32 }

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func (d *decoder) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	if lo >= hi {
		return nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	scales := rows.Room(&s.scales, int64(len(in[1]))*8/d.scale.Bits())
	switch d.scale {
	case tensor.F8E4M3:
		for i, c := range in[1] {
			scales[i] = minifloat.E4M3[c] * d.second
		}
	case tensor.U8:
		for i, c := range in[1] {
			scales[i] = minifloat.E8M0[c]
		}
	default:
		if err := tensor.ToFloats(scales, in[1], d.scale); err != nil {
			return err
		}
	}
	row, cols, codes := rows.Room(&s.row, d.grid.Cols), int(d.grid.Cols), in[0]
	if d.pairs { // the groups of the kernels
		for n := cols / group; len(scales) > 0; scales, codes, dst = scales[n:], codes[cols/2:], dst[4*cols:] {
			kernels.Nibbles(row, codes[:cols/2], &minifloat.E2M1, scales[:n])
			if err := tensor.FromFloats(dst[:4*cols], tensor.F32, row); err != nil {
				return err
			}
		}
		return nil
	}
	var failed error
	d.grid.Each(lo, hi, func(from, to, k int) {
		at := from % cols
		scaled.Bytes(row[at:at+to-from], codes[from:], &minifloat.E4M3, scales[k])
		if to%cols == 0 {
			if err := tensor.FromFloats(dst[4*(to-cols):4*to], tensor.F32, row); err != nil {
				failed = err
			}
		}
	})
	return failed
}
