//go:build !purego

package kernels

import "golang.org/x/sys/cpu"

//go:generate go -C _generate run . -out ../kernels_amd64.s -stubs ../stubs_amd64.go -pkg kernels

// assembly returns the sets in assembly that this processor can run. The features of package cpu include that the
// operating system keeps the registers.
func assembly() (sets []*Set) {
	if !cpu.X86.HasAVX2 || !cpu.X86.HasF16C || !cpu.X86.HasFMA || !cpu.X86.HasBMI2 {
		return nil
	}
	base := Set{
		name:        "avx2",
		bisect4:     quantizers{bisect4F32AVX2, bisect4F16AVX2, bisect4BF16AVX2},
		dequantize4: dequantizers{dequantize4F32AVX2, dequantize4F16AVX2, dequantize4BF16AVX2},
		maxAbs:      magnitudes{maxAbsF32AVX2, maxAbsF16AVX2, maxAbsBF16AVX2},
		quantize8:   rows{quantize8F32AVX2, quantize8F16AVX2, quantize8BF16AVX2},
		dequantize8: rows{dequantize8F32AVX2, dequantize8F16AVX2, dequantize8BF16AVX2},
		convert: [floats]casts{
			F32:  {F16: convertF16ToF32AVX2, BF16: convertBF16ToF32AVX2},
			F16:  {F32: convertF32ToF16AVX2, BF16: convertBF16ToF16AVX2},
			BF16: {F32: convertF32ToBF16AVX2, F16: convertF16ToBF16AVX2},
		},
		mergeRow: [floats]merges{
			F32:  {mergeRowF32ToF32AVX2, mergeRowF16ToF32AVX2, mergeRowBF16ToF32AVX2},
			F16:  {mergeRowF32ToF16AVX2, mergeRowF16ToF16AVX2, mergeRowBF16ToF16AVX2},
			BF16: {mergeRowF32ToBF16AVX2, mergeRowF16ToBF16AVX2, mergeRowBF16ToBF16AVX2},
		},
		addScaled:         addScaledAVX2,
		kept:              keptAVX2,
		dot:               dotAVX2,
		exp:               expAVX2,
		sigmoid:           sigmoidAVX2,
		siluMul:           siluMulAVX2,
		siluMulGrad:       siluMulGradAVX2,
		addProducts:       addProductsAVX2,
		searchMinAbsolute: searchMinAbsoluteAVX2,
		searchMinSquared:  searchMinSquaredAVX2,
		searchSym:         searchSymAVX2,
		encodeQ8:          encodeQ8AVX2,
		decodeQ8:          decodeQ8AVX2,
		searchMoving:      searchMovingAVX2,
		roundLatticeFast:  roundLatticeAVX2,
		quantizeCodes:     quantizeCodesAVX2,
		scaleCodes:        scaleCodesAVX2,
		scaleCodesLess:    scaleCodesLessAVX2,
		searchNonLinear:   searchNonLinearAVX2,
		ranks:             ranksAVX2,
		divide:            divideAVX2,
		extremes:          ends{extremesF32AVX2, extremesF16AVX2, extremesBF16AVX2},
		quantizeAffine:    affines{quantizeAffineF32AVX2, quantizeAffineF16AVX2, quantizeAffineBF16AVX2},
		dequantizeAffine: unaffines{dequantizeAffineF32AVX2, dequantizeAffineF16AVX2,
			dequantizeAffineBF16AVX2},
		encodeE4M3: encodeE4M3AVX2,
		encodeE2M1: encodeE2M1AVX2,
		magnitudes: magnitudesAVX2,
		multiply:   multiplyAVX2,
		nibbles:    nibblesAVX2,
		tiles: &tiles{24, mulAddAVX2, [3]multiplier{mulAddEdge1AVX2, mulAddEdge2AVX2, mulAddEdge3AVX2},
			transposeAVX2},
	}
	if cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasAVX512DQ && cpu.X86.HasAVX512VL {
		best := base // what has no function of its own takes that of AVX2
		best.name = "avx512"
		best.bucket4 = quantizers{bucket4F32AVX512, bucket4F16AVX512, bucket4BF16AVX512}
		best.bisect4 = quantizers{bisect4F32AVX512, bisect4F16AVX512, bisect4BF16AVX512}
		best.dequantize4 = dequantizers{dequantize4F32AVX512, dequantize4F16AVX512, dequantize4BF16AVX512}
		best.maxAbs = magnitudes{maxAbsF32AVX512, maxAbsF16AVX512, maxAbsBF16AVX512}
		best.quantize8 = rows{quantize8F32AVX512, quantize8F16AVX512, quantize8BF16AVX512}
		best.dequantize8 = rows{dequantize8F32AVX512, dequantize8F16AVX512, dequantize8BF16AVX512}
		best.convert = [floats]casts{
			F32:  {F16: convertF16ToF32AVX512, BF16: convertBF16ToF32AVX512},
			F16:  {F32: convertF32ToF16AVX512, BF16: convertBF16ToF16AVX512},
			BF16: {F32: convertF32ToBF16AVX512, F16: convertF16ToBF16AVX512},
		}
		best.mergeRow = [floats]merges{
			F32:  {mergeRowF32ToF32AVX512, mergeRowF16ToF32AVX512, mergeRowBF16ToF32AVX512},
			F16:  {mergeRowF32ToF16AVX512, mergeRowF16ToF16AVX512, mergeRowBF16ToF16AVX512},
			BF16: {mergeRowF32ToBF16AVX512, mergeRowF16ToBF16AVX512, mergeRowBF16ToBF16AVX512},
		}
		best.addScaled = addScaledAVX512
		best.kept = keptAVX512
		best.dot = dotAVX512
		best.exp = expAVX512
		best.sigmoid = sigmoidAVX512
		best.siluMul = siluMulAVX512
		best.siluMulGrad = siluMulGradAVX512
		best.addProducts = addProductsAVX512
		best.tiles = &tiles{48, mulAddAVX512, [3]multiplier{mulAddEdge1AVX512, mulAddEdge2AVX512, mulAddEdge3AVX512},
			transposeAVX2}
		sets = append(sets, &best)
	}
	return append(sets, &base)
}

type (
	quantizers   = [floats]func(l *lookup, packed []byte, absmax []float32, src []byte, blockSize int) int
	dequantizers = [floats]func(dst, packed []byte, absmax []float32, code *[16]float32, blockSize int) int
	magnitudes   = [floats]func(src []byte) (uint32, int)
	rows         = [floats]func(dst, src []byte, scale float32) int
	ends         = [floats]func(lo, hi []float32, src []byte, group int) int
	affines      = [floats]func(codes, src []byte, scales, biases []float32, group int, most float32)
	unaffines    = [floats]func(dst, codes []byte, scales, biases []float32, group int) int
	casts        = [floats]func(dst, src []byte) int
	merges       = [floats]func(dst, src []byte, delta []float32, scale float32, share *[2]sums) int
)

// mergeRowFast does the first done elements, if the set has a function for them. share does not move to the heap: the
// compiler does not see that it is handed to a function that is not known.
func (s *Set) mergeRowFast(dst []byte, to Float, src []byte, from Float, delta []float32, scale float32,
	share *[2]sums) (done int) {
	if f := s.mergeRow[to][from]; f != nil {
		done = f(dst, src, delta, scale, hide(share))
	}
	return done
}

// keptFast does the first done elements, if the set has a function for them.
func (s *Set) keptFast(out, base, all, delta []float32, share *[2]sums) (done int) {
	if s.kept != nil {
		done = s.kept(out, base, all, delta, hide(share))
	}
	return done
}
