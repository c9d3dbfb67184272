"""What holds for every method of the registry: gradients, units, masks, extremes, errors, cards.

The tests run over `METHODS` on inputs made from each method's signature (`inputs.py`), so a new method of any layout
is covered as soon as it is registered. What each method computes is in test_pairwise.py, test_unpaired.py,
test_listwise.py, test_policy.py and test_reward.py.
"""

import math

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch.testing import assert_close

import xpo_fast as xf
from inputs import (
    EVERY_PATH,
    EXTREME,
    METHODS,
    WITH_GRADIENT,
    WITHOUT_DEFAULT,
    columns,
    losses_and_gradients,
    losses_of,
    pick,
    units_of,
)

# The table's rejected log-ratios tie, which leaves open whose gradient is whose: drawn pairs instead.
TIED = {"aot_unpaired": 5}


def generic(name, dtype=torch.float64, **options):
    return columns(name, dtype, units=TIED.get(name), **options)


def paths(condition=lambda name, hyper: True):
    """Parametrises over the methods and hyperparameters for which `condition` holds."""
    chosen = [(n, h) for n, h in EVERY_PATH if condition(n, h)]
    return pytest.mark.parametrize(("name", "hyper"), chosen, ids=[f"{n}-{h}" for n, h in chosen])


every_path = paths()


# --- Gradients ---

# Methods whose gradient is not that of their value, with the part that is held fixed. Their gradients are held
# against the papers' in the file of their layout.
STOP_GRADIENT = {
    "beta_dpo": lambda hyper: hyper.get("alpha") != 0.0,  # beta follows the batch's margins, detached
    "cringe": lambda hyper: True,  # the gate of S30
    "dro": lambda hyper: hyper.get("variant", "split") == "split",  # each network's own half of S38, S39
    "tdpo": lambda hyper: hyper.get("version", 2) == 2,  # the chosen completion's KL
    "cispo": lambda hyper: True,  # the clipped ratio is a weight
    "vespo": lambda hyper: True,  # so is its kernel of the ratio
    "nash_md": lambda hyper: True,  # the preference with its penalty is the reward
}


@every_path
def test_gradcheck(name, hyper):
    given = generic(name, optional=True)
    names = [k for k in given if k in WITH_GRADIENT]

    def method(*tensors):
        torch.manual_seed(0)  # whatever is sampled, the same for each difference
        return losses_of(name, {**given, **dict(zip(names, tensors, strict=True))}, **hyper)

    leaves = [given[k].clone().requires_grad_() for k in names]
    if name in STOP_GRADIENT and STOP_GRADIENT[name](hyper):
        with pytest.raises(GradcheckError):  # or else it needs no exemption
            torch.autograd.gradcheck(method, leaves)
    else:
        assert torch.autograd.gradcheck(method, leaves)


# --- Units ---


@every_path
def test_one_loss_a_unit_and_metrics_detached(name, hyper):
    given = columns(name, torch.float32)
    leaves = {k: v.clone().requires_grad_() if k in WITH_GRADIENT else v for k, v in given.items()}
    before = {k: v.detach().clone() for k, v in leaves.items()}
    losses, metrics = xf.METHODS[name](**leaves, **hyper)
    units = units_of(name, given)
    tokens = {tuple(given["mask"].shape)} if xf.METHODS[name].layout == "policy" else set()
    assert losses.shape in ({(units,)} | tokens if xf.METHODS[name].unit != "token" else tokens)
    assert losses.dtype == torch.float32 and losses.requires_grad
    for key, value in metrics.items():
        assert value.shape in {(units,), *tokens}, f"{key}: one entry a unit, got {value.shape}"
        assert not value.requires_grad, key
    assert_close({k: v.detach() for k, v in leaves.items()}, before, rtol=0, atol=0)  # inputs are left alone


@paths(lambda name, hyper: xf.METHODS[name].unit != "batch")
def test_no_unit_looks_at_another(name, hyper):
    given = columns(name)
    losses, gradients = losses_and_gradients(name, given, **hyper)
    for i in range(len(losses)):
        alone, its_gradients = losses_and_gradients(name, pick(name, given, slice(i, i + 1)), **hyper)
        assert_close(alone, losses[i : i + 1])
        for key, value in pick(name, gradients, slice(i, i + 1)).items():
            if "U" in xf.METHODS[name].axes(key)[0]:
                assert_close(its_gradients[key], value)


@paths(lambda name, hyper: name != "beta_dpo" or "keep" in hyper)  # else it draws the pairs that it keeps
def test_the_order_of_units_does_not_matter(name, hyper):
    given = generic(name)
    order = torch.arange(units_of(name, given)).flip(0)
    moved = pick(name, given, order)
    losses, gradients = losses_and_gradients(name, given, **hyper)
    same, moved_gradients = losses_and_gradients(name, moved, **hyper)
    assert_close(same.sum(), losses.sum())
    assert_close(moved_gradients, pick(name, gradients, order))


@every_path
@pytest.mark.parametrize("units", [0, 1])
def test_a_batch_of_none_and_of_one(name, hyper, units):
    given = pick(name, columns(name, torch.float32), slice(units))
    losses, gradients = losses_and_gradients(name, given, **hyper)
    _, metrics = xf.METHODS[name](**given, **hyper)
    assert losses.shape[0] == units and losses.isfinite().all()
    assert all(m.shape[0] == units for m in metrics.values())
    for key, value in gradients.items():
        assert value.shape == given[key].shape and value.isfinite().all()


@paths(lambda name, hyper: "mask" in xf.METHODS[name].inputs)
def test_nothing_outside_the_mask_counts(name, hyper):
    given = columns(name)
    mask = given["mask"]
    losses, gradients = losses_and_gradients(name, given, **hyper)
    poison = {
        k: v.masked_fill(~mask, math.nan if v.is_floating_point() else 0)
        for k, v in given.items()
        if v.shape == mask.shape and k != "mask"
    }
    assert poison and not mask.all()
    poisoned, poisoned_gradients = losses_and_gradients(name, given | poison, **hyper)
    assert_close(poisoned, losses)
    assert_close(poisoned_gradients, gradients)
    for key in poison.keys() & gradients.keys():
        assert not gradients[key][~mask].any()
    if losses.shape == mask.shape:
        assert not losses[~mask].any()


NUMBERS = [(n, k) for n in METHODS for k in xf.METHODS[n].inputs if xf.METHODS[n].axes(k) == ("",)]


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_what_is_remembered_of_the_batch_carries_no_gradient(name, key):
    given = columns(name)
    leaf = given[key].requires_grad_()
    losses, metrics = xf.METHODS[name](**given)
    assert not any(m.requires_grad for m in metrics.values())
    assert not losses.requires_grad or not torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)[0]


@every_path
def test_metrics_are_consistent(name, hyper):
    given, layout = columns(name), xf.METHODS[name].layout
    _, metrics = xf.METHODS[name](**given, **hyper)
    chosen, rejected = (metrics.get(f"rewards/{side}") for side in ("chosen", "rejected"))
    if "rewards/margins" in metrics:
        assert_close(metrics["rewards/margins"], chosen - rejected, equal_nan=True)
    if "rewards/accuracies" in metrics and layout == "pairwise":
        won = torch.where(chosen.isnan(), math.nan, (chosen > rejected).double())
        assert_close(metrics["rewards/accuracies"].double(), won, equal_nan=True)
    for side, key in (("chosen", "logp_w"), ("rejected", "logp_l")):
        if f"logps/{side}" in metrics and layout == "pairwise":
            left_out = metrics[f"logps/{side}"].isnan()
            assert_close(metrics[f"logps/{side}"], given[key].masked_fill(left_out, math.nan), equal_nan=True)


WHOLE_NUMBERS = {"len_w", "len_l", "length", "lens", "ranks"}


@paths(lambda name, hyper: WHOLE_NUMBERS & set(xf.METHODS[name].inputs))
def test_whole_numbers_may_be_floats(name, hyper):
    given = columns(name)
    whole = WHOLE_NUMBERS & given.keys()
    assert_close(
        losses_of(name, given | {k: given[k].double() for k in whole}, **hyper), losses_of(name, given, **hyper)
    )


# --- Extreme inputs, float32 ---


@every_path
def test_extremes_are_finite_and_exact(name, hyper):
    single = columns(name, torch.float32, source=EXTREME)
    double = {k: v.double() if v.is_floating_point() else v for k, v in single.items()}
    torch.manual_seed(0)
    losses, gradients = losses_and_gradients(name, single, **hyper)
    torch.manual_seed(0)
    true_losses, true_gradients = losses_and_gradients(name, double, **hyper)
    assert true_losses.isfinite().all()
    assert_close(losses, true_losses.float(), rtol=1e-5, atol=1e-6)
    for key, value in gradients.items():
        assert value.isfinite().all() and true_gradients[key].isfinite().all(), key
        if name in TIED:
            continue
        assert_close(value, true_gradients[key].float(), rtol=1e-4, atol=1e-7)


# --- Errors ---

REQUIRED = [(n, k) for n in METHODS for k in xf.METHODS[n].required]
# Inputs that a method can do without, unless ...
REQUIRED_WHEN = [
    ("ipo", "len_w", {}),
    ("ipo", "len_l", {}),
    ("cpo", "len_w", {"nll": "mean"}),
    ("sppo", "prob_w", {}),
    ("sppo", "prob_w", {"variant": "survey"}),
]


@pytest.mark.parametrize(
    ("name", "key", "hyper"),
    [(n, k, WITHOUT_DEFAULT.get(n, [{}])[0]) for n, k in REQUIRED] + [c for c in REQUIRED_WHEN if c[0] in METHODS],
)
def test_missing_column_is_named(name, key, hyper):
    given = {k: v for k, v in columns(name).items() if k != key}
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        losses_of(name, given, **hyper)
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        losses_of(name, given | {key: None}, **hyper)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [{}, {"logp_x": torch.zeros(3)}, {"betta": 0.1}], ids=list)
def test_wrong_names_are_answered_with_the_right_ones(name, wrong):
    given = columns(name) | wrong if wrong else {}
    with pytest.raises(ValueError, match=next(iter(wrong), "missing")) as caught:
        xf.METHODS[name](**given)
    for word in (name, *xf.METHODS[name].inputs, *xf.METHODS[name].defaults):
        assert word in str(caught.value)


def have(key):
    return [n for n in METHODS if key in xf.METHODS[n].defaults]


OUT_OF_RANGE = [(n, "beta", v) for n in have("beta") for v in (-0.1, math.nan)]
OUT_OF_RANGE += [(n, "label_smoothing", v) for n in have("label_smoothing") for v in (-0.1, 1.1, math.nan)]
OUT_OF_RANGE += [  # words that a method does not know
    (n, key, "no such choice")
    for n in METHODS
    for key, default in xf.METHODS[n].defaults.items()
    if isinstance(default, str)
]


@pytest.mark.parametrize(("name", "key", "value"), OUT_OF_RANGE)
def test_hyperparameter_out_of_range(name, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        losses_of(name, **{**WITHOUT_DEFAULT.get(name, [{}])[0], key: value})
    assert str(value) in str(caught.value)
    if isinstance(value, str):
        assert xf.METHODS[name].defaults[key] in str(caught.value), "lists the choices"


MISSHAPEN = {"short": lambda x: x[:-1], "one": lambda x: x[:1], "2d": lambda x: x[:, None]}
# An input alone in its axes cannot disagree with another.
SHAPED = [
    (n, k)
    for n in METHODS
    for k in xf.METHODS[n].inputs
    if xf.METHODS[n].axes(k)[0] not in ("", "II") and len(xf.METHODS[n].inputs) > 1
]


@pytest.mark.parametrize(("name", "key"), SHAPED)
@pytest.mark.parametrize("misshape", MISSHAPEN.values(), ids=MISSHAPEN)
def test_shapes_that_do_not_match(name, key, misshape):
    given = columns(name, optional=True)
    with pytest.raises(ValueError, match=key):
        losses_of(name, given | {key: misshape(given[key])})


@pytest.mark.parametrize("name", METHODS)
def test_a_number_is_not_a_tensor(name):
    given = columns(name)
    key = next(iter(given))
    with pytest.raises(ValueError, match=f"{key} must be a tensor, got float"):
        losses_of(name, given | {key: 1.0})


# --- What a method says about itself ---

ARXIV = {
    "aot": "2406.05882",
    "aot_unpaired": "2406.05882",
    "apo_down": "2408.06266",
    "apo_zero": "2408.06266",
    "apo_zero_unpaired": "2408.06266",
    "bco": "2404.04656",
    "bco_pair": "2404.04656",
    "beta_dpo": "2407.08639",
    "cpo": "2401.08417",
    "cringe": "2312.16682",
    "dapo": "2503.14476",
    "discopop": "2406.08414",
    "dno": "2404.03715",
    "dpo": "2305.18290",
    "dpop": "2402.13228",
    "dr_grpo": "2503.20783",
    "dro": "2405.19107",
    "exo": "2402.00856",
    "f_dpo": "2309.16240",
    "gpo": "2402.05749",
    "grpo": "2402.03300",
    "context_distillation": "2112.00861",
    "forward_kl": "1503.02531",
    "reverse_kl": "2306.08543",
    "gkd": "2306.13649",
    "topk_kl": "1503.02531",
    "sampled_kl": "2306.08543",
    "goal_conditioned": "2407.13887",
    "gspo": "2507.18071",
    "ipo": "2310.12036",
    "kto": "2402.01306",
    "lipo": "2402.01878",
    "nash_md": "2312.00886",
    "nca": "2402.05369",
    "nn": "2403.03419",
    "npo": "2404.05868",
    "odpo": "2402.10571",
    "orpo": "2403.07691",
    "ppo": "1707.06347",
    "pro": "2306.17492",
    "rdpo": "2403.19159",
    "rloo": "2402.14740",
    "robust_dpo": "2403.00409",
    "rrhf": "2304.05302",
    "rso": "2309.06657",
    "simpo": "2405.14734",
    "slic": "2305.10425",
    "sppo": "2405.00675",
    "tdpo": "2404.11999",
    "token_dpo": "2404.12358",
}


@pytest.mark.parametrize("name", METHODS)
def test_card_and_docstring(name):
    method = xf.METHODS[name]
    assert method.card.paper and ARXIV.get(name, "") in method.card.paper
    assert method.card.equation and "=" in method.__doc__
    reads = any(k.startswith("ref_") for k in method.inputs)
    assert method.card.attributes["RL1"] == ("Reference" if reads else "Free")


@pytest.mark.parametrize("name", METHODS)
def test_unit_and_denominator_belong_to_the_layout(name):
    method = xf.METHODS[name]
    units = {
        "pairwise": {"pair", "batch"},
        "unpaired": {"row", "batch"},
        "listwise": {"list"},
        "policy": {"token", "row"},
        "reward": {"pair", "list", "row", "batch"},
    }
    assert method.name == name and method.unit in units[method.layout]
    assert method.denominator == "units" or method.layout == "policy" or method.sides == ("_w",)
