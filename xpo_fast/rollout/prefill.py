"""Prompts that rows of a batch have in common: the model reads each once, and the rows get copies of what it made."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("xpo_fast")

# Models that keep the state of their recurrent layers in the modules.
_STATE_IN_THE_MODEL = ("RecurrentGemmaForCausalLM",)


@contextlib.contextmanager
def each_prompt_once(
    lm: nn.Module, prompts: Sequence[Sequence[int]], caches: Callable[[Any], Iterable[Any]]
) -> Iterator[None]:
    """Lets the next forward of `lm`, which is to read these prompts, read those that are equal once.

    The caller sees nothing of it: the forward is called with all rows, (B, S), and returns with the last logits,
    (B, 1, V), and the cache of all rows. Models whose cache cannot be copied by rows read all of them.

    prompts: the token ids of each of the B rows, without padding. caches: returns, from the cache that the forward was
        given, all caches that it has filled.
    """
    places: dict[tuple[int, ...], int] = {}
    copies = [places.setdefault(tuple(ids), len(places)) for ids in prompts]
    if len(places) == len(copies):
        yield
        return
    prefill = _Prefill(copies, caches)
    hooks = (
        lm.register_forward_pre_hook(prefill.narrow, with_kwargs=True),
        lm.register_forward_hook(prefill.widen, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Prefill:
    """Hooks around a forward, of which the first call is made with the distinct rows alone."""

    def __init__(self, copies: list[int], caches: Callable[[Any], Iterable[Any]]) -> None:
        self.copies = torch.tensor(copies)  # (B,), the distinct row that each row is a copy of
        self.distinct = torch.tensor([copies.index(i) for i in range(max(copies) + 1)])  # (U,)
        self.caches = caches
        self.begun = False
        self.cache: Any = None  # that of the call, while it runs with the distinct rows

    def narrow(self, lm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Returns the arguments of the first call for the distinct rows."""
        if self.begun:
            return None
        self.begun = True
        cache = kwargs.get("past_key_values")
        if not _copies_by_rows(lm, cache):
            _say_that_all_are_read(type(lm).__name__)
            return None
        self.cache = cache
        return args, {name: self._distinct(x) for name, x in kwargs.items()}

    def widen(self, lm: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output of the first call for all rows."""
        if self.cache is None:
            return None
        for cache in self.caches(self.cache):
            cache.reorder_cache(self.copies)  # layer by layer, so that no second cache of all rows is ever held
        self.cache = None
        output.logits = output.logits[:, -1:].index_select(0, self.copies.to(output.logits.device))
        return output

    def _distinct(self, x: Any) -> Any:
        """Returns the distinct rows of ids, mask or types (B, S), or positions (B, S) or (axes, B, S)."""
        if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[-2] == len(self.copies):
            return x.index_select(-2, self.distinct.to(x.device))
        return x


def _copies_by_rows(lm: nn.Module, cache: Any) -> bool:
    """Returns whether copies of a cache's rows are all that a model needs in order to go on.

    The layers must be those of transformers itself: others may keep more than their `reorder_cache` moves. A cache that
    can be compiled comes with masks of another form. The state of a layer that is no attention may lie in the model
    instead, and is looked for in the cache only where the model is known.
    """
    from transformers import DynamicCache

    if type(cache) is not DynamicCache or cache.is_compileable:
        return False
    if any(type(layer).__module__ != DynamicCache.__module__ for layer in cache.layers):
        return False
    name = type(lm).__name__
    known = type(lm).__module__.startswith("transformers.models.") and name not in _STATE_IN_THE_MODEL
    return known or not any(hasattr(layer, "recurrent_states") for layer in cache.layers)


@functools.cache
def _say_that_all_are_read(name: str) -> None:
    """Logs, once per class, that its cache cannot be copied."""
    logger.info("%s reads a prompt anew for each of its completions: its cache cannot be copied by rows", name)
