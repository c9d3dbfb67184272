"""Mistakes of users, over whole command lines: one to three lines, exit status 2, no traceback, and nothing lost.

Then what is nobody's mistake: a full disk at every writer, Ctrl-C and SIGTERM, and a pipe that its reader closes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.cli import loading, training
from xpo_fast.models import load_model
from xpo_fast.recipes import get_recipe
from xpo_fast.recipes.loop import run as run_recipe
from xpo_fast.recipes.setup import Setup
from xpo_fast.resume import MADE_WITH, last_checkpoint
from xpo_fast.trainer import XPOTrainer

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

REWARD = """
def length(completions, **_):
    return [float(len(c)) for c in completions]

def broken(completions, **_):
    return [1 / 0 for c in completions]
"""
TINY = ["--cpu", "--lora-targets", "q_proj,v_proj", "--batch-size", "4"]
COMMANDS = {
    "train": ["--data", "pairs.jsonl", "--model", "model", "--max-steps", "1", "--overwrite", *TINY],
    "reward": ["--data", "pairs.jsonl", "--model", "model", "--max-steps", "1", "--overwrite", *TINY],
    "eval-reward": ["--data", "pairs.jsonl", "--cpu"],
    "rl": [
        *("--data", "prompts.jsonl", "--model", "model", "--max-steps", "1", "--overwrite"),
        *("--num-generations", "2", "--max-new-tokens", "4", *TINY),
    ],
    "recipe": [
        *("--data", "prompts.jsonl", "--model", "model", "--max-steps", "1", "--overwrite"),
        *("--max-new-tokens", "4", *TINY),
    ],
}
REWARDED = ["--reward", "reward.py:length"]


def usual(command: str, options: list[str]) -> list[str]:
    """The options that go with a command; without its data where others are given, as --data may be repeated."""
    words = COMMANDS[command]
    return words[2:] if "--data" in options else words


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models and data, whole and broken, and checkpoints of runs to go on from."""
    home = tmp_path_factory.mktemp("home")
    model, tokenizer, here = make_model(), make_tokenizer(), os.getcwd()

    def save(name: str, model: Any, tokenizer: Any = tokenizer) -> None:
        model.save_pretrained(home / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(home / name)

    save("model", model)
    save("other", make_model(seed=1))
    save("no_tokenizer", make_model(), None)
    save("few_embeddings", make_model(vocab_size=20))
    save("few_for_pad", make_model(vocab_size=96), make_tokenizer(vocabulary=[f"w{i}" for i in range(94)]))
    diverged: Any = make_model()
    with torch.no_grad():
        diverged.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    save("diverged", diverged)
    save("truncated", make_model())
    weights = home / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for kind in ("pair", "unpaired"):
        (home / f"{kind}s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(20, kind)))
    (home / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(20, seed=1)))
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w3"}) + "\n" for i in range(8)))
    chat = {"prompt": [{"role": "user", "content": "w1"}]}
    (home / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (home / "empty.jsonl").write_text("")
    (home / "not_parquet.parquet").write_text("no")
    (home / "a_file").write_text("of words")
    (home / "a_file.py").write_text("of words")
    (home / "a_folder").mkdir()
    (home / "reward.py").write_text(REWARD)
    os.chdir(home)
    try:
        adapted = cli.main(
            ["train", *COMMANDS["train"], "--max-steps", "2", "--save-steps", "1", "--output-dir", "run"]
        )
        rewarded = cli.main(["rl", *COMMANDS["rl"], *REWARDED, "--save-steps", "1", "--output-dir", "rl_run"])
    finally:
        os.chdir(here)
    assert adapted == rewarded == 0
    shutil.copytree(home / "run", home / "adapter_without_base")
    config = home / "adapter_without_base" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "./gone"}))
    return home


@pytest.fixture(autouse=True)
def there(home, tmp_path, monkeypatch):
    """Every command runs in a folder with all of these, so that its line is short."""
    monkeypatch.setenv("XPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(home)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(err: str) -> list[str]:
    """What the command itself has said."""
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("xpo-fast")]


@pytest.mark.parametrize(
    "line, message",
    [
        # of data
        ("train --data nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("train --data empty.jsonl", "empty.jsonl: no rows"),
        ("train --data model", "model"),
        ("train --data not_parquet.parquet", "not_parquet.parquet: not a readable .parquet file"),
        ("train --data unpaireds.jsonl", "unpaireds.jsonl:1: expected a pair"),
        ("train --eval-split 20", "leaves 0 rows to train on and 20 to evaluate"),
        ("train --eval-data nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("reward --data prompts.jsonl", "prompts.jsonl:1: chosen, rejected missing"),
        ("eval-reward --policy model --data nowhere.jsonl", "nowhere.jsonl: no such file"),
        (f"rl {' '.join(REWARDED)} --data empty.jsonl", "empty.jsonl: no rows"),
        (f"rl {' '.join(REWARDED)} --data chat.jsonl", "no chat template to write it with; pass one (--chat-template"),
        ("recipe raft --judge function:reward.py:length --data nowhere.jsonl", "nowhere.jsonl: no such file"),
        # of the method
        ("train --method kto --set gamma=1", "kto has no hyperparameter gamma; it has beta, lambda_d, lambda_u"),
        ("train --set beta=-1", "expected beta > 0, got -1"),
        ("train --set beta=abc", "--set beta: expected a number, got 'abc'"),
        ("train --set beta=Infinity", "--set beta: expected a number, got inf"),
        ("train --set wpo=no", "expected wpo to be bool, got 'no'"),
        ("train --set weights=2", "a weight for each of 1 methods, got 2"),
        ("train --method pro --set temperature=5", "--set temperature: expected true or false, got 5"),
        ("train --method simpo --set gamma_beta_ratio=abc", "--set gamma_beta_ratio=abc: simpo cannot compute with it"),
        ("train --method nope", "no method named 'nope'"),
        ("train --method odpo", "missing score_w, score_l"),
        ("train --reference adapter --full", "train with a peft_config"),
        ("rl --method dpo --reward reward.py:length", "dpo does not learn from scored completions"),
        ("recipe raft", "recipe raft needs a judge (reward), and none is given"),
        ("recipe raff", "no recipe named 'raff'"),
        # of numbers and names
        ("train --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("train --lr nan", "--lr must be positive, got nan"),
        ("train --max-steps 0", "--max-steps must be at least 1, or -1"),
        ("train --seed -1", "--seed must be from 0 to 2**32 - 1, got -1"),
        ("train --lora-dropout 1.5", "--lora-dropout must be at least 0 and below 1, got 1.5"),
        ("train --warmup-ratio 2", "--warmup-ratio must be a share in [0, 1), got 2"),
        ("train --weight-decay nan", "--weight-decay must be at least 0, got nan"),
        ("train --max-length 1", "max_length must be at least 2"),
        ("train --scheduler cosin", "no schedule named 'cosin'; did you mean cosine"),
        ("train --chat-template nowhere.jinja", "--chat-template nowhere.jinja: No such file or directory"),
        ("train --chat-template model", "--chat-template model: Is a directory"),
        ("train --report-to tensorbord", "no reporter named 'tensorbord'; did you mean tensorboard?"),
        ("train --report-to wandb", "the reporter wandb is not installed: pip install wandb"),
        ("reward --report-to comet_ml", "the reporter comet_ml is not installed: pip install comet-ml"),
        (
            "recipe raft --judge function:reward.py:length --train report_to=wandb",
            "the reporter wandb is not installed",
        ),
        ("rl", "nothing rewards a completion: give --reward FILE.py:FUNCTION, --reward-model FOLDER or"),
        ("rl --reward reward.py:nope", "no function 'nope' in reward.py; there are broken, length"),
        ("rl --reward nowhere.py:f", "no file 'nowhere.py'"),
        ("rl --reward a_file.py:f", "cannot import 'a_file.py' to take the reward function 'f' from: SyntaxError"),
        ("reward --set center=x", "bradley_terry: expected a number for center, got 'x'"),
        (
            "recipe raft --judge function:reward.py:length --train learning_rate=1",
            "--train learning_rate: there is an option",
        ),
        ("train --model a_folder", "cannot load a model from 'a_folder': expected"),
        ("rl --reward-model a_folder", "no reward model in 'a_folder': expected"),
        ("eval-reward", "nothing to measure: give --model (a reward model) or --policy"),
        # of models
        ("train --model ./nowhere", "no model in './nowhere': no such folder"),
        ("train --model a_file", "a_file"),
        ("train --model truncated", "Its weights are broken (Error while deserializing header"),
        ("train --model diverged", "model.layers.1.mlp.up_proj.weight holds NaN"),
        (
            "train --model no_tokenizer",
            "no tokenizer in 'no_tokenizer': expected the files that tokenizer.save_pretrained",
        ),
        (
            "train --model adapter_without_base",
            "the adapter in 'adapter_without_base' goes on the model './gone': no model in",
        ),
        ("train --lora-targets q_prj", "q_prj"),
        (
            "train --lora-targets q_prj,v_prj",
            "Its linear modules are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj",
        ),
        ("train --attn flash_attention_2", "flash-attn, or use another attention implementation: sdpa or eager"),
        ("train --attn nope", "nope"),
        ("train --backend cuda", "backend='torch'"),
        ("train --backend tritn", "--backend: no backend named 'tritn'; there are auto, dense"),
        ("eval-reward --model model", "no reward model in 'model': it holds ['LlamaForCausalLM']"),
        ("eval-reward --policy model --reference nowhere/at/all", "nowhere/at/all"),
        # of a vocabulary that does not fit
        (
            "train --model few_embeddings",
            "and the model has 20 embeddings, for ids 0 to 19; the tokenizer has 97 tokens",
        ),
        ("train --model few_embeddings --full", "pairs.jsonl:1: token id"),
        ("train --model few_for_pad", "pairs.jsonl:10: token id 96 ('w93'), and the model has 96 embeddings"),
        ("reward --model few_embeddings", "pairs.jsonl:1: token id"),
        ("eval-reward --policy few_embeddings --reference none", "row 0: token id"),
        (f"rl {' '.join(REWARDED)} --model few_embeddings --data pairs.jsonl", "pairs.jsonl:1: token id"),
        # of the folder that is written
        ("train --output-dir a_file", "--output-dir a_file: "),
        ("train --output-dir a_file/in/it", "a_file is a file, not a folder; name a folder that can be written"),
        ("train --output-dir /proc/out", "--output-dir /proc/out: /proc cannot be written ("),
        ("train --full --ref-cache a_file/cache", "--ref-cache a_file/cache: "),
        ("eval-reward --policy model --output-dir a_file/out", "--output-dir a_file/out: "),
        ("recipe raft --judge function:reward.py:length --output-dir a_file/out", "--output-dir a_file/out: "),
    ],
)
def test_a_mistake_is_said_and_nothing_is_lost(home, tmp_path, capsys, line, message):
    command, *options = line.split()
    name = [options.pop(0)] if command == "recipe" and options else []
    out = tmp_path / "out"  # has what an earlier run left, all of which may be overwritten
    shutil.copytree(home / "run", out)
    if command == "recipe":
        (out / "run.json").write_text("{}")
    before, around = contents(out), contents(home)
    assert cli.main([command, *name, *usual(command, options), "--output-dir", str(out), *options]) == 2
    said = lines(capsys.readouterr().err)
    assert 1 <= len(said) <= 3 and message in said[0]
    assert contents(out) == before and contents(home) == around


# --- going on from a checkpoint -----------------------------------------------------------------------------------


@pytest.fixture
def out(home, tmp_path):
    """What a run of two steps has left, with a checkpoint of each."""
    return Path(shutil.copytree(home / "run", tmp_path / "out"))


def run(command: str, out: Path, *options: str, fresh: bool = False) -> int:
    """One of the commands into `out`; fresh: not going on with what is there."""
    given = [x for x in usual(command, list(options)) if x != "--overwrite"]
    return cli.main([command, *given, "--output-dir", str(out), *([] if fresh else ["--resume"]), *options])


@pytest.mark.parametrize(
    "options, message",
    [
        ("--lora-rank 8", "--lora-rank was 16 and is 8"),
        ("--lora-alpha 8", "--lora-alpha was 32 and is 8.0"),
        ("--lora-targets q_proj", '--lora-targets was ["q_proj", "v_proj"] and is ["q_proj"]'),
        ("--full", "what is trained was an adapter and is every weight"),
        ("--model other", "--model was model ("),
        ("--method simpo", "--method was dpo and is simpo"),
        ("--set beta=0.5", '--set was {} and is {"beta": 0.5}'),
        ("--data others.jsonl", "--data was pairs.jsonl ("),
        ("--lr 1e-3", "learning_rate was 5e-05 and is 0.001"),
        ("--optim sgd", "optim was adamw_torch_fused and is sgd"),
        ("--train adam_beta2=0.95", "adam_beta2 was 0.999 and is 0.95"),
        ("--load-in-4bit", "--quantize was not given and is 4bit"),
        ("--seed 1", "--seed was 42 and is 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_the_model_is_loaded(out, capsys, monkeypatch, options, message):
    def load(args):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(loading, "load", load)
    before = contents(out)
    assert run("train", out, "--max-steps", "4", *options.split()) == 2
    (said,) = lines(capsys.readouterr().err)
    assert f"{out}/checkpoint-2 is of another run, where " in said and message in said
    assert "go on with the same options and data, or begin a new run in another output folder" in said
    assert contents(out) == before


def test_what_may_change_on_going_on_may_change(home, out, tmp_path):
    moved = shutil.copytree(home / "model", tmp_path / "the same model elsewhere")
    options = ("--max-steps", "3", "--logging-steps", "1", "--save-steps", "5", "--save-total-limit", "9")
    assert run("train", out, *options, "--model", str(moved), "--scheduler", "cosine", "--lr", "5e-5") == 0
    assert json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_nan(path: Path) -> None:
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, path)


@pytest.mark.parametrize(
    "name, spoil, options, message",
    [
        ("adapter_model.safetensors", truncate, (), "it is broken, or of another model ("),
        ("optimizer.pt", truncate, (), "it is broken, or of another model ("),
        ("adapter_model.safetensors", with_nan, (), "holds NaN or an infinity in "),
        ("adapter_model.safetensors", Path.unlink, (), "Can't find a valid checkpoint at"),
        ("trainer_state.json", truncate, (), "no checkpoint there, expected a folder with trainer_state.json"),
        (MADE_WITH, truncate, (), "cannot be read ("),
        (MADE_WITH, Path.unlink, ("--lora-rank", "8"), "it is broken, or of another model (size mismatch"),
        (None, None, ("--batch-size", "2"), "rows per step was 4 and is 2"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from(out, capsys, name, spoil, options, message):
    checkpoint = out / "checkpoint-2"
    if name is not None:
        spoil(checkpoint / name)
    before = contents(out)
    assert run("train", out, "--max-steps", "4", *options, "--resume", str(checkpoint)) == 2
    (said,) = lines(capsys.readouterr().err)
    assert message in said and str(checkpoint) in said
    assert contents(out) == before


@pytest.mark.parametrize(
    "command, run_of, message",
    [
        ("train", "rl_run", "the command was rl and is train"),
        ("rl", "run", "no checkpoint in"),
        ("reward", "run", "the command was train and is reward"),
    ],
)
def test_a_checkpoint_of_another_command(home, tmp_path, capsys, command, run_of, message):
    out = Path(shutil.copytree(home / run_of, tmp_path / "out"))
    before = contents(out)
    assert run(command, out, *(REWARDED if command == "rl" else ())) == 2
    (said,) = lines(capsys.readouterr().err)
    assert message in said and contents(out) == before


def test_two_runs_into_one_folder(out, capsys):
    before, folder = contents(out), os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # what a run holds
        assert run("train", out, "--max-steps", "4") == 2
    finally:
        os.close(folder)
    (said,) = lines(capsys.readouterr().err)
    assert f"another run is writing into {out}: wait for its end, or name another --output-dir" in said
    assert contents(out) == before


def test_a_recipe_that_is_to_overwrite_a_folder_deletes_nothing_but_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    setup = Setup("model", [{"prompt": "w1"}], tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"overwrite deletes a run of a recipe, and .* holds something else"):
        run_recipe(get_recipe("sdpo"), setup)
    assert (tmp_path / "thesis.tex").is_file()


# --- what is nobody's mistake: a full disk ------------------------------------------------------------------------


def no_space(path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def fill_the_disk(monkeypatch, writer: str, fragment: str) -> None:
    """Makes `writer` write half of a file and fail as on a full disk, where the path has `fragment`."""

    def failing(owner, name, error, path_at):
        own = getattr(owner, name)

        def write(*args, **kwargs):
            path = str(args[path_at])
            if fragment not in path:
                return own(*args, **kwargs)
            Path(path if Path(path).suffix else f"{path}/half").write_bytes(b"half")
            raise error(path)

        monkeypatch.setattr(owner, name, write)

    if writer == "torch":
        failing(torch, "save", lambda p: RuntimeError("[enforce fail at inline_container.cc:672] . pos 64 vs 0"), 1)
    elif writer == "safetensors":
        error = SafetensorError("I/O error: No space left on device (os error 28)")
        failing(peft.peft_model, "safe_save_file", lambda p: error, 1)
    elif writer == "tokenizers":
        error = Exception("No space left on device (os error 28)")
        failing(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda p: error, 1)
    elif writer == "state":
        failing(transformers.TrainerState, "save_to_json", no_space, 1)
    else:  # "files": everything that is written by pathlib
        write_bytes, open_ = Path.write_bytes, Path.open

        def write(self, content):
            if fragment in str(self):
                write_bytes(self, content[: len(content) // 2])
                raise no_space(self)
            return write_bytes(self, content)

        def opened(self, mode="r", *args, **kwargs):
            if fragment in str(self) and "a" in mode:
                raise no_space(self)
            return open_(self, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "write_bytes", write)
        monkeypatch.setattr(Path, "open", opened)


NEXT = ("--max-steps", "3", "--logging-steps", "1", "--save-total-limit", "1")


@pytest.mark.parametrize(
    "writer, fragment",
    [
        ("torch", "checkpoint-3"),
        ("safetensors", "checkpoint-3"),
        ("tokenizers", "checkpoint-3"),
        ("state", "checkpoint-3"),
        ("files", "checkpoint-3"),
    ],
)
def test_a_full_disk_while_a_checkpoint_is_written(out, capsys, monkeypatch, writer, fragment):
    before = contents(out / "checkpoint-2")
    with monkeypatch.context() as patch:
        fill_the_disk(patch, writer, fragment)
        assert run("train", out, *NEXT) == 2
    said = lines(capsys.readouterr().err)
    assert len(said) == 2 and f"cannot write {out}/checkpoint-3" in said[0] and "free there" in said[0]
    assert f"the last whole checkpoint is {out}/checkpoint-2: make room, then go on with the same command" in said[1]
    assert contents(out / "checkpoint-2") == before
    assert {p.name for p in out.iterdir() if "checkpoint" in p.name} == {"checkpoint-1", "checkpoint-2"}
    if writer == "files":
        assert run("train", out, *NEXT) == 0
        assert [p.name for p in out.glob("*checkpoint*")] == ["checkpoint-3"]


@pytest.mark.parametrize(
    "writer, fragment, named",
    [
        ("safetensors", ".model.part", ""),  # the trained model itself
        ("torch", ".model.part", ""),
        ("files", "train_log.jsonl", "/train_log.jsonl"),
        ("files", "results.json", "/results.json"),
    ],
)
def test_a_full_disk_while_something_else_is_written(out, capsys, monkeypatch, writer, fragment, named):
    before = contents(out)
    with monkeypatch.context() as patch:
        fill_the_disk(patch, writer, fragment)
        assert run("train", out, *NEXT) == 2
    said = lines(capsys.readouterr().err)
    assert len(said) in (1, 2) and f"cannot write {out}{named}: " in said[0]
    after = contents(out)
    changed = {name for name in before if "checkpoint" not in name and after[name] != before[name]}
    assert changed <= ({"train_log.jsonl"} if writer != "files" else {name for name in before if fragment not in name})
    assert not [name for name in after if name.startswith(".")] and last_checkpoint(out) is not None
    load_model(str(out))


def test_a_full_disk_while_reference_log_probs_or_samples_are_written(home, tmp_path, capsys, monkeypatch):
    out, cache = tmp_path / "out", tmp_path / "cache" / "reference"
    with monkeypatch.context() as patch:
        fill_the_disk(patch, "files", ".safetensors.")
        assert run("train", out, "--full", fresh=True) == 2
    (said,) = lines(capsys.readouterr().err)
    assert f"cannot write {cache}" in said and not list(cache.rglob(".*"))
    with monkeypatch.context() as patch:
        fill_the_disk(patch, "files", "samples.jsonl")
        assert run("rl", out, *REWARDED, fresh=True) == 2
    (said,) = lines(capsys.readouterr().err)
    assert f"cannot write {out}/samples.jsonl" in said


def test_a_disk_without_room_for_a_checkpoint_is_known_before_the_first_step(out, capsys, monkeypatch):
    before = contents(out)
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run("train", out, *NEXT) == 2
    (said,) = lines(capsys.readouterr().err)
    assert "has room for 1000 bytes, and a checkpoint takes about " in said and contents(out) == before


def test_a_folder_that_becomes_a_file(out, capsys, monkeypatch):
    def vanish(args, state, control, **kwargs):
        shutil.rmtree(out)
        out.write_text("another program's")

    at_step(monkeypatch, 2, vanish)
    assert run("train", out, *NEXT) == 2
    said = lines(capsys.readouterr().err)
    assert len(said) == 1 and f"cannot write {out}" in said[0] and out.read_text() == "another program's"


def test_a_limit_on_the_size_of_files(home, out):
    """What a quota does: the system itself cuts a file short, in a process of its own."""
    before = contents(out / "checkpoint-2")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from xpo_fast import cli; "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    given = [x for x in COMMANDS["train"] if x != "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *given, "--output-dir", out, "--resume", *NEXT],
        timeout=120,
        capture_output=True,
        text=True,
    )
    said = lines(done.stderr)
    assert done.returncode == 2 and len(said) == 2, done.stderr
    assert "a quota, or a limit on the size of files (ulimit -f)?" in said[0] and "/checkpoint-2: make room" in said[1]
    assert contents(out / "checkpoint-2") == before and not (out / "checkpoint-3").exists()


# --- Ctrl-C, SIGTERM, and a reader that has enough ----------------------------------------------------------------


def at_step(monkeypatch, step: int, action) -> None:
    """Let a run do this as its step number `step` begins."""
    json_log = training.json_log

    def acting(args):
        callback = json_log(args)
        callback.on_step_begin = lambda args, state, control, **kwargs: (
            action(args, state, control) if state.global_step == step else None
        )
        return callback

    monkeypatch.setattr(training, "json_log", acting)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_behind_a_checkpoint(out, capsys, monkeypatch, number, status):
    at_step(monkeypatch, 2, lambda *_: os.kill(os.getpid(), number))
    assert run("train", out, "--max-steps", "9", "--save-steps", "9") == status
    said = capsys.readouterr()
    assert "stopped after step 3 of 9, checkpoint saved. Go on with the same command and --resume" in said.out
    assert last_checkpoint(out) == str(out / "checkpoint-3") and lines(said.err) == []


@pytest.fixture
def heard():
    """Ctrl-C is heard, also where the tests run in the background of a shell, which has its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    "when, kept",
    [
        ("loading", "the last whole checkpoint is {out}/checkpoint-2, and the same command with --resume"),
        ("evaluating before", "the last whole checkpoint is {out}/checkpoint-2, and the same command with --resume"),
        ("caching the reference", "the last whole checkpoint is {out}/checkpoint-2, and the same"),
        ("saving a checkpoint", "the last whole checkpoint is {out}/checkpoint-2, and the same"),
        ("evaluating after", "the trained model is in {out}; the last whole checkpoint is {out}/checkpoint-3"),
    ],
)
def test_a_signal_at_any_other_moment(out, capsys, monkeypatch, when, kept, number, status):
    def hit(owner, name, call):
        """Send the signal in the call of that number; twice where it is not heeded at once."""
        own, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    hit(*{
        "loading": (loading, "load", 1),
        "evaluating before": (XPOTrainer, "held_out", 1),
        "caching the reference": (XPOTrainer, "_prepare_to_train", 1),
        "saving a checkpoint": (transformers.TrainerState, "save_to_json", 1),
        "evaluating after": (XPOTrainer, "held_out", 2),
    }[when])  # fmt: skip
    assert run("train", out, *NEXT) == status
    (said,) = lines(capsys.readouterr().err)
    assert said.startswith(f"xpo-fast: stopped; {kept.format(out=out)}")
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_reader_that_has_enough_ends_nothing(home, out):
    """A closed pipe is no reason to give up what is being trained; a list just ends."""
    given = [x for x in COMMANDS["train"] if x != "--overwrite"]
    for options, status in ((["methods"], 0), (["train", *given, "--output-dir", out, "--resume", *NEXT], 0)):
        with subprocess.Popen(
            [sys.executable, "-m", "xpo_fast.cli", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process:
            assert process.stdout is not None and process.stderr is not None and process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read().decode()
            assert process.wait(timeout=120) == status, err
        assert "Traceback" not in err and "Broken" not in err
    assert last_checkpoint(out) == str(out / "checkpoint-3") and (out / "results.json").is_file()


# --- what ended in a traceback, and works -------------------------------------------------------------------------


def test_an_adapter_is_merged_and_every_weight_learns(home, tmp_path):
    out = tmp_path / "out"
    assert run("train", out, "--model", "run", "--full", "--lr", "1e-2", "--warmup-ratio", "0", fresh=True) == 0
    before, after = (load_model(str(x))[0].state_dict() for x in (home / "run", out))
    assert all(not torch.equal(before[name], after[name]) for name in before if "layers" in name)


def test_mixed_precision_without_an_accelerator(home, tmp_path, capsys):
    given = [x for x in COMMANDS["train"] if x not in ("--cpu", "--overwrite")]
    options = ("--full", "--dtype", "bfloat16", "--output-dir", str(tmp_path / "out"))
    assert cli.main(["train", *given, *options]) == 0
    assert "full fine-tuning, bf16 mixed precision" in capsys.readouterr().out
