// Package kittest makes the checks of package kit in the tests of a plugin:
//
//	func TestPlugin(t *testing.T) { kittest.TestPlugin(t, sdk.Plugin{Name: "raw", …}) }
//
// That one runs the plugin in the process of the test, where a debugger and the race detector see it. Test has the
// whole: it installs a program, or a folder with a plugin.json, and runs it as lorakit does.
package kittest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/kit"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/plugins/wire"
)

// Test installs the plugin at a path, in a folder of its own, and makes all checks.
func Test(t *testing.T, path string) {
	t.Helper()
	report(t, Run(t, path))
}

// Run is Test, and returns what the checks have found.
func Run(t *testing.T, path string, only ...string) *kit.Report {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "plugins")
	folder, err := lock.Open(dir, lock.BuiltIn())
	if err != nil {
		t.Fatal(err)
	}
	p, err := folder.Install(t.Context(), path, host.Describe, lock.InstallOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := kit.Installed(folder, p)
	s.Only = only
	r, err := kit.Run(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestPlugin serves a plugin in this process, and makes the checks that need no other.
func TestPlugin(t *testing.T, p sdk.Plugin) {
	t.Helper()
	report(t, RunPlugin(t, p))
}

// RunPlugin is TestPlugin, and returns what the checks have found.
func RunPlugin(t *testing.T, p sdk.Plugin, only ...string) *kit.Report {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.ForceServerCodecV2(wire.Codec{}),
		grpc.MaxRecvMsgSize(wire.MaxMessage), grpc.MaxSendMsgSize(wire.MaxMessage))
	sdk.Register(server, p)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	probe, err := host.NewConnectedProbe(t.Context(), p.Name, func(o ...grpc.DialOption) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///plugin", append(o, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return listener.DialContext(ctx)
			}))...)
	})
	if err != nil {
		t.Fatal(err)
	}
	s := kit.Subject{Name: p.Name, Formats: probe.Formats(), Schemes: probe.Schemes(), Plugin: probe, Only: only}
	for _, name := range []string{"testdata", "samples"} { // beside the test, as in a package
		if _, err := os.Stat(name); err == nil {
			s.Samples = name
			break
		}
	}
	r, err := kit.Run(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// report makes a test of each check.
func report(t *testing.T, r *kit.Report) {
	t.Helper()
	for _, c := range r.Checks {
		t.Run(c.ID, func(t *testing.T) {
			switch c.Status {
			case kit.Failed:
				t.Errorf("%s\n%s", c.Detail, c.Advice)
			case kit.Skipped:
				t.Skip(c.Detail)
			default:
				t.Log(c.Detail)
			}
		})
	}
}
