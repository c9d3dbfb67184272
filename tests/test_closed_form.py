"""The algorithms against policies that are known in closed form, see bench/closed_form.py."""

import pytest
import torch

import closed_form
from test_rl import PEFT_WARNING
from test_trainer import lora, make_model, make_tokenizer
from xpo_fast.rl import RLTrainer
from xpo_fast.rl.config import RLConfig


@pytest.mark.parametrize("name", closed_form.ALGORITHMS)
def test_converges_to_the_known_policy(name, monkeypatch):
    monkeypatch.setattr(closed_form, "LEARNING_RATE", 0.1)
    found = closed_form.run(name, seed=1, steps=150)
    assert found["start"] > 0.4
    assert found["distance"] < closed_form.TOLERANCE


def test_k3_in_the_loss_leads_elsewhere():
    bandit = closed_form.Bandit(1)
    assert closed_form.distance(bandit.optimum(), bandit.forward_optimum()) > 0.05


def test_optima_are_optimal():
    """No policy near them does better at what they are said to maximise."""
    bandit = closed_form.Bandit(0)
    ref, beta = bandit.log_ref.exp(), closed_form.BETA

    def reverse(p):
        return float((p * bandit.reward).sum() - beta * (p * (p / ref).log()).sum())

    def forward(p):
        return float((p * bandit.reward).sum() - beta * (ref * (ref / p).log()).sum())

    for value, optimum in ((reverse, bandit.optimum()), (forward, bandit.forward_optimum())):
        assert abs(float(optimum.sum()) - 1) < 1e-9
        for _ in range(50):
            near = (optimum.log() + 0.05 * torch.randn(closed_form.ACTIONS, dtype=torch.float64)).softmax(0)
            assert value(near) < value(optimum)


@pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({"method": "ppo", "epochs_per_rollout": 2, "per_device_train_batch_size": 128}, False),
        ({"method": "grpo", "advantage": "group_mean", "max_steps": 40}, False),
        ({"method": "rloo", "temperature": 2.0, "max_steps": 60}, True),
    ],
    ids=["ppo", "grpo", "rloo-adapter-temperature"],
)
def test_the_trainer_converges_to_the_known_policy(settings, adapter, tmp_path):
    """One prompt, one-token completions, a language model; rollouts, reference, critic, optimizer are the trainer's."""
    tokenizer = make_tokenizer(vocabulary=["go", "a", "b", "c", "d"])
    model = make_model(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    rewards = 0.7 * torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(1))
    temperature = settings.get("temperature", 1.0)

    def log_probs():
        state = torch.tensor([tokenizer("go")["input_ids"]])
        with torch.no_grad():
            return (trainer.model(input_ids=state).logits[0, -1].double() / temperature).log_softmax(0)

    def reward(completion_ids, **_):
        return [float(rewards[ids[0]]) for ids in completion_ids]

    settings = {
        "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 256,
        "max_steps": 120,
        "kl_coef": closed_form.BETA,
        **settings,
    }
    trainer = RLTrainer(
        model,
        reward,
        RLConfig(
            str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=0.03,
            lr_scheduler_type="linear", num_generations=8, prompts_per_rollout=32, max_new_tokens=1,
            generation_batch_size=256, logging_steps=10, seed=1, **settings,
        ),
        train_dataset=[{"prompt": "go"}],
        processing_class=tokenizer,
        peft_config=lora(r=16, lora_alpha=32, target_modules="all-linear") if adapter else None,
    )  # fmt: skip
    begin = log_probs()
    optimum = (begin + rewards.double() / closed_form.BETA).softmax(0)
    assert closed_form.distance(begin.exp(), optimum) > 0.2
    trainer.train()
    assert closed_form.distance(log_probs().exp(), optimum) < closed_form.TOLERANCE
