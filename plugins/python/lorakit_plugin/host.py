"""Leaves when the host is gone, however it went."""

import os
import threading
import time
from collections.abc import Callable

from .stdio import HOST_FD


def watch(leave: Callable[[], None]) -> None:
    """Starts a thread that calls leave, which ends the process, when the host ends. The host holds the writing end of a
    pipe open, whose reading end we have inherited, and writes nothing; without one the number of our parent is looked
    at."""
    parent = os.getppid()
    threading.Thread(target=_watch, args=(os.environ.get(HOST_FD, ""), parent, leave), daemon=True).start()


def _watch(number: str, parent: int, leave: Callable[[], None]) -> None:
    if number.isdecimal():
        try:
            os.set_inheritable(int(number), False)
            while os.read(int(number), 1):
                pass
            return leave()
        except OSError:
            pass  # it is no pipe
    while os.getppid() == parent:
        time.sleep(0.5)
    leave()
