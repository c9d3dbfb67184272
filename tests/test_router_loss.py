"""The auxiliary loss of a mixture of experts' router: TRL's losses over 20 steps, gradients by hand, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import test_rl
import test_trainer
from test_trainer import PEFT_WARNING, make_rows, make_tokenizer
from xpo_fast import data
from xpo_fast.layouts import Inputs
from xpo_fast.models import install_fused_loss, own_logits
from xpo_fast.rewards.trainer import RewardConfig, RewardTrainer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"),
]
ROOT = Path(__file__).resolve().parent.parent
STEPS, TOLERANCE = 20, 1e-4
SIZES = {
    "vocab_size": test_trainer.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 2,
    "bos_token_id": None, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip


def qwen(seed: int = 0, *, flag: bool = True, **config):
    torch.manual_seed(seed)
    own = {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 24, "router_aux_loss_coef": 0.5}
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**{**SIZES, **own, "output_router_logits": flag, **config})
    )


def gpt_oss(seed: int = 0, *, flag: bool = True, **config):
    torch.manual_seed(seed)
    own = {"num_local_experts": 4, "intermediate_size": 24, "sliding_window": 6, "router_aux_loss_coef": 0.5}
    made = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**{**SIZES, **own, "output_router_logits": flag, **config})
    )
    made.set_attn_implementation("eager")
    return made


MODELS = {"qwen3_moe": qwen, "gpt_oss": gpt_oss}


def aux_of(model, batch) -> torch.Tensor:
    """transformers' own auxiliary loss of padded rows."""
    rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**rows, output_router_logits=True).aux_loss


def watched(made) -> list[dict]:
    """The micro-batches of a trainer in training, as they come."""
    seen, inner = [], made._loss

    def loss(model, inputs, denominator):
        seen.append(inputs)
        return inner(model, inputs, denominator)

    made._loss = loss
    return seen


def check_gradients(grads: dict, batches: list[dict], model, log: dict) -> None:
    """The gradients with it minus those without are the coefficient times those of the mean of the micro-batches'."""
    names, expected, values = [*routers(model)], {}, []
    for batch in batches:
        aux = aux_of(model, batch)
        values.append(float(aux.detach()))
        for n, g in zip(names, torch.autograd.grad(aux, [*routers(model).values()]), strict=True):
            expected[n] = expected.get(n, 0) + g * 0.5 / len(batches)
    assert len(batches) == 2 and log["aux_loss"] == pytest.approx(sum(values) / 2, rel=1e-5)
    for n, want in expected.items():
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(grads[True][n] - grads[False][n], want, rtol=1e-3, atol=2e-5)


def routers(model) -> dict[str, torch.nn.Parameter]:
    found = {n: p for n, p in model.named_parameters() if ".router." in n or n.endswith("mlp.gate.weight")}
    assert found
    return found


# --- against TRL ------------------------------------------------------------------------------------------------------

trl = pytest.importorskip("trl")
from xpo_fast.integrations import trl as engine  # noqa: E402

OPTIONS = {
    "use_cpu": True, "bf16": False, "logging_steps": 1, "report_to": [], "max_steps": STEPS, "disable_tqdm": True,
    "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-3, "gradient_checkpointing": False,
    "seed": 3, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
}  # fmt: skip


def trained(made) -> list[dict]:
    torch.manual_seed(0)
    made.train()
    return [x for x in made.state.log_history if "loss" in x]


def same(theirs: list[dict], ours: list[dict], *names: str) -> None:
    assert len(theirs) == len(ours) == STEPS
    for name in ("loss", "aux_loss", *names):
        for a, b in zip(theirs, ours, strict=True):
            assert b[name] == pytest.approx(a[name], rel=TOLERANCE, abs=TOLERANCE), (name, theirs.index(a))


@pytest.mark.parametrize("name", MODELS)
def test_dpo_equals_trls(tmp_path, name):
    """This project's method in TRL's trainer, two micro-batches a step."""
    import datasets

    make, pairs = MODELS[name], make_rows(12)
    rows = datasets.Dataset.from_list(pairs)
    logs = []
    for loss, config, kind in (
        ("sigmoid", trl.DPOConfig, trl.DPOTrainer),
        ("xpo:dpo", engine.DPOConfig, engine.DPOTrainer),
    ):
        args = config(**OPTIONS, output_dir=str(tmp_path), loss_type=[loss], gradient_accumulation_steps=2, beta=0.1)
        how = {"ref_model": make(1), "train_dataset": rows, "processing_class": make_tokenizer()}
        logs.append(trained(kind(make(), args=args, **how)))
    same(*logs, "rewards/margins")
    assert max(x["aux_loss"] for x in logs[0]) > 1.0


@pytest.mark.parametrize("name", MODELS)
def test_xpo_trainer_equals_trls(tmp_path, name):
    import datasets

    make = MODELS[name]
    args = trl.DPOConfig(**OPTIONS, output_dir=str(tmp_path), loss_type=["sigmoid"], gradient_accumulation_steps=2)
    rows = datasets.Dataset.from_list(make_rows(12))
    how = {"ref_model": make(), "train_dataset": rows, "processing_class": make_tokenizer()}
    theirs = trained(trl.DPOTrainer(make(), args=args, **how))
    own = {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 1.0, "max_steps": STEPS}
    made = test_trainer.make_trainer(tmp_path, model=make(), rows=12, reference="copy", preflight="off", **own)
    same(theirs, trained(made), "rewards/margins")
    assert made.layout.layout == "padded" and "router" in made.layout.why


@pytest.mark.parametrize("name", MODELS)
def test_grpo_under_install_equals_trls(tmp_path, name):
    import datasets

    make, rows = MODELS[name], datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in make_rows(8)])
    logs = []
    for ours in (False, True):
        args = trl.GRPOConfig(
            **OPTIONS, output_dir=str(tmp_path), num_generations=2, max_completion_length=6, beta=0.0,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        reward = lambda completion_ids, **_: [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]  # noqa: E731
        how = {"reward_funcs": reward, "train_dataset": rows, "processing_class": make_tokenizer()}
        if ours:
            with engine.install():
                logs.append(trained(trl.GRPOTrainer(make(flag=False), args=args, **how)))
        else:
            logs.append(trained(trl.GRPOTrainer(make(flag=False), args=args, **how)))
    same(*logs)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_router_learns_from_it(tmp_path, name):
    grads, logs, seen = {}, {}, {}
    for flag in (True, False):
        made = test_trainer.make_trainer(
            tmp_path, model=MODELS[name](flag=flag), rows=8, reference="copy", gradient_accumulation_steps=2,
            preflight="off", layout="padded",
        )  # fmt: skip
        seen[flag] = watched(made)
        logs[flag], grads[flag] = test_trainer.first_step(made)
    assert "aux_loss" not in logs[False]
    assert logs[True]["loss"] == pytest.approx(logs[False]["loss"] + 0.5 * logs[True]["aux_loss"], rel=1e-5)
    check_gradients(grads, seen[True], MODELS[name](), logs[True])


@pytest.mark.parametrize("name", MODELS)
def test_online_the_router_learns_from_whole_rows(tmp_path, name):
    """Rows of equal rewards count, and the last token of each, as in TRL's GRPO; those without a reward do not."""
    grads, logs, seen = {}, {}, {}
    for flag in (True, False):
        made = test_rl.make_trainer(tmp_path, test_rl.with_holes, model=MODELS[name](flag=flag), preflight="off")
        seen[flag] = watched(made)
        logs[flag], grads[flag] = test_rl.step(made)
        assert made.model.config.output_router_logits == flag
    samples = made.rollout.samples[0]
    rows = [len(p) + len(c) for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True)]
    kept = sorted(n for i, n in enumerate(rows) if i % 4 != 1 or i >= 4)
    assert sorted(int(n) for b in seen[True] for n in b["attention_mask"].sum(dim=1)) == kept
    assert "aux_loss" not in logs[False]
    check_gradients(grads, seen[True], MODELS[name](), logs[True])


def test_padding_and_evaluations_have_no_part_in_it(tmp_path):
    model = install(qwen())
    batch = data.Collator(2, "pair")(
        [{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 1], "rejected_ids": [7, 1]} for _ in range(2)]
    )
    wide = data.Collator(2, "pair", pad_to_multiple_of=16)(
        [{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 1], "rejected_ids": [7, 1]} for _ in range(2)]
    )
    found = [Inputs.of(b).run(model, lambda hidden, head: hidden.shape, router_loss=True) for b in (batch, wide)]
    assert found[0][0] != found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][1], aux_of(model, batch))
    assert Inputs.of(batch).run(model, lambda hidden, head: hidden.shape) == found[0][0]
    how = {"layout": "padded", "reference": "copy", "preflight": "stop", "eval_rows": make_rows(4, seed=1)}
    with_it, without = (test_trainer.make_trainer(tmp_path, model=qwen(flag=f), **how) for f in (True, False))
    logs = [m.evaluate() for m in (with_it, without)]
    assert logs[0]["eval_loss"] == logs[1]["eval_loss"] and "eval_aux_loss" not in logs[0]
    assert not with_it.preflight().faults


def install(model):
    install_fused_loss(model)
    return model


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_by_name(tmp_path):
    make = test_trainer.make_trainer
    with pytest.raises(ValueError, match="layout='packed': the router's auxiliary loss"):
        make(tmp_path, model=qwen(), layout="packed", reference="copy").train()
    with pytest.raises(ValueError, match="tokens_per_batch: the router's auxiliary loss"):
        make(tmp_path, model=qwen(), tokens_per_batch=64, reference="copy")
    config = RewardConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(
        ValueError, match=r"not added to that of a reward model: set model\.config\.output_router_logits"
    ):
        RewardTrainer(qwen(), config, train_dataset=make_rows(4), processing_class=make_tokenizer())
    model = qwen()
    model.config.router_z_loss_coef, model.config.model_type = 0.1, "qwen9_moe"
    with pytest.raises(ValueError, match=r"asks for a z-loss .* not of qwen9_moe"):
        make(tmp_path, model=model, reference="copy")
    llama = test_trainer.make_model()
    llama.config.output_router_logits = True
    with pytest.raises(ValueError, match="no router_aux_loss_coef"):
        make(tmp_path, model=llama, reference="copy")
    llama.config.router_aux_loss_coef = 0.1
    with pytest.raises(ValueError, match="transformers has no load_balancing_loss_func for it"):
        make(tmp_path, model=llama, reference="copy")
    model = install(qwen())
    with pytest.raises(ValueError, match="pass output_router_logits=True"):
        model(input_ids=torch.tensor([[3, 4]]), fused_loss=lambda hidden, head: hidden.shape)
    assert own_logits(model, {"input_ids": torch.tensor([[3, 4]])}).shape == (1, 2, test_trainer.VOCAB)


def test_a_coefficient_of_zero_is_none(tmp_path):
    model = qwen(router_aux_loss_coef=0.0)
    made = test_trainer.make_trainer(tmp_path, model=model, reference="copy", layout="padded")
    log, _ = test_trainer.first_step(made)
    assert made._router == 0 and "aux_loss" not in log
