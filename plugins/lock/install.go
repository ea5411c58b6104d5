package lock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const (
	manifestName      = "plugin.json"
	mostManifestBytes = 64 << 10
	mostSaid          = 200 // bytes of what an interpreter says to --version
)

// manifest is plugin.json, by which a folder is a package.
type manifest struct {
	Name         string   `json:"name"`
	Command      []string `json:"command"`
	StartSeconds int      `json:"start_seconds"`
	MTLS         bool     `json:"mtls"`
}

// InstallOptions steer Install.
type InstallOptions struct {
	// NoMTLS starts the plugin without mutual TLS, whatever it is. A single executable has it otherwise, and a folder
	// where its plugin.json says so.
	NoMTLS bool
}

// Describe starts the plugin whose files are in a folder, and asks what it has. Of p are known the command, the
// interpreter, the files, and how it is started; its name is that of plugin.json, or of the executable.
type Describe func(ctx context.Context, p *Plugin, dir string) (Described, error)

// Install copies a package into the folder, has it described, and pins it. A package is an executable file, or a folder
// with a plugin.json. Another version of the plugin makes way for it; the same with other files is ErrInstalled, and
// one that runs ErrBusy. An install that is killed leaves what was there as it was.
func (f *Folder) Install(ctx context.Context, from string, describe Describe, o InstallOptions) (*Plugin, error) {
	from, err := filepath.Abs(from)
	if err != nil {
		return nil, err
	}
	if _, err := storage.Stat(from); err != nil { // before anything is made
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(f.dir), 0o700); err != nil {
		return nil, err
	}
	if err := makePrivate(f.dir); err != nil {
		return nil, err
	}
	end, err := f.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := f.sweep(); err != nil {
		return nil, err
	}
	if err := f.claim(); err != nil {
		return nil, err
	}
	temp, err := os.MkdirTemp(f.dir, tempPrefix)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(temp) // without it, the next one does
	p, err := f.unpack(ctx, from, temp)
	if err != nil {
		return nil, err
	}
	if o.NoMTLS {
		p.MTLS = false
	}
	named := p.Name
	said, err := describe(ctx, p, temp)
	if err != nil {
		return nil, err
	}
	if err := said.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	if _, packed := os.Lstat(filepath.Join(temp, manifestName)); packed == nil && said.Name != named {
		return nil, fmt.Errorf("%s: %w: it says that its name is %s, expected %s as in %s", from, formats.ErrMalformed,
			tensor.Quote(said.Name), tensor.Quote(named), manifestName)
	}
	p.Described = said
	if err := f.unique(p); err != nil {
		return nil, fmt.Errorf("%s: plugin %s: %w", from, p.Name, err)
	}
	r, err := f.compare(p, temp, true)
	if err != nil {
		return nil, err
	}
	if list := slices.Concat(r.Changed, r.Added, r.Missing); len(list) > 0 {
		return nil, fmt.Errorf("%s: %w: it has written to or removed %s%s when it was started, expected that it leaves its "+
			"own folder alone", from, ErrChanged, shown(list[0]), others(list))
	}
	p.Installed = time.Now().UTC().Truncate(time.Second)
	if err := f.put(p, temp); err != nil {
		return nil, err
	}
	return p, nil
}

// claim makes a folder one of plugins by an empty lock file, from which on all that is in it may be replaced. One with
// other things in it is refused.
func (f *Folder) claim() error {
	if _, err := os.Lstat(filepath.Join(f.dir, lockName)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != busyName && e.Name() != usedName {
			return fmt.Errorf("%s: %w: found %s, expected an empty folder or one of plugins", f.dir, formats.ErrMalformed,
				tensor.Quote(e.Name()))
		}
	}
	return f.write(nil)
}

// unpack copies a package, and reads how it is started.
func (f *Folder) unpack(ctx context.Context, from, temp string) (*Plugin, error) {
	// Whoever gave the path has chosen where it leads; in the package links are refused.
	source, err := filepath.EvalSymlinks(from)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(source)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(f.dir)
	if err != nil {
		return nil, err
	}
	if within(dir, source) || within(source, dir) {
		return nil, fmt.Errorf("%s: %w: found it around or in the folder of plugins, expected a package outside of %s", from,
			formats.ErrMalformed, f.dir)
	}
	p := &Plugin{}
	if info.IsDir() {
		m, err := readManifest(filepath.Join(source, manifestName))
		if err != nil {
			return nil, err
		}
		p.Name, p.Command, p.StartSeconds, p.MTLS = m.Name, m.Command, m.StartSeconds, m.MTLS
	} else {
		base := filepath.Base(source)
		p.Name, p.Command, p.MTLS = base, []string{"./" + base}, true
	}
	if p.Files, err = copyTree(ctx, source, temp); err != nil {
		return nil, err
	}
	p.Digest = digest(p.Files)
	if err := checkCommand(p.Command, p.has); err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	if err := p.runnable(ctx, temp); err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return p, nil
}

// within reports whether a path is a folder or below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(rel)
}

func readManifest(path string) (manifest, error) {
	var m manifest
	data, err := readBounded(path, mostManifestBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return m, fmt.Errorf("%s: %w: found no %s, expected one in a folder that is a plugin", filepath.Dir(path),
			formats.ErrMalformed, manifestName)
	}
	if err != nil {
		return m, err
	}
	if err := unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("%s: %w", path, err)
	}
	if err := checkName(m.Name); err != nil {
		return m, fmt.Errorf("%s: %w", path, err)
	}
	if m.StartSeconds < 0 || m.StartSeconds > mostSeconds {
		return m, fmt.Errorf("%s: %w: found start_seconds %d, expected 0 to %d", path, formats.ErrMalformed, m.StartSeconds,
			mostSeconds)
	}
	return m, nil
}

// runnable finds what the command's first word means, in the package or on the system, and pins an interpreter.
func (p *Plugin) runnable(ctx context.Context, dir string) error {
	first := p.Command[0]
	if inside(first) {
		info, err := os.Lstat(filepath.Join(dir, filepath.FromSlash(path.Clean(first))))
		if err != nil {
			return err
		}
		if !executable(info) {
			return malformed("found %s with the mode %04o, expected a file that may be executed (chmod +x)", first,
				info.Mode().Perm())
		}
		return nil
	}
	at := ""
	if p.Interpreter != nil {
		if _, err := os.Stat(p.Interpreter.Path); err == nil {
			at = p.Interpreter.Path // that which it was installed with
		}
	}
	if at == "" {
		var err error
		at, err = exec.LookPath(first)
		if err != nil {
			if p.has(first) {
				return malformed("found no program %s in PATH, expected ./%s for the package's own", first, first)
			}
			return fmt.Errorf("found no program %s in PATH, expected the plugin's interpreter: %w", tensor.Quote(first), err)
		}
		if at, err = filepath.Abs(at); err != nil {
			return err
		}
		at = behind(ctx, at)
	}
	f, err := hashFile(at, mostBytes)
	if err != nil {
		return err
	}
	p.Interpreter = &Interpreter{Path: at, SHA256: f.SHA256, Size: f.Size, MTime: f.MTime,
		Version: said(ctx, at, "--version")}
	return nil
}

// behind finds the Python that a script starts. Managers of versions (pyenv, asdf) put scripts in PATH that choose one
// by the current folder and the environment: to pin such a script would pin nothing.
func behind(ctx context.Context, program string) string {
	if !isScript(program) || !strings.HasPrefix(said(ctx, program, "--version"), "Python ") {
		return program
	}
	path := said(ctx, program, "-I", "-c", "import sys; print(sys.executable)")
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() || !filepath.IsAbs(path) {
		return program
	}
	return filepath.Clean(path)
}

// isScript reports whether another program runs a program.
func isScript(program string) bool {
	f, err := storage.Open(program)
	if err != nil {
		return false
	}
	defer f.Close()
	var start [2]byte
	_, err = io.ReadFull(f, start[:])
	return err == nil && string(start[:]) == "#!"
}

// said is the first line that a program of the system says, as it does in the user's shell, and empty where it says
// nothing that can be shown.
func said(ctx context.Context, program string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c := exec.CommandContext(ctx, program, args...)
	c.WaitDelay = time.Second
	var out bounded
	c.Stdout, c.Stderr = &out, &out
	if c.Run() != nil {
		return ""
	}
	line, _, _ := strings.Cut(out.String(), "\n")
	line = strings.TrimSpace(line)
	if !utf8.ValidString(line) || !printable(line) || len(line) > mostSaid {
		return ""
	}
	return line
}

// bounded keeps the beginning of what is written to it. A reader that stopped would stop the program as well.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), max(0, 4<<10-b.Len()))])
	return len(p), nil
}

// put gives a package that has been described its place, and pins it.
func (f *Folder) put(p *Plugin, temp string) (err error) {
	old := f.find(p.Name)
	if old != nil && old.Version == p.Version && old.Digest != p.Digest {
		return hint.With(fmt.Errorf("plugin %s %s: %w: found the digest %.12s…, expected %.12s…", p.Name, p.Version,
			ErrInstalled, p.Digest, old.Digest), hint.Hint{Function: "RemovePlugin", Value: p.Name, Effect: "makes room for it"})
	}
	release, err := f.mark(p.Name, storage.Lock, "runs")
	if err != nil {
		return err
	}
	defer release()
	if err := makePrivate(filepath.Join(f.dir, p.Name)); err != nil {
		return err
	}
	// What is in the place is the same plugin, perhaps damaged, or was left by an install that was killed before it was
	// pinned.
	place := f.Path(p)
	aside, err := os.MkdirTemp(f.dir, tempPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(aside)
	was := filepath.Join(aside, "old")
	if err := os.Rename(place, was); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err = os.Rename(temp, place); err == nil {
		// No file is synced: what a power failure takes of them is seen when they are hashed before they are used.
		err = storage.SyncDir(filepath.Dir(place))
	}
	if err == nil {
		err = f.write(append(slices.DeleteFunc(f.Plugins(), func(q *Plugin) bool { return q == old }), p))
	}
	if err != nil {
		back := os.RemoveAll(place)
		if _, gone := os.Lstat(was); gone == nil && back == nil {
			back = os.Rename(was, place)
		}
		return errors.Join(err, back)
	}
	// Now the other versions: the one before, and what installs that were killed have left.
	versions, err := os.ReadDir(filepath.Dir(place))
	for _, v := range versions {
		if v.Name() != p.Version {
			err = errors.Join(err, f.discard(filepath.Join(f.dir, p.Name, v.Name())))
		}
	}
	if err != nil {
		return fmt.Errorf("plugin %s %s is installed, and files of another version are left: %w", p.Name, p.Version, err)
	}
	return nil
}
