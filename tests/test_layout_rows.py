"""The tree of rows: what stands where in a layout's sequence, and who sees it, for any rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpo_fast.layouts import Layout, lay_out


@st.composite
def rows(draw):
    """Rows of two words, so that beginnings meet: prompts, completions of them, equal rows, empty ones, padding."""
    words = st.lists(st.integers(1, 2), max_size=9)
    prompts = draw(st.lists(words, min_size=1, max_size=3))
    texts = [draw(st.sampled_from(prompts)) + draw(words) for _ in range(draw(st.integers(1, 7)))]
    width = max(1, max(map(len, texts))) + draw(st.integers(0, 2))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.int64)
    for r, text in enumerate(texts):
        start = draw(st.integers(0, width - len(text)))
        ids[r, start : start + len(text)] = torch.tensor(text, dtype=torch.int64)
        mask[r, start : start + len(text)] = 1
    seed = draw(st.integers(0, 999))  # 0: all; drawing each place by itself would take most of the time
    wanted = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return ids, mask, wanted & mask.bool() if seed else None, texts


def paths(layout: Layout) -> list[list[int]]:
    """Of each token, the tokens of its row up to itself, read along the segments."""
    found = []
    for segment in layout.segments:
        seen = [k for start, stop in segment.before for k in range(start, stop)]
        found += [[*seen, *range(segment.start, q + 1)] for q in range(segment.start, segment.stop)]
    return found


@settings(deadline=None, max_examples=150)
@given(rows(), st.booleans(), st.integers(1, 8))
def test_a_layout_is_its_rows(batch, share, least):
    ids, mask, wanted, texts = batch
    layout = lay_out(ids, mask, wanted, share=share, least=least)
    asked = mask.bool() if wanted is None else wanted
    # The segments follow one another and are the sequence.
    edges = [(s.start, s.stop) for s in layout.segments]
    assert [a for a, _ in edges] == [0, *(b for _, b in edges[:-1])] and edges[-1][1] == len(layout)
    seen = paths(layout)
    tokens = layout.take(ids)[0].tolist()
    assert layout.positions.tolist() == [len(path) - 1 for path in seen]
    assert [s.at for s in layout.segments] == [len(seen[s.start]) - 1 for s in layout.segments]
    # Each place that is asked for has a token with the row's tokens before it, and no other place has one.
    places = list(zip(layout.at_row.tolist(), layout.at_column.tolist(), strict=True))
    assert places == [tuple(x) for x in asked.nonzero().tolist()]
    for (r, column), q in zip(places, layout.index.tolist(), strict=True):
        assert [tokens[k] for k in seen[q]] == ids[r, : column + 1][mask[r, : column + 1].bool()].tolist()
    # Who is seen, by `ends`, is who stands before in the row.
    ends, count = layout.ends, torch.arange(len(layout))
    by_ends = (count[None] <= count[:, None]) & (count[:, None] < ends[None])
    assert [row.nonzero()[:, 0].tolist() for row in by_ends] == [sorted(path) for path in seen]
    assert layout.read == sum(map(len, texts))
    if not share and asked.any():
        last = [max(c for c in range(mask.shape[1]) if asked[r, c]) for r in range(len(texts)) if asked[r].any()]
        first = [int(mask[r].argmax()) for r in range(len(texts)) if asked[r].any()]
        assert len(layout) == sum(b + 1 - a for a, b in zip(first, last, strict=True))


@settings(deadline=None, max_examples=100)
@given(rows(), st.integers(1, 8))
def test_with_the_least_saving_of_one_each_beginning_stands_once(batch, least):
    ids, mask, _, texts = batch
    beginnings = {tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)}
    sizes = [len(lay_out(ids, mask, share=True, least=n)) for n in (1, least)]
    if beginnings:
        assert sizes[0] == len(beginnings) <= sizes[1] <= int(mask.sum())


@settings(deadline=None, max_examples=100)
@given(rows(), st.booleans())
def test_put_brings_back_what_was_taken_where_it_was_asked_for(batch, share):
    ids, mask, wanted, _ = batch
    layout = lay_out(ids, mask, wanted, share=share, least=1)
    asked = mask.bool() if wanted is None else wanted
    wide = ids.shape[1] + 2
    back = layout.put(layout.take(ids[..., None].float()), wide)
    assert torch.equal(back[:, : ids.shape[1], 0], (ids * asked).float()) and not back[:, ids.shape[1] :].any()


def test_padding_between_tokens_is_refused():
    with pytest.raises(ValueError, match="padding between its tokens"):
        lay_out(torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), share=True)
