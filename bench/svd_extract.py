"""An adapter of rank 16 from the difference of two checkpoints by torch's svd_lowrank. Usage: svd_extract.py BASE TUNED DST"""
import glob
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

base, tuned, out = sys.argv[1:4]
rank = 16
tensors = {}
for path in sorted(glob.glob(base + "/*.safetensors")):
    with safe_open(path, "pt") as a, safe_open(os.path.join(tuned, os.path.basename(path)), "pt") as b:
        for name in sorted(a.keys()):
            if not name.endswith("_proj.weight"):
                continue
            u, s, v = torch.svd_lowrank(b.get_tensor(name).float() - a.get_tensor(name).float(), q=rank + 8, niter=2)
            root = s[:rank].sqrt()
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[module + ".lora_A.weight"] = (v[:, :rank] * root).T.contiguous()
            tensors[module + ".lora_B.weight"] = (u[:, :rank] * root).contiguous()
os.makedirs(out, exist_ok=True)
save_file(tensors, out + "/adapter_model.safetensors", metadata={"format": "pt"})
