"""An adapter of rank 16 from the difference of two checkpoints by torch's svd_lowrank. Usage: svd_extract.py BASE TUNED DST"""
import glob
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

base, tuned, out = sys.argv[1:4]
rank = 16


def find(folder):
    """Tensor name -> its file: the two need not have the same shards."""
    found = {}
    for path in sorted(glob.glob(folder + "/*.safetensors")):
        file = safe_open(path, "pt")
        found |= {name: file for name in file.keys()}
    return found


tensors = {}
before, after = find(base), find(tuned)
for name in sorted(before):
    if not name.endswith("_proj.weight"):
        continue
    change = after[name].get_tensor(name).float() - before[name].get_tensor(name).float()
    u, s, v = torch.svd_lowrank(change, q=rank + 8, niter=2)
    root = s[:rank].sqrt()
    module = "base_model.model." + name.removesuffix(".weight")
    tensors[module + ".lora_A.weight"] = (v[:, :rank] * root).T.contiguous()
    tensors[module + ".lora_B.weight"] = (u[:, :rank] * root).contiguous()
os.makedirs(out, exist_ok=True)
save_file(tensors, out + "/adapter_model.safetensors", metadata={"format": "pt"})
