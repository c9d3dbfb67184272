"""The router's losses over many steps of online RL and over ranks, against plain loops, and the z-loss by hand."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from pathlib import Path

import pytest
import torch

import test_rl
import test_trainer
from ranks import found_by
from test_router_loss import MODELS, aux_of, qwen, routers, watched
from xpo_fast.models.router_loss import router_z_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
)
STEPS, COEFFICIENT, TOLERANCE = 20, 0.5, 1e-4


# --- 20 steps of GRPO -------------------------------------------------------------------------------------------------


def z_of(model, batch) -> torch.Tensor:
    """The mean of logsumexp², over layers and the tokens that are not padding."""
    rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
    keep = rows["attention_mask"].reshape(-1).bool()
    return torch.cat(
        [x[keep].logsumexp(-1) ** 2 for x in model(**rows, output_router_logits=True).router_logits]
    ).mean()


def grpo_loop(model, batches: list[dict], rollouts: list, z: float) -> list[tuple[float, float]]:
    """TRL's formula, step by step: GRPO's loss of two micro-batches, plus the coefficient times their mean aux_loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    found = []
    for k, samples in enumerate(rollouts):
        rewards = test_rl.share_of_even(samples.completion_ids)
        advantages = []
        for i in range(0, len(rewards), 4):
            group = rewards[i : i + 4]
            mean, std = statistics.mean(group), statistics.stdev(group)
            advantages += [(r - mean) / (std + 1e-4) for r in group]
        loss = torch.zeros(())
        for advantage, (logp, _) in zip(advantages, test_rl.token_logps(model, samples), strict=True):
            loss = loss - (advantage * torch.exp(logp - logp.detach())).mean() / len(rewards)
        pair = batches[2 * k : 2 * k + 2]
        aux = (aux_of(model, pair[0]) + aux_of(model, pair[1])) / 2
        loss = loss + COEFFICIENT * aux
        if z:
            loss = loss + z * sum(z_of(model, b) for b in pair) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((float(loss.detach()), float(aux.detach())))
    return found


@pytest.mark.parametrize(("name", "z"), [("qwen3_moe", 0.0), ("gpt_oss", 0.0), ("qwen3_moe", 0.1)])
def test_grpo_of_the_rl_trainer_is_trls_formula_over_20_steps(tmp_path, name, z):
    """On what it sampled and the rewards of that; the loop's weights are its own."""
    plain = MODELS[name](router_z_loss_coef=z)
    made = test_rl.make_trainer(
        tmp_path, model=copy.deepcopy(plain), preflight="off", max_steps=STEPS, method="grpo", max_draws=1
    )
    seen = watched(made)
    made.train()
    logs = [x for x in made.state.log_history if "loss" in x]
    want = grpo_loop(plain, seen, made.rollout.samples, z)
    assert len(logs) == len(want) == STEPS and len(seen) == 2 * STEPS
    for k, (log, (loss, aux)) in enumerate(zip(logs, want, strict=True)):
        assert log["aux_loss"] == pytest.approx(aux, rel=TOLERANCE), k
        assert log["loss"] == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE), k
    assert abs(want[0][1] - want[-1][1]) > 100 * TOLERANCE
    for n, p in routers(made.model).items():
        torch.testing.assert_close(p, routers(plain)[n], rtol=1e-2, atol=1e-3)


# --- over ranks -------------------------------------------------------------------------------------------------------


def first_of(folder: Path, accumulation: int) -> dict:
    made = test_trainer.make_trainer(
        folder, model=qwen(), rows=8, reference="copy", preflight="off", layout="padded",
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    seen = watched(made)
    log, grads = test_trainer.first_step(made)
    of = [{k: x for k, x in b.items() if isinstance(x, torch.Tensor)} for b in seen]
    return {"log": log, "grads": {n: grads[n] for n in routers(made.model)}, "batches": of}


def run_ranks(rank: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return first_of(Path(folder), 2)


def test_two_ranks_of_two_micro_batches_are_one_process_of_four(tmp_path, tmp_path_factory):
    """The mean over the step's micro-batches of all ranks, by hand and of one process; not that of one rank."""
    found = found_by(tmp_path_factory, 2, run_ranks)
    one = first_of(tmp_path, 4)
    values = [[float(aux_of(qwen(), b).detach()) for b in rank["batches"]] for rank in found]
    assert [len(v) for v in values] == [2, 2]
    mean = sum(map(sum, values)) / 4
    assert abs(mean - sum(values[0]) / 2) > 1e-3
    for of in (*found[:1], one):
        assert of["log"]["aux_loss"] == pytest.approx(mean, rel=1e-5)
    for name in ("loss", "rewards/margins"):
        assert found[0]["log"][name] == pytest.approx(one["log"][name], rel=1e-4, abs=1e-6)
    for rank in found:
        for n, want in one["grads"].items():
            assert want.abs().max() > 1e-4
            torch.testing.assert_close(rank["grads"][n], want, rtol=1e-3, atol=2e-6)


def test_it_is_of_micro_batches_and_not_of_the_steps_tokens_at_once():
    """As in TRL: a product of two means over a micro-batch's tokens, whose mean is not that of all tokens."""
    torch.manual_seed(0)
    ids = torch.randint(3, test_trainer.VOCAB, (8, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    halves = [{n: x[at] for n, x in batch.items()} for at in (slice(0, 4), slice(4, 8))]
    whole, mean = aux_of(qwen(), batch), sum(aux_of(qwen(), h) for h in halves) / 2
    assert abs(float((whole - mean).detach())) > 1e-3


# --- the z-loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_by_hand(padded):
    """2/N · logsumexp · softmax, over two layers and the tokens that are not padding."""
    torch.manual_seed(0)
    logits = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]) if padded else torch.ones(2, 3, dtype=torch.long)
    loss = router_z_loss(logits, {"attention_mask": mask})
    kept, total = mask.reshape(-1).tolist(), 0.0
    for x in logits:
        for row, keep in zip(x.tolist(), kept, strict=True):
            total += keep * math.log(sum(math.exp(e) for e in row)) ** 2
    assert float(loss.detach()) == pytest.approx(total / (2 * sum(kept)), rel=1e-12)
    loss.backward()
    for x in logits:
        want = 2 * x.logsumexp(-1, keepdim=True) * x.softmax(-1) * mask.reshape(-1, 1) / (2 * sum(kept))
        torch.testing.assert_close(x.grad, want.detach(), rtol=1e-12, atol=1e-14)
    if not padded:
        torch.testing.assert_close(router_z_loss(logits, {}), loss)


def test_z_loss_ignores_what_is_in_padding():
    logits = torch.zeros(3, 2, dtype=torch.float64)
    logits[2] = torch.nan
    logits.requires_grad_()
    loss = router_z_loss([logits], {"attention_mask": torch.tensor([[1, 1, 0]])})
    assert float(loss.detach()) == pytest.approx(math.log(2) ** 2)
    loss.backward()
    torch.testing.assert_close(
        logits.grad,
        torch.tensor([[0.5], [0.5], [0.0]], dtype=torch.float64) * math.log(2) * torch.ones(3, 2, dtype=torch.float64),
    )
    assert float(router_z_loss([logits], {"attention_mask": torch.zeros(1, 3)}).detach()) == 0


@pytest.mark.parametrize(
    ("name", "config"),
    [("qwen3_moe", {}), ("gpt_oss", {}), ("qwen3_moe", {"mlp_only_layers": [0]}), ("gpt_oss", {"checkpointing": True})],
    ids=["qwen3_moe", "gpt_oss", "a dense layer", "checkpointing"],
)
def test_routers_learn_from_the_z_loss(tmp_path, name, config):
    shape, more = ({}, {"gradient_checkpointing": True}) if "checkpointing" in config else (config, {})
    logs, grads, seen = {}, {}, {}
    for z in (0.0, 0.25):
        model = MODELS[name](router_z_loss_coef=z, **shape)
        made = test_trainer.make_trainer(
            tmp_path, model=model, rows=8, reference="copy", gradient_accumulation_steps=2, preflight="off",
            layout="padded", **more,
        )  # fmt: skip
        seen[z] = watched(made)
        logs[z], grads[z] = test_trainer.first_step(made)
    plain = MODELS[name](**shape)
    values, want = [], {}
    for batch in seen[0.25]:
        z = z_of(plain, batch)
        values.append(float(z.detach()))
        own = routers(plain)
        for n, g in zip(own, torch.autograd.grad(z, [*own.values()]), strict=True):
            want[n] = want.get(n, 0) + 0.25 * g / 2
    assert len(values) == 2 and "z_loss" not in logs[0.0]
    assert logs[0.25]["z_loss"] == pytest.approx(sum(values) / 2, rel=1e-5)
    assert logs[0.25]["loss"] == pytest.approx(logs[0.0]["loss"] + 0.25 * sum(values) / 2, rel=1e-5)
    for n, x in want.items():
        assert x.abs().max() > 1e-4
        torch.testing.assert_close(grads[0.25][n] - grads[0.0][n], x, rtol=1e-3, atol=2e-5)


def test_z_losses_that_cannot_be_are_refused(tmp_path):
    for z, config, words in (
        (-0.1, {}, "finite and 0 or more, got -0.1"),
        (math.nan, {}, "finite and 0 or more, got nan"),
        (0.1, {"router_aux_loss_coef": 0.0}, "needs a router_aux_loss_coef above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            test_trainer.make_trainer(tmp_path, model=qwen(router_z_loss_coef=z, **config), reference="copy")


# --- what is hostile --------------------------------------------------------------------------------------------------


def test_steps_without_a_reward_have_finite_losses_and_no_gradient(tmp_path):
    """Micro-batches that only fill up."""
    made = test_rl.make_trainer(
        tmp_path, lambda completions, **_: [math.nan] * 4 + [float(i % 2) for i in range(len(completions) - 4)],
        model=qwen(router_z_loss_coef=0.1), preflight="off", gradient_accumulation_steps=4,
    )  # fmt: skip
    log, grads = test_rl.step(made)
    assert all(math.isfinite(x) for x in log.values() if isinstance(x, float)), log
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.filterwarnings(f"ignore:{test_trainer.PEFT_WARNING}:FutureWarning")
def test_a_run_that_is_resumed_with_adapters_on_experts_is_the_same(tmp_path):
    def run(folder: str, **how) -> list[dict]:
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        made = test_trainer.make_trainer(
            tmp_path / folder, model=qwen(router_z_loss_coef=0.1), reference="copy", preflight="off",
            layout="padded", max_steps=4, save_strategy="steps", save_steps=2,
            peft_config=test_trainer.lora(target_parameters=experts),
        )  # fmt: skip
        made.train(**how)
        return [x for x in made.state.log_history if "loss" in x]

    whole = run("a")
    resumed = run("b", resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    for name in ("loss", "aux_loss", "z_loss"):
        assert [x[name] for x in resumed] == pytest.approx([x[name] for x in whole], rel=1e-6), name
    assert len({x["z_loss"] for x in whole}) == 4


def test_routers_that_are_not_finite_are_named_before_a_step(tmp_path):
    model = qwen(router_z_loss_coef=0.1)
    with torch.no_grad():
        next(iter(routers(model).values())).fill_(torch.nan)
    made = test_trainer.make_trainer(tmp_path, model=model, reference="copy", layout="padded", preflight="off")
    with pytest.raises(ValueError, match=r"not finite: model\.layers\.0\.mlp\.gate\.weight holds NaN"):
        made.train()


def test_trls_trainers_refuse_a_z_loss(tmp_path):
    import datasets

    trl = pytest.importorskip("trl")
    from xpo_fast.integrations.trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], loss_type=["xpo:dpo"])
    rows = datasets.Dataset.from_list(test_trainer.make_rows(4))
    how = {"ref_model": qwen(1), "train_dataset": rows, "processing_class": test_trainer.make_tokenizer()}
    assert issubclass(DPOTrainer, trl.DPOTrainer)
    with pytest.raises(ValueError, match=r"router_z_loss_coef=0\.1: DPOTrainer adds no z-loss"):
        DPOTrainer(qwen(router_z_loss_coef=0.1), args=args, **how)
