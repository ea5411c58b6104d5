"""Keeps standard output for the handshake with lorakit, and standard input from being read."""

import os
import sys

COOKIE = ("LORAKIT_PLUGIN_COOKIE", "lorakit.plugin.v1")
HOST_FD = "LORAKIT_PLUGIN_HOST_FD"

_handshake: int | None = None


def started_by_lorakit() -> bool:
    return os.environ.get(COOKIE[0]) == COOKIE[1]


def keep() -> None:
    """Puts standard output aside and lets everything that is written to it go to standard error. A process that
    lorakit has not started, such as a test of a plugin, keeps what it has."""
    global _handshake
    if _handshake is not None or not started_by_lorakit():
        return
    _handshake = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    # Standard input is the user's terminal, which is lorakit's to read.
    if os.environ.get(HOST_FD) != "0":
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)


def handshake(line: str) -> None:
    """Writes the one line that lorakit waits for. The descriptor stays open: its end would say that we have left."""
    os.write(1 if _handshake is None else _handshake, line.encode() + b"\n")
