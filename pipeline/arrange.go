package pipeline

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
)

// arrange makes the jobs of a weight that the result has under other names, in pieces or with its rows in another
// order.
func (b *planner) arrange(ctx context.Context, w *Weight, j Job) ([]Job, error) {
	if b.Arrange == nil {
		return []Job{j}, nil
	}
	list := b.Arrange(w.Weight)
	if len(list) == 0 {
		return []Job{j}, nil
	}
	var jobs []Job
	for _, a := range list {
		n, err := b.arranged(ctx, w, j, a)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, n)
	}
	return jobs, nil
}

// arranged is a job with another name and some rows.
func (b *planner) arranged(ctx context.Context, w *Weight, j Job, a models.Arrangement) (Job, error) {
	if j.Name = a.Name; a.Name == w.Name {
		j.Name = ""
	}
	j.Outputs = slices.Clone(j.Outputs)
	if !a.Rows.Whole() {
		if err := checkRows(w, &j, a.Rows); err != nil {
			return j, err
		}
		if a.Rows.Count == 0 {
			a.Rows.Count = w.Shape[0] - a.Rows.First
		}
		j.Rows, j.Copy = &a.Rows, false
	}
	switch {
	case j.Encode != nil:
		scheme, err := b.Schemes.ForType(j.Encode.Type)
		if err != nil {
			return j, err
		}
		return j, j.place(ctx, scheme, w)
	case j.Copy:
		for i := range j.Outputs { // companions keep their endings
			j.Outputs[i].Name = a.Name + strings.TrimPrefix(j.Outputs[i].Name, w.Name)
		}
	default:
		j.Outputs = []Output{{Info: j.encoded(w)}}
	}
	return j, nil
}

// checkRows refuses rows that the weight does not have, or that cannot be arranged.
func checkRows(w *Weight, j *Job, r models.Rows) error {
	if len(w.Shape) == 0 || len(w.Shape) > 2 {
		return fmt.Errorf("%w: rows are chosen of its shape %v, expected one or two dimensions", ErrRefused, w.Shape)
	}
	count := r.Count
	if count == 0 {
		count = w.Shape[0] - r.First
	}
	switch {
	case r.First < 0 || count < 0 || r.First > w.Shape[0]-count:
		return fmt.Errorf("%w: rows %d to %d are chosen of %d", ErrRefused, r.First, r.First+count, w.Shape[0])
	case (r.Outer == 0) != (r.Inner == 0) || r.Outer < 0 || r.Inner < 0 || r.Outer > 0 && r.Inner > w.Shape[0]/r.Outer:
		return fmt.Errorf("%w: runs of %d times %d rows are exchanged of %d", ErrRefused, r.Outer, r.Inner, w.Shape[0])
	case r.First%r.Run() != 0 || count%r.Run() != 0:
		return fmt.Errorf("%w: %d rows from %d on are no whole runs of %d", ErrRefused, count, r.First, r.Run())
	case j.Copy && w.Decoder != nil:
		return fmt.Errorf("%w: its rows are arranged anew, and it is stored as %s, whose codes cannot be", ErrRefused,
			w.Decoder.Spec())
	case j.flips(w) || w.Transposed:
		return fmt.Errorf("%w: its rows are arranged anew, and it lies the other way round", ErrRefused)
	}
	return nil
}

// group notes which jobs share what their scheme measures.
func (b *planner) group(jobs []Job) {
	g, ok := b.scheme.(quant.Grouper)
	if !ok {
		return
	}
	byName := map[string]*Job{}
	var names []string
	for i := range jobs {
		if j := &jobs[i]; j.Encode != nil {
			byName[j.name()] = j
			names = append(names, j.name())
		}
	}
	for _, members := range g.Groups(b.spec, names) {
		for _, name := range members {
			if j := byName[name]; j != nil {
				j.Group = members[0]
			}
		}
	}
}

// rows are those that a job writes, all of them where it has no Rows.
func (j *jobRun) rows() models.Rows {
	if j.Rows != nil {
		return *j.Rows
	}
	return models.Rows{}
}

// extent is the range of the weight's elements that a job writes.
func (j *jobRun) extent() (lo, hi int64) {
	if j.Rows == nil {
		return 0, j.weight.Count()
	}
	row := j.weight.Count() / max(j.weight.Shape[0], 1)
	return j.Rows.First * row, (j.Rows.First + j.Rows.Count) * row
}

// run is how many elements are exchanged with each other: a tile has whole runs.
func (j *jobRun) run() int64 {
	if j.Rows == nil {
		return 1
	}
	return j.Rows.Run() * (j.weight.Count() / max(j.weight.Shape[0], 1))
}

// turnRows puts the rows of a tile, whole runs of rows of a width, in the order of the result, or back.
func turnRows[T byte | float32](dst, src []T, r models.Rows, width int64, back bool) {
	run := r.Run()
	for at := int64(0); at < int64(len(src)); at += run * width {
		for i := range run {
			from, to := i, r.Place(i)
			if back {
				from, to = to, from
			}
			copy(dst[at+to*width:at+(to+1)*width], src[at+from*width:])
		}
	}
}
