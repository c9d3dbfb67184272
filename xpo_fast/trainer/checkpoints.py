"""Files that a trainer writes and reads beside transformers' own: complete or not at all, with errors that name them.

../resume.py finds the last complete checkpoint of a folder, and compares the settings it was made with.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import existing_part, size
from ..models import folders_below
from ..models.loading import check_loaded
from ..models.value_head import value_head
from ..objective import Objective
from ..resume import is_checkpoint

STATE_FILE = "objective.pt"
_MODEL_FILES = (  # patterns of the files of a saved model or adapter, in whichever form it was saved
    *("adapter_config.json", "adapter_model.*", "value_head.safetensors", "reward_model.json"),
    *("config.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)


def save_objective(objective: Objective, folder: str | Path) -> None:
    """Writes the objective's state into a checkpoint; an objective without state writes nothing."""
    if state := objective.state_dict():
        torch.save({name: x.cpu() for name, x in state.items()}, Path(folder) / STATE_FILE)


def load_objective(objective: Objective, folder: str | Path, device: torch.device) -> None:
    """Restores what `save_objective` has written; does nothing where it has written nothing."""
    path = Path(folder) / STATE_FILE
    if path.is_file():  # by way of the CPU: torch cannot load onto "cpu:0", which is DeepSpeed's name for it
        state = torch.load(path, map_location="cpu", weights_only=True)
        objective.load_state_dict({name: x.to(device) for name, x in state.items()})


@contextlib.contextmanager
def reading(folder: str) -> Iterator[None]:
    """Raises ValueError, which names the checkpoint, in place of what torch and safetensors raise about its files."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"cannot go on from {folder}: it is broken, or of another model ({' '.join(lines[-1].split())}); name "
            "another checkpoint, or begin anew"
        ) from error


def load_renamed(model: Any, folder: str, missing: Iterable[str]) -> None:
    """Loads weights of a checkpoint that it holds under other names than the model's, as transformers saves some.

    Experts are saved one by one, for example, and parts of image-and-text models by older names. Trainer looks for the
    model's own names alone, and leaves other weights as they are with a line in the log. missing: the names that it
    did not find. Raises ValueError for weights that the checkpoint does not hold under any name.
    """
    own = model.state_dict(keep_vars=True)
    missing = {name for name in missing if name in own}
    known = {x.data_ptr() for name, x in own.items() if name not in missing}  # a tied weight is there by another name
    head = value_head(model)
    known |= set() if head is None else {p.data_ptr() for p in head.parameters()}  # which is loaded by itself
    missing = {name for name in missing if own[name].data_ptr() not in known}
    if not missing:
        return
    options: Any = {"dtype": "auto", "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded, info = type(model).from_pretrained(folder, **options)
    check_loaded(folder, loaded, info)
    found = loaded.state_dict()
    with torch.no_grad():
        for name in missing:
            own[name].copy_(found[name])


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Sets an earlier run's checkpoint of the same name aside, and puts it back if the block writes no complete one."""
    earlier = folder.with_name(f".{folder.name}.before")
    if folder.exists():
        # A run that was killed here may have left half a checkpoint, and the complete one aside.
        if is_checkpoint(earlier) and not is_checkpoint(folder):
            shutil.rmtree(folder)
        else:
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
    try:
        yield
    except BaseException:
        # A complete checkpoint stays: transformers uploads it, and removes older ones, after it is written.
        if not is_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if earlier.exists():
                earlier.rename(folder)
        raise
    finally:
        if is_checkpoint(folder):
            shutil.rmtree(earlier, ignore_errors=True)


def trained_at_root(folder: Path, model: Any) -> None:
    """Moves the adapter that was trained from its subfolder, where PEFT writes all but "default", into `folder`."""
    names = list(model.active_adapters) if hasattr(model, "disable_adapter") else []
    if len(names) == 1 and (folder / names[0] / "adapter_config.json").is_file():
        of_it = folder / names[0]
        _move(of_it, folder, [path.name for path in of_it.iterdir()])
        of_it.rmdir()


def unsaved(model: Any) -> list[str]:
    """Returns the names of the trained weights of a PEFT model that are not saved with its adapter."""
    if not hasattr(model, "disable_adapter"):
        return []
    from peft import get_peft_model_state_dict

    saved = set()
    for name in model.active_adapters:
        of_it = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        saved |= {x.data_ptr() for x in of_it.values()}
    head = value_head(model)
    saved |= set() if head is None else {p.data_ptr() for p in head.parameters()}
    there = (n for n, p in model.named_parameters() if p.requires_grad and p.numel() and not p.is_meta)
    return [name for name in there if model.get_parameter(name).data_ptr() not in saved]


def check_bases_stay(model: nn.Module, folder: Path) -> None:
    """Raises ValueError if saving into `folder` would overwrite or delete what the model's adapter was trained on.

    A whole model may lie in the folder itself: it stays there.
    """
    for base, is_adapter in folders_below(model):
        here, there = folder.resolve(), base.resolve()
        if (is_adapter and there == here) or (there.parent == here and there.name.startswith("checkpoint-")):
            raise ValueError(
                f"the adapter is trained on top of what is in {base}, which would be overwritten in the output folder "
                f"{folder}, and is needed to load it: name another output folder"
            )


def replace_model(folder: Path, new: Path, earlier: Path, model: nn.Module) -> None:
    """Moves the files of the folder `new` into `folder`, and files of other models out of it: all of them, or none.

    Without an error the files moved out are deleted; until then they are in `earlier`. The base model of `model`'s
    adapter stays if `folder` is where it lies.
    """
    if earlier.exists():  # left by a run that was killed here
        _move(earlier, folder, [path.name for path in earlier.iterdir()])
        earlier.rmdir()
    names = [path.name for path in new.iterdir()]
    present = {path.name for path in folder.iterdir()}
    stale = {path.name for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    if any(base.samefile(folder) for base, _ in folders_below(model)):
        stale = {name for name in stale if name.startswith("adapter_")}
    earlier.mkdir()
    try:
        _move(folder, earlier, present & ({*names} | stale))
        _move(new, folder, names)
    except BaseException:
        _move(folder, new, [name for name in names if not (new / name).exists()])
        _move(earlier, folder, [path.name for path in earlier.iterdir()])
        earlier.rmdir()
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    """Moves files and folders by name, replacing those of the same name in `target`."""
    for name in names:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        os.replace(source / name, target / name)


def check_room(model: nn.Module, args: Any) -> None:
    """Raises ValueError if the disk has no room for one checkpoint of the model and its optimizer."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    adapted = hasattr(model, "disable_adapter")
    saved = trained if adapted else sum(p.numel() * p.element_size() for p in model.parameters())
    adam = "adam" in str(args.optim).lower() and not args.save_only_model
    needed = saved + (2 * trained if adam else 0)
    free = shutil.disk_usage(existing_part(Path(str(args.output_dir)))).free
    if free < needed:
        raise ValueError(
            f"{args.output_dir} has room for {size(free)}, and a checkpoint takes about {size(needed)} "
            f"(model {size(saved)}{f', optimizer {size(2 * trained)}' if adam else ''}): make room, or name another "
            "output folder"
        )
