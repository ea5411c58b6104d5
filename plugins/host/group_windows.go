package host

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"unsafe"

	"golang.org/x/sys/windows"
)

// canPass reports that a process cannot be given more descriptors than three.
const canPass = false

// group is the job object of a plugin: the process and all that it starts. It ends with this process.
type group struct{ job windows.Handle }

func (g *group) prepare(*exec.Cmd) {}

// start starts the process in a job of its own.
func (g *group) start(cmd *exec.Cmd) error {
	job, err := windows.CreateJobObject(nil, nil)
	if err != nil {
		return err
	}
	var limits windows.JOBOBJECT_EXTENDED_LIMIT_INFORMATION
	limits.BasicLimitInformation.LimitFlags = windows.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
	_, err = windows.SetInformationJobObject(job, windows.JobObjectExtendedLimitInformation,
		uintptr(unsafe.Pointer(&limits)), uint32(unsafe.Sizeof(limits)))
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		windows.CloseHandle(job)
		return err
	}
	process, err := windows.OpenProcess(windows.PROCESS_SET_QUOTA|windows.PROCESS_TERMINATE, false,
		uint32(cmd.Process.Pid))
	if err == nil {
		err = windows.AssignProcessToJobObject(job, process)
		windows.CloseHandle(process)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		windows.CloseHandle(job)
		return err
	}
	g.job = job
	return nil
}

// watch does nothing: the job ends with this process.
func (g *group) watch(*exec.Cmd, string) {}

// kill ends all processes of the job.
func (g *group) kill(*exec.Cmd) {
	if g.job != 0 {
		_ = windows.TerminateJobObject(g.job, 1)
	}
}

// end gives up the job.
func (g *group) end() {
	windows.CloseHandle(g.job)
	g.job = 0
}

// checkAddress makes sure that the plugin listens on this machine.
func checkAddress(network, address, _ string) error {
	host, _, err := net.SplitHostPort(address)
	if network != "tcp" || err != nil || !net.ParseIP(host).IsLoopback() {
		return fmt.Errorf("%w: found %s %q, expected an address of this machine", errAddress, network, address)
	}
	return nil
}

// peakMemory is not known here.
func peakMemory(*os.ProcessState) int64 { return 0 }

// gone reports whether a process that was started by somebody else has ended.
func gone(pid int) bool {
	p, err := windows.OpenProcess(windows.SYNCHRONIZE, false, uint32(pid))
	if err != nil {
		return true
	}
	defer windows.CloseHandle(p)
	event, err := windows.WaitForSingleObject(p, 0)
	return err == nil && event == windows.WAIT_OBJECT_0
}
