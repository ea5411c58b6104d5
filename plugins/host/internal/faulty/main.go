//go:build unix

// Command faulty is a plugin for tests that does what a plugin must not. LORAKIT_PLUGIN_FAULT says what: CALL:FAULT, or
// sdk:CALL:FAULT to have it in a method of what package sdk serves. Without it, it does all that it should.
//
// It is a gRPC server of its own, with a handshake written by hand, since a stranger's plugin need not have the SDK.
// The services are those of the SDK, and between them and the connection stands what spoils the answers (see spoil.go).
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	pb "github.com/lorakit/lorakit/plugins/proto/lorakit/plugin/v1"
	"github.com/lorakit/lorakit/plugins/sdk"
	"github.com/lorakit/lorakit/plugins/wire"
)

// call and fault are what is to go wrong, and where: in a call, or at the start. via is the package that serves.
var via, call, fault = parse(os.Getenv("LORAKIT_PLUGIN_FAULT"))

func parse(text string) (via, call, fault string) {
	if rest, ok := strings.CutPrefix(text, "sdk:"); ok {
		via, text = "sdk", rest
	}
	call, fault, _ = strings.Cut(text, ":")
	return via, call, fault
}

func main() {
	if os.Getenv("LORAKIT_PLUGIN_CHILD") != "" {
		time.Sleep(time.Minute)
		return
	}
	if os.Getenv("LORAKIT_PLUGIN_PARENT") != "" {
		child("")
	}
	last := "the last words of faulty"
	fmt.Fprintf(os.Stderr, "the first words\n%s\n", last)
	plugin := sdk.Plugin{Name: "faulty", Version: "1.0.0", Deterministic: true,
		Formats: []sdk.Format{placed{}, streamed{}}, Schemes: []sdk.Scheme{scheme{}}}
	if via == "sdk" {
		if call == "start" {
			start(last)
		}
		sdk.Serve(plugin)
		return
	}
	os.Stdout = stdout()
	handshake := "1|1|unix|%s|grpc|"
	if call == "start" {
		handshake = start(last)
	}
	dir := os.Getenv("PLUGIN_UNIX_SOCKET_DIR")
	address := filepath.Join(dir, "s")
	if fault == "elsewhere" {
		dir, err := os.MkdirTemp("", "elsewhere")
		check(err)
		address = filepath.Join(dir, "s")
	}
	listener, err := net.Listen("unix", address)
	check(err)
	server := grpc.NewServer(grpc.ForceServerCodecV2(wire.Codec{}), grpc.MaxSendMsgSize(64<<20),
		grpc.UnaryInterceptor(spoilUnary), grpc.StreamInterceptor(spoilStream))
	sdk.Register(server, plugin)
	if call+":"+fault != "Shutdown:none" {
		server.RegisterService(&controller, nil)
	}
	fmt.Printf(handshake+"\n", address)
	check(server.Serve(listener))
}

// stdout is the standard output that the host has given. Package sdk has taken it when it was imported: it is the pipe
// that is written to.
func stdout() *os.File {
	for fd := uintptr(3); fd < 64; fd++ {
		var s unix.Stat_t
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		if err == nil && unix.Fstat(int(fd), &s) == nil && s.Mode&unix.S_IFMT == unix.S_IFIFO &&
			flags&unix.O_ACCMODE == unix.O_WRONLY {
			return os.NewFile(fd, "stdout")
		}
	}
	return os.Stdout
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// start does what goes wrong before the handshake, and returns the form of the handshake.
func start(last string) string {
	good := "1|1|unix|%s|grpc|"
	switch fault {
	case "line":
		fmt.Println("debug: loading")
	case "lines":
		for i := range 14 {
			fmt.Printf("line %d\n", i)
		}
	case "part":
		fmt.Print("no end of line")
		select {}
	case "garbage":
		os.Stdout.Write([]byte("\x00\xff\x1b[2J\x80|\x01|\n"))
	case "much":
		for {
			os.Stdout.Write(make([]byte, 1<<20))
		}
	case "closed":
		os.Stdout.Close()
		select {}
	case "newer":
		return "1|2|unix|%s|grpc|"
	case "netrpc":
		return "1|1|unix|%s|netrpc|"
	case "tcp":
		return "1|1|tcp|127.0.0.1:1|grpc|%.0s"
	case "short":
		return "1|1|%.0s"
	case "nobody":
		return "1|1|unix|%s-not-there|grpc|"
	case "child": // it holds stderr and stdout open, and does not end with its parent
		child("")
	case "childexit":
		child("")
		os.Exit(3)
	case "term":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	case "flood":
		line := []byte(strings.Repeat(strings.Repeat("x", 99)+"\n", 10_000))
		for range 100 {
			os.Stderr.Write(line)
		}
		fmt.Fprintln(os.Stderr, last)
		os.Exit(3)
	case "control":
		fmt.Fprint(os.Stderr, "\x1b[31mred\x07 \xff\xfe\n\n   \n")
		os.Exit(3)
	case "elsewhere", "slow":
	default:
		act(fault)
	}
	return good
}

// child starts a process that lives on.
func child(string) {
	self, err := os.Executable()
	check(err)
	c := exec.Command(self)
	c.Env = append(os.Environ(), "LORAKIT_PLUGIN_CHILD=1")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	check(c.Start())
}

// calls counts those of the kind that fails.
var calls atomic.Int64

// act ends the process, or hangs; later-… does so when some calls have gone well.
func act(fault string) {
	if rest, ok := strings.CutPrefix(fault, "later-"); ok {
		if calls.Add(1) <= 12 {
			return
		}
		if reached := os.Getenv("LORAKIT_PLUGIN_REACHED"); reached != "" {
			check(os.WriteFile(reached, nil, 0o666))
		}
		fault = rest
	}
	switch fault {
	case "exit":
		os.Exit(3)
	case "panic":
		panic("these are the last words of faulty")
	case "kill":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case "hang":
		select {}
	case "stop": // all of its threads
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		select {}
	}
}

// at is where a method of what the SDK serves begins.
func at(method string) error {
	if via != "sdk" || method != call {
		return nil
	}
	if fault == "error" {
		return fmt.Errorf("a disk of the plugin's is full\nand more")
	}
	act(fault)
	return nil
}

// spoilUnary spoils a call of one answer.
func spoilUnary(ctx context.Context, r any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	if !hit(info.FullMethod) {
		return h(ctx, r)
	}
	act(fault)
	answer, err := h(ctx, r)
	if err != nil {
		return answer, err
	}
	if d, ok := answer.(*pb.DescribeResponse); ok {
		spoilDescription(d)
	}
	list, err := spoil(0, answer)
	if err != nil {
		return nil, err
	}
	return list[0], nil
}

// spoilStream spoils a stream of answers.
func spoilStream(s any, stream grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	if !hit(info.FullMethod) {
		return h(s, stream)
	}
	act(fault)
	for fault == "empties" {
		if err := stream.SendMsg(&wire.Message{}); err != nil {
			return err
		}
	}
	spoiled := &spoiledStream{ServerStream: stream}
	if err := h(s, spoiled); err != nil {
		return err
	}
	list, err := spoil(-1, nil)
	if err != nil {
		return err
	}
	for _, m := range list {
		if err := stream.SendMsg(m); err != nil {
			return err
		}
	}
	return nil
}

// controller is go-plugin's service that ends the process.
var controller = grpc.ServiceDesc{
	ServiceName: "plugin.GRPCController", HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Shutdown", Handler: func(any, context.Context, func(any) error,
		grpc.UnaryServerInterceptor) (any, error) {
		if call == "Shutdown" {
			act(fault)
		}
		os.Exit(0)
		return nil, nil
	}}},
}

// hit reports whether a method is the one that goes wrong: SERVICE/METHOD where the name alone is that of two.
func hit(full string) bool {
	full = strings.TrimPrefix(full, "/lorakit.plugin.v1.")
	_, method, _ := strings.Cut(full, "/")
	return via == "" && (call == method || call == full)
}

type spoiledStream struct {
	grpc.ServerStream
	n int
}

// SendMsg sends what a message is spoiled to.
func (s *spoiledStream) SendMsg(m any) error {
	list, err := spoil(s.n, m)
	s.n++
	if err != nil {
		return err
	}
	for _, m := range list {
		if err := s.ServerStream.SendMsg(m); err != nil {
			return err
		}
	}
	return nil
}
