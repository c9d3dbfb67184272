"""The check before training: planted faults are named, a sound run is clean, and nothing of the run changes."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import xpo_fast as xf
import xpo_fast.rl.preflight
from xpo_fast import data, rl
from xpo_fast.rewards.spec import READS_SAMPLES, USES
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer
from xpo_fast.rl import RLConfig, RLTrainer
from xpo_fast.trainer import XPOConfig, XPOTrainer
from xpo_fast.trainer.findings import Finding, Report, Row, marked
from xpo_fast.trainer.preflight import KNOWN, evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = [f"w{i}" for i in range(60)]


def tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<eos>", "<pad>", "<user>", "<assistant>", *WORDS]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token=pad)
    made.chat_template = TEMPLATE
    return made


def model(seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def words(draw: random.Random, low: int = 3, high: int = 9) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def rows(kind: str = "pair", count: int = 12, chat: bool = False, seed: int = 1) -> list[dict]:
    draw = random.Random(seed)
    said = lambda text: [{"role": "assistant", "content": text}] if chat else " " + text  # noqa: E731
    made = []
    for i in range(count):
        row: dict = {"prompt": [{"role": "user", "content": words(draw)}] if chat else words(draw)}
        if kind == "list":
            row |= {"completions": [said(words(draw)) for _ in range(3)], "scores": [2.0, 1.0, 0.0]}
            row |= {"rejected": said(words(draw))}
        elif kind == "unpaired":
            row |= {"completion": said(words(draw)), "label": i % 3 > 0, "reward": float(i % 3), "value": 0.5}
        else:
            row |= {"chosen": said(words(draw)), "rejected": said(words(draw))}
            row |= {"score_chosen": 2.0 + i, "score_rejected": 1.0, "prob": 0.9} if kind == "pair" else {}
        made.append(row)
    return made


TOLD = (  # writes tools, and a word before answers if it is told to
    "{% if tools %}<user> {% for t in tools %}{{ t.function.name }} {% endfor %}<eos> {% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ 'w9 ' if think and m.role == 'assistant' }}{{ m.content }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{{ ' w9' if think }}{% endif %}"
)
MARKED = TEMPLATE.replace(
    "<{{ m.role }}> {{ m.content }} <eos> ",
    "{% if m.role == 'assistant' %}<assistant>{% generation %} {{ m.content }} <eos> {% endgeneration %}"
    "{% else %}<{{ m.role }}> {{ m.content }} <eos> {% endif %}",
)


def told(template: str = TOLD) -> dict:
    made = tokenizer()
    made.chat_template = template
    return {"processing_class": made}


def turns(kind: str = "pair", **beside) -> list[dict]:
    """Rows of conversations whose completions have a question and another answer in them."""
    draw = random.Random(4)

    def longer(said):
        if said and isinstance(said[0], list):
            return [*map(longer, said)]
        between = [{"role": "user", "content": words(draw, 6)}, {"role": "assistant", "content": words(draw)}]
        return [*said, *between]

    answers = ("chosen", "rejected", "completion", "completions")
    return [{n: longer(x) if n in answers else x for n, x in {**r, **beside}.items()} for r in rows(kind, chat=True)]


TOOLS = [{"type": "function", "function": {"name": "w3", "parameters": {}}}]


def trainer(folder: Path, method: str = "dpo", *, dataset=None, peft_config=None, given: dict | None = None, **args):
    held_out = args.pop("eval", None)
    config = XPOConfig(
        **{
            "output_dir": str(folder / "out"), "ref_cache_dir": str(folder / "ref"), "use_cpu": True, "method": method,
            "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "max_steps": 2, "logging_steps": 1, "seed": 3, **args,
        }
    )  # fmt: skip
    given = {"model": model(), "processing_class": tokenizer(), **(given or {})}
    kind = given["objective"].data_kind if "objective" in given else config.objective().data_kind
    dataset = rows(kind) if dataset is None else dataset
    return XPOTrainer(args=config, train_dataset=dataset, eval_dataset=held_out, peft_config=peft_config, **given)


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


TRAINED = [
    name
    for name, method in sorted(xf.METHODS.items())
    if method.layout not in ("policy", "reward")
    and not {"reward_w", "topk_kl_w"} & {*method.inputs}
    and not method.reads_teacher
]


ADAPTED = ("dpo", "kto", "lipo", "nn", "sft", "npo", "tdpo")  # of each kind of rows and reference


@pytest.mark.parametrize("method, adapter", [*((m, False) for m in TRAINED), *((m, True) for m in ADAPTED)])
def test_a_sound_run_is_clean(tmp_path, method, adapter):
    context = "w5 w6 " if xf.METHODS[method].reads_context else None
    report = trainer(tmp_path, method, peft_config=lora() if adapter else None, context=context).preflight()
    assert [f for f in report.findings if f.level != "ok"] == []
    checks = {f.check for f in report.findings}
    assert {"mask", "end", "answers", "prompts", "lengths", "head", "log-probs"} <= checks
    assert ("loss" in checks) == (method != "cringe")  # whose loss depends on draws


CHANGED = {
    "conversations": {"dataset": rows(chat=True)},
    "no pad token": {"given": {"processing_class": tokenizer(pad=None)}},
    "a sum": {"method": "dpo + 0.5*sft"},
    "one row": {"dataset": rows(count=1)},
    "lengths alike": {"dataset": [{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * 1},
    "copy": {"reference": "copy"},
    "tokens": {"method_args": {"ld_alpha": 0.5}},
    "weights of losses": {"method_args": {"wpo": True}},
    "pairs of lists": {"method_args": {"pairs": "all"}, "dataset": rows("list")},
    "options": {"method_args": {"beta": 0.3, "label_smoothing": 0.1}},
    "options that act later": {"method": "bco", "method_args": {"beta": 0.3}},
    "evaluated": {"eval": rows(count=3, seed=2)},
    "untied": {"given": {"model": model(tie_word_embeddings=False)}},
    "bfloat16": {"given": {"model": model().bfloat16()}},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "turns": {"dataset": turns()},
    "turns, cached": {"dataset": turns(), "reference": "cached"},
    "turns, the last one": {"dataset": turns(), "score": "last"},
    "turns, all of them": {"dataset": turns(), "score": "all"},
    "turns, marked": {"dataset": turns(), "given": told(MARKED)},
    "turns, of lists": {"method": "lipo", "dataset": turns("list")},
    "turns, with a label": {"method": "kto", "dataset": turns("unpaired")},
    "turns, by token": {"method": "tdpo", "dataset": turns()},
    "tools": {"dataset": [{**r, "tools": TOOLS} for r in rows(chat=True)], "given": told()},
    "variables of a row": {
        "dataset": [{**r, "chat_template_kwargs": {"think": True}} for r in rows(chat=True)],
        "given": told(),
    },
    "variables": {"dataset": turns(), "given": told(), "chat_template_kwargs": {"think": True}},
    "cut prompts": {"dataset": turns(), "max_prompt_length": 3},
    "an adapter on the head": {
        "peft_config": lora(target_modules=["q_proj", "lm_head"]),
        "given": {"model": model(tie_word_embeddings=False)},
    },
}


@pytest.mark.filterwarnings("ignore:.*weights in torch.bfloat16 are trained:UserWarning")
@pytest.mark.filterwarnings("ignore:.*bfloat16 is:UserWarning")
@pytest.mark.parametrize("name", CHANGED)
def test_there_is_no_false_alarm(tmp_path, name):
    report = trainer(tmp_path, **CHANGED[name]).preflight()
    assert [f for f in report.findings if f.level != "ok"] == []


def scores_prompt(made):
    """Scores the last token of the prompt as well."""

    def collate(features):
        batch = data.Collator(2, "pair")(features)
        first = (batch["targets"] != -100).int().argmax(dim=1) - 1
        at = torch.arange(len(first))
        batch["targets"][at, first] = batch["input_ids"][at, first + 1]
        return batch

    made.data_collator = collate


def shifts_labels(made):
    """Labels as transformers' models take them, given as targets: each position predicts its own token."""

    def collate(features):
        batch = data.Collator(2, "pair")(features)
        batch["targets"] = batch["targets"].roll(1, dims=1)
        return batch

    made.data_collator = collate


def masks_pad(made):
    """Labels of the padding's id are dropped, and the padding is the EOS."""

    def collate(features):
        batch = data.Collator(1, "pair")(features)
        batch["targets"][batch["targets"] == 1] = -100
        return batch

    made.data_collator = collate


def turns_numbers_round(made):
    """A collator that orders the numbers of a batch otherwise than its rows."""
    collate, numbers = made.data_collator, ("desirable", "scores")
    made.data_collator = lambda features: {n: x.flip(-1) if n in numbers else x for n, x in collate(features).items()}


def forgets_the_mask(made):
    """A collator that knows of no masks."""
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    made.data_collator = lambda features: data.Collator(2, "pair")([{n: f[n] for n in ids} for f in features])


def scores_the_user(made):
    """The masks of the rows are those of the other speaker."""
    dataset = made.train_dataset
    for name in ("chosen_mask", "rejected_mask"):
        flipped = [[not x for x in mask] for mask in dataset[name]]
        dataset = data.with_column(dataset.remove_columns(name), name, flipped)
    made.train_dataset = dataset


def counts_rows(made):
    """The loss of pairs is divided by their rows."""
    items = made._items
    made._items = lambda batch: 2 * items(batch)


def counts_batches(made):
    """Each micro-batch is divided by its own units, as where the number of items is not passed on."""
    loss = made._loss
    made._loss = lambda model, inputs, denominator: loss(model, inputs, None)


def reads_padding(made):
    """A layer takes the width of the batch for the length of a row."""
    made.model.model.norm.register_forward_hook(lambda module, given, out: out * (1 + 0.05 * out.shape[1]))


def another_reference(made):
    """Cached log-probs of other weights, as from a cache that does not know what it was made from."""
    made.prepare()
    column = [x - 1 for x in made.train_dataset["ref_logp_chosen"]]
    made.train_dataset = data.with_column(
        made.train_dataset.remove_columns("ref_logp_chosen"), "ref_logp_chosen", column
    )


def untied() -> LlamaForCausalLM:
    """The config ties the head to the embeddings, and the head has been loaded as a weight of its own."""
    made = model()
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().flip(0))
    return made


def tied_after_all() -> LlamaForCausalLM:
    made = model(tie_word_embeddings=False)
    made.lm_head.weight = made.model.embed_tokens.weight
    return made


def another_template(made):
    """The template is changed after the rows were encoded: sampling would write prompts otherwise."""
    made._tokenizer.chat_template = TEMPLATE.replace("<assistant>{%", "<assistant> w0{%")


def trains_on_held_out(made):
    made.eval_dataset = made.train_dataset.select([3])


def averages_pairs_in_place_of_sums(made):
    """An objective that divides by what it likes."""
    call = type(made.objective).__call__

    class Halved(xf.Objective):
        def __call__(self, *args, **kwargs):
            out = call(self, *args, **kwargs)
            return out if self.backend == "dense" else type(out)(out.loss / 2, out.metrics, out.counts, out.losses)

    made.objective.__class__ = Halved


SWAPPED = [{**r, "score_chosen": r["score_rejected"], "score_rejected": r["score_chosen"]} for r in rows()]


@pytest.mark.parametrize("case", ["a new one", "IA3, trained before"])
def test_an_adapter_that_the_reference_is_without_is_no_fault(tmp_path, case):
    """The run has been warned; "stop" must not refuse what was asked for."""
    if case == "a new one":
        given: dict = {"peft_config": lora(init_lora_weights=False)}
    else:
        adapted = peft.get_peft_model(model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                p.mul_(1.7 if "ia3" in name else 1)
        given = {"given": {"model": adapted}, "reference": "adapter"}
    with pytest.warns(UserWarning, match="adapter"):
        made = trainer(tmp_path, **given)
    report = made.preflight()
    assert not report.faults
    assert [f.level for f in report.findings if f.check == "reference"] == ["note"]


PLANTED = {
    # what is planted → arguments of the trainer, what is done to it, level, check and words of the finding
    "wrong mask": ({}, scores_prompt, "fault", "mask", "tokens of the prompt"),
    "labels of other rows": ({"method": "kto"}, turns_numbers_round, "fault", "numbers", "other numbers as desirable"),
    "scores of others": ({"method": "lipo"}, turns_numbers_round, "fault", "numbers", "other numbers as scores"),
    "no mask": ({"dataset": turns()}, forgets_the_mask, "fault", "mask", "completion that its mask leaves out"),
    "no mask, by the model": ({"dataset": turns()}, forgets_the_mask, "fault", "log-probs", "wrong mask"),
    "a mask the other way": ({"dataset": turns()}, scores_the_user, "fault", "answers", "in 24 of 24 completions"),
    "shifted labels": ({}, shifts_labels, "fault", "mask", "shifted labels"),
    "shifted labels, by the model": ({}, shifts_labels, "fault", "log-probs", "shifted labels"),
    "pad = EOS masked": ({}, masks_pad, "fault", "mask", "'<eos>', the EOS"),
    "no EOS is left": ({}, masks_pad, "fault", "end", "EOS supervised in 0%"),
    "swapped pairs": ({"dataset": SWAPPED}, None, "fault", "numbers", "swapped"),
    "improbable pairs": ({"dataset": [{**r, "prob": 0.1} for r in rows()]}, None, "fault", "numbers", "swapped"),
    "negative margins": ({"dataset": [{**r, "margin": -1.0} for r in rows()]}, None, "fault", "numbers", "negative"),
    "stale reference": ({}, another_reference, "fault", "reference", "stale cache"),
    "truncated answers": ({"max_length": 8}, None, "doubt", "lengths", "cut at max_length=8"),
    "truncated, no EOS": ({"max_length": 4}, None, "fault", "end", "are cut at max_length=4"),
    "another template": ({"dataset": rows(chat=True)}, another_template, "doubt", "prompts", "than sampling will"),
    "wrong denominator": ({}, counts_rows, "fault", "loss", "wrong denominator"),
    "each micro-batch alone": ({}, counts_batches, "fault", "loss", "micro-batches: a wrong denominator"),
    "an objective of its own": ({}, averages_pairs_in_place_of_sums, "fault", "loss", "wrong denominator"),
    "padding is read": ({}, reads_padding, "fault", "log-probs", "padding that is read"),
    "tied weights mixed up": ({"given": {"model": untied()}}, None, "fault", "head", "two weights of other values"),
    "untied weights mixed up": ({"given": {"model": tied_after_all()}}, None, "fault", "head", "are one weight"),
    "an option of another branch": (
        {"method": "f_dpo", "method_args": {"alpha": 0.9}}, None, "doubt", "options", "alpha=0.9 changes nothing",
    ),
    "the same answers": (
        {"dataset": [*rows(), {**rows()[0], "chosen": rows()[0]["rejected"]}]}, None, "doubt", "rows",
        "chosen and rejected are the same tokens in 1 of 13 pairs (first rows[12])",
    ),
    "rows twice": ({"dataset": rows() + rows()[:1]}, None, "doubt", "rows", "1 of 13 rows are there more than once"),
    "held out and trained on": ({}, trains_on_held_out, "doubt", "rows", "1 of 1 rows held out are trained on"),
    "one label": (
        {"method": "kto", "dataset": [{**r, "label": True} for r in rows("unpaired")]}, None, "doubt", "numbers",
        "all 12 labels are True",
    ),
    "equal scores": (
        {"method": "lipo", "dataset": [{**r, "scores": [1.0] * 3} for r in rows("list")]}, None, "doubt", "numbers",
        "all scores are equal in 12 of 12 lists",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(tmp_path, name):
    args, plant, level, check, words = PLANTED[name]
    made = trainer(tmp_path, **args)
    if plant is not None:
        plant(made)
    report = made.preflight()
    found = [f for f in report.findings if (f.level, f.check) == (level, check)]
    assert any(words in f.text for f in found), str(report)


def test_an_answer_that_the_template_drops_and_a_question_that_is_scored_are_named(tmp_path):
    drops = tokenizer()
    drops.chat_template = TEMPLATE.replace("m.content", "m.content.split()[0]")
    report = trainer(tmp_path, dataset=rows(chat=True), given={"processing_class": drops}).preflight()
    assert any("answer's words are not among those that are scored, in 24 of 24" in f.text for f in report.faults)
    more = [{"role": "user", "content": words(random.Random(3), 6, 6)}, {"role": "assistant", "content": "w1 w2"}]
    asked = [{**r, "chosen": r["chosen"] + more} for r in rows(chat=True)]
    made = trainer(tmp_path, dataset=asked)
    assert not made.preflight().doubts  # it is read
    dataset = made.train_dataset
    masks = [[True] * len(mask) for mask in dataset["chosen_mask"]]
    made.train_dataset = data.with_column(dataset.remove_columns("chosen_mask"), "chosen_mask", masks)
    assert any("not the assistant's, in 12 of 24" in f.text for f in made.preflight().doubts)


def test_a_doubled_bos_is_named(tmp_path):
    doubled = tokenizer()
    doubled.add_special_tokens({"bos_token": "<user>"})
    doubled.chat_template = "<user> <user> " + TEMPLATE
    report = trainer(tmp_path, dataset=rows(chat=True), given={"processing_class": doubled}).preflight()
    assert any("two BOS" in f.text for f in report.faults)


def test_a_template_end_at_which_sampling_does_not_stop_is_named(tmp_path):
    ended = tokenizer()
    ended.add_special_tokens({"additional_special_tokens": ["<user>"]})
    ended.chat_template = TEMPLATE.replace("<eos>", "<user>")
    made = trainer(tmp_path, dataset=rows(chat=True), given={"processing_class": ended})
    (fault,) = [f for f in made.preflight().faults if f.check == "end"]
    assert "'<user>', which is neither the tokenizer's EOS nor in the generation config" in fault.text
    made.model.generation_config.eos_token_id = [1, 3]  # then it does
    assert not [f for f in made.preflight().faults if f.check == "end"]


# --- reward models and RL ---------------------------------------------------------------------------------------------


def reward_trainer(folder: Path, method: str, dataset=None, **args) -> RewardTrainer:
    kind = USES[method][0]
    args |= {"objectives": ["a", "b"]} if method == "gated" else {}
    config = RewardConfig(
        str(folder / "out"), method=method, use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1,
        per_device_train_batch_size=4, seed=3, **args,
    )  # fmt: skip
    dataset = rows(kind) if dataset is None else dataset
    samples = [{"prompt": "w1 w2", "completions": [" w3", " w4 w5"]}] if method in READS_SAMPLES else None
    return RewardTrainer(model(), config, train_dataset=dataset, samples=samples, processing_class=tokenizer())


@pytest.mark.parametrize("method", USES)
def test_a_sound_reward_model_is_clean(tmp_path, method):
    report = reward_trainer(tmp_path, method).preflight()
    assert [f for f in report.findings if f.level != "ok"] == []
    assert {"loss", "end", "lengths", "head"} <= {f.check for f in report.findings}


def test_a_reward_models_faults_are_named_and_stop_it(tmp_path):
    made = reward_trainer(tmp_path, "bradley_terry", SWAPPED, preflight="stop")
    with pytest.raises(ValueError, match="score_chosen is below score_rejected in 100% of pairs"):
        made.train()
    made = reward_trainer(tmp_path, "bradley_terry")
    counts_rows(made)
    assert ["wrong denominator" in f.text for f in made.preflight().faults] == [True]
    made = reward_trainer(tmp_path, "bradley_terry")
    masks_pad(made)
    assert {f.check for f in made.preflight().faults} == {"mask", "end"}


def rl_trainer(folder: Path, reward, *, positions: int = 128, **args) -> RLTrainer:
    config = RLConfig(
        **{
            "output_dir": str(folder / "out"), "method": "grpo", "use_cpu": True, "disable_tqdm": True, "seed": 3,
            "save_strategy": "no", "per_device_train_batch_size": 8, "num_generations": 4, "max_new_tokens": 12,
            "max_steps": 2, "learning_rate": 1e-3, **args,
        }
    )  # fmt: skip
    prompts, policy, words_of = (
        [{"prompt": f"w{i} w{i + 1}"} for i in range(6)],
        model(max_position_embeddings=positions),
        tokenizer(),
    )
    return RLTrainer(policy, reward, config, train_dataset=prompts, processing_class=words_of)


def ids_of(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def test_the_first_rollout_is_checked_without_another_call(tmp_path):
    calls = []

    def counted(completion_ids, **_):
        calls.append(len(completion_ids))
        return ids_of(completion_ids)

    made = rl_trainer(tmp_path, counted)
    made.train()
    assert calls == [8, 8]  # two steps of two prompts
    found = {f.check: f for f in made.report.findings}
    assert {"prompts", "end", "head", "rollout", "rewards", "lengths", "log-probs"} <= found.keys()
    assert found["rewards"].level == found["log-probs"].level == "ok" and not made.report.faults


PLANTED_IN_RL = {
    "equal rewards": (lambda completion_ids, **_: [1.0] * len(completion_ids), {}, "doubt", "not told apart"),
    "equal in each group": (
        lambda prompts, **_: [float(ord(p[1])) for p in prompts], {}, "doubt", "have equal rewards among",
    ),
    "no rewards": (
        lambda completion_ids, **_: [None] * (len(completion_ids) - 2) + [0.0, 1.0], {}, "doubt", "have no reward",
    ),
    "too few tokens": (ids_of, {"max_new_tokens": 2}, "doubt", "are cut at max_new_tokens=2"),
    "no room": (ids_of, {"max_new_tokens": 16, "positions": 17}, "doubt", "leave less than max_new_tokens=16"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_IN_RL)
def test_a_fault_planted_in_rl_is_named(tmp_path, name):
    reward, args, level, words = PLANTED_IN_RL[name]
    made = rl_trainer(tmp_path, reward, max_steps=1, **args)
    made.train()
    assert any(words in f.text for f in made.report.of(level)), str(made.report)


def test_a_fault_of_the_first_rollout_stops_a_run_that_is_to_stop(tmp_path, monkeypatch):
    made = rl_trainer(tmp_path, ids_of, preflight="stop")
    right = rl.preflight.row_logps
    monkeypatch.setattr(rl.preflight, "row_logps", lambda *args, **how: right(*args, **how) - 0.5)
    with pytest.raises(ValueError, match="1 fault: log-probs: the log-probs of a batch are off by"):
        made.train()
    assert made.state.global_step == 0 and made.progress.rollouts == 0


def test_rl_is_the_same_bit_by_bit_with_and_without(tmp_path):
    weights = []
    for asked in ("warn", "off"):
        made = rl_trainer(tmp_path / asked, ids_of, preflight=asked)
        made.train()
        weights.append((made.model.state_dict(), torch.get_rng_state()))
    (a, drawn), (b, drawn_off) = weights
    assert all(torch.equal(a[name], b[name]) for name in a) and torch.equal(drawn, drawn_off)


# --- what it leaves alone, and when it runs ---------------------------------------------------------------------------


def run_of(folder: Path, preflight: str, method: str, **args) -> tuple[list, dict, tuple]:
    """The log, the weights and the random states after a training."""
    random.seed(5), np.random.seed(5)
    made = trainer(folder, method, preflight=preflight, **args)
    made.train()
    log = [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k} for entry in made.state.log_history
    ]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return log, made.model.state_dict(), (states, made.objective.state_dict())


@pytest.mark.parametrize(
    "method, args",
    [
        ("dpo", {}),
        ("dpo", {"peft_config": lora(lora_dropout=0.5)}),  # draws in every forward
        ("kto", {}),  # a reference point
        ("bco", {}),  # a state
        ("beta_dpo", {"method_args": {"keep": 0.5}}),  # a state, and draws
        ("cringe", {}),  # a generator of its own
        ("sft", {"given": {"model": model(attention_dropout=0.5)}}),
    ],
)
def test_training_is_the_same_bit_by_bit_with_and_without(tmp_path, method, args):
    args = {**args, "given": {"model": model(attention_dropout=0.5)}}
    (log, weights, states), (log_off, weights_off, states_off) = (
        run_of(tmp_path / asked, asked, method, **{**args, "given": {"model": model(attention_dropout=0.5)}})
        for asked in ("warn", "off")
    )
    assert log == log_off
    assert all(torch.equal(weights[name], weights_off[name]) for name in weights)
    assert states[0] == states_off[0]
    assert states[1].keys() == states_off[1].keys()
    assert all(torch.equal(x, states_off[1][name]) for name, x in states[1].items())


def test_warn_logs_each_finding_once_stop_raises_and_off_looks_at_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "xpo_fast"):
        made = trainer(tmp_path, dataset=SWAPPED)
        made.train()
        made.train()
        said = [r.getMessage() for r in caplog.records if "preflight" in r.getMessage()]
        assert said == [f"preflight, fault: {made.report.faults[0]}"]
        caplog.clear()
        stopped = trainer(tmp_path, dataset=SWAPPED, preflight="stop")
        with pytest.raises(ValueError, match="1 fault: numbers: score_chosen is below score_rejected in 100% of pairs"):
            stopped.train()
        assert stopped.state.global_step == 0
        caplog.clear()
        off = trainer(tmp_path, dataset=SWAPPED, preflight="off")
        off.train()
        assert off.report is None and not [r for r in caplog.records if "preflight" in r.getMessage()]
    with pytest.raises(ValueError, match="preflight must be one of off, warn, stop, got 'on'"):
        XPOConfig(str(tmp_path), use_cpu=True, preflight="on")
    assert trainer(tmp_path, dataset=rows()[:1] * 3, preflight="stop").train() is not None  # a doubt does not stop


def test_a_trained_policy_differs_from_its_reference_for_a_reason(tmp_path):
    made = trainer(tmp_path)
    made.train()
    notes = {f.check: f for f in made.preflight().findings if f.level != "ok"}
    assert list(notes) == ["reference"] and notes["reference"].level == "note"
    assert "the policy has been trained" in notes["reference"].text


def test_a_check_that_fails_is_a_note_and_the_run_goes_on(tmp_path):
    made = trainer(tmp_path)
    collate, calls = made.data_collator, []

    def sometimes(features):
        calls.append(len(features))
        if len(features) == 12:
            raise KeyError("twelve")
        return collate(features)

    made.prepare()
    made.data_collator = sometimes
    report = made.preflight()
    assert calls and {f.level for f in report.findings} == {"ok", "note"}
    assert any("could not be made: KeyError: 'twelve'" in f.text for f in report.findings)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_evaluate_is_the_methods_loss_of_these_log_probs():
    # Two pairs: log-ratios of chosen less rejected (2 − 1) and (−3 − 0.5), β = 0.1, in float64 by hand.
    targets = torch.tensor([[5, 7], [5, -100], [9, 9], [3, -100]])
    logps = torch.tensor([[-1.0, -2.0], [-6.0, 0.0], [-0.5, -0.5], [-1.5, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[-2.0, -3.0], [-3.0, 0.0], [-1.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
    loss = evaluate(xf.Objective("dpo", beta=0.1), targets, {}, logps, reference)
    want = sum(math.log(1 + math.exp(-0.1 * h)) for h in (2 - 1, -3 - 0.5)) / 2
    assert float(loss) == pytest.approx(want, abs=1e-12)
    sft = evaluate(
        xf.Objective("sft"), targets[:2].flatten(), {"cu_seqlens": torch.tensor([0, 2, 4, 4, 4])}, logps[:2], None
    )
    assert float(sft) == pytest.approx((1 + 2 + 6) / 3, abs=1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_known_losses_are_the_methods_own(name):
    targets, logps = torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), -1.0, dtype=torch.float64)
    objective = xf.Objective(name)
    number, _ = KNOWN[name](objective.hyperparameters)
    assert float(evaluate(objective, targets, {}, logps, logps)) == pytest.approx(number, rel=1e-9)
    assert name != "ipo" or number == pytest.approx((1 / (2 * 0.1)) ** 2)


def test_the_screen(tmp_path, monkeypatch):
    report = trainer(tmp_path, dataset=SWAPPED).preflight()
    report.seconds = 1.93
    lines = str(report).splitlines()
    assert lines[0].startswith("preflight  XPOTrainer, dpo on 12 pairs") and lines[0].endswith("1.9 s")
    assert sum(line.startswith("fault numbers: ") for line in lines) == 1
    assert "ok    reference: policy = reference: first loss 0.6931, expected ln 2 = 0.6931 (2 pairs)" in lines
    prompt, answer = SWAPPED[0]["prompt"], SWAPPED[0]["chosen"].strip()
    assert lines[-1] == f"row   rows[0], chosen: {prompt}⟦{answer} <eos>⟧"
    assert max(map(len, lines[:-1])) <= 110 and "" not in str(report)
    coloured = report.screen(colours=True)
    assert f"[90m{prompt}[0m[1m{answer} <eos>[0m" in coloured and "[31mfault" in coloured
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert report.screen() == str(report)
    monkeypatch.delenv("NO_COLOR")
    assert report.screen() == coloured


def test_a_long_row_keeps_its_ends():
    ids = [(5 + i % 60, i >= 300) for i in range(600)]
    whole = marked(ids, tokenizer())
    short = Report("t", [Finding("mask", "ok", "x")])
    short.row = Row("rows[0]", ids, tokenizer())
    text = short.row.text(colours=False)
    assert len(text) < 700 < len(whole)
    assert text.endswith(whole[-100:]) and text.startswith(" … ")
