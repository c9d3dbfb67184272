"""A teacher's likeliest tokens as columns: made in tiles, read by topk_kl, each broken column refused by name."""

from __future__ import annotations

import math

import datasets
import pytest
import torch

from test_distil_trainer import ROWS, TOKENS, logits, losses, wider
from test_trainer import PEFT_WARNING, VOCAB, lora, make_model, make_tokenizer
from xpo_fast import Objective, data
from xpo_fast.trainer import DistillationTrainer, XPOConfig, XPOTrainer, teacher_topk

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")


def encoded(rows=ROWS, **how):
    return data.encode(data.load(rows, kind="chosen"), make_tokenizer(), kind="chosen", **how)


def trainer_of(tmp_path, rows, *, model=None, peft_config=None, **args):
    defaults = {
        "output_dir": str(tmp_path / "out"), "method": "topk_kl", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant", "max_steps": 1, "seed": 3, "max_grad_norm": 0.0,
    }  # fmt: skip
    model, args = make_model() if model is None else model, XPOConfig(**{**defaults, **args})
    return XPOTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer(), peft_config=peft_config
    )


def plain(student, teacher, k, vocab=VOCAB):
    """The mean over tokens of the KL of k + 1 outcomes, from all logits in float64."""
    found = []
    for row in ROWS:
        own, theirs = (logits(m, row, vocab).log_softmax(-1) for m in (student, teacher))
        q, at = theirs.topk(k, dim=1)
        p, q = own.gather(1, at).exp(), q.exp()
        rest = 1 - q.sum(1), 1 - p.sum(1)
        found.append(((q * (q / p).log()).sum(1) + rest[0] * (rest[0] / rest[1]).log()).sum())
    return torch.stack(found).sum().item() / TOKENS


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_columns_are_the_teachers(batch_size):
    teacher = wider(vocab_size=VOCAB + 7)
    found = teacher_topk(teacher, encoded(), 5, vocab=VOCAB, batch_size=batch_size)
    for row, text in zip(found.to_list(), ROWS, strict=True):
        wanted, at = logits(teacher, text).log_softmax(-1).topk(5, dim=1)
        assert row["topk_ids"] == at.tolist() and len(at) == len(row["chosen_ids"])
        torch.testing.assert_close(torch.tensor(row["topk_logp"]).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how", [{"layout": "padded"}, {"layout": "packed"}, {"tokens_per_batch": 24, "layout": "padded"}], ids=str
)
def test_first_step(tmp_path, how):
    student, teacher = make_model(), wider()
    wanted = plain(student, teacher, 6)
    teacher_topk(teacher, encoded(), 6).save_to_disk(tmp_path / "columns")
    rows = datasets.load_from_disk(tmp_path / "columns")
    trainer = trainer_of(tmp_path, rows, model=student, **how)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-5)


def test_it_learns(tmp_path):
    student, teacher = make_model(), wider(initializer_range=0.6)
    rows = teacher_topk(teacher, encoded(), 8)
    trainer = trainer_of(
        tmp_path, rows, model=student, method="topk_kl + 0.1*sft", max_steps=20, peft_config=lora(), learning_rate=5e-2
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]


def test_tokens_with_fewer_numbers_and_tokens_that_are_not_scored(tmp_path):
    """Padding to the longest changes nothing: the KL is that of each token's own ids, by hand."""
    log = math.log
    row = {
        "prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "chosen_mask": [True, False, True], "where": "here",
        "topk_ids": [[5, 9], [], [8]], "topk_logp": [[log(0.5), log(0.25)], [], [log(0.75)]],
    }  # fmt: skip
    student = make_model()
    p = student(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0].double().softmax(-1)
    a, b, c = p[1, 5].item(), p[1, 9].item(), p[3, 8].item()
    first = 0.5 * log(0.5 / a) + 0.25 * log(0.25 / b) + 0.25 * log(0.25 / (1 - a - b))
    second = 0.75 * log(0.75 / c) + 0.25 * log(0.25 / (1 - c))
    trainer = trainer_of(tmp_path, datasets.Dataset.from_list([row]), model=student)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert teacher_topk(wider(), trainer.train_dataset.select_columns([*list(row)[:4]]), 2)[0]["topk_ids"][1] == []


def broken(**columns):
    row = {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "where": "rows:7"}
    row |= {"topk_ids": [[5, 9], [6, 2]], "topk_logp": [[-1.0, -2.0], [-1.0, -2.0]]}
    return datasets.Dataset.from_list([{**row, **columns}])


@pytest.mark.parametrize(
    ("rows", "args", "said"),
    [
        (broken(topk_ids=[[5, 9]]), {}, "rows:7: expected topk_ids and topk_logp of each of the 2 .* got 1 and 2"),
        (broken(topk_ids=[[5, 9], [6]]), {}, "token 1 of the completion has 1 numbers in topk_ids and 2 in topk_logp"),
        (
            broken(topk_ids=[[5, 9], []], topk_logp=[[-1.0, -2.0], []]),
            {},
            "token 1 of the completion is scored and has",
        ),
        (broken(topk_ids=[[5, VOCAB], [6, 2]]), {}, f"the id {VOCAB}, which the student's vocabulary of {VOCAB}"),
        (broken(topk_ids=[[5, -1], [6, 2]]), {}, "the id -1"),
        (broken(topk_ids=[[5, 5], [6, 2]]), {}, "an id twice"),
        (broken(topk_logp=[[-1.0, math.nan], [-1.0, -2.0]]), {}, "which are no log-probs"),
        (broken(topk_logp=[[-1.0, 0.5], [-1.0, -2.0]]), {}, "which are no log-probs"),
        (broken(topk_logp=[[-0.1, -0.1], [-1.0, -2.0]]), {}, "which are no log-probs"),
        (broken(), {"max_length": 3}, "rows:7: 4 tokens, more than max_length=3"),
        (broken().remove_columns("topk_logp"), {}, "expected token ids with the columns topk_ids and topk_logp"),
        (ROWS, {}, "expected token ids with the columns topk_ids and topk_logp"),
        (broken(), {"method": "sft"}, "topk_ids and topk_logp are for topk_kl, sft.* reads none"),
    ],
)
def test_refused_rows(tmp_path, rows, args, said):
    with pytest.raises(ValueError, match=said):
        trainer_of(tmp_path, rows, **args)


def test_refused_calls(tmp_path):
    teacher, rows = wider(), encoded()
    for given, said in (
        ((data.load(ROWS, kind="chosen"), 3), "expected token ids"),
        ((teacher_topk(teacher, rows, 2), 3), "already"),
        ((rows, 0), f"expected k from 1 to {VOCAB}"),
        ((rows, VOCAB + 1), f"expected k from 1 to {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=said):
            teacher_topk(teacher, *given)
    with pytest.raises(ValueError, match="expected vocab from 1"):
        teacher_topk(teacher, rows, 2, vocab=VOCAB + 1)
    with pytest.raises(ValueError, match="one completion, and pairs have two"):
        _ = Objective("topk_kl + 0.5*dpo").data_kind
    with pytest.raises(ValueError, match="reads what a teacher has said before"):
        DistillationTrainer(
            make_model(), teacher, XPOConfig(str(tmp_path), method="topk_kl", use_cpu=True),
            train_dataset=ROWS, processing_class=make_tokenizer(), teacher_processing_class=make_tokenizer(),
        )  # fmt: skip
