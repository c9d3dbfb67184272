"""What the methods on single rows compute: literal values, plain equations, the papers' claims, peers, errors.

Literal values were worked out by hand from the equations with 30-digit arithmetic; the line above each one
gives the steps. "S n" is equation n of the survey.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import peers
import xpo_fast as xf
from inputs import (
    COLUMNS,
    EVERY_PATH,
    WITH_GRADIENT,
    columns,
    f64,
    losses_and_gradients,
    losses_of,
    sigmoid,
    softplus,
    tensor,
)
from xpo_fast.methods.unpaired import bco_state, kto_kl

LITERALS = [
    # S32-34: 1 - s(0.05), 1 - s(0.25), 1 - s(1.35), 1 - s(0.35)
    ("kto", {}, [0.487502603516, 0.437823499114, 0.205870371801, 0.413382421083]),
    # 2 and 3 times those
    ("kto", {"lambda_d": 2, "lambda_u": 3}, [0.975005207032, 1.31347049734, 0.411740743602, 1.24014726325]),
    # 1 - s(0.25), 1 - s(1.25), 1 - s(6.75), 1 - s(1.75)
    ("kto", {"beta": 0.5}, [0.437823499114, 0.222700138825, 0.00116951026505, 0.148047198032]),
    # S38, S39: e = reward - value - (2, -1, 15, -2) = (-1.25, -0.5, -13.25, 1); half e^2 twice
    ("dro", {}, [1.5625, 0.25, 175.5625, 1.0]),
    # S37: half e^2
    ("dro", {"variant": "square"}, [0.78125, 0.125, 87.78125, 0.5]),
    # e = (0.75, -1.5, 1.75, -1) - (1, -0.5, 7.5, -1) = (-0.25, -1, -5.75, 0); half e^2 / 0.5 and half e^2 = 1.5 e^2
    ("dro", {"beta": 0.5}, [0.09375, 1.5, 49.59375, 0.0]),
    ("dro", {"beta": 0.5, "variant": "square"}, [0.03125, 0.5, 16.53125, 0.0]),
    # 0.1 * (2, -1, 15, -2) - 0.3 = (-0.1, -0.4, 1.2, -0.5), the sign turned for the undesirable: log(1 + e^0.1),
    # log(1 + e^-0.4), log(1 + e^-1.2), log(1 + e^-0.5)
    ("bco", {}, [0.744396660074, 0.5130152524, 0.263282467338, 0.47407698418]),
    # 1 - s(0.2), s(-0.1), 1 - s(1.5), s(-0.2)
    ("apo_zero_unpaired", {}, [0.450166002688, 0.475020812521, 0.182425523806, 0.450166002688]),
    # twice the first and third, three times the others
    (
        "apo_zero_unpaired",
        {"lambda_d": 2, "lambda_u": 3},
        [0.900332005376, 1.425062437563, 0.364851047612, 1.350498008064],
    ),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), LITERALS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-10)], ids=str)
def test_literal(name, hyper, expected, dtype, rtol):
    losses = losses_of(name, columns(name, dtype), **hyper)
    assert_close(losses, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol / 10)


def test_every_method_has_a_literal():
    assert {n for n in xf.METHODS if xf.METHODS[n].layout == "unpaired"} <= {name for name, *_ in LITERALS}


# --- The equations, as plainly as they can be written, on drawn rows: values and gradients ---


def log_ratio(c):
    return c.logp - c.ref_logp


def kto(c, p):
    z = p.beta * (log_ratio(c) - c.kl)
    value = torch.where(c.desirable, p.lambda_d * sigmoid(z), p.lambda_u * sigmoid(-z))
    return torch.where(c.desirable, p.lambda_d, p.lambda_u) - value


def dro(c, p):
    if p.variant == "square":
        return (c.reward - c.value - p.beta * log_ratio(c)) ** 2 / 2
    policy = (c.reward - c.value.detach() - p.beta * log_ratio(c)) ** 2 / (2 * p.beta)
    return policy + (c.reward - c.value - p.beta * log_ratio(c).detach()) ** 2 / 2


def bco(c, p):
    z = p.beta * log_ratio(c) - c.delta
    return softplus(torch.where(c.desirable, -z, z))


def apo_zero_unpaired(c, p):
    q = sigmoid(p.beta * log_ratio(c))
    return torch.where(c.desirable, p.lambda_d * (1 - q), p.lambda_u * q)


PLAIN = {"kto": kto, "dro": dro, "bco": bco, "apo_zero_unpaired": apo_zero_unpaired}


@pytest.mark.parametrize(("name", "hyper"), [p for p in EVERY_PATH if p[0] in PLAIN])
def test_is_the_plain_equation(name, hyper):
    given = columns(name, units=64, seed=1)
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in WITH_GRADIENT}
    inputs, settings = SimpleNamespace(**{**given, **leaves}), {**xf.METHODS[name].defaults, **hyper}
    expected = PLAIN[name](inputs, SimpleNamespace(**settings))
    losses, gradients = losses_and_gradients(name, given, **hyper)
    assert_close(losses, expected.detach(), rtol=1e-9, atol=1e-11)
    their_gradients = torch.autograd.grad(expected.sum(), tuple(leaves.values()))
    for (key, gradient), theirs in zip(gradients.items(), their_gradients, strict=True):
        assert_close(gradient, theirs, rtol=1e-8, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


# --- What the papers prove ---


def of_ratio(name, ratio, desirable):
    """Rows of method `name` with these log-ratios, all desirable or none."""
    given = columns(name) | {"logp": ratio - 7, "ref_logp": torch.full_like(ratio, -7)}
    return given | {"desirable": torch.full(ratio.shape, desirable)}


def test_kto_mirrors_weighs_and_saturates():
    ratio = f64(-4000, -60, -2, 0, 1.5, 3, 60, 4000)
    up, down = of_ratio("kto", ratio, True), of_ratio("kto", ratio, False)
    (good, d_good), (bad, d_bad) = losses_and_gradients("kto", up), losses_and_gradients("kto", down)
    assert_close(good + bad, torch.ones_like(good))  # 1 - s(x) + 1 - s(-x)
    assert_close(d_good["logp"], -d_bad["logp"])
    assert good[4] == bad[4] == 0.5  # at the reference point
    assert_close(losses_of("kto", up, lambda_d=3.0, lambda_u=5.0), 3 * good)
    assert_close(losses_of("kto", down, lambda_d=3.0, lambda_u=5.0), 5 * bad)
    assert ((good >= 0) & (good <= 1)).all() and (d_good["logp"][1:-1] < 0).all()
    assert d_good["logp"][[0, -1]].abs().max() < 1e-12


def test_kto_kl_is_the_mean_log_ratio_not_below_zero():
    given = columns("kto")
    kl = kto_kl(given["logp"].requires_grad_(), given["ref_logp"])  # (2 - 1 + 15 - 2) / 4
    assert kl.shape == () and not kl.requires_grad and kl.item() == pytest.approx(3.5)
    assert kto_kl(given["ref_logp"], given["logp"]).item() == 0
    assert kto_kl(given["logp"][:2], given["ref_logp"][:2]).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="row"):
        kto_kl(given["logp"][:1], given["ref_logp"][:1])


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_dro_gradients_are_the_papers(beta):
    # S38: -[(r - V) grad log pi - beta/2 grad (log-ratio)^2]; S39: [V - r + beta log-ratio] grad V
    given = columns("dro")
    ratio = f64(2, -1, 15, -2)
    policy = -((given["reward"] - given["value"]) - beta * ratio)
    value = given["value"] - given["reward"] + beta * ratio
    _, gradients = losses_and_gradients("dro", given, beta=beta)
    assert_close(gradients, {"logp": policy, "value": value})
    _, gradients = losses_and_gradients("dro", given, beta=beta, variant="square")  # of S37 itself
    assert_close(gradients, {"logp": beta * policy, "value": value})


@pytest.mark.parametrize("variant", ["split", "square"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_dro_rests_at_the_optimal_policy_and_value(variant, beta):
    # S35: pi = ref e^(r / beta) / e^(V / beta), V = beta log E_ref e^(r / beta); S36 holds there on every completion
    ref, reward = f64(0.4, 0.3, 0.2, 0.1), f64(1, -1, 0.5, 2)
    value = beta * torch.log((ref * torch.exp(reward / beta)).sum())
    policy = ref * torch.exp((reward - value) / beta)
    assert_close(policy.sum(), f64(1)[0])
    given = {"logp": policy.log(), "ref_logp": ref.log(), "reward": reward, "value": value.expand(4)}
    losses, gradients = losses_and_gradients("dro", given, beta=beta, variant=variant)
    for x in (losses, *gradients.values()):
        assert_close(x, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)
    for key in ("logp", "value"):  # and only there
        moved = given | {key: given[key] + 0.1}
        assert (losses_of("dro", moved, beta=beta, variant=variant) > 1e-5).all()


def test_dros_parts_are_equal_at_beta_one():
    assert_close(losses_of("dro"), 2 * losses_of("dro", variant="square"))


def test_bco_is_a_classifier_of_the_shifted_reward():
    ratio = f64(-4000, -60, -2, 0, 3, 60, 4000)
    up, down = of_ratio("bco", ratio, True), of_ratio("bco", ratio, False)
    (good, d_good), (bad, d_bad) = losses_and_gradients("bco", up), losses_and_gradients("bco", down)
    z = 0.1 * ratio - 0.3
    assert_close(bad - good, z)  # log(1 + e^z) - log(1 + e^-z)
    assert_close(d_bad["logp"] - d_good["logp"], torch.full_like(z, 0.1))
    assert (d_good["logp"] <= 0).all() and (d_bad["logp"] >= 0).all()
    # the reward shift halves each row's probability: at beta * log-ratio = delta the classifier is even
    assert_close(losses_of("bco", of_ratio("bco", f64(3.0), True)), f64(math.log(2)))
    assert_close(losses_of("bco", of_ratio("bco", f64(3.0), False)), f64(math.log(2)))


def test_bco_remembers_every_row_alike():
    mean, count = bco_state(f64(2, -1, 15).requires_grad_(), torch.ones(3).bool(), f64(0)[0], f64(0)[0])
    assert_close(torch.stack([mean, count]), f64(16 / 3, 3))
    assert not mean.requires_grad
    valid = torch.tensor([False, True])
    mean, count = bco_state(f64(math.nan, -2), valid, mean, count)  # (2 - 1 + 15 - 2) / 4
    assert_close(torch.stack([mean, count]), f64(3.5, 4))
    same = bco_state(f64(7, 7), ~valid & valid, mean, count)
    assert_close(torch.stack(same), f64(3.5, 4))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_apo_zero_unpaired_is_kto_with_the_reference_point_at_zero(beta):
    rows, kl = columns("apo_zero_unpaired"), {"kl": f64(0)[0]}
    for hyper in ({}, {"lambda_d": 1.5, "lambda_u": 2.5}):
        expected = losses_and_gradients("kto", rows | kl, beta=beta, **hyper)
        assert_close(losses_and_gradients("apo_zero_unpaired", rows, beta=beta, **hyper), expected)


def test_apo_zero_unpaired_is_bounded_and_pushes_both_ways():
    given = columns("apo_zero_unpaired", units=100)
    losses, gradients = losses_and_gradients("apo_zero_unpaired", given)
    assert ((losses > 0) & (losses < 1)).all()
    assert (gradients["logp"][given["desirable"]] < 0).all()
    assert (gradients["logp"][~given["desirable"]] > 0).all()
    assert (gradients["logp"].abs() <= 0.1 / 4).all()


def test_metrics_say_which_rows_are_which():
    # TRL's names; a row of the other kind is left out
    for name in ("kto", "bco", "apo_zero_unpaired"):
        _, metrics = xf.METHODS[name](**columns(name))
        for side, rows in (("chosen", [0, 2]), ("rejected", [1, 3])):
            value = metrics[f"rewards/{side}"]
            assert_close(value[rows], 0.1 * f64(2, -1, 15, -2)[rows])
            assert value.isnan().sum() == 2


# --- TRL 1.16 and Liger 0.8.5 ---


@pytest.fixture(scope="module")
def trl():
    return peers.trl()


PEERS = [
    ("kto", {}),
    ("kto", {"beta": 0.3, "lambda_d": 2.0}),
    ("apo_zero_unpaired", {}),
    ("apo_zero_unpaired", {"lambda_u": 2.0}),
]


@pytest.mark.parametrize(("name", "hyper"), PEERS)
def test_agrees_with_trl(trl, name, hyper):
    given = {k: tensor(v) for k, v in COLUMNS["unpaired"].items()}
    given["logp"].requires_grad_()
    theirs = {"beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0, **hyper}
    expected = peers.trl_kto(
        given,
        loss_type=name,
        beta=theirs["beta"],
        desirable_weight=theirs["lambda_d"],
        undesirable_weight=theirs["lambda_u"],
    )
    ours = losses_of(name, {k: given[k] for k in xf.METHODS[name].inputs}, **hyper).mean()
    assert_close(ours, expected)
    assert_close(torch.autograd.grad(ours, given["logp"]), torch.autograd.grad(expected, given["logp"]))


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])  # the latter is its KTO without a reference point
def test_agrees_with_liger(name):
    module = pytest.importorskip("liger_kernel.chunked_loss.kto_loss", reason="peers are an optional extra")
    given = columns(name)
    expected, *_ = module.LigerFusedLinearKTOFunction.preference_loss_fn(
        given["logp"],
        given["desirable"],
        torch.zeros(4, 1),  # targets, of which it reads the number of rows
        given["ref_logp"],
        beta=0.1,
        kl=given.get("kl"),
    )
    assert_close(losses_of(name, given).mean(), expected)


# --- Errors ---

OUT_OF_RANGE = [
    *(("kto", "lambda_d", -1.0), ("kto", "lambda_u", -1.0)),
    *(("apo_zero_unpaired", "lambda_d", -1.0), ("apo_zero_unpaired", "lambda_u", -1.0)),
    *(("dro", "beta", 0.0), ("dro", "variant", "joint")),
]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyperparameter_out_of_range(name, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        losses_of(name, **{key: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(("key", "rows"), [("lambda_d", [0, 2]), ("lambda_u", [1, 3])])
def test_a_weight_of_zero_silences_its_rows(name, key, rows):
    losses, whole = losses_of(name, **{key: 0.0}), losses_of(name)
    others = [i for i in range(4) if i not in rows]
    assert not losses[rows].any()
    assert_close(losses[others], whole[others])


@pytest.mark.parametrize(("name", "key"), [("kto", "kl"), ("bco", "delta")])
def test_the_reference_point_is_one_number(name, key):
    with pytest.raises(ValueError, match=key):
        losses_of(name, columns(name) | {key: torch.full((4,), 1.5).double()})


# --- What a method says about itself ---

SIGNATURES = {
    "kto": (("logp", "ref_logp", "desirable", "kl"), {"beta": 0.1, "lambda_d": 1, "lambda_u": 1}),
    "dro": (("logp", "ref_logp", "reward", "value"), {"beta": 1, "variant": "split"}),
    "bco": (("logp", "ref_logp", "desirable", "delta"), {"beta": 0.1}),
    "apo_zero_unpaired": (("logp", "ref_logp", "desirable"), {"beta": 0.1, "lambda_d": 1, "lambda_u": 1}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method, (inputs, defaults) = xf.METHODS[name], SIGNATURES[name]
    assert set(method.inputs) == set(method.required) == set(inputs) and method.defaults == defaults
    assert method.layout == "unpaired" and method.needs_reference
    assert method.unit == ("batch" if name == "bco" else "row")  # delta follows the batch
