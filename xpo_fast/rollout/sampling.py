"""Types that all samplers share: prompts, sampling settings and samples, and their conversion to and from token ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import data
from ..models.lm_head import causal_lm

Prompt = str | list[dict[str, Any]]

FINISHES = ("stop", "length")


class RolloutError(RuntimeError):
    """Raised when completions cannot be had: a server does not answer, or the model's logits are not finite."""


@dataclass(frozen=True)
class Sampling:
    """Settings that completions are drawn with.

    max_new_tokens: longest completion in tokens, its EOS counted. temperature: divides the logits; 0 takes the most
        likely token. top_p, top_k: keep only the most likely tokens; 1 and None keep all. stop: texts that end a
        completion; the tokens that spell one stay among its ids, its text ends before it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"expected stop to be texts that are not empty, ('text', …), got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not (type(self.max_new_tokens) is int and self.max_new_tokens >= 1):
            raise ValueError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens!r}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"expected a temperature of 0 (greedy) or more, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected top_p in (0, 1], got {self.top_p!r}")
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise ValueError(f"expected top_k of at least 1, or None for all tokens, got {self.top_k!r}")


@dataclass
class Samples:
    """R = prompts × n completions, those of a prompt side by side."""

    prompts: list[Prompt]  # of each row
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]  # with the EOS that ended each
    completions: list[Any]  # str, or [{"role": "assistant", "content": …}] where the prompt is messages
    finish: list[str]  # "stop" (EOS or a stop string) or "length" (truncated)
    logps: list[list[float]] | None = None  # the sampler's own log-prob of each token, if it reports them

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            held = getattr(self, f.name)
            if held is not None and len(held) != len(self.prompts):
                raise ValueError(f"expected {f.name} of {len(self.prompts)} samples, got {len(held)}")
        if set(self.finish) - set(FINISHES):
            raise ValueError(f"expected finish to be {' or '.join(FINISHES)}, got {sorted(set(self.finish))}")
        if self.logps is not None and [*map(len, self.logps)] != [*map(len, self.completion_ids)]:
            raise ValueError("expected a log-prob for each token of a completion")

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Iterable[int]) -> Samples:
        """Returns the samples at these rows, in this order."""
        at = list(rows)
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Samples(**{k: v and [v[i] for i in at] for k, v in fields.items()})

    @property
    def lengths(self) -> Tensor:
        """(R,) int64, number of tokens of each completion, its EOS counted."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)

    @property
    def truncated(self) -> Tensor:
        """(R,) bool, True where a completion was cut at its longest length."""
        return torch.tensor([f == "length" for f in self.finish], dtype=torch.bool)

    @property
    def mask(self) -> Tensor:
        """(R, T) bool, True where a completion has a token; T is the longest completion."""
        return torch.arange(int(self.lengths.max()) if len(self) else 0) < self.lengths[:, None]


class Rollout(Protocol):
    """Sampler of completions."""

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt from `seed` alone: the global random state is neither read nor moved."""
        ...

    def update(self, model: Any) -> None:
        """Tells the sampler that the policy's weights have changed."""
        ...


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Returns the token ids of prompts as in training: messages by the chat template, text as it is after its BOS.

    Messages are followed by the template's generation prompt, unless the last one is the assistant's, which is then to
    be continued. A `data.Conversation`, as `data.load_prompts` returns it, is written with its tools and variables.

    chat_template_kwargs: variables of the template for every prompt; a prompt's own come first. Raises ValueError,
    naming the prompt, for one that the template refuses or that has no token.
    """
    encoded = []
    bos = None
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            bos = data.leading_ids(tokenizer, "a") if bos is None else bos
            ids = data.tokenize(tokenizer, [prompt])[0]
            ids = ids if ids[: len(bos)] == bos else bos + ids
        else:
            ids = data.tokenize(tokenizer, [_templated(prompt, tokenizer, i, chat_template_kwargs)])[0]
        if not ids:
            raise ValueError(f"prompt {i} has no token: drop it, or write something ({prompt!r:.80})")
        encoded.append(ids)
    return encoded


def _templated(messages: list[dict[str, Any]], tokenizer: Any, i: int, kwargs: Mapping[str, Any] | None) -> str:
    """Returns prompt i, a conversation, as the chat template writes it."""
    if not messages or not all(isinstance(m, dict) and "role" in m and _has_words(m) for m in messages):
        raise ValueError(
            f'prompt {i}: expected text, or messages [{{"role": …, "content": …}}, …], got {messages!r:.80}'
        )
    return data.write(tokenizer, messages, f"prompt {i}", answer=True, kwargs=kwargs)


def _has_words(message: Mapping[str, Any]) -> bool:
    """Returns whether a message has content, which it needs unless it calls tools."""
    return message.get("content") is not None or bool(message.get("tool_calls"))


@dataclass
class Request:
    """One completion to be sampled."""

    prompt: Prompt
    ids: list[int]  # of the prompt
    place: tuple[int, int]  # (prompt, copy), what its random numbers follow from
    max_tokens: int  # longest completion that the settings and the model's positions allow


@dataclass
class Generated:
    """One completion as its sampler returns it."""

    ids: list[int]
    finish: str
    logps: list[float] | None = None
    text: str | None = None  # None: the text of its ids behind the prompt, without the EOS and other special tokens


def requests(
    prompts: Sequence[Prompt],
    n: int,
    seed: int,
    tokenizer: Any,
    sampling: Sampling,
    positions: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Request]:
    """Returns n requests per prompt, side by side; raises ValueError for arguments or prompts that cannot be served.

    positions: the model's limit of tokens for prompt and completion together; None: no limit. chat_template_kwargs: as
        for `encode_prompts`.
    """
    if isinstance(prompts, str) or not isinstance(n, int) or n < 1:
        raise ValueError(f"expected a list of prompts and n of at least 1, got {type(prompts).__name__}, n={n!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed!r}")
    found = []
    encoded = encode_prompts(prompts, tokenizer, chat_template_kwargs)
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        left = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(ids))
        if left < 1:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens, and the model {positions} positions for it and an answer: "
                "shorten it, or leave it out"
            )
        found += [Request(prompt, ids, (i, copy), left) for copy in range(n)]
    return found


def as_samples(
    asked: list[Request], generated: list[Generated], tokenizer: Any, sampling: Sampling, eos: set[int]
) -> Samples:
    """Returns the requests and their completions as `Samples`; texts end before the first stop string."""
    completions: list[Any] = []
    for request, one in zip(asked, generated, strict=True):
        text = one.text
        if text is None:
            body = one.ids[:-1] if one.ids and one.ids[-1] in eos else one.ids
            text = data.decode_after(tokenizer, request.ids, body)
        text = text[: min((at for at in map(text.find, sampling.stop) if at >= 0), default=len(text))]
        completions.append(text if isinstance(request.prompt, str) else [{"role": "assistant", "content": text}])
    logps = [one.logps for one in generated if one.logps is not None]
    return Samples(
        prompts=[request.prompt for request in asked],
        prompt_ids=[list(request.ids) for request in asked],
        completion_ids=[one.ids for one in generated],
        completions=completions,
        finish=[one.finish for one in generated],
        logps=logps if len(logps) == len(asked) else None,
    )


def eos_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """Returns the ids that end a completion: those of the model's generation config and the tokenizer's."""
    config = getattr(causal_lm(model), "generation_config", None) if model is not None else None
    listed = getattr(config, "eos_token_id", None)
    found = {*listed} if isinstance(listed, (list, tuple)) else {listed}
    return {int(i) for i in found | {tokenizer.eos_token_id} if i is not None}
