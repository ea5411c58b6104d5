package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteWhole writes a file that appears whole or not at all: beside it, under a name that only this process has,
// synced, and put in its place by one rename. Where replace is not set, a file that is there is an error of kind
// fs.ErrExist and stays as it is.
func WriteWhole(path string, data []byte, replace bool) error {
	return CreateWhole(path, replace, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// CreateWhole is WriteWhole of what fill writes.
func CreateWhole(path string, replace bool, fill func(io.Writer) error) (err error) {
	if !replace { // before the work
		if err := Absent(path); err != nil {
			return err
		}
	}
	beside := besideOf(path)
	if err := os.Remove(beside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666) // and not what a link there leads to
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := fill(f); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if !replace {
		if err := Absent(path); err != nil {
			return err
		}
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// CreateFolder makes a folder that appears whole or not at all, as CreateWhole makes a file; folders above it are made
// where they are missing. What fill puts into the folder it is given, it has synced itself. Where replace is set, what
// is there makes way in one step where the system can exchange two names, and is then removed.
func CreateFolder(path string, replace bool, fill func(dir string) error) (err error) {
	path = filepath.Clean(path)
	if !replace {
		if err := Absent(path); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return err
	}
	beside := besideOf(path)
	if err := os.Mkdir(beside, 0o777); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(beside)
		}
	}()
	if err := fill(beside); err != nil {
		return err
	}
	if err := SyncDir(beside); err != nil {
		return err
	}
	if err := publish(beside, path, replace); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// publish renames a folder to path, where another may be that is replaced.
func publish(dir, path string, replace bool) error {
	err := Absent(path)
	switch {
	case err == nil:
		return os.Rename(dir, path)
	case !replace:
		return err
	}
	if swapped, err := Exchange(dir, path); err != nil {
		return err
	} else if swapped {
		return os.RemoveAll(dir)
	}
	old := dir + ".old"
	if err := os.Rename(path, old); err != nil {
		return err
	}
	if err := os.Rename(dir, path); err != nil {
		return errors.Join(err, os.Rename(old, path))
	}
	return os.RemoveAll(old)
}

// besideOf is the name, beside a path, of what is to take its place: only this process has it.
func besideOf(path string) string { return fmt.Sprintf("%s.%d.partial", path, os.Getpid()) }

// Absent refuses a path at which something is: an error of kind fs.ErrExist.
func Absent(path string) error {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", path, fs.ErrExist)
}
