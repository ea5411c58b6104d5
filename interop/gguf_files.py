"""GGUF files as gguf-py reads them, and folders that come back of them."""
import os

import numpy
import torch
import transformers
from gguf import GGUFReader

import peers
from command import Failure

# Of general.*, these say what a file is; the others come from names of folders and model cards.
GENERAL = ("architecture", "type", "file_type", "quantization_version", "alignment")
MEMBERS = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size head_dim sliding_window
    max_position_embeddings rms_norm_eps layer_norm_eps layer_norm_epsilon rope_parameters tie_word_embeddings
    num_local_experts num_experts num_experts_per_tok moe_intermediate_size n_embd n_layer n_head n_positions layer_types
    no_rope_layers query_pre_attn_scalar q_lora_rank kv_lora_rank n_group topk_group eos_token_id
    attention_bias mlp_bias use_qkv_bias hidden_act hidden_activation activation_function""".split()


def keys(reader):
    """The keys with their types and values, but those of general.* that are free."""
    found = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name.startswith("general.") and name.removeprefix("general.") not in GENERAL:
            continue
        value = field.contents()
        found[name] = ("/".join(t.name for t in field.types), value.tolist() if hasattr(value, "tolist") else value)
    return found


def same_keys(got, want, what, without=()):
    """Fails unless both readers have the same keys, but those that begin with one of `without`."""
    got, want = ({k: v for k, v in keys(r).items() if not k.startswith(tuple(without))} for r in (got, want))
    for name in sorted(set(got) | set(want)):
        if name not in got or name not in want:
            raise Failure(f"{what}: key {name} is {'missing' if name in want else 'too many'}: {str((want | got)[name])[:60]}")
        (kind, g), (other, w) = got[name], want[name]
        if kind != other:
            raise Failure(f"{what}: key {name} is of type {kind}, not {other}")
        if g != w:
            odd = next((i for i, (x, y) in enumerate(zip(g, w)) if x != y), min(len(g), len(w))) if isinstance(g, list) else None
            at = "" if odd is None else f"[{odd}]"
            g, w = (g, w) if odd is None else (g[odd:odd + 1], w[odd:odd + 1])
            raise Failure(f"{what}: key {name}{at} is {str(g)[:80]!r}, not {str(w)[:80]!r}")
    return len(got)


def same(got, want, what):
    """Fails unless gguf-py reads the same keys and tensors in both files; returns the number of tensors."""
    got, want = (r if isinstance(r, GGUFReader) else GGUFReader(r) for r in (got, want))
    same_keys(got, want, what)
    got, want = ({t.name: t for t in r.tensors} for r in (got, want))
    if set(got) != set(want):
        raise Failure(f"{what}: {len(set(want) - set(got))} tensors missing, {len(set(got) - set(want))} too many: {sorted(set(got) ^ set(want))[:3]}")
    for name, w in want.items():
        g = got[name]
        if g.tensor_type != w.tensor_type or g.shape.tolist() != w.shape.tolist():
            raise Failure(f"{what}: {name} is {g.tensor_type.name} {g.shape.tolist()}, not {w.tensor_type.name} {w.shape.tolist()}")
        if name == "rope_freqs.weight":  # powers, whose last bits are each library's own
            alike = numpy.allclose(g.data, w.data, rtol=2**-21, atol=0)
        else:
            alike = g.data.tobytes() == w.data.tobytes()
        if not alike:
            raise Failure(f"{what}: {name} ({g.tensor_type.name}): {int((g.data != w.data).sum())} of {w.data.size} {g.data.dtype} differ")
    return len(want)


def same_tensors(got, want, what, apart=lambda name: 0):
    """Fails unless both have the same tensors, whose values may be as far apart as is said of their names."""
    if set(got) != set(want):
        raise Failure(f"{what}: {len(set(want) - set(got))} tensors missing, {len(set(got) - set(want))} too many: {sorted(set(got) ^ set(want))[:3]}")
    for name, w in want.items():
        g = got[name]
        if g.dtype != w.dtype or g.shape != w.shape:
            raise Failure(f"{what}: {name} is {g.dtype} {list(g.shape)}, not {w.dtype} {list(w.shape)}")
        most = (g.float() - w.float()).abs().max().item()
        if not most <= apart(name):
            raise Failure(f"{what}: {name}: {int((g != w).sum())} of {w.numel()} values differ, by {most:.1e}")


def came_back(folder, source, dropped=()):
    """Fails unless the folder has the source's tensors, but for those whose names have one of `dropped` in them, and the
    source's config."""
    want = {k.removeprefix("language_model."): v for k, v in peers.tensors(source).items() if not any(d in k for d in dropped)}
    # what Gemma adds to its norms, 1, takes their smallest bits
    same_tensors(peers.tensors(folder), want, "back", lambda name: 2**-24 if "norm" in name else 0)
    got, want = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (folder, source))
    want = {**want, **want.get("text_config", {})}
    for member in MEMBERS:  # one that the source has not, GGUF may have: BERT's bos_token_id is that of [CLS] there
        if want.get(member) is not None and got.get(member) != want[member]:
            raise Failure(f"back: config.json: {member} is {str(got[member])[:80]}, not {str(want[member])[:80]}")
    return len(want)
