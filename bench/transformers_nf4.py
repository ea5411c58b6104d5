"""What a user of transformers runs to put a checkpoint in NF4. Usage: transformers_nf4.py SRC DST"""
import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu", quantization_config=settings).save_pretrained(sys.argv[2])
