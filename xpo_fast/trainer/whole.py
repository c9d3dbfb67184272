"""A model in parts, FSDP2's or ZeRO-3's, made whole on every process for a while, as sampling from it needs.

A model in parts gathers each layer in each forward, so all processes must run equally many forwards. Sampling cannot
promise that: completions end where they end, and each process has prompts of its own. Gathered once, a model needs no
other process any more; it takes the memory of all weights for that while, and one gather in place of one per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..head.sharded import wait_for_prefetched
from .sharding import loaded_in_parts, reshard

_ENGINES = ("torch.distributed", "deepspeed")  # packages whose hooks gather a model's parts, and free them


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Keeps a model whole on this process inside the block, as one that no engine has wrapped; others it leaves alone.

    Inside, each process may compute without the others, by the model or any module of it, and `state_dict` has all
    weights. They are for reading: a change is lost. Nothing is to be trained. All processes must enter together, and
    may leave alone. Within the block of one model another may be made whole, but not the same one again.
    """
    sharded: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]  # FSDPModules
    if sharded:
        reshard(model)  # what an earlier forward has left gathered may be older than the parts
        for module in sharded:
            module.unshard()
        with contextlib.ExitStack() as stack:
            stack.callback(reshard, model)
            stack.enter_context(_without_hooks(model))
            for module in sharded:
                stack.enter_context(_own_generate(module))
            yield
    elif loaded_in_parts(model):
        import deepspeed  # pyright: ignore[reportMissingImports]

        parameters: list[Any] = list(model.parameters())
        for p in parameters:
            p.ds_active_sub_modules.clear()  # no module is at work; a forward that ended before its head has left it in
        wait_for_prefetched(parameters)  # by such a forward; DeepSpeed would take them for gathered
        with deepspeed.zero.GatheredParameters(parameters), _without_hooks(model):
            yield
    else:
        yield


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes the engines' hooks off a model's modules, and puts them back in their order."""
    held = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
            engines = [key for key, hook in hooks.items() if _of_an_engine(hook)]
            if engines:
                held.append((hooks, dict(hooks)))
                for key in engines:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in held:
            since = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(before | since)


@contextlib.contextmanager
def _own_generate(module: nn.Module) -> Iterator[None]:
    """Takes back what `register_fsdp_forward_method`, which Trainer calls, has put around a module's `generate`."""
    wrapped = vars(module).get("generate")
    if not _of_an_engine(wrapped):
        yield
        return
    module.generate = wrapped.__wrapped__  # type: ignore[union-attr]
    try:
        yield
    finally:
        module.generate = wrapped  # type: ignore[assignment]


def _of_an_engine(hook: Any) -> bool:
    while hook is not None:
        # Where it was written: a wrapper names the module of what it wraps.
        written = getattr(hook, "__globals__", None) or getattr(getattr(hook, "__func__", None), "__globals__", {})
        module = written.get("__name__") or type(hook).__module__
        if any(f"{module}.".startswith(f"{name}.") for name in _ENGINES):
            return True
        # torch's wrappers: that of a hook of a state dict, and `torch.compiler.disable`, which DeepSpeed's hooks have.
        hook = getattr(hook, "hook", None) or getattr(hook, "__wrapped__", None)
    return False
