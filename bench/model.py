"""Writes the benchmark's checkpoint: 1.1 B parameters in bfloat16 under TinyLlama's shapes, random weights, three
shards. Usage: model.py FOLDER"""
import json
import os
import sys

import torch
import transformers
from safetensors.torch import save_file

SHARDS = 3


def main(folder):
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(folder)
    total = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    random = torch.Generator().manual_seed(1)
    where, shard, size = {}, {}, 0
    number = 1
    for name, shape in shapes.items():
        shard[name] = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=random).bfloat16()
        size += shard[name].nbytes
        if size >= total * number / SHARDS or name == list(shapes)[-1]:
            file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
            save_file(shard, os.path.join(folder, file), metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as index:  # last: its presence says the folder is whole
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, index, indent=2)


main(sys.argv[1])
