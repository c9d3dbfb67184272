"""Emulates the precision of log-probs whose products a tensor core computes, on the data of the benchmarks.

    python bench/truncation.py

NVIDIA's tensor cores multiply bfloat16 operands exactly, and truncate, instead of rounding, where they add the sum of
16 products to the float32 accumulator (M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh: Numerical behavior of NVIDIA
tensor cores, PeerJ Computer Science 7:e330, 2021; measured there up to Ampere, and assumed here for Hopper). So the
error of a logit grows with the width, and is always towards zero. For comparison: an accumulator that rounds, and
logits that pass through float16 or bfloat16 afterwards, as peers' logits do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch

from xpo_fast.bench.measure import table
from xpo_fast.bench.problem import make_batch, make_weight

K = 16  # products that are summed before they are added to the accumulator


def towards_zero(x: np.ndarray) -> np.ndarray:
    """Truncates float64 to float32."""
    nearest = x.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(x)
    nearest[over] = np.nextafter(nearest[over], np.float32(0))
    return nearest


def to_nearest(x: np.ndarray) -> np.ndarray:
    """Rounds float64 to float32."""
    return x.astype(np.float32)


def products(hidden: np.ndarray, weight: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns logits (N, V) float32 of hidden (N, D) and weight (V, D), accumulating K terms at a time."""
    total = np.zeros((len(hidden), len(weight)), np.float32)
    for k in range(0, hidden.shape[1], K):
        total = rounded(total.astype(np.float64) + hidden[:, k : k + K] @ weight[:, k : k + K].T)
    return total


def staged(logits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounds logits to a dtype and back to float32."""
    return torch.from_numpy(logits).to(dtype).float().numpy()


def logp_errors(width: int, vocab: int, tokens: int) -> dict[str, np.ndarray]:
    """Returns the errors (N,) of log-probs by the arithmetic of their logits, on data like that of bench/gpu.py."""
    batch = make_batch(make_weight(vocab, width, torch.bfloat16), 1, tokens, prompt=0, seed=0)
    hidden, weight = batch.hidden[0].double().numpy(), batch.weight.double().numpy()
    at = np.arange(tokens), batch.targets[0].numpy()

    def logps(logits: np.ndarray) -> np.ndarray:
        z = logits.astype(np.float64)
        top = z.max(1)
        return z[at] - top - np.log(np.exp(z - top[:, None]).sum(1))

    cut = products(hidden, weight, towards_zero)
    made = {
        "cut off": cut,
        "rounded": products(hidden, weight, to_nearest),
        "cut off, then float16": staged(cut, torch.float16),
        "cut off, then bfloat16": staged(cut, torch.bfloat16),
    }
    exact = logps(hidden @ weight.T)
    return {name: logps(logits) - exact for name, logits in made.items()}


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[2048, 4096], metavar="D")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    lines = []
    for width in args.widths:
        for name, errors in logp_errors(width, args.vocab, args.tokens).items():
            rms = np.sqrt(np.square(errors).mean())
            lines.append([f"D {width}, {name}", f"{np.abs(errors).max():.1e}", f"{rms:.1e}"])
    print(table(["log-probs against float64, logits", "largest error", "RMS"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
