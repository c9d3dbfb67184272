"""Sequence parallelism: each rank of a group has a chunk of every row, and attention exchanges heads for tokens.

accelerate configures it (`sp_size` of `ParallelismConfig`), DeepSpeed's Ulysses exchanges. All ranks of a group read
the same batches and cut their chunks of them in `Inputs.run`; what a loss needs of whole rows the objective gathers
(`row_shard=`). So accelerate's data loader for it, which cuts every tensor of a batch, is not used, nor its
registration of the attention, which is bound to one number of rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..head import RowShard, token_logps
from ..layouts import ROWS_SPLIT, Inputs, split_over
from ..models import Head
from ..models.lm_head import causal_lm
from ..models.modes import evaluating
from ..types import IGNORE_INDEX
from .arguments import check_parallelism
from .sharding import any_of_them, sharding_of

_ATTENTION = "sdpa", "flash_attention_2", "flash_attention_3"
_OTHER = "a causal LM of full attention through transformers' attention functions"


class SplitsRows:
    """Mixin, before `transformers.Trainer`, whose ranks may have rows in chunks, if `splits_rows` is set."""

    splits_rows = False
    row_shard: RowShard | None = None  # the ranks that have the same rows; None: each rank has rows of its own

    def split_rows(self: Any) -> None:
        """Cuts rows over groups of `sp_size` ranks, if that is asked for. Raises ValueError for what cannot be so."""
        size = self.get_sp_size()
        # Of the accelerator, since `accelerate launch` can configure it, too.
        check_parallelism(
            splits_rows=self.splits_rows, tp_size=self.get_tp_size(), cp_size=self.get_cp_size(), sp_size=size
        )
        if size == 1:
            return
        check_engine(self.accelerator, size)
        check_model(self.model, size, self.args, self.accelerator.parallelism_config.sp_handler)
        accelerator, world = self.accelerator, self.args.world_size
        self.row_shard = RowShard(_groups(size).get_sequence_parallel_group())
        # By its axis "tp" accelerate's loaders tell which processes read the same batches.
        mesh = init_device_mesh(self.args.device.type, (world // size, size), mesh_dim_names=("dp", "tp"))
        accelerator.state.ds_device_mesh = mesh
        accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader
        install_exchange(self.model, self.row_shard)

    @property
    def copies(self) -> int:
        """The number of processes that have the same rows."""
        return 1 if self.row_shard is None else self.row_shard.world

    @property
    def replicas(self: Any) -> int:
        """The number of processes that have rows of their own, those with the same rows counted once."""
        return self.accelerator.num_processes // self.copies

    @property
    def replica(self: Any) -> int:
        """The number of this process among the `replicas`."""
        return self.accelerator.process_index // self.copies

    def rows_split(self) -> contextlib.AbstractContextManager[None]:
        """Lets the model read this process's chunks of rows inside the block, if rows are cut."""
        return split_over(self.row_shard)

    def of_all_rows(self: Any, loss: Tensor) -> Tensor:
        """Returns a loss of this process's rows over those of all, as an engine takes it that averages over processes.

        Its value is averaged over all of them. DeepSpeed averages gradients over all of them in ZeRO-3, and in ZeRO-1
        and -2 over the replicas alone, where it sums over the chunks of a row.
        """
        loss = loss * self.replicas
        if self.copies > 1 and sharding_of(self.accelerator) == "ZeRO-3":
            loss = loss + (self.copies - 1) * (loss - loss.detach())
        return loss

    def check_same_rows(self: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        """Raises RuntimeError if the processes that have chunks of the same rows have read different ones."""
        if self.row_shard is None or not batches:
            return
        each = [x["input_ids"].to(self.args.device).flatten() for x in batches]
        own = sum((x * torch.arange(1, len(x) + 1, device=x.device)).sum() for x in each)
        found = self.row_shard.every(torch.as_tensor(own)).tolist()
        if len(set(found)) > 1:
            raise RuntimeError(
                "the processes that have a row between them have drawn different rows, and would train on mixtures of "
                "them: use a sampler and a collator whose draws follow from args.seed alone"
            )

    def get_sp_size(self: Any) -> int:
        """Returns by how much a data loader of Trainer's would be longer: not at all, if rows are cut here."""
        trainer: Any = super()
        return 1 if self.row_shard is not None else trainer.get_sp_size()

    def get_total_train_batch_size(self: Any, args: Any) -> int:
        """Returns the rows of a step as Trainer does."""
        trainer: Any = super()
        return trainer.get_total_train_batch_size(args) // self.copies

    def _prepare_for_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        with contextlib.nullcontext() if self.row_shard is None else _groups_alone(self.copies):
            return trainer._prepare_for_training(*args, **kwargs)


# --- what can be split ------------------------------------------------------------------------------------------------


def check_engine(accelerator: Any, size: int) -> None:
    """Raises ValueError unless DeepSpeed shards the model over groups of so many ranks, rows of any length."""
    parallel, ranks = accelerator.parallelism_config, accelerator.num_processes
    if not (how := sharding_of(accelerator)).startswith("ZeRO"):
        raise ValueError(
            f"sp_size={size} of parallelism_config is DeepSpeed's Ulysses, which needs its ZeRO stages 1 to 3, got "
            f"{how or 'none of them'}: pass deepspeed= (accelerate launch --use_deepspeed)"
        )
    if ranks % size or parallel.data_parallel_size != ranks // size:
        raise ValueError(
            f"{ranks} processes with sp_size={size} need dp_replicate_size · dp_shard_size = {ranks / size:g} in "
            f"parallelism_config, got {parallel.data_parallel_size}"
        )
    if not parallel.sp_handler.sp_seq_length_is_variable:
        raise ValueError("sp_seq_length_is_variable=False: rows have lengths of their own: leave it out")


def check_model(model: nn.Module, size: int, args: Any, handler: Any) -> None:
    """Raises ValueError for a model whose attention cannot exchange heads, and for settings that whole rows need."""
    lm: Any = causal_lm(model)
    config, name = lm.config.get_text_config(), type(lm).__name__
    attention = str(config._attn_implementation)
    if attention not in _ATTENTION and "/" not in attention:
        raise ValueError(
            f"sp_size={size}: {name} attends by {attention}; load it with attn_implementation={_ATTENTION[0]!r}, or "
            f"{' or '.join(map(repr, _ATTENTION[1:]))}"
        )
    if (asked := handler.sp_attn_implementation) not in (None, attention):
        raise ValueError(
            f"sp_attn_implementation={asked!r}, and {name} was loaded with {attention!r}: give one of them"
        )
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (shared % size and size % shared):
        raise ValueError(
            f"sp_size={size} must divide the {heads} attention heads of {name}, and divide or be a multiple of its "
            f"{shared} key and value heads"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else window and getattr(config, "use_sliding_window", True)
    others = kinds - {"full_attention", "sliding_attention"}
    if others or (slides and (window or 0) < args.max_length):
        found = f"layers of {', '.join(sorted(others))}" if others else f"a window of {window} tokens"
        raise ValueError(f"sp_size={size}: {name} has {found}; rows that are cut over ranks need {_OTHER}")
    if args.torch_compile:
        raise ValueError(f"sp_size={size}: the exchange is not compiled: leave torch_compile out")
    if getattr(args, "neftune_noise_alpha", None):
        raise ValueError(f"sp_size={size}: the noise of neftune_noise_alpha is scaled by the length of whole rows")


def check_objective(objective: Any) -> None:
    """Raises ValueError for an objective that reads more than the log-probs and hidden states of rows in chunks."""
    name = " + ".join(m.name for m in objective.methods)
    if objective.draws_rivals:
        raise ValueError(f"sp_size: {name} draws rivals of the tokens of whole rows: leave sp_size out")
    if objective.reads_topk:
        raise ValueError(f"sp_size: {name} reads a teacher's likeliest tokens of whole rows: leave sp_size out")
    if objective.reads_context:
        raise ValueError(f"sp_size: {name} compares rows at other places in its reference's rows: leave sp_size out")


def check_exchange(model: nn.Module, ids: list[int], shard: RowShard, device: torch.device, backend: str) -> None:
    """Raises ValueError, on all ranks, if rows in chunks have other log-probs than whole ones. ids: of any text."""
    width = 4 * shard.world + 1
    tokens = torch.tensor([(ids * width)[: width + 1], (ids[::-1] * width)[: width + 1]], device=device)
    rows = Inputs(tokens[:, :-1].contiguous(), torch.ones_like(tokens[:, :-1]), tokens[:, 1:].contiguous())

    def logps(own: Tensor) -> Tensor:
        def fused(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            return {"logps": token_logps(hidden, head, own, backend=backend)}

        return rows.run(model, fused)["logps"]

    with evaluating(model):
        with split_over(None):
            whole = logps(rows.targets)
        problem = ""
        try:
            with split_over(shard):
                own, found = rows.own_targets, logps(rows.own_targets)
                want = _chunk_of(whole, shard)
            off = float(torch.where(own != IGNORE_INDEX, found - want, 0.0).abs().max())
            step = max(torch.finfo(x).eps for x in (causal_lm(model).dtype, torch.float32))
            if not off <= 1e-3 + 8 * step * float(whole.abs().max()):
                problem = f"log-probs are off by {off:.3g}"
        except (AssertionError, TypeError, RuntimeError) as error:
            problem = str(error)
    if any_of_them(bool(problem), device):
        raise ValueError(
            f"{type(causal_lm(model)).__name__} does not compute in chunks over {shard.world} ranks what it does of "
            f"whole rows: {problem or 'another rank says why'}; sp_size needs {_OTHER}"
        )


def _chunk_of(x: Tensor, shard: RowShard) -> Tensor:
    return shard.chunk(nn.functional.pad(x, (0, -x.shape[1] % shard.world)))


# --- the exchange -----------------------------------------------------------------------------------------------------


def install_exchange(model: nn.Module, shard: RowShard) -> None:
    """Makes the attention function of a model's implementation exchange heads in forwards of `ROWS_SPLIT`.

    In other forwards, and of other models, it is transformers' own.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = str(causal_lm(model).config.get_text_config()._attn_implementation)
    own = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = _exchanging(getattr(own, "without_exchange", own), shard.group)


def _exchanging(attend: Callable[..., Any], group: Any) -> Callable[..., Any]:
    """Returns an attention function that is Ulysses' where its keyword arguments have `ROWS_SPLIT`, else `attend`."""

    @functools.cache
    def ulysses(heads: int, shared: int, width: int) -> nn.Module:
        sizes: Any = {"attn_head_count": heads, "kv_head_count": shared, "attn_head_size": width}
        return _of_any_rows()(attend, 1, num_hidden_layers=1, process_group=group, seq_length_is_variable=True, **sizes)

    def exchanging(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not kwargs.pop(ROWS_SPLIT, False):
            return attend(module, query, key, value, mask, *args, **kwargs)
        # The mask is of this rank's chunk. Padding is behind the tokens of a row, which do not attend to it.
        exchange = ulysses(query.shape[1], key.shape[1], query.shape[3])
        return exchange(module, query, key, value, None, *args, **kwargs)

    found: Any = exchanging
    found.without_exchange = attend
    return found


@functools.cache
def _of_any_rows() -> Any:
    """Returns DeepSpeed's attention, as one that takes any number of rows and leaves the module as it was."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # pyright: ignore[reportMissingImports]

    class OfAnyRows(UlyssesSPAttentionHF):
        def forward(self: Any, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.batch_size = len(query)
            for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
                shape = getattr(self, name)
                setattr(self, name, torch.Size([shape[0], len(query), *shape[2:]]))
            groups = getattr(module, "num_key_value_groups", None)
            try:
                return super().forward(module, query, *args, **kwargs)
            finally:
                if groups is not None:
                    module.num_key_value_groups = groups

    return OfAnyRows


def _groups(size: int) -> Any:
    """Returns DeepSpeed's module of the groups of ranks that have a row between them; makes the groups once."""
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.sequence_parallel import parallel_state_sp  # pyright: ignore[reportMissingImports]

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    try:
        made = parallel_state_sp.get_sequence_parallel_world_size()
    except AssertionError:
        parallel_state_sp.initialize_sequence_parallel(size)
        made = size
    if made != size:
        raise ValueError(f"this process has groups of {made} ranks already, got sp_size={size}: start another process")
    return parallel_state_sp


@contextlib.contextmanager
def _groups_alone(size: int) -> Iterator[None]:
    """Lets accelerate find DeepSpeed's groups, which are there, and register no attention of its own."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # pyright: ignore[reportMissingImports]

    cls: Any = UlyssesSPAttentionHF
    theirs = vars(cls)["register_with_transformers"]
    cls.register_with_transformers = staticmethod(lambda **_: _groups(size))
    try:
        yield
    finally:
        cls.register_with_transformers = theirs
