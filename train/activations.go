package train

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
	return z.activations(), 4 * int64(chunkOf(tokens, z.token)*z.token), nil
}
