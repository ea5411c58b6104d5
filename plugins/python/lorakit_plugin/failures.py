"""Says in one line what has failed in a plugin, and where: lorakit shows its user no more than a line."""

import os
import sys
import sysconfig
import traceback
from types import TracebackType

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = tuple({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")})

# Python knows a program by the path it was started with.
_START = os.getcwd()

# What lorakit shows of a failure is shorter than a status may be, and the place must not be lost.
_MOST = 350


def described(error: BaseException) -> str:
    """Returns the kind of an exception, its text, and where the plugin's own code has raised it or called what did."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    line = " ".join(str(text).split())
    if len(line) > _MOST:
        line = line[:_MOST] + " ..."
    line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    place = _place(error)
    return f"{line} ({place})" if place else line


def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an exception that ends the process: the last line is what lorakit shows."""
    traceback.print_exception(kind, error, trace)
    if _place(error):
        print(described(error), file=sys.stderr)


def _place(error: BaseException) -> str:
    """Returns the innermost frame in a file of the plugin, or where its syntax is wrong. A plugin that was installed as
    a package has none: then it is the innermost in any package."""
    if isinstance(error, SyntaxError) and error.filename and _is_authors(error.filename):
        return f"{_shown(error.filename)}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_authors(frame.filename)]
    frames = [frame for frame in frames if not _is_installed(frame.filename)] or frames
    return f"{_shown(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _is_authors(path: str) -> bool:
    """Tells whether a file is there and is neither this package's nor Python's own."""
    path = os.path.join(_START, path)
    if not os.path.isfile(path) or os.path.dirname(path) == _PACKAGE:
        return False
    return _is_installed(path) or not os.path.realpath(path).startswith(_LIBRARY)


def _is_installed(path: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(path.split(os.sep))


def _shown(path: str) -> str:
    """Returns a path as seen from the main program, its base name where it lies elsewhere."""
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    folder = os.path.dirname(os.path.join(_START, main)) + os.sep
    path = os.path.join(_START, path)
    return path.removeprefix(folder).replace(os.sep, "/") if path.startswith(folder) else os.path.basename(path)
