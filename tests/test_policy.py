"""Policy losses: literal values, gradients, what the papers say, TRL and Liger, extremes, errors.

Literal values were worked out from the equations with 30-digit arithmetic; the line above each one gives the
steps. Every method is also held against its equation for one completion at a time, with no mask to get wrong.
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
from peers import peer
from xpo_fast.methods import policy
from xpo_fast.methods.advantages import leave_one_out
from xpo_fast.methods.math import k3

F64 = torch.float64
# A full completion; one with padding; one that begins with a token that is not its own.
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]]).bool()
# log r = (0.4, -0.7, 0.1, -0.05), (0.4, -0.7, 0.1), (0.3, 0.2): r = (1.491825, 0.496585, 1.105171, 0.951229),
# the same, (1.349859, 1.221403), on either side of each clip, under an advantage of either sign. ref - logp =
# (0.3, -0.2, 0.5, -0.4), (0.1, -0.6, 0.2), (-0.3, 0.05).
ROWS = {
    "token_logp": [[-1.6, -1.7, -2.9, -0.55], [-1.1, -3.2, -0.9], [-0.4, -3.8]],
    "old_logp": [[-2.0, -1.0, -3.0, -0.5], [-1.5, -2.5, -1.0], [-0.7, -4.0]],
    "ref_token_logp": [[-1.3, -1.9, -2.4, -0.95], [-1.0, -3.8, -0.7], [-0.7, -3.75]],
    "entropy": [[0.5, 1.0, 2.0, 0.25], [0.1, 0.2, 0.3], [3.0, 1.5]],
    "value": [[0.5, 1.0, -1.0, 2.0], [0.0, 0.3, -0.4], [1.0, 1.5]],
    "old_value": [[0.4, 0.5, -1.0, 2.5], [0.0, 0.0, 0.0], [0.5, 1.5]],
    "returns": [[1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [2.0, 0.0]],
}
OTHERS = {
    "advantage": [1.5, -2.0, 0.5],
    "prob_w": [0.9, 0.2, 0.5],
    "ptx_logp": [[-1.0, -2.0, 9.0], [-3.0, 9.0, 9.0]],
    "ptx_mask": [[True, True, False], [True, False, False]],
}
LEARNT = ("token_logp", "entropy", "value", "ptx_logp")


def laid(rows: list, mask: Tensor = MASK, dtype: torch.dtype = F64, junk: float = 0.5) -> Tensor:
    """(B, T) with the numbers of `rows` where the mask is, and `junk` elsewhere."""
    flat = torch.tensor([x for row in rows for x in row], dtype=dtype)
    return torch.full(mask.shape, junk, dtype=dtype).masked_scatter(mask, flat)


def columns(name: str, dtype: torch.dtype = F64, *, junk: float = 0.5, without: tuple[str, ...] = ()) -> dict:
    """Every column that method `name` takes, optional ones too."""
    out = {}
    for key in xf.METHODS[name].inputs:
        if key in without:
            continue
        if key == "mask":
            out[key] = MASK
        elif key in ROWS:
            out[key] = laid(ROWS[key], MASK, dtype, junk)
        else:
            out[key] = torch.tensor(OTHERS[key], dtype=torch.bool if key == "ptx_mask" else dtype)
    return out


def run(name: str, given: dict, **hyper) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and d(sum of losses) for each column that carries gradient."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in LEARNT}
    losses, _ = xf.METHODS[name](**{**given, **leaves}, **hyper)
    return losses, gradients(losses, leaves)


# --- The equations, for the tokens of one completion ---


def clipped(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def divergence(logp: Tensor, ref: Tensor) -> Tensor:
    return torch.exp(ref - logp) - (ref - logp) - 1


def token_clip(low, high):
    return lambda logp, old, a, **_: clipped(torch.exp(logp - old), a, low, high)


def row_clip(low, high, *, mean: bool, times_length: bool = False):
    def loss(logp, old, a, **_):
        log_ratio = (logp - old).mean() if mean else (logp - old).sum()
        return clipped(log_ratio.exp(), a, low, high) * (len(logp) if times_length else 1)

    return loss


def dual(logp, old, a, **_):
    loss = clipped(torch.exp(logp - old), a, 0.2, 0.2)
    return torch.where(a < 0, torch.minimum(loss, -1.3 * a), loss)


def penalty(beta):
    return lambda logp, old, a, **_: -torch.exp(logp - old) * a + beta * divergence(old, logp)


def cispo(cap):
    return lambda logp, old, a, **_: -torch.exp(logp - old).clamp(max=cap).detach() * a * logp


def sapo(pos, neg):
    def loss(logp, old, a, **_):
        tau = torch.where(a > 0, pos, neg).to(logp.dtype)
        return -a * torch.sigmoid(tau * (torch.exp(logp - old) - 1)) * 4 / tau

    return loss


def vespo(k_pos, lambda_pos, k_neg, lambda_neg):
    def loss(logp, old, a, **_):
        k, lam = (k_pos, lambda_pos) if a >= 0 else (k_neg, lambda_neg)
        log_w = (logp - old).clamp(-20, 20).sum().clamp(math.log(1e-8), 20)
        weight = torch.exp(lam + k * log_w - lam * log_w.exp())
        return -weight.detach() * a * logp

    return loss


def nash(beta):
    def loss(logp, ref, prob_w, **_):
        advantage = prob_w - 0.5 - beta * (logp - ref).sum()
        return -advantage.detach() * logp.sum()

    return loss


def with_kl(loss, beta, how="token"):
    """β·k3 beside a loss of its own: a token's, or a row's mean or sum."""

    def both(logp, ref, **rest):
        kl = divergence(logp, ref)
        kl = {"token": kl, "mean": kl.mean(), "sum": kl.sum()}[how]
        return loss(logp=logp, ref=ref, **rest) + beta * kl

    return both


def with_entropy(loss, coef, how="token"):
    """Less coef times a token's entropy, or its mean or sum over a row."""

    def both(entropy, **rest):
        bonus = {"token": entropy, "mean": entropy.mean(), "sum": entropy.sum()}[how]
        return loss(**rest) - coef * bonus

    return both


def value_loss(clip):
    def loss(value, old_value, returns, **_):
        near = torch.minimum(torch.maximum(value, old_value - clip), old_value + clip)
        return torch.maximum((value - returns) ** 2, (near - returns) ** 2) / 2

    return loss


def has(name: str, key: str) -> bool:
    return name in xf.METHODS and key in xf.METHODS[name].defaults


def clip_names(name: str, low: float, high: float) -> dict:
    """One range or two, whichever the method has."""
    return {"eps_low": low, "eps_high": high} if has(name, "eps_low") else {"eps": low}


CASES: list[tuple[str, dict, object]] = [
    ("ppo", {}, token_clip(0.2, 0.2)),
    ("ppo", {"eps": 0.1}, token_clip(0.1, 0.1)),
    ("ppo", {"dual_clip": 1.3}, dual),
    ("ppo", {"entropy_coef": 0.01}, with_entropy(token_clip(0.2, 0.2), 0.01)),
    ("ppo_value", {}, value_loss(0.2)),
    ("ppo_value", {"value_clip": 0.05}, value_loss(0.05)),
    ("ppo_penalty", {}, penalty(0.1)),
    ("ppo_penalty", {"beta": 2.0}, penalty(2.0)),
    ("reinforce", {}, lambda logp, a, **_: -a * logp),
    ("rloo", {}, lambda logp, a, **_: -a * logp.sum()),
    ("rloo", {"variant": "clipped"}, row_clip(0.2, 0.2, mean=False)),
    *((n, {}, token_clip(0.2, 0.2)) for n in ("grpo", "dr_grpo", "bnpo")),
    *((n, {"eps": 0.1}, token_clip(0.1, 0.1)) for n in ("grpo", "dr_grpo", "bnpo")),
    *((n, {"beta": 0.04}, with_kl(token_clip(0.2, 0.2), 0.04)) for n in ("grpo", "dr_grpo", "bnpo")),
    *((n, {"entropy_coef": 0.01}, with_entropy(token_clip(0.2, 0.2), 0.01)) for n in ("grpo", "dr_grpo", "bnpo")),
    ("grpo", {"beta": 0.5, "entropy_coef": 0.3}, with_entropy(with_kl(token_clip(0.2, 0.2), 0.5), 0.3)),
    ("dapo", {}, token_clip(0.2, 0.28)),
    ("dapo", {"eps_low": 0.6, "eps_high": 0.05}, token_clip(0.6, 0.05)),
    ("gspo", {}, row_clip(3e-4, 4e-4, mean=True)),
    ("gspo", {"eps_low": 0.05, "eps_high": 0.1}, row_clip(0.05, 0.1, mean=True)),
    ("luspo", clip_names("luspo", 0.05, 0.05), row_clip(0.05, 0.05, mean=True, times_length=True)),
    ("cispo", {"eps": 0.2}, cispo(1.2)),
    ("cispo", {"cap": 1.3}, cispo(1.3)),
    ("sapo", {}, sapo(1.0, 1.05)),
    ("sapo", {"tau_pos": 2.0, "tau_neg": 3.0}, sapo(2.0, 3.0)),
    ("vespo", {}, vespo(2.0, 3.0, 3.0, 2.0)),
    ("vespo", {"k_pos": 1.0, "lambda_pos": 1.0, "k_neg": 2.0, "lambda_neg": 1.0}, vespo(1.0, 1.0, 2.0, 1.0)),
    ("nash_md", {}, nash(0.1)),
    ("nash_md", {"beta": 1.0}, nash(1.0)),
]
BY_ROW = {"gspo": "mean", "luspo": "sum"}  # what a row's β·k3 is, as TRL's aggregation makes it
for name in ("dapo", "gspo", "luspo", "cispo", "sapo", "vespo"):
    _, hyper, loss = next(c for c in CASES if c[0] == name)
    how = BY_ROW.get(name, "token")
    CASES += [
        (name, {**hyper, "beta": 0.3}, with_kl(loss, 0.3, how)),
        (name, {**hyper, "entropy_coef": 0.3}, with_entropy(loss, 0.3, how)),
    ]
PATHS = [(name, hyper) for name, hyper, _ in CASES] + [("ppo_ptx", {}), ("ppo_ptx", {"gamma": 0.5, "eps": 0.1})]
NAMES = sorted({name for name, _ in PATHS})
ROW_LOSSES = ("gspo", "luspo", "rloo", "nash_md")
RATIO = [n for n in NAMES if "old_logp" in xf.METHODS[n].inputs]
every_path = pytest.mark.parametrize(("name", "hyper"), PATHS, ids=[f"{n}-{h}" for n, h in PATHS])
HYPER = {"cispo": {"eps": 0.2}}  # what a method cannot do without


def random_columns(name: str) -> dict:
    """Completions full, with a hole, of one token, of none: (7, 5)."""
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[0], mask[1], mask[2] = True, False, torch.tensor([False, False, True, False, False])
    logp = -normal(7, 5, seed=1).abs() * 2
    given = {
        "token_logp": logp,
        "old_logp": logp + normal(7, 5, seed=2, std=0.3),
        "ref_token_logp": logp + normal(7, 5, seed=3, std=0.5),
        "entropy": normal(7, 5, seed=4).abs(),
        "value": normal(7, 5, seed=5),
        "old_value": normal(7, 5, seed=5) + normal(7, 5, seed=6, std=0.3),
        "returns": normal(7, 5, seed=7),
        "advantage": normal(7, seed=8),
        "prob_w": torch.sigmoid(normal(7, seed=9)),
        "ptx_logp": normal(3, 4, seed=10),
        "ptx_mask": torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool(),
        "mask": mask,
    }
    return {k: given[k] for k in xf.METHODS[name].inputs}


def plainly(loss, given: dict) -> Tensor:
    """The losses one completion at a time, the tokens outside the mask cut out."""
    mask = given["mask"]
    names = {"token_logp": "logp", "old_logp": "old", "ref_token_logp": "ref", "advantage": "a"}
    rows = []
    for i in range(len(mask)):
        row = {names.get(k, k): v[i][mask[i]] if v.shape == mask.shape else v[i] for k, v in given.items()}
        rows.append(loss(**row) if mask[i].any() else mask.new_zeros((), dtype=F64))
    if any(r.shape != () for r in rows):
        return torch.stack([torch.zeros_like(m, dtype=F64).masked_scatter(m, r) for m, r in zip(mask, rows)])
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "hyper", "loss"), CASES, ids=[f"{n}-{h}" for n, h, _ in CASES])
def test_agrees_with_the_plain_equation(name, hyper, loss):
    given = random_columns(name)
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in LEARNT}
    expected = plainly(loss, {**given, **leaves})
    losses, found = run(name, given, **hyper)
    assert_close(losses, expected)
    assert_close(found, gradients(expected, leaves))


@pytest.mark.parametrize("name", ["ppo", "reinforce", "grpo", "dapo", "cispo", "sapo"])
def test_an_advantage_may_be_a_tokens(name):
    given = random_columns(name)
    by_row = run(name, given, **HYPER.get(name, {}))
    spread = given | {"advantage": given["advantage"][:, None].expand(7, 5)}
    assert_close(run(name, spread, **HYPER.get(name, {})), by_row)
    spread["advantage"] = spread["advantage"] * torch.arange(1, 6)
    losses, _ = run("reinforce", {k: spread[k] for k in ("token_logp", "advantage", "mask")})
    assert_close(losses, torch.where(given["mask"], -spread["advantage"] * given["token_logp"], 0.0))


LITERALS = [
    # A = 1.5: -1.5 min(r, 1.2) = -1.5 (1.2, 0.496585, 1.105171, 0.951229); A = -2: 2 max(r, 0.8) =
    # 2 (1.491825, 0.8, 1.105171); A = 0.5: -0.5 (1.2, 1.2)
    (
        "ppo",
        {},
        [[-1.8, -0.744877955687, -1.65775637711, -1.42684413675], [2.98364939528, 1.6, 2.21034183615], [-0.6, -0.6]],
    ),
    # -1.5 (1.1, 0.496585, 1.1, 0.951229), 2 (1.491825, 0.9, 1.105171), -0.5 (1.1, 1.1)
    (
        "ppo",
        {"eps": 0.1},
        [[-1.65, -0.744877955687, -1.65, -1.42684413675], [2.98364939528, 1.8, 2.21034183615], [-0.55, -0.55]],
    ),
    # for A = -2 no more than 2 * 1.3
    (
        "ppo",
        {"dual_clip": 1.3},
        [[-1.8, -0.744877955687, -1.65775637711, -1.42684413675], [2.6, 1.6, 2.21034183615], [-0.6, -0.6]],
    ),
    # less 0.1 (0.5, 1, 2, 0.25), 0.1 (0.1, 0.2, 0.3), 0.1 (3, 1.5)
    (
        "ppo",
        {"entropy_coef": 0.1},
        [[-1.85, -0.844877955687, -1.85775637711, -1.45184413675], [2.97364939528, 1.58, 2.18034183615], [-0.9, -0.75]],
    ),
    # ppo - (-1 - 2 - 3) / 3
    (
        "ppo_ptx",
        {},
        [[0.2, 1.255122044313, 0.34224362289, 0.57315586325], [4.98364939528, 3.6, 4.21034183615], [1.4, 1.4]],
    ),
    # (V - R)^2 / 2 = (0.125, 0, 2, 0.5), (0.5, 0.045, 0.98), (0.5, 1.125); V within 0.2 of V_old = (0.5, 0.7,
    # -1, 2.3), (0, 0.2, -0.2), (0.7, 1.5): (0.125, 0.045, 2, 0.845), (0.5, 0.02, 0.72), (0.845, 1.125); the
    # larger of each
    ("ppo_value", {}, [[0.125, 0.045, 2.0, 0.845], [0.5, 0.045, 0.98], [0.845, 1.125]]),
    # k3(old || new) = r - 1 - log r = (0.091825, 0.196585, 0.005171, 0.001229), ..., (0.049859, 0.021403); -r
    # A + 0.1 k3
    (
        "ppo_penalty",
        {},
        [
            [-2.2285545767, -0.725219425308, -1.65723928531, -1.4267211943],
            [2.99283186505, 1.01282913796, 2.21085892796],
            [-0.66994352303, -0.608561103264],
        ],
    ),
    (
        "ppo_penalty",
        {"beta": 2.0},
        [
            [-2.05408765118, -0.351707348104, -1.64741454096, -1.42438528775],
            [3.16729879057, 1.38634121517, 2.2206836723],
            [-0.575211788636, -0.56789586276],
        ],
    ),
    # -1.5 logp, 2 logp, -0.5 logp
    ("reinforce", {}, [[2.4, 2.55, 4.35, 0.825], [-2.2, -6.4, -1.8], [0.2, 1.9]]),
    # sums of logp (-6.75, -5.2, -4.2)
    ("rloo", {}, [10.125, -10.4, 2.1]),
    # sums of log r (-0.25, -0.2, 0.5): r = (0.778801, 0.818731, 1.648721): -1.5 r, 2 r, -0.5 * 1.2
    ("rloo", {"variant": "clipped"}, [-1.16820117461, 1.63746150616, -0.6]),
    # ppo + 0.04 (e^d - d - 1) = 0.04 (0.049859, 0.018731, 0.148721, 0.070320), 0.04 (0.005171, 0.148812,
    # 0.021403), 0.04 (0.040818, 0.001271)
    (
        "grpo",
        {"beta": 0.04},
        [
            [-1.7980056477, -0.744128725564, -1.65180752629, -1.42403133491],
            [2.98385623201, 1.60595246544, 2.21119794648],
            [-0.598367271173, -0.599949156145],
        ],
    ),
    # -1.5 (1.28, 0.496585, 1.105171, 0.951229), 2 (1.491825, 0.8, 1.105171), -0.5 (1.28, 1.221403)
    (
        "dapo",
        {},
        [
            [-1.92, -0.744877955687, -1.65775637711, -1.42684413675],
            [2.98364939528, 1.6, 2.21034183615],
            [-0.64, -0.61070137908],
        ],
    ),
    # means of log r (-0.0625, -0.066667, 0.25): r = (0.939413, 0.935507, 1.284025): -1.5 r, 2 * 0.9997, -0.5
    # * 1.0004
    ("gspo", {}, [-1.40911959422, 1.9994, -0.5002]),
    # -1.5 r, 2 * 0.95, -0.5 * 1.1
    ("gspo", {"eps_low": 0.05, "eps_high": 0.1}, [-1.40911959422, 1.9, -0.55]),
    # times the length: -1.5 r * 4, 2 r * 3, -0.5 * 1.2 * 2
    ("luspo", clip_names("luspo", 0.2, 0.2), [-5.63647837688, 5.61304191019, -1.2]),
    # -min(r, 1.2) A logp: 1.5 (1.2 * 1.6, 0.496585 * 1.7, 1.105171 * 2.9, 0.951229 * 0.55), ...
    (
        "cispo",
        {"eps": 0.2},
        [[2.88, 1.26629252467, 4.80749349363, 0.784764275213], [-2.64, -3.17814594427, -1.98930765254], [0.24, 2.28]],
    ),
    # -min(r, 1.3) A logp
    (
        "cispo",
        {"cap": 1.3},
        [
            [3.12, 1.26629252467, 4.80749349363, 0.784764275213],
            [-2.86, -3.17814594427, -1.98930765254],
            [0.26, 2.3206652405],
        ],
    ),
    # -A s(r - 1) * 4 for A > 0, -A s(1.05 (r - 1)) * 4 / 1.05 for A < 0
    (
        "sapo",
        {},
        [
            [-3.72321714104, -2.26043123227, -3.15761112686, -2.92685863383],
            [4.77188045923, 2.82549999372, 4.01965215197],
            [-1.17316667941, -1.11025137724],
        ],
    ),
    # log w = (-0.25, -0.2, 0.5): for A > 0 e^(3 + 2 log w - 3 w) = 1.177740, 0.388227; for A < 0
    # e^(2 + 3 log w - 2 w) = 0.788627; times -A logp
    (
        "vespo",
        {},
        [
            [2.82657685642, 3.00323790995, 5.12317055227, 0.971635794396],
            [-1.73497994492, -5.04721438522, -1.41952904584],
            [0.0776454968074, 0.73763221967],
        ],
    ),
    # log(pi / ref) = (-0.2, 0.3, 0.25): 0.4 + 0.02, -0.3 - 0.03, 0 - 0.025, times 6.75, 5.2, 4.2
    ("nash_md", {}, [2.835, -1.716, -0.105]),
    # 0.4 + 0.2, -0.3 - 0.3, -0.25
    ("nash_md", {"beta": 1.0}, [4.05, -3.12, -1.05]),
]
LITERALS += [(n, {}, LITERALS[0][2]) for n in ("grpo", "dr_grpo", "bnpo")]
LITERALS += [(n, {"beta": 0.04}, next(e for m, _, e in LITERALS if m == "grpo")) for n in ("dr_grpo", "bnpo")]


@pytest.mark.parametrize(("name", "hyper", "expected"), LITERALS, ids=[f"{n}-{h}" for n, h, _ in LITERALS])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (F64, 1e-10)], ids=str)
def test_literal(name, hyper, expected, dtype, rtol):
    losses, _ = xf.METHODS[name](**columns(name, dtype), **hyper)
    by_row = not isinstance(expected[0], list)
    wanted = torch.tensor(expected, dtype=dtype) if by_row else laid(expected, MASK, dtype, junk=0.0)
    assert_close(losses, wanted, rtol=rtol, atol=rtol / 10)
    assert by_row or (losses[~MASK] == 0).all()


STOPPED = ("cispo", "vespo", "nash_md")  # part of whose definition is a stopped gradient


@pytest.mark.parametrize(("name", "hyper"), [p for p in PATHS if p[0] not in STOPPED], ids=str)
def test_gradcheck(name, hyper):
    given = columns(name)
    names = [k for k in given if k in LEARNT]

    def method(*tensors):
        return xf.METHODS[name](**{**given, **dict(zip(names, tensors, strict=True))}, **hyper)[0]

    assert torch.autograd.gradcheck(method, [given[k].clone().requires_grad_() for k in names])


@every_path
def test_one_loss_a_token_or_a_row_and_metrics_detached(name, hyper):
    given = columns(name, torch.float32)
    leaves = {k: v.clone().requires_grad_() if k in LEARNT else v for k, v in given.items()}
    losses, metrics = xf.METHODS[name](**leaves, **hyper)
    assert losses.shape == ((3,) if name in ROW_LOSSES else (3, 4))
    assert losses.dtype == torch.float32 and losses.requires_grad
    for key, value in metrics.items():
        assert value.shape in ((3,), (3, 4)) and not value.requires_grad, key


@every_path
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, -1e30], ids=str)
def test_what_stands_outside_the_mask_is_nothing(name, hyper, junk):
    clean, clean_gradients = run(name, columns(name), **hyper)
    dirty = columns(name, junk=junk)
    if name == "ppo_ptx":
        dirty["ptx_logp"] = dirty["ptx_logp"].masked_fill(~dirty["ptx_mask"], junk)
    if "advantage" in dirty and name not in ROW_LOSSES:  # by token, with junk too
        dirty["advantage"] = torch.where(MASK, dirty["advantage"][:, None], junk)
    losses, found = run(name, dirty, **hyper)
    assert_close(losses, clean, rtol=0, atol=0)
    assert_close(found, clean_gradients, rtol=0, atol=0)
    if losses.dim() == 2:
        assert (losses[~MASK] == 0).all()
    for key, value in found.items():
        outside = ~dirty["ptx_mask"] if key == "ptx_logp" else ~MASK
        assert (value[outside] == 0).all(), key
    _, metrics = xf.METHODS[name](**dirty, **hyper)
    for key, value in metrics.items():  # NaN is left out of a mean, infinity would stay
        inside = value[MASK] if value.shape == MASK.shape else value
        assert not inside.isnan().any() and not value.isinf().any(), key


@every_path
@pytest.mark.parametrize("junk", [0.5, math.nan])
def test_rows_without_a_token_are_nothing(name, hyper, junk):
    given = columns(name, junk=junk)
    given["mask"] = MASK.clone().fill_(False)
    given = {k: torch.full_like(v, junk) if k in ROWS else v for k, v in given.items()}
    if name == "ppo_ptx":
        given["ptx_mask"] = given["ptx_mask"].clone().fill_(False)
    losses, found = run(name, given, **hyper)
    assert losses.requires_grad and not losses.any()
    assert not any(g.any() for g in found.values())


@every_path
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_no_rows_and_no_tokens_are_legal(name, hyper, shape):
    given = {k: v[: shape[0], : shape[1]] if k in ROWS or k == "mask" else v for k, v in columns(name).items()}
    given = {k: v[: shape[0]] if k in ("advantage", "prob_w") else v for k, v in given.items()}
    losses, _ = run(name, given, **hyper)
    assert losses.shape == (shape[:1] if name in ROW_LOSSES else shape) and not losses.any()


def test_no_pretraining_tokens_leave_ppo():
    given = columns("ppo_ptx")
    given["ptx_mask"] = given["ptx_mask"].clone().fill_(False)
    losses, found = run("ppo_ptx", given)
    assert_close(losses, run("ppo", {k: v for k, v in columns("ppo").items() if k != "entropy"})[0])
    assert not found["ptx_logp"].any()


# --- What the papers say ---

ON_POLICY = [n for n in RATIO if n not in ("ppo_ptx",)]


@pytest.mark.parametrize("given_old", [False, True], ids=["no old_logp", "old_logp = token_logp"])
@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_the_gradient_is_reinforce(name, given_old):
    given = random_columns(name)
    given.pop("old_logp")
    if given_old:
        given["old_logp"] = given["token_logp"].clone()
    hyper = {**HYPER.get(name, {}), **({"variant": "clipped"} if name == "rloo" else {})}
    losses, found = run(name, given, **hyper)
    mask, a = given["mask"], given["advantage"][:, None]
    per_token = torch.where(mask, -a, 0.0)
    if name == "gspo":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    assert_close(found["token_logp"], per_token)
    if name in ("ppo", "grpo", "dr_grpo", "bnpo", "dapo", "ppo_penalty"):  # r = 1, k3 = 0
        assert_close(losses, per_token)


def test_reinforce_is_the_policy_gradient():
    logits = normal(5, seed=1).requires_grad_()
    reward, probs = normal(5, seed=2), logits.softmax(0)
    (ascent,) = torch.autograd.grad((probs * reward).sum(), logits)
    # the expectation over actions of the gradient of each one's loss
    losses, _ = xf.METHODS["reinforce"](
        token_logp=logits.log_softmax(0)[:, None], advantage=reward, mask=torch.ones(5, 1).bool()
    )
    (descent,) = torch.autograd.grad((probs.detach() * losses[:, 0]).sum(), logits)
    assert_close(descent, -ascent)


def test_rloo_is_the_policy_gradient_with_a_baseline_that_costs_nothing():
    logits = normal(4, seed=1).requires_grad_()
    reward, logp = normal(4, seed=2), logits.log_softmax(0)
    (ascent,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    descent = torch.zeros(4, dtype=F64)
    for group in itertools.product(range(4), repeat=3):  # every group of three samples
        picks = torch.tensor(group)
        advantage = leave_one_out(reward[picks][None])[0]
        losses, _ = xf.METHODS["rloo"](
            token_logp=logp[picks][:, None], advantage=advantage, mask=torch.ones(3, 1).bool()
        )
        (gradient,) = torch.autograd.grad(losses.mean(), logits, retain_graph=True)
        descent += logits.softmax(0)[picks].prod().detach() * gradient
    assert_close(descent, -ascent)


def ratios(log_ratio: list[float], advantage: list[float], dtype: torch.dtype = F64) -> dict:
    """Completions of one token each."""
    ratio, a = torch.tensor(log_ratio, dtype=dtype)[:, None], torch.tensor(advantage, dtype=dtype)
    return {
        "token_logp": ratio - 1.5,
        "old_logp": torch.full_like(ratio, -1.5),
        "advantage": a,
        "mask": torch.ones_like(ratio).bool(),
    }


ONE_TOKEN = [  # methods that are C(0.2, 0.2) when a completion is one token
    *((n, {}) for n in ("ppo", "ppo_ptx", "grpo", "dr_grpo", "bnpo")),
    *((n, {"eps_low": 0.2, "eps_high": 0.2}) for n in ("dapo", "gspo")),
    ("luspo", clip_names("luspo", 0.2, 0.2)),
    ("rloo", {"variant": "clipped"}),
]
PTX = {"ptx_logp": torch.zeros(1, 1, dtype=F64), "ptx_mask": torch.ones(1, 1).bool()}


def one_token(name: str, given: dict, **hyper) -> tuple[Tensor, Tensor]:
    """Losses and gradient of completions of one token, (B,) each."""
    extra = {k: v.to(given["advantage"].dtype) if v.is_floating_point() else v for k, v in PTX.items()}
    losses, found = run(name, given | (extra if name == "ppo_ptx" else {}), **hyper)
    return losses.flatten(), found["token_logp"].flatten()


@pytest.mark.parametrize(("name", "hyper"), ONE_TOKEN, ids=str)
def test_the_clip_takes_the_gradient_away_only_where_it_would_overshoot(name, hyper):
    # log 1.2 = 0.1823, log 0.8 = -0.2231
    given = ratios([0.19, 0.17, -0.5, -0.5, -0.22, -0.23, 0.5], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    losses, gradient = one_token(name, given, **hyper)
    r = torch.exp(given["token_logp"] - given["old_logp"]).flatten()
    free = torch.tensor([0, 1, 1, 0, 1, 0, 1]).double()
    assert_close(gradient, -free * r * given["advantage"])
    assert_close(losses[free == 0], torch.tensor([-1.2, 0.8, 0.8]).double())


@pytest.mark.parametrize(("name", "hyper"), ONE_TOKEN[1:], ids=str)
def test_all_clipped_methods_are_ppo_for_one_token(name, hyper):
    given = ratios(normal(40, seed=1, std=0.4).tolist(), normal(40, seed=2).tolist())
    assert_close(one_token(name, given, **hyper), one_token("ppo", given))


def test_the_dual_clip_bounds_what_a_bad_sample_can_cost():
    given = ratios([0.5, 1.0, 2.0, 2.0, -0.1], [-1.0, -1.0, -2.0, 2.0, -1.0])
    plain, plain_gradient = one_token("ppo", given)
    losses, gradient = one_token("ppo", given, dual_clip=2.0)
    # r = (1.648721, 2.718282, 7.389056, 7.389056, 0.904837): 2 * 1 and 2 * 2 where r > 2
    assert_close(losses, torch.tensor([1.64872127070, 2.0, 4.0, -2.4, 0.904837418036]).double())
    assert_close(gradient[[0, 3, 4]], plain_gradient[[0, 3, 4]])
    assert not gradient[[1, 2]].any() and (losses <= plain).all()


def test_dapo_clips_higher():
    given = ratios([math.log(1.25)], [1.0])
    assert one_token("dapo", given)[1] == pytest.approx(-1.25)
    assert one_token("grpo", given)[1] == 0
    assert_close(one_token("dapo", given, eps_high=0.2), one_token("grpo", given))


@pytest.mark.parametrize("hyper", [{"eps": 0.2}, {"cap": 1.2}], ids=str)
def test_cispo_keeps_the_gradient_of_clipped_tokens(hyper):
    given = ratios([2.0, -2.0, 2.0], [1.0, 1.0, -1.0])
    _, gradient = one_token("cispo", given, **hyper)
    # -min(r, 1.2) A, e^-2 = 0.135335
    assert_close(gradient, torch.tensor([-1.2, -0.135335283237, 1.2]).double())
    assert one_token("ppo", given)[1][0] == 0


def test_sapo_is_smooth_and_fades():
    given = ratios([-3.0, -0.5, 0.0, 0.5, 3.0], [1.0] * 5)
    _, gradient = one_token("sapo", given)
    r = torch.exp(torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0]).double())
    gate = torch.sigmoid(r - 1)
    assert_close(gradient, -4 * gate * (1 - gate) * r)  # the paper's weight, 1 on policy
    assert gradient[2] == -1 and (gradient < 0).all() and gradient[4].abs() < 1e-6
    # a negative advantage fades faster: tau_neg > tau_pos
    up, down = (one_token("sapo", ratios([1.0, -1.0], [a, a]))[1].abs() for a in (1.0, -1.0))
    assert (down < up).all()


def test_vespos_weight_is_greatest_on_policy_and_carries_no_gradient():
    given = ratios([-1.0, 0.0, 1.0], [1.0] * 3)
    losses, gradient = one_token("vespo", given, k_pos=2.0, lambda_pos=2.0)
    assert_close(losses, gradient * given["token_logp"].flatten())  # linear in logp
    assert gradient[1] == -1 and (gradient[[0, 2]] > -1).all()  # (w e^(1 - w))^2 is largest at w = 1


def test_vespo_holds_a_tokens_log_ratio_to_20_before_the_sum():
    logp = torch.tensor([[-1.0, -40.0], [-1.0, -30.0]], dtype=F64)
    # 20 - 20, 10 - 20: weights 1 and e^(3 + 2 * -10 - 3 e^-10) = 4.1394e-8, where the sums are 10 and -15
    old = logp - torch.tensor([[30.0, -20.0], [10.0, -25.0]], dtype=F64)
    given = {"old_logp": old, "advantage": torch.ones(2, dtype=F64), "mask": torch.ones(2, 2).bool()}
    losses, found = run("vespo", given | {"token_logp": logp})
    weight = torch.tensor([[1.0], [4.13937389854e-8]], dtype=F64)
    assert_close(losses, -weight * logp, rtol=1e-8, atol=0)
    assert_close(found["token_logp"], -weight.expand(2, 2), rtol=1e-8, atol=0)


def test_gspo_has_one_ratio_a_completion():
    given = random_columns("gspo")
    _, found = run("gspo", given, eps_low=0.5, eps_high=0.5)
    for row, mask in zip(found["token_logp"], given["mask"]):
        assert len(row[mask].unique()) <= 1


def test_luspo_is_gspo_times_length():
    given = {k: v for k, v in random_columns("luspo").items() if k in ("token_logp", "old_logp", "advantage", "mask")}
    gspo, _ = run("gspo", given, eps_low=0.1, eps_high=0.1)
    luspo, _ = run("luspo", given, **clip_names("luspo", 0.1, 0.1))
    assert_close(luspo, gspo * given["mask"].sum(1))


def test_the_penalty_is_nothing_and_flat_at_the_old_policy_and_never_negative():
    given = random_columns("ppo_penalty")
    given["old_logp"] = given["token_logp"]
    assert_close(run("ppo_penalty", given, beta=50.0), run("ppo_penalty", given, beta=0.0))
    given = random_columns("ppo_penalty")
    assert (run("ppo_penalty", given, beta=1.0)[0] >= run("ppo_penalty", given, beta=0.0)[0]).all()


def test_nash_md_rests_at_an_even_match_with_the_reference():
    given = columns("nash_md")
    given |= {"ref_token_logp": given["token_logp"], "prob_w": torch.full((3,), 0.5).double()}
    losses, found = run("nash_md", given)
    assert not losses.any() and not found["token_logp"].any()
    given["prob_w"] += 0.25  # a win pushes the completion up
    assert_close(run("nash_md", given)[1]["token_logp"], torch.where(MASK, -0.25, 0.0).double())


def test_the_value_clip_holds_the_critic_back():
    one = torch.ones(1, 1, dtype=F64)
    given = {"value": 1.5 * one, "old_value": one, "returns": 3 * one, "mask": one.bool()}
    losses, found = run("ppo_value", given)
    # V = 1.5 is out of 1 +- 0.2 on the way to R = 3: the clipped 1.2, (1.8)^2 / 2, and no gradient
    assert losses.item() == pytest.approx(1.62) and found["value"].item() == 0
    given["returns"] = -one  # on the way back it is not held
    losses, found = run("ppo_value", given)
    assert losses.item() == pytest.approx(3.125) and found["value"].item() == pytest.approx(2.5)


def test_ptx_is_spread_over_the_tokens():
    given = columns("ppo_ptx")
    _, found = run("ppo_ptx", given, gamma=0.6)
    # d of the 9 tokens' losses: each loses 0.6 * mean of 3 log-likelihoods
    assert_close(found["ptx_logp"], torch.where(given["ptx_mask"], -0.6 * 9 / 3, 0.0).double())


def test_the_penalty_adapts_as_ppo_says():
    # halved below target / 1.5, doubled above 1.5 target, kept between
    for kl, beta in ((0.0066, 0.05), (0.0067, 0.1), (0.01, 0.1), (0.0149, 0.1), (0.0151, 0.2)):
        assert float(policy.adapt(0.1, kl, 0.01)) == pytest.approx(beta)
        assert float(policy.adapt(0.1, torch.tensor(kl), 0.01)) == pytest.approx(beta)


# --- TRL 1.16 and Liger 0.8.5, called on tensors ---


def reduced(name: str, losses: Tensor, mask: Tensor, fixed_length: int) -> Tensor:
    """The mean that the method declares, for one batch on one rank."""
    tokens, rows = mask.sum(1), len(mask)
    return {
        "units": lambda: losses.mean(),
        "tokens": lambda: losses.sum() / tokens.sum(),
        "local_tokens": lambda: losses.sum() / tokens.sum(),
        "row_means": lambda: (losses.sum(1) / tokens.clamp(min=1)).mean(),
        "fixed_length": lambda: losses.sum() / (rows * fixed_length),
    }[xf.METHODS[name].denominator]()


@pytest.fixture(scope="module")
def peers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever they and what they import have to say on import
        peer("trl", "trl", "1.16.")
        peer("liger_kernel", "liger-kernel", "0.8.")
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.rloo_trainer import RLOOTrainer
    return SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer, liger=LigerFusedLinearGRPOLoss)


def trainer_like(given: dict, trainer: type, **fields) -> tuple[SimpleNamespace, dict]:
    """What the trainers' loss methods read from `self`, and a batch whose model has these log-probs."""
    mask = given["mask"]
    log_probs = given["token_logp"], given.get("entropy", torch.zeros_like(given["token_logp"])), None
    arguments = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    arguments |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    arguments |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    stub = SimpleNamespace(
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
        **{"use_vllm": False, "vllm_importance_sampling_correction": False, "_entropy_bonus_enabled": False},
        args=SimpleNamespace(**arguments),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: log_probs,
        get_gamma_weights=getattr(trainer, "get_gamma_weights", None),
        **fields,
    )
    ids = torch.zeros_like(mask).long()
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    batch |= {"completion_mask": mask.long(), "advantages": given["advantage"]}
    batch |= {"num_items_in_batch": mask.sum()}
    return stub, batch


GRPO_PEERS = [  # name, our hyperparameters, theirs
    ("grpo", {}, {"loss_type": "grpo"}),
    ("bnpo", {}, {"loss_type": "bnpo"}),
    ("dr_grpo", {}, {"loss_type": "dr_grpo"}),
    ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("cispo", {"cap": 1.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    ("sapo", {}, {"loss_type": "sapo"}),
    ("vespo", {}, {"loss_type": "vespo"}),
    ("luspo", clip_names("luspo", 0.2, 0.2), {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    (
        "gspo",
        {},
        {
            **{"loss_type": "grpo", "importance_sampling_level": "sequence"},
            **{"epsilon_low": 3e-4, "epsilon_high": 4e-4},
        },
    ),
]
GRPO_PEERS += [(n, {**h, "beta": 0.04}, {**t, "beta": 0.04}) for n, h, t in GRPO_PEERS if has(n, "beta")]
grpo_peers = pytest.mark.parametrize(
    ("name", "hyper", "theirs"), GRPO_PEERS, ids=[f"{n}-{h.get('beta', 0)}" for n, h, _ in GRPO_PEERS]
)


@grpo_peers
@pytest.mark.parametrize("off_policy", [True, False], ids=["off policy", "on policy"])
def test_agrees_with_trls_grpo(peers, name, hyper, theirs, off_policy):
    given = random_columns(name)
    leaf = given["token_logp"] = given["token_logp"].requires_grad_()
    fields = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token"}
    stub, batch = trainer_like(given, peers.grpo, **{**fields, **theirs}, max_completion_length=9)
    if off_policy:
        batch["old_per_token_logps"] = given["old_logp"]
    else:
        given.pop("old_logp")
    if "ref_token_logp" in given:
        batch["ref_per_token_logps"] = given["ref_token_logp"]
    expected = peers.grpo._compute_loss(stub, None, batch)
    ours = reduced(name, xf.METHODS[name](**given, **hyper)[0], given["mask"], 9)
    assert_close(ours, expected)
    assert_close(torch.autograd.grad(ours, leaf), torch.autograd.grad(expected, leaf))


@grpo_peers
def test_metrics_are_trls(peers, name, hyper, theirs):
    given = random_columns(name)
    some = given["mask"].any(1)  # where TRL logs a ratio of a completion, one without tokens has 1
    given = {k: v[some] for k, v in given.items()}
    fields = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token"}
    stub, batch = trainer_like(given, peers.grpo, **{**fields, **theirs}, max_completion_length=9)
    batch |= {"old_per_token_logps": given["old_logp"], "ref_per_token_logps": given["ref_token_logp"]}
    peers.grpo._compute_loss(stub, None, batch)
    _, metrics = xf.METHODS[name](**given, **hyper)
    for key, [expected] in stub._metrics["eval"].items():
        if key.endswith(("_min", "_max")) or (name in ROW_LOSSES and key in ("kl", "entropy")):
            continue  # not a mean over what the losses are of
        assert metrics[key].nanmean().item() == pytest.approx(expected, rel=1e-6), key


def test_agrees_with_trls_rloo(peers):
    given = random_columns("rloo")
    some = given["mask"].any(1)  # to TRL a completion without a token has a ratio of 1
    given = {k: v[some] for k, v in given.items()}
    leaf = given["token_logp"] = given["token_logp"].requires_grad_()
    stub, batch = trainer_like(given, peers.rloo, epsilon_low=0.2, epsilon_high=0.2)
    batch["old_logps"] = (given["old_logp"] * given["mask"]).sum(1)
    expected = peers.rloo._compute_loss(stub, None, batch)
    ours = reduced("rloo", xf.METHODS["rloo"](**given, variant="clipped")[0], given["mask"], 9)
    assert_close(ours, expected)
    assert_close(torch.autograd.grad(ours, leaf), torch.autograd.grad(expected, leaf))


# Without luspo's divergence, which Liger weighs by the length where TRL 1.16 sums it.
LIGER_PEERS = [p for p in GRPO_PEERS if p[0] != "luspo" or "beta" not in p[1]]


@pytest.mark.parametrize(
    ("name", "hyper", "theirs"), LIGER_PEERS, ids=[f"{n}-{h.get('beta', 0)}" for n, h, _ in LIGER_PEERS]
)
def test_agrees_with_liger(peers, name, hyper, theirs):
    given = {k: v.float() if v.is_floating_point() else v for k, v in random_columns(name).items()}
    hidden, weight = normal(7, 5, 6, seed=1).float(), normal(11, 6, seed=2).float()
    targets = torch.randint(0, 11, (7, 5), generator=torch.Generator().manual_seed(3))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    given |= {"token_logp": logp, "old_logp": logp.detach() + normal(7, 5, seed=4, std=0.3).float()}
    beta = theirs.get("beta", 0.0)
    loss = peers.liger(**{"beta": beta, **theirs}, compiled=False, use_ref_model=beta > 0, max_completion_length=9)
    expected, _ = loss(
        *leaves, targets, given["mask"].float(), given["advantage"],
        ref_per_token_logps=given.get("ref_token_logp"), old_per_token_logps=given["old_logp"],
    )  # fmt: skip
    ours = reduced(name, xf.METHODS[name](**given, **hyper)[0], given["mask"], 9)
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)
    assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# --- Extremes ---

E50 = 5.18470552858707e21  # e^50
FAR = [  # logp, old_logp, advantage, C(0.2, 0.2), its gradient
    (-1.0, -51.0, 2.0, -2.4, 0.0),
    (-1.0, -51.0, -2.0, 2 * E50, 2 * E50),
    (-1.0, -51.0, 0.0, 0.0, 0.0),
    (-51.0, -1.0, 2.0, -2 / E50, -2 / E50),
    (-51.0, -1.0, -2.0, 1.6, 0.0),
    (-2000.0, -1.0, 2.0, 0.0, 0.0),
    (-2000.0, -1.0, -2.0, 1.6, 0.0),
    (-2000.0, -1950.0, 2.0, -2 / E50, -2 / E50),
    (-2000.0, -2000.0, 2.0, -2.0, -2.0),
    # r is beyond any float, and clipped
    (-1.0, -2000.0, 2.0, -2.4, 0.0),
    (-1.0, -2000.0, 0.0, 0.0, 0.0),
    (-1e-7, -2000.0, 2.0, -2.4, 0.0),
]


def far(rows, dtype: torch.dtype) -> dict:
    logp, old, advantage = (torch.tensor(x, dtype=dtype) for x in list(zip(*rows))[:3])
    mask = torch.ones(len(rows), 1).bool()
    return {"token_logp": logp[:, None], "old_logp": old[:, None], "advantage": advantage, "mask": mask}


@pytest.mark.parametrize(("name", "hyper"), ONE_TOKEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_far_ratios_are_exact(name, hyper, dtype):
    losses, gradient = one_token(name, far(FAR, dtype), **hyper)
    *_, value, slope = zip(*FAR)
    assert_close(losses, torch.tensor(value, dtype=dtype), rtol=1e-5, atol=0)
    assert_close(gradient, torch.tensor(slope, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [n for n in RATIO if has(n, "entropy_coef")])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_what_is_switched_off_cannot_hurt(name, dtype):
    """The divergence overflows, a collapsed distribution's entropy may be NaN: neither is in the loss."""
    given = far([(-2000.0, -2000.0, 1.0)], dtype)
    expected = one_token(name, given, **HYPER.get(name, {}))
    given["entropy"] = torch.full((1, 1), math.nan, dtype=dtype)
    if has(name, "beta"):
        given["ref_token_logp"] = torch.full((1, 1), -1.0, dtype=dtype)
    assert_close(one_token(name, given, **HYPER.get(name, {})), expected, rtol=0, atol=0)


BEYOND = [
    # name, hyper, (logp, old_logp, advantage), loss, gradient
    ("ppo", {"dual_clip": 3.0}, (-1.0, -2000.0, -2.0), 6.0, 0.0),
    ("ppo", {"dual_clip": 3.0}, (-1.0, -51.0, -2.0), 6.0, 0.0),
    # r = 0: 0.1 (1999 - 1), and its slope 0.1 (0 - 1)
    ("ppo_penalty", {}, (-2000.0, -1.0, 2.0), 199.8, -0.1),
    # (0.1 - 2) e^50 - 0.1 * 51
    ("ppo_penalty", {}, (-1.0, -51.0, 2.0), -1.9 * E50, -1.9 * E50),
    ("reinforce", {}, (-2000.0, -1.0, 2.0), 4000.0, -2.0),
    ("rloo", {}, (-2000.0, -1.0, 2.0), 4000.0, -2.0),
    ("cispo", {"cap": 5.0}, (-1.0, -2000.0, 2.0), 10.0, -10.0),
    ("cispo", {"cap": 5.0}, (-1.0, -2000.0, -2.0), -10.0, 10.0),
    ("cispo", {"eps": 0.2}, (-2000.0, -1.0, 2.0), 0.0, 0.0),
    # the gate is 1: -2 * 4; 2 * 4 / 1.05; at r = 0 s(-1) = 0.268941, s(-1.05) = 0.259225
    ("sapo", {}, (-1.0, -2000.0, 2.0), -8.0, 0.0),
    ("sapo", {}, (-1.0, -2000.0, -2.0), 7.61904761905, 0.0),
    ("sapo", {}, (-1.0, -51.0, 2.0), -8.0, 0.0),
    ("sapo", {}, (-2000.0, -1.0, 2.0), -2.15153137096, 0.0),
    ("sapo", {}, (-2000.0, -1.0, -2.0), 1.97504541646, 0.0),
    # w is held to e^20: e^(3 + 40 - 3 e^20) = 0; and to 1e-8: e^(3 - 3e-8) 1e-16 = 2.00855363e-15 times 4000,
    # -2
    ("vespo", {}, (-1.0, -2000.0, 2.0), 0.0, 0.0),
    ("vespo", {}, (-2000.0, -1.0, 2.0), 8.03421452e-12, -4.01710726e-15),
]


@pytest.mark.parametrize(("name", "hyper", "row", "value", "slope"), BEYOND, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_far_ratios_of_the_others(name, hyper, row, value, slope, dtype):
    given = {k: v for k, v in far([row], dtype).items() if k in xf.METHODS[name].inputs}
    losses, gradient = one_token(name, given, **hyper)
    assert_close(losses, torch.tensor([value], dtype=dtype), rtol=1e-5, atol=0)
    assert_close(gradient, torch.tensor([slope], dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [n for n in RATIO if "ref_token_logp" in xf.METHODS[n].inputs])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_far_reference_is_exact(name, dtype):
    given = far([(-1.0, -1.0, 0.0), (-2000.0, -2000.0, 0.0), (-51.0, -51.0, 0.0)], dtype)
    given["ref_token_logp"] = torch.tensor([[-2000.0], [-2000.0], [-1.0]], dtype=dtype)
    losses, gradient = one_token(name, given, **{**HYPER.get(name, {}), "beta": 0.1})
    # d = -1999: 0 + 1999 - 1, slope 1 - e^d; 0; d = 50: e^50 - 51, slope 1 - e^50
    assert_close(losses, torch.tensor([199.8, 0, 0.1 * E50], dtype=dtype), rtol=1e-5, atol=0)
    assert_close(gradient, torch.tensor([0.1, 0, -0.1 * E50], dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "hyper"), PATHS, ids=[f"{n}-{h}" for n, h in PATHS])
def test_long_rows_of_far_log_probs_are_finite_and_exact(name, hyper):
    """Rows of 50 tokens, log-probs from -2000 to -1e-7, log-ratios that sum to no more than 50."""
    logp = torch.tensor([-2000.0, -50.0, -3.0, -1e-7])[:, None].expand(4, 50)
    step = torch.linspace(-1, 1, 50).expand(4, 50) * torch.tensor([1.0, 0.3, -1.0, 0.5])[:, None]
    given = {
        **{"token_logp": logp, "old_logp": logp - step, "ref_token_logp": logp + step, "entropy": step.abs()},
        **{"advantage": torch.tensor([1.0, -1.0, 2.0, -2.0]), "prob_w": torch.tensor([0.0, 1.0, 0.5, 0.9])},
        **{"value": logp, "old_value": logp + step, "returns": -logp, "ptx_logp": logp, "ptx_mask": logp < 0},
        "mask": torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.8,
    }
    single = {k: given[k] for k in xf.METHODS[name].inputs}
    double = {k: v.double() if v.is_floating_point() else v for k, v in single.items()}
    losses, found = run(name, single, **hyper)
    expected, exact = run(name, double, **hyper)
    assert expected.isfinite().all() and all(g.isfinite().all() for g in exact.values())
    # the log-ratio of a log-prob of -2000 is known to 2000 * 2^-24
    assert_close(losses, expected.float(), rtol=2e-3, atol=1e-5)
    for key, value in found.items():
        assert_close(value, exact[key].float(), rtol=1e-2, atol=1e-5)


# --- Errors ---


@pytest.mark.parametrize(("name", "key"), [(n, k) for n in NAMES for k in xf.METHODS[n].required])
def test_missing_column_is_named(name, key):
    with pytest.raises(ValueError, match=rf"missing {key}\b"):
        xf.METHODS[name](**columns(name, without=(key,)), **HYPER.get(name, {}))


@pytest.mark.parametrize(
    ("key", "switch"), [("ref_token_logp", "beta"), ("entropy", "entropy_coef")], ids=["kl", "entropy"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_column_is_needed_when_its_term_is_switched_on(name, key, switch):
    method = xf.METHODS[name]
    if key not in method.inputs or key in method.required:
        assert switch not in method.defaults or name in ("ppo_penalty", "nash_md")
        return
    given, hyper = columns(name, without=(key,)), HYPER.get(name, {})
    method(**given, **hyper)
    assert method.uses[key] == switch and method.defaults[switch] == 0
    with pytest.raises(ValueError, match=key):
        method(**given, **hyper, **{switch: 0.1})


def test_cispo_takes_exactly_one_bound():
    for hyper in ({}, {"cap": 2.0, "eps": 0.2}):
        with pytest.raises(ValueError, match=r"cap.*eps"):
            xf.METHODS["cispo"](**columns("cispo"), **hyper)


OUT_OF_RANGE = [
    *((n, "eps", e) for n in NAMES if has(n, "eps") for e in (-0.1, math.nan)),
    *((n, e, -0.1) for n in NAMES for e in ("eps_low", "eps_high") if has(n, e)),
    *((n, "beta", b) for n in NAMES if has(n, "beta") for b in (-0.1, math.nan)),
    *(("ppo", "dual_clip", c) for c in (0.5, 1.0, -2.0)),
    *(("ppo_value", "value_clip", c) for c in (-0.2, math.nan)),
    ("ppo_ptx", "gamma", -1.0),
    *(("cispo", "cap", c) for c in (0.0, -1.0, math.nan)),
    *(("sapo", k, t) for k in ("tau_pos", "tau_neg") for t in (0.0, -1.0)),
    *(("vespo", k, -1.0) for k in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")),
    ("rloo", "variant", "median"),
]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyperparameter_out_of_range(name, key, value):
    hyper = {} if key in ("cap", "eps") else HYPER.get(name, {})
    with pytest.raises(ValueError, match=key) as caught:
        xf.METHODS[name](**columns(name), **hyper, **{key: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("prob", [1.5, -0.1, math.nan])
def test_nash_md_takes_a_probability(prob):
    given = columns("nash_md") | {"prob_w": torch.tensor([0.5, 0.5, prob]).double()}
    with pytest.raises(ValueError, match=r"prob_w.*2"):
        xf.METHODS["nash_md"](**given)


@pytest.mark.parametrize(("name", "key"), [(n, k) for n in NAMES for k in xf.METHODS[n].inputs if "ptx" not in k])
def test_shapes_that_do_not_match(name, key):
    given = columns(name)
    with pytest.raises(ValueError, match=key):
        xf.METHODS[name](**given | {key: given[key][:2]}, **HYPER.get(name, {}))


# --- What a method says about itself ---

DEFAULTS = {
    "ppo": {"eps": 0.2, "dual_clip": None},
    "ppo_value": {"value_clip": 0.2},
    "ppo_penalty": {"beta": 0.1},
    "ppo_ptx": {"eps": 0.2, "gamma": 1},
    **{name: {"eps": 0.2, "beta": 0} for name in ("grpo", "dr_grpo", "bnpo")},
    "dapo": {"eps_low": 0.2, "eps_high": 0.28},
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4},
    "cispo": {"cap": None, "eps": None},
    "sapo": {"tau_pos": 1, "tau_neg": 1.05},
    "vespo": {"k_pos": 2, "lambda_pos": 3, "k_neg": 3, "lambda_neg": 2},
    "nash_md": {"beta": 0.1},
}
DENOMINATOR = {
    **{"grpo": "row_means", "sapo": "row_means", "dr_grpo": "fixed_length", "bnpo": "local_tokens"},
    **dict.fromkeys(("dapo", "cispo", "vespo"), "tokens"),
    **dict.fromkeys(ROW_LOSSES, "units"),
}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    method = xf.METHODS[name]
    defaults = DEFAULTS.get(name, {})
    assert {k: method.defaults[k] for k in defaults} == defaults
    assert method.layout == "policy" and method.denominator == DENOMINATOR.get(name, method.denominator)
    assert method.unit in (("row",) if name in ROW_LOSSES or name == "vespo" else ("token", "row", "batch"))
    assert method.card.paper and method.card.equation and "=" in method.__doc__


HUMAN = "Preference Human Pair"
TABLE = {  # rows of the survey's Table 1
    "ppo_ptx": f"Explicit Point Response Positive {HUMAN} - Uncontrol KL On Offline Separate",
    "rloo": f"Explicit Point Response Positive {HUMAN} Free Uncontrol KL On Offline Separate",
    "nash_md": f"- Preference Response Positive {HUMAN} Reference Uncontrol KL On Offline Separate",
}


@pytest.mark.parametrize("name", TABLE)
def test_card_is_the_surveys(name):
    attributes = xf.METHODS[name].card.attributes
    for (key, found), expected in zip(attributes.items(), TABLE[name].split(), strict=True):
        # The reference of InstructGPT is in the reward, not among the columns.
        assert found == expected or (name, key) == ("ppo_ptx", "RL1")


def test_the_kl_term_is_k3():
    given = columns("grpo")
    kl = run("grpo", given, beta=1.0)[0] - run("grpo", given)[0]
    assert_close(kl[MASK], k3(given["token_logp"], given["ref_token_logp"])[MASK])
