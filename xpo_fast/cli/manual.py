"""`xpo-fast help`: prints the help of a command, or of all of them as docs/commands.md."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from ..wording import did_you_mean
from .aliases import ALIASES, REFUSALS
from .parser import Parser, UsageError, has_default, option
from .typed import loss_types

REGENERATE = "xpo-fast help --markdown > docs/commands.md"

# An example for each group of options, and for options that need one.
EXAMPLES = {
    "configuration": "xpo-fast train --config run.yaml --lr 1e-5",
    "data": "xpo-fast train --data pairs.jsonl --eval-split 0.1",
    "method": "xpo-fast train --data pairs.jsonl --method simpo --set gamma=0.5",
    "model": "xpo-fast train --data pairs.jsonl --model smollm2-135m --lora-rank 32",
    "optimisation": "xpo-fast train --data pairs.jsonl --lr 2e-5 --epochs 2 --batch-size 4 --grad-accum 4",
    "head": "xpo-fast train --data pairs.jsonl --tile-mib 64",
    "output": "xpo-fast train --data pairs.jsonl --output-dir runs/1 --save-steps 100",
    "rewards": "xpo-fast rl --data prompts.jsonl --reward rewards.py:short=0.5 --reward-model xpo-fast-reward",
    "rollouts": "xpo-fast rl --data prompts.jsonl --reward rewards.py:short --num-generations 8 --max-new-tokens 128",
    "recipe": "xpo-fast recipe rso --data prompts.jsonl --judge reward:xpo-fast-reward --set iterations=2",
    "model and optimisation": "xpo-fast recipe rso --data prompts.jsonl --judge reward:xpo-fast-reward --lr 1e-5",
    "measure": "xpo-fast evaluate ranking xpo-fast-out --data pairs.jsonl --beta 0.1 --beta 1",
    "filters": "xpo-fast methods --where data=unpaired",
    "options": "xpo-fast eval-reward --data pairs.jsonl --model xpo-fast-reward --policy xpo-fast-out",
    "--config": "xpo-fast train --config xpo-fast-out/config.yaml --output-dir again",
    "--preflight": "xpo-fast train --data pairs.jsonl --preflight stop",
    "--on-no-signal": "xpo-fast rl --data prompts.jsonl --reward rewards.py:short --on-no-signal stop",
    "--dry-run": "xpo-fast train --data pairs.jsonl --dry-run",
    "--set": "xpo-fast train --data pairs.jsonl --set beta=0.05 (or: --beta 0.05)",
    "--train": "xpo-fast train --data pairs.jsonl --train adam_beta2=0.95 (or: --adam_beta2 0.95)",
    "--optim": "xpo-fast train --data pairs.jsonl --optim adamw_8bit",
    "--warmup-steps": "xpo-fast train --data pairs.jsonl --warmup-steps 50",
    "--quantize": "xpo-fast train --data pairs.jsonl --model Qwen/Qwen3-8B --quantize 4bit --dtype bfloat16",
    "--activation-offload": "xpo-fast train --data pairs.jsonl --gradient-checkpointing --activation-offload",
    "--optimizer-in-backward": "xpo-fast train --data pairs.jsonl --full --optimizer-in-backward --max-grad-norm 0",
    "--group-by-length": "xpo-fast train --data pairs.jsonl --group-by-length",
    "--resume": "xpo-fast train --config xpo-fast-out/config.yaml --resume",
    "--push-to-hub": "xpo-fast train --data pairs.jsonl --push-to-hub me/my-model --hub-private",
    "--hub-private": "xpo-fast train --data pairs.jsonl --push-to-hub --hub-private",
}


def add_parser(commands: Any, whole: Parser) -> None:
    """Adds `xpo-fast help`. whole: the parser that has the commands."""
    parser = commands.add_parser("help", help="the help of a command")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="a command; none: the list of them")
    parser.add_argument("--markdown", action="store_true", help="all commands with all options, in Markdown")
    parser.set_defaults(run=partial(run, whole, commands.choices))


def run(whole: Parser, commands: dict[str, Parser], args: argparse.Namespace) -> int:
    """Prints the help that is asked for."""
    if args.markdown:
        print(markdown(commands), end="")
    elif args.command is None:
        whole.print_help()
    elif args.command in commands:
        commands[args.command].print_help()
    else:
        raise UsageError(f"no command named {args.command!r}{did_you_mean(args.command, commands)}")
    return 0


def markdown(commands: dict[str, Parser]) -> str:
    """Returns docs/commands.md."""
    parts = [_OPENING.format(regenerate=REGENERATE)]
    for name, parser in commands.items():
        parts.append(f"## xpo-fast {name}\n\n{_text(parser.description or '')}".rstrip() + "\n")
        told: set[str] = set()  # an example is shown once per command
        for group in parser._action_groups:
            actions = [a for a in group._group_actions if a.dest != "help"]
            if actions:
                parts.append(_group(str(group.title), actions, name, parser, told))
        if parser.settings:
            rows = "\n".join(f"| `{key}={s.metavar}` | {_text(s.about)}. |" for key, s in parser.settings.items())
            parts.append(
                f"### settings, each as --set NAME=VALUE\n\n| setting | what it does |\n| --- | --- |\n{rows}\n"
            )
    return "\n".join(parts) + "\n" + _names_elsewhere()


def _group(title: str, actions: list[argparse.Action], command: str, parser: Parser, told: set[str]) -> str:
    example = EXAMPLES.get(title)
    lines = [f"### {title}\n"] if title not in ("options", "positional arguments") else []
    if example and command in example.split()[1:2]:
        lines.append(f"    {example}\n")
    elif example and title in _SHARED and command in _BEGINNINGS and _has_all(parser, example):
        lines.append(f"    {example.replace('xpo-fast train --data pairs.jsonl', _BEGINNINGS[command])}\n")
    lines += ["| option | what it does |", "| --- | --- |"]
    for action in actions:
        about = _help(action)
        name = option(action)
        if name in EXAMPLES and command in EXAMPLES[name].split()[1:2] and name not in told:
            told.add(name)
            about += f" Example: `{EXAMPLES[name]}`"
        lines.append(f"| {_usage(action)} | {about} |")
    return "\n".join(lines) + "\n"


# Groups that commands share, and how their examples begin for commands other than train.
_SHARED = ("configuration", "data", "model", "optimisation", "head", "output")
_BEGINNINGS = {
    "reward": "xpo-fast reward --data pairs.jsonl",
    "rl": "xpo-fast rl --data prompts.jsonl --reward rewards.py:short",
}


def _has_all(parser: Parser, example: str) -> bool:
    """Returns whether the command has every option of an example."""
    return all(parser.named(word) for word in example.split() if word.startswith("--"))


def _usage(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = ""
    if action.nargs != 0:
        shown = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
        value = f" [{shown}]" if action.nargs == "?" else f" {shown}"
    return _text(f"`{option(action)}{value}`")


def _help(action: argparse.Action) -> str:
    about = action.help or ""
    return _text(about + (f" (default: {action.default})" if has_default(action) else "")) + "."


def _text(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|")


def _names_elsewhere() -> str:
    rows = "\n".join(f"| `{name}` | {_text(alias.becomes)} |" for name, alias in ALIASES.items())
    refused = "\n".join(
        f"| {', '.join(f'`{name}`' for name in sorted(names.split()))} | {_text(what)} |"
        for what, names in REFUSALS.items()
    )
    losses = "\n".join(f"| `{theirs}` | `{ours}` |" for theirs, ours in loss_types().items())
    return _ELSEWHERE.format(rows=rows, refused=refused, losses=losses)


_OPENING = """# Commands

Every command and every option, as `xpo-fast COMMAND --help` shows them. Made by `{regenerate}`.

- An option may be written with underscores (`--batch_size 4`), and its value after `=` (`--batch-size=4`). A switch
  takes `true` or `false` as well (`--full true`), or `--no-` before its name.
- `--config run.yaml` reads any option by its name; a list for one that may be repeated, a mapping for `set`, `train`:

      data: pairs.jsonl
      method: simpo
      set: {{beta: 2.0, gamma: 0.5}}
      lr: 1e-5
      lora-targets: [q_proj, v_proj]

  The command line wins. Names of TRL and transformers are understood there, too. Each run writes its own `config.yaml`
  into `--output-dir` (without `--api-key`), and `xpo-fast train --config OUT/config.yaml --output-dir OUT2` repeats it.
- A hyperparameter of the method is an option of `train`, `reward` and `rl`: `--beta 0.05` is `--set beta=0.05`. If the
  command has an option of that name itself (`--gamma` of `rl`, the discount), write `--set`.
- `xpo-fast rl --help` shows the options that most runs need, and `--help-all` every one, with the settings of `--set`.
- Names of TRL 1.16 and transformers are accepted if they mean the same, see
  [below](#names-from-trl-and-transformers).
- Tab completion: `xpo-fast completion bash > ~/.local/share/bash-completion/completions/xpo-fast`; for zsh a file
  `_xpo-fast` in a folder of `$fpath`; for fish `~/.config/fish/completions/xpo-fast.fish`.
"""

_ELSEWHERE = """## Names from TRL and transformers

On the command line and in a configuration file. A name that cannot be honoured exactly is refused. One name is the same
and means something else: bfloat16 or float16 as `--dtype` with an adapter is the dtype of the frozen weights. Defaults
are those of the commands here.

| there | here |
| --- | --- |
{rows}

`--loss_type` of the trainers on preferences is `--method` here (several: their sum, with `--loss_weights`); `sppo_hard`
also sets `variant=hard`. docs/conversions.md converts their hyperparameters. GRPO's names are the same.

| `loss_type` | `--method` |
| --- | --- |
{losses}

Refused, with what to do instead:

| there | here |
| --- | --- |
{refused}
"""
