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
from xpo_fast.layouts.model import backbone_of
from xpo_fast.layouts.rows import Layout

pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever TRL and what it imports have to say on import
    import accelerate
    import peft
    import trl
    from trl.trainer import utils

    import trl_trainers as runs
    from xpo_fast.integrations import trl as engine
    from xpo_fast.integrations.trl import layout as engine_layout
    from xpo_fast.integrations.trl import seams

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


# Forwards that are laid out per step: the policy's and the reference's; KTO's mismatched rows are forwards of their own.
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


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("case", RUNS)
def test_runs_are_trls(case, layout, forwards, tmp_path):
    check_equal(case, layout, tmp_path, installed=case == "own methods")
    assert len(forwards) == RUNS[case] * STEPS
    assert all(tokens < rows * columns for tokens, rows, columns in forwards)
