"""Context distillation: its rows, its KL and gradients against the materialised one, training, resume, refusals."""

from __future__ import annotations

import copy
import json
import shutil
import types

import pytest
import torch
from torch.testing import assert_close

import xpo_fast as xf
from planted import ids_of
from test_trainer import PEFT_WARNING, WORDS, Gradients, lora, make_model, make_tokenizer
from xpo_fast import cli, data
from xpo_fast.cli import loading
from xpo_fast.cli.parser import UsageError
from xpo_fast.trainer import XPOConfig, XPOTrainer
from xpo_fast.trainer.context import at_places

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

CONTEXT = "w90 w91 w92 w3 w4 "
# Prompts and completions of several lengths, one of one token (and EOS), one prompt as long as the context.
ROWS = [
    {"prompt": "w1 w2", "completion": " w3 w4 w5"},
    {"prompt": "w7 w8 w9 w10 w11", "completion": " w3"},
    {"prompt": "w7", "completion": " w20 w21 w22 w23 w24 w25"},
    {"prompt": "w30 w31 w32", "completion": " w33 w34"},
]
TEMPLATE = (
    "{% for m in messages %}{{ 'w50' if m.role == 'system' else 'w51' if m.role == 'user' else 'w52' }} {{ m.content }}"
    " w53 {% endfor %}{% if add_generation_prompt %}w52 {% endif %}"
)


def trainer_of(tmp_path, rows=ROWS, *, model=None, peft_config=None, tokenizer=None, eval_rows=None, **args):
    defaults = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_steps": 1, "seed": 3, "max_grad_norm": 0.0, "method": "context_distillation", "context": CONTEXT,
    }  # fmt: skip
    return XPOTrainer(
        make_model() if model is None else model,
        XPOConfig(**{**defaults, **args}),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer or make_tokenizer(),
        peft_config=peft_config,
    )


def plain(student, teacher, rows=ROWS, context=CONTEXT) -> torch.Tensor:
    """Σ_t KL(teacher under the context ‖ student without it) of each row, from all logits in float64: (P,)."""
    found = []
    for row in rows:
        prompt, completion = ids_of(row["prompt"]), [*ids_of(row["completion"]), 1]

        def logps(model, front, completion=completion):
            ids = torch.tensor([[*front, *completion]])
            logits = model(input_ids=ids).logits[0, len(front) - 1 : -1]
            return logits.double().log_softmax(dim=-1)

        p, q = logps(teacher, ids_of(context) + prompt).detach(), logps(student, prompt)
        found.append((p.exp() * (p - q)).sum())
    return torch.stack(found)


def tokens(rows=ROWS) -> int:
    return sum(len(ids_of(row["completion"])) + 1 for row in rows)


def loss_log(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- rows ---


def test_the_references_rows_are_context_prompt_completion(tmp_path):
    trainer = trainer_of(tmp_path, reference="copy")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    for r, row in enumerate(ROWS):
        completion = [*ids_of(row["completion"]), 1]
        for of, front in (("", ids_of(row["prompt"])), ("ref_", ids_of(CONTEXT + row["prompt"]))):
            mask = batch[of + "attention_mask"][r].bool()
            assert batch[of + "input_ids"][r][mask].tolist() == [*front, *completion]
            targets = batch[of + "targets"][r]
            assert targets[targets != -100].tolist() == completion
            assert int((targets != -100).int().argmax()) == len(front) - 1


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "w1"}], "w50 w90 w91 w53 w51 w1 w53 w52"),
        ([{"role": "system", "content": "w2"}, {"role": "user", "content": "w1"}], "w50 w90 w91 w2 w53 w51 w1 w53 w52"),
    ],
    ids=["no system turn", "a system turn"],
)
def test_messages_have_the_context_as_their_system_turn(tmp_path, messages, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [*messages, {"role": "assistant", "content": "w9 w8"}]}]
    trainer = trainer_of(tmp_path, rows, tokenizer=tokenizer, context="w90 w91", reference="copy")
    [row] = trainer.train_dataset
    assert tokenizer.decode(row["ref_prompt_ids"]) == expected
    assert tokenizer.decode(row["chosen_ids"]) == "w9 w8 w53"
    assert "w90" not in tokenizer.decode(row["prompt_ids"])


def test_a_cut_row_has_the_same_completion_under_the_context(tmp_path):
    trainer = trainer_of(tmp_path, reference="copy", max_length=6)
    row = trainer.train_dataset[2]
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 6
    assert row["ref_prompt_ids"] == ids_of(CONTEXT + "w7")
    assert trainer.train_dataset[1]["ref_prompt_ids"] == ids_of(CONTEXT + ROWS[1]["prompt"])  # whose own prompt is cut


def test_a_text_alone_follows_the_context(tmp_path):
    trainer = trainer_of(tmp_path, [{"text": "w1 w2 w3"}, {"text": "w4 w5"}], reference="copy")
    row = trainer.train_dataset[0]
    assert row["prompt_ids"] == ids_of("w1") and row["chosen_ids"] == [*ids_of("w2 w3"), 1]
    assert row["ref_prompt_ids"] == ids_of(CONTEXT + "w1")


def test_pairs_train_by_their_chosen_half(tmp_path):
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " w60"} for r in ROWS]
    trainer = trainer_of(tmp_path, rows, reference="copy")
    assert [row["chosen_ids"] for row in trainer.train_dataset] == [[*ids_of(r["completion"]), 1] for r in ROWS]


def test_states_are_brought_to_the_places_of_the_same_targets():
    """Ragged on both sides, and a row without targets."""
    targets = torch.tensor([[-100, -100, 7, -100, 8], [-100, 5, -100, -100, -100], [-100] * 5])
    places = torch.tensor([[7, -100, 8, -100], [-100, -100, 5, -100], [-100] * 4])
    hidden = torch.arange(15.0).view(3, 5, 1)
    found = at_places(hidden, targets, places)
    assert found.shape == (3, 4, 1)
    assert found[places != -100].flatten().tolist() == [2.0, 4.0, 6.0]


# --- the loss ---


def test_literal():
    """Two tokens of KL 0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25) = 0.1438410362, and a log-prob ln 0.75 each."""
    hidden = torch.tensor([[[3.0], [3.0]]], dtype=torch.float64).log().requires_grad_()
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    out = xf.Objective("context_distillation", backend="dense")(
        hidden.flatten(0, 1), weight, torch.tensor([0, 0]), cu_seqlens=torch.tensor([0, 2, 2]),
        ref_hidden=torch.zeros(2, 1, dtype=torch.float64),
    )  # fmt: skip
    out.loss.backward()
    assert_close(out.loss.item(), 0.14384103622589042, rtol=1e-12, atol=0)
    assert_close(hidden.grad.flatten(), torch.full((2,), (0.75 - 0.5) / 2, dtype=torch.float64))
    assert_close(float(out.metrics["kl"]), 2 * 0.14384103622589042, rtol=1e-12, atol=0)
    assert_close(float(out.metrics["logps/teacher"]), 2 * -0.6931471805599453, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_gradients_are_those_of_the_materialised_kl(tmp_path, backend, layout):
    teacher, model = make_model(), make_model()
    trainer = trainer_of(tmp_path, model=model, reference="copy", backend=backend, layout=layout)
    gradients = Gradients()
    trainer.add_callback(gradients)
    with torch.no_grad():  # so that the teacher is another model than the student, too
        for p in model.parameters():
            p *= 0.9
    student = make_model().double()
    student.load_state_dict(model.state_dict())
    expected = plain(student, teacher.double()).sum() / tokens()
    expected.backward()
    trainer.train()
    assert_close(loss_log(trainer)[0], expected.item(), rtol=1e-4, atol=1e-6)
    for name, p in student.named_parameters():
        if name != "lm_head.weight":
            assert_close(gradients.found[name].double(), p.grad, rtol=2e-3, atol=2e-6)


def test_micro_batches_and_a_budget_of_tokens_have_the_same_step(tmp_path):
    logs = [
        loss_log(run)
        for run in (
            trainer_of(tmp_path, reference="copy", max_steps=3),
            trainer_of(tmp_path, reference="copy", max_steps=3, per_device_train_batch_size=1,
                       gradient_accumulation_steps=4),
            trainer_of(tmp_path, reference="copy", max_steps=3, tokens_per_batch=24),
        )
        if run.train()
    ]  # fmt: skip
    assert_close(logs[1], logs[0], rtol=1e-4, atol=1e-6)
    assert_close(logs[2], logs[0], rtol=1e-4, atol=1e-6)


def test_the_first_loss_is_what_the_context_changes(tmp_path):
    """Nothing is 0 here at policy = reference; a context that changes nothing would be the exception."""
    trainer = trainer_of(tmp_path, peft_config=lora())
    assert trainer.reference == "adapter"
    trainer.train()
    model = make_model().double()
    assert_close(loss_log(trainer)[0], plain(model, model).sum().item() / tokens(), rtol=1e-4, atol=1e-6)
    assert loss_log(trainer)[0] > 0.05


@pytest.mark.parametrize("how", ["copy", "adapter"])
def test_training_lowers_the_kl_and_leaves_the_teacher(tmp_path, how):
    options = {"peft_config": lora(r=8, target_modules="all-linear")} if how == "adapter" else {}
    trainer = trainer_of(tmp_path, **options, max_steps=40, reference=how, eval_rows=ROWS)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    start = plain(make_model().double(), make_model().double()).sum().item() / tokens()
    assert_close(before["eval_loss"], start, rtol=1e-4, atol=1e-6)  # dropout or adapters change nothing at first
    assert after["eval_loss"] < start / 5
    assert after["eval_logps/teacher"] == pytest.approx(before["eval_logps/teacher"], rel=1e-5)
    found = plain(trainer.model.double(), make_model().double()).sum().item() / tokens()
    assert_close(after["eval_loss"], found, rtol=1e-3, atol=1e-5)


def test_preflight_finds_no_fault(tmp_path):
    for reference in ("adapter", "copy"):
        report = trainer_of(tmp_path, peft_config=lora(), reference=reference).preflight()
        assert not report.faults
        assert "is the same padded, reordered and in micro-batches" in report.screen()


def test_beside_supervised_fine_tuning(tmp_path):
    trainer = trainer_of(tmp_path, method="context_distillation + 0.5*sft", reference="copy")
    trainer.train()
    model = make_model().double()
    nll = 0.0
    for row in ROWS:
        ids = torch.tensor([[*ids_of(row["prompt"]), *ids_of(row["completion"]), 1]])
        logps = model(input_ids=ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])
        nll -= logps[len(ids_of(row["prompt"])) - 1 :].sum().item()
    expected = (plain(model, model).sum().item() + 0.5 * nll) / tokens()
    assert_close(loss_log(trainer)[0], expected, rtol=1e-4, atol=1e-6)


# --- a planted context ---


def answers(count: int, low: int, seed: int, front: str = "") -> list[dict]:
    """Prompts of one to three words, and answers of two: one of w{low} … w{low + 3}, one of the same ten further on."""
    g, rows = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        prompt = torch.randint(10, 22, (1 + int(torch.randint(3, (), generator=g)),), generator=g).tolist()
        first, second = (torch.randint(4, (2,), generator=g) + torch.tensor([low, low + 10])).tolist()
        rows.append({"prompt": front + " ".join(f"w{k}" for k in prompt), "completion": f" w{first} w{second}"})
    return rows


def beside_sft(folder, seed: int, texts: int = 30) -> dict[str, float]:
    """KL a token, on held-out prompts, of the teacher under the context with the student without it.

    The model is taught to answer from w60 under the context and from w30 without; the students see answers from
    w{texts}.
    """
    how = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "preflight": "off", "logging_steps": 1000}
    how |= {"seed": seed, "train_sampling_strategy": "random"}
    sft = {"method": "sft", "context": None}
    both = [*answers(96, 60, seed, CONTEXT), *answers(96, 30, seed + 1)]
    taught = trainer_of(folder, both, model=make_model(seed), max_steps=60, **sft, **how)
    taught.train()
    held, rows, found = answers(40, 60, seed + 2), answers(24, texts, seed + 3), {}
    teacher = copy.deepcopy(taught.model).double()

    def kl(student) -> float:
        with torch.no_grad():
            return float(plain(student.double(), teacher, held).sum()) / tokens(held)

    found["start"] = kl(copy.deepcopy(teacher))
    for name, args in (("context_distillation", {"reference": "copy"}), ("sft", sft)):
        run = trainer_of(folder, rows, model=copy.deepcopy(teacher).float(), max_steps=30, **args, **how)
        run.train()
        found[name] = kl(run.model)
    return found


def test_a_student_answers_held_out_prompts_as_under_the_context_and_sft_on_the_same_texts_does_not(tmp_path):
    """The texts do not show what the context changes: only the teacher does."""
    kl = beside_sft(tmp_path, 0)
    assert kl["context_distillation"] < 0.8 * kl["start"] < 0.8 * kl["sft"], f"KL a token to the teacher: {kl}"


# --- runs ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_model().save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    rows = [{"prompt": f"{WORDS[i]} w2", "completion": f" {WORDS[i + 1]} w3"} for i in range(12)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "context.txt").write_text(CONTEXT)
    return home


def train(home, output, *options) -> int:
    return cli.main([
        "train", "--method", "context_distillation", "--data", str(home / "rows.jsonl"), "--model",
        str(home / "model"), "--output-dir", str(output), "--cpu", "--batch-size", "4", "--logging-steps", "1",
        "--lora-targets", "q_proj,v_proj", *options,
    ])  # fmt: skip


def results(output) -> dict:
    return json.loads((output / "results.json").read_text())


def test_one_command_and_a_resumed_run_that_ends_alike(home, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    context = ("--context", str(home / "context.txt"), "--eval-split", "2", "--lr", "1e-2")
    assert train(home, whole, *context, "--max-steps", "4", "--save-steps", "2") == 0
    shown = capsys.readouterr().out
    assert "adapter: the model with its adapter switched off" in shown and "Fault" not in shown
    found = results(whole)
    assert found["after"]["eval_loss"] < found["before"]["eval_loss"]
    assert train(home, part, *context, "--max-steps", "4", "--save-steps", "2") == 0
    for name in ("checkpoint-4", "results.json"):
        path = part / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(home, part, *context, "--max-steps", "4", "--save-steps", "2", "--resume") == 0
    assert results(part)["after"]["eval_loss"] == found["after"]["eval_loss"]
    capsys.readouterr()
    shutil.rmtree(part / "checkpoint-4")
    another = ("--context", "w90 w91 w93 w3 w4", *context[2:])
    assert train(home, part, *another, "--max-steps", "4", "--save-steps", "2", "--resume") == 2
    assert "context" in capsys.readouterr().err


def test_dry_run_says_how_long_the_references_rows_are(home, tmp_path, capsys):
    assert train(home, tmp_path / "out", "--context", CONTEXT, "--dry-run") == 0
    assert "whose rows have 10 to 10 tokens" in capsys.readouterr().out  # 5 + 2 + 2 and EOS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "pass context="),
        (("--context", "nothing.txt"), "no such file, and a text has more than one word"),
        (("--context", CONTEXT, "--method", "dpo"), "dpo reads none"),
        (("--context", CONTEXT, "--reference", "cached"), 'use "adapter" or "copy"'),
        (("--context", CONTEXT, "--reference", "none"), 'reference="none" is for methods without one'),
        (("--context", CONTEXT, "--method", "context_distillation + dpo"), "in a run of its own"),
        (("--context", CONTEXT, "--fit"), "leave --fit out"),
    ],
    ids=lambda x: " ".join(x)[-30:] if isinstance(x, tuple) else "",
)
def test_refusals_of_the_command(home, tmp_path, capsys, options, said):
    assert train(home, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err


def test_a_context_is_a_file_or_a_text(tmp_path):
    (tmp_path / "c.txt").write_text("one two\n")
    assert loading.read_context(None) is None
    assert loading.read_context(str(tmp_path / "c.txt")) == "one two\n"
    assert loading.read_context("one " * 5000) == "one " * 5000  # longer than a name may be
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        loading.read_context(str(tmp_path / "bytes"))


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="text with words"):
        trainer_of(tmp_path, context="  ")
    with pytest.raises(ValueError, match="context is for context_distillation, no reward model"):
        from xpo_fast.rewards.trainer import RewardConfig

        RewardConfig(output_dir=str(tmp_path), use_cpu=True, context="a b").spec()
    long = " ".join(["w1"] * 130)
    with pytest.warns(UserWarning, match="138 tokens, and the model has 128 positions"):  # those of the policy fit
        trainer_of(tmp_path, context=long + " ", reference="copy")


def test_a_completion_of_other_tokens_behind_the_context_is_refused():
    """A tokenizer that joins: the completion's first token depends on what stands before the prompt."""

    class Joins:
        all_special_ids = ()
        added_tokens_decoder = types.MappingProxyType({})
        eos_token_id = None

        def __call__(self, texts, **_):
            one = isinstance(texts, str)
            ids = [[ord(c) + 1000 * (text.startswith("C") and c == "b") for c in text] for text in
                   ([texts] if one else texts)]  # fmt: skip
            return {"input_ids": ids[0] if one else ids}

        def decode(self, ids, **_):
            return "".join(chr(i % 1000) for i in ids)

    rows = data.load([{"prompt": "a", "completion": "b"}], kind="chosen")
    encoded = data.encode(rows, Joins(), kind="chosen")
    with pytest.raises(data.DataError, match="the completion has other tokens behind the context"):
        data.add_context(encoded, rows, Joins(), "C")
    same = data.add_context(encoded, rows, Joins(), "D")
    assert same[0]["ref_prompt_ids"] == [ord("D"), ord("a")]


def test_the_objective_names_what_it_needs():
    objective = xf.Objective("context_distillation")
    assert objective.reads_context and objective.needs_reference_hidden and objective.data_kind == "chosen"
    hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match="whole distributions"):
        objective(hidden, weight, torch.ones(2, 3, dtype=torch.long), ref_logps=torch.zeros(2))
