package train

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBatch(t *testing.T) {
	b, err := ReadBatch(writeData(t, "\n"+`{"input_ids": [4, 3, 9], "labels": [1, -100, 7], "attention_mask": [1, 1, 1], "id": 3}`+
		"\r\n\n"+`{"labels": null, "input_ids": [0, 0, 66]}`), 67, 3)
	require.NoError(t, err)
	require.Equal(t, &Batch{Rows: 2, Length: 3, ids: []int{4, 3, 9, 0, 0, 66},
		labels: []int{ignored, 7, ignored, 0, 66, ignored}, count: 3}, b)
	require.Equal(t, []int{0, 1, 2, 0, 1, 2}, b.positions())
}

func TestBatchRefused(t *testing.T) {
	const row = `{"input_ids": [1, 2, 3]}`
	for content, says := range map[string]string{
		`{"input_ids": [1, 67, 3]}`:                           "line 1: wrong data: input_ids[1] is 67, expected a token id from 0 to 66",
		row + "\n" + `{"input_ids": [1, 2, -5]}`:              "line 2: wrong data: input_ids[2] is -5",
		`{"input_ids": [1, 2], "labels": [1, 70]}`:            "labels[1] is 70, expected a token id from 0 to 66 or -100",
		`{"input_ids": [1, 2], "labels": [-1, 0]}`:            "labels[0] is -1",
		row + "\n" + `{"input_ids": [1, 2]}`:                  "line 2: wrong data: input_ids has 2 tokens and the rows before 3",
		`{"input_ids": [1, 2], "labels": [1]}`:                "labels has 1 elements, expected 2",
		`{"input_ids": [1, 2], "labels": []}`:                 "labels has 0 elements, expected 2",
		"":                                                    "the batch is empty",
		"\n \n":                                               "the batch is empty",
		`{"input_ids": []}`:                                   "input_ids has 0 tokens, expected at least 2",
		`{"input_ids": [5]}`:                                  "input_ids has 1 tokens, expected at least 2",
		`{"input_ids": [1, 2, 3], "labels": [9, -100, -100]}`: "all labels are ignored (-100)",
		`{`:                       "line 1: wrong data: it is no JSON object",
		`[1, 2]`:                  "it is no JSON object",
		row + ` {}`:               "it is no JSON object",
		`{"ids": [1, 2]}`:         "it has no input_ids",
		`{"input_ids": null}`:     "it has no input_ids",
		`{"input_ids": "1, 2"}`:   "input_ids is no list of integers",
		`{"input_ids": [1.5, 2]}`: "input_ids is no list of integers",
		`{"input_ids": [1, 99999999999999999999]}`:        "input_ids is no list of integers",
		`{"input_ids": [[1, 2], [3, 4]]}`:                 "input_ids is no list of integers",
		`{"input_ids": [1, 2, 3, 4, 5, 6]}`:               "input_ids has 6 tokens, expected at most 5",
		`{"input_ids": [1, 2], "attention_mask": [0, 1]}`: "attention_mask[0] is 0, expected 1",
		`{"input_ids": [1, 2], "position_ids": [5, 6]}`:   "position_ids[0] is 5, expected 0",
		`{"input_ids": [3, null, 5]}`:                     "input_ids is no list of integers: it has a null",
		`{"input_ids": [3, 4], "labels": [3, null]}`:      "labels is no list of integers: it has a null",
		`{"input_ids": [3, 4], "attention_mask": [null]}`: "attention_mask is no list of integers: it has a null",
	} {
		_, err := ReadBatch(writeData(t, content), 67, 5)
		require.ErrorIs(t, err, ErrData, content)
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "\n")
	}
	_, err := ReadBatch(filepath.Join(t.TempDir(), "none"), 67, 0)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = ReadBatch(writeData(t, strings.Repeat(" ", maxDataBytes+1)), 67, 0)
	require.ErrorIs(t, err, ErrData)
	require.ErrorContains(t, err, "more than 67108864 bytes")
}

func FuzzBatch(f *testing.F) {
	for _, s := range []string{"", `{"input_ids": [1, 2, 3]}`, `{"input_ids": [1, 2], "labels": [-100, 2]}` + "\n\n" +
		`{"input_ids": [0, 66], "attention_mask": [1, 1]}`, `{"input_ids": [1, 67]}`, `{"input_ids": [1e0, 2]}`, "\xff", "{}{}",
		`{"input_ids": [1, 2], "input_ids": [3, 4]}`, `{"input_ids": [1, 2], "labels": [5, -100]}`} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, content []byte) {
		path := filepath.Join(dir, "batch")
		require.NoError(t, os.WriteFile(path, content, 0o666))
		b, err := ReadBatch(path, 67, 9)
		if err != nil {
			assert.ErrorIs(t, err, ErrData)
			assert.NotContains(t, err.Error(), "\n")
			assert.Less(t, len(err.Error()), 1000)
			return
		}
		require.Positive(t, b.Rows)
		require.True(t, b.Length >= 2 && b.Length <= 9)
		require.Len(t, b.ids, b.Rows*b.Length)
		require.Len(t, b.labels, len(b.ids))
		count := 0
		for i, id := range b.ids {
			require.True(t, id >= 0 && id < 67)
			l := b.labels[i]
			require.True(t, l == ignored || l >= 0 && l < 67)
			if l != ignored {
				require.NotEqual(t, b.Length-1, i%b.Length, "the last position predicts nothing")
				count++
			}
		}
		require.Positive(t, count)
		require.Equal(t, count, b.count)
	})
}
