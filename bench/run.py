"""lorakit against its peers, in one run on one machine. Usage: run.py LORAKIT [--markdown] [--runs N] [--only ROWS]

Prints one table: what was measured, the peers' figures, lorakit's, their ratio and the goal. Figures are medians; what
writes files is run in turns, so that a disk that slows down slows all of them. A row that cannot run here says why.
The checkpoint, anamnesis and what is written go to .bench in the project."""
import argparse
import functools
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
WORK = os.path.join(ROOT, ".bench")
ANAMNESIS = "0.7.10"
LLAMA_CPP = "0.3.36"  # of llama-cpp-python, whose source package has llama.cpp
MIB, GB = 1 << 20, 1e9
QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}


class NotRun(Exception):
    """Why a row cannot be measured on this machine."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def output(*argv, env=QUIET, cwd=ROOT):
    run = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=cwd)
    if run.returncode:
        raise NotRun(f"{os.path.basename(argv[0])} {' '.join(argv[1:3])}: exit {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout


def measured(*argv):
    """What measure.py prints of one command: seconds, user, system and peak."""
    run = subprocess.run([sys.executable, "-S", "-E", os.path.join(HERE, "measure.py"), *argv], capture_output=True, text=True, env=QUIET)
    if run.returncode:
        raise NotRun(f"{argv[0]}: {run.stderr.strip()[-150:]}")
    found = json.loads(run.stdout)
    if found["status"]:
        raise NotRun(f"{os.path.basename(argv[0])} {argv[1] if len(argv) > 1 else ''}: exit {found['status']}: {' '.join(run.stderr.split())[-150:]}")
    return found


def measure(*argv):
    """Seconds and peak bytes of one command."""
    found = measured(*argv)
    return found["seconds"], found["peak"]


class Command:
    """A command that writes a destination, and what its runs took."""

    def __init__(self, *argvs):
        self.argvs, self.seconds, self.peaks, self.reason = argvs, [], [], None

    def run(self, destination):
        if self.reason:
            return
        shutil.rmtree(destination, ignore_errors=True)
        os.sync()  # what earlier runs left to be written is not this one's
        try:
            runs = [measure(*argv) for argv in self.argvs]
        except NotRun as why:
            self.reason = str(why)
            return
        self.seconds.append(sum(seconds for seconds, _ in runs))
        self.peaks.append(max(peak for _, peak in runs))

    def time(self):
        if self.reason:
            raise NotRun(self.reason)
        return statistics.median(self.seconds)

    def peak(self):
        if self.reason:
            raise NotRun(self.reason)
        return max(self.peaks)


def unavailable(reason):
    command = Command()
    command.reason = reason
    return command


def checkpoint():
    folder = os.path.join(WORK, "model")
    if not os.path.exists(os.path.join(folder, "model.safetensors.index.json")):
        say("writing the checkpoint: 1.1 B parameters")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        output(sys.executable, os.path.join(HERE, "model.py"), folder)
    for name in os.listdir(folder):  # all of them read it from memory
        with open(os.path.join(folder, name), "rb") as file:
            while file.read(16 * MIB):
                pass
    return folder


def cargo(*argv):
    if not shutil.which("cargo"):
        raise NotRun("cargo is not installed")
    return output("cargo", *argv, env={**os.environ, "RUSTFLAGS": "-C target-cpu=native", "CARGO_TARGET_DIR": os.path.join(WORK, "target")})


def anamnesis():
    """The crate's command and our timing of its kernels, both built for this processor."""
    command, kernels = os.path.join(WORK, "bin", "amn"), os.path.join(WORK, "target", "release", "anamnesis-bench")
    if not (os.path.exists(command) and os.path.exists(kernels)):
        say(f"building anamnesis {ANAMNESIS}")
        cargo("install", "anamnesis", "--version", ANAMNESIS, "--features", "cli,bnb", "--locked", "--root", WORK)
        cargo("build", "--release", "--locked", "--manifest-path", os.path.join(HERE, "anamnesis", "Cargo.toml"))
    return command, kernels


def llama_quantize():
    """llama.cpp's library behind a command line, built with its own flags for a distribution."""
    program, folder = os.path.join(WORK, "bin", "llama_quantize"), os.path.join(WORK, "llama.cpp")
    if os.path.exists(program):
        return program
    for tool in ("cmake", "g++"):
        if not shutil.which(tool):
            raise NotRun(f"{tool} is not installed")
    say(f"building llama.cpp of llama-cpp-python {LLAMA_CPP}")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    os.makedirs(os.path.dirname(program), exist_ok=True)
    package, name = f"llama-cpp-python=={LLAMA_CPP}", f"llama_cpp_python-{LLAMA_CPP}"
    output(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, package)
    with tarfile.open(os.path.join(folder, name + ".tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    source, build = os.path.join(folder, name, "vendor", "llama.cpp"), os.path.join(folder, "build")
    parts = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")]
    output("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", *parts)
    output("cmake", "--build", build, "--target", "llama", "--parallel", str(os.cpu_count()))
    libraries = os.path.join(build, "bin")
    output("g++", "-O1", os.path.join(ROOT, "fixtures", "generate", "llama_quantize.cpp"), "-I" + os.path.join(source, "include"),
           "-I" + os.path.join(source, "ggml", "include"), "-L" + libraries, "-Wl,-rpath," + libraries, "-lllama", "-lggml", "-lggml-base",
           "-o", program)
    return program


def with_tokenizer(source):
    """The checkpoint with a tokenizer of as many tokens as it has, which GGUF has in its file."""
    folder = os.path.join(WORK, "model-tokenizer")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name in os.listdir(source):
        os.link(os.path.join(source, name), os.path.join(folder, name))
    small = os.path.join(ROOT, "fixtures", "tokenizers", "llama3")
    with open(os.path.join(source, "config.json")) as config, open(os.path.join(small, "tokenizer.json")) as file:
        tokens, tokenizer = json.load(config)["vocab_size"], json.load(file)
    vocabulary = tokenizer["model"]["vocab"]
    for number in range(len(vocabulary) + len(tokenizer["added_tokens"]), tokens):
        vocabulary[f"\u0120token{number}"] = number
    with open(os.path.join(folder, "tokenizer.json"), "w") as file:
        json.dump(tokenizer, file)
    shutil.copy(os.path.join(small, "tokenizer_config.json"), folder)
    return folder


def kernels(*argv):
    """encode and decode, GB/s, of a program that prints them."""
    return {key: float(value) for key, value in (line.split() for line in output(*argv).splitlines())}


def go_benchmarks():
    """lorakit's kernels on one core: name -> (GB/s, kernel set), the machine's fastest set, for a buffer outside of the caches."""
    names = ("BenchmarkMemcpy", "BenchmarkQuantizeNF4", "BenchmarkDequantizeNF4")
    text = output("go", "test", "-run", "^$", "-bench", f"^({'|'.join(names)})$/^(BF16|64MiB)$", "-benchtime", "300ms", "-count", "5", "-cpu", "1", "./internal/kernels")
    found = {}
    for name, mb in re.findall(r"^(Benchmark\S*/64MiB\S*)\s.*?([\d.]+) MB/s", text, re.M):
        found.setdefault(name, []).append(float(mb))
    best = {}
    for name, rates in found.items():
        kind, rate = name.split("/")[0], statistics.median(rates) / 1000
        if rate > best.get(kind, (0, ""))[0]:
            best[kind] = (rate, name.split("/")[-1])
    lacking = [name for name in names if name not in best]
    if lacking:
        raise NotRun(f"./internal/kernels has no {lacking[0]}")
    return best


# The products of matrices that are measured, m x k x n: whole ones, and those of adapters and decompositions.
PRODUCTS = {"1024x1024x1024": "gflops_1024", "2048x2048x2048": "gflops_2048", "128x16x2048": "", "2048x5632x24": ""}


def go_products():
    """lorakit's float32 product on one core: shape -> (GFLOP/s, kernel set), the fastest set."""
    text = output("go", "test", "-run", "^$", "-bench", f"^BenchmarkMulAdd$/^({'|'.join(PRODUCTS)})$/^(avx512|avx2)$", "-benchtime", "500ms", "-cpu", "1", "./internal/kernels")
    best = {}
    for shape, kernel_set, rate in re.findall(r"^BenchmarkMulAdd/(\S+)/(\S+)\s.*?([\d.]+) best-GFLOP/s", text, re.M):
        best[shape] = max(best.get(shape, (0, "")), (float(rate), kernel_set))
    if len(best) < len(PRODUCTS):
        raise NotRun("this processor has no AVX2")
    return best


def start_up(*argv):
    return statistics.median(measure(*argv)[0] for _ in range(21))


def attempt(call, *arguments):
    """A call's result, or why there is none."""
    try:
        return call(*arguments)
    except NotRun as why:
        return why


class Table:
    def __init__(self):
        self.rows = []

    def row(self, what, peers, ours, ratio, goal, met=None):
        self.rows.append((what, peers, ours, ratio, goal, "" if met is None else "yes" if met else "NO"))

    def absent(self, what, why, goal=""):
        self.rows.append((what, f"not run: {why}", "", "", goal, ""))

    def print(self, markdown):
        rows = [("what", "peers", "lorakit", "ratio", "goal", "met"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for number, row in enumerate(rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths)]
            print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
            if number == 0:
                print("|" + "|".join("-" * (w + 2) for w in widths) + "|" if markdown else "  ".join("-" * w for w in widths))


def kernel_rows(table, ours, bnb, rust):
    if isinstance(ours, NotRun):
        table.absent("NF4 kernels, one core", ours)
        return
    memcpy = ours["BenchmarkMemcpy"][0]
    for what, benchmark, key, least in (("NF4 quantise bf16", "BenchmarkQuantizeNF4", "encode", 60), ("NF4 dequantise to bf16", "BenchmarkDequantizeNF4", "decode", 1.5)):
        speed, kernel_set = ours[benchmark]
        said = f"{speed:.2f} GB/s ({kernel_set})"
        what += ", one core"
        if isinstance(bnb, NotRun):
            table.absent(what, f"bitsandbytes: {bnb}")
        else:
            table.row(what, f"bitsandbytes {bnb[key]:.3f} GB/s", said, f"{speed / bnb[key]:.1f} x", f">= {least} x", speed >= least * bnb[key])
        table.row(what, f"memcpy {memcpy:.2f} GB/s", said, f"{speed / memcpy:.2f} x", ">= 0.5 x", speed >= 0.5 * memcpy)
        if isinstance(rust, NotRun):
            table.absent(what, f"anamnesis: {rust}")
        else:
            table.row(what, f"anamnesis {rust[key]:.3f} GB/s", said, f"{speed / rust[key]:.1f} x", "> 1 x", speed > rust[key])


@functools.cache
def torch_products():
    """What torch_mm.py prints of one core, GFLOP/s."""
    return json.loads(output(sys.executable, os.path.join(HERE, "torch_mm.py")))


def product_rows(table):
    what = "float32 product {}, one core"
    try:
        ours, torch = go_products(), torch_products()
    except NotRun as why:
        table.absent(what.format("of matrices"), str(why), ">= 0.8 x")
        return
    for shape, key in PRODUCTS.items():
        rate, kernel_set = ours[shape]
        theirs = torch[key] if key else torch["skinny"][shape]
        table.row(what.format(shape), f"torch {theirs:.1f} GFLOP/s", f"{rate:.1f} GFLOP/s ({kernel_set})", f"{rate / theirs:.2f} x", ">= 0.8 x", rate >= 0.8 * theirs)


def convert_rows(table, lorakit, one, peers, copies):
    """lorakit, one: Commands with two threads and with one; peers, copies: name -> Command."""
    what = "convert 2.2 GB to NF4"
    try:
        seconds, said = lorakit.time(), f"{lorakit.time():.2f} s"
    except NotRun as why:
        table.absent(what, f"lorakit: {why}")
        return
    for name, command in copies.items():
        goal = "<= 1 x" if "sync" in name else ""
        try:
            table.row(what, f"{name} {command.time():.2f} s", said, f"{seconds / command.time():.2f} x", goal, seconds <= command.time() if goal else None)
        except NotRun as why:
            table.absent(what, f"{name}: {why}", goal)
    for name, command in peers.items():
        try:
            table.row(what, f"{name} {command.time():.1f} s", said, f"1/{command.time() / seconds:.1f}", "faster", seconds < command.time())
        except NotRun as why:
            table.absent(what, f"{name}: {why}")
    if not one.reason:
        table.row(what + ", one thread", "", f"{one.time():.2f} s", "", "")
    peak = lorakit.peak()
    memory = []
    for name, command in peers.items():
        if not command.reason:
            memory.append(f"{name} {command.peak() / MIB:.0f} MiB")
    table.row("peak memory of it", ", ".join(memory), f"{peak / MIB:.0f} MiB", "", "<= 256 MiB", peak <= 256 * MIB)


def memory_rows(table, lorakit, source, runs):
    """A conversion whose files are in memory, so that no disk is waited for: how much of its time its work takes, its own
    and the kernel's, where all processors share it."""
    what, folder = "convert a shard to NF4 on tmpfs", "/dev/shm/lorakit-bench"
    shard = sorted(name for name in os.listdir(source) if name.endswith(".safetensors"))[0]
    size = os.path.getsize(os.path.join(source, shard))
    try:
        if not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free < 2 * size:
            raise NotRun("no /dev/shm with room for it")
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
        shutil.copy(os.path.join(source, shard), folder)
        out = os.path.join(folder, "out.safetensors")
        for threads in ("1", "2", "4"):
            found = []
            for _ in range(runs):
                if os.path.exists(out):  # giving its pages back is no part of the conversion
                    os.remove(out)
                found.append(measured(lorakit, "convert", os.path.join(folder, shard), out,
                                      "--quantize", "nf4", "--threads", threads, "--progress", "none"))
            user, system, wall = (statistics.median(run[key] for run in found) for key in ("user", "system", "seconds"))
            bound = (user + system) / os.cpu_count()
            table.row(f"{what} ({size / GB:.2f} GB), {threads} threads", f"work over processors {bound:.3f} s",
                      f"{wall:.3f} s (user {user:.2f}, system {system:.2f})", f"{bound / wall:.2f} of it", ">= 0.9", bound >= 0.9 * wall)
    except (NotRun, OSError) as why:
        table.absent(what, str(why), ">= 0.9")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def adapter_rows(table, lorakit, source, target, runs):
    adapter, merged = os.path.join(WORK, "adapter"), os.path.join(WORK, "merged")
    if not os.path.exists(os.path.join(adapter, "adapter_config.json")):
        output(sys.executable, os.path.join(HERE, "adapter.py"), source, adapter)
    quiet = ["--progress", "none"]
    fast = {
        "merge": Command([lorakit, "merge", source, adapter, target, *quiet]),
        "nf4": Command([lorakit, "merge", source, adapter, target, "--quantize", "nf4", *quiet]),
        "copy": Command(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", source, target]),
    }
    slow = {
        "PEFT": Command([sys.executable, os.path.join(HERE, "peft_merge.py"), source, adapter, target]),
        "extract": Command([lorakit, "extract", source, merged, target, "--rank", "16"]),
        "torch": Command([sys.executable, os.path.join(HERE, "svd_extract.py"), source, merged, target]),
    }
    shutil.rmtree(merged, ignore_errors=True)
    output(lorakit, "merge", source, adapter, merged, *quiet)
    for number in range(runs):
        say(f"adapters, run {number + 1} of {runs}")
        for command in fast.values():
            command.run(target)
        if number < max(1, runs // 2):
            for command in slow.values():
                command.run(target)
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(merged, ignore_errors=True)
    try:
        seconds, copy = fast["merge"].time(), fast["copy"].time()
        said = f"{seconds:.2f} s"
        table.row("merge r=16, all linears", f"cp -r + sync {copy:.2f} s", said, f"{seconds / copy:.2f} x", "<= 1.5 x", seconds <= 1.5 * copy)
        table.row("merge r=16, to NF4", f"cp -r + sync {copy:.2f} s", f"{fast['nf4'].time():.2f} s", f"{fast['nf4'].time() / copy:.2f} x", "")
        peft = slow["PEFT"]
        table.row("merge r=16, all linears", f"PEFT {peft.time():.1f} s", said, f"1/{peft.time() / seconds:.1f}", "faster", seconds < peft.time())
        peak = max(fast["merge"].peak(), fast["nf4"].peak())
        table.row("peak memory of it", f"PEFT {peft.peak() / MIB:.0f} MiB", f"{peak / MIB:.0f} MiB", "", "<= 256 MiB", peak <= 256 * MIB)
        ours, torch = slow["extract"], slow["torch"]
        table.row("extract r=16, all linears", f"svd_lowrank {torch.time():.1f} s", f"{ours.time():.1f} s", f"{ours.time() / torch.time():.2f} x", "<= 1 x", ours.time() <= torch.time())
        table.row("peak memory of it", f"svd_lowrank {torch.peak() / MIB:.0f} MiB", f"{ours.peak() / MIB:.0f} MiB", "", "<= 256 MiB", ours.peak() <= 256 * MIB)
    except NotRun as why:
        table.absent("merge and extract", str(why))


def spoken(file, *argv):
    """Runs a command that prints JSON and returns that, through a file, and the bytes of its peak."""
    peak = measured("sh", "-c", 'out=$1; shift; exec "$@" > "$out"', "sh", file, *argv)["peak"]
    with open(file) as said:
        return json.load(said), peak


def step_rows(table, lorakit, source, runs):
    """One QLoRA step of 256 tokens, without loading: PEFT and lorakit in turns, on the same weights, adapter and ids. Most
    users of PEFT give it a base in 16 bit, which takes more memory than a step does; so that is measured once."""
    what, threads, tokens = "QLoRA step, 256 tokens, r=8", min(2, os.cpu_count()), 256
    base, adapter, data, said = (os.path.join(WORK, name) for name in ("nf4", "adapter-8", "batch.jsonl", "said.json"))
    try:
        if not os.path.exists(os.path.join(base, "config.json")):
            output(lorakit, "convert", source, base, "--quantize", "nf4", "--progress", "none")
        if not os.path.exists(os.path.join(adapter, "adapter_config.json")):
            output(lorakit, "attach", base, adapter, "--rank", "8", "--target", "all-linear")
        with open(data, "w") as file:
            json.dump({"input_ids": random.Random(1).choices(range(32000), k=tokens)}, file)
        theirs, ours, peaks = [], [], ([], [])
        for number in range(runs):
            say(f"training steps, run {number + 1} of {runs}")
            found, peak = spoken(said, sys.executable, os.path.join(HERE, "qlora_step.py"), base, adapter, data, str(threads))
            theirs.append(found)
            peaks[0].append(peak)
            found, peak = spoken(said, lorakit, "validate", base, "--adapter", adapter, "--data", data, "--memory", "400MiB",
                                 "--threads", str(threads), "--json")
            ours.append(found)
            peaks[1].append(peak)
        _, whole = spoken(said, sys.executable, os.path.join(HERE, "qlora_step.py"), source, adapter, data, str(threads))
        sgemm = threads * torch_products()["gflops_2048"]
        losses = [found["loss"] for found in theirs] + [found["loss_before"] for found in ours]
        if max(losses) - min(losses) > 1e-4:
            raise NotRun(f"PEFT and lorakit compute other losses: {losses}")
    except NotRun as why:
        table.absent(what, str(why), "<= 1 x")
        return
    peer, load = (statistics.median(run[key] for run in theirs) for key in ("step", "load"))
    seconds = statistics.median(tokens / run["tokens_per_second"] for run in ours)
    table.row(what, f"PEFT {peer:.1f} s (after {load:.1f} s of loading)", f"{seconds:.1f} s", f"{seconds / peer:.2f} x", "<= 1 x", seconds <= peer)
    memory, peak = max(peaks[0]), max(peaks[1])
    for how, bytes_, goal in (("NF4 on loading", whole, "<= 1/10"), ("from the NF4 folder", memory, "")):
        table.row("peak memory of it", f"PEFT, {how} {bytes_ / MIB:.0f} MiB", f"{peak / MIB:.0f} MiB", f"1/{bytes_ / peak:.1f}", goal,
                  10 * peak <= bytes_ if goal else None)
    # PEFT computes each block twice, lorakit what its backward pass needs of it; neither the head.
    counts, head = ours[0]["multiply_adds"], tokens * 2048 * 32000
    once = counts["forward"] + counts["backward"]
    rates = [2 * count / time / GB for count, time in ((once + counts["forward"] - head, peer), (once + counts["recomputation"], seconds))]
    shares = [f"{rate:.0f} GFLOP/s, {rate / sgemm:.0%} of sgemm" for rate in rates]
    table.row("speed of it", "PEFT " + shares[0], shares[1], f"{rates[1] / rates[0]:.2f} x", "")


def python_plugin(lorakit, environment):
    """Seconds of inspect through the plugin keras, most of which its interpreter takes to start."""
    package = os.path.join(WORK, "keras")
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("tests", "__pycache__")
    shutil.copytree(os.path.join(ROOT, "plugins", "examples", "keras"), package, ignore=ignored)
    shutil.copytree(os.path.join(ROOT, "plugins", "python", "lorakit_plugin"), os.path.join(package, "lorakit_plugin"), ignore=ignored)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    output(lorakit, "plugin", "install", package, env={**environment, "PATH": path})
    folder, file = environment["LORAKIT_PLUGIN_DIR"], os.path.join(ROOT, "fixtures", "keras", "keras3.weights.h5")
    return [measure("env", "LORAKIT_PLUGIN_DIR=" + folder, lorakit, "inspect", file)[0] for _ in range(5)]


def plugin_rows(table, lorakit, source, target, runs):
    """What plugins cost: bytes that lorakit reads by itself where a plugin says that they are, bytes that go over the
    connection, and the start of a process."""
    programs, plugins, raw = (os.path.join(WORK, name) for name in ("bin", "plugins", "model-raw"))
    what = "a copy of 2.2 GB by a plugin's extents"
    before = {**QUIET, "LORAKIT_PLUGIN_DIR": plugins}
    try:
        os.makedirs(programs, exist_ok=True)
        for package in ("plugins/examples/raw", "bench/plugins/served", "bench/plugins"):
            output("go", "build", "-trimpath", "-o", os.path.join(programs, os.path.basename(package)), "./" + package,
                   env={**os.environ, "CGO_ENABLED": "0"})
        shutil.rmtree(plugins, ignore_errors=True)
        output(lorakit, "plugin", "install", os.path.join(programs, "raw"), env=before)
        environment = ["env", "LORAKIT_PLUGIN_DIR=" + plugins]
        quiet = ["--progress", "none"]
        shutil.rmtree(raw, ignore_errors=True)
        output(lorakit, "convert", source, raw, "--to", "raw", *quiet, env=before)
        ways = {"raw": Command([*environment, lorakit, "convert", raw, target, *quiet]),
                "safetensors": Command([lorakit, "convert", source, target, *quiet])}
        for number in range(runs):
            say(f"plugins, run {number + 1} of {runs}")
            for command in ways.values():
                command.run(target)
        ours, built_in = ways["raw"].time(), ways["safetensors"].time()
        table.row(what, f"safetensors {built_in:.2f} s", f"{ours:.2f} s", f"{ours / built_in:.2f} x", "<= 1.1 x", ours <= 1.1 * built_in)
        peak = ways["raw"].peak()
        table.row("peak memory of it", "", f"{peak / MIB:.0f} MiB", "", "<= 256 MiB", peak <= 256 * MIB)
        found = [kernels(os.path.join(programs, "plugins"), os.path.join(programs, "served")) for _ in range(max(1, runs // 2))]
        of = {key: statistics.median(run[key] for run in found) for key in found[0]}
        socket = f"plain socket {of['socket_gbps']:.1f} GB/s, {of['socket_cpu']:.2f} s a GB"
        for way, kind, goal in (("read", "plain", 1.0), ("read", "mtls", None), ("write", "plain", None), ("write", "mtls", None)):
            key = f"{way}_{kind}"
            table.row(f"{way} over a plugin's connection{', mTLS' if kind == 'mtls' else ''}", socket,
                      f"{of[key + '_gbps']:.2f} GB/s; host {of[key + '_host_cpu']:.2f}, plugin {of[key + '_plugin_cpu']:.2f} s a GB", "",
                      ">= 1 GB/s" if goal else "", of[key + "_gbps"] >= goal if goal else None)
        table.row("start of a Go plugin, to its first answer", "", f"{of['start_plain_ms']:.0f} ms", "", "<= 50 ms", of["start_plain_ms"] <= 50)
        table.row("start of a Go plugin, mTLS", "", f"{of['start_mtls_ms']:.0f} ms", "", "")
        python = python_plugin(lorakit, before)
        table.row("inspect by a plugin in Python (keras)", "", f"{statistics.median(python) * 1e3:.0f} ms", "", "")
    except NotRun as why:
        table.absent(what, str(why), "<= 1.1 x")
    finally:
        shutil.rmtree(raw, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)


FILE_TYPES = {"q4_k_m": 15, "q6_k": 18, "q2_k": 10, "iq4_xs": 30, "iq3_s": 26}


def gguf_rows(table, lorakit, source, target, runs):
    copy_rows(table, lorakit, source, target, runs)
    quantize_rows(table, lorakit, target, runs)
    key_rows(table, lorakit)


def copy_rows(table, lorakit, source, target, runs):
    """Whole models to GGUF and back, against a copy of what is the same size or larger."""
    what, goal = "2.2 GB to GGUF {}", "<= 2 x"
    quiet, out = ["--progress", "none"], os.path.join(target, "model.gguf")
    back, written = os.path.join(WORK, "q8_0.gguf"), os.path.join(WORK, "from-gguf")
    try:
        folder = with_tokenizer(source)
        to = {"f16": ["--dtype", "f16"], "q8_0": ["--quantize", "q8_0"]}
        ways = {name: Command(["mkdir", target], [lorakit, "convert", folder, out, *how, *quiet]) for name, how in to.items()}
        ways["copy"] = Command(["cp", "-r", folder, target])
        for path in (back, written):
            subprocess.run(["rm", "-rf", path], check=True)
        output(lorakit, "convert", folder, back, *to["q8_0"], *quiet)
        output(lorakit, "convert", back, written, "--dtype", "bf16", *quiet)
        ways["back"] = Command([lorakit, "convert", back, target, "--dtype", "bf16", *quiet])
        ways["copy of back"] = Command(["cp", "-r", written, target])
        for number in range(runs):
            say(f"GGUF, run {number + 1} of {runs}")
            for command in ways.values():
                command.run(target)
        rows = [(what.format(name), ways[name], ways["copy"]) for name in to]
        rows.append(("GGUF q8_0 to 2.2 GB of safetensors", ways["back"], ways["copy of back"]))
        for name, ours, copy in rows:
            table.row(name, f"cp -r {copy.time():.2f} s", f"{ours.time():.2f} s", f"{ours.time() / copy.time():.2f} x", goal, ours.time() <= 2 * copy.time())
            table.row("peak memory of it", "", f"{ours.peak() / MIB:.0f} MiB", "", "<= 256 MiB", ours.peak() <= 256 * MIB)
    except NotRun as why:
        table.absent(what.format("and back"), str(why), goal)
    finally:
        for path in (back, written, target):
            subprocess.run(["rm", "-rf", path], check=True)


def quantize_rows(table, lorakit, target, runs):
    """GGUF to GGUF, as llama-quantize does it, by as many threads as there are processors. It is slow, so that it runs once."""
    what, goal, model = "789 MB of float32 to {}", "<= 1/2", os.path.join(WORK, "f32.gguf")
    try:
        peer = llama_quantize()
        if not os.path.exists(model):
            say("writing a GGUF file of 789 MB")
            output(sys.executable, os.path.join(HERE, "gguf_model.py"), model + ".part")
            os.rename(model + ".part", model)
    except NotRun as why:
        table.absent(what.format("block types"), str(why), goal)
        return
    out = os.path.join(target, "model.gguf")
    for name, number in FILE_TYPES.items():
        say(f"{name} by llama-quantize and lorakit")
        theirs = Command(["mkdir", target], [peer, model, out, str(number), str(os.cpu_count())])
        ours = Command(["mkdir", target], [lorakit, "convert", model, out, "--quantize", name, "--progress", "none"])
        theirs.run(target)
        for _ in range(max(1, runs // 2)):
            ours.run(target)
        shutil.rmtree(target, ignore_errors=True)
        try:
            table.row(what.format(name), f"llama-quantize {theirs.time():.1f} s", f"{ours.time():.2f} s", f"1/{theirs.time() / ours.time():.1f}", goal,
                      2 * ours.time() <= theirs.time())
            table.row("peak memory of it", f"llama-quantize {theirs.peak() / MIB:.0f} MiB", f"{ours.peak() / MIB:.0f} MiB", "", "<= 256 MiB", ours.peak() <= 256 * MIB)
        except NotRun as why:
            table.absent(what.format(name), str(why), goal)


def key_rows(table, lorakit):
    """A file's keys. lorakit's time is that of its whole process, gguf-py's that of its reader alone."""
    what, file = "inspect a GGUF file of 150,000 tokens", os.path.join(WORK, "keys.gguf")
    try:
        reader = float(output(sys.executable, os.path.join(HERE, "gguf_keys.py"), file))
        ours = start_up(lorakit, "inspect", file)
    except NotRun as why:
        table.absent(what, str(why), ">= 10 x")
        return
    table.row(what, f"GGUFReader {reader:.2f} s", f"{ours * 1e3:.0f} ms", f"1/{reader / ours:.0f}", "<= 1/10", 10 * ours <= reader)
    table.row(what, "", f"{ours * 1e3:.0f} ms", "", "<= 50 ms", ours <= 0.050)


# The types of other tools that are measured, the peer of each, and how long lorakit may take to write it: the source is
# read once, by nvfp4 twice. Functions in a loop take minutes, so that they get every third linear, and lorakit all.
SCHEMES = {"fp8": ("transformers' functions, a third", 1.2), "mlx4": ("mlx-lm", 1.2),
           "w4a16": ("compressed-tensors' functions, a third", 1.2), "nvfp4": ("compressed-tensors' functions, a third", 1.8)}


def scheme_rows(table, lorakit, source, target, runs):
    """A checkpoint into the types of other tools, against a durable copy of it, and out of them again, against one of what
    is written then, which is as large. The peers are slow, so that they run once."""
    quiet, peer, folder = ["--progress", "none"], [sys.executable, os.path.join(HERE, "schemes.py")], os.path.join(WORK, "scheme")
    for name, (tool, most) in SCHEMES.items():
        # way: what it is called, how much longer than the copy it may take, where from, and with which flags
        ways = {"write": (f"2.2 GB to {name}", most, source, ["--quantize", name]),
                "read": (f"{name} to 2.2 GB of bf16", 1.2, folder, ["--quantize", "none"])}
        copy = Command(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", source, target])
        ours = {way: Command([lorakit, "convert", origin, target, *flags, *quiet]) for way, (_, _, origin, flags) in ways.items()}
        theirs = {way: Command([*peer, way, name, origin, target]) for way, (_, _, origin, _) in ways.items()}
        try:
            shutil.rmtree(folder, ignore_errors=True)
            output(lorakit, "convert", source, folder, "--quantize", name, *quiet)
            for number in range(runs):
                say(f"{name}, run {number + 1} of {runs}")
                for command in (copy, *ours.values()):
                    command.run(target)
            for command in theirs.values():
                say(f"{name} by {tool}")
                command.run(target)
        except NotRun as why:
            table.absent(f"2.2 GB to {name} and back", str(why), f"<= {most} x")
            continue
        finally:
            for path in (folder, target):
                shutil.rmtree(path, ignore_errors=True)
        for way, (what, most, _, _) in ways.items():
            try:
                seconds, durable, peak = ours[way].time(), copy.time(), ours[way].peak()
                table.row(what, f"cp -r + sync {durable:.2f} s", f"{seconds:.2f} s", f"{seconds / durable:.2f} x", f"<= {most} x", seconds <= most * durable)
                table.row("peak memory of it", "", f"{peak / MIB:.0f} MiB", "", "<= 256 MiB", peak <= 256 * MIB)
                other = theirs[way]
                table.row(what, f"{tool} {other.time():.1f} s, {other.peak() / MIB:.0f} MiB", f"{seconds:.2f} s", f"1/{other.time() / seconds:.1f}", "faster",
                          seconds < other.time())
            except NotRun as why:
                table.absent(what, str(why), f"<= {most} x")


def start_rows(table, lorakit, amn):
    ours = start_up(lorakit, "version")
    said = f"{ours * 1e3:.1f} ms"
    python = statistics.median(measure(sys.executable, "-c", "import transformers, bitsandbytes")[0] for _ in range(3))
    table.row("start", f"import transformers, bitsandbytes {python:.1f} s", said, "", "<= 20 ms", ours <= 0.020)
    if isinstance(amn, NotRun):
        table.absent("start", f"anamnesis: {amn}")
    else:
        rust = start_up(amn[0], "--version")
        table.row("start", f"anamnesis {rust * 1e3:.1f} ms", said, f"{ours / rust:.1f} x", "faster", ours < rust)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lorakit")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--runs", type=int, default=5, help="of what is fast; what is slow runs fewer times")
    parser.add_argument("--only", choices=["gguf", "schemes", "plugins", "adapters"], help="these rows alone")
    options = parser.parse_args()
    lorakit = os.path.abspath(options.lorakit)

    os.makedirs(WORK, exist_ok=True)
    source, target = checkpoint(), os.path.join(WORK, "out")
    if options.only:
        table = Table()
        rows = {"gguf": gguf_rows, "schemes": scheme_rows, "plugins": plugin_rows, "adapters": adapter_rows}
        rows[options.only](table, lorakit, source, target, options.runs)
        table.print(options.markdown)
        return
    amn = attempt(anamnesis)

    say("kernels on one core")
    ours = attempt(go_benchmarks)
    bnb = attempt(kernels, sys.executable, os.path.join(HERE, "bitsandbytes_kernels.py"))
    rust = amn if isinstance(amn, NotRun) else attempt(kernels, amn[1])

    convert = [lorakit, "convert", source, target, "--quantize", "nf4", "--progress", "none"]
    fast = {
        "lorakit": Command(convert),
        "lorakit, one thread": Command([*convert, "--threads", "1"]),
        "cp -r": Command(["cp", "-r", source, target]),
        "cp -r + sync": Command(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", source, target]),
    }
    shards = sorted(name for name in os.listdir(source) if name.endswith(".safetensors"))
    slow = {
        "transformers": Command([sys.executable, os.path.join(HERE, "transformers_nf4.py"), source, target]),
        "anamnesis": unavailable(str(amn)) if isinstance(amn, NotRun) else Command(
            ["mkdir", target], *([amn[0], "convert", os.path.join(source, s), "--to", "bnb-nf4", "-o", os.path.join(target, s)] for s in shards)),
    }
    for number in range(options.runs):
        say(f"whole checkpoints, run {number + 1} of {options.runs}")
        for command in fast.values():
            command.run(target)
        if number < max(1, options.runs // 2):
            for command in slow.values():
                command.run(target)
    shutil.rmtree(target, ignore_errors=True)

    table = Table()
    kernel_rows(table, ours, bnb, rust)
    product_rows(table)
    convert_rows(table, fast["lorakit"], fast["lorakit, one thread"], slow, {name: fast[name] for name in ("cp -r + sync", "cp -r")})
    memory_rows(table, lorakit, source, options.runs)
    start_rows(table, lorakit, amn)
    gguf_rows(table, lorakit, source, target, options.runs)
    scheme_rows(table, lorakit, source, target, options.runs)
    plugin_rows(table, lorakit, source, target, options.runs)
    adapter_rows(table, lorakit, source, target, options.runs)
    step_rows(table, lorakit, source, max(1, options.runs // 2))
    print(f"{platform.machine()}, {cpu()}, {os.cpu_count()} processors; medians of {options.runs} runs, of {max(1, options.runs // 2)} for transformers and anamnesis\n")
    table.print(options.markdown)


def cpu():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
