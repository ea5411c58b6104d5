"""A plugin that prints where it must not, before and after its import and in a call."""

import os
import sys

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import lorakit_plugin  # noqa: E402

print("a line of an import")
os.system("echo a line of a child")

from tests.examples import Given  # noqa: E402

lorakit_plugin.serve("loud", "1.0.0", Given())
