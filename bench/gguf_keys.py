"""gguf-py on a file with a tokenizer of 150,000 tokens. Usage: gguf_keys.py FILE.gguf

Writes the file if it is not there, and prints the seconds that GGUFReader takes for it, the fastest of three."""
import os
import sys
import time

import numpy
from gguf import GGUFReader, GGUFWriter

TOKENS = 150_000


def write(path):
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(TOKENS)])
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges([f"a{i} b{i}" for i in range(TOKENS)])
    writer.add_tensor("token_embd.weight", numpy.zeros((16, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(path):
    if not os.path.exists(path):
        write(path + ".part")
        os.rename(path + ".part", path)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        GGUFReader(path)
        taken.append(time.perf_counter() - start)
    print(min(taken))


main(sys.argv[1])
