package host

import "syscall"

// maxrssUnit is what the kernel counts memory in.
const maxrssUnit = 1 << 10

// dieWithHost has the kernel end the process when this one is gone.
func dieWithHost(a *syscall.SysProcAttr) { a.Pdeathsig = syscall.SIGKILL }
