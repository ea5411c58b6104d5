package lorakit

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/tensor"
)

// AttachOptions say what adapter Attach makes.
type AttachOptions struct {
	Rank  int     // 0 is 8
	Alpha float64 // 0 is 16
	// Target is "all-linear" (or empty), "attention", names joined by commas that match whole ends of
	// module names, or a regular expression of Python that matches whole names.
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
	Threads int
	Force   bool
}

// AttachedModule is a module of a new adapter.
type AttachedModule struct {
	Name    string `json:"name"`
	In      int    `json:"in"`
	Out     int    `json:"out"`
	Rank    int    `json:"rank"`
	Experts int    `json:"experts,omitzero"` // how many there are of these, stacked
	// Before and After are relative errors (Frobenius) of the weight in NF4, of blocks of 64:
	// without the adapter, and with it. They are nil for inits whose delta is zero. For pissa and
	// olora the adapter is taken out of the weight before it is quantised.
	Before *float64 `json:"error_before,omitempty"`
	After  *float64 `json:"error_after,omitempty"`
}

// Attachment says what Attach has done.
type Attachment struct {
	Destination string  `json:"destination"`
	Init        string  `json:"init"`
	Rank        int     `json:"rank"`
	Alpha       float64 `json:"alpha"`
	// Base is the checkpoint that the adapter is for: the one given, or what loftq has
	// written beside the adapter.
	Base       string `json:"base"`
	Parameters int64  `json:"parameters"`
	// Unchanged says that every delta is zero, so that the model's output is what it was.
	Unchanged bool             `json:"output_unchanged"`
	Modules   []AttachedModule `json:"modules"`
	Notices   []string         `json:"notices"`
}

var inits = []string{"kaiming", "gaussian", "pissa", "olora", "loftq", "compensate"}

// loftqBase is the folder, in that of the adapter, of the base that loftq writes.
const loftqBase = "base"

// Attach writes a new adapter for base. With the inits kaiming and gaussian B is zero, so
// that the model's output is what it was; with pissa and olora it is so in PEFT, which takes the
// adapter's part out of the base as it loads the adapter.
func Attach(ctx context.Context, base, out string, o AttachOptions) (*Attachment, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if err := checkpoints(base); err != nil {
		return nil, err
	}
	c, err := checkpoint.Open(ctx, base)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	task := taskType(c)
	t, err := chooseTargets(c, o, task)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", base, err)
	}
	for _, s := range t.sites {
		if err := s.fits(o.Init); err != nil {
			return nil, fmt.Errorf("%s: %w", base, err)
		}
	}
	w, err := pipeline.NewAdapterWriter(base, out, o.Force)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	r := &Attachment{Destination: out, Init: o.Init, Rank: o.Rank, Alpha: o.Alpha, Base: base, Unchanged: true, Notices: append([]string{}, t.notices...)}
	a := &attaching{AttachOptions: o, checkpoint: c, targets: t, out: w, result: r}
	defer a.abort()
	if err := a.startAll(ctx); err != nil {
		return nil, interrupted(ctx, err)
	}
	if o.Init == "loftq" {
		if err := a.quantise(ctx, base); err != nil {
			return nil, interrupted(ctx, err)
		}
		r.Base = filepath.Join(out, loftqBase)
	}
	if err := a.trainedWhole(task); err != nil {
		return nil, err
	}
	a.notices(base)
	config, err := a.config(task)
	if err != nil {
		return nil, err
	}
	return r, w.Write(ctx, lora.EncodePEFT(a.modules, config))
}

// check fills in what is not set, and refuses what is wrong whatever the base.
func (o *AttachOptions) check() error {
	if o.Rank == 0 {
		o.Rank = 8
	}
	if o.Alpha == 0 {
		o.Alpha = 16
	}
	if o.Init == "" {
		o.Init = "kaiming"
	}
	if o.LoftQIterations == 0 {
		o.LoftQIterations = 5
	}
	if o.Threads == 0 {
		o.Threads = runtime.GOMAXPROCS(0)
	}
	if !slices.Contains(inits, o.Init) {
		return fmt.Errorf("%w: init %q is unknown; known are %s", ErrOption, o.Init, strings.Join(inits, ", "))
	}
	if o.Rank < 0 || !(o.Alpha > 0) || math.IsInf(o.Alpha, 0) {
		return fmt.Errorf("%w: rank is %d and alpha %v, expected positive numbers", ErrOption, o.Rank, o.Alpha)
	}
	if o.LoftQIterations < 0 || o.Threads < 0 {
		return fmt.Errorf("%w: loftq iterations are %d and threads %d, expected positive numbers", ErrOption, o.LoftQIterations, o.Threads)
	}
	return nil
}

// attaching is an adapter that comes into being.
type attaching struct {
	AttachOptions
	checkpoint *checkpoint.Checkpoint
	targets    *targets
	out        *pipeline.AdapterWriter
	modules    []*lora.Module
	result     *Attachment
	previous   *pipeline.AdapterWriter // of loftq, what is taken out of the base
	taken      []*lora.Module          // its modules
}

// startAll makes the adapters of all targets and spools them in their order.
func (a *attaching) startAll(ctx context.Context) error {
	if a.Init == "loftq" {
		var err error
		if a.previous, err = pipeline.NewAdapterWriter(a.checkpoint.Path, a.beside("previous"), false); err != nil {
			return err
		}
	}
	sites := a.targets.sites
	return inOrder(ctx, len(sites), a.Threads, func(ctx context.Context, i int) (*initial, error) {
		x, err := a.start(ctx, sites[i])
		if err != nil {
			return nil, fmt.Errorf("module %s: %w", tensor.Quote(sites[i].String()), err)
		}
		return x, nil
	}, func(i int, x *initial) error { return a.add(sites[i], x) })
}

// add takes up the adapter of a target.
func (a *attaching) add(s *site, x *initial) error {
	r := a.result
	m := AttachedModule{Name: s.String(), In: s.in, Out: s.out, Rank: s.rank, Experts: s.experts}
	if !math.IsNaN(x.before) {
		m.Before, m.After = &x.before, &x.after
	}
	delta := x.B.Data
	if x.Form == lora.Embedding {
		delta = x.A.Data
	}
	for _, v := range delta {
		r.Unchanged = r.Unchanged && v == 0
	}
	r.Parameters += int64(len(x.A.Data) + len(x.B.Data))
	r.Modules = append(r.Modules, m)
	if x.previous != nil {
		m, err := a.previous.Spool(*x.previous)
		if err != nil {
			return err
		}
		a.taken = append(a.taken, m)
	}
	x.Name = a.targets.key(s)
	spooled, err := a.out.Spool(x.Trained)
	a.modules = append(a.modules, spooled)
	return err
}

// trainedWhole takes up the modules that PEFT trains whole for a task: it looks for them in the file.
func (a *attaching) trainedWhole(task string) error {
	for _, w := range a.checkpoint.Weights {
		if len(w.Role.Runtime) != 1 || !w.Role.Runtime[0].Whole() || !isWhole(w.Role.Runtime[0].Param, task) {
			continue
		}
		param := w.Role.Runtime[0].Param
		if w.Decoder != nil {
			return fmt.Errorf("%s: tensor %s: %w: PEFT trains it whole for %s, and it is quantised", a.checkpoint.Path, tensor.Quote(w.Name), ErrRefused, task)
		}
		m := &lora.Module{Form: lora.Replace, Value: &w.Parts[0]}
		if i := strings.LastIndexByte(param, '.'); i >= 0 {
			m.Name, m.Param = param[:i], param[i+1:]
		}
		a.modules = append(a.modules, m)
	}
	return nil
}

// beside is the path of something that is written beside the adapter.
func (a *attaching) beside(name string) string { return filepath.Join(a.out.Dir(), name) }

// abort removes what is left of loftq's own files.
func (a *attaching) abort() {
	if a.previous != nil {
		a.previous.Abort()
	}
}

// quantise writes the base that a loftq adapter is for: each weight less the adapter of the step
// before the best, in four bits.
func (a *attaching) quantise(ctx context.Context, base string) error {
	o := ConvertOptions{Quantize: loftqNF4.Type, BlockSize: nf4Block, MinKept: -1, Threads: a.Threads}
	previous := a.beside("previous")
	if len(a.taken) > 0 {
		e, err := lora.New(previous, lora.Settings{Base: base, FanInFanOut: a.conv1D()}, a.taken).Encode(lora.EncodeOptions{To: lora.PEFT})
		if err != nil {
			return err
		}
		if err := a.previous.Write(ctx, e); err != nil {
			return err
		}
		o.Merge = []Adapter{{Path: previous, Weight: -1}}
	}
	r, err := Convert(ctx, base, a.beside(loftqBase), o)
	if err != nil {
		return err
	}
	a.result.Notices = append(a.result.Notices, r.Notices...)
	a.abort()
	return os.RemoveAll(previous)
}

func (a *attaching) conv1D() bool {
	return slices.ContainsFunc(a.targets.sites, func(s *site) bool { return s.kind == models.Conv1D })
}

// notices says what has to be known of the adapter before it is used.
func (a *attaching) notices(base string) {
	r := a.result
	say := func(format string, v ...any) { r.Notices = append(r.Notices, fmt.Sprintf(format, v...)) }
	switch a.Init {
	case "pissa", "olora":
		say("PEFT takes the adapter's part out of %s as it loads %s; for another trainer, make the base without it by lorakit unmerge %s %s RESIDUAL, and set init_lora_weights to true for that one. Once trained, lorakit combine PLAIN TRAINED=1 %s=-1 --type cat makes an adapter for %s",
			base, r.Destination, base, r.Destination, r.Destination, base)
		if a.Init == "olora" && a.conv1D() {
			say("PEFT 0.21 does not turn Conv1D weights round for olora, and so cannot load this adapter onto %s: use that RESIDUAL", base)
		}
	case "loftq":
		say("the adapter is for %s, in NF4 of blocks of %d without double quantisation, and not for %s", r.Base, nf4Block, base)
	case "compensate":
		say("the adapter is for %s in NF4 of blocks of %d with double quantisation: lorakit convert %s DST --quantize nf4", base, nf4Block, base)
	}
}

// config makes the adapter_config.json.
func (a *attaching) config(task string) ([]byte, error) {
	s := lora.Settings{Base: a.result.Base, TaskType: task, FanInFanOut: a.conv1D(), Rank: a.Rank, Alpha: a.Alpha}
	if a.Init == "pissa" || a.Init == "olora" {
		s.Init = a.Init
	}
	s.Parameters, s.ToSave = a.targets.parameters, trainedWhole[task]
	if a.targets.doubled {
		s.Ranks, s.Alphas = map[string]int{gateUp: 2 * a.Rank}, map[string]float64{gateUp: 2 * a.Alpha}
	}
	return lora.PEFTConfig(s, a.targets.modules())
}

// interrupted is the error of a run, or that it was cancelled.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ErrInterrupted
	}
	return err
}

// inOrder runs n jobs, several at once, and takes what they make in their order.
func inOrder[T any](ctx context.Context, n, threads int, job func(context.Context, int) (T, error), take func(int, T) error) error {
	g, ctx := errgroup.WithContext(ctx)
	slots := make(chan struct{}, threads)
	made := make([]chan T, n)
	for i := range made {
		made[i] = make(chan T, 1)
	}
	g.Go(func() error {
		for i := range n {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			g.Go(func() error {
				x, err := job(ctx, i)
				if err != nil {
					return err
				}
				made[i] <- x
				return nil
			})
		}
		return nil
	})
	g.Go(func() error {
		for i := range n {
			select {
			case x := <-made[i]:
				<-slots
				if err := take(i, x); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	return g.Wait()
}
