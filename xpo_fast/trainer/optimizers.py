"""What transformers' optimizers (`optim=`) need, and what they would leave undone without a word.

transformers makes them. Here is what is refused before the first step, by a step on a small matrix and by the settings.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import check_target_module_exists

# Whose step is a step of the weights that have a gradient, and of nothing else.
STEP_ALONE = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("galore_adamw", "galore_adafactor", "apollo_adamw"),
)
LOMO = ("lomo", "adalomo")  # which step in the backward by themselves
_OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")  # nothing to install
_PROJECTING = ("galore_", "apollo_")  # beginnings of names: gradients of some matrices are projected
_LAYERWISE = "_layerwise"


def name_of(optim: Any) -> str:
    """Returns the name of an optimizer, which may be of transformers' enumeration."""
    return str(getattr(optim, "value", optim))


def check_settings(args: Any) -> None:
    """Raises ValueError for settings beside args.optim that it would not honour. args: TrainingArguments."""
    optim, targets = name_of(args.optim), args.optim_target_modules
    if optim.endswith(_LAYERWISE):
        raise ValueError(
            f"optim={optim} keeps no state in checkpoints and clips nothing: use "
            f"optim={optim.removesuffix(_LAYERWISE)} with optimizer_in_backward"
        )
    if optim.startswith("paged_") and args.device.type == "cpu":
        raise ValueError(
            f"optim={optim} moves its state between a GPU and the host, and this run is on the CPU: use an optimizer "
            "that is not paged, such as adamw_8bit"
        )
    projects = optim.startswith(_PROJECTING)
    if targets is not None and not projects:
        raise ValueError(f"optim_target_modules are those that galore_… and apollo_… project, and optim is {optim}")
    if not projects and optim not in LOMO:
        return
    if projects and not targets:
        raise ValueError(
            f"optim={optim} projects the gradients of some modules: name them by optim_target_modules, "
            "or write all-linear"
        )
    if optim == "adalomo" and name_of(args.save_strategy) != "no":
        raise ValueError(
            "optim=adalomo keeps its state outside of checkpoints, so that no run goes on from one: set "
            "save_strategy to no, or use optim=adafactor with optimizer_in_backward"
        )
    if args.weight_decay:
        raise ValueError(f"optim={optim} is given no weight decay by transformers: set weight_decay to 0")


def check_optimizer(args: Any, model: nn.Module | None = None) -> list[type]:
    """Raises ValueError if the optimizer of `args` cannot be had here, or finds nothing to project in `model`.

    args: TrainingArguments, which stay as they are. Returns the classes of what its state has beside tensors and
    numbers, which torch.load must be told of.
    """
    classes = [] if name_of(args.optim) in _OF_TORCH else _rehearse(args)
    if model is not None and args.optim_target_modules:
        _check_targets(args, model)
    return classes


def _rehearse(args: Any) -> list[type]:
    """Takes a step on a small matrix; raises ValueError if the optimizer's package or device is missing.

    Returns the classes of what the state has beside tensors and numbers.
    """
    optim, targets = name_of(args.optim), args.optim_target_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages when they are imported
        try:
            # Large enough for optimizers that quantise.
            matrix: Any = nn.Sequential(nn.Linear(128, 128, bias=False, device=args.device))
            args.optim_target_modules = "all-linear" if targets else targets
            optimizer, keywords = Trainer.get_optimizer_cls_and_kwargs(args, matrix)
            over = keywords.pop("params", keywords.pop("model", list(matrix.parameters())))
            made = optimizer(over, **keywords)
            if optim in LOMO:
                return []
            for p in matrix.parameters():
                p.grad = torch.ones_like(p)
            made.step()
            kinds = {type(x) for state in made.state.values() for x in state.values()}
            return [kind for kind in kinds if kind.__module__ != "builtins" and not issubclass(kind, torch.Tensor)]
        except Exception as error:  # any package may provide the optimizer
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"optim={optim} does not work here: {reason}") from error
        finally:
            args.optim_target_modules = targets


def _check_targets(args: Any, model: nn.Module) -> None:
    """Raises ValueError if args.optim_target_modules name no module that is trained."""
    targets = args.optim_target_modules
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    every = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    found = {n: m for n, m in linear.items() if every or check_target_module_exists(targets, n)}
    optim = name_of(args.optim)
    if not found:
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"optim={optim}: optim_target_modules={targets!r} are no linear modules of the model, whose are "
            f"{', '.join(names)}"
        )
    if not any(m.weight.requires_grad for m in found.values()):
        raise ValueError(
            f"optim={optim} projects the gradients of {len(found)} modules, and their weights are frozen, as those "
            "under an adapter are: train every weight (--full)"
        )
