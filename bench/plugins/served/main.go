// Command served is the plugin whose speed is measured: a file .served is data, of one tensor, that goes over the
// connection in both directions. What is written is not kept.
package main

import (
	"context"
	"os"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/tensor"
)

func main() {
	sdk.Serve(sdk.Plugin{Name: "served", Version: "1.0.0", Deterministic: true, Formats: []sdk.Format{format{}}})
}

type format struct{}

func (format) Info() sdk.FormatInfo {
	return sdk.FormatInfo{Name: "served", Extensions: []string{".served"}}
}

func (format) Open(_ context.Context, path string) (sdk.Container, error) {
	f, err := os.Open(path)
	if err != nil {
		return sdk.Container{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return sdk.Container{}, err
	}
	t := sdk.Tensor{Info: tensor.Info{Name: "x", DType: tensor.U8, Shape: tensor.Shape{info.Size()}}, Data: f}
	return sdk.Container{Tensors: []sdk.Tensor{t}, Close: f.Close}, nil
}

func (format) Create(context.Context, string, []tensor.Info, formats.Metadata) (formats.Writer, error) {
	return &writer{}, nil
}

type writer struct{ size int64 }

func (w *writer) Write(_ int, _ int64, p []byte) error  { w.size += int64(len(p)); return nil }
func (w *writer) Finish(context.Context) (int64, error) { return w.size, nil }
func (w *writer) Abort() error                          { return nil }
