"""Which forwards of TRL's trainers read their rows in a layout; why others read padded rows, refused or said once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from ...layouts import Layout, install_layouts, laid_out, lay_out, remove_layouts, unsupported
from ...models.lm_head import causal_lm
from .base import IGNORE

logger = logging.getLogger("xpo_fast")

CHOICES = ("auto", "packed", "shared")
_TAKEN = ("input_ids", "attention_mask", "num_items_in_batch")  # tensors among a forward's arguments that go with rows
# Whether the forward that runs was asked for its layout.
_ASKED: ContextVar[bool] = ContextVar("ASKED", default=False)


class Layouts:
    """What one `install(layout=…)` asks for, and the models that it put hooks on."""

    def __init__(self, requested: str) -> None:
        if requested not in CHOICES:
            raise ValueError(f"layout must be one of {', '.join(CHOICES)}, or None for padded rows, got {requested!r}")
        self.requested = requested
        self._hindrance: str | None = None
        self._models: WeakSet[Any] = WeakSet()
        self._reasons: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
        self._said: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def around(self, model: Any, given: Mapping[str, Any], targets: Tensor | None) -> Iterator[None]:
        """Lets a forward with the arguments `given` read its rows in their layout, or padded, which is said.

        targets: (R, T) aligned; hidden states are read where one is, or everywhere without targets. Raises ValueError
        where rows must stay padded and a layout was asked for by name.
        """
        token = _ASKED.set(True)
        try:
            with laid_out(self._lay_out(model, given, targets)):
                yield
        finally:
            _ASKED.reset(token)

    def meet(self, model: Any, hindrance: str | None) -> None:
        """Refuses, or says, that the rows of a trainer's model must stay padded. hindrance: why, whatever the model."""
        self._hindrance = hindrance
        lm = causal_lm(model)
        self._reasons[lm] = _why_padded(model)
        why = hindrance or self._reasons[lm]
        if why is not None:
            self.stay_padded(type(lm).__name__, why)

    def _lay_out(self, model: Any, given: Mapping[str, Any], targets: Tensor | None) -> Layout | None:
        lm = causal_lm(model)
        if lm not in self._reasons:
            self._reasons[lm] = _why_padded(model)
        why = self._hindrance or self._reasons[lm] or _why_not_with(lm, given)
        if why is None:
            ids, mask = given["input_ids"], given["attention_mask"]
            # TRL asks for log-probs of padding, too, and leaves them out of its losses.
            wanted = None if targets is None else (targets != IGNORE) & mask.bool()
            try:
                layout = lay_out(ids, mask, wanted, share=self.requested != "packed")
            except ValueError as error:
                why = str(error)
            else:
                install_layouts(model)
                self._models.add(model)
                return layout.to(ids.device)
        self.stay_padded(type(lm).__name__, why)
        return None

    def stay_padded(self, name: str, why: str) -> None:
        """Says, once, that the rows of a model or trainer stay padded; ValueError if a layout was asked for by name."""
        if self.requested != "auto":
            raise ValueError(
                f'layout={self.requested!r}: the rows of {name} must stay padded: {why}; use layout="auto", or None'
            )
        if (name, why) not in self._said:
            self._said.add((name, why))
            logger.warning("layout auto: the rows of %s stay padded: %s", name, why)

    def check_asked(self) -> None:
        """Refuses, or says, that a forward has come to TRL's head without having been asked for its layout."""
        if not _ASKED.get():
            self.stay_padded("a trainer made before install(layout=…)", "its model has TRL's forward; make it after")

    def remove(self) -> None:
        """Takes the hooks off every model."""
        for model in list(self._models):
            remove_layouts(model)
        self._models.clear()


def _why_padded(model: Any) -> str | None:
    """Returns why a model's rows must stay padded, whatever they are; None if they need not."""
    adapters = getattr(model, "peft_config", {}) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "prompt learning puts tokens in front of its rows"
    return unsupported(model)


def _why_not_with(lm: Any, given: Mapping[str, Any]) -> str | None:
    """Returns why a forward with these arguments must read padded rows; None if it need not."""
    if torch.compiler.is_compiling():
        return "torch.compile compiles the model's forward, in which a layout cannot be put"
    config = lm.config.get_text_config()
    if given.get("output_router_logits") or getattr(config, "output_router_logits", False):
        return "the loss of its router is made of padded rows; router_aux_loss_coef=0.0 leaves it out"
    if given.get("past_key_values") is not None:
        return "prompt learning puts keys and values in front of its rows"
    other = [name for name, x in given.items() if isinstance(x, Tensor) and name not in _TAKEN]
    if other:
        return f"its forward is given {', '.join(other)} beside the rows (images, packed rows, prompt learning, …)"
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.shape != mask.shape:
        return "its forward is not given input_ids and an attention_mask of the same shape"
    return None
