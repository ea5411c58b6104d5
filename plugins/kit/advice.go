package kit

import (
	"errors"
	"strings"

	"github.com/lorakit/lorakit/plugins/host"
)

// The kinds of errors, by their words in Go and in Python, and by the status that stands for them.
const (
	malformed   = "formats.ErrMalformed (lk.Malformed, INVALID_ARGUMENT)"
	unsupported = "formats.ErrUnsupported (lk.Unsupported, UNIMPLEMENTED)"
	limit       = "formats.ErrLimit (lk.Limit, RESOURCE_EXHAUSTED)"
	// Those of schemes.
	malformedWeight   = "quant.ErrMalformed (lk.Malformed, INVALID_ARGUMENT)"
	unsupportedWeight = "quant.ErrUnsupported (lk.Unsupported, UNIMPLEMENTED)"
	nonFinite         = "quant.NonFiniteError (lk.NonFinite)"
)

// known are what is to be done about errors that lorakit makes of what a plugin answers, by words in them. The first
// one that fits holds.
var known = []struct {
	words, advice string
	failed        bool // it is the plugin's failure, not a refusal
}{
	{" exited (", "the process must not end while lorakit uses it: answer an error instead, and look at its last lines " +
		"on stderr", true},
	{"gave no answer", "answer each call, and send something at least every 30 seconds: check each length before a loop " +
		"of it, and hold no lock while data is sent", true},
	{"answers a layout that cannot be", "places and pieces must fill the size of each file without gap or " +
		"overlap, and each tensor has one place", true},
	{"sent a message of more than 4 MiB", "keep the metadata of a file below 4 MiB, and each name", true},
	{"found an answer of ", "keep the metadata of a file below 4 MiB, and each name", false},
	{"answers the quantization_config", configAdvice, true},
	{"answers a quantization_config", configAdvice, true},
	{"its own quantization_config", configAdvice, false},
	{"found a rule of first", ruleAdvice, false},
	{"found outputs and numbers to carry of", ruleAdvice, false},
	{"answers an encoder of tensor", "Encoder answers outputs whose shapes and rules fit the weight", true},
}

const (
	configAdvice = "Config is at fault: it returns a JSON object of at most 1 MiB with the scheme's name as quant_method"
	ruleAdvice   = "a rule of a part is at fault: the bytes first + (u mod wrap) * stride of each unit u, stride of " +
		"them, must lie within the tensor (see A scheme in docs/plugins.md)"
	raised = "the plugin raised this: mend it; its traceback is on stderr, which LORAKIT_PLUGIN_DEBUG=1 and " +
		"LORAKIT_REATTACH_PLUGINS show (see Debugging in docs/plugins.md)"
)

// knownAdvice is what to do about an error that is known, and empty where it is not.
func knownAdvice(err error) string {
	for _, k := range known {
		if strings.Contains(err.Error(), k.words) && (!k.failed || errors.Is(err, host.ErrFailed)) {
			return k.advice
		}
	}
	return ""
}

// adviceOn is what to do about an error of a check that has no advice of its own.
func adviceOn(err error, c check) string {
	text, failed := err.Error(), errors.Is(err, host.ErrFailed)
	if advice := knownAdvice(err); advice != "" {
		return advice
	}
	switch {
	case failed && strings.Contains(text, "has failed: ") && c.refuses:
		return raised + "; or refuse the file by an error of a kind: " + malformed + " for one that is broken, " +
			unsupported + " for what there is no place for, " + limit + " for what is too large"
	case failed && strings.Contains(text, "has failed: "):
		return raised
	}
	return c.advice
}

// unanswered reports whether an error is that the plugin has given no answer in time, or has not come up.
func unanswered(err error) bool {
	if !errors.Is(err, host.ErrFailed) {
		return false
	}
	text := err.Error()
	return strings.Contains(text, " gave no answer in ") || strings.Contains(text, " did not start") ||
		strings.Contains(text, " cannot be started")
}
