"""Judges, selectors, and the mixture policy: hand-computed values, and what the papers say of them.

Probabilities are float32 unless said: 1e-6 is a few of its roundings.
"""

import math

import pytest
import torch

from test_trainer import WORDS, make_model, make_tokenizer
from xpo_fast import METHODS
from xpo_fast.methods.math import win_rates
from xpo_fast.recipes.mixture import AgainstMixture, MixtureRollout
from xpo_fast.recipes.selection import SELECTORS, accepted
from xpo_fast.recipes.stages import revised
from xpo_fast.rewards import Rewards
from xpo_fast.rewards.judges import FunctionJudge, Judge, RewardJudge, group_scores, group_wins, text_of
from xpo_fast.rewards.llm_judges import FIVE_POINTS, LLMJudge, SampledChoice, SelfRewardJudge, TokenChoice, points_of
from xpo_fast.rollout import GenerateRollout, Samples, Sampling

NAN = math.nan


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def select(name: str, judged, seed: int = 0, **arguments):
    judged = torch.as_tensor(judged, dtype=torch.float64)
    return SELECTORS[name](judged, generator(seed), arguments)


def scored(chosen, rejected, high, low) -> dict:
    return {"chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low}


# --- selectors ---

WINS = [[0.5, 0.9, 0.3], [0.1, 0.5, 0.5], [0.7, 0.5, 0.5]]  # win rates of the others: 0.6, 0.3, 0.6


@pytest.mark.parametrize(
    ("name", "judged", "arguments", "picks"),
    [
        ("best", [1.0, 3.0, NAN, 3.0], {}, [{"chosen": 1}]),
        ("best", [NAN, NAN], {}, []),
        ("best-worst", [1.0, NAN, -2.0, 4.0], {}, [scored(3, 2, 4.0, -2.0)]),
        ("best-worst", [2.0, 2.0, 2.0], {}, []),
        ("best-worst", [1.0, 2.0], {"min_gap": 1.0}, []),
        ("best-worst", [7.0], {}, []),
        (
            "all-pairs", WINS, {},
            [{"chosen": 0, "rejected": 1, "prob": 0.9}, {"chosen": 2, "rejected": 0, "prob": 0.7},
             {"chosen": 1, "rejected": 2, "prob": 0.5}],
        ),
        ("pair", [[0.5, 0.2], [0.8, 0.5]], {}, [{"chosen": 1, "rejected": 0, "prob": 0.8}]),
        ("pair", [[0.5, 0.5], [0.5, 0.5]], {}, []),
        ("pair", [[0.5, NAN], [NAN, 0.5]], {}, []),
        ("pair", [[0.5, 0.6], [0.4, 0.5]], {"min_gap": 0.3}, []),
        ("large-margin", WINS, {"min_gap": 0.3}, [scored(0, 1, 0.6, 0.3), scored(2, 1, 0.6, 0.3)]),
        ("large-margin", WINS, {"min_gap": 0.4}, []),
        # β → ∞ accepts all, in their order: neighbours meet; then the winners 1 and 2 do.
        ("rejection", [1.0, 4.0, 3.0, 2.0], {"n": 4, "beta": 1e9}, [scored(1, 0, 4.0, 1.0), scored(2, 3, 3.0, 2.0)]),
        (
            "rejection", [1.0, 4.0, 3.0, 2.0], {"n": 4, "beta": 1e9, "rank": "tournament"},
            [scored(1, 0, 4.0, 1.0), scored(2, 3, 3.0, 2.0), scored(1, 2, 4.0, 3.0)],
        ),
        ("rejection", [1.0, 4.0, 2.0], {"n": 3, "beta": 1e9, "rank": "tournament"},
         [scored(1, 0, 4.0, 1.0), scored(1, 2, 4.0, 2.0)]),
        ("only", 2, {}, [{"chosen": 0}, {"chosen": 1}]),
        ("against-rejected", 3, {}, [{"completions": [0, 1, 2]}]),
    ],
)  # fmt: skip
def test_what_is_selected(name, judged, arguments, picks):
    found = select(name, judged, **arguments)
    assert [{k: pytest.approx(v) for k, v in pick.items()} for pick in found] == picks


def test_rejection_sampling_is_the_papers_loop():
    """RSO's algorithm 1, written as printed: one candidate after the other, over and over, until n are accepted."""

    def printed(rewards, n, beta, g):
        left, taken = dict(enumerate(rewards)), []
        while left and len(taken) < n:
            bound, out = max(left.values()), []
            draws = torch.rand(len(left), generator=g, dtype=torch.float64).tolist()
            for (c, r), u in zip(left.items(), draws):
                if u >= math.exp((r - bound) / beta):
                    continue
                taken.append(c)
                out.append(c)
                if len(taken) == n:
                    break
            for c in out:
                left.pop(c)
        return taken

    for seed in range(20):
        rewards = torch.randn(12, generator=generator(100 + seed)).tolist()
        expected = printed(rewards, 5, 0.5, generator(seed))
        assert accepted(torch.tensor(rewards), generator(seed), n=5, beta=0.5) == expected


def test_scores_that_are_no_numbers_are_never_accepted():
    """And the passes over what is left come to an end."""
    infinite = torch.tensor([math.inf, 1.0, -math.inf, NAN, 0.5])
    assert sorted(accepted(infinite, generator(), n=5, beta=0.5)) == [1, 4]
    assert select("best-worst", infinite) == [scored(1, 4, 1.0, 0.5)]


def test_a_margin_of_whole_fifths_is_met():
    """Six candidates, hard verdicts, transitive: rates 1, 0.8, …, 0. Every two differ by 0.2 or more: 15 pairs."""
    wins = torch.ones(6, 6, dtype=torch.float64).triu(1) + 0.5 * torch.eye(6, dtype=torch.float64)
    assert len(select("large-margin", wins)) == 15
    assert len(select("large-margin", wins, min_gap=0.3)) == 10  # without the 5 neighbours


def test_rejection_sampling_takes_the_highest_of_those_left_as_its_bound():
    """β → 0: one pass for each, in the order of the rewards. With one bound for all, the third would never come."""
    assert accepted(torch.tensor([-50.0, 0.0, 60.0, NAN]), generator(), n=3, beta=1e-3) == [2, 1, 0]
    assert accepted(torch.tensor([1.0, 1.0, 1.0]), generator(), n=2, beta=1e-3) == [0, 1]
    assert accepted(torch.tensor([1.0, 2.0]), generator(), n=9, beta=0.5) in ([0, 1], [1, 0])
    with pytest.raises(ValueError, match="beta > 0"):
        accepted(torch.tensor([1.0]), generator(), n=1, beta=0.0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_accepted_candidates_are_distributed_as_the_reweighted_reference(beta):
    """Survey S4: π_ref·exp(r/β). 6,000 rounds of 64 candidates from five outcomes, one accepted a round.

    A total variation of 0.02 is 3.3 times what sampling alone gives for 6,000 draws of five outcomes (about 0.006);
    the reference itself is at least 0.15 away.
    """
    g = generator(1)
    reference = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    rewards = torch.tensor([0.0, 0.4, -0.3, 0.8, 1.0])
    target = reference * (rewards.double() / beta).exp()
    target /= target.sum()
    rounds, counts = 6000, torch.zeros(5, dtype=torch.float64)
    draws = torch.multinomial(reference, rounds * 64, replacement=True, generator=g).view(rounds, 64)
    for row in draws:
        counts[row[accepted(rewards[row], g, n=1, beta=beta)]] += 1
    assert counts.sum() == rounds
    assert (counts / rounds - target).abs().sum() / 2 < 0.02
    assert (reference - target).abs().sum() / 2 > 0.15
    chi_square = ((counts - rounds * target) ** 2 / (rounds * target)).sum()
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001


def test_all_pairs_make_sppo_regress_to_win_rates():
    """Σ over pairs of sppo has the gradient of Σ_i (K − 1)(Δ_i − (p_i − ½)/β)², p_i the win rate against others."""
    g = generator(2)
    upper = torch.rand(4, 4, generator=g, dtype=torch.float64).triu(1)
    wins = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(4, dtype=torch.float64)
    picks, beta = select("all-pairs", wins), 0.1
    assert len(picks) == 6
    delta = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    w, l = ([pick[side] for pick in picks] for side in ("chosen", "rejected"))  # noqa: E741
    zero = torch.zeros(6, dtype=torch.float64)
    prob = torch.tensor([pick["prob"] for pick in picks], dtype=torch.float64)
    losses, _ = METHODS["sppo"](
        logp_w=delta[w], logp_l=delta[l], ref_logp_w=zero, ref_logp_l=zero, prob_w=prob, beta=beta
    )
    expected = 2 * 3 * (delta - (win_rates(wins) - 0.5) / beta)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), delta)[0], expected)


# --- judges ---


def count_w1(completions, **_):
    return [float(text_of(c).split().count("w1")) for c in completions]


def test_a_function_judges_by_order_and_sees_the_columns():
    def right(completions, answer, completion_ids, **_):
        return [
            None if a is None else float(c == a) + len(ids) for c, a, ids in zip(completions, answer, completion_ids)
        ]

    judge = FunctionJudge(right)
    scores = judge.score(["p"] * 3, ["a", "b", "c"], answer=["a", "a", None])
    assert scores[:2].tolist() == [1.0, 0.0] and scores[2].isnan()
    assert judge.compare(["p"] * 3, ["a", "b", "b"], ["b", "a", "c"], answer=["a"] * 3).tolist() == [1, 0, 0.5]
    assert judge.compare(["p"] * 2, ["a", "b"], ["b", "a"], answer=["a", None]).isnan().tolist() == [False, True]
    some = FunctionJudge(lambda completions, **_: [None if c == "?" else float(len(c)) for c in completions])
    (wins,) = group_wins(some, ["p"], [["aa", "?", "a"]])
    assert wins[[0, 0, 2], [2, 0, 0]].tolist() == [1.0, 0.5, 0.0]
    assert wins[[0, 1, 1, 2], [1, 0, 2, 1]].isnan().all() and len(select("all-pairs", wins)) == 1
    grouped = group_scores(judge, ["p"], [["a", "b"]], {"answer": ["a"]}, [[[1, 2], [1, 2, 3]]])
    assert grouped[0].tolist() == [3.0, 3.0]
    assert judge(prompts=["p"], completions=["a"], answer=[None]) == [None]
    samples = Samples(["p", "p"], [[1], [1]], [[2], [2, 3]], ["a", "b"], ["stop", "stop"])
    assert Rewards(judge)(samples, {"answer": ["a", "a"]}).rewards.tolist() == [2.0, 2.0]


class Lengths:
    """Something that scores, as a reward model does."""

    def score(self, prompts, completions):
        return torch.tensor([float(len(c)) for c in completions])


def test_a_reward_model_compares_by_bradley_terry():
    judge = RewardJudge(Lengths())
    assert judge.compare(["p"], ["abc"], ["a"]).item() == pytest.approx(1 / (1 + math.exp(-2)))
    wins = group_wins(judge, ["p", "q"], [["a", "abc"], ["a"]])
    assert wins[0][1, 0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert wins[0].diagonal().tolist() == [0.5, 0.5] and wins[1].tolist() == [[0.5]]


class Comparer(Judge):
    """Non-transitive, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list = []

    def compare(self, prompts, first, second, **columns):
        self.asked += zip(prompts, first, second)
        beats = {"rs", "sp", "pr"}
        return torch.tensor([0.8 if a + b in beats else 0.5 if a == b else 0.2 for a, b in zip(first, second)])


def test_a_judge_that_only_compares_scores_by_win_rates_in_the_group():
    judge = Comparer()
    assert not judge.scores
    (wins,) = group_wins(judge, ["x"], [["r", "s", "p"]])
    torch.testing.assert_close(wins, torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]]))
    assert judge.asked == [("x", "r", "s"), ("x", "r", "p"), ("x", "s", "p")]
    torch.testing.assert_close(group_scores(judge, ["x"], [["r", "s", "s"]])[0], torch.tensor([0.8, 0.35, 0.35]))
    with pytest.raises(ValueError, match="Comparer compares and does not score"):
        judge.score(["x"], ["r"])


class Biased:
    """Likes an answer by the number of its letters, and the first place by `bias`."""

    chat = False

    def __init__(self, bias: float) -> None:
        self.bias, self.questions = bias, []

    def __call__(self, questions, words):
        self.questions += questions
        first, second = (
            torch.tensor([len(q.split(f"[Answer {x}]\n")[1].split("\n")[0]) for q in questions]).float() for x in "AB"
        )
        p = 0.5 + 0.05 * (first - second) + self.bias
        return torch.stack([p, 1 - p], dim=1)


def test_both_orders_cancel_a_preference_for_a_place():
    prompts, first, second = ["p", "q {first}", "r"], ["aaa", "aa", "a{second}"], ["a", "aa", "aaaa"]
    fair = LLMJudge(Biased(0.0), both_orders=False).compare(prompts, first, second)
    biased = Biased(0.3)
    found = LLMJudge(biased).compare(prompts, first, second)
    torch.testing.assert_close(found, fair)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.5, 0.75]))
    once = LLMJudge(Biased(0.3), both_orders=False).compare(prompts, first, second)
    torch.testing.assert_close(once, fair + 0.3)
    assert len(biased.questions) == 6
    assert "q {first}" in biased.questions[1] and "a{second}" in biased.questions[2]  # put in once, not filled again
    swapped = LLMJudge(Biased(0.3)).compare(prompts, second, first)
    torch.testing.assert_close(found + swapped, torch.ones(3))


def test_a_preference_for_a_place_is_told():
    """Bias 0.1. Lengths 5 and 1: P(the first place wins) is 0.8, then 0.4 the other way round. 2 and 2: 0.6 and 0.6."""
    judge = LLMJudge(Biased(0.1))
    judge.compare(["p"], ["aaaaa"], ["a"])
    judge.compare(["q"], ["aa"], ["bb"])
    told = judge.places()
    assert told == {"compared": 2, "first_place": pytest.approx(0.6 + 0.6), "flipped": 1}
    assert judge.places() == {} and FunctionJudge(count_w1).places() == {}
    once = LLMJudge(Biased(0.1), both_orders=False)
    once.compare(["p"], ["a"], ["b"])
    assert once.places() == {}


def test_a_verdict_missing_in_one_order_is_none():
    """Not ½, and not the other order's alone."""
    replies = iter([("A", "B"), ("hm", "B")])  # forth, back: in the second pair the second place wins twice

    class Choice:
        chat = True

        def __call__(self, questions, words):
            return SampledChoice(Says(*next(replies)))(questions, words)

    judge = LLMJudge(Choice())
    found = judge.compare(["p", "q"], ["x", "y"], ["z", "w"])
    assert found[0].isnan() and found[1] == 0.5
    assert judge.places() == {"compared": 1, "first_place": 0.0, "flipped": 1}


def test_an_llms_grade_is_the_expected_one():
    class Grades:
        chat = True

        def __call__(self, questions, words):
            assert list(words) == list("123456789") and questions[0][0]["role"] == "user"
            table = torch.zeros(len(questions), 9)
            table[0, 8], table[1, [0, 8]], table[2, 3] = 1.0, 0.5, 1.0
            return table

    scores = LLMJudge(Grades()).score(["p"] * 3, ["a", "b", "c"])
    assert scores.tolist() == [1.0, 0.0, -0.25]
    with pytest.raises(ValueError, match=r"must hold \{second\}"):
        LLMJudge(Grades(), pairwise="{prompt} {first}")


class Says:
    """A rollout that says what it is told to."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = replies, []

    def generate(self, prompts, n=1, *, sampling, seed):
        self.asked += list(prompts)
        rows = [p for p in prompts for _ in range(n)]
        said = [self.replies[i % len(self.replies)] for i in range(len(rows))]
        said = [s if isinstance(p, str) else [{"role": "assistant", "content": s}] for s, p in zip(said, rows)]
        return Samples(rows, [[1]] * len(rows), [[1]] * len(rows), said, ["stop"] * len(rows))

    def update(self, model):
        pass


def test_a_verdict_is_read_from_words():
    choice = SampledChoice(Says("B, because A is short", "**A**", "Both", "Answer: A"), n=2)
    table = choice([[{"role": "user", "content": "?"}]] * 2, ("A", "B"))
    assert table[0].tolist() == [0.5, 0.5] and table[1].tolist() == [1.0, 0.0]
    assert SampledChoice(Says("neither"))(["?"], ("A", "B")).isnan().all()


def test_reasons_come_before_the_verdict():
    thinks, choice = Says("A is rude."), Biased(0.0)
    choice.__class__ = type(
        "Talks", (Biased,), {"__call__": lambda self, q, w: self.questions.extend(q) or torch.tensor([[0.25, 0.75]])}
    )
    found = LLMJudge(choice, reason=thinks, both_orders=False).compare(["p"], ["x"], ["y"])
    assert found.item() == 0.25
    question = choice.questions[0]
    assert question.index("[Answer B]") < question.index("A is rude.") < question.index("reply with A or B")


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("Fine.\nScore: 4", 4.0),
        ("score: 3.5 of 5", 3.5),
        ("Score: 1 at first, but Score: **2**", 2.0),
        ("Score: 12", NAN),
        ("Score: 5.5", NAN),
        ("a good answer, 5", NAN),
    ],
)
def test_points_are_read_from_a_reply(reply, points):
    assert points_of(reply) == pytest.approx(points, nan_ok=True)


def test_the_model_judges_itself_by_the_mean_of_what_it_says():
    judge = SelfRewardJudge(Says("Score: 5", "Score: 2", "hm", "no", "no", "no"), n=3)
    scores = judge.score(["p", "q"], ["a", "b"])
    assert scores[0] == 3.5 and scores[1].isnan()
    asked = judge.rollout.asked[0][0]["content"]
    assert "[Request]\np\n" in asked and "[Answer]\na\n" in asked and "{" not in asked
    assert all(word in FIVE_POINTS for word in ("relevant", "covers", "useful", "clear", "expertise"))


def test_critique_and_revision_go_round():
    rollout, kept = Says("too curt", "better"), []
    out = revised(
        rollout,
        ["p", "q"],
        ["a", "b"],
        sampling=Sampling(),
        seed=0,
        rounds=2,
        principles=("kind?", "true?"),
        say=lambda r, critiques, revisions: kept.append((r, critiques, revisions)),
    )
    assert out == ["too curt", "better"] and [r for r, _, _ in kept] == [0, 1]
    first, second = rollout.asked[:2], rollout.asked[2:4]
    assert first[0].startswith("pa\n\n") and "kind?" in first[0] and "true?" in first[1]
    assert "true?" in rollout.asked[4] and second[0].startswith(first[0])
    assert rollout.asked[4].startswith("ptoo curt")


def test_token_choice_is_the_models_own_distribution():
    """Questions of other lengths in one batch: each as if it were alone, normalised over the two words."""
    model, tokenizer = make_model(), make_tokenizer(vocabulary=[*WORDS[:-2], "A", "B"])
    questions = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    found = TokenChoice(model, tokenizer, batch_size=2)(questions, ("A", "B"))
    words = tokenizer("A B", add_special_tokens=False)["input_ids"]
    for row, question in zip(found, questions):
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(row, logits[words].softmax(dim=0), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"begins some of the answers.*same token"):
        TokenChoice(model, tokenizer)(["w1"], ("no", "yes"))  # both unknown


# --- the mixture of policy and reference ---


def test_the_mixture_lies_between_its_two_policies():
    policy, reference, tokenizer = make_model(0), make_model(1), make_tokenizer()
    prompts, sampling = ["w1 w2", "w3", "w4 w5 w6"], Sampling(max_new_tokens=6)

    def sample(share: float) -> Samples:
        rollout = MixtureRollout(policy, tokenizer, reference=reference, share=share)
        return rollout.generate(prompts, 3, sampling=sampling, seed=5)

    for share, model in ((0.0, policy), (1.0, reference)):
        alone = GenerateRollout(model, tokenizer, continuous=False).generate(prompts, 3, sampling=sampling, seed=5)
        assert sample(share).completion_ids == alone.completion_ids
    mixed = sample(0.25)
    assert mixed.completion_ids not in (sample(0.0).completion_ids, sample(1.0).completion_ids)
    for row in range(len(mixed)):
        prompt, ids = mixed.prompt_ids[row], mixed.completion_ids[row]
        with torch.no_grad():
            pi, ref = (m(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for m in (policy, reference))
        logps = (0.75 * pi + 0.25 * ref).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(mixed.logps[row]), expected, rtol=0, atol=1e-5)
    assert "forward" not in policy.__dict__


def test_the_mixture_needs_a_reference():
    with pytest.raises(ValueError, match="adapter that can be switched off"):
        MixtureRollout(make_model(), make_tokenizer(), reference=None, share=0.1)
    with pytest.raises(ValueError, match=r"share of the reference in \[0, 1\], got 2"):
        MixtureRollout(make_model(), make_tokenizer(), reference=make_model(), share=2.0)


def test_rivals_follow_from_the_call():
    """P against the mixture's completions; asked again, the same ones."""
    against = AgainstMixture(FunctionJudge(count_w1), Sampling(max_new_tokens=4), seed=1)
    against.rollout = MixtureRollout(make_model(0), make_tokenizer(), reference=make_model(1), share=0.5)
    many, none = " w1" * 9, " w2"
    first = against(prompts=["w1 w2", "w3"], completions=[many, many])
    assert first == against(prompts=["w1 w2", "w3"], completions=[many, many]) == [1.0, 1.0]
    assert all(p <= 0.5 for p in against(prompts=["w1 w2", "w3"], completions=[none, none]))
