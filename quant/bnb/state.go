package bnb

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/nf4"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/tensor"
)

// stateSuffix and the name of the type make the key of a 4-bit weight's state.
const stateSuffix = ".quant_state.bitsandbytes__"

// maxStateBytes bounds the JSON of a state; a real one has about 170 bytes.
const maxStateBytes = 64 << 10

// state is the JSON that bitsandbytes packs into a U8 tensor beside a 4-bit weight.
type state struct {
	QuantType       string       `json:"quant_type"`
	BlockSize       int          `json:"blocksize"`
	DType           string       `json:"dtype"`
	Shape           []int64      `json:"shape"`
	NestedBlockSize int          `json:"nested_blocksize"`
	NestedDType     string       `json:"nested_dtype"`
	NestedOffset    *pythonFloat `json:"nested_offset"` // set with double quantisation only
}

// readState reads and checks the state of the weight called name.
func readState(name string, typ nf4.Type, s quant.Stored) (*state, error) {
	key := name + stateSuffix + typ.String()
	t, _ := s.Lookup(key)
	if t.DType != tensor.U8 || t.Count() > maxStateBytes {
		return nil, fmt.Errorf("%w: %s is %v %v, expected U8 and at most %d elements", quant.ErrMalformed, tensor.Quote(key),
			t.DType, t.Shape, maxStateBytes)
	}
	b := make([]byte, t.Count())
	if err := s.Read(key, b, 0); err != nil {
		return nil, err
	}
	var st state
	if err := json.Unmarshal([]byte(quoteNonFinite.Replace(string(b))), &st); err != nil {
		return nil, fmt.Errorf("%w: %s is no quant_state: %s", quant.ErrMalformed, tensor.Quote(key),
			tensor.Quote(oneLine(err)))
	}
	if st.QuantType != typ.String() {
		return nil, fmt.Errorf("%w: quant_type is %s, expected %q", quant.ErrMalformed, tensor.Quote(st.QuantType), typ)
	}
	if err := nf4.CheckBlockSize(st.BlockSize); err != nil {
		return nil, fmt.Errorf("%w: blocksize %d: %v", quant.ErrMalformed, st.BlockSize, err)
	}
	if st.NestedOffset != nil && st.NestedBlockSize != nf4.NestedBlockSize {
		return nil, fmt.Errorf("%w: nested_blocksize is %d, expected %d", quant.ErrMalformed, st.NestedBlockSize,
			nf4.NestedBlockSize)
	}
	if st.NestedOffset != nil && st.NestedDType != "float32" {
		return nil, fmt.Errorf("%w: nested_dtype is %s, expected \"float32\"", quant.ErrMalformed,
			tensor.Quote(st.NestedDType))
	}
	return &st, nil
}

// pythonFloat is a float64 that may be NaN or infinite, which Python writes as no JSON has it.
type pythonFloat float64

// quoteNonFinite puts Python's words in quotes, for UnmarshalJSON to find.
var quoteNonFinite = strings.NewReplacer("-Infinity", `"-inf"`, "Infinity", `"inf"`, "NaN", `"nan"`)

// UnmarshalJSON reads a number, or one of the words that quoteNonFinite quotes.
func (x *pythonFloat) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(strings.Trim(string(b), `"`), 64)
	*x = pythonFloat(f)
	return err
}

// String writes x as Python does: the shortest decimal that reads back as x, with an exponent below 1e-4 and from 1e16
// on.
func (x pythonFloat) String() string {
	f := float64(x)
	switch {
	case math.IsNaN(f):
		return "NaN"
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	}
	if a := math.Abs(f); f != 0 && (a < 1e-4 || a >= 1e16) {
		return strconv.FormatFloat(f, 'e', -1, 64)
	}
	s := strconv.FormatFloat(f, 'f', -1, 64)
	if !strings.Contains(s, ".") {
		s += ".0"
	}
	return s
}

// stateLen is the length of the JSON of a state: that of its fixed parts and the longest number that an offset can be,
// so that it is known before the offset is.
func stateLen(s spec, t tensor.Info) int {
	n := len(appendState(nil, s, t, 0))
	if s.DoubleQuant {
		n += longestFloat - len("0.0")
	}
	return n
}

// longestFloat is the length of -1.2345678901234567e-100: no float64 is longer in its shortest form.
const longestFloat = 24

// appendState writes the state as Python's json.dumps does.
func appendState(b []byte, s spec, t tensor.Info, offset float32) []byte {
	b = fmt.Appendf(b, `{"quant_type": "%s", "blocksize": %d, "dtype": "%s", "shape": %v`, s.Type, s.BlockSize,
		t.DType.Torch(), t.Shape)
	if s.DoubleQuant {
		b = fmt.Appendf(b, `, "nested_blocksize": %d, "nested_dtype": "float32", "nested_offset": %s`, nf4.NestedBlockSize,
			pythonFloat(offset))
	}
	return append(b, '}')
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
