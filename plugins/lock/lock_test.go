package lock

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"

	_ "github.com/lorakit/lorakit/formats/safetensors" // a built-in
	_ "github.com/lorakit/lorakit/quant/bnb"           // another
)

func toy() Described {
	return Described{
		Name: "toy", Version: "1.0.0", Protocol: 1,
		Capabilities: []string{Read, Extents, WriteLayout, WriteStream, SchemeDecode, Deterministic},
		Formats: []Format{
			{Name: "toy", Extensions: []string{".toy"}, Magic: []Magic{{Offset: 4, Bytes: Hex("TOY1")}},
				FileNames: []string{"toy_*.bin"}, Write: WriteByLayout, DTypes: []string{"F32", "BF16"}},
			{Name: "toy-zip", Extensions: []string{".toy.zip"}, Magic: []Magic{}, FileNames: []string{}, Write: WriteByStream},
		},
		Schemes: []Scheme{{Name: "toyq", Types: []string{"toy4"}, Parameters: []string{"block_size"},
			Suffixes: []string{".toy_scale"}}},
	}
}

// says is a plugin that is not started.
func says(d Described) Describe {
	return func(context.Context, *Plugin, string) (Described, error) { return d, nil }
}

// write makes files from their paths and contents; what has "run" in its name can be executed.
func write(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o777))
		mode := fs.FileMode(0o666)
		if strings.Contains(name, "run") {
			mode = 0o777
		}
		require.NoError(t, os.WriteFile(path, []byte(content), mode))
	}
	return dir
}

// packed is a package of two files.
func packed(t *testing.T) string {
	return write(t, t.TempDir(), map[string]string{
		"plugin.json": `{"name": "toy", "command": ["./bin/run", "--serve"], "start_seconds": 20}`,
		"bin/run":     "#!/bin/sh\n",
	})
}

func open(t *testing.T, dir string) *Folder {
	t.Helper()
	f, err := Open(dir, BuiltIn())
	require.NoError(t, err)
	return f
}

// installed is a folder with the plugin toy.
func installed(t *testing.T) (*Folder, *Plugin) {
	t.Helper()
	f := open(t, filepath.Join(t.TempDir(), "plugins"))
	p, err := f.Install(t.Context(), packed(t), says(toy()), InstallOptions{})
	require.NoError(t, err)
	return f, p
}

// oneLine holds an error against its kind and what it says.
func oneLine(t *testing.T, err error, kind error, parts ...string) {
	t.Helper()
	require.Error(t, err)
	require.NotContains(t, err.Error(), "\n")
	if kind != nil {
		require.ErrorIs(t, err, kind)
	}
	for _, p := range parts {
		require.ErrorContains(t, err, p)
	}
}

// clean holds that nothing of an install that failed is left.
func clean(t *testing.T, f *Folder) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(f.Dir(), tempPrefix+"*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestDir(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", "/config")
	if runtime.GOOS == "linux" {
		dir, err := Dir()
		require.NoError(t, err)
		require.Equal(t, "/config/lorakit/plugins", dir)
	}
	own := t.TempDir()
	t.Setenv(Environment, own)
	dir, err := Dir()
	require.NoError(t, err)
	require.Equal(t, own, dir)
}

func TestInstall(t *testing.T) {
	f, p := installed(t)
	require.Empty(t, p.Described.Difference(new(toy())))
	require.Equal(t, []string{"./bin/run", "--serve"}, p.Command)
	require.Nil(t, p.Interpreter)
	require.Equal(t, 20, p.StartSeconds)
	require.False(t, p.MTLS)
	require.Len(t, p.Files, 2)
	require.Equal(t, "bin/run", p.Files[0].Path)
	require.Equal(t, []string{filepath.Join(f.Dir(), "toy", "1.0.0", "bin", "run"), "--serve"}, p.Argv(f.Path(p)))
	clean(t, f)

	// Another process reads the same.
	g := open(t, f.Dir())
	require.Len(t, g.Plugins(), 1)
	q := g.Plugins()[0]
	require.Equal(t, p, q)
	state, problem := g.State(q)
	require.Equal(t, OK, state, problem)
	require.Empty(t, problem)
	r, err := g.Verify(q)
	require.NoError(t, err)
	require.Equal(t, Report{}, r)
	require.NoError(t, r.Err(q))

	if runtime.GOOS != "windows" {
		for path, mode := range map[string]fs.FileMode{"": 0o700, lockName: 0o600, "toy": 0o700, "toy/1.0.0": 0o700,
			"toy/1.0.0/bin": 0o700, "toy/1.0.0/bin/run": 0o700, "toy/1.0.0/plugin.json": 0o600} {
			info, err := os.Lstat(filepath.Join(f.Dir(), path))
			require.NoError(t, err)
			require.Equal(t, mode, info.Mode().Perm(), path)
		}
	}
}

func TestLockFileIsThatOfTheSpecification(t *testing.T) {
	f, p := installed(t)
	data, err := os.ReadFile(filepath.Join(f.Dir(), lockName))
	require.NoError(t, err)
	run, manifest := p.Files[0], p.Files[1]
	require.JSONEq(t, `{"lock_version": 1, "plugins": [{"name": "toy", "version": "1.0.0", "protocol": 1,
		"command": ["./bin/run", "--serve"], "interpreter": null, "files": [
			{"path": "bin/run", "size": 10, "sha256": "a8076d3d28d21e02012b20eaf7dbf75409a6277134439025f282e368e3305abf",
				"mtime": "`+run.MTime+`"},
			{"path": "plugin.json", "size": 73, "sha256": "`+manifest.SHA256+`", "mtime": "`+manifest.MTime+`"}],
		"digest": "`+digest(p.Files)+`", "mtls": false, "start_seconds": 20,
		"capabilities": ["read", "extents", "write-layout", "write-stream", "scheme-decode", "deterministic"],
		"formats": [
			{"name": "toy", "extensions": [".toy"], "magic": [{"offset": 4, "hex": "544f5931"}], "file_names": ["toy_*.bin"],
				"write": "layout", "dtypes": ["F32", "BF16"]},
			{"name": "toy-zip", "extensions": [".toy.zip"], "magic": [], "file_names": [], "write": "stream"}],
		"schemes": [{"name": "toyq", "types": ["toy4"], "parameters": ["block_size"],
			"suffixes": [".toy_scale"]}],
		"installed": "`+p.Installed.Format("2006-01-02T15:04:05Z")+`"}]}`, string(data))
}

func TestInstallOfAnExecutable(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "deep", "plugins"))
	file := filepath.Join(write(t, t.TempDir(), map[string]string{"run-toy": "\x7fELF"}), "run-toy")
	var seen *Plugin
	describe := func(_ context.Context, p *Plugin, dir string) (Described, error) {
		seen = new(*p)
		require.FileExists(t, p.Argv(dir)[0])
		return toy(), nil
	}
	p, err := f.Install(t.Context(), file, describe, InstallOptions{})
	require.NoError(t, err)
	require.True(t, p.MTLS)
	require.True(t, seen.MTLS)
	require.Equal(t, []string{"./run-toy"}, p.Command)

	p, err = f.Install(t.Context(), file, describe, InstallOptions{NoMTLS: true})
	require.NoError(t, err)
	require.False(t, p.MTLS)
	require.False(t, seen.MTLS)
	require.Len(t, f.Plugins(), 1)

	// Whoever gives a path has chosen where it leads.
	link := filepath.Join(t.TempDir(), "link")
	if os.Symlink(file, link) == nil {
		_, err = f.Install(t.Context(), link, describe, InstallOptions{})
		require.NoError(t, err)
	}
	if runtime.GOOS != "windows" {
		plain := filepath.Join(write(t, t.TempDir(), map[string]string{"toy": ""}), "toy")
		_, err = f.Install(t.Context(), plain, describe, InstallOptions{})
		oneLine(t, err, formats.ErrMalformed, "expected a file that may be executed")
	}
	clean(t, f)
}

func TestInterpreter(t *testing.T) {
	bin := write(t, t.TempDir(), map[string]string{
		"run-python": "#!/bin/sh\necho Python 3.99.0\necho more\n", "run-silent": "#!/bin/sh\nexit 1\n"})
	if runtime.GOOS == "windows" {
		t.Skip("the programs are scripts of a Unix shell")
	}
	t.Setenv("PATH", bin+":/bin:/usr/bin")
	f := open(t, filepath.Join(t.TempDir(), "plugins"))
	package_ := func(command string) string {
		return write(t, t.TempDir(), map[string]string{"main.py": "pass", "plugin.json": `{"name": "toy", "command": [` + command +
			`]}`})
	}
	p, err := f.Install(t.Context(), package_(`"run-python", "-I", "main.py"`), says(toy()), InstallOptions{})
	require.NoError(t, err)
	path := filepath.Join(bin, "run-python")
	require.Equal(t, path, p.Interpreter.Path)
	require.Equal(t, "Python 3.99.0", p.Interpreter.Version)
	require.Equal(t, []string{"run-python", "-I", "main.py"}, p.Command)
	require.Equal(t, []string{path, "-B", "-I", "main.py"}, p.Argv("dir"), "it must not write into the folder")

	// The interpreter is pinned as well.
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\necho Python 3.99.1\n"), 0o777))
	r, err := f.Verify(p)
	require.NoError(t, err)
	require.Equal(t, Report{Changed: []string{path}}, r)
	state, _ := f.State(p)
	require.Equal(t, Changed, state)
	require.NoError(t, f.Accept(t.Context(), p))
	require.Equal(t, "Python 3.99.1", p.Interpreter.Version)
	state, problem := f.State(open(t, f.Dir()).Plugins()[0])
	require.Equal(t, OK, state, problem)
	require.NoError(t, os.Remove(path))
	state, problem = f.State(p)
	require.Equal(t, Missing, state)
	require.Contains(t, problem, path)
	require.NoError(t, f.Remove(t.Context(), "toy"))

	p, err = f.Install(t.Context(), package_(`"run-silent"`), says(toy()), InstallOptions{})
	require.NoError(t, err)
	require.Empty(t, p.Interpreter.Version)
	require.NoError(t, f.Remove(t.Context(), "toy"))

	// A script of a manager of versions is not what runs the plugin.
	write(t, bin, map[string]string{"run-shim": "#!/bin/sh\nexec run-real \"$@\"\n",
		"run-real": "#!/bin/sh\ncase $1 in --version) echo Python 3.12.1;; *) echo " + bin + "/run-real;; esac\n"})
	p, err = f.Install(t.Context(), package_(`"run-shim", "main.py"`), says(toy()), InstallOptions{})
	require.NoError(t, err)
	require.Equal(t, filepath.Join(bin, "run-real"), p.Interpreter.Path)
	require.Equal(t, "Python 3.12.1", p.Interpreter.Version)
	require.Len(t, p.Notices(), 3, "that is a script as well, which starts something else for all that is known")
	require.NoError(t, f.Remove(t.Context(), "toy"))

	_, err = f.Install(t.Context(), package_(`"run-nothing"`), says(toy()), InstallOptions{})
	oneLine(t, err, exec.ErrNotFound, `no program "run-nothing" in PATH`)
	_, err = f.Install(t.Context(), package_(`"main.py"`), says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "expected ./main.py for the package's own")
	// A PATH may have folders that depend on where one is; nothing is taken from there.
	t.Chdir(bin)
	t.Setenv("PATH", ".")
	_, err = f.Install(t.Context(), package_(`"run-silent"`), says(toy()), InstallOptions{})
	oneLine(t, err, exec.ErrDot)
	clean(t, f)
}

func TestPackagesThatAreRefused(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "plugins"))
	plugin := func(content string) map[string]string {
		return map[string]string{"plugin.json": content, "run": "x", "data": "x"}
	}
	for name, c := range map[string]struct {
		files map[string]string
		kind  error
		says  string
	}{
		"no manifest":     {map[string]string{"run": ""}, formats.ErrMalformed, "found no plugin.json"},
		"empty":           {plugin(``), formats.ErrMalformed, "plugin.json"},
		"no object":       {plugin(`[]`), formats.ErrMalformed, "plugin.json"},
		"twice":           {plugin(`{"name": "toy", "name": "toy", "command": ["./run"]}`), formats.ErrMalformed, "duplicate"},
		"unknown":         {plugin(`{"name": "toy", "command": ["./run"], "extra": 1}`), formats.ErrMalformed, "extra"},
		"other case":      {plugin(`{"Name": "toy", "command": ["./run"]}`), formats.ErrMalformed, "Name"},
		"no name":         {plugin(`{"command": ["./run"]}`), formats.ErrMalformed, "the name"},
		"bad name":        {plugin(`{"name": "../toy", "command": ["./run"]}`), formats.ErrMalformed, "the name"},
		"another name":    {plugin(`{"name": "other", "command": ["./run"]}`), formats.ErrMalformed, `expected "other"`},
		"slow":            {plugin(`{"name": "toy", "command": ["./run"], "start_seconds": 61}`), formats.ErrMalformed, "61"},
		"negative":        {plugin(`{"name": "toy", "command": ["./run"], "start_seconds": -1}`), formats.ErrMalformed, "-1"},
		"no command":      {plugin(`{"name": "toy"}`), formats.ErrMalformed, "a command of 0 words"},
		"empty command":   {plugin(`{"name": "toy", "command": [""]}`), formats.ErrMalformed, "command"},
		"outside":         {plugin(`{"name": "toy", "command": ["../run"]}`), formats.ErrMalformed, "../run"},
		"absolute":        {plugin(`{"name": "toy", "command": ["/bin/sh"]}`), formats.ErrMalformed, "/bin/sh"},
		"not there":       {plugin(`{"name": "toy", "command": ["./gone"]}`), formats.ErrMalformed, "./gone"},
		"null in command": {plugin(`{"name": "toy", "command": ["./run", "a\u0000"]}`), formats.ErrMalformed, "command"},
		"large manifest":  {plugin(strings.Repeat(" ", mostManifestBytes+1)), formats.ErrLimit, "plugin.json"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := f.Install(t.Context(), write(t, t.TempDir(), c.files), says(toy()), InstallOptions{})
			oneLine(t, err, c.kind, c.says)
			clean(t, f)
		})
	}
	_, err := f.Install(t.Context(), filepath.Join(t.TempDir(), "nothing"), says(toy()), InstallOptions{})
	oneLine(t, err, fs.ErrNotExist)
	_, err = f.Install(t.Context(), filepath.Dir(f.Dir()), says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "in the folder of plugins, expected a package outside")
	require.Empty(t, f.Plugins())
	require.Empty(t, open(t, f.Dir()).Plugins())
}

func TestTooMuch(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "plugins"))
	many := packed(t)
	for i := range mostFiles {
		require.NoError(t, os.WriteFile(filepath.Join(many, "f"+strings.Repeat("x", i%50)+string(rune('a'+i%26))+
			string(rune('a'+i/26%26))+string(rune('a'+i/676))), nil, 0o666))
	}
	_, err := f.Install(t.Context(), many, says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrLimit, "more than 10000 files")

	large := packed(t)
	hole, err := os.Create(filepath.Join(large, "hole"))
	require.NoError(t, err)
	require.NoError(t, hole.Truncate(mostBytes))
	require.NoError(t, hole.Close())
	_, err = f.Install(t.Context(), large, says(toy()), InstallOptions{}) // it has two more files
	oneLine(t, err, formats.ErrLimit, "more than 1073741824 bytes")
	clean(t, f)
}

func stat(t *testing.T, path string) fs.FileInfo {
	info, err := os.Stat(path)
	require.NoError(t, err)
	return info
}

func TestDescriptionsThatAreRefused(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "plugins"))
	long := strings.Repeat("a", 65)
	for name, c := range map[string]struct {
		change func(d *Described)
		kind   error
		says   string
	}{
		"another name":       {func(d *Described) { d.Name = "other" }, formats.ErrMalformed, `"other", expected "toy"`},
		"a hostile name":     {func(d *Described) { d.Name = "../../x\n" }, formats.ErrMalformed, "the name"},
		"a hostile version":  {func(d *Described) { d.Version = ".." }, formats.ErrMalformed, "the version"},
		"a long version":     {func(d *Described) { d.Version = long }, formats.ErrMalformed, "the version"},
		"no version":         {func(d *Described) { d.Version = "" }, formats.ErrMalformed, "the version"},
		"a newer protocol":   {func(d *Described) { d.Protocol = 2 }, formats.ErrUnsupported, "speaks protocol 2, this lorakit speaks 1"},
		"no protocol":        {func(d *Described) { d.Protocol = 0 }, formats.ErrUnsupported, "speaks protocol 0"},
		"unknown capability": {func(d *Described) { d.Capabilities[0] = "fly" }, formats.ErrMalformed, `"fly" among the capabilities`},
		"capability twice":   {func(d *Described) { d.Capabilities[1] = Read }, formats.ErrMalformed, "twice"},
		"nothing":            {func(d *Described) { d.Formats, d.Schemes = nil, nil }, formats.ErrMalformed, "neither a format nor a scheme"},
		"no format to write": {func(d *Described) { d.Formats = nil }, formats.ErrMalformed, "nothing that has it"},
		"no scheme to read":  {func(d *Described) { d.Schemes = nil }, formats.ErrMalformed, "scheme-decode and nothing"},
		"extents alone":      {func(d *Described) { d.Capabilities = []string{Extents, WriteLayout, WriteStream, SchemeDecode} }, formats.ErrMalformed, "extents without read"},
		"cannot write":       {func(d *Described) { d.Capabilities = []string{Read, WriteStream, SchemeDecode} }, formats.ErrMalformed, `"layout" without the capability write-layout`},
		"cannot decode":      {func(d *Described) { d.Capabilities = []string{Read, WriteLayout, WriteStream} }, formats.ErrMalformed, "without a capability"},
		"an unknown way":     {func(d *Described) { d.Formats[0].Write = "" }, formats.ErrMalformed, "the way to write"},
		"a bad format":       {func(d *Described) { d.Formats[0].Name = "Toy" }, formats.ErrMalformed, `format "Toy"`},
		"formats alike":      {func(d *Described) { d.Formats[1].Name = "toy" }, ErrTaken, "by the plugin itself"},
		"extensions alike":   {func(d *Described) { d.Formats[1].Extensions[0] = ".toy" }, ErrTaken, "extension .toy"},
		"no dot":             {func(d *Described) { d.Formats[0].Extensions[0] = "toy" }, formats.ErrMalformed, "extensions"},
		"a dot alone":        {func(d *Described) { d.Formats[0].Extensions[0] = "." }, formats.ErrMalformed, "extensions"},
		"JSON":               {func(d *Described) { d.Formats[0].Extensions[0] = ".json" }, formats.ErrMalformed, "not one of .json"},
		"an open class":      {func(d *Described) { d.Formats[0].FileNames[0] = "[a" }, formats.ErrMalformed, "a glob of a base name"},
		"a glob of paths":    {func(d *Described) { d.Formats[0].FileNames[0] = "a/*" }, formats.ErrMalformed, "a glob of a base name"},
		"magic before":       {func(d *Described) { d.Formats[0].Magic[0].Offset = -1 }, formats.ErrMalformed, "offset -1"},
		"magic far behind":   {func(d *Described) { d.Formats[0].Magic[0].Offset = 1<<63 - 1 }, formats.ErrMalformed, "that end by 4096"},
		"magic too far":      {func(d *Described) { d.Formats[0].Magic[0].Offset = 4093 }, formats.ErrMalformed, "that end by 4096"},
		"no magic":           {func(d *Described) { d.Formats[0].Magic[0].Bytes = nil }, formats.ErrMalformed, "0 bytes"},
		"an unknown type":    {func(d *Described) { d.Formats[0].DTypes[0] = "F33" }, formats.ErrMalformed, `"F33" among the dtypes`},
		"torch's type":       {func(d *Described) { d.Formats[0].DTypes[0] = "float32" }, formats.ErrMalformed, "among the dtypes"},
		"too many":           {func(d *Described) { d.Formats = make([]Format, 65) }, formats.ErrMalformed, "found 65 formats"},
		"too many types":     {func(d *Described) { d.Schemes[0].Types = make([]string, 65) }, formats.ErrMalformed, "found 65 types"},
		"a reserved type":    {func(d *Described) { d.Schemes[0].Types[0] = "none" }, formats.ErrMalformed, "neither keep nor none"},
		"no types":           {func(d *Described) { d.Schemes[0].Types = nil }, formats.ErrMalformed, "no types"},
		"an odd parameter":   {func(d *Described) { d.Schemes[0].Parameters[0] = "x" }, formats.ErrMalformed, "block_size or double_quant"},
		"an empty suffix":    {func(d *Described) { d.Schemes[0].Suffixes = []string{""} }, formats.ErrMalformed, "among the suffixes"},
		"a built-in format":  {func(d *Described) { d.Formats[0].Name = "safetensors" }, ErrTaken, "by lorakit itself"},
		"its extension":      {func(d *Described) { d.Formats[0].Extensions[0] = ".safetensors" }, ErrTaken, "extension .safetensors"},
		"a built-in scheme":  {func(d *Described) { d.Schemes[0].Name = "bitsandbytes" }, ErrTaken, "scheme bitsandbytes"},
		"a built-in type":    {func(d *Described) { d.Schemes[0].Types[0] = "nf4" }, ErrTaken, "type nf4"},
	} {
		t.Run(name, func(t *testing.T) {
			d := toy()
			c.change(&d)
			_, err := f.Install(t.Context(), packed(t), says(d), InstallOptions{})
			oneLine(t, err, c.kind, c.says)
			clean(t, f)
		})
	}
	failed := errors.New("it does not start")
	_, err := f.Install(t.Context(), packed(t), func(context.Context, *Plugin, string) (Described, error) {
		return Described{}, failed
	}, InstallOptions{})
	require.ErrorIs(t, err, failed)
	_, err = f.Install(t.Context(), packed(t), func(_ context.Context, _ *Plugin, dir string) (Described, error) {
		return toy(), os.WriteFile(filepath.Join(dir, "main.pyc"), nil, 0o600)
	}, InstallOptions{})
	oneLine(t, err, ErrChanged, "main.pyc")
	clean(t, f)
	require.Empty(t, open(t, f.Dir()).Plugins())
}

func TestNamesOfAnotherPlugin(t *testing.T) {
	f, _ := installed(t)
	other := write(t, t.TempDir(), map[string]string{"run": "x"})
	d := Described{Name: "other", Version: "1", Protocol: 1, Capabilities: []string{Read},
		Formats: []Format{{Name: "other", Extensions: []string{".toy.zip"}, Write: WriteByNone}}}
	_, err := f.Install(t.Context(), filepath.Join(other, "run"), says(d), InstallOptions{})
	oneLine(t, err, ErrTaken, "the extension .toy.zip is taken by the plugin toy")
	d.Formats[0].Extensions = []string{".other"}
	_, err = f.Install(t.Context(), filepath.Join(other, "run"), says(d), InstallOptions{})
	require.NoError(t, err)
	require.Len(t, f.Plugins(), 2)
	require.Equal(t, "other", f.Plugins()[0].Name)

	// A later lorakit has what a plugin brought: the plugin is not used, and the others are.
	later, err := Open(f.Dir(), Taken{Formats: []string{"other"}})
	require.NoError(t, err)
	state, problem := later.State(later.Plugins()[0])
	require.Equal(t, Incompatible, state)
	require.Contains(t, problem, "taken by lorakit itself")
	state, _ = later.State(later.Plugins()[1])
	require.Equal(t, OK, state)
}

// TestFoldersOfOthers: what is in a folder that is not one of plugins is not touched.
func TestFoldersOfOthers(t *testing.T) {
	from := packed(t)
	above := filepath.Dir(from)
	require.NoError(t, os.Chmod(above, 0o700))
	f := open(t, above)
	_, err := f.Install(t.Context(), packed(t), says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "expected an empty folder or one of plugins")
	require.FileExists(t, filepath.Join(from, "plugin.json"))
	require.NoFileExists(t, filepath.Join(above, lockName))

	// The plugins' own files are no package.
	f, p := installed(t)
	_, err = f.Install(t.Context(), f.Path(p), says(toy()), InstallOptions{})
	oneLine(t, err, formats.ErrMalformed, "expected a package outside")
}

func TestVersions(t *testing.T) {
	f, p := installed(t)
	from := packed(t)

	// The same again repairs it.
	require.NoError(t, os.Remove(filepath.Join(f.Path(p), "bin", "run")))
	_, err := f.Install(t.Context(), from, says(toy()), InstallOptions{})
	require.NoError(t, err)
	state, problem := f.State(f.Plugins()[0])
	require.Equal(t, OK, state, problem)

	// Other files of the same version are refused, and what is there stays.
	write(t, from, map[string]string{"more": "x"})
	_, err = f.Install(t.Context(), from, says(toy()), InstallOptions{})
	oneLine(t, err, ErrInstalled, "toy 1.0.0")
	require.Equal(t, []hint.Hint{{Function: "RemovePlugin", Value: "toy", Effect: "makes room for it"}}, hint.Of(err))
	state, problem = f.State(f.Plugins()[0])
	require.Equal(t, OK, state, problem)

	// Another version takes its place.
	d := toy()
	d.Version = "2.0.0-rc.1+x"
	q, err := f.Install(t.Context(), from, says(d), InstallOptions{})
	require.NoError(t, err)
	require.Len(t, f.Plugins(), 1)
	require.NoDirExists(t, f.Path(p))
	require.DirExists(t, f.Path(q))
	require.Equal(t, f.Plugins(), open(t, f.Dir()).Plugins())
	clean(t, f)
}

func TestWhatAKilledInstallLeaves(t *testing.T) {
	f, p := installed(t)
	write(t, f.Dir(), map[string]string{tempPrefix + "1/run": "x", tempPrefix + "2": "x", "toy/2/left": "x"})
	d := toy()
	d.Version = "2"
	q, err := f.Install(t.Context(), packed(t), says(d), InstallOptions{})
	require.NoError(t, err)
	clean(t, f)
	state, problem := f.State(q)
	require.Equal(t, OK, state, problem)
	require.NoDirExists(t, f.Path(p))
}

func TestALockThatCannotBeWrittenChangesNothing(t *testing.T) {
	f, p := installed(t)
	// A folder in the place of the lock file cannot be replaced.
	path := filepath.Join(f.Dir(), lockName)
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	d := toy()
	d.Version = "2"
	_, err = f.Install(t.Context(), packed(t), func(context.Context, *Plugin, string) (Described, error) {
		require.NoError(t, os.Remove(path))
		require.NoError(t, os.MkdirAll(filepath.Join(path, "x"), 0o700))
		return d, nil
	}, InstallOptions{})
	require.Error(t, err)
	require.NoError(t, os.RemoveAll(path))
	require.NoError(t, os.WriteFile(path, data, 0o600))
	state, problem := open(t, f.Dir()).State(p)
	require.Equal(t, OK, state, problem)
	require.NoDirExists(t, filepath.Join(f.Dir(), "toy", "2"))
	clean(t, f)
}

func TestVerify(t *testing.T) {
	f, p := installed(t)
	in := func(name string) string { return filepath.Join(f.Path(p), filepath.FromSlash(name)) }
	expect := func(want State, r Report) {
		t.Helper()
		got, err := f.Verify(p)
		require.NoError(t, err)
		require.Equal(t, r, got)
		require.Equal(t, want, got.State())
		state, problem := f.State(p)
		require.Equal(t, want, state, problem)
		require.Equal(t, want == OK, problem == "")
		if want != OK {
			oneLine(t, got.Err(p), ErrChanged, "plugin toy: ")
		}
	}
	expect(OK, Report{})

	// Of the same size: the time tells as well.
	run := stat(t, in("bin/run"))
	require.NoError(t, os.WriteFile(in("bin/run"), []byte("#!/bin/st\n"), 0o700))
	expect(Changed, Report{Changed: []string{"bin/run"}})
	r, err := f.Verify(p)
	require.NoError(t, err)
	require.EqualError(t, r.Err(p), "plugin toy: bin/run has changed since it was installed")
	accept := hint.Hint{Function: "VerifyPlugin", Option: "Accept", Value: "toy", Effect: "pins it as it is now"}
	require.Equal(t, []hint.Hint{accept}, hint.Of(r.Err(p)))
	// Whoever sets the time back is found when it is read.
	require.NoError(t, os.Chtimes(in("bin/run"), run.ModTime(), run.ModTime()))
	got, err := f.Verify(p)
	require.NoError(t, err)
	require.Equal(t, []string{"bin/run"}, got.Changed)

	write(t, f.Path(p), map[string]string{"bin/other": "x", "a\nb": "x"})
	got, err = f.Verify(p)
	require.NoError(t, err)
	require.Equal(t, Report{Changed: []string{"bin/run"}, Added: []string{"a\nb", "bin/other"}}, got)
	require.NoError(t, os.RemoveAll(in("bin")))
	expect(Missing, Report{Missing: []string{"bin/run"}, Added: []string{"a\nb"}})

	// A link in the place of a file, or of a folder above it.
	if os.Symlink("/bin/sh", in("bin")) == nil {
		expect(Missing, Report{Missing: []string{"bin/run"}, Added: []string{"a\nb", "bin"}})
		require.NoError(t, os.Remove(in("bin")))
	}
	require.NoError(t, os.RemoveAll(f.Path(p)))
	expect(Missing, Report{Missing: []string{"bin/run", "plugin.json"}})
}

func TestAccept(t *testing.T) {
	f, p := installed(t)
	was := p.Digest
	write(t, f.Path(p), map[string]string{"bin/run": "#!/bin/other\n", "more": "x"})
	require.NoError(t, f.Accept(t.Context(), p))
	require.NotEqual(t, was, p.Digest)
	require.Len(t, p.Files, 3)
	q := open(t, f.Dir()).Plugins()[0]
	require.Equal(t, p, q)
	state, problem := f.State(q)
	require.Equal(t, OK, state, problem)

	write(t, f.Path(p), map[string]string{"plugin.json": `{"name": "toy", "command": ["./more"]}`})
	oneLine(t, f.Accept(t.Context(), p), ErrChanged, "plugin.json has changed")
	require.NoError(t, os.RemoveAll(f.Path(p)))
	oneLine(t, f.Accept(t.Context(), p), fs.ErrNotExist)
}

func TestRemove(t *testing.T) {
	f, p := installed(t)
	other := open(t, f.Dir())
	require.NoError(t, f.Remove(t.Context(), "toy"))
	require.NoDirExists(t, filepath.Join(f.Dir(), "toy"))
	require.Empty(t, f.Plugins())
	require.Empty(t, open(t, f.Dir()).Plugins())
	clean(t, f)
	err := f.Remove(t.Context(), "toy")
	oneLine(t, err, ErrNotInstalled, `plugin "toy"`)

	// Another process that still knows it.
	oneLine(t, other.Remove(t.Context(), "toy"), ErrNotInstalled)
	_, err = other.Use(p)
	oneLine(t, err, ErrChanged, "replaced or removed")
	oneLine(t, other.Accept(t.Context(), p), ErrNotInstalled)
	oneLine(t, f.Remove(t.Context(), "../x"), ErrNotInstalled)
}

func TestRunningPlugins(t *testing.T) {
	f, p := installed(t)
	one, err := open(t, f.Dir()).Use(p)
	require.NoError(t, err)
	two, err := open(t, f.Dir()).Use(p)
	require.NoError(t, err)
	one()
	oneLine(t, f.Remove(t.Context(), "toy"), ErrBusy, "plugin toy: it runs")
	d := toy()
	d.Version = "2"
	_, err = f.Install(t.Context(), packed(t), says(d), InstallOptions{})
	oneLine(t, err, ErrBusy)
	state, problem := f.State(p)
	require.Equal(t, OK, state, problem)
	clean(t, f)
	two()

	// While it is replaced it cannot be started.
	release, err := f.mark("toy", storageLock, "")
	require.NoError(t, err)
	_, err = f.Use(p)
	oneLine(t, err, ErrBusy)
	release()
	require.NoError(t, f.Remove(t.Context(), "toy"))
}

func TestInstallsAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "plugins")
	var wg sync.WaitGroup
	errs := make([]error, 6)
	for i := range errs {
		from := filepath.Join(write(t, t.TempDir(), map[string]string{"run": "x"}), "run")
		wg.Go(func() {
			f, err := Open(dir, BuiltIn())
			if err != nil {
				errs[i] = err
				return
			}
			name := string(rune('a' + i))
			_, errs[i] = f.Install(t.Context(), from, says(Described{Name: name, Version: "1", Protocol: 1,
				Capabilities: []string{Read}, Formats: []Format{{Name: name, Write: WriteByNone}}}), InstallOptions{})
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	f := open(t, dir)
	require.Len(t, f.Plugins(), len(errs))
	clean(t, f)

	// One that waits can be called off.
	end, err := f.begin(t.Context())
	require.NoError(t, err)
	defer end()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, open(t, dir).Remove(ctx, "a"), context.Canceled)
}

// TestUseWaits: a change that is just about to end is no reason not to run a plugin.
func TestUseWaits(t *testing.T) {
	f, p := installed(t)
	release, err := f.mark(p.Name, storageLock, "")
	require.NoError(t, err)
	time.AfterFunc(100*time.Millisecond, release)
	used, err := f.Use(p)
	require.NoError(t, err)
	used()
}
