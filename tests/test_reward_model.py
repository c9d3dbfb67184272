"""Reward models: the value head, every method's loss against a plain computation, scoring, checkpoints, resume.

The model is a random Llama of two layers in float32; equalities hold to float32 rounding of differently ordered sums.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import xpo_fast as xf
from ranks import run_world
from test_trainer import PEFT_WARNING, Gradients, lora, make_model, make_rows, make_tokenizer, words
from xpo_fast.data.rows import DataError
from xpo_fast.methods.reward import odin
from xpo_fast.models import Head, install_fused_loss, load_model
from xpo_fast.models.value_head import (
    ValueHead,
    attach_value_head,
    detach_value_head,
    load_value_head,
    save_value_head,
    value_head,
)
from xpo_fast.rewards.ensemble import RewardEnsemble
from xpo_fast.rewards.model import ImplicitReward, RewardModel
from xpo_fast.rewards.spec import READS_SAMPLES, USES, RewardSpec
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

OBJECTIVES = ["helpful", "safe"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows_for(method: str, count: int = 8, seed: int = 0) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    if method == "k_wise":
        sizes = [2 + i % 3 for i in range(count)]
        return [
            {
                "prompt": words(g, 2, 6),
                "completions": [" " + words(g, 1, 9) for _ in range(size)],
                "scores": [float((7 * j + i) % size) for j in range(size)],
            }
            for i, size in enumerate(sizes)
        ]
    if method in ("discriminator", "regression"):
        rows = make_rows(count, "unpaired", seed)
        ratings = [{"helpful": i % 5 / 2, "safe": None if i % 4 == 0 else 1.0} for i in range(count)]
        return [{**row, **r} for row, r in zip(rows, ratings)] if method == "regression" else rows
    rows = make_rows(count, "pair", seed)
    return [{**row, "prob": 0.8} for row in rows] if method == "preference_model" else rows


def make_samples(count: int = 5) -> list[dict]:
    """What a policy may have sampled: lists of 2, 3, 2, … completions."""
    rows = make_rows(count, seed=7)
    return [
        {"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"], " w3 w4"][: 2 + i % 2]}
        for i, r in enumerate(rows)
    ]


def make_trainer(
    tmp_path, method="bradley_terry", *, model=None, rows=None, samples=(), peft_config=None, eval_rows=None, **args
):
    if samples == ():
        samples = make_samples() if method in READS_SAMPLES else None
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_steps": 1,
        "seed": 3,
        "max_grad_norm": 0.0,
        "max_length": 64,
        "objectives": OBJECTIVES if method in ("regression", "gated") else None,
        "train_sampling_strategy": "sequential",
    }
    return RewardTrainer(
        make_model() if model is None else model,
        RewardConfig(method=method, **{**defaults, **args}),
        train_dataset=rows or rows_for(method),
        eval_dataset=eval_rows,
        samples=samples,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def log(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def text_ids(prompt: str, completion: str) -> torch.Tensor:
    return torch.tensor([[*make_tokenizer()(prompt + completion)["input_ids"], 1]])  # and EOS


def plain_outputs(model, head: ValueHead, rows, name="chosen") -> torch.Tensor:
    """The head on the last hidden state of each row alone, without padding: (R, K)."""
    trunk = model.model
    found = []
    for row in rows:
        ids = text_ids(row["prompt"], row[name])
        found.append(trunk(input_ids=ids).last_hidden_state[0, -1] @ head.weight.T + head.bias)
    return torch.stack(found)


# --- the value head -----------------------------------------------------------------------------------------------


def test_value_head_is_linear_in_float32():
    head = ValueHead(5, 3, std=0.5)
    hidden = torch.randn(2, 4, 5)
    expected = hidden.double() @ head.weight.double().T + head.bias.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hidden)
        wider = head(torch.cat([hidden, torch.full((2, 4, 2), 1e6)], dim=-1))  # LoRA on the LM head
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wider, found)
    assert not ValueHead(5)(hidden).any()
    half = ValueHead(5, dtype=torch.bfloat16, std=1.0)
    assert half(hidden.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="outputs >= 1"):
        ValueHead(5, 0)


@pytest.mark.parametrize("adapter", [False, True])
def test_value_head_beside_the_model(tmp_path, adapter):
    model = make_model()
    if adapter:
        model = peft.get_peft_model(model, lora(target_modules="all-linear"))
    head = attach_value_head(model, 2, std=0.1)
    assert value_head(model) is head is attach_value_head(model, 2)
    assert all(p.requires_grad for p in head.parameters())
    assert any(p is head.weight for p in model.parameters())
    with pytest.raises(ValueError, match="3 outputs, the model has one with 2"):
        attach_value_head(model, 3)
    model.save_pretrained(tmp_path)
    save_value_head(model, tmp_path)
    weights = load_file(tmp_path / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    assert weights and not any("value_head" in name for name in weights)
    other = make_model(1)
    torch.testing.assert_close(load_value_head(other, tmp_path).weight, head.weight)
    detach_value_head(other)
    assert value_head(other) is None and not other._keys_to_ignore_on_save
    with pytest.raises(ValueError, match="no value head in"):
        load_value_head(other, tmp_path / "nowhere")
    narrow = make_model(hidden_size=16)
    with pytest.raises(ValueError, match="value head of another model"):
        load_value_head(narrow, tmp_path)


def test_values_and_log_probs_of_one_forward():
    model = make_model()
    head = attach_value_head(model, std=0.1)
    install_fused_loss(model)
    ids = torch.randint(3, 90, (2, 7))
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))

    def fused(hidden, lm_head: Head):
        return head(hidden)[..., 0], xf.token_logps(hidden[:, :-1], lm_head, ids[:, 1:])

    values, logps = model(input_ids=ids, attention_mask=torch.ones_like(ids), fused_loss=fused)
    assert len(calls) == 1
    out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(values, (out.hidden_states[-1] @ head.weight.T + head.bias)[..., 0])
    expected = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logps, expected)


# --- losses -------------------------------------------------------------------------------------------------------


def test_bradley_terry_is_that_of_the_last_tokens(tmp_path):
    rows = [{**row, "margin": i / 4} for i, row in enumerate(make_rows(4))]
    trainer = make_trainer(tmp_path, rows=rows, method_args={"label_smoothing": 0.1, "center": 0.05})
    head = value_head(trainer.model)
    model = trainer.model
    w, l = (plain_outputs(model, head, rows, name)[:, 0] for name in ("chosen", "rejected"))  # noqa: E741
    h = w - l - torch.tensor([row["margin"] for row in rows])
    each = 0.9 * torch.log1p(torch.exp(-h)) + 0.1 * torch.log1p(torch.exp(h)) + 0.05 * (w + l) ** 2
    gradient = torch.autograd.grad(each.mean(), [head.weight, model.model.layers[0].mlp.up_proj.weight])
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(each.detach().mean()), rel=1e-5)
    assert log(trainer, "rewards/margins")[0] == pytest.approx(float((w - l).detach().mean()), rel=1e-4)
    torch.testing.assert_close(kept.found["value_head.weight"], gradient[0], rtol=1e-4, atol=1e-6)
    found = kept.found["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found, gradient[1], rtol=1e-4, atol=1e-6)


def test_the_loss_begins_at_ln_2(tmp_path):
    trainer = make_trainer(tmp_path, rows=make_rows(16), per_device_train_batch_size=16)
    trainer.train()
    assert log(trainer)[0] == pytest.approx(math.log(2), abs=0.02)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_value_head_has_a_learning_rate_of_its_own(tmp_path, adapter):
    def moved(rate):
        trainer = make_trainer(
            tmp_path,
            value_head_learning_rate=rate,
            learning_rate=1e-3,
            max_steps=2,
            optim="sgd",
            peft_config=lora() if adapter else None,
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        groups = trainer.optimizer.optimizer.param_groups
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
            id(p) for p in trainer.model.parameters() if p.requires_grad
        )
        after = dict(trainer.model.named_parameters())
        return {n: after[n].detach() - x for n, x in before.items()}

    alike, still = moved(None), moved(0.0)
    assert any("value_head" in name for name in alike)
    for name, change in still.items():
        if "value_head" in name:
            assert not change.any()
        elif not adapter:  # an adapter's first step is B's alone
            assert change.any(), name
    assert all(x.any() for n, x in alike.items() if "value_head.weight" in n)


# Not ODIN, whose correlations are those of a micro-batch.
@pytest.mark.parametrize("method", ["k_wise", "regression", "preference_model", "haf"])
def test_micro_batches_of_a_step_are_one_batch(tmp_path, method):
    found = []
    for size, steps in ((6, 1), (4, 2)):  # 4 + 2
        trainer = make_trainer(
            tmp_path,
            method,
            rows=rows_for(method, 6),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        kept = Gradients()
        trainer.add_callback(kept)
        trainer.train()
        found.append((log(trainer)[0], kept.found))
    (loss, one), (loss_of_parts, parts) = found
    assert loss == pytest.approx(loss_of_parts, rel=1e-5) and one.keys() == parts.keys()
    largest = max(x.abs().max() for x in one.values())  # the head's bias has none from differences
    for name in one:
        assert (one[name] - parts[name]).abs().max() <= 1e-5 * largest, name


# Whether an adapter or all of the model learns is no matter of the method: by turns, and Bradley and Terry's by both.
@pytest.mark.parametrize(
    ("method", "adapter"),
    sorted({*((m, k % 2 == 0) for k, m in enumerate(sorted(USES))), ("bradley_terry", False), ("bradley_terry", True)}),
)
def test_every_method_learns_its_rows_and_is_saved(tmp_path, home, method, adapter):
    model, _ = load_model(str(home))
    rows = rows_for(method)
    trainer = make_trainer(
        tmp_path,
        method,
        model=model,
        rows=rows,
        eval_rows=rows,
        max_steps=16,
        learning_rate=2e-2 if adapter else 5e-3,
        peft_config=lora() if adapter else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # Nothing is below the entropy of prob = 0.8; ODIN takes its correlations from the loss.
    least = {"preference_model": 0.5004, "odin": -1.0}.get(method, 0.0)
    assert before["eval_loss"] > after["eval_loss"] > least
    assert after["eval_loss"] < 0.85 * before["eval_loss"] or method == "odin"
    trainer.save_model()
    here, there = trainer.reward_model(), RewardModel.load(tmp_path / "out")
    assert there.spec == here.spec == RewardSpec(method=method, objectives=trainer.spec.objectives)
    prompts, a, b = ["w1 w2", "w3"], [" w4 w5", " w6"], [" w7", " w8 w9 w10"]
    torch.testing.assert_close(here.compare(prompts, a, b), there.compare(prompts, a, b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.compare(prompts, a, b), 1 - there.compare(prompts, b, a))
    if method == "preference_model":
        with pytest.raises(ValueError, match=r"use compare\(\)"):
            there.score(prompts, a)


def test_two_ranked_completions_are_a_pair(tmp_path):
    rows = make_rows(4)
    lists = [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [0.0, 5.0]} for r in rows]
    pair = make_trainer(tmp_path, rows=rows)
    ranked = make_trainer(tmp_path, "k_wise", rows=lists)
    pair.train()
    ranked.train()
    assert log(ranked)[0] == pytest.approx(log(pair)[0], rel=1e-5)


def test_the_gate_alone_is_learned_for_rewards_that_are_there(tmp_path):
    first = make_trainer(tmp_path, "regression", max_steps=3)
    first.train()
    first.save_model()
    model = first.model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    second = make_trainer(tmp_path, "gated", model=model, max_steps=3)
    gate = value_head(model).weight[2:]
    assert value_head(model).outputs == 4 and not gate.any()  # it weighs them alike
    start = second.reward_model().score(["w1 w2"], [" w3"])
    mean = (before["value_head.weight"] @ model.model(text_ids("w1 w2", " w3")).last_hidden_state[0, -1]).mean()
    assert float(start) == pytest.approx(float(mean + before["value_head.bias"].mean()), rel=1e-4)
    second.train()
    after = model.state_dict()
    for name in set(before) - {"value_head.weight", "value_head.bias"}:
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(before["value_head.weight"], after["value_head.weight"][:2]) and gate.any()
    with pytest.raises(ValueError, match="weight_decay would shrink"):
        make_trainer(tmp_path, "gated", model=first.model, weight_decay=0.1)


def test_the_gate_sees_the_prompt_alone(tmp_path):
    trainer = make_trainer(tmp_path, "gated", max_steps=2)
    trainer.train()
    outputs = trainer.reward_model().outputs(["w1 w2"] * 2, [" w3", " w4 w5"])
    torch.testing.assert_close(outputs[0, 2:], outputs[1, 2:])
    assert not torch.allclose(outputs[0, :2], outputs[1, :2])


def test_grm_freezes_the_language_model_head_and_haf_trains_it(tmp_path):
    for method in ("grm", "haf"):
        model = make_model(tie_word_embeddings=False)
        trainer = make_trainer(tmp_path, method, model=model)
        before = model.lm_head.weight.clone()
        trainer.train()
        assert torch.equal(model.lm_head.weight, before) == (method == "grm")
        if method == "haf":  # policy = reference at the start
            assert log(trainer, "policy_loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_grm_regularises_by_the_log_prob_of_the_chosen(tmp_path):
    rows = rows_for("grm", 4)
    trainer = make_trainer(tmp_path, "grm", rows=rows, method_args={"alpha": 0.3, "beta": 0.2})
    model, head = trainer.model, value_head(trainer.model)
    w, l = (plain_outputs(model, head, rows, name)[:, 0] for name in ("chosen", "rejected"))  # noqa: E741
    logps = []
    for row in rows:
        ids = text_ids(row["prompt"], row["chosen"])
        start = len(row["prompt"].split())
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :]
        logps.append(logp.sum())
    softplus = torch.nn.functional.softplus
    expected = 0.7 * softplus(l - w) + 0.3 * softplus(-0.2 * torch.stack(logps))
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(expected.detach().mean()), rel=1e-5)


def test_odin_of_the_batch(tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(tmp_path, "odin", rows=rows, method_args={"lambda_length": 0.5})
    model, head = trainer.model, value_head(trainer.model)
    w, l = (plain_outputs(model, head, rows, name) for name in ("chosen", "rejected"))  # noqa: E741
    sizes = {n: torch.tensor([len(row[n].split()) + 1 for row in rows]) for n in ("chosen", "rejected")}
    expected = odin(
        quality_w=w[:, 0],
        quality_l=l[:, 0],
        length_w=w[:, 1],
        length_l=l[:, 1],
        len_w=sizes["chosen"],
        len_l=sizes["rejected"],
        weight_quality=head.weight[0],
        weight_length=head.weight[1],
        lambda_length=0.5,
    )
    trainer.train()
    assert log(trainer)[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    score = trainer.reward_model().score([rows[0]["prompt"]], [rows[0]["chosen"]])
    quality = plain_outputs(model, head, rows[:1])[0, 0]
    assert float(score) == pytest.approx(float(quality.detach()), rel=1e-4)


def _on_two_ranks(folder: Path, rank: int) -> dict:
    return {method: one_step(folder / method, method, 3, ddp_backend="gloo") for method in ON_TWO_RANKS}


ON_TWO_RANKS = ("bradley_terry", "k_wise", "haf")


def one_step(folder, method: str, batch: int, **args) -> tuple[float, float, dict]:
    rows = rows_for(method, 5)  # in batches of 3 on two ranks, the last is filled up with a row that must not count
    trainer = make_trainer(
        folder, method, rows=rows, eval_rows=rows_for(method, 5, 1), per_device_train_batch_size=batch, **args
    )
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    gradients = {name.removeprefix("module."): x for name, x in kept.found.items()}
    return log(trainer)[0], trainer.evaluate()["eval_loss"], gradients


def test_two_processes_equal_one(tmp_path):
    found = run_world(tmp_path / "two", 2, partial(_on_two_ranks, tmp_path))[0]
    for method in ON_TWO_RANKS:
        loss, eval_loss, want = one_step(tmp_path / "alone", method, 5)
        assert found[method][:2] == pytest.approx((loss, eval_loss), rel=1e-5)
        largest = max(x.abs().max() for x in want.values())
        for name in want:
            assert (want[name] - found[method][2][name]).abs().max() <= 1e-5 * largest, name


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_resume(tmp_path, adapter):
    def run(folder, steps, resume=None):
        trainer = make_trainer(
            folder,
            rows=rows_for("haf", 12),
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            method="haf",
            lr_scheduler_type="constant",
            peft_config=lora() if adapter else None,
            train_sampling_strategy="random",
            value_head_learning_rate=3e-2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, str(tmp_path / "parts" / "out" / "checkpoint-2"))
    assert any("value_head" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=0)
    if not adapter:  # a checkpoint is a reward model, and a causal LM
        assert RewardModel.load(tmp_path / "parts" / "out" / "checkpoint-2").spec.method == "haf"
        load_model(str(tmp_path / "parts" / "out" / "checkpoint-2"))


def test_training_goes_on_from_a_reward_model(tmp_path):
    first = make_trainer(tmp_path, max_steps=3)
    first.train()
    first.save_model()
    head = value_head(first.model).weight.clone()
    second = make_trainer(tmp_path, model=str(tmp_path / "out"))
    assert torch.equal(value_head(second.model).weight, head)


# --- scoring ------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch_and_obey_the_length_rule(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = make_rows(7, seed=5)
    prompts, completions = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    expected = plain_outputs(trainer.model, value_head(trainer.model), rows)[:, 0].detach()
    args = (trainer.model, make_tokenizer())
    for size in (1, 3, 7):
        torch.testing.assert_close(RewardModel(*args, batch_size=size).score(prompts, completions), expected)
    reward = RewardModel(*args)
    assert reward(prompts=prompts, completions=completions, label=[0] * 7) == pytest.approx(expected.tolist(), rel=1e-5)
    lengths = torch.tensor([len(c.split()) + 1.0 for c in completions])
    normalised = RewardModel(*args, RewardSpec(length_alpha=3)).score(prompts, completions)
    torch.testing.assert_close(normalised, expected / (3 + lengths))
    punished = RewardModel(*args, RewardSpec(length_target=4, length_lam=0.5)).score(prompts, completions)
    torch.testing.assert_close(punished, expected - 0.5 * (lengths - 4).abs())
    assert reward.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="a completion for each of 7 prompts, got 1"):
        reward.score(prompts, completions[:1])
    both = RewardEnsemble([RewardModel(*args), RewardModel(*args, RewardSpec(length_alpha=3))], "worst")
    torch.testing.assert_close(both.score(prompts, completions), torch.minimum(expected, normalised))
    both.standardise(prompts, completions)
    of_one_scale = torch.minimum(*((x - x.mean()) / x.std() for x in (expected, normalised)))
    torch.testing.assert_close(both.score(prompts, completions), of_one_scale, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="every member gives different rewards, got 1"):
        both.standardise(prompts[:1], completions[:1])


def test_an_adapter_in_bfloat16_scores_as_it_was_trained(tmp_path):
    """Merged into weights of 8 bits of mantissa it would not."""
    make_model().bfloat16().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base, tokenizer = load_model(str(tmp_path / "base"), dtype="bfloat16")
    model = peft.get_peft_model(base, lora(target_modules="all-linear")).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    attach_value_head(model, std=1.0)
    trained = RewardModel(model, tokenizer)
    trained.save(tmp_path / "reward")
    rows = make_rows(5)
    prompts, completions = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    found = RewardModel.load(tmp_path / "reward", dtype="bfloat16").score(prompts, completions)
    torch.testing.assert_close(found, trained.score(prompts, completions), rtol=0, atol=0)


def test_a_critics_value_head_is_not_gone_on_with(tmp_path):
    model = make_model()
    critic = attach_value_head(model, std=1.0)
    model.save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    save_value_head(model, tmp_path / "policy")
    trainer = make_trainer(tmp_path, model=str(tmp_path / "policy"))
    assert not torch.equal(value_head(trainer.model).weight, critic.weight)
    trainer.reward_model().save(tmp_path / "reward")
    again = make_trainer(tmp_path, model=str(tmp_path / "reward"))
    assert torch.equal(value_head(again.model).weight, value_head(trainer.model).weight)


def test_soft_labels(tmp_path):
    """−p log σ(h) − (1−p) log σ(−h), h the difference of rewards."""
    rows = [{**row, "prob": 0.3} for row in rows_for("bradley_terry", 4)]
    trainer = make_trainer(tmp_path, rows=rows)
    rewards = [plain_outputs(trainer.model, value_head(trainer.model), rows, n)[:, 0] for n in ("chosen", "rejected")]
    h = rewards[0] - rewards[1]
    expected = -(0.3 * h.sigmoid().log() + 0.7 * (-h).sigmoid().log()).mean()
    trainer.train()
    assert log(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_which_scores_are_logits():
    assert RewardSpec().is_logit and RewardSpec("grm").is_logit
    assert not RewardSpec("regression").is_logit
    assert not RewardSpec(length_alpha=3.0).is_logit and not RewardSpec(length_lam=0.1).is_logit


def test_conversations(tmp_path):
    trainer = make_trainer(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    reward = RewardModel(trainer.model, tokenizer)
    prompt = [{"role": "user", "content": "w1 w2"}]
    as_messages = reward.score([prompt], [[{"role": "assistant", "content": "w3"}]])
    torch.testing.assert_close(as_messages, reward.score([prompt], ["w3"]))
    torch.testing.assert_close(as_messages, reward.score(["w1 w2"], [" w3"]))


def test_sequence_classifiers_are_reward_models(tmp_path):
    torch.manual_seed(0)
    config = make_model().config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    make_tokenizer(pad=None).save_pretrained(tmp_path)
    reward = RewardModel.load(tmp_path)
    rows = make_rows(5)
    found = reward.score([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    alone = [model(text_ids(r["prompt"], r["chosen"])).logits[0, 0] for r in rows]
    torch.testing.assert_close(found, torch.stack(alone).detach())
    assert reward.model.config.pad_token_id is None


def test_implicit_reward():
    policy, reference = make_model(0), make_model(1)
    rows = make_rows(3)
    prompts, completions = [r["prompt"] for r in rows], [r["chosen"] for r in rows]

    def logp(model, row):
        ids = text_ids(row["prompt"], row["chosen"])
        each = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return each[len(row["prompt"].split()) - 1 :].sum()

    expected = torch.stack([0.3 * (logp(policy, r) - logp(reference, r)) for r in rows]).detach()
    found = ImplicitReward(policy, reference, make_tokenizer(), beta=0.3).score(prompts, completions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([len(c.split()) + 1.0 for c in completions])
    alone = torch.stack([logp(policy, r) for r in rows]).detach()
    free = ImplicitReward(policy, None, make_tokenizer(), beta=2.0, per_token=True)
    torch.testing.assert_close(free.score(prompts, completions), 2 * alone / lengths, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="beta must be positive"):
        ImplicitReward(policy, None, make_tokenizer(), beta=0)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("regression", {"safe": ...},
         r"rows\[1\]: safe missing; expected prompt, completion and the numbers helpful, safe"),
        ("regression", {"safe": "good"}, r"rows\[1\]: safe must be a finite number or null; got 'good'"),
        ("regression", {"helpful": None, "safe": None}, r"rows\[1\]: helpful, safe are null"),
        ("discriminator", {"label": ...}, "label"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_from(tmp_path, method, change, message):
    rows = rows_for(method, 3)
    rows[1] = {k: v for k, v in {**rows[1], **change}.items() if v is not ...}
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, method, rows=rows)


def test_haf_without_a_reference(tmp_path):
    with pytest.raises(ValueError, match="haf compares the policy with a reference"):
        make_trainer(tmp_path, "haf", reference="none")


def test_settings_that_do_not_fit(tmp_path):
    for method, args, message in (
        ("dpo", {}, "method"),
        ("bradley_terry", {"method_args": {"beta": 1}}, "bradley_terry has no hyperparameter beta"),
        ("odin", {"method_args": {"lam": 1}}, "odin has no hyperparameter lam; it has lambda_length"),
        ("bradley_terry", {"objectives": ["a", "b"]}, "bradley_terry has one reward"),
        ("regression", {"objective_weights": [1.0]}, "a weight for each of 2 objectives, got 1"),
        ("haf", {"reference": "cached"}, "reference"),
        ("haf", {"tile_mib": 1.0}, "tile_mib has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, method, rows=make_rows(4), **args)


def test_folders_that_are_no_reward_models(tmp_path, home):
    with pytest.raises(ValueError, match=r"it holds .*LlamaForCausalLM"):
        RewardModel.load(home)
    with pytest.raises(ValueError, match="has no value head"):
        RewardModel(make_model(), make_tokenizer())
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    path = tmp_path / "out" / "reward_model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": 1}))
    with pytest.raises(ValueError, match="unknown colour; it was written by another version"):
        RewardModel.load(tmp_path / "out")
