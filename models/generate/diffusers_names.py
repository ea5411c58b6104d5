#!/usr/bin/env python3
"""Writes models/diffusers.json: the names of all linear layers, convolutions and embeddings of diffusers' U-Nets and
transformers, with # for numbers, by the component of a pipeline that they are of: "unet" or "transformer".

Each class is built on the meta device from its default config, from the ones below where that does not build, and from
those that add modules:

    python diffusers_names.py ../diffusers.json    (packages: requirements-diffusers.txt)
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin

# No component that adapters are made for, or parts of others.
OTHERS = {
    "MotionAdapter",
    "PriorTransformer",
    "T5FilmDecoder",
    "UNet1DModel",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "DreamLiteTransformer2DModel",
    "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel",
}
UNETS = re.compile("UNet(?!.*Transformer)")

# Configs by class: the first stands for the default where that does not build, all are looked at.
CONFIGS = {
    "EasyAnimateTransformer3DModel": [dict(in_channels=16, out_channels=16, patch_size=2)],
    "HiDreamImageTransformer2DModel": [
        dict(patch_size=2, caption_channels=[32, 32], llama_layers=[0, 1], axes_dims_rope=(64, 32, 32))
    ],
    "HunyuanDiT2DModel": [dict(in_channels=4, patch_size=2)],
    "LatteTransformer3DModel": [
        dict(
            in_channels=4,
            out_channels=8,
            patch_size=2,
            num_layers=2,
            cross_attention_dim=1152,
            caption_channels=32,
            norm_type="ada_norm_single",
            num_embeds_ada_norm=1000,
            video_length=4,
        )
    ],
    "LuminaNextDiT2DModel": [dict(num_kv_heads=8)],
    "OmniGenTransformer2DModel": [
        dict(rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48})
    ],
    # SD 2 (linear projections), SDXL (added conditions), and the attention blocks of refiners and of class conditions
    "UNet2DConditionModel": [
        dict(use_linear_projection=True),
        dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=64,
            use_linear_projection=True,
        ),
        dict(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        dict(
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=64,
        ),
        dict(time_cond_proj_dim=32),
        dict(
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(64, 128),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        ),
    ],
    "FluxTransformer2DModel": [dict(guidance_embeds=True)],
    "SD3Transformer2DModel": [dict(dual_attention_layers=(0, 1))],
    "WanTransformer3DModel": [dict(image_dim=32, added_kv_proj_dim=32)],
    "HunyuanVideoTransformer3DModel": [
        dict(image_condition_type="token_replace"),
        dict(image_condition_type="latent_concat"),
    ],
    "PixArtTransformer2DModel": [dict(caption_channels=32, use_additional_conditions=True)],
    "QwenImageTransformer2DModel": [dict(guidance_embeds=True)],
    "CogVideoXTransformer3DModel": [dict(ofs_embed_dim=32)],
}


def classes():
    for package in ("diffusers.models.transformers", "diffusers.models.unets"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            module = importlib.import_module(f"{package}.{module.name}")
            for name, cls in sorted(vars(module).items()):
                own = inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.__name__
                if own and name not in OTHERS:
                    yield name, cls


def names(model):
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and name:
            yield re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def main(out):
    found = {"unet": set(), "transformer": set()}
    for name, cls in sorted(classes()):
        built = 0
        for config in [{}, *CONFIGS.get(name, [])]:
            try:
                with torch.device("meta"):
                    model = cls(**config)
            except Exception as e:
                if config:
                    raise ValueError(f"{name} with {config}") from e
                continue
            built += 1
            found["unet" if UNETS.search(name) else "transformer"].update(names(model))
        if not built:
            raise ValueError(f"{name} does not build from its default config; CONFIGS has none for it")
    with open(out, "w") as file:
        json.dump({"diffusers": diffusers.__version__, **{k: sorted(v) for k, v in found.items()}}, file, indent=0)
        file.write("\n")
    print({k: len(v) for k, v in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
