"""Layouts of reward models and scorers: what is trained and what is scored is that of padded rows, and proves itself.

The models are random, of two layers in float32; equalities hold to float32 rounding of differently ordered sums.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import peft
import pytest
import torch

from test_reward_model import make_trainer
from test_scorers import EOS, PAD, alone, classifier, ids_of, logp_alone, value_alone, valued
from test_trainer import PEFT_WARNING, lora, make_model, make_tokenizer, words
from xpo_fast.layouts import Layout, check
from xpo_fast.layouts import inputs as of_inputs
from xpo_fast.models.value_head import attach_value_head, value_head
from xpo_fast.rewards import model as of_model
from xpo_fast.rewards.model import ImplicitReward, RewardModel
from xpo_fast.rewards.spec import USES, RewardSpec

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

LAYOUTS = ("padded", "packed", "shared")
TOLERANCE = 1e-5
RATINGS = {"helpful": 0.5, "safe": 1.0}


def rows_for(method: str, count: int = 6) -> list[dict]:
    """Rows with prompts that are worth sharing: ragged, equal rows, completions of a word, one that begins another."""
    g = torch.Generator().manual_seed(1)
    kind, rows = USES[method][0], []
    for i in range(count):
        prompt = rows[0]["prompt"] if i == count - 1 else words(g, 9, 20)  # the last row's is the first one's
        short = " " + words(g, 1, 2 + 4 * (i % 2))
        long = short + " " + words(g, 1, 9)
        if kind == "list":
            some = [short, long, long, " " + words(g, 1, 12)][: 2 + i % 3]
            rows.append({"prompt": prompt, "completions": some, "scores": [float(j * 7 % 4) for j in range(len(some))]})
        elif kind == "unpaired":
            rows.append({"prompt": prompt, "completion": (short, long)[i % 2], "label": i % 3 != 0})
            if method == "regression":
                rows[-1] |= {**RATINGS, "safe": None if i == 1 else float(i)}
        else:
            rows.append({"prompt": prompt, "chosen": (short, long)[i % 2], "rejected": (long, short)[i % 2]})
            rows[-1] |= {"prob": 0.8} if method == "preference_model" else {}
    return rows


def trainer_of(folder, method: str, layout: str, **args) -> Any:
    made: Any = make_trainer(
        folder / layout, method, rows=rows_for(method), layout=layout, optim="sgd", preflight="off", **args
    )
    assert made.layout.layout == made.data_collator.layout == layout
    return made


def loss_and_gradients(trainer: Any) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """The loss of all rows in a batch, its gradients, and the sizes of what the backbone has read."""
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in trainer.train_dataset]))
    read: list[int] = []
    backbone = trainer.model.get_input_embeddings()
    hook = backbone.register_forward_hook(lambda module, args, out: read.append(out.shape[0] * out.shape[1]))
    loss, *_ = trainer._loss(trainer.model, batch, None)
    loss.backward()
    hook.remove()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return float(loss.detach()), found, read


def assert_equal(found: tuple, want: tuple) -> None:
    assert found[0] == pytest.approx(want[0], rel=TOLERANCE)
    assert found[1].keys() == want[1].keys()
    largest = max(float(x.abs().max()) for x in want[1].values())
    for name, x in want[1].items():
        assert float((found[1][name] - x).abs().max()) <= TOLERANCE * max(largest, 1.0), name


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(USES))
def test_every_method_learns_the_same_in_each_layout(tmp_path, method):
    want: Any = None
    for layout in LAYOUTS:
        trainer = trainer_of(tmp_path, method, layout, max_steps=3)
        first = loss_and_gradients(trainer)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {n: p.detach() for n, p in trainer.model.named_parameters()}
        if want is None:
            want = first, logged, weights
            assert first[1] and len(logged) == 3
            continue
        assert_equal(first, want[0])
        assert sum(first[2]) < sum(want[0][2])  # fewer tokens are read
        for entry, other in zip(logged, want[1], strict=True):
            same = {
                n: x for n, x in other.items() if n in ("loss", "grad_norm") or n.startswith(("rewards/", "logps/"))
            }
            assert {n: entry[n] for n in same} == pytest.approx(same, rel=1e-4, abs=1e-5)
        for name, x in want[2].items():
            torch.testing.assert_close(weights[name], x, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["haf", "k_wise"])
def test_with_an_adapter_and_checkpointed_layers(tmp_path, method):
    """HAF's reference is the model with its adapter off, and its log-probs are read in the layout, too."""
    found = []
    for layout in LAYOUTS:
        trainer = trainer_of(tmp_path, method, layout, peft_config=lora(target_modules="all-linear"))
        torch.manual_seed(5)
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:  # so that policy and reference differ
                torch.nn.init.normal_(p, std=0.1)
        trainer.model.train()
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        found.append(loss_and_gradients(trainer))
    for other in found[1:]:
        assert_equal(other, found[0])
        assert max(other[2]) < max(found[0][2])


def test_the_gate_alone(tmp_path):
    """Nothing that the proof could take a gradient by is trained."""
    model = make_model()
    attach_value_head(model, 4, std=0.1)
    found = [
        loss_and_gradients(trainer_of(tmp_path, "gated", layout, model=copy.deepcopy(model))) for layout in LAYOUTS
    ]
    assert set(found[0][1]) == {"value_head.weight", "value_head.bias"}
    for other in found[1:]:
        assert_equal(other, found[0])


def test_auto_says_what_it_takes(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="xpo_fast"):
        assert trainer_of_auto(tmp_path).layout.layout == "shared"
    said = [m for m in caplog.messages if m.startswith("layout ")]
    assert len(said) == 1 and "layout shared: what rows begin with in common is read once" in said[0]
    rows, padded, packed, shared = len(rows_for("odin")), *trainer_of_auto(tmp_path).layout.tokens
    assert padded > packed > shared > rows
    encoded = trainer_of_auto(tmp_path).train_dataset
    lengths = [len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in encoded for side in ("chosen", "rejected")]
    assert packed == sum(lengths)  # the last token is read, too


def trainer_of_auto(folder, method: str = "bradley_terry", **args) -> Any:
    return make_trainer(folder / "auto", method, rows=rows_for(method), preflight="off", **args)


def test_evaluation_and_preflight_in_a_layout(tmp_path):
    found = []
    for layout in LAYOUTS:
        trainer: Any = make_trainer(
            tmp_path, rows=rows_for("grm"), eval_rows=rows_for("grm"), layout=layout, method="grm"
        )
        report: Any = trainer.preflight()
        assert [f for f in report.findings if f.check == "loss" and f.level != "ok"] == []
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1:] == pytest.approx(found[:1] * 2, rel=TOLERANCE)


def test_a_model_that_cannot_reads_padded_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("xpo_fast.layouts.choice.unsupported", lambda model: "it counts its toes")
    assert trainer_of_auto(tmp_path).layout.layout == "padded"
    with pytest.raises(ValueError, match=r"layout='packed': it counts its toes; use layout=\"padded\""):
        trainer_of_auto(tmp_path, layout="packed")
    model = valued(0)
    with pytest.raises(ValueError, match=r"layout='shared': it counts its toes; use layout=\"padded\""):
        RewardModel(model, make_tokenizer(), layout="shared")
    auto, padded = (positions_read(model, RewardModel(model, make_tokenizer(), layout=x)) for x in ("auto", "padded"))
    assert auto == padded
    with pytest.raises(ValueError, match="layout must be one of auto, padded, packed, shared, got 'wide'"):
        ImplicitReward(model, None, make_tokenizer(), layout="wide")


# --- the proof ----------------------------------------------------------------------------------------------------


def not_restarted(layout: Layout) -> Layout:
    return dataclasses.replace(layout, positions=torch.arange(len(layout)))


def one_behind(layout: Layout) -> Layout:
    """Each row's last hidden state is that of the token before it."""
    last = torch.cat([layout.at_row[1:] != layout.at_row[:-1], torch.ones(1, dtype=torch.bool)])
    return dataclasses.replace(layout, index=layout.index - last.long())


def other_rows(layout: Layout) -> Layout:
    """The hidden states of the first and the last row change places where their last tokens are."""
    at = torch.cat([layout.at_row[1:] != layout.at_row[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    index = layout.index.clone()
    index[at[0]], index[at[-1]] = layout.index[at[-1]], layout.index[at[0]]
    return dataclasses.replace(layout, index=index)


def leaks(layout: Layout) -> Layout:
    """The last segment sees one more than those in front of it in its rows."""
    *others, last = layout.segments
    seen = next(x for x in others[::-1] if (x.start, x.stop) not in last.before)
    more = dataclasses.replace(last, at=last.at + len(seen), before=(*last.before, (seen.start, seen.stop)))
    return dataclasses.replace(layout, segments=(*others, more))


LAYOUT_FAULTS = [not_restarted, one_behind, other_rows, leaks]


def plant(monkeypatch, fault) -> None:
    for module in (check, of_inputs, of_model):
        right = module.lay_out
        monkeypatch.setattr(module, "lay_out", lambda *args, right=right, **kwargs: fault(right(*args, **kwargs)))


def targets_alone(self, attention_mask, targets, *, logps=False):
    """Of RewardSpec.wanted: the last token is forgotten."""
    return targets != -100


@pytest.mark.parametrize("method", ["bradley_terry", "gated", "grm"])
@pytest.mark.parametrize("fault", [*LAYOUT_FAULTS, targets_alone])
def test_a_planted_fault_is_caught_before_training(tmp_path, monkeypatch, caplog, method, fault):
    if fault is targets_alone:
        monkeypatch.setattr(RewardSpec, "wanted", fault)
    else:
        plant(monkeypatch, fault)
    trainer: Any = make_trainer(tmp_path / "shared", method, rows=rows_for(method), layout="shared", preflight="off")
    assert trainer.layout.layout == trainer.data_collator.layout == "padded"
    said = [m for m in caplog.messages if "is not used" in m]
    assert len(said) == 1 and said[0].startswith("layout shared is not used, rows stay padded: of 4 rows, log-probs ")


# Rotary positions of a whole row that are off by the same number, as in the packed layout, are no fault.
FAULTS_OF = [
    (x, fault) for x in ("packed", "shared") for fault in LAYOUT_FAULTS if (x, fault) != ("packed", not_restarted)
]


@pytest.mark.parametrize("scorer", ["reward", "implicit", "classifier"])
@pytest.mark.parametrize(("layout", "fault"), FAULTS_OF)
def test_a_planted_fault_is_caught_before_scoring(monkeypatch, caplog, scorer, fault, layout):
    if scorer == "implicit" and fault is one_behind:
        fault = lambda x: dataclasses.replace(x, index=(x.index - 1).clamp(min=0))  # noqa: E731
    plant(monkeypatch, fault)
    model = classifier("llama") if scorer == "classifier" else valued(0)
    made = (lambda m, *args, **how: ImplicitReward(m, None, *args, **how)) if scorer == "implicit" else RewardModel
    want = made(model, make_tokenizer(), layout="padded").score(*QUESTIONS)
    asked = made(model, make_tokenizer(), layout=layout)
    for _ in range(2):
        torch.testing.assert_close(asked.score(*QUESTIONS), want)
    said = f"layout {layout} is not used, rows stay padded: of 3 rows, "
    assert len([m for m in caplog.messages if m.startswith(said)]) == 1


def test_a_value_head_of_zeros_does_not_hide_a_fault(monkeypatch, caplog):
    plant(monkeypatch, one_behind)
    model = make_model().eval()
    attach_value_head(model)
    RewardModel(model, make_tokenizer()).score(*QUESTIONS)
    assert "layout shared is not used" in caplog.text


# --- scoring ------------------------------------------------------------------------------------------------------

_LONG = " ".join(f"w{i}" for i in range(20, 34))
_OTHER = " ".join(f"w{i}" for i in range(50, 69))
# Two prompts in turn, the completions of the first ragged, one equal to another, one the beginning of another.
QUESTIONS = (
    [_LONG, _OTHER, _LONG, _OTHER, _LONG, _LONG, "w3 w4", _LONG, _LONG],
    [" w1", " w2 w3", " w1 w2 w3 w4", " w7 w8 w9 w5 w6 w1 w2", " w9", " w1", " w5", " w1 w2", " w8 w8 w8 w8 w8"],
)
ROWS = [ids_of(p, c) for p, c in zip(*QUESTIONS)]


def positions_read(model, scorer, size: int = 5, *questions: list[str]) -> list[int]:
    """The positions of each forward of a scorer, which is asked in batches of `size`."""
    scorer.batch_size = size
    scorer.score(["w1 w2 w3", "w1 w2 w3"], [" w4", " w5 w6"])  # the proof is behind it
    read: list[int] = []
    layer = model.get_input_embeddings()
    hook = layer.register_forward_hook(lambda module, args, out: read.append(out.shape[0] * out.shape[1]))
    scorer.score(*(questions or QUESTIONS))
    hook.remove()
    return read


def check_scores(made, want: list[float], tolerance: float = 1e-5) -> None:
    """made(layout, batch_size) → scorer; want: each row alone in float64."""
    expected = torch.tensor(want, dtype=torch.float64)
    for layout in (*LAYOUTS, "auto"):
        for size in (2, 5) if layout != "auto" else (16,):
            scorer = made(layout, size)
            got = scorer.score(*QUESTIONS)
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
            assert torch.equal(scorer.score(*QUESTIONS), got), "of the same call"


def test_a_reward_in_a_layout_is_that_of_the_row_alone():
    model = valued(0)
    want = value_alone(model, ROWS)
    check_scores(lambda layout, size: RewardModel(model, make_tokenizer(), layout=layout, batch_size=size), want)


def test_a_prompt_is_read_once_for_its_completions():
    """Rows of one prompt meet in a batch, though by length they would not."""
    model = valued(0)
    prompts = [" ".join(f"w{20 * k + i}" for i in range(12)) for k in range(4)] * 4  # in turn
    completions = [" " + " ".join(f"w{k + j}" for j in range(1 + k // 4)) for k in range(16)]
    rows = [len(ids_of(p, c)) for p, c in zip(prompts, completions)]
    want = {"padded": 16 * max(rows), "packed": sum(rows), "shared": sum(rows) - 12 * 12}
    for layout, positions in want.items():
        scorer = RewardModel(model, make_tokenizer(), layout=layout)
        read = sum(positions_read(model, scorer, 4, prompts, completions))
        assert read <= positions if layout == "padded" else read == positions


@pytest.mark.parametrize("method", ["regression", "gated", "odin", "bradley_terry"])
def test_outputs_and_comparisons_of_each_form(method):
    spec = RewardSpec(method=method, objectives=("a", "b") if method in ("regression", "gated") else ("reward",))
    model = make_model().eval()
    attach_value_head(model, spec.outputs, std=0.3)
    prompts, completions = QUESTIONS
    found = []
    for layout in LAYOUTS:
        reward = RewardModel(model, make_tokenizer(), spec, layout=layout, batch_size=4)
        compared = reward.compare(prompts, completions, completions[::-1])
        found.append((reward.outputs(prompts, completions), compared))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    assert float(found[0][0].std(dim=0).min()) > 1e-2


def test_a_preference_model_reads_both_orders():
    model = valued(0)
    spec = RewardSpec(method="preference_model")
    prompts, completions = QUESTIONS
    asked = [RewardModel(model, make_tokenizer(), spec, layout=x, batch_size=4) for x in LAYOUTS]
    padded, *others = (x.compare(prompts, completions, completions[::-1]) for x in asked)
    for other in others:
        torch.testing.assert_close(other, padded, rtol=1e-5, atol=1e-5)
    assert float(padded.std()) > 1e-2


@pytest.mark.parametrize("reference", ["none", "model", "adapter's base"])
def test_implicit_rewards(reference):
    policy, other = valued(0), valued(1)
    if reference == "adapter's base":
        torch.manual_seed(2)
        other = copy.deepcopy(policy)
        policy = peft.get_peft_model(policy, lora(init_lora_weights=False)).eval()
    each = [
        [logp_alone(m, p, row) for p, row in zip(QUESTIONS[0], ROWS)]
        for m in ([policy] if reference == "none" else [policy, other])
    ]
    want = [0.5 * (pair[0] - sum(pair[1:])) for pair in zip(*each)]
    given = None if reference == "none" else other

    def made(layout: str, size: int) -> ImplicitReward:
        return ImplicitReward(policy, given, make_tokenizer(), beta=0.5, batch_size=size, layout=layout)

    check_scores(made, want, tolerance=2e-5)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("llama", {"pad_token_id": None}),
        ("llama", {"pad_token_id": EOS}),  # rows are read before their EOS
        ("mistral", {"sliding_window": 6, "num_key_value_heads": 2}),
        ("gpt2", {"pad_token_id": PAD}),
        ("bert", {}),  # reads both ways: padded
    ],
)
def test_classifiers(kind, options):
    model = classifier(kind, **options)
    want = alone(model, ROWS)
    made = lambda layout, size: RewardModel(model, make_tokenizer(), layout=layout, batch_size=size)  # noqa: E731
    for layout in ("padded", "auto"):
        for size in (1, 5):
            got = made(layout, size).score(*QUESTIONS)
            torch.testing.assert_close(got.double(), torch.tensor(want).double(), rtol=1e-5, atol=1e-5)
    read = positions_read(model, made("auto", 5))
    rows = sum(map(len, ROWS))
    assert sum(read) < 0.8 * rows if kind != "bert" else sum(read) > rows


def test_one_row_and_no_row():
    model = valued(0)
    reward = RewardModel(model, make_tokenizer(), layout="shared")
    want = value_alone(model, ROWS[:1])
    before = reward.score(QUESTIONS[0][:1], QUESTIONS[1][:1])
    assert before.tolist() == pytest.approx(want, abs=1e-5)
    reward.score(*QUESTIONS)
    assert torch.equal(reward.score(QUESTIONS[0][:1], QUESTIONS[1][:1]), before)
    assert reward.score([], []).shape == (0,)


def test_scores_in_the_middle_of_training(tmp_path):
    """A scorer of a model in training leaves it as it was: its mode, its gradients, its attention."""
    trainer = trainer_of(tmp_path, "bradley_terry", "shared")
    want = loss_and_gradients(trainer)
    trainer.model.train()
    first = trainer.reward_model().score(*QUESTIONS)
    assert trainer.model.training
    padded = RewardModel(trainer.model, make_tokenizer(), layout="padded")
    torch.testing.assert_close(first, padded.score(*QUESTIONS), rtol=1e-5, atol=1e-5)
    assert_equal(loss_and_gradients(trainer), want)
    assert value_head(trainer.model) is not None
