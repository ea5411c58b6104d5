package ggml

import (
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"strconv"
	"strings"
	"sync"
)

// The types whose codes choose among tabled vectors, of eight elements or of four. Where the vectors have no signs,
// those of eight elements are a byte, or 7 bits and such an eighth that the number of minus signs is even.

//go:embed grids.txt
var gridText string

// grids are the vectors by the name of a type, one after the other.
var grids = sync.OnceValue(func() map[string][]float32 {
	all := map[string][]float32{}
	for line := range strings.Lines(gridText) {
		f := strings.Fields(line)
		var values []float32
		for v := range strings.SplitSeq(f[1], ",") {
			n, err := strconv.Atoi(v)
			if err != nil {
				panic(err)
			}
			values = append(values, float32(n))
		}
		packed, err := hex.DecodeString(f[2])
		if err != nil {
			panic(err)
		}
		width := 2
		if len(values) > 4 {
			width = 4
		}
		var grid []float32
		for _, b := range packed {
			for shift := 0; shift < 8; shift += width {
				grid = append(grid, values[b>>shift&(1<<width-1)])
			}
		}
		all[f[0]] = grid
	}
	return all
})

// evenSigns adds the sign of the eighth element to those of seven.
func evenSigns(seven uint32) byte {
	s := byte(seven & 127)
	return s | byte(bits.OnesCount8(s))<<7
}

// signed sets y to a vector with signs, times scale.
func signed(y, vector []float32, signs byte, scale float32) {
	y = y[:len(vector)]
	for j, v := range vector {
		x := scale * v
		if signs>>j&1 != 0 {
			x = -x
		}
		y[j] = x
	}
}

func decodeIQ2XXS(dst []float32, src []byte) {
	grid := grids()["iq2_xxs"]
	for ; len(src) > 0; dst, src = dst[256:], src[66:] {
		d := half(src)
		for k := range 8 {
			run := src[2+8*k:][:8]
			a := binary.LittleEndian.Uint32(run[4:])
			scale := d * (0.5 + float32(a>>28)) * 0.25
			for l := range 4 {
				signed(dst[32*k+8*l:], grid[8*int(run[l]):][:8], evenSigns(a>>(7*l)), scale)
			}
		}
	}
}

// quarter is the scale of the 8-run r in IQ2_XS and IQ2_S.
func quarter(d float32, scales []byte, r int) float32 {
	return d * (0.5 + float32(scales[r/4]>>(r%4/2*4)&15)) * 0.25
}

func decodeIQ2XS(dst []float32, src []byte) {
	grid := grids()["iq2_xs"]
	for ; len(src) > 0; dst, src = dst[256:], src[74:] {
		d := half(src)
		for r := range 32 {
			q := binary.LittleEndian.Uint16(src[2+2*r:])
			signed(dst[8*r:], grid[8*int(q&511):][:8], evenSigns(uint32(q>>9)), quarter(d, src[66:], r))
		}
	}
}

func decodeIQ2S(dst []float32, src []byte) {
	grid := grids()["iq2_s"]
	for ; len(src) > 0; dst, src = dst[256:], src[82:] {
		d, signs, high := half(src), src[34:66], src[66:74]
		for r := range 32 {
			index := int(src[2+r]) | int(high[r/4])<<(8-r%4*2)&0x300
			signed(dst[8*r:], grid[8*index:][:8], signs[r], quarter(d, src[74:], r))
		}
	}
}

func decodeIQ3XXS(dst []float32, src []byte) {
	grid := grids()["iq3_xxs"]
	for ; len(src) > 0; dst, src = dst[256:], src[98:] {
		d := half(src)
		for k := range 8 {
			a := binary.LittleEndian.Uint32(src[66+4*k:])
			scale := d * (0.5 + float32(a>>28)) * 0.5
			for l := range 4 {
				signs, index, y := evenSigns(a>>(7*l)), src[2+8*k+2*l:], dst[32*k+8*l:]
				signed(y, grid[4*int(index[0]):][:4], signs, scale)
				signed(y[4:], grid[4*int(index[1]):][:4], signs>>4, scale)
			}
		}
	}
}

func decodeIQ3S(dst []float32, src []byte) {
	grid := grids()["iq3_s"]
	for ; len(src) > 0; dst, src = dst[256:], src[110:] {
		d, high, signs, scales := half(src), src[66:74], src[74:106], src[106:110]
		for k := range 8 {
			scale := d * float32(1+2*int32(scales[k/2]>>(k%2*4)&15))
			for l := range 4 {
				index, y := src[2+8*k+2*l:], dst[32*k+8*l:]
				first := int(index[0]) | int(high[k])<<(8-2*l)&256
				second := int(index[1]) | int(high[k])<<(7-2*l)&256
				signed(y, grid[4*first:][:4], signs[4*k+l], scale)
				signed(y[4:], grid[4*second:][:4], signs[4*k+l]>>4, scale)
			}
		}
	}
}

// shifted sets y to a vector of IQ1_S or IQ1_M, an eighth added or taken off, times scale.
func shifted(y, vector []float32, negative bool, scale float32) {
	delta := float32(0.125)
	if negative {
		delta = -delta
	}
	y = y[:len(vector)]
	for j, v := range vector {
		y[j] = scale * (v + delta)
	}
}

func decodeIQ1S(dst []float32, src []byte) {
	grid := grids()["iq1_s"]
	for ; len(src) > 0; dst, src = dst[256:], src[50:] {
		d := half(src)
		for k := range 8 {
			h := binary.LittleEndian.Uint16(src[34+2*k:])
			scale := d * float32(2*(h>>12&7)+1)
			for l := range 4 {
				index := int(src[2+4*k+l]) | int(h>>(3*l)&7)<<8
				shifted(dst[32*k+8*l:], grid[8*index:][:8], h>>15 != 0, scale)
			}
		}
	}
}

func decodeIQ1M(dst []float32, src []byte) {
	grid := grids()["iq1_s"]
	for ; len(src) > 0; dst, src = dst[256:], src[56:] {
		var words [4]uint16
		d := uint16(0)
		for i := range words {
			words[i] = binary.LittleEndian.Uint16(src[48+2*i:])
			d |= words[i] >> 12 << (4 * i)
		}
		dHalf := [2]byte{byte(d), byte(d >> 8)}
		for e := range 32 {
			u, h := e/2, src[32+e/2]>>(e%2*4)
			scale := half(dHalf[:]) * float32(2*(words[u/4]>>(3*(u%4))&7)+1)
			index := int(src[e]) | int(h&7)<<8
			shifted(dst[8*e:], grid[8*index:][:8], h&8 != 0, scale)
		}
	}
}
