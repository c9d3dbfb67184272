"""GenerateRollout: completions sampled from the policy by `model.generate`, or by transformers' continuous batching."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import data
from ..head.sharded import in_parts_now
from ..models import check_ids, padding_id, positions, without_router_logits
from ..models.lm_head import causal_lm, unwrapped
from ..models.modes import evaluating
from ..precision import warn_if_slow
from .prefill import each_prompt_once
from .sampling import Generated, Prompt, Request, RolloutError, Samples, Sampling, as_samples, eos_ids, requests

logger = logging.getLogger("xpo_fast")


class GenerateRollout:
    """Sampler that completes prompts by the policy itself in its current state: adapter on, eval mode, no gradient.

    model: a causal LM of transformers, a PEFT model, or one of these as accelerate wraps it for data parallelism.
    batch_size: completions per batch, of similar length and left-padded.
    continuous: transformers' continuous batching (paged cache, no padding, no waiting for the longest): True, or its
        ContinuousBatchingConfig; None for continuous batching on CUDA if the model supports it; False for batches. It
        does not know stop strings: calls with stop strings go in batches.
    chat_template_kwargs: variables of the chat template for every prompt; a prompt's own come first.
    streamer: one of transformers' streamers, which is told each token as it is drawn; for calls with one completion.

    Only the EOS ids are read of the model's generation config: temperature, penalties and cuts are those of `Sampling`,
    so that the completions are the policy's.

    In batches the draw for token t of copy j of prompt i follows from (seed, i, j, t) alone, by inverting the
    distribution's sum in float64: it depends neither on the batch, nor on n, nor on the other prompts. The same seed
    gives the same completions whatever the batch size, unless the logits, which are rounded differently in a batch of
    another shape, move across a draw: about one token in 1e5 in float32, one in 100 in bfloat16. Processes that are to
    draw different completions take different seeds.
    `Samples.logps` are then the log-probs of the draws as made, temperature and cuts included; None for temperature 0.
    Continuous batching draws from torch's generator, seeded for the call, in the order in which requests happen to be
    scheduled: there the same seed need not give the same completions.

    A batch reads each distinct prompt once, and its completions go on from copies of the cache. Models without
    attention (Mamba, RWKV), models with a cache of their own, and hybrids that are not transformers' own read the
    prompt anew for each completion; a line of the log (INFO) says so.

    Raises ValueError for a prompt that leaves no room for an answer in the model's positions; a completion with less
    room than max_new_tokens is cut there ("length"). Raises RolloutError if the logits are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        continuous: bool | Any | None = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        streamer: Any = None,
    ) -> None:
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"expected batch_size of at least 1, got {batch_size!r}")
        self.tokenizer, self.batch_size, self.continuous, self.streamer = tokenizer, batch_size, continuous, streamer
        self.chat_template_kwargs = data.read_kwargs(chat_template_kwargs, "GenerateRollout")
        self.update(model)

    def update(self, model: Any) -> None:
        """Samples from this model from now on. Its weights are shared: a change of the weights alone needs no call."""
        lm = causal_lm(unwrapped(model))
        if not hasattr(lm, "generate"):
            raise ValueError(f"expected a causal LM of transformers, which can generate, got {type(lm).__name__}")
        if any(c.is_prompt_learning for c in getattr(unwrapped(model), "peft_config", {}).values()):
            raise ValueError("prompt-learning adapters are not sampled from: train with LoRA, or the whole model")
        self.model = model

    def caches(self, cache: Any) -> list[Any]:
        """Returns all caches that a forward of the policy fills when it is given its own, `cache`."""
        return [cache]

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt, those of a prompt side by side."""
        asked = self.requests(prompts, n, sampling=sampling, seed=seed)
        return self.samples(asked, self.complete(asked, sampling=sampling, seed=seed), sampling)

    def requests(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> list[Request]:
        """Returns what `generate` completes, n requests per prompt, side by side."""
        lm = causal_lm(unwrapped(self.model))
        asked = requests(prompts, n, seed, self.tokenizer, sampling, positions(lm), self.chat_template_kwargs)
        for request in asked:
            check_ids(lm, self.tokenizer, request.ids, f"prompt {request.place[0]}")
        return asked

    def samples(self, asked: list[Request], generated: list[Generated], sampling: Sampling) -> Samples:
        """Returns requests and their completions as `Samples`; texts end before the first stop string."""
        eos = eos_ids(self.tokenizer, causal_lm(unwrapped(self.model)))
        return as_samples(asked, generated, self.tokenizer, sampling, eos)

    def complete(self, asked: list[Request], *, sampling: Sampling, seed: int) -> list[Generated]:
        """Samples a completion of each request's token ids, `Request.max_tokens` long at most."""
        lm = causal_lm(unwrapped(self.model))
        warn_if_slow(lm.dtype, lm.device)
        eos = eos_ids(self.tokenizer, lm)
        generated: list[Any] = [None] * len(asked)
        continuous = self._continuous(lm, sampling)
        with evaluating(lm), without_router_logits(lm):
            for at in _batches(asked, len(asked) if continuous is not None else self.batch_size):
                part, done = [asked[i] for i in at], None
                if continuous is not None:
                    done = self._continuously(lm, part, sampling, seed, eos, continuous)
                if done is None:
                    parts = (part[k : k + self.batch_size] for k in range(0, len(part), self.batch_size))
                    done = [one for some in parts for one in self._in_batch(lm, some, sampling, seed, eos)]
                for i, one in zip(at, done, strict=True):
                    generated[i] = one
        return generated

    def _in_batch(self, lm: Any, asked: list[Request], sampling: Sampling, seed: int, eos: set[int]) -> list[Generated]:
        """Completes requests with equal max_tokens in one left-padded batch."""
        import transformers

        width, longest = max(len(request.ids) for request in asked), asked[0].max_tokens
        pad = padding_id(lm, self.tokenizer)
        rows = [torch.tensor(request.ids) for request in asked]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")  # (B, S)
        attention_mask = pad_sequence([torch.ones_like(x) for x in rows], batch_first=True, padding_side="left")
        processors, draw = transformers.LogitsProcessorList(), None
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                processors.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k is not None:
                processors.append(transformers.TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(transformers.TopPLogitsWarper(float(sampling.top_p)))
            draw = _Draw([request.place for request in asked], seed, longest, width, lm.device)
            processors.append(draw)  # type: ignore[arg-type]  # any callable of ids and scores will do
        stopping = _StopStrings(self.tokenizer, sampling.stop, width, len(asked)) if sampling.stop else None
        criteria: Any = transformers.StoppingCriteriaList([] if stopping is None else [stopping])
        config = transformers.GenerationConfig(
            max_new_tokens=longest, do_sample=False, eos_token_id=sorted(eos) or None, pad_token_id=pad, use_cache=True
        )
        with _without_settings(lm), each_prompt_once(lm, [request.ids for request in asked], self.caches):
            output = lm.generate(
                input_ids=input_ids.to(lm.device),
                attention_mask=attention_mask.to(lm.device),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
                streamer=self.streamer,
                # A model that is whole here needs no other process, though one of FSDP2 or ZeRO-3 looks as if it did.
                synced_gpus=None if any(map(in_parts_now, lm.parameters())) else False,
            )
        new = output[:, width:].tolist()
        logps = draw.logps() if draw is not None else None
        generated = []
        for r, ids in enumerate(new):
            ends = [i + 1 for i, token in enumerate(ids) if token in eos][:1]
            if stopping is not None and stopping.ends[r]:
                ends.append(stopping.ends[r])
            end = min(ends, default=len(ids))
            finish = "stop" if ends else "length"
            generated.append(Generated(ids[:end], finish, None if logps is None else logps[r][:end]))
        return generated

    def _continuous(self, lm: Any, sampling: Sampling) -> Any | None:
        """Returns the configuration of continuous batching for such a call, or None for batches."""
        wanted = self.continuous
        if wanted is None:
            wanted = lm.device.type == "cuda" and hasattr(lm, "generate_batch")
        if wanted is False or sampling.stop:
            return None
        import transformers

        return transformers.ContinuousBatchingConfig() if wanted is True else wanted

    def _continuously(
        self, lm: Any, asked: list[Request], sampling: Sampling, seed: int, eos: set[int], config: Any
    ) -> list[Generated] | None:
        """Completes requests by continuous batching.

        Returns None if continuous batching was only the default and the model does not support it.
        """
        import transformers

        greedy = sampling.temperature == 0
        options: Any = {"do_sample": not greedy}
        if not greedy:
            options |= {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
        generation = transformers.GenerationConfig(
            max_new_tokens=asked[0].max_tokens,
            eos_token_id=sorted(eos) or -1,
            pad_token_id=padding_id(lm, self.tokenizer),
            top_k=0 if greedy or sampling.top_k is None else sampling.top_k,
            **options,
        )
        drawn = int(np.random.SeedSequence([seed, asked[0].max_tokens]).generate_state(1)[0])
        config = dataclasses.replace(copy.deepcopy(config), return_logprobs=not greedy, seed=drawn)
        try:
            devices = [lm.device] if lm.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                settings = {"generation_config": generation, "continuous_batching_config": config}
                found = list(lm.generate_batch([request.ids for request in asked], **settings).values())
            faults = [one.error for one in found if one.error is not None]
            if faults or len(found) != len(asked):
                raise RolloutError(
                    f"continuous batching finished {len(found) - len(faults)} of {len(asked)} completions"
                    f"{''.join(f': {fault}' for fault in faults[:1])}; pass continuous=False for batches"
                )
        except Exception as error:
            if self.continuous is not None:
                raise
            logger.warning("sampling in batches from now on, for continuous batching failed: %s", error)
            self.continuous = False
            return None
        return [
            Generated(
                one.generated_tokens,
                "stop" if one.generated_tokens and one.generated_tokens[-1] in eos else "length",
                None if greedy else one.logprobs,
            )
            for one in found
        ]


class _Draw:
    """Logits processor that draws one token per row by the row's own random numbers, and rules out all others."""

    def __init__(self, places: list[tuple[int, int]], seed: int, count: int, width: int, device: torch.device) -> None:
        # PCG64 by numpy: the same numbers on every device. MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        numbers = np.stack([np.random.default_rng([seed, *place]).random(count) for place in places])
        self.uniforms = torch.from_numpy(numbers).to(device, self.dtype)  # (B, count)
        self.width = width
        self.taken: list[Tensor] = []  # (B,) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns (B, V), 0 for the token drawn and −∞ for all others, from input_ids (B, S + t) and scores (B, V)."""
        probs = scores.to(self.dtype).softmax(dim=-1)
        sums = probs.cumsum(dim=-1)
        u = self.uniforms[:, input_ids.shape[1] - self.width, None] * sums[:, -1:]
        # The first token whose sum exceeds u: never one of probability 0.
        token = torch.searchsorted(sums, u.contiguous(), right=True).clamp(max=scores.shape[1] - 1)
        self.taken.append(probs.gather(1, token).log().squeeze(1))
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)

    def logps(self) -> list[list[float]]:
        """Returns the log-prob of every draw, that of padding after a row's end included."""
        logps = torch.stack(self.taken, dim=1).float()
        if not logps.isfinite().all():
            raise RolloutError(
                "the model's logits are NaN or infinite, and no token can be drawn from them: its weights have "
                "diverged, or its dtype does not hold them"
            )
        return logps.tolist()


class _StopStrings:
    """Stopping criterion: a row is done when its completion, the prompt not counted, contains one of the texts."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int, rows: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # The last token completes the text, and a token has at least one byte, except for special ones.
        self.window = max(len(text.encode()) for text in stop) + 8
        self.ends = [0] * rows  # tokens up to the end; 0: not yet

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Returns (B,) bool from input_ids (B, S + t)."""
        length = input_ids.shape[1] - self.width
        for r, tail in enumerate(input_ids[:, self.width :][:, -self.window :].tolist()):
            if not self.ends[r]:
                text = self.tokenizer.decode(tail, clean_up_tokenization_spaces=False)
                self.ends[r] = length if any(stop in text for stop in self.stop) else 0
        return torch.tensor([end > 0 for end in self.ends], device=input_ids.device)


@contextlib.contextmanager
def _without_settings(lm: Any) -> Iterator[None]:
    """Empties the model's generation config meanwhile: `generate` takes from it whatever a call leaves open."""
    import transformers

    held, lm.generation_config = lm.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = held


def _batches(asked: list[Request], size: int) -> Iterator[list[int]]:
    """Yields batches of request indices, longest prompts first, at most `size` each and of equal max_tokens."""
    # Equal prompts side by side: they are read once per batch.
    order = sorted(range(len(asked)), key=lambda i: (asked[i].max_tokens, -len(asked[i].ids), asked[i].ids))
    for _, alike in itertools.groupby(order, key=lambda i: asked[i].max_tokens):
        while batch := [*itertools.islice(alike, size)]:
            yield batch
