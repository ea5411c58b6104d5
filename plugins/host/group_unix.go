//go:build unix

package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
)

// canPass reports that a process can be given more descriptors than three.
const canPass = true

// group is the process group of a plugin: the process and all that it starts.
type group struct {
	done  chan struct{}
	guard *exec.Cmd // nil where there is no shell
	pipe  *os.File  // is at its end, for the guard, when this process is gone
}

func (g *group) prepare(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	dieWithHost(cmd.SysProcAttr)
	g.done = make(chan struct{})
}

// start starts the process from a thread that lives as long as the process may: Linux kills the child when the thread
// that has started it ends, not the process.
func (g *group) start(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			<-g.done
		}
		runtime.UnlockOSThread()
	}()
	return <-started
}

// watch starts a guard, which ends all processes of the group, and removes a folder, when this process is gone: what
// the kernel kills is the plugin alone, before it can see to its children.
func (g *group) watch(cmd *exec.Cmd, dir string) {
	end, pipe, err := os.Pipe()
	if err != nil {
		return // the plugin sees to itself
	}
	defer end.Close()
	const script = `read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2"`
	guard := exec.Command("/bin/sh", "-c", script, "sh", strconv.Itoa(cmd.Process.Pid), dir)
	guard.Stdin, guard.Dir, guard.Env = end, "/", []string{"PATH=/usr/bin:/bin"}
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is not for it
	if guard.Start() != nil {
		pipe.Close()
		return
	}
	g.guard, g.pipe = guard, pipe
}

// kill ends all processes of the group.
func (g *group) kill(cmd *exec.Cmd) {
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it may be gone
	}
}

// end gives up what start and watch have taken, once the process is gone.
func (g *group) end() {
	if g.guard != nil {
		_ = g.guard.Process.Kill() // before its pipe ends, so that it does nothing
		_ = g.guard.Wait()
		g.pipe.Close()
	}
	close(g.done)
}

// checkAddress makes sure that the socket is in the folder that only this user can enter.
func checkAddress(network, address, dir string) error {
	if network != "unix" || filepath.Dir(address) != filepath.Clean(dir) {
		return fmt.Errorf("%w: found %s %q, expected a socket in %s", errAddress, network, address, dir)
	}
	info, err := os.Lstat(address)
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%w: %s is no socket", errAddress, address)
	}
	return nil
}

// peakMemory is the most memory that the process has used, in bytes.
func peakMemory(state *os.ProcessState) int64 {
	usage, ok := state.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0
	}
	return int64(usage.Maxrss) * maxrssUnit
}

// gone reports whether a process that was started by somebody else has ended.
func gone(pid int) bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }
