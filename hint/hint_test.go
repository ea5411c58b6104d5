package hint

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestHints(t *testing.T) {
	replace := Hint{Option: "Force", Effect: "replaces it"}
	more := Hint{Option: "Memory", Value: "1 GiB", Effect: "will do"}
	err := With(fmt.Errorf("out: %w", fs.ErrExist), replace)
	require.EqualError(t, err, "out: file already exists")
	require.ErrorIs(t, err, fs.ErrExist)
	require.Equal(t, []Hint{replace}, Of(err))

	// They are found through wrapping, through joining, and below others.
	wrapped := fmt.Errorf("base: %w", err)
	require.Equal(t, []Hint{replace}, Of(wrapped))
	require.Equal(t, []Hint{more, replace}, Of(With(wrapped, more)))
	require.Equal(t, []Hint{replace, more}, Of(errors.Join(err, errors.New("and"), With(errors.New("b"), more))))
	require.Equal(t, []Hint{replace, more}, Of(fmt.Errorf("%w, %w", err, With(errors.New("b"), more))))

	require.NoError(t, With(nil, replace))
	require.Empty(t, Of(nil))
	require.Empty(t, Of(errors.New("plain")))
	plain := errors.New("plain")
	require.Same(t, plain, With(plain))
}
