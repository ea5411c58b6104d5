package gguf

import (
	"fmt"
	"math"
	"slices"
)

// otherScaling says how llama.cpp computes rotary embeddings otherwise than transformers: without a scaling that has no
// place in an architecture's keys and tensors, or with another parameter of one.
func (a *architecture) otherScaling(s *settings) (notices []string) {
	t := s.ropeType()
	if s.class.Theta == 0 || t == "" || t == "default" {
		return nil
	}
	written := slices.ContainsFunc(a.Keys, func(k key) bool { return k.kind == "rope" }) &&
		a.Fixed[a.Name+"."+scalingType] == nil
	factors := slices.Contains(a.Made, madeFactors)
	note := func(member string, v any, otherwise string) {
		notices = append(notices, fmt.Sprintf("%s%s is %s; llama.cpp %s", ropePrefix, member, orNone(v), otherwise))
	}
	switch {
	case factors && (t == "longrope" || t == "su" || t == "yarn"):
		s.otherLongrope(note)
	case t == "yarn" && written:
		a.otherYarn(s, note)
	case t == "linear" && written, t == "llama3" && slices.Contains(a.Made, madeFreqs):
	default:
		notices = append(notices, fmt.Sprintf("rope_parameters is of the type %s; GGUF has no place for it in %s, and "+
			"llama.cpp computes without it", t, a.Name))
	}
	return notices
}

// otherLongrope compares what queries and keys are scaled by: the key for it is made of the two lengths alone.
func (s *settings) otherLongrope(note func(member string, v any, otherwise string)) {
	most, _ := s.find("max_position_embeddings")
	m, _ := most.(float64)
	original, _ := s.rope["original_max_position_embeddings"].(float64)
	only, err := longropeAttention("longrope", m/original, original)
	if err != nil {
		return // which the key is refused for
	}
	if x, given := s.rope["attention_factor"].(float64); given {
		if !close32(x, only) {
			note("attention_factor", x, builtIn(float32(only)))
		}
	} else if x, given := s.rope["factor"].(float64); given {
		if y, err := longropeAttention("longrope", x, original); err == nil && !close32(y, only) {
			note("factor", x, builtIn(m/original))
		}
	}
}

// otherYarn compares the parameters of a yarn scaling, of which llama.cpp has most built in whatever keys there are:
// the turns between which it goes from one frequency to the other, that it takes whole dimensions for these, and by
// what queries and keys are scaled.
func (a *architecture) otherYarn(s *settings, note func(member string, v any, otherwise string)) {
	factor, ok := s.rope["factor"].(float64)
	if !ok {
		return
	}
	for _, turns := range []struct {
		member string
		only   float64
	}{{"beta_fast", 32}, {"beta_slow", 1}} { // 0 and null are these in transformers
		if x, given := s.rope[turns.member].(float64); given && x != 0 && x != turns.only {
			note(turns.member, x, builtIn(turns.only))
		}
	}
	if s.rope["truncate"] == false {
		note("truncate", false, builtIn(true))
	}
	scale := func(by float64) float64 { return 1 + 0.1*by*max(math.Log(factor), 0) }
	own, _ := s.rope["mscale"].(float64)
	all, _ := s.rope["mscale_all_dim"].(float64)
	only := scale(1)
	if slices.ContainsFunc(a.Keys, func(k key) bool { return k.name == logMultiplier }) {
		// Scores are scaled too, by the square of what is left of the whole.
		if all != 0 {
			only = 1
		} else if factor > 1 {
			note("mscale_all_dim", s.rope["mscale_all_dim"], "scales scores as with 1")
		}
	}
	if x, given := s.rope["attention_factor"].(float64); given {
		if !close32(x, only) {
			note("attention_factor", x, builtIn(float32(only)))
		}
		return
	}
	x := scale(1)
	if own != 0 && all != 0 {
		x = scale(own) / scale(all)
	}
	if !close32(x, only) {
		note("mscale", s.rope["mscale"], builtIn(fmt.Sprintf("an attention_factor of %v in place of %v", float32(only),
			float32(x))))
	}
}

// builtIn is what llama.cpp does that has a parameter for all models.
func builtIn(v any) string { return fmt.Sprintf("reads no key for it, and computes with %v", v) }

// close32 reports whether two numbers are the same but for the rounding of float32.
func close32(x, y float64) bool { return math.Abs(x-y) <= 1e-6*math.Abs(y) }
