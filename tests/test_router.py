"""Routers between reward models: the loss, the fit, two planted domains, and the command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from planted import home as home
from planted import ids_of, write
from test_reward_model import make_trainer
from test_trainer import PEFT_WARNING, lora, make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.router import RoutedReward, fit_router, load_scorer, router_loss

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


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
        how = {"max_steps": 15, "per_device_train_batch_size": 8}
        trainer = make_trainer(folder, rows=rows, model=model, peft_config=lora(), **how)
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
