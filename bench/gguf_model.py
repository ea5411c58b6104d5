"""Writes a GGUF file in float32 as large as a model that one quantises by hand: four layers of the benchmark's model and
5,120 tokens, 789 MB. Usage: gguf_model.py OUT.gguf"""
import sys

import numpy
from gguf import GGUFWriter

LAYERS, TOKENS, WIDTH, HIDDEN, HEADS, KV = 4, 5120, 2048, 5632, 32, 4


def main(path):
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(TOKENS)])
    writer.add_token_scores([float(-i) for i in range(TOKENS)])
    shapes = {"token_embd.weight": (TOKENS, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (TOKENS, WIDTH)}
    for i in range(LAYERS):
        for name, shape in {"attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH * KV // HEADS, WIDTH),
                            "attn_v": (WIDTH * KV // HEADS, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
                            "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}.items():
            shapes[f"blk.{i}.{name}.weight"] = shape
    random = numpy.random.default_rng(1)
    for name, shape in shapes.items():
        ones = len(shape) == 1
        writer.add_tensor(name, numpy.ones(shape, numpy.float32) if ones else random.standard_normal(shape, numpy.float32) * numpy.float32(0.02))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main(sys.argv[1])
