package storage_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/storage"
)

var followed = storage.Options{FollowLinks: true}

// Links that lead out of a folder are taken where links are followed, and else refused by a kind of their own. What a
// file calls another may not lead out in either case.
func TestFollowLinks(t *testing.T) {
	top := tempDir(t)
	dir := filepath.Join(top, "farm")
	stored := write(t, filepath.Join(top, "store", "0a", "model.safetensors"))
	write(t, filepath.Join(dir, "own"))
	link(t, stored, filepath.Join(dir, "model.safetensors"))
	link(t, "../store/0a", filepath.Join(dir, "part"))
	link(t, "model.safetensors", filepath.Join(dir, "twice"))
	for _, name := range []string{"model.safetensors", "part/model.safetensors", "twice"} {
		_, err := within(dir, name)
		assert.ErrorIs(t, err, storage.ErrLink, name)
		assert.ErrorIs(t, err, storage.ErrOutside, name)
		got, err := withinBy(followed, dir, name)
		require.NoError(t, err, name)
		assert.Equal(t, stored, got)
		assert.Equal(t, stored, storage.LocalPath(storage.Local(dir, followed), name))
	}
	for _, name := range []string{"../store/0a/model.safetensors", stored, "part/../own", ""} {
		for _, o := range []storage.Options{{}, followed} {
			_, err := withinBy(o, dir, name)
			assert.ErrorIs(t, err, storage.ErrOutside, name)
			assert.NotErrorIs(t, err, storage.ErrLink, name)
		}
	}
	_, err := withinBy(followed, dir, "part")
	assert.ErrorIs(t, err, storage.ErrNotRegular)
	_, err = withinBy(followed, dir, "missing")
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

// A link to nothing is no file that is not there: it says where it leads, and how what it is of is had.
func TestDanglingLinks(t *testing.T) {
	dir := tempDir(t)
	for name, to := range map[string]string{
		"plain": "nowhere", "twice": "plain", "annex": ".git/annex/objects/Xx/Yy/SHA256E-s1--00/SHA256E-s1--00",
		"dvc": filepath.Join(dir, ".dvc/cache/files/md5/00"), "loop": "loop", "folder": "nowhere",
	} {
		link(t, to, filepath.Join(dir, name))
	}
	for name, says := range map[string]string{
		"plain": `plain: found a link to "nowhere", which is not there, expected a file: link`,
		"twice": `found a link to "plain"`,
		"annex": "run git annex get in its repository", "dvc": "run dvc pull in its repository",
		"loop":     "loop: found a link that leads to itself",
		"folder/a": `folder/a: found a link to "nowhere"`,
	} {
		for _, o := range []storage.Options{{}, followed} {
			_, err := withinBy(o, dir, name)
			assert.ErrorContains(t, err, says)
			assert.ErrorIs(t, err, storage.ErrDangling, name)
			assert.NotErrorIs(t, err, fs.ErrNotExist, name)
		}
	}
	_, _, err := storage.Resolve(filepath.Join(dir, "plain"), storage.Options{})
	assert.ErrorIs(t, err, storage.ErrDangling)
	_, _, err = storage.Resolve(filepath.Join(dir, "loop"), storage.Options{})
	assert.ErrorContains(t, err, "loop")
}

// Folders behind links are listed where links are followed, but for those around them, which would have no end.
func TestListLinks(t *testing.T) {
	top := tempDir(t)
	dir := filepath.Join(top, "farm")
	write(t, filepath.Join(dir, "sub", "a"))
	write(t, filepath.Join(top, "other", "b"))
	link(t, "../other", filepath.Join(dir, "linked"))
	link(t, "..", filepath.Join(dir, "up"))
	link(t, ".", filepath.Join(dir, "self"))
	link(t, "sub", filepath.Join(dir, "twin"))
	link(t, "../farm", filepath.Join(top, "other", "back"))
	link(t, "../third", filepath.Join(top, "other", "on"))
	link(t, "../other", filepath.Join(top, "third", "back"))
	link(t, "nowhere", filepath.Join(dir, "broken"))
	require.NoError(t, os.Symlink("sub/a", filepath.Join(dir, "file")))

	t.Chdir(top)
	walk := func(o storage.Options) []string {
		var found []string
		folder := storage.Local("farm", o)
		var below func(name string)
		below = func(name string) {
			entries, err := folder.List(t.Context(), name)
			require.NoError(t, err)
			for _, e := range entries {
				path := e.Name
				if name != "" {
					path = name + "/" + e.Name
				}
				if e.Folder {
					below(path)
					continue
				}
				if e.Link {
					path += " (link)"
				}
				found = append(found, path)
			}
		}
		below("")
		return found
	}
	assert.Equal(t, []string{"broken (link)", "file (link)", "linked (link)", "self (link)", "sub/a", "twin (link)",
		"up (link)"}, walk(storage.Options{}))
	assert.Equal(t, []string{
		"broken (link)", "file (link)", "linked/b", "linked/back (link)", "linked/on/back (link)", "self (link)", "sub/a",
		"twin/a", "up (link)",
	}, walk(followed))
	_, err := storage.Local(dir, storage.Options{}).List(t.Context(), "linked")
	assert.ErrorIs(t, err, storage.ErrLink)
}
