"""A stand-in for vLLM: the classes and signatures that VLLMRollout meets, as vLLM 0.11 to 0.15 document them.

It samples by a model of transformers on the CPU. What vLLM would lose asleep is lost here too: level 2 overwrites the
weights, the KV cache must be woken before sampling, and keys of other weights must not be left in the prefix cache.
"""

from __future__ import annotations

import copy
import os
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers

from xpo_fast.models.lm_head import causal_lm
from xpo_fast.rollout import GenerateRollout, Sampling


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


class Worker:
    """What a function of collective_rpc is called with."""

    def __init__(self, model: Any) -> None:
        self.model_runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load_weights))
        self.model = model

    def load_weights(self, weights: Any) -> set[str]:
        own = dict(self.model.named_parameters())
        given = dict(weights)
        assert given.keys() <= own.keys(), f"there is no parameter {given.keys() - own.keys()}"
        with torch.no_grad():
            for name, x in given.items():
                own[name].copy_(x)
        return set(given)

    def reload_weights(self) -> None:
        self.load_weights(transformers.AutoModelForCausalLM.from_pretrained(LLM.made[-1].folder).named_parameters())


class LLM:
    """vllm.LLM(model, *, …, **kwargs); kwargs are those of EngineArgs."""

    made: list[LLM] = []  # noqa: RUF012
    tokenizer: Any = None
    finish: str | None = None  # in place of the true reason

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        max_model_len: int | None = None,
        enable_sleep_mode: bool = False,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        max_loras: int = 1,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        distributed_executor_backend: str | None = None,
    ) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and enable_sleep_mode
        self.folder, self.max_model_len, self.mode = model, max_model_len, logprobs_mode
        self.memory, self.lora_rank = gpu_memory_utilization, max_lora_rank if enable_lora else None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.worker, self.awake, self.calls = Worker(self.model), {"weights", "kv_cache"}, []
        self.cached: list[int] = []  # versions of the weights that the prefix cache has keys of
        self.version = self.level = 0
        LLM.made.append(self)

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")
        self.awake, self.cached, self.level = set(), [], level
        if level == 2:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.fill_(torch.nan)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {' '.join(tags or ['all'])}")
        self.awake |= set(tags or ("weights", "kv_cache"))

    def reset_prefix_cache(self) -> bool:
        self.cached = []
        return True

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        assert "weights" in self.awake, "weights are written into memory that is not there"
        self.calls.append(method if isinstance(method, str) else method.__name__.strip("_"))
        self.version += 1
        call = getattr(self.worker, method) if isinstance(method, str) else lambda *a, **k: method(self.worker, *a, **k)
        return [call(*args, **(kwargs or {}))]

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert self.awake == {"weights", "kv_cache"}, f"sampled while only {self.awake} is awake"
        assert isinstance(sampling_params, list) and len(sampling_params) == len(prompts) and not use_tqdm
        assert self.mode == "processed_logprobs" and set(self.cached) <= {self.version}
        self.cached.append(self.version)
        self.calls.append(f"generate {len(prompts)}")
        model = self.model
        if lora_request is not None:
            assert self.lora_rank is not None and lora_request.lora_int_id > 0
            model = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), lora_request.lora_path)
            assert model.peft_config["default"].r <= self.lora_rank
        return [self._one(model, p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, model: Any, ids: list[int], params: SamplingParams) -> RequestOutput:
        assert params.n == 1 and params.max_tokens is not None and len(ids) + params.max_tokens <= self.max_model_len
        assert params.detokenize or not params.stop, "stop strings need detokenize"
        sampling = Sampling(
            params.max_tokens, params.temperature, params.top_p, params.top_k or None, tuple(params.stop or ())
        )
        causal_lm(model).generation_config = transformers.GenerationConfig(eos_token_id=params.stop_token_ids)
        rollout = GenerateRollout(model, LLM.tokenizer)
        found = rollout.generate([LLM.tokenizer.decode(ids)], sampling=sampling, seed=params.seed)
        assert found.prompt_ids == [ids]
        new, logprobs = found.completion_ids[0], None
        if params.logprobs is not None:
            assert found.logps is not None
            logprobs = [{i: Logprob(x, 1)} for i, x in zip(new, found.logps[0], strict=True)]
        text = found.completions[0] if params.detokenize else ""
        output = CompletionOutput(0, text, new, None, logprobs, LLM.finish or found.finish[0])
        return RequestOutput(ids, [output])


def install(monkeypatch: Any, tokenizer: Any) -> type[LLM]:
    """Puts the stand-in where vLLM would be; returns its LLM."""
    vllm, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "tokenizer", tokenizer)
    return LLM
