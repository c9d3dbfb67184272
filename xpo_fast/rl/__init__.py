"""Online RL on `transformers.Trainer`: completions are sampled and scored, and a policy method takes a few steps on them."""

from .trainer import STATE_FILE, RLTrainer, last_checkpoint, logger

__all__ = ["STATE_FILE", "RLTrainer", "last_checkpoint", "logger"]
