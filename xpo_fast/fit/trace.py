"""Records what a computation on tensors without contents keeps in memory: storages, their owners, and when they go."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..head.gemms import KEEP_BYTES

# Owners of activations, by the class of the innermost module that has made them; those of an adapter are its layer's.
_KINDS = (
    ("attention", re.compile(r"[Aa]ttention|Attn|Mixer|Mamba")),
    ("MLP", re.compile(r"MLP|Mlp|FeedForward|Experts|MoE|Moe|SparseMoe")),
    ("norms", re.compile(r"Norm")),
    ("embeddings", re.compile(r"Embedding$")),
)
OTHER_ACTIVATIONS = "residual stream, mask and positions"
GRADIENTS = "gradients"
BACKWARD = "gradients of activations"
TILE, HEAD = "tile of logits", "hidden states at the head"
_HEAD_OPERATORS = ("xpo_fast::token_stats", "xpo_fast::token_stats_backward")
_MAKES, _WRITES, _OTHER = "makes", "writes", "other"  # what an operator does
NODES = "autograd's graph"
# Nodes of autograd's graph lie between tensors in the host's heap, and stay when those are freed: one of so many bytes
# per so many operators, and so many while a layer is recomputed. Chosen on five runs (docs/fit.md).
_NODE, _OPERATORS, _RECOMPUTED = 100, 4, 50
_LEAST = 512  # bytes of a storage below which it is not recorded
_SMALL = 1 << 22  # numbers up to which the contents of what comes from the host are kept


@dataclass
class Trace:
    """Storages as they come and go.

    events: (number of a storage, its bytes), with 0 bytes where it is freed. owners: of each number. phases: where in
    the events each begins, and its name.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        """Begins a phase; one in which nothing happens is left out."""
        if self.phases and self.phases[-1][0] == len(self.events):
            self.phases.pop()
        self.phases.append((len(self.events), name))

    def take(self, size: int, owner: str) -> int:
        """Records `size` bytes; returns their number."""
        self.owners.append(owner)
        self.events.append((len(self.owners) - 1, size))
        return len(self.owners) - 1

    def give(self, number: int) -> None:
        """Records that what has this number is freed."""
        self.events.append((number, 0))


class Recorder(TorchDispatchMode):
    """Records the storages that operators return, while it is entered.

    The device's tensors are on the meta device: they have no contents. What comes from the host, such as ids, masks and
    where rows begin, keeps its contents beside, and so does what is computed from that alone: code that looks at it
    finds what it would find.

    tile: returns the bytes of the head's tile from its tokens and whether it has a gradient. on_cpu: the head
    keeps its tile for the next call, and autograd's graph is beside the tensors. head_shape: (V, D) of
    the LM head, by which what is made at the head is told apart.
    """

    def __init__(self, trace: Trace, tile: Callable[[int, bool], int], *, on_cpu: bool) -> None:
        super().__init__()
        self.trace, self.tile, self.on_cpu = trace, tile, on_cpu
        self._tiles: list[tuple[int, int]] = []  # bytes and numbers of those that are kept
        self._sizes: dict[int, int] = {}  # bytes of all tiles by their numbers
        self.head_shape: tuple[int, ...] = ()
        self._known: dict[int, int] = {}  # by the address of a storage
        self._made: dict[Any, Any] = {}  # what operators return, by their signature
        self._nodes: deque[int] = deque()  # numbers of the nodes of autograd's graph
        self._operators = 0  # that made a node
        self._label: list[str] = []
        self._modules: list[str | None] = []
        self._backward = False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ):
            self._open.callback(handle.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator, and records what it returns."""
        kwargs = kwargs or {}
        given = list(_tensors((args, *kwargs.values())))
        where = kwargs.get("device")
        if not any(x.is_meta for x in given) and (where is None or torch.device(where).type != "meta"):
            return func(*args, **kwargs)
        known, real = self._with_contents(func, given, args, kwargs)
        if known and func is torch.ops.aten._local_scalar_dense.default:
            return real
        if known and _effect(func) == _MAKES:  # the shape may depend on what is in there
            out = tree_map_only(Tensor, lambda x: x.to("meta"), real)
        else:
            tile = contextlib.nullcontext()
            if func.name().startswith(_HEAD_OPERATORS):
                tile = self._tile(*args)
            elif func is torch.ops.aten.index.Tensor:
                args = args[0], _by_number(args[1])
            if not all(x.is_meta for x in given):
                args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            with tile:
                out = self._shapes(func, args, kwargs)
        contents = _tensors((real,)) if known else repeat(None)
        made: Iterator[Any] = _tensors((out,))
        for x, values in zip(made, contents, strict=False):
            x._contents = values
            self.record(x)
        if self.on_cpu and torch.is_grad_enabled():
            self._add_node()
        return out

    def _add_node(self) -> None:
        self._operators += 1
        if self._operators % _OPERATORS == 0:
            self._nodes.append(self.trace.take(_NODE, NODES))
            if self._backward and len(self._nodes) > _RECOMPUTED:
                self.trace.give(self._nodes.popleft())

    def _with_contents(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Returns whether all that is given to an operator is known and small, and what it returns of that."""
        contents = [getattr(x, "_contents", None) if x.is_meta else x for x in given]
        if any(x is None for x in contents) or sum(x.numel() for x in given) > _SMALL:
            return False, None
        if not given and math.prod(args[0] if args and isinstance(args[0], (list, tuple)) else args or [0]) > _SMALL:
            return False, None
        by_id = dict(zip(map(id, given), contents, strict=True))
        args, kwargs = tree_map_only(Tensor, lambda x: by_id[id(x)], (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return True, func(*args, **kwargs)

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns what an operator returns; of an operator that was called alike, new tensors of the same shapes."""
        effect = _effect(func)
        if effect == _OTHER:
            return func(*args, **kwargs)
        key = func, _signature(args), _signature(tuple(kwargs.items()))
        try:
            made = self._made.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs)
        if made is None:
            out = func(*args, **kwargs)
            if effect == _WRITES:
                self._made[key] = "out" if out is kwargs.get("out") else 0 if args and out is args[0] else _OTHER
            else:
                tensors = list(_tensors((out,)))
                plain = isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and len(tensors) == len(out))
                taken = {x.untyped_storage()._cdata for x in _tensors((args, *kwargs.values()))}
                plain &= not any(x.untyped_storage()._cdata in taken for x in tensors)  # as of _unsafe_view
                self._made[key] = (type(out), [(x.shape, x.stride(), x.dtype) for x in tensors]) if plain else _OTHER
            return out
        if made == _OTHER:
            return func(*args, **kwargs)
        if effect == _WRITES:
            return kwargs["out"] if made == "out" else args[0]
        kind, shapes = made
        out = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in shapes]
        return out if kind is list else tuple(out) if kind is tuple else out[0]

    def record(self, x: Tensor, owner: str | None = None) -> None:
        """Records the storage of a tensor unless it is known; owner: in place of the one that the moment tells."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            if owner is not None:
                self.trace.owners[self._known[key]] = owner
            return
        size = storage.nbytes()
        if size < _LEAST:
            return
        owner = owner or self._owner(x)
        number = self._take_tile(size) if owner == TILE else self.trace.take(size, owner)
        self._known[key] = number
        weakref.finalize(storage, self._gone, key, number)

    def _gone(self, key: int, number: int) -> None:
        if self._known.pop(key, None) is None:
            return
        if self.trace.owners[number] == TILE:
            self._give_tile(number)
        else:
            self.trace.give(number)

    def _take_tile(self, size: int) -> int:
        if self._tiles:
            kept, number = self._tiles.pop()
            if kept >= size:
                return number
            self.trace.give(number)
        number = self.trace.take(size, TILE)
        self._sizes[number] = size
        return number

    def _give_tile(self, number: int) -> None:
        size = self._sizes[number]
        if self.on_cpu and not self._tiles and size <= KEEP_BYTES:
            self._tiles.append((size, number))
        else:
            self.trace.give(number)

    def _owner(self, x: Tensor) -> str:
        if self._label:
            return self._of_head(x) if self._label[-1] == HEAD else self._label[-1]
        kind = next((kind for kind in reversed(self._modules) if kind is not None), None)
        if kind is None and self._backward:
            return BACKWARD
        return kind or OTHER_ACTIVATIONS

    def _of_head(self, x: Tensor) -> str:
        if tuple(x.shape) == self.head_shape:
            return "gradient of the head"
        return TILE if x.dim() == 2 and x.shape[-1] >= self.head_shape[0] else HEAD

    @contextlib.contextmanager
    def labelled(self, owner: str) -> Iterator[None]:
        """Records what is made inside the block as this owner's; as HEAD its tiles and dW are told apart."""
        self._label.append(owner)
        try:
            yield
        finally:
            self._label.pop()

    @contextlib.contextmanager
    def backward(self, model: nn.Module) -> Iterator[None]:
        """Records what is made inside the block as the backward's, and what is added to a weight's `.grad` as such."""
        handles = [
            p.register_post_accumulate_grad_hook(self._accumulated) for p in model.parameters() if p.requires_grad
        ]
        self._backward = True
        try:
            yield
        finally:
            self._backward = False
            while self._nodes:
                self.trace.give(self._nodes.popleft())
            for handle in handles:
                handle.remove()

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is not None:
            self.record(p.grad, GRADIENTS)

    @contextlib.contextmanager
    def _tile(self, *args: Any) -> Iterator[None]:
        """Records the tile inside an operator of the head, which has these arguments."""
        targets, ignore_index = args[4], args[10]
        known = getattr(targets, "_contents", None) if targets.is_meta else targets
        scored = len(targets) if known is None else int((known != ignore_index).sum())
        number = self._take_tile(self.tile(scored, args[-1] is True))
        yield
        self._give_tile(number)

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._modules.append(_kind_of(type(module)))

    def _leave_module(self, module: nn.Module, *_: Any) -> None:
        self._modules.pop()


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yields the tensors among nested values, in order."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _by_number(indices: Any) -> list[Any]:
    """Returns the indices of an indexing, with masks whose contents are known as numbers."""
    found: list[Any] = []
    for x in indices:
        known = None if x is None else getattr(x, "_contents", None) if x.is_meta else x
        if known is None or known.dtype != torch.bool:
            found.append(x)
        else:
            found += [numbers.to("meta") for numbers in known.nonzero().unbind(1)]
    return found


def _signature(values: Any) -> tuple:
    """Returns what the shapes of an operator's results depend on."""
    return tuple(
        (x.shape, x.stride(), x.dtype)
        if isinstance(x, Tensor)
        else _signature(x)
        if isinstance(x, (list, tuple))
        else (type(x), x)
        for x in values
    )


@functools.cache
def _effect(func: Any) -> str:
    """Returns whether an operator makes new tensors, writes one that it returns, or does something else."""
    returns = func._schema.returns
    if not returns or not all("Tensor" in str(x.type) for x in returns):
        return _OTHER
    if all(x.alias_info is None for x in returns):
        return _MAKES
    alone = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
    return _WRITES if alone else _OTHER


@functools.cache
def _kind_of(kind: type) -> str | None:
    return next((owner for owner, pattern in _KINDS if pattern.search(kind.__qualname__)), None)


def record_weights(model: nn.Module, recorder: Recorder, owner: Callable[[Tensor], str]) -> None:
    """Records a model's parameters and buffers. owner: returns that of each."""
    for x in (*model.parameters(), *model.buffers()):
        recorder.record(x, owner(x))
