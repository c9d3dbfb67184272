"""Losses in one launch of csrc/segments.cu: from token log-probs to the loss, its metrics and ∂loss/∂logp.

The pure functions of methods/ are the definition, against which tests check the kernels. `supports` returns why a
method has no kernel; the caller then evaluates the pure function.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..methods import Method, get_method

# The devices that have kernels, and the dtypes of log-probs, each with the suffix of its symbols.
DEVICES = {"cuda"}
DTYPES = {torch.float32: ""}

# --- csrc/segments.h --------------------------------------------------------------------------------------------------

_INT, _REAL, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_PAIRS, _LOGISTIC, _HINGE, _SQUARED = "pairs", *range(3)
_ROWS, _SIGMOID_GAIN, _LOGISTIC_GAIN = "rows", *range(2)
_TOKENS, _CLIPPED, _PENALISED, _PLAIN, _WEIGHTED, _GATED = "tokens", *range(5)
_BY_TOKEN, _MEAN_OF_ROW, _SUM_OF_ROW = range(3)
_METRICS = {_PAIRS: 7, _ROWS: 5, _TOKENS: 5}


def _fields(*parts: str) -> list[tuple[str, Any]]:
    """Returns ctypes fields from strings "kind name name …"."""
    kinds = {"int": _INT, "real": _REAL, "pointer": _POINTER}
    return [(name, kinds[kind]) for kind, *names in map(str.split, parts) for name in names]


class SegmentCall(ctypes.Structure):
    """The arguments that all launches share: xpo_segment_call of csrc/segments.h."""

    _fields_ = _fields(
        "int tokens start units",
        "pointer logp offsets weights denominator",
        "real scale",
        "pointer u sums values loss means counts ticket",
    )


_CALL = ("call", SegmentCall)


class SegmentPairs(ctypes.Structure):
    """The arguments of a launch for pairs of rows."""

    _fields_ = [
        _CALL,
        *_fields(
            "int pair_step side_step",
            "pointer ref_w ref_l len_w len_l",
            "int kind",
            "real scale reward_scale positive negative target shift price likelihood",
            "int by_length likelihood_by_length",
        ),
    ]


class SegmentRows(ctypes.Structure):
    """The arguments of a launch for unpaired rows."""

    _fields_ = [_CALL, *_fields("pointer ref desirable point length", "int kind", "real beta lambda_d lambda_u")]


class SegmentTokens(ctypes.Structure):
    """The arguments of a launch for tokens of policy methods."""

    _fields_ = [
        _CALL,
        *_fields(
            "pointer positions mask advantage old ref token_losses row_counts",
            "int advantage_by_token sequence kind",
            "real log_low log_high log_cap cap penalty tau_pos tau_neg beta",
        ),
    ]


STRUCTS = {_PAIRS: SegmentPairs, _ROWS: SegmentRows, _TOKENS: SegmentTokens}


@cache
def _numbers(family: str, kind: type) -> tuple[str, ...]:
    """Returns the names of the fields that are integers, or reals (`kind`)."""
    return tuple(name for name, k, *_ in STRUCTS[family]._fields_ if k is kind)


# --- from methods to kernels ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """The kernel of a method and how to call it."""

    family: str  # _PAIRS, _ROWS or _TOKENS
    numbers: Mapping[str, float]  # value of each field
    metrics: dict[str, int]  # index of each metric in the kernel's outputs
    inputs: Mapping[str, str]  # field of each input
    required: tuple[str, ...]  # inputs that must be given


def _index(names: str) -> dict[str, int]:
    """Returns the index of each of the names, which spaces separate."""
    return {name: k for k, name in enumerate(names.split())}


_PAIR_METRICS = _index("rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected")
_ROW_METRICS = _index("rewards/chosen rewards/rejected logps/chosen logps/rejected")
_CLIP_METRICS = _index("ratio clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean")
_KL_METRIC = {"kl": 4}


def _smoothed(beta: float, label_smoothing: float, **numbers: float) -> dict[str, float]:
    """Returns the numbers of −(1−ε) log σ(h) − ε log σ(−h)."""
    weights = {"positive": 1 - label_smoothing, "negative": label_smoothing}
    return {"kind": _LOGISTIC, "scale": beta, "reward_scale": beta, **weights, **numbers}


def _dpo(o: Any) -> dict[str, float]:
    return _smoothed(o["beta"], o["label_smoothing"])


def _robust_dpo(o: Any) -> dict[str, float]:
    eps = o["label_smoothing"]
    weights = {"positive": (1 - eps) / (1 - 2 * eps), "negative": -eps / (1 - 2 * eps)}
    return _dpo(o) | weights


def _margin_loss(kind: int, beta: float, target: float = 1.0) -> dict[str, float]:
    return {"kind": kind, "scale": beta, "reward_scale": beta, "target": target}


_GPO = _index("logistic hinge squared exponential truncated_quadratic savage")


def _gpo(o: Any) -> dict[str, float]:
    return _smoothed(o["beta"], 0.0) if o["f"] == "logistic" else _margin_loss(_GPO[o["f"]], o["beta"])


def _ipo(o: Any) -> dict[str, float]:
    squared = _margin_loss(_SQUARED, 1.0, target=1 / (2 * o["beta"]))
    return {**squared, "reward_scale": o["beta"], "by_length": o["variant"] == "mean"}


def _simpo(o: Any) -> dict[str, float]:
    gamma = o["gamma"] if o["gamma_beta_ratio"] is None else o["gamma_beta_ratio"] * o["beta"]
    return _smoothed(o["beta"], o["label_smoothing"], shift=gamma, by_length=True)


def _clipped(eps_low: float, eps_high: float, cap: float | None = None) -> dict[str, float]:
    """Returns the numbers of C(eps_low, eps_high), see methods/policy.py, as bounds on log r."""
    low = math.log1p(-eps_low) if eps_low < 1 else -math.inf
    highest = math.inf if cap is None else math.log(cap)
    return {"kind": _CLIPPED, "log_low": low, "log_high": math.log1p(eps_high), "log_cap": highest}


def _symmetric(o: Any) -> dict[str, float]:
    return _clipped(o["eps"], o["eps"], o.get("dual_clip"))


def _asymmetric(o: Any) -> dict[str, float]:
    return _clipped(o["eps_low"], o["eps_high"])


_NUMBERS: dict[str, Callable[[Any], dict[str, float]]] = {
    "dpo": _dpo,
    "dno": _dpo,
    "token_dpo": _dpo,
    "robust_dpo": _robust_dpo,
    "rso": lambda o: _gpo({"beta": o["beta"], "f": "hinge" if o["loss"] == "hinge" else "logistic"}),
    "gpo": _gpo,
    "slic": lambda o: _margin_loss(_HINGE, 1.0, o["delta"]) | {"likelihood": o["lam"]},
    "ipo": _ipo,
    "dpo_norm": lambda o: _smoothed(o["beta"], 0.0, by_length=True),
    "rdpo": lambda o: _smoothed(o["beta"], 0.0, price=o["alpha"] if o["variant"] == "derived" else -o["alpha"]),
    "simpo": _simpo,
    "cpo": lambda o: _dpo(o) | {"likelihood": o["alpha"], "likelihood_by_length": o["nll"] == "mean"},
    "kto": lambda o: {"kind": _SIGMOID_GAIN, **o},
    "apo_zero_unpaired": lambda o: {"kind": _SIGMOID_GAIN, **o},
    "bco": lambda o: {"kind": _LOGISTIC_GAIN, "beta": o["beta"], "lambda_d": 1.0, "lambda_u": 1.0},
    "reinforce": lambda o: {"kind": _PLAIN},
    "ppo": _symmetric,
    "ppo_penalty": lambda o: {"kind": _PENALISED, "penalty": o["beta"]},
    "grpo": _symmetric,
    "dr_grpo": _symmetric,
    "bnpo": _symmetric,
    "dapo": _asymmetric,
    "gspo": lambda o: _asymmetric(o) | {"sequence": _MEAN_OF_ROW},
    "luspo": lambda o: _asymmetric(o) | {"sequence": _SUM_OF_ROW},
    "cispo": lambda o: {"kind": _WEIGHTED, "cap": o["cap"] if o["eps"] is None else 1 + o["eps"]},
    "sapo": lambda o: {"kind": _GATED, "tau_pos": o["tau_pos"], "tau_neg": o["tau_neg"]},
}
_TOKEN_METRICS = {
    _PLAIN: {"logps": 0},
    _PENALISED: {"ratio": 0, **_KL_METRIC},
    _WEIGHTED: {"ratio": 0, "cispo_clip_ratio": 2},
    _GATED: {"ratio": 0},
    _CLIPPED: _CLIP_METRICS,
}
# Inputs of a method → fields of a kernel. Log-probs are given by token; lengths follow from the offsets unless given.
_INPUTS = {
    "pairwise": {"ref_logp_w": "ref_w", "ref_logp_l": "ref_l", "len_w": "len_w", "len_l": "len_l"},
    "unpaired": {"ref_logp": "ref", "desirable": "desirable", "kl": "point", "delta": "point", "length": "length"},
    "policy": {"mask": "mask", "advantage": "advantage", "old_logp": "old", "ref_token_logp": "ref"},
}
_UNREQUIRED = {"logp_w", "logp_l", "logp", "token_logp", "len_w", "len_l", "length", "mask"}


def supports(method: str, hyperparameters: Mapping[str, Any], columns: Sequence[str] = ()) -> str | None:
    """Returns why there is no kernel for the method with these hyperparameters and optional columns; None if there is.

    Raises ValueError for an unknown method, and for a hyperparameter that is unknown or out of range.
    """
    kernel = _kernel(method, tuple(sorted(hyperparameters.items())))
    if isinstance(kernel, str):
        return kernel
    for name in columns:
        if name in get_method(method).columns and name not in kernel.inputs:
            return f"the kernel of {method} takes no {name}"
    return None


@lru_cache(maxsize=64)
def _kernel(name: str, given: tuple[tuple[str, Any], ...]) -> Kernel | str:
    """Returns the kernel of a method with these hyperparameters, or why there is none."""
    method = get_method(name)
    method.check_hyperparameters(dict(given))
    if name not in _NUMBERS:
        return f"{name} has no kernel; there are kernels for {', '.join(_NUMBERS)}"
    options = {**method.defaults, **dict(given)}
    _check_ranges(method, options)
    if options.get("entropy_coef"):
        return f"{name} with entropy_coef has no kernel: the entropy has a gradient of its own"
    numbers, inputs = _NUMBERS[name](options), _INPUTS[method.layout]
    # The kernels accept lengths for every method.
    inputs = {n: field for n, field in inputs.items() if n in method.inputs or n.startswith("len")}
    required = tuple(n for n in method.required if n not in _UNREQUIRED)
    if method.layout == "pairwise":
        metrics = _PAIR_METRICS | ({"nll_loss": 6} if name == "cpo" else {})
        return Kernel(_PAIRS, numbers, metrics, inputs, required)
    if method.layout == "unpaired":
        metrics = _ROW_METRICS | {n: 4 for n in ("kl", "delta") if n in method.inputs}
        return Kernel(_ROWS, numbers, metrics, inputs, required)
    if "ref_token_logp" in inputs:
        numbers["beta"] = options["beta"]
        required += ("ref_token_logp",) * bool(options["beta"])
    return Kernel(_TOKENS, numbers, _TOKEN_METRICS[int(numbers["kind"])], inputs, required)


def _check_ranges(method: Method, options: Mapping[str, Any]) -> None:
    """Raises ValueError for a hyperparameter out of range, by evaluating the method on placeholders."""
    inputs = {}
    for name in method.inputs:
        if method.wants(name, options):
            dtype = torch.bool if name.endswith("mask") or name == "desirable" else torch.float32
            inputs[name] = torch.ones([1] * len(method.axes(name)[0]), dtype=dtype)
    method(**inputs, **options)


# --- the launch -------------------------------------------------------------------------------------------------------


def _outputs(family: str, logp: Tensor, rows: int, with_token_losses: bool) -> tuple[Tensor, ...]:
    """Allocates the outputs of `_segments`."""
    units, metrics = rows // 2 if family == _PAIRS else rows, _METRICS[family]
    return (
        torch.empty_like(logp),
        logp.new_empty(rows),
        logp.new_empty(1 + metrics, units),
        logp.new_empty(()),
        logp.new_empty(metrics),
        logp.new_empty(metrics, dtype=torch.int64),
        logp.new_empty(logp.shape[0] if with_token_losses else 0),
    )


@torch.library.custom_op("xpo_fast::segments", mutates_args=())
def _segments(
    family: str,
    logp: Tensor,  # (n,)
    offsets: Tensor,  # (R + 1,)
    weights: Tensor | None,  # (U,)
    denominator: Tensor | None,  # ()
    tensors: Sequence[Tensor],
    names: str,  # the tensors' fields, comma-separated
    integers: Sequence[int],
    reals: Sequence[float],
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns u (n,), sums (R,), values (1 + M, U), loss (), means (M,), counts (M,), token losses (n,) or (0,)."""
    rows = offsets.shape[0] - 1
    by_token = family == _TOKENS and not integers[_numbers(family, _INT).index("sequence")]
    outputs = _outputs(family, logp, rows, by_token)
    u, sums, values, loss, means, counts, token_losses = outputs
    # The ticket, a counter of finished blocks, and then the number of entries of each row's metrics.
    scratch = offsets.new_empty(1 + (_METRICS[family] * rows if family == _TOKENS else 0), dtype=torch.int32)

    def at(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    call = SegmentCall(
        *(logp.shape[0], start, values.shape[1], at(logp), at(offsets), at(weights), at(denominator), scale),
        *map(at, (u, sums, values, loss, means, counts, scratch)),
    )
    own: dict[str, Any] = dict(zip(names.split(",") if names else (), map(at, tensors), strict=True))
    own |= zip(_numbers(family, _INT), integers, strict=True)
    own |= zip(_numbers(family, _REAL), reals, strict=True)
    if family == _TOKENS:
        own |= {"row_counts": scratch.data_ptr() + 4, "token_losses": at(token_losses) if by_token else None}
    struct = STRUCTS[family](call, **own)
    native.call(
        f"xpo_segment_{family}{DTYPES[logp.dtype]}",
        ctypes.byref(struct),
        device=logp.device,
        reads=(logp, offsets, weights, denominator, *tensors),
        writes=(*outputs, scratch),
    )
    return u, sums, values, loss, means, counts, token_losses


@_segments.register_fake
def _(family, logp, offsets, weights, denominator, tensors, names, integers, reals, start, scale):
    by_token = family == _TOKENS and not integers[_numbers(family, _INT).index("sequence")]
    return _outputs(family, logp, offsets.shape[0] - 1, by_token)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[0])
    ctx.mark_non_differentiable(*(x for k, x in enumerate(output) if k != 3))
    ctx.tensors = len(inputs[5])


def _backward(ctx: Any, *upstream: Tensor) -> tuple:
    (u,) = ctx.saved_tensors
    return None, u * upstream[3], None, None, None, [None] * ctx.tensors, *([None] * 5)


_segments.register_autograd(_backward, setup_context=_save)


# --- the call ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The result of a launch; only the loss is differentiable, in the log-probs.

    loss (). u (n,) = ∂loss/∂logp, 0 outside the rows. sums (R,) of the rows' log-probs. losses (U,) of the units, or
    (n,) of token methods; 0 where a unit does not count.
    """

    loss: Tensor
    u: Tensor
    sums: Tensor
    losses: Tensor
    _means: Tensor  # (M,)
    _counts: Tensor  # (M,)
    _values: Tensor | None  # (1 + M, U)
    _places: Mapping[str, int]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Returns means over the units or tokens that count, as reduce.mean_metrics: () each."""
        return {name: self._means[k] for name, k in self._places.items()}

    @property
    def counts(self) -> dict[str, Tensor]:
        """Returns the number of entries of each mean, as reduce.count_metrics: () int64 each."""
        return {name: self._counts[k] for name, k in self._places.items()}

    @property
    def unit_metrics(self) -> dict[str, Tensor]:
        """Returns the metrics by unit, (U,) each, NaN where a unit does not count; none for policy methods."""
        return {} if self._values is None else {n: self._values[1 + k] for n, k in self._places.items()}


def evaluate(
    method: str,
    hyperparameters: Mapping[str, Any],
    logp: Tensor,  # (n,) float32
    offsets: Tensor,  # (R + 1,) int64
    *,
    start: int = 0,
    interleaved: bool = False,
    weights: Tensor | None = None,  # (U,)
    denominator: float | Tensor | None = None,  # ()
    scale: float = 1.0,
    positions: Tensor | None = None,  # (n,) int64
    **inputs: Tensor | None,
) -> Evaluation:
    """Computes a method's loss over rows that are segments of logp, on the current stream; the host does not wait.

    Row i is logp[offsets[i] − start : offsets[i + 1] − start], as far as that lies in logp. Pairwise methods take the
    chosen rows and then the rejected ones, or with `interleaved` each pair's chosen row followed by its rejected one. A
    unit with a row that has no token does not count. loss = scale · Σ weights · losses / denominator, undivided if the
    denominator is 0.

    inputs: the method's other inputs by name: by unit, or for policy methods by token: (N,) with logp[i] at
    positions[i], or without positions (n,). Optional are `mask`, if every token counts, and lengths (int64), if they
    are those of the segments.

    Raises ValueError if `supports` returns a reason, for log-probs that are not float32 on a CUDA device, and for
    inputs that are missing, unknown or do not fit; RuntimeError if there is no library, or a launch fails.
    """
    kernel = _kernel(method, tuple(sorted(hyperparameters.items())))
    if isinstance(kernel, str):
        raise ValueError(kernel)
    if logp.device.type not in DEVICES or logp.dtype not in DTYPES or logp.dim() != 1:
        raise ValueError(
            f"{method}: the kernel takes float32 log-probs (n,) on a CUDA device, got {logp.dtype} "
            f"{tuple(logp.shape)} on {logp.device}"
        )
    rows = offsets.shape[0] - 1
    if offsets.dim() != 1 or rows < 0 or (kernel.family == _PAIRS and rows % 2):
        expected = "offsets (R + 1,)" + " of pairs of rows" * (kernel.family == _PAIRS)
        raise ValueError(f"{method}: expected {expected}, got {tuple(offsets.shape)}")
    units = rows // 2 if kernel.family == _PAIRS else rows
    given = {name: x for name, x in inputs.items() if x is not None}
    missing = [name for name in kernel.required if name not in given]
    unknown = [name for name in given if name not in kernel.inputs]
    if missing or unknown:
        found = (("missing", missing), ("unknown", unknown))
        raise ValueError(
            f"{method}: {'; '.join(f'{what} {names}' for what, n in found if (names := ', '.join(n)))}. "
            f"Beside log-probs and offsets its kernel takes {', '.join(kernel.inputs)}"
        )
    converted = _Converter(method, logp, units)
    numbers = dict(kernel.numbers)
    if kernel.family == _PAIRS:
        numbers |= {"pair_step": 2 if interleaved else 1, "side_step": 1 if interleaved else max(units, 1)}
    tensors: dict[str, Tensor] = {}
    if kernel.family == _TOKENS:
        if positions is not None:
            tensors["positions"] = converted("positions", positions, "n", torch.int64)
        # One entry per row or per token; per row if both are possible.
        numbers["advantage_by_token"] = given["advantage"].shape != (units,)
    elif positions is not None:
        raise ValueError(f"{method} has no inputs by token: leave out positions")
    per_token = "n" if positions is None else "N"
    for name, x in given.items():
        by_token = kernel.family == _TOKENS and (name != "advantage" or numbers["advantage_by_token"])
        size = "" if kernel.inputs[name] == "point" else per_token if by_token else "U"
        lengths = name.startswith("len")
        kind = torch.int64 if lengths else torch.bool if name in ("mask", "desirable") else logp.dtype
        tensors[kernel.inputs[name]] = converted(name, x, size, kind)
    if not isinstance(denominator, Tensor):
        scale, denominator = scale / (denominator or 1), None
    u, sums, values, loss, means, counts, token_losses = _segments(
        kernel.family,
        logp.contiguous(),
        converted("offsets", offsets, "N", torch.int64),
        None if weights is None else converted("weights", weights, "U", logp.dtype),
        None if denominator is None else converted("denominator", denominator.to(logp.dtype), "", logp.dtype),
        list(tensors.values()),
        ",".join(tensors),
        [int(numbers.get(n, 0)) for n in _numbers(kernel.family, _INT)],
        [float(numbers.get(n, 0)) for n in _numbers(kernel.family, _REAL)],
        start,
        scale,
    )
    by_token = kernel.family == _TOKENS and not numbers.get("sequence")
    metrics = kernel.metrics | (_KL_METRIC if "ref_token_logp" in given else {})
    losses, by_unit = token_losses if by_token else values[0], None if kernel.family == _TOKENS else values
    return Evaluation(loss, u, sums, losses, means, counts, by_unit, metrics)


@dataclass(frozen=True)
class _Converter:
    """Conversion of a call's inputs to what the kernels read: detached, contiguous, of the kernels' dtype."""

    method: str
    logp: Tensor
    units: int

    def __call__(self, name: str, x: Tensor, size: str, dtype: torch.dtype) -> Tensor:
        """Returns an input in `dtype`. Raises ValueError for another kind of number, device or shape.

        size: "" one number, "U" one per unit, "n" one per log-prob, "N" any length.
        """
        expected = {"": (), "U": (self.units,), "n": tuple(self.logp.shape), "N": tuple(x.shape[:1])}[size]
        same_kind = x.is_floating_point() == dtype.is_floating_point
        same_kind = same_kind and (x.dtype == torch.bool) == (dtype == torch.bool)
        if not same_kind or x.device != self.logp.device or x.shape != expected:
            raise ValueError(
                f"{self.method}: {name} must be {expected} {dtype} on {self.logp.device}, got {tuple(x.shape)} "
                f"{x.dtype} on {x.device}"
            )
        return x.detach().to(dtype).contiguous()
