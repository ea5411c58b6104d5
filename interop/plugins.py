"""The example plugins as their users have them: built or copied, installed, held to the conformance kit, and a model
converted to NF4 and back."""
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile

from command import FIXTURES, Failure

ROOT = os.path.dirname(FIXTURES)
EXAMPLES = os.path.join(ROOT, "plugins", "examples")


class Plugins:
    """A folder of plugins of its own."""

    def __init__(self, lorakit):
        self.lorakit, self.installed = lorakit, set()
        self.dir = os.path.join(tempfile.mkdtemp(dir=lorakit.work), "plugins")
        # The interpreter of a plugin is the python3 of PATH: here the one that has its packages.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        self.environment = {**os.environ, "LORAKIT_PLUGIN_DIR": self.dir, "PATH": path}

    def run(self, *argv, expect=(0,)):
        run = subprocess.run([self.lorakit.binary, *argv], capture_output=True, text=True, timeout=300, env=self.environment)
        if run.returncode not in expect:
            raise Failure(f"lorakit {' '.join(argv)}: exit {run.returncode}: {run.stdout.strip()[-200:]} {run.stderr.strip()[-300:]}")
        return run.stdout

    def install(self, name):
        if name in self.installed:
            return
        package = os.path.join(self.lorakit.work, "package-" + name)
        if os.path.exists(os.path.join(EXAMPLES, name, "plugin.json")):  # in Python, with its kit in its folder
            shutil.copytree(os.path.join(EXAMPLES, name), package, ignore=shutil.ignore_patterns("tests", "__pycache__"))
            shutil.copytree(os.path.join(ROOT, "plugins", "python", "lorakit_plugin"), os.path.join(package, "lorakit_plugin"),
                            ignore=shutil.ignore_patterns("__pycache__"))
        else:
            build = subprocess.run(["go", "build", "-o", os.path.join(package, name), "./plugins/examples/" + name], cwd=ROOT,
                                   capture_output=True, text=True, env={**os.environ, "CGO_ENABLED": "0"})
            if build.returncode:
                raise Failure(build.stderr.strip()[-300:])
            package = os.path.join(package, name)
        self.run("plugin", "install", package)
        self.installed.add(name)

    def convert(self, source, *flags, suffix=""):
        destination = os.path.join(tempfile.mkdtemp(dir=self.lorakit.work), "out" + suffix)
        self.run("convert", source, destination, "--progress", "none", *flags)
        return destination

    def differences(self, a, b):
        found = json.loads(self.run("diff", a, b, "--json", expect=(0, 3)))  # 3: they differ
        if found["missing"] or found["extra"]:
            raise Failure(f"{found['missing'][:2]} are missing, {found['extra'][:2]} too many")
        return found


def conforms(plugins, name):
    """The kit's own checks, with what it says of those that it leaves out."""
    plugins.install(name)
    found = json.loads(plugins.run("plugin", "test", name, "--json"))
    if found["failed"] or not found["passed"]:
        failed = [check for check in found["checks"] if check["status"] == "failed"]
        raise Failure(f"{found['failed']} failed: {failed[:1]}")
    state = json.loads(plugins.run("plugin", "verify", name, "--json"))
    if state["state"] != "ok":
        raise Failure(f"it is {state['state']} after the test: {state}")
    return f"{found['passed']} passed, {found['skipped']} skipped"


def there_and_back(plugins, name, source, include, suffix=""):
    """A model in a plugin's format, to NF4 as safetensors and back into the format."""
    plugins.install(name)
    exact = plugins.convert(source, "--to", "safetensors", suffix=".safetensors" if suffix else "")
    if plugins.differences(source, exact)["max_abs"] != 0:
        raise Failure("safetensors hold other values")
    back = plugins.convert(exact, "--to", name, suffix=suffix)
    if plugins.differences(source, back)["max_abs"] != 0:
        raise Failure("what is written back holds other values")
    low = plugins.convert(source, "--to", "safetensors", "--quantize", "nf4", "--include", include, suffix=".safetensors" if suffix else "")
    plain = plugins.convert(low, "--to", name, "--quantize", "none", suffix=suffix)
    error = plugins.differences(source, plain)["rel_rms"]
    if not 0.01 < error < 0.15:
        raise Failure(f"NF4 and back is {error} off, expected some 0.08")
    return f"{error:.3f} after NF4 and back"


def scheme_there_and_back(plugins):
    """HQQ to plain, to NF4, to HQQ again, whose values hqq gives back."""
    plugins.install("hqq")
    source = os.path.join(FIXTURES, "hqq", "tiny-llama")
    plain = plugins.convert(source, "--quantize", "none")
    if plugins.differences(source, plain)["max_abs"] != 0:
        raise Failure("plain weights hold other values")
    low = plugins.convert(source, "--quantize", "nf4")
    again = plugins.convert(low, "--quantize", "hqq")
    error = plugins.differences(plain, again)["rel_rms"]
    if not 0.01 < error < 0.2:
        raise Failure(f"NF4 and HQQ again are {error} off, expected some 0.1")
    return f"{error:.3f} after NF4 and HQQ"


def checks(lorakit):
    plugins = Plugins(lorakit)
    for name in ("raw", "flax", "hqq"):  # and keras, by plugins/examples/keras/check
        yield f"plugin {name} conforms", functools.partial(conforms, plugins, name)
    yield "plugin raw there and back", functools.partial(there_and_back, plugins, "raw", os.path.join(FIXTURES, "tiny-llama-f32"), "*proj.weight")
    yield "plugin flax there and back", functools.partial(there_and_back, plugins, "flax", os.path.join(FIXTURES, "flax", "gpt2"), "*kernel")
    yield "plugin keras there and back", functools.partial(
        there_and_back, plugins, "keras", os.path.join(FIXTURES, "keras", "keras3.weights.h5"), "*/vars/0", ".weights.h5")
    yield "plugin hqq there and back", functools.partial(scheme_there_and_back, plugins)
