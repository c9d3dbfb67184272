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


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    return home
