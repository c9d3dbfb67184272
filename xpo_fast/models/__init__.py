"""What training asks of a `transformers` model: to be loaded by name, and to run a loss in place of its logits."""

from .fused_loss import (
    SMOLLM2,
    check_ids,
    embeddings,
    hidden_states,
    hub_arguments,
    install_fused_loss,
    load_model,
    load_weights,
    remove_fused_loss,
    smollm2_gguf,
    smollm2_path,
)
from .lm_head import Head

__all__ = [
    "SMOLLM2",
    "Head",
    "check_ids",
    "embeddings",
    "hidden_states",
    "hub_arguments",
    "install_fused_loss",
    "load_model",
    "load_weights",
    "remove_fused_loss",
    "smollm2_gguf",
    "smollm2_path",
]
