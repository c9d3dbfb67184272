"""Checks of what a run is given and of what its sampler returns: ids, lengths, and log-probs that are the policy's."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..data import KWARGS, check_written, place_of
from ..models import check_ids, check_lengths, positions
from ..models.lm_head import causal_lm
from ..rewards import OWN_COLUMNS, PROMPT_INDEX
from ..rollout import GenerateRollout, Rollout, Samples, encode_prompts, sample_logps
from ..trainer.sharding import check_reference, sharding_of
from .collect import Completion
from .config import RLConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("xpo_fast")

_COMPARED = 16  # completions whose log-probs are compared


def check_sharding(reference: str, args: RLConfig, model: Any, accelerator: Accelerator) -> None:
    """Raises ValueError for what a run cannot have where FSDP or DeepSpeed keep its model in parts.

    reference: what serves as the reference, see `choose_reference`.
    """
    how = sharding_of(accelerator)
    if how == "FSDP1":
        raise ValueError(
            "online RL samples from the model made whole for the while of a rollout, which needs FSDP2: set version 2 "
            "in fsdp_config (fsdp_version in accelerate's file)"
        )
    check_reference(reference, model, accelerator)
    if args.ref_mixin and how in ("FSDP2", "ZeRO-3"):
        raise ValueError(
            f"ref_mixin={args.ref_mixin:g} moves every weight of the reference, and {how} keeps them in parts: leave "
            "it at 0, or use data parallelism or ZeRO-2"
        )


def check_prompts(
    rows: list[dict[str, Any]],
    policy: Any,
    tokenizer: Any,
    rollout: Rollout,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError before a run for a column or a prompt that would fail in it, and for the padding token.

    chat_template_kwargs: of the run, which the sampler must write its prompts with.
    """
    for name in (PROMPT_INDEX, *OWN_COLUMNS):
        if rows and name in rows[0]:
            raise ValueError(f"the column {name!r} is what reward functions are told of the rollout: rename it")
    # Padding is masked, but Trainer writes this id into the model's config, and such a model cannot be loaded.
    check_ids(policy, tokenizer, [tokenizer.pad_token_id], "the padding token")
    kwargs = getattr(rollout, KWARGS, chat_template_kwargs)
    if chat_template_kwargs and kwargs != chat_template_kwargs:
        raise ValueError(
            f"the settings have {KWARGS} {dict(chat_template_kwargs)}, the rollout {kwargs}: pass them to the rollout, "
            "which writes the prompts"
        )
    check_written(tokenizer, rows, kwargs)
    if not isinstance(rollout, GenerateRollout):
        return
    ids = checked_ids(rows, policy, tokenizer, kwargs)
    limit = positions(policy)
    long = [k for k, x in enumerate(ids) if limit is not None and len(x) >= limit]
    if long:
        raise ValueError(
            f"{len(long)} of {len(ids)} prompts leave no room for an answer in the model's {limit} positions; the "
            f"first is {place_of(rows[long[0]], long[0])}, of {len(ids[long[0]])} tokens: shorten them, or leave "
            "them out"
        )


def checked_ids(
    rows: list[dict[str, Any]], policy: Any, tokenizer: Any, kwargs: Mapping[str, Any] | None
) -> list[list[int]]:
    """Returns the token ids of prompts; raises ValueError, which names the row, for one that has no embedding."""
    found = encode_prompts([row["prompt"] for row in rows], tokenizer, kwargs)
    for k, ids in enumerate(found):
        check_ids(policy, tokenizer, ids, place_of(rows[k], k))
    return found


def check_completions(rows: list[Completion], policy: Any, tokenizer: Any, rollout: Rollout) -> None:
    """Raises ValueError for completions of `rollout` that the policy cannot be trained on; it names a server's URL."""
    sampler = getattr(rollout, "url", type(rollout).__name__)
    for row in rows:
        check_ids(policy, tokenizer, [*row.prompt_ids, *row.ids], f"a completion of the prompt {row.prompt!r:.80}")
        if not row.prompt_ids:
            raise ValueError(
                f"a prompt without a token, so that nothing predicts the answer's first: {row.prompt!r:.80}; drop it, "
                "or use a tokenizer with a BOS"
            )
        if row.logps is not None and len(row.logps) != len(row.ids):
            raise ValueError(
                f"the sampler {sampler} gave {len(row.logps)} log-probs for {len(row.ids)} tokens: set "
                "off_policy='none', or mend the sampler"
            )
        if row.logps is not None and math.isnan(sum(row.logps)):
            at = next(i for i, x in enumerate(row.logps) if not math.isfinite(x))
            raise ValueError(
                f"the sampler {sampler} gave {row.logps[at]} as the log-prob of token {at} of its completion "
                f"{row.completion!r:.80} of {row.prompt!r:.80}: its model is broken, or has been updated by halves"
            )
    lengths = [len(row.prompt_ids) + len(row.ids) for row in rows]
    remedy = "set a smaller max_new_tokens, or leave longer prompts out"
    check_lengths(policy, lengths, lambda i: f"a completion of the prompt {rows[i].prompt!r:.80}", remedy)


def check_sampler(
    rows: list[Completion],
    policy: Any,
    args: RLConfig,
    accelerator: Accelerator,
    *,
    own_sampler: bool,
    as_drawn: bool = False,
    layout: str = "padded",
) -> None:
    """Compares the sampler's log-probs with those of the policy, which has not been trained since and reads a layout.

    They are two computations of one number: sampling pads prompts on the left and keeps a cache, training pads on the
    right. Compared are the completions of the shortest prompts, which have the most padding, by the mean over their
    tokens of |log q − log p|: rounding is far below 0.02 nats in float32 and 0.2 in 16 bits. Raises ValueError where
    the policy itself is the sampler (own_sampler), and warns where it is another.

    Does nothing where the two are not to be equal: with top_p or top_k, greedily, and for another sampler with a
    temperature, unless its log-probs are known to be those at the temperature (as_drawn).
    """
    cut = args.top_p < 1 or args.top_k is not None
    if cut or not args.temperature > 0 or (not (own_sampler or as_drawn) and args.temperature != 1):
        return
    some = sorted((row for row in rows if row.logps and row.ids), key=lambda row: len(row.prompt_ids))[:_COMPARED]
    if not some:
        return
    completions = [row.completion for row in some]
    prompts, prompt_ids, ids = ([getattr(row, n) for row in some] for n in ("prompt", "prompt_ids", "ids"))
    samples = Samples(prompts, prompt_ids, ids, completions, ["stop"] * len(some))
    how: Any = {"temperature": args.temperature, "backend": args.backend, "layout": layout}
    with accelerator.autocast():
        own = sample_logps(policy, samples, batch_size=min(args.per_device_eval_batch_size, len(some)), **how)
    reported = torch.zeros_like(own)
    for i, row in enumerate(some):
        reported[i, : len(row.ids)] = torch.tensor(row.logps)
    difference = float((own - reported)[samples.mask].abs().mean())
    narrow = args.bf16 or args.fp16 or any(p.dtype not in (torch.float32, torch.float64) for p in policy.parameters())
    if difference <= (0.2 if narrow else 0.02):
        return
    said = f"log-probs of the first completions as sampled and by the policy differ by {difference:.3g} nats per token"
    if own_sampler:
        raise ValueError(
            f"{said}: {type(causal_lm(policy)).__name__} does not generate what it is trained on. It may not observe "
            "the mask of the prompts' padding, which is on the left (set generation_batch_size=1 to sample without), "
            "or its cache may not be exact"
        )
    logger.warning(
        "%s: the server may hold other weights than the policy, or report log-probs at another temperature; set "
        "off_policy to correct for it, if it is meant",
        said,
    )
