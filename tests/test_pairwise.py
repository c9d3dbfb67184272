"""What the methods on pairs compute: literal values, plain equations, the papers' claims, peers, extremes, errors.

Literal values were worked out by hand from the equations with 30-digit arithmetic; the line above each one
gives the steps. "S n" is equation n of the survey.
"""

import itertools
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
    EXTREME,
    LN2,
    WITH_GRADIENT,
    columns,
    f64,
    losses_and_gradients,
    losses_of,
    sigmoid,
    softplus,
    swapped,
    tensor,
)
from xpo_fast.methods.pairwise import beta_dpo_state

LITERALS = [
    # h = 0.1 * (4, -3, 13) = (0.4, -0.3, 1.3); log(1 + e^-h)
    ("dpo", {}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # h = (1.2, -0.9, 3.9)
    ("dpo", {"beta": 0.3}, [0.263282467338, 1.24115387473, 0.0200397672604]),
    # S12: log(1 + e^-h) + 0.1 h, since -log s(-h) = h - log s(h): 0.513015 + 0.04, 0.854355 - 0.03, ...
    ("dpo", {"label_smoothing": 0.1}, [0.5530152524, 0.824355244469, 0.371008453833]),
    # S62 and S24: DPO's
    ("dno", {}, [0.5130152524, 0.854355244469, 0.241008453833]),
    ("token_dpo", {}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # [(1 - 2e) log(1 + e^-h) - e h] / (1 - 2e) = log(1 + e^-h) - h e / (1 - 2e); e = 0.1: minus h / 8
    ("robust_dpo", {}, [0.4630152524, 0.891855244469, 0.078508453833]),
    # e = 0.25: minus h / 2
    ("robust_dpo", {"label_smoothing": 0.25}, [0.3130152524, 1.00435524447, -0.408991546167]),
    # beta_batch = 0.1 (1 + 0.6 (14/3 - 4)) = 0.14: h = (0.56, -0.42, 1.82)
    ("beta_dpo", {"keep": 1.0}, [0.451845427344, 0.925036993818, 0.150164819057]),
    # 0.01 (1 + 3 (14/3 - 10)) < 0, so 0.001: h = (0.004, -0.003, 0.013)
    (
        "beta_dpo",
        {"keep": 1.0, "beta": 0.01, "alpha": 3.0, "m0": 10.0},
        [0.691149180559, 0.69464830556, 0.686668305411],
    ),
    # target 1 / (2 * 0.1) = 5; (2/5 + 2/4 - 5)^2 = 4.1^2, (-1/2 - 2/4 - 5)^2 = 6^2, (15/8 - 2/5 - 5)^2
    ("ipo", {}, [16.81, 36.0, 12.425625]),
    # S17 as printed: (4 - 5)^2, (-3 - 5)^2, (13 - 5)^2
    ("ipo", {"variant": "sum"}, [1.0, 64.0, 64.0]),
    # target 1: (0.9 - 1)^2, (-1 - 1)^2, (1.475 - 1)^2
    ("ipo", {"beta": 0.5}, [0.01, 4.0, 0.225625]),
    # S18 of h = (0.4, -0.3, 1.3): log(1 + e^-h)
    ("gpo", {}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # 1 - h, not below 0
    ("gpo", {"f": "hinge"}, [0.6, 1.3, 0.0]),
    # (-0.6)^2, (-1.3)^2, 0.3^2
    ("gpo", {"f": "squared"}, [0.36, 1.69, 0.09]),
    # e^-0.4, e^0.3, e^-1.3
    ("gpo", {"f": "exponential"}, [0.670320046036, 1.34985880758, 0.272531793034]),
    # 0.6^2, 1.3^2, 0
    ("gpo", {"f": "truncated_quadratic"}, [0.36, 1.69, 0.0]),
    # s(-h)^2 = 0.4013123^2, 0.5744425^2, 0.2141650^2
    ("gpo", {"f": "savage"}, [0.161051594146, 0.329984205121, 0.0458666544884]),
    # h - log(2, 0.5, 0.25) = (-0.2931472, 0.3931472, 2.6862944)
    ("odpo", {}, [0.850424435584, 0.515771017397, 0.0659122161787]),
    # h - half of those logarithms = (0.0534264, 0.0465736, 1.9931472)
    ("odpo", {"alpha": 0.5}, [0.66679073093, 0.670131498332, 0.127747356746]),
    # h - (2, 0.5, 0.25) = (-1.6, -0.8, 1.05)
    ("odpo", {"offset": "identity"}, [1.78390074089, 1.17110066595, 0.300058479618]),
    # h + 0.01 * (1, -2, 3) = (0.41, -0.32, 1.33)
    ("rdpo", {}, [0.509014134091, 0.86589293718, 0.234658804601]),
    # h + 0.1 * (1, -2, 3) = (0.5, -0.5, 1.6)
    ("rdpo", {"alpha": 0.1}, [0.47407698418, 0.97407698418, 0.183900740888]),
    # S46 as printed: (0.39, -0.28, 1.27)
    ("rdpo", {"variant": "survey"}, [0.517040396695, 0.84291533356, 0.247509571479]),
    # S47: z = 2 * (-2 + 3.75, -3.5 + 2.25, -3.75 + 8) - 1 = (2.5, -3.5, 7.5); log(1 + e^-z)
    ("simpo", {}, [0.0788897342925, 3.52975041827, 0.000552931475361]),
    # + 0.2 z
    ("simpo", {"label_smoothing": 0.2}, [0.578889734293, 2.82975041827, 1.50055293148]),
    # gamma = 0.4 * 2.5 = 1: z = 2.5 * (1.75, -1.25, 4.25) - 1 = (3.375, -4.125, 9.625)
    ("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.4}, [0.033645699983, 4.14103425608, 6.60543263936e-5]),
    # S42: log-odds m - log(1 - e^m) of the means: chosen (-1.854586542, -3.469337284, -3.726201298), rejected
    # (-3.726201298, -2.138622279, -7.999664481), so 2 + 0.1 * 0.1431258, 3.5 + 0.1 * 1.5652243, 3.75 + ...
    ("orpo", {}, [2.01431258351, 3.65652243018, 3.75138372673]),
    ("orpo", {"lam": 1.0}, [2.14312583511, 5.06522430183, 3.76383726735]),
    # S54: h = 0.1 * (5, 2, 10); log(1 + e^-h) = (0.4740770, 0.5981389, 0.3132617), plus 10, 7, 30
    ("cpo", {}, [10.4740769842, 7.59813886938, 30.3132616875]),
    # plus 2, 3.5, 3.75
    ("cpo", {"nll": "mean"}, [2.47407698418, 4.09813886938, 4.06326168752]),
    # + 0.1 h + 5, 3.5, 15
    ("cpo", {"alpha": 0.5, "label_smoothing": 0.1}, [5.52407698418, 4.11813886938, 15.4132616875]),
    # S61, targets (P - 1/2) / 0.001 = (400, -150, 500): 398^2 + 398^2, 149^2 + 148^2, 485^2 + 502^2
    ("sppo", {}, [316808.0, 44105.0, 487229.0]),
    # targets (0.8, -0.3, 1): 1.2^2 + 1.2^2, 0.7^2 + 1.7^2, 14^2 + 3^2
    ("sppo", {"beta": 0.5}, [2.88, 3.38, 205.0]),
    # target 500 throughout: 2 * 498^2, 501^2 + 502^2, 485^2 + 502^2
    ("sppo", {"variant": "hard"}, [496008.0, 503005.0, 487229.0]),
    # P / 0.5 = (1.8, 0.7, 2) and (0.2, 1.3, 0), log Z = log of the pair's mean e^(P / 0.5) = (1.2907536, 1.0443408,
    # 1.4337808): targets (0.5092464, -0.3443408, 0.5662192) and (-1.0907536, 0.2556592, -1.4337808)
    ("sppo", {"variant": "survey", "beta": 0.5}, [3.04907526569, 3.47261374761, 220.124879854]),
    # the larger of the two outweighs: log Z = max - log 2, targets log 2 = 0.6931472 and (-799.3068528, 0.6931472,
    # -999.3068528), the second pair's the other way round, -299.3068528
    ("sppo", {"variant": "survey"}, [635699.925417, 88988.6863033, 1002820.09954]),
    # S67, g = log u
    ("f_dpo", {}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # -e^-dw = (-0.1353353, -2.7182818, -3.06e-7), -e^-dl = (-7.3890561, -0.1353353, -0.1353353); 0.1 times the
    # difference is (0.7253721, -0.2582947, 0.0135335)
    ("f_dpo", {"divergence": "forward_kl"}, [0.394838440707, 0.830610943972, 0.686403325964]),
    # log 2 + log s: (0.5662192, -0.6201145, 0.6931469), (-1.4337808, 0.5662192, 0.5662192); 0.1 times the difference
    # is (0.2, -0.1186334, 0.0126928)
    ("f_dpo", {"divergence": "js"}, [0.598138869382, 0.754222068205, 0.686820933471]),
    # 2 (1 - e^(-d / 2)): (1.2642411, -1.2974425, 1.9988938), (-3.4365637, 1.2642411, 1.2642411)
    ("f_dpo", {"divergence": "alpha"}, [0.485478259476, 0.829411811581, 0.657089036482]),
    # 4 (1 - e^(-d / 4)): (1.5738774, -1.1361017, 3.9059290), (-2.5948851, 1.5738774, 1.5738774)
    ("f_dpo", {"divergence": "alpha", "alpha": 0.25}, [0.506276782973, 0.837798160944, 0.58332732993]),
    # the divergence itself
    ("context_distillation", {}, [0.5, 3.0, 1.25]),
    ("forward_kl", {}, [0.5, 3.0, 1.25]),
    ("reverse_kl", {}, [0.75, 2.0, 1.5]),
    ("gkd", {}, [0.25, 0.5, 0.125]),
    ("topk_kl", {}, [0.25, 1.5, 0.5]),
    # S28: h - 0.05 * (1.5, -2, 2.75) = (0.325, -0.2, 1.1625)
    ("tdpo", {}, [0.543792603978, 0.798138869382, 0.272088708621]),
    # beta = 0.3, alpha = 1: (1.2, -0.9, 3.9) - 0.3 * (1.5, -2, 2.75) = (0.75, -0.3, 3.075)
    ("tdpo", {"alpha": 1.0, "beta": 0.3}, [0.386871006115, 0.854355244469, 0.0451546382957]),
    # h - 0.1 * (1.5, -2, 2.75) = (0.25, -0.1, 1.025)
    ("tdpo", {"version": 1}, [0.575939419879, 0.744396660074, 0.306599356039]),
    # (2 / 0.1) log(1 + e^(0.1 * (-2, 2, 2))) = 20 * (0.5981389, 0.7981389, 0.7981389)
    ("npo", {}, [11.9627773876, 15.9627773876, 15.9627773876]),
    # 4 log(1 + e^-1), 4 log(1 + e)
    ("npo", {"beta": 0.5}, [1.25304675007, 5.25304675007, 5.25304675007]),
    # S29: sums of log(1 + e^d) over d = (1, -1, 0, 2), (0.5, 0.5, -2, 3), (4, -4, 1, 0, -1) = (4.4465986, 5.1236693,
    # 6.3559704); S30: g = s(-5), s(-2), s(-10) = (0.0066929, 0.1192029, 0.0000454) of 10 + 4.4465986, 7 + ..., 30 + ...
    ("cringe", {}, [0.0966889305695, 1.44517680988, 0.00165048357129]),
    # g = s((2 - 5) / 5), s(0), s(-8 / 5) = (0.3543437, 0.5, 0.1679816) of 10 + 2.2232993, 7 + 2.5618347, 30 + 3.1779852
    ("cringe", {"alpha": 0.5, "b": 2.0, "tau": 5.0}, [4.33124901816, 4.78091733274, 5.57329153286]),
    # q = s(h) = (0.5986877, 0.4255575, 0.7858350): q log(q / 0.999) + (1 - q) log((1 - q) / 0.001)
    ("exo", {}, [2.09922623323, 3.28651160896, 0.960762778746]),
    # q log(q / 0.9) + (1 - q) log((1 - q) / 0.1)
    ("exo", {"label_smoothing": 0.1}, [0.313593663692, 0.685517242438, 0.0565061786447]),
    # -log s(0.1 dw) = (0.5981389, 0.7443967, 0.2014133), half of -log s(-0.1 dw) = (0.7981389, 0.6443967, 1.7014133)
    # and half of -log s(-0.1 dl) = (0.5981389, 0.7981389, 0.7981389)
    ("nca", {}, [1.29627773876, 1.4656644248, 1.45118935166]),
    # the first of those and the last
    ("bco_pair", {}, [1.19627773876, 1.54253552946, 0.999552147364]),
    # margins logp_w - logp_l = (5, 2, 10), the reference's (1, 5, -3): sorted (2, 5, 10) less (-3, 1, 5) = (5, 4, 5),
    # of which the first pair has the 4: h = (0.4, 0.5, 0.5)
    ("aot", {}, [0.5130152524, 0.47407698418, 0.47407698418]),
    # + 0.1 h
    ("aot", {"label_smoothing": 0.1}, [0.5530152524, 0.52407698418, 0.52407698418]),
    # dw sorted (-1, 2, 15) less dl sorted (-2, 2, 2) = (1, 0, 13), in the order of dw (0, 1, 13)
    ("aot_unpaired", {}, [0.69314718056, 0.644396660074, 0.241008453833]),
    ("aot_unpaired", {"label_smoothing": 0.1}, [0.69314718056, 0.654396660074, 0.371008453833]),
    # 1 - s(0.2) + s(-0.2), 1 - s(-0.1) + s(0.2), 1 - s(1.5) + s(0.2)
    ("apo_zero", {}, [0.900332005375, 1.07481318479, 0.732259521119]),
    # s(0.2) + 1 - s(0.4), s(-0.1) + 1 - s(-0.3), s(1.5) + 1 - s(1.3)
    ("apo_down", {}, [0.9511463372, 1.04946332933, 1.03173949315]),
    # m = s(20 h) = s(8), s(-6), s(26) = (0.9996646, 0.0024726, 1): (1 - m) log(1 + e^-h) + m e^-h
    ("discopop", {}, [0.670267293853, 0.855580438053, 0.272531793034]),
    # m = s(h)
    ("discopop", {"tau": 1.0}, [0.607191691226, 1.0652204937, 0.265780596559]),
    # 0.1 * (2/5 + 2/4, -1/2 - 2/4, 15/8 - 2/5) = 0.1 * (0.9, -1, 1.475)
    ("dpo_norm", {}, [0.649159339026, 0.744396660074, 0.622114250096]),
    ("dpo_norm", {"beta": 2.0}, [0.152977610526, 2.12692801104, 0.0510159765895]),
    # S3: margins logp_w - logp_l = (5, 2, 10) are beyond delta = 1, which leaves 0.1 * (10, 7, 30)
    ("slic", {}, [1.0, 0.7, 3.0]),
    # 8 - (5, 2, 10), not below 0, = (3, 6, 0), plus (1, 0.7, 3)
    ("slic", {"delta": 8.0}, [4.0, 6.7, 3.0]),
    # ... plus 0.5 * (4, 5, 6) for a supervised completion of its own
    ("slic", {"delta": 8.0, "lam": 0.5, "logp_sft": COLUMNS["pairwise"]["logp_sft"]}, [5.0, 8.5, 3.0]),
    # 1 - (0.4, -0.3, 1.3), not below 0
    ("rso", {}, [0.6, 1.3, 0.0]),
    ("rso", {"loss": "sigmoid"}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # h = 0.3 * (4, -3, 13) = (1.2, -0.9, 3.9); the second pair has relu(-dw) = 1: -0.9 - 0.3 * 50 = -15.9
    ("dpop", {}, [0.263282467338, 15.9000001244, 0.0200397672604]),
    # lam = 2: -0.9 - 0.6 = -1.5
    ("dpop", {"lam": 2.0}, [0.263282467338, 1.70141327798, 0.0200397672604]),
    # S13: the penalty stands outside the sigmoid, 1.2411539 + 50 * 1
    ("dpop", {"variant": "survey"}, [0.263282467338, 51.2411538747, 0.0200397672604]),
    ("sft", {}, [10.0, 7.0, 30.0]),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), LITERALS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-10)], ids=str)
def test_literal(name, hyper, expected, dtype, rtol):
    given = columns(name, dtype) | {k: tensor(v, dtype) for k, v in hyper.items() if k in COLUMNS["pairwise"]}
    losses = losses_of(name, given, **{k: v for k, v in hyper.items() if k not in given})
    assert_close(losses, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol / 10)


# Two own completions a prompt: sums of their log-ratios (1 - 1, 2 + 0.5, 0 - 8); the rejected one's (-1, -1, 1).
NN = {
    "logps": [[-5.0, -8.0], [-6.0, -4.0], [-9.0, -20.0]],
    "ref_logps": [[-6.0, -7.0], [-8.0, -4.5], [-9.0, -12.0]],
    "logp_l": [-15.0, -9.0, -40.0],
    "ref_pos_logp_l": [-14.0, -8.0, -41.0],
}


@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        # S53: 0.05 * (0, 2.5, -8) - 0.1 * (-1, -1, 1) = (0.1, 0.225, -0.5)
        ({}, [0.644396660074, 0.58696200205, 0.97407698418]),
        # 0.25 * (0, 2.5, -8) - 0.2 * (-1, -1, 1) = (0.2, 0.825, -2.2)
        ({"gamma": 0.5, "alpha": 0.2}, [0.598138869382, 0.363416662127, 2.30508331977]),
    ],
)
def test_literal_nn(hyper, expected):
    assert_close(losses_of("nn", {k: tensor(v) for k, v in NN.items()}, **hyper), f64(*expected), rtol=1e-10, atol=0)


def test_every_method_has_a_literal():
    elsewhere = {"grm", "haf"}  # reward models beside a policy
    of_pairs = {n for n in xf.METHODS if xf.METHODS[n].layout == "pairwise"}
    assert of_pairs - elsewhere <= {name for name, *_ in LITERALS}


# --- The equations, as plainly as they can be written, on drawn pairs: values and gradients ---


def margin(c):
    return (c.logp_w - c.ref_logp_w) - (c.logp_l - c.ref_logp_l)


def smoothed(z, eps=0.0):
    """-(1 - eps) log s(z) - eps log s(-z)"""
    return (1 - eps) * softplus(-z) + eps * softplus(z)


def dpo(c, p):
    return smoothed(p.beta * margin(c), p.label_smoothing)


def beta_dpo(c, p):  # keep = 1: nothing is drawn
    beta = max(p.beta * (1 + p.alpha * (margin(c).detach().mean() - c.m0)), torch.tensor(1e-3))
    return softplus(-beta * margin(c))


def gpo(c, p):
    z = p.beta * margin(c)
    return {
        "logistic": lambda: softplus(-z),
        "hinge": lambda: (1 - z).clamp(min=0),
        "squared": lambda: (z - 1) ** 2,
        "exponential": lambda: 1 / torch.exp(z),
        "truncated_quadratic": lambda: torch.where(z < 1, (1 - z) ** 2, 0.0),
        "savage": lambda: 1 / (1 + torch.exp(z)) ** 2,
    }[p.f]()


def odpo(c, p):
    gap = c.score_w - c.score_l
    return softplus(p.alpha * (torch.log(gap) if p.offset == "log" else gap) - p.beta * margin(c))


def rdpo(c, p):
    sign = {"derived": 1, "survey": -1}[p.variant]
    return softplus(-(p.beta * margin(c) + sign * p.alpha * (c.len_w - c.len_l).double()))


def orpo(c, p):
    p_w, p_l = torch.exp(c.logp_w / c.len_w), torch.exp(c.logp_l / c.len_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -torch.log(p_w) - p.lam * torch.log(odds_ratio / (1 + odds_ratio))


def cpo(c, p):
    nll = c.logp_w / (c.len_w if p.nll == "mean" else 1)
    return smoothed(p.beta * (c.logp_w - c.logp_l), p.label_smoothing) - p.alpha * nll


def sppo(c, p):
    ratio_w, ratio_l = c.logp_w - c.ref_logp_w, c.logp_l - c.ref_logp_l
    prob = torch.ones_like(ratio_w) if p.variant == "hard" else c.prob_w
    target_w, target_l, log_z = prob / p.beta, (1 - prob) / p.beta, 0.5 / p.beta
    if p.variant == "survey":  # taken out of the exponentials, which overflow at beta = 0.001
        most = torch.maximum(target_w, target_l)
        log_z = most + torch.log((torch.exp(target_w - most) + torch.exp(target_l - most)) / 2)
    return (ratio_w - (target_w - log_z)) ** 2 + (ratio_l - (target_l - log_z)) ** 2


def f_prime(u, p):
    """f'(u) of S67, of the divergences below S63."""
    return {
        "reverse_kl": lambda: torch.log(u) + 1,  # f = u log u
        "forward_kl": lambda: -1 / u,  # f = -log u
        "js": lambda: torch.log(2 * u / (1 + u)),  # f = u log u - (u + 1) log((u + 1) / 2)
        # f = (u^(1 - a) - (1 - a) u - a) / (a (a - 1))
        "alpha": lambda: (1 - p.alpha) * (u**-p.alpha - 1) / (p.alpha * (p.alpha - 1)),
    }[p.divergence]()


def f_dpo(c, p):
    u_w, u_l = torch.exp(c.logp_w - c.ref_logp_w), torch.exp(c.logp_l - c.ref_logp_l)
    return softplus(-p.beta * (f_prime(u_w, p) - f_prime(u_l, p)))


def tdpo(c, p):
    if p.version == 1:
        return softplus(-(p.beta * margin(c) - p.beta * (c.kl_l - c.kl_w)))
    return softplus(-(p.beta * margin(c) - p.alpha * p.beta * (c.kl_l - c.kl_w.detach())))


def nn(c, p):
    reward = p.gamma * (c.mask * (c.logps - c.ref_logps)).sum(1) / c.mask.sum(1)
    return softplus(-(reward - p.alpha * (c.logp_l - c.ref_pos_logp_l)))


def cringe(c, p):
    gate = sigmoid((p.b - (c.logp_w - c.logp_l)) / p.tau).detach()
    # S29's fraction, token by token
    tokens = torch.exp(c.pos_score) / (torch.exp(c.pos_score) + torch.exp(c.neg_score))
    return gate * (-c.logp_w + p.alpha * -(torch.log(tokens) * c.mask).sum(1))


def exo(c, p):
    q, eps = sigmoid(p.beta * margin(c)), p.label_smoothing
    return q * torch.log(q / (1 - eps)) + (1 - q) * torch.log((1 - q) / eps)


def rewards(c, p):
    return p.beta * (c.logp_w - c.ref_logp_w), p.beta * (c.logp_l - c.ref_logp_l)


def nca(c, p):
    w, l = rewards(c, p)  # noqa: E741
    return softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(l)


def matched(x, y):
    """x - y by rank, each difference where its x is."""
    order, partner = x.argsort(), torch.empty_like(x)
    return x - partner.scatter(0, order, y[y.argsort()])


def aot(c, p):
    d = matched(c.logp_w - c.logp_l, c.ref_logp_w - c.ref_logp_l)
    return smoothed(p.beta * d, p.label_smoothing)


def aot_unpaired(c, p):
    d = matched(c.logp_w - c.ref_logp_w, c.logp_l - c.ref_logp_l)
    return smoothed(p.beta * d, p.label_smoothing)


def apo_down(c, p):
    w, l = rewards(c, p)  # noqa: E741
    return sigmoid(w) + 1 - sigmoid(w - l)


def discopop(c, p):
    z = p.beta * margin(c)
    mix = sigmoid(z / p.tau)
    return (1 - mix) * softplus(-z) + mix * torch.exp(-z)


def dpop(c, p):
    penalty = (c.ref_logp_w - c.logp_w).clamp(min=0)
    if p.variant == "survey":
        return softplus(-p.beta * margin(c)) + p.lam * penalty
    return softplus(-p.beta * (margin(c) - p.lam * penalty))


def ipo(c, p):
    n_w, n_l = (c.len_w, c.len_l) if p.variant == "mean" else (1, 1)
    return ((c.logp_w - c.ref_logp_w) / n_w - (c.logp_l - c.ref_logp_l) / n_l - 1 / (2 * p.beta)) ** 2


def simpo(c, p):
    gamma = p.gamma if p.gamma_beta_ratio is None else p.gamma_beta_ratio * p.beta
    return smoothed(p.beta * (c.logp_w / c.len_w - c.logp_l / c.len_l) - gamma, p.label_smoothing)


PLAIN = {
    "dpo": dpo,
    "dno": dpo,
    "token_dpo": dpo,
    "robust_dpo": lambda c, p: (
        ((1 - p.label_smoothing) * softplus(-p.beta * margin(c)) - p.label_smoothing * softplus(p.beta * margin(c)))
        / (1 - 2 * p.label_smoothing)
    ),
    "slic": lambda c, p: (p.delta - c.logp_w + c.logp_l).clamp(min=0) - p.lam * c.logp_w,
    "rso": lambda c, p: softplus(-p.beta * margin(c)) if p.loss == "sigmoid" else (1 - p.beta * margin(c)).clamp(min=0),
    "dpop": dpop,
    "beta_dpo": beta_dpo,
    "ipo": ipo,
    "gpo": gpo,
    "odpo": odpo,
    "rdpo": rdpo,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "sppo": sppo,
    "f_dpo": f_dpo,
    "tdpo": tdpo,
    "nn": nn,
    "npo": lambda c, p: 2 / p.beta * torch.log(1 + torch.exp(c.logp_l - c.ref_logp_l) ** p.beta),
    "cringe": cringe,
    "exo": exo,
    "nca": nca,
    "bco_pair": lambda c, p: softplus(-rewards(c, p)[0]) + softplus(rewards(c, p)[1]),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": lambda c, p: 1 - sigmoid(rewards(c, p)[0]) + sigmoid(rewards(c, p)[1]),
    "apo_down": apo_down,
    "discopop": discopop,
    "dpo_norm": lambda c, p: softplus(
        -p.beta * ((c.logp_w - c.ref_logp_w) / c.len_w - (c.logp_l - c.ref_logp_l) / c.len_l)
    ),
    "sft": lambda c, p: -c.logp_w,
    "context_distillation": lambda c, p: c.kl_w,
    "forward_kl": lambda c, p: c.kl_w,
    "reverse_kl": lambda c, p: c.reverse_kl_w,
    "gkd": lambda c, p: c.jsd_w,
    "topk_kl": lambda c, p: c.topk_kl_w,
}


@pytest.mark.parametrize(
    ("name", "hyper"), [(n, h) for n, h in EVERY_PATH if n in PLAIN and (n, h.get("keep")) != ("beta_dpo", None)]
)
def test_is_the_plain_equation(name, hyper):
    given = columns(name, units=64, seed=1)
    if name == "f_dpo":  # so that the plain probability ratios stay in range
        given |= {k: given["ref_" + k] + (given[k] - given["ref_" + k]) / 4 for k in ("logp_w", "logp_l")}
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in WITH_GRADIENT}
    inputs, settings = SimpleNamespace(**{**given, **leaves}), {**xf.METHODS[name].defaults, **hyper}
    expected = PLAIN[name](inputs, SimpleNamespace(**settings))
    losses, gradients = losses_and_gradients(name, given, **hyper)
    assert_close(losses, expected.detach(), rtol=1e-9, atol=1e-11)
    their_gradients = torch.autograd.grad(expected.sum(), tuple(leaves.values()), materialize_grads=True)
    for (key, gradient), theirs in zip(gradients.items(), their_gradients, strict=True):
        assert_close(gradient, theirs, rtol=1e-8, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


IMPLICIT = [
    *(("robust_dpo", {}), ("rso", {}), ("dpop", {}), ("gpo", {}), ("odpo", {}), ("rdpo", {}), ("sppo", {})),
    *(("dno", {}), ("token_dpo", {}), ("tdpo", {}), ("exo", {}), ("nca", {}), ("bco_pair", {}), ("aot", {})),
    *(("aot_unpaired", {}), ("apo_zero", {}), ("apo_down", {}), ("discopop", {}), ("f_dpo", {})),
    ("f_dpo", {"divergence": "js"}),  # TRL's, whatever the divergence
    *(("ipo", {"variant": "sum"}), ("beta_dpo", {"keep": 1.0})),
]


@pytest.mark.parametrize(("name", "hyper"), IMPLICIT)
def test_rewards_are_beta_times_the_log_ratios(name, hyper):
    given = columns(name)
    _, metrics = xf.METHODS[name](**given, **hyper)
    beta = xf.METHODS[name].defaults["beta"]
    assert_close(metrics["rewards/chosen"], beta * f64(2, -1, 15))
    assert_close(metrics["rewards/rejected"], beta * f64(-2, 2, 2))
    assert_close(metrics["logps/chosen"], given["logp_w"])
    assert_close(metrics["logps/rejected"], given["logp_l"])


def test_metrics_carry_trl_names():
    _, metrics = xf.METHODS["dpo"](**columns("dpo"))
    # 0.1 * dw, 0.1 * dl
    expected = {"rewards/chosen": (0.2, -0.1, 1.5), "rewards/rejected": (-0.2, 0.2, 0.2)}
    expected |= {"rewards/margins": (0.4, -0.3, 1.3), "rewards/accuracies": (1, 0, 1)}
    for key, value in expected.items():
        assert_close(metrics[key].double(), f64(*value))


# --- What the papers prove ---


def at_the_reference(name):
    given = columns(name)
    return given | {"ref_" + k: given[k] for k in ("logp_w", "logp_l") if k in given}


@pytest.mark.parametrize("name", ["dpo", "dno", "token_dpo"])
@pytest.mark.parametrize("hyper", [{}, {"beta": 5.0}, {"label_smoothing": 0.3}], ids=str)
def test_dpo_is_ln_2_at_the_reference(name, hyper):
    assert_close(losses_of(name, at_the_reference(name), **hyper), f64(*[LN2] * 3))


LOSS_AT_THE_REFERENCE = [
    ("rso", {}, 1.0),
    ("robust_dpo", {}, LN2),
    ("ipo", {"variant": "sum"}, 25.0),  # (1 / (2 * 0.1))^2
    ("dpop", {}, LN2),
    ("beta_dpo", {"keep": 1.0}, LN2),
    *(("f_dpo", {"divergence": d}, LN2) for d in ("reverse_kl", "forward_kl", "js", "alpha")),
    ("exo", {}, 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001)),
    ("nca", {}, 2 * LN2),
    ("bco_pair", {}, 2 * LN2),
    ("aot", {}, LN2),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("discopop", {}, 0.5 * LN2 + 0.5),
    ("dpo_norm", {}, LN2),
    ("npo", {}, 20 * LN2),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), LOSS_AT_THE_REFERENCE)
def test_loss_at_the_reference(name, hyper, expected):
    assert_close(losses_of(name, at_the_reference(name), **hyper), f64(*[expected] * 3))


def test_dpo_gradient_is_the_papers():
    # S11, beta = 0.1: -0.1 s(-0.4), -0.1 s(0.3), -0.1 s(-1.3)
    expected = f64(-0.0401312339888, -0.0574442516812, -0.0214165016957)
    _, gradients = losses_and_gradients("dpo", columns("dpo"))
    assert_close(gradients["logp_w"], expected)
    assert_close(gradients["logp_l"], -expected)


ONLY_DIFFERENCES = [
    *(("dpo", {}), ("dno", {}), ("token_dpo", {}), ("robust_dpo", {}), ("rso", {}), ("simpo", {}), ("exo", {})),
    *(("odpo", {}), ("rdpo", {}), ("tdpo", {}), ("tdpo", {"version": 1}), ("discopop", {}), ("dpo_norm", {})),
    *(("ipo", {"variant": "sum"}), ("cpo", {"alpha": 0.0}), ("beta_dpo", {"keep": 1.0})),
    *(("aot", {}), ("aot_unpaired", {}), ("gpo", {"f": "savage"}), ("f_dpo", {})),
]


@pytest.mark.parametrize(("name", "hyper"), ONLY_DIFFERENCES)
def test_only_the_difference_of_a_pair_counts(name, hyper):
    given = {k: torch.full_like(v, 4) if k.startswith("len") else v for k, v in columns(name).items()}
    moved = given | {k: given[k] - 3.25 for k in ("logp_w", "logp_l")}
    assert_close(losses_of(name, moved, **hyper), losses_of(name, given, **hyper))


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_robust_dpo_is_unbiased_under_flipped_labels(eps):
    given = columns("robust_dpo")
    kept = losses_of("robust_dpo", given, label_smoothing=eps)
    flipped = losses_of("robust_dpo", swapped(given), label_smoothing=eps)
    assert_close((1 - eps) * kept + eps * flipped, losses_of("dpo", given))


def test_beta_dpo_is_dpo_where_beta_does_not_move():
    given = columns("beta_dpo")
    pairs = {k: given[k] for k in xf.METHODS["dpo"].inputs}
    mean = f64(14 / 3)[0]  # of the margins 4, -3, 13
    assert_close(losses_of("beta_dpo", given, keep=1.0, alpha=0.0), losses_of("dpo", pairs))
    assert_close(losses_of("beta_dpo", given | {"m0": mean}, keep=1.0), losses_of("dpo", pairs))


def test_beta_dpo_gradient_holds_beta_fixed():
    given = columns("beta_dpo")
    _, gradients = losses_and_gradients("beta_dpo", given, keep=1.0)
    pairs = {k: given[k] for k in xf.METHODS["dpo"].inputs}
    _, expected = losses_and_gradients("dpo", pairs, beta=0.14)  # as in the literal
    assert_close(gradients, expected)


def test_beta_dpo_raises_beta_with_the_batchs_gap():
    # S14: a batch whose margins are larger than usual gets a larger beta
    given, at = columns("beta_dpo"), torch.tensor
    losses = [losses_of("beta_dpo", given | {"m0": at(m).double()}, keep=1.0)[0] for m in (9.0, 4.0, 0.0, -9.0)]
    assert losses == sorted(losses, reverse=True)  # the first pair is won: a larger beta lowers its loss


def test_beta_dpo_keeps_a_fraction_and_its_mean():
    given = columns("beta_dpo", units=50, seed=3)
    ratios = margin(SimpleNamespace(**given))
    torch.manual_seed(0)
    losses, gradients = losses_and_gradients("beta_dpo", given, keep=0.3)
    kept = losses != 0
    assert kept.sum() == 15
    beta = max(0.1 * (1 + 0.6 * (ratios[kept].mean() - given["m0"]).item()), 1e-3)
    pairs = {k: given[k][kept] for k in xf.METHODS["dpo"].inputs}
    expected, expected_gradients = losses_and_gradients("dpo", pairs, beta=beta)
    assert_close(losses[kept], expected)
    assert_close({k: v[kept] for k, v in gradients.items()}, expected_gradients)
    assert not any(g[~kept].any() for g in gradients.values())


def test_beta_dpo_drops_outliers():
    given = columns("beta_dpo", units=40, seed=4)
    center = margin(SimpleNamespace(**given)).mean()
    given |= {"m0": center, "s": f64(10.0)[0], "logp_w": given["logp_w"].clone()}
    given["logp_w"][7] += 500  # 50 standard deviations out: a weight of e^-1250
    for seed in range(10):
        torch.manual_seed(seed)
        assert losses_of("beta_dpo", given, keep=0.8)[7] == 0


def test_beta_dpo_remembers_with_momentum():
    zero, one = f64(0)[0], f64(1)[0]
    # margins 4, -3, 13: mean 14/3, deviations (-2/3, -23/3, 25/3), variance (4 + 529 + 625) / 9 / 2 = 64.3333333
    margins = f64(4, -3, 13)
    m0, s = beta_dpo_state(margins.requires_grad_(), zero, one)
    assert_close(torch.stack([m0, s]), f64(0.1 * 14 / 3, 0.9 + 0.1 * 8.02080627701))
    assert not m0.requires_grad and not s.requires_grad
    # of 4 and -3 alone: mean 1/2, variance 2 * 3.5^2
    m0, s = beta_dpo_state(margins, f64(2)[0], f64(3)[0], valid=torch.tensor([True, True, False]))
    assert_close(torch.stack([m0, s]), f64(1.8 + 0.05, 2.7 + 0.1 * 4.94974746831))
    m0, s = beta_dpo_state(margins, f64(2)[0], f64(3)[0], momentum=0.5)
    assert_close(torch.stack([m0, s]), f64(1 + 7 / 3, 1.5 + 0.5 * 8.02080627701))
    # one pair has a mean and no deviation, none has neither
    m0, s = beta_dpo_state(margins[:1], f64(2)[0], f64(3)[0])
    assert_close(torch.stack([m0, s]), f64(1.8 + 0.4, 3))
    m0, s = beta_dpo_state(margins[:0], f64(2)[0], f64(3)[0])
    assert_close(torch.stack([m0, s]), f64(2, 3))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(("variant", "scale"), [("mean", torch.tensor([5.0, 2.0, 8.0])), ("sum", 1)])
def test_ipo_is_least_at_its_target_margin(beta, variant, scale):
    given = columns("ipo")
    given["ref_logp_l"] = given["logp_l"]
    given["logp_w"] = given["ref_logp_w"] + scale / (2 * beta)
    losses, gradients = losses_and_gradients("ipo", given, beta=beta, variant=variant)
    for value in (losses, gradients["logp_w"], gradients["logp_l"]):
        assert_close(value, f64(0, 0, 0), rtol=0, atol=1e-10)
    for step in (-0.5, 0.5):
        moved = given | {"logp_w": given["logp_w"] + step}
        assert (losses_of("ipo", moved, beta=beta, variant=variant) > 1e-3).all()


def test_lengths_are_needed_only_where_they_are_read():
    for name, hyper in (("ipo", {"variant": "sum"}), ("cpo", {})):
        given = {k: v for k, v in columns(name).items() if not k.startswith("len")}
        assert_close(losses_of(name, given, **hyper), losses_of(name, **hyper))


def test_rso_is_flat_beyond_the_margin():
    losses, gradients = losses_and_gradients("rso", columns("rso"))
    assert losses[2] == 0
    assert_close(gradients["logp_w"], f64(-0.1, -0.1, 0))
    assert_close(gradients["logp_l"], f64(0.1, 0.1, 0))
    assert_close(losses_of("rso", loss="sigmoid"), losses_of("dpo"))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_gpo_has_the_known_methods_as_members(beta):
    assert_close(losses_of("gpo", beta=beta), losses_of("dpo", beta=beta))
    assert_close(losses_of("gpo", f="hinge", beta=beta), losses_of("rso", beta=beta))
    # (beta M - 1)^2 = beta^2 (M - 1 / beta)^2, and IPO's target is 1 / (2 * its beta)
    ipo_sum = losses_of("ipo", beta=beta / 2, variant="sum")
    assert_close(losses_of("gpo", f="squared", beta=beta), beta**2 * ipo_sum)
    hinge = losses_of("gpo", f="hinge", beta=beta)
    assert_close(losses_of("gpo", f="truncated_quadratic", beta=beta), hinge**2)
    logistic = losses_of("gpo", beta=beta)
    assert_close(losses_of("gpo", f="savage", beta=beta), torch.expm1(-logistic) ** 2)


@pytest.mark.parametrize(
    ("f", "slope"),
    [
        *(("logistic", -0.5), ("hinge", -1.0), ("squared", -2.0), ("exponential", -1.0)),
        *(("truncated_quadratic", -2.0), ("savage", -0.25)),
    ],
)
def test_gpo_at_the_reference_is_its_slope(f, slope):
    # S19: preference optimisation enters with f'(0)
    _, gradients = losses_and_gradients("gpo", at_the_reference("gpo"), f=f, beta=0.3)
    assert_close(gradients["logp_w"], f64(*[0.3 * slope] * 3))
    assert_close(gradients["logp_l"], f64(*[-0.3 * slope] * 3))


@pytest.mark.parametrize("offset", ["log", "identity"])
def test_odpo_without_its_offset_is_dpo(offset):
    assert_close(losses_of("odpo", alpha=0.0, offset=offset), losses_of("dpo"))


def test_odpo_asks_for_a_margin_that_grows_with_the_gap():
    # the offset enters as a noise-free threshold: e^-L = P(margin + Gumbel noise > offset) = 1 / (1 + gap e^-h)
    gap, h = f64(2, 0.5, 0.25), 0.1 * f64(4, -3, 13)
    assert_close(torch.exp(-losses_of("odpo")), 1 / (1 + gap * torch.exp(-h)))
    given = columns("odpo")
    losses = [losses_of("odpo", given | {"score_w": given["score_l"] + g}) for g in (0.1, 1.0, 3.0)]
    assert (losses[0] < losses[1]).all() and (losses[1] < losses[2]).all()
    assert_close(losses[1], losses_of("dpo"))  # log 1 = 0


def test_rdpo_is_dpo_at_equal_lengths():
    given = columns("rdpo")
    given["len_l"] = given["len_w"]
    for variant in ("derived", "survey"):
        assert_close(losses_of("rdpo", given, alpha=0.7, variant=variant), losses_of("dpo"))
    assert_close(losses_of("rdpo", alpha=0.0), losses_of("dpo"))


def test_rdpo_is_bradley_terry_at_the_optimum_of_its_objective():
    # S44's optimum is pi = ref e^((r - alpha |y|) / beta) / Z; there its loss is that of the reward itself
    alpha, beta = 0.3, 0.5
    reward, length, ref = f64(1.0, -0.5, 2.0, 0.3), f64(3, 9, 1, 4), f64(0.4, 0.3, 0.2, 0.1)
    policy = ref * torch.exp((reward - alpha * length) / beta)
    policy = policy / policy.sum()
    w, l = torch.tensor([0, 2, 3, 1]), torch.tensor([1, 0, 2, 3])  # noqa: E741
    given = {"logp_w": policy.log()[w], "logp_l": policy.log()[l]}
    given |= {"ref_logp_w": ref.log()[w], "ref_logp_l": ref.log()[l], "len_w": length[w], "len_l": length[l]}
    losses = losses_of("rdpo", given, alpha=alpha, beta=beta)
    assert_close(losses, softplus(reward[l] - reward[w]))


def test_slic_beyond_the_margin_is_its_regulariser():
    given = columns("slic", optional=True)
    losses, gradients = losses_and_gradients("slic", given, delta=1.0, lam=0.3)
    assert_close(losses, -0.3 * given["logp_sft"])
    assert not gradients["logp_w"].any() and not gradients["logp_l"].any()
    assert_close(gradients["logp_sft"], f64(-0.3, -0.3, -0.3))
    _, gradients = losses_and_gradients("slic", columns("slic"), delta=1.0, lam=0.3)  # by default of the chosen
    assert_close(gradients["logp_w"], f64(-0.3, -0.3, -0.3))


@pytest.mark.parametrize("variant", ["paper", "survey"])
def test_dpop_is_dpo_while_the_chosen_has_not_lost(variant):
    dpop, dpo = losses_of("dpop", variant=variant), losses_of("dpo", beta=0.3)
    assert_close(dpop[[0, 2]], dpo[[0, 2]])
    assert dpop[1] > dpo[1] + 1


def test_simpo_ratio_is_gamma_over_beta():
    expected = losses_of("simpo", beta=10.0, gamma=3.0)
    assert_close(losses_of("simpo", beta=10.0, gamma_beta_ratio=0.3), expected)
    assert_close(losses_of("simpo", beta=10.0, gamma_beta_ratio=0.3, gamma=7.0), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo_without_its_likelihood_is_reference_free_dpo(smoothing):
    given = {k: torch.zeros_like(v) if k.startswith("ref") else v for k, v in columns("dpo").items()}
    cpo = losses_of("cpo", alpha=0.0, label_smoothing=smoothing)
    assert_close(cpo, losses_of("dpo", given, label_smoothing=smoothing))


MIXES = [("dpo", {}), ("simpo", {"gamma": 0.0}), ("cpo", {"alpha": 0.0}), ("aot", {}), ("aot_unpaired", {})]


@pytest.mark.parametrize(("name", "hyper"), MIXES)
def test_label_smoothing_mixes_the_pair_and_its_flip(name, hyper):
    given = {k: v for k, v in columns(name).items() if (name, k) != ("cpo", "len_w")}
    clean, flipped = losses_of(name, given, **hyper), losses_of(name, swapped(given), **hyper)
    if name.startswith("aot"):  # where a difference is booked depends on the side, the batch's sum does not
        clean, flipped = clean.sum(), flipped.sum()
    for eps in (0.1, 0.25, 0.4):
        mixed = losses_of(name, given, label_smoothing=eps, **hyper)
        expected = (1 - eps) * clean + eps * flipped
        assert_close(mixed.sum() if name.startswith("aot") else mixed, expected)


def test_smoothed_dpo_is_convex_and_least_where_the_probability_is_right():
    ratio = torch.linspace(-8, 8, 81, dtype=torch.float64)
    ratio[-1] = math.log(0.9 / 0.1)  # s(h) = 1 - eps
    given = {"logp_w": ratio} | dict.fromkeys(("logp_l", "ref_logp_w", "ref_logp_l"), ratio * 0)
    losses, gradients = losses_and_gradients("dpo", given, beta=1.0, label_smoothing=0.1)
    assert (losses[:-1].diff().diff() > 0).all() and (losses[:-1] > losses[-1]).all()
    assert abs(gradients["logp_w"][-1]) < 1e-10


def test_orpo_is_the_odds_ratio_and_monotone():
    grid = torch.linspace(-6, -0.05, 40, dtype=torch.float64)
    mean_w, mean_l = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    given = {"logp_w": 3 * mean_w, "logp_l": 2 * mean_l}
    given |= {"len_w": torch.full((1600,), 3), "len_l": torch.full((1600,), 2)}
    losses, gradients = losses_and_gradients("orpo", given, lam=0.7)
    p_w, p_l = mean_w.exp(), mean_l.exp()
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    assert_close(losses, -mean_w - 0.7 * torch.log(odds_ratio / (1 + odds_ratio)))
    assert (gradients["logp_w"] < 0).all() and (gradients["logp_l"] > 0).all()


@pytest.mark.parametrize("beta", [0.001, 0.5])
def test_sppo_rests_at_its_targets(beta):
    given = columns("sppo")
    advantage = (given["prob_w"] - 0.5) / beta
    given |= {"logp_w": given["ref_logp_w"] + advantage, "logp_l": given["ref_logp_l"] - advantage}
    losses, gradients = losses_and_gradients("sppo", given, beta=beta)
    for value in (losses, *gradients.values()):
        assert_close(value, f64(0, 0, 0), rtol=0, atol=1e-12 / beta)
    # a coin toss leaves the policy where it was
    even = at_the_reference("sppo") | {"prob_w": f64(0.5, 0.5, 0.5)}
    for variant in ("soft", "survey"):
        losses, gradients = losses_and_gradients("sppo", even, beta=beta, variant=variant)
        assert not losses.any() and not gradients["logp_w"].any() and not gradients["logp_l"].any()


def test_sppo_hard_is_soft_at_certainty_and_needs_no_probability():
    given = columns("sppo")
    certain = losses_of("sppo", given | {"prob_w": f64(1, 1, 1)})
    del given["prob_w"]
    assert_close(losses_of("sppo", given, variant="hard"), certain)


@pytest.mark.parametrize("beta", [0.001, 0.5, 3.0])
def test_sppo_as_in_the_survey_rests_at_the_normalised_update(beta):
    # S60: the next policy is pi e^(P / beta) / Z, here over the pair, so the mean of e^(log-ratio) is 1
    given = columns("sppo")
    targets = torch.stack([given["prob_w"], 1 - given["prob_w"]]) / beta
    targets = targets - (targets.logsumexp(0) - LN2)
    assert_close(targets.exp().mean(0), f64(1, 1, 1))
    given |= {"logp_w": given["ref_logp_w"] + targets[0], "logp_l": given["ref_logp_l"] + targets[1]}
    losses = losses_of("sppo", given, beta=beta, variant="survey")
    assert_close(losses, f64(0, 0, 0), rtol=0, atol=1e-18 / beta**2)


def test_sppos_constant_is_the_surveys_at_weak_updates():
    # 1 / beta to 0: log Z is 1 / (2 beta) to first order
    soft, survey = (losses_of("sppo", beta=1e4, variant=v) for v in ("soft", "survey"))
    assert_close(soft, survey, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_f_dpo_members(beta):
    dpo = losses_of("dpo", beta=beta)
    assert_close(losses_of("f_dpo", beta=beta), dpo)
    near_0 = losses_of("f_dpo", beta=beta, divergence="alpha", alpha=1e-9)
    assert_close(near_0, dpo, rtol=1e-5, atol=1e-6)
    near_1 = losses_of("f_dpo", beta=beta, divergence="alpha", alpha=1 - 1e-9)
    forward = losses_of("f_dpo", beta=beta, divergence="forward_kl")
    assert_close(near_1, forward, rtol=1e-5, atol=1e-6)


F = {  # below S63
    "reverse_kl": lambda u: u * torch.log(u),
    "forward_kl": lambda u: -torch.log(u),
    "js": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
    "alpha": lambda u: (u ** (1 - 0.3) - (1 - 0.3) * u - 0.3) / (0.3 * (0.3 - 1)),
}


@pytest.mark.parametrize("divergence", F)
def test_f_dpo_reward_is_the_derivative_of_the_divergence(divergence):
    # S67, f' by autograd of the printed f
    given = columns("f_dpo")
    u = torch.stack([given["logp_" + s] - given["ref_logp_" + s] for s in "wl"]).exp().requires_grad_()
    (slope,) = torch.autograd.grad(F[divergence](u).sum(), u)
    losses = losses_of("f_dpo", given, divergence=divergence, alpha=0.3, beta=0.4)
    assert_close(losses, softplus(-0.4 * (slope[0] - slope[1])))


def test_f_dpo_js_bounds_the_chosen_reward():
    # log(2u / (1 + u)) < log 2: beyond it nothing is to be gained
    given = columns("f_dpo")
    given["logp_w"] = given["ref_logp_w"] + 1000
    ratio_l = given["logp_l"] - given["ref_logp_l"]
    losses, gradients = losses_and_gradients("f_dpo", given, divergence="js")
    assert_close(losses, softplus(-0.1 * (LN2 - torch.log(2 * sigmoid(ratio_l)))))
    assert_close(gradients["logp_w"], f64(0, 0, 0))


def test_tdpo_is_bradley_terry_of_the_advantages_at_its_optimum():
    # S25, S26: at each position pi = ref e^(Q / beta) / Z; there the sum of A = Q - E_ref Q is what S28 compares
    generator = torch.Generator().manual_seed(0)
    q, ref = (torch.randn(2, 6, 4, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    ref = ref.log_softmax(-1)  # (side, pair, position, token)
    policy = (ref + q / 0.3).log_softmax(-1)
    tokens = torch.randint(11, (2, 6, 4, 1), generator=generator)
    kl = (ref.exp() * (ref - policy)).sum((2, 3))
    (logp, ref_logp, value) = (x.gather(3, tokens).sum((2, 3)) for x in (policy, ref, q))
    advantage = value - (ref.exp() * q).sum((2, 3))
    given = {
        f"{key}_{side}": x[i]
        for i, side in enumerate("wl")
        for key, x in (("logp", logp), ("ref_logp", ref_logp), ("kl", kl))
    }
    losses = losses_of("tdpo", given, beta=0.3, version=1)
    assert_close(losses, softplus(advantage[1] - advantage[0]))


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_is_dpo_where_the_kls_agree_and_shifts_with_their_difference(version):
    given = columns("tdpo")
    dpo = losses_of("dpo")
    assert_close(losses_of("tdpo", given | {"kl_l": given["kl_w"]}, version=version), dpo)
    moved = given | {k: given[k] + 7 for k in ("kl_w", "kl_l")}
    assert_close(losses_of("tdpo", moved, version=version), losses_of("tdpo", given, version=version))
    # delta = beta (kl_l - kl_w), or alpha times it, acts as a change of the chosen log-ratio by as much / beta
    share = 1.0 if version == 1 else 0.5
    shifted = columns("dpo")
    shifted["logp_w"] = shifted["logp_w"] - share * (given["kl_l"] - given["kl_w"])
    assert_close(losses_of("tdpo", given, version=version), losses_of("dpo", shifted))
    nothing = at_the_reference("tdpo") | {"kl_w": f64(0, 0, 0), "kl_l": f64(0, 0, 0)}
    assert_close(losses_of("tdpo", nothing, version=version), f64(LN2, LN2, LN2))


def test_tdpo2_stops_the_chosen_gradient():
    # with z = (0.25, -0.1, 1.025): beta s(-z) to each term of S28
    weight = 0.1 * sigmoid(-f64(0.25, -0.1, 1.025))
    _, gradients = losses_and_gradients("tdpo", columns("tdpo"), version=1)
    assert_close(gradients, {"logp_w": -weight, "logp_l": weight, "kl_w": -weight, "kl_l": weight}, check_dtype=False)
    _, gradients = losses_and_gradients("tdpo", columns("tdpo"), version=2, alpha=1.0)
    zero = torch.zeros_like(weight)
    assert_close(gradients, {"logp_w": -weight, "logp_l": weight, "kl_w": zero, "kl_l": weight})


def test_nn_drops_as_its_own_completions_rise_and_the_rejected_falls():
    given = {k: tensor(v) for k, v in NN.items()}
    _, gradients = losses_and_gradients("nn", given)
    # z = (0.1, 0.225, -0.5), gamma / K = 0.05, alpha = 0.1
    weight = sigmoid(-f64(0.1, 0.225, -0.5))
    assert_close(gradients["logps"], -0.05 * weight[:, None].expand(3, 2))
    assert_close(gradients["logp_l"], 0.1 * weight)
    alike = given | {"ref_logps": given["logps"], "ref_pos_logp_l": given["logp_l"]}
    assert_close(losses_of("nn", alike), f64(LN2, LN2, LN2))


def test_npo_becomes_gradient_ascent_as_beta_vanishes():
    given = columns("npo", units=50)
    ratio = given["logp_l"] - given["ref_logp_l"]
    losses, gradients = losses_and_gradients("npo", given, beta=1e-7)
    assert_close(gradients["logp_l"], torch.ones_like(ratio), rtol=0, atol=1e-5)
    assert_close(losses - 2e7 * LN2, ratio, rtol=0, atol=1e-4)


def test_npo_weighs_the_ascent_by_what_is_left_to_forget():
    # the paper's adaptive weight 2 pi^b / (pi^b + ref^b); bounded below, unlike gradient ascent
    given = columns("npo", units=50)
    pi, ref = (given[k].exp() ** 0.3 for k in ("logp_l", "ref_logp_l"))
    losses, gradients = losses_and_gradients("npo", given, beta=0.3)
    assert_close(gradients["logp_l"], 2 * pi / (pi + ref))
    gone = given | {"logp_l": given["logp_l"] - 2000}
    assert (losses > 0).all() and (losses_of("npo", gone, beta=0.3) < 1e-100).all()
    # DPO's term of the rejected completion, times 2 / beta
    still = {"logp_w": pi * 0, "ref_logp_w": pi * 0}
    assert_close(losses, 2 / 0.3 * losses_of("dpo", given | still, beta=0.3))


def test_cringe_gate_is_held_fixed():
    given = columns("cringe")
    _, gradients = losses_and_gradients("cringe", given, alpha=0.5, b=2.0, tau=5.0)
    gate = sigmoid((2 - f64(5, 2, 10)) / 5)
    assert_close(gradients["logp_w"], -gate)
    assert not gradients["logp_l"].any()  # it enters through the gate alone
    token = 0.5 * gate[:, None] * sigmoid(given["neg_score"] - given["pos_score"]) * given["mask"]
    assert_close(gradients["neg_score"], token)
    assert_close(gradients["pos_score"], -token)


def test_cringe_lets_go_of_pairs_that_are_won():
    given = columns("cringe")
    won, lost = ({**given, "logp_l": given["logp_w"] - m} for m in (60.0, -60.0))
    assert (losses_of("cringe", won) < 1e-20).all()
    binary = -given["logp_w"] - torch.where(
        given["mask"], torch.stack([given["pos_score"], given["neg_score"]]).log_softmax(0)[0], 0.0
    ).sum(1)
    assert_close(losses_of("cringe", lost), binary)  # S29
    margins = [losses_of("cringe", given, b=b) for b in (-3.0, 0.0, 3.0)]
    assert (margins[0] < margins[1]).all() and (margins[1] < margins[2]).all()


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_exo_is_a_kl_and_rests_at_the_smoothed_preference(eps):
    given = columns("exo", units=200)
    assert (losses_of("exo", given, label_smoothing=eps) >= 0).all()
    h = math.log((1 - eps) / eps)
    rest = given | {"logp_w": given["ref_logp_w"] + h / 0.1, "ref_logp_l": given["logp_l"]}
    losses, gradients = losses_and_gradients("exo", rest, label_smoothing=eps)
    for value in (losses, gradients["logp_w"], gradients["logp_l"]):
        assert_close(value, torch.zeros_like(losses), rtol=0, atol=1e-12)


def test_nca_raises_the_chosen_up_to_a_bound():
    # -s(-r) + s(r) / 2 = 0 at s(r) = 2/3: the chosen reward rests at log 2 whatever the rejected one is
    reward = f64(-2, 0, 0.6, LN2, 0.8, 5)
    given = {"logp_w": reward / 0.1, "logp_l": f64(1, -1, 3, -3, 0, 2)}
    given |= {"ref_logp_w": reward * 0, "ref_logp_l": reward * 0}
    _, gradients = losses_and_gradients("nca", given)
    assert (gradients["logp_w"][:3] < 0).all() and (gradients["logp_w"][4:] > 0).all()
    assert abs(gradients["logp_w"][3]) < 1e-15
    assert (gradients["logp_l"] > 0).all()


SEPARATE = [("bco_pair", "bco", {"delta": f64(0.0)[0]}), ("apo_zero", "apo_zero_unpaired", {})]


@pytest.mark.parametrize(("paired", "unpaired", "more"), SEPARATE)
def test_a_pair_is_two_rows(paired, unpaired, more):
    given = columns(paired)
    chosen = {"logp": given["logp_w"], "ref_logp": given["ref_logp_w"], "desirable": torch.ones(3).bool()}
    rejected = {"logp": given["logp_l"], "ref_logp": given["ref_logp_l"], "desirable": torch.zeros(3).bool()}
    rows = losses_of(unpaired, chosen | more) + losses_of(unpaired, rejected | more)
    assert_close(losses_of(paired, given), rows)


def test_apo_is_bounded_and_moves_as_its_name_says():
    given = columns("apo_zero", units=200)
    for name in ("apo_zero", "apo_down"):
        losses, gradients = losses_and_gradients(name, given)
        assert ((losses > 0) & (losses < 2)).all()
        assert all((g.abs() <= 0.1 / 2).all() for g in gradients.values())
    _, gradients = losses_and_gradients("apo_zero", given)
    assert (gradients["logp_w"] < 0).all() and (gradients["logp_l"] > 0).all()
    # down: a chosen completion no likelier than under the reference falls once the pair is won by more than it
    won = {"logp_w": f64(-10.0, -12.0), "logp_l": f64(-30.0, -40.0)}
    won |= {"ref_logp_w": f64(-10.0, -11.0), "ref_logp_l": f64(-10.0, -10.0)}
    _, gradients = losses_and_gradients("apo_down", won)
    assert (gradients["logp_w"] > 0).all() and (gradients["logp_l"] > 0).all()


def test_aot_matches_the_batch_by_rank():
    given = columns("aot", units=5, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    losses, gradients = losses_and_gradients("aot", given)
    # which reference margin belongs to which pair does not matter
    moved = given | {k: given[k][order] for k in ("ref_logp_w", "ref_logp_l")}
    same, same_gradients = losses_and_gradients("aot", moved)
    assert_close(same, losses)
    assert_close(same_gradients, gradients)
    # nor, unpaired, which rejected completion belongs to which chosen one
    losses = losses_of("aot_unpaired", given)
    moved = given | {k: given[k][order] for k in ("logp_l", "ref_logp_l")}
    assert_close(losses_of("aot_unpaired", moved), losses)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_optimal_transport(name):
    # sorting is the cheapest of all matchings for a convex cost
    given = columns(name, units=5, seed=2)
    if name == "aot":
        x, y = given["logp_w"] - given["logp_l"], given["ref_logp_w"] - given["ref_logp_l"]
    else:
        x, y = given["logp_w"] - given["ref_logp_w"], given["logp_l"] - given["ref_logp_l"]
    costs = [softplus(-0.1 * (x - y[list(p)])).sum() for p in itertools.permutations(range(5))]
    assert_close(losses_of(name, given).sum(), min(costs))
    assert losses_of(name, given).sum() <= losses_of("dpo", given).sum()


def test_aot_sees_stochastic_dominance():
    # every quantile of the chosen log-ratios above that of the rejected ones: each loss is below log 2
    given = {"logp_w": f64(0, 5, 9), "logp_l": f64(4, -1, 8)}
    given |= {"ref_logp_w": f64(0, 0, 0), "ref_logp_l": f64(0, 0, 0)}
    assert (losses_of("aot_unpaired", given) < LN2).all()
    assert (losses_of("dpo", given) > LN2).any()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_of_one_pair_is_dpo(name):
    one = {k: v[:1] for k, v in columns(name).items()}
    assert_close(losses_of(name, one), losses_of("dpo", one))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_keeps_its_gradients_at_ties(name):
    # all log-ratios are 0: whatever the order, every pair is pushed apart by beta / 2
    given = {k: f64(-3, -3, -3, -3) for k in xf.METHODS[name].inputs}
    losses, gradients = losses_and_gradients(name, given)
    assert_close(losses, f64(*[LN2] * 4))
    assert_close(gradients, {"logp_w": f64(*[-0.05] * 4), "logp_l": f64(*[0.05] * 4)})


def test_discopop_is_logistic_for_the_lost_and_exponential_for_the_won():
    h = f64(-8, -3, 3, 8)
    given = {"logp_w": h / 0.1} | dict.fromkeys(("logp_l", "ref_logp_w", "ref_logp_l"), h * 0)
    losses = losses_of("discopop", given)
    assert_close(losses[:2], softplus(-h[:2]))
    assert_close(losses[2:], torch.exp(-h[2:]))


def test_dpo_norm_of_single_tokens_is_dpo():
    given = columns("dpo_norm") | {k: torch.ones(3, dtype=torch.long) for k in ("len_w", "len_l")}
    assert_close(losses_of("dpo_norm", given), losses_of("dpo"))
    # twice as long at the same log-prob a token: the same loss
    given = columns("dpo_norm")
    assert_close(losses_of("dpo_norm", {k: 2 * v for k, v in given.items()}), losses_of("dpo_norm"))


# --- TRL 1.16 and Liger 0.8.5 ---


@pytest.fixture(scope="module")
def trl():
    return peers.trl()


DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence"}
PEERS = [  # name, our hyperparameters, TRL's function, its hyperparameters
    ("dpo", {"beta": 0.3}, peers.trl_dpo, {"loss_type": "sigmoid", "beta": 0.3}),
    ("rso", {}, peers.trl_dpo, {"loss_type": "hinge", "beta": 0.1}),
    ("ipo", {}, peers.trl_dpo, {"loss_type": "ipo", "beta": 0.1}),  # TRL too divides by the length
    ("robust_dpo", {}, peers.trl_dpo, {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1}),
    ("exo", {}, peers.trl_dpo, {"loss_type": "exo_pair", "beta": 0.1, "label_smoothing": 1e-3}),
    ("nca", {"beta": 0.2}, peers.trl_dpo, {"loss_type": "nca_pair", "beta": 0.2}),
    ("bco_pair", {}, peers.trl_dpo, {"loss_type": "bco_pair", "beta": 0.1}),
    ("sppo", {"variant": "hard"}, peers.trl_dpo, {"loss_type": "sppo_hard", "beta": 0.001}),
    ("aot", {}, peers.trl_dpo, {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.0}),
    ("aot", {"label_smoothing": 0.2}, peers.trl_dpo, {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.2}),
    ("aot_unpaired", {}, peers.trl_dpo, {"loss_type": "aot_unpaired", "beta": 0.1, "label_smoothing": 0.0}),
    ("apo_zero", {}, peers.trl_dpo, {"loss_type": "apo_zero", "beta": 0.1}),
    ("apo_down", {}, peers.trl_dpo, {"loss_type": "apo_down", "beta": 0.1}),
    ("discopop", {}, peers.trl_dpo, {"loss_type": "discopop", "beta": 0.1, "tau": 0.05}),
    ("dpo_norm", {}, peers.trl_dpo, {"loss_type": "sigmoid_norm", "beta": 0.1}),
    *(
        ("f_dpo", {"divergence": ours}, peers.trl_dpo, {"loss_type": "sigmoid", "beta": 0.1, "divergence": theirs})
        for ours, theirs in DIVERGENCES.items()
    ),
    (  # TRL's alpha is 1 minus the paper's
        "f_dpo",
        {"divergence": "alpha", "alpha": 0.3},
        peers.trl_dpo,
        {"loss_type": "sigmoid", "beta": 0.1, "divergence": "alpha_divergence", "alpha": 0.7},
    ),
    # TRL adds CPO's likelihood term elsewhere, as a token mean: alpha = 0 here
    ("cpo", {"alpha": 0.0}, peers.trl_cpo, {"loss_type": "sigmoid", "beta": 0.1}),
    ("simpo", {"gamma": 0.5}, peers.trl_cpo, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
    ("orpo", {"lam": 0.4}, peers.trl_orpo, {"beta": 0.4}),  # TRL's beta is the paper's lambda
]
IN_FLOAT32 = ("alpha_divergence",)  # what TRL computes in float32 whatever it is given, and in no other


@pytest.mark.parametrize(("name", "hyper", "peer", "theirs"), PEERS, ids=[f"{p[0]}-{p[1]}" for p in PEERS])
def test_agrees_with_trl(trl, name, hyper, peer, theirs):
    single = theirs.get("divergence") in IN_FLOAT32
    dtype = torch.float32 if single else torch.float64
    given = {k: tensor(v, dtype) for k, v in COLUMNS["pairwise"].items()}
    for k in WITH_GRADIENT & given.keys():
        given[k].requires_grad_()
    mine = {k: given[k] for k in columns(name)}
    leaves = [v for v in mine.values() if v.requires_grad]
    ours, expected = losses_of(name, mine, **hyper).mean(), peer(given, **theirs)
    # TRL's odds ratio and EXO's epsilon are float32
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if name in ("orpo", "exo") or single else {}
    assert_close(ours, expected, **tolerance)
    assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), **tolerance)


def test_sft_over_its_tokens_is_trls(trl):
    given = {k: tensor(v) for k, v in COLUMNS["pairwise"].items()}
    expected = peers.trl_dpo(given, "sft", beta=0.1)
    assert_close(losses_of("sft").sum() / given["len_w"].sum(), expected)


LIGER = [
    ("dpo", {}, "sigmoid", {}),
    ("rso", {}, "hinge", {}),
    ("robust_dpo", {}, "robust", {"label_smoothing": 0.1}),
    ("exo", {}, "exo_pair", {"label_smoothing": 1e-3}),
    ("nca", {}, "nca_pair", {}),
    ("bco_pair", {}, "bco_pair", {}),
    ("sppo", {"variant": "hard", "beta": 0.5}, "sppo_hard", {"beta": 0.5}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {}, "discopop", {"discopop_tau": 0.05}),
]


@pytest.mark.parametrize(("name", "hyper", "loss_type", "theirs"), LIGER, ids=[f"{p[0]}" for p in LIGER])
def test_agrees_with_liger(name, hyper, loss_type, theirs):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss", reason="peers are an optional extra")
    given = columns(name)
    expected, *_ = module.LigerFusedLinearDPOFunction.preference_loss_fn(
        *(given[k] for k in ("logp_w", "logp_l")),
        torch.zeros(6, 1),  # targets, of which it reads the number of rows
        *(given[k] for k in ("ref_logp_w", "ref_logp_l")),
        loss_type=loss_type,
        **{"beta": 0.1, **theirs},
    )
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if name == "exo" else {}  # its epsilon is float32
    assert_close(losses_of(name, given, **hyper).mean(), expected, **tolerance)


# --- Extreme inputs ---

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

NEARLY_CERTAIN = [
    # chosen odds 1e7: 1e-7 + 0.1 log(1 + e^(-1.854587 - 16.118096))
    (-1e-7, -2.0, 1.01565176494e-7),
    # e^-1e-8 is 1 in float32; to first order 1e-8 (1 + 0.1 * odds(-2)), odds(-2) = 1 / (e^2 - 1) = 0.1565176
    (-1e-8, -2.0, 1.01565176434e-8),
    # 2 + 0.1 * 17.972682
    (-2.0, -1e-7, 3.79726821587),
    # a certain chosen completion: infinite odds, nothing left to lose
    (0.0, -2.0, 0.0),
]


@pytest.mark.parametrize(("logp_w", "logp_l", "expected"), NEARLY_CERTAIN)
def test_orpo_near_certainty(logp_w, logp_l, expected):
    given = {"logp_w": torch.tensor([logp_w]), "logp_l": torch.tensor([logp_l])}
    losses, gradients = losses_and_gradients("orpo", given | {k: torch.tensor([1]) for k in ("len_w", "len_l")})
    assert_close(losses, torch.tensor([expected]), rtol=1e-6, atol=1e-11)
    assert all(g.isfinite().all() for g in gradients.values()), gradients


BEYOND = (-1000.0, -200.0, -100.0, -88.0, -1.0, 0.0, 1.0, 88.0, 100.0, 1000.0)


@BOTH
@pytest.mark.parametrize(
    "hyper", [{"divergence": d} for d in F] + [{"divergence": "alpha", "alpha": a} for a in (1e-3, 0.999)], ids=str
)
def test_f_dpo_beyond_the_range_of_exp(hyper, dtype):
    grid = torch.tensor(BEYOND, dtype=dtype)
    ratio_w, ratio_l = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    given = {"logp_w": ratio_w - 1500, "logp_l": ratio_l - 1500}
    given |= dict.fromkeys(("ref_logp_w", "ref_logp_l"), torch.full_like(ratio_w, -1500))
    losses, gradients = losses_and_gradients("f_dpo", given, **hyper)
    assert losses.isfinite().all() and (losses >= 0).all()
    assert all(g.isfinite().all() for g in gradients.values())
    assert (gradients["logp_w"] <= 0).all() and (gradients["logp_l"] >= 0).all()
    assert_close(losses[ratio_w == ratio_l], torch.full((10,), LN2, dtype=dtype))
    # where the rewards fit: g(1000) - g(-1) and the like
    fits = (ratio_w >= -1) & (ratio_l >= -1)
    a = {"forward_kl": 1.0, "reverse_kl": 0.0}.get(hyper["divergence"], hyper.get("alpha", 0.5))

    def reward(r):
        if hyper["divergence"] == "js":
            return LN2 - softplus(-r)
        return (1 - torch.exp(-a * r)) / a if a else r  # forward_kl up to a constant

    expected = softplus(-0.1 * (reward(ratio_w[fits].double()) - reward(ratio_l[fits].double())))
    assert_close(losses[fits].double(), expected, rtol=1e-4 if dtype is torch.float32 else 1e-9, atol=1e-6)
    # the worse the chosen completion, the higher the loss
    assert (losses.view(10, 10).diff(dim=0) <= 1e-6).all() and (losses.view(10, 10).diff(dim=1) >= -1e-6).all()


@BOTH
def test_odpo_of_the_narrowest_gaps(dtype):
    given = columns("odpo", dtype)
    tiny = torch.tensor([torch.finfo(dtype).tiny, 1e-30, 1e30], dtype=dtype)
    given |= {"score_w": tiny, "score_l": torch.zeros(3, dtype=dtype)}
    losses, gradients = losses_and_gradients("odpo", given)
    h = torch.tensor([0.4, -0.3, 1.3], dtype=torch.float64)
    expected = torch.log1p(tiny.double() * torch.exp(-h))
    assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in gradients.values())


@BOTH
@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("variant", ["soft", "survey"])
def test_sppo_at_certainty(prob, variant, dtype):
    # soft: targets +-500; survey: log 2 for the winner, log 2 - 1000 for the loser
    given = columns("sppo", dtype) | {"prob_w": torch.full((3,), prob, dtype=dtype)}
    winner, loser = (500, -500) if variant == "soft" else (LN2, LN2 - 1000)
    target_w, target_l = (winner, loser) if prob else (loser, winner)
    losses, gradients = losses_and_gradients("sppo", given, variant=variant)
    dw, dl = torch.tensor([2.0, -1, 15]), torch.tensor([-2.0, 2, 2])
    expected = ((dw - target_w) ** 2 + (dl - target_l) ** 2).to(dtype)
    assert_close(losses, expected, rtol=1e-6, atol=0)
    assert_close(gradients["logp_w"], 2 * (dw - target_w).to(dtype), rtol=1e-6, atol=1e-4)


@BOTH
def test_exo_of_decided_pairs(dtype):
    # q log q = 0 at q = 0: what remains is -log(1 - eps) or -log eps
    h = torch.tensor([-2000.0, 2000.0], dtype=dtype)
    given = {"logp_w": h / 0.1} | dict.fromkeys(("logp_l", "ref_logp_w", "ref_logp_l"), h * 0)
    losses, gradients = losses_and_gradients("exo", given)
    assert_close(losses, torch.tensor([-math.log(0.001), -math.log(0.999)], dtype=dtype), rtol=1e-5, atol=1e-8)
    assert not gradients["logp_w"].any() and not gradients["logp_l"].any()


@BOTH
def test_beta_dpo_keeps_someone(dtype):
    # weights that all underflow, no spread yet, a single pair
    given = columns("beta_dpo", dtype)
    far, still = given | {"m0": given["m0"] + 1e4}, given | {"s": given["s"] * 0}
    for case in (far, still, {k: v[:1] if v.dim() else v for k, v in given.items()}):
        for keep in (0.1, 0.8, 1.0):
            losses, gradients = losses_and_gradients("beta_dpo", case, keep=keep)
            assert losses.isfinite().all()
            assert losses.count_nonzero() == max(1, math.floor(keep * len(losses)))
            assert all(g.isfinite().all() for g in gradients.values())


def test_cringe_of_an_empty_rejected_completion_is_the_chosen_likelihood():
    given = columns("cringe", source=EXTREME)
    empty = given | {"mask": torch.zeros_like(given["mask"])}
    gate = sigmoid(given["logp_l"] - given["logp_w"])
    assert_close(losses_of("cringe", empty), -gate * given["logp_w"])


# --- Errors ---

OUT_OF_RANGE = [
    *(("robust_dpo", "label_smoothing", 0.5), ("ipo", "beta", 0.0), ("orpo", "lam", -0.1)),
    *(("slic", "delta", -1.0), ("slic", "lam", -0.1), ("dpop", "lam", -1.0), ("cpo", "alpha", -1.0)),
    *(("exo", "label_smoothing", 0.0), ("exo", "label_smoothing", 1.0)),
    *(("npo", "beta", 0.0), ("sppo", "beta", 0.0), ("discopop", "tau", 0.0), ("discopop", "tau", -0.05)),
    *(("f_dpo", "alpha", 0.0), ("f_dpo", "alpha", 1.0), ("f_dpo", "alpha", -0.5)),
    *(("beta_dpo", "keep", 0.0), ("beta_dpo", "keep", 1.5), ("beta_dpo", "keep", -0.1)),
    *(("tdpo", "version", 0), ("tdpo", "version", 3), ("cringe", "tau", 0.0), ("cringe", "tau", -1.0)),
    *(("ipo", "variant", "median"), ("dpop", "variant", "smaug"), ("rso", "loss", "squared")),
    *(("cpo", "nll", "tokens"), ("gpo", "f", "tanh"), ("odpo", "offset", "sqrt"), ("rdpo", "variant", "paper")),
    *(("sppo", "variant", "easy"), ("f_dpo", "divergence", "kl")),
]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyperparameter_out_of_range(name, key, value):
    more = {"divergence": "alpha"} if (name, key) == ("f_dpo", "alpha") else {}
    with pytest.raises(ValueError, match=key) as caught:
        losses_of(name, **{**more, key: value})
    assert str(value) in str(caught.value)


AT_THE_EDGE = [
    *(("slic", "delta", 0.0), ("slic", "lam", 0.0), ("dpop", "lam", 0.0), ("cpo", "alpha", 0.0), ("orpo", "lam", 0.0)),
    *(("dpo", "label_smoothing", 0.0), ("robust_dpo", "label_smoothing", 0.0), ("aot", "label_smoothing", 0.0)),
    *(("beta_dpo", "keep", 1.0), ("beta_dpo", "alpha", 0.0), ("odpo", "alpha", 0.0), ("rdpo", "alpha", 0.0)),
    *(("tdpo", "alpha", 0.0), ("cringe", "alpha", 0.0), ("cringe", "b", -1.0), ("simpo", "gamma", 0.0)),
    *(("exo", "label_smoothing", 1e-9), ("nn", "gamma", 0.0), ("nn", "alpha", 0.0)),
]


@pytest.mark.parametrize(("name", "key", "value"), AT_THE_EDGE)
def test_hyperparameter_at_the_edge_of_its_range(name, key, value):
    assert losses_of(name, **{key: value}).isfinite().all()


@pytest.mark.parametrize("offset", ["log", "identity"])
@pytest.mark.parametrize("gap", [0.0, -0.5, math.nan])
def test_odpo_names_the_pair_whose_scores_are_not_ordered(offset, gap):
    given = columns("odpo")
    given["score_w"][1] = given["score_l"][1] + gap
    with pytest.raises(ValueError, match=r"score_w.*\b1\b|\b1\b.*score_w") as caught:
        losses_of("odpo", given, offset=offset)
    assert "score_l" in str(caught.value)


@pytest.mark.parametrize("variant", ["soft", "survey"])
@pytest.mark.parametrize("prob", [-0.01, 1.01, math.nan])
def test_sppo_names_the_pair_whose_probability_is_none(variant, prob):
    given = columns("sppo")
    given["prob_w"][1] = prob
    with pytest.raises(ValueError, match=r"prob_w.*\b1\b|\b1\b.*prob_w"):
        losses_of("sppo", given, variant=variant)


# --- What a method says about itself ---

DEFAULTS = {
    "dpo": {"beta": 0.1, "label_smoothing": 0},
    "robust_dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "slic": {"delta": 1, "lam": 0.1},
    "rso": {"beta": 0.1, "loss": "hinge"},
    "dpop": {"beta": 0.3, "lam": 50, "variant": "paper"},
    "beta_dpo": {"beta": 0.1, "alpha": 0.6, "keep": 0.8},
    "ipo": {"beta": 0.1, "variant": "mean"},
    "gpo": {"beta": 0.1, "f": "logistic"},
    "odpo": {"beta": 0.1, "alpha": 1, "offset": "log"},
    "rdpo": {"beta": 0.1, "alpha": 0.01, "variant": "derived"},
    "simpo": {"beta": 2, "gamma": 1, "gamma_beta_ratio": None, "label_smoothing": 0},
    "orpo": {"lam": 0.1},
    "cpo": {"beta": 0.1, "alpha": 1, "nll": "sum", "label_smoothing": 0},
    "sppo": {"beta": 0.001, "variant": "soft"},
    "dno": {"beta": 0.1, "label_smoothing": 0},
    "token_dpo": {"beta": 0.1, "label_smoothing": 0},
    "f_dpo": {"beta": 0.1, "divergence": "reverse_kl", "alpha": 0.5},
    "tdpo": {"beta": 0.1, "alpha": 0.5, "version": 2},
    "nn": {"gamma": 0.1, "alpha": 0.1},
    "npo": {"beta": 0.1},
    "cringe": {"alpha": 1, "b": 0, "tau": 1},
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "nca": {"beta": 0.1},
    "bco_pair": {"beta": 0.1},
    "aot": {"beta": 0.1, "label_smoothing": 0},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "discopop": {"beta": 0.1, "tau": 0.05},
    "dpo_norm": {"beta": 0.1},
    "sft": {},
}
NEEDS = {  # beyond log-probs under policy and reference
    "slic": {"logp_sft"},
    **{n: {"len_w", "len_l"} for n in ("ipo", "rdpo", "simpo", "orpo", "dpo_norm")},
    "cpo": {"len_w"},
    "odpo": {"score_w", "score_l"},
    "sppo": {"prob_w"},
    "tdpo": {"kl_w", "kl_l"},
    "beta_dpo": {"m0", "s"},
    "cringe": {"pos_score", "neg_score", "mask"},
    "nn": {"logps", "ref_logps", "ref_pos_logp_l", "mask"},
}
REFERENCE_FREE = {"slic", "simpo", "orpo", "cpo", "sft", "cringe"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_signature(name):
    method = xf.METHODS[name]
    assert method.defaults == DEFAULTS[name]
    sides = {"sft": "w", "npo": "l", "nn": "l"}.get(name, "wl")
    expected = {f"logp_{s}" for s in sides} | NEEDS.get(name, set())
    if name not in REFERENCE_FREE | {"nn"}:
        expected |= {f"ref_logp_{s}" for s in sides}
    assert set(method.inputs) == expected
    assert method.needs_reference == (name not in REFERENCE_FREE)
    batch = dict.fromkeys(("beta_dpo", "aot", "aot_unpaired"), "batch")
    assert method.unit == {"nn": "list", **batch}.get(name, "pair")
