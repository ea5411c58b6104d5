package train

import (
	"fmt"
	"iter"
	"runtime"

	"github.com/dustin/go-humanize"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
)

// ErrMemory says that a step needs more memory than it may have.
var ErrMemory = checkpoint.ErrMemory

// Bytes are what a step takes, by what it is for.
type Bytes struct {
	// Weights are those of the base as they are stored, of which only tiles are ever in memory, and the adapter's.
	Weights     int64 `json:"weights"`
	Gradients   int64 `json:"gradients"`
	Moments     int64 `json:"moments"`
	Activations int64 `json:"activations"` // the inputs of all blocks, and all that one block computes
	Logits      int64 `json:"logits"`      // of a chunk of tokens
	// Tiles are decoded rows of weights, packed copies of activations and what a thread computes with.
	Tiles        int64 `json:"tiles"`
	MeasuredPeak int64 `json:"measured_peak"` // of the whole process, by the system's count
}

const (
	// runtimeBytes is what a Go process of this kind takes before it does any work.
	runtimeBytes = 24 << 20
	// mostChunk is how many tokens' logits are computed at once: so many that the head's weights are used often enough
	// to repay that they are decoded. leastChunk is what it may come down to where there is less memory.
	mostChunk  = 64
	leastChunk = 16
	// slack is by how much the heap of one run may differ from that of the next.
	slack = 4 << 20
)

// sizes are what a step has to have memory for, in floats.
type sizes struct {
	states, slab     int
	largest          string // the part that takes most of the slab, and how much
	largestFloats    int
	wide, low, gu    int
	tile, each       int // of a thread
	scores, matrices int // so many matrices of scores
	shared, panels   int
	token            int // the logits of one token
}

// projections are all linear layers but those of experts, the head among them.
func (n *network) projections() iter.Seq[*projection] {
	return func(yield func(*projection) bool) {
		for _, b := range n.blocks {
			list := []*projection{b.attending.q, b.attending.k, b.attending.v, b.attending.fused, b.attending.out}
			if f := b.feeding; f != nil {
				list = append(list, f.gate, f.up, f.gateUp, f.down)
			}
			if b.routing != nil {
				list = append(list, b.routing.router)
			}
			for _, p := range list {
				if p != nil && !yield(p) {
					return
				}
			}
		}
		yield(n.head.projection)
	}
}

// measure finds the sizes of a step, with a backward pass or without one.
func (s *step) measure(backward bool) sizes {
	tokens := s.batch.tokens()
	z := sizes{token: s.network.head.out}
	dry := &slab{}
	take := func(name string) {
		if dry.most > z.largestFloats {
			z.largest, z.largestFloats = name, dry.most
		}
		dry.reset()
	}
	z.states = 2 + 1 // and the last of them, normalised
	if backward {
		z.states = len(s.blocks) + 1 + 1 + 1 // and the gradient
	}
	z.states *= s.hidden * tokens
	z.states += 2 * tokens // of the last norm
	for i, b := range s.blocks {
		dry.run(b, s.hidden, tokens, s.batch.Length, backward)
		take(s.layers[i].name)
	}
	if backward {
		dry.lookupRoom(s.network.embedding, tokens)
		dry.lookupRoom(s.network.positions, tokens)
		take(s.network.embedding.module)
	}
	dry.mat(2*s.hidden, tokens)
	dry.apply(s.network.head.projection, tokens)
	take(s.network.head.module)
	z.slab = dry.most
	add := func(p *projection) {
		widest := p.in
		if p.turned {
			widest = max(p.in, p.out)
		}
		z.wide = max(z.wide, kernels.PanelsLen(widest, tokens))
		if p.low != nil {
			z.low, z.gu = max(z.low, kernels.PanelsLen(p.low.rank, tokens)), max(z.gu, p.low.rank*tokens)
		}
		rows, cols := p.out, p.in
		if p.turned {
			rows, cols = cols, rows
		}
		z.tile = max(z.tile, tileRows(tileFloats, rows, cols)*(cols+tilePad))
		at := tileRows(sharedFloats, rows, cols)
		z.shared, z.panels = max(z.shared, at*(cols+tilePad)), max(z.panels, kernels.PanelsLen(at, tokens))
	}
	for p := range s.projections() {
		add(p)
	}
	for _, b := range s.blocks {
		if b.routing == nil {
			continue
		}
		for i := range b.routing.count {
			f := b.routing.expert(i)
			add(f.gateUp)
			add(f.down)
		}
	}
	// A thread has the tile, what it was decoded from, and the scores of some queries, their gradients and the slopes of
	// their cap.
	z.scores = max(s.batch.Length*min(s.batch.Length, queryBlock), tokens)
	z.matrices = 2
	for i := range s.layers {
		if s.layers[i].attention.softCap != 0 {
			z.matrices = 3
		}
	}
	z.each = 2*z.tile + z.matrices*z.scores
	if s.base != nil {
		band := int64(0) // or a band, of which the tile is a part
		for _, w := range s.base.Weights {
			band = max(band, w.BandBytes())
		}
		z.each += int(band / 4)
	}
	return z
}

// activations are the bytes of what is kept of all blocks, and of all that one block computes.
func (z sizes) activations() int64 { return 4 * int64(z.states+z.slab) }

// activationBytes is what a step of one row of so many tokens keeps, beside the weights and what is trained: the inputs
// of all blocks with what one block computes, and a chunk of logits. It is what validate reserves where --memory does
// not bound the chunk further.
func (s *spec) activationBytes(tokens int, adapters []Adapted) (activations, logits int64, err error) {
	n := &network{spec: s, adapter: &adapter{params: map[string]*adaptation{}}}
	for _, a := range adapters {
		low := &lowRank{rank: a.Rank, a: factor{rows: a.Rank, cols: a.In}, b: factor{rows: a.Out, cols: a.Rank}}
		switch {
		case a.Rank == 0: // trained itself: it takes no room beside its own
		case a.Experts == 0:
			n.adapter.params[a.Name+".weight"] = &adaptation{plain: low}
		default:
			each := make([]*lowRank, a.Experts)
			for i := range each {
				each[i] = low
			}
			n.adapter.params[a.Name] = &adaptation{experts: each}
		}
	}
	if err := n.build(tokens); err != nil {
		return 0, 0, err
	}
	step := &step{crew: &crew{}, network: n, batch: &Batch{Rows: 1, Length: tokens}}
	z := step.measure(true)
	return z.activations(), 4 * int64(min(tokens, mostChunk)*z.token), nil
}

// floats are all of them but the logits.
func (z sizes) floats(threads int) int {
	return z.states + z.slab + z.wide + z.low + z.gu + 2*(z.shared+z.panels) + threads*z.each
}

// reserve takes the memory of steps on one batch, no more than memory for the whole process; 0 is no bound. An adapter
// has taken its own already.
func reserve(memory int64, backward bool, steps ...*step) error {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	needed := runtimeBytes + int64(m.HeapAlloc)
	token, list := int64(0), make([]sizes, len(steps))
	for i, s := range steps {
		list[i] = s.measure(backward)
		needed += 4 * int64(list[i].floats(len(s.workers)))
		token += 4 * int64(list[i].token)
	}
	tokens := steps[0].batch.tokens()
	chunk := min(tokens, mostChunk)
	if memory > 0 {
		// A part is left to what is not counted: what the collector has not collected.
		free := memory - memory/8 - needed
		if least := token * int64(min(leastChunk, tokens)); free < least {
			needed += least
			return steps[0].tooLittle(list[0], memory, needed+needed/7+slack)
		}
		chunk = int(min(int64(chunk), free/token))
	}
	for i, s := range steps {
		s.allocate(list[i], chunk, backward)
	}
	return nil
}

// allocate takes the memory of a step.
func (s *step) allocate(z sizes, chunk int, backward bool) {
	tokens, states := s.batch.tokens(), 2
	if backward {
		states = len(s.blocks) + 1
		s.g = kernels.NewMat(s.hidden, tokens)
	}
	for range states {
		s.states = append(s.states, kernels.NewMat(s.hidden, tokens))
	}
	s.normed = kernels.NewMat(s.hidden, tokens)
	s.slab = slab{data: make([]float32, z.slab)}
	s.room = room{
		chunk: chunk, logits: make([]float32, z.token*chunk),
		wide: make([]float32, z.wide), low: make([]float32, z.low), gu: make([]float32, z.gu),
		normFactor: make([]float32, tokens), normMean: make([]float32, tokens),
	}
	for i := range s.room.shared.tiles {
		s.room.shared.tiles[i], s.room.shared.panels[i] = make([]float32, z.shared), make([]float32, z.panels)
	}
	for _, w := range s.workers {
		w.tile = make([]float32, z.tile)
		for i := range z.matrices {
			w.scores[i] = make([]float32, z.scores)
		}
	}
	s.bytes.Activations = z.activations()
	s.bytes.Logits = 4 * int64(len(s.room.logits))
	s.bytes.Tiles = 4*int64(z.floats(len(s.workers))) - s.bytes.Activations
}

// tooLittle names what does not fit: the block that takes most, or the head.
func (s *step) tooLittle(z sizes, memory, least int64) error {
	layer, takes := z.largest, 4*int64(z.largestFloats)
	if head := 4 * int64(z.token*min(leastChunk, s.batch.tokens())); head > takes {
		layer, takes = s.network.head.module, head
	}
	size := func(n int64) string { return humanize.IBytes(uint64(n)) }
	err := fmt.Errorf("%s: %w: layer %s does not fit: it takes %s, beside %s for the inputs of all layers and %s for "+
		"the adapter with gradients and moments; %s allowed, %s needed", s.base.Path, ErrMemory, layer, size(takes),
		size(4*int64(z.states)), size(s.held), size(memory), size(least))
	return hint.With(err, hint.Hint{
		Option: "Memory", Value: fmt.Sprintf("%dMiB", (least+1<<20-1)>>20), Effect: "will do",
	})
}
