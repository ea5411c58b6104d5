"""Runs a command and prints its wall, user and system time in seconds, its peak memory in bytes and its exit status as JSON. A process
of its own, and a small one: a child's peak starts at its parent's size. Usage: measure.py COMMAND..."""
import json
import os
import sys
import time

start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"seconds": seconds, "user": usage.ru_utime, "system": usage.ru_stime, "peak": usage.ru_maxrss * unit, "status": os.waitstatus_to_exitcode(status)}))
