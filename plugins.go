package lorakit

import (
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/quant"
)

// PluginUse is what the process of a plugin has used.
type PluginUse = host.Use

// plugged are the plugins of the user's folder, once they are registered. They are registered once in a process: what
// is installed or removed afterwards is known to the next.
var plugged struct {
	sync.Mutex
	host    *host.Host
	notices []string
}

// usePlugins makes the formats and schemes of installed plugins known, and says that they may be used until the
// function that it returns is called, which says what they have used. No plugin is started by it.
func usePlugins(memory int64) (end func() []PluginUse, err error) {
	plugged.Lock()
	defer plugged.Unlock()
	if plugged.host == nil {
		if err := plugIn(); err != nil {
			plugged.host = nil
			return nil, err
		}
	}
	return plugged.host.Begin(memory), nil
}

// plugIn registers what the lock file lists.
func plugIn() error {
	dir, err := lock.Dir()
	if err != nil { // no folder, no plugins
		plugged.host = &host.Host{}
		return nil
	}
	folder, err := lock.Open(dir, builtIn())
	if err != nil {
		return err
	}
	plugged.host, plugged.notices = host.New(folder)
	reattached, err := host.Reattached()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(reattached)) {
		notice := "plugin " + name + " is one that runs already, by LORAKIT_REATTACH_PLUGINS: its files are not checked, " +
			"and its connection is not encrypted"
		if _, err := folder.Lookup(name); err != nil {
			notice = fmt.Sprintf("LORAKIT_REATTACH_PLUGINS: %v: it is not used", err)
		}
		plugged.notices = append(plugged.notices, notice)
	}
	for _, f := range plugged.host.Formats() {
		if err := formats.Default.Register(f); err != nil {
			return err
		}
	}
	for _, s := range plugged.host.Schemes() {
		if err := quant.Default.Register(s); err != nil {
			return err
		}
	}
	return nil
}

// LoadPlugins makes the formats and schemes of installed plugins known, as all functions here do that read or write,
// and says in a sentence each what is to be known of them: which are not used and why, and which run elsewhere.
func LoadPlugins() (notices []string, err error) {
	end, err := usePlugins(0)
	if err != nil {
		return nil, err
	}
	end()
	return plugged.notices, nil
}
