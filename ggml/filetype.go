package ggml

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/lorakit/lorakit/tensor"
)

// FileType is what a file is quantised to as a whole, by its number in general.file_type. Tensors that matter more get
// types of more bits; TypeOf says which.
type FileType uint32

// The file types. The K types have mixtures: S (small), M and L.
const (
	FileF32     FileType = 0
	FileF16     FileType = 1
	FileQ4_0    FileType = 2
	FileQ4_1    FileType = 3
	FileQ8_0    FileType = 7
	FileQ5_0    FileType = 8
	FileQ5_1    FileType = 9
	FileQ2K     FileType = 10
	FileQ3KS    FileType = 11
	FileQ3KM    FileType = 12
	FileQ3KL    FileType = 13
	FileQ4KS    FileType = 14
	FileQ4KM    FileType = 15
	FileQ5KS    FileType = 16
	FileQ5KM    FileType = 17
	FileQ6K     FileType = 18
	FileIQ2XXS  FileType = 19
	FileIQ2XS   FileType = 20
	FileQ2KS    FileType = 21
	FileIQ3XS   FileType = 22
	FileIQ3XXS  FileType = 23
	FileIQ1S    FileType = 24
	FileIQ4NL   FileType = 25
	FileIQ3S    FileType = 26
	FileIQ3M    FileType = 27
	FileIQ2S    FileType = 28
	FileIQ2M    FileType = 29
	FileIQ4XS   FileType = 30
	FileIQ1M    FileType = 31
	FileBF16    FileType = 32
	FileTQ1_0   FileType = 36
	FileTQ2_0   FileType = 37
	FileMXFP4   FileType = 38 // MXFP4_MOE: for experts, Q8_0 for all else
	FileNVFP4   FileType = 39 // only known by its number
	FileQ1_0    FileType = 40
	FileQ2_0    FileType = 41
	lastOfFiles          = FileQ2_0
)

// The types that are no blocks, and Keep: a tensor that stays as it is.
const (
	F32  Type = 0
	F16  Type = 1
	BF16 Type = 30
	Keep Type = math.MaxUint32
)

// files has the name of each file type and the type of a tensor that no rule is about.
var files = [lastOfFiles + 1]struct {
	name string
	base Type
}{
	FileF32: {"f32", F32}, FileF16: {"f16", F16}, FileBF16: {"bf16", BF16},
	FileQ4_0: {"q4_0", Q4_0}, FileQ4_1: {"q4_1", Q4_1}, FileQ5_0: {"q5_0", Q5_0}, FileQ5_1: {"q5_1", Q5_1},
	FileQ8_0: {"q8_0", Q8_0}, FileQ1_0: {"q1_0", Q1_0}, FileQ2_0: {"q2_0", Q2_0},
	FileQ2K: {"q2_k", Q2K}, FileQ2KS: {"q2_k_s", Q2K},
	FileQ3KS: {"q3_k_s", Q3K}, FileQ3KM: {"q3_k_m", Q3K}, FileQ3KL: {"q3_k_l", Q3K},
	FileQ4KS: {"q4_k_s", Q4K}, FileQ4KM: {"q4_k_m", Q4K},
	FileQ5KS: {"q5_k_s", Q5K}, FileQ5KM: {"q5_k_m", Q5K}, FileQ6K: {"q6_k", Q6K},
	FileIQ1S: {"iq1_s", IQ1S}, FileIQ1M: {"iq1_m", IQ1M},
	FileIQ2XXS: {"iq2_xxs", IQ2XXS}, FileIQ2XS: {"iq2_xs", IQ2XS}, FileIQ2S: {"iq2_s", IQ2XS}, FileIQ2M: {"iq2_m", IQ2S},
	FileIQ3XXS: {"iq3_xxs", IQ3XXS}, FileIQ3XS: {"iq3_xs", IQ3S}, FileIQ3S: {"iq3_s", IQ3S}, FileIQ3M: {"iq3_m", IQ3S},
	FileIQ4NL: {"iq4_nl", IQ4NL}, FileIQ4XS: {"iq4_xs", IQ4XS},
	FileTQ1_0: {"tq1_0", TQ1_0}, FileTQ2_0: {"tq2_0", TQ2_0}, FileMXFP4: {"mxfp4_moe", MXFP4},
	FileNVFP4: {"nvfp4", Keep},
}

// FileTypes lists the file types that TypeOf has rules for, by their numbers.
func FileTypes() (all []FileType) {
	for f := range FileType(len(files)) {
		if f.Valid() {
			all = append(all, f)
		}
	}
	return all
}

// Valid reports whether TypeOf has rules for f.
func (f FileType) Valid() bool {
	return int(f) < len(files) && files[f].name != "" && files[f].base != Keep
}

// String returns the name in lower case, such as "q4_k_m".
func (f FileType) String() string {
	if int(f) >= len(files) || files[f].name == "" {
		return fmt.Sprintf("FileType(%d)", uint32(f))
	}
	return files[f].name
}

// Model is what TypeOf has to know of a model.
type Model struct {
	Architecture   string // general.architecture
	Blocks         int    // block_count
	Heads, KVHeads int    // attention.head_count and attention.head_count_kv, of the first block where they differ
	Experts        int    // expert_count, 0 where there is none
}

// Tensor is a tensor of a GGUF file: its name there, and its shape, the slowest dimension first.
type Tensor struct {
	Name  string
	Shape tensor.Shape
}

// Kinds of errors of TypeOf.
var (
	// ErrImportance says that a type is not made without an importance matrix.
	ErrImportance = errors.New("needs an importance matrix")
	// ErrNoType says that there is no type for a tensor.
	ErrNoType = errors.New("no type for a tensor")
)

// TypeOf returns the type that llama.cpp's llama-quantize gives each tensor of a model, without an importance matrix.
// The order of the tensors does not matter.
func TypeOf(f FileType, tensors []Tensor, m Model) ([]Type, error) {
	if !f.Valid() {
		return nil, fmt.Errorf("file type %v: %w", f, ErrNoType)
	}
	c := choice{file: f, model: m, tied: true}
	for _, t := range tensors {
		switch kindOf(t.Name) {
		case attentionV:
			c.values++
		case output:
			c.tied = false
		}
	}
	types := make([]Type, len(tensors))
	for _, i := range inOrder(tensors) {
		t := tensors[i]
		if !Quantised(t) {
			types[i] = Keep
			continue
		}
		var err error
		if types[i], err = c.next(t); err != nil {
			return nil, fmt.Errorf("tensor %s to %v: %w", tensor.Quote(t.Name), f, err)
		}
	}
	return types, nil
}

// inOrder lists indices as llama.cpp orders tensors: by block, those in none first, then by name.
func inOrder(tensors []Tensor) []int {
	order := make([]int, len(tensors))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := tensors[a].Name, tensors[b].Name
		return cmp.Or(cmp.Compare(blockNumber(x), blockNumber(y)), strings.Compare(x, y))
	})
	return order
}

// blockNumber is the N of a name that begins with blk.N., -1 of others.
func blockNumber(name string) int {
	rest, ok := strings.CutPrefix(name, "blk.")
	digits, _, dot := strings.Cut(rest, ".")
	n, err := strconv.Atoi(digits)
	if !ok || !dot || err != nil || n < 0 {
		return -1
	}
	return n
}

// neverWhole and neverParts are the names, and what is in the names, of tensors that are not quantised.
var (
	neverWhole = []string{"position_embd.weight", "token_types.weight"}
	neverParts = []string{
		"_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
		"ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
		"time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
		"time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
		"time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
		"time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
		".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
	}
)

// FileOf is the file type that a file is which has one block type, false where there is none.
func FileOf(t Type) (FileType, bool) {
	for _, f := range []FileType{FileQ3KS, FileQ4KS, FileQ5KS} { // the others of a K type are mixtures
		if files[f].base == t {
			return f, true
		}
	}
	for _, f := range FileTypes() {
		if f.String() == t.Name() {
			return f, true
		}
	}
	switch t {
	case MXFP4:
		return FileMXFP4, true
	case NVFP4:
		return FileNVFP4, true
	}
	return 0, false
}

// Quantised reports whether a file type quantises a tensor at all. A matrix of one row is a vector.
func Quantised(t Tensor) bool {
	dimensions := len(t.Shape)
	for _, n := range t.Shape {
		if n != 1 {
			break
		}
		dimensions--
	}
	return dimensions >= 2 && strings.HasSuffix(t.Name, "weight") && !slices.Contains(neverWhole, t.Name) &&
		!slices.ContainsFunc(neverParts, func(p string) bool { return strings.Contains(t.Name, p) })
}

// kind is what a tensor is in a model.
type kind int

const (
	other kind = iota
	output
	embedding
	attentionV // what makes values: also together with queries and keys, or with keys
	attentionK
	attentionQ
	attentionOutput
	up
	gate
	down
)

// kinds are what is in the names of each kind, in the order in which they are looked for.
var kinds = []struct {
	part string
	kind kind
}{
	{"attn_qkv.weight", attentionV}, {"attn_kv_b.weight", attentionV}, {"attn_v.weight", attentionV},
	{"attn_k.weight", attentionK}, {"attn_q.weight", attentionQ}, {"attn_output.weight", attentionOutput},
	{"ffn_up", up}, {"ffn_gate", gate}, {"ffn_down", down},
}

func kindOf(name string) kind {
	switch name {
	case "output.weight":
		return output
	case "token_embd.weight", "per_layer_token_embd.weight":
		return embedding
	}
	for _, k := range kinds {
		if strings.Contains(name, k.part) {
			return k.kind
		}
	}
	return other
}

// rule says which type a tensor gets in some file types, if a condition holds; nil always does.
type rule struct {
	files []FileType
	when  func(c *choice) bool
	typ   Type
}

// rules are, by kind, looked at from the first on; the first that fits is taken, and the base where none does, or where
// it says Keep. Experts and the 70B model come on top (ruled).
var rules = map[kind][]rule{
	embedding: {
		{files: []FileType{FileTQ1_0, FileTQ2_0, FileQ2_0}, typ: Q4K},
		{files: []FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M}, typ: Q2K},
		{files: []FileType{FileIQ2S, FileIQ2M, FileIQ3XXS}, typ: IQ3S},
	},
	attentionV: {
		{[]FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M, FileIQ2S, FileIQ2M}, (*choice).groupedOrExperts, Q4K},
		{files: []FileType{FileIQ2S, FileIQ2M}, typ: IQ3S},
		{files: []FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M}, typ: Q2K},
		{[]FileType{FileQ2K, FileQ2KS, FileIQ3XXS, FileIQ3XS, FileIQ3S}, (*choice).grouped, Q4K},
		{files: []FileType{FileQ2K}, typ: Q3K},
		{files: []FileType{FileIQ3XXS}, typ: IQ3S},
		{files: []FileType{FileIQ3M}, typ: Q4K},
		{[]FileType{FileQ3KM}, first(2), Q5K},
		{files: []FileType{FileQ3KM}, typ: Q4K},
		{files: []FileType{FileQ3KL}, typ: Q5K},
		{[]FileType{FileIQ4NL, FileIQ4XS}, (*choice).grouped, Q5K},
		{[]FileType{FileQ4KM, FileQ5KM}, (*choice).more, Q6K},
		{[]FileType{FileQ4KS}, first(4), Q5K},
	},
	attentionK: {
		{[]FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M, FileIQ2S, FileIQ2M}, (*choice).eight, Q4K},
		{when: (*choice).eight, typ: Q8_0},
		{files: []FileType{FileIQ3XS}, typ: IQ3XXS},
		{files: []FileType{FileIQ3XXS}, typ: IQ2S},
	},
	attentionQ: {
		{files: []FileType{FileIQ3XS}, typ: IQ3XXS},
		{files: []FileType{FileIQ3XXS}, typ: IQ2S},
	},
	down: {
		{[]FileType{FileIQ2S, FileIQ2M}, (*choice).eighth, IQ3S},
		{[]FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M}, (*choice).eighth, Q2K},
		{files: []FileType{FileQ2K}, typ: Q3K},
		{[]FileType{FileQ2KS, FileIQ3XXS, FileIQ3M}, (*choice).eighth, Q4K},
		{files: []FileType{FileIQ3XXS}, typ: Q3K},
		{[]FileType{FileIQ3M}, (*choice).eightAndMore, Q4K},
		{[]FileType{FileQ3KM}, (*choice).sixteenth, Q5K},
		{[]FileType{FileQ3KM}, (*choice).more, Q4K},
		{[]FileType{FileQ3KM}, (*choice).falcon, Q3K},
		{files: []FileType{FileQ3KM}, typ: Q4K},
		{[]FileType{FileQ3KL}, (*choice).falcon, Q4K},
		{files: []FileType{FileQ3KL}, typ: Q5K},
		{[]FileType{FileQ4KM}, (*choice).falconSixteenth, Q6K},
		{[]FileType{FileQ4KM}, (*choice).falconMore, Q5K},
		{[]FileType{FileQ4KM}, (*choice).falcon, Q4K},
		{[]FileType{FileQ4KM, FileQ5KM}, (*choice).more, Q6K},
		{[]FileType{FileQ4KS}, (*choice).falcon, Q4K},
		{[]FileType{FileQ4KS, FileIQ4NL, FileIQ4XS}, (*choice).eighth, Q5K},
	},
	attentionOutput: {
		{[]FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M, FileIQ2S, FileIQ2M}, (*choice).eight, Q5K},
		{files: []FileType{FileIQ1S, FileIQ1M}, typ: IQ2XXS},
		{files: []FileType{FileIQ2S, FileIQ2M}, typ: IQ3S},
		{[]FileType{FileQ3KL}, (*choice).falcon, Q4K},
		{[]FileType{FileQ2K, FileQ3KM, FileIQ3M, FileIQ3XXS}, (*choice).falcon, Keep},
		{[]FileType{FileQ2K, FileIQ3XS, FileIQ3XXS, FileQ3KS, FileQ3KM, FileIQ4NL, FileQ4KS, FileQ4KM, FileIQ3S, FileIQ3M,
			FileIQ4XS}, (*choice).eightNotFalcon, Q5K},
		{[]FileType{FileQ3KL}, (*choice).eight, Keep},
		{files: []FileType{FileQ2K}, typ: Q3K},
		{files: []FileType{FileIQ3XXS}, typ: IQ3S},
		{files: []FileType{FileQ3KM, FileIQ3M}, typ: Q4K},
		{files: []FileType{FileQ3KL}, typ: Q5K},
	},
	gate: {{[]FileType{FileIQ3XS}, (*choice).middle, IQ3XXS}},
	up:   {{[]FileType{FileIQ3XS}, (*choice).middle, IQ3XXS}},
}

// choice goes through the tensors of a model.
type choice struct {
	file   FileType
	model  Model
	tied   bool          // there is no output.weight, so that the embeddings are it
	values int           // how many tensors of the kind attentionV there are
	seen   [down + 1]int // of each kind
	// i of n is the place of the tensor in hand among those of its kind.
	i, n int
}

func first(n int) func(c *choice) bool { return func(c *choice) bool { return c.i < n } }

// more holds for the first and the last eighth, and for every third in between.
func (c *choice) more() bool {
	return c.i < c.n/8 || c.i >= 7*c.n/8 || (c.i-c.n/8)%3 == 2
}

func (c *choice) eighth() bool    { return c.i < c.n/8 }
func (c *choice) sixteenth() bool { return c.i < c.n/16 }
func (c *choice) middle() bool    { return c.i >= c.n/8 && c.i < 7*c.n/8 }
func (c *choice) eight() bool     { return c.model.Experts == 8 }
func (c *choice) falcon() bool    { return c.model.Architecture == "falcon" }

// grouped reports whether at least four heads share keys and values.
func (c *choice) grouped() bool { return c.model.KVHeads > 0 && c.model.Heads/c.model.KVHeads >= 4 }

func (c *choice) groupedOrExperts() bool { return c.grouped() || c.model.Experts >= 4 }
func (c *choice) eightAndMore() bool     { return c.eight() && c.more() }
func (c *choice) eightNotFalcon() bool   { return c.eight() && !c.falcon() }
func (c *choice) falconSixteenth() bool  { return c.falcon() && c.sixteenth() }
func (c *choice) falconMore() bool       { return c.falcon() && c.more() }

// importance are the file types with rules of their own, for which experts and the 70B model do not matter.
var importance = []FileType{FileIQ2XXS, FileIQ2XS, FileIQ1S, FileIQ1M, FileIQ2S, FileIQ2M}

// next returns the type of the next tensor that is quantised.
func (c *choice) next(t Tensor) (Type, error) {
	base := files[c.file].base
	if !base.Valid() {
		return base, nil // F32, F16, BF16
	}
	k := kindOf(t.Name)
	typ, err := base, error(nil)
	switch {
	case k == output || k == embedding && c.tied:
		typ = c.outputType(t, base)
	case c.file == FileMXFP4:
		typ = Q8_0
		if n := len(t.Shape); n > 2 && t.Shape[n-3] > 1 {
			typ = MXFP4
		}
	default:
		if err = c.place(k, t.Name); err == nil {
			typ = c.ruled(k, base)
		}
	}
	if err == nil {
		typ, err = fitting(typ, t.Shape[len(t.Shape)-1])
	}
	if err == nil && k != output && k != embedding && c.needsImportance(typ) {
		err = fmt.Errorf("%w: its type would be %v", ErrImportance, typ)
	}
	return typ, err
}

// outputType is that of the output, or of the embeddings that it is.
func (c *choice) outputType(t Tensor, base Type) Type {
	switch {
	case c.file == FileMXFP4, c.falcon(), t.Shape[len(t.Shape)-1]%int64(base.Elements()) != 0, base == Q8_0:
		return Q8_0
	case slices.Contains(importance, c.file), c.file == FileIQ3XXS:
		return Q5K
	}
	return Q6K
}

// place finds the tensor's place among its kind. In a model of experts, of which a block may have many tensors, it is
// the block.
func (c *choice) place(k kind, name string) error {
	c.i, c.n = c.seen[k], c.model.Blocks
	c.seen[k]++
	switch k {
	case attentionV:
		c.n = c.values
	case up, gate, down:
		if c.model.Experts > 1 && !slices.Contains(importance, c.file) {
			if c.i = blockNumber(name); c.i < 0 || c.i >= c.n {
				return fmt.Errorf("%w: found block %d, expected one of %d", ErrNoType, c.i, c.n)
			}
		}
	}
	return nil
}

func (c *choice) ruled(k kind, base Type) Type {
	typ := base
	for _, r := range rules[k] {
		if (r.files == nil || slices.Contains(r.files, c.file)) && (r.when == nil || r.when(c)) {
			typ = r.typ
			break
		}
	}
	if typ == Keep {
		typ = base
	}
	if k != attentionV || slices.Contains(importance, c.file) {
		return typ
	}
	if c.model.Architecture == "llama" && c.model.Blocks == 80 && c.model.Heads != c.model.KVHeads &&
		(typ == Q3K || typ == Q4K) {
		typ = Q5K // the 70B model
	}
	if c.eight() {
		typ = Q8_0
	}
	return typ
}

// fallbacks are the types of rows that are no whole blocks of a type.
var fallbacks = map[Type]Type{
	Q2K: Q4_0, Q3K: Q4_0, TQ1_0: Q4_0, TQ2_0: Q4_0, Q2_0: Q4_0, Q4K: Q5_0, Q5K: Q5_1, Q6K: Q8_0,
	IQ1S: IQ4NL, IQ1M: IQ4NL, IQ2XXS: IQ4NL, IQ2XS: IQ4NL, IQ2S: IQ4NL, IQ3XXS: IQ4NL, IQ3S: IQ4NL, IQ4XS: IQ4NL,
}

// fitting returns a type that a row of so many elements can have.
func fitting(typ Type, row int64) (Type, error) {
	if row%int64(typ.Elements()) == 0 {
		return typ, nil
	}
	to, ok := fallbacks[typ]
	if !ok && typ.Elements() > 32 {
		return 0, fmt.Errorf("%w: a row has %d elements, expected a multiple of %d for %v, which has no fallback", ErrNoType,
			row, typ.Elements(), typ)
	}
	if !ok || row%int64(to.Elements()) != 0 {
		return F16, nil
	}
	return to, nil
}

func (c *choice) needsImportance(typ Type) bool {
	switch typ {
	case IQ3XXS, IQ2XXS, IQ2XS, IQ2S, IQ1M, IQ1S:
		return true
	}
	return typ == Q2K && c.file == FileQ2KS
}
