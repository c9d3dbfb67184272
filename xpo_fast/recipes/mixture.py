"""The geometric mixture of policy and reference, Nash mirror descent's opponent (arXiv 2312.00886, survey S58)."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..models.lm_head import causal_lm
from ..models.modes import evaluating, without_adapter
from ..rewards.judges import Completion, Judge
from ..rollout import GenerateRollout, Prompt, Sampling
from ..rollout.sampling import Generated, Request
from ..seeds import seed_of_repr


class MixtureRollout(GenerateRollout):
    """Rollout of π^{1−c}·ref^{c}, the mixture of the next-token distributions, normalised at every token.

    model: the policy. reference: another causal LM with the same vocabulary, or None for the policy inside the context
    `scoring()`, such as that of an `RLTrainer`'s moving reference; by default with its adapter switched off. share: c
    in [0, 1]; 0 is the policy, 1 the reference. Temperature, top_p and top_k act on the mixture.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        reference: nn.Module | None,
        share: float,
        batch_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        scoring: Callable[[], contextlib.AbstractContextManager] | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"expected a share of the reference in [0, 1], got {share!r}")
        if reference is None and scoring is None and not hasattr(model, "disable_adapter"):
            raise ValueError("without a reference the policy must carry an adapter that can be switched off")
        super().__init__(model, tokenizer, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs)
        self.reference, self.share = reference, share
        self._scoring = scoring or (lambda: without_adapter(model))
        self._references: Any = weakref.WeakKeyDictionary()  # the reference's key-value cache, by the policy's

    def complete(self, asked: list[Request], *, sampling: Sampling, seed: int) -> list[Generated]:
        """Samples a completion of each request's token ids."""
        with self._mixed():
            return super().complete(asked, sampling=sampling, seed=seed)

    def caches(self, cache: Any) -> list[Any]:
        """Returns the policy's cache and the reference's."""
        return [cache, self._references[cache]]

    @contextlib.contextmanager
    def _mixed(self) -> Iterator[None]:
        """Replaces the policy's forward by one that returns the mixture's logits, and restores it afterwards."""
        lm: Any = causal_lm(self.model)
        own, forward = lm.__dict__.get("forward"), lm.forward
        other: Any = forward if self.reference is None else self.reference

        @functools.wraps(forward)
        def mixed(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            theirs = dict(kwargs)
            if cache is not None:
                theirs["past_key_values"] = self._references.setdefault(cache, type(cache)())
            out = forward(*args, **kwargs)
            with self._scoring() if self.reference is None else contextlib.nullcontext():
                logits = other(*args, **theirs).logits
            pi, ref = (x.float().log_softmax(dim=-1) for x in (out.logits, logits))
            out.logits = (1 - self.share) * pi + self.share * ref  # log-probs of the mixture, up to a constant
            return out

        with evaluating(self.reference if self.reference is not None else nn.Identity()):
            lm.forward = mixed
            try:
                yield
            finally:
                if own is None:
                    del lm.forward
                else:
                    lm.forward = own


class AgainstMixture:
    """Reward function of `nash_md`: P(the completion beats a rival drawn from the mixture).

    The rivals are a deterministic function of the seed and the call's prompts and completions. `rollout` must be set
    before the first call.
    """

    def __init__(self, judge: Judge, sampling: Sampling, seed: int) -> None:
        self.judge, self.sampling, self.seed = judge, sampling, seed
        self.rollout: MixtureRollout | None = None

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """Returns the probabilities, one per completion."""
        assert self.rollout is not None
        seed = seed_of_repr(self.seed, list(prompts), list(completions))
        rivals = self.rollout.generate(prompts, 1, sampling=self.sampling, seed=seed)
        return self.judge.compare(prompts, completions, rivals.completions, **columns).tolist()
