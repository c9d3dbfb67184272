"""Options by the names of TRL's and transformers' configurations, and hyperparameters of the method as options.

An alias is accepted where it means here what it means there; else it is refused, by name, with what to use instead. Nothing is
read and then left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..wording import did_you_mean
from .options import OBJECTIVE_OPTIONS, TRAINER_ARGUMENTS, UsageError, setting
from .parser import FALSE, TRUE, Given, Parser, split

# Without hyperparameters of a method, and without a trainer: only their own options.
COMMANDS = ("train", "reward", "rl", "recipe")


@dataclass(frozen=True)
class Typed:
    """A command line around one of its options: the command, its parser, and everything that was typed."""

    command: str
    parser: Parser
    options: Mapping[str, Given]  # by name, with dashes

    def has(self, name: str) -> bool:
        return name in self.options

    @property
    def method(self) -> str:
        """The method that is asked for, in the names of this project."""
        if "loss-type" in self.options and not self.has("method"):
            words = _loss_type(self.options["loss-type"], self)
            return words[0].partition("=")[2]
        given = self.options.get("method")
        return given.values[0] if given and given.values else self.parser.get_default("method") or ""


@dataclass(frozen=True)
class Alias:
    """becomes: what it is here, in words. words: the options that it stands for; UsageError where it cannot be honoured."""

    becomes: str
    words: Callable[[Given, Typed], list[str]]


def around(command: str, parser: Parser, words: Iterable[str]) -> Typed:
    """Return the command line as the aliases see it: of an option that came twice the last one."""
    found: dict[str, Given] = {}
    for given in split(list(words)):
        if isinstance(given, Given):
            name = given.name.replace("_", "-")
            if parser.negated(given.name) is not None:
                name, given = name[3:], Given(name[3:], "false", [])
            found[name] = given
    return Typed(command, parser, found)


# Names for one thing: where one of them is typed, what a configuration says by another is answered.
_ONE_THING = (
    {"method", "loss-type"},
    {"dtype", "torch-dtype", "bf16", "fp16"},
    {"lora", "full", "use-peft"},
)


def answered(name: str, typed: Typed) -> bool:
    """Return whether an option of a configuration is answered by one that was typed, by another name, too.

    A switch that is turned off answers itself alone.
    """
    name = name.replace("_", "-")
    group = next((names for names in _ONE_THING if name in names), set())
    given = [typed.options[other] for other in group if typed.has(other)]
    return any(g.name.replace("_", "-") == name or g.switch() is not False for g in given)


def translate(given: Given, typed: Typed) -> list[str]:
    """Return the words for an option that the command does not declare; itself, where nobody knows it."""
    name = given.name.replace("-", "_")
    if typed.command not in COMMANDS:
        return given.typed
    if name in TRAINER_ARGUMENTS:
        return _trainer_argument(given, name)
    alias = ALIASES.get(name)
    if alias is not None:
        return alias.words(given, typed)
    if name in _REFUSED:
        raise UsageError(f"--{given.name} is not an option of xpo-fast {typed.command}: {_REFUSED[name]}")
    if typed.command != "recipe" and name in hyperparameters(typed.method, typed.command):
        return _set(given, name)
    return given.typed


def hyperparameters(method: str, command: str) -> tuple[str, ...]:
    """Return the names that the method takes as --set; none where there is no such method."""
    from ..methods import METHODS

    names = [part.partition("*")[2] or part for part in method.replace(" ", "").split("+")]
    own = [name for part in names if part in METHODS for name in METHODS[part].defaults]
    return (*dict.fromkeys(own), *(OBJECTIVE_OPTIONS if command == "train" else ()))


# --- kinds of aliases ---------------------------------------------------------------------------------------------


def _renamed(option: str) -> Alias:
    def words(given: Given, typed: Typed) -> list[str]:
        if typed.parser.named(option) is None:
            raise UsageError(f"--{given.name} is --{option} of other commands; xpo-fast {typed.command} has none")
        return Given(option, given.value, given.words).typed

    return Alias(f"`--{option}`", words)


def _joined(option: str) -> Alias:
    def words(given: Given, typed: Typed) -> list[str]:
        return [f"--{option}={','.join(given.values)}"]

    return Alias(f"`--{option}`, with commas between", words)


def _choices(what: str, **words_by_value: list[str] | str) -> Alias:
    """For an option of few values: the words for each, or why it is refused. `true` and `false` stand for a switch."""

    def words(given: Given, typed: Typed) -> list[str]:
        value = (given.values[0] if given.values else "true").lower()
        value = "true" if value in TRUE else "false" if value in FALSE and "no" not in words_by_value else value
        found = words_by_value.get(value, f"it is not known here; expected {', '.join(words_by_value)}")
        if isinstance(found, str):
            raise UsageError(f"--{given.name} {value}: {found}")
        return [*found, *given.values[1:]]

    return Alias(what, words)


def _hyperparameter(*names: str) -> Alias:
    def words(given: Given, typed: Typed) -> list[str]:
        known = hyperparameters(typed.method, typed.command)
        found = next((name for name in names if name in known), None)
        if found is None:
            raise UsageError(
                f"--{given.name}: {typed.method} has no hyperparameter {' or '.join(names)}; it has "
                f"{', '.join(known) or 'none'}"
            )
        return _set(given, found)

    return Alias(" or ".join(f"`--set {name}=…`" for name in names), words)


def _set(given: Given, name: str) -> list[str]:
    value = given.values[0] if len(given.values) == 1 else json.dumps([setting(f"x={v}")[1] for v in given.values])
    if not given.values:
        value = "true"
    return [f"--set={name}={value}"]


# Arguments of the trainer that take text: 12 is a name there.
_TEXT = ("run_name", "project", "optim_args", "log_level")


def _trainer_argument(given: Given, name: str) -> list[str]:
    value = given.values[0] if given.values else "true"
    if name in _TEXT and not isinstance(setting(f"x={value}")[1], str):
        value = json.dumps(value)
    return [f"--train={name}={value}", *given.values[1:]]


# --- aliases of their own kind ------------------------------------------------------------------------------------


def _half(dtype: str) -> Alias:
    def words(given: Given, typed: Typed) -> list[str]:
        if typed.options.get(given.name.replace("_", "-"), given).switch() is False:  # the last of them
            return []
        full, peft = typed.options.get("full"), typed.options.get("use-peft")
        every_weight = (full is not None and full.switch()) or (peft is not None and peft.switch() is False)
        if not every_weight or typed.command == "recipe":
            raise UsageError(
                f"--{given.name} is mixed precision, which goes with --full; with an adapter, --dtype {dtype} keeps the frozen "
                "weights in it, and the adapter stays float32"
            )
        for name in ("dtype", "torch-dtype", "bf16", "fp16"):
            other = typed.options.get(name)
            if other is None or name == given.name.replace("_", "-") or other.values[:1] == [dtype]:
                continue
            if name not in ("bf16", "fp16") or other.switch() is not False:
                raise UsageError(
                    f"--{given.name} is --dtype {dtype}, and {' '.join(other.typed)} asks for another: leave one of them out"
                )
        return [f"--dtype={dtype}"]

    return Alias(f"`--dtype {dtype}`, with `--full`", words)


# Loss types of TRL beyond those of its DPOTrainer that integrations/liger/pairs.py names: DPO's, KTO's, CPO's and SFT's.
_FURTHER_LOSS_TYPES = {
    "sigmoid_norm": "dpo_norm", "aot": "aot", "aot_unpaired": "aot_unpaired", "sft": "sft", "kto": "kto",
    "apo_zero_unpaired": "apo_zero_unpaired", "simpo": "simpo", "nll": "sft",
}  # fmt: skip
_POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def loss_types() -> dict[str, str]:
    """Return the method of each loss type of TRL's trainers on preferences, as docs/conversions.md has them."""
    from ..integrations.liger.pairs import DPO_METHODS

    return {**DPO_METHODS, **_FURTHER_LOSS_TYPES}


def _loss_type(given: Given, typed: Typed) -> list[str]:
    if typed.has("method"):
        raise UsageError(f"--{given.name} and --method both say what the loss is: leave one out")
    names = given.values
    if typed.command == "rl":
        known = {name: name for name in _POLICY_LOSS_TYPES}
    else:
        from ..methods import METHODS

        known = {name: name for name in METHODS} | loss_types()
    for name in names:
        if name not in known:
            raise UsageError(f"--{given.name}: no loss type named {name!r}{did_you_mean(name, known)}")
    level = typed.options.get("importance-sampling-level")
    if level is not None and names:
        by_sequence = level.values[:1] == ["sequence"]
        if by_sequence and names[0] not in ("grpo", "luspo"):
            raise UsageError(f"--{level.name} sequence goes with --loss_type grpo or luspo, got {names[0]}")
        if not by_sequence and names[0] == "luspo":
            raise UsageError(f"--{level.name} token: luspo has the ratio of a sequence")
        known = {**known, "grpo": "gspo"} if by_sequence else known
    found = [f"--method={' + '.join(known[name] for name in names)}"]
    if "sppo_hard" in names:
        found.append("--set=variant=hard")
    return found


def _level(given: Given, typed: Typed) -> list[str]:
    if typed.has("loss-type"):
        return []  # read together with it
    wanted = ("gspo", "luspo") if given.values[:1] == ["sequence"] else _POLICY_LOSS_TYPES
    if typed.method not in wanted or (
        (typed.method == "luspo") != (given.values[:1] == ["sequence"]) and typed.method != "gspo"
    ):
        raise UsageError(f"--{given.name}: the method says it here; sequence is --method gspo or luspo")
    return []


def _epsilon(given: Given, typed: Typed) -> list[str]:
    known = hyperparameters(typed.method, typed.command)
    if typed.method == "cispo":
        raise UsageError(f"--{given.name}: cispo is capped by --epsilon_high alone, here --set cap=…")
    if "eps_low" in known:
        # TRL's epsilon is both bounds unless epsilon_high is given.
        both = [] if typed.has("epsilon-high") else _set(given, "eps_high")
        return [*_set(given, "eps_low"), *both]
    return _hyperparameter("eps").words(given, typed)


def _eval_strategy(given: Given, typed: Typed) -> list[str]:
    value = given.values[0].lower() if given.values else ""
    if value in FALSE:
        return ["--eval-split=0"]
    if value == "steps" and typed.has("eval-steps"):
        return []
    raise UsageError(
        f"--{given.name} {value}: rows held out are evaluated before and after training, and every N steps by "
        "--eval-steps N; --eval-split 0 holds out none"
    )


def _reward_funcs(given: Given, typed: Typed) -> list[str]:
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


def _hub_model_id(given: Given, typed: Typed) -> list[str]:
    push = typed.options.get("push-to-hub")
    if push is None:
        raise UsageError(f"--{given.name} is where --push-to-hub pushes: give that, too, or --push-to-hub NAME alone")
    return [] if push.switch() is False else [f"--push-to-hub={value}" for value in given.values]


def _resume(given: Given, typed: Typed) -> list[str]:
    if given.switch() is False:
        return []
    return ["--resume"] if given.switch() else [f"--resume={given.values[0]}", *given.values[1:]]


def _use_weighting(given: Given, typed: Typed) -> list[str]:
    return [] if given.switch() is False else ["--set=wpo=true", "--set=clamp=false"]


_NO_LAYOUTS = (
    "packed layouts do not exist yet: --group-by-length makes batches of rows of like length, with less padding"
)
_SAVES = "checkpoints are written every --save-steps steps, and --save-total-limit of them are kept"
_MODEL = "load it in Python (xpo_fast.models.load_model) and save it, then name the folder as --model"

ALIASES: dict[str, Alias] = {
    # The model.
    "model_name_or_path": _renamed("model"),
    "torch_dtype": _renamed("dtype"),
    "attn_implementation": _renamed("attn"),
    "model_revision": _choices("accepted as `main`", main=[]),
    "use_peft": _choices("`--lora`; false: `--full`", true=["--lora"], false=["--full"]),
    "lora_r": _renamed("lora-rank"),
    "lora_target_modules": _joined("lora-targets"),
    "lora_task_type": _choices("accepted as `CAUSAL_LM`", causal_lm=[], seq_cls="a value head is on a causal LM here: leave it out"),
    "use_rslora": _choices("accepted as false", false=[], true="there is no rank-stabilised LoRA here; scale by --lora-alpha"),
    "use_dora": _choices("accepted as false", false=[], true="there is no DoRA here; leave it out"),
    "bnb_4bit_quant_type": _choices("accepted as `nf4`", nf4=[], fp4="--load-in-4bit is nf4"),
    "use_bnb_nested_quant": _choices("accepted as true", true=[], false="--load-in-4bit quantises the constants, too"),
    "bf16": _half("bfloat16"),
    "fp16": _half("float16"),
    # The data.
    "dataset_name": _renamed("data"),
    "dataset_train_split": _renamed("split"),
    "dataset_num_proc": _renamed("num-proc"),
    "dataset_config": _renamed("data-config"),
    "dataset_streaming": _choices("accepted as false", false=[], true="rows are mapped from disk, however many there are: leave it out"),
    "packing": _choices("accepted as false", false=[], true=_NO_LAYOUTS),
    "eval_packing": _choices("accepted as false", false=[], true=_NO_LAYOUTS),
    "padding_free": _choices("accepted as false", false=[], true=_NO_LAYOUTS),
    "train_sampling_strategy": _choices("`--group-by-length`", random=[], group_by_length=["--group-by-length"]),
    # Optimisation.
    "learning_rate": _renamed("lr"),
    "num_train_epochs": _renamed("epochs"),
    "per_device_train_batch_size": _renamed("batch-size"),
    "per_device_eval_batch_size": _renamed("eval-batch-size"),
    "gradient_accumulation_steps": _renamed("grad-accum"),
    "lr_scheduler_type": _renamed("scheduler"),
    "activation_checkpointing": _renamed("gradient-checkpointing"),
    "use_cpu": _renamed("cpu"),
    "no_cuda": _renamed("cpu"),
    # The method.
    "loss_type": Alias("`--method`, by the table below", _loss_type),
    "loss_weights": Alias(
        "`--set weights=[…]`", lambda given, typed: [f"--set=weights=[{', '.join(given.values)}]"]
    ),
    "importance_sampling_level": Alias("`--method gspo` or `luspo`", _level),
    "precompute_ref_log_probs": _choices("`--reference cached`", true=["--reference=cached"], false=[]),
    "use_weighting": Alias("`--set wpo=true --set clamp=false`", _use_weighting),
    "f_divergence_type": _choices(
        "accepted as `reverse_kl`", reverse_kl=[],
        **dict.fromkeys(("forward_kl", "js_divergence", "alpha_divergence"), "it is --method f_dpo --set divergence=… here"),
    ),
    "discopop_tau": _hyperparameter("tau"),
    "desirable_weight": _hyperparameter("lambda_d"),
    "undesirable_weight": _hyperparameter("lambda_u"),
    "simpo_gamma": _hyperparameter("gamma"),
    "center_rewards_coefficient": _hyperparameter("center"),
    "epsilon": Alias("`--set eps=…`, or `eps_low`, `eps_high`", _epsilon),
    "epsilon_high": _hyperparameter("eps_high", "cap"),
    "delta": _hyperparameter("delta", "dual_clip"),
    **{f"sapo_temperature_{side}": _hyperparameter(f"tau_{side}") for side in ("pos", "neg")},
    **{f"vespo_{name}_{side}": _hyperparameter(f"{name}_{side}") for name in ("k", "lambda") for side in ("pos", "neg")},
    "sync_ref_model": _choices("accepted as false", false=[], true="--ref-mixin of xpo-fast rl moves the reference"),
    # Rewards and rollouts.
    "reward_funcs": Alias("`--reward`", _reward_funcs),
    "reward_model_name_or_path": _renamed("reward-model"),
    "max_completion_length": _renamed("max-new-tokens"),
    "num_iterations": _renamed("epochs-per-rollout"),
    "num_generations_eval": _renamed("eval-generations"),
    "mask_truncated_completions": _choices("`--overlong mask`", true=["--overlong=mask"], false=[]),
    "scale_rewards": _choices(
        "`--advantage`", group=["--advantage=group"], true=["--advantage=group"], none=["--advantage=group_mean"],
        false=["--advantage=group_mean"], batch="see --advantage for what there is",
    ),
    "num_completions_to_print": _renamed("show-samples"),
    "log_completions": _choices("false: `--show-samples 0`", true=[], false=["--show-samples=0"]),
    "use_transformers_continuous_batching": _renamed("continuous-batching"),
    "use_vllm": _choices("accepted as false", false=[], true="start the server yourself and name it, --server URL --server-lora DIR"),
    "vllm_server_base_url": _renamed("server"),
    # Output.
    "resume_from_checkpoint": Alias("`--resume`", _resume),
    "eval_strategy": Alias("`--eval-steps N`; no: `--eval-split 0`", _eval_strategy),
    "save_strategy": _choices("accepted as `steps`", steps=[], no=_SAVES, epoch=_SAVES, best=_SAVES),
    "logging_strategy": _choices("accepted as `steps`", steps=[], no="--logging-steps N", epoch="--logging-steps N"),
    "hub_model_id": Alias("`--push-to-hub NAME`", _hub_model_id),
    "hub_private_repo": _renamed("hub-private"),
    "hub_strategy": _choices("accepted as `every_save`", every_save=[]),
    "do_train": _choices("accepted as true", true=[], false="--dry-run looks without training"),
    "do_eval": _choices("accepted as true", true=[], false="--eval-split 0 holds out no rows"),
    "do_predict": _choices("accepted as false", false=[], true="there is no test set here"),
    "remove_unused_columns": _choices("accepted as false", false=[], true="batches are made from columns of the data"),
}  # fmt: skip

# What TRL and transformers have and these commands do not, by what to do about it.
_REFUSALS = {
    "use --eval-data FILE, or --eval-split for rows of --data": "dataset_test_split",
    "give a folder that datasets.load_dataset reads, or a file, as --data": "dataset_text_field dataset_kwargs",
    "prompts lose their beginning, completions their end; --max-prompt-length bounds the first": "truncation_mode",
    _MODEL: "model_init_kwargs lora_target_parameters lora_modules_to_save bnb_4bit_quant_storage cast_lm_head_to_fp32 "
    "router_aux_loss_coef disable_dropout chat_template_path eos_token pad_token ignore_bias_buffers",
    "write the weight behind the function: --reward FILE.py:FUNCTION=WEIGHT": "reward_weights multi_objective_aggregation",
    "--prompts-per-rollout N says how many prompts a rollout has": "steps_per_generation",
    "write --method f_dpo --set divergence=alpha --set alpha=1−X": "f_alpha_divergence_coef",
    "its term is a mean over the batch's tokens: add sft, as in --method 'simpo + 1.0*sft'": "cpo_alpha",
    "--ref-mixin SHARE of xpo-fast rl moves the reference after every rollout": "ref_model_mixup_alpha ref_model_sync_steps",
    "samplers have --temperature, --top-p and --top-k": "min_p generation_kwargs repetition_penalty cache_implementation "
    "chat_template_kwargs",
    "vLLM is a server of its own here, see --server and --server-lora": "vllm_mode vllm_model_impl vllm_enable_sleep_mode "
    "vllm_structured_outputs_regex vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
    "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size use_transformers_paged "
    "transformers_continuous_batching_config ds3_gather_for_generation",
    "importance weights against the sampler are --off-policy and --off-policy-cap": "vllm_importance_sampling_correction "
    "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
    "vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl",
    "the method's own entropy term is --set entropy_coef=…": "top_entropy_quantile use_adaptive_entropy entropy_coef_min "
    "entropy_coef_max entropy_coef_delta entropy_target",
    "every completion is in samples.jsonl": "log_multimodal log_unique_prompts log_completions_hub_repo",
    "advantages are whitened by --advantage batch": "normalize_advantages reward_clip_range",
    "set HF_TOKEN, or log in with `hf auth login`: a token on the command line can be read by others": "hub_token",
    "configure it with `accelerate config`, and start the command by `accelerate launch -m xpo_fast.cli`": "fsdp fsdp_config "
    "deepspeed accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend local_rank",
    "the loss is computed without logits already; leave it out": "use_liger_kernel liger_kernel_config use_cache "
    "average_tokens_across_devices",
    "label smoothing is the method's: --set label_smoothing=…": "label_smoothing_factor",
    "leave it out, or train from Python: xpo_fast.trainer.XPOConfig and XPOTrainer": "shuffle_dataset pad_to_multiple_of "
    "precompute_ref_batch_size activation_offloading packing_strategy completion_only_loss assistant_only_loss "
    "max_tool_calling_iterations activation_checkpointing_kwargs bf16_full_eval fp16_full_eval torch_compile "
    "torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size "
    "logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level_replica "
    "trackio_space_id trackio_bucket_id trackio_static_space_id eval_delay prediction_loss_only eval_on_start "
    "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "save_on_each_node enable_jit_checkpoint hub_always_push hub_revision load_best_model_at_end metric_for_best_model "
    "greater_is_better ignore_data_skip restore_callback_states_from_checkpoint data_seed dataloader_drop_last "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order label_names length_column_name skip_memory_metrics "
    "optim_target_modules",
}  # fmt: skip
_REFUSED = {name: what for what, names in _REFUSALS.items() for name in names.split()}


def names(typed: Typed) -> tuple[str, ...]:
    """Return what the command takes beside its own options."""
    if typed.command not in COMMANDS:
        return ()
    own = () if typed.command == "recipe" else hyperparameters(typed.method, typed.command)
    return (*own, *(name for name in ALIASES))
