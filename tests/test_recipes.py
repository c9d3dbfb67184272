"""Recipes: every one of them for an iteration on a tiny model, references, stopping, and runs that are killed."""

import contextlib
import json
import logging
import math
from pathlib import Path

import datasets
import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, VOCAB, lora, make_model, make_rows, make_tokenizer
from xpo_fast import cli, recipes
from xpo_fast.data import load_prompts
from xpo_fast.models import load_model
from xpo_fast.recipes import RECIPES, StoppingRule, Train, get_recipe, override, paired, table, training
from xpo_fast.recipes.loop import Loop, run
from xpo_fast.recipes.setup import Policies, Setup
from xpo_fast.recipes.training import L1, Iteration, train_reward, with_reference
from xpo_fast.rewards.judges import FunctionJudge, Judge, text_of
from xpo_fast.rewards.llm_judges import LLMJudge
from xpo_fast.rollout import GenerateRollout, Samples, Sampling

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit"),
]
METHODS_MD = [
    "raft",
    "rso",
    "slic",
    "iterative-dpo",
    "online-rlhf",
    "self-rewarding",
    "rlaif",
    "rlaif-direct",
    "constitutional",
    "sppo",
    "dno",
    "nash-md",
    "cringe",
    "nn",
    "sdpo",
    "paft",
    "ppo",
    "grpo",
    "rloo",
]

# Run in test_contrastive.py.
CONTRASTIVE = ["rlcd", "rlcd-dpo", "rmboost", "apo-game", "apo-policy", "bpo", "opro", "iterated-rlhf", "rlp"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("xpo_fast").setLevel(logging.ERROR)
    yield
    logging.getLogger("xpo_fast").setLevel(logging.NOTSET)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model with room for a judge's question."""
    folder = tmp_path_factory.mktemp("model")
    make_model(max_position_embeddings=1024).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def letters(completions, **_) -> list[float]:
    return [float(sum(map(ord, text_of(c))) % 17) for c in completions]


def small(name: str, **settings):
    """The recipe with one iteration, and no more than four completions a draw."""
    recipe = override(RECIPES[name], {"iterations": 1})
    if recipe.draws:
        recipe = override(recipe, {"draws.n": min(4, recipe.draws[0].n), "revise": min(1, recipe.revise)})
    return override(recipe, settings)


def setup(home: Path, output: Path, *, said: list | None = None, **options) -> Setup:
    training = {
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        **options.pop("training", {}),
    }
    defaults = {
        "rows": load_prompts(make_rows(4)),
        "judge": FunctionJudge(letters),
        "sampling": Sampling(max_new_tokens=5),
        "block": 3,
        "say": (said if said is not None else []).append,
    }
    return Setup(model=str(home), output=output, training=training, **{**defaults, **options})


def iteration(recipe, given: Setup, rows=(), models=None) -> Iteration:
    models = [given.model] if models is None else models
    return Iteration(recipe, given, Policies(given), 0, given.output, list(rows), models)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_model(str(folder))[0].state_dict()


def logged(folder: Path) -> list[float]:
    return [log["loss"] for log in json.loads((folder / "train_log.json").read_text()) if "loss" in log]


# --- the table ---


def test_every_row_of_the_table_of_methods_is_there_and_listed():
    assert sorted(RECIPES) == sorted([*METHODS_MD, *CONTRASTIVE])
    rows = table().splitlines()
    assert [row.split()[0] for row in rows] == ["recipe", *RECIPES]
    assert next(r for r in rows if r.startswith("rso ")).split()[1:] == [
        "64",
        "reward",
        "rejection",
        "rso",
        "fixed",
        "1",
    ]


def test_a_recipe_is_changed_by_names():
    recipe = override(
        RECIPES["rso"],
        {"iterations": 2, "draws.n": 16, "draws.temperature": 0.5, "select.beta": 0.1, "method.beta": 0.2},
    )
    assert (recipe.iterations, recipe.draws[0].n, recipe.draws[0].temperature) == (2, 16, 0.5)
    assert recipe.select_args == {"n": 8, "beta": 0.1} and recipe.train == (Train("rso", {"beta": 0.2}),)
    paft = override(RECIPES["paft"], {"l1": 0.1, "method.beta": 0.3, "merge.density": 0.2})
    assert paft.train == (Train("sft", l1=0.1), Train("dpo", {"beta": 0.3})) and paft.merge["density"] == 0.2
    assert RECIPES["rso"].draws[0].n == 64
    other = override(RECIPES["rso"], {"select": "best-worst", "select.min_gap": 0.5})
    assert other.select_args == {"min_gap": 0.5}  # the arguments of the other selector went with it


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rso", {"gamma": 1}, "recipe rso has no 'gamma'; it has iterations"),
        ("rso", {"method.gamma": 1}, "method.beta"),
        ("sdpo", {"draws.n": 1}, "has no 'draws.n'"),
        ("rso", {"draws[3].n": 1}, r"has no 'draws\[3\].n'"),
        ("rso", {"iterations": 0}, "at least one iteration, got 0"),
        ("rso", {"judge": "none"}, "a judge for rejection"),
        ("rso", {"reference": "last"}, "reference to be one of none, fixed"),
        ("raft", {"select": "online"}, "methods of RL"),
        ("raft", {"draws.top_p": 0}, r"top_p in \(0, 1\]"),
        ("grpo", {"iterations": 2}, 'reference="previous" for several iterations of RL'),
        ("rlaif", {"iterations": 2}, "one iteration of a reward model, got 2"),
        # What a command line may hold, and what would else be found out when everything has been sampled.
        ("raft", {"iterations": "two"}, "at least one iteration, got 'two'"),
        ("raft", {"iterations": 1.5}, "at least one iteration, got 1.5"),
        ("raft", {"draws.n": 2.5}, "draws of n >= 1, got 2.5"),
        ("raft", {"draws.temperature": "hot"}, "temperature >= 0, got 'hot'"),
        ("raft", {"l1": 0.1}, "has no 'l1'"),
        ("raft", {"merge.density": 0.1}, "has no 'merge.density'"),
        ("paft", {"l1": "much"}, "l1 >= 0, got 'much'"),
        ("raft", {"select.min_gap": 1}, "select=best with .*unexpected keyword argument 'min_gap'"),
        ("rso", {"select.beta": 0}, "select=rejection with .*expected beta > 0"),
        ("rso", {"select.rank": "last"}, "rank must be first-round or tournament, got 'last'"),
        ("rso", {"method.beta": -1}, "rso with {'beta': -1}: expected beta > 0"),
        ("dno", {"method.beta": "x"}, "dno with {'beta': 'x'}"),
        ("iterative-dpo", {"select": "best"}, "a selection of pair data, which dpo learns from, got 'best'"),
        ("nn", {"select": "best-worst", "judge": "reward"}, "a selection of list data, which nn learns from"),
    ],
)
def test_what_does_not_fit_a_recipe_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        override(get_recipe(name), settings)
    with pytest.raises(ValueError, match=r"no recipe named 'rrso'; did you mean rso.*There are raft, rso"):
        get_recipe("rrso")


# --- each recipe by name ---


class Alternating(Judge):
    """Compares and does not score, as an LLM or a preference model."""

    def compare(self, prompts, first, second, **columns):
        a, b = (torch.tensor(letters(x)) for x in (first, second))
        return (0.3 * (a - b)).sigmoid()


@pytest.mark.parametrize("name", METHODS_MD)
def test_every_recipe_runs_an_iteration(home, tmp_path, name):
    recipe = small(name)
    compares = recipe.judge in ("preference", "llm") and name != "rlaif-direct"
    judge = Alternating() if compares else FunctionJudge(letters)
    if recipe.judge == "none" and recipe.then is None:
        judge = None
    if recipe.judge == "self":
        judge = None
    options = {"peft_config": lora()} if name in ("paft", "iterative-dpo", "ppo", "nash-md") else {}
    if name == "self-rewarding":
        options["rollout"] = Reviewer
    outcome = run(recipe, setup(home, tmp_path, judge=judge, **options))
    assert outcome.best == 1
    before, after = weights(home), weights(outcome.model)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(x.isfinite().all() for x in after.values())
    parts = sorted(p.name for p in tmp_path.glob("[0-9]-*"))
    assert parts == {"rlaif": ["1-rlaif", "2-ppo"], "constitutional": ["1-constitutional", "2-rlaif", "3-ppo"]}.get(
        name, []
    )
    first = (tmp_path / parts[0] if parts else tmp_path) / "iteration-000"
    made = {p.name for p in first.iterdir()}
    if recipe.online:
        assert "samples.jsonl" in made
    elif recipe.draws:
        judged = {"judged-00000.jsonl", "judged-00001.jsonl"} if recipe.judge != "none" else set()
        assert {"samples-00000.jsonl", "samples-00001.jsonl", "selected.jsonl", "summary.json"} | judged <= made
    assert "train" not in made and logged(first) if name != "paft" else len(made) >= 4


class Reviewer:
    """The policy's own rollout, which gives points when it is asked for them: a tiny model never would."""

    def __init__(self, model, tokenizer) -> None:
        self.policy = GenerateRollout(model, tokenizer)

    def generate(self, prompts, n=1, *, sampling, seed):
        if "count points" not in text_of(prompts[0]):
            return self.policy.generate(prompts, n, sampling=sampling, seed=seed)
        rows = [p for p in prompts for _ in range(n)]
        ids = [[1] for _ in rows]
        points = [f"Score: {sum(map(ord, text_of(p))) % 6}" for p in rows]
        return Samples(rows, ids, ids, points, ["stop"] * len(rows))

    def update(self, model) -> None:
        self.policy.update(model)


# --- what is trained on ---


def test_pairs_are_the_sampled_tokens_best_against_worst(home, tmp_path):
    """No EOS is put behind a completion that was cut off, and nothing is tokenized again."""
    run(small("iterative-dpo", **{"draws.n": 6}), setup(home, tmp_path))
    folder = tmp_path / "iteration-000"
    samples = [row for b in range(2) for row in lines(folder / f"samples-0000{b}.jsonl")]
    scores = [row["scores"] for b in range(2) for row in lines(folder / f"judged-0000{b}.jsonl")]
    picks = lines(folder / "selected.jsonl")
    assert len(samples) == len(scores) == 4 and "length" in samples[0]["finish"]
    for sample, score, pick in zip(samples, scores, picks, strict=True):
        best, worst = score.index(max(score)), score.index(min(score))
        assert score == letters(sample["completions"])
        assert pick["chosen_ids"] == sample["completions_ids"][best] and pick["score_chosen"] == max(score)
        assert (
            pick["rejected_ids"] == sample["completions_ids"][worst]
            and pick["rejected"] == sample["completions"][worst]
        )
        for ids, finish in zip(sample["completions_ids"], sample["finish"]):
            assert (ids[-1] == 1) == (finish == "stop") and len(ids) <= 5


def test_gold_answers_are_candidates_and_revisions_are_kept(home, tmp_path):
    rows = load_prompts(make_rows(4))
    run(small("dno", **{"select.min_gap": 0.0}), setup(home, tmp_path / "dno", rows=rows))
    samples = lines(tmp_path / "dno" / "iteration-000" / "samples-00000.jsonl")
    assert [s["completions"][-1] for s in samples] == [row["chosen"] for row in rows[:3]]
    assert all(s["completions_ids"][-1][-1] == 1 and s["draw"][-1] == -1 for s in samples)
    recipe = override(small("constitutional"), {"then": None, "revise": 2})
    run(recipe, setup(home, tmp_path / "cai", judge=None))
    for line in lines(tmp_path / "cai" / "iteration-000" / "samples-00000.jsonl"):
        assert len(line["critiques"]) == len(line["revisions"]) == 2
        assert line["completions"][0] == line["revisions"][-1] and len(line["first"]) == 1
        assert line["completions_ids"][0][-1] == 1


def test_sdpo_takes_the_data_in_steps(home, tmp_path):
    """Each step begins at ln 2: its reference is the model that it begins with."""
    rows = load_prompts(make_rows(6))
    loop = Loop(override(RECIPES["sdpo"], {"iterations": 3}), setup(home, tmp_path, rows=rows, judge=None))
    parts = [loop.rows(tmp_path, i, str(home)) for i in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2] and [row for part in parts for row in part] == rows
    run(RECIPES["sdpo"], setup(home, tmp_path, rows=rows, judge=None, training={"max_steps": 2, "learning_rate": 1e-2}))
    for i in range(2):
        losses = logged(tmp_path / f"iteration-00{i}")
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5) != pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize(("reference", "adapter"), [("previous", True), ("fixed", False), ("fixed", True)])
def test_the_reference_is_the_previous_iterate_or_the_start(home, tmp_path, reference, adapter):
    recipe = override(small("iterative-dpo"), {"iterations": 2, "reference": reference, "method.beta": 1.0})
    options = {"peft_config": lora()} if adapter else {}
    run(recipe, setup(home, tmp_path, training={"learning_rate": 3e-2}, **options))
    first, second = (logged(tmp_path / f"iteration-00{i}")[0] for i in range(2))
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert (second == pytest.approx(math.log(2), abs=1e-4)) == (reference == "previous")


def test_negating_negatives_has_two_references(home, tmp_path):
    """The samples' under the start of the run, the rejected one's under the start of the iteration."""
    other = make_model(7, max_position_embeddings=1024)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    rows = {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9]], "rejected_ids": [10, 11, 12]}
    dataset = datasets.Dataset.from_list([rows, {**rows, "prompt_ids": [20]}])
    models = [str(home), str(tmp_path / "other")]
    it = iteration(RECIPES["nn"], setup(home, tmp_path / "out", judge=None), models=models)
    found = with_reference(it, dataset, RECIPES["nn"].train[0])["ref_logp"]
    for prompt, logps in zip(([5, 6], [20]), found, strict=True):
        for ids, logp, model in zip(([7, 8], [9], [10, 11, 12]), logps, (home, home, tmp_path / "other"), strict=True):
            with torch.no_grad():
                table = load_model(str(model))[0](torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            expected = sum(table[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids))
            assert logp == pytest.approx(expected, abs=1e-4)


def test_paft_merges_two_adapters_of_one_base(home, tmp_path):
    """With `cat` the merged weights are base + both differences, exactly."""
    recipe = override(small("paft"), {"merge.combination_type": "cat"})
    run(recipe, setup(home, tmp_path, peft_config=lora(), judge=None, training={"learning_rate": 1e-2}))
    base, merged = weights(home), weights(tmp_path / "model")
    import peft

    expected = {k: v.clone() for k, v in base.items()}
    for name in ("adapter-0-sft", "adapter-1-dpo"):
        one = peft.PeftModel.from_pretrained(load_model(str(home))[0], str(tmp_path / "iteration-000" / name))
        after = one.merge_and_unload().state_dict()
        assert any(not torch.equal(after[k], base[k]) for k in base)
        for k in base:
            expected[k] += after[k] - base[k]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="trains adapters side by side: give a peft_config"):
        run(RECIPES["paft"], setup(home, tmp_path / "full", judge=None))


def test_paft_killed_as_an_adapter_appears(home, tmp_path, monkeypatch):
    appearing, deaths = training.appearing, []

    @contextlib.contextmanager
    def dying(path, **how):
        with appearing(path, **how) as part:
            yield part
        if path.name.startswith("adapter") and len(deaths) < 2:
            deaths.append(path)
            raise Killed

    monkeypatch.setattr(training, "appearing", dying)
    options = {"peft_config": lora(), "judge": None, "training": {"max_steps": 1}}
    for _ in range(2):
        with pytest.raises(Killed):
            run(small("paft"), setup(home, tmp_path, **options))
    assert Path(run(small("paft"), setup(home, tmp_path, **options)).model).is_dir() and len({*deaths}) == 2


def test_soft_labels_reach_the_reward_model(home, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "xpo_fast.rewards.trainer.RewardTrainer.__init__",
        lambda self, model, args, *, train_dataset, **_: seen.extend(train_dataset) or (_ for _ in ()).throw(Killed),
    )
    row = {"prompt": "w1", "chosen": " w2", "rejected": " w3", "prob": 0.7, "chosen_ids": [5], "rejected_ids": [6]}
    with pytest.raises(Killed):
        train_reward(iteration(small("rlaif"), setup(home, tmp_path), [row]))
    assert seen == [{"prompt": "w1", "chosen": " w2", "rejected": " w3", "prob": 0.7}]


def test_l1_adds_the_sign_of_each_weight_to_its_gradient():
    layer = torch.nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -3.0]]))
    layer.weight.grad = torch.tensor([[1.0, 1.0]])
    L1(0.25).on_pre_optimizer_step(None, None, None, model=layer)
    assert layer.weight.grad.tolist() == [[1.25, 0.75]] and layer.bias.grad is None


def test_a_judge_that_compares_rewards_by_win_rates(home, tmp_path):
    """In a group; of one completion a win rate says nothing."""
    run(override(small("rloo"), {"draws.n": 2}), setup(home, tmp_path / "rloo", judge=Alternating()))
    rows = lines(tmp_path / "rloo" / "iteration-000" / "samples.jsonl")
    rewards = [row["reward"] for row in rows]
    assert len(rows) == 4 and any(x != 0.5 for x in rewards)
    for a, b in zip(rewards[::2], rewards[1::2], strict=True):
        assert a + b == pytest.approx(1)
    with pytest.raises(ValueError, match=r"only compares, .* draws\.n of 2 or more"):
        run(small("ppo"), setup(home, tmp_path / "ppo", judge=Alternating()))


def test_iterations_raise_what_the_judge_likes(home, tmp_path):
    """Samples with more of w1 … w9 are preferred; held-out answers have more of them after three iterations of RAFT."""

    def low(completions, **_):
        return [float(sum(len(word) == 2 for word in c.split())) for c in completions]

    prompts = load_prompts(make_rows(24))
    outcome = run(
        override(RECIPES["raft"], {"iterations": 3}),
        setup(
            home,
            tmp_path,
            rows=prompts[:16],
            held_out=prompts[8:],
            judge=FunctionJudge(low),
            block=16,
            training={"max_steps": 20, "learning_rate": 1e-2},
            stopping=StoppingRule(patience=3),
        ),
    )
    start, *after = outcome.history
    assert len(after) == 3 and max(after) == after[outcome.best - 1] > start + 0.5


# --- stopping ---


def test_paired_differences_leave_out_what_one_side_lacks():
    assert paired([1.0, 2.0, math.nan, 5.0], [0.0, 0.0, 1.0, 2.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert paired([1.0], [0.0]) == (1.0, math.inf)


@pytest.mark.parametrize(
    ("rule", "means", "best", "stops"),
    [
        (StoppingRule(), [0.0], 0, False),
        (StoppingRule(), [0.0, 1.0, 2.0], 2, False),
        (StoppingRule(), [0.0, 1.0, 1.0], 1, True),
        (StoppingRule(), [0.0, -1.0], 0, True),
        (StoppingRule(patience=2), [0.0, 1.0, 0.5], 1, False),
        (StoppingRule(patience=2), [0.0, 1.0, 0.5, 0.9], 1, True),
        (StoppingRule(patience=2), [0.0, 1.0, 0.5, 1.2], 3, False),
        (StoppingRule(min_gain=0.3), [0.0, 0.2], 0, True),
        # The differences are mean ± 1: the standard error is 1/√3.
        (StoppingRule(z=2), [0.0, 1.1], 0, True),
        (StoppingRule(z=2), [0.0, 1.2], 1, False),
    ],
    ids=str,
)
def test_when_to_stop(rule, means, best, stops):
    spread = (-1.0, 0.0, 1.0)
    history = [[m + s * (i % 2) for s in spread] for i, m in enumerate(means)]
    assert rule.best(history) == best and rule.stops(history) is stops


@pytest.mark.parametrize(
    "rule", [{"patience": 0}, {"z": -1.0}, {"z": math.nan}, {"z": math.inf}, {"min_gain": math.nan}], ids=str
)
def test_a_rule_that_nothing_would_meet_is_refused(rule):
    with pytest.raises(ValueError, match="expected patience >= 1, z >= 0, and a finite min_gain"):
        StoppingRule(**rule)


def test_held_out_prompts_need_a_judge_that_answers(home, tmp_path):
    """Else the model would grade itself unasked, and no iteration could be better than a start without a score."""
    held_out = load_prompts(make_rows(2, seed=5))
    for name in ("sdpo", "nn"):
        with pytest.raises(ValueError, match="answered for a judge, and none is given"):
            run(small(name), setup(home, tmp_path / name, judge=None, held_out=held_out))
    silent = FunctionJudge(lambda completions, **_: [None] * len(completions))
    with pytest.raises(ValueError, match="scored none of the answers to the 2 held-out prompts"):
        run(small("raft"), setup(home, tmp_path / "raft", held_out=held_out, held_out_judge=silent))
    assert not (tmp_path / "raft" / "iteration-000").exists()


def test_answers_without_a_score_are_told_and_are_no_better(home, tmp_path):
    calls: list[int] = []

    def fading(completions, **_):
        calls.append(0)
        return [0.5, 1.0] if len(calls) == 1 else [None, None]

    said: list[str] = []
    options = {"held_out": load_prompts(make_rows(2, seed=5)), "held_out_judge": FunctionJudge(fading)}
    outcome = run(small("raft"), setup(home, tmp_path, said=said, **options))
    assert outcome.best == 0 and outcome.model == str(home) and not (tmp_path / "model").exists()
    assert any("2 of 2 answers unjudged; the best so far is the start" in line for line in said)
    again = run(small("raft"), setup(home, tmp_path, **options))
    assert again.history[0] == 0.75 and math.isnan(again.history[1]) and len(calls) == 2


def test_one_held_out_prompt_has_no_standard_error(home, tmp_path):
    assert StoppingRule().best([[0.0], [1.0]]) == 1
    one = {"held_out": load_prompts(make_rows(1)), "stopping": StoppingRule(z=1.0)}
    with pytest.raises(ValueError, match="needs 2 held-out prompts or more, got 1"):
        run(small("raft"), setup(home, tmp_path, **one))


def test_the_loop_stops_and_gives_back_the_best(home, tmp_path):
    """The held-out judge likes the first iteration, and nothing after it."""
    calls: list[int] = []

    def fading(completions, **_):
        calls.append(len(completions))
        return [[0.0, 1.0, 0.5, 0.75][len(calls) - 1]] * len(completions)

    said: list[str] = []
    options = {
        "held_out": load_prompts(make_rows(3, seed=5)),
        "held_out_judge": FunctionJudge(fading),
        "stopping": StoppingRule(patience=2),
    }
    recipe = override(small("iterative-dpo"), {"iterations": 6})
    outcome = run(recipe, setup(home, tmp_path, said=said, **options))
    assert outcome.history == [0.0, 1.0, 0.5, 0.75] and outcome.best == 1
    assert outcome.reason == "no better on the held-out prompts for 2 iterations"
    folders = [tmp_path / f"iteration-{i:03d}" for i in range(4)]
    assert [f.is_dir() for f in folders] == [True] * 3 + [False]
    assert [(f / "model").is_dir() for f in folders[:3]] == [True, False, True]  # of the best and of the last
    torch.testing.assert_close(weights(tmp_path / "model"), weights(folders[0] / "model"), rtol=0, atol=0)
    assert any("held-out score 0.5000, +0.5000" in line for line in said)
    again = run(recipe, setup(home, tmp_path, **options))
    assert again == outcome and len(calls) == 4


def test_a_judge_that_compares_is_held_against_the_start(home, tmp_path):
    outcome = run(
        small("sppo"), setup(home, tmp_path, judge=Alternating(), held_out=load_prompts(make_rows(5, seed=5)))
    )
    assert outcome.history[0] == 0.5 and 0 < outcome.history[1] < 1


def test_the_policy_judges_its_samples_and_the_start_what_is_held_out(home, tmp_path):
    """Else the held-out scores of two iterations would be two judges'."""
    asked: list[tuple[int, float]] = []

    class Watched(Reviewer):
        def generate(self, prompts, n=1, *, sampling, seed):
            if "count points" in text_of(prompts[0]):
                asked.append((len(prompts), self.policy.model.get_input_embeddings().weight.sum().item()))
            return super().generate(prompts, n, sampling=sampling, seed=seed)

    outcome = run(
        override(small("self-rewarding"), {"iterations": 2}),
        setup(
            home,
            tmp_path,
            judge=None,
            rollout=Watched,
            held_out=load_prompts(make_rows(2, seed=5)),
            stopping=StoppingRule(patience=2),
        ),
    )
    start = weights(home)["model.embed_tokens.weight"].sum().item()
    samples, held_out = ([x for count, x in asked if (count == 2) == of_two] for of_two in (False, True))
    assert len(samples) == 4 and samples[:2] == [start] * 2 and start not in samples[2:]
    assert held_out == [start] * 3 and len(outcome.history) == 3


# --- killed, and started again ---


class Killed(BaseException):
    pass


def killing(at: int):
    """Says, and dies at its `at`-th word."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == at:
            raise Killed(line)

    return say


@pytest.mark.parametrize("name", ["iterative-dpo", "grpo"])
def test_killed_and_resumed_equals_uninterrupted(home, tmp_path, name):
    """Killed again and again, each time a word later than the last: the same files and the same weights."""
    recipe = override(small(name), {"iterations": 2 if name == "iterative-dpo" else 1, "reference": "previous"})
    options = {
        "held_out": load_prompts(make_rows(2, seed=5)),
        "stopping": StoppingRule(patience=2),
        "peft_config": lora(lora_dropout=0.2),
        "training": {"max_steps": 3, "save_strategy": "steps", "save_steps": 1},
    }
    whole: list[str] = []
    expected = run(recipe, setup(home, tmp_path / "whole", said=whole, **options))
    deaths = []
    for _ in range(40):
        try:
            found = run(recipe, setup(home, tmp_path / "part", **options, say=killing(2 + len(deaths))))
            break
        except Killed as death:
            deaths.append(str(death))
            (tmp_path / "part" / ".left.jsonl.123").write_text("half a li")
    assert len(deaths) >= (5 if name == "iterative-dpo" else 3) and any("step" in death for death in deaths)
    assert found.history == expected.history and found.best == expected.best

    def kept(folder: Path) -> dict[str, bytes]:
        files = [p for p in folder.rglob("*.jsonl") if p.parent.name != "train"]
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    if name == "iterative-dpo":
        assert kept(tmp_path / "part") == kept(tmp_path / "whole") and len(kept(tmp_path / "whole")) >= 12
    last = f"iteration-00{recipe.iterations - 1}/model"
    torch.testing.assert_close(weights(tmp_path / "part" / last), weights(tmp_path / "whole" / last), rtol=0, atol=0)


@pytest.mark.parametrize("held_out", [0, 2])
def test_killed_in_a_later_iteration_it_goes_on_with_the_models_it_has(home, tmp_path, held_out):
    """Passing the first iterations again, a resumed run must not remove the model of the last one."""
    recipe = override(small("iterative-dpo"), {"iterations": 3})
    options = {"held_out": load_prompts(make_rows(8, seed=5))[:held_out], "stopping": StoppingRule(patience=3)}
    expected = run(recipe, setup(home, tmp_path / "whole", **options))

    def say(line: str) -> None:
        if line.startswith("iteration-002: samples"):
            raise Killed

    with pytest.raises(Killed):
        run(recipe, setup(home, tmp_path / "part", **options, say=say))
    left = tmp_path / "part" / "iteration-001" / "train"  # as of a run that died before it removed its checkpoints
    left.mkdir()
    found = run(recipe, setup(home, tmp_path / "part", **options))
    assert (found.history, found.best) == (expected.history, expected.best) and not left.exists()
    last = "iteration-002/model"
    torch.testing.assert_close(weights(tmp_path / "part" / last), weights(tmp_path / "whole" / last), rtol=0, atol=0)


def test_what_a_run_is_says_the_same_in_every_process(home, tmp_path):
    """The target modules are a set, whose order follows from the process's hash seed."""
    run(small("raft"), setup(home, tmp_path, peft_config=lora(target_modules=["v_proj", "q_proj", "k_proj", "o_proj"])))
    adapter = json.loads((tmp_path / "run.json").read_text())["adapter"]
    assert adapter["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_a_folder_of_another_recipe_is_refused(home, tmp_path):
    run(small("raft"), setup(home, tmp_path / "one"))
    with pytest.raises(ValueError, match="one holds a run of another recipe than constitutional"):
        run(small("constitutional"), setup(home, tmp_path / "one"))
    (tmp_path / "parts" / "1-rlaif").mkdir(parents=True)
    (tmp_path / "parts" / "1-rlaif" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="1-rlaif holds a run of another recipe than raft"):
        run(small("raft"), setup(home, tmp_path / "parts"))


def test_a_folder_of_another_run_is_refused(home, tmp_path):
    run(small("raft"), setup(home, tmp_path))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(recipe, seed\)"):
        run(small("slic"), setup(home, tmp_path, seed=1))


# --- what is wrong is said ---


def test_what_a_recipe_lacks_is_named(home, tmp_path):
    with pytest.raises(ValueError, match=r"recipe rso needs a judge \(reward\), and none is given"):
        run(small("rso"), setup(home, tmp_path, judge=None))
    with pytest.raises(ValueError, match=r"recipe rlaif needs a judge \(llm\)"):
        run(small("constitutional"), setup(home, tmp_path, judge=None))
    with pytest.raises(ValueError, match="4 rows are too few for 5 iterations"):
        run(override(RECIPES["sdpo"], {"iterations": 5}), setup(home, tmp_path, judge=None))
    prompts = [{"prompt": "w1 w2"}, {"prompt": "w3"}]
    with pytest.raises(ValueError, match="recipe dno needs chosen in every row"):
        run(small("dno"), setup(home, tmp_path, rows=prompts))
    with pytest.raises(ValueError, match="recipe nn needs rejected in every row"):
        run(small("nn"), setup(home, tmp_path, rows=prompts))
    with pytest.raises(ValueError, match="have no argument lerning_rate"):
        run(small("raft"), setup(home, tmp_path, training={"lerning_rate": 1.0}))


def test_a_judge_without_a_preference_leaves_nothing_to_train_on(home, tmp_path):
    with pytest.raises(ValueError, match=r"iteration 1 found nothing to train on.*summary\.json"):
        run(
            small("iterative-dpo"),
            setup(home, tmp_path, judge=FunctionJudge(lambda completions, **_: [1.0] * len(completions))),
        )
    summary = json.loads((tmp_path / "iteration-000" / "summary.json").read_text())
    assert summary["completions"] == 16 and summary["selected"] == 0 and summary["mean_score"] == 1.0


def test_a_later_iteration_without_a_preference_ends_the_run(home, tmp_path):
    calls: list[int] = []

    def once(completions, **_):
        calls.append(0)
        return letters(completions) if len(calls) <= 2 else [1.0] * len(completions)

    recipe = override(small("iterative-dpo"), {"iterations": 3})
    outcome = run(recipe, setup(home, tmp_path, judge=FunctionJudge(once)))
    assert outcome.best == 1 and outcome.reason.startswith("iteration 2 found nothing to train on")
    torch.testing.assert_close(weights(outcome.model), weights(tmp_path / "iteration-000/model"), rtol=0, atol=0)


def test_one_process_alone_runs_a_recipe(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="recipes run in one process"):
        run(small("raft"), setup(home, tmp_path))


def test_unscored_completions_are_counted_and_left_out(home, tmp_path):
    def some(completions, **_):
        return [None if i % 4 < 2 else v for i, v in enumerate(letters(completions))]

    run(small("raft"), setup(home, tmp_path, judge=FunctionJudge(some)))
    summary = json.loads((tmp_path / "iteration-000" / "summary.json").read_text())
    assert summary["unjudged"] == 8 and summary["selected"] == 4
    rows = lines(tmp_path / "iteration-000" / "samples-00000.jsonl")
    chosen = [row["chosen_ids"] for row in lines(tmp_path / "iteration-000" / "selected.jsonl")]
    assert all(ids in row["completions_ids"][2:] for ids, row in zip(chosen, rows))


class HalfSilent(Alternating):
    """Does not say of every other comparison."""

    def compare(self, prompts, first, second, **columns):
        found = super().compare(prompts, first, second, **columns)
        found[::2] = math.nan
        return found


def test_what_is_seen_of_the_judge_is_in_the_summary(home, tmp_path):
    """A comparison without an answer counts once; lengths of what won and lost; how much the place decided."""
    run(small("sppo"), setup(home, tmp_path / "half", judge=HalfSilent()))
    summary = json.loads((tmp_path / "half" / "iteration-000" / "summary.json").read_text())
    assert summary["completions"] == 16 and summary["unjudged"] + summary["selected"] + summary["identical"] == 24
    assert summary["unjudged"] == 12  # 6 pairs of each of 4 prompts in blocks of 3 and 1: 9 of 18 and 3 of 6
    rows = lines(tmp_path / "half" / "iteration-000" / "selected.jsonl")
    for side in ("chosen", "rejected"):
        lengths = [len(row[f"{side}_ids"]) for row in rows]
        assert summary[f"{side}_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    assert "first_place" not in summary

    class Place:
        """The first answer wins with 0.7, whatever it says."""

        chat = False

        def __call__(self, questions, words):
            return torch.tensor([[0.7, 0.3]]).expand(len(questions), 2)

    judge = LLMJudge(Place())
    judge.compare(["p"], ["x"], ["y"])  # elsewhere
    run(override(small("sppo"), {"draws.n": 2}), setup(home, tmp_path / "place", judge=judge))
    first, *others = lines(tmp_path / "place" / "iteration-000" / "judged-00000.jsonl")
    assert first["places"]["compared"] == 3 and not any("places" in line for line in others)
    summary = json.loads((tmp_path / "place" / "iteration-000" / "summary.json").read_text())
    assert summary["first_place"] == pytest.approx(0.7) and summary["flipped"] == 1.0


# --- the command ---


def command(*arguments: str) -> int:
    return cli.main(["recipe", *arguments])


def test_the_command_lists_and_runs(home, tmp_path, capsys, monkeypatch):
    assert command("--list") == 0 and capsys.readouterr().out == recipes.table() + "\n"
    assert command("sppo", "--list") == 0 and "arXiv 2405.00675" in capsys.readouterr().out
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    (tmp_path / "reward.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    base = (
        "raft",
        "--data",
        str(data),
        "--model",
        str(home),
        "--cpu",
        "--full",
        "--max-steps",
        "1",
        "--max-new-tokens",
        "4",
        "--output-dir",
        str(tmp_path / "out"),
        "--held-out",
        "2",
        "--patience",
        "2",
        "--train",
        "max_grad_norm=0.5",
        "--judge",
        f"function:{tmp_path / 'reward.py'}:length",
        "--set",
        "draws.n=3",
        "--set",
        "iterations=1",
    )
    assert command(*base) == 0
    told = capsys.readouterr().out
    assert "iteration 1, sft: step 1 of 1" in told and "held-out score at the start:" in told
    assert len(lines(tmp_path / "out" / "iteration-000" / "selected.jsonl")) == 4
    assert command(*base) == 2
    assert "has an earlier run: --resume goes on with it" in capsys.readouterr().err
    assert command(*base, "--resume") == 0
    assert command(*base, "--resume", "--seed", "1") == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert command(*base, "--overwrite", "--seed", "1") == 0


def test_overwrite_deletes_nothing_but_a_run(tmp_path, capsys):
    """A run somewhere below does not make a folder one."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    (tmp_path / "all" / "runs").mkdir(parents=True)
    (tmp_path / "all" / "runs" / "run.json").write_text("{}")
    (tmp_path / "all" / "thesis.tex").write_text("mine")
    assert command("sdpo", "--data", str(data), "--output-dir", str(tmp_path / "all"), "--overwrite", "--cpu") == 2
    assert "is not empty and holds no run of a recipe" in capsys.readouterr().err
    assert (tmp_path / "all" / "thesis.tex").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "which recipe"),
        (("raft",), "--data is needed"),
        (("raft", "--data", "DATA", "--judge", "oracle"), "--judge oracle: expected reward:FOLDER"),
        (("raft", "--data", "DATA", "--judge", "llm", "--judge", "llm"), "one judge, or several functions"),
        (("raft", "--data", "DATA", "--judge", "server:http://localhost:1"), "needs --judge-tokenizer"),
        (("self-rewarding", "--data", "DATA", "--judge", "llm"), "has the policy judge itself"),
        (("sdpo", "--data", "DATA", "--judge", "llm"), "would ask llm nothing"),
        (("rso", "--data", "DATA", "--judge", "llm", "--held-out-judge", "self"), "would ask self nothing"),
        (("raft", "--data", "DATA", "--held-out", "6"), "leaves none to train on"),
        (("raft", "--data", "DATA", "--resume"), "--resume: no run in"),
        (("raft", "--data", "DATA", "--set", "gamma=1"), "recipe raft has no 'gamma'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, options, message, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    given = [str(data) if x == "DATA" else x for x in options]
    assert command(*given, "--output-dir", str(tmp_path / "out"), "--cpu") == 2
    assert message in capsys.readouterr().err


def test_an_llm_judge_by_the_command(home, tmp_path):
    """A tokenizer that knows A and B."""
    tokenizer = make_tokenizer(vocabulary=["A", "B", *(f"w{i}" for i in range(VOCAB - 5))])
    tokenizer.save_pretrained(tmp_path / "judge")
    load_model(str(home))[0].save_pretrained(tmp_path / "judge")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    assert (
        command(
            "online-rlhf",
            "--data",
            str(data),
            "--model",
            str(tmp_path / "judge"),
            "--judge",
            "llm",
            "--cpu",
            "--full",
            "--max-steps",
            "1",
            "--max-new-tokens",
            "4",
            "--output-dir",
            str(tmp_path / "out"),
            "--set",
            "iterations=1",
        )
        == 0
    )
    for row in lines(tmp_path / "out" / "iteration-000" / "judged-00000.jsonl"):
        (a, b), (c, d) = row["wins"]
        assert a == d == 0.5 and b + c == pytest.approx(1) and b != 0.5
