"""TransformersRollout: completions from `transformers serve`, which is sent the whole policy in folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import data
from ..data.encode import decode
from ..models import positions
from ..models.lm_head import unwrapped
from .sampling import Generated, Request, RolloutError, Sampling
from .server import ServerRollout, on_first_process, save_policy


class TransformersRollout(ServerRollout):
    """Sampler that asks `transformers serve` (transformers 5.23), started without the name of a model.

        rollout = TransformersRollout("http://localhost:8000", tokenizer, folder="/tmp/policy")

    url, api_key, retries, backoff_s, timeout_s, chat_template_kwargs: as for `ServerRollout`, and so is what happens
        when the server is gone for a while, or for good.
    folder: where `update` saves the whole policy, the adapter of a PEFT model merged in a copy. The server must see it.
        Each update has a folder of its own, which the server is told to load after it has unloaded all others; earlier
        folders are removed. Only rank 0 pushes. A restarted server loads the folder when it is next asked.
    model: what to sample from before the first `update`: a folder as the server sees it, or a name of the hub.
    concurrency: simultaneous requests. The server has one random state, which each request seeds: with more than one,
        or with another client, completions are still draws of the policy, but the seed no longer determines them.

    The server takes a prompt as text alone: the text is sent whose token ids, by the tokenizer's own call, are the
    prompt's, and a prompt without one is refused by name. Every setting of generation is sent, so that the model's
    generation config decides nothing: on its own the server would take the likeliest token where that says so, whatever
    the temperature. It ends a completion at the tokenizer's EOS, and answers with the text alone: ids are tokenized
    again, with one warning, and there are no log-probs. A completion whose EOS is its last allowed token counts as
    truncated. With --continuous-batching the server takes its settings from the first request and reads no seeds: start
    it without.

    Raises ValueError for update without folder=, for generate before any model is named, for a prompt without such a
    text or, after an update, without room for an answer; RolloutError as `ServerRollout`, and if the server cannot load
    the model.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        model: str | Path | None = None,
        folder: str | Path | None = None,
        api_key: str | None = None,
        concurrency: int = 1,
        retries: int = 12,
        backoff_s: float = 0.5,
        timeout_s: float = 600.0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            url,
            tokenizer,
            model=None if model is None else str(model),
            vllm=False,
            api_key=api_key,
            concurrency=concurrency,
            retries=retries,
            backoff_s=backoff_s,
            timeout_s=timeout_s,
            push=None if folder is None else _push,
            folder=folder,
            chat_template_kwargs=chat_template_kwargs,
        )

    def load(self, name: str) -> None:
        """Has the server load a model, and samples from it; raises RolloutError with the server's reason if it can't.

        name: a folder as the server sees it, or a name of the hub.
        """
        answer = self._request("/load_model", {"model": name})
        told = [json.loads(line.removeprefix("data:")) for line in answer.splitlines() if line.startswith("data:")]
        if not told or told[-1].get("status") != "ready":
            why = told[-1].get("message", told[-1]) if told else f"it said {answer[:200]!r}"
            raise RolloutError(f"{self.url} cannot load {name}: {why}")
        self.model, self._identified = name, True

    def replace(self, policy: Any) -> str:
        """Saves a policy, see `save_policy`, has the server load it in place of all others, and returns its folder."""
        assert self.folder is not None
        folder = save_policy(policy, self.tokenizer, self.folder)
        self._request("/reset", {})
        self.load(str(folder))
        return str(folder)

    def _identify(self) -> None:
        """Has the server load the model before the first request, which would try a missing one again and again."""
        if self._identified:
            return
        if self.model is None:
            raise ValueError(f"{self.url} is to be told what to sample from: call update(model), or pass model=FOLDER")
        self.load(self.model)

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        settings: dict[str, Any] = {"max_new_tokens": request.max_tokens, "do_sample": sampling.temperature > 0}
        settings |= {"num_beams": 1, "repetition_penalty": 1.0, "pad_token_id": self.tokenizer.pad_token_id}
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
            settings |= {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
        if self.tokenizer.eos_token_id is not None:
            settings["eos_token_id"] = self.tokenizer.eos_token_id
        if sampling.stop:
            settings["stop_strings"] = list(sampling.stop)
        return {"prompt": self._text(request), "generation_config": json.dumps(settings)}

    def _text(self, request: Request) -> str:
        """Returns the text of a prompt that the server's tokenizer turns into the prompt's ids."""
        bos = len(data.leading_ids(self.tokenizer, "a"))
        texts = [decode(self.tokenizer, request.ids[skip:]) for skip in (0, bos)]
        if isinstance(request.prompt, str):
            texts.insert(0, request.prompt)
        for text in texts:
            if self.tokenizer(text, verbose=False)["input_ids"] == request.ids:
                return text
        raise ValueError(
            f"prompt {request.place[0]} has no text that this tokenizer turns into its token ids, and transformers "
            f"serve takes text alone: change it, or sample from a server that takes ids ({texts[0]!r:.80})"
        )

    def _read(self, choice: dict[str, Any], sampling: Sampling, eos: set[int]) -> Generated:
        # Stop strings stay in the text here: without one, it was an EOS that ended it.
        ended_by_text = any(stop in choice["text"] for stop in sampling.stop)
        return super()._read(choice, sampling if ended_by_text else dataclasses.replace(sampling, stop=()), eos)


def _push(model: Any, rollout: ServerRollout) -> None:
    """Gives the server the policy, on all processes."""
    assert isinstance(rollout, TransformersRollout)
    policy = unwrapped(model)
    rollout.model = on_first_process(lambda: rollout.replace(policy))
    rollout.positions = positions(policy)
    rollout._identified = True
