"""Reports for --dry-run what a run would train on and how, from the tokenizer and the model's configuration alone."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from . import loading, options, training

if TYPE_CHECKING:
    from torch import Tensor

    from .. import Objective


def preferences(
    args: argparse.Namespace,
    objective: Objective,
    config: Any,
    rows: Any,
    held_out: Any,
    teachers: Sequence[tuple[str, float]] = (),
) -> None:
    """Prints what `xpo-fast train` would do, or with teachers (name and weight) distill. config: its XPOConfig."""
    from .. import data
    from ..layouts import LaysOut
    from ..models import padding_id
    from ..trainer import check_rows, grouped_targets
    from ..trainer.context import context_lengths, encode_for
    from ..trainer.reference import choose

    model, tokenizer = _without_weights(args, adapter=not args.full)
    encoded = encode_for(rows, tokenizer, objective, config)
    data.check_columns(encoded, objective.data_kind, objective.rehearse)
    under = context_lengths(encoded)
    check_rows(model, tokenizer, encoded, lengths=under)
    collate = LaysOut(data.Collator(padding_id(model, tokenizer), objective.data_kind))
    first = _batch(encoded, collate, config)
    where = _teachers(teachers, model, tokenizer) if teachers else choose(args.reference, objective, model)
    _header(args, model, rows, held_out)
    _lengths(rows, encoded, tokenizer, objective.data_kind, config)
    print(f"method     {config.objective()}")
    print("reference  {}: {}".format(*where))
    if under is not None:
        print(f"context    before every prompt of the reference, whose rows have {min(under)} to {max(under)} tokens")
    _layout(config, model, encoded, collate)
    grouped = grouped_targets(data.KINDS[objective.data_kind], first)
    print(f"head       {_plan(config, model, *((first['targets'], {}) if objective.layout == 'policy' else grouped))}")
    _steps(config, len(rows))
    _budget(config, encoded, collate)
    _rendered(first, tokenizer)


def _teachers(teachers: Sequence[tuple[str, float]], student: Any, tokenizer: Any) -> tuple[str, str]:
    """Checks teachers without loading their weights; returns what stands for the reference, in words."""
    from ..models import load_model
    from ..trainer.teachers import check_heads, check_tokenizers

    for name, _ in teachers:
        model, theirs = load_model(name, device_map="meta")
        check_tokenizers(model, theirs, student, tokenizer)
        check_heads(model, student)
    return "teacher", ", ".join(f"{weight:g}*{name}" for name, weight in teachers)


def rewards(args: argparse.Namespace, config: Any, rows: Any, held_out: Any) -> None:
    """Prints what `xpo-fast reward` would do. config: its RewardConfig."""
    from .. import data
    from ..layouts import LaysOut
    from ..models import padding_id
    from ..rewards.collate import RewardCollator, read_in_training, read_lengths
    from ..trainer import check_rows

    spec = config.spec()
    model, tokenizer = _without_weights(args, adapter=not (args.full or args.head_only))
    encoded = data.encode(rows, tokenizer, kind=spec.kind, **config.encoding())
    check_rows(model, tokenizer, encoded, lengths=read_lengths(encoded, spec, tokenizer))
    _header(args, model, rows, held_out)
    _lengths(rows, encoded, tokenizer, spec.kind, config)
    wanted = partial(read_in_training, spec)
    collate = LaysOut(RewardCollator(padding_id(model, tokenizer), spec, tokenizer), wanted=wanted)
    print(f"method     {spec.method}")
    _layout(config, model, encoded, collate)
    _steps(config, len(rows))
    _budget(config, encoded, collate)
    print("The reward is read at the last token of each completion.")
    _rendered(_batch(encoded, collate.collate, config), tokenizer)


def prompts(args: argparse.Namespace, config: Any, names: Sequence[str], rows: list[Any], held_out: Any) -> None:
    """Prints what `xpo-fast rl` would do. config: its RLConfig. names: the rewards."""
    from ..data import check_written
    from ..layouts import choose, unsupported
    from ..models import check_ids, positions
    from ..rl.checks import checked_ids
    from ..trainer import CLOSE, OPEN
    from ..trainer.budget import Size, cut

    model, tokenizer = _without_weights(args, adapter=not args.full)
    check_written(tokenizer, rows, config.chat_template_kwargs)
    ids = checked_ids(rows, model, tokenizer, config.chat_template_kwargs)
    check_ids(model, tokenizer, [tokenizer.pad_token_id], "the padding token")
    _header(args, model, rows, held_out, "prompts")
    _table({"prompt": [len(x) for x in ids]})
    if (limit := positions(model)) is not None:
        short = sum(len(x) + config.max_new_tokens > limit for x in ids)
        none = sum(len(x) >= limit for x in ids)
        print(
            f"positions  {limit} of the model: {none} prompts leave no room for an answer (the run refuses them), "
            f"{short} less than --max-new-tokens {config.max_new_tokens}"
        )
    if config.layout == "padded" or unsupported(model) is not None:
        layout = choose(config.layout, model, lambda: [])
    else:
        layout = f"{config.layout}: settled on the first rollout"
    rollouts = max(math.ceil(config.num_train_epochs * len(rows) / config.prompts), 1)
    steps = config.max_steps if config.max_steps > 0 else rollouts * config.steps_per_rollout
    print(
        f"rewards    {', '.join(names)}\n"
        f"method     {config.objective()}, advantages: {config.estimator}\n"
        f"rollout    {config.prompts} prompts × {config.num_generations} completions of at most "
        f"{config.max_new_tokens} tokens\n"
        f"layout     {layout}\n"
        f"steps      {steps}, {config.steps_per_rollout} per rollout, lr {config.learning_rate:g}, "
        f"{_name(config.lr_scheduler_type)}"
    )
    if config.tokens_per_batch is not None:
        copies = [tokens for tokens in ids[: config.prompts] for _ in range(config.num_generations)]
        longest = [[Size(1, len(tokens) + config.max_new_tokens - 1)] for tokens in copies]
        count = len(cut(longest[: len(longest) // config.minibatches], config.tokens_per_batch))
        print(
            f"budget     {config.tokens_per_batch} tokens per micro-batch (--tokens-per-batch), at most {count} "
            "of them in a step"
        )
    for row, tokens in zip(rows[: config.prompts], ids, strict=False):
        print(f"\n{row.get('where', 'prompt')}, {len(tokens)} tokens\n{tokenizer.decode(tokens)}{OPEN}…{CLOSE}")
    _end()


def _without_weights(args: argparse.Namespace, *, adapter: bool) -> tuple[Any, Any]:
    """Returns the model as it is trained, with shapes but no weights, and its tokenizer."""
    from ..trainer import with_adapter, with_tokenizer

    model, tokenizer = with_tokenizer(*loading.load(args, device_map="meta"))
    return (with_adapter(model, loading.lora(args)) if adapter else model), tokenizer


def _batch(encoded: Any, collate: Any, config: Any) -> dict[str, Tensor]:
    count = min(len(encoded), config.per_device_train_batch_size)
    return collate([encoded[i] for i in range(count)])


def _header(args: argparse.Namespace, model: Any, rows: Any, held_out: Any, unit: str = "rows") -> None:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    bits = f"{args.quantize[0]} bits" if args.quantize else dtype
    how = "the value head" if getattr(args, "head_only", False) else f"LoRA of rank {args.lora_rank}"
    how = "every weight" if args.full else how
    print(f"model      {args.model}: {training.weights(model, full=args.full)[0]} weights in {bits}; {how} is trained")
    held = "none" if held_out is None else len(held_out)
    print(f"data       {options.sources(args, rows)}: {len(rows)} {unit} to train on, {held} held out")


def _lengths(rows: Any, encoded: Any, tokenizer: Any, kind: str, config: Any) -> None:
    """Prints the tokens of prompts, completions and both before they are cut, and how many are cut."""
    from .. import data

    whole = {**config.encoding(), "max_length": 2**31, "max_prompt_length": None}
    logger = logging.getLogger("xpo_fast")
    logger.disabled = True  # the warnings have been given
    try:
        uncut = data.encode(rows, tokenizer, kind=kind, **whole)
    finally:
        logger.disabled = False
    prompt = [len(ids) for ids in uncut["prompt_ids"]]
    completions = _completions(uncut, kind)
    both = [p + n for p, row in zip(prompt, completions, strict=True) for n in map(len, row)]
    kept = [len(ids) for ids in encoded["prompt_ids"]]
    shortened = [[*map(len, row)] for row in _completions(encoded, kind)]
    _table({"prompt": prompt, "completion": [len(ids) for row in completions for ids in row], "both": both})
    cut_prompts = sum(a < b for a, b in zip(kept, prompt, strict=True))
    cut = sum(a < len(b) for short, row in zip(shortened, completions, strict=True) for a, b in zip(short, row))
    prompts = sum(k * len(row) for k, row in zip(kept, shortened, strict=True))
    answers, scored = sum(map(sum, shortened)), _scored(encoded, kind)
    print(
        f"cut        {cut_prompts} of {len(kept)} prompts at the start, {cut} of {sum(map(len, completions))} "
        f"completions at the end, to --max-length {config.max_length}"
    )
    print(
        f"tokens     {prompts + answers} read per epoch: {prompts} of prompts "
        f"({prompts / (prompts + answers):.0%}), {answers} of completions, "
        f"{'which' if scored == answers else f'{scored} of which'} are scored"
    )


def _completions(encoded: Any, kind: str) -> list[list[list[int]]]:
    from ..data import KINDS

    rows = zip(*(encoded[name] for name in KINDS[kind].encoded[1:]), strict=True)
    return [list(row[0] if KINDS[kind].listed else row) for row in rows]


def _scored(encoded: Any, kind: str) -> int:
    """Returns the number of tokens that are scored."""
    from ..data import KINDS
    from ..trainer.row_checks import sequences

    return sum(len(one.scored) for row in encoded for one in sequences(KINDS[kind], [row]))


def _table(lengths: dict[str, list[int]]) -> None:
    print(f"{'tokens':<11}{'min':>8}{'median':>8}{'95%':>8}{'max':>8}")
    for name, values in lengths.items():
        ordered = sorted(values)
        middle, high = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        print(f"{name:<11}{ordered[0]:>8}{middle:>8}{high:>8}{ordered[-1]:>8}")


def _layout(config: Any, model: Any, encoded: Any, collate: Any) -> None:
    """Prints the layout in which a run would read rows, if it proves itself there, and has them laid out so.

    collate: a `LaysOut`.
    """
    from ..layouts import choose
    from ..trainer.layout import sampled

    size = config.per_device_train_batch_size
    chosen = choose(config.layout, model, lambda: sampled(encoded, collate.collate, size), wanted=collate.wanted)
    print(f"layout     {chosen}")
    collate.layout = chosen.layout


def _steps(config: Any, rows: int) -> None:
    """Prints the steps as transformers.Trainer counts them: the last batches of an epoch make a step of their own."""
    batches = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    per_epoch = max(math.ceil(batches / config.gradient_accumulation_steps), 1)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    each = config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps
    print(
        f"steps      {steps} of {each} rows, {per_epoch} per epoch; lr {config.learning_rate:g}, "
        f"{_name(config.lr_scheduler_type)}, {config.get_warmup_steps(steps)} warm up"
    )


def _budget(config: Any, encoded: Any, collate: Any) -> None:
    """Prints into how many micro-batches the first step is cut."""
    from ..trainer.budget import Budget, KeepsUnits

    if config.tokens_per_batch is None:
        return
    each = min(config.per_device_train_batch_size * config.gradient_accumulation_steps, len(encoded))
    units = KeepsUnits(collate)([encoded[i] for i in range(each)]).drawn
    count = len(Budget(config.tokens_per_batch, collate).batches(units))
    print(
        f"budget     {config.tokens_per_batch} tokens per micro-batch (--tokens-per-batch), {count} of them in a step "
        f"of the first {each} rows"
    )


def _plan(config: Any, model: Any, targets: Tensor, layout: dict[str, Any]) -> Any:
    """Returns the head's plan for a batch, from operands of the right shapes that take no memory."""
    import torch

    from ..models import Head
    from ..models.fused_loss import causal_lm

    head = Head.from_model(causal_lm(model))
    shapes = {
        name: torch.empty((), dtype=x.dtype, device=config.device).expand(x.shape).requires_grad_(x.requires_grad)
        for name, x in vars(head).items()
        if isinstance(x, torch.Tensor)
    }
    head = dataclasses.replace(head, **shapes)
    hidden = head.weight.new_empty(()).expand(*targets.shape, head.width).requires_grad_()
    return config.objective().plan(hidden, head, targets.to(config.device), **layout)


def _rendered(batch: dict[str, Tensor], tokenizer: Any) -> None:
    """Prints each sequence of a batch as text, the scored tokens between ⟦ and ⟧."""
    from ..trainer import CLOSE, OPEN, marked

    targets, ids, mask = batch["targets"], batch["input_ids"], batch["attention_mask"]
    print(f"\nThe first {len(ids)} sequences, scored between {OPEN} and {CLOSE} (a run draws its batches by --seed):")
    for r in range(len(ids)):
        scored = [False, *(targets[r, :-1] != -100).tolist()]
        tokens = [(int(t), s) for t, s, m in zip(ids[r], scored, mask[r], strict=True) if m]
        print(f"\n{marked(tokens, tokenizer)}")
    _end()


def _end() -> None:
    print("\nNothing was trained, and nothing written into --output-dir; leave --dry-run out to train.")


def _name(scheduler: Any) -> str:
    return str(getattr(scheduler, "value", scheduler))
