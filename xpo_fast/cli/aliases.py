"""Accepts options by the names of TRL's and transformers' configurations, and hyperparameters of the method as options.

An alias is accepted if it means here what it means there; else it is refused, by name, with what to use instead.
Nothing is read and then ignored.
"""

from __future__ import annotations

from . import alias_kinds as kinds
from .alias_kinds import Alias
from .options import TRAINER_ARGUMENTS
from .parser import Given, UsageError
from .typed import Typed, hyperparameters

# The commands that take aliases: those with a trainer.
COMMANDS = ("train", "reward", "rl", "recipe")

# Names of one thing: typing one of them overrides the others in a configuration.
_SYNONYMS = ({"method", "loss-type"}, {"dtype", "torch-dtype", "bf16", "fp16"}, {"lora", "full", "use-peft"})


def overridden(name: str, typed: Typed) -> bool:
    """Returns whether an option of a configuration is overridden by one that was typed, perhaps by another name.

    A switch that is turned off overrides itself alone.
    """
    name = name.replace("_", "-")
    group = next((names for names in _SYNONYMS if name in names), set())
    given = [typed.options[other] for other in group if typed.has(other)]
    return any(g.name.replace("_", "-") == name or g.switch() is not False for g in given)


def translate(given: Given, typed: Typed) -> list[str]:
    """Returns the words for an option that the command does not declare; the option itself if it is unknown."""
    name = given.name.replace("-", "_")
    if typed.command not in COMMANDS:
        return given.typed
    if name in TRAINER_ARGUMENTS:
        return kinds.trainer_argument(given, name)
    alias = ALIASES.get(name)
    if alias is not None:
        return alias.words(given, typed)
    if name in REFUSED:  # before the settings: TRL's generation_batch_size is not the one of --set
        raise UsageError(f"--{given.name} is not an option of xpo-fast {typed.command}: {REFUSED[name]}")
    if name in typed.parser.settings:
        value = given.values[0] if given.values else typed.parser.settings[name].metavar
        raise UsageError(
            f"--{given.name} is a value of --set: write --set {name}={value}, see {typed.parser.prog} --help-all"
        )
    if typed.command != "recipe" and name in hyperparameters(typed.method, typed.command):
        return kinds.set_words(given, name)
    return given.typed


# --- the table -------------------------------------------------------------------------------------------------------

_NO_LAYOUTS = (
    "packed layouts do not exist yet: --group-by-length makes batches of rows of like length, with less padding"
)
_SAVES = "checkpoints are written every --save-steps steps, and --save-total-limit of them are kept"
_MODEL = "load it in Python (xpo_fast.models.load_model) and save it, then name the folder as --model"

ALIASES: dict[str, Alias] = {
    # The model.
    "model_name_or_path": kinds.renamed("model"),
    "torch_dtype": kinds.renamed("dtype"),
    "attn_implementation": kinds.renamed("attn"),
    "model_revision": kinds.choices("accepted as `main`", main=[]),
    "use_peft": kinds.choices("`--lora`; false: `--full`", true=["--lora"], false=["--full"]),
    "lora_r": kinds.renamed("lora-rank"),
    "lora_target_modules": kinds.with_commas("lora-targets"),
    "lora_task_type": kinds.choices(
        "accepted as `CAUSAL_LM`", causal_lm=[], seq_cls="a value head is on a causal LM here: leave it out"
    ),
    "use_rslora": kinds.choices(
        "accepted as false", false=[], true="there is no rank-stabilised LoRA here; scale by --lora-alpha"
    ),
    "use_dora": kinds.choices("accepted as false", false=[], true="there is no DoRA here; leave it out"),
    "bnb_4bit_quant_type": kinds.choices("accepted as `nf4`", nf4=[], fp4="--load-in-4bit is nf4"),
    "use_bnb_nested_quant": kinds.choices(
        "accepted as true", true=[], false="--load-in-4bit quantises the constants, too"
    ),
    "bf16": kinds.mixed_precision("bfloat16"),
    "fp16": kinds.mixed_precision("float16"),
    # The data.
    "dataset_name": kinds.renamed("data"),
    "dataset_train_split": kinds.renamed("split"),
    "dataset_num_proc": kinds.renamed("num-proc"),
    "dataset_config": kinds.renamed("data-config"),
    "dataset_streaming": kinds.choices(
        "accepted as false", false=[], true="rows are mapped from disk, however many there are: leave it out"
    ),
    "packing": kinds.choices("accepted as false", false=[], true=_NO_LAYOUTS),
    "eval_packing": kinds.choices("accepted as false", false=[], true=_NO_LAYOUTS),
    "padding_free": kinds.choices("accepted as false", false=[], true=_NO_LAYOUTS),
    "train_sampling_strategy": kinds.choices("`--group-by-length`", random=[], group_by_length=["--group-by-length"]),
    # Optimisation.
    "learning_rate": kinds.renamed("lr"),
    "num_train_epochs": kinds.renamed("epochs"),
    "per_device_train_batch_size": kinds.renamed("batch-size"),
    "per_device_eval_batch_size": kinds.renamed("eval-batch-size"),
    "gradient_accumulation_steps": kinds.renamed("grad-accum"),
    "lr_scheduler_type": kinds.renamed("scheduler"),
    "activation_checkpointing": kinds.renamed("gradient-checkpointing"),
    "use_cpu": kinds.renamed("cpu"),
    "no_cuda": kinds.renamed("cpu"),
    # The method.
    "loss_type": Alias("`--method`, by the table below", kinds.loss_type),
    "loss_weights": Alias("`--set weights=[…]`", lambda given, typed: [f"--set=weights=[{', '.join(given.values)}]"]),
    "importance_sampling_level": Alias("`--method gspo` or `luspo`", kinds.level),
    "precompute_ref_log_probs": kinds.choices("`--reference cached`", true=["--reference=cached"], false=[]),
    "use_weighting": Alias("`--set wpo=true --set clamp=false`", kinds.use_weighting),
    "f_divergence_type": kinds.choices(
        "accepted as `reverse_kl`",
        reverse_kl=[],
        **dict.fromkeys(
            ("forward_kl", "js_divergence", "alpha_divergence"), "it is --method f_dpo --set divergence=… here"
        ),
    ),
    "discopop_tau": kinds.hyperparameter("tau"),
    "desirable_weight": kinds.hyperparameter("lambda_d"),
    "undesirable_weight": kinds.hyperparameter("lambda_u"),
    "simpo_gamma": kinds.hyperparameter("gamma"),
    "center_rewards_coefficient": kinds.hyperparameter("center"),
    "epsilon": Alias("`--set eps=…`, or `eps_low`, `eps_high`", kinds.epsilon),
    "epsilon_high": kinds.hyperparameter("eps_high", "cap"),
    "delta": kinds.hyperparameter("delta", "dual_clip"),
    **{f"sapo_temperature_{side}": kinds.hyperparameter(f"tau_{side}") for side in ("pos", "neg")},
    **{
        f"vespo_{name}_{side}": kinds.hyperparameter(f"{name}_{side}")
        for name in ("k", "lambda")
        for side in ("pos", "neg")
    },
    "sync_ref_model": kinds.choices(
        "accepted as false", false=[], true="--set ref_mixin=X of xpo-fast rl moves the reference"
    ),
    # Rewards and rollouts.
    "reward_funcs": Alias("`--reward`", kinds.reward_funcs),
    "reward_model_name_or_path": kinds.renamed("reward-model"),
    "max_completion_length": kinds.renamed("max-new-tokens"),
    "num_iterations": kinds.renamed("epochs-per-rollout"),
    "num_generations_eval": kinds.as_setting("eval_generations"),
    "mask_truncated_completions": kinds.choices("`--overlong mask`", true=["--overlong=mask"], false=[]),
    "scale_rewards": kinds.choices(
        "`--advantage`",
        group=["--advantage=group"],
        true=["--advantage=group"],
        none=["--advantage=group_mean"],
        false=["--advantage=group_mean"],
        batch="see --advantage for its estimators",
    ),
    "num_completions_to_print": kinds.as_setting("show_samples"),
    "log_completions": kinds.choices("false: `--set show_samples=0`", true=[], false=["--set=show_samples=0"]),
    "use_transformers_continuous_batching": kinds.renamed("continuous-batching"),
    "use_vllm": kinds.choices(
        "accepted as false", false=[], true="start the server yourself and name it, --server URL --server-lora DIR"
    ),
    "vllm_server_base_url": kinds.renamed("server"),
    # Output.
    "resume_from_checkpoint": Alias("`--resume`", kinds.resume),
    "eval_strategy": Alias("`--eval-steps N`; no: `--eval-split 0`", kinds.eval_strategy),
    "save_strategy": kinds.choices("accepted as `steps`", steps=[], no=_SAVES, epoch=_SAVES, best=_SAVES),
    "logging_strategy": kinds.choices(
        "accepted as `steps`", steps=[], no="--logging-steps N", epoch="--logging-steps N"
    ),
    "hub_model_id": Alias("`--push-to-hub NAME`", kinds.hub_model_id),
    "hub_private_repo": kinds.renamed("hub-private"),
    "hub_strategy": kinds.choices("accepted as `every_save`", every_save=[]),
    "do_train": kinds.choices("accepted as true", true=[], false="--dry-run looks without training"),
    "do_eval": kinds.choices("accepted as true", true=[], false="--eval-split 0 holds out no rows"),
    "do_predict": kinds.choices("accepted as false", false=[], true="there is no test set here"),
    "remove_unused_columns": kinds.choices(
        "accepted as false", false=[], true="batches are made from columns of the data"
    ),
}

# Names of TRL and transformers that these commands do not have, by what to do instead.
REFUSALS = {
    "use --eval-data FILE, or --eval-split for rows of --data": "dataset_test_split",
    "give a folder that datasets.load_dataset reads, or a file, as --data": "dataset_text_field dataset_kwargs",
    "prompts lose their beginning, completions their end; --max-prompt-length bounds the first": "truncation_mode",
    _MODEL: "model_init_kwargs lora_target_parameters lora_modules_to_save bnb_4bit_quant_storage cast_lm_head_to_fp32 "
    "router_aux_loss_coef disable_dropout chat_template_path eos_token pad_token ignore_bias_buffers",
    "write the weight after the function: --reward FILE.py:FUNCTION=WEIGHT": "reward_weights "
    "multi_objective_aggregation",
    "--prompts-per-rollout N says how many prompts a rollout has": "steps_per_generation",
    "rl has --prompts-per-rollout; for the completions sampled at a time write --set generation_batch_size=N": ""
    "generation_batch_size",
    "write --method f_dpo --set divergence=alpha --set alpha=1−X": "f_alpha_divergence_coef",
    "its term is a mean over the batch's tokens: add sft, as in --method 'simpo + 1.0*sft'": "cpo_alpha",
    "--set ref_mixin=X of xpo-fast rl moves the reference after every rollout": "ref_model_mixup_alpha "
    "ref_model_sync_steps",
    "samplers have --temperature, --top-p and --top-k": "min_p generation_kwargs repetition_penalty "
    "cache_implementation chat_template_kwargs",
    "vLLM is a server of its own here, see --server and --server-lora": "vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_host vllm_server_port vllm_server_timeout "
    "vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
    "use_transformers_paged transformers_continuous_batching_config ds3_gather_for_generation",
    "importance weights against the sampler are --set off_policy=…, off_policy_cap=…": ""
    "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
    "vllm_importance_sampling_clip_min vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl",
    "the method's own entropy term is --set entropy_coef=…": "top_entropy_quantile use_adaptive_entropy "
    "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
    "every completion is in samples.jsonl": "log_multimodal log_unique_prompts log_completions_hub_repo",
    "advantages are whitened by --advantage batch": "normalize_advantages reward_clip_range",
    "set HF_TOKEN, or log in with `hf auth login`: a token on the command line can be read by others": "hub_token",
    "configure it with `accelerate config`, and start the command by `accelerate launch -m xpo_fast.cli`": "fsdp "
    "fsdp_config deepspeed accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank",
    "the loss is computed without logits already; leave it out": "use_liger_kernel liger_kernel_config use_cache "
    "average_tokens_across_devices",
    "label smoothing is the method's: --set label_smoothing=…": "label_smoothing_factor",
    "leave it out, or train from Python: xpo_fast.trainer.XPOConfig and XPOTrainer": "shuffle_dataset "
    "pad_to_multiple_of precompute_ref_batch_size activation_offloading packing_strategy completion_only_loss "
    "assistant_only_loss max_tool_calling_iterations activation_checkpointing_kwargs bf16_full_eval fp16_full_eval "
    "torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps "
    "auto_find_batch_size logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
    "log_level_replica trackio_space_id trackio_bucket_id trackio_static_space_id eval_delay prediction_loss_only "
    "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "batch_eval_metrics save_on_each_node enable_jit_checkpoint hub_always_push hub_revision load_best_model_at_end "
    "metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint data_seed "
    "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order label_names "
    "length_column_name skip_memory_metrics optim_target_modules",
}
REFUSED = {name: what for what, names in REFUSALS.items() for name in names.split()}


def names(typed: Typed) -> tuple[str, ...]:
    """Returns the names that the command takes besides its own options, for suggestions."""
    if typed.command not in COMMANDS:
        return ()
    own = () if typed.command == "recipe" else hyperparameters(typed.method, typed.command)
    return (*own, *ALIASES, *(f"set {name}" for name in typed.parser.settings))
