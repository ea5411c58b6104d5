package pytorch

import (
	"fmt"
	"math"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/tensor"
)

// global is one of the names that a pickle may mention. The list is closed.
type global struct {
	name  string
	role  role
	dtype elements // of a dtype or a storage class
}

type role int

const (
	asOrderedDict role = iota
	asCounter
	asSize
	asEncode    // _codecs.encode: bytes in protocol 2
	asByteArray // bytes too
	asSet
	asOpaque   // complex, torch.device: made and left out
	asClass    // torch.Tensor and its like: named, never called
	asDType    // torch.bfloat16
	asStorage  // torch.BFloat16Storage
	asRebuild1 // storage, offset, size, stride
	asRebuild2 // … requires_grad, backward_hooks, [metadata]
	asRebuild3 // … requires_grad, backward_hooks, dtype, [metadata]
	asParameter
	asParameterWithState
	asFromType // func, type, args, state
	asUnsupported
)

// elements is a type of elements: tensor.DType where there is one of it.
type elements struct {
	name  string // such as "torch.bfloat16"
	dtype tensor.DType
	bytes int64 // of what PyTorch counts as one element
}

// globals has the closed list by "module.name".
var globals = sync.OnceValue(func() map[string]*global {
	all := map[string]*global{}
	add := func(r role, names ...string) {
		for _, name := range names {
			all[name] = &global{name: name, role: r}
		}
	}
	add(asOrderedDict, "collections.OrderedDict")
	add(asCounter, "collections.Counter")
	add(asSize, "torch.Size")
	add(asEncode, "_codecs.encode")
	add(asByteArray, "builtins.bytearray")
	add(asSet, "builtins.set", "builtins.frozenset")
	add(asOpaque, "builtins.complex", "torch.device")
	add(asClass, "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
	add(asRebuild1, "torch._utils._rebuild_tensor")
	add(asRebuild2, "torch._utils._rebuild_tensor_v2")
	add(asRebuild3, "torch._utils._rebuild_tensor_v3")
	add(asParameter, "torch._utils._rebuild_parameter")
	add(asParameterWithState, "torch._utils._rebuild_parameter_with_state")
	add(asFromType, "torch._tensor._rebuild_from_type_v2")
	add(asUnsupported, "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
		"torch._utils._rebuild_nested_tensor",
		"torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_wrapper_subclass",
		"torch._utils._rebuild_xla_tensor",
		"torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_device_tensor_from_cpu_tensor")

	named := func(torch string, bytes int64) elements {
		e := elements{name: "torch." + torch, bytes: bytes}
		if d, err := tensor.ParseDType(torch); err == nil {
			e.dtype = d
		}
		return e
	}
	dtype := func(e elements) { all[e.name] = &global{e.name, asDType, e} }
	for d := tensor.DType(1); d.Valid(); d++ {
		if d.Torch() != "" {
			dtype(named(d.Torch(), max(1, d.Bits()/8)))
		}
	}
	for name, bytes := range map[string]int64{
		"complex128": 16, "complex32": 4, "bcomplex32": 4, "quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
		"bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1,
	} {
		dtype(named(name, bytes))
	}
	for bits := range 7 {
		dtype(named(fmt.Sprintf("int%d", bits+1), 1))
		dtype(named(fmt.Sprintf("uint%d", bits+1), 1))
	}

	for class, torch := range map[string]string{
		"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
		"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
		"BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
		"QInt8Storage": "qint8", "QInt32Storage": "qint32", "QUInt8Storage": "quint8", "QUInt4x2Storage": "quint4x2",
		"QUInt2x4Storage": "quint2x4",
	} {
		for _, module := range []string{"torch.", "torch.cuda."} { // old files name the device
			all[module+class] = &global{module + class, asStorage, all["torch."+torch].dtype}
		}
	}
	for _, class := range []string{"torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage",
		"torch.cuda.UntypedStorage"} {
		all[class] = &global{class, asStorage, all["torch.uint8"].dtype}
	}
	return all
})

// renamed are modules that have other names today.
var renamed = map[string]string{"__builtin__": "builtins", "torch.tensor": "torch._tensor"}

func (m *machine) pushGlobal(module, name string) error {
	if now, ok := renamed[module]; ok {
		module = now
	}
	full := module + "." + name
	g, ok := globals()[full]
	switch {
	case !ok:
		return fmt.Errorf("global %s is %w, expected only tensors in dicts", tensor.Quote(full), ErrUnsafe)
	case g.role == asUnsupported:
		what := strings.TrimPrefix(name, "_rebuild_")
		return unsupportedf("global %s: a tensor of the kind %s, expected one with plain strided elements",
			tensor.Quote(full), what)
	}
	return m.push(g, 0)
}

// storageRef is a storage that the pickle mentions: bytes that lie outside of it.
type storageRef struct {
	key      string
	elements elements
	count    int64
}

// bytes is the size that the pickle says.
func (s *storageRef) bytes() int64 { return s.count * s.elements.bytes }

// tensorRef is a tensor as the pickle describes it. Offset and stride count elements. Nothing of it has been checked
// but that no number is negative.
type tensorRef struct {
	storage       *storageRef
	elements      elements
	offset        int64
	shape, stride []int64
	state         any // attributes of the object
}

// pushStorage makes a storage of a persistent id: the tuple ("storage", class, key, device, number of elements), in
// old files with a view behind it.
func (m *machine) pushStorage(id any) error {
	t, _ := id.(*tuple)
	if t == nil || len(t.items) < 5 || len(t.items) > 6 || text(t.items[0]) != "storage" {
		return fmt.Errorf("persistent id: %s that is no storage is %w", kind(id), ErrUnsafe)
	}
	class, _ := t.items[1].(*global)
	key, isText := t.items[2].(string)
	count, isCount := t.items[4].(int64)
	switch {
	case class == nil || class.role != asStorage:
		return malformedf("found %s as the class of a storage, expected one of PyTorch's", kind(t.items[1]))
	case !isText:
		return malformedf("found %s as the key of a storage, expected a str", kind(t.items[2]))
	case !isCount || count < 0 || count > math.MaxInt64/class.dtype.bytes:
		return malformedf("storage %s: found %s as the number of its elements, expected one from 0 on whose bytes are below "+
			"2^63", tensor.Quote(key), show(t.items[4]))
	case len(t.items) == 6 && t.items[5] != nil:
		return unsupportedf("storage %s: found a view of another storage, as PyTorch before 0.4 writes it: save it again "+
			"with a newer one", tensor.Quote(key))
	}
	s := &storageRef{key, class.dtype, count}
	if known, ok := m.storages[key]; ok {
		if known.bytes() != s.bytes() {
			return malformedf("storage %s: found it with %d and with %d bytes, expected one size", tensor.Quote(key),
				known.bytes(), s.bytes())
		}
	} else {
		m.storages[key] = s
	}
	return m.push(s, 2*structBytes)
}

// text returns a string, or "".
func text(v any) string {
	s, _ := v.(string)
	return s
}

// show writes a number, or the kind of another value.
func show(v any) string {
	if n, ok := v.(int64); ok {
		return fmt.Sprint(n)
	}
	return kind(v)
}

// call makes what a global of the closed list would return. It never runs anything.
func (m *machine) call(f, args any) error {
	g, _ := f.(*global)
	if g == nil {
		return fmt.Errorf("a call of %s is %w", kind(f), ErrUnsafe)
	}
	t, _ := args.(*tuple)
	if t == nil {
		return malformedf("found %s as arguments of %s, expected a tuple", kind(args), g.name)
	}
	a := t.items
	wrong := func() error {
		return malformedf("found arguments of %s that it does not take: %d, the first %s", g.name, len(a), kind(first(a)))
	}
	switch g.role {
	case asOrderedDict:
		d := &dict{}
		if err := m.push(d, 2*structBytes); err != nil || len(a) == 0 {
			return err
		}
		// Python 2 gives the items as a list of pairs.
		pairs, ok := a[0].(*array)
		if !ok || len(a) != 1 {
			return wrong()
		}
		for _, p := range pairs.items {
			items := sequence(p)
			if len(items) != 2 {
				return wrong()
			}
			if err := m.setItems(items); err != nil {
				return err
			}
		}
		return nil
	case asCounter:
		d := &dict{}
		if len(a) == 1 {
			if d, _ = a[0].(*dict); d == nil {
				return wrong()
			}
		}
		return m.push(d, structBytes)
	case asSize:
		if _, ok := first(a).(*tuple); !ok || len(a) != 1 {
			return wrong()
		}
		return m.pushTuple(sequence(a[0]))
	case asEncode:
		s, ok := first(a).(string)
		if !ok || len(a) != 2 || text(a[1]) != "latin1" && text(a[1]) != "latin-1" {
			return wrong()
		}
		return m.push(byteString(s), numberBytes)
	case asByteArray:
		if len(a) == 0 {
			return m.push(byteString(""), numberBytes)
		}
		switch s := a[0].(type) {
		case byteString:
			return m.push(s, numberBytes)
		case string: // with its encoding
			return m.push(byteString(s), numberBytes)
		}
		return wrong()
	case asSet:
		if len(a) == 0 {
			return m.push(&array{set: true}, structBytes)
		}
		list, ok := a[0].(*array)
		if !ok || len(a) != 1 {
			return wrong()
		}
		if err := m.charge(valueBytes * len(list.items)); err != nil {
			return err
		}
		return m.push(&array{items: append([]any(nil), list.items...), set: true}, structBytes)
	case asOpaque:
		return m.push(&opaque{"a " + g.name}, structBytes)
	case asParameter, asParameterWithState:
		// data, requires_grad, backward_hooks, and the state.
		t, ok := first(a).(*tensorRef)
		switch {
		case !ok || g.role == asParameter && len(a) != 3 || g.role == asParameterWithState && len(a) != 4:
			return wrong()
		case g.role == asParameterWithState:
			return m.pushWithState(t, a[3])
		}
		return m.push(t, 0)
	case asFromType:
		if len(a) != 4 {
			return wrong()
		}
		inner, _ := a[0].(*global)
		class, _ := a[1].(*global)
		if inner == nil || inner.role < asRebuild1 || inner.role > asParameterWithState || class == nil ||
			class.role != asClass {
			return wrong()
		}
		if err := m.call(inner, a[2]); err != nil {
			return err
		}
		v, err := m.pop()
		if err != nil {
			return err
		}
		return m.pushWithState(v.(*tensorRef), a[3])
	case asRebuild1, asRebuild2, asRebuild3:
		return m.rebuild(g, a, wrong)
	}
	return fmt.Errorf("a call of %s is %w", tensor.Quote(g.name), ErrUnsafe)
}

// pushWithState pushes a tensor that has attributes of its own.
func (m *machine) pushWithState(t *tensorRef, state any) error {
	with := *t
	with.state = state
	return m.push(&with, 2*structBytes)
}

// rebuild makes a tensor of storage, offset, size, stride and what follows them.
func (m *machine) rebuild(g *global, a []any, wrong func() error) error {
	least := map[role]int{asRebuild1: 4, asRebuild2: 6, asRebuild3: 7}[g.role]
	if len(a) < least || len(a) > least+1 || g.role == asRebuild1 && len(a) != least {
		return wrong()
	}
	s, isStorage := a[0].(*storageRef)
	offset, isOffset := a[1].(int64)
	if !isStorage || !isOffset || offset < 0 {
		return wrong()
	}
	t := &tensorRef{storage: s, elements: s.elements, offset: offset}
	if g.role == asRebuild3 {
		d, _ := a[6].(*global)
		if d == nil || d.role != asDType {
			return wrong()
		}
		t.elements = d.dtype
	}
	if len(a) > least {
		// The bits that say that the elements are to be conjugated or negated.
		flags, ok := a[least].(*dict)
		if a[least] != nil && !ok || flags != nil && len(flags.values) > 2 { // conj and neg
			return wrong()
		}
		if flags != nil {
			for i, v := range flags.values {
				if v != false {
					return unsupportedf("found a tensor with the bit %s, expected plain elements", tensor.Quote(text(flags.keys[i])))
				}
			}
		}
	}
	var err error
	if t.shape, err = m.dimensions(a[2]); err != nil {
		return err
	}
	if t.stride, err = m.dimensions(a[3]); err != nil {
		return err
	}
	if len(t.shape) != len(t.stride) {
		return malformedf("found a tensor with %d dimensions and %d strides, expected as many", len(t.shape), len(t.stride))
	}
	return m.push(t, 3*structBytes)
}

// dimensions reads a tuple of numbers from 0 on.
func (m *machine) dimensions(v any) ([]int64, error) {
	t, ok := v.(*tuple)
	if !ok {
		return nil, malformedf("found %s as a size or stride, expected a tuple", kind(v))
	}
	if len(t.items) > m.limits.Rank {
		return nil, limitf("found %d dimensions, expected at most %d", len(t.items), m.limits.Rank)
	}
	if err := m.charge(8 * len(t.items)); err != nil {
		return nil, err
	}
	d := make([]int64, len(t.items))
	for i, x := range t.items {
		n, ok := x.(int64)
		if !ok || n < 0 {
			return nil, malformedf("found %s in a size or stride, expected a number from 0 on", show(x))
		}
		d[i] = n
	}
	return d, nil
}

// build sets the attributes of the OrderedDict on top, such as the _metadata of a module's state dict.
func (m *machine) build(state any) error {
	v, err := m.top()
	if err != nil {
		return err
	}
	d, ok := v.(*dict)
	if _, isDict := state.(*dict); !ok || !isDict {
		return fmt.Errorf("setting the state of %s is %w, expected only tensors in dicts", kind(v), ErrUnsafe)
	}
	d.state = state
	return nil
}

// sequence returns the items of a tuple or a list.
func sequence(v any) []any {
	switch v := v.(type) {
	case *tuple:
		return v.items
	case *array:
		return v.items
	}
	return nil
}

func first(a []any) any {
	if len(a) == 0 {
		return nil
	}
	return a[0]
}
