"""Models of every architecture that GGUF is written for, made here, to GGUF and back: llama.cpp's converter makes the
same file, llama.cpp computes from it what transformers computes from the folder, and what comes back is the folder."""
import functools
import json
import os
import shutil
import zlib

import numpy
import torch
import transformers

import gguf_files
import llama_converters
import llama_server
import peers
import tokenizer_ids
from command import FIXTURES, Failure

SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 2,
         "num_hidden_layers": 3, "max_position_embeddings": 256}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
# name: what is changed of fixtures/gguf-models/NAME's config.
KINDS = {
    "llama": {"head_dim": 32, "attention_bias": True},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
    "mistral": {"head_dim": 32},
    "mixtral": {**EXPERTS, "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen2moe": {**EXPERTS, "shared_expert_intermediate_size": 160},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    "gemma3vl": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
    "phi3": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                                 "original_max_position_embeddings": 32, "long_factor": [1.5 + n / 8 for n in range(8)],
                                 "short_factor": [1 + n / 16 for n in range(8)]}, "original_max_position_embeddings": 32},
    "gpt2": {"n_embd": 128, "n_head": 8, "n_layer": 3, "n_positions": 256, "n_ctx": 256},
    "stablelm": {"use_qkv_bias": True},
    "smollm": {"tie_word_embeddings": False},
    "smollm3": {"num_hidden_layers": 5, "tie_word_embeddings": False},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "olmo2": {"num_key_value_heads": 8},
    "cohere2": {"num_hidden_layers": 5, "sliding_window": 16, "logit_scale": 0.5},
    "gptoss": {**EXPERTS, "head_dim": 32, "sliding_window": 16},
    "deepseek3": {"num_key_value_heads": 8, "n_routed_experts": 8, "moe_intermediate_size": 96, "q_lora_rank": 48,
                  "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "qk_head_dim": 48, "v_head_dim": 32,
                  "first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
                  "scoring_func": "sigmoid"},
    "bert": {},
}
# The names of pre-tokenizers, which the converter cannot know of tiny vocabularies. Of names that cut text the same,
# lorakit takes one, and has to be told another.
PRE = {"bert": "jina-v2-en", "cohere2": "command-r", "deepseek3": "deepseek-v3", "gpt2": "gpt-2", "gptoss": "gpt-4o",
       "granite": "refact", "llama3": "llama-bpe", "olmo2": "dbrx", "qwen2": "qwen2", "qwen2moe": "qwen2",
       "qwen3": "qwen2", "qwen3moe": "qwen2", "smollm": "smollm", "smollm3": "smaug-bpe", "stablelm": "stablelm2"}
TYPES = {"f32": ["--dtype", "f32"], "bf16": ["--dtype", "bf16"], "q8_0": ["--quantize", "q8_0"]}
CLASSES = {"bert": transformers.AutoModel, "gemma3vl": transformers.AutoModelForImageTextToText}
# What GGUF has no place for
LOST = {"gemma3vl": ("vision", "multi_modal"), "bert": ("pooler",)}
# A Mistral comes back as the Llama that it is to llama.cpp
OTHER_CLASS = ("mistral",)
# llama.cpp takes GELU, and some of what gpt-oss has, from tables of float16
NEAR, TABLES = 1e-5, 2e-3
WITH_TABLES = ("bert", "gemma2", "gemma3", "gemma3vl", "gpt2", "gptoss")
# Ids of every kind, past the windows and past what Phi-3 takes its short factors for
PROMPTS = [[(7 + 31 * n + 5 * n * n) % 300 + 4 for n in range(length)] for length in (33, 40, 48)]
CONTEXT = 64


def members(name):
    """The config of a model: that of the fixture, in another shape, and the members that only files have."""
    with open(os.path.join(FIXTURES, "gguf-models", name, "config.json")) as file:
        config = json.load(file)
    text = config.get("text_config", config)
    for member in ("layer_types", "no_rope_layers", "head_dim"):
        text.pop(member, None)
    changes = {**({} if "n_embd" in text else SMALL), **KINDS[name]}
    text.update({k: v for k, v in changes.items() if k in text or k == "head_dim"})
    # without these the converter fails, or llama.cpp takes another router
    kept = {k: v for k, v in {**config, **changes}.items() if k in ("rotary_pct", "n_ctx", "scoring_func")}
    return {k: v for k, v in config.items() if k not in kept}, kept


def build(name, folder):
    """A checkpoint with the tokenizer of the fixture; every parameter is far enough from its start to be seen."""
    config, kept = members(name)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    torch.manual_seed(zlib.crc32(name.encode()))
    dtype = torch.float16 if name == "gpt2" else torch.bfloat16
    model = CLASSES.get(name, transformers.AutoModelForCausalLM).from_config(config)
    random = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(b"gguf" + name.encode())))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.06 * torch.from_numpy(random.standard_normal(tuple(parameter.shape), dtype=numpy.float32))
    model.to(dtype).save_pretrained(folder)
    with open(os.path.join(folder, "config.json")) as file:
        saved = {**json.load(file), **kept}
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(saved, file, indent=2)
    tokenizer = os.path.join(FIXTURES, "tokenizers", name)
    for file in os.listdir(tokenizer):
        if file not in ("config.json", "keys.json"):
            shutil.copy(os.path.join(tokenizer, file), folder)


def converted(sources):
    """What llama.cpp's converter makes of the folders, by name and type: paths, and what it said where it failed."""
    jobs = [(name, kind, os.path.join(folder + "-" + kind + ".gguf")) for name, folder in sources.items() for kind in TYPES]
    said = llama_converters.run([{"script": "hf", "pre": PRE.get(name), "argv": [sources[name], "--outfile", file, "--outtype", kind]}
                                 for name, kind, file in jobs])
    return {(name, kind): (file, error) for (name, kind, file), error in zip(jobs, said)}


@functools.cache
def peers_side(work):
    """The models, and the converter's files of them; made once for all checks."""
    sources = {}
    for number, name in enumerate(KINDS):
        # GGUF has the folder's name, of which llama.cpp makes something where a "phi3" is in it
        sources[name] = os.path.join(work, f"model-{number}")
        build(name, sources[name])
    return sources, converted(sources)


def logits(folder, name):
    """By transformers in float32: for each prompt the last position's, or BERT's hidden states."""
    model, misfits = peers.load(folder)
    # the vision tower of a folder that came back is not there, nor is BERT's pooler
    misfits = [m for m in misfits if not str(m).startswith("pooler.")]
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    with torch.no_grad():
        out = [model(input_ids=torch.tensor([ids])) for ids in PROMPTS]
    return [o.last_hidden_state[0] if name == "bert" else o.logits[0, -1] for o in out]


def distance(got, want):
    """How far apart, relative to how far the numbers spread that are wanted."""
    return max(((g - w).norm() / (w - w.mean()).norm()).item() for g, w in zip(got, want))


def computed(file, name, want, adapter=None):
    """How far llama.cpp's numbers of a file are from transformers' outputs."""
    asked = {"file": file, "adapter": adapter, "prompts": PROMPTS, "context": CONTEXT}
    if name == "bert":
        return distance([torch.tensor(g) for g in llama_server.ask(**asked, hidden=True)["hidden"]], want)
    return likely(llama_server.ask(**asked, most=len(want[0])), want)


def likely(answer, want):
    """How far the logarithms of probabilities in llama.cpp's answer are from those of the logits."""
    got, ids = [torch.tensor(g) for _, g in answer["likely"]], [i for i, _ in answer["likely"]]
    return distance(got, [torch.log_softmax(w, -1)[i] for w, i in zip(want, ids)])


def check(lorakit, name):
    sources, others = peers_side(lorakit.work)
    source, said = sources[name], []
    files = {}
    for kind, flags in TYPES.items():
        if name == "smollm3":
            flags = [*flags, "--pre-tokenizer", PRE[name]]
        files[kind] = lorakit.convert(source, *flags, suffix=".gguf")
        other, error = others[name, kind]
        if error:
            raise Failure(f"llama.cpp's converter to {kind}: {error}")
        count = gguf_files.same(files[kind], other, f"{kind} against llama.cpp's converter")
    said.append(f"{count} tensors as llama.cpp converts them")

    want = logits(source, name)
    away = computed(files["f32"], name, want)
    if not away < (TABLES if name in WITH_TABLES else NEAR):
        raise Failure(f"llama.cpp's logits of the f32 file are {away:.1e} from transformers' of the folder")
    said.append(f"its logits {away:.0e} away")

    dtype = "f16" if name == "gpt2" else "bf16"
    back = lorakit.convert(files["f32"], "--dtype", dtype)
    gguf_files.came_back(back, source, LOST.get(name, ()))
    away = distance(logits(back, name), want)
    if not away < 1e-5:
        raise Failure(f"transformers' logits of the folder that came back are {away:.1e} away")
    texts, ids = tokenizer_ids.same(back, source, name not in OTHER_CLASS), tokenizer_ids.decoded(back, source)
    said.append(f"back with the same logits, {texts} texts, {ids} ids")
    return ", ".join(said)


def checks(lorakit):
    for name in KINDS:
        yield f"gguf of {name}", functools.partial(check, lorakit, name)
