"""A reward model: a causal LM with a value head, read at the last token of prompt and completion.

    prompts, completions ── encode ──▶ token ids ── model, value head ──▶ outputs (R, K) ── combine ──▶ rewards (R,)

What the outputs are follows from the method that trains them (`USES`). The folder of a reward model holds a causal LM or
an adapter, value_head.safetensors, reward_model.json and the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..files import write_atomically, write_json
from ..methods.reward import ensemble, length_normalised, length_penalty
from ..models import check_ids, hub_arguments, install_fused_loss, load_model, load_weights
from ..models.fused_loss import causal_lm
from ..models.value_head import (
    VALUE_HEAD_FILE,
    ValueHead,
    attach_value_head,
    load_value_head,
    save_value_head,
    value_head,
)
from ..trainer.reference import evaluating, row_logps

SPEC_FILE = "reward_model.json"

# For each method that trains a reward model, the kind of data that it learns from (`data.KINDS`) and what the
# value head's outputs are: one reward; one an objective; those and a gate's logits; a head for quality and one for length;
# the logit of one completion beating another.
USES = {
    "bradley_terry": ("pair", "reward"),
    "k_wise": ("list", "reward"),
    "discriminator": ("unpaired", "reward"),
    "regression": ("unpaired", "objectives"),
    "gated": ("pair", "gated"),
    "odin": ("pair", "odin"),
    "preference_model": ("pair", "preference"),
    "grm": ("pair", "reward"),
    "haf": ("pair", "reward"),
}
# A preference model reads: prompt, first completion, _BETWEEN, second completion, _AFTER.
_BETWEEN, _AFTER = "\n\nSecond answer:\n", "\n\nThe better answer:"

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class RewardSpec:
    """What is kept of a reward model beside its weights."""

    method: str = "bradley_terry"  # one of USES
    objectives: tuple[str, ...] = ("reward",)  # the K rewards of "regression" and "gated"
    weights: tuple[float, ...] | None = None  # of the objectives in the reward; None: their mean
    max_length: int = 1024
    max_prompt_length: int | None = None
    length_alpha: float | None = None  # reward / (α + tokens), `length_normalised`
    length_target: float = 0.0  # reward − λ·|tokens − target|, `length_penalty`
    length_lam: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in USES:
            raise ValueError(f"no reward model is trained by {self.method!r}; expected one of {', '.join(USES)}")
        least = 2 if self.form == "gated" else 1
        if len(self.objectives) < least:
            raise ValueError(
                f"{self.method} has objectives, {least} or more; got {', '.join(self.objectives) or 'none'}: name them"
            )
        if self.weights is not None and len(self.weights) != len(self.objectives):
            raise ValueError(
                f"expected a weight for each of {len(self.objectives)} objectives, got {len(self.weights)}"
            )

    @property
    def kind(self) -> str:
        """Of the data to train on."""
        return USES[self.method][0]

    @property
    def form(self) -> str:
        return USES[self.method][1]

    @property
    def outputs(self) -> int:
        """Of the value head."""
        count = len(self.objectives)
        return {"objectives": count, "gated": 2 * count, "odin": 2}.get(self.form, 1)

    @property
    def is_logit(self) -> bool:
        """Whether σ of a difference of rewards is the probability that the method fits: not of ratings, nor under a length rule."""
        return self.form != "objectives" and self.length_alpha is None and not self.length_lam

    def read(
        self,
        head: ValueHead,
        hidden: Tensor,  # (R, T, D)
        attention_mask: Tensor,  # (R, T), padding on the right
        targets: Tensor,  # (R, T) aligned; where the completion begins
    ) -> Tensor:
        """The outputs (R, K) at the last token; the gate's at the last token of the prompt, which is all it sees."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        found = head(hidden[rows, attention_mask.sum(dim=1) - 1])
        if self.form == "gated":
            count = len(self.objectives)
            gate = head(hidden[rows, (targets != data.IGNORE_INDEX).int().argmax(dim=1)])[:, count:]
            found = torch.cat([found[:, :count], gate], dim=1)
        return found

    def combine(
        self,
        outputs: Tensor,  # (R, K)
        lengths: Tensor,  # (R,) tokens of the completions
    ) -> Tensor:
        """Rewards (R,) of the outputs, the length rule applied. ValueError for a preference model, which has none."""
        if self.form == "preference":
            raise ValueError("a preference model compares two completions and has no reward of one: use compare()")
        if self.form == "gated":
            rewards, gate = outputs.chunk(2, dim=1)
            reward = (gate.softmax(dim=1) * rewards).sum(dim=1)
        elif self.form == "objectives":
            weights = self.weights or [1 / len(self.objectives)] * len(self.objectives)
            reward = outputs @ outputs.new_tensor(weights)
        else:
            reward = outputs[:, 0]
        if self.length_alpha is not None:
            reward = length_normalised(reward, lengths, self.length_alpha)
        if self.length_lam:
            reward = reward - length_penalty(lengths, self.length_target, self.length_lam)
        return reward


class RewardModel:
    """Rewards of completions, by a causal LM with a value head or by a sequence classifier of transformers.

    As a function it has the signature of TRL's reward functions: f(prompts=, completions=, **columns) → list of floats.
    Prompts and completions are text, or messages; a text answers a prompt of messages as the assistant.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, spec: RewardSpec | None = None, *, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.spec = model, tokenizer, spec or RewardSpec()
        self.batch_size = batch_size
        self.__name__ = "reward_model"  # what a trainer logs it under
        self.head = value_head(model)
        if self.head is None and not hasattr(model, "num_labels"):
            raise ValueError(f"{type(model).__name__} has no value head: attach_value_head(model) first")
        if self.head is not None:
            if self.head.outputs != self.spec.outputs:
                raise ValueError(
                    f"{self.spec.method} with the objectives {', '.join(self.spec.objectives)} has {self.spec.outputs} "
                    f"outputs; the value head has {self.head.outputs}"
                )
            install_fused_loss(model)

    # --- scoring --------------------------------------------------------------------------------------------------

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """The reward of each completion: (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        lengths = torch.tensor([float(len(row["chosen_ids"])) for row in features])
        return self.spec.combine(self._run(features), lengths)

    def outputs(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """What the value head says of each completion, objective by objective: (R, K) float32 on the CPU."""
        return self._run(encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions}))

    def compare(self, prompts: Sequence[Prompt], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """P(first beats second), (R,): the logistic of the difference of rewards.

        A preference model is asked in both orders, σ((z(a, b) − z(b, a))/2), so that P(a ≻ b) + P(b ≻ a) = 1.
        """
        if self.spec.form != "preference":
            return torch.sigmoid(self.score(prompts, first) - self.score(prompts, second))
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": first, "rejected": second})
        between, after = separators(self.tokenizer)
        pairs = [joined(row, between, after) for row in features]
        z = self._run([a for a, _ in pairs] + [b for _, b in pairs])[:, 0]
        forward, backward = z.chunk(2)
        return torch.sigmoid((forward - backward) / 2)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        return self.score(prompts, completions).tolist()

    def _run(self, features: list[dict[str, Any]]) -> Tensor:
        """The outputs (R, K) of encoded rows."""
        if not features:
            return torch.zeros(0, self.spec.outputs)
        return in_batches(features, self.model, self.tokenizer, self.batch_size, self._forward)

    def _forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids, mask, targets = batch["input_ids"], batch["attention_mask"], batch["targets"]
        head = self.head
        if head is None:
            return self._classify(ids, mask)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            fused_loss=lambda hidden, _: {"outputs": self.spec.read(head, hidden, mask, targets)},
        )["outputs"]

    def _classify(self, ids: Tensor, mask: Tensor) -> Tensor:
        model: Any = self.model
        if model.config.pad_token_id is not None:
            return model(input_ids=ids, attention_mask=mask).logits
        # transformers finds a row's last token as the last that is not the pad token: one that ends no row will do.
        last = set(ids[torch.arange(len(ids)), mask.sum(dim=1) - 1].tolist())
        pad = next(i for i in range(len(last) + 1) if i not in last)
        model.config.pad_token_id = pad
        try:
            return model(input_ids=ids.masked_fill(mask == 0, pad), attention_mask=mask).logits
        finally:
            model.config.pad_token_id = None

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads. A model that carries a PEFT adapter is saved as the adapter."""
        model: Any = self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.head is not None:
            save_value_head(model, folder)
            save_spec(self.spec, folder)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> RewardModel:
        """Load a folder of `save` or of `xpo-fast reward`; or a sequence classifier of transformers, by folder or name.

        An adapter stays one: merged into weights of 16 bits it would be rounded, and the scores not those of training.
        dtype, device: as of `load_model`; the model is on the CPU. options: for `from_pretrained`.
        """
        folder = Path(source)
        if (folder / SPEC_FILE).is_file():
            model, tokenizer = _unmerged(folder, dtype=dtype, device=device, **options)
            load_value_head(model, folder)
            return cls(model, tokenizer, load_spec(folder), batch_size=batch_size)
        if (folder / VALUE_HEAD_FILE).is_file():
            raise ValueError(f"{folder} has {VALUE_HEAD_FILE} and lacks {SPEC_FILE}: train or save it again")
        return cls(*_classifier(str(source), dtype, device, options), batch_size=batch_size)


@dataclass
class RewardEnsemble:
    """Several reward models as one, see `methods.reward.ensemble`: how is "mean", "worst" or "uncertainty".

    A reward learned from comparisons has a zero and, to a degree, a scale of its own. So "worst" would mean whichever model
    has the lowest zero, and "uncertainty" how far the zeros lie apart, unless the members are brought to one: `standardise`.
    """

    models: Sequence[RewardModel]
    how: str = "mean"
    coef: float = 1.0
    __name__ = "reward_ensemble"
    is_logit = False
    moments: Tensor | None = None  # (2, E): what is subtracted from each member's rewards, and what they are divided by

    def standardise(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> None:
        """From now on, each member's rewards of these completions have mean 0 and standard deviation 1."""
        rewards = torch.stack([model.score(prompts, completions) for model in self.models], dim=-1)
        if len(rewards) < 2 or not (rewards.std(0) > 0).all():
            raise ValueError(
                f"expected completions to which every member gives different rewards, got {len(rewards)} of standard deviation "
                f"{rewards.std(0, correction=0).tolist()}"
            )
        self.moments = torch.stack([rewards.mean(0), rewards.std(0)])

    def save_moments(self, path: str | Path, names: Sequence[str]) -> None:
        """Write the members' moments with their names and how they are put together, for `load_moments`."""
        assert self.moments is not None
        mean, std = self.moments.tolist()
        write_json(Path(path), {**self._about(names), "mean": mean, "std": std})

    def load_moments(self, path: str | Path, names: Sequence[str]) -> None:
        """Take the moments that were saved of the same ensemble. ValueError where there are none."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"no {path.name} in {path.parent}: expected the moments of the ensemble that the run began with"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        for what, value in self._about(names).items():
            if found[what] != value:
                raise ValueError(f"{path}: {what} was {found[what]!r} and is {value!r}: go on with the same")
        self.moments = torch.tensor([found["mean"], found["std"]])

    def _about(self, names: Sequence[str]) -> dict[str, Any]:
        return {"members": list(names), "how": self.how, "coef": self.coef}

    @property
    def tokenizer(self) -> Any:
        return self.models[0].tokenizer

    @property
    def spec(self) -> RewardSpec:
        return self.models[0].spec

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        rewards = torch.stack([model.score(prompts, completions) for model in self.models], dim=-1)
        if self.moments is not None:
            rewards = (rewards - self.moments[0]) / self.moments[1]
        return ensemble(rewards, self.how, self.coef)

    def compare(self, prompts: Sequence[Prompt], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """σ of the difference of the ensemble's rewards."""
        return torch.sigmoid(self.score(prompts, first) - self.score(prompts, second))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        return self.score(prompts, completions).tolist()


class ImplicitReward:
    """A policy's implicit reward β(log π − log ref) of completions, DPO's; without a reference β log π.

    per_token: log-probs are divided by the tokens of the completion, as SimPO has them. `score` and the call are those of
    `RewardModel`.
    """

    __name__ = "implicit_reward"

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        tokenizer: Any,
        *,
        beta: float = 0.1,
        per_token: bool = False,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.models = [policy] if reference is None else [policy, reference]
        for model in self.models:
            install_fused_loss(model)
        self.tokenizer, self.beta, self.per_token, self.batch_size = tokenizer, beta, per_token, batch_size
        self.spec = RewardSpec(max_length=max_length, max_prompt_length=max_prompt_length)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """The implicit reward of each completion: (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        if not features:
            return torch.zeros(0)
        rows = [self._logps(model, features) for model in self.models]  # (R, 2) each
        logp, length = rows[0].unbind(dim=1)
        difference = logp if len(rows) == 1 else logp - rows[1][:, 0]
        return self.beta * (difference / length if self.per_token else difference)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        return self.score(prompts, completions).tolist()

    def _logps(self, model: nn.Module, features: list[dict[str, Any]]) -> Tensor:
        def run(batch: Mapping[str, Tensor]) -> Tensor:
            return row_logps(model, batch["input_ids"], batch["attention_mask"], batch["targets"])

        return in_batches(features, model, self.tokenizer, self.batch_size, run)


# --- encoded rows -------------------------------------------------------------------------------------------------


def encode_rows(
    tokenizer: Any, spec: RewardSpec, prompts: Sequence[Prompt], named: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Token ids as `data.encode` makes them: prompt_ids, chosen_ids and, where `named` has rejected, rejected_ids.

    named: completions under the names chosen, or chosen and rejected, one for each prompt.
    """
    if any(len(completions) != len(prompts) for completions in named.values()):
        raise ValueError(
            f"expected a completion for each of {len(prompts)} prompts, got "
            f"{', '.join(str(len(x)) for x in named.values())}"
        )
    if not len(prompts):
        return []
    columns = {
        "prompt": list(prompts),
        **{
            name: [_answer(p, c) for p, c in zip(prompts, completions, strict=True)]
            for name, completions in named.items()
        },
        "where": [f"row {i}" for i in range(len(prompts))],
    }
    kind = "pair" if len(named) > 1 else "chosen"
    opening = data.leading_ids(tokenizer, prompts[0])
    encoded = data.encode_rows(columns, tokenizer, kind, opening, spec.max_length, spec.max_prompt_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def in_batches(
    features: list[dict[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    batch_size: int,
    run: Callable[[Mapping[str, Tensor]], Tensor],
) -> Tensor:
    """run(batch) → (R, …) over batches of rows of like length, without gradient; float32 on the CPU, in the rows' order."""
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in features]
    order = sorted(range(len(features)), key=lengths.__getitem__)
    collate = data.Collator(_pad_id(tokenizer), "chosen")
    for i, row in enumerate(features):
        check_ids(model, tokenizer, [*row["prompt_ids"], *row["chosen_ids"]], f"row {i}")
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = collate([features[i] for i in order[start : start + batch_size]])
            found.append(run({k: v.to(device) for k, v in batch.items()}).float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


# --- files --------------------------------------------------------------------------------------------------------


def save_spec(spec: RewardSpec, folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(folder) / SPEC_FILE, (json.dumps(dataclasses.asdict(spec), indent=1) + "\n").encode())


def load_spec(folder: str | Path) -> RewardSpec:
    """ValueError for a file that says what this version does not know."""
    path = Path(folder) / SPEC_FILE
    found = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(set(found) - {field.name for field in dataclasses.fields(RewardSpec)})
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; it was written by another version of xpo_fast")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return RewardSpec(**values)


def extend_with_gate(model: nn.Module) -> ValueHead:
    """A value head of K rewards as one of K rewards, the same, and K logits of a gate that weighs them alike."""
    from ..models.value_head import detach_value_head

    present = value_head(model)
    assert present is not None
    count = present.outputs
    detach_value_head(model)
    made = attach_value_head(model, 2 * count)
    with torch.no_grad():
        made.weight[:count] = present.weight
        made.bias[:count] = present.bias
    return made


def width_of(model: nn.Module) -> int:
    """D, the width of what a causal LM's head reads."""
    weight: Any = causal_lm(model).get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[1]


def separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids between and behind the two completions that a preference model reads."""
    between, after = data.tokenize(tokenizer, [_BETWEEN, _AFTER])
    return between, after


def joined(
    row: Mapping[str, Any], between: list[int], after: list[int]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """An encoded pair as the two rows that a preference model reads: chosen before rejected, rejected before chosen."""
    w, l = row["chosen_ids"], row["rejected_ids"]  # noqa: E741
    orders = (w, l), (l, w)
    first, second = ({"prompt_ids": row["prompt_ids"], "chosen_ids": [*a, *between, *b, *after]} for a, b in orders)
    return first, second


def _classifier(
    source: str, dtype: str | torch.dtype, device: str | torch.device | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install 'xpo-fast[train]'") from error
    expected = f"a folder with {SPEC_FILE}, or a sequence classifier of transformers"
    try:
        kinds = AutoConfig.from_pretrained(source, **hub_arguments(options)).architectures or []
    except (OSError, ValueError) as error:
        raise ValueError(f"no reward model in {source!r}: expected {expected}") from error
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(f"no reward model in {source!r}: it holds {kinds}, expected {expected}")
    model = load_weights(AutoModelForSequenceClassification, source, dtype, device, options)
    if model.num_labels != 1:
        raise ValueError(f"{source!r} has {model.num_labels} labels; expected a reward model with one output")
    return model, AutoTokenizer.from_pretrained(source, **hub_arguments(options))


def _unmerged(folder: Path, **options: Any) -> tuple[Any, Any]:
    """`load_model`, but an adapter is left on its base model."""
    if not (folder / "adapter_config.json").is_file():
        return load_model(str(folder), **options)
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    base, tokenizer = load_model(str(name), **options)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return PeftModel.from_pretrained(base, str(folder)), tokenizer


def _answer(prompt: Prompt, completion: Any) -> Any:
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _pad_id(tokenizer: Any) -> int:
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found
    raise ValueError("the tokenizer has neither a pad token nor an EOS: set tokenizer.pad_token")
