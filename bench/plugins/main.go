//go:build unix

// Command plugins measures what goes over the connection to a plugin. Usage: plugins SERVED
//
// It prints a name and a number a line: GB/s and seconds of processor time a GB, of this process and of the plugin, for
// reading and writing with and without mutual TLS, beside a copy over a plain socket; and how long a plugin takes to
// start, the median of 20.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/lorakit/lorakit/formats"
	"github.com/lorakit/lorakit/plugins/host"
	"github.com/lorakit/lorakit/plugins/lock"
	"github.com/lorakit/lorakit/storage"
	"github.com/lorakit/lorakit/tensor"
)

const total = 1 << 30

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(program string) error {
	dir, err := os.MkdirTemp("", "plugins")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "x.served")
	if err := os.WriteFile(file, make([]byte, total), 0o600); err != nil {
		return err
	}
	if err := socket(); err != nil {
		return err
	}
	for _, mtls := range []bool{false, true} {
		folder, err := lock.Open(filepath.Join(dir, fmt.Sprint("plugins-", mtls)), lock.Taken{})
		if err != nil {
			return err
		}
		if _, err := folder.Install(context.Background(), program, host.Describe,
			lock.InstallOptions{NoMTLS: !mtls}); err != nil {
			return err
		}
		kind := "plain"
		if mtls {
			kind = "mtls"
		}
		if err := starts(folder, file, kind); err != nil {
			return err
		}
		for _, way := range []struct {
			name string
			run  func(formats.Format, string) error
		}{{"read", read}, {"write", write}} {
			if err := measure(folder, file, way.name+"_"+kind, way.run); err != nil {
				return err
			}
		}
	}
	return nil
}

// cpu is the processor time of this process, or of children that have ended.
func cpu(who int) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(who, &u); err != nil {
		panic(err) // who is one of the two
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// rusageChildren is RUSAGE_CHILDREN.
const rusageChildren = -1

// socket copies over a plain socket.
func socket() error {
	l, err := net.Listen("unix", filepath.Join(os.TempDir(), fmt.Sprintf("plugins-%d.sock", os.Getpid())))
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			return // the reader finds the end
		}
		defer c.Close()
		b := make([]byte, 1<<20)
		for range total / len(b) {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	start, before, b, n := time.Now(), cpu(syscall.RUSAGE_SELF), make([]byte, 1<<20), 0
	for n < total {
		k, err := c.Read(b)
		if err != nil {
			return err
		}
		n += k
	}
	fmt.Printf("socket_gbps %.3f\nsocket_cpu %.3f\n", gb/time.Since(start).Seconds(),
		(cpu(syscall.RUSAGE_SELF)-before)/gb)
	return nil
}

// gb is how much goes over.
const gb = total / 1e9

// measure measures one way.
func measure(folder *lock.Folder, file, name string, way func(formats.Format, string) error) error {
	h, _ := host.New(folder)
	children := cpu(rusageChildren)
	end := h.Begin(256 << 20)
	defer end()
	f := h.Formats()[0]
	if err := way(f, ""); err != nil { // to start the plugin
		return err
	}
	start, self := time.Now(), cpu(syscall.RUSAGE_SELF)
	if err := way(f, file); err != nil {
		return err
	}
	seconds := time.Since(start).Seconds()
	self = cpu(syscall.RUSAGE_SELF) - self
	end()
	fmt.Printf("%s_gbps %.3f\n%s_host_cpu %.3f\n%s_plugin_cpu %.3f\n", name, gb/seconds, name, self/gb, name,
		(cpu(rusageChildren)-children)/gb)
	return nil
}

// read reads all of a file, as a copy of a tensor does.
func read(f formats.Format, file string) error {
	if file == "" {
		_, err := f.Layout(context.Background(), nil, formats.Options{})
		return err
	}
	dir, name, err := storage.Resolve(file, storage.Options{})
	if err != nil {
		return err
	}
	c, err := f.Open(context.Background(), dir, name)
	if err != nil {
		return err
	}
	defer c.Close()
	t := c.Tensors()[0]
	const piece = 16 << 20
	for off := int64(0); off < t.Bytes; off += piece {
		n := min(piece, t.Bytes-off)
		err := t.Data.(formats.RangeReader).ReadRange(t.Offset+off, n, func([]byte, int64) error { return nil })
		if err != nil {
			return err
		}
	}
	return nil
}

// write writes a tensor of the same size.
func write(f formats.Format, file string) error {
	size := int64(0)
	if file != "" {
		size = total
	}
	infos := []tensor.Info{{Name: "x", DType: tensor.U8, Shape: tensor.Shape{size}}}
	w, err := f.(formats.Streamer).Create(context.Background(), "nowhere", infos, nil)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(b)) {
		if err := w.Write(0, off, b); err != nil {
			return err
		}
	}
	_, err = w.Finish(context.Background())
	return err
}

// starts measures the time from nothing to the first answer.
func starts(folder *lock.Folder, file, kind string) error {
	var times []float64
	for range 20 {
		h, _ := host.New(folder)
		end := h.Begin(0)
		dir, name, err := storage.Resolve(file, storage.Options{})
		if err != nil {
			return err
		}
		start := time.Now()
		c, err := h.Formats()[0].Open(context.Background(), dir, name)
		if err != nil {
			return err
		}
		times = append(times, time.Since(start).Seconds()*1e3)
		c.Close()
		end()
	}
	slices.Sort(times)
	fmt.Printf("start_%s_ms %.1f\n", kind, (times[9]+times[10])/2)
	return nil
}
