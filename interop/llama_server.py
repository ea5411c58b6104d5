"""llama.cpp itself, by xllamacpp, in a process of its own, which a file that it cannot take may end. Usage:
llama_server.py < JOBS

JOBS is a JSON list of objects: `file`, and what is asked of it: `texts` to be cut into tokens, `prompts` of ids, after
each of which the `most` probable tokens are wanted with the logarithms of their probabilities, or with `hidden` the
embeddings of all ids; and an `adapter`. Prints a JSON list of answers, or of what went wrong.
"""
import json
import os
import subprocess
import sys
import urllib.request


class Unread(Exception):
    """llama.cpp could not do what was asked of it."""


def ask(**job):
    """What llama.cpp answers to a job."""
    argv = [sys.executable, os.path.abspath(__file__)]
    done = subprocess.run(argv, input=json.dumps([job]), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Unread(f"llama.cpp: exit {done.returncode}: {done.stderr.strip()[-300:]}")
    answer = json.loads(done.stdout)[0]
    if "error" in answer:
        raise Unread(f"llama.cpp: {answer['error']}; {done.stderr.strip()[-300:]}")
    return answer


def serve(llama, job):
    params = llama.CommonParams()
    params.model.path = job["file"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = job.get("context", 128), 1, 0
    params.warmup = params.fit_params = False
    params.verbosity = 1
    params.port = 0  # any that is free
    # float32 wherever llama.cpp has it, since it is compared with transformers in float32
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = True
    if job.get("hidden"):
        params.embedding, params.pooling_type = True, llama.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.embd_normalize = -1
    if job.get("adapter"):
        adapter = llama.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = job["adapter"], 1.0
        params.lora_adapters = [adapter]
    server = llama.Server(params)

    def post(path, body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=300).read())

    answer = {}
    if "texts" in job:
        answer["tokens"] = [post("/tokenize", {"content": text, "add_special": job.get("special", True), "parse_special": True})["tokens"]
                            for text in job["texts"]]
    if job.get("hidden"):
        answer["hidden"] = [post("/embedding", {"content": ids})[0]["embedding"] for ids in job["prompts"]]
        return answer
    # It says nothing of a token that is a part of a character, so it is made to say this one; the logarithms are those
    # before any bias.
    whole = post("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    for ids in job.get("prompts", ()):
        said = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": job["most"], "temperature": -1,
                                    "cache_prompt": False, "logit_bias": [[whole, 1e6]]})
        likely = said["completion_probabilities"][0]["top_logprobs"]
        answer.setdefault("likely", []).append([[token["id"] for token in likely], [token["logprob"] for token in likely]])
    return answer


def main():
    import xllamacpp

    out, sys.stdout = sys.stdout, sys.stderr
    answers = []
    for job in json.load(sys.stdin):
        try:
            answers.append(serve(xllamacpp, job))
        except Exception as error:  # it raises whatever it likes
            answers.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    json.dump(answers, out)
    out.flush()
    os._exit(0)  # its threads are of no use any more, and some wait for each other


if __name__ == "__main__":
    main()
