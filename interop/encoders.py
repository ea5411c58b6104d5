"""Encoder-decoders, made here: PEFT trains an adapter beside each, lorakit merges it, and the merge answers as the
adapter's model does. PEFT's own merge of such an adapter is another function where ends of a tie differ."""
import functools
import os

import peers  # first: it sets the libraries up
import peft
import torch
import transformers as T

from adapters import CLOSE, apart, new, run
from command import Failure

VOCABULARY = 40
BART = dict(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64)
T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
MODELS = {
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)),
    "blenderbot": lambda: T.BlenderbotForConditionalGeneration(T.BlenderbotConfig(**BART)),
    "led": lambda: T.LEDForConditionalGeneration(T.LEDConfig(
        **BART, attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)),
    "m2m100": lambda: T.M2M100ForConditionalGeneration(T.M2M100Config(**BART)),  # no bias of the logits
    "marian": lambda: T.MarianMTModel(T.MarianConfig(**BART, pad_token_id=0, decoder_start_token_id=0)),
    "mbart": lambda: T.MBartForConditionalGeneration(T.MBartConfig(**BART)),
    "mvp": lambda: T.MvpForConditionalGeneration(T.MvpConfig(**BART)),
    "pegasus": lambda: T.PegasusForConditionalGeneration(T.PegasusConfig(**BART)),
}


def answer(model, rows):
    ids = torch.arange(3, rows)[None]
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits


def check(lorakit, name, grown, settings, auto):
    T.set_seed(0)
    work = os.path.dirname(new(lorakit))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.ndim > 1 and x.is_floating_point() and "embed_positions" not in key:
                x.copy_(peers.random(f"{name} {key}", x.shape) * (1 if key == "final_logits_bias" else 0.3))
    model.save_pretrained(f"{work}/base")
    model = type(model).from_pretrained(f"{work}/base").eval()  # PEFT saves what has grown where it knows the base's folder
    if grown:
        model.resize_token_embeddings(VOCABULARY + grown)
    linear = "q" if name == "t5" else "q_proj"
    targets = [linear, *settings.get("target_modules", [])]
    beside = peft.get_peft_model(model, peft.LoraConfig(**settings | dict(r=4, lora_alpha=8, target_modules=targets))).eval()
    with torch.no_grad():
        for key, x in beside.named_parameters():
            if x.requires_grad:
                x.add_(peers.random(f"{name} {key}", x.shape) * 0.2)
    want = answer(beside, VOCABULARY + grown)
    beside.save_pretrained(f"{work}/adapter", save_embedding_layers=auto)
    folder = new(lorakit)
    run(lorakit, "merge", f"{work}/base", f"{work}/adapter", folder)
    merged, info = type(model).from_pretrained(folder, output_loading_info=True)
    misfits = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    error = apart(answer(merged.eval(), VOCABULARY + grown), want)
    if not error <= CLOSE:
        raise Failure(f"logits {error:.1e} from PEFT's, at most {CLOSE:.0e}")
    return f"logits {error:.0e} from PEFT's"


def checks(lorakit):
    one, other = [1, 5, 7], [2, 5, 8]
    for settings in (
            dict(trainable_token_indices=one),
            dict(trainable_token_indices={"lm_head": one}),
            dict(trainable_token_indices={"shared": one, "lm_head": one}),
            dict(trainable_token_indices={"shared": one, "lm_head": other}),
            dict(trainable_token_indices={"shared": one, "encoder.embed_tokens": other}),
            dict(trainable_token_indices={"shared": one, "decoder.embed_tokens": other}),
            dict(trainable_token_indices={"shared": one, "embed_tokens": other}),
            dict(trainable_token_indices={"shared": one, "embed_tokens": other, "lm_head": [3, 4]}),
            dict(modules_to_save=["shared"]), dict(modules_to_save=["lm_head"]), dict(modules_to_save=["shared", "lm_head"]),
            dict(modules_to_save=["embed_tokens"]), dict(target_modules=["shared"]), dict(target_modules=["lm_head"]),
            dict(target_modules=["lm_head"], trainable_token_indices=one)):
        for name in ("t5", "bart"):
            yield f"merge into {name} of {settings}", functools.partial(check, lorakit, name, 0, settings, "auto")
    for settings in (  # whose input embedding is the encoder's
            dict(trainable_token_indices=one), dict(trainable_token_indices={"encoder.embed_tokens": one, "lm_head": other}),
            dict(trainable_token_indices=one, target_modules=["shared"]), dict(trainable_token_indices=one, target_modules=["lm_head"]),
            dict(trainable_token_indices={"decoder.embed_tokens": one}), dict(trainable_token_indices={"encoder.embed_tokens": one, "decoder.embed_tokens": other})):
        yield f"merge into marian of {settings}", functools.partial(check, lorakit, "marian", 0, settings, "auto")
    for name in MODELS:
        for settings in (dict(modules_to_save=["shared", "lm_head"]), dict(modules_to_save=["shared"]), dict(target_modules=["shared"]), {}):
            yield f"merge into {name} with a grown vocabulary of {settings}", functools.partial(check, lorakit, name, 3, settings, True if not settings else "auto")
