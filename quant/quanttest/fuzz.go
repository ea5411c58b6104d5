package quanttest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// Fuzz has a scheme read and write again checkpoints that are golden ones but for some of their bytes: it must not
// panic, and says what is wrong in one line.
func Fuzz(f *testing.F, scheme quant.Scheme, paths ...string) {
	var goldens []*Golden
	for i, path := range paths {
		g := Open(f, path)
		goldens = append(goldens, g)
		f.Add(uint8(i), g.JSON, []byte(nil))
		for k := range g.Infos {
			for action := range byte(4) {
				f.Add(uint8(i), g.JSON, []byte{byte(k), action, 1, 2})
			}
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, config, edits []byte) {
		s := goldens[int(which)%len(goldens)].Clone()
		s.JSON = config
		for ; len(edits) >= 4 && len(s.Infos) > 0; edits = edits[4:] {
			edit(s, edits)
		}
		found, err := scheme.Find(context.Background(), s)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		for _, d := range found {
			info := d.Info()
			_, err := info.Size()
			require.NoError(t, err)
			require.Positive(t, d.Unit())
			if info.Count() > 1<<18 {
				continue
			}
			values, err := Decode(s, d, 1)
			if err != nil {
				require.ErrorIs(t, err, quant.ErrMalformed)
				continue
			}
			spec, err := scheme.Spec(d.Spec().Type, d.Spec().Params)
			require.NoError(t, err)
			require.True(t, spec.Equal(d.Spec()))
			info.DType = d.Values()
			e, err := scheme.Encoder(context.Background(), spec, info)
			if err != nil {
				require.ErrorIs(t, err, quant.ErrUnsupported)
				continue
			}
			_, err = Encode([]Weight{{e, info, values}}, 1)
			var nonFinite *quant.NonFiniteError
			if errors.As(err, &nonFinite) {
				require.Less(t, nonFinite.Index, info.Count())
				spec.AllowNonFinite = true
				e, err = scheme.Encoder(context.Background(), spec, info)
				require.NoError(t, err)
				_, err = Encode([]Weight{{e, info, values}}, 1)
			}
			require.NoError(t, err)
		}
	})
}

// edit changes a tensor: its dtype, a dimension, its bytes, or whether it is there.
func edit(s *Stored, by []byte) {
	i := int(by[0]) % len(s.Infos)
	t := &s.Infos[i]
	data := s.Data[t.Name]
	switch by[1] % 6 {
	case 0:
		s.Remove(t.Name)
		return
	case 1:
		t.DType = tensor.DType(by[2]%uint8(tensor.C64) + 1)
	case 2:
		if len(t.Shape) > 0 {
			t.Shape[int(by[2])%len(t.Shape)] = int64(by[3])
		}
	case 3:
		if len(data) > 0 {
			data[int(by[2])%len(data)] = by[3]
		}
	case 4:
		t.Shape = append(t.Shape, int64(by[3]%4))
	case 5:
		name := t.Name
		for _, end := range []string{"_packed", "_scale", "_blocks", ".weight"} {
			if j := strings.LastIndex(name, end); j > 0 {
				name = name[:j]
				break
			}
		}
		if _, taken := s.Lookup(name); !taken {
			s.Data[name] = data
			delete(s.Data, t.Name)
			t.Name = name
			data = s.Data[name]
		}
	}
	size, err := t.Size()
	if err != nil || size > 1<<18 {
		s.Remove(t.Name)
		return
	}
	s.Data[t.Name] = append(data, make([]byte, max(0, size-int64(len(data))))...)[:size]
}
