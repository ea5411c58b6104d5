package train

import (
	"math"
	"sync"
	"time"
)

// Progress says how far a run is.
type Progress struct {
	Stage string // hash, step 1, step 2, …, loss, comparison
	// Done and Total count, over all stages, passes through a block: forward is one, and backward, which computes it
	// once more, three. To hash all weights counts one for each block.
	Done, Total int
	Elapsed     time.Duration
}

// backwardPasses is how many passes through a block the backward one counts: it computes the block once more, then the
// gradients of what it was given, then for each product about as much again.
const backwardPasses = 3

// meter tells how far a run is, a few times a second and where a stage begins. Several threads may use it. One that is
// nil tells nobody.
type meter struct {
	tell  func(Progress)
	began time.Time
	lock  sync.Mutex
	at    Progress
	done  float64
	told  time.Time
}

func newMeter(tell func(Progress), total int) *meter {
	if tell == nil {
		return nil
	}
	return &meter{tell: tell, began: time.Now(), at: Progress{Total: total}}
}

// begin says that a stage begins.
func (m *meter) begin(stage string) {
	if m == nil {
		return
	}
	m.lock.Lock()
	defer m.lock.Unlock()
	m.at.Stage = stage
	m.show(time.Now())
}

// add says that so many passes are done.
func (m *meter) add(passes float64) {
	if m == nil {
		return
	}
	m.lock.Lock()
	defer m.lock.Unlock()
	m.done += passes
	if now := time.Now(); now.Sub(m.told) >= 100*time.Millisecond {
		m.show(now)
	}
}

func (m *meter) show(now time.Time) {
	m.told = now
	m.at.Done, m.at.Elapsed = min(int(math.Round(m.done)), m.at.Total), now.Sub(m.began)
	m.tell(m.at)
}
