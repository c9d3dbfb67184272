"""Rollouts: completions sampled from the policy by itself or from a server, and their log-probs by our head."""

from .filtered import FilteredRollout
from .generate import GenerateRollout
from .sampling import Prompt, Rollout, RolloutError, Samples, Sampling, encode_prompts
from .scoring import sample_logps, score_tokens
from .server import ServerRollout

__all__ = [
    "FilteredRollout",
    "GenerateRollout",
    "Prompt",
    "Rollout",
    "RolloutError",
    "Samples",
    "Sampling",
    "ServerRollout",
    "encode_prompts",
    "sample_logps",
    "score_tokens",
]
