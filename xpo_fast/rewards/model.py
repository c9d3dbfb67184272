"""Reward models: a causal LM with a value head, read at the last token; or a policy, by its implicit reward.

    prompts, completions ── encode ──▶ token ids ── model, value head ──▶ outputs (R, K) ── combine ──▶ rewards (R,)

The method that trains the model determines what the outputs are (`spec.USES`). The folder of a reward model contains a
causal LM or an adapter, value_head.safetensors, reward_model.json and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..layouts import Inputs, install_layouts, laid_out, lay_out
from ..models import embeddings, hub_arguments, install_fused_loss, load_model, load_weights, saving_embeddings
from ..models.lm_head import causal_lm
from ..models.value_head import VALUE_HEAD_FILE, load_value_head, save_value_head, value_head
from ..rollout import Prompt
from ..trainer.reference import row_logps
from .encoding import both_orders, check_features, encode_rows, in_batches, separators
from .layout import ScorerLayout, off_by, off_of, tokens
from .spec import SPEC_FILE, RewardSpec, load_spec, save_spec


class RewardModel:
    """Scorer of completions: a causal LM with a value head, or a sequence classifier of transformers.

    A classifier's reward is what its own forward gives for the row alone, without padding: it reads the last token, or
    what its class reads. One whose config has the EOS for its pad token reads the token before it, as in its training.
    A class that does not bear padding is run row by row.

    layout: how rows are read, see `ScorerLayout`: by default a prompt once for all of its completions in a batch, which
    is proved on the first rows. In any layout a reward is that of the row alone.

    Called as a function it has the signature of TRL's reward functions: f(prompts=, completions=, **columns) → list of
    floats. Prompts and completions are text or messages; a text that answers a prompt of messages is the assistant's.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        spec: RewardSpec | None = None,
        *,
        batch_size: int = 16,
        layout: str = "auto",
    ) -> None:
        self.model, self.tokenizer, self.spec = model, tokenizer, spec or RewardSpec()
        self.batch_size = batch_size
        self.__name__ = "reward_model"  # the name in a trainer's log
        self.head = value_head(model)
        labels = _labels(model)
        if self.head is None and labels is None:
            raise ValueError(f"{type(model).__name__} has no value head: attach_value_head(model) first")
        self._padded: bool | None = None  # whether a classifier takes padded batches; None: not yet asked
        if self.head is None and labels != 1:
            raise ValueError(f"{type(model).__name__} has {labels} labels; expected one output, the reward")
        if self.head is not None:
            if self.head.outputs != self.spec.outputs:
                raise ValueError(
                    f"{self.spec.method} with the objectives {', '.join(self.spec.objectives)} has {self.spec.outputs} "
                    f"outputs; the value head has {self.head.outputs}"
                )
            install_fused_loss(model)
        self._layout = ScorerLayout(layout, model, self._off)

    @property
    def scale(self) -> float:
        """The factor on differences of rewards that gives logits, see `RewardSpec.scale`."""
        return self.spec.scale

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the reward of each completion, (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        lengths = torch.tensor([float(sum(row["chosen_mask"])) for row in features])  # as in training
        return self.spec.combine(self._run(features), lengths)

    def outputs(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the value head's outputs for each completion, (R, K) float32 on the CPU."""
        return self._run(encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions}))

    def states(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the hidden state that each completion's reward is read from, (R, D) float32 on the CPU.

        Raises ValueError for a preference model, which reads two completions, and for a classifier.
        """
        if self.head is None or self.spec.form == "preference":
            what = "a classifier of transformers" if self.head is None else self.spec.method
            raise ValueError(f"{what} has no hidden state of one completion: expected a model with a value head")
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        width = self.head.weight.shape[1]
        if not features:
            return torch.zeros(0, width)
        check_features(self.model, self.tokenizer, features)

        def read(batch: Mapping[str, Any]) -> Tensor:
            rows = Inputs.of(batch)
            find = lambda hidden, _: {"states": self.spec.states(hidden, *rows[1:3])[:, 0, :width]}  # noqa: E731
            return rows.run(self.model, find)["states"]

        how: Any = {"layout": self._layout.settle(features, self.tokenizer), "wanted": self._wanted}
        return in_batches(features, self.model, self.tokenizer, self.batch_size, read, **how)

    def compare(self, prompts: Sequence[Prompt], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """Returns P(first beats second), (R,): σ of the difference of rewards, whitening undone.

        A preference model is asked in both orders: σ((z(a, b) − z(b, a))/2), so that P(a ≻ b) + P(b ≻ a) = 1.
        """
        if self.spec.form != "preference":
            return torch.sigmoid(self.scale * (self.score(prompts, first) - self.score(prompts, second)))
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
        check_features(self.model, self.tokenizer, features)
        if self.head is None and self._padded is None and len({*map(tokens, features)}) > 1:
            self._padded = self._takes_padding(features)
        layout = "padded" if self._padded is False else self._layout.settle(features, self.tokenizer)
        return self._outputs(features, layout)

    def _outputs(self, features: list[Any], layout: str = "padded", batch_size: int | None = None) -> Tensor:
        size = batch_size or self.batch_size
        how: Any = {"layout": layout, "wanted": self._wanted}
        return in_batches(features, self.model, self.tokenizer, size, self._forward, **how)

    def _wanted(self, batch: Mapping[str, Tensor], of: str) -> Tensor:
        """Returns the positions (R, T) whose hidden states are read; a classifier finds its own among all."""
        mask, targets = batch[of + "attention_mask"], batch[of + "targets"]
        return mask.bool() if self.head is None else self.spec.wanted(mask, targets)

    def _off(self, rows: Inputs, share: bool) -> str | None:
        """Returns how far what is read of rows in a layout is from that of each row alone; None for rounding."""
        wanted = self._wanted(rows._asdict(), "")
        if self.head is not None:
            reads = lambda hidden, rows: self.spec.states(hidden, *rows[1:3])  # noqa: E731
            return off_of(self.model, rows, share, wanted=wanted, reads=reads)
        each = [rows.each(lambda x, r=r: x[r : r + 1, wanted[r]]) for r in range(len(wanted))]
        layout = lay_out(rows.input_ids, rows.attention_mask, wanted, share=share, least=1).to(wanted.device)
        alone, together = torch.cat([*map(self._classify, each)]), self._classify(rows._replace(layout=layout))
        return off_by(alone, together, causal_lm(self.model).dtype)

    def _forward(self, batch: Mapping[str, Any]) -> Tensor:
        rows, head = Inputs.of(batch), self.head
        if head is None:
            return self._classify(rows)

        def read(hidden: Tensor, _: Any) -> dict[str, Tensor]:
            return {"outputs": self.spec.read(head, hidden, rows.attention_mask, rows.targets)}

        return rows.run(self.model, read)["outputs"]

    def _classify(self, rows: Inputs) -> Tensor:
        """Returns the logits (R, K) of a classifier, as its own forward has them of each row without padding."""
        ids, mask = rows.input_ids, rows.attention_mask
        if rows.layout is not None:
            install_layouts(self.model)
        elif not self._padded:
            alone = [ids[r : r + 1, : int(mask[r].sum())] for r in range(len(ids))]
            return torch.cat([self.model(input_ids=x, attention_mask=torch.ones_like(x)).logits for x in alone])
        # The last token is found by its id: the rightmost that is not the config's pad token. Padding must be that
        # token; where the config has none that rows can be padded with, any id will do that no row ends with.
        config: Any = causal_lm(self.model).config.get_text_config()
        stated = getattr(config, "pad_token_id", None)
        try:
            if stated is None or not 0 <= stated < embeddings(self.model):
                last = set(ids[torch.arange(len(ids)), mask.sum(dim=1) - 1].tolist())
                config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
            with laid_out(rows.layout):
                return self.model(input_ids=ids.masked_fill(mask == 0, config.pad_token_id), attention_mask=mask).logits
        finally:
            config.pad_token_id = stated

    def _takes_padding(self, features: list[dict[str, Any]]) -> bool:
        """Tells whether a classifier has the same logits for the shortest row alone and beside the longest one.

        It has not if it reads a row's end where padding stands; an encoder-decoder's reading of EOS is not asked.
        """
        if getattr(causal_lm(self.model).config, "is_encoder_decoder", False):
            return False
        shortest, *_, longest = sorted(features, key=tokens)
        self._padded = True
        alone, beside = (self._outputs(rows, batch_size=len(rows))[:1] for rows in ([shortest], [shortest, longest]))
        return off_by(alone, beside, causal_lm(self.model).dtype) is None

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `load` reads. A model with a PEFT adapter is saved as the adapter."""
        model: Any = self.model
        with saving_embeddings(model):
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
        layout: str = "auto",
        **options: Any,
    ) -> RewardModel:
        """Loads a folder of `save` or of `xpo-fast reward`, or a sequence classifier of transformers by folder or name.

        An adapter is not merged: weights of 16 bits would round it, and the scores would differ from training's.
        dtype, device: as for `load_model`; the model is on the CPU. layout: as for `RewardModel`. options: passed to
        `from_pretrained`. Raises ValueError if the source is neither.
        """
        folder = Path(source)
        if (folder / SPEC_FILE).is_file():
            model, tokenizer = load_model(str(folder), dtype=dtype, device=device, merge=False, **options)
            load_value_head(model, folder)
            return cls(model, tokenizer, load_spec(folder), batch_size=batch_size, layout=layout)
        if (folder / VALUE_HEAD_FILE).is_file():
            raise ValueError(f"{folder} has {VALUE_HEAD_FILE} and lacks {SPEC_FILE}: train or save it again")
        return cls(*_classifier(str(source), dtype, device, options), batch_size=batch_size, layout=layout)


class ImplicitReward:
    """Scorer by a policy's implicit reward β(log π − log ref), DPO's; β log π without a reference.

    per_token: divides the log-probs by the tokens of the completion, as SimPO does. max_length, max_prompt_length: see
    `RewardSpec`. layout, `score` and the call are as in `RewardModel`; each of the two models has its own proof.
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
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        layout: str = "auto",
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.models = [policy] if reference is None else [policy, reference]
        for model in self.models:
            install_fused_loss(model)
        self._layouts = [ScorerLayout(layout, model, partial(off_of, model)) for model in self.models]
        self.tokenizer, self.beta, self.per_token, self.batch_size = tokenizer, beta, per_token, batch_size
        kwargs = data.read_kwargs(chat_template_kwargs, "ImplicitReward")
        self.spec = RewardSpec(max_length=max_length, max_prompt_length=max_prompt_length, chat_template_kwargs=kwargs)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the implicit reward of each completion, (R,) float32 on the CPU."""
        features = encode_rows(self.tokenizer, self.spec, prompts, {"chosen": completions})
        if not features:
            return torch.zeros(0)
        read = zip(self.models, self._layouts, strict=True)
        rows = [self._logps(model, features, layout) for model, layout in read]  # (R, 2) each
        logp, length = rows[0].unbind(dim=1)
        difference = logp if len(rows) == 1 else logp - rows[1][:, 0]
        return self.beta * (difference / length if self.per_token else difference)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the rewards as a reward function does."""
        return self.score(prompts, completions).tolist()

    def _logps(self, model: nn.Module, features: list[dict[str, Any]], layout: ScorerLayout) -> Tensor:
        """Returns the summed log-prob and the number of tokens of each completion, (R, 2)."""
        check_features(model, self.tokenizer, features)
        return in_batches(
            features,
            model,
            self.tokenizer,
            self.batch_size,
            lambda batch: row_logps(model, *Inputs.of(batch)),
            layout=layout.settle(features, self.tokenizer),
        )


def _labels(model: Any) -> int | None:
    """Returns the number of a sequence classifier's outputs; None for another model."""
    lm = causal_lm(model)
    known = hasattr(lm, "num_labels") or type(lm).__name__.endswith("ForSequenceClassification")
    return lm.config.num_labels if known else None


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
    if _labels(model) != 1:  # which the constructor refuses too; here the source has a name
        raise ValueError(f"{source!r} has {_labels(model)} labels; expected a reward model with one output")
    return model, AutoTokenizer.from_pretrained(source, **hub_arguments(options))
