"""VLLMServerRollout against a stand-in that has the addresses of vLLM's development mode, and forgets as vLLM does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import torch
import transformers

from test_rollout import PEFT_WARNING, with_adapter
from test_trainer import make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.models import merge
from xpo_fast.models.lm_head import causal_lm
from xpo_fast.rollout import GenerateRollout, RolloutError, Sampling, VLLMServerRollout

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)

spec: Any = importlib.util.spec_from_file_location(
    "policy_server", Path(__file__).parents[1] / "examples" / "policy_server.py"
)
policy_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(policy_server)


class StandIn(policy_server.PolicyServer):
    """vLLM's server in development mode, over a model on the CPU; what would fail there, fails here."""

    def __init__(self, dev_mode: bool = True) -> None:
        self.dev_mode, self.awake, self.calls = dev_mode, {"weights", "kv_cache"}, []
        self.restart_at: list[int] = []  # numbers of completions, before which the server is restarted
        self.fails_at: int | None = None  # number of completions, from which on it gives no answer
        self.awake_for_ever = False
        super().__init__(make_model().eval(), make_tokenizer())
        self.restart()

    def restart(self) -> None:
        self.model = make_model().eval()
        self.policies = {"base": GenerateRollout(self.model, self.tokenizer)}
        self.version, self.stale, self.awake = "default", False, {"weights", "kv_cache"}

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        url = urlparse(path)
        given = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if url.path.startswith("/v1"):
            if url.path == "/v1/completions":
                if self.fails_at is not None and self.completions >= self.fails_at:
                    raise ConnectionAbortedError
                if self.completions in self.restart_at:
                    self.restart_at.remove(self.completions)
                    self.restart()
                assert self.awake == {"weights", "kv_cache"}, "it is asleep"
                assert not self.stale, "the prefix cache has keys of other weights"
            return super().answer(path, body)
        if not self.dev_mode:
            raise KeyError(path)
        self.calls.append(url.path.strip("/") + "".join(f" {x}" for x in given.values()))
        return getattr(self, url.path.strip("/"))(**given, **body)

    def collective_rpc(self, method: str, kwargs: dict[str, str]) -> Any:
        assert method == "reload_weights" and "weights" in self.awake
        loaded = transformers.AutoModelForCausalLM.from_pretrained(kwargs["weights_path"])
        self.model.load_state_dict(loaded.state_dict())
        self.stale = True
        return {"results": [None]}

    def reset_prefix_cache(self) -> None:
        self.stale = False

    def update_weight_version(self, new_version: str) -> Any:
        self.version = new_version
        return {"success": True, "new_version": new_version}

    def weight_info(self) -> Any:
        return {"weight_version": self.version}

    def sleep(self, level: str) -> None:
        assert level == "1"
        if self.awake_for_ever:
            raise ConnectionAbortedError
        self.awake = set()

    def wake_up(self, tags: str) -> None:
        self.awake |= {tags}


@pytest.fixture
def server():
    with StandIn() as server:
        yield server


def client(server: StandIn, folder: Path, **options: Any) -> VLLMServerRollout:
    how = {"backoff_s": 0.01, "retries": 1, "concurrency": 1, **options}
    return VLLMServerRollout(server.url, make_tokenizer(), folder=folder, **how)


def changed(scale: float) -> Any:
    model = make_model().eval()
    with torch.no_grad():
        causal_lm(model).lm_head.weight.mul_(scale)
    return model


def greedy(model: Any) -> list[list[int]]:
    return GenerateRollout(model, make_tokenizer()).generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids


@pytest.mark.parametrize("sleeps", [False, True])
def test_the_policy_replaces_the_weights_in_place(server, tmp_path, sleeps):
    rollout = client(server, tmp_path, sleeps=sleeps)
    with pytest.raises(ValueError, match=r"call update\(model\)"):
        rollout.generate(PROMPTS, sampling=GREEDY, seed=0)
    found = []
    for scale in (1.0, -1.0):
        rollout.update(changed(scale))
        found.append(rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids)
        assert found[-1] == greedy(changed(scale))
        assert [path.name for path in tmp_path.iterdir()] == [rollout.version] == [server.version]
    assert found[0] != found[1]
    assert server.awake == (set() if sleeps else {"weights", "kv_cache"})
    load = ["collective_rpc", "reset_prefix_cache", "update_weight_version"]
    order = [*load, "weight_info", "weight_info"]  # once for all ranks, before one of them samples
    if sleeps:
        order = ["wake_up weights", "weight_info", *load, "wake_up kv_cache", "weight_info", "sleep 1"]
    assert server.calls == 2 * order
    server.calls.clear()
    assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == found[1]
    assert "collective_rpc" not in server.calls  # nothing has changed since


def test_an_adapter_is_merged_in_a_copy(server, tmp_path):
    model = with_adapter()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rollout = client(server, tmp_path)
    rollout.update(model)
    got = rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids
    merged = make_model().eval()
    merged.load_state_dict(merge(with_adapter()).state_dict())
    want, base = greedy(merged), greedy(make_model().eval())
    # The stand-in ends at the model's EOS and the client adds the tokenizer's.
    assert [ids[:3] for ids in got] == [ids[:3] for ids in want] != [ids[:3] for ids in base]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("at", [0, 2])
def test_a_restarted_server_is_sent_the_policy_and_samples_again(server, tmp_path, at, caplog):
    """Its own weights answer without an error: it is known by the version of its weights."""
    rollout = client(server, tmp_path)
    rollout.update(changed(-1.0))
    want = greedy(changed(-1.0))
    assert want != greedy(changed(1.0))
    server.restart_at = [at]
    assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == want
    assert server.completions == 2 * len(PROMPTS) and "was restarted while it sampled" in caplog.text
    server.restart()  # between two rollouts
    assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == want
    assert server.completions == 3 * len(PROMPTS)


def test_completions_of_a_server_begun_anew_are_not_kept(server, tmp_path):
    """It is begun anew within a call, answers once by its first weights, and fails: the next call asks for all."""
    rollout = client(server, tmp_path, retries=0)
    rollout.update(changed(-1.0))
    server.restart_at, server.fails_at = [0], 1
    with pytest.raises(RolloutError, match="1 of 3 completions"):
        rollout.generate(PROMPTS, sampling=GREEDY, seed=0)
    server.fails_at = None
    assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == greedy(changed(-1.0))


def test_completions_of_a_server_that_was_only_away_are_kept(server, tmp_path):
    rollout = client(server, tmp_path, retries=0)
    rollout.update(changed(-1.0))
    server.fails_at = 1
    with pytest.raises(RolloutError, match="1 of 3 completions"):
        rollout.generate(PROMPTS, sampling=GREEDY, seed=0)
    server.fails_at = None
    assert rollout.generate(PROMPTS, sampling=GREEDY, seed=0).completion_ids == greedy(changed(-1.0))
    assert server.completions == len(PROMPTS)


def test_a_server_that_is_gone_is_named_by_the_rollout(server, tmp_path):
    """Not by its not going to sleep; and it is asked to once."""
    rollout = client(server, tmp_path, sleeps=True, retries=1)
    rollout.update(changed(-1.0))
    server.fails_at, server.awake_for_ever = 0, True
    with pytest.raises(RolloutError, match=r"/v1/completions gave no answer in 2 attempts.* 0 of 3 completions"):
        rollout.generate(PROMPTS, sampling=GREEDY, seed=0)
    assert server.calls.count("sleep 1") == 1
    server.fails_at, server.awake_for_ever = None, False
    with pytest.raises(ValueError, match="expected a seed"):
        rollout.generate(PROMPTS, sampling=GREEDY, seed=-1)
    assert server.awake == set()  # it sleeps whatever went wrong


def test_a_server_that_does_not_stay_is_given_up(server, tmp_path):
    rollout = client(server, tmp_path, sleeps=True)
    rollout.update(changed(-1.0))
    server.restart_at = list(range(0, 100, len(PROMPTS)))
    with pytest.raises(RolloutError, match="restarted in each of 4 attempts"):
        rollout.generate(PROMPTS, sampling=GREEDY, seed=0)
    assert server.completions == 4 * len(PROMPTS) and server.awake == set()


def test_a_server_without_the_development_mode(tmp_path):
    with StandIn(dev_mode=False) as server:
        rollout = client(server, tmp_path)
        with pytest.raises(RolloutError, match="VLLM_SERVER_DEV_MODE=1"):
            rollout.update(make_model())


def test_by_the_command(server, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / "score.py").write_text(
        "def score(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    words = ["rl", "--model", str(tmp_path / "model"), "--data", str(rows), "--reward", f"{tmp_path}/score.py:score"]
    words += [
        "--full",
        "--cpu",
        "--max-steps",
        "2",
        "--lr",
        "0.01",
        "--eval-split",
        "0",
        "--batch-size",
        "4",
        "--num-generations",
        "4",
    ]
    words += ["--max-new-tokens", "4", "--output-dir", str(tmp_path / "out"), "--preflight", "off"]
    pushed = ["--server", server.url, "--server-weights", str(tmp_path / "policy")]
    assert cli.main([*words, *pushed, "--server-sleeps"]) == 0
    assert server.calls.count("collective_rpc") == 2 and server.calls[-1] == "sleep 1"
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert max(entry["off_policy/logp_gap"] for entry in log if "loss" in entry) < 1e-4
    capsys.readouterr()
    for options, said in (
        (["--server-sleeps"], "--server-sleeps is for --server-weights"),
        ([*pushed, "--server-folder", "x"], "--server-weights and --server-folder say each"),
        (pushed[2:], "--server-weights is for --server"),
        (pushed[:2], "--server needs what sends it the policy's new weights"),
    ):
        assert cli.main([*words, *options]) == 2
        assert said in capsys.readouterr().err
