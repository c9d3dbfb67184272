"""The reference policy's log-probs: from a frozen copy, from the model in training set back, or from disk.

The reference is the model as it was handed to the trainer, with its adapter if it had one (handed_over.py). Its
log-probs are computed in eval mode (no dropout) and without gradient, by the same head as the policy's, so that policy
− reference is exactly 0 until something is learned.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Kind, with_column
from ..files import write_atomically
from ..head import sequence_logps, token_logps
from ..head.sharded import unpartitioned
from ..layouts import Inputs, Layout, beside, current_shard
from ..models import Head, install_fused_loss
from ..models.lm_head import causal_lm
from ..models.modes import evaluating
from ..objective import Objective
from ..reduce import most_over_ranks
from .budget import Budget, KeepsUnits
from .handed_over import HandedOver, Kept, adapter_identity, switched_off
from .sharding import any_of_them, in_parts, resharded, sample_of_parts, shard_copy, whole_weights

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

STRATEGIES = ("auto", "copy", "adapter", "cached", "none")
KEPT = "the model with its adapter on, and its trained weights kept as they were handed over"
SHARD_ROWS = 512
_FORMAT = 2  # version of the cache's format, part of every key
# Entries of a model's config that do not affect its output, or that training or saving the model changes.
_NOT_IN_KEY = ("_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype")


def choose(requested: str, objective: Objective, model: nn.Module) -> tuple[str, str]:
    """Chooses where the reference's log-probs come from.

    Returns one of "none", "adapter", "copy" and "cached", and a phrase that tells the user why. Raises ValueError if
    `requested`, one of STRATEGIES, does not fit the objective or the model.
    """
    name = " + ".join(m.name for m in objective.methods)
    if requested not in STRATEGIES:
        raise ValueError(f"reference must be one of {', '.join(STRATEGIES)}, got {requested!r}")
    if not objective.needs_reference:
        if requested in ("auto", "none"):
            return "none", f"{name} has no reference"
        raise ValueError(f'{name} has no reference policy: use reference="none" or "auto", got {requested!r}')
    if requested == "none":
        raise ValueError(
            f'{name} compares the policy with a reference; reference="none" is for methods without one. '
            'Use "auto", "copy", "adapter" or "cached"'
        )
    has_adapter = hasattr(model, "disable_adapter")
    if requested == "adapter" and not has_adapter:
        raise ValueError(
            'reference="adapter" is the model with its adapter switched off: train with a peft_config (--lora)'
        )
    if requested == "cached" and objective.needs_reference_tokens:
        raise ValueError(
            f'{name}, set as it is, looks at the reference token by token, and reference="cached" keeps sums over '
            'completions: use "adapter" or "copy"'
        )
    if requested != "auto":
        return requested, "as asked"
    if has_adapter:
        return "adapter", "the model with its adapter switched off, no second copy in memory"
    if objective.needs_reference_tokens:
        return "copy", f"a frozen copy, because {name} looks at the reference token by token"
    return "cached", "log-probs computed once and kept on disk, no second copy in memory"


def row_logps(
    model: nn.Module,
    input_ids: Tensor,  # (R, T)
    attention_mask: Tensor,  # (R, T)
    targets: Tensor,  # (R, T) aligned, −100 where not scored
    layout: Layout | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Computes the summed log-prob and the number of scored tokens of each row, (R, 2) float32.

    The model, which needs `install_fused_loss` and may be wrapped (DDP, PEFT), runs in eval mode and without gradient.
    """

    rows = Inputs(input_ids, attention_mask, targets, layout)
    own, shard = rows.own_targets, current_shard()

    def score(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        sums, lengths = sequence_logps(hidden, head, own, row_shard=shard, backend=backend)
        return {"rows": torch.stack([sums.float(), lengths.to(torch.float32)], dim=1)}

    with evaluating(model):
        return rows.run(model, score)["rows"]


def batch_logps(model: nn.Module, batch: Mapping[str, Tensor], kind: Kind, *, backend: str = "auto") -> Tensor:
    """Computes the log-prob and length of the completions of each unit of a collated batch: (U, S, 2).

    Axis 1, the S completions of a unit: those of a list, with the rejected one, if any, last; else those of
    `kind.completions` and, if the batch has it, the mismatched one from which KTO's reference point is estimated.
    Axis 2: summed log-prob, number of tokens.
    """
    inputs, count = Inputs.of(batch), len(kind.completions)
    if "kl_input_ids" in batch:
        inputs, count = beside(inputs, Inputs.of(batch, "kl_")), count + 1
    rows = row_logps(model, *inputs, backend=backend)
    if kind.listed:
        return rows.view(batch["list_lengths"].shape[0], -1, 2)
    return torch.stack(rows.chunk(count), dim=1)


class LiveReference:
    """A reference whose log-probs are computed with every batch.

    strategy: "copy", by a frozen copy; "adapter", with the adapter off; or "kept", with the weights that are trained as
        they were handed over. model: that to be trained, not wrapped, before its first step.
    """

    def __init__(
        self, strategy: str, model: nn.Module, accelerator: Accelerator, backend: str, handed_over: HandedOver
    ) -> None:
        self.accelerator, self.backend = accelerator, backend
        self.copy, self._kept = None, None
        if strategy == "copy":
            copied = handed_over.copy(model)
            install_fused_loss(copied)
            self.identity = handed_over.identity(copied, None)  # of whole weights, before they are in parts
            self.copy = shard_copy(copied, accelerator)
        else:
            self._kept = Kept(model, off=handed_over.off)
            self.identity = handed_over.identity(None, self._kept)

    def logps(self, model: nn.Module, rows: Inputs) -> Tensor:
        """Computes the reference's summed log-prob of each row, (R,) float32. model: the policy, as wrapped."""
        with self._scoring(model) as scored:
            return row_logps(scored, *rows, backend=self.backend)[:, 0]

    def token_logps(self, model: nn.Module, rows: Inputs) -> Tensor:
        """Computes the reference's log-prob of each target, (R, T) or this rank's chunk, 0 where there is none."""
        own = rows.own_targets

        def score(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            return {"logps": token_logps(hidden, head, own, backend=self.backend)}

        with self._scoring(model) as scored:
            return rows.run(scored, score)["logps"]

    def hidden_states(self, model: nn.Module, rows: Inputs) -> dict[str, Any]:
        """Computes ref_hidden (R, T, D), ref_weight and ref_bias, for objectives that compare whole distributions."""

        def take(hidden: Tensor, head: Head) -> dict[str, Any]:
            weight = unpartitioned(head.weight)[0].detach()
            if head.adapter is not None:  # hidden has its inputs beside the hidden states
                weight = torch.cat([weight, head.adapter.detach().to(weight)], dim=1)
            bias = None if head.bias is None else unpartitioned(head.bias)[0].detach()
            return {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}

        with self._scoring(model, frees=False) as scored:
            return rows.run(scored, take)

    @contextlib.contextmanager
    def _scoring(self, model: nn.Module, *, frees: bool = True) -> Iterator[nn.Module]:
        """Yields the reference model in eval mode and without gradient. frees: what FSDP2 gathers of a copy."""
        scored = model if self.copy is None else self.copy
        in_place = contextlib.nullcontext() if self._kept is None else self._kept.in_place()
        freed = resharded(self.copy) if frees and self.copy is not None else contextlib.nullcontext()
        with self.accelerator.autocast(), in_place, evaluating(scored), freed:
            yield scored


class CachedReference:
    """Reference log-probs kept on disk, in one file per `SHARD_ROWS` rows.

    A file's name is the hash of everything its numbers depend on: the weights, the model's config and its adapter's
    settings, dtype and autocast dtype, and the rows' token ids and masks. Tokenizer, chat template and truncation act
    through the ids, so a change of any of these, or of the data, gives another name and nothing stale can be read.
    Files appear complete or not at all; an interrupted computation goes on with the first shard that is missing.

    The hash does not depend on how many processes compute, nor on how they keep the model: a folder that one process
    has filled is read by runs that shard the model, and the other way round. Every process has to make this.

    adapter_off: the reference is the PEFT model with its adapter switched off, and none of the adapter is in the hash.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        dtype: str,
        kind: Kind,
        accelerator: Accelerator | None = None,
        adapter_off: bool = False,
    ) -> None:
        self.kind, self.adapter_off = kind, adapter_off
        self._start: str | None = None  # of this process's part of the weights, once they are in parts
        weights = weights_fingerprint(model, adapter_off=adapter_off)
        # With FSDP's cpu_ram_efficient_loading, the main process alone has read the weights.
        self.weights = weights if accelerator is None else _from_main_process(accelerator, lambda: weights)
        config = {k: v for k, v in causal_lm(model).config.to_dict().items() if k not in _NOT_IN_KEY}
        self.about = {"format": _FORMAT, "kind": kind.name, "weights": self.weights, "compute_dtype": dtype}
        self.about["config"] = config
        if not adapter_off and (adapter := adapter_identity(model)):
            self.about["adapter"] = adapter
        self.context = hashlib.sha256(json.dumps(self.about, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = folder / self.context[:16]

    def attach(
        self,
        dataset: datasets.Dataset,
        model: nn.Module,
        accelerator: Accelerator,
        collate: Callable[[Sequence[dict]], dict[str, Tensor]],
        *,
        batch_size: int,
        tokens: int | None = None,
        backend: str = "auto",
        label: str = "",
        progress: bool = True,
    ) -> datasets.Dataset:
        """Adds the reference log-probs of each row to the dataset, in the columns of `Kind.reference`.

        model: with the weights that this reference was made from, whole, or in parts and then `sharded` has been told.
            Raises ValueError, on every process, if its weights are others and something has to be computed.
        """
        from safetensors.numpy import save
        from tqdm.auto import tqdm

        starts = range(0, len(dataset), SHARD_ROWS)
        shards = [dataset.select(range(start, min(start + SHARD_ROWS, len(dataset)))) for start in starts]
        paths = [self.folder / f"{self._key(shard)}.safetensors" for shard in shards]
        values = _from_main_process(accelerator, lambda: [_read(p, len(s)) for p, s in zip(paths, shards, strict=True)])
        missing = [i for i, value in enumerate(values) if value is None]
        if missing:
            if any_of_them(self.differs(model), accelerator.device):
                raise ValueError(
                    "the reference log-probs of this dataset are not cached, and the model has been trained since it "
                    "was handed to the trainer, so they cannot be computed any more. Give the dataset to the trainer "
                    'as eval_dataset before training, or use reference="copy"'
                )
            if accelerator.is_main_process:
                write_atomically(self.folder / "about.json", json.dumps(self.about, indent=1, default=str).encode())
        rows = sum(len(shards[i]) for i in missing)
        bar = tqdm(total=rows, unit="row", desc=f"reference log-probs{label}", disable=not (progress and missing))
        size: Any = {"batch_size": batch_size, "tokens": tokens, "backend": backend, "advance": bar.update}
        with bar, switched_off(model) if self.adapter_off else contextlib.nullcontext():
            for i in missing:
                values[i] = dataset_logps(shards[i], model, accelerator, collate, self.kind, **size)[..., 0].numpy()
                if accelerator.is_main_process:
                    write_atomically(paths[i], save({"logps": np.ascontiguousarray(values[i])}))
        tables = [v for v in values if v is not None]
        if self.kind.listed:
            rows: Any = dataset
            widths = (len(row["completions_ids"]) + ("rejected_ids" in row) for row in rows)
            lists = [row[:w].tolist() for row, w in zip(itertools.chain(*tables), widths, strict=True)]
            return with_column(dataset, self.kind.reference[0], lists)
        table = np.concatenate(tables) if tables else np.zeros((0, 2), np.float32)
        for name, column in zip(self.kind.reference, table.T, strict=False):
            dataset = with_column(dataset, name, column)
        return dataset

    def sharded(self, model: nn.Module) -> None:
        """Takes note of the model's weights, which are in parts from now on, to see whether they have been trained."""
        self._start = sample_of_parts(model)

    def differs(self, model: nn.Module) -> bool:
        """Tells whether the model's weights are not those that this reference was made from."""
        if self._start is not None:
            return sample_of_parts(model) != self._start
        return weights_fingerprint(model, adapter_off=self.adapter_off) != self.weights

    def _key(self, shard: datasets.Dataset) -> str:
        return hashlib.sha256((self.context + rows_fingerprint(shard)).encode()).hexdigest()[:32]


def weights_fingerprint(model: nn.Module, *, adapter_off: bool = False) -> str:
    """Returns a hash of each weight's name, dtype, shape and bytes; with adapter_off of a PEFT model's base alone.

    The hash of a model in parts is that of the whole one; every process has to ask for it.
    """
    digest = hashlib.sha256()
    prefix = getattr(model.base_model, "prefix", None) if adapter_off else None
    for name, tensor in whole_weights(model):
        if prefix is not None and any(p.startswith(prefix) or p == "modules_to_save" for p in name.split(".")):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        part: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
        digest.update(part)
    return digest.hexdigest()


def rows_fingerprint(dataset: datasets.Dataset) -> str:
    """Returns a hash of the token ids of all rows, and of the masks beside them, column by column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    table = dataset.with_format("arrow")[:]
    for name in sorted(n for n in dataset.column_names if n.endswith(("_ids", "_mask"))):
        column = table[name].combine_chunks()
        digest.update(name.encode())
        while isinstance(column.type, (pa.ListType, pa.LargeListType)):
            # pyarrow makes its compute functions at import, where no type checker sees them.
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
            digest.update(f" {len(lengths)};".encode() + lengths.astype(np.int64).tobytes())
            column = column.flatten()
        digest.update(column.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def dataset_logps(
    dataset: datasets.Dataset,
    model: nn.Module,
    accelerator: Accelerator,
    collate: Callable[[Sequence[dict]], dict[str, Tensor]],
    kind: Kind,
    *,
    batch_size: int,
    tokens: int | None = None,
    backend: str = "auto",
    advance: Callable[[int], Any] = lambda rows: None,
) -> Tensor:
    """Computes `batch_logps` of the rows of an encoded data set, in its order: (N, S, 2) float32 on the CPU.

    Lists shorter than the longest are padded with NaN. The processes share the rows, and each returns all results. Of a
    model in parts all processes compute equally many batches, those that have fewer the shortest row again.
    tokens: a budget of tokens per batch, in place of batch_size, which counts units; None: there is none.
    advance: called with the number of rows done since the last call.
    """
    from accelerate.utils import gather_object

    rows: list[Any] = list(dataset)
    lengths = [row_tokens(row) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)  # similar lengths in a batch: little padding
    copies = 1 if (shard := current_shard()) is None else shard.world  # processes that have the same rows
    ranks = accelerator.num_processes // copies
    mine = order[accelerator.process_index // copies :: ranks]
    done: list[tuple[int, list]] = []
    if tokens is None:
        parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        batches = ((at, collate([rows[i] for i in at])) for at in parts)
        count = len(parts)
    else:
        units = KeepsUnits(collate)([rows[i] for i in mine]).drawn
        cut = Budget(tokens, collate).numbered(units, beside=True)
        batches = (([mine[k] for k in part], batch) for part, batch in cut)
        count = len(cut)
    missing = most_over_ranks(count, accelerator.device) - count if in_parts(model) else 0
    fillers = (([], collate([rows[i] for i in order[:1]])) for _ in range(missing))
    for at, batch in itertools.chain(batches, fillers):
        batch = {k: v.to(accelerator.device) for k, v in batch.items()}
        with accelerator.autocast():
            found = batch_logps(model, batch, kind, backend=backend).tolist()
        for i, values in zip(at, found, strict=bool(at)):
            if kind.listed:
                last = values[-1:] if "rejected_ids" in rows[i] else []
                values = values[: len(rows[i]["completions_ids"])] + last
            done.append((i, values))
        advance(len(at) * ranks)
    found = gather_object(done)
    table = torch.full((len(rows), max((len(v) for _, v in found), default=1), 2), float("nan"))
    for i, values in found:
        table[i, : len(values)] = torch.tensor(values)
    return table


def row_tokens(row: Mapping[str, Any]) -> int:
    """Returns the number of tokens of an encoded row, its prompt counted once."""
    return sum(
        sum(map(len, v)) if v and isinstance(v[0], list) else len(v) for k, v in row.items() if k.endswith("_ids")
    )


def _from_main_process(accelerator: Accelerator, read: Callable[[], Any]) -> Any:
    """Returns, on every process, what read() returns on the main one."""
    from accelerate.utils import broadcast_object_list

    result: Any = [read() if accelerator.is_main_process else None]
    return (broadcast_object_list(result) if accelerator.num_processes > 1 else result)[0]


def _read(path: Path, rows: int) -> np.ndarray | None:
    """Returns a shard's log-probs; None if the file is missing, broken or of another number of rows."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        table = load_file(path)["logps"]
    except (OSError, SafetensorError, KeyError) as error:
        warnings.warn(f"{path} cannot be read ({error}); its rows are computed again", stacklevel=2)
        return None
    return table if table.ndim == 2 and table.shape[0] == rows else None
