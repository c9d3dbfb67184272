"""Methods on hidden states: goal-conditioned reward models, routers between reward models, representation alignment."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from test_trainer import PEFT_WARNING, Gradients, lora, make_model, make_tokenizer
from xpo_fast import cli, data
from xpo_fast.rewards import goals
from xpo_fast.rewards.goals import GOAL_FILE, GoalJudge, contrast
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.router import RoutedReward, fit_router, load_scorer, router_loss
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer
from xpo_fast.trainer import XPOConfig
from xpo_fast.trainer.representation import (
    RepresentationConfig,
    RepresentationTrainer,
    Signal,
    hidden_loss,
    train_signal,
)

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def reward_trainer(tmp_path, rows, *, model=None, peft_config=None, eval_rows=None, **args):
    defaults = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_steps": 1, "seed": 3, "max_grad_norm": 0.0, "max_length": 64, "train_sampling_strategy": "sequential",
        "method": "goal_conditioned",
    }  # fmt: skip
    return RewardTrainer(
        make_model() if model is None else model,
        RewardConfig(**{**defaults, **args}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def ids_of(text: str) -> list[int]:
    return make_tokenizer()(text)["input_ids"]


# Ragged: an answer of one token (and EOS), one longer than its prompt, equal lengths.
PAIRS = [
    {"prompt": "w1 w2", "chosen": " w3 w4 w5", "rejected": " w6"},
    {"prompt": "w7 w8 w9 w10 w11", "chosen": " w3", "rejected": " w12 w13 w14 w15 w16 w17 w18"},
    {"prompt": "w7", "chosen": " w20 w21", "rejected": " w22 w23"},
    {"prompt": "w30 w31", "chosen": " w32 w33 w34 w35", "rejected": " w36 w37"},
]

# --- goal_conditioned ---


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
    trainer = reward_trainer(tmp_path, PAIRS, method_args={"lam": 0.3}, layout=layout)
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


def planted(count: int, seed: int) -> list[dict]:
    """What is preferred goes over w40 … w49 to w60, what is not over w70 … w79 to w80, behind any prompt."""
    g = torch.Generator().manual_seed(seed)

    def said(low: int, end: str) -> str:
        n = int(torch.randint(2, 6, (), generator=g))
        return " " + " ".join(f"w{low + int(k)}" for k in torch.randint(10, (n,), generator=g)) + f" {end}"

    prompts = [f"w{int(k)} w{int(k) // 3}" for k in torch.randint(40, (count,), generator=g)]
    return [{"prompt": p, "chosen": said(40, "w60"), "rejected": said(70, "w80")} for p in prompts]


def auc(better: torch.Tensor, worse: torch.Tensor) -> float:
    return float((better[:, None] > worse[None, :]).double().mean())


def trained_to_the_goal(folder, lam: float):
    how = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "method_args": {"lam": lam}}
    trainer = reward_trainer(folder, planted(96, 0), **how)
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


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    return home


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


# --- router ---


def seeded(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_router_loss_literal_and_gradient():
    """−log softmax(0, ln 3)_0 = ln 4, −log softmax(ln 3, 0)_0 = ln 4/3; half of 0.1 · (1 + 4) beside their mean."""
    logits = torch.tensor([[0.0, 1.0986122886681098], [1.0986122886681098, 0.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    found = router_loss(logits, torch.tensor([0, 0]), weight, 0.1)
    assert found.item() == pytest.approx((1.3862943611198906 + 0.28768207245178085) / 2 + 0.25, rel=1e-12)
    x, y = seeded(7, 3, seed=0), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    leaves = [seeded(3, 3, seed=1).requires_grad_(), seeded(3, seed=2).requires_grad_()]
    z = x @ leaves[0].T + leaves[1]
    mine = torch.autograd.grad(router_loss(z, y, leaves[0], 0.3), leaves, retain_graph=True)
    p = z.exp() / z.exp().sum(dim=1, keepdim=True)
    plain = -sum(torch.log(p[i, k]) for i, k in enumerate(y.tolist())) / 7 + 0.15 * (leaves[0] ** 2).sum()
    for a, b in zip(mine, torch.autograd.grad(plain, leaves), strict=True):
        assert_close(a, b)


def test_the_fitted_router_is_the_minimum():
    """On states of very different scales, one of them constant."""
    x = seeded(40, 5, seed=0).float() * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0]) + 3
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
    weight, bias = fit_router(x, y, 3, l2=0.05)
    mean, std = x.double().mean(0), x.double().std(0, correction=0).clamp(min=1e-6)
    w = (weight.double() * std).requires_grad_()
    b = (bias.double() + weight.double() @ mean).requires_grad_()
    z = ((x.double() - mean) / std) @ w.T + b
    loss = -z.log_softmax(1)[torch.arange(40), y].mean() + 0.025 * w.square().sum()
    assert max(float(grad.abs().max()) for grad in torch.autograd.grad(loss, (w, b))) < 1e-6
    assert torch.equal(fit_router(x, y, 3, l2=0.05)[0], weight)
    with pytest.raises(ValueError, match="l2 > 0"):
        fit_router(x, y, 3, l2=0.0)
    with pytest.raises(ValueError, match="none of domain 3"):
        fit_router(x, y, 4)


DOMAINS = {"math": (0, " w60", " w61"), "chat": (20, " w61", " w60")}  # what one prefers the other does not


def of_domain(name: str, count: int, seed: int) -> list[dict]:
    """Prompts of the domain's own words; which of two answers is preferred depends on the domain alone."""
    low, better, worse = DOMAINS[name]
    g, rows = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        length = 3 + int(torch.randint(3, (), generator=g))
        prompt = " ".join(f"w{low + int(k)}" for k in torch.randint(6, (length,), generator=g))
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse, "domain": name})
    return rows


@pytest.fixture(scope="module")
def experts(home, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("experts"), {}
    for name in DOMAINS:
        rows = [{k: v for k, v in row.items() if k != "domain"} for row in of_domain(name, 24, 0)]
        model = xf.models.load_model(str(home / "model"))[0]
        how = {"max_steps": 15, "method": "bradley_terry", "per_device_train_batch_size": 8}
        trainer = reward_trainer(folder, rows, model=model, peft_config=lora(), **how)
        trainer.train()
        trainer.save_model(str(folder / name))
        make_tokenizer().save_pretrained(folder / name)
        found[name] = folder / name
    return found


def options_of(experts) -> list[str]:
    return [x for name, folder in experts.items() for x in ("--expert", f"{name}={folder}")]


def test_two_planted_domains_are_separated_and_each_has_its_expert(experts, tmp_path):
    scorer = RoutedReward.of(experts)
    train = [row for name in DOMAINS for row in of_domain(name, 40, 1)]
    scorer.train_router([row["prompt"] for row in train], [row["domain"] for row in train])
    rows = [row for name in DOMAINS for row in of_domain(name, 30, 2)]
    prompts, chosen, rejected = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    picked = scorer.route(prompts)
    assert sum(a == row["domain"] for a, row in zip(picked, rows, strict=True)) / len(rows) >= 0.95
    alone = [RewardModel.load(folder) for folder in experts.values()]
    each = [model.score(prompts, chosen) for model in alone]
    right = [(x > model.score(prompts, rejected)).float().mean() for model, x in zip(alone, each, strict=True)]
    assert (scorer.score(prompts, chosen) > scorer.score(prompts, rejected)).float().mean() >= 0.95
    assert max(right) < 0.7  # one expert is right on its own domain alone
    # A reward is that of one expert, and mixed ones are weighed by the router's probabilities.
    wanted = torch.stack([each[list(DOMAINS).index(name)][i] for i, name in enumerate(picked)])
    assert_close(scorer.score(prompts, chosen), wanted, rtol=1e-5, atol=1e-6)
    scorer.how = "mix"
    mixed = (scorer.probabilities(prompts) * torch.stack(each, dim=1)).sum(dim=1)
    assert_close(scorer.score(prompts, chosen), mixed, rtol=1e-5, atol=1e-6)
    assert scorer.compare(prompts[:2], chosen[:2], rejected[:2]).shape == (2,)
    scorer.save(tmp_path / "saved")
    again = load_scorer(tmp_path / "saved")
    assert isinstance(again, RoutedReward) and again.how == "mix" and again.domains == list(DOMAINS)
    assert_close(torch.tensor(again(prompts, chosen)), mixed, rtol=1e-5, atol=1e-6)


def test_router_states_are_the_backbones_at_the_prompts_last_token(home, experts):
    scorer = RoutedReward.of(experts)
    base = xf.models.load_model(str(home / "model"))[0]
    prompts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    expected = [base.model(torch.tensor([ids_of(p)])).last_hidden_state[0, -1].detach() for p in prompts]
    assert_close(scorer.states(prompts), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_router_by_one_command_and_where_a_reward_model_goes(experts, tmp_path, capsys):
    rows = write(tmp_path / "prompts.jsonl", [row for name in DOMAINS for row in of_domain(name, 40, 3)])

    def run(output) -> int:
        return cli.main(["router", *options_of(experts), "--data", rows, "--output-dir", str(output), "--cpu"])

    assert run(tmp_path / "router") == 0
    assert "held out" in capsys.readouterr().out
    found = json.loads((tmp_path / "router" / "results.json").read_text())
    assert found["held_out"] == 16 and found["held_out_accuracy"] >= 0.9 and set(found["by_domain"]) == set(DOMAINS)
    assert run(tmp_path / "again") == 0  # nothing is drawn but the rows held out
    weights = [(tmp_path / name / "router.safetensors").read_bytes() for name in ("router", "again")]
    assert weights[0] == weights[1]
    pairs = write(tmp_path / "pairs.jsonl", [row for name in DOMAINS for row in of_domain(name, 10, 4)])
    where = ["--model", str(tmp_path / "router"), "--output-dir", str(tmp_path / "report"), "--cpu"]
    assert cli.main(["eval-reward", "--data", pairs, *where]) == 0
    [row] = json.loads((tmp_path / "report" / "report.json").read_text())["scorers"]
    assert row["accuracy"] >= 0.9


def test_refusals_of_experts(experts, tmp_path):
    for given, said in (
        (dict(list(experts.items())[:1]), "two experts or more, got math"),
        ({**experts, "code": tmp_path}, "the expert code: no reward_model.json"),
    ):
        with pytest.raises(ValueError, match=said):
            RoutedReward.of(given)
    with pytest.raises(ValueError, match="how must be one of pick, mix, got 'pik'"):
        RoutedReward.of(experts, how="pik")
    for name in ("default", "a.b", "a/b"):
        with pytest.raises(ValueError, match=f"an expert cannot be named '{name}'"):
            RoutedReward.of({name: experts["math"], "chat": experts["chat"]})
    whole, other = tmp_path / "whole", tmp_path / "other"
    for folder in (whole, other):
        shutil.copytree(experts["math"], folder)
    (whole / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"the expert math in .* is a whole model"):
        RoutedReward.of({"math": whole, "chat": experts["chat"]})
    config = json.loads((other / "adapter_config.json").read_text())
    make_model().save_pretrained(tmp_path / "base")
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapters on one base model"):
        RoutedReward.of({"math": other, "chat": experts["chat"]})


def test_refusals_of_routers(experts, tmp_path, capsys):
    scorer = RoutedReward.of(experts)
    for call in (lambda: scorer.route(["w1"]), lambda: scorer.save(tmp_path / "x")):
        with pytest.raises(ValueError, match="the router has not been trained"):
            call()
    with pytest.raises(ValueError, match=r"'maths', for which there is no expert.*math"):
        scorer.train_router(["w1", "w2"], ["maths", "chat"])
    with pytest.raises(ValueError, match="no prompt has the domain 'chat'"):
        scorer.train_router(["w1"], ["math"])
    with pytest.raises(ValueError, match=r"no router.json in"):
        RoutedReward.load(experts["math"])
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "w1", "domain": "math"}, {"prompt": "w2", "domain": "chatt"}])
    named = options_of(experts)
    for options, said in (
        (named, "the domain is 'chatt'; expected the name of an expert, math, chat; did you mean"),
        (named[:2], "two or more, got math"),
        ([*named, *named[:2]], "an expert named 'math' already"),
        (["--expert", "math"], "expected NAME=FOLDER"),
        ([*named, "--l2", "0"], "--l2 must be positive"),
    ):
        assert cli.main(["router", *options, "--data", rows, "--output-dir", str(tmp_path / "out"), "--cpu"]) == 2
        assert said in capsys.readouterr().err


# --- rahf ---


def signal_config(folder, **more) -> XPOConfig:
    how = {"method": "sft", "use_cpu": True, "disable_tqdm": True, "max_steps": 12, "learning_rate": 5e-3, "seed": 3,
           "per_device_train_batch_size": 8, "preflight": "off", "logging_steps": 4}  # fmt: skip
    return XPOConfig(output_dir=str(folder), **{**how, **more})


def aligned(tmp_path, home, folders, rows, *, instructions=None, peft_config=None, **args):
    model = xf.models.load_model(str(home / "model"))[0]
    defaults = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_steps": 1, "seed": 3, "max_grad_norm": 0.0,
    }  # fmt: skip
    return RepresentationTrainer(
        model,
        RepresentationConfig(**{**defaults, **args}),
        signal=Signal.load(model, folders, instructions),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=peft_config or lora(r=8, target_modules="all-linear"),
    )


@pytest.fixture(scope="module")
def dual(home, tmp_path_factory):
    def load():
        return xf.models.load_model(str(home / "model"))[0]

    rows = data.load(PAIRS, kind="pair")
    return train_signal(load, make_tokenizer(), rows, signal_config, lora(), tmp_path_factory.mktemp("signal"))


def plain_states(model, ids: list[int], layers) -> list[torch.Tensor]:
    """The outputs of layers: transformers' own hidden states, entry k + 1; of the last layer what its norm is given."""
    last = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    found = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    return [(last[0] if k + 2 == len(found) else found[k + 1])[0] for k in layers]


def test_hidden_loss_literal():
    """Two layers of width 2, two positions of three: (1 + 4)/2, (0 + 0)/2 and (1 + 0)/2, (4 + 4)/2, over 2 layers."""
    base = [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)]
    signal = [torch.full((1, 3, 2), 0.5), torch.zeros(1, 3, 2)]
    states = [
        torch.tensor([[[2.0, 3.0], [1.0, 1.0], [9.0, 9.0]]]),  # less 2 · 0.5: (1, 2), (0, 0)
        torch.tensor([[[2.0, 1.0], [3.0, -1.0], [9.0, 9.0]]]),  # less 1: (1, 0), (2, −2)
    ]
    targets = torch.tensor([[5, 6, -100]])
    loss, metrics = hidden_loss(states, base, signal, targets, 2.0)
    assert loss.tolist() == [(2.5 + 0.0 + 0.5 + 4.0) / 2]
    assert metrics["mse"].tolist() == [1.75] and metrics["signal"].tolist() == [0.5]
    empty, _ = hidden_loss(states, base, signal, torch.full((1, 3), -100), 2.0)
    assert empty.tolist() == [0.0]


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_rahfs_loss_and_gradients_are_the_plain_ones(home, dual, tmp_path, layers):
    trainer = aligned(tmp_path, home, dual, PAIRS, layers=layers, alpha=1.7)
    with torch.no_grad():  # so that the adapter does something
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    student = copy.deepcopy(trainer.model).double()
    gradients = Gradients()
    trainer.add_callback(gradients)
    base = xf.models.load_model(str(home / "model"))[0].double()
    sides = [xf.models.load_model(str(folder))[0].double() for folder in dual.values()]
    total, tokens = 0.0, 0
    for row in PAIRS:
        prompt, completion = ids_of(row["prompt"]), [*ids_of(row["chosen"]), 1]
        ids, at = [*prompt, *completion], slice(len(prompt) - 1, -1)
        h = plain_states(student.base_model.model, ids, layers)
        b, w, rejected = (plain_states(model, ids, layers) for model in (base, *sides))
        each = [(x - (y + 1.7 * (p - q)).detach())[at].square().mean(1) for x, y, p, q in zip(h, b, w, rejected)]
        total, tokens = total + torch.stack(each).mean(0).sum(), tokens + len(completion)
    (total / tokens).backward()
    trainer.train()
    [loss, *_] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(total.item() / tokens, rel=1e-4)
    wanted = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(wanted) >= 14 * max(layers)
    for name, g in wanted.items():
        assert_close(gradients.found[name].double(), g, rtol=2e-3, atol=1e-5 * float(g.abs().max()))


def test_single_reads_the_same_completion_under_either_instruction(home, tmp_path):
    told = ("w90 w91 ", "w92 w93 w94 ")

    def load():
        return xf.models.load_model(str(home / "model"))[0]

    rows = data.load(PAIRS, kind="pair")
    how = {"kind": "single", "instructions": told}
    folders = train_signal(load, make_tokenizer(), rows, signal_config, lora(), tmp_path / "signal", **how)
    assert list(folders) == ["both"]
    trainer = aligned(tmp_path, home, folders, PAIRS, instructions=told, layers=[0, 1])
    trainer.train()
    [loss, *_] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told_model = xf.models.load_model(str(folders["both"]))[0].double()
    total, tokens = 0.0, 0
    for row in PAIRS:
        completion = [*ids_of(row["chosen"]), 1]
        sides = []
        for instruction in told:
            front = ids_of(instruction + row["prompt"])
            found = plain_states(told_model, [*front, *completion], [0, 1])
            sides.append([x[len(front) - 1 : -1] for x in found])
        each = [(a - b).square().mean(1) for a, b in zip(*sides, strict=True)]
        total, tokens = total + torch.stack(each).mean(0).sum().item(), tokens + len(completion)
    assert loss == pytest.approx(total / tokens, rel=1e-3)  # h = h(base) at the first step: what is left is αA


def test_rahf_moves_the_states_and_the_answers(home, dual, tmp_path):
    trainer = aligned(tmp_path, home, dual, PAIRS, max_steps=60, learning_rate=5e-3)
    before = trainer.evaluate()
    assert before["eval_mse"] == pytest.approx(before["eval_signal"], rel=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mse"] < before["eval_mse"] / 4
    assert after["eval_signal"] == pytest.approx(before["eval_signal"], rel=1e-4)  # neither base nor signal has moved
    gaps = []
    for model in (xf.models.load_model(str(home / "model"))[0], trainer.model):
        sums = []
        for name in ("chosen", "rejected"):
            for row in PAIRS:
                ids = torch.tensor([[*ids_of(row["prompt"]), *ids_of(row[name]), 1]])
                logps = model(input_ids=ids).logits.detach().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
                sums.append(float(logps[len(ids_of(row["prompt"])) - 1 :].mean()))
        gaps.append(sum(sums[: len(PAIRS)]) - sum(sums[len(PAIRS) :]))
    assert gaps[1] > gaps[0]  # the chosen completions have become likelier, beside the rejected ones


def test_a_signal_shares_the_weights_of_the_model(home, dual):
    model = xf.models.load_model(str(home / "model"))[0]
    signal = Signal.load(model, dual, None)
    own = {p.data_ptr() for p in model.parameters()}
    shared = [p for n, p in signal.model.named_parameters() if "lora" not in n]
    assert shared and all(p.data_ptr() in own for p in shared)
    assert not any("lora" in n for n, _ in model.named_parameters())


def test_rahf_by_one_command_and_resumed(home, tmp_path, capsys):
    rows = write(tmp_path / "pairs.jsonl", planted(12, 5))

    def run(output, *more) -> int:
        return cli.main([
            "rahf", "--data", rows, "--model", str(home / "model"), "--output-dir", str(output), "--cpu",
            "--batch-size", "4", "--logging-steps", "1", "--eval-split", "2", "--max-steps", "4", "--save-steps", "2",
            "--lora-rank", "4", *more,
        ])  # fmt: skip

    assert run(tmp_path / "whole") == 0
    found = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert found["after"]["eval_mse"] < found["before"]["eval_mse"]
    # Stopped while the second adapter of the signal was trained, and, gone on, in the last stage.
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    part = tmp_path / "part"
    for path in (*part.glob("checkpoint-*"), part / "signal" / "worse" / "checkpoint-4"):
        shutil.rmtree(path)
    for path in (*part.glob("adapter*"), *(part / "signal" / "worse").glob("adapter*")):
        path.unlink()
    assert run(part) == 2
    assert "has the signal of an earlier run" in capsys.readouterr().err
    assert run(part, "--resume") == 0
    again = json.loads((part / "results.json").read_text())
    assert again["after"]["eval_mse"] == found["after"]["eval_mse"]
    shutil.rmtree(part / "checkpoint-4")
    assert run(part, "--resume") == 0
    assert json.loads((part / "results.json").read_text())["after"]["eval_mse"] == found["after"]["eval_mse"]
    model, _ = xf.models.load_model(str(part))  # the result is an adapter like any other
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 97)


def test_refusals_of_rahf(home, dual, tmp_path, capsys):
    for args, said in (
        ({"alpha": 0.0}, "expected alpha > 0"),
        ({"layers": [2]}, r"different layers from 0 to 1, got \[2\]"),
        ({"layers": [1, 1]}, r"different layers from 0 to 1, got \[1, 1\]"),
        ({"method": "rhaf"}, "aligned by rahf, got 'rhaf'"),
        ({"reference": "copy", "context": "a b"}, "rahf reads no reference, context: leave them out"),
    ):
        with pytest.raises(ValueError, match=said):
            aligned(tmp_path, home, dual, PAIRS, **args)
    model = make_model()
    with pytest.raises(ValueError, match="rahf trains an adapter"):
        RepresentationTrainer(
            model, RepresentationConfig(output_dir=str(tmp_path), use_cpu=True), signal=Signal.load(model, dual, None),
            train_dataset=PAIRS, processing_class=make_tokenizer(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="kind must be one of single, dual, got 'duel'"):
        train_signal(make_model, make_tokenizer(), [], signal_config, lora(), tmp_path, kind="duel")
    rows = write(tmp_path / "pairs.jsonl", PAIRS)
    for options, said in (
        (["--prefer", "be good"], "the instructions of --signal single"),
        (["--full"], "--full: rahf trains adapters"),
        (["--layers", "7"], "different layers from 0 to 1, got [7]"),
        (["--layers", "a"], "expected numbers of layers"),
        (["--signal", "single", "--prefer", "nowhere.txt"], "no such file"),
    ):
        words = ["rahf", "--data", rows, "--model", str(home / "model"), "--output-dir", str(tmp_path / "no"), "--cpu"]
        try:
            code = cli.main([*words, *options])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "no" / "signal").exists()
