"""Runs lorakit."""
import os
import subprocess
import tempfile

import torch

FIXTURES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "fixtures")


class Failure(Exception):
    """A check that did not hold; its text says what was found and what was expected."""


class Lorakit:
    def __init__(self, binary, work):
        self.binary, self.work = binary, work
        self.written = []  # every destination, for the checks that open them all

    def convert(self, source, *flags, suffix=""):
        """Converts into a new destination and returns its path."""
        destination = os.path.join(tempfile.mkdtemp(dir=self.work), "out" + suffix)
        argv = [self.binary, "convert", source, destination, "--progress", "none", *flags]
        run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        if run.returncode:
            raise Failure(f"lorakit {' '.join(argv[1:])}: exit {run.returncode}: {run.stderr.strip()[-300:]}")
        self.written.append(destination)
        return destination


def same(got, want, what, tolerant=()):
    """Fails unless both dicts have the same tensors, value for value (so -0 is +0); names that end in one of tolerant
    are not compared but for dtype."""
    if set(got) != set(want):
        odd = sorted(set(got) ^ set(want))
        raise Failure(f"{what}: {len(set(want) - set(got))} tensors missing, {len(set(got) - set(want))} too many: {odd[:3]}")
    for name, w in want.items():
        g = got[name]
        if g.dtype != w.dtype:
            raise Failure(f"{what}: {name} is {g.dtype}, not {w.dtype}")
        if name.endswith(tuple(tolerant)) and tolerant:
            continue
        if g.shape != w.shape or not torch.equal(g, w):
            count = int((g != w).sum()) if g.shape == w.shape else f"shape {list(g.shape)}, not {list(w.shape)}:"
            raise Failure(f"{what}: {name}: {count} of {w.numel()} values differ")
