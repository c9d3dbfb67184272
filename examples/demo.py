"""A small chat model learns a preference: SmolLM2-135M-Instruct, LoRA, DPO, no hub, under ten minutes on two cores.

    make demo        # or: python examples/demo.py --steps 64

The packaged pairs prefer a direct, brief answer to an evasive or padded one. The last 60 are held out. The frozen
weights have the dtype that is fastest on this machine, and if one step takes long, fewer steps are taken.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig
from transformers import logging as transformers_logging

import xpo_fast as xf
from xpo_fast import data, precision
from xpo_fast.bench.measure import peak_allocated_mib, time_interleaved
from xpo_fast.demo_data import PAIRS
from xpo_fast.files import cache_dir
from xpo_fast.models import load_model
from xpo_fast.models.lm_head import causal_lm
from xpo_fast.trainer import XPOConfig, XPOTrainer

HELD_OUT = 60
BUDGET_S = 9.25 * 60  # steps may be slower later than when they are timed
LEAST_STEPS = 4
# Cost of the held-out rows before and after training, in steps: three forward passes each, where a step of 16 rows has
# two forward passes and a backward.
STEPS_PER_HELD_OUT_PAIR = 2 * 6 / 60
QUESTION = "How do I keep cut apples from going brown?"


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    return xf.Objective("dpo")(hidden, weight, targets, ref_logps=ref).loss


def materialised(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    logprobs = (hidden @ weight.T).float().log_softmax(-1)
    logp = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    ratio = (logp * (targets != -100)).sum(-1) - ref
    chosen, rejected = ratio.chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def compare_losses(trainer: XPOTrainer) -> None:
    """Prints time and peak memory of loss and gradient for the same hidden states of one batch."""
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
    times_ms = time_interleaved(runs, [None], repeats=3)
    scored, all_ = int((batch["targets"] != -100).sum()), batch["targets"].numel()
    print(f"the DPO loss and its gradient on one batch ({all_} positions, {scored} of them scored, V {len(weight)}):")
    for name in runs:
        print(f"  {name:<14}{sorted(times_ms[name])[1]:>8.0f} ms{peaks_mib[name][0]:>8.0f} MiB at the peak")
    difference = (peaks_mib["fused"][1] - peaks_mib["materialised"][1]).norm() / peaks_mib["materialised"][1].norm()
    print(f"  their gradients differ by {difference:.0e}\n")


def seconds_per_step(trainer: XPOTrainer) -> float:
    """Returns the time of forward and backward on one batch, as in training, without updating the weights."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad()
    trainer._means.pop()
    return time.perf_counter() - start


def affordable(step_s: float, steps: int, left_s: float) -> tuple[int, int]:
    """Returns the steps and held-out pairs that fit: all, or half of the pairs and at least LEAST_STEPS."""
    left = left_s / step_s - 2  # the two generated answers take about a step each
    if steps + STEPS_PER_HELD_OUT_PAIR * HELD_OUT <= left:
        return steps, HELD_OUT
    pairs = HELD_OUT // 2
    return min(steps, max(LEAST_STEPS, int(left - STEPS_PER_HELD_OUT_PAIR * pairs))), pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps (default: all pairs once, if time allows)")
    parser.add_argument("--output-dir", default="runs/demo")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    start = time.perf_counter()

    dtype = precision.fastest()
    print(f"loading SmolLM2-135M-Instruct in {precision.name_of(dtype)}: ", end="", flush=True)
    print(f"bfloat16 is {precision.support(torch.bfloat16, precision.default_device())}", flush=True)
    model, tokenizer = load_model("smollm2-135m", dtype=dtype)
    pairs = data.load(str(PAIRS), kind="pair")
    cut = len(pairs) - HELD_OUT
    config = XPOConfig(
        args.output_dir,
        method="dpo",
        max_length=128,
        learning_rate=2e-4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=15,
        num_train_epochs=1,
        warmup_steps=0.1,
        logging_steps=4,
        logging_first_step=True,
        save_strategy="no",
        disable_tqdm=False,
    )
    trainer = XPOTrainer(
        model,
        config,
        train_dataset=pairs.select(range(cut)),
        eval_dataset=pairs.select(range(cut, len(pairs))),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print(f"\nSmolLM2-135M-Instruct, LoRA, DPO on {cut} pairs, {HELD_OUT} held out\n", flush=True)
    compare_losses(trainer)
    trainer.prepare()  # settles in which layout rows are read
    step_s = seconds_per_step(trainer)
    every = -(-cut // config.per_device_train_batch_size)
    left_s = BUDGET_S - (time.perf_counter() - start)
    steps, held_out = affordable(step_s, args.steps or every, left_s)
    if args.steps:
        steps = args.steps
    config.max_steps = steps
    trainer.eval_dataset = trainer.eval_dataset.select(range(held_out))
    minutes = step_s * (steps + STEPS_PER_HELD_OUT_PAIR * held_out) / 60
    print(f"a step takes {step_s:.1f} s here: {steps} steps and {held_out} pairs held out, about {minutes:.0f} min")
    if steps < (args.steps or every):
        print(f"({every} steps would go once over all pairs: --steps {every} takes them, however long it is)")
    print("\nheld out, before training", flush=True)
    try:
        before, answer_before = trainer.held_out(), answer(trainer.model, tokenizer, QUESTION)
        print("\ntraining", flush=True)
        trainer.train()
        print("\nheld out, after training", flush=True)
        after, answer_after = trainer.held_out(), answer(trainer.model, tokenizer, QUESTION)
    except KeyboardInterrupt:
        done = trainer.state.global_step
        if done:
            trainer.save_model()
        kept = f"the adapter as of step {done} is in {args.output_dir}" if done else "no step was finished"
        print(f"\nstopped: {kept}; the converted model stays in {cache_dir()}, the next start is faster")
        return 130

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"\ntraining loss: {losses[0]:.4f} at first (ln 2 = 0.6931), {losses[-1]:.4f} at last")
    print(f"\nheld out, {held_out} pairs{'before':>22}{'after':>10}")
    for label, name in {
        "loss": "eval_loss",
        "chosen has the higher reward": "eval_rewards/accuracies",
        "chosen is likelier per token": "eval_likelier_per_token",
    }.items():
        print(f"  {label:<30}{before[name]:>8.3f}{after[name]:>10.3f}")
    print(f"\nasked: {QUESTION}\n\nbefore: {answer_before}\n\nafter: {answer_after}")
    trainer.save_model()
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes; adapter saved in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
