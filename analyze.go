package lorakit

import (
	"cmp"
	"context"
	"fmt"

	"github.com/lorakit/lorakit/adapt"
)

// AnalyzeOptions say how Analyze looks.
type AnalyzeOptions struct {
	// Rank is how many leading singular values are found of a matrix whose sides are both above 1024; of any other, and
	// of an adapter, all are. 0 is 64.
	Rank int
	// Threads is how many modules are decomposed at once; 0 is one a processor.
	Threads int
	// Alpha, ExpertLayout and Component are for an adapter that leaves them open, as in Adapter.
	Alpha        float64
	ExpertLayout string
	Component    string
	// HTML is a file that the analysis is also written to, as a page; Force replaces it.
	HTML        string
	Force       bool
	FollowLinks bool // see ReadOptions
}

type (
	// Analysis is what Analyze finds.
	Analysis = adapt.Analysis
	// AnalyzedModule is a linear layer, or a module of an adapter.
	AnalyzedModule = adapt.AnalyzedModule
	// AnalyzedKind is the mean over the modules of a kind.
	AnalyzedKind = adapt.AnalyzedKind
	// ChangedTensor is a tensor that differs and has no spectrum.
	ChangedTensor = adapt.ChangedTensor
	// ChangeFigures are, of a change, the norm of the base's weight, and that of the change over it.
	ChangeFigures = adapt.ChangeFigures
	// SpectrumFigures say how much of a matrix how few directions hold.
	SpectrumFigures = adapt.SpectrumFigures
	// RankShare says that so many singular values hold that share of the squared norm.
	RankShare = adapt.RankShare
	// QuantizationError is what quantising makes of a weight.
	QuantizationError = adapt.QuantizationError
)

// Analyze looks at the singular values of an adapter's deltas, of a checkpoint's linear layers, or where tuned is not
// empty of the change from one checkpoint to the other. Of a checkpoint it also says what error NF4 would make.
func Analyze(ctx context.Context, path, tuned string, o AnalyzeOptions) (*Analysis, error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := (adapt.AnalyzeOptions{Rank: o.Rank}).Check(); err != nil {
		return nil, err
	}
	if o.HTML != "" {
		for _, src := range []string{path, cmp.Or(tuned, path)} {
			if err := checkFile(src, o.HTML, o.Force); err != nil {
				return nil, err
			}
		}
	}
	r, err := analyze(ctx, path, tuned, o)
	if err != nil || o.HTML == "" {
		return r, err
	}
	return r, writePage(r.Page(), o.HTML, o.Force)
}

// analyze finds out what the paths are, and looks at it.
func analyze(ctx context.Context, path, tuned string, o AnalyzeOptions) (*Analysis, error) {
	ao := adapt.AnalyzeOptions{Rank: o.Rank, Threads: o.Threads}
	if tuned == "" && IsAdapter(path) {
		list, err := openWithoutBase(ctx, []Adapter{{Path: path, Alpha: o.Alpha, ExpertLayout: o.ExpertLayout,
			Component: o.Component}},
			o.FollowLinks)
		if err != nil {
			return nil, err
		}
		defer list.Close()
		return adapt.AnalyzeAdapter(ctx, list[0].Adapter, ao)
	}
	if tuned != "" {
		for _, p := range []string{path, tuned} {
			if IsAdapter(p) {
				return nil, fmt.Errorf("%s: %w: it is an adapter, expected a checkpoint; the change from one "+
					"checkpoint to another is analysed, or an adapter alone", p, ErrRefused)
			}
		}
	}
	base, err := openModel(ctx, path, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	if tuned == "" {
		return adapt.AnalyzeWeights(ctx, base, ao)
	}
	other, err := openModel(ctx, tuned, o.FollowLinks)
	if err != nil {
		return nil, err
	}
	defer other.Close()
	return adapt.AnalyzeChange(ctx, base, other, ao)
}
