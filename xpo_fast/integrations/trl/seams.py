"""The places in TRL that `install` replaces: what TRL has there, and how it is put back."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import trl
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.trainer import (
    base_trainer,
    dpo_trainer,
    grpo_trainer,
    kto_trainer,
    reward_trainer,
    rloo_trainer,
    sft_trainer,
    utils,
)

from .base import VERSION
from .head import HeadFunction
from .layout import Layouts

TRAINERS = (sft_trainer, dpo_trainer, kto_trainer, grpo_trainer, rloo_trainer)
FUNCTION: Any = (utils, "_ChunkedLogProbFunction")
# Each place, a module and a name in it, and what TRL has there.
THEIRS: dict[Any, Any] = {
    FUNCTION: chunked_logprob.ChunkedLogProbFunction,
    (utils, "_use_triton"): chunked_logprob._use_triton,
    **{(module, "add_fused_lm_head"): utils.add_fused_lm_head for module in (utils, *TRAINERS)},
    **{(module, "BaseTunerLayer"): module.BaseTunerLayer for module in TRAINERS if hasattr(module, "BaseTunerLayer")},
    (reward_trainer.RewardTrainer, "compute_loss"): reward_trainer.RewardTrainer.compute_loss,
    (base_trainer._BaseTrainer, "__init__"): base_trainer._BaseTrainer.__init__,
}
# The parameters of the functions that are replaced.
SIGNATURES = (
    (
        chunked_logprob.ChunkedLogProbFunction.forward,
        "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    ),
    (utils.add_fused_lm_head, "model temperature cast_lm_head_to_fp32 outputs"),
)


def theirs() -> dict[Any, Any]:
    """Returns `THEIRS`, with other modules of TRL that imported add_fused_lm_head by name, as AsyncGRPO's does."""
    name = "add_fused_lm_head"
    modules = [m for key, m in list(sys.modules.items()) if key.startswith("trl.") and name in vars(m)]
    return {**THEIRS, **{(module, name): THEIRS[utils, name] for module in modules}}


def check_signatures() -> None:
    """Raises ValueError unless the functions that are replaced take what those of TRL 1.16 take."""
    for function, expected in SIGNATURES:
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            raise ValueError(
                f"{function.__qualname__} of TRL {trl.__version__} takes ({found}), expected ({expected}): "
                f"it is not TRL {VERSION} as released"
            )


def put(functions: Mapping[Any, Any]) -> None:
    """Sets each name (module, name) to its function, and takes the hooks of layouts that end with it off the models."""
    layouts = current_layouts()
    for (module, name), function in functions.items():
        setattr(module, name, function)
    if layouts is not None and layouts is not current_layouts():
        layouts.remove()


def installed() -> bool:
    """Returns whether this engine is behind TRL's fused head."""
    return isinstance(getattr(*FUNCTION), HeadFunction)


def current_layouts() -> Layouts | None:
    """Returns what `install(layout=…)` asks for at the moment; None without it."""
    function = getattr(*FUNCTION)
    return function.layouts if isinstance(function, HeadFunction) else None


def in_layout(
    model: Any,
    given: Mapping[str, Any],
    targets: Tensor | None,  # (R, T) aligned
) -> contextlib.AbstractContextManager[None]:
    """Returns the block in which a forward reads its rows as `install(layout=…)` asks for, see `Layouts.around`."""
    layouts = current_layouts()
    return contextlib.nullcontext() if layouts is None else layouts.around(model, given, targets)
