package host

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/hashicorp/go-plugin"
	goplugin "github.com/hashicorp/go-plugin/runner"

	"github.com/lorakit/lorakit/plugins/wire"
)

// reattachName is the variable that says where plugins run that somebody else has started, such as a debugger.
const reattachName = "LORAKIT_REATTACH_PLUGINS"

// Reattached lists the plugins that somebody else has started, by their names.
func Reattached() (map[string]Address, error) {
	text := os.Getenv(reattachName)
	if text == "" {
		return nil, nil
	}
	var list map[string]Address
	if err := json.Unmarshal([]byte(text), &list, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf(
			`%s: found %q, expected {"NAME": {"protocol": 1, "pid": N, "network": "unix", "address": PATH}}: %w`, reattachName,
			text, err)
	}
	return list, nil
}

// Address is where a plugin runs.
type Address struct {
	Protocol int    `json:"protocol"`
	PID      int    `json:"pid"`
	Network  string `json:"network"`
	Address  string `json:"address"`
}

// reattached finds a plugin that somebody else has started, nil where there is none.
func reattached(name string) (*plugin.ReattachConfig, error) {
	list, err := Reattached()
	if err != nil {
		return nil, err
	}
	a, ok := list[name]
	if !ok {
		return nil, nil
	}
	if a.Protocol != wire.Protocol {
		return nil, &fault{fmt.Sprintf("plugin %s speaks protocol %d, this lorakit speaks %d", name, a.Protocol,
			wire.Protocol)}
	}
	var addr net.Addr
	switch a.Network {
	case "unix":
		addr, err = net.ResolveUnixAddr(a.Network, a.Address)
	case "tcp":
		addr, err = net.ResolveTCPAddr(a.Network, a.Address)
	default:
		err = fmt.Errorf("found the network %q, expected unix or tcp", a.Network)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: plugin %s: %w", reattachName, name, err)
	}
	return &plugin.ReattachConfig{
		Protocol: plugin.ProtocolGRPC, ProtocolVersion: a.Protocol, Pid: a.PID, Addr: addr, Test: true,
		ReattachFunc: func() (goplugin.AttachedRunner, error) { return attached{a.PID}, nil },
	}, nil
}

// attached is a process of somebody else, which is not killed.
type attached struct{ pid int }

func (a attached) Wait(ctx context.Context) error {
	for !gone(a.pid) && ctx.Err() == nil {
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}

func (attached) Kill(context.Context) error { return nil }
func (a attached) ID() string               { return fmt.Sprint(a.pid) }

func (attached) PluginToHost(network, address string) (string, string, error) {
	return network, address, nil
}
func (attached) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}
