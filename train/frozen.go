package train

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// hashFrozen is the SHA-256 of every weight of the base, decoded as the step uses it, in the order of names: a hash of
// the hashes of the matrices, so that several threads can work at it.
func (s *step) hashFrozen() ([sha256.Size]byte, error) {
	type matrix struct {
		name   string
		expert int
	}
	var list []matrix
	for name, p := range s.params {
		for e := range max(1, p.Experts) {
			list = append(list, matrix{name, e})
		}
	}
	slices.SortFunc(list, func(a, b matrix) int {
		if c := strings.Compare(a.name, b.name); c != 0 {
			return c
		}
		return a.expert - b.expert
	})
	sums := make([][sha256.Size]byte, len(list))
	err := s.each(len(list), func(w *worker, i int) error {
		p := s.params[list[i].name]
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
					return s.weightNotFinite(list[i].name, x[k])
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

func (s *step) weightNotFinite(param string, v float32) error {
	w := s.params[param].Pieces[0].Weight
	return fmt.Errorf("%s: tensor %s: %w: it holds %v", w.Parts[0].File, tensor.Quote(w.Name), ErrNotFinite, v)
}
