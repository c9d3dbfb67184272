"""`xpo-fast rahf`: aligns a model's hidden states with what is preferred (representation engineering)."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, loading, options, resuming, training
from .parser import UsageError

if TYPE_CHECKING:
    from ..trainer import XPOConfig

_SHOWN = {
    "distance to the aligned states": ("eval_mse", ".5f"),
    "distance of the base's states": ("eval_signal", ".5f"),
}


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast rahf`."""
    parser = commands.add_parser(
        "rahf",
        help="align a model's hidden states with what is preferred",
        description="Train adapters to know what is preferred and what is not, take the difference of their hidden "
        "states, and train an adapter that adds it to the model's own (RAHF, arXiv 2312.15997).",
    )
    parser.set_defaults(run=run)
    options.add_config(parser, dry_run=False)
    group = options.add_data(parser, data="rows of prompt, chosen, rejected; text or messages")
    options.add_lengths(group)
    options.add_score(group)
    group = parser.add_argument_group("method")
    add = options.adder(group)
    about = "where the difference comes from: one adapter under two instructions, or an adapter for each side of pairs"
    add("--signal", about, "dual", choices=("single", "dual"))
    add("--prefer FILE|TEXT", "the instruction of single for chosen completions (default: one of a sentence)")
    add("--avoid FILE|TEXT", "the instruction of single for rejected completions (default: one of a sentence)")
    add("--alpha X", "how many times the difference is added", 1.0)
    about = "comma-separated layers of the decoder whose outputs are matched, from 0 (default: the middle third)"
    add("--layers NUMBERS", about, type=_layers)
    options.add_option(group, "--signal-lr RATE", "learning rate of the signal's adapters", 5e-4)
    options.add_model(parser)
    options.add_optimisation(
        parser, lr="1e-4", batch="pairs per batch and device", seed="seed of order, held-out rows and adapters"
    )
    options.add_output(parser, folder="xpo-fast-rahf", files="signal/, train_log.jsonl and results.json")


def _layers(text: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers of layers with commas between, got {text!r}") from error


def run(args: argparse.Namespace) -> int:
    """Trains the signal's adapters and then the model's, or goes on with whichever was stopped."""
    if args.full or args.quantize or args.tokens_per_batch or args.layout not in ("auto", "padded"):
        unread = {"--full": args.full, "--quantize": args.quantize, "--tokens-per-batch": args.tokens_per_batch}
        named = [name for name, given in unread.items() if given] or [f"--layout {args.layout}"]
        raise UsageError(f"{named[0]}: rahf trains adapters on padded rows of whole weights: leave it out")
    if args.signal == "dual" and (args.prefer or args.avoid):
        raise UsageError("--prefer and --avoid are the instructions of --signal single: leave them out")
    prefer, avoid = loading.read_context(args.prefer), loading.read_context(args.avoid)
    lr = 1e-4
    checks.check_training(args, training.training_arguments(args, lr=lr, evaluates=False))
    checkpoint, signal_folder = _checkpoint(args), Path(args.output_dir) / "signal"
    training.quiet(args)

    from .. import data
    from ..trainer.representation import INSTRUCTIONS, RepresentationConfig, RepresentationTrainer, Signal, train_signal

    how = options.reading(args)
    rows, held = data.load(args.data, kind="pair", **how), None
    if args.eval_data:
        held = data.load(args.eval_data, kind="pair", **how)
    else:
        rows, held = loading.hold_out(args, rows)
    encoding: dict[str, Any] = {
        "max_length": args.max_length,
        "max_prompt_length": args.max_prompt_length,
        "score": args.score,
        "dataset_num_proc": args.num_proc,
        "chat_template_kwargs": options.kwargs_of(args),
    }
    common = training.training_arguments(args, lr=lr, evaluates=held is not None)
    common["on_no_signal"] = args.on_no_signal
    config = RepresentationConfig(
        alpha=args.alpha, layers=args.layers, preflight="off", **encoding, **options.levers(args), **common
    )
    made_with = resuming.made_with(args, checkpoint, rows, {"signal": args.signal}, lr=lr)
    model, tokenizer = loading.load(args)
    config.layers_in(model)  # a mistake in --layers is reported before anything is trained
    if args.overwrite and not args.resume:
        shutil.rmtree(signal_folder, ignore_errors=True)

    def sft(folder: Path) -> XPOConfig:
        from ..trainer import XPOConfig

        further = {"output_dir": str(folder), "learning_rate": args.signal_lr, "eval_strategy": "no"}
        own = {**common, **further, "push_to_hub": False}
        return XPOConfig(method="sft", preflight="off", **encoding, **options.levers(args), **own)

    instructions = (prefer or INSTRUCTIONS[0], avoid or INSTRUCTIONS[1])
    lora = loading.lora(args)
    folders = train_signal(
        lambda: loading.load(args)[0],
        tokenizer,
        rows,
        sft,
        lora,
        signal_folder,
        kind=args.signal,
        instructions=instructions,
    )
    trainer = RepresentationTrainer(
        model,
        config,
        signal=Signal.load(model, folders, instructions if args.signal == "single" else None),
        train_dataset=rows,
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[training.json_log(args)],
    )
    trainer.given |= made_with
    say = training.printer(trainer)
    say(
        f"model      {args.model}, {training.weights(trainer.model, full=False)[1]} weights trained\n"
        f"data       {options.sources(args, rows)}: {len(rows)} pairs to train on, {0 if held is None else len(held)} "
        f"held out\nsignal     {args.signal}, of {', '.join(map(str, folders.values()))}\n"
        f"states     layers {', '.join(map(str, trainer.layers))}, alpha {args.alpha:g}"
    )
    results = training.report_header(args)
    if held is not None:
        results["before"] = trainer.held_out()
    training.fit(trainer, args, "rahf", checkpoint, results)
    if held is not None:
        results["after"] = trainer.held_out()
        training.print_held_out(say, f"held out: {len(held)} pairs", results, _SHOWN)
    training.finish(trainer, results, "the adapter, signal/, train_log.jsonl")
    return 0


def _checkpoint(args: argparse.Namespace) -> str | None:
    """Returns the checkpoint of the last stage to go on from, or None. Raises UsageError as `resuming.checkpoint`."""
    output = Path(args.output_dir)
    if (output / "signal").is_dir():
        if args.resume == "last":
            args.resume = resuming.AUTO  # it may have been stopped while the signal was trained
        if args.resume is None and not args.overwrite:
            raise UsageError(
                f"{output} has the signal of an earlier run: --resume goes on with it, --overwrite starts anew, "
                "--output-dir names another place"
            )
    return resuming.checkpoint(args)
