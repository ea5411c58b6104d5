"""Adapters of PEFT to GGUF and back: llama.cpp computes with them what PEFT computes, its converter makes the same file
where it makes the right one, and what comes back is the adapter."""
import functools
import json
import os
import zlib

import numpy
import peft
import torch

import gguf_files
import gguf_tiny
import llama_converters
import peers
from command import Failure

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# name: the base of gguf_tiny, what PEFT is told, and whether llama.cpp's converter makes of it what PEFT means. None: it
# does, but llama.cpp has no adapters there.
CASES = {
    "llama": ("llama", {"target_modules": ATTENTION + MLP}, True),
    "llama in ranks": ("llama", {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 3}, "lora_alpha": 3}, True),
    "llama, scaled by rsLoRA": ("llama", {"target_modules": ATTENTION + MLP, "use_rslora": True}, False),
    "llama, scaled by patterns": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 3},
                                            "alpha_pattern": {"v_proj": 40, "q_proj": 5}}, False),
    "mistral, embedding": ("mistral", {"target_modules": ["embed_tokens", "q_proj"]}, True),
    "qwen2, head": ("qwen2", {"target_modules": ["lm_head", "k_proj"]}, True),
    "qwen2moe": ("qwen2moe", {"target_modules": ["q_proj", "shared_expert.up_proj", "shared_expert.down_proj"]}, True),
    "qwen3": ("qwen3", {"target_modules": ATTENTION + MLP}, True),
    "qwen3moe": ("qwen3moe", EXPERTS, False),
    "mixtral": ("mixtral", EXPERTS, False),
    "gemma2": ("gemma2", {"target_modules": ATTENTION + MLP}, True),
    "gemma3": ("gemma3", {"target_modules": ATTENTION + MLP}, True),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}, True),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, False),
    "stablelm": ("stablelm", {"target_modules": ATTENTION + MLP}, True),
    "smollm3": ("smollm3", {"target_modules": ATTENTION + MLP}, True),
    "granite": ("granite", {"target_modules": ATTENTION + MLP}, True),
    "olmo2": ("olmo2", {"target_modules": ATTENTION + MLP}, True),
    "cohere2": ("cohere2", {"target_modules": ATTENTION + MLP}, True),
    "gptoss": ("gptoss", {"target_modules": ATTENTION}, True),
    "deepseek3": ("deepseek3", {"target_modules": ["o_proj"]}, True),
    "deepseek3, latents": ("deepseek3", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"]}, None),
    "bert": ("bert", {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": "pooler.*"}, True),
}
# Adapters of random numbers make larger values than their bases have.
NEAR, TABLES = 3e-5, 2e-2


def adapted(source, case):
    """The base with an adapter of random numbers, in float32."""
    _, told, _ = CASES[case]
    model = peft.get_peft_model(peers.load(source)[0], peft.LoraConfig(**{"r": 8, "lora_alpha": 20, **told})).eval()
    random = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(case.encode())))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.15 * torch.from_numpy(random.standard_normal(tuple(parameter.shape), dtype=numpy.float32)))
    return model


def save(model, source, folder):
    model.save_pretrained(folder)
    path = os.path.join(folder, "adapter_config.json")
    with open(path) as file:
        config = {**json.load(file), "base_model_name_or_path": source}
    with open(path, "w") as file:
        json.dump(config, file, indent=2)


def outputs(model, name):
    with torch.no_grad():
        out = [model(input_ids=torch.tensor([ids])) for ids in gguf_tiny.PROMPTS]
    return [o.last_hidden_state[0] if name == "bert" else o.logits[0, -1] for o in out]


@functools.cache
def peers_side(work):
    """By case, the adapter's folder, PEFT's outputs with it, and the converter's file."""
    sources, _ = gguf_tiny.peers_side(work)
    made, jobs = {}, []
    for number, (case, (base, _, _)) in enumerate(CASES.items()):
        folder = os.path.join(work, f"adapter-{number}")
        model = adapted(sources[base], case)
        save(model, sources[base], folder)
        made[case] = [folder, outputs(model, base), folder + ".gguf"]
        jobs.append({"script": "lora", "argv": [folder, "--base", sources[base], "--outfile", folder + ".gguf", "--outtype", "f32"]})
    for answer, error in zip(made.values(), llama_converters.run(jobs)):
        answer.append(error)
    return made


def convert(lorakit, source, base, suffix=""):
    return lorakit.convert(source, "--base", base, suffix=suffix)


def check(lorakit, case):
    base, _, right = CASES[case]
    sources, models = gguf_tiny.peers_side(lorakit.work)
    folder, want, other, error = peers_side(lorakit.work)[case]
    file, said = convert(lorakit, folder, sources[base], ".gguf"), []
    if right is not False:
        if error:
            raise Failure(f"llama.cpp's converter: {error}")
        count = gguf_files.same(file, other, "against llama.cpp's converter")
        said.append(f"{count} tensors as llama.cpp converts them")

    if right is not None:
        distance = gguf_tiny.computed(models[base, "f32"][0], base, want, file)
        if not distance < (TABLES if base in gguf_tiny.WITH_TABLES else NEAR):
            raise Failure(f"llama.cpp's logits with the adapter are {distance:.1e} from PEFT's")
        said.append(f"its logits {distance:.0e} from PEFT's")

    back = convert(lorakit, file, sources[base])
    model = peft.PeftModel.from_pretrained(peers.load(sources[base])[0], back).eval()
    distance = gguf_tiny.distance(outputs(model, base), want)
    if not distance < 1e-5:
        raise Failure(f"PEFT's logits with the adapter that came back are {distance:.1e} away")
    said.append("back with PEFT's logits")
    return ", ".join(said)


def checks(lorakit):
    for case in CASES:
        yield f"gguf adapter: {case}", functools.partial(check, lorakit, case)
