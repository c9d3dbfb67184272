"""Accepts options by the names of TRL's and transformers' configurations, and hyperparameters of the method as options.

An alias is accepted if it means here what it means there; else it is refused, by name, with what to use instead.
Nothing is read and then ignored. First the kinds of alias, one function each; then the table of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from .options import TRAINER_ARGUMENTS
from .parser import FALSE, TRUE, Given, UsageError
from .settings import setting
from .typed import POLICY_LOSS_TYPES, Typed, as_method, hyperparameters


@dataclass(frozen=True)
class Alias:
    """An option of another library.

    becomes: its equivalent here, for docs/commands.md. words: returns that equivalent, or raises UsageError.
    """

    becomes: str
    words: Callable[[Given, Typed], list[str]]


def renamed(option: str) -> Alias:
    """Returns the alias of an option with another name."""

    def words(given: Given, typed: Typed) -> list[str]:
        if typed.parser.named(option) is None:
            raise UsageError(f"--{given.name} is --{option} of other commands; xpo-fast {typed.command} has none")
        return Given(option, given.value, given.words).typed

    return Alias(f"`--{option}`", words)


def choices(what: str, **words_by_value: list[str] | str) -> Alias:
    """Returns the alias of a switch (true, false) or choice: the words for each value, or why it is refused."""

    def words(given: Given, typed: Typed) -> list[str]:
        value = given.first.lower()
        value = "true" if value in TRUE else "false" if value in FALSE and "no" not in words_by_value else value
        found = words_by_value.get(value, f"it is not known here; expected {', '.join(words_by_value)}")
        if isinstance(found, str):
            raise UsageError(f"--{given.name} {value}: {found}")
        return [*found, *given.values[1:]]

    return Alias(what, words)


def accepted(value: str, **refused: str) -> Alias:
    """Returns the alias of an option that has one value here: the words that say why others are refused."""
    return choices(f"accepted as {value if value in (*TRUE, *FALSE) else f'`{value}`'}", **{value: []}, **refused)


def hyperparameter(*names: str) -> Alias:
    """Returns the alias of the first of these hyperparameters that the method has."""

    def words(given: Given, typed: Typed) -> list[str]:
        known = hyperparameters(typed.method, typed.command)
        found = next((name for name in names if name in known), None)
        if found is None:
            there = f"it has {', '.join(known) or 'none'}"
            raise UsageError(f"--{given.name}: {typed.method} has no hyperparameter {' or '.join(names)}; {there}")
        return set_words(given, found)

    return Alias(" or ".join(f"`--set {name}=…`" for name in names), words)


def set_words(given: Given, name: str) -> list[str]:
    """Returns --set of a name to the value, or the values as a list, of an option."""
    several = json.dumps([setting(f"x={v}")[1] for v in given.values])
    return [f"--set={name}={several if len(given.values) > 1 else given.first}"]


def bits(which: str) -> Alias:
    """Returns the alias of --load_in_4bit and --load_in_8bit."""

    switch = choices(f"`--quantize {which}`", true=[f"--quantize={which}"], false=[])

    def words(given: Given, typed: Typed) -> list[str]:
        found = switch.words(given, typed)
        if typed.parser.named("quantize") is None:
            raise UsageError(f"--{given.name} is --quantize of other commands; xpo-fast {typed.command} has none")
        others = {"quantize", "load-in-4bit", "load-in-8bit"} - {given.name.replace("_", "-")}
        asked = [typed.options[name] for name in sorted(others & {*typed.options})]
        if found and any(o.switch() is not False and o.values[:1] != [which] for o in asked):
            raise UsageError(
                f"--{given.name} is --quantize {which}, and {asked[0].typed[0]} asks for another: leave one out"
            )
        return found

    return Alias(switch.becomes, words)


# Arguments of the trainer that take text: 12 is a name there.
_TEXT = ("run_name", "project", "optim_args", "log_level")


def trainer_argument(given: Given, name: str) -> list[str]:
    """Returns --train of a name to the value of an option."""
    value, rest = given.first, given.values[1:]
    if name == "optim_target_modules" and rest:
        value, rest = json.dumps(given.values), []
    if name in _TEXT and not isinstance(setting(f"x={value}")[1], str):
        value = json.dumps(value)
    return [f"--train={name}={value}", *rest]


def mixed_precision(dtype: str) -> Alias:
    """Returns the alias of --bf16 and --fp16."""

    def words(given: Given, typed: Typed) -> list[str]:
        if typed.options.get(given.name.replace("_", "-"), given).switch() is False:  # the last of them
            return []
        full, peft = typed.options.get("full"), typed.options.get("use-peft")
        every_weight = (full is not None and full.switch()) or (peft is not None and peft.switch() is False)
        if not every_weight or typed.command == "recipe":
            raise UsageError(
                f"--{given.name} is mixed precision, which goes with --full; with an adapter, --dtype {dtype} keeps "
                "the frozen weights in it, and the adapter stays float32"
            )
        for name in ("dtype", "torch-dtype", "bf16", "fp16"):
            other = typed.options.get(name)
            if other is None or name == given.name.replace("_", "-") or other.values[:1] == [dtype]:
                continue
            if name not in ("bf16", "fp16") or other.switch() is not False:
                raise UsageError(
                    f"--{given.name} is --dtype {dtype}, and {' '.join(other.typed)} asks for another: leave one of "
                    "them out"
                )
        return [f"--dtype={dtype}"]

    return Alias(f"`--dtype {dtype}`, with `--full`", words)


def level(given: Given, typed: Typed) -> list[str]:
    """Translates --importance_sampling_level, which the method implies here."""
    if "loss-type" in typed.options:
        return []  # read together with it
    by_sequence = given.values[:1] == ["sequence"]
    if typed.method not in (("gspo", "luspo") if by_sequence else {*POLICY_LOSS_TYPES} - {"luspo"}):
        raise UsageError(f"--{given.name}: the method says it here; sequence is --method gspo or luspo")
    return []


def epsilon(given: Given, typed: Typed) -> list[str]:
    """Translates --epsilon, which is one bound or both."""
    known = hyperparameters(typed.method, typed.command)
    if typed.method == "cispo":
        raise UsageError(f"--{given.name}: cispo is capped by --epsilon_high alone, here --set cap=…")
    if "eps_low" in known:
        # TRL's epsilon is both bounds unless epsilon_high is given.
        both = [] if "epsilon-high" in typed.options else set_words(given, "eps_high")
        return [*set_words(given, "eps_low"), *both]
    return hyperparameter("eps").words(given, typed)


def eval_strategy(given: Given, typed: Typed) -> list[str]:
    """Translates --eval_strategy."""
    value = given.first.lower()
    if value in FALSE:
        return ["--eval-split=0"]
    if value == "steps" and "eval-steps" in typed.options:
        return []
    raise UsageError(
        f"--{given.name} {value}: rows held out are evaluated before and after training, and every N steps by "
        "--eval-steps N; --eval-split 0 holds out none"
    )


def reward_funcs(given: Given, typed: Typed) -> list[str]:
    """Translates --reward_funcs of package.module.function into --reward."""
    found = []
    for name in given.values:
        module, _, function = name.rpartition(".")
        if ":" not in name and (not module or "/" in name):
            raise UsageError(
                f"--{given.name} {name}: expected package.module.function. A function of TRL's is "
                f"--reward trl.rewards:{name}, a model --reward-model {name}"
            )
        found.append(f"--reward={name}" if ":" in name else f"--reward={module}:{function}")
    return found


def hub_model_id(given: Given, typed: Typed) -> list[str]:
    """Translates --hub_model_id, the NAME of --push-to-hub."""
    push = typed.options.get("push-to-hub")
    if push is None:
        raise UsageError(f"--{given.name} is where --push-to-hub pushes: give that, too, or --push-to-hub NAME alone")
    return [] if push.switch() is False else [f"--push-to-hub={value}" for value in given.values]


def resume(given: Given, typed: Typed) -> list[str]:
    """Translates --resume_from_checkpoint."""
    if given.switch() is False:
        return []
    return ["--resume"] if given.switch() else [f"--resume={given.values[0]}", *given.values[1:]]


_PACKED = choices("`--layout packed`", true=["--layout=packed"], false=[])
_SAVES = "checkpoints are written every --save-steps steps, and --save-total-limit of them are kept"
_MODEL = "load it in Python (xpo_fast.models.load_model) and save it, then name the folder as --model"

ALIASES: dict[str, Alias] = {
    # The model.
    "model_name_or_path": renamed("model"),
    "torch_dtype": renamed("dtype"),
    "attn_implementation": renamed("attn"),
    "model_revision": accepted("main"),
    "use_peft": choices("`--lora`; false: `--full`", true=["--lora"], false=["--full"]),
    "lora_r": renamed("lora-rank"),
    "lora_target_modules": Alias(
        "`--lora-targets`, with commas between", lambda given, typed: [f"--lora-targets={','.join(given.values)}"]
    ),
    "lora_task_type": choices(
        "accepted as `CAUSAL_LM`", causal_lm=[], seq_cls="a value head is on a causal LM here: leave it out"
    ),
    "use_rslora": accepted("false", true="there is no rank-stabilised LoRA here; scale by --lora-alpha"),
    "use_dora": accepted("false", true="there is no DoRA here; leave it out"),
    "load_in_4bit": bits("4bit"),
    "load_in_8bit": bits("8bit"),
    "bnb_4bit_quant_type": accepted("nf4", fp4="--quantize 4bit is nf4"),
    "use_bnb_nested_quant": accepted("true", false="--quantize 4bit quantises the constants, too"),
    "bf16": mixed_precision("bfloat16"),
    "fp16": mixed_precision("float16"),
    # The data.
    "dataset_name": renamed("data"),
    "dataset_train_split": renamed("split"),
    "dataset_num_proc": renamed("num-proc"),
    "dataset_config": renamed("data-config"),
    "dataset_streaming": accepted("false", true="rows are mapped from disk, however many there are: leave it out"),
    "packing": _PACKED,
    "eval_packing": accepted("false", true="evaluations read rows in the layout of training: --layout packed"),
    "padding_free": _PACKED,
    "train_sampling_strategy": choices("`--group-by-length`", random=[], group_by_length=["--group-by-length"]),
    # Optimisation.
    "learning_rate": renamed("lr"),
    "num_train_epochs": renamed("epochs"),
    "per_device_train_batch_size": renamed("batch-size"),
    "per_device_eval_batch_size": renamed("eval-batch-size"),
    "gradient_accumulation_steps": renamed("grad-accum"),
    "lr_scheduler_type": renamed("scheduler"),
    "activation_checkpointing": renamed("gradient-checkpointing"),
    "activation_offloading": renamed("activation-offload"),
    "use_cpu": renamed("cpu"),
    "no_cuda": renamed("cpu"),
    # The method.
    "loss_type": Alias("`--method`, by the table below", as_method),
    "loss_weights": Alias("`--set weights=[…]`", lambda given, typed: [f"--set=weights=[{', '.join(given.values)}]"]),
    "importance_sampling_level": Alias("`--method gspo` or `luspo`", level),
    "precompute_ref_log_probs": choices("`--reference cached`", true=["--reference=cached"], false=[]),
    "use_weighting": Alias(
        "`--set wpo=true --set clamp=false`",  # WPO's weights are not clamped
        lambda given, _: [] if given.switch() is False else ["--set=wpo=true", "--set=clamp=false"],
    ),
    "f_divergence_type": accepted(
        "reverse_kl",
        **dict.fromkeys(
            ("forward_kl", "js_divergence", "alpha_divergence"), "it is --method f_dpo --set divergence=… here"
        ),
    ),
    "discopop_tau": hyperparameter("tau"),
    "desirable_weight": hyperparameter("lambda_d"),
    "undesirable_weight": hyperparameter("lambda_u"),
    "simpo_gamma": hyperparameter("gamma"),
    "center_rewards_coefficient": hyperparameter("center"),
    "epsilon": Alias("`--set eps=…`, or `eps_low`, `eps_high`", epsilon),
    "epsilon_high": hyperparameter("eps_high", "cap"),
    "delta": hyperparameter("delta", "dual_clip"),
    **{f"sapo_temperature_{side}": hyperparameter(f"tau_{side}") for side in ("pos", "neg")},
    **{f"vespo_{name}_{side}": hyperparameter(f"{name}_{side}") for name in ("k", "lambda") for side in ("pos", "neg")},
    "sync_ref_model": accepted("false", true="--set ref_mixin=X of xpo-fast rl moves the reference"),
    "teacher_model_name_or_path": renamed("teacher"),
    "lmbda": renamed("on-policy"),
    # Rewards and rollouts.
    "reward_funcs": Alias("`--reward`", reward_funcs),
    "reward_model_name_or_path": renamed("reward-model"),
    "max_completion_length": renamed("max-new-tokens"),
    "num_iterations": renamed("epochs-per-rollout"),
    "num_generations_eval": Alias("`--set eval_generations=…`", lambda given, _: set_words(given, "eval_generations")),
    "mask_truncated_completions": choices("`--overlong mask`", true=["--overlong=mask"], false=[]),
    "scale_rewards": choices(
        "`--advantage`",
        group=["--advantage=group"],
        true=["--advantage=group"],
        none=["--advantage=group_mean"],
        false=["--advantage=group_mean"],
        batch="see --advantage for its estimators",
    ),
    "num_completions_to_print": Alias("`--set show_samples=…`", lambda given, _: set_words(given, "show_samples")),
    "log_completions": choices("false: `--set show_samples=0`", true=[], false=["--set=show_samples=0"]),
    "use_transformers_continuous_batching": renamed("continuous-batching"),
    "use_vllm": accepted("false", true="--vllm; or start the server yourself: --server URL --server-lora DIR"),
    "vllm_server_base_url": renamed("server"),
    # Output.
    "resume_from_checkpoint": Alias("`--resume`", resume),
    "eval_strategy": Alias("`--eval-steps N`; no: `--eval-split 0`", eval_strategy),
    "save_strategy": accepted("steps", no=_SAVES, epoch=_SAVES, best=_SAVES),
    "logging_strategy": accepted("steps", no="--logging-steps N", epoch="--logging-steps N"),
    "hub_model_id": Alias("`--push-to-hub NAME`", hub_model_id),
    "hub_private_repo": renamed("hub-private"),
    "hub_strategy": accepted("every_save"),
    "do_train": accepted("true", false="--dry-run looks without training"),
    "do_eval": accepted("true", false="--eval-split 0 holds out no rows"),
    "do_predict": accepted("false", true="there is no test set here"),
    "remove_unused_columns": accepted("false", true="batches are made from columns of the data"),
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
    "cache_implementation",
    "vLLM is --vllm, or a server of its own, see --server and --server-lora": "vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_host vllm_server_port vllm_server_timeout "
    "vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
    "use_transformers_paged transformers_continuous_batching_config ds3_gather_for_generation",
    "importance weights against the sampler are --set off_policy=token or sequence, off_policy_mode=truncate or mask, "
    "off_policy_cap=…, off_policy_floor=…": "vllm_importance_sampling_correction vllm_importance_sampling_mode "
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap "
    "off_policy_mask_threshold use_bias_correction_kl",
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
    "pad_to_multiple_of precompute_ref_batch_size packing_strategy completion_only_loss "
    "assistant_only_loss max_tool_calling_iterations activation_checkpointing_kwargs bf16_full_eval fp16_full_eval "
    "torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps "
    "auto_find_batch_size logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
    "log_level_replica trackio_space_id trackio_bucket_id trackio_static_space_id eval_delay prediction_loss_only "
    "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "batch_eval_metrics save_on_each_node enable_jit_checkpoint hub_always_push hub_revision load_best_model_at_end "
    "metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint data_seed "
    "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order label_names "
    "length_column_name skip_memory_metrics",
}
REFUSED = {name: what for what, names in REFUSALS.items() for name in names.split()}


# The commands that take aliases: those with a trainer.
COMMANDS = ("train", "check", "reward", "rl", "recipe")

# Names of one thing: typing one of them overrides the others in a configuration.
_SYNONYMS = (
    *({"method", "loss-type"}, {"dtype", "torch-dtype", "bf16", "fp16"}, {"lora", "full", "use-peft"}),
    {"quantize", "load-in-4bit", "load-in-8bit"},
)


def overridden(name: str, typed: Typed) -> bool:
    """Returns whether an option of a configuration is overridden by one that was typed, perhaps by another name.

    A switch that is turned off overrides itself alone.
    """
    name = name.replace("_", "-")
    group = next((names for names in _SYNONYMS if name in names), set())
    given = [typed.options[other] for other in group if other in typed.options]
    return any(g.name.replace("_", "-") == name or g.switch() is not False for g in given)


def translate(given: Given, typed: Typed) -> list[str]:
    """Returns the words for an option that the command does not declare; the option itself if it is unknown."""
    name = given.name.replace("-", "_")
    if typed.command not in COMMANDS:
        return given.typed
    if name in TRAINER_ARGUMENTS:
        return trainer_argument(given, name)
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
        return set_words(given, name)
    return given.typed


def names(typed: Typed) -> tuple[str, ...]:
    """Returns the names that the command takes besides its own options, for suggestions."""
    if typed.command not in COMMANDS:
        return ()
    own = () if typed.command == "recipe" else hyperparameters(typed.method, typed.command)
    return (*own, *ALIASES, *(f"set {name}" for name in typed.parser.settings))
