package train

import (
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// spec is a model as its config.json describes it: what is computed, with which parameters, in which order. It has no
// weights. Modules and parameters go by their run-time names.
type spec struct {
	architecture string
	vocab        int
	hidden       int
	embedding    string  // the module of the token embedding
	embedScale   float32 // its rows are multiplied by this
	positions    string  // the module of learned positions, or ""
	maxPositions int     // of learned positions
	padToken     int     // a row of the embedding that gets no gradient from the look-up, or -1
	layers       []layer
	finalNorm    norm
	head         linear  // the output head; where tied its weight is the embedding's
	tied         bool    // as the config says; a file with a head of its own has that
	logitScale   float32 // the logits are multiplied by this
	logitCap     float32 // soft cap of the logits, or 0
}

// layer is one block: attention and an MLP, or experts in its place.
type layer struct {
	name string // the module: "model.layers.0"
	// The norms before and after each branch; nil where there is none. Where parallel is set both branches read what
	// beforeAttention gives, or the MLP what beforeMLP gives of the block's own input, where there is one.
	beforeAttention, afterAttention, beforeMLP, afterMLP *norm
	parallel                                             bool
	residual                                             float32 // each branch is multiplied by this
	attention                                            attention
	mlp                                                  *mlp     // nil where there are experts
	experts                                              *experts // nil where there are none
}

// normKind is a kind of normalisation.
type normKind uint8

const (
	rmsNorm        normKind = iota // w * x / sqrt(mean(x²) + eps)
	rmsNormPlusOne                 // (1 + w) * x / sqrt(mean(x²) + eps)
	layerNorm                      // w * (x - mean) / sqrt(var + eps) + b
)

// norm normalises groups of width features of a token.
type norm struct {
	module string
	kind   normKind
	eps    float64
	width  int
	bias   bool
	// perHead says that each head has a weight of its own, the module's "norms.N" (StableLM).
	perHead bool
}

// linear is y = W·x + b.
type linear struct {
	module  string
	in, out int
	bias    bool
	conv    bool // the weight is (in, out), transformers' Conv1D
}

// attention of a block. q, k and v are the outputs of three linears, or of one whose rows are those of q, k, v.
type attention struct {
	heads, keyHeads, headDim int
	q, k, v                  *linear // nil where fused is set
	fused                    *linear
	out                      linear
	// The norms of q and k, before the rotation: of width headDim for each head by itself, or of all heads together.
	qNorm, kNorm *norm
	rotary       *rotary // nil where nothing is rotated
	scale        float32
	softCap      float32 // or 0
	window       int     // a query sees so many keys, itself counted; 0 is all
}

// activation is the function of an MLP.
type activation uint8

const (
	silu     activation = iota
	geluTanh            // 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))
	geluErf             // 0.5 x (1 + erf(x/√2))
	relu
)

// mlp is down(act(gate) * up), or down(act(up)) where it is plain.
type mlp struct {
	act      activation
	gate, up *linear // gate is nil where the MLP is plain or gateUp is set
	gateUp   *linear // both in one, the rows of gate first
	down     linear
}

// experts are stacks of gated MLPs, of which each token takes the few that the router gives most to.
type experts struct {
	act           activation
	count, topK   int
	normalise     bool   // the probabilities of those taken are divided by their sum
	router        linear // without bias
	gateUp, down  string // the parameters: (count, 2*width, hidden), the rows of gate first, and (count, hidden, width)
	hidden, width int
}

// rotary turns the first dim features of each head.
type rotary struct {
	dim         int
	interleaved bool // neighbours are pairs, else the halves
	// frequencies returns, for a row of that many positions, the dim/2 angles a position and the factor of cos and sin.
	// The angles are float32 numbers, not to be changed; torch multiplies them by the position in float32.
	frequencies func(positions int) (angles []float64, factor float64)
}

// param is a parameter of the running model.
type param struct {
	name  string
	shape tensor.Shape
	kind  models.Kind
}
