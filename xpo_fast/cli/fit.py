"""`xpo-fast fit`: predicts the memory of a training run, and says what fits."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, size, write_json
from . import checks, options
from .fit_question import lengths, measured, measured_prompts, memory, model_in_words, question_of, rl_fields
from .options import SMOLLM2
from .parser import UsageError

if TYPE_CHECKING:
    from ..fit.predict import Prediction
    from ..fit.question import Question

SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
DEVICES = ("cuda", "cpu")
_LENGTHS = (512, 1024)


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast fit`."""
    parser = commands.add_parser(
        "fit",
        help="predict the memory of a run, and what fits",
        description="Predict the peak memory of a training run by owner and phase, say whether it fits a device, the "
        "largest micro-batch and the longest rows that do, and what to change if none does. No weights are loaded: a "
        "step is taken on tensors without contents. The options are those of train, reward and rl, whichever has the "
        "method.",
    )
    parser.set_defaults(run=run, cpu=False, debug=False)
    parser.add_argument(
        "named", nargs="?", metavar="MODEL", help=f"{SMOLLM2}, a folder, or a name on the Hugging Face hub"
    )
    add = options.adder(parser.add_argument_group("model and device"))
    add("--shape NAME", "a known configuration in place of MODEL, such as llama-3.1-8b or qwen2.5-7b")
    add("--params N", "a configuration like Llama 3's with about so many weights, such as 7B, in place of MODEL")
    about = "memory of the device, such as 24GiB (default: that of this machine's)"
    add("--memory SIZE", about, type=memory)
    about = "whose allocator is modelled (default: cuda if --memory is given or there is a GPU, else cpu)"
    add("--device", about, choices=DEVICES)
    add("--ranks N", "processes, one per device", 1)
    add("--sharding", "what the processes share among them", "ddp", choices=SHARDINGS)
    group = parser.add_argument_group("method and data")
    add = options.adder(group)
    add("--method NAME", "a method that `xpo-fast methods` lists, or of `xpo-fast reward`", "dpo")
    options.add_settings(group, "beta=0.05")
    about = "the reference policy: auto, adapter, cached, copy, none"
    add("--reference", about, "auto", choices=("auto", "adapter", "cached", "copy", "none"))
    options.add_source(group, "rows whose lengths are measured", required=False)
    about = f"tokens of prompt and completion in place of --data, half each (default: {_LENGTHS[0]},{_LENGTHS[1]})"
    add("--lengths MEAN,MAX", about, type=lengths)
    add("--completions N", "completions per prompt of methods that take lists, without --data", 4)
    options.add_lengths(group)
    options.add_model(parser, model=None)
    add = options.adder(parser.add_argument_group("optimisation"))
    add("--batch-size N", "units, or completions of rl, per batch and device", 8)
    add("--grad-accum N", "batches per step", 1)
    add("--tokens-per-batch N", "cut a step into batches of at most N tokens", type=int)
    add("--eval-batch-size N", "units per batch without gradient (default: --batch-size)", type=int)
    add("--optim NAME", "optimizer, as in transformers (default: transformers decides)")
    add("--max-grad-norm X", "clip gradients to this norm; 0: no clipping", 1.0)
    options.add_levers(parser.add_argument_group("memory"))
    group = parser.add_argument_group("rollouts of rl")
    add = options.adder(group)
    add("--num-generations N", "completions per prompt", 8)
    add("--max-new-tokens N", "longest completion, with --data", 256)
    add("--prompts-per-rollout N", "prompts per rollout (default: those of one step)", type=int)
    add("--kl-coef X", "weight of the KL penalty in the reward (default: the method's own)", type=float)
    add("--epochs-per-rollout N", "passes over each rollout", type=int)
    add = options.adder(parser.add_argument_group("head"))
    add("--tile-mib MIB", "memory for one tile of logits (default: the head decides)", type=float)
    add = options.adder(parser.add_argument_group("output"))
    add("--json FILE", "write the prediction to FILE")
    add("--plot FILE", "draw it as stacked bars into FILE, a PNG")
    about = "take three steps on the largest batch for real, with random weights, and compare; where the device is here"
    add("--verify", about, False)


def run(args: argparse.Namespace) -> int:
    """Predicts. Returns 1 if the run does not fit as asked."""
    from . import training

    args.model, args.seed, args.chat_template = args.named or SMOLLM2, 42, None
    checks.check(args)
    for name in ("json", "plot"):
        if getattr(args, name):
            check_writable(Path(getattr(args, name)).parent, f"--{name}")
    args.output_dir = None
    training.quiet(args)
    question, mean = _question(args)
    whole, found = answer(question, say=print, words=model_in_words(args), args=args)
    if mean is not None and whole.fits is not None:
        usual = whole.estimates.peak(dataclasses.replace(question, units=(mean,)))
        print(f"batches of mean length ({mean[0] + max(mean[1])} tokens): about {size(int(usual))}")
    if args.plot:
        from ..fit.table import plot

        plot(whole, Path(args.plot), f"{model_in_words(args)}, {question.method}")
    if args.json:
        write_json(Path(args.json), found)
    if args.verify:
        found["measured"] = _verify(whole, args)
        if args.json:
            write_json(Path(args.json), found)
    return 0 if whole.fits in (True, None) else 1


def answer(question: Question, *, say: Any, words: str, args: argparse.Namespace) -> tuple[Prediction, dict[str, Any]]:
    """Predicts, says what was found, and returns the prediction with all of it as JSON values."""
    from ..fit import predict, table

    _progress("predicting")
    whole = predict.predict(question)
    what = "all weights are trained" if question.full else "LoRA" if question.lora is not None else "the value head"
    precision = f"{question.dtype} mixed precision" if question.mixed else question.dtype
    bits = f", frozen weights in {question.quantize}" if question.quantize else ""
    rows = question.rows
    what_rows = (
        f"{question.batch_size} completions of up to {question.units[0][1][0]} tokens after {question.units[0][0]}"
        if question.command == "rl"
        else f"{len(rows)} units of up to {max(p + max(c, default=0) for p, c in rows)} tokens"
    )
    say(
        f"model      {words}: {what}, {precision}{bits}\n"
        f"run        xpo-fast {question.command}, {question.method}, micro-batch of {what_rows}, {question.optim}\n"
    )
    say(table.text(whole))
    say(f"\n{table.verdict(whole)}")
    found: dict[str, Any] = {"prediction": table.as_json(whole)}
    if whole.fits is None:
        return whole, found
    if whole.fits:
        if question.command != "rl" and (largest := predict.largest_batch(whole)) is not None:
            count = len(largest.question.rows)
            say(f"largest micro-batch of such rows: {count} units ({size(largest.peak)})")
            found["largest"] = table.as_json(largest)
        if question.command != "rl" and (longest := predict.longest_rows(whole)) is not None:
            say(f"longest rows, one unit at a time: {longest.question.longest} tokens ({size(longest.peak)})")
            found["longest"] = table.as_json(longest)
        found["command"] = command_line(question, args)
        say(f"\n{found['command']}")
        return whole, found
    proposal, alone = predict.propose(whole)
    say("\nwhat takes less, the cheapest first (each alone, estimated):")
    for change, peak in alone:
        say(f"  {change.what:<56} {size(peak):>10}   {change.cost}")
    found["changes"] = [{"what": change.what, "peak": peak, "cost": change.cost} for change, peak in alone]
    if proposal is None:
        say("nothing of it makes this run fit: take a smaller model, shorter rows (--max-length) or more memory")
        return whole, found
    found["proposal"] = table.as_json(proposal.prediction) | {"changes": [c.what for c, _ in proposal.changes]}
    found["command"] = command_line(proposal.prediction.question, args)
    say(f"\nfits with {', '.join(c.what for c, _ in proposal.changes)}: {table.verdict(proposal.prediction)}")
    say(table.text(proposal.prediction))
    say(f"\n{found['command']}")
    return whole, found


def command_line(question: Question, args: argparse.Namespace) -> str:
    """Returns the command that runs a question's run."""
    shape = getattr(args, "shape", None) or getattr(args, "params", None)
    model = f"MODEL-LIKE-{shape}" if shape else args.model
    data = list(getattr(args, "data", None) or ["DATA.jsonl"])
    words = ["xpo-fast", question.command, "--model", model, "--data", *data, "--method", question.method]
    for name, value in question.settings.items():
        words += ["--set", f"{name}={json.dumps(value) if isinstance(value, bool) else value}"]
    plain: list[tuple[str, Any, Any]] = [
        ("--dtype", question.dtype, None),
        ("--attn", question.attention, None),
        ("--quantize", question.quantize, None),
        ("--reference", question.reference, "auto"),
        ("--batch-size", question.batch_size, 8),
        ("--grad-accum", question.grad_accum, 1),
        ("--tokens-per-batch", question.tokens_per_batch, None),
        ("--optim", question.optim if args.optim or question.optim != "adamw_torch_fused" else None, None),
        ("--max-grad-norm", f"{question.max_grad_norm:g}", "1"),
        ("--layout", question.layout, "auto"),
        ("--tile-mib", question.tile_mib, None),
    ]
    if question.command == "rl":
        new = question.units[0][1][0]
        plain += [("--num-generations", question.generations, 8), ("--max-new-tokens", new, 256)]
    else:
        plain += [("--eval-batch-size", question.eval_batch_size, question.batch_size)]
        plain += [("--max-length", getattr(args, "max_length", 1024), 1024)]
    if question.lora is not None:
        plain += [("--lora-rank", question.lora.r, 16)]
    words += [str(x) for name, value, default in plain if value not in (None, default) for x in (name, value)]
    flags = {
        "--full": question.full,
        "--gradient-checkpointing": question.gradient_checkpointing,
        "--activation-offload": question.activation_offload,
        "--optimizer-in-backward": question.optimizer_in_backward,
    }
    return shlex.join([*words, *(name for name, given in flags.items() if given)])


def _question(args: argparse.Namespace) -> tuple[Question, tuple[int, tuple[int, ...]] | None]:
    """Returns the question, and the mean unit of --lengths or of the data; None for rl."""
    from ..data import KINDS
    from ..methods import METHODS
    from ..rewards.spec import USES, RewardSpec

    if args.data and args.lengths:
        raise UsageError("--data has lengths of its own: leave --lengths out")
    more: dict[str, Any] = {"ranks": args.ranks, "sharding": args.sharding}
    name = args.method.split("+")[0].split("*")[-1].strip()
    if name in USES and (name not in METHODS or METHODS[name].layout == "reward"):
        command, kind = "reward", KINDS[RewardSpec(method=name, objectives=_two(name)).kind]
        more["objectives"] = _two(name)
    elif name in METHODS and METHODS[name].layout == "policy":
        command, kind = "rl", None
        more |= rl_fields(args)
    else:
        from .train import checked_objective

        command, kind = "train", KINDS[checked_objective(args.method, dict(args.set)).data_kind]
    if args.data:
        units = _measured(args, kind)
        mean = units[len(units) // 2] if kind is not None else None
    else:
        low, high = args.lengths or _LENGTHS
        count = 1 if kind is None else args.completions if kind.listed else max(len(kind.completions), 1)
        mean, longest = ((n // 2, (n - n // 2,) * count) for n in (low, high))
        units = (longest,)
        mean = mean if kind is not None and low < high else None
        args.max_length = high
    try:
        return question_of(args, command, units, **more), mean
    except ValueError as error:
        raise UsageError(str(error)) from error


def _two(name: str) -> tuple[str, ...]:
    return ("first", "second") if name == "gated" else ("reward",)


def _measured(args: argparse.Namespace, kind: Any) -> Any:
    """Returns the units of --data in tokens of the model's own tokenizer. kind: of the data; None: prompts."""
    from .. import data

    if args.shape or args.params:
        raise UsageError("--data is measured by the model's tokenizer: name MODEL, or give --lengths")
    how = options.reading(args)
    if kind is None:
        return measured_prompts(args, data.load_prompts(args.data, alike=True, **how), args.max_new_tokens)
    limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length, "num_proc": args.num_proc}
    return measured(args, data.load(args.data, kind=kind.name, **how), kind.name, limits)


def _verify(whole: Prediction, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the largest batch for real, says how far the prediction is off, and returns what was measured."""
    import torch

    from ..fit.verify import STEPS, measure

    question = whole.question
    if question.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--verify runs on the device that is asked about, and there is no GPU here")
    _progress(f"taking {STEPS} steps for real")
    try:
        found = measure(dataclasses.replace(question, ranks=1))
    except (RuntimeError, TimeoutError) as error:
        raise UsageError(f"--verify: {error}") from error
    measured = found.get("reserved", found["peak"])
    held = whole.peak - (whole.largest.owners.get("CUDA context and kernels (assumed)", 0))
    off = held / measured - 1
    print(f"\nmeasured {size(measured)} ({found['what']}), predicted {size(held)}: {off:+.1%}")
    return found | {"predicted": held, "off": off}


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"{what} …", file=sys.stderr)
