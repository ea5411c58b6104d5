#!/usr/bin/env python3
"""Writes models/testdata/originals.json: what diffusers' own converters make of the checkpoints of other authors, module
by module. The authors' modules are those of kohya-ss/sd-scripts, built on the meta device; each weight is a column that
numbers its rows, so what comes out of a converter says where it is from.

    python originals.py SD_SCRIPTS ../testdata/originals.json

with sd-scripts at 48d368fa and the packages of requirements-diffusers.txt.
"""

import json
import os
import re
import sys
from unittest.mock import MagicMock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers  # before torchvision is a mock
from diffusers.loaders import single_file_utils as single

STEP = 1 << 20  # more than any weight has rows


def models(folder):
    """sd-scripts' models, whose helpers are not needed to build them."""
    sys.path.insert(0, folder)
    for name in ("einops", "library.utils", "library.device_utils", "library.custom_offloading_utils", "torchvision"):
        sys.modules[name] = MagicMock()
    from library import flux_models, sd3_models, sdxl_original_unet

    with torch.device("meta"):
        unet = sdxl_original_unet.SdxlUNet2DConditionModel()
        yield "the U-Net of Stable Diffusion", unet, lambda sd: single.convert_ldm_unet_checkpoint(
            {single.LDM_UNET_KEY + k: v for k, v in sd.items()},
            dict(layers_per_block=2, addition_embed_type="text_time"),
        )
        flux = flux_models.Flux(flux_models.configs["dev"].params)
        yield "Flux.1", flux, single.convert_flux_transformer_checkpoint_to_diffusers
        medium = sd3_models.SD3Params(
            patch_size=2,
            depth=24,
            num_patches=147456,
            pos_embed_max_size=384,
            adm_in_channels=2048,
            qk_norm="rms",
            x_block_self_attn_layers=list(range(13)),
            context_embedder_in_features=4096,
            context_embedder_out_features=1536,
            model_type="3-5-medium",
        )
        yield "Stable Diffusion 3", sd3_models.create_sd3_mmdit(
            medium
        ), single.convert_sd3_transformer_checkpoint_to_diffusers


def wan():
    """Wan's modules by name; sd-scripts has none."""
    blocks = {f"self_attn.{n}": (8, 8) for n in "qkvo"} | {
        f"cross_attn.{n}": (8, 8) for n in ("q", "k", "v", "o", "k_img", "v_img")
    }
    shapes = {
        f"blocks.{i}.{n}": s for i in range(2) for n, s in (blocks | {"ffn.0": (24, 8), "ffn.2": (8, 24)}).items()
    }
    shapes |= {
        "patch_embedding": (8, 16, 1, 2, 2),
        "text_embedding.0": (8, 4),
        "text_embedding.2": (8, 8),
        "time_embedding.0": (8, 6),
        "time_embedding.2": (8, 8),
        "time_projection.1": (48, 8),
        "img_emb.proj.1": (12, 12),
        "img_emb.proj.3": (8, 12),
        "head.head": (64, 8),
    }
    return shapes


def flux2():
    """Flux.2's modules by name; sd-scripts has none."""
    double = {
        f"{s}_{n}": shape
        for s in ("img", "txt")
        for n, shape in {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.0": (48, 8), "mlp.2": (8, 24)}.items()
    }
    shapes = {f"double_blocks.{i}.{n}": s for i in range(2) for n, s in double.items()}
    shapes |= {
        f"single_blocks.{i}.{n}": s for i in range(3) for n, s in {"linear1": (72, 8), "linear2": (8, 32)}.items()
    }
    shapes |= {
        "img_in": (8, 16),
        "txt_in": (8, 12),
        "final_layer.adaLN_modulation.1": (16, 8),
        "final_layer.linear": (16, 8),
    }
    shapes |= {f"{n}_in.{layer}": (8, 8) for n in ("time", "guidance") for layer in ("in_layer", "out_layer")}
    return shapes | {
        f"{n}.lin": (48, 8)
        for n in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
    }


def traced(shapes, extra, convert):
    """What a converter makes of each module: the modules of diffusers with where their rows come from."""
    order = sorted(shapes)
    state = {}
    for i, name in enumerate(order):
        rows = shapes[name][0]
        state[f"{name}.weight"] = (torch.arange(rows, dtype=torch.float64) + i * STEP)[:, None]
        state[f"{name}.bias"] = torch.zeros(rows)
    made = {name: [] for name in order}
    for key, value in convert(state | extra).items():
        if not key.endswith(".weight") or value is None or value.dtype != torch.float64:
            continue
        rows = value[:, 0].long()
        name = order[rows[0] // STEP]
        at = 0
        while at < len(rows):  # runs of rows that lie behind each other in both
            end = at + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            made[name].append(
                dict(
                    module=key.removesuffix(".weight"),
                    first=int(rows[at] % STEP),
                    rows=end - at,
                    at=at,
                    own=len(rows),
                )
            )
            at = end
    return [
        dict(module=name, out=shapes[name][0], **{"in": shapes[name][1]}, shares=made[name])
        for name in order
        if made[name]
    ]


def few(modules):
    """Those of the first and the last of equal blocks."""
    kept = {}
    for m in modules:
        name = m["module"]
        if "transformer_blocks." in name:  # of the U-Net, where the blocks around them are no equal ones
            pattern, number = re.sub(r"(transformer_blocks)\.\d+", r"\1.#", name), int(
                re.search(r"transformer_blocks\.(\d+)", name)[1]
            )
            if number:
                continue
        else:
            pattern, number = re.sub(r"(blocks)\.\d+", r"\1.#", name) if "put_blocks" not in name else name, 0
            number = int(re.search(r"\.(\d+)", name)[1]) if pattern != name else 0
        kept.setdefault(pattern, {})[number] = m
    return [
        m for found in kept.values() for m in {min(found): found[min(found)], max(found): found[max(found)]}.values()
    ]


def main(folder, out):
    result = []
    for family, model, convert in models(folder):
        shapes, extra = {}, {}
        for name, p in model.state_dict().items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and p.ndim >= 2:
                shapes[module] = tuple(p.shape)
        for name, p in model.state_dict().items():
            if name.removesuffix(".weight").removesuffix(".bias") not in shapes:
                extra[name] = torch.zeros(p.shape)
        with torch.device("cpu"):
            result.append(dict(family=family, modules=traced(shapes, extra, convert)))
    result.append(dict(family="Wan", modules=traced(wan(), {}, single.convert_wan_transformer_to_diffusers)))
    result.append(
        dict(family="Flux.2", modules=traced(flux2(), {}, single.convert_flux2_transformer_checkpoint_to_diffusers))
    )
    lines = [
        json.dumps(dict(family=f["family"]))[:-1]
        + ', "modules": [\n'
        + ",\n".join(json.dumps(m) for m in few(f["modules"]))
        + "\n]}"
        for f in result
    ]
    with open(out, "w") as file:
        file.write('{"diffusers": "%s", "families": [\n%s\n]}\n' % (diffusers.__version__, ",\n".join(lines)))
    print({f["family"]: len(few(f["modules"])) for f in result})


if __name__ == "__main__":
    main(*sys.argv[1:])
