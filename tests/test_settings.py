"""Settings and arguments that would have no effect, or another than is meant: each is refused by its name."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

import test_trainer
from test_trainer import PEFT_WARNING
from xpo_fast.objective import Objective
from xpo_fast.rewards.trainer import RewardConfig
from xpo_fast.rl import RLConfig, RLTrainer
from xpo_fast.trainer import XPOConfig, XPOTrainer
from xpo_fast.trainer.arguments import (
    REFUSED,
    REFUSED_BY_TRAINER,
    REFUSED_ONLINE,
    check_arguments,
    let_ddp_find_unused_parameters,
)

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")

# Fields of TrainingArguments that act in these trainers as transformers says.
ACT = (
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args optim_target_modules weight_decay adam_beta1 "
    "adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile "
    "torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size "
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay "
    "per_device_eval_batch_size prediction_loss_only eval_on_start save_only_model save_strategy save_steps "
    "save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id "
    "hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better "
    "ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu "
    "accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics "
    "use_cache"  # of the saved config: the cache is off in a forward with a loss
)
# Trainer itself never reads these: they are for the script around it, or for the launcher.
OF_THE_SCRIPT = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"}
# Refused in part, with a rule of their own.
BY_RULE = {"remove_unused_columns", "average_tokens_across_devices"}

VALUES = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "label_names": ["labels"],
    "include_for_metrics": ["loss"],
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "data_seed": 7,
    "dataloader_num_workers": 1,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_in_order": False,
}


def test_every_field_of_training_arguments_acts_or_is_refused():
    """A field that a new version of transformers adds belongs into ACT, if it acts here, or into REFUSED."""
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert fields <= {*ACT.split()} | OF_THE_SCRIPT | BY_RULE | set(REFUSED)
    assert not set(REFUSED) & ({*ACT.split()} | OF_THE_SCRIPT | BY_RULE) and set(REFUSED_ONLINE) <= {
        *ACT.split()
    } | set(REFUSED)
    own = {f.name for kind in (XPOConfig, RewardConfig, RLConfig) for f in dataclasses.fields(kind)} - fields
    assert not own & set(REFUSED_ONLINE)


@pytest.mark.parametrize("name", sorted(REFUSED_ONLINE))
def test_a_field_without_effect_is_refused_and_its_default_is_not(tmp_path, name):
    default = {f.name: f for f in dataclasses.fields(TrainingArguments)}[name]
    made = default.default_factory is not dataclasses.MISSING
    usual = {"output_dir": str(tmp_path), "use_cpu": True}
    same, other = {name: default.default_factory() if made else default.default}, {name: VALUES.get(name, True)}
    if name == "dataloader_prefetch_factor":  # which transformers takes with workers alone
        other = {"dataloader_num_workers": 1, name: 4}
    for kind in (XPOConfig, RewardConfig, RLConfig):
        kind(**usual, **same)
        if kind is RLConfig or name in REFUSED:
            with pytest.raises(ValueError, match=rf"\b{name}={other[name]!r}: ".replace("[", r"\[")):
                kind(**usual, **other)
        else:
            kind(**usual, **other)


def test_empty_is_as_good_as_none(tmp_path):
    """Files of settings have defaults written out, as an empty list as well as null."""
    empty = {"label_names": [], "include_for_metrics": None, "liger_kernel_config": {}, "metric_for_best_model": ""}
    for kind in (XPOConfig, RewardConfig, RLConfig):
        kind(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **empty)
    trainer_of(XPOTrainer, tmp_path, {"method_args": {}}, objective=Objective("dpo"))
    with pytest.raises(ValueError, match="eval_do_concat_batches=False: an evaluation"):  # not empty: another choice
        XPOConfig(str(tmp_path), use_cpu=True, eval_do_concat_batches=False)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"split_batches": True}, "split_batches=True: per_device_train_batch_size"),
        ({"dispatch_batches": True}, r"dispatch_batches=True: .* cuts pairs and lists apart"),
        ({"even_batches": False}, "even_batches=False: processes without a last batch"),
        ({"gradient_accumulation_kwargs": {"num_steps": 2}}, "num_steps: set gradient_accumulation_steps"),
        ({"dispatch_batches": False, "even_batches": True, "use_seedable_sampler": False}, None),
        ({"gradient_accumulation_kwargs": {"sync_each_batch": True}}, None),
    ],
)
def test_what_accelerate_would_do_to_batches(tmp_path, config, said):
    """With dispatch_batches one process concatenates batches and slices the rows, chosen ones from rejected ones."""
    for kind in (XPOConfig, RLConfig):
        if said is None:
            kind(str(tmp_path), use_cpu=True, accelerator_config=config)
            continue
        with pytest.raises(ValueError, match=said):
            kind(str(tmp_path), use_cpu=True, accelerator_config=config)


def test_denominators_are_those_of_all_devices(tmp_path, monkeypatch):
    args = XPOConfig(str(tmp_path), use_cpu=True, average_tokens_across_devices=False)  # of one device: no matter
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="average_tokens_across_devices=False: denominators"):
        check_arguments(args, REFUSED)


def trainer_of(kind: type, folder, args: dict | None = None, **about):
    """A trainer of the smallest model, on two pairs or eight prompts."""
    config, rows = (RLConfig, [{"prompt": "w1"}] * 8) if kind is RLTrainer else (XPOConfig, test_trainer.make_rows(2))
    before = [lambda completions: [0.0] * len(completions)] if kind is RLTrainer else []
    about = {"processing_class": test_trainer.make_tokenizer(), "train_dataset": rows, **about}
    config = config(str(folder), use_cpu=True, per_device_train_batch_size=8, **(args or {}))
    return kind(test_trainer.make_model(), *before, config, **about)


@pytest.mark.parametrize("name", [*REFUSED_BY_TRAINER, "data_collator"])
def test_arguments_of_trainer_without_effect_are_refused(tmp_path, name):
    for kind in (XPOTrainer, RLTrainer):
        if name != "data_collator" or kind is RLTrainer:
            with pytest.raises(ValueError, match=f"{name}="):
                trainer_of(kind, tmp_path, **{name: lambda *_: {}})
        if name != "tokenizer":  # which Trainer itself does not know
            trainer_of(kind, tmp_path, **{name: None})


def test_a_checkpoint_in_the_arguments_is_for_the_script(tmp_path):
    """transformers leaves args.resume_from_checkpoint to the script, and a run would begin anew."""
    trainer = test_trainer.make_trainer(tmp_path, resume_from_checkpoint="checkpoint-1")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint='checkpoint-1' is for the script: pass it on"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=False).global_step == 1


RL = {"per_device_train_batch_size": 8, "use_cpu": True}


@pytest.mark.parametrize(
    "kind, given, said",
    [
        (XPOConfig, {"max_length": 64, "max_prompt_length": 65}, "max_prompt_length=65 bounds nothing"),
        (XPOConfig, {"max_length": 64, "max_prompt_length": 64}, None),
        (RewardConfig, {"length_target": 4.0}, "length_target=4 is where length_lam is 0"),
        (RewardConfig, {"length_target": 4.0, "length_lam": 0.1}, None),
        (RewardConfig, {"objective_weights": [1.0]}, "objective_weights weigh the rewards of regression"),
        (RewardConfig, {"method": "regression", "objective_weights": [1.0]}, None),
        (RewardConfig, {"ref_cache_dir": "x"}, "ref_cache_dir has no effect"),
        *((RLConfig, {name: value}, rf"{name} is the critic's, .* grpo has advantages by 'group'")
          for name, value in {"gamma": 0.9, "lam": 0.9, "vf_coef": 0.5, "value_clip": 0.1, "whiten_advantages": False,
                              "value_head_learning_rate": 1e-3}.items()),
        (RLConfig, {"method": "ppo", "gamma": 0.9, "lam": 0.9, "vf_coef": 0.5, "whiten_advantages": False}, None),
        (RLConfig, {"overlong_buffer": 4}, "overlong_buffer=4 is where overlong='penalty' begins"),
        (RLConfig, {"overlong_buffer": 4, "overlong": "penalty"}, None),
        (RLConfig, {"kl_horizon": 100}, "kl_horizon=100 is how fast kl_target acts"),
        (RLConfig, {"kl_horizon": 100, "kl_target": 1.0}, None),
        (RLConfig, {"off_policy": "none", "off_policy_cap": 3.0}, "off_policy_cap bounds the weights"),
        (RLConfig, {"off_policy_cap": 3.0}, None),
        (RLConfig, {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps",
                    "eval_steps": 5, "save_steps": 5}, "metric_for_best_model='reward'"),
        (RLConfig, {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps",
                    "eval_steps": 5, "save_steps": 5, "metric_for_best_model": "reward"}, None),
    ],
)  # fmt: skip
def test_own_arguments_that_others_leave_without_effect(tmp_path, kind, given, said):
    def make():
        config = kind(str(tmp_path), **RL, **given)
        return config.spec() if kind is RewardConfig else config

    if said is None:
        make()
        return
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    "method, options, said",
    [
        ("dpo", {"seed": 3}, "seed= is for the rival tokens of cringe, dpo draws none"),
        ("simpo", {"top_k": 3}, "top_k= is for the rival tokens of cringe"),
        ("simpo", {"clamp": False}, "clamp=False is about the weights of wpo=True"),
        ("cringe", {"seed": 3, "top_k": 3}, None),
        ("simpo", {"clamp": False, "wpo": True}, None),
        ("dpo", {"seed": None, "top_k": 5, "clamp": True}, None),
    ],
)
def test_options_of_an_objective_that_none_of_its_methods_reads(method, options, said):
    if said is None:
        Objective(method, **options)
        return
    with pytest.raises(ValueError, match=said):
        Objective(method, **options)


def test_an_objective_stands_in_for_the_arguments_about_it(tmp_path):
    for name, value in {"method": "simpo", "method_args": {"beta": 0.2}, "tile_mib": 4.0}.items():
        with pytest.raises(ValueError, match=f"objective= stands in for {name} of the arguments"):
            trainer_of(XPOTrainer, tmp_path, {name: value}, objective=Objective("dpo"))


def test_arguments_of_the_own_sampler_do_not_go_to_another(tmp_path):
    with pytest.raises(ValueError, match="generation_batch_size of the arguments are for GenerateRollout"):
        trainer_of(RLTrainer, tmp_path, {"generation_batch_size": 3}, rollout=object())


def test_reentrant_checkpointing_of_a_model_that_text_does_not_use_up(tmp_path, monkeypatch):
    """Where DDP cannot look for the weights without a gradient, it would average none."""
    model, asked = test_trainer.with_images(), {"use_cpu": True, "activation_checkpointing": True}
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    args = XPOConfig(str(tmp_path), **asked, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="text does not use all of Gemma3ForConditionalGeneration"):
        let_ddp_find_unused_parameters(model, args)
    for one, found in ((model, True), (test_trainer.make_model(), None)):
        args = XPOConfig(str(tmp_path), **asked)
        let_ddp_find_unused_parameters(one, args)
        assert args.ddp_find_unused_parameters is found
