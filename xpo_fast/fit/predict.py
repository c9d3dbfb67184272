"""The prediction: the peak of each phase by owner, the largest batch that fits, and what to change if none does."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .allocators import peaks
from .model import FROZEN, REFERENCE, TRAINED
from .phases import OPTIMIZER, record
from .question import Question
from .trace import GRADIENTS, Trace

# A CUDA context with the kernels that torch, cuBLAS and Triton load, and cuBLAS's workspace: an assumption, which
# `--verify` on the card replaces by a measurement.
CUDA_RUNTIME = 600 * 2**20
# What a trainer, its tokenizer and its data add to a process that has imported all of it: measured once, on Linux.
_TRAINER = 80 * 2**20
RUNTIME = {"cuda": "CUDA context and kernels (assumed)", "cpu": "Python, torch and transformers"}
SLACK = "kept by the allocator"
SPARE = 0.03  # of the memory, which is left free by what is proposed
_LASTING = (*RUNTIME.values(), TRAINED, FROZEN, REFERENCE, OPTIMIZER, GRADIENTS)  # whatever the batch
_NEAR, _TRIES = 0.94, 4  # the share of the memory, without the spare, that ends a search; and predictions of one
_DEPTHS = 2, 4  # layers of the models by which others are estimated
_PARTED = {
    "ddp": (),
    "zero1": (OPTIMIZER,),
    "zero2": (OPTIMIZER, GRADIENTS),
    "zero3": (OPTIMIZER, GRADIENTS, TRAINED, FROZEN, REFERENCE),
}
_PARTED["fsdp"] = _PARTED["zero3"]


@dataclass(frozen=True)
class Phase:
    """A phase of the run, and the bytes of each owner at its peak."""

    name: str
    owners: dict[str, int]

    @property
    def peak(self) -> int:
        """All bytes at the peak."""
        return sum(self.owners.values())


@dataclass(frozen=True)
class Prediction:
    """What a run takes. fits: within the question's memory; None: there was no limit."""

    question: Question
    phases: list[Phase]
    fits: bool | None

    @property
    def largest(self) -> Phase:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @functools.cached_property
    def estimates(self) -> Estimates:
        """Estimates of runs like this one, which share what they are scaled by."""
        return Estimates(self)

    @property
    def peak(self) -> int:
        """Bytes at the largest peak."""
        return self.largest.peak


def predict(question: Question, *, quick: bool = False) -> Prediction:
    """Predicts the memory of a run, see `phases.record`. Raises ValueError for a run that there cannot be."""
    runtime = _runtime(question)
    trace = _parted(record(question, quick=quick), question)
    limit = None if question.memory is None else max(question.memory - runtime, 1)
    found, room = peaks(trace.events, [at for at, _ in trace.phases], question.device, limit)
    phases = []
    for (_, name), peak in zip(trace.phases, found, strict=True):
        owners = _alive(trace, peak.at)
        owners |= {SLACK: peak.taken - peak.alive, RUNTIME[question.device]: runtime}
        phases.append(Phase(name, {k: v for k, v in owners.items() if v > 0}))
    return Prediction(question, phases, None if limit is None else room)


def _runtime(question: Question) -> int:
    """Returns the bytes of the device that are taken beside tensors."""
    return CUDA_RUNTIME if question.device == "cuda" else resident() + _TRAINER


def _alive(trace: Trace, last: int) -> dict[str, int]:
    """Returns the bytes of each owner that are alive after an event."""
    alive: dict[int, int] = {}
    for number, size in trace.events[: last + 1]:
        if size:
            alive[number] = size
        else:
            alive.pop(number)
    owners: Counter[str] = Counter()
    for number, size in alive.items():
        owners[trace.owners[number]] += size
    return dict(owners.most_common())


def _parted(trace: Trace, question: Question) -> Trace:
    """Returns the record of one rank: what is sharded divided, and what a rank holds beside it."""
    if question.ranks == 1:
        return trace
    parted = set(_PARTED[question.sharding])
    events = [
        (number, -(-size // question.ranks) if trace.owners[number] in parted else size)
        for number, size in trace.events
    ]
    first = trace.phases[1][0] if len(trace.phases) > 1 else len(events)
    trained = [size for number, size in trace.events[:first] if trace.owners[number] == TRAINED]
    if TRAINED in parted:
        frozen = [size for number, size in trace.events[:first] if trace.owners[number] == FROZEN]
        more = _gathered(trained, frozen, int(question.config.get_text_config().num_hidden_layers)), "layers gathered"
    else:
        more = sum(trained), "buckets of gradients"
    owners = [*trace.owners, more[1]]
    events.insert(first, (len(owners) - 1, more[0]))
    phases = [(at + (at >= first and k > 0), name) for k, (at, name) in enumerate(trace.phases)]
    return Trace(events, owners, phases)


def _gathered(trained: Sequence[int], frozen: Sequence[int], layers: int) -> int:
    """Returns the bytes that are whole at the peak: two layers and the largest weight, which is the head.

    A trained head is there with its gradient, and with the copy of it that is reduced.
    """
    largest = max([*trained, *frozen], default=0)
    rest = sum(size for size in [*trained, *frozen] if size < largest)  # the embedding is as large as the head
    return 2 * rest // max(layers, 1) + (3 if largest in trained else 1) * largest


@functools.cache
def resident() -> int:
    """Returns the resident memory of this process with all that training imports, at the first call."""
    import resource
    import sys
    from pathlib import Path

    import datasets  # noqa: F401
    import peft  # noqa: F401

    from .. import rl, trainer  # noqa: F401

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Estimates:
    """Peaks of runs like one that was predicted, from models of few layers and the same otherwise.

    What is alive at a peak is taken to be linear in the number of layers; the prediction of the whole model says by
    which factor the line is off, with what the allocator keeps.
    """

    whole: Prediction

    @functools.cached_property
    def factor(self) -> float:
        """The peak of the whole model over its estimate."""
        return self.whole.peak / self._line(self.whole.question)

    def peak(self, question: Question) -> float:
        """Returns the estimate of a run's peak in bytes."""
        return self._line(question) * self.factor

    def _line(self, question: Question) -> float:
        layers = int(question.config.get_text_config().num_hidden_layers)
        free = dataclasses.replace(question, memory=None, tile_mib=_tile_mib(question))
        if layers <= max(_DEPTHS):
            return self._most_alive(free)
        low, high = (self._most_alive(dataclasses.replace(free, config=_of_depth(question.config, n))) for n in _DEPTHS)
        return low + (high - low) / (_DEPTHS[1] - _DEPTHS[0]) * (layers - _DEPTHS[0])

    @staticmethod
    def _most_alive(question: Question) -> float:
        trace = _parted(record(question, quick=True), question)
        alive = most = 0
        sizes: dict[int, int] = {}
        for number, size in trace.events:
            alive += size or -sizes[number]
            sizes[number] = size
            most = max(most, alive)
        return _runtime(question) + most


def _tile_mib(question: Question) -> float | None:
    """Returns the tile that the question's memory asks for, so that it may be left out."""
    from ..head.tiling import SHARE_OF_CARD

    if question.tile_mib is not None or question.memory is None or question.device == "cpu":
        return question.tile_mib
    return SHARE_OF_CARD * question.memory / 2**20


def _of_depth(config: Any, layers: int) -> Any:
    """Returns the configuration with fewer layers."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:layers])
    text.num_hidden_layers = layers
    return found


@dataclass(frozen=True)
class Change:
    """A change of a run that takes less memory: the fields of the question, and what it costs in words."""

    what: str
    fields: dict[str, Any]
    cost: str


def changes(question: Question) -> list[Change]:
    """Returns what can be changed about a run, the cheapest first."""
    found: list[Change] = []
    smaller = [n for n in (2**k for k in range(12, -1, -1)) if n < question.batch_size]
    compares = question.reference == "copy"
    if compares and question.lora is not None:
        found.append(Change("--reference adapter", {"reference": "adapter"}, "nothing"))
    elif compares:
        found.append(Change("--reference cached", {"reference": "cached"}, "one pass over the data before"))
    if question.layout == "padded":
        found.append(Change("--layout auto", {"layout": "auto"}, "nothing; fewer tokens are computed"))
    if smaller and question.command != "rl":
        accum = question.grad_accum * question.batch_size
        fields = {"batch_size": 1, "grad_accum": accum, "eval_batch_size": min(question.eval_batch_size, 1)}
        found.append(Change(f"--batch-size 1 --grad-accum {accum}", fields, "smaller matrix products"))
    elif smaller:
        fields = {"batch_size": 1, "grad_accum": question.grad_accum * question.batch_size}
        found.append(Change(f"--batch-size 1 --grad-accum {fields['grad_accum']}", fields, "smaller matrix products"))
    if not question.gradient_checkpointing:
        found.append(Change("--gradient-checkpointing", {"gradient_checkpointing": True}, "about a third more time"))
    if question.full and not question.optimizer_in_backward and question.ranks == 1:
        fields = {"optimizer_in_backward": True, "max_grad_norm": 0.0, "grad_accum": 1}
        what = "--optimizer-in-backward --max-grad-norm 0 --grad-accum 1"
        found.append(Change(what, fields, "no clipping, and no sums of gradients"))
    if question.full and question.optim.startswith("adamw_torch") and question.device == "cuda":
        found.append(Change("--optim adamw_8bit", {"optim": "adamw_8bit"}, "a state of 8 bits"))
    if question.full and question.optim != "adafactor":
        found.append(Change("--optim adafactor", {"optim": "adafactor"}, "second moments by rows and columns"))
    if not question.activation_offload and question.device == "cuda":
        found.append(Change("--activation-offload", {"activation_offload": True}, "room in the host, and copies"))
    if not question.full and question.quantize is None:
        found.append(Change("--quantize 4bit", {"quantize": "4bit"}, "rounded frozen weights, slower products"))
    if question.full:
        fields = {"full": False, "optimizer_in_backward": False, "lora": default_lora()}
        found.append(Change("--lora", fields, "an adapter in place of all weights"))
    return found


def default_lora() -> Any:
    """Returns the adapter of the command line's defaults."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


@dataclass(frozen=True)
class Proposal:
    """Changes that make a run fit, with the estimated peak after each of them, in bytes, and the run's prediction."""

    changes: list[tuple[Change, int]]
    prediction: Prediction


def propose(whole: Prediction) -> tuple[Proposal | None, list[tuple[Change, int]]]:
    """Returns the cheapest changes after which the run fits, or None; and what each change does alone."""
    question, estimates = whole.question, whole.estimates
    assert question.memory is not None
    alone = [
        (change, int(estimates.peak(dataclasses.replace(question, **change.fields)))) for change in changes(question)
    ]
    fitting = [item for item in alone if item[1] <= question.memory]
    for item in fitting[:2]:
        if spares(found := predict(dataclasses.replace(question, **item[0].fields), quick=True)):
            return Proposal([item], found), alone
    return _together(question, [change for change, _ in alone], estimates), alone


def _together(question: Question, wanted: Sequence[Change], estimates: Estimates) -> Proposal | None:
    """Returns the first changes of those that make the run fit together, without those that do nothing, or None."""
    assert question.memory is not None
    taken: list[tuple[Change, int]] = []
    changed, peak = question, int(estimates.peak(question))
    for change in wanted:
        if change.fields.get("full") is False:  # an adapter: with it other changes are cheapest
            adapted = dataclasses.replace(question, **change.fields)
            after = int(estimates.peak(adapted))
            if after <= question.memory and spares(found := predict(adapted, quick=True)):
                return Proposal([(change, after)], found)
            rest = _together(adapted, changes(adapted), estimates)
            return None if rest is None else Proposal([(change, after), *rest.changes], rest.prediction)
        further = dataclasses.replace(changed, **change.fields)
        after = int(estimates.peak(further))
        if after > 0.98 * peak:
            continue
        taken = [item for item in taken if not set(item[0].fields) <= set(change.fields)] + [(change, after)]
        changed, peak = further, after
        if after <= question.memory and spares(found := predict(changed, quick=True)):
            return Proposal(taken, found)
    return None


def spares(prediction: Prediction) -> bool:
    """Returns whether a run fits and leaves `SPARE` of the memory free."""
    memory = prediction.question.memory
    return bool(prediction.fits) and (memory is None or prediction.peak <= (1 - SPARE) * memory)


def largest_batch(whole: Prediction) -> Prediction | None:
    """Returns the prediction of about the largest micro-batch that fits; None: not even one unit does."""
    question = whole.question
    room = len(question.units) if len(question.units) > 1 else 4096
    return _largest(whole, lambda count: _batched(question, count), now=len(question.rows), most=room)


def longest_rows(whole: Prediction) -> Prediction | None:
    """Returns the prediction of one unit with rows as long as fit, all of equal length; None: no row fits."""
    one = _batched(whole.question, 1)
    prompt, completions = whole.question.units[0]
    longest = int(getattr(one.config.get_text_config(), "max_position_embeddings", None) or 1 << 17)
    tokens = prompt + sum(completions)

    def of(count: int) -> Question:
        factor = count / tokens
        scaled = (max(int(prompt * factor), 1), tuple(max(int(n * factor), 1) for n in completions))
        return dataclasses.replace(one, units=(scaled,))

    now = sum(prompt + sum(completions) for prompt, completions in whole.question.rows)
    return _largest(whole, of, now=now, most=tokens * longest // (prompt + max(completions)))


def _largest(whole: Prediction, of: Callable[[int], Question], *, now: int, most: int) -> Prediction | None:
    """Returns the prediction of of(n) with about the largest n of 1 … most that fits; None: none was found.

    What grows with n is taken to be a line: at first through what `whole`, whose n is `now`, takes beside weights and
    their states, then through the last two predictions.
    """
    assert whole.question.memory is not None
    aim, best = (1 - SPARE) * whole.question.memory, None
    before, last = (0, sum(whole.largest.owners.get(name, 0) for name in _LASTING)), (now, whole.peak)
    low, high = 0, most + 1  # what fits, and what does not
    for _ in range(_TRIES):
        slope = max((last[1] - before[1]) / (last[0] - before[0]), 1.0)
        count = max(min(int(last[0] + (aim - last[1]) / slope), high - 1), low + 1)
        found = predict(of(count), quick=True)
        if found.fits:
            low, best = count, found
        else:
            high = count
        if high - low < 2 or aim * _NEAR <= found.peak <= whole.question.memory:
            break
        if count != last[0]:
            before, last = last, (count, found.peak)
    return best


def _batched(question: Question, count: int) -> Question:
    both = min(count, question.eval_batch_size) if question.command != "rl" else question.eval_batch_size
    return dataclasses.replace(question, batch_size=count, eval_batch_size=max(both, 1), tokens_per_batch=None)
