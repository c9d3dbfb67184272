"""`xpo-fast merge`: merges a run's adapter into a folder that plain transformers loads, and checks what is written."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options, policies, training
from .parser import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_ROWS, _TOKENS = 4, 192  # that are scored before and after: rows, and the most tokens of one
_MOST_OFF = 0.02  # nats; a float32 model whose log-probs differ by more is not the adapter's


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast merge`."""
    parser = commands.add_parser(
        "merge",
        help="merge a run's adapter into a folder that plain transformers loads",
        description="Merge the adapter that a run trained into its base model, and write a folder that "
        "AutoModelForCausalLM.from_pretrained loads without this package or peft: weights, tokenizer, chat template, "
        "generation config. What was written is loaded again by transformers, and its log-probs of a few rows are "
        "compared with the adapter's. Of a reward model the folder is one that RewardModel.load reads.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="RUN", help="--output-dir of a run that trained an adapter")
    add = options.adder(parser)
    add("--output-dir DIR", "folder for the merged model", required=True)
    about = (
        "dtype of the merged weights; auto: the base model's, or float32 where its 16 bits would round away 2%% or more"
    )
    add("--dtype", f"{about} of the adapter's update, which a warning tells", "auto", choices=options.DTYPES)
    add("--max-shard-size SIZE", "largest file of weights", "5GB")
    add("--overwrite", "replace the model that is in --output-dir", False)
    add("--trust-remote-code", "run code that comes with a model of the hub", False)
    add("--debug", "show the traceback of an error", False)


@dataclass
class _Merged:
    """A model with an adapter, and how it is merged, written and scored.

    what, score: what a model computes for a few rows, (N,). load: the same of a folder that was written.
    """

    model: Any
    what: str
    score: Callable[[Any], Tensor]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Tensor]


def run(args: argparse.Namespace) -> int:
    """Merges, writes, and compares what was written."""
    import torch

    from ..files import appearing, size
    from ..models import folders_below, merge

    trained = policies.find(args.folder)
    if not trained.is_adapter:
        raise UsageError(
            f"{trained.folder} is no adapter but a whole model, which transformers loads as it is: there is nothing to "
            "merge"
        )
    output = Path(args.output_dir)
    _check_output(output, trained.folder, Path(args.folder), args.overwrite)
    training.quiet(args)
    for note in trained.notes:
        print(f"xpo-fast: {note}", file=sys.stderr)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        found = (_reward_model if trained.is_reward_model else _language_model)(args, trained.folder)
        for base, _ in folders_below(found.model):
            if _holds(output, base):
                raise UsageError(
                    f"--output-dir {output}: the base model in {base} would be deleted; name another folder"
                )
        before, loaded = found.score(found.model), str(found.model.dtype).removeprefix("torch.")
        merged = merge(found.model, widen=args.dtype == "auto")
    for warning in said:
        if issubclass(warning.category, UserWarning):
            print(f"xpo-fast: {warning.message}", file=sys.stderr)
    needed = sum(p.numel() * p.element_size() for p in merged.parameters())
    dtype, weights = str(merged.dtype).removeprefix("torch."), sum(p.numel() for p in merged.parameters())
    free = _free(output)
    if free < needed:
        raise UsageError(f"--output-dir {output} has room for {size(free)}, and the model takes {size(needed)}")
    with appearing(output) as part:
        found.save(merged, part)
        found.model = merged = None  # room for the model that is loaded
        after = found.load(part)
        off = (after - before).abs()
        exact = loaded == dtype == "float32"
        if not bool(torch.isfinite(off).all()) or (exact and float(off.max()) > _MOST_OFF):
            raise ValueError(
                f"the merged model does not compute what the adapter does: its {found.what} differ by up to "
                f"{float(off.max()):.3g}; nothing was written. Load the adapter with peft, and please report this"
            )
    print(f"{weights / 1e6:.1f}M weights in {dtype}, {size(needed)}, in {output}")
    print(
        f"{found.what} of {_ROWS} rows, {len(off)} values: they differ from the adapter's, computed in {loaded}, by at "
        f"most {float(off.max()):.2g}, on average by {float(off.mean()):.2g}"
    )
    if trained.is_reward_model:
        print(f"use it: from xpo_fast.rewards.model import RewardModel; RewardModel.load({str(output)!r})")
    else:
        if (trained.folder / "value_head.safetensors").is_file():
            print("the critic (value_head.safetensors) is not part of it")
        name = "AutoModelForCausalLM"
        print(f"use it: from transformers import {name}; {name}.from_pretrained({str(output)!r})")
    return 0


def _check_output(output: Path, adapter: Path, run: Path, overwrite: bool) -> None:
    """Raises UsageError for a folder that is not to be written, or whose replacement would delete something else."""
    from ..files import check_writable

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output-dir {output} is a file, not a folder: name another one")
    for other in (adapter, run):
        if _holds(output, other):
            raise UsageError(f"--output-dir {output} is, or holds, the run {other}: name another folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UsageError(f"--output-dir {output} is not empty: name another folder, or replace it with --overwrite")
        if not (output / policies.MODEL).is_file():
            raise UsageError(f"--overwrite replaces a model, and --output-dir {output} holds none: name another folder")
    check_writable(output, "--output-dir")


def _holds(output: Path, other: Path) -> bool:
    """Returns whether replacing the folder `output` would delete `other`."""
    return output.resolve() in (other.resolve(), *other.resolve().parents)


def _free(output: Path) -> int:
    from ..files import existing_part

    return shutil.disk_usage(existing_part(output)).free


def _language_model(args: argparse.Namespace, folder: Path) -> _Merged:
    from ..models import load_model

    model, tokenizer = load_model(str(folder), dtype=_dtype(args, folder), merge=False, **_code(args))
    rows = _rows(tokenizer)

    def save(merged: Any, part: Path) -> None:
        merged.save_pretrained(part, max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(part)

    def load(part: Path) -> Tensor:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        plain = AutoModelForCausalLM.from_pretrained(part, dtype="auto", **_code(args))
        AutoTokenizer.from_pretrained(part, **_code(args))
        return _logps(plain, rows)

    return _Merged(model, "log-probs", lambda given: _logps(given, rows), save, load)


def _reward_model(args: argparse.Namespace, folder: Path) -> _Merged:
    from .. import demo_data
    from ..data import load
    from ..models.value_head import save_value_head
    from ..rewards.model import RewardModel
    from ..rewards.spec import save_spec

    scorer = RewardModel.load(folder, dtype=_dtype(args, folder), **_code(args))
    tokenizer, spec = scorer.tokenizer, scorer.spec
    pairs: list[Any] = list(load(str(demo_data.PAIRS), kind="pair"))[:_ROWS]
    prompts = [row["prompt"] for row in pairs for _ in range(2)]
    answers = [row[name] for row in pairs for name in ("chosen", "rejected")]
    if not tokenizer.chat_template:
        prompts = [prompt[-1]["content"] for prompt in prompts]
        answers = [answer[-1]["content"] for answer in answers]

    def scores(model: RewardModel) -> Tensor:
        return model.outputs(prompts, answers).flatten()

    def save(merged: Any, part: Path) -> None:
        from ..models import remove_fused_loss

        remove_fused_loss(merged)
        merged.save_pretrained(part, max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(part)
        save_value_head(merged, part)
        save_spec(spec, part)

    def score(model: Any) -> Tensor:
        return scores(RewardModel(model, tokenizer, spec))

    return _Merged(scorer.model, "outputs", score, save, lambda part: scores(RewardModel.load(part)))


def _code(args: argparse.Namespace) -> dict[str, Any]:
    return {"trust_remote_code": True} if args.trust_remote_code else {}


def _dtype(args: argparse.Namespace, folder: Path) -> Any:
    """Returns the dtype to load in: for auto that of the base model's checkpoint, whatever the device prefers."""
    from ..models.adapters import MODEL, chain

    adapters, base = chain(str(folder), {})
    if args.dtype != "auto" or len(adapters) > 1:  # of several, each is merged by itself, and may widen the model
        return args.dtype
    from transformers import AutoConfig

    from ..models import SMOLLM2, smollm2_path

    path = str(smollm2_path()) if base.lower() == SMOLLM2 else base.removesuffix(f"/{MODEL}")
    saved: Any = AutoConfig.from_pretrained(path, **_code(args)).get_text_config().dtype
    return saved or "float32"


def _rows(tokenizer: Any) -> list[list[int]]:
    """Returns the token ids of a few texts, as training reads them."""
    from .. import demo_data
    from ..data import load
    from ..rollout import encode_prompts

    pairs: list[Any] = list(load(str(demo_data.PAIRS), kind="pair"))[:_ROWS]
    talks = [[*row["prompt"], *row["chosen"]] for row in pairs]
    if not tokenizer.chat_template:
        talks = ["\n".join(message["content"] for message in talk) for talk in talks]
    return [ids[:_TOKENS] for ids in encode_prompts(talks, tokenizer)]


def _logps(model: Any, rows: list[list[int]]) -> Tensor:
    """Returns the log-prob of each token but a row's first, (N,) float32, from the model's own logits."""
    import torch

    from .. import gather_logps
    from ..models.modes import evaluating

    found = []
    with evaluating(model):
        for ids in rows:
            row = torch.tensor([ids], device=model.device)
            logits = model(input_ids=row).logits[:, :-1]
            found.append(gather_logps(logits.float(), row[:, 1:]).flatten().cpu())
    return torch.cat(found)
