"""The plugin keras of lorakit. Python is started with -I, so by itself it looks for no modules beside this file."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import lorakit_plugin  # noqa: E402, before all that may print

from lorakit_keras import Keras  # noqa: E402

lorakit_plugin.serve("keras", "1.0.0", Keras(), deterministic=True)
