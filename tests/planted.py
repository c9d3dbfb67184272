"""Pairs of ragged lengths and of a planted goal, and what the tests on them share."""

from __future__ import annotations

import json

import pytest
import torch

from test_trainer import make_model, make_tokenizer


def ids_of(text: str) -> list[int]:
    return make_tokenizer()(text)["input_ids"]


# Ragged: an answer of one token (and EOS), one longer than its prompt, equal lengths.
PAIRS = [
    {"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"},
    {"prompt": "w7 w8 w9 w10 w11", "chosen": " w3", "rejected": " w12 w13 w14 w15 w16 w17 w18"},
    {"prompt": "w7", "chosen": " w20 w21", "rejected": " w22 w23"},
    {"prompt": "w30 w31", "chosen": " w32 w33 w34 w35", "rejected": " w36 w37"},
]


def planted(count: int, seed: int) -> list[dict]:
    """What is preferred goes over w40 … w49 to w60, what is not over w70 … w79 to w80, behind any prompt."""
    g = torch.Generator().manual_seed(seed)

    def said(low: int, end: str) -> str:
        n = int(torch.randint(2, 6, (), generator=g))
        return " " + " ".join(f"w{low + int(k)}" for k in torch.randint(10, (n,), generator=g)) + f" {end}"

    prompts = [f"w{int(k)} w{int(k) // 3}" for k in torch.randint(40, (count,), generator=g)]
    return [{"prompt": p, "chosen": said(40, "w60"), "rejected": said(70, "w80")} for p in prompts]


def said(g: torch.Generator, low: int, *decisive: str) -> str:
    """Three of the words w{low} … w{low + 11}, and the decisive ones, in any order."""
    drawn = [f"w{low + int(k)}" for k in torch.randint(12, (3,), generator=g)] + [*decisive]
    return " " + " ".join(drawn[i] for i in torch.randperm(len(drawn), generator=g).tolist())


def decided(count: int, seed: int, *kinds: tuple[str, str], low: int = 30) -> list[dict]:
    """Pairs of which one word decides: that of kind i mod K in the chosen against that in the rejected completion."""
    g, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        better, worse = kinds[i % len(kinds)]
        prompt = " ".join(f"w{10 + int(k)}" for k in torch.randint(12, (3,), generator=g))
        rows.append({"prompt": prompt, "chosen": said(g, low, better), "rejected": said(g, low, worse)})
    return rows


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    return home
