"""Online RL on `transformers.Trainer`: sampled and scored completions, and a few steps of a policy method on them."""

from .checkpoint import STATE_FILE, last_checkpoint
from .config import RLConfig
from .trainer import RLTrainer

__all__ = ["STATE_FILE", "RLConfig", "RLTrainer", "last_checkpoint"]
