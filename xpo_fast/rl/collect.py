"""Collects a rollout: draws prompts, samples, scores, and replaces prompts whose rewards are all equal."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import Place
from ..rewards import PROMPT_INDEX, Rewards
from ..rewards.judges import Judge
from ..rollout import Prompt, Rollout, RolloutError, Samples, Sampling
from ..seeds import permutation, seed_for
from .config import RLConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("xpo_fast")


@dataclass
class Completion:
    """A sampled and scored completion."""

    prompt: Prompt
    prompt_ids: list[int]
    completion: Any  # str, or messages
    ids: list[int]  # with the EOS that ended it
    truncated: bool
    logps: list[float] | None  # the sampler's own
    scores: list[float]  # of each reward function
    reward: float  # to be trained on; NaN where there is none


Groups = list[list[Completion]]  # one list per prompt


@dataclass
class Collected:
    """The completions of a rollout, the same on all processes."""

    groups: Groups  # to be trained on
    sampled: Groups  # all, with those that were replaced
    draws: int
    cursor: int  # number of prompts drawn since the run began
    times: dict[str, float]  # seconds that this process took, under their names in the log


@dataclass
class Collector:
    """Sampler and scorer of completions; with several processes each does its share, and all know the result."""

    policy: Any  # the model that `rollout` samples from, not wrapped
    rollout: Rollout
    rewards: Rewards
    accelerator: Accelerator
    args: RLConfig
    sampling: Sampling
    prompts: list[dict[str, Any]]  # rows of `load_prompts`, drawn pass after pass, each pass in an order of its own
    warned: bool = False  # of truncated completions

    def collect(self, number: int, cursor: int) -> Collected:
        """Collects rollout `number`, with prompts from `cursor` on; raises ValueError if no completion has a reward.

        With max_draws above 1, groups of equal rewards are replaced by further prompts'; those that cannot be replaced
        any more stay.
        """
        args = self.args
        self.update()
        sampled: Groups = []
        times: dict[str, float] = {}
        useful, draws = sampled, 0
        while draws < args.draws:
            prompts = self._next_prompts(cursor)
            cursor += args.prompts
            seed = seed_for(args.seed, "rollout", number, draws)
            draws += 1
            groups, spent = self.sample(prompts, args.num_generations, seed)
            times = {name: times.get(name, 0.0) + x for name, x in spent.items()}
            sampled += groups
            useful = [group for group in sampled if spread(group) > 0]
            if len(useful) >= args.prompts:
                break
        groups = sampled
        if args.draws > 1:
            groups = (useful + [group for group in sampled if not spread(group) > 0])[: args.prompts]
        rewards = [row.reward for group in groups for row in group]
        if all(map(math.isnan, rewards)):
            raise ValueError(
                f"no completion of rollout {number} has a reward: {', '.join(self.rewards.names)} returned NaN or "
                f"None for each of {len(rewards)}"
            )
        return Collected(groups, sampled, draws, cursor, times)

    def update(self) -> None:
        """Tells the sampler, on all processes, that the policy has changed."""
        self._on_all(lambda: self.rollout.update(self.policy))

    def sample(self, prompts: list[dict[str, Any]], n: int, seed: int) -> tuple[Groups, dict[str, float]]:
        """Returns n completions of each prompt with their rewards, and the seconds that this process took."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        at = range(rank, len(prompts), ranks)
        times = {"time/generate_s": 0.0, "time/reward_s": 0.0}

        def work() -> list[tuple[int, list[Completion]]]:
            if not at:
                return []
            mine = [prompts[i] for i in at]
            began = time.perf_counter()
            texts = [row["prompt"] for row in mine]
            samples = self.rollout.generate(texts, n, sampling=self.sampling, seed=seed_for(self.args.seed, seed, rank))
            generated = time.perf_counter()
            columns = {name: [row[name] for row in mine for _ in range(n)] for name in data_columns(mine)}
            scored = self.rewards(samples, columns | {PROMPT_INDEX: [i for i in at for _ in range(n)]})
            self._warn_of_truncation(samples)
            times.update({"time/generate_s": generated - began, "time/reward_s": time.perf_counter() - generated})
            rows = []
            for i, ids in enumerate(samples.completion_ids):
                truncated, logps = samples.finish[i] == "length", None if samples.logps is None else samples.logps[i]
                reward = float(scored.rewards[i]) + self._length_reward(truncated, len(ids))
                prompt, prompt_ids, completion = samples.prompts[i], samples.prompt_ids[i], samples.completions[i]
                scores = scored.each[i].tolist()
                rows.append(Completion(prompt, prompt_ids, completion, ids, truncated, logps, scores, reward))
            return [(i, rows[k * n : (k + 1) * n]) for k, i in enumerate(at)]

        groups = sorted(self._on_all(work), key=lambda group: group[0])
        return [rows for _, rows in groups], times

    def _next_prompts(self, cursor: int) -> list[dict[str, Any]]:
        """Returns the prompts of one draw."""
        rows = []
        for at in range(cursor, cursor + self.args.prompts):
            lap, index = divmod(at, len(self.prompts))
            if at == cursor or index == 0:
                order = permutation(len(self.prompts), self.args.seed, "prompts", lap).tolist()
            rows.append(self.prompts[order[index]])
        return rows

    def _on_all(self, work: Callable[[], list[Any] | None]) -> list[Any]:
        """Runs `work` on all processes and returns the items of all; where it fails on one, it raises on all."""
        from accelerate.utils import gather_object

        found, error = [], None
        try:
            found = work() or []
        except Exception as raised:
            error = raised
        problem = None if error is None else f"{type(error).__name__}: {error}"
        outcomes = [(found, problem)]
        if self.accelerator.num_processes > 1:
            outcomes = gather_object(outcomes)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise RolloutError(f"process {rank} failed: {problem}")
        return [x for found, _ in outcomes for x in found]

    def _warn_of_truncation(self, samples: Samples) -> None:
        """Warns once if a reward model, which was trained on completions that end, scores truncated ones."""
        models = [getattr(f, "model", None) if isinstance(f, Judge) else f for f in self.rewards.functions]
        if not self.warned and samples.truncated.any() and any(hasattr(m, "score") for m in models):
            self.warned = True
            logger.warning(
                "%d of %d completions were cut at max_new_tokens, and a reward model scores them as if they ended "
                "there, with an EOS behind: missing_eos_penalty or overlong tells them apart, a larger "
                "max_new_tokens makes fewer",
                *(int(samples.truncated.sum()), len(samples)),
            )

    def _length_reward(self, truncated: bool, length: int) -> float:
        """Returns what is added to a completion's reward for its length: 0, or a penalty."""
        penalised, reward = self.args.penalised_tokens, -self.args.missing_eos_penalty if truncated else 0.0
        if self.args.overlong_handling == "penalty":
            over = length - (self.args.max_new_tokens - penalised)
            reward -= 1.0 if truncated else min(max(over / penalised, 0.0), 1.0)
        return reward


def data_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the columns of rows of `load_prompts` beside the prompt, without a row's place in its file."""
    return [name for name in rows[0] if name != "prompt" and not isinstance(rows[0][name], Place)]


def describe(groups: Groups, names: Sequence[str]) -> dict[str, float]:
    """Returns means of rewards and lengths of all samples, under TRL's names; names: of the reward functions."""
    rows = [row for group in groups for row in group]
    reward = torch.tensor([row.reward for row in rows])
    scores = torch.tensor([row.scores for row in rows])  # (R, F)
    found = {"reward": float(reward.nanmean()), "reward_std": _std(reward)}
    for name, x in zip(names, scores.unbind(1), strict=True):
        found |= {f"rewards/{name}/mean": float(x.nanmean()), f"rewards/{name}/std": _std(x)}
    return found | {
        "unrewarded": float(reward.isnan().float().mean()),
        "frac_reward_zero_std": sum(not spread(group) > 0 for group in groups) / len(groups),
        "completions/mean_length": sum(len(row.ids) for row in rows) / len(rows),
        "completions/clipped_ratio": sum(row.truncated for row in rows) / len(rows),
    }


def told_apart(groups: Groups, *, compared: bool) -> dict[str, float]:
    """Returns how the rewards that are trained on tell completions apart, for `trainer.signal.Watcher`.

    compared: the advantages compare the completions of a prompt.
    """
    rows = [row for group in groups for row in group]
    rewards = [row.reward for row in rows if not math.isnan(row.reward)]
    truncated = [row for row in rows if row.truncated]
    found = {
        "completions": float(len(rows)),
        "groups": float(len(groups)),
        "reward/least": min(rewards),
        "reward/most": max(rewards),
        "cut": len(truncated) / len(rows),
        "cut/spread": spread(truncated),
    }
    if compared:
        found["groups/alike"] = sum(not spread(group) > 0 for group in groups) / len(groups)
        found["groups/same"] = sum(len({tuple(row.ids) for row in group}) == 1 for group in groups) / len(groups)
    return found


def spread(group: Sequence[Completion]) -> float:
    """Returns the highest reward of a group minus the lowest; 0 if no completion has one."""
    rewards = [row.reward for row in group if not math.isnan(row.reward)]
    return max(rewards) - min(rewards) if rewards else 0.0


def _std(x: Tensor) -> float:
    known = x[~x.isnan()]
    return float(known.std()) if len(known) > 1 else 0.0 if len(known) else math.nan
