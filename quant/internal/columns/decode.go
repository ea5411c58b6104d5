package columns

import (
	"encoding/binary"
	"sync"

	"github.com/lorakit/lorakit/quant/internal/bitfield"
	"github.com/lorakit/lorakit/quant/internal/rows"
	"github.com/lorakit/lorakit/tensor"
)

const (
	// blockOut and blockIn are how many columns and inputs are worked on at a time, so that they stay in a cache.
	blockOut = 64
	blockIn  = 1024
)

// scratch is the memory of a tile.
type scratch struct {
	scales []float32 // of all groups, as they are stored
	zeros  []byte    // of all groups, in whole eights of columns
	index  []uint32  // of the inputs, where they have groups in no order
	runs   []run     // else
	pairs  []pair    // the parameters of one column

	codes [blockOut * blockIn]byte // of a block, by columns
	words [blockIn]byte            // of one column
	x     [blockIn]float32
}

// run are the inputs before end that the run before does not have: they are of one group.
type run struct{ end, group int64 }

// pair are the parameters of a group.
type pair struct{ zero, scale float32 }

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// tile is a Decode under way: n columns, from first on.
type tile struct {
	*Decoder
	*scratch
	stored   []byte // the codes
	first, n int64
	eights   int64 // columns of zeros, from first rounded down to a multiple of 8
}

// Decode writes whole rows of the weight.
func (d *Decoder) Decode(dst []byte, lo, hi int64, in [][]byte) error {
	if lo >= hi {
		return nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	t := &tile{Decoder: d, scratch: s, stored: in[partCodes], first: lo / d.In, n: (hi - lo) / d.In}
	s.scales = rows.Room(&s.scales, d.Groups*t.n)
	if err := tensor.ToFloats(s.scales, in[partScales], d.scale); err != nil {
		return err
	}
	t.unpackZeros(in[partZeros])
	if err := t.group(in); err != nil {
		return err
	}
	for o := int64(0); o < t.n; {
		end := min(t.n, (t.first+o+blockOut)/8*8-t.first) // at whole eights
		if err := t.block(dst, o, end); err != nil {
			return err
		}
		o = end
	}
	return nil
}

// block decodes the columns [o, end) of the tile.
func (t *tile) block(dst []byte, o, end int64) error {
	width, inputs := t.scale.Bits()/8, t.In
	first := 0 // run
	for i := int64(0); i < inputs; i += blockIn {
		m := min(blockIn, inputs-i)
		codes, pitch := t.unpack(o, end, i, m)
		for len(t.runs) > 0 && t.runs[first].end <= i {
			first++
		}
		for c := o; c < end; c++ {
			x := t.x[:m]
			t.values(x, codes[(c-o)*pitch:], c, i, first)
			at := (c*inputs + i) * width
			if err := tensor.FromFloats(dst[at:at+m*width], t.scale, x); err != nil {
				return err
			}
		}
	}
	return nil
}

// values computes those of a column for the inputs from i on, whose first is in that run.
func (t *tile) values(x []float32, codes []byte, c, i int64, first int) {
	if len(t.runs) == 0 {
		t.pairs = rows.Room(&t.pairs, t.Groups)
		for g := range t.pairs {
			t.pairs[g] = t.pair(int64(g), c)
		}
		index := t.index[i:][:len(x)]
		codes = codes[:len(x)]
		for k, g := range index {
			p := t.pairs[g]
			x[k] = (float32(codes[k]) - p.zero) * p.scale
		}
		return
	}
	for _, r := range t.runs[first:] {
		n := min(r.end-i, int64(len(x)))
		p := t.pair(r.group, c)
		some := codes[:n]
		to := x[:n]
		for k, q := range some {
			to[k] = (float32(q) - p.zero) * p.scale
		}
		x, codes, i = x[n:], codes[n:], i+n
		if len(x) == 0 {
			return
		}
	}
}

// pair are the parameters of a group of column c.
func (t *tile) pair(group, c int64) pair {
	return pair{float32(t.zeros[group*t.eights+t.first%8+c]), t.scales[group*t.n+c]}
}

// unpack returns the codes of the columns [o, end) for m inputs from i on, by columns that are pitch bytes apart.
func (t *tile) unpack(o, end, i, m int64) (codes []byte, pitch int64) {
	if t.Down {
		pitch = (m + 7) / 8 * 8
		row, rows := i*t.Bits/32, bitfield.Words(m, t.Bits)
		words := t.words[:4*rows]
		for c := o; c < end; c++ {
			at := 4 * (row*t.n + c)
			for k := int64(0); k < 4*rows; k += 4 {
				binary.LittleEndian.PutUint32(words[k:], binary.LittleEndian.Uint32(t.stored[at:]))
				at += 4 * t.n
			}
			bitfield.Unpack(t.codes[(c-o)*pitch:][:pitch], words, t.Bits)
		}
		return t.codes[:], pitch
	}
	pitch = (m + 7) / 8 * 8
	row := int64(len(t.stored)) / t.In
	from, to := (t.first+o)/8, (t.first+end+7)/8
	for w := from; w < to; w++ { // words, of eight columns
		words := t.stored[i*row+4*(w-t.first/8):]
		t.turnWords(t.codes[(w-from)*8*pitch:][:8*pitch], words, pitch, m, row)
	}
	return t.codes[(t.first+o)%8*pitch:], pitch
}

// turnWords writes the codes of the eight columns of m words that are row bytes apart, by columns.
func (t *tile) turnWords(dst, words []byte, pitch, m, row int64) {
	var v [8]uint64
	for k := int64(0); k < m; k += 8 {
		for l := range min(8, m-k) {
			v[l] = nibbles(uint64(binary.LittleEndian.Uint32(words[(k+l)*row:])))
		}
		a0, a4 := exchange(v[0], v[4], 32, 0x0000_0000_ffff_ffff)
		a1, a5 := exchange(v[1], v[5], 32, 0x0000_0000_ffff_ffff)
		a2, a6 := exchange(v[2], v[6], 32, 0x0000_0000_ffff_ffff)
		a3, a7 := exchange(v[3], v[7], 32, 0x0000_0000_ffff_ffff)
		a0, a2 = exchange(a0, a2, 16, 0x0000_ffff_0000_ffff)
		a1, a3 = exchange(a1, a3, 16, 0x0000_ffff_0000_ffff)
		a4, a6 = exchange(a4, a6, 16, 0x0000_ffff_0000_ffff)
		a5, a7 = exchange(a5, a7, 16, 0x0000_ffff_0000_ffff)
		a0, a1 = exchange(a0, a1, 8, 0x00ff_00ff_00ff_00ff)
		a2, a3 = exchange(a2, a3, 8, 0x00ff_00ff_00ff_00ff)
		a4, a5 = exchange(a4, a5, 8, 0x00ff_00ff_00ff_00ff)
		a6, a7 = exchange(a6, a7, 8, 0x00ff_00ff_00ff_00ff)
		if t.Interleaved {
			a1, a2, a3, a4, a5, a6 = a4, a1, a5, a2, a6, a3
		}
		for c, x := range [8]uint64{a0, a1, a2, a3, a4, a5, a6, a7} {
			binary.LittleEndian.PutUint64(dst[int64(c)*pitch+k:], x)
		}
	}
}

// nibbles puts the eight of a word into bytes.
func nibbles(v uint64) uint64 {
	v = (v | v<<16) & 0x0000_ffff_0000_ffff
	v = (v | v<<8) & 0x00ff_00ff_00ff_00ff
	return (v | v<<4) & 0x0f0f_0f0f_0f0f_0f0f
}

// exchange swaps the upper halves of the parts of a, 2*shift bits each, with the lower halves of those of b. The mask
// covers the lower halves.
func exchange(a, b uint64, shift uint, mask uint64) (uint64, uint64) {
	return a&mask | b&mask<<shift, a>>shift&mask | b&^mask
}

// unpackZeros fills zeros.
func (t *tile) unpackZeros(stored []byte) {
	row := int64(len(stored)) / t.Groups
	t.eights = (t.first+t.n+7)/8*8 - t.first/8*8
	t.zeros = rows.Room(&t.zeros, t.Groups*t.eights)
	for g := range t.Groups {
		zeros := t.zeros[g*t.eights:][:t.eights]
		bitfield.Unpack(zeros, stored[g*row:][:row], t.Bits)
		if t.Interleaved {
			for eight := zeros; len(eight) > 0; eight = eight[8:] {
				v := binary.LittleEndian.Uint64(eight)
				binary.LittleEndian.PutUint64(eight, spread(v&0xffff_ffff)|spread(v>>32)<<8)
			}
		}
		for i, z := range zeros {
			zeros[i] = (z + t.Plus) & (1<<t.Bits - 1)
		}
	}
}

// spread puts four bytes where every other is.
func spread(v uint64) uint64 {
	v = (v | v<<16) & 0x0000_ffff_0000_ffff
	return (v | v<<8) & 0x00ff_00ff_00ff_00ff
}

// group finds the groups of the inputs.
func (t *tile) group(in [][]byte) error {
	t.runs = t.runs[:0]
	if t.Index == "" {
		for g := range t.Groups {
			t.runs = append(t.runs, run{min((g+1)*t.GroupSize, t.In), g})
		}
		return nil
	}
	t.index = rows.Room(&t.index, t.In)
	last := int64(-1)
	for i := range t.index {
		g, err := t.groupAt(in[partIndex][4*i:], int64(i))
		if err != nil {
			return err
		}
		t.index[i] = uint32(g)
		if g != last {
			t.runs, last = append(t.runs, run{group: g}), g
		}
		t.runs[len(t.runs)-1].end = int64(i) + 1
	}
	if len(t.runs) > len(t.index)/16 && len(t.runs) > 1 { // each for itself
		t.runs = t.runs[:0]
	}
	return nil
}
