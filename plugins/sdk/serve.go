package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/wire"
)

// Plugin is what a program serves.
type Plugin struct {
	Name    string // lower-case letters, digits and dashes
	Version string // such as 1.0.0
	Formats []Format
	Schemes []Scheme
	// Deterministic promises that the same input makes the same bytes.
	Deterministic bool
}

// Serve serves a plugin until lorakit is done with it, and ends the process. Started by hand it says what to do; with
// LORAKIT_PLUGIN_DEBUG=1 in the environment it waits for a lorakit that is told of it by LORAKIT_REATTACH_PLUGINS,
// which it prints, so that it can be run in a debugger.
func Serve(p Plugin) {
	config := &plugin.ServeConfig{
		HandshakeConfig:  wire.Handshake,
		VersionedPlugins: map[int]plugin.PluginSet{wire.Protocol: {"lorakit": server{Plugin: p}}},
		GRPCServer:       newServer,
		Logger:           hclog.NewNullLogger(),
	}
	switch {
	case handshake != nil:
		os.Stdout = handshake
		go endWithHost()
	case os.Getenv("LORAKIT_PLUGIN_DEBUG") != "":
		stop, cancel := context.WithCancel(context.Background())
		defer cancel()
		reattach := make(chan *plugin.ReattachConfig, 1)
		config.Test = &plugin.ServeTestConfig{Context: stop, ReattachConfigCh: reattach}
		go announce(p.Name, reattach)
	default:
		fmt.Fprintf(os.Stderr, "%s is a plugin of lorakit: lorakit plugin install %s\n", p.Name, os.Args[0])
		os.Exit(1)
	}
	plugin.Serve(config)
	os.Exit(0)
}

// announce prints how a lorakit finds this process.
func announce(name string, reattach <-chan *plugin.ReattachConfig) {
	r := <-reattach
	type address struct {
		Protocol int    `json:"protocol"`
		PID      int    `json:"pid"`
		Network  string `json:"network"`
		Address  string `json:"address"`
	}
	b, err := json.Marshal(map[string]address{name: {wire.Protocol, r.Pid, r.Addr.Network(), r.Addr.String()}})
	if err != nil {
		panic(err) // it is made of strings and numbers
	}
	fmt.Printf("LORAKIT_REATTACH_PLUGINS='%s'\n", b)
}

// newServer makes the gRPC server.
func newServer(o []grpc.ServerOption) *grpc.Server {
	stderr, first := os.Stderr, sync.Once{}
	// go-plugin sends what is written to os.Stderr by a call of its own, so that the last words before a crash are lost.
	keep := func() { first.Do(func() { os.Stderr = stderr }) }
	// The last line on stderr is what lorakit shows of a crash: what has happened, not the end of a trace.
	crash := func() {
		if r := recover(); r != nil {
			fmt.Fprintf(os.Stderr, "%s\npanic: %v\n", debug.Stack(), r)
			os.Exit(2)
		}
	}
	return grpc.NewServer(append(o,
		grpc.ForceServerCodecV2(wire.Codec{}),
		grpc.MaxRecvMsgSize(wire.MaxMessage), grpc.MaxSendMsgSize(wire.MaxMessage),
		grpc.InitialWindowSize(wire.StreamWindow), grpc.InitialConnWindowSize(wire.ConnectionWindow),
		grpc.ReadBufferSize(128<<10), grpc.WriteBufferSize(128<<10),
		grpc.UnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			defer crash()
			keep()
			return h(ctx, r)
		}),
		grpc.StreamInterceptor(func(s any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			defer crash()
			keep()
			return h(s, stream)
		}))...)
}

// endWithHost ends the process when the host is gone: an orphan would hold files and memory for ever.
func endWithHost() {
	if n, err := strconv.Atoi(os.Getenv(wire.HostFD)); err == nil && n > 2 {
		pipe := os.NewFile(uintptr(n), "host")
		if _, err := io.Copy(io.Discard, pipe); err == nil {
			os.Exit(0)
		}
	}
	for parent := os.Getppid(); os.Getppid() == parent; {
		time.Sleep(500 * time.Millisecond)
	}
	os.Exit(0)
}

// server is the plugin as go-plugin has it.
type server struct {
	plugin.NetRPCUnsupportedPlugin
	Plugin
}

// GRPCServer registers the services.
func (s server) GRPCServer(_ *plugin.GRPCBroker, g *grpc.Server) error {
	Register(g, s.Plugin)
	return nil
}

// GRPCClient is for a host, which has its own.
func (server) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("this is the side of the plugin")
}

// Register registers the services of a plugin with a server, which must have the codec of package wire. Serve does so;
// a test may serve a plugin in its own process.
func Register(g *grpc.Server, p Plugin) {
	pb.RegisterPluginServiceServer(g, &pluginServer{plugin: p})
	pb.RegisterFormatServiceServer(g, newFormatServer(p.Formats))
	pb.RegisterSchemeServiceServer(g, newSchemeServer(p.Schemes))
}

// pluginServer says what there is.
type pluginServer struct {
	pb.UnimplementedPluginServiceServer
	plugin Plugin
}

// Describe lists the formats and schemes, with what they can do by the interfaces that they have.
func (s *pluginServer) Describe(context.Context, *pb.DescribeRequest) (*pb.DescribeResponse, error) {
	p := s.plugin
	r := &pb.DescribeResponse{Name: p.Name, Version: p.Version, Protocol: wire.Protocol}
	can := func(capability string) {
		if !slices.Contains(r.Capabilities, capability) {
			r.Capabilities = append(r.Capabilities, capability)
		}
	}
	for _, f := range p.Formats {
		can(wire.Read)
		can(wire.Extents)
		i := f.Info()
		x := &pb.FormatInfo{Name: i.Name, Extensions: i.Extensions, FileNames: i.FileNames, Written: i.Written,
			Write: pb.WriteMode_WRITE_MODE_NONE}
		for _, m := range i.Magic {
			x.Magic = append(x.Magic, &pb.Magic{Offset: m.Offset, Bytes: m.Bytes})
		}
		for _, d := range i.DTypes {
			x.Dtypes = append(x.Dtypes, d.String())
		}
		if _, ok := f.(Streamer); ok {
			x.Write = pb.WriteMode_WRITE_MODE_STREAM
			can(wire.WriteStream)
		}
		if _, ok := f.(Layouter); ok {
			x.Write = pb.WriteMode_WRITE_MODE_LAYOUT
			can(wire.WriteLayout)
		}
		r.Formats = append(r.Formats, x)
	}
	for _, c := range p.Schemes {
		can(wire.SchemeDecode)
		if _, ok := c.(EncodingScheme); ok {
			can(wire.SchemeEncode)
		}
		i := c.Info()
		r.Schemes = append(r.Schemes, &pb.SchemeInfo{Name: i.Name, Types: i.Types, Parameters: i.Parameters,
			Suffixes: i.Suffixes, Notices: i.Notices})
	}
	if p.Deterministic {
		can(wire.Deterministic)
	}
	return r, nil
}
