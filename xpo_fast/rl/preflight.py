"""The check of online RL: of its prompts before the first step, and of its first rollout, which is collected anyway.

`trainer` is the `RLTrainer` that is checked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from ..data import KWARGS, pad_rows
from ..layouts import Inputs, LaysOut
from ..models import embeddings, padding_id, positions
from ..rollout import GenerateRollout, encode_prompts
from ..rollout.sampling import Sampling, eos_ids
from ..trainer.findings import Finding, Report
from ..trainer.preflight import check_tied, true_logps, untouched
from ..trainer.reference import row_logps
from ..trainer.row_checks import Behind, attempt
from .checks import check_sampler
from .collect import Collector, Completion, spread

ROWS = 2  # completions whose log-probs are compared: the shortest ones
_MOST_CUT, _MOST_SHORT = 0.5, 0.05  # shares of completions and prompts; beyond them there is a doubt


def check_before(trainer: Any, collector: Collector | None) -> Report:
    """Checks prompts, the room that they leave, what ends a completion, and the head, and with a collector a rollout.

    collector: collects the first rollout for the check alone; None: nothing is sampled.
    """
    began = time.perf_counter()
    names = " + ".join(m.name for m in trainer.objective.methods)
    report = Report(f"{type(trainer).__name__}, {names} on {len(trainer.prompts):,} prompts")
    with untouched(trainer.objective):
        attempt(report, check_room, trainer)
        attempt(report, check_end, trainer)
        attempt(report, check_tied, trainer.policy)
        attempt(report, check_held_out, trainer)
        if collector is not None:
            rows = [row for group in collector.collect(0, 0).groups for row in group]
            trainer.settle_layout([(row.prompt_ids, row.ids) for row in rows])
            report.findings += check_rollout(trainer, rows)
            attempt(report, _check_sampler, trainer, rows)
    if collector is None:
        report.add("rollout", "note", "rewards, lengths and log-probs are looked at in the first rollout")
    report.seconds = time.perf_counter() - began
    return report


def check_first(trainer: Any, rows: Sequence[Completion]) -> None:
    """Checks a run's first rollout and logs faults and doubts; raises ValueError for a fault if the run is to stop."""
    if trainer.args.preflight == "off":
        return
    report = Report("the first rollout", check_rollout(trainer, rows))
    if trainer.is_world_process_zero():
        report.log()
    if trainer.report is not None:
        trainer.report.findings += report.findings
    if trainer.args.preflight == "stop":
        report.raise_for_faults()


def _check_sampler(report: Report, trainer: Any, rows: list[Completion]) -> None:
    """Says as a fault what a run would refuse, see `check_sampler`."""
    own = isinstance(trainer.rollout, GenerateRollout)
    try:
        check_sampler(
            rows, trainer.policy, trainer.args, trainer.accelerator, own_sampler=own, layout=_layout_of(trainer)
        )
    except ValueError as error:
        report.add("sampler", "fault", str(error))
    else:
        report.add("sampler", "ok", "completions are sampled from what is trained")


def check_room(report: Report, trainer: Any) -> None:
    """Counts the prompts that leave less room than max_new_tokens."""
    tokenizer: Any = trainer.processing_class
    kwargs = getattr(trainer.rollout, KWARGS, trainer.args.chat_template_kwargs)
    lengths = sorted(map(len, encode_prompts([row["prompt"] for row in trainer.prompts], tokenizer, kwargs)))
    limit, wanted = positions(trainer.policy), trainer.sampling.max_new_tokens
    short = 0 if limit is None else sum(n + wanted > limit for n in lengths)
    if short > _MOST_SHORT * len(lengths):
        said = f"{short} of {len(lengths)} prompts leave less than max_new_tokens={wanted} of the model's {limit}"
        report.add("prompts", "doubt", f"{said} positions: their answers end early")
    middle = f"{lengths[len(lengths) // 2]} (at most {lengths[-1]})"
    report.add("prompts", "ok", f"prompts have {middle} tokens, and answers room for {wanted}")


def check_end(report: Report, trainer: Any) -> None:
    """Looks for a token or a text at which a completion ends."""
    tokenizer = trainer.processing_class
    ends = eos_ids(tokenizer, trainer.policy)
    outside = sorted(i for i in ends if i >= embeddings(trainer.policy))
    if outside:
        report.add("end", "fault", f"the EOS {outside[0]} is no token of the model: no completion can end")
    elif not ends and not trainer.sampling.stop:
        report.add("end", "doubt", "the tokenizer and the generation config name no EOS: every completion is cut")
    else:
        named = [repr(tokenizer.decode([i])) for i in sorted(ends)]
        report.add("end", "ok", f"a completion ends at {' or '.join([*named, *map(repr, trainer.sampling.stop)])}")


def check_held_out(report: Report, trainer: Any) -> None:
    """Counts the prompts held out that are trained on as well."""
    held: Any = trainer.eval_dataset or []
    known = {repr(row["prompt"]) for row in trainer.prompts}
    shared = sum(repr(row["prompt"]) in known for row in held)
    if shared:
        report.add("prompts", "doubt", f"{shared} of {len(held)} prompts held out are trained on as well")


def check_rollout(trainer: Any, rows: Sequence[Completion]) -> list[Finding]:
    """Checks a rollout that has been scored: no completion is sampled, and no reward asked for, beside its own."""
    report, per_prompt = Report("rollout"), trainer.args.num_generations
    with untouched(trainer.objective):
        attempt(report, check_rewards, rows, per_prompt, trainer.rewards.names)
        attempt(report, check_lengths, rows, trainer.sampling)
        attempt(report, check_log_probs, trainer, rows)
    return report.findings


def check_rewards(report: Report, rows: Sequence[Completion], per_prompt: int, names: Sequence[str]) -> None:
    """Looks whether rewards tell completions apart: over all, and among those of a prompt."""
    known = [row.reward for row in rows if not math.isnan(row.reward)]
    if len(known) < len(rows) / 2:
        report.add("rewards", "doubt", f"{len(rows) - len(known)} of {len(rows)} completions have no reward")
    groups = [rows[i : i + per_prompt] for i in range(0, len(rows), per_prompt)]
    flat = sum(not spread(group) > 0 for group in groups)
    if len(known) > 1 and min(known) == max(known):
        said = f"each of {len(known)} completions has the reward {known[0]:g}: they are not told apart"
        report.add("rewards", "doubt", f"{said} ({', '.join(names)})")
    elif per_prompt > 1 and flat == len(groups):
        report.add("rewards", "doubt", f"the completions of each of {flat} prompts have equal rewards among them")
    else:
        said = f"rewards run from {min(known):g} to {max(known):g}" if known else "there are no rewards"
        report.add("rewards", "ok", f"{said}; {flat} of {len(groups)} prompts have equal ones")


def check_lengths(report: Report, rows: Sequence[Completion], sampling: Sampling) -> None:
    """Counts the completions that were cut, and those that are empty."""
    cut, empty = sum(row.truncated for row in rows), sum(not row.ids for row in rows)
    if empty:
        report.add("lengths", "doubt", f"{empty} of {len(rows)} completions have no token")
    level = "doubt" if cut > _MOST_CUT * len(rows) else "ok"
    said = f"{cut / len(rows):.0%} of completions are cut at max_new_tokens={sampling.max_new_tokens}"
    report.add("lengths", level, said)


def check_log_probs(report: Report, trainer: Any, rows: Sequence[Completion]) -> None:
    """Compares the log-probs of the shortest completions in a batch, as it is read, with the model's own logits'."""
    policy, args = trainer.policy, trainer.args
    some = sorted((row for row in rows if row.ids), key=lambda row: len(row.prompt_ids) + len(row.ids))[:ROWS]
    if not some:
        return
    truth = true_logps(policy, trainer.accelerator, [Behind(0, "", row.prompt_ids, row.ids) for row in some])
    pad = padding_id(policy, trainer.processing_class)
    collate = LaysOut(lambda of: pad_rows(of, pad), _layout_of(trainer))
    batch = {n: x.to(args.device) for n, x in collate([(row.prompt_ids, row.ids) for row in some]).items()}
    with trainer.accelerator.autocast():
        found = row_logps(policy, *Inputs.of(batch), backend=args.backend)[:, 0].double().cpu()
    off = (found - truth.sums()).abs()
    if not bool((off <= truth.allowed()).all()):
        said = f"the log-probs of a batch are off by {float(off.max()):.3g} nats per row from the model's own logits"
        report.add("log-probs", "fault", f"{said}: padding is read, or the batch has other tokens")
    else:
        report.add("log-probs", "ok", f"log-probs are those of the model's own logits (off by {float(off.max()):.1g})")


def _layout_of(trainer: Any) -> str:
    """Returns the name of the layout that is settled; "padded" before."""
    return "padded" if trainer.layout is None else trainer.layout.layout
