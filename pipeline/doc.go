// Package pipeline makes another checkpoint, or an adapter, of what package checkpoint has read: merge, plan, run,
// finish.
//
// Merge adds adapters to a checkpoint, as a value of its own. NewPlan decides for every weight what becomes of it and
// where each byte of the result goes, before any data is read. Run reads, changes and writes tiles of a few hundred
// KiB, so that its memory does not depend on the model. The result goes into a Sink: a stage beside the destination,
// which becomes it by one rename, or not at all.
package pipeline
