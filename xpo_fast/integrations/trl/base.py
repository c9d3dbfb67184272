"""What all of this folder needs: the version of TRL, and `fused_loss` on the models of its trainers."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ...models import install_fused_loss, refuse_router_loss, z_coefficient

try:
    import trl
    import trl.kernels.chunked_logprob

    with warnings.catch_warnings():
        # The experimental part says that it may change in any release; here the release is checked.
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        import trl.experimental.cpo
        import trl.experimental.online_dpo
        import trl.experimental.orpo
        import trl.experimental.tpo
except ImportError as error:
    raise ImportError(
        "xpo_fast.integrations.trl needs TRL 1.16: pip install 'xpo-fast[train]' 'trl==1.16.*'"
    ) from error

VERSION = "1.16"
IGNORE = -100
# Whether a trainer is being made that never asks its models for `fused_lm_head`.
NOT_FUSED: ContextVar[bool] = ContextVar("NOT_FUSED", default=False)


def check_version() -> None:
    """Raises ValueError unless TRL is the version that this module was written against."""
    if trl.__version__.split(".")[:2] != VERSION.split("."):
        raise ValueError(
            f"expected TRL {VERSION}, got {trl.__version__}, whose internals are not known here: "
            f"pip install 'trl=={VERSION}.*'"
        )


def take_losses(trainer: Any, *, router_loss: bool = False) -> None:
    """Installs `fused_loss` on a trainer's model and its reference model; ValueError for what does not go with it.

    router_loss: the trainer adds the auxiliary loss of a mixture of experts' router.
    """
    if trainer.args.torch_compile:
        raise ValueError(
            f"{type(trainer).__name__} takes its hidden states out of the model's forward, which torch_compile=True "
            "would compile as a whole: leave it out, and compile the decoder, model.get_decoder().compile()"
        )
    if not router_loss:
        refuse_router_loss(trainer.model, type(trainer).__name__)
    elif z := z_coefficient(trainer.model):
        raise ValueError(
            f"router_z_loss_coef={z:g}: {type(trainer).__name__} adds no z-loss, as TRL's: set "
            "model.config.router_z_loss_coef = 0, or train with xpo_fast.trainer.XPOTrainer"
        )
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            install_fused_loss(trainer.accelerator.unwrap_model(model))


def without_virtual(
    hidden: Tensor,  # (R, P + T, D)
    targets: Tensor,  # (R, T)
) -> Tensor:
    """Returns the hidden states (R, T, D) without those of the P virtual tokens that prompt learning puts in front."""
    return hidden[:, -targets.shape[1] :]
