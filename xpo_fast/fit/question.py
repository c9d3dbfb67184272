"""What is asked of a prediction: the run, the rows of its largest batch, and the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Question:
    """A run as far as its memory depends on it. Lengths are in tokens.

    config: of transformers, as `shapes.shape` makes it. command: "train", "reward" or "rl". units: prompt and
    completions of the units of the data, the longest first; a single one stands for as many as are asked for, and "rl"
    has one, the longest prompt and completion. device: "cuda" or "cpu". memory: bytes of the device; None: no limit.
    """

    config: Any
    command: str = "train"
    method: str = "dpo"
    settings: dict[str, Any] = field(default_factory=dict)
    full: bool = False
    dtype: str = "bfloat16"  # of the frozen weights; with `full` bfloat16 and float16 are mixed precision
    trained_dtype: str = "float32"  # of weights that are trained with `full`; 16 bits: without mixed precision
    quantize: str | None = None
    lora: Any = None  # peft's LoraConfig
    attention: str | None = None
    optim: str = "adamw_torch_fused"
    optim_arguments: dict[str, Any] = field(default_factory=dict)
    optimizer_in_backward: bool = False
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    max_grad_norm: float = 1.0
    layout: str = "padded"
    reference: str = "auto"
    batch_size: int = 8
    eval_batch_size: int = 8
    grad_accum: int = 1
    tokens_per_batch: int | None = None
    units: tuple[tuple[int, tuple[int, ...]], ...] = ((512, (512, 512)),)
    tile_mib: float | None = None
    generations: int = 8
    prompts: int = 1
    generation_batch_size: int = 64
    rl: dict[str, Any] = field(default_factory=dict)  # further fields of RLConfig
    objectives: tuple[str, ...] = ("reward",)  # of a reward model
    device: str = "cuda"
    memory: int | None = None
    ranks: int = 1
    sharding: str = "ddp"

    def __post_init__(self) -> None:
        if self.command not in ("train", "reward", "rl"):
            raise ValueError(f"command must be train, reward or rl, got {self.command!r}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if self.full and self.quantize:
            raise ValueError("quantize keeps frozen weights in few bits, and full trains every weight: leave one out")
        if not self.units:
            raise ValueError("expected the lengths of at least one unit, got none")
        for name in ("batch_size", "eval_batch_size", "grad_accum", "ranks", "generations", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.command == "rl" and self.tokens_per_batch is not None:
            raise ValueError("tokens_per_batch: batches of rl are counted by batch_size: leave tokens_per_batch out")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory must be positive, got {self.memory}")

    @property
    def mixed(self) -> bool:
        """Whether the weights stay float32, and matrix products are of 16 bits."""
        return self.full and self.trained_dtype == "float32" and self.dtype in ("bfloat16", "float16")

    @property
    def rows(self) -> list[tuple[int, tuple[int, ...]]]:
        """The units of the largest micro-batch: the longest, as many as `batch_size` or `tokens_per_batch` lets in."""
        found = self.first(self.batch_size)
        if self.tokens_per_batch is not None and self.command != "rl":
            count = max((n for n in range(1, len(found) + 1) if _padded(found[:n]) <= self.tokens_per_batch), default=1)
            found = found[:count]
        return found

    @property
    def eval_rows(self) -> list[tuple[int, tuple[int, ...]]]:
        """The units of the largest batch of evaluation."""
        return self.first(self.eval_batch_size)

    def first(self, count: int) -> list[tuple[int, tuple[int, ...]]]:
        """Returns the `count` longest units."""
        return [*self.units] * count if len(self.units) == 1 else list(self.units[:count])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion."""
        return max(prompt + max(completions, default=0) for prompt, completions in self.units)


def _padded(units: Sequence[tuple[int, tuple[int, ...]]]) -> int:
    """Returns the positions of the units' padded rows."""
    rows = max(len(completions) for _, completions in units)
    return len(units) * rows * max(prompt + max(completions, default=0) for prompt, completions in units)
