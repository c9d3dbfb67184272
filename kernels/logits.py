"""From products h Wᵀ to final logits, as the kernels make them in registers: bias, scale, softcap and temperature."""

from __future__ import annotations

import triton
import triton.language as tl

# Where a running maximum starts, in place of −∞: differences, and their products with sums of exponentials, stay
# finite.
FLOOR = tl.constexpr(-1e30)


@triton.jit
def tanh(x):
    """Returns tanh x: below 1 a Padé approximant, exact to a rounding, where 1 − e^(−2|x|) would cancel."""
    s = x * x
    near = x * (135135.0 + s * (17325.0 + s * (378.0 + s))) / (135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 1.0, near, tl.where(x < 0, -far, far))


@triton.jit
def final(products, bias, at, vocab, gain, inner, ceiling, SOFTCAP: tl.constexpr, MASKED: tl.constexpr = True):
    """Returns the final logits of columns `at` of a row, and their derivatives by the products.

    MASKED: whether columns may lie beyond the vocabulary; their logits are −∞.
    """
    inside = at < vocab
    if MASKED:
        x = tl.load(products + at, mask=inside, other=0.0)
        if bias is not None:
            x += tl.load(bias + at, mask=inside, other=0.0)
    else:
        x = tl.load(products + at)
        if bias is not None:
            x += tl.load(bias + at)
    if SOFTCAP:
        t = tanh(x * inner)
        z = t * ceiling
        slope = gain * (1.0 - t * t)
    else:
        z = x * gain
        slope = gain
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    return z, slope


def scalars(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    """Returns (gain, inner, ceiling): z = gain x, or with a softcap z = ceiling tanh(inner x)."""
    if softcap is None:
        return logit_scale / temperature, 0.0, 0.0
    return logit_scale / temperature, logit_scale / softcap, softcap / temperature
