"""A PEFT adapter of rank 16 on all linears of a checkpoint, with random values. Usage: adapter.py BASE OUT"""
import glob
import json
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

base, out = sys.argv[1:3]
rank = 16
torch.manual_seed(1)
tensors = {}
for path in sorted(glob.glob(base + "/*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            shape = file.get_slice(name).get_shape()
            if len(shape) == 2 and name.endswith("_proj.weight"):
                module = "base_model.model." + name.removesuffix(".weight")
                tensors[module + ".lora_A.weight"] = torch.randn(rank, shape[1]) * 0.02
                tensors[module + ".lora_B.weight"] = torch.randn(shape[0], rank) * 0.02
os.makedirs(out, exist_ok=True)
save_file(tensors, out + "/adapter_model.safetensors", metadata={"format": "pt"})
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "bias": "none", "base_model_name_or_path": base,
          "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
with open(out + "/adapter_config.json", "w") as file:
    json.dump(config, file)
