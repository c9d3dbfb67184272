"""What the tests of methods are run on: a method's inputs, made from the names in its signature.

Literal values for pairs and rows, chosen so that the arithmetic can be done by hand; drawn ones, by their axes, for
every other input and layout. A method that is registered later is covered as soon as its names are in `INPUTS`.
"""

import math

import torch

import xpo_fast as xf

METHODS = sorted(xf.METHODS)

# Pairs: log-ratios dw = (2, -1, 15), dl = (-2, 2, 2), so dw - dl = (4, -3, 13): a won, a lost and a decided
# pair, either side of the kinks at beta * (dw - dl) = 1 and at dw = 0. Mean log-probs (-2, -3.5, -3.75) and
# (-3.75, -2.25, -8); gaps of the scores (2, 0.5, 0.25); neg - pos scores (1, -1, 0, 2), (0.5, 0.5, -2, 3) and
# (4, -4, 1, 0, -1), the padding in between left to the mask.
# Rows: log-ratios (2, -1, 15, -2), and less the reference point (0.5, -2.5, 13.5, -3.5).
COLUMNS = {
    "pairwise": {
        "logp_w": [-10.0, -7.0, -30.0],
        "ref_logp_w": [-12.0, -6.0, -45.0],
        "logp_l": [-15.0, -9.0, -40.0],
        "ref_logp_l": [-13.0, -11.0, -42.0],
        "len_w": [5, 2, 8],
        "len_l": [4, 4, 5],
        "score_w": [3.0, 1.5, 0.25],
        "score_l": [1.0, 1.0, 0.0],
        "prob_w": [0.9, 0.35, 1.0],
        "kl_w": [0.5, 3.0, 1.25],
        "kl_l": [2.0, 1.0, 4.0],
        "reverse_kl_w": [0.75, 2.0, 1.5],
        "jsd_w": [0.25, 0.5, 0.125],
        "topk_kl_w": [0.25, 1.5, 0.5],
        "pos_score": [[2.0, 1.0, 3.0, -1.0, 9.0], [0.0, 1.0, 2.0, -3.0, 9.0], [-1.0, 5.0, 0.0, 2.0, 1.0]],
        "neg_score": [[3.0, 0.0, 3.0, 1.0, -9.0], [0.5, 1.5, 0.0, 0.0, -9.0], [3.0, 1.0, 1.0, 2.0, 0.0]],
        "mask": [[True] * 4 + [False], [True] * 4 + [False], [True] * 5],
        "m0": 4.0,
        "s": 6.0,
        "logp_sft": [-4.0, -5.0, -6.0],
    },
    "unpaired": {
        "logp": [-10.0, -7.0, -30.0, -15.0],
        "ref_logp": [-12.0, -6.0, -45.0, -13.0],
        "length": [5, 2, 8, 4],
        "desirable": [True, False, True, False],
        "kl": 1.5,
        "reward": [1.0, -1.0, 1.0, -1.0],
        "value": [0.25, 0.5, -0.75, 0.0],
        "delta": 0.3,
    },
}
# Pairs in turn: a hopeless long chosen, log-ratios -50 and +50; a sure chosen token, +50 and -50; a tie; a sure
# rejected token; both sure; both so sure over many tokens that e^(mean log-prob) rounds to 1. Rows and lists alike;
# policy rows: a token 50 less likely than it was, one 50 likelier at a bad advantage, no advantage at length 1.
EXTREME = {
    "pairwise": {
        "logp_w": [-2000.0, -1e-7, -3.0, -50.0, -1e-7, -1e-7],
        "ref_logp_w": [-1950.0, -50.0, -3.0, -1e-7, -1e-7, -1.0],
        "logp_l": [-1.0, -2000.0, -3.0, -1e-7, -2e-7, -3e-7],
        "ref_logp_l": [-51.0, -1950.0, -3.0, -50.0, -1e-7, -1.0],
        "len_w": [400, 1, 1, 1, 1, 100],
        "len_l": [1, 400, 1, 1, 1, 100],
        "score_w": [1e4, 1.0, 1.0000001192092896, 0.0, 1e-30, -1e4],
        "score_l": [-1e4, 0.0, 1.0, -1e-6, 0.0, -10001.0],
        "prob_w": [1.0, 0.0, 0.5, 1e-7, 1.0, 0.0],
        "kl_w": [2000.0, 0.0, 0.0, 1e-7, 50.0, 0.0],
        "kl_l": [0.0, 2000.0, 0.0, 50.0, 1e-7, 0.0],
        "reverse_kl_w": [2000.0, 0.0, 0.0, 50.0, 1e-7, 0.0],
        "jsd_w": [50.0, 0.0, 0.0, 0.6931471, 1e-7, 0.0],
        "topk_kl_w": [2000.0, 0.0, 0.0, 1e-7, 50.0, 0.0],
        "pos_score": [[100.0, -100.0, 0.0], [-100.0] * 3, [0.0] * 3, [50.0] * 3, [1e4] * 3, [-1e4] * 3],
        "neg_score": [[-100.0, 100.0, 0.0], [100.0] * 3, [0.0] * 3, [50.0] * 3, [-1e4] * 3, [1e4] * 3],
        "mask": [[True, True, True], *[[True, False, False]] * 3, [True, True, False], [False] * 3],
        "m0": 0.0,
        "s": 1.0,
        "reward_w": [50.0, -50.0, 0.0, 1e4, -1e4, 1.0],
        "reward_l": [-50.0, 50.0, 0.0, -1e4, 1e4, 1.0],
    },
    "unpaired": {
        "logp": [-2000.0, -1e-7, -3.0, -50.0, -1e-7],
        "ref_logp": [-1.0, -2000.0, -3.0, -1e-7, -50.0],
        "desirable": [True, False, True, False, True],
        "kl": 0.0,
        "reward": [1.0, -1.0, 0.0, 1e4, -1e4],
        "value": [-1.0, 1.0, 0.0, -1e4, 1e4],
        "delta": 0.0,
    },
    "listwise": {
        "logps": [[-2000.0, -1e-7, -3.0], [-50.0, -1e-7, -2000.0], [-3.0, -3.0, -3.0], [-1e-7, -2e-7, -1.0]],
        "ref_logps": [[-1950.0, -50.0, -3.0], [-1e-7, -50.0, -1950.0], [-3.0, -3.0, -3.0], [-1e-7, -1.0, -1.0]],
        "lens": [[400, 1, 1], [1, 1, 400], [1, 1, 1], [1, 1, 100]],
        "scores": [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0.5, 0.5, 0.5], [1.0, 0.25, 0.5]],
        "mask": [[True, True, True], [True, True, False], [True, False, False], [True, True, True]],
        "logp_l": [-2000.0, -1e-7, -3.0, -50.0],
        "ref_pos_logp_l": [-1950.0, -50.0, -3.0, -1e-7],
    },
    "policy": {
        "token_logp": [[-2000.0, -1e-7, -3.0], [-50.0, -1.0, -1.0], [-1e-7, -1e-7, -1e-7], [-3.0, -9.0, -9.0]],
        "old_logp": [[-1950.0, -1e-7, -3.0], [-1e-7, -1.0, -1.0], [-50.0, -1e-7, -1e-7], [-3.0, -9.0, -9.0]],
        "ref_token_logp": [[-2050.0, -50.0, -3.0], [-1e-7, -1.0, -1.0], [-50.0, -1e-7, -1.0], [-3.0] * 3],
        "mask": [[True, True, True], [True, True, False], [True, True, True], [True, False, False]],
        "advantage": [1.0, -1.0, -2.0, 0.0],
        "entropy": [[11.0, 1e-7, 0.0], [1.0, 1.0, 1.0], [1e-7, 1e-7, 1e-7], [0.0, 0.0, 0.0]],
        "value": [[1e4, -1e4, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-50.0, 0.0, 0.0]],
        "old_value": [[-1e4, -1e4, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [50.0, 0.0, 0.0]],
        "returns": [[0.0, 1e4, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-50.0, 0.0, 0.0]],
        "prob_w": [1.0, 0.0, 0.5, 1e-7],
    },
    "reward": {
        "reward_w": [50.0, -50.0, 0.0, 1e4, -1e4],
        "reward_l": [-50.0, 50.0, 0.0, -1e4, 1e4],
        "near_w": [1e4, 0.0, 0.3132617, 50.0, 0.0],
        "apart_l": [0.0, 1e4, 1.3132617, 0.0, 50.0],
        "margin": [0.0, 0.0, 0.0, 1.0, 1e4],
        "rewards": [[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [50.0, -50.0, 1.0], [1.0, 1.0, 2.0], [-1e4, 1e4, 0.0]],
        "ranks": [[1, 2, 3], [1, 1, 1], [3, 2, 1], [1, 1, 2], [1, 3, 3]],
        "logit": [1e4, -1e4, 0.0, 50.0, -50.0],
        "prob_w": [1.0, 0.0, 0.5, 1e-7, 1.0],
        "desirable": [True, False, True, False, True],
        "gate": [[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [50.0, -50.0, 1.0], [1.0, 1.0, 2.0], [-1e4, 1e4, 0.0]],
    },
}
FILLED_IN = ("logp_sft",)  # columns that a method makes from others where they are not given
WITH_GRADIENT = {
    *("logp_w", "logp_l", "logp_sft", "logp", "logps", "kl_w", "kl_l", "pos_score", "neg_score", "value"),
    *("reverse_kl_w", "jsd_w", "topk_kl_w"),
    *("token_logp", "entropy", "ptx_logp", "reward_w", "reward_l", "rewards", "rewards_w", "rewards_l"),
    *("gate", "gate_w", "gate_l", "logit", "near_w", "apart_l"),
    *("view", "other_view", "sample_view", "other_sample_view"),
}

# Hyperparameters beside the defaults that take another path through the method.
VARIANTS = {
    "dpo": [{"label_smoothing": 0.2}],
    "ipo": [{"variant": "sum"}],
    "simpo": [{"gamma_beta_ratio": 0.3}, {"label_smoothing": 0.2}],
    "cpo": [{"nll": "mean"}, {"label_smoothing": 0.2}],
    "slic": [{"delta": 7.0}],
    "rso": [{"loss": "sigmoid"}],
    "dpop": [{"variant": "survey"}, {"lam": 2.0}],
    "gpo": [{"f": f} for f in ("hinge", "squared", "exponential", "truncated_quadratic", "savage")],
    "odpo": [{"offset": "identity"}, {"alpha": 0.0}],
    "rdpo": [{"variant": "survey"}],
    "sppo": [{"beta": 0.5}, {"variant": "hard"}, {"variant": "survey"}, {"variant": "survey", "beta": 0.5}],
    "f_dpo": [
        {"divergence": "forward_kl"},
        {"divergence": "js"},
        {"divergence": "alpha"},
        {"divergence": "alpha", "alpha": 0.9},
    ],
    "tdpo": [{"version": 1}],
    "cringe": [{"alpha": 0.5, "b": 2.0, "tau": 5.0}],
    "beta_dpo": [{"keep": 1.0}, {"keep": 1.0, "alpha": 0.0}],
    "aot": [{"label_smoothing": 0.1}],
    "aot_unpaired": [{"label_smoothing": 0.1}],
    "exo": [{"label_smoothing": 0.1}],
    "discopop": [{"tau": 1.0}],
    "kto": [{"lambda_d": 1.5, "lambda_u": 2.0}],
    "dro": [{"variant": "square"}, {"beta": 0.5}],
    "apo_zero_unpaired": [{"lambda_d": 1.5, "lambda_u": 2.0}],
    "lipo": [{"kind": k} for k in ("pair_logistic", "pair_hinge", "point_mse", "point_sigmoid", "softmax", "list_mle")],
    "pro": [{"variant": "survey"}, {"temperature": False}],
    "rrhf": [{"lam_sft": 0.0}],
    "ppo": [{"dual_clip": 3.0}],
    "rloo": [{"variant": "clipped"}],
    "grpo": [{"beta": 0.1}],
    "dr_grpo": [{"beta": 0.1}],
    "bnpo": [{"beta": 0.1}],
    "dapo": [{"beta": 0.1}],
    "bradley_terry": [{"label_smoothing": 0.1}, {"center": 0.1}],
    "grm": [{"regulariser": "dpo"}],
    "contrastive": [{"temperature": 0.5, "alpha": 1.0}],
    "rlp": [{"temperature": 0.5, "kappa": 2.0}],
}
WITHOUT_DEFAULT = {"cispo": [{"cap": 2.0}, {"eps": 0.2}]}  # methods whose defaults alone are an error
EVERY_PATH = [(name, hyper) for name in METHODS for hyper in WITHOUT_DEFAULT.get(name, [{}, *VARIANTS.get(name, [])])]


def draw(name, axes, size, generator):
    """A tensor for input `name` with these axes, where `size` gives the length of each."""
    shape = [size[a] for a in axes]
    if name.endswith("mask"):  # full, short and one-entry rows
        lengths = torch.tensor([(shape[1], 1, 2)[i % 3] for i in range(shape[0])])
        return torch.arange(shape[1]) < lengths[:, None]
    if name == "desirable":
        return torch.arange(*shape) % 3 != 1
    if name.startswith("len"):
        return torch.randint(1, 10, shape, generator=generator)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if name == "ranks":
        return 1 + uniform.argsort(-1).clamp(max=max(0, shape[-1] - 2))  # 1, ..., K - 1 and a tie
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name in ("token_logp", "old_logp", "ref_token_logp", "ptx_logp"):
        return (0.3 * normal - 1.5).clamp(max=-0.05)
    if "logp" in name:
        return (5 * normal - 20).clamp(max=-0.5)
    if name in ("kl", "kl_w", "kl_l", "reverse_kl_w", "jsd_w", "topk_kl_w", "entropy", "s"):
        return normal.abs() + 0.1
    return {"score_w": 1 + uniform, "score_l": uniform - 0.1, "prob_w": uniform, "scores": uniform}.get(name, normal)


def tensor(values, dtype=torch.float64):
    """Numbers of a table; integers and truth values keep their kind."""
    kind = torch.tensor(values)
    return torch.tensor(values, dtype=dtype) if kind.is_floating_point() else kind


def columns(name, dtype=torch.float64, *, optional=False, source=COLUMNS, units=None, seed=0):
    """The inputs that method `name` takes, as tensors: those of `source` where it has them, the others drawn.

    optional: also those that the method can make from others. units: draw all of them, with so many units.
    """
    method, table = xf.METHODS[name], source.get(xf.METHODS[name].layout, {})
    known = {} if units else {k: tensor(v, dtype) for k, v in table.items()}
    size = {"U": units or 4, "K": 4, "T": 5, "I": 3, "D": 6, "S": 3, "": 1}
    for key in method.inputs:
        if key in known:
            axes = next(a for a in method.axes(key) if len(a) == known[key].dim())
            size |= dict(zip(axes, known[key].shape, strict=True))
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key in method.inputs:
        if key in FILLED_IN and not optional:
            continue
        axes = method.axes(key)[-1 if method.layout == "policy" and key == "value" else 0]
        value = known[key] if key in known else draw(key, axes, size, generator)
        out[key] = value.to(dtype) if value.is_floating_point() else value
    return out


def units_of(name, given):
    """How many units these inputs of method `name` have."""
    return next(v.shape[0] for k, v in given.items() if v.dim() and "U" in xf.METHODS[name].axes(k)[0])


def pick(name, given, rows):
    """The units `rows` (a slice or a list) of these inputs."""
    return {k: v[rows] if v.dim() and "U" in xf.METHODS[name].axes(k)[0] else v for k, v in given.items()}


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def losses_of(name, given=None, **hyper):
    return xf.METHODS[name](**(columns(name) if given is None else given), **hyper)[0]


def losses_and_gradients(name, given, **hyper):
    """The losses, and d(sum of losses) for each input that carries gradient."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k in WITH_GRADIENT}
    losses = losses_of(name, {**given, **leaves}, **hyper)
    gradients = torch.autograd.grad(losses.sum(), tuple(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def swapped(given):
    """The same pairs with the label flipped."""
    return {k[:-1] + {"w": "l", "l": "w"}[k[-1]]: v for k, v in given.items()}


def sigmoid(x):
    """σ from its definition: what the methods' own are held against."""
    return 1 / (1 + torch.exp(-x))


def softplus(x):
    """log(1 + eˣ) from its definition."""
    return torch.log(1 + torch.exp(x))


LN2 = math.log(2)


def gradients(losses, leaves):
    """d(sum of losses) for each leaf, zeros where it is not read."""
    found = torch.autograd.grad(losses.sum(), tuple(leaves.values()), allow_unused=True)
    return {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(leaves, found, strict=True)}
