"""Online RL on `transformers.Trainer`: completions are sampled and scored, and a policy method takes a few steps on them.

    prompts ──▶ Rollout ──▶ Rewards ──▶ advantages ──▶ Experience ──▶ Objective inside the fused forward ──▶ loss

Steps are numbered, and what is random about a rollout follows from the seed and its number: which prompts, in which order,
and which completions, as far as the sampler's own draws follow from a seed (`GenerateRollout` without continuous batching: up
to roundings of the logits; a server: what it promises). A checkpoint holds what is left of the rollout under way, so that a resumed run goes on with
the very samples of the one that was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from .. import data
from ..data import Place, load_prompts
from ..files import SavingError
from ..head import token_logps, token_stats
from ..methods import METHODS
from ..methods.advantages import gae, whiten
from ..methods.math import k1
from ..methods.policy import adapt
from ..models import Head, check_ids
from ..models.value_head import SavesValueHead, ValueHead, attach_value_head
from ..reduce import count_metrics, mean_metrics, reduce_losses
from ..resume import last_checkpoint as whole_checkpoint
from ..rewards import OWN_COLUMNS, PROMPT_INDEX, RewardFunction, Rewards
from ..rewards.llm_judges import Judge
from ..rollout import GenerateRollout, Rollout, RolloutError, Samples, Sampling, encode_prompts, pad_rows, score_tokens
from ..seeds import permutation, seed_for
from ..trainer import Means, UnitTrainer, check_head, reading, ready, warn_of_trained_adapter, with_tokenizer
from ..trainer.preference import PREFIX_CHECKPOINT_DIR, PreTrainedTokenizerBase, TrainerCallback
from ..trainer.reference import LiveReference, without_adapter
from .config import RLConfig
from .experience import Completion, Experience, Groups, advantages, describe, spread
from .sample_log import SAMPLES_FILE, append_lines, sample_lines, table

logger = logging.getLogger("xpo_fast")

STATE_FILE = "rl_state.pt"


@dataclass
class _Progress:
    """Where a run has got to, beside the weights."""

    kl_coef: float
    rollouts: int = 0  # made
    cursor: int = 0  # into the prompts, pass after pass
    samples_bytes: int = 0  # of SAMPLES_FILE


class RLTrainer(SavesValueHead, UnitTrainer):
    """Train a causal LM by rewards for its own completions.

        trainer = RLTrainer(model, reward_function, RLConfig("out", method="grpo"), train_dataset=prompts, …)

    model: a causal LM of transformers, a PEFT model, or a name for `load_model`; peft_config makes it a PEFT model.
    rewards: `Rewards`, or what it takes: functions with TRL's signature, reward models, scoring judges.
    train_dataset, eval_dataset: what `load_prompts` reads: rows with a prompt, and columns for the reward functions.
    rollout: what samples; the model itself (`GenerateRollout`) if not given.
        Beside the data's columns a reward function is given `prompt_index`, a number for every completion that those of
        one prompt of a rollout share.
    ptx_dataset: texts that `ppo_ptx` mixes in: strings, or rows with `text`.
    The reference policy is the model as it is handed over here; of a PEFT model its base model, which is the same unless its
    adapter has learned before (a warning says so). With ref_mixin it follows the policy: a copy of all weights, or, of a PEFT
    model, the base model with an average of the adapter (and of what else is trained), kept in float32 and put in its place
    while the reference is asked. Other arguments are Trainer's.

    The log's entropy and objective/kl are means over the completions that are trained on, its rewards and lengths over all.

    Completions whose reward is NaN are left out of everything but the log. Those whose advantage is exactly 0, a group of
    equal rewards above all, are counted in the loss's mean and spared the forward and backward, where the loss has no other
    term. With gae a truncated completion has the value 0 behind its last token, as an ended one has: what would have come is
    not bootstrapped. With several processes every one samples and scores its share of the prompts, and then knows all of the rollout.

    What goes wrong:
    A reward function that raises, takes longer than `Rewards.timeout_s`, or returns None, a wrong number of rewards or
    no numbers ends the run with a RewardError that names it; a sampler or a server that is gone for longer than it is
    waited for with a RolloutError; a rollout without any reward, or with advantages that are not finite, with a
    ValueError. On all processes, if it happens on one. Nothing is lost: before it raises, the run writes a checkpoint (if
    save_strategy has any, and a step has been taken), and a run resumed from it makes the same rollout again and ends with
    the very weights, log and samples of one that was not disturbed. Of an evaluation that fails the
    checkpoint is that of the step before it, and the resumed run goes on behind it. KeyboardInterrupt ends the run as it is,
    without a checkpoint: the steps since the last one are taken again, and are the same.
    NaN, an infinity or None for one completion: it has no reward, see above. A group of equal rewards: see above, and
    max_draws. A completion without an EOS, cut at max_new_tokens: none is put behind it, in what is scored as in
    what is trained on; overlong and missing_eos_penalty say what it is worth.
    """

    args: RLConfig

    def __init__(
        self,
        model: nn.Module | str,
        rewards: Rewards | RewardFunction | Sequence[RewardFunction],
        args: RLConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        rollout: Rollout | None = None,
        ptx_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = RLConfig() if args is None else args
        model, processing_class = with_tokenizer(model, processing_class)
        self._pad: Any = processing_class.pad_token_id
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
        self.objective = args.objective()
        self.loss_weights = [term.weight for term in self.objective.terms]
        self._columns = {name for m in self.objective.methods for name in m.columns}
        self.sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.stop)
        self.prompts = [] if train_dataset is None else load_prompts(train_dataset, alike=True)
        held_out = None if eval_dataset is None else load_prompts(eval_dataset, alike=True)

        model = ready(model, args, peft_config)
        self.reference = self._choose_reference(model, args)
        if not args.ref_mixin:
            warn_of_trained_adapter(model, self.reference)
        if args.max_steps <= 0:
            rollouts = math.ceil(args.num_train_epochs * len(self.prompts) / args.prompts)
            args.max_steps = max(rollouts, 1) * args.steps_per_rollout
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda numbers: {"numbers": torch.tensor(numbers)},
            train_dataset=range(args.max_steps * step) if self.prompts else None,
            eval_dataset=held_out,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "sampling and scoring need the whole model on every process, which FSDP and DeepSpeed do not keep: use "
                "data parallelism, with LoRA where memory is short"
            )
        self._live: LiveReference | None = None
        if self.reference != "none":
            self._live = LiveReference(self.reference, model, self.accelerator, args.backend)
        self._average: dict[str, Tensor] = {}  # of the adapter, with ref_mixin
        if args.ref_mixin and self.reference == "adapter":
            trained = {n: p for n, p in self._policy.named_parameters() if p.requires_grad}
            self._average = {n: p.detach().float().clone() for n, p in trained.items()}
        self.critic: ValueHead | None = attach_value_head(model) if args.estimator == "gae" else None
        self._ptx = self._encode_ptx(ptx_dataset)
        self.rollout: Rollout = rollout or GenerateRollout(
            model,
            processing_class,
            batch_size=args.generation_batch_size,
            continuous=None if args.continuous_batching else False,
        )
        self._check_prompts([*self.prompts, *(held_out or [])])
        self.add_callback(_AfterStep(self))
        self.progress = _Progress(args.reward_kl)
        self.experience: Experience | None = None
        self._of_steps, self._of_rollouts, self._penalty = Means(), Means(), Means()
        self._step_began, self._seconds = 0.0, {"generate": 0.0, "reward": 0.0}
        self._head_checked = self._ends_told = False
        self._shown: list[dict[str, Any]] = []  # samples for the next log
        self._saved: Path | None = None  # the last checkpoint of this run; others in its place are of another

    # --- what is asked of the arguments -------------------------------------------------------------------------------

    def _choose_reference(self, model: nn.Module, args: RLConfig) -> str:
        needed = self.objective.needs_reference or args.reward_kl > 0
        adapted = hasattr(model, "disable_adapter")
        why = f"{self.objective} with kl_coef={args.reward_kl:g}"
        if not needed:
            if args.reference in ("adapter", "copy"):
                raise ValueError(f'{why} has no reference: use reference="auto", got {args.reference!r}')
            for name in ("kl_target", "ref_mixin"):
                if getattr(args, name) and not (name == "kl_target" and self._penalises):
                    raise ValueError(
                        f"{name} is about a reference, and {why} has none: set kl_coef, or the method's beta"
                    )
            return "none"
        if args.reference == "none":
            raise ValueError(f'{why} compares with a reference: use reference="auto", "copy" or "adapter"')
        chosen = args.reference if args.reference != "auto" else "adapter" if adapted else "copy"
        if chosen == "adapter" and not adapted:
            raise ValueError(
                'reference="adapter" is the model with its adapter switched off: train with a peft_config (--lora)'
            )
        if args.ref_mixin and chosen == "copy" and adapted:
            raise ValueError(
                'a copy of a PEFT model\'s base has no adapter that ref_mixin could move: use reference="adapter", which '
                "averages the adapter, or leave ref_mixin at 0"
            )
        return chosen

    def _encode_ptx(self, dataset: Any) -> list[list[int]]:
        wanted = "ptx_logp" in self._columns
        if wanted != (dataset is not None):
            raise ValueError(
                f"{self.objective} mixes in pretraining text: pass ptx_dataset=, strings or rows with a text"
                if wanted
                else f"ptx_dataset= is for ppo_ptx, {self.objective} mixes in no text"
            )
        if not wanted:
            return []
        rows = dataset if isinstance(dataset, list) else [row for _, row in data.read(dataset, "train")]
        texts = [row if isinstance(row, str) else row.get("text") for row in rows]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError("ptx_dataset: expected strings, or rows with a text, and at least one")
        tokenizer: Any = self.processing_class
        limit = self.args.max_new_tokens + 1
        ids = [ids[:limit] for ids in tokenizer(texts, verbose=False)["input_ids"] if len(ids) > 1]
        if not ids:
            raise ValueError("ptx_dataset: no text has two tokens or more")
        return ids

    @property
    def _spares(self) -> bool:
        """Whether a row with advantage 0 has gradient 0, and leaving it out changes no other row's loss."""
        terms = self.objective.terms
        return (
            self.critic is None
            and all("advantage" in t.method.columns and t.method.denominator != "local_tokens" for t in terms)
            and not any(t.hyperparameters.get(x) for t in terms for x in ("beta", "entropy_coef"))
            and not self._ptx
        )

    @property
    def _penalises(self) -> bool:
        """Whether the divergence that kl_target is about is that from the sampling policy."""
        return any(m.name == "ppo_penalty" for m in self.objective.methods)

    def _set_beta(self, k: int, beta: float) -> None:
        term = self.objective.terms[k]
        self.objective.terms[k] = replace(term, hyperparameters={**term.hyperparameters, "beta": beta})

    @property
    def _corrects(self) -> str:
        """At which level the sampler's log-probs are corrected for: none, token or sequence."""
        asked = self.args.off_policy
        if asked != "auto":
            return asked
        if "advantage" not in self._columns:
            return "none"
        # What servers say, by default, are log-probs before the temperature.
        if isinstance(self.rollout, GenerateRollout) or self.args.temperature != 1:
            return "none"
        return "sequence" if any(m.unit == "row" for m in self.objective.methods) else "token"

    def _check_prompts(self, rows: list[dict[str, Any]]) -> None:
        """Before a run, not when such a prompt's turn has come."""
        for name in (PROMPT_INDEX, *OWN_COLUMNS):
            if rows and name in rows[0]:
                raise ValueError(f"the column {name!r} is what reward functions are told of the rollout: rename it")
        if not isinstance(self.rollout, GenerateRollout):
            return
        ids = encode_prompts([row["prompt"] for row in rows], self.processing_class)
        policy = self._policy
        for k, row in enumerate(ids):
            check_ids(policy, self.processing_class, row, str(rows[k].get("where", f"prompt {k}")))
        limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int):
            return
        long = [k for k, x in enumerate(ids) if len(x) >= limit]
        if long:
            raise ValueError(
                f"{len(long)} of {len(ids)} prompts leave no room for an answer in the model's {limit} positions; the first is "
                f"{rows[long[0]].get('where', long[0])}, of {len(ids[long[0]])} tokens: shorten them, or leave them out"
            )

    # --- going on from a checkpoint -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if not self.prompts:
            raise ValueError("there are no prompts to train on: pass train_dataset=")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_to_train(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_state(Path(checkpoint))
        else:
            self.progress, self.experience, self._shown = _Progress(self.args.reward_kl), None, []

    @property
    def made_with(self) -> dict[str, Any]:
        """What a run must go on with: without it the checkpoint's rollouts and rows would mean something else."""
        args = self.args
        columns = ["prompt", *_columns(self.prompts)]
        rows = json.dumps([[row[n] for n in columns] for row in self.prompts], sort_keys=True, default=str).encode()
        return super().made_with | {
            "data": hashlib.sha256(rows).hexdigest()[:16],
            "rewards": [f"{w:g}*{n}" for n, w in zip(self.rewards.names, self.rewards.weights, strict=True)],
            "method": str(args.objective()),
            "advantage": args.estimator,
            "sampling": str(self.sampling),
            "prompts": len(self.prompts),
            "prompts_per_rollout": args.prompts,
            "num_generations": args.num_generations,
            "steps_per_rollout": args.steps_per_rollout,
            "reference": self.reference,
        }

    @property
    def _all_means(self) -> dict[str, Means]:
        return {
            "loss": self._means,
            "step": self._of_steps,
            "rollout": self._of_rollouts,
            "penalty": self._penalty,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._saved = folder.resolve()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {
            "progress": vars(self.progress),
            "experience": None if self.experience is None else vars(self.experience),
            "means": {name: m.state_dict() for name, m in self._all_means.items()},
            "beta": [dict(t.hyperparameters).get("beta") for t in self.objective.terms],
            "reference": dict(self._moving()),
            "shown": self._shown,
        }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_state(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.is_file():
            raise ValueError(f"no {STATE_FILE} in {folder}: expected a checkpoint of an online run")
        with reading(str(folder)):
            state = torch.load(path, map_location="cpu", weights_only=True)
        self.progress = _Progress(**state["progress"])
        experience = state["experience"]
        self.experience = None if experience is None else Experience(**experience)
        for name, of in self._all_means.items():
            of.load_state_dict(state["means"][name], self.args.device, main=self.args.process_index == 0)
        for k, beta in enumerate(state["beta"]):
            if beta is not None:
                self._set_beta(k, beta)
        self._shown, self._saved = state["shown"], folder.resolve()
        for name, x in self._moving():
            x.copy_(state["reference"][name])

    # --- a rollout ----------------------------------------------------------------------------------------------------

    def _draw(self, cursor: int, count: int) -> list[dict[str, Any]]:
        """The next prompts: pass after pass through the data, every one in an order of its own."""
        rows = []
        for at in range(cursor, cursor + count):
            lap, index = divmod(at, len(self.prompts))
            if at == cursor or index == 0:
                order = permutation(len(self.prompts), self.args.seed, "prompts", lap).tolist()
            rows.append(self.prompts[order[index]])
        return rows

    def _sample(self, prompts: list[dict[str, Any]], n: int, seed: int) -> Groups:
        """n completions of each prompt with their rewards, on every process: a list of rows for each prompt."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        at = range(rank, len(prompts), ranks)

        def work() -> list[tuple[int, list[Completion]]]:
            if not at:
                return []
            mine = [prompts[i] for i in at]
            began = time.perf_counter()
            samples = self.rollout.generate(
                [row["prompt"] for row in mine], n, sampling=self.sampling, seed=seed_for(self.args.seed, seed, rank)
            )
            generated = time.perf_counter()
            columns = {name: [row[name] for row in mine for _ in range(n)] for name in _columns(mine)}
            scored = self.rewards(samples, columns | {PROMPT_INDEX: [i for i in at for _ in range(n)]})
            self._warn_of_ends(samples)
            self._time("generate", generated - began)
            self._time("reward", time.perf_counter() - generated)
            rewards, each = scored.rewards.tolist(), scored.each.tolist()
            ended = zip(samples.finish, map(len, samples.completion_ids), strict=True)
            rows = [
                Completion(
                    samples.prompts[i],
                    samples.prompt_ids[i],
                    samples.completions[i],
                    samples.completion_ids[i],
                    finish == "length",
                    None if samples.logps is None else samples.logps[i],
                    each[i],
                    rewards[i] + self._length_reward(finish == "length", length),
                )
                for i, (finish, length) in enumerate(ended)
            ]
            return [(i, rows[k * n : (k + 1) * n]) for k, i in enumerate(at)]

        return [rows for _, rows in sorted(self._together(work), key=lambda group: group[0])]

    def _update(self) -> None:
        """Tell the sampler that the policy has changed."""

        def work() -> list[Any]:
            self.rollout.update(self._policy)
            return []

        self._together(work)

    def _together(self, work: Callable[[], list[Any]]) -> list[Any]:
        """What `work` returns on all processes; where it fails on one, it has failed on all."""
        from accelerate.utils import gather_object

        found, failed = [], None
        try:
            found = work()
        except Exception as error:
            failed = error
        said = None if failed is None else f"{type(failed).__name__}: {failed}"
        told = gather_object([(found, said)]) if self.accelerator.num_processes > 1 else [(found, said)]
        if failed is not None:
            raise failed
        for rank, (_, problem) in enumerate(told):
            if problem is not None:
                raise RolloutError(f"process {rank} failed: {problem}")
        return [x for found, _ in told for x in found]

    def _warn_of_ends(self, samples: Samples) -> None:
        """Once: a reward model reads text, and is trained on completions that end."""
        judges = [getattr(f, "model", None) if isinstance(f, Judge) else f for f in self.rewards.functions]
        if not self._ends_told and samples.truncated.any() and any(hasattr(j, "score") for j in judges):
            self._ends_told = True
            logger.warning(
                "%d of %d completions were cut at max_new_tokens, and a reward model scores them as if they ended there, with "
                "an EOS behind: missing_eos_penalty or overlong makes a difference, a larger max_new_tokens fewer of them",
                int(samples.truncated.sum()), len(samples),
            )  # fmt: skip

    def _length_reward(self, truncated: bool, length: int) -> float:
        args = self.args
        reward = -args.missing_eos_penalty if truncated else 0.0
        if args.overlong_handling == "penalty":
            over = length - (args.max_new_tokens - args.penalised_tokens)
            reward -= 1.0 if truncated else min(max(over / args.penalised_tokens, 0.0), 1.0)
        return reward

    def _draw_rollout(self, progress: _Progress) -> tuple[Groups, Groups, int]:
        """The groups of the next rollout, all that was sampled for it, and in how many draws: the same on all processes."""
        args = self.args
        self._update()
        seen: Groups = []
        telling, draws = seen, 0
        while draws < args.draws:
            prompts = self._draw(progress.cursor, args.prompts)
            progress.cursor += args.prompts
            seed = seed_for(self.args.seed, "rollout", progress.rollouts, draws)
            draws += 1
            seen += self._sample(prompts, args.num_generations, seed)
            telling = [group for group in seen if spread(group) > 0]
            if len(telling) >= args.prompts:
                break
        groups = seen
        if args.draws > 1:  # what cannot be replaced any more stays
            groups = (telling + [group for group in seen if not spread(group) > 0])[: args.prompts]
        rows = [row for group in groups for row in group]
        if all(math.isnan(row.reward) for row in rows):
            raise ValueError(
                f"no completion of rollout {progress.rollouts} has a reward: {', '.join(self.rewards.names)} returned NaN or "
                f"None for each of {len(rows)}"
            )
        return groups, seen, draws

    def _begin_rollout(self) -> None:
        """Sample, score, and put what is to be trained on into `experience`. Nothing is changed until all is there."""
        args, progress = self.args, replace(self.progress)
        began = time.perf_counter()
        with self._saved_if_it_fails():
            groups, seen, draws = self._draw_rollout(progress)
        rows = [row for group in groups for row in group]
        # What fails from here on may fail on one of several processes, which cannot write a checkpoint alone.
        with self._saved_if_it_fails() if args.world_size == 1 else contextlib.nullcontext():
            self._check_rows(rows)
            experience, metrics = self._experience(rows)
        metrics |= (
            describe(seen, self.rewards.names) | self._spent() | {"draws": float(draws), "kl_coef": progress.kl_coef}
        )
        metrics["passes"] = progress.cursor / len(self.prompts)
        if self.is_world_process_zero() and (args.log_samples or args.show_samples):
            where = {"rollout": self.progress.rollouts, "step": self.state.global_step}
            lines = sample_lines(seen, rows, experience, self.rewards.names, **where)
            self._shown = lines if args.show_samples else []
            if args.log_samples:
                path = Path(str(args.output_dir)) / SAMPLES_FILE
                progress.samples_bytes = append_lines(path, lines, progress.samples_bytes)
        if args.kl_target is not None and not self._penalises and not math.isnan(metrics["objective/kl"]):
            # Ziegler et al. (arXiv 1909.08593), equation in section 2.2.
            error = min(max(metrics["objective/kl"] / args.kl_target - 1, -0.2), 0.2)
            factor = 1 + error * min(len(rows) / args.kl_horizon, 1.0)
            progress.kl_coef *= factor
            for k, term in enumerate(self.objective.terms):
                if term.reads_reference:
                    self._set_beta(k, term.hyperparameters["beta"] * factor)
        progress.rollouts += 1
        self.progress, self.experience = progress, experience
        metrics["time/rollout_s"] = time.perf_counter() - began
        self._note(self._of_rollouts, metrics)

    def _check_rows(self, rows: list[Completion]) -> None:
        policy = self._policy
        for row in rows:
            check_ids(policy, self.processing_class, [*row.prompt_ids, *row.ids], "a completion")
            if not row.prompt_ids:
                raise ValueError(
                    f"a prompt without a token: {row.prompt!r:.80}; its first answer token has no predecessor"
                )
            if row.logps is not None and len(row.logps) != len(row.ids):
                raise ValueError(
                    f"the sampler gave {len(row.logps)} log-probs for {len(row.ids)} tokens: set off_policy='none', "
                    "or mend the sampler"
                )
        if self._head_checked:
            return
        longest = max(rows, key=lambda row: len(row.prompt_ids) + len(row.ids))
        check_head(self.model, longest.prompt_ids + longest.ids, self.args.device, self.args.backend)
        self._head_checked = True

    def _experience(self, rows: list[Completion]) -> tuple[Experience, dict[str, float]]:
        """Log-probs, values and advantages of these rows, groups side by side."""
        args = self.args
        reward = torch.tensor([row.reward for row in rows])  # (R,)
        truncated = torch.tensor([row.truncated for row in rows])
        lengths = torch.tensor([len(row.ids) for row in rows])
        width = max(int(lengths.max()), 1)
        mask = torch.arange(width) < lengths[:, None]  # (R, C)
        valued = ~reward.isnan()
        counted = valued & (lengths > 0)
        if args.overlong_handling == "mask":
            counted &= ~truncated
        kl_coef, critic = self.progress.kl_coef, self.critic is not None
        corrects = self._corrects if all(row.logps is not None for row in rows) else "none"
        if args.off_policy in ("token", "sequence") and corrects == "none":
            raise ValueError(f"off_policy={args.off_policy!r} needs a sampler that gives its own log-probs")
        reference = self._live is not None
        policy = critic or kl_coef > 0 or args.steps_per_rollout > 1 or corrects != "none"
        policy |= reference and args.kl_target is not None

        kept, advantage = counted, None
        first = critic or kl_coef > 0  # the advantages want to know the log-probs, or the values
        if not first:
            advantage = advantages(reward, valued, args.estimator, args.num_generations)
            kept = counted & (advantage != 0) if self._spares else counted
        known = self._measure(rows, valued & (lengths > 0) if first else kept, width, policy, reference)
        columns: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        kl = torch.zeros_like(mask, dtype=torch.float32)
        if reference and policy:
            of = (known["old_logp"], known["ref_token_logp"])
            kl = torch.where(mask, k1(*of), 0.0)
            found = kl.sum(dim=1)[kept]
            metrics["objective/kl"] = float(found.mean()) if len(found) else math.nan
        if critic:
            tokens = mask & counted[:, None]
            gained = -kl_coef * kl
            gained[torch.arange(len(rows)), (lengths - 1).clamp(min=0)] += torch.where(valued, reward, 0.0)
            advantage, returns = gae(gained, known["old_value"], tokens, args.gamma, args.lam)
            explained = 1 - _variance(returns - known["old_value"], tokens) / _variance(returns, tokens)
            metrics |= {
                "value/mean": float(known["old_value"][tokens].mean()),
                "value/explained": float(explained),
            }
            columns |= {"old_value": known["old_value"], "returns": returns}
            if args.whiten_advantages:
                advantage = torch.where(tokens, whiten(advantage, tokens), 0.0)
        elif first:
            total = reward - kl_coef * kl.sum(dim=1)
            advantage = advantages(total, valued, args.estimator, args.num_generations)
            kept = counted & (advantage != 0) if self._spares else counted
        assert advantage is not None
        if corrects != "none":
            sampler = torch.zeros_like(kl)
            for i, row in enumerate(rows):
                sampler[i, : len(row.ids)] = torch.tensor(row.logps, dtype=torch.float32)
            log_w = torch.where(mask & kept[:, None], known["old_logp"] - sampler, 0.0)
            log_w = log_w if corrects == "token" else log_w.sum(dim=1)
            weight = log_w.exp().clamp(max=args.off_policy_cap)
            metrics["off_policy/weight"] = float(weight[mask & kept[:, None] if corrects == "token" else kept].mean())
            if weight.dim() > advantage.dim():
                advantage = advantage[:, None]
            elif weight.dim() < advantage.dim():
                weight = weight[:, None]
            advantage = advantage * weight
        columns |= {"advantage": advantage, "prob_w": reward}
        columns |= {name: known[name] for name in ("old_logp", "ref_token_logp") if name in known}
        if "entropy" in known:
            metrics["entropy"] = float(known["entropy"][mask & kept[:, None]].mean())
        if args.steps_per_rollout == 1:
            columns.pop("old_logp", None)  # the policy is the one that sampled
        reads = self._columns | ({"old_value", "returns"} if critic else set())
        reads |= {"ref_token_logp"} if any(t.reads_reference for t in self.objective.terms) else set()
        per_prompt = kept.view(-1, args.num_generations).any(dim=1)
        metrics["groups/dropped"] = 1 - float(per_prompt.float().mean())
        if not advantage.isfinite().all():
            known = reward[valued]
            raise ValueError(
                f"advantages of rollout {self.progress.rollouts} are not finite: rewards from {known.min():g} to {known.max():g}"
                f"{f', divergence {kl.sum(dim=1).max():g}' if reference and policy else ''}; give rewards of a smaller scale"
            )
        experience = Experience(
            [row.prompt_ids for row in rows],
            [row.ids for row in rows],
            counted,
            kept,
            {name: x.contiguous() for name, x in columns.items() if name in reads},
        )
        return experience, metrics

    def _measure(
        self, rows: list[Completion], which: Tensor, width: int, policy: bool, reference: bool
    ) -> dict[str, Tensor]:
        """Of the rows `which` (R,), token by token, (R, C): old_logp, entropy, old_value; ref_token_logp."""
        from accelerate.utils import gather_object

        order = sorted(which.nonzero()[:, 0].tolist(), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].ids))
        mine = order[self.accelerator.process_index :: self.accelerator.num_processes]
        pairs = [(rows[i].prompt_ids, rows[i].ids) for i in mine]
        options: dict[str, Any] = {
            "temperature": self.args.temperature,
            "tile_bytes": self.objective.tile_bytes,
            "backend": self.args.backend,
        }

        def measure(hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
            stats = token_stats(hidden, head.weight, targets, outputs=("entropy",), **head.kwargs(), **options)
            assert stats.entropy is not None
            values = {} if self.critic is None else {"old_value": self.critic(hidden)[..., 0]}
            return {"old_logp": stats.logp, "entropy": stats.entropy, **values}

        def compare(hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
            return {"ref_token_logp": token_logps(hidden, head.weight, targets, **head.kwargs(), **options)}

        found: dict[str, Tensor] = {}
        size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            if policy:
                names = ["old_logp", "entropy", *(("old_value",) if self.critic is not None else ())]
                found |= score_tokens(self._policy, pairs, names, measure, batch_size=size, pad=self._pad)
            if reference:
                with self._referred() as scored:
                    found |= score_tokens(scored, pairs, ["ref_token_logp"], compare, batch_size=size, pad=self._pad)
        known = {name: torch.zeros(len(rows), width) for name in found}
        for at, values in gather_object([(mine, found)]):
            for name, x in values.items():
                known[name][at, : x.shape[1]] = x
        return known

    @property
    def _policy(self) -> Any:
        """The model out of its containers for several processes. Not to be asked for per row: accelerate looks up packages."""
        return self.accelerator.unwrap_model(self.model)

    def _moving(self) -> list[tuple[str, Tensor]]:
        """What ref_mixin moves, by its name in the policy."""
        if not self.args.ref_mixin or self._live is None:
            return []
        return list(self._average.items() if self._live.copy is None else self._live.copy.named_parameters())

    @contextlib.contextmanager
    def _referred(self) -> Iterator[nn.Module]:
        """The reference policy."""
        assert self._live is not None
        policy = self._policy
        if self._live.copy is not None:
            yield self._live.copy
        elif not self._average:
            with without_adapter(policy):
                yield policy
        else:
            own = {n: (p, p.data) for n, p in policy.named_parameters() if n in self._average}
            try:
                for name, (p, data) in own.items():
                    p.data = self._average[name].to(data)
                yield policy
            finally:
                for p, data in own.values():
                    p.data = data

    # --- what is said of it -------------------------------------------------------------------------------------------

    def _time(self, what: str, seconds: float) -> None:
        self._seconds[what] += seconds

    def _note(self, means: Means, metrics: Mapping[str, float]) -> None:
        # On the device, where ranks can add them up.
        values = {n: torch.tensor(x, dtype=torch.float32, device=self.args.device) for n, x in metrics.items()}
        means.add(values, {n: (~x.isnan()).float() for n, x in values.items()})

    def _spent(self) -> dict[str, float]:
        spent, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return {f"time/{name}_s": x for name, x in spent.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._of_rollouts.pop() | self._of_steps.pop())
        super().log(logs, start_time)
        if "loss" in logs and self._shown:
            from tqdm.auto import tqdm  # a progress bar stays below what it writes

            width = shutil.get_terminal_size((120, 0)).columns
            tqdm.write(f"step {self.state.global_step}, {table(self._shown, self.args.show_samples, width)}")
            self._shown = []

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean reward of the held-out prompts, eval_generations completions each, always drawn by the same seed."""
        prompts = self.eval_dataset if eval_dataset is None else load_prompts(eval_dataset, alike=True)
        if not prompts:
            raise ValueError("there are no prompts to evaluate on: pass eval_dataset=")
        began = time.perf_counter()
        with self._saved_if_it_fails() if self.is_in_train else contextlib.nullcontext():
            self._update()
            groups = self._sample(prompts, self.args.eval_generations, seed_for(self.args.seed, metric_key_prefix))
        found = describe(groups, self.rewards.names) | self._spent()
        metrics = {f"{metric_key_prefix}_{name}": x for name, x in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- a step -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        for _ in range(num_batches):  # of no use but to tell Trainer how far it is
            next(epoch_iterator)
        number, at = divmod(self.state.global_step, self.args.steps_per_rollout)
        if self.progress.rollouts == number:
            self._begin_rollout()
        assert self.experience is not None and self.progress.rollouts == number + 1
        batches, items = self._step(self.experience, at)
        self._step_began = time.perf_counter()
        return batches, items

    @contextlib.contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        """Whatever is raised inside, by users' functions above all, goes on behind a checkpoint; an interrupt goes through."""
        try:
            yield
        except Exception:
            try:
                self._save_before_failing()
            except SavingError as second:  # what failed first is what there is to mend
                logger.warning("%s", second)
            raise

    def _save_before_failing(self) -> None:
        """A checkpoint of all that has been learned, on all processes together."""
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        wanted = self.args.save_strategy != "no" and self.state.global_step > 0
        if wanted and folder.resolve() != self._saved:
            self._save_checkpoint(self.model, trial=None)
            self.accelerator.wait_for_everyone()  # whoever ends first may end them all

    def _step(self, experience: Experience, at: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """This process's micro-batches of step `at` of the rollout, and what their losses divide by."""
        args, ranks = self.args, self.accelerator.num_processes
        epoch, part = divmod(at, args.minibatches)
        order = permutation(len(experience.kept), self.args.seed, "order", self.progress.rollouts, epoch)
        rows = order.chunk(args.minibatches)[part]
        kept = rows[experience.kept[rows]]
        if self._spares:  # which rows are side by side changes nothing: those of like length, for the padding
            sizes = [len(experience.prompt_ids[i]) + len(experience.completion_ids[i]) for i in kept.tolist()]
            kept = kept[torch.tensor(sizes, dtype=torch.int64).argsort(stable=True)]
        size = args.per_device_train_batch_size
        micro = kept.split(size) if len(kept) else ()
        spared = rows[experience.counted[rows] & ~experience.kept[rows]]
        counts = [
            self.objective.count_items(experience.targets(of)) for of in (*micro, *((spared,) if len(spared) else ()))
        ]
        none = self.objective.count_items(torch.full((1, 1), data.IGNORE_INDEX))
        items = {
            "policy": torch.stack([none, *counts]).sum(dim=0).clamp(min=1),
            "tokens": experience.lengths[rows[experience.counted[rows]]].sum().clamp(min=1),
        }
        first = self.state.global_step * args.gradient_accumulation_steps * ranks
        batches = []
        for k in range(self.accelerator.process_index, args.gradient_accumulation_steps * ranks, ranks):
            batch = self._batch(experience, micro[k] if k < len(micro) else None, (first + k) * size)
            batches.append(batch)
        return batches, {name: x.to(args.device) for name, x in items.items()}

    def _batch(self, experience: Experience, rows: Tensor | None, ptx_at: int) -> dict[str, Tensor]:
        """Rows (n,) as a batch; without any, one token that nothing is learned from, for the others wait for this process."""
        some = torch.zeros(1, dtype=torch.int64) if rows is None else rows
        pairs = [(experience.prompt_ids[i], experience.completion_ids[i]) for i in some.tolist()]
        ptx = []
        if rows is None:
            pairs = [(pairs[0][0][:1], pairs[0][1][:1] or pairs[0][0][:1])]
        elif self._ptx:
            size = self.args.per_device_train_batch_size
            ptx = [self._ptx[(ptx_at + k) % len(self._ptx)] for k in range(size)]
        batch = pad_rows([*pairs, *((ids[:1], ids[1:]) for ids in ptx)], self._pad)
        targets = batch["targets"]
        batch["targets"] = targets[: len(pairs)]
        if "ptx_logp" in self._columns:
            batch["ptx_targets"] = targets[len(pairs) :]
        if rows is None:
            batch["targets"] = torch.full_like(batch["targets"], data.IGNORE_INDEX)
        for name, x in experience.columns.items():
            x = x[some]
            if x.dim() == 2:
                placed = torch.zeros(batch["targets"].shape, dtype=x.dtype)
                for k, (prompt, ids) in enumerate(pairs):
                    placed[k, len(prompt) - 1 : len(prompt) - 1 + len(ids)] = x[k, : len(ids)]
                x = placed
            batch[name] = x
        return batch

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        targets = inputs["targets"]
        count = len(targets)
        given: dict[str, Any] = {n: x for n, x in inputs.items() if n in self._columns or n == "ref_token_logp"}
        scaled: dict[str, Any] = {"temperature": self.args.temperature, "denominator": denominator["policy"]}

        def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
            of = head.kwargs()
            if "ptx_targets" in inputs:
                text = inputs["ptx_targets"]
                given["ptx_logp"] = token_logps(
                    hidden[count:],
                    head.weight,
                    text,
                    **of,
                    backend=self.args.backend,
                    tile_bytes=self.objective.tile_bytes,
                )
                given["ptx_mask"] = text != data.IGNORE_INDEX
            out = self.objective(hidden[:count], head.weight, targets, **of, **scaled, **given)
            loss, metrics, counts = out.loss, dict(out.metrics), dict(out.counts)
            if self.critic is not None:
                mask = targets != data.IGNORE_INDEX
                found, about = METHODS["ppo_value"](
                    value=self.critic(hidden[:count])[..., 0],
                    old_value=inputs["old_value"],
                    returns=inputs["returns"],
                    mask=mask,
                    value_clip=self.args.value_clip,
                )
                about = {**about, "value/loss": torch.where(mask, found.detach(), torch.nan)}
                metrics |= mean_metrics(about, mask.any(dim=1))
                counts |= count_metrics(about, mask.any(dim=1))
                loss = loss + self.args.vf_coef * reduce_losses(found, "mean", denominator["tokens"])
            return {"loss": loss, "losses": out.losses, "metrics": metrics, "counts": counts}

        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], fused_loss=fused)
        loss, metrics, counts = out["loss"], out["metrics"], out["counts"]
        if self._penalises and self.args.kl_target is not None:
            self._penalty.add({"kl": metrics["kl"]}, {"kl": counts["kl"]})
        # Trainer's own mean of the loss forgets, at a resumption, the steps before since the last log.
        share = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        one = torch.ones((), device=loss.device)
        return loss, out["losses"], {**metrics, "loss": loss * share}, {**counts, "loss": one}

    def after_step(self) -> None:
        """To be called when a step is done, before it is logged and saved."""
        self._note(self._of_steps, {"time/update_s": time.perf_counter() - self._step_began})
        if self.state.global_step % self.args.steps_per_rollout:
            return
        self.experience = None
        policy = dict(self._policy.named_parameters())
        with torch.no_grad():
            for name, x in self._moving():
                x.lerp_(policy[name].to(x), self.args.ref_mixin)
        if self._penalises and self.args.kl_target is not None:
            kl = self._penalty.pop()["kl"]
            for k, term in enumerate(self.objective.terms):
                if term.method.name == "ppo_penalty" and not math.isnan(kl):
                    self._set_beta(k, adapt(term.hyperparameters["beta"], kl, self.args.kl_target))


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: RLTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last whole checkpoint of an online run."""
    return whole_checkpoint(output_dir, STATE_FILE)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What rows of `load_prompts` have beside the prompt, but for where they stand in their file."""
    return [name for name in rows[0] if name != "prompt" and not isinstance(rows[0][name], Place)]


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].var(correction=0)
