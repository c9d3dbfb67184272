"""Ranking accuracy, Bradley–Terry and the KL–reward frontier: by hand, against float64, on planted data, by command."""

from __future__ import annotations

import contextlib
import itertools
import json
import math

import numpy as np
import peft
import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, VOCAB, make_model, make_rows, make_tokenizer
from xpo_fast import cli, data
from xpo_fast.cli import policies
from xpo_fast.cli.evaluate import INTERVALS, MEASURES
from xpo_fast.evaluate import (
    FLIPS,
    Games,
    NotFinite,
    PairLogps,
    bradley_terry,
    efficient,
    elo,
    flips,
    ideal_margin,
    kl_estimates,
    point,
    ranking,
    win_rates,
)
from xpo_fast.evaluate.games import INTERVALS as MEASURES_INTERVALS
from xpo_fast.evaluate.games import SCALE, covariance, decided
from xpo_fast.evaluate.policies import Policy, Source
from xpo_fast.evaluate.ranking import pair_lines
from xpo_fast.evaluate.stages import Stages, prompt_numbers
from xpo_fast.evaluate.tables import of_games, of_ranking, shown
from xpo_fast.recipes import run_folder
from xpo_fast.rewards.judges import Judge
from xpo_fast.rollout import Sampling

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


# --- ranking ------------------------------------------------------------------------------------------------------


def pairs(policy, reference, tokens=None, **how) -> PairLogps:
    tokens = np.ones((len(policy), 2)) if tokens is None else np.array(tokens, float)
    return PairLogps(np.array(policy, float), np.array(reference, float), tokens, **how)


def test_the_ideal_margin_is_the_log_of_the_papers_ratio():
    cases = (-3.0, -1.0, 0.6, 0.5), (-1.0, -1.5, 0.2, 1.0), (-2.0, -2.0, 0.5, 0.1), (0.0, -4.0, 0.9, 3.0)
    for chosen, rejected, alpha, beta in cases:
        ratio = math.exp(chosen) / math.exp(rejected) * (alpha / (1 - alpha)) ** (1 / beta)
        found = ideal_margin(np.array([chosen - rejected]), np.array([alpha]), beta)[0]
        assert found == pytest.approx(math.log(ratio), abs=1e-12)
    known = ideal_margin(np.array([-50.0, 50.0, -0.5, 1.0]), np.array([1.0, 0.0, 0.5, np.nan]), 0.1)
    assert known[:3].tolist() == [math.inf, -math.inf, -0.5] and math.isnan(known[3])
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        ideal_margin(np.zeros(1), np.ones(1), 0)


def test_the_ideal_margin_is_that_of_the_tilted_reference_and_of_dpos_minimum():
    rng = np.random.default_rng(0)
    reference, reward, beta = np.log(rng.dirichlet(np.ones(6))), rng.normal(size=6), 0.4
    tilted = reference + reward / beta
    tilted -= np.log(np.exp(tilted).sum())
    w, l = 4, 1  # noqa: E741
    alpha = 1 / (1 + math.exp(reward[l] - reward[w]))
    expected = ideal_margin(np.array([reference[w] - reference[l]]), np.array([alpha]), beta)[0]
    assert tilted[w] - tilted[l] == pytest.approx(expected, abs=1e-12)

    def slope(m: float) -> float:  # of α·L(β(m − m_ref)) + (1 − α)·L(−β(m − m_ref)) in m
        z = beta * (m - (reference[w] - reference[l]))
        return beta * (1 / (1 + math.exp(-z)) - alpha)

    low, high = -50.0, 50.0
    for _ in range(100):
        low, high = ((low + high) / 2, high) if slope((low + high) / 2) < 0 else (low, (low + high) / 2)
    assert low == pytest.approx(expected, abs=1e-9)


# Margins of the reference and the policy: stays right, to right, to wrong, stays wrong, stays wrong, a tie before.
PLANTED = [(1.0, 3.0), (-2.0, 0.5), (0.5, -0.5), (-4.0, -1.0), (-1.0, -6.0), (0.0, 2.0)]
BY_HAND = ["stays right", "to right", "to wrong", "stays wrong", "stays wrong", "to right"]


def planted(**how) -> PairLogps:
    logps = [[(-10 + m / 2, -10 - m / 2) for m in side] for side in zip(*PLANTED, strict=True)]
    return pairs(logps[1], logps[0], [[2, 4]] * 6, **how)


def test_planted_flips_and_figures_by_hand():
    found = ranking(planted(alpha=np.array([0.9, 0.6, 1.0, 0.7, 0.0, 0.5])), betas=(0.5, 5.0))
    assert {name: found["flips"][name]["pairs"] for name in FLIPS} == {name: BY_HAND.count(name) for name in FLIPS}
    assert found["policy"]["accuracy"] == pytest.approx(3 / 6) and found["reference"]["accuracy"] == pytest.approx(
        2 / 6
    )
    assert found["reference"]["ties"] == 1 and found["policy"]["ties"] == 0
    assert found["policy"]["margin_mean"] == pytest.approx((3 + 0.5 - 0.5 - 1 - 6 + 2) / 6)
    assert found["policy"]["standard_error"] == pytest.approx(math.sqrt(0.25 / 6))
    # Per token: (−10 + m/2)/2 against (−10 − m/2)/4, that is −2.5 + 3m/8: right only for m > 20/3.
    assert found["policy"]["per_token"]["accuracy"] == 0
    assert found["policy"]["per_token"]["margin_mean"] == pytest.approx(-2.5 + 3 / 8 * (-2 / 6))
    # β = ½: 1 + 2·2.197, −2 + 2·0.405, ∞, −4 + 2·0.847, −∞, 0: right for pairs 0 and 2; a tie at the end.
    assert found["idealised"][0]["accuracy"] == pytest.approx(2 / 6) and found["idealised"][0]["ties"] == 1
    assert found["idealised"][0]["gap"] == pytest.approx(2 / 6 - 3 / 6)
    # The implicit reward rises more for chosen in pairs 0, 1, 3 and 5.
    assert found["implicit"]["accuracy"] == pytest.approx(4 / 6) and found["implicit"]["beta"] == 0.5
    gains = [b - a for a, b in PLANTED]
    losses = [math.log(1 + math.exp(-0.5 * g)) for g in gains]
    assert found["implicit"]["dpo_loss"] == pytest.approx(sum(losses) / 6)
    assert found["flips"]["stays wrong"]["dpo_loss"] == pytest.approx((losses[3] + losses[4]) / 2)
    assert found["change"]["mean"] == pytest.approx(1 / 6)
    text = of_ranking(found)
    assert "| to right | 2 | 33.3% | -1.00 | 1.25 |" in text and "optimum, β = 5" in text


def test_a_pair_is_ranked_right_exactly_below_its_loss_to_rank():
    """Theorem 4.1 of 2405.19534."""
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(size=(2, 400, 2)) * 4
    lines = pair_lines(pairs(policy, reference), [0.3])
    right = [line["loss"] < line["loss_to_rank"] for line in lines]
    assert right == (policy[:, 0] > policy[:, 1]).tolist() and 100 < sum(right) < 300
    assert [line["flip"] for line in lines] == [
        FLIPS[(0 if p > q else 2) if a > b else (1 if p > q else 3)]
        for (p, q), (a, b) in zip(policy, reference, strict=True)
    ]
    assert [line["flip"] for line in pair_lines(planted(), [1.0])] == BY_HAND
    assert all(line["idealised"] == [True] for line in lines)  # certain labels


def test_pairs_without_numbers_are_left_out_and_counted():
    some = planted(alpha=np.array([0.9, np.nan, 0.9, 0.1, 0.9, 0.9]), prompts=np.array([0, 0, 1, 1, 2, 3]))
    some.policy[0, 1], some.reference[5, 0] = np.nan, -np.inf
    found = ranking(some, [1.0])
    assert found["not_finite"] == 2 and found["pairs"] == 4 and found["prompts"] == 3
    assert found["idealised"][0]["without_alpha"] == 1 and found["policy"]["accuracy"] == pytest.approx(1 / 4)
    # Prompts are observations: sums of right − ¼ are 0.75, −0.5, −0.25.
    assert found["policy"]["standard_error"] == pytest.approx(math.sqrt(0.75**2 + 0.5**2 + 0.25**2) / 4)
    assert "2 more left out" in of_ranking(found)
    lines = pair_lines(some, [1.0])
    assert lines[0]["flip"] is None and lines[1]["idealised"] == [None]
    some.policy[:] = np.nan
    with pytest.raises(ValueError, match="none of 6 pairs has finite log-probs"):
        ranking(some, [1.0])
    unknown = ranking(planted(alpha=np.full(6, np.nan)), [1.0])["idealised"][0]
    assert unknown["accuracy"] is None and unknown["without_alpha"] == 6


def test_one_pair_has_no_standard_error():
    found = ranking(pairs([[-1, -2]], [[-2, -1]]), [0.1])
    assert found["policy"] | {"per_token": None} == {
        "accuracy": 1.0, "standard_error": None, "ties": 0, "margin_mean": 1.0, "per_token": None,
    }  # fmt: skip
    assert found["flips"]["to right"]["share"] == 1 and found["flips"]["to wrong"]["margin"] is None
    assert "| policy | 1.000 |" in of_ranking(found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: pairs(np.zeros((0, 2)), np.zeros((0, 2))), r"of P ≥ 1 pairs, got \[\(0, 2\)\]"),
        (lambda: pairs(np.zeros((3, 2)), np.zeros((2, 2))), "expected log-probs and tokens"),
        (lambda: planted(alpha=np.ones(5)), r"expected alpha of shape \(6,\)"),
        (lambda: planted(alpha=np.array([1, 1, 1.5, 1, 1, 1])), "in .0, 1.; got 1.5 for pair 2"),
        (lambda: ranking(planted(), []), "expected one beta or more"),
    ],
)
def test_refusals_of_pairs(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# --- games --------------------------------------------------------------------------------------------------------


def games_of(results, names="abc", prompts=None) -> Games:
    """Games of (first, second, score)."""
    first, second, score = (np.array(x) for x in zip(*results, strict=True))
    number = np.zeros(len(results), int) if prompts is None else np.array(prompts)
    return Games(tuple(names), first, second, score.astype(float), number)


def test_two_policies_by_hand():
    found = elo(games_of([(0, 1, 1)] * 6 + [(1, 0, 1)] * 2 + [(0, 1, 0.5)] * 2, "ab"))
    a, b = found["policies"]
    # 7 wins to 3: the difference is 400·log10(7/3), its variance SCALE²/(10·0.7·0.3), half of the way each.
    assert a["elo"] - b["elo"] == pytest.approx(400 * math.log10(7 / 3)) and a["elo"] + b["elo"] == pytest.approx(2000)
    assert b["difference"] == pytest.approx(-400 * math.log10(7 / 3)) and a["difference_standard_error"] == 0
    error = SCALE / math.sqrt(10 * 0.7 * 0.3)
    assert b["difference_standard_error"] == pytest.approx(error) and a["standard_error"] == pytest.approx(error / 2)
    assert a["high"] - a["low"] == pytest.approx(2 * 1.96 * error / 2) and a["games"] == 10


def test_strengths_are_those_of_zermelos_iteration():
    rng = np.random.default_rng(2)
    wins = rng.integers(1, 9, size=(5, 5)) * (1 - np.eye(5))
    wins[0, 4] = wins[4, 0] = wins[1, 3] = 0  # not everybody met, and one side lost all
    gamma = np.ones(5)
    for _ in range(3000):
        for i in range(5):
            games = [(wins[i, j] + wins[j, i]) / (gamma[i] + gamma[j]) for j in range(5) if j != i]
            gamma[i] = wins[i].sum() / sum(games)
    expected = np.log(gamma) - np.log(gamma).mean()
    assert bradley_terry(wins) == pytest.approx(expected, abs=1e-8)


def simulated(rng, theta, prompts) -> Games:
    pairs = [(i, j) for i in range(len(theta)) for j in range(i + 1, len(theta))]
    results, number = [], []
    for q in range(prompts):
        for i, j in pairs:
            p = 1 / (1 + math.exp(theta[j] - theta[i]))
            results.append((i, j, rng.random() < p))
            number.append(q)
    return games_of(results, "abcd"[: len(theta)], number)


def test_the_interval_covers_the_strengths_games_were_drawn_from():
    rng, theta = np.random.default_rng(3), np.array([0.8, 0.0, -0.8])
    expected = 1000 + SCALE * theta
    inside = []
    for _ in range(200):
        found = elo(simulated(rng, theta, 60))["policies"]
        inside += [row["low"] <= x <= row["high"] for row, x in zip(found, expected, strict=True)]
    assert 0.915 <= np.mean(inside) <= 0.98  # 600 intervals of 95%, three to a set of games
    many = [row["elo"] for row in elo(simulated(rng, theta, 4000))["policies"]]
    assert many == pytest.approx(expected, abs=25)


def test_the_bootstrap_agrees_and_is_seeded():
    games = simulated(np.random.default_rng(4), np.array([0.5, 0.0, -0.5]), 80)
    one, two, other = (elo(games, interval="bootstrap", draws=300, seed=s)["policies"] for s in (1, 1, 2))
    assert one == two != other
    wald = elo(games)["policies"]
    for a, b in zip(one, wald, strict=True):
        assert a["standard_error"] == pytest.approx(b["standard_error"], rel=0.2)
        assert a["low"] == pytest.approx(b["low"], abs=0.35 * b["standard_error"])
        assert a["elo"] == b["elo"]


def test_games_of_a_prompt_are_one_observation():
    games = simulated(np.random.default_rng(5), np.array([0.3, -0.3]), 50)
    twice = Games(games.names, *(np.tile(x, 2) for x in (games.first, games.second, games.score, games.prompts)))
    errors = [elo(g)["policies"][0]["standard_error"] for g in (games, twice)]
    assert errors[0] == pytest.approx(errors[1])  # the copies of a game tell nothing new
    alone = covariance(games.wins()[None], bradley_terry(games.wins()))  # as if independent
    assert SCALE * math.sqrt(alone[0, 0]) == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([(0, 1, 1), (1, 0, 1)], "no game joins a, b with c"),
        ([(0, 1, 1), (0, 2, 1), (1, 2, 1), (2, 1, 1)], "a lost no game, and tied none, against b, c"),
        ([(0, 1, 1), (1, 0, 1), (0, 2, 1), (1, 2, 1)], "a, b lost no game, and tied none, against c"),
        ([(0, 1, 1), (1, 2, 1), (2, 2 - 2, 0)], "a lost no game"),
        ([(0, 1, math.nan), (1, 2, math.nan)], "none of 2 games has a verdict"),
    ],
)
def test_strengths_that_are_not_finite_are_told_by_name(results, message):
    games = games_of(results)
    with pytest.raises(NotFinite, match=message):
        elo(games)
    text = of_games(win_rates(games), None, "a lost no game")
    assert text.endswith("No Elo: a lost no game\n")


def test_a_prior_makes_them_finite():
    games = games_of([(0, 1, 1)] * 5, "ab")
    found = elo(games, prior=2)["policies"]
    assert found[0]["elo"] - found[1]["elo"] == pytest.approx(400 * math.log10(6 / 1)) and found[0]["games"] == 5
    apart = elo(games_of([(0, 1, 1), (1, 0, 1)]), prior=0.1)["policies"]
    assert [row["elo"] for row in apart] == pytest.approx([1000] * 3)
    few = elo(games_of([(0, 1, 1), (0, 1, 0)], "ab", [0, 1]), interval="bootstrap", draws=50)
    assert 10 < few["unbounded"] < 40  # redrawn sets in which one side won all


def test_win_rates_by_hand():
    games = games_of(
        [(0, 1, 1), (1, 0, 1), (0, 1, 0.5), (0, 1, 1), (0, 1, math.nan), (2, 0, 1)], prompts=[0, 0, 1, 2, 2, 0]
    )
    first, second = win_rates(games)
    assert (first["first"], first["second"], first["games"], first["unjudged"]) == ("a", "b", 4, 1)
    assert (first["wins"], first["ties"], first["losses"], first["rate"]) == (2, 1, 1, 2.5 / 4)
    # Sums of score − 0.625 by prompt: 1 + 0 − 1.25, −0.125, 0.375.
    assert first["standard_error"] == pytest.approx(math.sqrt(0.25**2 + 0.125**2 + 0.375**2) / 4)
    assert (second["second"], second["rate"], second["standard_error"]) == ("c", 0.0, None)
    nothing = win_rates(games_of([(0, 1, math.nan)], "ab"))[0]
    assert nothing["rate"] is None and nothing["unjudged"] == 1
    assert decided(np.array([0.6, 0.5, 0.1, math.nan])).tolist()[:3] == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: games_of([(0, 0, 1)], "a"), "expected two policies or more, got a"),
        (lambda: games_of([(1, 1, 1)]), "game 0 has one policy on both sides"),
        (lambda: games_of([(0, 1, 2)]), "one is outside"),
        (lambda: Games(("a", "b"), np.zeros(1, int), np.ones(1, int), np.ones(2), np.zeros(1, int)), "of G games"),
        (lambda: bradley_terry(np.ones((2, 3))), "got shape"),
        (lambda: bradley_terry(np.ones((2, 2)), prior=-1), "a prior of 0 games or more"),
        (lambda: elo(games_of([(0, 1, 1)]), interval="walt"), "one of wald, bootstrap, got 'walt'"),
    ],
)
def test_refusals_of_games(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# --- frontier -----------------------------------------------------------------------------------------------------


def test_estimates_of_kl_by_hand_and_in_the_mean():
    policy, reference = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([[-2.0, -1.5], [-0.5, 0.0]])
    k1, k3 = kl_estimates(policy, reference)
    assert k1.tolist() == [0.5, 0.0]
    assert k3[0] == pytest.approx(math.exp(-1) - 1 + 1 + math.exp(0.5) - 1 - 0.5, abs=1e-12) and k3[1] == 0
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.7, 0.2, 0.1], [0.4, 0.4, 0.2]))
    each = kl_estimates(p.log()[:, None], q.log()[:, None])
    exact = float((p * (p / q).log()).sum())
    assert [float((p * k).sum()) for k in each] == pytest.approx([exact, exact], abs=1e-12)  # both are unbiased
    deviation = [float((p * (k - exact) ** 2).sum()) ** 0.5 for k in each]
    assert deviation[1] < deviation[0] / 2
    with pytest.raises(ValueError, match="same tokens"):
        kl_estimates(policy, reference[:, :1])


def a_point(k3, reward, name="p"):
    one = np.array([1.0])
    return point(name, one * k3, one * k3, one * reward, one, np.zeros(1, int))


def test_points_and_the_frontier_by_hand():
    points = [a_point(k, r) for k, r in ((0, 0), (1, 2), (2, 1), (3, 3), (3, 2.5), (4, math.nan), (1, 2))]
    assert efficient(points) == [True, True, False, True, False, False, True]
    assert points[0].kl_error is None and points[5].reward is None and points[5].unjudged == 1
    k1, reward, prompts = np.array([1.0, 3.0, 2.0, 2.0]), np.array([1.0, 1.0, math.nan, 5.0]), np.array([0, 0, 1, 1])
    both = point("x", k1, np.ones(4), reward, np.full(4, 7), prompts)
    assert (both.kl, both.kl_error, both.tokens, both.prompts, both.completions) == (2.0, 0.0, 7.0, 2, 4)
    off = 1 - 7 / 3
    assert both.reward == pytest.approx(7 / 3)
    assert both.reward_error == pytest.approx(math.sqrt((2 * off) ** 2 + (5 - 7 / 3) ** 2) / 3)
    with pytest.raises(ValueError, match="p: the log-ratio to the reference is not finite for completion 0"):
        a_point(math.nan, 1)
    with pytest.raises(ValueError, match="no completion"):
        point("p", *[np.zeros(0)] * 4, np.zeros(0, int))
    assert shown(None) == "–" and shown(1.0, 0.25) == "1.000 ± 0.250"


# --- log-probs and samples of models ------------------------------------------------------------------------------


def exact_logps(model, tokenizer, row, side) -> float:
    """The sum of the completion's log-probs from the model's own logits, in float64."""
    prompt, answer = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", side))
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model.double()(input_ids=torch.tensor([ids])).logits.log_softmax(dim=-1)
    return sum(float(logps[0, t - 1, ids[t]]) for t in range(len(prompt), len(ids)))


def encoded(rows, tokenizer):
    return list(data.encode(data.load(rows, kind="pair"), tokenizer, kind="pair"))


@pytest.mark.parametrize("layout", ["padded", "packed", "auto"])
def test_log_probs_of_pairs_are_those_of_the_models_logits(tmp_path, layout):
    tokenizer, rows = make_tokenizer(), make_rows(7)
    policy = Policy("policy", Source(lambda: (make_model(), tokenizer)))
    stages = Stages(tmp_path, block=3, batch_size=4, layout=layout, say=lambda line: None)
    logps, tokens = stages.logps("policy", policy, tokenizer, encoded(rows, tokenizer))
    for row, found, count in zip(rows, logps, tokens, strict=True):
        for k, side in enumerate(("chosen", "rejected")):
            assert found[k] == pytest.approx(exact_logps(make_model(), tokenizer, row, side), abs=2e-4)
            assert count[k] == len(row[side].split()) + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"policy-0000{b}.jsonl" for b in range(3)]


def test_the_reference_is_the_model_without_its_adapter(tmp_path):
    tokenizer, rows = make_tokenizer(), make_rows(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    source = Source(lambda: (peft.get_peft_model(make_model(), config), tokenizer))
    stages = Stages(tmp_path, say=lambda line: None)
    ids = encoded(rows, tokenizer)
    on, _ = stages.logps("policy", Policy("policy", source), tokenizer, ids)
    off, _ = stages.logps("reference", Policy("reference", source, adapter_off=True), tokenizer, ids)
    plain, _ = stages.logps("plain", Policy("plain", Source(lambda: (make_model(), tokenizer))), tokenizer, ids)
    assert off == pytest.approx(plain, abs=1e-4) and np.abs(on - off).max() > 0.1
    assert prompt_numbers([{"prompt": p} for p in ("a", "b", "a")]).tolist() == [0, 1, 0]


def test_kl_on_own_samples_is_that_of_the_whole_distributions(tmp_path):
    """k1 and k3 against Σ_t KL(π(·|prefix)‖π_ref(·|prefix)) at the prefixes that were drawn, from logits."""
    tokenizer = make_tokenizer()
    models = make_model(), make_model(initializer_range=0.27)
    own, theirs = (Policy(f"{k}", Source(lambda m=m: (m, tokenizer))) for k, m in enumerate(models))
    rows = [{"prompt": row["prompt"], "where": f"row {i}"} for i, row in enumerate(make_rows(16))]
    stages = Stages(tmp_path, block=8, batch_size=16, say=lambda line: None)
    lines = stages.samples("x", own, rows, 4, Sampling(max_new_tokens=6), scored=True)
    ratios = stages.log_ratios("x", theirs, lines)
    k1, k3 = (np.array([x for line in ratios for x in line[key]]) for key in ("k1", "k3"))
    exact = []
    for line in lines:
        for ids in line["ids"]:
            with torch.no_grad():
                row = torch.tensor([[*line["prompt_ids"], *ids]])
                p, q = (m(input_ids=row).logits[0].double().log_softmax(dim=-1) for m in models)
            at = slice(len(line["prompt_ids"]) - 1, -1)
            exact.append(float((p.exp() * (p - q)).sum(dim=-1)[at].sum()))
    exact = np.array(exact)
    assert exact.mean() > 0.05
    for estimate in (k1, k3):
        off = estimate - exact
        assert abs(off.mean()) < 4 * off.std() / math.sqrt(len(off))
    assert (k3 >= 0).all() and (k3 - exact).std() < (k1 - exact).std()
    same = stages.log_ratios("same", own, lines)
    assert max(abs(x) for line in same for x in line["k1"]) < 1e-5


class Shorter(Judge):
    """Compares, and does not score: the shorter completion wins."""

    def compare(self, prompts, first, second, **columns):
        gap = torch.tensor([float(len(b) - len(a)) for a, b in zip(first, second, strict=True)])
        return (gap.sign() + 1) / 2


def test_a_judge_that_only_compares_rewards_by_wins_over_the_start(tmp_path):
    stages = Stages(tmp_path, say=lambda line: None)
    rows = [{"prompt": "w1", "where": "a"}, {"prompt": "w2", "where": "b"}]
    start = [{"completions": ["xx", "xx"], "ids": [[1], [1]]}] * 2
    lines = [{"completions": ["x", "xx"], "ids": [[1], [1]]}, {"completions": ["xxx", "x"], "ids": [[1], [1]]}]
    assert stages.rewards("p", Shorter(), rows, lines, start).tolist() == [[1, 0.5], [0, 1]]
    games, places = stages.games(Shorter(), rows, {"start": start, "p": lines})
    assert games.score.tolist() == [0, 0.5, 1, 0] and games.prompts.tolist() == [0, 0, 1, 1] and places == {}


# --- the command --------------------------------------------------------------------------------------------------

SHORT = """
import math

def few(prompts, completions, **columns):
    return [-float(len(c.split())) for c in completions]

def none(prompts, completions, **columns):
    return [None for _ in completions]

def hot(prompts, completions, **columns):
    return [c.split().count("w5") / max(len(c.split()), 1) for c in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, runs that began with it, pairs, prompts, and reward functions."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()

    def save(model, folder, options=None):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if options is not None:
            (folder / "config.yaml").write_text(json.dumps(options))

    save(make_model(), home / "model")
    save(make_model(initializer_range=0.2), home / "run", {"model": str(home / "model"), "set": {"beta": 0.4}})
    save(make_model(2), home / "untold")
    adapted = peft.get_peft_model(
        make_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(home / "model")
    save(adapted, home / "adapter", {"model": str(home / "model")})
    pairs = [{**row, "prob": 0.5 + i / 40} for i, row in enumerate(make_rows(12))]
    for name, rows in (("pairs", pairs), ("prompts", [{"prompt": row["prompt"]} for row in pairs[:6]])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "short.py").write_text(SHORT)
    return home


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))


def evaluate(measure, *words) -> int:
    return cli.main(["evaluate", measure, *map(str, words), "--cpu"])


def killed_after(monkeypatch, blocks: int):
    """Stops the process's work, as Ctrl-C does, before block number `blocks` is written."""
    write, count = run_folder.write_lines, []

    def stopping(path, rows):
        if path.parent.name == "blocks":
            count.append(path)
            if len(count) > blocks:
                raise KeyboardInterrupt
        write(path, rows)

    monkeypatch.setattr(run_folder, "write_lines", stopping)


def test_ranking_of_a_run_is_killed_and_resumed_to_the_same_files(home, tmp_path, capsys, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = (home / "run", "--data", home / "pairs.jsonl", "--block", 5, "--batch-size", 4)
    assert evaluate("ranking", *words, "--output-dir", whole) == 0
    text = capsys.readouterr().out
    assert "blocks: policy 5 of 12 pairs" in text and "blocks: reference 12 of 12 pairs" in text
    assert "ranks chosen above rejected" in text and (whole / "report.md").read_text() in text
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        assert evaluate("ranking", *words, "--output-dir", cut) == 130
    assert "the same command with --resume goes on from it" in capsys.readouterr().err
    done = {p: p.stat().st_mtime_ns for p in (cut / "blocks").iterdir()}
    assert len(done) == 4
    assert evaluate("ranking", *words, "--output-dir", cut) == 2
    assert "has an earlier evaluation: --resume goes on with it" in capsys.readouterr().err
    assert evaluate("ranking", *words, "--output-dir", cut, "--resume", "--beta", 2) == 2
    assert "another evaluation" not in (error := capsys.readouterr().err) and "other settings (--beta)" in error
    assert evaluate("ranking", *words, "--output-dir", cut, "--resume") == 0
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())
    for name in ("pairs.jsonl", "report.md", "evaluation.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name

    report = json.loads((whole / "report.json").read_text())
    figures, lines = report["ranking"], [json.loads(line) for line in (whole / "pairs.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer()
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    models = make_model(initializer_range=0.2), make_model()
    exact = [[[exact_logps(m, tokenizer, row, s) for s in ("chosen", "rejected")] for row in rows] for m in models]
    found = [[line[name] for line in lines] for name in ("policy", "reference")]
    assert np.array(found) == pytest.approx(np.array(exact), abs=2e-4)
    margins = [[w - l for w, l in side] for side in exact]  # noqa: E741
    assert figures["policy"]["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins[0]]))
    ideal = [m + math.log(row["prob"] / (1 - row["prob"])) / 0.4 > 0 for m, row in zip(margins[1], rows, strict=True)]
    assert figures["idealised"][0]["beta"] == 0.4 and figures["idealised"][0]["accuracy"] == pytest.approx(
        np.mean(ideal)
    )
    assert [line["flip"] for line in lines] == [FLIPS[k] for k in flips(*map(np.array, reversed(margins)))]
    assert lines[1]["where"].endswith("pairs.jsonl:2")

    other = ("--overwrite", "--beta", 2, "--beta", 0.1, "--max-rows", 7)
    assert evaluate("ranking", *words, "--output-dir", cut, *other) == 0
    again = json.loads((cut / "report.json").read_text())["ranking"]
    assert again["pairs"] == 7 and [x["beta"] for x in again["idealised"]] == [2, 0.1]


def test_ranking_of_an_adapter_with_labels_by_a_judge(home, tmp_path):
    words = (home / "adapter", "--data", home / "pairs.jsonl", "--output-dir", tmp_path / "out")
    assert evaluate("ranking", *words, "--judge", f"function:{home}/short.py:few") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    gaps = [len(row["rejected"].split()) - len(row["chosen"].split()) for row in rows]
    assert [line["alpha"] for line in lines] == [(np.sign(g) + 1) / 2 for g in gaps]
    plain = exact_logps(make_model(), make_tokenizer(), rows[0], "chosen")
    assert lines[0]["reference"][0] == pytest.approx(plain, abs=2e-4) != pytest.approx(lines[0]["policy"][0], abs=1e-2)


def test_wins_of_three_policies(home, tmp_path, capsys):
    out = tmp_path / "out"
    words = (home / "model", home / "run", home / "adapter", "--data", home / "prompts.jsonl", "--output-dir", out)
    judged = ("--judge", f"function:{home}/short.py:few", "--num-generations", 2, "--max-new-tokens", 6, "--block", 4)
    assert evaluate("wins", *words, *judged, "--prior", 1) == 0
    report = json.loads((out / "report.json").read_text())
    assert [(r["first"], r["second"], r["games"]) for r in report["win_rates"]] == [
        ("model", "run", 12), ("model", "adapter", 12), ("run", "adapter", 12),
    ]  # fmt: skip
    samples = [run_folder.read_blocks(out / "blocks", f"samples-{k}") for k in (1, 2)]
    gaps = [
        len(b.split()) - len(a.split())
        for one, other in zip(*samples, strict=True)
        for a, b in zip(one["completions"], other["completions"], strict=True)
    ]
    assert report["win_rates"][0]["rate"] == pytest.approx(np.mean([(np.sign(g) + 1) / 2 for g in gaps]))
    elos = {p["name"]: p["elo"] for p in report["elo"]["policies"]}
    assert sum(elos.values()) == pytest.approx(3000) and report["no_elo"] is None
    assert "| policy | Elo | 95% interval |" in (out / "report.md").read_text()
    # A policy against itself ties every game, and a judge without a verdict leaves no Elo.
    capsys.readouterr()
    words = (home / "model", home / "model", "--data", home / "prompts.jsonl", "--max-new-tokens", 3)
    assert evaluate("wins", *words, "--judge", f"function:{home}/short.py:few", "--output-dir", tmp_path / "same") == 0
    assert "| model 1 against model 2 | 0.500 ± 0.000 | 0 | 6 | 0 | 0 |" in capsys.readouterr().out
    assert evaluate("wins", *words, "--judge", f"function:{home}/short.py:none", "--output-dir", tmp_path / "none") == 0
    assert "No Elo: none of 6 games has a verdict" in capsys.readouterr().out


def test_the_frontier_of_a_planted_reward_rises_with_kl(home, tmp_path, capsys):
    """Checkpoints whose head's bias makes one token ever likelier; the reward is its share."""
    pytest.importorskip("matplotlib")
    run, tokenizer = tmp_path / "run", make_tokenizer()
    config = transformers.PhiConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config)
    folders = [tmp_path / "start", *(run / f"checkpoint-{k}" for k in (5, 10, 20)), run]
    for t, folder in zip((0.0, 1.5, 3.0, 4.5, 4.5), folders, strict=True):
        with torch.no_grad():
            model.lm_head.bias.zero_()
            model.lm_head.bias[tokenizer.convert_tokens_to_ids("w5")] = t
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if folder.name.startswith("checkpoint"):
            (folder / "trainer_state.json").write_text("{}")
    (run / "config.yaml").write_text(json.dumps({"model": str(tmp_path / "start")}))
    assert [name for name, _ in policies.checkpoints(str(run))] == ["step 5", "step 10", "step 20"]
    words = (run, "--data", home / "prompts.jsonl", "--judge", f"function:{home}/short.py:hot", "--num-generations", 8)
    words = (*words, "--max-new-tokens", 8, "--output-dir", tmp_path / "out")
    assert evaluate("frontier", *words) == 0
    assert "| policy | KL, k1 | KL, k3 | reward |" in capsys.readouterr().out
    points = json.loads((tmp_path / "out" / "report.json").read_text())["points"]
    assert [p["name"] for p in points] == ["start", "step 5", "step 10", "step 20"]
    assert points[0]["kl"] == pytest.approx(0, abs=1e-5) and all(p["on_frontier"] for p in points)
    for a, b in itertools.pairwise(points):
        assert b["k3"] - a["k3"] > 2 * b["k3_error"] and b["reward"] - a["reward"] > 2 * b["reward_error"]
        assert abs(b["kl"] - b["k3"]) < 4 * (b["kl_error"] + b["k3_error"])
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rankings", "{home}/run"], "did you mean ranking?"),
        (["ranking", "{home}/runn"], "no such folder"),
        (["ranking", "{home}/run", "{home}/model"], "ranking measures one run, got"),
        (["ranking", "{home}/untold"], "name it, --reference MODEL"),
        (["ranking", "{home}/run", "--prior", "1"], "--prior is for wins: ranking has no use for it"),
        (["ranking", "{home}/run", "--beta", "0"], "--beta must be positive, got 0"),
        (["ranking", "{home}/run", "--label-smoothing", "2"], "--label-smoothing must be in [0, 1], got 2"),
        (["ranking", "{home}/run", "--judge-tokenizer", "x"], "--judge-tokenizer is for --judge server:URL"),
        (["ranking", "{home}/run", "--judge", "llm:x", "--label-smoothing", "0.1"], "choose one"),
        (["ranking", "{home}/run", "--max-rows", "0"], "--max-rows must be at least 1, got 0"),
        (["ranking", "{home}/run", "--resume"], "--resume: no evaluation in"),
        (["ranking", "{home}/run", "--resume", "--overwrite"], "choose one"),
        (["ranking", "{home}/run", "--output-dir", "{home}"], "is not empty and holds no evaluation"),
        (["wins", "{home}/run"], "name two or more, got"),
        (["wins", "{home}/run", "{home}/model"], "wins needs --judge"),
        (["wins", "{home}/run", "{home}/model", "--judge", "llm"], "name the model that judges, as llm:MODEL"),
        (["wins", "{home}/run", "{home}/model", "--judge", "reword:x"], "--judge reword:x: expected reward:FOLDER"),
        (["wins", "{home}/run", "{home}/modal", "--judge", "function:{home}/short.py:few"], "did you mean model"),
        (["wins", "{home}/run", "{home}/model", "--interval", "walt"], "did you mean wald?"),
        (["frontier", "{home}/run", "--temperature", "0"], "--temperature is for wins: frontier has no use for it"),
        (["frontier", "{home}/nothing", "--judge", "function:{home}/short.py:few"], "no such folder"),
    ],
)
def test_refusals_of_the_command(home, tmp_path, capsys, words, message):
    given = [word.format(home=home) for word in words]
    if "--output-dir" not in given:
        given += ["--output-dir", str(tmp_path / "out")]
    with contextlib.suppress(SystemExit):
        assert cli.main(["evaluate", *given, "--data", str(home / "prompts.jsonl"), "--cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "blocks").exists()


def test_the_options_are_those_of_the_measures():
    parser = cli.parsers()["evaluate"]
    assert INTERVALS == MEASURES_INTERVALS == tuple(parser.named("interval").choices)
    named = {action.dest for action in parser.documented()}
    assert {name for names in MEASURES.values() for name in names} <= named


def test_no_rows(home, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("")
    assert evaluate("ranking", home / "run", "--data", tmp_path / "none.jsonl", "--output-dir", tmp_path / "out") == 2
    assert "none.jsonl" in capsys.readouterr().err
