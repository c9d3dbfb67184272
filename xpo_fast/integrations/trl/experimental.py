"""TRL's experimental trainers without their logits.

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
from .base import IGNORE, check_version, take_losses, without_virtual
from .head import HeadFunction


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
    """Computes the mean of each row's logits over positions and vocabulary, (R,), detached.

    hidden: (R, T, D) or (R, T, D + r), as `Head.inputs` returns it. Without a softcap the mean is that of the hidden
    states times the mean row of W.
    """
    with torch.no_grad():
        if head.softcap is not None:
            targets = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)  # of no matter
            stats = token_stats(hidden, head, targets, outputs=("mean_logit",))
            assert stats.mean_logit is not None
            return stats.mean_logit.mean(1)
        weight, bias, adapter = gathered(weight=head.weight, bias=head.bias, adapter=head.adapter)
        rows = [x.mean(0, dtype=torch.float32) for x in (weight, adapter) if x is not None]
        z = hidden.mean(1, dtype=torch.float32) @ torch.cat(rows)
        return head.logit_scale * (z if bias is None else z + bias.float().mean())


def _pairs(model: Any, rows: Mapping[str, Tensor], targets: Tensor, positions: int | None) -> tuple[Tensor, Tensor]:
    """Returns the targets' log-probs (R, T) and the mean logits (R,) of each row's first positions, of one forward."""

    def logps_and_logits(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        hidden = without_virtual(hidden, targets)
        return token_logps(hidden, head, targets), mean_logits(hidden[:, :positions], head)

    ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
    return model(ids, attention_mask=mask, fused_loss=logps_and_logits)


class CPOTrainer(_WithoutLogits, _CPOTrainer):
    """TRL's experimental CPOTrainer (CPO, SimPO, AlphaPO) without logits."""

    loss_types = ("sigmoid", "hinge", "ipo", "simpo")  # "alphapo" is its config's name for a "simpo"

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Returns TRL's five: the chosen and rejected rows' log-probs (P,), their mean logits (P,), and the NLL ()."""
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
        """Returns TRL's five: the chosen and rejected rows' log-probs (P,), their mean logits (P,), and the NLL ()."""
        rows = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        chosen = len(batch["chosen_labels"])
        completion = shift_labels(rows["concatenated_labels"])
        ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        with_prompt = shift_labels(ids.masked_fill(mask == 0, IGNORE))[:chosen]
        # The NLL is of the chosen rows' prompts, too.
        targets = torch.cat([with_prompt, completion[chosen:]])
        logp, logits = _pairs(model, rows, targets, -1)
        scored = completion != IGNORE
        logps = (logp * scored).sum(1) / scored.sum(1)
        nll = -logp[:chosen].sum() / (with_prompt != IGNORE).sum()
        return logps[:chosen], logps[chosen:], logits[:chosen], logits[chosen:], nll


class TPOTrainer(_WithoutLogits, _TPOTrainer):
    """TRL's experimental TPOTrainer without logits."""

    loss_types = ("sigmoid", "hinge", "ipo", "tpo-l")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        arguments = {k: x for k, x in inputs.items() if k != "completion_mask"}
        mask = inputs["completion_mask"].bool()
        targets = shift_labels(inputs["input_ids"].masked_fill(~mask, IGNORE))

        def statistics(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
            hidden = without_virtual(hidden, targets).flatten(0, 1)
            names = ("entropy", "mean_logit", "top1")
            found = HeadFunction().statistics(hidden, head, targets.flatten(), names)
            return tuple(x.view(targets.shape) for x in found.values())

        logp, entropy, logits, top1 = model(**arguments, fused_loss=statistics)
        scored = targets != IGNORE
        lengths = scored.sum(1)
        branches = 2 if self.tpo_alpha == 0 else 3  # chosen, rejected, and the reference completion
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
        sums = {"logits/chosen": logits, "logits/rejected": logits, "mean_token_accuracy": top1.to(logits.dtype)}
        for name, x in sums.items():
            half = int(name.endswith("rejected"))
            parts = torch.stack([y.chunk(branches)[half].sum() for y in (x, lengths)])
            total, tokens = gather(parts[None]).sum(0).tolist()
            log[name].append(total / tokens if tokens else 0.0)
        rewards = [self.accelerator.gather(self.beta * x.detach()) for x in (chosen, rejected)]
        values = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": self.accelerator.gather(chosen),
            "logps/rejected": self.accelerator.gather(rejected),
        }
        for name, x in values.items():
            log[name].append(x.mean().item())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**arguments)

    def _contrast(self, delta: Tensor) -> Tensor:
        """Returns the loss of each pair (P,), a function of the difference of its log-probs (P,)."""
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * delta)
        if self.loss_type == "ipo":
            return (delta - 1 / (2 * self.beta)) ** 2
        z = self.beta * delta - (self.tpo_l_gamma if self.loss_type == "tpo-l" else 0.0)
        return -F.logsigmoid(z) * (1 - self.label_smoothing) - F.logsigmoid(-z) * self.label_smoothing


class OnlineDPOTrainer(_WithoutLogits, _OnlineDPOTrainer):
    """TRL's experimental OnlineDPOTrainer without logits; with images, and without a prompt, with them, as TRL.

    Padding after the end of a completion is scored as in TRL, whose metrics sum over it and whose loss does not.
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

        def logps(hidden: Tensor, head: Head) -> Tensor:
            return token_logps(hidden[:, -width - 1 : -1], head, completion_ids)

        with self.accelerator.autocast():
            return model(ids, attention_mask=mask, fused_loss=logps)
