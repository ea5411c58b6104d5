// Command verdict opens each file named on a line of standard input and prints
// one line of JSON for it: the error, or what the file holds. differential.py
// holds that against the reference implementation.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/formats/safetensors"
)

type held struct {
	DType string  `json:"dtype"`
	Shape []int64 `json:"shape"`
	CRC   uint32  `json:"crc"`
}

type verdict struct {
	Error    string            `json:"error,omitempty"`
	Kind     string            `json:"kind,omitempty"`
	Metadata map[string]string `json:"metadata"`
	Tensors  map[string]held   `json:"tensors"`
}

func main() {
	out := bufio.NewWriter(os.Stdout)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := json.MarshalWrite(out, judge(lines.Text()), json.Deterministic(true)); err != nil {
			panic(err)
		}
		fmt.Fprintln(out)
		out.Flush()
	}
}

func judge(path string) verdict {
	c, err := safetensors.Format{}.Open(path)
	if err != nil {
		v := verdict{Error: err.Error(), Kind: "other"}
		if errors.Is(err, formats.ErrMalformed) {
			v.Kind = "malformed"
		}
		if errors.Is(err, formats.ErrLimit) {
			v.Kind = "limit"
		}
		return v
	}
	defer c.Close()
	v := verdict{Metadata: c.Metadata(), Tensors: map[string]held{}}
	for _, t := range c.Tensors() {
		data, err := io.ReadAll(io.NewSectionReader(t, 0, t.Bytes))
		if err != nil {
			return verdict{Error: err.Error(), Kind: "read"}
		}
		v.Tensors[t.Name] = held{t.DType.String(), append([]int64{}, t.Shape...), crc32.ChecksumIEEE(data)}
	}
	return v
}
