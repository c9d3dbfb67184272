"""TRL's experimental trainers without their logits; `integrations/trl.py` hands them out.

Losses and metrics are theirs. Refused at the start: encoder-decoders, and the router's loss of mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.experimental.cpo import CPOTrainer as _CPOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer as _OnlineDPOTrainer
from trl.experimental.orpo import ORPOTrainer as _ORPOTrainer
from trl.experimental.tpo import TPOTrainer as _TPOTrainer

from ...head import shift_labels, token_logps, token_stats
from ...head.sharded import gathered
from ...models import Head
from .install import IGNORE, HeadFunction, check_version, take_losses, without_virtual


class _WithoutLogits:
    """A trainer whose model takes `fused_loss`."""

    loss_types: tuple[str, ...] = ()
    model: Any
    ref_model: Any = None
    args: Any
    accelerator: Any
    pad_token_id: Any
    padding_value: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version()
        super().__init__(*args, **kwargs)
        if self.loss_types and self.args.loss_type not in self.loss_types:
            raise ValueError(f"no loss type named {self.args.loss_type!r}; there are {', '.join(self.loss_types)}")
        take_losses(self)


def mean_logits(hidden: Tensor, head: Head) -> Tensor:
    """The logits of each row, its hidden states (R, T, D), averaged over positions and vocabulary: (R,), detached.

    Without a softcap that is the mean hidden state times the mean row of W; hidden is what `Head.inputs` makes it.
    """
    with torch.no_grad():
        if head.softcap is not None:
            anything = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
            stats = token_stats(hidden, head.weight, anything, outputs=("mean_logit",), **head.kwargs())
            assert stats.mean_logit is not None
            return stats.mean_logit.mean(1)
        weight, bias, adapter = gathered(weight=head.weight, bias=head.bias, adapter=head.adapter)
        rows = [x.mean(0, dtype=torch.float32) for x in (weight, adapter) if x is not None]
        z = hidden.mean(1, dtype=torch.float32) @ torch.cat(rows)
        return head.logit_scale * (z if bias is None else z + bias.float().mean())


def _pairs(model: Any, rows: Mapping[str, Tensor], targets: Tensor, positions: int | None) -> tuple[Tensor, Tensor]:
    """Log-probs (R, T) of the targets and mean logits (R,) of the first `positions` of each row, in one forward."""

    def of(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        hidden = without_virtual(hidden, targets)
        logp = token_logps(hidden, head.weight, targets, **head.kwargs())
        return logp, mean_logits(hidden[:, :positions], head)

    ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
    return model(ids, attention_mask=mask, fused_loss=of)


class CPOTrainer(_WithoutLogits, _CPOTrainer):
    """TRL's experimental CPOTrainer (CPO, SimPO, AlphaPO) without logits."""

    loss_types = ("sigmoid", "hinge", "ipo", "simpo")  # "alphapo" is its config's name for a "simpo"

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        rows = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
        chosen = len(batch["chosen_labels"])
        targets = shift_labels(rows["concatenated_labels"])
        logp, logits = _pairs(model, rows, targets, None)
        logps, lengths = logp.sum(1), (targets != IGNORE).sum(1)
        nll = logps.new_zeros(())
        if self.cpo_alpha != 0:
            nll = -logps[:chosen].sum() / lengths[:chosen].sum()
        if self.loss_type in ("ipo", "simpo"):
            logps = logps / lengths
        return logps[:chosen], logps[chosen:], logits[:chosen], logits[chosen:], nll


class ORPOTrainer(_WithoutLogits, _ORPOTrainer):
    """TRL's experimental ORPOTrainer without logits."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        rows = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        chosen = len(batch["chosen_labels"])
        completion = shift_labels(rows["concatenated_labels"])
        whole = shift_labels(
            rows["concatenated_input_ids"].masked_fill(rows["concatenated_attention_mask"] == 0, IGNORE)
        )
        # The likelihood is of the chosen rows' prompts, too.
        targets = torch.cat([whole[:chosen], completion[chosen:]])
        logp, logits = _pairs(model, rows, targets, -1)
        scored = completion != IGNORE
        logps = (logp * scored).sum(1) / scored.sum(1)
        nll = -logp[:chosen].sum() / (whole[:chosen] != IGNORE).sum()
        return logps[:chosen], logps[chosen:], logits[:chosen], logits[chosen:], nll


class TPOTrainer(_WithoutLogits, _TPOTrainer):
    """TRL's experimental TPOTrainer without logits."""

    loss_types = ("sigmoid", "hinge", "ipo", "tpo-l")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        arguments = {k: x for k, x in inputs.items() if k != "completion_mask"}
        mask = inputs["completion_mask"].bool()
        targets = shift_labels(inputs["input_ids"].masked_fill(~mask, IGNORE))

        def of(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
            hidden = without_virtual(hidden, targets).flatten(0, 1)
            names = ("entropy", "mean_logit", "top1")
            found = HeadFunction().statistics(hidden, head, targets.flatten(), names)
            return tuple(x.view(targets.shape) for x in found.values())

        logp, entropy, logits, top1 = model(**arguments, fused_loss=of)
        scored = targets != IGNORE
        lengths = scored.sum(1)
        branches = 2 if self.tpo_alpha == 0 else 3  # chosen, rejected, and the reference that is imitated
        logps = logp.sum(1)
        if self.loss_type in ("ipo", "tpo-l"):
            logps = logps / lengths.clamp(min=1)
        chosen, rejected = logps.chunk(branches)[:2]
        loss = self._contrast(chosen - rejected).mean()
        if branches == 3:
            loss = loss - self.tpo_alpha * logp.chunk(3)[2].sum() / lengths.chunk(3)[2].sum()

        log, gather = self._metrics[mode], self.accelerator.gather_for_metrics
        log["entropy"].append(gather(entropy.detach().sum() / lengths.sum()).mean().item())
        if mode == "train":
            self._total_train_tokens += gather(inputs["attention_mask"].sum()).sum().item() // self._tp_size
        log["num_tokens"] = [self._total_train_tokens]
        sums = {
            "logits/chosen": logits,
            "logits/rejected": logits,
            "mean_token_accuracy": top1.to(logits.dtype),
        }
        for name, x in sums.items():
            half = int(name.endswith("rejected"))
            total, tokens = gather(
                torch.stack([x.chunk(branches)[half].sum(), lengths.chunk(branches)[half].sum()])[None]
            ).sum(0).tolist()  # fmt: skip
            log[name].append(total / tokens if tokens else 0.0)
        rewards = [self.accelerator.gather(self.beta * x.detach()) for x in (chosen, rejected)]
        values = {
            "rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(), "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": self.accelerator.gather(chosen), "logps/rejected": self.accelerator.gather(rejected),
        }  # fmt: skip
        for name, x in values.items():
            log[name].append(x.mean().item())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**arguments)

    def _contrast(self, delta: Tensor) -> Tensor:
        """The loss of each pair (P,) from the difference of its log-probs (P,)."""
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * delta)
        if self.loss_type == "ipo":
            return (delta - 1 / (2 * self.beta)) ** 2
        z = self.beta * delta - (self.tpo_l_gamma if self.loss_type == "tpo-l" else 0.0)
        return -F.logsigmoid(z) * (1 - self.label_smoothing) - F.logsigmoid(-z) * self.label_smoothing


class OnlineDPOTrainer(_WithoutLogits, _OnlineDPOTrainer):
    """TRL's experimental OnlineDPOTrainer without logits; with images, and without a prompt, it makes them as TRL does.

    Padding after the end of a completion is scored as in TRL: its metrics sum over it, its loss does not.
    """

    loss_types = ("sigmoid", "ipo")

    def _forward(
        self,
        model: Any,
        prompt_ids: Tensor,  # (R, P)
        prompt_mask: Tensor,  # (R, P)
        completion_ids: Tensor,  # (R, C)
        completion_mask: Tensor,  # (R, C)
        vision_inputs: Any = None,
    ) -> Tensor:
        cut = max(prompt_ids.shape[1] + completion_ids.shape[1] - self.max_length, 0)
        if vision_inputs is not None or cut >= prompt_ids.shape[1]:
            return super()._forward(model, prompt_ids, prompt_mask, completion_ids, completion_mask, vision_inputs)
        ids = torch.cat([prompt_ids[:, cut:], completion_ids], dim=1)
        mask = torch.cat([prompt_mask[:, cut:], completion_mask], dim=1)
        width = completion_ids.shape[1]

        def of(hidden: Tensor, head: Head) -> Tensor:
            return token_logps(hidden[:, -width - 1 : -1], head.weight, completion_ids, **head.kwargs())

        with self.accelerator.autocast():
            return model(ids, attention_mask=mask, fused_loss=of)
