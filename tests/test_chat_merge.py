"""`xpo-fast chat` and `xpo-fast merge`: the policy of a run beside what it began with, and as a model of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from test_trainer import PEFT_WARNING, make_model, make_tokenizer
from xpo_fast import cli
from xpo_fast.cli import chat, columns, policies
from xpo_fast.models import adapters, load_model
from xpo_fast.models.value_head import attach_value_head, save_value_head
from xpo_fast.rewards import spec
from xpo_fast.rewards.model import RewardModel
from xpo_fast.rewards.spec import RewardSpec
from xpo_fast.rollout import encode_prompts

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def adapted(base, folder, *, scale=0.5, template=None):
    """Writes an adapter with a noticeable update as a run's folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=scale)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base model, a run of an adapter on it, and one of every weight."""
    home = tmp_path_factory.mktemp("home")
    base = str(home / "base")
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapted(base, home / "lora")
    adapted(base, home / "talk", template=TEMPLATE)
    full = home / "full"
    transformers.set_seed(7)
    transformers.AutoModelForCausalLM.from_config(make_model().config).save_pretrained(full)
    make_tokenizer().save_pretrained(full)
    (full / "config.yaml").write_text(f"model: {base}\nfull: true\n")
    return home


def said(capsys, *options, status=0):
    capsys.readouterr()
    assert cli.main(list(map(str, options))) == status
    return capsys.readouterr()


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["lora", "full"])
def test_both_policies_answer(home, capsys, run):
    out = said(capsys, "chat", home / run, "--prompt", "w1 w2", "--max-new-tokens", 6, "--json", "--cpu").out
    found = json.loads(out)
    for side, name in (("before", "base"), ("after", run)):
        model, tokenizer = load_model(str(home / name), merge=False)
        ids = torch.tensor(encode_prompts(["w1 w2"], tokenizer))
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
        assert found[side] == tokenizer.decode(new, skip_special_tokens=True)
    assert found["before"] != found["after"] and set(found["finish"]) == {"before", "after"}


def test_a_conversation_has_a_side_each(home, capsys, monkeypatch):
    typed = "hello\n/system be w5\nw1\nw2\n/nothing\n/reset\nw1\n/quit\nw9\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    asked = []
    whole = chat.Side.prompt

    def prompt(side):
        asked.append((side.name, whole(side)))
        return asked[-1][1]

    monkeypatch.setattr(chat.Side, "prompt", prompt)
    captured = said(capsys, "chat", home / "talk", "--max-new-tokens", 3, "--json", "--cpu", "--temperature", 1)
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [a["prompt"] for a in answers] == ["hello", "w1", "w2", "w1"]
    assert "no command /nothing" in captured.err
    start = [{"role": "system", "content": "be w5"}, {"role": "user", "content": "w1"}]
    for k, side in enumerate(("before", "after")):
        prompts = [talk for name, talk in asked if name == side]
        first = {"role": "assistant", "content": answers[1][side]}
        turns = [*start, first, {"role": "user", "content": "w2"}] if answers[1][side] else None
        assert prompts[1] == start == prompts[3] and k in (0, 1)
        assert turns is None or prompts[2] == turns
    assert answers[1]["before"] != answers[1]["after"] and answers[3] == answers[1]


def test_without_a_template_a_conversation_is_text(home, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\n/system x\nw2\n"))
    captured = said(capsys, "chat", home / "lora", "--max-new-tokens", 2, "--cpu")
    assert captured.out.count("before:") == captured.out.count("after:") == 2
    assert "no chat template" in captured.err
    assert "no chat template" in said(capsys, "chat", home / "lora", "--system", "x", "--prompt", "w", status=2).err


def test_answers_are_kept_for_the_report(home, tmp_path, capsys):
    run = shutil.copytree(home / "lora", tmp_path / "run")
    for text in ("w1", "w2"):
        said(capsys, "chat", run, "--prompt", text, "--max-new-tokens", 2, "--save", "--cpu")
    kept = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in kept] == ["w1", "w2"] and {"before", "after"} <= kept[0].keys()


def test_ctrl_c_ends_an_answer(home, capsys, monkeypatch):
    """What was said stays in the conversation, and the other side answers; SIGTERM ends the program."""
    whole = transformers.TextStreamer.put
    count = []

    def put(self, value):
        whole(self, value)
        count.append(1)
        if len(count) == 2:  # after the prompt and a token
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.TextStreamer, "put", put)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1\nw2\n"))
    captured = said(capsys, "chat", home / "lora", "--max-new-tokens", 8, "--json", "--cpu")
    first, second = map(json.loads, captured.out.splitlines())
    assert first["before"] == "w36" and first["finish"]["before"] == "interrupted"
    assert first["finish"]["after"] != "interrupted"
    assert "interrupted" not in second["finish"].values()
    count.clear()
    assert "stopped" in said(capsys, "chat", home / "lora", "--prompt", "w1", "--cpu", status=130).err


def test_columns_of_a_terminal(home):
    """On a terminal the answers are in two columns, drawn again as they grow, and control characters are not sent."""
    main, other = pty.openpty()
    code = (
        "from xpo_fast.cli.columns import Columns\n"
        "with Columns(('before', 'after')) as c:\n"
        "    c.add(0, 'one two three four five six seven eight nine ten ' * 2)\n"
        "    c.add(1, 'x\\x1b[31m 漢字' + 'y' * 40)\n"
    )
    env = {**os.environ, "COLUMNS": "63", "LINES": "24", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=other, env=env, check=True, timeout=60)
    os.close(other)
    text = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(main, 4096):
            text += chunk
    drawn = text.decode().split("\x1b[J")[-1].replace("\x1b[1m", "").replace("\x1b[0m", "").split("\r\n")
    assert drawn[0].split("│")[0].strip() == "before" and "after" in drawn[0]
    assert all(columns.display_width(row) <= 63 for row in drawn) and "\x1b[31m" not in text.decode()
    left = " ".join(" ".join(row.split("│")[0] for row in drawn[1:]).split())
    assert left == " ".join(["one two three four five six seven eight nine ten"] * 2)
    assert "".join(row.partition("│")[2].strip() for row in drawn[1:]).count("y") == 40


# --- merge ------------------------------------------------------------------------------------------------------------


def test_plain_transformers_loads_what_is_merged(home, tmp_path, capsys):
    out = tmp_path / "merged"
    text = said(capsys, "merge", home / "talk", "--output-dir", out, "--max-shard-size", "20KB").out
    assert "log-probs of 4 rows" in text and len([*out.glob("*.safetensors")]) > 1
    assert not [*out.glob("adapter*")] and transformers.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(plain) is transformers.LlamaForCausalLM
    model, _ = load_model(str(home / "talk"), merge=False)
    with torch.no_grad():
        found = plain(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
        with model.disable_adapter():
            base = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - base).abs().max()) > 0.01
    assert "not empty" in said(capsys, "merge", home / "talk", "--output-dir", out, status=2).err
    said(capsys, "merge", home / "talk", "--output-dir", out, "--overwrite")
    assert [*out.glob("*.safetensors")] == [out / "model.safetensors"]


@pytest.mark.parametrize(("dtype", "saved"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_16_bits_would_lose_is_said(home, tmp_path, capsys, dtype, saved):
    model, tokenizer = make_model().bfloat16(), make_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    adapted(str(tmp_path / "base"), tmp_path / "run", scale=1e-4)
    captured = said(capsys, "merge", tmp_path / "run", "--output-dir", tmp_path / "out", "--dtype", dtype)
    assert "weights in bfloat16 keep " in captured.err
    assert ("so the model is in float32" in captured.err) == (dtype == "auto")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == saved


def test_a_reward_model_is_merged(home, tmp_path, capsys):
    torch.manual_seed(1)
    model, tokenizer = load_model(str(home / "lora"), merge=False)
    attach_value_head(model, std=0.5)
    RewardModel(model, tokenizer, RewardSpec()).save(tmp_path / "run")
    text = said(capsys, "merge", tmp_path / "run", "--output-dir", tmp_path / "out").out
    assert "outputs of 4 rows" in text and "RewardModel.load" in text
    prompts, answers = ["w1 w2", "w3 w4"], ["w5 w6", "w7 w8 w9"]
    both = [RewardModel.load(tmp_path / name).score(prompts, answers) for name in ("run", "out")]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "reward model" in said(capsys, "chat", tmp_path / "run", "--prompt", "w", status=2).err


def test_nothing_half_written_is_left(home, tmp_path, capsys, monkeypatch):
    """Neither by an interruption, nor by a model that does not compute what the adapter does."""
    out = tmp_path / "merged"

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupted)
        said(capsys, "merge", home / "lora", "--output-dir", out, status=130)
    assert [*tmp_path.iterdir()] == []

    def wrong(self, folder, **kwargs):
        self.model.norm.weight.data += 1
        whole(self, folder, **kwargs)

    whole = transformers.LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", wrong)
    captured = said(capsys, "merge", home / "lora", "--output-dir", out, status=2)
    assert "does not compute what the adapter does" in captured.err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("command", "run", "options", "fragment"),
    [
        ("merge", "full", ["--output-dir", "x"], "nothing to merge"),
        ("merge", "lora", ["--output-dir", "lora"], "is, or holds, the run"),
        ("merge", "lora", ["--output-dir", "."], "is, or holds, the run"),
        ("merge", "lora", ["--output-dir", "base", "--overwrite"], "the base model in"),
        ("merge", "lora", ["--output-dir", "other", "--overwrite"], "holds none"),
        ("merge", "nowhere", ["--output-dir", "x"], "no such folder"),
        ("merge", "other", ["--output-dir", "x"], "neither a model nor a whole checkpoint"),
        ("chat", "nowhere", ["--prompt", "w1"], "no such folder"),
        ("chat", "bare", ["--prompt", "w1"], "--before MODEL"),
        ("chat", "lora", ["--prompt", " "], "--prompt is empty"),
        ("chat", "lora", ["--prompt", "w1", "--temperature", "-1"], "temperature"),
    ],
)
def test_a_mistake_is_said(home, tmp_path, capsys, monkeypatch, command, run, options, fragment):
    (tmp_path / "base").symlink_to(home / "base")
    for name in ("lora", "full"):
        shutil.copytree(home / name, tmp_path / name)
    shutil.copytree(home / "full", tmp_path / "bare", ignore=shutil.ignore_patterns("config.yaml"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert fragment in said(capsys, command, run, *options, status=2).err
    assert (Path("other") / "mine.txt").is_file() and (home / "base" / "config.json").is_file()


def test_a_run_that_has_not_finished_is_its_last_checkpoint(home, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(home / "lora", run / "checkpoint-4")
    (run / "checkpoint-4" / "trainer_state.json").write_text("{}")
    found = policies.find(str(run))
    assert found.folder == run / "checkpoint-4" and found.is_adapter and "not finished" in found.notes[0]
    assert (policies.ADAPTER, policies.MODEL, policies.SPEC_FILE) == (adapters.ADAPTER, adapters.MODEL, spec.SPEC_FILE)
    recipe = tmp_path / "recipe"
    shutil.copytree(home / "full", recipe / "iteration-000" / "model")
    (recipe / "run.json").write_text('{"model": "start"}')
    found = policies.find(str(recipe))
    assert found.folder == recipe / "iteration-000" / "model" and found.before == "start" and found.notes


@pytest.mark.usefixtures("home")
def test_a_value_head_alone_is_a_critic(home, tmp_path, capsys):
    run = shutil.copytree(home / "lora", tmp_path / "run")
    model = make_model()
    attach_value_head(model)
    save_value_head(model, run)
    assert "the critic (value_head.safetensors)" in said(capsys, "merge", run, "--output-dir", tmp_path / "out").out
