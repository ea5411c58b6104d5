package adapt

import "github.com/lorakit/lorakit/tensor"

// Analysis is what is found of an adapter, of a change or of weights.
type Analysis struct {
	Path  string `json:"path"`
	Tuned string `json:"tuned,omitempty"`
	// Of is what the modules' spectra are of: "adapter" (its deltas), "change" (tuned less base) or "weights".
	Of string `json:"of"`
	// Norm is the Frobenius norm over all modules that have a spectrum.
	Norm    float64          `json:"norm"`
	Modules []AnalyzedModule `json:"modules"`
	Kinds   []AnalyzedKind   `json:"kinds"`
	// Others are, of a change, the tensors that are no matrix of a layer, an expert or an embedding and differ.
	Others []ChangedTensor `json:"others,omitempty"`
	// LeftOut are, of weights, the matrices of layers that the file holds in other pieces than the model, which are not
	// decomposed.
	LeftOut []string `json:"left,omitempty"`
	// Notices are what was assumed of an adapter.
	Notices []string `json:"notices,omitempty"`
}

// AnalyzedModule is a linear layer, or a module of an adapter.
type AnalyzedModule struct {
	Name string `json:"name"`
	// Kind is the end of the name that modules of other layers share: "q_proj". Layer is the first number in
	// the name, -1 where there is none.
	Kind  string `json:"kind"`
	Layer int    `json:"layer"`
	Form  string `json:"form"` // linear, conv1d; of an adapter also embedding, conv, bias, replace, rows
	// Shape is (out, in) of a linear layer, (rows, width) of an embedding.
	Shape tensor.Shape `json:"shape,omitempty"`
	// Of an adapter. Stacks of experts are taken apart; Experts is set for one that cannot be, and NeedsBase
	// where only the base tells how many experts there are.
	Experts   int64   `json:"experts,omitzero"`
	Rank      int     `json:"rank,omitzero"`
	Alpha     float64 `json:"alpha,omitzero"`
	Scaling   float64 `json:"scaling,omitzero"`
	DoRA      bool    `json:"dora,omitzero"`
	NeedsBase bool    `json:"needs_base,omitzero"`
	*ChangeFigures
	// Norm is the Frobenius norm; nil where it NeedsBase, and for integers.
	Norm *float64 `json:"norm,omitempty"`
	// The spectrum, but of biases and new values.
	*SpectrumFigures
	// NF4 is, of weights that are not quantised yet and no F64, the error that NF4 with double quantisation would make.
	NF4 *QuantizationError `json:"nf4,omitempty"`

	place []int // in the model, see models.Order
}

// ChangeFigures are, of a change, the norm of the base's weight, and that of the change over it.
type ChangeFigures struct {
	WeightNorm   float64 `json:"weight_norm"`
	RelativeNorm float64 `json:"relative_norm"`
}

// SpectrumFigures say how much of a matrix how few directions hold.
type SpectrumFigures struct {
	// EffectiveRank is the exponential of the entropy of s/sum(s) over the singular values s: n for n equal ones. Where
	// not Complete, it is that of the leading ones, and at most that of all.
	EffectiveRank float64 `json:"effective_rank"`
	// StableRank is the squared norm over the square of the largest singular value.
	StableRank float64 `json:"stable_rank"`
	// Complete is whether Values are all that are not zero.
	Complete bool `json:"complete"`
	// Needed has the smallest ranks that hold 50, 90, 95 and 99 % of the squared norm; a share that Values do not reach
	// is not listed.
	Needed []RankShare `json:"needed"`
	// Kept has the share that the leading 1, 2, 4, … values hold.
	Kept   []RankShare `json:"kept"`
	Values []float64   `json:"singular_values"`

	energy float64
}

// RankShare says that so many singular values hold that share of the squared norm.
type RankShare struct {
	Rank  int     `json:"rank"`
	Share float64 `json:"share"`
}

// QuantizationError is what quantising makes of a weight, and how much of that an adapter could take back (attach with
// the init compensate).
type QuantizationError struct {
	RelativeError float64 `json:"relative_error"`
	SpectrumFigures
}

// AnalyzedKind is the mean over the modules of a kind that have a spectrum; Kept over those that are not zero.
type AnalyzedKind struct {
	Kind    string  `json:"kind"`
	Modules int     `json:"modules"`
	Norm    float64 `json:"norm"`
	*ChangeFigures
	EffectiveRank float64     `json:"effective_rank"`
	Complete      bool        `json:"complete"`
	Kept          []RankShare `json:"kept"`
	NF4Error      float64     `json:"nf4_error,omitzero"`
	NF4Kept       []RankShare `json:"nf4_kept,omitempty"`
}

// ChangedTensor is a tensor that differs; RelativeNorm is the norm of the change over that of the base's values, and
// Added is set where the base has none.
type ChangedTensor struct {
	Name         string       `json:"name"`
	Shape        tensor.Shape `json:"shape"`
	RelativeNorm float64      `json:"relative_norm"` // 0 where Added
	Added        bool         `json:"added,omitzero"`
}
