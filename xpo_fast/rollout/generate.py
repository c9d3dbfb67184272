"""Rollouts: completions sampled from the policy, by `model.generate` (from a server: server.py), and their log-probs by our head.

Sampling draws token t of a completion from q = softmax(z/T) cut to its top k and top p and normalised again;
`Samples.logps` are log q where the sampler says them. `sample_logps` are the log-probs of p = softmax(z/T) itself. Without
cuts the two agree. With cuts log p = log q + log p(kept) ≤ log q, token by token: a ratio π/π_old of two uncut
policies is then not the ratio to what was sampled from. exp(sample_logps − Samples.logps) is that ratio, and it corrects
only inside what was kept: of the tokens cut off there are no samples. So train with top_p = 1 and no top_k, or mean it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .. import data
from ..head import token_logps
from ..models import Head, check_ids, install_fused_loss
from ..models.lm_head import causal_lm
from ..precision import warn_if_slow
from ..trainer.reference import evaluating

logger = logging.getLogger("xpo_fast")

Prompt = str | list[dict[str, str]]

FINISHES = ("stop", "length")


class RolloutError(RuntimeError):
    """Completions could not be had: a server does not answer, or the model's logits are no numbers."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    max_new_tokens: of a completion, its EOS counted. temperature: what logits are divided by; 0 takes the likeliest
        token. top_p, top_k: the likeliest tokens that are kept, 1 and None for all. stop: texts that end a
        completion; the tokens that spell one are kept among its ids, its text ends before it.
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
    """R rows, prompts × n, those of a prompt side by side."""

    prompts: list[Prompt]  # of each row
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]  # with the EOS it ended by
    completions: list[Any]  # str, or [{"role": "assistant", "content": …}] where the prompt is messages
    finish: list[str]  # "stop" (EOS or a stop string) or "length" (truncated)
    logps: list[list[float]] | None = None  # the sampler's own log-probs, where it says

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
        """The samples at these rows, in this order."""
        at = list(rows)
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Samples(**{k: v and [v[i] for i in at] for k, v in fields.items()})

    @property
    def lengths(self) -> Tensor:
        """(R,) tokens of each completion, its EOS counted."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)

    @property
    def truncated(self) -> Tensor:
        """(R,) bool: it ended by its length."""
        return torch.tensor([f == "length" for f in self.finish], dtype=torch.bool)

    @property
    def mask(self) -> Tensor:
        """(R, T) bool, T the longest completion: where it has a token."""
        return torch.arange(int(self.lengths.max()) if len(self) else 0) < self.lengths[:, None]


class Rollout(Protocol):
    """Something that completes prompts."""

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """n completions of each prompt, drawn by `seed` alone: the global random state is neither read nor moved."""
        ...

    def update(self, model: Any) -> None:
        """The policy's weights have changed."""
        ...


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The token ids of prompts as training has them: messages by the chat template, text as it is with its BOS.

    Messages end with what calls for an answer (the template's generation prompt), or, where the last one is the
    assistant's, with that one to be continued. Raises ValueError, naming the prompt, for one that the template refuses,
    or that has no token.
    """
    encoded = []
    opening = None
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            opening = data.leading_ids(tokenizer, "a") if opening is None else opening
            ids = data.tokenize(tokenizer, [prompt])[0]
            ids = ids if ids[: len(opening)] == opening else opening + ids
        else:
            ids = data.tokenize(tokenizer, [_templated(prompt, tokenizer, i)])[0]
        if not ids:
            raise ValueError(f"prompt {i} has no token: drop it, or write something ({prompt!r:.80})")
        encoded.append(ids)
    return encoded


def _templated(messages: list[dict[str, str]], tokenizer: Any, i: int) -> str:
    if not messages or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise ValueError(
            f'prompt {i}: expected text, or messages [{{"role": …, "content": …}}, …], got {messages!r:.80}'
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompt {i}: a conversation, and the tokenizer has no chat template to write it with; pass one "
            "(--chat-template FILE), or give the prompts as text"
        )
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise ValueError(
            f"prompt {i}: the chat template refuses it ({error}): drop it, or give the tokenizer a template that knows it"
        ) from error


@dataclass
class Row:
    """A completion to be made: what of, its place (prompt, copy), and the longest that it may become."""

    prompt: Prompt
    ids: list[int]
    place: tuple[int, int]
    room: int


@dataclass
class Made:
    """A completion as its sampler hands it over. text: None for that of its ids."""

    ids: list[int]
    finish: str
    logps: list[float] | None = None
    text: str | None = None


def rows_of(
    prompts: Sequence[Prompt], n: int, seed: int, tokenizer: Any, sampling: Sampling, positions: int | None
) -> list[Row]:
    if isinstance(prompts, str) or not isinstance(n, int) or n < 1:
        raise ValueError(f"expected a list of prompts and n of at least 1, got {type(prompts).__name__}, n={n!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed!r}")
    rows = []
    for i, (prompt, ids) in enumerate(zip(prompts, encode_prompts(prompts, tokenizer), strict=True)):
        room = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(ids))
        if room < 1:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens, and the model {positions} positions for it and an answer: "
                "shorten it, or leave it out"
            )
        rows += [Row(prompt, ids, (i, copy), room) for copy in range(n)]
    return rows


def as_samples(rows: list[Row], made: list[Made], tokenizer: Any, sampling: Sampling, eos: set[int]) -> Samples:
    completions: list[Any] = []
    for row, one in zip(rows, made, strict=True):
        text = completion_text(one.ids, tokenizer, eos) if one.text is None else one.text
        text = text[: min((at for at in map(text.find, sampling.stop) if at >= 0), default=len(text))]
        completions.append(text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}])
    logps = [one.logps for one in made if one.logps is not None]
    return Samples(
        prompts=[row.prompt for row in rows],
        prompt_ids=[list(row.ids) for row in rows],
        completion_ids=[one.ids for one in made],
        completions=completions,
        finish=[one.finish for one in made],
        logps=logps if len(logps) == len(rows) else None,
    )


def completion_text(ids: Sequence[int], tokenizer: Any, eos: set[int]) -> str:
    """The text of a completion, without its EOS and other special tokens."""
    body = ids[:-1] if ids and ids[-1] in eos else ids
    return tokenizer.decode(list(body), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eos_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """The ids that end a completion: those of the model's generation config (there may be several) and the tokenizer's."""
    config = getattr(causal_lm(model), "generation_config", None) if model is not None else None
    listed = getattr(config, "eos_token_id", None)
    found = {*listed} if isinstance(listed, (list, tuple)) else {listed}
    return {int(i) for i in found | {tokenizer.eos_token_id} if i is not None}


# --- by model.generate ------------------------------------------------------------------------------------------------


class GenerateRollout:
    """Completions by the policy itself, as it is at the moment: its adapter on, in eval mode, without gradient.

    model: a causal LM of transformers, a PEFT model, or one of these as accelerate wraps it for data parallelism.
    batch_size: rows at a time, of similar length and left-padded.
    continuous: transformers' continuous batching (paged cache, no padding, no waiting for the longest): True, or its
        ContinuousBatchingConfig; None for the same on CUDA, where the model goes along with it; False for batches. It
        knows no stop strings, and calls with them go in batches.

    Of the model's generation config only its EOS ids are read: temperature, penalties and cuts are those of `Sampling`, so
    that the completions are the policy's.

    In batches the draw for token t of copy j of prompt i follows from (seed, i, j, t) alone, by inverting the
    distribution's sum in float64: neither the batch, nor n, nor the other prompts have a part in it, and the same
    seed gives the same completions whatever the batch size, unless the logits, which are rounded otherwise in a batch of
    another shape, move across a draw: a token in 1e5 or so in float32, one in 100 in bfloat16. Processes that are to
    draw apart take seeds of their own.
    `Samples.logps` are then the log-probs of the draws as made, temperature and cuts included; None for temperature 0.
    Continuous batching draws from torch's generator, seeded for the call, in the order that requests happen to be
    scheduled: the same seed need not give the same completions there.

    Raises ValueError for a prompt without room for an answer in the model's positions; a completion for which there is less
    room than max_new_tokens is cut there ("length"). Raises RolloutError if the logits are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        continuous: bool | Any | None = False,
    ) -> None:
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"expected batch_size of at least 1, got {batch_size!r}")
        self.tokenizer, self.batch_size, self.continuous = tokenizer, batch_size, continuous
        self.update(model)

    def update(self, model: Any) -> None:
        """Sample from this model from now on. Its weights are shared, so that those need no telling."""
        lm = causal_lm(unwrapped(model))
        if not hasattr(lm, "generate"):
            raise ValueError(f"expected a causal LM of transformers, which can generate, got {type(lm).__name__}")
        if any(c.is_prompt_learning for c in getattr(unwrapped(model), "peft_config", {}).values()):
            raise ValueError("prompt-learning adapters are not sampled from: train with LoRA, or the whole model")
        self.model = model

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """n completions of each prompt, those of a prompt side by side."""
        lm = causal_lm(unwrapped(self.model))
        warn_if_slow(lm.dtype, lm.device)
        eos = eos_ids(self.tokenizer, lm)
        rows = rows_of(prompts, n, seed, self.tokenizer, sampling, _positions(lm))
        for row in rows:
            check_ids(lm, self.tokenizer, row.ids, f"prompt {row.place[0]}")
        made: list[Any] = [None] * len(rows)
        continuous = self._continuous(lm, sampling)
        with evaluating(lm):
            for at in _batches(rows, len(rows) if continuous is not None else self.batch_size):
                part = [rows[i] for i in at]
                done = None
                if continuous is not None:
                    done = self._continuously(lm, part, sampling, seed, eos, continuous)
                if done is None:
                    done = [
                        one
                        for start in range(0, len(part), self.batch_size)
                        for one in self._in_batch(lm, part[start : start + self.batch_size], sampling, seed, eos)
                    ]
                for i, one in zip(at, done, strict=True):
                    made[i] = one
        return as_samples(rows, made, self.tokenizer, sampling, eos)

    def _in_batch(self, lm: Any, rows: list[Row], sampling: Sampling, seed: int, eos: set[int]) -> list[Made]:
        import transformers

        width, room = max(len(row.ids) for row in rows), rows[0].room
        pad = self.tokenizer.pad_token_id
        pad = min(eos, default=0) if pad is None else pad  # is masked, and never read
        input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)  # (B, S)
        attention_mask = torch.zeros_like(input_ids)
        for r, row in enumerate(rows):
            input_ids[r, width - len(row.ids) :] = torch.tensor(row.ids)
            attention_mask[r, width - len(row.ids) :] = 1
        processors, draw = transformers.LogitsProcessorList(), None
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                processors.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k is not None:
                processors.append(transformers.TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(transformers.TopPLogitsWarper(float(sampling.top_p)))
            draw = _Draw([row.place for row in rows], seed, room, width, lm.device)
            processors.append(draw)  # type: ignore[arg-type]  # any callable of ids and scores will do
        criteria: Any = transformers.StoppingCriteriaList()
        stopping = _StopStrings(self.tokenizer, sampling.stop, width, len(rows)) if sampling.stop else None
        if stopping is not None:
            criteria.append(stopping)
        config = transformers.GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(eos) or None,
            pad_token_id=pad,
            use_cache=True,
        )
        with _without_settings(lm):
            output = lm.generate(
                input_ids=input_ids.to(lm.device),
                attention_mask=attention_mask.to(lm.device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
            )
        new = output[:, width:].tolist()
        logps = draw.logps() if draw is not None else None
        made = []
        for r, ids in enumerate(new):
            ends = [i + 1 for i, token in enumerate(ids) if token in eos][:1]
            if stopping is not None and stopping.ends[r]:
                ends.append(stopping.ends[r])
            end = min(ends, default=len(ids))
            made.append(Made(ids[:end], "stop" if ends else "length", None if logps is None else logps[r][:end]))
        return made

    def _continuous(self, lm: Any, sampling: Sampling) -> Any | None:
        """The configuration of continuous batching for such a call, or None for batches."""
        wanted = self.continuous
        if wanted is None:
            wanted = lm.device.type == "cuda" and hasattr(lm, "generate_batch")
        if wanted is False or sampling.stop:
            return None
        import transformers

        return transformers.ContinuousBatchingConfig() if wanted is True else wanted

    def _continuously(
        self, lm: Any, rows: list[Row], sampling: Sampling, seed: int, eos: set[int], config: Any
    ) -> list[Made] | None:
        """By continuous batching; None if that was nobody's wish and the model does not go along with it."""
        import transformers

        greedy = sampling.temperature == 0
        options: Any = {"do_sample": False} if greedy else {
            "do_sample": True, "temperature": float(sampling.temperature), "top_p": float(sampling.top_p),
        }  # fmt: skip
        generation = transformers.GenerationConfig(
            max_new_tokens=rows[0].room,
            eos_token_id=sorted(eos) or -1,
            pad_token_id=self.tokenizer.pad_token_id,
            top_k=0 if greedy or sampling.top_k is None else sampling.top_k,
            **options,
        )
        drawn = int(np.random.SeedSequence([seed, rows[0].room]).generate_state(1)[0])
        config = dataclasses.replace(copy.deepcopy(config), return_logprobs=not greedy, seed=drawn)
        try:
            devices = [lm.device] if lm.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                found = list(
                    lm.generate_batch(
                        [row.ids for row in rows],
                        generation_config=generation,
                        continuous_batching_config=config,
                    ).values()
                )
            faults = [one.error for one in found if one.error is not None]
            if faults or len(found) != len(rows):
                raise RolloutError(
                    f"continuous batching finished {len(found) - len(faults)} of {len(rows)} completions"
                    f"{''.join(f': {fault}' for fault in faults[:1])}; pass continuous=False for batches"
                )
        except Exception as error:
            if self.continuous is not None:
                raise
            logger.warning("sampling in batches from now on, for continuous batching failed: %s", error)
            self.continuous = False
            return None
        return [
            Made(
                one.generated_tokens,
                "stop" if one.generated_tokens and one.generated_tokens[-1] in eos else "length",
                None if greedy else one.logprobs,
            )
            for one in found
        ]


class _Draw:
    """A logits processor that leaves of each row one token, drawn from it by the row's own random numbers."""

    def __init__(self, places: list[tuple[int, int]], seed: int, room: int, width: int, device: torch.device) -> None:
        # PCG64 by numpy: the same numbers on every device. MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        numbers = np.stack([np.random.default_rng([seed, *place]).random(room) for place in places])
        self.uniforms = torch.from_numpy(numbers).to(device, self.dtype)  # (B, room)
        self.width = width
        self.taken: list[Tensor] = []  # (B,) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (B, S + t), scores (B, V) → (B, V): 0 for the token drawn, −∞ for all others."""
        probs = scores.to(self.dtype).softmax(dim=-1)
        sums = probs.cumsum(dim=-1)
        u = self.uniforms[:, input_ids.shape[1] - self.width, None] * sums[:, -1:]
        # The first token whose sum exceeds u: never one of probability 0.
        token = torch.searchsorted(sums, u.contiguous(), right=True).clamp(max=scores.shape[1] - 1)
        self.taken.append(probs.gather(1, token).log().squeeze(1))
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)

    def logps(self) -> list[list[float]]:
        """The log-prob of every draw, padding behind a row's end included."""
        logps = torch.stack(self.taken, dim=1).float()
        if not logps.isfinite().all():
            raise RolloutError(
                "the model's logits are NaN or infinite, and no token can be drawn from them: its weights have "
                "diverged, or its dtype does not hold them"
            )
        return logps.tolist()


class _StopStrings:
    """A stopping criterion: a row is done when its completion, prompt not counted, contains one of the texts."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int, rows: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # The token that completes a text is the last one, and a token is a byte at least, except for special ones.
        self.window = max(len(text.encode()) for text in stop) + 8
        self.ends = [0] * rows  # tokens up to the end; 0: not yet

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids (B, S + t) → (B,) bool."""
        length = input_ids.shape[1] - self.width
        for r, tail in enumerate(input_ids[:, self.width :][:, -self.window :].tolist()):
            if not self.ends[r]:
                text = self.tokenizer.decode(tail, clean_up_tokenization_spaces=False)
                self.ends[r] = length if any(stop in text for stop in self.stop) else 0
        return torch.tensor([end > 0 for end in self.ends], device=input_ids.device)


@contextlib.contextmanager
def _without_settings(lm: Any) -> Iterator[None]:
    """`generate` fills what a config leaves open from the model's own; here that one is empty for a while."""
    import transformers

    held, lm.generation_config = lm.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = held


def unwrapped(model: Any) -> Any:
    try:
        from accelerate.utils import extract_model_from_parallel
    except ImportError:
        return model
    return extract_model_from_parallel(model)


def _positions(lm: Any) -> int | None:
    """The tokens that the model has positions for; None for no limit."""
    found = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _batches(rows: list[Row], size: int) -> Iterator[list[int]]:
    """Row numbers, longest prompts first, `size` at a time; rows of one batch have the same room."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].room, -len(rows[i].ids)))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or rows[i].room != rows[batch[0]].room):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# --- log-probs --------------------------------------------------------------------------------------------------------


def sample_logps(
    model: nn.Module,
    samples: Samples,
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    backend: str = "auto",
) -> Tensor:
    """Log-prob of every token of the completions under `model`: (R, T) float32 on the CPU, 0 outside `samples.mask`.

    log softmax(z/temperature)[token] at 1F by the head, no (tokens × vocabulary) tensor, in eval mode and without gradient,
    EOS and stop strings included. temperature: that of the sampling; what top_p and top_k mean is said at the top of
    this file. model: carries `install_fused_loss` or gets it; it may be wrapped (DDP, PEFT), with its adapter as it is.
    A mixed-precision run puts its autocast around the call. Raises ValueError for temperature 0, which is no distribution.
    """
    if not temperature > 0:
        raise ValueError(
            f"expected a temperature of more than 0, got {temperature!r}: greedy completions were not drawn from a "
            "distribution; their log-probs at temperature 1 may be what is meant"
        )
    install_fused_loss(unwrapped(model))

    def score(hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
        options = {**head.kwargs(), "temperature": temperature, "backend": backend}
        return {"logps": token_logps(hidden, head.weight, targets, **options)}

    rows = list(zip(samples.prompt_ids, samples.completion_ids, strict=True))
    return score_tokens(model, rows, ("logps",), score, batch_size=batch_size)["logps"]


def score_tokens(
    model: nn.Module,
    rows: Sequence[tuple[list[int], list[int]]],
    names: Sequence[str],
    score: Callable[[Tensor, Head, Tensor], dict[str, Tensor]],
    *,
    batch_size: int,
    pad: int = 0,
) -> dict[str, Tensor]:
    """What `score` says of every token that follows a prompt, by name: (R, C) float32 on the CPU, 0 behind a row's end.

    rows: R prompts and what follows them, C tokens at most. score(hidden, head, targets) → (B, S) each, under `model`, which carries
    `install_fused_loss`, in eval mode and without gradient; rows of like length side by side, the longest first.
    """
    device = next(model.parameters()).device
    found = {name: torch.zeros(len(rows), max((len(ids) for _, ids in rows), default=0)) for name in names}
    some = [i for i, (_, ids) in enumerate(rows) if ids]
    order = sorted(some, key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in pad_rows([rows[i] for i in at], pad).items()}
            targets = batch.pop("targets")
            scored = model(**batch, fused_loss=lambda hidden, head, t=targets: score(hidden, head, t))
            for name in names:
                for i, row in zip(at, scored[name].float().cpu(), strict=True):
                    first, count = len(rows[i][0]) - 1, len(rows[i][1])
                    found[name][i, :count] = row[first : first + count]
    return found


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Prompts and what follows them, right-padded: input_ids, attention_mask, targets, (R, T) each.

    The last token predicts nothing and is left out; targets are those that follow a prompt.
    """
    width = max(len(prompt) + len(ids) - 1 for prompt, ids in rows)
    inputs = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), data.IGNORE_INDEX)
    for k, (prompt, ids) in enumerate(rows):
        whole = torch.tensor([*prompt, *ids])
        inputs[k, : len(whole) - 1], mask[k, : len(whole) - 1] = whole[:-1], 1
        targets[k, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return {"input_ids": inputs, "attention_mask": mask, "targets": targets}


if TYPE_CHECKING:
    from .server import ServerRollout as ServerRollout


def __getattr__(name: str) -> Any:
    if name == "ServerRollout":  # which is made of what is here
        from .server import ServerRollout

        return ServerRollout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
