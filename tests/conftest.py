"""Keeps what lasts from the garbage collector: the thousands of collected tests, and modules that tests import."""

from __future__ import annotations

import gc
import sys

import pytest

MANY = 50  # modules: of transformers, peft or torch._dynamo, which a trainer would have visited at every step
_frozen = 0


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    _freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if len(sys.modules) >= _frozen + MANY:
        _freeze()


def _freeze() -> None:
    global _frozen
    gc.collect()
    gc.freeze()
    _frozen = len(sys.modules)
