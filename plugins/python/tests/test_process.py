"""The process: the handshake, standard output, and its end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import grpc

from lorakit_plugin import plugin_pb2 as pb
from lorakit_plugin import plugin_pb2_grpc as services

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAIN = os.path.join(os.path.dirname(__file__), "plugin_main.py")
COOKIE = {"LORAKIT_PLUGIN_COOKIE": "lorakit.plugin.v1", "PLUGIN_PROTOCOL_VERSIONS": "1"}


class Process(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def start(self, environment=None, command=(sys.executable, MAIN), **options):
        environment = {"PATH": os.environ["PATH"], "PLUGIN_UNIX_SOCKET_DIR": self.folder.name, **(environment or {})}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

        def end():
            process.kill()
            process.communicate()

        self.addCleanup(end)
        return process

    def served(self, **options):
        process = self.start(options.pop("environment", COOKIE), **options)
        line = process.stdout.readline()
        core, version, network, address, protocol = line.rstrip("\n").split("|")
        self.assertEqual(("1", "1", "unix", "grpc"), (core, version, network, protocol))
        self.assertEqual(self.folder.name, os.path.dirname(address))
        channel = grpc.insecure_channel("unix:" + address)
        self.addCleanup(channel.close)
        return process, channel

    def shut_down(self, channel):
        return channel.unary_unary("/plugin.GRPCController/Shutdown")(b"", timeout=10)

    def test_serves_until_shutdown(self):
        process, channel = self.served()
        answer = services.PluginServiceStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        self.assertEqual(("loud", "1.0.0", 1), (answer.name, answer.version, answer.protocol))
        begin = time.monotonic()
        self.assertEqual(b"", self.shut_down(channel))
        self.assertEqual(0, process.wait(10))
        self.assertLess(time.monotonic() - begin, 5)  # half a second, on a machine that is not busy
        self.assertEqual([], os.listdir(self.folder.name))

    def test_keeps_stdout_for_the_handshake(self):
        process, channel = self.served()
        self.shut_down(channel)
        out, err = process.communicate(timeout=10)
        self.assertEqual("", out)
        self.assertIn("a line of an import\n", err)
        self.assertIn("a line of a child\n", err)

    def test_the_last_line_says_where(self):
        with open(os.path.join(self.folder.name, "main.py"), "w") as file:
            file.write(f"import sys\nsys.path.insert(0, {ROOT!r})\nimport lorakit_plugin\n")
            file.write("def f():\n    int('x')\nf()\n")
        out, err = (process := self.start(COOKIE, command=(sys.executable, file.name))).communicate(timeout=20)
        self.assertEqual((1, ""), (process.returncode, out))
        self.assertIn("Traceback", err)
        self.assertEqual("ValueError: invalid literal for int() with base 10: 'x' (main.py:5 in f)", lines(err))

    def test_the_line_is_the_plugins_own(self):
        packages = os.path.join(self.folder.name, "env", "site-packages")
        os.makedirs(packages)
        with open(os.path.join(packages, "theirs.py"), "w") as file:
            file.write("import json\ndef load(text):\n    return json.loads(text)\n")
        begin = f"import sys\nsys.path[:0] = {[ROOT, packages]!r}\nimport lorakit_plugin, theirs\n"
        for code, place in (
            ("def f(load):\n    load('{')\nf(theirs.load)\n", "(main.py:5 in f)"),
            ("import broken\n", "SyntaxError: '(' was never closed (parts/broken.py:2)"),
        ):
            with self.subTest(place):
                os.makedirs(parts := os.path.join(self.folder.name, "parts"), exist_ok=True)
                with open(os.path.join(parts, "broken.py"), "w") as file:
                    file.write("\nvalues = (1,\n")
                with open(os.path.join(self.folder.name, "main.py"), "w") as file:
                    file.write(begin.replace("[:0] = [", f"[:0] = [{parts!r}, ") + code)
                process = self.start(COOKIE, command=(sys.executable, "main.py"), cwd=self.folder.name)
                _, err = process.communicate(timeout=20)
                self.assertIn(place, lines(err))

    def test_stdin_is_empty(self):
        process, _ = self.served(stdin=subprocess.PIPE)
        self.assertEqual(os.path.realpath(os.devnull), os.path.realpath(f"/proc/{process.pid}/fd/0"))

    def test_health(self):
        _, channel = self.served()
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        self.assertEqual(b"\x08\x01", check(b"\x0a\x06plugin", timeout=10))
        with self.assertRaises(grpc.RpcError) as caught:
            check(b"\x0a\x05other", timeout=10)
        self.assertEqual(grpc.StatusCode.NOT_FOUND, caught.exception.code())

    def test_newer_hosts_are_answered(self):
        self.served(environment=COOKIE | {"PLUGIN_PROTOCOL_VERSIONS": "3,2,1"})
        self.served(environment=COOKIE | {"PLUGIN_PROTOCOL_VERSIONS": "7"})

    def test_without_the_cookie(self):
        for value in ({}, {"LORAKIT_PLUGIN_COOKIE": "lorakit.plugin.v0"}):
            out, err = (process := self.start(value)).communicate(timeout=20)
            self.assertEqual(1, process.returncode)
            self.assertEqual("loud is a plugin of lorakit, which starts it: lorakit plugin install PATH", lines(err))
            self.assertIn("a line of an import", out)  # nothing is taken from it

    def test_refuses_mtls(self):
        out, err = (process := self.start(COOKIE | {"PLUGIN_CLIENT_CERT": "x"})).communicate(timeout=20)
        self.assertEqual((1, ""), (process.returncode, out))
        self.assertIn("loud: found a demand for mTLS", lines(err))

    def test_leaves_with_the_pipe_of_the_host(self):
        reading, writing = os.pipe()
        process, _ = self.served(environment=COOKIE | {"LORAKIT_PLUGIN_HOST_FD": str(reading)}, pass_fds=[reading])
        os.close(reading)
        time.sleep(0.8)
        self.assertIsNone(process.poll())
        os.close(writing)
        self.assertEqual(0, process.wait(10))

    def test_leaves_with_its_parent(self):
        code = (
            "import subprocess, sys, time\n"
            f"process = subprocess.Popen([sys.executable, {MAIN!r}])\n"
            "print(process.pid, file=sys.stderr, flush=True)\n"
            "time.sleep(60)\n"
        )
        host = self.start(COOKIE, command=(sys.executable, "-c", code))
        pid = int(host.stderr.readline())
        self.assertTrue(host.stdout.readline().startswith("1|1|unix|"))
        self.assertFalse(gone(pid))
        host.kill()
        host.wait(10)
        deadline = time.monotonic() + 10
        while not gone(pid):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)

    def test_leaves_in_the_middle_of_a_call(self):
        with open(os.path.join(self.folder.name, "a.given"), "w") as file:
            file.write("opaque")
        process, channel = self.served()
        stub = services.FormatServiceStub(channel)
        handle = stub.Open(pb.OpenRequest(format="given", path=file.name), timeout=10).handle
        stream = stub.Read(pb.ReadRequest(handle=handle, id=3, offset=0, length=1 << 40))
        next(stream)
        self.shut_down(channel)
        self.assertEqual(0, process.wait(5))

    def test_interrupts_are_for_the_host(self):
        process, channel = self.served()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        self.assertIsNone(process.poll())
        services.PluginServiceStub(channel).Describe(pb.DescribeRequest(), timeout=10)

    def test_is_started_by_hand_to_be_debugged(self):
        process = self.start({"LORAKIT_PLUGIN_DEBUG": "1", "PLUGIN_UNIX_SOCKET_DIR": "", "TMPDIR": self.folder.name})
        while not (line := process.stdout.readline()).startswith("LORAKIT_REATTACH_PLUGINS="):
            self.assertTrue(line)
        attach = json.loads(line.strip().partition("=")[2].strip("'"))["loud"]
        self.assertEqual(process.pid, attach["pid"])
        channel = grpc.insecure_channel("unix:" + attach["address"])
        self.addCleanup(channel.close)
        services.PluginServiceStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        process.send_signal(signal.SIGINT)
        self.assertEqual(0, process.wait(10))
        self.assertEqual([], os.listdir(self.folder.name))


def lines(text):
    """Returns the last line: those before it are the plugin's own noise."""
    return text.rstrip("\n").rpartition("\n")[2]


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
