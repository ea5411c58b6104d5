"""The programs in README.md: `python3 -m tests.readme FOLDER` writes the plugin that its longer ones are together."""

import json
import os
import re
import sys

README = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")


def programs():
    """Returns the first example, and the others, which build on each other, as one program."""
    with open(README, encoding="utf-8") as file:
        first, *others = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    return first, "\n\n".join(others)


def main(folder):
    command = {"name": "trio", "command": ["python3", "-I", "main.py"], "start_seconds": 20, "mtls": False}
    with open(os.path.join(folder, "plugin.json"), "x") as file:
        json.dump(command, file)
    path = "import os, sys\nsys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))\n"
    with open(os.path.join(folder, "main.py"), "x", encoding="utf-8") as file:
        file.write(path + programs()[1])


if __name__ == "__main__":
    main(sys.argv[1])
