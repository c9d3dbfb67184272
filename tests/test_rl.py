"""Online RL: gradients against the textbook's on materialised logits, what is left out, and what a run learns.

The model is a random Llama of two layers in float32, and rewards are functions of the completion's ids.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

import xpo_fast as xf
from test_trainer import Gradients, assert_same_gradients, lora, make_model, make_tokenizer
from xpo_fast.methods.advantages import advantages
from xpo_fast.rewards import RewardError
from xpo_fast.rewards.judges import Judge, win_rate
from xpo_fast.rl import RLTrainer, last_checkpoint
from xpo_fast.rl.config import RLConfig
from xpo_fast.rl.experience import Batches
from xpo_fast.rl.sample_log import table
from xpo_fast.rollout import GenerateRollout
from xpo_fast.trainer import Means

PEFT_WARNING = ".is_gradient_checkpointing. is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

PROMPTS = [{"prompt": text} for text in ("w1 w2", "w3", "w4 w5 w6", "w7 w8")]
METHODS = sorted(name for name, m in xf.METHODS.items() if "token_logp" in m.inputs and not m.reads_teacher)
NEW, TEMPERATURE = 5, 0.7


def share_of_even(completion_ids, **_):
    """In [0, 1]: the share of tokens with an even id."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def with_holes(completion_ids, **_):
    """The same, but no reward for the second of every four, and one for all of the second prompt."""
    rewards = share_of_even(completion_ids)
    rewards = [math.nan if i % 4 == 1 else r for i, r in enumerate(rewards)]
    return rewards[:4] + [0.25] * 4 + rewards[8:]


class Recorded:
    """A rollout that keeps what it has sampled; shift: added to the log-probs it says it sampled with."""

    def __init__(self, model, tokenizer, shift: float | None = None) -> None:
        self.inner, self.samples, self.shift = GenerateRollout(model, tokenizer), [], shift

    def update(self, model) -> None:
        self.inner.update(model)

    def generate(self, prompts, n=1, *, sampling, seed):
        found = self.inner.generate(prompts, n, sampling=sampling, seed=seed)
        if self.shift is None:
            found.logps = None
        else:
            found.logps = [[x + self.shift for x in row] for row in found.logps]
        self.samples.append(found)
        return found


def make_trainer(
    tmp_path: Path, rewards=share_of_even, *, model=None, prompts=PROMPTS, shift=None, **args
) -> RLTrainer:
    more = {name: args.pop(name) for name in ("eval_dataset", "peft_config", "ptx_dataset") if name in args}
    defaults = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4,
        "max_new_tokens": NEW, "temperature": TEMPERATURE, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "max_steps": 1, "logging_steps": 1, "max_grad_norm": 0.0, "seed": 3,
    }  # fmt: skip
    model = make_model() if model is None else model
    tokenizer = make_tokenizer()
    return RLTrainer(
        model, rewards, RLConfig(**{**defaults, **args}), train_dataset=prompts, processing_class=tokenizer,
        rollout=Recorded(model, tokenizer, shift), **more,
    )  # fmt: skip


def step(trainer: RLTrainer) -> tuple[dict, dict[str, torch.Tensor]]:
    """The first log and the gradients of the first step."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer.state.log_history[0], gradients.found


def token_logps(model, samples, temperature=TEMPERATURE):
    """Of every completion (T,), from logits, with a graph; and the hidden states before each of its tokens (T, D)."""
    found = []
    for prompt, ids in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        out = model(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True)
        at = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
        logp = (out.logits[0, at] / temperature).log_softmax(-1)
        found.append((logp[range(len(ids)), ids], out.hidden_states[-1][0, at]))
    return found


def group_advantages(rewards, how):
    """By hand, groups of four; None for a row without a reward."""
    found = []
    for k in range(0, len(rewards), 4):
        known = [r for r in rewards[k : k + 4] if not math.isnan(r)]
        mean, n = sum(known) / len(known), len(known)
        std = math.sqrt(sum((r - mean) ** 2 for r in known) / (n - 1))
        for r in rewards[k : k + 4]:
            if math.isnan(r):
                found.append(None)
            elif how == "leave_one_out":
                found.append(r - (sum(known) - r) / (n - 1))
            elif how == "batch_mean":
                every = [x for x in rewards if not math.isnan(x)]
                found.append(r - sum(every) / len(every))
            else:
                found.append((r - mean) / (std + 1e-4) if how == "group" else r - mean)
    return found


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("grpo", "group"),
        ("dr_grpo", "group_mean"),
        ("dapo", "group"),
        ("rloo", "leave_one_out"),
        ("reinforce", "batch_mean"),
    ],
)
def test_first_step_is_the_textbook_gradient(tmp_path, method, how):
    """−Σ A ∇log π over what the method's mean divides by, with rows without reward left out of it; and a dull group."""
    args = {"max_draws": 1, "overlong": "keep"}
    trainer = make_trainer(
        tmp_path, with_holes, method=method, prompts_per_rollout=4, gradient_accumulation_steps=4, **args
    )
    reference = make_model()
    log, got = step(trainer)
    (samples,) = trainer.rollout.samples
    each = group_advantages(with_holes(samples.completion_ids), how)
    rows = [(a, logp) for a, (logp, _) in zip(each, token_logps(reference, samples), strict=True) if a is not None]
    tokens = sum(len(logp) for _, logp in rows)
    assert any(a == 0 for a, _ in rows) or method == "reinforce"
    divide = {
        "grpo": lambda logp: len(rows) * len(logp),
        "dr_grpo": lambda logp: len(rows) * NEW,
        "dapo": lambda logp: tokens,
        "rloo": lambda logp: len(rows),
        "reinforce": lambda logp: tokens,
    }[method]
    sum(-(a * logp / divide(logp)).sum() for a, logp in rows).backward()
    want = {n: p.grad for n, p in reference.named_parameters()}
    assert_same_gradients(want, got, rtol=1e-5)
    assert log["unrewarded"] == pytest.approx(3 / 16)
    assert log["groups/dropped"] == (0 if method == "reinforce" else 0.25)


def test_rows_without_advantage_are_spared_and_change_nothing(tmp_path, monkeypatch):
    args = {"prompts_per_rollout": 4, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, with_holes, **args)
    _, spared = step(trainer)
    monkeypatch.setattr(RLTrainer, "_spares", False)
    other = make_trainer(tmp_path, with_holes, **args)
    _, whole = step(other)
    assert_same_gradients(whole, spared, rtol=1e-5)


def test_all_equal_groups_reach_no_forward(tmp_path):
    trainer = make_trainer(tmp_path, lambda completions, **_: [1.0] * len(completions))
    before = [p.clone() for p in trainer.model.parameters()]
    shapes = []
    inner = trainer.training_step
    trainer.training_step = lambda model, inputs, items: (
        shapes.append((tuple(inputs["input_ids"].shape), int((inputs["targets"] >= 0).sum())))
        or inner(model, inputs, items)
    )
    log, gradients = step(trainer)
    assert shapes == [((1, 1), 0)] * 2  # a token that nothing is learned from
    assert log["groups/dropped"] == 1 and log["frac_reward_zero_std"] == 1 and log["loss"] == 0
    assert all(not g.any() for g in gradients.values())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_ppo_is_the_surrogate_and_the_critics_loss_from_one_forward(tmp_path):
    """GAE by the recursion, token by token, the divergence from the reference in its rewards, and ½(V − R)²."""
    kl_coef, gamma, lam, vf_coef = 0.2, 0.9, 0.8, 0.5
    trainer = make_trainer(
        tmp_path, method="ppo", kl_coef=kl_coef, gamma=gamma, lam=lam, vf_coef=vf_coef, whiten_advantages=False,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        trainer.critic.weight.normal_(std=0.1)
        for p in trainer.model.parameters():
            p *= 0.9
    policy = make_model()
    policy.load_state_dict({n: x.clone() for n, x in trainer.model.state_dict().items() if "value_head" not in n})
    critic = [p.detach().clone().requires_grad_() for p in (trainer.critic.weight, trainer.critic.bias)]
    log, got = step(trainer)
    (samples,) = trainer.rollout.samples
    rewards = share_of_even(samples.completion_ids)
    with torch.no_grad():
        reference = [logp for logp, _ in token_logps(make_model(), samples)]
    loss = kl = 0.0
    count = sum(map(len, samples.completion_ids))
    for reward, ref, (logp, hidden) in zip(rewards, reference, token_logps(policy, samples), strict=True):
        value = (hidden @ critic[0].T + critic[1])[:, 0]
        v = [*value.tolist(), 0.0]
        gained = [-kl_coef * float(a - b) for a, b in zip(logp.detach(), ref, strict=True)]
        kl += sum(-x / kl_coef for x in gained) / len(rewards)
        gained[-1] += reward
        a, advantage = 0.0, []
        for t in reversed(range(len(gained))):
            a = gained[t] + gamma * v[t + 1] - v[t] + gamma * lam * a
            advantage.insert(0, a)
        advantage = torch.tensor(advantage)
        returns = advantage + value.detach()
        loss = loss + (-advantage * logp + vf_coef * 0.5 * (value - returns) ** 2).sum() / count
    loss.backward()
    want = {n: p.grad for n, p in policy.named_parameters()}
    want |= {"value_head.weight": critic[0].grad, "value_head.bias": critic[1].grad}
    assert_same_gradients(want, got, rtol=1e-5)
    assert log["objective/kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.01


def test_importance_weights_are_truncated(tmp_path):
    """A sampler that thinks its tokens e^0.5 less likely: each weighs e^0.5, and no more than the cap."""
    one = step(make_trainer(tmp_path, shift=0.0, temperature=1.0))[1]
    for cap, factor in ((2.0, math.exp(0.5)), (1.25, 1.25)):
        log, got = step(make_trainer(tmp_path, shift=-0.5, temperature=1.0, off_policy_cap=cap))
        assert log["off_policy/weight"] == pytest.approx(factor, rel=1e-4)
        assert_same_gradients({n: factor * g for n, g in one.items()}, got, rtol=1e-4)
    log, _ = step(make_trainer(tmp_path, shift=-0.1, temperature=1.0, method="gspo", off_policy_cap=100.0))
    assert 1.1 < log["off_policy/weight"] <= math.exp(0.1 * NEW) + 1e-4  # of whole completions
    none = step(make_trainer(tmp_path, shift=-0.5, temperature=1.0, off_policy="none"))[1]
    assert_same_gradients(one, none, rtol=1e-4)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_policy_method_runs(tmp_path, method):
    """Two rollouts, two epochs over two minibatches of each where the method can leave its policy; all is finite."""
    on_policy = "old_logp" not in xf.METHODS[method].inputs
    args = {} if on_policy else {"epochs_per_rollout": 2, "prompts_per_rollout": 4, "max_steps": 8}
    texts = ["w1 w2 w3", "w9 w8"] if method == "ppo_ptx" else None
    trainer = make_trainer(tmp_path, method=method, **{"max_steps": 2, **args}, ptx_dataset=texts)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert trainer.progress.rollouts == 2 and len(logs) == trainer.args.max_steps
    for log in logs:
        assert all(math.isfinite(x) for x in log.values() if isinstance(x, float)), log
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    if not on_policy and method != "rloo":
        assert logs[1]["ratio"] != 1


@pytest.mark.parametrize("method", ["grpo", "ppo", "rloo"])
def test_a_learnable_reward_rises(tmp_path, method):
    trainer = make_trainer(
        tmp_path, method=method, learning_rate=5e-3, max_steps=25, prompts_per_rollout=4, gradient_accumulation_steps=4,
        eval_dataset=PROMPTS, eval_generations=16, temperature=1.0, max_grad_norm=1.0, kl_coef=0.0,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_reward"] < 0.65 and after["eval_reward"] > 0.9
    assert after["eval_rewards/share_of_even/mean"] == after["eval_reward"]


def test_every_row_once_an_epoch(tmp_path, monkeypatch):
    """Two minibatches an epoch, two epochs: each completion once an epoch, in another order."""
    seen = []

    inner = Batches.batch

    def watched(self, experience, rows, first_text):
        seen.append([] if rows is None else rows.tolist())
        return inner(self, experience, rows, first_text)

    monkeypatch.setattr(Batches, "batch", watched)
    trainer = make_trainer(tmp_path, prompts_per_rollout=4, epochs_per_rollout=2, max_steps=4, method="grpo")
    trainer.train()
    first, second = [i for rows in seen[:4] for i in rows], [i for rows in seen[4:] for i in rows]
    assert len(seen) == 8 and all(len(rows) <= 4 for rows in seen)
    assert sorted(first) == sorted(second) and len(set(first)) == len(first) and first != second


def test_dynamic_sampling_draws_until_the_groups_tell(tmp_path):
    """Prompts marked dull have one reward for all; drawn again until four of the other kind are there."""
    prompts = [{"prompt": f"w{i}", "dull": i % 2 == 0} for i in range(8)]

    def reward(completion_ids, dull, **_):
        return [0.5 if d else share_of_even([ids])[0] for d, ids in zip(dull, completion_ids, strict=True)]

    args = {"prompts": prompts, "prompts_per_rollout": 2, "max_draws": 6}
    trainer = make_trainer(tmp_path, reward, **args)
    log, _ = step(trainer)
    assert log["draws"] > 1 and log["groups/dropped"] == 0 and log["frac_reward_zero_std"] > 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == log["draws"] * 8 and sum(line["trained"] for line in lines) >= 4
    dull = make_trainer(tmp_path, lambda completions, **_: [0.5] * len(completions), **{**args, "max_draws": 3})
    log, _ = step(dull)
    assert log["draws"] == 3 and log["groups/dropped"] == 1  # and the run goes on


def test_truncated_completions(tmp_path):
    """The random model hardly ever ends: with NEW tokens most are cut."""

    def trained(trainer):
        step(trainer)
        lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    for line in trained(make_trainer(tmp_path, max_new_tokens=12, overlong="mask")):
        assert not (line["truncated"] and line["trained"])
    plain = trained(make_trainer(tmp_path, max_new_tokens=12))
    assert {line["truncated"] for line in plain} == {True, False}
    punished = trained(
        make_trainer(tmp_path, max_new_tokens=12, overlong="penalty", overlong_buffer=8, missing_eos_penalty=0.5)
    )
    for a, b in zip(plain, punished, strict=True):
        soft = 1.0 if a["truncated"] else max(0.0, (a["tokens"] - 4) / 8)
        assert b["reward"] == pytest.approx(a["reward"] - soft - 0.5 * a["truncated"])


def test_no_reward_at_all_is_said(tmp_path):
    trainer = make_trainer(tmp_path, lambda completions, **_: [math.nan] * len(completions))
    with pytest.raises(ValueError, match=r"no completion of rollout 0 has a reward: .*lambda"):
        trainer.train()


def test_a_raising_reward_leaves_a_checkpoint_to_go_on_from(tmp_path):
    calls = []

    def fails(completion_ids, **_):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return share_of_even(completion_ids)

    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    trainer = make_trainer(tmp_path, fails, **args)
    with pytest.raises(RewardError, match=r"fails.*no more"):
        trainer.train()
    folder = last_checkpoint(tmp_path / "out")
    assert folder is not None and folder.endswith("checkpoint-2")

    def mended(completion_ids, **_):
        return share_of_even(completion_ids)

    mended.__name__ = "fails"
    resumed = make_trainer(tmp_path, mended, **args)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **args)
    whole.train()
    a, b = (t.state.log_history[-2] for t in (resumed, whole))
    assert a["loss"] == b["loss"] and a["reward"] == b["reward"]


def test_lora_has_its_base_model_as_the_reference(tmp_path):
    trainer = make_trainer(
        tmp_path, method="ppo", peft_config=lora(), max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=1
    )
    assert trainer.reference == "adapter"
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["objective/kl"] == 0 and second["objective/kl"] != 0
    saved = {path.name for path in Path(last_checkpoint(tmp_path / "out")).iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors", "rl_state.pt"} <= saved
    assert "model.safetensors" not in saved


def test_kl_is_steered(tmp_path):
    """Far above the target the coefficient grows by 20% of completions/horizon a rollout, far below it shrinks."""

    def coefficient(**args):
        trainer = make_trainer(tmp_path, max_steps=1, kl_horizon=16, **args)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p *= 0.9
        trainer.train()
        return trainer

    rows = 8
    assert coefficient(kl_coef=0.1, kl_target=1e-6).progress.kl_coef == pytest.approx(0.1 * (1 + 0.2 * rows / 16))
    assert coefficient(kl_coef=0.1, kl_target=1e6).progress.kl_coef == pytest.approx(0.1 * (1 - 0.2 * rows / 16))
    beta = coefficient(method_args={"beta": 0.1}, kl_target=1e-6).objective.hyperparameters["beta"]
    assert beta == pytest.approx(0.1 * (1 + 0.2 * rows / 16))
    args = {"method": "ppo_penalty", "epochs_per_rollout": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, kl_target=1e-9, **args)
    trainer.train()
    assert trainer.objective.hyperparameters["beta"] == 0.2  # doubled


def test_the_reference_follows_the_policy(tmp_path):
    trainer = make_trainer(tmp_path, kl_coef=0.1, ref_mixin=0.25, max_steps=1)
    start = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.moving_reference.copy.named_parameters():
        policy = dict(trainer.model.named_parameters())[name]
        torch.testing.assert_close(p, 0.75 * start[name] + 0.25 * policy)


def test_evaluating_changes_nothing(tmp_path):
    """Held-out prompts are sampled by a seed of their own: the run is the one that never looked."""
    args = {"max_steps": 3, "eval_dataset": PROMPTS}
    looked = make_trainer(tmp_path, **args, eval_strategy="steps", eval_steps=1)
    looked.train()
    other = make_trainer(tmp_path, **args)
    other.train()
    for a, b in zip(looked.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    found = [log["eval_reward"] for log in looked.state.log_history if "eval_reward" in log]
    assert len(found) == 3 and other.evaluate()["eval_reward"] == found[-1]


def test_a_comparing_judge_rewards_by_win_rates(tmp_path):
    class Longer(Judge):
        def compare(self, prompts, first, second, **columns):
            assert len(columns["tag"]) == len(prompts)
            return torch.tensor([float(len(a) > len(b)) for a, b in zip(first, second, strict=True)])

    reward = win_rate(Longer())
    tags = ["a"] * 3 + ["b"]
    assert reward(prompts=["p"] * 3 + ["q"], completions=["xxx", "x", "xx", "x"], tag=tags) == [1, 0, 0.5, 0.5]
    # Two equal prompts of a rollout are two.
    twice = {"prompts": ["p"] * 4, "completions": ["xxx", "x", "xxxx", "xx"], "tag": ["a"] * 4}
    assert reward(**twice, prompt_index=[0, 0, 1, 1]) == [1, 0, 1, 0]
    prompts = [{"prompt": "w1 w2", "tag": "a"}] * 4
    log, _ = step(make_trainer(tmp_path, reward, prompts=prompts, method="nash_md"))
    told = []

    def index(prompt_index, **_):
        told.append(prompt_index)
        return [0.0, 1.0] * (len(prompt_index) // 2)

    step(make_trainer(tmp_path, index, prompts=prompts))
    assert told == [[0] * 4 + [1] * 4]
    assert log["reward"] == pytest.approx(0.5, abs=0.2) and log["rewards/win_rate/mean"] == log["reward"]


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["every weight", "lora"])
def test_a_critic_may_have_a_learning_rate_of_its_own(tmp_path, peft_config):
    args = {
        "method": "ppo", "peft_config": peft_config, "learning_rate": 1e-3, "value_head_learning_rate": 2e-2,
        "weight_decay": 0.1, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 1, "max_steps": 2,
    }  # fmt: skip

    def rates(trainer) -> dict[int, float]:
        groups = trainer.optimizer.param_groups
        listed = [id(p) for group in groups for p in group["params"]]
        assert len(listed) == len(set(listed))
        return {id(p): group["initial_lr"] for group in groups for p in group["params"]}

    trainer = make_trainer(tmp_path, **args)
    trainer.train()
    resumed = make_trainer(tmp_path, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for one in (trainer, resumed):
        found = rates(one)
        head = {id(p) for p in one.critic.parameters()}
        trained = {id(p) for p in one.model.parameters() if p.requires_grad}
        assert found.keys() == trained and head < trained
        assert {found[p] for p in head} == {2e-2} and {found[p] for p in trained - head} == {1e-3}
    for (name, a), b in zip(trainer.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    slow = make_trainer(tmp_path / "slow", **{**args, "value_head_learning_rate": None, "max_steps": 1})
    fast = make_trainer(tmp_path / "fast", **{**args, "lr_scheduler_type": "constant", "max_steps": 1})
    for one in (slow, fast):
        one.train()
    assert fast.critic.bias.abs().item() > 10 * slow.critic.bias.abs().item() > 0


def test_the_reference_follows_the_adapter(tmp_path):
    """The base model with the average of the adapter, and the policy as it is afterwards."""
    after = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            after.append({n: p.detach().clone() for n, p in model.named_parameters()})

    args = {"peft_config": lora(), "kl_coef": 0.1, "ref_mixin": 0.25, "learning_rate": 3e-2, "max_steps": 2}
    trainer = make_trainer(tmp_path, **args)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.add_callback(Keep())
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["objective/kl"] == 0

    policy, reference = (make_trainer(tmp_path / "other", **args).model for _ in range(2))
    policy.load_state_dict({**policy.state_dict(), **after[0]})
    moved = {n: 0.75 * start[n] + 0.25 * after[0][n] for n in start}
    reference.load_state_dict({**reference.state_dict(), **moved})
    assert any(not torch.equal(start[n], moved[n]) for n in start)
    samples = trainer.rollout.samples[1]
    with torch.no_grad():
        pairs = zip(token_logps(policy.eval(), samples), token_logps(reference.eval(), samples), strict=True)
        kl = sum(float((a - b).sum()) for (a, _), (b, _) in pairs) / len(samples)
    assert second["objective/kl"] == pytest.approx(kl, rel=1e-3) and abs(kl) > 1e-3
    for n, p in trainer.model.named_parameters():
        assert torch.equal(p, after[1][n]), n


def test_dapo_is_more_than_its_loss(tmp_path):
    """Dynamic sampling and the penalty of the last fifth come with it and can be switched off; no other has them."""

    def config(**args):
        return RLConfig(str(tmp_path), per_device_train_batch_size=8, max_new_tokens=100, **args)

    dapo = config(method="dapo")
    assert (dapo.draws, dapo.overlong_handling, dapo.penalised_tokens) == (10, "penalty", 20)
    off = config(method="dapo", max_draws=1, overlong="keep")
    assert (off.draws, off.overlong_handling) == (1, "keep")
    plain = config(method="grpo")
    assert (plain.draws, plain.overlong_handling) == (1, "keep")
    assert config(overlong="penalty", overlong_buffer=100).penalised_tokens == 100
    for args in ({"overlong_buffer": 101}, {"max_new_tokens": 5, "overlong_buffer": 64}):
        with pytest.raises(ValueError, match=r"overlong_buffer=.* is longer than the longest completion"):
            RLConfig(str(tmp_path), **{"max_new_tokens": 100, "overlong": "penalty", **args})
    dull = [{"prompt": f"w{i}", "dull": i % 2 == 0} for i in range(8)]

    def reward(completion_ids, dull, **_):
        return [0.5 if d else share_of_even([ids])[0] for d, ids in zip(dull, completion_ids, strict=True)]

    log, _ = step(make_trainer(tmp_path, reward, prompts=dull, method="dapo", prompts_per_rollout=2, overlong="keep"))
    assert log["draws"] > 1 and log["groups/dropped"] == 0


# --- the table --------------------------------------------------------------------------------------------------------


def test_samples_are_a_data_set(tmp_path):
    import datasets

    with_nothing = make_trainer(tmp_path, with_holes, prompts_per_rollout=4, gradient_accumulation_steps=4)
    with_nothing.train()
    path = tmp_path / "out" / "samples.jsonl"
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    (samples,) = with_nothing.rollout.samples
    assert rows["completion"][:] == samples.completions and rows["prompt"][:] == samples.prompts
    assert rows["tokens"][:] == [len(ids) for ids in samples.completion_ids]
    want = with_holes(samples.completion_ids)
    for x, row in zip(want, rows, strict=True):
        assert row["reward"] == (None if math.isnan(x) else pytest.approx(x)) == row["rewards"]["with_holes"]
    pandas = pytest.importorskip("pandas")
    assert pandas.read_json(path, lines=True)["completion"].tolist() == samples.completions


def test_a_table_of_samples():
    def row(reward, prompt, completion, **more):
        about = {"rollout": 3, "advantage": None, "tokens": 12, "truncated": False}
        return {**about, "reward": reward, "prompt": prompt, "completion": completion, **more}

    talk = [{"role": "user", "content": "hello"}]
    rows = [
        row(0.25, "x" * 100, "a\nb\x1b[31m", truncated=True, advantage=-0.5),
        row(None, talk, [{"role": "assistant", "content": "none"}]),
        row(1.0, "short", "y" * 100, advantage=1.5),
        row(0.5, "p", "q"),
    ]
    lines = table(rows, 3, 72).splitlines()
    assert lines[0] == "rollout 3: 3 of 4 completions, by reward"
    assert lines[1].split() == ["reward", "advantage", "tokens", "prompt", "completion"]
    assert lines[2] == "    1.000    +1.500        12 short                 " + "y" * 19 + "…"
    assert lines[3].split() == ["0.500", "–", "12", "p", "q"]
    assert lines[4].split() == ["–", "–", "12", "hello", "none"]
    assert max(map(len, lines)) <= 72
    (last,) = table(rows[:1], 5, 72).splitlines()[2:]
    assert "12… …" + "x" * 19 in last and last.endswith("a b [31m")
    assert table(rows, 1).splitlines()[2].split()[0] == "1.000"


# --- advantages, prompts, arguments -----------------------------------------------------------------------------------


def test_advantages():
    reward = torch.tensor([1.0, 3.0, math.nan, 5.0])
    valued = ~reward.isnan()
    nan, group = math.nan, 2

    def of(how, values=reward):
        return advantages(values, ~values.isnan(), how, group).tolist()

    assert of("group_mean") == [-1, 1, 0, 0]
    assert of("group") == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0, 0])
    assert of("leave_one_out") == [-2, 2, 0, 0]
    assert of("batch_mean") == [-2, 0, 0, 2]
    assert of("batch") == pytest.approx([-1, 0, 0, 1])
    assert of("reward") == [1, 3, 0, 5]
    assert of("group_mean", torch.tensor([nan, nan, 2.0, 2.0])) == [0, 0, 0, 0]
    assert valued.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"method": "dpo"}, "dpo does not learn from scored completions .*; these do: .*grpo"),
        ({"method": "ppo_value"}, "ppo_value does not learn"),
        ({"method": "reinforce", "epochs_per_rollout": 2}, "reinforce is on-policy: one step a rollout, got 2"),
        ({"method": "rloo", "advantage": "gae"}, "rloo takes one advantage a completion"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_generations": 3}, "a step of 8 completions has no whole number of prompts with 3 each"),
        ({"prompts_per_rollout": 3}, "a rollout of 3 prompts × 4 completions is not cut into whole steps of 8"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"show_samples": -1}, "show_samples must be 0 or more"),
        (
            {"value_head_learning_rate": 1e-3},
            "value_head_learning_rate is the critic's, .* grpo has advantages by 'group'",
        ),
        ({"advantage": "best"}, "advantage must be one of auto, gae"),
        ({"method_args": {"eps": -1.0}}, "eps"),
        ({"reference": "copy"}, "has no reference"),
        ({"kl_coef": 0.1, "reference": "none"}, "compares with a reference"),
        ({"kl_coef": 0.1, "reference": "adapter"}, "train with a peft_config"),
        ({"kl_target": 1.0}, "kl_target is about a reference"),
        ({"method": "ppo_ptx"}, "pass ptx_dataset="),
        ({"ptx_dataset": ["w1 w2"]}, "ptx_dataset= is for ppo_ptx"),
        (
            {"kl_coef": 0.1, "ref_mixin": 0.5, "reference": "copy", "peft_config": lora()},
            'use reference="adapter", which averages',
        ),
        ({"method": "nash_md", "off_policy": "sequence"}, "weighs advantages, and nash_md has none"),
        ({"method": "rloo", "off_policy": "token"}, "rloo takes one a completion"),
        ({"method": "ppo", "num_generations": 1, "max_draws": 2}, "num_generations must be at least 2, got 1"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, args, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, **args)


def test_the_rewards_divergence_is_the_one_whose_gradient_is_the_divergences():
    with pytest.raises(TypeError, match="kl_estimator"):
        RLConfig("out", kl_estimator="k3")


def test_a_long_prompt_is_found_before_the_run(tmp_path):
    rows = [{"prompt": "w1"}, {"prompt": "w1 " * 200}, {"prompt": "w2 " * 300}]
    args = RLConfig(str(tmp_path), use_cpu=True, num_generations=2, per_device_train_batch_size=2, max_steps=1)
    with pytest.raises(ValueError, match=r"2 of 3 prompts leave no room .* 128 positions; the first is rows\[1\], of"):
        RLTrainer(make_model(), share_of_even, args, train_dataset=rows, processing_class=make_tokenizer())


@pytest.mark.parametrize("asked", [False, True])
def test_continuous_batching_is_a_choice(tmp_path, asked):
    args = RLConfig(
        str(tmp_path), use_cpu=True, num_generations=2, per_device_train_batch_size=2, continuous_batching=asked
    )
    trainer = RLTrainer(make_model(), share_of_even, args, train_dataset=PROMPTS, processing_class=make_tokenizer())
    assert trainer.rollout.continuous is (None if asked else False)


# --- what is logged, and warned of ------------------------------------------------------------------------------------


def test_means_are_kept_by_name():
    means, one = Means(), torch.ones(())
    means.add({"a": one, "b": 2 * one}, {"a": one, "b": one})
    means.add({"b": 4 * one, "c": 5 * one}, {"b": 3 * one, "c": one})
    other = Means()
    other.load_state_dict(means.state_dict(), torch.device("cpu"), main=True)
    assert means.pop() == other.pop() == {"a": 1.0, "b": 3.5, "c": 5.0} and means.pop() == {}


def test_a_sampler_may_say_its_log_probs_of_some_rollouts(tmp_path):
    """A server whose completions come now with, now without: the metrics of their weights come and go."""
    trainer = make_trainer(tmp_path, shift=0.0, temperature=1.0, max_steps=3, logging_steps=3)
    inner, calls = trainer.rollout.generate, []

    def generate(*args, **options):
        found = inner(*args, **options)
        calls.append(1)
        found.logps = None if len(calls) == 2 else found.logps
        return found

    trainer.rollout.generate = generate
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["off_policy/weight"] == pytest.approx(1, abs=1e-4) and 0 <= log["reward"] <= 1
    assert log["draws"] == 1 and log["completions/mean_length"] > 1


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_that_has_learned_is_not_in_the_base(tmp_path, recwarn, trained):
    import peft

    model = peft.get_peft_model(make_model(), lora())
    if trained:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        with pytest.warns(UserWarning, match="its base, not the model as handed over"):
            make_trainer(tmp_path, model=model, kl_coef=0.1, reference="adapter")
    else:
        make_trainer(tmp_path, model=model, kl_coef=0.1, reference="adapter")
        assert not [w for w in recwarn if "handed over" in str(w.message)]


def test_truncated_completions_before_a_reward_model_are_said_once(tmp_path, caplog):
    class Scorer:
        __name__ = "scorer"

        def score(self, prompts, completions):
            return torch.tensor([float(len(c)) for c in completions])

        def __call__(self, prompts, completions, **_):
            return self.score(prompts, completions).tolist()

    for reward, count in ((Scorer(), 1), (share_of_even, 0)):
        caplog.clear()
        make_trainer(tmp_path, reward, max_steps=2).train()
        assert sum("with an EOS behind" in r.getMessage() for r in caplog.records) == count
