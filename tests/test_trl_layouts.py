"""Layouts under TRL's trainers: TRL's own numbers on fewer tokens, and what must stay padded said or refused."""

from __future__ import annotations

import copy
import gc
import logging
import types
import warnings

import pytest
import torch
import transformers
from torch.testing import assert_close

from test_model_zoo import build
from xpo_fast.layouts import install_layouts, laid_out, lay_out, remove_layouts
from xpo_fast.layouts.attention import current
from xpo_fast.layouts.model import backbone_of
from xpo_fast.layouts.rows import Layout

pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever TRL and what it imports have to say on import
    import peft
    import trl
    from trl.trainer import utils

    import trl_trainers as runs
    from xpo_fast.integrations import trl as engine
    from xpo_fast.integrations.trl import layout as engine_layout
    from xpo_fast.integrations.trl import seams, trainers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
]
TOLERANCE = 3e-5
STEPS = 2
CASES = {**runs.CASES, "Reward": runs.Case("Reward", ""), "own methods": runs.Case("DPO", "own")}


@pytest.fixture(autouse=True)
def undone():
    yield
    engine.uninstall()


@pytest.fixture(scope="module", autouse=True)
def quiet():
    runs.datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def forwards(monkeypatch):
    """(tokens, rows, columns) of each forward that was laid out."""
    found, put = [], Layout.put

    def counted(self, x, length):
        found.append((len(self), *self.shape))
        return put(self, x, length)

    monkeypatch.setattr(Layout, "put", counted)
    return found


def pairs(count=16):
    """Every other prompt has ten words in front that all of them have, and six of its own."""
    words = [" ".join(f"w{(7 * k + i) % 90}" for i in range(12 if k % 2 else 6)) for k in range(count)]
    common = " ".join(f"w{i}" for i in range(10))
    rows = runs.tiny_pairs(count)
    return [
        row | {"prompt": " ".join([common, own, row["prompt"]][k % 2 :])}
        for k, (row, own) in enumerate(zip(rows, words, strict=True))
    ]


def classifier(seed=0, kind=transformers.LlamaForSequenceClassification, **options):
    config = runs.tiny_model(num_hidden_layers=2).config
    config.num_labels = 1
    for name, x in options.items():
        setattr(config, name, x)
    torch.manual_seed(seed)
    return kind(config)


def train(case, folder, layout, *, installed=True, model=None, peft_config=None, **arguments):
    """The log of a run of TRL's; with `install(layout=layout)`, or without."""
    case = CASES[case]
    adapted = peft_config is not None or arguments.get("precompute_ref_log_probs")
    if model is None:
        model = classifier() if case.trainer == "Reward" else runs.tiny_model(num_hidden_layers=2)
    elif isinstance(model, types.FunctionType):
        model = model()
    reference = None
    if not adapted and case.trainer in ("DPO", "KTO", "GRPO", "RLOO"):
        reference = copy.deepcopy(model)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.1)
    options = {"max_steps": STEPS, **arguments}
    with engine.install(layout=layout) if installed else warnings.catch_warnings():
        with pytest.MonkeyPatch.context() as patch:
            made, config = runs.classes(case, True)
            if case.label == "own":
                made, config, options["loss_type"] = engine.DPOTrainer, engine.DPOConfig, "xpo:dpo"
            extra = {} if peft_config is None else {"peft_config": peft_config}
            patch.setattr(runs, "classes", lambda *_: (lambda **given: made(**given, **extra), config))
            trainer = runs.make_trainer(
                case, True, model, runs.tiny_tokenizer(), pairs(), folder, ref_model=reference, **options
            )
        torch.manual_seed(0)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


def check_equal(case, layout, tmp_path, *, installed=False, **arguments):
    """Every number that TRL logs without this engine; installed: that are logged with `install()` alone."""
    logs = [train(case, tmp_path / "a", None, installed=installed, **arguments)]
    logs.append(train(case, tmp_path / "b", layout, **arguments))
    worst, where, count = runs.difference(*logs)
    assert worst < TOLERANCE, where
    assert count >= STEPS * 4
    assert all(entry["grad_norm"] > 1e-3 for entry in logs[0] if "grad_norm" in entry)


# Forwards that are laid out per step: the policy's and the reference's, each with one of mismatched rows for KTO.
RUNS = {
    "SFT nll": 1,
    "DPO sigmoid": 2,
    "DPO sum": 2,
    "KTO kto": 4,
    "GRPO beta": 2,
    "RLOO rloo": 3,
    "Reward": 1,
    "own methods": 2,
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_are_trls(case, forwards, tmp_path):
    layout = "packed" if case in ("SFT nll", "RLOO rloo") else "shared"
    check_equal(case, layout, tmp_path, installed=case == "own methods")
    assert len(forwards) == RUNS[case] * STEPS
    assert all(tokens < rows * columns for tokens, rows, columns in forwards)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("DPO sigmoid", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("DPO sigmoid", {"precompute_ref_log_probs": True}),
        ("GRPO entropy", {"num_iterations": 2, "gradient_checkpointing": True}),  # and old log-probs
        ("Reward", {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_options(case, options, forwards, tmp_path):
    peft_config = None
    if case == "DPO sigmoid" and "precompute_ref_log_probs" not in options:  # the reference without the adapter
        peft_config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    check_equal(case, "shared", tmp_path, peft_config=peft_config, **options)
    assert forwards


# --- positions --------------------------------------------------------------------------------------------------------


def rows_of(lengths, width, left=False):
    """Rows of a common beginning of ten tokens and of tokens of their own, padded on one side."""
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.full((len(lengths), width), 2), torch.zeros(len(lengths), width, dtype=torch.long)
    common = torch.randint(3, runs.VOCAB, (10,), generator=g)
    for r, n in enumerate(lengths):
        at = slice(width - n, None) if left else slice(n)
        ids[r, at] = torch.cat([common, torch.randint(3, runs.VOCAB, (n - 10,), generator=g)])
        mask[r, at] = 1
    return ids, mask


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.filterwarnings("ignore")
def test_positions_count_tokens(name):
    """Behind prompts that are padded on the left, a token has the log-prob that it has in its row alone."""
    model = build(name)
    ids, mask = rows_of((14, 11, 18), 20, left=True)
    labels = ids.masked_fill(mask == 0, -100)
    with engine.install(layout="shared"), torch.no_grad():
        utils.add_fused_lm_head(model)
        found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    for row, token, logps in zip(ids, mask.bool(), found, strict=True):
        alone = model(input_ids=row[token][None]).logits[0, :-1].log_softmax(-1)
        own = alone.gather(-1, row[token][1:, None])[:, 0]
        assert_close(logps[token[1:]][-len(own) :], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "kind", [transformers.LlamaForSequenceClassification, transformers.GPT2ForSequenceClassification]
)
def test_classifier_pools_its_own_position(kind, left):
    """The last token that is not of the pad token's id, even where rows end with it, as if EOS were padding."""
    if kind is transformers.GPT2ForSequenceClassification:
        options = {"vocab_size": runs.VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 2}
        model = kind(transformers.GPT2Config(**options, num_labels=1)).eval()
    else:
        model = classifier().eval()
    ids, mask = rows_of((14, 11, 18), 20, left)
    ids[0, -1 if left else 13] = 2  # a row's own last token
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[m.bool()][None]).logits for row, m in zip(ids, mask, strict=True)])
        install_layouts(model)
        with laid_out(lay_out(ids, mask, share=True)):
            found = model(input_ids=ids, attention_mask=mask).logits
    assert_close(found, alone, rtol=1e-5, atol=1e-5)


# --- what stays padded ------------------------------------------------------------------------------------------------


def mixtral(**options):
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **{
                "vocab_size": runs.VOCAB,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_local_experts": 2,
                "max_position_embeddings": 128,
                "eos_token_id": 1,
                "pad_token_id": 2,
                "bos_token_id": None,
            }
            | options
        )
    )


def bloom():
    torch.manual_seed(0)
    options = {"vocab_size": runs.VOCAB, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(**options, eos_token_id=1, pad_token_id=2, bos_token_id=None)
    )


def prompts(task="CAUSAL_LM"):
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)


def prefixes():
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


PADDED = {
    "no interface": ("SFT nll", {"model": bloom}, "BloomForCausalLM", "attention"),
    "router": ("DPO sigmoid", {"model": mixtral}, "MixtralForCausalLM", "router_aux_loss_coef=0.0"),
    "prompt tuning": ("DPO sigmoid", {"peft_config": prompts()}, "LlamaForCausalLM", "prompt learning"),
    "prefix tuning": ("KTO kto", {"peft_config": prefixes()}, "LlamaForCausalLM", "prompt learning"),
    "of a classifier": (
        "Reward",
        {"peft_config": prompts("SEQ_CLS")},
        "LlamaForSequenceClassification",
        "prompt learn",
    ),
    "packed rows": ("SFT nll", {"padding_free": True, "max_length": None}, "LlamaForCausalLM", "position_ids"),
    "another trainer": ("CPO simpo", {}, "CPOTrainer", "DPO, KTO"),
}


@pytest.mark.filterwarnings("ignore:Padding-free:UserWarning")
@pytest.mark.parametrize("name", PADDED)
def test_stays_padded(name, forwards, tmp_path, caplog):
    """auto: TRL's numbers, and the reason once by name; refused where a layout is asked for by name."""
    case, options, who, why = PADDED[name]
    with caplog.at_level(logging.WARNING, logger="xpo_fast"):
        if name == "router":  # the reference has no such loss, and is laid out
            check_equal(case, "auto", tmp_path, **options)
            assert len(forwards) == STEPS
        else:
            train(case, tmp_path, "auto", max_steps=1, **options)
            assert not forwards
    (said,) = (r.getMessage() for r in caplog.records if "stay padded" in r.getMessage())
    assert said.startswith(f"layout auto: the rows of {who} stay padded: ") and why in said
    refused = rf"layout='shared': the rows of {who} must stay padded: .*{why}.*\"auto\", or None"
    with pytest.raises(ValueError, match=refused):
        train(case, tmp_path, "shared", **options)


def test_mixture_of_experts_without_the_routers_loss(forwards, tmp_path):
    options = {"model": lambda: mixtral(num_hidden_layers=2), "router_aux_loss_coef": 0.0}
    check_equal("DPO sigmoid", "shared", tmp_path, **options)
    assert len(forwards) == 2 * STEPS


def test_trainer_made_before(tmp_path, caplog):
    def made():
        return runs.make_trainer(
            CASES["SFT nll"], False, runs.tiny_model(), runs.tiny_tokenizer(), pairs(), tmp_path, max_steps=1
        )

    trainer = made()
    with engine.install(layout="shared"), pytest.raises(ValueError, match=r"made before .*; make it after"):
        trainer.train()
    trainer = made()
    with engine.install(layout="auto"), caplog.at_level(logging.WARNING, logger="xpo_fast"):
        trainer.train()
    assert caplog.text.count("a trainer made before install(layout=…) stay padded") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"pixel_values": torch.zeros(3, 3, 4, 4)},
        {"token_type_ids": torch.zeros(3, 20, dtype=torch.long)},
        {"shift_labels": torch.zeros(3, 20, dtype=torch.long)},
        {"attention_mask": None},
        {"attention_mask": torch.ones(3, 20, dtype=torch.long).index_fill(1, torch.tensor([4]), 0)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_forwards_that_are_refused(arguments):
    ids, mask = rows_of((14, 11, 18), 20)
    model = runs.tiny_model()
    with engine.install(layout="packed"):
        utils.add_fused_lm_head(model)
        with pytest.raises(ValueError, match="the rows of LlamaForCausalLM must stay padded"):
            model(**{"input_ids": ids, "attention_mask": mask, "labels": ids, "fused_lm_head": True, **arguments})


@pytest.mark.parametrize("what", ["fsdp", "deepspeed", "cp", "sp", "tp"])
def test_models_in_parts(what, monkeypatch):
    """Said when the trainer is made, and remembered for its forwards."""
    parallel = types.SimpleNamespace(**{f"{n}_enabled": n == what for n in ("cp", "sp", "tp")})
    kind = type("Parted", (types.SimpleNamespace,), {"__module__": "trl.trainer.dpo_trainer"})
    trainer = kind(
        is_fsdp_enabled=what == "fsdp",
        is_deepspeed_enabled=what == "deepspeed",
        args=types.SimpleNamespace(torch_compile=False),
        accelerator=types.SimpleNamespace(parallelism_config=parallel),
        model=runs.tiny_model(),
    )
    layouts = engine_layout.Layouts("auto")
    monkeypatch.setitem(seams.THEIRS, (trainers.base_trainer._BaseTrainer, "__init__"), lambda self: None)
    monkeypatch.setattr(trainers, "current_layouts", lambda: layouts)
    trainers.init(trainer)
    assert "not been tried" in layouts._hindrance
    ids, mask = rows_of((14, 11), 20)
    with layouts.around(trainer.model, {"input_ids": ids, "attention_mask": mask}, None):
        assert current() is None


def test_compiled_trainer(tmp_path):
    with pytest.raises(ValueError, match="the rows of LlamaForCausalLM must stay padded: torch_compile"):
        train("DPO sigmoid", tmp_path, "shared", torch_compile=True, torch_compile_backend="eager")


# --- install and uninstall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "tree", ""])
def test_unknown_layout(layout):
    with pytest.raises(ValueError, match=f"auto, packed, shared, or None for padded rows, got {layout!r}"):
        engine.install(layout=layout)
    assert not engine.installed()


@pytest.mark.parametrize("leave", ["uninstall", "with", "again"])
def test_undone(leave, forwards):
    ids, mask = rows_of((14, 11, 18), 20)
    places = {place: getattr(*place) for place in seams.THEIRS}
    model = runs.tiny_model()
    plain = model.config._attn_implementation
    hooks = [len(backbone_of(model)._forward_pre_hooks), len(backbone_of(model)._forward_hooks)]
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    with engine.install(layout="shared"):
        utils.add_fused_lm_head(model)
        before = model(**given, fused_lm_head=True).log_probs
        assert len(forwards) == 1 and model.config._attn_implementation == plain
        twin = copy.deepcopy(model)
        if leave == "uninstall":
            engine.uninstall()
        if leave == "again":
            engine.install()
    assert [len(backbone_of(model)._forward_pre_hooks), len(backbone_of(model)._forward_hooks)] == hooks
    assert model.config._attn_implementation == plain
    assert {place: getattr(*place) for place in seams.THEIRS} == places
    after = [x(**given, fused_lm_head=True).log_probs for x in (model, twin)]
    assert len(forwards) == 1
    for found in after:
        assert_close(found, before, rtol=1e-5, atol=1e-5)
    remove_layouts(twin)
    assert [len(backbone_of(twin)._forward_pre_hooks), len(backbone_of(twin)._forward_hooks)] == hooks
    assert twin.config._attn_implementation == plain


def test_layout_of_the_inner_install_ends_with_it(forwards):
    ids, mask = rows_of((14, 11, 18), 20)
    model = runs.tiny_model()
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids, "fused_lm_head": True}
    with engine.install(layout="shared"):
        utils.add_fused_lm_head(model)
        with engine.install():
            model(**given)
        assert not forwards
        with engine.install(layout="packed"):
            model(**given)
        model(**given)
    assert [n for n, *_ in forwards] == [43, 23]


def test_trainers_that_ask_the_head():
    """Those that are taken for such; and nothing else of TRL's stable trainers is left out but distillation."""
    from pathlib import Path

    for module in seams.TRAINERS:
        source = Path(module.__file__).read_text()
        assert "fused_lm_head=True" in source or '"fused_lm_head": True' in source
    stable = {n for n in trl.trainer.__all__ if n.endswith("Trainer")} if hasattr(trl.trainer, "__all__") else set()
    assert stable <= {f"{n}Trainer" for n in ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward", "Distillation")}
