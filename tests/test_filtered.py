"""A rollout that goes on only with what has begun well: values by hand, equality with best of n, and a planted goal."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from planted import planted
from test_reward_model import make_trainer
from test_rollout import EOS, MANY_ENDS, PROMPTS, with_ends
from test_trainer import PEFT_WARNING, VOCAB, make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.recipes.mixture import MixtureRollout
from xpo_fast.rewards.goals import GoalJudge
from xpo_fast.rewards.judges import text_of
from xpo_fast.rollout import FilteredRollout, GenerateRollout, Samples, Sampling, ServerRollout
from xpo_fast.rollout.sampling import Generated

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
SAMPLING = Sampling(max_new_tokens=5)


def low_words(prompts, completions):
    """The mean of −k over the words w_k of each text: low numbers are a good beginning, and nothing is a bad one."""
    numbers = [[int(w[1:]) for w in text_of(c).split() if w[1:].isdigit()] for c in completions]
    return torch.tensor([-sum(x) / len(x) if x else -100.0 for x in numbers])


@pytest.fixture
def rollout():
    return GenerateRollout(with_ends(make_model().eval(), MANY_ENDS), make_tokenizer())


def same(a: Samples, b: Samples) -> bool:
    return (a.prompts, a.prompt_ids, a.completion_ids, a.completions, a.finish) == (
        b.prompts, b.prompt_ids, b.completion_ids, b.completions, b.finish,
    )  # fmt: skip


def test_one_block_is_best_of_n(rollout):
    """With a block of the whole length: the first of the best of 4 completions by the rollout itself."""
    found = FilteredRollout(rollout, low_words, candidates=4, block=5).generate(PROMPTS, 3, sampling=SAMPLING, seed=5)
    all_of_them = rollout.generate(PROMPTS, 12, sampling=SAMPLING, seed=5)
    scores = low_words(None, all_of_them.completions).view(-1, 4)
    expected = all_of_them.take([4 * r + int(row.argmax()) for r, row in enumerate(scores)])
    assert same(found, expected) and found.logps is None
    assert {"stop", "length"} == {*found.finish}  # some end in the block


def test_blocks_are_joined_as_the_beam_says(rollout, monkeypatch):
    """A script in the model's place: which begun ones go on, and what is told to score, by hand."""
    w = {k: 3 + k for k in range(60)}  # w0 is 3
    turns = [
        [[w[5], w[5]], [w[1], w[9]], [w[2], w[4]], [w[7], EOS]],  # means −5, −5, −3, −7: third and first go on
        # From (w2 w4), (w5 w5), (w2 w4), (w5 w5):
        [[w[8], w[8]], [w[0], w[1]], [w[3], EOS], [w[9], w[9]]],  # −5.5, −2.75, −3, −7: the second, and the third
        [[w[50]], [w[0]], [w[50]]],  # the ended one stays, the other three go on by one token: (w5 w5 w0 w1 …)
    ]
    asked_for, told = [], []

    def complete(asked, *, sampling, seed):
        asked_for.append([(r.ids, r.place, r.max_tokens) for r in asked])
        new = turns[len(asked_for) - 1]
        return [Generated(ids, "stop" if ids[-1] == EOS else "length") for ids in new]

    def score(prompts, completions):
        told.append(completions)
        return low_words(prompts, completions)

    monkeypatch.setattr(rollout, "complete", complete)
    sampler = FilteredRollout(rollout, score, candidates=4, keep=2, block=2)
    found = sampler.generate(["w1 w2"], sampling=Sampling(max_new_tokens=5), seed=0)
    front, third, first = [4, 5], [w[2], w[4]], [w[5], w[5]]
    assert asked_for[0] == [(front, (0, c), 2) for c in range(4)]
    assert asked_for[1] == [(front + ids, (0, c), 2) for c, ids in enumerate([third, first, third, first])]
    second = [*first, w[0], w[1]]
    assert asked_for[2] == [(front + second, (0, c), 1) for c in range(3)]
    assert told[1] == ["w2 w4 w8 w8", "w5 w5 w0 w1", "w2 w4 w3", "w5 w5 w9 w9"]
    assert told[2][0] == "w2 w4 w3" and len(told) == 3
    assert found.completion_ids == [[*second, w[0]]] and found.finish == ["length"]
    assert found.completions == ["w5 w5 w0 w1 w0"] and found.prompt_ids == [front]


def test_a_least_score_drops_begun_ones_but_never_all(rollout):
    told: list[int] = []

    def score(prompts, completions):
        told.append(len(completions))
        return low_words(prompts, completions)

    how = {"candidates": 4, "keep": 4, "block": 2}
    every = FilteredRollout(rollout, score, **how).generate(PROMPTS, sampling=SAMPLING, seed=1)
    some = FilteredRollout(rollout, score, least=1e9, **how).generate(PROMPTS, sampling=SAMPLING, seed=1)
    alone = FilteredRollout(rollout, score, **{**how, "keep": 1}).generate(PROMPTS, sampling=SAMPLING, seed=1)
    assert same(some, alone) and not same(some, every)  # nothing reaches it: the best one goes on
    assert told[0] == 4 * len(PROMPTS)


def test_samples_follow_from_seed_and_place_alone(rollout):
    sampler = FilteredRollout(rollout, low_words, block=2)
    found = sampler.generate(PROMPTS, 2, sampling=SAMPLING, seed=3)
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    assert same(found, sampler.generate(PROMPTS, 2, sampling=SAMPLING, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    fewer = sampler.generate(PROMPTS[:2], 1, sampling=SAMPLING, seed=3)
    assert same(fewer, found.take([0, 2]))
    assert not same(found, sampler.generate(PROMPTS, 2, sampling=SAMPLING, seed=4))
    assert found.prompts == [p for p in PROMPTS for _ in range(2)]
    ends = {*MANY_ENDS}
    for ids, finish in zip(found.completion_ids, found.finish, strict=True):
        assert (finish == "stop") == (ids[-1] in ends) and not ends & {*ids[:-1]}
        assert 1 <= len(ids) <= 5 and (len(ids) == 5 or finish == "stop")
    # The candidates are the policy's: with one there is nothing to choose, whatever its score.
    one = FilteredRollout(rollout, low_words, candidates=1, block=5).generate(PROMPTS, 2, sampling=SAMPLING, seed=3)
    assert same(one, rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=3))


def test_a_stop_text_across_blocks_ends_the_completion():
    """Every completion says w4 w5 w6 w4 …; the text "5 w6" begins in one block of two tokens and ends in the next."""
    model = make_model().eval()
    rollout = GenerateRollout(model, make_tokenizer())

    def cyclic(asked, *, sampling, seed):
        return [Generated([7 + (len(r.ids) - 1 + t) % 3 for t in range(r.max_tokens)], "length") for r in asked]

    rollout.complete = cyclic
    sampling = Sampling(max_new_tokens=12, stop=("5 w6",))
    for block in (1, 2, 5, 12):
        found = FilteredRollout(rollout, low_words, block=block).generate(["w1"], sampling=sampling, seed=0)
        assert found.completion_ids == [[7, 8, 9]] and found.finish == ["stop"] and found.completions == ["w4 w"]


@pytest.fixture(scope="module")
def goal(tmp_path_factory):
    """A reward model of a planted goal: over w40 … w49 to w60 is preferred, over w70 … w79 to w80 is not."""
    folder = tmp_path_factory.mktemp("goal")
    how = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    trainer = make_trainer(folder, "goal_conditioned", rows=planted(96, 0), **how)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    make_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def walking() -> torch.nn.Module:
    """A policy that goes either way at first, then keeps to it but for one step in ten, and ends behind w60 or w80.

    Its embeddings are one-hot, its layers add nothing, and its head holds the log-probs of one token behind another.
    """
    probs = torch.full((VOCAB, VOCAB), 1e-9)
    left, right = slice(43, 53), slice(73, 83)  # w40 … w49 and w70 … w79; w0 is 3
    probs[:, left] = probs[:, right] = 0.05
    for own, other, end in ((left, right, 63), (right, left, 83)):
        probs[own, own], probs[own, other], probs[own, end] = 0.06, 0.01, 0.3
        probs[end] = 1e-9
        probs[end, EOS] = 1.0
    shape = {"hidden_size": VOCAB, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = make_model(**shape, head_dim=8, tie_word_embeddings=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name and "norm" not in name:
                p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.copy_(probs.log().T / VOCAB**0.5)  # RMSNorm makes a one-hot row √V long
    return model.eval()


def reached(samples: Samples) -> float:
    return sum(63 in ids for ids in samples.completion_ids) / len(samples)


def test_more_completions_reach_a_planted_goal(goal):
    judge = GoalJudge.load(goal)
    rollout = GenerateRollout(walking(), make_tokenizer())
    prompts, sampling = [row["prompt"] for row in planted(40, 3)], Sampling(max_new_tokens=10)

    def share(score=None, **how) -> float:
        sampler = FilteredRollout(rollout, score, **how) if score else rollout
        return reached(sampler.generate(prompts, 2, sampling=sampling, seed=0))

    plain, begun = share(), share(judge.score, candidates=4, block=2)
    away = share(lambda prompts, texts: -judge.score(prompts, texts), candidates=4, block=2)
    assert 0.3 < plain < 0.6 and begun > plain + 0.3 and away < plain - 0.2


# --- what is refused ---


def test_what_cannot_be_filtered_is_refused(rollout):
    server = ServerRollout("http://localhost:1", make_tokenizer())
    with pytest.raises(ValueError, match=r"expected a GenerateRollout, which goes on from .* got a ServerRollout"):
        FilteredRollout(server, low_words)
    for name in ("candidates", "keep", "block"):
        for value in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} of at least 1, got {value}"):
                FilteredRollout(rollout, low_words, **{name: value})
    with pytest.raises(ValueError, match="keep at most the 4 candidates, got keep=5"):
        FilteredRollout(rollout, low_words, keep=5)
    with pytest.raises(ValueError, match="a number for least, got nan"):
        FilteredRollout(rollout, low_words, least=float("nan"))
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    with pytest.raises(ValueError, match="temperature above 0, at which 4 candidates differ"):
        FilteredRollout(rollout, low_words).generate(PROMPTS, sampling=greedy, seed=0)
    unsure = FilteredRollout(rollout, lambda p, c: torch.full((len(c),), torch.nan))
    with pytest.raises(ValueError, match="a score for each begun completion, got 4 NaN"):
        unsure.generate(PROMPTS[:1], sampling=SAMPLING, seed=0)
    with pytest.raises(ValueError, match="seed of 0 or more"):
        FilteredRollout(rollout, low_words).generate(PROMPTS, sampling=SAMPLING, seed=-1)
    empty = FilteredRollout(rollout, low_words).generate([], sampling=SAMPLING, seed=0)
    assert len(empty) == 0


def test_a_mixture_is_filtered_as_a_mixture(rollout):
    """Its share of the reference holds in every block: at 1 the samples are the reference's."""
    reference = make_model(4).eval()
    reference.generation_config = transformers.GenerationConfig(eos_token_id=MANY_ENDS)
    mixed = MixtureRollout(rollout.model, make_tokenizer(), reference=reference, share=1.0)
    other = GenerateRollout(reference, make_tokenizer())
    found, expected = (
        FilteredRollout(x, low_words, block=2).generate(PROMPTS, sampling=SAMPLING, seed=2) for x in (mixed, other)
    )
    assert found.completion_ids == expected.completion_ids


# --- the command ---


def test_chat_towards_a_goal(goal, tmp_path, capsys):
    for name, model in (("before", make_model()), ("run", walking())):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "run" / "config.yaml").write_text(f"model: {tmp_path / 'before'}\nfull: true\n")
    base = ["chat", str(tmp_path / "run"), "--max-new-tokens", "8", "--cpu", "--dtype", "float32"]

    def chat(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([*base, "--prompt", "w1 w2", *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    drawn = ("--temperature", "1", "--json")
    code, out, _ = chat("--goal", str(goal), "--goal-candidates", "3", "--goal-block", "2", *drawn)
    rollout, judge = GenerateRollout(walking(), make_tokenizer()), GoalJudge.load(goal)
    sampler = FilteredRollout(rollout, judge.score, candidates=3, block=2)
    sampling = Sampling(max_new_tokens=8)
    assert (
        code == 0 and json.loads(out)["after"] == sampler.generate(["w1 w2"], sampling=sampling, seed=42).completions[0]
    )
    code, out, _ = chat("--goal", str(goal), "--temperature", "1")  # four candidates, whose text comes once, at the end
    assert code == 0 and "after" in out and "w4" in out
    for options, message in (
        (("--goal", str(goal)), "give a --temperature above 0"),
        (("--goal-block", "2", *drawn), "--goal-block goes with --goal FOLDER"),
        (("--goal-candidates", "2", *drawn), "--goal-candidates goes with --goal FOLDER"),
        (("--goal", str(goal), "--goal-block", "0", *drawn), "--goal-block must be at least 1, got 0"),
        (("--goal", str(tmp_path / "run"), *drawn), "no goal_state.safetensors in"),
    ):
        code, _, err = chat(*options)
        assert code == 2 and message in err
