package wire

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// statuses are the kinds of errors that go over the connection, the first that fits.
var statuses = []struct {
	kind error
	code codes.Code
}{
	{formats.ErrLimit, codes.ResourceExhausted},
	{formats.ErrUnsupported, codes.Unimplemented},
	{quant.ErrUnsupported, codes.Unimplemented},
	{quant.ErrUnknown, codes.Unimplemented},
	{quant.ErrParameter, codes.Unimplemented},
	{formats.ErrMalformed, codes.InvalidArgument},
	{formats.ErrOutside, codes.InvalidArgument},
	{quant.ErrMalformed, codes.InvalidArgument},
	{tensor.ErrOverflow, codes.InvalidArgument},
	{fs.ErrNotExist, codes.NotFound},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// Status is an error as it is sent.
func Status(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, s := range statuses {
		if errors.Is(err, s.kind) {
			return status.Error(s.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// Refusal is an error that a plugin has answered on purpose, of the kind that its status stands for. It reports false
// for all others: a plugin that has failed, or is gone.
func Refusal(err error) (error, bool) {
	s, ok := status.FromError(err)
	if !ok || TooLarge(err) {
		return nil, false
	}
	var kinds []error
	switch s.Code() {
	case codes.InvalidArgument:
		kinds = []error{formats.ErrMalformed, quant.ErrMalformed}
	case codes.Unimplemented:
		kinds = []error{formats.ErrUnsupported, quant.ErrUnsupported}
	case codes.ResourceExhausted:
		kinds = []error{formats.ErrLimit}
	case codes.NotFound:
		kinds = []error{fs.ErrNotExist}
	default:
		return nil, false
	}
	text := OneLine(s.Message(), 1000)
	if !slices.ContainsFunc(kinds, func(k error) bool { return strings.Contains(text, k.Error()) }) {
		text += ": " + kinds[0].Error() // the plugin has not said it
	}
	return &refusal{text, kinds}, true
}

// refusal is an error whose text names its kind.
type refusal struct {
	text  string
	kinds []error
}

func (r *refusal) Error() string   { return r.text }
func (r *refusal) Unwrap() []error { return r.kinds }

// TooLarge reports whether a message was larger than MaxMessage.
func TooLarge(err error) bool {
	s, ok := status.FromError(err)
	return ok && s.Code() == codes.ResourceExhausted && strings.Contains(s.Message(), "larger than max")
}

// OneLine makes one line of what a plugin has said, of at most so many bytes, with control characters quoted.
func OneLine(s string, most int) string {
	var b strings.Builder
	for _, r := range strings.Join(strings.Fields(s), " ") {
		if b.Len() >= most {
			b.WriteString("...")
			break
		}
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' {
			fmt.Fprintf(&b, "\\x%02x", r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}
