package gguf

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// sizeLabel says how large a model is, as gguf-py does: "135M", or "8x7B" by the parameters of one expert and of all
// that is no expert.
func sizeLabel(tensors []Tensor) string {
	var all, shared, expert, experts, stacks int64
	for _, t := range tensors {
		n := t.Count()
		all += n
		if rank := len(t.Shape); rank < 3 || !strings.Contains(t.Name, "_exps.") {
			shared += n
		} else {
			expert += n / t.Shape[rank-3]
			experts += t.Shape[rank-3]
			stacks++
		}
	}
	if stacks == 0 {
		return roundedCount(all)
	}
	return fmt.Sprintf("%dx%s", experts/stacks, roundedCount(shared+expert))
}

// roundedCount writes a number of parameters with two digits at least.
func roundedCount(n int64) string {
	x, unit := float64(n)*1e-3, "K"
	switch {
	case n > 1e12:
		x, unit = float64(n)*1e-12, "T"
	case n > 1e9:
		x, unit = float64(n)*1e-9, "B"
	case n > 1e6:
		x, unit = float64(n)*1e-6, "M"
	}
	digits := len(strings.TrimLeft(strconv.FormatFloat(math.RoundToEven(x), 'f', 0, 64), "0"))
	return strconv.FormatFloat(x, 'f', max(2-digits, 0), 64) + unit
}
