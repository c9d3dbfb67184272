"""Methods on hidden states: goal-conditioned reward models, routers between reward models, representation alignment."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from test_trainer import PEFT_WARNING, Gradients, lora, make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.rewards import goals
from xpo_fast.rewards.goals import GOAL_FILE, GoalJudge, contrast
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.router import RoutedReward, fit_router, load_scorer, router_loss
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer

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


@pytest.fixture(scope="module")
def towards_the_goal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goal")
    trainer = reward_trainer(
        folder,
        planted(96, 0),
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        method_args={"lam": 1.0},
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    make_tokenizer().save_pretrained(folder / "model")
    return folder / "model", trainer


def test_a_planted_goal_is_seen_in_answers_that_are_only_begun(towards_the_goal):
    folder, _ = towards_the_goal
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
    folder, _ = towards_the_goal
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
    folder, _ = towards_the_goal
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
