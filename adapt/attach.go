package adapt

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/internal/parallel"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// AttachOptions say what adapter Attach makes.
type AttachOptions struct {
	Rank  int     // 0 is 8
	Alpha float64 // 0 is 16
	// Target is "all-linear" (or empty), "attention", names joined by commas that match whole ends of module names, or a
	// regular expression of Python that matches whole names.
	Target string
	// Init is what the adapter starts from:
	//
	//	kaiming     (or empty) A uniform, B zero: PEFT's default
	//	gaussian    A normal, B zero
	//	pissa       the leading singular values of each weight
	//	olora       the first columns of a QR decomposition of each weight
	//	loftq       what four bits take, alternating with a base in four bits that is written as well
	//	compensate  what four bits take of each weight
	Init string
	// LoftQIterations is how often loftq alternates; 0 is 5.
	LoftQIterations int
	Seed            uint64
	// Threads is how many modules are decomposed at once; 0 is one a processor.
	Threads     int
	Force       bool
	FollowLinks bool // for who opens the base
}

// AttachedModule is a module of a new adapter.
type AttachedModule struct {
	Name    string `json:"name"`
	In      int    `json:"in"`
	Out     int    `json:"out"`
	Rank    int    `json:"rank"`
	Experts int    `json:"experts,omitzero"` // how many there are of these, stacked
	// Before and After are relative errors (Frobenius) of the weight in NF4, of blocks of 64: without the adapter, and
	// with it. They are nil for inits whose delta is zero. For pissa and olora the adapter is taken out of the weight
	// before it is quantised.
	Before *float64 `json:"error_before,omitempty"`
	After  *float64 `json:"error_after,omitempty"`
}

// Attachment says what Attach has done.
type Attachment struct {
	Destination string  `json:"destination"`
	Init        string  `json:"init"`
	Rank        int     `json:"rank"`
	Alpha       float64 `json:"alpha"`
	// Base is the checkpoint that the adapter is for: the one given, or what loftq has written beside the adapter.
	Base       string `json:"base"`
	Parameters int64  `json:"parameters"`
	// Unchanged says that every delta is zero, so that the model's output is what it was.
	Unchanged bool             `json:"output_unchanged"`
	Modules   []AttachedModule `json:"modules"`
	Notices   []string         `json:"notices"`
}

// Attach writes to out a new adapter for base. With the inits kaiming and gaussian B is zero, so that the model's
// output is what it was; with pissa and olora it is so in PEFT, which takes the adapter's part out of the base as it
// loads the adapter.
func Attach(ctx context.Context, base *checkpoint.Checkpoint, out string, o AttachOptions) (*Attachment, error) {
	o, s, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	chosen, task, err := o.choose(base, s)
	if err != nil {
		return nil, err
	}
	for _, m := range chosen.list {
		if err := s.check(m.Target); err != nil {
			return nil, fmt.Errorf("%s: %w", base.Path, err)
		}
	}
	if err := pipeline.CheckSpared(out, base.Paths()...); err != nil {
		return nil, err
	}
	w, err := pipeline.NewAdapterWriter(base.Path, out, o.Force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	r := &Attachment{
		Destination: out, Init: o.Init, Rank: o.Rank, Alpha: o.Alpha, Base: base.Path, Unchanged: true,
		Notices: append([]string{}, chosen.notices...),
	}
	a := &attaching{AttachOptions: o, start: s, base: base, choice: chosen, task: task, out: w, result: r}
	defer a.abort()
	if err := a.startAll(ctx); err != nil {
		return nil, orInterrupted(ctx, err)
	}
	if a.loftq() {
		if err := a.writeBase(ctx); err != nil {
			return nil, orInterrupted(ctx, err)
		}
	}
	if err := a.addTrainedWhole(); err != nil {
		return nil, err
	}
	a.explain()
	config, err := a.config()
	if err != nil {
		return nil, err
	}
	return r, w.Write(ctx, lora.EncodePEFT(a.modules, config))
}

// choose finds what a new adapter for base is attached to, and PEFT's task.
func (o AttachOptions) choose(base *checkpoint.Checkpoint, s start) (*choice, string, error) {
	if _, foreign := base.ForeignScheme(); !foreign { // of one of those a layer that is plain may be meant
		if err := base.CheckReadable(); err != nil {
			return nil, "", err
		}
	}
	task := lora.TaskType(base.Config, func(part string) bool {
		has := func(w *checkpoint.Weight) bool { return strings.Contains(w.Name, part) }
		return slices.ContainsFunc(base.Weights, has)
	})
	chosen, err := choose(base, o, s, task)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", base.Path, err)
	}
	return chosen, task, nil
}

// Modules lists the modules of the adapter that Attach would make for base, by its headers alone. The notices say, in a
// sentence each, what is not among them.
func Modules(base *checkpoint.Checkpoint, o AttachOptions) (modules []AttachedModule, notices []string, err error) {
	o, s, err := o.withDefaults()
	if err != nil {
		return nil, nil, err
	}
	chosen, _, err := o.choose(base, s)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range chosen.list {
		modules = append(modules, m.attached())
	}
	return modules, chosen.notices, nil
}

// attached is the module as Attach tells of it.
func (m *module) attached() AttachedModule {
	return AttachedModule{Name: m.String(), In: m.In, Out: m.Out, Rank: m.rank, Experts: m.Experts}
}

// Check refuses what is wrong whatever the base is.
func (o AttachOptions) Check() error {
	_, _, err := o.withDefaults()
	return err
}

// withDefaults fills in what is not set, and finds the start.
func (o AttachOptions) withDefaults() (AttachOptions, start, error) {
	o.Rank, o.Alpha, o.Init = cmp.Or(o.Rank, 8), cmp.Or(o.Alpha, 16), cmp.Or(o.Init, "kaiming")
	o.LoftQIterations = cmp.Or(o.LoftQIterations, 5)
	s, err := startNamed(o.Init)
	switch {
	case err != nil:
		return o, s, err
	case o.Rank < 0 || !(o.Alpha > 0) || math.IsInf(o.Alpha, 0):
		return o, s, fmt.Errorf("%w: rank is %d and alpha %v, expected positive numbers", ErrOption, o.Rank, o.Alpha)
	case o.LoftQIterations < 0 || o.Threads < 0:
		return o, s, fmt.Errorf("%w: loftq iterations are %d and threads %d, expected positive numbers",
			ErrOption, o.LoftQIterations, o.Threads)
	}
	return o, s, nil
}

// attaching is an adapter that comes into being.
type attaching struct {
	AttachOptions
	start   start
	base    *checkpoint.Checkpoint
	choice  *choice
	task    string // PEFT's
	out     *pipeline.AdapterWriter
	modules []*lora.Module
	result  *Attachment
	// Of loftq, what is taken out of the base before it is quantised, and its modules.
	subtracted        *pipeline.AdapterWriter
	subtractedModules []*lora.Module
}

// startAll makes the adapters of all targets and spools them in their order.
func (a *attaching) startAll(ctx context.Context) error {
	if err := a.beginSubtracted(); err != nil {
		return err
	}
	list := a.choice.list
	begin := func(ctx context.Context, i int) (*factorPair, error) {
		f, err := a.start.begin(ctx, &a.AttachOptions, list[i])
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", tensor.Quote(list[i].String()), err)
		}
		return f, nil
	}
	add := func(i int, f *factorPair) error { return a.add(list[i], f) }
	return parallel.InOrder(ctx, len(list), a.Threads, begin, add)
}

// add takes up the adapter of a target.
func (a *attaching) add(m *module, f *factorPair) error {
	r := a.result
	told := m.attached()
	if !math.IsNaN(f.errorBefore) {
		told.Before, told.After = &f.errorBefore, &f.errorAfter
	}
	zero := f.B.Data // the side that makes the delta zero
	if f.Form == lora.Embedding {
		zero = f.A.Data
	}
	for _, v := range zero {
		r.Unchanged = r.Unchanged && v == 0
	}
	r.Parameters += int64(len(f.A.Data) + len(f.B.Data))
	r.Modules = append(r.Modules, told)
	if f.subtracted != nil {
		spooled, err := a.subtracted.Spool(*f.subtracted)
		if err != nil {
			return err
		}
		a.subtractedModules = append(a.subtractedModules, spooled)
	}
	f.Name = a.choice.key(m)
	spooled, err := a.out.Spool(f.Trained)
	a.modules = append(a.modules, spooled)
	return err
}

// addTrainedWhole takes up the modules that PEFT trains whole for a task: it looks for them in the file.
func (a *attaching) addTrainedWhole() error {
	for _, w := range a.base.Weights {
		if len(w.Role.Runtime) != 1 || !w.Role.Runtime[0].Whole() {
			continue
		}
		param := w.Role.Runtime[0].Param
		if !lora.IsTrainedWhole(param, a.task) {
			continue
		}
		if w.Decodes() {
			return fmt.Errorf("%s: tensor %s: %w: PEFT trains it whole for %s, and it is quantised",
				a.base.Path, tensor.Quote(w.Name), ErrRefused, a.task)
		}
		m := &lora.Module{Form: lora.Replace, Value: &w.Parts[0]}
		if i := strings.LastIndexByte(param, '.'); i >= 0 {
			m.Name, m.Param = param[:i], param[i+1:]
		}
		a.modules = append(a.modules, m)
	}
	return nil
}

// conv1D reports whether some weights lie the other way round, as GPT-2's do.
func (a *attaching) conv1D() bool {
	return slices.ContainsFunc(a.choice.list, func(m *module) bool { return m.Kind == models.Conv1D })
}

// explain says what has to be known of the adapter before it is used.
func (a *attaching) explain() {
	r, base := a.result, a.base.Path
	say := func(format string, v ...any) { r.Notices = append(r.Notices, fmt.Sprintf(format, v...)) }
	switch {
	case a.start.fromWeight:
		say("PEFT takes the adapter's part out of %s as it loads %s; another trainer needs the base without it, and "+
			"init_lora_weights set to true for that one. Once trained, the adapter less %s is one for %s",
			base, r.Destination, r.Destination, base)
		if a.start.name == "olora" && a.conv1D() {
			say("PEFT 0.21 does not turn Conv1D weights round for olora, and so cannot load this adapter onto %s: "+
				"use the base without it", base)
		}
	case a.loftq():
		say("the adapter is for %s, in NF4 of blocks of %d without double quantisation, and not for %s",
			r.Base, nf4Block, base)
	case a.start.fromError:
		say("the adapter is for %s in NF4 of blocks of %d with double quantisation", base, nf4Block)
	}
}

// config makes the adapter_config.json.
func (a *attaching) config() ([]byte, error) {
	s := lora.Settings{
		Base: a.result.Base, TaskType: a.task, FanInFanOut: a.conv1D(), Rank: a.Rank, Alpha: a.Alpha,
		Parameters: a.choice.parameters, ToSave: lora.TrainedWhole(a.task),
	}
	if a.start.fromWeight {
		s.Init = a.start.name
	}
	if a.choice.doubled {
		s.Ranks, s.Alphas = map[string]int{lora.GateUp: 2 * a.Rank}, map[string]float64{lora.GateUp: 2 * a.Alpha}
	}
	return lora.PEFTConfig(s, a.choice.modules())
}

// beside is the path of something that is written beside the adapter.
func (a *attaching) beside(name string) string { return filepath.Join(a.out.Dir(), name) }
