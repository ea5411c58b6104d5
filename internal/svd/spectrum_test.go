package svd

import (
	"math"
	"testing"

	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/stretchr/testify/require"
)

func TestQRIsLAPACKs(t *testing.T) {
	for _, shape := range [][3]int{{60, 40, 8}, {40, 60, 8}, {50, 50, 50}, {300, 200, 32}, {1, 5, 1}, {5, 1, 1}} {
		rows, cols, k := shape[0], shape[1], shape[2]
		data := gaussian(5, rows*cols, 0.02)
		q, r, err := QR(background, Dense(data, rows, cols), k)
		require.NoError(t, err)
		wantQ, wantR := householder(wide(kernels.MatOf(data, rows, cols)))
		for i := range rows {
			for j := range k {
				require.InDelta(t, wantQ.At(i, j), q.Data[i*k+j], 1e-6)
			}
		}
		for i := range k {
			for j := range cols {
				require.InDelta(t, wantR.At(i, j), r.Data[i*cols+j], 1e-6)
			}
		}
	}
	// By hand: (3, 4) has length 5, and LAPACK turns it to the other side.
	q, r, err := QR(background, Dense([]float32{3, 1, 4, 2}, 2, 2), 1)
	require.NoError(t, err)
	require.InDeltaSlice(t, []float32{-0.6, -0.8}, q.Data, 1e-7)
	require.InDeltaSlice(t, []float32{-5, -2.2}, r.Data, 1e-6)
}

func TestValuesOfWideAndTall(t *testing.T) {
	s := decay(130, func(i float64) float64 { return 1 / i })
	for _, shape := range [][2]int{{130, 9000}, {9000, 130}} {
		data := spectrum(2, shape[0], shape[1], s)
		v, err := Values(background, Dense(data, shape[0], shape[1]), Options{})
		require.NoError(t, err)
		require.True(t, v.Complete)
		require.InDeltaSlice(t, s, v.S, 1e-6)
		require.InEpsilon(t, sum2(s), v.Energy, 1e-6)
	}
}

func TestNumbersOfASpectrum(t *testing.T) {
	require.InDelta(t, 5, EffectiveRank([]float64{2, 2, 2, 2, 2}), 1e-12)
	require.InDelta(t, 1, EffectiveRank([]float64{3, 0, 0}), 1e-12)
	// p = 1/2, 1/4, 1/4: entropy 1.5 ln 2.
	require.InDelta(t, math.Pow(2, 1.5), EffectiveRank([]float64{2, 1, 1}), 1e-12)
	require.Zero(t, EffectiveRank([]float64{0, 0}))
	require.Zero(t, EffectiveRank(nil))
	require.InDelta(t, 1.5, StableRank([]float64{2, 1, 1}, 6), 1e-12)
	require.Zero(t, StableRank(nil, 0))
	s := []float64{3, 2, 1}
	require.Equal(t, 1, RankFor(s, 14, 9.0/14))
	require.Equal(t, 2, RankFor(s, 14, 0.65))
	require.Equal(t, 3, RankFor(s, 14, 1))
	require.Equal(t, 4, RankFor(s, 28, 0.9))
	require.Zero(t, RankFor(nil, 0, 0.9))
}

func TestZeros(t *testing.T) {
	for _, shape := range [][2]int{{3, 4}, {300, 400}} {
		rows, cols := shape[0], shape[1]
		m := Dense(make([]float32, rows*cols), rows, cols)
		d, err := Truncated(background, m, Options{Rank: 2})
		require.NoError(t, err)
		wellFormed(t, d, rows, cols, 0)
		require.Zero(t, d.Energy)
		d, err = Energy(background, m, 0.9, 2, Options{})
		require.NoError(t, err)
		wellFormed(t, d, rows, cols, 0)
		v, err := Values(background, m, Options{})
		require.NoError(t, err)
		require.Equal(t, make([]float64, rows), v.S)
	}
	d, err := Product(kernels.NewMat(20, 4), kernels.MatOf(gaussian(1, 40, 1), 4, 10))
	require.NoError(t, err)
	wellFormed(t, d, 20, 10, 0)
	q, r, err := QR(background, Dense(make([]float32, 12), 4, 3), 2)
	require.NoError(t, err)
	require.Equal(t, []float32{1, 0, 0, 1, 0, 0, 0, 0}, q.Data)
	require.Equal(t, make([]float32, 6), r.Data)
}
