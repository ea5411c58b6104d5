// Package hint keeps what can be done about an error apart from the error's text.
//
// An error of the library is read by Go programs and by users of a command alike. Its text says what is wrong. What to
// do about it is a Hint, which names an option or a function as Go has them: a command says it with its own flags, and
// a program can act on it.
package hint

// Hint is one thing that can be done about an error. In words: set Option (to Value), or call Function, which Effect.
type Hint struct {
	// Function is the function of package lorakit to call; empty is the one that has failed.
	Function string
	// Option is the field of its options to set, such as "Force"; empty where the function alone will do.
	Option string
	// Value is what to set the option to; empty for a switch, and where any will do.
	Value string
	// Effect says what comes of it, and begins with a verb: "replaces it".
	Effect string
}

// hinted is an error with hints.
type hinted struct {
	error
	hints []Hint
}

func (h *hinted) Unwrap() error { return h.error }

// With adds hints to an error. Its text and its kinds stay what they are.
func With(err error, hints ...Hint) error {
	if err == nil || len(hints) == 0 {
		return err
	}
	return &hinted{err, hints}
}

// Of lists the hints of an error and of all that it wraps, the outermost first.
func Of(err error) []Hint {
	switch x := err.(type) {
	case *hinted:
		return append(append([]Hint{}, x.hints...), Of(x.error)...)
	case interface{ Unwrap() error }:
		return Of(x.Unwrap())
	case interface{ Unwrap() []error }:
		var list []Hint
		for _, e := range x.Unwrap() {
			list = append(list, Of(e)...)
		}
		return list
	}
	return nil
}
