"""Activations that go to the host, for tensors without contents: what `trainer.offload` leaves on the device."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..models.lm_head import causal_lm
from ..trainer.offload import LEAST_BYTES, WINDOW_BYTES, saving_by
from .trace import Recorder

_LABEL = "activations on their way"


class _Window:
    """The last storages that were saved, whose copies are on their way to the host."""

    def __init__(self, stay: set[int], recorder: Recorder) -> None:
        self._stay, self._recorder = stay, recorder
        self._moved: dict[int, Any] = {}
        self._leaving: deque[Any] = deque()
        self._bytes = 0

    def pack(self, x: Tensor) -> Any:
        """Returns what autograd keeps of a tensor that it saves."""
        storage = x.untyped_storage()
        if storage.nbytes() < LEAST_BYTES or storage._cdata in self._stay:
            return x
        self._leaving.append(storage)
        self._bytes += storage.nbytes()
        while self._bytes > WINDOW_BYTES:
            self._bytes -= self._leaving.popleft().nbytes()
        return x.shape, x.stride(), x.dtype

    def unpack(self, saved: Any) -> Tensor:
        """Returns new memory of the tensor."""
        if isinstance(saved, Tensor):
            return saved
        self._leaving.clear()
        shape, stride, dtype = saved
        with self._recorder.labelled(_LABEL):
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


@contextlib.contextmanager
def offloading(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Leaves on the device what `trainer.offload.offloading` does, but what is fetched ahead of the backward."""
    lm = causal_lm(model)
    stay = {x.untyped_storage()._cdata for x in (*lm.parameters(), *lm.buffers())}

    def hooks() -> saved_tensors_hooks:
        window = _Window(stay, recorder)
        return saved_tensors_hooks(window.pack, window.unpack)

    with saving_by(hooks, lm):
        yield
