"""A value head on a causal LM: a linear map of the hidden states that its LM head reads, for rewards and for critics.

It is a submodule `value_head` of the causal LM, so that wrappers (PEFT, DDP, FSDP) and optimizers see it. The model's
own forward is unchanged; with `install_fused_loss`, values and token log-probs come from one forward:

    head = attach_value_head(model)
    model(input_ids=…, attention_mask=…, fused_loss=lambda hidden, lm_head: head(hidden))    # (R, T, K)

It is saved beside the model, not in it: the folder remains that of a plain causal LM, or of a plain adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from .lm_head import causal_lm, head_layer

VALUE_HEAD_FILE = "value_head.safetensors"
_NAME = "value_head"


class ValueHead(nn.Module):
    """Computes values (…, K) = hidden (…, D) Wᵀ + b in float32, whatever the dtype of hidden and autocast.

    std: standard deviation of the normal distribution from which W (K, D) is drawn; b (K,) starts at 0. With the
        default, 0, every value starts at 0, which is what a critic should predict for a policy it has not seen; but
        then outputs that share a loss stay equal, and the trunk has no gradient at the first step.
    """

    def __init__(self, width: int, outputs: int = 1, dtype: torch.dtype = torch.float32, *, std: float = 0.0) -> None:
        super().__init__()
        if width < 1 or outputs < 1 or std < 0:
            got = f"width={width}, outputs={outputs}, std={std}"
            raise ValueError(f"expected width >= 1, outputs >= 1, std >= 0; got {got}")
        # Parameters of its own, no nn.Linear: PEFT's target_modules="all-linear" is not to put an adapter on it.
        self.weight = nn.Parameter(torch.zeros(outputs, width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype))
        if std:
            nn.init.normal_(self.weight, std=std)

    @property
    def outputs(self) -> int:
        """The number of values per hidden state, K."""
        return getattr(self.weight, "ds_shape", self.weight.shape)[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns values (…, K), float32, of hidden (…, D), or of `Head.inputs` (…, D + r): the last r are not read."""
        kind = hidden.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
            hidden = hidden[..., : self.weight.shape[1]].float()
            return nn.functional.linear(hidden, self.weight.float(), self.bias.float())


def attach_value_head(model: nn.Module, outputs: int = 1, *, std: float = 0.0) -> ValueHead:
    """Returns the value head of a causal LM of `transformers`, PEFT-wrapped or not; makes one if it has none.

    The value head is trainable after this call; a new one is float32 and on the LM head's device. Call this after
    `get_peft_model`, which freezes everything it finds. std: see `ValueHead`. Raises ValueError if the model has a
    value head with another number of outputs.
    """
    lm = causal_lm(model)
    if (present := value_head(model)) is not None:
        if present.outputs != outputs:
            raise ValueError(
                f"expected a value head with {outputs} outputs, the model has one with {present.outputs}: "
                "detach_value_head(model) first"
            )
        present.requires_grad_(True)
        return present
    weight: Any = head_layer(lm).weight
    shape = getattr(weight, "ds_shape", weight.shape)
    made = ValueHead(shape[1], outputs, std=std).to(weight.device)
    made.train(lm.training)
    setattr(lm, _NAME, made)
    lm._keys_to_ignore_on_save = {*(lm._keys_to_ignore_on_save or ()), *_keys(made)}
    return made


def value_head(model: nn.Module) -> ValueHead | None:
    """Returns the value head of a model, or None."""
    return getattr(causal_lm(model), _NAME, None)


def detach_value_head(model: nn.Module) -> None:
    """Removes the value head, if any, from a model."""
    lm, present = causal_lm(model), value_head(model)
    if present is not None:
        lm._keys_to_ignore_on_save = set(lm._keys_to_ignore_on_save) - set(_keys(present))
        delattr(lm, _NAME)


def _keys(head: ValueHead) -> list[str]:
    return [f"{_NAME}.{name}" for name, _ in head.named_parameters()]


def save_value_head(model: nn.Module, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes the value head, if the model has one, into folder/value_head.safetensors, which appears complete.

    state_dict: the whole model's, if its parameters are kept in parts (FSDP, ZeRO-3).
    """
    from safetensors.torch import save

    present = value_head(model)
    if present is None:
        return
    found = present.state_dict()
    if state_dict is not None:
        found = {n: x for n in found for key, x in state_dict.items() if key.endswith(f"{_NAME}.{n}")}
    path = Path(folder) / VALUE_HEAD_FILE
    write_atomically(path, save({name: x.detach().cpu().contiguous() for name, x in found.items()}))


def load_value_head(model: nn.Module, folder: str | Path) -> ValueHead:
    """Reads folder/value_head.safetensors into the model's value head, which is attached if there is none.

    Raises ValueError if there is no such file, or if its shapes are not those of the model.
    """
    from safetensors.torch import load_file

    path = Path(folder) / VALUE_HEAD_FILE
    if not path.is_file():
        raise ValueError(f"no value head in {folder}: expected the file {VALUE_HEAD_FILE} of save_value_head")
    found = load_file(path)
    present = attach_value_head(model, found["weight"].shape[0])
    expected, got = ({n: tuple(x.shape) for n, x in s.items()} for s in (present.state_dict(), found))
    if expected != got:
        raise ValueError(f"{path}: expected {expected}, got {got}; it is the value head of another model")
    present.load_state_dict(found)
    return present


def _set_rate(optimizer: torch.optim.Optimizer, head: ValueHead | None, rate: float) -> None:
    """Moves the parameters of the value head into groups with this learning rate."""
    left = set() if head is None else {id(p) for p in head.parameters()}
    for group in list(optimizer.param_groups):
        found = [p for p in group["params"] if id(p) in left]
        if found:
            group["params"] = [p for p in group["params"] if id(p) not in left]
            optimizer.add_param_group({**group, "params": found, "lr": rate})
            left -= {id(p) for p in found}
    if head is None or left:
        raise ValueError(
            "value_head_learning_rate needs a value head whose parameters are the optimizer's own; "
            + ("the model has none" if head is None else "those of this model are not: leave it out")
        )


class SavesValueHead:
    """Mixin, before `transformers.Trainer`, that saves and loads the value head beside checkpoints and saved models.

    A model without a value head is saved and loaded as usual. args.value_head_learning_rate, if set, is the value
    head's initial learning rate; the schedule is the same for all parameters.
    """

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Creates Trainer's optimizer, with groups of their own for a value head that has its own learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        rate = self.args.value_head_learning_rate
        if fresh and rate is not None:
            _set_rate(optimizer, value_head(self.accelerator.unwrap_model(self.model)), rate)
            self.note_groups(optimizer)
        return optimizer

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder = self.args.output_dir if output_dir is None else output_dir
        save_value_head(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._load_value_head(resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._load_value_head(self.state.best_model_checkpoint)

    def _load_value_head(self: Any, folder: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        # FSDP and DeepSpeed keep it in parts, as they keep the model, and have read it with the model.
        if value_head(model) is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_value_head(model, folder)
