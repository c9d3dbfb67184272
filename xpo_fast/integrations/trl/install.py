"""`install()` puts this engine behind the fused head of TRL's trainers; `uninstall()` undoes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...head.backends import get_backend
from ...head.choice import named_backend
from .base import check_version
from .fuse import NoLayer, add_fused_lm_head, scores_only_labels
from .head import HeadFunction
from .layout import Layouts
from .seams import FUNCTION, check_signatures, installed, put, theirs
from .trainers import compute_loss, init

# What is put in place of TRL's, by name; `FUNCTION` gets a HeadFunction.
_OURS: dict[str, Any] = {
    "_use_triton": scores_only_labels,
    "add_fused_lm_head": add_fused_lm_head,
    "BaseTunerLayer": NoLayer,
    "compute_loss": compute_loss,
    "__init__": init,
}


class Installed:
    """What `install` returns. It need not be kept; as a context manager it restores, on leaving, what was before."""

    def __init__(self, before: Mapping[Any, Any]) -> None:
        self._before = dict(before)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        put(self._before)
        if not installed():
            put(theirs())


def install(
    *, backend: str = "auto", tile_bytes: int | None = None, layout: Literal["auto", "packed", "shared"] | None = None
) -> Installed:
    """Puts this engine behind TRL's fused head, for every trainer of this process that has one, made before or after.

    Replaces `trl.trainer.utils._ChunkedLogProbFunction`, which TRL looks up at each call, and the switch by which TRL
    scores masked positions, too, where there is no Triton. SFT, DPO, KTO, GRPO and RLOO trainers made from then on fuse
    LoRA and DoRA on `lm_head`, which TRL refuses (AsyncGRPO's still does). They refuse, with the reason, other adapters
    there, heads that are not linear or quantised, and models whose softcap, scale or layer before the head TRL does not
    know (MPT, RecurrentGemma, ModernBertDecoder, …): two tokens are run to find out. A second call changes the options.
    `uninstall()` undoes it, and so does leaving `with install():`.

    backend, tile_bytes: as in `token_stats`.
    layout: how the forwards of SFT, DPO, KTO, GRPO, RLOO and reward trainers made from then on read their rows, those
    of references and old log-probs, too. "shared": without padding, and what rows begin with in common once; "packed":
    without padding; None: padded, as TRL does. The numbers are the same to rounding, with one exception: positions
    count a row's tokens, as in sampling, where TRL's count the padding in front of a prompt, too, which a model with a
    table of positions (GPT-2) sees. "auto" is "shared" where that is right, and warns once, with the reason, of each
    model or trainer whose rows stay padded: models that lay out no rows, the router's loss of mixtures of experts,
    images, prompt learning, rows that are packed already, FSDP, DeepSpeed, torch.compile, parallelism over sequences,
    and other trainers. "shared" and "packed" raise ValueError there, when the trainer is made or at its first step.

    Raises ValueError for another TRL than 1.16, for one whose functions take other arguments than those of 1.16, and
    where another package has replaced them.
    """
    check_version()
    named = named_backend(backend)
    if named != "auto" and get_backend(named).rows is None:
        raise ValueError(f"the {named} backend makes all logits, to be compared with: pass backend='torch'")
    layouts = None if layout is None else Layouts(layout)
    check_signatures()
    places = theirs()
    before = {place: getattr(*place) for place in places}
    for place, now in before.items():
        if now not in (places[place], _OURS.get(place[1])) and not isinstance(now, HeadFunction):
            raise ValueError(
                f"{place[0].__name__}.{place[1]} has been replaced by {now!r}: undo that before, two cannot take the "
                "same seam"
            )
    put({place: _OURS.get(place[1]) for place in places} | {FUNCTION: HeadFunction(backend, tile_bytes, layouts)})
    return Installed(before)


def uninstall() -> None:
    """Undoes `install`; does nothing if it is not installed."""
    if installed():
        put(theirs())
