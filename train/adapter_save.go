package train

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// The files of an adapter of PEFT.
const (
	adapterTensors = "adapter_model.safetensors"
	adapterConfig  = "adapter_config.json"
)

// save writes the adapter as it is now to a folder that appears whole or not at all: each tensor of its file under its
// name, in float32, copies of the base's and the config byte for byte. A folder that is there is fs.ErrExist, unless it
// is to be replaced.
func (a *adapter) save(ctx context.Context, dir string, replace bool) error {
	return storage.CreateFolder(dir, replace, func(dir string) error {
		err := createSynced(filepath.Join(dir, adapterTensors), func(w io.Writer) error {
			return writeTensors(ctx, w, a.stored, func(t *trainable) []float32 { return t.value })
		})
		if err != nil {
			return err
		}
		return createSynced(filepath.Join(dir, adapterConfig), func(w io.Writer) error {
			_, err := w.Write(a.of.Config.Bytes())
			return err
		})
	})
}

// saveGradients writes the gradients to one file, under the names of the adapter's tensors, without the copies.
func (a *adapter) saveGradients(ctx context.Context, file string, replace bool) error {
	var trained []stored
	for _, s := range a.stored {
		if s.trainable != nil {
			trained = append(trained, s)
		}
	}
	return storage.CreateWhole(file, replace, func(w io.Writer) error {
		return writeTensors(ctx, w, trained, func(t *trainable) []float32 { return t.gradient })
	})
}

// createSynced makes a file durable.
func createSynced(path string, fill func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Sync(), f.Close())
}

// writeTensors writes a safetensors file of tensors, of which values gives those that are trained.
func writeTensors(ctx context.Context, to io.Writer, list []stored, values func(*trainable) []float32) error {
	format, err := formats.Default.Lookup("safetensors")
	if err != nil {
		return err
	}
	infos := make([]tensor.Info, len(list))
	for i, s := range list {
		infos[i] = s.Info
		if s.trainable != nil {
			infos[i].DType = tensor.F32
		}
	}
	l, err := format.Layout(ctx, infos, formats.Options{SingleFile: adapterTensors,
		Metadata: formats.Texts(map[string]string{"format": "pt"})})
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(to, 1<<20)
	shard := l.Shards[0] // the data behind the header without gaps, in its order
	if _, err := w.Write(shard.Header); err != nil {
		return err
	}
	for _, i := range shard.Tensors {
		if err := ctx.Err(); err != nil {
			return err
		}
		s := list[i]
		if s.trainable == nil {
			_, err = io.Copy(w, io.NewSectionReader(s.Tensor, 0, s.Bytes))
		} else {
			err = s.trainable.write(w, values(s.trainable))
		}
		if err != nil {
			return fmt.Errorf("tensor %s: %w", tensor.Quote(s.Name), err)
		}
	}
	return w.Flush()
}

// write writes numbers that lie as the value does, in the order of the file.
func (t *trainable) write(w io.Writer, v []float32) error {
	const piece = 64 << 10
	if t.shares != nil {
		v = turned(v, int(t.shape[1]), int(t.shape[0]))
	}
	b := make([]byte, 4*min(piece, len(v)))
	for lo := 0; lo < len(v); lo += piece {
		part := v[lo:min(lo+piece, len(v))]
		for i, x := range part {
			binary.LittleEndian.PutUint32(b[4*i:], math.Float32bits(x))
		}
		if _, err := w.Write(b[:4*len(part)]); err != nil {
			return err
		}
	}
	return nil
}

// turned is a matrix (rows, cols) the other way round.
func turned(v []float32, rows, cols int) []float32 {
	out := make([]float32, len(v))
	for i := range rows {
		for j := range cols {
			out[j*rows+i] = v[i*cols+j]
		}
	}
	return out
}
