package formats

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// Display writes a path for an error, in quotes only where it would not stay on its line.
func Display(path string) string {
	if q := strconv.Quote(path); len(q) != len(path)+2 {
		return q
	}
	return path
}

// List writes a few names of many for an error.
func List(names []string) string {
	const most = 8
	var b strings.Builder
	for i, n := range names {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(names)-most)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(tensor.Quote(n))
	}
	return b.String()
}

func malformedf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrMalformed)...)
}

func tensorError(name string, err error) error {
	return fmt.Errorf("tensor %s: %w", tensor.Quote(name), err)
}
