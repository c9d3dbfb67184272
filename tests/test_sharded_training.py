"""Trainers of models in parts, FSDP2's, HSDP's and DeepSpeed's, on two and four processes against one process.

Losses, norms of gradients and the weights after three steps are equal to 1e-5 in float32. A world of gloo processes
runs all cases of a layout one after another; accelerate shards on accelerators alone, and is told that this is one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

import test_reward_model
import test_trainer
from ranks import run_world
from test_trainer import PEFT_WARNING, lora, make_model, make_rows
from xpo_fast.trainer.sharding import whole_weights

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

STEPS, ROWS, BATCH = 3, 10, 4  # the rows of the last step are two, fewer than a batch
WRAPPED = ["LlamaDecoderLayer"]
OF_THE_CUT = ("tokens_per_second", "tokens_saved", "learning_rate", "epoch", "step")


class Case(NamedTuple):
    method: str
    args: dict[str, Any] = {}  # noqa: RUF012
    tied: bool = False
    trainer: str = "preference"
    adapted: bool = False


CASES = {
    "simpo, tied": Case("simpo", tied=True),
    "simpo": Case("simpo", {"gradient_accumulation_steps": 2}),
    "dpo cached, tied": Case("dpo", {"reference": "cached"}, tied=True),
    "dpo cached, by tokens": Case("dpo", {"reference": "cached", "tokens_per_batch": 64}),
    "dpo copy, tied": Case("dpo", {"reference": "copy"}, tied=True),
    "tdpo copy": Case("tdpo", {"reference": "copy"}),
    "kto cached": Case("kto", {"reference": "cached"}),
    "kto copy": Case("kto", {"reference": "copy"}, tied=True),
    "dpo adapter": Case("dpo", {"reference": "adapter"}, adapted=True),
    "bradley_terry": Case("bradley_terry", trainer="reward"),
    "haf": Case("haf", {"reference": "copy"}, trainer="reward"),
}
OF_FSDP = {"activation checkpointing": Case("dpo", {"reference": "cached"}, tied=True)}


def make(case: Case, folder: Path, ranks: int, **further: Any) -> Any:
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH // ranks, "per_device_eval_batch_size": 2,
        "max_grad_norm": 1.0, "adam_epsilon": 1e-4, "layout": "padded", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args |= {**case.args, **further, **({"ddp_backend": "gloo"} if ranks > 1 else {})}
    args["model"] = make_model(tie_word_embeddings=case.tied)
    args["peft_config"] = lora() if case.adapted else None
    if case.trainer == "reward":
        return test_reward_model.make_trainer(folder, case.method, rows=make_rows(ROWS), **args)
    return test_trainer.make_trainer(folder, method=case.method, rows=ROWS, **args)


def trained(case: Case, folder: Path, ranks: int, **further: Any) -> dict[str, Any]:
    trainer = make(case, folder, ranks, **further)
    trainer.train(resume_from_checkpoint=further.get("resume_from_checkpoint"))
    return found_of(trainer)


def found_of(trainer: Any) -> dict[str, Any]:
    logs = [log for log in trainer.state.log_history if "loss" in log]
    logs = [{k: float(v) for k, v in log.items() if k not in OF_THE_CUT} for log in logs]
    parts = [getattr(p, "_local_tensor", p).numel() for p in trainer.model.parameters()]
    weights = {name: x.clone() for name, x in whole_weights(trainer.model)}
    return {"logs": logs, "weights": weights, "class": type(trainer.model_wrapped).__name__, "parts": sum(parts)}


@contextlib.contextmanager
def shards_on_cpu() -> Iterator[None]:
    """Lets accelerate shard on the CPU: it looks for FSDP where processes have accelerators."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make_state = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = PartialState._shared_state
        if kwargs.get("fsdp_plugin") is not None and shared.get("device") is not None:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        make_state(self, *args, **kwargs)

    with patch.object(AcceleratorState, "__init__", init):
        yield
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]


def fsdp(**config: Any) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED, **config}}


def zero(stage: int, **how: Any) -> dict[str, Any]:
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    return {"deepspeed": {**auto, "zero_optimization": {"stage": stage, **how}}}


def on_two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with shards_on_cpu():
        for name, case in {**CASES, **OF_FSDP}.items():
            more = {"activation_checkpointing": True} if name in OF_FSDP else {}
            found[f"FSDP2, {name}"] = trained(case, folder / f"fsdp-{name}", 2, **fsdp(**more))
    if sys.platform == "linux":  # the extra [dev] has DeepSpeed there alone
        import deepspeed

        with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
            for stage in (2, 3):
                for name, case in CASES.items():
                    found[f"ZeRO-{stage}, {name}"] = trained(case, folder / f"zero{stage}-{name}", 2, **zero(stage))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return run_world(folder / "two", 2, partial(on_two_ranks, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    found: dict[str, Any] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in found:
            found[name] = trained({**CASES, **OF_FSDP}[name], tmp_path_factory.mktemp("alone"), 1)
        return found[name]

    return get


def check_equal(own: dict[str, Any], want: dict[str, Any], *, to: float = 1e-5) -> None:
    assert len(own["logs"]) == len(want["logs"]) > 0
    for log, expected in zip(own["logs"], want["logs"], strict=True):
        assert log.keys() == expected.keys()
        for name, value in expected.items():
            if name == "rewards/accuracies" and abs(expected["rewards/margins"]) < 1e-6:
                continue  # of a policy that is the reference: the sign of rounding
            assert log[name] == pytest.approx(value, rel=to, abs=to), name
    assert own["weights"].keys() == want["weights"].keys()
    for name, x in want["weights"].items():
        torch.testing.assert_close(own["weights"][name], x, rtol=to, atol=to, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["FSDP2", "ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize("name", CASES)
def test_a_model_in_parts_is_trained_as_a_whole_one(two, alone, layout, name):
    want = alone(name)
    for own in (r[f"{layout}, {name}"] for r in two):
        check_equal(own, want)
        assert own["class"].startswith("FSDP") if layout == "FSDP2" else own["class"] == "DeepSpeedEngine"
    if layout == "FSDP2":
        assert sum(r[f"{layout}, {name}"]["parts"] for r in two) == want["parts"]
