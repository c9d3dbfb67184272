"""From which checkpoint a run may resume: the last complete one, and one that was made with the same settings.

The settings are in one file per checkpoint, `made_with.json`, by the names of command-line options (`--lora-rank`) or
of a trainer's arguments (`method`). A setting that is not in it may differ in the resumed run, and takes effect from
then on: the number of steps, the learning rate's schedule and warm-up, logging, saving, and how evaluation is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically

if TYPE_CHECKING:
    import datasets

MADE_WITH = "made_with.json"
# Arguments of TrainingArguments that a resumed run takes from the checkpoint's optimizer, whatever is asked for.
OF_THE_OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # per file of weights


def last_checkpoint(output_dir: str | Path, *files: str) -> str | None:
    """Returns the last complete checkpoint in a run's folder; None if there is none.

    A checkpoint that was being written when the run died is left out.
    files: names of files that the checkpoint must have beside transformers' own.
    """
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and is_checkpoint(folder) and all((folder / name).is_file() for name in files):
            found[int(step)] = str(folder)
    return found[max(found)] if found else None


def is_checkpoint(folder: str | Path) -> bool:
    """Tells whether the folder is a checkpoint that was written to its end."""
    with contextlib.suppress(OSError, ValueError):  # trainer_state.json is the last file of a checkpoint to be written
        return json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8")) is not None
    return False


def write_made_with(folder: str | Path, made_with: Mapping[str, Any]) -> None:
    """Writes the settings of a run into a checkpoint."""
    write_atomically(Path(folder) / MADE_WITH, (json.dumps(as_json(made_with), indent=1) + "\n").encode())


def check_made_with(folder: str | Path, now: Mapping[str, Any]) -> None:
    """Raises ValueError, naming both values, if the checkpoint was made with other settings than `now`.

    Only names that both have are compared; a checkpoint without the file, written by another version, is accepted.
    """
    was, now = made_with_of(folder), as_json(now)
    changed = [name for name in now if name in was and not _same(was[name], now[name])]
    if changed:
        changes = ", ".join(f"{name} was {_shown(was[name])} and is {_shown(now[name])}" for name in changed)
        raise ValueError(
            f"{folder} is of another run, where {changes}: go on with the same options and data, or begin a new run in "
            f"another output folder, with the model {folder} if it is to begin with these weights"
        )


def made_with_of(folder: str | Path) -> dict[str, Any]:
    """Returns the settings that a checkpoint was made with; none if it has no file of them."""
    path = Path(folder) / MADE_WITH
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): go on from another checkpoint") from error


def model_identity(name: str) -> Any:
    """Returns a model's identity: its name and, for a folder, a hash of its configuration and samples of its weights.

    Two folders with the same hash are the same model, wherever they are.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "adapter_config.json"):
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".gguf"):
            length = path.stat().st_size
            digest.update(f"{path.name} {length};".encode())
            with path.open("rb") as file:
                for k in range(_SAMPLES):
                    file.seek(length * k // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
    return {"name": name, "hash": digest.hexdigest()[:16]}


def rows_identity(dataset: datasets.Dataset | list[dict[str, Any]]) -> str:
    """Returns a hash of a data set's rows without the column `where`, a row's place in its file."""
    import pyarrow as pa

    digest = hashlib.sha256()
    if isinstance(dataset, list):
        for row in dataset:
            about = {name: value for name, value in row.items() if name != "where"}
            digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]
    names = sorted(name for name in dataset.column_names if name != "where")
    tables: Any = dataset.select_columns(names).with_format("arrow").iter(batch_size=4096)
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata().combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()[:16]


def as_json(value: Any) -> Any:
    """Returns the value as JSON gives it back: sets as sorted lists, anything else that JSON does not have as text."""
    return json.loads(json.dumps(value, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, dict) and isinstance(now, dict) and "hash" in was and "hash" in now:
        return was["hash"] == now["hash"]
    return was == now


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "hash" in value:
        return f"{value['name']} ({value['hash']})"
    if value is None:
        return "not given"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
