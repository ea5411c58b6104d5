"""Makes layout.jsonl and index.jsonl: what the reference implementations write, for the tests of Layout.

    pip install safetensors==0.8.0 huggingface_hub==2.4.0 transformers==5.24.0 torch numpy
    python generate.py

layout.jsonl: {"metadata", "tensors": [[name, dtype, shape]], "header" (base64 of the file before its data)} as safetensors writes it.
index.jsonl: {"tensors", "max", "shards": {file: base64 of its header}, "index" (its text or null), "parameters"}; the split is
huggingface_hub's, the files are as transformers' save_pretrained writes them. The first lines are models saved by it.
"""
import base64, glob, json, os, random, struct, tempfile

import huggingface_hub, safetensors, torch, transformers
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import TensorSpec, serialize

assert (safetensors.__version__, huggingface_hub.__version__, transformers.__version__) == ("0.8.0", "2.4.0", "5.24.0")
HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F8_E5M2": ("float8_e5m2", 1), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
          "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E8M0": ("float8_e8m0fnu", 1), "F4": ("float4_e2m1fn_x2", 0.5), "BOOL": ("bool", 1), "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
          "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1), "C64": ("complex64", 8)}
NAMES = ["a", "b", "A", "model.layers.0.weight", "model.layers.10.weight", "model.layers.2.weight", "", " ", "é", "e\u0301", "\U0001f600", '"', "\\", "/", "\b\f\n\r\t", "\x00\x01\x1f", "\x7f", "\u2028", "\ufeff", "\uffff", "日本", "z" * 70]


def size(dtype, shape):
    n = 1
    for d in shape:
        n *= d
    return int(n * DTYPES[dtype][1])


def write(tensors, metadata):
    def spec(d, s):
        # the writer takes the shape in bytes of a packed type and doubles the last dimension
        return TensorSpec(dtype=DTYPES[d][0], shape=[*s[:-1], s[-1] // 2] if d == "F4" else s, data_ptr=ZEROS.data_ptr(), data_len=size(d, s))
    data = serialize({n: spec(d, s) for n, d, s in tensors}, metadata)
    return data[:8 + struct.unpack("<Q", data[:8])[0]]


ZEROS = torch.zeros(1 << 16, dtype=torch.uint8)


def b64(b):
    return base64.b64encode(b).decode()


def some(r, names):
    out = []
    for n in names:
        d = r.choice(list(DTYPES))
        s = [r.choice([0, 1, 2, 3, 7, 16]) for _ in range(r.choice([0, 1, 2, 2, 3]))]
        if d == "F4":
            s = [*s, r.choice([0, 2, 6])]
        out.append([n, d, s])
    return out


def layouts(r):
    yield None, []
    yield {}, [["w", "BF16", [2, 3]]]  # with no tensor the reference writes {},"__metadata__":{}}, which it cannot read itself
    yield {"format": "pt"}, [["w", "BF16", [2, 3]]]
    yield None, [[d.lower(), d, [2]] for d in DTYPES]  # every type, so the whole order
    yield {"format": "pt"}, [[n, "U8", [i]] for i, n in enumerate(NAMES)]
    for n in NAMES:
        yield {n: n}, [["w", "I8", [1]]]
    for _ in range(30):
        yield r.choice([None, {"format": "pt"}, {"k": "é\n"}]), some(r, r.sample(NAMES, r.randrange(1, len(NAMES))))


def saved(model, most):
    with tempfile.TemporaryDirectory() as d:
        model.save_pretrained(d, max_shard_size=most)
        shards, index = {}, None
        for f in sorted(glob.glob(d + "/*.safetensors")):
            b = open(f, "rb").read()
            shards[os.path.basename(f)] = b64(b[:8 + struct.unpack("<Q", b[:8])[0]])
        if os.path.exists(d + "/model.safetensors.index.json"):
            index = open(d + "/model.safetensors.index.json").read()
        wanted = set()
        for f in glob.glob(d + "/*.safetensors"):
            with safetensors.safe_open(f, "pt") as s:
                wanted |= set(s.keys())
    tensors = [[k, {torch.bfloat16: "BF16", torch.float32: "F32"}[v.dtype], list(v.shape)] for k, v in model.state_dict().items() if k in wanted]
    return {"tensors": tensors, "max": most, "shards": shards, "index": index, "parameters": model.num_parameters()}


def splits(r):
    cfg = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    torch.manual_seed(0)
    for most in (1000, 3000, 5_000_000):
        yield saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**cfg)).bfloat16(), most)
        yield saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**cfg, tie_word_embeddings=True)), most)
    for _ in range(40):
        tensors = some(r, r.sample(NAMES, r.randrange(1, len(NAMES))))
        by = {n: (d, s) for n, d, s in tensors}
        most = r.choice([1, 8, 50, 100, 1000, 1 << 40])
        split = split_state_dict_into_shards_factory(by, get_storage_size=lambda t: size(*t), filename_pattern="model{suffix}.safetensors", max_shard_size=most)
        parameters = r.randrange(1, 1 << 40)
        index = {"metadata": {"total_parameters": parameters, **split.metadata}, "weight_map": split.tensor_to_filename}  # as modeling_utils.py
        yield {"tensors": tensors, "max": most, "shards": {f: b64(write([[n, *by[n]] for n in ns], {"format": "pt"})) for f, ns in split.filename_to_tensors.items()},
               "index": json.dumps(index, indent=2, sort_keys=True) + "\n" if split.is_sharded else None, "parameters": parameters}


def main():
    r = random.Random(5)
    with open(os.path.join(HERE, "layout.jsonl"), "w") as f:
        for metadata, tensors in layouts(r):
            f.write(json.dumps({"metadata": metadata, "tensors": tensors, "header": b64(write(tensors, metadata))}) + "\n")
    with open(os.path.join(HERE, "index.jsonl"), "w") as f:
        for line in splits(r):
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
