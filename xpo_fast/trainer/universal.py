"""DeepSpeed's checkpoints, read by another number of processes than has written them.

Each process of ZeRO writes its part of the optimizer. DeepSpeed's own converter puts the parts together into a
universal checkpoint, from which an engine of any number of processes takes its own. It is made beside the checkpoint
when a run begins, and removed when it has been read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_PARTS = "*_optim_states.pt"  # files of a checkpoint, one of each process
_STEPS = Path("zero", "optimizer_state.pt")  # of a universal checkpoint: what its optimizer has beside the weights'


def newest(folder: Path) -> Path:
    """Returns the folder of DeepSpeed's files in a checkpoint. Raises FileNotFoundError if it names none."""
    return folder / (folder / "latest").read_text("utf-8").strip()


def parts_of(folder: Path) -> int:
    """Returns how many processes' parts of an optimizer a checkpoint has."""
    return len(list(newest(folder).glob(_PARTS)))


@contextlib.contextmanager
def loading_universal(folder: Path, accelerator: Any) -> Iterator[None]:
    """Lets DeepSpeed's engines load a checkpoint in its universal form within the block; every process must enter it.

    Raises ValueError, on every process, if the converter fails: it knows Adam's states alone.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]
    from accelerate.utils import broadcast_object_list

    parts = newest(folder)
    whole = parts.with_name(parts.name + "_universal")
    (why,) = broadcast_object_list([_convert(parts, whole) if accelerator.is_main_process else ""])
    if why:
        raise ValueError(
            f"{folder}: DeepSpeed's converter cannot make a universal checkpoint of it ({why}); it knows Adam's states "
            "alone: resume on as many processes as have written it"
        )
    engine: Any = deepspeed.DeepSpeedEngine
    load = engine.load_checkpoint

    def load_universal(self: Any, at: str, **how: Any) -> Any:
        self._config.load_universal_checkpoint = True
        try:
            found = load(self, at, tag=whole.name, **how)
        finally:
            self._config.load_universal_checkpoint = False
        saved = torch.load(whole / _STEPS, map_location="cpu", weights_only=False)
        saved = saved.get("optimizer_state_dict", saved)["param_groups"]
        # ZeRO-3 gives all groups the settings of the first, and one tensor as their count of steps, which each raises.
        for group, own in zip(self.optimizer.param_groups, saved, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        for state in self.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        return found

    engine.load_checkpoint = load_universal
    try:
        yield
    finally:
        engine.load_checkpoint = load
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(whole, ignore_errors=True)


def _convert(parts: Path, whole: Path) -> str:
    """Makes a universal checkpoint by DeepSpeed's converter, in a process of its own; returns why it could not."""
    if whole.is_dir():  # of a run that died before it had read it
        return ""
    made = whole.with_name(whole.name + ".part")
    shutil.rmtree(made, ignore_errors=True)
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    words += ["--input_folder", str(parts), "--output_folder", str(made)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    (whole.parent / "latest_universal").unlink(missing_ok=True)
    if done.returncode:
        shutil.rmtree(made, ignore_errors=True)
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    made.rename(whole)
    return ""
