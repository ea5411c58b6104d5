// Package pipeline takes a checkpoint apart and writes another: plan, run, finish.
//
// Open reads headers only. NewPlan decides for every weight what becomes of it and
// where each byte of the result goes, before any data is read. Run reads, changes and
// writes tiles of a few hundred KiB, so that its memory does not depend on the model. The
// result appears at its destination by one rename, or not at all.
package pipeline

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/models"
	"github.com/lorakit/lorakit/quant"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// configName is the file that says what a checkpoint is.
const configName = "config.json"

// maxConfigBytes bounds config.json.
const maxConfigBytes = 16 << 20

// Checkpoint is an opened checkpoint: its headers have been read and checked, its
// data has not been touched.
type Checkpoint struct {
	Path   string // as it was given
	Folder bool   // whether Path is a folder
	Format formats.Format
	// Config is what config.json says, nil where there is none.
	Config *models.Config
	// Model knows the architecture's tensors, or answers by the general rule
	// where Known is false.
	Model *models.Model
	Known bool
	// Weights are the logical tensors, in the order in which their data is stored.
	Weights []*Weight

	container formats.Container
	// What Merge has made of it.
	adapters      []AdapterInput
	head          string // an output head that becomes a tensor of its own, "" where none does
	headFrom      string // what it was tied to
	untied        bool   // the output head is no longer tied to the embedding
	vocabulary    int64  // where an adapter brings another number of rows, else 0
	vocabularyWas int64
	mergeNotices  []string

	configJSON []byte
	configInfo fs.FileInfo
}

// Weight is one logical tensor of a checkpoint, however it is stored.
type Weight struct {
	// Info has the model's own orientation, and the dtype of the values: for a
	// quantised weight what it was before.
	tensor.Info
	// Role is what the architecture says of it.
	Role models.Tensor
	// Parts are the stored tensors it consists of, that with the bulk of the
	// data first.
	Parts []formats.Tensor
	// Decoder reads a quantised weight; nil for a plain one.
	Decoder quant.Decoder
	// Values is the type in which the weight is read: DType, but where a scheme
	// computes in another and does not round.
	Values tensor.DType
	merge  *merging // what adapters do to it, or nil
	// Transposed says that the weight is stored the other way round, as
	// bitsandbytes does with Conv1D.
	Transposed bool
}

// failed says of an error which weight it is about, and in which file.
func (w *Weight) failed(err error) error {
	return fmt.Errorf("%s: tensor %s: %w", w.Parts[0].File, tensor.Quote(w.Name), err)
}

// StoredBytes is the size of the weight in its file, companions included.
func (w *Weight) StoredBytes() int64 {
	var n int64
	for _, p := range w.Parts {
		n += p.Bytes
	}
	return n
}

// stored is the shape in which the values lie in the file.
func (w *Weight) stored() tensor.Shape {
	if w.Transposed {
		return transposed(w.Shape)
	}
	return w.Shape
}

func transposed(s tensor.Shape) tensor.Shape { return tensor.Shape{s[1], s[0]} }

// Open reads the headers of the checkpoint at path, a folder or a file, and its
// config.json where path is a folder that has one.
func Open(path string) (*Checkpoint, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	f, err := formats.Detect(path)
	if err != nil {
		return nil, err
	}
	c := &Checkpoint{Path: path, Folder: info.IsDir(), Format: f}
	if err := c.readConfig(); err != nil {
		return nil, err
	}
	if c.container, err = f.Open(path); err != nil {
		return nil, err
	}
	if err := c.assemble(); err != nil {
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

// file is the path of one of the checkpoint's files.
func (c *Checkpoint) file(name string) string {
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
		path, err := storage.Within(c.Path, configName)
		switch {
		case err == nil:
			if c.configJSON, c.configInfo, err = readSmall(path, maxConfigBytes); err != nil {
				return err
			}
			if c.Config, err = models.ParseConfig(c.configJSON); err != nil {
				return fmt.Errorf("%s: %w", filepath.Join(c.Path, configName), err)
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

// rawTensors is what a container holds, by name: what a scheme looks into.
type rawTensors struct {
	tensors []formats.Tensor
	byName  map[string]int
}

// newRawTensors also returns the names.
func newRawTensors(tensors []formats.Tensor) (*rawTensors, []string) {
	r := &rawTensors{tensors, make(map[string]int, len(tensors))}
	names := make([]string, len(tensors))
	for i, t := range tensors {
		r.byName[t.Name] = i
		names[i] = t.Name
	}
	return r, names
}

// Lookup finds a stored tensor by its name.
func (r *rawTensors) Lookup(name string) (tensor.Info, bool) {
	i, ok := r.byName[name]
	if !ok {
		return tensor.Info{}, false
	}
	return r.tensors[i].Info, true
}

// Read fills p from the bytes of the named tensor.
func (r *rawTensors) Read(name string, p []byte, off int64) error {
	i, ok := r.byName[name]
	if !ok {
		return fmt.Errorf("no tensor %q", name)
	}
	return readPart(&r.tensors[i], p, off)
}

// readPart fills p from a stored tensor, beginning at its byte off. A file that
// has become shorter since it was opened is an error that says so.
func readPart(t *formats.Tensor, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > t.Bytes {
		return fmt.Errorf("bytes %d to %d asked for, it has %d", off, off+int64(len(p)), t.Bytes)
	}
	n, err := t.Data.ReadAt(p, t.Offset+off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d of %d bytes at %d of %s: %w", n, len(p), t.Offset+off, t.File, err)
}

// assemble makes the logical weights of the stored tensors.
func (c *Checkpoint) assemble() error {
	raw, names := newRawTensors(c.container.Tensors())

	quantised := make(map[string]quant.Decoder) // by the name of the first part
	companion := make(map[string]string)        // name of a part -> its weight
	for _, s := range quant.All() {
		decoders, err := s.Find(names, raw, c.DType())
		if err != nil {
			return err
		}
		for _, d := range decoders {
			parts := d.Parts()
			for _, p := range parts {
				if other, taken := companion[p]; taken {
					return fmt.Errorf("tensor %s: %w: it belongs to both %s and %s", tensor.Quote(p), quant.ErrMalformed, tensor.Quote(other), tensor.Quote(d.Info().Name))
				}
				companion[p] = d.Info().Name
			}
			quantised[parts[0]] = d
		}
	}

	for _, t := range raw.tensors {
		d, ok := quantised[t.Name]
		if _, part := companion[t.Name]; part && !ok {
			continue
		}
		w := &Weight{Info: t.Info, Values: t.DType}
		if ok {
			w.Decoder = d
			w.Info, w.Values = d.Info(), d.Values()
			for _, p := range d.Parts() {
				w.Parts = append(w.Parts, raw.tensors[raw.byName[p]])
			}
		} else {
			w.Parts = []formats.Tensor{t}
		}
		w.Role = c.Model.Tensor(w.Name, w.Shape)
		if ok && w.Role.Kind == models.Conv1D && len(w.Shape) == 2 {
			w.Transposed = true
			w.Shape = transposed(w.Shape)
		}
		c.Weights = append(c.Weights, w)
	}
	return nil
}

// foreignScheme returns the quant_method of config.json where no scheme here reads
// it, so that its weights are seen as the raw tensors they consist of.
func (c *Checkpoint) foreignScheme() (string, bool) {
	if c.Config == nil || c.Config.Quantization == nil {
		return "", false
	}
	method := c.promise().Method
	if _, ok := quant.Named(method); ok {
		return "", false
	}
	return method, true
}

// promise is what a quantization_config says of how the weights are stored.
type promise struct {
	Method   string         `json:"quant_method"`
	FourBit  bool           `json:"load_in_4bit"`
	EightBit bool           `json:"load_in_8bit"`
	Skips    jsontext.Value `json:"llm_int8_skip_modules"`
	skip     []string       // nil leaves it to the loader
}

// promise reads the quantization_config; one that cannot be read promises nothing.
func (c *Checkpoint) promise() (p promise) {
	if c.Config == nil || json.Unmarshal(c.Config.Quantization, &p) != nil {
		return promise{}
	}
	if p.Method == "" && (p.FourBit || p.EightBit) { // as before there were other methods
		p.Method = "bitsandbytes"
	}
	if json.Unmarshal(p.Skips, &p.skip) != nil {
		p.skip = nil
	}
	return p
}

// knownSchemes lists the schemes that are read here.
func knownSchemes() string {
	var names []string
	for _, s := range quant.All() {
		names = append(names, s.Name())
	}
	return strings.Join(names, ", ")
}
