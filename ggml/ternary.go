package ggml

import "github.com/lorakit/lorakit/internal/kernels"

// The types of three values, TQ1_0 with five of them in a byte and TQ2_0 with four.

// ternary sets 256 codes of 0, 1 or 2.
func ternary(codes *[256]byte, x []float32) (scale float32) {
	scale = largest(x)
	inv := inverse(scale)
	for i, v := range x {
		codes[i] = byte(kernels.RoundAway(float32(v*inv)) + 1)
	}
	return scale
}

// trits is how the codes of TQ1_0 lie in its bytes: runs of bytes, each with n codes that are as far from one another
// as the run has bytes.
var trits = [...]struct{ bytes, from, codes, n int }{{0, 0, 32, 5}, {32, 160, 16, 5}, {48, 240, 4, 4}}

func encodeTQ1x0(p []byte, x []float32) {
	var codes [256]byte
	putHalf(p[52:], ternary(&codes, x))
	for _, run := range trits {
		for m := range run.codes {
			v := byte(0)
			for n := range 5 {
				v *= 3
				if n < run.n {
					v += codes[run.from+n*run.codes+m]
				}
			}
			p[run.bytes+m] = byte((uint16(v)*256 + 242) / 243)
		}
	}
}

func decodeTQ1x0(dst []float32, src []byte) {
	for ; len(src) > 0; dst, src = dst[256:], src[54:] {
		d := half(src[52:])
		for _, run := range trits {
			for m := range run.codes {
				b := src[run.bytes+m]
				for n := range run.n {
					dst[run.from+n*run.codes+m] = float32(int32(uint16(b)*3>>8)-1) * d
					b *= 3
				}
			}
		}
	}
}

func encodeTQ2x0(p []byte, x []float32) {
	var codes [256]byte
	putHalf(p[64:], ternary(&codes, x))
	pack2(p[:64], &codes)
}

// pack2 packs 256 codes of 2 bits: of each half, byte r has those of elements r, r+32, r+64 and r+96.
func pack2(p []byte, codes *[256]byte) {
	for h := range 2 {
		for r := range 32 {
			c := codes[128*h+r:]
			p[32*h+r] = c[0]&3 | c[32]&3<<2 | c[64]&3<<4 | c[96]&3<<6
		}
	}
}
