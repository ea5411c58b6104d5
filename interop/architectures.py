"""Tiny models of many architectures, made here. extract's adapter between a model and one whose matrices have changed is
the change in PEFT and in a merge; and adapters of many kinds, which PEFT draws up and saves, merge to what PEFT computes
with them beside the base."""
import functools
import os
import random
import re

import peers  # first: it sets the libraries up
import peft
import torch
import transformers as T
from transformers.pytorch_utils import Conv1D

from adapters import SVD, Failure, apart, new, run

CLOSE = 2e-5  # relative error of logits in float32: small norms and DoRA's divisions add to the order of sums
WORDS = 40
TEXT = dict(vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
ENCODER = dict(vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
PAIR = dict(vocab_size=WORDS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT)),
    "llama, tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT)),
    "qwen3-moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8, moe_intermediate_size=12)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**TEXT, num_local_experts=4)),
    "deepseek-v3": lambda: T.DeepseekV3ForCausalLM(T.DeepseekV3Config(
        **TEXT | dict(num_key_value_heads=2), moe_intermediate_size=12, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)),
    "granite-moe": lambda: T.GraniteMoeForCausalLM(T.GraniteMoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "phi-moe": lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**TEXT, pad_token_id=0)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**TEXT)),
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**TEXT, head_dim=8)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "gpt-neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**ENCODER)),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2)),
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=8)),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**ENCODER)),
    "distilbert": lambda: T.DistilBertForMaskedLM(T.DistilBertConfig(vocab_size=WORDS, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=64)),
    "deberta": lambda: T.DebertaForMaskedLM(T.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)),
    "deberta-v2": lambda: T.DebertaV2ForMaskedLM(T.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**PAIR, max_position_embeddings=64)),
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(
        **PAIR, num_mel_bins=8, max_source_positions=20, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4, num_labels=3)),
}


def answer(model):
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        if model.config.model_type == "vit":
            return model(pixel_values=peers.random("pixels", (2, 3, 16, 16))).logits
        if model.config.model_type == "whisper":
            return model(input_features=peers.random("features", (1, 8, 40)), decoder_input_ids=ids).logits
        if model.config.is_encoder_decoder:
            return model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
        return model(input_ids=ids).logits


def base(name, folder):
    """A new model, saved, and loaded again so that PEFT knows its folder."""
    T.set_seed(0)
    model = MODELS[name]()
    model.tie_weights()
    with torch.no_grad():
        for key, x in model.named_parameters():
            noise = peers.random(f"{name} {key}", x.shape)
            x.copy_(noise / x[0].numel() ** 0.5 if x.ndim > 1 else x + 0.05 * noise)
    model.save_pretrained(folder)
    return load(model, folder)


def load(model, folder):
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    misfits = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if misfits:
        raise Failure(f"transformers: {len(misfits)} keys missing, unexpected or mismatched: {misfits[:2]}")
    return loaded.eval()


def check_extract(lorakit, name):
    work = os.path.dirname(new(lorakit))
    model = base(name, f"{work}/base")
    matrices = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding, Conv1D))]
    with torch.no_grad():
        for key, x in model.named_parameters():
            if any(x is w for w in matrices) or x.ndim == 3 and ".experts." in key or re.search(r"(gate|router)\.weight$", key):
                x.add_(peers.random(f"tuned {key}", x.shape) * 0.2 / x[0].numel() ** 0.5)
    model.save_pretrained(f"{work}/tuned")
    want = answer(model)
    run(lorakit, "extract", f"{work}/base", f"{work}/tuned", f"{work}/adapter", "--energy", 1)
    run(lorakit, "merge", f"{work}/base", f"{work}/adapter", f"{work}/merged")
    run(lorakit, "resize", f"{work}/adapter", f"{work}/resized", "--energy", 1)
    run(lorakit, "merge", f"{work}/base", f"{work}/resized", f"{work}/again")
    beside = [peft.PeftModel.from_pretrained(load(model, f"{work}/base"), f"{work}/{adapter}").eval() for adapter in ("adapter", "resized")]
    worst = max(apart(answer(m), want) for m in [*beside, load(model, f"{work}/merged"), load(model, f"{work}/again")])
    if not worst <= SVD:
        raise Failure(f"logits {worst:.1e} from the tuned model's, at most {SVD:.0e}")
    return f"logits {worst:.0e} from the tuned model's"


def draw(dice, model):
    """Settings of an adapter."""
    modules = [(n, m) for n, m in model.named_modules() if n]
    linear = [n for n, m in modules if type(m) in (torch.nn.Linear, Conv1D)]
    words = [n for n, m in modules if type(m) is torch.nn.Embedding and "position" not in n and "rel_" not in n]
    leaves = sorted({n.split(".")[-1] for n in linear})
    some = lambda names: dice.sample(names, dice.randint(1, len(names)))  # noqa: E731
    s = dict(r=dice.choice([1, 2, 3, 4, 8]), lora_alpha=dice.choice([1, 2, 4, 5, 16]))
    s["target_modules"] = dice.choice([
        lambda: some(leaves), lambda: some(linear), lambda: [".".join(n.split(".")[-2:]) for n in some(linear)],
        lambda: rf".*\.({'|'.join(map(re.escape, some(leaves)))})", lambda: "all-linear"])()
    names = isinstance(s["target_modules"], list)
    if names and words and dice.random() < 0.3:
        s["target_modules"].append(dice.choice(words).split(".")[-1])
    if dice.random() < 0.3:
        s["use_rslora"] = True
    if dice.random() < 0.25:
        s["use_dora"] = True
    if dice.random() < 0.25:
        s["bias"] = dice.choice(["all", "lora_only"])
    if dice.random() < 0.35:
        s["rank_pattern"] = {dice.choice(leaves): dice.choice([1, 2, 5])}
    if dice.random() < 0.35:
        s["alpha_pattern"] = {dice.choice(dice.choice([linear, leaves])): dice.choice([3, 7, 32])}
    if names and dice.random() < 0.3:
        s["layers_to_transform"] = dice.choice([0, 1, [0], [0, 1]])
        if dice.random() < 0.4:
            s["layers_pattern"] = dice.choice(["layers", "layer", "h", ["layers", "h", "block"]])
    if dice.random() < 0.3:
        s["exclude_modules"] = dice.choice([dice.sample(leaves, 1), r".*\.0\..*", dice.sample(linear, 1)])
    if dice.random() < 0.25:
        s["modules_to_save"] = [dice.choice([n for n, m in modules if type(m) is torch.nn.Linear or "norm" in n.lower() and next(m.parameters(), None) is not None]).split(".")[-1]]
    head = model.get_output_embeddings()
    if words and head is not None and head.bias is None and dice.random() < 0.2:  # PEFT forgets a head's bias
        s["trainable_token_indices"] = dice.sample(range(3, 30), 3)
    experts = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n]
    if experts and not s.get("use_dora") and dice.random() < 0.5:
        s["target_parameters"] = sorted({".".join(n.split(".")[-2:]) for n in some(experts)})
    if dice.random() < 0.2:
        s["ensure_weight_tying"] = True
    return s


def check_drawn(lorakit, name, count):
    merged, worst = 0, 0
    for seed in range(count):
        work = os.path.dirname(new(lorakit))
        model = base(name, f"{work}/base")
        settings = draw(random.Random(f"{name} {seed}"), model)
        try:
            beside = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
            with torch.no_grad():
                for key, x in beside.named_parameters():
                    if x.requires_grad:
                        x.add_(peers.random(f"{seed} {key}", x.shape) * 0.1)
            want = answer(beside)
            beside.save_pretrained(f"{work}/adapter")
            peft.PeftModel.from_pretrained(load(model, f"{work}/base"), f"{work}/adapter")
        except Failure:
            raise
        except Exception:  # not one that PEFT makes, runs and loads
            continue
        run(lorakit, "merge", f"{work}/base", f"{work}/adapter", f"{work}/merged")
        error = apart(answer(load(model, f"{work}/merged")), want)
        if not error <= CLOSE:
            raise Failure(f"{settings}: logits {error:.1e} from PEFT's, at most {CLOSE:.0e}")
        merged, worst = merged + 1, max(worst, error)
    if not merged:
        raise Failure(f"none of {count} drawn adapters is one that PEFT makes")
    return f"{merged} adapters, logits {worst:.0e} from PEFT's"


def checks(lorakit):
    for name in MODELS:
        yield f"extract the change of {name}", functools.partial(check_extract, lorakit, name)
    for name in MODELS:
        yield f"merge drawn adapters into {name}", functools.partial(check_drawn, lorakit, name, 4)
