"""RLTrainer: online RL on `transformers.Trainer`, a rollout of scored completions and then a few steps on it.

    prompts ──▶ Rollout ──▶ Rewards ──▶ advantages ──▶ Experience ──▶ Objective inside the fused forward ──▶ loss

A rollout is a deterministic function of (seed, rollout index): its prompts, their order and, if the sampler is
deterministic given a seed, its completions. `GenerateRollout` is, up to rounding of the logits, unless continuous
batching is on; of a server it depends on the server. A checkpoint holds what is left of the current rollout, so that a
resumed run continues with the same samples as the run that was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from ..data import KWARGS, load_prompts
from ..layouts import Chosen
from ..methods.advantages import OF_GROUPS
from ..methods.policy import adapt
from ..models import padding_id
from ..models.value_head import SavesValueHead, ValueHead, attach_value_head
from ..rewards import RewardFunction, Rewards
from ..rollout import GenerateRollout, Rollout, Sampling
from ..seeds import seed_for
from ..trainer import HandedOver, Means, Report, UnitTrainer, check_head, prepare_model, with_tokenizer
from ..trainer.arguments import changed
from ..trainer.base import PREFIX_CHECKPOINT_DIR, PreTrainedTokenizerBase, TrainerCallback
from ..trainer.budget import coupled, entries
from ..trainer.layout import hindrance_of
from ..trainer.mixtures import checked_coefficient
from ..trainer.setup import check_trainable
from ..trainer.whole import whole
from .checkpoint import STATE_FILE, Progress, load_state, saved_if_it_fails
from .checks import check_completions, check_prompts, check_sampler, check_sharding
from .collect import Collector, data_columns, describe, told_apart
from .config import RLConfig
from .experience import Batches, Experience, Measure, correction_level, make_experience, pretraining_texts, spares_rows
from .layout import settle
from .loss import batch_loss
from .preflight import check_before, check_first
from .reference import MovingReference, choose_reference
from .sample_log import SAMPLES_FILE, append_lines, sample_lines, table


class RLTrainer(SavesValueHead, UnitTrainer):
    """Trainer of a causal LM by rewards for its own completions.

        trainer = RLTrainer(model, reward_function, RLConfig("out", method="grpo"), train_dataset=prompts, …)

    model: a causal LM of transformers, a PEFT model, or a name for `load_model`; peft_config makes it a PEFT model.
    rewards: `Rewards`, or what it takes: functions with TRL's signature, reward models, scoring judges. Beside the
        data's columns a reward function is given `prompt_index`, a number for every completion that those of one prompt
        of a rollout share.
    train_dataset, eval_dataset: what `load_prompts` reads: rows with a prompt, and columns for the reward functions.
    rollout: the sampler; the model itself (`GenerateRollout`) if not given.
    ptx_dataset: texts that `ppo_ptx` mixes in: strings, or rows with `text`.
    The reference policy is the model as it is handed over here, with its adapter if it carries one, as in `XPOTrainer`.
    With ref_mixin it follows the policy, see `MovingReference`. Other arguments are Trainer's.

    The log's entropy and objective/kl are means over the completions that are trained on, its rewards and lengths over
    all.

    Completions whose reward is NaN are left out of everything but the log. Those whose advantage is exactly 0, above
    all those of a group of equal rewards, are counted in the loss's mean and spared the forward and backward, where the
    loss has no other term. With gae a truncated completion has the value 0 after its last token, as an ended one has:
    the value of a continuation is not bootstrapped. With several processes each samples and scores its share of the
    prompts, and then knows the whole rollout.

    Failures:
    A reward function that raises, takes longer than `Rewards.timeout_s`, or returns None, a wrong number of rewards or
    anything but numbers ends the run with a RewardError that names it; a sampler or a server that is unavailable for
    longer than its retries last, with a RolloutError; a rollout without any reward, a sampler's log-prob that is NaN
    (the error names a server's address), or advantages that are not finite (it names whose numbers they come from),
    with a ValueError; on all processes, if it happens on one. Nothing is lost: before it raises, the run writes
    a checkpoint (if save_strategy is not "no", and a step has been taken), and a run resumed from it makes the same
    rollout again and ends with exactly the weights, log and samples of an undisturbed one. If an evaluation fails, the
    checkpoint written is that of the step before it; the resumed run continues after that evaluation. KeyboardInterrupt
    ends the run at once, without a checkpoint: the steps since the last one are taken again, and are the same.
    NaN, an infinity or None for one completion: it has no reward, see above. A group of equal rewards: see above, and
    max_draws. A completion without an EOS, cut at max_new_tokens: no EOS is appended, neither for scoring nor for
    training; overlong and missing_eos_penalty decide its reward.
    """

    args: RLConfig
    reads_rows = False

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
        args = args or RLConfig()
        if kwargs.pop("data_collator", None) is not None:
            raise ValueError("data_collator= has no batches to make: those of online RL are cut from rollouts")
        sampler = sorted({"generation_batch_size", "continuous_batching"} & set(changed(args)))
        if rollout is not None and sampler:
            raise ValueError(f"{' and '.join(sampler)} of the arguments are for GenerateRollout: give them to rollout=")
        model, processing_class = with_tokenizer(model, processing_class)
        self.rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
        self.objective = args.objective()
        self.loss_weights = [term.weight for term in self.objective.terms]
        self.sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.stop)
        self.prompts = [] if train_dataset is None else load_prompts(train_dataset, alike=True)
        held_out = None if eval_dataset is None else load_prompts(eval_dataset, alike=True)

        handed_over = HandedOver(model, peft_config, copied=args.reference == "copy")
        model = prepare_model(model, args, peft_config)
        self.reference = choose_reference(args, self.objective, model, adapts_beta=self._adapts_beta)
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
        accelerator = self.accelerator
        check_sharding(self.reference, args, model, accelerator)
        self.policy: Any = (policy := accelerator.unwrap_model(self.model))
        self.moving_reference: MovingReference | None = None
        how: Any = {"sharded": self.is_fsdp_enabled or self.is_deepspeed_enabled, "averaged": args.ref_mixin > 0}
        self.reference = handed_over.settle(self.reference, args.reference, model, **how)
        if self.reference != "none":
            self.moving_reference = MovingReference(self.reference, policy, accelerator, args.ref_mixin, handed_over)
        self.critic: ValueHead | None = attach_value_head(model) if args.estimator == "gae" else None
        pad = padding_id(model, processing_class)
        texts = pretraining_texts(ptx_dataset, self.objective, processing_class, args.max_new_tokens + 1)
        self._batches = Batches(args, self.objective, accelerator, pad, texts, router=checked_coefficient(policy, args))
        self._measure = Measure(
            policy, self.critic, self.moving_reference, accelerator, args, self.objective.tile_bytes, pad
        )
        continuous = None if args.continuous_batching else False
        how = {"batch_size": args.generation_batch_size, "chat_template_kwargs": args.chat_template_kwargs}
        rollout = rollout or GenerateRollout(model, processing_class, continuous=continuous, **how)
        self._collector = Collector(policy, rollout, self.rewards, accelerator, args, self.sampling, self.prompts)
        rows = [*self.prompts, *(held_out or [])]
        check_prompts(rows, policy, processing_class, rollout, args.chat_template_kwargs)
        self.add_callback(_AfterStep(self))
        self.progress = Progress(args.reward_kl)
        self.experience: Experience | None = None
        self._step_means, self._rollout_means, self._penalty_means = Means(), Means(), Means()
        self._all_means = {"loss": self._means, "step": self._step_means}
        self._all_means |= {"rollout": self._rollout_means, "penalty": self._penalty_means}
        self._step_began = 0.0
        self._head_checked = self._rollout_checked = False
        self.layout: Chosen | None = None  # how models read rows; None before the first completions are there
        self._layout_before: str | None = None  # of the run that is resumed
        self._shown: list[dict[str, Any]] = []  # samples for the next log
        self._saved: Path | None = None  # this run's last checkpoint; another in its place is an earlier run's

    @property
    def rollout(self) -> Rollout:
        """The sampler; it may be replaced between runs."""
        return self._collector.rollout

    @rollout.setter
    def rollout(self, rollout: Rollout) -> None:
        self._collector.rollout = rollout

    @property
    def _adapts_beta(self) -> bool:
        """Whether the divergence that kl_target steers is that from the sampling policy."""
        return any(m.card.rl.adapts_beta for m in self.objective.methods)

    def _coupled(self) -> list[str]:
        return coupled(self.objective)

    @property
    def _spares(self) -> bool:
        return spares_rows(self.objective, other_losses=self._batches.other_losses or self.critic is not None)

    def _set_beta(self, k: int, beta: float) -> None:
        """Changes the hyperparameter beta of the objective's term k."""
        term = self.objective.terms[k]
        self.objective.terms[k] = replace(term, hyperparameters={**term.hyperparameters, "beta": beta})

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as `UnitTrainer.train` does; raises ValueError if there are no prompts."""
        if not self.prompts:
            raise ValueError("there are no prompts to train on: pass train_dataset=")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def preflight(self, *, sample: bool = False) -> Report | None:
        """Checks the prompts before training, see docs/preflight.md; the first rollout is checked when it is there.

        sample: collect the first rollout for it now, and ask the rewards for theirs; training collects it again.
        Returns what was found, and keeps it in `report`, to which the first rollout adds; None without prompts.
        """
        if not self.prompts:
            return None
        with self._whole_policy() if sample else contextlib.nullcontext():
            self.report = check_before(self, self._collector if sample else None)
        return self.report

    def _prepare_to_train(self, checkpoint: str | None) -> None:
        check_trainable(self.policy, self.critic)  # a critic alone would learn of a policy that stays as it is
        self.make_ready()
        if checkpoint is not None:
            self._load_state(Path(checkpoint))
        else:
            self.progress, self.experience, self._shown = Progress(self.args.reward_kl), None, []

    @property
    def made_with(self) -> dict[str, Any]:
        """Settings that a resumed run must share: under others the checkpoint's rollouts and rows are invalid."""
        args = self.args
        columns = ["prompt", *data_columns(self.prompts)]
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
            **({} if self.moving_reference is None else self.moving_reference.identity),
            KWARGS: args.chat_template_kwargs,
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
            "reference": {} if self.moving_reference is None else self.moving_reference.moving(),
            "shown": self._shown,
            "layout": None if self.layout is None else self.layout.layout,
        }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_state(self, folder: Path) -> None:
        state = load_state(folder)
        self.progress = Progress(**state["progress"])
        self.experience = Experience(**kept) if (kept := state["experience"]) is not None else None
        for name, means in self._all_means.items():
            means.load_state_dict(state["means"][name], self.args.device, main=self.args.process_index == 0)
        for k, beta in enumerate(state["beta"]):
            if beta is not None:
                self._set_beta(k, beta)
        self._shown, self._saved = state["shown"], folder.resolve()
        self.layout, self._layout_before = None, state.get("layout")
        if self.moving_reference is not None:
            self.moving_reference.load(state["reference"])

    def _save_before_failing(self) -> None:
        """Writes a checkpoint of everything learned, on all processes together."""
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        wanted = self.args.save_strategy != "no" and self.state.global_step > 0
        if wanted and folder.resolve() != self._saved:
            self._save_checkpoint(self.model, trial=None)
            self.accelerator.wait_for_everyone()  # the first process that ends may end them all

    # --- a rollout ----------------------------------------------------------------------------------------------------

    def settle_layout(self, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        """Settles `layout` on rows (prompt ids, completion ids), unless it is settled or none has a completion."""
        rows = [row for row in rows if row[1]]
        if self.layout is None and rows:
            before, hindrance = self._layout_before, hindrance_of(self)
            self.layout = settle(self._batches, self.policy, rows, before=before, hindrance=hindrance)
            self._batches.layout = self._measure.layout = self.layout.layout

    def _whole_policy(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which this process can sample from the policy, and score, without the others."""
        self.make_ready()
        return whole(self.policy)

    def _begin_rollout(self) -> None:
        """Collects a rollout and makes `experience` of it, of a policy in parts by a single gather of its weights."""
        with contextlib.ExitStack() as stack:
            self._collect(stack)

    def _collect(self, stack: contextlib.ExitStack) -> None:
        """Collects a rollout. Nothing of the run changes until all of it is there. stack: of the policy made whole."""
        args, progress, began = self.args, replace(self.progress), time.perf_counter()

        def save() -> None:
            stack.close()
            self._save_before_failing()

        stack.enter_context(self._whole_policy())
        with saved_if_it_fails(save):
            collected = self._collector.collect(progress.rollouts, progress.cursor)
        progress.cursor = collected.cursor
        rows = [row for group in collected.groups for row in group]
        # From here on one of several processes may fail alone, and it cannot write a checkpoint alone.
        with saved_if_it_fails(save) if args.world_size == 1 else contextlib.nullcontext():
            whose = _about_sampler(self.rollout)
            check_completions(rows, self.policy, self.processing_class, self.rollout)
            self.settle_layout([(row.prompt_ids, row.ids) for row in rows])
            if not self._head_checked:
                longest = max((row.prompt_ids + row.ids for row in rows), key=len)
                check_head(self.model, longest, args.device, args.backend)
                check_sampler(rows, self.policy, args, self.accelerator, layout=self._measure.layout, **whose)
                self._head_checked = True
            experience, metrics = make_experience(
                rows,
                args,
                self.objective,
                self._measure,
                kl_coef=progress.kl_coef,
                correction=correction_level(args, self.objective, **whose),
                spare=self._spares,
                number=progress.rollouts,
                names=self.rewards.names,
            )
        if not self._rollout_checked:
            self._rollout_checked = True
            check_first(self, rows)
        metrics |= describe(collected.sampled, self.rewards.names) | collected.times
        passes = progress.cursor / len(self.prompts)
        metrics |= {"draws": float(collected.draws), "kl_coef": progress.kl_coef, "passes": passes}
        if self.is_world_process_zero() and (args.log_samples or args.show_samples):
            where = {"rollout": self.progress.rollouts, "step": self.state.global_step}
            lines = sample_lines(collected.sampled, rows, experience, self.rewards.names, **where)
            self._shown = lines if args.show_samples else []
            if args.log_samples:
                path = Path(str(args.output_dir)) / SAMPLES_FILE
                progress.samples_bytes = append_lines(path, lines, progress.samples_bytes)
        if args.kl_target is not None and not self._adapts_beta and not math.isnan(metrics["objective/kl"]):
            factor = _towards(args.kl_target, metrics["objective/kl"], len(rows) / args.kl_horizon)
            progress.kl_coef *= factor
            for k, term in enumerate(self.objective.terms):
                if term.reads_reference:
                    self._set_beta(k, term.hyperparameters["beta"] * factor)
        progress.rollouts += 1
        self.progress, self.experience = progress, experience
        self.watch.note(told_apart(collected.groups, compared=args.estimator in OF_GROUPS))
        self._note(self._rollout_means, {**metrics, "time/rollout_s": time.perf_counter() - began})

    # --- logs and evaluation ------------------------------------------------------------------------------------------

    def _note(self, means: Means, metrics: Mapping[str, float]) -> None:
        """Adds metrics to means, NaN ones with weight 0; on the device, where ranks can add them up."""
        values = {n: torch.tensor(x, dtype=torch.float32, device=self.args.device) for n, x in metrics.items()}
        means.add(values, {n: (~x.isnan()).float() for n, x in values.items()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with a step's loss, the means of the rollouts since the last log, and prints some of their samples."""
        if "loss" in logs:
            logs.update(self._rollout_means.pop() | self._step_means.pop())
        super().log(logs, start_time)
        if "loss" in logs and self._shown:
            _show(self._shown, self.args.show_samples, self.state.global_step)
            self._shown = []

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns rewards and lengths on held-out prompts, eval_generations completions each, always by one seed."""
        prompts = self.eval_dataset if eval_dataset is None else load_prompts(eval_dataset, alike=True)
        if not prompts:
            raise ValueError("there are no prompts to evaluate on: pass eval_dataset=")
        began = time.perf_counter()
        save = saved_if_it_fails(self._save_before_failing) if self.is_in_train else contextlib.nullcontext()
        with save, self._whole_policy():
            self._collector.update()
            seed = seed_for(self.args.seed, metric_key_prefix)
            groups, times = self._collector.sample(prompts, self.args.eval_generations, seed)
        found = describe(groups, self.rewards.names) | times
        metrics = {f"{metric_key_prefix}_{name}": x for name, x in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- a step -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Returns the micro-batches of the next step and their denominators; a rollout's first step collects it."""
        self._throughput.begin()
        for _ in range(num_batches):  # the numbers are not used: Trainer counts by them
            next(epoch_iterator)
        number = self.state.global_step // self.args.steps_per_rollout
        if self.progress.rollouts == number:
            with self._throughput.paused():
                self._begin_rollout()
        assert self.experience is not None and self.progress.rollouts == number + 1
        if self.layout is None:  # resumed within a rollout
            self.settle_layout([self.experience.row(i) for i in range(len(self.experience.kept))])
        batches, items = self._batches.step(self.experience, self.state.global_step, spare=self._spares)
        self._step_began = time.perf_counter()
        self._count_tokens(batches)
        return (batches if self.args.tokens_per_batch is None else entries(batches, num_batches)), items

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        how: Any = {"objective": self.objective, "critic": self.critic, "args": self.args}
        out = batch_loss(model, inputs, denominator, **how, router=self._batches.router)
        loss, metrics, counts = out["loss"], out["metrics"], out["counts"]
        if self._adapts_beta and self.args.kl_target is not None:
            self._penalty_means.add({"kl": metrics["kl"]}, {"kl": counts["kl"]})
        # On resuming, Trainer's own mean of the loss forgets the steps since the last log.
        usual = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        weight = usual / denominator["batches"]  # of each step the same, however many micro-batches it has
        return loss, out["losses"], {**metrics, "loss": loss * denominator["batches"]}, {**counts, "loss": weight}

    def after_step(self) -> None:
        """Ends a step before it is logged and saved; at a rollout's end the reference follows and beta adapts."""
        self._note(self._step_means, {"time/update_s": time.perf_counter() - self._step_began})
        if self.state.global_step % self.args.steps_per_rollout:
            return
        self.experience = None
        if self.moving_reference is not None:
            self.moving_reference.follow()
        if self._adapts_beta and self.args.kl_target is not None:
            kl = self._penalty_means.pop()["kl"]
            for k, term in enumerate(self.objective.terms):
                if term.method.card.rl.adapts_beta and not math.isnan(kl):
                    self._set_beta(k, adapt(term.hyperparameters["beta"], kl, self.args.kl_target))


def _show(lines: list[dict[str, Any]], most: int, step: int) -> None:
    """Prints samples of a step as a table."""
    from tqdm.auto import tqdm  # a progress bar stays below what it writes

    width = shutil.get_terminal_size((120, 0)).columns
    tqdm.write(f"step {step}, {table(lines, most, width)}")


def _towards(target: float, kl: float, share: float) -> float:
    """Returns the factor of a KL coefficient after a share of its horizon: Ziegler et al. (arXiv 1909.08593), 2.2."""
    return 1 + min(max(kl / target - 1, -0.2), 0.2) * min(share, 1.0)


def _about_sampler(rollout: Rollout) -> dict[str, bool]:
    """Returns whether the policy itself samples, and whether the log-probs of draws are those at the temperature."""
    return {"own_sampler": isinstance(rollout, GenerateRollout), "as_drawn": getattr(rollout, "logps_as_drawn", False)}


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: RLTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
