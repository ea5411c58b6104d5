"""Training steps of torch, transformers and PEFT on fresh random models, taken by `lorakit validate`: losses, every
gradient, the stepped adapter, and two checkpoints against each other."""
import functools
import json
import math
import os
import subprocess
import sys
import tempfile

import peers
import torch

from command import FIXTURES, Failure

STEPS = os.path.join(FIXTURES, "steps")
with open(os.path.join(STEPS, "results.json")) as results:
    KNOWN = json.load(results)
# Relative for losses, the norm and each gradient's own RMS; in units of lr for what was stepped; and for --against.
LOSS, NORM, GRADIENT, STEPPED, KL, LAYER = 1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 1e-4


@functools.cache
def fresh(work):
    """The cases of fixtures/steps with other values, and what the peers make of them. $LORAKIT_STEPS names another seed.
    Adam divides by a gradient's size: in one seed of ten some element that has next to none in a later step parts any
    two implementations in float32 by more than the bound. What gates a change has a seed without one."""
    seed = os.environ.get("LORAKIT_STEPS") or "c"
    folder = tempfile.mkdtemp(dir=work)
    argv = [sys.executable, os.path.join(FIXTURES, "generate", "steps.py"), folder, seed]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    if run.returncode:
        raise Failure(f"steps.py of seed {seed}: {run.stderr.strip()[-200:]}")
    print(f"     training steps of seed {seed}", flush=True)
    with open(os.path.join(folder, "results.json")) as file:
        return folder, json.load(file)


def validate(lorakit, base, batch, *arguments):
    """The JSON of lorakit validate."""
    data = os.path.join(tempfile.mkdtemp(dir=lorakit.work), "batch.jsonl")
    with open(data, "w") as file:
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            file.write(json.dumps(dict(input_ids=ids) if labels == ids else dict(input_ids=ids, labels=labels)) + "\n")
    argv = [lorakit.binary, "validate", base, "--data", data, "--json", *map(str, arguments)]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    if run.returncode:
        raise Failure(f"lorakit {' '.join(argv[1:])}: exit {run.returncode}: {run.stderr.strip()[-300:]}")
    return json.loads(run.stdout)


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


def near(what, got, want, limit):
    """How far a figure is off, relative."""
    error = abs(got - want) / abs(want)
    if not error <= limit:
        raise Failure(f"{what} {got}, PEFT has {want}")
    return error


def same(what, got, want):
    if got != want:
        raise Failure(f"{what} {got}, expected {want}")


def still(gradient):
    """Where a whole row or column has no gradient: tokens that do not occur, A where B is zero."""
    zero = gradient == 0
    if gradient.ndim < 2:
        return zero & zero.all()
    return zero & (zero.all(-1, keepdim=True) | zero.all(0, keepdim=True))


def check_step(lorakit, name):
    """The steps of one adapter. Adam divides by a gradient's size, so that of one near zero, beside those of its tensor,
    has a sign that may be noise: there only the length of the steps is bounded."""
    folder, facts = fresh(lorakit.work)
    want = facts["cases"][name]
    base, adapter, batch = os.path.join(folder, "bases", want["base"]), os.path.join(folder, name), facts["batches"][want["batch"]]
    out = tempfile.mkdtemp(dir=lorakit.work)
    saved, gradients = os.path.join(out, "adapter"), os.path.join(out, "gradients.safetensors")
    got = validate(lorakit, base, batch, "--adapter", adapter, "--steps", want["steps"], "--lr", want["lr"], "--save", saved, "--save-gradients", gradients)

    same("losses", len(got["losses"]), want["steps"])
    same("loss_before", got["loss_before"], got["losses"][0])
    worst = max(near(f"the loss of step {i + 1}", *pair, LOSS) for i, pair in enumerate(zip(got["losses"], want["losses"])))
    worst = max(worst, near("loss_after", got["loss_after"], want["loss_after"], LOSS))
    near("grad_norm", got["grad_norm"], want["grad_norm"], NORM)
    for key in ("trainable_parameters", "total_parameters"):
        same(key, got[key], want[key])
    same("frozen_unchanged", got["frozen_unchanged"], True)
    if not got["tokens_per_second"] > 0 or not got["peak_memory_bytes"] > 1 << 20:
        raise Failure(f"{got['tokens_per_second']} tokens/s, {got['peak_memory_bytes']} bytes")

    theirs = peers.tensors(f"{adapter}.safetensors")
    slopes = {k.removeprefix("gradient."): t for k, t in theirs.items() if k.startswith("gradient.")}
    stepped = {k.removeprefix("stepped."): t for k, t in theirs.items() if k.startswith("stepped.")}
    before, after, found = peers.tensors(adapter), peers.tensors(saved), peers.tensors(gradients)
    same("gradients of", sorted(found), sorted(slopes))
    same("tensors saved", sorted(after), sorted(before))
    steepest = furthest = 0
    for key, slope in slopes.items():
        same(f"shape of {key}", found[key].shape, slope.shape)
        error = rms(found[key] - slope)
        if not error <= GRADIENT * rms(slope) + 1e-9 * want["grad_norm"]:
            raise Failure(f"gradient of {key}: {error / max(rms(slope), 1e-30):.1e} of its RMS off")
        steepest = max(steepest, error / max(rms(slope), 1e-9 * want["grad_norm"]))
        off = after[key].double() - stepped[key].double()
        clear = (slope.abs() > 1e-3 * rms(slope)) | still(slope)
        error = rms(off[clear]) if clear.any() else 0
        if not error <= STEPPED * want["lr"] + 1.5e-7 * rms(stepped[key]):
            raise Failure(f"stepped {key}: {error / want['lr']:.1e} lr off")
        if not off.abs().max() <= 2.1 * want["lr"] * want["steps"]:
            raise Failure(f"stepped {key}: an element is {off.abs().max() / want['lr']:.1e} lr off")
        furthest = max(furthest, error / want["lr"])
    for key in set(before) - set(stepped):
        if not torch.equal(after[key], before[key]):
            raise Failure(f"{key} is a copy of the base's and has changed")
    check_config(adapter, saved)
    if want["b_zero"]:
        check_zero(validate(lorakit, base, batch)["loss_before"], got["loss_before"], want["dora"])
    return f"losses {worst:.0e}, gradients {steepest:.0e}, stepped {furthest:.0e} lr from PEFT's"


def check_config(adapter, saved):
    configs = []
    for folder in (adapter, saved):
        with open(os.path.join(folder, "adapter_config.json")) as file:
            configs.append(json.load(file))
    same("adapter_config.json", configs[1], configs[0])


def check_zero(base, adapted, dora):
    """With B zero an adapter changes nothing."""
    if adapted != base and not (dora and math.isclose(adapted, base, rel_tol=1e-6)):
        raise Failure(f"B is zero and the loss is {adapted}, the base's {base}")


def check_base(lorakit, name):
    """Without an adapter."""
    folder, facts = fresh(lorakit.work)
    want = next(case for case in facts["cases"].values() if case["base"] == name)
    got = validate(lorakit, os.path.join(folder, "bases", name), facts["batches"][want["batch"]])
    same("total_parameters", got["total_parameters"], want["total_parameters"] - want["trainable_parameters"])
    return f"loss {near('the loss', got['loss_before'], want['base_loss'], LOSS):.0e} from transformers'"


def check_against(lorakit, name):
    folder, facts = fresh(lorakit.work)
    want = facts["against"][name]
    base, other = (os.path.join(folder, "bases", want[key]) for key in ("base", "other"))
    batch = facts["batches"][want["batch"]]
    got = validate(lorakit, base, batch, "--against", other)["against"]
    near("loss", got["loss"], want["loss"], LOSS)
    near("other_loss", got["other_loss"], want["other_loss"], LOSS)
    error = near("kl", got["kl"], want["kl"], KL)
    positions = sum(map(len, batch["input_ids"]))
    if abs(got["top1"] - want["top1"]) > 1.01 / positions:  # one position may be a tie
        raise Failure(f"top1 {got['top1']}, expected {want['top1']}")
    same("layers", [layer["layer"] for layer in got["layers"]], list(range(len(want["layers"]))))
    worst = max(near(f"relative_error of layer {layer['layer']}", layer["relative_error"], relative, LAYER) for layer, relative in zip(got["layers"], want["layers"]))
    return f"kl {error:.0e}, layers {worst:.0e} from those of transformers"


def checks(lorakit):
    for base in dict.fromkeys(case["base"] for case in KNOWN["cases"].values()):
        yield f"validate {base}", functools.partial(check_base, lorakit, base)
    for name in KNOWN["cases"]:
        yield f"training step of {name}", functools.partial(check_step, lorakit, name)
    for name in KNOWN["against"]:
        yield f"validate {name}", functools.partial(check_against, lorakit, name)
