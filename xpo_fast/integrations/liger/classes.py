"""Liger's classes, made of its functional forms: they differ in the order of arguments, and in a default or two."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Loss(torch.nn.Module):
    """Module of a function: the constructor takes the options, which become attributes, and forward takes the tensors.

    A subclass names its function `of` and, in Liger's order, the function's parameters that are options and those that
    are operands; `lin_weight` is its `weight`. Types and defaults are the function's, but for those in `defaults`.
    check: raises ValueError for options; the constructor calls it with those that it has a parameter for.
    """

    def __init_subclass__(
        cls,
        *,
        of: Callable[..., Any] | None = None,
        options: str = "",
        operands: str = "",
        check: Callable[..., None] | None = None,
        **defaults: Any,
    ) -> None:
        super().__init_subclass__()
        if of is None:  # a user's subclass of one of Liger's classes
            return
        parameters, renamed = inspect.signature(of).parameters, {"lin_weight": "weight"}

        def signature(names: str) -> inspect.Signature:
            taken = [parameters[renamed.get(n, n)].replace(name=n) for n in names.split()]
            return inspect.Signature([_SELF, *(p.replace(default=defaults.get(p.name, p.default)) for p in taken)])

        def arguments(expected: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                bound = expected.bind(None, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}: {error}") from None
            bound.apply_defaults()
            return {name: x for name, x in bound.arguments.items() if name != "self"}

        of_options, of_operands = signature(options), signature(operands)
        checked = inspect.signature(check).parameters if check else ()

        def __init__(self: Loss, *args: Any, **kwargs: Any) -> None:
            torch.nn.Module.__init__(self)
            given = arguments(of_options, *args, **kwargs)
            if check:
                check(**{name: given[name] for name in checked})
            for name, x in given.items():
                setattr(self, name, x)

        def forward(self: Loss, *args: Any, **kwargs: Any) -> Any:
            tensors = {renamed.get(n, n): x for n, x in arguments(of_operands, *args, **kwargs).items()}
            return of(**tensors, **{name: getattr(self, name) for name in options.split()})

        cls.__init__, cls.forward = _signed(__init__, of_options), _signed(forward, of_operands)


def _signed(call: Any, signature: inspect.Signature) -> Any:
    call.__signature__ = signature
    return call


def function(name: str, apply: Callable[..., Any]) -> type:
    """Returns a class that has nothing but its `apply`, as a `torch.autograd.Function` is used."""
    return type(name, (), {"apply": staticmethod(apply), "__module__": apply.__module__})
