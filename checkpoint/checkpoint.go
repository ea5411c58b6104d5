// Package checkpoint reads checkpoints: a container (package formats) whose stored tensors, by the quantisation schemes
// (package quant) and by what a config.json means (package models), are logical weights.
//
// Open reads headers only. A Checkpoint never changes afterwards, and all that it holds may be read by several
// goroutines at once. A weight is read as numbers by a Reader, in pieces of any size, or as a Matrix, by rows;
// Runtime finds a parameter by the name that it has in a running model, however the file has it cut.
package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors. Test for them with errors.Is; those of formats and quant may be met too.
var (
	// ErrInterrupted says that the context was cancelled.
	ErrInterrupted = errors.New("interrupted")
	// ErrRefused says that what was asked for cannot be done with this checkpoint.
	ErrRefused = errors.New("refused")
)

// ConfigName is the file that says what a checkpoint is.
const ConfigName = "config.json"

// maxConfigBytes bounds config.json.
const maxConfigBytes = 16 << 20

// Checkpoint is an opened checkpoint: its headers have been read and checked, its data has not been touched.
type Checkpoint struct {
	Path   string // as it was given
	Folder bool   // whether Path is a folder
	Format formats.Format
	// Config is what config.json says, nil where there is none. ConfigJSON are its bytes and ConfigInfo its size and
	// time.
	Config     *models.Config
	ConfigJSON []byte
	ConfigInfo fs.FileInfo
	// Model knows the architecture's tensors, or answers by the general rule where Known is false.
	Model *models.Model
	Known bool
	// Weights are the logical tensors, in the order in which their data is stored.
	Weights []*Weight
	// Notices say, in a sentence each, what was assumed.
	Notices []string

	container   formats.Container
	byParameter func() map[string][]Piece // made when it is first asked for
}

// Open reads the headers of the checkpoint at path, a folder or a file, and its config.json where path is a folder that
// has one.
func Open(ctx context.Context, path string) (*Checkpoint, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	f, err := formats.Detect(path)
	if err != nil {
		return nil, err
	}
	c := &Checkpoint{Path: path, Folder: info.IsDir(), Format: f}
	c.byParameter = sync.OnceValue(c.pieces)
	if err := c.readConfig(); err != nil {
		return nil, err
	}
	if c.container, err = f.Open(path); err != nil {
		return nil, err
	}
	if err := c.assemble(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Close closes the files.
func (c *Checkpoint) Close() error { return c.container.Close() }

// Metadata returns the free-form strings stored with the tensors.
func (c *Checkpoint) Metadata() map[string]string { return c.container.Metadata() }

// Files returns the names of the files that hold the tensors, an index included.
func (c *Checkpoint) Files() []string { return c.container.Files() }

// FilePath is the path of one of the checkpoint's files.
func (c *Checkpoint) FilePath(name string) string {
	dir := c.Path
	if !c.Folder {
		dir = filepath.Dir(dir)
	}
	return filepath.Join(dir, filepath.FromSlash(name))
}

// DType is the type that config.json gives for the model, or 0.
func (c *Checkpoint) DType() tensor.DType {
	if c.Config == nil {
		return 0
	}
	d, err := tensor.ParseDType(c.Config.DType)
	if err != nil { // "auto", or none
		return 0
	}
	return d
}

func (c *Checkpoint) readConfig() error {
	if c.Folder {
		path, err := storage.Within(c.Path, ConfigName)
		switch {
		case err == nil:
			if c.ConfigJSON, c.ConfigInfo, err = readSmall(path, maxConfigBytes); err != nil {
				return err
			}
			if c.Config, err = models.ParseConfig(c.ConfigJSON); err != nil {
				return fmt.Errorf("%s: %w", filepath.Join(c.Path, ConfigName), err)
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	c.Model, c.Known = models.Load(c.Config)
	return nil
}

// readSmall reads a regular file of at most limit bytes.
func readSmall(path string, limit int64) ([]byte, fs.FileInfo, error) {
	f, err := storage.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.Size() > limit {
		return nil, nil, fmt.Errorf("%s: %w: %d bytes, expected at most %d", path, formats.ErrLimit, info.Size(), limit)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit))
	return b, info, err
}

// assemble makes the logical weights of the stored tensors.
func (c *Checkpoint) assemble(ctx context.Context) error {
	tensors, notice := unwrap(c.container.Tensors(), c.Model)
	if notice != "" {
		c.Notices = append(c.Notices, notice)
	}
	s := newStored(tensors, c.DType(), c.ConfigJSON)

	quantised := make(map[string]quant.Decoder) // by the name of the first part
	companion := make(map[string]string)        // name of a part -> its weight
	for _, scheme := range quant.All() {
		decoders, err := scheme.Find(ctx, s)
		if ctx.Err() != nil {
			return ErrInterrupted
		}
		if err != nil {
			return err
		}
		for _, d := range decoders {
			parts := d.Parts()
			for _, p := range parts {
				if other, taken := companion[p]; taken {
					return fmt.Errorf("tensor %s: %w: it belongs to both %s and %s", tensor.Quote(p), quant.ErrMalformed,
						tensor.Quote(other), tensor.Quote(d.Info().Name))
				}
				companion[p] = d.Info().Name
			}
			quantised[parts[0]] = d
		}
	}

	for i := range s.tensors {
		t := &s.tensors[i]
		d, ok := quantised[t.Name]
		if _, part := companion[t.Name]; part && !ok {
			continue
		}
		w := &Weight{Info: t.Info, Values: t.DType, Parts: []formats.Tensor{*t}}
		if ok {
			w.decodedBy(d, s)
		}
		w.Role = c.Model.Tensor(w.Name, w.Shape)
		if ok && w.Role.Kind == models.Conv1D && len(w.Shape) == 2 {
			w.Transposed = true
			w.Shape = w.Shape.Transposed()
		}
		c.Weights = append(c.Weights, w)
	}
	return nil
}
