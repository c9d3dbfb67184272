"""The words of a method's signature: every input with its axes and meaning, and the layouts of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Input(NamedTuple):
    """A tensor that methods may take."""

    axes: tuple[str, ...]  # alternatives, told apart by their number of axes
    meaning: str


_LOGP = "log-prob summed over the {} completion's tokens"
_SAME = "the same under the reference policy"
_GATE = "logits of the gate over K objectives"
_AGAIN = "the same, seen another time: by another dropout mask"
# By axes: U units (pairs, rows, lists), K completions of a list (or objectives of a reward model), T tokens of a row,
# D the width of a hidden state, S samples of the policy, I a size of its own, "" a scalar; alternatives are separated
# by a space.
_BY_AXES = {
    "U": {
        "logp_w": _LOGP.format("chosen"),
        "logp_l": _LOGP.format("rejected"),
        "ref_logp_w": _SAME,
        "ref_logp_l": _SAME,
        "len_w": "tokens of the chosen completion",
        "len_l": "tokens of the rejected completion",
        "logp_sft": "log-prob of a completion to stay close to",
        "score_w": "annotator's or reward model's score of the chosen completion",
        "score_l": "annotator's or reward model's score of the rejected completion",
        "prob_w": "probability that the chosen completion beats the rejected one",
        "kl_w": "KL(reference ‖ policy) summed over the chosen completion's positions",
        "kl_l": "KL(reference ‖ policy) summed over the rejected completion's positions",
        "reverse_kl_w": "KL(policy ‖ reference) summed over the chosen completion's positions",
        "jsd_w": "generalised Jensen–Shannon divergence summed over the chosen completion's positions",
        "topk_kl_w": "KL of a teacher's likeliest tokens and the rest, summed over the chosen completion's positions",
        "ref_pos_logp_l": "log-prob of the rejected completion under the second, helpful reference",
        "logp": "log-prob summed over the completion's tokens",
        "ref_logp": _SAME,
        "length": "tokens of the completion",
        "desirable": "thumbs up or down",
        "reward": "scalar feedback",
        "reward_w": "the model's reward of the chosen completion",
        "reward_l": "the model's reward of the rejected completion",
        "margin": "by how much the chosen completion is better",
        "near_w": "mean −log σ(cos) of pairs of states along the chosen completion",
        "apart_l": "mean −log σ(−cos) of pairs of states along the rejected completion",
        "logit": "the model's logit",
    },
    "": {
        "kl": "KTO's reference point in nats, detached",
        "delta": "running mean of the rewards, kept by the objective",
        "m0": "running mean of the log-ratio margins, kept by the objective",
        "s": "running standard deviation of the log-ratio margins, kept by the objective",
    },
    "UK": {
        "logps": "log-prob of each of K completions",
        "ref_logps": _SAME,
        "lens": "tokens of each of K completions",
        "scores": "score of each of K completions, higher is better",
        "rewards": "K rewards, of completions or of objectives",
        "ranks": "rank of each completion, 1 = best",
        "targets": "the rating on each objective",
        "rewards_w": "rewards of the chosen completion on K objectives",
        "rewards_l": "rewards of the rejected completion on K objectives",
        "gate": _GATE,
        "gate_w": _GATE,
        "gate_l": _GATE,
    },
    "UT": {
        "token_logp": "log-prob of each token",
        "old_logp": "the same under the policy that sampled",
        "ref_token_logp": _SAME,
        "entropy": "entropy of each token's distribution",
        "old_value": "the value of each token's state when the rows were sampled",
        "returns": "return from each token on",
        "pos_score": "logit of a token sampled in place of the rejected completion's",
        "neg_score": "logit of the rejected completion's token",
    },
    "UD": {
        "view": "a view of the pair: hidden state of the chosen completion − that of the rejected one",
        "other_view": _AGAIN,
    },
    "SD": {"sample_view": "a view of the policy's own samples: their hidden states", "other_sample_view": _AGAIN},
    "U UT": {"advantage": "advantage of each row or token", "value": "value of the prompt, or of each token's state"},
    "UT UK": {"mask": "entries that count: the completion's tokens, or those of the K that exist"},
    "II": {
        "ptx_logp": "log-prob of each token of the pretraining text",
        "ptx_mask": "tokens of the pretraining text that count",
    },
}
INPUTS: Mapping[str, Input] = {
    name: Input(tuple(axes.split(" ")), meaning)
    for axes, meanings in _BY_AXES.items()
    for name, meaning in meanings.items()
}


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch belong together."""

    about: str
    told_by: tuple[str, ...] = ()  # a method that takes one of these inputs has this layout
    made: tuple[str, ...] = ()  # inputs that the objective makes from hidden states, targets and a reference
    sides: tuple[str, ...] = ("",)  # the suffixes of the rows of one unit


# Tried in this order: `nn` takes logps and logp_l, and is listwise.
LAYOUTS: Mapping[str, Layout] = {
    "policy": Layout(
        "the policy's own samples, token by token",
        told_by=("token_logp", "returns"),
        made=("token_logp", "ref_token_logp", "mask", "entropy"),
    ),
    "listwise": Layout(
        "K completions per prompt", told_by=("logps",), made=("logps", "ref_logps", "lens", "mask", "logp_l")
    ),
    "unpaired": Layout("single completions", told_by=("logp",), made=("logp", "ref_logp", "length")),
    "pairwise": Layout(
        "pairs of a chosen and a rejected completion",
        told_by=("logp_w", "logp_l"),
        made=(
            *("logp_w", "logp_l", "ref_logp_w", "ref_logp_l", "len_w", "len_l"),
            *("kl_w", "kl_l", "reverse_kl_w", "jsd_w", "topk_kl_w", "pos_score", "neg_score", "mask"),
        ),
        sides=("_w", "_l"),
    ),
    "reward": Layout("outputs of a reward model"),
}
