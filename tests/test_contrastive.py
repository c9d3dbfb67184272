"""Recipes whose data an instruction makes: RLCD, RMBoost, BPO, and OPRO, which trains nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers

from test_recipes import Alternating, Killed, killing, letters, lines, setup, small, weights
from test_recipes import home as home
from test_recipes import quiet as quiet
from test_trainer import PEFT_WARNING, VOCAB, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.data import Conversation, DataError, load_prompts
from xpo_fast.recipes import RECIPES, Draw, Recipe, Rewriter, Rewriting, Train, cards, override
from xpo_fast.recipes.asking import EDIT, HELPFUL, REWRITE, UNHELPFUL, about, affixed, drawn_edit, edit, fields
from xpo_fast.recipes.loop import run
from xpo_fast.recipes.search import instruction_in
from xpo_fast.recipes.selection import as_asked
from xpo_fast.rewards.judges import FunctionJudge, text_of
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rollout import GenerateRollout, Samples, Sampling, encode_prompts

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
DOCS = Path(__file__).parent.parent / "docs" / "recipes.md"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
NAMES = ["rlcd", "rlcd-dpo", "rmboost", "apo-game", "bpo", "opro", "rlp"]


@pytest.fixture(scope="module")
def talk(home, tmp_path_factory) -> Path:
    """The same model, spoken to in conversations."""
    folder = tmp_path_factory.mktemp("talk")
    make_model(max_position_embeddings=1024).save_pretrained(folder)
    tokenizer = make_tokenizer(vocabulary=["user", "assistant", "system", *(f"w{i}" for i in range(VOCAB - 6))])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def scripted(answer, finish="stop"):
    """A rollout as a recipe makes it of model and tokenizer: it answers the prompt's text by a function."""

    class Scripted:
        asked: ClassVar[list] = []

        def __init__(self, model, tokenizer) -> None:
            self.tokenizer = tokenizer

        def generate(self, prompts, n=1, *, sampling, seed):
            self.asked.extend(prompts)
            rows = [prompt for prompt in prompts for _ in range(n)]
            draws = random.Random(seed)
            texts = [answer(text_of(prompt), draws) for prompt in rows]
            ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            found = [
                t if isinstance(p, str) else [{"role": "assistant", "content": t.strip()}] for t, p in zip(texts, rows)
            ]
            read = encode_prompts(rows, self.tokenizer)
            ends = [[] if finish == "length" else [self.tokenizer.eos_token_id]] * len(rows)
            return Samples(rows, read, [a + b for a, b in zip(ids, ends)], found, [finish] * len(rows))

        def update(self, model) -> None:
            raise AssertionError("nothing changes")

    return Scripted


def by_affix(prompt: str, draws: random.Random) -> str:
    """Answers as the instruction in the prompt says, and something else without one."""
    if UNHELPFUL in prompt:
        return " w9 w8"
    return " w1 w2 w3" if HELPFUL in prompt else " w5"


def selected(output: Path, part: str = "") -> list[dict]:
    return lines(output / part / "iteration-000" / "selected.jsonl")


# --- where an instruction goes ---


@pytest.mark.parametrize(
    ("prompt", "ask", "expected"),
    [
        ("Human: Hi\n\nAssistant:", "(harmless)", "Human: Hi\n\nAssistant (harmless):"),
        ("Human: Hi\n\nAssistant: ", "(harmless)", "Human: Hi\n\nAssistant (harmless): "),
        ("Human: Hi\n\nAssistant:", "Be kind.", "Human: Hi Be kind.\n\nAssistant:"),
        ("Q: 2 + 2?\nA:", "Think.", "Q: 2 + 2? Think.\nA:"),
        ("one two", "(x)", "one two (x)"),
        ("one two \n", "Do.", "one two Do. \n"),
        ("a\nb", "Do.", "a\nb Do."),
        ("", "Do.", "Do."),
        ("one", "", "one"),
    ],
)
def test_an_instruction_in_a_text(prompt, ask, expected):
    assert affixed(prompt, ask) == expected


def test_an_instruction_in_a_conversation():
    """It goes to the last turn of the user; tools and what the template is told stay."""
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"))]
    given = Conversation([*turns, {"role": "user", "content": "c"}, turns[2]], tools=[{"x": 1}], kwargs={"y": 2})
    found = affixed(given, "(z)")
    assert found == [*turns, {"role": "user", "content": "c (z)"}, turns[2]]
    assert (found.tools, found.kwargs) == ([{"x": 1}], {"y": 2}) and given[3]["content"] == "c"
    assert affixed(given, "") is given
    with pytest.raises(DataError, match=r"without a turn of the user.*it has: system"):
        affixed(turns[:1], "(z)")


def test_questions_about_an_answer_and_about_a_row():
    turn = [{"role": "user", "content": "Hi"}]
    asked = edit(turn, "Yo", EDIT, "worse", ["tone", "depth", "length"])
    assert asked[:2] == [*turn, {"role": "assistant", "content": "Yo"}] and asked[2]["role"] == "user"
    assert "worse than your last one in tone, depth and length, and" in asked[2]["content"]
    assert "better than your last one in tone, and" in edit("Hi", " Yo", EDIT, "better", ["tone"])
    row = {"prompt": turn, "chosen": [{"role": "assistant", "content": "{prompt}"}], "rejected": "no"}
    assert about(row, "{prompt}|{chosen}|{rejected}", True) == [{"role": "user", "content": "Hi|{prompt}|no"}]
    assert about(row, "{prompt}!", False) == "Hi!\n\nAnswer:"


def test_ranks_make_pairs():
    """Every better one against every worse one: hand-counted."""
    picks = as_asked(torch.tensor([1.0, 0.0, 1.0, -1.0]), torch.Generator())
    pairs = [(0, 1), (0, 3), (1, 3), (2, 1), (2, 3)]
    assert [(p["chosen"], p["rejected"]) for p in picks] == pairs and all(len(p) == 2 for p in picks)
    assert as_asked(torch.zeros(3), torch.Generator()) == []


# --- RLCD ---


def test_the_prompt_that_made_it_decides_and_is_not_trained_on(home, tmp_path):
    rollout = scripted(by_affix)
    recipe = override(RECIPES["rlcd-dpo"], {"draws.n": 2})
    outcome = run(recipe, setup(home, tmp_path, judge=None, rollout=rollout))
    rows, picks = load_prompts(make_rows(4)), selected(tmp_path)
    assert len(picks) == 16  # two against two of four prompts
    tokenizer = make_tokenizer()
    prompts = {row["prompt"]: ids for row, ids in zip(rows, encode_prompts([r["prompt"] for r in rows], tokenizer))}
    for pick in picks:
        assert (pick["chosen"], pick["rejected"]) == (" w1 w2 w3", " w9 w8")
        assert pick["prompt_ids"] == prompts[pick["prompt"]]
        assert pick["chosen_ids"] == [4, 5, 6, 1] and pick["rejected_ids"] == [12, 11, 1]  # <eos> is 1, w0 is 3
        assert "giving" not in json.dumps(pick)
    blocks = [rows[:3], rows[3:]]  # one draw after the other, in blocks of three prompts
    expected = [f"{row['prompt']} {ask}" for block in blocks for ask in (HELPFUL, UNHELPFUL) for row in block]
    assert rollout.asked == expected
    before, after = weights(home), weights(outcome.model)
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_a_completion_that_was_cut_off_has_no_end(home, tmp_path):
    rollout = scripted(by_affix, finish="length")
    run(RECIPES["rlcd-dpo"], setup(home, tmp_path, judge=None, rollout=rollout))
    for pick in selected(tmp_path):
        assert pick["chosen_ids"] == [4, 5, 6] and pick["rejected_ids"] == [12, 11]


def test_conversations_are_asked_in_the_users_turn(talk, tmp_path):
    prompts = [[{"role": "system", "content": "w7"}, {"role": "user", "content": f"w{i}"}] for i in range(3)]
    rows = load_prompts([{"prompt": prompt} for prompt in prompts])
    rollout = scripted(by_affix)
    run(RECIPES["rlcd-dpo"], setup(talk, tmp_path, judge=None, rollout=rollout, rows=rows))
    assert rollout.asked[0][1]["content"] == f"w0 {HELPFUL}"
    for pick, prompt in zip(selected(tmp_path), prompts, strict=True):
        assert pick["prompt"] == prompt and pick["chosen"] == [{"role": "assistant", "content": "w1 w2 w3"}]
        tokenizer = transformers.AutoTokenizer.from_pretrained(talk)
        whole = tokenizer.apply_chat_template([*prompt, *pick["chosen"]], tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert pick["prompt_ids"] + pick["chosen_ids"] == ids


def test_a_reward_model_learns_the_pairs_and_ppo_follows_it(home, tmp_path):
    outcome = run(RECIPES["rlcd"], setup(home, tmp_path, judge=None))
    assert sorted(p.name for p in tmp_path.glob("[0-9]-*")) == ["1-rlcd", "2-ppo"]
    samples = lines(tmp_path / "1-rlcd" / "iteration-000" / "samples-00000.jsonl")
    assert all(line["asked"] == [1, -1] and line["draw"] == [0, 1] for line in samples)
    assert (tmp_path / "1-rlcd" / "reward_model").is_dir() and Path(outcome.model) == tmp_path / "2-ppo" / "model"


def test_the_pairs_may_be_judged_again(home, tmp_path):
    """The paper's ablation: contrasting prompts, and a judge in the place of the labels."""
    recipe = override(RECIPES["rlcd-dpo"], {"judge": "reward", "select": "best-worst"})
    nine = FunctionJudge(lambda completions, **_: [float(c.count("w9")) for c in completions])
    run(recipe, setup(home, tmp_path, judge=nine, rollout=scripted(by_affix)))
    assert [pick["chosen"] for pick in selected(tmp_path)] == [" w9 w8"] * 4


def test_other_instructions_are_given_by_name(home, tmp_path):
    recipe = override(RECIPES["rlcd-dpo"], {"draws.ask": ["(w1)", "(w2)"]})
    rollout = scripted(lambda prompt, _: " w1" if "(w1)" in prompt else " w2")
    run(recipe, setup(home, tmp_path, judge=None, rollout=rollout))
    assert {(pick["chosen"], pick["rejected"]) for pick in selected(tmp_path)} == {(" w1", " w2")}
    assert override(RECIPES["bpo"], {"draws.ask": "{prompt} {chosen}"}).columns == ("chosen",)


def test_a_generator_samples_and_the_policy_reads(home, tmp_path):
    """Its ids are of another vocabulary; the texts are what the policy is trained on."""
    other = make_tokenizer(vocabulary=[f"w{i}" for i in reversed(range(VOCAB - 3))])
    generator = scripted(by_affix)(None, other)
    run(RECIPES["rlcd-dpo"], setup(home, tmp_path / "rlcd", judge=None, generator=generator))
    assert [pick["chosen_ids"] for pick in selected(tmp_path / "rlcd")] == [[4, 5, 6, 1]] * 4
    generator = GenerateRollout(make_model(5), other)
    run(small("iterative-dpo"), setup(home, tmp_path / "dpo", generator=generator))
    tokenizer = make_tokenizer()
    for line in lines(tmp_path / "dpo" / "iteration-000" / "samples-00000.jsonl"):
        for text, ids, finish in zip(line["completions"], line["completions_ids"], line["finish"], strict=True):
            assert ids == tokenizer(text)["input_ids"] + [1] * (finish == "stop" or not text)
        assert line["prompt_ids"] == tokenizer(line["prompt"])["input_ids"]
    assert json.loads((tmp_path / "dpo" / "run.json").read_text())["generator"] == "GenerateRollout"


# --- RMBoost ---

ASPECTS = ["tone", "depth", "length", "truth", "style"]


def by_edit(prompt: str, draws: random.Random) -> str:
    """A first answer w50; then w1 for better or w2 for worse, and w10 … w14 for each aspect that is named."""
    found = re.search(r"is (better|worse) than your last one in (.*), and otherwise", prompt)
    if found is None:
        return " w50"
    named = sorted(ASPECTS.index(name) for name in re.split(", | and ", found[2]))
    return f" w{1 if found[1] == 'better' else 2} " + " ".join(f"w{10 + k}" for k in named)


def test_planted_labels_and_aspects_come_back(home, tmp_path):
    recipe = override(RECIPES["rmboost"], {"draws.aspects": ASPECTS})
    rollout = scripted(by_edit)
    run(recipe, setup(home, tmp_path, judge=None, rollout=rollout, rows=load_prompts(make_rows(24)), block=8))
    picks = selected(tmp_path)
    assert len(picks) == 24 and {pick["edited"] for pick in picks} == {"better", "worse"}
    counts = {len(pick["aspects"]) for pick in picks}
    assert counts == {1, 2, 3}
    for pick in picks:
        better = pick["edited"] == "better"
        first, second = (pick["rejected"], pick["chosen"]) if better else (pick["chosen"], pick["rejected"])
        assert first == " w50"
        label, *aspects = second.split()
        assert label == ("w1" if better else "w2")
        assert [ASPECTS[int(word[1:]) - 10] for word in aspects] == pick["aspects"]
    seen = [text for text in rollout.asked if "your last one" in text]
    assert len(seen) == 24 and all(" w50\n\nNow write another answer" in text for text in seen)


def test_labels_follow_from_the_seed():
    def drawn(seed):
        draws = random.Random(seed)
        return [drawn_edit(draws, ASPECTS) for _ in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 70 < sum(label == "better" for label, _ in drawn(1)) < 130
    assert {x for _, names in drawn(1) for x in names} == set(ASPECTS)
    assert drawn_edit(random.Random(0), ["one"])[1] == ["one"]


def test_rmboost_trains_a_reward_model(home, tmp_path):
    outcome = run(RECIPES["rmboost"], setup(home, tmp_path, judge=None, rows=load_prompts(make_rows(6))))
    assert outcome.reward_model == str(tmp_path / "reward_model") and outcome.model == str(home)


# --- APO's game ---


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return RewardModel.load(str(folder)).model.state_dict()


def test_reward_model_and_policy_take_turns(home, tmp_path):
    """Gold answers against the policy's own of that turn, and against the data's rejected ones, which hold it."""
    rows = make_rows(4)
    outcome = run(RECIPES["apo-game"], setup(home, tmp_path, judge=None, training={"learning_rate": 3e-2}))
    parts = ["1-apo-game", "2-apo-policy", "3-apo-game", "4-apo-policy"]
    assert sorted(p.name for p in tmp_path.glob("[0-9]-*")) == parts
    gold, refused = ({row["prompt"]: row[name] for row in rows} for name in ("chosen", "rejected"))
    models = [json.loads((tmp_path / part / "run.json").read_text())["model"] for part in parts]
    policy = str(tmp_path / "2-apo-policy" / "model")
    assert models == [str(home), str(home), policy, policy] and outcome.model == str(tmp_path / parts[3] / "model")
    drawn = []
    for part in (parts[0], parts[2]):
        samples = [line for b in (0, 1) for line in lines(tmp_path / part / f"iteration-000/samples-0000{b}.jsonl")]
        assert all(line["draw"] == [0, -1, -2] and line["asked"] == [0, 1, 0] for line in samples)
        drawn.append([line["completions"][0] for line in samples])
        pairs = [(pick["chosen"], pick["rejected"]) for pick in selected(tmp_path, part)]
        expected = [(gold[line["prompt"]], line["completions"][k]) for line in samples for k in (0, 2)]
        assert pairs == expected
        assert [line["completions"][2] for line in samples] == [refused[line["prompt"]] for line in samples]
    assert drawn[0] != drawn[1]
    first, second = (weights_of(tmp_path / part / "reward_model") for part in (parts[0], parts[2]))
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_a_reward_model_is_made_anew_from_what_the_trained_policy_writes(home, tmp_path):
    run(RECIPES["iterated-rlhf"], setup(home, tmp_path, training={"learning_rate": 3e-2}))
    parts = ["1-iterated-rlhf", "2-ppo", "3-iterated-rlhf", "4-ppo"]
    assert sorted(p.name for p in tmp_path.glob("[0-9]-*")) == parts
    models = [json.loads((tmp_path / part / "run.json").read_text())["model"] for part in parts]
    assert models == [str(home), str(home), *[str(tmp_path / "2-ppo" / "model")] * 2]
    first, second = (selected(tmp_path, part) for part in (parts[0], parts[2]))
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second] and first != second


# --- BPO ---


def critic_and_rewriter(prompt: str, draws: random.Random) -> str:
    """As a critic: w5 and the good answer's first word; as a rewriter: w5; else the prompt's last word."""
    if "[Good answer]" in prompt:
        good = prompt.split("[Good answer]\n")[1].split()
        return "" if good[0] == "w66" else f"\n w5 {good[0]}\n"
    return " w5 w6 " if prompt.startswith("You are an expert") else f" {prompt.split()[-1]}"


def test_a_rewriter_learns_the_critics_prompts_and_is_judged_by_the_answers(home, tmp_path):
    rows = [{"prompt": f"w{i} w7", "chosen": f" w{60 + i} w1", "rejected": " w2"} for i in range(8)]
    sixes = FunctionJudge(lambda completions, **_: [float(c.count("w6")) for c in completions])
    options = {"rows": load_prompts(rows), "judge": sixes, "held_out": load_prompts(make_rows(2, seed=5))}
    rollout = scripted(critic_and_rewriter)
    outcome = run(RECIPES["bpo"], setup(home, tmp_path, rollout=rollout, **options))
    assert outcome.history == [0.0, 1.0] and outcome.best == 1 and (tmp_path / "model").is_dir()
    picks = selected(tmp_path)
    # Row 6's critic says nothing, and is left out.
    assert [pick["chosen"] for pick in picks] == [f" w5 w{60 + i}" for i in range(8) if i != 6]
    assert [pick["prompt"] for pick in picks] == [
        REWRITE.replace("{prompt}", f"w{i} w7") + "\n\nAnswer:" for i in range(8) if i != 6
    ]
    assert all(pick["chosen_ids"][0] == 8 and pick["chosen_ids"][-1] == 1 for pick in picks)  # w5, <eos>
    assert any("[Bad answer]\n w2" in text or "[Bad answer]\nw2" in text for text in rollout.asked)
    held = lines(tmp_path / "iteration-000" / "held_out-00000.jsonl")
    assert [line["rewritten"] for line in held] == ["w5 w6"] * 2
    assert [line["prompt"] for line in held] == [row["prompt"] for row in make_rows(2, seed=5)]
    assert "rewritten" not in lines(tmp_path / "start" / "held_out-00000.jsonl")[0]


def test_bpo_runs_on_a_model(home, tmp_path):
    outcome = run(RECIPES["bpo"], setup(home, tmp_path, judge=None))
    before, after = weights(home), weights(outcome.model)
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_a_rollout_behind_a_rewriter():
    tokenizer = make_tokenizer()
    writer = scripted(lambda text, _: "" if "w9" in text else " w3 ")(None, tokenizer)
    rewriter = Rewriter(writer, chat=False)
    inner, said = scripted(lambda text, _: f" {text}!")(None, tokenizer), []
    rollout = Rewriting(inner, rewriter, lambda a, b: said.append((a, b)))
    samples = rollout.generate(["w1 w2", "w9"], 2, sampling=Sampling(), seed=0)
    assert samples.prompts == ["w1 w2", "w1 w2", "w9", "w9"]
    assert samples.completions == [" w3!", " w3!", " w9!", " w9!"] and said == [("w1 w2", "w3"), ("w9", "w9")]
    assert samples.prompt_ids == [[6], [6], [12], [12]]
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "w1"), ("assistant", "w"))]
    assert rewriter([turns]) == [[turns[0], {"role": "user", "content": "w3"}, turns[2]]] and rewriter([]) == []
    with pytest.raises(AssertionError, match="nothing changes"):
        rollout.update(None)
    with pytest.raises(ValueError, match=r"task must hold \{prompt\} and no other field"):
        Rewriter(writer, task="Improve it.")
    with pytest.raises(DataError, match="without a turn of the user"):
        rewriter([turns[:1]])


# --- OPRO ---


class Climber:
    """Proposes the neighbours of the best instruction that it reads, wN; one reply proposes nothing."""

    def __init__(self) -> None:
        self.read: list[list[tuple[str, float]]] = []
        self.tokenizer = make_tokenizer()

    def generate(self, prompts, n=1, *, sampling, seed):
        (question,) = prompts
        found = re.findall(r"instruction: (.*)\nscore: (.*)", question)
        self.read.append([(text, float(score)) for text, score in found])
        best = int(found[-1][0].removeprefix("w"))
        texts = [f"Try this: [w{best + 1}] then", f"w{max(best - 1, 0)}\nsecond line", "   ", f"[w{best + 1}]"][:n]
        rows, ids = list(prompts) * n, [[1]] * n
        return Samples(rows, ids, ids, texts, ["stop"] * n)

    def update(self, model) -> None:
        raise AssertionError("nothing changes")


def echo(prompt: str, draws: random.Random) -> str:
    return f" {prompt.split()[-1]}"


def near_seven(completions, **_):
    return [-abs(float(text.split()[0].removeprefix("w")) - 7) for text in completions]


def climbing(home, output, **options):
    climber = Climber()
    given = {"judge": FunctionJudge(near_seven), "rollout": scripted(echo), "generator": climber, "block": 5}
    return climber, setup(home, output, **{**given, **options})


def test_a_scripted_optimiser_finds_the_planted_instruction(home, tmp_path):
    recipe = override(RECIPES["opro"], {"draws.n": 4, "iterations": 9, "select.start": "w1", "select.keep": 3})
    climber, given = climbing(home, tmp_path)
    outcome = run(recipe, given)
    assert outcome.prompt == "w7" and outcome.model == str(home) and outcome.history == []
    history = lines(tmp_path / "prompts.jsonl")
    assert [row["score"] for row in history] == sorted(row["score"] for row in history)
    assert history[-1] == {"instruction": "w7", "score": 0.0, "answered": 4, "iteration": 6, "number": 7}
    assert {row["instruction"] for row in history} == {f"w{i}" for i in range(9)}
    # Of w6 and w8, equally good, the earlier stands nearer to the best.
    assert [row["instruction"] for row in history[-3:]] == ["w8", "w6", "w7"]
    assert climber.read[0] == [("w1", -6.0)] and climber.read[-1] == [("w8", -1.0), ("w6", -1.0), ("w7", 0.0)]
    assert len(climber.read) == 9 and max(map(len, climber.read)) == 3
    proposed = lines(tmp_path / "iteration-001" / "proposed-00000.jsonl")
    assert [(row["instruction"], row["new"]) for row in proposed] == [
        ("w3", True), ("w1", False), ("", False), ("w3", False)
    ]  # fmt: skip
    summary = json.loads((tmp_path / "iteration-001" / "summary.json").read_text())
    assert summary == {"proposed": 4, "new": 1, "mean_score": -4.0, "best_score": -4.0}
    assert sum(len(lines(p)) for p in tmp_path.glob("*/scored-*.jsonl")) == 9 * 4  # each instruction once, on 4 rows
    assert not [*tmp_path.rglob("model")]


def test_what_the_optimiser_reads(home, tmp_path):
    """The history from worst to best, and rows with <INS> in the instruction's place."""
    rows = load_prompts([{"prompt": "Q: w1\nA:", "answer": 3}, {"prompt": "Q: w2\nA:", "answer": "w9"}])
    seen = []

    class Reader(Climber):
        def generate(self, prompts, n=1, **how):
            seen.extend(prompts)
            return super().generate(prompts, n, **how)

    recipe = override(RECIPES["opro"], {"draws.n": 1, "iterations": 2, "select.start": "w1", "select.examples": 2})
    judge = FunctionJudge(lambda prompts, answer, **_: [1.0 if x == 3 else 0.0 for x in answer])
    run(recipe, setup(home, tmp_path, judge=judge, rows=rows, rollout=scripted(echo), generator=Reader()))
    assert "instruction: w1\nscore: 0.5" in seen[0] and seen[0].endswith("\n\nAnswer:")
    for text in ("input: Q: w1 <INS>\nA:\noutput: 3", "input: Q: w2 <INS>\nA:\noutput: w9"):
        assert text in seen[0]
    assert "instruction: w2\nscore: 0.5\n\ninstruction: w1\nscore: 0.5" in seen[1]


def test_held_out_prompts_choose_the_iteration(home, tmp_path):
    """They are answered under the best instruction so far; the search goes on a while after the best."""
    recipe = override(RECIPES["opro"], {"draws.n": 1, "iterations": 9, "select.start": "w1"})
    held_judge = FunctionJudge(lambda completions, **_: [-abs(float(c.split()[0][1:]) - 3) for c in completions])
    _, given = climbing(home, tmp_path, held_out=load_prompts(make_rows(2, seed=5)), held_out_judge=held_judge)
    outcome = run(recipe, given)
    assert outcome.history == [-2.0, -1.0, 0.0, -1.0] and (outcome.best, outcome.prompt) == (2, "w3")
    assert "no better on the held-out prompts" in outcome.reason and run(recipe, given) == outcome


def test_opro_on_a_model_changes_no_weight(home, tmp_path):
    recipe = override(RECIPES["opro"], {"draws.n": 3, "iterations": 2, "select.start": ""})
    outcome = run(recipe, setup(home, tmp_path, rows=load_prompts(make_rows(3))))
    history = lines(tmp_path / "prompts.jsonl")
    assert outcome.prompt == history[-1]["instruction"] and len(history) > 2 and outcome.model == str(home)
    scores = [row["score"] for row in history]
    assert scores == sorted(scores) and not [*tmp_path.rglob("*.safetensors")]


def test_an_instruction_without_a_score_is_not_shown(home, tmp_path):
    recipe = override(RECIPES["opro"], {"draws.n": 2, "iterations": 3, "select.start": "w1"})
    judge = FunctionJudge(lambda completions, **_: [None if "w2" in c else 1.0 for c in completions])
    climber, given = climbing(home, tmp_path, judge=judge)
    assert run(recipe, given).prompt == "w1"
    assert lines(tmp_path / "prompts.jsonl")[0]["score"] is None
    assert all("w2" not in [text for text, _ in read] for read in climber.read)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("I say [Do  this\nnow.] and [that]", "Do this now."),
        ("\n  Do this. \nBecause", "Do this."),
        ("[ ]", ""),
        ("", ""),
        ("[" + "x" * 501 + "]", ""),
        ("[" + "x" * 500 + "]", "x" * 500),
    ],
)
def test_the_instruction_in_a_reply(reply, expected):
    assert instruction_in(reply) == expected


# --- killed, and started again ---


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_uninterrupted(home, tmp_path, name):
    """Killed at each word in turn: the same files, and the same weights."""
    recipe = override(RECIPES[name], {"then": None} if name == "rlcd" else {})
    expected_deaths = {"apo-game": 6, "rlp": 5}.get(name, 3)
    options = {"judge": None, "rows": load_prompts(make_rows(5))}
    if name == "opro":
        recipe = override(recipe, {"draws.n": 3, "iterations": 2, "select.start": "w1"})
        options["judge"] = FunctionJudge(letters)
    expected = run(recipe, setup(home, tmp_path / "whole", **options))
    deaths = []
    for _ in range(30):
        try:
            found = run(recipe, setup(home, tmp_path / "part", **options, say=killing(2 + len(deaths))))
            break
        except Killed as death:
            deaths.append(str(death))
    assert len(deaths) >= expected_deaths and (found.prompt, found.best) == (expected.prompt, expected.best)

    def kept(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.jsonl")}

    assert kept(tmp_path / "part") == kept(tmp_path / "whole") and len(kept(tmp_path / "whole")) >= 3
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert (tmp_path / "part" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rlcd", {"draws.ask": "(one)"}, r"draws.ask to be a list of 2 texts.*got '\(one\)'"),
        ("rlcd", {"draws.ask": ["(a)", ""]}, "a list of 2 texts"),
        ("rlcd", {"draws.ask": ["(a)", 3]}, "a list of 2 texts"),
        ("bpo", {"draws.ask": 3}, "draws.ask to be a text"),
        ("bpo", {"draws.ask": "{promt}"}, "not 'promt'; did you mean prompt"),
        ("bpo", {"draws.ask": "{chosen} is good"}, r"\{prompt\} beside the answers"),
        ("bpo", {"draws.ask": "{prompt} {label}"}, "fields that go together, not label, prompt"),
        ("rlcd", {"draws.ask": ["{label}{aspects}", "(x)"]}, "aspects, which"),
        ("rlcd", {"draws.ask": ["{history}", "(x)"]}, r"no \{history\} but in a search"),
        ("raft", {"draws.ask": "x"}, "has no 'draws.ask'"),
        ("rlcd", {"draws.aspects": ["x"]}, "has no 'draws.aspects'; it has .*draws.ask"),
        ("rmboost", {"draws.aspects": []}, r"draws.aspects to be a list of names, got \[\]"),
        ("rmboost", {"draws.aspects": "tone"}, "draws.aspects to be a list of names"),
        ("rmboost", {"draws.aspects": ["a", "a"]}, "aspects that are different names"),
        ("rmboost", {"draws.aspects": ["a", 2]}, "aspects that are different names"),
        ("rmboost", {"draws.ask": "Do it {label}."}, r"\{label\} and \{aspects\} in the ask"),
        ("rmboost", {"draws.n": 2}, r"draws of one completion where one edits another, got \[2, 2\]"),
        ("raft", {"rival": 1}, "rival to be true or false, got 1"),
        ("raft", {"rounds": 2}, "rounds >= 1, and 1 unless another recipe follows, got 2"),
        ("apo-game", {"rounds": 0}, "rounds >= 1"),
        ("apo-game", {"gold": False}, r"draws of different ranks for as-asked, got \[0, 0\]"),
        ("rlcd", {"select.min_gap": 1}, "select=as-asked with .*min_gap"),
        ("iterative-dpo", {"select": "as-asked"}, "draws of different ranks for as-asked"),
        ("bpo", {"task": "Improve it."}, r"a task that holds \{prompt\} once"),
        ("raft", {"task": "{prompt}"}, 'select="only" without gold'),
        ("bpo", {"revise": 1}, 'select="only" without gold'),
        ("opro", {"select.kep": 1}, "select=prompts with .*unexpected keyword argument 'kep'"),
        ("opro", {"select.keep": 0}, "keep >= 1"),
        ("opro", {"select.start": 1}, "start to be text"),
        ("opro", {"draws.ask": "Write one."}, r"\{history\} in the ask"),
        ("opro", {"judge": "none"}, "a given judge for a search of prompts"),
        ("opro", {"gold": True}, "neither gold, rival, revise nor task"),
        ("opro", {"then": "ppo"}, "nothing after a search of prompts"),
        ("opro", {"select": "best"}, "a method to train"),
        ("raft", {"select": "prompts"}, "no method and nothing after"),
    ],
)
def test_what_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES[name], settings)


def test_draws_that_do_not_fit_are_refused():
    sides = (Draw(1, ask="(a)", rank=1), Draw(1, ask="(b)"))
    assert Recipe("x", "", "", (Train("dpo"),), draws=sides, select="as-asked", judge="none").columns == ()
    edits = Draw(1, ask="{label}{aspects}", aspects=("a",))
    with pytest.raises(ValueError, match="aspects in a later draw than the first"):
        Recipe("x", "", "", (Train("dpo"),), draws=(edits, Draw(1)), select="as-asked", judge="none")
    with pytest.raises(ValueError, match="no ask in draws of RL"):
        Recipe("x", "", "", (Train("ppo"),), draws=sides[:1], select="online", iterations=1)
    with pytest.raises(ValueError, match="one draw for a search"):
        Recipe("x", "", "", (), draws=(Draw(1, ask="{history}"),) * 2, select="prompts")
    with pytest.raises(ValueError, match="ask to be text, got 3"):
        Recipe("x", "", "", (Train("dpo"),), draws=(Draw(1, ask=3),), judge="none")
    assert fields("{prompt} {x y} {}") == {"prompt"}


def test_what_a_run_lacks_is_named(home, tmp_path):
    prompts = load_prompts([{"prompt": "w1 w2"}])
    with pytest.raises(DataError, match="recipe bpo needs chosen and rejected in every row"):
        run(RECIPES["bpo"], setup(home, tmp_path, rows=prompts, judge=None))
    with pytest.raises(ValueError, match=r"recipe opro needs a judge \(reward\), and none is given"):
        run(RECIPES["opro"], setup(home, tmp_path, judge=None))
    with pytest.raises(ValueError, match="needs the score of single answers, and the judge only compares"):
        run(RECIPES["opro"], setup(home, tmp_path, judge=Alternating()))
    circle = override(RECIPES["iterative-dpo"], {"then": "constitutional", "rounds": 3})
    with pytest.raises(ValueError, match="iterative-dpo would have 4 parts or more in 3 rounds, and a run has 9"):
        run(circle, setup(home, tmp_path))
    with pytest.raises(ValueError, match="recipe sdpo samples nothing before it trains, which a generator would do"):
        run(RECIPES["sdpo"], setup(home, tmp_path, judge=None, generator=Climber()))
    silent = scripted(lambda prompt, _: " ")
    with pytest.raises(ValueError, match="iteration 1 found nothing to train on: none was selected"):
        run(RECIPES["bpo"], setup(home, tmp_path / "bpo", judge=None, rollout=silent))
    assert not (tmp_path / "run.json").exists()


# --- the commands ---


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    return str(path)


def command(*arguments) -> int:
    return cli.main(["recipe", *map(str, arguments)])


def test_rlcd_and_opro_by_the_command(home, tmp_path, data, capsys):
    base = ("--data", data, "--model", home, "--cpu", "--max-new-tokens", 4)
    ask = 'draws.ask=["(w1)", "(w2)"]'
    training = ("--full", "--max-steps", 1, "--generator", f"llm:{home}", "--set", ask)
    assert command("rlcd-dpo", *base, *training, "--output-dir", tmp_path / "dpo") == 0
    about_run = json.loads((tmp_path / "dpo" / "run.json").read_text())
    assert about_run["notes"]["generator"] == f"llm:{home}" and about_run["recipe"]["draws"][1]["ask"] == "(w2)"
    (tmp_path / "reward.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]"
    )
    judge = ("--judge", f"function:{tmp_path / 'reward.py'}:length", "--set", "iterations=1", "--set", "draws.n=2")
    capsys.readouterr()
    assert command("opro", *base, *judge, "--output-dir", tmp_path / "opro") == 0
    assert "the result is the instruction" in capsys.readouterr().out
    assert command("opro", *base, *judge, "--output-dir", tmp_path / "opro", "--resume") == 0
    assert cli.main(["chat", str(tmp_path / "opro"), "--prompt", "w1", "--cpu"]) == 2
    assert "is a search for an instruction, which trained no model; it found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sdpo", "--generator", "llm:x"), "--generator: recipe sdpo samples nothing before it trains"),
        (("ppo", "--generator", "llm:x"), "--generator: recipe ppo samples nothing before it trains"),
        (("rlcd", "--generator", "gpt"), "--generator gpt: expected llm:MODEL"),
        (("rlcd", "--generator", "llm"), "--generator llm: expected llm:MODEL"),
        (("rlcd", "--generator", "server:http://localhost:1"), "server: needs --generator-tokenizer"),
        (("rlcd", "--generator-tokenizer", "x"), "--generator-tokenizer goes with --generator server:URL"),
        (("rlcd", "--judge", "llm"), "recipe rlcd would ask llm nothing"),
        (("bpo", "--judge", "llm"), "recipe bpo would ask llm nothing"),
        (("opro", "--lr", "1e-3"), "--lr: recipe opro trains no weights"),
        (("opro", "--full"), "--full: recipe opro trains no weights"),
        (("opro", "--train", "warmup_steps=1"), "--train: recipe opro trains no weights"),
        (("--markdown", "opro"), "--markdown shows all recipes"),
    ],
)
def test_mistakes_are_named(tmp_path, data, options, message, capsys):
    assert command(*options, "--data", data, "--output-dir", tmp_path / "out", "--cpu") == 2
    assert message in capsys.readouterr().err


def test_chat_with_a_rewriter(home, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    make_model(3).save_pretrained(tmp_path / "run")
    make_tokenizer().save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {home}\nfull: true\n")

    def chat(*options) -> dict:
        capsys.readouterr()
        given = ["chat", str(tmp_path / "run"), "--max-new-tokens", "4", "--json", "--cpu", "--dtype", "float32"]
        assert cli.main([*given, *options]) == 0
        return json.loads(capsys.readouterr().out)

    found = chat("--prompt", "w1 w2", "--rewriter", str(home))
    assert found["prompt"] == "w1 w2" and found["rewritten"] not in ("", "w1 w2")
    plain = chat("--prompt", found["rewritten"])
    assert "rewritten" not in plain and (plain["before"], plain["after"]) == (found["before"], found["after"])
    rows = load_prompts(make_rows(2))
    task = {"task": "w1 {prompt}", "draws.ask": "{prompt} {chosen}"}
    run(override(RECIPES["bpo"], task), setup(home, tmp_path / "bpo", judge=None, rows=rows))
    asked = []
    whole = Rewriter.__call__

    def watched(self, prompts, *, seed=0):
        asked.append((self.task, self.chat))
        return whole(self, prompts, seed=seed)

    monkeypatch.setattr(Rewriter, "__call__", watched)
    chat("--prompt", "w1 w2", "--rewriter", str(tmp_path / "bpo"))
    assert asked == [("w1 {prompt}", False)]
    run(small("raft"), setup(home, tmp_path / "raft", rows=rows))
    for name, message in (("bp", "no such folder; did you mean bpo"), ("raft", "raft, which rewrites no prompts")):
        given = ["chat", str(tmp_path / "run"), "--prompt", "w1", "--cpu", "--rewriter", str(tmp_path / name)]
        assert cli.main(given) == 2 and message in capsys.readouterr().err


def test_the_page_of_recipes_is_current(capsys):
    assert command("--markdown") == 0
    text = capsys.readouterr().out
    assert text == cards.markdown()
    assert DOCS.is_file() and DOCS.read_text(encoding="utf-8") == text, f"docs/recipes.md: {cards.REGENERATE}"
    sections = re.findall(r"^## (\S+)$", text, re.M)
    assert sections == [*RECIPES, *cards.OTHERS] and not RECIPES.keys() & cards.OTHERS.keys()
    assert {*cards.FOUND, *cards.MEASURED} <= set(RECIPES)
    assert set(NAMES) <= set(RECIPES)
    for recipe in RECIPES.values():
        section = text.split(f"\n## {recipe.name}\n")[1].split("\n## ")[0]
        assert recipe.paper in section and all(name in section for name in recipe.columns)


@pytest.mark.parametrize("name", cards.OTHERS)
def test_systems_without_a_recipe_have_a_card_of_the_command_that_runs_them(name, capsys):
    about = cards.OTHERS[name]
    assert about.keys() - {"the paper", "measured"} == {"about", "source", "run", "data", "stages"}
    first, kind, *given = about["run"].replace("NAME=", "x=").split()
    parsed = cli.parsers()[kind].parse_args(given)  # an option that does not exist ends the test
    methods = [parsed.method] if "--method" in given else []
    assert first == "xpo-fast" and (name in (kind, *methods, getattr(parsed, "measure", None)))
    assert command(name, "--list") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"system      {name}: {about['about']}") and about["run"] in said and about["stages"] in said
