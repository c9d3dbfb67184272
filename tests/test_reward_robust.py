"""Reward models that bear noise and drift: contrastive, meta, rlp, votes on labels, whitening, pre-training."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from inputs import columns, gradients
from test_reward_model import make_samples, make_trainer, plain_outputs
from test_trainer import PEFT_WARNING, Gradients, lora, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.data import DataError
from xpo_fast.fit import phases
from xpo_fast.fit.question import Question
from xpo_fast.methods.reward import info_nce, spread
from xpo_fast.models import load_model
from xpo_fast.models.value_head import attach_value_head, value_head
from xpo_fast.rewards.agreement import clusters, confident_pairs, overlap
from xpo_fast.rewards.drift import Drift, distances
from xpo_fast.rewards.judges import RewardJudge, group_wins
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.report import score_pairs, summary
from xpo_fast.rewards.samples import load_samples, moved
from xpo_fast.rewards.spec import READS_SAMPLES, READS_VIEWS, SOFT_LABELS, SPEC_FILE, RewardSpec, load_spec, save_spec
from xpo_fast.rewards.voting import adapted, auc, vote

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def log(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- losses ---------------------------------------------------------------------------------------------------------


def plain_nce(x, y, temperature):
    """One row at a time, from the definition."""
    out = []
    for i in range(len(x)):
        cosines = [(x[i] @ y[j]) / (x[i].norm() * y[j].norm()) for j in range(len(y))]
        total = sum(torch.exp(c / temperature) for c in cosines)
        out.append(-torch.log(torch.exp(cosines[i] / temperature) / total))
    return torch.stack(out)


def plain_bt(given):
    h = given["reward_w"] - given["reward_l"] - given.get("margin", 0)
    return torch.log(1 + torch.exp(-h))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_contrastive_is_its_equation_with_its_gradient(temperature):
    given = columns("contrastive")
    hyper = {"alpha": 0.3, "temperature": temperature}
    leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
    losses, _ = xf.METHODS["contrastive"](**leaves, **hyper)
    expected = plain_bt(leaves) + 0.3 * plain_nce(leaves["view"], leaves["other_view"], temperature)
    assert_close(losses, expected)
    assert_close(gradients(losses, leaves), gradients(expected, leaves))


def test_rlp_is_its_equation_with_its_gradient():
    given = columns("rlp")
    hyper = {"alpha": 0.3, "kappa": 0.7, "temperature": 0.5}
    leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
    losses, _ = xf.METHODS["rlp"](**leaves, **hyper)
    x, y = leaves["sample_view"], leaves["other_sample_view"]
    off = [((x[i] / x[i].norm() - y[i] / y[i].norm()) ** 2).sum() / 2 for i in range(len(x))]
    views = (plain_nce(x, y, 0.5) + 0.7 * torch.stack(off)).mean()
    expected = plain_bt(leaves) + 0.3 * views
    assert_close(losses, expected)
    assert_close(gradients(losses, leaves), gradients(expected, leaves))


def test_info_nce_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # cosines (1, 0): −log(e^2/(e^2 + 1)) = log(1 + e^-2) at τ = ½
    assert_close(info_nce(x, x, 0.5), torch.full((2,), 0.12692801104297252, dtype=torch.float64))
    swapped = info_nce(x, x.flip(0), 0.5)  # the other's is the like one: log(1 + e^2)
    assert_close(swapped, torch.full((2,), 2.1269280110429727, dtype=torch.float64))
    assert info_nce(x[:1], x[1:], 0.5).tolist() == [0.0]  # one alone has no rival
    zero = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    found = info_nce(zero, x, 0.5)
    assert_close(found, torch.full((2,), math.log(2), dtype=torch.float64))
    assert not torch.autograd.grad(found.sum(), zero)[0].any()


def test_spread_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 9.0], [2.0, 2.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # 2/4·σ(1); 2/9·(σ(0) + 2σ(3))
    expected = torch.tensor([0.36552928931500245, 0.5344773896988593], dtype=torch.float64)
    assert_close(spread(rewards, mask), expected)
    leaf = rewards.clone().requires_grad_()
    (found,) = torch.autograd.grad(spread(leaf, mask).sum(), leaf)
    slope = 0.5 * 0.19661193324148185  # σ'(1), pushing the two apart
    assert_close(found[0], torch.tensor([-slope, slope, 0.0], dtype=torch.float64))
    assert found[1, 0] == found[1, 1] < 0 < found[1, 2]  # equal samples are not pushed apart


def test_meta_is_bradley_terry_of_what_it_is_given():
    given = columns("meta")
    assert_close(xf.METHODS["meta"](**given)[0], xf.METHODS["bradley_terry"](**given)[0])


def test_a_contrastive_loss_is_least_where_pairs_differ_in_their_own_ways():
    given = columns("contrastive")
    apart, same = torch.eye(6, dtype=torch.float64)[: len(given["view"])], torch.ones_like(given["view"])
    low = xf.METHODS["contrastive"](**{**given, "view": apart, "other_view": apart})[0]
    high = xf.METHODS["contrastive"](**{**given, "view": same, "other_view": same})[0]
    assert (low < high - 0.1 * math.log(len(same)) + 1e-3).all()


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("contrastive", {"alpha": -1.0}, "alpha >= 0"),
        ("contrastive", {"temperature": 0.0}, "temperature > 0"),
        ("rlp", {"kappa": -1.0}, "kappa >= 0"),
        ("meta", {"label_smoothing": 0.5}, "label_smoothing in"),
    ],
)
def test_hyperparameters_out_of_range(name, hyper, said):
    with pytest.raises(ValueError, match=said):
        xf.METHODS[name](**columns(name), **hyper)


# --- the trainer's losses -------------------------------------------------------------------------------------------


def states(model, rows, name):
    head = torch.eye(32)
    return plain_outputs(model, type("Plain", (), {"weight": head, "bias": torch.zeros(32)}), rows, name)


def test_the_trainer_reads_the_views_of_pairs(tmp_path, monkeypatch):
    kept = []
    fixed = torch.arange(32) % 4 != 1  # in place of a drawn mask

    def masked(x, p, training):
        kept.append((p, training))
        return x * fixed

    monkeypatch.setattr("xpo_fast.rewards.samples.dropout", masked)
    rows = make_rows(4)
    trainer = make_trainer(tmp_path, "contrastive", rows=rows, method_args={"alpha": 0.5}, view_dropout=0.25)
    head, model = value_head(trainer.model), trainer.model
    d = states(model, rows, "chosen") - states(model, rows, "rejected")
    w, l = (plain_outputs(model, head, rows, n)[:, 0] for n in ("chosen", "rejected"))  # noqa: E741
    loss = (torch.log1p(torch.exp(l - w)) + 0.5 * plain_nce(d * fixed, d * fixed, 0.05)).mean()
    weight = model.model.layers[0].mlp.up_proj.weight
    (expected,) = torch.autograd.grad(loss, weight)
    gradient = Gradients()
    trainer.add_callback(gradient)
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_close(gradient.found["model.layers.0.mlp.up_proj.weight"], expected, rtol=1e-3, atol=1e-5)
    assert (0.25, True) in kept and (0.25, False) in kept  # the check before training draws nothing


def test_the_trainer_reads_the_policys_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("xpo_fast.rewards.samples.dropout", lambda x, p, training: x)
    rows, samples = make_rows(4), make_samples(2)
    trainer = make_trainer(
        tmp_path, "rlp", rows=rows, samples=samples, method_args={"alpha": 0.5}, learning_rate=0.0, max_steps=1
    )
    model, head = trainer.model, value_head(trainer.model)
    flat = [{"prompt": s["prompt"], "chosen": c} for s in samples for c in s["completions"]]
    z = states(model, flat, "chosen")
    w, l = (plain_outputs(model, head, rows, n)[:, 0] for n in ("chosen", "rejected"))  # noqa: E741
    apart = plain_nce(z, z, 0.05).mean().detach()
    expected = torch.log1p(torch.exp(l - w)).mean().detach() + 0.5 * apart
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(expected), rel=1e-4)
    assert log(trainer, "views_loss")[0] == pytest.approx(float(apart), rel=1e-3)


def test_meta_takes_the_gradient_at_the_moved_weights(tmp_path):
    rows, samples = make_rows(4), make_samples(3)
    trainer = make_trainer(tmp_path, "meta", rows=rows, samples=samples, sample_prompts=3, inner_lr=0.3, max_steps=1)
    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    head = value_head(model)
    weights = [p for p in model.parameters() if p.requires_grad]

    total = 0
    for s in samples:
        flat = [{"prompt": s["prompt"], "chosen": c} for c in s["completions"]]
        r, k = plain_outputs(model, head, flat)[:, 0], len(flat)
        pairs = [torch.sigmoid((r[i] - r[j]).abs()) for i in range(k) for j in range(i)]
        total = total + 2 / k**2 * torch.stack(pairs).sum()
    up = torch.autograd.grad(total / len(samples), weights, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(weights, up):
            p += 0 if g is None else 0.3 * g
    w, l = (plain_outputs(model, head, rows, n)[:, 0] for n in ("chosen", "rejected"))  # noqa: E741
    expected = torch.log1p(torch.exp(l - w)).mean()
    (gradient,) = torch.autograd.grad(expected, model.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])

    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert log(trainer, "spread")[0] == pytest.approx(float(total.detach()) / 3, rel=1e-4)
    assert_close(kept.found["model.layers.0.mlp.up_proj.weight"], gradient, rtol=1e-3, atol=1e-6)
    plain = make_trainer(tmp_path, rows=rows, max_steps=1)
    plain.train()
    assert log(plain)[0] != pytest.approx(float(expected.detach()), rel=1e-5)  # the inner step is felt


def test_moved_weights_come_back_bit_by_bit():
    layer = torch.nn.Linear(3, 2)
    before, x = [p.detach().clone() for p in layer.parameters()], torch.randn(4, 3)
    layer(x).sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    gain = (layer(x) ** 2).sum()
    with pytest.raises(RuntimeError, match="inside"), moved(layer, gain, 0.1):
        assert not torch.equal(layer.weight, before[0])
        assert (layer(x) ** 2).sum() > gain
        raise RuntimeError("inside")
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before))
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), grads))
    for gain in ((layer(x) * math.nan).sum(), torch.zeros((), requires_grad=True) * 1):
        with pytest.raises(ValueError, match="no finite gradient"), moved(layer, gain, 0.1):
            pass


@pytest.mark.parametrize("method", ["contrastive", "meta", "rlp"])
def test_resumed_runs_are_the_run(tmp_path, method):
    how: dict = {"peft_config": lora(lora_dropout=0.1)}
    how |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    how |= {"gradient_accumulation_steps": 2, "rows": make_rows(12)}
    whole = make_trainer(tmp_path, method, **how)
    whole.train()
    again = make_trainer(tmp_path, method, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert log(again)[-2:] == log(whole)[-2:]
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(p, q), name
    if method in READS_SAMPLES:
        other = make_trainer(tmp_path, method, **{**how, "samples": make_samples(4)})
        with pytest.raises(ValueError, match="samples was"):
            other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_samples_are_dealt_by_prompt_and_by_number(tmp_path):
    rows = [{"prompt": "w1 w2", "completion": c} for c in (" w3", " w4")]
    rows += [{"prompt": "w5", "completions": [" w6", " w7", " w8"], "scores": [1, 2, 3]}]
    found, groups = load_samples(rows)
    assert [[found[i]["chosen"] for i in group] for group in groups] == [[" w3", " w4"], [" w6", " w7", " w8"]]
    trainer = make_trainer(tmp_path, "meta", samples=rows, sample_prompts=1)
    first, second, third = (trainer.samples.batch(k) for k in range(3))
    assert torch.equal(first["sample_input_ids"], third["sample_input_ids"])
    assert {len(b["sample_input_ids"]) for b in (first, second)} == {2, 3}
    assert set(first) >= {"sample_input_ids", "sample_attention_mask", "sample_targets", "sample_lists"}


def test_what_is_missing_or_has_no_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rlp reads what the policy samples: pass samples"):
        make_trainer(tmp_path, "rlp", samples=None)
    with pytest.raises(ValueError, match="samples are for meta and rlp; bradley_terry has no use"):
        make_trainer(tmp_path, samples=make_samples())
    for name, value in (("view_dropout", 0.2), ("sample_prompts", 2), ("inner_lr", 0.1)):
        with pytest.raises(ValueError, match=f"{name} is for .*; bradley_terry has no use"):
            make_trainer(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="view_dropout must be above 0"):
        make_trainer(tmp_path, "contrastive", view_dropout=0.0)
    with pytest.raises(ValueError, match="expected 2 or more per batch, got 1"):
        make_trainer(tmp_path, "contrastive", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="tokens_per_batch: not with meta"):
        make_trainer(tmp_path, "meta", samples=make_samples(), tokens_per_batch=64)
    with pytest.raises(ValueError, match="loss of contrastive depends on which units share"):
        make_trainer(tmp_path, "contrastive", tokens_per_batch=64)
    with pytest.raises(DataError, match=r"expected 2 or more samples of a prompt.*got 1"):
        make_trainer(tmp_path, "meta", samples=[{"prompt": "w1", "completions": [" w2"]}])
    with pytest.raises(DataError, match="completions must be a list"):
        load_samples([{"prompt": "w1", "completions": " w2"}])
    with pytest.raises(ValueError, match="no use for it"):
        make_trainer(tmp_path, "rlp", samples=make_samples(), inner_lr=0.1)


def test_soft_labels_and_invalid_pairs_of_a_batch(tmp_path):
    assert {"contrastive", "meta", "rlp", "bradley_terry"} <= SOFT_LABELS and "grm" not in SOFT_LABELS
    assert {"contrastive", "rlp"} == READS_VIEWS
    given = columns("contrastive")
    valid = torch.tensor([True, False, True, True, False][: len(given["view"])])
    from xpo_fast.methods import of_valid

    losses, metrics = of_valid(xf.METHODS["contrastive"], given, valid)
    alone, _ = xf.METHODS["contrastive"](**{k: x[valid] for k, x in given.items()})
    assert_close(losses[valid], alone)
    assert not losses[~valid].any() and all(len(m) == len(valid) for m in metrics.values())
    rows = [{**row, "prob": 0.5} for row in make_rows(4)]
    trainer = make_trainer(tmp_path, "contrastive", rows=rows, method_args={"alpha": 0.0})
    head = value_head(trainer.model)
    w, l = (plain_outputs(trainer.model, head, rows, n)[:, 0] for n in ("chosen", "rejected"))  # noqa: E741
    expected = (torch.log1p(torch.exp(l - w)) + torch.log1p(torch.exp(w - l))).mean().detach() / 2
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(expected), rel=1e-5)


# --- whitening --------------------------------------------------------------------------------------------------------


def scorer(**spec) -> RewardModel:
    """A reward model whose rewards are far from mean 0 and deviation 1."""
    model = make_model()
    head = attach_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1.0, 2.0, 32))
        head.bias.fill_(7.0)
    return RewardModel(model, make_tokenizer(), RewardSpec(**spec))


ROWS = make_rows(6)
PROMPTS = [row["prompt"] for row in ROWS]
SIDES = [[row[name] for row in ROWS] for name in ("chosen", "rejected")]


def test_every_consumer_reads_whitened_rewards():
    plain, white = scorer(), scorer(mean=7.5, std=2.5)
    raw = plain.score(PROMPTS, SIDES[0])
    expected = (raw - 7.5) / 2.5
    assert_close(white.score(PROMPTS, SIDES[0]), expected)
    assert white(PROMPTS, SIDES[0]) == pytest.approx(expected.tolist(), rel=1e-5)  # as a reward of RL
    assert_close(RewardJudge(white).score(PROMPTS, SIDES[0]), expected)
    assert_close(white.outputs(PROMPTS, SIDES[0]), plain.outputs(PROMPTS, SIDES[0]))  # what is merged and compared
    # probabilities are those that were fitted
    p = torch.sigmoid(raw - plain.score(PROMPTS, SIDES[1]))
    assert_close(white.compare(PROMPTS, *SIDES), p, rtol=1e-4, atol=1e-6)
    assert_close(RewardJudge(white).compare(PROMPTS, *SIDES), p, rtol=1e-4, atol=1e-6)
    groups = [list(two) for two in zip(*SIDES)]
    tables = [group_wins(RewardJudge(model), PROMPTS, groups) for model in (plain, white)]
    assert_close(*tables, rtol=1e-4, atol=1e-6)
    figures = [summary(score_pairs("a", model, ROWS)) for model in (plain, white)]
    for name in ("accuracy", "log_loss", "brier", "calibration_error"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-4), name
    assert figures[1]["margin_std"] == pytest.approx(figures[0]["margin_std"] / 2.5, rel=1e-4)


def test_an_ensemble_of_whitened_models_has_one_zero():
    from xpo_fast.rewards.ensemble import RewardEnsemble

    plain, white = scorer(), scorer(mean=7.5, std=2.5)
    both = RewardEnsemble([plain, white], "worst").score(PROMPTS, SIDES[0])
    assert_close(both, torch.minimum(plain.score(PROMPTS, SIDES[0]), white.score(PROMPTS, SIDES[0])))


def test_the_length_rule_sees_the_whitened_reward():
    spec = RewardSpec(mean=1.0, std=2.0, length_alpha=3.0, length_lam=0.5, length_target=4.0)
    outputs, lengths = torch.tensor([[5.0], [1.0]], dtype=torch.float64), torch.tensor([5.0, 1.0], dtype=torch.float64)
    # (5−1)/2 = 2, 2/8 − 0.5·1; 0 − 0.5·3
    assert_close(spec.combine(outputs, lengths), torch.tensor([-0.25, -1.5], dtype=torch.float64))


def test_moments_are_saved_and_folders_without_them_load(tmp_path):
    model = scorer(mean=0.5, std=2.0)
    model.save(tmp_path / "white")
    again = RewardModel.load(tmp_path / "white")
    assert again.spec == model.spec and again.scale == 2.0
    assert_close(again.score(PROMPTS, SIDES[0]), model.score(PROMPTS, SIDES[0]))
    save_spec(RewardSpec(), tmp_path)
    assert not {"mean", "std"} & set(json.loads((tmp_path / SPEC_FILE).read_text()))  # as earlier versions wrote it
    assert load_spec(tmp_path) == RewardSpec()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"mean": 1.0}, "mean and std, or neither"),
        ({"mean": 1.0, "std": 0.0}, "std > 0"),
        ({"mean": math.nan, "std": 1.0}, "finite mean"),
        ({"method": "preference_model", "mean": 0.0, "std": 1.0}, "no reward to whiten"),
    ],
)
def test_moments_that_cannot_be(spec, said):
    with pytest.raises(ValueError, match=said):
        RewardSpec(**spec)


@pytest.mark.parametrize("held_out", [True, False])
def test_whitening_measures_what_was_trained(tmp_path, held_out):
    rows, held = make_rows(8), make_rows(5, seed=3)
    trainer = make_trainer(tmp_path, rows=rows, eval_rows=held if held_out else None, max_steps=2, whiten=True)
    trainer.train()
    trainer.save_model()
    scored = RewardModel.load(tmp_path / "out")
    assert scored.spec.std is not None and scored.spec == trainer.spec
    found = held if held_out else rows
    rewards = scored([r["prompt"] for r in found] * 2, [r[n] for n in ("chosen", "rejected") for r in found])
    assert np.mean(rewards) == pytest.approx(0, abs=1e-4) and np.std(rewards, ddof=1) == pytest.approx(1, rel=1e-4)


def test_whitening_needs_rewards_that_differ(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_rows(4))
    with torch.no_grad():
        value_head(trainer.model).weight.zero_()
    with pytest.raises(ValueError, match="8 rewards of standard deviation 0"):
        trainer.whiten()
    with pytest.raises(ValueError, match="no reward to whiten"):
        make_trainer(tmp_path, "preference_model", whiten=True)


# --- voting -----------------------------------------------------------------------------------------------------------


def test_a_vote_by_hand():
    margins = np.array([[-3.0, -1.0], [-0.5, 0.3], [0.2, 0.2], [4.0, 2.0]])
    votes = vote(margins, flip=0.25, drop=0.25)
    assert votes.mean.tolist() == pytest.approx([-2.0, -0.1, 0.2, 3.0])
    assert votes.std.tolist() == pytest.approx([1.0, 0.4, 0.0, 1.0])
    assert votes.flipped.tolist() == [True, False, False, False]
    assert votes.dropped.tolist() == [False, True, False, False]
    # of the label that comes: (σ(3) + σ(1))/2
    assert votes.prob[0] == pytest.approx((0.9525741268224334 + 0.7310585786300049) / 2)
    assert votes.prob[3] == pytest.approx((0.9820137900379085 + 0.8807970779778823) / 2)
    assert vote(margins, flip=1.0).flipped.tolist() == [True, True, False, False]  # a positive mean keeps its label
    assert not vote(margins, flip=0.0).flipped.any()


def test_adapted_pairs_are_read_by_train_and_reward():
    from xpo_fast import data

    rows = [{**row, "prob": 0.9, "where": f"a:{i}"} for i, row in enumerate(make_rows(4))]
    votes = vote(np.array([[-3.0, -1.0], [-0.5, 0.3], [0.2, 0.2], [4.0, 2.0]]), flip=0.25, drop=0.25)
    hard, soft, margin = (adapted(rows, votes, labels) for labels in ("hard", "soft", "margin"))
    assert [row["prompt"] for row in hard] == [rows[i]["prompt"] for i in (0, 2, 3)]
    assert (hard[0]["chosen"], hard[0]["rejected"]) == (rows[0]["rejected"], rows[0]["chosen"])
    assert hard[1]["chosen"] == rows[2]["chosen"] and "prob" not in hard[1]
    assert [row["flipped"] for row in hard] == [True, False, False]
    assert hard[0]["strength_mean"] == pytest.approx(-2.0) and hard[0]["strength_std"] == pytest.approx(1.0)
    assert [row["margin"] for row in margin] == pytest.approx([2.0, 0.2, 3.0])
    assert data.load(soft, kind="pair")["prob"] == pytest.approx([votes.prob[i] for i in (0, 2, 3)])
    assert data.load(margin, kind="pair")["margin"] == pytest.approx([2.0, 0.2, 3.0])
    with pytest.raises(ValueError, match=r"labels to be one of hard, soft, margin.*did you mean soft"):
        adapted(rows, votes, "sofft")
    with pytest.raises(ValueError, match="expected the 4 pairs"):
        adapted(rows[:3], votes)


@pytest.mark.parametrize(
    ("margins", "how", "said"),
    [
        (np.zeros((0, 2)), {}, "one or more pairs"),
        (np.zeros(3), {}, r"margins \(P, M\)"),
        (np.array([[math.nan]]), {}, "finite margins, got 1"),
        (np.ones((2, 2)), {"flip": 0.7, "drop": 0.4}, "at most 1 together"),
    ],
)
def test_votes_that_cannot_be_taken(margins, how, said):
    with pytest.raises(ValueError, match=said):
        vote(margins, **how)


def test_auc_counts_ties_as_half():
    assert auc(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])) == pytest.approx(2.5 / 4)
    with pytest.raises(ValueError, match="positives and negatives, got 2 and 0"):
        auc(np.ones(2), np.array([True, True]))


def test_voting_finds_planted_label_noise(tmp_path):
    """A fifth of the labels is wrong; three tiny reward models of other seeds find which, and flip them back."""
    g = torch.Generator().manual_seed(5)
    noisy = torch.rand(96, generator=g) < 0.2
    rows = []
    for wrong, n in zip(noisy.tolist(), torch.randint(10, 60, (96,), generator=g).tolist()):
        good, bad = f" w{n} w5", f" w{n} w6"  # the last word is all that counts
        rows.append({"prompt": f"w{n // 2}", "chosen": bad if wrong else good, "rejected": good if wrong else bad})
    margins = []
    for seed in range(3):
        made = make_trainer(
            tmp_path, rows=rows, seed=seed, max_steps=12, per_device_train_batch_size=16, learning_rate=3e-3
        )
        made.train()
        margins.append(score_pairs(str(seed), made.reward_model(), rows).margin)
    votes = vote(np.stack(margins, axis=1), flip=0.3)
    assert auc(-votes.mean, noisy.numpy()) >= 0.9
    fixed = adapted(rows, votes)
    before, after = (np.mean([row["chosen"].endswith("w5") for row in x]) for x in (rows, fixed))
    assert before < 0.85 and after > 0.95


# --- preference-model pre-training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_a_ranking_goes_on_from_the_discriminators_head(tmp_path, adapter):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    first = make_trainer(
        *(tmp_path / "first", "discriminator"),
        model=load_model(str(tmp_path / "base"))[0],
        max_steps=3,
        peft_config=lora() if adapter else None,
    )
    first.train()
    first.save_model()
    folder = str(tmp_path / "first" / "out")
    trained = RewardModel.load(folder)
    second = make_trainer(tmp_path / "second", model=folder, max_steps=1, peft_config=lora() if adapter else None)
    assert torch.equal(value_head(second.model).weight, value_head(trained.model).weight)
    assert value_head(second.model).weight.abs().max() > 0
    ranking = second.reward_model().score(PROMPTS, SIDES[0])
    assert_close(ranking, trained.score(PROMPTS, SIDES[0]), rtol=1e-4, atol=1e-5)
    fresh = make_trainer(tmp_path / "third", max_steps=1)
    assert not torch.equal(value_head(fresh.model).weight, value_head(trained.model).weight)


def test_a_head_of_other_outputs_is_not_lost_in_silence(tmp_path):
    first = make_trainer(tmp_path / "first", "odin", max_steps=1)
    first.train()
    first.save_model()
    with pytest.raises(ValueError, match="1 outputs, the model has one with 2"):
        make_trainer(tmp_path / "second", model=str(tmp_path / "first" / "out"))


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    files = {"pairs": make_rows(12), "samples": make_samples(), "judged": make_rows(12, "unpaired", seed=2)}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    for command in ("eval_reward", "reward"):
        monkeypatch.setattr(f"xpo_fast.cli.{command}.can_plot", lambda: False)


def run(*options) -> int:
    return cli.main([str(option) for option in options])


def reward(home, output, *options, model=None) -> int:
    fixed = ("--cpu", "--batch-size", 4, "--logging-steps", 1, "--lora-targets", "q_proj,v_proj", "--max-length", 64)
    given = ("--data", home / "pairs.jsonl", "--model", model or home / "model", "--output-dir", output)
    return run("reward", *given, *fixed, "--preflight", "off", "--eval-split", 0, *options)


def log_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not re.search("second|time|train_loss", k)} for line in lines]


def test_pretraining_killed_and_resumed_is_the_same(home, tmp_path, capsys):
    """Killed in the second stage, and resumed: the first stage is not trained again."""
    steps = ("--max-steps", 4, "--save-steps", 2, "--lr", 0.01, "--pretrain-data", home / "judged.jsonl", "--whiten")
    steps += ("--eval-split", 3)
    assert reward(home, tmp_path / "whole", *steps) == 0
    assert f"value head of discriminator in {tmp_path / 'whole' / 'discriminator'}" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    killed = tmp_path / "killed"
    shutil.rmtree(killed / "checkpoint-4")
    (killed / "reward_model.json").unlink()
    (killed / "discriminator" / "checkpoint-4" / "trainer_state.json").unlink()
    assert reward(home, killed, *steps, "--resume") == 0
    whole, again = RewardModel.load(tmp_path / "whole"), RewardModel.load(killed)
    assert torch.equal(whole.score(PROMPTS, SIDES[0]), again.score(PROMPTS, SIDES[0]))
    assert whole.spec == again.spec and whole.spec.std is not None and log_of(killed) == log_of(tmp_path / "whole")
    first = RewardModel.load(killed / "discriminator")
    assert first.spec.method == "discriminator" and first.spec.std is None
    other = ("--pretrain-data", home / "pairs.jsonl", "--max-steps", 4, "--resume")
    assert reward(home, killed, *other) == 2
    assert "was trained with data" in capsys.readouterr().err

    assert run("merge", tmp_path / "whole", "--output-dir", tmp_path / "merged") == 0
    merged = RewardModel.load(tmp_path / "merged")
    assert merged.spec == whole.spec
    assert_close(merged.score(PROMPTS, SIDES[0]), whole.score(PROMPTS, SIDES[0]), rtol=1e-3, atol=1e-4)


def test_samples_by_command_and_a_vote(home, tmp_path, capsys):
    short, models = ("--max-steps", 2, "--lr", 0.01), []
    for k, method in enumerate(("meta", "rlp", "contrastive")):
        models += [tmp_path / method]
        further = ("--samples", home / "samples.jsonl") if method in READS_SAMPLES else ("--view-dropout", 0.2)
        assert reward(home, models[-1], "--method", method, "--seed", k, *short, *further) == 0
        assert RewardModel.load(models[-1]).spec.method == method
    for method, name in (("meta", "spread"), ("rlp", "views_loss"), ("contrastive", "contrastive_loss")):
        assert any(name in line for line in log_of(tmp_path / method)), name
    capsys.readouterr()
    given = [x for model in models for x in ("--model", model)]
    how = ("--vote", "--vote-flip", 0.25, "--vote-drop", 0.25, "--vote-labels", "soft", "--output-dir", tmp_path / "v")
    assert run("eval-reward", "--data", home / "pairs.jsonl", *given, *how, "--cpu") == 0
    report = json.loads((tmp_path / "v" / "report.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "v" / "voted.jsonl").read_text().splitlines()]
    assert report["vote"]["pairs"] == 12 and report["vote"]["dropped"] == 3 == 12 - len(rows)
    assert report["vote"]["flipped"] == sum(row["flipped"] for row in rows) <= 3
    assert all(0 < row["prob"] < 1 for row in rows) and "vote of 3 models on 12 pairs" in capsys.readouterr().out
    given = ("--data", tmp_path / "v" / "voted.jsonl", "--model", home / "model", "--output-dir", tmp_path / "again")
    assert run("reward", *given, *short, "--cpu", "--method", "preference_model", "--eval-split", 0) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "rlp"), "rlp reads what the policy samples: give --samples"),
        (("--samples", "s.jsonl"), "--samples is for meta and rlp, not for bradley_terry"),
        (("--pretrain-data", "s.jsonl", "--method", "discriminator"), "is what it trains"),
        (("--pretrain-data", "s.jsonl", "--method", "odin"), "odin has another head"),
        (("--inner-lr", "0.1"), "inner_lr is for meta; bradley_terry has no use for it"),
        (("--whiten", "--method", "preference_model"), "no reward to whiten"),
    ],
)
def test_options_without_a_use_are_refused(home, tmp_path, capsys, options, said):
    assert reward(home, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["meta", "bradley_terry"])
def test_a_run_with_samples_is_checked(home, tmp_path, capsys, method):
    given = ("--data", home / "pairs.jsonl", "--model", home / "model", "--cpu", "--method", method, "--batch-size", 4)
    targets = ("--lora-targets", "q_proj,v_proj", "--max-length", 64)
    assert run("check", *given, *targets, "--samples", home / "samples.jsonl") == (0 if method == "meta" else 2)
    assert ("on 11 pairs" if method == "meta" else "--samples is for meta and rlp") in str(capsys.readouterr())


def test_memory_is_not_predicted_where_it_is_not_known():
    asked = {"command": "reward", "method": "rlp", "units": ((8, (4, 4)),), "config": None}
    with pytest.raises(ValueError, match="rlp reads the policy's samples in a forward of its own"):
        phases.Rewards(Question(**asked), None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--vote",), "--vote takes two or more --model"),
        (("--vote-flip", "0.1"), "--vote-flip is for --vote"),
        (("--vote", "--model", "b", "--vote-flip", "0.8", "--vote-drop", "0.3"), "at most 1 together; got 0.8 and 0.3"),
    ],
)
def test_votes_by_command_are_checked_first(home, tmp_path, capsys, options, said):
    given = ("--data", home / "pairs.jsonl", "--model", "a", "--output-dir", tmp_path / "out", "--cpu")
    assert run("eval-reward", *given, *options) == 2
    assert said in capsys.readouterr().err


# --- drift, and preferences by agreement ------------------------------------------------------------------------------


def test_distances_by_hand():
    states = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    # S = diag(2/3, 8/3), tr/2 = 5/3; s = ½: Σ = diag(7/6, 13/6)
    (found,) = distances(states, np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), shrinkage=0.5)
    assert found.tolist() == pytest.approx([3 / 7, 0.0, 3 / 7 + 3 / 13])
    with pytest.raises(ValueError, match="two or more rows"):
        distances(states[:1])
    with pytest.raises(ValueError, match="states that differ"):
        distances(np.ones((3, 2)))
    g = np.random.default_rng(0)
    (near,) = distances(g.normal(size=(4000, 8)), g.normal(size=(4000, 8)), shrinkage=0.0)
    assert near.mean() == pytest.approx(1.0, rel=0.05)


def test_states_are_what_the_rewards_are_read_from():
    model = scorer(mean=0.5, std=2.0)
    found = model.states(PROMPTS, SIDES[0])
    rewards = found @ model.head.weight[0] + model.head.bias
    assert_close((rewards - 0.5) / 2.0, model.score(PROMPTS, SIDES[0]), rtol=1e-4, atol=1e-5)
    assert model.states([], []).shape == (0, 32)
    with pytest.raises(ValueError, match="preference_model has no hidden state of one completion"):
        scorer(method="preference_model").states(PROMPTS, SIDES[0])


def test_drift_is_seen_where_samples_are_of_another_kind():
    pairs = make_rows(40)
    alike = [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in make_rows(30, seed=5)]
    strange = [{"prompt": "w1", "chosen": " w7" * (30 + i % 5)} for i in range(30)]
    near, far = Drift(pairs, alike), Drift(pairs, strange)
    found, off = near.add("a", scorer()), far.add("a", scorer())
    assert abs(found["auc"] - 0.5) < 0.2 and off["auc"] > 0.95
    assert off["distance_samples"] > 1.5 * off["distance"] and found["samples"] == 30 and found["completions"] == 40
    assert near.disagreement() is None
    model = scorer()
    held = pairs[1::2]
    rewards = model.score([r["prompt"] for r in held] * 2, [r[n] for n in ("chosen", "rejected") for r in held])
    drawn = model.score([r["prompt"] for r in alike], [r["chosen"] for r in alike])
    shift = (drawn.mean() - rewards.mean()) / rewards.std(correction=0)
    assert found["reward_shift"] == pytest.approx(float(shift), rel=1e-3, abs=1e-4)
    near.add("the same, whitened", scorer(mean=3.0, std=4.0))
    assert near.disagreement() == pytest.approx({"pairs": 0.0, "samples": 0.0}, abs=1e-5)
    with pytest.raises(ValueError, match="four or more pairs, and samples; got 2 and 30"):
        Drift(pairs[:2], alike)


def test_what_most_samples_say_is_preferred():
    texts = ["the answer is 4", "It is a dog.", "The answer is 4!", "the answer was 4", "no"]
    assert clusters(texts) == [[0, 2, 3], [1], [4]]
    assert overlap("a b c", "B c d") == 0.5 and overlap("", "") == 1.0
    assert clusters(["1", "2", "11"], alike=lambda a, b: a[0] == b[0]) == [[0, 2], [1]]
    rows, groups = load_samples([{"prompt": "q", "completions": texts}, {"prompt": "r", "completions": ["a", "b"]}])
    (pair,) = confident_pairs(rows, groups)
    assert pair == {"prompt": "q", "chosen": texts[0], "rejected": "no", "confidence": 0.6}
    assert confident_pairs(rows, groups, least=0.7) == []  # and of r neither sample is the majority
    with pytest.raises(ValueError, match=r"least in \(0, 1\]"):
        confident_pairs(rows, groups, least=0.0)


def test_drift_and_agreement_by_command(home, tmp_path, capsys):
    agreed = [{"prompt": f"w{i}", "completions": [" w3 w4", " w3 w4", " w9 w8 w7"]} for i in range(4)]
    (home / "agreed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in agreed))
    given = ("--samples", home / "agreed.jsonl", "--method", "rlp", "--confident-pairs", 0.6, "--max-steps", 2)
    assert reward(home, tmp_path / "rlp", *given) == 0
    assert "4 that the policy's samples agree on beside 12" in capsys.readouterr().out
    given = ("--model", tmp_path / "rlp", "--samples", home / "agreed.jsonl", "--output-dir", tmp_path / "measured")
    assert run("eval-reward", "--data", home / "pairs.jsonl", *given, "--cpu") == 0
    (row,) = json.loads((tmp_path / "measured" / "report.json").read_text())["drift"]["models"]
    assert row["samples"] == 12 and 0 <= row["auc"] <= 1
    assert "rlp on 12 samples: rewards" in capsys.readouterr().out
    assert reward(home, tmp_path / "no", "--method", "meta", "--samples", "s", "--confident-pairs", 0.5) == 2
    assert "--confident-pairs is for rlp, not for meta" in capsys.readouterr().err
