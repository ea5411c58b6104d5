package lock

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/storage"
)

var storageLock = storage.Lock

// text is the lock file of a folder with the plugin toy.
func text(t testing.TB) string {
	files := []File{{Path: "bin/run", Size: 1, SHA256: strings.Repeat("a", 64)},
		{Path: "main.py", SHA256: strings.Repeat("0", 64)}}
	p := &Plugin{Described: toy(), Command: []string{"./bin/run"}, Files: files, Digest: digest(files)}
	b, err := json.Marshal(lockFile{lockVersion, []*Plugin{p}})
	require.NoError(t, err)
	return string(b)
}

func TestLockFilesThatAreRefused(t *testing.T) {
	whole := text(t)
	list, err := parse([]byte(whole))
	require.NoError(t, err)
	require.Len(t, list, 1)
	entry := whole[strings.Index(whole, `[{"name"`)+1 : len(whole)-2]
	sha := strings.Repeat("a", 64)
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o700))
	for name, c := range map[string]struct {
		old, new string
		kind     error
		says     string
	}{
		"empty":               {whole, ``, formats.ErrMalformed, ""},
		"no object":           {whole, `[]`, formats.ErrMalformed, ""},
		"no version":          {`"lock_version":1,`, ``, formats.ErrMalformed, "no lock_version"},
		"version 2":           {`"lock_version":1`, `"lock_version":2`, formats.ErrUnsupported, "lock_version 2, expected 1"},
		"version twice":       {`"lock_version":1`, `"lock_version":1,"lock_version":1`, formats.ErrMalformed, "duplicate"},
		"name twice":          {`"name":"toy",`, `"name":"toy","name":"toy",`, formats.ErrMalformed, "duplicate"},
		"unknown":             {`"mtls"`, `"extra":1,"mtls"`, formats.ErrMalformed, "extra"},
		"other case":          {`"mtls"`, `"MTLS"`, formats.ErrMalformed, "MTLS"},
		"behind it":           {whole, whole + "{}", formats.ErrMalformed, ""},
		"a null":              {entry, `null`, formats.ErrMalformed, "null"},
		"two plugins alike":   {entry, entry + "," + entry, formats.ErrMalformed, "toy twice"},
		"too many plugins":    {entry, strings.Repeat(entry+",", 256) + entry, formats.ErrLimit, "257 plugins"},
		"a name outside":      {`"name":"toy",`, `"name":"../toy",`, formats.ErrMalformed, "the name"},
		"a version outside":   {`"version":"1.0.0"`, `"version":".."`, formats.ErrMalformed, "the version"},
		"protocol 0":          {`"protocol":1`, `"protocol":0`, formats.ErrMalformed, "protocol 0"},
		"protocol 2, outside": {`"version":"1.0.0","protocol":1`, `"version":"/","protocol":2`, formats.ErrMalformed, "the version"},
		"a path outside":      {`"path":"bin/run"`, `"path":"../run"`, formats.ErrMalformed, `"../run"`},
		"an absolute path":    {`"path":"bin/run"`, `"path":"/bin/run"`, formats.ErrMalformed, `"/bin/run"`},
		"not a clean path":    {`"path":"bin/run"`, `"path":"bin//run"`, formats.ErrMalformed, `"bin//run"`},
		"a back slash":        {`"path":"bin/run"`, `"path":"bin\\run"`, formats.ErrMalformed, "the path"},
		"no path":             {`"path":"bin/run"`, `"path":""`, formats.ErrMalformed, "the path"},
		"a file twice":        {`"path":"main.py"`, `"path":"bin/run"`, formats.ErrMalformed, "each once"},
		"not sorted":          {`"path":"main.py"`, `"path":"a"`, formats.ErrMalformed, "sorted by path"},
		"a negative size":     {`"size":1`, `"size":-1`, formats.ErrMalformed, "-1 bytes"},
		"a huge size":         {`"size":1`, `"size":9223372036854775807`, formats.ErrMalformed, "9223372036854775807 bytes"},
		"a size of two":       {`"size":0`, `"size":1073741824`, formats.ErrMalformed, "of all files"},
		"too large a size":    {`"size":1`, `"size":9223372036854775808`, formats.ErrMalformed, ""},
		"a fraction":          {`"size":1`, `"size":1.5`, formats.ErrMalformed, ""},
		"another sum":         {sha, strings.Repeat("b", 64), formats.ErrMalformed, "the digest"},
		"a short sum":         {sha, "aa", formats.ErrMalformed, "sha256"},
		"no files":            {`"files":[`, `"files":[],"x":[`, formats.ErrMalformed, ""},
		"no command":          {`["./bin/run"]`, `[]`, formats.ErrMalformed, "0 words"},
		"a command outside":   {`["./bin/run"]`, `["/bin/sh"]`, formats.ErrMalformed, "/bin/sh"},
		"no interpreter":      {`["./bin/run"]`, `["python3","main.py"]`, formats.ErrMalformed, "interpreter"},
		"a second program":    {`"interpreter":null`, `"interpreter":{"path":"/bin/sh","sha256":"` + sha + `","version":""}`, formats.ErrMalformed, "interpreter"},
		"a relative one": {`["./bin/run"],"interpreter":null`,
			`["sh"],"interpreter":{"path":"sh","sha256":"` + sha + `","version":""}`, formats.ErrMalformed, "expected an absolute path"},
		"an odd sum of it": {`["./bin/run"],"interpreter":null`,
			`["sh"],"interpreter":{"path":"/bin/sh","sha256":"","version":""}`, formats.ErrMalformed, "hexadecimal"},
		"slow":          {`"mtls":false`, `"mtls":false,"start_seconds":61`, formats.ErrMalformed, "start_seconds 61"},
		"no hex":        {`544f5931`, `5`, formats.ErrMalformed, ""},
		"magic too far": {`"offset":4`, `"offset":4096`, formats.ErrMalformed, "4096"},
		"a bad time":    {`"installed":"`, `"installed":"x`, formats.ErrMalformed, ""},
	} {
		t.Run(name, func(t *testing.T) {
			require.Contains(t, whole, c.old)
			changed := strings.Replace(whole, c.old, c.new, 1)
			require.NoError(t, os.WriteFile(filepath.Join(dir, lockName), []byte(changed), 0o600))
			_, err := Open(dir, BuiltIn())
			oneLine(t, err, c.kind, filepath.Join(dir, lockName), c.says)
		})
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, lockName), make([]byte, mostLockBytes+1), 0o600))
	_, err = Open(dir, BuiltIn())
	oneLine(t, err, formats.ErrLimit, lockName)
}

// TestNewerPlugins: what speaks a later protocol is listed and not used, whatever its words mean.
func TestNewerPlugins(t *testing.T) {
	changed := strings.NewReplacer(`"protocol":1`, `"protocol":2`, `"extents"`, `"telepathy"`).Replace(text(t))
	list, err := parse([]byte(changed))
	require.NoError(t, err)
	f := &Folder{dir: t.TempDir(), plugins: list}
	state, problem := f.State(list[0])
	require.Equal(t, Incompatible, state)
	require.Contains(t, problem, "speaks protocol 2, this lorakit speaks 1")
}

// FuzzParse: what is taken can be written, is read as the same again, and has no path that leaves the folder.
func FuzzParse(f *testing.F) {
	f.Add(text(f))
	f.Add(`{"lock_version":1,"plugins":[]}`)
	f.Fuzz(func(t *testing.T, data string) {
		list, err := parse([]byte(data))
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		for _, p := range list {
			for _, file := range p.Files {
				require.True(t, filepath.IsLocal(filepath.FromSlash(file.Path)))
			}
			require.True(t, filepath.IsLocal(filepath.Join(p.Name, p.Version)))
			require.NotEmpty(t, p.Argv("dir"))
		}
		b, err := json.Marshal(lockFile{lockVersion, list})
		require.NoError(t, err)
		again, err := parse(b)
		require.NoError(t, err)
		for i, p := range list {
			require.Empty(t, p.Difference(&again[i].Described))
			require.Equal(t, p.Digest, again[i].Digest)
		}
	})
}
