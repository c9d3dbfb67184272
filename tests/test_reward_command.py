"""`xpo-fast reward` and `eval-reward` from end to end on a tiny model, and the figures of their report by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.report import (
    PairScores,
    best_scale,
    by_length_gap,
    calibration,
    compare,
    plot,
    score_pairs,
    standard_error,
    summary,
    wilson,
)

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rated = [{**row, "helpful": i / 8, "safe": None if i % 3 else 1} for i, row in enumerate(make_rows(16, "unpaired"))]
    lists = [{**row, "scores": [2.0, 1.0, 2.0]} for row in make_lists(6)]
    for name, rows in (("pairs", make_rows(16)), ("rated", rated), ("lists", lists)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_lists(count: int) -> list[dict]:
    pairs = make_rows(count)
    return [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"], " w1"]} for r in pairs]


def run(*options) -> int:
    return cli.main([str(option) for option in options])


def train(home, output, *options, data="pairs.jsonl") -> int:
    return run(
        "reward",
        "--data",
        home / data,
        "--model",
        home / "model",
        "--output-dir",
        output,
        "--cpu",
        "--batch-size",
        4,
        "--logging-steps",
        1,
        "--lora-targets",
        "q_proj,v_proj",
        "--max-length",
        64,
        *options,
    )


# --- commands -----------------------------------------------------------------------------------------------------


def test_train_resume_and_measure(home, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "reward"
    common = ("--eval-split", 4, "--lr", 0.02, "--set", "center=0.01")
    assert train(home, out, *common, "--max-steps", 2, "--save-steps", 2) == 0
    assert train(home, out, *common) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert train(home, out, *common, "--max-steps", 6, "--resume") == 0
    text = capsys.readouterr().out
    assert "12 rows to train on, 4 held out" in text and "log_loss" in text
    steps = [json.loads(line)["step"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert max(steps) == 6
    results = json.loads((out / "results.json").read_text())
    assert results["after"]["pairs"] == 4 and results["before"]["loss"] != results["after"]["loss"]
    # bradley_terry without smoothing: the loss is the log-loss of the margins and what centring adds
    assert results["after"]["loss"] > results["after"]["log_loss"] > results["after"]["loss"] - 0.5
    assert results["after"]["rewards/accuracies"] == pytest.approx(results["after"]["accuracy"])
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    measured = tmp_path / "measured"
    assert (
        run(
            "eval-reward",
            "--data",
            home / "pairs.jsonl",
            "--model",
            out,
            "--model",
            out,
            "--ensemble",
            "worst",
            "--policy",
            out,
            "--beta",
            0.5,
            "--output-dir",
            measured,
            "--cpu",
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "ensemble (worst)" in text and "the longer completion" in text and "the same choice in 100.0%" in text
    report = json.loads((measured / "report.json").read_text())
    assert [row["name"] for row in report["scorers"]] == [
        "reward 1",
        "reward 2",
        "ensemble (worst)",
        "reward 3",
    ]
    assert len(report["comparisons"]) == 6
    one, two, both, implicit = report["scorers"]
    assert one["accuracy"] == two["accuracy"] == both["accuracy"] and one["log_loss"] != implicit["log_loss"]
    lines = [json.loads(line) for line in (measured / "scores.jsonl").read_text().splitlines()]
    rows = make_rows(16)
    expected = RewardModel.load(out).score([r["prompt"] for r in rows], [r["chosen"] for r in rows])
    assert [line["reward 1"][0] for line in lines] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in measured.glob("*.png"))
    assert len(list(measured.glob("*.png"))) == 4 + 3


def test_objectives_then_a_gate(home, tmp_path):
    rated, gated = tmp_path / "rated", tmp_path / "gated"
    names = ("--objectives", "helpful,safe", "--max-steps", 2, "--eval-split", 4)
    assert train(home, rated, "--method", "regression", "--head-only", *names, data="rated.jsonl") == 0
    spec = RewardModel.load(rated).spec
    assert spec.objectives == ("helpful", "safe") and spec.outputs == 2
    assert train(home, gated, "--method", "gated", "--model", rated, *names[2:]) == 0
    before, after = RewardModel.load(rated), RewardModel.load(gated)
    a, b = (model.outputs(["w1 w2"], [" w3"]) for model in (before, after))
    assert b.shape == (1, 4) and b[0, :2].tolist() == pytest.approx(a[0].tolist(), rel=1e-4, abs=1e-5)


def test_lists_are_trained_on_and_measured_as_pairs(home, tmp_path):
    out, measured = tmp_path / "ranked", tmp_path / "measured"
    assert (
        train(
            home,
            out,
            "--method",
            "k_wise",
            "--full",
            "--group-by-length",
            "--max-steps",
            1,
            data="lists.jsonl",
        )
        == 0
    )
    options = ("--data", home / "lists.jsonl", "--model", out, "--output-dir", measured, "--cpu")
    assert run("eval-reward", *options, "--length-alpha", 2) == 0
    report = json.loads((measured / "report.json").read_text())
    (said,) = report["scorers"]
    assert said["pairs"] == 6 * 2 and said["prompts"] == 6  # two completions of each list beat the third
    assert "log_loss" not in said  # divided by lengths they are no logits
    assert run("eval-reward", *options, "--max-pairs", 5) == 0
    assert json.loads((measured / "report.json").read_text())["scorers"][0]["pairs"] == 5


def test_preference_models_are_measured_by_their_probabilities(home, tmp_path):
    out = tmp_path / "preference"
    assert train(home, out, "--method", "preference_model", "--max-steps", 1, "--eval-split", 0) == 0
    model = RewardModel.load(out)
    rows = make_rows(5)
    scores = score_pairs("p", model, rows)
    p = model.compare(*([row[name] for row in rows] for name in ("prompt", "chosen", "rejected")))
    assert 1 / (1 + np.exp(-scores.margin)) == pytest.approx(p.numpy(), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["eval-reward"], "give --model (a reward model) or --policy"),
        (["eval-reward", "--model", "x", "--ensemble", "mean"], "two or more --model, got 1"),
        (["eval-reward", "--policy", "{home}/model"], "no adapter, whose base model would be the reference"),
        (["eval-reward", "--model", "{home}/model"], "expected a folder with reward_model.json"),
        (["reward", "--set", "beta=1"], "no hyperparameter beta"),
        (["reward", "--method", "gated"], "gated has objectives, 2 or more; got reward: name them"),
        (["reward", "--method", "regression", "--objectives", "colour"], "colour missing"),
    ],
)
def test_mistakes(home, tmp_path, options, message, capsys):
    options = [option.format(home=home) for option in options]
    assert run(*options, "--data", home / "pairs.jsonl", "--output-dir", tmp_path) == 2
    assert message in capsys.readouterr().err


# --- figures ------------------------------------------------------------------------------------------------------


def scores(margins, gaps=None, name="a") -> PairScores:
    margins = np.array(margins, float)
    gaps = np.zeros(len(margins)) if gaps is None else np.array(gaps, float)
    return PairScores(name, margins + 1, np.ones(len(margins)), 20 + gaps, np.full(len(margins), 20.0))


def test_summary_by_hand():
    # Right, right, tied, wrong: (1 + 1 + ½ + 0) / 4; standard error √(mean((¾)² … )/4).
    found = summary(scores([2.0, 1.0, 0.0, -1.0], [5, -5, 0, 2]))
    assert found["accuracy"] == 0.625 and found["ties"] == 1
    deviations = [0.375, 0.375, -0.125, -0.625]
    assert found["standard_error"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 4 / 4))
    assert found["margin_mean"] == 0.5 and found["chosen_mean"] == 1.5 and found["rejected_mean"] == 1
    assert found["score_mean"] == 1.25 and found["rejected_std"] == 0
    log_loss = sum(math.log(1 + math.exp(-m)) for m in (2, 1, 0, -1)) / 4
    assert found["log_loss"] == pytest.approx(log_loss)
    assert found["longer_wins"] == (1 + 0 + 0.5 + 1) / 4
    low, high = wilson(0.5, 100)  # 0.5 ± 1.96·√(0.0025 + 1.96²/40000)/(1 + 1.96²/100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_pairs_of_one_prompt_are_one_observation():
    """Each pair thrice: the accuracy, its standard error and its interval are those of the pairs once."""
    margins = [2.0, 1.0, -1.0, 3.0]
    once = summary(scores(margins))
    thrice = summary(dataclasses.replace(scores(margins * 3), prompts=np.arange(12) % 4))
    alone = summary(dataclasses.replace(scores(margins * 3), prompts=np.arange(12)))
    for name in ("accuracy", "standard_error", "accuracy_95", "prompts"):
        assert thrice[name] == pytest.approx(once[name])
    assert alone["standard_error"] == pytest.approx(once["standard_error"] / math.sqrt(3))
    pair = [dataclasses.replace(scores(m), prompts=np.array([0, 0, 1])) for m in ([1, 1, 1], [-1, -1, 1])]
    assert compare(*pair)["standard_error"] == pytest.approx(math.sqrt(2 * (2 / 3) ** 2) / 3)
    assert compare(*pair)["standard_error"] == standard_error(np.array([1.0, 1.0, 0.0]), np.array([0, 0, 1]))


def test_calibration_by_hand():
    # σ(|m|) = 0.525, 0.525, 0.93: in the bins from 0.5 and from 0.9.
    m = math.log(0.525 / 0.475), math.log(0.93 / 0.07)
    rows = calibration(np.array([m[0], -m[0], m[1]]))
    assert [(row["from"], row["pairs"], row["accuracy"]) for row in rows] == [(0.5, 2, 0.5), (0.9, 1, 1.0)]
    assert [row["confidence"] for row in rows] == pytest.approx([0.525, 0.93])
    error = summary(scores([m[0], -m[0], m[1]]))["calibration_error"]
    assert error == pytest.approx((2 * 0.025 + 0.07) / 3)
    # A scorer that is sure and right 3 times of 4 is calibrated at log 3: s·8 = log 3.
    assert best_scale(np.array([8.0, 8.0, 8.0, -8.0])) == pytest.approx(math.log(3) / 8)
    assert best_scale(np.array([1.0, 2.0, 0.0])) is None


def test_accuracy_by_length_gap():
    rows = by_length_gap(scores([1, -1, 1, 1, -1, -1], [-30, -20, -10, 10, 20, 30]), bins=3)
    assert [(row["from"], row["to"], row["accuracy"], row["pairs"]) for row in rows] == [
        (-30, -20, 0.5, 2), (-10, 10, 1.0, 2), (20, 30, 0.0, 2)]  # fmt: skip
    assert len(by_length_gap(scores([1, -1], [3, 3]))) == 1  # all gaps alike
    assert summary(scores([0.0, 0.0], [10, 20]))["length_correlation"] is None  # all scores alike


def test_two_scorers_on_the_same_pairs():
    found = compare(scores([1, 1, -1, -1]), scores([2, -3, -1, 4], name="b"))
    assert found["accuracy_difference"] == 0 and found["same_choice"] == 0.5
    assert found["standard_error"] == pytest.approx(math.sqrt(0.5 / 4))  # differences 0, 1, 0, −1
    same = compare(scores([1, 2, 3]), scores([10, 20, 900], name="b"))
    assert same["margin_rank_correlation"] == pytest.approx(1) and same["standard_error"] == 0
    with pytest.raises(ValueError, match="the same pairs, a has 2 and b 1"):
        compare(scores([1, 2]), scores([1], name="b"))
    with pytest.raises(ValueError, match="1 of 2 pairs have a score that is not finite, the first is pair 1"):
        scores([1, math.nan])


def test_plots_of_odd_data(tmp_path):
    pytest.importorskip("matplotlib")
    for k, odd in enumerate((scores([0.0]), scores([1.0] * 3, [7, 7, 7]), scores([1e8, -1e8]))):
        plot(odd, tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").read_bytes().startswith(b"\x89PNG")
