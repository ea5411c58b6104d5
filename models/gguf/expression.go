package gguf

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// lookup finds what a name in an expression stands for: a float64, bool, string or []float64. It is false where nothing
// has the name.
type lookup func(name string) (any, bool)

// evaluate computes an expression: alternatives told apart by |, of which the first counts whose names are all there.
// Each is a name, a number, true or false, or arithmetic with + - * / // ( ) and int(). It is false where none has all
// of its names.
func evaluate(expression string, find lookup) (any, bool, error) {
	for alternative := range strings.SplitSeq(expression, "|") {
		p := &parser{text: alternative, find: find}
		v, err := p.sum()
		if err == nil && p.text != "" {
			err = fmt.Errorf("found %q after an expression", p.text)
		}
		if err != nil {
			return nil, false, fmt.Errorf("%s: %w", alternative, err)
		}
		if v != nil {
			return v, true, nil
		}
	}
	return nil, false, nil
}

// parser reads an expression from left to right. Its methods return nil for a name that is not there.
type parser struct {
	text string
	find lookup
}

func (p *parser) take(token string) bool {
	rest, ok := strings.CutPrefix(p.text, token)
	if ok {
		p.text = rest
	}
	return ok
}

func (p *parser) sum() (any, error) {
	left, err := p.product()
	for err == nil {
		var op byte
		switch {
		case p.take("+"):
			op = '+'
		case p.take("-"):
			op = '-'
		default:
			return left, nil
		}
		var right any
		if right, err = p.product(); err == nil {
			left, err = compute(left, right, op)
		}
	}
	return nil, err
}

func (p *parser) product() (any, error) {
	left, err := p.operand()
	for err == nil {
		var op byte
		switch {
		case p.take("*"):
			op = '*'
		case p.take("//"):
			op = '%'
		case p.take("/"):
			op = '/'
		default:
			return left, nil
		}
		var right any
		if right, err = p.operand(); err == nil {
			left, err = compute(left, right, op)
		}
	}
	return nil, err
}

func (p *parser) operand() (any, error) {
	integer := p.take("int(")
	if integer || p.take("(") {
		v, err := p.sum()
		if err != nil {
			return nil, err
		}
		if !p.take(")") {
			return nil, fmt.Errorf("found %q, expected )", p.text)
		}
		if x, ok := v.(float64); ok && integer {
			return math.Trunc(x), nil
		}
		return v, nil
	}
	n := strings.IndexFunc(p.text, func(r rune) bool {
		return !(r == '.' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
	})
	if n < 0 {
		n = len(p.text)
	}
	word := p.text[:n]
	p.text = p.text[n:]
	if word == "" {
		return nil, fmt.Errorf("found %q, expected a name or a number", p.text)
	}
	if word[0] >= '0' && word[0] <= '9' {
		return strconv.ParseFloat(word, 64)
	}
	if word == "true" || word == "false" {
		return word == "true", nil
	}
	if v, ok := p.find(word); ok {
		return v, nil
	}
	return nil, nil
}

// compute is one operation; '%' stands for a division that rounds down.
func compute(left, right any, op byte) (any, error) {
	if left == nil || right == nil {
		return nil, nil
	}
	a, ok := left.(float64)
	b, both := right.(float64)
	if !ok || !both {
		return nil, malformedf("found %v and %v, expected numbers", left, right)
	}
	switch op {
	case '+':
		return a + b, nil
	case '-':
		return a - b, nil
	case '*':
		return a * b, nil
	}
	if b == 0 {
		return nil, malformedf("found a division by 0")
	}
	if op == '/' {
		return a / b, nil
	}
	return math.Floor(a / b), nil
}
