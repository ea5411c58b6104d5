package lock

import (
	"bytes"
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
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const (
	lockVersion   = 1
	mostLockBytes = 16 << 20
	mostPlugins   = 256
)

// lockFile is what plugins.lock.json holds.
type lockFile struct {
	LockVersion int       `json:"lock_version"`
	Plugins     []*Plugin `json:"plugins"`
}

// read takes in what the folder and its lock file say now.
func (f *Folder) read() error {
	f.plugins = nil
	info, err := os.Lstat(f.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := private(f.dir, info); err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: %w: found a file, expected the folder of plugins", f.dir, formats.ErrMalformed)
	}
	path := filepath.Join(f.dir, lockName)
	info, err = os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := private(path, info); err != nil {
		return err
	}
	data, err := readBounded(path, mostLockBytes)
	if err != nil {
		return err
	}
	if f.plugins, err = parse(data); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// readBounded reads a regular file that has at most so many bytes.
func readBounded(path string, most int64) ([]byte, error) {
	file, err := storage.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%s: %w: found more than %d bytes, expected at most those", path, formats.ErrLimit, most)
	}
	return data, err
}

// unmarshal is strict: no name twice, none that is not known unless it is told so, valid UTF-8.
func unmarshal(data []byte, v any, o ...json.Options) error {
	if err := json.Unmarshal(data, v, append([]json.Options{json.RejectUnknownMembers(true)}, o...)...); err != nil {
		text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "json: "), "jsontext: ")
		return malformed("%s", text)
	}
	return nil
}

// parse reads a lock file. What a plugin that speaks another protocol says of itself may have words that are not known
// here: such a plugin is not used, and is held only against what all have in common.
func parse(data []byte) ([]*Plugin, error) {
	var head struct {
		LockVersion *int `json:"lock_version"`
	}
	if err := unmarshal(data, &head, json.RejectUnknownMembers(false)); err != nil {
		return nil, err
	}
	if head.LockVersion == nil {
		return nil, malformed("found no lock_version, expected %d", lockVersion)
	}
	if *head.LockVersion != lockVersion {
		return nil, fmt.Errorf("%w: found lock_version %d, expected %d", formats.ErrUnsupported, *head.LockVersion,
			lockVersion)
	}
	var file lockFile
	if err := unmarshal(data, &file); err != nil {
		return nil, err
	}
	if len(file.Plugins) > mostPlugins {
		return nil, fmt.Errorf("%w: found %d plugins, expected at most %d", formats.ErrLimit, len(file.Plugins), mostPlugins)
	}
	names := map[string]bool{}
	for i, p := range file.Plugins {
		if p == nil {
			return nil, malformed("found null as plugin %d, expected an object", i)
		}
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("plugin %s: %w", tensor.Quote(p.Name), err)
		}
		if names[p.Name] {
			return nil, malformed("found the plugin %s twice, expected it once", p.Name)
		}
		names[p.Name] = true
	}
	slices.SortFunc(file.Plugins, func(a, b *Plugin) int { return strings.Compare(a.Name, b.Name) })
	return file.Plugins, nil
}

// check holds an entry of the lock file against the rules.
func (p *Plugin) check() error {
	if p.Protocol == Protocol {
		if err := p.Described.check(); err != nil {
			return err
		}
	}
	if err := checkName(p.Name); err != nil {
		return err
	}
	if err := checkVersion(p.Version); err != nil {
		return err
	}
	if p.Protocol < 1 {
		return malformed("found protocol %d, expected 1 or more", p.Protocol)
	}
	if p.StartSeconds < 0 || p.StartSeconds > mostSeconds {
		return malformed("found start_seconds %d, expected 0 to %d", p.StartSeconds, mostSeconds)
	}
	if n := len(p.Files); n == 0 || n > mostFiles {
		return malformed("found %d files, expected 1 to %d", n, mostFiles)
	}
	total := int64(0)
	for i, f := range p.Files {
		if err := checkPath(f.Path); err != nil {
			return err
		}
		if i > 0 && p.Files[i-1].Path >= f.Path {
			return malformed("found the file %s after %s, expected them sorted by path, each once", tensor.Quote(f.Path),
				tensor.Quote(p.Files[i-1].Path))
		}
		if f.Size < 0 || f.Size > mostBytes-total {
			return malformed("found the file %s with %d bytes, expected 0 or more and at most %d of all files",
				tensor.Quote(f.Path), f.Size, int64(mostBytes))
		}
		total += f.Size
		if !isSum(f.SHA256) || len(f.MTime) > mostWord {
			return malformed("found the file %s with the sha256 %s and mtime %s, expected 64 small hexadecimal digits, and "+
				"seconds", tensor.Quote(f.Path), tensor.Quote(f.SHA256), tensor.Quote(f.MTime))
		}
	}
	if d := digest(p.Files); p.Digest != d {
		return malformed("found the digest %s, expected that of its files, %s", tensor.Quote(p.Digest), d)
	}
	if err := checkCommand(p.Command, p.has); err != nil {
		return err
	}
	return p.checkInterpreter()
}

func (p *Plugin) checkInterpreter() error {
	i := p.Interpreter
	if inside(p.Command[0]) != (i == nil) {
		return malformed("found the command %s, expected an interpreter for a program that is not in the package alone",
			tensor.Quote(p.Command[0]))
	}
	if i == nil {
		return nil
	}
	if len(i.Path) > mostArg || !filepath.IsAbs(i.Path) || filepath.Clean(i.Path) != i.Path || !printable(i.Path) {
		return malformed("found the interpreter %s, expected an absolute path", tensor.Quote(i.Path))
	}
	if !isSum(i.SHA256) || i.Size < 0 || len(i.MTime) > mostWord || len(i.Version) > mostSaid || !printable(i.Version) {
		return malformed("found the interpreter %s with the sha256 %s, size %d, mtime %s and version %s, expected 64 small "+
			"hexadecimal digits, 0 or more, seconds and a line", tensor.Quote(i.Path), tensor.Quote(i.SHA256), i.Size,
			tensor.Quote(i.MTime), tensor.Quote(i.Version))
	}
	return nil
}

func isSum(s string) bool { return len(s) == 64 && strings.Trim(s, digits+"abcdef") == "" }

// index finds a file of the plugin.
func (p *Plugin) index(path string) (int, bool) {
	return slices.BinarySearchFunc(p.Files, path, func(f File, path string) int { return strings.Compare(f.Path, path) })
}

func (p *Plugin) has(path string) bool {
	_, ok := p.index(path)
	return ok
}

// write puts a list of plugins into the lock file, in one step.
func (f *Folder) write(plugins []*Plugin) (err error) {
	slices.SortFunc(plugins, func(a, b *Plugin) int { return strings.Compare(a.Name, b.Name) })
	data, err := json.Marshal(lockFile{lockVersion, plugins}, jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	data = append(data, '\n')
	path := filepath.Join(f.dir, lockName)
	// What cannot be read again must not be written.
	if len(data) > mostLockBytes {
		return fmt.Errorf("%s: %w: it would have %d bytes, expected at most %d", path, formats.ErrLimit, len(data),
			mostLockBytes)
	}
	if _, err := parse(bytes.Clone(data)); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	temp, err := os.CreateTemp(f.dir, tempPrefix) // which only the user may read and write
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			temp.Close()
			os.Remove(temp.Name())
		}
	}()
	if _, err := temp.Write(data); err != nil {
		return err
	}
	if err := errors.Join(temp.Sync(), temp.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return err
	}
	f.plugins = plugins
	return storage.SyncDir(f.dir)
}
