package lock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/lorakit/lorakit/internal/nearest"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Environment names the variable that has the folder's path.
const Environment = "LORAKIT_PLUGIN_DIR"

// Names in the folder. Those with a dot first are no plugin's.
const (
	lockName   = "plugins.lock.json"
	tempPrefix = ".install-" // of what an install that was killed leaves behind
	busyName   = ".lock"     // locked by who changes the folder
	usedName   = ".used"     // a folder with a file a plugin, locked by those who run it
)

// Dir is the folder of plugins: $LORAKIT_PLUGIN_DIR, else lorakit/plugins in the user's configuration folder.
func Dir() (string, error) {
	if dir := os.Getenv(Environment); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("no folder for plugins: %w; set %s", err, Environment)
	}
	return filepath.Join(dir, "lorakit", "plugins"), nil
}

// Folder is a folder of plugins. What it says of them is as it was when it was opened, or changed by it.
type Folder struct {
	dir     string
	taken   Taken
	plugins []*Plugin
}

// Open reads a folder's lock file. A folder that is not there has no plugins. One that others than the user may write
// to is ErrUnsafe, and a lock file that breaks a rule formats.ErrMalformed. taken are the names that no plugin may
// have.
func Open(dir string, taken Taken) (*Folder, error) {
	f := &Folder{dir: dir, taken: taken}
	return f, f.read()
}

// Dir is where the folder is.
func (f *Folder) Dir() string { return f.dir }

// Plugins lists the plugins, sorted by name. The caller does not change them.
func (f *Folder) Plugins() []*Plugin { return slices.Clone(f.plugins) }

// Lookup finds a plugin by its name. One that is not there is ErrNotInstalled.
func (f *Folder) Lookup(name string) (*Plugin, error) {
	if p := f.find(name); p != nil {
		return p, nil
	}
	var names []string
	for _, p := range f.plugins {
		names = append(names, p.Name)
	}
	return nil, fmt.Errorf("plugin %s: %w in %s%s", tensor.Quote(name), ErrNotInstalled, f.dir,
		nearest.Suggestion(name, names))
}

func (f *Folder) find(name string) *Plugin {
	for _, p := range f.plugins {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// Path is the folder of a plugin's files.
func (f *Folder) Path(p *Plugin) string { return filepath.Join(f.dir, p.Name, p.Version) }

// Use marks a plugin as running, so that its files are neither replaced nor removed, until it is released or the
// process ends. Call it before Verify: a plugin that was replaced or removed since the folder was opened is ErrChanged.
func (f *Folder) Use(p *Plugin) (release func(), err error) {
	for started := time.Now(); ; time.Sleep(wait) {
		release, err = f.mark(p.Name, storage.LockShared, "is being replaced or removed by another process")
		// A change is short, and a process that was forked during one holds its lock until it is another program.
		if !errors.Is(err, ErrBusy) || time.Since(started) > mostUseWait {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	now := &Folder{dir: f.dir}
	if err := now.read(); err != nil {
		release()
		return nil, err
	}
	if q := now.find(p.Name); q == nil || q.Version != p.Version || q.Digest != p.Digest {
		release()
		return nil, fmt.Errorf("plugin %s: %w: it was replaced or removed since this run began", p.Name, ErrChanged)
	}
	return release, nil
}

// mark locks the file that stands for a plugin that runs. The file stays when the lock is gone: were it removed, one
// process could hold the old file and another a new one.
func (f *Folder) mark(name string, lock func(*os.File) (bool, error), busy string) (release func(), err error) {
	dir := filepath.Join(f.dir, usedName)
	if err := makePrivate(dir); err != nil {
		return nil, err
	}
	return take(filepath.Join(dir, name), lock, fmt.Sprintf("plugin %s: it %s", name, busy))
}

func take(path string, lock func(*os.File) (bool, error), busy string) (release func(), err error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	ok, err := lock(file)
	if err == nil && !ok {
		err = fmt.Errorf("%s: %w", busy, ErrBusy)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return func() { file.Close() }, nil
}

// How long a change of the folder waits for another one: longer than a plugin may take to start.
const (
	mostWait = 2 * time.Minute
	// mostUseWait is how long a run waits for a change of a plugin that it is about to start.
	mostUseWait = time.Second
	wait        = 50 * time.Millisecond
)

// begin starts a change of the folder, of which there is one at a time, and reads what others have changed.
func (f *Folder) begin(ctx context.Context) (end func(), err error) {
	for started := time.Now(); ; {
		end, err = take(filepath.Join(f.dir, busyName), storage.Lock, f.dir+": another process changes the plugins")
		if !errors.Is(err, ErrBusy) || time.Since(started) > mostWait {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
	if err != nil {
		return nil, err
	}
	if err := f.read(); err != nil {
		end()
		return nil, err
	}
	return end, nil
}

// sweep removes what changes that were killed have left.
func (f *Folder) sweep() error {
	left, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, e := range left {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.RemoveAll(filepath.Join(f.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// discard takes a folder out of sight in one step, and then removes it. What is not there is no error.
func (f *Folder) discard(dir string) error {
	temp, err := os.MkdirTemp(f.dir, tempPrefix)
	if err != nil {
		return err
	}
	err = os.Rename(dir, filepath.Join(temp, "old"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(temp))
}

// Remove removes a plugin. One that runs is ErrBusy.
func (f *Folder) Remove(ctx context.Context, name string) error {
	if _, err := f.Lookup(name); err != nil { // and make no file in a folder that may not be there
		return err
	}
	end, err := f.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	p, err := f.Lookup(name)
	if err != nil {
		return err
	}
	release, err := f.mark(name, storage.Lock, "runs")
	if err != nil {
		return err
	}
	defer release()
	// The entry first: an entry without files would be a broken plugin, files without an entry are none.
	if err := f.write(slices.DeleteFunc(f.Plugins(), func(q *Plugin) bool { return q == p })); err != nil {
		return err
	}
	return f.discard(filepath.Join(f.dir, name))
}

// makePrivate makes a folder for the user alone where there is none, and checks one that is there.
func makePrivate(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	return private(dir, info)
}

// private refuses a folder or file that is a link, or that others than the user may write to.
func private(path string, info fs.FileInfo) error {
	if info.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%s: %w: found a link, expected a folder or file", path, ErrUnsafe)
	}
	return owned(path, info)
}
