#!/usr/bin/env python3
"""Writes what transformers itself does with models of other sizes than the data was made from.

    python expect.py OUT.json.gz [CLASS ...]              all classes, or the named ones
    python expect.py ../testdata/expected.json.gz sample  those of the Go tests

For each class a config with three layers and five experts (where it has such) is built, quantised by transformers' own
replace_with_bnb_linear, and named as save_pretrained names it. The Go tests hold models.Load against this."""

import copy, gzip, json, sys

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig

import bitsandbytes as bnb
import generate

# classes of all kinds: dense, mixtures of experts, hybrids, several modalities, encoders, heads, vision, audio
SAMPLE = """
LlamaForCausalLM LlamaForSequenceClassification MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM
Qwen3NextForCausalLM DeepseekV3ForCausalLM GptOssForCausalLM PhimoeForCausalLM Phi3ForCausalLM JambaForCausalLM BambaForCausalLM NemotronHForCausalLM
Zamba2ForCausalLM FalconH1ForCausalLM Mamba2ForCausalLM MambaForCausalLM RwkvForCausalLM FalconForCausalLM GPT2LMHeadModel GPT2ForSequenceClassification
OpenAIGPTLMHeadModel OPTForCausalLM BloomForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForConditionalGeneration Gemma3nForConditionalGeneration
Qwen2_5_VLForConditionalGeneration LlavaForConditionalGeneration Mistral3ForConditionalGeneration MllamaForConditionalGeneration Llama4ForConditionalGeneration
Ernie4_5_VL_MoeForConditionalGeneration PaliGemmaForConditionalGeneration Blip2ForConditionalGeneration T5ForConditionalGeneration BartForConditionalGeneration
WhisperForConditionalGeneration SwitchTransformersForConditionalGeneration BertForMaskedLM BertForSequenceClassification RobertaForQuestionAnswering
ModernBertForSequenceClassification DistilBertForTokenClassification DebertaV2ForSequenceClassification GteModel CLIPModel SiglipVisionModel
ViTForImageClassification SwinForImageClassification Dinov2Model DetrForObjectDetection Wav2Vec2ForCTC EncoderDecoderModel
""".split()


def other_sizes(cls, d):
    """Three layers, five experts: not the sizes of the data."""

    def cut(d):
        lengths = {v for k, v in d.items() if generate.LAYERS.search(k) and isinstance(v, int) and v > 3}
        out = {}
        for k, v in d.items():
            if isinstance(v, dict):
                v = cut(v)
            elif isinstance(v, list) and len(v) in lengths:
                v = v[:3]
            elif isinstance(v, int) and not isinstance(v, bool):
                if generate.LAYERS.search(k) and v > 3:
                    v = 3
                elif generate.EXPERTS.search(k) and v > 5:
                    v = 5
                elif generate.PICKED.search(k) and v > 2:
                    v = 1 if "group" in k else 2
            out[k] = v
        return out

    for trial in (cut(d), d):
        try:
            c = cls.config_class.from_dict(copy.deepcopy(trial))
            generate.build(cls, c)
            return c
        except Exception:
            continue
    raise RuntimeError("no config of another size builds")


def expectation(cls, config):
    model = generate.build(cls, config)
    for m in model.modules():
        for p in m.parameters(recurse=False):
            p.requires_grad_(False)
    state = model.state_dict()
    rank = {n: list(v.shape) for n, v in state.items()}
    transforms = get_model_conversion_mapping(model, add_legacy=True)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    saved = revert_weight_conversion(model, dict(state))
    plans = {}
    for dtype in (torch.float16, torch.bfloat16):
        plan = model._get_dtype_plan(dtype)
        alt = generate.build_glob_alternation(list(plan))[0] if plan else None
        plans[dtype] = {n for n in state if alt is not None and alt.search(n)}
    tied = dict(model.all_tied_weights_keys)
    # what the quantiser does, by its own functions
    quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    skip = quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    model = replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=quantizer.quantization_config, pre_quantized=False)
    packed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    tensors = {}
    for f, v in saved.items():
        run_time, source = rename_source_key(f, renamings, converters, model.base_model_prefix, state)
        if run_time not in state and f in state:
            run_time, source = rename_source_key(f, [], [], model.base_model_prefix, state)
        if run_time not in state:
            continue
        flags = "q" if run_time in packed else ""
        flags += "s" if run_time in plans[torch.bfloat16] else "f" if run_time in plans[torch.float16] else ""
        flags += "c" if source is not None else ""
        tensors[f] = [list(v.shape), flags, "" if run_time == f else run_time, tied.get(run_time, "")]
    return {"class": cls.__name__, "config": {**json.loads(config.to_json_string(use_diff=False)), "architectures": [cls.__name__]}, "tensors": tensors}


def main():
    found, _ = generate.classes()
    with gzip.GzipFile(sys.argv[1], "wb", mtime=0) as out:
        names = sys.argv[2:] or sorted(found)
        for name in SAMPLE if names == ["sample"] else names:
            cls = found[name]
            try:
                make = generate.configs.BY_CLASS.get(name) or generate.configs.BY_CONFIG.get(cls.config_class.__name__) or cls.config_class
                config = make()
                d = generate.plain(config)
                e = expectation(cls, other_sizes(cls, d) if d is not None else config)
            except Exception as x:
                print(f"FAILED {name}: {type(x).__name__}: {' '.join(str(x).split())[:200]}", file=sys.stderr, flush=True)
                continue
            out.write((json.dumps(e) + "\n").encode())


if __name__ == "__main__":
    main()
