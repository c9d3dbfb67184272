"""VLLMServerRollout: completions from vLLM's server, whose weights are replaced in place; it may sleep between."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import positions
from ..models.lm_head import unwrapped
from .sampling import Prompt, RolloutError, Samples, Sampling
from .server import ServerRollout, on_first_process, save_policy

logger = logging.getLogger("xpo_fast")

_RESTARTS = 3  # of the server within one rollout, after which it is given up


class VLLMServerRollout(ServerRollout):
    """Sampler that asks `vllm serve`, whose weights follow a whole policy in place.

        rollout = VLLMServerRollout("http://localhost:8000", tokenizer, folder="/tmp/policy")

    The server is started as `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL`, with the model that is trained.

    url, tokenizer, options: as for `ServerRollout`.
    folder: where `update` saves the whole policy, the adapter of a PEFT model merged in a copy. The server must see it.
        Each update has a folder of its own; earlier ones are removed.
    sleeps: whether the server sleeps between rollouts (--enable-sleep-mode), as it must on the device that trains: its
        weights go into the CPU's memory and its KV cache is dropped. For a run of one process alone.

    An update has all workers load the folder (`reload_weights`), empties the prefix cache and notes the update as the
    version of the weights, once, from rank 0. A server that sleeps is sent it by the next `generate`, which wakes the
    weights before it and the KV cache after it, and then samples.
    A server that was restarted has its first weights again and would sample from them: the version is read before and
    after each rollout, and where it is not the one pushed last, the policy is pushed and the rollout made again, with
    what was kept of a failed call.

    Written for vLLM 0.33 by its source: /collective_rpc, /reset_prefix_cache, /sleep, /wake_up, /weight_info and
    /update_weight_version. It is tested against a stand-in with these, and was never run against vLLM.

    Raises ValueError for generate before the first `update`, and for sleeps with several processes; RolloutError as
    `ServerRollout`, for a server without these addresses, and for one that is restarted again and again.
    """

    def __init__(self, url: str, tokenizer: Any, *, folder: str | Path, sleeps: bool = False, **options: Any) -> None:
        super().__init__(url, tokenizer, push=_push, folder=folder, **options)
        many = torch.distributed.is_available() and torch.distributed.is_initialized()
        if sleeps and many and torch.distributed.get_world_size() > 1:
            raise ValueError("sleeps=True is for one process: another one would sample while the server sleeps")
        self.sleeps = sleeps
        self.version: str | None = None

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt, those of a prompt side by side."""
        if self.version is None:
            raise ValueError(f"{self.url} is to be sent the policy first: call update(model)")
        for _ in range(_RESTARTS + 1):
            with self._awake():
                samples = super().generate(prompts, n, sampling=sampling, seed=seed)
                if self._has_version():
                    return samples
            logger.warning("%s was restarted while it sampled: it is sent the policy, and samples again", self.url)
        raise RolloutError(f"{self.url} was restarted in each of {_RESTARTS + 1} attempts to sample from it")

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Keeps the server awake with the weights that were pushed last."""
        if self.sleeps:
            self._told("/wake_up?tags=weights")
        if not self._has_version():
            self._finished = (None, {})  # kept of a failed call: some may be of the weights of a server begun anew
            self.load(str(self.version))
        if self.sleeps:
            self._told("/wake_up?tags=kv_cache")
        try:
            yield
        except BaseException:
            if self.sleeps:
                with contextlib.suppress(RolloutError):  # what has failed is said, not that it does not sleep, either
                    self._request("/sleep?level=1", {}, retries=0)
            raise
        if self.sleeps:
            self._told("/sleep?level=1")

    def load(self, version: str) -> None:
        """Has the server, which is awake, take the weights of a version, a folder in `folder`, in place of its own."""
        assert self.folder is not None
        where = str(self.folder / version)
        self._told("/collective_rpc", method="reload_weights", kwargs={"weights_path": where})
        self._told("/reset_prefix_cache")
        self._told("/update_weight_version", new_version=version)

    def _has_version(self) -> bool:
        try:
            return json.loads(self._told("/weight_info", get=True))["weight_version"] == self.version
        except (ValueError, KeyError, TypeError) as error:
            raise RolloutError(f"{self.url}/weight_info: expected the version of the weights ({error!r})") from error

    def _told(self, path: str, *, get: bool = False, **body: Any) -> str:
        """Returns the answer of an address that vLLM has in its development mode. get: by GET, without a body."""
        try:
            return self._request(path, None if get else body)
        except RolloutError as error:
            if ": 404" in str(error):
                raise RolloutError(f"{error}. Start vLLM 0.33 or later with VLLM_SERVER_DEV_MODE=1") from error
            raise


def _push(model: Any, rollout: ServerRollout) -> None:
    """Saves the policy for the server, on rank 0, and has a server that is awake load it before any rank samples."""
    assert isinstance(rollout, VLLMServerRollout) and rollout.folder is not None
    policy, folder = unwrapped(model), rollout.folder

    def push() -> str:
        version = save_policy(policy, rollout.tokenizer, folder).name
        if not rollout.sleeps:
            rollout.load(version)
        return version

    rollout.version = on_first_process(push)
    rollout.positions = positions(policy)
