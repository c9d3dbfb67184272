"""Times whole steps in each layout: forward, backward and what makes the batch, against padded rows and TRL.

    python bench/steps.py --data hh-rlhf-harmless-test.jsonl.gz --json bench/results/steps-cpu.json
    python bench/steps.py --only dpo --repeats 3

SmolLM2-135M in float32 with LoRA of rank 16 on its linear layers, the reference's log-probs cached. Rows are those of
--data of at most --max-length tokens, in random order: Anthropic's HH pairs for the figures of the README, the packaged
pairs by default. Contenders of a case run in turn on the same rows; ratios are of the sums over these rows.
Before a case is timed, its losses and gradients in all layouts are compared: a layout that differs from padded rows by
more than 1e-5 is not timed, and the exit status is 1. Peak memory is that of a layout's step in a fresh process, by
torch's CPU allocator. The file is written case by case; cases that it has are not repeated.

TRL runs as it is released: "TRL" with its own settings (it recomputes activations), "TRL, activations kept" without.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import transformers
from peft import LoraConfig

from measure import environment, peak_allocated_mib, ratio, read_json, table, time_interleaved
from xpo_fast import data
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import write_json
from xpo_fast.layouts import LAYOUTS, LaysOut
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.rl import RLConfig, RLTrainer
from xpo_fast.rollout import Samples, Sampling, encode_prompts
from xpo_fast.trainer import XPOConfig, XPOTrainer, row_lengths
from xpo_fast.trainer.budget import computed
from xpo_fast.trainer.reference import batch_logps

TOLERANCE = 1e-5
GROUP, PROMPT, COMPLETION = 8, 256, 64  # completions per prompt, tokens

Step = Callable[[Any], Any]


@dataclass
class Case:
    """Contenders that run on the same inputs, and what they are."""

    steps: Mapping[str, Step]
    inputs: Sequence[Any]
    tokens: Mapping[str, int]  # positions that the model computes for all inputs, by contender


def main(argv: list[str] | None = None) -> int:
    """Runs the cases, writes and prints their records, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=str(PAIRS), help="preference pairs")
    add("--max-length", type=int, default=512, help="longer rows are left out, in tokens")
    add("--batch", type=int, default=4, help="units per batch")
    add("--repeats", type=int, default=8)
    add("--threads", type=int, default=2)
    add("--only", nargs="+", default=[], metavar="CASE", help="only cases whose names begin with one of these")
    add("--without-trl", action="store_true")
    add("--peaks", nargs="*", default=["dpo"], metavar="CASE", help="cases of which peaks of memory are measured")
    add("--json", type=Path)
    add("--peak", metavar="CASE/CONTENDER", help=argparse.SUPPRESS)  # of a fresh process: prints MiB
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    _quiet()
    if args.peak:
        print(json.dumps(_peak(args, *args.peak.split("/", 1))))
        return 0
    found = read_json(args.json)
    cases = {str(r["case"]): r for r in found.get("cases", [])}
    wanted = [name for name in CASES if not args.only or name.startswith(tuple(args.only))]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for name in wanted:
            if name in cases:
                continue
            cases[name] = measure(bench, name)
            print(json.dumps(cases[name]), file=sys.stderr, flush=True)
            if args.json:
                write_json(args.json, {"environment": environment(), "cases": list(cases.values())})
    shown = [cases[name] for name in wanted]
    print(table_of(shown))
    return int(any(r["difference"] > TOLERANCE for r in shown))


# --- the model and its trainers ---------------------------------------------------------------------------------------


class Bench:
    """What the cases share: the rows, the model, and its trainers."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        torch.manual_seed(0)
        self.base, self.tokenizer = load_model(SMOLLM2, dtype="float32")
        count = args.batch * args.repeats
        rows = data.load(args.data, kind="pair").shuffle(seed=0)
        rows = rows.select(range(min(len(rows), 4 * count)))
        encoded = data.encode(rows, self.tokenizer, kind="pair", max_length=10**6)
        fits = [i for i, length in enumerate(row_lengths(encoded)) if length <= args.max_length]
        self.pairs = rows.select(fits[:count])

    @property
    def lora(self) -> LoraConfig:
        """The adapter that is trained."""
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    def trainer(self, method: str, rows: Any) -> XPOTrainer:
        """Returns a trainer of a copy of the model, whose adapter is not idle."""
        config = XPOConfig(
            str(self.folder / method), method=method, max_length=self.args.max_length, use_cpu=True,
            per_device_train_batch_size=self.args.batch, layout="padded", preflight="off",
            ref_cache_dir=str(self.folder / "reference"), disable_tqdm=True,
            reference="cached" if method == "dpo" else "auto",
        )  # fmt: skip
        model = load_model(SMOLLM2, dtype="float32")[0]
        made = XPOTrainer(model, config, train_dataset=rows, processing_class=self.tokenizer, peft_config=self.lora)
        move(made.model)
        if method == "dpo":  # any numbers will do for the time
            rows = made.train_dataset
            for name in made.kind.reference:
                rows = data.with_column(rows, name, [-50.0] * len(rows))
            made.train_dataset = rows
        return made

    def inputs(self, trainer: XPOTrainer, *, alike: bool = False) -> list[list[dict[str, Any]]]:
        """Returns the trainer's rows in batches. alike: of like length."""
        rows: list[Any] = list(trainer.train_dataset)
        if alike:
            rows.sort(key=lambda row: sum(len(x) for n, x in row.items() if n.endswith("_ids")))
        size = self.args.batch
        return [rows[k : k + size] for k in range(0, len(rows), size)]


def move(model: Any) -> None:
    """Draws the adapter's second factor, which begins at 0, so that no gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(1e-3 * torch.randn(p.shape, generator=generator))


def step_of(trainer: Any, layout: str) -> Step:
    """Returns the step of a trainer on rows in a layout: the batch made, forward, backward."""

    def step(rows: list[dict[str, Any]]) -> float:
        collate = trainer.data_collator
        collate.layout = layout
        batch = trainer._prepare_inputs(collate(rows))
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        loss = trainer.training_step(trainer.model, batch, items)
        trainer.model.zero_grad()
        return float(loss)

    return step


def gradient_of(trainer: Any, layout: str, rows: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """Returns the loss and the gradient of all trained weights for rows in a layout."""
    collate = trainer.data_collator
    collate.layout = layout
    batch = trainer._prepare_inputs(collate(rows))
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = float(trainer.training_step(trainer.model, batch, items))
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.zero_grad()
    return loss, found


def difference(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Returns by how much loss and gradient of rows differ from padded rows, relatively, in the worst layout."""
    want, gradient = gradient_of(trainer, "padded", rows)
    worst = 0.0
    for layout in LAYOUTS[1:]:
        loss, found = gradient_of(trainer, layout, rows)
        worst = max(worst, abs(loss - want) / max(abs(want), 1.0), float((found - gradient).norm() / gradient.norm()))
    return worst


def positions(trainer: Any, inputs: list[list[dict[str, Any]]]) -> dict[str, int]:
    """Returns the positions that the model computes for all inputs, by layout."""
    counted: dict[str, int] = dict.fromkeys(LAYOUTS, 0)
    for rows in inputs:
        for layout in LAYOUTS:
            counted[layout] += computed(LaysOut(trainer.data_collator.collate, layout)(rows))
    return counted


# --- cases ------------------------------------------------------------------------------------------------------------


def training(bench: Bench, method: str, rows: Any, *, alike: bool = False, trl: bool = False) -> tuple[Case, float]:
    """Returns the steps of a method in each layout, and by how much the layouts differ."""
    trainer = bench.trainer(method, rows)
    inputs = bench.inputs(trainer, alike=alike)
    steps = {layout: step_of(trainer, layout) for layout in LAYOUTS}
    tokens = positions(trainer, inputs)
    if trl and not bench.args.without_trl:
        numbered = [[int(row["number"]) for row in rows] for rows in _numbered(inputs)]
        for name, step in trl_steps(bench, numbered).items():
            steps[name] = step
            tokens[name] = tokens["padded"]
    return Case(steps, inputs, tokens), difference(trainer, inputs[0])


def _numbered(inputs: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Numbers rows across batches."""
    count = iter(range(sum(map(len, inputs))))
    for rows in inputs:
        for row in rows:
            row["number"] = next(count)
    return inputs


def trl_steps(bench: Bench, inputs: list[list[int]]) -> dict[str, Step]:
    """Returns TRL's DPO step with precomputed reference log-probs on the same rows, by its settings."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    steps: dict[str, Step] = {}
    settings: dict[str, dict[str, Any]] = {"TRL": {}, "TRL, activations kept": {"gradient_checkpointing": False}}
    for name, own in settings.items():
        config = DPOConfig(
            str(bench.folder / "trl"), max_length=bench.args.max_length, use_cpu=True, bf16=False, report_to=[],
            per_device_train_batch_size=bench.args.batch, precompute_ref_log_probs=False, disable_tqdm=True, **own,
        )  # fmt: skip
        model = load_model(SMOLLM2, dtype="float32")[0]
        made: Any = DPOTrainer(
            model, args=config, train_dataset=bench.pairs, processing_class=bench.tokenizer, peft_config=bench.lora
        )
        move(made.model)
        made.precompute_ref_logps, made.current_gradient_accumulation_steps = True, 1  # as in `train`
        rows: list[Any] = list(made.train_dataset)
        for row in rows:
            row |= {"ref_chosen_logps": -50.0, "ref_rejected_logps": -50.0}

        def step(given: list[dict[str, Any]], made: Any = made, rows: list[Any] = rows) -> float:
            batch = made._prepare_inputs(made.data_collator([rows[row["number"]] for row in given]))
            loss = made.training_step(made.model, batch)
            made.model.zero_grad()
            return float(loss)

        steps[name] = step
    return steps


def dpo(bench: Bench) -> tuple[Case, float]:
    """DPO, batches in random order."""
    return training(bench, "dpo", bench.pairs, trl=True)


def dpo_alike(bench: Bench) -> tuple[Case, float]:
    """DPO, batches of like length."""
    return training(bench, "dpo", bench.pairs, alike=True)


def lists(bench: Bench) -> tuple[Case, float]:
    """Lists of four completions of a prompt: its own two, and each cut to half of its words."""

    def half(messages: Any) -> Any:
        if isinstance(messages, str):
            return messages[: len(messages) // 2]
        return [{**m, "content": m["content"][: max(len(m["content"]) // 2, 1)]} for m in messages]

    pairs: list[Any] = list(bench.pairs)
    rows = [
        {
            "prompt": r["prompt"],
            "completions": [r["chosen"], r["rejected"], half(r["chosen"]), half(r["rejected"])],
            "scores": [4.0, 3.0, 2.0, 1.0],
        }
        for r in pairs
    ]
    return training(bench, "lipo", rows)


def unshared(bench: Bench) -> tuple[Case, float]:
    """SFT on chosen completions: rows without a common prompt, of HH's lengths, unsorted."""
    return training(bench, "sft", bench.pairs.select_columns(["prompt", "chosen"]))


def equal(bench: Bench) -> tuple[Case, float]:
    """SFT on rows of equal length without a common prompt, which packing cannot shorten."""
    trainer = bench.trainer("sft", bench.pairs.select_columns(["prompt", "chosen"]))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (bench.args.batch * bench.args.repeats, 256), generator=generator).tolist()
    rows = [{"prompt_ids": x[:128], "chosen_ids": x[128:]} for x in ids]
    size = bench.args.batch
    inputs = [rows[k : k + size] for k in range(0, len(rows), size)]
    steps = {layout: step_of(trainer, layout) for layout in LAYOUTS}
    return Case(steps, inputs, positions(trainer, inputs)), difference(trainer, inputs[0])


def logps(bench: Bench) -> tuple[Case, float]:
    """Log-probs of pairs without gradient, as the reference cache computes them."""
    trainer = bench.trainer("dpo", bench.pairs)
    inputs = bench.inputs(trainer)

    def score(rows: list[dict[str, Any]], layout: str) -> torch.Tensor:
        batch = LaysOut(trainer.data_collator.collate, layout)(rows)
        return batch_logps(trainer.model, batch, trainer.kind)[..., 0]

    want = score(inputs[0], "padded")
    worst = max(float(((score(inputs[0], x) - want) / want).abs().max()) for x in LAYOUTS[1:])
    steps: dict[str, Step] = {layout: functools.partial(score, layout=layout) for layout in LAYOUTS}
    return Case(steps, inputs, positions(trainer, inputs)), worst


class Fixed:
    """A rollout of given completions: groups of them for each prompt, PROMPT tokens and about COMPLETION tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.generator = tokenizer, torch.Generator().manual_seed(0)

    def update(self, model: Any) -> None:
        """Does nothing: the completions are drawn from no model."""

    def generate(self, prompts: Sequence[Any], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Returns random completions of 3/4 to 5/4 of COMPLETION tokens."""
        of = [prompt for prompt in prompts for _ in range(n)]
        ids = dict(zip(prompts, encode_prompts(prompts, self.tokenizer), strict=True))
        spread = COMPLETION // 4
        sizes = torch.randint(COMPLETION - spread, COMPLETION + spread + 1, (len(of),), generator=self.generator)
        drawn = [torch.randint(100, 40_000, (int(size),), generator=self.generator).tolist() for size in sizes]
        texts = [self.tokenizer.decode(x) for x in drawn]
        return Samples(of, [ids[p] for p in of], drawn, texts, ["length"] * len(of))


def grpo(bench: Bench) -> tuple[Case, float]:
    """The update of GRPO on groups of 8 completions of about 64 tokens, prompts of 256."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(100, 40_000, (bench.args.repeats, 2 * PROMPT), generator=generator).tolist()
    prompts = [bench.tokenizer.decode(_at_most(bench.tokenizer, ids, PROMPT)) for ids in drawn]
    config = RLConfig(
        str(bench.folder / "grpo"), method="grpo", num_generations=GROUP, per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=len(prompts), max_new_tokens=2 * COMPLETION, use_cpu=True, layout="padded",
        preflight="off", disable_tqdm=True, log_samples=False,
    )  # fmt: skip
    trainer = RLTrainer(
        load_model(SMOLLM2, dtype="float32")[0], lambda completions, **_: [float(len(x)) for x in completions], config,
        train_dataset=[{"prompt": x} for x in prompts], processing_class=bench.tokenizer,
        rollout=Fixed(bench.tokenizer),
        peft_config=bench.lora,
    )  # fmt: skip
    move(trainer.model)
    trainer._begin_rollout()
    experience, batches = trainer.experience, trainer._batches
    assert experience is not None
    _, items = batches.step(experience, 0, spare=False)
    inputs = list(torch.arange(len(experience.kept)).split(GROUP))

    def run(rows: torch.Tensor, layout: str) -> float:
        batches.layout = layout
        batch = trainer._prepare_inputs(batches.batch(experience, rows, 0))
        return float(trainer.training_step(trainer.model, batch, items))

    def step(rows: torch.Tensor, layout: str) -> None:
        run(rows, layout)
        trainer.model.zero_grad()

    worst, found = 0.0, {}
    tokens: dict[str, int] = dict.fromkeys(LAYOUTS, 0)
    for layout in LAYOUTS:
        loss = run(inputs[0], layout)
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        trainer.model.zero_grad()
        found[layout] = loss, gradient
        want, at = found["padded"]
        worst = max(worst, abs(loss - want) / max(abs(want), 1.0), float((gradient - at).norm() / at.norm()))
        batches.layout = layout
        tokens[layout] = sum(computed(batches.batch(experience, rows, 0)) for rows in inputs)
    steps: dict[str, Step] = {layout: functools.partial(step, layout=layout) for layout in LAYOUTS}
    return Case(steps, inputs, tokens), worst


def _at_most(tokenizer: Any, ids: list[int], count: int) -> list[int]:
    """Returns as many of the ids as, decoded and encoded again, have at most `count` tokens."""
    while len(tokenizer(tokenizer.decode(ids))["input_ids"]) > count:
        ids = ids[: -max((len(tokenizer(tokenizer.decode(ids))["input_ids"]) - count) // 2, 1)]
    return ids


CASES: dict[str, Callable[[Bench], tuple[Case, float]]] = {
    "dpo": dpo,
    "dpo, like lengths": dpo_alike,
    "lists of 4": lists,
    "sft": unshared,
    "sft, equal lengths": equal,
    "log-probs": logps,
    "grpo update": grpo,
}


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """Returns the record of a case: ratios to padded rows, tokens, and peaks of memory."""
    case, worst = CASES[name](bench)
    record: dict[str, Any] = {"case": name, "about": CASES[name].__doc__, "difference": worst, "tokens": case.tokens}
    if worst > TOLERANCE:
        return record
    for step in case.steps.values():
        step(case.inputs[0])
    times = time_interleaved(case.steps, case.inputs, bench.args.repeats)
    base = times["padded"]
    record["median_ms"] = {n: statistics.median(x) for n, x in times.items()}
    record["sum_ms"] = {n: math.fsum(x) for n, x in times.items()}
    record["padded/…, median"] = {n: ratio(base, x) for n, x in times.items()}
    record["padded/…, sum"] = {n: math.fsum(base) / math.fsum(x) for n, x in times.items()}
    if name in bench.args.peaks:
        record["peak_mib"] = {n: _peak_apart(bench.args, name, n) for n in LAYOUTS}
    return record


def _peak_apart(args: argparse.Namespace, name: str, contender: str) -> float:
    """Returns the peak of memory of a step in a fresh process, in MiB."""
    options = ["--data", args.data, "--max-length", str(args.max_length), "--batch", str(args.batch), "--repeats", "2"]
    options.append("--without-trl")
    command = [sys.executable, __file__, *options, "--peak", f"{name}/{contender}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _peak(args: argparse.Namespace, name: str, contender: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        case, _ = CASES[name](Bench(args, Path(folder)))
        case.steps[contender](case.inputs[0])
        return peak_allocated_mib(lambda: case.steps[contender](case.inputs[1]))[0]


def table_of(records: list[dict[str, Any]]) -> str:
    """Returns the ratios in Markdown: how many times as fast as padded rows, and memory as a share of theirs."""
    names = list(dict.fromkeys(n for r in records for n in r["tokens"]))
    rows = []
    for r in records:
        if "median_ms" not in r:
            rows.append([r["case"], *(f"differs by {r['difference']:.1e}" for _ in names)])
            continue
        speed, peak = r["padded/…, sum"], r.get("peak_mib", {})
        cells = [f"{speed[n]:.2f}" if n in speed else "" for n in names]
        rows.append([r["case"], *cells])
        if peak:
            shares = [f"{peak[n] / peak['padded']:.2f}" if n in peak else "" for n in names]
            rows.append([f"{r['case']}: peak of memory ÷ that of padded", *shares])
    return table(["times as fast as padded", *names], rows)


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


if __name__ == "__main__":
    sys.exit(main())
