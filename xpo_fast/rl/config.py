"""RLConfig: the arguments of online RL, and the checks of which go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..methods import METHODS
from ..methods.advantages import ADVANTAGES, OF_GROUPS
from ..methods.registry import RLDefaults
from ..objective import Objective
from ..objective.terms import parse_terms
from ..trainer import MethodConfig
from ..trainer.arguments import REFUSED_ONLINE, changed
from ..trainer.config import argument
from ..trainer.context import check_teacher
from ..wording import did_you_mean
from .mismatch import BOUNDS, LEVELS

_OF_THE_CRITIC = ("gamma", "lam", "vf_coef", "value_clip", "whiten_advantages", "value_head_learning_rate")


def _of_methods(name: str) -> str:
    """Returns "10 for dapo, else 1": a default that follows the method, as the cards have it."""
    plain, others = getattr(RLDefaults(), name), dict[Any, list[str]]()
    for method in METHODS.values():
        if (own := getattr(method.card.rl, name)) != plain:
            others.setdefault(own, []).append(method.name)
    return "".join(f"{own} for {', '.join(names)}, " for own, names in others.items()) + f"else {plain}"


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError where the value of the argument `name` is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(str(value), choices)}"
        )


@dataclass
class RLConfig(MethodConfig):
    """Arguments of training on the policy's own completions.

    per_device_train_batch_size is in completions. A rollout has prompts_per_rollout × num_generations of them, on all
    processes together; epochs_per_rollout passes over them are cut into steps of per_device_train_batch_size ×
    gradient_accumulation_steps × processes. num_train_epochs counts passes over the prompts.

    Log-probs are those of softmax(z / temperature) over the whole vocabulary, in the ratio, in every divergence and in
    the loss; the cuts of top_p and top_k in sampling are not corrected for, unless off_policy says so. They are
    measured without dropout, and steps are taken with it: a model with dropout has ratios other than 1 from the first
    step.

    A method's defaults include what its authors add to its loss: how rewards become advantages; for the ppo family a
    critic, and the divergence from the reference in the reward; for dapo dynamic sampling (max_draws) and the penalty
    on long completions (overlong). Each is an argument that can be set otherwise.

    rloo is on-policy with one step per rollout, and uses its clipped variant (variant="clipped") with several.
    """

    refused: ClassVar[Mapping[str, str]] = REFUSED_ONLINE

    method: str = argument("grpo", "A policy method of xpo_fast.METHODS, or a sum.")
    num_generations: int = argument(8, "Completions per prompt.")
    prompts_per_rollout: int | None = argument(None, "Prompts per rollout. None: those that one step trains on.")
    epochs_per_rollout: int = argument(1, "Passes over the completions of a rollout.")
    max_new_tokens: int = argument(256, "Longest completion in tokens.")
    temperature: float = argument(1.0, "Temperature of sampling and of every log-prob.")
    top_p: float = argument(
        1.0, "Nucleus sampling: the smallest set of tokens with this probability; log-probs are over all tokens."
    )
    top_k: int | None = argument(None, "Sample from the k most likely tokens; log-probs are over all tokens.")
    stop: tuple[str, ...] = argument((), "Texts that end a completion.")
    generation_batch_size: int = argument(64, "Completions per batch of sampling.")
    continuous_batching: bool = argument(
        False,
        "Sample by transformers' continuous batching on CUDA if the model supports it: faster, and the same seed need "
        "not give the same completions.",
    )
    max_draws: int | None = argument(
        None,
        "Dynamic sampling: while prompts whose completions all have one reward are in a rollout, others are drawn in "
        f"their place, at most this many times per rollout. 1: never. None: {_of_methods('max_draws')}.",
    )
    overlong: str = argument(
        "auto",
        "Truncated completions: keep, mask (they are in the group's mean, not in the loss), penalty (−1 for a "
        f"truncated one, rising to 0 over the overlong_buffer tokens before), or auto: {_of_methods('overlong')}.",
    )
    overlong_buffer: int | None = argument(
        None, "Tokens over which the penalty rises. None: a fifth of max_new_tokens, as in DAPO."
    )
    missing_eos_penalty: float = argument(0.0, "Subtracted from the reward of a truncated completion.")
    advantage: str = argument("auto", f"auto (the method's own), {', '.join(ADVANTAGES)}.")
    whiten_advantages: bool = argument(True, "With gae: scale advantages to mean 0, variance 1 per rollout.")
    gamma: float = argument(1.0, "Discount γ of gae.")
    lam: float = argument(0.95, "λ of gae.")
    vf_coef: float = argument(0.1, "Weight of the critic's loss, with gae.")
    value_head_learning_rate: float | None = argument(
        None, "Learning rate of the critic's value head, with gae. None: learning_rate."
    )
    value_clip: float = argument(0.2, "Clipping range of a value around its old value.")
    reference: str = argument(
        "auto", "The reference policy: adapter (switched off), copy, none, or auto: the one needed."
    )
    ref_mixin: float = argument(
        0.0,
        "After every rollout: reference ← (1 − x)·reference + x·policy for every weight; of a PEFT model for the "
        "adapter's.",
    )
    kl_coef: float | None = argument(
        None,
        "Weight of the KL penalty subtracted from the reward: kl_coef · Σ(log π − log ref) over the sampled tokens "
        f"(k1: unbiased in value and gradient). None: {_of_methods('kl_coef')}. In the loss it is the method's beta.",
    )
    kl_target: float | None = argument(
        None,
        "Adaptive KL: kl_coef (or the method's beta) is raised where the divergence is above this many "
        "nats per completion, and lowered below; for ppo_penalty, nats per token from the sampling policy.",
    )
    kl_horizon: int = argument(
        10_000, "A rollout of n completions changes kl_coef by a factor within 1 ± 0.2·n/kl_horizon."
    )
    off_policy: str = argument(
        "auto",
        "Importance weights, policy over sampler: none, token, sequence, or auto: at the level of the method's ratio, "
        "if another program samples and reports its log-probs, at temperature 1 or with the temperature in them; else "
        "none.",
    )
    off_policy_mode: str = argument(
        "truncate", "Weights outside their limits: truncate (set to the limit) or mask (0: they are not learned from)."
    )
    off_policy_cap: float = argument(2.0, "Upper limit of these weights.")
    off_policy_floor: float = argument(0.0, "Lower limit of these weights.")
    eval_generations: int = argument(1, "Completions per held-out prompt.")
    log_samples: bool = argument(
        True,
        "Write every completion into samples.jsonl, one per line, for datasets.load_dataset('json', "
        "data_files=…) or pandas.read_json(…, lines=True).",
    )
    show_samples: int = argument(0, "Completions of the last rollout to print, by reward, with every log.")

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "num_generations prompts_per_rollout epochs_per_rollout generation_batch_size max_new_tokens"
        for name in f"{counts} max_draws overlong_buffer kl_horizon eval_generations".split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "off_policy_cap"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.off_policy_floor < self.off_policy_cap:
            raise ValueError(
                f"off_policy_floor must be 0 or more and below off_policy_cap={self.off_policy_cap:g}, got "
                f"{self.off_policy_floor}"
            )
        for name in ("vf_coef", "missing_eos_penalty", "kl_coef", "show_samples"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.ref_mixin <= 1:
            raise ValueError(f"ref_mixin must be in [0, 1], got {self.ref_mixin}")
        if self.kl_target is not None and not self.kl_target > 0:
            raise ValueError(f"kl_target must be positive or None, got {self.kl_target}")
        _choice("advantage", self.advantage, ("auto", *ADVANTAGES))
        _choice("overlong", self.overlong, ("auto", "keep", "mask", "penalty"))
        if self.overlong_handling == "penalty" and self.penalised_tokens > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is longer than the longest completion of "
                f"{self.max_new_tokens} tokens: every one would be penalised"
            )
        _choice("off_policy", self.off_policy, ("auto", "none", *LEVELS))
        _choice("off_policy_mode", self.off_policy_mode, BOUNDS)
        _choice("reference", self.reference, ("auto", "adapter", "copy", "none"))
        self.stop = tuple(self.stop)
        self._check_idle()
        check_teacher(self.objective(), taught=False)

    def _check_idle(self) -> None:
        """Raises ValueError for an argument that the others leave without effect."""
        given = changed(self)
        critics = [name for name in _OF_THE_CRITIC if name in given]
        if critics and self.estimator != "gae":
            raise ValueError(
                f"{' and '.join(critics)} {'is' if len(critics) == 1 else 'are'} the critic's, and there is one with "
                f"gae: {self.method} has advantages by {self.estimator!r}. Leave it out, or set advantage='gae'"
            )
        if "overlong_buffer" in given and self.overlong_handling != "penalty":
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is where overlong='penalty' begins, and overlong is "
                f"{self.overlong_handling!r}: leave it out, or set overlong='penalty'"
            )
        if "kl_horizon" in given and self.kl_target is None:
            raise ValueError(f"kl_horizon={self.kl_horizon} is how fast kl_target acts: set kl_target, or leave it out")
        for name in ("off_policy_mode", "off_policy_cap", "off_policy_floor"):
            if name in given and self.off_policy == "none":
                raise ValueError(f"{name} bounds the weights of off_policy, which is 'none': leave it out")
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise ValueError(
                "evaluations of online RL have rewards and lengths, no loss: set metric_for_best_model='reward' for "
                "load_best_model_at_end, save_strategy='best' or a scheduler that follows it"
            )

    @property
    def minibatches(self) -> int:
        """Number of steps of one pass over a rollout."""
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        rows = self.prompts * self.num_generations
        if rows % step:
            raise ValueError(
                f"a rollout of {self.prompts} prompts × {self.num_generations} completions is not cut into whole steps "
                f"of {step}: make prompts_per_rollout × num_generations a multiple of per_device_train_batch_size × "
                "gradient_accumulation_steps × processes"
            )
        return rows // step

    @property
    def prompts(self) -> int:
        """Number of prompts per rollout."""
        if self.prompts_per_rollout is not None:
            return self.prompts_per_rollout
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if step % self.num_generations:
            raise ValueError(
                f"a step of {step} completions has no whole number of prompts with {self.num_generations} each: set "
                "prompts_per_rollout, or make per_device_train_batch_size × gradient_accumulation_steps × processes a "
                "multiple of num_generations"
            )
        return step // self.num_generations

    @property
    def _defaults(self) -> RLDefaults:
        """Returns what the card of the method, or of a sum's first, has as defaults."""
        return parse_terms(self.method, None, {})[0].method.card.rl

    @property
    def draws(self) -> int:
        """How often prompts are drawn for a rollout, at most."""
        return self._defaults.max_draws if self.max_draws is None else self.max_draws

    @property
    def overlong_handling(self) -> str:
        """What is done about truncated completions: keep, mask or penalty."""
        return self._defaults.overlong if self.overlong == "auto" else self.overlong

    @property
    def penalised_tokens(self) -> int:
        """Number of last tokens of the longest completion, over which the penalty rises."""
        return self.overlong_buffer or max(self.max_new_tokens // 5, 1)

    @property
    def steps_per_rollout(self) -> int:
        """Number of steps on a rollout, all passes together."""
        return self.minibatches * self.epochs_per_rollout

    def objective(self, **defaults: Any) -> Objective:
        """Returns the objective of these arguments; raises ValueError if a rollout cannot give it its inputs."""
        methods = [term.method for term in parse_terms(self.method, None, {})]
        given: Any = self.method_args or {}
        for method in methods:
            if method.layout != "policy" or "token_logp" not in method.inputs:
                there = sorted(n for n, m in METHODS.items() if "token_logp" in m.inputs)
                raise ValueError(
                    f"{method.name} does not learn from scored completions of the policy's own; these do: "
                    f"{', '.join(there)}"
                )
            if not set(method.card.rl.unless) & set(given):
                defaults |= method.card.rl.settings
            if method.denominator == "fixed_length":
                defaults["fixed_length"] = self.max_new_tokens
            if self.steps_per_rollout > 1:
                defaults |= method.card.rl.reuse
                if "old_logp" not in method.inputs:
                    raise ValueError(
                        f"{method.name} is on-policy: one step a rollout, got {self.steps_per_rollout}. Leave out "
                        "epochs_per_rollout, and let prompts_per_rollout be what one step trains on"
                    )
            if self.estimator == "gae" and "advantage" in method.inputs and "UT" not in method.axes("advantage"):
                raise ValueError(f"{method.name} takes one advantage a completion, and gae gives one per token")
        if self.off_policy in ("token", "sequence"):
            without = [m.name for m in methods if "advantage" not in m.inputs]
            if without:
                raise ValueError(
                    f"off_policy={self.off_policy!r} weighs advantages, and {', '.join(without)} has none: leave it out"
                )
            by_row = [m.name for m in methods if "UT" not in m.axes("advantage")]
            if self.off_policy == "token" and by_row:
                raise ValueError(
                    f"off_policy='token' gives one advantage per token, and {by_row[0]} takes one a completion: "
                    "use 'sequence'"
                )
        if self.draws > 1 and self.num_generations < 2:
            raise ValueError(
                f"max_draws={self.draws} replaces prompts whose completions all have one reward, as a lone one always "
                "has: num_generations must be at least 2, got 1"
            )
        if self.estimator in OF_GROUPS and self.num_generations < 2:
            raise ValueError(
                f"advantage {self.estimator!r} compares the completions of a prompt: num_generations must be at least "
                f"2, got {self.num_generations}"
            )
        objective = super().objective(**defaults)
        objective.rehearse()
        return objective

    @property
    def estimator(self) -> str:
        """How rewards become advantages, of ADVANTAGES."""
        return self._defaults.advantage if self.advantage == "auto" else self.advantage

    @property
    def reward_kl(self) -> float:
        """What the divergence in the reward begins to be multiplied by."""
        return self._defaults.kl_coef if self.kl_coef is None else self.kl_coef
