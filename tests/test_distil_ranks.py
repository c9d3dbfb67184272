"""DistillationTrainer on two gloo processes, DDP, FSDP2 and ZeRO-3: losses and weights are those of one process."""

from __future__ import annotations

import functools
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ranks import run_world, shared_folder
from test_distil_trainer import wider
from test_sharded_training import check_equal, found_of, fsdp, shards_on_cpu, zero
from test_trainer import make_model, make_rows, make_tokenizer
from xpo_fast.trainer import DistillationConfig, DistillationTrainer
from xpo_fast.trainer.sharding import whole_weights

# The rows of the last step are two, fewer than a batch.
STEPS, BATCH, ROWS = 3, 4, make_rows(10)
# Which cases run in which layout, one of each kind.
LAYOUTS = {
    "DDP": ["gkd", "on-policy, by tokens", "sampled_kl"],
    "FSDP2": ["two teachers", "on-policy", "sampled_kl"],
    "ZeRO-3": ["gkd", "on-policy"],
}
OWN = {"on_policy": 1.0, "max_new_tokens": 5}
CASES: dict[str, dict[str, Any]] = {
    "gkd": {"method_args": {"beta": 0.3}},
    "two teachers": {"teachers": 2, "gradient_accumulation_steps": 2},
    "on-policy": {"method": "reverse_kl", **OWN},
    "on-policy, by tokens": {"tokens_per_batch": 64, **OWN},
    "sampled_kl": {"method": "sampled_kl", **OWN},
}


def trained(folder: Path, name: str, ranks: int, **further: Any) -> dict[str, Any]:
    """What a run finds, the whole of its first teacher before and after, and the size of what a process keeps of it."""
    args = {
        "output_dir": str(folder / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": BATCH // ranks, "per_device_eval_batch_size": BATCH // ranks,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": STEPS, "seed": 3,
        "adam_epsilon": 1e-4, "layout": "padded", "preflight": "off", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args |= {**CASES[name], **further, **({"ddp_backend": "gloo"} if ranks > 1 else {})}
    teachers = [(wider(), 3.0), (make_model(6, tie_word_embeddings=False), 1.0)][: args.pop("teachers", 1)]
    args["per_device_train_batch_size"] //= args.get("gradient_accumulation_steps", 1)
    how = {"train_dataset": ROWS, "eval_dataset": ROWS[:7], "processing_class": make_tokenizer()}
    trainer = DistillationTrainer(make_model(), teachers, DistillationConfig(**args), **how)
    copy = trainer.teachers[0].copy
    before = {n: x.clone() for n, x in whole_weights(copy)}
    evaluations = [trainer.evaluate()] if name == "sampled_kl" else []
    trainer.train()
    evaluations += [trainer.evaluate()] if name == "sampled_kl" else []
    parts = [getattr(p, "_local_tensor", getattr(p, "ds_tensor", p)).numel() for p in copy.parameters()]
    after = {n: x.clone() for n, x in whole_weights(copy)}
    kept = {"size": sum(parts), "before": before, "after": after}
    return found_of(trainer) | {"teacher": kept, "evaluations": evaluations}


def on_two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found = {f"DDP, {name}": trained(folder / f"ddp {rank}", name, 2) for name in LAYOUTS["DDP"]}
    with shards_on_cpu():
        for name in LAYOUTS["FSDP2"]:
            found[f"FSDP2, {name}"] = trained(folder / f"fsdp {rank}", name, 2, **fsdp())
    return found


def on_two_ranks_of_zero(folder: Path, rank: int) -> dict[str, Any]:
    import deepspeed

    warnings.simplefilter("ignore")
    with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        return {f"ZeRO-3, {name}": trained(folder / f"zero {rank}", name, 2, **zero(3)) for name in LAYOUTS["ZeRO-3"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shared_folder(tmp_path_factory, "distil_ranks")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    return run_world(folder / "two", 2, partial(on_two_ranks, folder))


@pytest.fixture(scope="module")
def zero_ranks(folder) -> list[dict[str, Any]]:
    if sys.platform != "linux":
        pytest.skip("the extra [dev] has DeepSpeed on Linux alone")
    return run_world(folder / "zero", 2, partial(on_two_ranks_of_zero, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return functools.cache(lambda name: trained(tmp_path_factory.mktemp("alone"), name, 1))


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in LAYOUTS[layout]])
def test_equals_one_process(request, alone, layout, name):
    want = alone(name)
    for rank in request.getfixturevalue("zero_ranks" if layout == "ZeRO-3" else "two"):
        own = rank[f"{layout}, {name}"]
        check_equal(own, want)
        assert len(own["evaluations"]) == len(want["evaluations"])
        teacher, whole = own["teacher"], want["teacher"]
        for weights in (whole["after"], teacher["before"], teacher["after"]):
            assert weights.keys() == whole["before"].keys()
            assert all(weights[n].equal(x) for n, x in whole["before"].items())
        # DDP: whole on every process. FSDP2: half on each. DeepSpeed keeps small weights whole.
        assert teacher["size"] == whole["size"] if layout == "DDP" else teacher["size"] < whole["size"]
