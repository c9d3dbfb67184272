"""A world of gloo processes on this machine: each runs a function of its rank, and writes its results to a file."""

from __future__ import annotations

import fcntl
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What the test files import whose functions the ranks run.
TRAINING = ["pytest", "hypothesis", "peft", "datasets", "transformers.trainer", "xpo_fast.rl", "xpo_fast.trainer"]


def run_world(
    folder: Path, world: int, run: Callable[[int], Any], *, join: bool = False, lost: Collection[int] = ()
) -> list[Any]:
    """What run(rank) returned on each rank. A failure on one of them is an assertion's, with its traceback.

    folder: of this world alone; what it has found before is not found again. run: of a module, or a partial of that.
    join: it is run in a process group; trainers make their own. lost: ranks that do not return.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ran").exists():
            (folder / "ran").touch()
            _start(folder, world, run, join, parts_together=not lost)
    return _results(folder, [rank for rank in range(world) if rank not in lost])


def shared_folder(tmp_path_factory, name: str) -> Path:
    """A folder of that name; under pytest-xdist it is one for all workers, so that a world in it runs once for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def found_by(tmp_path_factory, world: int, run: Callable[[int], dict]) -> list[dict]:
    """What run(rank) returned on each rank, in a process group, once for all workers of pytest-xdist."""
    return run_world(shared_folder(tmp_path_factory, f"{run.__module__}.{run.__name__}"), world, run, join=True)


def _start(folder: Path, world: int, run: Callable[[int], Any], join: bool, *, parts_together: bool = True) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("forkserver")  # which imports once for all
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", *TRAINING])
    processes = [
        context.Process(target=_worker, args=(r, port, str(folder), world, run, join, parts_together))
        for r in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    for process in processes:
        process.kill()


def _results(folder: Path, ranks: Iterable[int]) -> list[Any]:
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in ranks]


def _worker(
    rank: int, port: int, folder: str, world: int, run: Callable[[int], Any], join: bool, parts_together: bool
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "WORLD_SIZE": f"{world}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    try:
        if join:
            warnings.simplefilter("error", UserWarning)
            dist.init_process_group(
                "gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), world_size=world, rank=rank
            )
        torch.save(run(rank), Path(folder) / f"{rank}.pt")
        if parts_together:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(traceback.format_exc())
        raise
