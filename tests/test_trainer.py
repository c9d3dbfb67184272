"""The trainer: losses and gradients against one big batch, the reference strategies, checkpoints, evaluation.

The model is a random Llama of two layers in float32; equalities hold to float32 rounding of differently ordered sums.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import warnings
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import xpo_fast as xf
from ranks import run_world
from xpo_fast.data import KINDS
from xpo_fast.models import install_fused_loss, load_model, remove_fused_loss
from xpo_fast.models.lm_head import causal_lm
from xpo_fast.resume import last_checkpoint
from xpo_fast.trainer import XPOConfig, XPOTrainer, reference

# peft asks transformers under a name that transformers has deprecated.
PEFT_WARNING = ".is_gradient_checkpointing. is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

VOCAB = 97  # odd, and no multiple of anything
WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def make_tokenizer(pad: str | None = "<pad>", vocabulary: list[str] = WORDS) -> transformers.PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", *vocabulary])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>", pad_token=pad
    )


def make_model(seed: int = 0, **config) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**defaults, **config}))


def words(generator: torch.Generator, low: int, high: int) -> str:
    count = int(torch.randint(low, high, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


def make_rows(count: int, kind: str = "pair", seed: int = 0) -> list[dict]:
    if kind == "list":
        return rows_of(kind, count, seed)
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt = words(g, 2, 6)
        if kind != "unpaired":
            rows.append({"prompt": prompt, "chosen": " " + words(g, 1, 9), "rejected": " " + words(g, 1, 9)})
        else:
            rows.append({"prompt": prompt, "completion": " " + words(g, 1, 9), "label": i % 3 != 0})
    return rows


def make_trainer(
    tmp_path: Path, *, model=None, tokenizer=None, rows: int | list = 8, eval_rows=None, peft_config=None, **args
) -> XPOTrainer:
    kind = xf.Objective(args.get("method", "dpo")).data_kind
    defaults = {
        "output_dir": str(tmp_path / "out"), "ref_cache_dir": str(tmp_path / "ref"), "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 1, "seed": 3, "max_grad_norm": 0.0,
    }  # fmt: skip
    return XPOTrainer(
        make_model() if model is None else model,
        XPOConfig(**{**defaults, **args}),
        train_dataset=make_rows(rows, kind) if isinstance(rows, int) else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer or make_tokenizer(),
        peft_config=peft_config,
    )


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


class Gradients(transformers.TrainerCallback):
    """Keeps the gradient of every parameter at the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_step(trainer: XPOTrainer, *, shrink: float = 1.0) -> tuple[dict, dict[str, torch.Tensor]]:
    """The first log and the gradients of the first optimizer step.

    shrink: what the weights are multiplied by before, so that policy and reference differ.
    """
    trainer.prepare()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p *= shrink
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer.state.log_history[0], gradients.found


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    assert a.keys() == b.keys() and a
    norm = math.sqrt(sum(float(x.norm()) ** 2 for x in a.values()))
    difference = math.sqrt(sum(float((a[name] - b[name]).norm()) ** 2 for name in a))
    assert norm > 0 and difference <= rtol * norm


# --- denominators: micro-batches and ranks ------------------------------------------------------------------------

SHRINK = 0.9  # makes every row likelier than under the reference: KTO's KL is not clamped to 0
ROWS = 10  # no multiple of the micro-batch: the last one is ragged
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
OF_THE_CUT = {"tokens_per_second", "tokens_saved"}  # of a log: what depends on how a step is cut


def one_batch(tmp_path: Path, method: str, **args) -> tuple[dict, dict[str, torch.Tensor]]:
    trainer = make_trainer(tmp_path, method=method, rows=ROWS, per_device_train_batch_size=ROWS, **SEQUENTIAL, **args)
    return first_step(trainer, shrink=SHRINK)


@pytest.mark.parametrize("method", ["dpo", "sft", "kto"])  # units pairs, tokens, rows with a batch statistic
@pytest.mark.parametrize("batch, accumulation", [(5, 2), (4, 3), (1, 10)])
def test_accumulation_equals_one_big_batch(tmp_path, method, batch, accumulation):
    want_log, want = one_batch(tmp_path / "one", method)
    trainer = make_trainer(
        tmp_path / "cut", method=method, rows=ROWS, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, **SEQUENTIAL,
    )  # fmt: skip
    got_log, got = first_step(trainer, shrink=SHRINK)
    assert method != "kto" or want_log["kl"] > 0.1
    assert_same_gradients(want, got)
    for name in want_log.keys() - OF_THE_CUT:
        assert got_log[name] == pytest.approx(want_log[name], rel=1e-5, abs=1e-6), name


def with_images() -> transformers.PreTrainedModel:
    """A model with a vision tower, which no text reaches."""
    torch.manual_seed(0)
    text = make_model().config.to_dict() | {"head_dim": 8, "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = ("image_token_index", "boi_token_index", "eoi_token_index")
    special = {name: VOCAB - 1 - i for i, name in enumerate(names)}
    config = transformers.Gemma3Config(
        text_config={k: v for k, v in text.items() if k not in ("architectures", "rope_parameters")},
        vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4, **special,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def images_step(folder: Path, **args) -> tuple[dict, dict[str, torch.Tensor]]:
    """The first of two steps of it with activation checkpointing, where transformers has DDP wait for every weight."""
    named = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in named else "gradient_checkpointing"
    args |= {checkpointing: True, "max_steps": 2, "method": "simpo"}
    return first_step(make_trainer(folder, model=with_images(), **args, **SEQUENTIAL))


ON_TWO_RANKS = ("dpo", "sft", "kto", "bco", "lipo", "dpo + 0.5*sft")


def _on_two_ranks(folder: Path, rank: int) -> dict:
    """One step of every method: log, gradients and evaluation."""
    warnings.filterwarnings("ignore", PEFT_WARNING, FutureWarning)
    results = {}
    for method in ON_TWO_RANKS:
        kind = xf.Objective(method).data_kind
        # What bco remembers moves with every micro-batch.
        cut = (5, 1) if method == "bco" else (3, 2)
        trainer = make_trainer(
            folder / method, method=method, rows=ROWS, per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1], eval_rows=make_rows(7, kind, seed=5), per_device_eval_batch_size=2,
            ddp_backend="gloo", layout="padded", **SEQUENTIAL,
        )  # fmt: skip
        log, gradients = first_step(trainer, shrink=SHRINK)
        results[method] = (log, gradients, trainer.evaluate())
        if method != "bco":
            shared = make_trainer(
                folder / f"{method}-shared", method=method, rows=ROWS, per_device_train_batch_size=cut[0],
                gradient_accumulation_steps=cut[1], ddp_backend="gloo", layout="shared", **SEQUENTIAL,
            )  # fmt: skip
            results[f"{method}, shared"] = first_step(shared, shrink=SHRINK)
    adapted = make_trainer(
        folder / "lora", rows=4, per_device_train_batch_size=2, peft_config=lora(), ddp_backend="gloo"
    )
    images = images_step(folder / "images", per_device_train_batch_size=2, ddp_backend="gloo")
    return results | {"lora": first_step(adapted), "images": images}


def test_two_processes_equal_one(tmp_path):
    # 10 rows in micro-batches of 3 on two ranks: the last are filled up with repeated rows, which must not count.
    results = run_world(tmp_path / "two", 2, partial(_on_two_ranks, tmp_path))[0]
    for method in ON_TWO_RANKS:
        kind = xf.Objective(method).data_kind
        got_eval = results[method][2]
        trainer = make_trainer(
            tmp_path / f"{method}-alone", method=method, rows=ROWS, per_device_train_batch_size=ROWS,
            eval_rows=make_rows(7, kind, seed=5), layout="padded", **SEQUENTIAL,
        )  # fmt: skip
        want_log, want = first_step(trainer, shrink=SHRINK)
        # Weights after a step are not compared between layouts: Adam makes a step of the rounding of a gradient of 0.
        for run, rtol in ((method, 1e-6), *([(f"{method}, shared", 1e-5)] if method != "bco" else [])):
            got_log, got = results[run][:2]
            assert_same_gradients(want, {name.removeprefix("module."): g for name, g in got.items()}, rtol)
            for name in want_log.keys() - OF_THE_CUT:
                assert got_log[name] == pytest.approx(want_log[name], rel=1e-5, abs=1e-6), name
        for name, value in trainer.evaluate().items():
            if not name.endswith(("_time", "_second", "_runtime")):
                assert got_eval[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    _, want = images_step(tmp_path / "images-alone", per_device_train_batch_size=4)
    assert not any("vision" in name for name in want)
    assert_same_gradients(want, {name.removeprefix("module."): g for name, g in results["images"][1].items()})
    log, gradients = results["lora"]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert any(float(g.norm()) > 0 for g in gradients.values())


# --- the loss inside the forward ----------------------------------------------------------------------------------


def test_fused_loss_sees_the_hidden_states_and_head_and_can_be_removed():
    model = make_model()
    ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    before, generated = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    install_fused_loss(model)
    install_fused_loss(model)  # twice is once
    hidden, head = model(input_ids=ids, fused_loss=lambda hidden, head: (hidden, head))
    torch.testing.assert_close(hidden @ head.weight.T, before)
    assert head.weight is model.lm_head.weight
    torch.testing.assert_close(model(ids).logits, before)
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False), generated
    )
    remove_fused_loss(model)
    assert "forward" not in vars(model)
    torch.testing.assert_close(model(ids).logits, before)


def test_a_copy_of_a_model_with_a_fused_loss_runs_its_own_weights():
    # A frozen reference that secretly ran the policy's weights would keep DPO at ln 2 for ever.
    model = make_model()
    install_fused_loss(model)
    frozen = copy.deepcopy(model)
    ids = torch.arange(6)[None]
    hidden = frozen(input_ids=ids, fused_loss=lambda hidden, head: hidden)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    torch.testing.assert_close(frozen(input_ids=ids, fused_loss=lambda hidden, head: hidden), hidden)


class Odd(transformers.LlamaForCausalLM):
    """A model that does to its logits what no config tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


def test_a_model_with_an_unknown_head_is_refused(tmp_path):
    model = Odd(make_model().config)
    with pytest.raises(ValueError, match=r"Odd does more to its logits .* differ from the model's own by"):
        make_trainer(tmp_path, model=model).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap_and_scale_of_a_model_are_applied(tmp_path, dtype):
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # logits that the cap bends; the check would refuse a head without it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the learning rate in bfloat16
        log, _ = first_step(make_trainer(tmp_path, model=model))
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)


# --- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, adapted",
    [("adapter", True), ("copy", True), ("cached", True), ("auto", True), ("copy", False), ("cached", False)],
)
def test_every_reference_starts_dpo_at_ln_2_and_stays_where_it_was(tmp_path, strategy, adapted):
    # Dropout, which a reference must not have; the adapter's only acts from the second step on, as B starts at 0.
    peft_config = lora(lora_dropout=0.5) if adapted else None
    trainer = make_trainer(tmp_path, reference=strategy, peft_config=peft_config, max_steps=6, learning_rate=3e-2)
    before = trainer.completion_logps(trainer.train_dataset)[..., 0]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[-1]["loss"] < 0.5
    after = trainer.completion_logps(trainer.train_dataset)[..., 0]
    trainer.model.eval()
    metrics = trainer.evaluate(make_rows(8))
    want = 0.1 * (after - before).mean(dim=0)
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(want[0]), abs=1e-5)
    assert metrics["eval_rewards/rejected"] == pytest.approx(float(want[1]), abs=1e-5)


def scored_rows(monkeypatch) -> list[int]:
    """The number of rows of each batch that a reference is computed for from now on."""
    calls: list[int] = []

    def spy(model, batch, kind, **kwargs):
        calls.append(len(batch["input_ids"]))
        return reference_batch_logps(model, batch, kind, **kwargs)

    reference_batch_logps = reference.batch_logps
    monkeypatch.setattr(reference, "batch_logps", spy)
    return calls


@pytest.mark.parametrize(
    "change, again",
    [
        ({}, False),
        ({"method": "ipo", "learning_rate": 1.0, "seed": 9}, False),  # nothing a reference depends on
        ({"max_length": 7}, True),
        ({"model_seed": 1}, True),
        ({"model_config": {"rms_norm_eps": 1e-3}}, True),  # the same weights in another architecture
        ({"rows": 9}, True),
        ({"tokenizer": make_tokenizer(vocabulary=WORDS[::-1])}, True),
        ({"bf16": True}, True),
    ],
)
def test_cached_log_probs_are_used_again_only_when_nothing_changed(tmp_path, monkeypatch, change, again):
    first = make_trainer(tmp_path, reference="cached")
    first.prepare()
    change = dict(change)
    model = make_model(change.pop("model_seed", 0), **change.pop("model_config", {}))
    calls = scored_rows(monkeypatch)
    second = make_trainer(tmp_path, model=model, reference="cached", **change)
    second.prepare()
    assert bool(calls) == again
    if not again:
        assert second.train_dataset["ref_logp_chosen"] == first.train_dataset["ref_logp_chosen"]


def test_one_changed_weight_is_another_reference():
    model = make_model()
    before = reference.weights_fingerprint(model)
    assert reference.weights_fingerprint(make_model()) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-7
    assert reference.weights_fingerprint(model) != before


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "SHARD_ROWS", 3)
    calls = scored_rows(monkeypatch)
    scored = reference.batch_logps

    def dies(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(*args, **kwargs)

    monkeypatch.setattr(reference, "batch_logps", dies)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, reference="cached").prepare()
    monkeypatch.setattr(reference, "batch_logps", scored)
    calls.clear()
    make_trainer(tmp_path, reference="cached").prepare()
    assert sum(calls) == 2 * (8 - 6)  # two of three shards were there


def test_a_damaged_cache_file_is_computed_again(tmp_path, monkeypatch):
    first = make_trainer(tmp_path, reference="cached")
    first.prepare()
    (path,) = (tmp_path / "ref").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="cannot be read .* computed again"):
        second = make_trainer(tmp_path, reference="cached")
        second.prepare()
    assert second.train_dataset["ref_logp_chosen"] == first.train_dataset["ref_logp_chosen"]


def test_a_reference_for_new_rows_cannot_come_from_a_trained_model(tmp_path):
    trainer = make_trainer(tmp_path, reference="cached")
    trainer.train()
    with pytest.raises(ValueError, match=r"has been trained since .* eval_dataset before training"):
        trainer.evaluate(make_rows(4, seed=8))


@pytest.mark.parametrize(
    "method, strategy, message",
    [
        ("dpo", "none", "compares the policy with a reference"),
        ("simpo", "copy", "simpo has no reference policy"),
        ("dpo", "adapter", "train with a peft_config"),
        ("dpo", "adaptor", "one of auto, copy, adapter, cached, none, got 'adaptor'"),
    ],
)
def test_references_that_cannot_serve_are_refused(tmp_path, method, strategy, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, method=method, reference=strategy)


# --- evaluation, checkpoints, data --------------------------------------------------------------------------------


REMEMBER = [n for n, m in xf.METHODS.items() if m.state or {"kl", "pos_score"} & set(m.inputs)]


@pytest.mark.parametrize("method", [*REMEMBER, "dpo"])
def test_evaluation_leaves_training_alone(tmp_path, method):
    """To the bit: what a method remembers and draws, dropout, and the order of the rows; trl#1379's kind."""
    options = {"seed": 5} if method == "cringe" else {}
    kind, found = xf.Objective(method).data_kind, []
    for steps in (0, 1):
        trainer = make_trainer(
            tmp_path, method=method, method_args=options, rows=9, max_steps=4, per_device_train_batch_size=3,
            model=make_model(attention_dropout=0.2), eval_rows=make_rows(7, kind, seed=5),
            eval_strategy="steps" if steps else "no", eval_steps=1,
        )  # fmt: skip
        trainer.train()
        state = trainer.objective.state_dict()
        found.append((trainer.model.state_dict(), state, trainer.evaluate()["eval_loss"], trainer.evaluate()))
    (a, state_a, loss_a, again_a), (b, state_b, loss_b, _) = found
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert state_a.keys() == state_b.keys() and all(torch.equal(state_a[name], state_b[name]) for name in state_a)
    assert loss_a == loss_b == again_a["eval_loss"]


@pytest.mark.parametrize("method", ["dpo", "sft", "kto"])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, method):
    kind = "unpaired" if method == "kto" else "pair"
    found = []
    for size in (7, 3, 1):  # 3: the last batch holds one row
        trainer = make_trainer(
            tmp_path / str(size), method=method, eval_rows={"a": make_rows(7, kind, seed=5)}, max_steps=3,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        trainer.train()
        found.append({k: v for k, v in trainer.evaluate().items() if "loss" in k or "/" in k or k.endswith("kl")})
    assert {"dpo": "eval_a_rewards/accuracies", "sft": "eval_a_loss", "kto": "eval_a_kl"}[method] in found[0]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_metrics_are_those_of_materialised_logits(tmp_path):
    trainer = make_trainer(tmp_path, method="simpo", rows=5, per_device_train_batch_size=5)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    scored = batch["targets"] != -100
    logp = logits.log_softmax(-1).gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    sums = (logp * scored).sum(1)
    mean_w, mean_l = (sums / scored.sum(1)).chunk(2)
    log, _ = first_step(trainer)
    want = -torch.nn.functional.logsigmoid(2 * (mean_w - mean_l) - 1).mean()
    assert log["loss"] == pytest.approx(float(want), rel=1e-5)
    assert log["logps/chosen"] == pytest.approx(float(sums[:5].mean()), rel=1e-5)
    assert log["rewards/accuracies"] == pytest.approx(float((mean_w > mean_l).float().mean()))


@pytest.mark.parametrize("adapted", [False, True])
def test_resuming_gives_the_run_that_was_not_interrupted(tmp_path, adapted):
    def run(name: str, **args) -> XPOTrainer:
        return make_trainer(
            tmp_path / name, rows=12, save_strategy="steps", save_steps=3, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, lr_scheduler_type="linear", num_train_epochs=2, max_steps=-1,
            peft_config=lora() if adapted else None, **args,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    assert whole.state.global_step == 6
    part = run("part")
    part.add_callback(StopAt(3))
    part.train()
    resumed = run("part")
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_saved_adapter_is_loaded_and_merged(tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    trainer = make_trainer(tmp_path, model=load_model(str(base))[0], peft_config=lora(), max_steps=4)
    trainer.train()
    trainer.save_model()
    ids = torch.arange(9)[None]
    merged, tokenizer = load_model(str(tmp_path / "out"))
    want = trainer.model.eval()(ids).logits
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
@pytest.mark.parametrize("adapted", [False, True])
def test_checkpointing_and_mixed_precision_train_the_same_loss(tmp_path, options, adapted):
    rounding = 2e-2 if "bf16" in options else 1e-5
    peft_config = lora(init_lora_weights=False) if adapted else None
    want_log, want = first_step(make_trainer(tmp_path / "plain", method="simpo", peft_config=peft_config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers has renamed gradient_checkpointing
        trainer = make_trainer(tmp_path / "other", method="simpo", peft_config=peft_config, **options)
    got_log, got = first_step(trainer)
    assert got_log["loss"] == pytest.approx(want_log["loss"], rel=rounding)
    assert got.keys() == want.keys()
    if "bf16" not in options:
        assert_same_gradients(want, got, rtol=1e-5)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_eos_is_learned_although_it_is_the_pad_token(tmp_path, pad):
    tokenizer = make_tokenizer(pad)
    trainer = XPOTrainer(
        make_model(), XPOConfig(output_dir=str(tmp_path), use_cpu=True, method="sft"),
        train_dataset=make_rows(4), processing_class=tokenizer,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert ((batch["targets"] == tokenizer.eos_token_id).sum(dim=1) == 1).all()


def test_rows_that_are_encoded_already_are_taken_as_they_are(tmp_path):
    raw = make_trainer(tmp_path)
    encoded = XPOTrainer(
        make_model(), XPOConfig(output_dir=str(tmp_path), use_cpu=True, ref_cache_dir=str(tmp_path / "ref")),
        train_dataset=raw.train_dataset, processing_class=make_tokenizer(),
    )  # fmt: skip
    assert encoded.train_dataset.to_dict() == raw.train_dataset.to_dict()


def test_kto_keeps_its_estimate_for_a_single_row_at_the_end_of_an_epoch(tmp_path):
    trainer = make_trainer(tmp_path, method="kto", rows=5, per_device_train_batch_size=4, max_steps=2, **SEQUENTIAL)
    trainer.prepare()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p *= SHRINK
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert len(kl) == 2 and kl[0] == kl[1] > 0


def test_rows_of_like_length_share_a_batch(tmp_path):
    def spread(strategy: str) -> int:
        """Σ over batches of longest minus shortest row, in tokens."""
        trainer = make_trainer(tmp_path, method="simpo", rows=64, train_sampling_strategy=strategy)
        sizes = (batch["attention_mask"].sum(1).chunk(2) for batch in trainer.get_train_dataloader())
        return sum(int((a + b).max() - (a + b).min()) for a, b in sizes)

    assert spread("group_by_length") < 0.5 * spread("random")


# --- what is refused ----------------------------------------------------------------------------------------------


def test_an_adapter_on_the_lm_head_is_trained_and_is_not_the_references(tmp_path):
    config = lora(target_modules=["q_proj", "lm_head"])
    model = make_model(tie_word_embeddings=False)
    trainer = make_trainer(tmp_path, model=model, peft_config=config, max_steps=6, logging_steps=1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] != pytest.approx(losses[0], abs=1e-4)
    b = [x for n, x in trainer.model.named_parameters() if "lm_head.lora_B" in n]
    assert b and all(x.abs().max() > 0 for x in b)


def test_a_trained_copy_of_the_lm_head_is_used_and_its_original_is_the_reference(tmp_path):
    config = lora(modules_to_save=["lm_head"])
    trainer = make_trainer(
        tmp_path, model=make_model(tie_word_embeddings=False), peft_config=config, max_steps=6, learning_rate=3e-2
    )
    original = causal_lm(trainer.model).lm_head.original_module.weight.clone()
    trainer.train()
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logs[0] == pytest.approx(math.log(2), abs=1e-6) and logs[-1] < 0.5
    head = causal_lm(trainer.model).lm_head
    assert torch.equal(head.original_module.weight, original)
    assert not torch.equal(head.modules_to_save["default"].weight, original)


def test_prompt_tuning_and_second_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adds positions of its own"):
        make_trainer(tmp_path, peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="carries an adapter already"):
        make_trainer(tmp_path, model=peft.get_peft_model(make_model(), lora()), peft_config=lora())


def test_options_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        XPOConfig(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=True)
    with pytest.raises(ValueError, match="tile_mib must be positive or None, got -1"):
        XPOConfig(output_dir=str(tmp_path), use_cpu=True, tile_mib=-1)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        XPOTrainer(make_model(), XPOConfig(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="dpo has no hyperparameter gamma; it has beta, label_smoothing"):
        make_trainer(tmp_path, method_args={"gamma": 1.0})
    with pytest.raises(ValueError, match="expected a decoder-only causal LM"):
        install_fused_loss(torch.nn.Linear(2, 2))


def test_low_precision_weights_with_a_learning_rate_too_small_for_them_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="most updates round to nothing"):
        make_trainer(tmp_path, model=make_model().to(torch.bfloat16), learning_rate=1e-6)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere': no such folder; expected 'smollm2-135m', a folder"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"cannot load a model from .*: expected 'smollm2-135m', a folder"):
        make_model().config.save_pretrained(tmp_path)
        load_model(str(tmp_path))


# --- other data than pairs and thumbs ---

PAIR_NUMBERS = {**dict.fromkeys(KINDS["pair"].numbers, 0.8), "score_chosen": 2.0, "score_rejected": -0.5}


def rows_of(kind: str, count: int = 8, seed: int = 0) -> list[dict]:
    """Rows with all that a method may want beside the completions; ragged lists of two to four."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt, size = words(g, 2, 6), 2 + i % 3
        texts = [" " + words(g, 1, 9) for _ in range(size)]
        if kind == "list":
            scores = [float(k * (-1) ** k) for k in range(size)]
            rows.append({"prompt": prompt, "completions": texts, "scores": scores, "rejected": " " + words(g, 1, 5)})
        elif kind == "unpaired":
            rows.append({"prompt": prompt, "completion": texts[0], "label": i % 3 != 0, "reward": i / 4 - 1})
        else:
            rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1], **PAIR_NUMBERS})
    return rows


def trained_methods() -> list[str]:
    """Every method that a data set can teach."""
    names = []
    for name, method in xf.METHODS.items():
        of_a_data_set = method.layout not in ("policy", "reward") and not {"reward_w", "topk_kl_w"} & {*method.inputs}
        names += [name] if of_a_data_set and not method.reads_teacher else []
    return sorted(names)


@pytest.mark.parametrize("name", trained_methods())
def test_every_method_trains_on_its_data(tmp_path, name):
    """Five steps on the rows that are evaluated lower the loss: through data, reference and objective."""
    adapted = trained_methods().index(name) % 2 == 0
    settings = {"beta_dpo": {"keep": 1.0}, "cringe": {"top_k": 1}}.get(name, {})
    rate = 3e-4 if name == "dro" else 3e-3  # a squared loss of nats, easily overshot
    kind = xf.Objective(name, **settings).data_kind
    rows = rows_of(kind)
    trainer = XPOTrainer(
        make_model(),
        XPOConfig(
            str(tmp_path / "out"), method=name, method_args=settings, ref_cache_dir=str(tmp_path / "ref"), use_cpu=True,
            disable_tqdm=True, save_strategy="no", per_device_train_batch_size=8, learning_rate=rate,
            lr_scheduler_type="constant", max_steps=5, seed=3, logging_strategy="no",
            context="w5 w6 " if xf.METHODS[name].reads_context else None,
        ),
        train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer(),
        peft_config=lora(r=8, lora_alpha=32) if adapted else None,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert math.isfinite(after) and after < before


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("dpo + 0.5*sft", {}),
        ("lipo", {}),
        ("odpo", {"pairs": "all"}),
        ("nn", {}),
        ("dro", {}),
        ("npo", {}),
        ("tdpo", {}),
        ("dpo", {"ld_alpha": 0.3}),
        ("simpo", {"wpo": True}),
    ],
    ids=str,
)
def test_micro_batches_of_other_data_equal_one_big_batch(tmp_path, method, args):
    """Loss and gradients of a step do not depend on how it is cut: other list lengths, two denominators, dead rows."""
    found = []
    for batch, accumulation in ((6, 1), (2, 3), (4, 2)):
        tokenizer = make_tokenizer()
        kind = xf.Objective(method, **args).data_kind
        trainer = make_trainer(
            tmp_path / f"{batch}", tokenizer=tokenizer, rows=2, method="dpo", per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        config = trainer.args
        config.method, config.method_args = method, args
        trainer = XPOTrainer(make_model(), config, train_dataset=rows_of(kind, 6), processing_class=tokenizer)
        log, gradients = first_step(trainer, shrink=0.9)
        found.append((log["loss"], gradients))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - found[0][1][name]).norm() <= 1e-5 * found[0][1][name].norm()


def test_what_the_objective_remembers_is_in_the_checkpoints(tmp_path):
    """Three steps and three more after a restart are six: the running mean goes on where it was."""
    rows = rows_of("unpaired")
    common = {"method": "bco", "rows": 8, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 3}

    def trainer(folder, steps):
        return make_trainer(tmp_path / folder, max_steps=steps, **common)

    whole = trainer("a", 6)
    whole.train()
    first = trainer("b", 6)
    first.add_callback(StopAfter(3))
    first.train()
    second = trainer("b", 6)
    second.train(resume_from_checkpoint=True)
    assert len(rows) == 8 and whole.objective.state["delta_count"] == second.objective.state["delta_count"] > 12
    torch.testing.assert_close(second.objective.state, whole.objective.state, rtol=0, atol=0)


class StopAfter(transformers.TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize(
    ("method", "args", "rows", "message"),
    [
        ("odpo", {}, "pair", "missing score_w, score_l.*data set has.*score_chosen"),
        ("sppo", {}, "pair", "prob_w.*rows may have.*prob"),
        ("dro", {}, "unpaired", "missing reward.*rows may have.*reward"),
        ("grpo", {}, "pair", "sampled and scored while it trains"),
        ("haf", {}, "pair", "reward_w"),
        ("dpo", {"pairs": "all"}, "list", "scores"),
        ("nn", {}, "list", "missing rejected"),
    ],
)
def test_data_without_what_a_method_needs_is_refused(tmp_path, method, args, rows, message):
    withheld = (*PAIR_NUMBERS, "reward", "rejected" if method == "nn" else "scores")
    bare = [{k: v for k, v in row.items() if k not in withheld} for row in rows_of(rows)]
    with pytest.raises(ValueError, match=message):
        XPOTrainer(
            make_model(), XPOConfig(str(tmp_path), method=method, method_args=args, use_cpu=True),
            train_dataset=bare, processing_class=make_tokenizer(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "args", "change", "message"),
    [
        ("odpo", {}, {"score_chosen": -0.5}, r"rows\[3\].*score_w > score_l.*drop the pair or swap"),
        ("lipo", {"kind": "point_sigmoid"}, {"scores": [0.5, 2.0, 0.1]}, r"rows\[3\].*\[0, 1\]"),
    ],
)
def test_a_number_that_a_method_refuses_is_named_by_its_row(tmp_path, method, args, change, message):
    rows = rows_of(xf.Objective(method, **args).data_kind)
    for row in rows:
        row.update({"scores": [0.5] * len(row["completions"])} if "scores" in row else {})
    rows[3].update({k: v[: len(rows[3]["completions"])] if k == "scores" else v for k, v in change.items()})
    with pytest.raises(ValueError, match=message):
        XPOTrainer(
            make_model(), XPOConfig(str(tmp_path), method=method, method_args=args, use_cpu=True),
            train_dataset=rows, processing_class=make_tokenizer(),
        )  # fmt: skip


def test_a_reference_looked_at_token_by_token_is_a_copy(tmp_path):
    chosen, why = reference.choose("auto", xf.Objective("tdpo"), make_model())
    assert chosen == "copy" and "token by token" in why
    with pytest.raises(ValueError, match=r"token by token.*cached"):
        reference.choose("cached", xf.Objective("dpo", ld_alpha=0.5), make_model())


def test_cached_log_probs_of_lists_are_those_of_a_copy(tmp_path):
    found = []
    for strategy in ("cached", "cached", "copy"):
        trainer = XPOTrainer(
            make_model(), XPOConfig(
                str(tmp_path), method="lipo", reference=strategy, ref_cache_dir=str(tmp_path / "ref"), use_cpu=True,
                per_device_eval_batch_size=3, disable_tqdm=True,
            ),
            eval_dataset=rows_of("list"), processing_class=make_tokenizer(),
        )  # fmt: skip
        with torch.no_grad():
            trainer.prepare()
            for p in trainer.model.parameters():
                p *= 0.9
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_rewards/margins"):
        assert found[0][name] == found[1][name] == pytest.approx(found[2][name], abs=1e-5) != 0


def test_the_adapter_begins_by_the_seed(tmp_path):
    """Whatever was drawn before: the same seed, the same adapter."""

    def begun(seed: int) -> list[torch.Tensor]:
        model = make_model()
        torch.seed()
        trainer = make_trainer(tmp_path, model=model, peft_config=lora(), seed=seed)
        return [x.detach().clone() for name, x in trainer.model.named_parameters() if "lora_A" in name]

    first, again, other = begun(3), begun(3), begun(4)
    assert first
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])


# --- mistakes that are known before the first step ----------------------------------------------------------------


def test_a_model_of_which_nothing_would_learn_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model().requires_grad_(False))  # which may score rows
    with pytest.raises(ValueError, match=r"nothing would be trained: each of the model's .* is frozen"):
        trainer.train()


def test_ids_without_an_embedding_are_refused_and_embeddings_without_a_token_are_not(tmp_path):
    with pytest.raises(ValueError, match=r"rows\[0\]: token id \d+ .* the model has 20 embeddings, for ids 0 to 19"):
        trainer = make_trainer(tmp_path)
        encoded = trainer.train_dataset
        XPOTrainer(make_model(vocab_size=20), trainer.args, train_dataset=encoded, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match=r"the padding token: token id 97 .* 97 embeddings"):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<filler>"})
        make_trainer(tmp_path, tokenizer=tokenizer)
    make_trainer(tmp_path, model=make_model(vocab_size=128))


def test_a_reporter_that_is_not_installed_or_not_there_is_known_with_the_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_mlflow_available", lambda: False)
    for name, said in (
        ("mlflow", "the reporter mlflow is not installed: pip install mlflow"),
        (["wandd"], "no reporter named 'wandd'; did you mean wandb?"),
    ):
        with pytest.raises(ValueError, match=said):
            XPOConfig(str(tmp_path), report_to=name, use_cpu=True)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, peft_config=lora(), **options).train()
    other = make_trainer(tmp_path, peft_config=lora(r=2), **options, max_steps=2)
    with pytest.raises(ValueError, match=r'is of another run, where adapter was .*"r": 4.* and is .*"r": 2'):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **options).train()
    for name, value in (("optim", "sgd"), ("adam_beta2", 0.9), ("adam_epsilon", 1e-6)):
        with pytest.raises(ValueError, match=f"{name} was .* and is {value}"):
            make_trainer(tmp_path, **options, max_steps=2, **{name: value}).train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-1" / "made_with.json").unlink()
    other = make_trainer(tmp_path, **options, max_steps=2, optim="sgd", optim_args="momentum=0.5")
    with pytest.raises(ValueError, match=r"cannot go on from .*checkpoint-1: .*\(its optimizer has no "):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_tells_its_run(tmp_path):
    trainer = make_trainer(tmp_path, method="bco", save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-1"
    assert not (folder / "optimizer.pt").exists()
    torch.testing.assert_close(torch.load(folder / "objective.pt"), trainer.objective.state_dict())
    other = make_trainer(tmp_path, method="bco", max_steps=2, seed=4)
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        other.train(resume_from_checkpoint=True)


def test_a_model_saved_over_one_of_another_form_is_the_one_that_is_loaded(tmp_path):
    out, base = tmp_path / "out", tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    out.mkdir()
    for name in ("adapter_notes.txt", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (out / name).write_text("{}")

    def save(**options):
        model, _ = load_model(str(base))
        make_trainer(tmp_path, model=model, **options).save_model()
        return {path.name for path in out.iterdir()}

    adapter, weights = {"adapter_config.json", "adapter_model.safetensors"}, {"model.safetensors"}
    assert (names := save(peft_config=lora())) >= adapter and not any(n.startswith("model") for n in names)
    assert (names := save()) >= weights and not names & adapter
    load_model(str(out))
    assert (names := save(peft_config=lora())) >= adapter and not names & weights
    assert "adapter_notes.txt" in names and not any(n.startswith(".") for n in names)
    model, _ = load_model(str(base))
    make_trainer(tmp_path, model=model, peft_config=lora()).save_model(str(base))
    assert (base / "model.safetensors").is_file()  # what the adapter is for


@pytest.mark.parametrize("fails", range(1, 9))
def test_a_model_that_cannot_be_saved_leaves_the_one_before_it(tmp_path, monkeypatch, fails):
    make_trainer(tmp_path, model=make_model(seed=1), peft_config=lora()).save_model()
    out, trainer = tmp_path / "out", make_trainer(tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    moved, replace = 0, os.replace

    def failing(source, target):
        nonlocal moved
        moved += 1
        if moved == fails:
            raise OSError("the disk is gone")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.save_model()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    replace(out, tmp_path / "killed")  # half way: what was moved aside is put back first
    shutil.copytree(tmp_path / "killed", out / ".model.before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        moved = fails - 1 - len(before)
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.save_model()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_whole_checkpoint_stays_whatever_fails_behind_it(tmp_path, monkeypatch, error):
    def failing(**_):
        raise error("behind it")

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", failing)
    with pytest.raises(error):
        make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")


def test_the_only_whole_copy_of_a_checkpoint_is_not_deleted(tmp_path, monkeypatch):
    """A run that was killed while it wrote a checkpoint anew has left half of it, and the whole one aside."""
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **options).train()
    folder = tmp_path / "out" / "checkpoint-1"
    folder.rename(folder.with_name(".checkpoint-1.before"))
    folder.mkdir()
    (folder / "config.json").write_text("half")

    def failing(*_):
        raise OSError("no space left")

    monkeypatch.setattr(transformers.TrainerState, "save_to_json", failing)
    with pytest.raises(OSError, match="no space left"):
        make_trainer(tmp_path, **options).train()
    assert last_checkpoint(tmp_path / "out") == str(folder) and (folder / "optimizer.pt").is_file()
    assert not list((tmp_path / "out").glob(".*"))
