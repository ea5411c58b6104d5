package train

import (
	"strconv"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// shape is that of the weight.
func (l linear) shape() tensor.Shape {
	if l.conv {
		return tensor.Shape{int64(l.in), int64(l.out)}
	}
	return tensor.Shape{int64(l.out), int64(l.in)}
}

func (l linear) parameters() []param {
	kind := models.Linear
	if l.conv {
		kind = models.Conv1D
	}
	list := []param{{l.module + ".weight", l.shape(), kind}}
	if l.bias {
		list = append(list, param{l.module + ".bias", tensor.Shape{int64(l.out)}, models.Other})
	}
	return list
}

// parameters lists those of a norm, for so many heads where each has its own.
func (n *norm) parameters(heads int) []param {
	if n == nil {
		return nil
	}
	shape := tensor.Shape{int64(n.width)}
	if n.perHead {
		var list []param
		for h := range heads {
			one := norm{module: n.module + ".norms." + strconv.Itoa(h), width: n.width, bias: n.bias}
			list = append(list, one.parameters(0)...)
		}
		return list
	}
	list := []param{{n.module + ".weight", shape, models.Other}}
	if n.bias {
		list = append(list, param{n.module + ".bias", shape, models.Other})
	}
	return list
}

// parameters lists every parameter of the running model once, in the order in which they are used. A tied head is
// left out.
func (s *spec) parameters() []param {
	list := []param{{s.embedding + ".weight", tensor.Shape{int64(s.vocab), int64(s.hidden)}, models.Embedding}}
	if s.positions != "" {
		shape := tensor.Shape{int64(s.maxPositions), int64(s.hidden)}
		list = append(list, param{s.positions + ".weight", shape, models.Embedding})
	}
	for i := range s.layers {
		list = append(list, s.layers[i].parameters()...)
	}
	list = append(list, s.finalNorm.parameters(0)...)
	for _, p := range s.head.parameters() {
		if p.kind == models.Other || !s.tied {
			list = append(list, p)
		}
	}
	return list
}

func (l *layer) parameters() []param {
	a := &l.attention
	list := l.beforeAttention.parameters(0)
	for _, m := range []*linear{a.q, a.k, a.v, a.fused} {
		if m != nil {
			list = append(list, m.parameters()...)
		}
	}
	list = append(list, a.qNorm.parameters(a.heads)...)
	list = append(list, a.kNorm.parameters(a.keyHeads)...)
	list = append(list, a.out.parameters()...)
	list = append(list, l.afterAttention.parameters(0)...)
	list = append(list, l.beforeMLP.parameters(0)...)
	if m := l.mlp; m != nil {
		for _, m := range []*linear{m.gate, m.up, m.gateUp, &m.down} {
			if m != nil {
				list = append(list, m.parameters()...)
			}
		}
	}
	if e := l.experts; e != nil {
		count, hidden, width := int64(e.count), int64(e.hidden), int64(e.width)
		list = append(list,
			param{e.router.module + ".weight", e.router.shape(), models.Router},
			param{e.gateUp, tensor.Shape{count, 2 * width, hidden}, models.Expert},
			param{e.down, tensor.Shape{count, hidden, width}, models.Expert})
	}
	return append(list, l.afterMLP.parameters(0)...)
}

// elements counts the numbers of all parameters, in floating point, where nothing overflows.
func (s *spec) elements() float64 {
	var n float64
	for _, p := range s.parameters() {
		elements := 1.0
		for _, d := range p.shape {
			elements *= float64(d)
		}
		n += elements
	}
	return n
}
