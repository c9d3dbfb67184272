"""The phases of a run on tensors without contents, by the run's own code: reference, rollout, steps, evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..data import KINDS, Collator, Kind, pad_rows
from ..head import token_stats
from ..layouts import Inputs, LaysOut
from ..layouts import choose as choose_layout
from ..methods import get_method
from ..models.lm_head import Head, causal_lm
from ..models.modes import evaluating
from ..models.value_head import value_head
from ..objective.settings import placeholder
from ..rewards.collate import read_in_training
from ..rewards.samples import VIEW_DROPOUT
from ..rewards.spec import READS_SAMPLES, RewardSpec
from ..rewards.trainer import RewardTrainer
from ..rl import RLConfig
from ..rl.loss import batch_loss
from ..trainer import XPOTrainer
from ..trainer.in_backward import StepsInBackward
from ..trainer.reference import LiveReference, batch_logps, choose, row_logps
from . import model as models
from . import optimizers
from .functions import AsOnDevice, one_kernel
from .head import Planned, Tiles
from .offload import offloading
from .question import Question
from .trace import Recorder, Trace

CACHE_OF_KEYS = "cache of keys and values"
CASTS = "weights in 16 bits"
OPTIMIZER = "optimizer"
STEPS = ("first step", "later steps")
_FIRST = 8  # token of the first prompt; completions have those below


def record(question: Question, *, quick: bool = False) -> Trace:
    """Returns the record of all phases of a run; quick: of one step, with the optimizer's state there before it."""
    trace = Trace()
    trace.phase("weights")
    run = {"train": Preferences, "reward": Rewards, "rl": Rollouts}[question.command](question, trace)
    alone = one_kernel() if question.device == "cuda" else contextlib.nullcontext()
    with torch.random.fork_rng(), alone, run.functions, run.recorder:
        run.phases(quick=quick)
    if trace.phases[-1][0] == len(trace.events):
        trace.phases.pop()
    return trace


class Run:
    """What the phases of all commands have in common."""

    def __init__(self, question: Question, trace: Trace) -> None:
        self.question = question
        dtype = getattr(torch, question.dtype)
        cached = not question.gradient_checkpointing  # as the trainers set autocast
        self.functions = AsOnDevice(dtype, lambda x: self.recorder.record(x, CASTS), cached=cached)
        vocab = question.config.get_text_config().vocab_size
        self.tiles = Tiles(question.device, vocab, dtype, question.memory, question.tile_mib)
        self.recorder = Recorder(trace, self.tiles.of_call, on_cpu=question.device == "cpu")
        self.model = models.make(question, self.recorder, self._recomputing)
        self.optimizer: Any = None
        self.layout = "padded"  # until `phases` chooses it

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Computes a layer again, in the backward, which leaves `functions`."""
        with self.functions, self.autocast():
            yield

    @property
    def trained(self) -> list[Tensor]:
        """The weights that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Computes in 16 bits if weights are float32 and the run is of mixed precision."""
        before, self.functions.autocast = self.functions.autocast, self.question.mixed
        try:
            yield
        finally:
            self.functions.autocast = before
            if not before:
                self.functions.forget()

    def batch(self, *, evaluation: bool = False) -> dict[str, Any]:
        """Returns the largest micro-batch, or the largest of evaluation."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the loss of a micro-batch."""
        raise NotImplementedError

    def before(self) -> None:
        """Runs the phases before the first step."""

    def phases(self, *, quick: bool) -> None:
        """Runs all phases; quick: the last step alone."""
        self.layout = choose_layout(self.question.layout, self.model, lambda: [self.batch()]).layout
        self.before()
        question, trace = self.question, self.recorder.trace
        with offloading(self.model, self.recorder) if question.activation_offload else contextlib.nullcontext():
            for name in STEPS[quick:]:
                trace.phase(name)
                if quick:
                    self._make_state()
                self.step()
        if not quick:
            trace.phase("evaluation")
            self.evaluate()

    def evaluate(self) -> None:
        """Computes the loss of a batch of evaluation."""
        with torch.no_grad():
            self.model.eval()
            self.loss(self.batch(evaluation=True))
            self.model.train()

    def live(self, strategy: str) -> LiveReference:
        """Returns the reference whose log-probs are computed with every batch."""
        handed_over: Any = SimpleNamespace(off=strategy == "adapter", identity=lambda *_: {})
        if strategy == "copy":
            handed_over.copy = lambda _: models.make_reference(self.question, self.recorder)
        accelerator: Any = SimpleNamespace(autocast=self.autocast, device=torch.device("meta"))
        with self.recorder.labelled(models.REFERENCE):
            return LiveReference(strategy, self.model, accelerator, "auto", handed_over)

    def _make_state(self) -> None:
        """Makes the state of the optimizer, as a step before has made it, weight by weight."""
        with self.recorder.labelled(OPTIMIZER):
            for p in self.trained:
                p.grad = torch.empty_like(p)
                self._optimizer().step()
                p.grad = None

    def _optimizer(self) -> Any:
        if self.optimizer is None:
            question = self.question
            how: Any = {"on_cpu": question.device == "cpu"}
            self.optimizer = optimizers.make(question.optim, self.trained, question.optim_arguments, **how)
        return self.optimizer

    def step(self) -> None:
        """Takes a step of the optimizer on the largest micro-batch, twice where gradients are summed up."""
        question, recorder = self.question, self.recorder
        inside = question.optimizer_in_backward or question.optim in ("lomo", "adalomo")
        stepping = StepsInBackward(self._optimizer()) if inside else None
        for _ in range(min(question.grad_accum, 2)):
            loss = self.loss(self.batch())
            with recorder.backward(self.model), stepping.stepping() if stepping else contextlib.nullcontext():
                loss.backward()
            del loss
        if stepping is not None:
            stepping.close()
            return
        with recorder.labelled(OPTIMIZER):
            if question.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.trained, question.max_grad_norm)
            self._optimizer().step()
        self._optimizer().zero_grad()


class Preferences(Run):
    """`xpo-fast train`: the trainer's own loss."""

    def __init__(self, question: Question, trace: Trace) -> None:
        super().__init__(question, trace)
        self.objective = Planned(question.method, **question.settings)
        self.objective.settle(self.tiles, self.functions.dtype if question.mixed else None, self.recorder)
        self.kind = KINDS[self.objective.data_kind]
        self.reference, _ = choose(question.reference, self.objective, self.model)
        columns = {name for m in self.objective.methods for name in m.columns}
        self.trainer: Any = _bare(
            XPOTrainer,
            self,
            objective=self.objective,
            reference=self.reference,
            _columns=columns | ({"scores"} if self.objective.pairs else set()),
            _estimates_kl="kl" in columns,
            _live=None,
            _router=0.0,
            _router_share=1.0,
        )

    def before(self) -> None:
        """Makes the reference, or caches its log-probs."""
        if self.reference == "none":
            return
        self.recorder.trace.phase("reference")
        if self.reference == "cached":
            with self.autocast():
                batch_logps(self.model, self.batch(evaluation=True), self.kind)
        else:
            self.trainer._live = self.live(self.reference)

    def batch(self, *, evaluation: bool = False) -> dict[str, Any]:
        """Returns the largest micro-batch, or the largest of evaluation, collated as the trainer does."""
        units = self.question.eval_rows if evaluation else self.question.rows
        rows = unit_rows(self.kind, self.question, units, mismatched=self.trainer._estimates_kl)
        batch = LaysOut(Collator(0, self.kind.name), self.layout)(rows)
        if self.reference == "cached":
            batch["ref_logps"] = torch.zeros(len(batch["targets"]) if self.kind.half is None else len(rows))
        return batch

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the trainer's loss."""
        if self.trainer._estimates_kl:
            rows = Inputs.of(batch, "kl_")
            with self.autocast():
                row_logps(self.model, *rows)
            if self.trainer._live is not None:
                self.trainer._live.logps(self.model, rows)
            self.objective.state["kl"] = torch.zeros(())
            batch = {k: v for k, v in batch.items() if not k.startswith("kl_")}
        with self.autocast():
            return self.trainer._loss(self.model, batch, torch.tensor(float(len(batch["targets"]))))[0]


class Rewards(Run):
    """`xpo-fast reward`: the trainer's own loss."""

    def __init__(self, question: Question, trace: Trace) -> None:
        if question.method in READS_SAMPLES:
            raise ValueError(
                f"{question.method} reads the policy's samples in a forward of its own, which is not counted here: ask "
                "for bradley_terry, and leave room for as many rows again"
            )
        super().__init__(question, trace)
        self.spec = RewardSpec(method=question.method, objectives=question.objectives)
        self.kind = KINDS[self.spec.kind]
        method = None if self.spec.form == "odin" else get_method(question.method)
        compares = (method is not None and method.needs_reference) or question.settings.get("regulariser") == "dpo"
        self.compares = compares and question.reference != "none"
        settings = dict(question.settings)
        self.trainer: Any = _bare(
            *(RewardTrainer, self),
            **{"spec": self.spec, "method": method, "settings": settings, "gate_alone": False, "_reference": None},
            view_dropout=VIEW_DROPOUT,
        )

    def before(self) -> None:
        """Makes the reference of the methods that have one."""
        if self.compares:
            self.recorder.trace.phase("reference")
            auto = "adapter" if hasattr(self.model, "disable_adapter") else "copy"
            self.trainer._reference = self.live(auto if self.question.reference == "auto" else self.question.reference)

    def batch(self, *, evaluation: bool = False) -> dict[str, Any]:
        """Returns the largest micro-batch, or the largest of evaluation, collated as the trainer does."""
        question = self.question
        rows = unit_rows(self.kind, question, question.eval_rows if evaluation else question.rows)
        for row in rows if self.spec.form == "preference" else ():  # each row holds both completions
            row["chosen_ids"] = row["rejected_ids"] = row["chosen_ids"] + row["rejected_ids"]
        batch = Collator(0, self.kind.name)(rows)
        if self.spec.form == "objectives":
            batch["ratings"] = torch.zeros(len(rows), len(self.spec.objectives))
        return LaysOut(lambda x: x, self.layout, wanted=partial(read_in_training, self.spec)).lay_out(batch)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the trainer's loss."""
        with self.autocast():
            return self.trainer._loss(self.model, batch, torch.tensor(float(len(batch["targets"]))))[0]


class Rollouts(Run):
    """`xpo-fast rl`: a rollout, its log-probs, and the trainer's own loss on it."""

    def __init__(self, question: Question, trace: Trace) -> None:
        super().__init__(question, trace)
        self.args = RLConfig(
            method=question.method,
            method_args=question.settings,
            num_generations=question.generations,
            prompts_per_rollout=question.prompts,
            per_device_train_batch_size=question.batch_size,
            gradient_accumulation_steps=question.grad_accum,
            max_new_tokens=question.units[0][1][0],
            use_cpu=True,
            **question.rl,
        )
        made = self.args.objective()
        terms: Any = [(t.method.name, dict(t.hyperparameters)) for t in made.terms]
        self.objective = Planned(terms, weights=[t.weight for t in made.terms], fixed_length=made.fixed_length)
        self.objective.settle(self.tiles, self.functions.dtype if question.mixed else None, self.recorder)
        needs = self.objective.needs_reference or self.args.reward_kl > 0
        auto = "adapter" if hasattr(self.model, "disable_adapter") else "copy"
        self.reference = (auto if question.reference == "auto" else question.reference) if needs else "none"
        self.critic = value_head(self.model)
        self.live_reference: LiveReference | None = None

    def before(self) -> None:
        """Makes the reference, samples, and measures what was sampled."""
        trace, question = self.recorder.trace, self.question
        if self.reference != "none":
            trace.phase("reference")
            self.live_reference = self.live(self.reference)
        trace.phase("rollout")
        with evaluating(self.model):
            self._sample(min(question.generation_batch_size, question.prompts * question.generations))
        trace.phase("log-probs of the rollout")
        rows = Inputs.of(self.batch(evaluation=True))

        def policy(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            values = {} if self.critic is None else {"old_value": self.critic(hidden)[..., 0]}
            return {"old_logp": token_stats(hidden, head, rows.targets, outputs=("entropy",)).logp, **values}

        with self.autocast(), evaluating(self.model):
            if self.critic is not None or self.args.reward_kl > 0 or self.args.steps_per_rollout > 1:
                rows.run(self.model, policy)
            if self.live_reference is not None:
                self.live_reference.token_logps(self.model, rows)

    def _sample(self, count: int) -> None:
        """Reads the prompts of `count` completions, and draws their last token."""
        lm, question = causal_lm(self.model), self.question
        prompt, (new, *_) = question.units[0]
        distinct = -(-count // question.generations)
        ids = torch.ones(distinct, prompt, dtype=torch.int64)
        how: Any = {"use_cache": True, "logits_to_keep": 1}
        caches: list[Any] = [DynamicCache(), DynamicCache()]
        cache, full = caches
        lm(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **how)
        for k, layer in enumerate(cache.layers):
            shapes = [(count, x.shape[1], prompt + new - 1, x.shape[3]) for x in (layer.keys, layer.values)]
            full.update(*(layer.keys.new_empty(shape) for shape in shapes), k)
            layer.keys = layer.values = None
        mask = torch.ones(count, prompt + new, dtype=torch.int64)
        last: Any = lm(input_ids=mask[:, -1:], attention_mask=mask, past_key_values=full, **how)
        for layer in full.layers:
            for x in (layer.keys, layer.values):
                self.recorder.record(x, CACHE_OF_KEYS)
        with self.recorder.labelled("probabilities of the next token"):
            scores = last.logits[:, -1].to(copy=True, dtype=torch.float32)
            probs = scores.double().softmax(dim=-1)
            sums = probs.cumsum(dim=-1)
            del sums, probs, scores

    def batch(self, *, evaluation: bool = False) -> dict[str, Any]:
        """Returns a micro-batch of completions, or one whose log-probs are measured, groups side by side."""
        question = self.question
        prompt, (new, *_) = question.units[0]
        count = question.eval_batch_size if evaluation else question.batch_size
        rows = [([_FIRST + k // question.generations] * prompt, [k % _FIRST] * new) for k in range(count)]
        batch: dict[str, Any] = LaysOut(lambda of: pad_rows(of, 0), self.layout)(rows)
        sizes = {"U": count, "T": batch["targets"].shape[1]}
        reads = {n: m for m in self.objective.methods for n in m.columns}
        for name, method in reads.items():
            batch[name] = placeholder(name, method.axes(name)[0], sizes)
        if self.reference != "none" and self.objective.reads_reference:
            batch["ref_token_logp"] = placeholder("ref_token_logp", "UT", sizes)
        if self.critic is not None:
            batch |= {name: placeholder(name, "UT", sizes) for name in ("old_value", "returns")}
        return batch

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Returns the trainer's loss."""
        one = torch.ones(())
        with self.autocast():
            given: Any = {"objective": self.objective, "critic": self.critic, "args": self.args}
            return batch_loss(self.model, batch, {"policy": one, "tokens": one}, **given)["loss"]

    def evaluate(self) -> None:
        """Does nothing: an evaluation is a rollout."""


def unit_rows(
    kind: Kind, question: Question, units: Sequence[tuple[int, tuple[int, ...]]], *, mismatched: bool = False
) -> list[dict[str, Any]]:
    """Returns encoded rows of these lengths, with all numbers of the kind. mismatched: with KTO's mismatched rows."""
    rows = []
    for unit, (prompt, completions) in enumerate(units):
        row: dict[str, Any] = {"prompt_ids": [_FIRST + unit] * prompt}  # a prompt of its own
        texts = [[k % _FIRST] * n for k, n in enumerate(completions)]
        if kind.listed:
            row |= {"completions_ids": texts, "scores": [float(-k) for k in range(len(texts))]}
        else:
            row |= {f"{name}_ids": ids for name, ids in zip(kind.completions, texts, strict=False)}
        if kind.name == "unpaired":
            row |= {"label": True, "reward": 0.0, "value": 0.0}
        elif kind.name == "pair" and question.command == "train":  # a reward model takes margin or prob, or neither
            row |= {"score_chosen": 1.0, "score_rejected": 0.0, "prob": 0.5, "margin": 0.0}
        if mismatched:
            row["kl_completion_ids"] = texts[0]
        if question.command == "reward" and question.method == "regression":
            row["ratings"] = [0.0] * len(question.objectives)
        rows.append(row)
    return rows


def _bare(kind: type, run: Preferences | Rewards, **fields: Any) -> Any:
    """Returns a trainer of which nothing but the loss is used, with the fields that it reads."""
    trainer = object.__new__(kind)
    accelerator = SimpleNamespace(autocast=run.autocast, unwrap_model=lambda model: model)
    vars(trainer).update(kind=run.kind, args=SimpleNamespace(backend="auto"), accelerator=accelerator, **fields)
    return trainer
