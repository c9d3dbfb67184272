"""Reward-model losses: literal values, gradients, what the papers say, TRL's trainer, extremes, errors.

Literal values were worked out from the equations with 30-digit arithmetic; the line above each one gives the
steps. L(x) is log(1 + e^-x) = -log sigma(x).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import xpo_fast as xf
from inputs import gradients
from oracle import normal
from xpo_fast.methods.reward import ensemble, length_normalised, length_penalty, odin

METHODS = ("bradley_terry", "k_wise", "regression", "gated", "preference_model", "discriminator", "grm", "haf")

# Differences of rewards (1, -1, 4), of log-ratios (4, -3, 13). Ranks: one list in order, one with two that
# tie.
COLUMNS = {
    "reward_w": [2.0, -0.5, 3.0],
    "reward_l": [1.0, 0.5, -1.0],
    "margin": [0.5, 0.25, 1.0],
    "logit": [1.5, -2.0, 0.5],
    "prob_w": [1.0, 0.25, 0.5],
    "desirable": [True, False, True],
    "logp_w": [-10.0, -7.0, -30.0],
    "logp_l": [-15.0, -9.0, -40.0],
    "ref_logp_w": [-12.0, -6.0, -45.0],
    "ref_logp_l": [-13.0, -11.0, -42.0],
    "rewards": [[2.0, 0.5, -1.0], [1.0, -0.5, 0.25]],
    "ranks": [[1, 2, 3], [2, 1, 2]],
    "targets": [[1.0, 0.0, -1.0], [3.0, -0.5, 0.0]],
    "rewards_w": [[1.0, 2.0], [0.5, -1.0]],
    "rewards_l": [[0.0, 1.0], [1.0, 2.0]],
    "gate_w": [[0.0, 1.0], [2.0, 0.0]],
    "gate_l": [[0.0, 0.0], [-1.0, 1.0]],
}
LEARNT = (
    *("reward_w", "reward_l", "logit", "rewards", "rewards_w", "rewards_l", "gate_w", "gate_l"),
    *("logp_w", "logp_l"),
)
OPTIONAL = ("margin", "mask")


def columns(name: str, dtype: torch.dtype = torch.float64, *, without: tuple[str, ...] = OPTIONAL) -> dict:
    out = {}
    for key in xf.METHODS[name].inputs:
        if key not in without:
            value = torch.tensor(COLUMNS[key])
            out[key] = torch.tensor(COLUMNS[key], dtype=dtype) if value.is_floating_point() else value
    return out


def run(name: str, given: dict, **hyper) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and d(sum of losses) for each column that is learnt."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in LEARNT}
    losses, _ = xf.METHODS[name](**{**given, **leaves}, **hyper)
    return losses, gradients(losses, leaves)


NO_REFERENCE = ("margin", "mask", "ref_logp_w", "ref_logp_l")

LITERALS = [
    # L(1), L(-1), L(4)
    ("bradley_terry", OPTIONAL, {}, [0.313261687518, 1.31326168752, 0.0181499279178]),
    # less the margins: L(0.5), L(-1.25), L(3)
    ("bradley_terry", ("mask",), {}, [0.47407698418, 1.50192908135, 0.0485873515737]),
    # 0.9 L(d) + 0.1 L(-d) = L(d) + 0.1 d: + 0.1, - 0.1, + 0.4
    ("bradley_terry", OPTIONAL, {"label_smoothing": 0.1}, [0.413261687518, 1.21326168752, 0.418149927918]),
    # with margins: + 0.05, - 0.125, + 0.3
    ("bradley_terry", ("mask",), {"label_smoothing": 0.1}, [0.52407698418, 1.37692908135, 0.348587351574]),
    # + 0.01 (3^2, 0^2, 2^2)
    ("bradley_terry", OPTIONAL, {"center": 0.01}, [0.403261687518, 1.31326168752, 0.0581499279178]),
    # [L(1.5) + L(3) + L(1.5)] / 3; the second is best and the others tie: [L(-1.5) + L(-0.75)] / 3
    ("k_wise", OPTIONAL, {}, [0.150471302513, 0.946094761366]),
    # 1^2 + 0.5^2 + 0^2; 2^2 + 0^2 + 0.25^2
    ("regression", OPTIONAL, {}, [1.25, 4.0625]),
    # gates (0.268941, 0.731059), (0.880797, 0.119203); (0.5, 0.5), (0.119203, 0.880797); rewards 1.731059 -
    # 0.5, 0.3211955 - 1.880797: L(1.231059), L(-1.559601)
    ("gated", OPTIONAL, {}, [0.256178500259, 1.75040348619]),
    # L(1.5); 0.25 L(-2) + 0.75 L(2) = L(2) + 0.25 * 2; 0.5 L(0.5) + 0.5 L(-0.5)
    ("preference_model", OPTIONAL, {}, [0.201413277983, 0.626928011043, 0.72407698418]),
    # L(1.5), L(2), L(0.5)
    ("discriminator", OPTIONAL, {}, [0.201413277983, 0.126928011043, 0.47407698418]),
    # 0.99 (L(1), L(-1), L(4)) + 0.01 (L(-1), L(-0.7), L(-3))
    ("grm", OPTIONAL, {}, [0.323261687518, 1.31116093113, 0.0484543021544]),
    # 0.5 of each, (L(-0.5), L(-0.35), L(-1.5))
    ("grm", OPTIONAL, {"alpha": 0.5, "beta": 0.05}, [0.643669335849, 1.09832192147, 0.85978160295]),
    # 0.99 ... + 0.01 (L(0.5), L(0.2), L(1))
    ("grm", NO_REFERENCE, {"regulariser": "dpo"}, [0.314869840485, 1.30611045934, 0.0211010455138]),
    # 0.99 ... + 0.01 (L(0.4), L(-0.3), L(1.3))
    ("grm", OPTIONAL, {"regulariser": "dpo"}, [0.315259223167, 1.30867262309, 0.020378513177]),
    # L(1) + L(0.4), L(-1) + L(-0.3), L(4) + L(1.3)
    ("haf", OPTIONAL, {}, [0.826276939918, 2.16761693199, 0.259158381751]),
    # L(1) + 2 L(0.2), L(-1) + 2 L(-0.15), L(4) + 2 L(0.65)
    ("haf", OPTIONAL, {"alpha": 2.0, "beta": 0.05}, [1.50953942628, 2.8551757831, 0.858260599323]),
]
PATHS = [(name, without, hyper) for name, without, hyper, _ in LITERALS]
every_path = pytest.mark.parametrize(
    ("name", "without", "hyper"), PATHS, ids=[f"{n}-{h}-{len(w)}" for n, w, h in PATHS]
)


@pytest.mark.parametrize(
    ("name", "without", "hyper", "expected"), LITERALS, ids=[f"{n}-{h}" for n, _, h, _ in LITERALS]
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-10)], ids=str)
def test_literal(name, without, hyper, expected, dtype, rtol):
    given = columns(name, dtype, without=without)
    given |= {k: v.requires_grad_() for k, v in given.items() if k in LEARNT}
    losses, metrics = xf.METHODS[name](**given, **hyper)
    assert losses.requires_grad
    assert_close(losses, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol / 10)
    for key, value in metrics.items():
        assert value.shape == losses.shape and not value.requires_grad, key


METRICS = [
    ("bradley_terry", {"chosen": [2.0, -0.5, 3.0], "margins": [1, -1, 4], "accuracies": [1, 0, 1]}),
    ("haf", {"rejected": [1.0, 0.5, -1.0], "margins": [1, -1, 4], "accuracies": [1, 0, 1]}),
    ("gated", {"margins": [1.23105857863, -1.55960146101], "accuracies": [1, 0]}),
    ("k_wise", {"accuracies": [1, 0]}),  # the pairs in order: 3 of 3, 0 of 2
]


@pytest.mark.parametrize(("name", "expected"), METRICS, ids=[m[0] for m in METRICS])
def test_metrics_carry_trls_names(name, expected):
    _, metrics = xf.METHODS[name](**columns(name))
    for key, value in expected.items():
        assert_close(metrics[f"rewards/{key}"].double(), torch.tensor(value, dtype=torch.float64))


@every_path
def test_gradcheck(name, without, hyper):
    given = columns(name, without=without)
    names = [k for k in given if k in LEARNT]

    def method(*tensors):
        return xf.METHODS[name](**{**given, **dict(zip(names, tensors, strict=True))}, **hyper)[0]

    assert torch.autograd.gradcheck(method, [given[k].clone().requires_grad_() for k in names])


@every_path
def test_no_unit_looks_at_another_and_none_is_legal(name, without, hyper):
    given = columns(name, without=without)
    losses, _ = run(name, given, **hyper)
    for i in range(len(losses)):
        alone, _ = run(name, {k: v[i : i + 1] for k, v in given.items()}, **hyper)
        assert_close(alone, losses[i : i + 1])
    losses, found = run(name, {k: v[:0] for k, v in given.items()}, **hyper)
    assert losses.shape == (0,) and losses.requires_grad
    assert all(len(g) == 0 for g in found.values())


# --- Against the equations, one unit and one completion at a time ---


def L(x) -> Tensor:
    return -torch.log(torch.sigmoid(torch.as_tensor(x)))


def plain_k_wise(rewards: Tensor, ranks: Tensor) -> Tensor:
    pairs = list(itertools.permutations(range(len(rewards)), 2))
    terms = [L(rewards[i] - rewards[j]) for i, j in pairs if ranks[i] < ranks[j]]
    return torch.stack(terms).sum() / (len(pairs) / 2) if terms else rewards.sum() * 0


def plain_gated(rewards_w: Tensor, rewards_l: Tensor, gate_w: Tensor, gate_l: Tensor) -> Tensor:
    score = [
        sum(g.exp() * r for g, r in zip(gate, rewards)) / sum(g.exp() for g in gate)
        for gate, rewards in ((gate_w, rewards_w), (gate_l, rewards_l))
    ]
    return L(score[0] - score[1])


def plain_regression(rewards: Tensor, targets: Tensor) -> Tensor:
    return sum(((r - t) ** 2 for r, t in zip(rewards, targets)), rewards.sum() * 0)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", ["k_wise", "regression", "gated"])
def test_agrees_with_the_plain_equation(name, k):
    plain = {"k_wise": plain_k_wise, "regression": plain_regression, "gated": plain_gated}[name]
    names = [n for n in xf.METHODS[name].required if n != "ranks"]
    given = {n: normal(6, k, seed=i) for i, n in enumerate(names)}
    if name == "k_wise":  # ties in most lists, and gaps between ranks
        ranks = torch.randint(1, 5, (6, k), generator=torch.Generator().manual_seed(9))
        given["ranks"] = 2 * ranks - 1
    losses, found = run(name, given)
    leaves = {n: v.clone().requires_grad_() for n, v in given.items() if n in LEARNT}
    expected = torch.stack([plain(**dict(zip(given, unit))) for unit in zip(*{**given, **leaves}.values())])
    assert_close(losses, expected)
    assert_close(found, gradients(expected, leaves))


@pytest.mark.parametrize("name", ["k_wise", "regression"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_lists_of_different_sizes(name, junk):
    sizes = [4, 2, 1, 0, 3]
    mask = torch.arange(4) < torch.tensor(sizes)[:, None]
    mask[4] = torch.tensor([True, False, True, True])  # not only at the end
    other = "ranks" if name == "k_wise" else "targets"
    full = {"rewards": normal(5, 4, seed=1), other: torch.tensor([[3, 1, 4, 2]] * 5).double()}
    given = {k: v.masked_fill(~mask, junk) for k, v in full.items()}
    losses, found = run(name, given | {"mask": mask})
    for i in range(5):
        alone, alone_gradient = run(name, {k: v[i, mask[i]][None] for k, v in full.items()})
        assert_close(losses[i], alone[0])
        assert_close(found["rewards"][i, mask[i]], alone_gradient["rewards"][0])
    assert (found["rewards"][~mask] == 0).all()


# --- What the papers say ---


@pytest.mark.parametrize("hyper", [{}, {"label_smoothing": 0.2}], ids=str)
def test_bradley_terry_knows_only_the_difference(hyper):
    given = columns("bradley_terry", without=("mask",))
    moved = given | {k: given[k] + 7.5 for k in ("reward_w", "reward_l")}
    assert_close(run("bradley_terry", moved, **hyper), run("bradley_terry", given, **hyper))


def test_the_centre_is_what_a_shift_costs():
    given = columns("bradley_terry")
    moved = given | {k: given[k] + 7.5 for k in ("reward_w", "reward_l")}
    plain, centred = run("bradley_terry", moved)[0], run("bradley_terry", moved, center=0.3)[0]
    # sums 3 + 15, 0 + 15, 2 + 15
    assert_close(centred - plain, 0.3 * torch.tensor([324.0, 225.0, 289.0]).double())


def test_bradley_terry_is_ln_2_where_the_rewards_tie_and_its_gradient_is_the_error():
    given = columns("bradley_terry")
    tied = given | {"reward_l": given["reward_w"]}
    assert_close(run("bradley_terry", tied)[0], torch.full((3,), math.log(2.0)).double())
    found = run("bradley_terry", given)[1]
    expected = -(1 - torch.sigmoid(given["reward_w"] - given["reward_l"]))
    assert_close(found["reward_w"], expected)
    assert_close(found["reward_l"], -expected)


def test_k_wise_of_two_is_bradley_terry():
    given = columns("bradley_terry")
    rewards = torch.stack([given["reward_l"], given["reward_w"]], 1)
    losses, _ = run("k_wise", {"rewards": rewards, "ranks": torch.tensor([[2, 1]] * 3)})
    assert_close(losses, run("bradley_terry", given)[0])


@pytest.mark.parametrize("rewards", [[[0.3]], [[0.3, -1.0, 2.0]]], ids=["one", "all tied"])
def test_k_wise_with_nothing_to_compare_is_nothing(rewards):
    rewards = torch.tensor(rewards)
    losses, found = run("k_wise", {"rewards": rewards, "ranks": torch.ones_like(rewards).long()})
    assert losses.tolist() == [0.0] and not found["rewards"].any()


def test_k_wise_does_not_ask_for_order():
    given = {"rewards": normal(1, 5, seed=3), "ranks": torch.tensor([[3, 1, 4, 2, 4]])}
    order = torch.tensor([4, 0, 3, 1, 2])
    shuffled = {k: v[:, order] for k, v in given.items()}
    assert_close(run("k_wise", shuffled)[0], run("k_wise", given)[0])
    assert_close(run("k_wise", shuffled)[1]["rewards"], run("k_wise", given)[1]["rewards"][:, order])


def test_a_flat_gate_is_the_mean_of_the_objectives():
    given = columns("gated")
    given |= {k: torch.full_like(given[k], 3.0) for k in ("gate_w", "gate_l")}
    means = {f"reward_{s}": given[f"rewards_{s}"].mean(1) for s in "wl"}
    assert_close(run("gated", given)[0], run("bradley_terry", means)[0])
    # a gate that has chosen: the second objective alone
    given |= {k: torch.tensor([[0.0, 800.0]] * 2).double() for k in ("gate_w", "gate_l")}
    second = {f"reward_{s}": given[f"rewards_{s}"][:, 1] for s in "wl"}
    assert_close(run("gated", given)[0], run("bradley_terry", second)[0])


def test_a_preference_model_is_least_where_it_is_right():
    prob = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    logit = torch.log(prob / (1 - prob))
    losses, found = run("preference_model", {"logit": logit, "prob_w": prob})
    assert_close(losses, -(prob * prob.log() + (1 - prob) * (1 - prob).log()))  # the entropy of the label
    assert_close(found["logit"], torch.zeros(3).double())


def test_preference_model_and_discriminator_agree_on_certain_labels():
    logit, up = columns("discriminator")["logit"], torch.tensor([True, False, True])
    certain, _ = run("preference_model", {"logit": logit, "prob_w": up.double()})
    assert_close(run("discriminator", {"logit": logit, "desirable": up})[0], certain)


def test_grm_mixes_and_haf_adds():
    given = columns("grm")
    rewards = {k: given[k] for k in ("reward_w", "reward_l")}
    policy = {k: v for k, v in given.items() if k not in rewards}
    bt, dpo = run("bradley_terry", rewards)[0], xf.METHODS["dpo"](**policy, beta=0.3)[0]
    assert_close(run("grm", given, alpha=0.0)[0], bt)
    assert_close(run("grm", given, alpha=1.0, regulariser="dpo", beta=0.3)[0], dpo)
    assert_close(run("grm", given, alpha=0.2, regulariser="dpo", beta=0.3)[0], 0.8 * bt + 0.2 * dpo)
    assert_close(run("haf", given, alpha=0.2, beta=0.3)[0], bt + 0.2 * dpo)
    _, found = run("grm", given, alpha=0.2)  # sft: -(1 - s(beta logp_w)) * beta * alpha, nothing on the rejected
    assert_close(found["logp_w"], -0.2 * 0.1 * torch.sigmoid(-0.1 * given["logp_w"]))
    assert not found["logp_l"].any()


# --- TRL 1.16 ---


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.02])
def test_agrees_with_trls_reward_trainer(margin, center):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever TRL and what it imports have to say on import
        pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
        from trl.trainer.reward_trainer import RewardTrainer
    given = columns("bradley_terry", without=("mask",) if margin else OPTIONAL)
    leaves = {k: given[k].requires_grad_() for k in ("reward_w", "reward_l")}
    logits = torch.cat(list(leaves.values()))[:, None]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    batch = {"input_ids": torch.zeros(6, 1), "attention_mask": torch.ones(6, 1)}
    batch |= {"margin": given["margin"]} if margin else {}
    expected = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), batch)
    losses = xf.METHODS["bradley_terry"](**given, center=center or 0.0)[0].mean()
    assert_close(losses, expected)
    assert_close(gradients(losses, leaves), gradients(expected, leaves))


# --- Extremes ---

FAR = [-2000.0, -50.0, -1e-7, 0.0, 1e-7, 50.0, 2000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_rewards_are_exact(dtype):
    x = torch.tensor(FAR, dtype=dtype)
    zero, half = torch.zeros_like(x), torch.full_like(x, 0.5)
    up = torch.ones_like(x).bool()
    # log(1 + e^-x): -x far below 0, e^-50 = 1.92874984796e-22 at 50, ln 2 -+ x / 2 next to 0; its slope -1/(1
    # + e^x)
    value = [2000, 50, 0.693147230560, 0.693147180560, 0.693147130560, 1.92874984796e-22, 0]
    slope = [-1, -1, -0.500000025, -0.5, -0.499999975, -1.92874984796e-22, 0]
    value, slope = (torch.tensor(v, dtype=dtype) for v in (value, slope))
    for losses, found in (
        run("bradley_terry", {"reward_w": x, "reward_l": zero}),
        run("discriminator", {"logit": x, "desirable": up}),
        run("preference_model", {"logit": x, "prob_w": zero + 1}),
        run("k_wise", {"rewards": torch.stack([x, zero], 1), "ranks": torch.tensor([[1, 2]] * 7)}),
    ):
        assert_close(losses, value, rtol=1e-6, atol=0)
        first = next(iter(found.values()))
        assert_close(first[:, 0] if first.dim() == 2 else first, slope, rtol=1e-6, atol=0)
    # half and half: |x| far out, and no gradient in the middle
    losses, found = run("preference_model", {"logit": x, "prob_w": half})
    assert_close(losses[[0, -1]], torch.tensor([1000.0, 1000.0], dtype=dtype))
    assert found["logit"][3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hyper", [{}, {"regulariser": "dpo"}], ids=str)
def test_far_log_probs_beside_a_reward_are_finite(dtype, hyper):
    low, high = torch.tensor([-2000.0, -1e-7, -2000.0, -50.0]), torch.tensor([-1.0, -2000.0, -2000.0, -1e-7])
    given = {"reward_w": low * 0 + 1, "reward_l": low * 0, "logp_w": low, "logp_l": high}
    given |= {"ref_logp_w": high, "ref_logp_l": low}
    single = {k: v.to(dtype) for k, v in given.items()}
    for name, options in (("grm", hyper), ("haf", {})):
        losses, found = run(name, single, **options)
        expected, exact = run(name, {k: v.double() for k, v in given.items()}, **options)
        assert expected.isfinite().all() and all(g.isfinite().all() for g in exact.values())
        assert_close(losses, expected.to(dtype), rtol=1e-5, atol=1e-7)
        assert_close(found, {k: g.to(dtype) for k, g in exact.items()}, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_gates_are_finite(dtype):
    given = columns("gated", dtype)
    given |= {"gate_w": given["gate_w"] * 2000, "gate_l": given["gate_l"] * -2000}
    losses, found = run("gated", given)
    # the gates choose 2 and 0.5, (0 + 1) / 2 and 1: L(1.5), L(-0.5)
    assert_close(losses, torch.tensor([0.201413277983, 0.97407698418], dtype=dtype))
    assert all(g.isfinite().all() for g in found.values())


# --- Errors ---


@pytest.mark.parametrize(("name", "key"), [(n, k) for n in METHODS for k in xf.METHODS[n].required])
def test_missing_column_is_named(name, key):
    given = {k: v for k, v in columns(name).items() if k != key}
    with pytest.raises(ValueError, match=rf"missing {key}\b"):
        xf.METHODS[name](**given)


BAD_HYPERPARAMETERS = [
    *(("bradley_terry", "label_smoothing", e) for e in (-0.1, 1.1, math.nan)),
    ("bradley_terry", "center", -0.1),
    *(("grm", "alpha", a) for a in (-0.1, 1.1, math.nan)),
    *((n, "beta", -0.1) for n in ("grm", "haf")),
    ("haf", "alpha", -1.0),
    ("grm", "regulariser", "kl"),
]


@pytest.mark.parametrize(("name", "key", "value"), BAD_HYPERPARAMETERS)
def test_hyperparameter_out_of_range(name, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        xf.METHODS[name](**columns(name), **{key: value})
    assert str(value) in str(caught.value)


BAD_DATA = [
    ("preference_model", "prob_w", [1.0, 1.25, 0.5], "1"),
    ("preference_model", "prob_w", [1.0, 0.5, -0.1], "2"),
    ("preference_model", "prob_w", [1.0, math.nan, 0.5], "1"),
    ("k_wise", "ranks", [[1.0, 2.0, 3.0], [2.0, math.nan, 2.0]], "1"),
    ("k_wise", "ranks", [[1, 2, 3], [2, 0, 2]], "1"),
    ("k_wise", "ranks", [[-1, 2, 3], [2, 1, 2]], "0"),
]


@pytest.mark.parametrize(("name", "key", "value", "row"), BAD_DATA)
def test_bad_data_is_refused_with_its_row(name, key, value, row):
    with pytest.raises(ValueError, match=key) as caught:
        xf.METHODS[name](**columns(name) | {key: torch.tensor(value)})
    assert row in str(caught.value)


def test_desirable_is_a_bool():
    with pytest.raises(ValueError, match=r"desirable.*bool"):
        xf.METHODS["discriminator"](logit=torch.zeros(2), desirable=torch.ones(2))


def test_grm_with_dpo_needs_a_pair_and_both_or_no_reference():
    given = columns("grm")
    with pytest.raises(ValueError, match="logp_l"):
        xf.METHODS["grm"](**{k: v for k, v in given.items() if k != "logp_l"}, regulariser="dpo")
    with pytest.raises(ValueError, match="ref_logp_l"):
        xf.METHODS["grm"](**{k: v for k, v in given.items() if k != "ref_logp_l"}, regulariser="dpo")


@pytest.mark.parametrize("name", METHODS)
def test_shapes_that_do_not_match(name):
    given = columns(name)
    for key in given:
        with pytest.raises(ValueError, match=key):
            xf.METHODS[name](**given | {key: given[key][:1]})


@pytest.mark.parametrize("name", METHODS)
def test_signature(name):
    method = xf.METHODS[name]
    defaults = {
        "bradley_terry": {"label_smoothing": 0, "center": 0},
        "grm": {"alpha": 0.01, "beta": 0.1, "regulariser": "sft"},
        "haf": {"alpha": 1, "beta": 0.1},
    }.get(name, {})
    assert {k: method.defaults[k] for k in defaults} == defaults and method.denominator == "units"
    assert method.card.paper and method.card.equation


# --- Functions of rewards ---


def test_ensemble():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    assert_close(ensemble(rewards), torch.tensor([3.0, 0.5]).double())
    assert_close(ensemble(rewards, "worst"), torch.tensor([1.0, 0.5]).double())
    # 3 - coef (2^2 + 1^2 + 3^2) / 3
    assert_close(ensemble(rewards, "uncertainty"), torch.tensor([3 - 14 / 3, 0.5]).double())
    assert_close(ensemble(rewards, "uncertainty", coef=0.3), torch.tensor([1.6, 0.5]).double())
    for how in ("mean", "worst", "uncertainty"):
        assert_close(ensemble(rewards[:, :1], how), rewards[:, 0])  # a single model is itself
    with pytest.raises(ValueError, match="median"):
        ensemble(rewards, "median")


def test_lengths():
    reward, length = torch.tensor([6.0, -3.0]), torch.tensor([10, 50])
    # 6 / (50 + 10), -3 / (50 + 50)
    assert_close(length_normalised(reward, length, alpha=50.0), torch.tensor([0.1, -0.03]))
    # 0.1 |10 - 30|, 0.1 |50 - 30|, nothing at the target
    assert_close(length_penalty(torch.tensor([10, 50, 30]), target=30.0, lam=0.1), torch.tensor([2.0, 2.0, 0.0]))


def odin_columns(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    given = {
        **{"quality_w": [1.0, 2.0], "quality_l": [0.0, 3.0], "length_w": [1.5, 0.0], "length_l": [-0.5, 1.0]},
        **{"len_w": [5.0, 2.0], "len_l": [4.0, 4.0]},
        **{"weight_quality": [1.0, 2.0, 0.0], "weight_length": [2.0, 1.0, -1.0]},
    }
    return {k: torch.tensor(v, dtype=dtype) for k, v in given.items()}


def test_odin_literal_and_gradient():
    given = odin_columns()
    # sums of the heads differ by (3, -2): (L(3) + L(-2)) / 2 = 1.08775768; rho(1 2 0 3, 5 2 4 4) =
    # -0.30779351, rho(1.5 0 -0.5 1, 5 2 4 4) = 0.58038100; cosine 4 / sqrt(5 * 6) = 0.73029674
    assert_close(odin(**given), torch.tensor(1.54546693018612, dtype=torch.float64), rtol=1e-10, atol=0)
    # 1.08775768 + 0.5 (0.30779351 - 0.58038100) + 2 * 0.73029674
    other = odin(**given, lambda_length=0.5, lambda_orthogonal=2.0)
    assert_close(other, torch.tensor(2.41205742075757, dtype=torch.float64), rtol=1e-10, atol=0)
    learnt = [k for k in given if not k.startswith("len_")]

    def loss(*tensors):
        return odin(**{**given, **dict(zip(learnt, tensors, strict=True))})

    assert torch.autograd.gradcheck(loss, [given[k].clone().requires_grad_() for k in learnt])


def test_odins_length_head_has_nothing_left_to_learn_when_it_is_the_length():
    given = odin_columns()
    for side, quality in (
        ("w", 1.0),
        ("l", 0.0),
    ):  # quality does not follow the length, the length head is linear in it
        given["len_" + side] = torch.tensor([4.0, 2.0]).double()
        given["length_" + side] = 3 * given["len_" + side] - 1
        given["quality_" + side] = torch.full((2,), quality).double()
    given["weight_length"] = torch.tensor([0.0, 0.0, 1.0]).double()
    # L(1) + |0| - 1 + 0
    assert_close(odin(**given), torch.tensor(0.313261687518 - 1, dtype=torch.float64))


@pytest.mark.parametrize("key", ["len", "quality", "length"])
def test_odin_without_variation_has_no_correlation_and_a_finite_gradient(key):
    given = odin_columns(torch.float32)
    given |= {k: torch.full_like(v, 2.0) for k, v in given.items() if k in (f"{key}_w", f"{key}_l")}
    leaves = {k: v.requires_grad_() for k, v in given.items()}
    loss = odin(**leaves)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, leaves).values())
