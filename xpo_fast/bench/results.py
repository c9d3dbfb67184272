"""Keeps results in pytest-benchmark's JSON format, case by case, so that a run can be stopped and resumed.

Timed contenders are its `benchmarks`, with its statistics, so that `pytest-benchmark compare` reads the file. What it
has no place for is in `extra_info`; contenders without a time are in `untimed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_json
from .measure import environment
from .work import Record, Work

# What must not change between the parts of a resumed run.
SAME = ("cpu", "instructions", "held_to", "threads", "versions")


class Results:
    """The records of a run by the name of their case, and the file that they are kept in, if any."""

    def __init__(self, path: Path | None, options: Mapping[str, Any]) -> None:
        self.path = path
        self.environment = environment()
        self.options = dict(options)
        self.records: dict[str, list[Record]] = {}
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}  # of this run, by case; the file does not have them: --resume tries again

    def resume(self) -> None:
        """Takes over the finished cases of the file.

        Raises ValueError for a file that is none of these results, or of another machine, version or options.
        """
        assert self.path is not None
        content = read(self.path)
        other = [n for n in SAME if content["environment"].get(n) != self.environment[n]]
        other += [f"--{n}" for n in self.options if content["options"].get(n) != self.options[n]]
        if other:
            raise ValueError(
                f"{self.path} is of a run with other {', '.join(other)}: resume it as it was begun, or begin a new one "
                "with --overwrite or another --json"
            )
        for key, seconds in content["finished"].items():
            self.seconds[key] = seconds
            self.records[key] = []
        for record in records_of(content):
            if record["key"] in self.records:
                self.records[record.pop("key")].append(record)

    def add(self, work: Work, records: list[Record], seconds: float) -> None:
        """Adds the records of a finished case, and writes the file."""
        self.records[work.key], self.seconds[work.key] = records, seconds
        if self.path:
            write_json(self.path, self.content())

    def content(self) -> dict[str, Any]:
        """Returns what the file holds."""
        import pytest_benchmark

        about = self.environment
        timed = [(k, r) for k, records in self.records.items() for r in records if "samples_ms" in r]
        untimed = [{**r, "key": k} for k, records in self.records.items() for r in records if "samples_ms" not in r]
        return {
            "version": pytest_benchmark.__version__,
            "datetime": about["date"],
            "machine_info": {n: about[n] for n in ("cpu", "instructions", "threads", "system")},
            "commit_info": {"id": about["commit"], "dirty": about["uncommitted_changes"]},
            "environment": about,
            "options": self.options,
            "finished": self.seconds,
            "benchmarks": [_benchmark(key, record) for key, record in timed],
            "untimed": untimed,
        }


def _benchmark(key: str, record: Record) -> dict[str, Any]:
    """Returns a timed record in pytest-benchmark's form, whose times are in seconds."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for sample_ms in record["samples_ms"]:
        stats.update(sample_ms / 1e3)
    own = ("contender", "params", "samples_ms", "median_ms")
    return {
        "group": key,
        "name": f"{key.partition('/')[2]}: {record['contender']}",
        "fullname": f"{key}/{record['contender']}",
        "param": record["contender"],
        "params": record.get("params", {}),
        "extra_info": {name: value for name, value in record.items() if name not in own},
        "options": {"interleaved": True},
        "stats": {**stats.as_dict(), "data": stats.data, "iterations": 1},
    }


def read(path: Path) -> dict[str, Any]:
    """Returns the content of a result file. Raises ValueError for a file that is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a file that `xpo-fast bench --json` has written")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if {"benchmarks", "untimed", "finished", "environment", "options"} <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is not a result file: expected one that `xpo-fast bench --json` has written")


def records_of(content: Mapping[str, Any]) -> Iterable[Record]:
    """Yields the records of a file's content, each with the name of its case as `key`."""
    for b in content["benchmarks"]:
        samples_ms = [s * 1e3 for s in b["stats"]["data"]]
        times = {"samples_ms": samples_ms, "median_ms": b["stats"]["median"] * 1e3}
        yield {"key": b["group"], "contender": b["param"], "params": b["params"], **b["extra_info"], **times}
    yield from (dict(record) for record in content["untimed"])
