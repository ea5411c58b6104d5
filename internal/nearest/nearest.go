// Package nearest finds the known word that somebody who wrote another has most likely meant.
package nearest

import (
	"strconv"
	"strings"
)

// mostBytes is how long a word may be that others are looked for: distances take the product of two lengths.
const mostBytes = 256

// To finds the known word that is nearest to a word, of several the first. It is not found where none is so near that
// it is likely to be meant: with one change in four letters, one in short words, or where the word is the beginning of
// one known word alone. Case plays no part.
func To(word string, known []string) (string, bool) {
	if word == "" || len(word) > mostBytes {
		return "", false
	}
	lower := strings.ToLower(word)
	best, least := "", max(1, len(word)/4)+1
	var begun []string
	for _, k := range known {
		switch {
		case k == word:
			return k, true
		case len(k) > mostBytes:
			continue
		}
		other := strings.ToLower(k)
		if strings.HasPrefix(other, lower) && len(word) > 1 {
			begun = append(begun, k)
		}
		// What is as long as the word's changes says nothing of it.
		if d := distance(lower, other, least); d < least && d < len(word) && d < len(k) {
			best, least = k, d
		}
	}
	if best == "" && len(begun) == 1 {
		best = begun[0]
	}
	return best, best != ""
}

// Closest is the known word that takes the fewest changes, of several the first, however many they are; "" where each
// is as far away as the word is long.
func Closest(word string, known []string) string {
	if len(word) > mostBytes {
		return ""
	}
	best, least := "", len(word)
	for _, k := range known {
		if len(k) > mostBytes {
			continue
		}
		if d := distance(word, k, least); d < least {
			best, least = k, d
		}
	}
	return best
}

// Suggestion is what an error says behind what is wrong: "; did you mean X?", or nothing.
func Suggestion(word string, known []string) string {
	if best, ok := To(word, known); ok && best != word {
		return Hint(best)
	}
	return ""
}

// Hint is the Suggestion of a word that was found.
func Hint(word string) string {
	if q := strconv.Quote(word); len(q) != len(word)+2 { // from a file, perhaps, and not to leave the line
		word = q
	}
	return "; did you mean " + word + "?"
}

// distance is how many letters are to be put in, left out, exchanged, or swapped with their neighbours, to make a of b
// (the optimal string alignment distance); or most, where it is that many or more.
func distance(a, b string, most int) int {
	x, y := []rune(a), []rune(b)
	if d := len(x) - len(y); d >= most || -d >= most {
		return most
	}
	before, above, row := make([]int, len(y)+1), make([]int, len(y)+1), make([]int, len(y)+1)
	for j := range above {
		above[j] = j
	}
	for i := range x {
		row[0] = i + 1
		for j := range y {
			change := 1
			if x[i] == y[j] {
				change = 0
			}
			row[j+1] = min(above[j]+change, above[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && x[i] == y[j-1] && x[i-1] == y[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, above, row = above, row, before
	}
	return min(above[len(y)], most)
}
