"""Goal-conditioned reward models: the contrast of hidden states, its Q-values and the filter at decoding."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from planted import PAIRS, ids_of, planted, write
from planted import home as home
from test_reward_model import make_trainer
from test_trainer import PEFT_WARNING, Gradients, make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.rewards import goals
from xpo_fast.rewards.goals import GOAL_FILE, GoalJudge, contrast
from xpo_fast.rewards.model import RewardModel

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def plain_contrast(states: torch.Tensor, sign: int) -> torch.Tensor:
    """The mean over s < g of log(1 + exp(-sign cos)), pair by pair in float64. states: (n, D)."""
    states, terms = states.double(), []
    for s in range(len(states)):
        for g in range(s + 1, len(states)):
            cos = (states[s] * states[g]).sum() / (states[s].norm() * states[g].norm())
            terms.append(torch.log(1 + torch.exp(-sign * cos)))
    return torch.stack(terms).mean() if terms else states.sum() * 0


def test_goal_literal():
    """L(1), L(-1) with L(x) = log(1 + e^-x), and half of near + apart: 0.5 (0.5 + 1), 0.5 (0.25 + 0)."""
    given = {"reward_w": [2.0, -0.5], "reward_l": [1.0, 0.5], "near_w": [0.5, 0.25], "apart_l": [1.0, 0.0]}
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in given.items()}
    losses, metrics = xf.METHODS["goal_conditioned"](**given)
    assert_close(losses, torch.tensor([0.313261687518 + 0.75, 1.31326168752 + 0.125], dtype=torch.float64))
    assert_close(xf.METHODS["goal_conditioned"](**given, lam=0.0)[0], metrics["reward_loss"])
    with pytest.raises(ValueError, match="lam >= 0"):
        xf.METHODS["goal_conditioned"](**given, lam=-1.0)


def test_contrast_literal():
    """States (1, 0), (0, 1), (1, 1)/√2·3: cosines 0, 0.7071, 0.7071; a second row of one pair, a third of none."""
    hidden = torch.tensor([
        [[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [3.0, 3.0]],
        [[2.0, 0.0], [-5.0, 0.0], [9.0, 9.0], [9.0, 9.0]],
        [[9.0, 9.0]] * 4,
    ])  # fmt: skip
    targets = torch.tensor([[-100, 5, 6, -100], [7, -100, -100, -100], [-100] * 4])
    near = [(0.6931471805599453 + 2 * 0.40083353) / 3, 1.3132616875182228, 0.0]
    apart = [(0.6931471805599453 + 2 * 1.10794031) / 3, 0.31326168751822286, 0.0]
    assert_close(contrast(hidden, targets, alike=True), torch.tensor(near), rtol=1e-6, atol=1e-6)
    assert_close(contrast(hidden, targets, alike=False), torch.tensor(apart), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("most", [64, 5, 2])
def test_contrast_and_its_gradient_are_those_of_the_plain_mean(monkeypatch, alike, most):
    monkeypatch.setattr(goals, "STATES", most)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 13, 6, generator=generator).requires_grad_()
    targets = torch.full((4, 13), -100)
    lengths, starts = (1, 3, 9, 4), (0, 2, 3, 8)
    for r, (n, start) in enumerate(zip(lengths, starts)):
        targets[r, start : start + n] = 1
    found = contrast(hidden, targets, alike=alike)
    (grad,) = torch.autograd.grad((found * torch.arange(1.0, 5.0)).sum(), hidden)
    leaf = hidden.detach().double().requires_grad_()
    expected = []
    for r, (n, start) in enumerate(zip(lengths, starts)):
        at = range(n + 1)
        if n + 1 > most:  # these many, evenly, ends included
            at = [(k * n + (most - 1) // 2) // (most - 1) for k in range(most)]
        expected.append(plain_contrast(leaf[r, [start + k for k in at]], 1 if alike else -1))
    expected = torch.stack(expected)
    (wanted,) = torch.autograd.grad((expected * torch.arange(1.0, 5.0)).sum(), leaf)
    assert_close(found.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)


def test_turns_that_are_not_scored_are_no_states():
    """Targets at 1, 2 and 5: the states are those at 1, 2, 5 and behind it, 6; the two between are read by nobody."""
    hidden = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.full((1, 8), -100)
    targets[0, [1, 2, 5]] = 3
    expected = plain_contrast(hidden[0, [1, 2, 5, 6]], 1)
    assert_close(contrast(hidden, targets, alike=True)[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_the_trainers_loss_and_gradients_are_the_plain_ones(tmp_path, layout):
    trainer = make_trainer(tmp_path, "goal_conditioned", rows=PAIRS, method_args={"lam": 0.3}, layout=layout)
    gradients = Gradients()
    trainer.add_callback(gradients)
    model = make_model().double()
    model.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if not k.startswith("value_head")})
    head = trainer.reward_model().head
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    total = 0.0
    for row in PAIRS:
        prompt, sides = ids_of(row["prompt"]), []
        for name in ("chosen", "rejected"):
            ids = torch.tensor([[*prompt, *ids_of(row[name]), 1]])
            hidden = model.model(ids).last_hidden_state[0]
            sides.append((hidden[-1] @ weight[0] + bias[0], hidden[len(prompt) - 1 :]))
        (r_w, w), (r_l, rejected) = sides
        bt = torch.log(1 + torch.exp(r_l - r_w))
        total = total + bt + 0.3 * (plain_contrast(w, 1) + plain_contrast(rejected, -1))
    (total / len(PAIRS)).backward()
    total = total.item()
    assert not trainer.preflight().faults
    trainer.train()
    [loss, *_] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(total / len(PAIRS), rel=1e-4)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) > 10
    for name, g in grads.items():
        if name != "lm_head.weight":
            assert_close(gradients.found[name].double(), g, rtol=2e-3, atol=2e-6)


def auc(better: torch.Tensor, worse: torch.Tensor) -> float:
    return float((better[:, None] > worse[None, :]).double().mean())


def trained_to_the_goal(folder, lam: float):
    how = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "method_args": {"lam": lam}}
    trainer = make_trainer(folder, "goal_conditioned", rows=planted(96, 0), **how)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    make_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def towards_the_goal(tmp_path_factory):
    return trained_to_the_goal(tmp_path_factory.mktemp("goal"), 1.0)


def begun_auc(judge: GoalJudge) -> float:
    rows = planted(100, 7)
    sides = [[" " + " ".join(row[name].split()[:2]) for row in rows] for name in ("chosen", "rejected")]
    return auc(*(judge.score([row["prompt"] for row in rows], texts) for texts in sides))


def test_the_contrast_and_not_the_reward_alone_shows_where_a_begun_answer_goes(towards_the_goal, tmp_path):
    without = GoalJudge.load(trained_to_the_goal(tmp_path, 0.0))
    assert begun_auc(GoalJudge.load(towards_the_goal)) >= 0.9 > begun_auc(without) + 0.1


def test_a_planted_goal_is_seen_in_answers_that_are_only_begun(towards_the_goal):
    folder = towards_the_goal
    judge, rows = GoalJudge.load(folder), planted(40, 1)
    begun = {name: [" " + " ".join(row[name].split()[:2]) for row in rows] for name in ("chosen", "rejected")}
    prompts = [row["prompt"] for row in rows]
    q = {name: judge.score(prompts, texts) for name, texts in begun.items()}
    assert auc(q["chosen"], q["rejected"]) >= 0.9
    assert (q["chosen"].abs() <= 1 + 1e-6).all()
    # The filter at decoding: of two begun answers of each prompt the one towards the goal goes on.
    both = [x for pair in zip(begun["chosen"], begun["rejected"]) for x in pair]
    twice = [(p, i) for i, p in enumerate(prompts) for _ in range(2)]
    kept = judge.kept([f"{p} w{i}" for p, i in twice], both, 0.5).view(-1, 2)
    assert kept.sum() == len(rows) and kept[:, 0].float().mean() >= 0.9
    assert judge.compare(prompts, begun["chosen"], begun["rejected"]).mean() > 0.5


def test_goal_and_q_values_are_those_of_the_plain_states(towards_the_goal):
    folder = towards_the_goal
    judge, model = GoalJudge.load(folder), RewardModel.load(folder).model
    states = []
    for row in planted(96, 0):
        ids = torch.tensor([[*ids_of(row["prompt"]), *ids_of(row["chosen"]), 1]])
        states.append(model.model(ids).last_hidden_state[0, -1])
    goal = torch.stack(states).mean(dim=0).detach()
    assert_close(judge.goal, goal, rtol=1e-4, atol=1e-5)
    [q, nothing] = judge.q_values(["w1 w2", "w1 w2"], [" w41 w77 w3", ""])
    hidden = model.model(torch.tensor([ids_of("w1 w2 w41 w77 w3")])).last_hidden_state[0].detach()
    expected = torch.nn.functional.cosine_similarity(hidden, goal[None])
    assert_close(q, expected[2:], rtol=1e-4, atol=1e-5)
    assert_close(nothing, expected[1:2], rtol=1e-4, atol=1e-5)
    assert judge.score([], []).shape == (0,)


def test_refusals_of_goals(towards_the_goal, tmp_path):
    folder = towards_the_goal
    model = RewardModel.load(folder)
    with pytest.raises(ValueError, match=r"no goal_state.safetensors in .*--method goal_conditioned"):
        GoalJudge.load(tmp_path)
    with pytest.raises(ValueError, match=r"expected a goal \(32,\).*got \(3,\)"):
        GoalJudge(model, torch.zeros(3))
    with pytest.raises(ValueError, match=r"share of the completions in \(0, 1\], got 0"):
        GoalJudge.load(folder).kept(["w1"], [" w2"], 0)


def test_goal_conditioned_by_one_command_and_resumed(home, tmp_path):
    rows = write(tmp_path / "pairs.jsonl", planted(20, 2))

    def run(output, *more) -> int:
        return cli.main([
            "reward", "--method", "goal_conditioned", "--data", rows, "--model", str(home / "model"), "--output-dir",
            str(output), "--cpu", "--batch-size", "4", "--logging-steps", "1", "--lora-targets", "q_proj,v_proj",
            "--set", "lam=0.7", "--eval-split", "4", "--save-steps", "2", "--max-steps", *more,
        ])  # fmt: skip

    assert run(tmp_path / "whole", "4") == 0
    assert run(tmp_path / "part", "4") == 0
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    (tmp_path / "part" / GOAL_FILE).unlink()
    assert run(tmp_path / "part", "4", "--resume") == 0
    results = [json.loads((tmp_path / name / "results.json").read_text())["after"] for name in ("whole", "part")]
    assert results[0]["loss"] == results[1]["loss"] and results[0]["near"] > 0
    goal = [goals.load_goal(tmp_path / name) for name in ("whole", "part")]
    assert torch.equal(*goal) and (tmp_path / "part" / GOAL_FILE).is_file()
    judge = GoalJudge.load(tmp_path / "part")
    assert judge.score(["w1"], [" w2 w3"]).shape == (1,)
