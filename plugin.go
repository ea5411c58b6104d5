package lorakit

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/hint"
	"github.com/lorakit/lorakit/lora"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/kit"
	"github.com/lorakit/lorakit/plugins/lock"
)

// Kinds of errors of plugins; those of package plugins/lock may be met too.
var (
	// ErrPlugin says that a plugin has failed: it is gone, hangs, or does not keep to the protocol.
	ErrPlugin = host.ErrFailed
	// ErrPluginChanged says that a plugin's files are not what they were when it was installed.
	ErrPluginChanged = lock.ErrChanged
)

// What the functions for plugins return is made by package plugins/lock.
type (
	// PluginSummary is a plugin in a list.
	PluginSummary = lock.Summary
	// PluginVerification is what VerifyPlugin finds.
	PluginVerification = lock.Verification
)

// PluginList is what Plugins finds.
type PluginList struct {
	// Dir is the folder of plugins: $LORAKIT_PLUGIN_DIR, else lorakit/plugins in the user's configuration folder.
	Dir     string          `json:"dir"`
	Plugins []PluginSummary `json:"plugins"`
}

// PluginInstallation is what InstallPlugin has done.
type PluginInstallation struct {
	PluginSummary
	// Path is where the plugin's files are.
	Path string `json:"path"`
	// MTLS says that lorakit and the plugin show each other certificates.
	MTLS    bool     `json:"mtls"`
	Notices []string `json:"notices"`
}

// builtIn are the names that no plugin may have: those of formats and schemes as they are before plugins are
// registered, and of the dialects of adapters, between which and formats Convert chooses by name.
var builtIn = sync.OnceValue(func() lock.Taken {
	t := lock.BuiltIn()
	t.Formats = append(t.Formats, lora.Dialects()...)
	return t
})

func pluginFolder() (*lock.Folder, error) {
	dir, err := lock.Dir()
	if err != nil {
		return nil, err
	}
	return lock.Open(dir, builtIn())
}

// Plugins lists the installed plugins. It goes by the sizes and times of their files, and starts none.
func Plugins() (*PluginList, error) {
	f, err := pluginFolder()
	if err != nil {
		return nil, err
	}
	list := &PluginList{Dir: f.Dir(), Plugins: []PluginSummary{}}
	for _, p := range f.Plugins() {
		list.Plugins = append(list.Plugins, f.Summary(p))
	}
	return list, nil
}

// InstallPluginOptions steer InstallPlugin.
type InstallPluginOptions struct {
	// NoMTLS starts the plugin without mutual TLS. A single executable has it otherwise, and a folder where its
	// plugin.json says so.
	NoMTLS bool
}

// InstallPlugin copies a plugin, an executable file or a folder with a plugin.json, to the folder of plugins, starts it
// once to hear what it has, and pins its files. It runs code with the rights of this process, then and whenever the
// plugin is used. A process that has used plugins already, by any function here, goes on with those that it found then.
func InstallPlugin(ctx context.Context, path string, o InstallPluginOptions) (*PluginInstallation, error) {
	f, err := pluginFolder()
	if err != nil {
		return nil, err
	}
	p, err := f.Install(ctx, path, describe, lock.InstallOptions{NoMTLS: o.NoMTLS})
	if err != nil {
		if ctx.Err() != nil {
			return nil, ErrInterrupted
		}
		return nil, err
	}
	return &PluginInstallation{f.Summary(p), f.Path(p), p.MTLS, p.Notices()}, nil
}

// describe starts a plugin that is being installed. One that does not do mutual TLS fails in ways that do not say so.
func describe(ctx context.Context, p *lock.Plugin, dir string) (lock.Described, error) {
	d, err := host.Describe(ctx, p, dir)
	if p.MTLS && errors.Is(err, ErrPlugin) {
		err = hint.With(err, hint.Hint{Option: "NoMTLS", Effect: "starts it without mutual TLS, if that is what it lacks"})
	}
	return d, err
}

// RemovePlugin removes an installed plugin. One that runs stays, which is an error of kind lock.ErrBusy.
func RemovePlugin(ctx context.Context, name string) error {
	f, err := pluginFolder()
	if err != nil {
		return err
	}
	return f.Remove(ctx, name)
}

// VerifyPluginOptions steer VerifyPlugin.
type VerifyPluginOptions struct {
	// Accept pins the plugin's files as they are now.
	Accept bool
}

// VerifyPlugin reads all files of an installed plugin, and says which are not what they were when it was installed.
func VerifyPlugin(ctx context.Context, name string, o VerifyPluginOptions) (*PluginVerification, error) {
	f, err := pluginFolder()
	if err != nil {
		return nil, err
	}
	p, err := f.Lookup(name)
	if err != nil {
		return nil, err
	}
	if o.Accept {
		if err := f.Accept(ctx, p); err != nil {
			return nil, err
		}
	}
	v, err := f.Verification(p)
	if err != nil {
		return nil, err
	}
	return &v, nil
}

// What TestPlugin returns is made by package plugins/kit.
type (
	// PluginTest is what the checks of a plugin have found.
	PluginTest = kit.Report
	// PluginCheck is one of them.
	PluginCheck = kit.Check
)

// The ways in which a PluginCheck ends.
const (
	CheckPassed  = kit.Passed
	CheckFailed  = kit.Failed
	CheckSkipped = kit.Skipped
)

// TestPluginOptions steer TestPlugin.
type TestPluginOptions struct {
	// Done, where it is not nil, is called with each check as soon as it is made.
	Done func(PluginCheck)
}

// TestPlugin checks that an installed plugin does what lorakit relies on: it has the plugin write and read files and
// weights, sound ones and broken ones, in a folder for temporary files. One that is interrupted returns what was found
// until then with ErrInterrupted.
func TestPlugin(ctx context.Context, name string, o TestPluginOptions) (*PluginTest, error) {
	end, err := usePlugins(0) // for its notices, and samples that are files of others
	if err != nil {
		return nil, err
	}
	defer end()
	f, err := pluginFolder()
	if err != nil {
		return nil, err
	}
	p, err := f.Lookup(name)
	if err != nil {
		return nil, err
	}
	if state, problem := f.State(p); state == lock.Incompatible {
		return nil, fmt.Errorf("plugin %s cannot be used: %s: %w", p.Name, problem, formats.ErrUnsupported)
	}
	s := kit.Installed(f, p)
	s.Done = o.Done
	r, err := kit.Run(ctx, s)
	if ctx.Err() != nil {
		return r, ErrInterrupted
	}
	return r, err
}
