"""Every causal LM of `transformers`, tiny and random: log-probs from hidden states and `Head` against its own logits.

python tests/test_model_zoo.py --markdown > docs/models.md
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from xpo_fast import Head, token_logps
from xpo_fast.layouts import Layout, install_layouts, laid_out, lay_out
from xpo_fast.layouts.model import backbone_of
from xpo_fast.layouts.support import unsupported
from xpo_fast.models import hidden_states, install_fused_loss, own_logits
from xpo_fast.trainer.checks import check_causal, check_head
from zoo import CLASSES, NO_MASK, READS_AHEAD, REASONS, VOCAB, build, loud, small

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
PASS = [name for *_, name in CLASSES if name not in REASONS]


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


@pytest.fixture(scope="module", params=PASS)
def of_zoo(request) -> Any:
    """(name, model), each model made once for all tests of it."""
    return request.param, build(request.param)


def test_log_probs_are_the_models_own(of_zoo):
    name, model = of_zoo
    assert compare(model) < 1e-4
    if name not in NO_MASK:
        with pytest.raises(ValueError, match="is not causal") if name in READS_AHEAD else contextlib.nullcontext():
            ids = torch.randint(10, 90, (1, 8), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                logits = own_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            check_causal(model, ids, logits)


def groups_of_rows() -> tuple[Tensor, Tensor]:
    """Ids and mask (6, 28) of completions of two prompts with a beginning in common, and of a row without."""
    torch.manual_seed(0)
    system, *prompts = (torch.randint(10, 90, (n,)) for n in (9, 7, 11))
    sizes = ((6, 3, 1), (5, 8))
    texts = [
        torch.cat([system, p, torch.randint(10, 90, (n,))]) for p, of in zip(prompts, sizes, strict=True) for n in of
    ]
    texts.append(torch.randint(10, 90, (5,)))
    ids, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (texts, [t * 0 + 1 for t in texts]))
    return ids, mask


def leaking(layout: Layout) -> Layout:
    """A packed layout whose last row sees its first one."""
    first, *others, last = layout.segments
    return replace(layout, segments=(first, *others, replace(last, at=first.stop, before=((0, first.stop),))))


@torch.no_grad()
def differences(model: Any) -> dict[str, float]:
    """By how much log-probs of laid out rows differ from those of padded rows, as a part of their spread."""
    ids, mask = groups_of_rows()
    read = mask.bool() & mask.roll(-1, 1).bool()  # a token is behind it
    read[:, -1] = False
    given: list[int] = []
    layouts = {"padded": None, "packed": lay_out(ids, mask, read, share=False)}
    layouts |= {"shared": lay_out(ids, mask, read, share=True), "leaking": leaking(layouts["packed"])}
    found = {}
    install_layouts(model)
    handle = backbone_of(model).register_forward_pre_hook(
        lambda _, args, kwargs: given.append(next(x.shape[0] for x in kwargs.values() if isinstance(x, Tensor))),
        with_kwargs=True,
    )
    for name, layout in layouts.items():
        with laid_out(layout):
            hidden = hidden_states(model, {"input_ids": ids, "attention_mask": mask})
        found[name] = token_logps(hidden, Head.from_model(model), ids.roll(-1, 1))[read]
    handle.remove()
    assert given == [len(ids), 1, 1, 1], "the backbone is not what the model calls"
    want = found.pop("padded")
    return {name: float((x - want).abs().max() / want.std()) for name, x in found.items()}


def agrees(model: Any) -> bool:
    """Whether log-probs of packed and of shared rows are those of padded ones, to rounding.

    Over all classes, those that are right differ by 5e-6 at most, and those that are not by 0.01 at least.
    """
    try:
        found = differences(model)
    except Exception:
        return False
    assert found["leaking"] > 1e-3, "the comparison does not see another row"
    return max(found["packed"], found["shared"]) < 2e-5


# Refused although rows of text come out right.
RIGHT_ON_TEXT = {"EvollaForProteinText2Text": "its layers look at proteins, one a row"}


def test_layouts_are_right_where_they_are_said_to_be_and_nowhere_else(of_zoo):
    name, model = of_zoo
    why = unsupported(model)
    assert why == padded_in(DOCS.read_text()).get(name)
    assert agrees(loud(model)) == (why is None or name in RIGHT_ON_TEXT)


# The same classes with other configs, of which some are right.
ENCODER_AS_DECODER = {"is_decoder": True}
ATTENTION_ALONE = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
OTHER_CONFIGS = [
    *((name, ENCODER_AS_DECODER, None) for name in ("BertGenerationDecoder", "BertLMHeadModel", "RoCBertForCausalLM")),
    ("RobertaForCausalLM", ENCODER_AS_DECODER, "positions are counted from its padding token's id"),
    ("GraniteMoeHybridForCausalLM", ATTENTION_ALONE, None),
    ("Lfm2MoeForCausalLM", ATTENTION_ALONE, None),
    ("NemotronHForCausalLM", ATTENTION_ALONE, None),
    ("Zamba2ForCausalLM", ATTENTION_ALONE, "convolutions over neighbouring tokens"),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}, None),
    *(
        (name, {"attn_implementation": "eager"}, None)
        for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM")
    ),
]


@pytest.mark.parametrize(("name", "config", "why"), OTHER_CONFIGS)
def test_a_model_is_judged_by_its_config(name, config, why):
    model = build(name, **config)
    assert unsupported(model) == why
    assert agrees(loud(model)) == (why is None)


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
    docs = DOCS.read_text()
    assert docs == markdown(padded_in(docs)), f"run python tests/{Path(__file__).name} --markdown > docs/models.md"


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

    shape, aux = run(output_router_logits=True)
    assert shape == (2, 7, 32)
    assert_close(aux, model(input_ids=ids, output_router_logits=True).aux_loss)
    assert run(output_router_logits=False) == (2, 7, 32)
    model.config.output_router_logits = True
    assert run(output_router_logits=False) == (2, 7, 32)
    with pytest.raises(ValueError, match=r"False for the loss alone, or set model\.config"):
        run()


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


LAYOUTS = """## Layouts

Rows of text can be read *packed* (side by side without padding) and *shared* (what they begin with in common stands
once) by every class of those that pass but the ones below, whose rows stay *padded*. Log-probs of tiny models, with
windows shorter than the rows, are those of padded rows to 2e-5 of their spread in float32, which is rounding. A model
is judged by its config and its modules, not by its name: a hybrid without state-space layers is not refused.

| class | why its rows stay padded |
|---|---|
"""


def padded_in(docs: str) -> dict[str, str]:
    """Classes whose rows stay padded, with the reasons, as docs/models.md has them."""
    _, table = docs.split(LAYOUTS)
    rows = (line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines())
    return {name.strip("`"): why for name, why in rows}


def markdown(padded: dict[str, str]) -> str:
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
        *LAYOUTS.splitlines(),
        *(f"| `{name}` | {why} |" for name, why in sorted(padded.items())),
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
    transformers.logging.set_verbosity_error()
    reasons = {name: unsupported(build(name)) for name in PASS}
    sys.stdout.write(markdown({name: why for name, why in reasons.items() if why is not None}))
