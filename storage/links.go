package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/lorakit/lorakit/hint"
)

// Kinds of errors. Test for them with errors.Is.
var (
	// ErrOutside says that a name, or a link behind it, leads out of the folder it was to be found in.
	ErrOutside = errors.New("path leaves the folder")
	// ErrLink is an ErrOutside of a link, which Options.FollowLinks takes.
	ErrLink = fmt.Errorf("%w by a link", ErrOutside)
	// ErrDangling says that a link leads to nothing. It is no fs.ErrNotExist: whoever made the link has meant something.
	ErrDangling = errors.New("link leads to nothing")
	// ErrNotRegular says that a path is a folder, a pipe, a device or a socket.
	ErrNotRegular = errors.New("not a regular file")
)

// within finds the file that a checkpoint in the folder dir calls name, a slash-separated path. It returns the path
// with all links resolved.
//
// A name that is empty, absolute, has a ".." or "." element, a back slash or a NUL is ErrOutside, and so is, as
// ErrLink, a link that leads out of the folder, unless links are followed. One exception is the cache of the Hugging
// Face hub, where a file of REPO/snapshots/REVISION is a link into REPO/blobs, and a blob may in turn be a link into
// the store that the whole cache shares (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
//
// A file that does not exist is fs.ErrNotExist. The check holds for the moment it is made: somebody who may write to
// the folder can still exchange the file before it is opened, as they could have changed its content. The result has
// no link left in it, so a link put there later is the only way.
func within(dir, name string, o Options) (string, error) {
	if !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\\x00") ||
		!filepath.IsLocal(filepath.FromSlash(name)) {
		return "", fmt.Errorf("%s: found the file name %q, expected one inside the folder: %w", dir, clip(name), ErrOutside)
	}
	root, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if root, err = filepath.EvalSymlinks(root); err != nil {
		return "", err
	}
	path, err := filepath.EvalSymlinks(filepath.Join(root, filepath.FromSlash(name)))
	if err != nil {
		return "", lost(dir, root, name, err)
	}
	if o.FollowLinks || inside(root, path) || inHubCache(root, path) {
		return path, nil
	}
	err = fmt.Errorf("%s: found %q as a link to %q, expected a file inside the folder: %w", dir, clip(name), path, ErrLink)
	return "", hint.With(err, hint.Hint{Option: "FollowLinks", Effect: "takes such links"})
}

// lost says why a name could not be resolved: the error, or that it is a link, or below one, that leads to nothing.
func lost(dir, root, name string, err error) error {
	shown := filepath.Join(dir, filepath.FromSlash(name))
	if named := (*fs.PathError)(nil); !errors.As(err, &named) { // links that lead to themselves
		return fmt.Errorf("%s: found a link that leads to itself, expected a file: %w", shown, ErrDangling)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	path := root
	for _, element := range strings.Split(name, "/") {
		path = filepath.Join(path, element)
		to, failed := os.Readlink(path)
		if failed != nil {
			continue
		}
		if _, failed := filepath.EvalSymlinks(path); errors.Is(failed, fs.ErrNotExist) {
			return dangling(shown, to)
		}
	}
	return err
}

// dangling is the error of a link to nothing. Where tools keep what they link to, it says how they get it.
func dangling(path, to string) error {
	get := ""
	switch slashed := filepath.ToSlash(to); {
	case strings.Contains(slashed, ".git/annex/objects/"):
		get = ": run git annex get in its repository"
	case strings.Contains(slashed, ".dvc/cache/"):
		get = ": run dvc pull in its repository"
	}
	return fmt.Errorf("%s: found a link to %q, which is not there, expected a file%s: %w", path, clip(to), get,
		ErrDangling)
}

// inside reports whether path, free of links, is below dir.
func inside(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != "." && filepath.IsLocal(rel)
}

// inHubCache reports whether path is a blob that belongs to the snapshot in which root lies.
func inHubCache(root, path string) bool {
	for p := root; ; p = filepath.Dir(p) {
		parent := filepath.Dir(p)
		if parent == p {
			return false
		}
		if filepath.Base(parent) != "snapshots" {
			continue
		}
		repo := filepath.Dir(parent)
		if inside(resolved(filepath.Join(repo, "blobs")), path) {
			return true
		}
		shared := resolved(filepath.Join(filepath.Dir(repo), "blobs"))
		marker, err := os.Lstat(filepath.Join(shared, ".huggingface-shared-blobs"))
		return err == nil && marker.Mode().IsRegular() && inside(shared, path)
	}
}

// resolved is a folder free of links: a cache's blobs may lie on another disk.
func resolved(dir string) string {
	if path, err := filepath.EvalSymlinks(dir); err == nil {
		return path
	}
	return dir
}

// clip keeps a hostile name from filling the screen.
func clip(name string) string {
	const most = 100
	if len(name) <= most {
		return name
	}
	return name[:most] + "..."
}
