package host

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/quant"
)

// What a config says of a plugin's scheme is known to the plugin alone: no plain weight is missed.
func TestDeclaration(t *testing.T) {
	s := &scheme{facts: &lock.Scheme{Name: "s4", Types: []string{"s4"}, Parameters: []string{"block_size"}}}
	d, ok := s.Declaration([]byte(`{"quant_method": "s4", "skip": ["a"]}`))
	assert.True(t, ok)
	assert.True(t, d.Skips("b"))
	_, ok = s.Declaration([]byte(`{"quant_method": "other"}`))
	assert.False(t, ok)
	_, ok = s.Declaration([]byte(`[]`))
	assert.False(t, ok)
}

// A type has the parameters that the plugin has said, and no others.
func TestSpec(t *testing.T) {
	s := &scheme{facts: &lock.Scheme{Name: "s4", Types: []string{"s4"}, Parameters: []string{"block_size"}}}
	asked := quant.Params{{Name: "block_size", Value: int64(96)}, {Name: "double_quant", Value: true}}
	spec, err := s.Spec("s4", asked)
	require.NoError(t, err)
	assert.Equal(t, quant.Spec{Type: "s4", Params: quant.Params{{Name: "block_size", Value: int64(96)}}}, spec)
	_, err = s.Spec("s5", nil)
	assert.ErrorIs(t, err, quant.ErrUnknown)
	_, err = s.Spec("s4", quant.Params{{Name: "block_size", Value: int64(0)}})
	assert.ErrorIs(t, err, quant.ErrParameter)
}
