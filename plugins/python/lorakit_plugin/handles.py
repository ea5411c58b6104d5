"""Numbers by which the host knows what is open."""

import itertools
import threading
from contextlib import contextmanager

from .statuses import Misuse


class Handle:
    """Something open, closed when it has been given up and its last user is done."""

    def __init__(self, value, close):
        self.value = value
        self._close = close
        self._users = 1
        self._lock = threading.Lock()

    def enter(self) -> bool:
        with self._lock:
            if self._users == 0:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last and self._close is not None:
            self._close()


class Handles:
    """What is open of one kind. A number is never given twice."""

    def __init__(self, numbers: itertools.count):
        self._numbers = numbers
        self._handles: dict[int, Handle] = {}
        self._lock = threading.Lock()

    def add(self, value, close=None) -> int:
        with self._lock:
            number = next(self._numbers)
            self._handles[number] = Handle(value, close)
        return number

    @contextmanager
    def use(self, number: int):
        with self._lock:
            handle = self._handles.get(number)
            if handle is None or not handle.enter():
                raise Misuse(f"found handle {number}, which is not open")
        try:
            yield handle.value
        finally:
            handle.leave()

    def remove(self, number: int) -> bool:
        with self._lock:
            handle = self._handles.pop(number, None)
        if handle is None:
            return False
        handle.leave()
        return True
