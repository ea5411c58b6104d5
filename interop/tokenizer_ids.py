"""Whether two folders make the same ids of text, for the checks of GGUF and by itself:
tokenizer_ids.py FOLDER OTHER [FOLDER OTHER...]

Texts are encoded by the library that each file is for, and by transformers, which needs protobuf for a tokenizer.model.
No text has an added token with a ▁ in it: GGUF has a space there, so that it stands for another text.
"""
import functools
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

TEXTS = ["model weight adapter 2024 3.14", "don't they're I'll  été naïve\n\n\tread", "<think>tensor<|im_user|> shard",
         "1234567 ABCdef's", "", " ", "   lead and trail  ", "<s> </s><|end|> <tool>x", "▁▁ ▁",
         "e\u0301 \u00e9 \u212b", "漢字かなカナ 12 한국어", "🙂👍🏽 \u200d\ufe0f", "THE [MASK] Héad ##ing unaffable [SEP]",
         "\r\n \n\n", "x" * 70, "\x00\x01\x7f", "train trained retraining adapters' they'LL'S"]


class Unlike(Exception):
    """The folders differ."""


def file_encoders(folder, special):
    """what encodes text by one of the folder's files, as the library does that the file is for"""
    if os.path.exists(folder + "/tokenizer.model"):
        import sentencepiece

        spm = sentencepiece.SentencePieceProcessor(model_file=folder + "/tokenizer.model")
        return lambda text: spm.encode(text, add_bos=special)
    file = tokenizer(folder)
    return lambda text: file.encode(text, add_special_tokens=special).ids


def tokenizer(folder):
    """a tokenizer.json, without the lengths that some have in it, which GGUF has not"""
    from tokenizers import Tokenizer

    file = Tokenizer.from_file(folder + "/tokenizer.json")
    file.no_padding()
    file.no_truncation()
    return file


def pair_encoders(folder):
    file = tokenizer(folder)
    return lambda text: file.encode(text, "read the weight").ids


@functools.cache
def whole(folder):
    """all of a folder's files, as transformers puts them together"""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def transformers_encoders(folder, special):
    return lambda text: whole(folder).encode(text, add_special_tokens=special)


def same(folder, other, classes=True):
    """raises Unlike where a text becomes other ids; returns the number of comparisons. Without classes transformers is
    not asked, which takes another class where config.json names another model"""
    n = 0
    kinds = [(f"{make.__name__.split('_')[0]} {'with' if special else 'without'} special tokens",
              lambda d, make=make, special=special: make(d, special))
             for make in (file_encoders, transformers_encoders)[:2 if classes else 1] for special in (False, True)]
    if os.path.exists(folder + "/tokenizer.json") and os.path.exists(other + "/tokenizer.json"):
        kinds.append(("pairs", pair_encoders))
    for what, make in kinds:
        x, y = make(folder), make(other)
        for text in TEXTS:
            n += 1
            if x(text) != y(text):
                raise Unlike(f"{what}: {text[:30]!r} is {x(text)[:12]} in {folder}, {y(text)[:12]} in {other}")
    return n


def named(folder):
    """the ids of the tokens that the folder's files have; transformers adds some of its own"""
    path = folder + "/tokenizer_config.json"
    own = json.load(open(path)) if os.path.exists(path) else {}
    ids = {int(id) for id in own.get("added_tokens_decoder", {})}
    if os.path.exists(folder + "/tokenizer.model"):
        import sentencepiece

        return ids | set(range(len(sentencepiece.SentencePieceProcessor(model_file=folder + "/tokenizer.model"))))
    file = json.load(open(folder + "/tokenizer.json"))
    return ids | {a["id"] for a in file["added_tokens"]} | set(file["model"]["vocab"].values())


def decoded(folder, other):
    """raises Unlike where ids become other text; returns the number of ids"""
    x, y = whole(folder), whole(other)
    ids = named(folder)
    for id in sorted(ids):
        if x.decode([id]).replace("▁", " ") != y.decode([id]).replace("▁", " "):
            raise Unlike(f"id {id} is {x.decode([id])!r} in {folder}, {y.decode([id])!r} in {other}")
    return len(ids)


if __name__ == "__main__":
    bad = 0
    for folder, other in zip(sys.argv[1::2], sys.argv[2::2]):
        try:
            print(f"ok   {folder}: {same(folder, other)} texts, {decoded(folder, other)} ids")
        except Exception as error:  # a library that refuses a file raises whatever it likes
            bad += 1
            print(f"FAIL {folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    sys.exit(bad > 0)
