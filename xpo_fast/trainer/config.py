"""The arguments of a training run: `TrainingArguments` with a method, how its head runs, and how its data are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..data import check_score, read_kwargs
from ..layouts import check_layout
from ..objective import Objective
from ..reporters import check_reporters
from ..wording import did_you_mean
from .arguments import REFUSED, check_arguments
from .findings import PREFLIGHT
from .in_backward import check_in_backward
from .offload import check_offload
from .optimizers import check_settings
from .signal import ON_NO_SIGNAL


def argument(default: Any, about: str) -> Any:
    """Returns a field of a configuration with its default and its help."""
    return field(default=default, metadata={"help": about})


@dataclass
class MethodConfig(TrainingArguments):
    """`transformers.TrainingArguments` with a method and how its head runs.

    Raises ValueError for a field that would have no effect, or another than is meant, see arguments.py.
    """

    refused: ClassVar[Mapping[str, str]] = REFUSED

    method: str = argument("dpo", "A name in xpo_fast.METHODS, or a sum of them: dpo + 0.5*sft.")
    method_args: dict | str | None = field(
        default=None,
        metadata={"help": 'Hyperparameters, and options of xpo_fast.Objective, for example {"beta": 0.1}.'},
    )
    chat_template_kwargs: Any = field(
        default=None,
        metadata={
            "help": 'Variables of the chat template for every row, for example {"enable_thinking": false}; those of a '
            "row's column chat_template_kwargs come first."
        },
    )
    backend: str = argument("auto", "The backend of the head: auto, torch, dense, …")
    layout: str = argument(
        "auto",
        "How a model reads rows: padded; packed, one behind the other without padding; shared, what rows begin with in "
        "common once; or auto, the one with the fewest tokens that the model can be read in, said at the start.",
    )
    tokens_per_batch: int | None = argument(
        None,
        "Cut the units of a step into micro-batches of at most N tokens, as the model computes them, whatever the "
        "batch size, the longest first; evaluation and the reference's log-probs, too. A unit that is longer goes "
        "alone, with a warning, or with preflight=stop is an error. None: micro-batches of batch size units.",
    )
    activation_offload: bool = argument(
        False,
        "Keep what the decoder's backward needs in the host's memory until it is needed: less memory on the GPU, for "
        "copies that go on beside the computation.",
    )
    optimizer_in_backward: bool = argument(
        False,
        "Take the optimizer's step of each weight as soon as its gradient is there, and free that: all gradients are "
        "never there together. max_grad_norm must be 0, gradient_accumulation_steps 1.",
    )
    tile_mib: float | None = argument(None, "Memory for one tile of logits, in MiB. None: the head decides.")
    preflight: str = argument(
        "warn",
        "The check of the run before its first step: warn logs what it finds, stop raises for a fault, off: none.",
    )
    on_no_signal: str = argument(
        "warn",
        "A run that learns nothing in its first steps: warn says why, once; stop writes a checkpoint, ends and raises "
        "NoSignalError; ignore looks at nothing.",
    )

    # Other defaults than TrainingArguments has.
    learning_rate: float = argument(1e-6, "The initial learning rate of AdamW.")
    remove_unused_columns: bool | None = argument(
        False, "Must be False: batches are made from columns that the model does not know."
    )
    report_to: Any = field(default="none", metadata={"help": "Where to report: none, tensorboard, wandb, …"})
    logging_steps: float = argument(10, "Log every N steps.")
    logging_nan_inf_filter: bool = argument(False, "Hide NaN and inf losses from the log.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: batches are made from columns of the data set")
        check_arguments(self, self.refused)
        _not_reentrant(self)
        check_settings(self)
        check_in_backward(self)
        if self.activation_offload:
            check_offload(self)
        if isinstance(self.method_args, str):
            self.method_args = json.loads(self.method_args)
        self.chat_template_kwargs = read_kwargs(self.chat_template_kwargs, "the settings")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns about it where there is nothing to copy to
        check_reporters(self.report_to)
        check_layout(self.layout)
        if self.preflight not in PREFLIGHT:
            raise ValueError(f"preflight must be one of {', '.join(PREFLIGHT)}, got {self.preflight!r}")
        if self.on_no_signal not in ON_NO_SIGNAL:
            near = did_you_mean(str(self.on_no_signal), ON_NO_SIGNAL)
            raise ValueError(f"on_no_signal must be one of {', '.join(ON_NO_SIGNAL)}, got {self.on_no_signal!r}{near}")
        budget = self.tokens_per_batch
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ValueError(f"tokens_per_batch must be an integer of at least 1, or None, got {budget!r}")
        if self.tile_mib is not None and self.tile_mib <= 0:
            raise ValueError(f"tile_mib must be positive or None, got {self.tile_mib}")

    def objective(self, **defaults: Any) -> Objective:
        """Returns the objective that these arguments describe.

        defaults: hyperparameters for which method_args has no value.
        """
        tile_bytes = None if self.tile_mib is None else int(self.tile_mib * 2**20)
        given: Any = self.method_args or {}
        hyperparameters: Any = {**defaults, **given}
        fixed = sorted({"reduction", "backend", "tile_bytes", "invariant"} & set(hyperparameters))
        if fixed:
            raise ValueError(f"{', '.join(fixed)} cannot be in method_args: the trainer decides them, or has options")
        return Objective(self.method, backend=self.backend, tile_bytes=tile_bytes, **hyperparameters)


def _not_reentrant(args: TrainingArguments) -> None:
    """Makes use_reentrant=False the default of the checkpointing's kwargs where others are given, too."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if given := getattr(args, name, None):
            setattr(args, name, {"use_reentrant": False, **given})


@dataclass
class XPOConfig(MethodConfig):
    """`MethodConfig` for a data set of preferences: how long rows may be, and where the reference comes from."""

    splits_rows: ClassVar[bool] = True  # whether sp_size of parallelism_config may cut rows over ranks

    max_length: int = argument(1024, "Longest prompt and completion in tokens; longer rows are cut.")
    max_prompt_length: int | None = argument(
        None, "Longest prompt in tokens; longer ones lose their beginning. None: no limit."
    )
    score: str = argument(
        "assistant",
        "What is scored of a completion of several turns: assistant (what the assistant says), last (its last turn) or "
        "all.",
    )
    reference: str = argument(
        "auto",
        "The reference policy: adapter (the model with its adapter off), cached (log-probs computed once "
        "and kept on disk), copy (a frozen copy in memory), none, or auto: none for a method without a reference, "
        "adapter where there is one (or, if it has been trained before, the model with it, kept as it was), cached "
        "otherwise.",
    )
    context: str | None = argument(
        None,
        "A text that the reference reads in front of every prompt and the policy does not, for context_distillation: "
        "as the system turn of messages, or before the text. Lengths do not count it.",
    )
    ref_cache_dir: str | None = argument(
        None, "Where cached reference log-probs are kept. None: $XPO_FAST_CACHE or ~/.cache/xpo_fast."
    )
    dataset_num_proc: int | None = argument(None, "Number of processes that tokenize. None: one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.score)
        if self.context is not None and not (isinstance(self.context, str) and self.context.strip()):
            raise ValueError(f"context must be a text with words in it, or None, got {self.context!r}")
        if self.max_prompt_length is not None and self.max_prompt_length > self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} bounds nothing where prompt and completion have "
                f"max_length={self.max_length} together: make it smaller, or leave it out"
            )

    def encoding(self) -> dict[str, Any]:
        """Returns the arguments of `data.encode` that these settings decide."""
        names = ("max_length", "max_prompt_length", "score", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names} | {"num_proc": self.dataset_num_proc}
