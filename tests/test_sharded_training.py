"""Trainers of models in parts, FSDP2's, HSDP's and DeepSpeed's, on two and four processes against one process.

Losses, norms of gradients and the weights after three steps are equal to 1e-5 in float32. A world of gloo processes
runs all cases of a layout one after another; accelerate shards on accelerators alone, and is told that this is one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import test_reward_model
import test_trainer
from ranks import run_world, shared_folder
from test_trainer import PEFT_WARNING, lora, make_model, make_rows
from xpo_fast.resume import write_made_with
from xpo_fast.trainer import reference
from xpo_fast.trainer.sharding import PROCESSES, check_reference, whole_weights, written_by_others
from xpo_fast.trainer.universal import loading_universal

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

STEPS, ROWS, BATCH = 3, 10, 4  # the rows of the last step are two, fewer than a batch
WRAPPED = ["LlamaDecoderLayer"]
PAD = 2
STATES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
CUT_ANEW = STATES + (("ZeRO-2", "ZeRO-3") if sys.platform == "linux" else ())  # checkpoints for any number of ranks
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
    "checkpointing": Case("dpo", {"reference": "cached"}, tied=True),  # of FSDP's own
}
# Which of them run in which layout, one of each kind; with this variable of the environment, all in all.
LAYOUTS = {
    "FSDP2": ["simpo", "dpo cached, tied", "tdpo copy", "kto copy", "dpo adapter", "haf", "checkpointing"],
    "HSDP": ["simpo, tied", "dpo cached, tied", "kto copy", "haf"],
    "ZeRO-2": ["dpo cached, by tokens", "kto copy"],
    "ZeRO-3": ["simpo, tied", "dpo cached, by tokens", "tdpo copy", "kto cached", "bradley_terry"],
}
if os.environ.get("XPO_FAST_ALL_LAYOUTS"):
    without = {name: list(CASES) for name in LAYOUTS}
    LAYOUTS = {k: [n for n in v if n != "checkpointing" or k == "FSDP2"] for k, v in without.items()}
EVALUATED = ("dpo cached, tied", "dpo cached, by tokens")
WORDS, WIDE = (3, 90), 128  # words of the answers whose steps' collectives are compared, and the vocabulary there
AT_ONCE = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}  # DeepSpeed keeps nothing whole
RESUMED = Case(
    "dpo",
    {
        "reference": "cached", "save_steps": 2, "max_steps": 4, "train_sampling_strategy": "random",
        "weight_decay": 0.1,  # of one of the optimizer's two groups
    },
)  # fmt: skip


def make(case: Case, folder: Path, ranks: int, **further: Any) -> Any:
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH // ranks, "per_device_eval_batch_size": 2,
        "max_grad_norm": 1.0, "adam_epsilon": 1e-4, "layout": "padded", "preflight": "off",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args |= {"ref_cache_dir": str(folder / "ref")} if case.trainer == "preference" else {}
    args |= {**case.args, **further, **({"ddp_backend": "gloo"} if ranks > 1 else {})}
    rows = make_rows(ROWS) if case.trainer == "reward" else ROWS
    args = {"model": make_model(tie_word_embeddings=case.tied), "rows": rows, **args}
    args["peft_config"] = lora() if case.adapted else None
    if case.trainer == "reward":
        return test_reward_model.make_trainer(folder, case.method, **args)
    return test_trainer.make_trainer(folder, method=case.method, **args)


def trained(
    case: Case, folder: Path, ranks: int, *, checkpoint: Path | None = None, evaluates: bool = False, **further: Any
) -> dict[str, Any]:
    trainer = make(case, folder, ranks, **further, **({"eval_rows": make_rows(7, seed=5)} if evaluates else {}))
    drawn: dict[int, list] = {}
    loss = trainer._loss

    def kept(model: Any, inputs: Any, denominator: Any) -> Any:
        if model.training:
            scored = (inputs["targets"] != -100).any(dim=1)
            rows = inputs["input_ids"][scored].tolist()
            drawn.setdefault(trainer.state.global_step, []).extend([i for i in row if i != PAD] for row in rows)
        return loss(model, inputs, denominator)

    trainer._loss = kept
    before = trainer.evaluate() if evaluates else {}
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    found = found_of(trainer) | {"drawn": drawn}
    if evaluates:
        found["evaluations"] = [before, trainer.evaluate()]
        try:
            trainer.get_eval_dataloader(make_rows(3, seed=9))
        except ValueError as error:
            found["trained since"] = str(error)
    return found


def found_of(trainer: Any) -> dict[str, Any]:
    logs = [log for log in trainer.state.log_history if "loss" in log]
    logs = [{k: float(v) for k, v in log.items() if k not in OF_THE_CUT} for log in logs]
    parts = [getattr(p, "_local_tensor", p).numel() for p in trainer.model.parameters()]
    weights = {name: x.clone() for name, x in whole_weights(trainer.model)}
    groups = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "logs": logs, "weights": weights, "class": type(trainer.model_wrapped).__name__, "parts": sum(parts),
        "distinct": len({id(p) for p in groups}) == len(groups),
    }  # fmt: skip


class Collectives(TorchDispatchMode):
    """Lists the collectives of a thread: what is done, and the sizes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes = [x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.found.append((func._opname, sizes))
        return func(*args, **(kwargs or {}))


class OfTheLastStep(transformers.TrainerCallback):
    """Lists the collectives from the end of the last step but one to that of the last."""

    def __init__(self) -> None:
        self.listed = Collectives()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS - 1:
            self.listed.__enter__()
        elif state.global_step == STEPS:
            self.listed.__exit__(None, None, None)


def collectives(folder: Path, words: int, **how: Any) -> dict[str, Any]:
    """The collectives of a step of DPO in full with a copy as the reference, and the sizes of the model."""
    model = make_model(tie_word_embeddings=False, max_position_embeddings=128, vocab_size=WIDE)
    sizes = {"weights": model.num_parameters(), "head": model.lm_head.weight.numel(), "width": model.config.hidden_size}
    rows = [{"prompt": "w3 w4", "chosen": " w1" * words, "rejected": " w2" * words}] * (STEPS * BATCH)
    trainer = make(Case("dpo", {"reference": "copy"}), folder / str(words), 2, model=model, rows=rows, **how)
    callback = OfTheLastStep()
    trainer.add_callback(callback)
    trainer.train()
    return sizes | {"list": callback.listed.found}


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


# Cases with levers of memory, in each layout: what the trainer is given, and what DeepSpeed's configuration is beside.
IN_16_BITS = {"bf16": True, "gradient_checkpointing": True}
OFFLOADED = {"zero_optimization": {"stage": 3, **{f"offload_{of}": {"device": "cpu"} for of in ("optimizer", "param")}}}
LEVERS = {
    "FSDP2, dpo adapter": (IN_16_BITS, {}),
    "FSDP2, dpo copy, tied": (IN_16_BITS, {}),
    "ZeRO-2, kto copy": (IN_16_BITS, {"bf16": {"enabled": "auto"}}),
    "ZeRO-3, dpo adapter": ({"gradient_checkpointing": True}, {}),
    "ZeRO-3, dpo copy, tied": ({}, OFFLOADED | {"zero_force_ds_cpu_optimizer": False}),
}


def with_levers(folder: Path, layout: str) -> dict[str, Any]:
    found = {}
    for name, (args, beside) in LEVERS.items():
        if name.startswith(layout):
            case = CASES[name.removeprefix(f"{layout}, ")]
            how = fsdp() if layout == "FSDP2" else {"deepspeed": zero(int(layout[-1]))["deepspeed"] | beside}
            found[f"levers: {name}"] = trained(case, folder / f"levers {name}", 2, **args, **how)
    return found


def on_two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with pytest.raises(ValueError) as caught:
        make(CASES["simpo"], folder / "refused", 2, **fsdp())
    found["without an accelerator"] = str(caught.value)
    with shards_on_cpu():
        for name in LAYOUTS["FSDP2"]:
            more: dict[str, Any] = fsdp(activation_checkpointing=name == "checkpointing")
            found[f"FSDP2, {name}"] = trained(
                CASES[name], folder / "FSDP2" / name, 2, evaluates=name in EVALUATED, **more
            )
        for kind in STATES:
            more = {"save_strategy": "steps", "output_dir": str(folder / kind), **fsdp(state_dict_type=kind)}
            found[kind] = trained(RESUMED, folder / "written", 2, **more)
        found["collectives"] = [collectives(folder / "collectives", words, **fsdp()) for words in WORDS]
        found |= with_levers(folder, "FSDP2")
    return found


def on_two_ranks_of_zero(folder: Path, rank: int) -> dict[str, Any]:
    import deepspeed

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
        for stage in (2, 3):
            for name in LAYOUTS[f"ZeRO-{stage}"]:
                layout = f"ZeRO-{stage}"
                how = {"evaluates": name in EVALUATED, **zero(stage)}
                found[f"{layout}, {name}"] = trained(CASES[name], folder / layout / name, 2, **how)
            found[f"{layout}, saved"], found[f"{layout}, resumed"] = saved_and_resumed(folder / layout, stage)
            found |= with_levers(folder, layout)
        how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, **zero(3)}
        with pytest.raises(ValueError) as caught:
            make(CASES["dpo adapter"], folder / "refused", 2, **how)
        found["use_reentrant"] = str(caught.value)
        at = folder / "collectives of zero"
        found["collectives"] = [collectives(at, words, **zero(3, **AT_ONCE)) for words in WORDS]
    return found


def saved_and_resumed(folder: Path, stage: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that writes a checkpoint of DeepSpeed's after two steps, and the run that goes on from it."""
    more = {"save_strategy": "steps", "output_dir": str(folder / "saved")}
    undisturbed = trained(RESUMED, folder / "written", 2, **more, **zero(stage))
    checkpoint = folder / "saved" / "checkpoint-2"
    found = trained(RESUMED, folder / "resumed", 2, checkpoint=checkpoint, save_strategy="no", **zero(stage))
    for world in (1, 4) if os.environ["RANK"] == "0" else ():  # each puts the parts together in a copy of its own
        shutil.copytree(checkpoint, folder / f"for {world}" / checkpoint.name)
    return undisturbed, found


def resumed(folder: Path, world: int, rank: int) -> dict[str, Any]:
    """The last two steps of a run that two processes began; on four HSDP, too, which reads another's cache."""
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import TrainingArguments
    from transformers.training_args import ParallelMode

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    # A process alone is one of torchrun's on a GPU, and on the CPU none.
    mode = ParallelMode.DISTRIBUTED
    launched = patch.object(TrainingArguments, "parallel_mode", mode) if world == 1 else contextlib.nullcontext()
    with shards_on_cpu(), launched:
        for kind in STATES:
            more: dict[str, Any] = {"checkpoint": folder / kind / "checkpoint-2", **fsdp(state_dict_type=kind)}
            found[kind] = trained(RESUMED, folder / f"{world}-{kind}", world, **more)
        if world == 4:
            more = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2), **fsdp()}
            for name in LAYOUTS["HSDP"]:
                own = folder / "HSDP" / name
                if name != "dpo cached, tied":
                    found[name] = trained(CASES[name], own, 4, **more)
            with patch.object(reference, "dataset_logps", side_effect=AssertionError("it is in the cache")):
                more["ref_cache_dir"] = str(folder / "ref of one")
                found["dpo cached, tied"] = trained(CASES["dpo cached, tied"], folder / "HSDP", 4, **more)
    if sys.platform == "linux":
        import deepspeed

        with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False), launched:
            for stage in (2, 3):
                checkpoint = folder / f"ZeRO-{stage}" / f"for {world}" / "checkpoint-2"
                more = {"checkpoint": checkpoint, "save_strategy": "no", **zero(stage)}
                found[f"ZeRO-{stage}"] = trained(RESUMED, folder / f"{world}-ZeRO-{stage}", world, **more)
                found[f"ZeRO-{stage}"]["left"] = sorted(path.name for path in checkpoint.glob("*universal*"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shared_folder(tmp_path_factory, "sharded_training")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    return run_world(folder / "two", 2, partial(on_two_ranks, folder))


@pytest.fixture(scope="module")
def zero_ranks(folder) -> list[dict[str, Any]]:
    if sys.platform != "linux":
        pytest.skip("the extra [dev] has DeepSpeed on Linux alone")
    return run_world(folder / "zero", 2, partial(on_two_ranks_of_zero, folder))


def alone_of_this_worker() -> str:
    return "alone" + os.environ.get("PYTEST_XDIST_WORKER", "")


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[str], dict[str, Any]]:
    """What one process finds in a case."""
    own = folder / alone_of_this_worker()

    @functools.cache
    def get(name: str) -> dict[str, Any]:
        if name == "resumed":
            return trained(RESUMED, own / name, 1, save_strategy="no")
        more: dict[str, Any] = {"ref_cache_dir": str(folder / "ref of one")} if name == "dpo cached, tied" else {}
        return trained(CASES[name], own / name, 1, evaluates=name in EVALUATED, **more)

    return get


@pytest.fixture(scope="module")
def saved(request) -> None:
    """Checkpoints of two processes."""
    for world in ("two", "zero_ranks") if sys.platform == "linux" else ("two",):
        request.getfixturevalue(world)


@pytest.fixture(scope="module")
def four(folder, saved, alone) -> list[dict[str, Any]]:
    alone("dpo cached, tied")  # whose cache they read
    return run_world(folder / "four", 4, partial(resumed, folder, 4))


def check_equal(own: dict[str, Any], want: dict[str, Any], *, last: int = 0) -> None:
    """last: that many steps are compared, and all weights."""
    assert len(own["logs"]) == len(want["logs"]) > 0
    for log, expected in zip(own["logs"][-last:], want["logs"][-last:], strict=True):
        assert log.keys() == expected.keys()
        for name, value in expected.items():
            if name == "rewards/accuracies" and abs(expected["rewards/margins"]) < 1e-6:
                continue  # of a policy that is the reference: the sign of rounding
            assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert own["weights"].keys() == want["weights"].keys()
    for name, x in want["weights"].items():
        torch.testing.assert_close(own["weights"][name], x, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for before, expected in zip(own.get("evaluations", ()), want.get("evaluations", ()), strict=True):
        for name, value in expected.items():
            if not name.endswith(("_time", "_second", "_runtime", "accuracies")):
                assert before[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def check_class(own: dict[str, Any], layout: str) -> None:
    assert own["distinct"], "accelerate gave the optimizer a weight twice"
    assert own["class"] == "DeepSpeedEngine" if layout.startswith("ZeRO") else own["class"].startswith("FSDP")


def check_layout(found: list[dict[str, Any]], want: dict[str, Any], layout: str) -> None:
    for own in found:
        check_equal(own, want)
        check_class(own, layout)
        assert "trained since" not in want or "has been trained since" in own["trained since"]


@pytest.mark.parametrize("name", LAYOUTS["FSDP2"])
def test_fsdp2_trains_as_one_process(two, alone, name):
    found, want = [r[f"FSDP2, {name}"] for r in two], alone(name)
    check_layout(found, want, "FSDP2")
    assert sum(own["parts"] for own in found) == want["parts"]


@pytest.mark.parametrize(("stage", "name"), [(k, name) for k in (2, 3) for name in LAYOUTS[f"ZeRO-{k}"]])
def test_zero_trains_as_one_process(zero_ranks, alone, stage, name):
    check_layout([r[f"ZeRO-{stage}, {name}"] for r in zero_ranks], alone(name), f"ZeRO-{stage}")


@pytest.mark.parametrize("name", LAYOUTS["HSDP"])
def test_hsdp_trains_as_one_process(four, alone, name):
    want = alone(name)
    for own in (r[name] for r in four):
        check_equal(own, {k: v for k, v in want.items() if k != "evaluations"})
        check_class(own, "HSDP")
    parts = sum(r[name]["parts"] for r in four)
    assert parts == 2 * want["parts"]  # twice in halves


@pytest.mark.parametrize("name", LEVERS)
def test_levers_of_memory(request, alone, name):
    """In float32 the run is that of one process. In 16 bits a policy that is its reference is told to be it, exactly.

    accelerate has what a model of FSDP2 returns rounded to 16 bits, by which the first loss was 0.6914, not ln 2.
    """
    layout, case = name.split(", ", 1)
    for own in (r[f"levers: {name}"] for r in request.getfixturevalue("two" if layout == "FSDP2" else "zero_ranks")):
        check_class(own, layout)
        if "bf16" not in LEVERS[name][0]:
            check_equal(own, alone(case))
            continue
        first, *_, last = own["logs"]
        assert first["loss"] == pytest.approx(0.5 if "kto" in case else math.log(2), abs=1e-6)
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0
        assert last["loss"] != first["loss"] and abs(last["loss"] - alone(case)["logs"][-1]["loss"]) < 0.05


def test_frozen_layers_are_recomputed_by_reentrant_checkpointing(zero_ranks):
    for own in zero_ranks:
        assert "use_reentrant=False under ZeRO-3 and with frozen weights" in own["use_reentrant"]


@pytest.mark.parametrize("layout", ["FSDP2", "ZeRO-3"])
def test_a_step_sends_weights_and_gradients_alone(request, layout):
    """The head is gathered once per model, and nothing that is sent grows with the tokens.

    All weights of the policy are gathered for the forward, and for the backward but the head (and the norm beside it,
    under FSDP2, which keeps its outermost group), and those of the reference's copy for its forward.
    """
    for own in request.getfixturevalue("two" if layout == "FSDP2" else "zero_ranks"):
        few, many = own["collectives"]
        assert few["list"] == many["list"]
        weights, head = many["weights"], many["head"]
        scored = BATCH // 2 * 2 * WORDS[1]
        assert scored * WIDE > weights, "logits would not be seen among weights"
        sizes = {kind: [max(x) for k, x in many["list"] if kind in k] for kind in ("gather", "reduce_scatter")}
        kept = head + (many["width"] if layout == "FSDP2" else 0)
        assert sum(n for n in sizes["gather"] if n > 1) == 3 * weights - kept
        assert sum(sizes["reduce_scatter"]) == weights
        others = [x for kind, x in many["list"] if not any(k in kind for k in sizes)]
        assert all(sum(x) < 100 for x in others), "sums of metrics, items and norms"


def check_resumed(found: list[dict[str, Any]], alone: Any) -> None:
    want = alone("resumed")
    for kind in CUT_ANEW:
        drawn = [r[kind]["drawn"] for r in found]
        for step in (2, 3):
            assert sorted(row for own in drawn for row in own[step]) == sorted(want["drawn"][step]), (kind, step)
        for own in (r[kind] for r in found):
            check_equal(own, want, last=2)
            for log, expected in zip(own["logs"][-2:], want["logs"][-2:], strict=True):
                assert log["loss"] == pytest.approx(expected["loss"], abs=1e-6)
            assert not own.get("left"), "what was put together beside the checkpoint"


def test_a_checkpoint_of_two_ranks_is_resumed_on_four(four, alone):
    check_resumed(four, alone)


def test_a_checkpoint_of_two_ranks_is_resumed_on_one(folder, saved, alone):
    check_resumed(run_world(folder / "one", 1, partial(resumed, folder, 1), join=True), alone)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_is_resumed(zero_ranks, alone, stage):
    saved, found = ([r[f"ZeRO-{stage}, {name}"] for r in zero_ranks] for name in ("saved", "resumed"))
    for undisturbed, own in zip(saved, found, strict=True):
        check_equal(own, undisturbed, last=2)
        assert own["drawn"] == {step: undisturbed["drawn"][step] for step in (2, 3)}
        for log, expected in zip(own["logs"][-2:], undisturbed["logs"][-2:], strict=True):
            assert log["loss"] == expected["loss"]
        assert all(torch.equal(own["weights"][name], x) for name, x in undisturbed["weights"].items())
        check_equal(undisturbed, alone("resumed"))


def test_the_cache_does_not_depend_on_how_the_model_is_kept(folder, two, alone, four):
    """The one of four processes has been read, see `resumed`; here the names are the same in all layouts."""

    def names(ref: Path) -> set[str]:
        return {str(path.relative_to(ref)) for path in ref.rglob("*.safetensors")}

    alone("dpo cached, tied")
    want = names(folder / "ref of one")
    assert len(want) == 2  # train and held out
    assert names(folder / "FSDP2" / "dpo cached, tied" / "ref") == want


def test_the_cache_is_the_same_under_zero(folder, zero_ranks, alone):
    alone("dpo cached, by tokens")
    found = []
    for layout in (alone_of_this_worker(), "ZeRO-2", "ZeRO-3"):
        ref = folder / layout / "dpo cached, by tokens" / "ref"
        found.append({str(path.relative_to(ref)) for path in ref.rglob("*.safetensors")})
    assert found[0] == found[1] == found[2] and len(found[0]) == 2


def test_what_cannot_be_is_refused_by_name(two):
    for own in two:
        assert "fsdp: accelerate shards no model on cpu" in own["without an accelerator"]
    plugin = SimpleNamespace(fsdp_version=1)
    first = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    for strategy in ("copy", "cached"):
        with pytest.raises(ValueError, match=f"reference='{strategy}' needs FSDP2.*set version 2 in fsdp_config"):
            check_reference(strategy, make_model(), first)
    check_reference("adapter", make_model(), first)
    partitioned: Any = torch.nn.Linear(2, 2)
    partitioned.weight.ds_shape = (2, 2)
    third = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    with pytest.raises(ValueError, match="of a model that ZeRO-3 has loaded in parts"):
        check_reference("copy", partitioned, third)
    check_reference("cached", partitioned, third)


def test_another_number_of_processes_reads_whole_checkpoints_alone(tmp_path):
    write_made_with(tmp_path, {PROCESSES: 2})
    (tmp_path / "latest").write_text("global_step2\n")
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    two, four = (SimpleNamespace(state=state, num_processes=n, parallelism_config=None) for n in (2, 4))
    told = "was written by 2 processes, and this run has 4: "
    assert not written_by_others(tmp_path, two)
    with pytest.raises(ValueError, match=f"{told}it has the parts of 1: put the files of all in one folder"):
        written_by_others(tmp_path, four)
    (tmp_path / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    assert written_by_others(tmp_path, four)
    four.parallelism_config = SimpleNamespace(sp_size=2)
    with pytest.raises(ValueError, match=f"{told}with sp_size, resume on as many"):
        written_by_others(tmp_path, four)
    assert not written_by_others(tmp_path, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)))
    write_made_with(tmp_path, {})  # of an earlier version
    assert not written_by_others(tmp_path, four)


@pytest.mark.skipif(sys.platform != "linux", reason="the extra [dev] has DeepSpeed on Linux alone")
def test_what_the_converter_cannot_read_is_said(tmp_path):
    (tmp_path / "latest").write_text("global_step2")
    (tmp_path / "global_step2").mkdir()
    for rank in range(2):
        path = tmp_path / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"zero_stage": 3}}, path)
    accelerator = SimpleNamespace(is_main_process=True)
    told = r"cannot make a universal checkpoint of it .*Error.*knows Adam's states alone"
    with pytest.raises(ValueError, match=told), loading_universal(tmp_path, accelerator):
        raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step2", "latest"]
