"""Adapters of PEFT's other methods: AdaLoRA, LoHa, LoKr, VeRA and IA3. A merge answers as PEFT does with the adapter beside the base,
and what is made plain LoRA of one loads in PEFT, every key used, and answers the same."""
import functools
import json
import os

import peers
import peft.tuners.boft.layer as boft
import torch
from adapters import ADAPTERS, CLOSE, Failure, IDS, apart, base_folder, beside, checkpoint, new, run

OTHERS = os.path.join(ADAPTERS, "others")
with open(os.path.join(OTHERS, "results.json")) as results:
    FACTS = json.load(results)
LORA = ("AdaLoraConfig", "LoHaConfig", "LoKrConfig")


class Butterfly:
    """Stands for PEFT's CUDA kernel, without which BOFT has one butterfly factor: it makes block-diagonal matrices of blocks."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*torch.unbind(one)) for one in blocks])]


def want(name):
    """PEFT's logits. AdaLoRA's own model adds to the loss, so the base's is asked."""
    kernel = Butterfly if "butterfly" in name else None
    boft.get_fbd_cuda = lambda: kernel
    return peers.outputs(beside(FACTS[name]["base"], os.path.join(OTHERS, name)).get_base_model(), IDS)[1]


def check_merge(lorakit, name):
    folder = new(lorakit)
    run(lorakit, "merge", base_folder(FACTS[name]["base"]), os.path.join(OTHERS, name), folder, "--dtype", "f32")
    error = apart(checkpoint(folder), want(name))
    if error > CLOSE:
        raise Failure(f"logits {error:.1e} from PEFT's, at most {CLOSE:.0e}")
    kept = json.loads(run(lorakit, "verify", folder, "--base", base_folder(FACTS[name]["base"]), "--adapter", os.path.join(OTHERS, name), "--json").stdout)
    return f"logits {error:.0e} from PEFT's, kept {least(kept):.4f}"


def least(value):
    """The smallest kept share in a report."""
    if isinstance(value, dict):
        found = [least(v) for v in value.values()] + ([value["kept"]] if isinstance(value.get("kept"), float | int) else [])
    else:
        found = [least(v) for v in value] if isinstance(value, list) else []
    return min(found, default=float("inf"))


def check_convert(lorakit, name):
    folder = new(lorakit)
    run(lorakit, "convert", os.path.join(OTHERS, name), folder, "--to", "peft")
    error = apart(peers.outputs(beside(FACTS[name]["base"], folder), IDS)[1], want(name))
    if error > CLOSE:
        raise Failure(f"logits {error:.1e} from those of {name}, at most {CLOSE:.0e}")
    return f"logits {error:.0e} from those of {name}"


def checks(lorakit):
    for name, facts in FACTS.items():
        if "adapters" in facts or not facts["merged"]:
            continue
        if facts.get("apart"):
            continue  # PEFT's own merge is another model than its adapter
        yield f"{name} merged", functools.partial(check_merge, lorakit, name)
        if facts["type"] in LORA and facts["base"] not in ("resnet", "wav2vec2"):
            yield f"{name} as plain LoRA", functools.partial(check_convert, lorakit, name)
