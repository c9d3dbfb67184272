"""The router's auxiliary loss over many steps of online RL, and over ranks: against plain loops of transformers' own."""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path

import pytest
import torch

import test_rl
import test_trainer
from ranks import found_by
from test_router_loss import MODELS, aux_of, qwen, routers, watched

STEPS, COEFFICIENT, TOLERANCE = 20, 0.5, 1e-4


# --- 20 steps of GRPO -------------------------------------------------------------------------------------------------


def grpo_loop(model, batches: list[dict], rollouts: list) -> list[tuple[float, float]]:
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
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((float(loss.detach()), float(aux.detach())))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_grpo_of_the_rl_trainer_is_trls_formula_over_20_steps(tmp_path, name):
    """On what it sampled and the rewards of that; the loop's weights are its own."""
    plain = MODELS[name]()
    made = test_rl.make_trainer(
        tmp_path, model=copy.deepcopy(plain), preflight="off", max_steps=STEPS, method="grpo", max_draws=1
    )
    seen = watched(made)
    made.train()
    logs = [x for x in made.state.log_history if "loss" in x]
    want = grpo_loop(plain, seen, made.rollout.samples)
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
