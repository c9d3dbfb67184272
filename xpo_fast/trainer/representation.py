"""Representation alignment (RAHF): an adapter that moves hidden states as preferred answers move them.

    instruct   adapters learn what is preferred and what is not: one from two instructions (single), or two (dual)
    signal     A = h(preferred) − h(dispreferred) of the same completion, at some layers
    align      a new adapter is trained so that its h matches h(base) + α·A, by mean squares

The states are read by forward hooks on the decoder's layers; no logits are made.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import data
from ..data import KINDS
from ..layouts import Inputs
from ..models import Head, install_fused_loss, padding_id, refuse_router_loss
from ..models.lm_head import causal_lm
from ..models.modes import evaluating, without_adapter
from ..reduce import count_metrics, mean_metrics
from ..resume import last_checkpoint
from ..types import IGNORE_INDEX
from ..wording import did_you_mean
from .arguments import changed
from .base import UnitTrainer
from .checks import check_rows
from .config import XPOConfig, argument
from .context import at_places, context_lengths
from .handed_over import sample_of
from .preference import XPOTrainer
from .reference import rows_fingerprint
from .setup import map_splits, prepare_model, with_lengths, with_tokenizer

SIGNALS = ("single", "dual")
# What a single model is told before a prompt, for the answer that is preferred and for the other.
INSTRUCTIONS = (
    "Give an answer that people would prefer: helpful, honest and to the point.\n\n",
    "Give an answer that people would not prefer: unhelpful, careless or beside the point.\n\n",
)
_SIDES = ("better", "worse")
_UNREAD = ("method_args", "reference", "ref_cache_dir", "context", "tile_mib", "layout", "tokens_per_batch")


def hidden_loss(
    states: Sequence[Tensor],  # L of (R, T, D), of the model in training
    base: Sequence[Tensor],  # L of (R, T, D), of the base model
    signal: Sequence[Tensor],  # L of (R, T, D), A
    targets: Tensor,  # (R, T) aligned
    alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes each row's Σ_t mean_{l, d} (h − (h_base + α A))² over its scored positions, (R,), and metrics (R,).

    Returns as metrics the row's means over positions: mse, and signal, that of (α A)², which mse is where h = h_base.
    """
    scored = targets != IGNORE_INDEX
    tokens = scored.sum(dim=1).clamp(min=1)

    def total(each: Sequence[Tensor]) -> Tensor:
        mean = torch.stack([x.float().square().mean(dim=2) for x in each]).mean(dim=0)  # (R, T)
        return torch.where(scored, mean, 0.0).sum(dim=1)

    wanted = [alpha * a.float() for a in signal]
    off = [h.float() - b.float() - a for h, b, a in zip(states, base, wanted, strict=True)]
    loss = total(off)
    return loss, {"mse": loss.detach() / tokens, "signal": total(wanted) / tokens}


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Returns the layers of a causal LM's decoder. Raises ValueError for a model that has no list of them."""
    lm: Any = causal_lm(model)
    count = getattr(lm.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(
            f"{type(lm).__name__} has no list of {count} layers, whose outputs could be read: use another model"
        )
    return lists[0]


@contextlib.contextmanager
def captured(model: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Yields a list that has, after a forward, the outputs (R, T, D) of these layers, in their order."""
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []

    def hook(k: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found[k] = output[0] if isinstance(output, tuple) else output
            if len(found) == len(layers):
                states[:] = [found[i] for i in layers]

        return keep

    modules = layers_of(model)
    handles = [modules[k].register_forward_hook(hook(k)) for k in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class RepresentationConfig(XPOConfig):
    """`XPOConfig` for representation alignment; what is about losses of log-probs is refused."""

    splits_rows: ClassVar[bool] = False

    method: str = argument("rahf", "rahf; there is no other.")
    alpha: float = argument(1.0, "How many times the signal is added to the base model's states.")
    layers: list[int] | None = dataclasses.field(
        default=None,
        metadata={"help": "The decoder's layers whose outputs are matched, from 0. None: those of its middle third."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "rahf":
            near = did_you_mean(self.method, ["rahf"])
            raise ValueError(f"a representation is aligned by rahf, got {self.method!r}{near}")
        given = changed(self)
        if idle := [name for name in _UNREAD if name in given]:
            raise ValueError(f"rahf reads no {', '.join(idle)}: leave {'it' if len(idle) == 1 else 'them'} out")
        if not self.alpha > 0:
            raise ValueError(f"expected alpha > 0, which moves states towards what is preferred, got {self.alpha!r}")

    def layers_in(self, model: nn.Module) -> list[int]:
        """Returns the numbers of the layers to match. Raises ValueError for one that the model does not have."""
        count = len(layers_of(model))
        if self.layers is None:
            return list(range(count // 3, max(2 * count // 3, count // 3 + 1)))
        if not self.layers or any(not 0 <= k < count for k in self.layers) or len({*self.layers}) < len(self.layers):
            raise ValueError(f"expected different layers from 0 to {count - 1}, got {self.layers}")
        return list(self.layers)


class Signal:
    """What moves hidden states towards preferred answers: two instructions to one model, or two adapters.

    model: a frozen PEFT model with the adapters that are named; it may share its weights with the model in training,
    see `sharing`. adapters: that for preferred answers, that for the others; the same one for a single model.
    instructions: in front of prompts, for either; None for a dual model, whose adapters read the prompts as they are.
    """

    def __init__(self, model: Any, adapters: tuple[str, str], instructions: tuple[str, str] | None) -> None:
        self.model, self.adapters, self.instructions = model.requires_grad_(False).eval(), adapters, instructions
        install_fused_loss(model)

    @classmethod
    def load(cls, base: nn.Module, folders: Mapping[str, Path], instructions: tuple[str, str] | None) -> Signal:
        """Returns the signal of adapters in folders by the names of `train_signal`, on weights shared with the base."""
        from peft import PeftModel

        names = list(folders)
        model: Any = PeftModel.from_pretrained(sharing(base), str(folders[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(folders[name]), adapter_name=name)
        return cls(model, (names[0], names[-1]), instructions)

    @property
    def identity(self) -> str:
        """A hash of the adapters' weights and of the instructions."""
        prefix = self.model.base_model.prefix
        weights = sample_of((n, p) for n, p in self.model.named_parameters() if prefix in n)
        return hashlib.sha256(f"{weights} {self.instructions}".encode()).hexdigest()[:16]

    def differences(self, rows: Sequence[Inputs], places: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Returns A at each layer, (R, T, D), at the places of targets (R, T). rows: for either adapter."""
        sides = []
        for name, one in zip(self.adapters, rows, strict=True):
            self.model.set_adapter(name, inference_mode=True)
            sides.append([at_places(x, one.targets, places) for x in states_of(self.model, one, layers)])
        return [a - b for a, b in zip(*sides, strict=True)]


def sharing(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose parameters are those of the model itself, so that it takes no memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def states_of(model: nn.Module, rows: Inputs, layers: Sequence[int]) -> list[Tensor]:
    """Returns the outputs (R, T, D) of layers for some rows, in eval mode and without gradient."""
    with evaluating(model), captured(model, layers) as states:
        rows.run(model, lambda hidden, head: {"done": hidden.new_zeros(())})
        return list(states)


def train_signal(
    load: Callable[[], Any],
    tokenizer: Any,
    pairs: Any,
    config: Callable[[Path], XPOConfig],
    peft_config: Any,
    folder: Path,
    *,
    kind: str = "dual",
    instructions: tuple[str, str] = INSTRUCTIONS,
    callbacks: Sequence[Any] = (),
) -> dict[str, Path]:
    """Trains the adapters of a signal by supervised fine-tuning; returns their folders by name.

    single: one adapter, on each pair's chosen completion behind the first instruction and on its rejected completion
    behind the second. (The paper's contrastive instruction tuning adds to this the odds of one against the other.)
    dual: an adapter on the chosen completions, and one on the rejected ones.
    load: makes the base model anew. pairs: rows of `data.load(…, kind="pair")`. config: makes the arguments of a run in
    a folder, with method="sft". An adapter that is finished is not trained again, and a run that was stopped goes on
    from its last checkpoint. Raises ValueError for another kind.
    """
    if kind not in SIGNALS:
        raise ValueError(f"kind must be one of {', '.join(SIGNALS)}, got {kind!r}{did_you_mean(kind, SIGNALS)}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for side, name, instruction in zip(_SIDES, ("chosen", "rejected"), instructions, strict=True):
        told = instruction if kind == "single" else None
        found = [_answer(row, name, told) for row in pairs]
        rows.setdefault("both" if kind == "single" else side, []).extend(found)
    folders = {}
    for name, some in rows.items():
        folders[name] = out = folder / name
        if (out / "adapter_config.json").is_file():
            continue
        how: Any = {"processing_class": tokenizer, "peft_config": copy.deepcopy(peft_config)}
        trainer = XPOTrainer(load(), config(out), train_dataset=some, callbacks=[*callbacks], **how)
        trainer.train(resume_from_checkpoint=last_checkpoint(out))
        trainer.save_model(str(out))
    return folders


def _answer(row: Mapping[str, Any], name: str, instruction: str | None) -> dict[str, Any]:
    prompt = data.prompt_of(row)
    prompt = prompt if instruction is None else data.under_context(prompt, instruction)
    return {"prompt": prompt, "chosen": row[name], **data.template_columns(prompt)}


class RepresentationTrainer(UnitTrainer):
    """Trainer of an adapter whose hidden states match h(base) + α·A on the chosen completions of the data.

    model: a causal LM, or a PEFT model; peft_config makes it one. signal: what gives A. train_dataset, eval_dataset:
    anything `data.load(…, kind="chosen")` reads, pairs among it. Raises ValueError for a model without an adapter,
    whose base would have no states to compare with. Aligning Large Language Models with Human Preferences through
    Representation Engineering (arXiv 2312.15997).
    """

    args: RepresentationConfig

    def __init__(
        self,
        model: nn.Module | str,
        args: RepresentationConfig,
        *,
        signal: Signal,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        model, processing_class = with_tokenizer(model, processing_class)
        model = prepare_model(model, args, peft_config)
        refuse_router_loss(model, "rahf")
        if not hasattr(model, "disable_adapter"):
            raise ValueError("rahf trains an adapter, and compares with the model without it: pass peft_config=")
        self.kind, self.signal, self.args = KINDS["chosen"], signal, args
        self.layers = args.layers_in(model)
        self._tokenizer, self._unwrapped = processing_class, model
        pad = padding_id(model, processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=_Collator(pad),
            train_dataset=self._encode(train_dataset),
            eval_dataset=map_splits(eval_dataset, self._encode),
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("rahf reads the layers of a whole model on every rank: train without FSDP and DeepSpeed")
        signal.model.to(self.accelerator.device)

    def _encode(self, dataset: Any) -> Any:
        if dataset is None:
            return None
        rows, how = data.load(dataset, kind="chosen"), self.args.encoding()
        encoded = data.encode(rows, self._tokenizer, kind="chosen", **how)
        further = {name: how[name] for name in ("score", "num_proc", "chat_template_kwargs")}
        for side, instruction in zip(_SIDES, self.signal.instructions or (), strict=False):
            name = f"ref_{side}_prompt_ids"
            encoded = data.add_context(encoded, rows, self._tokenizer, instruction, name=name, **further)
        check_rows(self._unwrapped, self._tokenizer, encoded, lengths=context_lengths(encoded))
        return with_lengths(encoded, self.args)

    @cached_property
    def _rows(self) -> str:
        return rows_fingerprint(self.train_dataset)[:16]

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings that a resumed run must share with this one."""
        about = {"signal": self.signal.identity, "alpha": self.args.alpha, "layers": self.layers, "rows": self._rows}
        return {**super().made_with, **about}

    def held_out(self) -> dict[str, float]:
        """Evaluates on eval_dataset; returns metrics without timings."""
        return {k: v for k, v in self.evaluate().items() if not k.endswith(("_runtime", "_second", "_time"))}

    def _items(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["targets"] != IGNORE_INDEX).sum()

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], denominator: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        rows = Inputs.of(inputs)
        valid = (rows.targets != IGNORE_INDEX).any(dim=1)
        divisor = self._items(inputs).clamp(min=1) if denominator is None else denominator
        under = [Inputs.of(inputs, f"ref_{side}_") if f"ref_{side}_targets" in inputs else rows for side in _SIDES]
        with self.accelerator.autocast():
            moved = self.signal.differences(under, rows.targets, self.layers)
            with without_adapter(self._unwrapped):
                base = states_of(self._unwrapped, rows, self.layers)

        with captured(self._unwrapped, self.layers) as states:

            def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
                losses, metrics = hidden_loss(states, base, moved, rows.targets, self.args.alpha)
                loss = losses.sum() / divisor
                return {"loss": loss, "metrics": mean_metrics(metrics, valid), "counts": count_metrics(metrics, valid)}

            out = rows.run(model, fused)
        return out["loss"], (out["loss"].detach(),), out["metrics"], out["counts"]


@dataclass
class _Collator:
    """`data.Collator` of chosen completions, with the rows behind each instruction."""

    pad: int

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        collate = data.Collator(self.pad, "chosen")
        batch = collate(features)
        for side in _SIDES:
            if f"ref_{side}_prompt_ids" in features[0]:
                told = [{**row, "prompt_ids": row[f"ref_{side}_prompt_ids"]} for row in features]
                batch |= {f"ref_{side}_{name}": x for name, x in collate(told).items()}
        return batch
