package safetensors_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/formats"
	_ "github.com/lorakit/lorakit/formats/safetensors"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Place two tensors in a file, write it, and read it back.
func Example() {
	format, err := formats.Default.Lookup("safetensors")
	if err != nil {
		panic(err)
	}
	layout, err := format.Layout(context.Background(), []tensor.Info{
		{Name: "bias", DType: tensor.I8, Shape: tensor.Shape{3}},
		{Name: "weight", DType: tensor.I16, Shape: tensor.Shape{2}},
	}, formats.Options{Metadata: formats.Texts(map[string]string{"format": "pt"})})
	if err != nil {
		panic(err)
	}
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	shard := layout.Shards[0]
	// Wider types come first, so the weight's four bytes follow the header.
	data := append(shard.Header, 1, 0, 2, 0, 'a', 'b', 'c')
	if err := os.WriteFile(filepath.Join(dir, shard.Name), data, 0o644); err != nil {
		panic(err)
	}

	c, err := format.Open(context.Background(), storage.Local(dir, storage.Options{}), shard.Name)
	if err != nil {
		panic(err)
	}
	defer c.Close()
	for _, t := range c.Tensors() {
		b := make([]byte, t.Bytes)
		if _, err := t.ReadAt(b, 0); err != nil {
			panic(err)
		}
		fmt.Println(t.File, t.Name, t.DType, t.Shape, b)
	}
	// Output:
	// model.safetensors weight I16 [2] [1 0 2 0]
	// model.safetensors bias I8 [3] [97 98 99]
}
