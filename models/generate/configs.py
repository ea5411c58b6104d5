"""Small configs for the classes whose default config does not build, and the settings that a flip of one member does not reach."""

import transformers as T


def _of(name, **changes):
    """The named config with members set. A nested config's are given as a dict."""

    def make():
        cls = next(c for c in _all() if c.__name__ == name)
        return cls(**changes)

    return make


def _all():
    todo = [T.PretrainedConfig]
    while todo:
        for c in todo.pop().__subclasses__():
            todo.append(c)
            yield c


def _edited(name, **changes):
    """The same, where the constructor does not take them: set on the finished config."""

    def make():
        config = next(c for c in _all() if c.__name__ == name)()
        for k, v in changes.items():
            setattr(config, k, v)
        return config

    return make


_SERIES = dict(prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=2, num_static_categorical_features=1, cardinality=[3], embedding_dimension=[2])
_BLOCK = {
    **{k: [1, 1, 0] for k in ("reduce_channel", "return_channel")},
    **{
        f"{a}_{b}": [3, 1, 1]
        for a in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
        for b in ("longratio", "midratio", "shortratio")
    },
}
_HEAD = dict(upsample_out_channels=[64, 32], conv_out_channels=[32, 32], scale_conv_out_channels=[32], scale_final_hidden_sizes=[64, 16], scale_final_input_size=64)
_QSA = dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=256, indexer_budget=64, indexer_compress_ratio=16)
_SPARSE = ["dense"] + ["sparse"] * 11
_TALKER = dict(shared_expert_intermediate_size=64)

# config class -> a function of no arguments that returns a config
BY_CONFIG = {
    "AutoformerConfig": _of("AutoformerConfig", **_SERIES),
    "InformerConfig": _of("InformerConfig", **_SERIES),
    "TimeSeriesTransformerConfig": _of("TimeSeriesTransformerConfig", **_SERIES),
    "AyaVisionConfig": _of("AyaVisionConfig", vision_config={"model_type": "siglip_vision_model", "num_attention_heads": 16, "hidden_size": 1152}),
    "ChameleonConfig": _of("ChameleonConfig", vocabulary_map={"<image>": 8711}),
    "Emu3Config": _of("Emu3Config", vocabulary_map={"<image>": 1, "<|extra_200|>": 2}),
    "DbrxConfig": _of("DbrxConfig", attn_config={"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8}),
    "EsmConfig": _of("EsmConfig", vocab_size=33, pad_token_id=1, mask_token_id=32),
    "HunYuanDenseV1Config": _of("HunYuanDenseV1Config", head_dim=128),
    "HunYuanMoEV1Config": _of("HunYuanMoEV1Config", head_dim=128, num_experts=8, moe_topk=2),
    "HunYuanVLTextConfig": _of("HunYuanVLTextConfig", head_dim=128),
    "HunYuanVLConfig": _of("HunYuanVLConfig", text_config={"head_dim": 128}),
    "MinistralConfig": _of("MinistralConfig", head_dim=128),
    "NemotronConfig": _of("NemotronConfig", num_key_value_heads=8),
    "Dots1Config": _of("Dots1Config", n_routed_experts=8, n_shared_experts=2, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1),
    "Lfm2MoeConfig": _of("Lfm2MoeConfig", num_hidden_layers=6, num_dense_layers=2, layer_types=["conv", "conv", "full_attention"] * 2),
    "MoonshineStreamingConfig": _edited("MoonshineStreamingConfig", num_key_value_heads=8),
    "Granite4VisionConfig": _of("Granite4VisionConfig", deepstack_layer_map=[[3, 0], [7, 1]], downsample_rate="4/8"),
    "Qwen4ExpTextConfig": _of("Qwen4ExpTextConfig", **_QSA),
    "Qwen4ExpConfig": _of("Qwen4ExpConfig", text_config=_QSA),
    "DeepseekOcr2TextConfig": _of("DeepseekOcr2TextConfig", num_hidden_layers=12, mlp_layer_types=_SPARSE),
    "DeepseekOcr2Config": _of("DeepseekOcr2Config", text_config={"num_hidden_layers": 12, "mlp_layer_types": _SPARSE}),
    "DiffusionGemmaTextConfig": _of("DiffusionGemmaTextConfig", num_experts=8, top_k_experts=2, moe_intermediate_size=64),
    "DiffusionGemmaConfig": _of("DiffusionGemmaConfig", text_config={"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}),
    "CohereCompassTextConfig": _of("CohereCompassTextConfig", rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    "CohereCompassConfig": _of("CohereCompassConfig", text_config={"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    "ConvNextConfig": _of("ConvNextConfig", hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3]),
    "ConvNextV2Config": _of("ConvNextV2Config", hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3]),
    "FocalNetConfig": _of("FocalNetConfig", hidden_sizes=[192, 384, 768, 768]),
    "Gemma4AssistantConfig": _of("Gemma4AssistantConfig", text_config={"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}),
    "PPOCRV5ServerDetConfig": _of("PPOCRV5ServerDetConfig", intraclass_block_config=_BLOCK, kernel_list=[3, 2, 2]),
    "PPOCRV6MediumDetConfig": _of("PPOCRV6MediumDetConfig", intraclass_block_config=_BLOCK, kernel_list=[3, 2, 2]),
    "PerceptionLMConfig": _of("PerceptionLMConfig", vision_config={"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "model_args": {"embed_dim": 192}}),
    "Sapiens2Config": _of("Sapiens2Config", head_config=_HEAD),
    "TimmBackboneConfig": _of("TimmBackboneConfig", backbone="resnet18", use_pretrained_backbone=False),
    "VitMatteConfig": _of("VitMatteConfig", fusion_hidden_sizes=[256, 128, 64, 32], convstream_hidden_sizes=[48, 96, 192]),
    "Wav2Vec2BertConfig": _of("Wav2Vec2BertConfig", vocab_size=32),
    "Wav2Vec2ConformerConfig": _of("Wav2Vec2ConformerConfig", vocab_size=32),
    "Qwen3OmniMoeTalkerTextConfig": _edited("Qwen3OmniMoeTalkerTextConfig", **_TALKER),
    "MoshiConfig": _of("MoshiConfig", audio_vocab_size=2048),
}


def _with(name, path, **changes):
    def make():
        config = next(c for c in _all() if c.__name__ == name)()
        section = config
        for p in path.split("."):
            section = getattr(section, p)
        for k, v in changes.items():
            setattr(section, k, v)
        return config

    return make


def _talker(name, path):
    def make():
        config = next(c for c in _all() if c.__name__ == name)()
        talker = getattr(config, path) if path else config
        talker.spatial_merge_size = 2
        for k, v in _TALKER.items():
            setattr(talker.text_config, k, v)
        return config

    return make


BY_CONFIG |= {
    "Qwen3OmniMoeTalkerConfig": _talker("Qwen3OmniMoeTalkerConfig", ""),
    "Qwen3OmniMoeConfig": _talker("Qwen3OmniMoeConfig", "talker_config"),
    "T5Gemma2EncoderConfig": _with("T5Gemma2EncoderConfig", "text_config", dropout_rate=0.0),
}

# model class -> the same, where one config class serves several
BY_CLASS = {
    "BeitForSemanticSegmentation": _of("BeitConfig", out_indices=[3, 5, 7, 11]),
    "BridgeTowerForContrastiveLearning": _edited("BridgeTowerConfig", contrastive_hidden_size=512, logit_scale_init_value=2.6),
    "EsmForProteinFolding": _of("EsmConfig", is_folding_model=True, vocab_size=33, pad_token_id=1, mask_token_id=32),
    "HieraForPreTraining": _of("HieraConfig", decoder_hidden_size=64, decoder_depth=2, decoder_num_heads=4),
    "PerceiverForImageClassificationConvProcessing": _of("PerceiverConfig", num_self_attends_per_block=2, num_cross_attention_heads=1),
    "PerceiverForImageClassificationFourier": _of("PerceiverConfig", num_cross_attention_heads=1),
    "PerceiverForMultimodalAutoencoding": _of("PerceiverConfig", num_cross_attention_heads=1),
    "PerceiverForOpticalFlow": _of("PerceiverConfig", num_cross_attention_heads=1),
    "ReformerModelWithLMHead": _of("ReformerConfig", is_decoder=True),
    "T5GemmaEncoderModel": _of("T5GemmaConfig", is_encoder_decoder=False),
    "ViltForImagesAndTextClassification": _of("ViltConfig", num_images=2),
}

# (member, values): tried on every config that has the member, beside the flips of booleans
CHOICES = {
    "feed_forward_proj": ["relu", "gated-gelu"],
    "position_embedding_type": ["relative_key"],
    "encoder_attention_type": ["global"],
    "attention_type": ["original_full"],
    "q_lora_rank": [None, 64],
    "word_embed_proj_dim": [64],
    "n_routed_experts": [None],
    "num_experts": [0, 8],
    "num_local_experts": [0, 8],
    "num_labels": [3],
}

# Members that add parameters only together: set in every section of a config that has the last of them.
TOGETHER = [
    {"is_decoder": True, "add_cross_attention": True},
    {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
]
