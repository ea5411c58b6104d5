package train

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Batch is what a step is taken on: rows of token ids of equal length, and as many labels. Position t predicts label
// t+1.
type Batch struct {
	Rows, Length int
	ids          []int // row after row
	labels       []int // of each position the label of the next, or ignored
	count        int   // of the labels that are not
}

// maxDataBytes bounds the file of a batch: some ten million tokens.
const maxDataBytes = 64 << 20

// ReadBatch reads a batch from lines of {"input_ids": [...], "labels": [...]}. Labels default to the ids; -100 is
// ignored. Ids and labels are below vocab, and a row has at most maxPositions tokens unless that is 0. Errors wrap
// ErrData.
func ReadBatch(path string, vocab, maxPositions int) (*Batch, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := &Batch{}
	lines := bufio.NewReader(io.LimitReader(f, maxDataBytes+1))
	read := 0
	for n := 1; ; n++ {
		line, err := lines.ReadBytes('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if read += len(line); read > maxDataBytes {
			return nil, fmt.Errorf("%s: %w: it has more than %d bytes; a batch is what fits into one step", path, ErrData,
				maxDataBytes)
		}
		if text := bytes.TrimSpace(line); len(text) > 0 {
			if err := b.add(text, vocab, maxPositions); err != nil {
				return nil, fmt.Errorf("%s: line %d: %w: %w", path, n, ErrData, err)
			}
		}
		if err != nil {
			break
		}
	}
	switch {
	case b.Rows == 0:
		return nil, fmt.Errorf("%s: %w: the batch is empty, expected lines of {\"input_ids\": [...]}", path, ErrData)
	case b.count == 0:
		return nil, fmt.Errorf("%s: %w: all labels are ignored (-100); the first label of a row is never used", path,
			ErrData)
	}
	return b, nil
}

// add takes up a row.
func (b *Batch) add(line []byte, vocab, maxPositions int) error {
	var row struct {
		IDs    jsontext.Value `json:"input_ids"`
		Labels jsontext.Value `json:"labels"`
		Mask   jsontext.Value `json:"attention_mask"`
		Places jsontext.Value `json:"position_ids"`
	}
	if err := json.Unmarshal(line, &row); err != nil {
		return fmt.Errorf("it is no JSON object: %w", err)
	}
	ids, err := integers("input_ids", row.IDs)
	if err != nil {
		return err
	}
	if ids == nil {
		return fmt.Errorf("it has no input_ids, expected a list of token ids")
	}
	labels, err := integers("labels", row.Labels)
	if err != nil {
		return err
	}
	if labels == nil {
		labels = ids
	}
	mask, err := integers("attention_mask", row.Mask)
	if err != nil {
		return err
	}
	for i, m := range mask {
		if m != 1 {
			return fmt.Errorf("attention_mask[%d] is %d, expected 1: every id is attended to, so padding has no place", i, m)
		}
	}
	places, err := integers("position_ids", row.Places)
	if err != nil {
		return err
	}
	for i, p := range places {
		if p != i {
			return fmt.Errorf("position_ids[%d] is %d, expected %d: positions are counted from 0 in each row", i, p, i)
		}
	}
	switch {
	case len(ids) < 2:
		return fmt.Errorf("input_ids has %d tokens, expected at least 2: each predicts the next", len(ids))
	case len(labels) != len(ids):
		return fmt.Errorf("labels has %d elements, expected %d, as many as input_ids", len(labels), len(ids))
	case b.Rows > 0 && len(ids) != b.Length:
		return fmt.Errorf("input_ids has %d tokens and the rows before %d, expected rows of equal length", len(ids), b.Length)
	case maxPositions > 0 && len(ids) > maxPositions:
		return fmt.Errorf("input_ids has %d tokens, expected at most %d, as many as the model has learned positions for",
			len(ids), maxPositions)
	}
	for i, id := range ids {
		if id < 0 || id >= vocab {
			return fmt.Errorf("input_ids[%d] is %d, expected a token id from 0 to %d", i, id, vocab-1)
		}
	}
	for i, l := range labels {
		if l != ignored && (l < 0 || l >= vocab) {
			return fmt.Errorf("labels[%d] is %d, expected a token id from 0 to %d or %d", i, l, vocab-1, ignored)
		}
	}
	b.Rows, b.Length = b.Rows+1, len(ids)
	b.ids = append(b.ids, ids...)
	b.labels = append(append(b.labels, labels[1:]...), ignored)
	for _, l := range labels[1:] {
		if l != ignored {
			b.count++
		}
	}
	return nil
}

// integers reads a list of them, nil where there is none.
func integers(name string, v jsontext.Value) ([]int, error) {
	if v == nil || v.Kind() == 'n' {
		return nil, nil
	}
	list := []int{}
	if err := json.Unmarshal(v, &list); err != nil {
		return nil, fmt.Errorf("%s is no list of integers: %w", name, err)
	}
	if bytes.Contains(v, []byte("null")) { // which Unmarshal takes for 0
		return nil, fmt.Errorf("%s is no list of integers: it has a null", name)
	}
	return list, nil
}

// tokens is how many there are.
func (b *Batch) tokens() int { return b.Rows * b.Length }

// positions are those of the ids, from 0 in each row.
func (b *Batch) positions() []int {
	p := make([]int, len(b.ids))
	for i := range p {
		p[i] = i % b.Length
	}
	return p
}
