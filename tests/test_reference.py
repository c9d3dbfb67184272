"""The reference is the model as it was handed over: with its adapter if it had learned, whatever its kind.

Right values are the log-probs that a deep copy of that model, taken before, gives in float64, one row at a time without
padding. Where policy and reference start as the same model, the first loss of DPO is ln 2.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset

import test_reward_model
import test_rl
from test_trainer import (
    PEFT_WARNING,
    assert_same_gradients,
    first_step,
    lora,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
)
from xpo_fast.models import load_model
from xpo_fast.models.modes import without_adapter
from xpo_fast.recipes.mixture import MixtureRollout
from xpo_fast.rollout import GenerateRollout, Sampling
from xpo_fast.trainer.handed_over import HandedOver, effect_of_adapter
from xpo_fast.trainer.reference import rows_fingerprint

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # by LN tuning, of every norm
    pytest.mark.filterwarnings("ignore:init_lora_weights='pissa_niter_2' draws at random"),
]

ROWS = make_rows(8)
LINEAR = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "LoRA": lambda: lora(),
    "rsLoRA with dropout": lambda: lora(use_rslora=True, lora_dropout=0.5),
    "DoRA": lambda: lora(use_dora=True),
    "LoRA and biases": lambda: lora(bias="all"),
    "LoRA on the LM head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    "tokens": lambda: lora(trainable_token_indices=[50]),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: peft.LoHaConfig(**LINEAR),
    "LoKr": lambda: peft.LoKrConfig(**LINEAR),
    "OFT": lambda: peft.OFTConfig(task_type="CAUSAL_LM", r=0, oft_block_size=4, target_modules=["q_proj"]),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "LN tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}


def base():
    """Untied, and with biases, so that every kind of adapter has something of its own to change."""
    return make_model(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)


def shaken(model, size: float = 0.3):
    """The model as if it had been trained: every weight that is trained has moved."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p) * size)
    return model


def adapted(config=None, *, model=None, **options):
    return peft.get_peft_model(model or base(), config or lora(**options))


def oracle(model) -> torch.Tensor:
    """Mean log-prob of the chosen and of the rejected completions of ROWS: (2,) float64."""
    model, tokenizer = copy.deepcopy(model).double().eval(), make_tokenizer()
    found = torch.zeros(2, dtype=torch.float64)
    for row in ROWS:
        for side, name in enumerate(("chosen", "rejected")):
            prompt, ids = (tokenizer(row[key])["input_ids"] for key in ("prompt", name))
            ids = torch.tensor([prompt + ids + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits.log_softmax(dim=-1)[0, :-1]
            found[side] += logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum() / len(ROWS)
    return found


def trained(tmp_path, model, want: torch.Tensor, *, starts_there: bool = True, steps: int = 2, **args):
    """Trains, and checks the reference by the implicit rewards of the trained policy."""
    trainer = make_trainer(
        tmp_path, model=model, eval_rows=ROWS, method_args={"beta": 1.0}, max_steps=steps, learning_rate=3e-2, **args
    )
    trainer.train()
    assert not [str(f) for f in trainer.report.findings if f.level == "fault"]
    first = trainer.state.log_history[0]["loss"]
    assert (abs(first - math.log(2)) < 1e-4) == starts_there
    policy = trainer.completion_logps(ROWS)[..., 0].double().mean(dim=0)
    metrics = trainer.evaluate()
    rewards = torch.tensor([metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]]).double()
    assert rewards.abs().max() > 1e-2  # the policy has moved
    torch.testing.assert_close(policy - rewards, want, atol=1e-4, rtol=0)
    return trainer


@pytest.mark.parametrize("reference", ["auto", "copy", "cached"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_is_the_references_too(tmp_path, kind, reference):
    """Which model is compared with is what trl#1263 and trl#1365 ask; a model handed over is compared with itself."""
    model = shaken(adapted(KINDS[kind]()))
    starts_there = "dropout" not in kind  # the policy drops out
    trainer = trained(tmp_path, model, oracle(model), starts_there=starts_there, reference=reference)
    assert trainer.reference == {"auto": "kept"}.get(reference, reference)


@pytest.mark.parametrize("reference", ["auto", "copy", "cached", "adapter"])
@pytest.mark.parametrize("kind", ["LoRA", "LoRA and biases", "modules_to_save", "DoRA", "LN tuning"])
def test_a_new_adapter_leaves_the_base_model_as_the_reference(tmp_path, kind, reference):
    """Biases are trained beside the adapter, and stay as they are when it is switched off."""
    model = base()
    want = oracle(model)
    trainer = trained(tmp_path, model, want, peft_config=KINDS[kind](), reference=reference)
    assert trainer.reference == {"auto": "adapter"}.get(reference, reference)


@pytest.mark.parametrize("reference", ["auto", "copy", "cached"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_takes_its_weights_from_the_base(tmp_path, init, reference):
    """PiSSA and OLoRA leave a residual in the base: switched off, the adapter gives no model that anybody had."""
    model = base()
    want = oracle(model)
    trained(tmp_path, model, want, peft_config=lora(init_lora_weights=init), reference=reference)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_the_folder_of_such_an_adapter_is_the_trained_model_or_that_is_said(tmp_path, recwarn, init):
    base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load_model(str(tmp_path / "base"))
    trainer = make_trainer(tmp_path, model=model, peft_config=lora(init_lora_weights=init), max_steps=2)
    said = any("draws at random" in str(w.message) for w in recwarn)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, _ = load_model(str(tmp_path / "saved"))
    assert said != torch.allclose(oracle(loaded), oracle(trainer.model), atol=1e-5, rtol=0)


def test_several_active_adapters_are_no_folder(tmp_path):
    model: Any = adapted()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="2 adapters are active together .default, other"):
        trained(tmp_path, shaken(model), oracle(model))


@pytest.mark.parametrize("reference", ["auto", "copy", "cached", "adapter"])
def test_a_new_adapter_that_is_not_idle(tmp_path, reference):
    model = base()
    want = oracle(model)
    with pytest.warns(UserWarning, match="not idle before the first step .it moves log-probs by up to"):
        trained(
            tmp_path, model, want, starts_there=False, peft_config=lora(init_lora_weights=False), reference=reference
        )


@pytest.fixture
def lossy(monkeypatch):
    """An adapter that changes the base weights and does not hold what they lose, as LoftQ's, of any kind."""
    monkeypatch.setattr(
        peft.tuners.lora.layer.LoraLayer, "olora_init", lambda self, name: self.get_base_layer().weight.data.mul_(0.8)
    )
    return lora(init_lora_weights="olora")


def test_a_base_that_is_lost_is_refused_or_copied_before(tmp_path, lossy):
    for reference in ("auto", "cached", "adapter"):
        with pytest.raises(ValueError, match=r"changed 4 of the base weights.* nor is it with its adapter on.*copies"):
            make_trainer(tmp_path, model=base(), peft_config=lossy, reference=reference)
    model = base()
    want = oracle(model)
    with pytest.warns(UserWarning, match="policy does not start there"):
        trained(tmp_path, model, want, starts_there=False, peft_config=lossy, reference="copy")


def test_switching_off_an_adapter_that_took_from_the_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"changed 4 of the base weights, such as model\.layers\.0"):
        make_trainer(tmp_path, peft_config=lora(init_lora_weights="pissa"), reference="adapter")


@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_the_base_of_a_trained_adapter_on_request(tmp_path, kind):
    model = shaken(adapted(KINDS[kind]()))
    with without_adapter(model):
        want = oracle(model)
    with pytest.warns(UserWarning, match='reference="adapter" is .* its base, not the model as handed over'):
        trained(tmp_path, model, want, starts_there=False, reference="adapter")


@pytest.mark.parametrize("reference", ["auto", "copy", "cached", "adapter"])
def test_weights_that_the_user_trains_beside_an_adapter(tmp_path, reference):
    model = adapted()
    for name, p in model.named_parameters():
        if "layernorm" in name:
            p.requires_grad_(True)
    with pytest.warns(UserWarning, match="4 weights, such as .*layernorm.weight, are trained beside the adapter"):
        trainer = trained(tmp_path, model, oracle(model), reference=reference)
    with pytest.raises(ValueError, match="not the whole model: 4 weights"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_several_adapters_of_which_one_is_trained(tmp_path):
    model = adapted()
    model.add_adapter("other", KINDS["LoRA"]())
    shaken(model)
    model.set_adapter("other")
    shaken(model)
    others = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model.peft_config["other"].base_model_name_or_path = str(tmp_path / "base")
    trainer = trained(tmp_path, model, oracle(model))
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    # The folder is the trained policy: neither the other adapter, nor one in a subfolder that nothing loads.
    trainer.save_model(str(tmp_path / "saved"))
    loaded, _ = load_model(str(tmp_path / "saved"))
    torch.testing.assert_close(oracle(loaded), oracle(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_effect_of_an_adapter_is_none_until_it_learns_and_looking_leaves_no_trace(kind):
    model = adapted(KINDS[kind]()).train()
    for p in [p for n, p in model.named_parameters() if "layers.1" in n]:
        p.requires_grad_(False)
    shake = [p for p in model.parameters() if p.requires_grad]
    before = ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    state = torch.random.get_rng_state()
    found: Any = effect_of_adapter(model)
    assert found == 0.0 or (kind == "DoRA" and found < 1e-4)  # which divides by norms and multiplies with them
    with torch.no_grad():
        for p in shake:
            p.add_(0.01)
    if kind != "LoRA and biases":  # a bias that LoRA trains is the base model's
        assert (effect_of_adapter(model) or 0) > 1e-6
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before


def test_one_trained_embedding_is_found_wherever_it_is():
    model = adapted(trainable_token_indices=[50])
    assert effect_of_adapter(model) == 0.0
    with torch.no_grad():
        (delta,) = (p for n, p in model.named_parameters() if "token_adapter" in n and p.requires_grad)
        delta[0, 3] += 1e-3
    assert effect_of_adapter(model) not in (0, None)


@pytest.mark.parametrize("reference", ["auto", "copy"])
def test_under_autocast_the_policy_runs_its_own_weights(tmp_path, reference):
    """An autocast keeps what it has cast: of a weight that was another for a while, or without its gradient."""
    config = {"peft_config": None, "bf16": True, "seed": 3}
    found = []
    for how in (reference, "cached"):
        trainer = make_trainer(tmp_path, model=shaken(adapted(bias="all")), reference=how, **config)
        trainer.prepare()
        shaken(trainer.model, 0.05)
        found.append(first_step(trainer))
    (log, gradients), (same, wanted) = found
    assert log["loss"] == pytest.approx(same["loss"], abs=1e-5) and abs(log["loss"] - math.log(2)) > 1e-2
    assert_same_gradients(gradients, wanted)


def test_a_cache_is_of_one_adapter(tmp_path):
    def cached(change) -> torch.Tensor:
        model = shaken(adapted())
        change(model)
        trainer = make_trainer(tmp_path, model=model, reference="cached")
        trainer.prepare()
        return torch.tensor(trainer.train_dataset["ref_logp_chosen"])

    def scaled(model):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3.0)

    first = cached(lambda model: None)
    assert torch.equal(first, cached(lambda model: None))
    for change in (scaled, lambda model: shaken(model, 0.1)):
        assert not torch.allclose(first, cached(change))


def test_the_rows_of_a_cache_are_ids_and_masks():
    rows = {"prompt_ids": [[1, 2]], "chosen_ids": [[3, 4]]}
    found = [Dataset.from_dict({**rows, **more}) for more in ({}, {"chosen_mask": [[1, 1]]}, {"chosen_mask": [[0, 1]]})]
    assert len({rows_fingerprint(x) for x in found}) == 3


def test_a_resumed_run_has_the_same_reference(tmp_path):
    """Bit for bit: the last steps of a run that was stopped, from a trained adapter, are those of one that was not."""
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    make = lambda out, **more: make_trainer(tmp_path / out, model=shaken(adapted(), more.pop("size", 0.3)), **args)  # noqa: E731
    whole = make("whole")
    whole.train()
    resumed = make("again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    logs = [[{k: v for k, v in x.items() if "/" in k} for x in t.state.log_history[2:4]] for t in (whole, resumed)]
    assert logs[0] == logs[1] and logs[0][1]["rewards/margins"] != 0
    with pytest.raises(ValueError, match="weights of the reference was"):
        make("other", size=0.2).train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))


def test_a_merged_adapter_cannot_be_trained(tmp_path):
    model = shaken(adapted())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        make_trainer(tmp_path, model=model)


def test_weights_in_parts_cannot_be_set_back():
    model = adapted(bias="all")
    with pytest.raises(ValueError, match="keep them in parts: merge the adapter"):
        HandedOver(model, None, copied=False).settle("adapter", "adapter", model, sharded=True)
    with pytest.warns(UserWarning, match="cannot be seen before its weights are loaded"):
        model = adapted()
        assert HandedOver(model, None, copied=False).settle("adapter", "auto", model, sharded=True) == "adapter"


@pytest.mark.parametrize("reference", ["auto", "copy"])
@pytest.mark.parametrize("new", [False, True])
def test_online_the_reference_is_what_was_handed_over(tmp_path, reference, new):
    model = base() if new else shaken(adapted())
    start = copy.deepcopy(model).eval()
    config = lora(init_lora_weights="pissa") if new else None
    trainer = test_rl.make_trainer(
        tmp_path, model=model, peft_config=config, kl_coef=0.1, reference=reference, max_steps=2, learning_rate=3e-2
    )
    trainer.train()
    first, second = (trainer.state.log_history[k]["objective/kl"] for k in (0, 1))
    assert abs(first) < 1e-4 < abs(second)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        reference_policy: Any = trainer.moving_reference
        with reference_policy.scoring() as scored:
            found = scored.eval()(input_ids=ids).logits
        torch.testing.assert_close(found, start(input_ids=ids).logits, atol=1e-4, rtol=0)
        assert not torch.allclose(trainer.model.eval()(input_ids=ids).logits, found, atol=1e-2)


def test_a_reference_that_follows_starts_with_the_adapter(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = test_rl.make_trainer(
            tmp_path, model=shaken(adapted()), kl_coef=0.1, ref_mixin=0.5, reference="adapter", learning_rate=3e-2
        )
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == 0
    with pytest.raises(ValueError, match="ref_mixin averages the adapter, and the new one is not idle"):
        config = lora(init_lora_weights=False)
        test_rl.make_trainer(tmp_path, model=base(), peft_config=config, kl_coef=0.1, ref_mixin=0.5)


def test_a_mixture_with_the_reference_samples_from_what_was_handed_over(tmp_path):
    """All of the mixture is the reference here: it draws what the model drew before it was trained."""
    model, tokenizer, sampling = shaken(adapted()), make_tokenizer(), Sampling(6, temperature=0.0)
    ask = {"sampling": sampling, "seed": 0}
    want = GenerateRollout(model, tokenizer, continuous=False).generate(["w1 w2", "w3"], **ask).completion_ids
    trainer = test_rl.make_trainer(tmp_path, model=model, kl_coef=0.1)
    shaken(model)
    moving: Any = trainer.moving_reference
    how = {"reference": None, "share": 1.0, "scoring": moving.scoring}
    found = MixtureRollout(model, tokenizer, **how).generate(["w1 w2", "w3"], **ask).completion_ids
    own = GenerateRollout(model, tokenizer, continuous=False).generate(["w1 w2", "w3"], **ask).completion_ids
    assert found == want != own


@pytest.mark.parametrize("reference", ["auto", "copy"])
@pytest.mark.parametrize("new", [False, True])
def test_a_reward_model_is_compared_with_what_was_handed_over(tmp_path, reference, new):
    config = lora(init_lora_weights="pissa") if new else None
    trainer = test_reward_model.make_trainer(
        tmp_path,
        "haf",
        model=base() if new else shaken(adapted()),
        peft_config=config,
        reference=reference,
        max_steps=2,
    )
    trainer.train()
    first, second = test_reward_model.log(trainer, "policy_loss")
    assert first == pytest.approx(math.log(2), abs=1e-5) and second != pytest.approx(math.log(2), abs=1e-4)


def test_whole_distributions_of_a_reference_with_an_adapter_on_its_head(tmp_path):
    losses = []
    for reference in ("auto", "copy"):
        model = shaken(adapted(target_modules=["q_proj", "lm_head"]))
        trainer = make_trainer(tmp_path, model=model, method="tdpo", reference=reference, max_steps=3)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][2] != pytest.approx(losses[0][0], abs=1e-3)


def test_a_critic_alone_learns_nothing_of_a_frozen_policy(tmp_path):
    """load_model(merge=False) freezes the adapter, as peft does, and a critic beside it had a gradient."""
    model: Any = shaken(adapted(model=test_rl.make_model())).requires_grad_(False)
    frozen = test_rl.make_trainer(tmp_path, model=model, method="ppo")
    with pytest.raises(ValueError, match=r"nothing would be trained.* model\.set_adapter\('default'\)"):
        frozen.train()
    model.set_adapter("default")
    trained_on = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    assert len(trained_on) == 8 and frozen.train().global_step == 1
