"""Trainers on `transformers.Trainer`: the loss is fused into the model's forward, the rest is theirs."""

from .base import UnitTrainer
from .checkpoints import load_objective, reading, save_objective
from .checks import check_head, check_rows, row_lengths
from .config import MethodConfig, XPOConfig
from .distillation import DistillationConfig, DistillationTrainer
from .findings import CLOSE, OPEN, Finding, Report, marked
from .grouping import grouped_targets
from .handed_over import HandedOver, Kept, warn_of_trained_adapter
from .means import Means
from .preference import XPOTrainer
from .setup import map_splits, prepare_model, warn_of_lost_updates, with_adapter, with_lengths, with_tokenizer
from .signal import NoSignalError
from .topk import teacher_topk

__all__ = [
    "CLOSE",
    "OPEN",
    "DistillationConfig",
    "DistillationTrainer",
    "Finding",
    "HandedOver",
    "Kept",
    "Means",
    "MethodConfig",
    "NoSignalError",
    "Report",
    "UnitTrainer",
    "XPOConfig",
    "XPOTrainer",
    "check_head",
    "check_rows",
    "grouped_targets",
    "load_objective",
    "map_splits",
    "marked",
    "prepare_model",
    "reading",
    "row_lengths",
    "save_objective",
    "teacher_topk",
    "warn_of_lost_updates",
    "warn_of_trained_adapter",
    "with_adapter",
    "with_lengths",
    "with_tokenizer",
]
