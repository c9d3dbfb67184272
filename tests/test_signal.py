"""No signal, said: each cause once on series of numbers and once planted in a run; none on runs that learn."""

from __future__ import annotations

import json
import logging
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import test_rl
import test_trainer
from ranks import run_world
from test_rl import share_of_even
from test_trainer import PEFT_WARNING, lora, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.cli import options
from xpo_fast.resume import last_checkpoint
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer
from xpo_fast.rl.collect import Completion, told_apart
from xpo_fast.trainer import NoSignalError, XPOConfig, XPOTrainer, signal
from xpo_fast.trainer.reference import row_logps
from xpo_fast.trainer.signal import ON_NO_SIGNAL, STEPS, About, Watcher

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*are trained with a learning rate of:UserWarning"),
]
RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
ROLLOUT = {"completions": 8, "groups": 2, "reward/least": 0.0, "reward/most": 1.0, "cut": 0.25, "cut/spread": 1.0}
ROLLOUT |= {"groups/alike": 0.5, "groups/same": 0.0}
STEP = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "moved": 1.0}
REWARDS = {"rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3}
ABOUT = About()
ONLINE = About(True, "correct", 32, 0.7)


def watched(series: list[dict], about: About = ABOUT, **how) -> list[tuple[int, str, str]]:
    """(step, cause, text) of what is found in a series."""
    watcher = Watcher(about=about, **how)
    found = [(k, watcher.step(numbers)) for k, numbers in enumerate(series, start=1)]
    assert all(f is None or f.level == "fault" for _, f in found)
    return [(k, f.check, f.text) for k, f in found if f is not None]


def on_device(numbers: dict) -> dict:
    """The numbers as a run has them."""
    waiting = ("loss", "grad_norm", "moved", *REWARDS)
    return {n: torch.tensor(x, dtype=torch.float64) if n in waiting else x for n, x in numbers.items()}


def steps(count: int = 12, **changed) -> list[dict]:
    """A series whose loss differs from step to step."""
    return [{**STEP, "loss": 0.5 + k / 100, **changed} for k in range(count)]


# name: (series, what it is about, cause, words of the text)
PLANTED = {
    "cut, and alike": (
        steps(**{**ROLLOUT, "cut": 0.97, "reward/most": 0.0, "cut/spread": 0.0, "groups/alike": 1.0}),
        ONLINE, "completions", "97% of 40 completions are cut at max_new_tokens=32, and score alike: raise",
    ),
    "cut, and a few that end score": (
        steps(**{**ROLLOUT, "cut": 0.97, "cut/spread": 0.0}), ONLINE, "completions", "97% of 40",
    ),
    "cut, and masked": (
        steps(**{**ROLLOUT, "cut": 1.0}), About(True, "", 32, 1.0, masks_cut=True), "completions", "overlong",
    ),
    "one reward": (
        steps(**{**ROLLOUT, "reward/least": 0.25, "reward/most": 0.25}), ONLINE, "rewards",
        "each of 40 completions has the reward 0.25: they are not told apart (correct)",
    ),
    "groups alike": (steps(**{**ROLLOUT, "groups/alike": 1.0}), ONLINE, "groups", "each of 10 prompts have equal"),
    "the same text": (
        steps(**{**ROLLOUT, "groups/alike": 1.0, "groups/same": 1.0}), ONLINE, "groups", "temperature=0.7. Raise",
    ),
    "no gradient": (steps(grad_norm=0.0), About(), "gradient", "exactly 0 in each of the first 5 steps"),
    "no gradient of rewards that differ": (steps(grad_norm=0.0, **ROLLOUT), ONLINE, "gradient", "although rewards"),
    "no gradient of ties": (
        steps(grad_norm=0.0, **{**REWARDS, "rewards/margins": 0.0}), About(), "gradient", "max_length?",
    ),
    "no gradient at the reference": (
        steps(grad_norm=0.0, **dict.fromkeys(REWARDS, 0.0), **{"logps/chosen": -9.0, "logps/rejected": -8.0}), ABOUT,
        "gradient", "does not depend",
    ),
    "rate 0": (steps(learning_rate=0.0), About(), "learning rate", "0 in each of 5 steps in a row"),
    "ties": (
        steps(**{"rewards/chosen": 0.3, "rewards/rejected": 0.3, "rewards/margins": 1e-9}), About(), "pairs", "cut at",
    ),
    "weights that stay": (steps(moved=0.0), About(), "weights", "0% of the weights"),
    "bfloat16": (steps(moved=0.02), About(dtype="torch.bfloat16"), "weights", "half a step of torch.bfloat16"),
    "the reference itself": (
        steps(**dict.fromkeys(REWARDS, 0.0)), About(), "reference", "after 4 steps with a gradient, the loss is 0.54",
    ),
    "the reference itself, of one kind of rows": (
        steps(**{"rewards/chosen": 0.0, "rewards/rejected": math.nan}), About(), "reference", "after 4 steps",
    ),
    "the reference itself, at a large β": (steps(**dict.fromkeys(REWARDS, 5e-5)), About(beta=10.0), "reference", "is"),
    "one loss": ([{**STEP}] * 12, About(), "loss", "exactly 0.5 in each of 5 steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_cause_is_named_once_after_five_steps(name):
    series, about, cause, words = PLANTED[name]
    ((step, check, text),) = watched(series, about)
    assert (step, check) == (STEPS, cause) and words in text and "\n" not in text
    assert [(k, c) for k, c, _ in watched([*map(on_device, series)], about)] == [(step, cause)]
    if cause != "learning rate":  # one step that differs among the five, and it is no cause
        other = {**STEP, **(ROLLOUT if about.online else REWARDS), "loss": 9.0}
        other |= {"cut": 0.5, "reward/least": -3.0} if about.online else {}
        moved = [{**x, "moved": 1.0} for x in series]
        assert not watched([*moved[:3], other, *moved[4:]], about)


CLEAN = {
    "policy = reference at the first step": [{**STEP, **dict.fromkeys(REWARDS, 0.0)}, *steps(**REWARDS)],
    "the first rate of a warm-up is 0": [{**STEP, "learning_rate": 0.0}, *steps()],
    "a long warm-up, in which nothing moves": [
        {**x, **dict.fromkeys(REWARDS, 0.0), "learning_rate": k / 1e6, "moved": 0.0} for k, x in enumerate(steps(40))
    ],
    "a warm-up whose first rate is not 0": [
        {**x, "learning_rate": (k + 1) / 1e6, "moved": 0.0} for k, x in enumerate(steps(40))
    ],
    "a tiny β": [
        {**STEP, "loss": math.log(2), "rewards/chosen": k / 1e8, "rewards/rejected": 0.0, "rewards/margins": k / 1e8}
        for k in range(12)
    ],
    "four steps": [{**x, "moved": 1.0} for x in steps(4, grad_norm=0.0)],
    "a critic's": steps(**{n: x for n, x in ROLLOUT.items() if "groups/" not in n}),
    "GRPO's loss": [{**STEP, **ROLLOUT, "loss": 0.0}] * 12,
    "solved after the first steps": [
        *steps(5, **ROLLOUT), *steps(20, **{**ROLLOUT, "groups/alike": 1.0}, grad_norm=0.0),
    ],
    "several steps a rollout": [x if k % 4 == 0 else STEP for k, x in enumerate(steps(12, **ROLLOUT))],
    "nothing is known": [{}] * 12,
    "NaN": steps(loss=math.nan, grad_norm=math.nan, **dict.fromkeys(REWARDS, math.nan)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_named_of_a_run_that_learns(name):
    series = CLEAN[name]
    online = any("completions" in x for x in series)
    assert not watched(series, ONLINE if online else About(beta=1e-5 if name == "a tiny β" else 0.1), peak=1e-3)


def test_after_a_warm_up_the_policy_is_looked_at():
    """Five steps from half the rate asked for on, or from where the rate no longer rises."""
    rates = [0.0, 1e-4, 2e-4, 3e-4, 4e-4, *[5e-4] * 12]
    still = [{**x, "learning_rate": r} for x, r in zip(steps(17, moved=0.0), rates, strict=True)]
    assert [(k, c) for k, c, _ in watched(still, peak=1e-3)] == [(5 + STEPS, "weights")]
    assert [(k, c) for k, c, _ in watched(still, peak=1.0)] == [(6 + STEPS, "weights")]
    rates = [1e-3] * 6 + [0.0] * 9
    ended = [{**x, "learning_rate": r} for x, r in zip(steps(15), rates, strict=True)]
    assert [(k, c) for k, c, _ in watched(ended, peak=1e-3)] == [(6 + STEPS, "learning rate")]


def test_a_short_run_is_judged_at_its_end():
    for count, wanted in ((2, []), (3, [3]), (4, [4]), (5, [5]), (7, [5])):
        assert [k for k, *_ in watched(steps(count, grad_norm=0.0), last=count)] == wanted


@pytest.mark.parametrize("at", range(1, 12))
def test_a_resumed_watcher_says_the_same(at):
    for series, about, *_ in PLANTED.values():
        whole = watched(series, about)
        first, second = Watcher(about=about), Watcher(about=about)
        found = [(k, first.step(on_device(of))) for k, of in enumerate(series[:at], 1)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [(k, second.step(of)) for k, of in enumerate(series[at:], at + 1)]
        assert [(k, f.check) for k, f in found if f is not None] == [(k, c) for k, c, _ in whole]


def test_the_committed_runs_learn():
    """The logs of bench/results/verifiable-reward.json and reward-hh.json, those with shuffled rewards among them."""
    runs = json.loads((RESULTS / "verifiable-reward.json").read_text())["runs"]
    for run in runs:
        series = []
        for row in run["log"]:
            numbers = {name: row[name] for name in ("loss", "grad_norm", "learning_rate")}
            if "reward" in row:
                least, most = row["reward"] - row["reward_std"], row["reward"] + row["reward_std"]
                of_groups = {"groups/alike": row["frac_reward_zero_std"], "groups/same": 0.0}
                numbers |= {"completions": 32, "groups": 4, "reward/least": least, "reward/most": most}
                numbers |= {"cut": row["completions/clipped_ratio"], "cut/spread": 0.0}
                numbers |= {} if run["method"] == "ppo" else of_groups
            series.append(numbers)
        assert len(series) >= 30 and not watched(series, ONLINE, peak=3e-4)
    for run in json.loads((RESULTS / "reward-hh.json").read_text())["runs"]:
        names = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins")
        assert not watched([{n: row[n] for n in names} for row in run["log"]], peak=1e-4)


def test_what_tells_completions_apart_is_counted():
    def row(reward: float, ids: list[int], *, truncated: bool = False) -> Completion:
        return Completion("", [1], "", ids, truncated, None, [reward], reward)

    groups = [
        [row(1.0, [5]), row(1.0, [5]), row(math.nan, [5])],
        [row(2.0, [6], truncated=True), row(0.5, [7], truncated=True), row(2.0, [6])],
    ]
    expected = {"completions": 6, "groups": 2, "reward/least": 0.5, "reward/most": 2.0, "cut": 1 / 3, "cut/spread": 1.5}
    assert told_apart(groups, compared=False) == expected
    assert told_apart(groups, compared=True) == {**expected, "groups/alike": 0.5, "groups/same": 0.5}


# --- runs -------------------------------------------------------------------------------------------------------------


def lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("no signal")]


def rl(folder: Path, reward=share_of_even, **args):
    return test_rl.make_trainer(folder, reward, **{"max_steps": 6, "preflight": "off", "logging_steps": 10, **args})


def dpo(folder: Path, **args):
    return test_trainer.make_trainer(folder, **{"max_steps": 6, "preflight": "off", "logging_steps": 10, **args})


def reward_model(folder: Path, rows: list[dict] | None = None, **args) -> RewardTrainer:
    defaults = {
        "output_dir": str(folder / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 6, "preflight": "off",
    }  # fmt: skip
    config, rows = RewardConfig(**{**defaults, **args}), make_rows(8) if rows is None else rows
    return RewardTrainer(make_model(), config, train_dataset=rows, processing_class=make_tokenizer())


def same_rows(trainer):
    """The rejected completions are the chosen ones."""
    rows = trainer.train_dataset
    trainer.train_dataset = rows.remove_columns("rejected_ids").add_column("rejected_ids", rows["chosen_ids"])
    return trainer


def follows(trainer):
    """The reference is the model in training."""
    trainer.prepare()
    trainer._live.__class__ = type(
        "Follows", (type(trainer._live),), {"logps": lambda self, model, rows: own(trainer, model, rows)}
    )
    return trainer


def own(trainer, model, rows):
    return row_logps(model, *rows, backend="auto")[:, 0]


def other_optimizer(folder: Path):
    """An optimizer of the weights of another copy of the model."""
    config = XPOConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=6, preflight="off",
        per_device_train_batch_size=4, reference="copy",
    )  # fmt: skip
    held = torch.optim.AdamW(make_model(seed=1).parameters(), lr=1e-2)
    how = {"processing_class": make_tokenizer(), "optimizers": (held, None)}
    return XPOTrainer(make_model(), config, train_dataset=make_rows(8), **how)


def by_prompt(prompts, **_):
    return [float(len(p)) for p in prompts]


def if_it_ends(completion_ids, **_):
    return [float(ids[-1] == 1) for ids in completion_ids]


def endless():
    """A model to which an EOS is hardly ever the next token."""
    made = make_model()
    with torch.no_grad():
        made.lm_head.weight[1] = 0
    return made


def cut_off():
    """A model whose weights in training have values that reach the loss, and gradients that do not."""
    made = make_model()
    made.lm_head.weight.requires_grad_(False)
    made.model.norm.register_forward_hook(lambda module, given, out: out.detach() + 0 * out)
    return made


RUNS = {
    "constant reward": (partial(rl, reward=lambda completion_ids, **_: [0.0] * len(completion_ids)), "rewards"),
    "reward of the prompt": (partial(rl, reward=by_prompt), "groups"),
    "frozen sampling": (partial(rl, temperature=1e-4, max_new_tokens=3), "groups: .*same text"),
    "never ends": (lambda folder: rl(folder, if_it_ends, model=endless(), max_new_tokens=2), "completions: 100% of 40"),
    "cut and masked": (lambda folder: rl(folder, model=endless(), overlong="mask"), "completions: .*overlong"),
    "rl at rate 0": (partial(rl, learning_rate=0.0), "learning rate"),
    "several steps a rollout": (partial(rl, reward=by_prompt, prompts_per_rollout=4, epochs_per_rollout=2), "groups"),
    "dpo at rate 0": (partial(dpo, learning_rate=0.0), "learning rate"),
    "the same pairs": (lambda folder: same_rows(dpo(folder, reference="copy")), "gradient: .*max_length|pairs"),
    "the same pairs, by length": (lambda folder: same_rows(dpo(folder, method="simpo")), "gradient|pairs"),
    "follows": (lambda folder: follows(dpo(folder, reference="copy")), "reference"),
    "another optimizer": (other_optimizer, "weights: 0%"),
    "bfloat16": (
        lambda folder: dpo(folder, model=make_model().to(torch.bfloat16), learning_rate=1e-6), "weights: .*bfloat16",
    ),
    "cut off": (lambda folder: dpo(folder, model=cut_off(), reference="copy"), "gradient: .*does not depend"),
    "a reward model of the same": (lambda folder: same_rows(reward_model(folder)), "gradient|pairs"),
    "a reward model at rate 0": (partial(reward_model, learning_rate=0.0), "learning rate"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_planted_cause_is_named_within_five_steps(tmp_path, caplog, name):
    make, wanted = RUNS[name]
    made = make(tmp_path)
    made.train()
    (line,) = lines(caplog)
    assert line.startswith(f"no signal after step {STEPS}: ")
    assert re.search(wanted, line), line
    assert made.state.global_step == 6


LEARN = {
    "grpo": partial(rl, learning_rate=1e-6),
    "grpo, lora": lambda folder: rl(folder, peft_config=lora(), learning_rate=1e-6),
    "ppo, one completion a prompt": partial(rl, method="ppo", num_generations=1, per_device_train_batch_size=4),
    "dpo, all weights at the least rate": partial(dpo, learning_rate=1e-6),
    "dpo, lora": lambda folder: dpo(folder, peft_config=lora(), learning_rate=5e-5, warmup_steps=3),
    "dpo, cached": partial(dpo, reference="cached", learning_rate=1e-6),
    "dpo, steps in the backward": partial(dpo, optimizer_in_backward=True, learning_rate=1e-6),
    "kto": partial(dpo, method="kto", learning_rate=1e-6),
    "sft": partial(dpo, method="sft", learning_rate=1e-6),
    "orpo, half precision": lambda f: dpo(f, method="orpo", model=make_model().to(torch.bfloat16), learning_rate=1e-3),
    "ipo, accumulated": partial(dpo, method="ipo", gradient_accumulation_steps=2, learning_rate=1e-6),
    "a reward model": partial(reward_model, learning_rate=1e-6),
    "a constant reward, ignored": partial(
        rl, reward=lambda completion_ids, **_: [0.0] * len(completion_ids), on_no_signal="ignore"
    ),
}


@pytest.mark.parametrize("name", LEARN)
def test_a_run_that_learns_is_left_alone(tmp_path, caplog, name):
    made = LEARN[name](tmp_path)
    made.train()
    assert not lines(caplog)
    if made.args.on_no_signal == "ignore":
        assert made.watch.watcher is None
    else:
        assert made.watch.watcher.closed == ["first", "steady"]


def test_a_run_waits_for_its_numbers_once(tmp_path, monkeypatch):
    """Two windows of the same five steps: the device is read twice, whatever is logged, and not afterwards."""
    read, calls = signal.read, []
    monkeypatch.setattr(signal, "read", lambda taken: calls.append(len(taken)) or read(taken))
    made = dpo(tmp_path, max_steps=12)
    made.train()
    assert calls == [STEPS, STEPS] and made.watch._weights is None


def test_warned_or_not_a_run_is_the_same(tmp_path):
    runs = [dpo(tmp_path / how, on_no_signal=how, max_steps=7) for how in ("ignore", "warn")]
    for made in runs:
        made.train()
    first, second = (made.model.state_dict() for made in runs)
    assert all(torch.equal(first[n], second[n]) for n in first)


class Killed(Exception):
    pass


class Kills(transformers.TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.at + 1:
            raise Killed


@pytest.mark.parametrize(
    "make", [partial(rl, reward=by_prompt, prompts_per_rollout=4), partial(dpo, learning_rate=0.0)]
)
def test_a_resumed_run_names_it_at_the_same_step(tmp_path, caplog, make):
    how = {"save_strategy": "steps", "save_steps": 3}
    made = make(tmp_path, **how)
    made.add_callback(Kills(3))
    with pytest.raises(Killed):
        made.train()
    assert not lines(caplog)
    resumed = make(tmp_path, **how)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "out"))
    (line,) = lines(caplog)
    assert line.startswith("no signal after step 5: ")
    late = make(tmp_path, **{**how, "max_steps": 8})
    late.train(resume_from_checkpoint=last_checkpoint(tmp_path / "out"))
    assert len(lines(caplog)) == 1  # not again


def test_a_run_may_stop_with_a_checkpoint(tmp_path, caplog):
    how = {"on_no_signal": "stop", "save_strategy": "steps", "save_steps": 100}
    made = rl(tmp_path, by_prompt, **how)
    with pytest.raises(NoSignalError, match=r"no signal after step 5: groups: .*on_no_signal='warn'") as caught:
        made.train()
    assert not lines(caplog) and made.state.global_step == STEPS
    assert caught.value.folder == str(tmp_path / "out" / "checkpoint-5") == str(last_checkpoint(tmp_path / "out"))
    with pytest.raises(NoSignalError, match="no signal after step 5"):
        rl(tmp_path, by_prompt, **how).train(resume_from_checkpoint=caught.value.folder)
    on = rl(tmp_path, by_prompt, **{**how, "on_no_signal": "warn"})
    on.train(resume_from_checkpoint=caught.value.folder)
    assert on.state.global_step == 6
    bare = rl(tmp_path / "bare", by_prompt, on_no_signal="stop")
    with pytest.raises(NoSignalError) as caught:
        bare.train()
    assert caught.value.folder is None and "checkpoint" not in str(caught.value)


def test_the_finding_is_in_the_report(tmp_path):
    made = rl(tmp_path, by_prompt, preflight="warn")
    made.train()
    assert [f["check"] for f in made.record()["preflight"]["findings"]].count("groups") == 1


def test_words_of_the_choice():
    assert options.ON_NO_SIGNAL == ON_NO_SIGNAL
    with pytest.raises(ValueError, match=r"ignore, warn, stop, got 'stopp'; did you mean stop\?"):
        XPOConfig(output_dir="x", use_cpu=True, on_no_signal="stopp")


def test_the_command_ends_with_the_line(tmp_path, capsys, caplog):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def none(completion_ids, **_):\n    return [0.0] * len(completion_ids)\n")
    words = ["rl", "--data", str(tmp_path / "prompts.jsonl"), "--model", str(tmp_path / "model"), "--cpu"]
    words += ["--reward", f"{tmp_path / 'reward.py'}:none", "--output-dir", str(tmp_path / "out"), "--max-steps", "8"]
    words += ["--batch-size", "4", "--num-generations", "4", "--max-new-tokens", "12", "--eval-split", "0"]
    words += ["--lora-targets", "q_proj", "--preflight", "off"]
    with caplog.at_level(logging.ERROR):
        assert cli.main([*words, "--on-no-signal", "stop"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("xpo-fast: ")]
    assert "no signal after step 5: rewards: each of 20 completions has the reward 0" in line and "(none)" in line
    assert (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").is_file()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["command"] == "rl"


def _rank(folder: Path, rank: int) -> tuple[str, int, bool]:
    made = rl(folder, by_prompt, on_no_signal="stop", save_strategy="steps", gradient_accumulation_steps=1)
    try:
        made.train()
    except NoSignalError as error:
        return str(error), made.state.global_step, (folder / "out" / "checkpoint-5").is_dir()
    return "", made.state.global_step, False


def test_ranks_stop_together(tmp_path):
    found = run_world(tmp_path / "world", 2, partial(_rank, tmp_path))
    assert found[0] == found[1] and found[0][1:] == (STEPS, True) and "no signal after step 5: groups" in found[0][0]
