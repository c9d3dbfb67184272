"""Policies that are measured one after another: loaded at first use, freed when their part is done."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..models.modes import without_adapter


class Source:
    """A model and its tokenizer, loaded when asked for. load: returns both, as `models.load_model` does."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]) -> None:
        self._load = load
        self._loaded: tuple[Any, Any] | None = None

    def get(self) -> tuple[Any, Any]:
        """Returns the model and the tokenizer."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def close(self) -> None:
        """Frees the model; `get` loads it again."""
        if self._loaded is not None:
            self._loaded = None
            gc.collect()


class Policy:
    """A policy by name. adapter_off: the model without its adapter, which another policy of the same source is."""

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        adapter_off: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.source, self.adapter_off = name, source, adapter_off
        self.chat_template_kwargs = chat_template_kwargs

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        """Yields the model as this policy."""
        model, _ = self.source.get()
        with without_adapter(model) if self.adapter_off else contextlib.nullcontext():
            yield model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model, which is loaded for it."""
        return self.source.get()[1]
