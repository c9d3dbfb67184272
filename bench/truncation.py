"""How precise a log-prob can be whose products a tensor core makes: an emulation, with the bench's data.

    python bench/truncation.py

A tensor core of NVIDIA's multiplies bfloat16 operands exactly, 16 products at a time, and cuts off, not rounds, where it adds their
sum to the float32 accumulator (M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ
Computer Science 7:e330, 2021; measured there up to Ampere, taken here to hold of Hopper). The error of a logit then grows with the
width, and always towards zero. Beside it: an accumulator that rounds, and logits that pass through float16 or bfloat16 afterwards,
as peers' do.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from measure import table
from problem import make_batch, make_weight

K = 16  # products that are summed before the accumulator sees them


def towards_zero(x: np.ndarray) -> np.ndarray:
    """float64 → float32, cut off."""
    nearest = x.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(x)
    nearest[over] = np.nextafter(nearest[over], np.float32(0))
    return nearest


def to_nearest(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def products(hidden: np.ndarray, weight: np.ndarray, rounded) -> np.ndarray:
    """(N, V) float32 of (N, D) and (V, D), K terms at a time."""
    total = np.zeros((len(hidden), len(weight)), np.float32)
    for k in range(0, hidden.shape[1], K):
        total = rounded(total.astype(np.float64) + hidden[:, k : k + K] @ weight[:, k : k + K].T)
    return total


def staged(logits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(logits).to(dtype).float().numpy()


def logp_errors(width: int, vocab: int, tokens: int) -> dict[str, np.ndarray]:
    """(N,) errors of the log-probs by how the logits were made, on data as of bench/gpu.py."""
    batch = make_batch(make_weight(vocab, width, torch.bfloat16), 1, tokens, prompts=False, seed=0)
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
    first, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=details, formatter_class=style)
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
