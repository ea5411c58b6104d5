package safetensors

import (
	"math"
	"strconv"
)

// inRange reports whether the reference's JSON reader takes a number, given in valid JSON syntax, where any value may
// stand. It refuses one that becomes infinite on its way to a float64: the first 19 or 20 digits as an integer, scaled
// by a power of ten (serde_json, de.rs, f64_from_parts). At the very edge of a float64's range that differs from
// correct rounding, which is why it is done the same way here.
func inRange(number []byte) bool {
	significand, exponent, ok := decompose(number)
	if !ok {
		return false
	}
	const most = 308
	f := float64(significand)
	for exponent < -most || exponent > most {
		if f == 0 {
			return true
		}
		if exponent > 0 {
			return false
		}
		f /= 1e308
		exponent += most
	}
	if exponent <= 0 {
		return true
	}
	pow, err := strconv.ParseFloat("1e"+strconv.Itoa(exponent), 64)
	return err == nil && !math.IsInf(f*pow, 0)
}

// decompose splits a number into significand and decimal exponent. Digits past what an uint64 holds are dropped. It
// fails where the exponent itself overflows upwards.
func decompose(number []byte) (significand uint64, exponent int, ok bool) {
	i := 0
	next := func() (digit uint64, ok bool) {
		if i < len(number) && number[i] >= '0' && number[i] <= '9' {
			i++
			return uint64(number[i-1] - '0'), true
		}
		return 0, false
	}
	fits := func(digit uint64) bool {
		return significand < math.MaxUint64/10 || significand == math.MaxUint64/10 && digit <= math.MaxUint64%10
	}
	if i < len(number) && number[i] == '-' {
		i++
	}
	dropping := false
	for digit, more := next(); more; digit, more = next() {
		if dropping = dropping || !fits(digit); dropping {
			exponent++
		} else {
			significand = significand*10 + digit
		}
	}
	if i < len(number) && number[i] == '.' {
		i++
		// A fraction starts anew: a small digit may fit where a large one did not.
		dropping = false
		for digit, more := next(); more; digit, more = next() {
			if dropping = dropping || !fits(digit); !dropping {
				significand = significand*10 + digit
				exponent--
			}
		}
	}
	if i == len(number) {
		return significand, exponent, true
	}
	i++ // the e
	negative := false
	if number[i] == '+' || number[i] == '-' {
		negative = number[i] == '-'
		i++
	}
	e := int64(0)
	for digit, more := next(); more; digit, more = next() {
		if e = e*10 + int64(digit); e > math.MaxInt32 {
			return 0, 0, negative || significand == 0
		}
	}
	if negative {
		e = -e
	}
	return significand, int(min(max(int64(exponent)+e, math.MinInt32), math.MaxInt32)), true
}
