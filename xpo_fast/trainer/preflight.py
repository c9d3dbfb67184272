"""The check of a run before its first step: its rows, its mask, its reference, its loss, on two short units of it.

What a batch's loss is in truth is computed twice without the fused head: the log-probs from the model's own logits, row
by row and without padding, and the loss from these in float64. The run's own way, from the collator to the denominator,
has to arrive at the same.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import data
from ..data import Kind
from ..head.sharded import is_sharded
from ..layouts import Inputs
from ..models import own_logits, padding_id
from ..models.lm_head import causal_lm, head_layer
from ..models.modes import evaluating
from ..objective import Objective
from ..precision import tf32_step
from ..types import IGNORE_INDEX
from .findings import Report
from .reference import row_logps
from .row_checks import Behind, Rows, attempt, check_rows_of, sequences

if TYPE_CHECKING:
    from accelerate import Accelerator

UNITS, AMONG, LONGEST = 2, 256, 2048  # units looked at: the shortest among the first rows, if a row is not too long
_PADDED = 3  # columns of padding that must not matter
_CONSULTED = 128  # rows on which an option must change the loss

# The loss where policy = reference, of methods for which it is a number that people know, by their hyperparameters.
KNOWN: Mapping[str, Callable[[Mapping[str, Any]], tuple[float, str]]] = {
    "dpo": lambda h: (math.log(2), "ln 2"),
    "ipo": lambda h: ((0.5 / h["beta"]) ** 2, "(1/2β)²"),
}


@dataclass
class Run:
    """A run as its trainer sees it: the functions are the trainer's own."""

    title: str
    model: nn.Module
    accelerator: Accelerator
    rows: Rows
    backend: str
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # a batch to the device
    collate: Callable[[list[dict]], dict[str, Tensor]]
    items: Callable[[dict[str, Tensor]], Tensor]  # the denominator of a batch
    loss: Callable[..., Any]  # (model, batch, denominator) → loss, …
    objective: Objective | None = None  # None: the loss is another function, which is compared with itself alone
    given: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Any]]] | None = None  # targets, columns and layout
    reference: Callable[[dict[str, Tensor]], Tensor] | None = None  # (R,) log-probs of a batch's rows; None: none
    cached: bool = False  # the reference's log-probs are columns of the data set
    trained: Callable[[], str | None] = lambda: None  # why policy and reference may differ; None: they must not
    coupled: bool = False  # the losses of a batch depend on one another
    looks_at_model: bool = True

    @property
    def kind(self) -> Kind:
        """The kind of the rows."""
        return self.rows.kind

    @property
    def pad(self) -> int:
        """The id of padding."""
        return padding_id(self.model, self.rows.tokenizer)


def preflight(run: Run) -> Report:
    """Checks a run; returns what was found. The run is as it was before: random numbers, modes, the method's state."""
    began, report = time.perf_counter(), Report(run.title)
    with untouched(run.objective):
        check_rows_of(report, run.rows)
        attempt(report, check_tied, run.model)
        if run.looks_at_model:
            attempt(report, check_loss, run)
        else:
            report.add("loss", "note", "not looked at: the model is in parts on several processes")
        attempt(report, check_options, run)
    report.seconds = time.perf_counter() - began
    return report


@contextlib.contextmanager
def untouched(objective: Objective | None) -> Iterator[None]:
    """Restores the random states and the objective's state when it ends."""
    states = random.getstate(), np.random.get_state()
    remembered = None if objective is None else objective.state_dict()
    kind = getattr(torch.accelerator.current_accelerator(check_available=True), "type", None)
    devices = list(range(torch.accelerator.device_count())) if kind else []
    with torch.random.fork_rng(devices, device_type=kind or "cuda"):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            if objective is not None and remembered is not None:
                objective.load_state_dict(remembered)


# --- the head ---------------------------------------------------------------------------------------------------------


def check_tied(report: Report, model: nn.Module) -> None:
    """Compares what the config says of the embeddings and the head with whether they are one weight."""
    lm: Any = causal_lm(model)
    config = lm.config.get_text_config()
    says = bool(getattr(config, "tie_word_embeddings", False))
    head, embedded = (_base(layer) for layer in (head_layer(lm), lm.get_input_embeddings()))
    if head is None or embedded is None or head.shape != embedded.shape or head.is_meta:
        return
    plain = head.numel() > 0 and not is_sharded(head)  # what is in parts has no address
    one = head is embedded or (plain and head.data_ptr() == embedded.data_ptr())
    if says and not one:
        same = bool(torch.equal(head.detach(), embedded.detach().to(head.device)))
        said = "the config ties the LM head to the embeddings, and they are two weights"
        if not same:
            said += " of other values: one of them is not what was saved, and saving keeps one alone"
        report.add("head", "doubt" if same else "fault", said)
    elif one and not says:
        said = "the LM head and the embeddings are one weight, and the config says that they are not tied: loaded anew "
        report.add("head", "fault", said + "they would be two")
    else:
        report.add("head", "ok", f"the head is the model's own, {'' if one else 'not '}tied to the embeddings")


def _base(layer: Any) -> Tensor | None:
    """Returns the weight of a layer below its adapter."""
    while (below := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = below
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What the model itself says of some rows: the log-prob of each scored token, in float64."""

    rows: list[Behind]
    logps: list[Tensor]  # of each row (n,)
    step: float  # what rounding may do to a log-prob

    def sums(self) -> Tensor:
        """Returns the log-prob of each row, (R,)."""
        return torch.stack([x.sum() for x in self.logps])

    def allowed(self) -> Tensor:
        """Returns by how much each row's log-prob may be off, (R,): rounding adds up as the root of the tokens."""
        return torch.tensor([self.step * math.sqrt(max(len(x), 1)) for x in self.logps], dtype=torch.float64)

    def spread(self, targets: Tensor) -> Tensor:
        """Returns the log-probs at the positions of the library's own batch, (R, T)."""
        out = torch.zeros(targets.shape, dtype=torch.float64)
        for r, (row, x) in enumerate(zip(self.rows, self.logps, strict=True)):
            out[r, [len(row.prompt) - 1 + k for k in row.scored]] = x
        return out


def _shortest(run: Run) -> list[dict[str, Any]]:
    """Returns the shortest units that are to be looked at, of different lengths if there are any."""
    dataset = run.rows.dataset
    found = []
    for i in range(min(len(dataset), AMONG)):
        row = dataset[i]
        rows = [s for s in sequences(run.kind, [row]) if s.name]
        longest = max(len(s.prompt) + len(s.completion) for s in rows)
        if all(s.scored for s in rows) and longest <= LONGEST:
            found.append((sum(len(s.prompt) + len(s.completion) for s in rows), i, row))
    found.sort(key=lambda x: x[:2])
    others = [x for x in found[1:] if x[0] != found[0][0]] or found[1:]
    return [row for *_, row in (*found[:1], *others[: UNITS - 1])]


def true_logps(model: nn.Module, accelerator: Accelerator, rows: list[Behind]) -> Truth:
    """Returns the log-probs of scored tokens from the model's own logits, each row alone and without padding."""
    device = next(model.parameters()).device
    found, largest, dtype = [], 1.0, torch.float32
    with evaluating(model), accelerator.autocast():
        for row in rows:
            if not row.completion:
                found.append(torch.zeros(0, dtype=torch.float64))
                continue
            ids = torch.tensor([[*row.prompt, *row.completion]], device=device)
            logits = own_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            logits = logits[0, len(row.prompt) - 1 : -1]
            wide, y = logits.float(), ids[0, len(row.prompt) :, None]
            logp = wide.gather(1, y)[:, 0] - wide.logsumexp(dim=1)
            found.append(logp.double().cpu()[row.scored])
            largest, dtype = max(largest, float(wide.abs().max())), logits.dtype
    return Truth(rows, found, 2e-4 + 4 * max(torch.finfo(dtype).eps, _rounding(model)) * largest)


def _rounding(model: nn.Module) -> float:
    """Returns the relative rounding of products that a dtype does not tell: of TF32, and of quantised weights."""
    lm: Any = causal_lm(model)
    return 2.0**-7 if getattr(lm, "is_quantized", False) else tf32_step(next(lm.parameters()).device)


def check_loss(report: Report, run: Run) -> None:
    """Compares log-probs, reference and loss of two units, padded, in another order and in parts, with the truth."""
    features = _shortest(run)
    if not features:
        return report.add("loss", "note", f"not looked at: no unit has an answer and at most {LONGEST} tokens")
    batch = run.prepare(run.collate([dict(f) for f in features]))
    if run.objective is None:
        return _check_invariance(report, run, features, None, 0.0)
    truth = true_logps(run.model, run.accelerator, sequences(run.kind, features))
    right = _check_logps(report, run, batch, truth)
    if run.objective.reads_context or run.objective.reads_teacher:  # of what the reference says there is no other truth
        return _check_invariance(report, run, features, None, 0.0) if right else None
    reference, alike = _check_reference(report, run, batch, truth)
    if not right or run.objective.draws_rivals:  # whose loss depends on draws
        return
    expected, allowed = _expected(run, features, truth, reference, alike) or (None, 0.0)
    if expected is not None and alike and run.reference is not None:
        _check_first(report, run, expected, len(features))
    _check_invariance(report, run, features, expected, allowed)


def _check_logps(report: Report, run: Run, batch: dict[str, Tensor], truth: Truth) -> bool:
    """Compares the summed log-probs of a padded batch with the truth; returns whether they are the same."""
    padded = _padded(batch, run.pad)
    with run.accelerator.autocast():
        found = row_logps(run.model, *Inputs.of(padded), backend=run.backend).double().cpu()
    if len(found) != len(truth.rows):
        report.add("log-probs", "fault", f"the batch has {len(found)} rows, expected {len(truth.rows)}")
        return False
    lengths = torch.tensor([len(x) for x in truth.logps])
    off = (found[:, 0] - truth.sums()).abs()
    wrong = (found[:, 1].long() != lengths) | ~(off <= truth.allowed())
    if not wrong.any():
        said = f"log-probs are those of the model's own logits, row by row (off by at most {float(off.max()):.1g})"
        report.add("log-probs", "ok", said)
        return True
    r = int(wrong.nonzero()[0, 0])
    row = truth.rows[r]
    report.add(
        "log-probs",
        "fault",
        f"{row.name} has the log-prob {float(found[r, 0]):.4f} over {int(found[r, 1])} tokens in a batch, and "
        f"{float(truth.sums()[r]):.4f} over {int(lengths[r])} from the model's own logits: wrong mask, shifted labels, "
        "or padding that is read",
    )
    return False


def _check_reference(report: Report, run: Run, batch: dict[str, Tensor], truth: Truth) -> tuple[Tensor | None, bool]:
    """Returns the reference's log-probs (R,) and whether they are the policy's; says what follows."""
    if run.reference is None:
        return None, True
    with torch.no_grad():
        found = run.reference(batch).double().cpu()
    off = (found - truth.sums()).abs()
    if bool((off <= truth.allowed()).all()):
        return found, True
    most = float(off.nan_to_num(math.inf).max())
    why = run.trained()
    what = "the cached log-probs of the reference" if run.cached else "the log-probs of the reference"
    said = f"{what} differ from those of the model as it was handed over, by up to {most:.3g} nats per row"
    if why is not None:
        report.add("reference", "note", f"{said}: {why}")
    else:
        stale = ": they are of other weights or of other rows (a stale cache, or columns that came with the rows)"
        report.add("reference", "fault", said + (stale if run.cached else ": it is another model"))
    return found, False


def _expected(
    run: Run, features: list[dict], truth: Truth, reference: Tensor | None, alike: bool
) -> tuple[float, float] | None:
    """Returns the method's loss of these units from the true log-probs, and what rounding of them may do to it.

    None where it cannot be had from log-probs of the rows.
    """
    objective = run.objective
    assert objective is not None and run.given is not None
    if objective.wpo or (objective.needs_reference_tokens and not alike):
        return None
    own = data.Collator(run.pad, run.kind.name)([dict(f) for f in features])
    logps, scored = truth.spread(own["targets"]), own["targets"] != IGNORE_INDEX
    count = scored.sum(dim=1, keepdim=True).clamp(min=1)
    compared = None if run.reference is None else logps
    if reference is not None and not alike:  # by row: spread over its tokens, whose sum alone is read
        compared = logps + torch.where(scored, (reference - truth.sums())[:, None] / count, 0.0)
    _remember(run, own)
    given = run.given(own)
    expected = float(evaluate(objective, *given, logps, compared))
    off = truth.allowed()[:, None] / count * torch.where(torch.arange(len(logps)) < len(logps) / 2, 1, -1)[:, None]
    moved = (torch.where(scored, logps + x, 0.0) for x in (off, off.abs()))
    others = [float(evaluate(objective, *given, x, compared)) for x in moved]
    return expected, 3 * max(abs(x - expected) for x in others)


def _remember(run: Run, batch: dict[str, Tensor]) -> None:
    """Sets KTO's reference point, which a step estimates, to 0; `untouched` undoes it."""
    assert run.objective is not None
    if any("kl" in m.columns for m in run.objective.methods):
        run.objective.state["kl"] = torch.zeros((), device=batch["targets"].device)


def evaluate(
    objective: Objective,
    targets: Tensor,  # (R, T), or (N,) packed
    given: Mapping[str, Any],
    logps: Tensor,  # (R, T) float64, of each token
    reference: Tensor | None,  # (R, T)
    *,
    learns: bool = False,
) -> Tensor:
    """Returns an objective's loss of given log-probs, in float64 on the CPU; its state changes only if it learns.

    The head is one of two tokens, whose hidden state a = log(p / (1 − p)) gives the target the probability p.
    """
    one = copy.copy(objective)
    one.backend, one.state = "dense", {n: x.cpu() for n, x in objective.state.items()}
    targets = torch.where(targets.cpu() == IGNORE_INDEX, IGNORE_INDEX, 0)

    def hidden(x: Tensor) -> Tensor:
        x = x.clamp(max=-1e-12)
        return (x - torch.log(-torch.expm1(x))).view(*targets.shape, 1)

    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    call: Any = {
        name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items() if not name.startswith("ref_")
    }
    if reference is not None and one.needs_reference_hidden:
        call |= {"ref_hidden": hidden(reference), "ref_weight": weight}
    elif reference is not None:
        call["ref_logps"] = reference.view(targets.shape)
    with torch.set_grad_enabled(learns):
        loss = one(hidden(logps), weight, targets, **call).loss.detach()
    if learns:
        objective.state = one.state
    return loss


def _check_first(report: Report, run: Run, expected: float, count: int) -> None:
    """Says the loss at policy = reference beside the number that people know, if the method has one."""
    assert run.objective is not None
    terms = run.objective.terms
    what = f"policy = reference: first loss {expected:.4f}"
    if len(terms) == 1 and terms[0].method.name in KNOWN and terms[0].weight == 1:
        number, name = KNOWN[terms[0].method.name](terms[0].hyperparameters)
        level = "ok" if math.isclose(expected, number, rel_tol=1e-3, abs_tol=1e-3) else "fault"
        what += f", expected {name} = {number:.4f}"
    else:
        level = "ok"
    report.add("reference", level, f"{what} ({count} {run.kind.unit})")


def _check_invariance(report: Report, run: Run, features: list[dict], expected: float | None, allowed: float) -> None:
    """Compares the run's loss of its units in parts, padded and in reverse, with the expected loss, or its own."""
    methods = () if run.objective is None else run.objective.methods
    coupled = run.coupled or any(m.unit == "batch" or m.state is not None for m in methods)
    parts = [features[::-1]] if coupled or len(features) < 2 else [[f] for f in features[::-1]]
    whole = expected
    if whole is None:
        whole = _mean_of(run, features) if run.objective is None and not coupled else _loss_of(run, [features])
    dtypes = [p.dtype for p in run.model.parameters() if p.dtype.is_floating_point]
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(run.accelerator.mixed_precision))
    eps = max(torch.finfo(x).eps for x in (dtypes[0], *([mixed] if mixed else [])))
    allowed += max(1e-5 if expected is not None else 1e-4, 4 * max(eps, _rounding(run.model))) * max(abs(whole), 0.1)
    found = _loss_of(run, parts, padded=True)
    if _close(found, whole, allowed):
        ways = "padded, reordered" + ("" if len(parts) == 1 else " and in micro-batches")
        report.add("loss", "ok", f"loss {found:.4f} is the same {ways}{'' if expected is None else ', and in float64'}")
        return
    asked = {
        "it is not the mean of the units' losses: a wrong denominator?": (whole, _loss_of(run, [features])),
        "it changes with padding": (_loss_of(run, [features]), _loss_of(run, [features], padded=True)),
        "it changes with the order of rows": (_loss_of(run, [features]), _loss_of(run, [features[::-1]])),
        "it changes if a step is cut into micro-batches: a wrong denominator?": (
            _loss_of(run, [features]),
            _loss_of(run, [[f] for f in features]) if len(parts) > 1 else None,
        ),
    }
    why = [name for name, (a, b) in asked.items() if a is not None and b is not None and not _close(a, b, allowed)]
    said = f"the loss of {len(features)} {run.kind.unit} is {found:.6g}, expected {whole:.6g}"
    report.add("loss", "fault", f"{said}: {'; '.join(why) or 'padding, order and micro-batches together change it'}")


def _close(a: float, b: float, allowed: float) -> bool:
    return abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))


def _loss_of(run: Run, parts: list[list[dict]], *, padded: bool = False) -> float:
    """Returns the run's own loss of some units, cut into micro-batches as a step is."""
    batches = [run.prepare(run.collate([dict(f) for f in part])) for part in parts]
    items = torch.stack([run.items(batch) for batch in batches]).sum(dim=0).clamp(min=1)
    return _summed(run, batches, items, padded=padded)


def _mean_of(run: Run, features: list[dict]) -> float:
    """Returns the mean of the losses of single units, none of which is divided by anything."""
    batches = [run.prepare(run.collate([dict(f)])) for f in features]
    return _summed(run, batches, torch.ones_like(run.items(batches[0]))) / len(batches)


def _summed(run: Run, batches: list[dict[str, Tensor]], items: Tensor, *, padded: bool = False) -> float:
    """Returns the sum of the run's own losses of batches over `items`."""
    if run.objective is not None:
        _remember(run, batches[0])
    total = 0.0
    with evaluating(run.model), run.accelerator.autocast():
        for batch in batches:
            batch = {name: x for name, x in batch.items() if not name.startswith("kl_")}
            batch = _padded(batch, run.pad) if padded else batch
            total += float(run.loss(run.model, batch, items)[0])
    return total


def _padded(batch: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Returns a batch with further columns of padding, at the end of each row."""
    shape = batch["targets"].shape
    filled = {"targets": IGNORE_INDEX, "input_ids": pad}
    return {
        name: nn.functional.pad(x, (0, _PADDED), value=filled.get(name, 0))
        if isinstance(x, Tensor) and x.shape == shape and x.dim() == 2
        else x
        for name, x in batch.items()
    }


# --- options ----------------------------------------------------------------------------------------------------------


def check_options(report: Report, run: Run) -> None:
    """Looks whether each option that is not at its default changes the loss, on rows of the data and drawn log-probs.

    Of a method that remembers, the second of two steps is compared.
    """
    objective = run.objective
    if objective is None or run.given is None or objective.draws_rivals:
        return
    changed = list(_at_defaults(objective))
    if not changed:
        return
    features = [run.rows.dataset[i] for i in run.rows.sample(_CONSULTED)]
    batch = data.Collator(run.pad, run.kind.name)(features)
    _remember(run, batch)
    want = _drawn_losses(objective, run, batch)
    for name, other in changed:
        if torch.equal(_drawn_losses(other, run, batch), want):
            report.add("options", "doubt", f"{name} changes nothing on {len(features)} {run.kind.unit}")
    report.add("options", "ok", f"options looked at: {', '.join(name for name, _ in changed)}")


def _at_defaults(objective: Objective) -> Iterator[tuple[str, Objective]]:
    """Yields each option that was given, and an objective in which it is at its default."""
    for k, term in enumerate(objective.terms):
        for name, default in term.method.defaults.items():
            value = term.hyperparameters[name]
            if value != default:
                other = copy.copy(objective)
                hyperparameters = {**term.hyperparameters, name: default}
                other.terms = [*objective.terms]
                other.terms[k] = dataclasses.replace(term, hyperparameters=hyperparameters)
                yield f"{name}={value}", other
    for name, default in (("ld_alpha", None), ("wpo", False)):
        if getattr(objective, name) != default:
            other = copy.copy(objective)
            setattr(other, name, default)
            yield f"{name}={getattr(objective, name)}", other


def _drawn_losses(objective: Objective, run: Run, batch: dict[str, Tensor]) -> Tensor:
    """Returns the losses of two steps from log-probs drawn around the reference's, (2,) float64."""
    assert run.given is not None
    objective, losses = copy.copy(objective), []
    objective.state = dict(objective.state)
    targets, given = run.given(batch)
    for seed in (1, 2):
        torch.manual_seed(seed)
        reference = -2 * torch.rand(batch["targets"].shape, dtype=torch.float64) - 0.1
        logps = (reference + 0.3 * torch.randn_like(reference)).clamp(max=-0.01)
        losses.append(evaluate(objective, targets, given, logps, reference if run.reference else None, learns=True))
    return torch.stack(losses)
