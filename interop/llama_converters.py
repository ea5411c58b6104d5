"""llama.cpp's converters, in a process of their own, since they bring a gguf-py of their own. Usage:
llama_converters.py CONVERTERS < JOBS

JOBS is a JSON list of objects: `script` ("hf" or "lora"), `argv`, and `pre`, the name of the pre-tokenizer, where the
converter cannot know it: it goes by the ids of one text, which no tiny vocabulary has. Prints a JSON list of what
went wrong with each job, null where nothing did.
"""
import contextlib
import json
import logging
import os
import runpy
import subprocess
import sys


def run(jobs):
    """What went wrong with each of the jobs, None where nothing did."""
    import sources

    argv = [sys.executable, os.path.abspath(__file__), sources.place()]
    done = subprocess.run(argv, input=json.dumps(jobs), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converters: exit {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def main(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:1] = [folder, os.path.join(folder, "gguf-py")]
    from conversion.base import TextModel

    logging.disable(logging.CRITICAL)
    known, said = TextModel.get_vocab_base_pre, []
    for job in json.load(sys.stdin):
        pre = job.get("pre")
        TextModel.get_vocab_base_pre = (lambda self, tokenizer, pre=pre: pre) if pre else known
        script = os.path.join(folder, f"convert_{job['script']}_to_gguf.py")
        sys.argv = [script, *job["argv"]]
        try:
            with contextlib.redirect_stdout(sys.stderr):
                runpy.run_path(script, run_name="__main__")
            said.append(None)
        except (Exception, SystemExit) as error:  # it exits where it does not know what to do
            said.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
