package train

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// ErrData says that a batch is malformed or does not fit the model. Errors of checkpoint and lora may be met too.
var ErrData = errors.New("wrong data")

// Options say what Validate does.
type Options struct {
	// Data is a file of lines of {"input_ids": [...], "labels": [...]}, which are one batch. Labels default to the ids.
	Data string
	// Adapter is a folder of PEFT. Without one the loss is computed, and nothing is trained.
	Adapter string
	// Against, where not empty, is another checkpoint that the batch goes through, and that the first is compared with.
	// It is for checkpoints as they are: with it there is no Adapter.
	Against string
	// Steps is how many are taken and Rate the learning rate, both above 0. They have no meaning without an Adapter; Save
	// and SaveGradients need one.
	Steps int
	Rate  float64
	// Save is a folder for the adapter after the last step, and SaveGradients a file for the gradients of the first.
	// Neither is written where a step fails. Force replaces what is there.
	Save, SaveGradients string
	Force               bool
	FollowLinks         bool  // as storage.Options has it
	Memory              int64 // bounds the peak of the process, in bytes; 0 is no bound
	Threads             int   // 0 is one a processor
	// Progress, where not nil, is called several times a second, from any goroutine but never twice at once.
	Progress func(Progress)
}

// Check finds what is wrong whatever the files hold: an error of kind lora.ErrOption.
func (o *Options) Check() error {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", lora.ErrOption, fmt.Sprintf(format, args...))
	}
	switch {
	case o.Data == "":
		return wrong("there is no data, expected a file of token ids")
	case o.Against != "" && o.Adapter != "":
		return wrong("an adapter and another checkpoint to compare with are given, expected one of them")
	case o.Adapter == "" && (o.Save != "" || o.SaveGradients != ""):
		return wrong("there is no adapter whose weights or gradients could be saved")
	case o.Adapter != "" && o.Steps < 1:
		return wrong("%d steps, expected at least 1", o.Steps)
	case o.Adapter != "" && (!(o.Rate > 0) || math.IsInf(o.Rate, 0)):
		return wrong("the learning rate is %v, expected a number above 0", o.Rate)
	case o.Memory < 0 || o.Threads < 0:
		return wrong("memory is %d and threads %d, expected no negative numbers", o.Memory, o.Threads)
	case o.Threads > maxThreads:
		return wrong("%d threads, expected at most %d", o.Threads, maxThreads)
	}
	return nil
}

// maxThreads is more than a machine has processors: each thread has memory of its own.
const maxThreads = 1024

// Result is what Validate found.
type Result struct {
	// LossBefore and LossAfter are in nats a label: before the first step, and after the last.
	LossBefore float64  `json:"loss_before"`
	LossAfter  *float64 `json:"loss_after,omitempty"`
	// Losses are those before the update of each step.
	Losses              []float64 `json:"losses,omitempty"`
	GradNorm            *float64  `json:"grad_norm,omitempty"` // L2 over all trainable gradients of the first step
	TrainableParameters int64     `json:"trainable_parameters,omitzero"`
	TotalParameters     int64     `json:"total_parameters"` // with the trainable; 4-bit weights as if whole, ties once
	// FrozenUnchanged says that the weights of the base hash to the same before the first step and after the last.
	FrozenUnchanged *bool `json:"frozen_unchanged,omitempty"`
	Tokens          int   `json:"tokens"` // of the batch
	// TokensPerSecond is over all steps; without an adapter over the one forward pass, of both checkpoints if there are
	// two.
	TokensPerSecond float64      `json:"tokens_per_second"`
	PeakMemoryBytes int64        `json:"peak_memory_bytes"` // of the process
	Bytes           Bytes        `json:"bytes"`
	MultiplyAdds    MultiplyAdds `json:"multiply_adds"` // of one step, or of the forward pass
	Against         *Comparison  `json:"against,omitempty"`
	Notices         []string     `json:"notices,omitempty"`
}

// Validate takes training steps through the checkpoint at path, or computes its loss alone. Frozen weights that have
// changed meanwhile are no error: the result says it, and nothing is saved.
func Validate(ctx context.Context, path string, o Options) (*Result, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	r, err := validate(ctx, path, o)
	if err != nil && ctx.Err() != nil {
		return nil, checkpoint.ErrInterrupted
	}
	return r, err
}

func validate(ctx context.Context, path string, o Options) (*Result, error) {
	if o.Threads == 0 {
		o.Threads = runtime.GOMAXPROCS(0)
	}
	base, err := open(ctx, path, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	s, err := newStep(ctx, base, o)
	if err != nil {
		return nil, err
	}
	if o.Against != "" {
		return s.validateAgainst(ctx, o)
	}
	if o.Adapter == "" {
		return s.validateBase(o)
	}
	return s.validateAdapter(ctx, o)
}

// open opens the checkpoint at a path, as transformers names its tensors.
func open(ctx context.Context, path string, followLinks bool) (*checkpoint.Checkpoint, error) {
	dir, name, err := storage.Resolve(path, storage.Options{FollowLinks: followLinks})
	if err != nil {
		return nil, err
	}
	return checkpoint.OpenModel(ctx, dir, name, checkpoint.OpenOptions{})
}

// newStep opens what a step needs, without an adapter.
func newStep(ctx context.Context, base *checkpoint.Checkpoint, o Options) (*step, error) {
	if err := base.CheckReadable(); err != nil {
		return nil, err
	}
	if base.Config == nil {
		return nil, fmt.Errorf("%s: %w: it has no %s, which says what is to be computed", base.Path, ErrArchitecture,
			checkpoint.ConfigName)
	}
	sp, err := readSpec(base.Config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", base.Path, err)
	}
	n, err := bind(base, sp)
	if err != nil {
		return nil, err
	}
	batch, err := ReadBatch(o.Data, sp.vocab, sp.maxPositions)
	if err != nil {
		return nil, err
	}
	s := &step{crew: newCrew(ctx, o.Threads), network: n, batch: batch}
	for _, w := range base.Weights {
		s.bytes.Weights += w.StoredBytes()
	}
	return s, nil
}

// result begins one.
func (s *step) result() *Result {
	r := &Result{Tokens: len(s.batch.ids), Notices: s.base.Notices}
	for _, p := range s.spec.parameters() {
		n := int64(1)
		for _, d := range p.shape {
			n *= d
		}
		r.TotalParameters += n
	}
	if n := len(s.unused); n > 0 {
		r.Notices = append(slices.Clone(r.Notices), fmt.Sprintf("%d tensors of the base have no part in %s; the first is %s",
			n, s.architecture, tensor.Quote(s.unused[0])))
	}
	return r
}

// validateBase computes the loss alone.
func (s *step) validateBase(o Options) (*Result, error) {
	if err := s.build(s.batch.Length); err != nil {
		return nil, err
	}
	if err := reserve(o.Memory, false, s); err != nil {
		return nil, err
	}
	r := s.result()
	s.meter = newMeter(o.Progress, len(s.blocks))
	s.meter.begin("loss")
	began := time.Now()
	var err error
	if r.LossBefore, err = s.loss(); err != nil {
		return nil, err
	}
	r.TokensPerSecond = float64(len(s.batch.ids)) / time.Since(began).Seconds()
	s.conclude(r)
	return r, nil
}

// conclude adds what is known at the end.
func (s *step) conclude(r *Result) {
	r.Bytes = s.bytes
	r.PeakMemoryBytes = peakMemory()
	r.Bytes.MeasuredPeak = r.PeakMemoryBytes
	r.MultiplyAdds = s.multiplyAdds(s.batch.Rows, s.batch.Length, s.adapted())
	if s.adapter == nil {
		r.MultiplyAdds.Backward, r.MultiplyAdds.Recomputation = 0, 0
	}
}

// validateAdapter takes the steps.
func (s *step) validateAdapter(ctx context.Context, o Options) (*Result, error) {
	var err error
	if s.adapter, err = openAdapter(
		ctx, o.Adapter, storage.Options{FollowLinks: o.FollowLinks}, s.spec.parameters(), s.base.Model, s.base.Paths()...,
	); err != nil {
		return nil, err
	}
	defer s.adapter.Close()
	if err := s.loadAdapter(ctx, o.Memory); err != nil {
		return nil, err
	}
	if o.Save != "" && !o.Force { // before the steps
		if err := storage.Absent(o.Save); err != nil {
			return nil, err
		}
	}
	n := s.adapter.parameters()
	if err := s.build(s.batch.Length); err != nil {
		return nil, err
	}
	if err := reserve(o.Memory, true, s); err != nil {
		return nil, err
	}
	r := s.result()
	r.TrainableParameters = n
	r.TotalParameters += n
	r.Notices = append(r.Notices, s.adapter.notices...)

	if o.SaveGradients == "" {
		err = s.run(ctx, o, r, nil)
	} else { // the file appears once all has gone well
		err = storage.CreateWhole(o.SaveGradients, o.Force, func(w io.Writer) error { return s.run(ctx, o, r, w) })
	}
	if err != nil && !errors.Is(err, errChanged) {
		return nil, err
	}
	s.conclude(r)
	return r, nil
}

// errChanged says that frozen weights are not what they were, so that nothing is saved. The result has it.
var errChanged = errors.New("frozen weights have changed")

// run takes the steps, and writes what is to be saved.
func (s *step) run(ctx context.Context, o Options, r *Result, gradients io.Writer) error {
	s.meter = newMeter(o.Progress, len(s.blocks)*(1+o.Steps*(1+backwardPasses)+1+1))
	s.meter.begin("hash")
	before, err := s.hashFrozen()
	if err != nil {
		return err
	}
	began := time.Now()
	for i := range o.Steps {
		s.meter.begin(fmt.Sprintf("step %d", i+1))
		loss, err := s.take(i+1, o.Rate, func() error {
			if i > 0 {
				return nil
			}
			norm := s.gradientNorm()
			r.GradNorm = &norm
			if gradients == nil {
				return nil
			}
			return s.adapter.writeGradients(ctx, gradients)
		})
		if err != nil {
			return err
		}
		r.Losses = append(r.Losses, loss)
	}
	r.TokensPerSecond = float64(len(s.batch.ids)*o.Steps) / time.Since(began).Seconds()
	r.LossBefore = r.Losses[0]
	s.meter.begin("loss")
	after, err := s.loss()
	if err != nil {
		return err
	}
	r.LossAfter = &after
	s.meter.begin("hash")
	now, err := s.hashFrozen()
	if err != nil {
		return err
	}
	unchanged := now == before
	r.FrozenUnchanged = &unchanged
	if !unchanged {
		return errChanged
	}
	if o.Save == "" {
		return nil
	}
	return s.adapter.save(ctx, o.Save, o.Force)
}

// loadAdapter reads the adapter's tensors, if they fit into memory.
func (s *step) loadAdapter(ctx context.Context, memory int64) error {
	by := s.adapter.bytes()
	s.bytes.Weights += by[weightBytes]
	s.bytes.Gradients, s.bytes.Moments = by[gradientBytes], by[momentBytes]
	s.held = by[weightBytes] + by[gradientBytes] + by[momentBytes]
	if least := runtimeBytes + s.held; memory > 0 && least > memory-memory/8 {
		least += least/7 + slack
		err := fmt.Errorf("%s: %w: the adapter with gradients and moments takes %s; %s allowed, more than %s needed",
			s.adapter.of.Path, ErrMemory, humanize.IBytes(uint64(s.held)), humanize.IBytes(uint64(memory)),
			humanize.IBytes(uint64(least)))
		return hint.With(err, hint.Hint{Option: "Memory", Effect: "allows more"})
	}
	return s.adapter.load(ctx, func(_ string, n int) []float32 { return make([]float32, n) })
}
