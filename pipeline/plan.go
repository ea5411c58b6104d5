package pipeline

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// ErrRefused says that what was asked for cannot be done with this checkpoint.
var ErrRefused = errors.New("refused")

// Options say what a checkpoint is to become. The result depends on them and on
// the source alone.
type Options struct {
	// To is the name of the format to write; empty keeps the source's, or takes that of
	// the destination's extension.
	To string
	// DType is what plain weights are cast to; 0 keeps each as it is.
	DType tensor.DType
	// Quantize is "keep", "none", or a type of a registered scheme, such as
	// "nf4".
	Quantize string
	// BlockSize and DoubleQuant are for the types that have them.
	BlockSize   int
	DoubleQuant bool
	// PerExpert quantises the experts' matrices too, which transformers does not.
	PerExpert bool
	// Include, where not empty, names by globs exactly what is quantised;
	// Exclude what is not.
	Include, Exclude []string
	// MaxShardSize is the most bytes a shard may have; 0 is no limit.
	MaxShardSize int64
	// AllowNonFinite quantises NaN and infinity as the scheme does, instead of
	// refusing them.
	AllowNonFinite bool
}

// Plan says, for every byte of the result, where it comes from and where it goes.
// It is a value: it can be saved as JSON and read back, and equal plans make equal bytes.
type Plan struct {
	// Version is that of the rules by which the plan is carried out: another
	// may make other bytes.
	Version int         `json:"version"`
	Source  string      `json:"source"`
	Inputs  []InputFile `json:"inputs"` // what the plan was made from
	Format  string      `json:"format"`
	// SingleFile says that the destination is one file and no folder.
	SingleFile bool           `json:"single_file,omitempty"`
	Shards     []Shard        `json:"shards"`
	Files      []formats.File `json:"files,omitempty"`     // small, written whole
	Carried    []InputFile    `json:"carried,omitempty"`   // copied as they are
	Quantized  int            `json:"quantized,omitempty"` // weights that are in the scheme asked for
	Notices    []string       `json:"notices,omitempty"`   // what the user should know of the choices made
}

// planVersion is the Version of the plans made here.
const planVersion = 1

// InputFile is a file of the source, with what tells that it has changed.
type InputFile struct {
	Name    string    `json:"name"` // relative to the source folder, with slashes
	Size    int64     `json:"size"`
	ModTime time.Time `json:"mod_time"`
}

// Shard is one output file, and the unit of work and of resumption.
type Shard struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Header []byte `json:"header"`
	Jobs   []Job  `json:"jobs"`
}

// Job is the way of one logical weight: decode, transpose, cast, quantise, in
// this order. With Copy its stored bytes are taken as they are.
type Job struct {
	Weight  string       `json:"weight"`
	Copy    bool         `json:"copy,omitempty"`
	DType   tensor.DType `json:"dtype"`            // of the values that are written, or quantised
	Encode  *quant.Spec  `json:"encode,omitempty"` // nil writes plain values
	Outputs []Output     `json:"outputs"`
}

// Output is one tensor of the result and where its bytes begin in the shard.
type Output struct {
	tensor.Info
	Offset int64 `json:"offset"`
}

// Digest identifies the plan: a stage is gone on with only by the plan that began
// it. How the path of the source was spelled is no part of it.
func (p *Plan) Digest() string {
	anywhere := *p
	anywhere.Source = ""
	h := sha256.New()
	if err := json.MarshalWrite(h, &anywhere, json.Deterministic(true)); err != nil {
		panic(err) // a Plan holds nothing that JSON cannot
	}
	return hex.EncodeToString(h.Sum(nil))
}

// OutputBytes is the size of all shards.
func (p *Plan) OutputBytes() int64 {
	var n int64
	for _, s := range p.Shards {
		n += s.Size
	}
	return n
}

// NewPlan decides what becomes of every weight of c at the destination dst, which is
// only looked at for its extension.
func NewPlan(c *Checkpoint, dst string, o Options) (*Plan, error) {
	b := planner{Checkpoint: c, Options: o, p: &Plan{Version: planVersion, Source: c.Path}}
	if err := b.check(); err != nil {
		return nil, err
	}
	f, err := b.target(dst)
	if err != nil {
		return nil, err
	}
	jobs, err := b.jobs()
	if err != nil {
		return nil, err
	}
	if err := b.layOut(f, dst, jobs); err != nil {
		return nil, err
	}
	if err := b.files(); err != nil {
		return nil, err
	}
	return b.p, nil
}

// planner is the state while a plan is made.
type planner struct {
	*Checkpoint
	Options
	p *Plan

	scheme    quant.Scheme // nil for keep and none
	quantised []*Weight    // what is in the scheme in the result
	left      []*Weight    // what transformers would quantise and stays plain
	extra     []*Weight    // what is quantised and transformers would leave
	decoded   int          // how many weights are dequantised
	changed   bool         // whether the scheme of any weight changes
	unfit     int          // how many were chosen that hold nothing to quantise
}

func (b *planner) notice(format string, args ...any) {
	b.p.Notices = append(b.p.Notices, fmt.Sprintf(format, args...))
}

// check refuses what contradicts itself before anything is decided.
func (b *planner) check() error {
	if b.Quantize != "keep" && b.Quantize != "none" {
		var err error
		if b.scheme, err = quant.ForType(b.Quantize); err != nil {
			return err
		}
	}
	if method, ok := b.foreignScheme(); ok && (b.Quantize != "keep" || b.Options.DType != 0) {
		return fmt.Errorf("%s: %w: its weights are stored as %s, expected plain ones or a scheme that can be read: %s",
			filepath.Join(b.Path, configName), ErrRefused, formats.Quote(method), knownSchemes())
	}
	if err := globs(b.Include).unmatched("--include", b.Weights); err != nil {
		return err
	}
	return globs(b.Exclude).unmatched("--exclude", b.Weights)
}

func (b *planner) target(dst string) (formats.Format, error) {
	byName, single := formats.ForExtension(dst)
	b.p.SingleFile = single
	switch {
	case b.To != "":
		f, err := formats.Lookup(b.To)
		if err == nil && single && byName.Name() != f.Name() {
			err = fmt.Errorf("%w: %s has the extension of %s, and --to says %s", ErrRefused, dst, byName.Name(), f.Name())
		}
		return f, err
	case single:
		return byName, nil
	}
	return b.Format, nil
}

// jobs decides the way of every weight.
func (b *planner) jobs() ([]Job, error) {
	jobs := make([]Job, 0, len(b.Weights))
	for _, w := range b.Weights {
		if b.scheme != nil && w.Role.Tied != "" {
			same, err := b.sameAsTied(w)
			if err != nil {
				return nil, err
			}
			if same {
				b.notice("%s is tied to %s and not written", formats.Quote(w.Name), formats.Quote(w.Role.Tied))
				continue
			}
		}
		j, err := b.job(w)
		if err != nil {
			return nil, w.failed(err)
		}
		jobs = append(jobs, j)
	}
	if b.scheme != nil && len(b.quantised) == 0 {
		return nil, fmt.Errorf("%s: %w: none of its %d tensors is one to be quantised to %s; --include GLOB chooses them by name", b.Path, ErrRefused, len(b.Weights), b.Quantize)
	}
	b.explain()
	return jobs, nil
}

// job decides the way of one weight.
func (b *planner) job(w *Weight) (Job, error) {
	selected := b.selected(w)
	if selected && (w.Count() == 0 || w.DType.Integer()) {
		b.unfit++
		selected = false
	}
	if selected {
		b.quantised = append(b.quantised, w)
		if !w.Role.Quantized {
			b.extra = append(b.extra, w)
		}
		return b.quantiseJob(w)
	}
	if b.scheme != nil && (w.Role.Quantized || w.Role.Stay != models.Free) {
		b.left = append(b.left, w)
	}
	to := b.castTo(w)
	switch {
	case w.Decoder == nil && to == w.DType, w.Decoder != nil && b.Quantize == "keep":
		return copyJob(w), nil
	case w.Decoder != nil:
		b.decoded++
		b.changed = true
	}
	return Job{Weight: w.Name, DType: to, Outputs: []Output{{Info: tensor.Info{Name: w.Name, DType: to, Shape: w.Shape}}}}, nil
}

// selected reports whether a weight is to be quantised.
func (b *planner) selected(w *Weight) bool {
	switch {
	case b.scheme == nil, globs(b.Exclude).match(w.Name):
		return false
	case len(b.Include) > 0:
		return globs(b.Include).match(w.Name)
	}
	return w.Role.Quantized || b.PerExpert && w.Role.Kind == models.Expert
}

func (b *planner) spec() quant.Spec {
	s := quant.Spec{Type: b.Quantize, AllowNonFinite: b.AllowNonFinite}
	if b.Quantize != "int8" {
		s.BlockSize, s.DoubleQuant = b.BlockSize, b.DoubleQuant
	}
	return s
}

func (b *planner) quantiseJob(w *Weight) (Job, error) {
	if w.Role.Kind == models.Expert && len(w.Shape) > 2 && len(b.Include) == 0 {
		return Job{}, fmt.Errorf("%w: its experts are stored as one tensor of shape %v, and per-expert needs one tensor an expert; --experts keep leaves them as they are", ErrRefused, w.Shape)
	}
	spec, to := b.spec(), b.castTo(w)
	if w.Decoder != nil {
		have := w.Decoder.Spec()
		have.AllowNonFinite = spec.AllowNonFinite
		// A scheme that does not store what a weight was has nothing to cast.
		if have == spec && (to == w.DType || w.Values != w.DType) {
			return copyJob(w), nil
		}
		b.decoded++
	}
	b.changed = true
	j := Job{Weight: w.Name, DType: to, Encode: &spec}
	e, err := b.scheme.Encoder(spec, j.encoded(w))
	if err != nil {
		return Job{}, err
	}
	for _, out := range e.Outputs() {
		j.Outputs = append(j.Outputs, Output{Info: out})
	}
	return j, nil
}

// encoded is the weight as the job's encoder sees it: Conv1D is turned round
// first, as transformers does.
func (j *Job) encoded(w *Weight) tensor.Info {
	t := tensor.Info{Name: w.Name, DType: j.DType, Shape: w.Shape}
	if j.flips(w) {
		t.Shape = transposed(w.Shape)
	}
	return t
}

// flips reports whether the values are turned round before they are quantised.
func (j *Job) flips(w *Weight) bool {
	return j.Encode != nil && w.Role.Kind == models.Conv1D && len(w.Shape) == 2
}

func copyJob(w *Weight) Job {
	j := Job{Weight: w.Name, Copy: true, DType: w.DType}
	for _, p := range w.Parts {
		j.Outputs = append(j.Outputs, Output{Info: p.Info})
	}
	return j
}

// castTo is the dtype that the values of a weight get.
func (b *planner) castTo(w *Weight) tensor.DType {
	to := b.Options.DType
	if to == 0 || !w.DType.Float() && w.DType != tensor.F64 {
		return w.DType
	}
	if to == tensor.F16 && w.Role.KeepFloat32 || to != tensor.F32 && w.Role.KeepFloat32Strict {
		return tensor.F32 // as transformers loads it
	}
	return to
}

// sameAsTied reports whether a weight that the config ties to another has that
// one's very bytes, so that nothing is lost without it.
func (b *planner) sameAsTied(w *Weight) (bool, error) {
	i := slices.IndexFunc(b.Weights, func(o *Weight) bool { return o.Name == w.Role.Tied })
	if i < 0 {
		return false, nil // it is the only one that is stored
	}
	same, err := sameBytes(w, b.Weights[i])
	if err == nil && !same {
		b.notice("%s is tied to %s by config.json, but differs from it: it is kept", formats.Quote(w.Name), formats.Quote(w.Role.Tied))
	}
	return same, err
}

// explain tells the user what he may not expect of the choice of weights.
func (b *planner) explain() {
	if b.decoded > 0 {
		b.notice("dequantised: %s", plural(b.decoded, "weight"))
	}
	if b.scheme == nil {
		return
	}
	if !b.Known {
		what := "there is no config.json"
		if b.Config != nil {
			what = "the architecture " + formats.Quote(b.Config.Architecture) + " is not known"
		}
		if len(b.Include) == 0 {
			b.notice("%s: weights are chosen by their names and shapes, and it is not promised that transformers loads the result", what)
		}
	}
	if b.unfit > 0 {
		b.notice("left as they are, since they hold integers or nothing: %s that --include chooses", plural(b.unfit, "tensor"))
	}
	experts, others := 0, []string(nil)
	for _, w := range b.extra {
		if w.Role.Kind == models.Expert {
			experts++
		} else {
			others = append(others, w.Name)
		}
	}
	switch {
	case b.PerExpert && experts > 0:
		b.notice("experts: %s in %s, one tensor an expert, for vLLM and unsloth; transformers does not load such a folder", plural(experts, "tensor"), b.Quantize)
	case experts > 0:
		b.notice("experts: %s in %s, by --include; transformers does not load such a folder", plural(experts, "tensor"), b.Quantize)
	default:
		n := 0
		for _, w := range b.Weights {
			if w.Role.Kind == models.Expert {
				n++
			}
		}
		if n > 0 {
			b.notice("experts: %s not quantised, as transformers loads them; --experts per-expert quantises them", plural(n, "tensor"))
		}
	}
	if len(others) > 0 && b.Known {
		b.notice("quantised, though transformers would not: %s; it is not promised that it loads the result", list(others, 3))
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// layOut places the jobs' outputs in shards.
func (b *planner) layOut(f formats.Format, dst string, jobs []Job) error {
	b.p.Format = f.Name()
	var infos []tensor.Info
	var groups []int
	var owner []*Output
	var params int64
	elements := make(map[string]int64, len(b.Weights))
	for _, w := range b.Weights {
		elements[w.Name] = w.Count()
	}
	b.p.Quantized = len(b.quantised)
	for i := range jobs {
		j := &jobs[i]
		for k := range j.Outputs {
			infos = append(infos, j.Outputs[k].Info)
			groups = append(groups, i)
			owner = append(owner, &j.Outputs[k])
		}
		params += elements[j.Weight]
	}
	seen := make(map[string]bool, len(infos))
	for _, t := range infos {
		if seen[t.Name] {
			return fmt.Errorf("%s: %w: the result would hold two tensors %s", b.Path, ErrRefused, formats.Quote(t.Name))
		}
		seen[t.Name] = true
	}
	opts := formats.Options{MaxShardSize: b.MaxShardSize, Metadata: b.Metadata(), Groups: groups, Parameters: params}
	if b.p.SingleFile {
		opts.SingleFile = filepath.Base(dst)
	}
	layout, err := f.Layout(infos, opts)
	if err != nil {
		return err
	}
	b.p.Files = layout.Extra
	for _, s := range layout.Shards {
		shard := Shard{Name: s.Name, Size: s.Size, Header: s.Header}
		var members []int
		for i, t := range s.Tensors {
			owner[t].Offset = s.Offsets[i]
			members = append(members, groups[t])
		}
		slices.Sort(members) // jobs in the order of the source
		for _, m := range slices.Compact(members) {
			shard.Jobs = append(shard.Jobs, jobs[m])
		}
		b.p.Shards = append(b.p.Shards, shard)
	}
	return nil
}

// files decides what else the destination gets: config.json, and what is carried
// along.
func (b *planner) files() error {
	for _, name := range b.Files() {
		in, err := b.input(name)
		if err != nil {
			return err
		}
		b.p.Inputs = append(b.p.Inputs, in)
	}
	if !b.Folder || b.p.SingleFile {
		return nil
	}
	if b.Config != nil {
		b.p.Inputs = append(b.p.Inputs, InputFile{Name: configName, Size: b.configInfo.Size(), ModTime: b.configInfo.ModTime()})
		config, err := b.editedConfig()
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(b.Path, configName), err)
		}
		b.p.Files = append(b.p.Files, formats.File{Name: configName, Data: config})
	}
	written := map[string]bool{}
	for _, s := range b.p.Shards {
		written[s.Name] = true
	}
	for _, f := range b.p.Files {
		written[f.Name] = true
	}
	for _, name := range b.Files() {
		written[name] = true
	}
	carried, skipped, err := carried(b.Path, written)
	if err != nil {
		return err
	}
	b.p.Carried = carried
	if len(skipped) > 0 {
		b.notice("not carried along: %s", list(skipped, 4))
	}
	return nil
}

// input describes one of the container's files.
func (b *planner) input(name string) (InputFile, error) {
	path := b.Path
	if b.Folder {
		path = filepath.Join(b.Path, filepath.FromSlash(name))
	}
	info, err := os.Stat(path)
	if err != nil {
		return InputFile{}, err
	}
	return InputFile{Name: name, Size: info.Size(), ModTime: info.ModTime()}, nil
}

// editedConfig is config.json with what the plan changes in it.
func (b *planner) editedConfig() ([]byte, error) {
	var edits []models.Edit
	if b.Options.DType != 0 {
		edits = append(edits, models.SetDType(b.Options.DType.Torch()))
	}
	switch {
	case b.Quantize == "none":
		edits = append(edits, models.Remove("quantization_config"))
	case b.scheme != nil && b.changed:
		edits = append(edits, models.Set("quantization_config", b.scheme.Config(b.spec(), b.skipped())))
	}
	return models.EditConfig(b.configJSON, edits...)
}

// skipped is the list of modules that a loader must not expect to be quantised,
// nil where its own choice is what was done.
func (b *planner) skipped() []string {
	if b.Known {
		var left []string
		for _, w := range b.left {
			left = append(left, b.Model.Module(w.Name))
		}
		extra := map[string]bool{}
		for _, w := range b.extra {
			if w.Role.Kind != models.Expert {
				extra[b.Model.Module(w.Name)] = true
			}
		}
		if len(left)+len(extra) == 0 {
			return nil
		}
		// The list replaces the loader's choice, so it is never null here.
		list := append([]string{}, b.Model.Skipped()...)
		for _, m := range left {
			if !slices.Contains(list, m) {
				list = append(list, m)
			}
		}
		return slices.DeleteFunc(list, func(m string) bool { return extra[m] })
	}
	// The loader's choice is not known: name every matrix that stays.
	quantised := make(map[*Weight]bool, len(b.quantised))
	for _, w := range b.quantised {
		quantised[w] = true
	}
	skip := []string{}
	for _, w := range b.Weights {
		if module, ok := strings.CutSuffix(w.Name, ".weight"); ok && !quantised[w] && len(w.Shape) == 2 {
			skip = append(skip, module)
		}
	}
	return skip
}

// list joins the first n names.
func list(names []string, n int) string {
	var quoted []string
	for _, s := range names[:min(n, len(names))] {
		quoted = append(quoted, formats.Quote(s))
	}
	s := strings.Join(quoted, ", ")
	if more := len(names) - n; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}
