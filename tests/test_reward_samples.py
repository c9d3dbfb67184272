"""Reward methods that read views of states or the policy's samples: contrastive, meta, rlp."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from inputs import columns, gradients
from planted import decided, said
from reward_runs import home as home
from reward_runs import reward, run
from reward_runs import without_plots as without_plots
from test_reward_model import log, make_samples, make_trainer, plain_outputs
from test_trainer import PEFT_WARNING, Gradients, lora, make_model, make_rows
from xpo_fast.data import DataError
from xpo_fast.fit import phases
from xpo_fast.fit.question import Question
from xpo_fast.methods.reward import info_nce, spread
from xpo_fast.models.value_head import value_head
from xpo_fast.rewards.agreement import confident_pairs
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.samples import load_samples, moved
from xpo_fast.rewards.spec import READS_SAMPLES, READS_VIEWS, SOFT_LABELS

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


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
    with pytest.raises(ValueError, match="rlp reads what the policy samples: give samples"):
        make_trainer(tmp_path, "rlp", samples=None)
    with pytest.raises(ValueError, match="samples are for meta and rlp, not for bradley_terry"):
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


# --- planted truths: beside bradley_terry on the same rows and seed ---------------------------------------------------


OLD, NEW = (("w5", "w6"),), (("w75", "w76"),)  # the words that decide in the pairs, and in what the policy says


def taught(folder, method: str, seed: int, rows, **args) -> RewardModel:
    how = {"max_steps": 40, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "logging_steps": 1000}
    how |= {"train_sampling_strategy": "random", "preflight": "off", "seed": seed}
    trainer = make_trainer(folder, method, model=make_model(seed), rows=rows, **how, **args)
    trainer.train()
    return trainer.reward_model()


def scores(model: RewardModel, rows) -> list[torch.Tensor]:
    return [model.score([row["prompt"] for row in rows], [row[n] for row in rows]) for n in ("chosen", "rejected")]


def accuracy(model: RewardModel, rows) -> float:
    chosen, rejected = scores(model, rows)
    return float((chosen > rejected).float().mean())


def alike(model: RewardModel, kinds) -> torch.Tensor:
    """The cosines of the differences of states of 60 pairs of each kind with those of the other: (60, 60)."""
    found = []
    for seed, kind in enumerate(kinds):
        rows = decided(60, 7 + seed, kind)
        w, l = (model.states([r["prompt"] for r in rows], [r[n] for r in rows]) for n in ("chosen", "rejected"))  # noqa: E741
        found.append(torch.nn.functional.normalize(w - l, dim=1))
    return found[0] @ found[1].T


def beside_contrastive(folder, seed: int) -> tuple[list[float], list[float]]:
    kinds = (("w5", "w6"), ("w7", "w8"))
    rows, held = decided(48, 20 + seed, *kinds), decided(200, 9, *kinds)
    models = [taught(folder, method, seed, rows) for method in ("contrastive", "bradley_terry")]
    return [float(alike(m, kinds).mean()) for m in models], [accuracy(m, held) for m in models]


def test_contrastive_keeps_pairs_apart_that_differ_in_different_ways(tmp_path):
    """Two words decide, each in half of the pairs: Bradley-Terry lays the differences of both on one line."""
    (cosine, plain), (right, plainly_right) = beside_contrastive(tmp_path, 0)
    assert cosine < 0.8 * plain, f"cosines of pairs of different kinds: {cosine:.3f}, bradley_terry {plain:.3f}"
    assert right > plainly_right - 0.05, f"accuracy held out: {right:.3f}, bradley_terry {plainly_right:.3f}"


def dialect(count: int, seed: int) -> list[dict]:
    """Of a prompt's five samples three say the same in other orders; in four prompts of five that is the good thing."""
    g, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        most, other = NEW[0] if i % 5 else NEW[0][::-1]
        answer = said(g, 60, most).split()
        orders = [torch.randperm(4, generator=g).tolist() for _ in range(3)]
        agreed = [" " + " ".join(answer[k] for k in order) for order in orders]
        rows.append({"prompt": f"w{i} w{i // 2}", "completions": [*agreed, *(said(g, 60, other) for _ in range(2))]})
    return rows


def beside_rlp(folder, seed: int) -> list[float]:
    """Accuracy on the policy's distribution: of rlp with the pairs that samples agree on, of bradley_terry without."""
    old, held, samples = decided(64, 10 + seed, *OLD), decided(200, 98, *NEW, low=60), dialect(40, 1)
    agreed = [{n: row[n] for n in old[0]} for row in confident_pairs(*load_samples(samples), least=0.5)]
    followed = taught(folder, "rlp", seed, [*old, *agreed], samples=samples)
    return [accuracy(model, held) for model in (followed, taught(folder, "bradley_terry", seed, old))]


def test_rlp_with_pairs_that_samples_agree_on_follows_the_policy_to_where_old_pairs_say_nothing(tmp_path):
    """A fifth of the synthetic preferences is wrong. Without them the views alone do not tell good from bad."""
    found, plain = beside_rlp(tmp_path, 0)
    assert found > plain + 0.05, f"accuracy on what the policy says: {found:.3f}, bradley_terry {plain:.3f}"


def spread_of(model: RewardModel, samples) -> torch.Tensor:
    each = []
    for row in samples:
        flat = [{"prompt": row["prompt"], "chosen": c} for c in row["completions"]]
        each.append(plain_outputs(model.model, model.head, flat)[:, 0])
    return spread(torch.stack(each)).mean()


def inner_step(folder, seed: int, rate: float = 0.01) -> float:
    """How much J of held-out samples of the shifted policy grows by the inner step on others."""
    model = taught(folder, "bradley_terry", seed, decided(64, 10 + seed, *OLD))
    held = dialect(12, 2)
    with torch.no_grad():
        before = float(spread_of(model, held))
    with moved(model.model, spread_of(model, dialect(8, 1)), rate), torch.no_grad():
        return float(spread_of(model, held)) - before


def test_the_inner_step_of_meta_tells_held_out_samples_of_a_shifted_policy_apart(tmp_path):
    """At the moved weights, by a little. The weights that training returns do no better than bradley_terry's here."""
    gains = [inner_step(tmp_path, seed) for seed in range(3)]
    assert sum(gains) / 3 > 1e-4, f"growth of J of held-out samples, three seeds: {gains}"


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "rlp"), "rlp reads what the policy samples: give samples (--samples)"),
        (("--samples", "s.jsonl"), "samples are for meta and rlp, not for bradley_terry: leave them out (--samples)"),
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
    assert ("on 11 pairs" if method == "meta" else "samples are for meta and rlp") in str(capsys.readouterr())


def test_memory_is_not_predicted_where_it_is_not_known():
    asked = {"command": "reward", "method": "rlp", "units": ((8, (4, 4)),), "config": None}
    with pytest.raises(ValueError, match="rlp reads the policy's samples in a forward of its own"):
        phases.Rewards(Question(**asked), None)
