package pipeline

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

// Kinds of errors of Run. Test for them with errors.Is.
var (
	// ErrExists says that the destination is there already.
	ErrExists = errors.New("already exists")
	// ErrOtherPlan says that a stage, or a destination, was made by another plan.
	ErrOtherPlan = errors.New("made by another plan")
	// ErrBusy says that another process is writing to the same destination.
	ErrBusy = errors.New("another run is writing to it")
)

// stage is the folder DST.partial, in which a result comes into being:
//
//	plan.json   which plan is at work; locked by the process that is
//	out/        what becomes DST by one rename; a shard that is not finished has the ending .part
//	stream/     what a format writes itself, until it is complete
//	shards.json those of it that are, by name, size and SHA-256
//	old/        the DST that was replaced, where the two cannot be swapped in one step
//	scratch*    what did not fit in memory
//
// The result has a folder of its own in the stage, so that the one rename that publishes it needs nothing to be tidied
// before: whenever a run is killed, DST is whole or not there, and what is left can be gone on with.
type stage struct {
	dst     string
	dir     string
	single  bool
	force   bool     // DST may be replaced
	lock    *os.File // plan.json
	begun   begun
	mu      sync.Mutex
	adopted []Streamed      // the content of shards.json
	names   map[string]bool // files of the result
	// parents are the folders above dst that were made for it, the deepest first.
	parents []string
}

// begun is the content of plan.json.
type begun struct {
	Plan string `json:"plan"` // its digest
	// Result is set when all is written and synced, just before the rename: the modification time of the result, by which
	// it is known again at DST.
	Result string `json:"result,omitempty"`
}

const (
	stageSuffix = ".partial"
	partSuffix  = ".part"
	beginName   = "plan.json"
	// beginBytes is the length of plan.json, always the same, so that it is overwritten in one step.
	beginBytes = 512
)

// openStage makes the stage of dst, or, to resume, takes up the one that is there.
func openStage(dst, digest string, single, resume, force bool) (*stage, error) {
	s := &stage{dst: dst, dir: dst + stageSuffix, single: single, force: force, begun: begun{Plan: digest}}
	if err := s.makeParents(); err != nil {
		return nil, err
	}
	err := s.take()
	if err == nil {
		if err = s.takeUp(digest, resume); err == nil {
			return s, nil
		}
		s.lock.Close()
	}
	s.removeParents()
	return nil, err
}

// makeParents makes the folders above DST that are not there.
func (s *stage) makeParents() error {
	parent := filepath.Dir(s.dst)
	for dir := parent; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			break
		}
		s.parents = append(s.parents, dir)
	}
	return os.MkdirAll(parent, 0o777)
}

// removeParents removes the folders that makeParents made and nothing came of.
func (s *stage) removeParents() {
	for _, dir := range s.parents {
		if os.Remove(dir) != nil {
			return
		}
	}
}

// recognise makes sure that the folder is a stage, before anything in it is touched: somebody may have a folder of
// this name.
func (s *stage) recognise() error {
	foreign := func(what string) error {
		return fmt.Errorf("%s: %w and is no stage of lorakit: %s; give another destination, or move it away", s.dir,
			ErrExists, what)
	}
	if info, err := os.Lstat(s.dir); err != nil {
		return err
	} else if !info.IsDir() { // a link to a folder neither
		return foreign("it is no folder")
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	marked := false
	for _, e := range entries {
		switch scratch, _ := filepath.Match(scratchPattern, e.Name()); {
		case e.Name() == beginName && e.Type().IsRegular():
			marked = true
		case e.IsDir() && (e.Name() == "out" || e.Name() == "old" || e.Name() == streamName),
			e.Type().IsRegular() && (scratch || e.Name() == shardsName || e.Name() == shardsName+partSuffix):
		default:
			return foreign("it holds " + tensor.Quote(e.Name()))
		}
	}
	if len(entries) == 0 {
		return nil // killed between two steps of making it
	}
	if !marked {
		return foreign("it has no " + beginName)
	}
	b, err := os.ReadFile(filepath.Join(s.dir, beginName))
	if err != nil {
		return err
	}
	if _, ok := parseBegun(b); !ok && (len(b) > 0 || len(entries) > 1) {
		return foreign("its " + beginName + " is another")
	}
	return nil
}

func parseBegun(b []byte) (begun, bool) {
	var x begun
	return x, len(b) <= beginBytes && json.Unmarshal(b, &x) == nil && x.Plan != ""
}

// take makes the folder, if it is not there, and locks it for this process. Before it has the lock it creates plan.json
// and changes nothing else; from then on nobody else changes anything. A stage that another run is just removing is
// made anew.
func (s *stage) take() error {
	path := filepath.Join(s.dir, beginName)
	for range 1000 {
		err := os.Mkdir(s.dir, 0o777)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := s.recognise(); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			os.Remove(s.dir) // where it was made for this, and is empty
			return err
		}
		ok, err := storage.Lock(f)
		if err == nil && !ok {
			err = s.busy()
		}
		if err != nil {
			f.Close()
			return err
		}
		// What is locked must be what others will try to lock.
		locked, err := f.Stat()
		if err != nil {
			f.Close()
			return err
		}
		if named, err := os.Stat(path); err == nil && os.SameFile(locked, named) {
			s.lock = f
			return nil
		}
		f.Close()
	}
	return s.busy()
}

func (s *stage) busy() error { return fmt.Errorf("%s: %w", s.dir, ErrBusy) }

// write puts what is known in plan.json.
func (s *stage) write() error {
	b, err := json.Marshal(s.begun)
	if err != nil {
		return err
	}
	b = append(b, bytes.Repeat([]byte{' '}, beginBytes-len(b)-1)...)
	if _, err := s.lock.WriteAt(append(b, '\n'), 0); err != nil {
		return err
	}
	return s.lock.Sync()
}

// out is the folder that becomes DST, or that DST stands in where it is one file.
func (s *stage) out() string { return filepath.Join(s.dir, "out") }

// old is where a replaced DST goes that cannot be swapped.
func (s *stage) old() string { return filepath.Join(s.dir, "old") }

// result is what is renamed to DST.
func (s *stage) result() string {
	if s.single {
		return filepath.Join(s.out(), filepath.Base(s.dst))
	}
	return s.out()
}

// Publish makes the result DST. The stage is left for the caller to remove, with what stood at DST before in it.
func (s *stage) Publish() error {
	if len(s.adopted) > 0 { // a format has written files itself
		switch name, err := s.unknown(); {
		case err != nil:
			return err
		case name != "":
			return fmt.Errorf("%s: found %s, expected only what was written there: %w", s.out(), tensor.Quote(name),
				formats.ErrMalformed)
		}
	}
	if err := syncTree(s.out()); err != nil {
		return err
	}
	s.begun.Result = modified(s.result())
	if err := s.write(); err != nil {
		return err
	}
	return s.swap()
}

// swap renames the result to DST. An old DST comes to stand in the stage.
func (s *stage) swap() error {
	if _, err := os.Lstat(s.dst); errors.Is(err, fs.ErrNotExist) {
		return os.Rename(s.result(), s.dst)
	}
	if !s.force {
		return existsError(s.dst)
	}
	if swapped, err := storage.Exchange(s.result(), s.dst); err != nil || swapped {
		return err
	}
	if err := os.Rename(s.dst, s.old()); err != nil {
		return err
	}
	if err := os.Rename(s.result(), s.dst); err != nil {
		return errors.Join(err, s.restore())
	}
	return nil
}

// restore puts an old DST back that was renamed away and has not been replaced.
func (s *stage) restore() error {
	if _, err := os.Lstat(s.dst); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := os.Rename(s.old(), s.dst)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// force is what to do where something is in the way.
var force = hint.Hint{Option: "Force", Effect: "replaces it"}

func existsError(dst string) error {
	return hint.With(fmt.Errorf("%s: %w", dst, ErrExists), force)
}

// published reports whether the result is at DST already, and only this stage is left over.
func (s *stage) published() bool {
	return s.begun.Result != "" && modified(s.dst) == s.begun.Result
}

// modified is the modification time of a file or folder, "" where there is none.
func modified(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	return timestamp(info.ModTime())
}

// timestamp writes a time to the nanosecond. A file may have one that no calendar has.
func timestamp(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }

// remove deletes the stage, plan.json last: without it nobody could tell what the rest is.
func (s *stage) remove() error {
	defer s.lock.Close()
	if err := s.restore(); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == beginName {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			return err
		}
	}
	path := filepath.Join(s.dir, beginName)
	if os.Remove(path) != nil { // Windows removes no file that is open
		s.lock.Close()
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	// Another run may have taken the folder over in between: then it is its own.
	os.Remove(s.dir)
	return nil
}

// Abort deletes the stage, or leaves it where its finished files are to be kept.
func (s *stage) Abort(keep bool) error {
	if keep {
		return s.lock.Close()
	}
	err := s.remove()
	if err == nil {
		s.removeParents()
	}
	return err
}

func (s *stage) String() string { return s.dir }

// syncTree makes the names in a folder and all below durable. The files have been synced as they were finished.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = storage.SyncDir(path)
		}
		return err
	})
}
