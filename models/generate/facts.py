#!/usr/bin/env python3
"""Writes testdata/saved.json: for folders that transformers and bitsandbytes saved, the names and shapes of the source's tensors and
which of them were quantised, left out (tied) or kept: python facts.py OUT NAME=SOURCE,QUANTISED ..."""

import glob, json, struct, sys


def header(folder):
    out = {}
    for f in sorted(glob.glob(folder + "/*.safetensors")):
        with open(f, "rb") as g:
            h = json.loads(g.read(struct.unpack("<Q", g.read(8))[0]))
        h.pop("__metadata__", None)
        out.update(h)
    return out


cases = []
for arg in sys.argv[2:]:
    name, paths = arg.split("=")
    source, quantised = map(header, paths.split(","))
    config = json.load(open(paths.split(",")[0] + "/config.json"))
    tensors = {}
    for k, v in sorted(source.items()):
        state = "quantized" if k + ".absmax" in quantised else "kept" if k in quantised else "left out"
        tensors[k] = [state, v["shape"]]
    assert not [k for k in quantised if k not in source and ".weight." not in k], name
    skip = json.load(open(paths.split(",")[1] + "/config.json"))["quantization_config"]["llm_int8_skip_modules"]
    cases.append({"name": name, "config": config, "skip": skip, "tensors": tensors})
with open(sys.argv[1], "w") as f:
    f.write("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
