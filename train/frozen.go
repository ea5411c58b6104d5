package train

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	"github.com/lorakit/lorakit/checkpoint"
	"github.com/lorakit/lorakit/tensor"
)

// hashFrozen is the SHA-256 of every weight of the base, decoded as the step uses it, in the order of names: a hash of
// the hashes of the matrices, so that several threads can work at it.
func (s *step) hashFrozen() ([sha256.Size]byte, error) {
	type matrix struct {
		name   string
		of     *checkpoint.Parameter
		expert int
	}
	names := slices.Collect(maps.Keys(s.params))
	if s.adapter != nil {
		for name, a := range s.adapter.params {
			if a.copied != nil && s.params[name] == nil {
				names = append(names, name) // one end of a tie
			}
		}
	}
	slices.Sort(names)
	var list []matrix
	for _, name := range names {
		p := s.parameter(name)
		for e := range max(1, p.Experts) {
			list = append(list, matrix{name, p, e})
		}
	}
	sums := make([][sha256.Size]byte, len(list))
	err := s.each(len(list), func(w *worker, i int) error {
		p := list[i].of
		from := decoded{p.Matrix(list[i].expert)}
		rows, cols := from.Dims()
		hash := sha256.New()
		size := tileRows(tileFloats, rows, cols)
		for lo := 0; lo < rows; lo += size {
			tile, err := w.rowTile(from, cols, lo, min(lo+size, rows))
			if err != nil {
				return err
			}
			for r := range tile.Rows {
				x := row(tile, r)
				if k := firstNotFinite(x); k >= 0 {
					return weightNotFinite(p, x[k])
				}
				tensor.WithBytes(x, func(b []byte) { hash.Write(b) })
			}
		}
		hash.Sum(sums[i][:0])
		s.meter.add(float64(len(s.blocks)) / float64(len(list)))
		return nil
	})
	all := sha256.New()
	for i, m := range list {
		fmt.Fprintf(all, "%s %d %x\n", m.name, m.expert, sums[i])
	}
	return [sha256.Size]byte(all.Sum(nil)), err
}

func weightNotFinite(p *checkpoint.Parameter, v float32) error {
	return p.Pieces[0].Weight.Failed(fmt.Errorf("%w: it holds %v", ErrNotFinite, v))
}
