"""TransformersRollout against `transformers serve` itself: draws, pushed weights, a server killed and restarted.

One server for the file, on a random model of two layers in float32; the test that kills it starts it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import string
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from test_rollout import PEFT_WARNING, TEMPLATE, with_adapter, with_ends
from test_trainer import make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.models.lm_head import causal_lm
from xpo_fast.rollout import GenerateRollout, RolloutError, Sampling, TransformersRollout
from xpo_fast.seeds import seed_at

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]  # ragged
SAMPLING = Sampling(max_new_tokens=6)
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


class Served:
    """`transformers serve` in a process of its own, on a port of its own."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        code = "from transformers.cli.transformers import app; app()"
        command = [sys.executable, "-c", code, "serve", "--device", "cpu", "--host", "127.0.0.1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> Served:
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.2)
        raise AssertionError(f"transformers serve is not up: {self.process.poll()}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    server = Served().wait()
    yield server
    server.kill()


def client(server, folder: Path, **options) -> TransformersRollout:
    return TransformersRollout(
        server.url, make_tokenizer(), folder=folder, **{"backoff_s": 0.2, "retries": 3, **options}
    )


def greedy(model) -> list[list[int]]:
    """The policy's own greedy completions, without the tokens that have no text (0, 2): the server says text alone."""
    found = GenerateRollout(model, make_tokenizer()).generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids
    return [[i for i in ids if i not in (0, 2)] for ids in found]


def test_draws_follow_the_seed_and_nothing_of_the_models_config(server, tmp_path, caplog):
    """The saved config says greedy, with penalties and two ends; drawn is from the plain distribution, to the EOS."""
    model = make_model().eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, repetition_penalty=5.0, eos_token_id=[1, 7]
    )
    rollout = client(server, tmp_path)
    rollout.update(model)
    first = rollout.generate(PROMPTS, 3, sampling=SAMPLING, seed=5)
    assert first == rollout.generate(PROMPTS, 3, sampling=SAMPLING, seed=5)
    assert first.completion_ids != rollout.generate(PROMPTS, 3, sampling=SAMPLING, seed=6).completion_ids
    assert first.logps is None and len({tuple(ids) for ids in first.completion_ids}) > 4
    assert first.prompts == [p for p in PROMPTS for _ in range(3)]
    assert len([r for r in caplog.records if "tokenized again" in r.getMessage()]) == 1
    # Each draw is torch's own from the seed of its request, by generate with all cuts off; special tokens have no text.
    for r, (ids, finish) in enumerate(zip(first.completion_ids, first.finish, strict=True)):
        torch.manual_seed(seed_at(5, *divmod(r, 3)))
        prompt = torch.tensor([first.prompt_ids[r]])
        alone = model.generate(
            prompt, do_sample=True, max_new_tokens=6, top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
            eos_token_id=1, pad_token_id=2,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        ended = len(alone) < 6
        assert ids == [i for i in alone if i > 2] + [1] * ended and finish == ("stop" if ended else "length")


def test_pushed_weights_are_sampled_from_and_earlier_ones_go(server, tmp_path):
    rollout, model = client(server, tmp_path), make_model().eval()
    names = []
    for scale in (1.0, -1.0):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(scale)
        rollout.update(model)
        assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == greedy(model)
        names.append(rollout.model)
        assert [str(path) for path in tmp_path.iterdir()] == names[-1:]
    assert names[0] != names[1] and rollout.positions == 128


def test_an_adapter_is_merged_in_a_copy(server, tmp_path):
    model = with_adapter()
    with_ends(causal_lm(model), 1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rollout = client(server, tmp_path)
    rollout.update(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    got = rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids
    assert got == greedy(model)
    with model.disable_adapter():
        assert got != greedy(model)


def test_the_command_sends_it_every_policy(server, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in PROMPTS))
    (tmp_path / "reward.py").write_text("def odd(completion_ids):\n    return [ids[0] % 2 for ids in completion_ids]\n")
    options = ["--data", "prompts.jsonl", "--reward", "reward.py:odd", "--model", "model", "--output-dir", "out"]
    options = [str(tmp_path / x) if k % 2 else x for k, x in enumerate(options)]
    options += ["--server", server.url, "--server-folder", str(tmp_path / "pushed"), "--full", "--cpu"]
    sizes = "--max-steps 2 --batch-size 8 --num-generations 4 --max-new-tokens 4 --lr 0.01 --eval-split 0"
    assert cli.main(["rl", *options, *sizes.split(), "--save-steps", "1"]) == 0
    (pushed,) = (tmp_path / "pushed").iterdir()
    sampled, first, last = (
        load_file(folder / "model.safetensors")
        for folder in (pushed, tmp_path / "out" / "checkpoint-1", tmp_path / "out")
    )
    assert all(torch.equal(sampled[name], x) for name, x in first.items())  # the second rollout's, after a step
    assert any(not torch.equal(sampled[name], x) for name, x in last.items())
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["prompt"] for line in lines} <= set(PROMPTS)


def letters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single letters: HF's stop strings need one whose tokens spell a text. Ġ is its space."""
    ids = {x: i for i, x in enumerate(["<unk>", "<eos>", "<pad>", "Ġ", *string.ascii_letters, *string.digits])}
    raw = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, **named)


def test_stop_strings_and_messages(server, tmp_path):
    """A completion ends with the token that completes a stop string, without an EOS; its text ends before it."""
    rollout = client(server, tmp_path)
    rollout.tokenizer = tokenizer = letters()
    rollout.update(make_model(vocab_size=len(tokenizer)).eval())
    chat = [[{"role": "user", "content": "w1 w2"}], "w3 w4"]
    free = rollout.generate(chat, 6, sampling=Sampling(8), seed=0)
    assert free.completions[0][0]["role"] == "assistant" and free.prompt_ids[0][0] == tokenizer("u")["input_ids"][0]
    texts = [text if isinstance(text, str) else text[0]["content"] for text in free.completions]
    row = next(r for r, text in enumerate(texts) if len(text) > 4)
    stop = texts[row][3]
    at = texts[row].index(stop)
    stopped = rollout.generate(chat, 6, sampling=Sampling(8, stop=(stop,)), seed=0)
    assert stopped.finish[row] == "stop" and stopped.completion_ids[row] == free.completion_ids[row][: at + 1]
    said = stopped.completions[row]
    assert (said if isinstance(said, str) else said[0]["content"]) == texts[row][:at]


def test_a_server_killed_in_the_middle_loses_and_repeats_nothing(server, tmp_path, monkeypatch):
    rollout = client(server, tmp_path, retries=12, backoff_s=0.5)
    rollout.update(make_model().eval())
    expected = rollout.generate(PROMPTS, 4, sampling=SAMPLING, seed=9)
    asked, plain = [], rollout._read

    def read(choice, *more):
        asked.append(choice["text"])
        if len(asked) == 5:
            server.kill()
            threading.Thread(target=server.start).start()
        return plain(choice, *more)

    monkeypatch.setattr(rollout, "_read", read)
    assert rollout.generate(PROMPTS, 4, sampling=SAMPLING, seed=9) == expected
    assert len(asked) == 12  # each completion read once
    rollout.update(make_model(seed=1).eval())  # and a server that has forgotten all takes new weights
    assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == greedy(make_model(seed=1).eval())


def test_what_is_refused(server, tmp_path):
    bare = TransformersRollout(server.url, make_tokenizer(), retries=0)
    with pytest.raises(ValueError, match=r"call update\(model\), or pass model=FOLDER"):
        bare.generate(PROMPTS, sampling=SAMPLING, seed=0)
    with pytest.raises(ValueError, match="goes on sampling from the weights it has"):
        bare.update(make_model())
    missing = TransformersRollout(server.url, make_tokenizer(), model=tmp_path / "none", retries=0)
    with pytest.raises(RolloutError, match=r"cannot load .*none"):
        missing.generate(PROMPTS, sampling=SAMPLING, seed=0)
    rollout = client(server, tmp_path / "policies")
    rollout.update(make_model(max_position_embeddings=8))
    with pytest.raises(ValueError, match="has 9 tokens, and the model 8 positions"):
        rollout.generate(["w1 " * 9], sampling=SAMPLING, seed=0)
    rollout.positions = None
    rollout.tokenizer = _Odd(rollout.tokenizer)
    with pytest.raises(ValueError, match="prompt 0 has no text that this tokenizer turns into its token ids"):
        rollout.generate([[{"role": "user", "content": "w1"}]], sampling=SAMPLING, seed=0)


class _Odd:
    """A tokenizer that puts an UNK in front of each text which it is called with, and not of a template's."""

    def __init__(self, tokenizer) -> None:
        self.inner = tokenizer
        tokenizer.chat_template = TEMPLATE

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, add_special_tokens=True, **options):
        found = self.inner(text, add_special_tokens=add_special_tokens, **options)
        if add_special_tokens and isinstance(text, str):
            found["input_ids"] = [0, *found["input_ids"]]
        return found
