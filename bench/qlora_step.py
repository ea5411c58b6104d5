"""What a user of PEFT and bitsandbytes runs as one QLoRA step: forward, backward and AdamW, in float32, with gradient
checkpointing. A base in 16 bit is put in NF4 on the way in. Prints as JSON the seconds of loading and of the step, the
first after loading, and the step's loss.
Usage: qlora_step.py BASE ADAPTER DATA.jsonl THREADS"""
import json
import sys
import time

start = time.perf_counter()

import bitsandbytes.nn.modules
import peft
import torch
import transformers

base, adapter, data, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
# On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights for a kernel of lesser precision.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False

with open(data) as file:
    ids = torch.tensor([json.loads(line)["input_ids"] for line in file])
if hasattr(transformers.AutoConfig.from_pretrained(base), "quantization_config"):
    settings = {}
else:
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings = dict(quantization_config=nf4)
model = transformers.AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.float32, **settings)
for module in model.modules():
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        module.compute_dtype = torch.float32
model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=dict(use_reentrant=False))
model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
model.config.use_cache = False
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
loaded = time.perf_counter()

loss = model(input_ids=ids, labels=ids).loss
loss.backward()
optimizer.step()
print(json.dumps({"load": loaded - start, "step": time.perf_counter() - loaded, "loss": loss.item()}))
