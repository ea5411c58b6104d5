package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func mountSmallDisk(dir string) {
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=4m"); err != nil {
		os.Exit(77)
	}
}

// TestFullDisk runs out of space in the middle: one line that says so, and a stage that can be gone on with.
func TestFullDisk(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeBig(t, src)
	disk := t.TempDir()
	dst := filepath.Join(disk, "dst")
	// The disk is there for the child alone, and goes with it.
	c := command([]string{onSmallDisk + "=" + disk}, "convert", src, dst, "--quantize", "nf4", "--max-shard-size", "1.2MB",
		"--progress", "none")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := c.CombinedOutput()
	if c.ProcessState == nil || c.ProcessState.ExitCode() == 77 {
		t.Skipf("this system lets no test mount a small disk: %v", err)
	}
	require.Error(t, err)
	assert.Equal(t, exitFailed, c.ProcessState.ExitCode(), "%s", out)
	assert.Regexp(t,
		`^lorakit: .*no space left on device; [1-9]\d* of 6 shards are finished in .*dst\.partial; --resume goes on from there\n$`, string(out))
}
