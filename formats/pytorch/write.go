package pytorch

import "strconv"

// mostBatch is how many items Python's pickler sets at once.
const mostBatch = 1000

// pickleDict writes a dict of tensors as Python's pickler does for torch.save, in protocol 2. The storage of each
// tensor is named by its place in the dict.
func pickleDict(tensors []storedTensor) []byte {
	p := pickler{b: []byte{opProto, 2}, memo: map[string]int{}}
	p.b = append(p.b, opEmptyDict)
	p.put()
	item := func(i int) {
		p.str(tensors[i].name)
		p.put()
		p.tensor(tensors[i], i)
	}
	if len(tensors) == 1 {
		item(0)
		p.b = append(p.b, opSetItem, opStop)
		return p.b
	}
	// Behind a last batch that is full there is an empty one.
	for i := 0; len(tensors) > 0; i += mostBatch {
		batch := min(mostBatch, len(tensors)-i)
		p.b = append(p.b, opMark)
		for k := range batch {
			item(i + k)
		}
		p.b = append(p.b, opSetItems)
		if batch < mostBatch {
			break
		}
	}
	p.b = append(p.b, opStop)
	return p.b
}

// pickler writes opcodes. What is pushed is memoised, as Python does, whether it is needed again or not.
type pickler struct {
	b    []byte
	next int            // number of the memo
	memo map[string]int // of the globals and strings that come again
}

// tensor calls torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad,
// backward_hooks), or _v3 with the dtype behind.
func (p *pickler) tensor(t storedTensor, key int) {
	rebuild, module := "_rebuild_tensor_v2", "torch"
	class := t.class
	if t.dtype != "" {
		rebuild, module, class = "_rebuild_tensor_v3", "torch.storage", "UntypedStorage"
	}
	p.global("torch._utils", rebuild)
	p.b = append(p.b, opMark, opMark)
	p.constant("storage")
	p.global(module, class)
	p.str(strconv.Itoa(key))
	p.put()
	p.constant("cpu")
	p.int(t.count)
	p.b = append(p.b, opTuple)
	p.put()
	p.b = append(p.b, opBinPersID)
	p.int(0)
	p.tuple(t.shape)
	p.tuple(t.stride)
	p.b = append(p.b, opNewFalse)
	p.global("collections", "OrderedDict")
	p.b = append(p.b, opEmptyTuple, opReduce)
	p.put()
	if t.dtype != "" {
		p.global("torch", t.dtype)
	}
	p.b = append(p.b, opTuple)
	p.put()
	p.b = append(p.b, opReduce)
	p.put()
}

// put memoises what is on top.
func (p *pickler) put() {
	if p.next <= 0xff {
		p.b = append(p.b, opBinPut, byte(p.next))
	} else {
		p.b = le.AppendUint32(append(p.b, opLongBinPut), uint32(p.next))
	}
	p.next++
}

// again pushes what is memoised under the name, if it is. Else what write pushes will be.
func (p *pickler) again(name string, write func()) {
	switch n, ok := p.memo[name]; {
	case !ok:
		write()
		p.memo[name] = p.next
		p.put()
	case n <= 0xff:
		p.b = append(p.b, opBinGet, byte(n))
	default:
		p.b = le.AppendUint32(append(p.b, opLongBinGet), uint32(n))
	}
}

func (p *pickler) global(module, name string) {
	p.again(module+"."+name, func() {
		p.b = append(p.b, opGlobal)
		p.b = append(p.b, module+"\n"+name+"\n"...)
	})
}

func (p *pickler) constant(s string) { p.again(s, func() { p.str(s) }) }

func (p *pickler) str(s string) {
	p.b = le.AppendUint32(append(p.b, opBinUnicode), uint32(len(s)))
	p.b = append(p.b, s...)
}

// tuple pushes a tuple of numbers. The empty one is not memoised.
func (p *pickler) tuple(items []int64) {
	if len(items) == 0 {
		p.b = append(p.b, opEmptyTuple)
		return
	}
	if len(items) > 3 {
		p.b = append(p.b, opMark)
	}
	for _, n := range items {
		p.int(n)
	}
	p.b = append(p.b, [...]byte{0, opTuple1, opTuple2, opTuple3, opTuple}[min(len(items), 4)])
	p.put()
}

// int pushes a number from 0 on.
func (p *pickler) int(n int64) {
	switch {
	case n <= 0xff:
		p.b = append(p.b, opBinInt1, byte(n))
	case n <= 0xffff:
		p.b = le.AppendUint16(append(p.b, opBinInt2), uint16(n))
	case n <= 0x7fffffff:
		p.b = le.AppendUint32(append(p.b, opBinInt), uint32(n))
	default: // as many bytes as its sign needs
		var long []byte
		for x := n; x > 0; x >>= 8 {
			long = append(long, byte(x))
		}
		if long[len(long)-1] > 0x7f {
			long = append(long, 0)
		}
		p.b = append(append(p.b, opLong1, byte(len(long))), long...)
	}
}
