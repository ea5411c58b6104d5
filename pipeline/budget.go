package pipeline

import (
	"fmt"
	"runtime"

	"github.com/dustin/go-humanize"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// ErrMemory says that the memory allowed is less than a run needs.
var ErrMemory = checkpoint.ErrMemory

const (
	// largestTile and smallestTile bound the bytes of values a tile has: large enough that a system call and a hand-over
	// do not count, small enough to stay in a cache.
	largestTile  = 512 << 10
	smallestTile = 64 << 10
	// transposedTiles is how many times larger a tile is that is turned round: a row of it is read at a time.
	transposedTiles = 8
	// runtimeBytes is what a Go process of this kind takes before it does any work: the binary, stacks, the runtime's own
	// tables.
	runtimeBytes = 18 << 20
)

// budget says how a run uses the memory that it may.
type budget struct {
	workers  int   // how many tiles are under way at once
	tile     int64 // bytes of values a tile has
	deferred int64 // bytes for what outlives a tile
	factors  int64 // bytes of adapters that are kept for the next weights
}

const (
	// plainPlanBytes and quantisedPlanBytes are what a weight takes while a plan is made and carried out, by measurement
	// on 100,000 of them: names, shapes, offsets, and the header that lists it, which has six tensors for a doubly
	// quantised one.
	plainPlanBytes     = 2_000
	quantisedPlanBytes = 3_900
)

// CheckMemory refuses, before a plan is made, what could not be planned within memory: a checkpoint of very many
// tensors.
func CheckMemory(m *Merged, o Options, memory int64) error {
	if memory <= 0 {
		memory = DefaultMemory
	}
	least := int64(runtimeBytes)
	b := planner{Checkpoint: m.Base, Options: o, from: m}
	if b.takeTypes() != nil || b.rule() != nil {
		return nil // which NewPlan refuses
	}
	for _, w := range m.Weights {
		least += plainPlanBytes
		if n := max(len(b.ruled[w]), 1); b.typeOf(w) != "" || n > 1 { // each type of a choice is planned
			least += int64(n)*quantisedPlanBytes - plainPlanBytes
		}
	}
	if least > memory {
		return tooLittle(memory, least)
	}
	return nil
}

func tooLittle(memory, least int64) error {
	err := fmt.Errorf("%w: %s allowed, at least %s needed for this checkpoint",
		ErrMemory, humanize.IBytes(uint64(memory)), humanize.IBytes(uint64(least)))
	return hint.With(err, hint.Hint{
		Option: "Memory", Value: fmt.Sprintf("%dMiB", (least+1<<20-1)>>20), Effect: "will do",
	})
}

// needs is what a run takes.
type needs struct {
	tiles   map[int64]scratchSize // of the largest tiles, for each size of tile
	factors int64                 // of the adapters' factors for one weight, while it is merged
	users   []user
}

// hosting is what formats and schemes need beside the tiles of so many workers.
func (n *needs) hosting(workers int) int64 {
	var bytes int64
	for _, u := range n.users {
		bytes += u.memory(workers)
	}
	return bytes
}

func newNeeds() *needs {
	n := &needs{tiles: map[int64]scratchSize{}}
	for tile := int64(largestTile); tile >= smallestTile; tile /= 2 {
		n.tiles[tile] = scratchSize{}
	}
	return n
}

func (n *needs) add(j *jobRun) {
	if j.Copy {
		return
	}
	factors, seen := int64(0), map[*formats.Tensor]bool{}
	if j.weight.Change != nil {
		factors = j.weight.factorBytes(seen)
	}
	for _, p := range j.weight.pieces { // experts of a stack share the factors of it
		if p.of.Change != nil {
			factors += p.of.factorBytes(seen)
		}
	}
	n.factors = max(n.factors, factors)
	for tile, most := range n.tiles {
		n.tiles[tile] = most.max(j.scratchSize(j.tileElements(tile)))
	}
}

// newBudget divides the memory. One thread computes one tile at a time; there are twice as many workers, so that some
// read and write meanwhile.
func newBudget(n *needs, memory int64, threads int) (budget, error) {
	var m runtime.MemStats
	if runtime.ReadMemStats(&m); m.HeapAlloc > 16<<20 {
		runtime.GC() // what is left of making a large plan
		runtime.ReadMemStats(&m)
	}
	// What the plan itself takes, and some more for the garbage collector.
	fixed := runtimeBytes + int64(m.HeapAlloc)*5/4
	free := memory - fixed

	b := budget{workers: 2 * threads, tile: largestTile}
	if n.factors > 0 {
		b.factors = min(mostFactors, memory/8)
		free -= b.factors
	}
	all := free
	for {
		hosting := n.hosting(b.workers)
		free = all - hosting
		// One weight more than there are workers may have its factors in memory.
		need := n.tiles[b.tile].total()*int64(b.workers) + n.factors*int64(b.workers+1)
		if need <= free/2 {
			b.deferred = free - need - free/4
			return b, nil
		}
		switch {
		case b.tile > smallestTile:
			b.tile /= 2
		case b.workers > 1:
			b.workers--
		case need <= free*3/4:
			b.deferred = free / 8
			return b, nil
		default:
			least := fixed + hosting + b.factors + need*4/3 + 1<<20
			return b, tooLittle(memory, least)
		}
	}
}

// scratchSize is the bytes of each slice of a scratch.
type scratchSize struct {
	reader                               checkpoint.ReaderMemory
	cast, gathered, out, deferred, merge int64
}

func (a scratchSize) max(b scratchSize) scratchSize {
	return scratchSize{
		a.reader.Max(b.reader), max(a.cast, b.cast), max(a.gathered, b.gathered), max(a.out, b.out),
		max(a.deferred, b.deferred), max(a.merge, b.merge),
	}
}

func (a scratchSize) total() int64 {
	return a.reader.Total() + a.cast + a.gathered + a.out + a.deferred + a.merge
}

// tileElements is how many elements a tile of the job has: whole units, and at least one.
func (j *jobRun) tileElements(bytes int64) int64 {
	unit := int64(1)
	switch {
	case j.encoder != nil:
		unit = j.encoder.Unit()
	case j.weight.Change != nil:
		unit = max(j.weight.Change.Width, 1) // a delta's kept share is measured by rows
	case j.weight.Decoder != nil:
		unit = j.weight.Decoder.Unit()
	}
	if n := len(j.weight.Shape); n > 0 && (len(j.weight.pieces) > 0 || j.weight.Scattered()) {
		if row := j.weight.Shape[n-1]; row <= bytes { // whole rows, which are gathered from few places
			unit = common(unit, row)
		}
	}
	if j.turned() {
		bytes *= transposedTiles
	}
	n := bytes / (j.weight.Values.Bits() / 8)
	for _, of := range []any{j.encoder, j.weight.Decoder} { // a tile of a scheme's own size
		if x, ok := of.(quant.TileSizer); ok {
			n = max(n, x.TileElements())
		}
	}
	return max(n-n%unit, unit)
}

// common is the least number that both divide.
func common(a, b int64) int64 {
	x, y := a, b
	for y != 0 {
		x, y = y, x%y
	}
	return a / max(x, 1) * b
}

// turned reports whether what is written lies the other way round than what is stored.
func (j *jobRun) turned() bool {
	return j.flip != j.weight.Transposed || j.weight.Scattered()
}

// scratchSize is what a tile of n elements needs at most.
func (j *jobRun) scratchSize(n int64) scratchSize {
	if j.weight.wholeRows() {
		n += 2 * j.weight.Change.Width // of rows that the tile has a part of
	}
	n = min(n, j.weight.Count())
	s := scratchSize{reader: checkpoint.MemoryFor(j.weight.Weight, n, j.flip)}
	for _, p := range j.weight.pieces {
		of := &jobRun{Job: &Job{DType: tensor.F32, RoundTrip: j.RoundTrip}, weight: p.of, inner: true}
		s = s.max(of.scratchSize(gatheredAtOnce(n)))
		s.gathered = 4 * n
	}
	if j.DType != j.weight.Values || len(j.weight.pieces) > 0 {
		s.cast = max(s.cast, n*j.DType.Bits()/8)
	}
	if j.Finite {
		s.merge = 4 * n
	}
	if m := j.weight.Change; m != nil {
		s.cast = max(s.cast, 4*n)
		// x, and the delta, what it is added to, what was written and their sums in pieces of at least 64 Ki elements.
		s.merge = 4*n + (24+4*j.weight.atOnce())*max(m.Width, 64<<10)
		if j.RoundTrip != nil {
			s.merge += j.weight.Count() // 4 bits an element, and its scales twice
		}
	}
	if j.encoder != nil {
		for _, r := range j.encoder.Tiles([]quant.Range(nil), 0, n) {
			s.out += r.Length
		}
		s.deferred = 4 * j.encoder.Deferred(0, n)
	}
	return s
}
