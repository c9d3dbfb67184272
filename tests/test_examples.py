"""The examples: short enough to be read, and right: each is run on a tiny random model and held to every logit.

What they print of SmolLM2 is theirs to show; here their losses are what the textbook says of the same tokens, and fall.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from peers import peer
from xpo_fast import data
from xpo_fast.demo_data import PAIRS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo")
ONLINE = ("verifiable_reward",)  # stories of online learning, a little longer
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"

pytestmark = [
    # TRL sets what transformers has renamed; peft asks transformers under a name that it has deprecated.
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
    ),
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


@pytest.fixture(scope="module")
def tokenizer():
    """Words of the packaged pairs, of which more than half are unknown; a chat template."""
    texts = PAIRS.read_text(encoding="utf-8").split()
    words = dict.fromkeys(["<unk>", "<eos>", "<pad>", "user", "assistant", *texts[:300]])
    raw = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(tokenizer):
    """A random Llama of one layer in float32, tied as SmolLM2 is; its distributions are far from uniform."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2, eos_token_id=1, pad_token_id=2,
        bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Trainers write where they are started from."""
    monkeypatch.chdir(tmp_path)


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
    most = 100 if name in ONLINE else 60
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < most
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_as_a_script(name, model, tokenizer, monkeypatch, capsys):
    if name == "trl_trainer":
        pytest.importorskip("trl", reason="peers are an optional extra: pip install xpo_fast[bench]")
    monkeypatch.setattr("xpo_fast.models.load_model", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr("sys.argv", [name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever peers have to say on import
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_plain_loop(model, tokenizer):
    steps, lr = 4, 1e-3
    policy, reference = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    found = example("plain_loop").main(model, tokenizer, steps=steps, pairs=2, lr=lr)
    optimizer, expected = torch.optim.AdamW(policy.parameters(), lr=lr), []
    for step in range(steps):
        batch = batch_of(tokenizer, range(2 * step, 2 * step + 2))
        chosen, rejected = (textbook(policy, batch)[0] - textbook(reference, batch)[0]).chunk(2)
        loss = -logsigmoid(0.1 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(abs(loss - math.log(2)) for loss in found[1:]) > 1e-2


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
