package lora

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// The dialects in which people have adapters.
const (
	PEFT      = "peft"      // a folder: adapter_config.json, adapter_model.safetensors or .bin
	Kohya     = "kohya"     // one .safetensors file with lora_down and lora_up, and no dots in its modules' names
	Diffusers = "diffusers" // one .safetensors file for the components of a pipeline
	MLX       = "mlx"       // a folder: adapter_config.json, adapters.safetensors
	LoRALib   = "loralib"   // one file of torch.save with lora_A and lora_B
	GGUF      = "gguf"      // one .gguf file for llama.cpp, with the names of its base's
)

// Dialects lists the dialects, which are all read and written.
func Dialects() []string { return []string{PEFT, Kohya, Diffusers, MLX, LoRALib, GGUF} }

// OpenOptions say what a file leaves open. The zero value is right for all that say everything.
type OpenOptions struct {
	// Alpha is that of a loralib state dict, which does not hold it: needed there, and not looked at elsewhere.
	Alpha float64
	// ExpertLayout is "rank_major" or "grouped_by_expert": how B of a stack of experts lies in a PEFT folder that does
	// not say it. Empty is rank_major, which is PEFT's. Elsewhere it is not looked at.
	ExpertLayout string
	// Component, where not empty, is the one part of a pipeline whose modules are taken, by the name that the adapter
	// or diffusers has for it: "unet", "text_encoder_2". Others are left out, and a notice says so. An adapter that
	// names no components is taken to be of that one.
	Component string
	// Base is what a GGUF adapter is for. Without one its modules keep the names that they have in its file; elsewhere it
	// is not looked at.
	Base *Base
	// Conditional takes an adapter too whose deltas are for the tokens behind some others alone (aLoRA): whoever opens it
	// does not add them to weights.
	Conditional bool
}

const (
	configName     = "adapter_config.json"
	maxConfigBytes = 16 << 20
)

// adapterFiles are the names of a PEFT adapter's tensors, the preferred first.
var adapterFiles = []string{"adapter_model.safetensors", "adapter_model.bin"}

// mlxFile is the name of an MLX adapter's tensors.
const mlxFile = "adapters.safetensors"

// errNone says that a path is none of what Open reads.
func errNone(path, found string) error {
	return fmt.Errorf("%s: %w: %s, expected an adapter: a PEFT folder (%s, %s), an MLX folder (%s, %s), or a file of "+
		"kohya, diffusers, loralib or llama.cpp", path, ErrUnsupported, found, configName, adapterFiles[0], configName,
		mlxFile)
}

// Open reads the headers of an adapter of any of the Dialects.
func Open(path string, o OpenOptions) (*Adapter, error) {
	dir, name, err := storage.Resolve(path, storage.Options{})
	if err != nil {
		return nil, err
	}
	return OpenIn(context.Background(), dir, name, o)
}

// OpenIn reads the headers of an adapter in a folder: the file of that name, or with no name the folder
// itself. The context holds until the adapter is closed.
func OpenIn(ctx context.Context, dir storage.Folder, name string, o OpenOptions) (*Adapter, error) {
	path := dir.Path(name)
	if alpha := float32(o.Alpha); alpha-alpha != 0 || alpha == 0 && o.Alpha != 0 {
		return nil, fmt.Errorf("%s: %w: alpha is %v, expected a number that float32 holds", path, ErrMalformed, o.Alpha)
	}
	a := &Adapter{Path: path, Dir: dir, Options: o}
	var err error
	if name == "" {
		err = a.openFolder(ctx, o)
	} else {
		err = a.openFile(ctx, name, o)
	}
	if err == nil && len(a.Modules) == 0 {
		err = fmt.Errorf("%s: %w: it has no tensors", a.Path, ErrMalformed)
	}
	if err == nil && o.Component != "" {
		err = a.only(o.Component)
	}
	if err == nil {
		err = a.checkTypes()
	}
	if err == nil && !o.Conditional {
		if err = a.Config.always(); err != nil && a.Dialect == PEFT {
			err = fmt.Errorf("%s: %w", filepath.Join(a.Path, configName), err)
		} else if err != nil {
			err = a.named(err)
		}
	}
	if err != nil {
		a.Close()
		return nil, err
	}
	a.sort()
	return a, nil
}

// checkTypes refuses factors that are no floating-point numbers.
func (a *Adapter) checkTypes() error {
	for _, m := range a.Modules {
		list := []*formats.Tensor{m.A.T, m.B.T, m.Magnitude}
		if m.Form == Bias {
			list = append(list, m.Value)
		}
		for _, t := range list {
			if t != nil && !t.DType.Float() && t.DType != tensor.F64 {
				return a.failed(t, wrongType(t))
			}
		}
	}
	return nil
}

// IsAdapter reports whether a path looks like an adapter and not like a checkpoint. It reads headers at most.
func IsAdapter(path string) bool {
	ctx := context.Background()
	dir, name, err := storage.Resolve(path, storage.Options{})
	if err != nil {
		return false
	}
	if name == "" {
		for _, name := range []string{configName, mlxFile} {
			if _, err := os.Lstat(dir.Path(name)); err == nil { // a link to nothing is said later
				return true
			}
		}
		return diffusersFile(ctx, dir) != ""
	}
	c, err := formats.Default.Open(ctx, dir, name)
	if err != nil {
		return false
	}
	defer c.Close()
	return AreAdapter(c.Tensors(), c.Metadata())
}

// AreAdapter reports whether the tensors and metadata of a file are those of an adapter.
func AreAdapter(tensors []formats.Tensor, metadata formats.Metadata) bool {
	dialect, _ := dialectOf(tensors, metadata)
	return dialect != ""
}

// openFolder reads a PEFT or an MLX folder.
func (a *Adapter) openFolder(ctx context.Context, o OpenOptions) error {
	config, err := readFile(ctx, a.Dir, configName)
	if errors.Is(err, fs.ErrNotExist) {
		if name := diffusersFile(ctx, a.Dir); name != "" {
			a.Path = a.Dir.Path(name)
			return a.openFile(ctx, name, o)
		}
		return errNone(a.Path, "there is no "+configName)
	}
	if err != nil {
		return err
	}
	a.Files = []string{configName}
	var all map[string]jsontext.Value
	if err := json.Unmarshal(config, &all); err != nil {
		return fmt.Errorf("%s: %w: %w", filepath.Join(a.Path, configName), ErrMalformed,
			cmp.Or(formats.Foreign(config, configName), notObject(config, err)))
	}
	if all["peft_type"] == nil {
		if err := formats.Foreign(config, configName); err != nil {
			return fmt.Errorf("%s: %w: %w", filepath.Join(a.Path, configName), ErrMalformed, err)
		}
	}
	if all["peft_type"] == nil && (all["lora_parameters"] != nil || all["fine_tune_type"] != nil) {
		a.Dialect = MLX
		if err := a.openTensors(ctx, mlxFile); err != nil {
			return err
		}
		if err := a.readMLX(config); err != nil {
			return err
		}
		return a.readBeside(ctx)
	}
	a.Dialect = PEFT
	if a.Config, err = parseConfig(config); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(a.Path, configName), err)
	}
	if len(a.Config.unknownFields) > 0 {
		a.Notices = append(a.Notices, fmt.Sprintf("%s has fields that are not known here, and are not looked at: %s",
			filepath.Join(a.Path, configName), names(a.Config.unknownFields)))
	}
	if err := a.Config.setLayout(o.ExpertLayout); err != nil {
		return a.named(err)
	}
	if err := a.openTensors(ctx, adapterFiles...); err != nil {
		return err
	}
	if err := a.readPEFT(a.tensors); err != nil {
		return err
	}
	return a.readBeside(ctx)
}

// notObject says what is wrong with a text that is no JSON object, without the words of the decoder's package.
func notObject(b []byte, err error) error {
	switch kind := jsontext.Value(b).Kind(); {
	case len(bytes.TrimSpace(b)) == 0:
		return errors.New("it is empty, expected a JSON object")
	case kind != '{' && jsontext.Value(b).IsValid():
		return fmt.Errorf("found %s, expected a JSON object", strings.Replace(kind.String(), "[", "array", 1))
	}
	return errors.New(strings.TrimPrefix(err.Error(), "jsontext: "))
}

// diffusersFile is the name of the file that diffusers' save_lora_weights has left in a folder, if it has.
func diffusersFile(ctx context.Context, dir storage.Folder) string {
	for _, name := range []string{"pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"} {
		f, err := dir.Open(ctx, name)
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, fs.ErrNotExist) { // what else is wrong with it, such as a link that leads out, is said later
			return name
		}
	}
	return ""
}

// choices lists the words that are, and which of them is nearest to one that is not.
func choices(word string, words []string) string {
	return strings.Join(words, ", ") + nearest.Suggestion(word, words)
}

// names lists some of many names.
func names(list []string) string {
	var quoted []string
	for _, name := range list[:min(len(list), 4)] {
		quoted = append(quoted, tensor.Quote(name))
	}
	if n := len(list) - len(quoted); n > 0 {
		quoted = append(quoted, fmt.Sprintf("and %d more", n))
	}
	return strings.Join(quoted, ", ")
}

// openTensors opens the first of the files that is there.
func (a *Adapter) openTensors(ctx context.Context, names ...string) error {
	for _, name := range names {
		err := a.openContainer(ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			a.Files = append(a.Files, name)
		}
		return err
	}
	return fmt.Errorf("%s: %w: expected %s beside %s", a.Path, ErrMalformed, strings.Join(names, " or "), configName)
}

// openContainer opens the file of the adapter's tensors. Messages have its whole name: several adapters have files of
// one.
func (a *Adapter) openContainer(ctx context.Context, name string) error {
	file, err := a.Dir.Open(ctx, name)
	if err != nil {
		return err
	}
	defer file.Close()
	c, err := formats.Default.Open(ctx, a.Dir, name)
	if err != nil {
		return err
	}
	a.containers = append(a.containers, c)
	a.tensors = slices.Clone(c.Tensors())
	for i := range a.tensors {
		a.tensors[i].File = a.Dir.Path(name)
	}
	return a.expanded(file.Size(), a.tensors)
}

// openFile reads a file of kohya, diffusers, loralib or llama.cpp.
func (a *Adapter) openFile(ctx context.Context, name string, o OpenOptions) error {
	path := a.Path
	err := a.openContainer(ctx, name)
	if errors.Is(err, formats.ErrUnknown) && !errors.Is(err, formats.ErrForeign) {
		return errNone(path, "a file that is neither safetensors nor of torch.save")
	}
	if err != nil {
		return err
	}
	a.Files = []string{name}
	tensors, metadata := a.tensors, a.containers[0].Metadata()
	dialect, example := dialectOf(tensors, metadata)
	a.Dialect = dialect
	switch dialect {
	case Kohya, Diffusers:
		return a.readOneFile(tensors, metadata)
	case LoRALib:
		return a.readLoRALib(tensors, o.Alpha)
	case GGUF:
		return a.readGGUF(metadata, o.Base)
	case PEFT, MLX:
		what := fmt.Sprintf("which has its scaling in an %s beside it, and there is none", configName)
		if f, err := a.Dir.Open(ctx, configName); err == nil {
			f.Close()
			what = fmt.Sprintf("whose %s lies beside it: give the folder", configName)
		}
		return fmt.Errorf("%s: %w: tensor %s is of a %s adapter, %s", path, ErrUnsupported, tensor.Quote(example), dialect,
			what)
	}
	for i := range tensors {
		if t := &tensors[i]; ofLyCORIS(t.Name) {
			return a.failed(t, fmt.Errorf("%w: %s", ErrUnsupported, a.strangeName(t.Name)))
		}
	}
	return errNone(path, "no tensor of it belongs to an adapter")
}

// mostExpanded is how many times the size of a file its tensors may have. In those of torch.save tensors
// may share their elements, and one of a few bytes may be expanded to gigabytes, which no adapter is.
const mostExpanded = 4

// expanded refuses a file, of the given size, whose tensors are far larger than it is: they are read whole.
func (a *Adapter) expanded(size int64, tensors []formats.Tensor) error {
	var total int64
	for i := range tensors {
		t := &tensors[i]
		if total += t.Bytes; total < 0 || total/mostExpanded > size+1<<20 {
			return a.failed(t, fmt.Errorf("%w: with it the tensors are %d bytes, in a file of %d", ErrMalformed, total, size))
		}
	}
	return nil
}

// dialectOf tells from the names of a file's tensors of which dialect they are, and by which.
func dialectOf(tensors []formats.Tensor, metadata formats.Metadata) (dialect, example string) {
	if isGGUF(metadata) {
		return GGUF, ""
	}
	for i := range tensors { // as PEFT's AdaLoRA, whose lora_A is called as in loralib
		if name, ok := strings.CutPrefix(tensors[i].Name, peftPrefix); ok && strange(strings.Split(name, ".")) {
			return PEFT, tensors[i].Name
		}
	}
	for i := range tensors {
		name := tensors[i].Name
		module, _ := factorOf(name)
		component, _ := cutComponent(module)
		has := func(ends ...string) bool {
			return slices.ContainsFunc(ends, func(end string) bool { return strings.HasSuffix(name, end) })
		}
		switch {
		case has(".lora_down.weight", ".lora_up.weight") && component == "":
			return Kohya, name
		case has(".lora_down.weight", ".lora_up.weight", ".lora.down.weight", ".lora.up.weight", oldDown, oldUp,
			".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"):
			return Diffusers, name
		case has(".lora_A", ".lora_B") && component == "":
			return LoRALib, name
		case has(".lora_a", ".lora_b"):
			return MLX, name
		case has(".lora_A", ".lora_B") || strings.Contains(name, ".lora_A.") || strings.Contains(name, ".lora_B.") ||
			strings.Contains(name, ".lora_embedding_"):
			if saysItsScaling(tensors, metadata) {
				return Diffusers, name
			}
			return PEFT, name
		}
	}
	return "", ""
}

// sort brings the modules into the order of their names, values first: what is added is added to them.
func (a *Adapter) sort() {
	rank := func(m *Module) int {
		if m.Base {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(a.Modules, func(x, y *Module) int {
		return cmp.Or(strings.Compare(x.Name, y.Name), cmp.Compare(rank(x), rank(y)), strings.Compare(x.Param, y.Param),
			cmp.Compare(y.WrapDepth, x.WrapDepth))
	})
}

func readFile(ctx context.Context, dir storage.Folder, name string) ([]byte, error) {
	f, err := dir.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > maxConfigBytes {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", dir.Path(name), formats.ErrLimit, maxConfigBytes)
	}
	return io.ReadAll(io.NewSectionReader(f, 0, maxConfigBytes))
}
