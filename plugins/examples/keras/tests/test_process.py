"""The plugin as lorakit starts it: a copy of the folder, with the package in it, by Python with -I."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

import grpc
from lorakit_plugin import plugin_pb2 as pb
from lorakit_plugin import plugin_pb2_grpc as services

from tests import FIXTURES, HERE


class Process(unittest.TestCase):
    def test_reads_and_writes(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        copy = os.path.join(folder.name, "keras")
        shutil.copytree(os.path.dirname(HERE), copy, ignore=shutil.ignore_patterns("tests", "__pycache__"))
        shutil.copytree(os.path.join(HERE, "../../../python/lorakit_plugin"), os.path.join(copy, "lorakit_plugin"))
        environment = {"LORAKIT_PLUGIN_COOKIE": "lorakit.plugin.v1", "PLUGIN_UNIX_SOCKET_DIR": folder.name}
        with open(os.path.join(copy, "plugin.json")) as file:
            command = [sys.executable, "-B", *json.load(file)["command"][1:]]  # as lorakit starts Python
        before = files(copy)
        process = subprocess.Popen(command, cwd=copy, env=environment, stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        address = process.stdout.readline().split("|")[3]
        channel = grpc.insecure_channel("unix:" + address)
        self.addCleanup(channel.close)

        description = services.PluginServiceStub(channel).Describe(pb.DescribeRequest(), timeout=20)
        self.assertEqual("keras", description.name)
        self.assertEqual(["deterministic", "extents", "read", "write-stream"], list(description.capabilities))

        format_service = services.FormatServiceStub(channel)
        path = os.path.join(FIXTURES, "gzip.weights.h5")
        old = self.read(format_service, path)
        tensors = [pb.Tensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape, _ in old]
        out = os.path.join(folder.name, "out.weights.h5")
        handle = format_service.Create(iter([pb.CreateRequest(format="keras", path=out, tensors=tensors)])).handle
        messages = [
            pb.WriteRequest(handle=handle, tensor=index, data=data) for index, (_, _, _, data) in enumerate(old)
        ]
        self.assertEqual(sum(len(data) for *_, data in old), format_service.Write(iter(messages)).bytes)
        size = format_service.Finish(pb.FormatServiceFinishRequest(handle=handle)).size
        format_service.Close(pb.CloseRequest(handle=handle))
        self.assertEqual(os.path.getsize(out), size)
        self.assertEqual(old, self.read(format_service, out))

        channel.unary_unary("/plugin.GRPCController/Shutdown")(b"")
        self.assertEqual(0, process.wait(10))
        self.assertEqual(before, files(copy))  # it is hashed before each start

    def read(self, format_service, path):
        handle = format_service.Open(pb.OpenRequest(format="keras", path=path)).handle
        found = []
        for batch in format_service.List(pb.ListRequest(handle=handle)):
            for one in batch.tensors:
                size = 4 * math.prod(one.tensor.shape)  # all are of four bytes
                if one.WhichOneof("place") == "extent":
                    with open(path, "rb") as file:
                        file.seek(one.extent.offset)
                        data = file.read(size)
                else:
                    request = pb.ReadRequest(handle=handle, id=one.opaque.id, offset=0, length=size)
                    data = b"".join(answer.data for answer in format_service.Read(request))
                found.append((one.tensor.name, one.tensor.dtype, list(one.tensor.shape), data))
        format_service.Close(pb.CloseRequest(handle=handle))
        return found


def files(folder):
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
