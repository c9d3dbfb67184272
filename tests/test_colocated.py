"""VLLMRollout against a stand-in with vLLM's signatures: draws, seeds, weights in place, adapters, when it sleeps."""

from __future__ import annotations

import sys

import pytest
import torch

import vllm_stand_in
from test_rl import make_trainer, share_of_even
from test_rollout import PEFT_WARNING, with_adapter
from test_trainer import lora, make_model, make_tokenizer
from xpo_fast.rollout import GenerateRollout, RolloutError, Sampling, VLLMRollout, sample_logps
from xpo_fast.seeds import seed_at

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]  # ragged
SAMPLING = Sampling(max_new_tokens=6, temperature=0.8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def engines(monkeypatch):
    return vllm_stand_in.install(monkeypatch, make_tokenizer())


def started(base, model, **options) -> VLLMRollout:
    rollout = VLLMRollout(base, make_tokenizer(), **options)
    rollout.update(model)
    return rollout


def alone(model, sampling=SAMPLING, n=2, seed=4) -> list[list[int]]:
    """What the model draws for each (prompt, copy) from the seed of its place."""
    rollout = GenerateRollout(model, make_tokenizer())
    return [
        rollout.generate([prompt], sampling=sampling, seed=seed_at(seed, i, copy)).completion_ids[0]
        for i, prompt in enumerate(PROMPTS)
        for copy in range(n)
    ]


def test_it_draws_what_the_policy_does(base, engines):
    model = make_model(seed=1).eval()  # other weights than the folder's
    samples = (rollout := started(base, model)).generate(PROMPTS, 2, sampling=SAMPLING, seed=4)
    assert samples.completion_ids == alone(model) and samples.prompts == [p for p in PROMPTS for _ in range(2)]
    own = sample_logps(model, samples, temperature=0.8)
    reported = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in samples.logps], batch_first=True)
    assert torch.allclose(own, reported, atol=1e-5)
    for ids, finish in zip(samples.completion_ids, samples.finish, strict=True):
        assert (ids[-1] == 1) == (finish == "stop")
    (engine,) = engines.made
    assert engine.max_model_len == 128 and engine.memory == 0.3 and engine.lora_rank is None
    assert engine.calls == ["load", "wake kv_cache", "generate 6", "sleep 1"] and engine.awake == set()
    assert rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=4) == samples
    assert engine.calls[4:] == ["wake weights", "wake kv_cache", "generate 6", "sleep 1"]  # the same weights: none sent
    assert rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=5).completion_ids != samples.completion_ids


@pytest.mark.parametrize("level", [1, 2])
def test_changed_weights_are_in_place_at_the_next_call(base, engines, level):
    model = make_model(seed=1).eval()
    rollout = started(base, model, level=level)
    rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=4)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    rollout.update(model)
    want = alone(model)
    assert rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=4).completion_ids == want
    assert rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=4).completion_ids == want  # a draw that is repeated
    (engine,) = engines.made
    woken = ["wake weights", "reload_weights"] if level == 2 else ["wake weights"]
    assert engine.calls[4:] == [
        *woken, "load", "wake kv_cache", "generate 6", f"sleep {level}",
        *woken, *["load"] * (level == 2), "wake kv_cache", "generate 6", f"sleep {level}",
    ]  # fmt: skip


def test_an_adapter_goes_as_a_request_of_its_own(base, engines):
    model = with_adapter()
    rollout = started(base, model)
    assert rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=4).completion_ids == alone(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.neg_()
    rollout.update(model)
    assert rollout.generate(PROMPTS, 2, sampling=SAMPLING, seed=4).completion_ids == alone(model)
    (engine,) = engines.made
    assert engine.lora_rank == 8 and "load" not in engine.calls
    with pytest.raises(ValueError, match="one of a whole model and an adapter"):
        rollout.update(make_model())


def test_stops_greedy_and_positions(base, engines):
    model = make_model().eval()
    rollout = started(base, model, max_model_len=9, engine={"enforce_eager": True})
    greedy = rollout.generate(PROMPTS[:2], sampling=Sampling(6, 0.0), seed=0)
    assert greedy.logps is None
    stop = greedy.completions[1].split()[1]
    stopped = rollout.generate(PROMPTS[1:2], sampling=Sampling(6, 0.0, stop=(stop,)), seed=0)
    assert stopped.finish == ["stop"] and stop not in stopped.completions[0]
    assert stopped.completion_ids[0] == greedy.completion_ids[1][: len(stopped.completion_ids[0])]
    cut = rollout.generate(PROMPTS, sampling=SAMPLING, seed=0)
    assert len(cut.completion_ids[2]) <= 2  # of nine tokens the prompt has seven
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens, and the model 9 positions"):
        rollout.generate(["w1 " * 9], sampling=SAMPLING, seed=0)
    assert len(rollout.generate([], sampling=SAMPLING, seed=0)) == 0


def test_it_sleeps_even_if_sampling_fails(base, engines, monkeypatch):
    rollout = started(base, make_model())
    rollout.generate(PROMPTS, sampling=SAMPLING, seed=0)
    monkeypatch.setattr(engines, "finish", "abort")
    with pytest.raises(RolloutError, match="ended a completion by 'abort'"):
        rollout.generate(PROMPTS, sampling=SAMPLING, seed=0)
    monkeypatch.setattr(engines, "_one", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.generate(PROMPTS, sampling=SAMPLING, seed=0)
    assert engines.made[0].awake == set()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_samples_from_its_current_policy(tmp_path, base, engines, adapter):
    """Weights of policy over sampler are 1 at every step, at a temperature, because what is sampled from follows it."""
    model = make_model()
    peft_config = {"peft_config": lora()} if adapter else {}
    trainer = make_trainer(tmp_path, share_of_even, model=model, max_steps=3, **peft_config)
    trainer.rollout = VLLMRollout(base, make_tokenizer())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["off_policy/weight"] for entry in log] == pytest.approx([1.0] * 3, abs=1e-4)
    assert max(entry["off_policy/logp_gap"] for entry in log) < 1e-4
    assert engines.made[0].calls.count("generate 8") == 3 and engines.made[0].awake == set()


@pytest.mark.parametrize(
    ("options", "said"), [({"level": 3}, "level 1 .* or 2"), ({"memory": 1.5}, "memory between 0 and 1")]
)
def test_options(base, engines, options, said):
    with pytest.raises(ValueError, match=said):
        VLLMRollout(base, make_tokenizer(), **options)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"use_dora": True}, {}, "use_dora=True"),
        ({"bias": "all"}, {}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({}, {"level": 2}, "use level=1"),
    ],
)
def test_adapters_that_vllm_does_not_apply(base, engines, config, options, said):
    import peft

    model = peft.get_peft_model(make_model(tie_word_embeddings=False), lora(**config))
    with pytest.raises(ValueError, match=said):
        started(base, model, **options)


def test_without_vllm_and_without_a_policy(base, engines, monkeypatch):
    with pytest.raises(ValueError, match=r"call update\(model\) first"):
        VLLMRollout(base, make_tokenizer()).generate(PROMPTS, sampling=SAMPLING, seed=0)
    model = with_adapter()
    model.peft_config["default"].r = 1024
    with pytest.raises(ValueError, match="of rank 512 at most, got 1024"):
        started(base, model).generate(PROMPTS, sampling=SAMPLING, seed=0)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm, or sample by the model itself"):
        VLLMRollout(base, make_tokenizer())
