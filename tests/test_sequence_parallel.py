"""Trainers whose rows are cut over ranks, by DeepSpeed's Ulysses, against one process that has whole rows.

Losses, norms of gradients, metrics, evaluations and the weights after three steps are equal to 1e-5 in float32, on two
gloo processes, and on four that are two groups of two. Rows are ragged: many end before a second chunk begins.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, MistralConfig

import xpo_fast as xf
from ranks import run_world, shared_folder
from test_sharded_training import CASES, RESUMED, Case, check_equal, make, trained, zero
from test_trainer import PEFT_WARNING, make_model, make_rows
from xpo_fast.models import install_fused_loss
from xpo_fast.trainer import XPOConfig
from xpo_fast.trainer.arguments import check_parallelism
from xpo_fast.trainer.sequence_parallel import check_engine, check_exchange, check_model, check_objective

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="the extra [dev] has DeepSpeed on Linux alone"),
]

OWN = {
    "sft": Case("sft"),
    "lipo": Case("lipo", {"reference": "cached"}),
    "dpo + sft, again": Case("dpo + 0.5*sft", {"reference": "copy", "activation_checkpointing": True}),
}
# By stage of ZeRO: what differs between methods is which rows, and what of them, a loss reads.
TWO = {
    2: ["simpo", "dpo cached, by tokens", "kto cached", "lipo", "dpo + sft, again"],
    3: ["dpo cached, tied", "tdpo copy", "dpo adapter", "sft"],
}
FOUR = {2: ["dpo cached, by tokens"], 3: ["simpo, tied"]}
EVALUATED = ("dpo cached, tied", "dpo cached, by tokens")


def sp(size: int, **sizes: int) -> dict[str, Any]:
    from accelerate import ParallelismConfig

    make: Any = ParallelismConfig
    return {"parallelism_config": make(sp_size=size, **sizes)}


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The environment that `accelerate launch` makes of examples/launch/ulysses.yaml, for two processes."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_extend_env_parallelism_config

    file = Path(__file__).resolve().parent.parent / "examples" / "launch" / "ulysses.yaml"
    config: Any = load_config_from_file(str(file))
    given = config.parallelism_config
    given |= {"parallelism_config_sp_size": 2, "parallelism_config_dp_shard_size": 1}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    args = launch_command_parser().parse_args([*options, "script"])
    with patch.dict(os.environ, prepare_extend_env_parallelism_config(args, {})):
        yield


def case_of(name: str) -> Case:
    return OWN.get(name) or CASES[name]


def case_trained(name: str, folder: Path, ranks: int, **further: Any) -> dict[str, Any]:
    return trained(case_of(name), folder, ranks, evaluates=name in EVALUATED, **further)


def with_widths(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, with the widths and positions of what a model has read after the first forwards."""
    from transformers.models.llama.modeling_llama import LlamaModel

    read, forward = set(), LlamaModel.forward

    def seen(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("rows_split"):
            read.add((input_ids.shape[1], int(kwargs["position_ids"][0, 0])))
        return forward(self, input_ids, **kwargs)

    with patch.object(LlamaModel, "forward", functools.wraps(forward)(seen)):
        return run() | {"read": read}


def on_ranks(folder: Path, world: int, rank: int) -> dict[str, Any]:
    import deepspeed

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    sizes = sp(2, dp_shard_size=world // 2) | {"ddp_backend": "gloo"}
    with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        for stage, cases in {2: TWO, 4: FOUR}[world].items():
            for name in cases:
                how = {**sizes, **zero(stage)}
                by_launcher = launched() if name == "sft" else contextlib.nullcontext()
                if name == "sft":
                    del how["parallelism_config"]
                with by_launcher:
                    run = partial(case_trained, name, folder / f"{stage}" / name, world // 2, **how)
                    found[f"{stage}, {name}"] = with_widths(run)
        if world == 2:
            found |= resumed(folder, sizes)
            found["exchange"] = exchanged(rank)
            found["refused"] = refused(folder, rank, sizes)
    return found


def resumed(folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Two steps, their checkpoint, and the last two steps of a run from there, in another trainer."""
    found, output = {}, folder / "written"
    for stage in (2, 3):
        how = {**sizes, **zero(stage)}
        trained(RESUMED, folder / "first", 1, save_strategy="steps", output_dir=str(output / f"{stage}"), **how)
        again = output / f"{stage}" / "checkpoint-2"
        found[f"{stage}, resumed"] = trained(RESUMED, folder / "again", 1, checkpoint=again, save_strategy="no", **how)
    return found


def exchanged(rank: int) -> dict[str, str]:
    """What `check_exchange` says of models, after a trainer has made the attention exchange heads."""
    from deepspeed.runtime.sequence_parallel.parallel_state_sp import get_sequence_parallel_group

    shard, found = xf.RowShard(get_sequence_parallel_group()), {}
    blind = make_model()
    blind.config._attn_implementation = "eager"  # of which no rank knows the others' tokens
    one: Any = make_model(num_key_value_heads=1)
    for name, model in {"one key": one, "blind": blind}.items():
        install_fused_loss(model)
        try:
            check_exchange(model, [5, 9, 3], shard, torch.device("cpu"), "auto")
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    found["groups"] = str({layer.self_attn.num_key_value_groups for layer in one.model.layers})
    return found


def refused(folder: Path, rank: int, sizes: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, case, further in (
        ("packed", CASES["simpo"], {"layout": "packed", **zero(2)}),
        ("rivals", Case("cringe"), zero(2)),
    ):
        with pytest.raises(ValueError) as caught:
            make(case, folder / "refused", 1, **sizes, **further).prepare()
        found[name] = str(caught.value)
    trainer = make(CASES["simpo"], folder / "refused", 1, **sizes, **zero(2))
    with pytest.raises(RuntimeError) as caught:
        trainer.check_same_rows([{"input_ids": torch.tensor([[1, 2, 3 + rank]])}])
    trainer.check_same_rows([{"input_ids": torch.tensor([[1, 2, 3]])}])
    found["other rows"] = str(caught.value)
    found["plan"] = str(trainer.plan())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shared_folder(tmp_path_factory, "sequence_parallel")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    return run_world(folder / "two", 2, partial(on_ranks, folder / "of two", 2))


@pytest.fixture(scope="module")
def four(folder) -> list[dict[str, Any]]:
    return run_world(folder / "four", 4, partial(on_ranks, folder / "of four", 4))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What one process finds in a case."""
    own = tmp_path_factory.mktemp("alone")

    @functools.cache
    def get(name: str) -> dict[str, Any]:
        if name == "resumed":
            return trained(RESUMED, own / name, 1, save_strategy="no")
        return case_trained(name, own / name, 1)

    return get


def check(ranks: list[dict[str, Any]], key: str, want: dict[str, Any]) -> None:
    for rank, found in enumerate(ranks):
        own = found[key]
        check_equal(own, want)
        assert own["class"] == "DeepSpeedEngine"
        assert own["read"], "no rows were cut"
        assert all(first == (rank % 2) * width for width, first in own["read"])


@pytest.mark.parametrize(("stage", "name"), [(k, name) for k, names in TWO.items() for name in names])
def test_rows_in_chunks_train_as_whole_rows(two, alone, stage, name):
    check(two, f"{stage}, {name}", alone(name))


@pytest.mark.parametrize(("stage", "name"), [(k, name) for k, names in FOUR.items() for name in names])
def test_chunks_beside_data_parallelism(four, alone, stage, name):
    check(four, f"{stage}, {name}", alone(name))


def test_rows_end_before_the_second_chunk():
    """Some rows of a batch have nothing to score on the second rank, and some begin there."""
    from test_trainer import make_trainer

    trainer = make_trainer(Path("unused"), method="simpo", rows=10, train_sampling_strategy="sequential")
    ends = []
    for batch in trainer.get_train_dataloader():
        at = torch.arange(batch["targets"].shape[1])
        scored = batch["targets"] != -100
        half = -(-len(at) // 2)
        ends += [bool(scored[r, half:].any()) for r in range(len(scored))]
    assert {*ends} == {True, False}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_is_resumed(two, alone, stage):
    want = alone("resumed")
    for found in two:
        own = found[f"{stage}, resumed"]
        check_equal(own, want, last=2)
        for step in (2, 3):
            assert own["drawn"][step] == want["drawn"][step]


def test_the_exchange_is_checked(two):
    """One key head for two ranks is repeated, and the module left as it was; eager attention sees its chunk alone."""
    for found in two:
        assert found["exchange"]["one key"] == ""
        assert found["exchange"]["groups"] == "{4}"
        assert "does not compute in chunks over 2 ranks what it does of whole rows" in found["exchange"]["blind"]


REFUSED = {
    "packed": 'use layout="padded"',
    "rivals": "cringe draws rivals of the tokens of whole rows",
    "other rows": "have drawn different rows",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused(two, name):
    for found in two:
        assert REFUSED[name] in found["refused"][name]


def test_the_plan_is_of_a_chunk(two):
    assert all("rows are cut over 2 ranks" in found["refused"]["plan"] for found in two)


def engine(stage: int = 2, ranks: int = 4, **sizes: int) -> Any:
    plugin = SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin if stage >= 0 else None, fsdp_plugin=None)
    config = sp(2, **sizes)["parallelism_config"]
    return SimpleNamespace(state=state, num_processes=ranks, parallelism_config=config)


def test_engines_that_do_not_cut_rows_are_refused():
    check_engine(engine(dp_shard_size=2), 2)
    check_engine(engine(dp_replicate_size=2), 2)
    for stage in (-1, 0):
        with pytest.raises(ValueError, match="needs its ZeRO stages 1 to 3, got none of them: pass deepspeed="):
            check_engine(engine(stage, dp_shard_size=2), 2)
    with pytest.raises(ValueError, match="4 processes with sp_size=2 need dp_replicate_size · dp_shard_size = 2 in"):
        check_engine(engine(), 2)
    fixed = engine(dp_shard_size=2)
    fixed.parallelism_config.sp_handler.sp_seq_length_is_variable = False
    with pytest.raises(ValueError, match="sp_seq_length_is_variable=False: rows have lengths of their own"):
        check_engine(fixed, 2)


def a_model(config: Any, **further: Any) -> Any:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 11, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = config(**{**sizes, **heads, "pad_token_id": 0, **further})
    return AutoModelForCausalLM.from_config(made, attn_implementation=further.get("attention", "sdpa"))


def settings(**given: Any) -> Any:
    return SimpleNamespace(**{"max_length": 64, "torch_compile": False, "neftune_noise_alpha": None, **given})


@pytest.mark.parametrize(
    ("size", "made", "given", "match"),
    [
        (2, partial(a_model, LlamaConfig, attention="eager"), {}, "LlamaForCausalLM attends by eager; load it with"),
        (8, partial(a_model, LlamaConfig), {}, "sp_size=8 must divide the 4 attention heads of LlamaForCausalLM"),
        (3, partial(a_model, GemmaConfig, num_attention_heads=6), {}, "be a multiple of its 2 key and value heads"),
        (2, partial(a_model, MistralConfig, sliding_window=8), {}, "MistralForCausalLM has a window of 8 tokens"),
        (2, partial(a_model, LlamaConfig), {"torch_compile": True}, "leave torch_compile out"),
        (2, partial(a_model, LlamaConfig), {"neftune_noise_alpha": 5.0}, "scaled by the length of whole rows"),
    ],
)
def test_models_that_cannot_exchange_are_refused(size, made, given, match):
    handler = SimpleNamespace(sp_attn_implementation=None)
    with pytest.raises(ValueError, match=match):
        check_model(made(), size, settings(**given), handler)


def test_models_that_can_exchange():
    own = SimpleNamespace(sp_attn_implementation="sdpa")
    check_model(a_model(MistralConfig, sliding_window=64), 2, settings(), own)
    asked = SimpleNamespace(sp_attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="sp_attn_implementation='flash_attention_2', and LlamaForCausalLM was loaded"):
        check_model(a_model(LlamaConfig), 2, settings(), asked)


def test_linear_attention_is_refused():
    model = a_model(LlamaConfig)
    model.config.layer_types = ["linear_attention"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has layers of linear_attention; rows that are cut"):
        check_model(model, 2, settings(), SimpleNamespace(sp_attn_implementation=None))


def test_objectives_that_need_whole_rows_are_refused():
    check_objective(xf.Objective("dpo + 0.5*sft"))
    with pytest.raises(ValueError, match="cringe draws rivals"):
        check_objective(xf.Objective("cringe"))
    with pytest.raises(ValueError, match="context_distillation compares rows at other places"):
        check_objective(xf.Objective("context_distillation"))


def test_other_trainers_keep_rows_whole(tmp_path):
    from xpo_fast.rewards.config import RewardConfig
    from xpo_fast.rl import RLConfig
    from xpo_fast.trainer.representation import RepresentationConfig

    XPOConfig(output_dir=str(tmp_path), use_cpu=True, **sp(2))
    for config in (RewardConfig, RLConfig, RepresentationConfig):
        with pytest.raises(ValueError, match="sp_size=2 of parallelism_config: this trainer keeps rows and layers"):
            config(output_dir=str(tmp_path), use_cpu=True, **sp(2))
    with pytest.raises(ValueError, match="cp_size=2 of parallelism_config: this trainer keeps layers and the order"):
        check_parallelism(splits_rows=True, cp_size=2, sp_size=1, tp_size=1)
    assert len(make_rows(2)) == 2
