"""Models that several processes keep in parts, FSDP2's and DeepSpeed's: how they compute before they are trained.

Trainer shards its model when training begins. What comes before, the check of the head, an evaluation and the
reference's log-probs, needs it earlier: `Ready` shards the policy as it will be trained, and `shard_copy` a frozen
copy of it. Every process has to run as many forwards as the others then, see `in_parts`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..head.sharded import is_partitioned, is_sharded, unpartitioned
from ..reduce import most_over_ranks
from ..resume import made_with_of
from .universal import loading_universal, parts_of

logger = logging.getLogger("xpo_fast")

_ELEMENTS = 4096  # of each weight's part, by which `sample_of_parts` tells whether it has changed
PROCESSES = "processes of DeepSpeed"  # in a checkpoint's settings, see resume.py
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # in the names of weights


def sharding_of(accelerator: Any) -> str:
    """Returns how processes share a model: "FSDP1", "FSDP2", "ZeRO-1", "ZeRO-2" or "ZeRO-3"; "" if each has all."""
    state = getattr(accelerator, "state", None)
    if getattr(state, "deepspeed_plugin", None) is not None:
        stage = state.deepspeed_plugin.zero_stage  # type: ignore[union-attr]
        return f"ZeRO-{stage}" if stage else ""
    plugin = getattr(state, "fsdp_plugin", None)
    return "" if plugin is None else f"FSDP{plugin.fsdp_version}"


def in_parts(model: nn.Module) -> bool:
    """Tells whether a forward of the model is one that all processes have to run together."""
    return any(is_sharded(p) or is_partitioned(p) for p in model.parameters())


def loaded_in_parts(model: nn.Module) -> bool:
    """Tells whether ZeRO-3 has partitioned the model's weights, so that no process has them whole."""
    return any(is_partitioned(p) for p in model.parameters())


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and values of a model's `state_dict`, sorted, each whole on every process for a while.

    The names are those of the model before it was wrapped. Every process has to take all of them.
    """
    named = {}
    for name, x in model.state_dict(keep_vars=True).items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = x
    for name, x in sorted(named.items()):
        if is_partitioned(x):
            with torch.no_grad():
                (x,) = unpartitioned(x)
        yield name, (x.detach().full_tensor() if is_sharded(x) else x.detach())


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered of a model and would keep until the next backward, as its root and its head."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # an FSDPModule, whose import takes a second
            module.reshard()  # type: ignore[operator]


def sample_of_parts(model: nn.Module) -> str:
    """Returns a hash of the beginning of this process's part of each trained weight; needs no other process."""
    reshard(model)
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if p.requires_grad:
            own: Any = p.to_local() if is_sharded(p) else getattr(p, "ds_tensor", p)  # type: ignore[operator]
            part = own.detach().reshape(-1)[:_ELEMENTS].cpu()
            digest.update(name.encode() + (part.view(torch.uint8).numpy().tobytes() if part.numel() else b""))
    return digest.hexdigest()


def any_of_them(here: bool, device: torch.device) -> bool:
    """Tells whether something is so on any process."""
    return bool(most_over_ranks(int(here), device))


class Ready:
    """A trainer's model, made able to compute before its first step; `release` before Trainer takes over.

    FSDP2: in parts, as it will be trained. ZeRO-3: in parts, with an engine that has no optimizer. ZeRO-1 and -2: whole
    on the process's device. Other models are left as they are.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.how = trainer, sharding_of(trainer.accelerator)
        self._engine: Any = None
        self._models: list[Any] = trainer.accelerator._models
        if self.how == "FSDP2":
            from accelerate.utils import fsdp2_apply_ac, fsdp2_prepare_model

            plugin, model = trainer.accelerator.state.fsdp_plugin, trainer.model
            plugin.set_auto_wrap_policy(model)
            if plugin.activation_checkpointing:  # around layers that are not in parts yet: accelerate knows no others
                model = fsdp2_apply_ac(trainer.accelerator, model)
                plugin.activation_checkpointing = False
            trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, model)
        elif self.how == "ZeRO-3":
            self._engine = engine_of(trainer.model, trainer.accelerator)
        elif self.how.startswith("ZeRO"):
            move_as_deepspeed(trainer.model, trainer.accelerator)
        else:
            return
        # Trainer's evaluation would prepare a model that accelerate does not know, which needs an optimizer beside it.
        self._models.append(trainer.model)
        if self.how.startswith("ZeRO"):
            trainer.deepspeed = self._engine or trainer.model

    def release(self) -> None:
        """Leaves the model to Trainer, which prepares it for training."""
        if self.how == "FSDP2":
            reshard(self.trainer.model)  # the optimizer is made of the parts
        elif self.how.startswith("ZeRO"):
            self._models.remove(self.trainer.model)
            self.trainer.deepspeed = None
            if self._engine is not None:
                self._engine.destroy()
                self._engine = None


def keep_outputs(accelerator: Any) -> None:
    """Lets models of FSDP2 return numbers in the dtype in which they have computed them.

    accelerate has them rounded to the dtype of the products. Losses, counts of tokens and log-probs are computed in
    float32 inside the model's forward, and a log-prob of −200 in bfloat16 is off by up to half a nat.
    """
    if sharding_of(accelerator) != "FSDP2":
        return
    plugin = accelerator.state.fsdp_plugin
    if getattr(plugin.mixed_precision_policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def settle_checkpointing(model: nn.Module, args: Any, accelerator: Any) -> None:
    """Has layers with frozen weights recomputed by reentrant checkpointing under ZeRO-3; changes args, and logs that.

    The other kind compares what a layer computes again with what it had computed, and finds that ZeRO-3 has freed the
    frozen weights in between. Raises ValueError if that is asked for.
    """
    if sharding_of(accelerator) != "ZeRO-3" or not args.gradient_checkpointing:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    if all(p.requires_grad for layer in layers for p in layer.parameters()):
        return
    name = "activation_checkpointing_kwargs"
    name = name if hasattr(args, name) else "gradient_checkpointing_kwargs"
    given = getattr(args, name)
    if not given:
        setattr(args, name, {"use_reentrant": True})
        logger.info("use_reentrant=True: ZeRO-3 frees frozen weights between a layer's two computations")
    elif not given.get("use_reentrant"):
        raise ValueError(
            "use_reentrant=False under ZeRO-3 and with frozen weights, of an adapter's base: the backward would fail, "
            f"since ZeRO-3 frees them between a layer's two computations. Set use_reentrant=True in {name}, or use "
            "ZeRO-2 or FSDP2"
        )


def check_reference(strategy: str, model: nn.Module, accelerator: Any) -> None:
    """Raises ValueError for a reference that cannot be had where the model is in parts."""
    how = sharding_of(accelerator)
    if how == "FSDP1" and strategy in ("copy", "cached"):
        raise ValueError(
            f"reference={strategy!r} needs FSDP2, in which a model can compute before it is trained: set version 2 in "
            'fsdp_config (fsdp_version in accelerate\'s file), or use LoRA with reference="adapter"'
        )
    if strategy == "copy" and loaded_in_parts(model):
        raise ValueError(
            'reference="copy" of a model that ZeRO-3 has loaded in parts: no process has what would be copied. Use '
            '"cached", or load the model before the arguments of the trainer are made'
        )


def processes_of(accelerator: Any) -> dict[str, int]:
    """Returns how many processes have a checkpoint's parts between them, where these have to be put together anew."""
    return {PROCESSES: accelerator.num_processes} if sharding_of(accelerator).startswith("ZeRO") else {}


def written_by_others(folder: Any, accelerator: Any) -> bool:
    """Tells whether another number of processes of DeepSpeed has written a checkpoint.

    Raises ValueError if its parts cannot be put together: they are not all there, or rows are cut over ranks.
    """
    now = processes_of(accelerator).get(PROCESSES)
    was = made_with_of(folder).get(PROCESSES, now)
    if now is None or was == now:
        return False
    told = f"{folder} was written by {was} processes, and this run has {now}: "
    parallel = getattr(accelerator, "parallelism_config", None)
    if getattr(parallel, "sp_size", 1) > 1:
        raise ValueError(f"{told}with sp_size, resume on as many")
    if (found := parts_of(Path(folder))) != was:
        raise ValueError(
            f"{told}it has the parts of {found}: put the files of all in one folder that all processes see"
        )
    return True


def shard_copy(model: nn.Module, accelerator: Any) -> nn.Module:
    """Returns a frozen model as the policy's processes keep theirs: in parts, or whole on this process's device."""
    how = sharding_of(accelerator)
    if how == "FSDP2":
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if how == "ZeRO-3":
        engine_of(model, accelerator)  # lives on in the hooks of the model's modules
        return model
    return move_as_deepspeed(model, accelerator) if how.startswith("ZeRO") else model.to(accelerator.device)


def engine_of(model: nn.Module, accelerator: Any) -> Any:
    """Returns an engine of ZeRO-3 without an optimizer, which partitions the model and gathers in its forwards."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    plugin = accelerator.state.deepspeed_plugin
    config = _without_auto(copy.deepcopy(plugin.deepspeed_config))
    for name in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
        config.pop(name, None)
    config["train_micro_batch_size_per_gpu"] = 1
    config["zero_optimization"].pop("offload_optimizer", None)
    text: Any = getattr(model, "config", None)
    width = getattr(text and text.get_text_config(), "hidden_size", None)
    if width:  # as accelerate sets them for training
        zero = plugin.deepspeed_config["zero_optimization"]
        sizes = {"stage3_prefetch_bucket_size": int(0.9 * width * width)}
        sizes["stage3_param_persistence_threshold"] = 10 * width
        config["zero_optimization"].update({k: v for k, v in sizes.items() if zero.get(k, "auto") == "auto"})
    training = [module for module in model.modules() if module.training]
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for module in training:
        module.training = True
    return engine


def move_as_deepspeed(model: nn.Module, accelerator: Any) -> nn.Module:
    """Moves a model to this process's device, in the dtype that DeepSpeed's engine trains in."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(accelerator.mixed_precision))
    return model.to(accelerator.device) if dtype is None else model.to(accelerator.device, dtype)


def _without_auto(config: Any) -> Any:
    """Returns a DeepSpeed configuration without the values that are left to be filled in: DeepSpeed's own defaults."""
    if isinstance(config, dict):
        return {name: _without_auto(value) for name, value in config.items() if value != "auto"}
    return config


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Frees what FSDP2 gathers of a model inside the block when that ends."""
    try:
        yield
    finally:
        reshard(model)


class ComputesInParts:
    """Mixin, before `transformers.Trainer`, whose model can compute before it is trained."""

    _ready: Ready | None = None
    _groups: list[list[nn.Parameter]] | None = None  # of the optimizer, if it is made of parts

    def check_sharding(self: Any) -> None:
        """Raises ValueError if FSDP is asked for and would not be had; settles mixed precision and checkpointing."""
        asked = self.args.fsdp and self.args.world_size > 1
        if asked and not self.is_fsdp_enabled and not self.is_fsdp_xla_enabled:
            raise ValueError(
                f"fsdp: accelerate shards no model on {self.args.device.type}, and would train a whole one on every "
                "process: leave it out"
            )
        keep_outputs(self.accelerator)
        settle_checkpointing(self.model, self.args, self.accelerator)

    def make_ready(self) -> None:
        """Lets the model compute before its first step where FSDP2 or DeepSpeed keep it; does nothing to other models.

        Every process must call it.
        """
        if self._ready is None:
            self._ready = Ready(self)

    def _prepare_for_training(self: Any, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        trainer: Any = super()
        with self._reading_parts(resume_from_checkpoint):
            return trainer._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        trainer: Any = super()
        with self._reading_parts(self.state.best_model_checkpoint):
            trainer._load_best_model()

    def _reading_parts(self: Any, folder: str | None) -> contextlib.AbstractContextManager[None]:
        if folder is None or not written_by_others(folder, self.accelerator):
            return contextlib.nullcontext()
        return loading_universal(Path(folder), self.accelerator)

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """Makes the optimizer as Trainer does."""
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        self.note_groups(optimizer)
        return optimizer

    def note_groups(self: Any, optimizer: Any) -> None:
        """Takes note of which parameters are in which group of the optimizer; call it when the groups have changed."""
        if self._ready is not None and sharding_of(self.accelerator) == "FSDP2":
            self._groups = [list(group["params"]) for group in optimizer.param_groups]

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule as Trainer does, once the optimizer has been prepared."""
        if self._groups is not None:
            # accelerate finds parameters by their address, and all of which this process has no part have the same.
            for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
                group["params"] = parameters
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
