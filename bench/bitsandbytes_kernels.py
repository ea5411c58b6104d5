"""One thread of bitsandbytes: median GB/s of the bfloat16 side, `encode X` and `decode Y`."""
import statistics
import time

import bitsandbytes.functional as bnb
import torch

torch.set_num_threads(1)
weights = (torch.randn(4096, 4096) * 0.02).bfloat16()


def speed(call, runs):
    seconds = []
    for _ in range(runs + 1):  # the first is to warm up
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return weights.nbytes / statistics.median(seconds[1:]) / 1e9


packed, state = bnb.quantize_4bit(weights, quant_type="nf4")
print(f"encode {speed(lambda: bnb.quantize_4bit(weights, quant_type='nf4'), 5):.4f}")
print(f"decode {speed(lambda: bnb.dequantize_4bit(packed, state), 20):.4f}")
