"""Representation alignment: the loss on hidden states, its signal, training, the command."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from planted import PAIRS, ids_of, planted, write
from planted import home as home
from test_trainer import PEFT_WARNING, Gradients, lora, make_model, make_tokenizer
from xpo_fast import cli, data
from xpo_fast.trainer import XPOConfig
from xpo_fast.trainer.representation import (
    RepresentationConfig,
    RepresentationTrainer,
    Signal,
    hidden_loss,
    train_signal,
)

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def signal_config(folder, **more) -> XPOConfig:
    how = {"method": "sft", "use_cpu": True, "disable_tqdm": True, "max_steps": 12, "learning_rate": 5e-3, "seed": 3,
           "per_device_train_batch_size": 8, "preflight": "off", "logging_steps": 4}  # fmt: skip
    return XPOConfig(output_dir=str(folder), **{**how, **more})


def aligned(tmp_path, home, folders, rows, *, instructions=None, peft_config=None, **args):
    model = xf.models.load_model(str(home / "model"))[0]
    defaults = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_steps": 1, "seed": 3, "max_grad_norm": 0.0,
    }  # fmt: skip
    return RepresentationTrainer(
        model,
        RepresentationConfig(**{**defaults, **args}),
        signal=Signal.load(model, folders, instructions),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=peft_config or lora(r=8, target_modules="all-linear"),
    )


@pytest.fixture(scope="module")
def dual(home, tmp_path_factory):
    def load():
        return xf.models.load_model(str(home / "model"))[0]

    rows = data.load(PAIRS, kind="pair")
    return train_signal(load, make_tokenizer(), rows, signal_config, lora(), tmp_path_factory.mktemp("signal"))


def plain_states(model, ids: list[int], layers) -> list[torch.Tensor]:
    """The outputs of layers: transformers' own hidden states, entry k + 1; of the last layer what its norm is given."""
    last = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    found = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    return [(last[0] if k + 2 == len(found) else found[k + 1])[0] for k in layers]


def test_hidden_loss_literal():
    """Two layers of width 2, two positions of three: (1 + 4)/2, (0 + 0)/2 and (1 + 0)/2, (4 + 4)/2, over 2 layers."""
    base = [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)]
    signal = [torch.full((1, 3, 2), 0.5), torch.zeros(1, 3, 2)]
    states = [
        torch.tensor([[[2.0, 3.0], [1.0, 1.0], [9.0, 9.0]]]),  # less 2 · 0.5: (1, 2), (0, 0)
        torch.tensor([[[2.0, 1.0], [3.0, -1.0], [9.0, 9.0]]]),  # less 1: (1, 0), (2, −2)
    ]
    targets = torch.tensor([[5, 6, -100]])
    loss, metrics = hidden_loss(states, base, signal, targets, 2.0)
    assert loss.tolist() == [(2.5 + 0.0 + 0.5 + 4.0) / 2]
    assert metrics["mse"].tolist() == [1.75] and metrics["signal"].tolist() == [0.5]
    empty, _ = hidden_loss(states, base, signal, torch.full((1, 3), -100), 2.0)
    assert empty.tolist() == [0.0]


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_rahfs_loss_and_gradients_are_the_plain_ones(home, dual, tmp_path, layers):
    trainer = aligned(tmp_path, home, dual, PAIRS, layers=layers, alpha=1.7)
    with torch.no_grad():  # so that the adapter does something
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    student = copy.deepcopy(trainer.model).double()
    gradients = Gradients()
    trainer.add_callback(gradients)
    base = xf.models.load_model(str(home / "model"))[0].double()
    sides = [xf.models.load_model(str(folder))[0].double() for folder in dual.values()]
    total, tokens = 0.0, 0
    for row in PAIRS:
        prompt, completion = ids_of(row["prompt"]), [*ids_of(row["chosen"]), 1]
        ids, at = [*prompt, *completion], slice(len(prompt) - 1, -1)
        h = plain_states(student.base_model.model, ids, layers)
        b, w, rejected = (plain_states(model, ids, layers) for model in (base, *sides))
        each = [(x - (y + 1.7 * (p - q)).detach())[at].square().mean(1) for x, y, p, q in zip(h, b, w, rejected)]
        total, tokens = total + torch.stack(each).mean(0).sum(), tokens + len(completion)
    (total / tokens).backward()
    trainer.train()
    [loss, *_] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(total.item() / tokens, rel=1e-4)
    wanted = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(wanted) >= 14 * max(layers)
    for name, g in wanted.items():
        assert_close(gradients.found[name].double(), g, rtol=2e-3, atol=1e-5 * float(g.abs().max()))


def test_single_reads_the_same_completion_under_either_instruction(home, tmp_path):
    told = ("w90 w91 ", "w92 w93 w94 ")

    def load():
        return xf.models.load_model(str(home / "model"))[0]

    rows = data.load(PAIRS, kind="pair")
    how = {"kind": "single", "instructions": told}
    folders = train_signal(load, make_tokenizer(), rows, signal_config, lora(), tmp_path / "signal", **how)
    assert list(folders) == ["both"]
    trainer = aligned(tmp_path, home, folders, PAIRS, instructions=told, layers=[0, 1])
    trainer.train()
    [loss, *_] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told_model = xf.models.load_model(str(folders["both"]))[0].double()
    total, tokens = 0.0, 0
    for row in PAIRS:
        completion = [*ids_of(row["chosen"]), 1]
        sides = []
        for instruction in told:
            front = ids_of(instruction + row["prompt"])
            found = plain_states(told_model, [*front, *completion], [0, 1])
            sides.append([x[len(front) - 1 : -1] for x in found])
        each = [(a - b).square().mean(1) for a, b in zip(*sides, strict=True)]
        total, tokens = total + torch.stack(each).mean(0).sum().item(), tokens + len(completion)
    assert loss == pytest.approx(total / tokens, rel=1e-3)  # h = h(base) at the first step: what is left is αA


def test_rahf_moves_the_states_and_the_answers(home, dual, tmp_path):
    trainer = aligned(tmp_path, home, dual, PAIRS, max_steps=60, learning_rate=5e-3)
    before = trainer.evaluate()
    assert before["eval_mse"] == pytest.approx(before["eval_signal"], rel=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_mse"] < before["eval_mse"] / 4
    assert after["eval_signal"] == pytest.approx(before["eval_signal"], rel=1e-4)  # neither base nor signal has moved
    gaps = []
    for model in (xf.models.load_model(str(home / "model"))[0], trainer.model):
        sums = []
        for name in ("chosen", "rejected"):
            for row in PAIRS:
                ids = torch.tensor([[*ids_of(row["prompt"]), *ids_of(row[name]), 1]])
                logps = model(input_ids=ids).logits.detach().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
                sums.append(float(logps[len(ids_of(row["prompt"])) - 1 :].mean()))
        gaps.append(sum(sums[: len(PAIRS)]) - sum(sums[len(PAIRS) :]))
    assert gaps[1] > gaps[0]  # the chosen completions have become likelier, beside the rejected ones


TOLD = ("w90 w91 ", "w92 w93 w94 ")


def lead(model, rows, told: str = "") -> float:
    """The mean of how much likelier a token of the chosen completion is than one of the rejected, as log-probs."""
    found = []
    for row in rows:
        sides, front = [], ids_of(told + row["prompt"])
        for name in ("chosen", "rejected"):
            ids = torch.tensor([[*front, *ids_of(row[name]), 1]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            sides.append(float(logps[len(front) - 1 :].mean()))
        found.append(sides[0] - sides[1])
    return sum(found) / len(found)


def beside_instructions(folder, seed: int) -> dict[str, float]:
    """`lead` on held-out pairs: at the start, of the signal's model under either instruction, after the alignment."""
    make_model(seed).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")

    def load():
        return xf.models.load_model(str(folder / "model"))[0]

    rows, held = planted(48, seed), planted(40, seed + 50)
    taught = partial(signal_config, max_steps=40, learning_rate=1e-2, seed=seed, logging_steps=1000)
    pairs, adapter = data.load(rows, kind="pair"), lora(r=8, target_modules="all-linear")
    how = {"kind": "single", "instructions": TOLD}
    folders = train_signal(load, make_tokenizer(), pairs, taught, adapter, folder / "signal", **how)
    told = xf.models.load_model(str(folders["both"]))[0]
    found = {"start": lead(load(), held), "preferred": lead(told, held, TOLD[0]), "other": lead(told, held, TOLD[1])}
    trainer = aligned(
        *(folder, folder, folders, rows), instructions=TOLD, layers=[0, 1], max_steps=25, learning_rate=5e-3,
        per_device_train_batch_size=8, seed=seed, preflight="off", logging_steps=1000,
    )  # fmt: skip
    trainer.train()
    return {**found, "aligned": lead(trainer.model, held)}


def test_without_an_instruction_an_aligned_model_answers_as_under_the_preferred_one(tmp_path):
    found = beside_instructions(tmp_path, 0)
    assert found["preferred"] > found["start"] + 0.5 > found["other"] + 0.5  # the signal is there
    gain, whole = (found[name] - found["start"] for name in ("aligned", "preferred"))
    assert gain > 0.5 * whole, f"mean log-prob of chosen over rejected, held out: {found}"


def test_a_signal_shares_the_weights_of_the_model(home, dual):
    model = xf.models.load_model(str(home / "model"))[0]
    signal = Signal.load(model, dual, None)
    own = {p.data_ptr() for p in model.parameters()}
    shared = [p for n, p in signal.model.named_parameters() if "lora" not in n]
    assert shared and all(p.data_ptr() in own for p in shared)
    assert not any("lora" in n for n, _ in model.named_parameters())


def test_rahf_by_one_command_and_resumed(home, tmp_path, capsys):
    rows = write(tmp_path / "pairs.jsonl", planted(12, 5))

    def run(output, *more) -> int:
        return cli.main([
            "rahf", "--data", rows, "--model", str(home / "model"), "--output-dir", str(output), "--cpu",
            "--batch-size", "4", "--logging-steps", "1", "--eval-split", "2", "--max-steps", "4", "--save-steps", "2",
            "--lora-rank", "4", *more,
        ])  # fmt: skip

    assert run(tmp_path / "whole") == 0
    found = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert found["after"]["eval_mse"] < found["before"]["eval_mse"]
    # Stopped while the second adapter of the signal was trained, and, gone on, in the last stage.
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    part = tmp_path / "part"
    for path in (*part.glob("checkpoint-*"), part / "signal" / "worse" / "checkpoint-4"):
        shutil.rmtree(path)
    for path in (*part.glob("adapter*"), *(part / "signal" / "worse").glob("adapter*")):
        path.unlink()
    assert run(part) == 2
    assert "has the signal of an earlier run" in capsys.readouterr().err
    assert run(part, "--resume") == 0
    again = json.loads((part / "results.json").read_text())
    assert again["after"]["eval_mse"] == found["after"]["eval_mse"]
    shutil.rmtree(part / "checkpoint-4")
    assert run(part, "--resume") == 0
    assert json.loads((part / "results.json").read_text())["after"]["eval_mse"] == found["after"]["eval_mse"]
    model, _ = xf.models.load_model(str(part))  # the result is an adapter like any other
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 97)


def test_refusals_of_rahf(home, dual, tmp_path, capsys):
    for args, said in (
        ({"alpha": 0.0}, "expected alpha > 0"),
        ({"layers": [2]}, r"different layers from 0 to 1, got \[2\]"),
        ({"layers": [1, 1]}, r"different layers from 0 to 1, got \[1, 1\]"),
        ({"method": "rhaf"}, "aligned by rahf, got 'rhaf'"),
        ({"reference": "copy", "context": "a b"}, "rahf reads no reference, context: leave them out"),
    ):
        with pytest.raises(ValueError, match=said):
            aligned(tmp_path, home, dual, PAIRS, **args)
    model = make_model()
    with pytest.raises(ValueError, match="rahf trains an adapter"):
        RepresentationTrainer(
            model, RepresentationConfig(output_dir=str(tmp_path), use_cpu=True), signal=Signal.load(model, dual, None),
            train_dataset=PAIRS, processing_class=make_tokenizer(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="kind must be one of single, dual, got 'duel'"):
        train_signal(make_model, make_tokenizer(), [], signal_config, lora(), tmp_path, kind="duel")
    rows = write(tmp_path / "pairs.jsonl", PAIRS)
    for options, said in (
        (["--prefer", "be good"], "the instructions of --signal single"),
        (["--full"], "--full: rahf trains adapters"),
        (["--layers", "7"], "different layers from 0 to 1, got [7]"),
        (["--layers", "a"], "expected numbers of layers"),
        (["--signal", "single", "--prefer", "nowhere.txt"], "no such file"),
    ):
        words = ["rahf", "--data", rows, "--model", str(home / "model"), "--output-dir", str(tmp_path / "no"), "--cpu"]
        try:
            code = cli.main([*words, *options])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "no" / "signal").exists()
