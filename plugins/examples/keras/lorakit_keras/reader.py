"""The process that reads the headers of HDF5 files, see headers.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

from lorakit_plugin import Malformed

from .source import Source

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "headers.py")

# lorakit waits for half a minute. Ten thousand tensors take one second or two.
SECONDS = 20


class Reader:
    """Asks the process, one file at a time. It is started when it is needed, and anew when a file has been too much for
    it."""

    def __init__(self, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._connection: socket.socket | None = None

    def ask(self, source: Source) -> dict:
        """Returns what the program answers of a file."""
        with self._lock:
            self._start()
            request = json.dumps([source.start, source.size]).encode()
            try:
                socket.send_fds(self._connection, [request], [source.fileno()])
                return self._answer()
            except TimeoutError:
                self._stop()
                raise Malformed(f"HDF5 has not come to an end of the headers in {self._seconds + 5} s") from None
            except (EOFError, ConnectionError):
                code = self._stop()
                if code == -signal.SIGXCPU:
                    raise Malformed("HDF5 comes to no end of the headers") from None
                raise Malformed(f"HDF5 has failed over the headers (exit status {code})") from None

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-B", PROGRAM, str(theirs.fileno()), str(self._seconds)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        ours.settimeout(self._seconds + 5)
        self._connection = ours

    def _answer(self) -> dict:
        pieces = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            piece = self._connection.recv(1 << 20)
            if not piece:
                raise EOFError
            pieces.append(piece)
        return json.loads(b"".join(pieces))

    def _stop(self) -> int | None:
        """Ends the process, and returns how it has ended."""
        if self._process is None:
            return None
        self._connection.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        self._process = None
        return code
