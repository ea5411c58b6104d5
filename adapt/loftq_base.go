package adapt

import (
	"context"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/pipeline"
	"github.com/lorakit/lorakit/storage"
)

// What loftq writes besides the adapter, in the adapter's folder: loftqBase is the base that the adapter is for, and
// loftqSubtracted an adapter that is taken out of that base before it is quantised, and is removed then.
const (
	loftqBase       = "base"
	loftqSubtracted = "previous"
)

func (a *attaching) loftq() bool { return a.start.name == "loftq" }

// beginSubtracted begins the adapter that is taken out of the base.
func (a *attaching) beginSubtracted() (err error) {
	if a.loftq() {
		a.subtracted, err = pipeline.NewAdapterWriter(a.base.Path, a.beside(loftqSubtracted), false)
	}
	return err
}

// abort removes what is left of loftq's own files.
func (a *attaching) abort() {
	if a.subtracted != nil {
		a.subtracted.Abort()
	}
}

// writeBase writes the base that a loftq adapter is for: each weight less the adapter of the step before the best, in
// four bits.
func (a *attaching) writeBase(ctx context.Context) error {
	subtracted := a.beside(loftqSubtracted)
	var adapters []lora.Source
	if len(a.subtractedModules) > 0 {
		settings := lora.Settings{Base: a.base.Path, FanInFanOut: a.conv1D()}
		e, err := lora.New(subtracted, settings, a.subtractedModules).Encode(lora.EncodeOptions{To: lora.PEFT})
		if err != nil {
			return err
		}
		if err := a.subtracted.Write(ctx, e); err != nil {
			return err
		}
		adapters = []lora.Source{{Path: subtracted, Weight: -1}}
	}
	if err := a.quantise(ctx, adapters); err != nil {
		return err
	}
	a.result.Base = filepath.Join(a.result.Destination, loftqBase)
	a.abort()
	return os.RemoveAll(subtracted)
}

// quantise writes the base with adapters merged, in four bits.
func (a *attaching) quantise(ctx context.Context, adapters []lora.Source) error {
	o := pipeline.Options{
		Quantize: loftqNF4.Type, Params: loftqNF4.Params, MaxShardSize: pipeline.DefaultShardSize,
	}
	list, err := lora.OpenAll(ctx, adapters, storage.Options{})
	if err != nil {
		return err
	}
	defer list.Close()
	m := pipeline.Plain(a.base)
	if len(list) > 0 {
		if m, err = pipeline.Merge(ctx, a.base, list); err != nil {
			return err
		}
	}
	dst := a.beside(loftqBase)
	if err := pipeline.CheckMemory(m, o, pipeline.DefaultMemory); err != nil {
		return err
	}
	p, err := pipeline.NewPlan(ctx, m, dst, o)
	if err != nil {
		return err
	}
	r, err := pipeline.Run(ctx, p, m, dst, pipeline.RunOptions{Threads: a.Threads, MinKept: -1})
	a.result.Notices = append(append(a.result.Notices, p.Notices...), r.Notices()...)
	return err
}
