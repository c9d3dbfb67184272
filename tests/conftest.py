"""What the whole suite shares: thirteen thousand collected tests are no garbage, so the collector need not look at them again."""

from __future__ import annotations

import gc

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
