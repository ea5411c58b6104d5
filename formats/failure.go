package formats

import (
	"context"
	"errors"
	"io/fs"

	"github.com/lorakit/lorakit/storage"
)

// failures are the kinds of errors of formats and of what they read, by the names that they have between processes. The
// list is closed: both sides know all of it.
var failures = []struct {
	name string
	kind error
}{
	{"malformed", ErrMalformed},
	{"limit", ErrLimit},
	{"unsupported", ErrUnsupported},
	{"unknown", ErrUnknown},
	{"foreign", ErrForeign},
	{"outside", ErrOutside},
	{"link", storage.ErrLink},
	{"dangling", storage.ErrDangling},
	{"not-regular", storage.ErrNotRegular},
	{"not-exist", fs.ErrNotExist},
	{"permission", fs.ErrPermission},
	{"canceled", context.Canceled},
	{"deadline", context.DeadlineExceeded},
}

// Failure is an error of a format that lives in another process, as it is sent: its text, and the names of its kinds,
// for which errors.Is finds what it would have found there.
type Failure struct {
	Text  string   `json:"text"`
	Kinds []string `json:"kinds,omitempty"`
}

// NewFailure is an error to be sent, nil for none.
func NewFailure(err error) *Failure {
	if err == nil {
		return nil
	}
	f := &Failure{Text: err.Error()}
	for _, x := range failures {
		if errors.Is(err, x.kind) {
			f.Kinds = append(f.Kinds, x.name)
		}
	}
	return f
}

func (f *Failure) Error() string { return f.Text }

// Unwrap returns the kinds. Names that are not known, of a newer process, are passed over.
func (f *Failure) Unwrap() []error {
	var kinds []error
	for _, name := range f.Kinds {
		for _, x := range failures {
			if x.name == name {
				kinds = append(kinds, x.kind)
			}
		}
	}
	return kinds
}
