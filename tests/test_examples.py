"""The examples: short enough to be read, and right: each is run on a tiny random model and held to every logit.

What they print of SmolLM2 is theirs to show; here their losses are what the textbook says of the same tokens, and fall.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from peers import peer
from xpo_fast import data
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.recipes import StoppingRule
from xpo_fast.rewards.judges import text_of
from xpo_fast.rewards.llm_judges import GRADE, PAIRWISE
from xpo_fast.rewards.report import summary
from xpo_fast.rollout import Sampling, ServerRollout

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo")
# The loss in a bare loop and in other people's; the stories of whole trainings are a little longer.
SHORT = ("dpo_loop", "hf_trainer", "trl_trainer", "liger_swap", "torchtune_loss", "openrlhf_actor", "verl_actor")
LONGEST = {**dict.fromkeys(SHORT, 60), "rl_loop": 81}
SERVES = ("policy_server",)  # until it is interrupted
# Fewer steps than a story has, where a script takes their number.
BRIEF = {
    "paft": ["--steps", "2"],
    "ppo_reward_model": ["--rollouts", "2", "--reward-steps", "2"],
    "reward_model": ["--steps", "2"],
    "verifiable_reward": ["--steps", "2"],
}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"

pytestmark = [
    # TRL sets what transformers has renamed; peft asks transformers under a name that it has deprecated.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def example(name):
    """The module of an example. Peers that it imports may warn on import."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def test_the_demo_does_what_fits_into_its_minutes():
    demo = example("demo")
    assert demo.affordable(5.0, 33, 500.0) == (33, 60)
    for step_s in (12.0, 20.0, 35.0):
        steps, pairs = demo.affordable(step_s, 33, 500.0)
        assert pairs == 30 and demo.LEAST_STEPS <= steps <= 33
        assert step_s * (steps + demo.STEPS_PER_HELD_OUT_PAIR * pairs + 2) <= 500.0
    assert demo.affordable(1000.0, 33, 500.0) == (demo.LEAST_STEPS, 30)
    assert demo.affordable(1000.0, 2, -1.0) == (2, 30)


@pytest.fixture(scope="module")
def tokenizer():
    """Words of the packaged pairs, of which more than half are unknown; a chat template."""
    texts = PAIRS.read_text(encoding="utf-8").split()
    words = dict.fromkeys(["<unk>", "<eos>", "<pad>", "user", "assistant", *texts[:300], *"AB123456789"])
    raw = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(tokenizer, tmp_path):
    """A random Llama of one layer in float32, tied as SmolLM2 is; its distributions are far from uniform.

    It comes from a folder, as SmolLM2 does: adapters name it.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return load_model(str(tmp_path / "tiny"))[0].eval()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Trainers write where they are started from; a script finds those beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)


def batch_of(tokenizer, pairs):
    """The packaged pairs from the first on: (2P, T)."""
    rows: Any = data.encode(data.load(PAIRS, kind="pair"), tokenizer, kind="pair", max_length=128)
    return data.Collator(tokenizer.pad_token_id, "pair")(list(rows.select(pairs)))


def textbook(model, batch):
    """Summed log-probs of the answers under a model, and their lengths, from its logits in float64: (2P,) each."""
    scored = batch["targets"] != -100
    logp = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    logp = logp.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    return (logp * scored).sum(1), scored.sum(1)


def textbook_simpo(model, batch):
    logp, length = textbook(model, batch)
    chosen, rejected = (logp / length).chunk(2)
    return -logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()


def falls(losses):
    return all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("name", NAMES)
def test_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < LONGEST.get(name, 100)
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SERVES])
def test_as_a_script(name, model, tokenizer, monkeypatch, capsys, caplog):
    if name == "trl_trainer":
        pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")

    def load(name, **options):
        return (copy.deepcopy(model), tokenizer) if name == SMOLLM2 else load_model(name, **options)

    monkeypatch.setattr("xpo_fast.models.load_model", load)
    monkeypatch.setattr("sys.argv", [name, *BRIEF.get(name, [])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever peers have to say on import
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out
    assert not [message for message in caplog.messages if message.startswith("preflight, fault")]  # no false alarm


def with_adapter(model, **lora):
    """A copy of the model with the adapter of a loop, seeded as there."""
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", **lora))


def test_dpo_loop(model, tokenizer):
    steps, lr = 4, 1e-2
    policy, reference = with_adapter(model, r=16, lora_alpha=32), copy.deepcopy(model)
    found = example("dpo_loop").main(model, tokenizer, steps=steps, pairs=2, lr=lr)
    optimizer, expected = torch.optim.AdamW(policy.parameters(), lr=lr), []
    for step in range(steps):
        batch = batch_of(tokenizer, range(2 * step, 2 * step + 2))
        chosen, rejected = (textbook(policy, batch)[0] - textbook(reference, batch)[0].detach()).chunk(2)
        loss = -logsigmoid(0.1 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(abs(loss - math.log(2)) for loss in found[1:]) > 1e-2


def test_rl_loop(model, tokenizer):
    """Rewards and losses are those of the samples, by every logit: the second step clips the ratio to the first."""
    module, prompts, answers, lr = example("rl_loop"), 2, 3, 3e-2
    policy = with_adapter(model, r=16, lora_alpha=32)
    found = module.main(model, tokenizer, rollouts=2, prompts=prompts, answers=answers, lr=lr)
    questions = [row["prompt"] for row in data.load_prompts(PAIRS)]
    optimizer, expected = torch.optim.AdamW(policy.parameters(), lr=lr), []
    for k in range(2):
        asked = questions[prompts * k : prompts * (k + 1)]
        sampler = module.GenerateRollout(policy, tokenizer)
        samples = sampler.generate(asked, answers, sampling=Sampling(module.TOKENS), seed=k)
        reward = torch.tensor(module.short_words(samples.completions), dtype=torch.float64).view(prompts, answers)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        old: list[Any] = []
        for step in range(2):
            losses = []
            for row, (prompt, ids) in enumerate(zip(samples.prompt_ids, samples.completion_ids)):
                logp = policy(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
                logp = logp[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
                old += [logp.detach()] if step == 0 else []
                ratio, a = (logp - old[row]).exp(), advantage.flatten()[row]
                losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean())
            optimizer.zero_grad()
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
        expected.append((reward.mean().item(), loss.item()))
    assert [x for pair in found for x in pair] == pytest.approx([x for pair in expected for x in pair], abs=1e-4)
    assert all(loss < -1e-3 for _, loss in found)  # what the first step has gained


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_hf_trainer(model, tokenizer, micro_batches):
    expected = textbook_simpo(model, batch_of(tokenizer, range(4))).item()
    losses = example("hf_trainer").main(model, tokenizer, steps=3, micro_batches=micro_batches)
    assert len(losses) == 3 and losses[0] == pytest.approx(expected, rel=1e-5)
    assert falls(losses)


def test_trl_trainer(model, tokenizer, monkeypatch):
    pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
    module = example("trl_trainer")
    calls = []
    function = module.engine.HeadFunction
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda *a, **k: calls.append(1) or apply(*a, **k))
    found = module.main(model, tokenizer, steps=2)
    assert found["installed"] == pytest.approx(found["TRL"], rel=1e-4) and calls
    assert found["shared"] == pytest.approx(found["TRL"], rel=1e-4)
    assert found["TRL"][0] == pytest.approx(math.log(2), rel=1e-6) and found["TRL"][1] != found["TRL"][0]
    assert len(found["simpo"]) == 2 and abs(found["simpo"][0] - math.log(2)) > 1e-2
    assert not module.engine.installed()


def test_liger_swap(model, tokenizer):
    batch = batch_of(tokenizer, range(4))
    found = example("liger_swap").main(model, tokenizer)
    logp, length = textbook(model, batch)
    chosen, rejected = (logp / length).chunk(2)
    odds = [p - torch.log1p(-p.exp()) for p in (chosen, rejected)]
    expected = -0.1 * logsigmoid(odds[0] - odds[1]).mean() - logp[:4].sum() / length[:4].sum()
    assert found["xpo_fast"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_liger_swap_against_liger(model, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever Liger and what it imports have to say on import
        peer("liger_kernel.chunked_loss", "liger-kernel", "0.8.")
    found = example("liger_swap").main(model, tokenizer)
    for ours, theirs in zip(found["xpo_fast"], found["Liger"]):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_torchtune_loss(model, tokenizer):
    module = example("torchtune_loss")
    batch = batch_of(tokenizer, range(4))
    decoder = module.Decoder(model)
    assert_close(decoder(batch["input_ids"]), model(batch["input_ids"]).logits)
    expected = textbook_simpo(model, batch).item()
    losses = module.main(model, tokenizer, steps=3)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert falls(losses)


def test_openrlhf_actor(model, tokenizer):
    module = example("openrlhf_actor")
    g = torch.Generator().manual_seed(1)
    sequences = torch.randint(5, len(tokenizer), (3, 11), generator=g)
    attention_mask = torch.ones_like(sequences)
    attention_mask[0, :4] = attention_mask[2, :1] = 0  # prompts padded on the left
    action_mask = torch.ones(3, 5, dtype=torch.bool)
    action_mask[1, 2:] = action_mask[2, 4:] = False
    # GPT-2: its positions are absolute, so that those of a padded row show.
    config = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **config)).eval()
    found = module.Actor(gpt2, temperature=0.7)(sequences, action_mask, attention_mask)
    for row in range(3):  # each without its padding
        ids = sequences[row, attention_mask[row].bool()]
        logp = (gpt2(ids[None]).logits[0].double() / 0.7).log_softmax(-1)
        expected = logp[:-1].gather(1, ids[1:, None])[-5:, 0] * action_mask[row]
        assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
    losses = module.main(model, tokenizer, samples=3, epochs=3, tokens=8)
    assert falls(losses)


def test_verl_actor(model, tokenizer, capsys):
    """Packed rows are scored as each of them alone; the loss of the first step is the textbook's, and it falls."""
    module, start = example("verl_actor"), copy.deepcopy(model)
    losses = module.main(model, tokenizer, temperature=0.7, bonus=0.1)
    apart = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(apart) == 4 and max(apart) < 1e-5 and falls(losses)

    texts = ["Apples brown when cut, unless", "A metaphor says", "Rain is water that"]
    rows = [torch.tensor(tokenizer(text + " it is what it is.")["input_ids"]) for text in texts]
    terms, found = [], []
    for row, advantage in zip(rows, (1.0, -0.5, -0.5)):
        logp = (start(row[None]).logits[0, :-1].double() / 0.7).log_softmax(-1)
        terms.append(-advantage + 0.1 * (logp.exp() * logp).sum(1))
        found.append(logp.gather(1, row[1:, None])[:, 0])
    assert losses[0] == pytest.approx(torch.cat(terms).mean().item(), abs=1e-5)

    packed = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(len(x)) for x in rows])[None]}
    hidden = module.hidden_states(start, packed)
    logp, _ = module.log_probs_and_entropy(hidden, start.lm_head.weight, packed["input_ids"].roll(-1, 1), 0.7)
    for own, expected in zip(logp[0].split([len(x) for x in rows]), found):
        assert_close(own[:-1].double(), expected, rtol=1e-5, atol=1e-5)


def test_verifiable_reward():
    sums = example("verifiable_reward")
    said = ["[7]", " [ 7 ]\n", "[8]", "7", "[7] sheep", "[]"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    rewards = sums.correct(completions, [7] * 6)
    assert rewards == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    control = sums.shuffled()
    dealt = [control(completions, [7] * 6) for _ in range(3)]
    assert all(sorted(some) == sorted(rewards) for some in dealt)
    assert len({tuple(some) for some in dealt}) > 1
    for row in sums.sums(100, 0):
        a, b = map(int, row["prompt"][-1]["content"].split(" + "))
        assert row["answer"] == a + b


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("method", ["grpo", "ppo", "rloo"])
def test_verifiable_reward_runs(method, control, model, tokenizer):
    sums, called = example("verifiable_reward"), []
    known = sums.correct
    sums.correct = lambda completions, answer, **_: called.append(answer) or known(completions, answer)
    found = sums.main(model, tokenizer, method, control=control, steps=2)
    assert len(found["log"]) == 2 and {"before", "after"} <= found.keys()
    assert called[0] == called[-1] == [row["answer"] for row in sums.sums(64, -1)]
    assert all(entry["grad_norm"] < math.inf for entry in found["log"])


# --- whole trainings ------------------------------------------------------------------------------------------------


def adapted(model, folder):
    """The model as it is in its folder, with the adapter of this one."""
    return peft.PeftModel.from_pretrained(load_model(model.config._name_or_path)[0], folder).eval()


def held_out_batch(tokenizer, count):
    rows = len(PAIRS.read_text(encoding="utf-8").splitlines())
    return batch_of(tokenizer, range(rows - count, rows))


def both_sides(scores):
    """(2P,) as the rows of a batch of pairs are."""
    return torch.from_numpy(scores.chosen).tolist() + torch.from_numpy(scores.rejected).tolist()


def test_reward_model(model, tokenizer, tmp_path):
    """What it reports of the held-out pairs is what the folders give, by every logit and the last hidden state."""
    found = example("reward_model").main(model, tokenizer, steps=3, batch=4, folder=str(tmp_path / "reward"))
    batch = held_out_batch(tokenizer, 60)
    reward = adapted(model, tmp_path / "reward")
    head = {name: x.double() for name, x in load_file(tmp_path / "reward" / "value_head.safetensors").items()}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden = reward(**inputs, output_hidden_states=True).hidden_states[-1]
    last = hidden[torch.arange(120), batch["attention_mask"].sum(1) - 1].double()
    expected = last @ head["weight"][0] + head["bias"][0]
    assert both_sides(found["explicit"]) == pytest.approx(expected.tolist(), abs=1e-5)
    right = (expected[:60] > expected[60:]).double().mean().item()
    assert summary(found["explicit"])["accuracy"] == pytest.approx(right)
    assert abs(found["explicit"].margin - found["untrained"].margin).max() > 1e-3

    policy = adapted(model, tmp_path / "reward-dpo")
    expected = 0.1 * (textbook(policy, batch)[0] - textbook(model, batch)[0])
    assert both_sides(found["implicit"]) == pytest.approx(expected.tolist(), abs=1e-5)
    assert abs(found["implicit"].margin).max() > 1e-3


def test_ppo_reward_model(model, tokenizer, tmp_path):
    story, start = example("ppo_reward_model"), copy.deepcopy(model)
    shape = {"rollouts": 4, "prompts": 3, "generations": 2, "tokens": 6, "folder": str(tmp_path / "ppo")}
    found = story.main(model, tokenizer, reward_steps=2, **shape)
    log, samples = found["log"], (tmp_path / "ppo" / "samples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in samples.splitlines()]
    assert len(log) == 4 and len(rows) == 24 and any(row["truncated"] for row in rows)
    # The reward is the reward model's, less 1 for an answer that is cut off.
    scores = found["reward_model"].score([r["prompt"] for r in rows], [r["completion"] for r in rows])
    expected = [score - row["truncated"] for score, row in zip(scores.tolist(), rows)]
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)
    for k, entry in enumerate(log):
        assert entry["reward"] == pytest.approx(sum(expected[6 * k : 6 * k + 6]) / 6, abs=1e-5)
        assert math.isfinite(entry["value/explained"]) and entry["value/loss"] > 0
    # Adaptive: 0 nats at first, for adapter and reference are one; then by how far it is from the target.
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and log[0]["kl_coef"] == pytest.approx(0.05)
    assert any(abs(entry["objective/kl"]) > 1e-4 for entry in log[1:])
    for entry, following in itertools.pairwise(log):
        error = min(max(entry["objective/kl"] / story.KL_TARGET - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(entry["kl_coef"] * (1 + error))
    # The reference is the policy with its adapter off: the model as it was.
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert not torch.allclose(found["policy"](ids).logits, start(ids).logits, atol=1e-3)
        with found["policy"].disable_adapter():
            assert_close(found["policy"](ids).logits, start(ids).logits)


def test_ppo_with_a_reward_model_that_is_given(model, tokenizer):
    class Letters:
        __name__ = "letters"

        def __call__(self, completions, **_):
            return [float(len(text_of(answer))) for answer in completions]

    shape = {"rollouts": 1, "prompts": 2, "generations": 2, "tokens": 6}
    found = example("ppo_reward_model").main(model, tokenizer, Letters(), **shape)
    assert "rewards/letters/mean" in found["log"][0]


def test_policy_server(model, tokenizer, tmp_path):
    """It says the log-probs of whichever policy it is told to load, and of the base once that is gone."""
    policy = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    prompts = [row["prompt"] for row in data.load_prompts(PAIRS)[:3]]
    with example("policy_server").PolicyServer(model, tokenizer) as server:
        options: Any = {"push": "lora", "folder": tmp_path / "adapters", "retries": 0, "concurrency": 2}
        rollout = ServerRollout(server.url, tokenizer, **options)
        for of in (model, policy.eval()):
            if of is policy:
                rollout.update(policy)
            samples = rollout.generate(prompts, 2, sampling=Sampling(5, temperature=1.0), seed=3)
            assert samples.logps is not None and set(samples.finish) <= {"stop", "length"}
            for prompt, ids, said in zip(samples.prompt_ids, samples.completion_ids, samples.logps):
                logits = of(torch.tensor([prompt + ids])).logits[0].double()
                expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
                assert said == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
        assert len(server.policies) == 2 and rollout.model in server.policies


def test_server_rollout(model, tokenizer):
    """The run whose server loses its adapters ends as one whose server does not."""
    story = example("server_rollout")
    found = story.main(model, tokenizer, steps=4, tokens=6)
    story.Forgetful.at = 0
    undisturbed = story.main(model, tokenizer, steps=4, tokens=6)
    assert undisturbed["stopped"] == []
    (reason,) = found["stopped"]
    assert reason.startswith("after step 2: ") and "404" in reason and "is not served" in reason
    assert [entry["step"] for entry in found["log"]] == [1, 2, 3, 4]
    for name in ("reward", "loss", "off_policy/weight"):
        expected = [entry[name] for entry in undisturbed["log"]]
        assert [entry[name] for entry in found["log"]] == pytest.approx(expected, abs=1e-6)
    # The server samples from the weights of the moment: what it says is what the policy says.
    assert [entry["off_policy/weight"] for entry in found["log"]] == pytest.approx([1.0] * 4, abs=1e-4)
    assert found["policy"].state_dict().keys() == undisturbed["policy"].state_dict().keys()
    for name, x in found["policy"].state_dict().items():
        assert_close(x, undisturbed["policy"].state_dict()[name], msg=name)


def asked(model, tokenizer, question, words):
    """The probabilities of these words behind a judge's question, from all logits."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, -1].double()
    return logits[tokenizer.convert_tokens_to_ids(list(words))].softmax(-1)


def test_recipe_ai_feedback(model, tokenizer, tmp_path):
    story = example("recipe_ai_feedback")

    def run(name, **options):
        small = {"questions": 3, "held_out": 4, "draws": 3, "tokens": 5, "max_steps": 2, "learning_rate": 1e-2}
        return story.main(str(tmp_path / "tiny"), tmp_path / name, **small, **options)

    def lines(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    # No gain is enough: it stops after one of its iterations, and gives back what it was given.
    stopped, summaries = run("stopped", rule=StoppingRule(min_gain=2.0))
    assert len(stopped.history) == 2 and stopped.best == 0 and stopped.model == str(tmp_path / "tiny")
    assert (
        "no better" in stopped.reason and len(summaries) == 1 and not (tmp_path / "stopped" / "iteration-001").exists()
    )
    # Any is: it goes on to the end.
    whole, summaries = run("whole", rule=StoppingRule(min_gain=-2.0), iterations=2)
    assert len(whole.history) == 3 and whole.best == 2 and "all 2 iterations" in whole.reason

    # The grades: those of the model that was given, for what is written down.
    for history, folder in zip(whole.history, ("start", "iteration-000", "iteration-001")):
        grades = []
        for line in lines(tmp_path / "whole" / folder / "held_out-00000.jsonl"):
            said = {"prompt": text_of(line["prompt"]), "completion": text_of(line["completion"])}
            table = asked(model, tokenizer, GRADE.format(**said), "123456789")
            grades.append((table @ torch.linspace(-1, 1, 9).double()).item())
            assert line["score"] == pytest.approx(grades[-1], abs=1e-5)
        assert len(grades) == 4 and history == pytest.approx(sum(grades) / 4, abs=1e-5)

    # The preferences: both orders, averaged.
    folder, firsts = tmp_path / "whole" / "iteration-000", []
    told = zip(lines(folder / "samples-00000.jsonl"), lines(folder / "judged-00000.jsonl"), strict=True)
    for line, judged in told:
        for i, j in itertools.combinations(range(3), 2):
            prompt, *answers = map(text_of, (line["prompt"], *(line["completions"][k] for k in (i, j))))
            p = [
                asked(model, tokenizer, PAIRWISE.format(prompt=prompt, first=a, second=b), "AB")[0].item()
                for a, b in (answers, answers[::-1])
            ]
            expected = (p[0] + 1 - p[1]) / 2
            assert judged["wins"][i][j] == pytest.approx(expected, abs=1e-5)
            firsts.append(p)
    assert len(summaries) == 2 and summaries[0]["first_place"] == pytest.approx(sum(map(sum, firsts)) / 18, abs=1e-5)
    assert summaries[0]["flipped"] == sum((a > 0.5) == (b > 0.5) for a, b in firsts) / 9


def test_paft(model, tokenizer, tmp_path):
    story, folder, start = example("paft"), tmp_path / "paft", copy.deepcopy(model)
    found = story.main(model, tokenizer, steps=3, held_out=6, folder=str(folder))
    batch = held_out_batch(tokenizer, 6)
    assert list(found) == ["base", "sft", "dpo", "cat", "ties"]
    assert both_sides(found["base"]) == pytest.approx(textbook(start, batch)[0].tolist(), abs=1e-3)
    # `cat` is the base with both products of the adapters' factors added to its weights.
    by_hand = copy.deepcopy(start)
    for method in ("sft", "dpo"):
        factors = load_file(folder / method / "adapter_model.safetensors")
        for name, a in factors.items():
            if ".lora_A." in name:
                b = factors[name.replace(".lora_A.", ".lora_B.")]
                target = name.removeprefix("base_model.model.").split(".lora_A.")[0]
                by_hand.get_submodule(target).weight.data.add_(b @ a, alpha=32 / 16)
        expected = textbook(adapted(model, folder / method), batch)[0].tolist()
        assert both_sides(found[method]) == pytest.approx(expected, abs=1e-3)
    merged = adapted(model, folder / "cat").merge_and_unload()
    assert_close(merged.state_dict(), by_hand.state_dict(), rtol=0, atol=1e-5)
    expected = textbook(by_hand, batch)[0].tolist()
    assert both_sides(found["cat"]) == pytest.approx(expected, abs=1e-3)
    apart = [abs(a.margin - b.margin).max() for a, b in itertools.combinations(found.values(), 2)]
    assert min(apart) > 1e-2  # or what is close above says nothing


def test_paft_penalty():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, -3.0]])
    layer.weight.grad = torch.tensor([[0.5, 0.5]])
    story = example("paft")
    story.Sparse().on_pre_optimizer_step(None, None, None, model=layer)
    assert_close(layer.weight.grad, torch.tensor([[0.5 + story.L1, 0.5 - story.L1]]))
