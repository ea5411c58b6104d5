"""Adapters in other dialects, and in other layouts of experts: what lorakit makes of them loads in PEFT, every key used, and
answers as the adapter that they were made from."""
import functools
import json
import os

import peft
import torch
import peers
from adapters import ADAPTERS, CLOSE, Failure, IDS, RESULTS, apart, beside, new, plain, run

with open(os.path.join(ADAPTERS, "dialects", "results.json")) as results:
    DIALECTS = json.load(results)
ENDS = {"kohya": ".safetensors", "loralib": ".pt"}


def answers(base, folder, original):
    """How far the logits of two adapters are apart."""
    error = apart(peers.outputs(beside(base, folder), IDS)[1], peers.outputs(beside(base, os.path.join(ADAPTERS, original)), IDS)[1])
    if error > CLOSE:
        raise Failure(f"logits {error:.1e} from those of {original}, at most {CLOSE:.0e}")
    return f"logits {error:.0e} from those of {original}"


def check_file(lorakit, name):
    """A file of another tool, made PEFT's."""
    facts = DIALECTS[name]
    folder = new(lorakit)
    alpha = ["--alpha", facts["alpha"]] if "alpha" in facts else []
    run(lorakit, "convert", os.path.join(ADAPTERS, "dialects", facts["file"]), folder, "--to", "peft", *alpha)
    return answers(facts["base"], folder, facts["same_as"])


def check_there_and_back(lorakit, name, dialect, *flags):
    """PEFT -> another tool's file -> PEFT."""
    middle, folder = new(lorakit) + ENDS.get(dialect, ""), new(lorakit)
    made = json.loads(run(lorakit, "convert", os.path.join(ADAPTERS, name), middle, "--to", dialect, "--json", *flags).stdout)
    alpha = []
    if dialect == "loralib":
        alpha = ["--alpha", made["notices"][-1].split()[-1]]
        if not all(isinstance(t, torch.Tensor) for t in torch.load(middle, weights_only=True).values()):
            raise Failure("torch.load gives something other than tensors")
    run(lorakit, "convert", middle, folder, "--to", "peft", *alpha)
    return answers(RESULTS["adapters"][name]["base"], folder, name)


def check_layout(lorakit, name, experts):
    """Experts in another layout load in PEFT and answer the same."""
    folder = new(lorakit)
    run(lorakit, "convert", os.path.join(ADAPTERS, name), folder, "--experts", experts)
    original = RESULTS["adapters"][name].get("same_as", name)
    return answers(RESULTS["adapters"][name]["base"], folder, original)


def checks(lorakit):
    for name, facts in DIALECTS.items():
        if "same_as" in facts:
            yield f"{name} made PEFT's", functools.partial(check_file, lorakit, name)
    for name in ("llama/attention", "llama/patterns", "llama/rslora", "tiny-gpt2/attention", "tiny-gemma3/language", "phi3/fused"):
        for dialect in ("loralib", "kohya", "mlx"):
            yield f"{name} to {dialect} and back", functools.partial(check_there_and_back, lorakit, name, dialect)
    for name in ("llama/dora", "llama/embedding-head", "tiny-mixtral/experts", "qwen3-moe/all-linear"):
        yield f"{name} to mlx and back", functools.partial(check_there_and_back, lorakit, name, "mlx")
    for name in RESULTS["adapters"]:
        if name.split("/")[0] in ("tiny-mixtral", "qwen3-moe"):
            for experts in ("per-expert", "fused"):
                if name.endswith("gate-up-only") and experts == "per-expert":
                    continue  # PEFT takes single experts only where gate, up and down are there
                yield f"{name} with experts {experts}", functools.partial(check_layout, lorakit, name, experts)
