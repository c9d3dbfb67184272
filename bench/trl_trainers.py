"""Compares TRL's trainers with and without this engine: the numbers that they log, their times and their memory.

    python bench/trl_trainers.py equal --json bench/results/trl-cpu.json
    python bench/trl_trainers.py time --json bench/results/trl-cpu.json

equal: each trainer with each loss type trains a tiny random model for twenty steps, without and with `install()` (the
experimental trainers: TRL's class and ours). Every number that both log is compared: |theirs − ours| / max(1,
|theirs|).
time: each trainer with one loss type trains SmolLM2-135M on the packaged pairs. Twenty steps are compared in the same
way. In another run, theirs and ours alternate from step to step, which gives the median times of a step, and of TRL's
function of the head and its replacement, forward and backward. Peak memory is that of one step, by torch's CPU
allocator.

Exit status 1: a difference is above 1e-4. Each command writes its part of the file, case by case, and keeps the other.
Everything is in float32. AsyncGRPO trains on samples drawn beforehand in place of a vLLM server's, with plain attention
in place of FlashAttention 3, which needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import logging
import math
import os
import queue
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from xpo_fast.bench.measure import environment, peak_allocated_mib, read_json, table
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import write_json
from xpo_fast.integrations import trl as engine
from xpo_fast.integrations.trl.head import HeadStatistics
from xpo_fast.models import SMOLLM2, load_model

TOLERANCE = 1e-4
STEPS = 20
VOCAB = 97
NOT_COMPARED = ("epoch", "step", "step_time")
TIMES = "perf/"  # prefix of the times that AsyncGRPO logs


@dataclass(frozen=True)
class Case:
    """A trainer with a loss."""

    trainer: str
    label: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.trainer} {self.label}"

    @property
    def experimental(self) -> bool:
        """Returns whether this package has a subclass of the trainer, which is in TRL's experimental part."""
        return self.trainer in ("CPO", "ORPO", "TPO", "OnlineDPO")

    @property
    def kind(self) -> str:
        """Returns the kind of `dataset` that the trainer takes."""
        kinds = {"SFT": "sft", "KTO": "unpaired", "TPO": "triple"}
        kinds |= dict.fromkeys(("GRPO", "RLOO", "AsyncGRPO", "OnlineDPO"), "prompt")
        return kinds.get(self.trainer, "pair")


def _cases() -> Iterator[Case]:
    for loss in ("nll", "dft"):
        yield Case("SFT", loss, {"loss_type": loss})
    for loss in engine.DPO_LOSS_TYPES:
        smoothing = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust", "aot") else {}
        yield Case("DPO", loss, {"loss_type": loss, **smoothing})
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        yield Case("DPO", divergence, {"f_divergence_type": divergence})
    yield Case("DPO", "ld_alpha", {"ld_alpha": 0.5})
    yield Case("DPO", "WPO", {"use_weighting": True})
    yield Case("DPO", "sum", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]})
    for loss in ("kto", "apo_zero_unpaired"):
        yield Case("KTO", loss, {"loss_type": loss})
    for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        level = {"importance_sampling_level": "sequence"} if loss == "luspo" else {}
        cap = {"epsilon_high": 5.0} if loss == "cispo" else {}
        yield Case("GRPO", loss, {"loss_type": loss, **level, **cap})
    yield Case("GRPO", "beta", {"beta": 0.04})
    yield Case("GRPO", "entropy", {"entropy_coef": 0.01})
    yield Case("RLOO", "rloo", {})
    yield Case("AsyncGRPO", "grpo", {})
    for loss in ("sigmoid", "hinge", "ipo", "simpo", "alphapo"):
        yield Case("CPO", loss, {"loss_type": loss, **({"cpo_alpha": 0.0} if loss == "simpo" else {})})
    yield Case("ORPO", "orpo", {})
    for loss in ("sigmoid", "hinge", "ipo", "tpo-l"):
        yield Case("TPO", loss, {"loss_type": loss})
    yield Case("TPO", "without NLL", {"tpo_alpha": 0.0, "label_smoothing": 0.1})
    for loss in ("sigmoid", "ipo"):
        yield Case("OnlineDPO", loss, {"loss_type": loss})


CASES = {str(case): case for case in _cases()}


def classes(case: Case, ours: bool) -> tuple[type, type]:
    """Returns the class of the trainer and that of its config."""
    name = case.trainer
    folders = {"CPO": "cpo", "ORPO": "orpo", "TPO": "tpo", "OnlineDPO": "online_dpo", "AsyncGRPO": "async_grpo"}
    if name not in folders:
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    module = importlib.import_module(f"trl.experimental.{folders[name]}")
    owner = engine if ours and case.experimental else module
    return getattr(owner, f"{name}Trainer"), getattr(module, f"{name}Config")


# --- models and data --------------------------------------------------------------------------------------------------

_WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words, "w0" to "w93"."""
    ids = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", *_WORDS])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


def tiny_model(seed: int = 0, **config: Any) -> Any:
    """Returns a random Llama of one layer, with logits so large that no loss is flat."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "bos_token_id": None,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **config}))


def tiny_pairs(count: int = 24) -> list[dict[str, str]]:
    """Returns preference pairs of random words."""
    g = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=g))
        return " ".join(_WORDS[i] for i in torch.randint(len(_WORDS), (length,), generator=g).tolist())

    names = ("prompt", "chosen", "rejected")
    return [{n: words(2, 6) if n == "prompt" else f" {words(1, 9)}" for n in names} for _ in range(count)]


def demo_pairs(count: int = 32) -> list[dict[str, Any]]:
    """Returns the packaged pairs with the shortest completions."""
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]

    def characters(row: dict[str, Any]) -> int:
        return sum(len(message["content"]) for part in row.values() for message in part)

    return sorted(rows, key=characters)[:count]


def dataset(pairs: list[dict[str, Any]], kind: str) -> datasets.Dataset:
    """Returns pairs as data of a kind."""
    rows: list[dict[str, Any]] = []
    for k, row in enumerate(pairs):
        if kind == "sft":
            rows.append({"prompt": row["prompt"], "completion": row["chosen"]})
        elif kind == "unpaired":
            side = "chosen" if k % 3 else "rejected"
            rows.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
        elif kind == "prompt":
            rows.append({"prompt": row["prompt"]})
        else:
            rows.append(row | ({"reference": pairs[k - 1]["chosen"]} if kind == "triple" else {}))
    return datasets.Dataset.from_list(rows)


def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns a number per sample that differs between samples."""
    return [sum(i % 7 for i in ids) / max(1, len(ids)) for ids in completion_ids]


class Rollouts:
    """Samples in place of a vLLM server's: AsyncGRPO's rollout worker, and the receiver of its weights."""

    def __init__(self, groups: int = 2 * STEPS) -> None:
        self.groups = groups
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()

    def start(self) -> None:
        """Puts four samples of each group into the buffer."""
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        g = torch.Generator().manual_seed(0)
        for group in range(self.groups):
            prompt = torch.randint(3, VOCAB, (4,), generator=g)
            for k in range(4):
                length = int(torch.randint(1, 9, (), generator=g))
                ids = torch.cat([prompt, torch.randint(3, VOCAB, (length,), generator=g)])
                old = -math.log(VOCAB) - torch.randn(len(ids), generator=g)
                mask = (torch.arange(len(ids)) >= len(prompt)).long()
                sample = RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=ids.numpy(),
                    completion_mask=mask.numpy(),
                    old_log_probs=old.numpy(),
                    advantage=k - 1.5,
                    model_version=0,
                    group_id=group,
                    metrics={},
                )
                self.rollout_buffer.put(sample)

    def check_health(self, stale_after_s: float) -> None:
        """Raises RuntimeError, since the trainer calls this only if the buffer is empty."""
        raise RuntimeError(f"all samples of the {self.groups} groups are used: make more groups")

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Takes the weights without using them."""
        for _ in iterator:
            pass

    def nothing(self, *_: Any) -> None:
        """Does nothing."""

    stop = update_model_version = init_weight_transfer = pause = resume = destroy = nothing


class PlainAttention:
    """Replaces FlashAttention 3 by torch's attention for AsyncGRPO's packed rows."""

    @staticmethod
    def flash_attn_varlen_func(
        query: torch.Tensor,  # (Q, heads, d)
        key: torch.Tensor,  # (K, key heads, d)
        value: torch.Tensor,  # (K, key heads, d)
        cu_seqlens_q: torch.Tensor,  # (S + 1,)
        cu_seqlens_k: torch.Tensor,  # (S + 1,)
        *_: int,
        softmax_scale: float,
        **__: Any,
    ) -> torch.Tensor:
        """Computes causal attention within each packed row: (Q, heads, d)."""
        rows = []
        ends = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
        for (a, b), (c, d) in ends:
            q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
            rows.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True
                ).transpose(0, 1)
            )
        return torch.cat(rows)


def async_grpo(options: dict[str, Any], extra: dict[str, Any]) -> None:
    """Makes AsyncGRPO run here: `Rollouts` for its server, and without the calls that need a GPU."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    packing._flash_attn = lambda: PlainAttention
    device: Any = async_grpo_trainer
    device.get_peak_flops_per_device = lambda *_: None
    # token_budget=0: the server is not asked for it. max_staleness: all samples are of the first policy.
    options |= {"token_budget": 0, "max_staleness": STEPS}
    extra["rollout_worker"] = extra["weight_transfer"] = Rollouts()


# --- runs -------------------------------------------------------------------------------------------------------------


def make_trainer(
    case: Case,
    ours: bool,
    model: Any,
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    folder: str | Path,
    *,
    ref_model: Any = None,
    batch: int = 4,
    tokens: int = 8,
    **arguments: Any,
) -> Any:
    """Returns a trainer on `pairs` in float32 that logs every step. tokens: the number sampled per completion."""
    trainer, config = classes(case, ours)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "report_to": [],
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "seed": 3,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": True,
    }
    extra: dict[str, Any] = {}
    if case.kind == "prompt":
        options["remove_unused_columns"] = False
        options |= {"max_new_tokens" if case.trainer == "OnlineDPO" else "max_completion_length": tokens}
        options |= {} if case.trainer == "OnlineDPO" else {"num_generations": 2}
        extra["reward_funcs"] = reward
    if case.trainer in ("CPO", "ORPO"):
        options["max_length"] = 128
    if case.trainer in ("DPO", "KTO", "OnlineDPO"):
        extra["ref_model"] = ref_model
    elif ref_model is not None and case.trainer in ("GRPO", "RLOO"):  # they load one by the policy's name
        model.config._name_or_path = str(Path(folder) / "reference")
        ref_model.save_pretrained(model.config._name_or_path)
    if case.trainer == "AsyncGRPO":
        async_grpo(options, extra)
        model.save_pretrained(Path(folder) / "policy")
        model = str(Path(folder) / "policy")  # it takes only paths
    args = config(**{**options, **case.arguments, **arguments})
    made = trainer(model=model, args=args, train_dataset=dataset(pairs, case.kind), processing_class=tokenizer, **extra)
    made.remove_callback(transformers.PrinterCallback)
    return made


def train(trainer: Any, ours: bool) -> list[dict[str, float]]:
    """Trains and returns the log of each step. ours: with `install()`, which does not affect experimental trainers."""
    torch.manual_seed(0)
    with engine.install() if ours else contextlib.nullcontext():
        trainer.train()
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


def difference(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> tuple[float, str, int]:
    """Returns the largest |theirs − ours| / max(1, |theirs|), the name of that number, and how many were compared."""
    worst, where, count = 0.0, "", 0
    if len(theirs) != len(ours):
        return math.inf, "steps", 0
    for a, b in zip(theirs, ours, strict=True):
        if a.keys() != b.keys():
            return math.inf, ", ".join(sorted(a.keys() ^ b.keys())), 0
        for name in a:
            if name.endswith(NOT_COMPARED) or name.startswith(TIMES):
                continue
            count += 1
            if math.isnan(a[name]) and math.isnan(b[name]):
                continue
            error = abs(a[name] - b[name]) / max(1.0, abs(a[name]))
            if not error <= worst:
                worst, where = error if error == error else math.inf, name
    return worst, where, count


def compare_tiny(case: Case, steps: int) -> dict[str, Any]:
    """Trains the tiny model with theirs and ours, and returns the record of their difference."""
    logs = []
    for ours in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                case,
                ours,
                tiny_model(),
                tiny_tokenizer(),
                tiny_pairs(),
                folder,
                ref_model=tiny_model(1),
                max_steps=steps,
            )
            logs.append(train(trainer, ours))
    worst, where, count = difference(*logs)
    return {"case": str(case), "steps": steps, "numbers": count, "difference": worst, "where": where}


# --- time and memory --------------------------------------------------------------------------------------------------

_TIMED = ("SFT nll", "DPO sigmoid", "KTO kto", "GRPO dapo", "RLOO rloo", "CPO simpo", "ORPO orpo", "TPO sigmoid")
TIMED = [CASES[name] for name in (*_TIMED, "OnlineDPO sigmoid")]
LAYERS = 2  # last layers of SmolLM2 that are trained, unless the whole model is


class Alternation(transformers.TrainerCallback):
    """Alternates between theirs and ours from step to step, and records the seconds of a step and in the head."""

    def __init__(self, trainer: Any, theirs: type) -> None:
        self.trainer, self.classes = trainer, (theirs, type(trainer))
        self.steps: tuple[list[float], list[float]] = ([], [])
        self.loss: tuple[list[float], list[float]] = ([], [])
        self._start = self._in_loss = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switches between ours and theirs, and starts the clock."""
        ours = state.global_step % 2
        engine.install() if ours else engine.uninstall()
        self.trainer.__class__ = self.classes[ours]
        self._start, self._in_loss = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Records the times of the step."""
        ours = (state.global_step - 1) % 2  # global_step has been increased
        self.steps[ours].append(time.perf_counter() - self._start)
        self.loss[ours].append(self._in_loss)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, which then adds its time to that of the step's loss."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._in_loss += time.perf_counter() - start
            return result

        return call


def alternate(trainer: Any, theirs: type) -> Alternation:
    """Trains with theirs and ours in turn and returns their times."""
    timer = Alternation(trainer, theirs)
    trainer.add_callback(timer)
    owners = (ChunkedLogProbFunction, HeadStatistics)
    saved = [(owner, name, owner.__dict__[name]) for owner in owners for name in ("forward", "backward")]
    for owner, name, function in saved:
        setattr(owner, name, staticmethod(timer.timed(function.__func__)))
    try:
        torch.manual_seed(0)
        trainer.train()
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)
        engine.uninstall()
    return timer


def smollm2(whole: bool) -> Any:
    """Returns SmolLM2-135M in float32 and its tokenizer. whole: all of it is trained, not its last layers only."""
    torch.manual_seed(0)
    model, tokenizer = load_model(SMOLLM2, dtype="float32")
    model.requires_grad_(whole)
    model.model.layers[-LAYERS:].requires_grad_(True)
    return model, tokenizer


def measure_case(case: Case, whole: bool, steps: int) -> dict[str, Any]:
    """Trains SmolLM2 with theirs, ours and both in turn, and returns the record of difference, times and memory."""
    batch = 2 if case.kind in ("pair", "triple") else 4

    def made(ours: bool, max_steps: int, folder: str) -> Any:
        model, tokenizer = smollm2(whole)
        ref = smollm2(whole)[0] if case.trainer in ("DPO", "KTO", "OnlineDPO") else None
        options = {"batch": batch, "tokens": 16, "max_steps": max_steps, "learning_rate": 1e-5}
        return make_trainer(case, ours, model, tokenizer, demo_pairs(), folder, ref_model=ref, **options)

    logs, peaks = [], []
    for ours in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            logs.append(train(made(ours, steps, folder), ours))
            trainer = made(ours, 1, folder)
            peaks.append(peak_allocated_mib(functools.partial(train, trainer, ours))[0])
    with tempfile.TemporaryDirectory() as folder:
        timer = alternate(made(True, 2 * min(steps, 8), folder), classes(case, False)[0])
    worst, where, count = difference(*logs)
    record: dict[str, Any] = {
        "case": str(case),
        "trained": "all" if whole else f"last {LAYERS} layers",
        "steps": steps,
        "numbers": count,
        "difference": worst,
        "where": where,
    }
    for ours, who in enumerate(("theirs", "ours")):
        record[f"step_ms_{who}"] = 1e3 * statistics.median(timer.steps[ours][1:])
        record[f"peak_mib_{who}"] = peaks[ours]
        if not case.experimental:
            record[f"loss_ms_{who}"] = 1e3 * statistics.median(timer.loss[ours][1:])
    return record


# --- the command ------------------------------------------------------------------------------------------------------


def equal_table(records: list[dict[str, Any]]) -> str:
    """Returns the table of differences in Markdown."""
    rows = [[r["case"], str(r["steps"]), str(r["numbers"]), f"{r['difference']:.1e}", r["where"]] for r in records]
    return table(["trainer and loss", "steps", "numbers", "largest difference", "where"], rows)


def time_table(records: list[dict[str, Any]]) -> str:
    """Returns the table of times and memory in Markdown."""

    def pair(r: dict[str, Any], what: str) -> list[str]:
        if f"{what}_theirs" not in r:
            return ["", "", ""]
        a, b = r[f"{what}_theirs"], r[f"{what}_ours"]
        return [f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}"]

    def row(r: dict[str, Any]) -> list[str]:
        numbers = [x for what in ("loss_ms", "step_ms", "peak_mib") for x in pair(r, what)]
        return [f"{r['case']}, {r['trained']}", *numbers, f"{r['difference']:.0e}"]

    header = ["SmolLM2-135M", "loss ms: TRL", "ours", "ratio", "step ms: TRL", "ours", "ratio"]
    return table([*header, "peak MiB: TRL", "ours", "ratio", "difference"], [row(r) for r in records])


def main(argv: list[str] | None = None) -> int:
    """Runs the cases of a part, writes and prints their records, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("equal", "time"))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help="only cases whose names begin with one of these"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--whole", action="store_true", help="time: train the whole model, not its last layers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    quiet()

    chosen = TIMED if args.part == "time" else list(CASES.values())
    chosen = [c for c in chosen if not args.only or any(str(c).startswith(o) for o in args.only)]
    found = read_json(args.json)

    def key(r: dict[str, Any]) -> tuple[str, str]:
        return r["case"], r.get("trained", "")

    records = []
    for case in chosen:
        if args.part == "equal":
            records.append(compare_tiny(case, args.steps))
        else:
            records.append(measure_case(case, args.whole, args.steps))
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
        kept = {key(r): r for r in found.get(args.part, [])} | {key(r): r for r in records}
        found |= {f"environment_{args.part}": environment(), args.part: list(kept.values())}
        if args.json:
            write_json(args.json, found)
    print((equal_table if args.part == "equal" else time_table)(found[args.part]))
    return int(any(r["difference"] > TOLERANCE for r in records))


def quiet() -> None:
    """Silences progress bars and warnings of the libraries."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
