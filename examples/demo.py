"""A small chat model learns a preference: SmolLM2-135M-Instruct, LoRA, DPO, no hub, under ten minutes on two cores.

    make demo        # or: python examples/demo.py --steps 64

The packaged pairs prefer a direct, brief answer to an evasive or padded one. The last 60 are held out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import logging as transformers_logging

import xpo_fast as xf
from xpo_fast import data
from xpo_fast.demo_data import PAIRS
from xpo_fast.models import causal_lm, load_model
from xpo_fast.trainer import XPOConfig, XPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from measure import peak_allocated_mib, time_interleaved

HELD_OUT = 60
QUESTION = "How do I keep cut apples from going brown?"


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ref: torch.Tensor
) -> torch.Tensor:
    return xf.Objective("dpo")(hidden, weight, targets, ref_logps=ref).loss


def materialised(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ref: torch.Tensor
) -> torch.Tensor:
    logprobs = (hidden @ weight.T).float().log_softmax(-1)
    logp = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    ratio = (logp * (targets != -100)).sum(-1) - ref
    chosen, rejected = ratio.chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def compare_losses(trainer: XPOTrainer) -> None:
    """Time and peak memory of loss and gradient, from the same hidden states of one batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    model = causal_lm(trainer.model)
    with torch.no_grad():
        decoder = model.get_decoder()
        hidden = decoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    hidden, weight = hidden.float(), model.get_output_embeddings().weight.detach().float()
    ref = torch.full((len(hidden),), -100.0)

    def gradient(loss: Any) -> Any:
        def run(_: Any) -> torch.Tensor:
            leaf = hidden.clone().requires_grad_()
            return torch.autograd.grad(loss(leaf, weight, batch["targets"], ref), leaf)[0]

        return run

    runs = {"fused": gradient(fused), "materialised": gradient(materialised)}
    peaks_mib = {name: peak_allocated_mib(lambda run=run: run(None)) for name, run in runs.items()}
    times_ms = time_interleaved(runs, [None], repeats=5)
    scored, all_ = int((batch["targets"] != -100).sum()), batch["targets"].numel()
    print(
        f"the DPO loss and its gradient on one batch ({all_} positions, {scored} of them scored, V {len(weight)}):"
    )
    for name in runs:
        print(f"  {name:<14}{sorted(times_ms[name])[2]:>8.0f} ms{peaks_mib[name][0]:>8.0f} MiB at the peak")
    difference = (peaks_mib["fused"][1] - peaks_mib["materialised"][1]).norm() / peaks_mib["materialised"][
        1
    ].norm()
    print(f"  their gradients differ by {difference:.0e}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=-1, help="training steps; all pairs once if not given")
    parser.add_argument("--output-dir", default="runs/demo")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    start = time.perf_counter()

    model, tokenizer = load_model("smollm2-135m", dtype="bfloat16")
    pairs = data.load(str(PAIRS), kind="pair")
    cut = len(pairs) - HELD_OUT
    config = XPOConfig(
        args.output_dir,
        method="dpo",
        max_length=128,
        learning_rate=2e-4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=15,
        max_steps=args.steps,
        num_train_epochs=1,
        warmup_steps=0.1,
        logging_steps=4,
        logging_first_step=True,
        save_strategy="no",
    )
    trainer = XPOTrainer(
        model,
        config,
        train_dataset=pairs.select(range(cut)),
        eval_dataset=pairs.select(range(cut, len(pairs))),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print(f"\nSmolLM2-135M-Instruct, LoRA, DPO on {cut} pairs, {HELD_OUT} held out\n")
    compare_losses(trainer)
    before, answer_before = trainer.held_out(), answer(trainer.model, tokenizer, QUESTION)
    trainer.train()
    after, answer_after = trainer.held_out(), answer(trainer.model, tokenizer, QUESTION)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"\ntraining loss: {losses[0]:.4f} at first (ln 2 = 0.6931), {losses[-1]:.4f} at last")
    print(f"\nheld out, {HELD_OUT} pairs{'before':>22}{'after':>10}")
    for label, name in {
        "loss": "eval_loss",
        "chosen has the higher reward": "eval_rewards/accuracies",
        "chosen is likelier per token": "eval_likelier_per_token",
    }.items():
        print(f"  {label:<30}{before[name]:>8.3f}{after[name]:>10.3f}")
    print(f"\nasked: {QUESTION}\n\nbefore: {answer_before}\n\nafter: {answer_after}")
    trainer.save_model()
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes; adapter saved in {args.output_dir}")


if __name__ == "__main__":
    main()
