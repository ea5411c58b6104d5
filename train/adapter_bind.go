package train

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/internal/kernels"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/tensor"
)

// adapterBinder binds an adapter to the parameters of a model: lora.Bind says what each of them gets, and this makes
// trainables of it.
type adapterBinder struct {
	*adapter
	places map[*formats.Tensor]int // in adapter.stored
	params map[string]param
	absent map[string]bool // biases among params that the model does not have
	// Of a tied model the parameters of its two ends, else empty.
	embedding, head string
}

// bind fills the adapter.
func (a *adapter) bind(params []param, model *models.Model) error {
	b := &adapterBinder{adapter: a, places: map[*formats.Tensor]int{}, params: map[string]param{},
		absent: map[string]bool{}}
	tensors := a.of.Stored()
	for i := range tensors {
		a.stored = append(a.stored, stored{Tensor: &tensors[i]})
		b.places[&tensors[i]] = i
	}
	targets := b.targets(params, model)
	bound, err := lora.Bind([]lora.Weighted{{Adapter: a.of, Weight: 1}}, targets, model)
	if err != nil {
		return err
	}
	for _, n := range bound.Notices {
		if !bound.Untie || !strings.Contains(n, "is no longer tied to") { // a step leaves the base as it is
			a.notices = append(a.notices, n)
		}
	}
	for i, c := range bound.Changes {
		if c == nil {
			continue
		}
		ad, err := b.adaptation(b.params[targets[i].Name], c)
		if err != nil {
			return fmt.Errorf("%s: %w", a.of.Path, err)
		}
		a.params[targets[i].Name] = ad
	}
	for _, step := range []func() error{b.tie, b.rowsAlone, b.finish} {
		if err := step(); err != nil {
			return fmt.Errorf("%s: %w", a.of.Path, err)
		}
	}
	return nil
}

// targets are the model's parameters, and others that an adapter may be for: the head of a tied model, which is a
// parameter of its own to PEFT, and with lora_bias the biases of layers that have none.
func (b *adapterBinder) targets(params []param, model *models.Model) []lora.Target {
	params = slices.Clone(params)
	for _, p := range params {
		b.params[p.name] = p
	}
	head := model.Head() + ".weight"
	if source, ok := b.params[model.HeadSource()]; ok && model.Head() != "" {
		_, own := b.params[head]
		if !own && model.Tensor(head, source.shape).Tied == source.name {
			b.embedding, b.head = source.name, head
			params = append(params, param{name: head, shape: source.shape, kind: models.Linear})
		}
	}
	if b.of.Config.LoraBias {
		for _, p := range params {
			module, weight := strings.CutSuffix(p.name, ".weight")
			if _, ok := b.params[module+".bias"]; ok || !weight || len(p.shape) != 2 {
				continue
			}
			switch p.kind {
			case models.Linear:
				params = append(params, param{name: module + ".bias", shape: p.shape[:1]})
			case models.Conv1D:
				params = append(params, param{name: module + ".bias", shape: p.shape[1:]})
			default:
				continue
			}
			b.absent[module+".bias"] = true
		}
	}
	targets := make([]lora.Target, len(params))
	for i, p := range params {
		whole := models.Slice{Param: p.name, Expert: -1, Parts: 1, FileParts: 1}
		targets[i] = lora.Target{Name: p.name, Shape: p.shape,
			Role: models.Tensor{Kind: p.kind, Known: true, Runtime: []models.Slice{whole}}}
		b.params[p.name] = p
	}
	return targets
}

// trainable is that of a tensor of the file.
func (b *adapterBinder) trainable(t *formats.Tensor) (*trainable, error) {
	i, ok := b.places[t]
	if !ok {
		return nil, fmt.Errorf("%s: tensor %s: %w: it lies beside the adapter's own tensors, which alone are trained; "+
			"without the file in its folder the adapter is taken alone", t.File, tensor.Quote(t.Name), lora.ErrUnsupported)
	}
	s := &b.stored[i]
	if s.trainable == nil {
		s.trainable = &trainable{name: t.Name, shape: t.Shape}
	}
	return s.trainable, nil
}

// adaptation makes one of a change of a parameter.
func (b *adapterBinder) adaptation(p param, c *lora.Change) (*adaptation, error) {
	ad := &adaptation{}
	if c.Value != nil && b.absent[p.name] {
		return nil, fmt.Errorf("module %s: %w: the model has no %s", tensor.Quote(c.ValueOf.Module.String()), lora.ErrBase,
			tensor.Quote(p.name))
	}
	if c.Value != nil {
		if err := b.value(p, ad, c.ValueOf.Module); err != nil {
			return nil, err
		}
	}
	for i := range c.Updates {
		u := &c.Updates[i]
		var err error
		switch m := u.Module; m.Form {
		case lora.Rows:
			if ad.rows != nil {
				return nil, fmt.Errorf("module %s: %w: two tensors of rows for %s", tensor.Quote(m.Name), lora.ErrMalformed,
					tensor.Quote(p.name))
			}
			ad.indices = nil
			for _, row := range m.Indices {
				ad.indices = append(ad.indices, int(row))
			}
			ad.rows, err = b.trainable(m.Value)
		case lora.Bias:
			ad.biasScale = u.Scale
			ad.bias, err = b.trainable(m.Value)
		default:
			err = b.matrix(p, ad, u)
		}
		if err != nil {
			return nil, err
		}
	}
	return ad, nil
}

// value sets the value that stands for the base's own.
func (b *adapterBinder) value(p param, ad *adaptation, m *lora.Module) error {
	if !slices.Equal(m.Value.Shape, p.shape) {
		return fmt.Errorf("module %s: %w: its value has the shape %v, and %s of the model %v: a vocabulary that has grown "+
			"needs a base that has grown with it", tensor.Quote(m.String()), lora.ErrBase, m.Value.Shape, tensor.Quote(p.name),
			p.shape)
	}
	if b.trains(p, m) {
		t, err := b.trainable(m.Value)
		ad.value = t
		return err
	}
	i, ok := b.places[m.Value]
	if !ok {
		return fmt.Errorf("module %s: %w: a matrix of the base from another file than the adapter's",
			tensor.Quote(m.String()), lora.ErrUnsupported)
	}
	if d := m.Value.DType; !d.Float() && d != tensor.F64 {
		return fmt.Errorf("tensor %s: %w: its type is %v, expected floating-point numbers", tensor.Quote(m.Value.Name),
			lora.ErrUnsupported, d)
	}
	b.stored[i].copied = true
	ad.copied = b.stored[i].Tensor
	return nil
}

// trains reports whether PEFT trains a value, or loads it and leaves it as it is: the base's own matrix beside factors,
// or one that the file has and the config does not mean.
func (b *adapterBinder) trains(p param, m *lora.Module) bool {
	c := &b.of.Config
	if !m.Base && c.EnsureTie && (p.name == b.embedding || p.name == b.head) {
		return c.TrainsWhole(strings.TrimSuffix(b.embedding, ".weight")) ||
			c.TrainsWhole(strings.TrimSuffix(b.head, ".weight"))
	}
	bias := strings.Contains(m.String(), "bias")
	return !m.Base && (c.TrainsWhole(m.Name) || bias && c.BiasMode == "all" ||
		bias && c.BiasMode == "lora_only" && slices.Contains(b.of.Names(), m.Name))
}

// matrix adds a pair of factors.
func (b *adapterBinder) matrix(p param, ad *adaptation, u *lora.Update) error {
	m, dims := u.Module, p.shape
	experts := int64(0)
	if len(dims) == 3 {
		experts, dims = dims[0], dims[1:]
	}
	if len(dims) != 2 || u.Left.T == nil || u.Right.T == nil || u.Hadamard != nil || u.Waves != nil {
		return fmt.Errorf("module %s: %w: it is for %s of shape %v, expected a matrix or a stack of them",
			tensor.Quote(m.String()), lora.ErrUnsupported, tensor.Quote(p.name), p.shape)
	}
	if u.Rows != dims[0] || u.Cols != dims[1] || u.Col != 0 || u.Row%max(dims[0], 1) != 0 {
		err := fmt.Errorf("module %s: %w: it adapts %d x %d of the %d x %d elements of %s: expected factors for the whole "+
			"matrix", tensor.Quote(m.String()), lora.ErrUnsupported, u.Rows, u.Cols, dims[0], dims[1], tensor.Quote(p.name))
		if experts > 0 {
			return hint.With(err, hint.Hint{Function: "Convert", Option: "Experts", Value: "fused",
				Effect: "makes such an adapter of it"})
		}
		return err
	}
	l := &lowRank{rank: int(u.Rank), scale: u.Scale}
	left, right := u.Left, u.Right
	if p.kind == models.Conv1D || p.kind == models.Embedding { // the parameter is (in, out)
		left, right = u.Right.Transposed(), u.Left.Transposed()
	}
	var err error
	if l.b, err = b.factor(left); err != nil {
		return err
	}
	if l.a, err = b.factor(right); err != nil {
		return err
	}
	if m.Magnitude != nil {
		if m.Parameter || experts > 0 {
			return fmt.Errorf("module %s: %w: DoRA on a parameter, which PEFT refuses", tensor.Quote(m.String()),
				lora.ErrUnsupported)
		}
		t, err := b.trainable(m.Magnitude)
		if err != nil {
			return err
		}
		l.magnitude = &factor{of: t, rows: int(t.count()), cols: 1, rowStride: 1, colStride: 1}
	}
	if experts == 0 {
		if ad.plain != nil {
			return fmt.Errorf("module %s: %w: two pairs of factors for %s", tensor.Quote(m.String()), lora.ErrMalformed,
				tensor.Quote(p.name))
		}
		ad.plain = l
		return nil
	}
	if ad.experts == nil {
		ad.experts = make([]*lowRank, experts)
	}
	if e := u.Row / dims[0]; ad.experts[e] == nil {
		ad.experts[e] = l
		return nil
	}
	return fmt.Errorf("module %s: %w: two pairs of factors for an expert of %s", tensor.Quote(m.String()),
		lora.ErrMalformed, tensor.Quote(p.name))
}

// factor is a view of a trainable.
func (b *adapterBinder) factor(m lora.Matrix) (factor, error) {
	t, err := b.trainable(m.T)
	return factor{of: t, offset: int(m.Offset), rowStride: int(m.RowStride), colStride: int(m.ColStride),
		rows: int(m.Rows), cols: int(m.Cols)}, err
}

// tie does what PEFT does about the two ends of a tie.
func (b *adapterBinder) tie() error {
	if b.head == "" {
		return nil
	}
	embedding, head := b.adapter.params[b.embedding], b.adapter.params[b.head]
	b.shareCopy(embedding, head)
	if embedding != nil && embedding.rows != nil {
		head = b.adapter.params[b.head]
		if head == nil {
			head = &adaptation{}
			b.adapter.params[b.head] = head
		}
		switch {
		case head.rows == nil:
			head.rows, head.indices = embedding.rows, embedding.indices
		case head.rows != embedding.rows && slices.Equal(head.indices, embedding.indices):
			return fmt.Errorf("tensor %s: %w: it and %s are the same rows of both ends of a tie, of which PEFT trains one",
				tensor.Quote(head.rows.name), lora.ErrUnsupported, tensor.Quote(embedding.rows.name))
		}
	}
	if b.of.Config.EnsureTie {
		return b.ensureTie(cmp.Or(embedding, &adaptation{}), cmp.Or(head, &adaptation{}))
	}
	return nil
}

// rowsAlone refuses rows that are trained of a matrix that is trained whole or has magnitudes. PEFT knows factors
// beside them at a tied head only, which reads the rows and adds the factors' product to all of them.
func (b *adapterBinder) rowsAlone() error {
	for _, name := range slices.Sorted(maps.Keys(b.adapter.params)) {
		ad := b.adapter.params[name]
		with := ""
		switch {
		case ad.rows == nil:
			continue
		case ad.value != nil:
			with = "a new value of all of it"
		case ad.plain != nil && ad.plain.magnitude != nil:
			with = "a magnitude of DoRA"
		default:
			continue
		}
		return fmt.Errorf("tensor %s: %w: rows of %s, which has %s besides", tensor.Quote(ad.rows.name), lora.ErrUnsupported,
			tensor.Quote(name), with)
	}
	return nil
}

// shareCopy gives a copy of the base's matrix that the file has for one end of a tie to the other: PEFT loads it into
// the one matrix of both.
func (b *adapterBinder) shareCopy(embedding, head *adaptation) {
	of := func(ad *adaptation) *formats.Tensor {
		if ad == nil {
			return nil
		}
		return ad.copied
	}
	give := func(from *formats.Tensor, name string, to *adaptation) {
		if to == nil {
			to = &adaptation{}
			b.adapter.params[name] = to
		}
		if to.value == nil {
			to.copied = from
		}
	}
	switch e, h := of(embedding), of(head); {
	case e != nil && h == nil:
		give(e, b.head, head)
	case h != nil && e == nil:
		give(h, b.embedding, embedding)
	}
}

// ensureTie ties the ends of a model as ensure_weight_tying does: a new value is one parameter under two names, and of
// factors the head has those of the embedding, the other way round (see trainable.shares).
func (b *adapterBinder) ensureTie(embedding, head *adaptation) error {
	switch {
	case (head.plain != nil || head.value != nil) && !strings.HasSuffix(b.embedding, "embed_tokens.weight"):
		return fmt.Errorf("%s: %w: ensure_weight_tying is true, and PEFT does not tie an embedding of the name %s, expected "+
			"embed_tokens", tensor.Quote(b.head), lora.ErrUnsupported, tensor.Quote(b.embedding))
	case embedding.value != nil && head.value != nil:
		return b.oneValue(embedding, head)
	case embedding.value != nil || head.value != nil:
		end := cmp.Or(embedding.value, head.value)
		return fmt.Errorf("tensor %s: %w: ensure_weight_tying is true, and it has no other end in the file",
			tensor.Quote(end.name), lora.ErrMalformed)
	case embedding.plain != nil && head.plain != nil:
		return b.oneStorage(embedding.plain, head.plain)
	case embedding.plain != nil && !strings.HasSuffix(b.embedding, "embed_tokens.weight"):
		return nil // PEFT ties what is called embed_tokens or lm_head
	case embedding.plain != nil || head.plain != nil:
		end := cmp.Or(embedding.plain, head.plain)
		return fmt.Errorf("tensor %s: %w: ensure_weight_tying is true, and there are no factors for the other end of the "+
			"tie", tensor.Quote(end.a.of.name), lora.ErrMalformed)
	}
	return nil
}

// oneValue makes one trainable of two new values that are the same.
func (b *adapterBinder) oneValue(embedding, head *adaptation) error {
	e, h := b.source(embedding.value), b.source(head.value)
	if err := sameValues(lora.Matrix{T: e.Tensor, ColStride: 1, Rows: 1, Cols: e.Count()},
		lora.Matrix{T: h.Tensor, ColStride: 1, Rows: 1, Cols: h.Count()}); err != nil {
		return err
	}
	h.trainable, head.value = e.trainable, embedding.value
	return nil
}

// oneStorage gives the factors of the head the values of the embedding's.
func (b *adapterBinder) oneStorage(embedding, head *lowRank) error {
	for _, x := range []struct{ own, shared *factor }{{&head.a, &embedding.b}, {&head.b, &embedding.a}} {
		turned := x.shared.transposed()
		if err := sameValues(b.view(*x.own), b.view(turned)); err != nil {
			return err
		}
		turned.of = x.own.of
		x.own.of.shares = x.shared.of
		*x.own = turned
	}
	if (embedding.magnitude == nil) != (head.magnitude == nil) {
		return fmt.Errorf("tensor %s: %w: one end of a tie has a magnitude, and the other none",
			tensor.Quote(head.a.of.name), lora.ErrMalformed)
	}
	return nil
}

// source is the tensor of the file that a trainable is.
func (b *adapterBinder) source(t *trainable) *stored {
	return &b.stored[slices.IndexFunc(b.stored, func(s stored) bool { return s.trainable == t })]
}

// view is a factor as it lies in the file.
func (b *adapterBinder) view(f factor) lora.Matrix {
	return lora.Matrix{T: b.source(f.of).Tensor, Offset: int64(f.offset), RowStride: int64(f.rowStride),
		ColStride: int64(f.colStride), Rows: int64(f.rows), Cols: int64(f.cols)}
}

// transposed is the transposed view.
func (f factor) transposed() factor {
	f.rowStride, f.colStride = f.colStride, f.rowStride
	f.rows, f.cols = f.cols, f.rows
	return f
}

// sameValues refuses two ends of a tie that differ.
func sameValues(x, y lora.Matrix) error {
	p, err := x.Read()
	if err != nil {
		return err
	}
	q, err := y.Read()
	if err != nil {
		return err
	}
	if p.Rows != q.Rows || p.Cols != q.Cols || !equalMatrices(p, q) {
		return fmt.Errorf("tensor %s: %w: ensure_weight_tying is true, and it differs from %s", tensor.Quote(x.T.Name),
			lora.ErrMalformed, tensor.Quote(y.T.Name))
	}
	return nil
}

func equalMatrices(p, q kernels.Mat) bool {
	for i := range p.Rows {
		for j := range p.Cols {
			if p.Data[i*p.RowStride+j*p.ColStride] != q.Data[i*q.RowStride+j*q.ColStride] {
				return false
			}
		}
	}
	return true
}

// finish lists the trainables in the order of the file, and refuses a tensor that none of them is and that is no copy.
func (b *adapterBinder) finish() error {
	for i := range b.stored {
		s := &b.stored[i]
		if o := b.of.Repeated(s.Tensor); o != nil && s.trainable == nil {
			s.trainable = b.stored[b.places[o]].trainable
		}
	}
	seen := map[*trainable]bool{}
	for _, s := range b.stored {
		switch {
		case s.trainable == nil && !s.copied && !strings.Contains(s.Name, ".original_module."):
			return fmt.Errorf("tensor %s: %w: no parameter of the model takes it", tensor.Quote(s.Name), lora.ErrUnsupported)
		case s.trainable != nil && !seen[s.trainable]:
			seen[s.trainable] = true
			b.trainables = append(b.trainables, s.trainable)
		}
	}
	if len(b.trainables) == 0 {
		return fmt.Errorf("%w: it has nothing that is trained", lora.ErrMalformed)
	}
	return nil
}
