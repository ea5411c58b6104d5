"""What the field's own libraries make of lorakit's output. Usage: run.py LORAKIT [NAME...], where NAME picks the
checks that have it in their name. One line a check, the figure last; exit 1 if one failed."""
import os
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "fixtures", "generate")]

import peers  # noqa: F401  (sets the libraries up before anything else imports them)

import adapters
import architectures
import attach
import dialects
import encoders
import files
import gguf_lora
import gguf_real
import gguf_tiny
import others
import plain
import plugins
import pytorch
import quantized
import real
import schemes
import steps
from command import Failure, Lorakit


def main(binary, wanted):
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="lorakit-interop-") as work:
        lorakit = Lorakit(binary, work)
        # files is last: it opens every file that the checks before it had written
        for module in (quantized, plain, real, schemes, adapters, architectures, attach, dialects, encoders, others, pytorch, plugins, steps,
                       gguf_tiny, gguf_real, gguf_lora, files):
            for name, check in module.checks(lorakit):
                if wanted and not any(w in name for w in wanted):
                    continue
                start = time.monotonic()
                try:
                    said, word = check(), "ok  "
                    passed += 1
                except Exception as error:  # a library that refuses a file raises whatever it likes
                    said, word = f"{'' if isinstance(error, Failure) else type(error).__name__ + ': '}{' '.join(str(error).split())[:300]}", "FAIL"
                    failed += 1
                print(f"{word} {name}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1]), sys.argv[2:]))
