// Package fp8 stores weights as transformers' fine-grained FP8 does, and DeepSeek before it: floats of 8 bits, E4M3,
// and for each block of rows and columns, or for the tensor, the number that they are multiplied by. Blocks at the end
// of a matrix may be smaller.
package fp8

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/internal/scaled"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

func init() { quant.Register(Scheme{}) }

// Scheme is the quant.Scheme of fine-grained FP8.
type Scheme struct{}

const (
	method    = "fp8"
	configKey = "quantization_config"

	typ = "fp8"
	// pairs is the type of two floats of 4 bits, E2M1, in a byte, as DeepSeek-V4 has its experts.
	pairs = "fp8-e2m1"
)

// Name returns the quant_method of a config.json.
func (Scheme) Name() string { return method }

// Types lists what is read and written.
func (Scheme) Types() []quant.Type {
	return []quant.Type{{Name: typ, ExpertLoaders: "vLLM", Experts: quant.ListedExperts}, {Name: pairs, ReadOnly: true}}
}

// Names of parameters.
const (
	block     = "block"     // such as 128x128, or "tensor"
	scaleType = "scale"     // what scales are stored as, where not F32
	ending    = "companion" // what the scales' name ends in, where not _scale_inv behind the weight's
	scaleDims = "dims"      // how many dimensions the only scale has, where not two: 0 or 1
)

// spec is how a weight is stored.
type spec struct {
	pairs  bool
	block  [2]int64 // zeros for one scale
	scale  tensor.DType
	ending string
	dims   int // of the only scale; a grid of scales has those of the weight

	allowNonFinite bool
}

// blockOf writes a block as a parameter has it.
func blockOf(b [2]int64) string {
	if b == [2]int64{} {
		return "tensor"
	}
	return fmt.Sprintf("%dx%d", b[0], b[1])
}

func (s spec) public() quant.Spec {
	p := quant.Spec{Type: typ, AllowNonFinite: s.allowNonFinite}
	if s.pairs {
		p.Type = pairs
	}
	p.Params = quant.Params{{Name: block, Value: blockOf(s.block)}}
	if s.scale != tensor.F32 {
		p.Params = append(p.Params, quant.Param{Name: scaleType, Value: s.scale.String()})
	}
	if s.block == [2]int64{} && s.dims != 2 {
		p.Params = append(p.Params, quant.Param{Name: scaleDims, Value: int64(s.dims)})
	}
	if s.ending != "" {
		p.Params = append(p.Params, quant.Param{Name: ending, Value: s.ending})
	}
	return p
}

// Spec makes the spec of fp8 from block, rows x columns that share a scale ("128x128" by default) or "tensor", and
// scale, the type of scales: "F32" by default, or "F8_E8M0" for powers of two.
func (Scheme) Spec(asked string, params quant.Params) (quant.Spec, error) {
	s, err := specOf(asked, params)
	if err != nil {
		return quant.Spec{}, err
	}
	return s.public(), nil
}

func private(p quant.Spec) (spec, error) {
	s, err := specOf(p.Type, p.Params)
	s.allowNonFinite = p.AllowNonFinite
	return s, err
}

func specOf(asked string, params quant.Params) (spec, error) {
	if asked != typ && asked != pairs {
		return spec{}, fmt.Errorf("%w %q", quant.ErrUnknown, asked)
	}
	s := spec{pairs: asked == pairs, block: [2]int64{128, 128}, scale: tensor.F32, dims: 2}
	if v, ok := params.Get(block).(string); ok {
		rows, cols, _ := strings.Cut(v, "x")
		s.block = [2]int64{}
		if v != "tensor" {
			s.block[0], _ = strconv.ParseInt(rows, 10, 64)
			s.block[1], _ = strconv.ParseInt(cols, 10, 64)
			if err := checkBlock(s.block); err != nil {
				return s, fmt.Errorf("%w: %s %q: %w", quant.ErrParameter, block, v, err)
			}
		}
	}
	if v, ok := params.Get(scaleType).(string); ok {
		i := slices.IndexFunc(scaleTypes, func(d tensor.DType) bool { return d.String() == v })
		if i < 0 {
			return s, fmt.Errorf("%w: %s %q, expected %v", quant.ErrParameter, scaleType, v, scaleTypes)
		}
		s.scale = scaleTypes[i]
	}
	if v, ok := params.Get(scaleDims).(int64); ok {
		if s.dims = int(v); v < 0 || v > 2 {
			return s, fmt.Errorf("%w: %s %d, expected 0 to 2", quant.ErrParameter, scaleDims, v)
		}
	}
	if v, ok := params.Get(ending).(string); ok && v != "" {
		if !slices.Contains(endings, v) {
			return s, fmt.Errorf("%w: %s %q, expected %q", quant.ErrParameter, ending, v, endings)
		}
		s.ending = v
	}
	return s, nil
}

// scaleTypes are what scales may be stored as; U8 are the codes of F8_E8M0.
var scaleTypes = []tensor.DType{tensor.F32, tensor.BF16, tensor.F16, tensor.F8E8M0, tensor.U8}

// usual is behind the name of a weight, as of transformers, and endings stand in the place of "weight" in it: the
// names that DeepSeek, Mistral and AutoFP8 have for scales.
const (
	usual   = "_scale_inv"
	autoFP8 = "weight_scale"
)

var endings = []string{"scale", "qscale_weight", autoFP8}

func checkBlock(b [2]int64) error {
	if min(b[0], b[1]) < 1 || max(b[0], b[1]) > math.MaxInt32 {
		return fmt.Errorf("found a block of %d x %d, expected 1 x 1 or more", b[0], b[1])
	}
	return nil
}

// grid is where the blocks of a weight are. Of more than two dimensions it is a stack.
func (s spec) grid(shape tensor.Shape) (scaled.Grid, error) {
	if len(shape) < 2 || slices.Min(shape) < 1 {
		return scaled.Grid{}, fmt.Errorf("its shape is %v, expected two dimensions or more that are not empty", shape)
	}
	if _, err := (tensor.Info{DType: tensor.F32, Shape: shape}).Size(); err != nil {
		return scaled.Grid{}, err
	}
	rows, cols := shape[len(shape)-2], shape[len(shape)-1]
	if s.block == [2]int64{} {
		return scaled.Whole(rows, cols), nil
	}
	return scaled.Grid{Rows: rows, Cols: cols, BlockRows: s.block[0], BlockCols: s.block[1]}, nil
}

// scaleInfo is the tensor of the scales.
func (s spec) scaleInfo(name string, shape tensor.Shape, g scaled.Grid) tensor.Info {
	scales := append(slices.Clone(shape[:len(shape)-2]), g.ScaleRows(), g.ScaleCols())
	if s.block == [2]int64{} && len(shape) == 2 {
		scales = scales[:s.dims]
	}
	return tensor.Info{Name: companion(name, s.ending), DType: s.scale, Shape: scales}
}

// companion is the name of the scales of a weight.
func companion(name, ending string) string {
	module, ok := strings.CutSuffix(name, ".weight")
	if ending == "" || !ok {
		return name + usual
	}
	return module + "." + ending
}

// config is what a quantization_config says.
type config struct {
	block  [2]int64
	silent bool // it says nothing of blocks, and means 128x128, or one scale where AutoFP8 has written it
	skips  []string
	static bool // activations are quantised by scales that are stored
}

// readConfig reads a quantization_config; nil is another scheme's.
func readConfig(object []byte) (*config, error) {
	var named struct {
		Method string `json:"quant_method"`
	}
	if json.Unmarshal(object, &named) != nil || named.Method != method {
		return nil, nil
	}
	var c struct {
		Block   jsontext.Value `json:"weight_block_size"`
		Skips   []string       `json:"modules_to_not_convert"`
		Ignored []string       `json:"ignored_layers"`
		Format  string         `json:"fmt"`
		Inputs  string         `json:"activation_scheme"`
	}
	fail := func(format string, args ...any) (*config, error) {
		return nil, fmt.Errorf("config.json: %s: %w: %s", configKey, quant.ErrMalformed, fmt.Sprintf(format, args...))
	}
	if err := json.Unmarshal(object, &c); err != nil {
		return fail("%s", strings.Join(strings.Fields(err.Error()), " "))
	}
	if c.Format != "" && !strings.EqualFold(c.Format, "e4m3") {
		return fail("its fmt is %s, expected e4m3", tensor.Quote(c.Format))
	}
	read := &config{block: [2]int64{128, 128}, skips: c.Skips, static: c.Inputs == "static"}
	if c.Skips == nil {
		read.skips = c.Ignored
	}
	if read.silent = c.Block == nil; !read.silent {
		var list []int64
		if json.Unmarshal(c.Block, &list) != nil || c.Block.Kind() != 'n' && len(list) != 2 {
			return fail("its weight_block_size is %s, expected two numbers or null", tensor.Quote(string(c.Block)))
		}
		read.block = [2]int64{}
		if list != nil {
			read.block = [2]int64(list)
			if err := checkBlock(read.block); err != nil {
				return fail("%s", err)
			}
		}
	}
	return read, nil
}

// Find returns the weights of a checkpoint whose config.json has the scheme.
func (Scheme) Find(ctx context.Context, s quant.Stored) ([]quant.Decoder, error) {
	c, err := readConfig(quant.Quantization(s.Config()))
	if c == nil || err != nil {
		return nil, err
	}
	return quant.FindEach(ctx, s, func(t tensor.Info) (quant.Decoder, error) { return find(c, s, t) })
}

// Calibration names the scales of activations and caches, by transformers, vLLM and Mistral.
func (Scheme) Calibration(s quant.Stored, weights []quant.Decoder) []string {
	c, err := readConfig(quant.Quantization(s.Config()))
	if c == nil || err != nil {
		return nil
	}
	return quant.Calibration{Modules: []string{"activation_scale", "input_scale", "qscale_act"},
		Caches: []string{"q_scale", "k_scale", "v_scale", "kv_scale"}, Activations: c.static}.Find(s, weights)
}

func find(c *config, s quant.Stored, t tensor.Info) (quant.Decoder, error) {
	if w, ok := strings.CutSuffix(t.Name, usual); ok {
		if _, ok := s.Lookup(w); !ok {
			return nil, fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(w))
		}
		return nil, nil
	}
	sp := spec{block: c.block, dims: 2}
	scale, ok := s.Lookup(companion(t.Name, ""))
	for _, e := range endings {
		other, there := s.Lookup(companion(t.Name, e))
		switch {
		case !there || !strings.HasSuffix(t.Name, ".weight"):
		case ok && t.DType == tensor.F8E4M3:
			return nil, fmt.Errorf("%w: it has both %s and %s, expected one of them", quant.ErrMalformed,
				tensor.Quote(scale.Name), tensor.Quote(other.Name))
		case !ok:
			scale, ok, sp.ending = other, true, e
		}
	}
	shape := slices.Clone(t.Shape)
	switch t.DType {
	case tensor.F8E4M3:
		if !ok {
			return nil, fmt.Errorf("%w: %s is missing", quant.ErrMalformed, tensor.Quote(companion(t.Name, "")))
		}
	case tensor.I8:
		if !ok {
			return nil, nil
		}
		if len(shape) < 2 || shape[len(shape)-1] > math.MaxInt64/2 {
			return nil, fmt.Errorf("%w: its shape is %v, expected two dimensions or more", quant.ErrMalformed, shape)
		}
		sp.pairs, sp.block = true, [2]int64{1, 32}
		shape[len(shape)-1] *= 2
	case tensor.F8E5M2, tensor.F8E4M3FNUZ, tensor.F8E5M2FNUZ:
		return nil, fmt.Errorf("%w: its dtype is %v, expected F8_E4M3", quant.ErrMalformed, t.DType)
	default:
		if ok && sp.ending == "" {
			return nil, fmt.Errorf("%w: its dtype is %v beside %s, expected F8_E4M3", quant.ErrMalformed, t.DType,
				tensor.Quote(scale.Name))
		}
		return nil, nil
	}
	if sp.scale = scale.DType; !slices.Contains(scaleTypes, scale.DType) {
		return nil, fmt.Errorf("%w: %s is %v, expected one of %v", quant.ErrMalformed, tensor.Quote(scale.Name),
			scale.DType, scaleTypes)
	}
	if sp.ending == autoFP8 && c.silent {
		sp.block = [2]int64{}
	}
	g, err := sp.grid(shape)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", quant.ErrMalformed, err)
	}
	if g.Cols > scaled.MostColumns {
		return nil, fmt.Errorf("%w: its rows have %d elements, expected at most %d", quant.ErrMalformed, g.Cols,
			scaled.MostColumns)
	}
	want := sp.scaleInfo(t.Name, shape, g)
	one := sp.block == [2]int64{} && len(shape) == 2 && scale.Count() == 1 // written with any shape
	if one {
		sp.dims = min(len(scale.Shape), 2)
	}
	if !one && !slices.Equal(scale.Shape, want.Shape) {
		return nil, fmt.Errorf("%w: %s has the shape %v, expected %v for a weight of shape %v in blocks of %s",
			quant.ErrMalformed, tensor.Quote(scale.Name), scale.Shape, want.Shape, shape, blockOf(sp.block))
	}
	dtype := s.DType()
	if !dtype.Float() {
		dtype = tensor.BF16 // as transformers decodes such weights
	}
	info := tensor.Info{Name: t.Name, DType: dtype, Shape: shape}
	return &decoder{weight{spec: sp, info: info, grid: g}, scale.Name}, nil
}

// Encoder prepares to store t, which has float elements.
func (Scheme) Encoder(_ context.Context, public quant.Spec, t tensor.Info) (quant.Encoder, error) {
	s, err := private(public)
	if err != nil {
		return nil, err
	}
	if s.pairs {
		return nil, fmt.Errorf("%w to %s: the type is read only", quant.ErrUnsupported, public.Type)
	}
	if !t.DType.Float() {
		return nil, fmt.Errorf("%w to %s: its dtype is %v, expected F32, F16 or BF16", quant.ErrUnsupported, public.Type,
			t.DType)
	}
	g, err := s.grid(t.Shape)
	if err != nil {
		return nil, fmt.Errorf("%w to %s: %w", quant.ErrUnsupported, public.Type, err)
	}
	e := &encoder{weight: weight{spec: s, info: t, grid: g}}
	if s.block == [2]int64{} {
		if len(t.Shape) > 2 {
			return nil, fmt.Errorf("%w to %s with one scale: its shape is %v, expected two dimensions", quant.ErrUnsupported,
				public.Type, t.Shape)
		}
		return &measured{e}, nil
	}
	return e, nil
}

// Config returns the quantization_config that transformers writes, keys sorted. It has one size of blocks for all
// weights.
func (Scheme) Config(weights []quant.Assigned, skip []string) (key string, object []byte, err error) {
	if len(weights) == 0 {
		return "", nil, fmt.Errorf("%w: no weights, expected at least one", quant.ErrUnsupported)
	}
	first := spec{}
	for i, w := range weights {
		s, err := private(w.Spec)
		if err != nil {
			return "", nil, fmt.Errorf("tensor %s: %w", tensor.Quote(w.Name), err)
		}
		if i == 0 {
			first = s
		}
		if s.block != first.block || s.scale != first.scale {
			return "", nil, fmt.Errorf("tensor %s: %w in %s beside others in %s: fine-grained FP8 has one kind of blocks a "+
				"checkpoint", tensor.Quote(w.Name), quant.ErrUnsupported, w.Spec, weights[0].Spec)
		}
	}
	var b bytes.Buffer
	b.WriteString(`{"activation_scheme": "dynamic", "modules_to_not_convert": `)
	list, err := json.Marshal(skip, json.FormatNilSliceAsNull(true))
	if err != nil {
		return "", nil, err
	}
	b.Write(list)
	b.WriteString(`, "quant_method": "fp8"`)
	if first.scale == tensor.F8E8M0 || first.scale == tensor.U8 {
		b.WriteString(`, "scale_fmt": "ue8m0"`)
	}
	if first.block == [2]int64{} {
		b.WriteString(`, "weight_block_size": null}`)
	} else {
		fmt.Fprintf(&b, `, "weight_block_size": [%d, %d]}`, first.block[0], first.block[1])
	}
	return configKey, b.Bytes(), nil
}

// Declaration reads the quantization_config that Config writes.
func (Scheme) Declaration(object []byte) (quant.Declaration, bool) {
	c, err := readConfig(object)
	if err != nil {
		return quant.Declaration{}, true // Find says what is wrong
	}
	if c == nil {
		return quant.Declaration{}, false
	}
	d := quant.Declaration{Experts: true}
	if c.skips != nil {
		d.Skips = quant.SkipList(c.skips)
	}
	return d, true
}
