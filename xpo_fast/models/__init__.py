"""A `transformers` causal LM as training uses it: loaded by name, its LM head read, a loss in place of its logits."""

from .adapters import base_of, folders_below, merge, note_name, saving_embeddings
from .fused_loss import hidden_states, install_fused_loss, own_logits, remove_fused_loss
from .limits import check_ids, check_lengths, embeddings, padding_id, positions, table_of_positions
from .lm_head import Head
from .loading import SMOLLM2, hub_arguments, load_model, load_weights, smollm2_gguf, smollm2_path
from .router_loss import no_router_loss, refuse_router_loss, router_coefficient, without_router_logits, z_coefficient

__all__ = [
    "SMOLLM2",
    "Head",
    "base_of",
    "check_ids",
    "check_lengths",
    "embeddings",
    "folders_below",
    "hidden_states",
    "hub_arguments",
    "install_fused_loss",
    "load_model",
    "load_weights",
    "merge",
    "no_router_loss",
    "note_name",
    "own_logits",
    "padding_id",
    "positions",
    "refuse_router_loss",
    "remove_fused_loss",
    "router_coefficient",
    "saving_embeddings",
    "smollm2_gguf",
    "smollm2_path",
    "table_of_positions",
    "without_router_logits",
    "z_coefficient",
]
