"""The reference of a call: its log-probs, given or computed, or an error that says which are missing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..head.operands import Operands
from ..head.rows import sum_rows
from ..head.statistics import statistics
from .batch import Batch
from .known import Known, row_sums
from .settings import Settings


def add_reference(
    known: Known,
    batch: Batch,
    settings: Settings,
    operands: Operands,  # admitted and flat, with the batch's targets
    ref_logps: Tensor | None,  # of rows (R,), or shaped as targets
    ref_tokens: Tensor | None,  # shaped as targets
) -> None:
    """Adds the rows' log-probs under the reference to `known`, and the tokens' where they are known.

    Raises ValueError if a method needs a reference that is not there, or more of it than was given, or if it came twice.
    """
    ref = operands.ref
    reads = [term for term in settings.terms if term.reads_reference]
    if not reads:
        return
    names = ", ".join(term.method.name for term in reads)
    by_token = settings.layout == "policy" or settings.ld_alpha is not None
    if sum(x is not None for x in (ref, ref_logps, ref_tokens)) > 1:
        raise ValueError("the reference came twice: pass one of ref_hidden=, ref_logps= and ref_token_logp=")
    if ref_logps is None and ref is None and ref_tokens is None:
        if settings.needs_reference:
            what = "shaped as targets, the log-prob of each token" if by_token else "the summed log-prob of each row"
            raise ValueError(
                f"{names} compares with a reference: pass ref_hidden= (and ref_weight= unless it has the policy's "
                f"head) or ref_logps=, {what}"
            )
        return
    if ref is None and settings.needs_reference_hidden:
        raise ValueError(f"{names} compares whole distributions with the reference's: pass ref_hidden=")
    tokens: Tensor | None = None
    rows, whole = torch.Size((batch.count,)), torch.Size(batch.shape)
    if ref_tokens is not None:
        tokens = batch.check_rows("ref_token_logp", ref_tokens, [whole]).reshape(-1)
    elif ref_logps is not None:
        ref_logps = batch.check_rows("ref_logps", ref_logps, [rows, whole])
        if ref_logps.shape == whole and (whole != rows or by_token):
            tokens = ref_logps.reshape(-1)
    else:
        assert ref is not None
        alone = replace(operands, hidden=ref.hidden, weight=ref.weight, bias=ref.bias)
        alone = replace(alone, adapter=None, ref=None, weight_grad=None)
        with torch.no_grad():
            tokens = statistics(alone, (), settings.plan_options).logp
    if tokens is not None:
        known.tokens["ref_token_logp"] = tokens = torch.where(batch.scored, tokens, 0.0)
        known.rows["ref_logp"] = (sum_rows(tokens, batch.rows, batch.count), -1.0)
        if settings.ld_alpha is not None:
            known.discounted_ref = row_sums(batch, tokens, None, settings.ld_alpha)
    elif by_token:
        raise ValueError(
            f"{names} looks at the reference's single tokens: pass ref_hidden=, or ref_logps= shaped as targets, "
            f"{tuple(batch.shape)}; got ({batch.count},), one a row"
        )
    else:
        assert ref_logps is not None
        known.rows["ref_logp"] = (ref_logps, -1.0)
