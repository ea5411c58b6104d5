package lora

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// An adapter's folder may hold weights in more files than the one that PEFT loads: non_lora_trainables.bin
// and mm_projector.bin of LLaVA's scripts, value_head.safetensors of LLaMA-Factory, new_embeddings.safetensors
// of vLLM. They were trained with the adapter, so each of their tensors becomes a new value of the base's, as
// those of PEFT's modules_to_save are, or the adapter is refused with the file's name.

// trainingState matches the files that trainers go on from: of transformers, accelerate and DeepSpeed, and
// the earlier steps of an adapter that mlx-lm keeps. They hold nothing that the adapter's model computes with.
var trainingState = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(?:training_args|optimizer(?:_\d+)?|(?:lr_)?scheduler(?:_\d+)?|scaler|sampler(?:_\d+)?|` +
		`dl_state_dict(?:_\d+)?|rng_state.*|random_states.*|pytorch_model_fsdp.*|.*optim_states|.*model_states)` +
		`\.(?:bin|pt|pth|ckpt)$|^\d{7}_adapters\.safetensors$`)
})

// foreign are the ends of files that hold weights for other programs, in formats that no tool reads an
// adapter's weights from beside it.
var foreign = []string{".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx", ".pdparams", ".tflite", ".keras"}

// mostBeside bounds the files of weights that lie beside an adapter's.
const mostBeside = 1000

// readBeside looks at the files in an adapter's folder that are not its own yet.
func (a *Adapter) readBeside(ctx context.Context) error {
	entries, err := a.Dir.List(ctx, "")
	if err != nil {
		return err
	}
	var adapters, folders, others []string // what is told of and not looked at
	for _, e := range entries {
		name := e.Name
		_, weights := formats.Default.ForExtension(strings.ToLower(name))
		switch {
		case strings.HasPrefix(name, ".") || slices.Contains(a.Files, name) || trainingState().MatchString(name):
		case e.Folder:
			switch folderHolds(ctx, a.Dir, name) {
			case holdsAdapter:
				adapters = append(adapters, name)
			case holdsWeights:
				folders = append(folders, name)
			}
		case slices.Contains(adapterFiles, name) && slices.Contains(a.Files, adapterFiles[0]):
			a.Notices = append(a.Notices, fmt.Sprintf("%s is not looked at: PEFT takes %s", filepath.Join(a.Path, name),
				adapterFiles[0]))
		case slices.ContainsFunc(foreign, func(end string) bool { return strings.HasSuffix(name, end) }):
			others = append(others, name)
		case weights:
			if len(a.beside) == mostBeside {
				return fmt.Errorf("%s: %w: more than %d files of weights beside those of the adapter", a.Path, formats.ErrLimit,
					mostBeside)
			}
			if err := a.openBeside(ctx, name); err != nil {
				return err
			}
		}
	}
	for _, told := range []struct {
		list []string
		what string
	}{
		{adapters, "other adapters, which are not part of this one: give their folders to use them too"},
		{folders, "weights, which PEFT does not load with the adapter, and which are not looked at"},
		{others, "files for other programs, which are not looked at"},
	} {
		if len(told.list) > 0 {
			a.Notices = append(a.Notices, fmt.Sprintf("%s: beside the adapter is %s: %s", a.Path, names(told.list), told.what))
		}
	}
	return nil
}

// What a folder in the folder of an adapter holds.
const (
	holdsNothing = iota
	holdsAdapter
	holdsWeights
)

// folderHolds looks at the names in a folder. One that cannot be read holds nothing.
func folderHolds(ctx context.Context, dir storage.Folder, folder string) int {
	entries, err := dir.List(ctx, folder)
	if err != nil {
		return holdsNothing
	}
	holds := holdsNothing
	for _, e := range entries {
		name := e.Name
		if name == configName {
			return holdsAdapter
		}
		_, weights := formats.Default.ForExtension(strings.ToLower(name))
		if weights && !e.Folder && !strings.HasPrefix(name, ".") && !trainingState().MatchString(name) {
			holds = holdsWeights
		}
	}
	return holds
}

// openBeside makes modules of the tensors of a file that lies beside the adapter's.
func (a *Adapter) openBeside(ctx context.Context, name string) error {
	whole := filepath.Join(a.Path, name)
	refuse := func(why string, args ...any) error {
		return fmt.Errorf("%s: %w: %s; without the file in its folder the adapter is taken alone", whole, ErrUnsupported,
			fmt.Sprintf(why, args...))
	}
	f, err := a.Dir.Open(ctx, name)
	if errors.Is(err, storage.ErrNotRegular) {
		return nil // a folder or a pipe of that name
	}
	if err != nil {
		return refuse("weights beside the adapter that cannot be read: %v", err)
	}
	defer f.Close()
	c, err := formats.Default.Open(ctx, a.Dir, name)
	if errors.Is(err, formats.ErrUnknown) && !errors.Is(err, formats.ErrForeign) {
		a.Notices = append(a.Notices, fmt.Sprintf("%s is no file of weights, and is not looked at", whole))
		return nil
	}
	if err != nil {
		return refuse("weights beside the adapter that cannot be read: %v", err)
	}
	file := storage.LocalPath(a.Dir, name)
	a.containers = append(a.containers, c)
	tensors := slices.Clone(c.Tensors())
	adapted := map[string]bool{}
	replaced := map[string]*Module{}
	for _, m := range a.Modules {
		if m.A.T != nil {
			adapted[m.Name+"."+cmp.Or(m.Param, "weight")] = true
		} else if m.Form == Replace {
			replaced[m.String()] = m
		}
	}
	var list []*Module
	for i := range tensors {
		t := &tensors[i]
		t.File = whole
		if factorName().MatchString(t.Name) {
			return refuse("tensor %s: it holds an adapter too, and which of them is meant is not known",
				tensor.Quote(t.Name))
		}
		m := besideModule(t)
		if m.Name == "" {
			return refuse("tensor %s: it names no module, so what was trained is not known", tensor.Quote(t.Name))
		}
		if adapted[m.Name+"."+m.Param] {
			a.beside = append(a.beside, besideFile{file, whole, t.Name})
			a.Notices = append(a.Notices, fmt.Sprintf("%s holds a model, which is no part of the adapter", whole))
			return nil
		}
		if o := replaced[m.String()]; o != nil {
			same, err := sameBytes(o.Value, t)
			if err != nil {
				return err
			}
			if !same {
				return refuse("tensor %s: it differs from %s of %s", tensor.Quote(t.Name), tensor.Quote(o.Value.Name),
					o.Value.File)
			}
			continue
		}
		replaced[m.String()] = m
		list = append(list, m)
	}
	if list == nil {
		return nil
	}
	a.Modules = append(a.Modules, list...)
	a.Files = append(a.Files, name)
	a.beside = append(a.beside, besideFile{file: file, name: whole})
	a.Notices = append(a.Notices, fmt.Sprintf("%s was trained with the adapter: what it holds, %s, are new values of the "+
		"base's", whole, valuesOf(list)))
	return a.expanded(f.Size(), tensors)
}

// valuesOf names some of many values.
func valuesOf(list []*Module) string {
	var all []string
	for _, m := range list {
		all = append(all, m.String())
	}
	return names(all)
}

// besideModule is the new value that a tensor is, by a name as PEFT or the model itself has it.
func besideModule(t *formats.Tensor) *Module {
	name, param := cutLast(inModel(t.Name))
	if before, kind, ok := strings.Cut(name+".", ".modules_to_save."); ok && strings.Count(kind, ".") <= 1 {
		name = before // behind it is the name of the adapter
	}
	name = withoutLayers(strings.TrimSuffix(name, "."))
	return &Module{Name: name, Param: param, Form: Replace, Value: t, beside: true}
}

// factorName matches the names that adapters of PEFT, kohya, LyCORIS and diffusers give to their tensors.
var factorName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?:^|[._])(?:lora|hada|lokr|ia3|vera|oft|boft|dora)[_.]`)
})

// besideFile is a file of weights beside an adapter's: its path, where it is on this machine, and its name in
// messages. One that holds a tensor which the adapter has factors for is a model, with the adapter in it or not.
type besideFile struct{ file, name, model string }

// CheckBeside tells an adapter which files its base consists of. Where they lie in the adapter's folder they are no
// part of the adapter; any other model there may be the base as it was trained, or one that the adapter has been
// merged into, and is an error.
func (a *Adapter) CheckBeside(base ...string) error {
	for _, f := range a.beside {
		info, err := os.Stat(f.file)
		if f.file != "" && err != nil {
			return err
		}
		same := f.file != "" && slices.ContainsFunc(base, func(path string) bool {
			other, err := os.Stat(path)
			return err == nil && os.SameFile(info, other)
		})
		if same {
			a.Modules = slices.DeleteFunc(a.Modules, func(m *Module) bool { return m.beside && m.Value.File == f.name })
			a.Files = slices.DeleteFunc(a.Files, func(name string) bool { return filepath.Join(a.Path, name) == f.name })
			a.Notices = slices.DeleteFunc(a.Notices, func(n string) bool { return strings.HasPrefix(n, f.name+" was trained") })
			continue
		}
		if f.model != "" {
			return errModelBeside(f.name, f.model)
		}
	}
	return nil
}

func errModelBeside(file, name string) error {
	return fmt.Errorf("%s: tensor %s: %w: the adapter has factors for it, so a model lies beside the adapter, and "+
		"whether the "+
		"adapter is in it already is not known; without the file in its folder the adapter is taken alone", file,
		tensor.Quote(name), ErrUnsupported)
}

// checkBeside refuses new values from beside an adapter of what the adapter has factors for: under whatever names,
// such a file is a model.
func (b *binder) checkBeside(i int, a Weighted) error {
	replaced := map[*Module]*parameter{}
	for _, claims := range b.bound {
		for _, c := range claims {
			if c.module.beside {
				replaced[c.module] = c.p
			}
		}
	}
	for _, m := range a.Modules {
		if p := replaced[m]; p != nil && b.bound[claimKey(i, false, p)] != nil && m.Param == "weight" {
			return errModelBeside(m.Value.File, m.Value.Name)
		}
	}
	return nil
}

// ofBeside says of an error about a module of a file beside the adapter's which tensor it is about.
func (m *Module) ofBeside(err error) error {
	if err == nil || !m.beside {
		return err
	}
	instead := ""
	if errors.Is(err, ErrBase) {
		instead = "merge onto the base that it was trained on, or "
	}
	return fmt.Errorf("%s: tensor %s: %w; it was trained with the adapter, and would be lost: %stake the file out of the "+
		"folder", m.Value.File, tensor.Quote(m.Value.Name), err, instead)
}
