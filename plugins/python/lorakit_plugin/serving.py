"""Starts the server and tells lorakit where it is."""

import json
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from . import host, stdio
from . import plugin_pb2 as pb
from . import plugin_pb2_grpc as services
from .format_service import FormatService
from .formats import Format
from .scheme_service import SchemeService
from .schemes import Scheme
from .statuses import MESSAGE, unary
from .tensors import BITS, CHUNK

PROTOCOL = 1
CORE_PROTOCOL = 1

# A thread is made when a call comes and all others are busy. There are more of them than the host has threads, so that
# a Shutdown or a Close never waits for reads to end.
THREADS = 64

OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE),
    ("grpc.max_receive_message_length", MESSAGE),
    ("grpc.http2.lookahead_bytes", CHUNK),
    ("grpc.so_reuseport", 0),
]


def serve(name: str, version: str, *parts: Format | Scheme, deterministic: bool = False) -> None:
    """Serves formats and schemes as the plugin of that name until lorakit says that it is done, and does not return.
    deterministic promises that the same input makes the same bytes."""
    try:
        description = describe(name, version, parts, deterministic)
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    debug = os.environ.get("LORAKIT_PLUGIN_DEBUG", "") not in ("", "0")
    if not stdio.started_by_lorakit() and not debug:
        sys.exit(f"{name} is a plugin of lorakit, which starts it: lorakit plugin install PATH")
    if os.environ.get("PLUGIN_CLIENT_CERT"):
        sys.exit(f"{name}: found a demand for mTLS, which a plugin in Python does not have: its plugin.json says no")
    gone = threading.Event()
    server, network, address = start(description, parts, gone)

    def leave() -> None:
        if network == "unix":
            _remove(address)
        sys.stderr.flush()
        os._exit(0)  # a thread that is at work for nobody does not keep us

    if debug:
        attach = {"protocol": PROTOCOL, "pid": os.getpid(), "network": network, "address": address}
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background without it
        print(f"LORAKIT_REATTACH_PLUGINS='{json.dumps({name: attach})}'", flush=True)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for lorakit, which then ends us
        host.watch(leave)
        stdio.handshake(f"{CORE_PROTOCOL}|{_protocol()}|{network}|{address}|grpc")
    try:
        gone.wait()
        server.stop(0.2).wait(1)
    except KeyboardInterrupt:
        pass
    leave()


def _protocol() -> int:
    """Chooses among the versions that the host speaks. Where ours is not among them, the host says so."""
    offered = os.environ.get("PLUGIN_PROTOCOL_VERSIONS", "").split(",")
    return max((int(one) for one in offered if one.strip() == str(PROTOCOL)), default=PROTOCOL)


def start(
    description: pb.DescribeResponse, parts: Sequence[Format | Scheme], gone: threading.Event
) -> tuple[grpc.Server, str, str]:
    """Starts a server. gone is set when the host asks for its end."""
    server = grpc.server(ThreadPoolExecutor(THREADS), options=OPTIONS)
    services.add_PluginServiceServicer_to_server(PluginService(description), server)
    formats = [part for part in parts if isinstance(part, Format)]
    services.add_FormatServiceServicer_to_server(FormatService(formats), server)
    schemes = [part for part in parts if isinstance(part, Scheme)]
    services.add_SchemeServiceServicer_to_server(SchemeService(schemes), server)
    server.add_generic_rpc_handlers([_health(), _controller(gone)])
    network, address = _listen(server)
    server.start()
    return server, network, address


def _listen(server: grpc.Server) -> tuple[str, str]:
    if sys.platform == "win32":
        return "tcp", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    folder = os.environ.get("PLUGIN_UNIX_SOCKET_DIR") or tempfile.mkdtemp(prefix="lorakit-")
    path = os.path.join(os.path.abspath(folder), f"plugin-{secrets.token_hex(4)}")
    if len(os.fsencode(path)) > 103:
        sys.exit(f"found a folder for the socket with too long a path: {folder}")
    server.add_insecure_port("unix:" + path)
    return "unix", path


def _remove(path: str) -> None:
    """Removes the socket, and its folder where nobody else has made it."""
    try:
        os.remove(path)
        if not os.environ.get("PLUGIN_UNIX_SOCKET_DIR"):
            os.rmdir(os.path.dirname(path))
    except OSError:
        pass


class PluginService(services.PluginServiceServicer):
    """Answers Describe."""

    def __init__(self, description: pb.DescribeResponse):
        self._description = description

    @unary
    def Describe(self, request, context):
        return self._description


def _raw(call) -> grpc.RpcMethodHandler:
    """A method whose messages are bytes: those of go-plugin are so small that they need no generated code."""
    return grpc.unary_unary_rpc_method_handler(call)


def _health() -> grpc.GenericRpcHandler:
    """grpc.health.v1.Health for the service "plugin": go-plugin asks it to see that we are there."""

    def check(request: bytes, context) -> bytes:
        if request not in (b"", b"\x0a\x06plugin"):
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return b"\x08\x01"  # status: SERVING

    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": _raw(check)})


def _controller(gone: threading.Event) -> grpc.GenericRpcHandler:
    """GRPCController of go-plugin, by which the host says that it is done."""

    def shutdown(request: bytes, context) -> bytes:
        context.add_callback(gone.set)  # when the answer is on its way
        return b""

    return grpc.method_handlers_generic_handler("plugin.GRPCController", {"Shutdown": _raw(shutdown)})


def describe(
    name: str, version: str, parts: Sequence[Format | Scheme], deterministic: bool = False
) -> pb.DescribeResponse:
    """Says what a plugin has, from what its formats and schemes implement."""
    _expect(re.fullmatch(r"[a-z][a-z0-9-]*", name), f"found name {name!r}, expected lower-case letters, digits, dashes")
    _expect(re.fullmatch(r"[A-Za-z0-9.+-]+", version), f"found version {version!r}, expected one such as 1.0.0")
    capabilities: set[str] = {"deterministic"} if deterministic else set()
    formats, schemes = [], []
    for part in parts:
        if isinstance(part, Format):
            formats.append(_format(part, capabilities))
        elif isinstance(part, Scheme):
            schemes.append(_scheme(part, capabilities))
        else:
            raise ValueError(f"found {part!r}, expected a Format or a Scheme")
    _expect(formats or schemes, "found no format and no scheme, expected one at least")
    names = [one.name for one in formats] + [one.name for one in schemes]
    _expect(len(set(names)) == len(names), f"found names {', '.join(names)}, expected each once")
    return pb.DescribeResponse(
        name=name,
        version=version,
        protocol=PROTOCOL,
        capabilities=sorted(capabilities),
        formats=formats,
        schemes=schemes,
    )


def _format(part: Format, capabilities: set[str]) -> pb.FormatInfo:
    _expect(re.fullmatch(r"[a-z0-9_-]+", part.name), f"found format {part.name!r}, expected lower-case letters, digits")
    for extension in part.extensions:
        _expect(re.fullmatch(r"\.[^/\\]+", extension), f"found extension {extension!r}, expected one with its dot")
    for offset, magic in part.magic:
        _expect(offset >= 0 and magic and offset + len(magic) <= 4096, f"found magic {magic!r} at {offset}")
    for dtype in part.dtypes:
        _expect(dtype in BITS, f"found dtype {dtype!r}, expected one of {' '.join(BITS)}")
    reads, lays, streams = (_has(part, Format, method) for method in ("open", "layout", "create"))
    _expect(reads or lays or streams, f"format {part.name} implements neither open nor layout nor create")
    _expect(not (lays and streams), f"format {part.name} implements layout and create, expected one of them")
    capabilities |= {"read"} if reads else set()
    capabilities |= {"extents"} if reads and part.extents else set()
    capabilities |= {"write-layout"} if lays else {"write-stream"} if streams else set()
    return pb.FormatInfo(
        name=part.name,
        extensions=part.extensions,
        magic=[pb.Magic(offset=offset, bytes=magic) for offset, magic in part.magic],
        file_names=part.file_names,
        write=pb.WRITE_MODE_LAYOUT if lays else pb.WRITE_MODE_STREAM if streams else pb.WRITE_MODE_NONE,
        dtypes=part.dtypes,
        written=part.written,
    )


def _scheme(part: Scheme, capabilities: set[str]) -> pb.SchemeInfo:
    _expect(part.name, "found a scheme without a name")
    for parameter in part.parameters:
        _expect(parameter in ("block_size", "double_quant"), f"found parameter {parameter!r} of scheme {part.name}")
    decodes, encodes, configures = (_has(part, Scheme, method) for method in ("find", "encoder", "config"))
    _expect(decodes or encodes, f"scheme {part.name} implements neither find nor encoder")
    _expect(encodes == configures, f"scheme {part.name} implements one of encoder and config, expected both")
    capabilities |= {"scheme-decode"} if decodes else set()
    capabilities |= {"scheme-encode"} if encodes else set()
    return pb.SchemeInfo(
        name=part.name,
        types=part.types,
        parameters=part.parameters,
        suffixes=part.suffixes,
        notices=part.notices,
    )


def _has(part, base: type, method: str) -> bool:
    return getattr(type(part), method) is not getattr(base, method)


def _expect(holds, message: str) -> None:
    if not holds:
        raise ValueError(message)
