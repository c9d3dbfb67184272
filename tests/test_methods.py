"""What every method computes: literal values, gradients, the papers' claims, peers, extremes, errors, cards.

Literal values were worked out by hand from the equations with 30-digit arithmetic; the line above each one
gives the steps. "S n" is equation n of the survey. Tests over `METHODS` build a method's columns from the
names in its `.inputs`, so a new method is covered as soon as it is registered.
"""

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import xpo_fast as xf
from xpo_fast.methods.unpaired import kto_kl

METHODS = sorted(xf.METHODS)

# Pairs: log-ratios dw = (2, -1, 15), dl = (-2, 2, 2), so dw - dl = (4, -3, 13): a won, a lost and a decided
# pair, either side of the kinks at beta * (dw - dl) = 1 and at dw = 0. Mean log-probs (-2, -3.5, -3.75) and
# (-3.75, -2.25, -8).
# Rows: log-ratios (2, -1, 15, -2), and less the reference point (0.5, -2.5, 13.5, -3.5).
COLUMNS = {
    "logp_w": [-10.0, -7.0, -30.0],
    "ref_logp_w": [-12.0, -6.0, -45.0],
    "logp_l": [-15.0, -9.0, -40.0],
    "ref_logp_l": [-13.0, -11.0, -42.0],
    "len_w": [5, 2, 8],
    "len_l": [4, 4, 5],
    "logp": [-10.0, -7.0, -30.0, -15.0],
    "ref_logp": [-12.0, -6.0, -45.0, -13.0],
    "length": [5, 2, 8, 4],
    "desirable": [True, False, True, False],
    "kl": 1.5,
}
OPTIONAL = {"logp_sft": [-4.0, -5.0, -6.0]}  # columns a method fills in by itself
WITH_GRADIENT = ("logp_w", "logp_l", "logp_sft", "logp")

# Hyperparameters beside the defaults that take another path through the method.
VARIANTS = {
    "dpo": [{"label_smoothing": 0.2}],
    "ipo": [{"variant": "sum"}],
    "simpo": [{"gamma_beta_ratio": 0.3}, {"label_smoothing": 0.2}],
    "cpo": [{"nll": "mean"}, {"label_smoothing": 0.2}],
    "slic": [{"delta": 7.0}],
    "rso": [{"loss": "sigmoid"}],
    "dpop": [{"variant": "survey"}, {"lam": 2.0}],
    "kto": [{"lambda_d": 1.5, "lambda_u": 2.0}],
}
EVERY_PATH = [(name, hyper) for name in METHODS for hyper in [{}, *VARIANTS.get(name, [])]]
every_path = pytest.mark.parametrize(("name", "hyper"), EVERY_PATH, ids=[f"{n}-{h}" for n, h in EVERY_PATH])


def columns(name, dtype=torch.float64, *, optional=False, source=COLUMNS):
    """The columns that method `name` asks for, as tensors; `optional` adds those it can do without."""
    known = {**source, **OPTIONAL} if optional else source
    out = {}
    for key in xf.METHODS[name].inputs:
        if key not in {**COLUMNS, **OPTIONAL}:
            pytest.fail(f"{name} takes {key!r}, for which this file has no values: add them to COLUMNS")
        if key in known:
            value = torch.tensor(known[key])
            out[key] = value.to(dtype) if value.is_floating_point() else value
    return out


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def losses_of(name, given=None, **hyper):
    return xf.METHODS[name](**(columns(name) if given is None else given), **hyper)[0]


def losses_and_gradients(name, given, **hyper):
    """The losses, and d(sum of losses) for each column that carries gradient."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in WITH_GRADIENT}
    losses = losses_of(name, {**given, **leaves}, **hyper)
    return losses, dict(zip(leaves, torch.autograd.grad(losses.sum(), tuple(leaves.values())), strict=True))


def swapped(given):
    """The same pairs with the label flipped."""
    return {k[:-1] + {"w": "l", "l": "w"}[k[-1]]: v for k, v in given.items()}


LITERALS = [
    # h = 0.1 * (4, -3, 13) = (0.4, -0.3, 1.3); log(1 + e^-h)
    ("dpo", {}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # h = (1.2, -0.9, 3.9)
    ("dpo", {"beta": 0.3}, [0.263282467338, 1.24115387473, 0.0200397672604]),
    # S12: log(1 + e^-h) + 0.1 h, since -log s(-h) = h - log s(h): 0.513015 + 0.04, 0.854355 - 0.03, ...
    ("dpo", {"label_smoothing": 0.1}, [0.5530152524, 0.824355244469, 0.371008453833]),
    # [(1 - 2e) log(1 + e^-h) - e h] / (1 - 2e) = log(1 + e^-h) - h e / (1 - 2e); e = 0.1: minus h / 8
    ("robust_dpo", {}, [0.4630152524, 0.891855244469, 0.078508453833]),
    # e = 0.25: minus h / 2
    ("robust_dpo", {"label_smoothing": 0.25}, [0.3130152524, 1.00435524447, -0.408991546167]),
    # target 1 / (2 * 0.1) = 5; (2/5 + 2/4 - 5)^2 = 4.1^2, (-1/2 - 2/4 - 5)^2 = 6^2, (15/8 - 2/5 - 5)^2
    ("ipo", {}, [16.81, 36.0, 12.425625]),
    # S17 as printed: (4 - 5)^2, (-3 - 5)^2, (13 - 5)^2
    ("ipo", {"variant": "sum"}, [1.0, 64.0, 64.0]),
    # target 1: (0.9 - 1)^2, (-1 - 1)^2, (1.475 - 1)^2
    ("ipo", {"beta": 0.5}, [0.01, 4.0, 0.225625]),
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
    # S3: margins logp_w - logp_l = (5, 2, 10) are beyond delta = 1, which leaves 0.1 * (10, 7, 30)
    ("slic", {}, [1.0, 0.7, 3.0]),
    # 8 - (5, 2, 10), not below 0, = (3, 6, 0), plus (1, 0.7, 3)
    ("slic", {"delta": 8.0}, [4.0, 6.7, 3.0]),
    # ... plus 0.5 * (4, 5, 6) for a supervised completion of its own
    ("slic", {"delta": 8.0, "lam": 0.5, "logp_sft": OPTIONAL["logp_sft"]}, [5.0, 8.5, 3.0]),
    # 1 - (0.4, -0.3, 1.3), not below 0
    ("rso", {}, [0.6, 1.3, 0.0]),
    ("rso", {"loss": "sigmoid"}, [0.5130152524, 0.854355244469, 0.241008453833]),
    # h = 0.3 * (4, -3, 13) = (1.2, -0.9, 3.9); the second pair has relu(-dw) = 1: -0.9 - 0.3 * 50 = -15.9
    ("dpop", {}, [0.263282467338, 15.9000001244, 0.0200397672604]),
    # lam = 2: -0.9 - 0.6 = -1.5
    ("dpop", {"lam": 2.0}, [0.263282467338, 1.70141327798, 0.0200397672604]),
    # S13: the penalty stands outside the sigmoid, 1.2411539 + 50 * 1
    ("dpop", {"variant": "survey"}, [0.263282467338, 51.2411538747, 0.0200397672604]),
    # S32-34: 1 - s(0.05), 1 - s(0.25), 1 - s(1.35), 1 - s(0.35)
    ("kto", {}, [0.487502603516, 0.437823499114, 0.205870371801, 0.413382421083]),
    # 2 and 3 times those
    ("kto", {"lambda_d": 2, "lambda_u": 3}, [0.975005207032, 1.31347049734, 0.411740743602, 1.24014726325]),
    # 1 - s(0.25), 1 - s(1.25), 1 - s(6.75), 1 - s(1.75)
    ("kto", {"beta": 0.5}, [0.437823499114, 0.222700138825, 0.00116951026505, 0.148047198032]),
    ("sft", {}, [10.0, 7.0, 30.0]),
]


@pytest.mark.parametrize(("name", "hyper", "expected"), LITERALS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-10)], ids=str)
def test_literal(name, hyper, expected, dtype, rtol):
    hyper = {k: torch.tensor(v, dtype=dtype) if k in OPTIONAL else v for k, v in hyper.items()}
    losses = losses_of(name, columns(name, dtype), **hyper)
    assert_close(losses, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol / 10)


@every_path
def test_gradcheck(name, hyper):
    given = columns(name, optional=True)
    names = [k for k in given if k in WITH_GRADIENT]

    def method(*tensors):
        return losses_of(name, {**given, **dict(zip(names, tensors, strict=True))}, **hyper)

    assert torch.autograd.gradcheck(method, [given[k].clone().requires_grad_() for k in names])


@every_path
def test_one_loss_a_unit_and_metrics_detached(name, hyper):
    given = columns(name, torch.float32)
    leaves = {k: v.clone().requires_grad_() if k in WITH_GRADIENT else v for k, v in given.items()}
    losses, metrics = xf.METHODS[name](**leaves, **hyper)
    (units,) = next(v.shape for v in given.values() if v.dim())
    assert losses.shape == (units,) and losses.dtype == torch.float32 and losses.requires_grad
    for key, value in metrics.items():
        assert value.shape == (units,), f"{key}: one entry a unit, got {tuple(value.shape)}"
        assert not value.requires_grad, key
    for i in range(units):  # no unit looks at another
        alone = {k: v[i : i + 1] if v.dim() else v for k, v in given.items()}
        assert_close(losses_of(name, alone, **hyper), losses[i : i + 1].detach())
    nothing = {k: v[:0] if v.dim() else v for k, v in given.items()}
    losses, gradients = losses_and_gradients(name, nothing, **hyper)
    assert losses.shape == (0,) and all(g.shape == (0,) for g in gradients.values())


def test_metrics_carry_trl_names():
    _, metrics = xf.METHODS["dpo"](**columns("dpo"))
    # 0.1 * dw, 0.1 * dl
    expected = {"rewards/chosen": (0.2, -0.1, 1.5), "rewards/rejected": (-0.2, 0.2, 0.2)}
    expected |= {"rewards/margins": (0.4, -0.3, 1.3), "rewards/accuracies": (1, 0, 1)}
    for key, value in expected.items():
        assert_close(metrics[key].double(), f64(*value))


# --- What the papers prove ---


@pytest.mark.parametrize("hyper", [{}, {"beta": 5.0}, {"label_smoothing": 0.3}], ids=str)
def test_dpo_is_ln_2_at_the_reference(hyper):
    given = columns("dpo")
    given |= {"ref_logp_w": given["logp_w"], "ref_logp_l": given["logp_l"]}
    assert_close(losses_of("dpo", given, **hyper), f64(*[0.6931471805599453] * 3))


def test_dpo_gradient_is_the_papers():
    # S11, beta = 0.1: -0.1 s(-0.4), -0.1 s(0.3), -0.1 s(-1.3)
    expected = f64(-0.0401312339888, -0.0574442516812, -0.0214165016957)
    _, gradients = losses_and_gradients("dpo", columns("dpo"))
    assert_close(gradients["logp_w"], expected)
    assert_close(gradients["logp_l"], -expected)


ONLY_DIFFERENCES = [("dpo", {}), ("robust_dpo", {}), ("rso", {}), ("simpo", {})]
ONLY_DIFFERENCES += [("ipo", {"variant": "sum"}), ("cpo", {"alpha": 0.0})]


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


def test_rso_is_flat_beyond_the_margin():
    losses, gradients = losses_and_gradients("rso", columns("rso"))
    assert losses[2] == 0
    assert_close(gradients["logp_w"], f64(-0.1, -0.1, 0))
    assert_close(gradients["logp_l"], f64(0.1, 0.1, 0))
    assert_close(losses_of("rso", loss="sigmoid"), losses_of("dpo"))


def test_slic_beyond_the_margin_is_its_regulariser():
    given = columns("slic", optional=True)
    losses, gradients = losses_and_gradients("slic", given, delta=1.0, lam=0.3)
    assert_close(losses, -0.3 * given["logp_sft"])
    assert not gradients["logp_w"].any() and not gradients["logp_l"].any()
    assert_close(gradients["logp_sft"], f64(-0.3, -0.3, -0.3))
    _, gradients = losses_and_gradients(
        "slic", columns("slic"), delta=1.0, lam=0.3
    )  # by default of the chosen
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


@pytest.mark.parametrize(("name", "hyper"), [("dpo", {}), ("simpo", {"gamma": 0.0}), ("cpo", {"alpha": 0.0})])
def test_label_smoothing_mixes_the_pair_and_its_flip(name, hyper):
    given = {k: v for k, v in columns(name).items() if (name, k) != ("cpo", "len_w")}
    clean, flipped = losses_of(name, given, **hyper), losses_of(name, swapped(given), **hyper)
    for eps in (0.1, 0.25, 0.4):
        assert_close(losses_of(name, given, label_smoothing=eps, **hyper), (1 - eps) * clean + eps * flipped)


def test_smoothed_dpo_is_convex_and_least_where_the_probability_is_right():
    margin = torch.linspace(-8, 8, 81, dtype=torch.float64)
    margin[-1] = math.log(0.9 / 0.1)  # s(h) = 1 - eps
    given = {"logp_w": margin} | dict.fromkeys(("logp_l", "ref_logp_w", "ref_logp_l"), margin * 0)
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


def test_kto_mirrors_weighs_and_saturates():
    ratio = f64(-4000, -60, -2, 0, 1.5, 3, 60, 4000)
    given = {"logp": ratio - 7, "ref_logp": torch.full_like(ratio, -7), "kl": columns("kto")["kl"]}
    up, down = given | {"desirable": ratio > -9999}, given | {"desirable": ratio < -9999}
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
    with pytest.raises(ValueError, match="row"):
        kto_kl(given["logp"][:1], given["ref_logp"][:1])


# --- TRL 1.16, called on tensors with a stand-in for the trainer ---


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever TRL and what it imports have to say on import
        module = pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
        if not module.__version__.startswith("1.16."):
            pytest.skip(f"calls the trainers' internals as of TRL 1.16, found {module.__version__}")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.kto_trainer import KTOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def trainer_like(**fields):
    """What the trainers' loss methods read from `self`."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics, model = defaultdict(lambda: defaultdict(list)), SimpleNamespace(training=False)
    fields |= {"aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0}
    return SimpleNamespace(accelerator=accelerator, model=model, _metrics=metrics, **fields)


def scored(logps, lengths):
    """A model whose completions have these summed log-probs (B,) and lengths (B,), and its batch."""
    mask = torch.arange(1, 1 + int(lengths.max())) <= lengths[:, None]
    log_probs = torch.where(mask, (logps / lengths)[:, None], 0.0)
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    completion_mask = F.pad(mask, (1, 0)).long()  # one prompt token
    ids = torch.zeros_like(completion_mask)
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion_mask}
    return lambda **_: outputs, inputs


def trl_dpo(trl, given, loss_type, **fields):
    model, inputs = scored(*(torch.cat([given[k + "_w"], given[k + "_l"]]) for k in ("logp", "len")))
    inputs |= {"ref_chosen_logps": given["ref_logp_w"], "ref_rejected_logps": given["ref_logp_l"]}
    fields |= {"loss_types": [loss_type], "loss_weights": [1.0], "use_weighting": False}
    trainer = trainer_like(f_divergence_type="reverse_kl", ld_alpha=None, **fields)
    return trl.dpo._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_kto(trl, given, **fields):
    model, inputs = scored(given["logp"], given["length"])
    shifted = given["kl"].expand_as(given["logp"])  # mismatched pairs whose mean log-ratio is kl
    inputs |= {"label": given["desirable"], "ref_logps": given["ref_logp"], "ref_KL_logps": shifted * 0}
    trainer = trainer_like(loss_type="kto", calculate_KL=True, _compute_kl_logps=lambda *_: shifted, **fields)
    return trl.kto._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_cpo(trl, given, loss_type, **fields):
    logps = [given["logp_" + s] / (given["len_" + s] if loss_type == "simpo" else 1) for s in "wl"]
    trainer = trainer_like(alpha=0.0, loss_type=loss_type, label_smoothing=0.0, **fields)
    return trl.cpo.cpo_loss(trainer, *logps)[0].mean()


def trl_orpo(trl, given, beta):
    means = [given["logp_" + s] / given["len_" + s] for s in "wl"]
    return (-means[0] - trl.orpo.odds_ratio_loss(trainer_like(beta=beta), *means)[0]).mean()


PEERS = [  # name, our hyperparameters, TRL's function, its hyperparameters
    ("dpo", {"beta": 0.3}, trl_dpo, {"loss_type": "sigmoid", "beta": 0.3}),
    ("rso", {}, trl_dpo, {"loss_type": "hinge", "beta": 0.1}),
    ("ipo", {}, trl_dpo, {"loss_type": "ipo", "beta": 0.1}),  # TRL too divides by the length
    ("robust_dpo", {}, trl_dpo, {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1}),
    ("kto", {"lambda_d": 2}, trl_kto, {"beta": 0.1, "desirable_weight": 2.0, "undesirable_weight": 1.0}),
    # TRL adds CPO's likelihood term elsewhere, as a token mean: alpha = 0 here
    ("cpo", {"alpha": 0.0}, trl_cpo, {"loss_type": "sigmoid", "beta": 0.1}),
    ("simpo", {"gamma": 0.5}, trl_cpo, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
    ("orpo", {"lam": 0.4}, trl_orpo, {"beta": 0.4}),  # TRL's beta is the paper's lambda
]


@pytest.mark.parametrize(("name", "hyper", "peer", "theirs"), PEERS, ids=[p[0] for p in PEERS])
def test_agrees_with_trl(trl, name, hyper, peer, theirs):
    given = {k: torch.tensor(v) for k, v in COLUMNS.items()}
    given |= {
        k: v.double().requires_grad_(k in WITH_GRADIENT) for k, v in given.items() if v.is_floating_point()
    }
    mine = {k: given[k] for k in xf.METHODS[name].inputs}
    leaves = [v for v in mine.values() if v.requires_grad]
    ours, expected = losses_of(name, mine, **hyper).mean(), peer(trl, given, **theirs)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if name == "orpo" else {}  # TRL's odds ratio is float32
    assert_close(ours, expected, **tolerance)
    assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), **tolerance)


def test_sft_over_its_tokens_is_trls(trl):
    given = {k: torch.tensor(v) for k, v in COLUMNS.items()}
    expected = trl_dpo(trl, given, "sft", beta=0.1)
    assert_close(losses_of("sft").sum().float() / given["len_w"].sum(), expected)


# --- Extreme inputs, float32 ---

# In turn: a hopeless long chosen, log-ratios -50 and +50; a sure chosen token, +50 and -50; a tie; a sure
# rejected token; both sure; both so sure over many tokens that e^(mean log-prob) rounds to 1.
EXTREME = {
    "logp_w": [-2000.0, -1e-7, -3.0, -50.0, -1e-7, -1e-7],
    "ref_logp_w": [-1950.0, -50.0, -3.0, -1e-7, -1e-7, -1.0],
    "logp_l": [-1.0, -2000.0, -3.0, -1e-7, -2e-7, -3e-7],
    "ref_logp_l": [-51.0, -1950.0, -3.0, -50.0, -1e-7, -1.0],
    "len_w": [400, 1, 1, 1, 1, 100],
    "len_l": [1, 400, 1, 1, 1, 100],
    "logp": [-2000.0, -1e-7, -3.0, -50.0, -1e-7],
    "ref_logp": [-1.0, -2000.0, -3.0, -1e-7, -50.0],
    "desirable": [True, False, True, False, True],
    "kl": 0.0,
}


@every_path
def test_extremes_are_finite_and_exact(name, hyper):
    single = columns(name, torch.float32, source=EXTREME)
    double = {k: v.double() if v.is_floating_point() else v for k, v in single.items()}
    losses, gradients = losses_and_gradients(name, single, **hyper)
    true_losses, true_gradients = losses_and_gradients(name, double, **hyper)
    assert true_losses.isfinite().all()
    assert_close(losses, true_losses.float(), rtol=1e-5, atol=1e-6)
    for key, value in gradients.items():
        assert true_gradients[key].isfinite().all()
        assert_close(value, true_gradients[key].float(), rtol=1e-4, atol=1e-7)


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
    losses, gradients = losses_and_gradients(
        "orpo", given | {k: torch.tensor([1]) for k in ("len_w", "len_l")}
    )
    assert_close(losses, torch.tensor([expected]), rtol=1e-6, atol=1e-11)
    assert all(g.isfinite().all() for g in gradients.values()), gradients


# --- Errors ---

EVERY_COLUMN = [(n, k) for n in METHODS for k in xf.METHODS[n].inputs]
NEEDED_WHEN = {("cpo", "len_w"): {"nll": "mean"}}


@pytest.mark.parametrize(("name", "key"), [c for c in EVERY_COLUMN if c[1] not in OPTIONAL])
def test_missing_column_is_named(name, key):
    given = {k: v for k, v in columns(name).items() if k != key}
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        losses_of(name, given, **NEEDED_WHEN.get((name, key), {}))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [{}, {"logp_x": torch.zeros(3)}, {"betta": 0.1}], ids=list)
def test_wrong_names_are_answered_with_the_right_ones(name, wrong):
    given = columns(name) | wrong if wrong else {}
    with pytest.raises(ValueError, match=next(iter(wrong), "missing")) as caught:
        xf.METHODS[name](**given)
    for word in (name, *xf.METHODS[name].inputs, *xf.METHODS[name].defaults):
        assert word in str(caught.value)


OUT_OF_RANGE = [(n, "beta", -0.1) for n in METHODS if "beta" in xf.METHODS[n].defaults]
for eps in (-0.1, 1.1, math.nan):
    OUT_OF_RANGE += [
        (n, "label_smoothing", eps) for n in METHODS if "label_smoothing" in xf.METHODS[n].defaults
    ]
OUT_OF_RANGE += [("robust_dpo", "label_smoothing", 0.5), ("ipo", "beta", 0.0), ("orpo", "lam", -0.1)]
OUT_OF_RANGE += [
    ("slic", "delta", -1.0),
    ("slic", "lam", -0.1),
    ("dpop", "lam", -1.0),
    ("cpo", "alpha", -1.0),
]
OUT_OF_RANGE += [("kto", "lambda_d", -1.0), ("kto", "lambda_u", -1.0), ("ipo", "variant", "median")]
OUT_OF_RANGE += [("dpop", "variant", "smaug"), ("rso", "loss", "squared"), ("cpo", "nll", "tokens")]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyperparameter_out_of_range(name, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        losses_of(name, **{key: value})
    assert str(value) in str(caught.value)
    if isinstance(value, str):
        assert xf.METHODS[name].defaults[key] in str(caught.value), "lists the choices"


MISSHAPEN = {"short": lambda x: x[:-1], "one": lambda x: x[:1], "2d": lambda x: x[:, None]}


@pytest.mark.parametrize(("name", "key"), [c for c in EVERY_COLUMN if c[1] != "kl" and c[0] != "sft"])
@pytest.mark.parametrize("misshape", MISSHAPEN.values(), ids=MISSHAPEN)
def test_shapes_that_do_not_match(name, key, misshape):
    given = columns(name, optional=True)
    with pytest.raises(ValueError, match=key):
        losses_of(name, given | {key: misshape(given[key])})


def test_the_reference_point_is_one_number():
    with pytest.raises(ValueError, match="kl"):
        losses_of("kto", columns("kto") | {"kl": torch.full((4,), 1.5).double()})


# --- What a method says about itself ---

DEFAULTS = {
    "dpo": {"beta": 0.1, "label_smoothing": 0},
    "robust_dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "slic": {"delta": 1, "lam": 0.1},
    "rso": {"beta": 0.1, "loss": "hinge"},
    "dpop": {"beta": 0.3, "lam": 50, "variant": "paper"},
    "ipo": {"beta": 0.1, "variant": "mean"},
    "simpo": {"beta": 2, "gamma": 1, "gamma_beta_ratio": None, "label_smoothing": 0},
    "orpo": {"lam": 0.1},
    "cpo": {"beta": 0.1, "alpha": 1, "nll": "sum", "label_smoothing": 0},
    "kto": {"beta": 0.1, "lambda_d": 1, "lambda_u": 1},
    "sft": {},
}
ATTRIBUTES = ["RM1", "RM2", "RM3", "RM4", "F1", "F2", "F3", "RL1", "RL2", "RL3", "RL4", "O1", "O2"]
DPO_ROW = "Implicit Point Response Positive Preference Human Pair Reference Uncontrol KL Off Offline Separate"
CARDS = {  # arXiv id, row of the survey's Table 1 where it has one
    "dpo": ("2305.18290", DPO_ROW),
    "robust_dpo": ("2403.00409", None),
    "slic": ("2305.10425", "- - - - Preference Human Pair Free Uncontrol KL Hybrid Offline Separate"),
    "rso": ("2309.06657", None),
    "dpop": ("2402.13228", DPO_ROW),
    "ipo": ("2310.12036", DPO_ROW.replace("Point", "Preference")),
    "simpo": ("2405.14734", "- - - - Preference Human Pair Free Control - Off Offline Merge"),
    "orpo": ("2403.07691", "- - - - Preference Human Pair Free Uncontrol - Off Offline Merge"),
    # RL1 is Reference in the table, yet S54 has no reference
    "cpo": ("2401.08417", "Implicit Point Response Negative - Human - Free Uncontrol KL Off Offline Merge"),
    "kto": ("2402.01306", "- - - - Binary Human - Reference Uncontrol KL Off Offline Separate"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_signature(name):
    method = xf.METHODS[name]
    assert method.name == name and method.defaults == DEFAULTS[name]
    assert method.needs_reference == any(k.startswith("ref_") for k in method.inputs)
    assert (method.layout, method.unit) == (("unpaired", "row") if name == "kto" else ("pairwise", "pair"))


@pytest.mark.parametrize("name", METHODS)
def test_card_and_docstring(name):
    method = xf.METHODS[name]
    arxiv, row = CARDS.get(name, ("", None))
    assert method.card.paper and arxiv in method.card.paper
    assert method.card.equation and "=" in method.__doc__
    assert list(method.card.attributes) == ATTRIBUTES
    assert method.card.attributes["RL1"] == ("Reference" if method.needs_reference else "Free")
    if row:
        assert method.card.attributes == dict(zip(ATTRIBUTES, row.split(), strict=True))
