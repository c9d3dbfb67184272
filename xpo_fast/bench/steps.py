"""Times whole steps in each layout: forward, backward and what makes the batch, against padded rows and TRL.

A model in float32 (SmolLM2-135M by default) with LoRA of rank 16 on its linear layers, the reference's log-probs
cached. Rows are those of the data of at most `max_length` tokens, in random order. Contenders of a case run in turn on
the same rows. Before a case is timed, its losses and gradients in all layouts are compared: a layout that differs from
padded rows by more than 1e-5 is not timed. The floor is the bare products of the padded rows: of every linear layer,
and of the head on the scored positions. Peak memory is that of a step in a fresh process, by torch's CPU allocator.

TRL runs as it is released: "TRL" with its own settings (it recomputes activations), "TRL, activations kept" without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..layouts import LAYOUTS, LaysOut
from ..models import load_model
from ..rl import RLConfig, RLTrainer
from ..rollout import Samples, Sampling, encode_prompts
from ..trainer.budget import computed
from ..trainer.reference import batch_logps
from .contenders import Missing
from .measure import peak_allocated_mib, time_interleaved
from .step_parts import TRL, Bench, Case, Step, difference, floor_of, move, positions, step_of, trl_step
from .work import FLOOR, Record, Settings, Work, chosen, timed

TOLERANCE = 1e-5
GROUP, PROMPT, COMPLETION = 8, 256, 64  # completions per prompt, tokens
DEFAULT = ("dpo", "log-probs")
PEAKS = ("dpo",)  # cases of which peaks of memory are measured
STEP_S = {"dpo": 150.0, "log-probs": 40.0}  # for estimates
LOADED_S = 30.0  # a fresh process with the model


def works(settings: Settings) -> Iterator[Work]:
    """Yields the cases of the suite `steps`: by default those in DEFAULT."""
    for name in chosen(CASES, settings) if settings.cases else DEFAULT:
        estimate_s = STEP_S.get(name, 150.0) * settings.repeats / 3
        yield Work("steps", name, estimate_s, functools.partial(run, settings, name))


def peak_works(settings: Settings) -> Iterator[Work]:
    """Yields the cases of the suite `step-memory`."""
    for name in chosen(CASES, settings) if settings.cases else PEAKS:
        for layout in LAYOUTS:
            run = functools.partial(_peak_apart, settings, name, layout)
            yield Work("step-memory", f"{name}, {layout}", LOADED_S, run)


# --- cases ------------------------------------------------------------------------------------------------------------


def training(bench: Bench, method: str, rows: Any, *, alike: bool = False, trl: bool = False) -> tuple[Case, float]:
    """Returns the steps of a method in each layout, and by how much the layouts differ."""
    trainer = bench.trainer(method, rows)
    inputs = bench.inputs(trainer, alike=alike)
    batches = [trainer.data_collator.collate(rows) for rows in inputs]
    steps: dict[str, Step] = {FLOOR: floor_of(trainer.model, inputs, batches)}
    steps |= {layout: step_of(trainer, layout) for layout in LAYOUTS}
    tokens, missing = positions(trainer, inputs), {}
    for number, row in enumerate(row for rows in inputs for row in rows):
        row["number"] = number
    for name in filter(bench.settings.wants, TRL if trl else ()):
        try:
            steps[name] = trl_step(bench, name)
            tokens[name] = tokens["padded"]
        except Missing as error:
            missing[name] = str(error)
    return Case(steps, inputs, tokens, missing), difference(trainer, inputs[0])


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
    length = bench.settings.max_length // 2
    ids = bench.draw((bench.settings.batch * bench.settings.repeats, length), generator).tolist()
    rows = [{"prompt_ids": x[: length // 2], "chosen_ids": x[length // 2 :]} for x in ids]
    size = bench.settings.batch
    inputs = [rows[k : k + size] for k in range(0, len(rows), size)]
    steps = {FLOOR: floor_of(trainer.model, inputs, [trainer.data_collator.collate(rows) for rows in inputs])}
    steps |= {layout: step_of(trainer, layout) for layout in LAYOUTS}
    return Case(steps, inputs, positions(trainer, inputs), {}), difference(trainer, inputs[0])


def logps(bench: Bench) -> tuple[Case, float]:
    """Log-probs of pairs without gradient, as the reference cache computes them."""
    trainer = bench.trainer("dpo", bench.pairs)
    inputs = bench.inputs(trainer)

    def score(rows: list[dict[str, Any]], layout: str) -> torch.Tensor:
        batch = LaysOut(trainer.data_collator.collate, layout)(rows)
        return batch_logps(trainer.model, batch, trainer.kind)[..., 0]

    want = score(inputs[0], "padded")
    worst = max(float(((score(inputs[0], x) - want) / want).abs().max()) for x in LAYOUTS[1:])
    batches = [trainer.data_collator.collate(rows) for rows in inputs]
    steps: dict[str, Step] = {FLOOR: floor_of(trainer.model, inputs, batches, backward=False)}
    steps |= {layout: functools.partial(score, layout=layout) for layout in LAYOUTS}
    return Case(steps, inputs, positions(trainer, inputs), {}), worst


class Fixed:
    """A rollout of given completions: groups of them for each prompt, PROMPT tokens and about COMPLETION tokens."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.tokenizer, self.generator = bench, bench.tokenizer, torch.Generator().manual_seed(0)

    def update(self, model: Any) -> None:
        """Does nothing: the completions are drawn from no model."""

    def generate(self, prompts: Sequence[Any], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Returns random completions of 3/4 to 5/4 of COMPLETION tokens."""
        of = [prompt for prompt in prompts for _ in range(n)]
        ids = dict(zip(prompts, encode_prompts(prompts, self.tokenizer), strict=True))
        spread = COMPLETION // 4
        sizes = torch.randint(COMPLETION - spread, COMPLETION + spread + 1, (len(of),), generator=self.generator)
        drawn = [self.bench.draw((int(size),), self.generator).tolist() for size in sizes]
        texts = [self.tokenizer.decode(x) for x in drawn]
        return Samples(of, [ids[p] for p in of], drawn, texts, ["length"] * len(of))


def grpo(bench: Bench) -> tuple[Case, float]:
    """The update of GRPO on groups of 8 completions of about 64 tokens, prompts of 256."""
    generator = torch.Generator().manual_seed(1)
    drawn = bench.draw((bench.settings.repeats, 2 * PROMPT), generator).tolist()
    prompts = [bench.tokenizer.decode(_at_most(bench.tokenizer, ids, PROMPT)) for ids in drawn]
    config = RLConfig(
        str(bench.folder / "grpo"), method="grpo", num_generations=GROUP, per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=len(prompts), max_new_tokens=2 * COMPLETION, use_cpu=True, layout="padded",
        preflight="off", disable_tqdm=True, log_samples=False,
    )  # fmt: skip
    trainer = RLTrainer(
        load_model(bench.settings.model, dtype="float32")[0],
        lambda completions, **_: [float(len(x)) for x in completions], config,
        train_dataset=[{"prompt": x} for x in prompts], processing_class=bench.tokenizer, rollout=Fixed(bench),
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
    batches.layout = "padded"
    padded = [batches.batch(experience, rows, 0) for rows in inputs]
    steps: dict[str, Step] = {FLOOR: floor_of(trainer.model, inputs, padded)}
    steps |= {layout: functools.partial(step, layout=layout) for layout in LAYOUTS}
    return Case(steps, inputs, tokens, {}), worst


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


def run(settings: Settings, name: str) -> list[Record]:
    """Compares the layouts of a case, times every contender, and returns a record of each."""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        case, worst = CASES[name](Bench(settings, Path(folder)))
        records: dict[str, Record] = {}
        for contender in case.steps:
            records[contender] = {"contender": contender, "ours": contender in LAYOUTS, "params": {"case": name}}
            if contender in case.tokens:
                records[contender] |= {"tokens": case.tokens[contender]}
        for layout in LAYOUTS[1:]:
            errors = {"loss and gradient against padded": worst if math.isfinite(worst) else None}
            records[layout] |= {"errors": errors, "wrong": [] if worst <= TOLERANCE else list(errors)}
        steps = {n: step for n, step in case.steps.items() if not records[n].get("wrong")}
        for step in steps.values():
            step(case.inputs[0])
        samples_ms = time_interleaved(steps, case.inputs, settings.repeats)
        sums_ms = {n: math.fsum(x) for n, x in samples_ms.items()}
        for contender, times in timed(samples_ms, FLOOR).items():
            # The rows of repeats differ in length: sums weigh every token alike.
            records[contender] |= {**times, "as_fast_as_padded": sums_ms["padded"] / sums_ms[contender]}
        missing = [
            {"contender": n, "ours": False, "missing": why, "params": {"case": name}} for n, why in case.missing.items()
        ]
        return [*records.values(), *missing]


def _peak_apart(settings: Settings, name: str, contender: str) -> list[Record]:
    """Returns the peak of memory of a step in a fresh process."""
    options = json.dumps(asdict(settings) | {"repeats": 2, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "xpo_fast.bench.steps", name, contender, options]
    done = subprocess.run(command, capture_output=True, text=True)
    record: Record = {"contender": contender, "ours": True, "params": {"case": name}}
    if done.returncode != 0:
        return [record | {"failed": (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]}]
    return [record | {"mib": float(done.stdout.strip().splitlines()[-1])}]


def _peak(settings: Settings, name: str, contender: str) -> float:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        case, _ = CASES[name](Bench(settings, Path(folder)))
        case.steps[contender](case.inputs[0])
        return peak_allocated_mib(lambda: case.steps[contender](case.inputs[-1]))[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the libraries log no progress of their own, and warn of nothing."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    of_data = datasets.are_progress_bars_disabled()
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
            transformers.logging.set_verbosity(level)
            if bars:
                transformers.logging.enable_progress_bar()
            if not of_data:
                datasets.enable_progress_bars()


def main() -> None:
    """Measures the peak of one contender in this process, and prints MiB."""
    parser = argparse.ArgumentParser(description="Measures one step's peak of memory, for `xpo-fast bench`.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("contender", choices=LAYOUTS)
    parser.add_argument("settings", type=json.loads)
    args = parser.parse_args()
    torch.set_num_threads(args.settings.pop("threads"))
    settings = Settings(**args.settings | {"contenders": ("floor",)})  # without TRL, which is not measured here
    print(json.dumps(_peak(settings, args.case, args.contender)))


if __name__ == "__main__":
    main()
