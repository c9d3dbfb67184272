"""DistillationTrainer: losses and gradients from all logits, teachers, on-policy steps, resume, refusals."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.testing import assert_close

from planted import ids_of
from test_teachers import divergence
from test_trainer import PEFT_WARNING, VOCAB, WORDS, Gradients, lora, make_model, make_tokenizer
from xpo_fast.seeds import seed_for
from xpo_fast.trainer import DistillationConfig, DistillationTrainer, XPOConfig, XPOTrainer

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

# Completions of several lengths, one of one token (and EOS).
ROWS = [
    {"prompt": "w1 w2", "completion": " w3 w4 w5"},
    {"prompt": "w7 w8 w9 w10 w11", "completion": " w3"},
    {"prompt": "w7", "completion": " w20 w21 w22 w23 w24 w25"},
    {"prompt": "w30 w31 w32", "completion": " w33 w34"},
]
TOKENS = sum(len(ids_of(row["completion"])) + 1 for row in ROWS)


def wider(seed=5, **config):
    """A teacher of another width and depth."""
    return make_model(seed, hidden_size=40, num_hidden_layers=1, num_attention_heads=2, **config)


def trainer_of(tmp_path, teacher, *, rows=ROWS, model=None, tokenizer=None, config=DistillationConfig, **args):
    own = {
        name: args.pop(name) for name in [*args] if name in ("peft_config", "eval_dataset", "teacher_processing_class")
    }
    defaults = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_steps": 1, "seed": 3, "max_grad_norm": 0.0,
    }  # fmt: skip
    return DistillationTrainer(
        make_model() if model is None else model,
        teacher,
        config(**{**defaults, **args}),
        train_dataset=rows,
        processing_class=tokenizer or make_tokenizer(),
        **own,
    )


def logits(model, row, vocab=VOCAB):
    front, completion = ids_of(row["prompt"]), [*ids_of(row["completion"]), 1]
    return model(input_ids=torch.tensor([[*front, *completion]])).logits[0, len(front) - 1 : -1, :vocab].double()


def plain(student, teacher, settings, rows=ROWS):
    """The mean divergence of a token, from all logits in float64."""
    found = [divergence(logits(student, r), logits(teacher, r).detach(), *settings).sum() for r in rows]
    return torch.stack(found).sum() / sum(len(ids_of(r["completion"])) + 1 for r in rows)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- offline ---


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("method", "method_args", "settings"),
    [
        ("gkd", {"beta": 0.3, "temperature": 2.0}, (0.3, 2.0)),
        ("forward_kl", {}, (0, 1.0)),
        ("reverse_kl", {}, (1, 1.0)),
    ],
)
def test_first_step(tmp_path, method, method_args, settings, layout):
    student, teacher = make_model(), wider()
    wanted = plain(student, teacher, settings)
    expected = dict(
        zip(dict(student.named_parameters()), torch.autograd.grad(wanted, student.parameters()), strict=True)
    )
    kept = {n: p.clone() for n, p in teacher.named_parameters()}
    trainer = trainer_of(tmp_path, teacher, model=student, method=method, method_args=method_args, layout=layout)
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)
    for name, gradient in gradients.found.items():
        assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, check_dtype=False, msg=name)
    assert all(torch.equal(p, kept[n]) and p.grad is None for n, p in teacher.named_parameters())
    assert trainer.reference == "teacher" and not teacher.training


def test_it_learns(tmp_path):
    """20 steps towards a teacher: the divergence falls, and on rows held out, too."""
    student, teacher = make_model(), wider(initializer_range=0.6)
    trainer = trainer_of(tmp_path, teacher, model=student, max_steps=20, eval_dataset=ROWS[:2])
    before = trainer.held_out()
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    assert trainer.held_out()["eval_loss"] < 0.5 * before["eval_loss"]
    assert plain(student, teacher, (0.5, 1.0)).item() < 0.5 * losses(trainer)[0]


def test_several_teachers_by_weights(tmp_path):
    student, first, second = make_model(), wider(), wider(6)
    wanted = 0.75 * plain(student, first, (0.5, 1.0)) + 0.25 * plain(student, second, (0.5, 1.0))
    trainer = trainer_of(tmp_path, [(first, 3), (second, 1.0)], model=student)
    assert [t.weight for t in trainer.teachers] == [0.75, 0.25]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)
    together = trainer_of(tmp_path, [first, copy.deepcopy(first)], method="gkd + 0.5*sft")
    alone = trainer_of(tmp_path, first, method="gkd + 0.5*sft")
    for one in (together, alone):
        one.train()
    assert losses(together) == pytest.approx(losses(alone), rel=1e-6)  # the weight of sft is not changed


def test_an_adapter_and_micro_batches(tmp_path):
    student, teacher = make_model(), wider()
    wanted = plain(student, teacher, (0.5, 1.0)).item()
    whole = trainer_of(tmp_path, teacher, model=copy.deepcopy(student), peft_config=lora(), max_steps=3)
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "tokens_per_batch": 12}
    parts = trainer_of(tmp_path, teacher, model=student, peft_config=lora(), max_steps=3, **how)
    for one in (whole, parts):
        one.train()
    assert losses(whole)[0] == pytest.approx(wanted, rel=1e-5)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_the_rows_that_both_heads_have(tmp_path):
    """A padded teacher: each distribution is over the student's tokens alone."""
    student, teacher = make_model(), wider(vocab_size=VOCAB + 7)
    wanted = plain(student, PaddedTo(teacher), (0.5, 1.0)).item()
    how = {"teacher_processing_class": make_tokenizer()}
    trainer = trainer_of(tmp_path, teacher, model=student, **how)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-5)


class PaddedTo(torch.nn.Module):
    """A model whose logits beyond the student's are cut."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        out = self.model(**inputs)
        out.logits = out.logits[..., :VOCAB]
        return out


def test_another_scale_of_logits(tmp_path):
    """Of a Granite, whose logits are divided by a number."""
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, logits_scaling=0.25,
    )  # fmt: skip
    torch.manual_seed(2)
    student, teacher = make_model(), transformers.GraniteForCausalLM(config)
    wanted = plain(student, teacher, (0.5, 1.0)).item()
    trainer = trainer_of(tmp_path, teacher, model=student)
    assert trainer.teachers[0].scale == 4
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-5)


# --- on-policy ---


def drawn(trainer):
    """Keeps the rows that each micro-batch of training was computed on."""
    found, loss = [], trainer._loss

    def kept(model, inputs, *args):
        if model.training:
            found.append(
                [r[m.bool()].tolist() for r, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
            )
        return loss(model, inputs, *args)

    trainer._loss = kept
    return found


def test_a_share_of_the_steps_is_on_policy(tmp_path):
    own = [random.Random(seed_for(3, "on-policy", k)).random() < 0.5 for k in range(6)]
    assert any(own) and not all(own)
    trainer = trainer_of(tmp_path, wider(), max_steps=6, on_policy=0.5, max_new_tokens=5)
    rows = drawn(trainer)
    trainer.train()
    of_data = {(*ids_of(r["prompt"]), *ids_of(r["completion"]), 1) for r in ROWS}
    fronts = {tuple(ids_of(r["prompt"])) for r in ROWS}
    for sampled, batch in zip(own, rows, strict=True):
        assert ({*map(tuple, batch)} == of_data) != sampled
        for row in batch:
            assert any(tuple(row[: len(f)]) == f and (not sampled or len(row) <= len(f) + 5) for f in fronts)
    logged = [entry["on_policy"] for entry in trainer.state.log_history if "on_policy" in entry]
    assert logged == [float(x) for x in own]


def test_answers_end_at_stop_strings(tmp_path):
    """Every word is a stop string, so that every answer has one word."""
    trainer = trainer_of(tmp_path, wider(), on_policy=1.0, max_new_tokens=5, stop=WORDS)
    rows = drawn(trainer)
    trainer.train()
    assert trainer.args.stop == tuple(WORDS)
    assert sorted(len(row) for row in rows[0]) == sorted(len(ids_of(r["prompt"])) + 1 for r in ROWS)


@pytest.mark.parametrize("tokens_per_batch", [None, 24])
def test_sampled_kl_learns_of_its_own_completions(tmp_path, tokens_per_batch):
    """The mean of log π − log teacher over sampled tokens is the loss, and falls."""
    student, teacher = make_model(), make_model(1)
    start, rows, steps = copy.deepcopy(student), ROWS * 4, 12 if tokens_per_batch is None else 1
    how = {"method": "sampled_kl", "on_policy": 1.0, "max_new_tokens": 4, "per_device_train_batch_size": 16}
    how |= {"tokens_per_batch": tokens_per_batch, "max_steps": steps}
    trainer = trainer_of(tmp_path, teacher, model=student, rows=rows, eval_dataset=rows, **how)
    seen = drawn(trainer)
    before = trainer.held_out()["eval_loss"]
    assert trainer.held_out()["eval_loss"] == before
    trainer.train()
    batches = seen[: len(seen) // steps]
    assert len(batches) > 1 or tokens_per_batch is None
    found, count = 0.0, 0
    for ids in (ids for batch in batches for ids in batch):
        front = max(len(f) for f in (ids_of(r["prompt"]) for r in ROWS) if ids[: len(f)] == f)
        for model, sign in ((start, 1), (teacher, -1)):
            logp = model(input_ids=torch.tensor([ids])).logits[0, front - 1 : -1].double().log_softmax(-1)
            found += sign * logp.gather(1, torch.tensor(ids[front:])[:, None]).sum().item()
        count += len(ids) - front
    assert losses(trainer)[0] == pytest.approx(found / count, rel=1e-4)
    if tokens_per_batch is None:
        assert trainer.held_out()["eval_loss"] < 0.9 * before


@pytest.mark.parametrize("method", ["gkd", "sampled_kl"])
def test_resumed_on_policy_is_the_same(tmp_path, method):
    how = {
        "method": method,
        "on_policy": 1.0,
        "max_new_tokens": 5,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer_of(tmp_path / "a", wider(), **how)
    whole.train()
    trainer_of(tmp_path / "b", wider(), **how).train()
    resumed = trainer_of(tmp_path / "b", wider(), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    for teacher, changed, message in ((wider(9), {}, "teachers"), (wider(), {"max_new_tokens": 4}, "sampling")):
        with pytest.raises(ValueError, match=message):
            other = trainer_of(tmp_path / "b", teacher, **{**how, **changed})
            other.train(resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-2"))


# --- refusals ---


def test_refusals(tmp_path):
    student, teacher = make_model(), wider()
    words = [*WORDS[1:], WORDS[0]]
    for given, how, message in (
        (student, {"model": student}, "the teacher is the student itself"),
        ([], {}, "at least one teacher"),
        ([(teacher, 0)], {}, "weight > 0"),
        (3, {}, "expected a model as the teacher"),
        (teacher, {"method": "dpo"}, "dpo learns of no teacher: expected forward_kl"),
        (teacher, {"method": "gdk"}, r"no method named 'gdk'.*gkd"),
        (teacher, {"reference": "copy"}, "the teacher is the reference"),
        (teacher, {"on_policy": 1.5}, "from 0 to 1"),
        (teacher, {"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        (teacher, {"method": "sampled_kl", "on_policy": 0.5}, "set on_policy=1, got 0.5"),
        (teacher, {"method": "sampled_kl", "on_policy": 1.0, "temperature": 0.7}, "leave temperature, top_p and top_k"),
        (teacher, {"method": "topk_kl"}, "reads what a teacher has said before"),
        (teacher, {"method": "sampled_kl", "config": XPOConfig}, "set on_policy=1, got 0"),
        (teacher, {"teacher_processing_class": make_tokenizer(vocabulary=words)}, r"other numbers there, such as 'w0'"),
        (teacher, {"teacher_processing_class": [make_tokenizer()] * 2}, "a tokenizer for each of 1 teachers"),
        (wider(vocab_size=VOCAB + 7), {}, "has 104 rows and the student's 97: pass teacher_processing_class"),
        (
            wider(vocab_size=VOCAB - 2),
            {"teacher_processing_class": make_tokenizer()},
            r"95 rows does not hold the student's of 97.*resize_token_embeddings\(95\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, given, **how)
    for method in ("gkd", "sampled_kl"):
        with pytest.raises(ValueError, match=f"{method} learns of a teacher, another model: train by xpo-fast distill"):
            XPOTrainer(
                make_model(),
                XPOConfig(output_dir=str(tmp_path), method=method, use_cpu=True),
                train_dataset=ROWS,
                processing_class=make_tokenizer(),
            )
