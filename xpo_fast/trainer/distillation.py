"""DistillationTrainer: a student learns of one or more teachers, on completions of a data set or of its own.

The teacher stands where the reference stands, so this is preference training on completions with another model as the
reference. On-policy, the completions of a step are sampled from the student before the step is taken. Which steps
these are, and what is sampled, follows from the seed and the step's number, so that a resumed run goes on with the same
samples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layouts import Inputs
from ..models import install_fused_loss, load_model, positions
from ..models.lm_head import causal_lm
from ..rollout.generate import GenerateRollout
from ..rollout.sampling import Request, Sampling
from ..seeds import seed_for
from ..types import IGNORE_INDEX
from .budget import KeepsUnits, Units
from .checks import check_rows
from .config import XPOConfig, argument
from .handed_over import WEIGHTS, HandedOver, sample_of
from .preference import XPOTrainer
from .reference import LiveReference
from .setup import with_tokenizer
from .sharding import check_reference, shard_copy
from .teachers import check_heads, check_tokenizers, parse_teachers
from .whole import whole

_EVALUATION = "evaluation"  # in place of a step's number, for the seed of its samples


@dataclass
class DistillationConfig(XPOConfig):
    """`XPOConfig` for a student: which share of its steps are on completions of its own, and how it samples them."""

    splits_rows: ClassVar[bool] = False

    method: str = argument("gkd", "A method that learns of a teacher: gkd, forward_kl, …, or a sum: gkd + 0.5*sft.")
    on_policy: float = argument(
        0.0,
        "Share of the steps, drawn by the seed, whose completions the student samples for the rows' prompts in place "
        "of the data's: λ of GKD.",
    )
    max_new_tokens: int = argument(256, "Longest sampled completion in tokens.")
    temperature: float = argument(1.0, "Temperature of sampling.")
    top_p: float = argument(1.0, "Nucleus sampling: the smallest set of tokens with this probability.")
    top_k: int | None = argument(None, "Sample from the k most likely tokens.")
    stop: tuple[str, ...] = argument((), "Texts that end a sampled completion; the tokens that spell them are kept.")
    generation_batch_size: int = argument(64, "Completions per batch of sampling.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy is a share of the steps, from 0 to 1, got {self.on_policy!r}")
        self.stop = self.sampling().stop  # which checks the settings, and makes a tuple of a list

    def sampling(self) -> Sampling:
        """Returns how the student samples."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.stop)


class Teacher(LiveReference):
    """A frozen model, of any width, whose head has at least the student's tokens; those beyond are left out."""

    def __init__(self, model: nn.Module, student: nn.Module, weight: float, accelerator: Any, backend: str) -> None:
        self.accelerator, self.backend, self.weight = accelerator, backend, weight
        self.vocab, self.scale = check_heads(model, student)
        ours, theirs = causal_lm(student), causal_lm(model)
        self.alike = type(ours) is type(theirs) and _attention(ours) == _attention(theirs)
        model = model.requires_grad_(False).eval()
        install_fused_loss(model)
        self.identity = {WEIGHTS: sample_of(model.named_parameters())}
        self.copy, self._kept = shard_copy(model, accelerator), None

    def rows(self, rows: Inputs) -> Inputs:
        """Returns the rows as the teacher reads them: padded, unless it is of the student's architecture."""
        return rows if self.alike else Inputs(*rows[:3])

    def hidden_states(self, model: nn.Module, rows: Inputs) -> dict[str, Any]:
        """Computes ref_hidden, ref_weight and ref_bias, of the student's tokens and with its scale of logits."""
        found = super().hidden_states(model, self.rows(rows))
        bias = found["ref_bias"]
        return {
            "ref_hidden": found["ref_hidden"] if self.scale == 1 else self.scale * found["ref_hidden"],
            "ref_weight": found["ref_weight"][: self.vocab],
            "ref_bias": None if bias is None else self.scale * bias[: self.vocab],
        }

    def token_logps(self, model: nn.Module, rows: Inputs) -> Tensor:
        """Computes the teacher's log-prob of each target, (R, T), over all of its own tokens."""
        return super().token_logps(model, self.rows(rows))


class DistillationTrainer(XPOTrainer):
    """Trainer of a student by what teachers say of each token.

        trainer = DistillationTrainer(student, teacher, DistillationConfig("out", method="gkd"), train_dataset=rows, …)

    model: the student, as for `XPOTrainer`; peft_config trains an adapter.
    teacher: a causal LM, a name for `load_model`, or a list of them, each alone or as (model, weight): the loss is the
        sum over teachers, by weights that are divided by their sum. Teachers are frozen, in place.
    args: a `DistillationConfig`, or an `XPOConfig` with a method that learns of a teacher.
    train_dataset: prompts and completions, messages, texts, or pairs, whose chosen completions are taken.
    teacher_processing_class: the tokenizer of teachers that are not loaded by name, or a list of one for each. It is
        compared with the student's: a token must have the same number in both.

    A teacher may have another width, depth and architecture. Its head may have more rows than the student's, as padded
    vocabularies do (152,064 beside 151,936): the rows that both have are compared, each distribution over these alone.
    Then the tokenizers must be there to be compared. A teacher with fewer rows, another tokenizer or another softcap
    of logits is refused with a ValueError before the first step.

    On-policy steps: with on_policy λ in [0, 1], each step is one with probability λ. The student then answers the
    prompts of its rows (what stands before the first scored token), and learns of the teacher on its answers.
    `sampled_kl` learns of nothing else (on_policy=1), and is evaluated on answers, too, always by the same seed.
    """

    args: Any
    taught = True
    splits_rows = False

    def __init__(
        self,
        model: nn.Module | str,
        teacher: Any,
        args: Any = None,
        *,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = DistillationConfig() if args is None else args
        model, tokenizer = with_tokenizer(model, kwargs.pop("processing_class", None))
        self._shares = parse_teachers(teacher)
        self._loaded = self._load(model, tokenizer, teacher_processing_class)
        super().__init__(model, args, processing_class=tokenizer, **kwargs)
        if self._by_token and self._share < 1:
            raise ValueError(
                f"sampled_kl is about completions that the student samples: set on_policy=1, got {self._share:g}; on "
                "the data's completions it is no divergence: use gkd or reverse_kl there"
            )
        if self._by_token and (args.temperature, args.top_p, args.top_k) != (1, 1, None):
            raise ValueError(
                "sampled_kl is an estimate by samples of the student's own distribution: leave temperature, top_p and "
                "top_k at 1, 1 and None"
            )
        self._rollout: GenerateRollout | None = None
        self._evaluated = 0  # batches of an evaluation

    def _load(self, model: nn.Module, tokenizer: Any, tokenizers: Any) -> list[nn.Module]:
        """Returns the teachers, those loaded that came by name, and checks what can be before the trainer is made."""
        count, found = len(self._shares), []
        theirs = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * count
        if len(theirs) != count:
            raise ValueError(f"expected a tokenizer for each of {count} teachers, got {len(theirs)}")
        for (one, _), own in zip(self._shares, theirs, strict=True):
            if isinstance(one, str):
                one, own = load_model(one)
            if one is model:
                raise ValueError("the teacher is the student itself, which says nothing new: pass another model")
            check_tokenizers(one, own, model, tokenizer)
            check_heads(one, model)
            found.append(one)
        return found

    def _encode(self, dataset: Any) -> Any:
        found = super()._encode(dataset)
        if found is not None:
            for teacher in self._loaded:
                check_rows(teacher, self._tokenizer, found)
        return found

    def _choose_reference(self, args: XPOConfig, model: nn.Module) -> tuple[str, str]:
        if args.reference != "auto":
            raise ValueError(f"the teacher is the reference: leave reference out, got {args.reference!r}")
        named = [getattr(m, "name_or_path", "") or type(m).__name__ for m in self._loaded]
        shares = [f"{weight:.3g}*" * (weight < 1) for _, weight in self._shares]
        return "teacher", " + ".join(map("".join, zip(shares, named, strict=True)))

    def _make_reference(self, handed_over: HandedOver) -> None:
        how = self.accelerator, self.args.backend
        given = zip(self._loaded, self._shares, strict=True)
        self.teachers = [Teacher(model, self._unwrapped, weight, *how) for model, (_, weight) in given]
        self._live, self._differs = self.teachers[0], "the reference is a teacher"

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings that a resumed run must share with this one: those of `XPOTrainer`, teachers, sampling."""
        teachers = [f"{t.weight:g}*{t.identity[WEIGHTS]}" for t in self.teachers]
        found = {**super().made_with, "teachers": teachers, "on_policy": self._share}
        return found | ({"sampling": str(self.args.sampling())} if self._share else {})

    @property
    def _share(self) -> float:
        return getattr(self.args, "on_policy", 0.0)

    @property
    def _by_token(self) -> bool:
        return self.objective.layout == "policy"

    def _columns_of(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return (inputs["targets"], {}) if self._by_token else super()._columns_of(inputs)

    @property
    def _half(self) -> int | None:
        return None if self._by_token else super()._half

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        return self.objective.count_items(batch["targets"]) if self._by_token else super()._items(batch)

    def _check_parallelism(self) -> None:
        check_reference("copy", self.model, self.accelerator)

    def _references(
        self, model: nn.Module, rows: Inputs, inputs: dict[str, Tensor]
    ) -> list[tuple[float, dict[str, Any]]]:
        found = []
        for teacher in self.teachers:
            if self._by_token:
                found.append((teacher.weight, {"ref_token_logp": teacher.token_logps(model, rows)}))
            else:
                found.append((teacher.weight, teacher.hidden_states(model, rows)))
        return found

    # --- on-policy ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Returns the micro-batches of the next step, on-policy ones with the student's own completions."""
        step = self.state.global_step
        if self._share:
            own = random.Random(seed_for(self.args.seed, "on-policy", step)).random() < self._share
            epoch_iterator = self._answered(epoch_iterator, step) if own else epoch_iterator
            self._means.add({"on_policy": torch.tensor(float(own))}, {"on_policy": torch.tensor(1.0)})
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _answered(self, batches: Iterator[Any], step: int) -> Iterator[Any]:
        for k, batch in enumerate(batches):
            yield self._with_answers(batch, step, k, self.args.train_batch_size)

    def _with_answers(self, batch: Any, step: Any, k: int, size: int) -> Any:
        """Returns what a data loader has drawn, with completions that the student samples in place of the data's.

        k: number of the batch among those of the step on this process; size: rows of a full one. A row's place among
        those of all processes is what its draws follow from, which so do not depend on the number of processes.
        """
        first = (k * self.replicas + self.replica) * size
        units = isinstance(batch, Units)
        # Of a text without a prompt, the first token.
        drawn = [unit.row for unit in batch.drawn] if units else []
        prompts = [row["prompt_ids"] or row["chosen_ids"][:1] for row in drawn] if units else prompts_of(batch)
        policy: Any = self.accelerator.unwrap_model(self.model)
        if self._rollout is None:
            self._rollout = GenerateRollout(policy, self._tokenizer, batch_size=self.args.generation_batch_size)
        self._rollout.update(policy)
        limit, sampling = positions(causal_lm(policy)) or math.inf, self.args.sampling()
        asked = []
        for i, ids in enumerate(prompts):
            room = int(min(sampling.max_new_tokens, limit - len(ids)))
            if room < 1:
                raise ValueError(f"a prompt of {len(ids)} tokens leaves no room for an answer: set max_prompt_length")
            asked.append(Request("", list(ids), (first + i, 0), room))
        seed = seed_for(self.args.seed, "answers", step)
        with self._throughput.paused(), whole(policy):
            answers = self._rollout.complete(asked, sampling=sampling, seed=seed)
        rows = [{"prompt_ids": ask.ids, "chosen_ids": answer.ids} for ask, answer in zip(asked, answers, strict=True)]
        if units:
            keeps = KeepsUnits(self.data_collator)
            return Units([keeps.unit(row) for row in rows], batch.counted)
        return self._prepare_inputs(self.data_collator(rows))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as `XPOTrainer` does; the student's completions are those of the rows' places in the data."""
        self._evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss of an evaluation's batch; `sampled_kl` on the student's completions."""
        if self._by_token:
            inputs = self._with_answers(inputs, _EVALUATION, self._evaluated, self.args.eval_batch_size)
            self._evaluated += 1
        return super().prediction_step(model, inputs, *args, **kwargs)


def _attention(model: Any) -> Any:
    return getattr(model.config, "_attn_implementation", None)


def prompts_of(batch: dict[str, Tensor]) -> list[list[int]]:
    """Returns the token ids before the first scored one of each row of a batch; all of a row without any."""
    found = []
    for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True):
        scored = (targets != IGNORE_INDEX).nonzero()
        end = int(scored[0]) + 1 if len(scored) else int(mask.sum())
        found.append(ids[:end].tolist())
    return found
