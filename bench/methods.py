"""Trains a real model with every method, twenty steps on real preference pairs, and compares its loss before and after.

    python bench/methods.py --data hh-rlhf-harmless-test.jsonl.gz --json bench/results/methods.json

The model is SmolLM2-135M-Instruct with LoRA on its last layers, the data a few short pairs of --data. Other inputs of
the methods are derived from the pairs. The chosen completion scores 1 and the rejected one 0; the chosen one is
preferred with probability 0.9. A list is both completions and their first halves, which score 0.7 and 0.2. A desirable
row has reward 1, an undesirable one −1. The samples of policy methods are the same rows, with 1 and −1 as advantages.

Methods with a data set run in XPOTrainer, as in `xpo-fast train`; policy methods in a plain loop with Objective; those
of reward models with a value head at the last token. Losses are those of the training rows, without dropout.
Exit status 1: a loss did not fall.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xpo_fast import METHODS, Head, Objective, data
from xpo_fast.bench.measure import environment, read_json, table
from xpo_fast.files import write_json
from xpo_fast.models import SMOLLM2, install_fused_loss, load_model
from xpo_fast.models.lm_head import causal_lm

# Hyperparameters without a default, or whose default switches off a part of the method.
SETTINGS: dict[str, dict[str, Any]] = {
    "cispo": {"eps": 0.2},
    "cringe": {"top_k": 1},
    "grpo": {"beta": 0.04},
    "dr_grpo": {"fixed_length": 64},
    "ppo": {"entropy_coef": 0.01},
    "beta_dpo": {"keep": 1.0},  # all pairs, so that both losses are of the same ones
    "grm": {"alpha": 0.5},
}
# These losses have weights without gradient that change with the policy, so gradient descent need not reduce their
# value. It is computed with the old and reference log-probs equal to the policy's, as they are at the start.
WEIGHTED = ("cispo", "nash_md", "vespo")
LAYERS = 4  # last layers of the model that are trained
SEED = 0


def raw_pairs(path: str, count: int) -> list[dict[str, Any]]:
    """Returns the first pairs of a file that have a short prompt."""
    rows: Any = data.load(path, kind="pair")
    short = (row for row in rows if sum(len(m["content"]) for m in row["prompt"]) < 120)
    pairs = [row for _, row in zip(range(count), short, strict=False)]
    return [{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in pairs]


def first_half(completion: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns a completion with the first half of its words."""
    words = completion[-1]["content"].split()
    return [*completion[:-1], {**completion[-1], "content": " ".join(words[: max(1, len(words) // 2)])}]


def rows_for(kind: str, pairs: list[dict[str, Any]], *, with_rejected: bool) -> list[dict[str, Any]]:
    """Returns the pairs as rows of a kind of data set, with all columns that a method may take."""
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        prompt, w, l = pair["prompt"], pair["chosen"], pair["rejected"]  # noqa: E741
        if kind == "pair":
            rows.append({**pair, "score_chosen": 1.0, "score_rejected": 0.0, "prob": 0.9})
        elif kind in ("chosen", "rejected"):
            rows.append(pair)
        elif kind == "unpaired":
            rows += [
                {"prompt": prompt, "completion": w, "label": True, "reward": 1.0},
                {"prompt": prompt, "completion": l, "label": False, "reward": -1.0},
            ]
        else:
            completions, scores = [w, first_half(w), first_half(l), l], [1.0, 0.7, 0.2, 0.0]
            row = {"prompt": prompt, "completions": completions, "scores": scores}
            rows.append({**row, "rejected": l} if with_rejected else row)
    return rows


def with_lora(model: Any) -> Any:
    """Returns the model with a new adapter on its last layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    layers = range(model.config.num_hidden_layers)[-LAYERS:]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        layers_to_transform=list(layers),
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    return get_peft_model(model, config)


def run_trainer(
    name: str, objective: Objective, model: Any, tokenizer: Any, pairs: list, args: argparse.Namespace
) -> tuple[float, float, str]:
    """Trains with XPOTrainer; returns the loss before, the loss after, and the kind of data."""
    from xpo_fast.trainer import XPOConfig, XPOTrainer

    rows = rows_for(objective.data_kind, pairs, with_rejected="ref_pos_logp_l" in METHODS[name].inputs)
    encoded = data.encode(
        data.load(rows, kind=objective.data_kind), tokenizer, kind=objective.data_kind, max_length=args.max_length
    )
    with tempfile.TemporaryDirectory() as folder:
        config = XPOConfig(
            folder,
            reference="adapter"
            if objective.needs_reference_tokens
            else "cached"
            if objective.needs_reference
            else "none",
            ref_cache_dir=folder,
            learning_rate=args.lr,
            max_steps=args.steps,
            per_device_train_batch_size=len(rows),
            per_device_eval_batch_size=len(rows),
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=args.cpu,
            seed=SEED,
        )
        trainer = XPOTrainer(
            with_lora(model),
            config,
            train_dataset=encoded,
            eval_dataset=encoded,
            processing_class=tokenizer,
            objective=objective,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    trainer.model.unload()
    return before, after, objective.data_kind


def policy_loss(objective: Objective, batch: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    """Returns the loss of sampled rows as a function of the model; old and reference log-probs are those at the start.

    For the methods in WEIGHTED, the value without gradient, which is reported, uses the model's own instead.
    """
    name = objective.method.name
    rows = batch["input_ids"].shape[0] // 2
    sign = torch.cat([torch.ones(rows), -torch.ones(rows)]).to(batch["targets"].device)
    columns: dict[str, Tensor] = {"advantage": sign, "prob_w": (sign + 1) / 2 * 0.8 + 0.1}
    columns = {k: v for k, v in columns.items() if k in METHODS[name].columns}

    def loss(model: Any) -> Tensor:
        def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
            from xpo_fast import token_logps

            own = token_logps(hidden.detach(), head.weight.detach(), batch["targets"])
            start = batch.setdefault("start", own)
            if name in WEIGHTED and not torch.is_grad_enabled():
                start = own
            more: dict[str, Any] = dict(columns)
            if "old_logp" in METHODS[name].columns:
                more["old_logp"] = start
            if "ptx_logp" in METHODS[name].columns:  # the chosen rows stand for pretraining text
                text = batch["targets"].clone()
                text[rows:] = data.IGNORE_INDEX
                more |= {"ptx_logp": token_logps(hidden, head.weight, text), "ptx_mask": text != data.IGNORE_INDEX}
            if objective.needs_reference:
                more["ref_logps"] = start
            out = objective(hidden, head, batch["targets"], **more)
            return {"loss": out.loss}

        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], fused_loss=fused)["loss"]

    return loss


def reward_loss(name: str, batch: dict[str, Tensor], hyper: dict[str, Any]) -> Callable[[Any, nn.Module], Tensor]:
    """Returns the loss of a reward model as a function of the model and a value head (D → 4) at each row's last token.

    Methods that also have log-probs as inputs get the model's own, with those at the start as the reference's.
    """
    method = METHODS[name]
    rows = batch["input_ids"].shape[0] // 2
    last = (batch["targets"] != data.IGNORE_INDEX).int().cumsum(1).argmax(1) + 1
    scored = batch["targets"] != data.IGNORE_INDEX
    sign = torch.cat([torch.ones(rows), -torch.ones(rows)])

    def loss(model: Any, value_head: nn.Module) -> Tensor:
        def fused(hidden: Tensor, head: Head) -> dict[str, Any]:
            values = value_head(hidden)  # (2P, T, 4)
            at = values[torch.arange(2 * rows), last]  # (2P, 4)
            reward_w, reward_l = at[:, 0].chunk(2)
            group = torch.stack([reward_w, reward_l], dim=1)
            ranks, wanted = (torch.tensor([pair]).expand(rows, 2) for pair in ([1.0, 2.0], [1.0, -1.0]))
            known: dict[str, Tensor] = {"reward_w": reward_w, "reward_l": reward_l, "logit": reward_w - reward_l}
            known |= {"rewards": group, "ranks": ranks, "targets": wanted, "prob_w": torch.full((rows,), 0.9)}
            known |= {"rewards_w": at[:rows, :2], "rewards_l": at[rows:, :2]}
            known |= {"gate_w": at[:rows, 2:], "gate_l": at[rows:, 2:], "value": values[..., 0], "mask": scored}
            known |= {"old_value": torch.zeros_like(values[..., 0]), "returns": sign[:, None].expand(scored.shape)}
            if name == "discriminator":
                known |= {"logit": at[:, 0], "desirable": sign > 0}
            given: dict[str, Any] = {n: x for n, x in known.items() if n in method.inputs}
            if method.layout == "reward":
                given.pop("mask", None)  # there it is a mask of completions, none of which is missing
            if "logp_w" in method.inputs:
                batch.setdefault("start", _row_logps(hidden, head, batch["targets"]).detach())
                given = {n: x for n, x in given.items() if n in method.columns}
                out = Objective(name, **hyper)(hidden, head, batch["targets"], ref_logps=batch["start"], **given)
                return {"loss": out.loss}
            losses = method(**given, **hyper)[0]
            return {"loss": losses.sum() / (scored.sum() if losses.dim() == 2 else len(losses))}

        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], fused_loss=fused)["loss"]

    return loss


def _row_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    from xpo_fast import sequence_logps

    with torch.no_grad():
        return sequence_logps(hidden, head, targets)[0]


def run_loop(
    name: str, hyper: dict[str, Any], model: Any, tokenizer: Any, pairs: list, args: argparse.Namespace
) -> tuple[float, float, str]:
    """Trains in a plain loop; returns the loss before, the loss after, and what the method was trained on."""
    encoded: Any = data.encode(
        data.load(rows_for("pair", pairs, with_rejected=False), kind="pair"),
        tokenizer,
        kind="pair",
        max_length=args.max_length,
    )
    batch = data.Collator(tokenizer.pad_token_id, "pair")(list(encoded))
    install_fused_loss(model)
    adapted = with_lora(model).eval()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    method = METHODS[name]
    if method.layout == "policy" and "returns" not in method.inputs:
        loss, what = policy_loss(Objective(name, **hyper), batch), "rollouts"
    else:
        value_head = nn.Linear(causal_lm(adapted).config.hidden_size, 4)
        nn.init.normal_(value_head.weight, std=0.01)
        parameters += list(value_head.parameters())
        of_reward = reward_loss(name, batch, hyper)
        loss, what = (lambda m: of_reward(m, value_head)), "value head"
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    with torch.no_grad():
        before = float(loss(adapted))
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss(adapted).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        after = float(loss(adapted))
    adapted.unload()
    return before, after, what


def run(names: Iterable[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains with each method and returns a record of each; the file of --json is updated after every method."""
    options = {k: v for k, v in vars(args).items() if k not in ("json", "data", "methods")}
    pairs = raw_pairs(args.data, args.pairs)
    model, tokenizer = load_model(args.model, dtype="float32")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    records = []
    for name in names:
        hyper = SETTINGS.get(name, {})
        start = time.perf_counter()
        objective = None
        try:
            objective = Objective(name, **hyper)
            kind = objective.data_kind
            if any(n.startswith("reward_") for n in METHODS[name].inputs):
                raise ValueError(kind)
        except ValueError:
            before, after, what = run_loop(name, hyper, model, tokenizer, pairs, args)
        else:
            before, after, what = run_trainer(name, objective, model, tokenizer, pairs, args)
        record = {
            "commit": environment()["commit"],
            "method": name,
            "settings": hyper,
            "data": what,
            "steps": args.steps,
            "loss_before": before,
            "loss_after": after,
            "fell": after < before and math.isfinite(after),
            "seconds": time.perf_counter() - start,
        }
        print(f"{name:<20} {before:10.5f} {after:10.5f} {record['seconds']:6.1f} s", file=sys.stderr, flush=True)
        records.append(record)
        if args.json:
            kept = {r["method"]: r for r in read_json(args.json).get("methods", [])} | {name: record}
            content = {"environment": environment(), "options": options, "methods": [kept[n] for n in sorted(kept)]}
            write_json(args.json, content)
    return records


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="preference pairs, as data.load reads them")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--methods", metavar="NAME,…", help="only these methods (default: all)")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the records to FILE, and keep those of other methods in it"
    )
    args = parser.parse_args()
    logging.getLogger("xpo_fast").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    names = args.methods.split(",") if args.methods else sorted(METHODS)
    records = run(names, args)
    rows = [
        [r["method"], r["data"], f"{r['loss_before']:.5f}", f"{r['loss_after']:.5f}", f"{r['seconds']:.0f}"]
        for r in records
    ]
    print(table(["method", "data", "loss before", f"after {args.steps} steps", "seconds"], rows))
    stuck = [r["method"] for r in records if not r["fell"]]
    if stuck:
        print(f"did not fall: {', '.join(stuck)}", file=sys.stderr)
    return 1 if stuck else 0


if __name__ == "__main__":
    sys.exit(main())
