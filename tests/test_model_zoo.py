"""Every causal LM of `transformers`, tiny and random: log-probs from hidden states and `Head` against its own logits.

python tests/test_model_zoo.py --markdown > docs/models.md
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto import modeling_auto

from xpo_fast import Head, token_logps
from xpo_fast.models import hidden_states, install_fused_loss, own_logits
from xpo_fast.trainer.checks import check_causal, check_head

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
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"head_dim": 16},
    "prophetnet": {"num_hidden_layers": ...},
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
    "Step3p7ForConditionalGeneration": (TINY, "sliding_window"),
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


def build(name: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**small(cls.config_class))).eval()


def log_probs(model: Any, batch: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the targets, (R, T): ours, and the model's own."""
    head = Head.from_model(model)
    own = model(**batch, use_cache=False).logits.float().log_softmax(dim=-1)
    ours = token_logps(hidden_states(model, batch), head, targets)
    return ours, own.gather(-1, targets[..., None])[..., 0]


@torch.no_grad()
def compare(model: Any) -> float:
    """The largest difference of log-probs, with a head whose weight, bias, scale and softcap all matter."""
    head = Head.from_model(model)
    for x in (head.weight, head.bias):
        if x is not None:
            x.normal_()
    targets = torch.randint(3, VOCAB, (2, 7))
    ours, own = log_probs(model, {"input_ids": torch.randint(3, VOCAB, (2, 7))}, targets)
    assert own.isfinite().all() and float(own.std()) > 0.05
    return float((ours - own).abs().max())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Slow fallbacks of transformers, and its own deprecations, are not what is tested."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("name", [name for *_, name in CLASSES if name not in REASONS])
def test_log_probs_are_the_models_own(name):
    model = build(name)
    assert compare(model) < 1e-4
    if name not in NO_MASK:
        with pytest.raises(ValueError, match="is not causal") if name in READS_AHEAD else contextlib.nullcontext():
            ids = torch.randint(10, 90, (1, 8), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                logits = own_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            check_causal(model, ids, logits)


def test_logits_made_in_16_bits_and_returned_in_32_are_rounded_no_less():
    model = build("MambaForCausalLM").bfloat16()
    with torch.no_grad():
        Head.from_model(model).weight.normal_()
    install_fused_loss(model)
    check_head(model, list(range(5, 20)), torch.device("cpu"), "auto")


@pytest.mark.parametrize("name", [name for name, (_, error) in REASONS.items() if error is not None])
def test_what_does_not_pass_has_its_reason(name):
    with pytest.raises(Exception, match=REASONS[name][1]):
        compare(build(name))


def test_the_list_is_current():
    assert set(REASONS) <= {name for *_, name in CLASSES}
    assert len({family for _, family, name in CLASSES if name not in REASONS}) >= 200
    docs = Path(__file__).parents[1] / "docs" / "models.md"
    assert docs.read_text() == markdown(), f"run python tests/{Path(__file__).name} --markdown > docs/models.md"


@torch.no_grad()
def test_what_goes_before_the_head_is_taken_and_what_is_about_logits_is_not():
    model = build("LlamaForCausalLM")
    ids = torch.randint(3, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = hidden_states(model, {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1)})
    batch = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask, "position_ids": mask.cumsum(1)}
    of_logits = {"labels": ids, "targets": ids, "logits_to_keep": 1, "return_dict": False}
    assert_close(hidden_states(model, {**batch, **of_logits}), want)
    assert float((hidden_states(model, {"input_ids": ids}) - want)[0].abs().max()) > 0.01

    class Strict(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask)

    strict = Strict(model.config).eval()
    assert hidden_states(strict, {"input_ids": ids, "attention_mask": mask, **of_logits}).shape == want.shape


@torch.no_grad()
def test_pixels_go_through_the_model():
    model = build("LlavaForConditionalGeneration")
    image, patches = model.config.image_token_id, 4
    ids = torch.randint(3, VOCAB - 1, (2, 9))
    assert image is not None and not (ids == image).any()
    model.config.image_token_id = model.model.config.image_token_id = VOCAB - 1
    ids[:, 1 : 1 + patches] = VOCAB - 1
    pixels = torch.randn(2, 3, 28, 28)
    targets = torch.randint(3, VOCAB, ids.shape)
    ours, own = log_probs(model, {"input_ids": ids, "pixel_values": pixels}, targets)
    assert_close(ours, own)
    other, _ = log_probs(model, {"input_ids": ids, "pixel_values": -pixels}, targets)
    assert float((ours - other).abs().max()) > 1e-4


def test_a_forward_that_calls_its_parents_does_what_they_do():
    class Mine(transformers.Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Plain(transformers.Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            out = self.model(*args, **kwargs)
            return SimpleNamespace(logits=self.lm_head(out.last_hidden_state))

    config = transformers.Gemma2Config(**small(transformers.Gemma2Config))
    assert config.final_logit_softcapping == 2.5
    for cls, softcap in ((Mine, 2.5), (Plain, None)):
        model = cls(config).eval()
        assert Head.from_model(model).softcap == softcap
        assert compare(model) < 1e-4


@pytest.mark.parametrize("name", ["MarianMTModel", "T5ForConditionalGeneration"])
def test_encoder_decoders_are_refused(name):
    model = build(name)
    for read in (Head.from_model, install_fused_loss):
        with pytest.raises(ValueError, match=f"expected a decoder-only causal LM, got {name}.*final_logits_bias"):
            read(model)


def test_a_fused_loss_leaves_every_model_its_own_signature():
    names = ("LlamaForCausalLM", "MambaForCausalLM", "xLSTMForCausalLM")
    models = [build(name) for name in names]
    own = [(inspect.signature(model.forward), model.forward.__doc__) for model in models]
    for model in models:
        install_fused_loss(model)
    assert [(inspect.signature(model.forward), model.forward.__doc__) for model in models] == own
    assert "attention_mask" in own[0][0].parameters and "attention_mask" not in own[2][0].parameters
    ids = torch.randint(3, VOCAB, (2, 7))
    frozen = copy.deepcopy(models[0])
    want = frozen(input_ids=ids, fused_loss=lambda hidden, head: hidden)
    with torch.no_grad():
        models[0].get_input_embeddings().weight.zero_()
    assert_close(frozen(input_ids=ids, fused_loss=lambda hidden, head: hidden), want)


def test_the_routers_loss_is_not_dropped_from_a_fused_loss():
    model, ids = build("MixtralForCausalLM"), torch.randint(3, VOCAB, (2, 7))
    install_fused_loss(model)

    def run(**options: Any) -> Any:
        return model(input_ids=ids, fused_loss=lambda hidden, head: hidden.shape, **options)

    with pytest.raises(ValueError, match=r"auxiliary loss is not added.*leave out output_router_logits=True"):
        run(output_router_logits=True)
    assert run(output_router_logits=False) == (2, 7, 32)
    assert model(input_ids=ids, output_router_logits=True).router_logits is not None
    model.config.output_router_logits = True
    assert run(output_router_logits=False) == (2, 7, 32)
    for act in (run, lambda: install_fused_loss(model)):
        with pytest.raises(ValueError, match=r"set model\.config.output_router_logits = False"):
            act()


LOADING = """## What is loaded

`load_model` takes a folder of `save_pretrained`, a name on the hub, or an adapter by either. What it returns is what
was saved, or it says what is not:

- Weights that the files lack, or that the model has no place for (a head, layers beyond the config's), are an error
  that names them, for policies, reward models, adapters and value heads alike. Of other weights without a place (a
  vision tower) it warns.
- An adapter is merged into its base model. If that was an adapter merged into a model, and so on, all are merged, in
  the order they were trained: an adapter trained on FOLDER's adapter has FOLDER/adapter_config.json as its
  `base_model_name_or_path`. peft and transformers refuse that name. (Of a folder they would load the base, and put one
  adapter in the place of the other without a word.) FOLDER/config.json is the whole model of a folder that has an
  adapter, too.
- Folders are named by absolute paths. If one has been moved, the error says which file to correct.
- An adapter saved with more token embeddings than its base model has brings its own.
- An adapter on one of two tied weights (the LM head, the embeddings) is merged into that one: the two are untied.
- Weights in 16 bits lose an update smaller than half a step. If they would keep less than 98% of an adapter,
  `dtype="auto"` returns the model in float32, twice as large; with 16 bits asked for, they are rounded. A warning tells
  how much they keep. `merge=False` returns the adapter on its base model, as reward models and `eval-reward --policy`
  use it: exact in any dtype.
- An output folder that holds what the adapter is trained on is refused.
"""


def markdown() -> str:
    def classes(kind: str) -> list[str]:
        return sorted(name for k, _, name in CLASSES if k == kind and name not in REASONS)

    causal, multimodal = classes("causal"), classes("multimodal")
    lines = [
        "# Models",
        "",
        "Log-probs from `hidden_states(model, batch)` and `Head.from_model(model)` equal those of the model's own "
        f"logits to 1e-4 for {len(causal) + len(multimodal)} of the {len(CLASSES)} classes that transformers "
        f"{transformers.__version__.rsplit('.', 1)[0]} maps to causal language modelling or to image-and-text models: "
        "tiny ones, with random weights, their softcap, scale and bias set to something that matters. "
        f"{len(CLASSES) - len(causal) - len(multimodal)} do not pass; each has its reason. The trainers refuse, at the "
        f"first step, {len(READS_AHEAD)} of those that pass, because they read ahead: encoders, unless they are loaded "
        "with is_decoder=True, and models that read a prompt in both directions. Made by "
        "`python tests/test_model_zoo.py --markdown`, held by `tests/test_model_zoo.py`.",
        "",
        *LOADING.splitlines(),
        "",
        f"## Causal LMs that pass ({len(causal)})",
        "",
        ", ".join(f"`{name}`" for name in causal),
        "",
        f"## Image-and-text models whose text part passes ({len(multimodal)})",
        "",
        ", ".join(f"`{name}`" for name in multimodal),
        "",
        f"## What passes and reads ahead ({len(READS_AHEAD)})",
        "",
        ", ".join(f"`{name}`" for name in READS_AHEAD),
        "",
        "## What does not pass",
        "",
        "| class | why |",
        "|---|---|",
        *(f"| `{name}` | {why} |" for name, (why, _) in sorted(REASONS.items())),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit(__doc__)
    sys.stdout.write(markdown())
