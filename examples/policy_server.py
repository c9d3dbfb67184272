"""A policy behind OpenAI's /v1/completions for a machine without vLLM; LoRA adapters are loaded as vLLM loads them.

    python examples/policy_server.py --port 8000

It makes one completion at a time, so it is slow, but it has vLLM's fields: token ids and their log-probs.
server_rollout.py samples from it. Nothing is kept between runs: after a restart it serves the base model and no
adapter.
"""

from __future__ import annotations

import argparse
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from peft import PeftModel

from xpo_fast.models import SMOLLM2, load_model
from xpo_fast.rollout import GenerateRollout, Sampling


class PolicyServer(HTTPServer):
    """Server of a model and its adapters by name; runs in a thread of its own until the context is left."""

    def __init__(self, model: Any, tokenizer: Any, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.tokenizer, self.completions = model, tokenizer, 0
        self.policies = {"base": GenerateRollout(model, tokenizer)}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """Returns the response to a request; raises KeyError for a policy that is not served."""
        if path == "/v1/models":
            return {"data": [{"id": n, "parent": None if n == "base" else "base"} for n in self.policies]}
        if path == "/v1/load_lora_adapter":
            adapted: Any = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"])
            self.policies[body["lora_name"]] = GenerateRollout(adapted, self.tokenizer)
            return "loaded"
        if path == "/v1/unload_lora_adapter":
            del self.policies[body["lora_name"]]
            return "unloaded"
        self.completions += 1
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"])
        prompt = self.tokenizer.decode(body["prompt"])
        made = self.policies[body["model"]].generate([prompt], sampling=sampling, seed=body["seed"])
        said: dict[str, Any] = {"text": made.completions[0], "finish_reason": made.finish[0]}
        said |= {"token_ids": made.completion_ids[0]}
        if made.logps is not None:
            said |= {"logprobs": {"token_logprobs": made.logps[0]}}
        return {"choices": [said]}


class Handler(BaseHTTPRequestHandler):
    server: PolicyServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, said = 200, self.server.answer(self.path, json.loads(body or "{}"))
        except KeyError as name:
            status, said = 404, f"{name} is not served"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    do_GET = do_POST

    def log_request(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    server = PolicyServer(*load_model(SMOLLM2, dtype="float32"), parser.parse_args().port)
    print(f"{', '.join(server.policies)} at {server.url}, until interrupted", flush=True)
    server.thread.join()
