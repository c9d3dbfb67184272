"""Online RL of models in parts, FSDP2's, HSDP's and DeepSpeed's, on two and four processes against one process.

The samples are the same ids, drawn by the policy itself from seeds of the prompts; rewards, losses, norms of gradients
and the weights after three steps are equal to 1e-5 in float32. One world of gloo processes runs all cases; in each
rollout one process has two prompts and the other has one, so that they do not run equally many forwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

import test_rl
from ranks import run_world, shared_folder
from test_rl import make_tokenizer
from test_rollout import StandIn
from test_sharded_training import AT_ONCE, check_equal, found_of, fsdp, shards_on_cpu, zero
from test_trainer import PEFT_WARNING, lora, make_model
from xpo_fast.rl.checks import check_sharding
from xpo_fast.rl.config import RLConfig
from xpo_fast.rollout import GenerateRollout, Samples, ServerRollout
from xpo_fast.trainer.sharding import loaded_in_parts, whole_weights
from xpo_fast.trainer.whole import whole

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

STEPS = 3
PROMPTS = [{"prompt": text} for text in ("w1 w2", "w3", "w4 w5 w6", "w7 w8", "w9")]
ON_LINUX = sys.platform == "linux"  # the extra [dev] has DeepSpeed there alone


class Case(NamedTuple):
    args: dict[str, Any]
    adapted: bool = False
    tied: bool = False


PPO = {"method": "ppo", "kl_coef": 0.1, "epochs_per_rollout": 2, "whiten_advantages": False}
CASES = {
    "grpo": Case({}),
    "grpo, tied, by tokens": Case({"tokens_per_batch": 24}, tied=True),
    "grpo, lora": Case({}, adapted=True),
    "grpo, copy": Case({"method_args": {"beta": 0.1}, "reference": "copy"}),
    "grpo, adapter off": Case({"method_args": {"beta": 0.1}}, adapted=True),
    "ppo": Case({**PPO, "value_head_learning_rate": 5e-3}),
    "ppo, lora": Case(PPO, adapted=True),
}


OF_ZERO = {2: ["grpo, copy", "ppo"], 3: ["grpo, copy", "grpo, adapter off", "ppo"]}
RUNS = {"FSDP2": list(CASES)} | ({f"ZeRO-{stage}": names for stage, names in OF_ZERO.items()} if ON_LINUX else {})
CUT_ANEW = ("FSDP2", "ZeRO-3") if ON_LINUX else ("FSDP2",)  # whose checkpoint another number of ranks goes on from
RESUMED, SERVED = "ppo", "grpo, lora"  # the cases that are resumed, and that push adapters


class ByPrompt(GenerateRollout):
    """Draws the completions of each prompt of a rollout from a seed of its own, however prompts are shared out."""

    number: Any = None  # returns that of the rollout

    def generate(self, prompts: Any, n: int = 1, *, sampling: Any, seed: int) -> Samples:
        found = []
        for p in prompts:
            drawn = int(hashlib.sha256(f"{p} {self.number()}".encode()).hexdigest()[:6], 16)
            found.append(super().generate([p], n, sampling=sampling, seed=drawn))
        each = [[x for samples in found for x in getattr(samples, name)] for name in Samples.__dataclass_fields__]
        return Samples(*each)


def reward(completion_ids, **_):
    """No reward for some; all of a prompt's may be equal."""
    return [math.nan if ids[0] % 7 == 0 else sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(case: Case, folder: Path, ranks: int, **further: Any) -> Any:
    args = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6 // ranks,
        "num_generations": 4, "prompts_per_rollout": 3, "max_grad_norm": 1.0, "adam_epsilon": 1e-4, "layout": "padded",
        "preflight": "stop", "per_device_eval_batch_size": 3, "eval_generations": 2,
    }  # fmt: skip
    if ranks == 4:
        args |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    if "tokens_per_batch" in case.args:
        args |= {"per_device_train_batch_size": 12 // ranks, "gradient_accumulation_steps": 1}
    args |= {**case.args, **further, **({"ddp_backend": "gloo"} if ranks > 1 else {})}
    model = make_model(tie_word_embeddings=case.tied)
    args["peft_config"] = lora() if case.adapted else None
    trainer = test_rl.make_trainer(folder, reward, model=model, prompts=PROMPTS, **args)
    trainer.rollout = ByPrompt(trainer.policy, make_tokenizer())
    trainer.rollout.number = lambda: trainer.progress.rollouts
    return trainer


def trained(case: Case, folder: Path, ranks: int, *, resume: str | None = None, **further: Any) -> dict[str, Any]:
    trainer = make(case, folder, ranks, **further)
    held_out = trainer.evaluate(PROMPTS[:1])["eval_reward"]  # the second process has no prompt
    trainer.train(resume_from_checkpoint=resume)
    return about(trainer) | {"held out": held_out, **made_whole(trainer)}


def made_whole(trainer: Any) -> dict[str, Any]:
    """What one process computes alone, and what it keeps of it; before, DeepSpeed is gathering the head."""
    ids, policy = torch.tensor([[3, 4, 5]]), trainer.policy
    with torch.no_grad():
        if loaded_in_parts(policy):
            head = policy.get_output_embeddings().weight
            trainer.model_wrapped.module.ds_inflight_param_registry[head] = head.all_gather_coalesced([head])
        with whole(policy):
            logits = policy(input_ids=ids).logits.clone() if trainer.args.process_index == 0 else None
    left = sum(getattr(p, "_local_tensor", p).numel() for p in policy.parameters())
    return {"logits": logits, "left": left}


def served(folder: Path, rank: int, how: dict[str, Any]) -> dict[str, Any]:
    """The adapter that the server has been given at the end of a run, and that of the policy."""
    server = StandIn(make_model(), make_tokenizer()) if rank == 0 else None
    (url,) = broadcast_object_list([server and server.url])
    trainer = make(CASES[SERVED], folder, 2, **how)
    trainer.rollout = ServerRollout(url, make_tokenizer(), push="lora", folder=folder / "pushed")
    trainer.train()
    trainer.evaluate(PROMPTS[:3])
    trainer.accelerator.wait_for_everyone()
    if server is not None:
        server.stop()
    (path,) = (folder / "pushed").glob("*/adapter_model.safetensors")
    weights = {n.replace(".default", ""): x.clone() for n, x in whole_weights(trainer.model) if "lora_" in n}
    return {"pushed": load_file(path), "weights": weights, "steps": trainer.state.global_step}


def about(trainer: Any) -> dict[str, Any]:
    found = found_of(trainer)
    found["logs"] = [{k: v for k, v in log.items() if not k.startswith("time/")} for log in found["logs"]]
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "samples.jsonl").read_text().splitlines()]
    found["samples"] = [(x["rollout"], x["prompt"], x["completion"], str(x["reward"])) for x in lines]
    return found


def on_two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    with shards_on_cpu():
        found = runs("FSDP2", folder, rank, fsdp())
    if ON_LINUX:
        import deepspeed

        with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
            for stage in OF_ZERO:
                found |= runs(f"ZeRO-{stage}", folder, rank, zero(stage, **(AT_ONCE if stage == 3 else {})))
    return found


def runs(layout: str, folder: Path, rank: int, how: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in RUNS[layout]:
        at = folder / f"{layout}-{name}"
        more = {"save_strategy": "steps", "save_steps": 1} if name == RESUMED else {}
        found[f"{layout}, {name}"] = trained(CASES[name], at, 2, **more, **copy.deepcopy(how))
        if name == RESUMED:
            if rank == 0 and layout in CUT_ANEW:
                shutil.copytree(at, folder / f"{layout} of two")
            more["resume"] = str(at / "out" / "checkpoint-1")  # within a rollout
            found[f"{layout}, resumed"] = trained(CASES[name], at, 2, **more, **copy.deepcopy(how))
    if layout != "ZeRO-2":
        found[f"{layout}, served"] = served(folder / f"{layout}-served", rank, copy.deepcopy(how))
    return found


def on_four_ranks(folder: Path, rank: int) -> dict[str, Any]:
    """HSDP, and the rest of what two processes began. Of the three prompts of a rollout one process has none."""
    from accelerate.parallelism_config import ParallelismConfig

    warnings.simplefilter("ignore")
    how = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2), **fsdp()}

    def resumed(layout: str, **how: Any) -> dict[str, Any]:
        at = folder / f"{layout} of two"
        return trained(CASES[RESUMED], at, 4, resume=str(at / "out" / "checkpoint-1"), **how)

    with shards_on_cpu():
        found = {"FSDP2": resumed("FSDP2", **fsdp()), "HSDP": trained(CASES["grpo, copy"], folder / "HSDP", 4, **how)}
    if ON_LINUX:
        import deepspeed

        with patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False):
            found["ZeRO-3"] = resumed("ZeRO-3", **zero(3, **AT_ONCE))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    folder = shared_folder(tmp_path_factory, "sharded_rl")
    return run_world(folder / "two", 2, partial(on_two_ranks, folder))


@pytest.fixture(scope="module")
def four(tmp_path_factory, two) -> list[dict[str, Any]]:
    folder = shared_folder(tmp_path_factory, "sharded_rl")
    return run_world(folder / "four", 4, partial(on_four_ranks, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    found: dict[str, Any] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in found:
            found[name] = trained(CASES[name], tmp_path_factory.mktemp("alone"), 1)
        return found[name]

    return get


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in RUNS.items() for name in names])
def test_a_model_in_parts_is_trained_as_a_whole_one(two, alone, layout, name):
    want = alone(name)
    for own in (r[f"{layout}, {name}"] for r in two):
        assert own["samples"] == want["samples"] and own["held out"] == pytest.approx(want["held out"], nan_ok=True)
        check_equal(own, want)
        assert own["class"].startswith("FSDP") if layout == "FSDP2" else own["class"] == "DeepSpeedEngine"
    found = [r[f"{layout}, {name}"] for r in two]
    torch.testing.assert_close(found[0]["logits"], want["logits"], rtol=1e-5, atol=1e-5)
    if layout == "FSDP2":
        assert sum(own["parts"] for own in found) == sum(own["left"] for own in found) == want["parts"]
    elif layout == "ZeRO-3":
        assert sum(own["left"] for own in found) == 0, "gathered weights have been kept"


def test_hsdp_trains_as_a_whole_model(four, alone):
    found, want = [r["HSDP"] for r in four], alone("grpo, copy")
    for own in found:
        assert own["samples"] == want["samples"] and own["class"].startswith("FSDP")
        check_equal(own, want)
    assert sum(own["parts"] for own in found) == sum(own["left"] for own in found) == 2 * want["parts"]


@pytest.mark.parametrize("layout", CUT_ANEW)
def test_a_rollout_of_two_ranks_is_trained_on_by_four(four, alone, layout):
    want = alone(RESUMED)
    for own in (r[layout] for r in four):
        assert own["samples"] == want["samples"]
        check_equal(own, want, last=2)


@pytest.mark.parametrize("layout", RUNS)
def test_resumed_within_a_rollout_it_is_the_same_run(two, layout):
    for found in two:
        whole_run, resumed = found[f"{layout}, {RESUMED}"], found[f"{layout}, resumed"]
        assert resumed["samples"] == whole_run["samples"]
        check_equal(resumed, whole_run)


@pytest.mark.parametrize("layout", [layout for layout in RUNS if layout != "ZeRO-2"])
def test_a_server_is_given_the_whole_adapter(two, layout):
    for found in (r[f"{layout}, served"] for r in two):
        assert found["steps"] == STEPS and found["pushed"].keys() == found["weights"].keys()
        assert all(torch.equal(x, found["weights"][name]) for name, x in found["pushed"].items())
        assert any("lora_B" in name and x.any() for name, x in found["pushed"].items())


def sharded_by(how: str, ranks: int = 2) -> Any:
    """What stands for an accelerator: its state."""
    kind, version = how[:4], int(how[-1])
    state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=version) if kind == "ZeRO" else None,
        fsdp_plugin=SimpleNamespace(fsdp_version=version) if kind == "FSDP" else None,
    )
    return SimpleNamespace(state=state, num_processes=ranks)


def test_what_cannot_be_had_is_refused_by_name(tmp_path):
    model = torch.nn.Linear(2, 2)
    plain, mixed = RLConfig(str(tmp_path), use_cpu=True), RLConfig(str(tmp_path), use_cpu=True, ref_mixin=0.1)
    with pytest.raises(ValueError, match="which needs FSDP2: set version 2 in fsdp_config"):
        check_sharding("none", plain, model, sharded_by("FSDP1"))
    for how in ("FSDP2", "ZeRO-3"):
        with pytest.raises(ValueError, match=rf"ref_mixin=0\.1 moves every weight of the reference, and {how} keeps"):
            check_sharding("copy", mixed, model, sharded_by(how))
        check_sharding("copy", plain, model, sharded_by(how))
    check_sharding("copy", mixed, model, sharded_by("ZeRO-2"))


def test_a_whole_model_is_left_alone():
    model = make_model()
    hooks = model.register_forward_pre_hook(lambda *_: None)
    before = dict(model._forward_pre_hooks)
    with whole(model):
        assert model._forward_pre_hooks == before
    hooks.remove()
