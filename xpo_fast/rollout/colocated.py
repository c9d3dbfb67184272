"""VLLMRollout: completions from a vLLM engine in the trainer's own process and on its device, asleep while training."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..models import positions
from ..models.lm_head import causal_lm, unwrapped
from ..seeds import seed_at
from .sampling import (
    FINISHES,
    Generated,
    Prompt,
    Request,
    RolloutError,
    Samples,
    Sampling,
    as_samples,
    eos_ids,
    requests,
)

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for, as max_lora_rank


class VLLMRollout:
    """Sampler by `vllm.LLM` on the trainer's GPU, whose weights follow the policy and which sleeps while it is trained.

        rollout = VLLMRollout("HuggingFaceTB/SmolLM2-135M-Instruct", tokenizer, memory=0.3)

    name: the base model's folder or name of the hub, which vLLM loads at the first `generate` after an `update`.
    memory: share of the device's memory that vLLM may take while it is awake.
    max_model_len: longest prompt and answer together, in tokens; None: the model's positions.
    level: how it sleeps. 1 keeps the weights in the CPU's memory; 2 drops them, and every awakening reloads the file
        and gives it the policy's: for a whole model alone, an adapter's base would be gone.
    engine: further arguments of `vllm.LLM`. chat_template_kwargs: variables of the chat template for every prompt; a
        prompt's own come first.

    `update` only notes the policy; the next `generate` wakes the weights, sends the policy's where it has changed,
    wakes the KV cache, samples and sleeps again. A whole model's parameters are loaded in place (load_weights on the
    worker); a LoRA adapter is saved into a temporary folder and loaded from there as a LoRARequest of its own. A
    completion is one request, its seed from (seed, prompt, copy). `Samples.logps` are those of the draws as made:
    temperature and cuts included (logprobs_mode="processed_logprobs"); None for temperature 0. The engine runs in this
    process (VLLM_ENABLE_V1_MULTIPROCESSING=0); with several processes each has one of its own, by torchrun's launch.

    Written for vLLM 0.11 and later, by its documentation: LLM(enable_sleep_mode=…), sleep(level), wake_up(tags),
    collective_rpc. It is tested against a stand-in with these signatures.

    Raises ImportError where vLLM is missing; ValueError for another level, for generate before the first `update`, for
    a prompt that leaves no room for an answer within max_model_len, and for an adapter that vLLM does not apply (other
    than LoRA, DoRA, biases, whole modules beside it); RolloutError if a completion ends otherwise than by a stop or its
    length.
    """

    logps_as_drawn = True

    def __init__(
        self,
        name: str | Path,
        tokenizer: Any,
        *,
        memory: float = 0.3,
        max_model_len: int | None = None,
        level: int = 1,
        engine: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if level not in (1, 2):
            raise ValueError(f"expected level 1 (weights in the CPU's memory) or 2 (dropped), got {level!r}")
        if not 0 < memory < 1:
            raise ValueError(f"expected memory between 0 and 1, a share of the device's, got {memory!r}")
        # Before vLLM is imported: its workers must share this process for tensors to reach them as they are.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._vllm = _import_vllm()
        self.name, self.tokenizer, self.level = str(name), tokenizer, level
        self.memory, self.max_model_len, self.engine = memory, max_model_len, dict(engine or {})
        self.chat_template_kwargs = data.read_kwargs(chat_template_kwargs, "VLLMRollout")
        self._llm: Any = None
        self._policy: Any = None
        self._stale, self._updates = True, 0
        self._lora: Any = None
        self._folder = Path(tempfile.mkdtemp(prefix="xpo-fast-adapters-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def update(self, model: Any) -> None:
        """Samples from this model's weights from now on, as they are at the next `generate`."""
        policy = unwrapped(model)
        if hasattr(policy, "get_base_model"):
            _check_adapter(policy, self.level)
        if self._llm is not None and hasattr(policy, "get_base_model") != hasattr(self._policy, "get_base_model"):
            raise ValueError("vLLM was started for one of a whole model and an adapter, and is given the other")
        self._policy, self._stale = policy, True

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt, those of a prompt side by side."""
        if self._policy is None:
            raise ValueError("there is no policy to sample from: call update(model) first")
        limit = self.max_model_len or positions(self._policy)
        eos = eos_ids(self.tokenizer, self._policy)
        asked = requests(prompts, n, seed, self.tokenizer, sampling, limit, self.chat_template_kwargs)
        if not asked:
            return as_samples([], [], self.tokenizer, sampling, eos)
        self._wake()
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": request.ids} for request in asked],
                [self._params(request, sampling, seed, eos) for request in asked],
                use_tqdm=False,
                lora_request=self._lora,
            )
        finally:
            self._sleep()
        if len(outputs) != len(asked):
            raise RolloutError(f"vLLM answered {len(outputs)} of {len(asked)} requests")
        generated = [_read(output.outputs[0]) for output in outputs]
        return as_samples(asked, generated, self.tokenizer, sampling, eos)

    def _params(self, request: Request, sampling: Sampling, seed: int, eos: set[int]) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            max_tokens=request.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=seed_at(seed, *request.place),
            stop=list(sampling.stop) or None,
            stop_token_ids=sorted(eos),
            logprobs=0 if sampling.temperature > 0 else None,  # 0: the drawn token's alone
            detokenize=bool(sampling.stop),
        )

    def _wake(self) -> None:
        """Wakes the engine, with the policy's weights in it; starts it first, if there is none yet."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainer has cached, vLLM can take
        adapted = hasattr(self._policy, "get_base_model")
        if self._llm is None:
            self._llm = self._vllm.LLM(**self._engine(adapted))
        else:
            self._llm.wake_up(tags=["weights"])
            if self.level == 2:
                self._llm.collective_rpc("reload_weights")
            if self._stale or self.level == 2:
                # Keys and values of the weights before.
                self._llm.reset_prefix_cache()
        if adapted and self._stale:
            self._save_adapter()
        elif not adapted and (self._stale or self.level == 2):
            weights = [(name, x.detach()) for name, x in _parameters(self._policy)]
            self._llm.collective_rpc(_load, args=(weights,))
        self._stale = False
        self._llm.wake_up(tags=["kv_cache"])

    def _sleep(self) -> None:
        self._llm.sleep(level=self.level)

    def _engine(self, adapted: bool) -> dict[str, Any]:
        """Returns the arguments of `vllm.LLM`."""
        lm = causal_lm(self._policy)
        found: dict[str, Any] = {
            "model": self.name,
            "dtype": str(next(lm.parameters()).dtype).removeprefix("torch."),
            "gpu_memory_utilization": self.memory,
            "max_model_len": self.max_model_len or positions(lm),
            "enable_sleep_mode": True,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # no defaults of the model's for sampling
        }
        if adapted:
            config = next(iter(self._policy.peft_config.values()))
            ranks = [config.r, *(config.rank_pattern or {}).values()]
            rank = next((r for r in _RANKS if r >= max(ranks)), None)
            if rank is None:
                raise ValueError(f"vLLM applies adapters of rank {_RANKS[-1]} at most, got {max(ranks)}")
            found |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found["distributed_executor_backend"] = "external_launcher"
        return found | self.engine

    def _save_adapter(self) -> None:
        from vllm.lora.request import LoRARequest

        self._updates += 1  # an id of its own, or vLLM would keep the adapter that it has
        folder = self._folder / f"policy-{self._updates}"
        self._policy.save_pretrained(folder)
        if self._lora is not None:
            shutil.rmtree(self._lora.lora_path, ignore_errors=True)
        self._lora = LoRARequest(folder.name, self._updates, str(folder))


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "VLLMRollout samples by vLLM, which is not installed: pip install vllm, or sample by the model itself "
            "(GenerateRollout) or from a server (ServerRollout)"
        ) from error
    return vllm


def _check_adapter(policy: Any, level: int) -> None:
    """Raises ValueError for an adapter that vLLM would not apply, or not all of."""
    if level == 2:
        raise ValueError("level=2 drops the weights, and only an adapter's are sent again: use level=1")
    for config in policy.peft_config.values():
        if config.peft_type != "LORA":
            raise ValueError(f"vLLM applies LoRA adapters, got {config.peft_type}")
        for name, idle in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("lora_bias", False)):
            if (getattr(config, name, idle) or idle) != idle:
                raise ValueError(
                    f"vLLM does not apply a LoRA adapter with {name}={getattr(config, name)!r}: leave it out, or train "
                    "the whole model"
                )


def _parameters(policy: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Yields the parameters of a causal LM under the names of its checkpoint; a critic's value head is none of them."""
    ignored = set(getattr(policy, "_keys_to_ignore_on_save", None) or ())
    return ((name, x) for name, x in policy.named_parameters() if name not in ignored)


def _load(worker: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
    """Loads weights in place, on a worker of vLLM."""
    worker.model_runner.model.load_weights(weights)


def _read(one: Any) -> Generated:
    """Reads vLLM's CompletionOutput."""
    ids, finish = [int(i) for i in one.token_ids], one.finish_reason
    if finish not in FINISHES:
        raise RolloutError(f"vLLM ended a completion by {finish!r} and not by a stop or its length")
    logps = None if one.logprobs is None else [float(at[i].logprob) for i, at in zip(ids, one.logprobs, strict=True)]
    return Generated(ids, finish, logps)
