"""PEFT loads what `lorakit attach` makes, for every init and every kind of target, and has the same modules itself."""
import functools
import json
import os

import peers  # first: it sets the libraries up
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

import adapters
from adapters import IDS, apart, base_folder, beside, new, plain, run
from command import Failure

SAME = 1e-4  # relative error of logits in float32 where a part is taken out of the base and put back


def make(lorakit, base, init, target, rank=4, alpha=12):
    folder = new(lorakit)
    run(lorakit, "attach", base_folder(base), folder, "--rank", rank, "--alpha", alpha, "--target", target, "--init", init, "--seed", 5)
    with open(os.path.join(folder, "adapter_config.json")) as f:
        return folder, json.load(f)


def own(base, folder, config, **fields):
    """PEFT's own new adapter of the same kind, saved: its tensors and its config."""
    model = peft.get_peft_model(plain(base), peft.LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], task_type=config["task_type"], **fields))
    model.save_pretrained(folder)
    with open(os.path.join(folder, "adapter_config.json")) as f:
        return model, peers.tensors(folder), json.load(f)


def factors(model):
    """What scales and shapes every A and B that PEFT has made."""
    return {f"{name}.{getattr(m, 'parameter_name', 'weight')}": (m.r["default"], m.scaling["default"]) for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def check_target(lorakit, base, target, **fields):
    """The same tensors, ranks and scalings as PEFT's own, and the base's output."""
    folder, config = make(lorakit, base, "kaiming", target)
    model = beside(base, folder)
    theirs, tensors, saved = own(base, new(lorakit), config, **fields)
    mine = {k: tuple(t.shape) for k, t in peers.tensors(folder).items()}
    want = {k: tuple(t.shape) for k, t in tensors.items() if ".lora_" in k}
    if mine != want:
        raise Failure(f"other tensors than PEFT's: {sorted(set(mine.items()) ^ set(want.items()))[:3]}")
    if factors(model) != factors(theirs):
        raise Failure(f"other ranks or scalings: {sorted(set(factors(model).items()) ^ set(factors(theirs).items()))[:3]}")
    if set(config.get("target_parameters") or []) != set(saved["target_parameters"] or []):
        raise Failure(f"target_parameters {config.get('target_parameters')}, PEFT has {saved['target_parameters']}")
    if config["fan_in_fan_out"] != saved["fan_in_fan_out"]:
        raise Failure(f"fan_in_fan_out {config['fan_in_fan_out']}")
    got, before = peers.outputs(model, IDS)[1], peers.outputs(plain(base), IDS)[1]
    if not torch.equal(got, before):
        raise Failure(f"logits {apart(got, before):.1e} from the base's, expected the same")
    return f"{len(mine) // 2} pairs as PEFT's, the same logits"


def check_task(lorakit, base, head, task):
    """PEFT takes the adapter of a classifier for what it is, and the answer is the base's."""
    folder = new(lorakit)
    torch.manual_seed(5)
    getattr(transformers, head).from_pretrained(base_folder(base), dtype=torch.float32).save_pretrained(folder)
    base, answer = folder, lambda m: torch.cat([v.flatten() for v in m(input_ids=IDS, attention_mask=torch.ones_like(IDS)).values() if torch.is_tensor(v)])
    folder, config = make(lorakit, base, "kaiming", "all-linear")
    if config["task_type"] != task:
        raise Failure(f"task_type {config['task_type']}, expected {task}")
    before = answer(plain(base))
    model = peft.PeftModel.from_pretrained(plain(base), folder).eval()
    if not torch.equal(answer(model), before):
        raise Failure(f"the answer is {apart(answer(model), before):.1e} from the base's, expected the same")
    ours = {k: tuple(t.shape) for k, t in peers.tensors(folder).items()}
    if task in ("SEQ_CLS", "FEATURE_EXTRACTION"):  # for the others PEFT adapts the head and replaces it as well
        want = {k: tuple(t.shape) for k, t in own(base, new(lorakit), config, target_modules="all-linear")[1].items()}
        if ours != want:
            raise Failure(f"other tensors than PEFT's: {sorted(set(ours.items()) ^ set(want.items()))[:3]}")
    return f"{type(model).__name__}, {len(ours)} tensors, the same answer"


def check_decomposed(lorakit, base, init):
    """PEFT takes the adapter's part out of the base, so that the output is the base's, and starts from the same product itself."""
    folder, config = make(lorakit, base, init, "all-linear")
    if config["init_lora_weights"] != init:
        raise Failure(f"init_lora_weights {config['init_lora_weights']}")
    model = beside(base, folder)
    error = apart(peers.outputs(model, IDS)[1], peers.outputs(plain(base), IDS)[1])
    if not error <= SAME:
        raise Failure(f"logits {error:.1e} from the base's, at most {SAME:.0e}")
    named = {k.replace(".weight", ".default.weight"): t for k, t in peers.tensors(folder).items()}
    held = dict(model.named_parameters())
    if any(not torch.equal(held[k], t) for k, t in named.items()):
        raise Failure("PEFT holds other factors than the file has")
    theirs = peft.get_peft_model(plain(base), peft.LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], init_lora_weights=init, target_modules="all-linear"))
    ours, want = adapters.products(model), adapters.products(theirs)
    passed = [k for k in want if k not in ours]  # torch's own attention passes an adapter by, and the base would lose a part
    if any(not k.endswith("vision_tower.head.attention.out_proj") for k in passed):
        raise Failure(f"without {passed[:3]}")
    worst = adapters.compare(ours, {k: d for k, d in want.items() if k in ours}, SAME)
    return f"logits {error:.0e} from the base's, B A {worst:.0e} from PEFT's"


def check_trained(lorakit, base, init):
    """What PEFT computes once such an adapter has been trained is what the plain one makes of the base, that is combined of it and its start."""
    start, _ = make(lorakit, base, init, "all-linear")
    model = beside(base, start)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data += 0.3 * p.data.std() * peers.random(name, p.shape)
    trained, difference, merged = new(lorakit), new(lorakit), new(lorakit)
    model.save_pretrained(trained)
    want = peers.outputs(beside(base, trained), IDS)[1]
    run(lorakit, "combine", difference, f"{trained}=1", f"{start}=-1", "--type", "cat")
    run(lorakit, "merge", base_folder(base), difference, merged)
    errors = [apart(peers.outputs(beside(base, difference), IDS)[1], want), apart(adapters.checkpoint(merged), want)]
    if not max(errors) <= SAME:
        raise Failure(f"logits {errors} from PEFT's, at most {SAME:.0e}")
    return f"logits {max(errors):.0e} from PEFT's, combined and merged"


def check_conv1d_olora(lorakit):
    """PEFT's own olora does not turn Conv1D round; with the part taken out beforehand the output is the base's."""
    folder, config = make(lorakit, "tiny-gpt2", "olora", "all-linear")
    model = plain("tiny-gpt2")
    want = peers.outputs(plain("tiny-gpt2"), IDS)[1]
    tensors, modules, scale = peers.tensors(folder), dict(model.named_modules()), config["lora_alpha"] / config["r"]
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            if (b.T @ b - torch.eye(len(a))).abs().max() > 1e-5:
                raise Failure(f"{key}: B is not orthonormal")
            modules[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")].weight.data -= scale * (b @ a).T
    config["init_lora_weights"] = True
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f)
    error = apart(peers.outputs(peft.PeftModel.from_pretrained(model, folder).eval(), IDS)[1], want)
    if not error <= SAME:
        raise Failure(f"logits {error:.1e} from the base's, at most {SAME:.0e}")
    return f"logits {error:.0e} from the base's"


def check_loftq(lorakit, base):
    """The base in four bits and its adapter load, fit together, and are closer to the base than NF4 alone."""
    folder, config = make(lorakit, base, "loftq", "all-linear")
    if os.path.realpath(config["base_model_name_or_path"]) != os.path.realpath(os.path.join(folder, "base")):
        raise Failure(f"base_model_name_or_path {config['base_model_name_or_path']}")
    model, misfits = peers.load(os.path.join(folder, "base"))
    if misfits:
        raise Failure(f"keys that do not fit: {misfits[:2]}")
    products = adapters.products(peft.PeftModel.from_pretrained(model, folder).eval())
    alone, decoded = new(lorakit), []
    run(lorakit, "convert", base_folder(base), alone, "--quantize", "nf4", "--double-quant=false")
    for path in (alone, os.path.join(folder, "base")):  # bitsandbytes cannot decode rows that are no whole blocks on a CPU
        decoded.append(new(lorakit))
        run(lorakit, "convert", path, decoded[-1], "--quantize", "none", "--dtype", "f32")
    before, after = map(plain, decoded)
    errors = []
    for model, deltas in ((before, {}), (after, products)):
        off = whole = 0
        for name, w in plain(base).named_modules():
            if f"base_model.model.{name}" in products:
                got = model.get_submodule(name).weight.double()
                delta = deltas.get(f"base_model.model.{name}", torch.zeros(1, 1))
                delta = delta.T if isinstance(w, transformers.pytorch_utils.Conv1D) else delta
                off, whole = off + (got + delta - w.weight).square().sum(), whole + w.weight.double().square().sum()
        errors.append((off / whole).sqrt().item())
    if not errors[1] < 0.9 * errors[0]:
        raise Failure(f"errors without and with the adapter {errors}")
    return f"error {errors[0]:.4f} of NF4, {errors[1]:.4f} with the adapter"


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
TEXT = SMALL | dict(num_key_value_heads=2)
MOE = TEXT | dict(moe_intermediate_size=24, num_experts_per_tok=2)

# Where "all-linear" is more than the linear layers of a decoder.
ARCHITECTURES = {
    "T5ForConditionalGeneration": dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "WhisperForConditionalGeneration": dict(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    "DeepseekV3ForCausalLM": MOE | dict(num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
                                        kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1),
    "Glm4MoeForCausalLM": MOE | dict(n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
    "OlmoeForCausalLM": TEXT | dict(num_experts=4, num_experts_per_tok=2),
    "Qwen2MoeForCausalLM": MOE | dict(shared_expert_intermediate_size=24, num_experts=4),
    "GptOssForCausalLM": TEXT | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "Llama4ForCausalLM": TEXT | dict(intermediate_size_mlp=48, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1),
    "PhimoeForCausalLM": TEXT | dict(num_local_experts=4),
    "FalconForCausalLM": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "BloomForCausalLM": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "OPTForCausalLM": dict(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16),
    "RobertaForSequenceClassification": SMALL,
    "BertForMaskedLM": SMALL,
    "ViTForImageClassification": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8),
}


def check_architecture(lorakit, name):
    """The same tensors as PEFT's own all-linear, all of them taken up when they are loaded, and a merge that changes nothing."""
    cls, base = getattr(transformers, name), new(lorakit)
    cls(cls.config_class(**ARCHITECTURES[name])).save_pretrained(base)
    folder, config = make(lorakit, base, "kaiming", "all-linear", rank=2)
    theirs = own(base, new(lorakit), config, target_modules="all-linear")[1]
    ours = {k: tuple(t.shape) for k, t in peers.tensors(folder).items()}
    want = {k: tuple(t.shape) for k, t in theirs.items()}
    if ours != want:
        raise Failure(f"other tensors than PEFT's: {sorted(set(ours.items()) ^ set(want.items()))[:3]}")
    beside(base, folder)
    merged = new(lorakit)
    run(lorakit, "merge", base, folder, merged)
    before, after = peers.tensors(base), peers.tensors(merged)
    if any(not torch.equal(t, after[k]) for k, t in before.items()):
        raise Failure("a merge changes the base")
    return f"{len(ours)} tensors as PEFT's"


def check_compensate(lorakit, base):
    folder, _ = make(lorakit, base, "compensate", "attention", rank=8)
    beside(base, folder)
    return "loads in PEFT"


def checks(lorakit):
    for base in ("tiny-mixtral", "qwen3-moe", "tiny-gemma3", "tiny-gpt2", "phi3", "qwen2.5-vl"):
        yield f"attach all-linear to {base} as PEFT", functools.partial(check_target, lorakit, base, "all-linear", target_modules="all-linear")
    for base, names in (("tiny-mixtral", ["w1", "w2", "w3"]), ("qwen3-moe", ["gate_proj", "up_proj", "down_proj"]), ("qwen3-moe", ["down_proj", "q_proj"]),
                        ("qwen3-moe", ["mlp.gate_proj", "mlp.up_proj"]), ("qwen3-moe", ["gate"]), ("tiny-qwen3", ["embed_tokens"]),
                        ("llama", ["embed_tokens", "q_proj"]), ("tiny-gpt2", ["wte", "c_attn"]), ("llama", ["lm_head"]), ("tiny-qwen3", ["lm_head"])):
        yield f"attach {','.join(names)} to {base} as PEFT", functools.partial(check_target, lorakit, base, ",".join(names), target_modules=names)
    for pattern in (r".*mlp\.(gate|up|down)_proj",):
        yield f"attach {pattern} to qwen3-moe as PEFT", functools.partial(check_target, lorakit, "qwen3-moe", pattern, target_modules=pattern)
    for base, head, task in (("llama-score", "LlamaForSequenceClassification", "SEQ_CLS"), ("bert", "BertForSequenceClassification", "SEQ_CLS"),
                             ("bert", "BertForTokenClassification", "TOKEN_CLS"), ("bert", "BertModel", "FEATURE_EXTRACTION"),
                             ("llama", "LlamaForQuestionAnswering", "QUESTION_ANS")):
        yield f"attach to a {head}", functools.partial(check_task, lorakit, base, head, task)
    for name in ARCHITECTURES:
        yield f"attach all-linear to a {name}", functools.partial(check_architecture, lorakit, name)
    for base, init in (("tiny-llama", "pissa"), ("tiny-llama", "olora"), ("tiny-gpt2", "pissa"), ("tiny-gemma3", "pissa"), ("tiny-gemma3", "olora"), ("phi3", "olora")):
        yield f"attach --init {init} to {base}", functools.partial(check_decomposed, lorakit, base, init)
    for base, init in (("tiny-llama-f32", "pissa"), ("tiny-llama-f32", "olora")):
        yield f"trained from {init} on {base}, less its start", functools.partial(check_trained, lorakit, base, init)
    yield "attach --init olora to tiny-gpt2", functools.partial(check_conv1d_olora, lorakit)
    for base in ("tiny-llama", "tiny-gpt2", "tiny-gemma3"):
        yield f"attach --init loftq to {base}", functools.partial(check_loftq, lorakit, base)
    for base in ("tiny-llama", "tiny-mixtral", "qwen3-moe", "tiny-gpt2", "tiny-gemma3"):
        yield f"attach --init compensate to {base}", functools.partial(check_compensate, lorakit, base)
