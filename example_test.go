package lorakit_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit"
)

// A checkpoint becomes transformers' own 4-bit model, and plain again.
func Example() {
	dir, err := os.MkdirTemp("", "lorakit")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	packed, plain := filepath.Join(dir, "nf4"), filepath.Join(dir, "bf16")

	ctx := context.Background()
	r, err := lorakit.Convert(ctx, "fixtures/tiny-llama", packed,
		lorakit.ConvertOptions{Quantize: "nf4", DoubleQuant: true})
	if err != nil {
		panic(err)
	}
	fmt.Println(r.Quantized, "of", r.Tensors, "weights are quantised")

	if _, err := lorakit.Convert(ctx, packed, plain, lorakit.ConvertOptions{Quantize: "none"}); err != nil {
		panic(err)
	}
	d, err := lorakit.Diff(ctx, packed, plain, lorakit.ReadOptions{})
	if err != nil {
		panic(err)
	}
	fmt.Println("the difference is", d.MaxAbs)
	// Output:
	// 14 of 21 weights are quantised
	// the difference is 0
}

// The output head has codes of eight bits, and each other weight as many as lessen the error most, within 6.5 on
// average with scales and biases.
func ExampleConvert_budget() {
	dir, err := os.MkdirTemp("", "lorakit")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)

	r, err := lorakit.Convert(context.Background(), "fixtures/gguf-models/llama", filepath.Join(dir, "mlx"),
		lorakit.ConvertOptions{
			BlockSize: 32,
			Budget:    6.5,
			Rules: []lorakit.Rule{
				{Glob: "lm_head.weight", Type: "mlx8"}, {Glob: "*", Type: "mlx4"}, {Glob: "*", Type: "mlx8"},
			},
		})
	if err != nil {
		panic(err)
	}
	fmt.Println(r.Quantized, "of", r.Tensors, "weights are quantised")
	fmt.Printf("%.2f bits a weight\n", r.BitsPerWeight)
	fmt.Println(r.Notices[0])
	// Output:
	// 15 of 21 weights are quantised
	// 6.50 bits a weight
	// budget 6.5: 6.5000 bits a weight: 13 weights in mlx4, 1 in mlx8
}

func ExampleInspect() {
	r, err := lorakit.Inspect(context.Background(), "fixtures/expected/tiny-gpt2/nf4-dq", lorakit.ReadOptions{})
	if err != nil {
		panic(err)
	}
	fmt.Println(r.Architecture, r.Scheme)
	for _, t := range r.Tensors {
		if t.Kind == "conv1d" {
			fmt.Println(t.Name, t.DType, t.Shape)
			break
		}
	}
	// Output:
	// GPT2LMHeadModel nf4, block 64, double
	// transformer.h.0.attn.c_attn.weight BF16 [40, 120]
}

// An adapter is merged, and what is kept of it measured on what was written.
func ExampleMerge() {
	dir, err := os.MkdirTemp("", "lorakit")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)

	base, style := "fixtures/adapters/bases/llama", lorakit.Adapter{Path: "fixtures/adapters/llama/attention", Weight: 0.5}
	r, err := lorakit.Merge(context.Background(), base, []lorakit.Adapter{style}, filepath.Join(dir, "merged"),
		lorakit.ConvertOptions{})
	if err != nil {
		panic(err)
	}
	for _, a := range r.Adapters {
		fmt.Printf("%.3f of it is kept in %d modules\n", a.Kept, len(a.Modules))
	}
	// Output:
	// 1.000 of it is kept in 8 modules
}

// A training step through a 4-bit checkpoint: the loss falls, and no weight of the base changes.
func ExampleValidate() {
	dir, err := os.MkdirTemp("", "lorakit")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	batch := filepath.Join(dir, "batch.jsonl")
	ids := `{"input_ids": [34, 41, 34, 1, 14, 65, 10, 41, 26]}`
	if err := os.WriteFile(batch, []byte(ids), 0o666); err != nil {
		panic(err)
	}

	r, err := lorakit.Validate(context.Background(), "fixtures/steps/bases/llama-nf4", lorakit.ValidateOptions{
		Data: batch, Adapter: "fixtures/steps/llama-nf4/all", Steps: 2, Rate: 1e-3,
	})
	if err != nil {
		panic(err)
	}
	fmt.Printf("%d of %d parameters are trained\n", r.TrainableParameters, r.TotalParameters)
	fmt.Println("the loss falls:", *r.LossAfter < r.LossBefore)
	fmt.Println("the base is as it was:", *r.FrozenUnchanged)
	// Output:
	// 688 of 12796 parameters are trained
	// the loss falls: true
	// the base is as it was: true
}
