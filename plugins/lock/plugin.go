// Package lock is the folder of installed plugins, and the file in it that pins them.
//
// A plugin runs with all the rights of its user, so none is taken from anywhere else: not from PATH, the working
// directory or a checkpoint's folder. The folder belongs to the user alone; NAME/VERSION in it has a copy of a plugin's
// files, and plugins.lock.json says what each of them was when it was installed, and what the plugin then said of
// itself. Detection goes by that file and starts nothing.
//
// The package starts no plugin. Install is given a function that does.
package lock

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/lorakit/lorakit/plugins/wire"
)

// Kinds of errors. Test for them with errors.Is; formats.ErrMalformed, formats.ErrLimit and formats.ErrUnsupported are
// met too.
var (
	// ErrUnsafe says that others than the user may write to the folder or to what is in it.
	ErrUnsafe = errors.New("not the user's alone")
	// ErrTaken says that a name, an extension or a type is that of a built-in or of another plugin.
	ErrTaken = errors.New("taken")
	// ErrInstalled says that a plugin of this version is installed with other files.
	ErrInstalled = errors.New("installed with other files")
	// ErrBusy says that another process uses a plugin, or changes the folder.
	ErrBusy = errors.New("in use")
	// ErrNotInstalled says that there is no such plugin.
	ErrNotInstalled = errors.New("not installed")
	// ErrChanged says that a plugin's files are not what they were when it was installed.
	ErrChanged = errors.New("not as it was installed")
)

// Protocol is the version of the protocol that this lorakit speaks.
const Protocol = wire.Protocol

// Capabilities are the words of Described.Capabilities.
const (
	Read          = wire.Read
	Extents       = wire.Extents
	WriteLayout   = wire.WriteLayout
	WriteStream   = wire.WriteStream
	SchemeDecode  = wire.SchemeDecode
	SchemeEncode  = wire.SchemeEncode
	Deterministic = wire.Deterministic
)

// The ways in which files of a format are written, of Format.Write.
const (
	WriteByLayout = "layout"
	WriteByStream = "stream"
	WriteByNone   = "none"
)

// Described is what a plugin says of itself.
type Described struct {
	Name         string   `json:"name"`
	Version      string   `json:"version"`
	Protocol     int      `json:"protocol"`
	Capabilities []string `json:"capabilities"`
	Formats      []Format `json:"formats"`
	Schemes      []Scheme `json:"schemes"`
}

// Can reports whether the plugin has a capability.
func (d *Described) Can(capability string) bool { return slices.Contains(d.Capabilities, capability) }

// Difference names the first field in which another description differs, and is empty for an equal one.
func (d *Described) Difference(o *Described) string {
	for _, f := range []struct {
		name       string
		one, other any
	}{
		{"name", d.Name, o.Name},
		{"version", d.Version, o.Version},
		{"protocol", d.Protocol, o.Protocol},
		{"capabilities", d.Capabilities, o.Capabilities},
		{"formats", d.Formats, o.Formats},
		{"schemes", d.Schemes, o.Schemes},
	} {
		// As JSON, in which a list that is nil and an empty one are the same.
		a, errA := json.Marshal(f.one)
		b, errB := json.Marshal(f.other)
		if errA != nil || errB != nil || string(a) != string(b) {
			return f.name
		}
	}
	return ""
}

// Format is a format of a plugin. A file is of it if it has one of the extensions or file names (where there are any)
// and one of the magics (where there are any).
type Format struct {
	Name       string   `json:"name"`
	Extensions []string `json:"extensions"` // with the dot
	Magic      []Magic  `json:"magic"`
	FileNames  []string `json:"file_names"` // globs of base names
	Write      string   `json:"write"`
	// DTypes are the types that the format can hold; none stands for all.
	DTypes []string `json:"dtypes,omitempty"`
	// Written are those of the extensions that files are written with, the usual one first; none stands for all.
	Written []string `json:"written,omitempty"`
}

// Magic are bytes of a file by which it is known.
type Magic struct {
	Offset int64 `json:"offset"`
	Bytes  Hex   `json:"hex"`
}

// Hex is bytes that JSON has as hexadecimal digits.
type Hex []byte

// MarshalText writes the digits.
func (h Hex) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

// UnmarshalText reads digits.
func (h *Hex) UnmarshalText(text []byte) (err error) {
	*h, err = hex.AppendDecode(nil, text)
	return err
}

// Scheme is a quantisation scheme of a plugin.
type Scheme struct {
	Name  string   `json:"name"` // the quant_method of a config.json
	Types []string `json:"types"`
	// Parameters are what of "block_size" and "double_quant" the types have.
	Parameters []string `json:"parameters,omitempty"`
	// Suffixes are endings of the names of tensors by which its weights are known; none has every checkpoint looked at.
	Suffixes []string `json:"suffixes,omitempty"`
	// Notices say what a user should know of weights that are written.
	Notices []string `json:"notices,omitempty"`
}

// Plugin is an installed plugin: an entry of the lock file.
type Plugin struct {
	Described
	// Command is what starts it. The first word is a path inside of its folder, or the name of an interpreter.
	Command     []string     `json:"command"`
	Interpreter *Interpreter `json:"interpreter"`
	Files       []File       `json:"files"`  // sorted by path
	Digest      string       `json:"digest"` // of the paths, sizes and contents of Files
	MTLS        bool         `json:"mtls"`
	// StartSeconds is how long it may take to start; 0 is the host's default.
	StartSeconds int       `json:"start_seconds,omitzero"`
	Installed    time.Time `json:"installed"`
}

// Argv is what to run for the package in a folder.
func (p *Plugin) Argv(dir string) []string {
	if p.Interpreter == nil {
		return append([]string{filepath.Join(dir, filepath.FromSlash(p.Command[0]))}, p.Command[1:]...)
	}
	argv := []string{p.Interpreter.Path}
	if p.Interpreter.python() {
		// Python would keep compiled modules beside their sources, where nothing may be added.
		argv = append(argv, "-B")
	}
	return append(argv, p.Command[1:]...)
}

// Interpreter is a program outside of a plugin's folder that runs it, as it was when the plugin was installed.
type Interpreter struct {
	// Path is absolute, and may be a link: Python finds its environment by where the link is.
	Path    string `json:"path"`
	SHA256  string `json:"sha256"`
	Version string `json:"version"` // what it says to --version, if it does
	Size    int64  `json:"size,omitzero"`
	MTime   string `json:"mtime,omitzero"`
}

func (i *Interpreter) python() bool {
	return strings.HasPrefix(strings.ToLower(filepath.Base(i.Path)), "python") || strings.HasPrefix(i.Version, "Python ")
}

// File is a file of a plugin.
type File struct {
	Path   string `json:"path"` // with slashes, below the plugin's folder
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// MTime is when its copy was changed, in seconds since 1970, by which a later change is seen without reading it.
	MTime string `json:"mtime,omitzero"`
}

// digest is that of files, which are sorted by path.
func digest(files []File) string {
	h := sha256.New()
	for _, f := range files {
		fmt.Fprintf(h, "%s\x00%d\x00%s\n", f.Path, f.Size, f.SHA256)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Sniffed reports whether nothing is known of the format's files, so that the plugin has to be asked.
func (f *Format) Sniffed() bool { return len(f.Extensions)+len(f.FileNames)+len(f.Magic) == 0 }
