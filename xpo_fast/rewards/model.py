"""Reward models: a causal LM with a value head, read at the last token; or a policy, by its implicit reward.

    prompts, completions ── encode ──▶ token ids ── model, value head ──▶ outputs (R, K) ── combine ──▶ rewards (R,)

The method that trains the model determines what the outputs are (`spec.USES`). The folder of a reward model contains a
causal LM or an adapter, value_head.safetensors, reward_model.json and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..models import hub_arguments, install_fused_loss, load_model, load_weights
from ..models.value_head import VALUE_HEAD_FILE, load_value_head, save_value_head, value_head
from ..rollout import Prompt
from ..trainer.reference import row_logps
from .encoding import both_orders, encode_rows, in_batches, separators
from .spec import SPEC_FILE, RewardSpec, load_spec, save_spec


class RewardModel:
    """Scorer of completions: a causal LM with a value head, or a sequence classifier of transformers.

    Called as a function it has the signature of TRL's reward functions: f(prompts=, completions=, **columns) → list of
    floats. Prompts and completions are text or messages; a text that answers a prompt of messages is the assistant's.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, spec: RewardSpec | None = None, *, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.spec = model, tokenizer, spec or RewardSpec()
        self.batch_size = batch_size
        self.__name__ = "reward_model"  # the name in a trainer's log
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

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the reward of each completion, (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        lengths = torch.tensor([float(sum(row["chosen_mask"])) for row in features])  # as in training
        return self.spec.combine(self._run(features), lengths)

    def outputs(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the value head's outputs for each completion, (R, K) float32 on the CPU."""
        return self._run(encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions}))

    def compare(self, prompts: Sequence[Prompt], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """Returns P(first beats second), (R,): σ of the difference of rewards.

        A preference model is asked in both orders: σ((z(a, b) − z(b, a))/2), so that P(a ≻ b) + P(b ≻ a) = 1.
        """
        if self.spec.form != "preference":
            return torch.sigmoid(self.score(prompts, first) - self.score(prompts, second))
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": first, "rejected": second})
        between, after = separators(self.tokenizer)
        pairs = [both_orders(row, between, after) for row in features]
        z = self._run([a for a, _ in pairs] + [b for _, b in pairs])[:, 0]
        forward, backward = z.chunk(2)
        return torch.sigmoid((forward - backward) / 2)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the rewards as a reward function does."""
        return self.score(prompts, completions).tolist()

    def _run(self, features: list[dict[str, Any]]) -> Tensor:
        """Returns the outputs (R, K) of encoded rows."""
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
        # transformers takes the last token that is not the pad token: any token that ends no row will do as one.
        last = set(ids[torch.arange(len(ids)), mask.sum(dim=1) - 1].tolist())
        pad = next(i for i in range(len(last) + 1) if i not in last)
        model.config.pad_token_id = pad
        try:
            return model(input_ids=ids.masked_fill(mask == 0, pad), attention_mask=mask).logits
        finally:
            model.config.pad_token_id = None

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `load` reads. A model with a PEFT adapter is saved as the adapter."""
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
        """Loads a folder of `save` or of `xpo-fast reward`, or a sequence classifier of transformers by folder or name.

        An adapter is not merged: weights of 16 bits would round it, and the scores would differ from training's.
        dtype, device: as for `load_model`; the model is on the CPU. options: passed to `from_pretrained`. Raises
        ValueError if the source is neither.
        """
        folder = Path(source)
        if (folder / SPEC_FILE).is_file():
            model, tokenizer = _unmerged(folder, dtype=dtype, device=device, **options)
            load_value_head(model, folder)
            return cls(model, tokenizer, load_spec(folder), batch_size=batch_size)
        if (folder / VALUE_HEAD_FILE).is_file():
            raise ValueError(f"{folder} has {VALUE_HEAD_FILE} and lacks {SPEC_FILE}: train or save it again")
        return cls(*_classifier(str(source), dtype, device, options), batch_size=batch_size)


class ImplicitReward:
    """Scorer by a policy's implicit reward β(log π − log ref), DPO's; β log π without a reference.

    per_token: divides the log-probs by the tokens of the completion, as SimPO does. `score` and the call are as in
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 16,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.models = [policy] if reference is None else [policy, reference]
        for model in self.models:
            install_fused_loss(model)
        self.tokenizer, self.beta, self.per_token, self.batch_size = tokenizer, beta, per_token, batch_size
        kwargs = data.read_kwargs(chat_template_kwargs, "ImplicitReward")
        self.spec = RewardSpec(max_length=max_length, max_prompt_length=max_prompt_length, chat_template_kwargs=kwargs)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the implicit reward of each completion, (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        if not features:
            return torch.zeros(0)
        rows = [self._logps(model, features) for model in self.models]  # (R, 2) each
        logp, length = rows[0].unbind(dim=1)
        difference = logp if len(rows) == 1 else logp - rows[1][:, 0]
        return self.beta * (difference / length if self.per_token else difference)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the rewards as a reward function does."""
        return self.score(prompts, completions).tolist()

    def _logps(self, model: nn.Module, features: list[dict[str, Any]]) -> Tensor:
        """Returns the summed log-prob and the number of tokens of each completion, (R, 2)."""

        def run(batch: Mapping[str, Tensor]) -> Tensor:
            return row_logps(model, batch["input_ids"], batch["attention_mask"], batch["targets"])

        return in_batches(features, model, self.tokenizer, self.batch_size, run)


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
    """Returns `load_model`'s model and tokenizer, but with an adapter left on its base model."""
    if not (folder / "adapter_config.json").is_file():
        return load_model(str(folder), **options)
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    base, tokenizer = load_model(str(name), **options)
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return PeftModel.from_pretrained(base, str(folder)), tokenizer
