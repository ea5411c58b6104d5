"""What a plugin of lorakit in Python is made of: derive from Format or Scheme, and call serve.

Import this package before all others. When lorakit has started the process, the import keeps standard output for the
handshake: what any package prints after it goes to standard error, which lorakit shows."""

import sys

from . import failures, stdio

stdio.keep()
if stdio.started_by_lorakit():
    sys.excepthook = failures.show

from .errors import Limit, Malformed, NonFinite, Unsupported
from .formats import Checksum, Container, Extra, Format, Layout, LayoutOptions, Shard, Writer
from .layouts import lay_out
from .schemes import Carried, Checkpoint, Decoder, Encoder, Part, Rule, Scheme, Spec
from .serving import serve
from .tensors import CHUNK, Stored, Tensor

__all__ = [
    "CHUNK",
    "Carried",
    "Checkpoint",
    "Checksum",
    "Container",
    "Decoder",
    "Encoder",
    "Extra",
    "Format",
    "Layout",
    "LayoutOptions",
    "Limit",
    "Malformed",
    "NonFinite",
    "Part",
    "Rule",
    "Scheme",
    "Shard",
    "Spec",
    "Stored",
    "Tensor",
    "Unsupported",
    "Writer",
    "lay_out",
    "serve",
]
