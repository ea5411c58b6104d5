"""The one line that is left of a failure."""

import os
import tempfile
import unittest

from lorakit_plugin.failures import described


class Failures(unittest.TestCase):
    def test_a_plugin_that_is_a_package(self):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "site-packages"))
            path = os.path.join(folder, "site-packages", "theirs.py")
            with open(path, "w") as file:
                file.write("def f():\n    int('x')\n\nf()\n")
            with open(path) as file:
                code = compile(file.read(), path, "exec")
            try:
                exec(code)
            except ValueError as error:
                self.assertRegex(described(error), r"'x' \(test_failures.py:\d+ in test_a_plugin_that_is_a_package\)$")
                error = error.with_traceback(error.__traceback__.tb_next)
                self.assertRegex(described(error), r"'x' \(theirs.py:2 in f\)$")

    def test_without_a_place(self):
        self.assertEqual("ValueError: a b", described(ValueError("a\n b")))
        self.assertEqual("SystemExit", described(SystemExit()))
