"""Listwise losses: literal values, gradients, what the papers say, ragged lists, extremes, errors.

Literal values were worked out from the equations with 30-digit arithmetic; the line above each one gives the
steps. L(x) is log(1 + e^-x). Every method is also held against its equation, written for one list in Python.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import xpo_fast as xf
from oracle import normal

F64 = torch.float64
# Log-ratios (1, -1, 2) of scores (2, 3, 1), so that the policy has the list nearly upside down; (-3, 2) of
# (1, 0). Log-probs a token (-2, -3, -4.5), (-4, -0.75). What stands outside the mask is junk.
MASK = torch.tensor([[True, True, True], [True, True, False]])
COLUMNS = {
    "logps": [[-10.0, -12.0, -9.0], [-8.0, -6.0, 5.0]],
    "ref_logps": [[-11.0, -11.0, -11.0], [-5.0, -8.0, 1.0]],
    "lens": [[5.0, 4.0, 2.0], [2.0, 8.0, 1.0]],
    "scores": [[2.0, 3.0, 1.0], [1.0, 0.0, 7.0]],
    "logp_l": [-15.0, -4.0],
    "ref_pos_logp_l": [-13.0, -9.0],
}
GAPS = [[2.5, 3.0, 1.0], [1.0, -1.0, 7.0]]  # gaps (0.5, 2) and 1.5; 2
UNIT = [[0.5, 1.0, 0.25], [0.8, 0.1, 7.0]]  # scores in [0, 1]
FULL = [[-10.0, -12.0, -9.0], [-8.0, -6.0, -7.0]], [[-11.0, -11.0, -11.0], [-5.0, -8.0, -6.0]]
LEARNT = ("logps", "logp_l")


def columns(name: str, dtype: torch.dtype = F64, **other) -> dict[str, Tensor]:
    source = {**COLUMNS, **other}
    out = {k: torch.tensor(source[k], dtype=dtype) for k in xf.METHODS[name].inputs if k in source}
    return out if name == "nn" else {**out, "mask": MASK}


def gradients(losses: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(losses.sum(), tuple(leaves.values())), strict=True))


def run(name: str, given: dict, **hyper) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and d(sum of losses) for each column that is learnt."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in LEARNT}
    losses, _ = xf.METHODS[name](**{**given, **leaves}, **hyper)
    return losses, gradients(losses, leaves)


# Name, hyperparameters, columns other than COLUMNS, losses. With beta = 0.1: s = (0.1, -0.1, 0.2), (-0.3,
# 0.2).
LITERALS = [
    # ranks of s (2, 3, 1), (2, 1). Pairs (2nd, 1st): |8 - 4| |1/ln 4 - 1/ln 3| L(-0.2); (2nd, 3rd): |8 - 2|
    # |1/ln 4 - 1/ln 2| L(-0.3); (1st, 3rd): |4 - 2| |1/ln 3 - 1/ln 2| L(-0.1). |2 - 1| |1/ln 3 - 1/ln 2|
    # L(-0.5)
    ("lipo", {}, {}, [5.09348613384, 0.518652953766]),
    # L(-1), L(-1.5), L(-0.5); L(-2.5), by the same weights
    ("lipo", {"beta": 0.5}, {}, [9.39342436675, 1.37314483336]),
    # L(-0.2) + L(-0.3) + L(-0.1); L(-0.5)
    ("lipo", {"kind": "pair_logistic"}, {}, [2.39689077392, 0.97407698418]),
    # 1.2 + 1.3 + 1.1; 1.5
    ("lipo", {"kind": "pair_hinge"}, {}, [3.6, 1.5]),
    # 1.9^2 + 3.1^2 + 0.8^2; 1.3^2 + 0.2^2
    ("lipo", {"kind": "point_mse"}, {}, [13.86, 1.73]),
    # 0.5 (L(0.1) + L(-0.1)) + L(-0.1) + 0.25 L(0.2) + 0.75 L(-0.2); 0.8 L(-0.3) + 0.2 L(0.3) + 0.1 L(0.2) +
    # 0.9 L(-0.2)
    ("lipo", {"kind": "point_sigmoid"}, {"scores": UNIT}, [2.18693218953, 1.57249411385]),
    # 6 log(e^0.1 + e^-0.1 + e^0.2) - 2 * 0.1 + 3 * 0.1 - 0.2; log(e^-0.3 + e^0.2) + 0.3
    ("lipo", {"kind": "softmax"}, {}, [6.93751347875, 0.97407698418]),
    # in the order 2nd, 1st, 3rd: log(e^-0.1 + e^0.1 + e^0.2) + 0.1 + log(e^0.1 + e^0.2) - 0.1; L(-0.5)
    ("lipo", {"kind": "list_mle"}, {}, [2.0173155732, 0.97407698418]),
    ("plackett_luce", {}, {}, [2.0173155732, 0.97407698418]),
    # s = (0.5, -0.5, 1), (-1.5, 1)
    ("plackett_luce", {"beta": 0.5}, {}, [3.07820758952, 2.57888973429]),
    # p = (-2, -3, -4.5): the first is above the better second by 1; + 12. (-4, -0.75): 3.25 + 8
    ("rrhf", {}, {}, [13.0, 11.25]),
    ("rrhf", {"lam_sft": 0.5}, {}, [7.0, 7.25]),
    # in order r = (-3, -2, -4.5). First: gaps 1, 2, the largest 2: 6 + log(e^-6 + e^-2 + e^-9) = 4.019045;
    # second: gap 1: 2 + log(e^-2 + e^-4.5) = 0.078890; + 0.05 * 2^2 * 12. One gap of 1: 4 + log(e^-4 +
    # e^-0.75) = 3.288041 + 0.05 * 8
    ("pro", {}, {}, [6.49793474217, 3.68804137169]),
    # gaps 0.5, 2: 6 + log(e^-6 + e^-1 + e^-9) = 5.007049; 1.5: 3 + log(e^-3 + e^-6.75) = 0.023245; + 2.4.
    # 2: 8 + log(e^-8 + e^-1.5) = 6.501502 + 0.4
    ("pro", {}, {"scores": GAPS}, [7.43029397478, 6.90150231016]),
    # 12 + 0.05 * 5.030294; 8 + 0.05 * 6.501502
    ("pro", {"variant": "survey"}, {"scores": GAPS}, [12.2515146987, 8.32507511551]),
    # S51: 3 + log(e^-3 + e^-2 + e^-4.5) = 1.371539, + 0.078890 + 2.4; 3.288041 + 0.4
    ("pro", {"temperature": False}, {"scores": GAPS}, [3.85042876615, 3.68804137169]),
    # ... + 0.5 * 4 * 12; + 0.5 * 8
    ("pro", {"temperature": False, "alpha": 0.5}, {}, [25.45042876615, 7.28804137169]),
    # log-ratios (1, -1, 2), (-3, 2, -1), rejected -2, 5: 0.1 * 2/3 + 0.1 * 2 = 0.266667; -0.1 * 2/3 - 0.1 * 5
    # = -0.566667
    ("nn", {}, {"logps": FULL[0], "ref_logps": FULL[1]}, [0.568676522856, 1.01609358295]),
    # 2/3 + 0.5 * 2; -2/3 - 0.5 * 5
    ("nn", {"gamma": 1.0, "alpha": 0.5}, {"logps": FULL[0], "ref_logps": FULL[1]}, [0.173007988886, 3.20794664606]),
]
PATHS = [(name, hyper, other) for name, hyper, other, _ in LITERALS]
NAMES = ("lipo", "plackett_luce", "rrhf", "pro", "nn")
RANKING = [p for p in PATHS if p[0] != "nn"]
KINDS = ("lambda", "pair_logistic", "pair_hinge", "point_mse", "point_sigmoid", "softmax", "list_mle")


def paths(which):
    ids = [f"{n}-{h}-{'' if not o else 'other scores'}" for n, h, o in which]
    return pytest.mark.parametrize(("name", "hyper", "other"), which, ids=ids)


@pytest.mark.parametrize(("name", "hyper", "other", "expected"), LITERALS, ids=[f"{p[0]}-{p[1]}" for p in LITERALS])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (F64, 1e-10)], ids=str)
def test_literal(name, hyper, other, expected, dtype, rtol):
    given = columns(name, dtype, **other)
    given |= {k: v.requires_grad_() for k, v in given.items() if k in LEARNT}
    losses, metrics = xf.METHODS[name](**given, **hyper)
    assert losses.requires_grad
    assert_close(losses, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol / 10)
    for key, value in metrics.items():
        assert value.shape == (2,) and not value.requires_grad and value.isfinite().all(), key


METRICS = [  # of the best (chosen) and the worst (rejected); accuracies: the share of the pairs in order
    ("lipo", {}, {"chosen": [-0.1, -0.3], "rejected": [0.2, 0.2], "margins": [-0.3, -0.5], "accuracies": [0, 0]}),
    ("plackett_luce", {"beta": 0.5}, {"chosen": [-0.5, -1.5], "rejected": [1, 1], "margins": [-1.5, -2.5]}),
    ("rrhf", {}, {"chosen": [-3, -4], "rejected": [-4.5, -0.75], "accuracies": [2 / 3, 0]}),
    ("pro", {}, {"chosen": [-3, -4], "rejected": [-4.5, -0.75], "accuracies": [2 / 3, 0]}),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), METRICS, ids=[m[0] for m in METRICS])
def test_metrics_carry_trls_names(name, hyper, expected):
    _, metrics = xf.METHODS[name](**columns(name), **hyper)
    for key, value in expected.items():
        assert_close(metrics[f"rewards/{key}"], torch.tensor(value, dtype=F64))
    assert metrics["logps/chosen"].tolist() == [-12, -8] and metrics["logps/rejected"].tolist() == [-9, -6]


# --- The equations, for one list of Python numbers and tensors without a mask ---


def soft(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-x))


def better(scores: list[float]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]]


def ordered(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def plain_lipo(logps, ref_logps, scores, beta=0.1, kind="lambda"):
    s, psi = beta * (logps - ref_logps), scores.tolist()
    rank = {i: n for n, i in enumerate(ordered(s.tolist()), 1)}
    if kind == "list_mle":
        return plain_plackett_luce(logps, ref_logps, scores, beta)
    if kind.startswith("point") or kind == "softmax":
        terms = {
            "point_mse": lambda i: (s[i] - psi[i]) ** 2,
            "point_sigmoid": lambda i: psi[i] * soft(s[i]) + (1 - psi[i]) * soft(-s[i]),
            "softmax": lambda i: -psi[i] * torch.log(torch.exp(s[i]) / torch.exp(s).sum()),
        }[kind]
        return sum((terms(i) for i in range(len(s))), s.sum() * 0)
    weight = {
        "lambda": lambda i, j: (
            abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
        )
    }.get(kind, lambda i, j: 1)
    cost = (lambda x: torch.clamp(1 - x, min=0)) if kind == "pair_hinge" else soft
    return sum((weight(i, j) * cost(s[i] - s[j]) for i, j in better(psi)), s.sum() * 0)


def plain_plackett_luce(logps, ref_logps, scores, beta=0.1):
    s = (beta * (logps - ref_logps))[ordered(scores.tolist())]
    return sum((-s[k] + torch.log(torch.exp(s[k:]).sum()) for k in range(len(s))), s.sum() * 0)


def plain_rrhf(logps, lens, scores, lam_sft=1.0):
    p, psi = logps / lens, scores.tolist()
    hinges = sum((torch.clamp(p[j] - p[i], min=0) for i, j in better(psi)), p.sum() * 0)
    return hinges - lam_sft * logps[ordered(psi)[0]]


def plain_pro(logps, lens, scores, alpha=0.05, temperature=True, variant="authors"):
    order = ordered(scores.tolist())
    r, psi, k_all = (logps / lens)[order], scores[order], len(order)
    align = r.sum() * 0
    for k in range(k_all - 1):
        inverse = psi[k] - psi[k:] if temperature else torch.ones(k_all - k, dtype=r.dtype)
        if temperature:
            inverse = torch.cat([inverse[1:].max()[None], inverse[1:]])
        x = r[k:] * inverse
        align = align - x[0] + torch.log(torch.exp(x).sum())
    best = logps[order[0]]
    return align - alpha * (k_all - 1) ** 2 * best if variant == "authors" else -best + alpha * align


def plain_nn(logps, ref_logps, logp_l, ref_pos_logp_l, gamma=0.1, alpha=0.1):
    return soft(gamma * (logps - ref_logps).mean() - alpha * (logp_l - ref_pos_logp_l))


PLAIN = {"lipo": plain_lipo, "plackett_luce": plain_plackett_luce, "rrhf": plain_rrhf, "pro": plain_pro, "nn": plain_nn}
SIZES = (5, 4, 2, 3)


def random_columns(name: str, sizes: tuple[int, ...] = SIZES, ties: bool = False) -> dict[str, Tensor]:
    """Lists of these sizes, with holes, scores in [0, 1] that differ unless `ties`."""
    p, k = len(sizes), max(sizes)
    shuffled = torch.stack([torch.randperm(k, generator=torch.Generator().manual_seed(i)) for i in range(p)])
    logps = -normal(p, k, seed=1).abs() * 8 - 0.1
    given = {
        "logps": logps,
        "ref_logps": logps + 3 * normal(p, k, seed=2),
        "lens": torch.randint(1, 9, (p, k), generator=torch.Generator().manual_seed(3)).double(),
        "scores": (shuffled // 2 if ties else shuffled).double() / k,
        "logp_l": -normal(p, seed=4).abs() * 8,
        "ref_pos_logp_l": -normal(p, seed=5).abs() * 8,
        "mask": shuffled.flip(1) < torch.tensor(sizes)[:, None],
    }
    return {n: given[n] for n in xf.METHODS[name].inputs if n in given}


def plainly(name: str, given: dict[str, Tensor], **hyper) -> Tensor:
    rows = [
        {k: v[i][given["mask"][i]] if v.dim() == 2 else v[i] for k, v in given.items() if k != "mask"}
        for i in range(len(given["mask"]))
    ]
    return torch.stack([PLAIN[name](**row, **hyper) for row in rows])


VARIANTS = [
    *(("lipo", {"kind": kind, "beta": beta}) for kind in KINDS for beta in (0.1, 0.7)),
    ("plackett_luce", {}),
    ("plackett_luce", {"beta": 0.7}),
    ("rrhf", {}),
    ("rrhf", {"lam_sft": 0.0}),
    *(("pro", {"temperature": t, "variant": v}) for t in (True, False) for v in ("authors", "survey")),
    ("pro", {"alpha": 2.0}),
    ("nn", {}),
    ("nn", {"gamma": 2.0, "alpha": 0.3}),
]
variants = pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=[f"{n}-{h}" for n, h in VARIANTS])
TIES_ARE_NOTHING = ("lambda", "pair_logistic", "pair_hinge", "point_mse", "point_sigmoid", "softmax")


@variants
def test_agrees_with_the_plain_equation(name, hyper):
    given = random_columns(name)
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in LEARNT}
    expected = plainly(name, {**given, **leaves}, **hyper)
    losses, found = run(name, given, **hyper)
    assert_close(losses, expected)
    assert_close(found, gradients(expected, leaves))
    if "mask" in given:
        assert (found["logps"][~given["mask"]] == 0).all()


@pytest.mark.parametrize("kind", TIES_ARE_NOTHING)
def test_tied_scores_are_not_compared(kind):
    given = random_columns("lipo", ties=True)
    leaf = given["logps"].requires_grad_()
    expected = plainly("lipo", given, kind=kind)
    losses = xf.METHODS["lipo"](**given, kind=kind)[0]
    assert_close(losses, expected)
    assert_close(torch.autograd.grad(losses.sum(), leaf), torch.autograd.grad(expected.sum(), leaf))


@variants
def test_gradcheck(name, hyper):
    given = random_columns(name)
    names = [k for k in given if k in LEARNT]

    def method(*tensors):
        return xf.METHODS[name](**{**given, **dict(zip(names, tensors, strict=True))}, **hyper)[0]

    assert torch.autograd.gradcheck(method, [given[k].clone().requires_grad_() for k in names])


@variants
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 0.0], ids=str)
def test_what_stands_outside_the_mask_is_nothing(name, hyper, junk):
    clean = random_columns(name)
    dirty = {k: v.masked_fill(~clean["mask"], junk) if v.dim() == 2 and k != "mask" else v for k, v in clean.items()}
    losses, found = run(name, dirty, **hyper)
    expected, expected_gradients = run(name, clean, **hyper)
    assert_close(losses, expected)
    assert_close(found, expected_gradients)
    assert (found["logps"][~clean["mask"]] == 0).all()
    _, metrics = xf.METHODS[name](**dirty, **hyper)
    assert all(v.isfinite().all() for v in metrics.values())


@variants
def test_no_list_looks_at_another_and_none_is_legal(name, hyper):
    given = random_columns(name)
    losses, _ = run(name, given, **hyper)
    for i in range(len(losses)):
        assert_close(run(name, {k: v[i : i + 1] for k, v in given.items()}, **hyper)[0], losses[i : i + 1])
    losses, found = run(name, {k: v[:0] for k, v in given.items()}, **hyper)
    assert losses.shape == (0,) and losses.requires_grad and len(found["logps"]) == 0


@variants
def test_a_full_mask_is_no_mask(name, hyper):
    given = random_columns(name, (4, 4))
    without = {k: v for k, v in given.items() if k != "mask"}
    assert_close(run(name, given | {"mask": torch.ones(2, 4).bool()}, **hyper), run(name, without, **hyper))


@pytest.mark.parametrize(("name", "hyper"), [v for v in VARIANTS if v[0] != "nn"], ids=str)
def test_the_order_of_a_list_does_not_matter(name, hyper):
    given = random_columns(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {k: v[:, order] for k, v in given.items()}
    losses, found = run(name, given, **hyper)
    moved, moved_gradients = run(name, shuffled, **hyper)
    assert_close(moved, losses)
    assert_close(moved_gradients["logps"], found["logps"][:, order])


@pytest.mark.parametrize(("name", "hyper"), [v for v in VARIANTS if v[0] != "nn"], ids=str)
@pytest.mark.parametrize("how", ["K = 1", "masked to one", "masked to none"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_list_of_one_has_nothing_to_say(name, hyper, how, dtype):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in random_columns(name, (3, 3)).items()}
    given["mask"] = torch.zeros(2, 3).bool()
    if how == "K = 1":
        given = {k: v[:, :1] for k, v in given.items() if k != "mask"}
    elif how == "masked to one":
        given["mask"][:, 1] = True
    losses, found = run(name, given, **hyper)
    assert losses.tolist() == [0.0, 0.0] and losses.requires_grad and not found["logps"].any()


# --- What the papers say ---


def dpo_columns(given: dict[str, Tensor]) -> dict[str, Tensor]:
    order = given["scores"].argsort(1, descending=True)
    w, ell = ({k: given[k].gather(1, order)[:, i] for k in ("logps", "ref_logps")} for i in (0, 1))
    return {
        **{"logp_w": w["logps"], "ref_logp_w": w["ref_logps"]},
        **{"logp_l": ell["logps"], "ref_logp_l": ell["ref_logps"]},
    }


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(
    ("name", "hyper"),
    [("plackett_luce", {}), ("lipo", {"kind": "list_mle"}), ("lipo", {"kind": "pair_logistic"})],
    ids=str,
)
def test_two_completions_are_dpo(name, hyper, beta):
    given = random_columns(name, (2,) * 6)
    given.pop("mask")
    dpo, _ = xf.METHODS["dpo"](**dpo_columns(given), beta=beta)
    assert_close(run(name, given, beta=beta, **hyper)[0], dpo)
    hinge, _ = xf.METHODS["rso"](**dpo_columns(given), beta=beta)
    assert_close(run("lipo", given, beta=beta, kind="pair_hinge")[0], hinge)


def test_list_mle_is_plackett_luce():
    given = random_columns("lipo")
    assert_close(run("lipo", given, kind="list_mle"), run("plackett_luce", given))


def test_plackett_luce_is_a_distribution_over_orders():
    k = 4
    s = normal(1, k, seed=1)
    total = 0.0
    for order in itertools.permutations(range(k)):
        scores = torch.tensor([order], dtype=F64)
        given = {"logps": s, "ref_logps": torch.zeros_like(s), "scores": scores}
        total += math.exp(-run("plackett_luce", given, beta=1.3)[0].item())
    assert total == pytest.approx(1, abs=1e-12)


def test_a_list_knows_only_differences_of_log_ratios():
    for kind in ("lambda", "pair_logistic", "pair_hinge", "softmax", "list_mle"):
        given = random_columns("lipo")
        moved = given | {"logps": given["logps"] + torch.arange(4)[:, None] * 1.5}
        assert_close(run("lipo", moved, kind=kind)[0], run("lipo", given, kind=kind)[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_lambda_trains_at_the_reference(dtype):
    scores = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]], dtype=dtype)
    at = torch.full_like(scores, -7.0)
    losses, found = run("lipo", {"logps": at, "ref_logps": at, "scores": scores})
    # every order of the ranks that the equal s could have
    for row, loss in zip(scores.tolist(), losses.tolist()):
        possible = [
            sum(
                abs(2 ** row[i] - 2 ** row[j]) * abs(1 / math.log(1 + t[i]) - 1 / math.log(1 + t[j])) * math.log(2)
                for i, j in better(row)
            )
            for t in itertools.permutations((1, 2, 3))
        ]
        assert any(loss == pytest.approx(p, rel=1e-6) for p in possible)
    best, worst = scores.argmax(1, keepdim=True), scores.argmin(1, keepdim=True)
    assert (found["logps"].gather(1, best) < 0).all() and (found["logps"].gather(1, worst) > 0).all()


def test_lambda_weighs_the_top_and_the_gap():
    given = {"logps": torch.tensor([[-1.0, -2.0, -3.0]]).double(), "ref_logps": torch.zeros(1, 3).double()}
    losses, found = run("lipo", given | {"scores": torch.tensor([[0.0, 1.0, 0.0]]).double()})
    above, _, below = found["logps"][0].tolist()  # ranks 1 and 2 weigh 0.532456, ranks 2 and 3 0.188892
    assert above == pytest.approx(0.1 * 0.532456 / (1 + math.exp(-0.1)), rel=1e-5)
    assert below == pytest.approx(0.1 * 0.188892 / (1 + math.exp(0.1)), rel=1e-5)
    wider = run("lipo", given | {"scores": torch.tensor([[0.0, 2.0, 0.0]]).double()})[0]
    assert_close(wider, 3 * losses)  # 2^2 - 1 against 2^1 - 1


def test_softmax_takes_the_scores_as_given():
    given = random_columns("lipo")
    doubled = given | {"scores": 2 * given["scores"]}
    assert_close(run("lipo", doubled, kind="softmax")[0], 2 * run("lipo", given, kind="softmax")[0])


def test_rrhf_divides_by_the_completions_own_length():
    given = {k: v for k, v in columns("rrhf").items() if k != "mask"}
    losses, _ = run("rrhf", given | {"lens": given["lens"] * 2}, lam_sft=0.0)
    assert_close(losses, run("rrhf", given, lam_sft=0.0)[0] / 2)
    # the same completions in a wider, padded list: what a padded length would change
    wide = {k: torch.cat([v, v[:, :2]], 1) for k, v in given.items()}
    wide["mask"] = torch.tensor([[True] * 3 + [False] * 2] * 2)
    assert_close(run("rrhf", wide)[0], run("rrhf", given)[0])


def test_rrhf_of_a_list_in_order_is_its_likelihood():
    given = {"logps": torch.tensor([[-4.0, -9.0, -12.0]]), "lens": torch.tensor([[4, 6, 6]])}
    losses, found = run("rrhf", given | {"scores": torch.tensor([[3.0, 2.0, 1.0]])})
    assert losses.tolist() == [4.0] and found["logps"].tolist() == [[-1.0, 0.0, 0.0]]


def test_pros_temperature_pushes_away_what_is_far_below():
    given = {"logps": torch.full((2, 3), -6.0).double(), "lens": torch.full((2, 3), 3.0).double()}
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, -3.0]]).double()
    flat, flat_gradients = run("pro", given | {"scores": scores}, alpha=0.0, temperature=False)
    assert_close(flat[0], flat[1])
    assert_close(flat_gradients["logps"][0], flat_gradients["logps"][1])
    _, found = run("pro", given | {"scores": scores}, alpha=0.0)
    assert (found["logps"][:, 2] > found["logps"][:, 0]).all()
    # scores a distance of 1 apart with one negative a task: S52 is S51
    two = {k: v[:, :2] for k, v in (given | {"scores": scores}).items()}
    assert_close(run("pro", two), run("pro", two, temperature=False))


def test_pros_variants_weigh_the_same_two_terms():
    given = random_columns("pro")
    align = run("pro", given, alpha=0.0)[0]
    likelihood = run("pro", given, alpha=0.0, variant="survey")[0]
    k = given["mask"].sum(1)
    assert_close(run("pro", given, alpha=0.3)[0], align + 0.3 * (k - 1) ** 2 * likelihood)
    assert_close(run("pro", given, alpha=0.3, variant="survey")[0], likelihood + 0.3 * align)


def test_nn_of_one_sample_is_dpo_with_two_references():
    given = {k: v[:, :1] if v.dim() == 2 else v for k, v in columns("nn").items()}
    pair = {"logp_w": given["logps"][:, 0], "ref_logp_w": given["ref_logps"][:, 0]}
    pair |= {"logp_l": given["logp_l"], "ref_logp_l": given["ref_pos_logp_l"]}
    assert_close(run("nn", given, gamma=0.3, alpha=0.3)[0], xf.METHODS["dpo"](**pair, beta=0.3)[0])


def test_nn_at_its_references_is_ln_2_and_pushes_only_the_rejected_down():
    given = columns("nn")
    given |= {"ref_logps": given["logps"], "ref_pos_logp_l": given["logp_l"]}
    losses, found = run("nn", given)
    assert_close(losses, torch.full((2,), math.log(2), dtype=F64))
    assert_close(found["logp_l"], torch.full((2,), 0.05, dtype=F64))  # alpha / 2
    assert_close(found["logps"], torch.full((2, 3), -0.05 / 3, dtype=F64))  # gamma / 2K


# --- Extremes ---

# Log-ratios of 0 and +-50; a hopeless and a sure completion; ties; all sure; scores that tie.
LOW, SURE = -2000.0, -1e-7
FAR = {
    "logps": [[LOW, SURE, -3], [-50, SURE, LOW], [SURE] * 3, [LOW] * 3, [SURE, -50, -3]],
    "ref_logps": [[-1950, -50, -3], [SURE, -50, LOW], [SURE] * 3, [-1950] * 3, [-50, SURE, -3]],
    "lens": [[400.0, 1, 1], [1, 1, 1], [1, 100, 1], [1, 400, 1], [1, 1, 3]],
    "scores": [[1.0, 0, 0.5], [0, 0.5, 1], [1, 0.5, 0], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]],
    "logp_l": [-2000.0, -1e-7, -3.0, -50.0, -1e-7],
    "ref_pos_logp_l": [-1.0, -2000.0, -3.0, -1e-7, -50.0],
}


@variants
@pytest.mark.parametrize("scale", [1.0, 1e-6, 100.0])
def test_extremes_are_finite_and_exact(name, hyper, scale):
    source = {k: torch.tensor(FAR[k]) for k in xf.METHODS[name].inputs if k in FAR}
    if "scores" in source and hyper.get("kind") not in ("lambda", "point_sigmoid"):
        source["scores"] = source["scores"] * scale  # scores close together, and far apart
    hyper = {**hyper, **({"beta": 1.0} if "beta" in hyper else {})}
    losses, found = run(name, source, **hyper)
    expected, exact = run(name, {k: v.double() for k, v in source.items()}, **hyper)
    assert expected.isfinite().all() and all(g.isfinite().all() for g in exact.values())
    assert_close(losses, expected.float(), rtol=1e-5, atol=1e-6)
    for key, value in found.items():
        assert_close(value, exact[key].float(), rtol=1e-3, atol=1e-6 * max(scale, 1))


@pytest.mark.parametrize(("name", "hyper"), [v for v in VARIANTS if v[0] != "nn"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_scores_that_all_tie_are_finite(name, hyper, dtype):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in random_columns(name).items()}
    given["scores"] = torch.full_like(given["scores"], 0.5)
    losses, found = run(name, given, **hyper)
    assert losses.isfinite().all() and found["logps"].isfinite().all()
    if hyper.get("kind") in ("lambda", "pair_logistic", "pair_hinge"):
        assert not losses.any() and not found["logps"].any()
    if name == "pro" and hyper.get("temperature"):  # infinitely warm: what is left is a constant and the likelihood
        _, plain = run(name, given, **{**hyper, "alpha": 0.0})
        assert (plain["logps"].ne(0).sum(1) <= (hyper["variant"] == "survey")).all()


def test_nn_without_a_sample_is_finite():
    given = columns("nn") | {"mask": torch.zeros(2, 3).bool()}
    losses, found = run("nn", given)
    assert losses.isfinite().all() and found["logp_l"].isfinite().all() and not found["logps"].any()


# --- Errors ---


@pytest.mark.parametrize(("name", "key"), [(n, k) for n in NAMES for k in xf.METHODS[n].required])
def test_missing_column_is_named(name, key):
    given = {k: v for k, v in columns(name).items() if k != key}
    with pytest.raises(ValueError, match=rf"missing {key}\b"):
        xf.METHODS[name](**given)


OUT_OF_RANGE = [
    *((n, "beta", b) for n in ("lipo", "plackett_luce") for b in (-0.1, math.nan)),
    *(("rrhf", "lam_sft", x) for x in (-0.1, math.nan)),
    *(("pro", "alpha", x) for x in (-0.1, math.nan)),
    *(("nn", k, -0.1) for k in ("gamma", "alpha")),
    ("lipo", "kind", "ndcg"),
    ("pro", "variant", "trl"),
]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyperparameter_out_of_range(name, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        xf.METHODS[name](**columns(name), **{key: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(("name", "hyper"), [v for v in VARIANTS if v[0] != "nn"], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_with_its_row(name, hyper, bad):
    given = random_columns(name)
    given["scores"][2, given["mask"][2].nonzero()[0]] = bad
    with pytest.raises(ValueError, match=r"scores.*2"):
        xf.METHODS[name](**given, **hyper)


@pytest.mark.parametrize("bad", [-0.25, 1.5])
def test_point_sigmoid_takes_probabilities(bad):
    given = columns("lipo", scores=[[0.5, 1.0, 0.0], [0.5, bad, 7.0]])
    with pytest.raises(ValueError, match=r"scores.*1"):
        xf.METHODS["lipo"](**given, kind="point_sigmoid")
    xf.METHODS["lipo"](**given, kind="point_mse")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_match(name):
    given = columns(name)
    for key, value in given.items():
        with pytest.raises(ValueError, match=key):
            xf.METHODS[name](**given | {key: value[:1]})
        if value.dim() == 2:
            with pytest.raises(ValueError, match=key):
                xf.METHODS[name](**given | {key: value[:, :2]})


# --- What a method says about itself ---

DEFAULTS = {
    "lipo": {"beta": 0.1, "kind": "lambda"},
    "plackett_luce": {"beta": 0.1},
    "rrhf": {"lam_sft": 1},
    "pro": {"alpha": 0.05, "temperature": True, "variant": "authors"},
    "nn": {"gamma": 0.1, "alpha": 0.1},
}
HUMAN = "Preference Human List"
TABLE = {  # rows of the survey's Table 1
    "lipo": f"Implicit Point Response Positive {HUMAN} Reference Uncontrol KL Off Offline Separate",
    "rrhf": f"- - - - {HUMAN} Free Uncontrol - Off Offline Merge",
    "pro": f"Explicit Point Response Positive {HUMAN} Free Uncontrol - Off Offline Merge",
    "nn": "Implicit Point Response Negative - Human - Reference Uncontrol KL On Offline Separate",
}


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_card(name):
    method = xf.METHODS[name]
    assert method.defaults == DEFAULTS[name]
    assert (method.layout, method.unit, method.denominator) == ("listwise", "list", "units")
    assert method.card.paper and method.card.equation and "=" in method.__doc__
    if name in TABLE:
        assert list(method.card.attributes.values()) == TABLE[name].split()
