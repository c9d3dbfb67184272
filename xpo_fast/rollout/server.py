"""ServerRollout: completions from a server that speaks OpenAI's /v1/completions and is sent the policy's adapters."""

from __future__ import annotations

import copy
import hashlib
import http.client
import json
import logging
import shutil
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..files import appearing
from ..models import merge
from ..models.lm_head import unwrapped
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

logger = logging.getLogger("xpo_fast")

_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP statuses that a later attempt may not meet
_LONGEST_WAIT_S = 30.0
_TOKEN = "token_id:"  # how vLLM writes a token with --return-tokens-as-token-ids


class _GivenUp(threading.Event):
    """Event set when one request of a call has failed for good: the others neither start nor are tried again."""

    why: RolloutError | None = None


class ServerRollout:
    """Sampler that asks a server speaking OpenAI's /v1/completions: vLLM, SGLang, llama.cpp and others.

        rollout = ServerRollout("http://localhost:8000", tokenizer, push="lora", folder="/tmp/policy")

    url: the server's address, without /v1. model: the name under which it serves the model; if None, the server is
        asked.
    vllm: whether the server knows vLLM's fields: the token ids of a completion, and cuts and penalties switched off
        unless asked for (vLLM's own defaults are those of the model's generation config). False for a server that
        refuses fields it does not know.
    extra: further fields of every request. api_key: sent as a bearer token.
    concurrency: simultaneous requests, one per completion; each has its own seed, from (seed, prompt, copy).
    retries: attempts after no answer, a malformed one or a transient status (429, 500, 503, …), after backoff_s, twice
        that, and so on up to 30 s: by default for three and a half minutes, in which a server can be restarted. The
        question which models it serves is repeated at most 5 times. timeout_s: limit for one answer.
    push: what `update` does. "lora": saves the adapter of the PEFT model into `folder`, which the server must see as
        well, and loads it under a name that no other run and no earlier update has had (vLLM with --enable-lora and
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True). Only rank 0 pushes. Adapters left in `folder` by an earlier run are
        unloaded; use one folder per run. A function: called with the model and this rollout, on every process. None:
        `update` raises, because a server that nobody updates keeps sampling from old weights.

    chat_template_kwargs: variables of the chat template for every prompt; a prompt's own come first.

    Prompts are sent as token ids, by our tokenizer and its chat template, so that both sides see the same. Completions
    are read as token ids where the server reports them; else their text is tokenized again, which can give other ids
    than were sampled (a warning says so once). `Samples.logps` are the log-probs the server reports: vLLM's are those
    of the untempered, uncut distribution unless it runs with --logprobs-mode processed_logprobs. None if a completion
    comes without them.

    Raises ValueError for a prompt without room for an answer (where the server reports its limit), and RolloutError,
    with the server's reason, for a refused request, an unusable answer, or a server that is still gone after the last
    retry. Completions finished by then are kept in memory: the same call of this object asks only for the others.
    Another call, or `update`, drops them; so does `RLTrainer`, which resumes from a checkpoint.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        model: str | None = None,
        vllm: bool = True,
        extra: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        retries: int = 12,
        backoff_s: float = 0.5,
        timeout_s: float = 600.0,
        push: str | Callable[[Any, ServerRollout], None] | None = None,
        folder: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"expected the server's address, http://host:port, got {url!r}")
        for name, number, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if not (isinstance(number, int) and number >= least):
                raise ValueError(f"expected {name} of at least {least}, got {number!r}")
        if not (backoff_s >= 0 and timeout_s > 0):
            raise ValueError(
                f"expected backoff_s of 0 s or more and timeout_s of more, got {backoff_s!r}, {timeout_s!r}"
            )
        if not (push is None or push == "lora" or callable(push)):
            raise ValueError(f"expected push to be 'lora', a function or None, got {push!r}")
        if push == "lora" and folder is None:
            raise ValueError("push='lora' needs folder=, a place for adapters that the server can read, too")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer, self.vllm, self.extra, self.api_key = tokenizer, vllm, dict(extra or {}), api_key
        self.concurrency, self.retries = concurrency, retries
        self.backoff_s, self.timeout_s = backoff_s, timeout_s
        self.push, self.folder = push, None if folder is None else Path(folder).absolute()
        self.model, self.positions = model, None
        self.chat_template_kwargs = data.read_kwargs(chat_template_kwargs, "ServerRollout")
        self._identified = self._warned = False
        self._finished: tuple[Any, dict[int, Generated]] = (None, {})  # of a failed call

    def generate(self, prompts: Sequence[Prompt], n: int = 1, *, sampling: Sampling, seed: int) -> Samples:
        """Samples n completions of each prompt, those of a prompt side by side."""
        self._identify()
        eos = eos_ids(self.tokenizer)
        asked = requests(prompts, n, seed, self.tokenizer, sampling, self.positions, self.chat_template_kwargs)
        call = (seed, sampling, [(request.place, request.ids) for request in asked])
        generated = dict(self._finished[1]) if self._finished[0] == call else {}
        self._finished = (call, generated)
        given_up = _GivenUp()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="rollout") as pool:
            futures: dict[Future, int] = {
                pool.submit(self._complete, request, sampling, seed, eos, given_up): i
                for i, request in enumerate(asked)
                if i not in generated
            }
            try:
                for future in as_completed(futures):
                    generated[futures[future]] = future.result()
            except BaseException as error:
                given_up.set()
                pool.shutdown(wait=True, cancel_futures=True)
                for future, i in futures.items():
                    if not future.cancelled() and future.exception() is None:
                        generated[i] = future.result()
                if not isinstance(error, RolloutError):
                    raise
                raise RolloutError(
                    f"{given_up.why or error}. {len(generated)} of {len(asked)} completions were finished and are "
                    "kept: the same call again asks only for the others"
                ) from error
        self._finished = (None, {})
        return as_samples(asked, [generated[i] for i in range(len(asked))], self.tokenizer, sampling, eos)

    def update(self, model: Any) -> None:
        """Sends the server the policy's weights, see `push`."""
        self._finished = (None, {})
        if self.push is None:
            raise ValueError(
                f"the policy has changed, and {self.url} goes on sampling from the weights it has: pass push='lora' or "
                "a function that gives it the new ones"
            )
        if callable(self.push):
            self.push(model, self)
            return
        policy = unwrapped(model)
        if not hasattr(policy, "get_base_model"):
            raise ValueError(f"push='lora' is for a model with a LoRA adapter, got {type(policy).__name__}")
        self._identify()
        self.model = on_first_process(lambda: self._push(policy))

    def _push(self, policy: Any) -> str:
        """Saves the adapter, has the server load it, and unloads and removes earlier ones; returns its name."""
        assert self.folder is not None
        ours = f"policy-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}-"
        name = ours + uuid.uuid4().hex[:12]
        policy.save_pretrained(self.folder / name)
        self._request("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder / name)})
        # Ask the server which it has: one that was restarted since has forgotten the one before.
        stale = {m["id"] for m in self._served() if m["id"].startswith(ours)}
        for old in sorted(stale - {name}):
            self._request("/v1/unload_lora_adapter", {"lora_name": old})
        for path in self.folder.glob(f"{ours}*"):
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)
        return name

    def _served(self) -> list[dict[str, Any]]:
        """Returns the models the server lists."""
        try:
            answer = self._request("/v1/models", retries=min(self.retries, 5))
            return [m for m in json.loads(answer)["data"] if isinstance(m["id"], str)]
        except (ValueError, KeyError, TypeError) as error:
            raise RolloutError(f"{self.url}/v1/models: expected a list of models ({error})") from error

    def _identify(self) -> None:
        """Finds which model the server serves and, where it reports it, how many positions that has."""
        if self._identified:
            return
        listed = self._served()
        names = [m["id"] for m in listed]
        if self.model is None:  # adapters, which have a parent, belong to other runs
            listed = [m for m in listed if not m.get("parent")]
            bases = [m["id"] for m in listed]
            if len(bases) != 1:
                raise ValueError(f"{self.url} serves {', '.join(bases) or 'nothing'}: say which, model=NAME")
        if self.model is not None and self.model not in names:
            raise ValueError(f"{self.url} does not serve {self.model!r}; it serves {', '.join(names) or 'nothing'}")
        served = next(m for m in listed if self.model in (None, m["id"]))
        self.model, self.positions = served["id"], served.get("max_model_len")
        self._identified = True

    def _complete(
        self, request: Request, sampling: Sampling, seed: int, eos: set[int], given_up: _GivenUp
    ) -> Generated:
        """Sends a request and reads its answer; a failure sets `given_up`, and one set already is a failure."""
        if given_up.is_set():
            raise RolloutError("given up")
        try:
            body = self._body(request, sampling) | {"model": self.model, "seed": seed_at(seed, *request.place)}
            answer = self._request("/v1/completions", body | self.extra, given_up)
            try:
                return self._read(json.loads(answer)["choices"][0], sampling, eos)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise RolloutError(
                    f"{self.url}/v1/completions: expected a completion as OpenAI's API has them ({error!r}), "
                    f"got {answer[:200]}"
                ) from error
        except RolloutError as error:
            given_up.why = given_up.why or error
            given_up.set()
            raise

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """Returns the fields of a request that the server reads, without the model's name and the seed."""
        body = {"prompt": request.ids, "max_tokens": request.max_tokens, "logprobs": 1}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if self.vllm:
            body |= {"return_token_ids": True, "repetition_penalty": 1.0, "min_p": 0.0}
            body["top_k"] = -1 if sampling.top_k is None else sampling.top_k
        elif sampling.top_k is not None:
            body["top_k"] = sampling.top_k
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return body

    def _read(self, choice: dict[str, Any], sampling: Sampling, eos: set[int]) -> Generated:
        """Reads a choice of the server's answer; raises ValueError or KeyError for a malformed one."""
        text, finish = choice["text"], choice["finish_reason"]
        if not isinstance(text, str) or finish not in FINISHES:
            raise ValueError(f"text {text!r:.40}, finish_reason {finish!r}")
        reported = choice.get("logprobs") or {}
        tokens, ids = reported.get("tokens") or [], choice.get("token_ids")
        if ids is None and tokens and all(token.startswith(_TOKEN) for token in tokens):
            ids = [int(token.removeprefix(_TOKEN)) for token in tokens]
        logps = reported.get("token_logprobs")
        if ids is None:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s says no token ids: its texts are tokenized again, which can give other ids than were sampled. "
                    "vLLM says them (return_token_ids, or --return-tokens-as-token-ids)",
                    self.url,
                )
            ids, logps = data.tokenize_after(self.tokenizer, text), None
        elif len(ids) > sampling.max_new_tokens or min(ids, default=0) < 0:
            raise ValueError(f"{len(ids)} token ids of at most {sampling.max_new_tokens}, the least {min(ids)}")
        ids = [int(i) for i in ids]
        # With stop strings and no reason given, a stop string or EOS may have ended it: then no EOS is appended.
        reason = choice.get("stop_reason")
        by_eos = finish == "stop" and not sampling.stop and not isinstance(reason, str)
        if by_eos and not (ids and (ids[-1] in eos or ids[-1] == reason)):
            ids += [i for i in (self.tokenizer.eos_token_id,) if i is not None]
        if logps is not None:
            logps = [float(x) for x in logps if x is not None]
            logps = logps if len(logps) == len(ids) else None
        return Generated(ids, finish, logps, text)

    def _request(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        given_up: threading.Event | None = None,
        retries: int | None = None,
    ) -> str:
        """Returns the answer's text; raises RolloutError when the server refuses, or is gone for good."""
        given_up = given_up or threading.Event()
        retries = self.retries if retries is None else retries
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        content = None if body is None else json.dumps(body).encode()
        for attempt in range(1, retries + 2):
            request = urllib.request.Request(self.url + path, data=content, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    answer = response.read().decode()
                if path == "/v1/completions":
                    json.loads(answer)  # a malformed answer is tried again
                return answer
            except urllib.error.HTTPError as error:
                try:
                    reason = error.read().decode(errors="replace")[:500]
                except (OSError, http.client.HTTPException):  # the status came, and its reason did not
                    reason = error.reason
                if error.code not in _TRANSIENT:
                    raise RolloutError(f"{self.url}{path} refuses the request: {error.code} {reason}") from error
                problem = f"{error.code} {reason}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            wait_s = min(self.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
            if attempt > retries or given_up.wait(wait_s):
                raise RolloutError(f"{self.url}{path} gave no answer in {attempt} attempts, at the last: {problem}")
        raise AssertionError


def save_policy(policy: Any, tokenizer: Any, folder: Path) -> Path:
    """Saves a whole policy into a folder of its own within `folder`, removes its earlier ones, and returns it.

    policy: not wrapped, but for PEFT, whose adapter is merged in a copy.
    """
    ours = f"policy-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}-"
    own = folder / (ours + uuid.uuid4().hex[:12])
    with appearing(own) as part:
        whole = merge(copy.deepcopy(policy)) if hasattr(policy, "get_base_model") else policy
        whole.save_pretrained(part)
        tokenizer.save_pretrained(part)
    for path in folder.glob(f"{ours}*"):
        if path != own:
            shutil.rmtree(path, ignore_errors=True)
    return own


def on_first_process(work: Callable[[], str]) -> str:
    """Runs `work` on the first process; all processes return its result, or raise its RolloutError."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return work()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except RolloutError as error:
            outcome[1] = str(error)
    name, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise RolloutError(problem)
    return name
