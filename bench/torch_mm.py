"""Prints as JSON how fast torch multiplies float32 matrices with one thread: GFLOP/s, the fastest of several calls.

For AVX2 alone, set MKL_ENABLE_INSTRUCTIONS=AVX2 and ATEN_CPU_CAPABILITY=avx2.
"""

import json
import time

import torch


def rate(a, b, c, seconds=1.0):
    """GFLOP/s of c += a·b, the fastest call within about the given time."""
    best, end = float("inf"), time.perf_counter() + seconds
    torch.addmm(c, a, b, out=c)
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.addmm(c, a, b, out=c)
        best = min(best, time.perf_counter() - start)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / best / 1e9


def product(m, k, n, transposed=False):
    """a is m x k, transposed in memory if asked for."""
    a = torch.randn(k, m).T if transposed else torch.randn(m, k)
    return round(rate(a, torch.randn(k, n), torch.zeros(m, n)), 1)


def main():
    torch.set_num_threads(1)
    skinny = {f"{m}x{k}x{n}": product(m, k, n) for n in (2048, 5632) for m in (128,) for k in (1, 4, 8, 16, 32, 64, 256)}
    skinny["2048x5632x24"] = product(2048, 5632, 24)
    skinny["5632x2048x24 transposed"] = product(5632, 2048, 24, transposed=True)
    print(json.dumps({"gflops_1024": product(1024, 1024, 1024), "gflops_2048": product(2048, 2048, 2048), "skinny": skinny}))


if __name__ == "__main__":
    main()
