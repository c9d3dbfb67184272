"""Rollouts: that samples are drawn from what is claimed, by the seed alone, and end where they should; a server's too.

The models are random ones of two layers in float32.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, VOCAB, lora, make_model, make_tokenizer
from xpo_fast.data import pad_rows
from xpo_fast.models.lm_head import causal_lm
from xpo_fast.rollout import (
    GenerateRollout,
    RolloutError,
    Samples,
    Sampling,
    ServerRollout,
    encode_prompts,
    sample_logps,
)

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

EOS, PAD = 1, 2
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w3 w1", "w12 w13 w14 w15"]  # ragged
MANY_ENDS = [EOS, *range(20, 36)]  # so many that completions of all lengths come up
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% if not loop.last or m.role != 'assistant' %}<eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


def with_ends(model, ends):
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    return model


def generate(model, prompts=PROMPTS, n=3, *, seed=0, tokenizer=None, batch_size=64, **sampling) -> Samples:
    rollout = GenerateRollout(model, tokenizer or make_tokenizer(), batch_size=batch_size)
    return rollout.generate(prompts, n, sampling=Sampling(**{"max_new_tokens": 12, **sampling}), seed=seed)


@torch.no_grad()
def materialised(model, samples: Samples, temperature: float = 1.0) -> list[list[float]]:
    """Each row alone, without padding, by the log-softmax of the model's own logits."""
    rows = []
    for prompt, completion in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = (logits.double() / temperature).log_softmax(-1)
        rows.append(logp[range(len(completion)), completion].tolist())
    return rows


def largest_difference(a, b) -> float:
    assert [*map(len, a)] == [*map(len, b)]
    return max(abs(x - y) for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))


def listed(table, samples) -> list[list[float]]:
    assert table.shape == samples.mask.shape and not table[~samples.mask].any()
    return [row[mask].tolist() for row, mask in zip(table, samples.mask, strict=True)]


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_materialised_ones(model, temperature):
    samples = generate(with_ends(model, MANY_ENDS), temperature=temperature)
    assert len(set(map(len, samples.completion_ids))) > 3  # ragged behind, too
    truth = materialised(model, samples, temperature)
    ours = sample_logps(model, samples, temperature=temperature, batch_size=4)
    assert largest_difference(listed(ours, samples), truth) < 1e-5
    assert samples.logps is not None
    assert largest_difference(samples.logps, truth) < 1e-5  # left-padded, with a cache, as they were drawn


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}], ids=str)
def test_what_cuts_do_to_logps(model, cut):
    """log p = log q + log p(kept), the tokens kept found by sorting."""
    samples = generate(with_ends(model, EOS), temperature=0.9, **cut)
    uncut = listed(sample_logps(model, samples, temperature=0.9), samples)
    for r, (prompt, completion) in enumerate(zip(samples.prompt_ids, samples.completion_ids, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert samples.logps is not None
        for t, token in enumerate(completion):
            probs, order = (logits[t].double() / 0.9).softmax(-1).sort(descending=True)
            top = probs[: cut.get("top_k", VOCAB)]
            mass = (top / top.sum()).cumsum(0)
            size = int((mass < cut.get("top_p", 2)).sum()) + 1 if "top_p" in cut else len(top)
            assert token in order[:size]
            kept = float(top[:size].sum().log())
            assert abs(uncut[r][t] - samples.logps[r][t] - kept) < 1e-5


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"top_p": 0.7}], ids=str)
def test_the_first_token_is_drawn_from_its_distribution(model, sampling):
    n = 4000
    samples = generate(with_ends(model, EOS), ["w1 w2"], n, max_new_tokens=1, batch_size=1000, **sampling)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(samples.prompt_ids[:1])).logits[0, -1].double()
    probs = (logits / sampling.get("temperature", 1)).softmax(-1)
    if "top_p" in sampling:
        ordered, order = probs.sort(descending=True)
        probs[order[(ordered.cumsum(0) - ordered) >= sampling["top_p"]]] = 0
        probs /= probs.sum()
    drawn = torch.tensor([ids[0] for ids in samples.completion_ids])
    counts = torch.bincount(drawn, minlength=VOCAB)
    assert not counts[probs == 0].any()
    expected = n * probs
    often = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[often].sum()
    freedom = int(often.sum()) - 1
    assert freedom > 3 and chi2 < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


@pytest.mark.parametrize("completions", [[[], [8, 9], []], [[], [], []]], ids=["some", "all"])
def test_completions_without_a_token(model, completions):
    samples = Samples(["a"] * 3, [[5, 6], [7], [5]], completions, [""] * 3, ["stop"] * 3)
    ours = listed(sample_logps(model, samples), samples)
    assert ours[0] == ours[2] == [] and len(ours[1]) == len(completions[1])
    if completions[1]:
        assert largest_difference(ours[1:2], materialised(model, samples.take([1]))) < 1e-5


def test_greedy_takes_the_likeliest(model):
    samples = generate(with_ends(model, EOS), n=1, temperature=0.0)
    assert samples.logps is None
    for prompt, completion in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion
    with pytest.raises(ValueError, match="temperature of more than 0"):
        sample_logps(model, samples, temperature=0.0)


# --- the seed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_same_seed_draws_the_same_whatever_the_batch(model, batch_size):
    with_ends(model, MANY_ENDS)
    whole, parts = generate(model, seed=5), generate(model, seed=5, batch_size=batch_size)
    assert whole.completion_ids == parts.completion_ids and whole.finish == parts.finish
    assert largest_difference(whole.logps, parts.logps) < 1e-5


def test_a_draw_depends_on_its_place_alone(model):
    with_ends(model, MANY_ENDS)
    three = generate(model, n=3, seed=5)
    assert generate(model, n=2, seed=5).completion_ids == three.take(i for i in range(15) if i % 3 < 2).completion_ids
    assert generate(model, PROMPTS[:2], n=3, seed=5).completion_ids == three.completion_ids[:6]
    assert generate(model, n=3, seed=6).completion_ids != three.completion_ids
    assert len(set(map(tuple, three.completion_ids[:3]))) == 3  # copies of one prompt differ


def test_nothing_else_is_touched(model):
    model.train()
    config = with_ends(model, EOS).generation_config
    torch.manual_seed(11)
    first = generate(model)
    state = torch.random.get_rng_state()
    torch.manual_seed(12)
    assert generate(model).completion_ids == first.completion_ids
    torch.manual_seed(11)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and model.generation_config is config
    assert all(p.grad is None for p in model.parameters())
    model.eval()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_in_the_middle_of_training(model):
    expected = generate(with_ends(model, EOS))
    busy = with_ends(make_model(attention_dropout=0.5), EOS)
    busy.gradient_checkpointing_enable()
    busy.config.use_cache = False
    assert generate(busy.train()).completion_ids == expected.completion_ids
    assert busy.model.layers[0].gradient_checkpointing and all(m.training for m in busy.modules())


def test_the_models_own_settings_are_not_read(model):
    plain = generate(with_ends(model, [EOS, 30]))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[EOS, 30], do_sample=True, top_k=1, temperature=0.1, repetition_penalty=9.0, min_new_tokens=12,
        no_repeat_ngram_size=1, max_length=3, num_return_sequences=2, suppress_tokens=[5, 6, 7],
    )  # fmt: skip
    assert generate(model).completion_ids == plain.completion_ids


# --- where completions end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<pad>", None, "<eos>"])
def test_several_ends_and_truncation(model, pad):
    tokenizer = make_tokenizer(pad)
    samples = generate(with_ends(model, MANY_ENDS), n=8, tokenizer=tokenizer)
    assert samples.finish.count("stop") > 5 and samples.finish.count("length") > 1
    assert min(map(len, samples.completion_ids)) == 1  # an end at once is a completion, too
    for ids, finish, text in zip(samples.completion_ids, samples.finish, samples.completions, strict=True):
        assert not set(ids[:-1]) & set(MANY_ENDS)
        assert (finish == "stop") == (ids[-1] in MANY_ENDS)
        assert finish == "stop" or len(ids) == 12
        body = ids[:-1] if finish == "stop" else ids
        words = [i for i in body if i not in tokenizer.all_special_ids]
        assert text.split() == tokenizer.convert_ids_to_tokens(words)
    assert samples.truncated.tolist() == [f == "length" for f in samples.finish]
    assert samples.lengths.tolist() == [*map(len, samples.completion_ids)]


def test_an_end_at_the_last_token_is_no_truncation(model):
    samples = generate(with_ends(model, MANY_ENDS), n=8, max_new_tokens=1)
    for ids, finish in zip(samples.completion_ids, samples.finish, strict=True):
        assert finish == ("stop" if ids[0] in MANY_ENDS else "length")
    assert len(set(samples.finish)) == 2


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])  # what follows a row that is done is no end of it
def test_stop_strings(model, pad):
    with_ends(model, EOS)
    free = generate(model)
    row = next(r for r, ids in enumerate(free.completion_ids) if len(ids) > 6)
    text = " ".join(free.completions[row].split()[2:4])  # of two tokens
    stopped = generate(model, stop=(text, "never said"), tokenizer=make_tokenizer(pad))
    assert stopped.finish[row] == "stop" and stopped.completion_ids[row] == free.completion_ids[row][:4]
    assert stopped.completions[row] == " ".join(free.completions[row].split()[:2]) + " "
    for ids, whole, said, alone in zip(
        stopped.completion_ids, free.completion_ids, stopped.completions, free.completions, strict=True
    ):
        assert ids == whole[: len(ids)] and text not in said
        assert (len(ids) < len(whole)) <= (text in alone)
    ours = listed(sample_logps(model, stopped), stopped)
    assert largest_difference(ours, stopped.logps) < 1e-5  # the tokens that spell it are scored, too


def test_a_stop_string_that_the_prompt_begins_does_not_count(model):
    with_ends(model, EOS)
    first = generate(model, ["w1 w2"], 1).completions[0].split()[0]
    assert len(generate(model, ["w1 w2"], 1, stop=(f"w2 {first}",)).completion_ids[0]) > 1


def test_positions_bound_prompt_and_completion():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=10, n_embd=32, n_layer=1, n_head=2, bos_token_id=EOS, eos_token_id=EOS
    )  # learned positions: one too many is an index out of range
    torch.manual_seed(0)
    model = with_ends(transformers.GPT2LMHeadModel(config).eval(), [])
    samples = generate(model, ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1 w2 w3 w4", "w1"], n=2)
    lengths = [len(p) + len(c) for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True)]
    assert lengths == [10 if f == "length" else lengths[i] for i, f in enumerate(samples.finish)]
    assert samples.finish[0] == "length" or samples.completion_ids[0] == [EOS]
    assert largest_difference(samples.logps, materialised(model, samples)) < 1e-5
    with pytest.raises(ValueError, match="prompt 1 has 10 tokens, and the model 10 positions"):
        generate(model, ["w1", " ".join(["w1"] * 10)])


def test_logits_that_are_no_numbers():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(RolloutError, match="logits are NaN or infinite"):
        generate(model)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_messages_get_the_template_and_text_does_not(model):
    tokenizer = make_tokenizer(vocabulary=[f"w{i}" for i in range(VOCAB - 5)] + ["user", "assistant"])
    tokenizer.chat_template = TEMPLATE
    asked = [{"role": "user", "content": "w1 w2"}]
    begun = [*asked, {"role": "assistant", "content": "w3"}]
    samples = generate(with_ends(model, EOS), [asked, begun, "w1 w2"], n=1, tokenizer=tokenizer)
    texts = [tokenizer.decode(ids) for ids in samples.prompt_ids]
    assert texts == ["user w1 w2 <eos> assistant", "user w1 w2 <eos> assistant w3", "w1 w2"]
    assert samples.prompts == [asked, begun, "w1 w2"]
    for ids, completion in zip(samples.completion_ids[:2], samples.completions[:2], strict=True):
        content = tokenizer.decode(ids, skip_special_tokens=True)
        assert completion == [{"role": "assistant", "content": content}]
    assert samples.completions[2] == tokenizer.decode(samples.completion_ids[2], skip_special_tokens=True)


def test_prompts_that_cannot_be_encoded():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        encode_prompts(["w1", ""], tokenizer)
    with pytest.raises(ValueError, match="prompt 1: a conversation, and the tokenizer has no chat template"):
        encode_prompts(["w1", [{"role": "user", "content": "w1"}]], tokenizer)  # it has none
    with pytest.raises(ValueError, match="prompt 0: expected text, or messages"):
        encode_prompts([[{"content": "w1"}]], tokenizer)
    with pytest.raises(ValueError, match="a list of prompts"):
        generate(make_model(), "w1")
    with pytest.raises(ValueError, match="a seed of 0 or more, got -1"):
        generate(make_model(), seed=-1)


def test_no_prompts(model):
    samples = generate(model, [])
    assert len(samples) == 0 and sample_logps(model, samples).shape == (0, 0)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"stop": "text"}, "texts that are not empty"),
        ({"stop": ("",)}, "texts that are not empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_sampling_out_of_range(sampling, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**sampling)


def test_the_batch_of_samples():
    samples = Samples(["a", "b"], [[5, 6], [7]], [[8], [9, 10, EOS]], ["x", "y"], ["length", "stop"])
    batch = pad_rows([*zip(samples.prompt_ids, samples.completion_ids, strict=True)], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, PAD], [7, 9, 10]]  # the last token predicts nothing
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["targets"].tolist() == [[-100, 8, -100], [9, 10, EOS]]
    assert samples.mask.tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(ValueError, match="expected finish of 2 samples, got 1"):
        Samples(["a", "b"], [[5], [6]], [[7], [8]], ["x", "y"], ["stop"])
    with pytest.raises(ValueError, match="a log-prob for each token"):
        Samples(["a"], [[5]], [[7, 8]], ["x"], ["stop"], [[-1.0]])


# --- models in wrappers -----------------------------------------------------------------------------------------------


def with_adapter(**options):
    model = peft.get_peft_model(with_ends(make_model(), MANY_ENDS), lora(**options)).eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_the_adapter_is_on(targets):
    model = with_adapter(target_modules=targets)
    samples = generate(model)
    on = materialised(model, samples)
    with model.disable_adapter():
        assert largest_difference(materialised(model, samples), on) > 0.1
    assert largest_difference(samples.logps, on) < 1e-5
    assert largest_difference(listed(sample_logps(model, samples), samples), on) < 1e-5


def test_a_model_in_a_wrapper(model):
    with_ends(model, EOS)
    wrapped = torch.nn.DataParallel(model)  # on the CPU it does nothing
    samples = generate(wrapped)
    assert samples == generate(model)
    assert torch.equal(sample_logps(wrapped, samples), sample_logps(model, samples))


def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning"):
        GenerateRollout(peft.get_peft_model(make_model(), config), make_tokenizer())


def test_update_takes_another_model(model):
    rollout = GenerateRollout(model, make_tokenizer())
    other = with_ends(make_model(seed=3).eval(), EOS)
    rollout.update(other)
    sampling = Sampling(max_new_tokens=8)
    assert (
        rollout.generate(PROMPTS, sampling=sampling, seed=0).completion_ids
        == generate(other, n=1, max_new_tokens=8).completion_ids
    )
    with pytest.raises(ValueError, match="which can generate, got Linear"):
        rollout.update(torch.nn.Linear(2, 2))


# --- continuous batching ----------------------------------------------------------------------------------------------


def small_cache():
    return transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, page_size=16)


def test_continuous_batching():
    model, tokenizer = with_ends(make_model().eval(), MANY_ENDS), make_tokenizer()
    rollout = GenerateRollout(model, tokenizer, continuous=small_cache())
    state = torch.random.get_rng_state()
    samples = rollout.generate(PROMPTS, 3, sampling=Sampling(12, temperature=0.8), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert samples.prompts == [p for p in PROMPTS for _ in range(3)]
    truth = materialised(model, samples, 0.8)
    assert largest_difference(samples.logps, truth) < 1e-4  # another attention
    assert largest_difference(listed(sample_logps(model, samples, temperature=0.8), samples), truth) < 1e-5
    for ids, finish in zip(samples.completion_ids, samples.finish, strict=True):
        assert (finish == "stop") == (ids[-1] in MANY_ENDS) and len(ids) <= 12
        assert not set(ids[:-1]) & set(MANY_ENDS)
    assert len(set(samples.finish)) == 2


def test_continuous_batching_that_fails(monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no paged attention for it")

    model = with_ends(make_model().eval(), EOS)
    monkeypatch.setattr(type(model), "generate_batch", fails)
    sampling = Sampling(4)
    with pytest.raises(RuntimeError, match="no paged attention"):
        GenerateRollout(model, make_tokenizer(), continuous=True).generate(PROMPTS, sampling=sampling, seed=0)
    rollout = GenerateRollout(
        model, make_tokenizer(), continuous=None
    )  # where it goes: batches in its place, and said so once
    monkeypatch.setattr(rollout, "_continuous", lambda *_: small_cache() if rollout.continuous is None else None)
    with caplog.at_level(logging.WARNING):
        samples = rollout.generate(PROMPTS, sampling=sampling, seed=0)
        rollout.generate(PROMPTS, sampling=sampling, seed=0)
    assert samples.completion_ids == generate(model, n=1, max_new_tokens=4).completion_ids
    assert [r.getMessage() for r in caplog.records if "continuous batching failed" in r.getMessage()] == [
        "sampling in batches from now on, for continuous batching failed: no paged attention for it"
    ]


# --- a server ---------------------------------------------------------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """Serves /v1/completions from a model, with the fields that vLLM answers with, and fails as it is told to."""

    daemon_threads = True

    def __init__(self, model, tokenizer, port: int = 0, **options) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.rollout, self.tokenizer = GenerateRollout(model, tokenizer), tokenizer
        self.lock = threading.Lock()
        self.faults: list = []  # taken one a request, before it is served
        self.asked: list[dict] = []
        self.served = 0
        self.dies_after: int | None = None
        self.form = "ids"  # or "tokens", "text"
        self.limit = 128
        self.adapters: dict[str, str] = {}
        self.others: list[str] = []
        self.__dict__.update(options)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def complete(self, body: dict) -> dict:
        sampling = Sampling(
            body["max_tokens"],
            body["temperature"],
            body["top_p"],
            None if body.get("top_k", -1) == -1 else body["top_k"],
            tuple(body.get("stop", ())),
        )
        prompt = self.tokenizer.decode(body["prompt"])
        with self.lock:
            samples = self.rollout.generate([prompt], sampling=sampling, seed=body["seed"])
        assert samples.prompt_ids == [body["prompt"]]
        assert samples.logps is not None
        ids, finish = samples.completion_ids[0], samples.finish[0]
        reason = next((s for s in sampling.stop if s in self.tokenizer.decode(ids)), None)
        if finish == "stop" and ids[-1] in MANY_ENDS[1:]:
            reason = ids[-1]  # of the generation config's ends all but the tokenizer's EOS
        tokens = [f"token_id:{i}" if self.form == "tokens" else self.tokenizer.decode([i]) for i in ids]
        choice = {
            "index": 0, "text": samples.completions[0], "finish_reason": finish,
            "logprobs": {"tokens": tokens, "token_logprobs": samples.logps[0]},
        }  # fmt: skip
        if self.form == "ids" and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "stop_reason": reason}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        bases, limit = ["policy", *self.server.others], self.server.limit
        listed = [{"id": name, "max_model_len": limit, "parent": None} for name in bases]
        listed += [{"id": name, "max_model_len": None, "parent": "policy"} for name in self.server.adapters]
        self.answer(200, {"data": listed})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            if body["lora_name"] in server.adapters:  # as vLLM does
                return self.answer(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
            server.adapters[body["lora_name"]] = body["lora_path"]
            assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
            return self.answer(200, "Success: LoRA adapter added successfully.")
        if self.path == "/v1/unload_lora_adapter":
            del server.adapters[body["lora_name"]]
            return self.answer(200, "Success: LoRA adapter removed successfully.")
        with server.lock:
            server.asked.append(body)
            fault = server.faults.pop(0) if server.faults else None
            dead = server.dies_after is not None and server.served >= server.dies_after
            server.served += not dead and fault is None
        if dead or fault == "cut":
            self.close_connection = True
            return self.connection.close()
        if fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return None
        if fault == "hang":
            time.sleep(1.0)
            fault = None
        if isinstance(fault, tuple):  # the status of an error whose reason breaks off
            self.send_response(*fault)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"err')
            self.close_connection = True
            return None
        if isinstance(fault, int):
            return self.answer(fault, {"error": {"message": "as told"}})
        return self.answer(200, fault if fault is not None else server.complete(body))

    def answer(self, status: int, content) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client is gone
            pass


@pytest.fixture
def server(model):
    server = StandIn(with_ends(model, EOS), make_tokenizer())
    yield server
    server.stop()


def client(server, **options) -> ServerRollout:
    return ServerRollout(server.url, make_tokenizer(), **{"backoff_s": 0.01, "concurrency": 4, "retries": 3, **options})


SAMPLING = Sampling(max_new_tokens=8, temperature=0.8)


def ask(rollout, prompts=PROMPTS, n=2, sampling=SAMPLING, seed=4) -> Samples:
    return rollout.generate(prompts, n, sampling=sampling, seed=seed)


def test_a_server_gives_what_the_model_gives(server, model):
    samples = ask(client(server))
    assert samples.prompts == [p for p in PROMPTS for _ in range(2)]
    seeds = {tuple(body["prompt"]): [] for body in server.asked}
    for body in server.asked:
        assert body["model"] == "policy" and body["max_tokens"] == 8 and body["top_k"] == -1
        assert body["repetition_penalty"] == 1.0 and body["min_p"] == 0.0 and "stop" not in body
        seeds[tuple(body["prompt"])].append(body["seed"])
    assert len({s for listed in seeds.values() for s in listed}) == 10  # each completion has its own
    for r, prompt in enumerate(PROMPTS):
        alone = [
            generate(model, [prompt], 1, seed=s, max_new_tokens=8, temperature=0.8)
            for s in seeds[tuple(samples.prompt_ids[2 * r])]
        ]
        assert sorted(samples.completion_ids[2 * r : 2 * r + 2]) == sorted(a.completion_ids[0] for a in alone)
    assert {"stop", "length"} >= set(samples.finish)
    assert largest_difference(samples.logps, materialised(model, samples, 0.8)) < 1e-5
    assert ask(client(server)) == samples
    assert ask(client(server), seed=5).completion_ids != samples.completion_ids


def test_eos_and_stop_strings_of_a_server(server, model):
    """Of the ends that the server knows the tokenizer knows one; the others are told by stop_reason."""
    with_ends(model, MANY_ENDS)
    free = ask(client(server), n=8)
    ended = [ids for ids, finish in zip(free.completion_ids, free.finish, strict=True) if finish == "stop"]
    assert {ids[-1] for ids in ended} <= set(MANY_ENDS) and len({ids[-1] for ids in ended}) > 2
    assert not any(set(ids[:-1]) & set(MANY_ENDS) for ids in free.completion_ids)
    row = next(r for r, ids in enumerate(free.completion_ids) if len(ids) > 5)
    text = " ".join(free.completions[row].split()[2:4])
    stopped = ask(client(server), n=8, sampling=Sampling(8, 0.8, stop=(text,)))
    assert stopped.completion_ids[row] == free.completion_ids[row][:4] and stopped.finish[row] == "stop"
    assert text not in stopped.completions[row] and stopped.logps is not None


def test_an_eos_that_the_server_leaves_out_is_put_back(server):
    server.form = "ids"
    server.faults = [
        {"choices": [{"text": "w1", "finish_reason": finish, "token_ids": [4], "logprobs": {"token_logprobs": [-1]}}]}
        for finish in ("stop", "length")
    ]  # fmt: skip
    samples = ask(client(server, concurrency=1), PROMPTS[:2], 1)
    assert samples.completion_ids == [[4, EOS], [4]] and samples.completions == ["w1", "w1"]
    assert samples.logps is None  # one of two tokens has none


def test_token_ids_by_other_ways(server, caplog):
    told = ask(client(server))
    server.form = "tokens"
    assert ask(client(server)) == told
    server.form = "text"
    with caplog.at_level(logging.WARNING):
        again = ask(rollout := client(server))
        ask(rollout)
    assert again.completion_ids == told.completion_ids  # of these words each is a token, so nothing is lost
    assert again.completions == told.completions and again.finish == told.finish and again.logps is None
    assert len([r for r in caplog.records if "tokenized again" in r.getMessage()]) == 1


def test_a_server_that_knows_no_more_than_openai(server):
    samples = ask(client(server, vllm=False, extra={"user": "me"}))
    assert not {"return_token_ids", "top_k", "min_p", "repetition_penalty"} & set(server.asked[0])
    assert server.asked[0]["user"] == "me" and len(samples) == 10


@pytest.mark.parametrize("fault", [503, 429, "cut", "half", "{", (503,)])
def test_what_passes_is_tried_again(server, fault):
    expected = ask(client(server, concurrency=1), PROMPTS[:2])
    server.asked.clear()
    server.faults = [None, fault, fault, None, fault]
    assert ask(client(server, concurrency=1), PROMPTS[:2]) == expected
    assert len(server.asked) == 4 + 3


def test_a_server_that_hangs_is_tried_again(server):
    expected = ask(client(server), PROMPTS[:1], 1)
    server.faults = ["hang"]
    assert ask(client(server, timeout_s=0.4), PROMPTS[:1], 1) == expected


def test_a_refusal_is_not_tried_again(server):
    server.faults = [400]
    with pytest.raises(RolloutError, match=r"refuses the request: 400 .*as told"):
        ask(client(server, concurrency=1))
    server.faults = [(400, "No such thing")]
    with pytest.raises(RolloutError, match=r"refuses the request: 400 No such thing"):
        ask(client(server, concurrency=1))
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"error": "no"},
        [],
        {"choices": [{"text": "a", "finish_reason": "abort"}]},
        {"choices": [{"text": None, "finish_reason": "stop"}]},
        {"choices": [{"text": "a", "finish_reason": "length", "token_ids": [5] * 9}]},
        {"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [5, -1]}]},
    ],
    ids=str,
)
def test_an_answer_of_no_use(server, answer):
    server.faults = [answer]
    with pytest.raises(RolloutError, match="expected a completion as OpenAI's API has them"):
        ask(client(server, concurrency=1))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_server_that_dies_keeps_what_was_finished(model, concurrency):
    tokenizer = make_tokenizer()
    server = StandIn(with_ends(model, EOS), tokenizer)
    expected = ask(client(server))
    server.stop()

    server = StandIn(model, tokenizer, dies_after=4)
    rollout = client(server, concurrency=concurrency, retries=2)
    with pytest.raises(RolloutError, match=r"gave no answer in 3 attempts.* 4 of 10 completions .* are kept"):
        ask(rollout)
    port = server.server_port
    server.stop()
    with pytest.raises(RolloutError, match=r"refused.* 4 of 10 completions"):  # not even a socket
        ask(rollout)

    server = StandIn(model, tokenizer, port)
    assert ask(rollout) == expected
    assert len(server.asked) == 6  # nothing twice
    assert ask(rollout) == expected
    assert len(server.asked) == 16  # and nothing kept for ever
    server.stop()


@pytest.mark.parametrize("what", ["update", "another call"])
def test_what_was_finished_is_not_for_new_weights_or_another_call(server, model, what):
    server.dies_after = 4
    rollout = client(server, retries=0, push=lambda *_: None)
    with pytest.raises(RolloutError, match="4 of 10"):
        ask(rollout)
    server.dies_after = None
    if what == "update":
        rollout.update(model)
    else:
        ask(rollout, seed=9)
    server.asked.clear()
    ask(rollout)
    assert len(server.asked) == 10


def test_no_server_at_all(server):
    rollout = client(server, retries=1)
    server.stop()
    with pytest.raises(RolloutError, match=r"/v1/models gave no answer in 2 attempts.*refused"):
        ask(rollout)


def test_what_the_server_serves(server):
    with pytest.raises(ValueError, match="does not serve 'other'; it serves policy"):
        ask(client(server, model="other"))
    server.others.append("second")
    with pytest.raises(ValueError, match="serves policy, second: say which"):
        ask(client(server))
    assert len(ask(client(server, model="second"))) == 10
    server.limit = 9
    samples = ask(client(server, model="policy"))
    assert max(len(p) + len(c) for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True)) <= 9
    server.limit = 7
    with pytest.raises(ValueError, match="prompt 2 has 7 tokens, and the model 7 positions"):
        ask(client(server, model="policy"))


def test_update(server, tmp_path):
    with pytest.raises(ValueError, match="goes on sampling from the weights it has"):
        client(server).update(None)
    pushed = []
    client(server, push=lambda model, rollout: pushed.append((model, rollout.url))).update("weights")
    assert pushed == [("weights", server.url)]

    rollout = client(server, push="lora", folder=tmp_path)
    model = with_adapter()
    seen = set()
    for _ in range(2):
        rollout.update(model)
        (name,) = server.adapters
        assert server.adapters == {name: str(tmp_path / name)} and name not in seen
        assert [p.name for p in tmp_path.iterdir()] == [name]
        ask(rollout)
        assert server.asked[-1]["model"] == name
        seen.add(name)
    with pytest.raises(ValueError, match="a model with a LoRA adapter, got LlamaForCausalLM"):
        rollout.update(causal_lm(model))


def test_update_after_a_run_that_died(server, tmp_path):
    """The server still has its adapter: neither its name nor its being listed is in the way, and it goes."""
    model = with_adapter()
    client(server, push="lora", folder=tmp_path).update(model)
    (left,) = server.adapters
    server.adapters["somebody's"] = ""
    resumed = client(server, push="lora", folder=tmp_path)
    resumed.update(model)
    assert server.adapters.keys() == {"somebody's", resumed.model} and resumed.model != left
    assert [p.name for p in tmp_path.iterdir()] == [resumed.model]
    assert len(ask(resumed)) == 10 and server.asked[-1]["model"] == resumed.model


def test_update_after_the_server_was_started_again(server, tmp_path):
    rollout, model = client(server, push="lora", folder=tmp_path), with_adapter()
    rollout.update(model)
    server.adapters.clear()
    rollout.update(model)
    assert server.adapters.keys() == {rollout.model} and len(ask(rollout)) == 10


def test_one_process_of_several_updates(server, tmp_path, monkeypatch):
    """What the first process's server says reaches the others, errors too."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    told = ["policy-of-the-first", None]
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda _: told)
    rollout = client(server, push="lora", folder=tmp_path)
    rollout.update(with_adapter())
    assert rollout.model == "policy-of-the-first" and not server.adapters and not [*tmp_path.iterdir()]
    told[:] = [None, "refuses the request: 400"]
    with pytest.raises(RolloutError, match="refuses the request: 400"):
        rollout.update(with_adapter())


def test_by_default_a_restart_is_waited_for():
    rollout = ServerRollout("http://localhost:1", make_tokenizer())
    waits = [min(rollout.backoff_s * 2**k, 30.0) for k in range(rollout.retries)]
    assert 180 <= sum(waits) <= 600


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "localhost:8000"}, "http://host:port"),
        ({"concurrency": 0}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"push": "disk"}, "push"),
        ({"push": "lora"}, "folder="),
    ],
)
def test_options_of_a_server(options, said):
    with pytest.raises(ValueError, match=said):
        ServerRollout(**{"url": "http://localhost:1", "tokenizer": make_tokenizer(), **options})
