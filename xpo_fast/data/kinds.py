"""The kinds of preference data, by what a method learns from, one value each; and `DataError`.

Another kind is another value here, and code in encode.py and collate.py if its encoding or its batches are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class DataError(ValueError):
    """Data that cannot be used. The message names the row, what was expected, what came and what to do."""


@dataclass(frozen=True)
class Kind:
    """A kind of preference data: the rows that it is read from, and their columns in a data set and in a batch.

    name: as in ``data.load(…, kind="pair")``.
    completions: the columns of text after the prompt. A batch has the rows of the first one, then those of the second.
    expected: the fields that a row must have, in words, for errors and help.
    forms: the sets of fields of which a row must have one.
    answers: the sets of fields that hold completions; the first one that a row has tells where its prompt may be.
    reference: the columns of the reference's log-probs, in the order of `completions`; a list has one column, with a
        log-prob per completion. Behind them that of the mismatched completion, from which KTO's KL is estimated.
    numbers: {column: the methods' name for it} of what a row may carry beside the text.
    unit: the plural for a unit of the loss, for people.
    listed: whether the one column of completions holds a list of them, which is one unit.
    half: 0 or 1 for the chosen or rejected half of a pair, the only one there is; None for other kinds.
    reads_text: whether a row of `text` alone is read, as a completion of an empty prompt.
    """

    name: str
    completions: tuple[str, ...]
    expected: str
    forms: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[str, ...], ...]
    reference: tuple[str, ...]
    numbers: Mapping[str, str] = field(default_factory=dict)
    unit: str = "rows"
    listed: bool = False
    half: int | None = None
    reads_text: bool = False

    @property
    def encoded(self) -> tuple[str, ...]:
        """The columns of token ids that tell an encoded data set: the prompt's, then those of the completions."""
        return ("prompt_ids", *(f"{name}_ids" for name in self.completions))

    @property
    def compares(self) -> bool:
        """Whether a unit holds several completions to compare."""
        return self.listed or len(self.completions) > 1


_PAIR = ("chosen", "rejected")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "pair",
            completions=_PAIR,
            expected="chosen and rejected, and prompt unless the two begin with it",
            forms=(_PAIR,),
            answers=(_PAIR,),
            reference=("ref_logp_chosen", "ref_logp_rejected"),
            numbers={"score_chosen": "score_w", "score_rejected": "score_l", "prob": "prob_w", "margin": "margin"},
            unit="pairs",
        ),
        Kind(
            "unpaired",
            completions=("completion",),
            expected="prompt, completion and label (or reward), or chosen and rejected",
            forms=(("prompt", "completion", "label"), ("prompt", "completion", "reward"), _PAIR),
            answers=(("completion",), _PAIR),
            reference=("ref_logp", "kl_ref_logp"),
            numbers={"label": "desirable", "reward": "reward", "value": "value"},
        ),
        Kind(
            "list",
            completions=("completions",),
            expected="prompt, completions and scores (or rejected), "
            "or chosen, rejected, score_chosen and score_rejected",
            forms=(
                ("prompt", "completions", "scores"),
                ("prompt", "completions", "rejected"),
                (*_PAIR, "score_chosen", "score_rejected"),
            ),
            answers=(("completions",), _PAIR),
            reference=("ref_logp",),
            numbers={"scores": "scores"},
            unit="lists",
            listed=True,
        ),
        Kind(
            "rejected",
            completions=("rejected",),
            expected="rejected, and prompt unless rejected is a conversation, or chosen and rejected share one",
            forms=(("rejected",),),
            answers=(_PAIR, ("rejected",)),
            reference=("ref_logp_rejected",),
            half=1,
        ),
        Kind(
            "chosen",
            completions=("chosen",),
            expected="chosen (or completion), and prompt unless it is a conversation, "
            "or chosen and rejected share one; or messages; or text",
            forms=(("chosen",), ("completion",)),
            answers=(_PAIR, ("chosen",), ("completion",)),
            reference=("ref_logp_chosen",),
            half=0,
            reads_text=True,
        ),
    )
}


def get_kind(name: str) -> Kind:
    """Returns the kind of this name; ValueError for a name that there is not."""
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {name!r}")
    return KINDS[name]
