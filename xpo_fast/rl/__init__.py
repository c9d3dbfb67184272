"""Online RL on `transformers.Trainer`: completions are sampled and scored, and a policy method takes a few steps on them."""

from .checkpoint import STATE_FILE, last_checkpoint
from .config import RLConfig
from .trainer import RLTrainer

__all__ = ["STATE_FILE", "RLConfig", "RLTrainer", "last_checkpoint"]
