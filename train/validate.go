package train

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is; those of checkpoint and lora may be met too.
var (
	// ErrData says that a batch is malformed or does not fit the model.
	ErrData = errors.New("wrong data")
	// ErrOption says that an option has a value that is wrong whatever the files hold.
	ErrOption = errors.New("wrong option")
)

// Options say what Validate does.
type Options struct {
	Data    string // lines of {"input_ids": [...], "labels": [...]}, one batch
	Adapter string // a PEFT folder; without one the loss is computed and nothing is trained
	// Against is another checkpoint that the batch goes through, or empty.
	Against string
	Steps   int     // at least 1, with an adapter
	Rate    float64 // the learning rate
	// Save is a folder for the adapter after the last step, and SaveGradients a file for the gradients of the first.
	Save, SaveGradients string
	Force               bool  // replace what is there
	FollowLinks         bool  // as storage.Options has it
	Memory              int64 // bounds the peak of the process; 0 is no bound
	Threads             int   // 0 is one a processor
	Progress            func(Progress)
}

// Progress says how far a run has come.
type Progress struct {
	Stage       string // "hash", "step 1", "loss"
	Done, Total int    // layers, or matrices that are hashed
}

// Result is what Validate found.
type Result struct {
	LossBefore float64  `json:"loss_before"`
	LossAfter  *float64 `json:"loss_after,omitempty"`
	// Losses are those before the update of each step.
	Losses              []float64    `json:"losses,omitempty"`
	GradNorm            *float64     `json:"grad_norm,omitempty"` // L2 over all trainable gradients of the first step
	TrainableParameters int64        `json:"trainable_parameters"`
	TotalParameters     int64        `json:"total_parameters"`
	FrozenUnchanged     *bool        `json:"frozen_unchanged,omitempty"`
	TokensPerSecond     float64      `json:"tokens_per_second"`
	PeakMemoryBytes     int64        `json:"peak_memory_bytes"`
	Bytes               Bytes        `json:"bytes"`
	MultiplyAdds        MultiplyAdds `json:"multiply_adds"`
	Against             *Comparison  `json:"against,omitempty"`
	Notices             []string     `json:"notices,omitempty"`
}

// Validate takes training steps through the checkpoint at path, or computes its loss alone.
func Validate(ctx context.Context, path string, o Options) (*Result, error) {
	if o.Threads <= 0 {
		o.Threads = runtime.GOMAXPROCS(0)
	}
	base, err := checkpoint.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	s, err := newStep(ctx, base, o.Data, o.Threads)
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

// newStep opens what a step needs, without an adapter.
func newStep(ctx context.Context, base *checkpoint.Checkpoint, data string, threads int) (*step, error) {
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
	batch, err := ReadBatch(data, sp.vocab, sp.maxPositions)
	if err != nil {
		return nil, err
	}
	s := &step{crew: newCrew(ctx, threads), network: n, batch: batch}
	for _, w := range base.Weights {
		s.bytes.Weights += w.StoredBytes()
	}
	return s, nil
}

// result begins one.
func (s *step) result() *Result {
	r := &Result{Notices: s.base.Notices}
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
	if o.Steps < 1 {
		return nil, fmt.Errorf("%w: %d steps, expected at least 1", ErrOption, o.Steps)
	}
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
	if err != nil {
		return nil, err
	}
	s.conclude(r)
	return r, nil
}

// run takes the steps, and writes what is to be saved.
func (s *step) run(ctx context.Context, o Options, r *Result, gradients io.Writer) error {
	before, err := s.hashFrozen()
	if err != nil {
		return err
	}
	began := time.Now()
	for i := range o.Steps {
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
	after, err := s.loss()
	if err != nil {
		return err
	}
	r.LossAfter = &after
	now, err := s.hashFrozen()
	if err != nil {
		return err
	}
	unchanged := now == before
	r.FrozenUnchanged = &unchanged
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
		least += least/7 + 1<<20
		err := fmt.Errorf("%s: %w: the adapter with gradients and moments takes %s; %s allowed, more than %s needed",
			s.adapter.of.Path, ErrMemory, humanize.IBytes(uint64(s.held)), humanize.IBytes(uint64(memory)),
			humanize.IBytes(uint64(least)))
		return hint.With(err, hint.Hint{Option: "Memory", Effect: "allows more"})
	}
	return s.adapter.load(ctx, func(_ string, n int) []float32 { return make([]float32, n) })
}
