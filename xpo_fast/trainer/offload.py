"""Keeps in the host's memory what a decoder's backward needs of its forward.

What autograd saves inside the decoder goes to pinned memory by a stream of its own while the forward goes on, and comes
back ahead of the backward. A storage is moved, and not a tensor: views of one storage share its copy, and keep their
strides. These stay where they are: parameters and buffers and their views, small storages, tensors of other devices and
tensor subclasses; and what the LM head and the loss save, which lie behind the decoder and which the backward begins
with. With activation checkpointing autograd saves the inputs of layers, and these are moved.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..files import size
from ..models.lm_head import causal_lm

LEAST_BYTES = 1 << 18  # of a storage that is moved: below, a copy takes longer to start than to make
WINDOW_BYTES = 1 << 28  # on their way to the host, and as many on their way back: what the device holds beside


class Copies(Protocol):
    """Copies bytes (n,) between a device and the host, beside what the device computes."""

    device: torch.device

    def leave(self, here: Tensor) -> tuple[Tensor, Any]:
        """Returns a copy on the host, and the event after which it is there."""
        ...

    def come_back(self, there: Tensor) -> tuple[Tensor, Any]:
        """Returns a copy on the device, and the event after which it is there."""
        ...

    def wait(self, event: Any) -> None:
        """Lets what the device computes from now on wait for the event of a copy."""
        ...


class CudaCopies:
    """`Copies` of a CUDA or ROCm device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def leave(self, here: Tensor) -> tuple[Tensor, Any]:
        """Copies to pinned memory; raises RuntimeError if the host has no room."""
        try:
            there = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the host has no {size(here.nbytes)} of pinned memory for activation_offload ({error}): lower "
                "per_device_train_batch_size, or keep less by gradient_checkpointing"
            ) from error
        return there, self._copy(there, here)

    def come_back(self, there: Tensor) -> tuple[Tensor, Any]:
        """Copies to memory of the stream that computes."""
        here = torch.empty(there.shape, dtype=there.dtype, device=self.device)
        return here, self._copy(here, there)

    def wait(self, event: Any) -> None:
        """Lets the stream that computes wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        # Behind what is queued: it writes what is copied, and may still read what the target's memory held before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


class _Moved:
    """The bytes (n,) of a storage that is on the host, or on its way there or back."""

    def __init__(self, place: int, origin: StorageWeakRef, version: int, here: Tensor, there: Tensor) -> None:
        self.place = place  # in the order in which they were saved
        self.origin = origin  # while it is kept, the storage's address is no other's
        self.version = version
        self.here: Tensor | None = here
        self.there = there
        self.arrival: Any = None  # event of its way back


class _Saved(NamedTuple):
    """What autograd keeps in the place of a tensor."""

    moved: _Moved
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Forward:
    """The two hooks of one forward. It lives as long as the graph, and the copies on the host do.

    stay: addresses of storages that are not moved.
    """

    def __init__(self, copies: Copies, stay: set[int]) -> None:
        self.copies, self._stay = copies, stay
        self._known: weakref.WeakValueDictionary[int, _Moved] = weakref.WeakValueDictionary()
        self._order: list[weakref.ref[_Moved]] = []
        self._leaving: deque[tuple[_Moved, Any]] = deque()
        self._leaving_bytes = 0
        self._next: int | None = None  # place of the one to come back next; None: the backward has not begun
        self._coming: dict[int, _Moved] = {}  # by place: on their way back, and not asked for yet
        self._coming_bytes = 0

    def __del__(self) -> None:
        # Nobody asked for these: their memory must not be given to others while it is written.
        for moved in self._coming.values():
            self.copies.wait(moved.arrival)

    def pack(self, x: Tensor) -> Tensor | _Saved:
        """Returns what autograd keeps of a tensor that it saves."""
        if type(x) is not Tensor or x.layout is not torch.strided or x.device != self.copies.device:
            return x
        storage = x.untyped_storage()
        if storage.nbytes() < LEAST_BYTES or storage.data_ptr() in self._stay:
            return x
        moved = self._known.get(storage._cdata)
        if moved is None or moved.version != x._version:
            moved = self._move(storage, x._version)
        return _Saved(moved, x.dtype, x.shape, x.stride(), int(x.storage_offset()))

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        """Returns the tensor that `pack` was given, bit for bit."""
        if isinstance(saved, Tensor):
            return saved
        moved, dtype, shape, stride, offset = saved
        here = self._bring(moved)
        return torch.empty(0, dtype=dtype, device=here.device).set_(here.untyped_storage(), offset, shape, stride)

    def _move(self, storage: torch.UntypedStorage, version: int) -> _Moved:
        here = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType]
        there, event = self.copies.leave(here)
        moved = _Moved(len(self._order), StorageWeakRef(storage), version, here, there)
        self._known[storage._cdata] = moved
        self._order.append(weakref.ref(moved))
        self._leaving.append((moved, event))
        self._leaving_bytes += there.nbytes
        while self._leaving_bytes > WINDOW_BYTES:
            oldest, event = self._leaving.popleft()
            self._leaving_bytes -= oldest.there.nbytes
            self.copies.wait(event)  # its memory is given to what is computed next
            oldest.here = None
        return moved

    def _bring(self, moved: _Moved) -> Tensor:
        """Returns the bytes on the device, and lets those that were saved before them follow."""
        if self._next is None:
            self._next = len(self._order) - 1
            self._leaving.clear()  # the backward reads these first: they stay on the device until it has
        if moved.here is None:
            moved.here, moved.arrival = self.copies.come_back(moved.there)
        if self._coming.pop(moved.place, None) is not None:
            self._coming_bytes -= moved.there.nbytes
        if moved.arrival is not None:
            self.copies.wait(moved.arrival)
            moved.arrival = None
        self._next = min(self._next, moved.place - 1)
        while self._next >= 0 and self._coming_bytes < WINDOW_BYTES:
            other = self._order[self._next]()
            self._next -= 1
            if other is not None and other.here is None:
                other.here, other.arrival = self.copies.come_back(other.there)
                self._coming[other.place] = other
                self._coming_bytes += other.there.nbytes
        return moved.here


@contextlib.contextmanager
def offloading(model: nn.Module, copies: Copies) -> Iterator[None]:
    """Moves what autograd saves in the model's decoder to the host, in every forward with gradient inside the block.

    model: a causal LM of transformers on the device of `copies`; it may be a PEFT model, or wrapped later.
    """
    lm = causal_lm(model)

    def hooks() -> saved_tensors_hooks:
        own = (x for x in (*lm.parameters(), *lm.buffers()) if x.layout is torch.strided)
        forward = Forward(copies, {x.untyped_storage().data_ptr() for x in own})
        return saved_tensors_hooks(forward.pack, forward.unpack)

    with saving_by(hooks, lm):
        yield


@contextlib.contextmanager
def saving_by(hooks: Callable[[], saved_tensors_hooks], lm: Any) -> Iterator[None]:
    """Enters `hooks()` for what autograd saves in the decoder, in every forward with gradient inside the block."""
    open_: list[contextlib.AbstractContextManager] = []

    def begin(*_: Any) -> None:
        saving = hooks() if torch.is_grad_enabled() else contextlib.nullcontext()
        saving.__enter__()
        open_.append(saving)

    def end(*_: Any) -> None:
        if open_:  # not if another hook raised before
            open_.pop().__exit__(None, None, None)

    decoder = lm.get_decoder()
    handles = [decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_offload(args: Any, *, sharded: bool = False) -> None:
    """Raises ValueError if args.activation_offload cannot be done, which it cannot where there is no GPU.

    args: a `MethodConfig`. sharded: FSDP or DeepSpeed keep the model in parts.
    """
    how = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    if args.device.type != "cuda":
        why = (
            f"it moves activations from a GPU to the host's memory, and this run is on the {args.device.type}: leave "
            "it out; gradient_checkpointing keeps fewer of them"
        )
    elif sharded or args.fsdp or args.deepspeed:
        why = (
            "FSDP and DeepSpeed gather weights in the forward, which would be moved, too: use their own, "
            "activation_checkpointing_offload of accelerate's FSDP plugin or cpu_checkpointing of DeepSpeed"
        )
    elif args.torch_compile:
        why = "torch_compile decides itself what a backward keeps: leave one of the two out"
    elif how.get("offload"):
        why = "offload of the checkpointing's kwargs moves the inputs of layers already: leave one of the two out"
    else:
        return
    raise ValueError(f"activation_offload: {why}")
