// Package checkpoint reads checkpoints: a container (package formats) whose stored tensors, by the quantisation schemes
// (package quant) and by what a config.json means (package models), are logical weights.
//
// Open reads headers only. A Checkpoint never changes afterwards, and all that it holds may be read by several
// goroutines at once. A weight is read as numbers by a Reader, in pieces of any size, or as a Matrix, by rows;
// Runtime finds a parameter by the name that it has in a running model, however the file has it cut.
package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	// ErrMemory says that the memory allowed is less than a run needs.
	ErrMemory = errors.New("too little memory")
)

// ConfigName is the file that says what a checkpoint is.
const ConfigName = "config.json"

// maxConfigBytes bounds config.json.
const maxConfigBytes = 16 << 20

// Checkpoint is an opened checkpoint: its headers have been read and checked, its data has not been touched.
type Checkpoint struct {
	Path   string         // as it was given, in messages
	Dir    storage.Folder // of the files
	Folder bool           // whether the checkpoint is all of Dir, and not one file there
	Format formats.Format
	// Formats and Schemes are those it was opened with.
	Formats *formats.Registry
	Schemes *quant.Registry
	// Config is what config.json says, nil where there is none. ConfigJSON are its bytes and ConfigVersion tells them from
	// others, as storage.File has it.
	Config        *models.Config
	ConfigJSON    []byte
	ConfigVersion string
	// QuantizationFile is the file beside config.json that says how the weights are quantised, which Config has taken in;
	// "" where config.json says it, or nothing does.
	QuantizationFile string
	// Model knows the architecture's tensors, or answers by the general rule where Known is false.
	Model *models.Model
	Known bool
	// Weights are the logical tensors, in the order in which their data is stored.
	Weights []*Weight
	// Notices say, in a sentence each, what was assumed.
	Notices []string

	container   formats.Container
	origin      *Checkpoint               // of one that is Restored
	restoredBy  map[string]restored       // by the names of its weights
	byParameter func() map[string][]Piece // made when it is first asked for
}

// Open reads the headers of the checkpoint at path, a folder or a file, and its config.json where path is a folder that
// has one.
func Open(ctx context.Context, path string) (*Checkpoint, error) {
	dir, name, err := storage.Resolve(path, storage.Options{})
	if err != nil {
		return nil, err
	}
	return OpenIn(ctx, dir, name, OpenOptions{})
}

// OpenOptions say what a checkpoint is opened with.
type OpenOptions struct {
	// Formats are those that it may have, and those that may be made of it; nil is formats.Default.
	Formats *formats.Registry
	// Schemes are those that its weights may be in, and those that may be made of them; nil is quant.Default.
	Schemes *quant.Registry
}

// OpenIn reads the headers of a checkpoint in a folder: the file of that name, or with no name the folder itself. The
// context holds until the checkpoint is closed.
func OpenIn(ctx context.Context, dir storage.Folder, name string, o OpenOptions) (*Checkpoint, error) {
	c, err := open(ctx, dir, name, o)
	if ctx.Err() != nil && err != nil {
		return nil, ErrInterrupted
	}
	return c, err
}

func open(ctx context.Context, dir storage.Folder, name string, o OpenOptions) (*Checkpoint, error) {
	c := &Checkpoint{
		Path: dir.Path(name), Folder: name == "", Dir: dir,
		Formats: cmp.Or(o.Formats, formats.Default), Schemes: cmp.Or(o.Schemes, &quant.Default),
	}
	c.byParameter = sync.OnceValue(c.pieces)
	var err error
	if c.Format, err = c.Formats.Detect(ctx, dir, name); err != nil {
		return nil, err
	}
	if err := c.readConfig(ctx); err != nil {
		return nil, err
	}
	if c.container, err = c.Format.Open(ctx, dir, name); err != nil {
		return nil, err
	}
	if err = c.quantizationBeside(ctx); err == nil {
		err = c.innerConfig()
	}
	if err == nil {
		err = c.assemble(ctx)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", c.Path, err)
	}
	return c, nil
}

// Close closes the files.
func (c *Checkpoint) Close() error { return c.container.Close() }

// Metadata returns what is stored with the tensors.
func (c *Checkpoint) Metadata() formats.Metadata { return c.container.Metadata() }

// Files returns the names of the files that hold the tensors, an index included.
func (c *Checkpoint) Files() []string { return c.container.Files() }

// Paths are the files on this machine that c is read from, wherever links have led.
func (c *Checkpoint) Paths() []string {
	var list []string
	for _, name := range append([]string{ConfigName, c.QuantizationFile}, c.Files()...) {
		if name == "" {
			continue
		}
		if path := storage.LocalPath(c.Dir, name); path != "" {
			list = append(list, path)
		}
	}
	return list
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

func (c *Checkpoint) readConfig(ctx context.Context) error {
	if c.Folder {
		f, err := c.Dir.Open(ctx, ConfigName)
		switch {
		case err == nil:
			c.ConfigVersion = f.Version()
			c.ConfigJSON, err = readSmall(f, c.Dir.Path(ConfigName), maxConfigBytes)
			f.Close()
			if err != nil {
				return err
			}
			if c.Config, err = models.ParseConfig(c.ConfigJSON); err != nil {
				return fmt.Errorf("%s: %w", c.Dir.Path(ConfigName), cmp.Or(formats.Foreign(c.ConfigJSON, ConfigName), err))
			}
			if c.Config.ModelType == "" && c.Config.Architecture == "" {
				if err := formats.Foreign(c.ConfigJSON, ConfigName); err != nil {
					return fmt.Errorf("%s: %w", c.Dir.Path(ConfigName), err)
				}
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	return nil
}

// InnerFiles are the small files within the container, as GGUF has a config.
func (c *Checkpoint) InnerFiles() []formats.File {
	if b, ok := c.container.(formats.Bearer); ok {
		return b.SmallFiles()
	}
	return nil
}

// innerConfig takes the config.json within the container, where there is none beside it.
func (c *Checkpoint) innerConfig() (err error) {
	for _, f := range c.InnerFiles() {
		if f.Name == ConfigName && c.Config == nil {
			c.ConfigJSON = f.Data
			if c.Config, err = models.ParseConfig(f.Data); err != nil {
				return fmt.Errorf("%s: %w", ConfigName, err)
			}
		}
	}
	c.Model, c.Known = models.Load(c.Config)
	return nil
}

// ReadSmall reads a file of a folder whole, which has at most limit bytes.
func ReadSmall(ctx context.Context, dir storage.Folder, name string, limit int64) ([]byte, error) {
	f, err := dir.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readSmall(f, dir.Path(name), limit)
}

func readSmall(f storage.File, path string, limit int64) ([]byte, error) {
	if f.Size() > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, expected at most %d", path, formats.ErrLimit, f.Size(), limit)
	}
	return io.ReadAll(io.NewSectionReader(f, 0, limit))
}

// assemble makes the logical weights of the stored tensors.
func (c *Checkpoint) assemble(ctx context.Context) error {
	tensors, notice := unwrap(c.container.Tensors(), c.Model)
	if notice != "" {
		c.Notices = append(c.Notices, notice)
	}
	var config []byte
	if c.Config != nil {
		config = c.Config.JSON()
	}
	s := newStored(tensors, c.DType(), config)

	quantised := make(map[string]quant.Decoder) // by the name of the first part
	companion := make(map[string]string)        // name of a part -> its weight
	calibration := make(map[string]bool)
	for _, scheme := range c.Schemes.All() {
		decoders, err := scheme.Find(ctx, s)
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
		if scheme, ok := scheme.(quant.Calibrated); ok {
			for _, name := range scheme.Calibration(s, decoders) {
				calibration[name] = true
			}
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
		w.Calibration = calibration[t.Name] && !ok && !w.Role.Known
		if ok && w.Role.Kind == models.Conv1D && len(w.Shape) == 2 {
			w.Transposed = true
			w.Shape = w.Shape.Transposed()
		}
		c.Weights = append(c.Weights, w)
	}
	return nil
}
