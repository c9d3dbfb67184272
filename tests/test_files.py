"""Files: JSON without NaN, and writes that leave the whole old file or the whole new one."""

from __future__ import annotations

import json
import math
import os
from types import MappingProxyType

import pytest

from xpo_fast.files import check_writable, finite, publish, write_atomically, write_json


def test_finite_at_every_depth():
    value = MappingProxyType({"a": math.nan, "b": (1.5, [math.inf, -math.inf, 0]), "c": {"d": "nan", "e": True}})
    assert finite(value) == {"a": None, "b": [1.5, [None, None, 0]], "c": {"d": "nan", "e": True}}


def test_json_makes_its_folder_and_is_strict(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"λ": math.nan})
    assert path.read_bytes().isascii() and json.loads(path.read_text(), parse_constant=pytest.fail) == {"λ": None}
    write_json(path, {"λ": 1}, ensure_ascii=False)
    assert path.read_text(encoding="utf-8") == '{\n "λ": 1\n}\n'


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_what_another_machine_with_the_same_process_number_writes_is_left_alone(tmp_path):
    for name in (f".file.{os.getpid()}", f".xpo-fast-{os.getpid()}"):
        (tmp_path / name).mkdir()
    there = sorted(os.listdir(tmp_path))
    check_writable(tmp_path, "--output-dir")
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"written")
        publish(tmp_path / "published", b"first")
        publish(tmp_path / "published", b"second")
    finally:
        os.umask(previous)
    assert (tmp_path / "published").read_bytes() == b"first"
    for name in ("file", "published"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == sorted([*there, "file", "published"])
