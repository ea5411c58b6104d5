package models

// Arrangement says how a weight stands in a container that has conventions of its own: under which name, and which of
// its rows, in which order. A weight that stands there in several pieces has one for each.
type Arrangement struct {
	Name string
	Rows Rows
}

// Rows are rows of a weight, of its first dimension, in an order. The zero value is all of them as they are.
type Rows struct {
	First int64 `json:"first,omitzero"`
	Count int64 `json:"count,omitzero"` // 0 is all from First on
	// Outer and Inner, where they are not 0, exchange two dimensions within each run of Outer times Inner rows: row
	// i*Inner + k of the run comes to stand at k*Outer + i. So llama.cpp has the halves of rotary embeddings.
	Outer int64 `json:"outer,omitzero"`
	Inner int64 `json:"inner,omitzero"`
}

// Whole reports whether r is all rows as they are.
func (r Rows) Whole() bool { return r == Rows{} }

// Run is how many rows are exchanged with each other: First and Count are multiples of it.
func (r Rows) Run() int64 { return max(1, r.Outer*r.Inner) }

// Place is where row i of a run comes to stand in it.
func (r Rows) Place(i int64) int64 {
	if r.Outer == 0 {
		return i
	}
	return i%r.Inner*r.Outer + i/r.Inner
}
