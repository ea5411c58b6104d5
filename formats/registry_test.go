package formats_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/storage/storagetest"
)

// named is a format of which the registry looks at what it says of itself.
type named struct {
	safetensors.Format
	name       string
	extensions []string
	readOnly   bool
	detects    func(name string) (bool, error)
}

func (n named) Name() string         { return n.name }
func (n named) Extensions() []string { return n.extensions }
func (n named) ReadOnly() bool       { return n.readOnly }
func (n named) Detect(_ context.Context, _ storage.Folder, name string) (bool, error) {
	return n.detects(name)
}

func TestRegister(t *testing.T) {
	r := new(formats.Registry)
	require.NoError(t, r.Register(named{name: "one", extensions: []string{".one", ".o"}}))
	require.NoError(t, r.Register(named{name: "two-2_b"}))
	for says, f := range map[string]named{
		`format "": expected a name`:                          {},
		`format "One": expected a name of lower-case letters`: {name: "One"},
		`format "a b": expected a name`:                       {name: "a b"},
		`format "-a": expected a name`:                        {name: "-a"},
		`format "\x1b": expected a name`:                      {name: "\x1b"},
		`format one: found another of this name`:              {name: "one"},
		`format three: found the extension ".o", which is that of one`: {name: "three",
			extensions: []string{".three", ".o"}},
		`format three: found the extension "three", expected a dot`: {name: "three", extensions: []string{"three"}},
		`format three: found the extension ".", expected a dot`:     {name: "three", extensions: []string{"."}},
		`format three: found the extension ".a/b", expected a dot`:  {name: "three", extensions: []string{".a/b"}},
		`format three: found the extension ".three" twice, expected it`: {name: "three",
			extensions: []string{".three", ".three"}},
	} {
		assert.ErrorContains(t, r.Register(f), says)
	}
	assert.Len(t, r.All(), 2)
	assert.Panics(t, func() { formats.Register(safetensors.Format{}) }, "it is there already")
}

func TestRegistryFinds(t *testing.T) {
	r := new(formats.Registry)
	failed := errors.New("it cannot be asked")
	greedy := func(string) (bool, error) { return true, nil }
	for _, f := range []named{
		{name: "greedy", extensions: []string{".greedy"}, detects: greedy},
		{name: "read", extensions: []string{".read"}, readOnly: true, detects: greedy},
		{name: "broken", extensions: []string{".broken"}, detects: func(string) (bool, error) { return false, failed }},
	} {
		require.NoError(t, r.Register(f))
	}
	// The format that has the extension is asked before those that look at content.
	for name, want := range map[string]string{"x.read": "read", "x.greedy": "greedy", "x": "greedy", "": "greedy"} {
		f, err := r.Detect(t.Context(), storagetest.Memory{"x": nil}, name)
		require.NoError(t, err)
		assert.Equal(t, want, f.Name(), name)
	}
	_, err := r.Detect(t.Context(), storagetest.Memory{}, "x.broken")
	assert.ErrorIs(t, err, failed)
	_, err = r.Lookup("read")
	assert.ErrorIs(t, err, formats.ErrUnknown)
	assert.ErrorContains(t, err, `unknown format "read"; known are broken, greedy`)
	_, err = r.Lookup("gredy")
	assert.ErrorContains(t, err, "; did you mean greedy?")
	f, err := r.Lookup("greedy")
	require.NoError(t, err)
	assert.Equal(t, "greedy", f.Name())
	f, ok := r.ForExtension("a/x.read")
	assert.True(t, ok)
	assert.Equal(t, "read", f.Name())
	_, ok = r.ForExtension("a/x.bin")
	assert.False(t, ok)
	_, err = new(formats.Registry).Detect(t.Context(), storagetest.Memory{"x": []byte("\x01")}, "x")
	assert.ErrorIs(t, err, formats.ErrUnknown)
}

// A failure keeps what errors.Is finds, through JSON, and no more than its text of all else.
func TestFailure(t *testing.T) {
	_, notThere := storagetest.Memory{}.Open(t.Context(), "x")
	for want, err := range map[string]error{
		"malformed":         fmt.Errorf("tensor: %w", formats.ErrMalformed),
		"limit":             formats.ErrLimit,
		"malformed,foreign": formats.Foreign([]byte("<!doctype html>"), "x"),
		"outside,link":      fmt.Errorf("x: %w", storage.ErrLink),
		"not-exist":         notThere,
		"canceled":          context.Canceled,
		"":                  errors.New("something else"),
	} {
		sent, failed := json.Marshal(formats.NewFailure(err))
		require.NoError(t, failed)
		var got formats.Failure
		require.NoError(t, json.Unmarshal(sent, &got))
		assert.EqualError(t, &got, err.Error())
		assert.Equal(t, want, joined(got.Kinds))
		for _, kind := range []error{formats.ErrMalformed, formats.ErrLimit, formats.ErrForeign, formats.ErrUnknown,
			storage.ErrLink, fs.ErrNotExist, context.Canceled} {
			assert.Equal(t, errors.Is(err, kind), errors.Is(&got, kind), "%v of %v", kind, err)
		}
	}
	assert.Nil(t, formats.NewFailure(nil))
	assert.NotErrorIs(t, &formats.Failure{Text: "x", Kinds: []string{"newer"}}, formats.ErrMalformed)
}

func joined(list []string) string {
	s := ""
	for i, x := range list {
		if i > 0 {
			s += ","
		}
		s += x
	}
	return s
}
