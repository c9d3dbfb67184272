"""Every causal LM and image-and-text model of `transformers`: tiny ones, and why some do not pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto import modeling_auto

from xpo_fast import Head

VOCAB = 97
# Whatever a config calls its sizes. Those of a name that a config does not have are left out.
SIZES = {
    32: "hidden_size d_model n_embd n_embed dim embed_dim emb_dim dim_model embedding_size width out_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_experts_per_tok moe_k moe_topk top_k_experts num_key_value_heads eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads linear_num_key_heads linear_num_value_heads "
    "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    48: "intermediate_size n_inner ffn_dim dff d_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff "
    "mlp_dim",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    16: "q_lora_rank kv_lora_rank",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim",
    24: "moe_intermediate_size",
    28: "image_size",
    14: "patch_size",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    6: "sliding_window sliding_window_size attention_chunk_size local_attention floor_scale",
    0: "pad_token_id",
    1: "bos_token_id",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
OF_LOGITS = re.compile(r"logits?_.*(cap|scal|mult)|lm_head_mult|output_mult|logit_scale")
NOT_OF_LOGITS = re.compile(r"attn|attention|router|init|max_")
# Of a model type, where sizes that fit every other one do not.
MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
HAVE_MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl")
OVERRIDES: dict[str, dict[str, Any]] = {
    **{f"{name}_text": MROPE for name in HAVE_MROPE},
    "axk1": {"n_group": 2, "topk_group": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {"moe_num_experts": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "janus_vqgan": {"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"head_dim": 16},
    "prophetnet": {"num_hidden_layers": ...},
    **{f"qwen4_exp{of}": {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2} for of in ("", "_text")},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xlnet": {"max_position_embeddings": ...},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid"] * 2,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def has(config: Any, name: str) -> bool:
    """Whether a config has one number by this name."""
    try:
        value = getattr(config, name)
    except AttributeError:
        return False
    except AmbiguousGlobalPerLayerAttributeError:  # a number a layer
        return name != "head_dim"
    own = getattr(type(config), name, None)
    return (value is None or isinstance(value, int)) and not (isinstance(own, property) and own.fset is None)


def small(config_class: Any) -> dict[str, Any]:
    """Arguments that make a config's model tiny, and what it does to its logits not nothing."""
    default = config_class()
    given = {name: value for name, value in SMALL.items() if has(default, name)}
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name, value in default.to_dict().items():
        if OF_LOGITS.search(name) and not NOT_OF_LOGITS.search(name) and not isinstance(value, (list, dict)):
            given[name] = 2.5 if "cap" in name else 0.6
    for name in config_class.sub_configs:
        if getattr(default, name, None) is not None:
            own = type(getattr(default, name))
            given[name] = {"model_type": own.model_type, **small(own)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in vars(default):  # a layer of each kind
        given |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    given |= OVERRIDES.get(config_class.model_type, {})
    return {name: value for name, value in given.items() if value is not ...}


def walk() -> Iterator[tuple[str, str, str]]:
    """(kind, model type, class name), each class once, by the first model type that transformers maps to it."""
    seen = set()
    for kind, names in (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("multimodal", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for family, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                if name not in seen:
                    seen.add(name)
                    yield kind, family, name


# Classes that do not pass: why, and the error that shows it; None where making the model takes too long to show it.
ENCODER = "encoder-decoder: not a causal LM; refused"
IMAGE = "does not run on text alone"
TINY = "transformers makes no tiny one from its config's fields alone"
REASONS: dict[str, tuple[str, str | None]] = {
    "BlipForConditionalGeneration": ("the model names no output embeddings; refused", "has no output embeddings"),
    "Blip2ForConditionalGeneration": (IMAGE, "pixel_values"),
    "BltForCausalLM": ("a patcher and two more models of bytes, too large when tiny", None),
    "ChameleonForConditionalGeneration": ("sets logits of image tokens to the least number; refused", None),
    "Cosmos3EdgeForConditionalGeneration": (TINY, "mrope_section"),
    "DbrxForCausalLM": ("transformers 5.23 does not construct it: no rope_theta in its config", "rope_theta"),
    "DeepseekOcr2ForConditionalGeneration": (TINY, "not subscriptable"),
    "DiffusionGemmaForBlockDiffusion": ("denoises a canvas: not a causal LM", "one token a hidden state"),
    "Dots3NoteForConditionalGeneration": (TINY, "per_layer_config"),
    "Emu3ForConditionalGeneration": ("an image tokenizer that is large when tiny; its text model passes", None),
    "Ernie4_5_VLMoeForConditionalGeneration": (TINY, "must match the existing size"),
    "FastVlmForConditionalGeneration": ("needs the package timm", "timm"),
    "Florence2ForConditionalGeneration": (ENCODER, None),
    "Gemma3nForConditionalGeneration": ("needs the package timm; its text model passes", "timm"),
    "Gemma4AssistantForCausalLM": ("drafts for another model, from its hidden states", "hidden_size_per_layer_input"),
    "Gemma4UnifiedAssistantForCausalLM": ("drafts for another model, from its hidden states", "layer types"),
    "Glm5NextForConditionalGeneration": (TINY, "NoPE"),
    "Granite4VisionForConditionalGeneration": (TINY, "has no len"),
    "HunYuanVLForConditionalGeneration": (TINY, "has no len"),
    "IdeficsForVisionText2Text": ("its head is two layers side by side; refused", "not a plain linear layer"),
    "Inkling2ForConditionalGeneration": (TINY + "; its text model passes", "text_hidden_size"),
    "InklingForConditionalGeneration": ("needs the package scipy; its text model passes", "scipy"),
    "InstructBlipForConditionalGeneration": (IMAGE, "pixel_values"),
    "InstructBlipVideoForConditionalGeneration": (IMAGE, "pixel_values"),
    "Kosmos2ForConditionalGeneration": (IMAGE, "pixel_values"),
    "Molmo2ForConditionalGeneration": (TINY, "vision_feature_layer"),
    "MuseSparkForConditionalGeneration": (TINY, "one entry per layer"),
    "MusicgenForCausalLM": ("a head for each codebook; refused", "not a plain linear layer"),
    "MusicgenMelodyForCausalLM": ("a head for each codebook; refused", "not a plain linear layer"),
    "NemotronH_Omni_Reasoning_V3": (TINY, "temporal_patch_size"),
    "PI0ForConditionalGeneration": ("predicts actions: no output embeddings; refused", "has no output embeddings"),
    "PPFormulaNetForConditionalGeneration": (ENCODER, "expected a decoder-only causal LM"),
    "PerceptionLMForConditionalGeneration": ("needs the package timm", "timm"),
    "Pix2StructForConditionalGeneration": (ENCODER, "expected a decoder-only causal LM"),
    "ProphetNetForCausalLM": ("predicts several tokens a position; refused", "expected hidden states"),
    "T5Gemma2ForConditionalGeneration": (ENCODER, "expected a decoder-only causal LM"),
    "UdopForConditionalGeneration": (ENCODER, "expected a decoder-only causal LM"),
    "VisionEncoderDecoderModel": (ENCODER, "expected a decoder-only causal LM"),
}  # fmt: skip
# Classes of those that pass whose log-probs depend on what follows: encoders without is_decoder=True, prefix LMs.
READS_AHEAD = [
    "BertGenerationDecoder", "BertLMHeadModel", "BigBirdForCausalLM", "CamembertForCausalLM", "CpmAntForCausalLM",
    "Data2VecTextForCausalLM", "ElectraForCausalLM", "ErnieForCausalLM", "MegatronBertForCausalLM",
    "PaliGemmaForConditionalGeneration", "RemBertForCausalLM", "RoCBertForCausalLM", "RoFormerForCausalLM",
    "RobertaForCausalLM", "RobertaPreLayerNormForCausalLM", "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM",
    "XLMWithLMHeadModel", "XLNetLMHeadModel", "XmodForCausalLM",
]  # fmt: skip
# Tiny ones do not run with an attention mask: their config lacks an id.
NO_MASK = ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration")
CLASSES = list(walk())


def build(name: str, **given: Any) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**small(cls.config_class) | given)).eval()


@torch.no_grad()
def loud(model: Any) -> Any:
    """Makes all of a random model matter: matrices that keep sizes as they are, biases and norms that are not alike."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() < 2:
            p.add_(torch.randn_like(p), alpha=0.1)
        elif float(p.std()) > 0:
            p.mul_(1 / (float(p.std()) * p.shape[-1] ** 0.5))
    Head.from_model(model).weight.normal_()
    for name in ("vision_start_token_id", "audio_token_id", "image_token_id", "video_token_id"):
        if not hasattr(model.config, name):
            setattr(model.config, name, VOCAB - 1)
    return model
