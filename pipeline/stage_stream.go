package pipeline

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/lorakit/lorakit/storage"
)

const (
	streamName = "stream"
	shardsName = "shards.json"
	// maxShardsBytes bounds a shards.json that is read: one of very many shards and experts has some ten megabytes.
	maxShardsBytes = 256 << 20
)

// adoptions is the content of shards.json.
type adoptions struct {
	Shards []Streamed `json:"shards"`
}

// Folder makes the folder of the stage in which a format writes.
func (s *stage) Folder(string) (string, error) {
	dir := filepath.Join(s.dir, streamName)
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return dir, os.Mkdir(dir, 0o777)
}

// Adopt notes what the file is, durably, and then gives it its name. A file that has its name is trusted only where it
// is what was noted, so that a kill between the two does no harm.
func (s *stage) Adopt(_ context.Context, path string, f Streamed) error {
	s.mu.Lock()
	s.adopted = append(slices.DeleteFunc(s.adopted, func(x Streamed) bool { return x.Name == f.Name }), f)
	b, err := json.Marshal(adoptions{s.adopted}, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.writeShards(b); err != nil {
		return err
	}
	info, err := s.lock.Stat()
	if err != nil {
		return err
	}
	if err := os.Chmod(path, info.Mode().Perm()); err != nil { // as of the files that are written here
		return err
	}
	s.owns(f.Name)
	return os.Rename(path, filepath.Join(s.out(), f.Name))
}

// writeShards replaces shards.json in one step.
func (s *stage) writeShards(b []byte) error {
	path := filepath.Join(s.dir, shardsName)
	f, err := os.OpenFile(path+partSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return storage.SyncDir(s.dir)
}

// readShards reads what an earlier run has noted. What is no such note is as good as none: nothing is trusted then.
func (s *stage) readShards() ([]Streamed, error) {
	f, err := os.Open(filepath.Join(s.dir, shardsName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxShardsBytes+1))
	if err != nil {
		return nil, err
	}
	var x adoptions
	if len(b) > maxShardsBytes || json.Unmarshal(b, &x, jsontext.AllowInvalidUTF8(true)) != nil {
		return nil, nil
	}
	return x.Shards, nil
}

// Streamed finds a file that an earlier run has adopted, and reads all of it to see that it is the same.
func (s *stage) Streamed(ctx context.Context, name string) (Streamed, bool) {
	s.mu.Lock()
	i := slices.IndexFunc(s.adopted, func(x Streamed) bool { return x.Name == name })
	var noted Streamed
	if i >= 0 {
		noted = s.adopted[i]
	}
	s.mu.Unlock()
	if i < 0 {
		return Streamed{}, false
	}
	path := filepath.Join(s.out(), name)
	if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() || info.Size() != noted.Size {
		return Streamed{}, false
	}
	f, err := os.Open(path)
	if err != nil {
		return Streamed{}, false
	}
	defer f.Close()
	sum, n, err := digestOf(ctx, f)
	ok := err == nil && sum == noted.SHA256 && n == noted.Size
	if ok {
		s.owns(name)
	}
	return noted, ok
}

// owns notes a file of the result.
func (s *stage) owns(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names == nil {
		s.names = map[string]bool{}
	}
	s.names[filepath.FromSlash(name)] = true
}

// unknown finds a file in the result that is none of it: a format that writes its files has put it there.
func (s *stage) unknown() (string, error) {
	found := ""
	err := filepath.WalkDir(s.out(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(s.out(), path)
		if err == nil && !s.names[name] && found == "" {
			found = name
		}
		return err
	})
	return found, err
}
